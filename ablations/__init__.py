"""The papers' ablation tables: notebooks, and what they share. Used from the repository, never installed."""

"""The report's pages: what notebooks/10_report.ipynb builds. Used from the repository, never installed."""

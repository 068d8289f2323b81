"""Methods over a test set, their scores, what these prove, figures, the papers' numbers."""

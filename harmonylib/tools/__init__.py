"""The command line, the notebook runner and the browser app. No stage depends on them."""

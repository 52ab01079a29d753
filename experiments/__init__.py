"""Scripts, run from the repository's root as `python -m experiments.<name>`; never installed."""

"""`save.py` runs only on an old commit: the collection of doctests must not import it."""

collect_ignore = ["save.py"]

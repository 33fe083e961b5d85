"""`save.py` runs on an old commit alone: the collection of doctests must not import it."""

collect_ignore = ["save.py"]

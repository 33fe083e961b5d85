"""Jobs that run in parallel: runs of a sweep, arms of a study."""

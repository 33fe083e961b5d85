"""Processes side by side: runs of a sweep, arms of a study."""

"""Marks test cases that a quick run leaves out."""

import pytest


def slow_but(quick, cases):
    """The cases as parameters of a test, with those outside `quick` marked as slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]

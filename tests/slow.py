"""Which cases of a test a quick run of the tests leaves out."""

import pytest


def slow_but(quick, cases):
    """The cases as parameters of a test: those that are not among the quick ones are slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]

"""A changed number in data, model, optimizer or step shows up here first."""

import pytest

from tests.golden.make import HERE, NUM_STEPS, RUNS, losses

# Ten steps of Adam amplify rounding differences between machines or ways to run experts up to
# this. A changed computation shows in the third digit or earlier.
RELATIVE_TOLERANCE = 1e-4


def test_each_run_has_a_file_and_each_file_a_run():
    assert {path.stem for path in HERE.glob("*.txt")} == set(RUNS)


@pytest.mark.parametrize(
    ("run", "run_experts"),
    [
        pytest.param("top1", "einsum", marks=pytest.mark.slow),
        ("top1", "gather"),
        pytest.param("top1", "ragged", marks=pytest.mark.slow),
        pytest.param("top2_shared", "einsum", marks=pytest.mark.slow),
        pytest.param("top2_shared", "gather", marks=pytest.mark.slow),
        ("top2_shared", "ragged"),
    ],
)
def test_losses_are_those_on_record(run, run_experts):
    path = HERE / f"{run}.txt"
    golden = [
        (int(step), float(loss)) for step, loss in map(str.split, path.read_text().splitlines())
    ]
    assert [step for step, _ in golden] == list(range(1, NUM_STEPS + 1))
    for (step, expected), loss in zip(golden, losses(run, run_experts), strict=True):
        assert abs(loss - expected) <= RELATIVE_TOLERANCE * expected, (
            f"step {step} of {run} by {run_experts}: loss {loss:.6f}, on record {expected:.6f}. If "
            "it is meant to change, run `python -m tests.golden.make` and say why in the commit."
        )

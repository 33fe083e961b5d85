"""Writes the collectives of the compiled steps: `python -m tests.hlo.make_collectives`."""

import jax

# Before anything that starts JAX is imported.
jax.config.update("jax_num_cpu_devices", 8)

from tests.test_parallel_training import CASES, COLLECTIVES, golden_line  # noqa: E402

if __name__ == "__main__":
    lines = [f"jax {jax.__version__}", *(golden_line(*case.values) for case in CASES)]
    COLLECTIVES.write_text("\n".join(lines) + "\n", encoding="utf-8")

"""Repeatedly starts a run as two CPU processes, and counts the starts that end well.

    python -m benchmarks.clean_starts --starts=50 --results=starts.jsonl

Each start is two new processes over gloo that compile and take the steps of the quickstart's smoke
model with two microbatches. If the processes run collectives in different orders, a start fails
within ten steps (docs/parallelism.md). One line per start is appended to the results; the same
command resumes until there are --starts lines. `--cached` keeps JAX's cache of compiled programs
on, to test whether the installed jaxlib still mixes up the order.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
NUM_STEPS = 12
LIMIT_SECONDS = 900


def train(workdir: str, index: int, port: int, cached: bool) -> None:
    """Runs one of the two processes."""
    from moe_jax.parallel import processes
    from moe_jax.train import command

    if cached:
        processes._compile_anew_on_cpu = lambda: None
    settings = {
        "num_microbatches": 2, "num_steps": NUM_STEPS, "evaluate_every": 0, "sample_tokens": 0,
        "checkpoint_every": NUM_STEPS,
    }  # fmt: skip
    place = ["--processes=2", f"--process_id={index}", f"--coordinator=localhost:{port}"]
    changed = [f"--config.training.{name}={value}" for name, value in settings.items()]
    config = f"--config={ROOT}/configs/quickstart.py:smoke"
    sys.exit(command([config, f"--workdir={workdir}", *place, *changed]))


def start(cached: bool, cache: str) -> dict[str, object]:
    """Starts both processes, waits for them, and returns how they ended."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.clean_starts", f"--workdir={folder}/run"]
        command += [f"--port={port}", *(["--cached"] if cached else [])]
        both = [
            subprocess.Popen(
                [*command, f"--index={index}"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env=environment,
            )
            for index in range(2)
        ]  # fmt: skip
        try:
            errors = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in both]
        finally:
            for process in both:
                process.kill()
    codes = [process.returncode for process in both]
    why = [line for text in errors for line in text.splitlines() if "mismatch" in line]
    return {"cached": cached, "codes": codes, "seconds": time.monotonic() - began, "why": why[:1]}


def main() -> None:
    """Makes the missing starts and prints how many ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("starts.jsonl"))
    parser.add_argument("--cached", action="store_true")
    for name in ("--workdir", "--index", "--port"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.index is not None:
        train(given.workdir, int(given.index), int(given.port), given.cached)
        return
    lines = given.results.read_text().splitlines() if given.results.exists() else []
    rows = [row for row in map(json.loads, lines) if row["cached"] == given.cached]
    with tempfile.TemporaryDirectory() as cache:
        while len(rows) < given.starts:
            rows.append(start(given.cached, cache))
            with given.results.open("a") as stream:
                stream.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    clean = sum(row["codes"] == [0, 0] for row in rows)
    print(f"{clean} of {len(rows)} starts ended well")


if __name__ == "__main__":
    main()

"""Peak memory of reading and writing a model of several GB: `python -m benchmarks.convert_memory`.

Writes a Mixtral-shaped model of random bfloat16 in files of 1 GB. Then it measures the peak
resident memory above that of the imports, each in its own process: reading the model as stored,
converting it to a run (float32), and writing it back.
"""

import functools
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from absl import app, flags

from moe_jax.config.json_text import json_text
from moe_jax.interchange.family import load_family
from moe_jax.interchange.leaves import leaves_of
from moe_jax.interchange.tensor_files import TensorFiles, ToWrite, write_tensors
from moe_jax.interchange.write import tensors_of

LAYERS = flags.DEFINE_integer("layers", 8, "Layers; each is of 0.37 GB in bfloat16.")
FOLDER = flags.DEFINE_string("folder", None, "Where model and run go; by default temporary.")

SETTINGS = {
    "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 7168, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
IMPORTS = (
    "import jax, moe_jax, moe_jax.convert, moe_jax.training.imported, moe_jax.interchange.read"
)
PEAK = "int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024"


def write_model(directory: pathlib.Path, layers: int) -> int:
    """Writes the model; returns its bytes."""
    settings = {**SETTINGS, "num_hidden_layers": layers}
    family = load_family("mixtral")
    model = family.read(settings)
    leaves = leaves_of(model)
    dtype = np.dtype(ml_dtypes.bfloat16)
    empty = {leaf.path: np.empty(0, dtype) for leaf in leaves}
    random = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (random.standard_normal(shape, np.float32) * 0.02).astype(dtype)

    tensors = [
        ToWrite(one.name, dtype, one.shape, functools.partial(draw, one.shape))
        for one in tensors_of(family, model, leaves, empty, None)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json_text({**settings, "dtype": "bfloat16"}))
    write_tensors(directory, tensors, shard_bytes=1_000_000_000)
    return sum(one.nbytes for one in tensors)


def peak_of(code: str) -> tuple[float, float]:
    """Peak GB above the imports, and seconds, of code in a new process."""
    program = f"{IMPORTS}; jax.devices(); base = {PEAK}\n{code}\nprint({PEAK} - base)"
    start = time.perf_counter()
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1]) / 1e9, time.perf_counter() - start


def main(_: list[str]) -> None:
    """Measures each way and prints a line for each."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(FOLDER.value or temporary)
        hf, run, back = folder / "hf", folder / "run", folder / "back"
        size = write_model(hf, LAYERS.value) / 1e9
        print(f"model: {size:.2f} GB in bfloat16, {len(list(hf.glob('*.safetensors')))} files")
        convert = "from moe_jax.__main__ import main; main(['convert', {}, '--workdir={}'])"
        ways = {
            "from_hf, as stored": f"kept = moe_jax.from_hf({str(hf)!r})",
            "convert --from-hf": convert.format(repr(f"--from-hf={hf}"), run),
            "convert --to-hf": convert.format(repr(f"--to-hf={back}"), run),
        }
        targets = {"from_hf, as stored": size, "convert --from-hf": 2 * size}
        for name, code in ways.items():
            peak, seconds = peak_of(code)
            target = targets.get(name, 2 * size)
            print(
                f"{name}: peak {peak:.2f} GB, {peak - target:+.2f} GB above the target of "
                f"{target:.2f} GB; {seconds:.0f} s"
            )
        old, new = TensorFiles(hf), TensorFiles(back)
        same = set(old.tensors) == set(new.tensors) and all(
            old.read(name).tobytes() == new.read(name).tobytes() for name in old.tensors
        )
        print(f"tensors written back are {'equal byte for byte' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    app.run(main)

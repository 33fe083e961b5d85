"""Multiplies rows sorted by expert by the weights of their experts; selects the kernel.

A grouped matmul and its gradients are three products, each within the rows of one expert: rows by
weights (forward), rows by transposed weights (gradient of the rows), and transposed rows by rows
(gradient of the weights). Without a kernel, XLA multiplies every row by every expert, at E times
the FLOPs. That is "dense", which must be requested by name.

  loop        CPU: whole experts, one after another, on blocks of their rows (`rows.expert_loop`)
  lax         TPU: `jax.lax.ragged_dot`, where libtpu has a kernel for each of the three products
  megablox    TPU: the Pallas kernels that come with JAX
  triton      NVIDIA: Pallas kernels of this project (`grouped_triton`)
  mosaic_gpu  NVIDIA, Hopper only: the Pallas kernels that come with JAX
  dense       anywhere: `jax.lax.ragged_dot` as XLA expands it

On a CPU, megablox and triton run in Pallas's interpreter, for tests. Legend: `moe_jax.moe`.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.moe.run_experts import grouped_megablox, grouped_mosaic, grouped_triton
from moe_jax.parallel.rules import platform

# FLOPs of `jax.lax.ragged_dot` and its gradients over those of the rows, 8 experts per device:
#
#   libtpu          v5e   v5p   v6e
#   0.0.42.1        3.34  3.34  3.34   no kernel for the gradient of the weights
#   0.0.45, 0.0.47  5.67  1.00  5.67   on v5e and v6e none for the gradient of the rows either
#   0.0.50.1        1.00  1.00  1.00
#
# "lax" needs a libtpu that has every kernel.
LAX_MIN_LIBTPU = (0, 0, 50)


class Target(NamedTuple):
    """What a program is compiled for.

    Attributes:
      platform: "cpu", "tpu" or "gpu".
      libtpu: version of the TPU compiler, or None if it is not known.
      capability: CUDA compute capability; (0, 0) for a GPU of another maker, None for a GPU that is
        not on this machine.
    """

    platform: str
    libtpu: tuple[int, ...] | None = None
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        """As in "platform tpu, libtpu 0.0.42.1"."""
        versions = {"libtpu": self.libtpu, "capability": self.capability}
        installed = [f"{name} {'.'.join(map(str, v))}" for name, v in versions.items() if v]
        return ", ".join([f"platform {self.platform}", *installed])


class Need(NamedTuple):
    """What a kernel needs, as a rule and in words."""

    is_met: Callable[[Target], bool]
    words: str


NEEDS = {
    "loop": Need(lambda target: target.platform == "cpu", "a CPU"),
    "lax": Need(
        lambda target: target.platform == "tpu" and (target.libtpu or ()) >= LAX_MIN_LIBTPU,
        "a TPU with libtpu 0.0.50 or newer (jax[tpu]>=0.12.0.1, Python 3.12)",
    ),
    "megablox": Need(lambda target: target.platform in ("tpu", "cpu"), "a TPU"),
    "triton": Need(
        lambda target: (
            target.platform == "cpu"
            or (target.platform == "gpu" and (target.capability or (8, 0)) >= (8, 0))
        ),
        "an NVIDIA GPU of compute capability 8.0 or newer",
    ),
    "mosaic_gpu": Need(
        lambda target: target.platform == "gpu" and (target.capability or (9, 0))[0] == 9,
        "an NVIDIA GPU of compute capability 9.0",
    ),
    "dense": Need(lambda target: True, "any device"),
}
# For "auto": the first whose needs are met.
PREFERRED = {"cpu": ("loop",), "tpu": ("lax", "megablox"), "gpu": ("triton",)}
KERNELS = ("auto", *NEEDS)


def choose_kernel(name: str, target: Target) -> str:
    """The kernel that a setting selects on a target.

    Args:
      name: one of `KERNELS`.
      target: what the program is compiled for.

    Raises:
      ValueError: the target does not meet the kernel's needs, or no kernel fits it.
    """
    by_name = "or grouped_matmul='dense' to multiply every row by every expert"
    if name != "auto":
        if not NEEDS[name].is_met(target):
            raise ValueError(
                f"grouped_matmul={name!r} needs {NEEDS[name].words}: got {target}. Set "
                f"grouped_matmul='auto', {by_name}."
            )
        return name
    best = best_kernel(target)
    if best is not None:
        return best
    preferred = PREFERRED.get(target.platform, ())
    needs = " or ".join(NEEDS[name].words for name in preferred) or "a CPU, a TPU or a GPU"
    raise ValueError(
        f"run_experts='ragged' needs {needs}: got {target}. Set run_experts='gather', {by_name}."
    )


def best_kernel(target: Target) -> str | None:
    """The default kernel of a target; None if no kernel fits it."""
    preferred = PREFERRED.get(target.platform, ())
    return next((name for name in preferred if NEEDS[name].is_met(target)), None)


def target_in_use() -> Target:
    """The target of the program that is being traced; its devices need not be on this machine."""
    name = platform()
    return Target(
        name,
        libtpu=libtpu_version() if name == "tpu" else None,
        capability=cuda_capability() if name == "gpu" else None,
    )


def libtpu_version() -> tuple[int, ...] | None:
    """The version of the TPU compiler, such as (0, 0, 50, 1); None if no package provides it."""
    if not is_of_package(os.environ.get("TPU_LIBRARY_PATH", "")):
        return None
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def is_of_package(library: str) -> bool:
    """Whether a path of the TPU library is empty or belongs to the package libtpu."""
    found = importlib.util.find_spec("libtpu")
    return not library or (
        found is not None
        and found.origin is not None
        and os.path.dirname(os.path.abspath(library)) == os.path.dirname(found.origin)
    )


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the GPUs of this process: see `Target`."""
    if jax.default_backend() not in ("gpu", "cuda", "rocm"):
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", str(jax.local_devices()[0].compute_capability))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def says_how_it_varies(kernel: str) -> bool:
    """Whether `jax.shard_map` may check how results vary over the mesh (`check_vma`).

    The kernels that JAX ships do not declare it, nor does Pallas's interpreter. Gradients are the
    same unchecked; under `tensor` an extra all-reduce ensures it.
    """
    return kernel not in ("megablox", "mosaic_gpu") and not (
        kernel == "triton" and platform() == "cpu"
    )


def grouped_matmul(
    x_RI: jax.Array,
    weight_EIO: jax.Array,
    group_sizes_E: jax.Array,
    kernel: str,
    likely_rows: int,
) -> jax.Array:
    """Each row times the weights of its group.

    Args:
      x_RI: rows sorted by group, bfloat16 or float32; rows past the last group do not affect the
        result, but must be finite in "dense".
      weight_EIO: in the dtype of `x_RI`.
      group_sizes_E: int32, rows of each group; their sum is at most R.
      kernel: of `KERNELS`, but neither "auto" nor "loop".
      likely_rows: the likely number of rows of all groups, which sets the tile sizes.

    Returns:
      [R, O] in the dtype of `x_RI`, accumulated in float32. Rows past the last group are undefined,
      also in the gradient of `x_RI`. The gradient of the weights of an empty group is 0.
    """
    if kernel in ("lax", "dense"):
        return jax.lax.ragged_dot(x_RI, weight_EIO, group_sizes_E)
    return by_kernel(kernel, likely_rows, x_RI, weight_EIO, group_sizes_E)


class Products(NamedTuple):
    """The three products of a kernel.

    Attributes:
      rows: (x_RI, weight_EIO, group_sizes_E, likely_rows, transposed) -> [R, O]; if transposed, the
        weights are [E, O, I].
      weights: (x_RI, dy_RO, group_sizes_E, likely_rows) -> [E, I, O].
    """

    rows: Callable[[jax.Array, jax.Array, jax.Array, int, bool], jax.Array]
    weights: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


PRODUCTS = {
    "megablox": Products(grouped_megablox.rows, grouped_megablox.weights),
    "triton": Products(grouped_triton.rows, grouped_triton.weights),
    "mosaic_gpu": Products(grouped_mosaic.rows, grouped_mosaic.weights),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def by_kernel(
    kernel: str,
    likely_rows: int,
    x_RI: jax.Array,
    weight_EIO: jax.Array,
    group_sizes_E: jax.Array,
) -> jax.Array:
    """`grouped_matmul` by one of `PRODUCTS`."""
    return PRODUCTS[kernel].rows(x_RI, weight_EIO, group_sizes_E, likely_rows, False)


def _forward(
    kernel: str,
    likely_rows: int,
    x_RI: jax.Array,
    weight_EIO: jax.Array,
    group_sizes_E: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y_RO = by_kernel(kernel, likely_rows, x_RI, weight_EIO, group_sizes_E)
    return y_RO, (x_RI, weight_EIO, group_sizes_E)


def _backward(
    kernel: str, likely_rows: int, residuals: tuple[jax.Array, ...], dy_RO: jax.Array
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    x_RI, weight_EIO, group_sizes_E = residuals
    rows, weights = PRODUCTS[kernel]
    dx_RI = rows(dy_RO, weight_EIO, group_sizes_E, likely_rows, True)
    dweight_EIO = weights(x_RI, dy_RO, group_sizes_E, likely_rows)
    return dx_RI, dweight_EIO, np.zeros(group_sizes_E.shape, jax.dtypes.float0)


by_kernel.defvjp(_forward, _backward)

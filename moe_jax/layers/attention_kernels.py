"""Chooses and calls the kernel that computes attention (legend: `moe_jax.moe`; T counts keys).

xla     products and a softmax compiled by XLA: supports every setting on every platform. Writes
        the scores, [B, N, L, T] in float32.
blocks  plain JAX in blocks of queries, for a CPU: few scores at a time, none kept, and no work on
        keys after a block.
splash  Pallas kernel for a TPU: no scores in memory, and no work on blocks that no query sees.
cudnn   library for an NVIDIA GPU: no scores in memory, but a mask [B, 1, L, T].
triton  Pallas kernels for a GPU: no scores in memory, no mask. Only by name, until run on a GPU.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax.config.check import require
from moe_jax.layers import cudnn
from moe_jax.layers.dot_product import Prefix, attend
from moe_jax.layers.masks import Rules, Tokens, visible
from moe_jax.parallel.rules import mesh_in_use, partition_spec, platform

logger = logging.getLogger(__name__)

KERNELS = ("auto", "xla", "blocks", "splash", "cudnn", "triton")
BEST = {"cpu": "blocks", "tpu": "splash", "gpu": "cudnn"}  # what "auto" chooses, by platform
RESIDUALS = "attention_residuals"  # name, for remat, of a kernel's output and log-sums
KEEPS_RESIDUALS = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # a JAX primitive


class Machine(NamedTuple):
    """What a program is compiled for.

    Attributes:
      platform: "cpu", "tpu" or "gpu".
      manual: whether the call is inside `jax.shard_map`.
      cudnn: see `cudnn.version`.
      largest_dim: see `cudnn.largest_dim`.
    """

    platform: str
    manual: bool = False
    cudnn: int | None = None
    largest_dim: int = 128


class Task(NamedTuple):
    """What attention requires of a kernel.

    Attributes:
      rules: which keys a query sees.
      dims: of a key and of a value, per head.
      dtype: of both.
      contiguous: see `Call`.
      lengths: number of queries and of keys.
      own_keys: whether keys are of the same tokens as queries; else of a cache or a memory.
      bias: whether a bias is added to scores.
      softcap: whether scores are capped.
      sink: whether heads have sinks.
      learned_keys: whether all queries also see learned keys.
      in_prefix: whether earlier tokens see some later tokens; see `Call.in_prefix_BL`.
    """

    rules: Rules
    dims: tuple[int, int]
    dtype: str
    contiguous: bool = True
    lengths: tuple[int, int] = (0, 0)
    own_keys: bool = True
    bias: bool = False
    softcap: bool = False
    sink: bool = False
    learned_keys: bool = False
    in_prefix: bool = False


class Choice(NamedTuple):
    """A chosen kernel.

    Attributes:
      kernel: its name.
      lacks: what the platform's best kernel cannot do, if another was chosen; else "".
    """

    kernel: str
    lacks: str = ""


def lacking(kernel: str, task: Task, machine: Machine) -> str:
    """Why a kernel cannot do a task on a machine, in words; "" if it can.

    On a CPU, splash and triton run in the Pallas interpreter: for tests, since it is slow.
    """
    by_position = task.rules != Rules(causal=False)
    of_pallas = {
        "it cannot run inside jax.shard_map": machine.manual,
        "it adds no position bias to scores": task.bias,
        "it knows no positions of a cache": by_position and not task.own_keys,
        "it needs positions that count up (Call.contiguous)": by_position and not task.contiguous,
    }
    lacks = {
        "xla": {},
        "blocks": {
            "it adds no position bias to scores": task.bias,
            "its keys are those of the queries' own places": not task.own_keys,
        },
        "splash": {"it runs on a TPU, here on a GPU": machine.platform == "gpu", **of_pallas},
        "triton": {"it runs on a GPU, here on a TPU": machine.platform == "tpu", **of_pallas},
        "cudnn": {
            f"it runs on a GPU, here on a {machine.platform.upper()}": machine.platform != "gpu",
            "cuDNN is not installed": machine.cudnn == 0,
            f"it computes in {' or '.join(cudnn.DTYPES)}, here in {task.dtype}": (
                task.dtype not in cudnn.DTYPES
            ),
            f"heads have 8, 16, ... {machine.largest_dim} dims, here {task.dims[0]}": (
                task.dims[0] % 8 != 0 or task.dims[0] > machine.largest_dim
            ),
            f"values have as many dims as keys or fewer, here {task.dims}": (
                task.dims[1] > task.dims[0]
            ),
            f"lengths are even, here {task.lengths}": any(one % 2 for one in task.lengths),
            "it adds no position bias to scores": task.bias,
            "it caps no scores": task.softcap,
            "its heads have no sinks": task.sink,
        },
    }[kernel]
    if kernel != "xla":
        lacks = {
            **lacks,
            "its keys are those of tokens, without a learned prefix": task.learned_keys,
            "it sees no prefix from both sides": task.in_prefix,
        }
    return next((what for what, is_lacking in lacks.items() if is_lacking), "")


def choose(kernel: str, task: Task, machine: Machine) -> Choice:
    """The kernel for a task on a machine.

    Args:
      kernel: one of `KERNELS`; "auto": the platform's best, or xla if that cannot do the task.
      task: what it must compute.
      machine: what it runs on.

    Raises:
      ValueError: the named kernel cannot do the task.
    """
    if kernel == "auto":
        best = BEST[machine.platform]
        lacks = lacking(best, task, machine)
        return Choice("xla", f"{best}: {lacks}") if lacks else Choice(best)
    lacks = lacking(kernel, task, machine)
    require(
        not lacks,
        "the attention kernel must support the task",
        f"kernel={kernel!r}: {lacks}",
        "Set kernel='auto' or 'xla'",
    )
    return Choice(kernel)


def keeps_attention(primitive: Any, *avals: Any, **params: Any) -> bool:
    """The remat policy that keeps the residuals of a kernel for its backward pass.

    Residuals are the output, and the logarithm of the sum of every row of scores, in float32.
    Attention by xla keeps nothing. See `jax.checkpoint_policies`.
    """
    if primitive.name == CUDNN_FORWARD:
        return True
    return bool(KEEPS_RESIDUALS(primitive, *avals, **params))


def machine_in_use() -> Machine:
    """The machine that the program is compiled for."""
    name, manual = platform(), bool(jax.sharding.get_abstract_mesh().manual_axes)
    if name != "gpu":
        return Machine(name, manual)
    return Machine(name, manual, cudnn.version(), cudnn.largest_dim())


def chosen(kernel: str, task: Task) -> str:
    """The kernel for a task here; warns once if "auto" falls back to xla on an accelerator."""
    machine = machine_in_use()
    choice = choose(kernel, task, machine)
    if choice.lacks and machine.platform != "cpu":
        warn_of(choice)
    return choice.kernel


@functools.cache
def warn_of(choice: Choice) -> None:
    """Logs once that attention writes its scores to memory."""
    logger.warning(
        "Attention takes the kernel %r, whose memory grows with the square of the length (%s).",
        choice.kernel,
        choice.lacks,
    )


def attend_by_rules(
    q_BLND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    rules: Rules,
    queries: Tokens,
    keys: Tokens | None = None,
    *,
    kernel: str,
    contiguous: bool,
    scale: float,
    bias_BNLT: jax.Array | None = None,
    softcap: float | None = None,
    sink_N: jax.Array | None = None,
    prefix: Prefix | None = None,
) -> jax.Array:
    """`attend` to the keys that rules allow, by the kernel for the task.

    Args:
      q_BLND: queries.
      k_BTKD: keys.
      v_BTKV: values, whose dim may differ from that of the keys.
      rules: which keys of its own document a query sees.
      queries: positions and documents of queries.
      keys: positions and documents of keys; None: those of queries. A query that sees no key gets
        a mean of some keys' values, or 0 if heads have sinks.
      kernel: one of `KERNELS`.
      contiguous: whether positions count up; see `Call`.
      scale: see `attend`.
      bias_BNLT: see `attend`.
      softcap: see `attend`.
      sink_N: see `attend`.
      prefix: learned keys and values that every query also sees, whatever the rules.

    Returns:
      [B, L, N, V] in the dtype of the values. Padding gets finite numbers.

    Raises:
      ValueError: the named kernel cannot do the task.
    """
    task = Task(
        rules, (k_BTKD.shape[-1], v_BTKV.shape[-1]), str(q_BLND.dtype), contiguous,
        (q_BLND.shape[1], k_BTKD.shape[1]), keys is None,
        bias=bias_BNLT is not None, softcap=softcap is not None, sink=sink_N is not None,
        learned_keys=prefix is not None, in_prefix=queries.in_prefix_BL is not None,
    )  # fmt: skip
    name = chosen(kernel, task)
    if name == "xla":
        seen_B1LT = visible(rules, queries, keys)
        if prefix is not None:
            k_BTKD, v_BTKV, seen_B1LT, bias_BNLT = prefix.before(
                k_BTKD, v_BTKV, seen_B1LT, bias_BNLT
            )
        return attend(
            q_BLND, k_BTKD, v_BTKV, seen_B1LT,
            scale=scale, bias_BNLT=bias_BNLT, softcap=softcap, sink_N=sink_N,
        )  # fmt: skip
    if name == "blocks":
        from moe_jax.layers.blocks import attend_in_blocks  # it imports RESIDUALS from here

        return attend_in_blocks(
            q_BLND, k_BTKD, v_BTKV, queries, sink_N,
            rules=rules, contiguous=contiguous, scale=scale, softcap=softcap,
        )  # fmt: skip
    if name == "cudnn":
        run: Any = functools.partial(cudnn.cudnn, rules=rules, scale=scale)
    else:
        run = functools.partial(
            pallas_kernel(name), rules=rules, scale=scale, softcap=softcap,
            interpret=platform() == "cpu",
        )  # fmt: skip
    return by_device(run, q_BLND, k_BTKD, v_BTKV, queries, keys, sink_N)


def by_device(run: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """Runs a kernel; on a mesh, each device computes its own rows and heads.

    Args:
      run: the kernel.
      *arrays: queries, keys, values [B, L, N, D], `Tokens` of queries and keys, sinks [N].

    Returns:
      [B, L, N, V].
    """
    mesh = mesh_in_use()
    if mesh is not None:
        heads, tokens, sinks = (
            partition_spec(names, mesh)
            for names in (("batch", None, "heads", None), ("batch", None), ("heads",))
        )
        specs = (heads, heads, heads, tokens, tokens, sinks)
        # Unchecked, since kernels do not declare what varies between devices. All arrays except
        # sinks are split; the gradient of sinks is summed over the devices that have copies.
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return run(*arrays)


def pallas_kernel(name: str) -> Any:
    """The function of a Pallas kernel; importing Pallas takes half a second."""
    if name == "splash":
        from moe_jax.layers.splash import splash

        return splash
    from moe_jax.layers.triton import flash_attention

    return flash_attention

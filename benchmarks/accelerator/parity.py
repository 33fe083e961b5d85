"""Values and gradients on the device against float64 on a CPU of the same machine.

Ways to run experts are compared with a dense loop-free sum, which shares no code with the library.
Routers are compared with the library's block in float64, whose ways to run experts are tested
against oracles (tests/test_moe_run_experts.py). Inputs are rounded to the dtype first, so that both
sides compute the same function. The error is the norm of the difference over the norm of the
reference, for the worst array. If a router exceeds its tolerance, the CPU also computes in that
dtype: cancelling sums are inexact anywhere, so up to twice the CPU's error passes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import attention
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.kernels import ragged, usable_kernels, with_kernel
from moe_jax.checks.around import blocks, first_accepted
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Assignment
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Router
from moe_jax.moe.run_experts import run_experts
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS, plan_experts
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, Dims, Own

# Set before anything ran. float32 rounds at 6e-8; its products may use TF32 (2**-11) or bfloat16
# passes unless the highest precision is requested; bfloat16 rounds at 2**-9.
TOLERANCES = {"float32 highest": 1e-5, "float32": 5e-3, "bfloat16": 2e-2}
BFLOAT16_ALONE = "mosaic_gpu"  # refuses float32, which it would compute in TF32


class Sizes(NamedTuple):
    """Sizes of a case: G groups of S tokens, K of E experts, M model dims, H hidden units."""

    groups: int
    tokens: int
    selected: int
    experts: int
    model_dim: int
    hidden: int


FULL = Sizes(2, 512, 2, 8, 256, 512)
TINY = Sizes(2, 24, 2, 4, 16, 24)
SEQUENCES, LENGTH = 2, 64  # for routers


def rows(dry: bool) -> list[Row]:
    """Rows of ways to run experts, routers and attention; rows that are `first` come first."""
    sizes = TINY if dry else FULL
    ways = [("ragged", kernel) for kernel in usable_kernels()]
    ways += [(way, "") for way in IMPLEMENTATIONS if way not in ("auto", "ragged")]
    of_ways = [
        Row(f"{ragged(kernel) if way == 'ragged' else way}/{precision}", 5,
            functools.partial(compare_way, way, kernel, precision, sizes),
            first=precision == "bfloat16")
        for precision in ("bfloat16", "float32 highest")
        for way, kernel in ways
        if kernel != BFLOAT16_ALONE or precision == "bfloat16"
    ]  # fmt: skip
    of_routers = [
        Row(f"router {kind}/{precision}", 6, functools.partial(compare_router, kind, precision),
            first=precision == "float32 highest")
        for precision in ("float32 highest", "bfloat16", "float32")
        for kind in KINDS["router"]
    ]  # fmt: skip
    of_attention = [
        Row(f"attention {kernel}, {name}/bfloat16", 6,
            functools.partial(compare_attention, kernel, attention.small(form, dry), "bfloat16"),
            first=name == attention.MAIN)
        for name, form in attention.FORMS.items()
        for kernel in attention.usable_kernels()
    ]  # fmt: skip
    found = of_ways + of_routers + of_attention
    return sorted(found, key=lambda row: not row.first)


class Case(NamedTuple):
    """Inputs of the experts, rounded to a dtype.

    Attributes:
      x_GSM: tokens.
      gate_GSK: float32, 0 for dropped choices.
      weights: weights by name.
      dy_GSM: gradient of the output.
    """

    x_GSM: Any
    gate_GSK: Any
    weights: dict[str, Any]
    dy_GSM: Any


def compare_way(way: str, kernel: str, precision: str, sizes: Sizes) -> dict[str, Any]:
    """Compares one way to run experts, with an empty expert and dropped choices."""
    case, assignment, expected = reference_case(sizes, precision.split()[0])
    moe = MoE(num_experts=sizes.experts, num_selected_experts=sizes.selected,
              expert_dim=sizes.hidden, activation=SwiGLU(), run_experts=way)  # fmt: skip
    moe = with_kernel(moe, kernel)
    plan, axes = plan_experts(moe), moe.expert_axes(sizes.model_dim)

    def output(case: Case) -> jax.Array:
        own = assignment._replace(gate_GSK=case.gate_GSK)
        return run_experts(case.x_GSM, own, case.weights, axes, moe.experts, plan).y

    got = on_device(functools.partial(with_gradients, output), case, precision)
    empty = jax.tree.map(lambda d: float(np.abs(d[-1].astype(np.float64)).max()),
                         got["gradients"]["weights"])  # fmt: skip
    found = verdict(got, expected, precision)
    found["empty_expert"] = float(np.max(list(empty.values())))  # nan if any is nan
    found["passed"] = found["passed"] and found["empty_expert"] == 0
    return found


@functools.cache
def reference_case(sizes: Sizes, dtype: str) -> tuple[Case, Assignment, Any]:
    """A case and its float64 results, the reference of all ways."""
    case, assignment = make_case(sizes, dtype)
    return case, assignment, in_float64(
        functools.partial(with_gradients, dense_sum(assignment)), case
    )  # fmt: skip


def make_case(sizes: Sizes, dtype: str) -> tuple[Case, Assignment]:
    """Random choices of all experts except the last; a capacity keeps at most three quarters."""
    random = np.random.default_rng(0)
    groups, tokens, selected, experts, model, hidden = sizes
    logits = random.normal(size=(groups, tokens, experts - 1))
    index = np.argsort(-logits, axis=-1)[..., :selected].astype(np.int32)
    capacity = 3 * tokens * selected // (4 * (experts - 1))
    taken = np.cumsum(np.eye(experts, dtype=np.int32)[index].sum(2), axis=1)
    before = taken - np.eye(experts, dtype=np.int32)[index].sum(2)
    slot = np.take_along_axis(before, index, axis=-1).astype(np.int32)
    kept = slot < capacity
    gate = (random.uniform(0.2, 0.8, index.shape) * kept).astype(np.float32)

    def draw(*shape: int, stddev: float = 1.0) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) * stddev, dtype)

    weights = {name: draw(experts, model, hidden, stddev=model**-0.5) for name in ("wi", "wg")}
    weights["wo"] = draw(experts, hidden, model, stddev=hidden**-0.5)
    x, dy = draw(groups, tokens, model), draw(groups, tokens, model)
    case = Case(x, jnp.asarray(gate), weights, dy)
    arrays = (jnp.asarray(index), jnp.asarray(gate), jnp.asarray(slot), jnp.asarray(kept))
    return case, Assignment(*arrays, capacity, experts)


def dense_sum(assignment: Assignment) -> Callable[[Case], jax.Array]:
    """Every SwiGLU expert on every token, with kept choices weighted by their gates."""
    chosen = np.eye(assignment.num_experts)[np.asarray(assignment.expert_index_GSK)]
    kept_GSKE = chosen * np.asarray(assignment.kept_GSK)[..., None]

    def output(case: Case) -> jax.Array:
        gate, inner = (jnp.einsum("GSM,EMH->GSEH", case.x_GSM, case.weights[name])
                       for name in ("wg", "wi"))  # fmt: skip
        hidden = gate / (1 + jnp.exp(-gate)) * inner
        y_GSEM = jnp.einsum("GSEH,EHM->GSEM", hidden, case.weights["wo"])
        gates_GSE = jnp.einsum("GSK,GSKE->GSE", case.gate_GSK, kept_GSKE)
        return jnp.einsum("GSE,GSEM->GSM", gates_GSE, y_GSEM)

    return output


def with_gradients(output: Callable[[Case], jax.Array], case: Case) -> dict[str, Any]:
    """The output, and the gradients of sum(y * dy) by name."""
    y, vjp = jax.vjp(lambda x, gate, w: output(case._replace(x_GSM=x, gate_GSK=gate, weights=w)),
                     case.x_GSM, case.gate_GSK, case.weights)  # fmt: skip
    dx, dgate, dweights = vjp(case.dy_GSM.astype(y.dtype))
    return {"y": y, "gradients": {"x": dx, "gate": dgate, "weights": dweights}}


def on_device(function: Callable[[Any], Any], inputs: Any, precision: str) -> Any:
    """The results of a function on the default device, as NumPy arrays."""
    highest = "highest" if precision.endswith("highest") else None
    with jax.default_matmul_precision(highest) if highest else jax.named_scope("default"):
        return jax.tree.map(np.asarray, jax.jit(function)(inputs))


def on_cpu(function: Callable[[Any], Any], inputs: Any) -> Any:
    """The results of a function on the CPU, as NumPy arrays."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        placed = jax.tree.map(lambda array: jax.device_put(array, cpu), inputs)
        return jax.tree.map(np.asarray, jax.jit(function)(placed))


def in_float64(function: Callable[[Any], Any], inputs: Any) -> Any:
    """The results of a function on the CPU, with floating-point inputs in float64."""

    def widened(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array

    with jax.enable_x64(True):
        return on_cpu(function, jax.tree.map(widened, inputs))


def verdict(got: Any, expected: Any, precision: str) -> dict[str, Any]:
    """The largest error, the array that has it, and whether it is within tolerance."""
    errors = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        if jnp.issubdtype(a.dtype, jnp.floating):
            errors[jax.tree_util.keystr(path, simple=True, separator="/")] = relative(a, b)
    worst = max(errors, key=lambda name: nan_is_largest(errors[name]))
    tolerance = TOLERANCES[precision]
    return {
        "error": errors[worst],
        "of": worst,
        "tolerance": tolerance,
        "passed": errors[worst] <= tolerance,
    }


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of the expected array; undivided if that is 0."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    norm, difference = np.linalg.norm(expected), np.linalg.norm(got - expected)
    return float(difference / norm) if norm > 0 else float(difference)


def nan_is_largest(value: float) -> float:
    """The value, with nan as infinity, as a key for comparisons."""
    return math.inf if math.isnan(value) else value


def compare_attention(kernel: str, form: attention.Form, precision: str) -> dict[str, Any]:
    """Compares attention by a kernel with an explicit softmax in float64."""
    inputs, segments, expected = reference_attention(form, precision.split()[0])
    run = attention.by_kernel(kernel, form)
    own = functools.partial(of_attention, lambda q, k, v: run(q, k, v, jnp.asarray(segments)))
    return verdict(on_device(own, inputs, precision), expected, precision)


@functools.cache
def reference_attention(form: attention.Form, dtype: str) -> tuple[dict[str, Any], Any, Any]:
    """Inputs, documents and float64 results, the reference of all kernels."""
    q, k, v, dy = attention.draw(form, jnp.dtype(dtype))
    segments = np.broadcast_to(form.segments, (form.batch, form.length))
    inputs = {"q": q, "k": k, "v": v, "dy": dy}
    plain = functools.partial(softmax_of_seen, form, segments)
    return inputs, segments, in_float64(functools.partial(of_attention, plain), inputs)


def of_attention(function: Callable[..., jax.Array], inputs: dict[str, jax.Array]) -> Any:
    """The output, and the gradients of queries, keys and values."""
    y, vjp = jax.vjp(function, *(inputs[name] for name in "qkv"))
    return {"y": y, "gradients": vjp(inputs["dy"])}


def softmax_of_seen(
    form: attention.Form, segments: np.ndarray, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """Attention of [B, L, N, D], in the dtype of the inputs."""
    place = np.arange(form.length)
    near = place[:, None] - place[None] < (form.window or form.length)
    seen = (segments[:, :, None] == segments[:, None]) & np.tri(form.length, dtype=bool) & near
    shared = form.heads // form.kv_heads
    k, v = (jnp.repeat(one, shared, axis=2) for one in (k, v))
    scores = jnp.einsum("BLND,BTND->BNLT", q, k) * form.dim**-0.5
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * seen[:, None]
    return jnp.einsum("BNLT,BTNV->BLNV", weights / weights.sum(-1, keepdims=True), v)


def compare_router(kind: str, precision: str) -> dict[str, Any]:
    """Compares a block with this router, in training, or in evaluation if training is random."""
    dtype, random = precision.split()[0], np.random.default_rng(1)
    router = load_kind("router", kind)()
    assert isinstance(router, Router)
    moe = first_accepted(blocks(router=router))
    moe = dataclasses.replace(moe, num_experts=8, expert_dim=64,
                              group_size=LENGTH if moe.group_size else 0)  # fmt: skip
    params = init_parameters(jax.random.key(0), moe.specs(Dims(64)))
    # Larger weights separate the logits, so that rounding flips no choice.
    params = jax.tree.map(lambda a: a * 4 if a.ndim == 2 else a, params)
    inputs = {
        "params": jax.tree.map(lambda a: np.asarray(a).astype(dtype), params),
        "x": random.normal(size=(SEQUENCES, LENGTH, 64)).astype(dtype),
        "dy": random.normal(size=(SEQUENCES, LENGTH, 64)).astype(dtype),
        "tokens": random.integers(0, 100, (SEQUENCES, LENGTH)).astype(np.int32),
    }
    training = not draws(functools.partial(block_with_gradients, moe, True), inputs)
    got = on_device(functools.partial(block_with_gradients, moe, training), inputs, precision)
    expected, reference = reference_of(moe, training, inputs)
    flipped = int((got.pop("kept") != expected.pop("kept")).sum())
    found = verdict(got, expected, precision)
    if not found["passed"]:
        narrow = functools.partial(block_with_gradients, by_contractions(moe), training)
        on_the_cpu = on_cpu(narrow, inputs)
        on_the_cpu.pop("kept")
        found["cpu_error"] = verdict(on_the_cpu, expected, precision)["error"]
        found["passed"] = found["error"] <= 2 * found["cpu_error"]
    mode = "training" if training else "evaluation"
    return {**found, "mode": mode, "kept_differs": flipped, "reference": reference}


def reference_of(moe: MoE, training: bool, inputs: dict[str, Any]) -> tuple[Any, str]:
    """Results of the block on the CPU in float64, or in float32 if it needs that (Sinkhorn)."""
    exact = functools.partial(block_with_gradients, wide(moe), training)
    try:
        return in_float64(exact, inputs), "float64"
    except TypeError:
        narrow = functools.partial(block_with_gradients, by_contractions(moe), training)
        floats = {name: jax.tree.map(lambda a: np.asarray(a, np.float32), value)
                  for name, value in inputs.items() if name != "tokens"}  # fmt: skip
        return on_cpu(narrow, {**inputs, **floats}), "float32"


def draws(function: Callable[[Any], Any], inputs: Any) -> bool:
    """Whether a function draws random numbers, which would differ in float64."""
    return "random_bits" in str(jax.make_jaxpr(function)(inputs))


def by_contractions(moe: MoE) -> MoE:
    """The block without a kernel, so that a CPU can run it too."""
    return moe if moe.router.mixes else dataclasses.replace(moe, run_experts="einsum")


def wide(moe: MoE) -> MoE:
    """The block without a kernel and with a float64 router, which configs do not allow."""
    router = dataclasses.replace(moe.router)
    object.__setattr__(router, "dtype", "float64")
    return dataclasses.replace(by_contractions(moe), router=router)


def block_with_gradients(moe: MoE, training: bool, inputs: dict[str, Any]) -> dict[str, Any]:
    """Output, gradients of sum(y * dy) by parameters and tokens, and counts of kept choices."""
    rng = jax.random.key(2) if training else None
    call = Call(tokens_BL=inputs["tokens"], rng=rng, capacity=moe.capacity.train_factor)

    def output(params: Any, x_BLM: jax.Array) -> Any:
        y_BLM, aux, _ = moe.apply(params, x_BLM, call.with_defaults(x_BLM), Own())
        return y_BLM, aux.sums["kept_KE"]

    y, vjp, kept = jax.vjp(output, inputs["params"], inputs["x"], has_aux=True)
    dparams, dx = vjp(inputs["dy"].astype(y.dtype))
    return {"y": y, "kept": kept, "gradients": {"params": dparams, "x": dx}}

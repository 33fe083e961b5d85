"""The costs of a part in training: FLOPs, memory and traffic of one token in one layer.

`Part.costs` returns them, by default by tracing `Part.apply` (`traced_costs`). `planning` has the
costs that are not sums over parts: peak memory, collectives, the optimizer. Legend: `moe_jax.moe`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.parallel.rules import RULES, without_mesh
from moe_jax.parameters import ParameterSpec
from moe_jax.part import Call, Dims, Own, Part

FLOAT32 = 4  # bytes
# The kind of layer that a component's parameters count as; "other" for other components.
KIND_OF_COMPONENT = {
    "embedding": "head", "head": "head", "attention": "attention", "norms": "attention",
    "dense_ffn": "dense_ffn", "shared_experts": "dense_ffn", "experts": "experts",
    "router": "routing",
}  # fmt: skip


class Bytes(NamedTuple):
    """Bytes: `whole` on each device, and `split`, which the mesh's `tensor` divides."""

    whole: float = 0.0
    split: float = 0.0

    def on(self, tensor: int) -> float:
        """Bytes per device if `tensor` devices share what can be split."""
        return self.whole + self.split / tensor

    def times(self, factor: float) -> "Bytes":
        """The bytes, multiplied by a factor."""
        return Bytes(self.whole * factor, self.split * factor)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one stage of a part costs forward, per token in one layer, with the slots of training.

    Attributes:
      kind: "attention", "dense_ffn", "experts", "routing" or "other".
      flops: FLOPs that the mathematics needs; a multiply-add counts as two.
      padding: FLOPs on slots that no token fills; negative if there are fewer slots than choices,
        so that some choices are sure to be dropped.
      dispatch: FLOPs of contractions with one-hot dispatch and combine tensors.
      batched: whether its products have a batch dim, so that remat "dots" computes them again.
      saved: what the backward pass reads, if nothing is computed again.
      saved_dots: outputs of products without a batch dim: what remat "dots" saves.
      largest: the largest array, whose gradient the backward pass holds in addition to what was
        saved.
      traffic: what products read and write in main memory, without weights.
      sums: bytes of the rows that are summed over `tensor`.
      ends_layer: whether nothing in the layer uses its result, so that remat need not repeat the
        sum.
      exchanged: bytes of the rows that are sent to experts, one way.
      returned_again: whether remat also sends them back again, for the gradient of the gates.
      slots: bytes of the rows that have room in the buffers on that way.
      buffers: bytes of further arrays on that way.
      inactive: parameters of the layer that a token does not use.
    """

    kind: str
    flops: float = 0.0
    padding: float = 0.0
    dispatch: float = 0.0
    batched: bool = False
    saved: Bytes = Bytes()
    saved_dots: Bytes = Bytes()
    largest: Bytes = Bytes()
    traffic: Bytes = Bytes()
    sums: float = 0.0
    ends_layer: bool = False
    exchanged: float = 0.0
    returned_again: bool = False
    slots: float = 0.0
    buffers: float = 0.0
    inactive: float = 0.0

    @property
    def computed(self) -> float:
        """FLOPs with padding and dispatch."""
        return self.flops + self.padding + self.dispatch


class Saving(NamedTuple):
    """A change of a part's settings that needs less memory.

    Attributes:
      changes: new values, by the path of the setting.
      costs: what it costs in speed or in the result.
      keeps_result: whether training gives the same result except for rounding.
    """

    changes: Mapping[str, Any]
    costs: str
    keeps_result: bool


def ffn_cost(model_dim: int, hidden_dim: int, *, gated: bool, itemsize: int) -> Cost:
    """The cost of a feed-forward network that every token passes, of kind "dense_ffn".

    Saved are the hidden units before and after the activation: 3 H if gated, else 2 H.
    """
    matrices = 3 if gated else 2
    return Cost(
        "dense_ffn",
        flops=2 * model_dim * hidden_dim * matrices,
        saved=Bytes(split=matrices * hidden_dim * itemsize),
        saved_dots=Bytes(model_dim * itemsize, (matrices - 1) * hidden_dim * itemsize),
        largest=Bytes(split=hidden_dim * itemsize),
        traffic=Bytes(model_dim, hidden_dim).times(matrices * itemsize),
        sums=model_dim * itemsize,
    )


class Product(NamedTuple):
    """A product in a trace.

    Attributes:
      flops: its FLOPs; a multiply-add counts as two.
      read: bytes of its operands that depend on the tokens.
      written: bytes of its result.
      batched: whether remat "dots" computes it again.
    """

    flops: float
    read: float
    written: float
    batched: bool


@functools.lru_cache(maxsize=256)
def traced_costs(part: Part, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
    """The costs of a part from its trace on one sequence; nothing is compiled or computed.

    The two stages are the products without and with a batch dim. Their kind is that of most of the
    part's parameters. A loop whose length the trace does not know counts once, and of branches the
    largest counts. Nothing is taken to be split over `tensor`.

    Args:
      part: its `apply` is traced as in training, with its backward pass.
      dims: sizes of the model.
      length: L.
      dtype: of the tokens.
    """
    specs = part.specs(dims)
    params, state = (
        jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), tree)
        for tree in (specs, part.state_specs(dims))
    )
    x_BLM = jax.ShapeDtypeStruct((1, length, dims.model_dim), dtype)

    def run(params: Any, x_BLM: jax.Array) -> jax.Array:
        call = Call(
            tokens_BL=jnp.zeros((1, length), jnp.int32),
            step=jnp.zeros((), jnp.int32),
            rng=jax.random.key(0),
        ).with_defaults(x_BLM)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        return part.apply(params, x_BLM, call, Own(jnp.zeros((), jnp.int32), zeros or None))[0]

    with without_mesh():
        forward = jax.make_jaxpr(run)(params, x_BLM).jaxpr
        backward = jax.make_jaxpr(lambda p, x: jax.vjp(run, p, x)[1])(params, x_BLM).jaxpr
    found = list(products(forward, last_only(forward)))
    plain, batched = ([p for p in found if p.batched is which] for which in (False, True))
    axes = [name for spec in jax.tree.leaves(specs) for name in spec.axes if name]
    is_split = any("tensor" in RULES[name] for name in axes)
    kind = kind_of(specs)
    return (
        Cost(
            kind,
            flops=sum(p.flops for p in plain) / length,
            saved=Bytes(residual_bytes(backward) / length),
            saved_dots=Bytes(sum(p.written for p in plain) / length),
            largest=Bytes(max((p.written for p in found), default=0.0) / length),
            traffic=Bytes(sum(p.read + p.written for p in plain) / length),
            sums=dims.model_dim * x_BLM.dtype.itemsize * is_split,
        ),
        Cost(
            kind,
            flops=sum(p.flops for p in batched) / length,
            batched=True,
            traffic=Bytes(sum(p.read + p.written for p in batched) / length),
        ),
    )


def kind_of(specs: Any) -> str:
    """The kind of the component with the most parameters."""
    sizes: collections.Counter[str] = collections.Counter()
    for spec in jax.tree.leaves(specs):
        sizes[spec.component] += spec.size
    return KIND_OF_COMPONENT.get(max(sizes, key=sizes.__getitem__, default=""), "other")


def kept_bytes(specs: Any, dtype: str) -> Bytes:
    """Bytes of the caches that a tree of specs declares, as `inference` keeps them.

    Floats of the component "cache" have `dtype`. What a mesh splits over `tensor` is `split`.
    """
    whole = split = 0.0
    for spec in jax.tree.leaves(specs):
        assert isinstance(spec, ParameterSpec)
        narrowed = spec.component == "cache" and jnp.issubdtype(spec.dtype, jnp.floating)
        size = spec.size * jnp.dtype(dtype if narrowed else spec.dtype).itemsize
        is_split = any(name and "tensor" in RULES[name] for name in spec.axes)
        whole, split = (whole, split + size) if is_split else (whole + size, split)
    return Bytes(whole, split)


def array_bytes(variable: Any) -> float:
    """Bytes of an array in a trace; random keys count as none."""
    aval = variable.aval
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return 0.0
    return float(math.prod(aval.shape) * aval.dtype.itemsize)


def last_only(jaxpr: Any) -> list[bool]:
    """For every argument of a trace, whether it is the last: the tokens."""
    return [variable is jaxpr.invars[-1] for variable in jaxpr.invars]


def dependent(jaxpr: Any, is_given: list[bool]) -> set[Any]:
    """The variables that depend on the given arguments."""
    found = {v for v, given in zip(jaxpr.invars, is_given, strict=True) if given}
    for eqn in jaxpr.eqns:
        if any(v in found for v in eqn.invars if not hasattr(v, "val")):
            found.update(eqn.outvars)
    return found


def residual_bytes(jaxpr: Any) -> float:
    """Bytes of token-dependent arrays that a forward trace returns for the backward pass.

    Not counted are parameters, arrays that depend on parameters only, and the tokens themselves. An
    array in two shapes counts once.
    """
    of_tokens = dependent(jaxpr, last_only(jaxpr)) - {jaxpr.invars[-1]}
    reshaped: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        source = eqn.invars[0] if eqn.primitive.name == "reshape" else None
        if source is not None and not hasattr(source, "val"):
            reshaped[eqn.outvars[0]] = reshaped.get(source, source)
    kept = {reshaped.get(v, v) for v in jaxpr.outvars if not hasattr(v, "val")}
    return sum(map(array_bytes, kept & of_tokens))


def products(jaxpr: Any, is_of_tokens: list[bool]) -> Iterator[Product]:
    """Every product of a trace; in a loop, multiplied by the loop's length."""
    of_tokens = dependent(jaxpr, is_of_tokens)
    for eqn in jaxpr.eqns:
        flags = [not hasattr(v, "val") and v in of_tokens for v in eqn.invars]
        flops = product_flops(eqn)
        if flops:
            read = sum(array_bytes(v) for v, flag in zip(eqn.invars, flags, strict=True) if flag)
            yield Product(flops, read, array_bytes(eqn.outvars[0]), is_batched(eqn))
            continue
        yield from inner_products(eqn, flags)


def inner_products(eqn: Any, flags: list[bool]) -> Iterator[Product]:
    """The products of the traces that an equation runs."""
    name, params = eqn.primitive.name, eqn.params
    times = params["length"] if name == "scan" else 1
    if name in ("scan", "while") and any(flags):
        # After the first iteration, carried values depend on the tokens.
        flags = [flag or i in carried(eqn) for i, flag in enumerate(flags)]
    found = []
    for inner in sub_jaxprs(params):
        # Further arguments, such as the index of a branch, come first.
        own = flags[len(flags) - len(inner.invars) :]
        if len(own) == len(inner.invars):
            found.append(list(products(inner, own)))
    if name == "cond":
        found = [max(found, key=lambda branch: sum(p.flops for p in branch))]
    for product in (product for trace in found for product in trace):
        flops, read, written, batched = product
        yield Product(times * flops, times * read, times * written, batched)


def carried(eqn: Any) -> range:
    """Which arguments of a scan or a while loop are carried between iterations.

    In jax 0.12, a scan no longer states their number. They follow the constants. They have the same
    shape outside and inside, as do their results; scanned arrays have one more dim outside.
    """
    if eqn.primitive.name == "while":
        first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        return range(first, len(eqn.invars))
    inner = eqn.params["jaxpr"].jaxpr
    num_scanned, num_carried = (
        sum((a.aval.shape == b.aval.shape) is same for a, b in zip(outer, within, strict=True))
        for outer, within, same in (
            (eqn.invars, inner.invars, False),
            (eqn.outvars, inner.outvars, True),
        )
    )
    end = len(eqn.invars) - num_scanned
    return range(end - num_carried, end)


def sub_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The traces in the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)  # the open jaxpr of a closed one
            if hasattr(one, "eqns"):
                yield one


def product_flops(eqn: Any) -> float:
    """FLOPs of an equation that is a product; 0 for any other."""
    name, params = eqn.primitive.name, eqn.params
    if name not in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        return 0.0
    outputs = math.prod(eqn.outvars[0].aval.shape)
    left, right = (v.aval.shape for v in eqn.invars[:2])
    if name == "conv_general_dilated":
        features = right[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * outputs * math.prod(right) / features
    numbers = params.get("dimension_numbers")
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return 2.0 * outputs * math.prod(left[dim] for dim in numbers[0][0])


def is_batched(eqn: Any) -> bool:
    """Whether remat "dots" computes a product again: all except plain ones without a batch dim."""
    return eqn.primitive.name != "dot_general" or bool(eqn.params["dimension_numbers"][1][0])

"""Tiny models around a part of any family, for `moe_jax.checks`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax.config.settings import Settings
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import Norm, RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.layer import Layer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.noise import Gaussian
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Part

LENGTH, MODEL_DIM, VOCAB_SIZE = 8, 8, 16

# The first block that the part accepts is used. The capacity is tight, so choices are dropped.
BLOCKS: tuple[dict[str, Any], ...] = (
    {"num_selected_experts": 2, "run_experts": "gather"},
    {"num_selected_experts": 1, "run_experts": "gather"},
    {"num_selected_experts": 2, "group_size": LENGTH},
)
ROUTERS = (TokenChoice(), TokenChoice(score=Sigmoid()), TokenChoice(noise=(Gaussian(),)))
Makes = Iterator[Callable[[], MoE]]


def blocks(**settings: Any) -> Makes:
    """Blocks with these settings; the checks of a block may reject them."""
    settings = {"capacity": Capacity(train_factor=1.0, eval_factor=1.0), **settings}
    for block in BLOCKS:
        yield functools.partial(MoE, num_experts=4, expert_dim=8, **block, **settings)


def with_routers(**settings: Any) -> Makes:
    """Blocks with these settings and each of `ROUTERS`."""
    for router in ROUTERS:
        yield from blocks(router=router, **settings)


def in_router(name: str) -> Callable[[Any], Makes]:
    """A function from a part to blocks whose router has the part in this field."""
    return lambda part: blocks(router=TokenChoice(**{name: part}))


def with_queue(queue: Any) -> Makes:
    """Blocks with half the slots that they need; some queues need dropless evaluation."""

    def with_evaluation(factor: float) -> MoE:
        capacity = Capacity(train_factor=0.5, eval_factor=factor, queue=queue)
        return next(blocks(capacity=capacity))()

    yield from (functools.partial(with_evaluation, factor) for factor in (0.5, 0.0))


def with_policy(policy: Any) -> Makes:
    """Blocks with a policy for the experts per token, also in evaluation if accepted."""

    def with_evaluation(eval_policy: Any) -> MoE:
        router = TokenChoice(choices=policy, eval_choices=eval_policy)
        return next(blocks(router=router))()

    yield from (functools.partial(with_evaluation, one) for one in (policy, None))


def with_loss(loss: Any) -> Makes:
    """Blocks with a balance loss."""
    return with_routers(losses=(dataclasses.replace(loss, weight=loss.weight or 1.0),))


# Blocks around a part, by family; a part of a layer needs no block.
BLOCKS_AROUND: dict[str, Callable[[Any], Makes]] = {
    "router": lambda part: blocks(router=part),
    "balance_loss": with_loss,
    "bias_update": lambda part: with_routers(bias=part),
    "activation": lambda part: blocks(activation=part, shared_expert_dim=8),
    "queue": with_queue,
    "choice_policy": with_policy,
    **{name: in_router(name) for name in ("projection", "score", "selection")},
    "noise": lambda part: blocks(router=TokenChoice(noise=(part,))),
}
ATTENTION_AROUND: dict[str, Callable[[Any], Attention]] = {
    "rotary": lambda part: Attention(num_heads=2, head_dim=4, rotary=part),
    "rotary_scaling": lambda part: ATTENTION_AROUND["rotary"](Rotary(scaling=part)),
}
FAMILIES = ("part", "norm", *BLOCKS_AROUND, *ATTENTION_AROUND)


def model_around(part: Settings) -> LanguageModel:
    """A language model of two layers with the part, and with an encoder if the part reads a memory.

    Args:
      part: of a family in `FAMILIES`. A whole layer without branches gets attention and an MLP.

    Raises:
      ValueError: the part is of another family, or no block accepts it.
    """
    checked: Any = part
    norm: Norm = RMSNorm()
    unit: tuple[Any, ...] = (("checked",),)
    if isinstance(part, Norm):
        checked, norm = Mlp(dim=16), part
    elif isinstance(part, Layer):
        branches = (("attention", Attention(num_heads=2, head_dim=4)), ("mlp", Mlp(dim=16)))
        checked, unit = dataclasses.replace(part, branches=part.branches or branches), ("checked",)
    elif part.family in BLOCKS_AROUND:
        checked = first_accepted(BLOCKS_AROUND[part.family](part))
    elif isinstance(part, Part) and not part.adds_to_residual:
        return model_with_shared(part)
    elif part.family in ATTENTION_AROUND:
        checked = ATTENTION_AROUND[part.family](part)
    elif not isinstance(part, Part):
        raise ValueError(
            f"A checked part must be of one of the families {FAMILIES}: {type(part).__name__} is "
            f"of {part.family!r}. Derive it from the base class of one of them."
        )
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "model_dim": MODEL_DIM,
        "parts": {"checked": checked},
        "stack": StackLayout(unit=unit, repeats=2, allow_lookahead=True),
        "norm": norm,
    }
    if not checked.reads_memory:
        return LanguageModel(**settings)
    settings["parts"]["mlp"] = Mlp(dim=16)
    encoder = StackLayout(unit=(("mlp",),), repeats=1, causal=False)
    return EncoderDecoder(encoder=encoder, **settings)


def model_with_shared(part: Part) -> LanguageModel:
    """A language model of two attention layers that add the output of the part to scores."""
    heads = getattr(part, "num_heads", 2)
    attention = Attention(num_heads=heads, head_dim=4, position_bias="checked")
    return LanguageModel(
        vocab_size=VOCAB_SIZE,
        model_dim=MODEL_DIM,
        parts={"checked": part, "attention": attention},
        stack=StackLayout(
            unit=(("attention",),), repeats=2, shared=("checked",), allow_lookahead=True
        ),
    )


def first_accepted(makes: Makes) -> MoE:
    """The first block that its parts accept.

    Raises:
      ValueError: they accept none; this is the first block's error.
    """
    errors = []
    for make in makes:
        try:
            return make()
        except ValueError as error:
            errors.append(error)
    raise errors[0]

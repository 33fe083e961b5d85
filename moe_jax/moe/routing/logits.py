"""Routers with logits, and their projections, noise and scores (legend: `moe_jax.moe`)."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.kinds import by_kind
from moe_jax.config.settings import Settings, setting
from moe_jax.moe.routing import Options, Router, RouterInputs, Routing
from moe_jax.parameters import (
    ParameterSpec,
    SameWeights,
    dense,
    grouped,
    truncated_normal_init,
    zeros,
)
from moe_jax.part import Dims

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


class Logits(NamedTuple):
    """Logits over the options, and their noise.

    Attributes:
      logits_GSE: including noise.
      clean_GSE: without the noise, or None if there is none.
      noise_std_GSE: standard deviation of the noise, broadcastable to GSE, or None.
    """

    logits_GSE: jax.Array
    clean_GSE: jax.Array | None = None
    noise_std_GSE: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Projection(Settings):
    """Maps tokens to clean logits."""

    family: ClassVar[str] = "projection"

    def specs(self, dims: Dims, options: Options, init_stddev: float) -> dict[str, Any]:
        """The parameters, of component "router"."""
        raise NotImplementedError

    def logits(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array:
        """[G, S, E] in the dtype of `x_GSM`; `step` is for annealed settings.

        Without a step, as in evaluation outside training, these have their end values.
        """
        raise NotImplementedError

    @property
    def constant_from(self) -> int:
        """The number of finished steps from which `logits` do not depend on the step."""
        return 0


@dataclasses.dataclass(frozen=True)
class Linear(Projection):
    """(x W + bias) / temperature; the bias is optional."""

    use_bias: bool = False  # bias in the logits (gpt-oss), not only in the selection
    temperature: float = setting(1.0, above=0)  # divides the logits
    anneal_from: float | None = setting(None, above=0)  # value at the first step; None: constant
    anneal_steps: int = setting(0, at_least=0)  # steps of the linear change; 0: constant

    def check(self) -> None:
        """See `Settings`."""
        check_annealing(self.anneal_from, self.anneal_steps)

    def specs(self, dims: Dims, options: Options, init_stddev: float) -> dict[str, Any]:
        """`weight` [M, E], and `bias` [E] if used."""
        specs = {"weight": router_matrix(dims.model_dim, options.num_options, init_stddev)}
        if self.use_bias:
            specs["bias"] = router_vector(options.num_options)
        return specs

    def logits(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array:
        """See `Projection`."""
        logits_GSE = project(x_GSM, params["weight"])
        if self.use_bias:
            logits_GSE += dense(params["bias"]).astype(x_GSM.dtype)
        if self.temperature == 1 and self.anneal_steps == 0:
            return logits_GSE
        divisor = annealed(self.anneal_from, self.temperature, self.anneal_steps, step)
        return logits_GSE / jnp.asarray(divisor, logits_GSE.dtype)

    @property
    def constant_from(self) -> int:
        """See `Projection`."""
        return self.anneal_steps


@dataclasses.dataclass(frozen=True)
class Noise(Settings):
    """Noise in training, on the router's own copy of the token or on its logits."""

    family: ClassVar[str] = "noise"

    @property
    def always_on(self) -> bool:
        """Whether it adds noise to the logits at every step of training."""
        return False

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """The parameters, of component "router"."""
        del dims, options
        return {}

    def on_tokens(self, x_GSM: jax.Array, rng: jax.Array, step: jax.Array | None) -> jax.Array:
        """The tokens that the router sees, with noise."""
        del rng, step
        return x_GSM

    def std(self, params: Any, x_GSM: jax.Array, step: jax.Array | None) -> jax.Array | None:
        """Standard deviation of Gaussian noise on the logits, broadcastable to GSE, or None."""
        del params, x_GSM, step
        return None


@dataclasses.dataclass(frozen=True)
class Score(Settings):
    """Turns logits into the scores that select experts, and into gates.

    For each token, an expert with a larger logit never has a smaller score.
    """

    family: ClassVar[str] = "score"
    over_selected: ClassVar[bool] = False  # gates use the selected logits only
    independent: ClassVar[bool] = False  # a score depends on its own logit only, in [0, 1]

    def log_scores(self, logits_GSE: jax.Array) -> jax.Array:
        """Logits whose softmax is the router's probabilities, and over the selected, their gates.

        The gradient of that softmax is finite even if all scores underflow.
        """
        raise NotImplementedError

    def scores(self, logits_GSE: jax.Array, probs_GSE: jax.Array) -> jax.Array:
        """The scores, to which a selection bias is added; the K largest select experts.

        `probs_GSE` is the softmax of `log_scores`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Softmax(Score):
    """Softmax over all experts (Switch)."""

    def log_scores(self, logits_GSE: jax.Array) -> jax.Array:
        """See `Score`."""
        return logits_GSE

    def scores(self, logits_GSE: jax.Array, probs_GSE: jax.Array) -> jax.Array:
        """See `Score`."""
        return probs_GSE


@dataclasses.dataclass(frozen=True)
class SoftmaxOverSelected(Score):
    """Selection by the logits, softmax over the selected logits only (Mixtral)."""

    over_selected: ClassVar[bool] = True

    def log_scores(self, logits_GSE: jax.Array) -> jax.Array:
        """See `Score`."""
        return logits_GSE

    def scores(self, logits_GSE: jax.Array, probs_GSE: jax.Array) -> jax.Array:
        """See `Score`."""
        return logits_GSE


@dataclasses.dataclass(frozen=True)
class Sigmoid(Score):
    """Sigmoid of each logit (DeepSeek-V3)."""

    independent: ClassVar[bool] = True

    def log_scores(self, logits_GSE: jax.Array) -> jax.Array:
        """See `Score`."""
        return jax.nn.log_sigmoid(logits_GSE)

    def scores(self, logits_GSE: jax.Array, probs_GSE: jax.Array) -> jax.Array:
        """See `Score`."""
        return jax.nn.sigmoid(logits_GSE)


def check_gate(score: Score, renormalize: bool, moe: "MoE", *, allowed: bool | None = None) -> None:
    """Checks that the gate is not always 1, which would give the router no gradient.

    Args:
      score: the router's score.
      renormalize: whether the gates are divided by their sum.
      moe: the block.
      allowed: whether the router accepts a constant gate; None: it has no such setting.
    """
    changes = ["renormalize=False"] * renormalize
    changes += ["score='softmax' or 'sigmoid'"] * score.over_selected
    require(
        bool(allowed)
        or moe.num_options == 1
        or moe.num_selected_experts > 1
        or not (renormalize or score.over_selected),
        "with num_selected_experts=1 a renormalised gate, or a softmax over the selected logit, "
        "is always 1, and the router gets no gradient from the task",
        f"router.score={score}, gates renormalised: {renormalize}",
        f"Set {' and '.join(changes)}, or use several experts per token"
        + ("" if allowed is None else ", or set allow_constant_gate=True"),
    )


def annealed(
    start: float | None, end: float, num_steps: int, step: jax.Array | None
) -> float | jax.Array:
    """A setting at a step: linear from `start` to `end` in `num_steps`, then `end`."""
    if step is None or start is None:
        return end
    share = jnp.minimum(step / num_steps, 1.0).astype(jnp.float32)
    return start * (1 - share) + end * share


def check_annealing(start: float | None, num_steps: int) -> None:
    """Checks that annealing has both a start and steps, or neither."""
    require(
        (num_steps > 0) == (start is not None),
        "anneal_from and anneal_steps > 0 must be set together",
        f"anneal_from={start}, anneal_steps={num_steps}",
        "Set both or none",
    )


def router_matrix(inward: int, outward: int, stddev: float) -> ParameterSpec:
    """The spec of a router's matrix [M, O]; a standard deviation of 0 initialises it to 0."""
    init = truncated_normal_init(stddev) if stddev else zeros
    return ParameterSpec((inward, outward), ("model", None), init, "router")


def router_vector(size: int) -> ParameterSpec:
    """The spec of a router's vector, initialised to 0, without weight decay."""
    return ParameterSpec((size,), (None,), zeros, "router", decays=False)


class HighestPrecision(SameWeights):
    """`SameWeights` at the highest precision: by default a TPU multiplies float32 in bfloat16."""

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[G, S, I] @ [I, O] -> [G, S, O]."""
        return jnp.einsum("GSI,IO->GSO", x, weight, precision=jax.lax.Precision.HIGHEST)


HIGHEST = HighestPrecision()


def project(x_GSI: jax.Array, weight_IO: Any) -> jax.Array:
    """[G, S, I] x [I, O] in the dtype of `x_GSI`, at the highest precision."""
    return grouped(x_GSI, weight_IO, HIGHEST)


@dataclasses.dataclass(frozen=True)
class LogitRouter(Router):
    """A router that learns logits over the experts."""

    learns: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    projection: Projection = Linear()  # from a token to its logits: "linear", "cosine"
    noise: tuple[Noise, ...] = ()  # in training: "jitter", "gaussian", "learned"
    init_stddev: float = setting(0.02, above=0)  # of weights: truncated normal

    def check(self) -> None:
        """See `Settings`; sorts the noise as a config, which names it, does."""
        object.__setattr__(self, "noise", tuple(sorted(self.noise, key=repr)))

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """Specs of the projection and, under `noise` by kind, of each noise that learns."""
        specs = self.projection.specs(dims, options, self.init_stddev)
        noise = {name: one.specs(dims, options) for name, one in by_kind(self.noise).items()}
        noise = {name: own for name, own in noise.items() if own}
        return {**specs, "noise": noise} if noise else specs

    def logits(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Logits:
        """Logits over the options in `dtype`; in training with noise, whose variances add up.

        Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 4.
        """
        x_GSM, rng, step = x_GSM.astype(self.dtype), inputs.rng, inputs.step
        if rng is None or not self.noise:
            return Logits(self.projection.logits(params, x_GSM, step))
        token_key = jax.random.fold_in(rng, 0)
        on_tokens = (one for one in self.noise if type(one).on_tokens is not Noise.on_tokens)
        for i, noise in enumerate(on_tokens):
            key = jax.random.fold_in(token_key, i) if i else token_key
            x_GSM = noise.on_tokens(x_GSM, key, step)
        clean_GSE = self.projection.logits(params, x_GSM, step)
        learned = params.get("noise", {})
        named = by_kind(self.noise).items()
        found = (noise.std(learned.get(name), x_GSM, step) for name, noise in named)
        stds = [std for std in found if std is not None]
        if not stds:
            return Logits(clean_GSE)
        variance_GSE = functools.reduce(jnp.add, (std**2 for std in stds))
        std_GSE = stds[0] if len(stds) == 1 else jnp.sqrt(variance_GSE)
        draw_GSE = jax.random.normal(jax.random.fold_in(rng, 1), clean_GSE.shape, clean_GSE.dtype)
        return Logits(clean_GSE + std_GSE * draw_GSE, clean_GSE, std_GSE)

    def routing(
        self,
        logits: Logits,
        probs_GSE: jax.Array,
        expert_index_GSK: jax.Array,
        gate_GSK: jax.Array,
        chosen_GSK: jax.Array,
        **others: Any,
    ) -> Routing:
        """The `Routing` of these choices; gates are scaled, and 0 for choices that do not count.

        `others` are further fields of `Routing`.
        """
        gate_GSK = jnp.where(chosen_GSK, gate_GSK, 0) * self.scaling_factor
        return Routing(
            logits.logits_GSE, probs_GSE, expert_index_GSK, gate_GSK, chosen_GSK,
            clean_GSE=logits.clean_GSE, noise_std_GSE=logits.noise_std_GSE, **others,
        )  # fmt: skip

"""Optimizers and learning-rate schedules, built from optax parts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from moe_jax.config import ExperimentConfig, OptimizerConfig
from moe_jax.models.trained import rate_factors, training_specs
from moe_jax.parameters import ParameterSpec

# Matrices that Muon leaves to AdamW: their rows or columns are read one by one.
NOT_MATRICES = ("embedding", "head", "router")


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of every step.

    Steps count from 1. Let P be the peak, W = max(warmup_steps, 1), N = num_steps and F the final
    fraction. Step s <= W uses P s / W: the last step of the warm-up uses the peak, and so does the
    first step of a run without warm-up. With warmup="constant", all warm-up steps use P. Later
    steps use P times

    - constant: 1
    - cosine: F + (1 - F) (1 + cos(pi t)) / 2, and linear: F + (1 - F) (1 - t), with
      t = (s - W) / (N - W)
    - rsqrt: sqrt(W / s)
    - wsd (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395): 1 until D =
      max(decay_fraction N, 1) steps are left, then linear to F (arXiv:2405.18392).

    The last step, N, uses F P if the schedule uses F; a run that is all warm-up ends at P.

    Returns:
      The rate as a function of the number of finished steps, s - 1, as optax counts.
    """
    peak, final, warmup = config.learning_rate, config.final_fraction, max(config.warmup_steps, 1)
    stable = num_steps - max(num_steps * config.decay_fraction, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1

        def since(start: float) -> jax.Array:
            """The finished share of the steps from `start` to the last; 0 before `start`."""
            return jnp.clip((step - start) / max(num_steps - start, 1), 0, 1)

        decays = {
            "constant": lambda: jnp.ones(()),
            "cosine": lambda: final + (1 - final) * (1 + jnp.cos(jnp.pi * since(warmup))) / 2,
            "linear": lambda: final + (1 - final) * (1 - since(warmup)),
            "rsqrt": lambda: jnp.sqrt(warmup / jnp.maximum(step, warmup)),
            "wsd": lambda: final + (1 - final) * (1 - since(stable)),
        }
        rises = jnp.minimum(step / warmup, 1) if config.warmup == "linear" else 1
        return peak * rises * decays[config.schedule]()

    return schedule


def steps_independent_of_length(settings: OptimizerConfig, num_steps: int) -> float:
    """Number of first steps that keep their rate if `num_steps` is raised; inf: all."""
    if settings.schedule in ("constant", "rsqrt"):
        return math.inf
    if settings.schedule == "wsd":
        return num_steps - max(num_steps * settings.decay_fraction, 1)
    return max(settings.warmup_steps, 1)


def make_optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    """Clipping, preconditioning, decoupled weight decay, the schedule, averaging, in this order.

    - "adamw": Loshchilov and Hutter 2019, arXiv:1711.05101.
    - "adafactor": Shazeer and Stern 2018, arXiv:1804.04235, factored second moments, update
      clipping at 1, steps relative to the scale of a parameter.
    - "lion": Chen et al. 2023, arXiv:2302.06675.
    - "muon": `muon`.
    - "schedule_free": AdamW with averaging in place of a decaying rate, Defazio et al. 2024,
      arXiv:2405.15682.

    Each expert and each scanned layer is treated as separate parameters. The specs of the model's
    parameters determine what decays, what is stacked, and what is a matrix for Muon. The trees
    contain the parameters that train (`models.trained`).
    """
    settings = config.optimizer
    specs = training_specs(settings, config.model.specs())
    schedule = learning_rate_schedule(settings, config.training.num_steps)
    descend = [
        precondition(settings, specs),
        optax.add_decayed_weights(
            settings.weight_decay, mask=jax.tree.map(lambda spec: spec.decays, specs)
        ),
        *([share_of_rest(settings.adamw_share, specs)] if settings.name == "muon" else []),
        *([scale_each(rate_factors(settings, specs))] if settings.learning_rates else []),
        optax.scale_by_learning_rate(schedule),
    ]
    if settings.name == "schedule_free":
        # Its count starts at 1; a step is weighted by the rate that it uses.
        averaged = optax.contrib.schedule_free(
            optax.chain(*descend), lambda count: schedule(count - 1), settings.b1
        )
        return optax.chain(clip(settings), averaged)
    average = [average_parameters(settings.ema_decay)] if settings.ema_decay > 0 else []
    return optax.chain(clip(settings), *descend, *average)


def clip(settings: OptimizerConfig) -> optax.GradientTransformation:
    """Clips every entry of the gradient, then its global norm.

    It is one transform: the states of a chain of two would not match older checkpoints.
    """
    by_value, by_norm = settings.clip_value, settings.clip_norm

    def update(grads: Any, params: Any = None) -> Any:
        if by_value > 0:
            grads = jax.tree.map(lambda g: jnp.clip(g, -by_value, by_value), grads)
        if by_norm > 0:
            grads, _ = optax.clip_by_global_norm(by_norm).update(grads, optax.EmptyState())
        return grads

    return optax.stateless(update)


def precondition(settings: OptimizerConfig, specs: Any) -> optax.GradientTransformation:
    """Turns clipped gradients into the direction of a step."""
    b1, b2, epsilon = settings.b1, settings.b2, settings.epsilon
    adam = optax.scale_by_adam(b1, b2, epsilon)
    if settings.name == "adamw":
        return adam
    if settings.name == "lion":
        return optax.scale_by_lion(b1, b2)
    if settings.name == "schedule_free":
        return optax.scale_by_rms(b2, epsilon, eps_in_sqrt=False, bias_correction=True)
    if settings.name == "muon":
        return per_parameter(
            lambda spec: muon(settings, spec) if trained_by_muon(spec) else adam, specs
        )
    adafactor = optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return per_parameter(lambda spec: adafactor, specs)


def share_of_rest(share: float, specs: Any) -> optax.GradientTransformation:
    """With Muon, gives non-matrices this share of the learning rate, decay included."""

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(
            lambda u, spec: u if trained_by_muon(spec) else share * u, updates, specs
        )

    return optax.stateless(update)


def scale_each(factors: Any) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by its own factor, decay included."""

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(jnp.multiply, updates, factors)

    return optax.stateless(update)


def trained_by_muon(spec: ParameterSpec) -> bool:
    """Whether Muon trains a parameter: a matrix [I, O] between hidden activations.

    Embeddings, heads, routers, and parameters that do not decay, such as biases, are excluded.
    """
    dims = spec.shape[spec.num_stacked :]
    return spec.decays and len(dims) == 2 and min(dims) > 1 and spec.component not in NOT_MATRICES


def muon(settings: OptimizerConfig, spec: ParameterSpec) -> optax.GradientTransformation:
    """Muon for one matrix [I, O]: momentum, made nearly orthogonal by Newton-Schulz.

    Jordan 2024, kellerjordan.github.io/posts/muon, scales an update by sqrt(max(1, O / I)), which
    needs its own learning rate, near 0.02. Liu et al. 2025 (Moonlight), arXiv:2502.16982 sec. 2.2,
    scales it by 0.2 sqrt(max(I, O)), to AdamW's root mean square: both then share one learning rate
    and one weight decay. The size of a step does not depend on the gradient, so an expert that
    receives no token keeps moving along its momentum.
    """
    inputs, outputs = spec.shape[spec.num_stacked :]
    jordan, moonlight = max(1, outputs / inputs) ** 0.5, 0.2 * max(inputs, outputs) ** 0.5
    return optax.chain(
        optax.contrib.scale_by_muon(ns_steps=settings.ns_steps, beta=settings.momentum),
        optax.scale(moonlight if settings.match_adamw else jordan),
    )


def per_parameter(
    transform_of: Callable[[ParameterSpec], optax.GradientTransformation], specs: Any
) -> optax.GradientTransformation:
    """Applies a transform to each parameter, separately to each slice of a stacked one.

    Otherwise optax would factor the two largest dims of an array, which in [E, M, H] may be E and
    H, and take root mean squares over all of it.

    Args:
      transform_of: returns the transform of one slice of a parameter, from its spec.
      specs: specs of the parameters.
    """

    def over_stack(function: Any, count: int) -> Any:
        for _ in range(count):
            function = jax.vmap(function)
        return function

    def init(params: Any) -> Any:
        return jax.tree.map(
            lambda spec, p: over_stack(transform_of(spec).init, spec.num_stacked)(p), specs, params
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        outcomes = jax.tree.map(
            lambda spec, g, s, p: over_stack(transform_of(spec).update, spec.num_stacked)(g, s, p),
            specs,
            updates,
            state,
            params,
        )
        new_updates = jax.tree.map(lambda _, outcome: outcome[0], updates, outcomes)
        return new_updates, jax.tree.map(lambda _, outcome: outcome[1], updates, outcomes)

    return optax.GradientTransformation(init, update)


def sum_dtype(parameter: Any) -> Any:
    """The dtype of sums and averages of a parameter: bfloat16 would lose small terms."""
    return jnp.promote_types(parameter.dtype, jnp.float32)


class ParameterAverage(NamedTuple):
    """The state of `average_parameters`.

    Attributes:
      steps: int32 scalar, number of finished steps.
      average: average of the parameters after these steps, in `sum_dtype`.
    """

    steps: jax.Array
    average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters; the last transform of a chain.

    After step t, the average moves by max(1 - decay, 1 / t) towards the parameters. Over the first
    1 / (1 - decay) steps it is the plain mean, without the initial values.
    """

    def init(params: Any) -> ParameterAverage:
        average = jax.tree.map(lambda p: jnp.copy(p).astype(sum_dtype(p)), params)
        return ParameterAverage(jnp.zeros((), jnp.int32), average)

    def update(updates: Any, state: ParameterAverage, params: Any = None) -> tuple[Any, Any]:
        steps = state.steps + 1
        share = jnp.maximum(1 - decay, 1 / steps.astype(jnp.float32))
        average = jax.tree.map(
            lambda old, p, u: old + share * (p + u - old), state.average, params, updates
        )
        return updates, ParameterAverage(steps, average)

    return optax.GradientTransformation(init, update)


def moments_of(settings: OptimizerConfig, spec: ParameterSpec) -> int:
    """Number of arrays of a parameter's shape that the optimizer keeps for it, if it trains.

    Adafactor's factors, and its moments of unfactored parameters, are not counted.
    """
    of_name = {"adamw": 2, "adafactor": 0, "lion": 1, "schedule_free": 2}
    of_name["muon"] = 1 if trained_by_muon(spec) else 2
    return of_name[settings.name] + (settings.ema_decay > 0)

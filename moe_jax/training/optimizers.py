"""Optimizers and learning-rate schedules, out of optax parts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ExperimentConfig, OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of a step: a linear warm-up from 0, then the named decay.

    cosine and linear reach `final_fraction` of the peak at `num_steps`; rsqrt is
    peak * sqrt(warmup_steps / step); constant stays at the peak.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay_steps = max(num_steps - warmup, 1)
    decays = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.final_fraction, decay_steps),
        "rsqrt": lambda step: peak * jnp.sqrt(warmup / (step + warmup)),
    }
    if warmup == 0:
        return decays[config.schedule]
    rise = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def make_optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    """Clipping, preconditioning, decoupled weight decay and the schedule, in this order.

    "adamw": Loshchilov and Hutter 2019, arXiv:1711.05101. "adafactor": Shazeer and Stern 2018,
    arXiv:1804.04235, factored second moments, update clipping at 1, steps relative to the scale
    of a parameter; each expert, and each of scanned layers, has parameters of its own. What decays,
    and what is stacked, is what the specs of the model's parameters say.
    """
    settings, specs = config.optimizer, config.model.specs()
    if settings.name == "adamw":
        precondition = optax.scale_by_adam(settings.b1, settings.b2, settings.epsilon)
    else:
        precondition = per_parameter(
            optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            ),
            jax.tree.map(lambda spec: spec.num_stacked, specs),
        )
    clip_norm = settings.clip_norm
    parts = [
        optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
        precondition,
        optax.add_decayed_weights(
            settings.weight_decay, mask=jax.tree.map(lambda spec: spec.decays, specs)
        ),
        optax.scale_by_learning_rate(learning_rate_schedule(settings, config.training.num_steps)),
    ]
    return optax.chain(*parts)


def per_parameter(
    transform: optax.GradientTransformation, num_stacked: Any
) -> optax.GradientTransformation:
    """Applies a transform to each of stacked parameters as if it were alone.

    Optax factors the two largest dims of an array, which in [E, M, H] may be E and H, and takes
    root mean squares over all of it.

    Args:
      transform: of one parameter.
      num_stacked: for every array, how many leading dims count parameters.
    """

    def over_stack(function: Any, count: int) -> Any:
        for _ in range(count):
            function = jax.vmap(function)
        return function

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p, n: over_stack(transform.init, n)(p), params, num_stacked)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        outcomes = jax.tree.map(
            lambda g, n, s, p: over_stack(transform.update, n)(g, s, p),
            updates,
            num_stacked,
            state,
            params,
        )
        new_updates = jax.tree.map(lambda _, outcome: outcome[0], updates, outcomes)
        return new_updates, jax.tree.map(lambda _, outcome: outcome[1], updates, outcomes)

    return optax.GradientTransformation(init, update)

"""One training step: microbatches, gradient, optimizer, router bias (legend: `moe_jax.moe`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ExperimentConfig, ModelConfig
from moe_jax.moe import balance, bias
from moe_jax.moe.statistics import MoEAux, merge_aux
from moe_jax.training.loss import Batch, LossParts, Totals, batch_totals, partial_loss
from moe_jax.training.optimizers import learning_rate_schedule, make_optimizer
from moe_jax.training.state import TrainState


class StepMetrics(NamedTuple):
    """What a step says.

    Attributes:
      loss: float32 scalar, nats a target: cross-entropy alone.
      total_loss: float32 scalar, with the balance losses: what was differentiated.
      grad_norm: float32 scalar, global norm before clipping.
      learning_rate: float32 scalar.
      aux: of the MoE layers over the whole batch, leading dim X, without the counts of single
        sequences (`assigned_BE` is None); None for a dense model.
    """

    loss: jax.Array
    total_loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    aux: MoEAux | None


def make_train_step(
    config: ExperimentConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step of a config: `(state, batch) -> (state, metrics)`, to be jitted.

    The batch holds arrays [num_microbatches, batch_size / num_microbatches, L]. How it is cut
    changes the memory the step needs and, beyond rounding, nothing else; but for noise, which is
    drawn anew for each microbatch, and for losses that are of a microbatch: load-balance scope
    "microbatch", the importance, load and batch-entropy losses (not linear in its sums).
    """
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    schedule = learning_rate_schedule(config.optimizer, config.training.num_steps)
    model, num_parts = config.model, config.training.num_microbatches

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
        keys = jax.random.split(rng, num_parts)
        loss, grads, said = gradient(state, batch, keys, batch_totals(batch), model)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        aux = None if said.aux is None else merge_aux(said.aux, model.moe)
        bias_XE = state.router_bias_XE
        if bias_XE is not None and aux is not None:
            bias_XE = next_router_bias(bias_XE, aux, state.step, config)
            aux = aux._replace(needed_bias_EQ=None)  # large, and of no more use
        new_state = TrainState(state.step + 1, params, opt_state, bias_XE, state.key_data)
        metrics = StepMetrics(
            loss=jnp.sum(said.cross_entropy),
            total_loss=loss,
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            aux=aux,
        )
        return new_state, metrics

    return train_step


def next_router_bias(
    bias_XE: jax.Array, aux: MoEAux, step: jax.Array, config: ExperimentConfig
) -> jax.Array:
    """The selection biases after a step, from what its MoE layers said of the whole batch."""
    moe, settings = config.model.moe, config.model.moe.balance
    rate = bias.update_rate(settings, step, config.training.num_steps)
    if settings.bias_update == "quantile":
        assert aux.needed_bias_EQ is not None, "counted in training"
        target_XE = bias.quantile_bias(bias_XE, aux.needed_bias_EQ, moe.num_selected_experts)
        return bias_XE + rate * (target_XE - bias_XE)
    return bias.update_router_bias(
        bias_XE,
        jnp.sum(aux.assigned_KE, axis=-2),
        rate,
        by=settings.bias_update,
        centered=settings.bias_update_centered,
    )


def gradient(
    state: TrainState, parts: Batch, keys: jax.Array, totals: Totals, model: ModelConfig
) -> tuple[jax.Array, Any, LossParts]:
    """Loss and gradient of a batch, one part after another.

    Args:
      state: parameters and router biases.
      parts: the batch, with a leading dim of parts.
      keys: a random key for each part.
      totals: denominators of the whole batch.
      model: its config.

    Returns:
      The loss, its gradient, and what every part said (leading dim of parts).
    """
    loss_and_grad = jax.value_and_grad(partial_loss, has_aux=True)

    def of_part(part: Batch, key: jax.Array, totals: Totals) -> tuple[Any, Any]:
        bias_XE = state.router_bias_XE
        return loss_and_grad(
            state.params, part, totals, model, router_bias_XE=bias_XE, rng=key, step=state.step
        )

    if len(keys) == 1:
        only = {name: value[0] for name, value in parts.items()}
        (loss, said), grads = of_part(only, keys[0], totals)
        return loss, grads, jax.tree.map(lambda x: x[None], said)

    if model.moe_layers and model.moe.balance.load_balance_scope == "global":
        totals = totals._replace(load_XE=whole_load(state, parts, keys, totals, model))

    def accumulate(carry: tuple[Any, Any], inputs: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
        (loss, said), grads = of_part(*inputs, totals)
        return jax.tree.map(jnp.add, carry, (loss, grads)), said

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (loss, grads), said = jax.lax.scan(accumulate, zero, (parts, keys))
    return loss, grads, said


def whole_load(
    state: TrainState, parts: Batch, keys: jax.Array, totals: Totals, model: ModelConfig
) -> jax.Array:
    """Every expert's share in what the load-balance loss counts of the whole batch, float32 [X, E].

    The gradient of the global load-balance loss needs it before the first backward pass, so that
    accumulation in scope "global" runs the layers forward once more.
    """

    def counts(carry: None, inputs: tuple[Batch, jax.Array]) -> tuple[None, tuple[Any, Any]]:
        part, key = inputs
        bias_XE = state.router_bias_XE
        _, said = partial_loss(
            state.params, part, totals, model, router_bias_XE=bias_XE, rng=key, step=state.step
        )
        assert said.aux is not None
        return carry, (said.aux.balanced_KE, said.aux.num_tokens)

    _, (balanced, tokens) = jax.lax.scan(counts, None, (parts, keys))
    convention = model.moe.balance.load_balance_convention
    return balance.load_share(jnp.sum(balanced, axis=0), jnp.sum(tokens, axis=0), convention)

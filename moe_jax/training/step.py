"""One training step: microbatches, gradient, optimizer, state of parts (legend: `moe_jax.moe`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import ExperimentConfig
from moe_jax.models.model import LanguageModel
from moe_jax.models.trained import combine, moving_state
from moe_jax.part import NOTHING, merge_aux
from moe_jax.training.loss import Batch, LossParts, Totals, batch_totals, partial_loss
from moe_jax.training.optimizers import learning_rate_schedule, make_optimizer, sum_dtype
from moe_jax.training.state import TrainState, abstract_batch, abstract_state, trained_params


class StepMetrics(NamedTuple):
    """The metrics of a step.

    Attributes:
      loss: float32 scalar, cross-entropy only, nats per target.
      total_loss: float32 scalar, the differentiated loss: training loss plus losses of the parts.
      grad_norm: float32 scalar, global gradient norm of the trained parameters, before clipping.
      learning_rate: float32 scalar.
      of_parts: metrics of the parts over the whole batch, by PART/NAME; the leading dim is layers.
      of_loss: float32 scalars, metrics of the training loss by name.
    """

    loss: jax.Array
    total_loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    of_parts: dict[str, jax.Array]
    of_loss: dict[str, jax.Array] = NOTHING


def make_train_step(
    config: ExperimentConfig,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Builds the training step `(state, batch, *arrays) -> (state, metrics)`, to be jitted.

    The arrays are those that `training.loss` reads; cross-entropy reads none.

    The batch holds arrays [num_microbatches, batch_size / num_microbatches, ...]. The number of
    microbatches changes the memory of the step. Beyond rounding, it changes results only through
    noise (each microbatch draws its own), losses that are not linear in the sums of a microbatch,
    and bounded buffers. Frozen parameters and frozen state of parts stay unchanged.
    """
    optimizer = make_optimizer(config)
    moving = moving_state(config.optimizer, config.model)
    schedule = learning_rate_schedule(config.optimizer, config.training.num_steps)
    model, num_microbatches = config.model, config.training.num_microbatches

    def train_step(state: TrainState, batch: Batch, *arrays: Any) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
        keys = jax.random.split(rng, num_microbatches)
        trained = trained_params(config, state.params)
        totals = batch_totals(batch, model)
        loss_settings = {
            "training_loss": config.training.loss, "arrays": arrays,
            "logits_chunks": config.training.logits_chunks,
        }  # fmt: skip
        loss, grads, shares = gradient(state, batch, keys, totals, model, trained, **loss_settings)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = combine(optax.apply_updates(trained, updates), state.params)
        aux = merge_aux(shares.aux)
        sums = {name: of_part.sums for name, of_part in aux.items()}
        num_steps = config.training.num_steps
        moved = model.next_state(state.model_state, sums, state.step, num_steps)
        model_state = jax.tree.map(
            lambda moves, new, old: new if moves else old, moving, moved, state.model_state
        )
        new_state = TrainState(state.step + 1, params, opt_state, model_state, state.key_data)
        metrics = StepMetrics(
            loss=jnp.sum(shares.cross_entropy),
            total_loss=loss,
            grad_norm=optax.tree.norm(grads),
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            of_parts=model.metrics(aux),
            of_loss=jax.tree.map(jnp.sum, shares.of_loss),
        )
        return new_state, metrics

    return train_step


def depends_on_microbatches(config: ExperimentConfig) -> bool:
    """Whether the steps of a run depend, beyond rounding, on `training.num_microbatches`.

    They do if a loss or a bounded buffer works per microbatch, or if the loss draws random numbers:
    each microbatch has its own key. The loss is traced to find such draws; nothing is computed.
    """
    if config.model.depends_on_microbatches:
        return True
    rows = config.training.batch_size // config.training.num_microbatches
    batch = abstract_batch(config, (rows,))
    state = abstract_state(config)

    def loss(params: Any, model_state: Any, batch: Batch, key_data: jax.Array) -> jax.Array:
        key, step = jax.random.wrap_key_data(key_data), jnp.zeros((), jnp.int32)
        settings = {"model_state": model_state, "rng": key, "step": step}
        totals = batch_totals(batch, config.model)
        return partial_loss(params, batch, totals, config.model, **settings)[0]

    program = jax.make_jaxpr(loss)(state.params, state.model_state, batch, state.key_data)
    return "random_bits" in str(program)


def gradient(
    state: TrainState,
    microbatches: Batch,
    keys: jax.Array,
    totals: Totals,
    model: LanguageModel,
    trained: Any = None,
    **loss_settings: Any,
) -> tuple[jax.Array, Any, LossParts]:
    """Loss and gradient of a batch, one microbatch after another.

    Args:
      state: parameters and the state of the model's parts.
      microbatches: the batch, with a leading dim of microbatches.
      keys: one random key per microbatch.
      totals: denominators of the whole batch.
      model: the model.
      trained: the parameters that train, from `trained_params`; None: all.
      **loss_settings: `training_loss`, `arrays` and `logits_chunks` of `partial_loss`.

    Returns:
      The loss, its gradient in the tree of `trained`, and the shares of all microbatches (leading
      dim).
    """
    trained = state.params if trained is None else trained

    def loss_of(trained: Any, *args: Any, **kwargs: Any) -> tuple[jax.Array, LossParts]:
        return partial_loss(combine(trained, state.params), *args, **kwargs)

    loss_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    settings = {"model_state": state.model_state, "step": state.step, **loss_settings}
    if len(keys) == 1:
        only = {name: value[0] for name, value in microbatches.items()}
        outcome = loss_and_grad(trained, only, totals, model, rng=keys[0], **settings)
        (loss, share), grads = outcome
        return loss, grads, jax.tree.map(lambda x: x[None], share)

    if model.needs_batch_sums:
        totals = totals._replace(sums=batch_sums(state, microbatches, keys, totals, model))

    def accumulate(carry: tuple[Any, Any], inputs: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
        microbatch, key = inputs
        outcome = loss_and_grad(trained, microbatch, totals, model, rng=key, **settings)
        (loss, share), grads = outcome
        return jax.tree.map(jnp.add, carry, (loss, grads)), share

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros_like(p, sum_dtype(p)), trained))
    (loss, grads), shares = jax.lax.scan(accumulate, zero, (microbatches, keys))
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained), shares


def batch_sums(
    state: TrainState, microbatches: Batch, keys: jax.Array, totals: Totals, model: LanguageModel
) -> dict[str, Any]:
    """Sums of the whole batch, by part of the model.

    A loss of the whole batch needs them before the first backward pass. Accumulation therefore runs
    the layers forward once more.
    """

    def measure(carry: None, inputs: tuple[Batch, jax.Array]) -> tuple[None, Any]:
        microbatch, key = inputs
        _, share = partial_loss(
            state.params, microbatch, totals, model,
            model_state=state.model_state, rng=key, step=state.step,
        )  # fmt: skip
        return carry, share.aux

    _, aux = jax.lax.scan(measure, None, (microbatches, keys))
    return {name: own.sums for name, own in merge_aux(aux).items()}

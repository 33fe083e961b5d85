"""What a training step changes, and all that a resumed run needs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax.contrib

from moe_jax.config import ExperimentConfig
from moe_jax.models.trained import filled, kept, like, training_marks
from moe_jax.parameters import init_parameters
from moe_jax.training.optimizers import ParameterAverage, make_optimizer


class TrainState(NamedTuple):
    """The state of a run after `step` steps.

    Attributes:
      step: int32 scalar; also the position in the data.
      params: parameters, in the tree of the model's specs.
      opt_state: what the optimizer keeps: moments, and averages of parameters; () of a model that
        was imported.
      model_state: what the model's parts update outside the optimizer, by part, such as selection
        biases; {} where there is nothing.
      key_data: uint32, the run's random key; a step uses what it and the step give.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: dict[str, Any]
    key_data: jax.Array


def init_state(config: ExperimentConfig) -> TrainState:
    """The state before the first step; a function of the config alone, jit-compatible."""
    model = config.model
    param_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = init_parameters(param_key, model.specs())
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(trained_params(config, params)),
        model_state=init_parameters(param_key, model.state_specs()),
        key_data=jax.random.key_data(run_key),
    )


def trained_params(config: ExperimentConfig, params: Any) -> Any:
    """The parameters that train, in a tree that has None in the place of the others."""
    return kept(params, training_marks(config.optimizer, config.model.specs()))


def evaluation_params(state: TrainState) -> Any:
    """The parameters to evaluate and to sample from, in the tree of the model's specs.

    What the optimizer averages: `optimizer.ema_decay`, or Schedule-Free's x (arXiv:2405.15682);
    without an average, and of what does not train, the parameters of the last step.
    """
    if not state.opt_state:  # of a model that was imported
        return state.params
    last = state.opt_state[-1]
    if isinstance(last, ParameterAverage):
        return filled(last.average, state.params)
    if isinstance(last, optax.contrib.ScheduleFreeState):
        average = jax.jit(optax.contrib.schedule_free_eval_params)
        return filled(average(last, like(last.z, state.params)), state.params)
    return state.params


def abstract_batch(
    config: ExperimentConfig, rows: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a run without its contents: shapes and dtypes, with these dims before each."""
    arrays = config.data.objective.arrays(config.data.sequence_length)
    return {
        name: jax.ShapeDtypeStruct((*rows, *shape), dtype)
        for name, (shape, dtype) in arrays.items()
    }


@functools.lru_cache(maxsize=64)
def abstract_state(config: ExperimentConfig) -> TrainState:
    """Shapes and dtypes of `init_state`; nothing is computed."""
    return jax.eval_shape(lambda: init_state(config))

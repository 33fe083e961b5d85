"""What a training step changes, and all that a resumed run needs."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from moe_jax.config import ExperimentConfig
from moe_jax.models.trained import filled, kept, like, training_marks
from moe_jax.parameters import init_parameters
from moe_jax.training.arrays import name_of
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


def state_from(
    config: ExperimentConfig,
    taken: Mapping[str, jax.Array],
    step: int = 0,
    z: Mapping[str, jax.Array] | None = None,
    b1: jax.typing.ArrayLike = 1.0,
) -> TrainState:
    """The state before the first step of a run that starts from arrays; jit-compatible.

    What is not among them is as `init_state` has it, but for averages and counts of steps.

    Args:
      config: of the run.
      taken: by name: "params/embedding", "model_state/moe/bias_E", "opt_state/1/mu/embedding".
      step: that the run goes on from: the count of its schedules too.
      z: Schedule-Free's z by the names of parameters, where `taken` has its y.
      b1: between them.
    """

    def replaced(**trees: Any) -> Any:
        values = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
        leaves = [found.get(name, value) for name, value in values.items()]
        return jax.tree.unflatten(jax.tree.structure(trees), leaves)

    found = dict(taken)
    for name, array in (z or {}).items():
        found[name] = (found[name] - (1 - b1) * array) / b1
    drawn = init_state(config)
    new = replaced(params=drawn.params, model_state=drawn.model_state)
    trained = trained_params(config, new["params"])
    moments = replaced(opt_state=make_optimizer(config).init(trained))["opt_state"]
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=new["params"],
        opt_state=with_schedule_at(moments, step),
        model_state=new["model_state"],
        key_data=drawn.key_data,
    )


def with_schedule_at(opt_state: Any, step: int) -> Any:
    """What the optimizer keeps, with the schedule of the learning rate at this step."""
    count = jnp.asarray(step, jnp.int32)

    def moved(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=count)
        if isinstance(node, optax.contrib.ScheduleFreeState):
            inner = with_schedule_at(node.base_optimizer_state, step)
            return node._replace(step_count=count + 1, base_optimizer_state=inner)
        return node

    kinds = (optax.ScaleByScheduleState, optax.contrib.ScheduleFreeState)
    return jax.tree.map(moved, opt_state, is_leaf=lambda node: isinstance(node, kinds))


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


def for_evaluation(state: TrainState) -> TrainState:
    """The state with `opt_state` reduced to what `evaluation_params` reads, in the same places."""
    if not state.opt_state:
        return state
    *others, last = state.opt_state
    if isinstance(last, optax.contrib.ScheduleFreeState):
        last = last._replace(
            weight_sum=None, step_count=None, max_lr=None, base_optimizer_state=None
        )
    elif not isinstance(last, ParameterAverage):
        last = ()
    return state._replace(opt_state=(*((),) * len(others), last))


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

"""The training state: what a step changes, and all that a resumed run needs."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from moe_jax.config import ExperimentConfig
from moe_jax.models.trained import combine, filter_like, filter_tree, training_marks
from moe_jax.parameters import init_parameters
from moe_jax.training.arrays import name_of
from moe_jax.training.optimizers import ParameterAverage, make_optimizer


class TrainState(NamedTuple):
    """The state of a run after `step` steps.

    Attributes:
      step: int32 scalar; also the position in the data.
      params: parameters, in the tree of the model's specs.
      opt_state: the optimizer's state: moments, and averages of parameters; () for an imported
        model.
      model_state: arrays that parts update outside the optimizer, by part, such as selection
        biases; {} if there are none.
      key_data: uint32, the run's random key; each step folds in its number.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    model_state: dict[str, Any]
    key_data: jax.Array


def init_state(config: ExperimentConfig, seed: jax.typing.ArrayLike | None = None) -> TrainState:
    """The initial state; a function of only the config, jit-compatible.

    Args:
      config: the run's config.
      seed: replaces `config.seed`; it may be traced, so that one program serves all seeds.
    """
    model = config.model
    param_key, run_key = jax.random.split(jax.random.key(config.seed if seed is None else seed))
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
) -> TrainState:
    """The initial state of a run that starts from given arrays; jit-compatible.

    Other arrays are as in `init_state`, except averages, which start at the new parameters, and
    step counts.

    Args:
      config: the run's config.
      taken: arrays by name, such as "params/embedding", "model_state/moe/bias_E",
        "opt_state/1/mu/embedding".
      step: step that the run continues from; also the count of its schedules.
    """

    def replaced(**trees: Any) -> Any:
        values = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
        leaves = [taken.get(name, value) for name, value in values.items()]
        return jax.tree.unflatten(jax.tree.structure(trees), leaves)

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
    """The optimizer's state, with its learning-rate schedule at this step."""
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
    """The parameters that train, in a tree with None in place of the others."""
    return filter_tree(params, training_marks(config.optimizer, config.model.specs()))


def evaluation_params(state: TrainState) -> Any:
    """The parameters to evaluate and sample from, in the tree of the model's specs.

    These are the optimizer's averages: of `optimizer.ema_decay`, or Schedule-Free's x
    (arXiv:2405.15682). Parameters without an average are those of the last step.
    """
    if not state.opt_state:  # of an imported model
        return state.params
    last = state.opt_state[-1]
    if isinstance(last, ParameterAverage):
        average = combine(last.average, state.params)
        return jax.tree.map(lambda a, p: a.astype(p.dtype), average, state.params)
    if isinstance(last, optax.contrib.ScheduleFreeState):
        average_of = jax.jit(optax.contrib.schedule_free_eval_params)
        return combine(average_of(last, filter_like(last.z, state.params)), state.params)
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
    """Shapes and dtypes of a run's batch, with the leading dims `rows`."""
    arrays = config.data.objective.arrays(config.data.sequence_length)
    return {
        name: jax.ShapeDtypeStruct((*rows, *shape), dtype)
        for name, (shape, dtype) in arrays.items()
    }


@functools.lru_cache(maxsize=64)
def abstract_state(config: ExperimentConfig) -> TrainState:
    """Shapes and dtypes of `init_state`; nothing is computed."""
    return jax.eval_shape(lambda: init_state(config))

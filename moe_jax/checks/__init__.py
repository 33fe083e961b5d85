"""The checks of `python -m moe_jax.check_part`, which every kind of part passes.

Each check examines a `Trial`, a part in a tiny model, and returns a `Result`.
"""

import dataclasses
import inspect
import json
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks.around import FAMILIES, model_around
from moe_jax.checks.decoding import read_twice
from moe_jax.checks.trial import NUM_SUFFIXES, PADDED, SPLIT, Computed, Trial
from moe_jax.config.convert import InFamily, build, to_dict
from moe_jax.config.settings import Settings
from moe_jax.models.capacity import without_capacity
from moe_jax.moe.routing import Choices
from moe_jax.parallel.rules import RULES
from moe_jax.parameters import ParameterSpec
from moe_jax.part import Call

# Another order of computation differs by a few roundings (epsilon 1.2e-7) of the largest number of
# an array; a token that gains or loses an expert moves by about 1.
ROUNDING, MOVED = 2e-5, 1e-4
SUM_OF_PROBABILITIES = 1e-3  # how far it may be from 1, in float32 or bfloat16 logits


class Result(NamedTuple):
    """The result of a check.

    Attributes:
      passed: whether the check passed; None: it does not apply.
      text: what was checked, or what is wrong.
    """

    passed: bool | None
    text: str


def serialises(trial: Trial) -> Result:
    """`to_dict`, JSON and `build` reproduce the part, also with each plain field changed."""
    part, wrong = trial.part, list(undeclared(type(trial.part)))
    if wrong:
        return Result(False, "; ".join(wrong))
    changed = [part, *changed_parts(part)]
    for one in changed:
        written = json.loads(json.dumps(to_dict(one)))
        again = build(InFamily(part.family), written, type(part).__name__)
        if again != one or hash(again) != hash(one):
            wrong.append(f"{one} is written as {written}, which builds {again}")
    if wrong:
        return Result(False, "; ".join(wrong))
    return Result(True, f"as it is, and with each of {len(changed) - 1} plain fields changed")


def undeclared(cls: type) -> Iterator[str]:
    """Settings that a config cannot set: annotated, but not fields of the dataclass."""
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    for base in cls.__mro__:
        for name, annotation in vars(base).get("__annotations__", {}).items():
            is_marker = annotation is dataclasses.KW_ONLY
            is_class_variable = typing.get_origin(annotation) is typing.ClassVar
            if name not in fields and not is_marker and not is_class_variable:
                yield (
                    f"{base.__name__}.{name} is not a setting: decorate the class with "
                    "@dataclasses.dataclass(frozen=True), or annotate a ClassVar"
                )


def changed_parts(part: Settings) -> Iterator[Settings]:
    """The part with each plain field changed in turn, if its own checks accept a change."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        bounds = field.metadata.get("bounds")
        if bounds is not None and bounds.choices is not None:
            others = [choice for choice in bounds.choices if choice != value]
            others = [(choice,) for choice in others] if isinstance(value, tuple) else others
        elif isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int | float):
            others = [value + 1, value / 2 if isinstance(value, float) else value * 2]
        else:
            others = []
        for other in others:
            try:
                yield dataclasses.replace(part, **{field.name: other})
                break
            except ValueError:
                continue


def specs_hold(trial: Trial) -> Result:
    """Specs are complete; initial values are finite and the same when drawn twice."""
    wrong, leaves = [], jax.tree_util.tree_leaves_with_path(trial.specs)
    for path, spec in leaves:
        name = named(path)
        if not isinstance(spec, ParameterSpec):
            wrong.append(f"{name} is not a ParameterSpec: {spec!r}")
        elif len(spec.axes) != len(spec.shape) or not set(spec.axes) <= {*RULES, None}:
            wrong.append(f"{name} of shape {spec.shape} has the axes {spec.axes}")
        elif not spec.component:
            wrong.append(f"{name} has no component")
    if wrong:
        return Result(False, "; ".join(wrong))
    for (path, spec), value in zip(leaves, jax.tree.leaves(trial.drawn), strict=True):
        if value.shape != spec.shape or value.dtype != spec.dtype:
            wrong.append(f"{named(path)} starts as {value.dtype}{value.shape}, unlike its spec")
    wrong += [f"{name} starts from values that are not finite" for name in not_finite(trial.drawn)]
    # The program that draws them must be the same each time, including its constants.
    programs = [jax.make_jaxpr(trial.draw)(jax.random.key(0)) for _ in range(2)]
    constants = (program.consts for program in programs)
    if str(programs[0]) != str(programs[1]) or differences(*constants):
        wrong.append("initial values differ between draws with one key")
    num_state = len(jax.tree.leaves(trial.specs["state"]))
    found = f"{len(leaves) - num_state} parameters and {num_state} arrays of state of the model"
    return Result(not wrong, "; ".join(wrong) or f"{found}; initial values are finite, same twice")


def values_hold(trial: Trial) -> Result:
    """Outputs, losses, metrics and the next state are finite, and the state keeps its shape."""
    wrong = []
    for name, computed in (("training", trial.training), ("evaluation", trial.evaluation)):
        wrong += [f"{what} of {name} is not finite" for what in not_finite(computed._asdict())]
    following = trial.training.state
    shapes = [
        jax.tree.map(lambda a, skip=skip: (a.shape[skip:], a.dtype), state)
        for skip, state in ((1, following), (0, trial.state))
    ]
    if shapes[0] != shapes[1]:
        wrong.append(f"the next state is {shapes[0]}, where the state is {shapes[1]}")
    dtype = jax.eval_shape(lambda: output_dtype(trial)).dtype
    if dtype != jnp.bfloat16:
        wrong.append(f"the residual has dtype {dtype} for bfloat16 inputs")
    if wrong:
        return Result(False, "; ".join(wrong))
    return Result(True, "outputs, losses, metrics and state are finite, dtypes are kept")


def output_dtype(trial: Trial) -> jax.Array:
    """The residual stream after the layers in bfloat16."""
    model = dataclasses.replace(trial.model, compute_dtype="bfloat16", scan_layers=False)
    tokens_BL = trial.batches.tokens_PBL[0]
    call = Call(tokens_BL=tokens_BL).with_defaults(tokens_BL[..., None])
    x_BLM = model.embed(trial.params, tokens_BL).astype(jnp.bfloat16)
    call = dataclasses.replace(call, memory=x_BLM)  # for a part that reads a memory
    return model.decoder.apply(trial.params["stack"], x_BLM, call, state=trial.state)[0]


def not_finite(values: Any) -> list[str]:
    """The names of the arrays that contain a number that is not finite."""
    return [
        named(path)
        for path, value in jax.tree_util.tree_leaves_with_path(values)
        if jnp.issubdtype(value.dtype, jnp.inexact) and not np.isfinite(value).all()
    ]


def causality(trial: Trial, *, training: bool) -> Result:
    """Other suffixes of a sequence do not change earlier outputs, unless the part looks ahead."""
    computed = trial.training if training else trial.evaluation
    logits_PLV = computed.logits_PBLV[: NUM_SUFFIXES + 1, -1]
    moved_PL = np.abs(logits_PLV[1:] - logits_PLV[:1]).max(axis=-1) / np.abs(logits_PLV).max()
    largest = moved_PL[:, :SPLIT].max()
    found = f"outputs before {NUM_SUFFIXES} other suffixes move by {largest:.0e} of the largest"
    if trial.model.looks_ahead(training):
        seen = "" if largest > MOVED else ", so that none was seen to look ahead"
        return Result(True, f"declared to look ahead; {found}{seen}")
    return Result(bool(largest <= MOVED), f"declared causal; {found}")


def causal_in_training(trial: Trial) -> Result:
    """See `causality`."""
    return causality(trial, training=True)


def causal_in_evaluation(trial: Trial) -> Result:
    """See `causality`."""
    return causality(trial, training=False)


def gradients_arrive(trial: Trial) -> Result:
    """Gradients are finite, and not 0 for any parameter."""
    wrong = not_finite(trial.training.gradients)
    if wrong:
        return Result(False, f"not finite: {', '.join(wrong)}")
    leaves = jax.tree_util.tree_leaves_with_path(trial.training.gradients)
    zero = [named(path) for path, value in leaves if not value.any()]
    if zero:
        return Result(False, f"always 0, so that these are not learned: {', '.join(zero)}")
    return Result(True, f"finite, and not 0 for any of {len(leaves)} parameters")


def padding_is_ignored(trial: Trial) -> Result:
    """Other tokens in the padding change no output, loss or gradient."""
    valid_BL = trial.batches.segments_PBL[-1] > 0
    wrong = []
    for name, computed in (("training", trial.training), ("evaluation", trial.evaluation)):
        padded, other = (
            (computed.logits_PBLV[i][valid_BL], computed.loss_P[i],
             jax.tree.map(lambda a, i=i: a[i], computed.gradients))
            for i in (-2, -1)
        )  # fmt: skip
        wrong += [f"{what} in {name}" for what in differences(padded, other)]
    if wrong:
        return Result(False, f"other tokens in the padding move {', '.join(wrong)}")
    return Result(True, "other tokens in the padding move no output, loss or gradient")


def equal_on_a_mesh(trial: Trial) -> Result:
    """A mesh computes the same as one device."""
    if jax.device_count() == 1:
        return Result(None, "there is one device")
    try:
        mesh = trial.mesh_config
    except ValueError as error:
        return Result(False, str(error))
    sizes = {name: getattr(mesh, name) for name in ("data", "fsdp", "expert", "tensor")}
    shape = ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    return equal(trial.on_mesh, trial.training, f"on {shape} and on one device")


def equal_in_microbatches(trial: Trial) -> Result:
    """A batch in microbatches gives the outputs and losses of the whole, unless declared not to."""
    if trial.model.depends_on_microbatches:
        return Result(None, "declared to depend on how a batch is split")
    names, whole = ("logits", "loss"), (trial.evaluation.logits_PBLV, trial.evaluation.loss_P)
    expected = {name: value[PADDED] for name, value in zip(names, whole, strict=True)}
    given = dict(zip(names, trial.in_microbatches, strict=True))
    wrong = differences(given, expected)
    if wrong:
        found = f"{' and '.join(wrong)}: not the same when a batch is split"
        return Result(False, f"{found}; declare depends_on_microbatches if that is meant")
    return Result(True, "a batch, split into microbatches, has the same outputs and losses")


def equal_unrolled(trial: Trial) -> Result:
    """Layers in a scan compute the same as layers one after another."""
    return equal(trial.unrolled, trial.training, "in a scan and one after another")


def equal(given: Computed, expected: Computed, where: str) -> Result:
    """Compares the first batch of two passes."""
    first = (jax.tree.map(lambda a: a[0], computed[:3]) for computed in (given, expected))
    wrong = differences(*first)
    if wrong:
        return Result(False, f"{where} these differ: {', '.join(wrong)}")
    return Result(True, f"outputs, loss and gradients are the same {where}")


def differences(given: Any, expected: Any) -> list[str]:
    """The names of the arrays that differ by more than rounding."""
    wrong, leaves = [], jax.tree_util.tree_leaves_with_path(expected)
    largest = max((np.abs(value).max() for _, value in leaves), default=0)
    for (path, value), own in zip(leaves, jax.tree.leaves(given), strict=True):
        # A sum that cancels to nearly 0 has the rounding errors of its terms.
        scale = max(np.abs(value).max(initial=0), 0.1 * largest)
        if not np.abs(value - own).max(initial=0) <= ROUNDING * scale:
            wrong.append(named(path))
    return wrong


def decodes(trial: Trial) -> Result:
    """Decoding from caches gives the logits of one pass over a text, after padding too."""
    model = trial.model
    if without_capacity(model).looks_ahead(training=False):
        return Result(None, "it looks ahead, so each token recomputes the whole text")
    uncached = model.decoder.without_cache(model.dims)
    if uncached:
        return Result(
            None,
            f"{', '.join(uncached)}: no cache_specs, and pointwise=False, so each token recomputes "
            "the whole text",
        )
    found, expected = read_twice(trial)
    if differences({"logits": found}, {"logits": expected}):
        largest = np.abs(found - expected).max() / np.abs(expected).max()
        return Result(False, f"logits from caches move by {largest:.0e} of the largest in one pass")
    return Result(True, "logits from caches are those of one pass, behind padding too")


def routes(trial: Trial) -> Result:
    """A token's experts exist and differ, its gates are not negative, its probabilities sum to 1.

    See `Routing`.
    """
    computed, wrong = trial.evaluation, []
    if not computed.choices:
        return Result(None, "no part of the model routes")
    for name, choices in computed.choices.items():
        num_options = trial.model.moe_parts[name].num_options
        index, chosen = choices.expert_index, choices.chosen
        if index.min() < 0 or index.max() >= num_options:
            found = f"{index.min()} to {index.max()}"
            wrong.append(f"experts are not in [0, {num_options}): {found}")
        both = chosen[..., :, None] & chosen[..., None, :] & ~np.eye(chosen.shape[-1], dtype=bool)
        if (both & (index[..., :, None] == index[..., None, :])).any():
            wrong.append("a token chooses an expert twice")
        if choices.gate.min() < 0:
            wrong.append(f"a gate is negative: {choices.gate.min():.3g}")
        sums = computed.probability[name]
        furthest = sums.flat[np.abs(sums - 1).argmax()]
        if abs(furthest - 1) > SUM_OF_PROBABILITIES:
            wrong.append(f"probabilities of a token sum to {furthest:.3g}, not 1")
    if wrong:
        return Result(False, "; ".join(wrong))
    return Result(True, "experts exist and differ, gates are >= 0, probabilities sum to 1")


def learns_from_the_task(trial: Trial) -> Result:
    """With one expert per token and no balance loss, the router gets a gradient, or refuses."""
    if not trial.model.moe_parts:
        return Result(None, "no part of the model routes")
    try:
        model = trial.with_one_choice
    except ValueError:
        return Result(True, "one expert per token is refused")
    gradients = trial.compute(model, trial.first, training=True).gradients
    largest = {
        named(path): np.abs(value).max()
        for path, value in jax.tree_util.tree_leaves_with_path(gradients)
    }
    of_router = [value for name, value in largest.items() if "/router/" in name]
    if not of_router:
        return Result(None, "the router has no parameters")
    if max(of_router) <= ROUNDING * max(largest.values()):  # a / a has a gradient of rounding
        return Result(
            False,
            "with one expert per token the task does not train the router: the gate is a constant; "
            "multiply by a probability, or refuse num_selected_experts=1 in check_block",
        )
    return Result(True, "with one expert per token the task trains the router")


def replays(trial: Trial) -> Result:
    """A router that declares `replays` uses given choices in place of its own."""
    routers = {name: part.router for name, part in trial.model.moe_parts.items()}
    if not any(router.replays for router in routers.values()):
        return Result(None, "no router in the model declares it")

    own = jax.tree.map(lambda a: a[0], trial.evaluation.choices)
    # Choices of other sequences, which stand in for those of another router.
    other = jax.tree.map(lambda a: np.roll(a, 1, axis=1), own)
    wrong = []
    for replay in (own, other):
        given = {name: Choices(*value[:2]) for name, value in replay.items()}
        computed = trial.compute(trial.model, trial.first, training=False, replay=given)
        for name, value in computed.choices.items():
            if not np.array_equal(value.expert_index[0], given[name].expert_index):
                wrong.append("the chosen experts are not those that are replayed")
        if replay is own and differences(computed[:2], jax.tree.map(
            lambda a: a[:1], trial.evaluation[:2]
        )):  # fmt: skip
            wrong.append("replaying its own choices moves the output")
    return Result(not wrong, "; ".join(wrong) or "its own choices and others are taken as given")


CHECKS: dict[str, Callable[[Trial], Result]] = {
    "serialises": serialises,
    "specs": specs_hold,
    "values": values_hold,
    "causality, training": causal_in_training,
    "causality, evaluation": causal_in_evaluation,
    "gradients": gradients_arrive,
    "padding": padding_is_ignored,
    "mesh": equal_on_a_mesh,
    "microbatches": equal_in_microbatches,
    "scan": equal_unrolled,
    "decoding": decodes,
    "routing": routes,
    "task": learns_from_the_task,
    "replay": replays,
}


def check(name: str, trial: Trial) -> Result:
    """Runs a check of `CHECKS`; an exception is a failure, at the last line of the part's file."""
    try:
        return CHECKS[name](trial)
    except Exception as error:  # a user's part may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        file = inspect.getsourcefile(type(trial.part))
        last = ([frame for frame in frames if frame.filename == file] or frames)[-1]
        where = f"{last.filename}:{last.lineno}"
        return Result(False, f"{type(error).__name__} at {where}: {error}")


def named(path: Any) -> str:
    """A path in a tree as a/b/c."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


__all__ = ["CHECKS", "FAMILIES", "Computed", "Result", "Trial", "check", "model_around"]

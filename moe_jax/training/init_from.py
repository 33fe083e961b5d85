"""The initial state of a run that starts from another run's checkpoint.

Arrays are matched by name and shape before any device work. They are read once, straight onto the
devices of the new mesh. Arrays that are not taken are initialised there.
"""

import dataclasses
import hashlib
import logging
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    TrainingConfig,
    build,
    difference,
    to_dict,
    write_config,
)
from moe_jax.config.check import require
from moe_jax.config.upgrade import upgrade
from moe_jax.models.selection import check_names, marked, matches
from moe_jax.models.trained import over_state, state_by_stack
from moe_jax.parallel.rules import named_sharding
from moe_jax.training.arrays import by_name, describe, differences, name_of, some
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.files import (
    MANIFEST,
)
from moe_jax.training.placement import parameter_of, state_shardings
from moe_jax.training.state import TrainState, abstract_state, state_from
from moe_jax.training.workdir import CHECKPOINTS, Record, recorded_run
from moe_jax.weights.low_rank import ADAPTERS

logger = logging.getLogger(__name__)

# Optimizer arrays, by parameter: the average of `ema_decay`, and Schedule-Free's z and b1.
AVERAGE = re.compile(r"opt_state/\d+/average/(.*)")
SCHEDULE_FREE = re.compile(r"opt_state/\d+/z/(.*)")
B1 = re.compile(r"opt_state/\d+/(b1)")


class Source(NamedTuple):
    """A checkpoint, and the arrays that a run takes from it.

    Attributes:
      workdir: directory of the run that saved it.
      step: step of the checkpoint.
      sha256: hash of its manifest, which lists the hashes of its arrays and config.
      takes: maps names of arrays in the new state to names in the checkpoint.
      fresh: names of arrays in the new state that are initialised instead.
    """

    workdir: pathlib.Path
    step: int
    sha256: str
    takes: dict[str, str]
    fresh: list[str]

    def record(self) -> dict[str, Any]:
        """The origin of a run, as recorded in `run.json` and in its checkpoints."""
        return {"path": str(self.workdir), "step": self.step, "sha256": self.sha256}

    def describe(self) -> str:
        """A summary in one line."""
        fresh = f"; drawn anew: {some(self.fresh)}" if self.fresh else ""
        return f"starts from step {self.step} of {self.workdir}: {len(self.takes)} arrays{fresh}"


def open_source(config: ExperimentConfig, content: Mapping[str, str]) -> Source:
    """Finds the checkpoint of `config.init_from`, and matches its arrays; loads none of them.

    Args:
      config: config of the new run.
      content: sha256 of its corpus and its tokenizer.

    Raises:
      ValueError: there is no such checkpoint, an array neither matches nor is fresh, or the
        settings do not allow this tokenizer, data or optimizer.
      DamagedCheckpointError: the checkpoint is damaged.
    """
    workdir = pathlib.Path(config.init_from.path).expanduser()
    directory = workdir / CHECKPOINTS
    with Checkpoints(directory, keep=None) as checkpoints:
        step = checkpoints.whole(config.init_from.step)
        if step is None:
            raise ValueError(
                "init_from.path must be the workdir of a run with a checkpoint: there is none in "
                f"{directory}. Correct the path."
            )
        saved = checkpoints.arrays(step)
    record, _ = recorded_run(workdir, step)
    check_wrapped(config, saved, workdir)
    drawn = fresh_names(config, saved) | new_adapters(config, saved)
    check_tokenizer(config, record, content, drawn)
    warn_of_heldout(config, record, content)
    if config.init_from.data_position:
        check_position(config, record, content, step)
    where = f"step {step} of {workdir}"
    takes = match_parameters(config, saved, drawn, where)
    if config.init_from.optimizer_state:
        check_optimizer(config, record)
        takes |= match_moments(config, saved, drawn, where)
    manifest = (directory / str(step) / MANIFEST).read_bytes()
    return Source(workdir, step, hashlib.sha256(manifest).hexdigest(), takes, sorted(drawn))


def fresh_names(config: ExperimentConfig, saved: Iterable[str]) -> set[str]:
    """The arrays of the new state that `init_from.fresh` names.

    Raises:
      ValueError: a name matches no array of the new model or the checkpoint.
    """
    model, names = config.model, config.init_from.fresh
    known = [name for name in names if any(covers(name, one) for one in saved)]
    specs = {**model.specs(), **state_by_stack(model)}
    check_names(specs, [name for name in names if name not in known])
    chosen = {
        "params": marked(model.specs(), names),
        "model_state": over_state(model, lambda tree: marked(tree, names)),
    }
    return {name for name, mark in by_name(chosen).items() if mark}


def new_adapters(config: ExperimentConfig, saved: Iterable[str]) -> set[str]:
    """The arrays of adapters that the checkpoint lacks: they change nothing before they train."""
    specs = by_name({"params": config.model.specs()})
    adapters = {name for name, spec in specs.items() if spec.component == ADAPTERS}
    return adapters.difference(saved)


def check_wrapped(config: ExperimentConfig, saved: Iterable[str], workdir: pathlib.Path) -> None:
    """Refuses to drop adapters, whether or not `init_from.fresh` names what they adapt.

    Raises:
      ValueError: a plain array of the new model has adapters in the checkpoint.
    """
    plain = set(by_name({"params": config.model.specs()}))
    wrapped = {name.partition("/base")[0] for name in saved if "/base" in name}
    lost = sorted(plain & wrapped)
    require(
        not lost,
        "a run without adapters cannot start from one with adapters",
        f"{workdir} has adapters of {some(lost)}",
        f"Merge them: python -m moe_jax.merge_adapters --workdir={workdir} --output=MERGED, and "
        "start from MERGED; or set config.model.adapters as in that run",
    )


def covers(name: str, saved: str) -> bool:
    """Whether a name of `models.selection` matches the path of a checkpoint's array."""
    tree, *path = saved.split("/")
    return tree in ("params", "model_state") and matches(name, frozenset(path))


def match_parameters(
    config: ExperimentConfig, saved: Mapping[str, str], fresh: set[str], where: str
) -> dict[str, str]:
    """Maps parameters and state of parts to the checkpoint's arrays, by name.

    Without the moments, a parameter that the source's optimizer averages takes its average, which
    the source is evaluated with. The `base` of a `Weight` takes the array that it wraps, or its
    average.

    Raises:
      ValueError: listing what differs.
    """
    averages = {} if config.init_from.optimizer_state else found_by(AVERAGE, saved)
    abstract = abstract_state(config)
    new = {"params": abstract.params, "model_state": abstract.model_state}
    unwrapped, texts = without_base(new), describe(new)
    takes, used, lines = {}, set(fresh), []
    for name, text in texts.items():
        if name in fresh:
            continue
        average = averages.get(unwrapped[name].removeprefix("params/"))
        source = average or (name if name in saved else unwrapped[name])
        used |= {name, unwrapped[name]}
        if fits(saved.get(source), text):
            takes[name] = source
        else:
            lines += differences({name: saved[source]} if source in saved else {}, {name: text})
    names = config.init_from.fresh
    left = {
        name: one
        for name, one in saved.items()
        if name.startswith(("params/", "model_state/")) and name not in used
        if not any(covers(fresh_name, name) for fresh_name in names)
    }
    lines += differences(left, {})
    require(
        not lines,
        "init_from needs arrays of the same name and shape",
        f"{where} differs in {some(lines)}",
        "Name what is to be drawn anew, or left out, in init_from.fresh",
    )
    return takes


def without_base(tree: Any) -> dict[str, str]:
    """Maps the name of each array to its name without a wrapping `Weight`."""
    base = jax.tree_util.GetAttrKey("base")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {name_of(path): name_of(tuple(e for e in path if e != base)) for path in paths}


def match_moments(
    config: ExperimentConfig, saved: Mapping[str, str], fresh: set[str], where: str
) -> dict[str, str]:
    """The optimizer's arrays, except those of fresh parameters; see `match_parameters`.

    Fresh parameters have moments of 0 beside the carried step count; see `docs/finetuning.md`.
    """
    state = abstract_state(config)
    params, kept = map(jax.tree_util.tree_leaves_with_path, (state.params, state.opt_state))
    is_fresh = {path: f"params/{name_of(path)}" in fresh for path, _ in params}
    wanted = describe(
        {
            f"opt_state/{name_of(path)}": leaf
            for path, leaf in kept
            if not parameter_of(path, is_fresh)
        }
    )
    found = {name: saved[name] for name in wanted if name in saved}
    lines = differences(found, wanted)
    require(
        not lines,
        "init_from.optimizer_state needs what the optimizer keeps for all that trains",
        f"{where} differs in {some(lines)}",
        "Set init_from.optimizer_state=False, or use the optimizer of that run",
    )
    return {name: name for name in wanted}


def found_by(pattern: re.Pattern[str], saved: Iterable[str]) -> dict[str, str]:
    """The names that a pattern matches, by its first group."""
    return {found[1]: name for name in saved if (found := pattern.fullmatch(name))}


def fits(saved: str | None, wanted: str) -> bool:
    """Whether an array can be taken: same shape, and same dtype or both floats."""
    if saved is None or saved == wanted:
        return saved is not None
    (old, old_shape), (new, new_shape) = saved.split("["), wanted.split("[")
    return old_shape == new_shape and "float" in old and "float" in new


def check_tokenizer(
    config: ExperimentConfig, record: Record, content: Mapping[str, str], fresh: set[str]
) -> None:
    """Refuses another tokenizer, unless the embedding and the head start fresh."""
    known, given = record.get("content", {}).get("tokenizer"), content.get("tokenizer")
    components = {
        name: spec.component
        for name, spec in by_name({"params": config.model.specs()}).items()
        if spec.component in ("embedding", "head")
    }
    require(
        known in (None, given) or fresh.issuperset(components),
        "embedding and head must be of one tokenizer",
        f"sha256 {str(known)[:12]} in {config.init_from.path}, {str(given)[:12]} here",
        f"Use its data.tokenizer, or set init_from.fresh={tuple(sorted(set(components.values())))}",
    )


def warn_of_heldout(config: ExperimentConfig, record: Record, content: Mapping[str, str]) -> None:
    """Warns if the source was trained on text that this run holds out.

    Held-out text of a smaller fraction is part of that of a larger one (`moe_jax.data.documents`).
    """
    known = record.get("content", {}).get("corpus")
    if known is None or known != content.get("corpus"):  # an imported model has none
        return
    old, new = record["data"], to_dict(config.data)
    fraction = old.get("heldout_fraction", DataConfig.heldout_fraction)
    names = ("text_field", "id_field", "group_field")
    changed = [name for name in names if old.get(name, new[name]) != new[name]]
    if fraction < new["heldout_fraction"]:
        changed.append("heldout_fraction")
    if changed and jax.process_index() == 0:
        logger.warning(
            "%s was trained on text that this run holds out, so its held-out loss is too low: %s "
            "differ from %s. Set them as there.",
            config.init_from.path,
            ", ".join(f"data.{name}={new[name]!r}" for name in changed),
            ", ".join(f"{old.get(name, getattr(DataConfig, name))!r}" for name in changed),
        )


def check_optimizer(config: ExperimentConfig, record: Record) -> None:
    """Refuses moments of another optimizer, whose arrays may have the same names."""
    old = record.get("optimizer", {}).get("name", config.optimizer.name)
    require(
        old == config.optimizer.name,
        "init_from.optimizer_state needs moments of the same optimizer",
        f"optimizer.name={config.optimizer.name!r}, {old!r} in {config.init_from.path}",
        "Set init_from.optimizer_state=False, or optimizer.name",
    )


def check_position(
    config: ExperimentConfig, record: Record, content: Mapping[str, str], step: int
) -> None:
    """Refuses to continue at a position in other data, or at or past the last step."""
    require(
        step < config.training.num_steps,
        "with init_from.data_position training.num_steps counts the steps before",
        f"num_steps={config.training.num_steps}, init_from is at step {step}",
        f"Raise training.num_steps above {step}",
    )
    # Only this section is built: parts of others may need modules that this config does not name.
    written = upgrade(record)
    trust = frozenset(write_config(config)["sources"])
    data: Any = build(DataConfig, written["data"], "config.data", trust=trust)
    places = {name: getattr(config.data, name) for name in ("corpus", "tokenizer", "cache_dir")}
    lines = difference(
        to_dict(dataclasses.replace(data, **places)), to_dict(config.data), "config.data"
    )
    old = written["training"].get("batch_size", TrainingConfig.batch_size)
    sizes = {"batch_size": old}, {"batch_size": config.training.batch_size}
    lines += difference(*sizes, "config.training")
    known = record.get("content", {}).get("corpus")
    if known != content.get("corpus"):
        lines.append("the content of the corpus")
    require(
        not lines,
        "init_from.data_position needs the same data",
        "; ".join(lines),
        "Set init_from.data_position=False, or what the run was started with",
    )


def first_state(config: ExperimentConfig, mesh: Mesh, source: Source) -> TrainState:
    """The initial state, with the arrays taken from a source; created on its devices."""
    shardings = state_shardings(config, mesh)
    abstract, placed = by_name(abstract_state(config)), by_name(shardings)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
        for name, leaf in abstract.items()
        if name in source.takes
    }
    taken = read_taken(source, wanted, mesh, averages=not config.init_from.optimizer_state)
    begin = jax.jit(
        state_from,
        static_argnames=("config", "step"),
        donate_argnames="taken",
        out_shardings=shardings,
    )
    step = source.step if config.init_from.data_position else 0
    return begin(config=config, taken=taken, step=step)


def read_taken(
    source: Source, wanted: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, *, averages: bool
) -> dict[str, jax.Array]:
    """The arrays that a run takes, by name in its state, read straight onto their devices.

    Args:
      source: the checkpoint, and the arrays.
      wanted: every array in `source.takes`, with its sharding.
      mesh: of the shardings.
      averages: whether a parameter that Schedule-Free trained is its average x. The checkpoint has
        y = b1 x + (1 - b1) z (arXiv:2405.15682), and z and b1.
    """
    takes = source.takes
    with Checkpoints(source.workdir / CHECKPOINTS, keep=None) as checkpoints:
        saved = checkpoints.arrays(source.step) if averages else {}
        z_of = {f"params/{name}": of for name, of in found_by(SCHEDULE_FREE, saved).items()}
        z = {name: z_of[of] for name, of in takes.items() if of in z_of}
        structs = {of: wanted[name] for name, of in takes.items()}
        for name, of in z.items():  # x is computed in float32, whatever its own dtype
            structs[of] = structs[takes[name]] = wanted[name].update(dtype=jnp.float32)
        b1 = found_by(B1, saved).get("b1", "")
        if z:
            scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=named_sharding((), mesh))
            structs[b1] = scalar
        found = checkpoints.restore_some(source.step, structs)
    taken = {name: found[of] for name, of in takes.items()}
    if not z:
        return taken

    def average(y: dict[str, jax.Array], z: dict[str, jax.Array], b1: jax.Array) -> Any:
        return {name: (y[name] - (1 - b1) * z[name]) / b1 for name in z}

    placed = {name: wanted[name].sharding for name in z}
    compute = jax.jit(average, donate_argnames="y", out_shardings=placed)
    x = compute(
        y={name: taken[name] for name in z},
        z={name: found[of] for name, of in z.items()},
        b1=found[b1],
    )
    return taken | {name: array.astype(wanted[name].dtype) for name, array in x.items()}

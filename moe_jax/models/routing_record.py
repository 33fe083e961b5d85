"""Records of the experts that tokens chose (legend: `moe_jax.moe`)."""

import functools
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.check import require
from moe_jax.models.model import LanguageModel
from moe_jax.moe.routing import Choices
from moe_jax.part import Aux, Call, EncoderInputs

OF_TOKENS = ("tokens", "positions", "segments")  # arrays of a file that belong to no part
OF_ENCODER = "encoder:"  # prefix of the names of an encoder's arrays


class PartRecord(NamedTuple):
    """The choices in the layers of one MoE part.

    Attributes:
      layers: indices of its X layers in the model.
      num_experts: E, including zero-computation experts, which come last.
      choices: NumPy arrays [X, B, L, K], before drops; ignore those of padding.
    """

    layers: tuple[int, ...]
    num_experts: int
    choices: Choices


class RoutingRecord(NamedTuple):
    """The choices of all routers of a model, as NumPy arrays.

    Attributes:
      tokens_BL: int32 token ids.
      positions_BL: int32, restarting in every document.
      segments_BL: int32, document within the sequence; 0 is padding.
      parts: records of the MoE parts of the stack that reads these tokens, by name.
      encoder: the record of the encoder, with its tokens and parts; None without one.
    """

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    segments_BL: np.ndarray
    parts: dict[str, PartRecord]
    encoder: "RoutingRecord | None" = None

    @property
    def all_parts(self) -> dict[str, PartRecord]:
        """The parts of all stacks."""
        return {**(self.encoder.parts if self.encoder else {}), **self.parts}

    def replay(self, model: LanguageModel) -> dict[str, Choices]:
        """The choices as the argument `replay` of `LanguageModel.run`.

        Args:
          model: the model that replays them.

        Raises:
          ValueError: the model has other experts or other MoE layers.
        """
        check_model(self, model)
        return {
            name: Choices(jnp.asarray(part.choices.expert_index), jnp.asarray(part.choices.chosen))
            for name, part in self.all_parts.items()
        }

    def batch_fields(self, model: LanguageModel) -> dict[str, np.ndarray]:
        """Batch fields with which training or evaluation of these sequences replays the choices.

        `replay/PART/expert_index` and `replay/PART/chosen` are [B, L, X, K], so that a batch can be
        split by sequences. Argument and errors are those of `replay`.
        """
        check_model(self, model)
        return {
            f"replay/{name}/{field}": np.moveaxis(getattr(part.choices, field), 0, 2)
            for name, part in self.all_parts.items()
            for field in ("expert_index", "chosen")
        }


def record_routing(
    model: LanguageModel,
    params: Any,
    tokens_BL: np.ndarray | jax.Array,
    state: Mapping[str, Any] | None = None,
    *,
    positions_BL: np.ndarray | jax.Array | None = None,
    segments_BL: np.ndarray | jax.Array | None = None,
    encoder: EncoderInputs | None = None,
    capacity: float | None = 0.0,
    step: jax.Array | None = None,
) -> RoutingRecord:
    """Runs a model as in evaluation and records its routing.

    Args:
      model: the model.
      params: its parameters.
      tokens_BL: int32 token ids.
      state: of its parts, such as selection biases, or None.
      positions_BL: int32 positions; None: each sequence is one document.
      segments_BL: int32 documents, 0 for padding; None: one document without padding.
      encoder: what the encoder reads; None without one.
      capacity: capacity factor, 0 for dropless; None: each part's own evaluation factor.
      step: training step, for annealed settings of routers; None: their end values.

    Returns:
      The `RoutingRecord`.

    Raises:
      ValueError: the model has no MoE layers.
    """
    call = recording_call(
        tokens_BL, positions_BL, segments_BL, step, encoder=encoder, capacity=capacity
    )
    return record_of(model, call, recorded_pass(params, state, call, model=model))


def recording_call(
    tokens_BL: np.ndarray | jax.Array,
    positions_BL: np.ndarray | jax.Array | None,
    segments_BL: np.ndarray | jax.Array | None,
    step: jax.Array | None,
    *,
    encoder: EncoderInputs | None = None,
    capacity: float | None = 0.0,
) -> Call:
    """The call of an evaluation that records; arguments are those of `record_routing`."""

    def filled(tokens: Any, positions: Any, segments: Any) -> EncoderInputs:
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = np.ones(tokens.shape)
        return EncoderInputs(*(jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments)))

    given = [positions_BL, None if encoder is None else encoder.positions_BT]
    tokens, positions, segments = filled(tokens_BL, positions_BL, segments_BL)
    return Call(
        positions,
        segments,
        tokens,
        encoder=None if encoder is None else filled(*encoder),
        step=step,
        contiguous=all(one is None for one in given),
        capacity=capacity,
        record=True,
    )


@functools.partial(jax.jit, static_argnames="model")
def recorded_pass(
    params: Any, state: Mapping[str, Any] | None, call: Call, *, model: LanguageModel
) -> dict[str, Choices]:
    """The choices by part, of parts that make choices."""
    return choices_of(model.run(params, call, state=state).aux)


def choices_of(aux: Mapping[str, Aux]) -> dict[str, Choices]:
    """The choices by part, of parts that report choices."""
    return {name: own.choices for name, own in aux.items() if own.choices is not None}


def record_of(model: LanguageModel, call: Call, choices: Mapping[str, Choices]) -> RoutingRecord:
    """Makes the record of a call.

    Args:
      model: the model that was called.
      call: from `recording_call`.
      choices: by part, from `choices_of`.

    Raises:
      ValueError: the model has no MoE layers.
    """
    moes, layers = model.moe_parts, model.moe_layers
    require(
        bool(moes),
        "a record of routing needs a model with MoE layers",
        f"the parts of this one are {sorted(model.part)}",
        "Use a model with a part of kind 'moe'",
    )

    def of_stack(stack: str, *arrays: Any) -> RoutingRecord:
        routed = [name for name in model.stacks[stack].parts() if name in moes]
        parts = {
            name: PartRecord(
                layers=layers[name],
                num_experts=moes[name].num_options,
                choices=jax.tree.map(np.asarray, choices[name]),
            )
            for name in sorted(routed)
        }
        tokens, positions, segments = map(np.asarray, arrays)
        return RoutingRecord(tokens, positions, segments, parts)

    record = of_stack("stack", call.tokens_BL, call.positions_BL, call.segments_BL)
    if not model.has_encoder:
        return record
    assert call.encoder is not None
    return record._replace(encoder=of_stack("encoder", *call.encoder))


def save_record(record: RoutingRecord, path: str | pathlib.Path) -> None:
    """Writes a record as one compressed `.npz`, with an array per field (`tokens`, `PART/gate`).

    Names of an encoder's arrays begin with `encoder:`.
    """
    with pathlib.Path(path).open("wb") as stream:
        np.savez_compressed(stream, **arrays_of(record))


def arrays_of(record: RoutingRecord) -> dict[str, Any]:
    """The arrays of a record's file."""
    arrays: dict[str, Any] = dict(zip(OF_TOKENS, record[:3], strict=True))
    if record.encoder is not None:
        arrays |= {OF_ENCODER + name: a for name, a in arrays_of(record.encoder).items()}
    for name, part in record.parts.items():
        arrays |= {
            f"{name}/layers": np.asarray(part.layers, np.int32),
            f"{name}/num_experts": np.asarray(part.num_experts, np.int32),
        }
        arrays |= {f"{name}/{field}": value for field, value in part.choices._asdict().items()}
    return arrays


def load_record(path: str | pathlib.Path) -> RoutingRecord:
    """Reads what `save_record` wrote.

    Raises:
      ValueError: the file is not a record, or its arrays cannot be replayed.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            record = record_from({name: file[name] for name in file.files})
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"a record of routing must be an .npz with the arrays {OF_TOKENS} and, by part, "
            f"layers, num_experts and {Choices._fields}: {path} is not ({error}). Write it by "
            "save_record."
        ) from error
    check_record(record)
    return record


def record_from(arrays: Mapping[str, Any]) -> RoutingRecord:
    """The record of the arrays of a file; raises KeyError if one is missing."""
    of_encoder = {
        name.removeprefix(OF_ENCODER): a for name, a in arrays.items() if OF_ENCODER in name
    }
    own = {name: a for name, a in arrays.items() if OF_ENCODER not in name}
    tokens, positions, segments = (own.pop(name) for name in OF_TOKENS)
    parts = {
        name: PartRecord(
            layers=tuple(own[f"{name}/layers"].tolist()),
            num_experts=int(own[f"{name}/num_experts"]),
            choices=Choices(*(own[f"{name}/{field}"] for field in Choices._fields)),
        )
        for name in sorted({name.rpartition("/")[0] for name in own})
    }
    encoder = record_from(of_encoder) if of_encoder else None
    return RoutingRecord(tokens, positions, segments, parts, encoder)


def check_model(record: RoutingRecord, model: LanguageModel) -> None:
    """Checks that a record fits a model: the same experts in the same MoE layers.

    Raises:
      ValueError: MoE parts, numbers of experts or layer indices differ.
    """
    moes, layers = model.moe_parts, model.moe_layers
    require(
        set(record.all_parts) == set(layers),
        "a record needs a model with the same MoE parts",
        f"the record is of {sorted(record.all_parts)}, the model has {sorted(layers)}",
        "Record anew with this model",
    )
    for name, part in record.all_parts.items():
        num_experts = moes[name].num_options
        require(
            (part.num_experts, part.layers) == (num_experts, layers[name]),
            "a record needs a model with the same experts in the same layers",
            f"the record of {name!r} is of {part.num_experts} experts in the layers {part.layers}, "
            f"the model has {num_experts} (zero-computation experts included) in {layers[name]}",
            "Record anew with this model",
        )


def check_record(record: RoutingRecord) -> None:
    """Checks that the arrays of a record, such as one from another engine, are consistent.

    Raises:
      ValueError: shapes differ, an expert is out of range, or a token chooses an expert twice.
    """
    for name, part in record.parts.items():
        check_part(name, part, record.tokens_BL.shape)
    if record.encoder is not None:
        check_record(record.encoder)


def check_part(name: str, part: PartRecord, batch_shape: tuple[int, ...]) -> None:
    """`check_record` of one part; `batch_shape` is (B, L)."""
    index, expected = np.asarray(part.choices.expert_index), (len(part.layers), *batch_shape)
    shapes = {np.asarray(value).shape for value in part.choices}
    require(
        len(shapes) == 1 and index.ndim == 4 and index.shape[:3] == expected,
        "the arrays of a record must be [layers, batch, length, choices], for the layers and "
        "tokens that it names",
        f"got {sorted(shapes)} for {expected} of {name!r}",
        "Record anew",
    )
    require(
        0 <= index.min(initial=0) and index.max(initial=0) < part.num_experts,
        "the experts of a record must lie in 0..num_experts - 1",
        f"got {index.min()}..{index.max()} with num_experts={part.num_experts} of {name!r}",
        "Correct them; a choice that chosen=False leaves out needs one in range too, such as 0",
    )
    ordered = np.sort(
        np.where(np.asarray(part.choices.chosen), index, -1 - np.arange(index.shape[-1]))
    )
    twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=-1))
    place = tuple(twice[0].tolist()) if len(twice) else ()
    require(
        not place,
        "a token must not choose an expert twice",
        f"the token at [layer, sequence, position] = {list(place)} has the experts "
        f"{index[place].tolist() if place else []} of {name!r}",
        "Leave one out by chosen=False",
    )

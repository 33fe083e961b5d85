"""Batches for training and for held-out evaluation.

The training stream is a function of only the configuration and the step: `train_batches` can
begin at any step, and the global batch does not depend on which host reads which of its rows. The
step, the one integer that resumes it, is kept in the training state.
"""

import dataclasses
import fractions
import math
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
import numpy.typing as npt

from moe_jax.config import DataConfig
from moe_jax.data.documents import HELDOUT, TRAIN
from moe_jax.data.objectives import Example
from moe_jax.data.objectives.objective import check_positions
from moe_jax.data.opened import Data
from moe_jax.data.windows import DomainTokens, RawWindow, Windows

# Batches read ahead by one background thread while the device computes.
_PREFETCH_BATCHES = 4
_HELDOUT_SEED = 2**32  # of the first domain; all seeds of training are below


def train_batches(
    data: Data,
    *,
    global_batch_size: int,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
) -> Iterator[Example]:
    """Endless training batches.

    Each domain is cut into windows, reshuffled every epoch; domains are then interleaved window by
    window in exact proportion to their weights. Random draws of an objective depend only on the
    seed, the domain and the number of the window in the domain's stream, so they differ in every
    epoch. A host may read any rows of the global batch, which is the same for all assignments.

    Args:
        data: what to read.
        global_batch_size: B, rows of a batch over all hosts.
        rows: the R rows that this host reads, ascending, in [0, B); None: all.
        start_step: the step whose batch comes first; 0 begins the stream.

    Returns:
        Iterator of dicts: the arrays [R, L] that the objective's `arrays` lists, and `domain` [R].
        `causal_lm` and `pack_pairs` describe them.

    Raises:
        ValueError: if a batch has no such rows, `domain_weights` names an unknown domain, or a
            domain has too few tokens.
    """
    rows = _rows_to_read(global_batch_size, rows)
    sources = _windows(data, TRAIN, keep_partial=False)
    weights = _domain_weights(data.config, sources)
    datasets = []
    for domain_id, domain in enumerate(sources):
        seed = _domain_seed(data.config.seed, domain_id)
        if domain in weights:
            windows = grain.MapDataset.source(sources[domain]).seed(seed).shuffle().repeat()
            datasets.append(windows.map_with_index(_to_examples(data, seed)))
    mixed = grain.MapDataset.select_from_datasets(datasets, DomainMixture(tuple(weights.values())))
    read = grain.MapDataset.select_from_datasets([mixed], RowsOfBatches(global_batch_size, rows))
    iterator = iter(
        read.batch(len(rows), drop_remainder=True).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH_BATCHES)
        )
    )
    iterator.set_state({"next_index": start_step})
    return iterator


def heldout_batches(
    data: Data,
    *,
    batch_size: int,
    max_batches: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Example]:
    """One pass over the held-out windows, the same in every run, on all hosts, for every seed.

    With `causal_lm` every held-out token, except each document's `bos_id`, is a target with weight
    1 once. Random draws of other objectives depend only on the domain and the window. Domains are
    interleaved in proportion to their windows, so that `max_batches` samples all of them. The last
    batch is padded with rows whose `segment_ids` and `loss_weights` are 0.

    Args:
        data: what to read; `domain_weights` and `seed` of its config have no effect.
        batch_size: B, rows of a batch over all hosts.
        max_batches: maximum number of batches; None for all.
        rows: the R rows of each batch that this host reads, ascending, in [0, B); None: all.

    Returns:
        Iterator of dicts of arrays [R, L] and `domain` [R], as for `train_batches`.

    Raises:
        ValueError: if a batch has no such rows, or nothing is held out.
    """
    rows = _rows_to_read(batch_size, rows)
    sources = list(_windows(data, HELDOUT, keep_partial=True).values())
    lengths = [len(source) for source in sources]
    order, ends = _interleave(lengths), np.cumsum(lengths)
    if not len(order):
        raise ValueError(
            f"No text of {data.config.corpus!r} is held out at heldout_fraction="
            f"{data.config.heldout_fraction}. "
            f"{data.corpus.way_to_hold_out(data.config.heldout_fraction)}."
        )
    num_batches = -(-len(order) // batch_size)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    to_examples = [_to_examples(data, _HELDOUT_SEED + n) for n in range(len(sources))]

    def example(window: int) -> Example:
        source = int(np.searchsorted(ends, window, side="right"))
        index = window - int(ends[source]) + lengths[source]
        return to_examples[source](index, sources[source][index])

    return _read_heldout(example, order, range(0, num_batches * batch_size, batch_size), rows)


def check_data(data: Data, *, evaluates: bool = True) -> None:
    """Refuses data that a run cannot train on, or cannot evaluate on, before its first step.

    Makes the token files if the cache has none.

    Args:
        data: data of the run.
        evaluates: whether the run reads the held-out split at all.

    Raises:
        ValueError: `domain_weights` names an unknown domain, a domain has too few tokens, nothing
            is held out although it `evaluates`, or a document of the corpus is refused.
    """
    _domain_weights(data.config, _windows(data, TRAIN, keep_partial=False))
    if evaluates:
        try:
            heldout_batches(data, batch_size=1, max_batches=0)
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}, or set config.training.evaluate_every=0."
            ) from None


def _read_heldout(
    example: Callable[[int], Example],
    order: npt.NDArray[np.int64],
    starts: Sequence[int],
    rows: Sequence[int],
) -> Iterator[Example]:
    """Yields a batch per start: these rows of `order`, counted from the start."""
    padding = {name: np.zeros_like(value) for name, value in example(int(order[0])).items()}
    for start in starts:
        numbers = [start + row for row in rows]
        examples = [example(int(order[n])) if n < len(order) else padding for n in numbers]
        yield {name: np.stack([example[name] for example in examples]) for name in padding}


@dataclasses.dataclass(frozen=True)
class DomainMixture(grain.transforms.DatasetSelectionMap):
    """Interleaves endless datasets so that every prefix has the proportions of the weights.

    After k rows, a dataset of weight w has contributed k * w / sum(weights) rows, to within the
    number of datasets. `grain.MapDataset.mix`, in contrast, rounds weights to a hundredth of the
    smallest.

    Attributes:
        weights: positive, one per dataset; any scale.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        # As written in decimal, so that 0.3 to 0.2 is exactly 3 to 2.
        ratios = [fractions.Fraction(str(weight)) for weight in self.weights]
        denominator = math.lcm(*(ratio.denominator for ratio in ratios))
        shares = tuple(int(ratio * denominator) for ratio in ratios)
        object.__setattr__(self, "_shares", shares)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Returns the dataset and its row for row `index` of the mixture.

        A row goes to the first dataset if the dataset's share of the rows, rounded down, grows by
        one with it. Remaining rows go to the second dataset by the same rule, and so on.
        """
        shares: tuple[int, ...] = self._shares
        remaining = sum(shares)
        for dataset, share in enumerate(shares[:-1]):
            taken = index * share // remaining
            if (index + 1) * share // remaining > taken:
                return dataset, taken
            index -= taken
            remaining -= share
        return len(shares) - 1, index


@dataclasses.dataclass(frozen=True)
class RowsOfBatches(grain.transforms.DatasetSelectionMap):
    """Picks the same rows of every batch of one endless dataset.

    Attributes:
        batch_size: rows of a whole batch.
        rows: the rows to pick, in their order.
    """

    batch_size: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Returns 0 (the dataset) and its row for picked row `index`."""
        batch, place = divmod(index, len(self.rows))
        return 0, batch * self.batch_size + self.rows[place]


def _windows(data: Data, split: str, *, keep_partial: bool) -> dict[str, Windows]:
    """Windows of every domain, by name, in the order of the domains' ids."""
    objective, length = data.config.objective, data.config.sequence_length
    return {
        domain: objective.windows(
            DomainTokens(data.files, split, domain), length, keep_partial=keep_partial
        )
        for domain in data.domains
    }


def _to_examples(data: Data, seed: int) -> Callable[[int, RawWindow], Example]:
    """A function from the number of a window in its stream, and the window, to an example."""
    objective, length = data.config.objective, data.config.sequence_length

    def to_example(index: int, window: RawWindow) -> Example:
        example = objective.example(
            window, sequence_length=length, tokenizer=data.tokenizer, key=(seed, index)
        )
        check_positions(example)
        return example

    return to_example


def _domain_weights(config: DataConfig, sources: dict[str, Windows]) -> dict[str, float]:
    """Weights of the domains to train on, in the order of the domains' ids."""
    weights: dict[str, float] = dict(config.domain_weights)
    if unknown := sorted(set(weights) - set(sources)):
        raise ValueError(
            f"domain_weights may name the domains of {config.corpus!r}, {sorted(sources)}: "
            f"got {unknown}. Correct config.data.domain_weights."
        )
    if not weights:
        # All windows have one length: their number is proportional to the tokens.
        weights = {domain: len(windows) for domain, windows in sources.items()}
    empty = [domain for domain in sources if domain in weights and not len(sources[domain])]
    if empty:
        window = config.objective.lengths(config.sequence_length).window
        needs, fixes = f"at least {window} tokens", []
        if config.objective.reads_conversations:
            needs = "one pair or more"
            # They have pairs, but none fits.
            if any(sources[name].tokens.num_documents for name in empty):
                needs = "one pair or more that fits into a row"
                sides = dict.fromkeys(config.objective.settings_of_sides)
                names = " or ".join(f"config.{side}" for side in sides)
                fixes = [f"raise {names}"]
        elif all(sources[name].tokens.num_tokens > 2 for name in empty):
            fixes = ["lower config.data.sequence_length"]
        if len(empty) < len(sources):
            fixes.append("give config.data.domain_weights without them")
        fix = ", or ".join(fixes) or "add documents, of ids or groups that differ"
        raise ValueError(
            f"A domain needs {needs} to train on: {empty} have fewer "
            f"(sequence_length={config.sequence_length}), not counting held-out and repeated text. "
            f"{fix[0].upper()}{fix[1:]}."
        )
    return {domain: weights[domain] for domain in sources if domain in weights}


def _rows_to_read(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    if batch_size < 1:
        raise ValueError(f"A batch must have 1 row or more: batch_size={batch_size}. Raise it.")
    if rows is None:
        return range(batch_size)
    if not rows or sorted(set(rows)) != list(rows) or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(
            "The rows that a host reads must be ascending, different, and below the batch size: "
            f"rows={list(rows)}, batch_size={batch_size}. Pass some of 0 to {batch_size - 1}."
        )
    return rows


def _domain_seed(seed: int, domain_id: int) -> int:
    """A 32-bit seed, unrelated for neighbouring seeds and domains."""
    return int(np.random.SeedSequence((seed, domain_id)).generate_state(1)[0])


def _interleave(lengths: list[int]) -> npt.NDArray[np.int64]:
    """Orders the windows of all sources so that every prefix has each source in proportion.

    Windows are numbered across sources. The sort is stable: at equal places the first source wins.
    """
    places = [(np.arange(length) + 0.5) / length for length in lengths]
    return np.argsort(np.concatenate(places or [np.zeros(0)]), kind="stable")

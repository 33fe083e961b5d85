"""All measures of an analysis of routing, layer by layer, as JSON values.

docs/analysis.md explains each number and gives its value under random routing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.analysis.coactivation import coactivation
from moe_jax.analysis.information import (
    choice_counts,
    expected_bias,
    mutual_information,
    shuffled_information,
)
from moe_jax.analysis.instability import flips
from moe_jax.analysis.load import expert_load
from moe_jax.analysis.reading import token_name
from moe_jax.analysis.repetition import expected_repetition, repetition
from moe_jax.analysis.routed import Routed
from moe_jax.analysis.saturation import router_saturation
from moe_jax.analysis.similarity import BlockWeights, expert_similarity, router_similarity
from moe_jax.analysis.vocabulary import most_frequent_ids, most_routed_tokens
from moe_jax.data import Tokenizer

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scope:
    """What is measured, and against what.

    Attributes:
      domains: names of the domains.
      tokenizer: the model's tokenizer.
      num_shuffles: how often routing is shuffled over the tokens for a baseline; at least 1.
      min_count: token ids with fewer occurrences are not listed with an expert.
      num_listed: number of token ids that are listed with an expert.
      num_rows: number of most frequent token ids whose share of every expert is given.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    num_shuffles: int = 5
    min_count: int = 10
    num_listed: int = 12
    num_rows: int = 50


def measure_layers(
    routed: Routed,
    earlier: Mapping[int, Routed],
    varied: Mapping[str, Routed],
    weights: Mapping[str, BlockWeights],
    scope: Scope,
) -> dict[str, Json]:
    """Measures every MoE layer.

    Args:
      routed: the choices at the last checkpoint.
      earlier: the choices of the same tokens at other checkpoints, by step.
      varied: the choices of the same tokens with something else changed, by the name of the change.
      weights: weights of the block by layer, in the order of the layers of `routed`.
      scope: see `Scope`.

    Returns:
      By layer: `choices_per_token`, `load`, `domains`, `tokens`, `repetition`, `coactivation`,
      `saturation`, `flips`, `similarity`. Where it is meaningful, `random` is the expected value
      under random routing, and `shuffled` the value of the same routing shuffled over the tokens.
      Shares are in [0, 1], information is in bits, and undefined values are null.
    """
    found = {}
    for index, (layer, own) in enumerate(weights.items()):
        expert_JK, num_experts = routed.expert_XJK[index], own.num_experts
        settling = {step: part.expert_XJK[index] for step, part in earlier.items()}
        found[layer] = {
            "choices_per_token": _choices_per_token(expert_JK),
            "load": _load(expert_JK, num_experts),
            "domains": _domains(expert_JK, num_experts, routed, scope),
            "tokens": _tokens(expert_JK, num_experts, routed, scope),
            "repetition": _repetition(expert_JK, num_experts, routed, scope),
            "coactivation": _coactivation(expert_JK, num_experts),
            "saturation": _saturation(settling, expert_JK, num_experts),
            "flips": {
                name: plain(flips(expert_JK, part.expert_XJK[index])._asdict())
                for name, part in varied.items()
            },
            "similarity": {
                "experts": plain(expert_similarity(own.experts)),
                "router": plain(router_similarity(own.router_IE)),
            },
        }
    return found


def plain(value: Any) -> Any:
    """An array as nested lists, rounded to six digits, with None for values that are not finite."""
    if isinstance(value, np.ndarray):
        return [plain(part) for part in value.tolist()]
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _choices_per_token(expert_JK: np.ndarray) -> float:
    return float(np.count_nonzero(expert_JK >= 0) / len(expert_JK))


def _load(expert_JK: np.ndarray, num_experts: int) -> Json:
    load = expert_load(expert_JK, num_experts)
    return {
        "share": plain(load.share_E),
        "fullest": plain(load.fullest),
        "effective_experts": plain(load.effective_experts),
    }


def _information(
    category_J: np.ndarray,
    num_categories: int,
    expert_JK: np.ndarray,
    num_experts: int,
    scope: Scope,
) -> Json:
    sizes = (num_categories, num_experts)
    counts_IE = choice_counts(category_J, expert_JK, *sizes)
    shuffled = shuffled_information(category_J, expert_JK, *sizes, num_shuffles=scope.num_shuffles)
    mean_choices = _choices_per_token(expert_JK)
    there, used = (int(np.count_nonzero(counts_IE.sum(axis=axis))) for axis in (1, 0))
    chance = expected_bias(there, used, mean_choices, len(expert_JK))
    return {
        "bits": plain(mutual_information(counts_IE)),
        "shuffled": plain(float(shuffled.mean())),
        "shuffled_largest": plain(float(shuffled.max())),
        "random": plain(chance),
        "at_most": plain(math.log2(min(num_experts / mean_choices, there))),
    }


def _domains(expert_JK: np.ndarray, num_experts: int, routed: Routed, scope: Scope) -> Json:
    counts_DE = choice_counts(routed.domain_J, expert_JK, len(scope.domains), num_experts)
    occurrences_D = np.bincount(routed.domain_J, minlength=len(scope.domains))
    sizes = (len(scope.domains), num_experts)
    by_ids = shuffled_information(
        routed.domain_J, expert_JK, *sizes, num_shuffles=scope.num_shuffles, within_J=routed.token_J
    )
    information = _information(routed.domain_J, sizes[0], expert_JK, num_experts, scope)
    rows = zip(scope.domains, counts_DE, occurrences_D, strict=True)
    there = [(name, counts_E, int(n)) for name, counts_E, n in rows if counts_E.sum()]
    return {
        "num_tokens": {name: n for name, _, n in there},
        "share": {name: plain(counts_E / counts_E.sum()) for name, counts_E, _ in there},
        "information": information | {"explained_by_ids": plain(float(by_ids.mean()))},
    }


def _tokens(expert_JK: np.ndarray, num_experts: int, routed: Routed, scope: Scope) -> Json:
    num_ids = int(routed.token_J.max()) + 1
    counts_VE = choice_counts(routed.token_J, expert_JK, num_ids, num_experts)
    occurrences_V = np.bincount(routed.token_J, minlength=num_ids)
    best = most_routed_tokens(
        counts_VE, occurrences_V, min_count=scope.min_count, num_tokens=scope.num_listed
    )
    frequent = most_frequent_ids(occurrences_V, scope.num_rows)
    return {
        "num_ids": int(np.count_nonzero(occurrences_V)),
        "information": _information(routed.token_J, num_ids, expert_JK, num_experts, scope),
        "most_routed": [
            [
                {
                    "id": found.token,
                    "name": token_name(scope.tokenizer, found.token),
                    "share": plain(found.share),
                    "occurrences": found.occurrences,
                }
                for found in of_expert
            ]
            for of_expert in best
        ],
        "most_frequent": [
            {
                "id": int(token),
                "name": token_name(scope.tokenizer, int(token)),
                "occurrences": int(occurrences_V[token]),
                "share": plain(counts_VE[token] / occurrences_V[token]),
            }
            for token in frequent
        ],
        "random": plain(_choices_per_token(expert_JK) / num_experts),
    }


def _repetition(expert_JK: np.ndarray, num_experts: int, routed: Routed, scope: Scope) -> Json:
    expert_JK = expert_JK[:, :2]  # "first or second choice"
    rng = np.random.default_rng(0)
    shuffled = [
        repetition(rng.permutation(expert_JK, axis=0), routed.document_J)
        for _ in range(scope.num_shuffles)
    ]
    first, shared = expected_repetition(expert_JK, routed.document_J, num_experts)
    by_domain = {
        name: repetition(expert_JK[routed.domain_J == d], routed.document_J[routed.domain_J == d])
        for d, name in enumerate(scope.domains)
    }
    return {
        **plain(repetition(expert_JK, routed.document_J)._asdict()),
        "shuffled": {
            "same_first": plain(float(np.mean([found.same_first for found in shuffled]))),
            "any_shared": plain(float(np.mean([found.any_shared for found in shuffled]))),
        },
        "random": {"same_first": plain(first), "any_shared": plain(shared)},
        "domains": {
            name: plain(found._asdict()) for name, found in by_domain.items() if found.num_pairs
        },
    }


def _coactivation(expert_JK: np.ndarray, num_experts: int) -> Json:
    choices_J = np.count_nonzero(expert_JK >= 0, axis=1)
    pairs = choices_J @ (choices_J - 1) / choices_J.sum()
    return {
        "share": plain(coactivation(expert_JK, num_experts)),
        "random": plain(float(pairs / max(num_experts - 1, 1))),
    }


def _saturation(
    settling: Mapping[int, np.ndarray], last_JK: np.ndarray, num_experts: int
) -> Json | None:
    """The saturation; None if there is no earlier checkpoint to compare with."""
    if not settling:
        return None
    counted = {"first": slice(0, 1), "all": slice(None)}
    return {
        "step": list(settling),
        **{
            which: [plain(router_saturation(e[:, cut], last_JK[:, cut])) for e in settling.values()]
            for which, cut in counted.items()
        },
        "random": {
            which: plain(_choices_per_token(last_JK[:, cut]) / num_experts)
            for which, cut in counted.items()
        },
    }

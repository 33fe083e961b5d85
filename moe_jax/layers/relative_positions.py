"""Biases of scores by relative position (legend: `moe_jax.moe`; T counts keys)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.costs import Cost
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import ParameterSpec, normal_init, rows
from moe_jax.part import Call, Dims, Output, Own, Part


@dataclasses.dataclass(frozen=True)
class RelativePositions(Part):
    """A learned bias per head and bucket of distances, shared by all layers of a stack.

    It is a shared part of a stack: set `stack.shared = ("position",)` and, in the attention of
    layers, `position_bias = "position"`. In a causal stack all buckets hold backward distances;
    otherwise half of them hold forward distances.

    Source: Raffel et al. 2020, T5, arXiv:1910.10683, sec. 2.1; buckets: transformers,
      modeling_t5.py.
    """

    adds_to_residual: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True

    num_heads: int = setting(4, at_least=1)  # N, as in the attention that uses it
    num_buckets: int = setting(32, at_least=4)  # of distances, both directions together
    max_distance: int = setting(128, at_least=2)  # tokens; this and larger distances share a bucket

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.max_distance > self.num_buckets // 2,
            "max_distance must be above num_buckets / 2, since num_buckets / 2 buckets have one "
            "distance each",
            f"max_distance={self.max_distance}, num_buckets={self.num_buckets}",
            "Change one of them",
        )

    def specs(self, dims: Dims) -> dict[str, Any]:
        """`table` [num_buckets, N]."""
        init = normal_init(dims.model_dim**-0.5)
        shape = (self.num_buckets, self.num_heads)
        return {"table": ParameterSpec(shape, (None, "heads"), init, "attention", decays=False)}

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`: biases do not depend on tokens."""
        return False

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: nothing per token, since one table of L x L serves all sequences."""
        return (Cost("attention"),)

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """The biases of L queries and their keys, float32 [1 or B, N, L, L or T]; see `Part`.

        Positions of a document count up by one, so the distance of two tokens is that of their
        places in the row or slots in a cache. It is the same in all rows if equally many slots are
        filled.
        """
        places = keys_1T = jnp.arange(x_BLM.shape[1], dtype=jnp.int32)[None]
        if call.cache_length is not None and not call.prefill:
            assert call.cache_index is not None, "comes with cache_length"
            places = jnp.reshape(call.cache_index, (-1, 1)) + places
            keys_1T = jnp.arange(call.cache_length, dtype=jnp.int32)[None]
        return self.bias(params, places, keys_1T, causal=call.causal), None, None

    def bias(
        self, params: Any, positions_BL: jax.Array, key_positions_BT: jax.Array, *, causal: bool
    ) -> jax.Array:
        """The biases for these queries and keys, float32 [B, N, L, T]."""
        relative_BLT = key_positions_BT[:, None, :] - positions_BL[:, :, None]
        buckets_BLT = self.buckets(relative_BLT, causal=causal)
        bias_BLTN = rows(params["table"], buckets_BLT).astype(jnp.float32)
        rows_axis = "batch" if bias_BLTN.shape[0] > 1 else None
        return constrain(jnp.moveaxis(bias_BLTN, -1, 1), rows_axis, "heads", None, None)

    def buckets(self, relative: jax.Array, *, causal: bool) -> jax.Array:
        """The buckets of relative positions (key minus query), int32 of the same shape."""
        count = self.num_buckets if causal else self.num_buckets // 2
        of_distance = jnp.asarray(buckets_of_distances(count, self.max_distance))
        distance = jnp.maximum(-relative, 0) if causal else jnp.abs(relative)
        backward = of_distance[jnp.minimum(distance, self.max_distance)]
        return backward if causal else jnp.where(relative > 0, backward + count, backward)


def buckets_of_distances(num_buckets: int, max_distance: int) -> np.ndarray:
    """The buckets of the distances 0 to max_distance, int32.

    The first half of the buckets have one distance each; later buckets grow by a constant ratio.
    Computed in float32, as in T5.
    """
    exact = num_buckets // 2
    far = np.arange(exact, max_distance + 1, dtype=np.float32)
    steps = np.log(far / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    behind = np.minimum(exact + steps.astype(np.int32), num_buckets - 1)
    return np.concatenate([np.arange(exact, dtype=np.int32), behind]).astype(np.int32)

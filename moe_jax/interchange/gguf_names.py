"""llama.cpp's tensors and the parameters that they hold: one table for reading and writing.

Source: `gguf/constants.py` of the package gguf; `src/models/*.cpp` of ggml-org/llama.cpp.
"""

import dataclasses

import numpy as np

from moe_jax.interchange.rules import AS_IS, LINEAR, Layout, Rule, Shape

BLOCK = "blk.{layer}."


@dataclasses.dataclass(frozen=True)
class Paired(Layout):
    """Rows of queries or keys, or their bias, in which the halves of each head alternate.

    llama.cpp rotates neighbouring features in the architectures with such files.
    """

    heads: int
    inner: Layout = LINEAR

    def shape(self, shape: Shape) -> Shape:
        """See `Layout`."""
        return self.inner.shape(shape)

    def read(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """See `Layout`."""
        paired = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
        return self.inner.read(paired.swapaxes(1, 2).reshape(tensor.shape), shape)

    def write(self, values: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        tensor = self.inner.write(values)
        halves = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class OfHeads(Layout):
    """The keys [N, R, D] or the values [N, D, R] in `wkv_b` [R, N * (D_key + D_value)].

    They multiply queries and latents, head by head.
    """

    heads: int
    start: int  # of a head's columns
    stop: int
    latent_first: bool

    def shape(self, shape: Shape) -> Shape:
        """See `Layout`."""
        sizes = (shape[0], self.stop - self.start)
        return (self.heads, *(sizes if self.latent_first else sizes[::-1]))

    def write(self, values: np.ndarray) -> np.ndarray:
        """See `Layout`."""
        heads = values.reshape(len(values), self.heads, -1)[..., self.start : self.stop]
        return heads.transpose((1, 0, 2) if self.latent_first else (1, 2, 0))


def gguf_rules(
    heads: int, kv_heads: int, *, paired: bool, second_norm: str = "ffn_norm"
) -> tuple[Rule, ...]:
    """The tensors of a model with grouped-query attention.

    Args:
      heads: of queries.
      kv_heads: of keys and values.
      paired: whether the rows of queries and keys are paired; see `Paired`.
      second_norm: the name of the norm after attention.
    """
    rules = [*outside_rules(), *network_rules(second_norm)]
    for part in ("attention", "sliding"):
        rules += [
            Rule(f"{BLOCK}attn_norm.weight", f"{part}_norm/scale"),
            Rule(f"{BLOCK}attn_sinks.weight", f"{part}/sink"),
            *both(f"{BLOCK}attn_output", f"{part}/", "o"),
            *both(f"{BLOCK}attn_v", f"{part}/", "v"),
        ]
        for one, count in (("q", heads), ("k", kv_heads)):
            matrix, vector = (Paired(count), Paired(count, AS_IS)) if paired else (LINEAR, AS_IS)
            rules.append(Rule(f"{BLOCK}attn_{one}.weight", f"{part}/w{one}", matrix))
            rules.append(Rule(f"{BLOCK}attn_{one}.bias", f"{part}/b{one}", vector))
            rules.append(Rule(f"{BLOCK}attn_{one}_norm.weight", f"{part}/{one}_norm/scale"))
    return tuple(rules)


def latent_rules(heads: int, nope_dim: int, value_dim: int) -> tuple[Rule, ...]:
    """The tensors of a model with latent attention; keys and values are separate tensors."""
    keys = OfHeads(heads, 0, nope_dim, latent_first=True)
    values = OfHeads(heads, nope_dim, nope_dim + value_dim, latent_first=False)
    names = (("q", "q"), ("q_a", "q_a"), ("q_b", "q_b"), ("kv_a_mqa", "kv_a"), ("output", "o"))
    return (
        *outside_rules(),
        *network_rules("ffn_norm"),
        Rule(f"{BLOCK}attn_norm.weight", "attention_norm/scale"),
        *(Rule(f"{BLOCK}attn_{name}.weight", f"attention/w{key}", LINEAR) for name, key in names),
        Rule(f"{BLOCK}attn_k_b.weight", "attention/wkv_b", keys),
        Rule(f"{BLOCK}attn_v_b.weight", "attention/wkv_b", values),
        Rule(f"{BLOCK}attn_q_a_norm.weight", "attention/q_norm/scale"),
        Rule(f"{BLOCK}attn_kv_a_norm.weight", "attention/kv_norm/scale"),
    )


def outside_rules() -> tuple[Rule, ...]:
    """The tensors outside the layers."""
    return (
        Rule("token_embd.weight", "embedding"),
        Rule("output_norm.weight", "final_norm/scale"),
        Rule("output.weight", "head", LINEAR),
    )


def network_rules(norm: str) -> tuple[Rule, ...]:
    """Norms and matrices of dense networks, routers and experts."""
    rules = [Rule(f"{BLOCK}{norm}.weight", f"{part}_norm/scale") for part in ("mlp", "moe")]
    parts = (("", "mlp/"), ("_exps", "moe/experts/"), ("_shexp", "moe/shared/"))
    for suffix, part in parts:
        for name, key in (("gate", "g"), ("up", "i"), ("down", "o")):
            rules += both(f"{BLOCK}ffn_{name}{suffix}", part, key)
    return (
        *rules,
        Rule(f"{BLOCK}ffn_gate_inp.weight", "moe/router/weight", LINEAR),
        Rule(f"{BLOCK}ffn_gate_inp.bias", "moe/router/bias"),
        Rule(f"{BLOCK}ffn_gate_inp_shexp.weight", "moe/shared/gate", LINEAR),
        Rule(f"{BLOCK}exp_probs_b.bias", "moe/bias_E"),
    )


def both(name: str, part: str, key: str) -> tuple[Rule, Rule]:
    """A matrix and its bias."""
    return (
        Rule(f"{name}.weight", f"{part}w{key}", LINEAR),
        Rule(f"{name}.bias", f"{part}b{key}"),
    )

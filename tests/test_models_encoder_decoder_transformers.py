"""T5 and Switch, made by settings only, equal transformers: logits, experts and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.network import build
from tests.t5_oracle import (
    CASES,
    SAVED,
    batch,
    call_of,
    load_in_torch,
    params_of,
    said_by_torch,
    said_by_us,
    values,
)

LOGITS = 2e-4
GRADIENT = 5e-4  # relative, in L2
BATCH = batch()
ENCODER, DECODER = (BATCH[name] > 0 for name in ("attention_mask", "decoder_attention_mask"))


def assert_same(got, logits, experts, kept):
    """Compares what is not padding; some tokens must be dropped on either side."""
    np.testing.assert_allclose(got.logits[DECODER], logits[DECODER], atol=LOGITS, rtol=LOGITS)
    valid = [ENCODER if one.shape == ENCODER.shape else DECODER for one in experts]
    for mine, theirs in ((got.experts, experts), (got.kept, kept)):
        assert len(mine) == len(theirs)
        for a, b, where in zip(mine, theirs, valid, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[where], b[where])
    assert all((~b[where]).any() for b, where in zip(kept, valid, strict=True))


def test_switch_equals_what_was_saved_of_it():
    case = CASES["switch"]
    got = said_by_us(case.model, params_of(case, values), BATCH)
    with np.load(SAVED) as saved:
        experts, kept = (
            [*saved[f"{name}_encoder"], *saved[f"{name}_decoder"]] for name in ("experts", "kept")
        )
        assert_same(got, saved["logits"], experts, kept)


@pytest.mark.slow
def test_a_network_takes_tokens_and_masks_of_both_sides():
    case = CASES["t5"]
    params = params_of(case, values)
    tokens, mask, *encoder = (
        BATCH[name]
        for name in ("decoder_input_ids", "decoder_attention_mask", "input_ids", "attention_mask")
    )
    got = build(case.model).apply(
        {"params": params}, tokens, mask_BL=mask,
        encoder_tokens_BT=encoder[0], encoder_mask_BT=encoder[1],
    )  # fmt: skip
    expected = said_by_us(case.model, params, BATCH).logits
    np.testing.assert_allclose(got[DECODER], expected[DECODER], atol=LOGITS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    case = CASES[name]
    model, params = load_in_torch(case), params_of(case, values)
    expected = said_by_torch(model, BATCH)
    got = said_by_us(case.model, params, BATCH)
    assert len(expected.experts) == (4 if name == "switch" else 0)
    assert_same(got, expected.logits.detach().numpy(), expected.experts, expected.kept)

    # A linear function of the logits that are not padding.
    weights = np.random.default_rng(5).normal(size=expected.logits.shape).astype(np.float32)
    weights *= DECODER[..., None]
    torch.sum(expected.logits * torch.from_numpy(weights)).backward()
    # An expert that no token chose has no gradient.
    grads = {
        name: np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        for name, tensor in model.named_parameters()
    }

    def objective(params):
        return jnp.sum(case.model.run(params, call_of(BATCH)).logits_BLV * weights)

    got_grads, theirs = jax.jit(jax.grad(objective))(params), params_of(case, grads.__getitem__)
    assert jax.tree.structure(got_grads) == jax.tree.structure(theirs)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got_grads), jax.tree.leaves(theirs), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.linalg.norm(b) > 0, name
        assert np.linalg.norm(a - b) <= GRADIENT * np.linalg.norm(b), name

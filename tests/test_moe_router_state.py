"""Routers with arrays that the training step updates, and with metrics of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.fixed import FixedRouter
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parameters import ParameterSpec, init_parameters, zeros
from moe_jax.part import Call, Dims, Own, merge_aux

E, K, LENGTH, MODEL_DIM = 4, 2, 8, 3


@dataclasses.dataclass(frozen=True)
class Fewest(FixedRouter):
    """Chooses the K experts with the fewest tokens in all earlier steps."""

    def state_specs(self, dims, options):
        spec = ParameterSpec((options.num_experts,), (None,), zeros, "router", decays=False)
        return {"had_E": spec}

    def expert_index(self, x_GSM, inputs):
        fewest_K = jnp.argsort(inputs.state["had_E"])[: inputs.options.num_selected]
        return jnp.broadcast_to(fewest_K, (*x_GSM.shape[:2], len(fewest_K)))

    def route(self, params, x_GSM, inputs):
        routing = super().route(params, x_GSM, inputs)
        return routing._replace(sums={"tokens": jnp.sum(inputs.valid_GS)})

    def next_state(self, state, sums, step, num_steps):
        return {"had_E": state["had_E"] + jnp.sum(sums["assigned_KE"], axis=-2)}

    def metrics(self, aux):
        return {"tokens_sent": aux.sums["router"]["tokens"]}


BLOCK = MoE(
    num_experts=E, num_selected_experts=K, expert_dim=2, router=Fewest(), run_experts="einsum"
)


def test_a_router_chooses_by_its_state_and_the_step_moves_it():
    assert list(BLOCK.state_specs(Dims(MODEL_DIM))["router"]) == ["had_E"]
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), BLOCK.specs(Dims(MODEL_DIM)))
    state = {"router": {"had_E": jnp.array([5.0, 0.0, 3.0, 1.0])}}
    segments_BL = (jnp.arange(LENGTH) < 6).astype(jnp.int32)[None]
    _, aux = moe_block(
        params, jnp.ones((1, LENGTH, MODEL_DIM)), BLOCK,
        Call(segments_BL=segments_BL, capacity=0.0), Own(state=state),
    )  # fmt: skip
    assert aux.sums["assigned_KE"].tolist() == [[0, 6, 0, 0], [0, 0, 0, 6]]
    of_layers = jax.tree.map(lambda a: a[None], aux)
    later = BLOCK.next_state(jax.tree.map(lambda a: a[None], state), of_layers.sums, 0, 10)
    assert later["router"]["had_E"].tolist() == [[5, 6, 3, 7]]
    assert BLOCK.metrics(of_layers)["tokens_sent"].tolist() == [6]


@dataclasses.dataclass(frozen=True)
class Tempered(TokenChoice):
    """Token choice with logits over a learned temperature, which it logs."""

    def specs(self, dims, options):
        temperature = ParameterSpec((), (), zeros, "router", decays=False)
        return super().specs(dims, options) | {"log_temperature": temperature}

    def route(self, params, x_GSM, inputs):
        temperature = jnp.exp(params["log_temperature"])
        own = {"temperature": temperature * jnp.sum(inputs.valid_GS)}
        return super().route(params, x_GSM / temperature, inputs)._replace(sums=own)

    def metrics(self, aux):
        return {"temperature": aux.sums["router"]["temperature"] / aux.sums["num_tokens"]}


def test_a_router_logs_a_parameter_whatever_the_padding_and_the_microbatches():
    block = MoE(num_experts=E, num_selected_experts=K, expert_dim=2, router=Tempered())
    params = init_parameters(jax.random.key(0), block.specs(Dims(MODEL_DIM)))

    def aux_of(temperature, num_valid):
        router = params["router"] | {"log_temperature": jnp.log(temperature)}
        segments_BL = (jnp.arange(LENGTH) < num_valid).astype(jnp.int32)[None]
        x_BLM = jnp.ones((1, LENGTH, MODEL_DIM))
        return moe_block(params | {"router": router}, x_BLM, block, Call(segments_BL=segments_BL))[
            1
        ]

    def stacked(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    temperatures, lengths = (0.5, 3.0), (8, 3)  # of two layers, of two microbatches
    microbatches = [stacked(*(aux_of(t, valid) for t in temperatures)) for valid in lengths]
    batch = merge_aux({"moe": stacked(*microbatches)})["moe"]
    np.testing.assert_allclose(block.metrics(batch)["temperature"], temperatures, rtol=1e-6)


def test_a_model_keeps_it_by_layer():
    parts = {"attention": Attention(num_heads=1, head_dim=4), "moe": BLOCK}
    layout = StackLayout(unit=(("attention", "moe"),), repeats=3)
    specs = LanguageModel(vocab_size=8, model_dim=4, parts=parts, stack=layout).state_specs()
    assert specs["moe"]["router"]["had_E"].shape == (3, E)


def test_a_block_of_one_expert_asks_no_router():
    alone = dataclasses.replace(BLOCK, num_experts=1, num_selected_experts=1, losses=())
    assert alone.state_specs(Dims(MODEL_DIM)) == {}
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), alone.specs(Dims(MODEL_DIM)))
    _, aux = moe_block(params, jnp.ones((1, 2, MODEL_DIM)), alone)
    assert aux.sums["router"] == {}
    assert "tokens_sent" not in alone.metrics(jax.tree.map(lambda a: a[None], aux))

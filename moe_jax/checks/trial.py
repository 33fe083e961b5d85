"""A tiny model around a part, its parameters and its outputs, for `moe_jax.checks`."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks.around import LENGTH, VOCAB_SIZE, model_around
from moe_jax.config import MeshConfig
from moe_jax.config.settings import Settings
from moe_jax.models.model import LanguageModel
from moe_jax.moe.part import MoE
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import RULES, named_sharding, num_shards
from moe_jax.parameters import init_parameters
from moe_jax.part import Aux, Call, EncoderInputs, Part, RunShape, merge_aux

SPLIT = 5  # perturbed suffixes begin here
NUM_SUFFIXES = 32
STEP = 3
PADDED = -2  # the batch with padding


class Batches(NamedTuple):
    """Batches of equal shape, with a leading dim of batches.

    Attributes:
      tokens_PBL: int32.
      segments_PBL: int32, 0 for padding.
    """

    tokens_PBL: Any
    segments_PBL: Any


class Computed(NamedTuple):
    """Results of a pass, with a leading dim of batches.

    Attributes:
      logits_PBLV: float32.
      loss_P: float32, a linear function of the logits of valid tokens, plus the losses of parts.
      gradients: of the loss, in the tree of the parameters; None in evaluation.
      choices: experts of each token, by part; empty in training.
      probability: sum of a token's probabilities over the experts, by part; mean over tokens.
      metrics: of the parts, by name.
      state: after a step, by part; empty in evaluation.
    """

    logits_PBLV: Any
    loss_P: Any
    gradients: Any
    choices: Any
    probability: Any
    metrics: Any
    state: Any


def mesh_shapes(num_devices: int) -> list[MeshConfig]:
    """Meshes of this number of devices; the mesh that splits most dims comes first."""
    shapes = [MeshConfig(data=num_devices)]
    if num_devices % 2 == 0:
        shapes.insert(0, MeshConfig(data=num_devices // 2, expert=2))
    if num_devices % 8 == 0:
        shapes.insert(0, MeshConfig(data=num_devices // 8, fsdp=2, expert=2, tensor=2))
    return shapes


class Trial:
    """A part in a model; passes are compiled when a check first needs them.

    Attributes:
      part: the part to check.
      model: the model around it.
      params: initial values plus noise, so that nothing is 0 and routers decide clearly.
      state: of the parts, likewise.
    """

    def __init__(self, part: Settings):
        self.part = part
        self.model = model_around(part)

    @functools.cached_property
    def specs(self) -> dict[str, Any]:
        """The specs of `parameters` and `state`."""
        return {"parameters": self.model.specs(), "state": self.model.state_specs()}

    def draw(self, key: jax.Array) -> Any:
        """Initial values in the tree of `specs`."""
        return init_parameters(key, self.specs)

    @functools.cached_property
    def drawn(self) -> Any:
        """Initial values from one key."""
        # Without jit: parts of a process share the programs that draw a shape.
        return jax.device_get(self.draw(jax.random.key(0)))

    @functools.cached_property
    def params(self) -> Any:
        """See the class."""
        return noisy(self.drawn["parameters"], seed=0)

    @functools.cached_property
    def state(self) -> Any:
        """See the class."""
        return noisy(self.drawn["state"], seed=1)

    @functools.cached_property
    def batch_size(self) -> int:
        """Sequences per batch: enough for a mesh of all devices, and for some with padding."""
        return max(4, jax.device_count())

    @functools.cached_property
    def batches(self) -> Batches:
        """A batch; the batch with other last suffixes; with padding; with other padding."""
        random, rows = np.random.default_rng(0), self.batch_size
        shape = (NUM_SUFFIXES + 3, rows, LENGTH)
        tokens, segments = random.integers(1, VOCAB_SIZE, shape), np.ones(shape)
        others = tokens[1:].copy()
        tokens[1:] = tokens[0]
        tokens[1:-2, -1, SPLIT:] = others[:-2, -1, SPLIT:]
        lengths = np.resize([LENGTH, LENGTH - 3, 0, 2], rows)
        segments[-2:] = np.arange(LENGTH) < lengths[:, None]
        tokens[-1] = np.where(segments[-1] > 0, tokens[0], others[-1])
        return Batches(tokens.astype(np.int32), segments.astype(np.int32))

    @property
    def encoder(self) -> EncoderInputs:
        """The encoder's input, if the model has an encoder: the same in every batch."""
        shape = (self.batch_size, LENGTH)
        tokens = np.random.default_rng(4).integers(1, VOCAB_SIZE, shape)
        return EncoderInputs(jnp.asarray(tokens, jnp.int32))

    @property
    def first(self) -> Batches:
        """Only the first batch."""
        return Batches(*(array[:1] for array in self.batches))

    @functools.cached_property
    def training(self) -> Computed:
        """Training on all batches on one device."""
        return self.compute(self.model, self.batches, training=True)

    @functools.cached_property
    def evaluation(self) -> Computed:
        """Evaluation on all batches on one device."""
        return self.compute(self.model, self.batches, training=False)

    @functools.cached_property
    def unrolled(self) -> Computed:
        """Training on the first batch with the layers one after another."""
        model = dataclasses.replace(self.model, scan_layers=False)
        return self.compute(model, self.first, training=True)

    @functools.cached_property
    def mesh_config(self) -> MeshConfig:
        """The mesh of all devices that splits most, among meshes that the part supports.

        Raises:
          ValueError: the part supports none of them.
        """
        errors = []
        for shape in mesh_shapes(jax.device_count()):
            mesh = make_mesh(shape)
            shards = {name: num_shards(name, mesh) for name in RULES}
            try:
                self.model.check_run(RunShape(self.batch_size, LENGTH, shards, LENGTH))
            except ValueError as error:
                errors.append(error)
            else:
                return shape
        raise errors[-1]

    @functools.cached_property
    def on_mesh(self) -> Computed:
        """Training on the first batch on `mesh_config`."""
        return self.compute(self.model, self.first, training=True, mesh_config=self.mesh_config)

    @functools.cached_property
    def in_microbatches(self) -> tuple[Any, Any]:
        """Logits and loss of `PADDED` in evaluation, in microbatches of one sequence.

        As in a training step, the losses of microbatches add up, and each gets the number of tokens
        and the sums of the whole batch. Microbatches differ in tokens; one has none.
        """
        tokens_BL, segments_BL = (array[PADDED] for array in self.batches)
        num_tokens = jnp.sum(segments_BL > 0).astype(jnp.float32)

        def forward(row: tuple[Any, Any, Any]) -> tuple[jax.Array, dict[str, Aux]]:
            tokens_L, segments_L, encoder_T = row
            call = Call(
                tokens_BL=tokens_L[None], segments_BL=segments_L[None], step=jnp.int32(STEP),
                encoder=EncoderInputs(encoder_T[None]),
            )  # fmt: skip
            output = self.model.run(self.params, call, state=self.state)
            return output.logits_BLV[0], output.aux

        def run(*rows: Any) -> tuple[jax.Array, jax.Array]:
            logits_BLV, aux_B = jax.lax.map(forward, rows)
            sums = {name: own.sums for name, own in merge_aux(aux_B).items()}

            def loss(aux: dict[str, Aux]) -> jax.Array:
                return jnp.asarray(self.model.loss(aux, num_tokens, sums, num_tokens))

            of_parts = jnp.sum(jax.vmap(loss, axis_size=self.batch_size)(aux_B))
            return logits_BLV, self.linear_loss(logits_BLV, segments_BL) + of_parts

        return jax.device_get(jax.jit(run)(tokens_BL, segments_BL, self.encoder.tokens_BT))

    @functools.cached_property
    def with_one_choice(self) -> LanguageModel:
        """The model with one expert per token and without balance losses.

        Raises:
          ValueError: the block or its router refuses that.
        """

        def changed(part: Part) -> Part:
            if not isinstance(part, MoE):
                return part
            return dataclasses.replace(part, num_selected_experts=1, losses=())

        return self.model.map_parts(changed)

    def linear_loss(self, logits_BLV: jax.Array, segments_BL: jax.Array) -> jax.Array:
        """A linear function of the logits of valid tokens whose gradient is not small."""
        shape = (self.batch_size, LENGTH, VOCAB_SIZE)
        weights_BLV = np.random.default_rng(2).normal(size=shape)
        valid_BL1 = (segments_BL > 0)[..., None]
        num_tokens = jnp.sum(valid_BL1).astype(jnp.float32)
        return jnp.sum(logits_BLV * weights_BLV * valid_BL1) / num_tokens

    def compute(
        self,
        model: LanguageModel,
        batches: Batches,
        *,
        training: bool,
        mesh_config: MeshConfig | None = None,
        replay: Any = None,
    ) -> Computed:
        """Runs batches one after another in one program; gradients only in training."""
        params, state = self.params, self.state
        in_use: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if mesh_config is not None:
            mesh = make_mesh(mesh_config)
            params = placed(params, self.specs["parameters"], mesh)
            state = placed(state, self.specs["state"], mesh)
            in_use = jax.set_mesh(mesh)

        def objective(params: Any, batch: Batches) -> tuple[jax.Array, Any]:
            tokens_BL, segments_BL = batch
            call = Call(
                tokens_BL=tokens_BL, segments_BL=segments_BL, step=jnp.int32(STEP),
                rng=jax.random.key(3) if training else None, record=not training,
                encoder=self.encoder,
            )  # fmt: skip
            output = model.run(params, call, state=state, replay=replay)
            num_tokens = jnp.sum(segments_BL > 0).astype(jnp.float32)
            sums = {name: aux.sums for name, aux in output.aux.items()}
            loss = self.linear_loss(output.logits_BLV, segments_BL)
            loss += model.loss(output.aux, num_tokens, jax.lax.stop_gradient(sums), num_tokens)
            choices = {name: aux.choices for name, aux in output.aux.items() if aux.choices}
            following = model.next_state(state, sums, jnp.int32(STEP), 10) if training else {}
            probability = {
                name: jnp.sum(one["prob_sum_E"], axis=-1) / one["num_tokens"]
                for name, one in sums.items()
                if "prob_sum_E" in one
            }
            metrics = model.metrics(output.aux)
            said = (output.logits_BLV, choices, probability, metrics, following)
            return loss, said

        def one(params: Any, batch: Batches) -> Computed:
            gradients = None
            if training:
                gradient = jax.value_and_grad(objective, has_aux=True)
                (loss, said), gradients = gradient(params, batch)
            else:
                loss, said = objective(params, batch)
            logits_BLV, *others = said
            return Computed(logits_BLV, loss, gradients, *others)

        def run(params: Any, batches: Batches) -> Computed:
            return jax.lax.map(functools.partial(one, params), batches)

        with in_use:
            return jax.device_get(jax.jit(run)(params, batches))


def noisy(values: Any, seed: int) -> Any:
    """Adds noise of standard deviation 0.3 to floats."""
    random = np.random.default_rng(seed)

    def add(value: np.ndarray) -> np.ndarray:
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return value + (0.3 * random.normal(size=value.shape)).astype(value.dtype)

    return jax.tree.map(add, values)


def placed(values: Any, specs: Any, mesh: jax.sharding.Mesh) -> Any:
    """Places arrays on a mesh by their specs."""
    return jax.tree.map(
        lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)), specs, values
    )

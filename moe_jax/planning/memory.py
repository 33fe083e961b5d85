"""Bytes that a training step needs on one device, by component (legend: `moe_jax.moe`).

This is an estimate from shapes, not from a program. A compiler keeps less where it fuses, and more
where it does not. State is exact. Activations follow the formulas below.
"""

import dataclasses
import math

import jax

from moe_jax.config import Lengths, MeshConfig
from moe_jax.costs import FLOAT32
from moe_jax.parameters import ParameterSpec
from moe_jax.planning.flops import (
    Placed,
    different_layers,
    module_layers,
    num_heads,
)
from moe_jax.planning.parameters import (
    gathered_size,
    local_bytes,
    local_size,
    shards_of,
    training_parameters,
)
from moe_jax.planning.serving import caches_of_a_text
from moe_jax.planning.workload import Workload
from moe_jax.training.optimizers import moments_of

# optax.scale_by_factored_rms factors a matrix if both of its dims are at least this.
MIN_FACTORED = 128
STEP_BYTES = 4  # of an int32 step count


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step.

    Attributes:
      parameters: as stored: float32, integers and scales if quantised, and adapters.
      teacher: parameters of the teachers, as stored, the state of their parts, and their steps.
      optimizer: moments, float32.
      gradients: of what trains, float32; with several microbatches, the sum and the newest one.
      saved_activations: what the forward pass of a microbatch saves for the backward pass.
      logits: float32 logits and their gradient, and those of a teacher; with `logits_chunks` those
        of one chunk, and the gathered head and its gradient.
      layer: working set of the largest layer: its activations if they are computed again, its
        weights gathered over fsdp, and their gradient before it is split again.
      dispatch: slots on their way to the experts and back, and one-hot tensors, of the layer with
        the most.
    """

    parameters: float
    teacher: float
    optimizer: float
    gradients: float
    saved_activations: float
    logits: float
    layer: float
    dispatch: float

    @property
    def total(self) -> float:
        """Bytes at the peak: the logits are freed before the backward pass reaches the layers."""
        state = self.parameters + self.teacher + self.optimizer + self.gradients
        return state + self.saved_activations + max(self.logits, self.layer + self.dispatch)


def estimate_memory(work: Workload) -> Memory:
    """The components for a config on its mesh."""
    model, mesh = work.model, work.mesh
    gradient_copies = 2 if work.config.training.num_microbatches > 1 else 1
    layers = [
        (one, layer)
        for one in (work, *work.teachers)
        for layer in different_layers(one.model, one.lengths)
        + module_layers(one.model, one.lengths)
    ]
    return Memory(
        parameters=parameter_bytes(work),
        teacher=sum(parameter_bytes(one) + state_bytes(one) + STEP_BYTES for one in work.teachers),
        optimizer=optimizer_bytes(work),
        gradients=gradient_copies * local_bytes(training_parameters(work.config), mesh),
        saved_activations=saved_bytes(work),
        logits=2 * num_heads(model) * logits_bytes(work) / work.config.training.logits_chunks
        + whole_head_bytes(work)
        + sum(map(logits_bytes, work.teachers)),
        layer=max(working_set(one, layer) for one, layer in layers),
        dispatch=max(dispatch_bytes(one, layer) for one, layer in layers),
    )


def parameter_bytes(work: Workload) -> float:
    """Bytes of the parameters on one device, as they are stored."""
    return local_bytes(work.model.specs(), work.mesh)


def state_bytes(work: Workload) -> float:
    """Bytes of the state of parts on one device, such as selection biases."""
    return local_bytes(work.model.state_specs(), work.mesh)


def logits_bytes(work: Workload) -> float:
    """Bytes of one head's logits of a microbatch on one device."""
    return FLOAT32 * work.decoder_tokens * work.model.vocab_size / work.mesh.tensor


def whole_head_bytes(work: Workload) -> float:
    """Bytes of the head and its gradient, gathered in float32 while chunks of logits are scored."""
    if work.config.training.logits_chunks == 1 or work.mesh.batch_shards == 1:
        return 0.0
    specs = jax.tree.leaves(work.model.head_params(work.model.plain_specs()))
    return 2.0 * FLOAT32 * sum(gathered_size(spec, work.mesh) for spec in specs)


def optimizer_bytes(work: Workload) -> float:
    """Bytes of the optimizer's moments of the trained parameters on one device.

    `moments_of` counts them per parameter. Adafactor adds a row and a column of every matrix with
    at least 128 of each (each expert's matrix on its own, arXiv:1804.04235 sec. 3), elsewhere one
    number per parameter.
    """
    optimizer, specs = work.config.optimizer, training_parameters(work.config)
    total: float = sum(moments_of(optimizer, spec) * local_size(spec, work.mesh) for spec in specs)
    if optimizer.name == "adafactor":
        total += sum(_factored_size(spec, work.mesh) for spec in specs)
    return FLOAT32 * total


def _factored_size(spec: ParameterSpec, mesh: MeshConfig) -> float:
    stacked = spec.num_stacked
    dims = spec.shape[stacked:]
    if len(dims) < 2 or sorted(dims)[-2] < MIN_FACTORED:
        return local_size(spec, mesh)
    parts = [size / shards_of(axis, mesh) for size, axis in zip(spec.shape, spec.axes, strict=True)]
    return math.prod(parts[:stacked]) * (parts[-1] + parts[-2])


def saved_bytes(work: Workload) -> float:
    """Bytes of activations that one microbatch saves for its backward pass, over all layers.

    They depend on `model.remat`. "none": everything that the stages save. "dots": a layer's input
    and the outputs of its matmuls without a batch dim (projections, dense FFN, router; not scores,
    not experts). "full": a layer's input.
    """
    model, tensor = work.model, work.mesh.tensor
    if model.remat == "none":
        return work.tokens * work.total(lambda cost: cost.saved.on(tensor))
    layers = [work.lengths.of(name) * stack.num_layers for name, stack in model.stacks.items()]
    layers += [one.times * one.within.length for one in module_layers(model, work.lengths)]
    inputs = work.sequences * sum(layers) * float(model.model_dim) * work.itemsize
    if model.remat == "full":
        return inputs
    return inputs + work.tokens * work.total(lambda cost: cost.saved_dots.on(tensor))


def tokens_in(work: Workload, layer: Placed) -> float:
    """Tokens of a microbatch on one device that the layer sees."""
    return work.sequences * layer.within.length


def layer_activations(work: Workload, layer: Placed) -> float:
    """Bytes that the backward pass of one layer reads for one microbatch.

    They follow from the costs of its parts; a branch adds its residual and the normed copy.
    """
    return tokens_in(work, layer) * sum(
        cost.saved.on(work.mesh.tensor) for cost in work.costs_of(layer)
    )


def working_set(work: Workload, layer: Placed) -> float:
    """Bytes that the backward pass of one layer needs beyond what was saved.

    These are its weights in the compute dtype, gathered over fsdp, and their gradient of the same
    size. With remat, its activations are computed again. Without remat, the gradient of the largest
    activation counts, such as scores in float32 or hidden units. A teacher has no gradient: only
    its weights and the largest activation count.
    """
    weights = (1 + work.learns) * work.itemsize * gathered_parameters(work, layer)
    if work.model.remat == "none" or not work.learns:
        largest = (cost.largest.on(work.mesh.tensor) for cost in work.costs_of(layer))
        return weights + tokens_in(work, layer) * max(largest, default=0.0)
    return weights + layer_activations(work, layer)


def gathered_parameters(work: Workload, layer: Placed) -> float:
    """Parameters of one layer on one device after they are gathered over fsdp."""
    specs = jax.tree.leaves(layer.part.specs(work.model.dims))
    return sum(gathered_size(spec, work.mesh) for spec in specs)


def dispatch_bytes(work: Workload, layer: Placed) -> float:
    """Bytes of one layer's buffers between tokens and experts.

    Slots before and after the exchange between devices, there and back (4 M per slot; 2 M if
    experts are not split), and one-hot tensors.
    """
    copies = 4 if work.mesh.expert_shards > 1 else 2
    costs = work.costs_of(layer)
    return tokens_in(work, layer) * sum(copies * cost.slots + cost.buffers for cost in costs)


def kv_cache_bytes(work: Workload, batch_size: int, length: int) -> float:
    """Bytes of the caches, such as keys and values, of a generating batch on one device.

    Sequences are split over all axes except tensor (at least one per device), heads over tensor.
    """
    sequences = max(1, batch_size / work.mesh.batch_shards)
    caches = caches_of_a_text(work.model, Lengths(length, work.lengths.encoder))
    return sequences * caches.on(work.mesh.tensor)

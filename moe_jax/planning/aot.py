"""The real programs, compiled for a machine that is not present."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from moe_jax.models.model import LanguageModel
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.planning.compiled import Compiled, CompilerMemory, out_of_memory
from moe_jax.planning.hlo import read_program
from moe_jax.planning.topology import Topology, devices
from moe_jax.planning.workload import Workload
from moe_jax.training.loss import call_of_batch
from moe_jax.training.placement import BATCH_AXES, compile_train_step, state_shardings
from moe_jax.training.state import abstract_batch, abstract_state


def compile_training_step(work: Workload, topology: Topology) -> Compiled:
    """Compiles the training step of `moe_jax.train`, with its layout of state and batch."""
    mesh = make_mesh(work.mesh, devices(topology))
    state = abstract_state(work.config)
    training = work.config.training
    rows = training.batch_size // training.num_microbatches
    batch = abstract_batch(work.config, (training.num_microbatches, rows))
    step = compile_train_step(work.config, mesh)
    arrays = training.loss.abstract_arrays(work.config, mesh)
    with jax.set_mesh(mesh):
        return _compile(lambda: step.lower(state, batch, *arrays))


def compile_forward(work: Workload, topology: Topology) -> Compiled:
    """Compiles the forward pass of one microbatch without its loss, with float32 parameters.

    It runs as in evaluation, without dropout and noise, but with the capacity of training.
    """
    model, training = with_training_capacity(work.model), work.config.training
    mesh = make_mesh(work.mesh, devices(topology))
    shardings = state_shardings(work.config, mesh)
    state = abstract_state(work.config)
    batch = abstract_batch(work.config, (training.batch_size // training.num_microbatches,))

    def forward(params: Any, model_state: Any, batch: Any) -> jax.Array:
        return model.run(params, call_of_batch(batch), state=model_state).logits_BLV

    placed = named_sharding(BATCH_AXES[1:], mesh)
    program = jax.jit(forward, in_shardings=(shardings.params, shardings.model_state, placed))
    with jax.set_mesh(mesh):
        return _compile(lambda: program.lower(state.params, state.model_state, batch))


def with_training_capacity(model: LanguageModel) -> LanguageModel:
    """The model with as many slots in evaluation as in training."""

    def as_in_training(part: Any) -> Any:
        if not part.routes:
            return part
        capacity = dataclasses.replace(part.capacity, eval_factor=part.capacity.train_factor)
        return dataclasses.replace(part, capacity=capacity)

    return model.map_parts(as_in_training)


def _compile(lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    start, cpu_start = time.perf_counter(), time.process_time()

    def spent() -> tuple[float, float]:
        return time.perf_counter() - start, time.process_time() - cpu_start

    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error))
        if refused is None:
            raise
        return Compiled(None, None, *spent(), refused=refused)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    memory = CompilerMemory(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    cost = compiled.cost_analysis()
    program = read_program(text)
    return Compiled(memory, program, *spent(), cost.get("flops") if cost else None)

"""Plan of a training step: whether it fits the chips, and a lower bound of its time.

The step of `train.step` is lowered with abstract arrays and compiled by the chip's compiler, which needs no chip. Where a
GPU's compiler is not installed its memory is estimated.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from reverie_jax.data.packing import Batch
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, VLMConfig, lora
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.attention.tokamax import compiling_for
from reverie_jax.models.sharding import MESH_AXES, batch_sharding, parse_mesh_axes, shardings
from reverie_jax.train.plan import costs, hlo
from reverie_jax.train.plan.topology import Topology, can_compile, compile_devices, plan_mesh
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.reference_model import ReferenceModel, without_adapters
from reverie_jax.train.step import TrainState, make_optimizer, make_step, make_trainable, trainable_filter

_UNKNOWN_STEPS = 1000
"""Number of steps if only the data determine it (`steps=0`); it affects the learning rate only."""

ROOFLINE_FORMULA = (
    "max(model FLOPs / (chips x peak), bytes of memory / its bandwidth, bytes over links / their bandwidth), "
    "a lower bound"
)


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A train step and its abstract arguments: arrays with shape, dtype and sharding, and no memory."""

    model: VisionLanguageModel
    graph: nnx.GraphDef[VisionLanguageModel]
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: nnx.State[Any, Any]
    batch: Batch
    recipe: Recipe
    mesh: Mesh | AbstractMesh
    reference: ReferenceModel

    def bytes_by_kind(self) -> dict[str, int]:
        """Return the bytes of the arguments on one chip, by kind; `batch` includes the inputs of DPO's reference."""
        return {
            "frozen": chip_bytes(self.frozen),
            "trainable": chip_bytes(self.state.params),
            "optimizer": 0 if self.recipe.offload else chip_bytes((self.state.optimizer, self.state.step)),
            "batch": chip_bytes((self.batch, self.reference.inputs)),
        }

    def lower(self) -> Any:
        """Lower the step for the mesh's devices; the result can be compiled."""
        assert isinstance(self.mesh, Mesh)
        with jax.set_mesh(self.mesh), compiling_for(self.mesh.devices.flat[0]):
            step: Any = make_step(
                *(self.graph, self.optimizer, self.recipe),
                reference=self.reference.graph,
                shardings=jax.tree.map(lambda x: x.sharding, self.state),
            )
            return step.lower(self.state, self.frozen, self.batch, self.reference.inputs)


def chip_bytes(tree: Any) -> int:
    """Return the bytes on one chip of a tree's arrays, abstract or not; each must have a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def architecture_of(recipe: str) -> str:
    """Return the name of the architecture that a recipe's name stands for."""
    known = {
        "moe-llava-qwen": "moe-llava-qwen-1.8b",
        "moe-llava-phi2": "moe-llava-phi2-2.7b",
        "moe": "moe-llava-stablelm-1.6b",
        "minigpt4": "minigpt4-7b",
        "mplug-owl": "mplug-owl-7b",
        "muffin": "muffin-13b",
        "13b": "llava-1.5-13b",
        "phi3": "llava-phi3-mini",
        "1.0": "llava-1.0-7b",
    }
    return next((name for part, name in known.items() if part in recipe), "llava-1.5-7b")


def find_architecture(name: str) -> VLMConfig:
    """Return the published architecture of that name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"--architecture {name}: unknown architecture; choose from {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def mesh_sizes(text: str | None, chips: int) -> dict[str, int]:
    """Parse chips by axis from "data=2,fsdp=4"; all on fsdp if None.

    Raises:
        UserError: the text is invalid, or the axes do not use all chips.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    if text is None:
        return sizes | {"fsdp": chips}
    try:
        sizes |= parse_mesh_axes(text)
    except ValueError as error:
        raise UserError(f"--mesh {text}: {error}") from None
    if math.prod(sizes.values()) != chips:
        raise UserError(f"--mesh {text}: uses {math.prod(sizes.values())} chips of a topology of {chips}")
    return sizes


def abstract_step(
    config: VLMConfig, recipe: Recipe, mesh: Mesh | AbstractMesh, *, dtype: DTypeLike = jnp.bfloat16
) -> AbstractStep:
    """Return the step that `train.loop` would run on the mesh, with the sharding of every argument.

    Raises:
        UserError: a micro-batch cannot be spread evenly over the mesh.
    """
    if not recipe.steps:
        recipe = dataclasses.replace(recipe, steps=_UNKNOWN_STEPS)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    if recipe.micro_batch_size % spread:
        raise UserError(
            f"micro-batches of {recipe.micro_batch_size} sequences cannot be spread over data x fsdp = {spread} chips: "
            "set batch_size and gradient_accumulation_steps, or a mesh with a larger tensor axis"
        )

    def make() -> VisionLanguageModel:
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype)
        make_trainable(model, recipe)
        if recipe.quantization is not None:
            lora.quantize(model, recipe.quantization)
        return model

    model = nnx.eval_shape(make)
    graph, params, frozen = nnx.split(model, trainable_filter(recipe), ...)  # type: ignore[misc]
    optimizer = make_optimizer(recipe)
    replicated = NamedSharding(mesh, PartitionSpec())

    moments = jax.eval_shape(optimizer.init, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    moment_shardings = shardings(moments, mesh)
    if recipe.offload:
        moment_shardings = jax.tree.map(lambda x: x.with_memory_kind("pinned_host"), moment_shardings)
    state = TrainState(
        _with_shardings(params, shardings(params, mesh)), _with_shardings(moments, moment_shardings), step
    )
    frozen = _with_shardings(frozen, shardings(frozen, mesh))
    reference = ReferenceModel()
    if recipe.preference is not None and recipe.preference.reference == "stored":
        reference = ReferenceModel(
            None, tuple(jax.ShapeDtypeStruct((2,), dtype, sharding=replicated) for dtype in (jnp.int32, jnp.float32))
        )
    elif recipe.preference is not None:
        reference = ReferenceModel(
            without_adapters(model, recipe), nnx.filter_state(state.params, nnx.PathContains("projector"))
        )
    return AbstractStep(model, graph, optimizer, state, frozen, _batch(config, recipe, mesh), recipe, mesh, reference)


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _batch(config: VLMConfig, recipe: Recipe, mesh: Mesh | AbstractMesh) -> Batch:
    shape, side, sharding = recipe.sequence, config.vision.image_size, batch_sharding(mesh)

    def array(*sizes: int, dtype: DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((recipe.batch_size, *sizes), dtype, sharding=sharding)

    tokens, edges, leaves, slots = (array(size) for size in (shape.length, shape.edges, shape.questions, shape.images))
    return Batch(
        tokens=tokens,
        positions=tokens,
        ends=tokens,
        image_slots=tokens,
        images=array(shape.images, side, side, 3, dtype=jnp.uint8),
        parent=edges,
        target=edges,
        weight=array(shape.edges, dtype=jnp.float32),
        branch=edges,
        origin=edges,
        leaves=leaves,
        questions=leaves,
        flat_tokens=slots,
        records=slots,
    )


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Memory of a step on one chip, and a lower bound of its time.

    Attributes:
        bytes: on one chip, by kind: frozen, trainable, optimizer, batch, and `activations`, all temporaries of the program.
        peak_bytes_per_chip: arguments + outputs - outputs that reuse an argument + temporaries.
        hbm_bytes_per_chip: memory of a chip.
        flops_per_step: model FLOPs, all chips.
        collective_bytes_per_step: received by one chip over its links.
        collective_operand_bytes_per_step: passed to collectives by one chip; None if estimated.
        memory_traffic_per_step: bytes to and from one chip's memory, a lower bound.
        roofline_seconds_per_step: a lower bound, see `ROOFLINE_FORMULA`.
        roofline: its terms (compute, memory, links), in seconds.
        compiled: by the chip's compiler; otherwise estimated.
        compile_seconds: of lowering and compiling.
        note: why the step does not fit, from the compiler; or what the figures leave out.
        largest_batch_size: largest power of two that fits in one micro-batch on this mesh; None unless searched.
    """

    recipe: str
    architecture: str
    topology: str
    mesh: dict[str, int]
    batch_size: int
    gradient_accumulation_steps: int
    dtype: str
    fits: bool
    peak_bytes_per_chip: int
    hbm_bytes_per_chip: int
    bytes: dict[str, int]
    flops_per_step: int
    collective_bytes_per_step: int
    collective_operand_bytes_per_step: int | None
    memory_traffic_per_step: int
    roofline_seconds_per_step: float
    roofline: dict[str, float]
    compiled: bool
    compile_seconds: float
    note: str = ""
    largest_batch_size: int | None = None


def make_plan(
    config: VLMConfig,
    recipe: Recipe,
    topology: Topology,
    mesh: Mapping[str, int],
    *,
    architecture: str,
    dtype: DTypeLike = jnp.bfloat16,
    devices: list[Any] | None = None,
    compiled: bool = True,
) -> StepPlan:
    """Plan one step.

    Args:
        config: architecture.
        recipe: of the run.
        topology: chips.
        mesh: chips by axis.
        architecture: name of `config`, for the report.
        dtype: of frozen weights and computation.
        devices: to compile for; those of the topology if omitted.
        compiled: compile where possible; if False, estimate.

    Raises:
        UserError: a micro-batch cannot be spread evenly over the mesh, or the TPU compiler is missing.
    """
    compiled = compiled and (devices is not None or can_compile(topology))
    if compiled and devices is None:
        devices = compile_devices(topology)
    step = abstract_step(config, recipe, plan_mesh(topology, dict(mesh), devices if compiled else None), dtype=dtype)
    config = step.model.config  # with experts, where the recipe makes them
    by_kind, sizes, width = step.bytes_by_kind(), costs.Sizes.of(step.model), jnp.dtype(dtype).itemsize
    activations = costs.activations(config, sizes, recipe, mesh, width=width, trained=by_kind["trainable"])
    if compiled:
        program = _compile(step, topology.chips, sum(by_kind.values()))
    else:
        received = costs.collective_bytes(config, sizes, recipe, mesh, width=width, trained=by_kind["trainable"])
        note = "activations are estimated by a formula (docs/plan.md); arguments are exact"
        program = _Program(activations.total, received, None, 0.0, note)
    peak, chip = sum(by_kind.values()) + program.temporaries, topology.chip
    flops, moved = costs.step_flops(config, sizes, recipe), costs.memory_bytes(recipe, mesh, by_kind, activations.saved)
    roofline = {
        "compute": flops / topology.chips / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": program.received / topology.interconnect,
    }
    return StepPlan(
        recipe=recipe.name,
        architecture=architecture,
        topology=topology.name,
        mesh=dict(mesh),
        batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        dtype=str(jnp.dtype(dtype)),
        fits=peak <= chip.hbm and not program.is_too_large,
        peak_bytes_per_chip=peak,
        hbm_bytes_per_chip=chip.hbm,
        bytes=by_kind | {"activations": program.temporaries},
        flops_per_step=flops,
        collective_bytes_per_step=program.received,
        collective_operand_bytes_per_step=program.operands,
        memory_traffic_per_step=moved,
        roofline_seconds_per_step=max(roofline.values()),
        roofline=roofline,
        compiled=compiled,
        compile_seconds=round(program.seconds, 1),
        note=program.note,
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """Bytes of a step's program on one chip: temporaries, received over links, and passed to collectives."""

    temporaries: int
    received: int
    operands: int | None
    seconds: float
    note: str
    is_too_large: bool = False


def _compile(step: AbstractStep, chips: int, arguments: int) -> _Program:
    """Compile a step and measure its program.

    Args:
        step: on a mesh of devices to compile for.
        chips: number of chips.
        arguments: bytes of the step's arguments on one chip.

    Raises:
        UserError: the compiler fails for another reason than memory.
    """
    started = time.perf_counter()
    try:
        program = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed, note = _required_memory(error)
        seconds = time.perf_counter() - started
        return _Program(max(0, needed - arguments), 0, None, seconds, f"compiler: {note}", is_too_large=True)
    memory, traffic = program.memory_analysis(), hlo.traffic(program.as_text(), chips)
    # Outputs that reuse no argument take memory of their own.
    outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    note = ""
    if traffic.unknown_loops:
        note = f"{traffic.unknown_loops} loops with an unknown trip count are counted once in the bytes over links"
    received, operands = sum(traffic.received.values()), sum(traffic.operands.values())
    return _Program(memory.temp_size_in_bytes + outputs, received, operands, time.perf_counter() - started, note)


def _required_memory(error: Exception) -> tuple[int, str]:
    """Return the bytes that a program would have needed, and the compiler's sentence about them.

    Raises:
        UserError: the compiler failed for another reason.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|\(([\d.]+)([KMG])\) exceeds available HBM.*", text)
    if "RESOURCE_EXHAUSTED" not in text or used is None:
        raise UserError(f"the step does not compile: {lines[0] if lines else type(error).__name__}") from None
    number, letter = (used[1], used[2]) if used[1] else (used[3], used[4])
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(float(number) * unit[letter]), used[0]

"""Before a run is paid for: does its step fit the chips, and how fast can it be at best?

The very step of `train.step` is lowered with abstract arrays. For a TPU it is compiled as well, by the TPU's own compiler,
which needs no TPU; for a GPU what it takes is estimated.
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
from reverie_jax.models.config import ARCHITECTURES
from reverie_jax.models.sharding import MESH_AXES, batch_sharding, mesh_axes, shardings
from reverie_jax.train.plan import costs, hlo
from reverie_jax.train.plan.topology import Topology, plan_mesh, tpu_devices
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.reference_model import ReferenceModel, without_adapters
from reverie_jax.train.step import TrainState, adapt, make_optimizer, make_step, trainable_filter

_UNKNOWN_STEPS = 1000
"""Stands for the steps that only the data can tell; they shape the learning rate and nothing else."""

ROOFLINE_FORMULA = (
    "max(model FLOPs / (chips x peak), bytes of memory / its bandwidth, bytes over links / their bandwidth), "
    "a lower bound"
)


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A train step and its arguments, none of which takes memory: every array is a shape, a type and a sharding."""

    model: VisionLanguageModel
    graph: nnx.GraphDef[VisionLanguageModel]
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: nnx.State
    batch: Batch
    recipe: Recipe
    mesh: Mesh | AbstractMesh
    reference: ReferenceModel

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the arguments on one chip; a batch is counted with what preference tuning's reference holds."""
        return {
            "base": chip_bytes(self.frozen),
            "trainable": chip_bytes(self.state.params),
            "optimizer": 0 if self.recipe.offload else chip_bytes((self.state.optimizer, self.state.step)),
            "batch": chip_bytes((self.batch, self.reference.held)),
        }

    def lower(self) -> Any:
        """The step for the mesh's devices, not compiled yet."""
        assert isinstance(self.mesh, Mesh)
        with jax.set_mesh(self.mesh):
            layout = jax.tree.map(lambda x: x.sharding, self.state)
            step: Any = make_step(
                self.graph, self.optimizer, self.recipe, reference=self.reference.graph, shardings=layout
            )
            return step.lower(self.state, self.frozen, self.batch, self.reference.held)


def chip_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, abstract or not, on one chip: each has a sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def model_name(recipe: str) -> str:
    """The architecture that a recipe's name stands for."""
    known = {"13b": "llava-1.5-13b", "phi3": "llava-phi3-mini", "1.0": "llava-1.0-7b"}
    return next((model for part, model in known.items() if part in recipe), "llava-1.5-7b")


def architecture(name: str) -> VLMConfig:
    """The published architecture of that name.

    Raises:
        UserError: there is none.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"--model {name}: unknown architecture; there is {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def mesh_sizes(text: str | None, chips: int) -> dict[str, int]:
    """Chips by axis from "data=2,fsdp=4"; all of them on fsdp by default.

    Raises:
        UserError: it is none, or does not take all chips.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    if text is None:
        return sizes | {"fsdp": chips}
    try:
        given = mesh_axes(text)
    except ValueError as error:
        raise UserError(f"--mesh {text}: {error}") from None
    sizes |= given
    if math.prod(sizes.values()) != chips:
        raise UserError(f"--mesh {text}: {math.prod(sizes.values())} chips of a topology of {chips}")
    return sizes


def abstract_step(
    config: VLMConfig, recipe: Recipe, mesh: Mesh | AbstractMesh, *, dtype: DTypeLike = jnp.bfloat16
) -> AbstractStep:
    """The step that `train.loop` would run on that mesh, with every argument's sharding.

    Raises:
        UserError: the rows cannot be spread over the mesh.
    """
    if not recipe.steps:
        recipe = dataclasses.replace(recipe, steps=_UNKNOWN_STEPS)
    spread = mesh.shape["data"] * mesh.shape["fsdp"]
    if recipe.batch_size // recipe.gradient_accumulation_steps % spread:
        raise UserError(
            f"{recipe.batch_size // recipe.gradient_accumulation_steps} rows of a micro-batch cannot be spread over data x fsdp = {spread} chips: "
            "set rows and accumulate, or a mesh with more of tensor"
        )

    def make() -> VisionLanguageModel:
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype)
        adapt(model, recipe)
        if recipe.quantization is not None:
            lora.quantize(model, recipe.quantization)
        return model

    model = nnx.eval_shape(make)
    graph, params, frozen = nnx.split(model, trainable_filter(recipe.trainable), ...)  # type: ignore[misc]
    optimizer = make_optimizer(recipe)
    whole = NamedSharding(mesh, PartitionSpec())

    moments = jax.eval_shape(optimizer.init, params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    layout = shardings(moments, mesh)
    if recipe.offload:
        layout = jax.tree.map(lambda home: home.with_memory_kind("pinned_host"), layout)
    state = TrainState(_placed(params, shardings(params, mesh)), _placed(moments, layout), step)
    frozen = _placed(frozen, shardings(frozen, mesh))
    reference = ReferenceModel()
    if recipe.preference is not None and recipe.preference.reference == "stored":
        reference = ReferenceModel(
            None, tuple(jax.ShapeDtypeStruct((2,), kind, sharding=whole) for kind in (jnp.int32, jnp.float32))
        )
    elif recipe.preference is not None:
        reference = ReferenceModel(
            without_adapters(model, recipe), nnx.filter_state(state.params, nnx.PathContains("projector"))
        )
    return AbstractStep(model, graph, optimizer, state, frozen, _batch(config, recipe, mesh), recipe, mesh, reference)


def _placed(tree: Any, layout: Any) -> Any:
    return jax.tree.map(lambda leaf, home: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home), tree, layout)


def _batch(config: VLMConfig, recipe: Recipe, mesh: Mesh | AbstractMesh) -> Batch:
    row, side, spread = recipe.sequence, config.vision.image_size, batch_sharding(mesh)

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=spread)

    tokens, edges, leaves, slots = (array(size) for size in (row.length, row.edges, row.questions, row.images))
    return Batch(
        tokens=tokens,
        positions=tokens,
        ends=tokens,
        image_slots=tokens,
        pixels=array(row.images, side, side, 3, dtype=jnp.uint8),
        parent=edges,
        target=edges,
        weight=array(row.edges, dtype=jnp.float32),
        branch=edges,
        origin=edges,
        leaves=leaves,
        questions=leaves,
        flat_tokens=slots,
        records=slots,
    )


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What a step takes on one chip, and the time that it needs at least.

    Attributes:
        bytes: on one chip, by kind; `activations` are all temporaries of the program.
        peak_bytes_per_chip: arguments + outputs - what is updated in place + temporaries.
        hbm_bytes_per_chip: memory of a chip, by its maker.
        flops_per_step: model FLOPs, all chips.
        collective_bytes_per_step: into one chip over its links.
        collective_operand_bytes_per_step: what one chip hands to collectives; None where that was not compiled.
        memory_traffic_per_step: bytes to and from one chip's memory, at least.
        roofline_seconds_per_step: a lower bound, see `ROOFLINE_FORMULA`.
        roofline: its parts, in seconds.
        compiled: by the chip's compiler; else estimated.
        compile_seconds: lowering and compiling, here.
        note: why it does not fit, in the compiler's words; or what the figures leave out.
    """

    recipe: str
    model: str
    topology: str
    mesh: dict[str, int]
    rows: int
    accumulate: int
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


def make_plan(
    config: VLMConfig,
    recipe: Recipe,
    topology: Topology,
    mesh: Mapping[str, int],
    *,
    model: str,
    dtype: DTypeLike = jnp.bfloat16,
    devices: list[Any] | None = None,
    compiled: bool = True,
) -> StepPlan:
    """The plan of one step.

    Args:
        mesh: chips by axis.
        model: name to report.
        devices: to compile for; those of the TPU topology by default.
        compiled: compile, where the topology can be compiled for.

    Raises:
        UserError: the rows cannot be spread over the mesh, or there is no compiler for the TPU.
    """
    compiled = compiled and (topology.is_tpu or devices is not None)
    if compiled and devices is None:
        devices = tpu_devices(topology)
    step = abstract_step(config, recipe, plan_mesh(topology, dict(mesh), devices if compiled else None), dtype=dtype)
    by_kind, sizes, width = step.bytes_by_kind(), costs.Sizes.of(step.model), jnp.dtype(dtype).itemsize
    work = costs.activations(config, sizes, recipe, mesh, width=width, trained=by_kind["trainable"])
    note, seconds, operands = "", 0.0, None
    if compiled:
        started = time.perf_counter()
        try:
            program = step.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            needed, note = _too_large(error)
            temporaries, links = max(0, needed - sum(by_kind.values())), 0
        else:
            temporaries, traffic = _temporaries(program), hlo.traffic(program.as_text(), topology.chips)
            links, operands = sum(traffic.received.values()), sum(traffic.operands.values())
            if traffic.unknown_loops:
                note = f"{traffic.unknown_loops} loops of unknown length are counted once in the bytes over links"
        seconds = time.perf_counter() - started
    else:
        temporaries = work.total
        links = costs.collective_bytes(config, sizes, recipe, mesh, width=width, trained=by_kind["trainable"])
        note = "activations are estimated by a formula (docs/plan.md); arguments are exact"
    peak, chip = sum(by_kind.values()) + temporaries, topology.chip
    flops, moved = costs.step_flops(config, sizes, recipe), costs.memory_bytes(recipe, mesh, by_kind, work.saved)
    roofline = {
        "compute": flops / topology.chips / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": links / topology.interconnect,
    }
    return StepPlan(
        recipe=recipe.name,
        model=model,
        topology=topology.name,
        mesh=dict(mesh),
        rows=recipe.batch_size,
        accumulate=recipe.gradient_accumulation_steps,
        dtype=str(jnp.dtype(dtype)),
        fits=peak <= chip.hbm and not note.startswith("compiler:"),
        peak_bytes_per_chip=peak,
        hbm_bytes_per_chip=chip.hbm,
        bytes=by_kind | {"activations": temporaries},
        flops_per_step=flops,
        collective_bytes_per_step=links,
        collective_operand_bytes_per_step=operands,
        memory_traffic_per_step=moved,
        roofline_seconds_per_step=max(roofline.values()),
        roofline=roofline,
        compiled=compiled,
        compile_seconds=round(seconds, 1),
        note=note,
    )


def _temporaries(program: Any) -> int:
    """Bytes of a compiled program on one chip beside its arguments: temporaries, and outputs that reuse no argument."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)


def _too_large(error: Exception) -> tuple[int, str]:
    """Bytes that a program would have needed, and the compiler's words; any other error is raised anew.

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
    return int(float(number) * unit[letter]), f"compiler: {used[0]}"

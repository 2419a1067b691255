"""Programs compiled for chips that are not there, and what their HLO must not contain."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from reverie_jax.eval import decode
from reverie_jax.eval.decode import Decoding
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.attention import attend
from reverie_jax.models.attention.tokamax import compiling_for
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import recipes
from reverie_jax.train.plan.plan import abstract_step
from reverie_jax.train.plan.topology import Topology, compile_devices

_RESULT = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(", re.M)
_FLOATS = re.compile(r"\b(f64|f32|bf16|f16)\[([\d,]+)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_FUSED = re.compile(r"\bcalls=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its HLO, bytes of temporaries, and seconds that it took to compile."""

    text: str
    temporaries: int
    seconds: float


def compiled(lower: Any) -> Program:
    """Compile what `lower()` returns."""
    started = time.perf_counter()
    program = lower().compile()
    seconds = time.perf_counter() - started
    return Program(program.as_text(), program.memory_analysis().temp_size_in_bytes, seconds)


def buffers(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return (operation, shape) of every float array that has memory of its own: not those within fusions."""
    fused = set(_FUSED.findall(text))
    found, inside = [], False
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = header[2] not in fused
        elif inside and (match := _RESULT.match(line)):
            for _, sides in _FLOATS.findall(match[1]):
                found.append((match[2], tuple(map(int, sides.split(",")))))
    return found


def squares(text: str, length: int, rows: int) -> set[tuple[int, ...]]:
    """Return shapes with two sides of at least `length` that are larger than one mask for each row."""
    return {
        shape
        for _, shape in buffers(text)
        if sum(side in range(length, length + 128) for side in shape) > 1
        and math.prod(shape) > rows * (length + 128) ** 2
    }


def gathered_stacks(text: str, layers: int) -> set[tuple[int, ...]]:
    """Return shapes of all-gathers of a whole stack of layers' weights."""
    return {
        shape
        for operation, shape in buffers(text)
        if operation.startswith("all-gather") and len(shape) > 2 and shape[0] == layers and math.prod(shape[1:]) > 2**20
    }


def devices_of(topology: str) -> list[Any]:
    return compile_devices(Topology.parse(topology))


def attention(topology: str, rows: int, length: int, heads: int, kv_heads: int, width: int, causal: bool) -> Program:
    """Compile attention, forward and backward, in bfloat16."""
    devices = devices_of(topology)[:1]
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((rows, length, h, width), jnp.bfloat16, sharding=sharding) for h in (heads, kv_heads))
    ends = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding) if causal else None

    def loss(q: Any, k: Any, v: Any, ends: Any) -> Any:
        return attend(q, k, v, ends).astype(jnp.float32).sum()

    def lower() -> Any:
        with jax.set_mesh(mesh), compiling_for(devices[0]):
            platform = "tpu" if devices[0].platform == "tpu" else "cuda"
            return jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, ends).lower(lowering_platforms=(platform,))

    return compiled(lower)


def generation(topology: str, architecture: str, rows: int, length: int, leaves: int, room: int) -> Program:
    """Compile prefill and decoding of a bfloat16 model."""
    devices = devices_of(topology)[:1]
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=devices)
    config = ARCHITECTURES[architecture]

    def build() -> VisionLanguageModel:
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        model.decoder.unstack()
        return model

    graph, state = nnx.split(nnx.eval_shape(build))
    recipe = recipes.RECIPES["reverie-1.5-7b-lora"]
    shape = dataclasses.replace(recipe.sequence, length=length, images=1, edges=1, questions=leaves)
    recipe = dataclasses.replace(recipe, sequence=shape, batch_size=rows, gradient_accumulation_steps=1)
    sharding = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    batch = abstract_step(config, recipe, mesh).batch

    def run(state: Any, batch: Any, longest: Any) -> Any:
        return decode.generate(nnx.merge(graph, state), batch, Decoding(room), (2,), longest=longest)

    def lower() -> Any:
        with jax.set_mesh(mesh), compiling_for(devices[0]):
            return jax.jit(run).lower(jax.tree.map(placed, state), batch, np.int32(room))

    return compiled(lower)

"""A whole model in Orbax format: what loads fastest, straight onto any mesh. All use of Orbax in `models` is here."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pydantic
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from reverie_jax.errors import CheckpointError
from reverie_jax.files import write_json
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel

PARAMS = "params"

_CHUNK_BYTES = 128 * 2**20


def _context(largest: int) -> ocp.Context:
    """Stacked matrices of a 7B model are 3 GB each: they go in pieces, and no two of them at once."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.array.saving.use_compression = False  # weights do not compress
    context.memory.write_concurrent_bytes = largest
    context.memory.read_concurrent_bytes = largest
    context.memory.transfer_concurrent_bytes = largest
    context.memory.deepcopy_host_arrays = False  # nothing changes them: this save is waited for
    return context


def _room(tree: Any) -> int:
    """Room for the largest parameter: Orbax refuses what is not smaller than its limit."""
    return 2**20 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _one_line(folder: Path, done: str) -> Iterator[None]:
    """Orbax has no error of its own: ValueError, KeyError, FileNotFoundError, TensorStore's. It also logs each at length."""
    logger = logging.getLogger("absl")
    level = logger.level
    others = set(threading.enumerate())
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # Its threads go on for a while; what they still write must not come back after the folder was cleared away.
        until = time.monotonic() + 2
        for thread in set(threading.enumerate()) - others:
            with contextlib.suppress(Exception):  # they raise theirs when they are joined
                thread.join(max(0.0, until - time.monotonic()))
        raise CheckpointError(f"{folder / PARAMS}: cannot be {done} ({reason[:300]})") from error
    finally:
        logger.setLevel(level)


def write_model(model: VisionLanguageModel, folder: Path) -> None:
    """config.json (`model_type` reverie) and the parameters; adapters have no place here.

    Raises:
        CheckpointError: the model carries adapters.
    """
    if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)).leaves:
        raise CheckpointError("the model carries adapters; merge them first")
    folder.mkdir(parents=True, exist_ok=True)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with _context(_room(parameters)), _one_line(folder, "written"):
        ocp.save(os.fspath((folder / PARAMS).resolve()), parameters)
    dtype = jax.numpy.dtype(model.compute_dtype).name
    write_json(
        folder / "config.json",
        {"model_type": "reverie", "torch_dtype": dtype, "architecture": dataclasses.asdict(model.config)},
    )


def read_config(folder: Path, raw: dict[str, Any]) -> VLMConfig:
    """The architecture that `write_model` wrote.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        return pydantic.TypeAdapter(VLMConfig).validate_python(raw.get("architecture"))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{folder / 'config.json'}: architecture.{where}: {first['msg']}") from None


def read_model(folder: Path, raw: dict[str, Any], *, dtype: DTypeLike | None, mesh: Mesh | None) -> VisionLanguageModel:
    """The model, each device reading what it holds.

    Raises:
        CheckpointError: the folder is broken.
    """
    config = read_config(folder, raw)
    kind = raw.get("torch_dtype", "float32") if dtype is None else dtype
    model = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jax.numpy.dtype(kind)))
    graph, state = nnx.split(model)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def home(variable: nnx.Variable[Any]) -> jax.ShapeDtypeStruct:
        spec = None if mesh is None else NamedSharding(mesh, partition_spec(variable.shape, variable.axes, mesh))
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=spec or one)

    variables, shape = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    wanted = nnx.to_pure_dict(jax.tree.unflatten(shape, [variable.replace(home(variable)) for variable in variables]))
    with _context(_room(wanted)), _one_line(folder, "read"):
        loaded = ocp.load(os.fspath((folder / PARAMS).resolve()), wanted)
    nnx.replace_by_pure_dict(state, loaded)
    return nnx.merge(graph, state)

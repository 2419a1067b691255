"""A complete model in Orbax format, which loads fastest and onto any mesh. `models` uses Orbax only here."""

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
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from reverie_jax.errors import CheckpointError
from reverie_jax.files import write_json
from reverie_jax.models.checkpoints.write import check_merged
from reverie_jax.models.config import VLMConfig
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vlm import VisionLanguageModel

_PARAMS = "params"

_CHUNK_BYTES = 128 * 2**20


def _context(concurrent_bytes: int) -> ocp.Context:
    """Return the settings of a save or load: stacked matrices of a 7B model are 3 GB each, so one at a time, in chunks."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.array.saving.use_compression = False  # weights do not compress
    context.memory.write_concurrent_bytes = concurrent_bytes
    context.memory.read_concurrent_bytes = concurrent_bytes
    context.memory.transfer_concurrent_bytes = concurrent_bytes
    context.memory.deepcopy_host_arrays = False  # the save is waited for, so nothing changes them
    return context


def _concurrent_bytes(tree: Any) -> int:
    """Return a limit just above the largest parameter: Orbax refuses parameters that reach its limit."""
    return 2**20 + max(int(leaf.size) * int(leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _one_line(folder: Path, action: str) -> Iterator[None]:
    """Replace Orbax's errors (ValueError, KeyError, TensorStore's, …), which it also logs at length, by one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    threads = set(threading.enumerate())
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        # Its threads run on for a while; they must not write files after the folder has been removed.
        deadline = time.monotonic() + 2
        for thread in set(threading.enumerate()) - threads:
            with contextlib.suppress(Exception):  # they raise their errors when they are joined
                thread.join(max(0.0, deadline - time.monotonic()))
        raise CheckpointError(f"{folder / _PARAMS}: cannot be {action} ({reason[:300]})") from error
    finally:
        logger.setLevel(level)


def write_model(model: VisionLanguageModel, folder: Path) -> None:
    """Write config.json (`model_type` reverie) and the parameters.

    Raises:
        CheckpointError: The model has adapters, or writing fails.
    """
    check_merged(model)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with _context(_concurrent_bytes(parameters)), _one_line(folder, "written"):
        ocp.save(os.fspath((folder / _PARAMS).resolve()), parameters)
    dtype = jnp.dtype(model.compute_dtype).name
    write_json(
        folder / "config.json",
        {"model_type": "reverie", "torch_dtype": dtype, "architecture": dataclasses.asdict(model.config)},
    )


def read_config(folder: Path, config: dict[str, Any]) -> VLMConfig:
    """Return the architecture that `write_model` wrote.

    Args:
        folder: The folder, for messages.
        config: Content of config.json.

    Raises:
        CheckpointError: It is invalid.
    """
    try:
        return pydantic.TypeAdapter(VLMConfig).validate_python(config.get("architecture"))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{folder / 'config.json'}: architecture.{field}: {first['msg']}") from None


def read_model(
    folder: Path, config: dict[str, Any], *, dtype: DTypeLike | None, mesh: Mesh | None
) -> VisionLanguageModel:
    """Read a model; each device reads only its own shards.

    Args:
        folder: The checkpoint.
        config: Content of config.json.
        dtype: As for `read.read_model`.
        mesh: As for `read.read_model`.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    architecture = read_config(folder, config)
    dtype = jnp.dtype(config.get("torch_dtype", "float32") if dtype is None else dtype)
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionLanguageModel(architecture, rngs=nnx.Rngs(0), dtype=dtype)))
    single_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        spec = None if mesh is None else NamedSharding(mesh, partition_spec(variable.shape, variable.axes, mesh))
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=spec or single_device))

    wanted = nnx.to_pure_dict(jax.tree.map(abstract, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
    with _context(_concurrent_bytes(wanted)), _one_line(folder, "read"):
        loaded = ocp.load(os.fspath((folder / _PARAMS).resolve()), wanted)
    for path, leaf in jax.tree_util.tree_flatten_with_path(loaded)[0]:
        if not bool(jnp.isfinite(leaf).all()):
            name = ".".join(str(key.key) for key in path)
            raise CheckpointError(
                f"{folder / _PARAMS}: {name} has values that are NaN, infinite or beyond {dtype.name}"
            )
    nnx.replace_by_pure_dict(state, loaded)
    return nnx.merge(graph, state)

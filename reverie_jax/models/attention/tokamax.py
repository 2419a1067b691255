"""Attention by the `ends` rule on NVIDIA GPUs, by tokamax's kernels: blocks of keys that no query of a block sees are skipped.

tokamax (extra `cuda13`; Python 3.12 or newer) has the rule as a mask by ranges: `q_end` of a key is its `ends`, and
`k_start` of a query is the first token of its tree, before which whole blocks are skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from reverie_jax.models.attention.mesh import shard_over_mesh
from reverie_jax.models.attention.rule import pad_ends, tree_starts

KERNELS = ("mosaic_gpu", "triton")
"""tokamax's implementations, in order: the first one that takes the chip, dtype and width is used."""
BLOCK = 128
"""Lengths are padded to a multiple of this: kernels for some chips refuse others."""


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def _gpu() -> Any:
    """Return the GPU that programs are made for, None without one: tokamax chooses its kernels when it is traced."""
    device = jax.config.jax_default_device or jax.devices()[0]
    return device if getattr(device, "platform", None) in ("gpu", "cuda") else None


def is_supported(dtype: DTypeLike, width: int) -> bool:
    """Return whether tokamax is installed, programs are made for an NVIDIA GPU, and it computes such heads."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or width % 8 or not _is_installed():
        return False
    return _gpu() is not None and bool(_kernels())


def _kernels() -> list[Any]:
    try:
        from tokamax._src.ops.attention import api
    except ImportError:  # a version whose parts have moved
        return []
    # One for each shape: there is nothing to do about it.
    logging.getLogger("absl").addFilter(_is_no_cache_miss)
    found = [api.IMPLEMENTATIONS[name] for name in KERNELS if name in api.IMPLEMENTATIONS]
    return [kernel for kernel in found if kernel.supported_on(_gpu())]


def _is_no_cache_miss(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Autotuning cache miss")


def attend_tokamax(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
    *,
    kernels: list[Any] | None = None,
) -> Float[Array, "B L H d"]:
    """Compute `attention.attend` on a GPU: scores never exist, keys after the query and in other trees are skipped.

    Under a (data, fsdp, tensor) mesh (`jax.set_mesh`) each device computes its own sequences and heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        ends: The rule; None lets every query see every key.
        kernels: tokamax's implementations to choose from; by default those for this GPU.

    Raises:
        NotImplementedError: None of the implementations takes such heads.
    """
    run = functools.partial(_attend, kernels=_kernels() if kernels is None else kernels)
    return shard_over_mesh(run, (q, k, v), ends, 4)


def _attend(q: Array, k: Array, v: Array, ends: Array | None = None, *, kernels: list[Any]) -> Array:
    from tokamax._src.ops.attention.base import Mask

    length, mask = q.shape[1], None
    if ends is not None:
        padded = -(-length // BLOCK) * BLOCK
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
        ends = pad_ends(ends, padded)
        mask = Mask(is_causal=True, q_end=ends[:, None], k_start=tree_starts(ends)[:, None])
    errors = []
    for kernel in kernels:
        try:
            return kernel(q, k, v, mask=mask)[:, :length]
        except NotImplementedError as error:
            errors.append(f"{type(kernel).__name__}: {error}")
    raise NotImplementedError("; ".join(errors))

"""Attention by the `ends` rule on NVIDIA GPUs, by tokamax's kernels; blocks of keys that nobody sees are skipped.

tokamax (extra `cuda13`; Python 3.12 or newer) has the rule as a mask by ranges: `q_end` of a key is its `ends`, and
`k_start` of a query is the first token of its tree, before which whole blocks are skipped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from reverie_jax.models.attention.mesh import shard_over_mesh
from reverie_jax.models.attention.rule import pad_ends, tree_starts

CAPABILITIES = ("9.0", "10.0")
"""Compute capabilities (Hopper, Blackwell of data centers) that tokamax has kernels of their own for, in both directions.

Its kernels for others are Triton's, whose support in JAX is about to end: cuDNN serves them.
"""
WIDEST = 128
"""Width of a head that the kernels are known to take."""
BLOCK = 128
"""Lengths are padded to a multiple of this: kernels for some chips refuse others."""


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def _gpu() -> Any:
    """Return the GPU that programs are made for, None without one: tokamax chooses its kernels when it is traced."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return device if getattr(device, "platform", None) in ("gpu", "cuda") else None


def is_supported(dtype: DTypeLike, width: int) -> bool:
    """Return whether tokamax is installed, has kernels for the GPU that programs are made for, and takes such heads."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or width % 8 or width > WIDEST or not _is_installed():
        return False
    return getattr(_gpu(), "compute_capability", "") in CAPABILITIES and _kernel() is not None


def _kernel() -> Any:
    """Return tokamax's attention; None in a version whose parts have moved."""
    try:
        from tokamax._src.ops.attention import api
    except ImportError:
        return None
    # One for each shape: there is nothing to do about it.
    logging.getLogger("absl").addFilter(_is_no_cache_miss)
    return api.IMPLEMENTATIONS.get("mosaic_gpu")


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Let programs be traced for a GPU that is not there, `train.plan`'s; other devices need nothing."""
    with contextlib.ExitStack() as stack:
        if device.platform in ("gpu", "cuda") and _is_installed():
            from tokamax import config

            stack.enter_context(config.cross_compile(True))
            stack.enter_context(jax.default_device(device))
        yield


def _is_no_cache_miss(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Autotuning cache miss")


def attend_tokamax(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
    *,
    kernel: Any = None,
) -> Float[Array, "B L H d"]:
    """Compute `attention.attend` on a GPU: scores never exist, keys after the query and in other trees are skipped.

    Under a (data, fsdp, tensor) mesh (`jax.set_mesh`) each device computes its own sequences and heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        ends: The rule; None lets every query see every key.
        kernel: tokamax's implementation; by default that of `CAPABILITIES`, its others are for tests.
    """
    run = functools.partial(_attend, kernel=kernel or _kernel())
    return shard_over_mesh(run, (q, k, v), ends, 4)


def _attend(q: Array, k: Array, v: Array, ends: Array | None = None, *, kernel: Any) -> Array:
    from tokamax._src.ops.attention.base import Mask

    length, mask = q.shape[1], None
    if ends is not None:
        padded = -(-length // BLOCK) * BLOCK
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
        ends = pad_ends(ends, padded)
        mask = Mask(is_causal=True, q_end=ends[:, None], k_start=tree_starts(ends)[:, None])
    return kernel(q, k, v, mask=mask)[:, :length]

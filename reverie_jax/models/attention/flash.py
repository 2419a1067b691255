"""Attention by the `ends` rule as TPU kernels: scores exist one block at a time, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from reverie_jax.models.attention import flash_kernels as kernels
from reverie_jax.models.attention import rule
from reverie_jax.models.attention.flash_kernels import LANES, KernelConfig
from reverie_jax.models.attention.mesh import shard_over_mesh

HeadsLast = Float[Array, "B L _ d"]
Stats = Float[Array, "B H P"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q: Any, k: Any, v: Any, ends: Any, block: int, interpret: bool) -> Any:
    return _flash_forward(q, k, v, ends, block, interpret)[0]


def _flash_forward(q: Any, k: Any, v: Any, ends: Any, block: int, interpret: bool) -> Any:
    run = functools.partial(_forward, block=block, interpret=interpret)
    out, lse = shard_over_mesh(run, (q, k, v), ends, (4, 3))
    return out, (q, k, v, ends, out, lse)


def _flash_backward(block: int, interpret: bool, residuals: Any, dout: Any) -> Any:
    q, k, v, ends, out, lse = residuals
    run = functools.partial(_backward, block=block, interpret=interpret)
    return *shard_over_mesh(run, (q, k, v, out, lse, dout), ends, (4, 4, 4)), None


_flash.defvjp(_flash_forward, _flash_backward)


def flash(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    ends: Int[Array, "B L"] | None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B L H d"]:
    """Compute `models.attention.attend` on a TPU; differentiable once, in q, k and v.

    Under a (data, fsdp, tensor) mesh (`jax.set_mesh`) each device runs the kernels on its own sequences and heads.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        ends: The rule; None lets every query see every key.
        block: Tokens of a block; on a TPU a multiple of 128.
        interpret: Run the kernels' bodies as XLA on any device, for tests.
    """
    return _flash(q, k, v, ends, kernels.block_size(q.shape[1]) if block is None else block, interpret)


def _heads_first(x: Float[Array, "B L H d"], padded: int) -> Float[Array, "B H P D"]:
    """Move the heads before the tokens; pad tokens to whole blocks and the width to whole lanes (as TPU memory does)."""
    length, width = x.shape[1], x.shape[3]
    x = x.transpose(0, 2, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - length), (0, pl.cdiv(width, LANES) * LANES - width)))


def _heads_last(x: Float[Array, "B H P D"], length: int, width: int) -> Float[Array, "B L H d"]:
    return x[:, :, :length, :width].transpose(0, 2, 1, 3)


def _padded_ends(config: KernelConfig, ends: Array | None, sequences: int) -> Int[Array, "B 1 P"]:
    if ends is None:  # not read
        return jnp.zeros((sequences, 1, config.blocks * config.block), jnp.int32)
    return rule.pad_ends(ends, config.blocks * config.block)[:, None]


def _kernel_config(q: Array, k: Array, ends: Array | None, block: int, interpret: bool) -> KernelConfig:
    return KernelConfig(q.shape[1], q.shape[3], block, q.shape[2] // k.shape[2], ends is not None, interpret)


def _forward(
    q: HeadsLast, k: HeadsLast, v: HeadsLast, ends: Array | None = None, *, block: int, interpret: bool
) -> tuple[HeadsLast, Stats]:
    """Return the output, and the log-sum-exp of each query's scores."""
    config = _kernel_config(q, k, ends, block, interpret)
    kinds = rule.block_kinds(ends, config.length, block)
    wide = [_heads_first(x, config.blocks * block) for x in (q, k, v)]
    query, key, ends_spec, stats = _query_major(config, wide[0].shape[3])
    out, lse = config.call(
        kernels.forward_kernel,
        (q.shape[0], q.shape[2], config.blocks, config.blocks),
        kinds,
        (*wide, _padded_ends(config, ends, q.shape[0])),
        matmuls=2,
        in_specs=[query, key, key, ends_spec],
        out_specs=[query, stats],
        out_shape=[
            jax.ShapeDtypeStruct(wide[0].shape, v.dtype),
            jax.ShapeDtypeStruct((*wide[0].shape[:2], 1, wide[0].shape[2]), jnp.float32),
        ],
        scratch_shapes=[_scratch(block), _scratch(block), _scratch(block, wide[0].shape[3])],
    )
    return _heads_last(out, config.length, config.width), lse[:, :, 0]


def _backward(
    q: HeadsLast,
    k: HeadsLast,
    v: HeadsLast,
    out: HeadsLast,
    lse: Stats,
    dout: HeadsLast,
    ends: Array | None = None,
    *,
    block: int,
    interpret: bool,
) -> tuple[HeadsLast, HeadsLast, HeadsLast]:
    """Return the gradients of q, k and v."""
    config = _kernel_config(q, k, ends, block, interpret)
    kinds = rule.block_kinds(ends, config.length, block)
    wide_q, wide_k, wide_v, wide_out, wide_dout = (_heads_first(x, config.blocks * block) for x in (q, k, v, out, dout))
    delta = (wide_out.astype(jnp.float32) * wide_dout.astype(jnp.float32)).sum(-1)
    arrays = (
        wide_q,
        wide_k,
        wide_v,
        _padded_ends(config, ends, q.shape[0]),
        wide_dout,
        lse[:, :, None],
        delta[:, :, None],
    )
    width = wide_q.shape[3]
    query, key, ends_spec, stats = _query_major(config, width)
    dq = config.call(
        kernels.query_kernel,
        (q.shape[0], q.shape[2], config.blocks, config.blocks),
        kinds,
        arrays,
        matmuls=3,
        in_specs=[query, key, key, ends_spec, query, stats, stats],
        out_specs=query,
        out_shape=jax.ShapeDtypeStruct(wide_q.shape, q.dtype),
        scratch_shapes=[_scratch(block, width), _scratch(block), _scratch(block)],
    )
    query, key, ends_spec, stats = _key_major(config, width)
    dk, dv = config.call(
        kernels.key_kernel,
        (k.shape[0], k.shape[2], config.blocks, config.group, config.blocks),
        kinds.swapaxes(1, 2),
        arrays,
        matmuls=4,
        in_specs=[query, key, key, ends_spec, query, stats, stats],
        out_specs=[key, key],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (wide_k, wide_v)],
        scratch_shapes=[_scratch(block, width), _scratch(block, width), _scratch(block, dtype=jnp.int32)],
    )
    dq, dk, dv = (_heads_last(x, config.length, config.width) for x in (dq, dk, dv))
    return dq, dk, dv


def _scratch(block: int, width: int = LANES, dtype: Any = jnp.float32) -> Any:
    return pltpu.VMEM((block, width), dtype)


def _query_major(config: KernelConfig, width: int) -> tuple[pl.BlockSpec, ...]:
    """Return block specs of queries, keys, ends and statistics on a grid (sequence, head, query block, key block)."""

    def key_block(b: Any, i: Any, j: Any, resident: Any) -> Any:
        return resident[config.table_index(b, i, j)]

    return (
        pl.BlockSpec((None, None, config.block, width), lambda b, h, i, j, _, resident: (b, h, i, 0)),
        pl.BlockSpec(
            (None, None, config.block, width),
            lambda b, h, i, j, _, resident: (b, jax.lax.div(h, config.group), key_block(b, i, j, resident), 0),
        ),
        pl.BlockSpec((None, 1, config.block), lambda b, h, i, j, _, resident: (b, 0, key_block(b, i, j, resident))),
        pl.BlockSpec((None, None, 1, config.block), lambda b, h, i, j, _, resident: (b, h, 0, i)),
    )


def _key_major(config: KernelConfig, width: int) -> tuple[pl.BlockSpec, ...]:
    """Return the same specs on a grid (sequence, key head, key block, head within the group, query block)."""

    def query_block(b: Any, j: Any, i: Any, resident: Any) -> Any:
        return resident[config.table_index(b, j, i)]

    return (
        pl.BlockSpec(
            (None, None, config.block, width),
            lambda b, h, j, g, i, _, resident: (b, h * config.group + g, query_block(b, j, i, resident), 0),
        ),
        pl.BlockSpec((None, None, config.block, width), lambda b, h, j, g, i, _, resident: (b, h, j, 0)),
        pl.BlockSpec((None, 1, config.block), lambda b, h, j, g, i, _, resident: (b, 0, j)),
        pl.BlockSpec(
            (None, None, 1, config.block),
            lambda b, h, j, g, i, _, resident: (b, h * config.group + g, 0, query_block(b, j, i, resident)),
        ),
    )

"""Bodies of the flash-attention kernels (Pallas, Mosaic) and their block tables; `attention.flash` calls them.

Queries and keys are divided into blocks of one size. `rule.block_kinds` says whether a pair of blocks is skipped, computed
with the mask, or computed without it (every query sees every key). A skipped pair also moves no data: the block in its
place is the one that the next computed pair needs (`resident_blocks`). Mosaic prefetches both tables as scalars.

Names: B sequences, H query heads, K key heads, L length, P length padded to blocks, D width padded to lanes, N = P / block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from reverie_jax.models.attention.rule import MASKED, SKIPPED, WHOLE

LANES = 128  # the width of a TPU register; also what a block's size is a multiple of
LONGEST_BLOCK = 640  # 640 x 640 float32 scores and the backward pass's copies of them fit in a v5e's scoped memory
LOW = -0.7 * float(jnp.finfo(jnp.float32).max)  # minus infinity would make NaN of a difference of two


def block_size(length: int) -> int:
    """Return the block size that pads `length` least, the largest of equals; short sequences are one block."""
    whole = pl.cdiv(length, LANES) * LANES
    if whole <= LONGEST_BLOCK:
        return whole
    return min(range(LONGEST_BLOCK, LANES, -LANES), key=lambda block: pl.cdiv(length, block) * block)


def resident_blocks(kinds: Int[Array, "R N M"]) -> Int[Array, "R N M"]:
    """Return the block in memory at each of M steps: the next one to be computed, or the last one without a next."""
    steps = kinds.shape[-1]
    step = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None, None, :], kinds.shape)
    ahead = jax.lax.cummin(jnp.where(kinds > SKIPPED, step, steps), axis=2, reverse=True)
    last = jnp.where(kinds > SKIPPED, step, 0).max(-1, keepdims=True)
    return jnp.minimum(ahead, last)


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """Contract axis `contract[0]` of a with `contract[1]` of b; float32 stays float32 instead of one bfloat16 pass."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _column(row: Any) -> Any:
    """Return a row vector (1, n) as LANES equal columns (n, LANES)."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


class KernelConfig(NamedTuple):
    """Static sizes and switches of the kernels."""

    length: int
    width: int
    block: int
    group: int
    causal: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        """Number of blocks in a sequence."""
        return pl.cdiv(self.length, self.block)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.width**-0.5)

    def mask(self, scores: Any, ends: Any, queries: Any, keys: Any, query_axis: int) -> Any:
        """Return scores with LOW where the query does not see the key.

        Args:
            scores: One block.
            ends: The keys' ends, of a shape that broadcasts over the queries' axis.
            queries: Index of the block of queries.
            keys: Index of the block of keys.
            query_axis: Axis of the queries in `scores`.
        """
        key = keys * self.block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
        if not self.causal:
            return jnp.where(key < self.length, scores, LOW)
        query = queries * self.block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
        return jnp.where((key <= query) & (query < ends), scores, LOW)

    def table_index(self, row: Any, outer: Any, inner: Any) -> Any:
        """Return the index of a pair of blocks in the flat tables; without ends, all sequences share one table."""
        return ((row if self.causal else 0) * self.blocks + outer) * self.blocks + inner

    def call(
        self, kernel: Callable[..., None], grid: tuple[int, ...], kinds: Any, arrays: Any, matmuls: int, **spec: Any
    ) -> Any:
        """Run a kernel over a grid whose first three axes are independent; its first two operands are the tables."""
        half = 2 if self.causal else 1
        scores = functools.reduce(int.__mul__, grid) * self.block**2 // half
        return pl.pallas_call(
            functools.partial(kernel, self),
            out_shape=spec.pop("out_shape"),
            grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=grid, **spec),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * 3 + (pltpu.ARBITRARY,) * (len(grid) - 3)
            ),
            # so that XLA knows how much communication fits behind the kernel
            cost_estimate=pl.CostEstimate(
                flops=2 * matmuls * scores * arrays[0].shape[-1],
                transcendentals=scores,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=self.interpret,
        )(kinds.reshape(-1), resident_blocks(kinds).reshape(-1), *arrays)

    def dispatch(self, kind: Any, add: Callable[[bool], None]) -> None:
        """Run `add(masked)` unless the pair of blocks is skipped."""
        pl.when(kind == MASKED)(functools.partial(add, True))
        pl.when(kind == WHOLE)(functools.partial(add, False))


def forward_kernel(
    config: KernelConfig,
    kinds: Any,
    resident: Any,
    q: Any,
    k: Any,
    v: Any,
    ends: Any,
    out: Any,
    lse: Any,
    top: Any,
    total: Any,
    acc: Any,
) -> None:
    """Compute one block of queries over the blocks of keys: running maximum and sum (in all lanes), and weighted values."""
    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def start() -> None:
        top[...] = jnp.full_like(top, LOW)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def add(masked: bool) -> None:
        scores = _dot(q[...], k[...], (1, 1)) * config.scale
        if masked:
            scores = config.mask(scores, ends[...], i, j, query_axis=0)
        # Before a query's first visible key, the sums are meaningless (its maximum is LOW); that key resets them: fade = 0.
        new = jnp.maximum(top[...], scores.max(1, keepdims=True))
        fade, weights = jnp.exp(top[...] - new), jnp.exp(scores - new[:, :1])
        top[...] = new
        total[...] = total[...] * fade + weights.sum(1, keepdims=True)
        acc[...] = acc[...] * fade[:, :1] + _dot(weights.astype(v.dtype), v[...], (1, 0))

    config.dispatch(kinds[config.table_index(row, i, j)], add)

    @pl.when(j == config.blocks - 1)
    def finish() -> None:
        out[...] = (acc[...] / total[:, :1]).astype(out.dtype)
        lse[...] = (top[...] + jnp.log(total[...])).T[:1]


def query_kernel(
    config: KernelConfig,
    kinds: Any,
    resident: Any,
    *refs: Any,
) -> None:
    """Compute the gradient of one block of queries, over the blocks of keys."""
    q, k, v, ends, dout, lse, delta, dq, acc, lses, deltas = refs
    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def start() -> None:
        acc[...] = jnp.zeros_like(acc)
        lses[...], deltas[...] = _column(lse[...]), _column(delta[...])

    def add(masked: bool) -> None:
        scores = _dot(q[...], k[...], (1, 1)) * config.scale
        if masked:
            scores = config.mask(scores, ends[...], i, j, query_axis=0)
        weights = jnp.exp(scores - lses[:, :1])
        dscores = weights * (_dot(dout[...], v[...], (1, 1)) - deltas[:, :1])
        acc[...] += _dot(dscores.astype(k.dtype), k[...], (1, 0))

    config.dispatch(kinds[config.table_index(row, i, j)], add)

    @pl.when(j == config.blocks - 1)
    def finish() -> None:
        dq[...] = (acc[...] * config.scale).astype(dq.dtype)


def key_kernel(config: KernelConfig, kinds: Any, resident: Any, *refs: Any) -> None:
    """Compute the gradients of one block of keys and values, over the group's heads and the blocks of queries.

    Scores are [key, query] here, so that the sums over queries are plain products.
    """
    q, k, v, ends, dout, lse, delta, dk, dv, acc_k, acc_v, ends_column = refs
    row, j, member, i = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((member == 0) & (i == 0))
    def start() -> None:
        acc_k[...], acc_v[...] = jnp.zeros_like(acc_k), jnp.zeros_like(acc_v)
        ends_column[...] = _column(ends[...])

    def add(masked: bool) -> None:
        scores = _dot(k[...], q[...], (1, 1)) * config.scale
        if masked:
            scores = config.mask(scores, ends_column[:, :1], i, j, query_axis=1)
        weights = jnp.exp(scores - lse[...])
        acc_v[...] += _dot(weights.astype(dout.dtype), dout[...], (1, 0))
        dscores = weights * (_dot(v[...], dout[...], (1, 1)) - delta[...])
        acc_k[...] += _dot(dscores.astype(q.dtype), q[...], (1, 0))

    config.dispatch(kinds[config.table_index(row, j, i)], add)

    @pl.when((member == config.group - 1) & (i == config.blocks - 1))
    def finish() -> None:
        dk[...] = (acc_k[...] * config.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)

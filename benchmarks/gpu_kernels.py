"""Part of `benchmarks.gpu`: every way of attention against the dense rule in float32, and its speed."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

WIDTHS = (64, 80, 96, 128)
# Rows, length, heads, key heads, width, and whether `ends` is given (not in a tower).
CASES = [
    (2, 2048, 8, 8, 64, True),
    (2, 1999, 8, 2, 80, True),
    (2, 2048, 8, 8, 96, True),
    (2, 1999, 8, 2, 128, True),
    (2, 577, 16, 16, 64, False),
]
TIMED = [(2, 2048, 32, 32, 128, True), (2, 4096, 32, 32, 128, True)]
TINY_CASES, TINY_TIMED = [(1, 47, 4, 2, 16, True), (1, 40, 2, 2, 16, False)], [(1, 64, 2, 2, 16, True)]


def random_ends(random: np.random.Generator, length: int) -> np.ndarray:
    """Return `ends` of a row of random trees, with some padding."""
    ends = np.arange(1, length + 1, dtype=np.int32)

    def grow(start: int, stop: int) -> None:
        if start < stop:
            run = int(random.integers(1, max(2, (stop - start) * 2 // 3)))
            ends[start : start + run] = stop
            cuts = sorted(random.integers(start + run, stop + 1, 2).tolist())
            for first, last in zip([start + run, *cuts], [*cuts, stop], strict=True):
                grow(first, last)

    edges = np.linspace(0, length - length // 20, 5).astype(int).tolist()
    for start, stop in itertools.pairwise(edges):
        grow(start, stop)
    return ends


def ways() -> dict[str, Callable[..., Any]]:
    """Return the ways that this device can take; `attend` is the one that models take."""
    import jax
    import jax.numpy as jnp

    from reverie_jax.models import attention
    from reverie_jax.models.attention import cudnn, tokamax

    found = {"attend": attention.attend, "chunked": attention.attend_chunked, "dense": attention.attend_dense}
    if jax.default_backend() == "cpu":
        found["blocks"] = attention.attend_blocks
    if tokamax.is_supported(jnp.bfloat16, 128):
        found["tokamax"] = tokamax.attend_tokamax
    if jax.default_backend() == "gpu" and cudnn.is_supported(jnp.bfloat16, 128):
        found["cudnn"] = cudnn.attend_cudnn
    return found


def both(attend: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any, ends: Any) -> Any:
    import jax

    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, ends), q, k, v)
    return out, *back(dout)


def forward(attend: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any, ends: Any) -> Any:
    return attend(q, k, v, ends)


def inputs(case: tuple[int, int, int, int, int, bool]) -> tuple[list[Any], Any]:
    import jax.numpy as jnp

    rows, length, heads, kv_heads, width, ruled = case
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((rows, length, h, width), np.float32) for h in (heads, kv_heads, kv_heads, heads)]
    ends = np.stack([random_ends(random, length) for _ in range(rows)]) if ruled else None
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays], None if ends is None else jnp.asarray(ends)


def name_of(case: tuple[int, int, int, int, int, bool]) -> str:
    rows, length, heads, kv_heads, width, ruled = case
    return f"{rows} x {length} x {heads}/{kv_heads} x {width}{'' if ruled else ', no rule'}"


def errors(attend: Callable[..., Any], arrays: list[Any], ends: Any, exact: Any) -> dict[str, Any]:
    """Return the largest errors of values and gradients, relative to the largest exact one."""
    import jax

    got = jax.jit(functools.partial(both, attend))(*arrays, ends)
    return {
        name: float(np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max())
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, exact, strict=True)
    }


def speed(attend: Callable[..., Any], arrays: list[Any], ends: Any, pairs: int, tiny: bool) -> dict[str, Any]:
    """Return milliseconds, and FLOP/s of the pairs that the rule shows."""
    import jax

    result = {}
    _, _, heads, width = arrays[0].shape
    for label, function, flops in (("forward", forward, 4), ("both", both, 12)):
        run = jax.jit(functools.partial(function, attend))
        jax.block_until_ready(run(*arrays, ends))
        taken, times = [], 2 if tiny else 10
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(times):
                out = run(*arrays, ends)
            jax.block_until_ready(out)
            taken.append((time.perf_counter() - started) / times)
        result[f"{label}_ms"] = 1e3 * min(taken)
        result[f"{label}_tflops"] = flops * pairs * heads * width / min(taken) / 1e12
    return result


def attempt(call: Callable[[], Any]) -> Any:
    """Return a result, or the error as text: one kernel that fails leaves the others."""
    try:
        return call()
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)[:200]}"


def run(tiny: bool, report: Callable[[dict[str, Any]], None]) -> None:
    import jax
    import jax.numpy as jnp

    from reverie_jax.models.attention import attend_dense

    found: dict[str, Any] = {}
    for case in TINY_CASES if tiny else CASES:
        arrays, ends = inputs(case)
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(functools.partial(both, attend_dense))(*(x.astype(jnp.float32) for x in arrays), ends)
        exact = [np.asarray(x) for x in exact]
        # Compiling takes most of the time, and does not hold the interpreter.
        with ThreadPoolExecutor(1 if tiny else 4) as pool:
            jobs = {
                way: pool.submit(attempt, functools.partial(errors, attend, arrays, ends, exact))
                for way, attend in ways().items()
            }
            found |= {f"{name_of(case)} {way}": job.result() for way, job in jobs.items()}
        report({"error": dict(found)})
    timed: dict[str, Any] = {}
    for case in TINY_TIMED if tiny else TIMED:
        arrays, ends = inputs(case)
        pairs = int((np.asarray(ends) - np.arange(case[1])).sum())
        for way, attend in ways().items():
            timed[f"{name_of(case)} {way}"] = attempt(functools.partial(speed, attend, arrays, ends, pairs, tiny))
            report({"speed": dict(timed)})

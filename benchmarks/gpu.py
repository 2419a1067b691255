"""Everything that a GPU has to show, in one command of at most eight minutes: one table, one JSON file.

    python -m benchmarks.gpu [--out gpu.json] [--budget 480] [--tiny] [--parts NAME ...]

Weights are random and drawn on the device; nothing is downloaded. Each part (`PARTS`) is a process of its own, which gives
the memory back that it took. It is skipped where fewer seconds are left of the budget than it is expected to take, ended
at twice as many, and a part that fails does not stop the others. The file is written anew after each part, with what the
part had measured until then, so that nothing is lost if the command is ended. `--tiny` runs the same at a tiny size in this
process, on a CPU too.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_evaluate, gpu_kernels, gpu_train
from reverie_jax.files import write_json

Report = Callable[[dict[str, Any]], None]
"""Keeps facts that a part has found; later ones replace earlier ones of the same name."""

SEED = 0


@dataclasses.dataclass(frozen=True)
class Part:
    """A part: what it is expected to take on an H100, in seconds, and what it does."""

    seconds: float
    run: Callable[[bool, Report], None]


def device(tiny: bool, report: Report) -> None:
    """Report what the figures are of: device, versions, the way of attention."""
    import jax
    import jax.numpy as jnp

    from reverie_jax.models import attention

    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    versions = {}
    for name in ("jax", "jaxlib", "flax", "tokamax", "torch", "transformers", "peft", "flash-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    ways = {str(w): attention.ways_of(jnp.bfloat16, w) for w in gpu_kernels.WIDTHS}
    report(
        {
            "device": jax.devices()[0].device_kind,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "versions": versions,
            "attention": {w: getattr(way.get(platform, way["default"]), "__name__", "") for w, way in ways.items()},
            "commit": output("git", "rev-parse", "HEAD"),
            "seed": SEED,
        }
    )


def output(*command: str) -> str | None:
    """Return what a command prints; None where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


PARTS: dict[str, Part] = {
    "device": Part(10, device),
    "kernels": Part(70, gpu_kernels.run),
    "train: tree": Part(75, gpu_train.tree),
    "train: flat": Part(60, gpu_train.flat),
    "train: peer": Part(55, gpu_train.peer),
    "train: tree, nf4": Part(70, gpu_train.nf4),
    "evaluate: ours": Part(60, gpu_evaluate.ours),
    "evaluate: peers": Part(60, gpu_evaluate.peers),
}


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("gpu.json")
    """JSON file to write."""
    budget: float = 480
    """Seconds that everything may take."""
    tiny: bool = False
    """Run all parts at a tiny size, in this process."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Parts to run."""
    part: str | None = None
    """Run this part alone, in this process, and write what it finds to `out`."""


def run_here(name: str, tiny: bool, keep: Report) -> str:
    """Run a part in this process; return "done", or what went wrong."""
    try:
        PARTS[name].run(tiny, keep)
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {str(error)[:500]}"
    return "done"


def run_apart(name: str, out: Path, seconds: float) -> tuple[dict[str, Any], str]:
    """Run a part in a process of its own; return what it found, and "done" or what went wrong."""
    file = out.with_name(f"{out.name}.part")
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(file)]
    try:
        code = subprocess.run(command, timeout=max(0.001, seconds), cwd=Path(__file__).parent.parent).returncode
        state = f"failed: the process ended with code {code}"
    except subprocess.TimeoutExpired:
        state = f"ended after {seconds:.0f} s"
    if not file.exists():
        return {}, state
    facts: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return facts, facts.pop("state", state)


def run(args: Args, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Run the parts and return what is written."""
    started = clock()
    result: dict[str, Any] = {"tiny": args.tiny, "budget": args.budget, "parts": {}}
    for name in args.parts:
        left, expected = args.budget - (clock() - started), PARTS[name].seconds
        facts: dict[str, Any] = {}
        before = clock()
        if left < expected:
            state = f"skipped: takes about {expected:.0f} s, {max(0, left):.0f} s are left"
        elif args.tiny:
            state = run_here(name, True, facts.update)
        else:
            facts, state = run_apart(name, args.out.resolve(), min(left, 2 * expected))
        seconds = round(clock() - before, 1)
        result["parts"][name] = {"state": state, "expected": expected, "seconds": seconds, **facts}
        write_json(args.out, result | {"seconds": round(clock() - started, 1)})
        print(f"{name}: {state}, {seconds} s", file=sys.stderr)
    return result | {"seconds": round(clock() - started, 1)}


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table: a part's figures below its name and state."""
    rows = Table("part", "what", "figures", title="tiny" if result["tiny"] else None)
    for name, part in result["parts"].items():
        rows.add_row(name, part["state"], f"{part['seconds']:g} s, expected {part['expected']:g}")
        for key, value in part.items():
            if key in ("state", "seconds", "expected"):
                continue
            for what, figures in value.items() if isinstance(value, dict) else [("", value)]:
                text = figures
                if isinstance(figures, dict):
                    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
                elif isinstance(figures, float):
                    text = f"{figures:.4g}"
                rows.add_row("", f"{key} {what}".strip(), str(text))
    return rows


def main(args: Args) -> None:
    # Before JAX starts: torch and other parts need the memory, and a second run compiles nothing anew.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("build/gpu-programs").resolve()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.part is not None:
        facts: dict[str, Any] = {}

        def keep(found: dict[str, Any]) -> None:
            facts.update(found)
            write_json(args.out, facts)

        keep({"state": run_here(args.part, args.tiny, keep)})
        return
    Console(width=120).print(table(run(args)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

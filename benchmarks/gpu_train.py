"""Part of `benchmarks.gpu`: a 7B LoRA step at REVERIE's proportions, by ours and by transformers and peft."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]
KINDS = {
    "attention": ("attention", "attend", "flash", "fmha", "sdpa", "mosaic"),
    "GEMM": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "matmul", "dot", "conv"),
}


def arguments(tiny: bool, **changes: Any) -> Any:
    from benchmarks.workload import Args

    size: dict[str, Any] = {"size": "tiny", "images": 1} if tiny else {"size": "7b", "images": 32, "micro_batch": 2}
    return Args(**{"rounds": 1 if tiny else 3, **size, **changes})


def side(args: Any, report: Report, *, profiled: bool = False) -> None:
    """Take the steps of the one way in `args`, and report its rates."""
    import jax
    from flax import nnx

    from benchmarks.train_sides import our_ways, peer_way, recipe_for
    from benchmarks.workload import make_work
    from reverie_jax.models import VisionLanguageModel
    from reverie_jax.train.plan import costs
    from reverie_jax.train.plan.topology import chip_of
    from reverie_jax.train.step import make_trainable

    work, (name,) = make_work(args), args.ways
    with tempfile.TemporaryDirectory() as folder:
        if name == "peer" and args.chosen.equal_weights:
            our_ways(args, work, Path(folder))  # writes what the peer reads
        found = peer_way(args, work, Path(folder)) if name == "peer" else our_ways(args, work, Path(folder))
        way = found[name]
        recipe = recipe_for(args.chosen, args.chosen.micro_batch, prefix_sharing=name == "tree")

        def abstract() -> VisionLanguageModel:
            model = VisionLanguageModel(args.chosen.config, rngs=nnx.Rngs(0))
            make_trainable(model, recipe)
            return model

        sizes = costs.Sizes.of(nnx.eval_shape(abstract))
        flops = costs.model_flops(args.chosen.config, sizes, recipe, **way.useful)
        started = time.perf_counter()
        losses = [way.step()]
        first, taken = time.perf_counter() - started, []
        report({"first_step_seconds": first, "program_bytes": way.planned(), "computed": way.computed})
        way.step()
        for _ in range(args.rounds):
            started = time.perf_counter()
            losses.append(way.step())
            taken.append(time.perf_counter() - started)
        seconds = statistics.median(taken)
        chip = chip_of(jax.devices()[0].device_kind if name != "peer" else way.device)
        report(
            {
                "step_seconds": seconds,
                "conversations_per_second": work.count / seconds,
                "tokens_per_second": work.tokens / seconds,
                "mfu": None if chip is None else flops / seconds / chip.flops,
                "model_flops": flops,
                "useful": way.useful,
                "peak_bytes": way.peak(),
                "estimated_bytes": None if name == "peer" else estimated_bytes(args, recipe),
                "losses": losses,
            }
        )
        if profiled:
            report({"profile": profile(way.step)})


def estimated_bytes(args: Any, recipe: Any) -> int:
    """Return the plan's peak by its formula; `program_bytes` is what a compiled plan says."""
    import jax
    import jax.numpy as jnp

    from reverie_jax.train.plan.plan import make_plan
    from reverie_jax.train.plan.topology import Topology

    kind = "h200" if "h200" in jax.devices()[0].device_kind.lower() else "h100"
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    recipe = dataclasses.replace(recipe, quantization=args.quantization)
    topology, dtype = Topology.parse(f"{kind}:1"), jnp.dtype(args.precision)
    plan = make_plan(args.chosen.config, recipe, topology, mesh, architecture=args.size, dtype=dtype, compiled=False)
    return plan.peak_bytes_per_chip


def profile(step: Callable[[], float]) -> dict[str, Any]:
    """Return the share of a step's device time by kind of kernel, and the longest kernels."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        (file,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
        with gzip.open(file) as stream:
            return shares(json.load(stream)["traceEvents"])


def shares(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum a trace's kernels: events that belong to an operation of a program. Durations are in microseconds."""
    threads = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    kernels = [e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {})]
    kernels = [e for e in kernels if not e["name"].startswith(("while", "call", "conditional"))]  # they contain others
    streams = [e for e in kernels if threads.get((e["pid"], e["tid"]), "").startswith("Stream")]
    times: Counter[str] = Counter()
    kinds: Counter[str] = Counter(dict.fromkeys((*KINDS, "other"), 0))
    for event in streams or kernels:  # a GPU's streams; the same kernels may be listed by operation too
        described = " ".join([event["name"], *map(str, event["args"].values())]).lower()
        times[event["name"]] += event["dur"]
        kind = next((kind for kind, words in KINDS.items() if any(word in described for word in words)), "other")
        kinds[kind] += event["dur"]
    total = sum(times.values()) or 1
    top = {name[:80]: time / total for name, time in times.most_common(15)}
    return {"kinds": {kind: time / total for kind, time in kinds.items()}, "top": top, "milliseconds": total / 1e3}


def tree(tiny: bool, report: Report) -> None:
    side(arguments(tiny, ways=("tree",)), report, profiled=True)


def flat(tiny: bool, report: Report) -> None:
    side(arguments(tiny, ways=("flat",), **({} if tiny else {"rounds": 2})), report)


def nf4(tiny: bool, report: Report) -> None:
    side(arguments(tiny, ways=("tree",), quantization="nf4"), report)


def peer(tiny: bool, report: Report) -> None:
    names = ["sdpa"] + ["flash_attention_2"] * (not tiny and importlib.util.find_spec("flash_attn") is not None)
    for number, name in enumerate(names):
        found: dict[str, Any] = {}
        side(arguments(tiny, ways=("peer",), attention=name, **({} if tiny else {"rounds": 2})), found.update)
        report({name: found} if number else found | {"attention": name})

"""One LoRA step, ours against transformers, peft and torch's AdamW: the same conversations and images, in tokens/s.

    python -m benchmarks.train_step [--size tiny|small|7b] [--dtype float32|bfloat16] [--images N] [--rounds N] [--apart]

Prints one JSON object. A step supervises every conversation about N images (REVERIE's proportions, `mixture_scale`) and
ends in one update of the adapters on every linear layer of the decoder and of the whole projector. Three ways, alternating:

    peer  LlavaForConditionalGeneration: a conversation per sequence with its own image, conversations of similar length
          together (as LLaVA batches them), padded to the longest of the batch; each layer checkpointed, tower without
          gradients. Padding comes last, where causal attention never looks, so no mask is passed and torch's fastest
          attention runs.
    flat  ours, without prefix sharing (`Recipe.prefix_sharing`): a conversation per tree, packed into sequences.
    tree  ours, an image's conversations as one tree, packed into the same sequences.

Tokens/s counts the tokens of the conversations one by one, image tokens included and padding excluded; supervised tokens/s
counts their supervised tokens. All ways share the numerator, so rates differ as seconds do; `computed` reports the tokens
that are actually computed. The loss is the mean over all supervised tokens of the step: one that k conversations share
counts k times. With equal weights (all sizes but 7b) the first two losses of all ways must agree before anything is timed;
the second one depends on the first step's gradients. These two steps, compilation included, are not timed. Batches are on
the device before a step begins. `cpu_seconds` are those of all cores: on a busy machine they are more reliable than the
clock.

Without --tokenizer a small tokenizer is used, with as many tokens per word as LLaMA's has in English.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.train_sides import our_ways, peer_way
from benchmarks.workload import SIZES, WAYS, Args, Work, make_work, spread


def check(losses: dict[str, list[float]], args: Args) -> None:
    """Check that all ways with the same weights have the same loss, before the first step and after it.

    Raises:
        RuntimeError: they do not do the same work.
    """
    alike = {way: values for way, values in losses.items() if SIZES[args.size].equal_weights or way != "peer"}
    # Adam's first step is the gradient's sign, so the second loss includes rounding that the first does not.
    tolerances = (1e-4, 1e-3) if args.precision == "float32" else (1e-2, 1e-2)
    for number, tolerance in enumerate(tolerances):
        first = [values[number] for values in alike.values()]
        if not all(math.isfinite(loss) for loss in first) or max(first) - min(first) > tolerance * min(first):
            raise RuntimeError(f"the ways do not do the same work: losses {losses}")


def measure(args: Args, work: Work, folder: Path) -> dict[str, Any]:
    """Return the measurements of each way."""
    if args.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # as torch has it; no TF32
    compiled = 0

    def on_event(event: str, seconds: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(on_event)
    ways = our_ways(args, work, folder)  # writes what the peer reads
    ways = peer_way(args, work, folder) | ways
    measured: dict[str, Any] = {
        name: {"computed": way.computed, "device": way.device, "losses": [], "first": [], "seconds": [], "cpu": []}
        for name, way in ways.items()
    }

    def timed(name: str) -> tuple[float, float, float]:
        """Return a step's loss, its seconds, and its CPU seconds over all cores."""
        started, used = time.perf_counter(), time.process_time()
        loss = ways[name].step()
        seconds, used = time.perf_counter() - started, time.process_time() - used
        print(f"{name}: loss {loss:.4f}, {seconds:.2f} s, {used:.2f} s of cores", file=sys.stderr)
        return loss, seconds, used

    for number in range(2):
        for name in ways:
            loss, seconds, _ = timed(name)
            measured[name]["losses"].append(loss)
            if number == 0:
                measured[name]["first"].append(seconds)
    check({name: one["losses"] for name, one in measured.items()}, args)
    before = compiled
    for _ in range(args.rounds):
        for name in ways:
            _, seconds, used = timed(name)
            measured[name]["seconds"].append(seconds)
            measured[name]["cpu"].append(used)
    for name, way in ways.items():
        measured[name]["peak"] = way.peak()
        measured[name]["compiled_in_rounds"] = compiled - before
    return measured


def in_processes(args: Args, folder: Path) -> dict[str, Any]:
    """Run `measure` with peer and ours in separate processes, one after the other in each round."""
    merged: dict[str, Any] = {}
    sides = [tuple(way for way in args.ways if (way == "peer") == peer) for peer in (False, True)]
    for _ in range(args.rounds):
        for ways in filter(None, sides):  # ours first: it writes what the peer reads
            options = [*sys.argv[1:], "--rounds", "1", "--part", str(folder), "--ways", *ways]
            command = [sys.executable, "-m", "benchmarks.train_step", *options]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            for name, one in json.loads(lines[-1]).items():
                whole = merged.setdefault(name, one | {"first": [], "seconds": [], "cpu": []})
                for times in ("first", "seconds", "cpu"):
                    whole[times] += one[times]
        check({name: one["losses"] for name, one in merged.items()}, args)
    return {name: merged[name] for name in WAYS if name in merged}


def report(args: Args, work: Work, measured: dict[str, Any], load: tuple[float, ...]) -> dict[str, Any]:
    """Return what is printed."""
    size = args.chosen
    seconds = {name: one["seconds"] for name, one in measured.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(fast: str, slow: str) -> dict[str, float] | None:
        """Return the speedup round by round: neighbors in time share the machine's load."""
        if fast not in seconds or slow not in seconds:
            return None
        return spread([b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)])

    result = {
        "size": args.size,
        "dtype": args.precision,
        "config": {"vision": dataclasses.asdict(size.config.vision), "text": dataclasses.asdict(size.config.text)},
        "adapters": {"rank": size.rank, "alpha": size.alpha},
        "sequence": dataclasses.asdict(size.sequence) | {"fit": args.fit},
        "micro_batch": {"sequences": size.micro_batch, "peer_conversations": size.peer_micro_batch},
        "peer_settings": {
            "checkpointing": args.checkpointing,
            "attention": args.attention,
            "adapters": args.adapters if args.precision == "bfloat16" else "float32",
        },
        "apart": args.apart,
        "equal_weights": size.equal_weights,
        "images": len(work.records),
        "conversations": work.count,
        "conversation_tokens": work.tokens,
        "supervised_tokens": work.supervised,
        "computed": {name: one["computed"] for name, one in measured.items()},
        "losses": {name: [round(loss, 6) for loss in one["losses"]] for name, one in measured.items()},
        "first_step_seconds": {name: spread(one["first"]) for name, one in measured.items()},
        "compile_seconds": {
            name: round(max(0.0, statistics.median(one["first"]) - medians[name]), 3) for name, one in measured.items()
        },
        "compiled_in_rounds": max(one["compiled_in_rounds"] for one in measured.values()),
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "cpu_seconds": {name: spread(one["cpu"]) for name, one in measured.items()},
        "tokens_per_second": {name: round(work.tokens / median, 1) for name, median in medians.items()},
        "supervised_per_second": {name: round(work.supervised / median, 1) for name, median in medians.items()},
        "tree_over_peer": ratio("tree", "peer"),
        "flat_over_peer": ratio("flat", "peer"),
        "tree_over_flat": ratio("tree", "flat"),
        "peak_bytes": {name: one["peak"] for name, one in measured.items()},
        "device": {name: one["device"] for name, one in measured.items()},
        "cores": len(os.sched_getaffinity(0)),
        "load": {"before": list(load), "after": list(os.getloadavg())},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "optax", "torch", "transformers", "peft", "reverie-jax")
        },
    }
    if "peer" in args.ways and "peer" not in measured:
        result["peer"] = "not run: torch cannot use the device that ours runs on"
    return result


def run(args: Args) -> dict[str, Any]:
    """Run the benchmark, or one side of it (`args.part`)."""
    load = os.getloadavg()
    if args.cores is not None:  # before either library starts its threads
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.cores]))
    work = make_work(args)
    if args.part is not None:
        return measure(args, work, args.part)
    with tempfile.TemporaryDirectory() as name:
        measured = in_processes(args, Path(name)) if args.apart else measure(args, work, Path(name))
    return report(args, work, measured, load)


def main(args: Args) -> None:
    # Torch needs memory on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main(tyro.cli(Args))

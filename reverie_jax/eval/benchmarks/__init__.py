"""Benchmarks by name: one file each, one interface (`interface.Benchmark`)."""

from __future__ import annotations

import importlib
import importlib.metadata

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import Benchmark

_BUILT_IN = {
    "pope": "pope:Pope",
    "mme": "mme:Mme",
    "mmbench": "mmbench:MmBench",
    "mmbench-cn": "mmbench:MmBenchCn",
    "scienceqa": "scienceqa:ScienceQa",
    "seed": "seed:Seed",
    "gqa": "gqa:Gqa",
    "textvqa": "textvqa:TextVqa",
    "hallusionbench": "hallusionbench:HallusionBench",
    "chair": "chair:Chair",
    "object-halbench": "object_halbench:ObjectHalBench",
    "amber": "amber:Amber",
    "mmhal": "mmhal:MmHal",
    "llava-bench": "llava_bench:LlavaBench",
    "llava-bench-coco": "llava_bench:LlavaBenchCoco",
    "mm-vet": "mm_vet:MmVet",
    "gavie": "gavie:Gavie",
}

GROUP = "reverie_jax.benchmarks"
"""Entry-point group of benchmarks in other packages; each entry is a class that is called without arguments."""


def names() -> tuple[str, ...]:
    """Return the names of all benchmarks: built in, then registered under `GROUP` by installed packages."""
    return (*_BUILT_IN, *importlib.metadata.entry_points(group=GROUP).names)


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name; its module is imported at the first use.

    Raises:
        UserError: The name is unknown.
    """
    if name in _BUILT_IN:
        module, cls = _BUILT_IN[name].split(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), cls)()
    for entry in importlib.metadata.entry_points(group=GROUP, name=name):
        return entry.load()()
    raise UserError(f"unknown benchmark {name!r}; choose from {', '.join(names())}")

"""Benchmarks by name: one file each, one interface (`interface.Benchmark`)."""

from __future__ import annotations

import importlib

from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import Benchmark

_HOMES = {
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
    "scenes": "reverie_jax.scenes.benchmark:Scenes",
}

NAMES = tuple(_HOMES)


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name; its module is imported when it is first asked for.

    Raises:
        UserError: there is none.
    """
    if name not in _HOMES:
        raise UserError(f"unknown benchmark {name!r}; there is {', '.join(NAMES)}")
    module, made = _HOMES[name].split(":")
    place = module if "." in module else f"{__name__}.{module}"
    return getattr(importlib.import_module(place), made)()

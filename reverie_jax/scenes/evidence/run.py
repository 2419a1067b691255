"""`reverie scenes evidence`: run all units in worker processes, a core each, and write the page."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from reverie_jax.errors import UserError
from reverie_jax.files import read_json, write_json
from reverie_jax.models.checkpoints import weights_checksum
from reverie_jax.scenes.evidence import page, schedule
from reverie_jax.scenes.evidence.arms import ARMS
from reverie_jax.scenes.evidence.findings import Findings
from reverie_jax.scenes.evidence.units import SEARCH_SEED, TESTS, Evidence, Sizes, Unit

QUICK = Sizes(seeds=2, budgets=(200,), main=200, passes=(400,), test=40, held_out=20, validation=40)
QUICK_ARMS = ("answers", "reflective", "lrv-0", "lrv-1", "ddpo-5", "sentences")

_evidence: Evidence
"""A worker's own: a seed's pictures are read once."""


_units = 0
_UNITS = 8
"""Units of a worker before its compiled programs are dropped."""


def _start_worker(out: Path, sizes: Sizes, model: str) -> None:
    import jax

    global _evidence
    # Arms of one kind share their programs, over processes and runs.
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _evidence = Evidence(out, sizes, model)


def _prepare(seed: int) -> str:
    _evidence.pictures(seed)
    return f"pictures of seed {seed}"


def _base() -> str:
    _evidence.run_base()
    return "base"


def _unit(unit: Unit) -> str:
    import jax

    global _units
    _evidence.run(unit)
    _units += 1
    if _units % _UNITS == 0:
        jax.clear_caches()  # a process has room for so many programs only
    return unit.name


class _Pool:
    """Worker processes, and the progress of what they do."""

    def __init__(self, evidence: Evidence, workers: int, console: Console):
        self.console, self.started = console, time.perf_counter()
        os.environ["NPROC"] = "1"  # threads of XLA's pool: a core for each worker
        # glibc takes the memory of every step's arrays anew: with huge pages that costs little.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        self.executor = ProcessPoolExecutor(
            workers, get_context("spawn"), _start_worker, (evidence.out, evidence.sizes, evidence.model)
        )

    def run(self, what: str, tasks: Sequence[tuple[Callable[..., str], tuple[object, ...]]]) -> None:
        """Run tasks, and print each when it is done."""
        futures = [self.executor.submit(task, *arguments) for task, arguments in tasks]
        for number, future in enumerate(as_completed(futures), 1):
            seconds = time.perf_counter() - self.started
            self.console.print(f"{seconds:7.0f} s  {what} {number}/{len(futures)}: {future.result()}")


def run(out: Path, *, quick: bool, workers: int, model: str, page_folder: Path | None = None) -> None:
    """Run the evidence, and write its page; what an earlier call has done is not done again.

    Args:
        out: output folder.
        quick: a small part, to see that it works.
        workers: processes.
        model: checkpoint to start from.
        page_folder: of the page; `out` if omitted.

    Raises:
        UserError: the folder holds another evidence, or cannot be written.
    """
    sizes, names = (QUICK, QUICK_ARMS) if quick else (Sizes(), tuple(ARMS))
    evidence, console = Evidence(out, sizes, model), Console()
    _claim(out, _settings(evidence))
    for name in TESTS:
        evidence.test_folder(name)
    pool = _Pool(evidence, workers, console)
    with pool.executor:
        seeds = (SEARCH_SEED, *range(sizes.seeds))
        pool.run("prepare", [(_base, ()), *((_prepare, (seed,)) for seed in seeds)])
        pool.run("search rates", [(_unit, (unit,)) for unit in schedule.rate_units(sizes, names)])
        pool.run("search passes", [(_unit, (unit,)) for unit in schedule.passes_units(evidence, names)])
        choices = schedule.choose(evidence, names)
        pool.run("compare", [(_unit, (unit,)) for unit in dict.fromkeys(schedule.main_units(sizes, choices))])
    folder = page_folder or out
    write_page(evidence, choices, folder, quick=quick)
    console.print(f"{folder / page.PAGE}")


def _settings(evidence: Evidence) -> dict[str, Any]:
    """Return what the units of a folder depend on, as it is read back from JSON."""
    # Rates, steps and seeds are a unit's own, and in its name.
    recipes = {f"recipe of {name}": dataclasses.asdict(Unit(name, 0, 0.0, 0, 0).recipe) for name in ARMS}
    weights = weights_checksum(evidence.load()[0])
    settings = dataclasses.asdict(evidence.sizes) | {"model": evidence.model, "weights": weights} | recipes
    return dict(json.loads(json.dumps(settings)))


def _claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Mark the folder as that of an evidence with these settings.

    Raises:
        UserError: it is another's.
    """
    path = out / "settings.json"
    if path.exists():
        if (existing := read_json(path)) != settings:
            differs = [key for key in settings if existing.get(key) != settings[key]]
            raise UserError(f"{out}: holds an evidence with other {', '.join(differs)}; choose another folder")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: has files, but {path.name} is missing: not an evidence folder; choose an empty one")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def write_page(evidence: Evidence, choices: Mapping[str, schedule.Choice], folder: Path, *, quick: bool) -> None:
    """Write the page of what is done to a folder."""
    units = [path for path in (evidence.out / "units").iterdir() if (path / "unit.json").exists()]
    seconds = sum(evidence.facts(path.name)["seconds"] for path in units)
    facts = {
        "model": evidence.model,
        "quick": quick,
        "units": len(units),
        "hours": seconds / 3600,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    page.write(Findings(evidence, choices), folder, facts)

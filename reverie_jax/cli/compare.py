"""`reverie compare`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from reverie_jax.comparison import ArmPlan, Comparison
    from reverie_jax.train.plan.topology import Topology
    from reverie_jax.train.recipe import Recipe

_METRICS = 8
"""Metrics of a benchmark on the console; the files have all of them."""
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Tune a model by several recipes, with several seeds each, and compare the results on benchmarks.

    Every model, and the untuned one ("base"), answers all questions. OUT/compare.md and compare.json then have each
    metric with an interval over seeds and images together, the difference from the baseline, and the smallest difference
    that could have been found. `--plan` says first what it takes. Run the same command again to resume.

    reverie compare --model llava-hf/llava-1.5-7b-hf --arms reverie-1.5-7b-lora,llava-1.5-7b-lora --data records/
    --benchmark pope,mme --benchmark-data benchmarks/ --seeds 5 --out runs/compare
    """

    model: common.Model
    arms: Annotated[common.Several[str], common.option("ARMS ...")] = ()
    """Required. What to compare, separated by commas or spaces, each as [NAME=]RECIPE[@RECORDS]: a recipe by name or YAML
    file, a name if the recipe's does not do, a records folder if it is not that of --data."""
    data: Annotated[Path | None, common.FOLDER] = None
    """Records folder of all arms that name none, written by `reverie data build`."""
    benchmark: Annotated[common.Several[str], common.option("NAMES ...")] = ()
    """Required. Benchmarks that need no judge, separated by commas or spaces; `reverie benchmarks` lists them."""
    benchmark_data: Annotated[Path, common.FOLDER]
    """Folder of the benchmark's official files; of several benchmarks, a folder of folders by name; or `hub`."""
    out: Annotated[Path, common.FOLDER]
    """Output folder: runs and answers by arm and seed, compare.json, compare.md."""
    seeds: Annotated[int, common.N] = 3
    """Number of trainings of each arm, with the seeds 0, 1, ...; with fewer than 5, intervals are too narrow."""
    baseline: Annotated[str, common.option("NAME")] = "base"
    """Arm that the others are compared with; base is the untuned model."""
    components: common.Components = ()
    dtype: common.Dtype = "auto"
    set: common.RecipeFields = ()
    mesh: Annotated[str | None, common.option("AXES")] = None
    """Devices of each mesh axis, as data=2,fsdp=4; one device if omitted, with --topology all chips on fsdp."""
    images: Annotated[Path | None, common.FOLDER] = None
    """Folder of images; the one in the benchmark's data if omitted."""
    batch_size: Annotated[int, common.N] = 16
    """Images in a batch; this is for answers, a recipe has a batch size of its own."""
    plan: Annotated[bool, common.FLAG] = False
    """Print steps, hours and memory, and train nothing. Exits with 1 if a step does not fit."""
    topology: Annotated[str | None, common.option("CHIPS")] = None
    """With --plan, another machine to plan for, as h200:8 or v5e:2x4 (see `reverie plan`)."""

    def run(self) -> None:
        """Run the command."""
        self._check()
        recipes = [self._arm(text) for text in _separated(self.arms, "--arms", "name at least one recipe")]
        if self.topology is not None:
            os.environ["JAX_PLATFORMS"] = "cpu"  # the step is compiled for another machine; local devices are not used
        from rich.console import Console
        from rich.markdown import Markdown

        from reverie_jax.comparison import Arm, Comparison, markdown
        from reverie_jax.data.records import RecordSource

        sources = {folder: RecordSource(folder) for folder in dict.fromkeys(folder for *_, folder in recipes)}
        comparison = Comparison(
            model=self.model,
            arms=[Arm(name, recipe, sources[folder]) for name, recipe, folder in recipes],
            benchmarks=self._benchmarks(),
            seeds=self.seeds,
            out=self.out,
            baseline=self.baseline,
            components=self.components,
            dtype=common.parse_dtype("bfloat16" if self.topology and self.dtype == "auto" else self.dtype),
            mesh=None if self.topology else common.parse_mesh(self.mesh or common.ONE_DEVICE),
            batch_size=self.batch_size,
        )
        console = Console()
        if not self.plan:
            content = comparison.run()
            console.print(Markdown(markdown(content, _METRICS)))
            print(f"all metrics: {self.out / 'compare.md'}, {self.out / 'compare.json'}")
            return
        topology, mesh, devices = self._machine(comparison)
        plans = comparison.plan(topology, mesh, devices)
        console.print(_plan_table(plans, self.seeds))
        console.print(_questions_table(comparison))
        print("\n".join(_remarks(comparison, plans)))
        if any(plan.step and not plan.step.fits for plan in plans):
            raise SystemExit(1)

    def _check(self) -> None:
        """Check what needs no import of JAX.

        Raises:
            UserError: An option is invalid.
        """
        common.check_choice(("auto", *common.DTYPES), dtype=self.dtype)
        common.check_at_least(1, seeds=self.seeds, batch_size=self.batch_size)
        if self.topology is not None and not self.plan:
            raise UserError("--topology: only --plan takes it; a comparison runs on the devices that are here")

    def _arm(self, text: str) -> tuple[str, Recipe, Path]:
        """Return the name, the recipe and the records folder of `[NAME=]RECIPE[@RECORDS]`.

        Raises:
            UserError: A part is missing or invalid.
        """
        from reverie_jax.train import recipes

        name, place, folder = "", text, ""
        if not Path(text).is_file():  # a file's name may contain both signs
            place, _, folder = text.partition("@")
            name, _, place = place.partition("=") if "=" in place else ("", "", place)
        data = Path(folder) if folder else self.data
        if data is None:
            raise UserError(f"--arms {text}: the records folder is missing; give --data, or write RECIPE@FOLDER")
        if not data.is_dir():
            raise UserError(f"{data}: no such folder; `reverie data build` writes records")
        settings = common.joined(self.set)
        if any(setting.partition("=")[0] == "seed" for setting in settings):
            raise UserError("--set seed: each arm is trained with the seeds 0, 1, ...; --seeds says how many")
        recipe = recipes.override(recipes.read_recipe(place), settings)
        return name or Path(place).name.removesuffix(".yaml").removesuffix(".yml"), recipe, data

    def _benchmarks(self) -> Any:
        from reverie_jax.eval.benchmarks import find_benchmark, inputs

        names = _separated(self.benchmark, "--benchmark", "name at least one; see `reverie benchmarks`")
        if len(set(names)) < len(names):
            raise UserError(f"--benchmark {','.join(names)}: a benchmark is listed more than once")
        found = [find_benchmark(name) for name in names]
        return [(item, inputs.with_images(inputs.load(item, self.benchmark_data), self.images)) for item in found]

    def _machine(self, comparison: Comparison) -> tuple[Topology | None, dict[str, int], list[Any] | None]:
        """Return the machine to plan for, its mesh, and the devices to compile for where they are here."""
        from reverie_jax.train.plan.plan import mesh_sizes
        from reverie_jax.train.plan.topology import CHIPS, Topology, chip_of

        if comparison.mesh is None:
            topology = Topology.parse(str(self.topology))
            return topology, mesh_sizes(self.mesh, topology.chips), None
        devices, sizes = list(comparison.mesh.devices.flat), dict(comparison.mesh.shape)
        chip = chip_of(devices[0].device_kind)
        kind = next((name for name, known in CHIPS.items() if known is chip), None)
        if kind is None:
            return None, sizes, None
        shape = (len(devices), *[1] * (CHIPS[kind].dimensions - 1))
        return Topology(f"{kind}:{'x'.join(map(str, shape))}", kind, shape), sizes, devices


def _separated(groups: common.Several[str], option: str, what: str) -> list[str]:
    """Return the values of an option, separated by commas or spaces.

    Raises:
        UserError: No value is given.
    """
    values = [part for value in common.joined(groups) for part in value.split(",") if part]
    common.require(values, option, what)
    return values


def _plan_table(plans: Sequence[ArmPlan], seeds: int) -> Table:
    from rich.table import Table

    hours = f"hours, {seeds} seed{'s' * (seeds > 1)}, at least"
    rows: dict[str, list[str]] = {}
    for _, stats, steps, step in plans:
        cells = {"images": f"{stats.records:,}", "tokens in trees": f"{stats.tokens:,}"}
        cells |= {"tokens without sharing": f"{stats.flat_tokens:,}", "supervised tokens": f"{stats.edges:,}"}
        cells |= {"steps, each seed": f"{steps:,}"}
        if step is not None:
            memory = f"{step.peak_bytes_per_chip / _GIB:.1f} of {step.hbm_bytes_per_chip / _GIB:.1f}"
            seconds = step.roofline_seconds_per_step
            cells |= {"GiB on a chip": memory if step.fits else f"{memory}: DOES NOT FIT"}
            cells |= {"seconds, each step, at least": f"{seconds:.3g}", hours: f"{seconds * steps * seeds / 3600:.3g}"}
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    table = Table("training")
    for plan in plans:
        table.add_column(plan.arm.name, justify="right")
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _questions_table(comparison: Comparison) -> Table:
    from rich.table import Table

    models = 1 + len(comparison.arms) * comparison.seeds
    table = Table("answering", "questions", "images", f"answers of {models} models")
    for benchmark, data in comparison.benchmarks:
        questions = data.available
        images = len({question.image for question in questions if question.image})
        table.add_row(benchmark.name, f"{len(questions):,}", f"{images:,}", f"{len(questions) * models:,}")
    return table


def _remarks(comparison: Comparison, plans: Sequence[ArmPlan]) -> list[str]:
    """Return what the tables sum up to, and what they leave out."""
    steps = [plan.step for plan in plans if plan.step is not None]
    lines = []
    if steps:
        seconds = sum(plan.steps * plan.step.roofline_seconds_per_step for plan in plans if plan.step is not None)
        how = "compiled for it" if all(step.compiled for step in steps) else "memory is estimated, not compiled"
        hours = seconds * comparison.seeds / 3600
        lines.append(f"training on {steps[0].topology}: at least {hours:.3g} hours in all, a lower bound ({how})")
        lines += dict.fromkeys(f"{step.recipe}: {step.note}" for step in steps if step.note)
    else:
        lines.append("hours and memory: unknown for these devices; name a machine with --topology, as h200:1")
    lines.append(
        "not estimated: answering, whose time depends on how long the answers are; loading, compiling, reading images, "
        "checkpoints"
    )
    return lines

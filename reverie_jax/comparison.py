"""Compare recipes: train each with several seeds, answer the same benchmarks, estimate differences with intervals."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from reverie_jax import files
from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.survey import find_sizes
from reverie_jax.data.tree_sizes import DatasetStats
from reverie_jax.errors import UserError
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks.answer_files import PREDICTIONS, SCORES
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.predict import PredictOptions, predict, questions_digest
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.eval.score import Score, score, write_score
from reverie_jax.loading import detect_components, load_model, load_processor
from reverie_jax.models import lora
from reverie_jax.models.checkpoints import base_checksums, read_config, weights_checksum
from reverie_jax.progress import ProgressBars
from reverie_jax.train.checkpoint import find_progress
from reverie_jax.train.identity import recipe_fields, records_digest
from reverie_jax.train.loop import finetune
from reverie_jax.train.plan.plan import StepPlan, abstract_step, make_plan
from reverie_jax.train.plan.topology import Topology
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.validation import hold_out

BASE = "base"
"""Name of the untuned model, which takes part in every comparison."""
SETTINGS, RESULT, TABLES = "settings.json", "compare.json", "compare.md"
ENOUGH_SEEDS = 5
"""With fewer, intervals over seeds are too narrow (see `statistics`)."""
_LONGEST_SEQUENCE = 4096

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: a recipe, and the records that it trains on. The recipe's seed is replaced."""

    name: str
    recipe: Recipe
    records: Sequence[ImageRecord]


class ArmPlan(NamedTuple):
    """What an arm takes for each seed: its data, its steps, and one step (None on a machine without figures)."""

    arm: Arm
    stats: DatasetStats
    steps: int
    step: StepPlan | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An experiment in a folder: `run` makes what is missing there.

    Attributes:
        model: Checkpoint that every arm starts from, as for `load_model`.
        arms: Recipes with their records.
        benchmarks: Benchmarks with their questions.
        seeds: Each arm is trained with the seeds 0, 1, ... up to this number.
        out: Output folder: ARM/seedN/train, ARM/seedN/BENCHMARK, base/BENCHMARK, `RESULT` and `TABLES`.
        baseline: Name of the arm, or `BASE`, that the others are compared with.
        components: What `model` lacks, as for `load_model`.
        dtype: Of weights and computation.
        mesh: Devices; None for a comparison that is only planned for another machine.
        batch_size: Images that are answered together.
    """

    model: str
    arms: Sequence[Arm]
    benchmarks: Sequence[tuple[Benchmark, BenchmarkData]]
    seeds: int
    out: Path
    baseline: str = BASE
    components: Sequence[str] = ()
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Check what needs neither model nor records.

        Raises:
            UserError: A name or a benchmark cannot be used; it is named.
        """
        names = [arm.name for arm in self.arms]
        for name in names:
            taken = names.count(name) > 1 or name in (BASE, SETTINGS, RESULT, TABLES)
            if taken or not re.fullmatch(r"\w[\w.+-]*", name):
                raise UserError(
                    f"arm {name!r}: give each arm a name of its own in letters, digits, '.', '_', '+' and '-'"
                )
        if self.baseline not in (BASE, *names):
            raise UserError(f"--baseline {self.baseline}: must be {BASE} or the name of an arm ({', '.join(names)})")
        _check_benchmarks(self.benchmarks)

    def check(self) -> dict[str, DatasetStats]:
        """Check all that a training could fail with before its first step; return the sizes of each arm's data.

        Raises:
            UserError: A recipe or records cannot be used; the arm is named.
        """
        return {arm.name: self._check_arm(arm) for arm in self.arms}

    def _check_arm(self, arm: Arm) -> DatasetStats:
        recipe = arm.recipe
        processor = load_processor(self.model, components=self.components, template=recipe.template)
        processor = processor.override(image_aspect_ratio=recipe.image_aspect_ratio)
        supervision = recipe.preference or recipe.supervision
        builder = TreeBuilder(processor, recipe.sequence, supervision, recipe.prefix_sharing)
        try:
            if self.mesh is not None:
                abstract_step(self._config(), recipe, self.mesh, dtype=self.dtype)
            return find_sizes(arm.records, hold_out(arm.records, recipe.holdout)[0], builder).stats
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None

    def _config(self) -> Any:
        main, *others = detect_components(self.model, self.components)
        return read_config(main, components=others)

    def plan(
        self, topology: Topology | None, mesh: Mapping[str, int], devices: list[Any] | None = None
    ) -> list[ArmPlan]:
        """Return what each arm takes.

        Args:
            topology: The machine; None for one without figures.
            mesh: Chips by axis.
            devices: To compile the step for, as for `make_plan`.

        Raises:
            UserError: As for `check` and `make_plan`.
        """
        stats, plans = self.check(), []
        for arm in self.arms:
            steps = arm.recipe.steps_for(stats[arm.name].sequences)
            recipe = dataclasses.replace(arm.recipe, steps=steps)
            where: Any = {"architecture": Path(self.model).name, "dtype": self.dtype, "devices": devices}
            step = None if topology is None else make_plan(self._config(), recipe, topology, mesh, **where)
            plans.append(ArmPlan(arm, stats[arm.name], steps, step))
        return plans

    def run(self) -> dict[str, Any]:
        """Train and answer what is missing; compare, and write `RESULT` and `TABLES`.

        Returns:
            The content of `RESULT`.

        Raises:
            UserError: As for `check`; or the folder holds something else, and what differs is named; or training fails.
        """
        settings = self._settings()
        _check_folder(self.out, settings)
        self.check()
        engine, weights = self._engine()
        _check_folder(self.out, settings | {"weights": weights})
        files.write_json(self.out / SETTINGS, settings | {"weights": weights})
        self._answer(engine, weights, self.out / BASE, Path(self.model).name)
        del engine  # its memory is the next model's
        for seed in range(self.seeds):
            for arm in self.arms:
                self._train_and_answer(arm, seed)
        content = {
            "model": Path(self.model).name,
            "seeds": self.seeds,
            "baseline": self.baseline,
            "arms": {arm.name: {"recipe": arm.recipe.name, "records": len(arm.records)} for arm in self.arms},
            "benchmarks": {
                item.name: summarize(item, self._scores(item, data), self.baseline) for item, data in self.benchmarks
            },
        }
        files.write_json(self.out / RESULT, content)
        files.atomic_write(self.out / TABLES, markdown(content))
        return content

    def _settings(self) -> dict[str, Any]:
        """Return what the result depends on, beside the weights."""
        return {
            "model": Path(self.model).name,
            "dtype": str(jnp.dtype(self.dtype)),
            "seeds": self.seeds,
            "arms": {
                arm.name: {
                    "recipe": recipe_fields(dataclasses.replace(arm.recipe, seed=0)),
                    "records": records_digest(arm.records),
                }
                for arm in self.arms
            },
            "benchmarks": {
                benchmark.name: {"questions": questions_digest(data.available), "protocol": dict(data.protocol)}
                for benchmark, data in self.benchmarks
            },
        }

    def _engine(self, run: Path | None = None) -> tuple[Engine, dict[str, Any]]:
        """Load the base model, or a run's; return what answers with it, and the checksums of its weights."""
        place: Any = {"mesh": self.mesh, "dtype": self.dtype}
        model, processor = load_model(self.model, components=self.components, adapter=run, **place)
        lora.merge(model)
        weights = {**base_checksums(model), "all": weights_checksum(model)}
        model.decoder.unstack()
        return Engine(model, processor, EngineShape(_LONGEST_SEQUENCE, batch_size=self.batch_size)), weights

    def _answer(self, engine: Engine, weights: Mapping[str, Any], folder: Path, name: str) -> None:
        """Answer all benchmarks as `reverie eval` does."""
        for benchmark, data in self.benchmarks:
            options = PredictOptions(Decoding(benchmark.max_new_tokens, beams=benchmark.beams))
            with ProgressBars(f"{name} {benchmark.name}") as bars:
                record: Any = {"model": name, "checksums": weights, "on_progress": bars.update}
                predict(engine, benchmark, data, folder / benchmark.name, options, **record)

    def _train_and_answer(self, arm: Arm, seed: int) -> None:
        folder, recipe = self.out / arm.name / f"seed{seed}", dataclasses.replace(arm.recipe, seed=seed)
        train = folder / "train"
        progress = find_progress(train, recipe, arm.records)
        if missing := progress is None or not progress.is_complete:
            _log.info("%s, seed %d: training", arm.name, seed)
            source: Any = {"components": self.components, "template": recipe.template}
            model, processor = load_model(self.model, **source, mesh=self.mesh, dtype=self.dtype)
            finetune(model, processor, arm.records, recipe, train, mesh=self.mesh)
            del model
        # Read from the folder, also after training: the weights of a run that is resumed here are the same.
        if missing or not all((folder / item.name / PREDICTIONS).exists() for item, _ in self.benchmarks):
            self._answer(*self._engine(train), folder, f"{arm.name}/seed{seed}")

    def _scores(self, benchmark: Benchmark, data: BenchmarkData) -> dict[str, list[Score]]:
        """Score all answers to a benchmark, and write each score beside its answers."""
        folders = {BASE: [self.out / BASE]}
        folders |= {arm.name: [self.out / arm.name / f"seed{seed}" for seed in range(self.seeds)] for arm in self.arms}
        scores: dict[str, list[Score]] = {}
        for name, places in folders.items():
            for place in places:
                result = score(benchmark, data, place / benchmark.name / PREDICTIONS)
                write_score(result, place / benchmark.name / SCORES)
                scores.setdefault(name, []).append(result)
        return scores


def _check_benchmarks(benchmarks: Sequence[tuple[Benchmark, BenchmarkData]]) -> None:
    """Check that answers will be scored and their scores have intervals.

    Raises:
        UserError: A benchmark needs a judge, labels or other data that are missing, or has only one cluster.
    """
    if judged := [benchmark.name for benchmark, _ in benchmarks if benchmark.rules[0] in benchmark.judged_rules]:
        raise UserError(
            f"--benchmark {', '.join(judged)}: a judge scores it, and a comparison asks none; leave it out, and use "
            "`reverie eval`, `reverie judge` and `reverie score --compare-to`"
        )
    for benchmark, data in benchmarks:
        blank = {str(question.id): "" for question in data.available}
        clusters = benchmark.score(
            dataclasses.replace(data, questions=data.available), blank, benchmark.rules[0]
        ).clusters
        if len(clusters) < 2:
            raise UserError(f"--benchmark {benchmark.name}: an interval needs at least two images with questions")


def _check_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Check that a folder is empty or holds this comparison; only what `settings` has is compared.

    Raises:
        UserError: It holds another comparison, and what differs is named; or something else.
    """
    path = out / SETTINGS
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not inner.name.startswith(".") for inner in out.iterdir())):
            raise UserError(f"{out}: holds something else than a comparison; choose another folder")
        return
    stored = files.read_json(path)
    try:
        for arm in stored["arms"].values():  # fields that an older release did not have are at their defaults
            arm["recipe"] = recipe_fields(Recipe.from_json(json.dumps(arm["recipe"])))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the settings of a comparison ({error!r}); choose another folder") from None
    wanted = json.loads(json.dumps(settings))
    if differences := list(_differences(wanted, {key: stored.get(key) for key in wanted})):
        raise UserError(f"{out}: holds another comparison: {'; '.join(differences)}. Choose another folder")


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Yield a text for each value that differs, with its path; None stands for a missing one."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**theirs, **ours}:
            yield from _differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        shown = [
            "missing" if value is None else "new" if isinstance(value, dict) else value for value in (ours, theirs)
        ]
        yield f"{path} is {shown[0]}, there it is {shown[1]}"


def summarize(benchmark: Benchmark, scores: Mapping[str, Sequence[Score]], baseline: str) -> dict[str, Any]:
    """Estimate every metric of every model, and its difference from the baseline, with intervals.

    Args:
        benchmark: The benchmark.
        scores: By model, a score for each seed; of `BASE` a single one.
        baseline: Name of a model.

    Returns:
        A benchmark's part of `RESULT`. `better` is None where the interval of the difference includes 0.

    Raises:
        UserError: The scores are not of the same questions.
    """
    first = scores[baseline][0]
    for one in (one for several in scores.values() for one in several):
        if list(one.scored.clusters) != list(first.scored.clusters) or list(one.metrics) != list(first.metrics):
            raise UserError(f"{benchmark.name}: the models are counted in different clusters or metrics")
    counts = {name: np.stack([one.scored.counts for one in several]) for name, several in scores.items()}
    counts[BASE] = counts[BASE][0]  # not trained: it has no seeds
    functions = first.scored.metrics
    values = {name: statistics.bootstrap(table, functions) for name, table in counts.items()}
    changes = {
        name: statistics.differences(table, counts[baseline], functions)
        for name, table in counts.items()
        if name != baseline
    }

    def entry(name: str, metric: str, less_is_better: bool) -> dict[str, Any]:
        content: dict[str, Any] = values[name][metric].json("value")
        content["per_seed"] = [round(float(one.metrics[metric]), 4) for one in scores[name]]
        if name in changes:
            change = changes[name][metric]
            decided = change.low > 0 or change.high < 0
            better = (change.value < 0) == less_is_better if decided else None
            content["difference"] = {**change.json("value", power=True), "better": better}
            if not change.error:  # no resample differs: nothing is known about what could have been found
                content["difference"]["detectable"] = None
        return content

    less = {metric: metric.rpartition("/")[2] in benchmark.lower_is_better for metric in functions}
    return {
        "rule": first.rule,
        "scale": first.scale,
        "questions": first.items,
        "clusters": len(first.scored.clusters),
        "metrics": {
            metric: {
                "less_is_better": less[metric],
                "models": {name: entry(name, metric, less[metric]) for name in scores},
            }
            for metric in functions
        },
    }


def markdown(content: Mapping[str, Any], metrics: int | None = None) -> str:
    """Return a comparison as a page of tables.

    Args:
        content: Of `RESULT`.
        metrics: Number of metrics of each benchmark, the first ones; None for all.
    """
    seeds, baseline = content["seeds"], content["baseline"]
    lines = [f"# {', '.join(content['arms'])} from {content['model']}", "", *_notes(seeds, baseline), ""]
    for name, part in content["benchmarks"].items():
        about = f"{part['questions']:,} questions in {part['clusters']:,} clusters, rule {part['rule']}"
        lines += [f"## {name}", "", about + (part["scale"] and f", {part['scale']}") + ".", ""]
        lines += [f"| model | value | minus {baseline} | detectable | by seed |", "|---|---|---|---|---|"]
        for metric, row in list(part["metrics"].items())[:metrics]:
            lines.append(f"| **{metric}**{', less is better' if row['less_is_better'] else ''} | | | | |")
            lines += [f"| {model} | {' | '.join(_cells(cell))} |" for model, cell in row["models"].items()]
        if metrics is not None and len(part["metrics"]) > metrics:
            lines += ["", f"{len(part['metrics']) - metrics} more metrics are in {TABLES}."]
        lines.append("")
    return "\n".join(lines)


def _cells(cell: Mapping[str, Any]) -> Iterator[str]:
    def interval(of: Mapping[str, Any], sign: str = "") -> str:
        return f"{of['value']:{sign}.4g} [{of['ci95'][0]:{sign}.4g}, {of['ci95'][1]:{sign}.4g}]"

    yield interval(cell)
    change = cell.get("difference")
    words = {None: "", True: " better", False: " worse"}
    yield interval(change, "+") + words[change["better"]] if change else ""
    yield f"{change['detectable']:.4g}" if change and change["detectable"] is not None else ""
    yield " ".join(f"{value:.4g}" for value in cell["per_seed"]) if len(cell["per_seed"]) > 1 else ""


def _notes(seeds: int, baseline: str) -> Iterator[str]:
    """Yield what a reader must know to read the tables."""
    over = "seeds and clusters together" if seeds > 1 else "clusters"
    yield f"Each arm is trained with {seeds} seed{'s' if seeds > 1 else ''}; {BASE} is the untuned model."
    yield f"Brackets are 95 % intervals of a bootstrap over {over}; differences from {baseline} are paired."
    if seeds == 1:
        yield "**One seed: the intervals say nothing of another training.**"
    elif seeds < ENOUGH_SEEDS:
        yield f"**Fewer than {ENOUGH_SEEDS} seeds: the intervals are too narrow as far as seeds differ.**"
    yield "Detectable is the smallest true difference that a two-sided test at 5 % would find with a power of 80 %."
    yield "Where nothing differs in truth, about one difference in twenty is called better or worse by chance."

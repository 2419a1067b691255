"""What `reverie eval`, `score`, `judge` and `report` do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reverie_jax.cli import eval_options as options
from reverie_jax.errors import UserError
from reverie_jax.eval import score as scoring
from reverie_jax.eval.benchmarks import benchmark as find_benchmark
from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.files import SCORES
from reverie_jax.eval.benchmarks.interface import Benchmark, JudgeRequest, Loaded, NotScorable

_LOGGED = 60.0
"""Seconds between two lines about the progress, where there is no terminal."""
_SHOWN = 16
"""Metrics in a table; all are in the JSON."""


def places(names: str, data: Path, out: Path) -> list[tuple[Benchmark, Path, Path]]:
    """Benchmarks with the folder of their files and that of their answers."""
    found = [find_benchmark(name.strip()) for name in names.split(",")]
    if len(found) == 1:
        only = found[0]
        return [(only, _of(data, only.name), out)]
    if len({one.name for one in found}) != len(found):
        raise UserError(f"--benchmark {names}: one stands there twice")
    return [(one, _of(data, one.name), out / one.name) for one in found]


def _of(data: Path, name: str) -> Path:
    return data / name if (data / name).is_dir() else data


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def evaluate(options: options.Eval) -> None:
    """Predicts and scores.

    Raises:
        UserError: something that the user must mend.
    """
    import jax

    from reverie_jax.cli import parse_dtype, parse_mesh
    from reverie_jax.eval import predict as inference
    from reverie_jax.eval.decode import Decoding
    from reverie_jax.eval.engine import Engine, EngineShape
    from reverie_jax.loading import as_tuned, load_model, load_processor
    from reverie_jax.models import lora
    from reverie_jax.models.checkpoints import fingerprint, identity
    from reverie_jax.train.distributed import join

    if options.against not in ("", "image", "instruction"):
        raise UserError(f"--against {options.against}: must be image or instruction")
    for word in ("rows", "leaves", "row_tokens", "new_tokens", "limit"):
        if (value := getattr(options, word)) is not None and value < 1:
            raise UserError(f"--{word.replace('_', '-')} {value}: must be at least 1")
    found = [
        (one, files.shown_from(one.load(data), options.images), out)
        for one, data, out in places(options.benchmark, options.data, options.out)
    ]
    for one, _, _ in found:
        if options.rule is not None and options.rule not in one.rules:
            raise UserError(f"--rule {options.rule}: {one.name} has {', '.join(one.rules)}")
    path, *base = options.model.split(",")
    if options.dump_prompts is not None:
        processor = load_processor(path, base=base)
        processor = processor if options.adapter is None else as_tuned(processor, Path(options.adapter))
        encoder = processor.using(options.template).encoder
        asked = [question for _, loaded, _ in found for question in loaded.asked[: options.limit]]
        with _writing(options.dump_prompts):
            inference.dump_prompts(encoder, asked, options.dump_prompts)
        print(f"{len(asked)} prompts: {options.dump_prompts}")
        return
    join(options.distributed)
    model, processor = load_model(
        path, base=base, adapter=options.adapter, mesh=parse_mesh(options.mesh), dtype=parse_dtype(options.dtype)
    )
    lora.merge(model)
    # Of the tuned model, whole: an adapter that was trained further is another one.
    weights = {**identity(model), "all": fingerprint(model)}
    shape = EngineShape(sequence_length=options.row_tokens, questions=options.leaves, batch_size=options.rows)
    engine = Engine(model, processor.using(options.template), shape)
    console, failed = Console(stderr=True), list[str]()
    for one, loaded, out in found:
        try:
            how = Decoding(
                options.new_tokens or one.new_tokens,
                beams=_beams(options, one),
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
                contrast=options.against,  # type: ignore[arg-type]
                alpha=options.alpha,
                beta=options.beta,
                noise_step=options.noise,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        ask = inference.PredictOptions(how, options.reflect, options.limit)
        name = Path(options.adapter or path).name
        with _Bars(console, one.name, loaded, ask) as on_progress:
            predictions = inference.predict(
                engine, one, loaded, out, ask, model=name, identity=weights, progress=on_progress
            )
        if jax.process_index():
            continue  # the first process has the file, and scores it
        if options.limit is not None:
            print(f"{predictions}: {len(ask.questions(loaded))} of {len(loaded.questions)} answers, not scored")
            continue
        try:
            result = scoring.score(one, loaded, predictions, options.rule)
            with _writing(out / SCORES):
                scoring.write_score(result, out / SCORES)
            Console().print(table(result))
        except NotScorable as error:
            print(f"{predictions}: not scored: {error}")
        except UserError as error:  # the answers are there; further benchmarks are asked all the same
            failed.append(f"{one.name}: {error}")
    if failed:
        raise UserError("; ".join(failed))


def _beams(options: options.Eval, benchmark: Benchmark) -> int:
    """Those asked for; else the benchmark's protocol's, where nothing is asked for that goes with none."""
    if options.beams is not None:
        return options.beams
    return 1 if options.temperature or options.against else benchmark.beams


class _Bars:
    """Answers so far, with answers and pictures a second, on a terminal."""

    def __init__(self, console: Console, name: str, loaded: Loaded, ask: Any):
        import jax
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        questions = ask.questions(loaded)
        self.pictures = len({question.image for question in questions if question.image}) / max(1, len(questions))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.name, self.bars, self.console = name, dict[str, Any](), console
        self.first, self.said = jax.process_index() == 0, time.monotonic()
        self.progress = Progress(*columns, console=console, disable=not (console.is_terminal and self.first))

    def __enter__(self) -> Any:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.bars:
            self.bars[stage] = self.progress.add_task(f"{self.name} {stage}", total=total, rate="")
        task = next(task for task in self.progress.tasks if task.id == self.bars[stage])
        speed = task.speed or 0.0
        rate = f"{speed:.1f} answers/s, {speed * self.pictures:.1f} images/s"
        self.progress.update(self.bars[stage], completed=done, rate=rate)
        # A log has lines now and then instead of a bar.
        if self.first and not self.console.is_terminal and time.monotonic() - self.said > _LOGGED:
            self.said = time.monotonic()
            self.console.print(f"reverie: {self.name} {stage}: {done:,} of {total:,}, {rate}", highlight=False)


def table(result: scoring.Score) -> Table:
    """A score as a terminal shows it."""
    shown = Table(title=f"{result.benchmark} by the rule {result.rule} ({result.items:,} questions)")
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    shown.add_column("95 % interval", justify="right")
    for name, value in list(result.metrics.items())[:_SHOWN]:
        low, high = result.intervals.get(name, (None, None))
        shown.add_row(name, f"{value:.4g}", "" if low is None else f"{low:.4g} to {high:.4g}")
    if len(result.metrics) > _SHOWN:
        shown.add_row(f"and {len(result.metrics) - _SHOWN} more, with --json", "", "")
    if result.unparsed or result.missing:
        shown.caption = (
            f"{result.unparsed:,} answers say nothing that the rule looks for; {result.missing:,} are missing"
        )
    return shown


def score(options: options.Score) -> None:
    """Scores an answer file.

    Raises:
        UserError: something that the user must mend.
    """
    one = find_benchmark(options.benchmark)
    loaded = one.load(options.annotations)
    made = _export(options, one, loaded) if options.export is not None else []

    def by(rule: str | None, predictions: Path, replies: Path | None) -> scoring.Score:
        return scoring.score(one, loaded, predictions, rule, replies=replies, partial=options.partial)

    rules: Sequence[str | None] = [options.rule]
    if options.rule == "all":
        rules = [rule for rule in one.rules if rule not in one.judged or options.replies is not None]
        if not rules:
            raise UserError(f"--rule all: {one.name}'s rules all need a judge's replies; name the file with --replies")
    try:
        results = [by(rule, options.predictions, options.replies) for rule in rules]
    except NotScorable as error:
        if not made:
            raise
        print(f"{', '.join(map(str, made))}: written; not scored: {error}")
        return
    first = results[0]
    shown = first.json()
    if options.rule == "all":
        shown = {"rules": [result.json() for result in results], "agreement": scoring.agreement(results)}
    if options.against is not None:
        replies = options.against_replies if first.rule in one.judged else options.replies
        shown["against"] = scoring.compare(first, by(rules[0], options.against, replies))
    if options.items is not None:
        with _writing(options.items):
            first.write_items(options.items)
    if options.out is not None:
        with _writing(options.out):
            scoring.write_score(first, options.out / SCORES)
    if options.json:
        print(json.dumps(shown))
        return
    console = Console()
    for result in results:
        console.print(table(result))
    for row in shown.get("agreement", ()):
        console.print(
            f"{row['rules'][0]} and {row['rules'][1]} agree on {row['agree']:.1%} of {row['items']:,} questions"
        )
    if options.against is not None:
        console.print(_against(shown["against"]))
    if made:
        console.print(", ".join(map(str, made)), soft_wrap=True, highlight=False)


def _export(options: options.Score, one: Benchmark, loaded: Loaded) -> list[Path]:
    """The files that the benchmark's server or script takes; no score is needed for them."""
    assert options.export is not None
    answers = files.read_answers(options.predictions, one, loaded, partial=options.partial)
    try:
        with _writing(options.export):
            made = one.export(loaded, answers, options.export)
    except KeyError as error:
        if len(answers) == len(loaded.questions):
            raise
        raise UserError(f"--export: {one.name}'s file needs every answer, and {error} has none") from None
    if not made:
        raise UserError(f"--export: {one.name} has no server and no script that takes a file")
    return made


def _against(found: Mapping[str, Any]) -> Table:
    shown = Table(title="minus those of --against, the same units resampled for both")
    shown.add_column("metric")
    shown.add_column("difference", justify="right")
    shown.add_column("95 % interval", justify="right")
    for name, row in list(found["differences"].items())[:_SHOWN]:
        low, high = row["ci95"]
        shown.add_row(name, f"{row['value']:+.4g}", f"{low:+.4g} to {high:+.4g}")
    if "mcnemar" in found:
        test = found["mcnemar"]
        shown.caption = (
            f"right here and wrong there: {test['only_ours']}; the other way: {test['only_theirs']}; "
            f"McNemar's exact p = {test['p']:.3g}"
        )
    return shown


def judge(options: options.Judge) -> int:
    """Asks judges; returns the exit code.

    Raises:
        UserError: something that the user must mend.
    """
    from reverie_jax.cli import annotate
    from reverie_jax.eval import judge as judging
    from reverie_jax.eval.benchmarks.mm_vet import MmVet
    from reverie_jax.hosted.session import RequestConfig

    one = find_benchmark(options.benchmark)
    loaded = one.load(options.annotations)
    if isinstance(one, MmVet):
        try:
            one = MmVet(options.runs)
        except ValueError as error:
            raise UserError(f"--runs {options.runs}: {error}") from None
    elif options.runs != 1:
        raise UserError(f"--runs {options.runs}: only mm-vet asks its judge several times")
    rule = options.rule or next((rule for rule in one.rules if rule in one.judged), one.rules[0])
    answers = files.read_answers(options.predictions, one, loaded, partial=True)
    settings = dataclasses.replace(annotate.settings(options.hosted), longest=options.longest, structured=False)
    if settings.temperature is None:
        settings = dataclasses.replace(settings, temperature=one.judge_temperature)
    how = RequestConfig(settings=settings, limits=annotate.limits(options.hosted))
    common: dict[str, Any] = {
        "who": options.judge,
        "out": options.out,
        "how": how,
        "environment": os.environ,
        "prompts": options.prompts,
        "images": options.images,
    }
    console = Console(stderr=True)
    if options.dry_run:
        Console().print(annotate.estimates_table(judging.estimate(one, loaded, answers, rule, **common)))
        return 0
    local = [who.removeprefix(judging.LOCAL) for who in options.judge if who.startswith(judging.LOCAL)]
    generate = _local(local[0], loaded, options.longest) if local else None
    with annotate.progress_bar(console) as bar:
        made = judging.judge(
            one, loaded, answers, rule, **common, on_progress=annotate.progress_callback(bar), generate=generate
        )
    for note in made.notes:
        console.print(f"reverie: {note}", highlight=False, markup=False)
    console.print(f"reverie: {annotate.told(made.outcome)}", highlight=False, markup=False)
    for who, path in made.files.items():
        print(f"{who}: {path}")
    return annotate.exit_code(console, {"judge": made.outcome})


def _local(checkpoint: str, loaded: Loaded, longest: int) -> Any:
    """One of our own models as a judge: greedy, each request a conversation."""

    def generate(requests: Sequence[JudgeRequest]) -> list[str]:
        from reverie_jax.cli import load_tuned
        from reverie_jax.data.processor import ask
        from reverie_jax.eval.engine import generate as answers

        model, processor = load_tuned(checkpoint, None)
        records = [
            ask(None if request.image is None else loaded.picture(request.image), request.prompt)
            for request in requests
        ]
        return answers(model, processor, records, max_new_tokens=longest)

    return generate


def report(options: options.Report) -> None:
    """Writes the page.

    Raises:
        UserError: something that the user must mend.
    """
    from reverie_jax.eval.report import page as pages

    runs = pages.read_runs(options.runs)
    page = pages.render(runs, data=options.data, images=options.images, shown=options.shown)
    with _writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page, "utf-8")
    print(options.out)

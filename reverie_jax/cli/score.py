"""`reverie score`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData
    from reverie_jax.eval.score import Score as Result

_ROWS = 16
"""Maximum metrics in a table; JSON has all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Score an answer file of reverie-jax, of LLaVA or in the benchmark's own form: no model, no network.

    Answers are joined to questions by id. A missing, duplicate or unknown id, a broken line, or ids that could be those of
    other questions are errors; prompts in other words are not.
    """

    benchmark: common.BenchmarkName
    predictions: common.Predictions
    data: Annotated[Path, common.option("PATH")]
    """Folder of the benchmark's official files, or of such folders by name; the file itself where it is one; or `hub`."""
    rule: Annotated[str | None, common.option("RULE")] = None
    """Scoring rule; the benchmark's official one if omitted. `all` compares all rules that need no judge."""
    replies: Annotated[Path | None, common.FILE] = None
    """A judge's replies, written by `reverie judge` or by the scripts of LLaVA-Bench, MMHal-Bench (LLaVA-RLHF) or MM-Vet."""
    partial: Annotated[bool, common.FLAG] = False
    """Accept missing answers; they count as the rule says."""
    compare_to: Annotated[Path | None, common.FILE] = None
    """Second answer file: differences with intervals, and McNemar's test."""
    compare_replies: Annotated[Path | None, common.FILE] = None
    """A judge's replies to the second answer file."""
    out: Annotated[Path | None, common.FOLDER] = None
    """Output folder: scores.json, as `reverie eval` writes it; `reverie report` reads it."""
    json: common.Json = False
    details: common.Details = None
    export: Annotated[Path | None, common.FOLDER] = None
    """Output folder for the file that the benchmark's server or script reads."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.eval import benchmarks
        from reverie_jax.eval.benchmarks import inputs
        from reverie_jax.eval.benchmarks.interface import NotScorable

        benchmark = benchmarks.find_benchmark(self.benchmark)
        data = inputs.load(benchmark, self.data)
        exported = [] if self.export is None else self._export(benchmark, data, self.export)
        try:
            results = [
                self._score(benchmark, data, self.predictions, rule, self.replies) for rule in self._rules(benchmark)
            ]
        except NotScorable as error:
            if not exported:
                raise
            print(f"{', '.join(map(str, exported))}: written; not scored: {error}")
            return
        content = self._content(benchmark, data, results)
        common.note(dict.fromkeys(note for result in results for note in result.notes))
        self._write(results[0])
        if self.json:
            print(json.dumps(content))
        else:
            _show(results, content, exported)

    def _rules(self, benchmark: Benchmark) -> Sequence[str | None]:
        if self.rule != "all":
            return [self.rule]
        rules = [rule for rule in benchmark.rules if rule not in benchmark.judged_rules or self.replies is not None]
        if not rules:
            raise UserError(f"--rule all: every rule of {benchmark.name} needs a judge; add --replies FILE")
        return rules

    def _score(
        self, benchmark: Benchmark, data: BenchmarkData, predictions: Path, rule: str | None, replies: Path | None
    ) -> Result:
        from reverie_jax.eval.score import score

        return score(benchmark, data, predictions, rule, replies=replies, partial=self.partial)

    def _content(self, benchmark: Benchmark, data: BenchmarkData, results: list[Result]) -> dict[str, Any]:
        """Return what --json prints."""
        from reverie_jax.eval.score import agreement, compare

        first = results[0]
        content = first.json()
        if self.rule == "all":
            content = {"rules": [result.json() for result in results], "agreement": agreement(results)}
        if self.compare_to is not None:
            replies = self.compare_replies if first.rule in benchmark.judged_rules else self.replies
            second = self._score(benchmark, data, self.compare_to, first.rule, replies)
            common.note(second.notes)
            content["comparison"] = compare(first, second)
        return content

    def _write(self, result: Result) -> None:
        from reverie_jax.eval.benchmarks.answer_files import SCORES
        from reverie_jax.eval.score import write_score

        if self.details is not None:
            with common.writing(self.details):
                result.write_details(self.details)
        if self.out is not None:
            with common.writing(self.out / SCORES):
                write_score(result, self.out / SCORES)

    def _export(self, benchmark: Benchmark, data: BenchmarkData, folder: Path) -> list[Path]:
        """Write the files that the benchmark's server or script reads; they need no score."""
        from reverie_jax.eval.benchmarks import answer_files

        answers = answer_files.read_answers(self.predictions, benchmark, data, partial=self.partial)
        try:
            with common.writing(folder):
                paths = benchmark.export(data, answers, folder)
        except KeyError as error:
            if len(answers) == len(data.questions):
                raise
            raise UserError(f"--export: {benchmark.name}'s file needs all answers; {error} is missing") from None
        if not paths:
            raise UserError(f"--export: {benchmark.name} has no server or script that reads a file")
        return paths


def _show(results: Sequence[Result], content: Mapping[str, Any], exported: Sequence[Path]) -> None:
    from rich.console import Console

    console = Console()
    for result in results:
        console.print(score_table(result))
    for row in content.get("agreement", ()):
        console.print(
            f"{row['rules'][0]} and {row['rules'][1]} agree on {row['agree']:.1%} of {row['items']:,} questions"
        )
    if "comparison" in content:
        console.print(_comparison_table(content["comparison"]))
    if exported:
        console.print(", ".join(map(str, exported)), soft_wrap=True, highlight=False)


def score_table(result: Result) -> Table:
    """Return a score as a table for a terminal."""
    from rich.table import Table

    scale = result.scale and f", {result.scale}"
    table = Table(title=f"{result.benchmark}, rule {result.rule} ({result.items:,} questions){scale}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in list(result.metrics.items())[:_ROWS]:
        low, high = result.intervals.get(name, (None, None))
        table.add_row(name, f"{value:.4g}", "" if low is None else f"{low:.4g} to {high:.4g}")
    if len(result.metrics) > _ROWS:
        table.add_row(f"{len(result.metrics) - _ROWS} more with --json", "", "")
    if result.unparsed or result.missing:
        table.caption = f"{result.unparsed:,} answers could not be parsed by the rule; {result.missing:,} are missing"
    return table


def _comparison_table(comparison: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="Difference from --compare-to (paired bootstrap)")
    table.add_column("metric")
    table.add_column("difference", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, row in list(comparison["differences"].items())[:_ROWS]:
        low, high = row["ci95"]
        table.add_row(name, f"{row['value']:+.4g}", f"{low:+.4g} to {high:+.4g}")
    if "mcnemar" in comparison:
        test = comparison["mcnemar"]
        table.caption = (
            f"right only here: {test['only_ours']}; right only there: {test['only_theirs']}; "
            f"McNemar's exact p = {test['p']:.3g}"
        )
    return table

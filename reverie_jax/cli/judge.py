"""`reverie judge`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes

from reverie_jax.cli import common, hosted

if TYPE_CHECKING:
    from reverie_jax.eval.benchmarks.interface import BenchmarkData, JudgeRequest
    from reverie_jax.eval.judge import Generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Ask a model to judge a benchmark's answers; the replies go to OUT/replies.jsonl, which `reverie score` reads.

    Every reply is kept in OUT/journal.sqlite as it comes: nothing that was paid for is requested again. Keys are read from
    GEMINI_API_KEY (or GOOGLE_API_KEY) and OPENAI_API_KEY. Prompts are worded anew unless --prompts names others, so scores
    compare with published ones only up to that difference.
    """

    benchmark: common.BenchmarkName
    predictions: common.Predictions
    data: Annotated[Path, common.option("PATH")]
    """Folder of the benchmark's official files, or of such folders by name; the file itself where it is one; or `hub`."""
    out: Annotated[Path, common.FOLDER]
    """Output folder: replies.jsonl and the journal."""
    judge: common.Judges
    """Model that judges: openai:MODEL, gemini:MODEL, or local:CHECKPOINT. Repeat for each judge."""
    rule: Annotated[str | None, common.option("RULE")] = None
    """Scoring rule; the benchmark's first that needs a judge if omitted."""
    prompts: Annotated[Path | None, common.FOLDER] = None
    """Folder with your own prompts: files named as those in reverie_jax/eval/prompts; missing ones are the built-in."""
    show_image: Annotated[bool, common.FLAG] = True
    """Do not show the judge the image of a benchmark whose judge sees it."""
    max_new_tokens: common.MaxNewTokens = None
    """Maximum length of an answer, in tokens: of the judge's reply; 1,024 if omitted."""
    repeats: Annotated[int, common.N] = 1
    """Times each answer is judged, for MM-Vet (published scores are means of five)."""
    dry_run: common.DryRun = False
    hosted: OmitArgPrefixes[hosted.ProviderOptions] = dataclasses.field(default_factory=hosted.ProviderOptions)

    def run(self) -> None:
        """Run the command; exits with 1 if some answers got no usable reply."""
        from rich.console import Console

        from reverie_jax.eval import benchmarks, judge
        from reverie_jax.eval.benchmarks import answer_files, inputs
        from reverie_jax.hosted.session import RequestConfig
        from reverie_jax.progress import ProgressBars

        benchmark = benchmarks.find_benchmark(self.benchmark)
        data = inputs.load(benchmark, self.data)
        if self.repeats != 1:
            benchmark = benchmark.with_repeats(self.repeats)
        rule = self.rule or next(
            (rule for rule in benchmark.rules if rule in benchmark.judged_rules), benchmark.rules[0]
        )
        file = answer_files.read_answer_file(self.predictions, benchmark, data, partial=True)
        common.note([*file.notes, *answer_files.thoughts_note(self.predictions, benchmark, file.texts, rule)])
        max_new_tokens = 1024 if self.max_new_tokens is None else self.max_new_tokens
        settings = self.hosted.settings(benchmark.judge_temperature)
        settings = dataclasses.replace(settings, max_new_tokens=max_new_tokens, structured=False)
        run = judge.JudgeRun(
            benchmark=benchmark,
            data=data,
            answers=file.texts,
            rule=rule,
            judges=self.judge,
            out=self.out,
            environment=os.environ,
            config=RequestConfig(settings=settings, limits=self.hosted.limits()),
            prompts=self.prompts,
            show_image=self.show_image,
        )
        if self.dry_run:
            Console().print(hosted.estimates_table(run.estimate()))
            return
        local = [name.removeprefix(judge.LOCAL) for name in self.judge if name.startswith(judge.LOCAL)]
        generate = _local(local[0], data, max_new_tokens) if local else None
        with ProgressBars() as bars:
            result = run.run(hosted.progress_callback(bars), generate)
        common.note([*result.notes, hosted.summary(result.outcome)])
        for name, path in result.files.items():
            print(f"{name}: {path}")
        raise SystemExit(hosted.exit_code({"judge": result.outcome}))


def _local(checkpoint: str, data: BenchmarkData, max_new_tokens: int) -> Generate:
    """Return a judge that runs a checkpoint: greedy decoding, each request a conversation of its own."""

    def generate(requests: Sequence[JudgeRequest]) -> list[str]:
        from reverie_jax.data.processor import ask
        from reverie_jax.eval.engine import generate as answers

        model, processor = common.load_merged(checkpoint, (), None, "float32")
        records = [
            ask(None if request.image is None else data.read_image(request.image), request.prompt)
            for request in requests
        ]
        return answers(model, processor, records, max_new_tokens=max_new_tokens)

    return generate

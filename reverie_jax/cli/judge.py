"""`reverie judge`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
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
    """Name of the benchmark; `reverie benchmarks` lists them."""
    predictions: Path
    """Answer file: JSON lines with question_id and text, or the benchmark's own form."""
    data: Path
    """Folder of the benchmark's official files, or one file."""
    out: Path
    """Output folder for replies.jsonl and the journal."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Model that judges: openai:MODEL, gemini:MODEL, or local:CHECKPOINT. Repeat for each judge."""
    rule: str | None = None
    """Scoring rule; the benchmark's first that needs a judge if omitted."""
    prompts: Path | None = None
    """Folder with your own prompts, named as those in reverie_jax/eval/prompts; missing ones are the built-in."""
    show_image: bool = True
    """Show the judge the image, if the benchmark does."""
    max_new_tokens: int | None = None
    """Maximum length of a reply, in tokens; 1,024 if omitted."""
    repeats: int = 1
    """Times each answer is judged, for MM-Vet (published scores are means of five)."""
    dry_run: bool = False
    """Print the number of requests and tokens and the cost; send nothing."""
    hosted: OmitArgPrefixes[hosted.ProviderOptions] = dataclasses.field(default_factory=hosted.ProviderOptions)

    def run(self) -> None:
        """Run the command; exits with 1 if some answers got no usable reply."""
        from rich.console import Console

        from reverie_jax.eval import judge
        from reverie_jax.eval.benchmarks import benchmark, files
        from reverie_jax.hosted.session import RequestConfig

        found = benchmark(self.benchmark)
        loaded = found.load(self.data)
        if self.repeats != 1:
            found = found.repeated(self.repeats)
        rule = self.rule or next((rule for rule in found.rules if rule in found.judged), found.rules[0])
        answers = files.read_answers(self.predictions, found, loaded, partial=True)
        max_new_tokens = 1024 if self.max_new_tokens is None else self.max_new_tokens
        settings = dataclasses.replace(self.hosted.settings(), longest=max_new_tokens, structured=False)
        if settings.temperature is None:
            settings = dataclasses.replace(settings, temperature=found.judge_temperature)
        options: dict[str, Any] = {
            "who": self.judge,
            "out": self.out,
            "how": RequestConfig(settings=settings, limits=self.hosted.limits()),
            "environment": os.environ,
            "prompts": self.prompts,
            "images": self.show_image,
        }
        if self.dry_run:
            Console().print(hosted.estimates_table(judge.estimate(found, loaded, answers, rule, **options)))
            return
        local = [name.removeprefix(judge.LOCAL) for name in self.judge if name.startswith(judge.LOCAL)]
        generate = _local(local[0], loaded, max_new_tokens) if local else None
        with common.ProgressBars() as bars:
            callback = hosted.progress_callback(bars)
            made = judge.judge(found, loaded, answers, rule, **options, on_progress=callback, generate=generate)
        common.note([*made.notes, hosted.summary(made.outcome)])
        for name, path in made.files.items():
            print(f"{name}: {path}")
        raise SystemExit(hosted.exit_code({"judge": made.outcome}))


def _local(checkpoint: str, loaded: BenchmarkData, max_new_tokens: int) -> Generate:
    """Return a judge that is one of our own models: greedy, each request a conversation."""

    def generate(requests: Sequence[JudgeRequest]) -> list[str]:
        from reverie_jax.data.processor import ask
        from reverie_jax.eval.engine import generate as answers

        model, processor = common.load_merged(checkpoint, (), None)
        records = [
            ask(None if request.image is None else loaded.read_image(request.image), request.prompt)
            for request in requests
        ]
        return answers(model, processor, records, max_new_tokens=max_new_tokens)

    return generate

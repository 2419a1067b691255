"""Base of benchmarks that a judge rates: prompts filled from templates, and replies that must be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    JudgeRequest,
    NotScorable,
    Question,
    Texts,
)


def fill(prompts: Texts, name: str, **fields: str) -> str:
    """Return a `str.format` template with its placeholders filled in.

    Raises:
        BenchmarkError: The template is missing or has other placeholders.
    """
    if name not in prompts:
        raise BenchmarkError(f"{name}.txt: missing judge prompt")
    try:
        return prompts[name].format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        places = ", ".join(f"{{{field}}}" for field in fields)
        raise BenchmarkError(
            f"{name}.txt: invalid template ({error!r}); its placeholders are {places}; write a brace as {{{{ or }}}}"
        ) from None


def require_replies(benchmark: Benchmark, replies: Texts | None, ids: Iterable[str]) -> Texts:
    """Return the replies, after a check that none of `ids` is missing.

    Raises:
        BenchmarkError: Replies are missing.
    """
    if replies is None:
        offline = [rule for rule in benchmark.rules if rule not in benchmark.judged_rules]
        raise NotScorable(
            f"{benchmark.name}: needs replies of a judge; run `reverie judge`, and name its file with --replies"
            + (f", or score without a judge with --rule {' or '.join(offline)}" if offline else "")
        )
    wanted = list(ids)
    missing = [id for id in wanted if id not in replies]
    if missing:
        raise BenchmarkError(
            f"{benchmark.name}: {len(missing)} of {len(wanted)} replies of the judge are missing, the first is "
            f"{missing[0]}; run `reverie judge` again, which asks only for the missing ones"
        )
    return replies


class JudgedBenchmark(Benchmark):
    """Base of benchmarks whose official rule needs a judge. Subclasses define `question_requests`."""

    judged_rules: ClassVar[frozenset[str]] = frozenset({OFFICIAL})

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield what the judge is asked about an answered question."""
        raise NotImplementedError

    def judge_requests(self, loaded: BenchmarkData, answers: Texts, rule: str, prompts: Texts) -> list[JudgeRequest]:
        """Return the requests about all answers; see `Benchmark.judge_requests`."""
        if rule not in self.judged_rules:
            return []
        answered = [question for question, _ in loaded.answered(answers)]
        return [r for question in answered for r in self.question_requests(loaded, question, answers, prompts)]

    def replies_to(self, loaded: BenchmarkData, answers: Texts, replies: Texts | None) -> Texts:
        """Return the replies, after a check that there is one to each answer."""
        return require_replies(self, replies, (str(question.id) for question, _ in loaded.answered(answers)))

"""Files of a judge's replies: one JSON object a line, in the order of the requests.

Keys: `id` (of `JudgeRequest`), `reply`, `judge` (provider:model), `version` (the model's name for itself), `date`, `prompt`
(short digest of the templates), `answers` (short digest of the judged answers), `temperature`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import BenchmarkData, BenchmarkError
from reverie_jax.hosted.interface import digest
from reverie_jax.hosted.thoughts import split_thoughts

REPLIES = "replies.jsonl"


def answers_digest(answers: Mapping[str, str]) -> str:
    """Return a short digest of answers: replies about other answers must not be used for these."""
    return digest("answers", dict(answers))[:12]


class JudgeReply(NamedTuple):
    """A reply, the model's name for itself, and the day of the reply (YYYY-MM-DD, UTC)."""

    reply: str
    version: str
    date: str

    def row(self, id: str, judge: str, prompt: str, answers: str, temperature: float | None) -> dict[str, Any]:
        """Return the reply as a row of the file."""
        origin = {"judge": judge, "version": self.version, "date": self.date}
        return {
            "id": id,
            "reply": self.reply,
            **origin,
            "prompt": prompt,
            "answers": answers,
            "temperature": temperature,
        }


def write_replies(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines atomically."""
    inputs.write_lines(path, rows)


_UNIFORM = {
    "judge": "judges",
    "prompt": "prompts",
    "answers": "models' answers",
    "temperature": "temperatures",
}
"""Keys with the same value in all rows of a file, and their plural for messages."""


def _replies_of(row: Any, number: int, loaded: BenchmarkData | None) -> list[tuple[Any, Any]]:
    """Return the replies in a row of a file, by id."""
    if "reply" not in row and "choices" in row:  # a completion of OpenAI, as LLaVA-RLHF's script keeps them
        questions = loaded.questions if loaded is not None else ()
        id = questions[number].id if number < len(questions) else number
        return [(str(id), _words(row["choices"]))]
    if "reply" not in row and isinstance(row.get("content"), list):  # MM-Vet's grades, a reply for each run
        return [(f"{row['pid']}#{run}", text) for run, text in enumerate(row["content"])]
    if "reply" not in row and "content" in row:  # LLaVA's review, whose own id is a line number
        return [(row["question_id"], row["content"])]
    if "id" not in row or "reply" not in row:
        raise ValueError(f"no id and reply; columns: {', '.join(map(str, row))}")
    return [(row["id"], row["reply"])]


def _words(choices: Any) -> Any:
    """Return the text of a completion, whose content may be a list of parts.

    Raises:
        ValueError: There is none.
    """
    content = choices[0]["message"]["content"] if choices else None
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if content is None:
        raise ValueError("a completion without content")
    return content


def read_replies(path: Path, loaded: BenchmarkData | None = None) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a judge's replies by id, and their origin for the record: judge, version, dates, prompt, answers.

    Only `id` and `reply` are required: replies may come from elsewhere. The files of three official scripts are read too:
    LLaVA's reviews (`question_id`, `content`), LLaVA-RLHF's completions (a list in the order of the questions) and MM-Vet's
    grades (by id, a list of `content`). A model's thoughts are removed.

    Args:
        path: of the file.
        loaded: the questions, whose order a list of completions has.

    Raises:
        BenchmarkError: The file cannot be read, an id is a duplicate, a reply has only thoughts, or the replies are of
            several judges, to several prompts or about several models' answers.
    """
    replies: dict[str, str] = {}
    values: dict[str, set[Any]] = {name: set() for name in (*_UNIFORM, "version", "date")}
    completions = 0

    def parse(row: Any) -> None:
        nonlocal completions
        for id, reply in _replies_of(row, completions, loaded):
            id = int(id) if isinstance(id, float) and id.is_integer() else id  # as pandas writes them
            if isinstance(id, bool) or not isinstance(id, str | int) or not isinstance(reply, str):
                raise TypeError(f"the reply to {id!r} is {reply!r}")
            if str(id) in replies:
                raise BenchmarkError(f"{path}: duplicate reply {id}")
            thoughts, words = split_thoughts(reply)
            if thoughts and not words.strip():
                raise BenchmarkError(
                    f"{path}: the reply to {id} has only thoughts; delete its row, and run `reverie judge` again "
                    "with a higher --max-new-tokens"
                )
            replies[str(id)] = words if thoughts else reply
        for name, found in values.items():
            found.add(row.get(name) if isinstance(row.get(name), str | float | int) else None)
        completions += "reply" not in row and "choices" in row

    inputs.parse_rows(path, "judge's reply", parse, min_rows=0)
    if completions and loaded is not None and completions != len(loaded.questions):
        raise BenchmarkError(
            f"{path}: {completions} completions for {len(loaded.questions)} questions, whose order tells which is whose"
        )
    for name, plural in _UNIFORM.items():
        if len(values[name]) > 1:
            found = ", ".join(sorted(map(str, values[name])))
            raise BenchmarkError(f"{path}: replies of several {plural} in one file ({found}); split the file")
    known = {name: sorted(map(str, found - {None, ""})) for name, found in values.items()}
    dates = known["date"]
    protocol = {
        "judge": ", ".join(known["judge"]) or "unknown",
        "judge/version": ", ".join(known["version"]),
        "judge/date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
        "judge/prompt": ", ".join(known["prompt"]),
        "judge/answers": ", ".join(known["answers"]),
        "judge/temperature": ", ".join(known["temperature"]),
    }
    return replies, {name: value for name, value in protocol.items() if value}

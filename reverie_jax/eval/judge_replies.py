"""Files of a judge's replies: one JSON object a line, in the order of the requests.

Keys: `id` (of `JudgeRequest`), `reply`, `judge` (provider:model), `version` (the model's name for itself), `date`, `prompt`
(short digest of the templates), `answers` (short digest of the judged answers), `temperature`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.files import atomic_write
from reverie_jax.hosted.interface import digest

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
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


_UNIFORM = {
    "judge": "judges",
    "prompt": "prompts",
    "answers": "models' answers",
    "temperature": "temperatures",
}
"""Keys with the same value in all rows of a file, and their plural for messages."""


def read_replies(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a judge's replies by id, and their origin for the record: judge, version, dates, prompt, answers.

    Only `id` and `reply` are required: replies may come from elsewhere.

    Raises:
        BenchmarkError: The file cannot be read, an id is a duplicate, or the replies are of several judges, to several
            prompts or about several models' answers.
    """
    replies: dict[str, str] = {}
    values: dict[str, set[Any]] = {name: set() for name in (*_UNIFORM, "version", "date")}

    def parse(row: Any) -> None:
        id, reply = row["id"], row["reply"]
        if not isinstance(id, str | int) or not isinstance(reply, str):
            raise TypeError("id or reply")
        if str(id) in replies:
            raise BenchmarkError(f"{path}: duplicate reply {id}")
        replies[str(id)] = reply
        for name, found in values.items():
            found.add(row.get(name))

    inputs.parse_rows(path, "judge's reply", parse, min_rows=0)
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

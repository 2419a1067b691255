"""Files of a judge's replies: a JSON object a line, in the order in which the judge was asked.

`id` (of `JudgeRequest`), `reply`, `judge` (provider:model), `version` (the model's own name), `date`, `prompt` (short digest
of the templates), `answers` (short digest of what was judged), `temperature`.
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


def of_answers(answers: Mapping[str, str]) -> str:
    """A short name of what was judged: replies to other answers must not be taken for replies to these."""
    return digest("answers", dict(answers))[:12]


class JudgeReply(NamedTuple):
    """A reply, the name by which the model calls itself, and the day it came (YYYY-MM-DD, UTC)."""

    reply: str
    version: str
    date: str

    def row(self, id: str, judge: str, prompt: str, answers: str, temperature: float | None) -> dict[str, Any]:
        """A line of the file."""
        where = {"judge": judge, "version": self.version, "date": self.date}
        what = {"prompt": prompt, "answers": answers, "temperature": temperature}
        return {"id": id, "reply": self.reply, **where, **what}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines; the file is the old one or the new one, never half of it."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


_SAME = {
    "judge": "judges",
    "prompt": "prompts",
    "answers": "models' answers",
    "temperature": "temperatures",
}
"""What the replies of one file must agree in, and what is wrong with them if they do not."""


def read_replies(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """A judge's replies by id, and what to say of them beside a score: judge, version, dates, prompt, answers.

    Only `id` and `reply` must be there: replies may come from elsewhere.

    Raises:
        BenchmarkError: the file cannot be read; an id stands there twice; the replies are of several judges, to several
            prompts or about several models' answers.
    """
    replies: dict[str, str] = {}
    said: dict[str, set[Any]] = {name: set() for name in (*_SAME, "version", "date")}

    def take(row: Any) -> None:
        id, reply = row["id"], row["reply"]
        if not isinstance(id, str | int) or not isinstance(reply, str):
            raise TypeError("id or reply")
        if str(id) in replies:
            raise BenchmarkError(f"{path}: the reply {id} stands there twice")
        replies[str(id)] = reply
        for name, values in said.items():
            values.add(row.get(name))

    inputs.parse_rows(path, "judge's reply", take, min_rows=0)
    for name, many in _SAME.items():
        if len(said[name]) > 1:
            values = ", ".join(sorted(map(str, said[name])))
            raise BenchmarkError(f"{path}: replies of several {many} in one file ({values}); keep them apart")
    known = {name: sorted(map(str, values - {None, ""})) for name, values in said.items()}
    dates = known["date"]
    protocol = {
        "judge": ", ".join(known["judge"]) or "not said",
        "judge/version": ", ".join(known["version"]),
        "judge/date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
        "judge/prompt": ", ".join(known["prompt"]),
        "judge/answers": ", ".join(known["answers"]),
        "judge/temperature": ", ".join(known["temperature"]),
    }
    return replies, {name: value for name, value in protocol.items() if value}

"""Pictures with questions and answers for a page: where runs part, and where they see what is not there."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from reverie_jax.data import images as pictures
from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import LETTER, SHORT, ParsedAnswer
from reverie_jax.eval.report.answers import RescoredRun, truth
from reverie_jax.scenes.dataset import read_graphs
from reverie_jax.scenes.language import mentioned

SIDE = 320
"""Longest side of a picture on the page, in pixels."""
CLIP = 700
"""Characters of an answer that are shown."""
ROWS = 4
"""Questions about one picture in a gallery."""

_NONE = ParsedAnswer("", "")

Flags = Callable[[str, str], Sequence[str]]


def flags(again: RescoredRun) -> Flags:
    """What a run's answer to a question names that is not there: a function of run and question."""
    graphs = read_graphs(again.loaded.known["folder"]) if again.benchmark.name == "scenes" else {}

    def flagged(run: str, id: str) -> Sequence[str]:
        reading, question = again.parsed_answers[run].get(id, _NONE), again.questions[id]
        if graphs and reading.category == "description":
            there = set(graphs[question.unit].categories)
            return [name for name in mentioned(_text(again, run, id)) if name not in there]
        if again.benchmark.name == "amber" and reading.category == "generative" and reading.right == 0:
            return reading.parsed.split(", ")
        if (
            again.benchmark.name == "mmhal"
            and not reading.unparsed
            and reading.right is not None
            and reading.right < 0.5
        ):
            return [f"rated {reading.parsed}"]
        marked = [part for part in reading.parsed.split(", ") if part.startswith("not: ")]
        return [part.removeprefix("not: ") for part in marked]

    return flagged


def galleries(again: RescoredRun, first: str, shown: int) -> list[dict[str, Any]]:
    """Titles, how many questions and pictures each is about, and at most `shown` pictures, spread over the benchmark."""
    parsed_answers, flagged = again.parsed_answers, flags(again)
    other = [run for run in parsed_answers if run != first] if first in parsed_answers else []
    picked: list[tuple[str, list[str], bool]] = []
    for run in other:
        for title, bad, good in (
            (f"{first} wrong, {run} right", first, run),
            (f"{first} right, {run} wrong", run, first),
        ):
            ids = [
                id
                for id in again.questions
                if parsed_answers[bad].get(id, _NONE).right == 0 and parsed_answers[good].get(id, _NONE).right == 1
            ]
            picked.append((title, ids, True))
    for run, found in parsed_answers.items():
        said = {id: found.get(id, _NONE) for id in again.questions}
        yes = [
            id
            for id, question in again.questions.items()
            if said[id].parsed == "yes" and said[id].right == 0 and truth(question, said[id]) == "no"
        ]
        named = [id for id in again.questions if flagged(run, id)]
        picked += [(f"{run} says yes where the truth is no", yes, False)]
        picked += [(f"{run} names what is not there", named, False)]
    cards = _Cards(again, flagged)
    return [
        {"title": title, "questions": len(ids), "open": opened, **cards.of(ids, shown)}
        for title, ids, opened in picked
        if ids
    ]


def _text(again: RescoredRun, run: str, id: str) -> str:
    return again.scores[run].answers.get(id, "")


class _Cards:
    """Pictures with questions and every run's answers; each picture is made once."""

    def __init__(self, again: RescoredRun, flagged: Flags):
        self.again, self.flagged = again, flagged
        self.picture = functools.cache(self._picture)

    def of(self, ids: Sequence[str], shown: int) -> dict[str, Any]:
        by_image: dict[str, list[str]] = {}
        for id in ids:
            image = self.again.questions[id].image
            by_image.setdefault(image if image is not None else f"\0{id}", []).append(id)
        every, count = list(by_image.items()), min(max(shown, 0), len(by_image))
        chosen = [every[place * len(every) // count] for place in range(count)]
        return {"pictures": len(every), "cards": [self._card(image, asked) for image, asked in chosen]}

    def _card(self, image: str, ids: Sequence[str]) -> dict[str, Any]:
        # POPE asks the same in several of its splits.
        rows = list({(q["question"], *(a["text"] for a in q["answers"])): q for q in map(self._row, ids)}.values())
        found = {"name": "", "picture": None, "missing": "no picture goes with it"}
        if not image.startswith("\0"):
            found = {"name": image, **self.picture(image)}
        return found | {"rows": rows[:ROWS], "more": max(0, len(rows) - ROWS)}

    def _picture(self, image: str) -> dict[str, Any]:
        """As a JPEG in a data URI, or why there is none."""
        try:
            small = pictures.decode(self.again.loaded.read_image(image), image)
        except UserError as error:
            return {"picture": None, "missing": str(error)}
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82, optimize=True)
        return {"picture": base64.b64encode(buffer.getvalue()).decode(), "missing": ""}

    def _row(self, id: str) -> dict[str, Any]:
        again, question = self.again, self.again.questions[id]
        parsed_answers = {run: found[id] for run, found in again.parsed_answers.items() if id in found}
        answers = []
        for run, reading in parsed_answers.items():
            row = again.rows[run].get(id, {})
            answers.append(
                {
                    "run": run,
                    "text": clip(_text(again, run, id)),
                    "first": clip(row.get("first_text")),
                    "why": clip(row.get("rationale")),
                    "right": reading.right,
                    "flagged": list(dict.fromkeys(self.flagged(run, id))),
                }
            )
        text = question.text.removesuffix(SHORT).removesuffix(LETTER).rstrip()
        asked = " ".join([*(f"{ask} {said}" for ask, said in question.before), text])
        label = truth(question, next(iter(parsed_answers.values()), None))
        return {"id": id, "question": clip(asked), "truth": clip(label), "answers": answers}


def clip(text: Any) -> str:
    """As much of a text as is shown."""
    if not isinstance(text, str):
        return ""
    return text if len(text) <= CLIP else text[:CLIP] + " …"

"""Galleries of a report: images with questions and answers where runs disagree, or name what is not in the image."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from reverie_jax.data import images
from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks.interface import LETTER, SHORT
from reverie_jax.eval.benchmarks.scoring import ParsedAnswer
from reverie_jax.eval.report.answers import RescoredRun, truth

SIDE = 320
"""Longest side of an image on the page, in pixels."""
CLIP = 700
"""Maximum length of a text on the page, in characters."""
ROWS = 4
"""Maximum number of questions about one image in a gallery."""

_NONE = ParsedAnswer("", "")


def hallucinated(rescored: RescoredRun, run: str, id: str) -> Sequence[str]:
    """Return what a run's answer to a question names that is not in the image (see `Benchmark.hallucinated`)."""
    parsed, question = rescored.parsed_answers[run].get(id, _NONE), rescored.questions[id]
    return rescored.benchmark.hallucinated(rescored.data, question, rescored.text(run, id), parsed)


def galleries(rescored: RescoredRun, first: str, count: int) -> list[dict[str, Any]]:
    """Return galleries that are not empty: title, number of questions and images, and at most `count` images.

    Args:
        rescored: The runs.
        first: Name of the run that the others are compared with.
        count: Maximum number of images in a gallery; they are spread evenly over the benchmark.
    """
    parsed_answers = rescored.parsed_answers
    selected: list[tuple[str, list[str], bool]] = []

    def right(run: str, id: str) -> float | None:
        return parsed_answers[run].get(id, _NONE).right

    for run in parsed_answers if first in parsed_answers else ():
        if run != first:
            for bad, good, title in (
                (first, run, f"{first} wrong, {run} right"),
                (run, first, f"{first} right, {run} wrong"),
            ):
                ids = [id for id in rescored.questions if right(bad, id) == 0 and right(good, id) == 1]
                selected.append((title, ids, True))
    for run, answers in parsed_answers.items():
        false_yes = [
            id
            for id, question in rescored.questions.items()
            for parsed in [answers.get(id, _NONE)]
            if parsed.parsed == "yes" and parsed.right == 0 and truth(question, parsed) == "no"
        ]
        named = [id for id in rescored.questions if hallucinated(rescored, run, id)]
        selected += [(f"{run} answers yes where the truth is no", false_yes, False)]
        selected += [(f"{run} names what is not in the image", named, False)]
    cards = _Cards(rescored)
    return [
        {"title": title, "questions": len(ids), "open": opened, **cards.of(ids, count)}
        for title, ids, opened in selected
        if ids
    ]


class _Cards:
    """Images with questions and every run's answers; each image is encoded once."""

    def __init__(self, rescored: RescoredRun):
        self.rescored = rescored
        self.thumbnail = functools.cache(self._thumbnail)

    def of(self, ids: Sequence[str], count: int) -> dict[str, Any]:
        by_image: dict[str, list[str]] = {}
        for id in ids:
            image = self.rescored.questions[id].image
            by_image.setdefault(image if image is not None else f"\0{id}", []).append(id)
        groups, count = list(by_image.items()), min(max(count, 0), len(by_image))
        chosen = [groups[index * len(groups) // count] for index in range(count)]
        return {"images": len(groups), "cards": [self._card(image, members) for image, members in chosen]}

    def _card(self, image: str, ids: Sequence[str]) -> dict[str, Any]:
        # POPE asks the same in several of its splits.
        rows = list({(q["question"], *(a["text"] for a in q["answers"])): q for q in map(self._row, ids)}.values())
        card = {"name": "", "image": None, "missing": "a question without an image"}
        if not image.startswith("\0"):
            card = {"name": image, **self.thumbnail(image)}
        return card | {"rows": rows[:ROWS], "more": max(0, len(rows) - ROWS)}

    def _thumbnail(self, name: str) -> dict[str, Any]:
        """Return a small JPEG in base64, or the reason why there is none."""
        try:
            small = images.decode(self.rescored.data.read_image(name), name)
        except UserError as error:
            return {"image": None, "missing": str(error)}
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82, optimize=True)
        return {"image": base64.b64encode(buffer.getvalue()).decode(), "missing": ""}

    def _row(self, id: str) -> dict[str, Any]:
        rescored, question = self.rescored, self.rescored.questions[id]
        parsed_answers = {run: answers[id] for run, answers in rescored.parsed_answers.items() if id in answers}
        answers = []
        for run, parsed in parsed_answers.items():
            row = rescored.rows[run].get(id, {})
            answers.append(
                {
                    "run": run,
                    "text": clip(rescored.text(run, id)),
                    "first": clip(row.get("first_text")),
                    "rationale": clip(row.get("rationale")),
                    "right": parsed.right,
                    "hallucinated": list(dict.fromkeys(hallucinated(rescored, run, id))),
                }
            )
        text = question.text.removesuffix(SHORT).removesuffix(LETTER).rstrip()
        text = " ".join([*(f"{prompt} {answer}" for prompt, answer in question.history), text])
        label = truth(question, next(iter(parsed_answers.values()), None))
        return {"id": id, "question": clip(text), "truth": clip(label), "answers": answers}


def clip(text: Any) -> str:
    """Return the part of a text that the page shows; "" for what is not a text."""
    if not isinstance(text, str):
        return ""
    return text if len(text) <= CLIP else text[:CLIP] + " …"

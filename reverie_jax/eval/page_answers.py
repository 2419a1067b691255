"""What a page says of answers, where the benchmark's files are at hand: differences, rules, yes and no, pictures."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reverie_jax.data import images as pictures
from reverie_jax.data.scenes.dataset import read_graphs
from reverie_jax.data.scenes.language import mentioned
from reverie_jax.errors import UserError
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks import benchmark as find_benchmark
from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import Benchmark, Loaded, Question, Reading, Table
from reverie_jax.eval.replies import REPLIES
from reverie_jax.eval.score import Score, agreement, compare, score

SIDE = 320
"""Longest side of a picture on the page, in pixels."""
CLIP = 700
"""Characters of an answer that are shown."""
ROWS = 4
"""Questions about one picture in a gallery."""
FEW = 20
"""Fewer units than this make an interval that is only rough."""
BINS = 10

Row = Mapping[str, Any]


def number(value: float | None, digits: int, sign: str = "") -> str:
    """ "0.812"; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def verdict(low: float, high: float, units: int) -> str:
    """What an interval of a difference allows to say; `units` are what was resampled for it."""
    if units < 2 or not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    rough = "" if units >= FEW else f" (rough: {units} units)"
    return ("higher" if low > 0 else "lower" if high < 0 else "no difference beyond the interval") + rough


@dataclasses.dataclass(frozen=True)
class Again:
    """A benchmark's answers, read once more beside its files.

    Attributes:
        rules: by run, its rule.
        scores: by run, by its own rule, without intervals; runs that could not be scored are missing.
        rows: by run, rows of the answer file by question.
        notes: what could not be done, a sentence each.
    """

    benchmark: Benchmark
    loaded: Loaded
    scores: Mapping[str, Score]
    rows: Mapping[str, Mapping[str, Row]]
    notes: Sequence[str]

    @functools.cached_property
    def questions(self) -> dict[str, Question]:
        return {str(question.id): question for question in self.loaded.questions}

    @functools.cached_property
    def readings(self) -> dict[str, dict[str, Reading]]:
        """By run and question."""
        return {run: {str(r.id): r for r in found.scored.readings} for run, found in self.scores.items()}


def read(name: str, folders: Mapping[str, Path], stored: Mapping[str, Row], data: Path, images: Path | None) -> Again:
    """Scores a benchmark's answers of several runs once more.

    Args:
        folders: by run, that of the answers.
        stored: by run, its scores.json.
        data: the benchmark's files, or a folder of such folders by benchmark.

    Raises:
        UserError: the benchmark's files cannot be used.
    """
    one = find_benchmark(name)
    loaded = one.load(data / name if (data / name).is_dir() else data)
    if images is not None:
        loaded = dataclasses.replace(loaded, picture=files.pictures(images))
    scores, rows, notes = {}, {}, []
    for run, folder in folders.items():
        rule, path, replies = stored[run]["rule"], folder / "predictions.jsonl", folder / REPLIES
        try:
            rows[run] = _rows(path, one, loaded)
            if rule in one.judged and not replies.exists():
                raise UserError(f"the rule {rule} needs a judge's replies, and {replies} is not there")
            found = score(
                one, loaded, path, rule, replies=replies if rule in one.judged else None, partial=True, draws=0
            )
        except UserError as error:
            notes.append(f"{run} was not scored again: {error}")
            continue
        scores[run] = found
        old = stored[run]["metrics"]
        differs = [key for key, value in found.metrics.items() if not _same(value, old.get(key))]
        if differs or found.items != stored[run]["items"]:
            notes.append(
                f"{run}: scores.json and its answers beside these files differ ({', '.join(differs[:3]) or 'questions'}); "
                "the files are of another version, or the answers have changed"
            )
    return Again(one, loaded, scores, rows, notes)


def _same(one: float, other: Any) -> bool:
    if not isinstance(other, int | float):
        return False
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(one) and math.isnan(other))


def _rows(path: Path, one: Benchmark, loaded: Loaded) -> dict[str, Row]:
    found: dict[str, Row] = {}

    def take(row: Row) -> None:
        for part in one.unfold(row):
            key = one.key(part, loaded)
            if key is not None:
                found[key] = part

    files.made(path, "answer", take)
    return found


def differences(again: Again, first: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By other run, `score.compare` with the first one, and its number of units; and why the rest is not compared."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for run, theirs in again.scores.items():
        if run != first and first in again.scores:
            try:
                found[run] = compare(theirs, again.scores[first]) | {"units": len(theirs.scored.units)}
            except UserError as error:
                notes.append(f"{run} is not compared with {first}: {error}")
    return found, notes


def rules(again: Again) -> list[dict[str, Any]]:
    """By run: its headline by every rule that needs no judge, and how far every two of them agree on who is right."""
    found = []
    names = [rule for rule in again.benchmark.rules if rule not in again.benchmark.judged]
    for run, own in again.scores.items() if len(names) > 1 else ():
        made = []
        for rule in names:
            try:
                path = _Path(own.answers)
                made.append(own if rule == own.rule else path.score(again, rule))
            except UserError:
                continue  # what this rule needs (spaCy's vectors, say) is not installed
        if len(made) > 1:
            heads = [(one.rule, *next(iter(one.metrics.items())), one.unparsed) for one in made]
            found.append({"run": run, "heads": heads, "agreement": agreement(made)})
    return found


@dataclasses.dataclass(frozen=True)
class _Path:
    """Answers that were read already, to be scored by another rule."""

    answers: Mapping[str, str]

    def score(self, again: Again, rule: str) -> Score:
        scored = again.benchmark.score(again.loaded, self.answers, rule)
        unread = [reading.id for reading in scored.readings if reading.unread]
        size = len(scored.readings)
        return Score(
            again.benchmark.name, rule, {}, scored.values(), {}, size, len(unread), unread, 0, scored, self.answers
        )


def truth(question: Question, reading: Reading | None = None) -> str:
    """The right answer where the benchmark's files have one, or a yes/no reading that is right or wrong tells it; else ""."""
    known = question.known
    label = next((known[key] for key in ("label", "yes", "truth", "answer", "reference") if key in known), None)
    options = known.get("options") or known.get("choices")
    if isinstance(label, bool):
        return "yes" if label else "no"
    if isinstance(options, Mapping) and label not in (None, ""):
        letter = list(options)[label] if isinstance(label, int) and label < len(options) else str(label)
        return f"{letter}. {options[letter]}" if letter in options else letter
    if "answers" in known:
        label = list(dict.fromkeys(known["answers"]))
    if label is not None:
        return ", ".join(map(str, label)) if isinstance(label, list | tuple) else str(label)
    if reading is not None and reading.parsed in ("yes", "no") and reading.right in (0.0, 1.0):
        return reading.parsed if reading.right else {"yes": "no", "no": "yes"}[reading.parsed]
    return ""


def categories(again: Again) -> dict[str, dict[str, statistics.Estimate]]:
    """By category and run: the share of right answers, with its interval over the benchmark's units."""
    unit = {id: question.unit for id, question in again.questions.items()}
    found: dict[str, dict[str, statistics.Estimate]] = {}
    for run, readings in again.readings.items():
        tables: dict[str, Table] = {}
        for id, reading in readings.items():
            if reading.category and reading.right is not None:
                table = tables.setdefault(reading.category, Table(("right", "all")))
                table.add(unit[id], {"right": reading.right, "all": 1})
        for category, table in tables.items():
            weights = statistics.resamples(len(table.counts))
            estimate = statistics.bootstrap(table.counts, statistics.ratio(0, 1), weights)
            found.setdefault(category, {})[run] = estimate
    return found if len(found) > 1 else {}


def yes_no(again: Again) -> list[dict[str, Any]]:
    """By run, of questions whose truth is yes or no: how often it says yes, how often that is right, and its calibration."""
    found = []
    for run, readings in again.readings.items():
        pairs = [(readings[id].parsed, truth(question, readings[id])) for id, question in again.questions.items()]
        asked = [(said, label) for said, label in pairs if label in ("yes", "no") and said in ("yes", "no", "")]
        if not any(said for said, _ in asked):
            continue
        read = [said for said, _ in asked if said]
        no = [said for said, label in asked if label == "no"]
        found.append(
            {
                "run": run,
                "questions": len(asked),
                "yes": read.count("yes") / len(read),
                "truth": 1 - len(no) / len(asked),
                "false": no.count("yes") / len(no) if no else None,
                "neither": len(asked) - len(read),
                "bins": _bins(again, run),
            }
        )
    return found


def _bins(again: Again, run: str) -> list[tuple[float, float, int]]:
    """Ten equal bins of the model's own probability of yes: its mean, the share where yes is right, and how many."""
    pairs = []
    for id, row in again.rows[run].items():
        said, question = (row.get("metadata") or {}).get("yes"), again.questions.get(id)
        if question is not None and isinstance(said, int | float):
            label = truth(question, again.readings[run].get(id))
            if label in ("yes", "no"):
                pairs.append((float(said), float(label == "yes")))
    if not pairs:
        return []
    chance, right = np.asarray(pairs).T
    place = np.minimum((chance * BINS).astype(int), BINS - 1)
    inside = [place == number for number in range(BINS)]
    return [(float(chance[at].mean()), float(right[at].mean()), int(at.sum())) for at in inside if at.any()]


Flags = Callable[[str, str], Sequence[str]]


def flags(again: Again) -> Flags:
    """What a run's answer to a question names that is not there: a function of run and question."""
    graphs = read_graphs(again.loaded.known["folder"]) if again.benchmark.name == "scenes" else {}

    def flagged(run: str, id: str) -> Sequence[str]:
        reading, question = again.readings[run][id], again.questions[id]
        if graphs and reading.category == "description":
            there = set(graphs[question.unit].categories)
            return [name for name in mentioned(_text(again, run, id)) if name not in there]
        if again.benchmark.name == "amber" and reading.category == "generative" and reading.right == 0:
            return reading.parsed.split(", ")
        if again.benchmark.name == "mmhal" and not reading.unread and reading.right is not None and reading.right < 0.5:
            return [f"rated {reading.parsed}"]
        marked = [part for part in reading.parsed.split(", ") if part.startswith("not: ")]
        return [part.removeprefix("not: ") for part in marked]

    return flagged


def galleries(again: Again, first: str, shown: int) -> list[dict[str, Any]]:
    """Titles, how many questions and pictures each is about, and at most `shown` pictures, spread over the benchmark."""
    readings, flagged = again.readings, flags(again)
    other = [run for run in readings if run != first] if first in readings else []
    picked: list[tuple[str, list[str], bool]] = []
    for run in other:
        for title, bad, good in ((f"{first} wrong, {run} right", first, run), (f"{first} right, {run} wrong", run, first)):
            ids = [
                id
                for id in again.questions
                if id in readings[bad] and readings[bad][id].right == 0 and readings[good].get(id, _NONE).right == 1
            ]
            picked.append((title, ids, True))
    for run, found in readings.items():
        yes = [
            id
            for id, question in again.questions.items()
            if found[id].parsed == "yes" and found[id].right == 0 and truth(question, found[id]) == "no"
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


_NONE = Reading("", "")


def _text(again: Again, run: str, id: str) -> str:
    return again.scores[run].answers.get(id, "")


class _Cards:
    """Pictures with questions and every run's answers; each picture is made once."""

    def __init__(self, again: Again, flagged: Flags):
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
        rows = [self._row(id) for id in ids[:ROWS]]
        found = {"name": "", "picture": None, "missing": "no picture goes with it"}
        if not image.startswith("\0"):
            found = {"name": image, **self.picture(image)}
        return found | {"rows": rows, "more": len(ids) - len(rows)}

    def _picture(self, image: str) -> dict[str, Any]:
        """As a JPEG in a data URI, or why there is none."""
        try:
            small = pictures.decode(self.again.loaded.picture(image), image)
        except UserError as error:
            return {"picture": None, "missing": str(error)}
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82, optimize=True)
        return {"picture": base64.b64encode(buffer.getvalue()).decode(), "missing": ""}

    def _row(self, id: str) -> dict[str, Any]:
        again, question = self.again, self.again.questions[id]
        readings = {run: found[id] for run, found in again.readings.items() if id in found}
        answers = []
        for run, reading in readings.items():
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
        asked = " ".join([*(f"{ask} {said}" for ask, said in question.before), question.text])
        label = truth(question, next(iter(readings.values()), None))
        return {"id": id, "question": clip(asked), "truth": clip(label), "answers": answers}


def clip(text: Any) -> str:
    """As much of a text as is shown."""
    if not isinstance(text, str):
        return ""
    return text if len(text) <= CLIP else text[:CLIP] + " …"

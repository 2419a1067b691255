"""GAVIE: does an answer follow its instruction, and agree with the image? (Liu et al., LRV-Instruction, arXiv 2306.14565.)

Files: `evaluation_set.json`, a list of `image_id` (Visual Genome's) and `question`; `vg_annotation.json`, an object of lists
of `caption` and `bbox` ([x, y, width, height]) by image id. The judge sees these regions and no picture, and gives an answer
two scores of 0 to 10.

No reader of replies was published. Ours looks for "score of the answer1: N" under the headings Relevancy and Accuracy, which
the judge is asked to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    JudgeRequest,
    ParsedAnswer,
    Question,
    Scored,
    Table,
    share,
)
from reverie_jax.eval.benchmarks.judged import fill, needed

ANNOTATIONS = "vg_annotation.json"
CRITERIA = ("accuracy", "relevancy")
_BEFORE = r"^[ \t#*>_\-\d.)(]*"
_HEADING = re.compile(rf"{_BEFORE}(relevancy|accuracy)[ \t*_.:]*$|{_BEFORE}(relevancy|accuracy)[ \t*_]*:", re.I | re.M)
_SCORE = re.compile(r"score\s+of\s+(?:the\s+)?answer\s*1?[\s*_]*:[\s*_<\[(]*(\d+(?:\.\d+)?)(?!\.?\d)", re.I)


def scores(reply: str) -> dict[str, float]:
    """The scores of 0 to 10 by criterion; those that the reply does not give, or twice differently, are not there."""
    headings = list(_HEADING.finditer(reply))
    said: dict[str, set[float]] = {}
    ends = [heading.start() for heading in headings[1:]] + [len(reply)]
    for heading, end in zip(headings, ends, strict=False):  # no heading at all: nothing was said
        name = (heading[1] or heading[2]).lower()
        if found := _SCORE.search(reply[heading.end() : end]):
            said.setdefault(name, set()).add(float(found[1]))
    return {name: min(values) for name, values in said.items() if len(values) == 1 and min(values) <= 10}


def regions(rows: Any, *, slip: bool = True) -> str:
    """A picture in words: a line for each region.

    Args:
        slip: the height is filled with the width, as the official script does (`bbox[2]` twice). The published numbers were
            made so, and its sample prompt shows it: whoever compares with them keeps the slip.
    """
    return "\n".join(
        f"{row['caption']} X:{row['bbox'][0]} Y:{row['bbox'][1]} Width:{row['bbox'][2]} "
        f"Height:{row['bbox'][2 if slip else 3]}"
        for row in rows
    )


class Gavie(Benchmark):
    """See the module's docstring. Ids are places in the file, from 0."""

    name = "gavie"
    max_new_tokens = 512
    judged: ClassVar[frozenset[str]] = frozenset({OFFICIAL})
    needs = (
        f"evaluation_set.json of the LRV-Instruction repository, for the judge its {ANNOTATIONS} beside it, and with "
        "--images Visual Genome's pictures"
    )

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "evaluation_set.json", "*evaluation_set*.json", benchmark=self)
        questions: list[Question] = []

        def make(row: Mapping[str, Any]) -> None:
            text = row["question"] if "question" in row else row["instruction"]  # the official script's name for it
            if not isinstance(text, str):
                raise TypeError(f"question {text!r}")
            image = str(row["image_id"])
            questions.append(Question(len(questions), f"{image}.jpg", text, image, {"image_id": row["image_id"]}))

        files.parse_rows(path, "GAVIE question", make)
        folder = path.parent
        found = files.image_reader(folder, folder / "images", folder / "VG_100K", folder / "VG_100K_2")
        known = {"regions": _annotations(folder / ANNOTATIONS, {q.unit for q in questions})}
        return BenchmarkData(questions, found, {"questions": len(questions)}, known)

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Rows of the official list have no id of their own: they are known by picture and question."""
        if row.get("question_id") is not None:
            return str(row["question_id"])
        text = row.get("question", row.get("instruction"))
        if "image_id" not in row or text is None:
            return None
        same = [q for q in loaded.questions if q.unit == str(row["image_id"]) and q.text == text]
        if len(same) != 1:
            why = (
                "belongs to another version of them"
                if not same
                else "needs a question_id, its place in the file from 0"
            )
            raise BenchmarkError(
                f"{self.name}: {len(same)} of the {len(loaded.questions)} questions are {text!r} about picture "
                f"{row['image_id']}; an answer to it {why}"
            )
        return str(same[0].id)

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        annotations = loaded.known["regions"]
        if annotations is None:
            raise BenchmarkError(f"no {ANNOTATIONS} beside the questions; {self.name} needs {self.needs}")
        found = []
        for question in loaded.questions:
            id = str(question.id)
            if id in answers:
                official, true = annotations[question.unit]
                prompt = fill(
                    prompts, "gavie", regions=official, question=question.text, answer=answers[id], true_regions=true
                )
                found.append(JudgeRequest(id, prompt))
        return found

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A score that a reply does not give is left out of the mean, and counted; a missing answer is 0 in both means."""
        said = needed(self, replies, (str(q.id) for q in loaded.questions if str(q.id) in answers))
        table = Table(
            ["questions", "unread", *(f"{name}/{cell}" for name in CRITERIA for cell in ("sum", "given"))],
            loaded.units,
        )
        parsed_answers = []
        for question in loaded.questions:
            id = str(question.id)
            found = scores(said[id]) if id in answers else dict.fromkeys(CRITERIA, 0.0)
            unparsed = id not in answers or len(found) < len(CRITERIA)
            table.add(question.unit, {"questions": 1, "unread": len(found) < len(CRITERIA)})
            for name, value in found.items():
                table.add(question.unit, {f"{name}/sum": value, f"{name}/given": 1})
            parsed = ", ".join(f"{name} {found[name]:g}" for name in CRITERIA if name in found)
            right = found["accuracy"] / 10 if "accuracy" in found else None
            parsed_answers.append(ParsedAnswer(question.id, parsed if id in answers else "", right, unparsed))
        metrics = {name: share(table[f"{name}/sum"], table[f"{name}/given"]) for name in CRITERIA}
        metrics["unread"] = share(table["unread"], table["questions"])
        protocol = {"parser": "ours", "unread scores": "left out of the mean", "missing answers": "0"}
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """The evaluation set with an `answer` each."""
        rows = [
            {"image_id": q.known["image_id"], "question": q.text, "answer": answers.get(str(q.id), "")}
            for q in loaded.questions
        ]
        return [files.write_lines(out / "gavie_answers.jsonl", rows)]


def _annotations(path: Path, images: set[str]) -> dict[str, tuple[str, str]] | None:
    """Regions by image, with the slip and without; None where there is no file: the model can be asked without it.

    Raises:
        BenchmarkError: the file is broken, or lacks a picture.
    """
    if not path.exists():
        return None
    content = files.read_json(path)
    found = {}
    for image in sorted(images):
        try:
            rows = content[image]
            found[image] = regions(rows), regions(rows, slip=False)
        except (KeyError, TypeError, IndexError) as error:
            raise BenchmarkError(f"{path}: no regions of picture {image} ({error!r})") from None
    return found

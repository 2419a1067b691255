"""GAVIE: does an answer follow its instruction, and agree with the image? (Liu et al., LRV-Instruction, arXiv 2306.14565.)

Files: `evaluation_set.json`, a list of `image_id` (Visual Genome's) and `question`; `vg_annotation.json`, an object of lists
of `caption` and `bbox` ([x, y, width, height]) by image id. The judge sees these regions and no image, and gives an answer
two scores of 0 to 10.

No parser of replies was published. Ours looks for "score of the answer1: N" under the headings Relevancy and Accuracy, which
the judge is asked to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import inputs
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    BenchmarkData,
    BenchmarkError,
    JudgeRequest,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.judged import JudgedBenchmark, fill
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored

ANNOTATIONS = "vg_annotation.json"
CRITERIA = ("accuracy", "relevancy")
_BEFORE = r"^[ \t#*>_\-\d.)(]*"
_HEADING = re.compile(rf"{_BEFORE}(relevancy|accuracy)[ \t*_.:]*$|{_BEFORE}(relevancy|accuracy)[ \t*_]*:", re.I | re.M)
_SCORE = re.compile(r"score\s+of\s+(?:the\s+)?answer\s*1?[\s*_]*:[\s*_<\[(]*(\d+(?:\.\d+)?)(?!\.?\d)", re.I)


def scores(reply: str) -> dict[str, float]:
    """Return scores of 0 to 10 by criterion, without those that the reply does not give or gives twice differently."""
    headings = list(_HEADING.finditer(reply))
    values: dict[str, set[float]] = {}
    ends = [heading.start() for heading in headings[1:]] + [len(reply)]
    for heading, end in zip(headings, ends, strict=False):  # `ends` has one more where there is no heading
        if score := _SCORE.search(reply[heading.end() : end]):
            values.setdefault((heading[1] or heading[2]).lower(), set()).add(float(score[1]))
    return {name: min(found) for name, found in values.items() if len(found) == 1 and min(found) <= 10}


def regions(rows: Any, *, slip: bool = True) -> str:
    """Return an image in words: a line for each region.

    Args:
        rows: of `vg_annotation.json`.
        slip: writes the width as the height, as the official script does (`bbox[2]` twice) and its sample prompt shows. The
            published numbers depend on it.
    """
    return "\n".join(
        f"{row['caption']} X:{row['bbox'][0]} Y:{row['bbox'][1]} Width:{row['bbox'][2]} "
        f"Height:{row['bbox'][2 if slip else 3]}"
        for row in rows
    )


class Gavie(JudgedBenchmark):
    """GAVIE, see the module's docstring. Ids are positions in the file, from 0."""

    name = "gavie"
    metric = "mean accuracy and relevancy"
    unique_ids = False  # they are positions
    lower_is_better = frozenset({"unread"})
    scale = "from 0 to 10; unread from 0 to 1"
    published_items = 1000
    max_new_tokens = 512
    required_files = (
        f"evaluation_set.json of the LRV-Instruction repository, for the judge its {ANNOTATIONS} beside it, and with "
        "--images Visual Genome's images"
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the evaluation set, and the regions if they are there; see `Benchmark.load`."""
        path = inputs.find_file(data, "evaluation_set.json", "*evaluation_set*.json", benchmark=self)
        questions: list[Question] = []

        def add(row: Mapping[str, Any]) -> None:
            text = row["question"] if "question" in row else row["instruction"]  # the official script's name for it
            if not isinstance(text, str):
                raise TypeError(f"question is {text!r}")
            image = str(row["image_id"])
            questions.append(Question(len(questions), f"{image}.jpg", text, image, {"image_id": row["image_id"]}))

        inputs.parse_rows(path, "GAVIE question", add)
        folder = path.parent
        read_image = inputs.image_reader(folder, *(folder / name for name in ("images", "VG_100K", "VG_100K_2")))
        tables = {"regions": _annotations(folder / ANNOTATIONS, {q.cluster for q in questions})}
        return BenchmarkData(questions, read_image, {"questions": len(questions)}, tables)

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows of the official list, which have no id of their own, by image and question."""
        if row.get("question_id") is not None:
            return str(row["question_id"])
        text = row.get("question", row.get("instruction"))
        if "image_id" not in row or text is None:
            return None
        same = [q for q in loaded.questions if q.cluster == str(row["image_id"]) and q.text == text]
        if len(same) != 1:
            reason = "is ambiguous; add a question_id, its position in the file from 0" if same else "is unknown"
            raise LookupError(f"question {text!r} about image {row['image_id']} {reason}")
        return str(same[0].id)

    def judge_requests(self, loaded: BenchmarkData, answers: Texts, rule: str, prompts: Texts) -> list[JudgeRequest]:
        """Return the requests; see `Benchmark.judge_requests`.

        Raises:
            BenchmarkError: The file of regions is missing.
        """
        regions_known = loaded.tables["regions"] is not None
        require(
            regions_known, f"{ANNOTATIONS} is missing beside the questions; {self.name} needs {self.required_files}"
        )
        return super().judge_requests(loaded, answers, rule, prompts)

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield one request, with the regions of the image in words."""
        official, true = loaded.tables["regions"][question.cluster]
        fields = {"question": question.text, "answer": answers[str(question.id)]}
        yield JudgeRequest(str(question.id), fill(prompts, "gavie", regions=official, true_regions=true, **fields))

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by the judge's scores; one that a reply does not give is left out of the mean, a missing answer is 0."""
        replies = self.replies_to(loaded, answers, replies)
        cells = [f"{name}/{cell}" for name in CRITERIA for cell in ("sum", "given")]
        table = CountTable(["questions", "unread", *cells], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            id = str(question.id)
            given = scores(replies[id]) if id in answers else dict.fromkeys(CRITERIA, 0.0)
            incomplete = len(given) < len(CRITERIA)
            table.add(question.cluster, {"questions": 1, "unread": incomplete})
            for name, value in given.items():
                table.add(question.cluster, {f"{name}/sum": value, f"{name}/given": 1})
            parsed = ", ".join(f"{name} {given[name]:g}" for name in CRITERIA if name in given)
            right = given["accuracy"] / 10 if "accuracy" in given else None
            parsed_answers.append(
                ParsedAnswer(question.id, parsed if id in answers else "", right, id not in answers or incomplete)
            )
        metrics = {name: table.ratio(f"{name}/sum", f"{name}/given") for name in CRITERIA}
        metrics["unread"] = table.ratio("unread", "questions")
        protocol = {"parser": "ours", "unread scores": "left out of the mean", "missing answers": "0"}
        return table.result(parsed_answers, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the evaluation set with an `answer` in each row."""
        rows = [
            {"image_id": q.metadata["image_id"], "question": q.text, "answer": answers.get(str(q.id), "")}
            for q in loaded.questions
        ]
        return [inputs.write_lines(out / "gavie_answers.jsonl", rows)]


def _annotations(path: Path, images: set[str]) -> dict[str, tuple[str, str]] | None:
    """Return regions by image, with the slip and without; None if there is no file, which only the judge needs.

    Raises:
        BenchmarkError: The file is invalid or lacks an image.
    """
    if not path.exists():
        return None
    content = inputs.read_json(path)
    by_image = {}
    for image in sorted(images):
        try:
            rows = content[image]
            by_image[image] = regions(rows), regions(rows, slip=False)
        except (KeyError, TypeError, IndexError) as error:
            raise BenchmarkError(f"{path}: regions of image {image} are missing or invalid ({error!r})") from None
    return by_image

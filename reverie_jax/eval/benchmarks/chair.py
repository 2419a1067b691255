"""CHAIR: which objects of a caption are not in the picture? (Rohrbach et al., arXiv 1809.02156; `LisaAnne/Hallucination`.)

Files: COCO's `instances_{train,val}2014.json` and `captions_{train,val}2014.json`; a split of no picture may be missing.
Which pictures: `image_ids.json`, `image_ids.txt` or a question file; without one, a fixed sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import chair_words, coco, inputs
from reverie_jax.eval.benchmarks.interface import (
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    OFFICIAL,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored

PROMPT = "Please describe this image in detail."
SEED, SAMPLE = 0, 500
"""The pictures where no list says which: there is no official one, papers take 500 of val2014, each its own."""


def _sampled(data: Path, needs: str) -> list[int]:
    """The pictures of val2014 that come first by a hash: the same with every library, and in any order of the file."""
    path = coco.folder(data) / "captions_val2014.json"
    require(path.is_file(), f"{data}: neither image_ids.json nor captions_val2014.json there; {needs}")
    try:
        ids = {
            item["id"] if key == "images" else item["image_id"]
            for key, item in coco.list_items(path, "images")
        }
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"{path}: no file of COCO's annotations ({error!r})") from None
    return sorted(sorted(ids, key=lambda id: hashlib.sha256(f"{SEED}:{id}".encode()).hexdigest())[:SAMPLE])


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A picture that a caption is asked of."""

    id: int | str
    image_id: int
    image: str | None
    text: str


def _asked(row: Any) -> _Asked:
    """A row of a question file, or a bare id."""
    id = coco.number(row)
    if not isinstance(row, Mapping):
        return _Asked(id, id, None, PROMPT)
    text = row.get("text", row.get("question", PROMPT))
    if not isinstance(text, str):
        raise TypeError(f"its text is {text!r}")
    return _Asked(row.get("question_id", id), id, row.get("image"), text)


def _list(data: Path) -> Path | None:
    """The file that says which pictures; None where there is none."""
    for pattern in ("image_ids.json", "image_ids.txt", "*.jsonl"):
        if found := [data] if data.is_file() else sorted(data.glob(pattern)):
            names = ", ".join(path.name for path in found)
            require(len(found) == 1, f"{data}: {names} are all {pattern}; name one of them, or leave one there")
            return found[0]
    return None


class Chair(Benchmark):
    """See the module's docstring. lmms-eval's rule is left out: it needs WordNet, and labels of its own data set."""

    name = "chair"
    published_items = 500
    max_new_tokens = 512
    lower_is_better = frozenset({"CHAIRs", "CHAIRi"})
    required_files = (
        "COCO 2014's instances_val2014.json and captions_val2014.json (train's too where pictures are of train2014), "
        "which pictures in image_ids.json or a question file, and with --images the pictures"
    )

    def load(self, data: Path) -> BenchmarkData:
        path, folder, needs = (
            _list(data),
            data.parent if data.is_file() else data,
            f"{self.name} needs {self.required_files}",
        )
        if path is None:
            asked = [_asked(id) for id in _sampled(folder, needs)]
        elif path.suffix == ".txt":
            try:
                asked = [_asked(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                raise BenchmarkError(f"{path}: no list of pictures, one a line ({error})") from None
        else:
            asked = inputs.parse_rows(path, "picture to describe", _asked)
        require(bool(asked), f"{path or folder}: no picture there; {needs}")
        inputs.check_unique(path or folder, [row.id for row in asked])
        truth = coco.read_coco(folder, [row.image_id for row in asked], needs)
        questions = [
            Question(
                row.id,
                row.image or truth.names.get(row.image_id) or f"COCO_val2014_{row.image_id:012d}.jpg",
                row.text,
                str(row.image_id),
                {"image_id": row.image_id},
            )
            for row in asked
        ]
        ids = sorted({row.image_id for row in asked})
        protocol = {
            "pictures": len(ids),
            "picture_list": path.name if path else f"val2014, the first {SAMPLE} by sha256, seed {SEED}",
            "picture_ids_sha256": hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()[:16],
            "prompt": PROMPT if {row.text for row in asked} == {PROMPT} else "as in the file",
            "new_tokens": self.max_new_tokens,
        }
        known = {
            "segments": truth.segments,
            "captions": truth.captions,
            "by_image": {row.image_id: str(row.id) for row in reversed(asked)},
        }
        places = (folder, folder / "val2014", folder / "train2014", folder / "images")
        return BenchmarkData(questions, inputs.image_reader(*places), protocol, known)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """A question without an answer counts nowhere, as with a caption file that lacks the picture."""
        words = chair_words.chair()
        truth = {
            id: segments
            | {name for caption in loaded.tables["captions"].get(id, ()) for _, name in words.mentions(caption)}
            for id, segments in loaded.tables["segments"].items()
        }
        table, parsed_answers = CountTable(COLUMNS, loaded.clusters), []
        for question in loaded.questions:
            caption = answers.get(str(question.id))
            if caption is None:
                parsed_answers.append(ParsedAnswer(question.id, "", unparsed=True))
                continue
            found = [name for _, name in words.mentions(caption)]
            amounts = compared(found, truth[question.metadata["image_id"]])
            table.add(question.cluster, {**amounts, "words": len(caption.split())})
            parsed_answers.append(reading(question, found, truth[question.metadata["image_id"]]))
        metrics = {
            "CHAIRs": table.ratio("wrong_captions", "captions", 100),
            "CHAIRi": table.ratio("wrong_mentions", "mentions", 100),
            "Recall": table.ratio("found", "there", 100),
            "Len": table.ratio("words", "captions"),
        }
        return table.result(parsed_answers, metrics, {"parser": "punkt, treebank, pattern.en.singularize"})

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Rows of caption files name the picture alone."""
        if row.get("question_id") is not None:
            return str(row["question_id"])
        if row.get("image_id") is None:
            return None
        try:
            return str(loaded.tables["by_image"].get(coco.number(row), row["image_id"]))
        except ValueError:
            return str(row["image_id"])

    def answer_text(self, row: Mapping[str, Any]) -> Any:
        return row["caption"] if "caption" in row else super().answer_text(row)

    def split_row(self, row: Any) -> list[Any]:
        """The answers in a member of CHAIR's own caption file: `{"overall": …, "imgToEval": {id: {image_id, caption}}}`."""
        if not isinstance(row, Mapping) or row.get("pid") not in ("overall", "imgToEval"):
            return [row]
        return [] if row["pid"] == "overall" else [value for key, value in row.items() if key != "pid"]

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`."""
        return absent(parsed)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """CHAIR's own caption file. Its script asks for the language metrics too, whatever they are."""
        scores = dict.fromkeys((*(f"Bleu_{n}" for n in range(1, 5)), "METEOR", "CIDEr", "SPICE", "ROUGE_L"), 0)
        captions = {
            question.cluster: {
                "image_id": question.metadata["image_id"],
                "caption": answers[str(question.id)],
                **scores,
            }
            for question in loaded.questions
            if str(question.id) in answers
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / "chair_captions.json"
        path.write_text(json.dumps({"overall": scores, "imgToEval": captions}, ensure_ascii=False), "utf-8")
        return [path]


COLUMNS = (
    "captions",
    "wrong_captions",
    "captions_with_objects",
    "mentions",
    "wrong_mentions",
    "found",
    "there",
    "words",
)
"""Sums of a picture: `found` of the `there` classes that are in it are mentioned."""


def compared(mentioned: Sequence[str], there: set[str]) -> dict[str, float]:
    """What the classes that a caption mentions, repeats included, add to the sums, given those that are there."""
    wrong = sum(name not in there for name in mentioned)
    return {
        "captions": 1,
        "wrong_captions": wrong > 0,
        "captions_with_objects": len(mentioned) > 0,
        "mentions": len(mentioned),
        "wrong_mentions": wrong,
        "found": len(there.intersection(mentioned)),
        "there": len(there),
    }


_ABSENT = "not: "


def absent(parsed: ParsedAnswer) -> list[str]:
    """Return the classes that a parsed caption marks as not in the image."""
    return [name.removeprefix(_ABSENT) for name in parsed.parsed.split(", ") if name.startswith(_ABSENT)]


def reading(question: Question, mentioned: Sequence[str], there: set[str]) -> ParsedAnswer:
    """A caption as it was read: its classes once each, "not:" before those that are not there."""
    names = [name if name in there else f"{_ABSENT}{name}" for name in dict.fromkeys(mentioned)]
    right = float(all(name in there for name in mentioned))
    return ParsedAnswer(question.id, ", ".join(names), right, not mentioned)

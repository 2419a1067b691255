"""CHAIR: which objects of a caption are not in the image? (Rohrbach et al., arXiv 1809.02156; `LisaAnne/Hallucination`.)

Files: COCO's `instances_{train,val}2014.json` and `captions_{train,val}2014.json`; splits of other images may be missing.
The images: `image_ids.json`, `image_ids.txt` or a question file; without one, a fixed sample.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import chair_words, coco, inputs
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored

PROMPT = "Please describe this image in detail."
SEED, SAMPLE = 0, 500
"""The images without a list: there is no official one; papers take 500 images of val2014, each its own."""


def _sample(data: Path, needs: str) -> list[int]:
    """Return the images of val2014 that come first by a hash: the same with every library and order of the file."""
    path = coco.annotation_folder(data) / "captions_val2014.json"
    require(path.is_file(), f"{data}: image_ids.json and captions_val2014.json are missing; {needs}")
    try:
        ids = {item["id"] for item in coco.items(path, "images")}
        ids |= {item["image_id"] for item in coco.items(path, "annotations")}
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"{path}: not a file of COCO's annotations ({error!r})") from None
    return sorted(sorted(ids, key=lambda id: hashlib.sha256(f"{SEED}:{id}".encode()).hexdigest())[:SAMPLE])


@dataclasses.dataclass(frozen=True)
class _Request:
    """An image to describe."""

    id: int | str
    image_id: int
    image: str | None
    text: str


def _parse_request(row: Any) -> _Request:
    """Parse a row of a question file, or a bare id."""
    id = coco.image_number(row)
    if not isinstance(row, Mapping):
        return _Request(id, id, None, PROMPT)
    text = row.get("text", row.get("question", PROMPT))
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r}")
    return _Request(row.get("question_id", id), id, row.get("image"), text)


def _read_requests(data: Path, needs: str) -> tuple[list[_Request], Path | None]:
    """Return the images to describe, and the file that lists them; None for a sample."""
    patterns = ("image_ids.json", "image_ids.txt", "*.jsonl")
    path = data if data.is_file() else next(filter(None, (inputs.find_only(data, name) for name in patterns)), None)
    if path is None:
        return [_parse_request(id) for id in _sample(data, needs)], None
    if path.suffix != ".txt":
        return inputs.parse_rows(path, "image to describe", _parse_request), path
    try:
        return [_parse_request(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()], path
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path}: must have one image per line ({error})") from None


class Chair(Benchmark):
    """CHAIR, see the module's docstring. It lacks lmms-eval's rule, which needs WordNet and labels of its own data set."""

    name = "chair"
    metric = "CHAIRs and CHAIRi; recall"
    scale = "percent; Len in words"
    published_items = 500
    max_new_tokens = 512
    lower_is_better = frozenset({"CHAIRs", "CHAIRi"})
    required_files = (
        "COCO 2014's instances_val2014.json and captions_val2014.json (train's too where images are of train2014), "
        "the list of images in image_ids.json or a question file, and with --images the images"
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the list of images and COCO's annotations of them; see `Benchmark.load`."""
        folder, needs = data.parent if data.is_file() else data, f"{self.name} needs {self.required_files}"
        requests, path = _read_requests(data, needs)
        require(bool(requests), f"{path or folder}: no image listed; {needs}")
        inputs.check_unique(path or folder, [request.id for request in requests])
        truth = coco.read_coco(folder, [request.image_id for request in requests], needs)
        questions = [
            Question(
                request.id,
                request.image or truth.names.get(request.image_id) or coco.file_name(request.image_id),
                request.text,
                str(request.image_id),
                {"image_id": request.image_id},
            )
            for request in requests
        ]
        ids = sorted({request.image_id for request in requests})
        protocol = {
            "pictures": len(ids),
            "picture_list": path.name if path else f"val2014, the first {SAMPLE} by sha256, seed {SEED}",
            "picture_ids_sha256": hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()[:16],
            "prompt": PROMPT if {request.text for request in requests} == {PROMPT} else "as in the file",
            "new_tokens": self.max_new_tokens,
        }
        by_image = {request.image_id: str(request.id) for request in reversed(requests)}
        tables = {"segments": truth.segments, "captions": truth.captions, "by_image": by_image}
        return BenchmarkData(questions, coco.image_reader(folder), protocol, tables)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score captions; a question without one counts nowhere, as with a caption file that lacks the image."""
        words = chair_words.chair()
        truths = {id: coco.classes_of(id, loaded.tables, words) for id in loaded.tables["segments"]}
        table, parsed_answers = CountTable(COLUMNS, loaded.clusters), []
        for question in loaded.questions:
            caption = answers.get(str(question.id))
            if caption is None:
                parsed_answers.append(ParsedAnswer(question.id, "", unparsed=True))
                continue
            truth = truths[question.metadata["image_id"]]
            mentioned = [name for _, name in words.mentions(caption)]
            table.add(question.cluster, {**count_objects(mentioned, truth), "words": len(caption.split())})
            parsed_answers.append(parsed_caption(question, mentioned, truth))
        metrics = {
            "CHAIRs": table.ratio("wrong_captions", "captions", 100),
            "CHAIRi": table.ratio("wrong_mentions", "mentions", 100),
            "Recall": table.ratio("found", "there", 100),
            "Len": table.ratio("words", "captions"),
        }
        return table.result(parsed_answers, metrics, {"parser": "punkt, treebank, pattern.en.singularize"})

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows of caption files, which name only the image."""
        if row.get("question_id") is not None:
            return str(row["question_id"])
        return None if row.get("image_id") is None else coco.match_image(row["image_id"], loaded.tables["by_image"])

    def answer_text(self, row: Mapping[str, Any]) -> Any:
        """Return the caption of a caption file, or the answer of another form."""
        return row["caption"] if "caption" in row else super().answer_text(row)

    def split_row(self, row: Any) -> list[Any]:
        """Return the captions in a member of CHAIR's file, `{"overall": …, "imgToEval": {id: {image_id, caption}}}`."""
        if not isinstance(row, Mapping) or row.get("pid") not in ("overall", "imgToEval"):
            return [row]
        return [] if row["pid"] == "overall" else [value for key, value in row.items() if key != "pid"]

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`."""
        return absent(parsed)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write CHAIR's caption file. Its script requires the language metrics, with any values."""
        scores = dict.fromkeys((*(f"Bleu_{n}" for n in range(1, 5)), "METEOR", "CIDEr", "SPICE", "ROUGE_L"), 0)
        captions = {
            question.cluster: {"image_id": question.metadata["image_id"], "caption": text, **scores}
            for question, text in loaded.answered(answers)
        }
        return [inputs.write_json(out / "chair_captions.json", {"overall": scores, "imgToEval": captions})]


COLUMNS = (
    *("captions", "wrong_captions", "captions_with_objects", "mentions", "wrong_mentions"),
    *("found", "there", "words"),
)
"""Sums of an image: `found` of the `there` classes that are in it are mentioned."""


def count_objects(mentioned: Sequence[str], truth: set[str]) -> dict[str, float]:
    """Return what a caption adds to the sums; repeats count.

    Args:
        mentioned: classes that the caption mentions.
        truth: classes in the image.
    """
    wrong = sum(name not in truth for name in mentioned)
    return {
        "captions": 1,
        "wrong_captions": wrong > 0,
        "captions_with_objects": len(mentioned) > 0,
        "mentions": len(mentioned),
        "wrong_mentions": wrong,
        "found": len(truth.intersection(mentioned)),
        "there": len(truth),
    }


_ABSENT = "not: "


def absent(parsed: ParsedAnswer) -> list[str]:
    """Return the classes that a parsed caption marks as not in the image."""
    return [name.removeprefix(_ABSENT) for name in parsed.parsed.split(", ") if name.startswith(_ABSENT)]


def parsed_caption(question: Question, mentioned: Sequence[str], truth: set[str]) -> ParsedAnswer:
    """Return a caption as its classes, each once, those that are not in the image after "not: "."""
    names = [name if name in truth else f"{_ABSENT}{name}" for name in dict.fromkeys(mentioned)]
    right = float(all(name in truth for name in mentioned))
    return ParsedAnswer(question.id, ", ".join(names), right, not mentioned)

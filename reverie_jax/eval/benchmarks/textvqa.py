"""TextVQA: reading text in images (Singh et al., arXiv 1904.08920; version 0.5.1, scored as LLaVA does).

Files: `TextVQA_0.5.1_val.json` (`data`: `question_id`, `image_id`, `question`, ten `answers`). The line of OCR tokens that
LLaVA-1.5 is asked with comes from `llava_textvqa_val_v051_ocr.jsonl` (`question_id`, which is the image, and `text`) or from
`TextVQA_Rosetta_OCR_v0.2_val.json` (`data`: `image_id`, `ocr_tokens`); without either the question stands alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reverie_jax.eval.benchmarks import inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    SHORT,
    Benchmark,
    BenchmarkData,
    HubDataset,
    Question,
    Texts,
    normalize_prompt,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored
from reverie_jax.eval.benchmarks.vqa_normalization import normalize

T = TypeVar("T")

ANSWERS = 10
"""Number of human answers to each question."""

_OCR = "Reference OCR token: "
_LLAVA_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
_ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Return min(1, matches / 3), averaged over leaving out each human answer in turn; all are normalized."""
    matches = Counter(humans)[answer]
    if not matches:
        return 0.0
    agreeing, others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * agreeing + (len(humans) - matches) * others) / len(humans)


def question_in(prompt: str) -> str:
    """Return the question in one of LLaVA's prompts, in lower case.

    Raises:
        ValueError: The prompt has none of the layouts that LLaVA's script knows.
    """
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match:
            return match[1].lower()
    lines = prompt.removeprefix("<image>\n").split("\n")
    if len(lines) == 3 and _OCR in prompt:
        return lines[1 if lines[0].startswith(_OCR.rstrip()) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"no question found in the prompt {prompt!r}")


class TextVqa(Benchmark):
    """TextVQA, see the module's docstring. Ids are the benchmark's; LLaVA's files name image and prompt instead."""

    name = "textvqa"
    scale = "percent"
    published_items = 5000
    expected_new_tokens = 16
    required_files = (
        f"TextVQA_0.5.1_val.json and {_ROSETTA} of TextVQA's download page (or, instead of the second, LLaVA's "
        f"{_LLAVA_QUESTIONS}), and with --images the images of train_images"
    )
    metric = "soft accuracy"
    hub = HubDataset("lmms-lab-encoder/textvqa", ("data/validation-*.parquet",), 920)

    def comparable(self, scores: Mapping[str, Any]) -> bool:
        """See `Benchmark.comparable`; published scores are of prompts with OCR tokens; the hub does not say which."""
        return super().comparable(scores) and scores["protocol"].get("ocr tokens") not in ("none", "the hub's")

    def load(self, data: Path) -> BenchmarkData:
        """Read the annotations, and OCR tokens if they are there; see `Benchmark.load`."""
        table = parquet.find_table(data, *self.hub.files)
        if table is None:
            path = inputs.find_file(data, "TextVQA_0.5.1_val.json", "TextVQA_*[0-9]_val.json", benchmark=self)
        else:
            path = table.paths[0]
        folder = path.parent
        texts = _llava_texts(folder / _LLAVA_QUESTIONS)
        words: dict[str, Sequence[str]] = {}
        tokens = _tokens(folder / _ROSETTA) if table is None else words
        numbers: dict[str, int] = {}

        def parse_numbered(number: int, row: Mapping[str, Any]) -> Question:
            numbers.setdefault(f"{row['image_id']}.jpg", number)
            words[str(row["image_id"])] = _words(row)
            return parse(row)

        def parse(row: Mapping[str, Any]) -> Question:
            answers, image, question = row["answers"], str(row["image_id"]), str(row["question"])
            if len(answers) != ANSWERS or not all(isinstance(answer, str) for answer in answers):
                raise ValueError(f"question {row['question_id']}: must have {ANSWERS} answers")
            # LLaVA's questions begin with a capital letter, the benchmark's do not.
            lines = [question.capitalize(), SHORT]
            if tokens is not None:
                lines.insert(1, _OCR + ", ".join(tokens.get(image, ())))
            metadata = {"answers": tuple(map(normalize, answers)), "question": question.lower()}
            text = texts.get((image, question.lower()), "\n".join(lines))
            return Question(int(row["question_id"]), f"{image}.jpg", text, image, metadata)

        if table is None:
            questions = _parse_data(path, "TextVQA question", parse)
            read_image = inputs.image_reader(folder, folder / "train_images", folder / "images")
        else:
            questions, read_image = table.parse("TextVQA question", parse_numbered), table.reader(numbers)
        inputs.check_unique(path, [question.id for question in questions])
        by_prompt: dict[tuple[str, str], list[str]] = {}
        for question in questions:
            by_prompt.setdefault((question.cluster, question.metadata["question"]), []).append(str(question.id))
        source = (
            "LLaVA's questions" if texts else "none" if tokens is None else "Rosetta v0.2" if not table else "the hub's"
        )
        protocol = {"file": path.name, "questions": len(questions), "ocr tokens": source}
        tables = {"ids": frozenset(str(question.id) for question in questions), "by_prompt": by_prompt}
        return BenchmarkData(questions, read_image, protocol, tables)

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by id, or LLaVA's rows by image and prompt."""
        id = super().match_question(row, loaded)
        if id is None or id in loaded.tables["ids"] or not isinstance(row.get("prompt"), str):
            return id
        asked = loaded.tables["by_prompt"]
        try:
            return str(asked.get((id, question_in(row["prompt"])), [id])[0])
        except ValueError:  # no layout of LLaVA's: the questions about the image that the prompt holds
            held = {words: ids for (image, words), ids in asked.items() if image == id and _holds(row["prompt"], words)}
            return str(held[max(held, key=len)][0]) if held else id

    def duplicates(self, key: str, row: Mapping[str, Any], loaded: BenchmarkData) -> Sequence[str]:
        """Return questions about one image in the same words, where a row names only the image, as LLaVA's do."""
        if super().match_question(row, loaded) in loaded.tables["ids"]:
            return ()
        return next((ids for ids in loaded.tables["by_prompt"].values() if key in ids), ())

    def same_prompt(self, prompt: str, question: Question) -> bool:
        """Compare only the question: OCR tokens may differ."""
        return _holds(prompt, question.metadata["question"])

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by soft accuracy; a missing answer is wrong."""
        table, parsed_answers = CountTable(("score", "questions"), loaded.clusters), []
        for question in loaded.questions:
            text = answers.get(str(question.id))
            parsed = normalize(text or "")
            right = 0.0 if text is None else soft_accuracy(parsed, question.metadata["answers"])
            table.add(question.cluster, {"score": right, "questions": 1})
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, not parsed))
        protocol = {"parser": "EvalAI's answer processor", "accuracy": "soft, each person left out in turn"}
        return table.result(parsed_answers, {"accuracy": table.ratio("score", "questions", 100)}, protocol)


def _holds(prompt: str, question: str) -> bool:
    return normalize_prompt(question) in normalize_prompt(prompt)


def _parse_data(path: Path, what: str, parse: Callable[[Any], T]) -> list[T]:
    """Parse the rows under `data`; see `inputs.parse_list`."""
    content = inputs.read_json(path)
    return inputs.parse_list(path, what, parse, content.get("data") if isinstance(content, Mapping) else None, "data")


def _llava_texts(path: Path) -> dict[tuple[str, str], str]:
    """Return LLaVA's prompts by image and question; empty without the file."""
    if not path.exists():
        return {}

    def parse(row: Mapping[str, Any]) -> tuple[tuple[str, str], str]:
        return (str(row["question_id"]), question_in(row["text"])), row["text"]

    return dict(inputs.parse_rows(path, "question of LLaVA's", parse))


def _tokens(path: Path) -> dict[str, Sequence[str]] | None:
    """Return Rosetta's words by image; None without the file."""
    if not path.exists():
        return None

    return dict(_parse_data(path, "image with OCR tokens", lambda row: (str(row["image_id"]), _words(row))))


def _words(row: Mapping[str, Any]) -> Sequence[str]:
    tokens = row["ocr_tokens"]
    if not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"image {row['image_id']}: ocr_tokens must be texts")
    return tuple(tokens)

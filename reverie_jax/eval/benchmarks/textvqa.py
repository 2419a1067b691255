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

from reverie_jax.eval.benchmarks import files
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    SHORT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    ParsedAnswer,
    Question,
    Scored,
    Table,
    need,
    share,
)

T = TypeVar("T")

ANSWERS = 10
"""People's answers to each question."""

_OCR = "Reference OCR token: "
_LLAVA_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
_ROSETTA = "TextVQA_Rosetta_OCR_v0.2_val.json"

# What follows is EvalAI's way of making answers comparable, as in MMF (c46b3b3, pythia/tasks/processors.py) and LLaVA
# (llava/eval/m4c_evaluator.py). Its slips belong to the published numbers.

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32
"""No more are dropped: `re.UNICODE`, which is 32, stands where `sub` takes the number of replacements."""

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}

# Contractions without their apostrophes, by what they become. Those that no answer in lower case can match are left out.
_CONTRACTIONS = {
    short: long
    for long, shorts in {
        "ain't": "aint",
        "aren't": "arent",
        "can't": "cant",
        "could've": "couldve",
        "couldn't": "couldnt",
        "couldn't've": "couldn'tve couldnt've",
        "didn't": "didnt",
        "doesn't": "doesnt",
        "don't": "dont",
        "hadn't": "hadnt",
        "hadn't've": "hadnt've hadn'tve",
        "hasn't": "hasnt",
        "haven't": "havent",
        "he'd": "hed",
        "he'd've": "hed've he'dve",
        "he's": "hes",
        "how'd": "howd",
        "how'll": "howll",
        "how's": "hows",
        "isn't": "isnt",
        "it'd": "itd",
        "it'd've": "itd've it'dve",
        "it'll": "itll",
        "ma'am": "maam",
        "mightn't": "mightnt",
        "mightn't've": "mightnt've mightn'tve",
        "might've": "mightve",
        "mustn't": "mustnt",
        "must've": "mustve",
        "needn't": "neednt",
        "not've": "notve",
        "o'clock": "oclock",
        "oughtn't": "oughtnt",
        "'ow's'at": "'ows'at",
        "shan't": "shant",
        "she'd've": "shed've she'dve",
        "should've": "shouldve",
        "shouldn't": "shouldnt",
        "shouldn't've": "shouldnt've shouldn'tve",
        "somebodyd": "somebody'd",
        "somebody'd've": "somebodyd've somebody'dve",
        "somebody'll": "somebodyll",
        "somebody's": "somebodys",
        "someone'd": "someoned",
        "someone'd've": "someoned've someone'dve",
        "someone'll": "someonell",
        "someone's": "someones",
        "something'd": "somethingd",
        "something'd've": "somethingd've something'dve",
        "something'll": "somethingll",
        "that's": "thats",
        "there'd": "thered",
        "there'd've": "thered've there'dve",
        "there're": "therere",
        "there's": "theres",
        "they'd": "theyd",
        "they'd've": "theyd've they'dve",
        "they'll": "theyll",
        "they're": "theyre",
        "they've": "theyve",
        "'twas": "twas",
        "wasn't": "wasnt",
        "we'd've": "wed've we'dve",
        "we've": "weve",
        "weren't": "werent",
        "what'll": "whatll",
        "what're": "whatre",
        "what's": "whats",
        "what've": "whatve",
        "when's": "whens",
        "where'd": "whered",
        "where's": "wheres",
        "where've": "whereve",
        "who'd": "whod",
        "who'd've": "whod've who'dve",
        "who'll": "wholl",
        "who's": "whos",
        "who've": "whove",
        "why'll": "whyll",
        "why're": "whyre",
        "why's": "whys",
        "won't": "wont",
        "would've": "wouldve",
        "wouldn't": "wouldnt",
        "wouldn't've": "wouldnt've wouldn'tve",
        "y'all": "yall",
        "y'all'll": "yall'll y'allll",
        "y'all'd've": "yall'd've y'alld've y'all'dve",
        "you'd": "youd",
        "you'd've": "youd've you'dve",
        "you'll": "youll",
        "you're": "youre",
        "you've": "youve",
    }.items()
    for short in shorts.split()
}


def without_marks(text: str) -> str:
    """Drops punctuation as EvalAI does. VLMEvalKit reads yes and no in what this leaves.

    A mark goes without a trace where it stands beside a space somewhere in the text, or where the text has a number with a
    comma; else each of it becomes a space. Full stops go unless a digit follows. Colons, asterisks and quotes stay.
    """
    number, left = _THOUSANDS.search(text) is not None, text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if beside or number else " ")
    return _FULL_STOP.sub("", left, count=_FULL_STOPS)


def comparable(answer: str) -> str:
    """An answer as EvalAI compares it: lower case, without most punctuation and articles, small numbers as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = without_marks(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Agreement with people: min(1, matches / 3), averaged over leaving out each person in turn. All are comparable."""
    matches = Counter(people)[answer]
    if not matches:
        return 0.0
    agreeing, others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * agreeing + (len(people) - matches) * others) / len(people)


def asked(prompt: str) -> str:
    """The question in one of LLaVA's prompts, in lower case.

    Raises:
        ValueError: it has none of the layouts that LLaVA's script knows.
    """
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found[1].lower()
    lines = prompt.removeprefix("<image>\n").split("\n")
    if len(lines) == 3 and _OCR in prompt:
        return lines[1 if lines[0].startswith(_OCR.rstrip()) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"no question can be told in the prompt {prompt!r}")


class TextVqa(Benchmark):
    """See the module's docstring. Ids are the benchmark's numbers; LLaVA's files name the image and the prompt instead."""

    name = "textvqa"
    expected_new_tokens = 16
    needs = (
        f"TextVQA_0.5.1_val.json and {_ROSETTA} of TextVQA's download page (or, instead of the second, LLaVA's "
        f"{_LLAVA_QUESTIONS}), and with --images the pictures of train_images"
    )

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "TextVQA_0.5.1_val.json", "TextVQA_*[0-9]_val.json", benchmark=self)
        folder = path.parent
        texts = _llava_texts(folder / _LLAVA_QUESTIONS)
        tokens = _tokens(folder / _ROSETTA)

        def make(row: Mapping[str, Any]) -> Question:
            answers, image, question = row["answers"], str(row["image_id"]), str(row["question"])
            if len(answers) != ANSWERS or not all(isinstance(answer, str) for answer in answers):
                raise ValueError(f"question {row['question_id']}: not {ANSWERS} answers")
            # LLaVA's questions begin with a capital, the benchmark's do not.
            lines = [question.capitalize(), SHORT]
            if tokens is not None:
                lines.insert(1, _OCR + ", ".join(tokens.get(image, ())))
            known = {"answers": tuple(map(comparable, answers)), "question": question.lower()}
            text = texts.get((image, question.lower()), "\n".join(lines))
            return Question(int(row["question_id"]), f"{image}.jpg", text, image, known)

        questions = _rows(path, "TextVQA question", make)
        files.check_unique(path, [question.id for question in questions])
        asked_by: dict[tuple[str, str], list[str]] = {}
        for question in questions:
            asked_by.setdefault((question.unit, question.known["question"]), []).append(str(question.id))
        source = "LLaVA's questions" if texts else "none" if tokens is None else "Rosetta v0.2"
        return BenchmarkData(
            questions,
            files.image_reader(folder, folder / "train_images", folder / "images"),
            {"file": path.name, "questions": len(questions), "ocr tokens": source},
            {
                "ids": frozenset(str(question.id) for question in questions),
                "asked": asked_by,
            },
        )

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        said = super().key(row, loaded)
        if said is None or said in loaded.known["ids"] or not isinstance(row.get("prompt"), str):
            return said
        return loaded.known["asked"].get((said, asked(row["prompt"])), [said])[0]

    def duplicates(self, key: str, row: Mapping[str, Any], loaded: BenchmarkData) -> Sequence[str]:
        """Two questions about a picture in the same words, where a row names but the picture, as LLaVA's do."""
        if super().key(row, loaded) in loaded.known["ids"]:
            return ()
        return next((ids for ids in loaded.known["asked"].values() if key in ids), ())

    def same(self, said: str, question: Question) -> bool:
        """By the question alone: with other tokens of OCR it is the same."""
        return super().same(said, question) or asked(said) == asked(question.text)

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        units = loaded.units
        table, parsed_answers = Table(("score", "questions"), units), []
        for question in loaded.questions:
            text = answers.get(str(question.id))
            said = comparable(text or "")
            right = 0.0 if text is None else soft_accuracy(said, question.known["answers"])
            table.add(question.unit, {"score": right, "questions": 1})
            parsed_answers.append(ParsedAnswer(question.id, said, right, not said))
        metrics = {"accuracy": share(table["score"], table["questions"], scale=100.0)}
        protocol = {"parser": "EvalAI's answer processor", "accuracy": "soft, each person left out in turn"}
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol)


def _rows(path: Path, what: str, make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of the rows under `data`.

    Raises:
        BenchmarkError: there are none, or `make` cannot take one.
    """
    content = files.read_json(path)
    rows = content.get("data") if isinstance(content, Mapping) else None
    need(isinstance(rows, list) and bool(rows), f'{path}: expected an object with a list of rows as "data"')
    assert isinstance(rows, list)
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(make(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchmarkError(f"{path}: row {number} is no {what} ({error!r})") from None
    return found


def _llava_texts(path: Path) -> dict[tuple[str, str], str]:
    """LLaVA's prompts by image and question; none where there is no such file."""
    if not path.exists():
        return {}

    def make(row: Mapping[str, Any]) -> tuple[tuple[str, str], str]:
        return (str(row["question_id"]), asked(row["text"])), row["text"]

    return dict(files.parse_rows(path, "question of LLaVA's", make))


def _tokens(path: Path) -> dict[str, Sequence[str]] | None:
    """Rosetta's words in each image; None where there is no such file."""
    if not path.exists():
        return None

    def make(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
        tokens = row["ocr_tokens"]
        if not all(isinstance(token, str) for token in tokens):
            raise TypeError(f"image {row['image_id']}: its ocr_tokens are no texts")
        return str(row["image_id"]), tuple(tokens)

    return dict(_rows(path, "image with OCR tokens", make))

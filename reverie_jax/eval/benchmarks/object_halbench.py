"""Object HalBench: which objects of a description are not in the picture? (RLHF-V, Yu et al., arXiv 2312.00849, after
Rohrbach et al.; `eval/eval_gpt_obj_halbench.py` of RLHF-V and RLAIF-V.)

Files: `obj_halbench_300_with_image.jsonl`, an object a line: `image_id` (COCO's), `question`, `image` (base64); and COCO's
annotations as for CHAIR. A judge extracts the objects of each answer; what it replies is normalised with spaCy.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import chair_words, coco, files
from reverie_jax.eval.benchmarks.chair import COLUMNS, compared, reading
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

PLAIN = "plain"
"""No official rule: CHAIR's parse of the answers in the judge's stead, with Object HalBench's denominators."""

SHORT_ANSWER = 3
"""An answer of so many words or fewer names no object, and no judge is asked."""

_NOUNS = frozenset(("NN", "NNS", "NNP", "NNPS"))

Tagger = Callable[[str], Sequence[tuple[str, str]]]
"""A text's tokens: lemma and Penn Treebank tag."""


@functools.cache
def _spacy() -> Tagger:
    try:
        import spacy

        model = spacy.load("en_core_web_trf")
    except (ImportError, OSError) as error:
        raise BenchmarkError(
            f"object-halbench: its own rule normalises objects with spaCy's en_core_web_trf (3.7.2), which is not here "
            f"({_first_line(error)}); `pip install spacy[transformers]`, `python -m spacy download en_core_web_trf`, or "
            f"--rule {PLAIN}"
        ) from None
    return lambda text: [(token.lemma_, token.tag_) for token in model(text)]


@functools.cache
def _wordnet() -> Callable[[str], str]:
    try:
        from nltk.stem import WordNetLemmatizer

        lemmatize = WordNetLemmatizer().lemmatize
        lemmatize("dogs")  # the data is read when it is first asked for
    except (ImportError, LookupError) as error:
        raise BenchmarkError(
            f"object-halbench: its own rule reads the reference captions with NLTK's WordNet, which is not here "
            f"({_first_line(error)}); `python -m nltk.downloader wordnet`, or --rule {PLAIN}"
        ) from None
    return functools.cache(lambda word: str(lemmatize(word)))


def _first_line(error: Exception) -> str:
    return next((line.strip(" *") for line in str(error).splitlines() if line.strip(" *")), type(error).__name__)


def extracted(reply: str) -> list[Any] | None:
    """The list of objects in a judge's reply: the reply is JSON, or its last line where it has `["`; None for neither."""
    try:
        found = json.loads(reply)
    except ValueError:
        if '["' not in reply:
            return None
        try:
            found = json.loads(reply.strip().split("\n")[-1])
        except ValueError:
            return None
    return found if isinstance(found, list) else None


def normalized(objects: Sequence[Any], words: chair_words.Vocabulary, tagger: Tagger) -> list[str]:
    """The judge's objects as lemmas, each once: the known pairs of words in one, or else its runs of nouns."""
    found: list[str] = []
    for object in objects:
        tokens = tagger(f"a {object}")
        found += words.merge([lemma for lemma, _ in tokens], alone=False) or _runs(tokens)
    return list(dict.fromkeys(found))


def _runs(tokens: Sequence[tuple[str, str]]) -> list[str]:
    """Nouns that follow one another, joined."""
    runs: list[list[str]] = [[]]
    for lemma, tag in tokens:
        if tag in _NOUNS:
            runs[-1].append(lemma)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run).strip() for run in runs if run]


def _caption(answer: str) -> str:
    """As the official script reads an answer file."""
    return answer.replace("Assistant:", "").strip()


def _short(answer: str) -> bool:
    return len(_caption(answer).split()) <= SHORT_ANSWER


class ObjectHalBench(Benchmark):
    """See the module's docstring.

    Args:
        tagger: of the judge's objects; spaCy's en_core_web_trf where it is None, loaded when the official rule needs it.
        lemma: of the reference captions' words; NLTK's WordNet likewise.
    """

    name = "object-halbench"
    beams = 3
    judge_temperature = 0.2
    rules = (OFFICIAL, PLAIN)
    max_new_tokens = 1024
    judged = frozenset((OFFICIAL,))
    needs = (
        "obj_halbench_300_with_image.jsonl of RLHF-V or RLAIF-V, and COCO 2014's instances_val2014.json and "
        "captions_val2014.json (train's too where pictures are of train2014)"
    )

    def __init__(self, tagger: Tagger | None = None, lemma: Callable[[str], str] | None = None):
        self._tagger, self._lemma = tagger, lemma

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "obj_halbench*.jsonl", "*obj*hal*.jsonl", benchmark=self)
        pictures: dict[str, bytes] = {}

        def make(row: Mapping[str, Any]) -> Question:
            id, text = coco.number(row["image_id"]), row["question"]
            if not isinstance(text, str):
                raise TypeError(f"its question is {text!r}")
            image = f"COCO_val2014_{id:012d}.jpg"
            if row.get("image"):
                pictures[image] = base64.b64decode(row["image"], validate=True)
            return Question(row.get("question_id", id), image, text, str(id), {"image_id": id})

        questions = files.parse_rows(path, "question of Object HalBench", make)
        files.check_unique(path, [question.id for question in questions])
        place = path.parent
        truth = coco.read_coco(
            place, [question.known["image_id"] for question in questions], f"{self.name} needs {self.needs}"
        )
        in_folders = files.image_reader(place, place / "val2014", place / "train2014", place / "images")

        def picture(name: str) -> bytes:
            return pictures[name] if name in pictures else in_folders(name)

        protocol = {
            "questions": len(questions),
            "published decoding": "for LLaVA by RLAIF-V: 3 beams, temperature 0, 1024 new tokens",
        }
        known = {
            "segments": truth.segments,
            "captions": truth.captions,
            "by_image": {question.known["image_id"]: str(question.id) for question in reversed(questions)},
        }
        return BenchmarkData(questions, picture, protocol, known)

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """By the picture: the official answer files number their questions anew, from 0."""
        if row.get("image_id") is None:
            return super().key(row, loaded)
        try:
            return str(loaded.known["by_image"].get(coco.number(row["image_id"]), row["image_id"]))
        except ValueError:
            return str(row["image_id"])

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        if rule != OFFICIAL:
            return []
        return [
            JudgeRequest(
                str(question.id),
                fill(prompts, "object_halbench", question=question.text, answer=_caption(answers[str(question.id)])),
            )
            for question in loaded.questions
            if str(question.id) in answers and not _short(answers[str(question.id)])
        ]

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A question without an answer counts nowhere. A reply that is no list of objects counts as an empty one."""
        official = rule == OFFICIAL
        if official:
            asked = [str(q.id) for q in loaded.questions if not _short(answers.get(str(q.id), ""))]
            replies = needed(self, replies, asked) if asked else {}
        words = chair_words.refined() if official else chair_words.chair()
        tagger = (self._tagger or _spacy()) if official else None
        lemma = (self._lemma or _wordnet()) if official else None
        table, parsed_answers, unparsed = Table(COLUMNS, loaded.units), [], 0
        for question in loaded.questions:
            answer = answers.get(str(question.id))
            if answer is None:
                parsed_answers.append(ParsedAnswer(question.id, "", unparsed=True))
                continue
            caption, id = _caption(answer), question.known["image_id"]
            if tagger is None or replies is None:
                found: list[tuple[str, str]] | None = words.mentions(caption)
            elif _short(answer):
                found = []
            else:
                objects = extracted(replies[str(question.id)])
                found = None if objects is None else words.objects(normalized(objects, words, tagger))
            there = loaded.known["segments"][id] | {
                name for text in loaded.known["captions"].get(id, ()) for _, name in words.mentions(text, lemma)
            }
            mentioned = [name for _, name in found or ()]
            table.add(question.unit, {**compared(mentioned, there), "words": len(caption.split(" "))})
            unparsed += found is None
            parsed_answers.append(
                ParsedAnswer(question.id, "", unparsed=True) if found is None else reading(question, mentioned, there)
            )
        metrics = {
            "CHAIRs_refine": share(table["wrong_captions"], table["captions_with_objects"], scale=100),
            "CHAIRi": share(table["wrong_mentions"], table["mentions"], scale=100),
            "obj_rec": share(table["found"], table["there"], scale=100),
            "avg_word_len": share(table["words"], table["captions"]),
            "CHAIRs": share(table["wrong_captions"], table["captions"], scale=100),
        }
        protocol = {"objects": "the judge's" if official else "CHAIR's parse: a stand-in, not the published figure"}
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol | {"unread_replies": unparsed})

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """The answer file that the official script takes."""
        rows = [
            {"image_id": question.known["image_id"], "question": question.text, "answer": answers[str(question.id)]}
            for question in loaded.questions
            if str(question.id) in answers
        ]
        return [files.write_lines(out / "obj_halbench_answer.jsonl", rows)]

"""Object HalBench: which objects of a description are not in the image? (RLHF-V, Yu et al., arXiv 2312.00849.)

After Rohrbach et al.; `eval/eval_gpt_obj_halbench.py` of RLHF-V and RLAIF-V.

Files: `obj_halbench_300_with_image.jsonl`, an object a line: `image_id` (COCO's), `question`, `image` (base64); and COCO's
annotations as for CHAIR. A judge extracts the objects of each answer; spaCy normalizes its reply.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import chair_words, coco, inputs
from reverie_jax.eval.benchmarks.chair import COLUMNS, absent, count_objects, parsed_caption
from reverie_jax.eval.benchmarks.interface import OFFICIAL, BenchmarkData, BenchmarkError, JudgeRequest, Question, Texts
from reverie_jax.eval.benchmarks.judged import JudgedBenchmark, fill, require_replies
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored

PLAIN = "plain"
"""Not an official rule: CHAIR's parser of answers instead of the judge, with Object HalBench's denominators."""

SHORT_ANSWER = 3
"""An answer of at most so many words names no object, and the judge is not asked about it."""

_NOUNS = frozenset(("NN", "NNS", "NNP", "NNPS"))

Tagger = Callable[[str], Sequence[tuple[str, str]]]
"""Returns the tokens of a text: lemma and Penn Treebank tag."""


@functools.cache
def _spacy_tagger() -> Tagger:
    try:
        import spacy

        model = spacy.load("en_core_web_trf")
    except (ImportError, OSError) as error:
        raise BenchmarkError(
            f"object-halbench: the official rule normalizes objects with spaCy's en_core_web_trf (3.7.2), which is missing "
            f"({first_line(error)}); run `pip install spacy[transformers]` and `python -m spacy download en_core_web_trf`, "
            f"or pass --rule {PLAIN}"
        ) from None
    return lambda text: [(token.lemma_, token.tag_) for token in model(text)]


@functools.cache
def _wordnet_lemmatizer() -> Callable[[str], str]:
    try:
        from nltk.stem import WordNetLemmatizer

        lemmatize = WordNetLemmatizer().lemmatize
        lemmatize("dogs")  # the data is read at the first call
    except (ImportError, LookupError) as error:
        raise BenchmarkError(
            f"object-halbench: the official rule reads reference captions with NLTK's WordNet, which is missing "
            f"({first_line(error)}); run `python -m nltk.downloader wordnet`, or pass --rule {PLAIN}"
        ) from None
    return functools.cache(lambda word: str(lemmatize(word)))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not empty or a row of asterisks."""
    return next((line.strip(" *") for line in str(error).splitlines() if line.strip(" *")), type(error).__name__)


def extract_objects(reply: str) -> list[Any] | None:
    """Return the list in a judge's reply, if the reply or (where it contains `["`) its last line is JSON; else None."""
    try:
        content = json.loads(reply)
    except ValueError:
        if '["' not in reply:
            return None
        try:
            content = json.loads(reply.strip().split("\n")[-1])
        except ValueError:
            return None
    return content if isinstance(content, list) else None


def normalize(objects: Sequence[Any], words: chair_words.Vocabulary, tagger: Tagger) -> list[str]:
    """Return the judge's objects as lemmas without duplicates: known pairs of words, or else runs of nouns."""
    lemmas: list[str] = []
    for object in objects:
        tokens = tagger(f"a {object}")
        lemmas += words.merge([lemma for lemma, _ in tokens], alone=False) or _noun_runs(tokens)
    return list(dict.fromkeys(lemmas))


def _noun_runs(tokens: Sequence[tuple[str, str]]) -> list[str]:
    """Return nouns that follow one another, joined."""
    runs: list[list[str]] = [[]]
    for lemma, tag in tokens:
        if tag in _NOUNS:
            runs[-1].append(lemma)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run).strip() for run in runs if run]


def _caption(answer: str) -> str:
    """Return an answer as the official script reads it from an answer file."""
    return answer.replace("Assistant:", "").strip()


def _is_short(answer: str) -> bool:
    return len(_caption(answer).split()) <= SHORT_ANSWER


class ObjectHalBench(JudgedBenchmark):
    """Object HalBench, see the module's docstring.

    Args:
        tagger: of the judge's objects; if None, spaCy's en_core_web_trf, loaded when the official rule needs it.
        lemma: of words in reference captions; if None, NLTK's WordNet, loaded likewise.
    """

    name = "object-halbench"
    metric = "responses with a hallucination"
    scale = "percent; lengths in words"
    published_items = 300
    beams = 3
    judge_temperature = 0.2
    rules = (OFFICIAL, PLAIN)
    thoughtless_rules = frozenset({PLAIN})
    max_new_tokens = 1024
    lower_is_better = frozenset({"CHAIRs", "CHAIRi", "CHAIRs_refine"})
    required_files = (
        "obj_halbench_300_with_image.jsonl of RLHF-V or RLAIF-V, and COCO 2014's instances_val2014.json and "
        "captions_val2014.json (train's too where images are of train2014)"
    )

    def __init__(self, tagger: Tagger | None = None, lemma: Callable[[str], str] | None = None):
        self._tagger, self._lemma = tagger, lemma

    def load(self, data: Path) -> BenchmarkData:
        """Read the questions and COCO's annotations of their images; see `Benchmark.load`."""
        path = inputs.find_file(data, "obj_halbench*.jsonl", "*obj*hal*.jsonl", benchmark=self)
        encoded: dict[str, bytes] = {}

        def parse(row: Mapping[str, Any]) -> Question:
            id, text = coco.image_number(row["image_id"]), row["question"]
            if not isinstance(text, str):
                raise TypeError(f"question is {text!r}")
            image = coco.file_name(id)
            if row.get("image"):
                encoded[image] = base64.b64decode(row["image"], validate=True)
            return Question(row.get("question_id", id), image, text, str(id), {"image_id": id})

        questions = inputs.parse_rows(path, "question of Object HalBench", parse)
        inputs.check_unique(path, [question.id for question in questions])
        protocol = {
            "questions": len(questions),
            "published decoding": "for LLaVA by RLAIF-V: 3 beams, temperature 0, 1024 new tokens",
        }
        ids = {question.metadata["image_id"]: str(question.id) for question in reversed(questions)}
        folder = path.parent
        truth = coco.read_coco(
            folder, [q.metadata["image_id"] for q in questions], f"{self.name} needs {self.required_files}"
        )
        from_folders = coco.image_reader(folder)
        tables = {"segments": truth.segments, "captions": truth.captions, "by_image": ids}
        return BenchmarkData(
            questions, lambda name: encoded[name] if name in encoded else from_folders(name), protocol, tables
        )

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by image: the official answer files number their questions anew, from 0."""
        if row.get("image_id") is None:
            return super().match_question(row, loaded)
        return coco.match_image(row["image_id"], loaded.tables["by_image"])

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield one request, unless the answer is too short to name an object."""
        id = str(question.id)
        if not _is_short(answers[id]):
            fields = {"question": question.text, "answer": _caption(answers[id])}
            yield JudgeRequest(id, fill(prompts, "object_halbench", **fields))

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score the objects of answers; a missing answer counts nowhere, a reply without a list counts as an empty list."""
        official = rule == OFFICIAL
        if official:
            judged = [str(q.id) for q in loaded.questions if not _is_short(answers.get(str(q.id), ""))]
            replies = require_replies(self, replies, judged) if judged else {}
        words = chair_words.refined() if official else chair_words.chair()
        tagger = (self._tagger or _spacy_tagger()) if official else None
        lemma = (self._lemma or _wordnet_lemmatizer()) if official else None
        table, parsed_answers, unread = CountTable(COLUMNS, loaded.clusters), [], 0
        for question in loaded.questions:
            answer = answers.get(str(question.id))
            if answer is None:
                parsed_answers.append(ParsedAnswer(question.id, "", unparsed=True))
                continue
            caption, image = _caption(answer), question.metadata["image_id"]
            if tagger is None or replies is None:
                objects: list[tuple[str, str]] | None = words.mentions(caption)
            elif _is_short(answer):
                objects = []
            else:
                listed = extract_objects(replies[str(question.id)])
                objects = None if listed is None else words.objects(normalize(listed, words, tagger))
            truth = coco.classes_of(image, loaded.tables, words, lemma)
            mentioned = [name for _, name in objects or ()]
            table.add(question.cluster, {**count_objects(mentioned, truth), "words": len(caption.split(" "))})
            unread += objects is None
            parsed_answers.append(
                ParsedAnswer(question.id, "", unparsed=True)
                if objects is None
                else parsed_caption(question, mentioned, truth)
            )
        metrics = {
            "CHAIRs_refine": table.ratio("wrong_captions", "captions_with_objects", 100),
            "CHAIRi": table.ratio("wrong_mentions", "mentions", 100),
            "obj_rec": table.ratio("found", "there", 100),
            "avg_word_len": table.ratio("words", "captions"),
            "CHAIRs": table.ratio("wrong_captions", "captions", 100),
        }
        source = "the judge's" if official else "CHAIR's parse: a stand-in, not the published figure"
        return table.result(parsed_answers, metrics, {"objects": source, "unread_replies": unread})

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`."""
        return absent(parsed)

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the answer file that the official script takes."""
        rows = [
            {"image_id": question.metadata["image_id"], "question": question.text, "answer": text}
            for question, text in loaded.answered(answers)
        ]
        return [inputs.write_lines(out / "obj_halbench_answer.jsonl", rows)]

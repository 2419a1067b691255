"""AMBER: hallucination in descriptions and in yes/no questions, without a judge (Wang et al., arXiv 2311.07397).

Files, of the repository's `data`: `annotations.json`; `query/query_all.json`, or some of the other `query_*.json`; and for
descriptions `relation.json` (words and what goes with them) and `safe_words.txt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.eval.benchmarks import amber_words, inputs
from reverie_jax.eval.benchmarks.interface import (
    LMMS_EVAL,
    OFFICIAL,
    VLMEVALKIT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic, mean
from reverie_jax.eval.benchmarks.yes_no import vlmevalkit_yes_no

YES_NO_TOKENS = 128

TYPES = {
    "generative": "generative",
    "discriminative-hallucination": "Existence",
    "discriminative-attribute-state": "State",
    "discriminative-attribute-number": "Number",
    "discriminative-attribute-action": "Action",
    "discriminative-relation": "Relation",
    "relation": "Relation",
}
"""Categories by type of annotation."""

DIMENSIONS = {
    "Existence": ("Existence",),
    "Attribute": ("State", "Number", "Action"),
    "State": ("State",),
    "Number": ("Number",),
    "Action": ("Action",),
    "Relation": ("Relation",),
}
"""Dimensions that the official script reports, and their categories."""

START = 0.001
"""Initial value of every denominator of the official script (`metrics.txt`)."""
EPSILON = {"Existence": 0.001}
"""Added to the denominator of F1; 0.0001 for other dimensions."""

_TASK = ("generated", "clean", "nouns", "flagged", "truth", "covered", "hallu", "credited")
"""Counts of descriptions, those without a flagged noun; nouns, flagged ones; words of both lists, mentioned ones."""
_CELLS = ("asked", "right", "no", "said_no", "both_no")


def _lmms_eval(answer: str) -> str:
    """Parse as lmms-eval: "yes" anywhere, else "no" anywhere, even in "know"."""
    lower = answer.lower()
    return "yes" if "yes" in lower else "no" if "no" in lower else ""


_PARSERS: dict[str, Callable[[str], str]] = {
    OFFICIAL: lambda answer: {"Yes": "yes", "No": "no"}.get(answer, ""),
    LMMS_EVAL: _lmms_eval,
    VLMEVALKIT: vlmevalkit_yes_no,
}


def _percent(table: CountTable, over: Sequence[str], under: Sequence[str], start: float = START) -> Statistic:
    """Return a share in percent, whose denominator begins at `start`."""
    numerator, denominator = ([table[name] for name in names] for names in (over, under))
    return lambda sums: 100 * sums[..., numerator].sum(-1) / (sums[..., denominator].sum(-1) + start)


def _yes_no_metrics(
    table: CountTable, prefix: str, categories: Sequence[str], epsilon: float = 0.0001, start: float = START
) -> dict[str, Statistic]:
    """Return the official metrics of yes/no questions; "no" is the positive answer."""

    def percent(over: str, under: str) -> Statistic:
        return _percent(table, [f"{c}/{over}" for c in categories], [f"{c}/{under}" for c in categories], start)

    precision, recall = percent("both_no", "said_no"), percent("both_no", "no")

    def f1(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        # Of precision and recall as printed, with one decimal.
        p, r = np.round(precision(sums), 1) / 100, np.round(recall(sums), 1) / 100
        return np.asarray(100 * 2 * p * r / (p + r + epsilon))

    return {
        f"{prefix}Accuracy": percent("right", "asked"),
        f"{prefix}Precision": precision,
        f"{prefix}Recall": recall,
        f"{prefix}F1": f1,
    }


def _official_metrics(table: CountTable, categories: Sequence[str], described: bool) -> dict[str, Statistic]:
    """Return the paper's AMBER score and the metrics of its script, without those of tasks that were not asked."""
    metrics: dict[str, Statistic] = {}
    if described:
        clean = _percent(table, ["clean"], ["generated"])
        metrics |= {
            "CHAIR": _percent(table, ["flagged"], ["nouns"]),
            "Cover": _percent(table, ["covered"], ["truth"]),
            "Hal": lambda sums: 100 - clean(sums),
            "Cog": _percent(table, ["credited"], ["hallu"]),
        }
    if not categories:
        return metrics
    yes_no = _yes_no_metrics(table, "", categories)
    if described:
        chair, f1 = metrics["CHAIR"], yes_no["F1"]
        metrics = {"AMBER": lambda sums: (100 - chair(sums) + f1(sums)) / 2, **metrics, **yes_no}
    else:
        metrics = {"F1": yes_no["F1"], **yes_no}
    for name, parts in DIMENSIONS.items():
        if present := [part for part in parts if part in categories]:
            # The denominators of Attribute add up those of its three parts.
            metrics |= _yes_no_metrics(table, f"{name}/", present, EPSILON.get(name, 0.0001), START * len(parts))
    return metrics


def _vlmevalkit_metrics(table: CountTable, categories: Sequence[str]) -> dict[str, Statistic]:
    """Return the accuracies of three dimensions, and their unweighted mean."""
    accuracies = {}
    for name in ("Attribute", "Existence", "Relation"):
        if present := [part for part in DIMENSIONS[name] if part in categories]:
            right, asked = ([f"{part}/{cell}" for part in present] for cell in ("right", "asked"))
            accuracies[name] = table.ratio(right, asked, 100)
    return {"Avg ACC": mean(list(accuracies.values())), **accuracies}


class Amber(Benchmark):
    """AMBER, see the module's docstring.

    Args:
        nouns: finds the nouns of a description; the official script's if None, loaded when a description is scored.
        similarity: of two words; likewise.
    """

    name = "amber"
    metric = "AMBER score; CHAIR, F1"
    scale = "percent"
    published_items = 15220
    rules = (OFFICIAL, LMMS_EVAL, VLMEVALKIT)
    max_new_tokens = 1024
    lower_is_better = frozenset({"CHAIR", "Hal", "Cog"})
    required_files = (
        "the folder data of junyangwang0410/AMBER: annotations.json, query/query_all.json (or another query_*.json), "
        "relation.json and safe_words.txt; and with --images its images"
    )

    def __init__(self, nouns: amber_words.Nouns | None = None, similarity: amber_words.Similarity | None = None):
        self._nouns, self._similarity = nouns, similarity

    def load(self, data: Path) -> BenchmarkData:
        """Read queries and annotations, and word lists if there are descriptions; see `Benchmark.load`."""
        queries = self._query_files(data)
        folder = data.parent if data.is_file() else data
        folders = [folder, folder / "data", folder.parent]

        def locate(name: str) -> Path:
            path = next((place / name for place in folders if (place / name).is_file()), None)
            if path is None:
                raise BenchmarkError(f"{folder}: {name} is missing; {self.name} needs {self.required_files}")
            return path

        path = locate("annotations.json")
        annotations = {str(id): row for id, row in inputs.parse_rows(path, "annotation of AMBER", _annotation)}

        def parse(row: Mapping[str, Any]) -> Question:
            require(str(row["id"]) in annotations, f"{path}: annotation of question {row['id']} is missing")
            metadata = annotations[str(row["id"])]
            if not isinstance(row["query"], str):
                raise TypeError(f"query is {row['query']!r}")
            limit = None if metadata["category"] == "generative" else YES_NO_TOKENS
            return Question(row["id"], row["image"], row["query"], row["image"], metadata, max_new_tokens=limit)

        questions = [question for file in queries for question in inputs.parse_rows(file, "query of AMBER", parse)]
        inputs.check_unique(queries[0], [question.id for question in questions])
        protocol: dict[str, Any] = {"queries": [file.name for file in queries]}
        for question in questions:
            key = f"questions/{question.metadata['category']}"
            protocol[key] = protocol.get(key, 0) + 1
        tables = {}
        if "questions/generative" in protocol:
            safe = locate("safe_words.txt").read_text("utf-8-sig").splitlines()
            tables = {"relation": _relation(locate("relation.json")), "safe": frozenset(safe)}
        images = [place / name for place in folders for name in (".", "image", "images")]
        return BenchmarkData(questions, inputs.image_reader(*images), protocol, tables)

    def _query_files(self, data: Path) -> list[Path]:
        """Return the file of all questions; without it, the fewest files that have all that are there."""
        if data.is_file():
            return [data]
        folders = [data / "query", data / "data" / "query", data]
        files = {path.name: path for folder in reversed(folders) for path in folder.glob("query_*.json")}
        if "query_all.json" in files:
            return [files["query_all.json"]]
        chosen = [files[name] for name in ("query_generative.json", "query_discriminative.json") if name in files]
        if "query_discriminative.json" not in files:
            chosen += [path for name, path in sorted(files.items()) if name.startswith("query_discriminative-")]
        require(bool(chosen), f"{data}: query_all.json is missing; {self.name} needs {self.required_files}")
        return chosen

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score answers; a missing one counts nowhere, as in the official script.

        Descriptions are scored if their tools are installed; otherwise only yes/no questions are.
        """
        # A task without any answer was not run: it is left out, not scored as wrong.
        kinds = {question.metadata["category"] for question, _ in loaded.answered(answers)}
        kinds = kinds or {question.metadata["category"] for question in loaded.questions}
        categories = [name for name in _ALL if name in kinds]
        describe, reason = self._describer(loaded, rule, "generative" in kinds, bool(categories))
        columns = [*_TASK, *(f"{category}/{cell}" for category in categories for cell in _CELLS)]
        table = CountTable(columns, loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            answer, category = answers.get(str(question.id)), question.metadata["category"]
            if answer is None or (category == "generative" and describe is None):
                parsed_answers.append(ParsedAnswer(question.id, "", unparsed=answer is None, category=category))
            elif category == "generative" and describe is not None:
                amounts, flagged = describe(answer, question.metadata)
                table.add(question.cluster, amounts)
                clean, unparsed = float(not flagged), not amounts["nouns"]
                parsed_answers.append(ParsedAnswer(question.id, ", ".join(flagged), clean, unparsed, category))
            else:
                parsed, truth = _PARSERS[rule](answer), question.metadata["truth"]
                cells = (1, parsed == truth, truth == "no", parsed == "no", parsed == truth == "no")
                named = zip(_CELLS, cells, strict=True)
                table.add(question.cluster, {f"{category}/{cell}": float(amount) for cell, amount in named})
                parsed_answers.append(ParsedAnswer(question.id, parsed, float(parsed == truth), not parsed, category))
        scored = [*(["descriptions"] if describe is not None else []), *(["yes/no"] if categories else [])]
        if rule == VLMEVALKIT:
            metrics = _vlmevalkit_metrics(table, categories)
        else:
            metrics = _official_metrics(table, categories, describe is not None)
        return table.result(parsed_answers, metrics, {"parser": rule, "scored": scored, **reason})

    def _describer(
        self, loaded: BenchmarkData, rule: str, described: bool, yes_no: bool
    ) -> tuple[Callable[[str, Mapping[str, Any]], tuple[dict[str, float], list[str]]] | None, dict[str, str]]:
        """Return the function that scores a description, or None and the reason.

        Args:
            loaded: the questions.
            rule: one of `rules`.
            described: there are descriptions to score.
            yes_no: there are yes/no questions too.

        Raises:
            BenchmarkError: There is nothing to score.
        """
        if not described:
            return None, {}
        if rule == VLMEVALKIT:
            require(yes_no, f"amber: rule {VLMEVALKIT} scores only yes/no questions, and there are none")
            return None, {"descriptions": f"{VLMEVALKIT} has none"}
        try:
            nouns, similarity = self._nouns, self._similarity
            if nouns is None or similarity is None:
                official = amber_words.tools()
                nouns, similarity = nouns or official[0], similarity or official[1]
        except BenchmarkError as error:
            if not yes_no:
                raise
            return None, {"descriptions": f"not scored: {error}"}
        relation, safe, find, similar = loaded.tables["relation"], loaded.tables["safe"], nouns, similarity
        return lambda text, metadata: amber_words.score_description(
            find(text), metadata["truth"], metadata["hallu"], relation, safe, similar
        ), {}

    def part(self, question: Question) -> str:
        """Return the task: descriptions or yes/no."""
        return "descriptions" if question.metadata["category"] == "generative" else "yes/no questions"

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by `question_id`, or by `id` of the official answer file."""
        return super().match_question(row, loaded) or (None if row.get("id") is None else str(row["id"]))

    def answer_text(self, row: Mapping[str, Any]) -> Any:
        """Return `response` of the official answer file, or the answer of another form."""
        return row["response"] if "response" in row else super().answer_text(row)

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`."""
        return parsed.parsed.split(", ") if parsed.category == "generative" and parsed.right == 0 else ()

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the answer file that the official script takes."""
        rows = [{"id": question.id, "response": text} for question, text in loaded.answered(answers)]
        return [inputs.write_json(out / "amber_answers.json", rows, indent=4)]


_ALL = tuple(dict.fromkeys(category for category in TYPES.values() if category != "generative"))


def _annotation(row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the id of an annotation, and the metadata of its question."""
    category, truth = TYPES[row["type"]], row["truth"]
    if category != "generative":
        if truth not in ("yes", "no"):
            raise ValueError(f"truth is {truth!r}")
        return row["id"], {"category": category, "truth": truth}
    words = {"truth": list(truth), "hallu": list(row["hallu"])}
    if not all(isinstance(word, str) for word in words["truth"] + words["hallu"]):
        raise TypeError("truth and hallu must be lists of words")
    return row["id"], {"category": category, **words}


def _relation(path: Path) -> dict[str, list[str]]:
    """Return words with the words that go with each."""
    content = inputs.read_json(path)
    valid = isinstance(content, dict) and all(isinstance(words, list) for words in content.values())
    require(valid, f"{path}: must be an object of lists of words, by word")
    return dict(content)

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

from reverie_jax.data.row_files import write_rows
from reverie_jax.eval.benchmarks import amber_words, inputs
from reverie_jax.eval.benchmarks.interface import (
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    OFFICIAL,
    Question,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic, mean, ratio
from reverie_jax.eval.benchmarks.yes_no import vlmevalkit_yes_no

LMMS, KIT = "lmms-eval", "vlmevalkit"
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
"""Categories by an annotation's type."""

DIMENSIONS = {
    "Existence": ("Existence",),
    "Attribute": ("State", "Number", "Action"),
    "State": ("State",),
    "Number": ("Number",),
    "Action": ("Action",),
    "Relation": ("Relation",),
}
"""What the official script reports apart, and of which categories."""

START = 0.001
"""Every denominator of the official script starts there (`metrics.txt`)."""
EPSILON = {"Existence": 0.001}
"""In F1's denominator, 0.0001 elsewhere."""

_TASK = ("generated", "clean", "nouns", "flagged", "truth", "covered", "hallu", "credited")
"""Of descriptions: how many, those with nothing flagged; nouns, those flagged; words of both lists, those mentioned."""
_CELLS = ("asked", "right", "no", "said_no", "both_no")


def _lmms(answer: str) -> str:
    """lmms-eval: "yes" anywhere, else "no" anywhere, be it in "know"."""
    lower = answer.lower()
    return "yes" if "yes" in lower else "no" if "no" in lower else ""


_READERS: dict[str, Callable[[str], str]] = {
    OFFICIAL: lambda answer: {"Yes": "yes", "No": "no"}.get(answer, ""),
    LMMS: _lmms,
    KIT: vlmevalkit_yes_no,
}


def _from_start(over: int, under: int) -> Statistic:
    """In percent."""
    return lambda sums: 100 * sums[..., over] / (sums[..., under] + START)


def _asked(
    table: CountTable, prefix: str, categories: Sequence[str], epsilon: float = 0.0001, start: float = START
) -> dict[str, Statistic]:
    """The official figures of yes/no questions; "no" is the positive answer."""
    places = {cell: [table[f"{category}/{cell}"] for category in categories] for cell in _CELLS}

    def percent(over: str, under: str) -> Statistic:
        return lambda sums: 100 * sums[..., places[over]].sum(-1) / (sums[..., places[under]].sum(-1) + start)

    precision, recall = percent("both_no", "said_no"), percent("both_no", "no")

    def f1(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        # Of the two as they are printed, with one decimal.
        p, r = np.round(precision(sums), 1) / 100, np.round(recall(sums), 1) / 100
        return np.asarray(100 * 2 * p * r / (p + r + epsilon))

    return {
        f"{prefix}Accuracy": percent("right", "asked"),
        f"{prefix}Precision": precision,
        f"{prefix}Recall": recall,
        f"{prefix}F1": f1,
    }


def _official(table: CountTable, categories: Sequence[str], described: bool) -> dict[str, Statistic]:
    """AMBER's score is of the paper, the rest of its script; what was not asked is left out."""
    found: dict[str, Statistic] = {}
    if described:
        clean = _from_start(table["clean"], table["generated"])
        found |= {
            "CHAIR": _from_start(table["flagged"], table["nouns"]),
            "Cover": _from_start(table["covered"], table["truth"]),
            "Hal": lambda sums: 100 - clean(sums),
            "Cog": _from_start(table["credited"], table["hallu"]),
        }
    if not categories:
        return found
    asked = _asked(table, "", categories)
    if described:
        chair, f1 = found["CHAIR"], asked["F1"]
        found = {"AMBER": lambda sums: (100 - chair(sums) + f1(sums)) / 2, **found, **asked}
    else:
        found = {"F1": asked["F1"], **asked}
    for name, parts in DIMENSIONS.items():
        if there := [part for part in parts if part in categories]:
            # An attribute's denominators add up those of its three parts.
            found |= _asked(table, f"{name}/", there, EPSILON.get(name, 0.0001), START * len(parts))
    return found


def _vlmevalkit_metrics(table: CountTable, categories: Sequence[str]) -> dict[str, Statistic]:
    """Accuracies of the three dimensions, and their plain mean."""
    parts = {
        name: [part for part in DIMENSIONS[name] if part in categories]
        for name in ("Attribute", "Existence", "Relation")
    }
    accuracies = {
        name: ratio([table[f"{part}/right"] for part in there], [table[f"{part}/asked"] for part in there], scale=100)
        for name, there in parts.items()
        if there
    }

    def mean(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        return np.asarray(np.mean([metric(sums) for metric in accuracies.values()], axis=0))

    return {"Avg ACC": mean, **accuracies}


class Amber(Benchmark):
    """See the module's docstring.

    Args:
        nouns, similarity: the official script's own where they are None, loaded when a description is scored.
    """

    name = "amber"
    published_items = 15220
    rules = (OFFICIAL, LMMS, KIT)
    max_new_tokens = 1024
    lower_is_better = frozenset({"CHAIR", "Hal", "Cog"})
    required_files = (
        "the folder data of junyangwang0410/AMBER: annotations.json, query/query_all.json (or another query_*.json), "
        "relation.json and safe_words.txt; and with --images its pictures"
    )

    def __init__(self, nouns: amber_words.Nouns | None = None, similarity: amber_words.Similarity | None = None):
        self._nouns, self._similarity = nouns, similarity

    def load(self, data: Path) -> BenchmarkData:
        queries = self._queries(data)
        folder = data.parent if data.is_file() else data
        places = [folder, folder / "data", folder.parent]

        def beside(name: str) -> Path:
            for place in places:
                if (place / name).is_file():
                    return place / name
            raise BenchmarkError(f"{folder}: no {name} there; {self.name} needs {self.required_files}")

        path = beside("annotations.json")
        annotations = {str(row[0]): row[1] for row in inputs.parse_rows(path, "annotation of AMBER", _annotation)}

        def make(row: Mapping[str, Any]) -> Question:
            if str(row["id"]) not in annotations:
                raise BenchmarkError(f"{path}: no annotation of question {row['id']}")
            known = annotations[str(row["id"])]
            if not isinstance(row["query"], str):
                raise TypeError(f"its query is {row['query']!r}")
            tokens = None if known["category"] == "generative" else YES_NO_TOKENS
            return Question(row["id"], row["image"], row["query"], row["image"], known, max_new_tokens=tokens)

        questions = [question for query in queries for question in inputs.parse_rows(query, "query of AMBER", make)]
        inputs.check_unique(queries[0], [question.id for question in questions])
        protocol: dict[str, Any] = {"queries": [query.name for query in queries]}
        for question in questions:
            key = f"questions/{question.metadata['category']}"
            protocol[key] = protocol.get(key, 0) + 1
        known = {}
        if "questions/generative" in protocol:
            safe = beside("safe_words.txt").read_text("utf-8").split("\n")
            known = {"relation": _relation(beside("relation.json")), "safe": frozenset(safe)}
        images = [place / name for place in places for name in (".", "image", "images")]
        return BenchmarkData(questions, inputs.image_reader(*images), protocol, known)

    def _queries(self, data: Path) -> list[Path]:
        """The file of all questions; or else as few as hold what is there."""
        if data.is_file():
            return [data]
        places = [data / "query", data / "data" / "query", data]
        there = {path.name: path for place in reversed(places) for path in place.glob("query_*.json")}
        if "query_all.json" in there:
            return [there["query_all.json"]]
        found = [there[name] for name in ("query_generative.json", "query_discriminative.json") if name in there]
        if "query_discriminative.json" not in there:
            found += [path for name, path in sorted(there.items()) if name.startswith("query_discriminative-")]
        require(bool(found), f"{data}: no query_all.json there; {self.name} needs {self.required_files}")
        return found

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """A question without an answer counts nowhere: the official script goes through the answers.

        Descriptions are scored where the tools for it are here; where they are not, yes/no questions alone.
        """
        # A part of which nothing was answered was not run: it is left out, not scored as nothing right.
        kinds = {q.metadata["category"] for q in loaded.questions if str(q.id) in answers}
        kinds = kinds or {q.metadata["category"] for q in loaded.questions}
        categories = [name for name in _ALL if name in kinds]
        describe, reason = self._describe(loaded, rule, "generative" in kinds, bool(categories))
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
                said, truth = _READERS[rule](answer), question.metadata["truth"]
                cells = {
                    "asked": 1,
                    "right": said == truth,
                    "no": truth == "no",
                    "said_no": said == "no",
                    "both_no": said == truth == "no",
                }
                table.add(question.cluster, {f"{category}/{cell}": float(amount) for cell, amount in cells.items()})
                parsed_answers.append(ParsedAnswer(question.id, said, float(said == truth), not said, category))
        scored = [*(["descriptions"] if describe is not None else []), *(["yes/no"] if categories else [])]
        metrics = (
            _vlmevalkit_metrics(table, categories)
            if rule == KIT
            else _official(table, categories, describe is not None)
        )
        return table.result(parsed_answers, metrics, {"parser": rule, "scored": scored, **reason})

    def _describe(
        self, loaded: BenchmarkData, rule: str, asked: bool, others: bool
    ) -> tuple[Callable[[str, Mapping[str, Any]], tuple[dict[str, float], list[str]]] | None, dict[str, str]]:
        """What scores a description, or None and why not.

        Args:
            asked: there are descriptions to score.
            others: there are yes/no questions too.

        Raises:
            BenchmarkError: there is nothing else to score.
        """
        if not asked:
            return None, {}
        if rule == KIT:
            require(others, f"amber: {KIT}'s rule is of yes/no questions, and there is none")
            return None, {"descriptions": f"{KIT} has none"}
        try:
            nouns, similarity = self._nouns, self._similarity
            if nouns is None or similarity is None:
                own = amber_words.tools()
                nouns, similarity = nouns or own[0], similarity or own[1]
        except BenchmarkError as error:
            if not others:
                raise
            return None, {"descriptions": f"not scored: {error}"}
        relation, safe, find, alike = loaded.tables["relation"], loaded.tables["safe"], nouns, similarity
        return lambda text, known: amber_words.described(
            find(text), known["truth"], known["hallu"], relation, safe, alike
        ), {}

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        return super().match_question(row, loaded) or (None if row.get("id") is None else str(row["id"]))

    def answer_text(self, row: Mapping[str, Any]) -> Any:
        return row["response"] if "response" in row else super().answer_text(row)

    def hallucinated(self, loaded: BenchmarkData, question: Question, text: str, parsed: ParsedAnswer) -> Sequence[str]:
        """See `Benchmark.hallucinated`."""
        return parsed.parsed.split(", ") if parsed.category == "generative" and parsed.right == 0 else ()

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """What the official script takes."""
        out.mkdir(parents=True, exist_ok=True)
        rows = [{"id": q.id, "response": answers[str(q.id)]} for q in loaded.questions if str(q.id) in answers]
        write_rows(out / "amber_answers.json", rows)
        return [out / "amber_answers.json"]


_ALL = tuple(dict.fromkeys(category for category in TYPES.values() if category != "generative"))


def _annotation(row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An annotation's id, and what scoring needs of it."""
    category, truth = TYPES[row["type"]], row["truth"]
    if category != "generative":
        if truth not in ("yes", "no"):
            raise ValueError(f"its truth is {truth!r}")
        return row["id"], {"category": category, "truth": truth}
    words = {"truth": list(truth), "hallu": list(row["hallu"])}
    if not all(isinstance(word, str) for word in words["truth"] + words["hallu"]):
        raise TypeError("its words are no words")
    return row["id"], {"category": category, **words}


def _relation(path: Path) -> dict[str, list[str]]:
    """Words, and what goes with each."""
    found = inputs.read_json(path)
    if not isinstance(found, dict) or not all(isinstance(words, list) for words in found.values()):
        raise BenchmarkError(f"{path}: no object of words, each with a list of words")
    return found

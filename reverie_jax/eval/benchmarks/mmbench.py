"""MMBench and MMBench-CN: a question counts only if it is answered with every rotation of its options (arXiv 2307.06281).

Files: the TSV, a row a rotation ("pass"): pass k of question i has index i + k * 1,000,000. Scored as VLMEvalKit does, the
leaderboard's own code.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from reverie_jax.eval.benchmarks import choice_parsing, files, judged
from reverie_jax.eval.benchmarks.interface import (
    LETTER,
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    JudgeRequest,
    NotScorable,
    ParsedAnswer,
    Question,
    Scored,
    Table,
    need,
    share,
)
from reverie_jax.eval.statistics import Statistic

PASS = 1_000_000
"""Between the indices of two passes of a question."""
LETTER_CN = "请直接回答选项字母。"
"""LLaVA's suffix for MMBench-CN."""
JUDGED, LMMS = "judged", "lmms-eval"

_ASKED = "ABCD"
_REFERENCE = 64
"""Image cells of at most so many characters name the row that has the picture."""
_EMPTY = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Cells that pandas, which both LLaVA and VLMEvalKit read the file with, takes for nothing."""
_ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""VLMEvalKit's names of the level-2 abilities."""
_GROUPS = ("split", "l2-category", "category")
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that LLaVA leaves out of the upload."""
_PLACE = 6
"""Of the column `prediction` in the upload."""
_CHINESE = re.compile("[\u4e00-\u9fff]")
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
"""Characters that an xlsx cell cannot hold."""

_READERS: dict[str, Callable[[str, choice_parsing.Options], str]] = {
    OFFICIAL: choice_parsing.vlmevalkit,
    JUDGED: choice_parsing.vlmevalkit,
    LMMS: choice_parsing.lmms,
}


def _empty(cell: str | None) -> bool:
    return cell is None or cell in _EMPTY or cell.lower() in ("nan", "none")


class MmBench(Benchmark):
    """See the module's docstring.

    The unit is the question with all its passes, named by the index of its first: they share a picture, and only all of them
    together are right or wrong, so no resample may part them.

    Rules: "official" is VLMEvalKit's exact matching, where an answer that no option can be inferred from is wrong unless a
    judge's reply to it is there; "judged" needs those replies; "lmms-eval" is its `static` mode, with the same groups.
    """

    name = "mmbench"
    expected_new_tokens = 8
    rules = (OFFICIAL, JUDGED, LMMS)
    judged = frozenset({JUDGED})
    max_new_tokens = 1024
    needs = (
        "a TSV of MMBench in English, from OpenCompass: mmbench_dev_20230712.tsv, which LLaVA uses, or "
        "MMBench_DEV_EN.tsv as VLMEvalKit has it"
    )
    suffix: ClassVar[str] = LETTER
    patterns: ClassVar[tuple[str, ...]] = (
        *("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "*dev_en*.tsv", "*DEV_EN*.tsv", "*dev_2*.tsv"),
        *("*test_en*.tsv", "*TEST_EN*.tsv", "*test_2*.tsv"),
    )

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, *self.patterns, benchmark=self)
        rows, cells = _read(path)
        columns = list(next(iter(rows.values())))
        complete = any(index >= PASS for index in rows)
        if not complete:
            rows = {
                index + number * PASS: _rotated(row, number)
                for index, row in rows.items()
                for number in range(max(1, len(_prefix(row))))
            }
        questions = [self._question(path, index, row, cells, rows) for index, row in rows.items()]

        def picture(name: str) -> bytes:
            cell = cells.get(int(name)) if name.isdecimal() else None
            need(cell is not None, f"{path}: no row {name} to take a picture from")
            try:
                return base64.b64decode("".join(str(cell).split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise BenchmarkError(f"{path}: row {name}: its picture is no base64 ({error})") from None

        protocol = {
            "file": path.name,
            "questions": sum(index < PASS for index in rows),
            "rows": len(rows),
            "passes": "rows of the file" if complete else "made here: options rotated to the left, a step a pass",
        }
        return BenchmarkData(questions, picture, protocol, {"columns": columns})

    def _question(
        self, path: Path, index: int, row: dict[str, str], cells: dict[int, str], rows: Mapping[int, dict[str, str]]
    ) -> Question:
        base = index % PASS
        need(base in rows, f"{path}: row {index}: question {base} has no row of its own; take the whole file")
        options = {
            letter: row[letter] for letter in choice_parsing.LETTERS if letter in row and not _empty(row[letter])
        }
        answer = row.get("answer", "")
        # An option's text may be one of the words for nothing, as "None", and be right all the same.
        need(
            _empty(answer) or (len(answer) == 1 and answer in choice_parsing.LETTERS and bool(row.get(answer))),
            f"{path}: row {index}: its answer {answer!r} is none of its options",
        )
        parts = (
            "" if _empty(row.get("hint")) else row["hint"],
            row["question"],
            choice_parsing.lines(_prefix(row)),
            self.suffix,
        )
        text = "\n".join(part for part in parts if part)
        known = {
            "options": options,
            "answer": "" if _empty(answer) else answer,
            "question": row["question"],
            "first": index == base,
            "row": row,
            **{group: "" if _empty(row.get(group)) else row[group] for group in _GROUPS},
        }
        # A pass we made has its question's picture; one of the file's may name any row's, and mostly repeats its question's.
        holder = index if index in cells else base
        cell = cells[holder]
        image = cell if _refers(cell) else str(base) if cells.get(base) == cell else str(holder)
        return Question(index, image, text, str(base), known)

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A missing answer is wrong. `first_pass` is of the first passes alone, read in the same way."""
        asked = {str(question.id): question for question in loaded.questions}
        hidden = next((id for id, question in asked.items() if not question.known["answer"]), None)
        if hidden is not None:
            raise NotScorable(
                f"{self.name}: question {hidden} has no answer in {loaded.protocol.get('file')}, as all of the test split; "
                f"`reverie score {self.name} --export FOLDER` writes the upload for the benchmark's server"
            )
        said = {id: _READERS[rule](answers.get(id, ""), question.known["options"]) for id, question in asked.items()}
        unparsed = {id for id, letter in said.items() if not letter}
        doubtful = [] if rule == LMMS else _open(asked, answers, said)
        if rule == JUDGED and doubtful:
            replies = judged.needed(self, replies, doubtful)
        replied = [id for id in doubtful if id in (replies or {})]
        for id in replied:
            # VLMEvalKit asks three times and then draws an option by lot; here it is none of them.
            said[id] = choice_parsing.vlmevalkit((replies or {})[id], asked[id].known["options"])
        unparsed -= {id for id in replied if said[id]}
        right = {id: said[id] == question.known["answer"] for id, question in asked.items()}
        missed = {question.unit for id, question in asked.items() if not right[id]}
        firsts = {id: question for id, question in asked.items() if question.known["first"]}
        groups = _groups(list(firsts.values()))
        columns = [
            "hits",
            "questions",
            "first",
            *(f"{g}={name}/{what}" for g, name in groups for what in ("hits", "questions")),
        ]
        table = Table(columns, [question.unit for question in firsts.values()])
        for id, question in firsts.items():
            hit = float(question.unit not in missed)
            table.add(question.unit, {"hits": hit, "questions": 1.0, "first": float(right[id])})
            for group, name in groups:
                if question.known[group] == name:
                    table.add(question.unit, {f"{group}={name}/hits": hit, f"{group}={name}/questions": 1.0})
        parsed_answers = [
            ParsedAnswer(question.id, said[id], float(right[id]), id in unparsed, question.known["category"])
            for id, question in asked.items()
        ]
        protocol = {"parser": rule, "not inferred": len(unparsed), "replies of a judge": len(replied)}
        return Scored(parsed_answers, table.units, table.counts, _metrics(table, groups), protocol)

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """LLaVA numbers the passes of `--all-rounds` apart, in `round_id`."""
        id, number = row.get("question_id", row.get("index")), row.get("round_id") or 0
        if isinstance(id, int) and isinstance(number, int):
            return str(id + number * PASS)
        return None if id is None else str(id)

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        """What cannot be inferred, unless the question is missed by another pass anyway."""
        if rule != JUDGED:
            return []
        asked = {str(question.id): question for question in loaded.questions}
        said = {
            id: choice_parsing.vlmevalkit(answers.get(id, ""), question.known["options"])
            for id, question in asked.items()
        }
        made = []
        for id in _open(asked, answers, said):
            known = asked[id].known
            # VLMEvalKit goes by the question's language too, not by the file's.
            name = "mmbench_cn" if _CHINESE.search(known["question"]) else "mmbench"
            fields = {
                "question": known["question"],
                "options": choice_parsing.lines(known["options"]),
                "answer": answers[id],
            }
            made.append(JudgeRequest(id, judged.fill(prompts, name, **fields).rstrip()))
        return made

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """The xlsx that LLaVA uploads to MMBench's server: the file's columns without pictures, and `prediction`."""
        import pandas

        columns = [column for column in loaded.known["columns"] if column not in _NOT_UPLOADED]
        rows = []
        for question in loaded.questions:
            cells = {column: question.known["row"].get(column) for column in columns}
            cells = {column: None if _empty(cell) else cell for column, cell in cells.items()}
            text = answers.get(str(question.id))
            rows.append(cells | {"index": question.id, "prediction": text and _UNWRITABLE.sub("", text)})
        columns.insert(_PLACE, "prediction")
        path = out / f"{self.name}.xlsx"
        try:
            out.mkdir(parents=True, exist_ok=True)
            pandas.DataFrame(rows, columns=columns).to_excel(path, index=False, engine="openpyxl")
        except ImportError:
            raise BenchmarkError(f"{path}: writing it needs openpyxl; install that (pip install openpyxl)") from None
        return [path]


class MmBenchCn(MmBench):
    """MMBench with questions in Chinese, and LLaVA's Chinese suffix."""

    name = "mmbench-cn"
    needs = (
        "a TSV of MMBench in Chinese, from OpenCompass: mmbench_dev_cn_20231003.tsv, which LLaVA uses, or "
        "MMBench_DEV_CN.tsv as VLMEvalKit has it"
    )
    suffix = LETTER_CN
    patterns = (
        *("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "*dev_cn*.tsv", "*DEV_CN*.tsv"),
        *("*test_cn*.tsv", "*TEST_CN*.tsv"),
    )


def _refers(cell: str) -> bool:
    return len(cell) <= _REFERENCE and cell.isdecimal()


def _read(path: Path) -> tuple[dict[int, dict[str, str]], dict[int, str]]:
    """A TSV's rows without their pictures, and the pictures as they stand there, by index.

    A picture that several passes repeat, as in files of 2023, is kept once.

    Raises:
        BenchmarkError: a row's index is no number or stands there twice; a row names another's picture that there is not.
    """
    rows: dict[int, dict[str, str]] = {}
    cells: dict[int, str] = {}
    for number, row in enumerate(files.read_tsv(path, ("index", "question", "A", "B", "image")), 1):
        try:
            index = int(row["index"])
        except ValueError:
            raise BenchmarkError(f"{path}: row {number}: its index {row['index']!r} is no number") from None
        need(index >= 0, f"{path}: row {number}: its index {index} is below 0")
        need(index not in rows, f"{path}: question {index} stands there twice")
        cell, first = row.pop("image").strip(), cells.get(index % PASS)
        need(bool(cell), f"{path}: row {index} has no picture")
        rows[index], cells[index] = row, first if first is not None and first == cell else cell
    need(bool(rows), f"{path}: no question there")
    for index, cell in cells.items():
        if _refers(cell):
            named = cells.get(int(cell))
            need(
                named is not None and not _refers(named),
                f"{path}: row {index}: row {cell}, which it names, has no picture",
            )
    return rows, cells


def _prefix(row: Mapping[str, str]) -> dict[str, str]:
    """The options that LLaVA asks: from A on, up to the first that is empty."""
    options: dict[str, str] = {}
    for letter in _ASKED:
        if _empty(row.get(letter)):
            break
        options[letter] = row[letter]
    return options


def _rotated(row: Mapping[str, str], steps: int) -> dict[str, str]:
    """A pass of a question: its options moved to the left, and its answer with them."""
    letters = list(_prefix(row))
    moved = {letter: row[letters[(place + steps) % len(letters)]] for place, letter in enumerate(letters)}
    answer = row.get("answer", "")
    if answer in letters:
        moved["answer"] = letters[(letters.index(answer) - steps) % len(letters)]
    return {**row, **moved}


def _open(asked: Mapping[str, Question], answers: Mapping[str, str], said: Mapping[str, str]) -> list[str]:
    """Answers that a judge decides: nothing is inferred, and no other pass has missed the question already."""
    missed = {
        question.unit
        for id, question in asked.items()
        if id not in answers or (said[id] and said[id] != question.known["answer"])
    }
    return [id for id, question in asked.items() if not said[id] and question.unit not in missed]


def _groups(firsts: Sequence[Question]) -> list[tuple[str, str]]:
    """Columns and their values that accuracy is told for: of splits only where there are several."""
    names = {group: sorted({question.known[group] for question in firsts} - {""}) for group in _GROUPS}
    return [(group, name) for group in _GROUPS if group != "split" or len(names[group]) > 1 for name in names[group]]


def _metrics(table: Table, groups: Sequence[tuple[str, str]]) -> dict[str, Statistic]:
    """In percent. Groups by VLMEvalKit's names, level 2 before categories, and without a mean over them."""
    found: dict[str, Statistic] = {
        "accuracy": share(table["hits"], table["questions"], scale=100.0),
        "first_pass": share(table["first"], table["questions"], scale=100.0),
    }
    for group, name in groups:
        over, under = table[f"{group}={name}/hits"], table[f"{group}={name}/questions"]
        found[f"{_ABILITIES.get(name, name)}/accuracy"] = share(over, under, scale=100.0)
    return found

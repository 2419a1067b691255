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

from reverie_jax.eval.benchmarks import choice_parsing, inputs, judged, parquet
from reverie_jax.eval.benchmarks.interface import (
    LETTER,
    LMMS_EVAL,
    OFFICIAL,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    HubDataset,
    JudgeRequest,
    NotScorable,
    Question,
    Row,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic

PASS = 1_000_000
"""Difference between the indices of two passes of a question."""
LETTER_CN = "请直接回答选项字母。"
"""LLaVA's suffix for MMBench-CN."""
JUDGED = "judged"

_ASKED = "ABCD"
_HUB, _REVISION = "lmms-lab-encoder/MMBench", "56ba1af8954932c4804bd3f522e05ed96e63b654"
_MAX_REFERENCE = 64
"""An image cell of at most so many characters is the index of the row that has the image."""
_EMPTY = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Cells that pandas, with which LLaVA and VLMEvalKit read the file, parses as missing."""
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
"""Columns that LLaVA omits from the upload."""
_PREDICTION_COLUMN = 6
"""Position of the column `prediction` in the upload."""
_CHINESE = re.compile("[\u4e00-\u9fff]")
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
"""Characters that an xlsx cell cannot hold."""

_PARSERS: dict[str, Callable[[str, choice_parsing.Options], str]] = {
    OFFICIAL: choice_parsing.vlmevalkit,
    JUDGED: choice_parsing.vlmevalkit,
    LMMS_EVAL: choice_parsing.lmms_eval,
}


def _is_empty(cell: str | None) -> bool:
    return cell is None or cell in _EMPTY or cell.lower() in ("nan", "none")


class MmBench(Benchmark):
    """MMBench, see the module's docstring.

    A cluster is a question with all its passes, named by the index of the first: only together are they right or wrong.

    Rules: "official" is VLMEvalKit's exact matching, where an answer without an option is wrong unless there is a judge's
    reply to it; "judged" needs those replies; "lmms-eval" is its `static` mode, with the same groups.
    """

    name = "mmbench"
    unique_ids = False  # the Chinese files have the same
    scale = "percent"
    published_items: ClassVar[int | None] = 4377  # rows of mmbench_dev_20230712, one per rotation
    expected_new_tokens = 8
    rules = (OFFICIAL, JUDGED, LMMS_EVAL)
    judged_rules = frozenset({JUDGED})
    max_new_tokens = 1024
    required_files = (
        "a TSV of MMBench in English, from OpenCompass: mmbench_dev_20230712.tsv, which LLaVA uses, or "
        "MMBench_DEV_EN.tsv as VLMEvalKit has it"
    )
    metric = "accuracy over questions that are right with all rotations of their options"
    hub: ClassVar[HubDataset] = HubDataset(_HUB, ("en/dev-*.parquet",), 97, _REVISION)
    languages: ClassVar[frozenset[str]] = frozenset({"en"})
    suffix: ClassVar[str] = LETTER
    patterns: ClassVar[tuple[str, ...]] = (
        *("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "*dev_en*.tsv", "*DEV_EN*.tsv", "*dev_2*.tsv"),
        *("*test_en*.tsv", "*TEST_EN*.tsv", "*test_2*.tsv"),
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the TSV, and make the passes of questions that have only one; see `Benchmark.load`."""
        table = parquet.find_table(data, *self.hub.files)
        path = inputs.find_file(data, *self.patterns, benchmark=self) if table is None else table.paths[0]
        rows, images, numbers = _read(path) if table is None else _read_table(table)
        columns = list(next(iter(rows.values())))
        complete = any(index >= PASS for index in rows)
        if not complete:
            rows = {
                index + number * PASS: _rotate(row, number)
                for index, row in rows.items()
                for number in range(max(1, len(_options_asked(row))))
            }
        questions = [self._question(path, index, row, images, rows) for index, row in rows.items()]

        def read_cell(name: str) -> bytes:
            cell = images.get(int(name)) if name.isdecimal() else None
            require(cell is not None, f"{path}: row {name}, which has the image, is missing")
            try:
                return base64.b64decode("".join(str(cell).split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise BenchmarkError(f"{path}: row {name}: the image is not valid base64 ({error})") from None

        protocol = {
            "file": path.name,
            "questions": sum(index < PASS for index in rows),
            "rows": len(rows),
            "passes": "rows of the file" if complete else "made here: options rotated to the left, a step a pass",
        }
        read_image = read_cell if table is None else table.reader(numbers)
        return BenchmarkData(questions, read_image, protocol, {"columns": columns})

    def _question(
        self, path: Path, index: int, row: dict[str, str], images: dict[int, str], rows: Mapping[int, dict[str, str]]
    ) -> Question:
        first = index % PASS
        require(first in rows, f"{path}: row {index}: the first pass, row {first}, is missing; use the complete file")
        options = {
            letter: row[letter] for letter in choice_parsing.LETTERS if letter in row and not _is_empty(row[letter])
        }
        answer = row.get("answer", "")
        # The text of an option may be a word like "None", which is otherwise missing, and still be right.
        require(
            _is_empty(answer) or (len(answer) == 1 and answer in choice_parsing.LETTERS and bool(row.get(answer))),
            f"{path}: row {index}: answer {answer!r} is not an option",
        )
        hint = "" if _is_empty(row.get("hint")) else row["hint"]
        parts = (hint, row["question"], choice_parsing.format_options(_options_asked(row)), self.suffix)
        metadata = {
            "options": options,
            "answer": "" if _is_empty(answer) else answer,
            "question": row["question"],
            "first": index == first,
            "row": row,
            **{group: "" if _is_empty(row.get(group)) else row[group] for group in _GROUPS},
        }
        # A generated pass has the image of its question; one of the file may refer to any row, mostly its question's.
        holder = index if index in images else first
        cell = images[holder]
        image = cell if _refers(cell) else str(first) if images.get(first) == cell else str(holder)
        return Question(index, image, "\n".join(part for part in parts if part), str(first), metadata)

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score questions with all passes; a missing answer is wrong. `first_pass` counts only the first passes."""
        questions = {str(question.id): question for question in loaded.questions}
        unlabeled = next((id for id, question in questions.items() if not question.metadata["answer"]), None)
        if unlabeled is not None:
            raise NotScorable(
                f"{loaded.protocol.get('file')}: question {unlabeled} has no answer, as in all of the test split; run "
                f"`reverie score {self.name} --export FOLDER` for the upload to the benchmark's server"
            )
        letters = {
            id: _PARSERS[rule](answers.get(id, ""), question.metadata["options"]) for id, question in questions.items()
        }
        unparsed = {id for id, letter in letters.items() if not letter}
        undecided = [] if rule == LMMS_EVAL else _undecided(questions, answers, letters)
        if rule == JUDGED and undecided:
            replies = judged.require_replies(self, replies, undecided)
        judged_ids = [id for id in undecided if id in (replies or {})]
        for id in judged_ids:
            # VLMEvalKit asks three times and then draws an option at random; here it is none of them.
            letters[id] = choice_parsing.vlmevalkit((replies or {})[id], questions[id].metadata["options"])
        unparsed -= {id for id in judged_ids if letters[id]}
        right = {id: letters[id] == question.metadata["answer"] for id, question in questions.items()}
        missed = {question.cluster for id, question in questions.items() if not right[id]}
        firsts = {id: question for id, question in questions.items() if question.metadata["first"]}
        groups = _groups(list(firsts.values()))
        columns = [f"{group}={name}/{cell}" for group, name in groups for cell in ("hits", "questions")]
        table = CountTable(["hits", "questions", "first", *columns], [question.cluster for question in firsts.values()])
        for id, question in firsts.items():
            hit = float(question.cluster not in missed)
            table.add(question.cluster, {"hits": hit, "questions": 1.0, "first": float(right[id])})
            for group, name in groups:
                if question.metadata[group] == name:
                    table.add(question.cluster, {f"{group}={name}/hits": hit, f"{group}={name}/questions": 1.0})
        parsed_answers = [
            ParsedAnswer(question.id, letters[id], float(right[id]), id in unparsed, question.metadata["category"])
            for id, question in questions.items()
        ]
        protocol = {"parser": rule, "not inferred": len(unparsed), "replies of a judge": len(judged_ids)}
        return table.result(parsed_answers, _metrics(table, groups), protocol)

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by index; LLaVA numbers the passes of `--all-rounds` in `round_id`."""
        id, number = row.get("question_id", row.get("index")), row.get("round_id") or 0
        if str(id).isdecimal() and str(number).isdecimal():
            return str(int(id) + int(number) * PASS)
        return None if id is None else str(id)

    def part(self, question: Question) -> str:
        """Return the pass: some files hold answers to the first one alone."""
        return "first passes" if question.metadata["first"] else "other passes"

    def settle_rows(
        self, rows: Sequence[tuple[str, Any]], path: Path, loaded: BenchmarkData
    ) -> tuple[Sequence[tuple[str, Any]], str]:
        """Take the question and options of a table for the prompt; see `Benchmark.settle_rows`.

        Raises:
            BenchmarkError: The file is named after the other language, which has the same ids, and has no prompts.
        """
        settled = [(where, _with_prompt(row) if isinstance(row, Mapping) else row) for where, row in rows]
        prompts = any(isinstance(row, Mapping) and row.get("prompt") for _, row in settled)
        named = set(re.findall(r"(?<![a-z])(?:cn|zh|en)(?![a-z])", path.stem.lower()))
        require(
            bool(prompts) or not named or bool(named & self.languages),
            f"{path}: its name says {' and '.join(sorted(named))}, and {self.name} has the same ids in another language; "
            "add the prompts, or rename the file",
        )
        return settled, ""

    def judge_requests(self, loaded: BenchmarkData, answers: Texts, rule: str, prompts: Texts) -> list[JudgeRequest]:
        """Return requests about answers without an option, unless another pass has missed the question anyway."""
        if rule != JUDGED:
            return []
        questions = {str(question.id): question for question in loaded.questions}
        letters = {
            id: choice_parsing.vlmevalkit(answers.get(id, ""), question.metadata["options"])
            for id, question in questions.items()
        }
        requests = []
        for id in _undecided(questions, answers, letters):
            metadata = questions[id].metadata
            # VLMEvalKit goes by the language of the question, not of the file.
            name = "mmbench_cn" if _CHINESE.search(metadata["question"]) else "mmbench"
            options = choice_parsing.format_options(metadata["options"])
            prompt = judged.fill(prompts, name, question=metadata["question"], options=options, answer=answers[id])
            requests.append(JudgeRequest(id, prompt.rstrip()))
        return requests

    def same_prompt(self, prompt: str, question: Question) -> bool:
        """Compare the question, and the order of the options: letters depend on it."""
        return super().same_prompt(prompt, question) and choice_parsing.same_options(
            prompt, question.metadata["options"]
        )

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write LLaVA's upload to MMBench's server: an xlsx of the file's columns without images, and `prediction`."""
        import pandas

        columns = [column for column in loaded.tables["columns"] if column not in _NOT_UPLOADED]
        rows = []
        for question in loaded.questions:
            cells = {column: question.metadata["row"].get(column) for column in columns}
            cells = {column: None if _is_empty(cell) else cell for column, cell in cells.items()}
            text = answers.get(str(question.id))
            rows.append(cells | {"index": question.id, "prediction": text and _UNWRITABLE.sub("", text)})
        columns.insert(_PREDICTION_COLUMN, "prediction")
        path = out / f"{self.name}.xlsx"
        out.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(rows, columns=columns).to_excel(path, index=False, engine="openpyxl")
        return [path]


class MmBenchCn(MmBench):
    """MMBench-CN: questions in Chinese, and LLaVA's Chinese suffix."""

    name = "mmbench-cn"
    folder_names = ("mmbench_cn", "mmbench")
    published_items = None  # the number of questions of published scores is not known
    required_files = (
        "a TSV of MMBench in Chinese, from OpenCompass: mmbench_dev_cn_20231003.tsv, which LLaVA uses, or "
        "MMBench_DEV_CN.tsv as VLMEvalKit has it"
    )
    hub = HubDataset(_HUB, ("cn/dev-*.parquet",), 97, _REVISION)
    languages = frozenset({"cn", "zh"})
    suffix = LETTER_CN
    patterns = (
        *("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "*dev_cn*.tsv", "*DEV_CN*.tsv"),
        *("*test_cn*.tsv", "*TEST_CN*.tsv"),
    )


def _with_prompt(row: Row) -> Row:
    """Return a row of a table with its question and options as the prompt."""
    if "prompt" in row or not isinstance(row.get("question"), str):
        return row
    options = {letter: str(row[letter]) for letter in choice_parsing.LETTERS if not _is_empty(row.get(letter))}
    return {**row, "prompt": f"{row['question']}\n{choice_parsing.format_options(options)}"}


def _refers(cell: str) -> bool:
    return len(cell) <= _MAX_REFERENCE and cell.isdecimal()


_Rows = tuple[dict[int, dict[str, str]], dict[int, str], dict[str, int]]
"""Rows without their images, and image cells or references, by index; rows of the hub's dataset by name of the image."""


def _read_table(table: parquet.Table) -> _Rows:
    """Read the rows of the hub's dataset, each of which has its image; a question's passes share that of the first."""
    rows: dict[int, dict[str, str]] = {}
    numbers: dict[str, int] = {}

    def add(number: int, row: Mapping[str, Any]) -> None:
        cells = {name.replace("L2-", "l2-"): "" if cell is None else str(cell) for name, cell in row.items()}
        index = int(cells["index"])
        require(index >= 0 and index not in rows, f"{table.paths[0]}: duplicate question {index}, or a negative index")
        require(all(name in cells for name in "AB") and "question" in cells, f"{table.paths[0]}: no question, A and B")
        rows[index] = cells
        numbers.setdefault(str(index % PASS), number)

    table.parse("row of MMBench", add)
    return rows, {index: str(index % PASS) for index in rows}, numbers


def _read(path: Path) -> _Rows:
    """Read the rows of a TSV without their images, and the image cells, by index.

    An image that several passes repeat, as in files of 2023, is kept once.

    Raises:
        BenchmarkError: An index is not a number or a duplicate; a row refers to an image that is missing.
    """
    rows: dict[int, dict[str, str]] = {}
    images: dict[int, str] = {}
    for number, row in enumerate(inputs.read_tsv(path, ("index", "question", "A", "B", "image")), 1):
        try:
            index = int(row["index"])
        except ValueError:
            raise BenchmarkError(f"{path}: row {number}: index {row['index']!r} is not a number") from None
        require(index >= 0, f"{path}: row {number}: index {index} is negative")
        require(index not in rows, f"{path}: duplicate question {index}")
        cell, first = row.pop("image").strip(), images.get(index % PASS)
        require(bool(cell), f"{path}: row {index} has no image")
        rows[index], images[index] = row, first if first is not None and first == cell else cell
    require(bool(rows), f"{path}: no questions")
    for index, cell in images.items():
        holder = images.get(int(cell)) if _refers(cell) else ""
        valid = holder is not None and not _refers(holder)
        require(valid, f"{path}: row {index} refers to row {cell[:_MAX_REFERENCE]}, which has no image")
    return rows, images, {}


def _options_asked(row: Mapping[str, str]) -> dict[str, str]:
    """Return the options that LLaVA shows: from A on, up to the first empty one."""
    options: dict[str, str] = {}
    for letter in _ASKED:
        if _is_empty(row.get(letter)):
            break
        options[letter] = row[letter]
    return options


def _rotate(row: Mapping[str, str], steps: int) -> dict[str, str]:
    """Return a pass of a question: options moved to the left, and the answer with them."""
    letters = list(_options_asked(row))
    moved = {letter: row[letters[(place + steps) % len(letters)]] for place, letter in enumerate(letters)}
    answer = row.get("answer", "")
    if answer in letters:
        moved["answer"] = letters[(letters.index(answer) - steps) % len(letters)]
    return {**row, **moved}


def _undecided(questions: Mapping[str, Question], answers: Texts, letters: Texts) -> list[str]:
    """Return answers that a judge decides: they have no option, and no other pass has missed the question."""
    missed = {
        question.cluster
        for id, question in questions.items()
        if id not in answers or (letters[id] and letters[id] != question.metadata["answer"])
    }
    return [id for id, question in questions.items() if not letters[id] and question.cluster not in missed]


def _groups(firsts: Sequence[Question]) -> list[tuple[str, str]]:
    """Return the columns and values that accuracy is reported for; splits only if there are several."""
    names = {group: sorted({question.metadata[group] for question in firsts} - {""}) for group in _GROUPS}
    return [(group, name) for group in _GROUPS if group != "split" or len(names[group]) > 1 for name in names[group]]


def _metrics(table: CountTable, groups: Sequence[tuple[str, str]]) -> dict[str, Statistic]:
    """Return accuracies in percent, groups by VLMEvalKit's names; there is no mean over groups."""
    metrics = {"accuracy": table.ratio("hits", "questions", 100), "first_pass": table.ratio("first", "questions", 100)}
    for group, name in groups:
        title = f"{_ABILITIES.get(name, name)}/accuracy"
        metrics[title] = table.ratio(f"{group}={name}/hits", f"{group}={name}/questions", 100)
    return metrics

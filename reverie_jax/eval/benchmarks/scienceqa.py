"""ScienceQA: school questions, half of them on a picture (Lu et al., arXiv 2209.09513; asked and scored as LLaVA does).

Files: `problems.json` (problems by id), `pid_splits.json` (ids by split), pictures at `{split}/{id}/image.png`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import choice_parsing, files
from reverie_jax.eval.benchmarks.interface import (
    LETTER,
    OFFICIAL,
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
from reverie_jax.eval.statistics import Statistic

LMMS, KIT = "lmms-eval", "vlmevalkit"
FAILED = "FAILED"
"""LLaVA's word for an answer that no letter is found in, or that is missing."""

_OPTIONS = "ABCDE"
_SAYS = re.compile("The answer is ([A-Z]).")
"""LLaVA's pattern: its last dot stands for any character but a line's end, so that one must follow."""
_SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}
_GROUPS = (*_SUBJECTS.values(), "has_text", "has_image", "no_context", "grade_1_6", "grade_7_12")
"""Of the official `evaluate_acc.py`, in its order."""


def official(answer: str) -> str:
    """LLaVA: a bare letter A to E; else a first letter with a dot and a space; else the only "The answer is X." """
    if len(answer) == 1 and answer in _OPTIONS:
        return answer
    if len(answer) >= 3 and answer[0] in _OPTIONS and answer[1:3] == ". ":
        return answer[0]
    said = _SAYS.findall(answer)
    return said[0] if len(said) == 1 else ""


def lmms(answer: str, letters: str) -> str:
    """lmms-eval: a bare letter, small ones too; else a first capital letter with a dot behind it."""
    answer = answer.strip()
    if len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    return answer[0] if len(answer) >= 2 and answer[0].isupper() and answer[1] == "." else ""


class ScienceQa(Benchmark):
    """See the module's docstring. An item has a picture of its own, so items are the units.

    Args:
        split: of `pid_splits.json`.
    """

    name = "scienceqa"
    expected_new_tokens = 8
    rules = (OFFICIAL, LMMS, KIT)
    max_new_tokens = 1024
    needs = (
        "problems.json and pid_splits.json of the ScienceQA repository (data/scienceqa), and with --images its pictures, "
        "test/{id}/image.png"
    )

    def __init__(self, split: str = "test"):
        self.split = split

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "problems.json", "*/problems.json", "*/*/problems.json", benchmark=self)
        splits_path = path.parent / "pid_splits.json"
        splits = files.read_json(splits_path)
        ids = splits.get(self.split) if isinstance(splits, dict) else None
        if not isinstance(ids, list) or not ids:
            raise BenchmarkError(f"{splits_path}: no list of ids of split {self.split}; {self.name} needs {self.needs}")
        order = [str(id) for id in ids]
        files.check_unique(splits_path, order)
        wanted = set(order)

        def make(row: Mapping[str, Any]) -> Question | None:
            return _question(row, self.split) if row["pid"] in wanted else None

        found = {str(q.id): q for q in files.parse_rows(path, "ScienceQA problem", make) if q is not None}
        missing = next((id for id in order if id not in found), None)
        need(
            missing is None,
            f"{path}: no problem {missing}, which {splits_path.name} has in {self.split}; take both anew",
        )
        questions = [found[id] for id in order]
        protocol = {
            "split": self.split,
            "questions": len(questions),
            "questions/image": sum(question.image is not None for question in questions),
        }
        return BenchmarkData(questions, _pictures(path.parent, data if data.is_dir() else data.parent), protocol)

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        """A missing answer is wrong. The official rule takes it out of IMG accuracy, which goes by the logged prompts."""
        columns = [
            "right",
            "all",
            "img_right",
            "img_all",
            *(f"{g}/{what}" for g in _GROUPS for what in ("right", "all")),
        ]
        table = Table(columns, [question.unit for question in loaded.questions])
        parsed_answers = []
        for question in loaded.questions:
            id, known = str(question.id), question.known
            said = _read(answers.get(id, ""), known["choices"], rule)
            right = float(said == choice_parsing.LETTERS[known["answer"]])
            counted = rule != KIT or question.image is not None
            mark = right if counted else None
            parsed_answers.append(ParsedAnswer(question.id, said, mark, counted and not said, known["subject"]))
            if not counted:
                continue
            table.add(question.unit, {"right": right, "all": 1.0})
            if question.image is not None and (rule != OFFICIAL or id in answers):
                table.add(question.unit, {"img_right": right, "img_all": 1.0})
            for group in known["groups"]:
                table.add(question.unit, {f"{group}/right": right, f"{group}/all": 1.0})
        return Scored(parsed_answers, table.units, table.counts, _metrics(table, loaded, rule), {"parser": rule})

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """LLaVA's result file, which the leaderboard's and the official scripts read."""
        results, outputs, correct = {}, {}, 0
        for question in loaded.questions:
            id, known = str(question.id), question.known
            outputs[id] = answers.get(id, FAILED)
            said = official(outputs[id])
            place = choice_parsing.LETTERS.find(said) if said else -1
            results[id] = place if place < len(known["choices"]) else -1
            correct += results[id] == known["answer"]
        count = len(loaded.questions)
        made = {
            "acc": 100.0 * correct / count if count else 0.0,
            "correct": correct,
            "count": count,
            "results": results,
            "outputs": outputs,
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}_result.json"
        path.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return [path]


def _question(row: Mapping[str, Any], split: str) -> Question:
    """A problem as LLaVA's `llava_test_CQM-A.json` asks it. Raises ValueError, KeyError or TypeError: it is broken."""
    options, answer, hint = row["choices"], row["answer"], row.get("hint") or ""
    if not isinstance(options, list) or not 2 <= len(options) <= len(_OPTIONS):
        raise ValueError(f"choices are {options!r}")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise ValueError(f"answer is {answer!r} of {len(options)} choices")
    lettered = {letter: str(option) for letter, option in zip(_OPTIONS, options, strict=False)}
    context = f"Context: {hint}\n" if hint else ""
    # LLaVA strips what it asks before it puts the suffix behind it.
    body = f"{context}{row['question']}\n{choice_parsing.lines(lettered)}".strip()
    image = f"{row.get('split') or split}/{row['pid']}/{row['image']}" if row.get("image") else None
    known = {
        "choices": lettered,
        "answer": answer,
        "subject": str(row.get("subject") or ""),
        "groups": _groups(row, bool(hint)),
    }
    return Question(row["pid"], image, f"{body}\n{LETTER}", row["pid"], known)


def _groups(row: Mapping[str, Any], hint: bool) -> list[str]:
    """Those of `_GROUPS` that a problem is in."""
    image, subject = bool(row.get("image")), row.get("subject")
    grade = re.fullmatch(r"grade(\d+)", str(row.get("grade")))
    year = int(grade[1]) if grade else 0
    there = {
        _SUBJECTS.get(str(subject)): True,
        "has_text": hint,
        "has_image": image,
        "no_context": not hint and not image,
        "grade_1_6": 1 <= year <= 6,
        "grade_7_12": 7 <= year <= 12,
    }
    return [group for group in _GROUPS if there.get(group)]


def _pictures(*homes: Path) -> Callable[[str], bytes]:
    """Pictures by `{split}/{id}/{name}` below a folder or its `images`; the split's folder may be left out."""
    folders = [folder for home in dict.fromkeys(homes) for folder in (home / "images", home)]
    whole = files.image_reader(*folders)

    def picture(name: str) -> bytes:
        short = name.partition("/")[2]
        bare = not any((folder / name).is_file() for folder in folders)
        return whole(short if bare and any((folder / short).is_file() for folder in folders) else name)

    return picture


def _read(answer: str, options: Mapping[str, str], rule: str) -> str:
    if rule == OFFICIAL:
        return official(answer)
    return lmms(answer, "".join(options)) if rule == LMMS else choice_parsing.vlmevalkit(answer, options)


def _metrics(table: Table, loaded: BenchmarkData, rule: str) -> dict[str, Statistic]:
    """In percent. VLMEvalKit's files have the items with a picture alone, so there is no accuracy of all items."""
    found = {"img_accuracy": share(table["img_right"], table["img_all"], scale=100.0)}
    if rule != KIT:
        found["accuracy"] = share(table["right"], table["all"], scale=100.0)
    there = {
        group for q in loaded.questions if rule != KIT or q.image is not None for group in q.known["groups"]
    }  # a group of nothing has no accuracy
    for group in _GROUPS:
        if group in there:
            found[f"{group}/accuracy"] = share(table[f"{group}/right"], table[f"{group}/all"], scale=100.0)
    return found

"""ScienceQA: school questions, half of them about an image (Lu et al., arXiv 2209.09513; asked and scored as LLaVA does).

Files: `problems.json` (problems by id), `pid_splits.json` (ids by split), images at `{split}/{id}/image.png`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import choice_parsing, inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    LETTER,
    LMMS_EVAL,
    OFFICIAL,
    VLMEVALKIT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    HubDataset,
    Question,
    Row,
    Texts,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic

FAILED = "FAILED"
"""LLaVA's output for an answer without a letter, or a missing answer."""

_OPTIONS = "ABCDE"
_ANSWER_IS = re.compile("The answer is ([A-Z]).")
"""LLaVA's pattern; its last dot matches any character except a line's end, so one must follow."""
_SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}
_GROUPS = (*_SUBJECTS.values(), "has_text", "has_image", "no_context", "grade_1_6", "grade_7_12")
"""Groups of the official `evaluate_acc.py`, in its order."""


def official(answer: str) -> str:
    """Parse as LLaVA: a letter A to E alone, or before a dot and a space, or else in the only "The answer is X."."""
    if len(answer) == 1 and answer in _OPTIONS:
        return answer
    if len(answer) >= 3 and answer[0] in _OPTIONS and answer[1:3] == ". ":
        return answer[0]
    letters = _ANSWER_IS.findall(answer)
    return letters[0] if len(letters) == 1 else ""


def lmms_eval(answer: str, letters: str) -> str:
    """Parse as lmms-eval: a letter alone, in either case, or else a capital letter before a dot."""
    answer = answer.strip()
    if len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    return answer[0] if len(answer) >= 2 and answer[0].isupper() and answer[1] == "." else ""


class ScienceQa(Benchmark):
    """ScienceQA, see the module's docstring. Each question has an image of its own, so clusters are questions.

    Args:
        split: name of a list in `pid_splits.json`.
    """

    name = "scienceqa"
    scale = "percent"
    published_items = 4241
    expected_new_tokens = 8
    rules = (OFFICIAL, LMMS_EVAL, VLMEVALKIT)
    max_new_tokens = 1024
    required_files = (
        "problems.json and pid_splits.json of the ScienceQA repository (data/scienceqa), and with --images its images, "
        "test/{id}/image.png"
    )
    metric = "accuracy on questions with an image"
    hub = HubDataset(
        *("lmms-lab-encoder/ScienceQA", ("ScienceQA-FULL/test-*.parquet",), 134),
        "69dd4d6b67373d38f96a5badd5d24d0eb5bcdc50",
    )

    def __init__(self, split: str = "test"):
        self.split = split

    def load(self, data: Path) -> BenchmarkData:
        """Read the problems of the split; see `Benchmark.load`."""
        if table := parquet.find_table(data, *self.hub.files):
            questions, read_image = _read_table(table)
            return BenchmarkData(questions, read_image, {**self._counts(questions), "ids": "positions in the split"})
        path = inputs.find_file(data, "problems.json", "*/problems.json", "*/*/problems.json", benchmark=self)
        splits_path = path.parent / "pid_splits.json"
        splits = inputs.read_json(splits_path)
        ids = splits.get(self.split) if isinstance(splits, dict) else None
        if not isinstance(ids, list) or not ids:
            raise BenchmarkError(
                f"{splits_path}: ids of split {self.split} are missing; {self.name} needs {self.required_files}"
            )
        order = [str(id) for id in ids]
        inputs.check_unique(splits_path, order)
        wanted = set(order)

        def parse(row: Mapping[str, Any]) -> Question | None:
            return _parse_problem(row, self.split) if row["pid"] in wanted else None

        problems = {str(q.id): q for q in inputs.parse_rows(path, "ScienceQA problem", parse) if q is not None}
        missing = next((id for id in order if id not in problems), None)
        listed = f"which {splits_path.name} lists in {self.split}; download both files again"
        require(missing is None, f"{path}: no problem {missing}, {listed}")
        questions = [problems[id] for id in order]
        read_image = _image_reader(path.parent, data if data.is_dir() else data.parent)
        return BenchmarkData(questions, read_image, self._counts(questions))

    def _counts(self, questions: Sequence[Question]) -> dict[str, Any]:
        with_image = sum(question.image is not None for question in questions)
        return {"split": self.split, "questions": len(questions), "questions/image": with_image}

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score letters; a missing answer is wrong.

        The official rule leaves a missing answer out of IMG accuracy, which goes by the logged prompts.
        """
        groups = [f"{group}/{cell}" for group in _GROUPS for cell in ("right", "all")]
        table = CountTable(["right", "all", "img_right", "img_all", *groups], loaded.clusters)
        parsed_answers = []
        for question in loaded.questions:
            id, metadata = str(question.id), question.metadata
            parsed = _parse_answer(answers.get(id, ""), metadata["choices"], rule)
            right = float(parsed == choice_parsing.LETTERS[metadata["answer"]])
            if rule == VLMEVALKIT and question.image is None:
                parsed_answers.append(ParsedAnswer(question.id, parsed, None, False, metadata["subject"]))
                continue
            parsed_answers.append(ParsedAnswer(question.id, parsed, right, not parsed, metadata["subject"]))
            table.add(question.cluster, {"right": right, "all": 1.0})
            if question.image is not None and (rule != OFFICIAL or id in answers):
                table.add(question.cluster, {"img_right": right, "img_all": 1.0})
            for group in metadata["groups"]:
                table.add(question.cluster, {f"{group}/right": right, f"{group}/all": 1.0})
        return table.result(parsed_answers, _metrics(table, loaded, rule), {"parser": rule})

    def part(self, question: Question) -> str:
        """Return whether the question has an image."""
        return "questions without an image" if question.image is None else "questions with an image"

    def own_rows(self, path: Path) -> Iterable[Row] | None:
        """Return the answers in LLaVA's result file; its "FAILED" is a missing answer."""
        try:
            content = inputs.read_json(path) if path.suffix.lower() == ".json" else None
        except BenchmarkError:
            return None
        outputs = content.get("outputs") if isinstance(content, dict) and "results" in content else None
        if not isinstance(outputs, dict):
            return None
        return [{"question_id": id, "text": text} for id, text in outputs.items() if text != FAILED]

    def same_prompt(self, prompt: str, question: Question) -> bool:
        """Compare the question, and the order of the options: letters depend on it."""
        return super().same_prompt(prompt, question) and choice_parsing.same_options(
            prompt, question.metadata["choices"]
        )

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write LLaVA's result file, which the leaderboard's and the official scripts read."""
        results, outputs, correct = {}, {}, 0
        for question in loaded.questions:
            id, metadata = str(question.id), question.metadata
            outputs[id] = answers.get(id, FAILED)
            letter = official(outputs[id])
            position = choice_parsing.LETTERS.find(letter) if letter else -1
            results[id] = position if position < len(metadata["choices"]) else -1
            correct += results[id] == metadata["answer"]
        count = len(loaded.questions)
        summary = {"acc": 100.0 * correct / count if count else 0.0, "correct": correct, "count": count}
        path = out / f"{self.name}_result.json"
        return [inputs.write_json(path, {**summary, "results": results, "outputs": outputs}, indent=2)]


def _read_table(table: parquet.Table) -> tuple[list[Question], Callable[[str], bytes]]:
    """Return the test split of the hub's dataset, which has the official order and no ids, and a reader of its images."""
    present, numbers = table.have_images(), dict[str, int]()

    def parse(number: int, row: Mapping[str, Any]) -> Question:
        image = "image.png" if present[number] else None
        question = _parse_problem({**row, "pid": str(number), "image": image, "split": "test"}, "test")
        if question.image is not None:
            numbers[question.image] = number
        return question

    return table.parse("ScienceQA problem", parse), table.reader(numbers)


def _parse_problem(row: Mapping[str, Any], split: str) -> Question:
    """Return a problem as LLaVA's `llava_test_CQM-A.json` asks it. Raises ValueError, KeyError or TypeError if invalid."""
    options, answer, hint = row["choices"], row["answer"], row.get("hint") or ""
    if not isinstance(options, list) or not 2 <= len(options) <= len(_OPTIONS):
        raise ValueError(f"choices are {options!r}")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise ValueError(f"answer is {answer!r} of {len(options)} choices")
    lettered = {letter: str(option) for letter, option in zip(_OPTIONS, options, strict=False)}
    context = f"Context: {hint}\n" if hint else ""
    # LLaVA strips the question before it appends the suffix.
    body = f"{context}{row['question']}\n{choice_parsing.format_options(lettered)}".strip()
    image = f"{row.get('split') or split}/{row['pid']}/{row['image']}" if row.get("image") else None
    metadata = {
        "question": str(row["question"]),
        "choices": lettered,
        "answer": answer,
        "subject": str(row.get("subject") or ""),
        "groups": _groups(row, bool(hint)),
    }
    return Question(row["pid"], image, f"{body}\n{LETTER}", row["pid"], metadata)


def _groups(row: Mapping[str, Any], hint: bool) -> list[str]:
    """Return the groups of `_GROUPS` that a problem is in."""
    image, subject = bool(row.get("image")), row.get("subject")
    grade = re.fullmatch(r"grade(\d+)", str(row.get("grade")))
    year = int(grade[1]) if grade else 0
    in_group = {
        _SUBJECTS.get(str(subject)): True,
        "has_text": hint,
        "has_image": image,
        "no_context": not hint and not image,
        "grade_1_6": 1 <= year <= 6,
        "grade_7_12": 7 <= year <= 12,
    }
    return [group for group in _GROUPS if in_group.get(group)]


def _image_reader(*roots: Path) -> Callable[[str], bytes]:
    """Return a reader of `{split}/{id}/{name}`, with or without the split, below a folder or its `images`."""
    read = inputs.image_reader(*(folder for root in dict.fromkeys(roots) for folder in (root / "images", root)))
    return inputs.either(read, lambda name: read(name.partition("/")[2]))


def _parse_answer(answer: str, options: choice_parsing.Options, rule: str) -> str:
    if rule == OFFICIAL:
        return official(answer)
    return lmms_eval(answer, "".join(options)) if rule == LMMS_EVAL else choice_parsing.vlmevalkit(answer, options)


def _metrics(table: CountTable, loaded: BenchmarkData, rule: str) -> dict[str, Statistic]:
    """Return metrics in percent. VLMEvalKit's files have only questions with an image, so it has no accuracy of all."""
    metrics = {"img_accuracy": table.ratio("img_right", "img_all", 100)}
    if rule != VLMEVALKIT:
        metrics["accuracy"] = table.ratio("right", "all", 100)
    scored = [question for question in loaded.questions if rule != VLMEVALKIT or question.image is not None]
    present = {group for question in scored for group in question.metadata["groups"]}
    for group in _GROUPS:
        if group in present:
            metrics[f"{group}/accuracy"] = table.ratio(f"{group}/right", f"{group}/all", 100)
    return metrics

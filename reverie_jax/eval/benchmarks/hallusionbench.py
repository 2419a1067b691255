"""HallusionBench: language hallucination and visual illusion (Guan et al., arXiv 2310.14566; scored as its repository does).

File: `HallusionBench.json`, a list of rows: `category` (VD needs its figure, VS can be asked without), `subcategory`,
`visual_input` (0 no figure, 1 the original, 2 an edited one), `set_id`, `figure_id`, `question_id`, `question`, `gt_answer`
(0 or 1), `gt_answer_details`, `filename`. All values are text.

The official number needs a judge. Rule "yes-no" is an offline stand-in for it, and no published number; "vlmevalkit" is what
open leaderboards publish.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reverie_jax.eval.benchmarks import files
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
from reverie_jax.eval.benchmarks.yes_no import vlmevalkit_yes_no
from reverie_jax.eval.statistics import Statistic

YES_NO = "yes-no"
KIT = "vlmevalkit"
SAME = "#same"
"""Behind a question's id: the judge's second reply, whether the answer agrees with that about the first figure."""

WRONG, RIGHT, UNCLEAR = 0, 1, 2
"""The official codes of an answer."""
_WORDS = ("incorrect", "correct", "unclear")

_PARTS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")


def code(reply: str) -> int:
    """A judge's reply: "incorrect" in it, else "correct" in it, else unclear. "Not correct" is right by this rule."""
    text = reply.lower()
    return WRONG if "incorrect" in text else RIGHT if "correct" in text else UNCLEAR


def is_right(known: Mapping[str, Any], said: int) -> bool:
    """Not to know is right where the question is asked without its figure."""
    return said == RIGHT or (said == UNCLEAR and known["category"] == "VS" and known["figure_id"] == "0")


def blame(known: Mapping[str, Any], said: int, first: int, same: bool) -> str:
    """What the paper's decision tree takes an error for: language ("LH"), vision ("VI") or both ("Mixed"); "" for no error.

    Args:
        said: the answer's code.
        first: the code of the answer about figure 0 of the same question.
        same: whether the two answers agree.
    """
    if is_right(known, said):
        return ""
    visual = known["category"] == "VD"
    if known["figure_id"] == "0":
        return "VI" if visual else "LH"
    if said == UNCLEAR:
        return "Mixed" if not visual and first == WRONG else "VI"
    if not _compared(known, said, first):
        return "VI"
    if visual:
        return "Mixed" if same else "VI"
    if first == WRONG:
        return "LH" if same else "Mixed"
    return "LH" if same else "VI"


def _compared(known: Mapping[str, Any], said: int, first: int) -> bool:
    """Whether `blame` depends on `same`."""
    if said != WRONG or known["figure_id"] == "0":
        return False
    if known["category"] == "VD":
        return first == RIGHT
    return first == WRONG or (first == RIGHT and known["visual_input"] == "2")


class HallusionBench(Benchmark):
    """See the module's docstring. Ids are category_subcategory_visual_input_set_figure_question, as VLMEvalKit has them."""

    name = "hallusionbench"
    rules = (OFFICIAL, KIT, YES_NO)
    judged = frozenset((OFFICIAL,))
    needs = "HallusionBench.json of the HallusionBench repository, and with --images its folder hallusion_bench"

    def load(self, data: Path) -> BenchmarkData:
        path = files.find(data, "HallusionBench.json", "HallusionBench*.json", benchmark=self)

        def make(row: Mapping[str, Any]) -> Question:
            known: dict[str, Any] = {part: str(row[part]) for part in _PARTS}
            answer = str(row["gt_answer"])
            if known["category"] not in ("VD", "VS") or known["visual_input"] not in ("0", "1", "2"):
                raise ValueError(f"category {known['category']}, visual_input {known['visual_input']}")
            if answer not in ("0", "1"):
                raise ValueError(f"gt_answer {answer}")
            known |= {"yes": answer == "1", "details": str(row["gt_answer_details"]), "row": dict(row)}
            # Every group of either rule lies in one of these: VLMEvalKit's run across VD and VS.
            unit = f"{known['subcategory']}/{known['set_id']}"
            image = None if known["visual_input"] == "0" else _image(row)
            return Question(_id(row), image, str(row["question"]), unit, known)

        questions = files.parse_rows(path, "HallusionBench question", make)
        files.check_unique(path, [question.id for question in questions])
        with_image = sum(question.image is not None for question in questions)
        protocol = {"questions": len(questions), "with a figure": with_image, "without": len(questions) - with_image}
        folder = path.parent
        return BenchmarkData(
            questions, files.image_reader(folder, folder / "hallusion_bench", folder / "images"), protocol
        )

    def key(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """The benchmark's own result file has its rows, in which `question_id` alone names nothing."""
        return _id(row) if all(part in row for part in _PARTS) else super().key(row, loaded)

    def text(self, row: Mapping[str, Any]) -> Any:
        return row.get("model_prediction", super().text(row))

    def requests(
        self, loaded: BenchmarkData, answers: Mapping[str, str], rule: str, prompts: Mapping[str, str]
    ) -> list[JudgeRequest]:
        """One for each answer, and one more where there is an answer about figure 0 to compare it with."""
        if rule not in self.judged:
            return []
        first, found = _first(loaded.questions), []
        for question in loaded.questions:
            id, known = str(question.id), question.known
            if id not in answers:
                continue
            values = {"question": question.text, "reference": known["details"], "answer": answers[id]}
            found.append(JudgeRequest(id, _fill(prompts, "hallusionbench", values)))
            original = first.get(_group(known))
            if original is not None and original in answers and original != id:
                values = {"answer": answers[id], "original": answers[original]}
                found.append(JudgeRequest(id + SAME, _fill(prompts, "hallusionbench_same", values)))
        return found

    def score(
        self,
        loaded: BenchmarkData,
        answers: Mapping[str, str],
        rule: str = OFFICIAL,
        replies: Mapping[str, str] | None = None,
    ) -> Scored:
        if rule == KIT:
            return _kit(loaded.questions, answers)
        codes = _read(loaded.questions, answers) if rule == YES_NO else _judge(loaded.questions, answers, replies or {})
        blames = _blames(loaded.questions, answers, codes, replies or {}) if rule == OFFICIAL else None
        parsed_answers = []
        for question in loaded.questions:
            id, known = str(question.id), question.known
            said = (
                vlmevalkit_yes_no(answers.get(id, "")) if rule == YES_NO else _WORDS[codes[id]] if id in answers else ""
            )
            unparsed = id not in answers or codes[id] == UNCLEAR
            parsed_answers.append(
                ParsedAnswer(question.id, said, float(is_right(known, codes[id])), unparsed, _category(known))
            )
        protocol: dict[str, Any] = {"parser": "judge" if rule == OFFICIAL else rule}
        if rule == YES_NO:
            protocol["stand-in"] = "yes or no as a word, against the label: offline, and not the judged number"
        elif blames is None:
            protocol["LH, VI and Mixed"] = "left out: no replies on whether answers agree, or no first figures"
        table, metrics = _official(loaded.questions, codes, blames)
        return Scored(parsed_answers, table.units, table.counts, metrics, protocol)

    def export(self, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> list[Path]:
        """The benchmark's own result file: its rows, and the answers as `model_prediction`."""
        rows = [{**q.known["row"], "model_prediction": answers.get(str(q.id), "")} for q in loaded.questions]
        out.mkdir(parents=True, exist_ok=True)
        path = out / "HallusionBench_result.json"
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        return [path]


def _id(row: Mapping[str, Any]) -> str:
    return "_".join(str(row[part]) for part in _PARTS)


def _image(row: Mapping[str, Any]) -> str:
    """Below the folder hallusion_bench, whose name some versions of the file have in front."""
    name = row.get("filename") or "{category}/{subcategory}/{set_id}_{figure_id}.png".format(**row)
    return name.removeprefix("./").removeprefix("hallusion_bench/")


def _category(known: Mapping[str, Any]) -> str:
    return f"{known['category']}/{known['subcategory']}"


def _group(known: Mapping[str, Any]) -> tuple[str, ...]:
    """One question, whatever figure it is asked about."""
    return known["category"], known["subcategory"], known["set_id"], known["question_id"]


def _first(questions: Iterable[Question]) -> dict[tuple[str, ...], str]:
    """By question: the id with figure 0."""
    return {_group(q.known): str(q.id) for q in questions if q.known["figure_id"] == "0"}


def _fill(prompts: Mapping[str, str], name: str, values: Mapping[str, str]) -> str:
    try:
        return prompts[name].format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise BenchmarkError(
            f"judge prompt {name}.txt: missing or cannot be filled in ({error!r}); it may have "
            f"{', '.join(f'{{{value}}}' for value in values)}"
        ) from None


def _read(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, int]:
    """Codes without a judge: yes or no against the label; a missing answer is wrong."""
    codes = {}
    for question in questions:
        id = str(question.id)
        said = vlmevalkit_yes_no(answers.get(id, ""))
        codes[id] = (RIGHT if (said == "yes") == question.known["yes"] else WRONG) if said else UNCLEAR
        if id not in answers:
            codes[id] = WRONG
    return codes


def _judge(questions: Sequence[Question], answers: Mapping[str, str], replies: Mapping[str, str]) -> dict[str, int]:
    """Codes by a judge. A missing answer is wrong: nobody was asked about it, and "unclear" would be right at times."""
    asked = [str(question.id) for question in questions if str(question.id) in answers]
    _complete(asked, replies)
    return {str(q.id): code(replies[str(q.id)]) if str(q.id) in answers else WRONG for q in questions}


def _complete(wanted: Sequence[str], replies: Mapping[str, str]) -> None:
    missing = [id for id in wanted if id not in replies]
    if missing:
        raise BenchmarkError(
            f"hallusionbench: {len(missing)} of {len(wanted)} replies of the judge are missing, the first is {missing[0]}; "
            f"ask the judge for them, or score offline with rule {YES_NO} or {KIT}"
        )


def _blames(
    questions: Sequence[Question], answers: Mapping[str, str], codes: Mapping[str, int], replies: Mapping[str, str]
) -> dict[str, str] | None:
    """What each error is taken for. None where no reply says whether answers agree, or a question has no figure 0."""
    first = _first(questions)
    if not any(id.endswith(SAME) for id in replies) or any(_group(q.known) not in first for q in questions):
        return None
    wanted, found = [], {}
    for question in questions:
        id, original = str(question.id), first[_group(question.known)]
        said, before = codes[id], codes[original]
        if id in answers and original in answers and _compared(question.known, said, before):
            wanted.append(id + SAME)
        found[id] = blame(question.known, said, before, "same" in replies.get(id + SAME, "").lower())
    _complete(wanted, replies)
    return found


_CELLS = (
    "rows", "right", "yes", "said yes", "wrong", "wrong no",
    "questions", "question right", "easy", "easy right", "hard", "hard right",
    "figures", "figure right", "figure wrong", "LH", "VI", "Mixed",
)  # fmt: skip
"""Of each category: rows; groups of one question over its figures, all, without and with edits; groups of one figure."""


def _official(
    questions: Sequence[Question], codes: Mapping[str, int], blames: Mapping[str, str] | None
) -> tuple[Table, dict[str, Statistic]]:
    categories = list(dict.fromkeys(_category(question.known) for question in questions))
    table = Table(
        [f"{category}/{cell}" for category in categories for cell in _CELLS],
        list(dict.fromkeys(question.unit for question in questions)),
    )
    groups: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for question in questions:
        id, known, category = str(question.id), question.known, _category(question.known)
        right, yes = is_right(known, codes[id]), known["yes"]
        amounts: dict[str, float] = {
            "rows": 1,
            "right": right,
            "yes": yes,
            # As the official script has it: who is right said the label, who is wrong the other.
            "said yes": right == yes,
            "wrong": not right,
            "wrong no": not right and not yes,
        }
        if blames is not None and blames[id]:
            amounts[blames[id]] = 1
        table.add(question.unit, {f"{category}/{cell}": float(amount) for cell, amount in amounts.items()})
        kinds = [
            ("question", known["question_id"]),
            ("hard" if known["visual_input"] == "2" else "easy", known["question_id"]),
        ]
        if not (known["category"] == "VS" and known["figure_id"] == "0"):
            kinds.append(("figure", known["figure_id"]))
        for kind, number in kinds:
            groups[question.unit, category, kind, number].append(right)
    for (unit, category, kind, _), rights in groups.items():
        whole = kind if kind in ("easy", "hard") else f"{kind}s"
        table.add(unit, {f"{category}/{whole}": 1, f"{category}/{kind} right": float(all(rights))})
        if kind == "figure":
            table.add(unit, {f"{category}/figure wrong": float(not any(rights))})

    metrics = _metrics(table, categories, "", blames is not None)
    for prefix in dict.fromkeys(category.split("/")[0] for category in categories):
        inside = [category for category in categories if category.startswith(f"{prefix}/")]
        metrics |= _metrics(table, inside, f"{prefix}/", blames is not None)
    for category in categories:
        few = _metrics(table, [category], f"{category}/", False)
        metrics |= {name: few[name] for name in (f"{category}/{short}" for short in ("aAcc", "qAcc", "fAcc"))}
    return table, metrics


def _metrics(table: Table, categories: Sequence[str], prefix: str, blamed: bool) -> dict[str, Statistic]:
    """Of the categories together, in percent; bias towards yes in fractions.

    `diff` is the rate of yes less that of the labels, `fp` the share of no among the labels of what is wrong.
    """

    def of(over: str, *under: str, scale: float = 100.0) -> Statistic:
        columns = [[table[f"{c}/{cell}"] for c in categories for cell in cells] for cells in ((over,), under)]
        return share(columns[0], columns[1], scale=scale)

    said, label = of("said yes", "rows", scale=1.0), of("yes", "rows", scale=1.0)
    right, wrong = of("figure right", "figures"), of("figure wrong", "figures")
    any_figure = of("figures", "figures")

    def difference(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        return np.asarray(said(sums) - label(sums))

    def inconsistent(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        return np.asarray(any_figure(sums) - right(sums) - wrong(sums))

    found: dict[str, Statistic] = {
        "aAcc": of("right", "rows"),
        "qAcc": of("question right", "questions"),
        "fAcc": right,
        "easy": of("easy right", "easy"),
        "hard": of("hard right", "hard"),
        "diff": difference,
        "fp": of("wrong no", "wrong", scale=1.0),
        "figures inconsistent": inconsistent,
        "figures wrong": wrong,
    }
    if blamed:
        found |= {kind: of(kind, "LH", "VI", "Mixed") for kind in ("LH", "VI", "Mixed")}
    return {prefix + name: metric for name, metric in found.items()}


_KIT_CELLS = ("rows", "right", "figures", "figure right", "questions", "question right")


def _kit(questions: Sequence[Question], answers: Mapping[str, str]) -> Scored:
    """VLMEvalKit: rows with a figure; groups by subcategory and set alone, so that VD's and VS's ocr run together."""
    parsed_answers, kept = [], []
    for question in questions:
        category = _category(question.known)
        if question.image is None:
            parsed_answers.append(ParsedAnswer(question.id, "", None, False, category))
            continue
        said = vlmevalkit_yes_no(answers.get(str(question.id), ""))
        right = bool(said) and (said == "yes") == question.known["yes"]
        parsed_answers.append(ParsedAnswer(question.id, said, float(right), not said, category))
        kept.append((question.unit, question.known, right))

    splits = ["", *dict.fromkeys(f"{known['category']}/" for _, known, _ in kept)]
    splits += dict.fromkeys(f"{known['subcategory']}/" for _, known, _ in kept)
    units = list(dict.fromkeys(question.unit for question in questions))
    table = Table([split + cell for split in splits for cell in _KIT_CELLS], units)
    groups: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for unit, known, right in kept:
        for split in ("", f"{known['category']}/", f"{known['subcategory']}/"):
            table.add(unit, {f"{split}rows": 1, f"{split}right": float(right)})
            for kind in ("figure", "question"):
                groups[unit, split, kind, known[f"{kind}_id"]].append(right)
    for (unit, split, kind, _), rights in groups.items():
        table.add(unit, {f"{split}{kind}s": 1, f"{split}{kind} right": float(all(rights))})

    metrics: dict[str, Statistic] = {}
    for split in splits:
        three = {
            "aAcc": share(table[f"{split}right"], table[f"{split}rows"], scale=100.0),
            "fAcc": share(table[f"{split}figure right"], table[f"{split}figures"], scale=100.0),
            "qAcc": share(table[f"{split}question right"], table[f"{split}questions"], scale=100.0),
        }
        if not split:
            metrics["Overall"] = _mean(list(three.values()))
        metrics |= {split + name: metric for name, metric in three.items()}
    protocol = {"parser": KIT, "questions with a figure, which alone count": len(kept)}
    return Scored(parsed_answers, table.units, table.counts, metrics, protocol)


def _mean(statistics: Sequence[Statistic]) -> Statistic:
    def statistic(sums: Float[np.ndarray, "... K"]) -> Float[np.ndarray, "..."]:
        return np.asarray(np.mean([part(sums) for part in statistics], axis=0))

    return statistic

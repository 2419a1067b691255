"""HallusionBench: language hallucination and visual illusion (Guan et al., arXiv 2310.14566; scored as its repository does).

File: `HallusionBench.json`, a list of rows: `category` (VD needs its figure, VS can be asked without), `subcategory`,
`visual_input` (0 no figure, 1 the original, 2 an edited one), `set_id`, `figure_id`, `question_id`, `question`, `gt_answer`
(0 or 1), `gt_answer_details`, `filename`. All values are text.

The official number needs a judge. Rule "yes-no" is an offline stand-in for it, and not a published number; "vlmevalkit" is
what open leaderboards publish.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.eval.benchmarks import inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    OFFICIAL,
    VLMEVALKIT,
    BenchmarkData,
    HubDataset,
    JudgeRequest,
    Question,
    Texts,
)
from reverie_jax.eval.benchmarks.judged import JudgedBenchmark, fill, require_replies
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic, mean
from reverie_jax.eval.benchmarks.yes_no import vlmevalkit_yes_no

YES_NO = "yes-no"
SAME = "#same"
"""Suffix of the judge's second reply: whether the answer agrees with the answer about the first figure."""

WRONG, RIGHT, UNCLEAR = 0, 1, 2
"""The official codes of an answer."""
_NAMES = ("incorrect", "correct", "unclear")

_PARTS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")


def parse_code(reply: str) -> int:
    """Return the code of a judge's reply: "incorrect", else "correct", else unclear; "not correct" is right by this rule."""
    text = reply.lower()
    return WRONG if "incorrect" in text else RIGHT if "correct" in text else UNCLEAR


def is_right(metadata: Mapping[str, Any], code: int) -> bool:
    """Return whether a code is right; unclear is right where the question is asked without its figure."""
    return code == RIGHT or (code == UNCLEAR and metadata["category"] == "VS" and metadata["figure_id"] == "0")


def error_cause(metadata: Mapping[str, Any], code: int, first: int, same: bool) -> str:
    """Return the cause of an error by the paper's decision tree: "LH" (language), "VI" (vision) or "Mixed"; "" for no error.

    Args:
        metadata: of the question.
        code: of the answer.
        first: code of the answer about figure 0 of the same question.
        same: whether the two answers agree.
    """
    if is_right(metadata, code):
        return ""
    visual = metadata["category"] == "VD"
    if metadata["figure_id"] == "0":
        return "VI" if visual else "LH"
    if code == UNCLEAR:
        return "Mixed" if not visual and first == WRONG else "VI"
    if not _depends_on_same(metadata, code, first):
        return "VI"
    if visual:
        return "Mixed" if same else "VI"
    if first == WRONG:
        return "LH" if same else "Mixed"
    return "LH" if same else "VI"


def _depends_on_same(metadata: Mapping[str, Any], code: int, first: int) -> bool:
    """Return whether `error_cause` depends on `same`."""
    if code != WRONG or metadata["figure_id"] == "0":
        return False
    if metadata["category"] == "VD":
        return first == RIGHT
    return first == WRONG or (first == RIGHT and metadata["visual_input"] == "2")


class HallusionBench(JudgedBenchmark):
    """HallusionBench, see the module's docstring.

    Ids are category_subcategory_visual_input_set_figure_question, as VLMEvalKit has them.
    """

    name = "hallusionbench"
    published_items = 1129
    rules = (OFFICIAL, VLMEVALKIT, YES_NO)
    thoughtless_rules = frozenset({YES_NO})
    scale = "percent; diff and fp from 0 to 1"
    required_files = (
        "HallusionBench.json of the HallusionBench repository, and with --images its folder hallusion_bench"
    )
    metric = "aAcc; qAcc and fAcc"
    hub = HubDataset(
        "lmms-lab-encoder/HallusionBench",
        ("data/image-*.parquet", "data/non_image-*.parquet"),
        *(147, "ea5fd49f1b711d12cc8b0ec75be0c0593e17befe"),
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read `HallusionBench.json`; see `Benchmark.load`."""
        table = parquet.find_table(data, *self.hub.files)
        if table is None:
            path = inputs.find_file(data, "HallusionBench.json", "HallusionBench*.json", benchmark=self)
        else:
            path = table.paths[0]
        numbers: dict[str, int] = {}

        def parse_numbered(number: int, row: Mapping[str, Any]) -> Question:
            question = parse(row)
            if question.image is not None:
                numbers.setdefault(question.image, number)
            return question

        def parse(row: Mapping[str, Any]) -> Question:
            metadata: dict[str, Any] = {part: str(row[part]) for part in _PARTS}
            answer = str(row["gt_answer"])
            if metadata["category"] not in ("VD", "VS") or metadata["visual_input"] not in ("0", "1", "2"):
                raise ValueError(f"category {metadata['category']}, visual_input {metadata['visual_input']}")
            if answer not in ("0", "1"):
                raise ValueError(f"gt_answer {answer}")
            metadata |= {"yes": answer == "1", "details": str(row["gt_answer_details"]), "row": dict(row)}
            # Every group of either rule lies in one of these: VLMEvalKit's run across VD and VS.
            cluster = f"{metadata['subcategory']}/{metadata['set_id']}"
            image = None if metadata["visual_input"] == "0" else _image(row)
            return Question(_id(row), image, str(row["question"]), cluster, metadata)

        if table is None:
            questions, folder = inputs.parse_rows(path, "HallusionBench question", parse), path.parent
            read_image = inputs.image_reader(folder, folder / "hallusion_bench", folder / "images")
        else:
            questions = table.parse("HallusionBench question", parse_numbered)
            read_image = table.reader(numbers)
        inputs.check_unique(path, [question.id for question in questions])
        with_image = sum(question.image is not None for question in questions)
        protocol = {"questions": len(questions), "with a figure": with_image, "without": len(questions) - with_image}
        return BenchmarkData(questions, read_image, protocol, {"first": _first_ids(questions)})

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows of the benchmark's result file by several columns: its `question_id` alone is not unique."""
        if all(part in row for part in _PARTS):
            return _id(row)
        return super().match_question(
            row if row.get("question_id") is not None else {"question_id": row.get("index")}, loaded
        )

    def part(self, question: Question) -> str:
        """Return whether the question has a figure."""
        return "questions without a figure" if question.image is None else "questions with a figure"

    def answer_text(self, row: Mapping[str, Any]) -> Any:
        """Return `model_prediction` of the benchmark's result file, or the answer of another form."""
        return row.get("model_prediction", super().answer_text(row))

    def question_requests(
        self, loaded: BenchmarkData, question: Question, answers: Texts, prompts: Texts
    ) -> Iterator[JudgeRequest]:
        """Yield one request, and a second one where there is an answer about figure 0 to compare with."""
        id, metadata = str(question.id), question.metadata
        fields = {"question": question.text, "reference": metadata["details"], "answer": answers[id]}
        yield JudgeRequest(id, fill(prompts, "hallusionbench", **fields))
        original = loaded.tables["first"].get(_group(metadata))
        if original is not None and original in answers and original != id:
            fields = {"answer": answers[id], "original": answers[original]}
            yield JudgeRequest(id + SAME, fill(prompts, "hallusionbench_same", **fields))

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score by the judge's codes, or without a judge by yes and no; a missing answer is wrong."""
        if rule == VLMEVALKIT:
            return _score_vlmevalkit(loaded.questions, answers)
        if rule == YES_NO:
            codes, causes = _yes_no_codes(loaded.questions, answers), None
        else:
            replies = self.replies_to(loaded, answers, replies)
            # UNCLEAR would be right for some questions, so a missing answer is WRONG.
            codes = {str(q.id): WRONG for q in loaded.questions}
            codes |= {str(q.id): parse_code(replies[str(q.id)]) for q, _ in loaded.answered(answers)}
            causes = self._error_causes(loaded.questions, answers, codes, replies)
        parsed_answers = []
        for question in loaded.questions:
            id, metadata = str(question.id), question.metadata
            text = (
                vlmevalkit_yes_no(answers.get(id, "")) if rule == YES_NO else _NAMES[codes[id]] if id in answers else ""
            )
            unparsed = id not in answers or codes[id] == UNCLEAR
            right = float(is_right(metadata, codes[id]))
            parsed_answers.append(ParsedAnswer(question.id, text, right, unparsed, _category(metadata)))
        protocol: dict[str, Any] = {"parser": "judge" if rule == OFFICIAL else rule}
        if rule == YES_NO:
            protocol["stand-in"] = "yes or no as a word, against the label: offline, and not the judged number"
        elif causes is None:
            protocol["LH, VI and Mixed"] = "left out: no replies on whether answers agree, or no first figures"
        table, metrics = _count_official(loaded.questions, codes, causes)
        return table.result(parsed_answers, metrics, protocol)

    def _error_causes(
        self, questions: Sequence[Question], answers: Texts, codes: Mapping[str, int], replies: Texts
    ) -> dict[str, str] | None:
        """Return the cause of each error; None if no reply tells whether answers agree, or a question has no figure 0."""
        first = _first_ids(questions)
        if not any(id.endswith(SAME) for id in replies) or any(_group(q.metadata) not in first for q in questions):
            return None
        needed, causes = [], {}
        for question in questions:
            id, original = str(question.id), first[_group(question.metadata)]
            code, first_code = codes[id], codes[original]
            if id in answers and original in answers and _depends_on_same(question.metadata, code, first_code):
                needed.append(id + SAME)
            same = "same" in replies.get(id + SAME, "").lower()
            causes[id] = error_cause(question.metadata, code, first_code, same)
        require_replies(self, replies, needed)
        return causes

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write the benchmark's result file: its rows, with the answers as `model_prediction`."""
        rows = [{**q.metadata["row"], "model_prediction": answers.get(str(q.id), "")} for q in loaded.questions]
        return [inputs.write_json(out / "HallusionBench_result.json", rows)]


def _id(row: Mapping[str, Any]) -> str:
    return "_".join(str(row[part]) for part in _PARTS)


def _image(row: Mapping[str, Any]) -> str:
    """Return the path below the folder hallusion_bench, which some versions of the file have in front."""
    name = row.get("filename") or "{category}/{subcategory}/{set_id}_{figure_id}.png".format(**row)
    return name.removeprefix("./").removeprefix("hallusion_bench/")


def _category(metadata: Mapping[str, Any]) -> str:
    return f"{metadata['category']}/{metadata['subcategory']}"


def _group(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the key of a question over all its figures."""
    return metadata["category"], metadata["subcategory"], metadata["set_id"], metadata["question_id"]


def _first_ids(questions: Iterable[Question]) -> dict[tuple[str, ...], str]:
    """Return the id with figure 0, by question."""
    return {_group(q.metadata): str(q.id) for q in questions if q.metadata["figure_id"] == "0"}


def _yes_no_codes(questions: Sequence[Question], answers: Texts) -> dict[str, int]:
    """Return codes without a judge: yes or no against the label; a missing answer is wrong."""
    codes = {}
    for question in questions:
        id = str(question.id)
        text = vlmevalkit_yes_no(answers.get(id, ""))
        codes[id] = (RIGHT if (text == "yes") == question.metadata["yes"] else WRONG) if text else UNCLEAR
        if id not in answers:
            codes[id] = WRONG
    return codes


_CELLS = (
    "rows", "right", "yes", "said yes", "wrong", "wrong no",
    "questions", "question right", "easy", "easy right", "hard", "hard right",
    "figures", "figure right", "figure wrong", "LH", "VI", "Mixed",
)  # fmt: skip
"""Sums of a category: rows; groups of a question over its figures, all, without and with edits; groups of a figure."""


def _count_official(
    questions: Sequence[Question], codes: Mapping[str, int], causes: Mapping[str, str] | None
) -> tuple[CountTable, dict[str, Statistic]]:
    """Return the counts and the metrics of the official rule."""
    categories = list(dict.fromkeys(_category(question.metadata) for question in questions))
    table = CountTable([f"{category}/{cell}" for category in categories for cell in _CELLS], _clusters(questions))
    groups: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for question in questions:
        id, metadata, category = str(question.id), question.metadata, _category(question.metadata)
        right, yes = is_right(metadata, codes[id]), metadata["yes"]
        amounts: dict[str, float] = {
            "rows": 1,
            "right": right,
            "yes": yes,
            # As in the official script: a right answer text the label, a wrong one the opposite.
            "said yes": right == yes,
            "wrong": not right,
            "wrong no": not right and not yes,
        }
        if causes is not None and causes[id]:
            amounts[causes[id]] = 1
        table.add(question.cluster, {f"{category}/{cell}": float(amount) for cell, amount in amounts.items()})
        kinds = [
            ("question", metadata["question_id"]),
            ("hard" if metadata["visual_input"] == "2" else "easy", metadata["question_id"]),
        ]
        if not (metadata["category"] == "VS" and metadata["figure_id"] == "0"):
            kinds.append(("figure", metadata["figure_id"]))
        for kind, number in kinds:
            groups[question.cluster, category, kind, number].append(right)
    for (cluster, category, kind, _), rights in groups.items():
        whole = kind if kind in ("easy", "hard") else f"{kind}s"
        table.add(cluster, {f"{category}/{whole}": 1, f"{category}/{kind} right": float(all(rights))})
        if kind == "figure":
            table.add(cluster, {f"{category}/figure wrong": float(not any(rights))})

    metrics = _metrics(table, categories, "", causes is not None)
    for prefix in dict.fromkeys(category.split("/")[0] for category in categories):
        inside = [category for category in categories if category.startswith(f"{prefix}/")]
        metrics |= _metrics(table, inside, f"{prefix}/", causes is not None)
    for category in categories:
        of_category = _metrics(table, [category], f"{category}/", False)
        metrics |= {name: of_category[name] for name in (f"{category}/{short}" for short in ("aAcc", "qAcc", "fAcc"))}
    return table, metrics


def _clusters(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(question.cluster for question in questions))


def _metrics(table: CountTable, categories: Sequence[str], prefix: str, with_causes: bool) -> dict[str, Statistic]:
    """Return the metrics of several categories together, in percent; `diff` and `fp` in fractions.

    `diff` is the rate of yes minus that of the labels, `fp` the share of no among the labels of wrong answers.
    """

    def share(over: str, *under: str, scale: float = 100.0) -> Statistic:
        numerator, denominator = ([f"{c}/{cell}" for c in categories for cell in cells] for cells in ((over,), under))
        return table.ratio(numerator, denominator, scale)

    yes, label = share("said yes", "rows", scale=1.0), share("yes", "rows", scale=1.0)
    right, wrong, every = (share(cell, "figures") for cell in ("figure right", "figure wrong", "figures"))
    metrics: dict[str, Statistic] = {
        "aAcc": share("right", "rows"),
        "qAcc": share("question right", "questions"),
        "fAcc": right,
        "easy": share("easy right", "easy"),
        "hard": share("hard right", "hard"),
        "diff": lambda sums: yes(sums) - label(sums),
        "fp": share("wrong no", "wrong", scale=1.0),
        "figures inconsistent": lambda sums: every(sums) - right(sums) - wrong(sums),
        "figures wrong": wrong,
    }
    if with_causes:
        metrics |= {cause: share(cause, "LH", "VI", "Mixed") for cause in ("LH", "VI", "Mixed")}
    return {prefix + name: metric for name, metric in metrics.items()}


_VLMEVALKIT_CELLS = ("rows", "right", "figures", "figure right", "questions", "question right")


def _score_vlmevalkit(questions: Sequence[Question], answers: Texts) -> Scored:
    """Score as VLMEvalKit: rows with a figure, groups by subcategory and set alone, so that VD's and VS's ocr are one."""
    parsed_answers, scored = [], []
    for question in questions:
        category = _category(question.metadata)
        if question.image is None:
            parsed_answers.append(ParsedAnswer(question.id, "", None, False, category))
            continue
        text = vlmevalkit_yes_no(answers.get(str(question.id), ""))
        right = bool(text) and (text == "yes") == question.metadata["yes"]
        parsed_answers.append(ParsedAnswer(question.id, text, float(right), not text, category))
        scored.append((question.cluster, question.metadata, right))

    splits = ["", *dict.fromkeys(f"{metadata['category']}/" for _, metadata, _ in scored)]
    splits += dict.fromkeys(f"{metadata['subcategory']}/" for _, metadata, _ in scored)
    table = CountTable([split + cell for split in splits for cell in _VLMEVALKIT_CELLS], _clusters(questions))
    groups: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for cluster, metadata, right in scored:
        for split in ("", f"{metadata['category']}/", f"{metadata['subcategory']}/"):
            table.add(cluster, {f"{split}rows": 1, f"{split}right": float(right)})
            for kind in ("figure", "question"):
                groups[cluster, split, kind, metadata[f"{kind}_id"]].append(right)
    for (cluster, split, kind, _), rights in groups.items():
        table.add(cluster, {f"{split}{kind}s": 1, f"{split}{kind} right": float(all(rights))})

    metrics: dict[str, Statistic] = {}
    for split in splits:
        three = {
            "aAcc": table.ratio(f"{split}right", f"{split}rows", 100),
            "fAcc": table.ratio(f"{split}figure right", f"{split}figures", 100),
            "qAcc": table.ratio(f"{split}question right", f"{split}questions", 100),
        }
        if not split:
            metrics["Overall"] = mean(list(three.values()))
        metrics |= {split + name: metric for name, metric in three.items()}
    protocol = {"parser": VLMEVALKIT, "questions with a figure, which alone count": len(scored)}
    return table.result(parsed_answers, metrics, protocol)

"""MME: yes or no, two questions about each image (Fu et al., arXiv 2306.13394; scored as its `eval_tool` does).

Files: `MME_Benchmark_release_version`, a folder for each task. A text file for each image holds two lines, each a question,
a tab, and Yes or No; it lies beside its image, or in `questions_answers_YN` beside `images`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from reverie_jax import files
from reverie_jax.eval.benchmarks import inputs, parquet
from reverie_jax.eval.benchmarks.interface import (
    LMMS_EVAL,
    OFFICIAL,
    SHORT,
    VLMEVALKIT,
    Benchmark,
    BenchmarkData,
    BenchmarkError,
    HubDataset,
    Question,
    Row,
    Texts,
    normalize_prompt,
    require,
)
from reverie_jax.eval.benchmarks.scoring import CountTable, ParsedAnswer, Scored, Statistic, total
from reverie_jax.eval.benchmarks.yes_no import vlmevalkit_yes_no

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION

_FOLDER, _INNER = "MME_Benchmark_release_version", "MME_Benchmark"
_ASK = "Please answer yes or no."
_CELLS = ("right", "questions", "both right", "images")
_Tasks = dict[str, dict[str, list[tuple[str, str]]]]
"""By task and image: (question, yes or no) of the lines."""


def official(answer: str) -> str:
    """Return yes or no if it is in the first four characters, spaces included; "" for what the tool calls other."""
    head = clean(answer).lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else ""


def clean(answer: str) -> str:
    """Return an answer of the same length without tabs and line ends, which a result file cannot have."""
    return answer.translate({ord(mark): " " for mark in "\n\r\t"})


def _lmms_eval(answer: str) -> str:
    """Parse as lmms-eval: full stops and outer spaces dropped; a lone y or n counts, else the first four characters."""
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text, "") if len(text) == 1 else official(text)


_PARSERS: Mapping[str, Callable[[str], str]] = {
    OFFICIAL: official,
    LMMS_EVAL: _lmms_eval,
    VLMEVALKIT: vlmevalkit_yes_no,
}
_SUMS = {
    OFFICIAL: ("perception", "cognition"),
    LMMS_EVAL: ("mme_perception_score", "mme_cognition_score"),
    VLMEVALKIT: ("perception", "reasoning"),
}
"""Names of the sums over perception tasks and cognition tasks, by rule."""


class Mme(Benchmark):
    """MME, see the module's docstring. Ids are LLaVA's (the image), with #1 or #2 for the line of the text file."""

    name = "mme"
    published_items = 2374
    expected_new_tokens = 8
    yes_no = True
    unique_ids = False
    folder_names = ("MME",)
    scale = "points: 200 for each task, 2,000 for perception, 800 for cognition"
    rules = (OFFICIAL, LMMS_EVAL, VLMEVALKIT)
    required_files = f"{_FOLDER}, the folder that MME's authors send out, with a folder for each task"
    metric = "perception and cognition: sums over tasks"
    hub = HubDataset(
        *("lmms-lab-encoder/MME", ("data/test-*.parquet",), 864, "d6c9023f017b564f7b3ccccf5348166bce8fdbcd")
    )

    def load(self, data: Path) -> BenchmarkData:
        """Read the folders of tasks that are there; see `Benchmark.load`."""
        table = parquet.find_table(data, *self.hub.files)
        tasks, read_image = _read_folders(data, self.required_files) if table is None else _read_table(table)
        questions: list[Question] = []
        images: dict[str, list[Question]] = {}
        for task, asked in tasks.items():
            for image, lines in asked.items():
                cluster = f"{task}/{PurePosixPath(image).name}"
                pair = [
                    Question(
                        f"{cluster}#{number}",
                        f"{task}/{image}",
                        f"{plain.replace(_ASK, '').strip()}\n{SHORT}",
                        cluster,
                        {"task": task, "label": label, "plain": plain},
                    )
                    for number, (plain, label) in enumerate(lines, 1)
                ]
                questions += pair
                images[f"{task}/{PurePosixPath(image).stem}"] = pair
        absent = [task for task in TASKS if task not in tasks]
        protocol: dict[str, Any] = {"questions": len(questions), "images": len(images)}
        if absent:
            protocol["tasks that are not there"] = ", ".join(absent)
        return BenchmarkData(questions, read_image, protocol, {"images": images})

    def match_question(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows by id, or LLaVA's rows, which name only the image, by image and prompt."""
        id = super().match_question(row, loaded)
        if id is None:
            return self._match_table_row(row, loaded)
        image, _, number = id.partition("#")
        pair = loaded.tables["images"].get(f"{image.split('/')[0]}/{PurePosixPath(image).stem}")
        if pair is None:
            return id
        if number:
            return str(pair[int(number) - 1].id) if number in ("1", "2") else id
        # A question may be the beginning of the other one: the longer one that the prompt holds is meant.
        prompt = row.get("prompt", row.get("question"))
        meant = [question for question in pair if self.same_prompt(str(prompt or ""), question)]
        if not meant:
            raise ValueError(f"{image} has two questions, and the prompt of the row is neither: {prompt!r}")
        return str(max(meant, key=lambda question: len(self.question_text(question))).id)

    def _match_table_row(self, row: Mapping[str, Any], loaded: BenchmarkData) -> str | None:
        """Match rows of VLMEvalKit's tables, which are numbered anew, by task, image and question; None for other rows.

        Raises:
            ValueError: No question matches, or several.
        """
        task, asked, image = row.get("category"), row.get("question"), row.get("image_path", row.get("image"))
        if task not in TASKS or not isinstance(asked, str):
            return None
        stem = PurePosixPath(image).stem if isinstance(image, str) else ""
        pairs = loaded.tables["images"]
        pairs = (
            [pairs[f"{task}/{stem}"]]
            if f"{task}/{stem}" in pairs
            else [pair for name, pair in pairs.items() if name.split("/")[0] == task]
        )
        words = _words(asked)
        same = [question for pair in pairs for question in pair if _words(question.metadata["plain"]) == words]
        if len(same) != 1:
            raise ValueError(
                f"{asked!r} is {len(same)} questions of {task}; name the image in a column image_path"
                if same
                else f"{asked!r} is not a question of {task}"
            )
        return str(same[0].id)

    def question_text(self, question: Question) -> str:
        """Return the question without the sentence that asks for yes or no, which LLaVA removes."""
        return str(question.metadata["plain"]).replace(_ASK, "").strip()

    def part(self, question: Question) -> str:
        """Return the task."""
        return str(question.metadata["task"])

    def own_rows(self, path: Path) -> Iterable[Row] | None:
        """Return the rows of MME's result folder, or of one of its files: image, question, label and answer, by tabs."""
        found = [path / f"{task}.txt" for task in TASKS] if path.is_dir() else [path] * (path.suffix.lower() == ".txt")
        rows: list[Row] = []
        for file in filter(Path.is_file, found):
            try:
                lines = files.decode_text(file.read_bytes()).split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise BenchmarkError(f"{file}: cannot be read ({error})") from None
            for number, line in enumerate(lines, 1):
                cells = line.rstrip("\r").split("\t", 3)
                require(
                    len(cells) in (1, 4), f"{file}: line {number} must be an image, a question, a label and an answer"
                )
                if len(cells) == 4:
                    image, asked, _, answer = cells
                    rows.append({"question_id": f"{file.stem}/{image}", "prompt": asked, "text": answer})
        return rows or None

    def score(
        self, loaded: BenchmarkData, answers: Texts, rule: str = OFFICIAL, replies: Texts | None = None
    ) -> Scored:
        """Score yes and no; a missing answer is wrong."""
        present = {question.metadata["task"] for question in loaded.questions}
        tasks = [task for task in TASKS if task in present]
        rights: dict[str, list[bool]] = {question.cluster: [] for question in loaded.questions}
        parsed_answers = []
        for question in loaded.questions:
            parsed = _PARSERS[rule](answers.get(str(question.id), ""))
            right = parsed == question.metadata["label"]
            rights[question.cluster].append(right)
            parsed_answers.append(
                ParsedAnswer(question.id, parsed, float(right), not parsed, question.metadata["task"])
            )
        table = CountTable([f"{task}/{cell}" for task in tasks for cell in _CELLS], list(rights))
        for cluster, pair in rights.items():
            amounts = (sum(pair), len(pair), all(pair), 1)
            task = cluster.split("/")[0]
            table.add(cluster, {f"{task}/{cell}": float(n) for cell, n in zip(_CELLS, amounts, strict=True)})
        return table.result(parsed_answers, _metrics(table, tasks, rule), {"parser": rule})

    def export(self, loaded: BenchmarkData, answers: Texts, out: Path) -> list[Path]:
        """Write MME's result folder: a text file for each task, with lines of image, question, label and answer."""
        out.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[str]] = {}
        for question in loaded.questions:
            metadata, image = question.metadata, question.cluster.partition("/")[2]
            answer = clean(answers.get(str(question.id), ""))
            line = "\t".join((image, metadata["plain"], metadata["label"].capitalize(), answer))
            rows.setdefault(metadata["task"], []).append(line + "\n")
        for task, lines in rows.items():
            (out / f"{task}.txt").write_text("".join(lines), "utf-8")
        return [out / f"{task}.txt" for task in rows]


def _words(question: str) -> str:
    return normalize_prompt(question.replace(_ASK, ""))


def _read_folders(data: Path, needed: str) -> tuple[_Tasks, Callable[[str], bytes]]:
    """Return the questions in the folders of tasks, and a reader of images."""
    # The archive now has one folder more.
    places = (data, *(data / name for name in (_FOLDER, _INNER, f"{_FOLDER}/{_INNER}")))
    root = next((place for place in places if any((place / task).is_dir() for task in TASKS)), None)
    if root is None:
        raise BenchmarkError(f"{data}: folders of tasks ({TASKS[0]}, {TASKS[1]}, …) are missing; mme needs {needed}")
    tasks: _Tasks = {}
    for task in TASKS:
        folder = root / task
        texts = sorted(folder.glob("questions_answers_YN/*.txt")) or sorted(folder.glob("*.txt"))
        require(bool(texts) or not folder.is_dir(), f"{folder}: no question files; mme needs {needed}")
        image_paths = _image_paths(folder)
        for path in texts:
            # Scoring needs no images: without them the name is LLaVA's, as far as it can be guessed.
            image = image_paths.get(path.stem, f"{path.stem}.{'jpg' if task in PERCEPTION else 'png'}")
            tasks.setdefault(task, {})[image] = _read_pair(path)
    return tasks, inputs.image_reader(root)


def _read_table(table: parquet.Table) -> tuple[_Tasks, Callable[[str], bytes]]:
    """Return the questions of the hub's dataset, whose `question_id` is task and image, in the order of the folders."""
    found: _Tasks = {task: {} for task in TASKS}
    images: dict[str, int] = {}

    def add(number: int, row: Mapping[str, Any]) -> None:
        task, image = row["category"], PurePosixPath(row["question_id"]).name
        label = row["answer"].strip().rstrip(".").lower()
        if label not in ("yes", "no"):
            raise ValueError(f"answer is {row['answer']!r}")
        found[task].setdefault(image, []).append((row["question"].strip(), label))
        images.setdefault(f"{task}/{image}", number)

    table.parse("MME question", add)
    odd = [f"{task}/{image}" for task, asked in found.items() for image, pair in asked.items() if len(pair) != 2]
    require(not odd, f"{table.paths[0]}: {odd[:1]} has not two questions")
    ordered = {task: dict(sorted(asked.items(), key=lambda one: Path(one[0]).stem)) for task, asked in found.items()}
    return {task: asked for task, asked in ordered.items() if asked}, table.reader(images)


def _read_pair(path: Path) -> list[tuple[str, str]]:
    """Read the two questions of a text file, and their labels as yes or no."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: cannot be read ({error})") from None
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            question, _, label = line.rstrip().rpartition("\t")
            valid = bool(question.strip()) and label.strip().lower() in ("yes", "no")
            require(valid, f"{path}: line {number} must be a question, a tab, and Yes or No")
            pairs.append((question, label.strip().lower()))
    require(len(pairs) == 2, f"{path}: {len(pairs)} questions instead of two for each image; unpack the archive again")
    return pairs


def _image_paths(folder: Path) -> dict[str, str]:
    """Return the paths of images below a task's folder, by their names without suffix."""
    found: dict[str, str] = {}
    for place in (folder / "images", folder):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                found.setdefault(path.stem, path.relative_to(folder).as_posix())
    return found


def _metrics(table: CountTable, tasks: Sequence[str], rule: str) -> dict[str, Statistic]:
    """Return sums, then the score of each task, from 0 to 200: accuracy over questions plus accuracy over images."""
    scores: dict[str, Statistic] = {}
    parts: dict[str, Statistic] = {}
    for task in tasks:
        parts[f"{task}/acc"] = table.ratio(f"{task}/right", f"{task}/questions", 100)
        parts[f"{task}/acc+"] = table.ratio(f"{task}/both right", f"{task}/images", 100)
        scores[task] = total([parts[f"{task}/acc"], parts[f"{task}/acc+"]])
    sums = {
        name: total([scores[task] for task in group if task in scores])
        for name, group in zip(_SUMS[rule], (PERCEPTION, COGNITION), strict=True)
        if any(task in scores for task in group)
    }
    return sums | scores | parts

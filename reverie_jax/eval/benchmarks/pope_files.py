"""POPE's answer files: which split their rows are about, as its files number their questions alike, from 1."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from reverie_jax.eval.benchmarks.interface import SHORT, BenchmarkError, Question, Row, normalize_prompt

SPLITS = ("random", "popular", "adversarial")
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""Offsets of the ids in LLaVA's file of all three splits."""

Located = tuple[str, Any]
"""A row, and its file and place for messages."""

_NAMES = {
    "random": re.compile(r"random"),
    "popular": re.compile(r"popular|(?<![a-z])pop(?![a-z])"),
    "adversarial": re.compile(r"adversarial|(?<![a-z])adv(?![a-z])"),
}
"""Splits in names of files, as POPE and lmms-eval call them."""
_IMAGE_COLUMNS = ("image", "image_path", "image_source")
_OTHERS = "the answers belong to another version of the questions, or to another benchmark"


class Settler(NamedTuple):
    """Finds the questions of rows.

    Attributes:
        path: of the answer file, for messages.
        splits: the questions of each split, in the order of its file.
        same_prompt: checks that a prompt holds a question.
    """

    path: Path
    splits: Mapping[str, Sequence[Question]]
    same_prompt: Callable[[str, Question], bool]

    def settle(self, rows: Sequence[Located]) -> tuple[Sequence[Located], str]:
        """Return the rows with LLaVA's ids, and the split that they are about; see `Benchmark.settle_rows`.

        What tells: a column `split` or `category`, the prompts and images, the name of the file; ids as in LLaVA's file.

        Raises:
            BenchmarkError: Nothing tells which questions are answered.
        """
        plain = [row for _, row in rows if isinstance(row, Mapping)]
        if len(plain) < len(rows):
            return rows, ""
        numbered = [row for row in plain if row.get("question_id") is not None]
        if not numbered and all("question" in row for row in plain):
            if all("answer" in row and not {"text", "prediction"} & row.keys() for row in plain):
                return self._by_position(plain)
            return list(self._by_content(plain)), ""
        official = all(re.fullmatch(r"0*[1-9]\d{0,6}", str(row["question_id"])) for row in numbered)
        if len(numbered) < len(plain) or not official:
            return rows, ""
        told: dict[str, Sequence[Row]] = {
            split: [row for row in plain if _told_splits(row) == (split,)] for split in self.splits
        }
        if sum(map(len, told.values())) < len(plain):
            told = self._blocks(plain)
        return [
            (f"{self.path}: {split}, row {place}", {**row, "question_id": OFFSETS[split] + int(row["question_id"])})
            for split, group in told.items()
            for place, row in enumerate(group)
        ], ""

    def _by_position(self, rows: Sequence[Row]) -> tuple[Sequence[Located], str]:
        """Join POPE's own form, a question and an answer in each row, in the order of a split or of several, one by one."""
        told: dict[str, Sequence[Row]] = {
            split: [row for row in rows if _told_splits(row) == (split,)] for split in self.splits
        }
        if sum(map(len, told.values())) < len(rows):
            told = self._in_order(rows)
        settled: list[Located] = []
        for split, group in told.items():
            for place, row in enumerate(group):
                where = f"{self.path}: {split}, row {place}"
                asked = self.splits[split][place] if place < len(self.splits[split]) else None
                if asked is None or not self.same_prompt(str(row["question"]), asked):
                    raise BenchmarkError(f"{where}: is not question {place + 1} of {split}: {row['question']!r}")
                settled.append((where, {**row, "question_id": asked.id}))
        about = [split for split, group in told.items() if group]
        return settled, about[0] if len(about) == 1 < len(self.splits) else ""

    def _in_order(self, rows: Sequence[Row]) -> dict[str, Sequence[Row]]:
        """Return the rows of each split, where a file has one split or several behind each other."""
        if len(rows) <= max(map(len, self.splits.values())):
            return {self._split_of(rows, set(self.splits), named=True): rows}
        orders = [
            order
            for order in itertools.permutations(self.splits)
            if len(rows) == sum(len(self.splits[split]) for split in order)
            and all(
                self.same_prompt(str(row["question"]), question)
                for row, question in zip(rows, (q for split in order for q in self.splits[split]), strict=True)
            )
        ]
        if len(orders) != 1:
            reason = (
                f"could be {' or '.join(map(', '.join, orders))}; add a column split"
                if orders
                else f"are not; {_OTHERS}"
            )
            raise BenchmarkError(f"{self.path}: {len(rows)} rows, of all splits one by one: their order {reason}")
        parts, start = {}, 0
        for split in orders[0]:
            parts[split] = rows[start : start + len(self.splits[split])]
            start += len(self.splits[split])
        return parts

    def _by_content(self, rows: Sequence[Row]) -> Iterator[Located]:
        """Join rows by splits, question and image; VLMEvalKit's have one row for the same question of several splits."""
        images = {PurePath(q.image).stem for asked in self.splits.values() for q in asked if q.image}
        found: dict[tuple[str, str], list[Question]] = defaultdict(list)
        for split, asked in self.splits.items():
            for question in asked:
                found[split, _words(str(question.metadata["plain"]))].append(question)
        for number, row in enumerate(rows):
            where = f"{self.path}: row {number}"
            if not (told := _told_splits(row)):
                raise BenchmarkError(
                    f"{where}: no question_id, and no split in a column category: {row.get('category')!r}"
                )
            image = _image_of(row)
            for split in told:
                same = found.get((split, _words(str(row["question"]))), [])
                if image in images:
                    same = [question for question in same if PurePath(str(question.image)).stem == image]
                if len(same) != 1:
                    count = (
                        f"{len(same)} questions of {split}; add its image's name in a column image_path, or question_id"
                    )
                    unknown = f"not in {split}" if split in self.splits else f"of {split}, whose questions are missing"
                    raise BenchmarkError(
                        f"{where}: {row['question']!r} is {count if same else f'{unknown}; {_OTHERS}'}"
                    )
                yield f"{where}, {split}", {**row, "question_id": same[0].id}

    def _blocks(self, rows: Sequence[Row]) -> dict[str, Sequence[Row]]:
        """Return the rows of each split of a file that numbers them from 1: one split, or several behind each other."""
        blocks: list[list[Row]] = [[]]
        seen: set[int] = set()
        for row in rows:
            if (number := int(row["question_id"])) in seen:
                blocks.append([])
                seen.clear()
            seen.add(number)
            blocks[-1].append(row)
        if len(blocks) == 1:
            return {self._split_of(rows, set(self.splits), named=True): rows}
        if len(blocks) > len(self.splits):
            raise BenchmarkError(
                f"{self.path}: duplicate answer to question {_repeated(rows)}: the ids are those of "
                f"{' and '.join(self.splits)} alike; add a column split, or use LLaVA's ids (random from 10000001, popular "
                "from 20000001)"
            )
        parts: dict[str, Sequence[Row]] = {}
        fitting = {number: self._fitting(block) for number, block in enumerate(blocks)}
        while fitting:  # those that fit one split alone leave fewer for the others
            number = min(fitting, key=lambda number: len(fitting[number] - parts.keys()))
            split = self._split_of(blocks[number], set(self.splits) - parts.keys(), named=False)
            parts[split] = blocks[number]
            del fitting[number]
        return parts

    def _fitting(self, rows: Sequence[Row]) -> set[str]:
        """Return the splits whose questions rows may answer, all of them."""
        by_id = {split: {int(q.id) - OFFSETS[split]: q for q in asked} for split, asked in self.splits.items()}

        def fits(row: Row, place: int, split: str) -> bool:
            if row.get("question_id") is not None:
                question = by_id[split].get(int(row["question_id"]))
            else:
                question = self.splits[split][place] if place < len(self.splits[split]) else None
            if question is None:
                return False
            prompt, image = row.get("prompt", row.get("question")), _image_of(row)
            told = isinstance(prompt, str) and prompt.strip() != ""
            shown = not image or image == PurePath(str(question.image)).stem
            if split not in (_told_splits(row) or self.splits):
                return False
            return shown and (not told or self.same_prompt(str(prompt), question))

        return {split for split in self.splits if all(fits(row, place, split) for place, row in enumerate(rows))}

    def _split_of(self, rows: Sequence[Row], among: set[str], *, named: bool) -> str:
        """Return the split that rows are about, all of them.

        Args:
            rows: The rows.
            among: Splits that it may be.
            named: The name of the file may tell.

        Raises:
            BenchmarkError: The rows fit no split, or several.
        """
        possible = [split for split in self.splits if split in self._fitting(rows) & among]
        by_name = [split for split in possible if named and _NAMES[split].search(self.path.name.lower())]
        if len(by_name or possible) == 1:
            return (by_name or possible)[0]
        names = " and ".join(possible or self.splits)
        raise BenchmarkError(
            f"{self.path}: its ids and questions are those of {names} alike; name the file after its split, add a column "
            "split, or use LLaVA's ids (random from 10000001, popular from 20000001)"
            if possible
            else f"{self.path}: its questions are not those of {names}, in this order; {_OTHERS}"
        )


def _told_splits(row: Row) -> tuple[str, ...]:
    """Return the splits that a column `split` or `category` names; several where a row answers a question of several."""
    for column in ("split", "category"):
        words = tuple(word.strip() for word in str(row.get(column)).lower().split(","))
        if set(words) <= set(SPLITS):
            return words
    return ()


def _image_of(row: Row) -> str:
    """Return the name of a row's image without folder and suffix; "" for none."""
    named = (row.get(column) for column in _IMAGE_COLUMNS)
    return next((PurePath(name).stem for name in named if isinstance(name, str) and name), "")


def _words(question: str) -> str:
    return normalize_prompt(question.replace("imange", "image").removesuffix(SHORT))


def _repeated(rows: Sequence[Row]) -> int:
    counts = Counter(int(row["question_id"]) for row in rows)
    return next(number for number, count in counts.items() if count > 1)

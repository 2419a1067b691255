"""`reverie data questions`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """Prepare human questions (ScienceQA, A-OKVQA) for `reverie annotate`, which writes rationales for wrong options."""

    annotations: Annotated[Positional[Path], common.FILE]
    """ScienceQA's problems.json or A-OKVQA's file."""
    out: Annotated[Path, common.FOLDER]
    """Output folder: reasoning_instruct_data.json, for `reverie annotate rationales`."""
    confusing: Annotated[int, common.N] = 3
    """Confusing answers for each question: at most this many of its wrong options."""
    splits: Annotated[common.Several[str], common.option("NAME ...")] = ()
    """Splits to take rows from; train if omitted."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.annotate.files import QUESTIONS
        from reverie_jax.data.row_files import Rows, write_rows
        from reverie_jax.data.sources import ReadLog, multiple_choice

        common.check_at_least(1, confusing=self.confusing)
        log = ReadLog()
        rows, splits = Rows(self.annotations), common.joined(self.splits) or ["train"]
        questions = multiple_choice.annotation_rows(rows, log, splits=splits, max_wrong=self.confusing)
        common.note(log.notes)
        common.note(f"{where}: {why}; skipped" for where, why in log.problems[:5])
        if len(log.problems) > 5:
            common.note([f"{len(log.problems) - 5} more rows were skipped"])
        if not questions:
            raise UserError(
                f"{self.annotations}: questions with options and an image are missing in {', '.join(splits)}"
            )
        path = self.out / QUESTIONS
        if path.exists():
            raise UserError(f"{path}: already exists; choose another output folder")
        self.out.mkdir(parents=True, exist_ok=True)
        write_rows(path, questions)
        print(f"{len(questions)} rows: {path}")

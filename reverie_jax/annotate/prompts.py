"""The words that a hosted model is asked with: files that a user can replace one by one."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jinja2

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Stage, digest

STAGES: tuple[Stage, ...] = tuple(stage for stage in get_args(Stage) if stage != "evaluate")
"""Those with a prompt here; what a judge of benchmarks is asked is the benchmarks' own (`eval.judge`)."""


class Prompts:
    """A prompt a stage, as jinja2 templates over the fields of a request.

    Args:
        folder: holds files named by the stages, `questions.txt` and so on; those it lacks are ours.

    Raises:
        UserError: a file is no template, or the folder holds none at all.
    """

    def __init__(self, folder: Path | None = None):
        ours = importlib.resources.files("reverie_jax.annotate") / "prompts"
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, autoescape=False)
        if folder is not None and not any((folder / f"{stage}.txt").is_file() for stage in STAGES):
            raise UserError(f"{folder}: no prompt here; name the files {', '.join(f'{stage}.txt' for stage in STAGES)}")
        self._templates: dict[str, jinja2.Template] = {}
        self.versions: dict[str, str] = {}
        """A prompt's content by stage: what was asked in other words is asked again."""
        for stage in STAGES:
            theirs = None if folder is None else folder / f"{stage}.txt"
            try:
                home = theirs if theirs and theirs.is_file() else ours / f"{stage}.txt"
                text = home.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{theirs}: cannot be read ({error})") from None
            try:
                self._templates[stage] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise UserError(f"{theirs}: not a template ({error})") from None
            self.versions[stage] = digest(text)

    def __call__(self, stage: Stage, fields: Mapping[str, str], *, shown: bool = True) -> str:
        """The filled prompt.

        Raises:
            UserError: it asks for a field that the stage has not got.
        """
        try:
            return self._templates[stage].render(**fields, shown=shown)
        except Exception as error:  # a template may do anything, as 1 / 0
            raise UserError(f"{stage}.txt: {error}; the stage fills in {', '.join([*fields, 'shown'])}") from None

"""Prompts of hosted models: template files that a user can replace one by one."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import jinja2

from reverie_jax.errors import UserError
from reverie_jax.hosted.interface import Stage, digest

_OF_EVALUATION = ("evaluate", "predict", "explain")
STAGES: tuple[Stage, ...] = tuple(stage for stage in get_args(Stage) if stage not in _OF_EVALUATION)
"""Stages with a prompt here; those of `eval` bring their own."""


class Prompts:
    """Prompts by stage, as jinja2 templates over the fields of a request.

    Args:
        folder: Files named by stage (`questions.txt`, ...) that replace the built-in ones.

    Attributes:
        versions: Digest of each stage's template; with another prompt, requests are sent again.

    Raises:
        UserError: A file is not a template, or the folder has none.
    """

    def __init__(self, folder: Path | None = None):
        built_in = importlib.resources.files("reverie_jax.annotate") / "prompts"
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=False, autoescape=False)
        if folder is not None and not any((folder / f"{stage}.txt").is_file() for stage in STAGES):
            raise UserError(f"{folder}: no prompts; name the files {', '.join(f'{stage}.txt' for stage in STAGES)}")
        self._templates: dict[str, jinja2.Template] = {}
        self.versions: dict[str, str] = {}
        for stage in STAGES:
            custom = None if folder is None else folder / f"{stage}.txt"
            try:
                file = custom if custom and custom.is_file() else built_in / f"{stage}.txt"
                text = file.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{custom}: cannot be read ({error})") from None
            try:
                self._templates[stage] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise UserError(f"{custom}: not a template ({error})") from None
            self.versions[stage] = digest(text)

    def __call__(self, stage: Stage, fields: Mapping[str, str], *, send_image: bool = True) -> str:
        """Return the filled prompt; the templates know `send_image` as `shown`.

        Raises:
            UserError: It uses a field that the stage does not have.
        """
        try:
            return self._templates[stage].render(**fields, shown=send_image)
        except Exception as error:  # a template may fail in any way, such as 1 / 0
            raise UserError(f"{stage}.txt: {error}; the fields are {', '.join([*fields, 'shown'])}") from None

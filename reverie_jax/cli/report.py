"""`reverie report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from reverie_jax.cli import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write an HTML page from outputs of `reverie eval`: scores with intervals and published scores, plots, answers."""

    runs: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=]FOLDER ...")]
    """Output folders of `reverie eval` (of one benchmark or several); the others are compared with the first."""
    out: Path
    """Output file, an HTML page."""
    data: Path | None = None
    """Folder of the benchmark's official files (of several: a folder of folders by name), for images and paired tests."""
    images: Path | None = None
    """Folder of images, if they are not with the data."""
    count: int = 6
    """Images in each gallery."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.eval.report import page

        html = page.render(page.read_runs(self.runs), data=self.data, images=self.images, shown=self.count)
        with common.writing(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(html, "utf-8")
        print(self.out)

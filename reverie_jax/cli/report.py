"""`reverie report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.files import atomic_write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write an HTML page from outputs of `reverie eval`: scores with intervals and published scores, plots, answers."""

    runs: Annotated[Positional[tuple[str, ...]], common.option("[NAME=]FOLDER ...")]
    """Output folders of `reverie eval` (of one benchmark or several); the others are compared with the first."""
    out: Annotated[Path, common.FILE]
    """Output file: an HTML page."""
    data: Annotated[Path | None, common.FOLDER] = None
    """Folder of the benchmark's official files; of several benchmarks, a folder of folders by name. For images."""
    images: Annotated[Path | None, common.FOLDER] = None
    """Folder of images; the one in the data if omitted."""
    count: Annotated[int, common.N] = 6
    """Images in each gallery."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.eval.report import page

        html = page.render(page.read_runs(self.runs), data=self.data, images=self.images, count=self.count)
        atomic_write(self.out, html)
        print(self.out)

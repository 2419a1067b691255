"""`reverie data review`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from reverie_jax.cli import common, listening
from reverie_jax.errors import UserError
from reverie_jax.files import atomic_write

if TYPE_CHECKING:
    from reverie_jax.review.pages import Review as Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """Review annotation files in a browser: mark samples good or bad, edit texts; `reverie data build --marks` honors it.

    Several reviewers may use one file of marks at once, each with a --reviewer name. A key in the environment variable
    REVERIE_API_KEY is asked of browsers, as a password.
    """

    sources: Annotated[Positional[tuple[str, ...]], common.option("FILE[=FOLDER] ...")]
    """Annotation files in any format that `reverie data build` reads, each with its image folder."""
    images: Annotated[Path | None, common.FOLDER] = None
    """Folder of images; for files without one of their own. `images` beside the file if omitted."""
    marks: Annotated[Path | None, common.FILE] = None
    """File of marks: JSON lines, created or continued. Required unless --export is given."""
    reviewer: Annotated[str, common.option("NAME")] = "reviewer"
    """Name that marks are kept under."""
    host: listening.Host = "127.0.0.1"
    port: listening.Port = 8001
    export: Annotated[Path | None, common.FILE] = None
    """Write an HTML page of samples, drawn at random, to this file instead: at most --count that the judge accepted, that
    it dropped, and without a verdict."""
    count: Annotated[int, common.N] = 50
    """Samples of each verdict on the page, for --export."""
    seed: common.Seed = 0

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, count=self.count)
        entries = common.mixture_entries(self.sources)
        if not entries:
            raise UserError("name at least one annotation file, as FILE=FOLDER")
        if self.export is None:
            common.require(self.marks, "--marks", "name the file of marks; it is created if it does not exist")
        elif self.marks is not None and not self.marks.exists():
            raise UserError(f"--marks {self.marks}: no such file")
        common.require(self.reviewer.strip(), "--reviewer", "must not be empty")
        if self.images is not None and not self.images.is_dir():
            raise UserError(f"--images {self.images}: no such folder")
        for path in filter(None, (self.marks, self.export)):
            if path.exists() and any(entry.file.exists() and path.samefile(entry.file) for entry in entries):
                raise UserError(f"{path}: is an annotation file of this command; choose another name")
        files = [(entry.file, entry.images or common.find_images_folder(self.images, entry.file)) for entry in entries]
        if self.export is None:
            self._serve(files)
            return
        samples = self._samples(files)
        atomic_write(self.export, samples.export(self.count, self.seed))
        print(self.export)

    def _samples(self, files: Sequence[tuple[Path, Path | None]]) -> Samples:
        from reverie_jax.progress import ProgressBars
        from reverie_jax.review.index import Index
        from reverie_jax.review.marks_file import MarksFile
        from reverie_jax.review.pages import Review as Samples

        marks = MarksFile(self.marks)
        with ProgressBars() as bars:
            store = None if self.marks is None else self.marks.with_name(f".{self.marks.name}.index")
            index = Index(files, store, lambda count: bars.update("rows read", count, None))
        return Samples(index, marks, self.reviewer.strip())

    def _serve(self, files: Sequence[tuple[Path, Path | None]]) -> None:
        key = listening.find_key(self.host, self.port)
        try:
            import uvicorn

            from reverie_jax.review.app import make_app
        except ImportError as error:
            raise UserError(f"`reverie data review`: {error}; pip install -e '.[web]' in the checkout") from None
        with listening.open_socket(self.host, self.port) as opened:
            samples = self._samples(files)
            common.note([f"{samples.index.total:,} samples at {listening.address(opened)}; marks go to {self.marks}"])
            config = uvicorn.Config(make_app(samples, key, [self.host]), log_level="warning", ws="none")
            uvicorn.Server(config).run([opened])

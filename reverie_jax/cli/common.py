"""What commands share: models, mesh, dtype, bounds, output files, progress."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.typing import DTypeLike
    from rich.console import Console
    from rich.progress import Progress

    from reverie_jax.data.processor import Processor
    from reverie_jax.models import VisionLanguageModel

Components = UseAppendAction[tuple[str, ...]]
BenchmarkName = Annotated[Positional[str], arg(metavar="BENCHMARK")]
DTYPES = ("float32", "bfloat16")
_LOG_SECONDS = 60.0
"""Time between two progress lines where stderr is not a terminal."""


def flag(name: str) -> str:
    """Return an option as it is typed: `batch_size` is `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def at_least(least: float, **options: float | None) -> None:
    """Check lower bounds; options that are None pass.

    Raises:
        UserError: an option is below `least`.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"{flag(name)} {value}: must be at least {least:g}")


def positive(**options: float | None) -> None:
    """Check that options are above 0; those that are None pass.

    Raises:
        UserError: an option is 0 or negative.
    """
    for name, value in options.items():
        if value is not None and value <= 0:
            raise UserError(f"{flag(name)} {value}: must be more than 0")


def one_of(choices: Sequence[str], **options: str) -> None:
    """Check options against their choices.

    Raises:
        UserError: an option is none of the choices.
    """
    for name, value in options.items():
        if value not in choices:
            raise UserError(f"{flag(name)} {value}: must be {' or '.join(filter(None, choices))}")


def required(value: Any, option: str, what: str) -> Any:
    """Return an option's value.

    Raises:
        UserError: it was not given.
    """
    if not value:
        raise UserError(f"{option}: {what}")
    return value


def parse_mesh(text: str) -> Mesh:
    """Make the mesh of "data=2,fsdp=2,tensor=1"; omitted axes have size 1.

    Raises:
        UserError: the text is not a mesh, or there are not as many devices.
    """
    from reverie_jax.models.sharding import make_mesh, mesh_axes

    try:
        sizes: dict[str, Any] = {**mesh_axes(text)}
        return make_mesh(**sizes)
    except ValueError as error:
        raise UserError(f"--mesh {text}: {error}") from None


def parse_dtype(name: str, choices: tuple[str, ...] = DTYPES) -> DTypeLike:
    """Return the dtype of that name; `auto` is bfloat16 on accelerators and float32 on CPUs.

    Raises:
        UserError: it is none of the choices.
    """
    import jax
    import jax.numpy as jnp

    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    one_of(choices, dtype=name)
    return jnp.dtype(name)


def load_merged(
    model: str, components: Sequence[str], adapter: str | None, dtype: str = "auto"
) -> tuple[VisionLanguageModel, Processor]:
    """Load a checkpoint with its adapters merged, and its processor.

    Raises:
        CheckpointError: it cannot be used.
    """
    from reverie_jax.loading import load_model
    from reverie_jax.models import lora

    loaded, processor = load_model(model, components=components, adapter=adapter, dtype=parse_dtype(dtype))
    lora.merge(loaded)
    return loaded, processor


def images_folder(images: Path | None, annotations: Path) -> Path | None:
    """Return the folder of an annotation file's images: the one given, else `images` beside the file if it exists."""
    beside = annotations.parent / "images"
    return beside if images is None and beside.is_dir() else images


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into an error that names the file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_writable(*paths: Path | None) -> None:
    """Check, before the work, that output files can be written.

    Raises:
        UserError: a file cannot be written.
    """
    for path in paths:
        if path is not None:
            with writing(path):
                path.open("a").close()


def note(lines: Iterable[str]) -> None:
    """Print remarks on stderr, a line each."""
    for line in lines:
        print(f"reverie: {line}", file=sys.stderr)


class ProgressBars:
    """Progress on stderr: a bar a stage on a terminal, otherwise a line every minute. A context.

    Args:
        name: the job, shown before the stage.
        show: False for processes other than the first.
    """

    def __init__(self, name: str = "", *, show: bool = True):
        self.name, self._show = name, show
        self._tasks: dict[str, Any] = {}
        self._logged = time.monotonic()

    def __enter__(self) -> ProgressBars:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console: Console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        terminal = self.console.is_terminal and self._show
        self._progress: Progress = Progress(*columns, console=self.console, disable=not terminal)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def speed(self, stage: str) -> float:
        """Return the items a second of a stage; 0 before the first."""
        if stage not in self._tasks:
            return 0.0
        return next(task.speed or 0.0 for task in self._progress.tasks if task.id == self._tasks[stage])

    def update(self, stage: str, done: int, total: int | None, rate: str = "") -> None:
        """Show that `done` of `total` items of a stage are done; `rate` is a remark behind the bar."""
        label = f"{self.name} {stage}".strip()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(label, total=total, rate=rate)
        self._progress.update(self._tasks[stage], completed=done, total=total, rate=rate)
        if self._show and not self.console.is_terminal and time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            text = f"reverie: {label}: {done:,}{of}{rate and ', '}{rate}"
            self.console.print(text, highlight=False, markup=False)


def cpu_count() -> int:
    """Return the number of cores, at least 1."""
    return os.cpu_count() or 1

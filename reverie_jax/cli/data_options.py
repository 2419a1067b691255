"""The options of `reverie data`; light, for they are read at every start of the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

Sources = Annotated[Positional[tuple[str, ...]], arg(metavar="FILE[=FOLDER] …")]


@dataclasses.dataclass(frozen=True)
class Build:
    """Turn annotation files and folders of pictures into records (ArrayRecord, one record an image).

    Forms are recognised by content: REVERIE, LLaVA, LRV, RLHF-V and RLAIF-V, ScienceQA, A-OKVQA, and what `reverie
    annotate` writes. Run again after an interruption: finished shards stay.
    """

    sources: Sources
    """FILE=FOLDER: an annotation file and the folder of its pictures (`pictures` beside the file by default). What several
    files say about one picture becomes one record."""
    out: Path
    """Folder for the records."""
    mixture: Path | None = None
    """JSON list of further sources: {"file", "pictures", "cap", "weight", "filtered", "splits"}; all but "file" optional."""
    seed: int = 0
    """Decides which conversations a cap keeps."""
    longest_side: int | None = None
    """Scale larger pictures down to this, as JPEG; by default every picture stays as it is, byte for byte."""
    jobs: int | None = None
    """Threads that read pictures and write; one a core by default."""

    def run(self) -> None:
        from reverie_jax.cli import data as command

        command.build(self)


@dataclasses.dataclass(frozen=True)
class Check:
    """Read every row of an annotation file and open every picture: what is wrong is listed before it is trained on."""

    annotations: Positional[Path]
    """Any file that `reverie data build` reads."""
    pictures: Path | None = None
    """Folder of pictures; `pictures` beside the file by default, where there is one."""
    model: str | None = None
    """Checkpoint to train: counts tokens, and names what is beyond its context."""
    offenders: Path | None = None
    """Write what is wrong, one JSON object a line."""
    fix: Path | None = None
    """Write the file without the rows that cannot be used here."""

    def run(self) -> None:
        from reverie_jax.cli import data as command

        command.check(self)


@dataclasses.dataclass(frozen=True)
class Stats:
    """Count what is in annotation files or records: instructions, negatives, question types, lengths of rationales."""

    sources: Sources
    """FILE=FOLDER, as for build, or a folder of records."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from reverie_jax.cli import data as command

        command.stats(self)


@dataclasses.dataclass(frozen=True)
class Leak:
    """Find evaluation pictures in training data: by name, and by how they look. Ends with exit code 1 if there are any."""

    sources: Sources
    """FILE=FOLDER, as for build, or a folder of records."""
    against: tuple[Path, ...]
    """Evaluation pictures: folders, or question files whose rows name them (`image`; by name alone)."""
    distance: int = 4
    """Pictures look alike whose 64-bit perceptual hashes differ in no more bits."""
    offenders: Path | None = None
    """Write what was found, as JSON lines."""

    def run(self) -> None:
        from reverie_jax.cli import data as command

        command.leak(self)


@dataclasses.dataclass(frozen=True)
class Show:
    """Write an HTML page of samples: pictures, conversation trees, and in colour what is taught."""

    sources: Sources
    """FILE=FOLDER, as for build, or a folder of records."""
    out: Path = Path("samples.html")
    """The page."""
    model: str = "scenes-base"
    """Checkpoint whose template and tokens are shown; parts separated by commas."""
    count: int = 12
    """Records."""
    seed: int = 0
    """Draws them."""
    teach: tuple[str, ...] = ()
    """Show what an arm teaches, in a recipe's words: `--teach kinds=negative context=positive-first`."""

    def run(self) -> None:
        from reverie_jax.cli import data as command

        command.show(self)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Hand human questions (ScienceQA, A-OKVQA) to `reverie annotate`, which asks why the wrong options are wrong."""

    annotations: Positional[Path]
    """ScienceQA's problems.json or A-OKVQA's file."""
    out: Path
    """Folder to annotate: reasoning_instruct_data.json is written there. Go on with `reverie annotate rationales`."""
    wrong: int = 3
    """Wrong options of a question."""
    splits: tuple[str, ...] = ("train",)
    """Rows of these splits."""

    def run(self) -> None:
        from reverie_jax.cli import data as command

        command.questions(self)


@dataclasses.dataclass(frozen=True)
class Data:
    """From annotation files to records: check, count, look, find leaks, build."""

    action: OmitArgPrefixes[
        Annotated[Build, subcommand("build")]
        | Annotated[Check, subcommand("check")]
        | Annotated[Stats, subcommand("stats")]
        | Annotated[Leak, subcommand("leak")]
        | Annotated[Show, subcommand("show")]
        | Annotated[Questions, subcommand("questions")]
    ]

    def run(self) -> None:
        self.action.run()

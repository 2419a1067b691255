"""`reverie data`."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from reverie_jax.cli import common, data_beam
from reverie_jax.cli.common import mixture_entries
from reverie_jax.cli.data_index import Index, prepare_for_build
from reverie_jax.cli.data_questions import Questions
from reverie_jax.cli.data_review import Review
from reverie_jax.cli.data_sources import open_sources, records_of, split_sources
from reverie_jax.errors import UserError
from reverie_jax.files import atomic_write

if TYPE_CHECKING:
    from reverie_jax.cli.data_sources import Sources
    from reverie_jax.data.conversation import Conversation
    from reverie_jax.data.mixture import MixtureEntry
    from reverie_jax.data.pipeline import TreeBuilder
    from reverie_jax.data.processor import Processor
    from reverie_jax.data.sources import ReadLog
    from reverie_jax.data.sources.marks import Marks
    from reverie_jax.data.supervision import Supervision

_ROWS = 20
"""Maximum rows in a table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """Build records (ArrayRecord, one record an image) from annotation files and image folders.

    Formats are recognized by content: REVERIE, LLaVA, LRV, mPLUG-Owl, RLHF-V and RLAIF-V, ScienceQA, A-OKVQA, and what
    `reverie annotate` writes. Conversations of several files about one image become one record. Run the same command
    again after an interruption: finished shards are kept.
    """

    sources: Annotated[Positional[tuple[str, ...]], common.option("FILE[=FOLDER] ...")]
    """Annotation files, each with its image folder; `images` beside the file if omitted. hub:owner/name@revision/FILE is
    a file on the Hugging Face hub, or hub:owner/name the only one there."""
    out: Annotated[Path, common.FOLDER]
    """Output folder: the records."""
    mixture: Annotated[Path | None, common.FILE] = None
    """JSON list of more sources: {"file", "images", "cap", "weight", "filtered", "splits"}; only "file" is required."""
    marks: Annotated[Path | None, common.FILE] = None
    """File of marks: written by `reverie data review`; bad rows are left out, edited texts are used."""
    seed: common.Seed = 0
    max_side: Annotated[int | None, common.option("PIXELS")] = None
    """Downscale larger images to this side, as JPEG; images are kept byte for byte if omitted."""
    jobs: Annotated[int | None, common.N] = None
    """Threads that read images and write records; one for each core if omitted."""
    overwrite: Annotated[bool, common.FLAG] = False
    """Replace the records in the output folder; they are kept until the new ones are complete."""
    sizes: Annotated[str | None, common.option("MODEL")] = None
    """Checkpoint to be trained: writes its index of sizes too, as `reverie data index` does; needs --recipe."""
    components: common.Components = ()
    recipe: Annotated[str | None, common.option("RECIPE")] = None
    """Recipe of the runs, a name or a YAML file, for --sizes."""
    set: common.RecipeFields = ()
    engine: data_beam.Engine = "local"
    beam: data_beam.Beam = ()
    push_to_hub: common.PushToHub = None
    public: common.Public = False

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.data.records import NAME, work_folder
        from reverie_jax.data.sources import ReadLog
        from reverie_jax.data.sources.marks import Marks
        from reverie_jax.hub import datasets, publish, repository

        common.check_at_least(1, max_side=self.max_side, jobs=self.jobs)
        options = data_beam.pipeline_options(self.engine, self.beam, jobs=self.jobs)
        if (self.out / NAME).exists() and not self.overwrite:
            raise UserError(
                f"{self.out}: already has records; choose another output folder, or replace them with --overwrite"
            )
        write_index = prepare_for_build(self.sizes, self.recipe, self.components, common.joined(self.set))
        marks = None if self.marks is None else Marks.read(self.marks)
        if self.push_to_hub is not None:
            repository.check_access(self.push_to_hub, "dataset", public=self.public)
        mixed, log = mixture_entries((), self.mixture), ReadLog()
        entries = [*mixture_entries(self.sources), *mixed]
        if not entries:
            raise UserError("name at least one annotation file, as FILE=FOLDER")
        with work_folder(self.out) as work:
            if options is None:
                folder, images, texts, conversations = self._build(entries, log, marks, work)
            else:
                from reverie_jax.beam import build as pipeline

                fields: Any = {"seed": self.seed, "max_side": self.max_side, "marks": marks}
                with data_beam.noted(log):
                    built = pipeline.build(entries, self.out, work, log, options, **fields)
                    folder, images, texts, conversations = built
        names = [common.split_source(source)[0] for source in self.sources]
        datasets.write_sources(self.out, [*names, *(str(entry.file) for entry in mixed)])
        without = f"{texts} texts without an image, " if texts else ""
        print(f"{images} images, {without}{conversations} conversations: {folder}")
        write_index(folder)
        if self.push_to_hub is not None:
            print(publish.publish_records(self.out, self.push_to_hub))

    def _build(
        self, entries: list[MixtureEntry], log: ReadLog, marks: Marks | None, work: Path
    ) -> tuple[Path, int, int, int]:
        """Build records here; return their folder, and numbers of images, texts and conversations."""
        from reverie_jax.data.mixture import read_mixture
        from reverie_jax.data.records import write_records
        from reverie_jax.data.sources import NO_CONVERSATION
        from reverie_jax.progress import ProgressBars

        with ProgressBars() as bars:

            def on_read(count: int) -> None:
                bars.update("conversations read", count, None)

            store = work / "rows.sqlite"
            options: Any = {"seed": self.seed, "max_side": self.max_side, "marks": marks, "on_progress": on_read}
            with read_mixture(entries, log, store, **options) as records:
                common.note(log.notes)
                if not len(records):
                    raise UserError(f"{', '.join(str(entry.file) for entry in entries)}: {NO_CONVERSATION}")
                written = 0

                def on_written(count: int) -> None:
                    nonlocal written
                    written += count
                    bars.update("records written", written, len(records))

                jobs = self.jobs or common.cpu_count()
                folder = write_records(self.out, {"train": records}, work=work, jobs=jobs, on_progress=on_written)
                return folder, records.image_count, len(records) - records.image_count, records.conversation_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Validate an annotation file before training: read every row, open every image, list what is wrong.

    Exits with 1 if rows are unusable and --fix is not given, and with 2 if --fix would leave no row.
    """

    annotations: Annotated[Positional[Path], common.FILE]
    """Annotation file in any format that `reverie data build` reads."""
    images: Annotated[Path | None, common.FOLDER] = None
    """Folder of images; `images` beside the file if omitted."""
    model: Annotated[str | None, common.option("MODEL")] = None
    """Checkpoint to be trained: counts tokens, reports conversations beyond its context or without supervision."""
    components: common.Components = ()
    recipe: Annotated[str | None, common.option("RECIPE")] = None
    """Recipe of the run, a name or a YAML file: reports conversations that do not fit its sequences; needs --model."""
    set: common.RecipeFields = ()
    details: common.Details = None
    fix: Annotated[Path | None, common.FILE] = None
    """Write the annotation file without its unusable rows to this file, in the same form."""
    engine: data_beam.Engine = "local"
    beam: data_beam.Beam = ()

    def run(self) -> None:
        """Run the command."""
        from rich.console import Console

        from reverie_jax.data import check, stats

        fields = {name: getattr(self, name) for name in ("model", "components", "recipe", "set")}
        options = data_beam.pipeline_options(self.engine, self.beam, **fields)
        images = common.find_images_folder(self.images, self.annotations)
        processor, builder = self._training()
        _check_outputs([self.annotations], self.details, self.fix)
        if options is None:
            result = check.check(self.annotations, images, processor, builder)
        else:
            from reverie_jax.beam import check as pipeline

            result = pipeline.check(self.annotations, images, options)
        common.note(result.notes)
        if images is None:
            common.note(["no image folder was given; images were not opened"])
        console = Console()
        console.print(stats.stats_table(result.stats, result.lengths))
        if result.problems:
            console.print(check.problems_table(result))
        if self.details is not None:
            check.write_problems(result, self.details)
        if self.fix is not None:
            print(f"{check.write_usable_rows(result, self.annotations, self.fix)} rows: {self.fix}")
        if result.has_unusable_rows and self.fix is None:
            raise SystemExit(1)

    def _training(self) -> tuple[Processor | None, TreeBuilder | None]:
        """Return what prepares the data of the training run, as far as model and recipe are given."""
        if self.model is None:
            if self.recipe is not None or self.set:
                raise UserError("--recipe and --set need --model: its tokenizer decides how long a conversation is")
            return None, None
        from reverie_jax.data.pipeline import TreeBuilder
        from reverie_jax.loading import load_processor

        if self.recipe is None:
            if self.set:
                raise UserError("--set changes fields of a recipe; name it with --recipe")
            return load_processor(self.model, components=self.components), None
        from reverie_jax.train import recipes

        recipe = recipes.override(recipes.read_recipe(self.recipe), common.joined(self.set))
        processor = load_processor(self.model, components=self.components, template=recipe.template)
        processor = processor.override(image_aspect_ratio=recipe.image_aspect_ratio)
        supervision = recipe.preference or recipe.supervision
        return processor, TreeBuilder(processor, recipe.sequence, supervision, recipe.prefix_sharing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Count what annotation files or records contain: instructions, negatives, question types, rationale lengths."""

    sources: common.Sources
    json: common.Json = False
    engine: data_beam.Engine = "local"
    beam: data_beam.Beam = ()

    def run(self) -> None:
        """Run the command."""
        from rich.console import Console

        from reverie_jax.data import stats
        from reverie_jax.data.mixture import Mixture
        from reverie_jax.data.sources import ReadLog

        def examples(sources: Sources) -> Iterator[tuple[str, Conversation]]:
            for source in sources:
                if isinstance(source, Mixture):
                    yield from source.conversations()
                    continue
                for record in records_of([source]):
                    yield from ((record.id if record.image else "", item) for item in record.conversations)

        if (options := data_beam.pipeline_options(self.engine, self.beam)) is None:
            with open_sources(self.sources) as sources:
                numbers = stats.compute_stats(examples(sources))
        else:
            from reverie_jax.beam import stats as pipeline

            with data_beam.noted(ReadLog()) as log:
                numbers = pipeline.compute_stats(*split_sources(self.sources), log, options)
        if self.json:
            print(jsonlib.dumps(numbers, indent=2))
        else:
            Console().print(stats.stats_table(numbers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contamination:
    """Find evaluation images in training data, by name and by perceptual hash. Exits with 1 if there are any."""

    sources: common.Sources
    eval_images: Annotated[common.Several[Path], common.option("PATH ...")] = ()
    """Required. Evaluation images: folders, or question files whose rows name images (`image`; compared by name alone)."""
    distance: Annotated[int, common.option("BITS")] = 4
    """Maximum number of differing bits between 64-bit perceptual hashes of similar images."""
    details: common.Details = None
    engine: data_beam.Engine = "local"
    beam: data_beam.Beam = ()

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.data import contamination
        from reverie_jax.data.sources import ReadLog

        options = data_beam.pipeline_options(self.engine, self.beam)
        common.check_at_least(0, distance=self.distance)
        paths = common.require(common.joined(self.eval_images), "--eval-images", "name folders or question files")
        _check_outputs([*_files(self.sources), *paths], self.details)
        common.check_writable(self.details)
        threads = common.cpu_count()
        evaluation = contamination.read_evaluation_images(paths, threads)
        common.note(f"{reason}; not compared" for reason in evaluation.unreadable)
        if options is None:
            with open_sources(self.sources) as sources:
                images = ((record.id, record.image) for record in records_of(sources) if record.image)
                matches = list(
                    contamination.find_matches(images, evaluation, max_distance=self.distance, threads=threads)
                )
                count = sum(map(len, sources))
        else:
            from reverie_jax.beam import contamination as pipeline

            matcher, log = contamination.Matcher(evaluation, self.distance), ReadLog()
            with data_beam.noted(log):
                matches, count = pipeline.find_matches(*split_sources(self.sources), matcher, log, options)
        if self.details is not None:
            lines = [jsonlib.dumps(dataclasses.asdict(match), ensure_ascii=False) for match in matches]
            atomic_write(self.details, "".join(line + "\n" for line in lines))
        self._print(matches, count, len(evaluation.hashes))
        if matches:
            raise SystemExit(1)

    def _print(self, matches: list[Any], records: int, images: int) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("matched by", "training image", "evaluation image", "bits apart")
        for match in matches[:_ROWS]:
            distance = "" if match.distance is None else str(match.distance)
            table.add_row(match.matched_by, Text(match.training), Text(match.evaluation), distance)
        if matches:
            Console().print(table)
        more = f" ({len(matches) - _ROWS} more; --details writes all)" if len(matches) > _ROWS else ""
        training = len({match.training for match in matches})
        print(f"{training} of {records:,} records match one of {images:,} evaluation images{more}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visualize:
    """Write an HTML page of samples: images, conversation trees, and the supervised tokens in color."""

    sources: common.Sources
    model: common.Model
    out: Annotated[Path, common.FILE]
    """Output file: an HTML page."""
    components: common.Components = ()
    count: Annotated[int, common.N] = 12
    """Records on the page, drawn at random."""
    seed: common.Seed = 0
    supervision: Annotated[common.Several[str], common.option("SETTING ...")] = ()
    """Supervision to show, in a recipe's fields: `kinds=negative context=positive-first`."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.data import visualize
        from reverie_jax.loading import load_processor

        common.check_at_least(1, count=self.count)
        _check_outputs(_files(self.sources), self.out)
        supervision = parse_supervision(common.joined(self.supervision))
        processor = load_processor(self.model, components=self.components)
        with open_sources(self.sources) as sources:
            entries = [(source, index) for source in sources for index in range(len(source))]
            chosen = random.Random(self.seed).sample(entries, min(self.count, len(entries)))
            title = f"Samples of {', '.join(Path(source.partition('=')[0]).name for source in self.sources)}"
            records = (source[index] for source, index in chosen)
            count = visualize.write_page(self.out, records, processor, supervision, title)
        print(f"{count} records: {self.out}")


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepare training data: check, review, count, visualize, find contamination, build and index records."""

    action: OmitArgPrefixes[
        Annotated[Build, subcommand("build")]
        | Annotated[Check, subcommand("check")]
        | Annotated[Stats, subcommand("stats")]
        | Annotated[Contamination, subcommand("contamination")]
        | Annotated[Visualize, subcommand("visualize")]
        | Annotated[Questions, subcommand("questions")]
        | Annotated[Review, subcommand("review")]
        | Annotated[Index, subcommand("index")]
    ]

    def run(self) -> None:
        """Run the subcommand."""
        self.action.run()


def _files(sources: Sequence[str]) -> list[Path]:
    """Return the annotation files, or records folders, of FILE=FOLDER arguments."""
    return [entry.file for entry in mixture_entries(sources)]


def _check_outputs(inputs: Sequence[Path], *outputs: Path | None) -> None:
    """Check, before the work, that output files replace neither an input nor each other.

    Raises:
        UserError: they would, or an output's folder does not exist.
    """
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise UserError(f"{path}: its folder does not exist")
        if path.resolve() in taken:
            raise UserError(f"{path}: is another file of this command; choose another name")
        taken.add(path.resolve())


def parse_supervision(settings: Sequence[str]) -> Supervision:
    """Return the supervision that `field=value` settings describe.

    Raises:
        UserError: a field is unknown, or a value is not one of its choices.
    """
    import pydantic

    from reverie_jax.data.supervision import Supervision

    fields = dict(setting.partition("=")[::2] for setting in settings)
    known = [field.name for field in dataclasses.fields(Supervision)]
    if unknown := fields.keys() - set(known):
        raise UserError(f"--supervision {min(unknown)}: must be {', '.join(known)}")
    try:
        return pydantic.TypeAdapter(Supervision).validate_python(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--supervision {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

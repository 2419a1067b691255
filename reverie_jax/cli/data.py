"""What `reverie data` does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pydantic
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from reverie_jax.cli import data_options as options
from reverie_jax.data import check as checks
from reverie_jax.data import contamination as leaks
from reverie_jax.data import stats as card
from reverie_jax.data import visualize as pages
from reverie_jax.data.conversation import Conversation, ImageRecord
from reverie_jax.data.mixture import Mixture, MixtureEntry, mixture, read_parts
from reverie_jax.data.records import RecordSource, building, write_records
from reverie_jax.data.row_files import Rows, write_list
from reverie_jax.data.sources import ReadLog, multiple_choice
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import UserError


def parts_of(sources: Sequence[str], file: Path | None = None) -> list[MixtureEntry]:
    """FILE=FOLDER each, and those of a mixture file."""
    found = []
    for source in sources:
        # A name may hold the sign itself.
        name, equals, folder = (source, "", "") if Path(source).exists() else source.rpartition("=")
        if not equals:
            name = source
        found.append(MixtureEntry(file=Path(name), pictures=Path(folder) if equals else None))
    return found + (read_parts(file) if file is not None else [])


def say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"reverie: {note}", file=sys.stderr)


@contextlib.contextmanager
def opened(sources: Sequence[str]) -> Iterator[Mixture | list[RecordSource]]:
    """Annotation files as a mixture, or folders of records.

    Raises:
        UserError: some of each, or one cannot be read.
    """
    if not sources:
        raise UserError("name at least one annotation file, as FILE=FOLDER, or a folder of records")
    folders = [Path(source).is_dir() for source in sources]
    if all(folders):
        yield [RecordSource(source) for source in sources]
        return
    if any(folders):
        raise UserError("name annotation files, or folders of records; not both")
    log = ReadLog()
    with mixture(parts_of(sources), log) as found:
        say(log.notes)
        yield found


def _records(found: Mixture | list[RecordSource]) -> Iterator[ImageRecord]:
    for source in [found] if isinstance(found, Mixture) else found:
        for index in range(len(source)):
            yield source[index]


def build(args: options.Build) -> None:
    parts, log, jobs = parts_of(args.sources, args.mixture), ReadLog(), args.jobs or os.cpu_count() or 1
    if not parts:
        raise UserError("name at least one annotation file, as FILE=FOLDER")
    if args.longest_side is not None and args.longest_side < 1:
        raise UserError(f"--longest-side {args.longest_side}: must be at least 1")
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    console = Console(stderr=True)
    bar = Progress(*Progress.get_default_columns(), console=console, transient=True, disable=not console.is_terminal)
    with bar, building(args.out) as hidden:
        rows, store = bar.add_task("conversations read", total=None), hidden / "rows.sqlite"
        with mixture(
            parts,
            log,
            store,
            seed=args.seed,
            side=args.longest_side,
            on_progress=lambda n: bar.update(rows, completed=n),
        ) as found:
            say(log.notes)
            written = bar.add_task("images written", total=len(found))
            folder = write_records(
                args.out,
                {"train": found},
                hidden=hidden,
                jobs=jobs,
                on_progress=lambda count: bar.advance(written, count),
            )
            conversations = found.conversations
    print(f"{len(RecordSource(folder))} images, {conversations} conversations: {folder}")


def check(args: options.Check) -> None:
    pictures, beside = args.pictures, args.annotations.parent / "pictures"
    if pictures is None and beside.is_dir():
        pictures = beside
    processor = None
    if args.model is not None:
        from reverie_jax.loading import load_processor

        path, *base = args.model.split(",")
        processor = load_processor(path, base=base)
    for wanted in (args.offenders, args.fix):
        if wanted is not None and not wanted.parent.is_dir():
            raise UserError(f"{wanted}: there is no such folder to write to")
    found = checks.check(args.annotations, pictures, processor)
    say(found.notes)
    if pictures is None:
        say(["no folder of pictures was named; none was opened"])
    console = Console()
    numbers = card.statistics_of((talk.image, talk.conversation) for talk in found.talks)
    console.print(card.statistics_table(numbers, found.lengths))
    if found.offenders:
        console.print(checks.problems_table(found))
    if args.offenders is not None:
        checks.write_offenders(found, args.offenders)
    if args.fix is not None:
        print(f"{checks.write_clean(found, args.annotations, args.fix)} rows: {args.fix}")
    if found.broken and args.fix is None:
        raise SystemExit(1)


def stats(args: options.Stats) -> None:
    def talks(found: Mixture | list[RecordSource]) -> Iterator[tuple[str, Conversation]]:
        if isinstance(found, Mixture):
            yield from found.talks()
        else:
            for record in _records(found):
                yield from ((record.id if record.image else "", talk) for talk in record.conversations)

    with opened(args.sources) as found:
        numbers = card.statistics_of(talks(found))
    if args.json:
        print(json.dumps(numbers, indent=2))
    else:
        Console().print(card.statistics_table(numbers))


def leak(args: options.Leak) -> None:
    threads = os.cpu_count() or 1
    if args.distance < 0:
        raise UserError(f"--distance {args.distance}: must not be negative")
    if args.offenders is not None:
        _writable(args.offenders)
    against = leaks.evaluation(args.against, threads)
    say([f"{why}; it is not compared" for why in against.unreadable])
    with opened(args.sources) as found:
        pictures = ((record.id, record.image) for record in _records(found) if record.image)
        leaked = list(leaks.find(pictures, against, distance=args.distance, threads=threads))
        count = sum(map(len, [found] if isinstance(found, Mixture) else found))
    if args.offenders is not None:
        lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) for one in leaked]
        args.offenders.write_text("".join(line + "\n" for line in lines), "utf-8")
    table = Table("how", "training picture", "evaluation picture", "bits apart")
    for one in leaked[:20]:
        table.add_row(one.how, one.training, one.evaluation, "" if one.distance is None else str(one.distance))
    if leaked:
        Console().print(table)
    more = f" ({len(leaked) - 20} more; --offenders writes all)" if len(leaked) > 20 else ""
    training = len({one.training for one in leaked})
    print(f"{training} of {count:,} records show one of {len(against.looks):,} evaluation pictures{more}")
    if leaked:
        raise SystemExit(1)


def _writable(path: Path) -> None:
    """Before the work, not after it."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def show(args: options.Show) -> None:
    from reverie_jax.loading import load_processor

    if args.count < 1:
        raise UserError(f"--count {args.count}: must be at least 1")
    fields = dict(setting.partition("=")[::2] for setting in args.teach)
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(Supervision)}:
        known = ", ".join(field.name for field in dataclasses.fields(Supervision))
        raise UserError(f"--teach {min(unknown)}: must be {known}")
    try:
        supervision = pydantic.TypeAdapter(Supervision).validate_python(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--teach {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    path, *base = args.model.split(",")
    processor = load_processor(path, base=base)
    with opened(args.sources) as found:
        sources = [found] if isinstance(found, Mixture) else found
        places = [(source, index) for source in sources for index in range(len(source))]
        chosen = random.Random(args.seed).sample(places, min(args.count, len(places)))
        title = f"Samples of {', '.join(Path(source.partition('=')[0]).name for source in args.sources)}"
        count = pages.write(args.out, (source[index] for source, index in chosen), processor, supervision, title)
    print(f"{count} records: {args.out}")


def questions(args: options.Questions) -> None:
    from reverie_jax.annotate.pipeline import QUESTIONS

    log = ReadLog()
    if args.wrong < 1:
        raise UserError(f"--wrong {args.wrong}: must be at least 1")
    made = multiple_choice.questions(Rows(args.annotations), log, splits=args.splits, most=args.wrong)
    say(log.notes)
    if log.problems:
        say([f"{where}: {why}; left out" for where, why in log.problems[:5]])
        if len(log.problems) > 5:
            say([f"{len(log.problems) - 5} more rows are left out"])
    if not made:
        raise UserError(f"{args.annotations}: has no question with options and a picture in {', '.join(args.splits)}")
    path = args.out / QUESTIONS
    if path.exists():
        raise UserError(f"{path}: is there already; name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_list(path, made)
    print(f"{len(made)} rows: {path}")

"""What commands share: options, models, mesh, dtype, bounds, output files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from tyro.conf import Positional, UseAppendAction, arg

from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from reverie_jax.data.mixture import MixtureEntry
    from reverie_jax.data.processor import Processor
    from reverie_jax.models import VisionLanguageModel

_T = TypeVar("_T")

DTYPES = ("float32", "bfloat16")
CONTRASTS = ("", "image", "instruction", "nothing")
ONE_DEVICE = "data=1,fsdp=1,tensor=1"


def option(metavar: str, help: str | None = None) -> Any:
    """Return the annotation of an option.

    Args:
        metavar: stands for the value in `--help`.
        help: replaces the field's docstring; for options that several commands share.
    """
    return arg(metavar=metavar, help=help, help_behavior_hint=_default_hint)


def _default_hint(default: str) -> str:
    return "" if default in ("None", "", "''") else f"(default: {default})"


FILE, FOLDER, N, NUMBER = map(option, ("FILE", "FOLDER", "N", "NUMBER"))
FLAG = arg(help_behavior_hint="")

Several = UseAppendAction[tuple[tuple[_T, ...], ...]]
"""Type of an option with several values, which may be repeated (`--x a b --x c`); `joined` returns them. None are needed."""

# Options of several commands: one name, one type, one help text.
Model = Annotated[
    str,
    option("MODEL", "Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base."),
]
Components = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        metavar="MODEL",
        help="Checkpoint of a part that the model lacks: language model, vision tower, … Repeat for each part.",
        help_behavior_hint="",
    ),
]
Adapter = Annotated[
    str | None,
    option(
        "ADAPTER", "PEFT adapter (a folder, or a PeftModel's file), LLaVA LoRA folder or run folder; none if omitted."
    ),
]
Template = Annotated[
    str | None,
    option("NAME", "Chat template that the model was tuned with; recognized from its files if omitted."),
]
Protocol = Annotated[
    str,
    option(
        "NAME",
        "Template and decoding as published: lrv-minigpt4, lrv-mplug-owl or rlhfv-muffin; other options win over it.",
    ),
]
Dtype = Annotated[
    str,
    option(
        "DTYPE",
        "Dtype of weights and computation: float32, bfloat16, or auto (bfloat16 on accelerators, float32 on CPUs).",
    ),
]
MeshSpec = Annotated[str, option("AXES", "Devices of each mesh axis; omitted axes have size 1.")]
Distributed = Annotated[
    str,
    option(
        "PROCESSES",
        "Join other processes: auto (SLURM, Open MPI, Kubernetes, TPU pod), or address:port,processes,index.",
    ),
]
Recipe = Annotated[
    Positional[str],
    option(
        "RECIPE", "Name of a recipe (`reverie recipes` lists them) or a YAML file, as `reverie recipes NAME` prints it."
    ),
]
RecipeFields = Annotated[
    Several[str],
    arg(
        metavar="FIELD=VALUE ...",
        help="Recipe fields to change, as `steps=200 learning_rate=1e-4 sequence.length=512`; they win over the recipe.",
        help_behavior_hint="",
    ),
]
BenchmarkName = Annotated[
    Positional[str], option("BENCHMARK", "Name of the benchmark; `reverie benchmarks` lists them.")
]
Predictions = Annotated[
    Path,
    option(
        "FILE",
        "Answer file: JSON lines with question_id and text, the benchmark's own form, samples of lmms-eval, or a table of "
        "VLMEvalKit.",
    ),
]
Sources = Annotated[
    Positional[tuple[str, ...]],
    option(
        "FILE[=FOLDER] ...",
        "Annotation files as for `reverie data build`, each with its image folder; or records folders.",
    ),
]
Judges = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="MODEL", help_behavior_hint="")]
Details = Annotated[Path | None, option("FILE", "Write all rows of the result to this file, as JSON lines.")]
MaxNewTokens = Annotated[int | None, option("N")]
Steps = Annotated[int | None, option("N", "Optimizer steps; the recipe's if omitted.")]
Seed = Annotated[int, option("N", "Random seed.")]
Contrast = Annotated[
    str,
    option(
        "KIND",
        "Contrast with answers to a noisy image (image, VCD), to a disturbing instruction (instruction, ICD) or without the"
        " image (nothing: the language prior alone).",
    ),
]
Json = Annotated[bool, arg(help="Print one JSON object.", help_behavior_hint="")]
PushToHub = Annotated[
    str | None,
    option(
        "OWNER/NAME",
        "Upload the result to this repository on the Hugging Face hub, which is created if missing; needs HF_TOKEN.",
    ),
]
Public = Annotated[bool, arg(help="Make a new repository public; it is private if omitted.", help_behavior_hint="")]
DryRun = Annotated[
    bool, arg(help="Print the number of requests and tokens and the cost; send nothing.", help_behavior_hint="")
]


def joined(groups: Iterable[Sequence[_T]]) -> list[_T]:
    """Return the values of an option that may be repeated, each time with several values."""
    return [value for group in groups for value in group]


def flag(name: str) -> str:
    """Return an option as it is typed: `batch_size` is `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def check_at_least(least: float, **options: float | None) -> None:
    """Check lower bounds; options that are None pass.

    Raises:
        UserError: an option is below `least`.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"{flag(name)} {value}: must be at least {least:g}")


def check_positive(**options: float | None) -> None:
    """Check that options are above 0; those that are None pass.

    Raises:
        UserError: an option is 0 or negative.
    """
    for name, value in options.items():
        if value is not None and value <= 0:
            raise UserError(f"{flag(name)} {value}: must be more than 0")


def check_choice(choices: Sequence[str], **options: str) -> None:
    """Check options against their choices.

    Raises:
        UserError: an option is not one of the choices.
    """
    for name, value in options.items():
        if value not in choices:
            raise UserError(f"{flag(name)} {value}: must be {' or '.join(filter(None, choices))}")


def check_template(name: str | None, protocol: str = "") -> str | None:
    """Return the name of the chat template: the one given, or the decoding protocol's; None for the checkpoint's.

    Raises:
        UserError: a name is unknown.
    """
    from reverie_jax.data.templates import TEMPLATES

    if protocol:
        from reverie_jax.eval.protocols import PROTOCOLS

        check_choice(tuple(PROTOCOLS), protocol=protocol)
        name = name or PROTOCOLS[protocol]["template"]
    if name is not None:
        check_choice(tuple(TEMPLATES), template=name)
    return name


def require(value: Any, option: str, what: str) -> Any:
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
    from reverie_jax.models.sharding import make_mesh, parse_mesh_axes

    try:
        sizes: dict[str, Any] = {**parse_mesh_axes(text)}
        return make_mesh(**sizes)
    except ValueError as error:
        raise UserError(f"--mesh {text}: {error}") from None


def parse_dtype(name: str, choices: tuple[str, ...] = DTYPES, *, auto: bool = True) -> DTypeLike:
    """Return the dtype of that name; `auto` is bfloat16 on accelerators and float32 on CPUs.

    Raises:
        UserError: it is not one of the choices.
    """
    import jax
    import jax.numpy as jnp

    if auto and name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    check_choice(choices, dtype=name)
    return jnp.dtype(name)


def load_merged(
    model: str, components: Sequence[str], adapter: str | None, dtype: str = "auto", template: str | None = None
) -> tuple[VisionLanguageModel, Processor]:
    """Load a checkpoint for inference, its adapters merged and its layers unstacked, and its processor.

    Raises:
        CheckpointError: it cannot be used.
    """
    from reverie_jax.loading import load_model
    from reverie_jax.models import lora

    sources: Any = {"components": components, "adapter": adapter, "template": template}
    merged, processor = load_model(model, **sources, dtype=parse_dtype(dtype))
    lora.merge(merged)
    merged.decoder.unstack()
    return merged, processor


def mixture_entries(sources: Sequence[str], file: Path | None = None) -> list[MixtureEntry]:
    """Return the entries of FILE=FOLDER arguments, then those of a mixture file. Files on the hub are downloaded."""
    from reverie_jax.data.mixture import MixtureEntry, read_mixture_file
    from reverie_jax.hub.datasets import PREFIX, fetch_annotations

    entries = []
    for name, folder in map(split_source, sources):
        is_there = not name.startswith(PREFIX) or Path(name).exists()
        files = (Path(name),) if is_there else fetch_annotations(name, images=folder is None)
        entries += [MixtureEntry(file=path, images=folder) for path in files]
    return entries + ([] if file is None else read_mixture_file(file))


def split_source(source: str) -> tuple[str, Path | None]:
    """Return the file and the folder of a FILE=FOLDER argument; a file's name may contain the sign itself."""
    name, equals, folder = (source, "", "") if Path(source).exists() else source.rpartition("=")
    return (name, Path(folder)) if equals else (source, None)


def find_images_folder(images: Path | None, annotations: Path) -> Path | None:
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


def cpu_count() -> int:
    """Return the number of cores, at least 1."""
    return os.cpu_count() or 1

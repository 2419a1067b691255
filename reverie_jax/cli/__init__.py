"""The `reverie` command. Each command calls one function; everything heavy is imported when a command runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from reverie_jax.cli.annotate_options import Annotate
from reverie_jax.cli.data_options import Data
from reverie_jax.cli.eval_options import Eval, Judge, Report, Score
from reverie_jax.cli.plan import Plan
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.typing import DTypeLike

    from reverie_jax.data.processor import Processor
    from reverie_jax.models import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Demo:
    """Do the whole main job on the embedded world: build data, tune twice, measure, report. Minutes on two CPU cores."""

    out: Path = Path("runs/demo")
    """Run folder: report.html, report.json, data, checkpoints, predictions."""
    seeds: int = 1
    """Repeat both arms this many times, each on training data and randomness of its own."""
    train_images: int = 3200
    """Pictures to tune on."""
    test_images: int = 250
    """Held-out pictures to measure on."""
    steps: int | None = None
    """Optimizer steps of each arm; the recipe's own by default."""
    base: str = "scenes-base"
    """Checkpoint to start from; the small base that ships with the package by default."""

    def run(self) -> None:
        from reverie_jax.scenes import demo

        size = demo.DemoSize(train_images=self.train_images, test_images=self.test_images, steps=self.steps)
        demo.run(self.out, size=size, seeds=self.seeds, base=self.base)


@dataclasses.dataclass(frozen=True)
class Train:
    """Tune LoRA adapters and the projector with a named recipe. Run again to resume."""

    recipe: Positional[str]
    """Name of a recipe; `reverie recipes` lists them."""
    data: Path
    """Records, as `reverie data build` wrote them."""
    out: Path
    """Run folder: checkpoints, metrics.jsonl, tensorboard, run.json."""
    base: str = "scenes-base"
    """Checkpoint: a folder or hub id of any format that `reverie convert` reads; parts separated by commas."""
    adapter: str | None = None
    """Adapters to tune further: PEFT or LLaVA LoRA folder, or run folder. Fresh ones by default."""
    mesh: str = "data=1,fsdp=1,tensor=1"
    """Devices by axis."""
    distributed: str = ""
    """One of several processes: `auto` (SLURM, Open MPI, Kubernetes, TPU pod), or address:port,processes,number."""
    cache_vision: Path | None = None
    """Folder for the frozen tower's features of every picture, counted once; the records' pictures are not read again."""
    profile: bool = False
    """Leave a trace of a few steps in the run folder."""
    watch: bool = False
    """Serve TensorBoard while it trains (needs the tensorboard package)."""
    set: tuple[str, ...] = ()
    """Recipe fields to change: `--set steps=200 rate=1e-4 row.tokens=512`."""
    dtype: str = "float32"
    """Of the base's matrices and of the computation: float32 or bfloat16. What is tuned is float32 always."""
    resume: bool = True
    """Go on from the newest checkpoint in the run folder; --no-resume refuses a folder that holds one."""

    def run(self) -> None:
        from reverie_jax.data.records import RecordSource
        from reverie_jax.loading import bare, load_model, load_with_projector
        from reverie_jax.train import recipes
        from reverie_jax.train.distributed import join
        from reverie_jax.train.loop import train
        from reverie_jax.train.metrics import serve

        join(self.distributed)
        recipe = recipes.override(recipes.recipe(self.recipe), self.set)
        source = RecordSource(self.data)
        mesh = parse_mesh(self.mesh)
        path, *parts = self.base.split(",")
        where: Any = {"mesh": mesh, "dtype": parse_dtype(self.dtype)}
        if recipe.trainable == "projector" and self.adapter is None and bare(path, parts):
            kind = recipe.projector_type
            model, processor = load_with_projector(path, base=parts, kind=kind, seed=recipe.seed, **where)
        else:
            model, processor = load_model(path, base=parts, adapter=self.adapter, **where)
        with serve(self.out) if self.watch else contextlib.nullcontext():
            result = train(
                model,
                processor,
                source,
                recipe,
                self.out,
                mesh=mesh,
                resume=self.resume,
                profile=self.profile,
                vision_cache=self.cache_vision,
            )
        found = result.dataset_stats
        print(
            f"{result.steps} steps in {result.seconds:.0f} s on {found.records} images "
            f"({found.tokens:,} tokens in trees, {found.flat_tokens:,} one by one): {self.out}"
        )


@dataclasses.dataclass(frozen=True)
class Ask:
    """Ask a model about a picture."""

    picture: Positional[Path]
    """PNG, JPEG or anything else that Pillow opens."""
    question: Positional[tuple[str, ...]]
    """One or more questions, each in quotes; the picture is encoded once."""
    model: str = "scenes-base"
    """Checkpoint: a folder or hub id of any format that `reverie convert` reads; parts separated by commas."""
    adapter: str | None = None
    """Run folder of `reverie train`, PEFT adapter or LLaVA LoRA folder."""
    new_tokens: int = 96
    """Longest answer, in tokens."""

    def run(self) -> None:
        from reverie_jax.data.conversation import IMAGE, Conversation, Turn
        from reverie_jax.data.images import decode
        from reverie_jax.data.pipeline import ImageQuestions
        from reverie_jax.eval.engine import Engine, EngineShape

        try:
            encoded = self.picture.read_bytes()
        except OSError as error:
            raise UserError(f"{self.picture}: cannot be read ({error.strerror})") from None
        decode(encoded, str(self.picture))
        model, processor = load_tuned(self.model, self.adapter)
        asked = [(n, Conversation((Turn("user", f"{IMAGE}\n{text}"),))) for n, text in enumerate(self.question)]
        engine = Engine(model, processor, EngineShape(batch_size=1))
        answers = engine.answer([ImageQuestions(str(self.picture), encoded, asked)], new_tokens=self.new_tokens)
        for number, text in enumerate(self.question):
            print(f"{text}\n  {answers[number]}")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn a checkpoint into another format, tuned elsewhere or tuned here."""

    src: Annotated[Positional[str], tyro.conf.arg(metavar="SRC")]
    """Folder, or hub id (owner/name@revision), recognised by its content: llava-hf, original LLaVA or LLaVA-pp (.bin or
    safetensors), their LoRA folders or a mm_projector.bin (with language model and CLIP as --base), Orbax."""
    dst: Annotated[Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder to write; it must not be there yet, and appears when it is whole."""
    to: str
    """llava-hf: transformers, vLLM. llava: the original's format. orbax: ours. Adapters are merged into all three.
    peft: adapters for transformers' class. llava-lora: adapters for the original's loader."""
    base: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What the source lacks: plain language model, CLIP. Give it once for each."""
    adapter: str | None = None
    """PEFT adapter, LLaVA LoRA folder or run folder of `reverie train` on the source."""
    dtype: str | None = None
    """float32, bfloat16 or float16, for a whole model; as stored by default."""
    shard_size: str = "5GB"
    """Largest file of weights."""

    def run(self) -> None:
        from reverie_jax.convert import convert

        known = ("float32", "bfloat16", "float16")
        dtype = None if self.dtype is None else parse_dtype(self.dtype, known)
        size = parse_size(self.shard_size)
        made = convert(
            self.src,
            self.dst,
            to=self.to,
            base=self.base,
            adapter=self.adapter,
            dtype=dtype,
            shard_bytes=size,
        )
        files = sorted(path for path in made.rglob("*") if path.is_file())
        print(f"{made}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB")


@dataclasses.dataclass(frozen=True)
class Recipes:
    """List the recipes, or print one as JSON."""

    name: Positional[str | None] = None
    """Recipe to print."""

    def run(self) -> None:
        from reverie_jax.train import recipes

        if self.name is not None:
            print(recipes.recipe(self.name).to_json())
            return
        for name, recipe in sorted(recipes.RECIPES.items()):
            length = f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs:g} epoch"
            what = f"LoRA r {recipe.rank}" if recipe.trainable == "lora" else recipe.trainable
            size = f"{length} of {recipe.batch_size} rows of {recipe.sequence.length}"
            taught = f"teaches {recipe.supervision.kinds}"
            if recipe.preference is not None:
                taught = f"prefers, beta {recipe.preference.beta:g}, gamma {recipe.preference.gamma:g}"
            print(f"{name:21} {what}; {taught}; {size}")


@dataclasses.dataclass(frozen=True)
class Render:
    """Draw scenes into a folder: pictures, exact scene graphs, and annotations or POPE questions."""

    out: Positional[Path]
    """Folder; pictures go into `pictures`, graphs into scenes.jsonl."""
    count: int = 100
    """Scenes."""
    questions: str = "rationales"
    """`rationales`: training scenes with reverie.json. `pope`: held-out scenes that break the prior, with POPE files."""
    size: int = 128
    """Side of a picture, in pixels."""
    seed: int = 0
    """The same seed draws the same scenes."""

    def run(self) -> None:
        from reverie_jax.scenes import dataset

        if self.count < 1 or self.size < 32:
            raise UserError("--count must be at least 1, and --size at least 32")
        if self.questions == "pope":
            dataset.make_test_set(self.out, self.count, size=self.size, seed=self.seed)
            print(f"{self.count} held-out scenes with POPE questions: {self.out}")
        elif self.questions == "rationales":
            made = dataset.make_training_set(self.out, self.count, size=self.size, questions=4, seed=self.seed)
            print(f"{self.count} training scenes, {made.conversations} conversations: {self.out}")
            for reason in made.dropped:
                print(f"dropped: {reason}", file=sys.stderr)
        else:
            raise UserError(f"--questions {self.questions}: must be rationales or pope")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Remake the small base from nothing (about half an hour on two CPU cores)."""

    out: Positional[Path]
    """Folder for the llava-hf checkpoint, its tokenizer and its card."""
    seed: int = 0
    """Fixes scenes, order and initial weights."""
    tower_steps: int | None = None
    """Steps of the vision tower's stage; the recipe's by default."""
    steps: int | None = None
    """Steps of the language stage; the recipe's by default."""

    def run(self) -> None:
        from reverie_jax.scenes import make_base as base

        base.make(self.out, seed=self.seed, tower_steps=self.tower_steps, steps=self.steps)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The embedded world: draw scenes, or remake the base that ships with the package."""

    action: OmitArgPrefixes[Annotated[Render, subcommand("render")] | Annotated[Pretrain, subcommand("pretrain")]]

    def run(self) -> None:
        self.action.run()


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Annotate, subcommand("annotate")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Score, subcommand("score")]
    | Annotated[Judge, subcommand("judge")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Ask, subcommand("ask")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Scenes, subcommand("scenes")]
)


def parse_mesh(text: str) -> Mesh:
    """A mesh from "data=2,fsdp=2,tensor=1"; axes left out are 1."""
    from reverie_jax.models.sharding import make_mesh, mesh_axes

    try:
        sizes: dict[str, Any] = {**mesh_axes(text)}
        return make_mesh(**sizes)
    except ValueError as error:
        raise UserError(f"--mesh {text}: {error}") from None


def parse_dtype(name: str, known: tuple[str, ...] = ("float32", "bfloat16")) -> DTypeLike:
    import jax.numpy as jnp

    if name not in known:
        raise UserError(f"--dtype {name}: must be {' or '.join(known)}")
    return jnp.dtype(name)


def load_tuned(model: str, adapter: str | None) -> tuple[VisionLanguageModel, Processor]:
    """A checkpoint with adapters merged in, in float32, and its processor."""
    import jax.numpy as jnp

    from reverie_jax.loading import load_model
    from reverie_jax.models import lora

    path, *base = model.split(",")
    loaded, processor = load_model(path, base=base, adapter=adapter, dtype=jnp.float32)
    lora.merge(loaded)
    return loaded, processor


def parse_size(text: str) -> int:
    """Bytes from "5GB", "300MB" or a plain number."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "": 1}
    match = re.fullmatch(r"(\d+)\s*(kb|mb|gb|)", text.strip().lower())
    if match is None or not int(match[1]):
        raise UserError(f"--shard-size {text}: write it as 5GB or 300MB")
    return int(match[1]) * units[match[2]]


def main() -> None:
    """Entry point. Errors of the user's to mend are one line on stderr and exit code 2."""
    # Torch is not wanted at run time; transformers says so at every start.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(level=logging.WARNING, format="reverie: %(message)s")
    logging.getLogger("reverie_jax").setLevel(logging.INFO)
    command = tyro.cli(
        Command,
        prog="reverie",
        description="Reflective instruction tuning of vision-language models: train on why, measure hallucination.",
        config=(OmitSubcommandPrefixes,),
    )
    try:
        command.run()
    except UserError as error:
        print(f"reverie: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

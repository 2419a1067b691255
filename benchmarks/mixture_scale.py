"""REVERIE's real proportions from files to packed sequences: memory, tokens with and without trees, packing.

    python -m benchmarks.mixture_scale FOLDER [--scale 1.0] [--tokenizer FOLDER]

Makes 71,558 small images and reverie.json with 254,177 conversations about them (115,280 questions, 138,897 wrong answers;
question types and lengths of rationales in the proportions of the dataset card), then runs `reverie data build` and packs
one epoch. Each stage is a separate process, whose peak memory is the kernel's (VmHWM), interpreter included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

IMAGES, QUESTIONS, WRONG = 71_558, 115_280, 138_897
STAGES = ("build", "pack")


@dataclasses.dataclass(frozen=True)
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for images, annotations and records (about 1.5 GB)."""
    scale: float = 1.0
    """Size, as a share of REVERIE's."""
    tokenizer: Path | None = None
    """Folder of a checkpoint's tokenizer; a small one by default, with more tokens per word."""
    patches: int = 576
    """Tokens of an image."""
    length: int = 4096
    """Tokens of a sequence."""
    images: int = 8
    """Maximum number of trees in a sequence."""
    stage: str | None = None
    """Run only this stage, in this process."""


def words() -> list[str]:
    """Return English words, from the package's prompts."""
    texts = (Path(__file__).parent.parent / "reverie_jax" / "annotate" / "prompts").glob("*.txt")
    return sorted(set(re.findall(r"[a-z]{2,}", " ".join(path.read_text("utf-8").lower() for path in sorted(texts)))))


def make(folder: Path, scale: float, side: int = 64) -> None:
    """Make different images, `side` pixels wide and 3/4 as high, and rows in the released format."""
    from PIL import Image

    rng, known = np.random.default_rng(0), np.asarray(words())
    images, questions, wrong = (max(1, round(count * scale)) for count in (IMAGES, QUESTIONS, WRONG))
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        blots = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        noise = rng.integers(-12, 13, (side * 3 // 4, side, 3))
        pixels = np.asarray(blots.resize((side, side * 3 // 4), Image.Resampling.BICUBIC)) + noise
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=85)
        (folder / "images" / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
    # Every image has a question and every question a wrong answer; the others are distributed at random.
    of_image = np.concatenate([np.arange(images), rng.integers(0, images, questions - images)])
    of_question = np.concatenate([np.arange(questions), rng.integers(0, questions, wrong - questions)])

    def random_words(count: float) -> str:
        return " ".join(rng.choice(known, max(1, int(count))))

    def answer(kind: int, right: bool) -> str:
        if kind > 1:
            return (("B", "A"), ("No", "Yes"))[kind - 2][right]
        return random_words(rng.integers(1, 5) if kind == 0 else rng.integers(12, 30)) + ("" if right else " instead")

    rows = []
    kinds = rng.choice(4, questions, p=(0.62, 0.20, 0.15, 0.03))
    questions_text = [f"{random_words(rng.lognormal(2.4, 0.4)).capitalize()}?" for _ in range(questions)]
    right = [answer(int(kind), True) for kind in kinds]
    prompts = [(int(n), "Explain why. Including any necessary facts or knowledge") for n in range(questions)]
    quoted = "Explain why this answer is wrong: {}. Including any necessary facts or knowledge."
    prompts += [(int(n), quoted.format(answer(int(kinds[n]), False))) for n in of_question]
    for index in rng.permutation(len(prompts)).tolist():
        question, prompt = prompts[index]
        # Half of the card's rationales exceed 25 words.
        turns = (
            questions_text[question],
            right[question],
            prompt,
            random_words(rng.lognormal(np.log(28), 0.5)).capitalize() + ".",
        )
        name = f"{of_image[question]:06d}.jpg"
        turns_json = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
        rows.append({"id": name[:-4], "image": name, "conversations": turns_json})
    (folder / "reverie.json").write_text(json.dumps(rows), "utf-8")


def processor(args: Args) -> Any:
    from reverie_jax.data.processor import Processor
    from reverie_jax.data.tokenization import Encoder, load_tokenizer
    from reverie_jax.scenes.tokenizer import train_tokenizer

    if args.tokenizer is None:
        tokenizer = train_tokenizer(4000, 0)
        encoder = Encoder(tokenizer, "vicuna_v1", args.patches, tokenizer.convert_tokens_to_ids("<image>"))
    else:
        encoder = Encoder(load_tokenizer(args.tokenizer), "vicuna_v1", args.patches, 32000, "llava")
    return Processor(encoder, 336)


def pack(args: Args) -> dict[str, Any]:
    """Pack one epoch of trees; images are not decoded."""
    import grain

    from reverie_jax.data.packing import SequenceShape
    from reverie_jax.data.pipeline import TreeBuilder, packed_sequences
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.supervision import Supervision

    records = RecordSource(args.folder / "records")
    shape = SequenceShape(length=args.length, images=args.images, edges=args.length)
    indices = grain.MapDataset.range(len(records)).seed(0).shuffle()
    sequences = tokens = flat = trees = 0
    for one in packed_sequences(indices, records, TreeBuilder(processor(args), shape, Supervision())):
        sequences += 1
        tokens += int((one.ends > np.arange(1, args.length + 1)).sum() + (one.flat_tokens > 0).sum())
        flat += int(one.flat_tokens.sum())
        trees += int((one.flat_tokens > 0).sum())
    return {"sequences": sequences, "trees": trees, "tokens": tokens, "flat_tokens": flat}


def run_stage(args: Args) -> dict[str, Any]:
    """Run one stage in this process; return its figures and the peak memory."""
    if args.stage == "pack":
        return pack(args) | peak()
    from reverie_jax.cli.data import Build

    with contextlib.redirect_stdout(sys.stderr):
        Build(sources=(str(args.folder / "reverie.json"),), out=args.folder / "records", overwrite=True).run()
    return peak()


def main(args: Args) -> None:
    if args.stage is not None:
        print(json.dumps(run_stage(args)))
        return
    if not (args.folder / "reverie.json").exists():
        make(args.folder, args.scale)
    stages = {}
    for stage in STAGES:
        started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.mixture_scale", *sys.argv[1:], "--stage", stage]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        stages[stage] = json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - started, 1)}
    packed = stages["pack"]
    ratios = {
        "flat_over_tree": round(packed["flat_tokens"] / packed["tokens"], 3),
        "packing": round(packed["tokens"] / (packed["sequences"] * args.length), 4),
    }
    print(json.dumps(stages | ratios))


def peak() -> dict[str, int]:
    """Return the peak resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text("utf-8")
    return {"peak_mb": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1000}  # type: ignore[index]


if __name__ == "__main__":
    main(tyro.cli(Args))

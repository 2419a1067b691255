"""REVERIE's real proportions from files to packed rows: memory, tokens as trees and one by one, packing.

    python -m benchmarks.mixture_scale FOLDER [--scale 1.0] [--tokenizer FOLDER]

Makes 71,558 small pictures and reverie.json with 254,177 conversations about them (115,280 questions, 138,897 wrong answers;
shares of question types and lengths of rationales as the dataset card has them), then runs `reverie data build` and packs
one epoch. Each stage is a process of its own, whose peak is what the kernel counts for it (VmHWM), the interpreter included.
"""

from __future__ import annotations

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
    """Where pictures, annotations and records go (about 1.5 GB)."""
    scale: float = 1.0
    """Share of REVERIE's size."""
    tokenizer: Path | None = None
    """Folder of a checkpoint's tokenizer; a small one by default, with more tokens a word."""
    patches: int = 576
    """Tokens of a picture."""
    tokens: int = 4096
    """Length of a row."""
    images: int = 8
    """Most trees of a row."""
    stage: str | None = None
    """Run this stage alone, in this process."""


def words() -> list[str]:
    """English words, from the package's own prompts."""
    texts = (Path(__file__).parent.parent / "reverie_jax" / "annotate" / "prompts").glob("*.txt")
    return sorted(set(re.findall(r"[a-z]{2,}", " ".join(path.read_text("utf-8").lower() for path in sorted(texts)))))


def make(folder: Path, scale: float, side: int = 64) -> None:
    """Pictures `side` pixels wide and three quarters high, each its own, and rows in the released form."""
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
    # Every picture has a question and every question a wrong answer; the others are spread.
    of_image = np.concatenate([np.arange(images), rng.integers(0, images, questions - images)])
    of_question = np.concatenate([np.arange(questions), rng.integers(0, questions, wrong - questions)])

    def said(count: float) -> str:
        return " ".join(rng.choice(known, max(1, int(count))))

    def answer(kind: int, right: bool) -> str:
        if kind > 1:
            return (("B", "A"), ("No", "Yes"))[kind - 2][right]
        return said(rng.integers(1, 5) if kind == 0 else rng.integers(12, 30)) + ("" if right else " instead")

    rows = []
    kinds = rng.choice(4, questions, p=(0.62, 0.20, 0.15, 0.03))
    asked = [f"{said(rng.lognormal(2.4, 0.4)).capitalize()}?" for _ in range(questions)]
    right = [answer(int(kind), True) for kind in kinds]
    prompts = [(int(n), "Explain why. Including any necessary facts or knowledge") for n in range(questions)]
    quoted = "Explain why this answer is wrong: {}. Including any necessary facts or knowledge."
    prompts += [(int(n), quoted.format(answer(int(kinds[n]), False))) for n in of_question]
    for place in rng.permutation(len(prompts)).tolist():
        question, prompt = prompts[place]
        # Half of the card's rationales exceed 25 words.
        turns = (asked[question], right[question], prompt, said(rng.lognormal(np.log(28), 0.5)).capitalize() + ".")
        name = f"{of_image[question]:06d}.jpg"
        talk = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
        rows.append({"id": name[:-4], "image": name, "conversations": talk})
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
    """One epoch of trees in rows; pictures stay packed away."""
    import grain

    from reverie_jax.data.packing import SequenceShape
    from reverie_jax.data.pipeline import packed_sequences
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.supervision import Supervision

    source, words_to = RecordSource(args.folder / "records"), processor(args)
    shape = SequenceShape(length=args.tokens, images=args.images, edges=args.tokens)
    numbers = grain.MapDataset.range(len(source)).seed(0).shuffle()
    rows = tokens = flat = trees = 0
    for row in packed_sequences(numbers, source, words_to, shape, Supervision()):
        rows += 1
        tokens += int((row.ends > np.arange(1, args.tokens + 1)).sum() + (row.flat_tokens > 0).sum())
        flat += int(row.flat_tokens.sum())
        trees += int((row.flat_tokens > 0).sum())
    return {"rows": rows, "trees": trees, "tokens": tokens, "flat_tokens": flat}


def main(args: Args) -> None:
    if args.stage == "pack":
        print(json.dumps(pack(args) | peak()))
        return
    if args.stage == "build":
        from reverie_jax.cli import data_options

        data_options.Build((str(args.folder / "reverie.json"),), args.folder / "records").run()
        print(json.dumps(peak()))
        return
    if not (args.folder / "reverie.json").exists():
        make(args.folder, args.scale)
    found = {}
    for stage in STAGES:
        started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.mixture_scale", *sys.argv[1:], "--stage", stage]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found[stage] = json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - started, 1)}
    packed = found["pack"]
    found["flat_over_tree"] = round(packed["flat_tokens"] / packed["tokens"], 3)
    found["packing"] = round(packed["tokens"] / (packed["rows"] * args.tokens), 4)
    print(json.dumps(found))


def peak() -> dict[str, int]:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text("utf-8")
    return {"peak_mb": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1000}  # type: ignore[index]


if __name__ == "__main__":
    main(tyro.cli(Args))

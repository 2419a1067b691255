"""Answers to POPE-like questions, ours against transformers' `generate`: the same weights, images and questions.

    python -m benchmarks.evaluate [--size tiny|small|7b] [--images N] [--questions 18] [--peer-images N] [--rounds N]

Prints one JSON object. Both sides decode greedily as many tokens as POPE's "Yes" and its end take. On the sizes with equal
weights both must produce the same tokens before anything is timed.

    peer    LlavaForConditionalGeneration.generate: a question per sequence with its own image, padded on the left as in its
            documentation, at the fastest of the tried batch sizes. Its images are decoded and normalized and its questions
            tokenized before the clock starts.
    prefix  the same with a prefix cache: the KV of what an image's questions share is computed once and copied for each
            of them, a batch holds whole images.
    ours    `eval.engine.Engine`: images are read, decoded and scaled and questions tokenized while the clock runs.

The peers answer about `--peer-images` of the images and ours about all of them; rates are questions per second. Rounds
alternate. On a GPU of a known kind the result includes utilization: model FLOPs of the prefill over the chip's peak, and the
bytes that decoding must read (weights once per step, KV cache once per step and sequence) over its bandwidth.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from PIL import Image

from benchmarks.train_sides import peer_device
from benchmarks.workload import SIZES, SPECIAL_IDS, small_tokenizer, spread
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import Processor
from reverie_jax.data.tokenization import Encoder
from reverie_jax.eval.benchmarks.interface import SHORT
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine, EngineShape
from reverie_jax.eval.schedule import Schedule
from reverie_jax.models import VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.models.config import CLIP_MEAN, CLIP_STD
from reverie_jax.train.plan.costs import Sizes

OBJECTS = [
    "cup",
    "plate",
    "apple",
    "chair",
    "table",
    "dog",
    "cat",
    "car",
    "bus",
    "tree",
    "book",
    "lamp",
    "bottle",
    "clock",
    "shoe",
    "flower",
    "fork",
    "spoon",
]


@dataclasses.dataclass(frozen=True)
class Args:
    size: Literal["tiny", "small", "7b"] = "small"
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and computation; bfloat16 by default for 7b, float32 for the others."""
    images: int = 500
    """Images that ours answers questions about."""
    questions: int = 18
    """Questions per image."""
    peer_images: int = 4
    """Images that the peer answers questions about in a round."""
    max_new_tokens: int = 2
    """Tokens per answer."""
    rounds: int = 3
    """Timed rounds of each side, alternating."""
    batch_size: int = 4
    """Images in a batch of ours."""
    batches: tuple[int, ...] = (1, 4, 18)
    """Batch sizes to try for the peer."""
    cores: int | None = None
    """Threads of torch; use `taskset` to give ours as many."""

    @property
    def precision(self) -> str:
        return self.dtype or ("bfloat16" if self.size == "7b" else "float32")

    @property
    def config(self) -> VLMConfig:
        """The size's architecture, with LLaVA-1.5's 576 tokens per image (except tiny)."""
        config = SIZES[self.size].config
        if self.size != "small":
            return config
        vision: VisionConfig = dataclasses.replace(config.vision, image_size=336)
        return dataclasses.replace(config, vision=vision)


def make_questions(args: Args) -> list[ImageQuestions]:
    """Make JPEGs of 640 x 480, each with its questions."""
    result = []
    for index in range(args.images):
        rng = np.random.default_rng(index)
        small = Image.fromarray(rng.integers(0, 255, (15, 20, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, format="JPEG")
        questions = []
        for number in range(args.questions):
            text = f"Is there a {OBJECTS[number % len(OBJECTS)]} in the image?\n{SHORT}"
            questions.append((index * args.questions + number, Conversation((Turn("user", f"{IMAGE}\n{text}"),))))
        result.append(ImageQuestions(f"{index}.jpg", buffer.getvalue(), questions))
    return result


def peer_model(args: Args, config: VLMConfig, folder: Path, device: str) -> Any:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from reverie_jax.models.checkpoints.configs import llava_hf_json

    dtype = getattr(torch, args.precision)
    if SIZES[args.size].equal_weights:
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    theirs = LlavaConfig.from_dict(llava_hf_json(config, args.precision, SPECIAL_IDS))
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(theirs, dtype=dtype).eval()


class Peer:
    """transformers' generate, on questions prepared in advance."""

    def __init__(
        self, args: Args, config: VLMConfig, processor: Processor, images: Sequence[ImageQuestions], folder: Path
    ):
        import torch

        device = peer_device()
        assert device is not None
        if args.cores is not None:
            torch.set_num_threads(args.cores)
        self.torch, self.device, self.args = torch, device, args
        self.cache: str | None = None
        """`cache_implementation` of generate; a static one is not compiled, which takes longer than a benchmark."""
        self.model = peer_model(args, config, folder, device)
        self.sequences: list[tuple[int, list[int], int]] = []
        floats = []
        for index, image in enumerate(images):
            pixels = processor.preprocess(image.read(), image.name)[0]
            floats.append(np.moveaxis((pixels / 255 - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD), -1, 0))
            for number, question in image.questions:
                self.sequences.append((number, processor.encoder(question).ids.tolist(), index))
        self.pixels = torch.tensor(np.stack(floats), dtype=getattr(torch, args.precision), device=device)
        self.sequences.sort(key=lambda row: len(row[1]))

    def answer(self, batch: int, rows: int | None = None) -> dict[int, list[int]]:
        torch, answers = self.torch, {}
        chosen = self.sequences[:rows]
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            longest = max(len(ids) for _, ids, _ in part)
            ids = torch.zeros((len(part), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (_, tokens, _) in enumerate(part):
                ids[row, longest - len(tokens) :] = torch.tensor(tokens)
                mask[row, longest - len(tokens) :] = 1
            pixels = self.pixels[[index for _, _, index in part]]
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    pixel_values=pixels,
                    cache_implementation=self.cache,
                    disable_compile=True,
                    max_new_tokens=self.args.max_new_tokens,
                    min_new_tokens=self.args.max_new_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            for (number, _, _), tokens in zip(part, out[:, longest:].tolist(), strict=True):
                answers[number] = tokens
        return answers

    def answer_from_prefix(self, batch: int, rows: int | None = None) -> dict[int, list[int]]:
        """Answer with the KV of what an image's questions share computed once, and copied for each of them.

        A batch is as many whole images as make up `batch` questions, but at least one.
        """
        from transformers import DynamicCache

        torch, answers, new = self.torch, {}, self.args.max_new_tokens
        by_image: dict[int, list[tuple[int, list[int]]]] = {}
        for number, ids, index in sorted(self.sequences)[:rows]:
            by_image.setdefault(index, []).append((number, ids))
        every = [ids for _, ids, _ in self.sequences]
        shared = len(os.path.commonprefix(every))  # the same for all images: only their pixels differ
        shared = min(shared, min(map(len, every)) - 1)
        images, count = list(by_image), max(1, batch // self.args.questions)
        for start in range(0, len(images), count):
            part = images[start : start + count]
            several = [one for index in part for one in by_image[index]]
            repeats = torch.tensor([len(by_image[index]) for index in part], device=self.device)
            longest = max(len(ids) for _, ids in several)
            # Padding comes between prefix and question: the mask hides it, and positions count what it shows.
            tokens = torch.zeros((len(several), longest), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, (_, ids) in enumerate(several):
                rest = ids[shared:]
                tokens[row, :shared], mask[row, :shared] = torch.tensor(ids[:shared]), 1
                tokens[row, longest - len(rest) :], mask[row, longest - len(rest) :] = torch.tensor(rest), 1
            prefix = torch.tensor(every[0][:shared], device=self.device).expand(len(part), -1)
            with torch.no_grad():
                cache = DynamicCache(config=self.model.config.get_text_config())
                self.model(
                    input_ids=prefix,
                    pixel_values=self.pixels[part],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                for layer in cache.layers:
                    layer.keys = layer.keys.repeat_interleave(repeats, dim=0)
                    layer.values = layer.values.repeat_interleave(repeats, dim=0)
                out = self.model.generate(
                    input_ids=tokens.to(self.device),
                    attention_mask=mask.to(self.device),
                    past_key_values=cache,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            for (number, _), row in zip(several, out[:, longest:].tolist(), strict=True):
                answers[number] = row
        return answers


class Ours:
    """Our engine on all images; answers are tokens instead of texts."""

    def __init__(self, args: Args, model: VisionLanguageModel, processor: Processor, images: Sequence[ImageQuestions]):
        shape = EngineShape(sequence_length=4096, questions=32, batch_size=args.batch_size)
        self.engine, self.decoding, self.images = Engine(model, processor, shape), Decoding(args.max_new_tokens), images
        # Not a token id: random weights must not end an answer by chance on one side.
        self.engine.encoder.stop_ids = (model.config.text.vocab,)
        self.engine.encoder.decode = lambda ids, **options: " ".join(map(str, ids))  # type: ignore[method-assign]

    def answer(self, images: Sequence[ImageQuestions] | None = None) -> dict[int, list[int]]:
        schedule: Schedule = self.engine.schedule(self.images if images is None else images, self.decoding)
        tokens: dict[int, list[int]] = {}
        for answers in self.engine.stream(schedule, self.decoding):
            tokens |= {number: [int(id) for id in answer.text.split()] for number, answer in answers.items()}
        return tokens

    def shapes(self) -> list[dict[str, int]]:
        schedule = self.engine.schedule(self.images, self.decoding)
        return [
            {"rows": g.batch_size, "tokens": g.shape.length, "leaves": g.shape.questions, "batches": g.batches}
            for g in schedule.groups
        ]


def utilization(args: Args, config: VLMConfig, sizes: Sizes, ours: Ours, seconds: float) -> dict[str, Any]:
    """Return FLOPs of the prefill and bytes of decoding as shares of the chip's peaks; nothing for an unknown chip."""
    from reverie_jax.train.plan.topology import chip_of

    chip = chip_of(jax.devices()[0].device_kind)
    if chip is None:
        return {}
    width = jnp.dtype(args.precision).itemsize
    text, vision = config.text, config.vision
    tokens = pairs = 0
    for image in ours.images:
        lengths = [len(ours.engine.encoder(question)) for _, question in image.questions]
        shared = vision.patches
        tokens += shared + sum(length - shared for length in lengths)
        pairs += shared**2 // 2 + sum((length - shared) * (length + shared) // 2 for length in lengths)
    layers = 2 * sizes.layers * tokens + 4 * pairs * text.heads * text.head_dim * text.layers
    tower = (2 * sizes.tower + 4 * vision.tokens * vision.hidden * max(config.feature_depths)) * vision.tokens
    flops = layers + len(ours.images) * (tower + 2 * sum(sizes.projector) * vision.patches)
    read = 0
    for group in ours.shapes():
        steps = group["batches"] * (args.max_new_tokens - 1)
        kv = 2 * group["rows"] * group["tokens"] * text.kv_heads * text.head_dim * text.layers
        read += steps * width * (sizes.layers + sizes.head + kv)
    return {
        "prefill_flops": flops,
        "share_of_peak_flops": round(flops / seconds / chip.flops, 4),
        "decode_bytes": read,
        "share_of_bandwidth": round(read / seconds / chip.bandwidth, 4),
    }


def try_batches(
    args: Args, answer: Callable[..., dict[int, list[int]]], questions: int, rounds: int = 3
) -> dict[int, float]:
    """Return questions per second by batch size."""
    tried = {}
    for batch in args.batches:
        answer(batch, batch)  # warms up
        taken = []
        rows = max(batch, min(args.questions, questions))
        for _ in range(rounds):
            started = time.perf_counter()
            count = len(answer(batch, rows))
            taken.append(time.perf_counter() - started)
        tried[batch] = count / min(taken)
    return tried


def run(args: Args) -> dict[str, Any]:
    from reverie_jax.models.checkpoints.write import write_model

    config = dataclasses.replace(args.config, image_token_id=3, tokenization="hf")
    texts = " ".join(f"USER: Is there a {name} in the image?\n{SHORT} ASSISTANT:" for name in OBJECTS)
    encoder = Encoder(small_tokenizer(texts), "vicuna_v1", config.vision.patches, 3)
    processor = Processor(encoder, config.vision.image_size, context=config.text.context)
    model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(args.precision))
    images = make_questions(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if SIZES[args.size].equal_weights:
            write_model(model, folder)
        few = images[: args.peer_images]
        peer = Peer(args, config, processor, few, folder) if peer_device() else None
        sizes = Sizes.of(model)
        model.decoder.unstack()
        ours = Ours(args, model, processor, images)
        answers = ours.answer(few)  # compiles
        result: dict[str, Any] = {
            "size": args.size,
            "dtype": args.precision,
            "image_tokens": config.vision.patches,
            "images": args.images,
            "questions_per_image": args.questions,
            "new_tokens": args.max_new_tokens,
            "shapes": ours.shapes(),
        }
        best: dict[str, int] = {}
        peers = {} if peer is None else {"peer": peer.answer, "prefix": peer.answer_from_prefix}
        if peer is not None:
            for side, answer in peers.items():
                tried = try_batches(args, answer, len(peer.sequences))
                best[side] = max(tried, key=lambda batch: tried[batch])
                result[f"{side}_batch"] = best[side]
                result[f"{side}_questions_per_second_by_batch"] = {str(b): round(rate, 3) for b, rate in tried.items()}
                if SIZES[args.size].equal_weights:
                    theirs = answer(best[side])
                    differ = [number for number, tokens in theirs.items() if answers[number] != tokens]
                    if differ:
                        raise RuntimeError(f"{side}: {len(differ)} of {len(theirs)} answers differ, first {differ[0]}")
        rates: dict[str, list[float]] = {"ours": [], **{side: [] for side in peers}}
        for _ in range(args.rounds):
            for side, answer in peers.items():
                started = time.perf_counter()
                count = len(answer(best[side]))
                rates[side].append(count / (time.perf_counter() - started))
            started = time.perf_counter()
            count = len(ours.answer())
            seconds = time.perf_counter() - started
            rates["ours"].append(count / seconds)
        result |= {
            "questions_per_second": {side: spread(values) for side, values in rates.items() if values},
            **utilization(args, config, sizes, ours, args.images * args.questions / statistics.median(rates["ours"])),
            "device": str(jax.devices()[0].device_kind),
            "cores": len(os.sched_getaffinity(0)),
            "load": [round(x, 2) for x in os.getloadavg()],
        }
        for side in peers:
            ratios = [mine / yours for mine, yours in zip(rates["ours"], rates[side], strict=True)]
            result[f"ours_over_{side}"] = spread(ratios)
        return result


def main(args: Args) -> None:
    print(json.dumps(run(args), indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""One LoRA step, ours against transformers, peft and torch's AdamW: the same conversations and images, in tokens/s.

    python -m benchmarks.train_step [--size tiny|small|7b] [--dtype float32|bfloat16] [--images N] [--rounds N] [--apart]

Prints one JSON object. A step supervises every conversation about N images (REVERIE's proportions, `mixture_scale`) and
ends in one update of the adapters on every linear layer of the decoder and of the whole projector. Three ways, alternating:

    peer  LlavaForConditionalGeneration: a conversation per sequence with its own image, conversations of similar length
          together (as LLaVA batches them), padded to the longest of the batch; each layer checkpointed, tower without
          gradients. Padding comes last, where causal attention never looks, so no mask is passed and torch's fastest
          attention runs.
    flat  ours, without prefix sharing (`Recipe.prefix_sharing`): a conversation per tree, packed into sequences.
    tree  ours, an image's conversations as one tree, packed into the same sequences.

Tokens/s counts the tokens of the conversations one by one, image tokens included and padding excluded; supervised tokens/s
counts their supervised tokens. All ways share the numerator, so rates differ as seconds do; `computed` reports the tokens
that are actually computed. The loss is the mean over all supervised tokens of the step: one that k conversations share
counts k times. With equal weights (all sizes but 7b) the first two losses of all ways must agree before anything is timed;
the second one depends on the first step's gradients. These two steps, compilation included, are not timed. Batches are on
the device before a step begins. `cpu_seconds` are those of all cores: on a busy machine they are more reliable than the
clock.

Without --tokenizer a small tokenizer is used, with as many tokens per word as LLaMA's has in English.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
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

from benchmarks import mixture_scale
from reverie_jax.data.conversation import IMAGE, ImageRecord
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.processor import Processor
from reverie_jax.data.templates import TEMPLATES
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel, VLMConfig
from reverie_jax.models.config import ARCHITECTURES
from reverie_jax.train.recipes import RECIPES, Recipe

WAYS = ("peer", "flat", "tree")
STEPS = 1000
"""Length of the schedule; so few steps are taken that the learning rate hardly changes."""
VOCABULARY = 1200
"""Of the small tokenizer: a word of `mixture_scale` then has about 1.3 tokens."""
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
REVERIE = RECIPES["reverie-1.5-7b-lora"]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how a step on it is split into micro-batches.

    Attributes:
        sequence: sizes of our packed sequences.
        images: per step.
        micro_batch: sequences in a micro-batch of ours.
        peer_micro_batch: conversations in a micro-batch of the peer.
        equal_weights: both sides read the same weights; otherwise each draws its own.
    """

    config: VLMConfig
    sequence: SequenceShape
    images: int
    micro_batch: int
    peer_micro_batch: int
    rank: int
    alpha: float
    equal_weights: bool = True


SIZES = {
    "tiny": Size(
        VLMConfig(
            VisionConfig(hidden=32, layers=2, heads=2, mlp=64, image_size=28, patch_size=14),
            TextConfig(vocab=1280, hidden=48, layers=2, heads=4, kv_heads=4, head_dim=12, mlp=96),
        ),
        SequenceShape(length=512, images=4, edges=512),
        images=2,
        micro_batch=1,
        peer_micro_batch=4,
        rank=4,
        alpha=8.0,
    ),
    "small": Size(
        VLMConfig(
            VisionConfig(hidden=192, layers=3, heads=3, mlp=768, image_size=224, patch_size=14),
            TextConfig(vocab=4096, hidden=512, layers=4, heads=8, kv_heads=8, head_dim=64, mlp=1376),
        ),
        SequenceShape(length=1024, images=3, edges=512),
        images=2,
        micro_batch=1,
        peer_micro_batch=4,
        rank=16,
        alpha=32.0,
    ),
    "7b": Size(
        ARCHITECTURES["llava-1.5-7b"],
        REVERIE.sequence,
        images=32,
        micro_batch=1,
        peer_micro_batch=16,
        rank=REVERIE.rank,
        alpha=REVERIE.alpha,
        equal_weights=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    size: Literal["tiny", "small", "7b"] = "small"
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and computation; bfloat16 by default for 7b, float32 for the others."""
    rounds: int = 3
    """Timed steps of each way, alternating."""
    images: int | None = None
    """Images of a step, instead of the size's."""
    ways: tuple[Literal["peer", "flat", "tree"], ...] = WAYS
    length: int | None = None
    """Tokens of our sequences, instead of the size's."""
    micro_batch: int | None = None
    """Sequences in a micro-batch of ours, instead of the size's."""
    peer_micro_batch: int | None = None
    """Conversations in a micro-batch of the peer, instead of the size's."""
    fit: bool = False
    """Only as many image and edge slots in a sequence as the data need, instead of the recipe's."""
    checkpointing: bool = True
    """The peer recomputes each layer in its backward pass, as in LLaVA's scripts; ours always does."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention of the peer."""
    adapters: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the peer's adapters if the dtype is bfloat16: float32 under autocast, as ours, or bfloat16, as in LLaVA's
    scripts."""
    answers: Literal["once", "as-published"] = "once"
    """Supervise an answer that several rationales share once, or as often as it is repeated."""
    tokenizer: Path | None = None
    """Folder of a LLaMA tokenizer (Vicuna's); a small one by default."""
    cores: int | None = None
    """CPU cores for all ways; all by default. One is the fairest on a shared machine: threads that wait for one another
    lose most if a core is taken away."""
    apart: bool = False
    """Run peer and ours in separate processes, one after the other in each round, for a device that does not hold both."""
    part: Path | None = None
    """Run as such a process, with weights in this folder."""

    @property
    def chosen(self) -> Size:
        """The size, with the options applied."""
        size = SIZES[self.size]
        length = self.length or size.sequence.length
        return dataclasses.replace(
            size,
            sequence=dataclasses.replace(size.sequence, length=length, edges=min(size.sequence.edges, length)),
            images=self.images or size.images,
            micro_batch=self.micro_batch or size.micro_batch,
            peer_micro_batch=self.peer_micro_batch or size.peer_micro_batch,
        )

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        return self.dtype or ("bfloat16" if self.size == "7b" else "float32")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step supervises.

    Attributes:
        conversations: tokens of each record's conversations.
    """

    records: list[ImageRecord]
    conversations: list[list[Tokens]]
    processor: Processor

    @property
    def count(self) -> int:
        return sum(map(len, self.conversations))

    @property
    def tokens(self) -> int:
        return sum(len(one) for several in self.conversations for one in several)

    @property
    def supervised(self) -> int:
        return sum(int((one.weights > 0).sum()) for several in self.conversations for one in several)


@dataclasses.dataclass
class Way:
    """A way to take the step.

    Attributes:
        step: takes a step, waits for it, and returns its loss.
        computed: tokens, images and positions of the LM head that a step computes, padding included.
        device: name of the device it runs on.
        peak: returns the peak memory of the device, None if unknown.
    """

    step: Callable[[], float]
    computed: dict[str, int]
    device: str
    peak: Callable[[], int | None]


def small_tokenizer(*more: str) -> Any:
    """Train a BPE tokenizer on the words of `mixture_scale`, its prompts, and `more`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    system = " Explain why this answer is wrong: instead. Including any necessary facts or knowledge."
    known = " ".join(mixture_scale.words())
    bpe.train_from_iterator([TEMPLATES["vicuna_v1"].system, system, f" {known} {known.title()}", *more], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=[IMAGE]
    )


def make_work(args: Args) -> Work:
    """Make images and conversations in REVERIE's proportions with `reverie data build`."""
    from reverie_jax.cli.data import Build
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.supervision import Supervision
    from reverie_jax.data.tokenization import load_tokenizer

    size = args.chosen
    vision = size.config.vision
    if args.tokenizer is None:
        encoder = Encoder(small_tokenizer(), "vicuna_v1", vision.patches, 3)
    else:
        encoder = Encoder(load_tokenizer(args.tokenizer), "vicuna_v1", vision.patches, 0, "llava")
    processor = Processor(encoder, vision.image_size, context=size.config.text.context)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        mixture_scale.make(folder, size.images / mixture_scale.IMAGES, side=max(64, vision.image_size))
        Build(sources=(str(folder / "reverie.json"),), out=folder / "records", jobs=1).run()
        source = RecordSource(folder / "records")
        supervision = Supervision(answers=args.answers)
        records = [source[number] for number in range(len(source))]
    # Supervision is applied here, once for all ways.
    records = [dataclasses.replace(one, conversations=tuple(supervision(one.conversations))) for one in records]
    return Work(records, [processor.tokenize(one.id, one.conversations) for one in records], processor)


def our_batch(work: Work, size: Size, *, prefix_sharing: bool, fit: bool) -> Batch:
    """Return all sequences of a step, with empty ones that fill the last micro-batch."""
    import grain

    from reverie_jax.data.packing import stack
    from reverie_jax.data.pipeline import TreeBuilder, image_reader, load_images, packed_sequences
    from reverie_jax.data.supervision import Supervision

    indices = grain.MapDataset.range(len(work.records))
    # Repeated answers are supervised each time: `make_work` has already removed them if they count once.
    supervision = Supervision(answers="as-published")

    def pack(shape: SequenceShape) -> list[Batch]:
        builder = TreeBuilder(work.processor, shape, supervision, prefix_sharing)
        return list(packed_sequences(indices, work.records, builder))

    sequences = pack(size.sequence)
    if fit:
        images = max(int((one.flat_tokens > 0).sum()) for one in sequences)
        edges = max(int((one.weight > 0).sum()) for one in sequences)
        sequences = pack(dataclasses.replace(size.sequence, images=images, edges=-(-edges // 64) * 64))
    batch = stack(sequences, -(-len(sequences) // size.micro_batch) * size.micro_batch)
    return load_images(batch, image_reader(work.records), work.processor)


def recipe_for(size: Size, batch_size: int, *, prefix_sharing: bool) -> Recipe:
    return dataclasses.replace(
        REVERIE,
        name="benchmark",
        steps=STEPS,
        batch_size=batch_size,
        sequence=size.sequence,
        gradient_accumulation_steps=batch_size // size.micro_batch,
        prefix_sharing=prefix_sharing,
        rank=size.rank,
        alpha=size.alpha,
        dropout=0.0,
        warmup_ratio=0.0,
    )


def our_model(args: Args, work: Work, folder: Path) -> VisionLanguageModel:
    """Return a random model; with equal weights, it and its adapter are written to the folder for the peer."""
    from reverie_jax.models.checkpoints import read_model
    from reverie_jax.models.checkpoints.adapters import write_peft
    from reverie_jax.models.checkpoints.write import write_model
    from reverie_jax.train.step import make_trainable

    size = args.chosen
    config = dataclasses.replace(size.config, image_token_id=work.processor.encoder.image_token_id, tokenization="hf")
    base = folder / "base"
    if base.exists():
        model = read_model(base, dtype=jnp.dtype(args.precision))
    else:
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(args.precision))
    if size.equal_weights and not base.exists():
        write_model(model, base)
    make_trainable(model, recipe_for(size, size.micro_batch, prefix_sharing=True))
    if size.equal_weights and not (folder / "adapter").exists():
        (folder / "adapter").mkdir()
        write_peft(model, folder / "adapter", base_model=str(base), projector=False)
    return model


def our_ways(args: Args, work: Work, folder: Path) -> dict[str, Way]:
    from reverie_jax.train.step import TrainState, is_lora_or_projector, make_optimizer, make_step

    names = [way for way in args.ways if way != "peer"]
    size = args.chosen
    if not names:
        if size.equal_weights and not (folder / "base").exists():
            our_model(args, work, folder)  # for the peer to read
        return {}
    graph, params, frozen = nnx.split(our_model(args, work, folder), is_lora_or_projector, ...)
    device = jax.local_devices()[0]

    def peak() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    def make_way(prefix_sharing: bool) -> Way:
        batch = our_batch(work, size, prefix_sharing=prefix_sharing, fit=args.fit)
        recipe = recipe_for(size, len(batch.tokens), prefix_sharing=prefix_sharing)
        optimizer = make_optimizer(recipe)
        take = make_step(graph, optimizer, recipe)
        on_device = Batch(*map(jnp.asarray, batch))
        # The step donates its state, and both ways begin with the same.
        state = TrainState(
            jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params), jax.jit(lambda: jnp.zeros((), jnp.int32))()
        )

        def step() -> float:
            nonlocal state
            state, metrics = take(state, frozen, on_device)
            jax.block_until_ready(state)
            return float(metrics.loss)

        computed = {"tokens": batch.tokens.size, "images": batch.flat_tokens.size, "head": batch.parent.size}
        return Way(step, computed, device.device_kind, peak)

    return {name: make_way(name == "tree") for name in names}


def peer_device() -> str | None:
    """Return torch's name of the device that ours runs on; None if torch cannot use it."""
    if jax.default_backend() == "cpu":
        return "cpu"
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def peer_model(args: Args, work: Work, folder: Path, device: str) -> Any:
    """Return transformers' LLaVA with peft's adapters and a trained projector."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from reverie_jax.models.checkpoints.configs import llava_hf_json

    size, dtype = args.chosen, getattr(torch, args.precision)
    # By default peft keeps adapters of a 16-bit model in float32.
    wide = args.adapters == "float32"
    if size.equal_weights:
        model = LlavaForConditionalGeneration.from_pretrained(
            folder / "base", dtype=dtype, attn_implementation=args.attention
        ).to(device)
        model = PeftModel.from_pretrained(
            model, str(folder / "adapter"), is_trainable=True, autocast_adapter_dtype=wide
        )
    else:
        image = work.processor.encoder.image_token_id
        config = dataclasses.replace(size.config, image_token_id=image, tokenization="hf")
        theirs = LlavaConfig.from_dict(llava_hf_json(config, args.precision, SPECIAL_IDS))
        with torch.device(device):
            model = LlavaForConditionalGeneration._from_config(theirs, dtype=dtype, attn_implementation=args.attention)
        inside = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        lora = LoraConfig(r=size.rank, lora_alpha=size.alpha, lora_dropout=0.0, target_modules=inside)
        model = get_peft_model(model, lora, autocast_adapter_dtype=wide).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
    tower = model.get_base_model().model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)
    if args.checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def peer_way(args: Args, work: Work, folder: Path) -> dict[str, Way]:
    """Return the peer; nothing if it is not selected or cannot run."""
    device = peer_device()
    if "peer" not in args.ways or device is None:
        return {}
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from reverie_jax.models.vision import CLIP_MEAN, CLIP_STD

    size, dtype = args.chosen, getattr(torch, args.precision)
    if args.cores is not None:
        torch.set_num_threads(args.cores)
    model = peer_model(args, work, folder, device)
    groups = [
        {"params": [p for name, p in model.named_parameters() if part in name], "lr": rate}
        for part, rate in (("lora_", REVERIE.learning_rate), ("multi_modal_projector", REVERIE.projector_learning_rate))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    pairs = [(one, record) for record, several in zip(work.records, work.conversations, strict=True) for one in several]
    pairs.sort(key=lambda pair: -len(pair[0]))
    # Padding follows a conversation, which does not attend to it; only the image token must not be used.
    padding = int(work.processor.encoder.image_token_id == 0)
    micro = []
    for start in range(0, len(pairs), size.peer_micro_batch):
        part = pairs[start : start + size.peer_micro_batch]
        ids = np.full((len(part), len(part[0][0])), padding, np.int64)
        labels = np.full_like(ids, -100)
        for index, (one, _) in enumerate(part):
            ids[index, : len(one)] = one.ids
            labels[index, : len(one)] = np.where(one.weights > 0, one.ids, -100)
        shown = np.concatenate([work.processor.preprocess(record.image, record.id) for _, record in part])
        floats = np.moveaxis((shown / 255 - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD), -1, 1)
        pixels = torch.tensor(floats, dtype=dtype, device=device)
        micro.append((torch.tensor(ids, device=device), torch.tensor(labels, device=device), pixels))
    supervised = torch.tensor(work.supervised, device=device)
    mixed = args.precision == "bfloat16" and args.adapters == "float32"

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for ids, labels, pixels in micro:
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                inputs = {"input_ids": ids, "pixel_values": pixels, "labels": labels, "use_cache": False}
                part = model(**inputs, num_items_in_batch=supervised).loss
            part.backward()
            loss += part.detach()
        optimizer.step()
        schedule.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    positions = sum(ids.numel() for ids, _, _ in micro)
    return {
        "peer": Way(
            step,
            {"tokens": positions, "images": len(pairs), "head": positions},
            torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            torch.cuda.max_memory_allocated if device == "cuda" else lambda: None,
        )
    }


def check(losses: dict[str, list[float]], args: Args) -> None:
    """Check that all ways with the same weights have the same loss, before the first step and after it.

    Raises:
        RuntimeError: they do not do the same work.
    """
    alike = {way: values for way, values in losses.items() if SIZES[args.size].equal_weights or way != "peer"}
    # Adam's first step is the gradient's sign, so the second loss includes rounding that the first does not.
    tolerances = (1e-4, 1e-3) if args.precision == "float32" else (1e-2, 1e-2)
    for number, tolerance in enumerate(tolerances):
        first = [values[number] for values in alike.values()]
        if not all(math.isfinite(loss) for loss in first) or max(first) - min(first) > tolerance * min(first):
            raise RuntimeError(f"the ways do not do the same work: losses {losses}")


def measure(args: Args, work: Work, folder: Path) -> dict[str, Any]:
    """Return the measurements of each way."""
    if args.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # as torch has it; no TF32
    compiled = 0

    def on_event(event: str, seconds: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(on_event)
    ways = our_ways(args, work, folder)  # writes what the peer reads
    ways = peer_way(args, work, folder) | ways
    measured: dict[str, Any] = {
        name: {"computed": way.computed, "device": way.device, "losses": [], "first": [], "seconds": [], "cpu": []}
        for name, way in ways.items()
    }

    def timed(name: str) -> tuple[float, float, float]:
        """Return a step's loss, its seconds, and its CPU seconds over all cores."""
        started, used = time.perf_counter(), time.process_time()
        loss = ways[name].step()
        seconds, used = time.perf_counter() - started, time.process_time() - used
        print(f"{name}: loss {loss:.4f}, {seconds:.2f} s, {used:.2f} s of cores", file=sys.stderr)
        return loss, seconds, used

    for number in range(2):
        for name in ways:
            loss, seconds, _ = timed(name)
            measured[name]["losses"].append(loss)
            if number == 0:
                measured[name]["first"].append(seconds)
    check({name: one["losses"] for name, one in measured.items()}, args)
    before = compiled
    for _ in range(args.rounds):
        for name in ways:
            _, seconds, used = timed(name)
            measured[name]["seconds"].append(seconds)
            measured[name]["cpu"].append(used)
    for name, way in ways.items():
        measured[name]["peak"] = way.peak()
        measured[name]["compiled_in_rounds"] = compiled - before
    return measured


def in_processes(args: Args, folder: Path) -> dict[str, Any]:
    """Run `measure` with peer and ours in separate processes, one after the other in each round."""
    merged: dict[str, Any] = {}
    sides = [tuple(way for way in args.ways if (way == "peer") == peer) for peer in (False, True)]
    for _ in range(args.rounds):
        for ways in filter(None, sides):  # ours first: it writes what the peer reads
            options = [*sys.argv[1:], "--rounds", "1", "--part", str(folder), "--ways", *ways]
            command = [sys.executable, "-m", "benchmarks.train_step", *options]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            for name, one in json.loads(lines[-1]).items():
                whole = merged.setdefault(name, one | {"first": [], "seconds": [], "cpu": []})
                for times in ("first", "seconds", "cpu"):
                    whole[times] += one[times]
        check({name: one["losses"] for name, one in merged.items()}, args)
    return {name: merged[name] for name in WAYS if name in merged}


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, minimum and maximum."""
    result = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in result.items()}


def report(args: Args, work: Work, measured: dict[str, Any], load: tuple[float, ...]) -> dict[str, Any]:
    """Return what is printed."""
    size = args.chosen
    seconds = {name: one["seconds"] for name, one in measured.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(fast: str, slow: str) -> dict[str, float] | None:
        """Return the speedup round by round: neighbors in time share the machine's load."""
        if fast not in seconds or slow not in seconds:
            return None
        return spread([b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)])

    result = {
        "size": args.size,
        "dtype": args.precision,
        "config": {"vision": dataclasses.asdict(size.config.vision), "text": dataclasses.asdict(size.config.text)},
        "adapters": {"rank": size.rank, "alpha": size.alpha},
        "sequence": dataclasses.asdict(size.sequence) | {"fit": args.fit},
        "micro_batch": {"sequences": size.micro_batch, "peer_conversations": size.peer_micro_batch},
        "peer_settings": {
            "checkpointing": args.checkpointing,
            "attention": args.attention,
            "adapters": args.adapters if args.precision == "bfloat16" else "float32",
        },
        "apart": args.apart,
        "equal_weights": size.equal_weights,
        "images": len(work.records),
        "conversations": work.count,
        "conversation_tokens": work.tokens,
        "supervised_tokens": work.supervised,
        "computed": {name: one["computed"] for name, one in measured.items()},
        "losses": {name: [round(loss, 6) for loss in one["losses"]] for name, one in measured.items()},
        "first_step_seconds": {name: spread(one["first"]) for name, one in measured.items()},
        "compile_seconds": {
            name: round(max(0.0, statistics.median(one["first"]) - medians[name]), 3) for name, one in measured.items()
        },
        "compiled_in_rounds": max(one["compiled_in_rounds"] for one in measured.values()),
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "cpu_seconds": {name: spread(one["cpu"]) for name, one in measured.items()},
        "tokens_per_second": {name: round(work.tokens / median, 1) for name, median in medians.items()},
        "supervised_per_second": {name: round(work.supervised / median, 1) for name, median in medians.items()},
        "tree_over_peer": ratio("tree", "peer"),
        "flat_over_peer": ratio("flat", "peer"),
        "tree_over_flat": ratio("tree", "flat"),
        "peak_bytes": {name: one["peak"] for name, one in measured.items()},
        "device": {name: one["device"] for name, one in measured.items()},
        "cores": len(os.sched_getaffinity(0)),
        "load": {"before": list(load), "after": list(os.getloadavg())},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "optax", "torch", "transformers", "peft", "reverie-jax")
        },
    }
    if "peer" in args.ways and "peer" not in measured:
        result["peer"] = "not run: torch cannot use the device that ours runs on"
    return result


def run(args: Args) -> dict[str, Any]:
    """Run the benchmark, or one side of it (`args.part`)."""
    load = os.getloadavg()
    if args.cores is not None:  # before either library starts its threads
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.cores]))
    work = make_work(args)
    if args.part is not None:
        return measure(args, work, args.part)
    with tempfile.TemporaryDirectory() as name:
        measured = in_processes(args, Path(name)) if args.apart else measure(args, work, Path(name))
    return report(args, work, measured, load)


def main(args: Args) -> None:
    # Torch needs memory on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main(tyro.cli(Args))

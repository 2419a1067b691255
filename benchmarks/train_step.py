"""One LoRA step, ours against transformers, peft and torch's AdamW: the same conversations and pictures, in tokens/s.

    python -m benchmarks.train_step [--size tiny|small|7b] [--dtype float32|bfloat16] [--images N] [--rounds N] [--apart]

Prints one JSON object. A step teaches every conversation about N pictures (REVERIE's proportions, `mixture_scale`) and ends
in one update of the adapters on every linear of the decoder's layers and of the whole projector. Three ways, alternating:

    peer  LlavaForConditionalGeneration: a conversation a sequence with its own picture, of like lengths together (as LLaVA
          batches them), padded to the batch's longest; gradients checkpointed a layer at a time, tower without gradients.
          Padding stands behind, where causal attention never looks, so no mask is passed: torch's fastest attention runs.
    flat  ours, a conversation a tree (`Recipe.prefix_sharing` off), packed into rows.
    tree  ours, a picture's conversations as one tree, packed into the same rows.

Tokens/s counts the tokens of the conversations one by one, pictures' tokens included and padding not; supervised tokens/s
their taught tokens, likewise. So all ways share the numerator, and rates differ as seconds do; what was really computed is
in `computed`. The loss is the mean over all taught tokens of the step: one that k conversations share counts k times. Where
weights are equal (all sizes but 7b) the first two losses of all ways must agree before anything is timed, so nobody compares
different work; the second needs the first one's gradients. Both of those steps are apart from the timed ones, compilation
with them. Batches lie on the device before a step begins. `cpu_seconds` are those of all cores that a step used: on a busy
machine they tell more than the clock.

Without --tokenizer a small one stands in, with as many tokens a word as LLaMA's has in English.
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
"""Of the schedule; so few of them are taken that its rate hardly changes."""
VOCABULARY = 1200
"""Of the tokenizer that stands in: a word that `mixture_scale` says then has about 1.3 tokens."""
REVERIE = RECIPES["reverie-1.5-7b-lora"]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how a step on it is cut up.

    Attributes:
        rows: of a micro-batch of ours.
        talks: of a micro-batch of the peer's.
    """

    config: VLMConfig
    row: SequenceShape
    images: int
    rows: int
    talks: int
    rank: int
    alpha: float
    equal: bool = True
    """Both sides read the same weights; otherwise each draws its own."""


SIZES = {
    "tiny": Size(
        VLMConfig(
            VisionConfig(hidden=32, layers=2, heads=2, mlp=64, image_size=28, patch_size=14),
            TextConfig(vocab=1280, hidden=48, layers=2, heads=4, kv_heads=4, head_dim=12, mlp=96),
        ),
        SequenceShape(length=512, images=4, edges=512),
        images=2,
        rows=1,
        talks=4,
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
        rows=1,
        talks=4,
        rank=16,
        alpha=32.0,
    ),
    "7b": Size(
        ARCHITECTURES["llava-1.5-7b"],
        REVERIE.row,
        images=32,
        rows=1,
        talks=16,
        rank=REVERIE.rank,
        alpha=REVERIE.alpha,
        equal=False,
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
    """Pictures of a step; by default as many as the size has, 32 for 7b."""
    ways: tuple[Literal["peer", "flat", "tree"], ...] = WAYS
    tokens: int | None = None
    """Length of our rows, instead of the size's."""
    rows: int | None = None
    """Rows of a micro-batch of ours, instead of the size's."""
    talks: int | None = None
    """Conversations of a micro-batch of the peer's, instead of the size's."""
    fit: bool = False
    """No more picture and edge slots in a row than these data need, instead of the recipe's."""
    checkpointing: bool = True
    """The peer recomputes each layer in its backward pass, as LLaVA's scripts have it; ours always does."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """The peer's."""
    adapters: Literal["float32", "bfloat16"] = "float32"
    """The peer's, where the dtype is bfloat16: held in float32 under autocast, as ours are, or wholly in bfloat16, as
    LLaVA's scripts have it."""
    answers: Literal["once", "as-published"] = "once"
    """An answer that several rationales share is taught once, or as often as it is repeated."""
    tokenizer: Path | None = None
    """Folder of a LLaMA tokenizer (Vicuna's); a small one by default."""
    cores: int | None = None
    """Of the CPU, for all ways; all that there are by default. One is the fairest on a machine that others use: threads
    that wait for one another's work lose most where a core is taken away."""
    apart: bool = False
    """Each round runs peer and ours in processes of their own, one after the other, for a device that does not hold both."""
    part: Path | None = None
    """Run as such a process, with the weights in this folder."""

    @property
    def chosen(self) -> Size:
        """The size, with what was set instead of its own."""
        size = SIZES[self.size]
        row = dataclasses.replace(size.row, length=self.tokens or size.row.length)
        row = dataclasses.replace(row, edges=min(row.edges, row.tokens))
        return dataclasses.replace(
            size,
            row=row,
            images=self.images or size.images,
            rows=self.rows or size.rows,
            talks=self.talks or size.talks,
        )

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        return self.dtype or ("bfloat16" if self.size == "7b" else "float32")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step teaches.

    Attributes:
        talks: each record's conversations, as numbers.
    """

    records: list[ImageRecord]
    talks: list[list[Tokens]]
    processor: Processor

    @property
    def conversations(self) -> int:
        return sum(map(len, self.talks))

    @property
    def tokens(self) -> int:
        return sum(len(talk) for talks in self.talks for talk in talks)

    @property
    def supervised(self) -> int:
        return sum(int((talk.weights > 0).sum()) for talks in self.talks for talk in talks)


@dataclasses.dataclass
class Way:
    """A way to take the step.

    Attributes:
        step: takes one, waits for it, and returns its loss.
        computed: tokens, pictures and places of the LM head that a step computes, padding included.
        device: what it runs on.
        peak: largest memory on the device so far, where it is counted.
    """

    step: Callable[[], float]
    computed: dict[str, int]
    device: str
    peak: Callable[[], int | None]


def small_tokenizer(*more: str) -> Any:
    """BPE of the words that `mixture_scale` uses and of the prompts around them, and of `more`."""
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
    """Pictures and conversations in REVERIE's proportions, by way of `reverie data build`."""
    from reverie_jax.cli import data_options
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
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place)
        mixture_scale.make(folder, size.images / mixture_scale.IMAGES, side=max(64, vision.image_size))
        data_options.Build((str(folder / "reverie.json"),), folder / "records", jobs=1).run()
        source = RecordSource(folder / "records")
        supervision = Supervision(answers=args.answers)
        records = [source[number] for number in range(len(source))]
    # Taught as the arm has it here, once for all ways.
    records = [dataclasses.replace(one, conversations=tuple(supervision(one.conversations))) for one in records]
    return Work(records, [processor.tokens(one.id, one.conversations) for one in records], processor)


def our_batch(work: Work, size: Size, *, sharing: bool, fit: bool) -> Batch:
    """All rows of a step, blank ones included that fill the last micro-batch."""
    import grain

    from reverie_jax.data.packing import stack
    from reverie_jax.data.pipeline import packed_sequences, show
    from reverie_jax.data.supervision import Supervision

    numbers = grain.MapDataset.range(len(work.records))
    # As often as they are repeated: `make_work` has left out the repetitions already, where they are to be.
    supervision = Supervision(answers="as-published")

    def rows_of(shape: SequenceShape) -> list[Batch]:
        return list(packed_sequences(numbers, work.records, work.processor, shape, supervision, prefix_sharing=sharing))

    rows = rows_of(size.row)
    if fit:
        images = max(int((row.flat_tokens > 0).sum()) for row in rows)
        edges = max(int((row.weight > 0).sum()) for row in rows)
        rows = rows_of(dataclasses.replace(size.row, images=images, edges=-(-edges // 64) * 64))
    return show(stack(rows, -(-len(rows) // size.rows) * size.rows), work.records, work.processor)


def recipe_for(size: Size, rows: int, *, sharing: bool) -> Recipe:
    return dataclasses.replace(
        REVERIE,
        name="benchmark",
        steps=STEPS,
        rows=rows,
        row=size.row,
        accumulate=rows // size.rows,
        sharing=sharing,
        rank=size.rank,
        alpha=size.alpha,
        dropout=0.0,
        warmup=0.0,
    )


def our_model(args: Args, work: Work, folder: Path) -> VisionLanguageModel:
    """At random; written to the folder for the peer where weights are to be equal, and the adapter beside it."""
    from reverie_jax.models.checkpoints import read_model
    from reverie_jax.models.checkpoints.adapters import write_peft
    from reverie_jax.models.checkpoints.write import write_model
    from reverie_jax.train.step import adapt

    size = args.chosen
    config = dataclasses.replace(size.config, image_token_id=work.processor.encoder.image_token_id, tokenization="hf")
    base = folder / "base"
    if base.exists():
        model = read_model(base, dtype=jnp.dtype(args.precision))
    else:
        model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(args.precision))
    if size.equal and not base.exists():
        write_model(model, base)
    adapt(model, recipe_for(size, size.rows, sharing=True))
    if size.equal and not (folder / "adapter").exists():
        (folder / "adapter").mkdir()
        write_peft(model, folder / "adapter", base=str(base), projector=False)
    return model


def our_ways(args: Args, work: Work, folder: Path) -> dict[str, Way]:
    from reverie_jax.train.step import TrainState, lora_and_projector, make_optimizer, make_step

    names = [way for way in args.ways if way != "peer"]
    size = args.chosen
    if not names:
        if size.equal and not (folder / "base").exists():
            our_model(args, work, folder)  # for the peer to read
        return {}
    graph, params, frozen = nnx.split(our_model(args, work, folder), lora_and_projector, ...)
    device = jax.local_devices()[0]

    def peak() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    def made(sharing: bool) -> Way:
        batch = our_batch(work, size, sharing=sharing, fit=args.fit)
        recipe = recipe_for(size, len(batch.tokens), sharing=sharing)
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

        computed = {"tokens": batch.tokens.size, "pictures": batch.flat_tokens.size, "head": batch.parent.size}
        return Way(step, computed, device.device_kind, peak)

    return {name: made(name == "tree") for name in names}


def peer_device() -> str | None:
    """The device that ours runs on, as torch calls it; None where torch does not reach it."""
    if jax.default_backend() == "cpu":
        return "cpu"
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


def peer_model(args: Args, work: Work, folder: Path, device: str) -> Any:
    """transformers' LLaVA with peft's adapters, and the whole projector tuned."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from reverie_jax.models.checkpoints.configs import llava_hf_json
    from reverie_jax.models.checkpoints.write import LLAMA_SPECIAL

    size, dtype = args.chosen, getattr(torch, args.precision)
    # peft holds adapters in float32 on a base of 16 bits, unless told.
    wide = args.adapters == "float32"
    if size.equal:
        model = LlavaForConditionalGeneration.from_pretrained(
            folder / "base", dtype=dtype, attn_implementation=args.attention
        ).to(device)
        model = PeftModel.from_pretrained(
            model, str(folder / "adapter"), is_trainable=True, autocast_adapter_dtype=wide
        )
    else:
        image = work.processor.encoder.image_token_id
        config = dataclasses.replace(size.config, image_token_id=image, tokenization="hf")
        theirs = LlavaConfig.from_dict(llava_hf_json(config, args.precision, LLAMA_SPECIAL))
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
    """The peer, or nothing where it is not asked for or cannot run."""
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
        for part, rate in (("lora_", REVERIE.rate), ("multi_modal_projector", REVERIE.projector_rate))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    pairs = [(talk, record) for record, talks in zip(work.records, work.talks, strict=True) for talk in talks]
    pairs.sort(key=lambda pair: -len(pair[0]))
    # Whatever stands behind a conversation is not seen by it; the placeholder alone may not.
    padding = int(work.processor.encoder.image_token_id == 0)
    micro = []
    for start in range(0, len(pairs), size.talks):
        part = pairs[start : start + size.talks]
        ids = np.full((len(part), len(part[0][0])), padding, np.int64)
        labels = np.full_like(ids, -100)
        for row, (talk, _) in enumerate(part):
            ids[row, : len(talk)] = talk.ids
            labels[row, : len(talk)] = np.where(talk.weights > 0, talk.ids, -100)
        shown = np.concatenate([work.processor.pixels(record.image, record.id) for _, record in part])
        floats = np.moveaxis((shown / 255 - np.asarray(CLIP_MEAN)) / np.asarray(CLIP_STD), -1, 1)
        pixels = torch.tensor(floats, dtype=dtype, device=device)
        micro.append((torch.tensor(ids, device=device), torch.tensor(labels, device=device), pixels))
    taught = torch.tensor(work.supervised, device=device)
    mixed = args.precision == "bfloat16" and args.adapters == "float32"

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for ids, labels, pixels in micro:
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                given = {"input_ids": ids, "pixel_values": pixels, "labels": labels, "use_cache": False}
                part = model(**given, num_items_in_batch=taught).loss
            part.backward()
            loss += part.detach()
        optimizer.step()
        schedule.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    places = sum(ids.numel() for ids, _, _ in micro)
    return {
        "peer": Way(
            step,
            {"tokens": places, "pictures": len(pairs), "head": places},
            torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            torch.cuda.max_memory_allocated if device == "cuda" else lambda: None,
        )
    }


def check(losses: dict[str, list[float]], args: Args) -> None:
    """All ways that began with the same weights lose the same, before the first step and after it.

    Raises:
        RuntimeError: they do not.
    """
    alike = {way: found for way, found in losses.items() if SIZES[args.size].equal or way != "peer"}
    # Adam's first step is the gradient's sign, so the second loss knows rounding that the first does not.
    tolerances = (1e-4, 1e-3) if args.precision == "float32" else (1e-2, 1e-2)
    for number, tolerance in enumerate(tolerances):
        first = [found[number] for found in alike.values()]
        if not all(math.isfinite(loss) for loss in first) or max(first) - min(first) > tolerance * min(first):
            raise RuntimeError(f"the ways do not do the same work: losses {losses}")


def measure(args: Args, work: Work, folder: Path) -> dict[str, Any]:
    """Each way's numbers, as they were taken."""
    if args.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # as torch has it; no TF32
    compiled = 0

    def heard(event: str, seconds: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(heard)
    ways = our_ways(args, work, folder)  # writes what the peer reads
    ways = peer_way(args, work, folder) | ways
    found: dict[str, Any] = {
        name: {"computed": way.computed, "device": way.device, "losses": [], "first": [], "seconds": [], "cpu": []}
        for name, way in ways.items()
    }

    def timed(name: str) -> tuple[float, float, float]:
        """A step's loss, its seconds, and those of all cores together that it used."""
        started, used = time.perf_counter(), time.process_time()
        loss = ways[name].step()
        seconds, used = time.perf_counter() - started, time.process_time() - used
        print(f"{name}: loss {loss:.4f}, {seconds:.2f} s, {used:.2f} s of cores", file=sys.stderr)
        return loss, seconds, used

    for number in range(2):
        for name in ways:
            loss, seconds, _ = timed(name)
            found[name]["losses"].append(loss)
            if number == 0:
                found[name]["first"].append(seconds)
    check({name: one["losses"] for name, one in found.items()}, args)
    before = compiled
    for _ in range(args.rounds):
        for name in ways:
            _, seconds, used = timed(name)
            found[name]["seconds"].append(seconds)
            found[name]["cpu"].append(used)
    for name, way in ways.items():
        found[name]["peak"] = way.peak()
        found[name]["compiled_in_rounds"] = compiled - before
    return found


def in_processes(args: Args, folder: Path) -> dict[str, Any]:
    """`measure` with peer and ours in processes of their own, one after the other in each round."""
    merged: dict[str, Any] = {}
    sides = [tuple(way for way in args.ways if (way == "peer") == peer) for peer in (False, True)]
    for _ in range(args.rounds):
        for ways in filter(None, sides):  # ours first: it writes what the peer reads
            own = [*sys.argv[1:], "--rounds", "1", "--part", str(folder), "--ways", *ways]
            command = [sys.executable, "-m", "benchmarks.train_step", *own]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            for name, one in json.loads(lines[-1]).items():
                whole = merged.setdefault(name, one | {"first": [], "seconds": [], "cpu": []})
                for times in ("first", "seconds", "cpu"):
                    whole[times] += one[times]
        check({name: one["losses"] for name, one in merged.items()}, args)
    return {name: merged[name] for name in WAYS if name in merged}


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def report(args: Args, work: Work, found: dict[str, Any], load: tuple[float, ...]) -> dict[str, Any]:
    """What is printed."""
    size = args.chosen
    seconds = {name: one["seconds"] for name, one in found.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(fast: str, slow: str) -> dict[str, float] | None:
        """How many times as fast, round by round: neighbours in time share the machine's load."""
        if fast not in seconds or slow not in seconds:
            return None
        return spread([b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)])

    result = {
        "size": args.size,
        "dtype": args.precision,
        "config": {"vision": dataclasses.asdict(size.config.vision), "text": dataclasses.asdict(size.config.text)},
        "adapters": {"rank": size.rank, "alpha": size.alpha},
        "row": dataclasses.asdict(size.row) | {"fit": args.fit},
        "micro_batch": {"rows": size.rows, "peer_conversations": size.talks},
        "peer_settings": {
            "checkpointing": args.checkpointing,
            "attention": args.attention,
            "adapters": args.adapters if args.precision == "bfloat16" else "float32",
        },
        "apart": args.apart,
        "equal_weights": size.equal,
        "images": len(work.records),
        "conversations": work.conversations,
        "conversation_tokens": work.tokens,
        "supervised_tokens": work.supervised,
        "computed": {name: one["computed"] for name, one in found.items()},
        "losses": {name: [round(loss, 6) for loss in one["losses"]] for name, one in found.items()},
        "first_step_seconds": {name: spread(one["first"]) for name, one in found.items()},
        "compile_seconds": {
            name: round(max(0.0, statistics.median(one["first"]) - medians[name]), 3) for name, one in found.items()
        },
        "compiled_in_rounds": max(one["compiled_in_rounds"] for one in found.values()),
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "cpu_seconds": {name: spread(one["cpu"]) for name, one in found.items()},
        "tokens_per_second": {name: round(work.tokens / median, 1) for name, median in medians.items()},
        "supervised_per_second": {name: round(work.supervised / median, 1) for name, median in medians.items()},
        "tree_over_peer": ratio("tree", "peer"),
        "flat_over_peer": ratio("flat", "peer"),
        "tree_over_flat": ratio("tree", "flat"),
        "peak_bytes": {name: one["peak"] for name, one in found.items()},
        "device": {name: one["device"] for name, one in found.items()},
        "cores": len(os.sched_getaffinity(0)),
        "load": {"before": list(load), "after": list(os.getloadavg())},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "flax", "optax", "torch", "transformers", "peft", "reverie-jax")
        },
    }
    if "peer" in args.ways and "peer" not in found:
        result["peer"] = "not run: this torch does not reach the device that ours runs on"
    return result


def run(args: Args) -> dict[str, Any]:
    """The whole benchmark; a part of it alone where `args.part` says so."""
    load = os.getloadavg()
    if args.cores is not None:  # before either library has made its threads
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: args.cores]))
    work = make_work(args)
    if args.part is not None:
        return measure(args, work, args.part)
    with tempfile.TemporaryDirectory() as place:
        found = in_processes(args, Path(place)) if args.apart else measure(args, work, Path(place))
    return report(args, work, found, load)


def main(args: Args) -> None:
    # Torch wants room on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main(tyro.cli(Args))

"""The sides of `train_step`: one LoRA step by ours, with and without prefix sharing, and by transformers, peft and torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.workload import REVERIE, SPECIAL_IDS, Args, Size, Work
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.train.recipe import Recipe

STEPS = 1000
"""Length of the schedule; so few steps are taken that the learning rate hardly changes."""


@dataclasses.dataclass
class Way:
    """A way to take the step.

    Attributes:
        step: takes a step, waits for it, and returns its loss.
        computed: tokens, images and positions of the LM head that a step computes, padding included.
        useful: arguments of `costs.model_flops`: what of it is needed.
        device: name of the device it runs on.
        peak: returns the peak memory of the device, None if unknown.
        planned: returns the bytes that the compiled step takes in all, after the first step; None if unknown.
    """

    step: Callable[[], float]
    computed: dict[str, int]
    device: str
    peak: Callable[[], int | None]
    useful: dict[str, int]
    planned: Callable[[], int | None] = lambda: None


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
    from reverie_jax.models.checkpoints.write import write_model
    from reverie_jax.models.checkpoints.write_adapters import write_peft
    from reverie_jax.train.step import make_trainable

    size = args.chosen
    config = dataclasses.replace(size.config, image_token_id=work.processor.encoder.image_token_id, tokenization="hf")
    base = folder / "base"
    if base.exists():
        model = read_model(base, dtype=jnp.dtype(args.precision))
    else:

        def make() -> VisionLanguageModel:
            return VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(args.precision))

        # Jitted, so that a 7B model's random numbers never exist in float32.
        model = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make()))())
    if size.equal_weights and not base.exists():
        write_model(model, base)
    make_trainable(model, recipe_for(size, size.micro_batch, prefix_sharing=True))
    if size.equal_weights and not (folder / "adapter").exists():
        (folder / "adapter").mkdir()
        write_peft(model, folder / "adapter", base_model=str(base), projector=False)
    if args.quantization is not None:
        lora.quantize(model, args.quantization)
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

        program: Any = None

        def step() -> float:
            nonlocal state, program
            if program is None:
                program = take.lower(state, frozen, on_device).compile()  # type: ignore[attr-defined]
            state, metrics = program(state, frozen, on_device)
            jax.block_until_ready(state)
            return float(metrics.loss)

        computed = {"tokens": batch.tokens.size, "images": batch.flat_tokens.size, "head": batch.parent.size}
        return Way(step, computed, device.device_kind, peak, useful_work(batch), lambda: program_bytes(program))

    return {name: make_way(name == "tree") for name in names}


def useful_work(batch: Batch) -> dict[str, int]:
    """Count a batch without its padding, as the training log does."""
    trees = int((batch.flat_tokens > 0).sum())
    tokens = int((batch.positions > 0).sum()) + trees
    pairs = int((batch.ends - np.arange(batch.ends.shape[1])[None]).sum()) - (batch.tokens.size - tokens)
    return {"tokens": tokens, "pairs": pairs, "edges": int((batch.weight > 0).sum()), "images": trees}


def program_bytes(program: Any) -> int:
    """Return what a compiled program takes: arguments, temporaries, and outputs that reuse no argument."""
    memory = program.memory_analysis()
    outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs


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

    from reverie_jax.models.config import CLIP_MEAN, CLIP_STD

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
            {
                "tokens": work.tokens,
                "pairs": sum(len(one) * (len(one) + 1) // 2 for one, _ in pairs),
                "edges": work.supervised,
                "images": len(pairs),
            },
        )
    }

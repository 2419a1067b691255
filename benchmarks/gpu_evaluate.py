"""Part of `benchmarks.gpu`: POPE-shaped evaluation by our engine, and by transformers with and without a prefix cache."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


def arguments(tiny: bool, **changes: Any) -> Any:
    from benchmarks.evaluate import Args

    some = {"size": "tiny", "images": 2, "questions": 2, "peer_images": 2, "batch_size": 1, "batches": (2,)}
    whole = {"size": "7b", "images": 64, "questions": 6, "peer_images": 16, "batch_size": 16, "batches": (24, 48, 96)}
    return Args(**((some if tiny else whole) | changes))


def prepared(args: Any) -> tuple[Any, Any, Any]:
    """Return configuration, processor and questions."""
    from benchmarks.evaluate import OBJECTS, make_questions
    from benchmarks.workload import small_tokenizer
    from reverie_jax.data.processor import Processor
    from reverie_jax.data.tokenization import Encoder
    from reverie_jax.eval.benchmarks.interface import SHORT

    config = dataclasses.replace(args.config, image_token_id=3, tokenization="hf")
    texts = " ".join(f"USER: Is there a {name} in the image?\n{SHORT} ASSISTANT:" for name in OBJECTS)
    encoder = Encoder(small_tokenizer(texts), "vicuna_v1", config.vision.patches, 3)
    return config, Processor(encoder, config.vision.image_size, context=config.text.context), make_questions(args)


def random_model(config: Any, dtype: str) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from reverie_jax.models import VisionLanguageModel

    def make() -> Any:
        return VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))

    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make()))())


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ours(tiny: bool, report: Report) -> None:
    """Report questions per second, FLOPs of the prefill and bandwidth of decoding."""
    import jax
    import jax.numpy as jnp

    from benchmarks.evaluate import Ours, utilization
    from reverie_jax.train.plan import costs
    from reverie_jax.train.plan.topology import chip_of

    args = arguments(tiny)
    config, processor, images = prepared(args)
    model = random_model(config, args.precision)
    sizes = costs.Sizes.of(model)
    model.decoder.unstack()
    seconds = {}
    # One token is prefill alone. Programs have room for 128 tokens where 64 or 33 are decoded, so that these two differ in
    # decoding steps only.
    for new in (1, 2, 64, 33):
        side = Ours(dataclasses.replace(args, max_new_tokens=new), model, processor, images)
        if new in (1, 64):
            seconds_of(lambda side=side: side.answer(images[: args.batch_size]))  # compiles, if the shape is the same
            seconds_of(side.answer)
        seconds[new] = seconds_of(side.answer)
        report({"questions_per_second": {f"{n} tokens": args.images * args.questions / s for n, s in seconds.items()}})
    groups, text = side.shapes(), config.text
    steps = sum(group["batches"] for group in groups)
    width = jnp.dtype(args.precision).itemsize
    kv = sum(g["batches"] * 2 * g["rows"] * g["tokens"] * text.kv_heads * text.head_dim * text.layers for g in groups)
    step = (seconds[64] - seconds[33]) / 31 / steps
    read = width * (sizes.layers + sizes.head + kv / steps)
    chip = chip_of(jax.devices()[0].device_kind)
    report(
        {
            "shapes": {str(number): group for number, group in enumerate(groups)},
            "decode_step_ms": 1e3 * step,
            "decode_step_bytes": read,
            "decode_share_of_bandwidth": None if chip is None else read / step / chip.bandwidth,
            "prefill_mfu": utilization(args, config, sizes, side, seconds[1]).get("share_of_peak_flops"),
            "peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        }
    )


def peers(tiny: bool, report: Report) -> None:
    """Report questions per second of transformers' generate: plain, with a static cache, and from a cached prefix."""
    from benchmarks.evaluate import Peer, peer_device, try_batches
    from benchmarks.gpu_kernels import attempt
    from reverie_jax.models.checkpoints.write import write_model

    device = peer_device()
    if device is None:
        raise RuntimeError("torch cannot use the device that JAX runs on")
    small = arguments(True, max_new_tokens=4)
    config, processor, images = prepared(small)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(random_model(config, "float32"), folder)
        peer = Peer(small, config, processor, images, folder)
        if peer.answer(2) != peer.answer_from_prefix(2):
            raise RuntimeError("transformers answers otherwise from a cached prefix than without")
        report({"answers_from_prefix_equal": True})
        found: dict[str, Any] = {}
        if not tiny:
            args = arguments(tiny)
            config, processor, images = prepared(args)
            peer = Peer(args, config, processor, images[: args.peer_images], folder)
        for new in (2, 4) if tiny else (2, 64):
            # Few tries of long answers: they take long, and the best batch is the largest that fits.
            batches = peer.args.batches if new < 64 else peer.args.batches[-1:]
            peer.args = dataclasses.replace(peer.args, max_new_tokens=new, batches=batches)
            for way in ("prefix", "plain", "static"):
                peer.cache = "static" if way == "static" else None
                answer = peer.answer_from_prefix if way == "prefix" else peer.answer
                for batch in batches:
                    one = dataclasses.replace(peer.args, batches=(batch,))
                    tried = attempt(functools.partial(try_batches, one, answer, len(peer.sequences), rounds=1))
                    found[f"{way}, {new} tokens, batch {batch}"] = tried[batch] if isinstance(tried, dict) else tried
                    report({"questions_per_second": dict(found)})

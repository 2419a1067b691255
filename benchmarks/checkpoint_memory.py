"""Measure peak memory and time of a 7B checkpoint: load it, convert it to Orbax and back, compare bit by bit.

    python -m benchmarks.checkpoint_memory /path/with/45GB

It first makes a random llava-1.5-7b in llava-hf format (bfloat16, three shards). Every stage is a process of its own, whose
peak is the kernel's count (VmHWM), the interpreter and JAX included.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

STAGES = ("load", "to-orbax", "load-orbax", "from-orbax")


@dataclasses.dataclass(frozen=True)
class Args:
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder for the checkpoints."""
    architecture: str = "llava-1.5-7b"
    """A name in `models.config.ARCHITECTURES`."""
    stage: str | None = None
    """Run this stage alone, in this process."""


def make(folder: Path, architecture: str) -> None:
    """Write random weights of plausible size without a model: each tensor's bits come from a seeded generator."""
    import jax.numpy as jnp
    from flax import nnx
    from safetensors.numpy import save_file

    from reverie_jax.models.architectures import ARCHITECTURES
    from reverie_jax.models.checkpoints.configs import llava_hf_json, preprocessor_json
    from reverie_jax.models.checkpoints.read import abstract_model
    from reverie_jax.models.checkpoints.specs import parameter_specs, to_file_layout
    from reverie_jax.scenes.tokenizer import train_tokenizer

    config = ARCHITECTURES[architecture]
    text = dataclasses.replace(config.text, vocab=32064)
    config = dataclasses.replace(config, text=text, image_token_id=3, template="llava-hf", tokenization="hf")
    model = abstract_model(config, jnp.bfloat16)
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names_and_shapes, sizes = [], []
    for spec in parameter_specs(config):
        shape = shapes[spec.path][len(spec.stack) :]
        shape = to_file_layout(spec.layout, np.broadcast_to(np.False_, shape), config.vision.patch_size).shape
        for name in spec.names:
            names_and_shapes.append((name, shape))
            sizes.append(2 * math.prod(shape))
    edges = np.searchsorted(np.cumsum(sizes), [sum(sizes) / 3, 2 * sum(sizes) / 3]) + 1
    weight_map = {}
    for number, part in enumerate(np.split(np.arange(len(names_and_shapes)), edges)):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        shard = {}
        for name, shape in (names_and_shapes[i] for i in part):
            bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
            shard[name] = ((bits & 0x80FF) | 0x3C00).view(jnp.bfloat16).reshape(shape)  # between 1/128 and 1/32
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(llava_hf_json(config, "bfloat16", special)))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_json(config)))
    train_tokenizer(600, 0).save_pretrained(folder)


def stage(args: Args) -> dict[str, float]:
    """Run one stage; return its seconds and its peak memory in bytes."""
    started = time.perf_counter()
    source, orbax, back = args.folder / "source", args.folder / "orbax", args.folder / "back"
    from reverie_jax.convert import convert
    from reverie_jax.loading import load_model

    match args.stage:
        case "load":
            load_model(source)
        case "to-orbax":
            convert(source, orbax, to="orbax")
        case "load-orbax":
            load_model(orbax)
        case "from-orbax":
            convert(orbax, back, to="llava-hf")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every tensor, with one tensor in memory at a time."""
    from reverie_jax.models.checkpoints.files import weights_of

    tensors, digests = weights_of(folder), {}
    assert tensors is not None
    tensors.read_all(
        lambda name, array: digests.__setitem__(name, hashlib.sha256(array.view(np.uint8).data).hexdigest()),
        set(tensors.stored),
    )
    return digests


def main(args: Args) -> None:
    """Run all stages, or the one of `args`."""
    if args.stage is not None:
        print(json.dumps(stage(args)))
        return
    source = args.folder / "source"
    if not source.exists():
        make(source, args.architecture)
    weights = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    print(f"weights {weights / 1e9:.2f} GB")
    for name in STAGES:
        command = [sys.executable, "-m", "benchmarks.checkpoint_memory", str(args.folder), "--stage", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        ratio = result["peak_bytes"] / weights
        print(
            f"{name:11} {result['seconds']:6.0f} s, peak {result['peak_bytes'] / 1e9:6.2f} GB = {ratio:.3f} x weights"
        )
    same = contents(source) == contents(args.folder / "back")
    print(f"round trip: {'bit for bit the same' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

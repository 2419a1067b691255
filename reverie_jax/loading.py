"""A checkpoint as a model and the processor that speaks its language."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from reverie_jax.data.processor import Processor, example_template
from reverie_jax.data.tokenization import load_tokenizer
from reverie_jax.errors import CheckpointError
from reverie_jax.models import VisionLanguageModel, VLMConfig
from reverie_jax.models.checkpoints import attach_adapter, read_config, read_model
from reverie_jax.models.checkpoints.files import read_json, resolve
from reverie_jax.models.checkpoints.parts import recognise, recorded_base
from reverie_jax.models.config import ProjectorKind
from reverie_jax.train.checkpoint import IDENTITY, load_run, read_identity
from reverie_jax.train.recipes import Recipe

SCENES_BASE = "scenes-base"
"""Names the small base that ships with the package."""

_log = logging.getLogger(__name__)

Paths = str | Path | Sequence[str | Path] | None


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: the shipped base by its name, a path as it is, else a hub id, downloaded.

    Raises:
        CheckpointError: there is none.
    """
    shipped = Path(__file__).parent / "scenes" / "base"
    return shipped if str(name) == SCENES_BASE else resolve(name)


def as_list(paths: Paths) -> list[str | Path]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, str | Path) else list(paths)


def load_model(
    path: str | Path,
    *,
    components: Paths = None,
    adapter: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """A model and its processor from a checkpoint of any format that is read, recognised by its content.

    Args:
        path: a folder (llava-hf, original LLaVA, LLaVA-pp, a LLaVA LoRA folder, Orbax), an mm_projector.bin, a hub id
            `owner/name[@revision]`, or "scenes-base".
        components: the parts that `path` lacks: plain language model, CLIP.
        adapter: a PEFT adapter, a LLaVA LoRA folder or a run folder of `reverie train`. It is kept apart from the
            weights: `models.lora.merge` folds it in, `models.lora.switch` switches it off.
        mesh: where the parameters go; one device by default.
        dtype: of matrices and computation. As stored by default, but bfloat16 for float16 files on a TPU.

    Raises:
        CheckpointError: weights, configuration or tokenizer cannot be used; adapter and base do not go together.
    """
    folder, parts = checkpoint_folder(path), [checkpoint_folder(part) for part in as_list(components)]
    model = read_model(folder, components=parts, dtype=None if dtype is None else jnp.dtype(dtype), mesh=mesh)
    if dtype is None and model.compute_dtype == jnp.float16 and jax.default_backend() == "tpu":
        _log.warning("%s: stored as float16, which TPUs do not compute in: read as bfloat16", folder)
        del model
        model = read_model(folder, components=parts, dtype=jnp.bfloat16, mesh=mesh)
    if adapter is not None:
        put_adapter(model, adapter, [folder, *parts])
    processor = Processor.of(model.config, find_tokenizer(model.config, folder, parts), example_template(folder))
    return model, processor if adapter is None else as_tuned(processor, Path(adapter))


def load_with_projector(
    path: str | Path,
    *,
    components: Paths = None,
    kind: ProjectorKind,
    seed: int = 0,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """`load_model` of a plain language model and a CLIP tower, with a fresh projector between them (LLaVA's first stage).

    Args:
        path, components: the two, in any order.
        kind: of the projector. Weights and biases are uniform in +-1/sqrt(inputs), as torch starts a linear layer.

    Raises:
        CheckpointError: they are not these two.
    """
    places = [checkpoint_folder(part) for part in (path, *as_list(components))]
    found = {recognise(place).kind: place for place in places}
    if set(found) != {"llm", "clip"} or len(places) != 2:
        raise CheckpointError(
            f"{', '.join(map(str, places))}: a fresh projector goes between a plain language model and a CLIP tower"
        )
    clip, words = (read_json(found[kind] / "config.json") for kind in ("clip", "llm"))
    inputs, width = clip.get("vision_config", clip)["hidden_size"], words["hidden_size"]
    names = {"": (inputs, width)} if kind == "linear" else {"0.": (inputs, width), "2.": (width, width)}
    rng, tensors = np.random.default_rng(seed), {}
    for name, (fan_in, fan_out) in names.items():
        bound = fan_in**-0.5
        for part, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            tensors[f"model.mm_projector.{name}{part}"] = rng.uniform(-bound, bound, shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "mm_projector.safetensors"
        save_file(tensors, file)
        return load_model(found["llm"], components=[found["clip"], file], mesh=mesh, dtype=dtype)


def bare(path: str | Path, components: Paths = None) -> bool:
    """Whether these are a plain language model and a CLIP tower, with no projector among them."""
    kinds = [recognise(checkpoint_folder(part)).kind for part in (path, *as_list(components))]
    return sorted(kinds) == ["clip", "llm"]


def load_processor(path: str | Path, *, components: Paths = None) -> Processor:
    """The processor alone: no weight is read, of the files that hold them only the lists.

    Raises:
        CheckpointError: configuration or tokenizer cannot be used.
    """
    folder, parts = checkpoint_folder(path), [checkpoint_folder(part) for part in as_list(components)]
    config = read_config(folder, components=parts)
    return Processor.of(config, find_tokenizer(config, folder, parts), example_template(folder))


def as_tuned(processor: Processor, adapter: Path) -> Processor:
    """The processor as a run of `reverie train` had it: its recipe may have chosen template and aspect. Other adapters do
    not say, and a projector's first training has a template that is good for nothing else.
    """
    if not (adapter / IDENTITY).exists():
        return processor
    recipe = Recipe.from_json(json.dumps(read_identity(adapter)["recipe"]))
    return (
        processor
        if recipe.trainable == "projector"
        else processor.using(recipe.template, image_aspect_ratio=recipe.image_aspect_ratio)
    )


def put_adapter(model: VisionLanguageModel, adapter: str | Path, base: Sequence[Path]) -> tuple[str, bool]:
    """Puts an adapter folder of any kind on a model, in place.

    Args:
        base: what the model was read from.

    Returns:
        The base's name as the folder records it (empty where it does not), and whether it brought a projector.

    Raises:
        CheckpointError: it is none, or does not fit.
        ResumeError: likewise, for run folders.
    """
    if (Path(adapter) / IDENTITY).exists():
        load_run(model, Path(adapter))
        return "", True
    found = attach_adapter(model, adapter, base=base)
    return found.base, found.projector


def find_tokenizer(config: VLMConfig, folder: Path, parts: Sequence[Path]) -> Any:
    """The tokenizer of the first that has one: the folder, the parts, the base that a LoRA folder records.

    Raises:
        CheckpointError: none has, it cannot be read, or it does not go with the model.
    """
    homes = [home if home.is_dir() else home.parent for home in (folder, *parts)]
    # CLIP has a tokenizer too, of its text tower's.
    homes = [home for home in homes if not (home / "config.json").exists() or recognise(home).kind != "clip"]
    if not parts and recognise(folder).kind == "llava-lora":
        homes.append(recorded_base(recognise(folder)).place)
    found = [home for home in homes if any((home / name).exists() for name in ("tokenizer.json", "tokenizer.model"))]
    if not found:
        raise CheckpointError(f"{', '.join(map(str, homes))}: no tokenizer.json or tokenizer.model")
    try:
        tokenizer = load_tokenizer(found[0])
    except Exception as error:  # a broken file raises what its library likes: OSError, ValueError, bare Exception
        raise CheckpointError(f"{found[0]}: the tokenizer cannot be read ({' '.join(str(error).split())})") from None
    if len(tokenizer) > config.text.vocab:
        raise CheckpointError(
            f"{found[0]}: the tokenizer has {len(tokenizer)} entries, the model's vocabulary {config.text.vocab}"
        )
    return tokenizer

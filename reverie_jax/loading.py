"""Load a checkpoint as a model and its processor."""

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

from reverie_jax.data.processor import Processor, read_example_template
from reverie_jax.data.tokenization import load_tokenizer
from reverie_jax.errors import CheckpointError
from reverie_jax.models import VisionLanguageModel, VLMConfig
from reverie_jax.models.checkpoints import attach_adapter, read_config, read_model
from reverie_jax.models.checkpoints.components import Component, ComponentLike, as_list, detect_component, recorded_base
from reverie_jax.models.checkpoints.files import resolve
from reverie_jax.models.config import ProjectorKind
from reverie_jax.train.checkpoint import IDENTITY, load_run, read_identity
from reverie_jax.train.recipes import Recipe

SCENES_BASE = "scenes-base"
"""Name of the small base model that is part of the package."""

_log = logging.getLogger(__name__)

Components = ComponentLike | Sequence[ComponentLike] | None


def find_checkpoint(name: str | Path) -> Path:
    """Return the path of a checkpoint: the packaged base model, a local path, or a hub id, which is downloaded.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    packaged = Path(__file__).parent / "scenes" / "base"
    return packaged if str(name) == SCENES_BASE else resolve(name)


def detect_components(path: ComponentLike, components: Components = None) -> list[Component]:
    """Return what a checkpoint and its further components are, found by `find_checkpoint`.

    Raises:
        CheckpointError: One is missing, or of no known format.
    """
    return [
        source if isinstance(source, Component) else detect_component(find_checkpoint(source))
        for source in (path, *as_list(components))
    ]


def load_model(
    path: ComponentLike,
    *,
    components: Components = None,
    adapter: str | Path | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Load a model and its processor from a checkpoint of any supported format, detected by its content.

    Args:
        path: A folder (llava-hf, original LLaVA, LLaVA-pp, a LLaVA LoRA folder, Orbax), an mm_projector.bin, a hub id
            `owner/name[@revision]`, or "scenes-base".
        components: What `path` lacks: plain language model, CLIP.
        adapter: A PEFT adapter, a LLaVA LoRA folder or a run folder of `reverie train`. It is not merged:
            `models.lora.merge` merges it, `models.lora.set_adapters_enabled` disables it.
        mesh: Where the parameters are placed; one device by default.
        dtype: Of matrices and computation. As stored by default, but bfloat16 for float16 files on a TPU.

    Raises:
        CheckpointError: Weights, configuration or tokenizer cannot be used, or the adapter has another base model.
    """
    main, *others = detect_components(path, components)
    model = read_model(main, components=others, dtype=None if dtype is None else jnp.dtype(dtype), mesh=mesh)
    if dtype is None and model.compute_dtype == jnp.float16 and jax.default_backend() == "tpu":
        _log.warning("%s: stored as float16, which TPUs do not support: loaded as bfloat16", main.path)
        del model
        model = read_model(main, components=others, dtype=jnp.bfloat16, mesh=mesh)
    if adapter is not None:
        load_adapter(model, adapter, [main, *others])
    processor = _make_processor(model.config, main, others)
    return model, processor if adapter is None else apply_run_recipe(processor, Path(adapter))


def load_with_projector(
    path: ComponentLike,
    *,
    components: Components = None,
    kind: ProjectorKind,
    seed: int = 0,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Load a plain language model and a CLIP tower with a new projector between them (LLaVA's first stage).

    Args:
        path: One of the two.
        components: The other.
        kind: Of the projector. Weights and biases are uniform in +-1/sqrt(inputs), as in torch's linear layers.
        seed: Of the projector's weights.
        mesh: As for `load_model`.
        dtype: As for `load_model`.

    Raises:
        CheckpointError: The components are others, or cannot be used.
    """
    parts = detect_components(path, components)
    by_format = {part.format: part for part in parts}
    if set(by_format) != {"llm", "clip"} or len(parts) != 2:
        raise CheckpointError(
            f"{', '.join(str(part.path) for part in parts)}: a new projector needs a plain language model and a CLIP tower"
        )
    llm, clip = by_format["llm"], by_format["clip"]
    inputs, width = clip.config.get("vision_config", clip.config)["hidden_size"], llm.config["hidden_size"]
    layers = {"": (inputs, width)} if kind == "linear" else {"0.": (inputs, width), "2.": (width, width)}
    rng, tensors = np.random.default_rng(seed), {}
    for name, (fan_in, fan_out) in layers.items():
        bound = fan_in**-0.5
        for leaf, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            tensors[f"model.mm_projector.{name}{leaf}"] = rng.uniform(-bound, bound, shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mm_projector.safetensors"
        save_file(tensors, file)
        return load_model(llm, components=[clip, file], mesh=mesh, dtype=dtype)


def lacks_projector(path: ComponentLike, components: Components = None) -> bool:
    """Return whether these are a plain language model and a CLIP tower, without a projector."""
    return sorted(part.format for part in detect_components(path, components)) == ["clip", "llm"]


def load_processor(path: ComponentLike, *, components: Components = None) -> Processor:
    """Load only the processor: no weights are read, only the headers of their files.

    Raises:
        CheckpointError: Configuration or tokenizer cannot be used.
    """
    main, *others = detect_components(path, components)
    return _make_processor(read_config(main, components=others), main, others)


def _make_processor(config: VLMConfig, main: Component, others: Sequence[Component]) -> Processor:
    return Processor.from_config(config, read_tokenizer(config, main, others), read_example_template(main.path))


def apply_run_recipe(processor: Processor, adapter: Path) -> Processor:
    """Return the processor with the template and image aspect ratio of a training run's recipe.

    The processor is unchanged for other adapters, and for a run that trained a projector: its template serves only that.
    """
    if not (adapter / IDENTITY).exists():
        return processor
    recipe = Recipe.from_json(json.dumps(read_identity(adapter)["recipe"]))
    if recipe.trainable == "projector":
        return processor
    return processor.override(recipe.template, image_aspect_ratio=recipe.image_aspect_ratio)


def load_adapter(model: VisionLanguageModel, adapter: str | Path, base: Sequence[ComponentLike]) -> tuple[str, bool]:
    """Load an adapter folder of any kind into a model, in place, without merging it.

    Args:
        model: The base model.
        adapter: A PEFT adapter, a LLaVA LoRA folder or a run folder.
        base: The components that the model was read from.

    Returns:
        The base model's name as the folder records it (empty where it does not), and whether it has a projector.

    Raises:
        CheckpointError: It is not an adapter, or does not fit the model.
        ResumeError: The same, for run folders.
    """
    if (Path(adapter) / IDENTITY).exists():
        load_run(model, Path(adapter))
        return "", True
    attached = attach_adapter(model, adapter, base=base)
    return attached.base_model, attached.projector


def read_tokenizer(config: VLMConfig, main: Component, others: Sequence[Component] = ()) -> Any:
    """Return the tokenizer of the first component that has one; last, of the base model that a LoRA folder records.

    Raises:
        CheckpointError: None has a tokenizer, it cannot be read, or it has more tokens than the model.
    """
    # CLIP has a tokenizer too, its text tower's.
    candidates = [part for part in (main, *others) if part.format != "clip"]
    if not others and main.format == "llava-lora":
        candidates.append(recorded_base(main))
    folders = [part.path if part.path.is_dir() else part.path.parent for part in candidates]
    names = ("tokenizer.json", "tokenizer.model")
    folder = next((folder for folder in folders if any((folder / name).exists() for name in names)), None)
    if folder is None:
        raise CheckpointError(f"{', '.join(map(str, folders))}: no tokenizer.json or tokenizer.model")
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # for a broken file the library raises OSError, ValueError or a bare Exception
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())})") from None
    if len(tokenizer) > config.text.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {config.text.vocab}"
        )
    return tokenizer

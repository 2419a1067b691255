"""Load a checkpoint as a model and its processor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from reverie_jax.data.chat_template import choose_template
from reverie_jax.data.processor import Processor
from reverie_jax.data.tiktoken_files import TIKTOKEN_FILES
from reverie_jax.data.tokenization import load_tokenizer
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.models import VisionLanguageModel, VLMConfig
from reverie_jax.models.checkpoints import attach_adapter, read_config, read_model
from reverie_jax.models.checkpoints.components import Component, ComponentLike, as_list, detect_component
from reverie_jax.models.checkpoints.files import read_json
from reverie_jax.models.checkpoints.resolve import recorded_base, with_settings
from reverie_jax.models.config import ProjectorKind
from reverie_jax.train.checkpoint import find_run, load_run
from reverie_jax.train.identity import IDENTITY, read_identity
from reverie_jax.train.recipe import Recipe

SCENES_BASE = "scenes-base"
"""Name of the small base model that is part of the package."""

_log = logging.getLogger(__name__)

Components = ComponentLike | Sequence[ComponentLike] | None


def find_checkpoint(name: str | Path) -> Path:
    """Return the path of a checkpoint: the packaged base model, a local path, or a hub id, which is downloaded.

    Raises:
        CheckpointError: There is no such checkpoint, or it is of no supported format.
    """
    return _packaged(name) or detect_component(name).path


def _packaged(name: str | Path) -> Path | None:
    return Path(__file__).parent / "scenes" / "base" if str(name) == SCENES_BASE else None


def detect_components(path: ComponentLike, components: Components = None) -> list[Component]:
    """Return what a checkpoint and its further components are; each is found as `find_checkpoint` does.

    Raises:
        CheckpointError: One is missing, or of no known format.
    """
    found = []
    for source in (path, *as_list(components)):
        if not isinstance(source, str | Path | Component) or not str(source):
            raise CheckpointError(f"{source!r}: not a checkpoint; give a path, a hub id or {SCENES_BASE}")
        found.append(detect_component(source if isinstance(source, Component) else _packaged(source) or source))
    return found


def load_model(
    path: ComponentLike,
    *,
    components: Components = None,
    adapter: str | Path | None = None,
    template: str | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Load a model and its processor from a checkpoint of any supported format, detected by its content.

    Args:
        path: A folder (llava-hf, original LLaVA, LLaVA-pp, a LLaVA LoRA folder, Orbax), an mm_projector.bin, a hub id
            `owner/name[@revision]`, or "scenes-base".
        components: What `path` lacks: plain language model, vision tower.
        adapter: A PEFT adapter (a folder, or a file with a `PeftModel`'s state dict), a LLaVA LoRA folder or a run folder of
            `reverie train`. It is not merged: `models.lora.merge` merges it, `models.lora.set_adapters_enabled` disables it.
        template: Name of the chat template, of `data.templates.TEMPLATES`; that of the adapter's run by default, or else the
            checkpoint's own.
        mesh: Where the parameters are placed; one device by default.
        dtype: Of matrices and computation. As stored by default, but bfloat16 for float16 files on a TPU.

    Raises:
        CheckpointError: Weights, configuration or tokenizer cannot be used, or the adapter has another base model.
    """
    main, *others = detect_components(path, components)
    model = read_base(main, others, adapter=adapter, dtype=dtype, mesh=mesh)
    if dtype is None and model.compute_dtype == jnp.float16 and jax.default_backend() == "tpu":
        _log.warning("%s: stored as float16, which TPUs do not support: loaded as bfloat16", main.path)
        del model
        model = read_base(main, others, adapter=adapter, dtype=jnp.bfloat16, mesh=mesh)
    if adapter is not None:
        load_adapter(model, adapter, [main, *others])
    return model, set_processor(model, main, others, adapter, template)


def set_processor(
    model: VisionLanguageModel,
    main: Component,
    others: Sequence[Component],
    adapter: str | Path | None,
    template: str | None,
) -> Processor:
    """Return a model's processor, and set its configuration's template, tokenization and image aspect ratio as there.

    The arguments are those of `read_base` and `load_model`.

    Raises:
        CheckpointError: Tokenizer or template cannot be used.
    """
    processor = _make_processor(model.config, main, others, adapter, template)
    model.config = dataclasses.replace(
        model.config,
        template=processor.encoder.template.name,
        tokenization=processor.encoder.tokenization,
        image_aspect_ratio=processor.image_aspect_ratio,
    )
    return processor


def _make_processor(
    config: VLMConfig,
    main: Component,
    others: Sequence[Component],
    adapter: str | Path | None,
    template: str | None,
) -> Processor:
    """Return a checkpoint's processor, which prepares inputs as its adapter was tuned with.

    A run of `reverie train` says so in its recipe, unless it trained a projector: its template serves only that. A LLaVA
    LoRA folder says so in its config.json.
    """
    aspect, prompted, others_of_it = None, main, list(others)
    if adapter is not None and is_run(adapter):
        recipe = run_recipe(adapter)
        if recipe.trainable != "projector":
            template, aspect = template or recipe.template, recipe.image_aspect_ratio
    elif adapter is not None and (tuned := detect_component(adapter)).format == "llava-lora" and tuned.config:
        layers, config = config.feature_layers, with_settings(config, tuned)
        if config.feature_layers != layers:
            raise CheckpointError(
                f"{tuned.config_path}: mm_vision_select_layer {config.feature_layers} differs from {main.path}'s, {layers}"
            )
        prompted, others_of_it = tuned, [main, *others]
    tokenizer = read_tokenizer(config, main, others)
    chosen = choose_template(config, tokenizer, prompted, others_of_it, template)
    return Processor.from_config(config, tokenizer, chosen).override(image_aspect_ratio=aspect)


def run_recipe(run: str | Path) -> Recipe:
    """Return the recipe of a run folder of `reverie train`.

    Raises:
        ResumeError: The folder does not identify a run.
    """
    return Recipe.from_json(json.dumps(read_identity(find_run(run)[0])["recipe"]))


def read_base(
    main: Component,
    others: Sequence[Component],
    *,
    adapter: str | Path | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> VisionLanguageModel:
    """Read the model that an adapter is for, without its adapter.

    A run of `reverie train` has a projector of its own: plain language model and vision tower need none.

    Args:
        main: The checkpoint.
        others: Its components.
        adapter: As for `load_model`.
        dtype: As for `load_model`.
        mesh: As for `load_model`.

    Raises:
        CheckpointError: Weights or configuration cannot be used.
    """
    if adapter is None or not is_run(adapter) or not lacks_projector(main, others):
        return read_model(main, components=others, dtype=dtype, mesh=mesh)
    with _new_projector([main, *others], run_recipe(adapter).projector_type) as projector:
        return read_model(main, components=[*others, projector], dtype=dtype, mesh=mesh)


def is_run(adapter: str | Path) -> bool:
    """Return whether an adapter is a run folder of `reverie train`, or one of its checkpoints (see `find_run`)."""
    return (find_run(adapter)[0] / IDENTITY).exists()


def load_with_projector(
    path: ComponentLike,
    *,
    components: Components = None,
    kind: ProjectorKind,
    seed: int = 0,
    template: str | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Load a plain language model and a vision tower with a new projector between them (LLaVA's first stage).

    Args:
        path: One of the two.
        components: The other.
        kind: Of the projector. Weights and biases are uniform in +-1/sqrt(inputs), as in torch's linear layers.
        seed: Of the projector's weights.
        template: As for `load_model`.
        mesh: As for `load_model`.
        dtype: As for `load_model`.

    Raises:
        CheckpointError: The components are others, or cannot be used.
    """
    parts = detect_components(path, components)
    by_format = {part.format: part for part in parts}
    if set(by_format) != {"llm", "clip"} or len(parts) != 2:
        raise CheckpointError(
            f"{', '.join(str(part.path) for part in parts)}: a new projector needs a plain language model and a vision tower"
        )
    with _new_projector(parts, kind, seed) as projector:
        components = [by_format["clip"], projector]
        return load_model(by_format["llm"], components=components, template=template, mesh=mesh, dtype=dtype)


@contextlib.contextmanager
def _new_projector(parts: Sequence[Component], kind: ProjectorKind, seed: int = 0) -> Iterator[Component]:
    """Yield a new projector between a plain language model and a vision tower, as a component."""
    llm, clip = (next(part for part in parts if part.format == format) for format in ("llm", "clip"))
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
        yield detect_component(file)


def lacks_projector(path: ComponentLike, components: Components = None) -> bool:
    """Return whether these are a plain language model and a vision tower, without a projector."""
    return sorted(part.format for part in detect_components(path, components)) == ["clip", "llm"]


def load_processor(
    path: ComponentLike,
    *,
    components: Components = None,
    adapter: str | Path | None = None,
    template: str | None = None,
) -> Processor:
    """Load only the processor: no weights are read, only the headers of their files.

    Args:
        path: As for `load_model`.
        components: As for `load_model`.
        adapter: As for `load_model`; of a run folder, the recipe counts.
        template: As for `load_model`.

    Raises:
        CheckpointError: Configuration or tokenizer cannot be used.
    """
    main, *others = detect_components(path, components)
    if lacks_projector(main, others):
        with _new_projector([main, *others], "mlp2x_gelu") as projector:
            config = read_config(main, components=[*others, projector])
    else:
        config = read_config(main, components=others)
    return _make_processor(config, main, others, adapter, template)


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
    if is_run(adapter):
        try:
            return "", load_run(model, adapter).trainable != "adapters"
        except UserError:
            raise
        except Exception as error:  # Orbax's, of many types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(f"{adapter}: its parameters do not fit {base[0]} ({reason})") from error
    attached = attach_adapter(model, adapter, base=base)
    return attached.base_model, attached.projector


def read_tokenizer(config: VLMConfig, main: Component, others: Sequence[Component] = ()) -> Any:
    """Return the tokenizer of the first component that has one; last, of the base model that a LoRA folder records.

    Raises:
        CheckpointError: None has a tokenizer, it cannot be read, or it has more tokens than the model.
    """
    # CLIP has a tokenizer too, its text tower's.
    candidates = [part for part in (main, *others) if part.format != "clip"]
    if main.format == "llava-lora" and all(part.format == "clip" for part in others):
        candidates.append(recorded_base(main))
    folders = [part.path if part.path.is_dir() else part.path.parent for part in candidates]
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", *TIKTOKEN_FILES)
    folder = next((folder for folder in folders if any((folder / name).exists() for name in names)), None)
    if folder is None:
        raise CheckpointError(f"{', '.join(map(str, folders))}: no {', '.join(names[:-1])} or {names[-1]}")
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer("a")  # some settings fail only here
    except Exception as error:  # for a broken file the library raises OSError, ValueError or a bare Exception
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())})") from None
    if config.tokenization == "llava":
        check_reference_tokenizer(tokenizer, folder)
    if len(tokenizer) > config.text.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {config.text.vocab}"
        )
    return tokenizer


def check_reference_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Check that original LLaVA's tokenization can be computed with a tokenizer, and set its `legacy` as the folder says.

    Raises:
        CheckpointError: It is a sentencepiece one that puts other tokens around a text than BOS before it.
    """
    if "\u2581" not in tokenizer.get_vocab():  # a byte-level one is used as it is
        return
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    for key, value in (("add_bos_token", True), ("add_eos_token", False)):
        if settings.get(key) not in (None, value):
            raise CheckpointError(
                f"{path}: {key} {settings[key]!r} is not supported in original LLaVA's format; only {value} is"
            )
    legacy = settings.get("legacy")
    # Without the key, the slow tokenizer that original LLaVA uses is in legacy mode.
    tokenizer.legacy = (folder / "tokenizer.model").exists() if legacy is None else bool(legacy)

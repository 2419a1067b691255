"""Convert a checkpoint of any supported format to a format of other tools (`reverie convert`)."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

import reverie_jax
from reverie_jax.data.chat_template import TEMPLATE_EXAMPLE, read_chat_template
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.processor import Processor
from reverie_jax.data.templates import to_jinja
from reverie_jax.data.tokenization import Encoder, load_tokenizer
from reverie_jax.data.tokenizer_files import SENTENCEPIECE, copy_tokenizer
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.files import write_json
from reverie_jax.hub.cards import write_model_card
from reverie_jax.hub.repository import repository_id
from reverie_jax.loading import (
    Components,
    check_reference_tokenizer,
    detect_components,
    is_run,
    load_adapter,
    read_base,
    run_recipe,
    set_processor,
)
from reverie_jax.models import VisionLanguageModel, VLMConfig, lora
from reverie_jax.models.checkpoints import adapters, base_checksums, orbax, write, write_adapters
from reverie_jax.models.checkpoints.components import (
    ADAPTER_CONFIG,
    DESCRIPTIONS,
    Component,
    ComponentFormat,
    as_list,
    detect_component,
)
from reverie_jax.models.checkpoints.families import tower_name, tunes_tower
from reverie_jax.models.checkpoints.files import new_folder, read_json
from reverie_jax.models.image_size import resize_images

Format = Literal["auto", "llava-hf", "peft", "llava-lora", "llava", "original", "orbax"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ConversionSource:
    """What a conversion starts from.

    Attributes:
        names: Paths or ids as the user gave them: the checkpoint, its components, the adapter.
        base_model: For the adapter's `base_model_name_or_path`.
        projector: Whether the adapter has a projector of its own.
        checksums: Of the base model under the adapter.
    """

    names: tuple[str, ...]
    format: ComponentFormat
    base_model: str
    projector: bool
    checksums: dict[str, str]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "llava-hf",
    components: Components = None,
    adapter: str | Path | None = None,
    template: str | None = None,
    dtype: DTypeLike | None = None,
    image_size: int | None = None,
    shard_bytes: int = write.SHARD_BYTES,
    mesh: Mesh | None = None,
) -> Path:
    """Read `src` (see `loading.load_model`) and write it to the folder `dst`.

    Formats of complete models (`llava-hf`, `llava`, `original`, `orbax`) get adapters merged, in float32 and cast once.
    Formats of adapters (`peft`, `llava-lora`) get the adapters and, if it was tuned with them, the projector. `auto` is
    `peft` for a run that tuned adapters, else `llava-hf`, or what comes next where these do not support the model. The
    folder appears when it is complete.

    Args:
        src: As for `loading.load_model`.
        dst: The output folder; it must not exist, or be empty.
        to: One of `Format`.
        components: As for `loading.load_model`.
        adapter: As for `loading.load_model`.
        template: Name of the chat template; the checkpoint's own by default.
        dtype: Of a complete model's tensors; as stored by default.
        image_size: Side of the images, in pixels, that the tower's positions are resized to; as stored by default.
        shard_bytes: Size of the largest file of weights.
        mesh: As for `loading.load_model`.

    Returns:
        The output folder.

    Raises:
        CheckpointError: Something cannot be read, or the format does not support it; nothing is left behind.
        UserError: The format is unknown.
    """
    if to not in get_args(Format):
        raise UserError(f"--to {to}: unknown format; choose from {', '.join(get_args(Format))}")
    dst = Path(dst)
    differences: list[str] = []
    with new_folder(dst) as folder:
        main, *others = detect_components(src, components)
        model = read_base(main, others, adapter=adapter, dtype=dtype, mesh=mesh)
        to = _choose_format(model.config, adapter) if to == "auto" else to
        _check_format(model.config, to, image_size)
        processor = set_processor(model, main, others, adapter, template)
        source = _describe_source(model, str(src), main, [str(part) for part in as_list(components)], adapter)
        if adapter is not None:
            name, projector = load_adapter(model, adapter, [main, *others])
            source = dataclasses.replace(
                source, base_model=name or repository_id(str(src)) or str(src), projector=projector
            )
        if to in ("peft", "llava-lora"):
            _write_adapter(model, folder, to, source, processor.encoder.tokenizer)
        else:
            lora.merge(model)
            if image_size is not None:
                _resize_images(model, image_size)
            if any(tunes_tower(part.config) for part in (main, *others)):  # the named repository has other weights
                model.config = dataclasses.replace(model.config, vision_tower="")
            keeps_template = template is None and main.format == "llava-hf" and not _changes_prompt(adapter)
            kept = read_chat_template(main.path) if keeps_template else None
            differences = _write_model(model, folder, to, processor, shard_bytes, main.path, kept and kept[1])
        _write_card(folder, model, to, source, adapter)
    for difference in differences:
        _log.warning("%s: %s", dst, difference)
    if to == "llava-lora" and not all(word in dst.resolve().name.lower() for word in ("llava", "lora")):
        _log.warning("%s: original LLaVA's loader needs a folder whose name contains both llava and lora", dst)
    return dst


def _choose_format(config: VLMConfig, adapter: str | Path | None) -> str:
    """Return the format that most others read: adapters of a run as such, where they can be written."""
    recipe = run_recipe(adapter) if adapter is not None and is_run(adapter) else None
    upcycled = recipe is not None and recipe.upcycle is not None
    if config.system != "llava":
        whole = "original"
    else:
        whole = "llava" if upcycled or write.missing_in_llava_hf(config) else "llava-hf"
    if recipe is None or not recipe.has_adapters or whole == "llava":
        return whole
    return whole if config.projector_token and recipe.trainable == "lora" else "peft"


def _check_format(config: VLMConfig, to: str, image_size: int | None) -> None:
    """Check that a format supports a system, and an image size.

    Raises:
        CheckpointError: It does not support the system.
        UserError: An image size is given for a format of adapters.
    """
    if to in ("llava-hf", "llava", "llava-lora"):
        write.check_llava(config, to)
    if to == "original" and config.system == "llava":
        raise CheckpointError(
            "original is the format of MiniGPT-4, mPLUG-Owl and Muffin; write llava, llava-hf or orbax"
        )
    if image_size is not None and to in ("peft", "llava-lora"):
        raise UserError(f"--image-size {image_size}: {to} contains adapters only; write a complete model")


def _resize_images(model: VisionLanguageModel, size: int) -> None:
    try:
        resize_images(model, size)
    except ValueError as error:
        raise UserError(f"--image-size {size}: {error}") from None


def _changes_prompt(adapter: str | Path | None) -> bool:
    """Return whether an adapter says with which prompt it was tuned; PEFT's do not."""
    return adapter is not None and (is_run(adapter) or detect_component(adapter).format != "peft")


def _describe_source(
    model: VisionLanguageModel, src: str, main: Component, others: Sequence[str], adapter: Any
) -> ConversionSource:
    base_model = others[0] if others else src
    if main.format == "llava-lora":
        recorded = read_json(main.path / ADAPTER_CONFIG).get("base_model_name_or_path")
        base_model = str(recorded or base_model)
    names = (src, *others, *([] if adapter is None else [str(adapter)]))
    return ConversionSource(names, main.format, base_model, main.format == "llava-lora", base_checksums(model))


def special_ids(tokenizer: Any, vocab: int) -> dict[str, Any]:
    """Return a tokenizer's special ids under their keys in config.json; padding beyond `vocab` becomes 0."""
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0 if pad is None or pad >= vocab else pad,
    }


def _write_adapter(model: VisionLanguageModel, folder: Path, to: str, source: ConversionSource, tokenizer: Any) -> None:
    if to == "peft":
        write_adapters.write_peft(model, folder, base_model=source.base_model, projector=source.projector)
    else:
        ids = special_ids(tokenizer, model.config.text.vocab)
        write_adapters.write_llava_lora(model, folder, base_model=source.base_model, special_ids=ids)
    checksums = dict(source.checksums)
    if to == "llava-lora" or source.projector:
        checksums.pop("projector")  # the folder has its own
    write_json(folder / adapters.METADATA_FILE, {"base": checksums, "sources": list(source.names)})


def _write_model(
    model: VisionLanguageModel,
    folder: Path,
    to: str,
    processor: Processor,
    shard_bytes: int,
    source: Path,
    chat_template: str | None,
) -> list[str]:
    """Write a complete model.

    Args:
        model: Without adapters.
        folder: An existing folder.
        to: Its format.
        processor: The source's.
        shard_bytes: As for `convert`.
        source: The folder of the checkpoint.
        chat_template: The source's, if it is kept.

    Returns:
        In what other tools answer differently with this folder than the source does here.
    """
    tokenizer, vocab, added = processor.encoder.tokenizer, None, set(processor.encoder.tokenizer.get_vocab())
    prompts = [] if to in ("original", "orbax") else _prompts(processor.encoder)
    if to == "llava-hf":
        _add_image_token(model, tokenizer)
    elif to == "llava":
        vocab = _remove_image_token(model, tokenizer)
        if model.config.tokenization == "llava":
            check_reference_tokenizer(tokenizer, Path(tokenizer.name_or_path))
    ids = special_ids(tokenizer, model.config.text.vocab)
    encoder = Processor.from_config(model.config, tokenizer, processor.encoder.template).encoder
    copy_tokenizer(tokenizer, folder, added=set(tokenizer.get_vocab()) - added, vocab=vocab)
    differences: list[str] = []
    if to == "llava-hf":
        write.write_model(model, folder, shard_bytes=shard_bytes, special_ids=ids)
        differences = _write_processor(folder, encoder, model.config, prompts, chat_template)
    elif to == "llava":
        write.write_original(model, folder, shard_bytes=shard_bytes, special_ids=ids)
        pieces = "\u2581" in tokenizer.get_vocab()
        differences = [
            *_original_differences(folder, pieces),
            *_differing(prompts, _prompts(encoder), "original LLaVA"),
        ]
    elif to == "original":
        write.write_original(model, folder, shard_bytes=shard_bytes, special_ids=ids)
    else:
        orbax.write_model(model, folder)
    if to != "llava-hf":
        (folder / "chat_template.jinja").write_text(to_jinja(encoder.template), "utf-8")
    stops = list(encoder.stop_ids)
    ends = {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    write_json(folder / "generation_config.json", {**ids, **ends})
    if (source / TEMPLATE_EXAMPLE).exists():
        (folder / TEMPLATE_EXAMPLE).write_bytes((source / TEMPLATE_EXAMPLE).read_bytes())
    write_json(folder / adapters.METADATA_FILE, {"checksums": base_checksums(model)})
    return differences


def _add_image_token(model: VisionLanguageModel, tokenizer: Any) -> None:
    """Add the token that transformers' LLaVA needs for images, and rows for it, where an original LLaVA has none."""
    image_id = tokenizer.get_vocab().get(IMAGE)
    if image_id is None:
        tokenizer.add_tokens([IMAGE], special_tokens=True)
        image_id = tokenizer.get_vocab()[IMAGE]
    vocab = max(len(tokenizer), image_id + 1)
    if vocab > model.config.text.vocab:
        write.resize_vocabulary(model, -(-(vocab + 1) // 64) * 64)
    if tokenizer.pad_token is None and len(tokenizer) < model.config.text.vocab:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.config = dataclasses.replace(model.config, image_token_id=image_id)


def _remove_image_token(model: VisionLanguageModel, tokenizer: Any) -> int | None:
    """Cut the model's vocabulary before the image token, if only padding and unused rows follow it.

    Returns:
        The new vocabulary size; None if it is unchanged.
    """
    vocab: dict[str, int] = tokenizer.get_vocab()
    image_id = vocab.get(IMAGE)
    if image_id is None or image_id != model.config.image_token_id:
        return None
    if {name for name, id in vocab.items() if id >= image_id} - {IMAGE, tokenizer.pad_token}:
        return None
    write.resize_vocabulary(model, image_id)
    model.config = dataclasses.replace(model.config, image_token_id=0, tokenization="llava")
    return image_id


def _write_processor(
    folder: Path, encoder: Encoder, config: VLMConfig, prompts: Prompts, chat_template: str | None
) -> list[str]:
    """Write what transformers' processor reads beside the tokenizer, and return in what it differs from `prompts`.

    Without a chat template to keep, the one is written with which transformers gets the same tokens as the source here,
    if there is one. Original LLaVA tokenizes the text after a picture by itself, so with a space before it.
    """
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": "full" if config.feature_select == "full" else "default",
            "num_additional_image_tokens": int(config.vision.class_token),
            "image_token": IMAGE,
        },
    )
    tokenizer = load_tokenizer(folder)
    differences: list[str] = []
    if chat_template is None:
        spaces = itertools.product(("", " "), repeat=2)
        templates = [to_jinja(encoder.template, before=before, after_image=after) for before, after in spaces]
        found = {text: _transformers_prompts(tokenizer, text, config.image_token_id) for text in templates}
        chat_template = max(found, key=lambda text: [a == b for a, b in zip(found[text], prompts, strict=True)])
        differences += _differing(prompts, found[chat_template], "transformers")
    if config.image_aspect_ratio == "pad":
        differences.append("transformers before 4.49 crops pictures instead of padding them")
    (folder / "chat_template.jinja").write_text(chat_template, "utf-8")
    settings = read_json(folder / "tokenizer_config.json")
    # For releases, as 4.37, that read no other file and do not know these tags.
    plain = re.sub("{% (end)?generation %}", "", chat_template)
    if settings.get("chat_template") != plain:
        write_json(folder / "tokenizer_config.json", {**settings, "chat_template": plain})
    return differences


Prompts = list[list[int]]
"""Token ids of a question about a picture, and of a further question after its answer; -1 is the picture."""

_TALK = (Turn("user", f"{IMAGE}\nWhat is it?"), Turn("assistant", "A cat."), Turn("user", "Why?"))


def _prompts(encoder: Encoder) -> Prompts:
    """Return what the model is asked here."""
    tokens = [encoder(Conversation(turns, (0,))) for turns in (_TALK[:1], _TALK)]
    return [
        [-1 if slot == 0 else int(id) for id, slot in zip(each.ids, each.image_slots, strict=True) if slot <= 0]
        for each in tokens
    ]


def _transformers_prompts(tokenizer: Any, chat_template: str, image_id: int) -> Prompts:
    """Return what the model is asked by transformers with a chat template."""
    messages = [
        {
            "role": turn.role,
            "content": [{"type": "image"}] * turn.text.count(IMAGE)
            + [{"type": "text", "text": turn.text.removeprefix(f"{IMAGE}\n")}],
        }
        for turn in _TALK
    ]
    options = {"chat_template": chat_template, "add_generation_prompt": True, "tokenize": False}
    texts = [tokenizer.apply_chat_template(part, **options) for part in (messages[:1], messages)]
    return [[-1 if id == image_id else id for id in tokenizer(text)["input_ids"]] for text in texts]


def _differing(ours: Prompts, theirs: Prompts, tool: str) -> list[str]:
    """Return where another tool's tokens differ first, if they do."""
    if ours == theirs:
        return []
    where = "later turns"
    if ours[0] != theirs[0]:
        equal = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*(ours[0], theirs[0]), strict=False)))
        where = "the text after a picture" if (-1, -1) in equal else "the text before a picture"
    return [f"{tool} tokenizes {where} differently, so its answers can differ"]


def _original_differences(folder: Path, has_pieces: bool) -> Iterator[str]:
    """Yield what original LLaVA's loader does not accept.

    Args:
        folder: The written model.
        has_pieces: Whether the tokenizer is a sentencepiece one.
    """
    if not (folder / SENTENCEPIECE).exists() and has_pieces:
        yield f"original LLaVA's loader needs {SENTENCEPIECE}, which the source lacks: add the language model's"
    tower = tower_name(read_json(folder / "config.json"))
    path = Path(tower)
    known = tower.startswith(("openai", "laion")) or "ShareGPT4V" in tower
    if not known and not (path.is_absolute() and path.exists()):
        yield (
            f"original LLaVA's loader does not accept a vision tower named {tower}: set mm_vision_tower in config.json to"
            " the absolute path of a CLIP of the same sizes (its weights are replaced by this folder's)"
        )


def _write_card(
    folder: Path, model: VisionLanguageModel, to: str, source: ConversionSource, adapter: str | Path | None
) -> None:
    config, factors = model.config, [factor for _, _, *factors in lora.adapters(model) for factor in factors]
    tower = f"{config.vision_tower}, " if config.vision_tower else ""
    of = source.checksums if factors else base_checksums(model)
    checksums = ", ".join(f"{name} `{checksum}`" for name, checksum in of.items())
    table = {
        "made by": f"`reverie convert --to {to}`, reverie-jax {reverie_jax.__version__}, {datetime.date.today()}",
        "from": f"{DESCRIPTIONS[source.format]}: " + ", ".join(f"`{name}`" for name in source.names),
        "decoder": f"{config.text.family}, {config.text.layers} layers of {config.text.hidden}, "
        f"vocabulary {config.text.vocab}",
        "vision tower": f"{tower}{config.vision.layers} layers of {config.vision.hidden}, images of "
        f"{config.vision.image_size} pixels",
        "projector": config.projector,
        "images": {"pad": "padded", "square": "cropped", "stretch": "stretched"}[config.image_aspect_ratio]
        + " to squares",
        "prompt": f"template `{config.template}`, tokenization `{config.tokenization}`",
        "base model" if factors else "checksums": checksums,
    }
    if factors:
        size = sum(factor.size for factor in factors)
        table["adapters"] = f"LoRA, {size:,} parameters, for `{source.base_model}`"
    else:
        table["dtype"] = np.dtype(model.compute_dtype).name
    names = [source.base_model] if factors else source.names
    bases = list(dict.fromkeys(filter(None, map(repository_id, names))))
    recipe = run_recipe(adapter).to_yaml() if adapter is not None and is_run(adapter) else ""
    write_model_card(folder, to, config.system, table, base_models=bases, recipe=recipe)

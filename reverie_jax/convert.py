"""Convert a checkpoint of any supported format to a format of other tools (`reverie convert`)."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jax.typing import DTypeLike

import reverie_jax
from reverie_jax.data.chat_template import TEMPLATE_EXAMPLE
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.processor import Processor
from reverie_jax.data.templates import to_jinja
from reverie_jax.errors import UserError
from reverie_jax.files import write_json
from reverie_jax.loading import (
    Components,
    check_reference_tokenizer,
    detect_components,
    load_adapter,
    read_base,
    set_processor,
)
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.checkpoints import adapters, base_checksums, orbax, write, write_adapters
from reverie_jax.models.checkpoints.components import ADAPTER_CONFIG, DESCRIPTIONS, Component, ComponentFormat, as_list
from reverie_jax.models.checkpoints.files import new_folder, read_json

Format = Literal["llava-hf", "peft", "llava-lora", "llava", "orbax"]

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
    shard_bytes: int = write.SHARD_BYTES,
) -> Path:
    """Read `src` (see `loading.load_model`) and write it to the folder `dst`.

    Formats of complete models (`llava-hf`, `llava`, `orbax`) get adapters merged, in float32 and cast once. Formats of
    adapters (`peft`, `llava-lora`) get the adapters and, if it was tuned with them, the projector. The folder appears
    when it is complete.

    Args:
        src: As for `loading.load_model`.
        dst: The output folder; it must not exist, or be empty.
        to: One of `Format`.
        components: As for `loading.load_model`.
        adapter: As for `loading.load_model`.
        template: Name of the chat template; the checkpoint's own by default.
        dtype: Of a complete model's tensors; as stored by default.
        shard_bytes: Size of the largest file of weights.

    Returns:
        The output folder.

    Raises:
        CheckpointError: Something cannot be read, or the format does not support it; nothing is left behind.
        UserError: The format is unknown.
    """
    if to not in get_args(Format):
        raise UserError(f"--to {to}: unknown format; choose from {', '.join(get_args(Format))}")
    dst = Path(dst)
    with new_folder(dst) as folder:
        main, *others = detect_components(src, components)
        model = read_base(main, others, adapter=adapter, dtype=dtype)
        processor = set_processor(model, main, others, adapter, template)
        source = _describe_source(model, str(src), main, [str(part) for part in as_list(components)], adapter)
        if adapter is not None:
            name, projector = load_adapter(model, adapter, [main, *others])
            source = dataclasses.replace(source, base_model=name or str(src), projector=projector)
        if to in ("peft", "llava-lora"):
            _write_adapter(model, folder, to, source, processor.encoder.tokenizer)
        else:
            lora.merge(model)
            _write_model(model, folder, to, processor, shard_bytes, main.path)
        _write_readme(folder, model, to, source)
    if to == "llava-lora" and not all(word in dst.resolve().name.lower() for word in ("llava", "lora")):
        _log.warning("%s: original LLaVA's loader needs a folder whose name contains both llava and lora", dst)
    return dst


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
    model: VisionLanguageModel, folder: Path, to: str, processor: Processor, shard_bytes: int, source: Path
) -> None:
    tokenizer, vocab = processor.encoder.tokenizer, None
    if to == "llava-hf":
        _add_image_token(model, tokenizer)
    elif to == "llava":
        vocab = _remove_image_token(model, tokenizer)
        if model.config.tokenization == "llava":
            check_reference_tokenizer(tokenizer, source)
    ids = special_ids(tokenizer, model.config.text.vocab)
    encoder = Processor.from_config(model.config, tokenizer, processor.encoder.template).encoder
    if to == "llava-hf":
        write.write_model(model, folder, shard_bytes=shard_bytes, special_ids=ids)
        _write_processor(folder, model.config.vision.patch_size)
    elif to == "llava":
        write.write_original(model, folder, shard_bytes=shard_bytes, special_ids=ids)
    else:
        orbax.write_model(model, folder)
    stops = list(encoder.stop_ids)
    ends = {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    write_json(folder / "generation_config.json", {**ids, **ends})
    tokenizer.chat_template = None  # the checkpoint's may be another
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(to_jinja(encoder.template), "utf-8")
    if hasattr(tokenizer, "legacy"):  # transformers 5 does not write it
        settings = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**settings, "legacy": tokenizer.legacy})
    if vocab is not None:
        _truncate_tokenizer(folder, vocab)
    if (source / TEMPLATE_EXAMPLE).exists():
        (folder / TEMPLATE_EXAMPLE).write_bytes((source / TEMPLATE_EXAMPLE).read_bytes())
    write_json(folder / adapters.METADATA_FILE, {"checksums": base_checksums(model)})


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


def _truncate_tokenizer(folder: Path, vocab: int) -> None:
    """Remove the tokens from id `vocab` on from a saved tokenizer; transformers can add tokens, but not remove them."""
    content = read_json(folder / "tokenizer.json")
    removed = {token["content"] for token in content["added_tokens"] if token["id"] >= vocab}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab]
    write_json(folder / "tokenizer.json", content)
    settings = read_json(folder / "tokenizer_config.json")
    for key, value in list(settings.items()):
        if isinstance(value, str) and value in removed:
            settings[key] = settings.get("unk_token")
        elif isinstance(value, list):
            settings[key] = [name for name in value if name not in removed]
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {id: token for id, token in decoder.items() if int(id) < vocab}
    settings.pop("image_token", None)
    write_json(folder / "tokenizer_config.json", settings)


def _write_processor(folder: Path, patch_size: int) -> None:
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE,
        },
    )


_USAGE = {
    "llava-hf": '`LlavaForConditionalGeneration.from_pretrained("{name}")` in transformers, or vLLM.',
    "llava": 'original LLaVA\'s `load_pretrained_model("{name}", None, …)`.',
    "peft": '`PeftModel.from_pretrained(base, "{name}")` on `LlavaForConditionalGeneration`.',
    "llava-lora": 'original LLaVA\'s `load_pretrained_model("{name}", base, …)`; its name must contain llava and lora.',
    "orbax": "reverie-jax only.",
}


def _write_readme(folder: Path, model: VisionLanguageModel, to: str, source: ConversionSource) -> None:
    config, factors = model.config, [factor for _, _, *factors in lora.adapters(model) for factor in factors]
    tower = f"{config.vision_tower}, " if config.vision_tower else ""
    checksums = ", ".join(f"{name} `{checksum}`" for name, checksum in source.checksums.items())
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
    lines = [f"# {'LoRA adapters' if factors else 'Model'} ({to})", ""]
    lines += [f"Loads with {_USAGE[to].format(name='path/to/this/folder')}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in table.items()), ""]
    (folder / "README.md").write_text("\n".join(lines), "utf-8")

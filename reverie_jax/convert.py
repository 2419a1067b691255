"""`reverie convert`: a checkpoint of any format that is read, in any format that others read."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import reverie_jax
from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.processor import TEMPLATE_EXAMPLE, Processor, read_example_template
from reverie_jax.data.templates import to_jinja
from reverie_jax.data.tokenization import Encoder
from reverie_jax.errors import UserError
from reverie_jax.files import write_json
from reverie_jax.loading import Paths, as_list, checkpoint_folder, find_tokenizer, put_adapter
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.checkpoints import adapters, base_checksums, orbax, read_model, write
from reverie_jax.models.checkpoints.files import new_folder, read_json
from reverie_jax.models.checkpoints.parts import SAID, recognise

Format = Literal["llava-hf", "peft", "llava-lora", "llava", "orbax"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a conversion starts.

    Attributes:
        names: the paths or ids as the user gave them: first the source, then base and adapter.
        base_model: what an adapter's `base_model_name_or_path` shall say.
        projector: the adapters came with a projector of their own.
        identity: of the base under the adapters.
    """

    names: tuple[str, ...]
    kind: str
    base_model: str
    projector: bool
    base_checksums: dict[str, str]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "llava-hf",
    components: Paths = None,
    adapter: str | Path | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: int = write.SHARD_BYTES,
) -> Path:
    """Reads `src` (see `loading.load_model`) and writes it to the folder `dst`.

    Whole models (`llava-hf`, `llava`, `orbax`) have adapters merged, in float32 and cast once. Adapter formats (`peft`,
    `llava-lora`) hold the adapters and, where it was tuned with them, the projector. The folder appears when it is whole.

    Args:
        dtype: of a whole model's tensors; as stored by default.
        shard_bytes: largest file of weights.

    Returns:
        The folder.

    Raises:
        CheckpointError: something cannot be read or said in the format; nothing is left behind.
    """
    if to not in get_args(Format):
        raise UserError(f"--to {to}: one of {', '.join(get_args(Format))}")
    dst = Path(dst)
    with new_folder(dst) as folder:
        start = checkpoint_folder(src)
        parts = [checkpoint_folder(part) for part in as_list(components)]
        model = read_model(start, components=parts, dtype=None if dtype is None else jnp.dtype(dtype))
        tokenizer = find_tokenizer(model.config, start, parts)
        source = _source(model, src, start, as_list(components), adapter)
        if adapter is not None:
            name, projector = put_adapter(model, adapter, [start, *parts])
            source = dataclasses.replace(source, base_model=name or str(src), projector=projector)
        if to in ("peft", "llava-lora"):
            _write_adapter(model, folder, to, source, tokenizer)
        else:
            lora.merge(model)
            _write_whole(model, folder, to, tokenizer, shard_bytes, example=start / TEMPLATE_EXAMPLE)
        _write_card(folder, model, to, source)
    if to == "llava-lora" and not all(word in dst.resolve().name.lower() for word in ("llava", "lora")):
        _log.warning("%s: original LLaVA's loader wants a folder whose name holds both llava and lora", dst)
    return dst


def _source(model: VisionLanguageModel, src: Any, start: Path, base: list[Any], adapter: Any) -> Source:
    part = recognise(start)
    under = str(base[0]) if base else str(src)
    if part.kind == "llava-lora":
        recorded = read_json(part.place / adapters.ADAPTER_CONFIG).get("base_model_name_or_path")
        under = str(recorded or under)
    names = [str(name) for name in (src, *base, *([] if adapter is None else [adapter]))]
    return Source(tuple(names), part.kind, under, part.kind == "llava-lora", base_checksums(model))


def special_ids(tokenizer: Any) -> dict[str, Any]:
    pad = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0 if pad is None else pad,
    }


def _write_adapter(model: VisionLanguageModel, folder: Path, to: str, source: Source, tokenizer: Any) -> None:
    if to == "peft":
        adapters.write_peft(model, folder, base=source.base_model, projector=source.projector)
    else:
        adapters.write_llava_lora(model, folder, base=source.base_model, special_ids=special_ids(tokenizer))
    kept = dict(source.base_checksums)
    if to == "llava-lora" or source.projector:
        kept.pop("projector")  # the folder brings its own
    write_json(folder / adapters.RECORD, {"base": kept, "sources": list(source.names)})


def _write_whole(
    model: VisionLanguageModel, folder: Path, to: str, tokenizer: Any, shard_bytes: int, *, example: Path
) -> None:
    shown, kept = read_example_template(example.parent), None
    if to == "llava-hf":
        _give_image_token(model, tokenizer)
        write.write_model(model, folder, shard_bytes=shard_bytes, special_ids=special_ids(tokenizer))
        encoder = Processor.from_config(model.config, tokenizer, shown).encoder
        _write_processor(model, folder, encoder)
        tokenizer.chat_template = None  # it lies in a file of its own
    elif to == "llava":
        kept = _drop_image_token(model, tokenizer)
        write.write_original(model, folder, shard_bytes=shard_bytes, special_ids=special_ids(tokenizer))
    else:
        orbax.write_model(model, folder)
    tokenizer.save_pretrained(folder)
    if kept is not None:
        _forget_tokens(folder, kept)
    if example.exists():
        (folder / TEMPLATE_EXAMPLE).write_bytes(example.read_bytes())
    write_json(folder / adapters.RECORD, {"identity": base_checksums(model)})


def _give_image_token(model: VisionLanguageModel, tokenizer: Any) -> None:
    """transformers' LLaVA finds pictures by a token: original LLaVA has none, so one is added behind the others."""
    config = model.config
    known = tokenizer.get_vocab().get(IMAGE)
    if known is None:
        tokenizer.add_tokens([IMAGE], special_tokens=True)
        known = tokenizer.get_vocab()[IMAGE]
    needed = max(len(tokenizer), known + 1)
    if needed > config.text.vocab:
        write.resize_vocabulary(model, -(-(needed + 1) // 64) * 64)
    if tokenizer.pad_token is None and len(tokenizer) < model.config.text.vocab:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.config = dataclasses.replace(model.config, image_token_id=known)


def _drop_image_token(model: VisionLanguageModel, tokenizer: Any) -> int | None:
    """The inverse, where behind the image token stand only padding and unused rows: original LLaVA has no use for them.

    Returns:
        How many rows and tokens are kept, where some are dropped.
    """
    vocab = tokenizer.get_vocab()
    at = vocab.get(IMAGE)
    behind = {name for name, id in vocab.items() if at is not None and id >= at} - {IMAGE, tokenizer.pad_token}
    if at is None or at != model.config.image_token_id or behind:
        return None
    write.resize_vocabulary(model, at)
    model.config = dataclasses.replace(model.config, image_token_id=0, tokenization="llava")
    return at


def _forget_tokens(folder: Path, kept: int) -> None:
    """Takes the tokens from `kept` on out of a saved tokenizer: transformers can add tokens, and not remove them."""
    content = read_json(folder / "tokenizer.json")
    gone = {token["content"] for token in content["added_tokens"] if token["id"] >= kept}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < kept]
    write_json(folder / "tokenizer.json", content)
    settings = read_json(folder / "tokenizer_config.json")
    for key, value in list(settings.items()):
        if value in gone if isinstance(value, str) else False:
            settings[key] = settings.get("unk_token")
        elif isinstance(value, list):
            settings[key] = [name for name in value if name not in gone]
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {id: token for id, token in decoder.items() if int(id) < kept}
    settings.pop("image_token", None)
    write_json(folder / "tokenizer_config.json", settings)


def _write_processor(model: VisionLanguageModel, folder: Path, encoder: Encoder) -> None:
    config = model.config
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": IMAGE,
        },
    )
    stops = list(encoder.stop_ids)
    ends = {"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {}
    write_json(folder / "generation_config.json", {**special_ids(encoder.tokenizer), **ends})
    (folder / "chat_template.jinja").write_text(to_jinja(encoder.template), "utf-8")


_OPENS = {
    "llava-hf": '`LlavaForConditionalGeneration.from_pretrained("{name}")` in transformers, or vLLM.',
    "llava": 'original LLaVA\'s `load_pretrained_model("{name}", None, …)`.',
    "peft": '`PeftModel.from_pretrained(base, "{name}")` on `LlavaForConditionalGeneration`.',
    "llava-lora": 'original LLaVA\'s `load_pretrained_model("{name}", base, …)`; its name must hold llava and lora.',
    "orbax": "reverie-jax alone, and fastest there.",
}


def _write_card(folder: Path, model: VisionLanguageModel, to: str, source: Source) -> None:
    config, name = model.config, "path/to/this/folder"
    carried = list(lora.adapters(model))
    said = {
        "made by": f"`reverie convert --to {to}`, reverie-jax {reverie_jax.__version__}, {datetime.date.today()}",
        "from": f"{SAID[source.kind]}: " + ", ".join(f"`{name}`" for name in source.names),
        "decoder": f"{'Phi-3' if config.text.fused else 'LLaMA'}, {config.text.layers} layers of {config.text.hidden}, "
        f"vocabulary {config.text.vocab}",
        "vision tower": (f"{config.vision_tower}, " if config.vision_tower else "")
        + f"{config.vision.layers} layers of {config.vision.hidden}, pictures of {config.vision.image_size} pixels",
        "projector": config.projector,
        "pictures": "padded to squares" if config.image_aspect_ratio == "pad" else "cropped to squares",
        "prompt": f"template `{config.template}`, tokens `{config.tokenization}`",
        "base" if carried else "identity": ", ".join(f"{part} `{sum}`" for part, sum in source.base_checksums.items()),
    }
    if carried:
        size = sum(a.size + b.size for _, _, a, b in carried)
        said["adapters"] = f"LoRA, {size:,} parameters, made on `{source.base_model}`"
    else:
        said["numbers"] = np.dtype(model.compute_dtype).name
    lines = [
        f"# {'LoRA adapters' if carried else 'Model'} ({to})",
        "",
        f"Opens with {_OPENS[to].format(name=name)}",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in said.items()), ""]
    (folder / "README.md").write_text("\n".join(lines), "utf-8")

"""Tiny checkpoints as every tool writes them to disk: transformers, PEFT, original LLaVA, LLaVA-pp, OpenAI.

Names, files and config.json are written by hand where the format is older than the transformers that is installed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from reverie_jax.models import TextConfig
from tests.models.oracle import IMAGE, normalized
from tests.models.tiny import KINDS, LLAMA, PHI, VISION, Kind, Parts, Rows, llava, parts, vision_config

Tensors = dict[str, torch.Tensor]


def flat_buffer(tensors: Tensors) -> Tensors:
    """The same tensors as views of one storage, their axes reversed: what a trainer may leave to torch.save."""
    found, turned = {}, {name: x.detach().permute(tuple(range(x.ndim))[::-1]) for name, x in tensors.items()}
    for dtype in {x.dtype for x in tensors.values()}:
        group = {name: x for name, x in turned.items() if x.dtype == dtype}
        pieces = torch.cat([x.flatten() for x in group.values()]).split([x.numel() for x in group.values()])
        for (name, x), piece in zip(group.items(), pieces, strict=True):
            found[name] = piece.view(x.shape).permute(tuple(range(x.ndim))[::-1])
    return {name: found[name] for name in tensors}


def save(path: Path, tensors: Tensors) -> None:
    if path.suffix == ".safetensors":
        save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path, {"format": "pt"})
    else:
        torch.save(flat_buffer(tensors), path)


def store(folder: Path, tensors: Tensors, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder's weights.

    Args:
        form: "safetensors" or "bin", each with " shards" behind or not.
        dtype: of all floating-point tensors but inv_freq, which was always float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: x.detach().to(dtype if x.is_floating_point() and not name.endswith("inv_freq") else x.dtype)
        for name, x in tensors.items()
    }
    suffix, *shards = form.split()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    if not shards:
        save(folder / f"{stem}.{suffix}", kept)
        return folder
    names, count = list(kept), 3
    where = {name: f"{stem}-{at * count // len(names) + 1:05}-of-{count:05}.{suffix}" for at, name in enumerate(names)}
    for file in set(where.values()):
        save(folder / file, {name: kept[name] for name in names if where[name] == file})
    size = sum(x.numel() * x.element_size() for x in kept.values())
    write(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def inv_freq(text: TextConfig) -> Tensors:
    """Buffers that transformers 4.31 and older kept in their files. Wrong values: they are not to be used."""
    half = text.head_dim // 2
    return {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.full((half,), 0.5) for n in range(text.layers)}


def position_ids() -> torch.Tensor:
    return torch.arange(VISION.patches + 1)[None]


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: x for name, x in tensors.items()}


TOWER = "model.vision_tower.vision_tower.vision_model."


def projector_tensors(parts: Parts, prefix: str = "model.mm_projector.") -> Tensors:
    return prefixed(prefix, parts.projector.state_dict())  # {0,2}.{weight,bias}, or weight and bias


def original_tensors(parts: Parts, *, tower: bool, strays: bool = False) -> Tensors:
    tensors = dict(parts.llm.state_dict()) | projector_tensors(parts)
    if tower:
        tensors |= prefixed(TOWER, parts.tower.state_dict())
    if strays:
        tensors |= inv_freq(parts.kind.text)
        if tower:
            tensors[TOWER + "embeddings.position_ids"] = position_ids()
    return tensors


def flat_text(kind: Kind) -> dict[str, Any]:
    """The language model's keys as its repository had them."""
    text = kind.text
    raw = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": text.hidden,
        "initializer_range": 0.02,
        "intermediate_size": text.mlp,
        "max_position_embeddings": text.max_positions,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "pad_token_id": 0,
        "rms_norm_eps": text.norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": text.vocab,
    }
    if kind.linear:  # before Llama-2 there were no other keys
        return raw
    raw |= {"num_key_value_heads": text.kv_heads, "rope_scaling": None, "rope_theta": text.rope_theta}
    if text.fused:
        return raw | {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": text.max_positions,
            "resid_pdrop": 0.0,
            "sliding_window": text.sliding_window,
        }
    return raw | {"head_dim": text.head_dim, "pretraining_tp": 1}


def flat_config(kind: Kind, tower: str | Path, *, new: bool = False) -> dict[str, Any]:
    """config.json of an original LLaVA: as released (transformers 4.31), or as later code writes it."""
    phi = kind.text.fused
    raw = flat_text(kind) | {
        "architectures": ["LlavaPhiForCausalLM" if phi else "LlavaLlamaForCausalLM"],
        "model_type": "llava_phi" if phi else "llava_llama" if new else "llava",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "square" if kind.linear else "pad",
        "mm_hidden_size": VISION.hidden,
        "mm_projector_type": "linear" if kind.linear else "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": new,
        "use_mm_proj": True,
    }
    if phi or new:
        return raw | {
            "mm_patch_merge_type": "flat",
            "mm_projector_lr": 2e-5,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
        }
    return raw | {"freeze_mm_vision_resampler": False, "mm_resampler_type": None, "tune_mm_vision_resampler": False}


def original(
    folder: Path,
    parts: Parts,
    form: str = "bin",
    *,
    tower: bool = False,
    named: str | Path = "openai/a-tower-of-no-known-size",
    strays: bool = False,
    new: bool = False,
    dtype: torch.dtype = torch.float16,
    **config: Any,
) -> Path:
    """A full checkpoint (LLaVA-pp's merged one where the language model is Phi-3)."""
    store(folder, original_tensors(parts, tower=tower, strays=strays), form, dtype)
    write(folder / "config.json", flat_config(parts.kind, named, new=new) | config)
    return folder


def llm_folder(folder: Path, parts: Parts, form: str = "bin shards", dtype: torch.dtype = torch.float16) -> Path:
    """A plain LLaMA or Phi-3; by this transformers itself where `form` is "saved"."""
    if form == "saved":
        copy.deepcopy(parts.llm).save_pretrained(folder)
        return folder
    kind = parts.kind
    store(folder, dict(parts.llm.state_dict()) | ({} if kind.text.fused else inv_freq(kind.text)), form, dtype)
    name, model_type = ("Phi3", "phi3") if kind.text.fused else ("Llama", "llama")
    write(folder / "config.json", flat_text(kind) | {"architectures": [f"{name}ForCausalLM"], "model_type": model_type})
    return folder


def clip_folder(folder: Path, parts: Parts, form: str = "full") -> Path:
    """CLIP: "full" or "full bin" with its text tower, "vision saved" by this transformers, "vision bin"."""
    vision = vision_config().to_dict()
    if form == "vision saved":
        parts.tower.save_pretrained(folder)
    elif form == "vision bin":
        tensors = prefixed("vision_model.", parts.tower.state_dict())
        store(folder, tensors | {"vision_model.embeddings.position_ids": position_ids()}, "bin")
        write(folder / "config.json", vision | {"architectures": ["CLIPVisionModel"]})
    else:
        words = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        words |= {"intermediate_size": 20, "max_position_embeddings": 9, "projection_dim": 14}
        words |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        clip = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=14))
        named = prefixed("vision_model.", parts.tower.state_dict())
        tensors = {k.replace("vision_model.vision_model.", "vision_model."): v for k, v in clip.state_dict().items()}
        assert named.keys() <= tensors.keys()
        tensors |= named
        config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 14, "text_config": words}
        if form == "full bin":
            tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
            tensors["vision_model.embeddings.position_ids"] = position_ids()
            # OpenAI's own file has this too; what it lacks is in vision_config.
            config["vision_config_dict"] = {"hidden_size": VISION.hidden, "patch_size": VISION.patch_size}
        store(folder, tensors, "bin" if form == "full bin" else "safetensors")
        write(folder / "config.json", config | {"vision_config": vision})
    return folder


def projector_file(folder: Path, parts: Parts, *, config: bool = False, prefix: str = "model.mm_projector.") -> Path:
    """Stage 1: the projector's file, with a config.json beside it or without."""
    folder.mkdir(parents=True)
    save(folder / "mm_projector.bin", {k: v.bfloat16() for k, v in projector_tensors(parts, prefix).items()})
    if config:
        write(folder / "config.json", flat_config(parts.kind, "openai/a-tower-of-no-known-size", new=True))
    return folder


def hf_names(parts: Parts, *, memory: bool, vision_model: bool) -> Tensors:
    """A llava-hf model's tensors as on disk (old prefixes), or as in the memory of transformers >= 4.52."""
    llm, level = parts.llm.state_dict(), "vision_model." if vision_model else ""
    outer = "model." if memory else ""
    tensors = {
        ("model.language_model." + k.removeprefix("model.") if memory else f"language_model.{k}"): v
        for k, v in llm.items()
        if not k.startswith("lm_head.")
    }
    tensors["lm_head.weight" if memory else "language_model.lm_head.weight"] = llm["lm_head.weight"]
    tensors |= prefixed(f"{outer}vision_tower.{level}", parts.tower.state_dict())
    for place, n in (("0", 1), ("2", 2)):
        for k, v in parts.projector.get_submodule(place).state_dict().items():
            tensors[f"{outer}multi_modal_projector.linear_{n}.{k}"] = v
    return tensors


def hf_config(kind: Kind) -> dict[str, Any]:
    """config.json as transformers 4.x wrote it."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": VISION.patches,
        "image_token_index": IMAGE,
        "projector_hidden_act": "gelu",
        "text_config": flat_text(kind) | {"model_type": "phi3" if kind.text.fused else "llama"},
        "vision_config": vision_config().to_dict(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def hf_folder(
    folder: Path,
    parts: Parts,
    form: str,
    *,
    memory: bool = False,
    vision_model: bool = True,
    dtype: Any = torch.float16,
) -> Path:
    store(folder, hf_names(parts, memory=memory, vision_model=vision_model), form, dtype)
    write(folder / "config.json", hf_config(parts.kind))
    return folder


Checkpoint = tuple[Path, list[Path]]
Maker = Callable[[Path, Parts], Checkpoint]


def hf(form: str, **options: Any) -> Maker:
    return lambda at, parts: (hf_folder(at / "x", parts, form, **options), [])


def hf_saved(**options: Any) -> Maker:
    def make(at: Path, parts: Parts) -> Checkpoint:
        llava(parts).save_pretrained(at / "x", **options)
        return at / "x", []

    return make


def with_clip(form: str, clip: str, **options: Any) -> Maker:
    return lambda at, parts: (original(at / "x", parts, form, **options), [clip_folder(at / "y", parts, clip)])


def local_tower(clip: str) -> Maker:
    """mm_vision_tower is a folder; no base is needed."""
    return lambda at, parts: (original(at / "x", parts, named=clip_folder(at / "y", parts, clip), strays=True), [])


def tuned_tower(form: str, where: str, **options: Any) -> Maker:
    """The checkpoint holds its own tower; a CLIP folder of other weights is there for its config alone."""

    def make(at: Path, mine: Parts) -> Checkpoint:
        clip = clip_folder(at / "y", parts(mine.kind, seed=99), "full")
        named = {"named": clip} if where == "named" else {}
        folder = original(at / "x", mine, form, tower=True, new=True, **named, **options)
        return folder, [clip] if where == "base" else []

    return make


def stage_one(llm: str, clip: str, *, file: bool = False, **options: Any) -> Maker:
    def make(at: Path, parts: Parts) -> Checkpoint:
        folder = projector_file(at / "x", parts, **options)
        base = [llm_folder(at / "z", parts, llm), clip_folder(at / "y", parts, clip)]
        return folder / "mm_projector.bin" if file else folder, base[::-1] if file else base

    return make


_HF: dict[str, Maker] = {
    "hf, saved by transformers": hf_saved(),
    "hf, saved in shards": hf_saved(max_shard_size="30KB"),
    "hf, old names": hf("safetensors", dtype=torch.float32),
    "hf, old names, bin": hf("bin"),
    "hf, old names, bin shards": hf("bin shards", dtype=torch.bfloat16),
    "hf, no vision_model, shards": hf("safetensors shards", vision_model=False),
    "hf, memory names": hf("safetensors", memory=True, vision_model=False, dtype=torch.bfloat16),
    "hf, memory names of 4.52": hf("bin", memory=True),
}
_ORIGINAL: dict[str, Maker] = {
    "original, bin, full CLIP": with_clip("bin", "full", strays=True),
    "original, bin shards, full CLIP in bin": with_clip("bin shards", "full bin", strays=True),
    "original, safetensors, vision CLIP": with_clip("safetensors", "vision saved", new=True),
    "original, safetensors shards, vision CLIP in bin": with_clip("safetensors shards", "vision bin", strays=True),
    "original, local tower": local_tower("full"),
    "original, tower inside, its config in base": tuned_tower("bin", "base", strays=True),
}
_ORIGINAL_TYPES: dict[str, Maker] = {
    "original, tower inside, its config where named": tuned_tower("safetensors", "named", dtype=torch.float32),
    "original, tower inside, bin shards": tuned_tower("bin shards", "base", dtype=torch.bfloat16),
}
# LLaVA-pp's merge cuts embedding and head to the tokenizer's length; a config.json may still count the padding.
_PADDED: dict[str, Maker] = {"original, fewer rows than config.json says": with_clip("bin", "full", vocab_size=128)}
_STAGE_ONE: dict[str, Maker] = {
    "projector file": stage_one("bin shards", "full", file=True),
    "projector folder": stage_one("saved", "vision saved"),
    "projector folder with config": stage_one("safetensors", "vision bin", config=True),
    "projector of other prefix": stage_one(
        "safetensors shards", "full bin", prefix="base_model.model.model.mm_projector."
    ),
}
VARIANTS: list[tuple[Kind, str, Maker]] = [
    *(((LLAMA, PHI)[at % 2], name, make) for at, (name, make) in enumerate(_HF.items())),
    *((kind, name, make) for kind in KINDS for name, make in _ORIGINAL.items()),
    *((kind, name, make) for kind in (LLAMA, PHI) for name, make in _ORIGINAL_TYPES.items()),
    *((KINDS[at % 3], name, make) for at, (name, make) in enumerate(_STAGE_ONE.items())),
    *((PHI, name, make) for name, make in _PADDED.items()),
]


RANK, ALPHA = 4, 8
LEAVES = {
    False: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    True: ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
WEIGHTS = "adapter_model.safetensors"


def _adapted(model: torch.nn.Module, targets: list[str] | str, seed: int, **options: Any) -> PeftModel:
    """With adapters on it, both factors random; so is a projector that is tuned too."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.05, bias="none", **options)
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = "lmsys/a-plain-language-model"
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                size = 0.4 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.3
                tensor.copy_(size * torch.randn(tensor.shape, generator=random))
    return model.eval()


def with_lora(parts: Parts, targets: list[str] | None = None, seed: int = 5, **options: Any) -> Parts:
    """LLaVA's LoRA training: PEFT on the plain language model; the projector, tuned too, is no part of PEFT's model."""
    targets = LEAVES[parts.kind.text.fused] if targets is None else targets
    llm = _adapted(copy.deepcopy(parts.llm), targets, seed, task_type="CAUSAL_LM", **options)
    return dataclasses.replace(parts, llm=llm)


def merged(parts: Parts) -> Parts:
    """As PEFT merges it."""
    return dataclasses.replace(parts, llm=copy.deepcopy(parts.llm).merge_and_unload())


def as_bin(folder: Path) -> Path:
    """The adapter as PEFT 0.4 saved it."""
    save(folder / "adapter_model.bin", load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    now = json.loads((folder / "adapter_config.json").read_text())
    kept = ["auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"]
    kept += ["layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type"]
    kept += ["r", "revision", "target_modules", "task_type"]
    write(folder / "adapter_config.json", {key: now[key] for key in kept})
    return folder


def lora_folder(folder: Path, tuned: Parts, *, old: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """What LLaVA's (or LLaVA-pp's) LoRA training leaves: four files, and no tokenizer."""
    tuned.llm.save_pretrained(folder, save_embedding_layers=False)
    projector = projector_tensors(tuned, "base_model.model.model.mm_projector.")
    save(folder / "non_lora_trainables.bin", {name: x.to(dtype) for name, x in projector.items()})
    write(folder / "config.json", flat_config(tuned.kind, "openai/a-tower-of-no-known-size", new=not old))
    write(folder / "trainer_state.json", {"global_step": 1})
    return as_bin(folder) if old else folder


def lora_base(at: Path, parts: Parts, llm: str = "bin shards", clip: str = "full") -> list[Path]:
    return [llm_folder(at / "llm", parts, llm), clip_folder(at / "clip", parts, clip)]


class Tuned(NamedTuple):
    """transformers' LLaVA with PEFT's adapters."""

    model: torch.nn.Module

    @torch.no_grad()
    def logits(self, rows: Rows) -> np.ndarray:
        """Of prompts: where their ids say so stand their pictures, in order."""
        shown = [rows.images[row, image] for row, image in zip(*_pictures(rows), strict=True)]
        ids = torch.tensor(rows.tokens, dtype=torch.long)
        return self.model(input_ids=ids, pixel_values=normalized(np.stack(shown))).logits.numpy()


def _pictures(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    counts = (rows.slots.max(axis=1) + 1) // VISION.patches
    return np.nonzero(np.arange(rows.images.shape[1]) < counts[:, None])


def peft_llava(parts: Parts, *, projector: bool = False, leaves: list[str] | None = None, seed: int = 6) -> Tuned:
    """PEFT on transformers' LLaVA: the language model only, the whole projector with it or not."""
    inside = "|".join(LEAVES[parts.kind.text.fused] if leaves is None else leaves)
    targets = rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({inside})"
    saved = {"modules_to_save": ["multi_modal_projector"]} if projector else {}
    return Tuned(_adapted(llava(parts), targets, seed, **saved))


def peft_folder(folder: Path, tuned: Tuned, *, old_names: bool = False, old_file: bool = False) -> Path:
    """As PEFT saves it; or under the names of the class before transformers 4.52, or in the file of PEFT 0.4."""
    tuned.model.save_pretrained(folder, save_embedding_layers=False)
    if old_names:
        before = load_file(folder / WEIGHTS)
        assert any(".model.language_model.layers." in name for name in before)
        outer = "base_model.model."
        spelt = (("model.language_model.", "language_model.model."), ("model.multi_modal", "multi_modal"))
        for new, old in spelt:
            before = {name.replace(outer + new, outer + old, 1): x for name, x in before.items()}
        save(folder / WEIGHTS, before)
    return as_bin(folder) if old_file else folder

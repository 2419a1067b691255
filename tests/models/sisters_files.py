"""Files of MiniGPT-4, mPLUG-Owl and Muffin as their authors released them, with the tensors that nobody reads.

The tokenizers are those of `makers`: 90 pieces of syllables, capitals and little else, then the added tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.models import makers
from tests.models.makers import Tensors, prefixed, store, tokenizer, unused_tensors, write_json
from tests.models.sisters_oracle import MiniGPT4, MplugOwl, Muffin, llama, random_values
from tests.models.sisters_parts import Eva, Sizes

MUFFIN_TOKENS = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")
V2_TARGETS = r".*language_model.*\.(q_proj|v_proj)"  # r 8, alpha 32; the file says neither


def llama_json(model: LlamaForCausalLM, **more: object) -> dict[str, object]:
    """Return a LLaMA's config.json of the spring of 2023: no rope_theta, no key-value heads."""
    sizes = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
    config = {name: getattr(model.config, name) for name in (*sizes, "rms_norm_eps", "vocab_size")}
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "llama",
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.1",
        "use_cache": True,
        **more,
    }


# MiniGPT-4.


def llama_folder(
    folder: Path, model: LlamaForCausalLM, form: str = "bin shards", tensors: Tensors | None = None
) -> Path:
    """Write LLaMA or Vicuna in half precision; 91 rows, as of Vicuna v0, have the token [PAD] more than 90."""
    weights = dict(model.state_dict()) if tensors is None else tensors
    store(folder, unused_tensors(tower=False) | weights, form, torch.float16)
    write_json(folder / "config.json", llama_json(model))
    tokenizer(*["[PAD]"] * (model.config.vocab_size > makers.WORDS)).save_pretrained(folder)
    return folder


def eva_file(path: Path, model: MiniGPT4) -> Path:
    """Write `eva_vit_g.pth`: the whole of EVA-CLIP's tower, of which the last block, norm and head are not used."""
    width, layers, heads, mlp = model.sizes.vision
    whole = Eva(dataclasses.replace(model.sizes, vision=(width, layers + 1, heads, mlp)))
    whole.norm, whole.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, 24)
    random_values(whole, 90)
    tensors = whole.state_dict() | model.visual_encoder.state_dict()
    makers.save(path, {name: x.half() for name, x in tensors.items()})
    return path


def blip2_file(path: Path, model: MiniGPT4) -> Path:
    """Write `blip2_pretrained_flant5xxl.pth`. Its projector to T5 has the shape of MiniGPT-4's to a LLaMA of 7B."""
    tensors = {name: x for name, x in model.state_dict().items() if name.startswith(("query", "ln_vision", "Qformer"))}
    other = copy.deepcopy(model.llama_proj)
    random_values(other, 91)
    positions = {"Qformer.bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({"model": positions | tensors | prefixed("t5_proj.", other.state_dict())}, path)
    return path


def projector_file(path: Path, model: MiniGPT4) -> Path:
    """Write what MiniGPT-4's trainer does: all that has a gradient, all buffers, and its own state."""
    projector = copy.deepcopy(model.llama_proj)
    groups = [{"params": [projector.weight], "weight_decay": 0.05}, {"params": [projector.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-5)
    for parameter in projector.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = prefixed("llama_model.", unused_tensors(tower=False))
    tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    config = {
        "model": {"arch": "mini_gpt4", "freeze_vit": True, "end_sym": "###"},
        "run": {"init_lr": 3e-5, "seed": 42},
    }
    content = {
        "model": tensors | prefixed("llama_proj.", model.llama_proj.state_dict()),
        "optimizer": optimizer.state_dict(),
        "config": config | {"datasets": {"cc_sbu_align": {"data_type": "images"}}},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "_growth_tracker": 7},
        "epoch": 19,
    }
    torch.save(content, path)
    return path


@dataclasses.dataclass(frozen=True)
class MiniGPT4Files:
    eva: Path
    blip2: Path
    llama: Path
    projector: Path


def minigpt4_files(room: Path, model: MiniGPT4) -> MiniGPT4Files:
    """Write the four sources of MiniGPT-4."""
    llm = llama_folder(room / "vicuna-7b-v0", model.language)
    return MiniGPT4Files(
        eva_file(room / "eva_vit_g.pth", model),
        blip2_file(room / "blip2_pretrained_flant5xxl.pth", model),
        llm,
        projector_file(room / "checkpoint_19.pth", model),
    )


@dataclasses.dataclass(frozen=True)
class Delta:
    """A base and the difference to it; `tensors` are their sum in half precision, as FastChat computes it."""

    base: Path
    delta: Path
    tensors: Tensors


def delta_folders(room: Path, target: LlamaForCausalLM, *, added: int = 1, form: str = "bin shards") -> Delta:
    """Write a random LLaMA and the difference of `target` to it.

    Args:
        added: Rows that the target's embedding and head have more: 1 in Vicuna v0, 0 in v1.1. The base's are zero there.
    """
    base = llama(Sizes((0,) * 4, (0,) * 4, 0, 0, 1, target.config.vocab_size - added, target.config.hidden_size))
    random_values(base, 92)
    below = {name: x.half() for name, x in base.state_dict().items()}
    delta, both = {}, {}
    for name, x in target.state_dict().items():
        under = torch.zeros_like(x, dtype=torch.float16)
        under[: len(below[name])] = below[name]
        delta[name] = x.half() - under
        both[name] = under + delta[name]
    zeros = {name: torch.zeros_like(x) for name, x in unused_tensors(tower=False).items()}  # a difference, too
    return Delta(
        llama_folder(room / "llama-7b", base, form),
        llama_folder(room / "vicuna-7b-delta-v0", target, form, zeros | delta),
        both,
    )


# mPLUG-Owl.


def mplug_config(model: MplugOwl) -> dict[str, object]:
    """Return config.json; all of the language model's sizes are at its top, too, as that of transformers 4.28 wrote it."""
    (width, layers, heads, mlp), bridge = model.sizes.vision, model.sizes.bridge
    text = llama_json(model.language, architectures=None, torch_dtype=None)
    vision = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": model.sizes.image_size,
        "patch_size": model.sizes.patch_size,
        "num_channels": 3,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "use_flash_attn": False,
        "model_type": "mplug_owl_vision_model",
    }
    abstractor = {
        "hidden_size": bridge[0],
        "num_hidden_layers": bridge[1],
        "num_attention_heads": bridge[2],
        "intermediate_size": bridge[3],
        "encoder_hidden_size": width,
        "layer_norm_eps": 1e-6,  # of the norm within the MLP alone
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "model_type": "mplug_owl_visual_abstract",
    }
    own = {
        "architectures": ["MplugOwlForConditionalGeneration"],
        "model_type": "mplug-owl",
        "num_query_tokens": model.sizes.queries,
        "initializer_factor": 1.0,
        "is_encoder_decoder": False,
        "use_decoder_only_language_model": True,
        "torch_dtype": "bfloat16",
    }
    rest: dict[str, Any] = {"add_cross_attention": False, "bad_words_ids": None, "is_decoder": False, "top_k": 50}
    parts = {"text_config": text, "vision_config": vision, "visual_abstractor_config": abstractor}
    return text | own | {name: rest | part for name, part in parts.items()}


def mplug_folder(folder: Path, model: MplugOwl, form: str = "bin shards", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write mPLUG-Owl as `mplug-owl-llama-7b-ft` is."""
    store(folder, prefixed("language_model.", unused_tensors(tower=False)) | dict(model.state_dict()), form, dtype)
    write_json(folder / "config.json", mplug_config(model))
    tokenizer().save_pretrained(folder)
    return folder


def lrv_v2_file(path: Path, model: MplugOwl, seed: int = 5, peft: str = "0.3") -> MplugOwl:
    """Write LRV V2's file: the state of a PeftModel, everything in it, the adapters in float32.

    Args:
        peft: Whose names: "0.2" without the adapter's, "0.3" with it, "0.6" with `base_layer`, too.

    Returns:
        The tuned model, with the adapters merged.
    """
    tuned = makers.adapted(model, seed, target_modules=V2_TARGETS, r=8, lora_alpha=32)
    tensors = {}
    for name, x in tuned.state_dict().items():
        name = name if peft == "0.6" else name.replace(".base_layer.", ".")
        name = name.replace(".default.", ".") if peft == "0.2" else name
        tensors[name] = x.clone() if "lora_" in name else x.half()
    makers.save(path, prefixed("base_model.model.language_model.", unused_tensors(tower=False)) | tensors)
    return tuned.merge_and_unload().eval()


# Muffin.


def muffin_config(model: Muffin) -> dict[str, object]:
    """Return config.json; of BEiT-3 it has the name alone, and with it the images' size."""
    return llama_json(
        model,
        _name_or_path="checkpoint-2800",
        architectures=["Beit3LlavaLlamaForCausalLM"],
        model_type="beit3_llava",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=-1,
        max_sequence_length=model.config.max_position_embeddings,
        torch_dtype="float32",
        use_cache=False,
        mm_vision_tower=f"beit3_large_patch{model.sizes.patch_size}_{model.sizes.image_size}",
        use_mm_proj=True,
        num_query=model.sizes.queries,
        mm_use_im_start_end=True,
        fully_tune=True,
        tune_mm_mlp_adapter=False,
        freeze_mm_mlp_adapter=False,
    )


def muffin_folder(folder: Path, model: Muffin, form: str = "bin shards", *, whole: bool = False) -> Path:
    """Write Muffin as `openbmb/RLHF-V` is; `whole` with the parts of BEiT-3 that its trainer removes."""
    tensors = unused_tensors(tower=False) | dict(model.state_dict())
    if whole:
        width, prefix = model.sizes.vision[0], "model.vision_tower.beit3."
        tensors[prefix + "text_embed.weight"] = torch.ones(40, width)
        tensors[prefix + "vision_embed.mask_token"] = torch.ones(1, 1, width)
    store(folder, tensors, form)
    write_json(folder / "config.json", muffin_config(model))
    tokenizer(*MUFFIN_TOKENS).save_pretrained(folder)
    return folder

"""Tiny checkpoints as every tool writes them: transformers, PEFT, original LLaVA, LLaVA-pp, OpenAI.

All start from three random components (language model, CLIP tower, projector) in transformers' classes and torch. Files and
config.json are written by hand where the format is older than the installed transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from reverie_jax.errors import CheckpointError
from reverie_jax.models import ModelInputs
from reverie_jax.models.checkpoints import attach_adapter, read_model
from tests.models.oracle import GROUPED, image_inputs, llava_logits, normalized, randomize

Tensors = dict[str, torch.Tensor]

KINDS = ("llama", "phi3")
ALL_KINDS = (*KINDS, "llava-1.0")  # the last: a linear projector, as many key heads as heads
WORDS = 90  # size of the tokenizer without <image>, and of an original model's vocabulary
ROWS = 128  # of a llava-hf vocabulary: <image> is 90, <pad> 91, the rest is padding
SIDE, PATCH, PATCHES, WIDTH = 24, 8, 9, 30  # of the tower
MODULES = {
    "llama": (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
MODULES["llava-1.0"] = MODULES["llama"]
DECODER = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # what PEFT adapts in transformers' class
TOWER = "model.vision_tower.vision_tower.vision_model."
UNKNOWN_TOWER = "somebody/clip"  # a folder of that name is it
ADAPTER_FILE, ADAPTER_CONFIG, NON_LORA = "adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin"
SIZES = dataclasses.replace(GROUPED, text=dataclasses.replace(GROUPED.text, vocab=WORDS))


# Models.


@dataclasses.dataclass(frozen=True)
class Parts:
    """The components of a LLaVA. The projector is as original LLaVA builds it: one Linear, or a Sequential."""

    kind: str
    llm: torch.nn.Module
    tower: transformers.CLIPVisionModel
    projector: torch.nn.Module

    @torch.no_grad()
    def logits(self, inputs: ModelInputs) -> np.ndarray:
        """Compute as original LLaVA does: features replace embeddings, without a token for them."""
        states = self.tower(normalized(inputs.images), output_hidden_states=True).hidden_states[-2]
        features = self.projector(states[:, 1:]).reshape(*inputs.images.shape[:2], PATCHES, -1).flatten(1, 2)
        text = torch.tensor(np.where(inputs.image_slots >= 0, 0, inputs.tokens), dtype=torch.long)
        embedded = self.llm.get_input_embeddings()(text)
        for row, slots in enumerate(inputs.image_slots):
            embedded[row, slots >= 0] = features[row, slots[slots >= 0]]
        return self.llm(inputs_embeds=embedded).logits.numpy()


def text_config(kind: str, vocab: int = WORDS, hidden: int = 36) -> transformers.LlamaConfig | transformers.Phi3Config:
    """For LLaMA no size follows from another; Phi-3's class derives head_dim."""
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": 2, "intermediate_size": 52}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 6 if kind == "llava-1.0" else 2, "rms_norm_eps": 1e-3}
    sizes |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 if kind == "llava-1.0" else 500.0}}
    sizes |= {"max_position_embeddings": 777, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "phi3":
        return transformers.Phi3Config(**sizes, original_max_position_embeddings=777, sliding_window=700)
    return transformers.LlamaConfig(**sizes, head_dim=hidden // 6 if kind == "llava-1.0" else 10)


def vision_config() -> transformers.CLIPVisionConfig:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 44}
    return transformers.CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=14)


def projector(width: int, hidden: int, *, linear: bool) -> torch.nn.Module:
    first = torch.nn.Linear(width, hidden)
    return first if linear else torch.nn.Sequential(first, torch.nn.GELU(), torch.nn.Linear(hidden, hidden))


@functools.cache
def parts(kind: str = "llama", seed: int = 0, vocab: int = WORDS, hidden: int = 36) -> Parts:
    """Return random components, exact in half precision; shared, so not to be changed."""
    config = text_config(kind, vocab, hidden)
    llm = transformers.Phi3ForCausalLM(config) if kind == "phi3" else transformers.LlamaForCausalLM(config)
    modules = (
        llm,
        transformers.CLIPVisionModel(vision_config()),
        projector(WIDTH, hidden, linear=kind == "llava-1.0"),
    )
    return Parts(kind, *(randomize(module, seed + n, half=True) for n, module in enumerate(modules)))


def hf(part: Parts, rows: int = ROWS, image: int = WORDS) -> transformers.LlavaForConditionalGeneration:
    """Return the same weights in transformers' class; rows that the language model lacks are random."""
    text = copy.deepcopy(part.llm.config)
    text.vocab_size = rows
    sizes = {"vision_config": vision_config(), "text_config": text, "image_seq_length": PATCHES}
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**sizes, image_token_index=image))
    randomize(model, 99, half=True)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        for name, tensor in part.llm.state_dict().items():
            name = "model.language_model." + name[6:] if name.startswith("model.") else name
            model.get_parameter(name)[: len(tensor)] = tensor
        model.model.vision_tower.load_state_dict(part.tower.state_dict())
        projector.linear_1.load_state_dict(part.projector[0].state_dict())
        projector.linear_2.load_state_dict(part.projector[2].state_dict())
    return model


def inputs(seed: int = 0, image: int = WORDS, images: tuple[int, ...] = (1, 2, 0)) -> ModelInputs:
    """Return sequences of words with images, for any of the models here."""
    return image_inputs(SIZES, seed, images, image=image)


def text_logits(model: torch.nn.Module) -> np.ndarray:
    """Return logits of a sequence of words without images."""
    ids = torch.tensor(np.random.default_rng(0).integers(3, WORDS, (2, 12)), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids).logits.numpy()


# Files.


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object; None removes one."""
    raw = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in raw.items() if value is not None or key not in changes})


def load(path: Path) -> Tensors:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def save(path: Path, tensors: Tensors) -> None:
    """Write tensors; to a .bin as transposed views of one storage, as trainers may leave them."""
    if path.suffix == ".safetensors":
        save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, path, {"format": "pt"})
        return
    views = {}
    for dtype in {x.dtype for x in tensors.values()}:
        group = {n: x.detach().permute(tuple(range(x.ndim))[::-1]) for n, x in tensors.items() if x.dtype == dtype}
        pieces = torch.cat([x.flatten() for x in group.values()]).split([x.numel() for x in group.values()])
        for (name, x), piece in zip(group.items(), pieces, strict=True):
            views[name] = piece.view(x.shape).permute(tuple(range(x.ndim))[::-1])
    torch.save({name: views[name] for name in tensors}, path)


def store(folder: Path, tensors: Tensors, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a folder's weights.

    Args:
        form: "safetensors" or "bin"; "safetensors shards" or "bin shards" for three files and an index.
        dtype: Of all floating-point tensors except inv_freq, which was always float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: x.detach().to(dtype if x.is_floating_point() and not name.endswith("inv_freq") else x.dtype)
        for name, x in tensors.items()
    }
    suffix, *shards = form.split()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    if not shards:
        save(folder / f"{stem}.{suffix}", tensors)
        return folder
    files = {name: f"{stem}-{n * 3 // len(tensors) + 1:05}-of-00003.{suffix}" for n, name in enumerate(tensors)}
    for file in set(files.values()):
        save(folder / file, {name: x for name, x in tensors.items() if files[name] == file})
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": files})
    return folder


@functools.cache
def _trained_tokenizer() -> str:
    """A BPE of exactly `WORDS` pieces over random syllables."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdklmnprst" for b in "aeiou"]
    text = [" ".join("".join(random.choice(syllables, random.integers(1, 4))) for _ in range(9)) for _ in range(300)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<unk>", "<s>", "</s>", "<|end|>"],
        initial_alphabet=list("ABCDEFGHIJKLMNOPQRSTUVWXYZ.:?'\n"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.get_vocab_size() == WORDS
    return tokenizer.to_str()


def tokenizer(*added: str) -> transformers.PreTrainedTokenizerFast:
    """Return `WORDS` pieces, then the added ones; llava-hf's are "<image>" and "<pad>"."""
    result = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if added:
        result.add_tokens(list(added), special_tokens=True)
        result.pad_token = "<pad>" if "<pad>" in added else None
    return result


def byte_level_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, as Llama-3's and Qwen's."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def image_processor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


# Components and complete models.


def hf_folder(folder: Path, model: Any, added: tuple[str, ...] = ("<image>", "<pad>"), **options: object) -> Path:
    """Save a model and its processor as transformers does."""
    model.save_pretrained(folder, **options)
    transformers.LlavaProcessor(
        image_processor(),
        tokenizer(*added),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def old_hf_folder(
    folder: Path, part: Parts, form: str, *, memory: bool = False, vision_model: bool = True, dtype: Any = torch.float16
) -> Path:
    """Write llava-hf as transformers 4.x did; `memory` for the names in its memory, `vision_model` for the tower's level."""
    names = {"model.vision_tower.": "model." * memory + "vision_tower." + "vision_model." * vision_model}
    if not memory:
        names |= {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
        names |= {"model.multi_modal_projector.": "multi_modal_projector."}
    tensors = {}
    for name, tensor in hf(part).state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        tensors[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    store(folder, tensors, form, dtype)
    text = original_config(part) | {"model_type": "phi3" if part.kind == "phi3" else "llama", "vocab_size": ROWS}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": WORDS}
    config |= {"image_seq_length": PATCHES, "projector_hidden_act": "gelu", "vision_feature_layer": -2}
    write_json(folder / "config.json", config | {"text_config": text, "vision_config": vision_config().to_dict()})
    return folder


def original_config(part: Parts, **changes: object) -> dict[str, object]:
    """Return the flat config.json of haotian-liu/LLaVA (of LLaVA-pp for Phi-3)."""
    text, linear, phi = part.llm.config, part.kind == "llava-1.0", part.kind == "phi3"
    sizes = ["hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"]
    sizes += ["rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"]
    config: dict[str, object] = {name: getattr(text, name) for name in sizes} | {
        "architectures": ["LlavaPhiForCausalLM" if phi else "LlavaLlamaForCausalLM"],
        "model_type": "llava_phi" if phi else "llava",
        "hidden_act": "silu",
        "image_aspect_ratio": "square" if linear else "pad",
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "linear" if linear else "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": UNKNOWN_TOWER,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        **dict.fromkeys(("freeze_mm_mlp_adapter", "mm_use_im_patch_token", "mm_use_im_start_end"), False),
        **dict.fromkeys(("tie_word_embeddings", "tune_mm_mlp_adapter"), False),
        **dict.fromkeys(("use_cache", "use_mm_proj"), True),
    }
    if not linear:  # before Llama-2 there were no other keys
        config |= {"num_key_value_heads": text.num_key_value_heads, "rope_scaling": None, "rope_theta": 500.0}
    if part.kind == "llama":
        config |= {"head_dim": 10, "pretraining_tp": 1}
    if phi:
        config |= {"original_max_position_embeddings": 777, "sliding_window": 700, "attention_bias": False}
    return config | changes


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: x.clone() for name, x in tensors.items()}


def unused_tensors(tower: bool = True) -> Tensors:
    """Return buffers that transformers 4.31 and older stored, with wrong values: they must be ignored."""
    tensors = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.full((5,), 0.5) for n in range(2)}
    return tensors | ({TOWER + "embeddings.position_ids": torch.arange(PATCHES + 1)[None]} if tower else {})


def original_tensors(part: Parts, tower: bool = True) -> Tensors:
    """Return tensors under the names of haotian-liu/LLaVA."""
    tensors = dict(part.llm.state_dict()) | prefixed("model.mm_projector.", part.projector.state_dict())
    return tensors | (prefixed(TOWER, part.tower.state_dict()) if tower else {})


def original_folder(
    folder: Path,
    part: Parts,
    form: str = "bin",
    *,
    tower: bool = True,
    old: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Write a complete original LLaVA with a tokenizer; `old` adds unused tensors."""
    store(folder, original_tensors(part, tower) | (unused_tensors(tower) if old else {}), form, dtype)
    write_json(folder / "config.json", original_config(part, **config))
    tokenizer().save_pretrained(folder)
    return folder


def llm_folder(folder: Path, part: Parts, form: str = "saved", dtype: torch.dtype = torch.float16) -> Path:
    """Write a plain language model with its tokenizer; "saved" by transformers, or by hand (see `store`)."""
    if form == "saved":
        part.llm.save_pretrained(folder)
    else:
        store(folder, dict(part.llm.state_dict()) | unused_tensors(tower=False), form, dtype)
        config = original_config(part, model_type="phi3" if part.kind == "phi3" else "llama")
        config = {key: x for key, x in config.items() if "mm_" not in key and "image" not in key}
        write_json(folder / "config.json", config)
    tokenizer().save_pretrained(folder)
    return folder


def clip_folder(folder: Path, part: Parts, form: str = "vision saved") -> Path:
    """Write CLIP: the tower ("vision saved" by transformers, "vision bin"), or with its text tower ("full", "full bin")."""
    image_processor().save_pretrained(folder)
    if form == "vision saved":
        part.tower.save_pretrained(folder)
        return folder
    tensors = prefixed("vision_model.", part.tower.state_dict())
    config: dict[str, Any] = vision_config().to_dict() | {"architectures": ["CLIPVisionModel"]}
    if "full" in form:
        text = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"intermediate_size": 20, "max_position_embeddings": 9, "projection_dim": 14}
        text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        both = {"projection_dim": 14, "text_config": text, "vision_config": vision_config().to_dict()}
        clip = transformers.CLIPModel(transformers.CLIPConfig(**both)).state_dict()
        tensors = {name.replace("vision_model.vision_model.", "vision_model."): x for name, x in clip.items()} | tensors
        config = both | {"architectures": ["CLIPModel"], "model_type": "clip"}
    if "bin" in form:
        tensors["vision_model.embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
        if "full" in form:  # as OpenAI's file, whose other keys are in vision_config
            tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
            config["vision_config_dict"] = {"hidden_size": WIDTH, "patch_size": PATCH}
    store(folder, tensors, "bin" if "bin" in form else "safetensors")
    write_json(folder / "config.json", config)
    return folder


def projector_folder(folder: Path, part: Parts, *, config: bool = True, prefix: str = "model.mm_projector.") -> Path:
    """Write what LLaVA's first stage does, with config.json or without."""
    folder.mkdir(parents=True)
    tensors = prefixed(prefix, part.projector.state_dict())
    save(folder / "mm_projector.bin", {name: x.bfloat16() for name, x in tensors.items()})
    if config:
        write_json(folder / "config.json", original_config(part))
    return folder


# Adapters.


def adapted(model: torch.nn.Module, seed: int = 5, **options: object) -> PeftModel:
    """Return a copy of the model with random adapters (and copies of modules) by PEFT."""
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.05, "target_modules": DECODER} | options
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tuned.named_parameters():
            if tensor.requires_grad:
                tensor.add_((0.1 if "lora_" in name else 0.05) * torch.randn(tensor.shape, generator=random))
    return tuned.eval()


def peft_folder(folder: Path, model: torch.nn.Module, seed: int = 5, **options: object) -> PeftModel:
    """Save `adapted` by PEFT; return the saved model."""
    tuned = adapted(model, seed, **options)
    tuned.save_pretrained(folder)
    return tuned


def as_old_peft(folder: Path) -> Path:
    """Convert an adapter to what PEFT 0.4 saved."""
    save(folder / "adapter_model.bin", load_file(folder / ADAPTER_FILE))
    (folder / ADAPTER_FILE).unlink()
    keys = ["auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"]
    keys += ["layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type"]
    keys += ["r", "revision", "target_modules", "task_type"]
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    write_json(folder / ADAPTER_CONFIG, {key: config[key] for key in keys})
    return folder


def lora_folder(
    folder: Path,
    part: Parts,
    seed: int = 5,
    *,
    old: bool = False,
    dtype: torch.dtype = torch.float32,
    modules: list[str] | None = None,
    **options: object,
) -> Parts:
    """Write an original LoRA folder: PEFT on the plain language model, the projector in `non_lora_trainables.bin`.

    Returns:
        The tuned components, with adapters merged.
    """
    modules = sorted({name.split(".")[1] for name in MODULES[part.kind]}) if modules is None else modules
    tuned = adapted(part.llm, seed, target_modules=modules, task_type="CAUSAL_LM", **options)
    tuned.save_pretrained(folder)
    edit_json(folder / ADAPTER_CONFIG, base_model_name_or_path="somebody/a-plain-lm")
    projector = randomize(copy.deepcopy(part.projector), seed + 1, half=True)
    tensors = prefixed("base_model.model.model.mm_projector.", projector.state_dict())
    save(folder / NON_LORA, {name: x.to(dtype) for name, x in tensors.items()})
    write_json(folder / "config.json", original_config(part))
    write_json(folder / "trainer_state.json", {"global_step": 1})
    if old:
        as_old_peft(folder)
    return Parts(part.kind, tuned.merge_and_unload().eval(), part.tower, projector)


class Bench:
    """A base model in its formats with adapters on it, and their expected logits. Use `bench`, and change nothing."""

    def __init__(self, kind: str, room: Path):
        self.kind, self.part = kind, parts(kind)
        self.model = hf(self.part)
        self.hf = hf_folder(room / "hf", self.model)
        self.llm, self.clip = llm_folder(room / "llm", self.part), clip_folder(room / "clip", self.part)
        self.plain, self.full, self.lora = room / "plain", room / "full", room / "lora"
        self.plain_model = peft_folder(self.plain, self.model)
        self.full_model = peft_folder(self.full, self.model, modules_to_save=["multi_modal_projector"])
        self.lora_parts = lora_folder(self.lora, self.part)
        models = (self.model, self.plain_model, self.full_model)
        self.base_logits, self.plain_logits, self.full_logits = (llava_logits(model, inputs()) for model in models)
        self.lora_logits = self.lora_parts.logits(inputs())

    def adapter(self, projector: bool) -> tuple[Path, np.ndarray]:
        return (self.full, self.full_logits) if projector else (self.plain, self.plain_logits)


_rooms: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def bench(kind: str = "llama") -> Bench:
    """Return a `Bench` that all tests of the process share."""
    _rooms.append(tempfile.TemporaryDirectory())
    return Bench(kind, Path(_rooms[-1].name))


def with_adapter(base: Path, folder: Path, **options: Any) -> Any:
    model = read_model(base, **options)
    attach_adapter(model, folder)
    return model


def open_with_peft(base: Path, folder: Path) -> PeftModel:
    """Open an adapter folder with PEFT; a missing key is a warning, and so an error here."""
    return PeftModel.from_pretrained(transformers.LlavaForConditionalGeneration.from_pretrained(base), folder).eval()


def assert_same_tensors(first: Path, second: Path) -> None:
    before, after = load(first), load(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def assert_refused(call: Any, *names: object, any_of: tuple[str, ...] = ()) -> str:
    """Check that a call raises `CheckpointError` in one line that has all of `names`, and one of `any_of`."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for name in names:
        assert str(name) in message, message
    assert not any_of or any(word in message for word in any_of), message
    return message

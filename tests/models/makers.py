"""Checkpoint folders as their authors' tools write them, at a size that runs at once, and what original LLaVA computes.

Everything starts from three random parts (decoder, tower, projector), held by transformers' own classes and by torch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints import attach_adapter, read_model
from tests.models.oracle import GROUPED, llava_logits, normalized, picture_rows, randomise

KINDS = ("llama", "phi3")
WORDS = 90  # size of the tokenizer without <image>, and of an original model's vocabulary
ROWS = 128  # of a llava-hf vocabulary: <image> is 90, <pad> 91, the rest is padding
SIDE, PATCH = 24, 8
LEAVES = {
    "llama": (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
DECODER = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # what PEFT is to adapt in HF's class
TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a LLaVA is made of."""

    kind: str
    llm: torch.nn.Module
    tower: CLIPVisionModel
    projector: torch.nn.Module  # as original LLaVA builds it: one Linear, or a Sequential


def text_config(kind: str, vocab: int = WORDS, hidden: int = 36) -> LlamaConfig | Phi3Config:
    """For LLaMA no size follows from another; Phi-3's class knows no width of a head but hidden / heads."""
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 52,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "max_position_embeddings": 777,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "phi3":
        return Phi3Config(**sizes, original_max_position_embeddings=777, sliding_window=700)
    return LlamaConfig(**sizes, head_dim=10)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=30,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=44,
        image_size=SIDE,
        patch_size=PATCH,
    )


@functools.cache
def parts(kind: str = "llama", seed: int = 0, linear: bool = False, vocab: int = WORDS, hidden: int = 36) -> Parts:
    """Random parts, the same at every call: not to be changed."""
    text = text_config(kind, vocab, hidden)
    first = torch.nn.Linear(30, hidden)
    mlp = torch.nn.Sequential(first, torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
    llm = LlamaForCausalLM(text) if kind == "llama" else Phi3ForCausalLM(text)
    return Parts(
        kind,
        randomise(llm, seed),
        randomise(CLIPVisionModel(vision_config()), seed + 1),
        randomise(first if linear else mlp, seed + 2),
    )


def hf(part: Parts, rows: int = ROWS, image: int = WORDS) -> LlavaForConditionalGeneration:
    """The same weights in transformers' class; rows that the decoder lacks are random."""
    text = copy.deepcopy(part.llm.config)
    text.vocab_size = rows
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision_config(), text_config=text, image_token_index=image, image_seq_length=9)
    )
    randomise(model, 99)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        for name, tensor in part.llm.state_dict().items():
            place = "model.language_model." + name[6:] if name.startswith("model.") else name
            model.get_parameter(place)[: len(tensor)] = tensor
        model.model.vision_tower.load_state_dict(part.tower.state_dict())
        projector.linear_1.load_state_dict(part.projector[0].state_dict())
        projector.linear_2.load_state_dict(part.projector[2].state_dict())
    return model


def batch(seed: int = 0, image: int = WORDS) -> tuple[np.ndarray, ...]:
    """Causal rows of words with two pictures each, as `oracle.logits` takes them."""
    sizes = dataclasses.replace(GROUPED, text=dataclasses.replace(GROUPED.text, vocab=WORDS))
    rows = picture_rows(sizes, seed)
    rows[0][rows[3] >= 0] = image
    return rows


def original_logits(part: Parts, rows: tuple[np.ndarray, ...]) -> np.ndarray:
    """As original LLaVA computes them: features spliced in as embeddings, no token standing for them."""
    tokens, _, _, slots, pixels = rows
    with torch.no_grad():
        states = part.tower(normalized(pixels), output_hidden_states=True).hidden_states[-2]
        features = part.projector(states[:, 1:]).reshape(len(tokens), -1, part.llm.config.hidden_size)
        ids = torch.tensor(np.where(slots >= 0, 0, tokens), dtype=torch.long)
        embedded = part.llm.get_input_embeddings()(ids)
        embedded[torch.tensor(slots >= 0)] = features.flatten(0, 1)
        return part.llm(inputs_embeds=embedded).logits.numpy()


def words_logits(model: torch.nn.Module, seed: int = 0) -> np.ndarray:
    """Logits of a row of words, no picture."""
    ids = torch.tensor(np.random.default_rng(seed).integers(3, WORDS, (2, 12)), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids).logits.numpy()


@functools.cache
def _trained() -> str:
    """A BPE of exactly `WORDS` pieces over made-up words."""
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdklmnprst" for b in "aeiou"]
    text = [" ".join("".join(random.choice(syllables, random.integers(1, 4))) for _ in range(9)) for _ in range(300)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ.:?'\n")
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=WORDS,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.get_vocab_size() == WORDS
    return tokenizer.to_str()


def tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """`WORDS` pieces, then the added ones; llava-hf's are "<image>" and "<pad>"."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if added:
        made.add_tokens(list(added), special_tokens=True)
        made.pad_token = "<pad>" if "<pad>" in added else None
    return made


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def hf_folder(
    folder: Path, model: LlavaForConditionalGeneration, added: tuple[str, ...] = ("<image>", "<pad>"), **options: object
) -> Path:
    """As transformers saves a model and its processor."""
    model.save_pretrained(folder, **options)
    LlavaProcessor(
        image_processor(),
        tokenizer(*added),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def write_json(path: Path, raw: object) -> None:
    path.write_text(json.dumps(raw, indent=2))


def original_config(part: Parts, **changes: object) -> dict[str, object]:
    """The flat config.json of haotian-liu/LLaVA (of LLaVA-pp for Phi-3)."""
    text = part.llm.config
    llama = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "head_dim": 10,
        "pretraining_tp": 1,
        "rope_theta": 500.0,
    }
    phi = {
        "architectures": ["LlavaPhiForCausalLM"],
        "model_type": "llava_phi",
        "original_max_position_embeddings": 777,
        "rope_theta": 500.0,
        "sliding_window": 700,
        "attention_bias": False,
    }
    return {
        **(llama if part.kind == "llama" else phi),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": 30,
        "mm_projector_type": "linear" if isinstance(part.projector, torch.nn.Linear) else "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "somebody/a-tiny-clip",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    } | changes


def projector_tensors(part: Parts, prefix: str = "model.") -> dict[str, torch.Tensor]:
    return {f"{prefix}mm_projector.{name}": x.clone() for name, x in part.projector.state_dict().items()}


def original_tensors(part: Parts, tower: bool = True) -> dict[str, torch.Tensor]:
    """Under the names of haotian-liu/LLaVA."""
    tensors = {name: x.clone() for name, x in part.llm.state_dict().items()} | projector_tensors(part)
    if tower:
        names = {name.removeprefix("vision_model."): x for name, x in part.tower.state_dict().items()}
        tensors |= {TOWER + name: x.clone() for name, x in names.items() if not name.endswith("position_ids")}
    return tensors


def original_folder(folder: Path, part: Parts, *, tower: bool = True, shards: int = 1, **config: object) -> Path:
    """`pytorch_model.bin`, in shards with an index where there are several, config.json and a tokenizer."""
    folder.mkdir(parents=True)
    tensors = original_tensors(part, tower)
    names = [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)] if shards > 1 else []
    if names:
        where = {name: names[n * shards // len(tensors)] for n, name in enumerate(tensors)}
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    for file in names or ["pytorch_model.bin"]:
        torch.save({name: x for name, x in tensors.items() if not names or where[name] == file}, folder / file)
    write_json(folder / "config.json", original_config(part, **config))
    tokenizer().save_pretrained(folder)
    return folder


def clip_folder(folder: Path, part: Parts) -> Path:
    """As transformers saves the tower alone."""
    part.tower.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def llm_folder(folder: Path, part: Parts) -> Path:
    """A plain language model with its tokenizer."""
    part.llm.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def projector_file(folder: Path, part: Parts) -> Path:
    """What LLaVA's first stage leaves behind."""
    folder.mkdir(parents=True)
    torch.save(projector_tensors(part), folder / "mm_projector.bin")
    write_json(folder / "config.json", original_config(part))
    return folder


def adapted(model: torch.nn.Module, seed: int = 5, **options: object) -> PeftModel:
    """A copy of the model with PEFT's adapters (and copies of modules) on it, all of them random."""
    chosen = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.05, "target_modules": DECODER} | options
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(**chosen))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tuned.named_parameters():
            if tensor.requires_grad:
                noise = torch.randn(tensor.shape, generator=random)
                tensor.add_((0.1 if "lora_" in name else 0.05) * noise)
    return tuned.eval()


def peft_folder(folder: Path, model: torch.nn.Module, seed: int = 5, **options: object) -> PeftModel:
    """`adapted`, saved by PEFT; the model that was saved."""
    tuned = adapted(model, seed, **options)
    tuned.save_pretrained(folder)
    return tuned


def lora_folder(folder: Path, part: Parts, seed: int = 5, **config: object) -> Parts:
    """An original LoRA folder: PEFT on the plain language model, the projector in `non_lora_trainables.bin`.

    Returns:
        The tuned parts, adapters merged.
    """
    leaves = sorted({leaf.split(".")[1] for leaf in LEAVES[part.kind]})
    tuned = adapted(part.llm, seed, target_modules=leaves, task_type="CAUSAL_LM")
    tuned.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="somebody/a-plain-lm")
    projector = randomise(copy.deepcopy(part.projector), seed + 1)
    result = Parts(part.kind, tuned.merge_and_unload().eval(), part.tower, projector)
    torch.save(projector_tensors(result, "base_model.model.model."), folder / "non_lora_trainables.bin")
    write_json(folder / "config.json", original_config(part, **config))
    return result


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON object; None takes one out."""
    raw = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in raw.items() if value is not None or key not in changes})


def resave(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors over a weights file of either kind."""
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    save_file(tensors, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(tensors, path)


class Bench:
    """A base in its formats, and adapters on it as PEFT and LLaVA save them."""

    def __init__(self, kind, room):
        self.kind, self.part = kind, parts(kind)
        self.model = hf(self.part)
        self.hf = hf_folder(room / "hf", self.model)
        self.llm, self.clip = llm_folder(room / "llm", self.part), clip_folder(room / "clip", self.part)
        self.plain, self.full, self.lora = room / "plain", room / "full", room / "lora"
        self.plain_model = peft_folder(self.plain, self.model)
        self.full_model = peft_folder(self.full, self.model, modules_to_save=["multi_modal_projector"])
        self.lora_parts = lora_folder(self.lora, self.part)
        rows = batch()
        self.base_logits = llava_logits(self.model, rows)
        self.plain_logits, self.full_logits = (llava_logits(x, rows) for x in (self.plain_model, self.full_model))
        self.lora_logits = original_logits(self.lora_parts, rows)

    def adapter(self, projector):
        return (self.full, self.full_logits) if projector else (self.plain, self.plain_logits)


# What tests of adapters ask.


def assert_close(first, second, atol=1e-4):
    np.testing.assert_allclose(np.asarray(first), np.asarray(second), rtol=0, atol=atol)


def with_adapter(base, folder, **options):
    model = read_model(base, **options)
    attach_adapter(model, folder)
    return model


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert str(word) in message, message
    return message


def opened(base, folder):
    """What PEFT makes of an adapter folder; a key that it misses is a warning, and so an error here."""
    return PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), folder).eval()

"""Tiny checkpoints with real sentencepiece tokenizers, in the forms in which they are published."""

import functools
import io
import json
import random
from pathlib import Path

import sentencepiece

from reverie_jax.data.conversation import IMAGE
from tests.models import makers

WORDS = 360  # pieces of the sentencepiece model
ROLES = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>")  # of Phi-3


def part(kind="llama"):
    """Return components for `WORDS` (and Phi-3's tokens), with heads as wide as transformers 4.37 takes them to be."""
    return makers.parts(kind, vocab=WORDS + len(ROLES) * (kind == "phi3"), hidden=60)


@functools.cache
def sentencepiece_model() -> bytes:
    """Train a model as LLaMA's: BPE with bytes, no normalization, `<unk>`, `<s>` and `</s>` first."""
    choose = random.Random(0)
    syllables = [a + b for a in "bdklmnprst" for b in "aeiou"]
    words = ["What", "is", "it", "A", "cat", "USER", "ASSISTANT", "chat", "curious", "user", "and", "assistant"] * 6
    words += ["".join(choose.choice(syllables) for _ in range(1 + n % 4)) for n in range(90)]
    texts = [" ".join(choose.choice(words) + choose.choice(".?:, ").strip() for _ in range(9)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": iter(texts), "model_writer": model, "model_type": "bpe", "vocab_size": WORDS},
        **{"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        **{"split_digits": True, "character_coverage": 1.0, "minloglevel": 2},
    )
    return model.getvalue()


def tokenizer_files(folder: Path, *added: str, **settings: object) -> Path:
    """Write a tokenizer without tokenizer.json, as LLaMA's and Phi-3's; Phi-3's roles strip what follows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    content = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content |= {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    if added:
        flags = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
        tokens = enumerate(("<unk>", "<s>", "</s>"))
        tokens = [*tokens, *enumerate(added, WORDS)]
        content["added_tokens_decoder"] = {
            str(id): {"content": text, "rstrip": id > WORDS and text not in (IMAGE, "<pad>"), **flags}
            for id, text in tokens
        }
        (folder / "added_tokens.json").write_text(json.dumps({text: id for id, text in tokens[3:]}))
    special = {key: content[key] for key in ("bos_token", "eos_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(content | settings))
    return folder


def original(folder: Path, kind: str = "llama", aspect: str = "pad", **settings: object) -> Path:
    """Write an original LLaVA, its tower included; Phi-3's ends answers as LLaVA-pp's says."""
    makers.original_folder(folder, part(kind), "safetensors", image_aspect_ratio=aspect)
    return _with_tokenizer(folder, kind, settings)


def lora(folder: Path, base: Path, **settings: object) -> Path:
    """Write an original LoRA folder, and its base language model."""
    makers.lora_folder(folder, part())
    makers.llm_folder(base, part(), "safetensors")
    _with_tokenizer(base, "llama", settings)
    return folder


def _with_tokenizer(folder: Path, kind: str, settings: dict[str, object]) -> Path:
    for file in folder.glob("*token*"):
        file.unlink()
    if kind != "phi3":
        return tokenizer_files(folder, **settings)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [WORDS, WORDS + 4]}))
    return tokenizer_files(folder, *ROLES, eos_token=ROLES[0], pad_token=ROLES[0], **settings)

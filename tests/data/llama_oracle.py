"""Original LLaVA's tokens, straight on sentencepiece: transformers 4.37.2's slow Llama tokenizer and LLaVA's label masks.

Nothing here knows reverie_jax.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import strategies as st

IMAGE, IMAGE_ID, IGNORE = "<image>", -200, -100
UNDERLINE = "▁"
MAX_LENGTH = 2048

Turns = Sequence[str]
"""Question, answer, question, …; of odd number where the last question is open."""


def model_file() -> Path:
    """The Llama tokenizer's model; the test is skipped where it is absent."""
    found = os.environ.get("REVERIE_LLAMA_TOKENIZER")
    path = Path(found) if found else Path(__file__).parents[3] / "shared/data/llama2-tokenizer.model"
    if not path.exists():
        pytest.skip(f"no Llama tokenizer at {path.name}; REVERIE_LLAMA_TOKENIZER names one")
    return path


PHI3 = (
    *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>"),
    *("<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
)
KINDS = {"legacy": True, "modern": False, "phi3": False}
"""Tokenizers by name: is it a legacy one."""


def write_tokenizer(folder: Path, kind: str, *more: str, bos: bool = True) -> Path:
    """A tokenizer folder as Llama's and Phi-3's repositories have it; `more` are special tokens put behind."""
    shutil.copyfile(model_file(), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": KINDS[kind], "add_bos_token": bos, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    # rstrip: Phi-3's `</s>` (no special token there) and all that it adds but the end of text swallow what follows.
    added = [(0, "<unk>", False, True), (1, "<s>", False, True), (2, "</s>", kind == "phi3", kind != "phi3")]
    if kind == "phi3":
        added += [(32000 + n, text, n > 0, True) for n, text in enumerate(PHI3)]
        config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    first = 32000 + (len(PHI3) if kind == "phi3" else 0)
    added += [(first + n, text, False, True) for n, text in enumerate(more)]
    if kind == "phi3" or more:
        config["added_tokens_decoder"] = {
            str(id): {"content": text, "lstrip": False, "normalized": False, "rstrip": rstrip, "special": special}
            | {"single_word": False}
            for id, text, rstrip, special in added
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _sentencepiece() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file()))


STRANGER = "\ue000"
"""In no piece of the vocabulary: what stands behind it is cut up as if it stood alone, without a dummy prefix."""


@dataclasses.dataclass(frozen=True)
class SlowLlama:
    """transformers 4.37.2's slow LlamaTokenizer, its padding token set to `<unk>` (0) as LLaVA does."""

    kind: str
    padding = 0
    bos = 1

    @property
    def legacy(self) -> bool:
        return KINDS[self.kind]

    @functools.cached_property
    def added(self) -> dict[str, int]:
        names = {"<unk>": 0, "<s>": 1, "</s>": 2}
        return names | {text: 32000 + n for n, text in enumerate(PHI3)} if self.kind == "phi3" else names

    @functools.cached_property
    def swallowing(self) -> set[str]:
        return {"</s>", *PHI3[1:]} if self.kind == "phi3" else set()

    @property
    def named(self) -> set[str]:
        return {"<unk>", "<s>", "<|endoftext|>" if self.kind == "phi3" else "</s>"}

    def _pieces(self, text: str) -> list[str]:
        encode = functools.partial(_sentencepiece().encode, out_type=str)
        return encode(text) if self.legacy else encode(STRANGER + text)[len(encode(STRANGER)) :]

    def tokens(self, text: str) -> list[str]:
        if not text:
            return []
        if not self.legacy:
            text = UNDERLINE + text.replace(UNDERLINE, " ")
        names = sorted(self.added, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        out: list[str] = []
        for before, part in zip(["", *parts], parts, strict=False):
            if part in self.added:
                out.append(part)
            elif part := part.lstrip() if before in self.swallowing else part:
                out += self._pieces(part)
        strip = not self.legacy and len(out) > 1 and out[0] == UNDERLINE and out[1] in self.named
        return out[1:] if strip else out

    def __call__(self, text: str) -> list[int]:
        known = _sentencepiece().piece_to_id
        return [1, *(self.added[token] if token in self.added else known(token) for token in self.tokens(text))]


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A byte-level tokenizer, which is called as it is."""

    tokenizer: Any
    padding: int
    legacy: bool = False

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    @property
    def bos(self) -> int | None:
        return self.tokenizer.bos_token_id


AnyTokenizer = SlowLlama | Bytes


def with_image(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """The text cut at `<image>`, its parts tokenized apart, one BOS if the first part begins with one."""
    first, *rest = (tokenizer(part) for part in text.split(IMAGE))
    skipped = 1 if first and first[0] == tokenizer.bos else 0
    return first + [id for part in rest for id in (IMAGE_ID, *part[skipped:])]


def normal(question: str) -> str:
    """A question of an item with a picture: the marker alone in front."""
    if IMAGE not in question:
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def _system(who: str) -> str:
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )


SYSTEM = {
    "vicuna_v1": _system("user"),
    "llava_v1": _system("human"),
    "llava_v0": _system("human"),
    "phi3_instruct": "<|system|>\nYou are a helpful AI assistant.",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + _system("user"),
    "moe_llava": _system("user"),
}


def prompt(template: str, turns: Turns) -> str:
    """What original LLaVA's conversation renders; of an odd number of turns, up to where the answer begins."""
    if template == "plain":
        return "".join(IMAGE if n % 2 == 0 else f"{text}\n" for n, text in enumerate(turns))
    if template == "mistral":
        return "".join(
            (f" {text} </s>" if n % 2 else f"[INST] {text} [/INST]") if text else "" for n, text in enumerate(turns)
        )
    start, stop = "<|start_header_id|>", "<|end_header_id|>\n\n"
    roles, joint, ends = {
        "vicuna_v1": (("USER", "ASSISTANT"), ": ", (" ", "</s>")),
        "llava_v1": (("USER", "ASSISTANT"), ": ", (" ", "</s>")),
        "llava_v0": (("Human", "Assistant"), ": ", ("###", "###")),
        "phi3_instruct": (("\n<|user|>\n", "\n<|assistant|>\n"), "", ("<|end|>", "<|end|>")),
        "llama3": ((f"{start}user{stop}", f"{start}assistant{stop}"), "", ("<|eot_id|>", "<|eot_id|>")),
        "moe_llava": (("USER", "ASSISTANT"), ": ", (" ", "<|endoftext|>")),
    }[template]
    said = [*turns, ""] if len(turns) % 2 else turns
    out = SYSTEM[template] + ends[0]
    for n, text in enumerate(said):
        role = roles[n % 2]
        out += f"{role}{joint}{text}{ends[n % 2]}" if text else f"{role}{joint.strip()}"
    return out


@dataclasses.dataclass(frozen=True)
class Labelled:
    ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> list[int]:
        return [place for place, label in enumerate(self.labels) if label != IGNORE]

    def expanded(self, patches: int, filler: int) -> Labelled:
        """Return it with each image id repeated `patches` times."""
        times = [patches if id == IMAGE_ID else 1 for id in self.ids]
        ids = [
            filler if id == IMAGE_ID else id for id, count in zip(self.ids, times, strict=True) for _ in range(count)
        ]
        return Labelled(ids, [label for label, count in zip(self.labels, times, strict=True) for _ in range(count)])


def _mask(ids: list[int], first: int, past: int, labels: list[int]) -> None:
    """Python's slice: a negative end counts from the back, one past the end is cut."""
    for place in range(len(ids))[first:past]:
        labels[place] = IGNORE


def _train_plain(tokenizer: AnyTokenizer, turns: Turns, image: bool) -> Labelled:
    ids = with_image(tokenizer, f"{IMAGE}{turns[1]}\n")
    labels = list(ids)
    _mask(ids, 0, len(with_image(tokenizer, IMAGE)), labels)
    return Labelled(ids, labels)


def _train_rounds(tokenizer: AnyTokenizer, template: str, text: str, image: bool) -> Labelled:
    """Rounds counted by themselves, up to the first that has not exactly one tag; wiped where they do not add up."""
    encode = functools.partial(with_image, tokenizer) if image else tokenizer
    ids = encode(text)
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    mpt = {"phi3_instruct": ("<|end|>", "\n<|assistant|>\n"), "llama3": ("<|eot_id|>", header)}
    if template in mpt:
        end, role = mpt[template]
        said, tag, at = text.split(end), end + role, 0
        rounds = [end.join(group) for group in (said[:3], *(said[n : n + 2] for n in range(3, len(said), 2)))]
        first, later = {"phi3_instruct": (1, -2 + int(tokenizer.legacy)), "llama3": (1, 0)}[template]
        tail = 1
    elif template == "moe_llava":
        rounds, tag, at, tail = text.split("<|endoftext|>"), " ASSISTANT: ", 0, 2
        first, later = 1, 1
    elif template == "mistral":
        rounds, tag, at, tail = text.split("</s>"), "[/INST] ", 1, 2
        first, later = 0, 0
    else:
        rounds, tag, at, tail = text.split("</s>"), " ASSISTANT: ", 1, 2
        first, later = 0, -int(not tokenizer.legacy)
    labels = list(ids)
    _mask(ids, 0, at, labels)
    for n, part in enumerate(rounds):
        halves = part.split(tag)
        if len(halves) != 2:
            break
        shift = later if n else first
        _mask(ids, at, at + len(encode(halves[0] + tag)) + shift - tail, labels)
        at += len(encode(part)) + shift
    _mask(ids, at, len(ids), labels)
    if at < MAX_LENGTH and at != sum(id != tokenizer.padding for id in ids):
        labels = [IGNORE] * len(ids)
    return Labelled(ids, labels)


def _train_v0(tokenizer: AnyTokenizer, turns: Turns, image: bool) -> Labelled:
    header = f"{SYSTEM['llava_v0']}\n\n"
    said = [f"### {('Human', 'Assistant')[n % 2]}: {text}\n" for n, text in enumerate(turns)]
    encode = functools.partial(with_image, tokenizer) if image else tokenizer
    ids = encode("".join([header, *said, "### "]))
    # Without a picture padding is not counted, and `<unk>` is the padding.
    lengths = [sum(image or id != 0 for id in encode(text)) for text in (header, *said)]
    labels, at = list(ids), lengths[0]
    _mask(ids, 0, at, labels)
    for n, length in enumerate(lengths[1:]):
        if n % 2 == 0:
            _mask(ids, at + 2, at + length, labels)
        at += length
    return Labelled(ids, labels)


def training(tokenizer: AnyTokenizer, template: str, turns: Turns) -> Labelled:
    """An item of the training set: its ids, -200 for a picture, and its labels, -100 where nothing is taught."""
    image = any(IMAGE in text for text in turns[::2])
    # MoE-LLaVA leaves the marker where the text has it.
    said = [normal(text) if image and template != "moe_llava" else text for text in turns]
    if template == "plain":
        return _train_plain(tokenizer, said, image)
    if template == "llava_v0":
        return _train_v0(tokenizer, said, image)
    return _train_rounds(tokenizer, template, prompt(template, said), image)


def question(tokenizer: AnyTokenizer, template: str, turns: Turns) -> list[int]:
    """The prompt of an open conversation, -200 for a picture."""
    return with_image(tokenizer, prompt(template, turns))


# Texts to try.

WORDS = [
    *("a", "Is", "cup", "Black", "image?", "it's", "12", "(red)", "Yes,", "."),
    *(" ", "  ", "    ", "\n", "\n\n", "\t", " \n ", "\r\n"),
    *("é", "e\u0301", "猫", "図。", "🍵", "👩‍👩‍👧", "العربية", "Ω≈ç", "\u00a0", "\u3000", "\u200b", "\u0085"),
    *("<0x0A>", "<|", "|>", "<", ">", "</", "s>", "http://x.y/?q=1", "`x = 1`", "  - item", "\\n", "'", '"'),
    *("USER: ", "ASSISTANT: ", "ASSISTANT:", "Human: ", "Assistant:", "###", "### ", "# "),
]
TRAPS = [*WORDS, " ASSISTANT: ", "</s>", "<s>", "<unk>", "<pad>", "▁"]
TRAPS += ["<|end|>", "<|user|>", "<|user|>\n", "<|assistant|>\n", "<|endoftext|>"]


def any_text(words: list[str], smallest: int = 1) -> st.SearchStrategy[str]:
    joined = st.lists(st.sampled_from(words), min_size=smallest, max_size=8).map("".join)
    free = st.text(st.characters(exclude_categories=("Cs",)), min_size=smallest, max_size=12)
    return (joined | free).filter(lambda text: IMAGE not in text)


@st.composite
def dialogues(draw: st.DrawFn, smallest: int = 1) -> list[str]:
    """One to four exchanges of ordinary text or of text full of format marks, with markers anywhere in any question."""
    text = any_text(draw(st.sampled_from([WORDS, TRAPS])), smallest)
    turns = draw(st.integers(1, 4).flatmap(lambda n: st.lists(text, min_size=2 * n, max_size=2 * n)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        n = draw(st.sampled_from([0, 0, *range(0, len(turns), 2)]))
        at = draw(st.sampled_from([0, len(turns[n]), draw(st.integers(0, len(turns[n])))]))
        gap = draw(st.sampled_from(["\n", "", " "]))
        turns[n] = turns[n][:at] + (gap if at else "") + IMAGE + gap + turns[n][at:]
    return turns

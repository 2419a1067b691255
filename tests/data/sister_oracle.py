"""The token ids and labels of LRV-Instruction's MiniGPT-4, mPLUG-Owl and Muffin, by the rules of their own code.

transformers 4.28 to 4.33, on sentencepiece alone. Nothing here knows reverie_jax.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import sentencepiece

from tests.data.llama_oracle import IMAGE, model_file

PATCH, START, END = 32001, 32002, 32003
MUFFIN_TOKENS = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")
"""Added behind the 32,000 pieces."""
Labelled = tuple[list[int], list[int]]
"""Ids, and where they are taught."""


@functools.cache
def _sentencepiece() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file()))


@dataclasses.dataclass(frozen=True)
class OldLlama:
    """The slow LlamaTokenizer. Text is cut at added tokens; ordinary ones swallow the white space around them."""

    swallowing: tuple[str, ...] = ()
    bos, eos = 1, 2

    def __call__(self, text: str, special: bool = True) -> list[int]:
        names = {"<unk>": 0, "<s>": 1, "</s>": 2} | {name: 32000 + n for n, name in enumerate(self.swallowing)}
        parts = re.split("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")", text)
        for n, part in enumerate(parts):
            if part in self.swallowing:
                parts[n - 1], parts[n + 1] = parts[n - 1].rstrip(), parts[n + 1].lstrip()
        ids = [1] if special else []
        for part in parts:
            ids += [names[part]] if part in names else _sentencepiece().encode(part)
        return ids


LLAMA, MUFFIN = OldLlama(), OldLlama(MUFFIN_TOKENS)


def asked(turn: str) -> str:
    """A question without the marker of its picture and the line break beside it."""
    return turn.replace(f"{IMAGE}\n", "").replace(f"\n{IMAGE}", "").replace(IMAGE, "")


# MiniGPT-4.


def minigpt4(turns: Sequence[str], patches: int) -> Labelled:
    """The trainer's forward pass for a batch of one; it has one exchange, and later ones are made alike here.

    An odd number of turns ends where the answer would begin.
    """
    ids, labels = [1], [0]
    for number in range(0, len(turns), 2):
        instruction = f"{asked(turns[number])}###".split("###")[0]
        picture = "<Img><ImageHere></Img> " if IMAGE in turns[number] else ""
        text = f"{picture}Describe. ###Assistant: ".replace("Describe.", instruction)
        before, *after = f"{'' if number else '###'}Human: {text}".split("<ImageHere>")
        prompt = LLAMA(before, False)
        for part in after:
            prompt += [PATCH] * patches + LLAMA(part, False)
        ids, labels = ids + prompt, labels + [0] * len(prompt)
        if number + 1 < len(turns):
            answer = LLAMA(turns[number + 1] + "###", False)  # and cut to 160
            ids, labels = ids + answer, labels + [int(id != LLAMA.eos) for id in answer]
    return ids, labels


DESCRIBED = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


def minigpt4_prompt(turns: Sequence[str], patches: int) -> list[int]:
    """The chat's prompt: one text, cut at the picture only."""
    text = f"{DESCRIBED}###"
    for number, turn in enumerate([*turns, ""]):
        if IMAGE in turn:
            turn = f"<Img><ImageHere></Img> {asked(turn)}"
        text += ("Human", "Assistant")[number % 2] + (f": {turn}###" if turn else ":")
    ids: list[int] = []
    for number, part in enumerate(text.split("<ImageHere>")):
        ids += [PATCH] * patches * bool(number) + LLAMA(part, number == 0)
    return ids


# mPLUG-Owl.

OWL = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LRV_OWL = (
    "The following is a conversation between a curious human and AI. "
    "The AI gives helpful, detailed, and polite answers to the human's questions."
)


def mplug_owl_text(turns: Sequence[str]) -> str:
    """The text of a row of its training data."""
    text = OWL
    for number, turn in enumerate(turns):
        picture = f"\nHuman: {IMAGE}" if IMAGE in turn else ""
        text += f"\nAI: {turn}" if number % 2 else f"{picture}\nHuman: {asked(turn)}"
    return text


def mplug_owl(text: str, patches: int) -> Labelled:
    """Its data set's `_extract_text_token_from_conversation`, without padding and the limit of 2,048."""
    pictures = IMAGE in text
    chunks = re.split("(<image>|AI: |\nHuman: )" if pictures else "(AI: |\nHuman: )", text)
    if pictures:
        chunks = [chunk for chunk in chunks if chunk]
    ids, labels = [1], [0]
    for number, chunk in enumerate(chunks):
        taught = number > 0 and chunks[number - 1] == "AI: " and chunk != IMAGE
        new = [PATCH] * patches if chunk == IMAGE else LLAMA(chunk, False) + [LLAMA.eos] * taught
        ids, labels = ids + new, labels + [int(taught)] * len(new)
    return ids, labels


def mplug_owl_prompt(text: str, patches: int) -> list[int]:
    """Its processor's `_tokenize_prompt`."""
    ids = [1]
    for chunk in re.split("(<image>)", text):
        ids += [PATCH] * patches if chunk == IMAGE else LLAMA(chunk, False)
    return ids


# Muffin.

HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def _shown(patches: int) -> str:
    return "<im_start>" + "<im_patch>" * patches + "<im_end>"


def muffin(turns: Sequence[str], patches: int) -> Labelled:
    """Its `preprocess`: human turns are masked from their third token on, by lengths counted one by one with a BOS each."""
    said = [
        f"### {('Human', 'Assistant')[n % 2]}: {turn.replace(IMAGE, _shown(patches))}\n" for n, turn in enumerate(turns)
    ]
    ids = MUFFIN(f"{HEADER}\n\n{''.join(said)}### ")
    lengths = [len(MUFFIN(text)) for text in (f"{HEADER}\n\n", *said)]
    labels, at = [1] * len(ids), lengths[0]
    labels[:at] = [0] * len(labels[:at])
    for number, length in enumerate(lengths[1:]):
        if number % 2 == 0:
            labels[at + 2 : at + length] = [0] * len(labels[at + 2 : at + length])
        at += length
    return ids, labels


def muffin_prompt(turn: str, patches: int) -> list[int]:
    """The prompt of its evaluation, which does not name the assistant."""
    picture = f"\n{_shown(patches)}" if IMAGE in turn else ""
    return MUFFIN(f"{HEADER}\n###Human: {asked(turn)}{picture}\n###")

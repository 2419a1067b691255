"""What decoding is held against: transformers' own LLaVA answering one conversation at a time, weights and words shared."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import Processor
from reverie_jax.data.templates import Template
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel
from reverie_jax.models.checkpoints import read_model
from tests.models import oracle
from tests.train import tiny

SIZES = oracle.Sizes(
    VisionConfig(hidden=30, layers=3, heads=3, mlp=44, image_size=24, patch_size=8),
    TextConfig(71, 36, 2, 4, 2, 10, 52, norm_eps=1e-3, rope_theta=500.0, max_positions=400),
)
END, OTHER_END = 2, 5
NEW_TOKENS = 10
ALIKE = 100
"""From this seed on the two ends are likely together: of the best beams, most may end at once."""
TIE = 1e-3
"""Choices nearer than this are none that two programs must agree on: take another seed."""


class Words(tiny.Words):
    """Characters to ids; and ids back to their numbers, so that an answer's text says each of its tokens."""

    def __call__(self, text: str, *, return_offsets_mapping: bool) -> dict[str, Any]:
        found = super().__call__(text, return_offsets_mapping=return_offsets_mapping)
        spans = found["offset_mapping"][1:]
        special = {"<image>": oracle.IMAGE, "</s>": END}
        ids = [special.get(text[a:b]) or oracle.IMAGE + 1 + ord(text[a]) % 60 for a, b in spans]
        return {"input_ids": [1, *ids], "offset_mapping": found["offset_mapping"]}

    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == "<|end|>"
        return OTHER_END

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def processor(*, two_ends: bool = False) -> Processor:
    """With `two_ends` another token beside the end of sequence ends an answer, as Phi-3's does."""
    template = Template("tested", "two", "", "USER: ", " ASSISTANT:", end="<|end|>" if two_ends else None)
    made = Processor.of(SIZES.ours, Words(), template)
    assert made.encoder.stop_ids == ((END, OTHER_END) if two_ends else (END,))
    return made


PROCESSOR = processor()


@functools.cache
def theirs(seed: int) -> LlavaForConditionalGeneration:
    """Random; logits far enough apart that answers differ, and the ends' far enough that some answers end."""
    model = oracle.llava(SIZES, seed)
    with torch.no_grad():
        model.lm_head.weight *= 2.5
        model.lm_head.weight[[END, OTHER_END]] *= 1.7
        if seed >= ALIKE:
            model.lm_head.weight[OTHER_END] = 0.9 * model.lm_head.weight[END]
        # A picture's placeholder in an answer: transformers would look for its picture when it runs everything again.
        model.lm_head.weight[oracle.IMAGE] = 0
    return model


@functools.cache
def ours(seed: int) -> VisionLanguageModel:
    """The same weights, by way of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return read_model(oracle.saved(theirs(seed), Path(folder)))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(text: str, *more: tuple[str, str], shown: bool = True) -> Conversation:
    """An open conversation: a question, then answers each with a further question."""
    turns = [Turn("user", f"<image>\n{text}" if shown else text)]
    for answer, prompt in more:
        turns += [Turn("assistant", answer), Turn("user", prompt)]
    return Conversation(tuple(turns), (0,) if shown else ())


def seen(encoded: bytes) -> torch.Tensor:
    """The picture as CLIP wants it in torch."""
    return oracle.normalized(PROCESSOR.pixels(encoded, "picture"))


def generated(
    seed: int,
    picture: ImageQuestions,
    talk: Conversation,
    max_new_tokens: int,
    processor: Processor = PROCESSOR,
    **options: Any,
) -> list[int]:
    """What transformers' `generate` says to one conversation, without what ends it."""
    ids = torch.tensor(processor.encoder(talk).ids, dtype=torch.long)[None]
    ends = processor.encoder.stop_ids
    shown = {"pixel_values": seen(picture.read())} if picture.encoded else {}
    with torch.no_grad():
        out = theirs(seed).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **shown,
            **options,
        )
    if options.get("num_beams", 1) == 1:
        best = torch.cat(out.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > TIE, "near a tie: take another seed"
    answer = out.sequences[0, ids.shape[1] :].tolist()
    stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return answer[:stop]


def scores(seed: int, pixels: torch.Tensor | None, ids: Sequence[int]) -> np.ndarray:
    """transformers' logits behind the last of the tokens: the whole conversation at once, no cache."""
    shown = {} if pixels is None else {"pixel_values": pixels}
    with torch.no_grad():
        return theirs(seed)(input_ids=torch.tensor([list(ids)]), **shown).logits[0, -1].numpy()


def log_softmax(scores: np.ndarray) -> np.ndarray:
    wide = scores.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def contrasted(plain: np.ndarray, against: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Leng et al.'s equations 3 and 4, as probabilities have it: a token is out unless p >= beta max p."""
    probability, other = np.exp(log_softmax(plain)), np.exp(log_softmax(against))
    mixed = probability ** (1 + alpha) / other**alpha
    return np.where(probability >= beta * probability.max(), np.log(mixed / mixed.sum()), -np.inf)


def stepwise(step: Callable[[list[int]], np.ndarray], max_new_tokens: int) -> list[int]:
    """Greedy by running everything again for each token.

    Args:
        step: scores of the next token, behind an answer so far.
    """
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        found = step(answer)
        best = np.sort(found)[-2:]
        assert best[1] - best[0] > TIE, "near a tie: take another seed"
        token = int(found.argmax())
        if token == END:
            break
        answer.append(token)
    return answer


def text(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def each(
    pictures: Sequence[ImageQuestions], answer: Callable[[ImageQuestions, Conversation], list[int]]
) -> Mapping[int, str]:
    """By the question's number, the answers of an oracle that sees one conversation at a time."""
    return {number: text(answer(picture, talk)) for picture in pictures for number, talk in picture.questions}

"""The oracle of decoding: transformers' LLaVA answers one conversation at a time, with the same weights and tokenizer."""

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
from transformers.generation import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import Processor
from reverie_jax.data.templates import Template
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import ICD_INSTRUCTION, EngineShape
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
"""From this seed on the two ends are likely together: most of the best beams may end at once."""
TIE = 1e-3
"""Two programs need not agree on scores closer than this: take another seed."""


class Words(tiny.Words):
    """Encodes characters, and decodes ids to their numbers: an answer's text shows each of its tokens."""

    def __call__(self, text: str, *, return_offsets_mapping: bool) -> dict[str, Any]:
        found = super().__call__(text, return_offsets_mapping=return_offsets_mapping)
        spans = found["offset_mapping"][1:]
        special = {"<image>": oracle.IMAGE, "</s>": END}
        ids = [special.get(text[a:b]) or oracle.IMAGE + 1 + ord(text[a]) % 60 for a, b in spans]
        return {"input_ids": [1, *ids], "offset_mapping": found["offset_mapping"]}

    def get_added_vocab(self) -> dict[str, int]:
        return {"</s>": END, "<|end|>": OTHER_END}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def processor(*, two_ends: bool = False) -> Processor:
    """Return a processor; with `two_ends`, a second token ends answers, as Phi-3's does."""
    template = Template("tested", "two", "", "USER: ", " ASSISTANT:", end="<|end|>" if two_ends else None)
    made = Processor.from_config(SIZES.ours, Words(), template)
    assert made.encoder.stop_ids == ((END, OTHER_END) if two_ends else (END,))
    return made


PROCESSOR = processor()
HELD = "5 5"
"""A text that ends answers of `HOLDING`, where a token's number ends with 5 and the next one's begins with 5."""
HOLDING = Processor.from_config(SIZES.ours, Words(), Template("holding", "two", "", "USER: ", " ASSISTANT:", end=HELD))


def holds(answer: Sequence[int]) -> bool:
    return HELD in text(answer)


class Penalties(LogitsProcessor):
    """transformers' processors by our options, as `generate` would call them: on the whole text or behind the prompt."""

    def __init__(self, decoding: Decoding, prompt: int):
        self.start = 0 if decoding.penalize_prompt else prompt
        self.parts: list[LogitsProcessor] = []
        if decoding.repetition_penalty != 1:
            self.parts.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
        if decoding.no_repeat_ngram:
            self.parts.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            scores = part(input_ids[:, self.start :], scores)
        return scores


class Held(StoppingCriteria):
    """Ends each answer that holds the text."""

    def __init__(self, prompt: int):
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.tensor([holds(ids) for ids in input_ids[:, self.prompt :].tolist()])


def beams_of_2023(
    score: Callable[[list[int]], np.ndarray],
    decoding: Decoding,
    prompt: Sequence[int],
    held: Callable[[list[int]], bool],
) -> list[int]:
    """Search as transformers' BeamSearchScorer and beam_search did before 4.36, written anew with lists.

    Args:
        score: Scores the token after an answer so far.
        decoding: Its options.
        prompt: Tokens of the prompt.
        held: Whether an answer holds what Muffin's stopping criterion looks for.
    """
    count, power, longest = decoding.beams, decoding.length_penalty, decoding.max_new_tokens
    penalties = Penalties(decoding, len(prompt))
    running: list[tuple[float, list[int]]] = [(0.0, [])] + [(-1e9, [])] * (count - 1)
    finished: list[tuple[float, list[int]]] = []

    def finish(total: float, answer: list[int]) -> None:
        finished.append((total / (len(prompt) + len(answer)) ** power, answer))
        finished.sort(key=lambda one: -one[0])
        del finished[count:]

    while True:
        candidates = []
        for total, answer in running:
            logp = torch.tensor(log_softmax(score(answer)))[None]
            logp = penalties(torch.tensor([[*prompt, *answer]]), logp)[0].numpy()
            candidates += [(total + one, answer, token) for token, one in enumerate(logp)]
        best = sorted(candidates, key=lambda one: -one[0])[: 2 * count]
        assert np.diff([one[0] for one in best]).max() < -1e-6, "near a tie: take another seed"
        running = []
        for rank, (total, answer, token) in enumerate(best):
            if token != END:
                running.append((total, [*answer, token]))
            elif rank < count:
                finish(total, answer)
            if len(running) == count:
                break
        length = len(running[0][1])
        attainable = best[0][0] / (len(prompt) + length) ** power
        if len(finished) == count and finished[-1][0] >= attainable:
            break
        if length == longest or all(held(answer) for _, answer in running):
            for total, answer in running:
                finish(total, answer)
            break
    return finished[0][1]


@functools.cache
def theirs(seed: int) -> LlavaForConditionalGeneration:
    """Return a random model whose logits are far enough apart that answers differ and some of them end."""
    model = oracle.llava(SIZES, seed)
    with torch.no_grad():
        model.lm_head.weight *= 2.5
        model.lm_head.weight[[END, OTHER_END]] *= 1.7
        if seed >= ALIKE:
            model.lm_head.weight[OTHER_END] = 0.9 * model.lm_head.weight[END]
        # Never an image placeholder: transformers would look for its image when it runs everything again.
        model.lm_head.weight[oracle.IMAGE] = 0
    return model


@functools.cache
def ours(seed: int) -> VisionLanguageModel:
    """Return our model with the same weights, read from a checkpoint; of every second seed with unstacked layers."""
    with tempfile.TemporaryDirectory() as folder:
        model = read_model(oracle.saved(theirs(seed), Path(folder)))
    if seed % 2:
        model.decoder.unstack()
    return model


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ask(text: str, *more: tuple[str, str], shown: bool = True) -> Conversation:
    """Return an open conversation: a question, then answers each with a further question."""
    turns = [Turn("user", f"<image>\n{text}" if shown else text)]
    for answer, prompt in more:
        turns += [Turn("assistant", answer), Turn("user", prompt)]
    return Conversation(tuple(turns), (0,) if shown else ())


def normalized(encoded: bytes) -> torch.Tensor:
    """Return an image as CLIP takes it in torch."""
    return oracle.normalized(PROCESSOR.preprocess(encoded, "picture"))


def transformers_tokens(
    seed: int,
    image: ImageQuestions,
    conversation: Conversation,
    max_new_tokens: int,
    processor: Processor = PROCESSOR,
    **options: Any,
) -> list[int]:
    """Return the answer of transformers' `generate` to one conversation, without the token that ends it."""
    ids = torch.tensor(processor.encoder(conversation).ids, dtype=torch.long)[None]
    ends = processor.encoder.stop_ids
    shown = {"pixel_values": normalized(image.read())} if image.encoded else {}
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
    stop = next((index for index, token in enumerate(answer) if token in ends), len(answer))
    return answer[:stop]


def scores(seed: int, pixels: torch.Tensor | None, ids: Sequence[int], *, blind: bool = False) -> np.ndarray:
    """Return transformers' logits behind the last token: the whole conversation at once, no cache.

    With `blind`, no token sees the image's, and all keep their positions.
    """
    shown = {} if pixels is None else {"pixel_values": pixels}
    tokens = torch.tensor([list(ids)])
    if blind:
        mask = (tokens != oracle.IMAGE).long()
        shown |= {"attention_mask": mask, "position_ids": torch.arange(tokens.shape[1])[None]}
    with torch.no_grad():
        return theirs(seed)(input_ids=tokens, **shown).logits[0, -1].numpy()


def log_softmax(scores: np.ndarray) -> np.ndarray:
    wide = scores.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def contrasted(plain: np.ndarray, against: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Return Leng et al.'s equations 3 and 4 over probabilities: a token is excluded unless p >= beta max p."""
    probability, other = np.exp(log_softmax(plain)), np.exp(log_softmax(against))
    mixed = probability ** (1 + alpha) / other**alpha
    return np.where(probability >= beta * probability.max(), np.log(mixed / mixed.sum()), -np.inf)


def stepwise(step: Callable[[list[int]], np.ndarray], max_new_tokens: int) -> list[int]:
    """Decode greedily by running everything again for each token; `step` scores the token after an answer so far."""
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


def behind_instruction(conversation: Conversation) -> Conversation:
    """Return the conversation that ICD contrasts with: its last question behind the disturbing instruction."""
    count = max(number for number, turn in enumerate(conversation.turns) if turn.role == "user")
    before, last, after = conversation.turns[:count], conversation.turns[count], conversation.turns[count + 1 :]
    opening, text = ("<image>\n", last.text[8:]) if last.text.startswith("<image>\n") else ("", last.text)
    return Conversation((*before, Turn("user", f"{opening}{ICD_INSTRUCTION} {text}"), *after), conversation.images)


def begun(conversation: Conversation, prefix: str) -> Conversation:
    """Return an open conversation whose answer begins with `prefix`."""
    turns = *conversation.turns, Turn("assistant", "", prefix=prefix)
    return Conversation(turns, conversation.images)


def text(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def answers_of(
    images: Sequence[ImageQuestions], answer: Callable[[ImageQuestions, Conversation], list[int]]
) -> Mapping[int, str]:
    """Return answers by the question's number, from an oracle that sees one conversation at a time."""
    return {number: text(answer(image, conversation)) for image in images for number, conversation in image.questions}


# Several questions about an image; one that continues another; an image with one question; two questions without an image.
IMAGES = [
    ImageQuestions("a", png(0), [(0, ask("is it?")), (1, ask("is it red?")), (2, ask("is it?", ("yes", "why?")))]),
    ImageQuestions(
        "b",
        png(1),
        [(3, ask("what")), (4, ask("is it?")), (5, ask("z")), (6, ask("is it red?", ("no", "why is that?")))],
    ),
    ImageQuestions("none", b"", [(7, ask("is it?", shown=False)), (8, ask("name a colour", shown=False))]),
    ImageQuestions("c", png(2), [(9, ask("is it?"))]),
]
# One tree in ten is long: two shapes.
LONG = "tell me all that there is to see, from left to right and from the top down. "
MANY_IMAGES = [
    *IMAGES,
    *(ImageQuestions(f"m{n}", png(10 + n), [(20 + n, ask("abcdefg"[n] * (n + 1) + "?"))]) for n in range(7)),
    ImageQuestions("long", png(30), [(40, ask(LONG)), (41, ask("is it?", ("yes", LONG)))]),
]


SHAPE = EngineShape(batch_size=2)


def answers_with_scores(seed, decoding, images=IMAGES, shape=SHAPE, *, mesh=None, processor=PROCESSOR, **options):
    """Return our answers by number; batches arrive in the announced order."""
    engine = Engine(ours(seed), processor, shape, mesh=mesh)
    schedule = engine.schedule(images, decoding)
    batches = list(engine.stream(schedule, decoding, **options))
    assert [list(batch) for batch in batches] == list(schedule.numbers())
    return {number: answer for batch in batches for number, answer in batch.items()}


def decoded(*args, **options) -> dict[int, str]:
    """Return the texts of our answers by number."""
    return {number: answer.text for number, answer in answers_with_scores(*args, **options).items()}


@functools.cache
def greedy_answer(seed: int, number: int) -> str:
    image, conversation = next((i, c) for i in MANY_IMAGES for n, c in i.questions if n == number)
    return text(transformers_tokens(seed, image, conversation, NEW_TOKENS))


def greedy(seed: int, images: Sequence[ImageQuestions] = IMAGES) -> dict[int, str]:
    """Return transformers' greedy answers by number."""
    return {number: greedy_answer(seed, number) for image in images for number, _ in image.questions}

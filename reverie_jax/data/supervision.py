"""Which parts of a record's conversations are supervised: REVERIE's ablations as options over the same records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.reflection import classify_question
from reverie_jax.data.sources.reverie import parse_rationale_prompt

_GUIDANCE = "Including any necessary facts or knowledge."
_BY_TYPE = {
    "choice": "Go through the options.",
    "yes/no": "Say what in the image settles it.",
    "short": "Say where in the image it can be seen.",
    "open": "Go step by step.",
}


@dataclasses.dataclass(frozen=True)
class Supervision:
    """The supervision of one training run (one arm of REVERIE's ablations).

    Attributes:
        kinds: `responses` supervises the first answer of each conversation, `positive` and `negative` also the rationales of
            that kind, `rationales` all of them. Of preference pairs, only the chosen answer is supervised.
        answers: supervise an answer that several rationales share `once`, or `as-published`: once per rationale, as in
            REVERIE's published rows (2.2 times on average).
        context: `separate` keeps one rationale per conversation; `positive-first` and `negative-first` join a positive and a
            negative rationale of an answer in that order.
        prompts: how rationales are requested: `as-written` in the records, `bare`, `guided` with REVERIE's guidance, or
            guided with the desired length or a line for the type of question.
        answer_weight: loss weight of the first answer's tokens.
        rationale_weight: loss weight of the rationales' tokens.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kinds: Literal["responses", "positive", "negative", "rationales"] = "rationales"
    answers: Literal["once", "as-published"] = "once"
    context: Literal["separate", "positive-first", "negative-first"] = "separate"
    prompts: Literal["as-written", "bare", "guided", "guided-length", "guided-type"] = "as-written"
    answer_weight: float = 1.0
    rationale_weight: float = 1.0

    def __call__(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Return the supervised conversations of one record, with their weights; those without supervision are left out."""
        # (conversation, whether it has a rationale), since the options apply to these only
        examples = [(one, _has_rationale(one)) for one in conversations if one.kind != "rejected"]
        if self.kinds != "rationales":
            examples = [
                (_first_exchange(one) if has_rationale and one.kind != self.kinds else one, has_rationale)
                for one, has_rationale in examples
            ]
        if self.context != "separate":
            examples = _join_rationales(examples, first=self.context.removesuffix("-first"))
        supervised: set[tuple[str, str]] = set()
        weighted = []
        for conversation, has_rationale in examples:
            turns = list(conversation.turns)
            if has_rationale:
                exchange = (turns[0].text, turns[1].message)
                repeated = self.answers == "once" and exchange in supervised
                if turns[1].weight > 0:
                    supervised.add(exchange)
                turns[1] = _scale(turns[1], 0.0 if repeated else self.answer_weight)
                for index in range(3, len(turns), 2):
                    turns[index] = _scale(turns[index], self.rationale_weight)
                    turns[index - 1] = self._reword(turns, index)
            weighted.append(dataclasses.replace(conversation, turns=tuple(turns)))
        return [one for one in weighted if any(turn.is_taught for turn in one.turns)]

    def _reword(self, turns: Sequence[Turn], index: int) -> Turn:
        """Return the request for the rationale at `index` in the form that `prompts` names."""
        request = turns[index - 1]
        if self.prompts == "as-written" or (about := parse_rationale_prompt(request.text)) is None:
            return request
        kind, wrong = about
        text = "Explain why." if kind == "positive" else f"Explain why this answer is wrong: {wrong.rstrip('. ')}."
        if self.prompts != "bare":
            text += f" {_GUIDANCE}"
        if self.prompts == "guided-length":
            text += f" Use about {max(10, round(len(turns[index].text.split()), -1))} words."
        if self.prompts == "guided-type":
            text += f" {_BY_TYPE[classify_question(turns[0].text.replace(IMAGE, '').strip(), turns[1].text)]}"
        return dataclasses.replace(request, text=f"{IMAGE}\n" * request.text.count(IMAGE) + text)


def _has_rationale(conversation: Conversation) -> bool:
    return conversation.kind in ("positive", "negative") and len(conversation.turns) > 2


def _markers(turns: Sequence[Turn]) -> int:
    return sum(turn.text.count(IMAGE) for turn in turns)


def _first_exchange(conversation: Conversation) -> Conversation:
    turns = conversation.turns[:2]
    return dataclasses.replace(conversation, turns=turns, images=conversation.images[: _markers(turns)])


def _scale(turn: Turn, factor: float) -> Turn:
    return dataclasses.replace(turn, weight=turn.weight * factor)


def _join_rationales(examples: Sequence[tuple[Conversation, bool]], first: str) -> list[tuple[Conversation, bool]]:
    """Join the n-th positive and the n-th negative rationale of an answer, at the position of the earlier one."""
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}
    for number, (one, _) in enumerate(examples):
        if _has_rationale(one):  # `kinds` may have cut it
            exchange = (one.turns[0].text, one.turns[1].message)
            groups.setdefault(exchange, {"positive": [], "negative": []})[one.kind].append(number)
    joined: list[tuple[Conversation, bool] | None] = list(examples)
    for kinds in groups.values():
        for pair in zip(kinds["positive"], kinds["negative"], strict=False):
            one, other = (examples[number][0] for number in (pair if first == "positive" else pair[::-1]))
            turns, images = one.turns + other.turns[2:], one.images + other.images[_markers(other.turns[:2]) :]
            joined[min(pair)] = dataclasses.replace(one, turns=turns, images=images), True
            joined[max(pair)] = None
    return [example for example in joined if example is not None]

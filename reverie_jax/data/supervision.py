"""What of a record's conversations is taught: the arms of REVERIE's ablations as switches over the same records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.reflection import kind_of
from reverie_jax.data.sources.reverie import explains

_GUIDANCE = "Including any necessary facts or knowledge."
_BY_TYPE = {
    "choice": "Go through the options.",
    "yes/no": "Say what in the image settles it.",
    "short": "Say where in the image it can be seen.",
    "open": "Go step by step.",
}


@dataclasses.dataclass(frozen=True)
class Supervision:
    """One arm.

    Attributes:
        kinds: `responses` teaches each conversation's first answer alone, `positive` and `negative` also the rationales of
            their kind, `rationales` everything. Of preference pairs the chosen answer is taught, the rejected one never.
        answers: an answer that several rationales share is taught once, or as often as the rows repeat it, as REVERIE's
            published rows do (2.2 times on average).
        context: each rationale in a conversation of its own, or a positive and a negative one of an answer in one.
        prompts: the words that ask for a rationale: as the records have them, bare, with REVERIE's guidance, or that with
            the length that is wanted or a line for the type of the question.
        answer_weight, rationale_weight: loss weight of the first answer's tokens and of the rationales'.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kinds: Literal["responses", "positive", "negative", "rationales"] = "rationales"
    answers: Literal["once", "as-published"] = "once"
    context: Literal["separate", "positive-first", "negative-first"] = "separate"
    prompts: Literal["as-written", "bare", "guided", "guided-length", "guided-type"] = "as-written"
    answer_weight: float = 1.0
    rationale_weight: float = 1.0

    def __call__(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """The conversations of one record as this arm has them; those that then teach nothing are left out."""
        # (conversation, whether it came with a rationale: the switches are about those alone)
        talks = [(talk, _explains(talk)) for talk in conversations if talk.kind != "rejected"]
        if self.kinds != "rationales":
            talks = [(talk if talk.kind == self.kinds or not why else _first(talk), why) for talk, why in talks]
        if self.context != "separate":
            talks = _joined(talks, first=self.context.removesuffix("-first"))
        answered: set[tuple[str, str]] = set()
        weighted = []
        for talk, why in talks:
            turns = list(talk.turns)
            if why:
                said = (turns[0].text, turns[1].text)
                repeated = self.answers == "once" and said in answered
                if turns[1].weight > 0:
                    answered.add(said)
                turns[1] = _scaled(turns[1], 0.0 if repeated else self.answer_weight)
                for place in range(3, len(turns), 2):
                    turns[place] = _scaled(turns[place], self.rationale_weight)
                    turns[place - 1] = self._asked(turns, place)
            weighted.append(dataclasses.replace(talk, turns=tuple(turns)))
        return [talk for talk in weighted if any(turn.weight > 0 for turn in talk.turns if turn.role == "assistant")]

    def _asked(self, turns: Sequence[Turn], place: int) -> Turn:
        """The question before the rationale at `place`, in this arm's words."""
        asked = turns[place - 1]
        if self.prompts == "as-written" or (about := explains(asked.text)) is None:
            return asked
        kind, wrong = about
        text = "Explain why." if kind == "positive" else f"Explain why this answer is wrong: {wrong.rstrip('. ')}."
        if self.prompts != "bare":
            text += f" {_GUIDANCE}"
        if self.prompts == "guided-length":
            text += f" Use about {max(10, round(len(turns[place].text.split()), -1))} words."
        if self.prompts == "guided-type":
            text += f" {_BY_TYPE[kind_of(turns[0].text.replace(IMAGE, '').strip(), turns[1].text)]}"
        return dataclasses.replace(asked, text=f"{IMAGE}\n" * asked.text.count(IMAGE) + text)


def _explains(talk: Conversation) -> bool:
    """Whether a conversation has a rationale."""
    return talk.kind in ("positive", "negative") and len(talk.turns) > 2


def _markers(turns: Sequence[Turn]) -> int:
    return sum(turn.text.count(IMAGE) for turn in turns)


def _first(talk: Conversation) -> Conversation:
    """The first exchange."""
    turns = talk.turns[:2]
    return dataclasses.replace(talk, turns=turns, images=talk.images[: _markers(turns)])


def _scaled(turn: Turn, factor: float) -> Turn:
    return dataclasses.replace(turn, weight=turn.weight * factor)


def _joined(talks: Sequence[tuple[Conversation, bool]], first: str) -> list[tuple[Conversation, bool]]:
    """The n-th positive and the n-th negative rationale of an answer in one talk, in the place of the earlier one."""
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}
    for number, (talk, _) in enumerate(talks):
        if _explains(talk):
            said = (talk.turns[0].text, talk.turns[1].text)
            groups.setdefault(said, {"positive": [], "negative": []})[talk.kind].append(number)
    found: list[tuple[Conversation, bool] | None] = list(talks)
    for kinds in groups.values():
        for pair in zip(kinds["positive"], kinds["negative"], strict=False):
            one, other = (talks[number][0] for number in (pair if first == "positive" else pair[::-1]))
            turns, images = one.turns + other.turns[2:], one.images + other.images[_markers(other.turns[:2]) :]
            found[min(pair)] = dataclasses.replace(one, turns=turns, images=images), True
            found[max(pair)] = None
    return [talk for talk in found if talk is not None]

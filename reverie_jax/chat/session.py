"""A chat session about one picture: questions, answers, their rationales, and what a user prefers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
import uuid
from collections.abc import Generator, Sequence
from typing import Any

from reverie_jax.chat.model import ChatModel, Options
from reverie_jax.data.conversation import IMAGE, Conversation, Kind, Turn
from reverie_jax.data.reflection import WHY, WHY_WRONG
from reverie_jax.errors import UserError
from reverie_jax.serve.answers import Delta
from reverie_jax.serve.scheduler import Stopped


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question and its answers.

    Attributes:
        question: The user's text.
        answers: One of each model, as far as they are decoded.
        kind: `positive` or `negative` if the answers are rationales of the answer before; else empty.
        cut: Whether each answer ended before its end: it was stopped, or reached its maximum length.
        attempt: How often it was retried; each time is sampled with a seed of its own.
    """

    question: str
    answers: tuple[str, ...]
    kind: Kind = ""
    cut: tuple[bool, ...] = ()
    attempt: int = 0


_Events = queue.SimpleQueue[tuple[int, Delta | Exception] | None]


def _put(events: _Events, number: int, event: Delta | Exception) -> None:
    events.put((number, event))


class ChatSession:
    """A chat about one picture, or none, with one model or with several that get the same questions.

    Rationales are asked for as REVERIE trains them: right behind the answer that they explain, without other rationales
    between. A later question comes behind all that was said.

    Args:
        models: At least one.
        image: The encoded picture; empty for none.
        name: Whose the session is: what one session leaves on the devices is used and replaced by the next of the same name.
            A name of its own if omitted.
    """

    def __init__(self, models: Sequence[ChatModel], image: bytes = b"", name: str = ""):
        self.models, self.image, self.name = tuple(models), image, name or uuid.uuid4().hex
        self.exchanges: list[Exchange] = []
        self._events: _Events | None = None
        self._stopped = False

    def ask(self, question: str, options: Options, kind: Kind = "", attempt: int = 0) -> Generator[Exchange]:
        """Yield the exchange as its answers grow; the last one is whole, and all of them are `exchanges[-1]` in turn.

        A failed request leaves the session as it was. An iterator that is not read to its end stops the answers.

        Args:
            question: The user's text.
            options: How to decode.
            kind: Of the rationale that the question asks for.
            attempt: As for `Exchange`.

        Raises:
            UserError: The question is empty or too long, an answer is being decoded, or decoding failed.
            BrokenImage: The picture cannot be decoded.
        """
        if self._events is not None:
            raise UserError("an answer is being decoded; stop it first")
        if not question.strip():
            raise UserError("an empty question; type one")
        if IMAGE in question:
            raise UserError(f"the question has {IMAGE}, which stands for the picture; leave it out")
        options = dataclasses.replace(options, seed=(options.seed + attempt) % (1 << 32))
        exchange = Exchange(question.strip(), ("",) * len(self.models), kind, (True,) * len(self.models), attempt)
        requests = [
            model.request(self._conversation(number, exchange), self.image, options, self.name)
            for number, model in enumerate(self.models)
        ]
        events: _Events = queue.SimpleQueue()
        self._events, self._stopped = events, False
        self.exchanges.append(exchange)
        with contextlib.ExitStack() as stack:
            stack.callback(self._end, exchange)
            for number, (model, request) in enumerate(zip(self.models, requests, strict=True)):
                try:
                    ticket = model.scheduler.submit(request, functools.partial(_put, events, number))
                except Stopped as error:
                    raise UserError(f"{model.name}: {error}") from None
                stack.callback(ticket.cancel)
            unfinished = len(self.models)
            while unfinished and (event := events.get()) is not None and not self._stopped:
                number, delta = event
                if not isinstance(delta, Delta):
                    self.exchanges[-1] = exchange
                    raise UserError(f"{self.models[number].name}: {delta}")
                unfinished -= delta.finish is not None
                self._grow(number, delta)
                yield self.exchanges[-1]

    def _grow(self, number: int, delta: Delta) -> None:
        exchange = self.exchanges[-1]
        answers, cut = list(exchange.answers), list(exchange.cut)
        answers[number] += delta.text
        cut[number] = delta.finish != "stop"
        self.exchanges[-1] = dataclasses.replace(exchange, answers=tuple(answers), cut=tuple(cut))

    def _end(self, begun: Exchange) -> None:
        """Drop the exchange if nothing came of it."""
        self._events = None
        if self.exchanges[-1] == begun:
            self.exchanges.pop()

    def stop(self) -> None:
        """Stop the answers that are being decoded, from another thread; what there is of them remains."""
        self._stopped = True
        if (events := self._events) is not None:
            events.put(None)  # it may be waiting

    def explain(self, options: Options) -> Generator[Exchange]:
        """Ask why the last answer is right: for its positive rationale.

        Raises: as `ask`, and UserError if there is no answer yet.
        """
        self._explained()
        return self.ask(WHY, options, "positive")

    def why_not(self, answer: str, options: Options) -> Generator[Exchange]:
        """Ask why another answer than the last one is wrong: for its negative rationale.

        Raises: as `ask`, and UserError if there is no answer yet.
        """
        self._explained()
        if not answer.strip():
            raise UserError("the other answer is missing; type the answer that you expected")
        return self.ask(WHY_WRONG.format(answer=answer.strip()), options, "negative")

    def reflect(self, question: str, options: Options) -> Generator[Exchange]:
        """Ask a question, and then why the answer is right. Stopped answers are not explained.

        Raises: as `ask`.
        """
        exchange = None
        for exchange in self.ask(question, options):
            yield exchange
        if exchange is not None and not any(exchange.cut):
            yield from self.explain(options)

    def retry(self, options: Options) -> Generator[Exchange]:
        """Ask the last question again with the next seed; its answer is replaced, but comes back if decoding fails.

        Greedy decoding gives the same answer.

        Raises: as `ask`, and UserError if there is no question yet.
        """
        last = self._last()
        if self._events is not None:
            raise UserError("an answer is being decoded; stop it first")
        self.exchanges.pop()
        count = len(self.exchanges)
        try:
            yield from self.ask(last.question, options, last.kind, last.attempt + 1)
        finally:
            if len(self.exchanges) == count:
                self.exchanges.append(last)

    def correct(self, text: str, model: int = 0) -> dict[str, Any]:
        """Return the preference pair of a corrected answer (chosen) and the model's last one (rejected).

        Args:
            text: The whole corrected answer.
            model: Whose answer it is.

        Raises:
            UserError: There is no answer, or the pair cannot be used for training.
        """
        return self._pair(text, self._last().answers[model], model)

    def prefer(self, model: int) -> dict[str, Any]:
        """Return the preference pair of one model's last answer (chosen) and the other's (rejected).

        Raises:
            UserError: There are not two models, they were not asked the same, or the pair cannot be used for training.
        """
        answers = self._last().answers
        if len(answers) != 2:
            raise UserError("a preference needs two models side by side")
        contexts = [self._conversation(number, self.exchanges[-1]).turns for number in range(2)]
        if contexts[0] != contexts[1]:
            raise UserError(
                "the earlier answers differ, so these two answer different conversations; correct one of them, or ask in a"
                " new chat"
            )
        return self._pair(answers[model], answers[1 - model], model)

    def _pair(self, chosen: str, rejected: str, model: int) -> dict[str, Any]:
        chosen, rejected = chosen.strip(), rejected.strip()
        if not chosen or not rejected:
            raise UserError("an answer is empty; a preference pair needs two texts")
        if chosen == rejected:
            raise UserError("both answers are the same; there is nothing to prefer")
        if IMAGE in chosen + rejected:
            raise UserError(f"an answer has {IMAGE}, which stands for the picture; leave it out")
        if not self.image:
            raise UserError("no picture: preference pairs of this project are about one")
        *before, last = self._conversation(model, self.exchanges[-1]).turns
        if not before:
            question = last.text.removeprefix(f"{IMAGE}\n")
            return {"question": question, "chosen": chosen, "rejected": rejected}
        sides = {"chosen": chosen, "rejected": rejected}
        return {
            "prompt": [{"role": turn.role, "content": turn.text} for turn in (*before, last)],
            **{side: [{"role": "assistant", "content": text}] for side, text in sides.items()},
        }

    def _last(self) -> Exchange:
        if not self.exchanges:
            raise UserError("there is no answer yet; ask a question first")
        return self.exchanges[-1]

    def _explained(self) -> int:
        """Return the index of the answer that rationales are about."""
        self._last()
        return max(number for number, exchange in enumerate(self.exchanges) if not exchange.kind)

    def _conversation(self, model: int, last: Exchange) -> Conversation:
        """Return the open conversation that an exchange answers: the one at the end of the chat, or a new one."""
        before = [exchange for exchange in self.exchanges if exchange is not last]
        if last.kind:
            before = before[: self._explained() + 1]
        turns = [
            turn
            for exchange in before
            for turn in (Turn("user", exchange.question), Turn("assistant", exchange.answers[model]))
        ]
        turns.append(Turn("user", last.question))
        if self.image:
            turns[0] = Turn("user", f"{IMAGE}\n{turns[0].text}")
        return Conversation(tuple(turns), (0,) if self.image else ())

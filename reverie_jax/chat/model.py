"""A model as a chat session needs it: from a conversation and a picture to a request of the scheduler."""

from __future__ import annotations

import dataclasses
import hashlib
import math

from reverie_jax.data.conversation import Conversation
from reverie_jax.data.tree import unsupervised
from reverie_jax.errors import UserError
from reverie_jax.serve.chat import LEAST_TEMPERATURE
from reverie_jax.serve.scheduler import Request, Scheduler


@dataclasses.dataclass(frozen=True)
class Options:
    """How answers are decoded; the defaults are greedy, as in evaluation.

    Attributes:
        max_new_tokens: Maximum length of an answer.
        temperature: 0 decodes greedily.
        top_p: Nucleus threshold of sampling.
        seed: Of sampling.

    Raises:
        UserError: One is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed {self.seed}: must be from 0 to 4294967295")


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model with a name.

    Attributes:
        name: What users see.
        scheduler: Answers; others may use it at the same time.
    """

    name: str
    scheduler: Scheduler

    def request(self, conversation: Conversation, image: bytes, options: Options, session: str = "") -> Request:
        """Return the request for the answer to an open conversation.

        Args:
            conversation: Its first question shows the image, if there is one.
            image: The encoded picture; empty for none.
            options: How to decode; the answer is shorter where the context ends.
            session: Whose KV it uses and is kept for; see `Request`.

        Raises:
            BrokenImage: The picture cannot be decoded.
            UserError: The conversation does not fit the model's context.
        """
        engine = self.scheduler.engine
        processor = engine.processor
        pixels, tokens = processor.preprocess(image, "the picture"), processor.encoder(conversation)
        limit = min(processor.context, engine.shape.sequence_length)
        if (room := limit - len(tokens)) < 1:
            raise UserError(
                f"{self.name}: the conversation has {len(tokens)} tokens and the model's context {limit}; begin a new chat"
            )
        return Request(
            tokens=unsupervised(tokens),
            digest=hashlib.sha256(image).hexdigest() if image else "",
            image=pixels,
            longest=min(options.max_new_tokens, room),
            temperature=options.temperature * (options.temperature >= LEAST_TEMPERATURE),
            top_p=options.top_p,
            seed=options.seed,
            session=session,
        )

"""The queue of requests, and the thread that answers them in batches.

Waiting requests about one image become one tree, so that the image and all that their prompts have in common are prefilled
once. Several batches run by turns, a chunk of tokens each: a long answer does not keep a new request from starting.

Of a session, the KV of its last conversation may be kept: of a request that goes on with it, only what is new is prefilled.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from reverie_jax.data.packing import Batch, make_element, pack_sequence, stack
from reverie_jax.data.tokenization import Tokens
from reverie_jax.data.tree import Trie
from reverie_jax.eval import decode
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import EngineShape, roomy_batch
from reverie_jax.models.decoder import LayersKV
from reverie_jax.models.sharding import global_batch
from reverie_jax.serve.answers import AnswerText, Delta
from reverie_jax.serve.chunks import Chosen, Controls, Prefilled, advance, join, resume, start
from reverie_jax.serve.kept import Kept
from reverie_jax.serve.metrics import Metrics

RUNNING = 2
"""Batches that run by turns; each has the KV of its prompts and answers on the devices."""
GATHER_SECONDS = 0.005
"""How long an idle server waits for requests that come together with a first one."""

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """The server is shutting down, or a batch failed: the request gets no answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A request that is ready to be decoded.

    Attributes:
        tokens: Of the open conversation, without supervision.
        digest: Tells images apart; empty without an image.
        image: The preprocessed image; none if m = 0.
        n: Number of answers.
        longest: Maximum number of tokens of an answer.
        temperature, top_p, seed: See `Decoding`; answer k is drawn as that of question k.
        stops: Texts that end an answer.
        top: Alternatives to each token that are returned; None for no log-probabilities at all.
        session: Whose KV it uses and is kept for, if the scheduler keeps any; empty for nobody's.
    """

    tokens: Tokens
    digest: str
    image: UInt8[np.ndarray, "m S S 3"]
    n: int = 1
    longest: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    top: int | None = None
    session: str = ""


class Ticket:
    """A submitted request.

    Args:
        request: The request.
        on_event: Called in the scheduler's thread with each `Delta`, or with the exception that ends the request.
    """

    def __init__(self, request: Request, on_event: Callable[[Delta | Exception], None]):
        self.request, self.on_event, self.arrived = request, on_event, time.monotonic()
        self.cancelled = False

    def cancel(self) -> None:
        """Give the request up; its place is used for others from the next chunk on."""
        self.cancelled = True


class _Leaf:
    """One answer to one request."""

    def __init__(self, ticket: Ticket, index: int, engine: Engine):
        request = ticket.request
        self.ticket, self.request, self.index, self.started = ticket, request, index, False
        self.room = decode.room(request.longest)
        before = int(request.tokens.ids[-1])
        self.text = AnswerText(engine.encoder, before, request.longest, request.stops, request.top)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be decoded."""
        return self.ticket.cancelled or self.text.finish is not None

    def send(self, event: Delta | Exception) -> None:
        """Hand an event to the one who waits; who is gone cancels the request."""
        try:
            if not self.ticket.cancelled:
                self.ticket.on_event(event)
        except RuntimeError:  # the event loop is closed
            self.ticket.cancel()

    def fail(self, why: str) -> None:
        """End the whole request, once."""
        if not self.done:
            self.send(Stopped(why))
            self.ticket.cancel()


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Requests about one image, as one tree."""

    trie: Trie = dataclasses.field(default_factory=Trie)
    leaves: list[_Leaf] = dataclasses.field(default_factory=list)

    def add(self, leaf: _Leaf, limit: EngineShape) -> bool:
        """Add an answer if it fits."""
        more, _ = self.trie.cost(leaf.request.tokens)
        fits = len(self.leaves) < limit.questions and len(self.trie) + more <= limit.sequence_length
        if fits:
            self.trie.add(leaf.request.tokens)
            self.leaves.append(leaf)
        return fits


class Scheduler:
    """Answers requests with an engine's model, in a thread of its own.

    Args:
        engine: The model; its shape limits batches.
        metrics: Where to count.
        keep: Number of sessions whose last conversation's KV is kept on the devices: those that asked last. Only that of a
            request that is alone in its batch is; with one question and one sequence in the engine's shape, all are.
    """

    def __init__(self, engine: Engine, metrics: Metrics | None = None, *, keep: int = 0):
        self.engine, self.metrics, self._keep = engine, metrics or Metrics(), keep
        self._kept: dict[str, Kept] = {}
        self.batch_seconds = 1.0
        self._waiting: list[_Leaf] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="reverie-scheduler", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, request: Request, on_event: Callable[[Delta | Exception], None]) -> Ticket:
        """Queue a request; events come as described at `Ticket`, each answer's last one with `Delta.finish`.

        Raises:
            Stopped: The scheduler was closed.
            ValueError: The prompt is longer than a sequence.
        """
        if len(request.tokens) > (longest := self.engine.shape.sequence_length):
            raise ValueError(f"a prompt of {len(request.tokens)} tokens; sequences have {longest}")
        ticket = Ticket(request, on_event)
        leaves = [_Leaf(ticket, index, self.engine) for index in range(request.n)]
        with self._changed:
            if self._closed:
                raise Stopped("the server is shutting down")
            self._waiting += leaves
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()
        self.metrics.prompt_tokens.inc(len(request.tokens))
        return ticket

    def retry_after(self) -> int:
        """Return the seconds after which a refused request may find room."""
        return max(1, min(60, math.ceil(self.batch_seconds)))

    def close(self) -> None:
        """Stop the thread; requests that are not answered yet get `Stopped`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        running: collections.deque[tuple[list[_Leaf], Iterator[None]]] = collections.deque()
        try:
            with jax.set_mesh(self.engine.mesh):
                while not self._closed:
                    if not running:
                        self._wait()
                    if len(running) < RUNNING and (sequences := self._take()):
                        leaves = [leaf for sequence in sequences for leaf in sequence.leaves]
                        running.append((leaves, self._answer(sequences)))
                    if running:
                        leaves, batch = running.popleft()
                        with self._failing(leaves):
                            next(batch)
                            running.append((leaves, batch))
        finally:
            with self._changed:
                self._closed = True
            for leaf in [*(leaf for leaves, _ in running for leaf in leaves), *self._waiting]:
                leaf.fail("the server is shutting down")

    def _wait(self) -> None:
        with self._changed:
            if not self._waiting and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._changed.wait_for(lambda: self._closed, timeout=GATHER_SECONDS)

    @contextlib.contextmanager
    def _failing(self, leaves: Sequence[_Leaf]) -> Iterator[None]:
        """Let a batch that fails end its own requests, and nothing else."""
        try:
            yield
        except StopIteration:
            pass
        except Exception as error:
            _log.exception("a batch of %d answers failed", len(leaves))
            for leaf in leaves:
                leaf.fail(f"the batch failed ({type(error).__name__}); see the server's log")

    def _take(self) -> list[_Sequence]:
        """Take waiting answers for a batch: the first one, and what goes with it."""
        with self._changed:
            waiting = [leaf for leaf in self._waiting if not leaf.done]
        sequences: dict[str, _Sequence] = {}
        taken: set[_Leaf] = set()
        if waiting:
            room = waiting[0].room
            limit = self.engine.limits(Decoding(room))
            for leaf in waiting:
                digest = leaf.request.digest
                # Longer answers would take the room of their KV for all.
                suits = leaf.room == room and (digest in sequences or len(sequences) < limit.batch_size)
                if suits and sequences.setdefault(digest, _Sequence()).add(leaf, limit):
                    taken.add(leaf)
        with self._changed:
            self._waiting = [leaf for leaf in self._waiting if leaf not in taken and not leaf.done]
            self.metrics.waiting.set(len(self._waiting))
        return list(sequences.values())

    def _batch(self, sequences: Sequence[_Sequence]) -> tuple[Batch, list[list[_Leaf | None]]]:
        """Return a batch on the devices, and which answer each of its leaves is."""
        engine, patches = self.engine, self.engine.encoder.patches
        elements = []
        for sequence in sequences:
            tree = sequence.trie.tree()
            numbers = [leaf.index for leaf in sequence.leaves]
            elements.append(make_element(tree, sequence.leaves[0].request.image, numbers))
            self.metrics.prefilled_tokens.inc(len(tree))
        shape, batch_size = roomy_batch(
            max(len(element["tokens"]) for element in elements),
            max(len(sequence.leaves) for sequence in sequences),
            len(sequences),
            patches if any(sequence.leaves[0].request.digest for sequence in sequences) else 0,
            engine.limits(Decoding(sequences[0].leaves[0].room)),
            engine.data_parallel,
        )
        batch = stack([pack_sequence([element], shape, patches) for element in elements], batch_size)
        places = [[*sequence.leaves, *[None] * (shape.questions - len(sequence.leaves))] for sequence in sequences]
        places += [[None] * shape.questions] * (batch_size - len(sequences))
        return global_batch(batch, engine.mesh, batch_size), places

    def _begin(
        self, sequences: Sequence[_Sequence]
    ) -> tuple[list[list[_Leaf | None]], Controls, tuple[Chosen, Prefilled, LayersKV]]:
        """Prefill a batch; return which answer each of its leaves is, how they are decoded, and the result of `start`."""
        engine, first = self.engine, sequences[0].leaves[0]
        how: Any = {"stops": engine.encoder.stop_ids, "room": first.room}
        # While it is used, it is not kept: the last request to end decides, and what fails leaves nothing behind.
        kept = self._kept.pop(first.request.session, None) if _is_alone(sequences) else None
        tokens, limit = first.request.tokens, engine.shape.sequence_length
        if kept is None or not (pieces := kept.pieces(first.request.digest, tokens, limit)):
            del kept  # its memory is free for the batch
            batch, places = self._batch(sequences)
            controls = _controls(places)
            return places, controls, start(engine.graph, engine.state, batch, controls, **how)
        end, last, size = len(tokens), *pieces[-1]
        patches = engine.encoder.patches if first.request.digest else 0
        shape, _ = roomy_batch(last + size, 1, 1, patches, engine.shape)
        length = max(shape.length, jax.tree.leaves(kept.prefix)[0].shape[-3])
        prefix = join(kept.prefix, kept.suffix, np.int32(len(kept.prompt)), length=length)
        del kept
        places = [[first]]
        controls, numbers = _controls(places), np.full((1, 1), first.index, np.int32)
        for begin, size in pieces:
            ids = np.zeros((1, size), np.int32)
            own = tokens.ids[begin : begin + size]
            ids[0, : len(own)] = own
            self.metrics.prefilled_tokens.inc(len(own))
            begun = resume(
                *(engine.graph, engine.state, prefix, ids, np.int32(begin), np.int32(end), numbers, controls), **how
            )
            prefix = begun[1].prefix
        return places, controls, begun

    def _keep_conversation(self, leaf: _Leaf, answer: Sequence[Any], prefilled: Prefilled, suffix: LayersKV) -> None:
        """Keep the KV of a request and its answer, of which the last token has none yet."""
        request, ids = leaf.request, np.concatenate(answer)[:-1]
        self._kept.pop(request.session, None)
        self._kept[request.session] = Kept(request.digest, request.tokens, ids, prefilled.prefix, suffix)
        while len(self._kept) > self._keep:
            del self._kept[next(iter(self._kept))]

    def _answer(self, sequences: Sequence[_Sequence]) -> Iterator[None]:
        """Decode a batch; yields after each chunk."""
        began, engine = time.monotonic(), self.engine
        model, stops = (engine.graph, engine.state), engine.encoder.stop_ids
        places, controls, (chosen, prefilled, suffix) = self._begin(sequences)
        self.metrics.batch_answers.observe(sum(leaf is not None for row in places for leaf in row))
        chosen = jax.tree.map(lambda x: np.asarray(x)[:, :, None], chosen)
        self._deliver(places, chosen)
        done, answer = 1, [chosen.token[0, 0]]  # of the first leaf, to be kept
        while not all(leaf is None or leaf.done for row in places for leaf in row):
            yield
            ended = np.asarray([[leaf is None or leaf.done for leaf in row] for row in places])
            decoded, suffix, count = advance(
                *(*model, prefilled, suffix, controls, chosen.token[:, :, -1], ended, np.int32(done)), stops=stops
            )
            if not (new := int(count)):  # all were given up meanwhile
                break
            chosen = jax.tree.map(lambda x, new=new: np.asarray(x)[:, :, :new], decoded)
            self._deliver(places, chosen)
            done += new
            answer.append(chosen.token[0, 0])
        self.batch_seconds = time.monotonic() - began
        if self._keep and _is_alone(sequences) and jax.tree.leaves(suffix)[0].shape[-5] == 1:
            self._keep_conversation(sequences[0].leaves[0], answer, prefilled, suffix)

    def _deliver(self, places: Sequence[Sequence[_Leaf | None]], chosen: Any) -> None:
        now = time.monotonic()
        for b, row in enumerate(places):
            for q, leaf in enumerate(row):
                if leaf is None or leaf.done:
                    continue
                delta = leaf.text.add(leaf.index, Chosen(*(field[b, q] for field in chosen)))
                if not leaf.started:
                    leaf.started = True
                    self.metrics.first_token.observe(now - leaf.ticket.arrived)
                if delta.finish:
                    self.metrics.completion_tokens.inc(delta.count)
                    self.metrics.answer.observe(now - leaf.ticket.arrived)
                leaf.send(delta)


def _is_alone(sequences: Sequence[_Sequence]) -> bool:
    """Return whether a batch is one request of a session."""
    return len(sequences) == len(sequences[0].leaves) == 1 and bool(sequences[0].leaves[0].request.session)


def _controls(places: Sequence[Sequence[_Leaf | None]]) -> Controls:
    def field(name: str, empty: float, dtype: Any) -> Any:
        return np.asarray(
            [[empty if leaf is None else getattr(leaf.request, name) for leaf in row] for row in places], dtype
        )

    scored = any(leaf is not None and leaf.request.top is not None for row in places for leaf in row)
    return Controls(
        field("temperature", 0, np.float32),
        field("top_p", 1, np.float32),
        field("seed", 0, np.uint32),
        field("longest", 1, np.int32),
        np.asarray(scored),
    )

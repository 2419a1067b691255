"""The options of `reverie annotate`; light, for they are read at every start of the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes, Positional


@dataclasses.dataclass(frozen=True)
class ProviderOptions:
    """How hosted models are asked."""

    structured: bool = True
    """Ask for JSON by schema; --no-structured for servers that cannot."""
    temperature: float | None = None
    """The provider's own by default."""
    timeout: float = 120.0
    """Seconds that one reply may take."""
    concurrency: int = 16
    """Requests in flight."""
    requests_per_minute: float | None = None
    """Not faster than this."""
    tokens_per_minute: float | None = None
    """Not faster than this."""
    price: tuple[float, float] = (0.0, 0.0)
    """Of a million tokens, in and out, in your currency."""
    max_cost: float | None = None
    """Stop before the price of all attempts in the journal, earlier runs included, exceeds this."""
    max_tokens: int | None = None
    """The same in tokens."""
    batch: bool = False
    """Hand requests over as batches (gemini, openai): half the price, results within a day. Run again to collect them."""
    poll: float = 30.0
    """With --batch: seconds between two looks at the batches under way."""


@dataclasses.dataclass(frozen=True)
class Annotate:
    """Ask a model for questions about pictures, right and confusing answers and rationales; judge them; write reverie.json.

    Every reply is kept in OUT/journal.sqlite as it comes: run again after any interruption, and nothing that was answered
    is asked (or paid for) again. A folder of REVERIE's own scripts is picked up where it stands. Keys are taken from
    GEMINI_API_KEY (or GOOGLE_API_KEY) and OPENAI_API_KEY.
    """

    step: Positional[str]
    """run, or one of its steps: questions, rationales, judge, export. audit: a page of judged rows to look through.
    lrv: LRV-Instruction's positive and misleading instructions, from captions alone."""
    out: Path
    """Folder for the stages' files, the journal and reverie.json."""
    pictures: Path | None = None
    """Folder of pictures."""
    list: Path | None = None
    """JSON list of picture names; all pictures of the folder by default. OUT/image_list.json is used if it is there."""
    model: str = ""
    """Who writes: gemini:MODEL, openai:MODEL, google-generativeai:MODEL, scenes:FOLDER, replay:JOURNAL. For a server of
    another address (vLLM, SGLang, a proxy): openai:MODEL@http://host:8000/v1."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Who judges; give it once for each. The writer by default."""
    votes: str = "majority"
    """A row is dropped if a contradiction is found by a majority of judges (a tie drops), by any, or by all."""
    judge_sees_picture: bool = False
    """Show the picture to the judges too."""
    questions: int = 3
    """Questions a picture."""
    confusing: int = 1
    """Wrong answers a question."""
    prompts: Path | None = None
    """Folder with prompts of your own: questions.txt, positive.txt, negative.txt, judge.txt; ours where one is missing."""
    hosted: OmitArgPrefixes[ProviderOptions] = ProviderOptions()
    captions: Path | None = None
    """For lrv: Visual Genome's region_descriptions.json, or [{image_id, captions: [{caption, x, y, width, height}]}]."""
    counts: tuple[int, int, int, int] = (20, 6, 6, 0)
    """For lrv, instructions a picture: positive, about things that are not there, with wrong attributes, with false
    knowledge."""
    balance: float | None = None
    """For lrv: misleading instructions kept for each positive one; all by default."""
    dry_run: bool = False
    """Say how many requests, tokens and how much money it would take; ask nothing."""
    sample: int = 50
    """Rows in the audit page."""

    def run(self) -> None:
        from reverie_jax.cli import annotate

        raise SystemExit(annotate.annotate(self))

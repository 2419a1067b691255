"""The options of `reverie eval`, `score`, `judge` and `report`; light, for they are read at every start of the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from reverie_jax.cli.annotate_options import ProviderOptions

Name = Annotated[Positional[str], tyro.conf.arg(metavar="BENCHMARK")]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Ask a model a benchmark's questions, and score its answers by the benchmark's own rule.

    All questions about a picture share its prefix. Answers are written as they come: run again after any interruption. Rules
    that need a judge are scored by `reverie judge` and `reverie score` afterwards.
    """

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Checkpoint: a folder or hub id of any format that `reverie convert` reads; parts separated by commas."""
    benchmark: str
    """Names, separated by commas: pope, mmbench, scienceqa, …; a wrong one lists them all."""
    data: Path
    """Folder of the benchmark's official files; with several benchmarks, a folder of folders by their names."""
    out: Path
    """Folder for predictions.jsonl and scores.json; with several benchmarks, of folders by their names."""
    adapter: str | None = None
    """Run folder of `reverie train`, PEFT adapter or LLaVA LoRA folder, to go on top of the model."""
    images: Path | None = None
    """Folder of the pictures, where they are not with the data."""
    rule: str | None = None
    """Rule to score by: the benchmark's own by default; lmms-eval, vlmevalkit and others where a benchmark has them."""
    template: str | None = None
    """Conversation template; the checkpoint's own by default."""
    mesh: str = "data=1,fsdp=1,tensor=1"
    """Devices by axis."""
    distributed: str = ""
    """One of several processes: `auto`, or address:port,processes,number, as `reverie train`."""
    dtype: str = "float32"
    """Of the matrices and of the computation: float32 or bfloat16."""
    rows: int = 16
    """Pictures in a batch."""
    leaves: int = 32
    """Most questions that decode together from one picture."""
    row_tokens: int = 4096
    """Longest row; a picture's questions that do not fit take several."""
    new_tokens: int | None = None
    """Longest answer, where it is to be shorter than the benchmark's protocol has it."""
    beams: int | None = None
    """Beam search with so many beams; by the benchmark's protocol by default: 3 for Object HalBench, 1 (none) for others."""
    temperature: float = 0.0
    """Draw answers; greedy by default."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share."""
    seed: int = 0
    """Of draws and of the noise."""
    against: str = ""
    """Contrast the scores, against hallucination: `image` with those of the picture under noise (visual contrastive
    decoding), `instruction` with those behind a disturbing instruction (instruction contrastive decoding)."""
    alpha: float = 1.0
    """Strength of the contrast."""
    beta: float = 0.1
    """Tokens less likely than this share of the likeliest stay out of it."""
    noise: int = 500
    """How much noise the picture is put under, 0 to 999."""
    reflect: bool = False
    """Answer, then write why, then answer again: the second answer is scored, both are kept."""
    limit: int | None = None
    """Ask only so many questions, the first ones; nothing is scored."""
    dump_prompts: Path | None = None
    """Write every prompt to this file, and ask nothing."""

    def run(self) -> None:
        from reverie_jax.cli import evaluate

        evaluate.evaluate(self)


@dataclasses.dataclass(frozen=True)
class Score:
    """Score an answer file, ours or LLaVA's or the benchmark's own: no model, no network.

    Answers are joined by id. A missing, repeated or unknown id, a broken line, or another version of the questions is an
    error.
    """

    benchmark: Name
    """Its name; a wrong one lists them all."""
    predictions: Path
    """Answer file: JSON lines with question_id and text, or the benchmark's own form."""
    annotations: Path
    """Folder (or file) of the benchmark's official files."""
    rule: str | None = None
    """The benchmark's own by default; `all` for every rule that needs no judge, and how they agree."""
    replies: Path | None = None
    """A judge's replies, as `reverie judge` wrote them."""
    partial: bool = False
    """Questions may lack an answer: they count as the rule says."""
    against: Path | None = None
    """A second answer file to the same questions: differences, each with its interval, and McNemar's test."""
    against_replies: Path | None = None
    """The judge's replies to those."""
    out: Path | None = None
    """Folder for scores.json, as `reverie eval` writes it: that of the answers, for `reverie report`."""
    json: bool = False
    """One JSON object on stdout, and nothing else."""
    items: Path | None = None
    """Write every question's answer, and what the rule took it for, to this file."""
    export: Path | None = None
    """Write what the benchmark's server or own script takes into this folder."""

    def run(self) -> None:
        from reverie_jax.cli import evaluate

        evaluate.score(self)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Ask a model to judge a benchmark's answers, and keep what it says in OUT/replies.jsonl, which `reverie score` reads.

    Every reply is kept in OUT/journal.sqlite as it comes: nothing that was paid for is asked again. Keys are taken from
    GEMINI_API_KEY (or GOOGLE_API_KEY) and OPENAI_API_KEY. The prompts are in our own words unless --prompts names others, so
    scores stand beside published ones with that difference. The temperature is the benchmark's by default (0, or 0.2).
    """

    benchmark: Name
    """Its name; a wrong one lists them all."""
    predictions: Path
    """Answer file."""
    annotations: Path
    """Folder (or file) of the benchmark's official files."""
    out: Path
    """Folder for replies.jsonl and the journal."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Who judges: openai:MODEL, gemini:MODEL, or local:CHECKPOINT for one of ours; give it once for each."""
    rule: str | None = None
    """Rule that is to be scored; the benchmark's first that needs a judge by default."""
    prompts: Path | None = None
    """Folder with prompts of your own, by the names of ours (reverie_jax/eval/prompts)."""
    images: bool = True
    """Show the picture to the judge where the benchmark does."""
    longest: int = 1024
    """Tokens of a reply."""
    runs: int = 1
    """Times that the judge is asked about each answer, for MM-Vet (published figures are means of five)."""
    dry_run: bool = False
    """Say how many requests, tokens and how much money it would take; ask nothing."""
    hosted: OmitArgPrefixes[ProviderOptions] = dataclasses.field(default_factory=ProviderOptions)

    def run(self) -> None:
        from reverie_jax.cli import evaluate

        raise SystemExit(evaluate.judge(self))


@dataclasses.dataclass(frozen=True)
class Report:
    """One HTML page from folders of `reverie eval`: scores with intervals beside published ones, plots, answers shown."""

    runs: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=]FOLDER …")]
    """Output folders of `reverie eval` (of one benchmark or several); the first is what the others are compared with."""
    out: Path
    """The page, report.html."""
    data: Path | None = None
    """The benchmarks' files, as `reverie eval` had them, for pictures and paired tests."""
    images: Path | None = None
    """Folder of the pictures, where they are not with the data."""
    shown: int = 6
    """Pictures in each gallery."""

    def run(self) -> None:
        from reverie_jax.cli import evaluate

        evaluate.report(self)

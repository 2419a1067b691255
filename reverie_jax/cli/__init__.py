"""The `reverie` command. Each command has a file with its options and its body; its imports are made when it runs."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, Positional, subcommand

import reverie_jax
from reverie_jax.cli import train
from reverie_jax.cli.annotate import Annotate
from reverie_jax.cli.ask import Ask
from reverie_jax.cli.chat import Chat
from reverie_jax.cli.compare import Compare
from reverie_jax.cli.convert import Convert
from reverie_jax.cli.data import Data
from reverie_jax.cli.demo import Demo
from reverie_jax.cli.env import Env
from reverie_jax.cli.evaluate import Eval
from reverie_jax.cli.judge import Judge
from reverie_jax.cli.plan import Plan
from reverie_jax.cli.programs import use_cache
from reverie_jax.cli.push import Push
from reverie_jax.cli.recipes import Benchmarks, Recipes
from reverie_jax.cli.report import Report
from reverie_jax.cli.scenes import Scenes
from reverie_jax.cli.score import Score
from reverie_jax.cli.serve import Serve
from reverie_jax.cli.train import Train
from reverie_jax.errors import UserError

_OPTIONS: dict[str, Any] = {"prog": "reverie", "config": (OmitSubcommandPrefixes, FlagCreatePairsOff)}


@dataclasses.dataclass(frozen=True)
class Completion:
    """Print a script that completes commands and options in a shell."""

    shell: Positional[Literal["bash", "zsh"]]
    """bash or zsh."""

    def run(self) -> None:
        """Run the command."""
        tyro.cli(Command, args=["--tyro-print-completion", self.shell], **_OPTIONS)


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Annotate, subcommand("annotate")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Benchmarks, subcommand("benchmarks")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Judge, subcommand("judge")]
    | Annotated[Score, subcommand("score")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Ask, subcommand("ask")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Push, subcommand("push")]
    | Annotated[Scenes, subcommand("scenes")]
    | Annotated[Env, subcommand("env")]
    | Annotated[Completion, subcommand("completion")]
)


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: 2 after a `UserError`, which is one line on stderr; 130 after Ctrl-C; 141 if stdout was closed.
    """
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _run() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"reverie-jax {reverie_jax.__version__}")
        return
    # transformers otherwise reports at every start that torch is missing; it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    use_cache()
    logging.basicConfig(level=logging.WARNING, format="reverie: %(message)s")
    logging.getLogger("reverie_jax").setLevel(logging.INFO)
    try:
        command = tyro.cli(
            Command,
            description="Reflective instruction tuning of vision-language models: train on why, measure hallucination.",
            **_OPTIONS,
        )
    finally:
        if sys.argv[1:2] == ["train"] and {"-h", "--help"} & set(sys.argv):
            print(train.field_help())
    try:
        command.run()
    except UserError as error:
        code = getattr(error, "exit_code", 2)
        kind = "" if code == 130 else "error: "  # Ctrl-C is the user's own wish
        print(f"reverie: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(code) from None
    except KeyboardInterrupt:
        print("reverie: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None

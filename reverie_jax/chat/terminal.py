"""Chat in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from reverie_jax.chat.difference import mark_differences
from reverie_jax.chat.feedback import FeedbackFolder
from reverie_jax.chat.model import ChatModel, Options
from reverie_jax.chat.session import ChatSession, Exchange
from reverie_jax.data.processor import ask
from reverie_jax.errors import UserError


class Terminal:
    """Reads questions and commands, and prints answers; of two models' answers, words that the other lacks are marked.

    Args:
        models: One, or two side by side.
        options: How to decode, until `/set`.
        feedback: Where preference pairs go.
        image: File of the first picture; None for none.
        console: Where to print; stdout by default.
    """

    def __init__(
        self,
        models: Sequence[ChatModel],
        options: Options,
        feedback: FeedbackFolder,
        image: Path | None = None,
        console: Console | None = None,
    ):
        self.models, self.options, self.feedback = models, options, feedback
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.session = ChatSession(models)
        if image is not None:
            self._image(str(image))
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "image": ("FILE", "begin a new chat about this picture", self._image),
            "new": ("", "begin a new chat about the same picture", self._new),
            "explain": (
                "",
                "ask why the last answer is right",
                lambda _: self._show(self.session.explain(self.options)),
            ),
            "why-not": ("ANSWER", "ask why this answer is wrong", self._why_not),
            "reflect": ("QUESTION", "ask, and then why the answer is right", self._reflect),
            "retry": ("", "answer the last question again", lambda _: self._show(self.session.retry(self.options))),
            "set": ("NAME=VALUE ...", "decode with other options", self._set),
            "correct": ("TEXT", "keep TEXT and the last answer as a preference pair", self._correct),
            "better": ("1|2", "keep which of two answers is better, as a preference pair", self._better),
            "help": ("", "list the commands", lambda _: self._help()),
            "quit": ("", "end; so does Ctrl-D", self._quit),
        }
        if len(models) == 2:
            self.commands["correct"] = ("1|2 TEXT", "correct the answer of a model", self._correct)

    def run(self) -> None:
        """Read lines until they end, or `/quit`. Ctrl-C stops an answer."""
        names = " | ".join(model.name for model in self.models)
        self._print(f"{names}: type a question, or /help. Ctrl-C stops an answer, Ctrl-D ends.", "dim")
        while True:
            try:
                line = self.console.input("> ").strip()
                if line:
                    self._do(line)
            except EOFError:
                self._print("")
                return
            except UserError as error:
                self._print(str(error), "red")

    def _do(self, line: str) -> None:
        if not line.startswith("/"):
            self._show(self.session.ask(line, self.options))
            return
        name, _, text = line[1:].partition(" ")
        if name not in self.commands:
            raise UserError(f"/{name}: no such command; /help lists them")
        arguments, _, run = self.commands[name]
        if bool(arguments) != bool(text.strip()):
            raise UserError(f"usage: /{name} {arguments}".rstrip())
        run(text.strip())

    def _print(self, text: str | Text, style: str = "", end: str = "\n") -> None:
        # Never as markup: models and users write brackets.
        self.console.print(Text(text, style) if isinstance(text, str) else text, end=end)

    def _show(self, exchanges: Generator[Exchange]) -> None:
        """Print the answers of exchanges as they come; two models' when they are whole."""
        with contextlib.closing(exchanges), contextlib.suppress(KeyboardInterrupt):
            for _, states in itertools.groupby(exchanges, key=lambda exchange: exchange.kind):
                shown = ""
                for exchange in states:
                    if len(self.models) == 1:
                        self._print(exchange.answers[0].removeprefix(shown), end="")
                        shown = exchange.answers[0]
                if len(self.models) == 2:
                    self._show_both(exchange)
                self._print(" […]" if any(exchange.cut) and len(self.models) == 1 else "")
            return
        self._print(" (stopped)", "dim")

    def _show_both(self, exchange: Exchange) -> None:
        for number, side in enumerate(mark_differences(*exchange.answers)):
            marked = Text.assemble(*((text, "reverse" if differs else "") for text, differs in side))
            self._print(Text.assemble((f"{number + 1} {self.models[number].name}: ", "bold"), marked))

    def _image(self, name: str) -> None:
        image = ask(name, "?").image
        for model in self.models:
            model.scheduler.engine.processor.preprocess(image, name)
        self.session = ChatSession(self.models, image, self.session.name)

    def _new(self, _: str) -> None:
        self.session = ChatSession(self.models, self.session.image, self.session.name)

    def _why_not(self, answer: str) -> None:
        self._show(self.session.why_not(answer, self.options))

    def _reflect(self, question: str) -> None:
        self._show(self.session.reflect(question, self.options))

    def _set(self, text: str) -> None:
        changes = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name not in (names := [field.name for field in dataclasses.fields(Options)]):
                raise UserError(f"{name}: no such option; the options are {', '.join(names)}")
            try:
                changes[name] = type(getattr(self.options, name))(value)
            except ValueError:
                raise UserError(f"{part}: not a number") from None
        self.options = dataclasses.replace(self.options, **changes)
        self._print(", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self.options).items()), "dim")

    def _number(self, text: str) -> int:
        if text not in ("1", "2"):
            raise UserError(f"{text}: must be 1 or 2, the number of a model")
        return int(text) - 1

    def _correct(self, text: str) -> None:
        number = 0
        if len(self.models) == 2:
            which, _, text = text.partition(" ")
            number = self._number(which)
        self._keep(self.session.correct(text, number))

    def _better(self, text: str) -> None:
        self._keep(self.session.prefer(self._number(text)))

    def _keep(self, pair: dict[str, object]) -> None:
        self.feedback.add(pair, self.session.image)
        self._print(f"added to {self.feedback.path}", "dim")

    def _help(self) -> None:
        for name, (arguments, about, _) in self.commands.items():
            self._print(f"{f'/{name} {arguments}':24} {about}")

    def _quit(self, _: str) -> None:
        raise EOFError

"""Chat on a page, with gradio."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import fastapi
import gradio

from reverie_jax.chat.difference import mark_differences
from reverie_jax.chat.feedback import FeedbackFolder
from reverie_jax.chat.model import ChatModel, Options
from reverie_jax.chat.session import ChatSession, Exchange
from reverie_jax.errors import UserError

MAX_FILE_BYTES = 20 << 20
_KEPT_SECONDS = 3600
"""How long uploaded pictures are kept."""
_CSS = """
footer {display: none !important}
.answers-differ mark {background: #ffe08a; color: #000; border-bottom: 2px solid #b45309; padding: 0 .1em}
.answers-differ p, .status p {margin: .3em 0}
#picture img {object-fit: contain; max-height: 100%}
#picture .image-frame {padding-top: 2.2rem} /* below the label, which lies upon it */
[data-testid=user] .md, [data-testid=bot] .md {white-space: pre-wrap}
"""

Updates = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class ExamplePicture:
    """A picture to begin with: its file, and what it shows in a few words."""

    file: Path
    label: str


class Page:
    """The page: its components, and the session of each browser window that shows it.

    Args:
        models: One, or two side by side.
        options: Defaults of the decoding options.
        feedback: Where preference pairs go.
        examples: Pictures to begin with.
    """

    def __init__(
        self,
        models: Sequence[ChatModel],
        options: Options,
        feedback: FeedbackFolder,
        examples: Sequence[ExamplePicture] = (),
    ):
        self.models, self.options, self.feedback, self.examples = tuple(models), options, feedback, examples
        self.sessions: dict[str, ChatSession] = {}
        self.title = " | ".join(model.name for model in models)
        with gradio.Blocks(
            analytics_enabled=False, title=f"{self.title} - reverie", delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
        ) as self.blocks:
            gradio.Markdown(f"# {html.escape(self.title)}")
            with gradio.Row():
                with gradio.Column(scale=1, min_width=260):
                    self._picture_and_options()
                with gradio.Column(scale=3, min_width=320):
                    self._answers()
                    self._questions()
                    self._feedback()
            self._connect()
            self.blocks.unload(self._forget)

    def app(self, key: str = "") -> fastapi.FastAPI:
        """Return the ASGI application.

        Args:
            key: Password of the user `reverie`; empty for none.
        """
        return gradio.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None),
            self.blocks,
            path="/",
            auth=("reverie", key) if key else None,
            footer_links=[],
            max_file_size=MAX_FILE_BYTES,
            ssr_mode=False,
            theme=gradio.themes.Default(
                font=[gradio.themes.Font("system-ui"), gradio.themes.Font("sans-serif")],
                font_mono=[gradio.themes.Font("ui-monospace"), gradio.themes.Font("monospace")],
            ),
            css=_CSS,
            # Screen readers say what happens; the element must have been there before.
            js="() => document.getElementById('status')?.setAttribute('aria-live', 'polite')",
        )

    def _picture_and_options(self) -> None:
        self.picture = gradio.Image(
            label="Picture: drop, paste, upload or take one",
            type="filepath",
            image_mode=None,  # the file itself
            sources=["upload", "clipboard", "webcam"],
            buttons=[],
            height=320,
            alt_text="The picture of this chat",
            elem_id="picture",
        )
        if self.examples:
            gradio.Examples(
                [[str(example.file)] for example in self.examples],
                self.picture,
                label="Examples",
                example_labels=[example.label for example in self.examples],
            )
        with gradio.Accordion("Decoding", open=False):
            longest = self.options.max_new_tokens
            new = gradio.Slider(1, max(1024, longest), longest, step=1, label="Maximum length, in tokens")
            temperature = gradio.Slider(
                0, 2, self.options.temperature, step=0.05, label="Temperature", info="0 is greedy, as in evaluation."
            )
            top_p = gradio.Slider(0.05, 1, self.options.top_p, step=0.05, label="Top-p")
            seed = gradio.Number(self.options.seed, precision=0, minimum=0, label="Seed", info="Retries take the next.")
        self.decoding = [new, temperature, top_p, seed]

    def _answers(self) -> None:
        with gradio.Row():
            self.chats = [
                gradio.Chatbot(
                    label=model.name,
                    min_width=300,
                    height="48vh",
                    render_markdown=False,  # the content is HTML then
                    latex_delimiters=[],
                    buttons=[],
                    elem_id=f"chat-{number + 1}",
                    placeholder="Choose a picture and ask about it.",
                )
                for number, model in enumerate(self.models)
            ]
        self.difference = gradio.HTML(elem_classes="answers-differ", visible=len(self.models) == 2)
        self.status = gradio.HTML(elem_classes="status", elem_id="status")

    def _questions(self) -> None:
        self.question = gradio.Textbox(
            label="Question",
            placeholder="What is in the picture?",
            autofocus=True,
            submit_btn=False,
            elem_id="question",
        )
        with gradio.Row():
            self.ask = gradio.Button("Ask", variant="primary", min_width=90)
            self.reflect = gradio.Button("Ask, then explain", min_width=180)
            self.explain = gradio.Button("Explain", min_width=90)
            self.retry = gradio.Button("Retry", min_width=80)
            self.stop = gradio.Button("Stop", variant="stop", min_width=80)
            self.new = gradio.Button("New chat", min_width=90)
        with gradio.Row(equal_height=False):
            self.other = gradio.Textbox(label="Why not …? The answer that you expected", scale=4, min_width=220)
            self.why_not = gradio.Button("Why not?", scale=1, min_width=90)

    def _feedback(self) -> None:
        with gradio.Accordion("Feedback on the last answer", open=False):
            two = len(self.models) == 2
            names = [(model.name, number) for number, model in enumerate(self.models)]
            self.whose = gradio.Radio(names, value=0, label="Whose answer", visible=two)
            self.corrected = gradio.Textbox(label="Corrected answer", lines=2, elem_id="corrected")
            with gradio.Row():
                self.correct = gradio.Button("Keep the correction", min_width=140)
                self.better = [
                    gradio.Button(f"{side} is better", visible=two, min_width=110) for side in ("Left", "Right")
                ]

    def _connect(self) -> None:
        inputs = [self.picture, self.question, self.other, *self.decoding]
        outputs = [*self.chats, self.difference, self.status, self.question, self.other, self.whose, self.corrected]

        def on(trigger: Any, function: Any, inputs: Any = None, outputs: Any = None, **options: Any) -> None:
            trigger(function, inputs, outputs, api_visibility="private", show_progress="hidden", **options)

        asked: list[tuple[Any, Callable[[ChatSession, str, str, Options], Generator[Exchange]]]] = [
            (self.ask.click, lambda session, question, other, options: session.ask(question, options)),
            (self.question.submit, lambda session, question, other, options: session.ask(question, options)),
            (self.reflect.click, lambda session, question, other, options: session.reflect(question, options)),
            (self.explain.click, lambda session, question, other, options: session.explain(options)),
            (self.retry.click, lambda session, question, other, options: session.retry(options)),
            (self.why_not.click, lambda session, question, other, options: session.why_not(other, options)),
            (self.other.submit, lambda session, question, other, options: session.why_not(other, options)),
        ]
        for trigger, run in asked:
            on(trigger, self._answering(run), inputs, outputs, concurrency_limit=None)
        on(self.stop.click, self._stop, queue=False)
        on(self.new.click, self._new, [self.picture], outputs)
        on(self.picture.change, self._new, [self.picture], outputs)
        for chat in self.chats:
            on(chat.clear, self._new, [self.picture], outputs)
        on(self.whose.change, self._last_answer, [self.whose], [self.corrected])
        on(self.correct.click, self._correct, [self.corrected, self.whose], [self.status])
        for number, button in enumerate(self.better):
            on(button.click, self._prefer(number), None, [self.status])

    def _session(self, picture: str | None, request: gradio.Request) -> ChatSession:
        """Return the window's session about the picture; a new one if it was about another."""
        image, key = Path(picture).read_bytes() if picture else b"", str(request.session_hash)
        if key not in self.sessions or self.sessions[key].image != image:
            self._forget(request)
            self.sessions[key] = ChatSession(self.models, image, key)
        return self.sessions[key]

    def _forget(self, request: gradio.Request) -> None:
        if (session := self.sessions.pop(str(request.session_hash), None)) is not None:
            session.stop()

    def _answering(self, run: Callable[[ChatSession, str, str, Options], Generator[Exchange]]) -> Any:
        """Return the handler of a button that asks for an answer."""

        def handle(
            picture: str | None,
            question: str,
            other: str,
            new: float,
            temperature: float,
            top_p: float,
            seed: float | None,
            request: gradio.Request,
        ) -> Iterable[Updates]:
            try:
                session = self._session(picture, request)
                options = Options(int(new), temperature, top_p, int(seed or 0))
                # What is typed is kept until it can be answered.
                typed = {self.question: "", self.other: ""}
                for _ in run(session, question, other, options):
                    if self._shows(session, request):
                        yield self._shown(session) | typed | {self.status: _note("Answering …")}
                        typed = {}
                last = session.exchanges[-1] if session.exchanges else Exchange("", ("",))
                done = "Cut: stopped, or at the maximum length." if any(last.cut) else ""
                if self._shows(session, request):
                    rest = {self.status: _note(done), self.whose: 0, self.corrected: last.answers[0]}
                    yield self._shown(session) | rest
            except UserError as error:
                yield {self.status: _note(str(error))}

        return handle

    def _shows(self, session: ChatSession, request: gradio.Request) -> bool:
        """Return whether the window still shows a session; a new one may have been begun while it is answered."""
        return self.sessions.get(str(request.session_hash)) is session

    def _shown(self, session: ChatSession) -> Updates:
        """Return what the page shows of a session."""
        updates: Updates = {}
        for number, chat in enumerate(self.chats):
            sides = ((exchange.question, exchange.answers[number]) for exchange in session.exchanges)
            updates[chat] = [
                {"role": role, "content": html.escape(text, quote=False)}
                for role, text in zip(itertools.cycle(("user", "assistant")), itertools.chain(*sides))
            ]
        if len(self.models) == 2:
            updates[self.difference] = self._differences(session.exchanges[-1].answers) if session.exchanges else ""
        return updates

    def _differences(self, answers: Sequence[str]) -> str:
        lines = []
        for model, side in zip(self.models, mark_differences(*answers), strict=True):
            words = ""
            for text, new in side:
                start = len(text) - len(text.lstrip())
                words += text[:start] + (
                    f"<mark>{html.escape(text[start:])}</mark>" if new else html.escape(text[start:])
                )
            lines.append(f"<p><strong>{html.escape(model.name)}:</strong> {words}</p>")
        return "".join(lines)

    def _stop(self, request: gradio.Request) -> None:
        if (session := self.sessions.get(str(request.session_hash))) is not None:
            session.stop()

    def _new(self, picture: str | None, request: gradio.Request) -> Updates:
        self._forget(request)
        session = self._session(picture, request)
        return self._shown(session) | {self.status: "", self.question: "", self.other: "", self.corrected: ""}

    def _last_answer(self, whose: int, request: gradio.Request) -> str:
        session = self.sessions.get(str(request.session_hash))
        return session.exchanges[-1].answers[whose] if session is not None and session.exchanges else ""

    def _correct(self, corrected: str, whose: int, request: gradio.Request) -> str:
        return self._keep(lambda session: session.correct(corrected, whose), request)

    def _prefer(self, number: int) -> Any:
        def handle(request: gradio.Request) -> str:
            return self._keep(lambda session: session.prefer(number), request)

        return handle

    def _keep(self, pair: Callable[[ChatSession], dict[str, Any]], request: gradio.Request) -> str:
        try:
            session = self.sessions.get(str(request.session_hash)) or ChatSession(self.models)
            self.feedback.add(pair(session), session.image)
        except UserError as error:
            return _note(str(error))
        return _note(f"Added to {self.feedback.path}.")


def _note(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""

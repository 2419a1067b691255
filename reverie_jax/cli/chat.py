"""`reverie chat`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from reverie_jax.cli import common, listening
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from reverie_jax.chat.model import ChatModel, Options
    from reverie_jax.chat.page import ExamplePicture

_EXAMPLES = 4
_EXAMPLE_PIXELS = 224
_KEPT_SESSIONS = 4
"""Windows whose KV is kept on the devices, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """Chat with a model about a picture, on a page or in the terminal.

    Answers can be explained, questioned and corrected; corrections are kept as preference pairs. Two models, or a base model
    and its adapter, can answer side by side.
    """

    model: Annotated[Positional[str], common.option("MODEL")]
    """Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base."""
    components: common.Components = ()
    adapter: common.Adapter = None
    template: common.Template = None
    compare_with: Annotated[str, common.option("MODEL")] = ""
    """Checkpoint that answers beside MODEL: another one, or MODEL again to compare it with its adapter."""
    compare_adapter: Annotated[str | None, common.option("ADAPTER")] = None
    """Adapter of the second model; none if omitted."""
    dtype: common.Dtype = "auto"
    mesh: common.MeshSpec = common.ONE_DEVICE
    terminal: Annotated[bool, common.FLAG] = False
    """Chat in the terminal; needs no gradio."""
    image: Annotated[Path | None, common.FILE] = None
    """Picture to begin with in the terminal."""
    feedback: Annotated[Path, common.FOLDER] = Path("feedback")
    """Folder of the preference pairs; `reverie data build FOLDER/pairs.jsonl` reads them."""
    max_new_tokens: common.MaxNewTokens = None
    """Maximum length of an answer, in tokens; it can be changed in the chat, as all of decoding. 512 if omitted."""
    host: Annotated[str, common.option("ADDRESS")] = "127.0.0.1"
    """Address to listen at; any but loopback needs a password in REVERIE_API_KEY, for the user `reverie`."""
    port: Annotated[int, common.N] = 7860
    """Port to listen at; 0 for any free one."""

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, max_new_tokens=self.max_new_tokens)
        template = common.check_template(self.template)
        if self.compare_adapter and not self.compare_with:
            raise UserError("--compare-adapter: needs --compare-with MODEL, the model that it is for")
        if self.image is not None and not self.terminal:
            raise UserError("--image: needs --terminal; on the page, upload the picture")
        from reverie_jax.chat.model import Options

        options = Options() if self.max_new_tokens is None else Options(self.max_new_tokens)
        if self.terminal:
            self._run_terminal(options, template)
        else:
            self._serve(options, template)

    @contextlib.contextmanager
    def _models(self, template: str | None) -> Iterator[list[ChatModel]]:
        from reverie_jax.chat.model import ChatModel
        from reverie_jax.eval.engine import Engine
        from reverie_jax.eval.schedule import EngineShape
        from reverie_jax.serve.scheduler import Scheduler

        mesh, wanted = common.parse_mesh(self.mesh), [(self.model, self.adapter, self.components, template)]
        if self.compare_with:
            same = self.compare_with == self.model
            more = (self.components, template) if same else ((), None)
            wanted.append((self.compare_with, self.compare_adapter, *more))
        with contextlib.ExitStack() as stack:
            models = []
            for model, adapter, components, template in wanted:
                merged, processor = common.load_merged(model, components, adapter, self.dtype, template)
                # A request by itself: its KV can be kept.
                shape = EngineShape(sequence_length=processor.context, questions=1, batch_size=1)
                scheduler = Scheduler(Engine(merged, processor, shape, mesh=mesh), keep=_KEPT_SESSIONS)
                stack.callback(scheduler.close)
                models.append(ChatModel(_name(model, adapter), scheduler))
            yield models

    def _run_terminal(self, options: Options, template: str | None) -> None:
        from reverie_jax.chat.feedback import FeedbackFolder
        from reverie_jax.chat.terminal import Terminal

        with self._models(template) as models:
            Terminal(models, options, FeedbackFolder(self.feedback), self.image).run()

    def _serve(self, options: Options, template: str | None) -> None:
        key = listening.find_key(self.host, self.port)
        try:
            import uvicorn

            from reverie_jax.chat.page import Page
        except ImportError as error:
            raise UserError(
                f"`reverie chat`: {error}; pip install -e '.[web]' in the checkout, or use --terminal"
            ) from None
        from reverie_jax.chat.feedback import FeedbackFolder

        with (
            listening.open_socket(self.host, self.port) as opened,
            tempfile.TemporaryDirectory(prefix="reverie-chat-") as folder,
            self._models(template) as models,
        ):
            page = Page(models, options, FeedbackFolder(self.feedback), _examples(Path(folder)))
            config = uvicorn.Config(page.app(key), log_level="warning", ws="none", timeout_graceful_shutdown=2)
            common.note([f"{page.title} at {listening.address(opened)}/"])
            uvicorn.Server(config).run([opened])


def _name(model: str, adapter: str | None) -> str:
    """Return what users see: the last part of each path."""
    parts = [model.partition("@")[0], *([adapter] if adapter else [])]
    return " + ".join(PurePath(part).name or part for part in parts)


def _examples(folder: Path) -> list[ExamplePicture]:
    """Write pictures of scenes that no scene of the training sets has; return them with what they show."""
    from reverie_jax.chat.page import ExamplePicture
    from reverie_jax.scenes.corpus import render_png
    from reverie_jax.scenes.graph import World, take_scenes

    examples = []
    for number, scene in enumerate(take_scenes(World.skewed(), "test", 0, _EXAMPLES), 1):
        file = folder / f"scene-{number}.png"
        file.write_bytes(render_png(scene, _EXAMPLE_PIXELS))
        examples.append(ExamplePicture(file, f"Scene {number}"))
    return examples

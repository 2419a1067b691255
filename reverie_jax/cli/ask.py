"""`reverie ask`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask a model questions about an image."""

    image: Annotated[Positional[Path], common.FILE]
    """Image file in any format that Pillow opens."""
    question: Annotated[Positional[tuple[str, ...]], common.option("QUESTION ...")]
    """One or more questions, each in quotes. The image is encoded once."""
    model: common.Model
    components: common.Components = ()
    adapter: common.Adapter = None
    dtype: common.Dtype = "auto"
    max_new_tokens: common.MaxNewTokens = None
    """Maximum length of an answer, in tokens; 96 if omitted."""

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, max_new_tokens=self.max_new_tokens)
        from reverie_jax.data.conversation import IMAGE, Conversation, Turn
        from reverie_jax.data.images import decode
        from reverie_jax.data.pipeline import ImageQuestions
        from reverie_jax.eval.engine import Engine
        from reverie_jax.eval.schedule import EngineShape

        try:
            encoded = self.image.read_bytes()
        except OSError as error:
            raise UserError(f"{self.image}: cannot be read ({error.strerror})") from None
        decode(encoded, str(self.image))
        model, processor = common.load_merged(self.model, self.components, self.adapter, self.dtype)
        open_turns = [Conversation((Turn("user", f"{IMAGE}\n{text}"),)) for text in self.question]
        engine = Engine(model, processor, EngineShape(batch_size=1))
        request = ImageQuestions(str(self.image), encoded, list(enumerate(open_turns)))
        answers = engine.answer([request], max_new_tokens=self.max_new_tokens or 96)
        for number, text in enumerate(self.question):
            print(f"{text}\n  {answers[number]}")

"""`reverie ask`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask a model questions about an image."""

    image: Positional[Path]
    """Image file in any format that Pillow opens."""
    question: Positional[tuple[str, ...]]
    """One or more questions, each in quotes. The image is encoded once."""
    model: str
    """Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base."""
    components: common.Components = ()
    """Checkpoint of a part that the model lacks: language model or CLIP tower. Repeat for each part."""
    adapter: str | None = None
    """PEFT adapter, LLaVA LoRA folder, or run folder of `reverie train`."""
    dtype: str = "auto"
    """Dtype of weights and computation: float32, bfloat16, or auto (bfloat16 on accelerators, float32 on CPUs)."""
    max_new_tokens: int | None = None
    """Maximum length of an answer, in tokens; 96 if omitted."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.data.conversation import IMAGE, Conversation, Turn
        from reverie_jax.data.images import decode
        from reverie_jax.data.pipeline import ImageQuestions
        from reverie_jax.eval.engine import Engine, EngineShape

        try:
            encoded = self.image.read_bytes()
        except OSError as error:
            raise UserError(f"{self.image}: cannot be read ({error.strerror})") from None
        decode(encoded, str(self.image))
        model, processor = common.load_merged(self.model, self.components, self.adapter, self.dtype)
        open_turns = [Conversation((Turn("user", f"{IMAGE}\n{text}"),)) for text in self.question]
        engine = Engine(model, processor, EngineShape(batch_size=1))
        request = ImageQuestions(str(self.image), encoded, list(enumerate(open_turns)))
        answers = engine.answer([request], max_new_tokens=96 if self.max_new_tokens is None else self.max_new_tokens)
        for number, text in enumerate(self.question):
            print(f"{text}\n  {answers[number]}")

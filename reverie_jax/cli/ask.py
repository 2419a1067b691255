"""`reverie ask`."""

from __future__ import annotations

import dataclasses
import os
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
    template: common.Template = None
    dtype: common.Dtype = "auto"
    protocol: common.Protocol = ""
    max_new_tokens: common.MaxNewTokens = None
    """Maximum length of an answer, in tokens; 96 or the protocol's if omitted."""
    seed: common.Seed = 0
    contrast: common.Contrast = ""

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(1, max_new_tokens=self.max_new_tokens)
        common.check_choice(common.CONTRASTS, contrast=self.contrast)
        template = common.check_template(self.template, self.protocol)
        if not self.question:
            raise UserError(f"no question about {self.image}; give one or more, each in quotes")
        if files := [text for text in self.question if os.path.isfile(text)]:
            raise UserError(f"{files[0]}: a file, not a question; `reverie ask` takes one image and then questions")
        from reverie_jax.data.images import decode
        from reverie_jax.data.pipeline import ImageQuestions
        from reverie_jax.data.processor import ask
        from reverie_jax.eval.engine import Engine
        from reverie_jax.eval.protocols import decoding_of
        from reverie_jax.eval.schedule import EngineShape

        record = ask(self.image, *self.question)
        decode(record.image, str(self.image))
        model, processor = common.load_merged(self.model, self.components, self.adapter, self.dtype, template)
        engine = Engine(model, processor, EngineShape(batch_size=1))
        request = ImageQuestions(record.id, record.image, list(enumerate(record.conversations)))
        defaults = {"max_new_tokens": 96, "seed": self.seed, "contrast": self.contrast}
        decoding = decoding_of(self.protocol, defaults, {"max_new_tokens": self.max_new_tokens})
        batches = engine.stream(engine.schedule([request], decoding), decoding)
        answers = {number: answer.text for batch in batches for number, answer in batch.items()}
        for number, text in enumerate(self.question):
            print(f"{text}\n  {answers[number]}")

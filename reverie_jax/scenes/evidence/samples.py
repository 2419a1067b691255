"""The base model's own texts: descriptions to be corrected, and next sentences, true and false ones, behind one context.

Sentences are drawn as in SENTINEL (arXiv 2507.12455), where detectors judge them; here the scene graph does. Of one picture
and context, all draws are leaves of one prefilled sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine
from reverie_jax.scenes.corrections import is_true
from reverie_jax.scenes.graph import Scene
from reverie_jax.scenes.questions import DESCRIBE
from reverie_jax.scenes.scoring import DESCRIPTION_TOKENS

SENTENCES = 6
"""Sentences of a description at most."""
DRAWS = 4
"""Next sentences that are drawn behind each context."""
SENTENCE_TOKENS = 24
_ASK = Turn("user", f"{IMAGE}\n{DESCRIBE}")


def _answers(engine: Engine, images: Sequence[ImageQuestions], decoding: Decoding) -> dict[int, str]:
    answers: dict[int, str] = {}
    for batch in engine.stream(engine.schedule(images, decoding), decoding):
        answers |= {number: answer.text.strip() for number, answer in batch.items()}
    return answers


def draw_descriptions(engine: Engine, images: Sequence[bytes], seed: int) -> list[str]:
    """Draw one description of each image, at temperature 1."""
    first = seed * len(images)
    asked = [ImageQuestions(str(n), image, [(first + n, Conversation((_ASK,)))]) for n, image in enumerate(images)]
    answers = _answers(engine, asked, Decoding(DESCRIPTION_TOKENS, temperature=1.0))
    return [answers[first + number] for number in range(len(images))]


@dataclasses.dataclass
class _Walk:
    """A description that grows by true sentences."""

    text: str = ""
    siblings: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    ended: bool = False

    def grow(self, scene: Scene, drawn: Sequence[str]) -> None:
        """Keep a pair of a true and a false sentence, if both were drawn, and go on with the true one."""
        judged = {sentence: is_true(scene, sentence) for sentence in drawn if sentence and sentence not in self.text}
        true = [sentence for sentence, holds in judged.items() if holds]
        false = [sentence for sentence, holds in judged.items() if holds is False]
        if true and false:
            space = " " if self.text else ""
            self.siblings.append((self.text, space + true[0], space + false[0]))
        self.ended = not true
        if true:
            self.text = f"{self.text} {true[0]}".strip()


def draw_siblings(
    engine: Engine, images: Sequence[bytes], scenes: Sequence[Scene], seed: int
) -> list[list[tuple[str, str, str]]]:
    """Describe each image sentence by sentence; return (text so far, true next sentence, false one) where both were drawn.

    Args:
        engine: of the base model.
        images: encoded images.
        scenes: what each image shows.
        seed: of the draws.
    """
    walks = [_Walk() for _ in images]
    decoding = Decoding(SENTENCE_TOKENS, temperature=1.0, stop=".")
    for step in range(SENTENCES):
        # Draws differ by their numbers; another seed would be another program.
        first, asked = (seed * SENTENCES + step) * len(images) * DRAWS, []
        for number, (image, walk) in enumerate(zip(images, walks, strict=True)):
            if not walk.ended:
                turns = (_ASK, Turn("assistant", "", prefix=walk.text)) if walk.text else (_ASK,)
                leaves = [(first + number * DRAWS + draw, Conversation(turns)) for draw in range(DRAWS)]
                asked.append(ImageQuestions(str(number), image, leaves))
        if not asked:
            break
        drawn: dict[int, list[str]] = {}
        for number, text in sorted(_answers(engine, asked, decoding).items()):
            drawn.setdefault((number - first) // DRAWS, []).append(text)
        for number, sentences in drawn.items():
            walks[number].grow(scenes[number], sentences)
    return [walk.siblings for walk in walks]

"""The embedded world as an annotator: it knows the scene graph, and replies as a hosted model would."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from reverie_jax.annotate.schemas import QuestionSet
from reverie_jax.data.reflection import AnnotatedQuestion
from reverie_jax.hosted.interface import AnnotationError, Request
from reverie_jax.scenes.graph import CATEGORIES, COLOURS, PARTNER, Scene, plural
from reverie_jax.scenes.language import (
    NUMBERS,
    RELATIONS,
    WHERE,
    article,
    claims,
    describe,
    enumeration,
    phrase,
    relations,
)

DESCRIBE = "Describe the image."
LETTERS = "ABCD"
Rng = np.random.Generator


def existence(category: str) -> str:
    """POPE's question."""
    return f"Is there {article(category)} in the image?"


def _pick(rng: Rng, options: list[str]) -> str:
    return options[rng.integers(len(options))]


def absent_partners(scene: Scene) -> list[str]:
    """What the prior expects and the picture does not show."""
    return [PARTNER[c] for c in scene.categories if PARTNER[c] not in scene.categories]


class SceneAnnotator:
    """Exact replies from the graphs.

    Args:
        scenes: the scene of each picture, by the picture's key.
        seed: with a request's picture, fixes every free choice; the same request has the same reply.
    """

    name = "scenes"

    def __init__(self, scenes: Mapping[str, Scene], seed: int = 0):
        self.scenes, self.seed = scenes, seed

    def reply(self, request: Request) -> str:
        scene = self.scenes.get(request.picture.key)
        if scene is None:
            raise AnnotationError(f"no scene is known for picture {request.picture.key!r}")
        fields = request.fields
        match request.stage:
            case "questions":
                rng = np.random.default_rng([self.seed, scene.seed])
                return QuestionSet(questions=self.questions(scene, rng, int(fields["count"]))).model_dump_json()
            case "positive":
                return " ".join(map(_upper, facts(scene, fields["question"], fields["answer"], support=True)))
            case "negative":
                reasons = facts(scene, fields["question"], fields["answer"], support=False)
                return " ".join(map(_upper, [f"this is wrong because {reasons[0]}", *reasons[1:]]))
            case "judge":
                stated = claims(fields["positive"]) + claims(fields["negative"])
                return "No" if stated and all(claim.holds(scene) for claim in stated) else "Yes"
        raise AnnotationError(f"unknown stage {request.stage!r}")

    def questions(self, scene: Scene, rng: Rng, count: int) -> list[AnnotatedQuestion]:
        """`count` questions of mixed kinds, no question twice."""
        found: dict[str, AnnotatedQuestion] = {}
        for _ in range(20 * count):
            if len(found) == count:
                break
            make = ASKERS[rng.choice(len(ASKERS), p=_SHARES)]
            if (question := make(scene, rng)) is not None:
                found.setdefault(question.question, question)
        return list(found.values())


def _question(text: str, kind: str, right: str, wrong: list[str]) -> AnnotatedQuestion:
    return AnnotatedQuestion(question=text, type=kind, correct_answer=right, confusing_answers=wrong)  # type: ignore[arg-type]


def ask_present(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    return _question(existence(_pick(rng, list(scene.categories))), "yes/no", "Yes", ["No"])


def ask_absent(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Something that is not there; where the prior expects something, mostly that."""
    expected = absent_partners(scene)
    pool = expected if expected and rng.random() < 0.7 else [c for c in CATEGORIES if c not in scene.categories]
    return _question(existence(_pick(rng, pool)), "yes/no", "No", ["Yes"])


def ask_colour(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    category = _pick(rng, list(scene.categories))
    things = scene.of(category)
    verb, noun = ("is", category) if len(things) == 1 else ("are", plural(category))
    wrong = _pick(rng, [c for c in COLOURS if c != things[0].colour])
    return _question(f"What colour {verb} the {noun}?", "short", things[0].colour, [wrong])


def ask_count(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    category = _pick(rng, [*scene.categories, *absent_partners(scene)])
    number = len(scene.of(category))
    wrong = _pick(rng, [n for i, n in enumerate(NUMBERS[:5]) if i != number and abs(i - number) < 3])
    return _question(f"How many {plural(category)} are there?", "short", NUMBERS[number], [wrong])


def ask_place(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    single = [c for c in scene.categories if len(scene.of(c)) == 1]
    if not single:
        return None
    category = _pick(rng, single)
    right = WHERE[scene.of(category)[0].column]
    wrong = _pick(rng, [w for w in WHERE.values() if w != right])
    return _question(f"Where is the {category}?", "short", right, [wrong])


def ask_relation(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    pairs = relations(scene)
    if not pairs:
        return None
    a, how, b = pairs[rng.integers(len(pairs))]
    if rng.random() < 0.5:
        return _question(f"Is the {a} {how} the {b}?", "yes/no", "Yes", ["No"])
    false = _pick(rng, [r for r in RELATIONS if r != how])
    return _question(f"Is the {a} {false} the {b}?", "yes/no", "No", ["Yes"])


def ask_choice(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Which of four things is there; the wrong ones include what the prior expects."""
    right = _pick(rng, list(scene.categories))
    expected = absent_partners(scene)[:2]
    others = [c for c in CATEGORIES if c not in scene.categories and c not in expected]
    options = [right, *expected, *(str(c) for c in rng.permutation(others)[: 3 - len(expected)])]
    options = [str(option) for option in rng.permutation(options)]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    tempting = expected[0] if expected else next(o for o in options if o != right)
    answer, wrong = (LETTERS[options.index(option)] for option in (right, tempting))
    return _question(f"Which of these is in the image? {listed}", "choice", answer, [wrong])


def ask_description(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    right = describe(scene, rng)
    expected = absent_partners(scene)
    extra = _pick(rng, expected or [c for c in CATEGORIES if c not in scene.categories])
    invented = f"{article(_pick(rng, list(COLOURS)))} {extra}"
    wrong = f"The image shows {enumeration([phrase(scene, scene.categories[0]), invented])}."
    return _question(DESCRIBE, "open", right, [wrong])


ASKERS: tuple[Callable[[Scene, Rng], AnnotatedQuestion | None], ...] = (
    ask_present,
    ask_absent,
    ask_colour,
    ask_count,
    ask_place,
    ask_relation,
    ask_choice,
    ask_description,
)
_SHARES = (0.3, 0.22, 0.08, 0.1, 0.08, 0.08, 0.06, 0.08)


def facts(scene: Scene, question: str, answer: str, *, support: bool) -> list[str]:
    """What the picture shows that settles the question, without repeating the answer's words.

    Args:
        answer: a right answer (`support`) or a wrong one. Both are settled by what is there; a wrong one that the prior
            expects is named as such, a right denial is backed by all that is there instead.
    """
    subjects = _subjects(question, answer)
    present = [c for c in subjects if c in scene.categories]
    found = []
    for category in subjects:
        if category in scene.categories:
            continue
        company = PARTNER[category]
        habit = f"{article(company)} is often seen with {article(category)}, but "
        found.append(f"{habit if not support and company in scene.categories else ''}there is no {category}.")
    if question == DESCRIBE and support:
        return [f"{_there_is(scene, list(scene.categories))}."]
    how = next((pair for pair in relations(scene) if pair[0] in subjects and pair[2] in subjects), None)
    if how is not None and len(present) == 2:
        a, way, b = how
        found.append(f"the {a} is {way} the {b}.")
    elif present:
        one = question != DESCRIBE and not question.startswith("Which")
        found.append(f"{_there_is(scene, present[:1] if one else present, detail=one)}.")
    elif support:
        found.append(f"{_there_is(scene, list(scene.categories))}.")
    return found


def _subjects(question: str, answer: str) -> list[str]:
    """Categories that a question and an answer to it are about."""
    words = {plural(c): c for c in CATEGORIES} | {c: c for c in CATEGORIES}
    text = question
    if question.startswith("Which") and len(answer) == 1:
        options = dict(part.split(". ") for part in _options(question))
        return [options[answer]] if answer in options else []
    if question == DESCRIBE:
        text = answer
    found = (words.get(word.strip(".,?")) for word in text.split())
    return list(dict.fromkeys(category for category in found if category))


def _options(question: str) -> list[str]:
    words = question.split("? ")[1].split()
    return [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]


def _there_is(scene: Scene, categories: list[str], *, detail: bool = False) -> str:
    several = len(scene.of(categories[0])) > 1
    listed = enumeration([phrase(scene, c, detail=detail) for c in categories])
    return f"there {'are' if several else 'is'} {listed}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]

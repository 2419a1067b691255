"""An annotator that replies as a hosted model would, from the scene graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from reverie_jax.annotate.schemas import QuestionSet
from reverie_jax.data.reflection import AnnotatedQuestion
from reverie_jax.hosted.interface import AnnotationError, Request
from reverie_jax.scenes.graph import CATEGORIES, COLORS, PARTNER, Scene, plural
from reverie_jax.scenes.language import (
    COLUMN_PHRASES,
    NUMBERS,
    RELATIONS,
    describe,
    find_relations,
    join_words,
    noun_phrase,
    parse_claims,
    with_article,
)

DESCRIBE = "Describe the image."
LETTERS = "ABCD"
Rng = np.random.Generator


def existence_question(category: str) -> str:
    """Return POPE's question about a category."""
    return f"Is there {with_article(category)} in the image?"


def _pick(rng: Rng, options: list[str]) -> str:
    return options[rng.integers(len(options))]


def absent_partners(scene: Scene) -> list[str]:
    """Return the partners of what the image shows that it does not show: what the prior expects."""
    return [PARTNER[c] for c in scene.categories if PARTNER[c] not in scene.categories]


class SceneAnnotator:
    """Replies that are exact, from the scene graphs.

    Args:
        scenes: the scene of each image, by the image's key.
        seed: fixes, with a request's image, every free choice; the same request has the same reply.
    """

    name = "scenes"

    def __init__(self, scenes: Mapping[str, Scene], seed: int = 0):
        self.scenes, self.seed = scenes, seed

    def reply(self, request: Request) -> str:
        """Return the reply to one request: questions as JSON, a rationale, or a verdict.

        Raises:
            AnnotationError: the image or the stage is unknown.
        """
        scene = self.scenes.get(request.image.key)
        if scene is None:
            raise AnnotationError(f"unknown image {request.image.key!r}")
        fields = request.fields
        match request.stage:
            case "questions":
                rng = np.random.default_rng([self.seed, scene.seed])
                return QuestionSet(questions=self.questions(scene, rng, int(fields["count"]))).model_dump_json()
            case "positive":
                return " ".join(map(_upper, state_facts(scene, fields["question"], fields["answer"], support=True)))
            case "negative":
                reasons = state_facts(scene, fields["question"], fields["answer"], support=False)
                return " ".join(map(_upper, [f"this is wrong because {reasons[0]}", *reasons[1:]]))
            case "judge":
                stated = parse_claims(fields["positive"]) + parse_claims(fields["negative"])
                return "No" if stated and all(claim.holds(scene) for claim in stated) else "Yes"
        raise AnnotationError(f"unknown stage {request.stage!r}")

    def questions(self, scene: Scene, rng: Rng, count: int) -> list[AnnotatedQuestion]:
        """Return at most `count` different questions of mixed kinds."""
        questions: dict[str, AnnotatedQuestion] = {}
        for _ in range(20 * count):
            if len(questions) == count:
                break
            make = QUESTION_MAKERS[rng.choice(len(QUESTION_MAKERS), p=_SHARES)]
            if (question := make(scene, rng)) is not None:
                questions.setdefault(question.question, question)
        return list(questions.values())


def _question(text: str, kind: str, right: str, wrong: list[str]) -> AnnotatedQuestion:
    return AnnotatedQuestion(question=text, type=kind, correct_answer=right, confusing_answers=wrong)  # type: ignore[arg-type]


def ask_present(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether an object is there that is."""
    return _question(existence_question(_pick(rng, list(scene.categories))), "yes/no", "Yes", ["No"])


def ask_absent(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether an object is there that is not; mostly one that the prior expects, if there is one."""
    expected = absent_partners(scene)
    pool = expected if expected and rng.random() < 0.7 else [c for c in CATEGORIES if c not in scene.categories]
    return _question(existence_question(_pick(rng, pool)), "yes/no", "No", ["Yes"])


def ask_color(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for the color of a category's objects."""
    category = _pick(rng, list(scene.categories))
    objects = scene.find(category)
    verb, noun = ("is", category) if len(objects) == 1 else ("are", plural(category))
    wrong = _pick(rng, [c for c in COLORS if c != objects[0].color])
    return _question(f"What colour {verb} the {noun}?", "short", objects[0].color, [wrong])


def ask_count(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for the number of a category's objects; it may be an absent partner's."""
    category = _pick(rng, [*scene.categories, *absent_partners(scene)])
    number = len(scene.find(category))
    wrong = _pick(rng, [n for i, n in enumerate(NUMBERS[:5]) if i != number and abs(i - number) < 3])
    return _question(f"How many {plural(category)} are there?", "short", NUMBERS[number], [wrong])


def ask_place(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for the column of an object whose category appears once; None if there is none."""
    single = [c for c in scene.categories if len(scene.find(c)) == 1]
    if not single:
        return None
    category = _pick(rng, single)
    right = COLUMN_PHRASES[scene.find(category)[0].column]
    wrong = _pick(rng, [w for w in COLUMN_PHRASES.values() if w != right])
    return _question(f"Where is the {category}?", "short", right, [wrong])


def ask_relation(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether a relation of two objects holds; None if no two stand clearly."""
    pairs = find_relations(scene)
    if not pairs:
        return None
    a, relation, b = pairs[rng.integers(len(pairs))]
    if rng.random() < 0.5:
        return _question(f"Is the {a} {relation} the {b}?", "yes/no", "Yes", ["No"])
    false = _pick(rng, [r for r in RELATIONS if r != relation])
    return _question(f"Is the {a} {false} the {b}?", "yes/no", "No", ["Yes"])


def ask_choice(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask which of four objects is there; the wrong ones include what the prior expects."""
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
    """Ask for a description; the confusing answer names an object that the prior expects or that is absent."""
    right = describe(scene, rng)
    expected = absent_partners(scene)
    extra = _pick(rng, expected or [c for c in CATEGORIES if c not in scene.categories])
    invented = f"{with_article(_pick(rng, list(COLORS)))} {extra}"
    wrong = f"The image shows {join_words([noun_phrase(scene, scene.categories[0]), invented])}."
    return _question(DESCRIBE, "open", right, [wrong])


QUESTION_MAKERS: tuple[Callable[[Scene, Rng], AnnotatedQuestion | None], ...] = (
    ask_present,
    ask_absent,
    ask_color,
    ask_count,
    ask_place,
    ask_relation,
    ask_choice,
    ask_description,
)
_SHARES = (0.3, 0.22, 0.08, 0.1, 0.08, 0.08, 0.06, 0.08)


def state_facts(scene: Scene, question: str, answer: str, *, support: bool) -> list[str]:
    """Return sentences on what the image shows that decide the question, without repeating the answer's words.

    Args:
        scene: what the image shows.
        question: a question of this module.
        answer: a right answer (`support`) or a wrong one.
        support: whether to support the answer or refute it. A refuted answer that the prior expects is named as such; a
            right denial is supported by all that is there instead.
    """
    subjects = _subjects(question, answer)
    present = [c for c in subjects if c in scene.categories]
    sentences = []
    for category in subjects:
        if category in scene.categories:
            continue
        partner = PARTNER[category]
        habit = f"{with_article(partner)} is often seen with {with_article(category)}, but "
        sentences.append(f"{habit if not support and partner in scene.categories else ''}there is no {category}.")
    if question == DESCRIBE and support:
        return [f"{_there_is(scene, list(scene.categories))}."]
    pair = next((pair for pair in find_relations(scene) if pair[0] in subjects and pair[2] in subjects), None)
    if pair is not None and len(present) == 2:
        a, relation, b = pair
        sentences.append(f"the {a} is {relation} the {b}.")
    elif present:
        single = question != DESCRIBE and not question.startswith("Which")
        sentences.append(f"{_there_is(scene, present[:1] if single else present, detail=single)}.")
    elif support:
        sentences.append(f"{_there_is(scene, list(scene.categories))}.")
    return sentences


def _subjects(question: str, answer: str) -> list[str]:
    """Return the categories that a question and an answer to it are about."""
    words = {plural(c): c for c in CATEGORIES} | {c: c for c in CATEGORIES}
    text = question
    if question.startswith("Which") and len(answer) == 1:
        options = dict(part.split(". ") for part in _options(question))
        return [options[answer]] if answer in options else []
    if question == DESCRIBE:
        text = answer
    categories = (words.get(word.strip(".,?")) for word in text.split())
    return list(dict.fromkeys(category for category in categories if category))


def _options(question: str) -> list[str]:
    words = question.split("? ")[1].split()
    return [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]


def _there_is(scene: Scene, categories: list[str], *, detail: bool = False) -> str:
    several = len(scene.find(categories[0])) > 1
    listed = join_words([noun_phrase(scene, c, detail=detail) for c in categories])
    return f"there {'are' if several else 'is'} {listed}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]

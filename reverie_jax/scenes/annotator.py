"""An annotator that replies as a hosted model would, from the scene graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reverie_jax.annotate.schemas import QuestionSet
from reverie_jax.data.reflection import AnnotatedQuestion, QuestionType
from reverie_jax.hosted.interface import AnnotationError, Request
from reverie_jax.scenes.graph import CATEGORIES, COLORS, PARTNER, SIZES, TEXTURES, Scene
from reverie_jax.scenes.language import (
    COLUMN_PHRASES,
    NOUNS,
    NUMBERS,
    RELATIONS,
    amount,
    parse_claims,
    with_article,
)
from reverie_jax.scenes.questions import BESIDE, LETTERS, Query, Thing

Rng = np.random.Generator


def existence_question(category: str) -> str:
    """Return POPE's question about a category."""
    return Query.make("existence", noun=category).text


def _pick(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


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
            AnnotationError: the image or the stage is unknown, or a question is of no form of `questions.FORMS`.
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
                return " ".join(map(_upper, state_facts(scene, fields["question"])))
            case "negative":
                reasons = state_facts(scene, fields["question"], wrong=fields["answer"])
                return " ".join(map(_upper, [f"this is wrong because {reasons[0]}", *reasons[1:]]))
            case "judge":
                stated = parse_claims(fields["positive"]) + parse_claims(fields["negative"])
                return "No" if stated and all(claim.holds(scene) for claim in stated) else "Yes"
        raise AnnotationError(f"unknown stage {request.stage!r}")

    def questions(self, scene: Scene, rng: Rng, count: int) -> list[AnnotatedQuestion]:
        """Return at most `count` different questions of mixed kinds."""
        questions: dict[str, AnnotatedQuestion] = {}
        for _ in range(40 * count):
            if len(questions) == count:
                break
            make = QUESTION_MAKERS[rng.choice(len(QUESTION_MAKERS), p=_SHARES)]
            if (question := make(scene, rng)) is not None:
                questions.setdefault(question.question, question)
        return list(questions.values())


def state_facts(scene: Scene, question: str, wrong: str = "") -> list[str]:
    """Return sentences, without capitals, on what the image shows that decide a question, in steps.

    Args:
        scene: what the image shows.
        question: a question of `questions.FORMS`.
        wrong: an answer to refute instead. Where it names what the prior expects, and the image lacks, that is said first.

    Raises:
        AnnotationError: the question is of no such form.
    """
    query = Query.parse(question)
    if query is None:
        raise AnnotationError(f"no form of `reverie_jax.scenes.questions` asks {question!r}")
    if not wrong:
        return query.facts(scene)
    # What is wrong about a wrong description, choice or name is what it names; else, what the question asks for.
    named = [NOUNS[word] for word in wrong.replace(".", "").replace(",", "").split() if word in NOUNS]
    if query.form == "choice":
        named = [category for letter, category in query.options.items() if letter == wrong]
    if query.form == "existence":
        named = [dict(query.fields)["noun"]]
    absent = list(dict.fromkeys(category for category in named if not scene.counts[category]))
    reasons = []
    for category in absent:
        partner = PARTNER[category]
        habit = f"{with_article(partner)} is often seen with {with_article(category)}, but "
        reasons.append(f"{habit if scene.counts[partner] else ''}there is no {category}.")
    if query.form == "description":
        return reasons or query.facts(scene)
    return reasons + [fact for fact in query.facts(scene) if not any(reason.endswith(fact) for reason in reasons)]


def _ask(scene: Scene, query: Query, wrong: str | None, kind: QuestionType = "short") -> AnnotatedQuestion | None:
    """Return a question with its right answer; None if the scene does not decide it, or the wrong answer is not wrong.

    Args:
        scene: what the image shows.
        query: the question.
        wrong: the confusing answer; None for the other one of Yes and No.
        kind: type of question; it is `yes/no` where `wrong` is None.
    """
    right = query.answer(scene)
    if right is None:
        return None
    if wrong is None:
        wrong, kind = {"Yes": "No", "No": "Yes"}[right], "yes/no"
    if wrong == right:
        return None
    return AnnotatedQuestion(question=query.text, type=kind, correct_answer=right, confusing_answers=[wrong])


def _single(scene: Scene) -> list[str]:
    return [category for category in scene.categories if scene.counts[category] == 1]


def _things(scene: Scene, *, beside: bool = False) -> list[Thing]:
    """Return what can be named by its relation to something else."""
    relations = (*RELATIONS, BESIDE) if beside else RELATIONS
    things = [Thing(category, relation) for category in _single(scene) for relation in relations]
    return [thing for thing in things if thing.find(scene)]


def ask_present(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether an object is there that is."""
    return _ask(scene, Query.make("existence", noun=_pick(rng, scene.categories)), None)


def ask_absent(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether an object is there that is not; mostly one that the prior expects, if there is one."""
    expected = absent_partners(scene)
    pool = expected if expected and rng.random() < 0.7 else [c for c in CATEGORIES if c not in scene.categories]
    return _ask(scene, Query.make("existence", noun=_pick(rng, pool)), None)


def _look_question(scene: Scene, rng: Rng, thing: Thing, tempting: Sequence[str]) -> AnnotatedQuestion | None:
    """Ask whether a thing has a look: its own or, as often, one that other things of the scene have."""
    found = thing.find(scene)
    if found is None:
        return None
    kind, words = [("color", COLORS), ("size", tuple(SIZES)), ("texture", TEXTURES)][rng.choice(3, p=(0.6, 0.2, 0.2))]
    look = getattr(found, kind)
    if rng.random() < 0.5:
        seen = [word for word in words if word in tempting and word != look]
        look = _pick(rng, seen or [word for word in words if word != look])
    return _ask(scene, Query.make("attribute", thing=thing, look=look), None)


def ask_attribute(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether an object has a look; a wrong one is mostly that of another object."""
    if not (single := _single(scene)):
        return None
    category = _pick(rng, single)
    others = [obj for obj in scene.objects if obj.category != category]
    return _look_question(
        scene, rng, Thing(category), [look for obj in others for look in (obj.color, obj.size, obj.texture)]
    )


def ask_color(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for the color of a category's objects; the confusing answer is mostly another object's color."""
    category = _pick(rng, scene.categories)
    own = scene.find(category)[0].color
    others = [obj.color for obj in scene.objects if obj.color != own] or [c for c in COLORS if c != own]
    if scene.counts[category] > 1:
        return _ask(scene, Query.make("colors", plural=category), _pick(rng, others))
    return _ask(scene, Query.make("color", thing=Thing(category)), _pick(rng, others))


def ask_count(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for the number of a category's objects; it may be an absent partner's."""
    category = _pick(rng, [*scene.categories, *absent_partners(scene)])
    number = scene.counts[category]
    wrong = _pick(rng, [n for i, n in enumerate(NUMBERS[:5]) if i != number and abs(i - number) < 3])
    return _ask(scene, Query.make("count", plural=category), wrong)


def ask_number(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether there are at least, or exactly, so many; as often yes as no, where the scene allows it."""
    form, yes = _pick(rng, ["at least", "exactly"]), rng.random() < 0.5
    several = [category for category in scene.categories if scene.counts[category] > 1]
    if yes:
        if not several:
            return None
        category = _pick(rng, several)
        number = int(rng.integers(2, scene.counts[category] + 1)) if form == "at least" else scene.counts[category]
    else:
        if not several and rng.random() < 0.5:
            return None
        category = _pick(rng, several if several and rng.random() < 0.5 else scene.categories)
        number = max(2, scene.counts[category] + 1)
        if form == "exactly" and scene.counts[category] > 2 and rng.random() < 0.5:
            number = scene.counts[category] - 1
    return _ask(scene, Query.make(form, number=NUMBERS[number], plural=category), None)


def ask_place(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for the column of an object whose category appears once; None if there is none."""
    if not (single := _single(scene)):
        return None
    thing = Thing(_pick(rng, single))
    right = Query.make("place", thing=thing).answer(scene)
    return _ask(scene, Query.make("place", thing=thing), _pick(rng, [w for w in COLUMN_PHRASES.values() if w != right]))


def ask_relation(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether a relation of two objects holds; None if no two stand clearly."""
    if not scene.relations:
        return None
    a, relation, b = _pick(rng, scene.relations)
    if rng.random() < 0.5:
        relation = _pick(rng, [r for r in RELATIONS if r != relation])
    return _ask(scene, Query.make("relation", noun=a, relation=relation, other=b), None)


def ask_identity(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask what stands so to an object; the confusing answer is the object's partner, or another object of the scene."""
    if not (things := _things(scene)):
        return None
    thing = _pick(rng, things)
    found = thing.find(scene)
    others = [c for c in scene.categories if c not in (thing.category, found.category)]
    tempting = PARTNER[thing.category]
    if tempting == found.category or (others and rng.random() < 0.5):
        tempting = _pick(rng, others or [c for c in CATEGORIES if c != found.category])
    return _ask(scene, Query.make("identity", relation=thing.relation, noun=thing.category), f"the {tempting}")


def ask_more(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether there are more of one category than of another, where the numbers differ or, seldom, are equal."""
    a, b = (str(category) for category in rng.permutation(scene.categories)[:2])
    if scene.counts[a] == scene.counts[b] and rng.random() < 0.95:
        return None
    return _ask(scene, Query.make("more", plural=a, others=b), None)


def ask_larger(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask whether one object is larger than another, or which one is; mostly where the sizes differ."""
    single = _single(scene)
    if len(single) < 2:
        return None
    a, b = (str(category) for category in rng.permutation(single)[:2])
    if rng.random() < 0.4:
        return _ask_which(scene, Thing(a), Thing(b))
    if scene.find(a)[0].size == scene.find(b)[0].size and rng.random() < 0.95:
        return None
    return _ask(scene, Query.make("larger", noun=a, other=b), None)


def _ask_which(scene: Scene, thing: Thing, second: Thing) -> AnnotatedQuestion | None:
    a, b = thing.find(scene), second.find(scene)
    if a is None or b is None or a is b or a.size == b.size:
        return None
    smaller = min(a, b, key=lambda obj: obj.extent)
    return _ask(scene, Query.make("which", thing=thing, second=second), f"the {smaller.category}")


def ask_two_steps(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask about a thing that is named by its relation; the confusing answer fits what is named in its place."""
    if not (things := _things(scene)):
        return None
    thing, chance = _pick(rng, things), rng.random()
    anchor = scene.find(thing.category)[0]
    if chance < 0.55:
        return _look_question(scene, rng, thing, (anchor.color, anchor.size, anchor.texture))
    if chance < 0.8:
        return _ask(scene, Query.make("color", thing=thing), anchor.color)
    around = _things(scene, beside=True)
    other = _pick(rng, around)
    return _ask_which(scene, thing, other if other.category != thing.category else Thing(_pick(rng, _single(scene))))


def ask_choice(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask which of four objects is there; the wrong ones include what the prior expects."""
    right = _pick(rng, scene.categories)
    expected = absent_partners(scene)[:2]
    others = [c for c in CATEGORIES if c not in scene.categories and c not in expected]
    options = [right, *expected, *(str(c) for c in rng.permutation(others)[: 3 - len(expected)])]
    options = [str(option) for option in rng.permutation(options)]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    tempting = expected[0] if expected else next(o for o in options if o != right)
    return _ask(scene, Query.make("choice", options=listed), LETTERS[options.index(tempting)], "choice")


def ask_description(scene: Scene, rng: Rng) -> AnnotatedQuestion | None:
    """Ask for a description; the confusing answer names an object that the prior expects or that is absent."""
    extra = _pick(rng, absent_partners(scene) or [c for c in CATEGORIES if c not in scene.categories])
    invented = f"there is {with_article(_pick(rng, COLORS))} {extra}."
    wrong = " ".join(map(_upper, (f"{amount(scene, scene.categories[0])}.", invented)))
    return _ask(scene, Query.make("description"), wrong, "open")


QUESTION_MAKERS: tuple[Callable[[Scene, Rng], AnnotatedQuestion | None], ...] = (
    ask_present,
    ask_absent,
    ask_attribute,
    ask_color,
    ask_count,
    ask_number,
    ask_place,
    ask_relation,
    ask_identity,
    ask_more,
    ask_larger,
    ask_two_steps,
    ask_choice,
    ask_description,
)
_SHARES = (0.11, 0.11, 0.09, 0.04, 0.02, 0.09, 0.02, 0.07, 0.05, 0.08, 0.07, 0.22, 0.01, 0.02)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]

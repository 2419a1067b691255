"""The grammar of questions about scenes: their texts, right answers, and the facts that decide them.

A question is a form with its fields. Texts are written from a form's pattern and read back by the same pattern, so the
annotator can explain an answer to any of these questions, whoever asked it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from reverie_jax.scenes.graph import (
    CATEGORIES,
    COLORS,
    PARTNER,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
    plural,
    relation_between,
)
from reverie_jax.scenes.language import (
    COLUMN_PHRASES,
    NOUNS,
    NUMBERS,
    RELATIONS,
    amount,
    describe,
    join_words,
    noun_phrase,
    with_article,
)

DESCRIBE = "Describe the image."
LETTERS = "ABCD"
BESIDE = "beside"
LOOKS: tuple[str, ...] = (*SIZES, *COLORS, *TEXTURES)
SKILLS = ("existence", "attribute", "count", "relation", "comparison", "two-step")
"""What questions test, one skill each. `two-step` questions name a thing by its relation to another ("the thing left of the
cup"); choices and descriptions have no skill."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """What a question is about: a category ("the cup"), or what stands so to it ("the thing above the cup")."""

    category: str
    relation: str = ""

    def __str__(self) -> str:
        return f"the thing {self.relation} the {self.category}" if self.relation else f"the {self.category}"

    def find(self, scene: Scene) -> SceneObject | None:
        """Return the one object that is meant; None if there is none, or more than one, or a doubtful one."""
        anchors = scene.find(self.category)
        if len(anchors) != 1:
            return None
        if not self.relation:
            return anchors[0]
        wanted = ("left of", "right of") if self.relation == BESIDE else (self.relation,)
        found = [(obj, relation_between(obj, anchors[0])) for obj in scene.objects if obj is not anchors[0]]
        fitting = [obj for obj, relation in found if relation in wanted]
        if len(fitting) != 1 or any(relation is None for _, relation in found):
            return None
        return fitting[0] if len(scene.find(fitting[0].category)) == 1 else None

    def steps(self, scene: Scene) -> list[str]:
        """Return the sentence that says which object is meant; none if the question names it."""
        found = self.find(scene)
        if not self.relation or found is None:
            return []
        relation = relation_between(found, scene.find(self.category)[0])
        return [f"the {found.category} is {relation} the {self.category}."]


def _yes(condition: bool) -> str:
    return "Yes" if condition else "No"


def _amount(scene: Scene, category: str) -> str:
    return f"{amount(scene, category)}."


def _amounts(scene: Scene, **fields: Any) -> list[str]:
    return [_amount(scene, category) for category in fields.values() if category in PARTNER]


def _look_facts(scene: Scene, thing: Thing, kind: str) -> list[str]:
    found = thing.find(scene)
    return [] if found is None else [*thing.steps(scene), f"the {found.category} is {getattr(found, kind)}."]


def _kind(look: str) -> str:
    return "color" if look in COLORS else "size" if look in SIZES else "texture"


def _attribute(scene: Scene, thing: Thing, look: str) -> str | None:
    found = thing.find(scene)
    return None if found is None else _yes(getattr(found, _kind(look)) == look)


def _color(scene: Scene, thing: Thing) -> str | None:
    found = thing.find(scene)
    return None if found is None else found.color


def _colors(scene: Scene, plural: str) -> str | None:
    return scene.find(plural)[0].color if scene.counts[plural] > 1 else None


def _place(scene: Scene, thing: Thing) -> str | None:
    found = thing.find(scene)
    return None if found is None else COLUMN_PHRASES[found.column]


def _place_facts(scene: Scene, thing: Thing) -> list[str]:
    found = thing.find(scene)
    return [] if found is None else [*thing.steps(scene), f"the {found.category} is {COLUMN_PHRASES[found.column]}."]


def _true_relation(scene: Scene, noun: str, other: str) -> str | None:
    a, b = Thing(noun).find(scene), Thing(other).find(scene)
    return None if a is None or b is None else relation_between(a, b)


def _relation(scene: Scene, noun: str, relation: str, other: str) -> str | None:
    true = _true_relation(scene, noun, other)
    return true and _yes(true == relation)


def _relation_facts(scene: Scene, noun: str, relation: str, other: str) -> list[str]:
    true = _true_relation(scene, noun, other)
    return [f"the {noun} is {true} the {other}."] if true else _amounts(scene, noun=noun, other=other)


def _identity(scene: Scene, relation: str, noun: str) -> str | None:
    found = Thing(noun, relation).find(scene)
    return None if found is None else f"the {found.category}"


def _larger(scene: Scene, noun: str, other: str) -> str | None:
    a, b = Thing(noun).find(scene), Thing(other).find(scene)
    return None if a is None or b is None else _yes(a.extent > b.extent)


def _which(scene: Scene, thing: Thing, second: Thing) -> str | None:
    a, b = thing.find(scene), second.find(scene)
    if a is None or b is None or a.size == b.size:
        return None
    return f"the {(a if a.extent > b.extent else b).category}"


def _sizes(scene: Scene, **things: Any) -> list[str]:
    whole = [thing if isinstance(thing, Thing) else Thing(thing) for thing in things.values()]
    return [fact for thing in whole for fact in _look_facts(scene, thing, "size")]


def _options(options: str) -> dict[str, str]:
    return dict(re.findall(r"([A-D])\. (\w+)", options))


def _choice(scene: Scene, options: str) -> str | None:
    right = [letter for letter, category in _options(options).items() if scene.counts[category]]
    return right[0] if len(right) == 1 else None


def _choice_facts(scene: Scene, options: str) -> list[str]:
    answer = _choice(scene, options)
    return [_amount(scene, _options(options)[answer])] if answer else []


def _existence_facts(scene: Scene, noun: str) -> list[str]:
    if scene.counts[noun]:
        return [_amount(scene, noun)]
    shown = join_words([noun_phrase(scene, category) for category in scene.categories])
    return [f"there is no {noun}.", f"the image shows {shown}."]


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of question.

    Attributes:
        pattern: its text, with fields in braces.
        skill: see `SKILLS`; a question with a `Thing` that is named by its relation is `two-step` instead.
        answer: the right answer, from the scene and the fields; None where the scene does not decide it.
        facts: sentences on what the image shows that decide it, in steps.
    """

    pattern: str
    skill: str
    answer: Callable[..., str | None]
    facts: Callable[..., list[str]]


FORMS: Mapping[str, Form] = {
    "existence": Form(
        "Is there {article} in the image?",
        "existence",
        lambda scene, noun: _yes(scene.counts[noun] > 0),
        _existence_facts,
    ),
    "attribute": Form(
        "Is {thing} {look}?",
        "attribute",
        _attribute,
        lambda scene, thing, look: _look_facts(scene, thing, _kind(look)),
    ),
    "color": Form(
        "What colour is {thing}?", "attribute", _color, lambda scene, thing: _look_facts(scene, thing, "color")
    ),
    "colors": Form("What colour are the {plural}?", "attribute", _colors, _amounts),
    "count": Form(
        "How many {plural} are there?", "count", lambda scene, plural: NUMBERS[scene.counts[plural]], _amounts
    ),
    "at least": Form(
        "Are there at least {number} {plural}?",
        "count",
        lambda scene, number, plural: _yes(scene.counts[plural] >= NUMBERS.index(number)),
        _amounts,
    ),
    "exactly": Form(
        "Are there exactly {number} {plural}?",
        "count",
        lambda scene, number, plural: _yes(scene.counts[plural] == NUMBERS.index(number)),
        _amounts,
    ),
    "place": Form("Where is {thing}?", "relation", _place, _place_facts),
    "relation": Form("Is the {noun} {relation} the {other}?", "relation", _relation, _relation_facts),
    "identity": Form(
        "What is {relation} the {noun}?",
        "relation",
        _identity,
        lambda scene, relation, noun: Thing(noun, relation).steps(scene),
    ),
    "more": Form(
        "Are there more {plural} than {others}?",
        "comparison",
        lambda scene, plural, others: _yes(scene.counts[plural] > scene.counts[others]),
        _amounts,
    ),
    "larger": Form("Is the {noun} larger than the {other}?", "comparison", _larger, _sizes),
    "which": Form("Which is larger, {thing} or {second}?", "comparison", _which, _sizes),
    "choice": Form("Which of these is in the image? {options}", "", _choice, _choice_facts),
    "description": Form(DESCRIBE, "", describe, lambda scene: [describe(scene)]),
}
"""All questions, by name."""

_THING = rf"the (?:(?:thing|one) (?:{'|'.join((*RELATIONS, BESIDE))}) the )?(?:{'|'.join(CATEGORIES)})"
_FIELDS: Mapping[str, str] = {
    "article": rf"an? (?:{'|'.join(CATEGORIES)})",
    "noun": "|".join(CATEGORIES),
    "other": "|".join(CATEGORIES),
    "plural": "|".join(NOUNS),
    "others": "|".join(NOUNS),
    "thing": _THING,
    "second": _THING,
    "look": "|".join(LOOKS),
    "number": "|".join(NUMBERS[2:]),
    "relation": "|".join(RELATIONS),
    "options": r"(?:[A-D]\. \w+ ?)+",
}


@functools.cache
def _regex(form: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", FORMS[form].pattern)
    return re.compile(
        "".join(f"(?P<{part}>{_FIELDS[part]})" if n % 2 else re.escape(part) for n, part in enumerate(parts))
    )


def _write(field: str, value: Any) -> str:
    match field:
        case "noun":
            return str(value)
        case "plural" | "others":
            return plural(value)
        case "second":
            return str(value).replace("the thing", "the one")
    return str(value)


def _read(field: str, text: str) -> Any:
    if field in ("plural", "others", "article"):
        return NOUNS[text.split()[-1]]
    if field in ("thing", "second"):
        *words, category = text.split()
        return Thing(category, " ".join(words[2:-1]))
    return text


@dataclasses.dataclass(frozen=True)
class Query:
    """A question: a form with its fields.

    Attributes:
        form: name in `FORMS`.
        fields: (name, value) of the form's fields; values are categories, `Thing`s and words.
    """

    form: str
    fields: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def make(form: str, **fields: Any) -> Query:
        """Return the question of a form with these fields."""
        return Query(form, tuple(fields.items()))

    @staticmethod
    def parse(text: str) -> Query | None:
        """Return the question that a text asks, or None if it is of no form."""
        for form in FORMS:
            if match := _regex(form).fullmatch(text):
                return Query(
                    form,
                    tuple(("noun" if f == "article" else f, _read(f, value)) for f, value in match.groupdict().items()),
                )
        return None

    @property
    def text(self) -> str:
        """The question in words."""
        words = {field: _write(field, value) for field, value in self.fields}
        if self.form == "existence":
            words["article"] = with_article(words["noun"])
        return FORMS[self.form].pattern.format(**words)

    @property
    def skill(self) -> str:
        """What the question tests, see `SKILLS`; empty for choices and descriptions."""
        indirect = any(isinstance(value, Thing) and value.relation for _, value in self.fields)
        return "two-step" if indirect else FORMS[self.form].skill

    @property
    def options(self) -> dict[str, str]:
        """Categories of a choice by letter; empty for other questions."""
        return _options(dict(self.fields).get("options", ""))

    def answer(self, scene: Scene) -> str | None:
        """Return the right answer; None where the scene does not decide it ("the cup" of two)."""
        return FORMS[self.form].answer(scene, **dict(self.fields))

    def facts(self, scene: Scene) -> list[str]:
        """Return sentences, without capitals, on what the image shows that decide the question, in steps."""
        return FORMS[self.form].facts(scene, **dict(self.fields))

    def subjects(self, scene: Scene) -> frozenset[str]:
        """Return the categories that the question is about: those it names, and those it means by a relation."""
        found = {category for category in self.options.values() if scene.counts[category]}
        for _, value in self.fields:
            if isinstance(value, Thing):
                obj = value.find(scene)
                found |= {value.category} | ({obj.category} if obj else set())
            elif value in PARTNER:
                found.add(value)
        if self.form == "identity":
            fields = dict(self.fields)
            obj = Thing(fields["noun"], fields["relation"]).find(scene)
            found |= {obj.category} if obj else set()
        return frozenset(found) if self.form != "description" else frozenset(scene.categories)

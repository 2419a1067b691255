"""Identity of a run: any change of records or recipe is seen, and named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.train.identity import ResumeError, check_identity, read_identity, recipe_fields, records_digest
from reverie_jax.train.recipe import Recipe
from reverie_jax.train.recipes import RECIPES

texts, kinds = st.text(max_size=4), st.sampled_from(["", "positive", "negative"])
talks = st.lists(st.tuples(texts, texts, kinds, texts), max_size=3)
rows = st.lists(st.tuples(texts, st.binary(max_size=4), talks), max_size=4)


def records(rows):
    """Return records of plain values; called in tests, for no type check may run inside of a strategy."""
    return [
        ImageRecord(
            id,
            image,
            tuple(
                Conversation((Turn("user", asked), Turn("assistant", answer)), (), kind=kind, dataset=dataset)
                for asked, answer, kind, dataset in talks
            ),
        )
        for id, image, talks in rows
    ]


@given(rows, rows)
def test_digests_are_equal_if_and_only_if_the_records_are(some, others):
    digest = records_digest(records(some))
    assert (digest == records_digest(records(others))) == (some == others)
    copies = [ImageRecord.from_parts(one.id, one.image, one.conversations_json()) for one in records(some)]
    assert records_digest(copies) == digest


@given(rows.filter(bool), st.data())
def test_a_moved_border_between_parts_changes_the_digest(some, data):
    """Ids, images and texts that are the same when joined."""
    number = data.draw(st.integers(0, len(some) - 1))
    id, image, talks = some[number]
    digests = {records_digest(records(some))}
    for other in ((f"{id}a", b"b" + image, talks), (f"{id}ab", image, talks), (id, b"ab" + image, talks)):
        digests.add(records_digest(records([*some[:number], other, *some[number + 1 :]])))
    assert len(digests) == 4


def flat(fields, prefix=""):
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def changed(fields, name):
    """Return the fields with one of them, which may be nested, changed."""
    outer, _, inner = name.partition(".")
    value = fields[outer]
    return {**fields, outer: changed(value, inner) if inner else ("other" if value != "other" else None)}


RUN = {"base": {}, "weights": "", "records": "", "inputs": "", "dtype": ""}


@pytest.mark.parametrize("recipe", [RECIPES["scenes-rationales"], RECIPES["rlaifv-dpo"]], ids=lambda one: one.name)
def test_every_field_of_a_recipe_that_differs_is_named(recipe, tmp_path):
    stored = recipe_fields(recipe)
    check_identity(tmp_path, RUN | {"recipe": stored}, RUN | {"recipe": stored})
    for name in flat(stored):
        with pytest.raises(ResumeError, match=rf"{tmp_path}: .* {name} is .*, the run has "):
            check_identity(tmp_path, RUN | {"recipe": stored}, RUN | {"recipe": changed(stored, name)})


def test_recipes_with_and_without_pairs_differ(tmp_path):
    with pytest.raises(ResumeError, match="preference"):
        check_identity(
            tmp_path,
            {"recipe": recipe_fields(RECIPES["llava-1.5-7b-lora"])},
            {"recipe": recipe_fields(RECIPES["rlaifv-dpo-lora"])},
        )


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"base": []}', '{"base": {}, "recipe": {"name": "a"}}', "\xff"]
)
def test_a_file_that_identifies_no_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ResumeError, match=str(tmp_path / "run.json")):
        read_identity(tmp_path)


def test_fields_that_a_file_lacks_have_their_defaults(tmp_path):
    recipe = RECIPES["scenes-rationales"]
    fields = {name: value for name, value in recipe_fields(recipe).items() if name != "seed"}
    (tmp_path / "run.json").write_text(json.dumps({"base": {"vision": "1"}, "recipe": fields}))
    stored = read_identity(tmp_path)
    assert Recipe.from_json(json.dumps(stored["recipe"])) == recipe
    assert (stored["base"], stored["records"]) == ({"vision": "1"}, "")

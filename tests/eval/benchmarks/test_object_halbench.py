"""Object HalBench: objects that a judge lists, normalised and matched; rates over responses that name one."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.interface import BenchmarkError
from reverie_jax.eval.benchmarks.object_halbench import ObjectHalBench
from tests.eval.benchmarks import makers_free as make

# Segments and captions by image, and what is there by the rule. Captions are read by lemmas: "bus" is found, "men" not.
IMAGES = {
    11: (["dog", "dog"], ["A woman walks.", "A dog on the grass."]),
    12: (["cat"], ["A kitten sleeps on a sofa.", "Two men watch."]),
    13: ([], ["A bus on a road."]),
    14: (["couch", "tv"], ["A television."]),
}
TRUTH = {11: {"dog", "person"}, 12: {"cat", "couch"}, 13: {"bus"}, 14: {"couch", "tv"}}
ASKED = "Give me a thorough account of the picture."


def files(folder, images=IMAGES):
    make.coco(folder, images)
    rows = [
        {
            "image_id": image,
            "question": f"{ASKED} {image}",
            "image": base64.b64encode(make.PICTURE + bytes([image])).decode(),
        }
        for image in images
    ]
    make.lines(folder / "obj_halbench_300_with_image.jsonl", rows)
    return folder


# As WordNet's and spaCy's lemmas are: WordNet keeps "men" and "people", which are words of their own there.
LEMMAS = {
    **{"dogs": "dog", "buses": "bus", "geese": "goose", "women": "woman", "children": "child", "glasses": "glass"},
    **{"skis": "ski", "lights": "light", "kittens": "kitten"},
}
OTHER = {"a": "DT", "young": "JJ", "red": "JJ", "of": "IN", "and": "CC", "1": "CD", "[": "-LRB-", "]": "-RRB-"}


def lemma(word: str) -> str:
    return LEMMAS.get(word, word)


def tagger(text: str) -> list[tuple[str, str]]:
    """In place of spaCy's: what is no known other word is a noun."""
    words = [word.lower() for word in re.findall(r"\w+|\S", text)]
    return [(LEMMAS.get(word, word), OTHER.get(word, "NN")) for word in words]


@pytest.fixture(scope="module")
def bench():
    assert isinstance(find_benchmark("object-halbench"), ObjectHalBench)
    return ObjectHalBench(tagger, lemma)


@pytest.fixture(scope="module")
def loaded(bench, tmp_path_factory):
    return bench.load(files(tmp_path_factory.mktemp("hal")))


LONG = "It is a long and winding answer."


def score(bench, loaded, replies, texts=None, **more):
    """Replies in the questions' order; answers too, by default seven words each."""
    answers = make.by_question(loaded, texts or [LONG] * len(loaded.questions))
    written = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]
    return bench.score(loaded, answers, replies=make.by_question(loaded, written), **more)


def metric(scored, *names: str) -> float:
    return make.value(scored, *names)


def response(scored) -> float:
    return make.headline(scored)


def mention(scored) -> float:
    return metric(
        scored, "CHAIRi", "mention", "object hallucination", "object_hall", "mention hallucination", "Object Hall"
    )


def test_rates(bench, loaded):
    # dog, person right; cat wrong: 3 mentions. couch right. Nothing of COCO. tv right, kite wrong twice by two words.
    scored = score(
        bench, loaded, [["dog", "woman", "cat"], ["sofa"], ["road", "sky"], ["television", "kite", "groom", "man"]]
    )
    assert response(scored) == pytest.approx(100 * 2 / 3)  # of responses that name one of COCO's objects
    assert mention(scored) == pytest.approx(100 * 4 / 8)
    assert metric(scored, "obj_rec", "recall", "object recall") == pytest.approx(100 * 4 / 7)
    assert metric(scored, "CHAIRs") == pytest.approx(100 * 2 / 4)
    assert metric(scored, "avg_word_len", "mean length", "length", "average length") == pytest.approx(7)
    make.sound(loaded, scored)


def single(bench, tmp_path, objects, there=(), caption="Nothing."):
    """Mentions and wrong ones of one response, from its published numbers beside one of a single right mention."""
    folder = files(tmp_path, {1: (list(there), [caption]), 2: (["zebra"], ["So."])})
    loaded = bench.load(folder)
    scored = score(bench, loaded, [objects, ["zebra"]])
    cluster = {q.id: scored.clusters.index(q.cluster) for q in loaded.questions}
    first = scored.counts[cluster[loaded.questions[0].id]]
    name = next(name for name in scored.metrics if make.folded(name) in MENTION)
    wrong, share = (float(scored.metrics[name](sums)) / 100 for sums in (first, scored.counts.sum(0)))
    # wrong = h / n, share = h / (n + 1); with nothing wrong the recall of what is there tells.
    if wrong == 0:
        return 0, scored
    n = round(share / (wrong - share))
    return n, round(wrong * n)


MENTION = {"chairi", "mention", "objecthallucination", "objecthall", "mentionhallucination", "mentions", "object"}


@pytest.mark.parametrize(
    ("objects", "mentions"),
    [
        (["dog"], 1),
        (["dog", "dogs", "dog"], 1),  # de-duplicated once it is a lemma
        (["Dog"], 1),
        (["man", "groom"], 2),  # two words of one class are two mentions
        (["dog", "puppy"], 2),
        (["wine glass", "wine glasses"], 1),
        (["coffee table"], 1),
        (["remote control"], 1),
        (["brother", "pedestrian"], 2),
        (["motor bike"], 1),  # the refined list has no stray space
        (["cheesecake"], 1),
        (["toilet", "seat"], 1),
        (["toilet seat"], 1),
        (["seat"], 1),
        (["bow tie"], 1),
        (["baby elephant"], 1),
        (["passenger jet"], 1),
        (["hot dog"], 1),
        (["teddy bear"], 1),
        (["bus"], 1),
        (["buses"], 1),
        (["traffic lights"], 1),
        (["tennis racket"], 1),
        (["cell phone", "phone"], 2),
        (["dog", "sky", "road", "happiness"], 1),  # what is not COCO's is passed over
        (["home plate", "kite"], 1),
        (["train track", "kite"], 1),
    ],
    ids=str,
)
def test_objects_become_classes(bench, tmp_path, objects, mentions):
    assert single(bench, tmp_path, objects) == (mentions, mentions)


def test_an_object_is_its_known_pairs_or_else_its_runs_of_nouns(bench, tmp_path):
    """ "young man and woman": two runs. "red wine glass": the pair, and nothing else. "police dog": one run, no class."""
    assert single(bench, tmp_path / "1", ["young man and woman"]) == (2, 2)
    assert single(bench, tmp_path / "2", ["red wine glass of a woman"]) == (1, 1)
    assert single(bench, tmp_path / "3", ["police dog", "kite"]) == (1, 1)


@pytest.mark.parametrize("reply", ['[["dog"]]', "[1, 2]", '[{"name": "dog"}]', "[null]"])
def test_a_list_of_other_things_than_words_is_no_reason_to_fail(bench, loaded, reply):
    assert np.isfinite(list(score(bench, loaded, [reply] * 4).values().values())).all()


@pytest.mark.parametrize("objects", [[], ["sky"], ["train track"], ["home plate"], ["iPhone"], ["hair dryer"]], ids=str)
def test_what_is_no_object_of_coco(bench, tmp_path, objects):
    loaded = bench.load(files(tmp_path, {1: ([], ["Nothing."]), 2: (["zebra"], ["So."])}))
    scored = score(bench, loaded, [objects, ["zebra", "kite"]])
    assert response(scored) == 100  # one response names something, and something wrong
    assert metric(scored, "CHAIRs") == 50


REPLIES = {
    '["dog", "kite"]': 2,
    '[\n  "dog",\n  "kite"\n]': 2,
    'Here they are:\n["dog", "kite"]': 2,
    '["dog"]\n["kite", "dog"]': 2,  # not JSON as a whole: its last line is
    "[]": 0,
}


@pytest.mark.parametrize("reply", REPLIES, ids=repr)
def test_reply_is_read(bench, tmp_path, reply):
    loaded = bench.load(files(tmp_path, {1: ([], ["Nothing."]), 2: (["zebra"], ["So."])}))
    scored = score(bench, loaded, [reply, ["zebra"]])
    wrong = REPLIES[reply]
    assert mention(scored) == pytest.approx(100 * wrong / (wrong + 1))
    assert scored.protocol["unread_replies"] == 0  # a list of nothing is no failure


NO_LISTS = [
    *(
        "",
        "dog, kite",
        "No objects.",
        '["dog", "kite"',
        '["dog"]\nThat is all.',
        "[dog, kite]",
        "['dog', 'kite']",
        "()",
    ),
    *('"dog"', '{"objects": ["dog"]}', "3", "null"),
]


@pytest.mark.parametrize("reply", NO_LISTS, ids=repr)
def test_reply_that_is_no_list_is_counted_as_unread(bench, tmp_path, reply):
    """Upstream asks again up to a hundred times, then fails; a string or an object gets past its parser and breaks later."""
    loaded = bench.load(files(tmp_path, {1: ([], ["Nothing."]), 2: (["zebra"], ["So."])}))
    scored = score(bench, loaded, [reply, ["zebra"]])
    assert [reading.unparsed for reading in scored.parsed_answers] == [True, False]
    assert scored.protocol["unread_replies"] == 1
    assert mention(scored) == 0


PROMPTS = {"object_halbench": "Q[{question}] A[{answer}]"}


def test_judge_is_not_asked_about_three_words(bench, loaded):
    texts = ["A dog.", "Only three words", " four words are here ", "It has {question}, {nothing} in it."]
    answers = make.by_question(loaded, texts)
    asked = bench.judge_requests(loaded, answers, "official", PROMPTS)
    ids = [str(question.id) for question in loaded.questions]
    assert [request.id for request in asked] == ids[2:]
    assert texts[3] in asked[1].prompt
    assert f"{ASKED} 14" in asked[1].prompt
    # And their lists are empty without a reply.
    scored = bench.score(loaded, answers, replies={ids[2]: '["kite"]', ids[3]: '["tv"]'})
    assert response(scored) == 50
    assert metric(scored, "CHAIRs") == 25


def test_length_is_in_words_between_single_spaces(bench, loaded):
    texts = ["one two", "one  two", " one\ntwo three ", ""]
    scored = bench.score(
        loaded,
        make.by_question(loaded, texts),
        replies={str(question.id): "[]" for question in loaded.questions},
    )
    assert metric(scored, "avg_word_len", "mean length", "length", "average length") == pytest.approx(
        (2 + 3 + 2 + 1) / 4
    )


def test_nothing_named_at_all(bench, loaded):
    scored = score(bench, loaded, [[]] * 4)
    assert response(scored) == mention(scored) == metric(scored, "CHAIRs") == 0
    make.sound(loaded, scored)


def test_any_responses_sums_are_their_own_score(bench, loaded):
    lists = [["dog", "woman", "cat"], ["sofa"], ["road"], ["television", "kite"]]
    scored = score(bench, loaded, lists)
    wrong, named, all_mentions = np.array([1, 0, 0, 1]), np.array([1, 1, 0, 1]), np.array([3, 1, 0, 2])
    cluster = [scored.clusters.index(question.cluster) for question in loaded.questions]
    for bits in range(1, 16):
        at = [n for n in range(4) if bits >> n & 1]
        sums = scored.counts[[cluster[n] for n in at]].sum(0)
        wanted = 100 * wrong[at].sum() / named[at].sum() if named[at].sum() else 0.0
        assert float(next(iter(scored.metrics.values()))(sums)) == pytest.approx(wanted)
        name = next(name for name in scored.metrics if make.folded(name) in MENTION)
        wanted = 100 * wrong[at].sum() / all_mentions[at].sum() if all_mentions[at].sum() else 0.0
        assert float(scored.metrics[name](sums)) == pytest.approx(wanted)


def test_truth_is_segments_and_captions_by_lemma(bench, tmp_path):
    images = {
        1: ([], ["A bus and two buses.", "Children play.", "A man rides."]),
        2: ([], ["Two men stand."]),  # WordNet's lemma of "men" is "men", which is no word of the list
        3: (["kite"], ["Women with wine glasses on a coffee table."]),
        4: ([], ["A toilet seat.", "Geese on skis."]),
    }
    loaded = bench.load(files(tmp_path, images))
    there = [["bus", "child"], [], ["kite", "woman", "wine glass", "coffee table"], ["toilet", "goose", "ski"]]
    scored = score(bench, loaded, [there[0], ["man"], there[2], there[3]])
    wrong = [reading for reading in scored.parsed_answers if reading.right == 0]
    assert mention(scored) == pytest.approx(100 * 1 / 10)
    assert len(wrong) in (0, 1)  # where readings are marked right or wrong, one is wrong


@pytest.mark.parametrize("replies", [None, {}], ids=["none", "empty"])
def test_replies_are_needed(bench, loaded, replies):
    with pytest.raises(BenchmarkError) as error:
        bench.score(loaded, make.by_question(loaded, [LONG] * 4), replies=replies)
    assert "\n" not in str(error.value)


def test_a_stand_in_without_a_judge_is_labelled(bench, loaded):
    """The plain path reads the answer itself. It is never the default, and its protocol says what it is."""
    plain = [rule for rule in bench.rules if rule not in bench.judged_rules]
    assert plain, "no rule that goes without a judge"
    assert bench.rules[0] in bench.judged_rules
    texts = [
        "A dog and a kite are here.",
        "Two cats sleep on the sofa.",
        "Buses drive on the road.",
        "A bus is all there is.",
    ]
    scored = bench.score(loaded, make.by_question(loaded, texts), rule=plain[0])
    # CHAIR's words never find a single bus, not in the reference caption either: the buses are invented.
    assert response(scored) == pytest.approx(100 * 2 / 3)
    assert scored.protocol != score(bench, loaded, [[]] * 4).protocol
    make.sound(loaded, scored)


def test_questions_and_pictures_come_from_the_file(loaded):
    assert [question.text for question in loaded.questions] == [f"{ASKED} {image}" for image in IMAGES]
    assert len({question.cluster for question in loaded.questions}) == 4
    for question, image in zip(loaded.questions, IMAGES, strict=True):
        assert loaded.read_image(question.image) == make.PICTURE + bytes([image])


def test_file_names_decide_nothing(bench, tmp_path):
    """Upstream cuts answers where the name of their file holds "coh"."""
    folder = files(tmp_path / "cohort")
    loaded = bench.load(folder)
    said = "Generate a response without errors. A dog is here."
    assert score(bench, loaded, [["dog"]] * 4, [said] * 4).values()
    length = metric(
        score(bench, loaded, [["dog"]] * 4, [said] * 4), "avg_word_len", "mean length", "length", "average length"
    )
    assert length == len(said.split(" "))


@pytest.mark.parametrize(
    "lost", ["obj_halbench_300_with_image.jsonl", "instances_val2014.json", "captions_val2014.json"]
)
def test_a_missing_file_is_named(bench, tmp_path, lost):
    folder = files(tmp_path)
    (folder / lost).unlink()
    make.refused(bench, folder, lost.split("_")[0])


@pytest.mark.parametrize("lost", ["image_id", "question"])
def test_a_row_that_lacks_something_is_named(bench, tmp_path, lost):
    folder = files(tmp_path)
    path = folder / "obj_halbench_300_with_image.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[2][lost]
    make.lines(path, rows)
    make.refused(bench, folder, path.name, "2", lost)


@pytest.mark.parametrize("text", ["{", "3\n", "\xff"], ids=["cut off", "number", "no text"])
def test_a_broken_file_is_named(bench, tmp_path, text):
    folder = files(tmp_path)
    (folder / "obj_halbench_300_with_image.jsonl").write_bytes(text.encode("latin1"))
    make.refused(bench, folder, "obj_halbench_300_with_image.jsonl")


def test_a_picture_that_is_no_base64_is_refused(bench, tmp_path):
    folder = files(tmp_path)
    path = folder / "obj_halbench_300_with_image.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["image"] = "***"
    make.lines(path, rows)
    make.refused(bench, folder, path.name, "1")


def test_answer_file_in_the_official_form(bench, loaded, tmp_path):
    make.comes_back(bench, loaded, make.by_question(loaded, [LONG] * 4), tmp_path)


def test_a_question_without_an_answer_is_not_judged_and_counts_nowhere(bench, loaded):
    scored = make.partial(bench, loaded, PROMPTS, '["kite"]')
    assert response(scored) == metric(scored, "CHAIRs") == 100

"""Object HalBench: objects that a judge lists, normalized and matched; rates over responses that name one."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import chair_words, find_benchmark, object_halbench
from reverie_jax.eval.benchmarks.object_halbench import PLAIN, normalize
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.makers import IMAGE
from tests.eval.benchmarks.samples import COCO, answer_all, check, headline, ids, lemma, load, refused, tagger, value

LONG = "It is a long and winding answer."


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return load("object-halbench", make.object_halbench(tmp_path_factory.mktemp("hal"), COCO))


def score(sample, replies, answers=LONG):
    """Score replies (lists of objects, or texts) in the order of the questions."""
    bench, loaded = sample
    texts = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]
    return check(bench, loaded, answer_all(loaded, answers), replies=answer_all(loaded, texts))


def test_rates_by_hand(sample):
    # dog and person are right, cat is wrong; couch is right; nothing of COCO; tv is right, kite and two persons are wrong.
    lists = [["dog", "woman", "cat"], ["sofa"], ["road", "sky"], ["television", "kite", "groom", "man"]]
    scored = score(sample, lists)
    expected = {"CHAIRs_refine": 100 * 2 / 3, "CHAIRi": 100 * 4 / 8, "obj_rec": 100 * 4 / 7, "avg_word_len": 7}
    assert headline(scored) == value(scored, "CHAIRs_refine")  # of responses that name one of COCO's objects
    assert scored.values() == pytest.approx({**expected, "CHAIRs": 100 * 2 / 4})
    bench, loaded = sample
    pairs = zip(loaded.questions, scored.parsed_answers, strict=True)
    assert [list(bench.hallucinated(loaded, q, "", p)) for q, p in pairs] == [["cat"], [], [], ["kite", "person"]]
    wrong, named, mentions, wrongs = np.array([[1, 0, 0, 1], [1, 1, 0, 1], [3, 1, 0, 4], [1, 0, 0, 3]])
    for bits in range(1, 16):  # the sums of any responses are their own score
        at = [n for n in range(4) if bits >> n & 1]
        for name, over, under in (("CHAIRs_refine", wrong, named), ("CHAIRi", wrongs, mentions)):
            expected = 100 * over[at].sum() / under[at].sum() if under[at].sum() else 0.0
            assert value(scored, name, scored.counts[at].sum(0)) == pytest.approx(expected)


# What a judge lists, and how many mentions of COCO's classes that is.
MENTIONS = {
    0: [
        *([], ["sky"], ["train track"], ["home plate"], ["iPhone"], ["hair dryer"]),
        *([["dog"]], [1, 2], [{"name": "dog"}], [None]),
    ],
    1: [
        *(["dog", "dogs", "dog"], ["wine glass", "wine glasses"]),  # one lemma
        *(["home plate", "kite"], ["train track", "kite"], ["dog", "sky", "road", "happiness"], ["toilet", "seat"]),
        *(["red wine glass of a woman"], ["police dog", "kite"]),  # known pairs of words, or else runs of nouns
        *([name] for name in ("dog", "Dog", "coffee table", "remote control", "cheesecake", "toilet seat", "seat")),
        *([name] for name in ("bow tie", "baby elephant", "passenger jet", "hot dog", "teddy bear", "bus", "buses")),
        *([name] for name in ("traffic lights", "tennis racket", "motor bike")),  # the refined list has no stray space
    ],
    2: [
        *(["man", "groom"], ["dog", "puppy"], ["brother", "pedestrian"], ["cell phone", "phone"]),  # words of one class
        ["young man and woman"],
    ],
}


def test_objects_become_classes():
    words = chair_words.refined()
    for mentions, lists in MENTIONS.items():
        assert [(o, len(words.objects(normalize(o, words, tagger)))) for o in lists] == [(o, mentions) for o in lists]


def test_reply_without_a_list_is_counted_as_unread(sample):
    """The official script asks again up to a hundred times, then fails."""
    scored = score(sample, ["dog, kite", ["cat", "kite"], "[]", '{"objects": []}'])
    assert scored.protocol["unread_replies"] == 2
    assert [parsed.unparsed for parsed in scored.parsed_answers] == [True, False, True, True]
    assert value(scored, "CHAIRi") == 50


def test_judge_is_not_asked_about_short_answers(sample):
    bench, loaded = sample
    texts = ["A dog.", "Only three words", " four words are here ", "It has {question}, {nothing} in it."]
    answers = answer_all(loaded, texts)
    requests = bench.judge_requests(loaded, answers, "official", {"object_halbench": "Q[{question}] A[{answer}]"})
    assert [request.id for request in requests] == ids(loaded)[2:]
    assert requests[1].prompt == f"Q[Describe image 14.] A[{texts[3]}]"
    # Their lists are empty without a reply.
    scored = bench.score(loaded, answers, replies={"13": '["kite"]', "14": '["tv"]'})
    assert (headline(scored), value(scored, "CHAIRs")) == (50, 25)
    scored = score(sample, [[]] * 4, ["one two", "one  two", " one\ntwo three ", ""])  # between single spaces
    assert value(scored, "avg_word_len") == pytest.approx((2 + 3 + 2 + 1) / 4)
    assert headline(scored) == value(scored, "CHAIRi") == value(scored, "CHAIRs") == 0


def test_truth_is_segments_and_captions_by_lemma(tmp_path):
    images = {
        1: ([], ["A bus and two buses.", "Children play.", "A man rides."]),
        2: ([], ["Two men stand."]),  # WordNet's lemma of "men" is "men", which is not in the list
        3: (["kite"], ["Women with wine glasses on a coffee table."]),
        4: ([], ["A toilet seat.", "Geese on skis."]),
    }
    sample = load("object-halbench", make.object_halbench(tmp_path, images))
    lists = [["bus", "child"], ["man"], ["kite", "woman", "wine glass", "coffee table"], ["toilet", "goose", "ski"]]
    scored = score(sample, lists)
    assert value(scored, "CHAIRi") == pytest.approx(100 * 1 / 10)
    assert [parsed.right for parsed in scored.parsed_answers] == [1, 0, 1, 1]


def test_rule_without_a_judge_is_a_labeled_stand_in(sample):
    bench, loaded = sample
    assert bench.rules == ("official", PLAIN)
    texts = ["A dog and a kite are here.", "Two cats sleep on the sofa.", "Buses drive on the road.", "A bus is there."]
    scored = check(bench, loaded, answer_all(loaded, texts), PLAIN)
    # CHAIR's words never include a single bus, not in the reference caption either: the buses are invented.
    assert headline(scored) == pytest.approx(100 * 2 / 3)
    assert scored.protocol != score(sample, [[]] * 4).protocol


def test_questions_and_images_come_from_the_file(sample):
    _, loaded = sample
    assert [question.text for question in loaded.questions] == [f"Describe image {image}." for image in COCO]
    assert [loaded.read_image(q.image) for q in loaded.questions] == [IMAGE + bytes([image]) for image in COCO]


def test_missing_tools_are_named(sample, monkeypatch):
    """The rule without a judge needs none of them."""
    _, loaded = sample
    for name in ("nltk", "nltk.stem", "spacy"):
        monkeypatch.setitem(sys.modules, name, None)
    answers, replies = answer_all(loaded, LONG), answer_all(loaded, "[]")
    for tools, missing in (((None, lemma), "spaCy"), ((tagger, None), "WordNet")):
        object_halbench._spacy_tagger.cache_clear()
        object_halbench._wordnet_lemmatizer.cache_clear()
        with refused(missing, PLAIN):
            object_halbench.ObjectHalBench(*tools).score(loaded, answers, replies=replies)
    assert find_benchmark("object-halbench").name == "object-halbench"

"""What each arm of the ablation teaches, said once more by brute force: which words, after which words, how often."""

import collections
import dataclasses
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.sources import ReadLog, lrv
from reverie_jax.data.sources.reverie import explains
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder
from reverie_jax.data.tree import build_tree
from tests.data.fakes import IMAGE_ID, Given, WordTokenizer

KINDS = ("responses", "positive", "negative", "rationales")
ANSWERS = ("once", "as-published")
CONTEXTS = ("separate", "positive-first", "negative-first")
PROMPTS = ("as-written", "bare", "guided", "guided-length", "guided-type")
GUIDANCE = "Including any necessary facts or knowledge"


def conversation(kind, *texts, weight=1.0, pair=""):
    """The first question shows the picture."""
    said = [f"{IMAGE}\n{texts[0]}", *texts[1:]]
    turns = tuple(Turn(("user", "assistant")[n % 2], text, weight if n % 2 else 1.0) for n, text in enumerate(said))
    return Conversation(turns, kind=kind, pair=pair)


def reflective(kind, question, answer, why, wrong="Nothing", weight=1.0):
    """As REVERIE publishes it."""
    asked = "Explain why." if kind == "positive" else f"Explain why this answer is wrong: {wrong}."
    return conversation(kind, question, answer, f"{asked} {GUIDANCE}", why, weight=weight)


# Few questions and answers, so that rationales share them; a number makes each rationale one of a kind.
forms = st.sampled_from(["positive", "negative"] * 3 + ["short", "talk", "chosen", "rejected"])
questions, answers = st.sampled_from(["Is it red?", "What is it?"]), st.sampled_from(["Yes", "A cup."])
plans = st.lists(st.tuples(forms, questions, answers), min_size=1, max_size=7)
arms = st.tuples(*map(st.sampled_from, (KINDS, ANSWERS, CONTEXTS, PROMPTS)))


def built(plan, weights=(1.0,) * 7):
    """The conversations of a record. Not a strategy: what is checked as it is built draws random numbers of its own."""
    found = []
    for number, ((form, question, answer), weight) in enumerate(zip(plan, weights, strict=False)):
        match form:
            case "positive" | "negative":
                found.append(reflective(form, question, answer, f"Because {number}.", f"Wrong {number}", weight))
            case "short":
                found.append(conversation("", question, answer, weight=weight))
            case "talk":
                more = ("And who?", f"You {number}.", "Explain why.", "So.")
                found.append(conversation("", question, answer, *more, weight=weight))
            case _:
                found.append(conversation(form, question, f"{form} {number}", weight=weight, pair=str(number)))
    return found


def taught(conversations):
    """(words before, words taught, weight) of everything that is, and how often."""
    found = collections.Counter()
    for one in conversations:
        for place in range(1, len(one.turns), 2):
            if one.turns[place].weight != 0:
                before = tuple(turn.text for turn in one.turns[:place])
                found[before, one.turns[place].text, one.turns[place].weight] += 1
    return found


def is_long(one):
    return one.kind in ("positive", "negative") and len(one.turns) > 2


# Kinds, and answers once or as published.


def wanted(conversations, kinds, how_often, answer_weight=1.0, rationale_weight=1.0):
    """What separate conversations should teach, said without the code's help."""
    found, seen = collections.Counter(), set()
    for one in conversations:
        texts = tuple(turn.text for turn in one.turns)
        weight = one.turns[1].weight
        if one.kind == "rejected":
            continue
        if one.kind not in ("positive", "negative"):
            for place in range(1, len(texts), 2):
                found[texts[:place], texts[place], one.turns[place].weight] += 1
            continue
        if how_often == "as-published" or texts[:2] not in seen:
            found[texts[:1], texts[1], weight * answer_weight] += 1
        seen.add(texts[:2])
        if len(texts) > 2 and kinds in (one.kind, "rationales"):
            found[texts[:3], texts[3], weight * rationale_weight] += 1
    return collections.Counter({key: count for key, count in found.items() if key[2] != 0})


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("how_often", ANSWERS)
@given(plan=plans)
def test_kinds_and_answers_teach_what_they_say(kinds, how_often, plan):
    record = built(plan)
    assert taught(Supervision(kinds, how_often)(record)) == wanted(record, kinds, how_often)


@settings(max_examples=60)
@given(
    plan=plans,
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=7, max_size=7),
    kinds=st.sampled_from(KINDS),
    how_often=st.sampled_from(ANSWERS),
    answer=st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    rationale=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_weights_multiply_what_parts_weigh(plan, weights, kinds, how_often, answer, rationale):
    record = built(plan, weights)
    arm = Supervision(kinds, how_often, answer_weight=answer, rationale_weight=rationale)
    assert taught(arm(record)) == wanted(record, kinds, how_often, answer, rationale)


@given(plan=plans, arm=arms)
def test_nothing_is_left_that_teaches_nothing_and_no_order_changes(plan, arm):
    record = built(plan)
    arm = Supervision(*arm)
    found = arm(record)
    assert all(any(turn.weight > 0 for turn in one.turns[1::2]) for one in found)
    assert [one for one in found if one.kind in ("", "chosen")] == [one for one in record if one.kind in ("", "chosen")]
    assert all(one.kind != "rejected" for one in found)
    numbers = {tuple(turn.text for turn in one.turns[:2]): place for place, one in reversed([*enumerate(record)])}
    firsts = list(dict.fromkeys(numbers[tuple(turn.text for turn in one.turns[:2])] for one in found))
    assert firsts == sorted(firsts)


@given(plan=plans)
def test_an_arm_changes_nothing_that_it_was_given(plan):
    record = built(plan)
    before = [dataclasses.replace(one) for one in record]
    for arm in (Supervision(), Supervision("negative"), Supervision(context="positive-first", prompts="guided")):
        assert arm(record) == arm(record)
        assert arm(tuple(record)) == arm(record)
    assert record == before


def test_answers_are_taught_in_full_by_every_arm():
    record = [reflective(kind, "Q?", "A.", f"{kind}.") for kind in ("negative", "positive", "negative")]
    for arm in itertools.product(KINDS, ANSWERS, CONTEXTS, PROMPTS):
        found = taught(Supervision(*arm)(record))
        assert found[((f"{IMAGE}\nQ?",), "A.", 1.0)] >= 1


def test_as_published_answers_count_once_a_rationale():
    record = [
        reflective("positive", "Q?", "A.", "So."),
        *(reflective("negative", "Q?", "A.", f"No {n}.") for n in range(3)),
    ]
    for kinds in KINDS:
        found = taught(Supervision(kinds, "as-published")(record))
        assert found[((f"{IMAGE}\nQ?",), "A.", 1.0)] == 4


def test_a_weight_of_nothing_teaches_the_rest():
    record = [reflective("positive", "Q?", "A.", "So."), reflective("negative", "Q?", "A.", "No.")]
    assert [text for _, text, _ in taught(Supervision(answer_weight=0)(record))] == ["So.", "No."]
    assert [text for _, text, _ in taught(Supervision(rationale_weight=0)(record))] == ["A."]
    assert Supervision("responses", answer_weight=0)(record) == []
    assert Supervision(answer_weight=0, rationale_weight=0)(record) == []


def test_the_first_that_teaches_an_answer_may_be_cut_from_its_rationale():
    record = [reflective("negative", "Q?", "A.", "No."), reflective("positive", "Q?", "A.", "So.")]
    cut, whole = Supervision("positive")(record)
    assert [turn.text for turn in cut.turns] == [f"{IMAGE}\nQ?", "A."]
    assert [turn.weight for turn in whole.turns[1::2]] == [0, 1]


def test_an_answer_that_weighs_nothing_in_one_row_is_taught_by_another():
    record = [reflective("positive", "Q?", "A.", "So.", weight=0.0), reflective("negative", "Q?", "A.", "No.")]
    assert taught(Supervision()(record))[((f"{IMAGE}\nQ?",), "A.", 1.0)] == 1


# Contexts.


def joined(record, first, kinds="rationales"):
    """The texts of each conversation, in order: the n-th rationales of both kinds together, where both are there."""
    ranks, rank_of = collections.Counter(), {}
    for place, one in enumerate(record):
        if is_long(one) and kinds == "rationales":
            key = (one.turns[0].text, one.turns[1].text, one.kind)
            rank_of[place] = (*key, ranks[key])
            ranks[key] += 1
    place_of = {rank: place for place, rank in rank_of.items()}
    found = []
    for place, one in enumerate(record):
        if one.kind == "rejected":
            continue
        texts = [turn.text for turn in one.turns]
        if is_long(one) and kinds not in ("rationales", one.kind):
            texts = texts[:2]
        if place in rank_of:
            *key, kind, rank = rank_of[place]
            partner = place_of.get((*key, "negative" if kind == "positive" else "positive", rank))
            if partner is not None and partner < place:
                continue
            if partner is not None:
                other = [turn.text for turn in record[partner].turns]
                texts = texts + other[2:] if kind == first else other + texts[2:]
        found.append(texts)
    return found


@pytest.mark.parametrize("first", ["positive", "negative"])
@given(plan=plans)
def test_contexts_join_the_nth_rationales_of_both_kinds(first, plan):
    record = built(plan)
    arm = Supervision("rationales", "as-published", f"{first}-first")
    assert [[turn.text for turn in one.turns] for one in arm(record)] == joined(record, first)


@pytest.mark.parametrize("first", ["positive", "negative"])
@pytest.mark.parametrize("kinds", KINDS[:3])
@given(plan=plans)
def test_contexts_change_nothing_where_one_kind_is_missing(first, kinds, plan):
    record = built(plan)
    separate, together = (
        Supervision(kinds, "as-published", context)(record) for context in ("separate", f"{first}-first")
    )
    assert together == separate
    assert [[turn.text for turn in one.turns] for one in together] == joined(record, first, kinds)


@given(plan=plans, context=st.sampled_from(CONTEXTS), how_often=st.sampled_from(ANSWERS))
def test_contexts_lose_and_double_no_rationale(plan, context, how_often):
    record = built(plan)
    found = Supervision("rationales", how_often, context)(record)
    said = collections.Counter((turn.text, turn.weight) for one in found for turn in one.turns[3::2])
    rationales = [(one.turns[3].text, 1.0) for one in record if is_long(one)]
    talk = [(turn.text, 1.0) for one in record if one.kind == "" for turn in one.turns[3::2]]
    assert said == collections.Counter(rationales + talk)
    for one in found:
        for asked, why in zip(one.turns[2::2], one.turns[3::2], strict=True):
            if number := re.fullmatch(r"Because (\d+)\.", why.text):
                place = int(number[1])
                assert asked == record[place].turns[2]
                assert one.turns[:1] == record[place].turns[:1]
                assert one.turns[1].text == record[place].turns[1].text


def test_leftovers_stay_alone_and_in_their_places():
    record = [
        reflective("negative", "Q?", "A.", "No 0.", "w0"),
        reflective("negative", "Q?", "A.", "No 1.", "w1"),
        reflective("positive", "Other?", "A.", "Other."),
        reflective("positive", "Q?", "A.", "So 0."),
        reflective("positive", "Q?", "B.", "Because B."),
    ]
    for first, order in (("positive", ["So 0.", "No 0."]), ("negative", ["No 0.", "So 0."])):
        found = Supervision(context=f"{first}-first")(record)
        assert [[turn.text for turn in one.turns[3::2]] for one in found] == [
            order,
            ["No 1."],
            ["Other."],
            ["Because B."],
        ]
        assert [one.turns[1].weight for one in found] == [1, 0, 1, 1]
        for one in found:
            assert [turn.role for turn in one.turns] == ["user", "assistant"] * (len(one.turns) // 2)


def test_rationales_keep_the_weights_of_their_parts_in_one_talk():
    record = [
        reflective("positive", "Q?", "A.", "So.", weight=2.0),
        reflective("negative", "Q?", "A.", "No.", weight=0.5),
    ]
    (found,) = Supervision(context="negative-first", rationale_weight=3)(record)
    assert [(turn.text, turn.weight) for turn in found.turns[3::2]] == [("No.", 1.5), ("So.", 6.0)]


# Prompts.

wrong_answers = st.one_of(
    st.sampled_from(
        [
            "No",
            "B. glass",
            "It is a jug: an old one.",
            "3.5",
            "wrong: no",
            "Because this answer is wrong: yes",
            "two\nlines",
            "the U.S.",
            "Explain why",
            "(A)",
            '"quoted"',
            "a {b} %s \\1",
        ]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
        lambda text: any(c.isalnum() for c in text) and IMAGE not in text
    ),
)
why = st.integers(1, 60).map(lambda count: " ".join(["word"] * count))
WRITTEN = [
    "Explain why this answer is wrong: {}",
    "Explain why this answer is wrong: {}.",
    "Explain why this answer is wrong: {}. Including any necessary facts or knowledge.",
    "explain why this is incorrect: {}. Including any necessary facts or knowledge",
]


@pytest.mark.parametrize("prompts", PROMPTS[1:])
@given(wrong=wrong_answers, form=st.sampled_from(WRITTEN), why=why, question=questions)
def test_prompts_quote_the_wrong_answer_in_their_own_words(prompts, wrong, form, why, question):
    record = [
        conversation("negative", question, "Yes", form.format(wrong), why),
        conversation("positive", question, "Yes", "Explain why, please.", why),
    ]
    against, for_it = (one.turns[2].text for one in Supervision(prompts=prompts)(record))
    core = wrong.strip().rstrip(". ")
    assert core in against
    assert against.index(core) < len(against) - len(core) or prompts == "bare"
    assert explains(against)[0] == "negative"
    assert explains(for_it) == ("positive", "")
    assert (GUIDANCE in against.replace(core, "", 1)) == (GUIDANCE in for_it) == (prompts != "bare")
    assert for_it == against.replace(f"Explain why this answer is wrong: {core}.", "Explain why.", 1)


@given(plan=plans)
def test_prompts_as_written_stay_as_they_are(plan):
    record = built(plan)
    asked = {turn.text for one in record for turn in one.turns[2::2]}
    assert {turn.text for one in Supervision(prompts="as-written")(record) for turn in one.turns[2::2]} <= asked


@given(plan=plans, prompts=st.sampled_from(PROMPTS), context=st.sampled_from(CONTEXTS))
def test_prompts_change_only_the_words_that_ask_why(plan, prompts, context):
    record = built(plan)
    plain, other = (Supervision(context=context, prompts=one)(record) for one in ("as-written", prompts))
    assert len(plain) == len(other)
    for one, two in zip(plain, other, strict=True):
        assert one.turns[:2] == two.turns[:2]
        assert one.turns[1::2] == two.turns[1::2]
        if not is_long(one):
            assert one == two


def test_a_length_is_the_rationales_own_to_the_nearest_ten():
    for words in (1, 9, 26, 44, 57, 123):
        record = [reflective("negative", "Q?", "A.", " ".join(["word"] * words), "a 77 jug")]
        (found,) = Supervision(prompts="guided-length")(record)
        (said,) = map(int, re.findall(r"\d+", found.turns[2].text.replace("a 77 jug", "")))
        assert said == max(10, 10 * ((words + 5) // 10))


def test_a_line_for_the_type_depends_on_the_question_and_its_answer_alone():
    asked = {
        "yes/no": ("Is it red?", "No."),
        "choice": ("Which?\nA. a cup\nB. a jug", "A"),
        "short": ("What is it?", "a red cup"),
        "open": ("What is it?", "It is a cup that somebody has left there."),
    }
    lines = {}
    for kind, about in asked.items():
        record = [reflective(one, *about, why) for one in ("positive", "negative") for why in ("So.", "No, for this.")]
        found = {
            one.turns[2].text.split(GUIDANCE)[1]
            for one in Supervision(prompts="guided-type", answers="as-published")(record)
        }
        (lines[kind],) = found
    assert len(set(lines.values())) == 4


def test_what_asks_for_no_rationale_is_not_reworded():
    record = [conversation("positive", "Q?", "A.", "And what else?", "A jug.")]
    for prompts in PROMPTS:
        assert Supervision(prompts=prompts)(record) == record


@pytest.mark.parametrize("arm", [Supervision("responses"), Supervision(prompts="bare")], ids=["responses", "bare"])
def test_a_question_why_that_shows_the_picture_again_can_be_cut(tmp_path, arm):
    said = [f"{IMAGE}\nQ?", "A.", f"Explain why. {IMAGE}", "So."]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "conversations": turns}))
    talks = [talk.conversation for talk in sources.read(rows, ReadLog())]
    (found,) = arm(talks)
    assert found.turns[1].text == "A."


# Other talk.


@given(plan=plans, arm=arms)
def test_talk_of_many_turns_is_never_cut(plan, arm):
    record = built(plan)
    arm = Supervision(*arm)
    whole = conversation(
        "", "Is it red?", "Yes", "Explain why.", "It is.", "Explain why this answer is wrong: No", "So."
    )
    found = arm([*record, whole])
    assert found[-1] == whole


LRV = [
    {"image_id": 1, "question": "Is there a dog?", "answer": "There is no dog.", "task": "negative"},
    {"image_id": 1, "question": "What is there?", "answer": "A cup.", "task": "object existence"},
]


def lrv_record():
    return [talk.conversation for talk in lrv.talks(Given(LRV), ReadLog())]


def test_lrvs_two_turns_are_taught_by_every_arm():
    record = lrv_record()
    assert [one.kind for one in record] == ["negative", ""]
    for arm in itertools.product(KINDS, ANSWERS, CONTEXTS, PROMPTS):
        assert Supervision(*arm)(record) == record


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_lrvs_answers_weigh_the_same_whatever_their_task(weight):
    found = taught(Supervision(answer_weight=weight)(lrv_record()))
    assert len({weight for _, _, weight in found}) == 1
    assert len(found) in (0, 2)


# Again.


@given(
    plan=plans,
    kinds=st.sampled_from(KINDS),
    how_often=st.sampled_from(ANSWERS),
    prompts=st.sampled_from(PROMPTS[:3]),
)
def test_an_arm_on_what_it_made_changes_nothing_more(plan, kinds, how_often, prompts):
    record = built(plan)
    arm = Supervision(kinds, how_often, prompts=prompts)
    once = arm(record)
    assert arm(once) == once


@given(plan=plans)
def test_narrower_arms_after_wider_ones_are_the_narrower_ones(plan):
    record = built(plan)
    for kinds in KINDS:
        narrow = Supervision(kinds, "as-published")
        assert narrow(Supervision(answers="as-published")(record)) == narrow(record)


# Trees.


def loss_weight(conversations):
    """Of each taught edge of the tree, by what is predicted."""
    words = Encoder(WordTokenizer(), "llava-hf", 4, IMAGE_ID)
    tree = build_tree([words(one) for one in conversations])
    found = collections.Counter()
    for target, weight in zip(tree.target.tolist(), tree.weight.tolist(), strict=True):
        found[words.tokenizer.words[target].strip()] += weight
    return found


@settings(max_examples=20)
@given(plan=plans)
def test_in_a_tree_an_answer_weighs_one_or_as_many_as_its_rows(plan):
    record = [one for one in built(plan) if is_long(one)]
    once, published = (loss_weight(Supervision(answers=how_often)(record)) for how_often in ANSWERS)
    rows = collections.Counter((one.turns[0].text, one.turns[1].text) for one in record)
    for answer in ("Yes", "A cup."):
        word = answer.split()[-1]
        assert once[word] == sum(said == answer for _, said in rows)
        assert published[word] == sum(count for (_, said), count in rows.items() if said == answer)
    assert once["Because"] == published["Because"] == len(record)

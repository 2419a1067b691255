"""What each arm of the ablation supervises, against brute force: which text, after which text, how often."""

import collections
import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.sources.reverie import parse_rationale_prompt
from reverie_jax.data.supervision import Supervision
from tests.data.fakes import conversation_of, llava_row, read_examples, write_json_rows

KINDS = ("responses", "positive", "negative", "rationales")
ANSWERS = ("once", "as-published")
CONTEXTS = ("separate", "positive-first", "negative-first")
PROMPTS = ("as-written", "bare", "guided", "guided-length", "guided-type")
GUIDANCE = "Including any necessary facts or knowledge"
ARMS = list(itertools.product(KINDS, ANSWERS, CONTEXTS, PROMPTS))


def conversation(kind, question, *texts, weight=1.0, pair=""):
    """The first question shows the image."""
    return conversation_of([f"{IMAGE}\n{question}", *texts], [weight] * len(texts), kind=kind, pair=pair)


def reflective(kind, question, answer, rationale, wrong="Nothing", weight=1.0):
    """As REVERIE publishes it."""
    prompt = "Explain why." if kind == "positive" else f"Explain why this answer is wrong: {wrong}."
    return conversation(kind, question, answer, f"{prompt} {GUIDANCE}", rationale, weight=weight)


# Few questions and answers, so that rationales share them; a number makes each rationale unique.
forms = st.sampled_from(["positive", "negative"] * 3 + ["short", "long", "chosen", "rejected"])
questions, answers = st.sampled_from(["Is it red?", "What is it?"]), st.sampled_from(["Yes", "A cup."])
plans = st.lists(st.tuples(forms, questions, answers), min_size=1, max_size=7)
arms = st.sampled_from(ARMS)


def build(plan, weights=(1.0,) * 7):
    """The conversations of a record. Not a strategy: what is checked as it is built draws random numbers of its own."""
    record = []
    for number, ((form, question, answer), weight) in enumerate(zip(plan, weights, strict=False)):
        match form:
            case "positive" | "negative":
                record.append(reflective(form, question, answer, f"Because {number}.", f"Wrong {number}", weight))
            case "short":
                record.append(conversation("", question, answer, weight=weight))
            case "long":
                more = ("And who?", f"You {number}.", "Explain why.", "So.")
                record.append(conversation("", question, answer, *more, weight=weight))
            case _:
                record.append(conversation(form, question, f"{form} {number}", weight=weight, pair=str(number)))
    return record


def supervised(conversations):
    """(texts before, text, weight) of each answer with a weight, and how often."""
    counts = collections.Counter()
    for one in conversations:
        for index in range(1, len(one.turns), 2):
            if one.turns[index].weight != 0:
                before = tuple(turn.text for turn in one.turns[:index])
                counts[before, one.turns[index].text, one.turns[index].weight] += 1
    return counts


def texts_of(conversations):
    return [[turn.text for turn in one.turns] for one in conversations]


def has_rationale(one):
    return one.kind in ("positive", "negative") and len(one.turns) > 2


# Kinds, answers and weights.


def brute_force(conversations, kinds, repeat, answer_weight=1.0, rationale_weight=1.0):
    """What separate conversations should supervise."""
    counts, seen = collections.Counter(), set()
    for one in conversations:
        texts = tuple(turn.text for turn in one.turns)
        weight = one.turns[1].weight
        if one.kind == "rejected":
            continue
        if one.kind not in ("positive", "negative"):
            for index in range(1, len(texts), 2):
                counts[texts[:index], texts[index], one.turns[index].weight] += 1
            continue
        if repeat == "as-published" or texts[:2] not in seen:
            counts[texts[:1], texts[1], weight * answer_weight] += 1
        if weight > 0:
            seen.add(texts[:2])
        if len(texts) > 2 and kinds in (one.kind, "rationales"):
            counts[texts[:3], texts[3], weight * rationale_weight] += 1
    return collections.Counter({key: count for key, count in counts.items() if key[2] != 0})


@settings(max_examples=120)
@given(
    plan=plans,
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0]), min_size=7, max_size=7),
    kinds=st.sampled_from(KINDS),
    repeat=st.sampled_from(ANSWERS),
    answer=st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0]),
    rationale=st.sampled_from([0.0, 0.5, 1.0, 1.0]),
)
def test_kinds_answers_and_weights_supervise_what_they_say(plan, weights, kinds, repeat, answer, rationale):
    record = build(plan, weights)
    result = Supervision(kinds, repeat, answer_weight=answer, rationale_weight=rationale)(record)
    assert supervised(result) == brute_force(record, kinds, repeat, answer, rationale)
    assert all(any(turn.weight > 0 for turn in one.turns[1::2]) for one in result)


@given(plan=plans, arm=arms)
def test_order_input_and_other_conversations_are_unchanged(plan, arm):
    record = build(plan)
    before = [dataclasses.replace(one) for one in record]
    result = Supervision(*arm)(record)
    assert record == before
    assert Supervision(*arm)(tuple(record)) == result
    assert all(any(turn.weight > 0 for turn in one.turns[1::2]) for one in result)
    others = [one for one in record if one.kind in ("", "chosen")]
    assert [one for one in result if one.kind in ("", "chosen", "rejected")] == others
    numbers = {tuple(texts[:2]): number for number, texts in reversed([*enumerate(texts_of(record))])}
    firsts = list(dict.fromkeys(numbers[tuple(texts[:2])] for texts in texts_of(result)))
    assert firsts == sorted(firsts)


def test_every_arm_keeps_answers_that_have_a_kind_but_no_rationale():
    # As LRV's rows have them, whose task is the kind.
    record = [
        conversation("negative", "Is there a dog?", "There is no dog."),
        conversation("", "What is there?", "A cup."),
    ]
    for arm in ARMS:
        assert Supervision(*arm, answer_weight=0.5)(record) == record


# Contexts.


def join(record, first, kinds):
    """The texts of each conversation, in order: the n-th rationales of both kinds together, where both exist."""
    ranks, rank_of = collections.Counter(), {}
    for number, one in enumerate(record):
        if has_rationale(one) and kinds == "rationales":
            key = (one.turns[0].text, one.turns[1].text, one.kind)
            rank_of[number] = (*key, ranks[key])
            ranks[key] += 1
    number_of = {rank: number for number, rank in rank_of.items()}
    joined = []
    for number, one in enumerate(record):
        if one.kind == "rejected":
            continue
        texts = [turn.text for turn in one.turns]
        if has_rationale(one) and kinds not in ("rationales", one.kind):
            texts = texts[:2]
        if number in rank_of:
            *key, kind, rank = rank_of[number]
            partner = number_of.get((*key, "negative" if kind == "positive" else "positive", rank))
            if partner is not None and partner < number:
                continue
            if partner is not None:
                other = [turn.text for turn in record[partner].turns]
                texts = texts + other[2:] if kind == first else other + texts[2:]
        joined.append(texts)
    return joined


@given(plan=plans, first=st.sampled_from(["positive", "negative"]), kinds=st.sampled_from([*KINDS, "rationales"]))
def test_contexts_join_the_nth_rationales_of_both_kinds(plan, first, kinds):
    record = build(plan)
    assert texts_of(Supervision(kinds, "as-published", f"{first}-first")(record)) == join(record, first, kinds)


@pytest.mark.parametrize(
    ("first", "order", "weights"),
    [("positive", ["So 0.", "No 0."], [6.0, 1.5]), ("negative", ["No 0.", "So 0."], [1.5, 6.0])],
)
def test_rationales_without_a_partner_stay_alone_and_joined_ones_keep_their_weights(first, order, weights):
    record = [
        reflective("negative", "Q?", "A.", "No 0.", "w0", weight=0.5),
        reflective("negative", "Q?", "A.", "No 1.", "w1"),
        reflective("positive", "Other?", "A.", "Other."),
        reflective("positive", "Q?", "A.", "So 0.", weight=2.0),
        reflective("positive", "Q?", "B.", "Because B."),
    ]
    result = Supervision(context=f"{first}-first", rationale_weight=3)(record)
    rationales = [order, ["No 1."], ["Other."], ["Because B."]]
    assert [[turn.text for turn in one.turns[3::2]] for one in result] == rationales
    assert [turn.weight for turn in result[0].turns[3::2]] == weights
    assert [one.turns[1].weight > 0 for one in result] == [True, False, True, True]
    assert all(
        [turn.role for turn in one.turns[:2]] * (len(one.turns) // 2) == [turn.role for turn in one.turns]
        for one in result
    )


# Prompts.

wrong_answers = st.sampled_from(
    [
        *("No", "B. glass", "It is a jug: an old one.", "3.5", "wrong: no", "Because this answer is wrong: yes"),
        *("two\nlines", "the U.S.", "Explain why", "(A)", '"quoted"', "a {b} %s \\1"),
    ]
) | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: any(c.isalnum() for c in text) and IMAGE not in text
)
WRITTEN = [
    "Explain why this answer is wrong: {}",
    "Explain why this answer is wrong: {}.",
    "Explain why this answer is wrong: {}. Including any necessary facts or knowledge.",
    "explain why this is incorrect: {}. Including any necessary facts or knowledge",
]


@given(
    prompts=st.sampled_from(PROMPTS[1:]),
    wrong=wrong_answers,
    form=st.sampled_from(WRITTEN),
    rationale=st.integers(1, 60).map(lambda count: " ".join(["word"] * count)),
    question=questions,
)
def test_prompts_quote_the_wrong_answer(prompts, wrong, form, rationale, question):
    record = [
        conversation("negative", question, "Yes", form.format(wrong), rationale),
        conversation("positive", question, "Yes", "Explain why, please.", rationale),
    ]
    negative, positive = (one.turns[2].text for one in Supervision(prompts=prompts)(record))
    quoted = wrong.strip().rstrip(". ")
    assert quoted in negative
    assert negative.index(quoted) < len(negative) - len(quoted) or prompts == "bare"
    assert parse_rationale_prompt(negative)[0] == "negative"
    assert parse_rationale_prompt(positive) == ("positive", "")
    assert (GUIDANCE in negative.replace(quoted, "", 1)) == (GUIDANCE in positive) == (prompts != "bare")
    assert positive == negative.replace(f"Explain why this answer is wrong: {quoted}.", "Explain why.", 1)


@given(plan=plans, prompts=st.sampled_from(PROMPTS), context=st.sampled_from(CONTEXTS))
def test_prompts_change_only_the_requests_for_rationales(plan, prompts, context):
    record = build(plan)
    written, reworded = (Supervision(context=context, prompts=form)(record) for form in ("as-written", prompts))
    requests = {turn.text for one in record for turn in one.turns[2::2]}
    assert {turn.text for one in written for turn in one.turns[2::2]} <= requests
    assert len(written) == len(reworded)
    for one, other in zip(written, reworded, strict=True):
        assert (one.turns[:2], one.turns[1::2]) == (other.turns[:2], other.turns[1::2])
        assert has_rationale(one) or one == other


def test_another_question_than_why_is_not_reworded():
    record = [conversation("positive", "Q?", "A.", "And what else?", "A jug.")]
    for prompts in PROMPTS:
        assert Supervision(prompts=prompts)(record) == record


@pytest.mark.parametrize(("words", "length"), [(1, 10), (9, 10), (26, 30), (44, 40), (57, 60), (123, 120)])
def test_the_requested_length_is_the_rationales_to_the_nearest_ten(words, length):
    record = [reflective("negative", "Q?", "A.", " ".join(["word"] * words), "a 77 jug")]
    (one,) = Supervision(prompts="guided-length")(record)
    assert re.findall(r"\d+", one.turns[2].text.replace("a 77 jug", "")) == [str(length)]


def test_the_line_for_the_type_depends_on_the_question_and_its_answer():
    examples = [
        ("Is it red?", "No."),
        ("Which?\nA. a cup\nB. a jug", "A"),
        ("What is it?", "a red cup"),
        ("What is it?", "It is a cup that somebody has left there."),
    ]
    lines = set()
    for example in examples:
        record = [
            reflective(kind, *example, why) for kind in ("positive", "negative") for why in ("So.", "No, for this.")
        ]
        result = Supervision(prompts="guided-type", answers="as-published")(record)
        (line,) = {one.turns[2].text.split(GUIDANCE)[1] for one in result}
        lines.add(line)
    assert len(lines) == 4


@pytest.mark.parametrize("arm", [Supervision("responses"), Supervision(prompts="bare")], ids=["responses", "bare"])
def test_a_request_that_shows_the_image_again_can_be_cut_or_reworded(tmp_path, arm):
    row = llava_row("a.png", f"{IMAGE}\nQ?", "A.", f"Explain why. {IMAGE}", "So.")
    examples, _ = read_examples(write_json_rows(tmp_path / "a.jsonl", [row]))
    (one,) = arm([example.conversation for example in examples])
    assert one.turns[1].text == "A."

"""Every way of decoding, token for token against transformers or a loop that runs the whole conversation again."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy import stats
from transformers.generation import TopKLogitsWarper

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.templates import Template
from reverie_jax.data.tokenization import Encoder, load_tokenizer
from reverie_jax.errors import UserError
from reverie_jax.eval import decode, penalties
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.eval.stop_text import stop_table
from reverie_jax.models.sharding import make_mesh
from tests.data import llama_oracle
from tests.eval import decode_oracle as oracle
from tests.eval.decode_oracle import (
    ALIKE,
    END,
    IMAGES,
    NEW_TOKENS,
    OTHER_END,
    answers_of,
    ask,
    decoded,
    greedy,
    png,
)

slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads wait for one another in a busy loop, and models here are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def beams_of_transformers(seed, decoding, processor=oracle.PROCESSOR):
    options = {"num_beams": decoding.beams, "length_penalty": decoding.length_penalty}
    return answers_of(
        IMAGES,
        lambda image, conversation: oracle.transformers_tokens(
            seed, image, conversation, decoding.max_new_tokens, processor, **options
        ),
    )


@pytest.mark.parametrize(
    ("beams", "penalty", "two_ends", "seeds"),
    [
        (3, 1.0, False, range(3)),
        (2, 0.3, True, [*range(2), *range(ALIKE, ALIKE + 3)]),
        pytest.param(3, 1.0, False, range(8), marks=slow),
        pytest.param(2, 0.3, True, [*range(8), *range(ALIKE, ALIKE + 6)], marks=slow),
        pytest.param(4, 2.0, False, range(8), marks=slow),
        pytest.param(3, 1.0, True, range(8), marks=slow),
        pytest.param(2, -1.0, True, range(8), marks=slow),
        pytest.param(4, 0.0, True, range(8), marks=slow),
    ],
)
def test_beam_search_is_transformers(beams, penalty, two_ends, seeds):
    decoding = Decoding(NEW_TOKENS, beams=beams, length_penalty=penalty)
    processor = oracle.processor(two_ends=two_ends)
    lengths, differ = Counter(), 0
    for seed in seeds:
        expected = beams_of_transformers(seed, decoding, processor)
        assert decoded(seed, decoding, processor=processor) == expected
        lengths.update(len(text.split()) for text in expected.values())
        if seed < ALIKE:
            differ += sum(text != oracle.greedy_answer(seed, number) for number, text in expected.items())
    assert lengths[NEW_TOKENS] > 3, "no answer reaches the maximum length"
    assert sum(lengths.values()) - lengths[NEW_TOKENS] > 3, "no answer ends"
    assert differ > 5, "beams find what greedy decoding does"


@slow
@pytest.mark.parametrize(
    ("seed", "tokens", "shape"), [(4, NEW_TOKENS, (2, 2, 1)), (2, 1, (1, 1, 1))], ids=["mesh", "one token"]
)
def test_beams_on_a_mesh_and_of_one_token(seed, tokens, shape):
    decoding = Decoding(tokens, beams=3)
    answers = decoded(seed, decoding, shape=EngineShape(batch_size=4), mesh=make_mesh(*shape))
    assert answers == beams_of_transformers(seed, decoding)


PENALIZED = [
    (Decoding(NEW_TOKENS, repetition_penalty=1.5, penalize_prompt=True), (0,)),
    (Decoding(NEW_TOKENS, repetition_penalty=0.6, no_repeat_ngram=2), (1,)),
    (Decoding(NEW_TOKENS, no_repeat_ngram=1, penalize_prompt=True), (2,)),
    (Decoding(NEW_TOKENS, beams=3, repetition_penalty=1.3, penalize_prompt=True), (0,)),
    (Decoding(NEW_TOKENS, beams=2, repetition_penalty=1.4, no_repeat_ngram=2, length_penalty=0.3), (1,)),
]


@pytest.mark.parametrize(
    ("decoding", "seeds"), [*PENALIZED, *(pytest.param(one, range(6), marks=slow) for one, _ in PENALIZED)]
)
def test_penalties_are_transformers(decoding, seeds):
    def answer(seed, decoding, image, conversation):
        prompt = len(oracle.PROCESSOR.encoder(conversation).ids)
        options = {"num_beams": decoding.beams, "length_penalty": decoding.length_penalty}
        return oracle.transformers_tokens(
            *(seed, image, conversation, NEW_TOKENS),
            logits_processor=[oracle.Penalties(decoding, prompt)],
            **options,
        )

    differ = 0
    plain = dataclasses.replace(decoding, repetition_penalty=1.0, no_repeat_ngram=0)
    for seed in seeds:
        expected = answers_of(IMAGES, functools.partial(answer, seed, decoding))
        assert decoded(seed, decoding) == expected
        without = answers_of(IMAGES, functools.partial(answer, seed, plain))
        differ += sum(expected[number] != without[number] for number in expected)
    assert differ > 3, "the penalties change nothing"


@pytest.mark.parametrize("ngram", [0, 1, 2, 3, 5])
def test_penalties_of_any_history(ngram):
    random, vocabulary = np.random.default_rng(ngram), 7
    for prompt, step in [(0, 0), (0, 1), (0, 2), (3, 0), (1, 1), (9, 4), (0, 8)]:
        decoding = Decoding(8, repetition_penalty=1.3, no_repeat_ngram=ngram, penalize_prompt=True)
        scores = random.normal(0, 2, (2, 3, vocabulary)).astype(np.float32)
        tokens = random.integers(0, 3, (2, 3, prompt + 8)).astype(np.int32)
        tokens[..., :1] = vocabulary + 2  # a placeholder that the model does not score
        if not prompt + step:
            expected = scores
        else:
            flat = torch.tensor(tokens[..., : prompt + step].reshape(6, -1), dtype=torch.long)
            expected = oracle.Penalties(decoding, 0)(flat, torch.tensor(scores.reshape(6, -1))).numpy()
        # Behind shorter prompts' padding, and before tokens that are not there yet.
        padded = np.concatenate([np.full((2, 3, 2), penalties.NO_TOKEN, np.int32), tokens[..., :prompt]], axis=-1)
        found = penalties.penalize(*map(jnp.asarray, (scores, padded, tokens[..., prompt:])), step, 1.3, ngram)
        np.testing.assert_allclose(np.asarray(found).reshape(6, -1), expected.reshape(6, -1), rtol=1e-6)


def test_prompts_are_the_leaves_ancestors():
    conversations = (ask("is it?"), ask("is it red?"), ask("is it?", ("yes", "why?")), ask("z"))
    batch = oracle.PROCESSOR([ImageRecord("a", png(0), conversations[:3]), ImageRecord("b", png(1), conversations[3:])])
    found = np.asarray(penalties.prompt_tokens(jax.tree.map(jnp.asarray, batch)))
    for number, conversation in enumerate(conversations):
        row, leaf = np.argwhere(batch.questions == number)[0]
        ids = oracle.PROCESSOR.encoder(conversation).ids
        np.testing.assert_array_equal(found[row, leaf, -len(ids) :], ids)
        assert (found[row, leaf, : -len(ids)] == penalties.NO_TOKEN).all()


@pytest.mark.parametrize(
    ("decoding", "seeds"),
    [
        (Decoding(NEW_TOKENS), range(3)),
        (Decoding(NEW_TOKENS, beams=3), range(3)),
        # With seed 2, four searches end because all running beams hold the text.
        (Decoding(NEW_TOKENS, beams=3, repetition_penalty=1.1, penalize_prompt=True, early_beams=True), (2,)),
        pytest.param(Decoding(NEW_TOKENS, beams=2, length_penalty=2.0, early_beams=True), range(4), marks=slow),
        pytest.param(Decoding(NEW_TOKENS, beams=3, length_penalty=0.5, early_beams=True), range(8), marks=slow),
    ],
)
@pytest.mark.parametrize("processor", [oracle.PROCESSOR, oracle.HOLDING], ids=["token", "text"])
def test_texts_that_end_answers_and_beams_of_2023(decoding, seeds, processor):
    holding = processor is oracle.HOLDING

    def held(answer):
        return holding and oracle.holds(answer)

    def answer(seed, image, conversation):
        ids = processor.encoder(conversation).ids.tolist()
        if decoding.early_beams:
            shown = oracle.normalized(image.read()) if image.encoded else None
            found = oracle.beams_of_2023(
                lambda answer: oracle.scores(seed, shown, [*ids, *answer]), decoding, ids, held
            )
        else:
            options = {"num_beams": decoding.beams} | (
                {"stopping_criteria": [oracle.Held(len(ids))]} if holding else {}
            )
            found = oracle.transformers_tokens(seed, image, conversation, NEW_TOKENS, processor, **options)
        nonlocal cut
        cut += held(found)
        return found

    cut = differ = 0
    for seed in seeds:
        tokens = answers_of(IMAGES, functools.partial(answer, seed))
        expected = {number: text.split(oracle.HELD)[0].strip() if holding else text for number, text in tokens.items()}
        found = decoded(seed, decoding, processor=processor)
        assert found == expected
        if decoding.early_beams:
            late = decoded(seed, dataclasses.replace(decoding, early_beams=False), processor=processor)
            differ += sum(found[number] != late[number] for number in found)
    assert cut > 0 or not holding, "no answer holds the text"
    assert differ > 0 or not decoding.early_beams, "the two searches find the same"


@slow
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(NEW_TOKENS, temperature=1.0, top_k=5, no_repeat_ngram=2, repetition_penalty=1.2, penalize_prompt=True),
        Decoding(NEW_TOKENS, beams=3, repetition_penalty=1.1, penalize_prompt=True, early_beams=True),
    ],
    ids=["sampled", "beams"],
)
def test_penalties_and_stop_texts_on_a_mesh(decoding):
    whole = decoded(0, decoding, processor=oracle.HOLDING)
    shape = EngineShape(batch_size=4)
    assert decoded(0, decoding, processor=oracle.HOLDING, shape=shape, mesh=make_mesh(2, 2, 1)) == whole


@pytest.mark.parametrize(
    ("processor", "stop"), [(oracle.HOLDING, ""), (oracle.PROCESSOR, oracle.HELD), (oracle.HOLDING, "7")]
)
def test_nothing_is_decoded_behind_a_stop_text(processor, stop):
    ends, ended = [stop, oracle.HELD] if processor is oracle.HOLDING else [stop], 0
    table = stop_table(processor.encoder, oracle.SIZES.text.vocab, stop)

    def holds(ids):
        return any(end and end in oracle.text(ids) for end in ends)

    for seed in range(3):
        answers = decoded(seed, Decoding(NEW_TOKENS, stop=stop), processor=processor)
        batch = processor([ImageRecord(i.name, i.read(), tuple(c for _, c in i.questions)) for i in IMAGES])
        state = nnx.split(oracle.ours(seed))
        plain, cut = (
            np.asarray(_generate(*state, jax.tree.map(jnp.asarray, batch), one, decoding=Decoding(NEW_TOKENS)))
            for one in (None, table)
        )
        for place in np.argwhere(batch.questions >= 0):
            expected = plain[tuple(place)].tolist()
            count = next((n for n in range(1, NEW_TOKENS) if holds(expected[:n])), NEW_TOKENS)
            assert cut[tuple(place)].tolist() == expected[:count] + [END] * (NEW_TOKENS - count)
            ended += END not in expected[: count + 1] and count < NEW_TOKENS
            text = oracle.text([*expected[:count], END][: [*expected[:count], END].index(END)])
            text = text.split(oracle.HELD)[0] if processor is oracle.HOLDING else text
            text = "".join(text.partition(stop)[:2] if stop else text)
            assert answers[int(batch.questions[tuple(place)])] == text.strip()
    assert ended > 5


def test_a_stop_text_is_found_however_it_is_tokenized(tmp_path):
    tokenizer = load_tokenizer(llama_oracle.write_tokenizer(tmp_path, "legacy"))
    encoder = Encoder(tokenizer, Template("hash", "spans", "", "Human: ", "###Assistant:", end="###"), 1, 31999)
    table = stop_table(encoder, 32000)
    spelled = [token for token in range(32000) if "#" in tokenizer.convert_ids_to_tokens(token)]
    spelled += [38, 13, 2, *tokenizer.convert_tokens_to_ids(["▁a", "a", "▁"])]  # byte 0x23, byte \n, </s>
    assert {835, 2277, 29937} < set(spelled)
    random, found = np.random.default_rng(0), 0
    for answer in [[835], [2277, 29937], [29937, 2277], [38, 38, 38], *random.choice(spelled, (300, 4)).tolist()]:
        state = 0
        for count, token in enumerate(answer, 1):
            state = int(table[state, token])
            held = "###" in tokenizer.decode([29874, *answer[:count]], skip_special_tokens=True)
            assert (state == 3) == held, answer[:count]
            found += held and count < len(answer)
    assert found > 100
    # Beside another text, which may overlap it and be several tokens.
    spelled += [token for token in range(32000) if {".", "\n"} & set(tokenizer.decode([29874, token]))]
    table = stop_table(encoder, 32000, ".\n#")
    for answer in random.choice(spelled, (300, 5)).tolist():
        states = [0]
        for token in answer:
            states.append(int(table[states[-1], token]))
        texts = [tokenizer.decode([29874, *answer[:n]], skip_special_tokens=True) for n in range(6)]
        assert [state == len(table) - 1 for state in states] == ["###" in text or ".\n#" in text for text in texts]
    with pytest.raises(UserError, match="'</s>': </s>"):
        stop_table(encoder, 32000, "</s>")
    assert stop_table(oracle.PROCESSOR.encoder, 71) is None
    assert stop_table(oracle.processor(two_ends=True).encoder, 71) is None


def test_two_tokens_end_answers():
    processor, decoding, ended = oracle.processor(two_ends=True), Decoding(NEW_TOKENS), 0
    for seed in range(3):
        answer = functools.partial(oracle.transformers_tokens, seed, max_new_tokens=NEW_TOKENS, processor=processor)
        expected, one_end = answers_of(IMAGES, answer), greedy(seed)
        assert decoded(seed, decoding, processor=processor) == expected
        for number in (0, 1, 3, 4, 5, 7, 8, 9):  # where no answer precedes, the prompt is the same with one end
            if expected[number] != one_end[number]:
                assert one_end[number].startswith(f"{expected[number]} {OTHER_END}".strip())
                ended += 1
    assert ended > 3, "the second end ends nothing"


SAMPLED = Decoding(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=7)
REPEATED = [*IMAGES, ImageQuestions("a again", png(0), [(n, ask("is it?")) for n in range(50, 57)])]


def test_samples_depend_on_the_question_alone():
    assert decoded(2, Decoding(NEW_TOKENS, temperature=1.0, top_p=1e-6)) == greedy(2)  # the limit
    expected, plain = decoded(0, SAMPLED, REPEATED), greedy(0)
    assert sum(expected[number] != text for number, text in plain.items()) > 5
    assert len({expected[number] for number in range(50, 57)}) > 4, "equal questions have equal answers"
    # Other neighbors, another order, other batches, on several devices.
    backwards = [dataclasses.replace(i, questions=i.questions[:0:-1]) for i in reversed(IMAGES)]
    fewer = decoded(0, SAMPLED, backwards, EngineShape(batch_size=4, questions=2), mesh=make_mesh(2, 2, 1))
    assert len(fewer) == 6
    assert fewer.items() <= expected.items()


@pytest.mark.parametrize("stop", ["", "6"])
@pytest.mark.parametrize("seed", [7, 8])
def test_samples_behind_one_prefix_are_those_of_separate_runs(seed, stop):
    how = dataclasses.replace(SAMPLED, seed=seed, stop=stop)
    asked = ask("is it?")
    begun = oracle.begun(asked, "yes, a")
    images = [
        ImageQuestions(str(n), png(n), [(10 * n + k, begun if k < 4 else asked) for k in range(8)]) for n in range(2)
    ]
    together = decoded(seed, how, images)
    alone = {}
    for image in images:
        for number, one in image.questions:
            alone |= decoded(seed, how, [dataclasses.replace(image, questions=[(number, one)])])
    assert together == alone
    assert len(set(together.values())) > 12
    assert all(text.startswith(" ") == (number % 10 < 4) for number, text in together.items() if text)
    if stop:
        assert sum(text.endswith(stop) for text in together.values()) > 5
        assert all(stop not in text[:-1] for text in together.values())


@slow
@pytest.mark.parametrize("how", [SAMPLED, dataclasses.replace(SAMPLED, contrast="image")], ids=["plain", "contrasted"])
def test_samples_decoded_a_second_time_are_the_same(how):
    once = decoded(0, how)
    assert decoded(0, how, expected_new_tokens=3) == once
    assert decoded(0, how) == once


DRAWS = 8192


@functools.partial(jax.jit, static_argnames=("graph", "decoding"))
def _generate(graph, state, batch, table=None, *, decoding):
    return decode.generate(nnx.merge(graph, state), batch, decoding, (END,), stop_table=table)[0]


@functools.cache
def first_tokens(seed, decoding):
    """Return the first tokens of one question under many numbers: a leaf that is repeated many times."""
    batch = oracle.PROCESSOR([ImageRecord("a", png(0), (ask("is it?"),))])
    leaves = np.repeat(batch.leaves, DRAWS, axis=1)
    batch = batch._replace(leaves=leaves, questions=np.arange(DRAWS, dtype=np.int32)[None])
    graph, state = nnx.split(oracle.ours(seed))
    return np.asarray(_generate(graph, state, jax.tree.map(jnp.asarray, batch), decoding=decoding))[0]


def nucleus(scores, decoding):
    """Return probabilities: of the `top_k` likeliest tokens, from the likeliest down until they hold `top_p`."""
    scores = scores / decoding.temperature
    if decoding.top_k:
        scores = TopKLogitsWarper(decoding.top_k)(None, torch.tensor(scores)[None])[0].numpy()
    probability = np.exp(oracle.log_softmax(scores))
    if decoding.top_p == 1:
        return probability
    kept, total = np.zeros_like(probability), 0.0
    for token in np.argsort(-probability):
        if total >= decoding.top_p:
            break
        assert abs(total + probability[token] - decoding.top_p) > 1e-5, "near the bound: take another seed"
        kept[token], total = probability[token], total + probability[token]
    return kept / kept.sum()


def assert_drawn_from(tokens, probability):
    """Check by chi-square, with rare tokens in one bin; and that no token is impossible."""
    counts = np.bincount(tokens, minlength=len(probability))
    assert not counts[probability == 0].any(), "drawn from outside the nucleus"
    expected = probability * len(tokens)
    common = expected >= 8
    rest = expected[~common].sum()
    bins, wanted = list(counts[common]), list(expected[common])
    if rest >= 8:
        bins, wanted = [*bins, 0], [*wanted, 0.0]
    bins[-1], wanted[-1] = bins[-1] + counts[~common].sum(), wanted[-1] + rest
    assert len(bins) > 3, "too few tokens to tell anything"
    assert stats.chisquare(bins, wanted).pvalue > 1e-3


NUCLEUS = Decoding(2, temperature=1.5, top_p=0.8, seed=3)


@pytest.mark.parametrize(
    "decoding",
    [Decoding(2, temperature=1.0), NUCLEUS, dataclasses.replace(NUCLEUS, top_k=8, top_p=0.95)],
    ids=["all tokens", "nucleus", "top-k"],
)
def test_samples_follow_the_softmax(decoding):
    prompt, image = oracle.PROCESSOR.encoder(ask("is it?")).ids.tolist(), oracle.normalized(png(0))
    for seed in (0, 1):
        tokens = first_tokens(seed, decoding)
        first = nucleus(oracle.scores(seed, image, prompt), decoding)
        assert (first > 0).sum() < (decoding.top_k or len(first)) or decoding.top_p == 1
        assert_drawn_from(tokens[:, 0], first)
        # The second token too, behind the commonest first one: its randomness is not the first one's.
        before = Counter(tokens[tokens[:, 0] != END, 0].tolist()).most_common(1)[0][0]
        second = nucleus(oracle.scores(seed, image, [*prompt, before]), decoding)
        assert_drawn_from(tokens[tokens[:, 0] == before, 1], second)


def test_questions_and_seeds_draw_independently():
    one, two = (first_tokens(0, dataclasses.replace(NUCLEUS, seed=seed))[:, 0] for seed in (3, 4))
    prompt = oracle.PROCESSOR.encoder(ask("is it?")).ids.tolist()
    alike = (nucleus(oracle.scores(0, oracle.normalized(png(0)), prompt), NUCLEUS) ** 2).sum()
    for first, second in [(one, two), (one[:-1], one[1:]), (one[:-1], two[1:])]:
        assert stats.binomtest(int((first == second).sum()), len(first), alike).pvalue > 1e-3


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.5, 0.3), (0.0, 0.1), (2.0, 0.01), (1.0, 1.0)])
def test_contrast_by_its_definition(alpha, beta):
    random = np.random.default_rng(0)
    plain, against = (random.normal(0, 3, (2, 5, 40)).astype(np.float32) for _ in range(2))
    scores = np.asarray(decode.contrast_scores(jnp.asarray(plain), jnp.asarray(against), alpha, beta))
    plausible = 0
    for index in np.ndindex(2, 5):
        expected = oracle.contrasted(plain[index], against[index], alpha, beta)
        inside = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(scores[index]), inside)
        # Scores and log-probabilities differ by a constant.
        np.testing.assert_allclose(
            scores[index][inside] - scores[index].max(), expected[inside] - expected.max(), rtol=0, atol=1e-4
        )
        plausible += inside.sum()
    assert 10 <= plausible < 400
    assert beta < 1 or plausible == 10


@slow
@pytest.mark.parametrize(
    "options",
    [
        {"contrast": "image", "alpha": 0.0},
        {"contrast": "image", "noise_step": 0},
        {"contrast": "instruction", "alpha": 0.0},
        {"contrast": "nothing", "alpha": 0.0},
    ],
    ids=str,
)
def test_a_contrast_without_effect_is_greedy(options):
    for seed in range(4):
        assert decoded(seed, Decoding(NEW_TOKENS, **options)) == greedy(seed)


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_noise_by_its_schedule(step):
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 24, 24, 3), dtype=np.uint8)
    noise = np.asarray(jax.random.normal(jax.random.key(5), (24, 24, 3)), np.float64)
    shown = np.moveaxis(oracle.oracle.normalized(pixels).numpy(), 1, -1).reshape(pixels.shape)
    # One step at a time: each keeps sqrt(1 - beta) of the image. The noise of n steps sums to one normal variable.
    kept = 1.0
    for n in range(step + 1 if step else 0):
        kept *= 1 - (1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(6 - 12 * n / 999)))
    noisy = decode.add_noise(jnp.asarray(pixels), step, 5, oracle.SIZES.vision)
    assert noisy.dtype == jnp.float32
    np.testing.assert_allclose(noisy, kept**0.5 * shown + (1 - kept) ** 0.5 * noise, rtol=0, atol=2e-4)


VCD = Decoding(NEW_TOKENS, contrast="image", seed=3, track=(22, 0))


def brute_force(seed, decoding, image, conversation):
    """Decode greedily by the contrast, everything run again for each token."""
    ids = second_ids = oracle.PROCESSOR.encoder(conversation).ids.tolist()
    shown = second_shown = oracle.normalized(image.read()) if image.encoded else None
    blind = decoding.contrast == "nothing"
    if decoding.contrast == "instruction":
        second_ids = oracle.PROCESSOR.encoder(oracle.behind_instruction(conversation)).ids.tolist()
    elif image.encoded and not blind:
        pixels = oracle.PROCESSOR.preprocess(image.read(), image.name)
        noisy = decode.add_noise(jnp.asarray(pixels[None]), decoding.noise_step, decoding.seed, oracle.SIZES.vision)
        second_shown = torch.tensor(np.moveaxis(np.array(noisy[0]), -1, 1))

    def step(answer):
        first = oracle.scores(seed, shown, [*ids, *answer])
        second = oracle.scores(seed, second_shown, [*second_ids, *answer], blind=blind)
        margin = oracle.log_softmax(first) - oracle.log_softmax(first).max() - np.log(decoding.beta)
        assert np.abs(margin).min() > 1e-4, "near the cut: take another seed"
        return oracle.contrasted(first, second, decoding.alpha, decoding.beta)

    return oracle.stepwise(step, decoding.max_new_tokens)


@pytest.mark.parametrize(
    ("decoding", "seeds"),
    [
        (VCD, (0,)),
        (Decoding(NEW_TOKENS, contrast="instruction"), (0,)),
        (Decoding(NEW_TOKENS, contrast="nothing"), (0, 1)),
        pytest.param(Decoding(NEW_TOKENS, contrast="nothing", alpha=0.5, beta=0.2), range(4), marks=slow),
        pytest.param(VCD, range(4), marks=slow),
        pytest.param(
            Decoding(NEW_TOKENS, contrast="image", alpha=0.5, beta=0.2, noise_step=900, seed=1), range(4), marks=slow
        ),
        pytest.param(Decoding(NEW_TOKENS, contrast="instruction"), range(4), marks=slow),
    ],
)
def test_contrasted_answers_step_by_step(decoding, seeds):
    differ = 0
    for seed in seeds:
        expected = answers_of(IMAGES, functools.partial(brute_force, seed, decoding))
        assert decoded(seed, decoding) == expected
        differ += sum(text != oracle.greedy_answer(seed, number) for number, text in expected.items())
    assert differ > 2, "the contrast changes nothing"


@pytest.mark.parametrize("contrast", ["", "instruction", "nothing"])
def test_begun_answers_go_on_as_behind_any_prompt(contrast):
    decoding = Decoding(NEW_TOKENS, contrast=contrast)
    images = [
        dataclasses.replace(image, questions=[(number, oracle.begun(one, "yes, a")) for number, one in image.questions])
        for image in IMAGES
    ]
    answer = brute_force if contrast else lambda seed, _, *row: oracle.transformers_tokens(seed, *row, NEW_TOKENS)
    expected = answers_of(images, functools.partial(answer, 0, decoding))
    # The text of what goes on begins with the space between the tokens.
    assert decoded(0, decoding, images) == {number: text and f" {text}" for number, text in expected.items()}
    assert sum(text != oracle.greedy_answer(0, number) for number, text in expected.items()) > 5


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(1, track=(9, 22, END)),
        VCD,
        pytest.param(Decoding(1, track=(60, 0), temperature=2.0), marks=slow),
        pytest.param(Decoding(1, track=(3, 22), beams=2), marks=slow),
    ],
    ids=["greedy", "contrast", "sampled", "beams"],
)
def test_tracked_tokens_have_transformers_log_probabilities(decoding):
    answers = oracle.answers_with_scores(0, decoding)
    for image, (number, conversation) in ((i, question) for i in IMAGES for question in i.questions):
        shown = oracle.normalized(image.read()) if image.encoded else None
        ids = oracle.PROCESSOR.encoder(conversation).ids.tolist()
        expected = oracle.log_softmax(oracle.scores(0, shown, ids))[list(decoding.track)]
        np.testing.assert_allclose(answers[number].tracked, expected, rtol=0, atol=1e-4)


WRONG = [{"max_new_tokens": 0}, {"beams": 0}, {"beams": 2, "temperature": 1.0}, {"beams": 2, "contrast": "image"}]
WRONG += [{"beta": 0.0}, {"alpha": -1.0}, {"noise_step": 1000}, {"temperature": -1.0}, {"top_p": 0.0}]
WRONG += [{"top_k": -1}, {"repetition_penalty": 0.0}, {"no_repeat_ngram": -1}]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Decoding(**{"max_new_tokens": 1} | options)

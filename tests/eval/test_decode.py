"""Every way of decoding, token for token against transformers or a loop that runs the whole conversation again."""

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reverie_jax.data.conversation import Conversation, ImageRecord, Turn
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.errors import DataError
from reverie_jax.eval import decode
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine, EngineShape
from reverie_jax.eval.schedule import ICD_INSTRUCTION, plan
from reverie_jax.models.sharding import make_mesh
from tests.eval import decode_oracle as oracle
from tests.eval.decode_oracle import ALIKE, END, NEW_TOKENS, OTHER_END, ask, each, generated, png, stepwise
from tests.train import tiny

# Several questions a picture; one that another goes on from; one picture alone; two questions about nothing shown.
PICTURES = [
    ImageQuestions("a", png(0), [(0, ask("is it?")), (1, ask("is it red?")), (2, ask("is it?", ("yes", "why?")))]),
    ImageQuestions(
        "b",
        png(1),
        [(3, ask("what")), (4, ask("is it?")), (5, ask("z")), (6, ask("is it red?", ("no", "why is that?")))],
    ),
    ImageQuestions("none", b"", [(7, ask("is it?", shown=False)), (8, ask("name a colour", shown=False))]),
    ImageQuestions("c", png(2), [(9, ask("is it?"))]),
]
# One sheet in ten is long: two shapes.
LONG = "tell me all that there is to see, from left to right and from the top down. "
MANY = [
    *PICTURES,
    *(ImageQuestions(f"m{n}", png(10 + n), [(20 + n, ask("abcdefg"[n] * (n + 1) + "?"))]) for n in range(7)),
    ImageQuestions("long", png(30), [(40, ask(LONG)), (41, ask("is it?", ("yes", LONG)))]),
]
SHAPE = EngineShape(batch_size=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads wait for one another in a busy loop, and models here are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def says(seed, how, pictures=PICTURES, shape=SHAPE, mesh=None, processor=oracle.PROCESSOR, expected_new_tokens=None):
    """Our answers, in the order in which the batches bring them; it is the order that was announced."""
    engine = Engine(oracle.ours(seed), processor, shape, mesh=mesh)
    work = engine.schedule(pictures, how)
    found = [
        {number: answer.text for number, answer in part.items()}
        for part in engine.stream(work, how, expected_new_tokens=expected_new_tokens)
    ]
    assert [list(part) for part in found] == list(work.numbers())
    return {number: answer for part in found for number, answer in part.items()}


@functools.cache
def greedy(seed):
    return each(MANY, lambda picture, talk: generated(seed, picture, talk, NEW_TOKENS))


def greedy_of_few(seed):
    return {number: greedy(seed)[number] for picture in PICTURES for number, _ in picture.questions}


def lengths(answers):
    return {len(text.split()) for text in answers.values()}


# 1. Beams.


def beams_of_transformers(seed, how, processor=oracle.PROCESSOR):
    options = {"num_beams": how.beams, "length_penalty": how.length_penalty}
    return each(
        PICTURES, lambda picture, talk: generated(seed, picture, talk, how.max_new_tokens, processor, **options)
    )


@pytest.mark.parametrize(
    ("beams", "penalty", "two_ends", "seeds"),
    [
        (3, 1.0, False, range(8)),
        (2, 0.3, True, [*range(8), *range(ALIKE, ALIKE + 6)]),
        pytest.param(4, 2.0, False, range(8), marks=pytest.mark.slow),
        pytest.param(3, 1.0, True, range(8), marks=pytest.mark.slow),
        pytest.param(2, -1.0, True, range(8), marks=pytest.mark.slow),
        pytest.param(4, 0.0, True, range(8), marks=pytest.mark.slow),
    ],
)
def test_beam_search_is_transformers(beams, penalty, two_ends, seeds):
    how = Decoding(NEW_TOKENS, beams=beams, length_penalty=penalty)
    processor = oracle.processor(two_ends=two_ends)
    found, differ = Counter(), 0
    for seed in seeds:
        expected = beams_of_transformers(seed, how, processor)
        assert says(seed, how, processor=processor) == expected
        found.update(len(text.split()) for text in expected.values())
        if seed < ALIKE:
            differ += sum(text != greedy_of_few(seed)[number] for number, text in expected.items())
    assert found[NEW_TOKENS] > 5, "no answer reaches the longest length"
    assert sum(found.values()) - found[NEW_TOKENS] > 5, "no answer ends"
    assert differ > 10, "beams find what greedy decoding does"


@pytest.mark.slow
def test_beams_on_a_mesh():
    how = Decoding(NEW_TOKENS, beams=3)
    answers = says(4, how, shape=EngineShape(batch_size=4), mesh=make_mesh(2, 2, 1))
    assert answers == beams_of_transformers(4, how)


@pytest.mark.slow
def test_a_beam_of_one_token():
    how = Decoding(1, beams=3)
    assert says(2, how) == beams_of_transformers(2, how)


# 2. Greedy.


def shapes(shape, mesh=None):
    engine = Engine(oracle.ours(0), oracle.PROCESSOR, shape, mesh=mesh)
    return [group.shape.length for group in engine.schedule(MANY, Decoding(NEW_TOKENS)).groups]


@pytest.mark.parametrize("usual", [None, 3])
def test_greedy_is_transformers(usual):
    shape = EngineShape(batch_size=4)
    assert len(shapes(shape)) == 2
    found = set()
    for seed in range(6):
        assert says(seed, Decoding(NEW_TOKENS), MANY, shape, expected_new_tokens=usual) == greedy(seed)
        found |= lengths(greedy(seed))
    assert {0, 2, 3, 4, NEW_TOKENS} <= found


@pytest.mark.parametrize("axes", [(4, 1, 1), (2, 2, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_greedy_on_a_mesh(axes):
    for seed in (2, 4):
        answers = says(seed, Decoding(NEW_TOKENS), shape=EngineShape(batch_size=4), mesh=make_mesh(*axes))
        assert answers == greedy_of_few(seed)


@pytest.mark.slow
def test_two_shapes_on_a_mesh():
    mesh, shape = make_mesh(2, 2, 1), EngineShape(batch_size=4)
    assert len(shapes(shape, mesh)) == 2
    for seed in (2, 4):
        assert says(seed, Decoding(NEW_TOKENS), MANY, shape, mesh=mesh, expected_new_tokens=3) == greedy(seed)


def test_two_tokens_end_answers():
    processor, how, ended = oracle.processor(two_ends=True), Decoding(NEW_TOKENS), set()
    for seed in range(6):
        ask_them = functools.partial(generated, seed, max_new_tokens=NEW_TOKENS, processor=processor)
        expected = each(PICTURES, ask_them)
        assert says(seed, how, processor=processor) == expected
        # Of what follows no answer, the prompt is the same with one end.
        ended |= {(seed, n) for n in (0, 1, 3, 4, 5, 7, 8, 9) if expected[n] != greedy(seed)[n]}
        assert all(greedy(seed)[n].startswith(f"{expected[n]} {OTHER_END}".strip()) for s, n in ended if s == seed)
    assert len(ended) > 5, "the second end ends nothing"


def test_batches_that_are_skipped_change_no_other():
    engine = Engine(oracle.ours(0), oracle.PROCESSOR, EngineShape(batch_size=4))
    work = engine.schedule(MANY, Decoding(NEW_TOKENS))
    announced = list(work.numbers())
    assert len(announced) > 3
    for skip in range(len(announced) + 1):
        rest = list(engine.stream(work, Decoding(NEW_TOKENS), skip=skip))
        assert [list(part) for part in rest] == announced[skip:]
        assert all(answer.text == greedy(0)[number] for part in rest for number, answer in part.items())


# 3. Drawn tokens.


@pytest.mark.parametrize("limit", [{"temperature": 1e-6}, {"temperature": 1.0, "top_p": 1e-6}], ids=["cold", "narrow"])
def test_sampling_has_greedy_as_its_limit(limit):
    for seed in range(4):
        assert says(seed, Decoding(NEW_TOKENS, **limit)) == greedy_of_few(seed)


DRAW = Decoding(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=7)
OFTEN = [*PICTURES, ImageQuestions("a again", png(0), [(n, ask("is it?")) for n in range(50, 57)])]


def test_draws_depend_on_the_seed_and_the_question_alone():
    expected = says(0, DRAW, OFTEN)
    assert sum(text != greedy(0)[n] for n, text in expected.items() if n in greedy(0)) > 5
    # Other company, another order, other rows, on several devices.
    backwards = [dataclasses.replace(p, questions=p.questions[:0:-1]) for p in reversed(PICTURES)]
    fewer = says(0, DRAW, backwards, EngineShape(batch_size=4, questions=2), mesh=make_mesh(2, 2, 1))
    assert len(fewer) == 6
    assert fewer.items() <= expected.items()
    others = says(0, dataclasses.replace(DRAW, seed=8), OFTEN)
    assert sum(others[n] != text for n, text in expected.items()) > 14


def test_a_question_asked_many_times_is_drawn_many_times():
    answers = says(0, DRAW, OFTEN)
    assert len({answers[n] for n in range(50, 57)}) > 4


@pytest.mark.slow
@pytest.mark.parametrize("how", [DRAW, dataclasses.replace(DRAW, contrast="image")], ids=["plain", "contrasted"])
def test_draws_decoded_a_second_time_are_the_same(how):
    assert says(0, how, expected_new_tokens=3) == says(0, how)
    assert says(0, how) == says(0, how)


DRAWS = 8192


@functools.partial(jax.jit, static_argnames=("graph", "decoding"))
def _drawn(graph, state, batch, *, decoding):
    return decode.generate(nnx.merge(graph, state), batch, decoding, (END,))[0]


def drawn(seed, how):
    """First tokens of one question under many numbers: a leaf that stands there many times."""
    batch = oracle.PROCESSOR([ImageRecord("a", png(0), (ask("is it?"),))])
    leaves = np.repeat(batch.leaves, DRAWS, axis=1)
    batch = batch._replace(leaves=leaves, questions=np.arange(DRAWS, dtype=np.int32)[None])
    graph, state = nnx.split(oracle.ours(seed))
    return np.asarray(_drawn(graph, state, jax.tree.map(jnp.asarray, batch), decoding=how))[0]


def nucleus(scores, how):
    """Probabilities: tokens from the likeliest down until they hold `top_p`, and none behind that."""
    probability = np.exp(oracle.log_softmax(scores / how.temperature))
    if how.top_p == 1:
        return probability
    kept, held = np.zeros_like(probability), 0.0
    for token in np.argsort(-probability):
        if held >= how.top_p:
            break
        assert abs(held + probability[token] - how.top_p) > 1e-5, "the bound is met too closely: take another seed"
        kept[token], held = probability[token], held + probability[token]
    return kept / kept.sum()


def assert_drawn_from(tokens, probability):
    """Chi-square, tokens of which few are expected in one bin; and none that cannot be."""
    counts = np.bincount(tokens, minlength=len(probability))
    assert not counts[probability == 0].any(), "drawn from beyond the nucleus"
    expected = probability * len(tokens)
    common = expected >= 8
    rest = expected[~common].sum()
    bins, wanted = list(counts[common]), list(expected[common])
    if rest >= 8:
        bins, wanted = [*bins, counts[~common].sum()], [*wanted, rest]
    else:
        bins[-1], wanted[-1] = bins[-1] + counts[~common].sum(), wanted[-1] + rest
    assert len(bins) > 3, "too few tokens to tell anything"
    assert stats.chisquare(bins, wanted).pvalue > 1e-3


@pytest.mark.parametrize(
    "how",
    [Decoding(2, temperature=1.0), Decoding(2, temperature=1.5, top_p=0.8, seed=3)],
    ids=["all tokens", "nucleus"],
)
def test_draws_follow_the_softmax(how):
    talk = oracle.PROCESSOR.encoder(ask("is it?")).ids.tolist()
    for seed in (0, 1, 3):
        tokens = drawn(seed, how)
        first = nucleus(oracle.scores(seed, oracle.seen(png(0)), talk), how)
        assert (first > 0).sum() < len(first) or how.top_p == 1
        assert_drawn_from(tokens[:, 0], first)
        # The second token too, behind the commonest first one: its randomness is no longer the first one's.
        before = Counter(tokens[tokens[:, 0] != END, 0].tolist()).most_common(1)[0][0]
        second = nucleus(oracle.scores(seed, oracle.seen(png(0)), [*talk, before]), how)
        assert_drawn_from(tokens[tokens[:, 0] == before, 1], second)


def test_questions_and_seeds_draw_independently():
    how = Decoding(2, temperature=1.5, top_p=0.8, seed=3)
    one, two = drawn(0, how)[:, 0], drawn(0, dataclasses.replace(how, seed=4))[:, 0]
    talk = oracle.PROCESSOR.encoder(ask("is it?")).ids.tolist()
    alike = (nucleus(oracle.scores(0, oracle.seen(png(0)), talk), how) ** 2).sum()
    for first, second in [(one, two), (one[:-1], one[1:]), (one[:-1], two[1:])]:
        assert stats.binomtest(int((first == second).sum()), len(first), alike).pvalue > 1e-3


# 4. Contrasts.


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.5, 0.3), (0.0, 0.1), (2.0, 0.01), (1.0, 1.0)])
def test_contrast_by_its_definition(alpha, beta):
    random = np.random.default_rng(0)
    plain, against = (random.normal(0, 3, (2, 5, 40)).astype(np.float32) for _ in range(2))
    found = np.asarray(decode.contrast_scores(jnp.asarray(plain), jnp.asarray(against), alpha, beta))
    ins = 0
    for place in np.ndindex(2, 5):
        expected = oracle.contrasted(plain[place], against[place], alpha, beta)
        inside = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(found[place]), inside)
        # Scores and log-probabilities differ by one number.
        np.testing.assert_allclose(
            found[place][inside] - found[place].max(), expected[inside] - expected.max(), rtol=0, atol=1e-4
        )
        ins += inside.sum()
    assert 10 <= ins < 400
    assert beta < 1 or ins == 10


def test_contrast_with_no_cut():
    plain, against = jnp.asarray([[[1.0, -30.0]]]), jnp.asarray([[[2.0, 5.0]]])
    np.testing.assert_allclose(decode.contrast_scores(plain, against, 1.0, 0.0), [[[0.0, -65.0]]])


@pytest.mark.parametrize(
    "how",
    [
        Decoding(NEW_TOKENS, contrast="image", alpha=0.0),
        pytest.param(Decoding(NEW_TOKENS, contrast="image", noise_step=0), marks=pytest.mark.slow),
        pytest.param(Decoding(NEW_TOKENS, contrast="instruction", alpha=0.0), marks=pytest.mark.slow),
    ],
    ids=["image, alpha 0", "image, no noise", "instruction, alpha 0"],
)
def test_a_contrast_with_nothing_is_greedy(how):
    for seed in range(4):
        assert says(seed, how) == greedy_of_few(seed)


@pytest.mark.parametrize("steps", [0, 1, 37, 500, 1000])
def test_noise_by_its_schedule(steps):
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 24, 24, 3), dtype=np.uint8)
    noise = np.asarray(jax.random.normal(jax.random.key(5), (24, 24, 3)), np.float64)
    shown = np.moveaxis(oracle.oracle.normalized(pixels).numpy(), 1, -1).reshape(pixels.shape)
    # A step at a time: each keeps sqrt(1 - beta) of the picture. Noise of n steps sums to one normal variable.
    kept = 1.0
    for step in range(min(steps + 1, 1000) if steps else 0):
        kept *= 1 - (1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(6 - 12 * step / 999)))
    found = decode.add_noise(jnp.asarray(pixels), steps, 5)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, kept**0.5 * shown + (1 - kept) ** 0.5 * noise, rtol=0, atol=2e-4)


VCD = Decoding(NEW_TOKENS, contrast="image", seed=3, track=(22, 0))


def contrasted(seed, plain, against, how):
    """Greedy by the contrast, everything run again for each token."""

    def step(answer):
        first = oracle.scores(seed, plain[0], [*plain[1], *answer])
        second = oracle.scores(seed, against[0], [*against[1], *answer])
        near = oracle.log_softmax(first) - oracle.log_softmax(first).max() - np.log(how.beta)
        assert np.abs(near).min() > 1e-4, "near the cut: take another seed"
        return oracle.contrasted(first, second, how.alpha, how.beta)

    return stepwise(step, how.max_new_tokens)


def against_noise(seed, how):
    def answer(picture, talk):
        ids = oracle.PROCESSOR.encoder(talk).ids.tolist()
        if not picture.encoded:
            return contrasted(seed, (None, ids), (None, ids), how)
        pixels = oracle.PROCESSOR.preprocess(picture.read(), picture.name)
        noisy = decode.add_noise(jnp.asarray(pixels[None]), how.noise_step, how.seed)
        shown = torch.tensor(np.moveaxis(np.array(noisy[0]), -1, 1))
        return contrasted(seed, (oracle.seen(picture.read()), ids), (shown, ids), how)

    return each(PICTURES, answer)


def disturbed(text):
    shown, said = ("<image>\n", text[8:]) if text.startswith("<image>\n") else ("", text)
    return f"{shown}{ICD_INSTRUCTION} {said}"


def against_instruction(seed, how):
    def answer(picture, talk):
        *before, last = talk.turns
        second = Conversation((*before, Turn("user", disturbed(last.text))), talk.images)
        shown = oracle.seen(picture.read()) if picture.encoded else None
        first, second = (oracle.PROCESSOR.encoder(one).ids.tolist() for one in (talk, second))
        return contrasted(seed, (shown, first), (shown, second), how)

    return each(PICTURES, answer)


@pytest.mark.parametrize(
    ("how", "brute"),
    [
        (VCD, against_noise),
        pytest.param(
            Decoding(NEW_TOKENS, contrast="image", alpha=0.5, beta=0.2, noise_step=900, seed=1),
            against_noise,
            marks=pytest.mark.slow,
        ),
        (Decoding(NEW_TOKENS, contrast="instruction"), against_instruction),
    ],
    ids=["VCD", "VCD, other settings", "ICD"],
)
def test_contrasted_answers_step_by_step(how, brute):
    differ = 0
    for seed in range(4):
        expected = brute(seed, how)
        assert says(seed, how) == expected
        differ += sum(text != greedy(seed)[n] for n, text in expected.items())
    assert differ > 10, "the contrast changes nothing"


# 5. Tracked tokens.


@pytest.mark.parametrize(
    "how",
    [
        Decoding(1, track=(9, 22, END)),
        VCD,
        pytest.param(Decoding(1, track=(60, 0), temperature=2.0), marks=pytest.mark.slow),
        pytest.param(Decoding(1, track=(3, 22), beams=2), marks=pytest.mark.slow),
    ],
    ids=["greedy", "against noise", "drawn", "beams"],
)
def test_tracked_tokens_have_transformers_log_probabilities(how):
    for seed in (0, 3):
        engine = Engine(oracle.ours(seed), oracle.PROCESSOR, SHAPE)
        found = {n: a for part in engine.stream(engine.schedule(PICTURES, how), how) for n, a in part.items()}
        for picture, (number, talk) in ((p, question) for p in PICTURES for question in p.questions):
            shown = oracle.seen(picture.read()) if picture.encoded else None
            ids = oracle.PROCESSOR.encoder(talk).ids.tolist()
            expected = oracle.log_softmax(oracle.scores(seed, shown, ids))[list(how.track)]
            np.testing.assert_allclose(found[number].tracked, expected, rtol=0, atol=1e-4)


# 6. The plan.


PROCESSOR = tiny.processor()
WORDS = ["is it red?", "is it", "a", "b?", "what is there to see?", "is it red? " * 4, "why " * 15, "z" * 90]


def made(sketch):
    """Pictures, from (whether one is shown, the questions about it, each with what is asked behind its answer)."""
    numbers = itertools.count(3)
    return [
        ImageQuestions(
            f"p{n}",
            b"bytes" if shown else b"",
            [(next(numbers), ask(text, *(("yes", more) for more in then), shown=shown)) for text, then in asked],
        )
        for n, (shown, asked) in enumerate(sketch)
    ]


def nodes(talks):
    """Tokens that a tree of these has: every distinct beginning is one."""
    found = set()
    for talk in talks:
        tokens = PROCESSOR.encoder(talk)
        pairs = list(zip(tokens.ids.tolist(), tokens.image_slots.tolist(), strict=True))
        found |= {tuple(pairs[: n + 1]) for n in range(len(pairs))}
    return len(found)


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.tuples(st.sampled_from(WORDS), st.lists(st.sampled_from(WORDS[:5]), max_size=1)), max_size=7),
        ),
        max_size=14,
    ),
    st.tuples(st.sampled_from([64, 100, 128, 256]), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_a_plan_asks_everything_once_and_fits(sketch, limit, spread, disturb):
    asked, limit = made(sketch), EngineShape(*limit)
    longest = max((len(PROCESSOR.encoder(talk)) for p in asked for _, talk in p.questions), default=0)
    if longest > limit.sequence_length:
        with pytest.raises(DataError, match="p"):
            plan(asked, PROCESSOR, limit, multiple=spread, contrast=disturb)
        return
    groups = plan(asked, PROCESSOR, limit, multiple=spread, contrast=disturb)
    assert groups == plan(asked, PROCESSOR, limit, multiple=spread, contrast=disturb)
    sheets = [(group, sheet) for group in groups for sheet in group.images]
    # The same picture with the same words, once.
    wanted = Counter((p.name, p.encoded, number, talk) for p in asked for number, talk in p.questions)
    assert Counter((s.name, s.encoded, number, talk) for _, s in sheets for number, talk in s.questions) == wanted
    assert set(wanted.values()) <= {1}
    assert len(groups) <= 2
    assert [g.shape.length for g in groups] == sorted({g.shape.length for g in groups})
    for group in groups:
        assert group.batch_size % spread == 0
        assert group.batch_size < limit.batch_size + spread
        assert group.batches * group.batch_size >= len(group.images) > (group.batches - 1) * group.batch_size
        assert group.shape.length <= limit.sequence_length
        assert (group.contrast is not None) == disturb
    for group, sheet in sheets:
        assert 1 <= len(sheet.questions) <= group.shape.questions <= limit.questions
        assert nodes([talk for _, talk in sheet.questions]) <= group.shape.length
    for group in groups if disturb else []:
        shape, others = group.contrast
        assert shape.questions == group.shape.questions
        # Leaf by leaf the same questions: what is contrasted is one question's.
        assert [[n for n, _ in o.questions] for o in others] == [[n for n, _ in s.questions] for s in group.images]
        for other, sheet in zip(others, group.images, strict=True):
            assert other.name == sheet.name
            assert nodes([talk for _, talk in other.questions]) <= shape.length
            for (_, behind), (_, talk) in zip(other.questions, sheet.questions, strict=True):
                assert [t.text for t in behind.turns[:-1]] == [t.text for t in talk.turns[:-1]]
                assert behind.turns[-1].text == disturbed(talk.turns[-1].text)

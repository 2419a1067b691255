"""DPO: loss and gradients against the formula in torch, and the reference model."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack_sequence, stack
from reverie_jax.data.pipeline import PAIR_STRIDE, TreeBuilder, ordered_batches
from reverie_jax.data.preferences import DPOConfig, find_pairs, token_weights
from reverie_jax.data.survey import survey
from reverie_jax.data.tree import build_tree, unsupervised
from reverie_jax.errors import DataError, UserError
from reverie_jax.models import lora
from reverie_jax.models.sharding import make_mesh
from reverie_jax.train import recipes
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.objective import answer_logps, edge_logps, preference_loss
from reverie_jax.train.reference_model import STORED, adapters_off
from reverie_jax.train.step import (
    TrainState,
    is_lora_or_projector,
    make_optimizer,
    make_step,
    make_trainable,
    trainable_filter,
)
from tests.train import tiny

SHAPE = SequenceShape(length=220, images=2, edges=160, questions=6)
ANSWERS = [("the cat sleeps on a red mat", "the dog sleeps on a mat"), ("two of them", "two of those there")]
CASES = {
    "dpo": DPOConfig(beta=0.1),
    "ddpo-paper": DPOConfig(beta=0.5, gamma=5.0, average=True),
    "with sft": DPOConfig(beta=0.3, gamma=2.0, weight=0.7, sft=0.2),
}

MUFFIN = tiny.SYSTEMS["muffin"]
STORED_SUMS = DPOConfig(beta=0.5, gamma=3.0, reference="stored")


def record(number):
    """An image with a pair about each of two questions and, for odd numbers, a second pair about the first."""
    conversations = []
    for pair, answers in enumerate([*ANSWERS[: 1 + number % 2], ("yes it is", "no")]):
        question = "what?" if pair < 2 else f"is it {number}?"
        for kind, answer in zip(("chosen", "rejected"), answers, strict=True):
            turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
            conversations.append(Conversation(turns, kind=kind, pair=f"{number}-{pair}", dataset="pairs"))
    return dataclasses.replace(tiny.record(number), conversations=tuple(conversations))


@functools.cache
def records():
    return tiny.Records(record(number) for number in range(6))


def builder(preference, shape=SHAPE):
    return TreeBuilder(tiny.processor(), shape, preference)


def run(folder, preference, **changes):
    options = {"data": records(), "preference": preference, "sequence": SHAPE, "dropout": 0.0, **changes}
    return tiny.run(folder, **options)


@functools.cache
def models():
    """(model at the start, the same with adapters and projector moved)."""
    start = tiny.model()
    make_trainable(start, tiny.recipe(dropout=0.0))
    graph, params, rest = nnx.split(start, is_lora_or_projector, ...)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)
    return start, nnx.merge(graph, params, rest)


def batches_of(preference, shape=SHAPE):
    return [Batch(*map(jnp.asarray, b)) for b in ordered_batches(records(), builder(preference, shape), batch_size=2)]


@functools.partial(jax.jit, static_argnums=0)
def _answer_logps(graph, state, batch):
    return answer_logps(edge_logps(nnx.merge(graph, state), batch), batch)


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(graph, state, batch):
    return jax.nn.log_softmax(nnx.merge(graph, state)(batch.inputs), axis=-1)


def separate_answers(model, gamma):
    """Yield (chosen, rejected) of each pair as (weights, log-probabilities): no tree, no packing, from logits."""
    processor = tiny.processor()
    for one in records():
        for sides in find_pairs(one.id, one.conversations):
            chosen, rejected = processor.tokenize(one.id, sides)
            weighted = token_weights(rejected, chosen, gamma)[::-1]
            scored = []
            for side in weighted:
                element = make_element(build_tree([unsupervised(side)]), processor.preprocess(one.image, one.id))
                batch = stack([pack_sequence([element], SequenceShape(120, 1), processor.encoder.patches)], 1)
                table = _log_softmax(*nnx.split(model), Batch(*map(jnp.asarray, batch)))
                table = torch.tensor(np.asarray(table)[0])
                picked = table[torch.arange(len(side) - 1), torch.tensor(side.ids[1:].astype(np.int64))]
                scored.append((torch.tensor(side.weights[1:]), picked))
            yield scored


def expected_loss(model, start, preference):
    """Return the mean loss in torch."""
    losses = []
    pairs = (separate_answers(net, preference.gamma) for net in (model, start))
    for policy, reference in zip(*pairs, strict=True):
        chosen, rejected, chosen_before, rejected_before = (
            (weights * logps).sum() / (weights.sum() if preference.average else 1.0)
            for weights, logps in (*policy, *reference)
        )
        margin = (chosen - chosen_before) - (rejected - rejected_before)
        loss = -preference.weight * torch.nn.functional.logsigmoid(preference.beta * margin)
        losses.append(float(loss - preference.sft * chosen))
    return float(np.mean(losses))


@pytest.mark.parametrize("preference", CASES.values(), ids=CASES)
def test_loss_of_packed_trees_is_that_of_separate_answers(preference):
    start, model = models()
    total = weight = 0.0
    for batch in batches_of(preference):
        policy, reference = (_answer_logps(*nnx.split(net), batch) for net in (model, start))
        loss, rewards = preference_loss(policy, reference, batch, preference)
        total, weight = total + float(loss.total), weight + float(loss.weight)
        assert float(rewards.reward_margin) == pytest.approx(
            float(rewards.chosen_reward) - float(rewards.rejected_reward), abs=1e-5
        )
    assert weight == sum(len(find_pairs(one.id, one.conversations)) for one in records()) == 15
    assert total / weight == pytest.approx(expected_loss(model, start, preference), rel=2e-5)


def torch_loss(policy, reference, questions, preference):
    filled = questions[:, 0::2] >= 0
    margin = (policy - reference)[:, 0::2] - (policy - reference)[:, 1::2]
    losses = -preference.weight * torch.nn.functional.logsigmoid(preference.beta * margin)
    return (losses - preference.sft * policy[:, 0::2])[filled].sum()


@pytest.mark.parametrize("preference", CASES.values(), ids=CASES)
def test_gradients_are_those_of_torch(preference):
    batch = batches_of(preference)[0]
    rng = np.random.default_rng(0)
    logps, before = (rng.normal(-2, 1, size=batch.weight.shape).astype(np.float32) for _ in range(2))

    @jax.jit
    def loss_of(x):
        reference = answer_logps(jnp.asarray(before), batch)
        return preference_loss(answer_logps(x, batch), reference, batch, preference)[0].total

    loss, grads = jax.value_and_grad(loss_of)(jnp.asarray(logps))
    x = torch.tensor(logps, requires_grad=True)
    weight, branch = (torch.tensor(np.asarray(field)) for field in (batch.weight, batch.branch))
    policy, reference = (
        torch.zeros(batch.leaves.shape).scatter_add(1, branch.long(), weight * values)
        for values in (x, torch.tensor(before))
    )
    expected = torch_loss(policy, reference, torch.tensor(np.asarray(batch.questions)), preference)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    np.testing.assert_allclose(np.asarray(grads), x.grad.numpy(), atol=1e-6)


CONTEXT, SENTENCES = (
    "a mat.",
    [(" the cat sleeps.", " the dog sleeps."), (" it is red.", " it is blue."), (" a cup.", " no.")],
)


def siblings(pairs):
    """A record of pairs of sentences behind one context; none of them ends the answer."""
    turns = {text: Turn("assistant", text, prefix=CONTEXT, ended=False) for pair in SENTENCES for text in pair}
    conversations = tuple(
        Conversation((Turn("user", "<image>\nwhat?"), turns[text]), kind=kind, pair=str(number))
        for number, pair in enumerate(pairs)
        for kind, text in zip(("chosen", "rejected"), pair, strict=True)
    )
    return dataclasses.replace(tiny.record(0), conversations=conversations)


def sentence_weights(pair, preference):
    """(ids, weights) of the two sides by a formula of its own: a token a character, the sentence's alone, the end's 0."""
    whole = (Conversation((Turn("user", "<image>\nwhat?"), Turn("assistant", CONTEXT + text))) for text in pair)
    sides = []
    for text, side in zip(pair, tiny.processor().tokenize("r", whole), strict=True):
        weights = np.zeros(len(side), np.float32)
        weights[-1 - len(text) : -1] = 1
        sides.append(dataclasses.replace(side, weights=weights))
    sides = token_weights(*sides[::-1], preference.gamma)[::-1]
    return [(side.ids, side.weights / (side.weights.sum() if preference.average else 1)) for side in sides]


@jax.jit
def _loss_and_gradients(params, reference, batch):
    graph, _, rest = nnx.split(models()[1], is_lora_or_projector, ...)

    def loss_of(params):
        scores = answer_logps(edge_logps(nnx.merge(graph, params, rest), batch), batch)
        return preference_loss(scores, reference, batch, CASES["dpo"])[0].total

    return jax.value_and_grad(loss_of)(params)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("average", [False, True])
def test_sibling_sentences_on_one_tree_are_those_apart(average, gamma):
    preference = dataclasses.replace(CASES["dpo"], gamma=gamma, average=average)
    start, model = models()
    params = nnx.split(model, is_lora_or_projector, ...)[1]

    def run(pairs):
        (batch,) = ordered_batches([siblings(pairs)], builder(preference), batch_size=1)
        batch = Batch(*map(jnp.asarray, batch))
        return batch, *_loss_and_gradients(params, _answer_logps(*nnx.split(start), batch), batch)

    batch, loss, gradients = run(SENTENCES)
    apart = [run([pair]) for pair in SENTENCES]
    assert float(loss) == pytest.approx(sum(float(one[1]) for one in apart), abs=1e-5)
    summed = jax.tree.map(lambda *parts: sum(parts), *(one[2] for one in apart))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    expected = 0.0
    for (alone, *_), pair in zip(apart, SENTENCES, strict=True):
        scores = []
        for net in (model, start):
            table = np.asarray(_log_softmax(*nnx.split(net), alone))[0]
            for branch, (ids, weights) in enumerate(sentence_weights(pair, preference)):
                leaf = int(alone.leaves[0, branch])
                path = [j for j in range(leaf + 1) if leaf < alone.ends[0, j]]
                assert alone.tokens[0, np.asarray(path)].tolist() == ids.tolist()
                taught = np.flatnonzero(weights)
                scores.append(sum(weights[k] * table[path[k - 1], ids[k]] for k in taught))
                edges = np.asarray((alone.branch[0] == branch) & (alone.weight[0] > 0))
                assert "".join(chr(int(id) - 4) for id in alone.target[0][edges]) == pair[branch]
        margin = (scores[0] - scores[2]) - (scores[1] - scores[3])
        expected += np.log1p(np.exp(-preference.beta * margin))
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    # The prompt and the context are computed once.
    assert int((batch.ends[0] > np.arange(SHAPE.length) + 1).sum()) < int(batch.flat_tokens.sum()) / 3


def test_gamma_weighs_corrected_tokens():
    plain, dense = (batches_of(DPOConfig(gamma=gamma))[0] for gamma in (1.0, 5.0))
    assert set(np.asarray(plain.weight).ravel().tolist()) == {0.0, 1.0}
    assert set(np.asarray(dense.weight).ravel().tolist()) == {0.0, 1.0, 5.0}
    assert np.array_equal(plain.target, dense.target)


def test_branches_of_a_pair_share_image_and_question():
    stats = survey(records(), builder(DPOConfig())).stats
    flat = [tiny.processor().tokenize(one.id, one.conversations) for one in records()]
    assert stats.flat_tokens == sum(len(tokens) for conversations in flat for tokens in conversations)
    assert stats.tokens == sum(len(build_tree(conversations)) for conversations in flat)
    assert stats.tokens < 0.6 * stats.flat_tokens


def test_pairs_are_never_split_over_sequences():
    batches = batches_of(DPOConfig(), dataclasses.replace(SHAPE, images=1, questions=2))
    numbers = np.concatenate([np.asarray(batch.questions).reshape(-1, 2) for batch in batches])
    numbers = numbers[numbers[:, 0] >= 0]
    assert len(numbers) == 15
    assert np.array_equal(numbers[:, 0] + 1, numbers[:, 1])
    assert sorted(set((numbers[:, 0] // PAIR_STRIDE).tolist())) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(DataError, match="record r0: pair 0"):
        batches_of(DPOConfig(), dataclasses.replace(SHAPE, questions=1))
    with pytest.raises(DataError, match="pair of answers"):
        survey(tiny.records(), builder(DPOConfig()))


def test_disabled_adapters_are_the_model_at_the_start():
    """After steps that moved adapters and projector, the step's own reference is the untouched model."""
    preference = CASES["ddpo-paper"]
    start, model = tiny.model(), tiny.model()
    recipe = tiny.recipe(preference=preference, sequence=SHAPE, dropout=0.0, projector_learning_rate=1e-2)
    make_trainable(start, recipe)
    make_trainable(model, recipe)
    graph, params, frozen = nnx.split(model, is_lora_or_projector, ...)
    optimizer = make_optimizer(recipe)
    reference = adapters_off(model, recipe, params)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    step = make_step(graph, optimizer, recipe, reference=reference.graph)
    for batch in batches_of(preference)[:3]:
        now = nnx.merge(graph, jax.tree.map(jnp.copy, state.params), frozen)
        state, metrics = step(state, frozen, batch, reference.inputs)
        policy, before = (_answer_logps(*nnx.split(net), batch) for net in (now, start))
        loss, rewards = preference_loss(policy, before, batch, preference)
        assert float(metrics.loss) == pytest.approx(float(loss.total / loss.weight), rel=1e-5)
        assert float(metrics.sums["reward_margin"]) == pytest.approx(float(rewards.reward_margin), abs=1e-5)
    assert float(metrics.loss) < 0.69


def test_the_reference_of_adapters_alone_is_the_model_without_them(tmp_path):
    losses = run(tmp_path, DPOConfig(beta=0.5, gamma=3.0), trainable="adapters", steps=3).losses
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[-1] < 0.65


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference") / "stored"
    return run(folder, STORED_SUMS)


def test_stored_reference_trains_as_disabled_adapters(stored_run, tmp_path):
    losses = run(tmp_path, DPOConfig(beta=0.5, gamma=3.0)).losses
    assert stored_run.losses == pytest.approx(losses, rel=1e-5)
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[-1] < 0.6
    assert not (tmp_path / STORED).exists()
    row = read_metrics(tmp_path)[-1]
    assert {"chosen_reward", "rejected_reward", "reward_margin"} <= row.keys()
    assert 0 <= row["reward_accuracy"] <= 1


def check_resume(finished, folder, **changes):
    """Remove the last checkpoint of a copy, and train on: the reference is still that of the start."""
    shutil.copytree(finished.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    resumed = run(folder, STORED_SUMS, **changes)
    assert resumed.result.steps == 2
    assert (folder / STORED).read_bytes() == (finished.folder / STORED).read_bytes()
    assert resumed.losses == finished.losses


def test_resumed_run_keeps_its_reference(stored_run, tmp_path):
    check_resume(stored_run, tmp_path / "run")


@pytest.mark.slow
def test_resumed_full_training_keeps_its_reference(tmp_path):
    changes = {"trainable": "full", "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    whole = run(tmp_path / "whole", STORED_SUMS, **changes)
    assert whole.losses[0] == pytest.approx(np.log(2), rel=1e-5)
    check_resume(whole, tmp_path / "run", **changes)


def test_training_all_but_image_experts(tmp_path):
    """What is frozen stays to the bit, all else moves; resumed, or on four devices, it is the same run."""

    def options():
        net, texts = tiny.model(MUFFIN), tiny.processor(MUFFIN)
        rates = {"learning_rate": 1e-4, "projector_learning_rate": 1e-4}
        return {"on": net, "processor": texts, "trainable": "all", "freeze_image_experts": True, **rates}

    whole = run(tmp_path / "whole", STORED_SUMS, **options())
    assert whole.losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert whole.losses[-1] < 0.6
    before, after = dict(tiny.flat(tiny.model(MUFFIN))), dict(tiny.flat(whole.model))
    image = ("vision.patch.kernel", "vision.cls", "vision.position")
    kept = {path for path in before if np.array_equal(before[path], after[path])}
    assert kept == {path for path in before if path in image or ".image." in path}
    check_resume(whole, tmp_path / "run", **options())
    mesh = run(tmp_path / "mesh", STORED_SUMS, mesh=make_mesh(1, 2, 2), offload=True, **options())
    assert mesh.losses == pytest.approx(whole.losses, rel=1e-5)
    loaded = tiny.model(MUFFIN)
    load_run(loaded, whole.folder)
    tiny.assert_equal([x for _, x in tiny.flat(loaded)], list(after.values()))


def test_gradients_of_all_weights_are_those_of_separate_answers():
    """DDPO on a tower that is trained too, against its formula on one answer at a time: no tree, no packing."""
    preference, size = CASES["ddpo-paper"], SequenceShape(120, 1)
    recipe = tiny.recipe(trainable="all", preference=preference, sequence=SHAPE, dropout=0.0, max_grad_norm=None)
    start, processor = tiny.model(MUFFIN), tiny.processor(MUFFIN)
    make_trainable(start, recipe)
    graph, params, frozen = nnx.split(start, trainable_filter(recipe), ...)
    rng = np.random.default_rng(5)
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)

    @jax.jit
    @jax.value_and_grad
    def score(params, batch, ids, weights):
        model = nnx.merge(graph, params, frozen)
        table = jax.nn.log_softmax(model.decoder.logits(model.hidden(batch.inputs, train_tower=True)), axis=-1)[0]
        return (weights * jnp.take_along_axis(table, ids[:, None], axis=1)[:, 0]).sum() / weights.sum()

    losses, grads, stored = [], [], []
    for one in records()[:2]:
        for pair in find_pairs(one.id, one.conversations):
            chosen, rejected = processor.tokenize(one.id, pair)
            margin, gradient = 0.0, []
            for side, sign in zip(token_weights(rejected, chosen, preference.gamma)[::-1], (1, -1), strict=True):
                element = make_element(build_tree([unsupervised(side)]), processor.preprocess(one.image, one.id))
                batch = stack([pack_sequence([element], size, processor.encoder.patches)], 1)
                ids, weights = (np.zeros(120, kind) for kind in (np.int32, np.float32))
                ids[: len(side) - 1], weights[: len(side) - 1] = side.ids[1:], side.weights[1:]
                now, before = (score(p, Batch(*map(jnp.asarray, batch)), ids, weights) for p in (moved, params))
                margin += sign * preference.beta * float(now[0] - before[0])
                gradient.append(now[1])
                stored.append(float(before[0]))
            losses.append(np.log1p(np.exp(-margin)))
            factor = -preference.beta / (1 + np.exp(margin))
            grads.append(jax.tree.map(lambda a, b: factor * (a - b), *gradient))  # noqa: B023
    expected = jax.tree.map(lambda *parts: sum(parts) / len(parts), *grads)

    (batch,) = ordered_batches(records()[:2], TreeBuilder(processor, SHAPE, preference), batch_size=2)
    numbers = np.sort(batch.questions[batch.questions >= 0])
    step = make_step(graph, optax.sgd(1.0), recipe)
    state = TrainState(jax.tree.map(jnp.copy, moved), optax.sgd(1.0).init(moved), jnp.zeros((), jnp.int32))
    reference = jnp.asarray(numbers), jnp.asarray(stored, jnp.float32)
    state, metrics = step(state, frozen, Batch(*map(jnp.asarray, batch)), reference)
    assert float(metrics.loss) == pytest.approx(np.mean(losses), rel=2e-5)
    for wanted, old, new in zip(*map(jax.tree.leaves, (expected, moved, state.params)), strict=True):
        error = np.linalg.norm(old - new - wanted)
        assert error <= 1e-4 * np.linalg.norm(wanted) + 2e-6 * np.linalg.norm(old) ** 0.5


def test_unusable_references_are_refused_or_computed_again(stored_run, tmp_path):
    model = tiny.model()
    lora.attach(model, rank=4, alpha=8.0)
    with pytest.raises(UserError, match=r"preference\.reference=stored"):
        run(tmp_path / "adapters", DPOConfig(), on=model)
    # Of another run in a folder without a checkpoint: computed again.
    shutil.copytree(stored_run.folder, tmp_path / "stale", ignore=shutil.ignore_patterns("checkpoints"))
    fresh = run(tmp_path / "stale", STORED_SUMS, data=tiny.Records(reversed(records())))
    assert fresh.losses[0] == pytest.approx(np.log(2), rel=1e-5)
    broken = tmp_path / "broken" / STORED
    broken.parent.mkdir()
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match=str(broken)):
        run(broken.parent, DPOConfig(reference="stored"))


def test_preference_recipes_are_the_published_ones():
    paper, script = recipes.find_recipe("rlhfv-ddpo-paper"), recipes.find_recipe("rlhfv-ddpo-script")
    assert paper.preference == DPOConfig(0.5, 5.0, True, reference="stored")
    assert (paper.batch_size, paper.epochs, paper.warmup_ratio, paper.learning_rate) == (32, 7.0, 0.1, 5e-7)
    assert script.preference == DPOConfig(0.1, 1.1, False, reference="stored")
    assert (script.batch_size, script.steps, script.warmup_ratio, script.learning_rate) == (8, 2160, 0.03, 5e-7)
    assert recipes.override(paper, ["preference.beta=0.2"]).preference.beta == 0.2

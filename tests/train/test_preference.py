"""Preference tuning: loss and gradients against the formula in torch, and where the reference comes from."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.packing import Batch, SequenceShape, element, row, stack
from reverie_jax.data.pipeline import PAIRS, dataset_stats, every_batch, training_batches
from reverie_jax.data.preferences import DPOConfig, pairs, token_weights
from reverie_jax.data.tree import build_tree, unsupervised
from reverie_jax.errors import DataError, UserError
from reverie_jax.models import lora
from reverie_jax.train import recipes
from reverie_jax.train.loop import train
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.objective import answer_sums, edge_logps, preference_loss
from reverie_jax.train.recipes import Recipe
from reverie_jax.train.reference_model import STORED
from reverie_jax.train.step import TrainState, adapt, lora_and_projector, make_optimizer, make_step
from tests.train import tiny

ROW = SequenceShape(length=220, images=2, edges=160, questions=6)
ANSWERS = [("the cat sleeps on a red mat", "the dog sleeps on a mat"), ("two of them", "two of those there")]


def record(number):
    """A picture with two pairs about one question and, for odd numbers, a third about another."""
    plain = tiny.record(number)
    talks = []
    for pair, answers in enumerate([*ANSWERS[: 1 + number % 2], ("yes it is", "no")]):
        question = "what?" if pair < 2 else f"is it {number}?"
        for kind, answer in zip(("chosen", "rejected"), answers, strict=True):
            turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
            talks.append(Conversation(turns, kind=kind, pair=f"{number}-{pair}", dataset="pairs"))
    return dataclasses.replace(plain, conversations=tuple(talks))


def records():
    return tiny.Records(record(number) for number in range(6))


def recipe(preference, **changes) -> Recipe:
    return tiny.recipe(preference=preference, sequence=ROW, dropout=0.0, **changes)


def moved(model, seed=5):
    """Adapters and projector of a run that has gone on for a while."""
    graph, params, rest = nnx.split(model, lora_and_projector, ...)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params)
    return nnx.merge(graph, params, rest)


def batch_of(preference, row=ROW, rows=2):
    source = records()
    batches = every_batch(source, tiny.processor(), row, preference, rows=rows)
    return [Batch(*map(jnp.asarray, batch)) for batch in batches]


@functools.partial(jax.jit, static_argnums=0)
def _logps(graph, state, batch):
    return jax.nn.log_softmax(nnx.merge(graph, state)(batch), axis=-1)


def logps(model, batch):
    return _logps(*nnx.split(model), Batch(*map(jnp.asarray, batch)))


def by_hand(model, preference, base):
    """The mean loss in torch, each answer a sequence of its own: no tree, no packing. Log-probabilities from logits."""

    processor, losses = tiny.processor(), []
    for one in records():
        for sides in pairs(one.id, one.conversations):
            chosen, rejected = processor.tokens(one.id, sides)
            weighted = dict(zip(("rejected", "chosen"), token_weights(rejected, chosen, preference.gamma), strict=True))
            sums = {}
            for name, side in weighted.items():
                alone = element(build_tree([unsupervised(side)]), processor.pixels(one.image, one.id))
                alone = stack([row([alone], SequenceShape(120, 1), processor.encoder.patches)], 1)
                for who, net in (("policy", model), ("reference", base)):
                    table = torch.tensor(np.asarray(logps(net, alone))[0])
                    picked = table[torch.arange(len(side) - 1), torch.tensor(side.ids[1:].astype(np.int64))]
                    weights = torch.tensor(side.weights[1:])
                    total = (weights * picked).sum()
                    sums[name, who] = total / weights.sum() if preference.average else total
            margin = (sums["chosen", "policy"] - sums["chosen", "reference"]) - (
                sums["rejected", "policy"] - sums["rejected", "reference"]
            )
            loss = -preference.weight * torch.nn.functional.logsigmoid(preference.beta * margin)
            losses.append(float(loss - preference.sft * sums["chosen", "policy"]))
    return float(np.mean(losses))


CASES = {
    "dpo": DPOConfig(beta=0.1),
    "ddpo-script": DPOConfig(beta=0.1, gamma=1.1),
    "ddpo-paper": DPOConfig(beta=0.5, gamma=5.0, average=True),
    "with sft": DPOConfig(beta=0.3, gamma=2.0, weight=0.7, sft=0.2),
}


@pytest.mark.parametrize("preference", CASES.values(), ids=CASES)
def test_loss_of_packed_trees_is_the_formulas(preference):
    base = tiny.model()
    adapt(base, recipe(preference))
    model = moved(base)
    total = weight = 0.0
    for batch in batch_of(preference):
        sums, before = (answer_sums(edge_logps(net, batch), batch) for net in (model, base))
        loss, rewards = preference_loss(sums, before, batch, preference)
        total, weight = total + float(loss.total), weight + float(loss.weight)
        assert float(rewards.reward_margin) == pytest.approx(
            float(rewards.chosen_reward) - float(rewards.rejected_reward), abs=1e-5
        )
    assert weight == sum(len(pairs(one.id, one.conversations)) for one in records()) == 15
    assert total / weight == pytest.approx(by_hand(model, preference, base), rel=2e-5)


def torch_loss(sums, reference, questions, preference):
    here = questions[:, 0::2] >= 0
    margin = (sums - reference)[:, 0::2] - (sums - reference)[:, 1::2]
    losses = -preference.weight * torch.nn.functional.logsigmoid(preference.beta * margin)
    return (losses - preference.sft * sums[:, 0::2])[here].sum()


@pytest.mark.parametrize("preference", CASES.values(), ids=CASES)
def test_gradients_by_log_probabilities_are_torchs(preference):
    batch = batch_of(preference)[0]
    rng = np.random.default_rng(0)
    logps, before = (rng.normal(-2, 1, size=batch.weight.shape).astype(np.float32) for _ in range(2))

    def loss_of(x):
        reference = answer_sums(jnp.asarray(before), batch)
        return preference_loss(answer_sums(x, batch), reference, batch, preference)[0].total

    found, ours = jax.value_and_grad(loss_of)(jnp.asarray(logps))
    x = torch.tensor(logps, requires_grad=True)
    weight, branch = (torch.tensor(np.asarray(field)) for field in (batch.weight, batch.branch))
    sums, reference = (
        torch.zeros(batch.leaves.shape).scatter_add(1, branch.long(), weight * values)
        for values in (x, torch.tensor(before))
    )
    loss = torch_loss(sums, reference, torch.tensor(np.asarray(batch.questions)), preference)
    loss.backward()
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
    np.testing.assert_allclose(np.asarray(ours), x.grad.numpy(), atol=1e-6)


def test_gamma_one_unnormalised_is_dpo():
    """Whatever is corrected: every taught token weighs one, and what both answers begin with cancels."""
    batch = batch_of(DPOConfig(gamma=1.0))[0]
    assert set(np.asarray(batch.weight).ravel().tolist()) == {0.0, 1.0}
    dense = batch_of(DPOConfig(gamma=5.0))[0]
    assert np.array_equal(batch.target, dense.target)
    assert set(np.asarray(dense.weight).ravel().tolist()) == {0.0, 1.0, 5.0}


def test_a_pairs_branches_share_the_picture_and_the_question():
    found = dataset_stats(records(), tiny.processor(), ROW, DPOConfig())
    flat = [tiny.processor().tokens(one.id, one.conversations) for one in records()]
    assert found.flat_tokens == sum(len(tokens) for talk in flat for tokens in talk)
    assert found.tokens == sum(len(build_tree(talk)) for talk in flat)
    assert found.tokens < 0.6 * found.flat_tokens


def test_pairs_that_do_not_fit_one_row_are_shared_out_whole():
    small = dataclasses.replace(ROW, images=1, questions=2)
    batches = batch_of(DPOConfig(), row=small)
    numbers = np.concatenate([np.asarray(batch.questions).reshape(-1, 2) for batch in batches])
    numbers = numbers[numbers[:, 0] >= 0]
    assert len(numbers) == 15
    assert np.array_equal(numbers[:, 0] + 1, numbers[:, 1])
    assert sorted(set((numbers[:, 0] // PAIRS).tolist())) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(DataError, match="pair 0 has"):
        batch_of(DPOConfig(), row=dataclasses.replace(ROW, questions=1))
    with pytest.raises(DataError, match="no pair of answers"):
        dataset_stats(tiny.records(), tiny.processor(), ROW, DPOConfig())


@pytest.mark.parametrize(
    "preference",
    [CASES["ddpo-paper"], pytest.param(CASES["ddpo-script"], marks=pytest.mark.slow)],
    ids=["paper", "script"],
)
def test_adapters_off_are_a_second_model(preference):
    """After steps that moved adapters and projector, the step's own reference is the untouched model."""
    base, model = tiny.model(), tiny.model()
    chosen = recipe(preference, steps=5, learning_rate=1e-2, projector_learning_rate=1e-2)
    adapt(base, chosen)
    adapt(model, chosen)
    from reverie_jax.train.reference_model import adapters_off

    graph, params, frozen = nnx.split(model, lora_and_projector, ...)
    optimizer = make_optimizer(chosen)
    reference = adapters_off(model, chosen, params)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    step = make_step(graph, optimizer, chosen, reference=reference.graph)
    batches = batch_of(preference)
    for number in range(3):
        now = nnx.merge(graph, jax.tree.map(jnp.copy, state.params), frozen)
        state, metrics = step(state, frozen, batches[number % len(batches)], reference.held)
        batch = batches[number % len(batches)]
        sums, before = (answer_sums(edge_logps(net, batch), batch) for net in (now, base))
        loss, rewards = preference_loss(sums, before, batch, preference)
        assert float(metrics.loss) == pytest.approx(float(loss.total / loss.weight), rel=1e-5)
        assert float(metrics.sums["reward_margin"]) == pytest.approx(float(rewards.reward_margin), abs=1e-5)
    assert float(metrics.loss) < 0.69


def test_stored_sums_train_as_the_model_without_adapters(tmp_path):
    losses = {}
    for name in ("adapters-off", "stored"):
        chosen = recipe(DPOConfig(beta=0.5, gamma=3.0, reference=name), steps=6, gradient_accumulation_steps=2)
        train(tiny.model(), tiny.processor(), records(), chosen, tmp_path / name)
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert losses["stored"] == pytest.approx(losses["adapters-off"], rel=1e-5)
    assert losses["stored"][0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses["stored"][-1] < 0.6
    assert (tmp_path / "stored" / STORED).exists()
    assert not (tmp_path / "adapters-off" / STORED).exists()


def test_full_tuning_keeps_the_start_as_reference_when_it_resumes(tmp_path):
    chosen = recipe(
        DPOConfig(reference="stored"),
        trainable="full",
        steps=4,
        save_steps=2,
        learning_rate=1e-3,
        projector_learning_rate=1e-3,
    )
    train(tiny.model(), tiny.processor(), records(), chosen, tmp_path / "whole")
    half = recipe(
        DPOConfig(reference="stored"),
        trainable="full",
        steps=4,
        save_steps=2,
        learning_rate=1e-3,
        projector_learning_rate=1e-3,
    )
    train(tiny.model(), tiny.processor(), records(), half, tmp_path / "cut")
    for stale in (tmp_path / "cut" / "checkpoints").glob("4"):
        stale.rename(tmp_path / "gone")
    before = (tmp_path / "cut" / STORED).read_bytes()
    result = train(tiny.model(), tiny.processor(), records(), half, tmp_path / "cut")
    assert result.steps == 2
    assert (tmp_path / "cut" / STORED).read_bytes() == before
    whole, cut = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == cut


def test_adapters_that_are_not_fresh_need_stored_sums(tmp_path):
    model = tiny.model()
    lora.attach(model, rank=4, alpha=8.0)
    with pytest.raises(UserError, match=r"preference.reference=stored"):
        train(model, tiny.processor(), records(), recipe(DPOConfig()), tmp_path)


def test_rewards_are_logged(tmp_path):
    train(tiny.model(), tiny.processor(), records(), recipe(DPOConfig(), steps=2), tmp_path)
    row = read_metrics(tmp_path)[-1]
    assert {"chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy"} <= row.keys()
    assert 0 <= row["reward_accuracy"] <= 1


def test_recipes_are_the_published_ones():
    paper, script = recipes.recipe("rlhfv-ddpo-paper"), recipes.recipe("rlhfv-ddpo-script")
    assert paper.preference == DPOConfig(0.5, 5.0, True, reference="stored")
    assert (paper.rows, paper.epochs, paper.warmup, paper.rate) == (32, 7.0, 0.1, 5e-7)
    assert script.preference == DPOConfig(0.1, 1.1, False, reference="stored")
    assert (script.rows, script.steps, script.warmup, script.rate) == (8, 2160, 0.03, 5e-7)
    assert recipes.override(paper, ["preference.beta=0.2"]).preference.beta == 0.2
    assert Recipe.from_json(paper.to_json()) == paper
    assert json.loads(paper.to_json())["preference"]["gamma"] == 5.0


def test_the_order_of_pairs_does_not_depend_on_hosts():
    source, row = records(), ROW
    make = {"rows": 2, "teaching": DPOConfig(), "seed": 3}
    whole = iter(training_batches(source, tiny.processor(), row, **make))
    parts = [iter(training_batches(source, tiny.processor(), row, local=slice(n, n + 1), **make)) for n in range(2)]
    for _ in range(4):
        one, halves = next(whole), [next(part) for part in parts]
        assert np.array_equal(one.questions, np.concatenate([half.questions for half in halves]))
        assert np.array_equal(one.pixels, np.concatenate([half.pixels for half in halves]))
    for iterator in (whole, *parts):
        iterator.close()

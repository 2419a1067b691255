"""Experts: routing, checkpoints and training equal oracles that were written apart (`moe_loops`, `moe_oracle`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from reverie_jax.errors import CheckpointError
from reverie_jax.models import ModelInputs, VisionLanguageModel, VLMConfig, lora
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints import read_model, write_adapters
from reverie_jax.models.checkpoints.write import write_model, write_original
from reverie_jax.models.config import Remat, Routing
from reverie_jax.models.moe import assign_experts, capacity_of
from reverie_jax.models.sharding import make_mesh, shard_state
from reverie_jax.models.upcycling import layers_of, upcycle
from reverie_jax.models.vision import normalize
from reverie_jax.train.recipes import RECIPES
from reverie_jax.train.step import trainable_filter
from tests.models import moe_oracle as oracle
from tests.models.moe_loops import capacity, route

KINDS = ("stablelm", "qwen", "phi")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("room", [0, 1, 5, 12, 40])
def test_routing_equals_plain_loops(room, masked):
    random = np.random.default_rng(room)
    for tokens in (1, 40):
        logits = random.normal(size=(tokens, 4)).astype(np.float32)
        used = random.random(tokens) < 0.6 if masked else None
        key = jax.random.key(tokens)
        noise = np.asarray(jax.random.gumbel(key, logits.shape, jnp.float32))
        for ours, theirs in ((None, None), (key, noise)):
            found, stats = assign_experts(
                jnp.asarray(logits), room, key=ours, used=None if used is None else jnp.asarray(used)
            )
            wanted = route(logits, capacity=room, noise=theirs, used=used)
            np.testing.assert_allclose(found.weight.T, wanted.weights, atol=1e-6)
            kept = wanted.kept
            np.testing.assert_array_equal(np.asarray(found.expert.T)[kept], wanted.experts[kept])
            np.testing.assert_array_equal(np.asarray(found.slot.T)[kept], wanted.slots[kept])
            assert float(stats.aux) == pytest.approx(wanted.aux, rel=1e-6)
            count = max(1, 2 * (tokens if used is None else used.sum()))
            np.testing.assert_allclose(stats.load, wanted.counts / count, atol=1e-6)
            assert float(stats.dropped) == pytest.approx(wanted.dropped / count, abs=1e-6)


@pytest.mark.parametrize(("tokens", "factor", "minimum"), [(64, 1.0, 0), (64, 1.5, 0), (7, 1.25, 4), (1, 1.5, 0)])
def test_capacity(tokens, factor, minimum):
    wanted = min(tokens, capacity(tokens, 4, factor, minimum))
    assert capacity_of(tokens, 4, Routing(capacity_factor=factor, min_capacity=minimum)) == wanted
    assert capacity_of(tokens, 4, Routing(capacity_factor=None)) == tokens


def batch(sizes: oracle.Sizes, seed: int = 0, rows: int = 4, length: int = 22) -> tuple[oracle.Batch, ModelInputs]:
    """Return one batch for the oracle and for the model: text with an image in each row but the last."""
    random = np.random.default_rng(seed)
    tokens, follow = random.integers(8, sizes.vocab, (2, rows, length))
    patches, side = sizes.patches, sizes.image_size
    slots = np.full((rows, length), -1, np.int32)
    slots[:-1, 4 : 4 + patches] = np.arange(patches)
    tokens[slots >= 0] = sizes.image
    pixels = random.integers(0, 256, (rows, 1, side, side, 3), dtype=np.uint8)
    vision = tower_config(sizes)
    normal = np.moveaxis(np.asarray(normalize(jnp.asarray(pixels[:-1, 0]), vision, jnp.float32)), -1, 1)
    targets = np.where(random.random(tokens.shape) < 0.4, follow, -100)
    theirs = oracle.Batch(*map(torch.tensor, (tokens, normal, targets)))
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ends = np.full((rows, length), length, np.int32)
    return theirs, ModelInputs(tokens.astype(np.int32), positions, ends, slots, pixels)


def tower_config(sizes: oracle.Sizes):
    """Return the normalization of the oracle's tower, in our terms."""
    from reverie_jax.models.architectures import TOWERS

    name = {"clip": "openai/clip-vit-large-patch14-336", "siglip": "google/siglip-so400m-patch14-384"}[sizes.tower]
    return TOWERS[name]


@functools.cache
def checkpoint(kind: str, tower: str, dense: bool, seed: int, root):
    """Write an oracle's model and its tower, and return both with our reading of them."""
    sizes = oracle.Sizes(kind=kind, tower=tower, moe_layers=() if dense else (0, 2, 4))
    model = oracle.build(sizes, seed)
    folder = root / f"{kind}-{tower}-{dense}-{seed}"
    oracle.save(folder / "model", model)
    name = oracle.config(sizes)["mm_image_tower"].split("/")[1]
    model.tower.save_pretrained(folder / name)
    return sizes, model, read_model(folder / "model", components=[folder / name])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("moe")


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_load_and_answer_alike(kind, tower, seed, root):
    sizes, theirs, ours = checkpoint(kind, tower, False, seed, root)
    numbers, inputs = batch(sizes, seed)
    with torch.no_grad():
        wanted = theirs(numbers).logits.numpy()
    np.testing.assert_allclose(ours(inputs), wanted, atol=1e-4)
    assert ours.config.image_tokens == sizes.patches
    assert ours.config.text.experts.layers == sizes.moe_layers


# Of the prompts; the oracle stops at an answer that has its placeholder.
DECODED = {"stablelm": 1, "qwen": 2, "phi": 34}


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_computing_everything_anew(kind, unstacked, root):
    sizes, theirs, ours = checkpoint(kind, "clip", False, 0, root)
    ours = nnx.clone(ours)
    if unstacked:
        ours.decoder.unstack()
    numbers, inputs = batch(sizes, DECODED[kind])
    wanted = oracle.generate(theirs, numbers.tokens, numbers.pixels, 24).numpy()
    hidden, prefix = ours.prefill(jax.tree.map(jnp.asarray, inputs))
    rows, length = inputs.tokens.shape
    suffix = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-3], 1, 24, *x.shape[-2:])), prefix)
    leaves = jnp.full((rows, 1), length - 1, jnp.int32)
    token = ours.decoder.logits(hidden[:, -1:]).argmax(-1).astype(jnp.int32)
    found = [token]
    extend = nnx.jit(type(ours).extend)
    for step in range(23):
        position = jnp.full((rows, 1), length + step, jnp.int32)
        scores, suffix = extend(ours, token, position, leaves, inputs.ends, jnp.int32(step), prefix, suffix)
        token = scores.argmax(-1).astype(jnp.int32)
        found.append(token)
    np.testing.assert_array_equal(np.concatenate(found, 1), wanted)
    # What is decoded one by one is the same appended at once.
    room = [(0, 0), (0, 23), (0, 0), (0, 0)]
    kept = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 4) + room), prefix)
    hidden, _ = nnx.jit(type(ours).append)(ours, jnp.asarray(wanted[:, :-1], jnp.int32), jnp.int32(length), kept)
    np.testing.assert_array_equal(ours.decoder.logits(hidden).argmax(-1), wanted[:, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_written_checkpoints_are_read_back_and_others_refused(kind, root, tmp_path):
    _, _, ours = checkpoint(kind, "clip", False, 0, root)
    write_original(ours, tmp_path / "out")
    again = read_model(tmp_path / "out")
    for (path, a), (_, b) in zip(nnx.to_flat_state(nnx.state(ours)), nnx.to_flat_state(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=str(path))
    assert again.config.text == ours.config.text
    with pytest.raises(CheckpointError, match="experts"):
        write_model(ours, tmp_path / "hf")


@pytest.mark.parametrize("chosen", ["sparse", "first_half", "second_half", "all"])
def test_upcycled_equals_dense(chosen, root):
    for kind in KINDS:
        sizes, _, dense = checkpoint(kind, "clip", True, 0, root)
        model = nnx.clone(dense)
        upcycle(model, chosen, 3, seed=1)
        assert model.config.text.experts.layers == layers_of(chosen, sizes.layers)
        _, inputs = batch(sizes, 2)
        np.testing.assert_allclose(model(inputs), dense(inputs), atol=2e-5)
        with pytest.raises(ValueError, match="already"):
            upcycle(model, chosen, 3)
        bound = sizes.hidden**-0.5
        router = np.asarray(model.decoder.expert_layers.router.kernel[...])
        assert abs(router).max() <= bound
        assert abs(router).max() > 0.9 * bound


ROUTING = Routing(capacity_factor=0.6, group=2)


def loss_of(model: VisionLanguageModel, inputs: ModelInputs, targets, routing: Routing, remat: str = "full", key=None):
    """Return cross-entropy and the routers' loss, as the oracle's `train` has them."""
    hidden, router = model.routed_hidden(inputs, routing, remat=remat, key=key)
    logps = jax.nn.log_softmax(model.decoder.logits(hidden))
    chosen = jnp.take_along_axis(logps, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    supervised = (targets >= 0).astype(jnp.float32)
    return -(chosen * supervised).sum() / supervised.sum() + routing.aux_coefficient * router.aux.sum()


@pytest.mark.parametrize("remat", get_args(Remat))
def test_the_routers_loss_has_a_gradient(remat, root):
    sizes, _, model = checkpoint("stablelm", "clip", False, 0, root)
    inputs = jax.tree.map(jnp.asarray, batch(sizes)[1])
    graph, state = nnx.split(model)

    @jax.jit
    def aux(state):
        return nnx.merge(graph, state).routed_hidden(inputs, ROUTING, remat=remat)[1].aux.sum()

    gradient = jax.grad(aux)(state)["decoder"]["expert_layers"]["router"]["kernel"][...]
    assert (np.abs(np.asarray(gradient)).max((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_of_stage_3(kind, root):
    sizes, _, model = checkpoint(kind, "clip", False, 3, root)
    theirs = oracle.build(dataclasses.replace(sizes, factors=(0.6, 2.0)), 3)
    pairs = [batch(sizes, seed) for seed in range(4)]
    groups = [dataclasses.replace(numbers, groups=[[0, 1], [2, 3]]) for numbers, _ in pairs]
    wanted, after = oracle.train(theirs, groups, 1e-3, 50, oracle.stage3(sizes))
    recipe = dataclasses.replace(RECIPES["moe-llava-stablelm-stage3"], routing=ROUTING)
    graph, params, frozen = nnx.split(model, trainable_filter(recipe), ...)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)

    @jax.jit
    def step(params, moments, inputs, targets):
        loss, grads = jax.value_and_grad(
            lambda params: loss_of(nnx.merge(graph, params, frozen), inputs, targets, ROUTING)
        )(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(grads, moments, params)
            return loss, optax.apply_updates(params, updates), moments

    moments, losses = optimizer.init(params), []
    for number in range(50):
        numbers, inputs = pairs[number % 4]
        targets = jnp.asarray(numbers.targets.numpy().astype(np.int32))
        loss, params, moments = step(params, moments, jax.tree.map(jnp.asarray, inputs), targets)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, wanted, atol=1e-3)
    assert losses[-1] < losses[0] - 0.5
    name = "decoder.expert_layers.router.kernel"
    found = np.asarray(functools.reduce(lambda part, key: part[key], name.split("."), params)[...])
    routers = [tensor for key, tensor in sorted(after.items(), key=lambda pair: pair[0]) if "wg.weight" in key]
    for ours, other in zip(found, routers, strict=True):
        np.testing.assert_allclose(ours, other.T, atol=2e-2)


def test_what_the_third_stage_trains(root):
    _, _, model = checkpoint("stablelm", "clip", False, 0, root)
    recipe = RECIPES["moe-llava-stablelm-stage3"]
    for frozen in (False, True):
        chosen = trainable_filter(dataclasses.replace(recipe, freeze_router=frozen))
        paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, chosen))}
        mlps = {
            f"decoder.{stack}.{name}.kernel" for stack in ("layers", "expert_layers") for name in ("gate", "up", "down")
        }
        router = set() if frozen else {"decoder.expert_layers.router.kernel"}
        projector = {f"projector.linear{number}.{leaf}" for number in (1, 2) for leaf in ("kernel", "bias")}
        assert paths == mlps | router | projector


@pytest.mark.parametrize("axes", [{"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}])
def test_meshes_agree(axes, root):
    sizes, _, model = checkpoint("stablelm", "clip", False, 0, root)
    _, inputs = batch(sizes)
    targets = jnp.asarray(batch(sizes)[0].targets.numpy().astype(np.int32))
    graph, state = nnx.split(model)
    for routing in (Routing(capacity_factor=0.6, group=1), ROUTING, Routing(capacity_factor=None, group=0)):

        @jax.jit
        def run(state, inputs, routing=routing):
            return jax.value_and_grad(lambda state: loss_of(nnx.merge(graph, state), inputs, targets, routing))(state)

        wanted, grads = run(state, jax.tree.map(jnp.asarray, inputs))
        mesh = make_mesh(**axes)
        sharded = shard_state(state, mesh)
        kernel = sharded["decoder"]["expert_layers"]["up"]["kernel"].get_value()
        assert kernel.sharding.shard_shape(kernel.shape)[1] == 4 // axes.get("tensor", 1)
        with jax.set_mesh(mesh):
            found, others = run(sharded, jax.tree.map(jnp.asarray, inputs))
        assert float(found) == pytest.approx(float(wanted), abs=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_adapters_of_experts(root, tmp_path):
    sizes, _, base = checkpoint("stablelm", "clip", False, 0, root)
    model = nnx.clone(base)
    paths = lora.attach(model, rank=3, alpha=6.0, seed=1)
    assert "decoder.expert_layers.up" in paths
    assert not any("router" in path for path in paths)
    _, inputs = batch(sizes)
    plain = base(inputs)
    np.testing.assert_allclose(model(inputs), plain, atol=1e-6)
    random = np.random.default_rng(0)
    for _, layer, a, b in lora.adapters(model):
        b.set_value(jnp.asarray(0.1 * random.normal(size=b.shape), jnp.float32))
        assert a.shape[:-2] == layer.kernel.shape[:-2]
    tuned = model(inputs)
    assert np.abs(tuned - plain).max() > 0.01
    with pytest.raises(CheckpointError, match="experts"):
        write_adapters.write_peft(model, tmp_path, base_model="", projector=False)
    lora.merge(model)
    np.testing.assert_allclose(model(inputs), tuned, atol=2e-4)


def test_a_tree_equals_its_conversations_where_no_token_is_dropped(root):
    """A shared token is routed once; without drops its experts and weights depend on nothing but itself."""
    sizes, _, model = checkpoint("stablelm", "clip", False, 0, root)
    random = np.random.default_rng(4)
    prefix, one, two = (random.integers(8, sizes.vocab, size) for size in (7, 5, 6))
    tokens = np.concatenate([prefix, one, two])[None].astype(np.int32)
    positions = np.concatenate([np.arange(12), np.arange(7, 13)])[None].astype(np.int32)
    ends = np.asarray([18] * 7 + [12] * 5 + [18] * 6, np.int32)[None]
    side = sizes.image_size
    none = np.full_like(tokens, -1), np.zeros((1, 1, side, side, 3), np.uint8)
    tree = np.asarray(model(ModelInputs(tokens, positions, ends, *none)))[0]
    for start, answer in ((7, one), (12, two)):
        flat = np.concatenate([prefix, answer])[None].astype(np.int32)
        length = flat.shape[1]
        inputs = ModelInputs(
            flat,
            np.arange(length, dtype=np.int32)[None],
            np.full((1, length), length, np.int32),
            none[0][:, :length],
            none[1],
        )
        wanted = np.asarray(model(inputs))[0]
        np.testing.assert_allclose(tree[:7], wanted[:7], atol=1e-5)
        np.testing.assert_allclose(tree[start : start + len(answer)], wanted[7:], atol=1e-5)


def test_padding_can_be_left_out(root):
    sizes, _, model = checkpoint("stablelm", "clip", False, 0, root)
    _, inputs = batch(sizes)
    length = inputs.tokens.shape[1]
    ends = inputs.ends.copy()
    ends[:, :17], ends[:, 17:] = 17, np.arange(18, length + 1)
    inputs = inputs._replace(ends=ends)
    routing = dataclasses.replace(ROUTING, mask_padding=True)
    _, stats = model.routed_hidden(jax.tree.map(jnp.asarray, inputs), routing)
    changed = inputs._replace(tokens=np.where(np.arange(length) < 17, inputs.tokens, 9).astype(np.int32))
    _, same = model.routed_hidden(jax.tree.map(jnp.asarray, changed), routing)
    _, other = model.routed_hidden(jax.tree.map(jnp.asarray, changed), ROUTING)
    np.testing.assert_allclose(stats.aux, same.aux, rtol=1e-6)
    np.testing.assert_allclose(stats.load.sum(-1), 1, rtol=1e-5)
    assert not np.allclose(same.aux, other.aux, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "dense", "experts", "trained"),
    [
        ("moe-llava-stablelm-1.6b", 1_644_515_328, 2.890, 2_082_574_336),
        ("moe-llava-qwen-1.8b", 1_836_828_672, 3.054, None),
        ("moe-llava-phi2-2.7b", 2_779_683_840, 5.297, None),
    ],
)
def test_published_sizes(name, dense, experts, trained):
    """Of the language models, without experts and with (in billions), and of what the third stage trains."""

    def size(part):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))

    def make(upcycled):
        model = VisionLanguageModel(ARCHITECTURES[name], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        if upcycled:
            upcycle(model, "sparse", 4)
        return model

    assert size(nnx.eval_shape(lambda: make(False)).decoder) == dense
    model = nnx.eval_shape(lambda: make(True))
    assert round(size(model.decoder) / 1e9, 3) == experts
    if trained is not None:
        chosen = nnx.state(model, trainable_filter(RECIPES["moe-llava-stablelm-stage3"]))
        assert sum(leaf.size for leaf in jax.tree.leaves(chosen)) == trained


def test_groups_must_divide_the_sequences(root):
    sizes, _, model = checkpoint("stablelm", "clip", False, 0, root)
    _, inputs = batch(sizes)
    with pytest.raises(ValueError, match="3"):
        model.routed_hidden(jax.tree.map(jnp.asarray, inputs), Routing(group=3))
    assert isinstance(model.config, VLMConfig)

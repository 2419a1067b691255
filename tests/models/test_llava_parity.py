"""The model compared with transformers' LLaVA: logits, parts, trees, decoding, and files written and read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from reverie_jax.models import ModelInputs
from reverie_jax.models.checkpoints import read_config, read_model, write_model
from reverie_jax.models.decoder import KV
from reverie_jax.models.vision import normalize
from tests.models import makers, oracle
from tests.models.oracle import (
    GROUPED,
    SINGLE_KEY,
    assert_close,
    assert_same,
    image_inputs,
    llava,
    llava_logits,
    logits,
    random_model,
    saved,
)

BOTH = pytest.mark.parametrize("sizes", [GROUPED, SINGLE_KEY], ids=["grouped", "single_key"])


@pytest.fixture(scope="module")
def theirs():
    return llava(GROUPED, seed=0)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return saved(theirs, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def model(folder):
    return read_model(folder)


@BOTH
def test_logits(sizes, tmp_path):
    theirs, inputs = llava(sizes, 1), image_inputs(sizes, 1)
    model, expected = read_model(saved(theirs, tmp_path)), llava_logits(theirs, inputs)
    # The end token is that of generation_config.json.
    assert (
        model.config
        == read_config(tmp_path)
        == dataclasses.replace(sizes.ours, stop_ids=(theirs.config.text_config.eos_token_id,))
    )
    assert np.abs(expected).max() > 1  # large enough for the tolerance to mean something
    assert_close(logits(model, inputs), expected)


def test_vision_features_of_the_selected_layer(theirs, model):
    pixels = image_inputs().images[:, 0]
    with torch.no_grad():
        tower = theirs.model.vision_tower(oracle.normalized(pixels), output_hidden_states=True)
    graph, state = nnx.split(model.vision)
    for layer in (-4, -3, -1, 0, 1, 3):
        depth = dataclasses.replace(model.config, feature_layers=(layer,)).feature_depths
        features = nnx.merge(graph, state)(normalize(jnp.asarray(pixels), model.config.vision, jnp.float32), depth)
        assert_close(features, tower.hidden_states[layer][:, 1:].numpy())


def test_features_at_the_positions_of_images(theirs, model):
    inputs = image_inputs()
    with torch.no_grad():
        expected = theirs.model.get_image_features(oracle.normalized(inputs.images), return_dict=True).pooler_output
    embedded = np.asarray(jax.jit(model.embed)(jax.tree.map(jnp.asarray, inputs)))
    assert_close(embedded[inputs.image_slots >= 0], torch.cat(list(expected)).numpy())


@BOTH
def test_written_model_opens_in_transformers_and_reads_back_exactly(sizes, tmp_path):
    model, inputs = random_model(sizes), image_inputs(sizes)
    write_model(model, tmp_path, dtype=np.float32)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(logits(model, inputs), llava_logits(theirs.eval(), inputs))
    # The end token that config.json names is one that ends an answer.
    model.config = dataclasses.replace(model.config, stop_ids=(theirs.config.text_config.eos_token_id,))
    assert_same(read_model(tmp_path), model)
    new = {"dtype", "pad_token_id", "projection_dim", "image_seq_length", "architectures"}
    assert oracle.differing(llava(sizes).config, theirs.config) <= new
    assert (theirs.config.dtype, theirs.config.image_seq_length) == (torch.float32, sizes.vision.patches)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == sizes.vision.image_size
    clip = CLIPImageProcessor()
    assert (processor.image_mean, processor.image_std) == (clip.image_mean, clip.image_std)


# Trees: each conversation has the logits of its flat sequence.


@pytest.fixture(scope="module", params=makers.KINDS)
def pair(request, tmp_path_factory):
    """transformers' model and ours, of separate and of fused matrices."""
    theirs = makers.hf(makers.parts(request.param))
    return theirs, read_model(saved(theirs, tmp_path_factory.mktemp(request.param)))


def tree():
    """Return one image and two conversations that differ after it: the inputs, and each conversation's indices."""
    prefix = makers.inputs(images=(1,))
    random, shared = np.random.default_rng(5), prefix.tokens.shape[1]
    first, second = (random.integers(8, makers.WORDS, n, dtype=np.int32) for n in (5, 3))
    tokens = np.concatenate([prefix.tokens[0], first, second, [0]]).astype(np.int32)
    positions = np.concatenate([np.arange(shared + 5), np.arange(shared, shared + 3), [0]]).astype(np.int32)
    ends = np.full(len(tokens), shared + 8, np.int32)
    ends[shared : shared + 5], ends[-1] = shared + 5, len(tokens)
    slots = np.concatenate([prefix.image_slots[0], np.full(9, -1, np.int32)])
    trunk = list(range(shared))
    conversations = [trunk + list(range(shared, shared + 5)), trunk + list(range(shared + 5, shared + 8))]
    return ModelInputs(tokens[None], positions[None], ends[None], slots[None], prefix.images), conversations


def conversation_logits(model, inputs, indices, more=()):
    """transformers' logits of one conversation as a flat sequence, with further tokens."""
    tokens = np.concatenate([inputs.tokens[:, indices], np.asarray([more], np.int32).reshape(1, -1)], axis=1)
    slots = np.pad(inputs.image_slots[:, indices], ((0, 0), (0, len(more))), constant_values=-1)
    return llava_logits(model, ModelInputs(tokens, None, None, slots, inputs.images))[0]


def test_tree_gives_each_conversation_its_flat_logits(pair):
    theirs, model = pair
    inputs, conversations = tree()
    ours = logits(model, inputs)
    for indices in conversations:
        assert_close(ours[0, indices], conversation_logits(theirs, inputs, indices))


def test_decoding_gives_each_conversation_its_flat_logits(pair):
    theirs, model = pair
    inputs, conversations = tree()
    words = np.random.default_rng(6).integers(8, makers.WORDS, (2, 3), dtype=np.int32)
    flat = [conversation_logits(theirs, inputs, talk, words[leaf])[-3:] for leaf, talk in enumerate(conversations)]
    graph, state = nnx.split(model)
    device = jax.tree.map(jnp.asarray, inputs)
    _, prefix = jax.jit(lambda state, inputs: nnx.merge(graph, state).prefill(inputs))(state, device)
    empty = jnp.full((*prefix.k.shape[:2], 2, 4, *prefix.k.shape[3:]), 99.0, jnp.float32)
    suffix, leaves = KV(empty, empty), jnp.asarray([[talk[-1] for talk in conversations]], jnp.int32)
    extend = jax.jit(lambda state, *args: nnx.merge(graph, state).extend(*args))
    for step in range(3):
        positions = jnp.asarray([[len(talk) + step for talk in conversations]], jnp.int32)
        new = jnp.asarray(words[None, :, step])
        out, suffix = extend(state, new, positions, leaves, device.ends, jnp.int32(step), prefix, suffix)
        for leaf in range(2):
            assert_close(out[0, leaf], flat[leaf][step])


@pytest.mark.parametrize("unstacked", [False, True])
def test_tokens_appended_to_a_prefilled_sequence_get_their_flat_logits(pair, unstacked):
    """In two parts: the first one is followed by a token that only fills the shape, which the second one overwrites."""
    theirs, model = pair
    model = nnx.clone(model)
    if unstacked:
        model.decoder.unstack()
    inputs, (indices, _) = tree()
    words = np.random.default_rng(7).integers(8, makers.WORDS, 7, dtype=np.int32)
    flat = conversation_logits(theirs, inputs, indices, words)[-7:]
    graph, state = nnx.split(model)
    positions = np.arange(len(indices), dtype=np.int32)[None]
    begun = ModelInputs(
        *(inputs.tokens[:, indices], positions, np.full_like(positions, len(indices))),
        *(inputs.image_slots[:, indices], inputs.images),
    )
    prefill = jax.jit(lambda state, inputs: nnx.merge(graph, state).prefill(inputs))
    _, kept = prefill(state, jax.tree.map(jnp.asarray, begun))
    room = [(0, 0), (0, 9), (0, 0), (0, 0)]
    kept = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 4) + room, constant_values=99.0), kept)
    append = jax.jit(lambda state, *args: nnx.merge(graph, state).append(*args))
    for start, count, new in ((0, 3, [*words[:3], 5]), (3, 4, words[3:])):
        hidden, kept = append(state, jnp.asarray([new], jnp.int32), jnp.int32(len(indices) + start), kept)
        assert_close(model.decoder.logits(hidden)[0, :count], flat[start : start + count])

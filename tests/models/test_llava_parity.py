"""The model compared with transformers' LLaVA: logits, parts, trees, decoding, and files written and read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from reverie_jax.models import ModelInputs
from reverie_jax.models.checkpoints import read_config, read_model, write_model
from reverie_jax.models.decoder import KV
from reverie_jax.models.vision import CLIP_MEAN, CLIP_STD, normalize
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
    assert model.config == read_config(tmp_path) == sizes.ours
    assert np.abs(expected).max() > 1  # large enough for the tolerance to mean something
    assert_close(logits(model, inputs), expected)


def test_vision_features_of_the_selected_layer(theirs, model):
    pixels = image_inputs().images[:, 0]
    with torch.no_grad():
        tower = theirs.model.vision_tower(oracle.normalized(pixels), output_hidden_states=True)
    graph, state = nnx.split(model.vision)
    for layer in (-4, -3, -1, 0, 1, 3):
        depth = dataclasses.replace(model.config, feature_layer=layer).feature_depth
        features = nnx.merge(graph, state)(normalize(jnp.asarray(pixels), jnp.float32), depth)
        assert_close(features, tower.hidden_states[layer][:, 1:].numpy())


def test_features_at_the_positions_of_images(theirs, model):
    inputs = image_inputs()
    with torch.no_grad():
        expected = theirs.model.get_image_features(oracle.normalized(inputs.images), return_dict=True).pooler_output
    embedded = np.asarray(jax.jit(model.embed)(jax.tree.map(jnp.asarray, inputs)))
    assert_close(embedded[inputs.image_slots >= 0], torch.cat(list(expected)).numpy())


def test_normalize_is_clips():
    pixels = image_inputs().images[0]
    processor = CLIPImageProcessor(
        do_resize=False, do_center_crop=False, do_convert_rgb=False, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    expected = np.stack(processor(list(pixels), return_tensors="np", input_data_format="channels_last")["pixel_values"])
    np.testing.assert_allclose(normalize(jnp.asarray(pixels), jnp.float32), np.moveaxis(expected, 1, -1), atol=1e-5)


def test_bfloat16_model_keeps_norms_float32(folder):
    for path, array in oracle.flat(read_model(folder, dtype=jnp.bfloat16)).items():
        assert array.dtype == (np.float32 if "norm" in path else jnp.bfloat16), path


@BOTH
def test_written_model_opens_in_transformers_and_reads_back_exactly(sizes, tmp_path):
    model, inputs = random_model(sizes), image_inputs(sizes)
    write_model(model, tmp_path, dtype=np.float32)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(logits(model, inputs), llava_logits(theirs.eval(), inputs))
    assert_same(read_model(tmp_path), model)
    config, text, vision = theirs.config, theirs.config.text_config, theirs.config.vision_config
    assert (text.head_dim, text.num_key_value_heads) == (sizes.text.head_dim, sizes.text.kv_heads)
    assert (text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (sizes.text.norm_eps, sizes.text.rope_theta)
    assert text.max_position_embeddings == sizes.text.max_positions
    assert (vision.num_attention_heads, vision.layer_norm_eps) == (sizes.vision.heads, sizes.vision.norm_eps)
    assert (vision.hidden_act, config.dtype) == (sizes.vision.activation, torch.float32)
    assert (config.image_token_id, config.vision_feature_layer) == (oracle.IMAGE, sizes.feature_layer)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == sizes.vision.image_size
    np.testing.assert_allclose(processor.image_std, CLIP_STD)


def test_read_then_write_is_exact(folder, model, tmp_path):
    write_model(model, tmp_path, dtype=np.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    after = {name.replace("vision_tower.vision_model.", "vision_tower."): x for name, x in after.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_template_name_is_kept(tmp_path):
    write_model(random_model(), tmp_path, dtype=np.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"reverie_template": "another"}))
    assert read_config(tmp_path).template == "another"


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

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

from reverie_jax.models import ModelInputs
from reverie_jax.models.checkpoints import read_config, read_model, write_model
from reverie_jax.models.decoder import KV
from reverie_jax.models.vision import CLIP_MEAN, CLIP_STD, normalize
from tests.models import oracle
from tests.models.oracle import GROUPED, SINGLE_KEY, llava, llava_logits, logits, picture_rows, random_model, saved

TOLERANCE = 1e-4


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def theirs():
    return llava(GROUPED, seed=0)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return saved(theirs, tmp_path_factory.mktemp("fresh"))


@pytest.fixture(scope="module")
def model(folder):
    return read_model(folder)


def renamed(folder, out, rename):
    """The same checkpoint under other names."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): x for name, x in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


def test_fresh_names_have_no_vision_model_level(folder):
    # What the next tests take for granted: this transformers writes the new naming, and every name as stated.
    names = load_file(folder / "model.safetensors").keys()
    assert not any("vision_model" in name for name in names)
    assert {name.split(".")[0] for name in names} == {"vision_tower", "language_model", "multi_modal_projector"}


@pytest.mark.parametrize("sizes", [GROUPED, SINGLE_KEY], ids=["grouped", "single_key"])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits(sizes, seed, tmp_path):
    theirs = llava(sizes, seed)
    model, batch = read_model(saved(theirs, tmp_path)), picture_rows(sizes, seed)
    expected = llava_logits(theirs, batch)
    assert np.abs(expected).max() > 1  # large enough for the tolerance to mean something
    assert_close(logits(model, batch), expected)


@pytest.mark.parametrize("sizes", [GROUPED, SINGLE_KEY], ids=["grouped", "single_key"])
def test_config(sizes, tmp_path):
    assert read_config(saved(llava(sizes), tmp_path)) == sizes.ours


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 3])
def test_vision_features_of_the_selected_layer(theirs, model, layer):
    pixels = picture_rows()[-1][:, 0]
    with torch.no_grad():
        tower = theirs.model.vision_tower(oracle.normalized(pixels), output_hidden_states=True)
    depth = dataclasses.replace(model.config, feature_layer=layer).feature_depth
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(normalize(x, jnp.float32), depth))
    graph, state = nnx.split(model.vision)
    assert_close(run(state, jnp.asarray(pixels)), tower.hidden_states[layer][:, 1:].numpy())


def test_features_placed_in_the_row(theirs, model):
    tokens, _, _, slots, pixels = picture_rows()
    with torch.no_grad():
        expected = theirs.model.get_image_features(oracle.normalized(pixels), return_dict=True).pooler_output
    placed = np.asarray(jax.jit(model.embed)(jax.tree.map(jnp.asarray, ModelInputs(tokens, tokens, tokens, slots, pixels))))
    assert_close(placed[slots >= 0], torch.cat(list(expected)).numpy())


def test_normalise_is_clips(theirs):
    pixels = picture_rows()[-1][0]
    processor = CLIPImageProcessor(
        do_resize=False, do_center_crop=False, do_convert_rgb=False, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    expected = np.stack(processor(list(pixels), return_tensors="np", input_data_format="channels_last")["pixel_values"])
    np.testing.assert_allclose(normalize(jnp.asarray(pixels), jnp.float32), np.moveaxis(expected, 1, -1), atol=1e-5)


def test_classic_names(folder, model, tmp_path):
    def classic(name):
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    old = read_model(renamed(folder, tmp_path / "old", classic))
    assert_same(old, model)


def test_names_as_in_memory(theirs, folder, model, tmp_path):
    save_file({name: x.contiguous() for name, x in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    assert any(name.startswith("model.language_model.layers.") for name in load_file(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same(read_model(tmp_path), model)


def test_shards(theirs, model, tmp_path):
    saved(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(read_model(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_files_become_float32_exactly(dtype, tmp_path):
    theirs = llava().to(dtype)
    model = read_model(saved(theirs, tmp_path), dtype=jnp.float32)
    kernel = theirs.model.language_model.layers[1].self_attn.k_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(model.decoder.layers.key.kernel[...][1], kernel.T)
    assert model.decoder.layers.key.kernel[...].dtype == jnp.float32


def test_bfloat16_model_keeps_norms_float32(folder):
    model = read_model(folder, dtype=jnp.bfloat16)
    for path, array in oracle.flat(model).items():
        assert array.dtype == (np.float32 if "norm" in path else jnp.bfloat16), path


def assert_same(first, second):
    a, b = oracle.flat(first), oracle.flat(second)
    assert first.config == second.config
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("sizes", [GROUPED, SINGLE_KEY], ids=["grouped", "single_key"])
def test_written_opens_in_transformers(sizes, tmp_path):
    model, batch = random_model(sizes), picture_rows(sizes)
    write_model(model, tmp_path, dtype=np.float32)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_close(logits(model, batch), llava_logits(theirs.eval(), batch))


def test_written_config_says_the_sizes(tmp_path):
    write_model(random_model(), tmp_path, dtype=np.float32)
    config = LlavaForConditionalGeneration.from_pretrained(tmp_path).config
    text, vision = config.text_config, config.vision_config
    assert (text.head_dim, text.num_key_value_heads, text.rms_norm_eps) == (10, 2, 1e-3)
    assert text.rope_parameters["rope_theta"] == 500.0
    assert text.max_position_embeddings == 77
    assert (vision.num_attention_heads, vision.layer_norm_eps, vision.hidden_act) == (3, 1e-5, "quick_gelu")
    assert (config.image_token_id, config.vision_feature_layer) == (oracle.IMAGE, -2)
    assert (config.image_seq_length, config.dtype) == (9, torch.float32)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (24, 24)
    np.testing.assert_allclose(processor.image_std, CLIP_STD)


@pytest.mark.parametrize("sizes", [GROUPED, SINGLE_KEY], ids=["grouped", "single_key"])
def test_write_then_read_is_bit_identical(sizes, tmp_path):
    model = random_model(sizes)
    write_model(model, tmp_path, dtype=np.float32)
    assert_same(read_model(tmp_path), model)


def test_read_then_write_is_bit_identical(folder, model, tmp_path):
    write_model(model, tmp_path, dtype=np.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    after = {name.replace("vision_tower.vision_model.", "vision_tower."): x for name, x in after.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_template_name_survives(tmp_path):
    write_model(random_model(), tmp_path, dtype=np.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"reverie_template": "another"}))
    assert read_config(tmp_path).template == "another"


def tree_and_talks():
    """One picture and two talks that part after it: a row, and each talk as a flat row with its places in the tree."""
    tokens, _, _, slots, pixels = picture_rows(rows=1, images=1, words=4)
    random, shared = np.random.default_rng(5), tokens.shape[1]
    first, second = (random.integers(oracle.IMAGE + 1, GROUPED.text.vocab, n, dtype=np.int32) for n in (5, 3))
    row = np.concatenate([tokens[0], first, second, [0]]).astype(np.int32)
    positions = np.concatenate([np.arange(shared + 5), np.arange(shared, shared + 3), [0]]).astype(np.int32)
    ends = np.full(len(row), shared + 8, np.int32)
    ends[shared : shared + 5], ends[-1] = shared + 5, len(row)
    slots = np.concatenate([slots[0], np.full(9, -1, np.int32)])
    trunk = list(range(shared))
    talks = [trunk + list(range(shared, shared + 5)), trunk + list(range(shared + 5, shared + 8))]
    return (row[None], positions[None], ends[None], slots[None], pixels), talks


def test_tree_gives_each_talk_its_flat_logits(theirs, model):
    batch, talks = tree_and_talks()
    ours = logits(model, batch)
    for talk in talks:
        assert_close(ours[:, talk], llava_logits(theirs, (batch[0][:, talk], None, None, None, batch[4])))


def test_decoding_leaves_gives_each_talk_its_flat_logits(theirs, model):
    batch, talks = tree_and_talks()
    words = np.random.default_rng(6).integers(oracle.IMAGE + 1, GROUPED.text.vocab, (2, 3), dtype=np.int32)
    longer = [np.concatenate([batch[0][:, talk], words[[leaf]]], axis=1) for leaf, talk in enumerate(talks)]
    flat = [llava_logits(theirs, (tokens, None, None, None, batch[4]))[0, -3:] for tokens in longer]
    graph, state = nnx.split(model)
    row = tuple(map(jnp.asarray, batch))
    _, prefix = jax.jit(lambda state, row: nnx.merge(graph, state).prefill(ModelInputs(*row)))(state, row)
    empty = jnp.full((GROUPED.text.layers, 1, 2, 4, 2, 10), 99.0, jnp.float32)
    suffix, leaves = KV(empty, empty), jnp.asarray([[talk[-1] for talk in talks]], jnp.int32)
    extend = jax.jit(lambda state, *args: nnx.merge(graph, state).extend(*args))
    for step in range(3):
        positions = jnp.asarray([[len(talk) + step for talk in talks]], jnp.int32)
        out, suffix = extend(
            state, jnp.asarray(words[None, :, step]), positions, leaves, row[2], jnp.int32(step), prefix, suffix
        )
        for leaf in range(2):
            assert_close(out[0, leaf], flat[leaf][step])

"""Every language model, tower and projector that is read: compared with transformers, in each format, in and out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from reverie_jax.models.checkpoints import read_model, write_model
from reverie_jax.models.checkpoints.write import write_original
from reverie_jax.models.config import VLMConfig
from tests.models import makers
from tests.models.families import (
    FAMILIES,
    ONLY_ORIGINAL,
    SIGLIP,
    TEXTS,
    build,
    component_folders,
    names_of,
    old_folder,
    original_folder,
    rope,
    theirs,
    tower_folder,
)
from tests.models.oracle import (
    IMAGE,
    STEPS,
    Sizes,
    assert_close,
    assert_same,
    greedy,
    image_inputs,
    llava_logits,
    logits,
    normalized,
)


def inputs_of(config: VLMConfig, seed: int):
    sizes = Sizes(config.vision, config.text)
    return image_inputs(sizes, seed, tokens=config.image_tokens)


def decode(model, inputs):
    settings = dataclasses.replace(model.config, stop_ids=(), template="", image_aspect_ratio="pad", tokenization="hf")
    model.config = settings  # which no computation depends on: fewer compilations
    graph, state = nnx.split(model)
    return map(np.asarray, greedy(graph, state, jax.tree.map(jnp.asarray, inputs), IMAGE))


@torch.no_grad()
def their_tokens(model, inputs):
    ids = torch.tensor(inputs.tokens, dtype=torch.long)
    siglip = model.config.vision_config.model_type.startswith("siglip")
    options = {"pixel_values": normalized(inputs.images, siglip=siglip), "attention_mask": torch.ones_like(ids)}
    # The cache of transformers 5 keeps a window where LLaMA's settings have one, which its attention ignores.
    cached = getattr(model.config.text_config, "sliding_window", None) != 4
    options |= {"suppress_tokens": [IMAGE], "use_cache": cached}
    out = model.generate(input_ids=ids, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, **options)
    return out[:, ids.shape[1] :].numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our models by family and seed, read from what transformers saved, or in the only format that there is."""

    @functools.cache
    def read(name, seed=0):
        folder = tmp_path_factory.mktemp("x")
        if name in ONLY_ORIGINAL:
            model = theirs(name, seed)
            tower = tower_folder(folder / "clip", model)
            return read_model(original_folder(folder / "x", model, qwen=name == "qwen"), components=tower)
        theirs(name, seed).save_pretrained(folder)
        return read_model(folder)

    return read


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens(name, seed, models):
    ours, model = nnx.clone(models(name, seed)), theirs(name, seed)
    text, expected = ours.config.text, TEXTS[FAMILIES[name][0]][2]
    assert {key: getattr(text, key) for key in expected} == expected
    inputs = inputs_of(ours.config, seed)
    found, tokens = decode(ours, inputs)
    reference = llava_logits(model, inputs)
    assert np.abs(reference).max() > 1  # large enough for the tolerance to mean something
    assert_close(found, reference)
    np.testing.assert_array_equal(tokens, their_tokens(model, inputs))


PROMPTS = ("template", "tokenization", "image_token_id", "image_aspect_ratio", "vision_tower", "stop_ids")


def assert_same_computation(first, second, ignored=PROMPTS):
    """Check that two models compute the same from the same inputs, with the same parameters, bit for bit."""
    neutral = {name: getattr(second.config, name) for name in ignored}
    first = nnx.clone(first)
    first.config = dataclasses.replace(first.config, **neutral)
    assert_same(first, second)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen"])
def test_llava_hf_of_transformers_4(name, models, tmp_path):
    assert_same_computation(models(name), read_model(old_folder(tmp_path / "x", theirs(name))))


ORIGINAL = [name for name in TEXTS if name != "llama, dynamic rope"] + ["siglip, full", "siglip, default", "clip, full"]


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_format_and_components(name, models, tmp_path):
    model, qwen = theirs(name), name == "qwen"
    tower = tower_folder(tmp_path / "clip", model)
    assert_same_computation(
        models(name), read_model(original_folder(tmp_path / "x", model, qwen=qwen), components=tower)
    )
    path, parts = component_folders(tmp_path, model, qwen=qwen)
    assert_same_computation(models(name), read_model(path, components=parts))


@pytest.mark.parametrize("name", FAMILIES)
def test_written_models_are_read_by_transformers_and_here(name, models, tmp_path):
    ours, model = models(name), theirs(name)
    if name in ONLY_ORIGINAL:
        makers.assert_refused(lambda: write_model(ours, tmp_path / "hf"), any_of=("Qwen-1", "bias"))
    else:
        write_model(ours, tmp_path / "hf")
        assert_same_computation(read_model(tmp_path / "hf"), ours, ("stop_ids",))
        cls = type(model)
        reread, info = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(info.values()), info
        inputs = inputs_of(ours.config, 5)
        assert_close(llava_logits(reread.eval(), inputs), llava_logits(model, inputs), atol=1e-5)
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in reread.state_dict().items())
    plain = FAMILIES[name][2].keys() <= {"vision_feature_select_strategy", "vision_feature_layer"}
    if plain and len(ours.config.feature_layers) == 1 and name != "phi, no bias of the head":
        write_original(ours, tmp_path / "llava")
        assert_same_computation(read_model(tmp_path / "llava"), ours, ("stop_ids",))
    else:
        makers.assert_refused(lambda: write_original(ours, tmp_path / "llava"), "original LLaVA")


@pytest.mark.parametrize("difference", [0, 1])
def test_copy_of_a_tied_embedding_beside_it(difference, models, tmp_path):
    model = theirs("qwen2, tied")
    path, tower = original_folder(tmp_path / "x", model, tower=False), tower_folder(tmp_path / "clip", model)
    tensors = makers.load(path / "model.safetensors")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"] + difference}
    makers.save(path / "model.safetensors", tensors | copy)
    if difference:
        makers.assert_refused(lambda: read_model(path, components=tower), path / "config.json", "tie_word_embeddings")
    else:
        assert_same_computation(models("qwen2, tied"), read_model(path, components=tower))


def test_repository_of_a_whole_siglip(models, tmp_path):
    """Its text tower and pooling head are not used, and it names the mean of its pixels."""
    name = "siglip, full"
    model = theirs(name)
    sizes = {
        "hidden_size": 30,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    config = transformers.SiglipConfig(text_config=sizes, vision_config=SIGLIP | {"vision_use_head": True})
    whole = transformers.SiglipModel(config)
    whole.vision_model.load_state_dict(names_of(model)[2], strict=False)
    whole.save_pretrained(tmp_path / "siglip")
    processor = transformers.SiglipImageProcessor(size={"height": 27, "width": 27}, image_mean=[0.4] * 3)
    processor.save_pretrained(tmp_path / "siglip")
    changes = {"mm_vision_tower": "google/siglip", "image_aspect_ratio": "square"}
    path = original_folder(tmp_path / "x", model, tower=False, **changes)
    ours = read_model(path, components=tmp_path / "siglip")
    assert (ours.config.vision.mean, ours.config.image_aspect_ratio) == ((0.4,) * 3, "stretch")
    ours.config = dataclasses.replace(ours.config, vision=dataclasses.replace(ours.config.vision, mean=(0.5,) * 3))
    assert_same_computation(models(name), ours)


# Longest sequences on which full attention and unscaled frequencies are exact.
CONTEXTS = {
    "mistral": ("Mistral", {"sliding_window": 20}),
    "phi3": ("Phi3", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
    "dynamic rope": ("Llama", rope("dynamic", factor=3.0) | {"max_position_embeddings": 20}),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_ends_where_attention_would_differ(name, tmp_path):
    """A query sees as many keys as the window is long, itself included."""
    prefix, settings = CONTEXTS[name]
    model = build(prefix, settings)
    model.save_pretrained(tmp_path)
    ours = read_model(tmp_path)
    assert ours.config.text.context == 20
    for length, equal in ((20, True), (21, False)):
        inputs = image_inputs(Sizes(ours.config.vision, ours.config.text), 0, (1,), words=length - 9)
        assert inputs.tokens.shape == (1, length)
        differences = np.abs(logits(ours, inputs) - llava_logits(model, inputs))[0, -1]
        assert (differences.max() < 1e-4) == equal
        assert equal or differences.max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"use_sliding_window": False, "sliding_window": 20},
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["full_attention"] * 3},
        {"use_sliding_window": True, "sliding_window": None},
    ],
    ids=str,
)
def test_windows_that_no_layer_has(settings, tmp_path):
    build("Qwen2", settings).save_pretrained(tmp_path)
    assert read_model(tmp_path).config.text.context == 99

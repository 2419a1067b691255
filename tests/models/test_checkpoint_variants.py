"""Every format that is read, compared with torch: what original LLaVA and transformers compute from the same weights."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reverie_jax.data.images import preprocess
from reverie_jax.errors import CheckpointError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints import read_config, read_model
from reverie_jax.models.checkpoints.processing import read_image_processor
from reverie_jax.models.config import CLIP_MEAN, CLIP_STD
from reverie_jax.models.lora import attach
from reverie_jax.models.sharding import make_mesh
from reverie_jax.models.vision import normalize
from tests.models import makers
from tests.models.makers import KINDS, WORDS, parts
from tests.models.oracle import assert_close, assert_same, assert_sharded, flat, llava_logits, logits, randomize

INPUTS = makers.inputs()


@functools.cache
def expected(kind):
    return parts(kind).logits(INPUTS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_transformers_llava(kind):
    assert_close(llava_logits(makers.hf(parts(kind)), INPUTS)[..., :WORDS], expected(kind), atol=1e-5)


# A variant writes a checkpoint into a folder, and returns its path and components.


def hf_saved(**options):
    return lambda at, part: (makers.hf_folder(at / "x", makers.hf(part), **options), [])


def hf(form, **options):
    return lambda at, part: (makers.old_hf_folder(at / "x", part, form, **options), [])


def original(form, clip, *, tower=False, **options):
    def make(at, part):
        # The model's own tower counts: the folder beside it has other weights, and is needed for its config.
        folder = makers.clip_folder(at / "clip", parts(part.kind, seed=99) if tower else part, clip)
        return makers.original_folder(at / "x", part, form, tower=tower, **options), [folder]

    return make


def local_tower(clip, **options):
    def make(at, part):
        tower = str(makers.clip_folder(at / "clip", part, clip))
        return makers.original_folder(at / "x", part, tower=False, mm_vision_tower=tower, **options), []

    return make


def stage_one(llm, clip, *, file=False, **options):
    def make(at, part):
        path = makers.projector_folder(at / "x", part, **options)
        components = [makers.llm_folder(at / "z", part, llm), makers.clip_folder(at / "clip", part, clip)]
        return path / "mm_projector.bin" if file else path, components[::-1] if file else components

    return make


half = {"dtype": torch.float16}
VARIANTS = {
    "llama": {
        "hf, saved by transformers": hf_saved(),
        "hf, old names in safetensors": hf("safetensors", dtype=torch.float32),
        "hf, old names in bin shards": hf("bin shards", dtype=torch.bfloat16),
        "hf, names in memory": hf("safetensors", memory=True, vision_model=False, dtype=torch.bfloat16),
        "original, bin, full CLIP": original("bin", "full", old=True, **half),
        "original, safetensors shards, CLIP in bin": original("safetensors shards", "vision bin", old=True, **half),
        "original, local tower": local_tower("full", old=True),
        "original, tower inside": original("bin", "full", tower=True, old=True),
        "projector folder with config": stage_one("safetensors", "vision bin"),
        "projector file": stage_one("bin shards", "full", config=False, file=True),
    },
    "phi3": {
        "hf, saved in shards": hf_saved(max_shard_size="20KB"),
        "hf, no vision_model, shards": hf("safetensors shards", vision_model=False),
        "hf, names in memory of 4.52": hf("bin", memory=True),
        "original, bin shards, full CLIP in bin": original("bin shards", "full bin", **half),
        "original, tower inside, shards": original("bin shards", "full", tower=True, dtype=torch.bfloat16),
        # LLaVA-pp's merge cuts embedding and head to the tokenizer's length; a config.json may still count the padding.
        "original, fewer rows than config.json says": original("safetensors", "vision saved", vocab_size=128),
        "original, more rows than config.json says": original("bin", "vision saved", vocab_size=80),
        "projector with another prefix": stage_one(
            "safetensors shards", "full bin", config=False, prefix="base_model.model.model.mm_projector."
        ),
    },
    "llava-1.0": {
        "original, bin": original("bin", "full", old=True, **half),
        "original, local tower": local_tower("vision saved"),
        "projector": stage_one("saved", "vision saved", config=False),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in VARIANTS for name in VARIANTS[kind]])
def test_variant(kind, name, tmp_path):
    part = parts(kind)
    path, components = VARIANTS[kind][name](tmp_path, part)
    model = read_model(path, components=components, dtype=jnp.float32)
    config, sizes = model.config, part.llm.config
    assert read_config(path, components=components) == config
    text, vocab = config.text, makers.ROWS if name.startswith("hf") else WORDS
    assert (text.vocab, text.kv_heads, text.max_positions) == (vocab, sizes.num_key_value_heads, 777)
    assert config.projector == ("linear" if kind == "llava-1.0" else "mlp2x_gelu")
    assert np.abs(expected(kind)).max() > 1  # large enough for the tolerance to mean something
    assert_close(logits(model, INPUTS)[..., :WORDS], expected(kind))
    if name.startswith("hf"):
        assert (config.tokenization, config.image_token_id) == ("hf", WORDS)
    else:
        assert (config.tokenization, config.image_token_id) == ("llava", 0)
        assert config.template == ("phi3_instruct" if kind == "phi3" else "vicuna_v1")
    if name.startswith("original"):
        assert config.image_aspect_ratio == ("square" if kind == "llava-1.0" else "pad")


TRAINING = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}}
TRAINING |= {"config": {"run": {"seed": 42, "amp": True, "task": "x"}}, "scaler": None, "epoch": 3}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_state_dict_beside_what_a_training_saves(key, new, clip, tmp_path):
    """MiniGPT-4's and BLIP-2's files, EVA's and DeepSpeed's, and Lightning's."""
    file = makers.projector_folder(tmp_path / "x", parts("phi3"), config=False) / "mm_projector.bin"
    part = {"components": [makers.llm_folder(tmp_path / "llm", parts("phi3")), clip]}
    flat, expected = makers.load(file), read_model(file, **part)
    torch.save({"epoch": 3, key: flat, **TRAINING}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    assert_same(read_model(tmp_path / "x.pth", **part), expected)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return makers.clip_folder(tmp_path_factory.mktemp("x") / "clip", parts("phi3"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_stored_dtype_is_kept(dtype, clip, tmp_path):
    name = str(dtype).removeprefix("torch.")
    path = makers.original_folder(tmp_path / "x", parts("phi3"), "safetensors shards", dtype=dtype)
    model = read_model(path, components=clip)
    assert model.compute_dtype == name
    for leaf, array in flat(model).items():
        assert array.dtype == ("float32" if "norm" in leaf else name), leaf
    fused = parts("phi3").llm.model.layers[1].self_attn.qkv_proj.weight.detach().numpy()
    np.testing.assert_array_equal(model.decoder.layers.qkv.kernel[...][1].astype(np.float32), fused.T)


def test_order_and_number_of_components(clip, tmp_path):
    path, components = stage_one("bin", "full")(tmp_path, parts("llava-1.0"))
    assert_same(read_model(path, components=components), read_model(path, components=components[::-1]))
    path = makers.original_folder(tmp_path / "w", parts("phi3"), tower=False)
    assert_same(read_model(path, components=clip), read_model(str(path), components=[str(clip)]))


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "hf, old names in bin shards"), ("phi3", "original, tower inside, shards")]
)
def test_mesh_gets_the_same_parameters(kind, name, tmp_path):
    path, components = VARIANTS[kind][name](tmp_path, parts(kind))
    mesh = make_mesh(data=2, fsdp=1, tensor=2)
    model = read_model(path, components=components, mesh=mesh)
    assert_sharded(mesh, model)
    assert_same(model, read_model(path, components=components))


# Settings that `test_families` has not, or that change nothing.
DECODERS = [
    {"rms_norm_eps": 0.1},
    {"head_dim": 6, "num_key_value_heads": 3},
    {"pretraining_tp": 2, "use_cache": False, "attention_dropout": 0.5, "initializer_range": 0.9, "sliding_window": 4},
]


@pytest.mark.parametrize("changes", DECODERS, ids=str)
def test_decoder_settings_are_computed(changes, tmp_path):
    text = makers.text_config("llama", makers.ROWS).to_dict() | changes
    options = {"vision_config": makers.vision_config(), "image_token_index": WORDS, "image_seq_length": makers.PATCHES}
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, **options))
    makers.hf_folder(tmp_path, randomize(theirs, 0))
    assert_close(logits(read_model(tmp_path), INPUTS), llava_logits(theirs, INPUTS))


@pytest.mark.parametrize("layer", [[-2], [1], [3]])
def test_list_of_one_feature_layer(layer, tmp_path):
    """As transformers computes it; several would be concatenated."""
    theirs = makers.hf(parts())
    theirs.config.vision_feature_layer = theirs.model.config.vision_feature_layer = layer
    makers.hf_folder(tmp_path, theirs)
    ours = read_model(tmp_path)
    assert ours.config.feature_layers == (layer[0],)
    assert_close(logits(ours, INPUTS), llava_logits(theirs, INPUTS))


# What a processor may say of images: some of it is supported, as transformers computes it.
SETTINGS = {
    "size": [{"shortest_edge": 24}, {"height": 24, "width": 24}, {"shortest_edge": 30}],
    "crop_size": [{"height": 24, "width": 24}, {"height": 24, "width": 20}],
    "image_mean": [list(CLIP_MEAN), [0.5] * 3, [0.1, 0.2, 0.9]],
    "image_std": [list(CLIP_STD), [0.5] * 3, [0.1, 0.2, 0.9]],
    "resample": [3, 2],
    "rescale_factor": [1 / 255, 0.0039215686, 1 / 127.5],
    **{key: [True, False] for key in ("do_resize", "do_rescale", "do_normalize", "do_center_crop")},
}


CHANGES = [(key, value) for key, values in SETTINGS.items() for value in values]


STRETCHED = {"size": {"height": 24, "width": 24}, "image_processor_type": "SiglipImageProcessor"}
STRETCHED |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@given(st.sampled_from(["CLIP", "Siglip"]), st.lists(st.sampled_from(CHANGES), max_size=2))
def test_image_settings_are_followed_or_refused(kind, changes):
    settings = {key: values[0] for key, values in SETTINGS.items()}
    if kind == "Siglip":
        settings = {key: x for key, x in settings.items() if "crop" not in key} | STRETCHED
    settings |= dict(changes)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        makers.write_json(Path(folder) / "preprocessor_config.json", settings)
        try:
            tower, aspect = read_image_processor(Path(folder), makers.SIZES.vision)
        except CheckpointError as error:
            assert any(key in str(error) for key, _ in changes)  # noqa: PT017
            return
    theirs = getattr(transformers, f"{kind}ImageProcessor")(**settings)(picture, return_tensors="np")["pixel_values"][0]
    ours = normalize(jnp.asarray(preprocess(picture, 24, aspect)), tower, jnp.float32)
    np.testing.assert_allclose(ours, np.moveaxis(theirs, 0, -1), atol=1e-5)


# Published models: (hidden, layers, heads, mlp), parameters of (language model, projector, tower), of adapters by rank.
PUBLISHED = {
    "llava-1.0-7b": ((4096, 32, 32, 11008), (6_738_415_616, 4_198_400, 303_179_776), {64: 159_907_840}),
    "llava-1.5-7b": ((4096, 32, 32, 11008), (6_738_415_616, 20_979_712, 303_507_456), {128: 319_815_680}),
    "llava-1.5-13b": ((5120, 40, 40, 13824), (13_015_864_320, 31_467_520, 303_507_456), {128: 500_695_040}),
    "llava-phi3-mini": (
        *((3072, 32, 32, 8192), (3_821_079_552, 12_589_056, 303_507_456)),
        {64: 100_663_296, 128: 201_326_592},
    ),
}


def size(module, kind=nnx.Param):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, kind)))


def save_shapes(folder, tensors, config):
    """Write a checkpoint whose tensors take no memory, on disk or off."""
    torch.save({name: torch.zeros(()).expand(x.shape) for name, x in tensors.items()}, folder / "pytorch_model.bin")
    makers.write_json(folder / "config.json", config)


def published(name):
    """Return config.json and tensors of a published model, as released."""
    hidden, layers, heads, mlp = PUBLISHED[name][0]
    phi, old = "phi3" in name, "1.0" in name
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064 if phi else 32000}
    sizes |= {"max_position_embeddings": 2048 if old else 4096, "rms_norm_eps": 1e-6 if old else 1e-5}
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    vision |= {"image_size": 224 if old else 336, "patch_size": 14}
    with torch.device("meta"):
        config = (transformers.Phi3Config if phi else transformers.LlamaConfig)(**sizes)
        llm = (transformers.Phi3ForCausalLM if phi else transformers.LlamaForCausalLM)(config)
        clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
        projector = makers.projector(1024, hidden, linear=old)
    part = makers.Parts("phi3" if phi else "llava-1.0" if old else "llama", llm, clip, projector)
    tower = "openai/clip-vit-large-patch14" + ("" if old else "-336")
    raw = makers.original_config(part, mm_hidden_size=1024, mm_vision_tower=tower)
    raw |= {} if old else {"rope_theta": 10000.0}
    raw |= {"sliding_window": 2047, "original_max_position_embeddings": 4096} if phi else {}
    raw.pop("head_dim", None)  # not in the released files
    return makers.original_tensors(part), raw


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_and_their_adapters(name, tmp_path):
    """Their towers are in the files, and their sizes follow from the towers' names."""

    def abstract(rank=0):
        model = VisionLanguageModel(ARCHITECTURES[name], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        if rank:
            attach(model, rank=rank, alpha=2.0 * rank)
        return model

    assert {known for known in ARCHITECTURES if known.startswith("llava-")} == PUBLISHED.keys()
    tensors, raw = published(name)
    save_shapes(tmp_path, tensors, raw)
    assert read_config(tmp_path) == dataclasses.replace(ARCHITECTURES[name], stop_ids=(raw["eos_token_id"],))
    _, counts, adapters = PUBLISHED[name]
    model = nnx.eval_shape(abstract)
    assert (size(model.decoder), size(model.projector), size(model.vision)) == counts
    for rank, count in adapters.items():
        assert size(nnx.eval_shape(lambda rank=rank: abstract(rank)), nnx.LoRAParam) == count


def test_llava_hf_config_without_its_class_defaults(tmp_path):
    """Like the config.json of llava-1.5-7b-hf."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    raw = {"model_type": "llava", "image_token_index": 31999, "text_config": text, "vision_config": vision}
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**raw))
    save_shapes(tmp_path, model.state_dict(), raw)
    config, architecture = read_config(tmp_path), ARCHITECTURES["llava-1.5-7b"]
    assert (config.text, config.vision) == (architecture.text, architecture.vision)
    assert (config.projector, config.feature_layers, config.image_token_id) == ("mlp2x_gelu", (-2,), 31999)

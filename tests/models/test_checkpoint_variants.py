"""Every format that is read, held against torch: what transformers and original LLaVA would compute of the same files.

The folders are `tests.models.variants`'; one model per architecture and seed stands behind all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import read_config, read_model
from reverie_jax.models.config import ARCHITECTURES
from reverie_jax.models.lora import attach
from reverie_jax.models.sharding import make_mesh
from tests.models import variants
from tests.models.oracle import IMAGE, flat
from tests.models.tiny import (
    KINDS,
    LINEAR,
    LLAMA,
    PHI,
    PROMPT,
    VISION,
    assert_close,
    assert_on,
    assert_same,
    computed,
    decoded,
    parts,
    prompts,
)
from tests.models.variants import VARIANTS

SEEDS = (0, 2, 3)
BOTH = pytest.mark.parametrize("kind", [LLAMA, PHI], ids=lambda kind: kind.name)


@functools.cache
def expected(kind, seed):
    """(rows, their NEW greedy tokens, vision features, the same projected, logits of rows and tokens)."""
    theirs, rows = parts(kind, seed), prompts(kind, seed)
    new = theirs.greedy(rows)
    grown = rows.grown(new)
    return grown, new, *(x.numpy() for x in theirs.features(rows.images)), theirs.logits(grown)


@BOTH
def test_the_oracle_is_transformers_llava(kind):
    rows = prompts(kind, 0)
    theirs = variants.Tuned(variants.llava(parts(kind))).logits(rows)
    np.testing.assert_array_equal(parts(kind).logits(rows), theirs)


def test_half_precision_files_lose_nothing():
    for kind in KINDS:
        for module in (parts(kind).llm, parts(kind).tower, parts(kind).projector):
            for name, tensor in module.named_parameters():
                assert torch.equal(tensor, tensor.half().float()), name
                assert torch.equal(tensor, tensor.bfloat16().float()), name


# The seeds take turns.
CASES = [
    pytest.param(kind, make, SEEDS[at % len(SEEDS)], id=f"{kind.name}: {name}")
    for at, (kind, name, make) in enumerate(VARIANTS)
]


@pytest.mark.parametrize(("kind", "make", "seed"), CASES)
def test_variant(kind, make, seed, tmp_path):
    path, base = make(tmp_path, parts(kind, seed))
    rows, new, seen, projected, scores = expected(kind, seed)
    assert np.abs(scores).max() > 5  # large enough for the tolerance to mean something
    model = read_model(path, components=base, dtype=jnp.float32)
    config = model.config
    assert (config.text, config.vision, config.feature_layer) == (kind.text, VISION, -2)
    assert config.projector == ("linear" if kind.linear else "mlp2x_gelu")
    assert read_config(path, components=base) == config
    ours = computed(model, rows)
    for one, other in zip(ours, (seen, projected, scores), strict=True):
        assert_close(one, other)
    # One pass over prompt and answer: the greedy loop's every step, if each token is the best after those before it.
    np.testing.assert_array_equal(ours[-1][:, PROMPT - 1 : -1].argmax(-1), new)


@BOTH
def test_greedy_tokens(kind, tmp_path):
    for seed in SEEDS:
        theirs, rows = parts(kind, seed), prompts(kind, seed)
        base = variants.clip_folder(tmp_path / f"clip{seed}", theirs)
        model = read_model(variants.original(tmp_path / f"x{seed}", theirs), components=base, dtype=jnp.float32)
        np.testing.assert_array_equal(decoded(model, rows), expected(kind, seed)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["safetensors shards", "bin"])
def test_the_stored_type_is_kept(dtype, form, tmp_path):
    theirs, kept = parts(PHI), str(dtype).removeprefix("torch.")
    model = read_model(variants.original(tmp_path, theirs, form, tower=True, named=clip(tmp_path), dtype=dtype))
    assert model.compute_dtype == kept
    for path, array in flat(model).items():
        assert array.dtype == ("float32" if "norm" in path else kept), path
    fused = theirs.llm.model.layers[1].self_attn.qkv_proj.weight.detach().numpy()
    np.testing.assert_array_equal(model.decoder.layers.qkv.kernel[...][1].astype(np.float32), fused.T)


def clip(at, kind=PHI):
    return variants.clip_folder(at / "clip", parts(kind))


def test_another_type_on_request(tmp_path):
    path = variants.original(tmp_path / "x", parts(PHI), dtype=torch.float32)
    model = read_model(path, components=clip(tmp_path), dtype=jnp.bfloat16)
    assert {str(array.dtype) for path, array in flat(model).items() if "norm" not in path} == {"bfloat16"}


def test_rows_of_the_vocabulary_are_the_tensors(tmp_path):
    path = variants.original(tmp_path / "x", parts(PHI), vocab_size=128)
    model = read_model(path, components=[clip(tmp_path)])
    assert model.config.text.vocab == PHI.text.vocab == 107
    assert model.decoder.embedding.shape == (107, 192)
    assert model.decoder.head.kernel.shape == (192, 107)


def test_padded_rows_of_a_base_stay(tmp_path):
    """The other way round: a tokenizer's length in config.json, padded matrices in the files."""
    path = variants.original(tmp_path / "x", parts(PHI), vocab_size=100)
    assert read_model(path, components=[clip(tmp_path)]).config.text.vocab == 107


def test_the_order_of_parts_does_not_matter(tmp_path):
    theirs = parts(LINEAR)
    path, base = variants.stage_one("bin", "full")(tmp_path, theirs)
    assert_same(read_model(path, components=base), read_model(path, components=base[::-1]))


def test_one_part_needs_no_list(tmp_path):
    path = variants.original(tmp_path / "x", parts(PHI))
    assert_same(read_model(path, components=clip(tmp_path)), read_model(str(path), components=[str(tmp_path / "clip")]))


def test_settings_of_an_original(tmp_path):
    told = {}
    for kind in KINDS:
        variants.clip_folder(tmp_path / kind.name, parts(kind))
        path = variants.original(tmp_path / f"x{kind.name}", parts(kind), named="openai/clip-of-some-size")
        config = told[kind] = read_config(path, components=[tmp_path / kind.name])
        assert (config.tokenization, config.image_token_id) == ("llava", 0)
        assert config.vision_tower == "openai/clip-of-some-size"
    assert [told[kind].image_aspect_ratio for kind in (LLAMA, LINEAR, PHI)] == ["pad", "square", "pad"]
    assert [told[kind].template for kind in (LLAMA, LINEAR, PHI)] == ["vicuna_v1", "vicuna_v1", "phi3_instruct"]


@BOTH
def test_settings_of_a_llava_hf(kind, tmp_path):
    config = read_config(variants.hf_folder(tmp_path, parts(kind), "bin"))
    assert (config.tokenization, config.image_token_id) == ("hf", IMAGE)


ON_MESH = [(LLAMA, variants.hf("bin shards")), (PHI, variants.with_clip("safetensors", "full"))]


@pytest.mark.parametrize(("kind", "make"), ON_MESH, ids=["llama", "phi"])
def test_a_mesh_gets_the_same_parameters(kind, make, tmp_path):
    path, base = make(tmp_path, parts(kind))
    mesh = make_mesh(data=2, fsdp=1, tensor=2)
    model = read_model(path, components=base, mesh=mesh)
    assert_on(mesh, model)
    assert_same(model, read_model(path, components=base))


COUNTS = {  # language model, projector, vision tower
    "llava-1.0-7b": (6_738_415_616, 4_198_400, 303_179_776),
    "llava-1.5-7b": (6_738_415_616, 20_979_712, 303_507_456),
    "llava-1.5-13b": (13_015_864_320, 31_467_520, 303_507_456),
    "llava-phi3-mini": (3_821_079_552, 12_589_056, 303_507_456),
}
ADAPTERS = [  # rank, parameters
    ("llava-1.0-7b", 64, 159_907_840),
    ("llava-1.5-7b", 128, 319_815_680),
    ("llava-1.5-13b", 128, 500_695_040),
    ("llava-phi3-mini", 64, 100_663_296),
    ("llava-phi3-mini", 128, 201_326_592),
]


def size(module, kind=nnx.Param):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, kind)))


@functools.cache
def abstract(name, rank=0):
    def make():
        model = VisionLanguageModel(ARCHITECTURES[name], rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        if rank:
            attach(model, rank=rank, alpha=2.0 * rank)
        return model

    return nnx.eval_shape(make)


def test_the_architectures_are_those_published():
    assert ARCHITECTURES.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_architectures(name):
    model = abstract(name)
    assert (size(model.decoder), size(model.projector), size(model.vision)) == COUNTS[name]


@pytest.mark.parametrize(("name", "rank", "count"), ADAPTERS, ids=str)
def test_parameters_of_their_adapters(name, rank, count):
    assert size(abstract(name, rank), nnx.LoRAParam) == count


def skeleton(model):
    """A model's tensors with their shapes, and next to no memory, on disk or off."""
    return {name: torch.zeros(()).expand(x.shape) for name, x in model.state_dict().items()}


def published(name):
    """(config.json, tensors) of a published model: keys as in the released files, names from torch's classes."""
    phi, old, big = "phi3" in name, "1.0" in name, "13b" in name
    tower = "openai/clip-vit-large-patch14" + ("" if old else "-336")
    hidden, layers, heads, mlp = (
        (3072, 32, 32, 8192) if phi else (5120, 40, 40, 13824) if big else (4096, 32, 32, 11008)
    )
    raw = {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_aspect_ratio": "square" if old else "pad",
        "intermediate_size": mlp,
        "max_position_embeddings": 2048 if old else 4096,
        "mm_hidden_size": 1024,
        "mm_projector_type": "linear" if old else "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "model_type": "llava_phi" if phi else "llava",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6 if old else 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32064 if phi else 32000,
    }
    if not old:
        raw |= {"num_key_value_heads": heads, "pretraining_tp": 1, "rope_scaling": None, "mm_resampler_type": None}
    sizes = {key: raw[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    if phi:
        raw |= {"sliding_window": 2047, "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    with torch.device("meta"):
        llm = Phi3ForCausalLM(Phi3Config(**sizes)) if phi else LlamaForCausalLM(LlamaConfig(**sizes))
        vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        clip = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=224 if old else 336, patch_size=14))
        projector = torch.nn.Linear(1024, hidden)
        if not old:
            projector = torch.nn.Sequential(projector, torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
    tensors = skeleton(llm) | variants.prefixed("model.mm_projector.", skeleton(projector))
    return raw, tensors | variants.prefixed(variants.TOWER, skeleton(clip))


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_checkpoint_is_that_architecture(name, tmp_path):
    """Its tower lies in the files, and the name alone says of which size it is."""
    raw, tensors = published(name)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    variants.write(tmp_path / "config.json", raw)
    assert read_config(tmp_path) == ARCHITECTURES[name]


def test_a_llava_hf_leaves_out_what_its_class_has_by_default(tmp_path):
    """As the config.json of llava-1.5-7b-hf does."""
    _, tensors = published("llava-1.5-7b")
    spelt = {"model.vision_tower.": "", "model.mm_projector.0.": "multi_modal_projector.linear_1."}
    spelt |= {"model.mm_projector.2.": "multi_modal_projector.linear_2."}
    names = {}
    for name in tensors:
        found = next((old for old in spelt if name.startswith(old)), None)
        names[name] = f"language_model.{name}" if found is None else name.replace(found, spelt[found], 1)
    torch.save({names[name]: x for name, x in tensors.items()}, tmp_path / "pytorch_model.bin")
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    variants.write(
        tmp_path / "config.json",
        {"model_type": "llava", "image_token_index": 31999, "text_config": text, "vision_config": vision},
    )
    config, architecture = read_config(tmp_path), ARCHITECTURES["llava-1.5-7b"]
    assert (config.text, config.vision) == (architecture.text, architecture.vision)
    assert (config.projector, config.feature_layer, config.image_token_id) == ("mlp2x_gelu", -2, 31999)

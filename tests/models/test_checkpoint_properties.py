"""Any settings of a checkpoint: read as transformers reads them, or refused by name; never silently as something else."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.templates import TEMPLATES, to_jinja
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.loading import load_processor
from reverie_jax.models.checkpoints.configs import llava_hf_config, llava_hf_json, original_config, original_json
from reverie_jax.models.checkpoints.decoders import ACTIVATIONS, text_config
from reverie_jax.models.checkpoints.families import LANGUAGE_MODELS, detect_format, original_language_model
from reverie_jax.models.config import TextConfig, VisionConfig
from tests.models import makers

SMALL_TOWER = VisionConfig(hidden=30, layers=3, heads=3, mlp=44, image_size=24, patch_size=8)
ABSENT = "(absent)"
ODD = (ABSENT, None, "7", [], {}, True, -1, 0, 2.5)
"""Values that a number may have in a broken or an unusual file."""
Change = tuple[str, str, Any]
"""Section, key and value."""

SIZES = {
    "vocab_size": (60, 256),
    "hidden_size": (24, 60),
    "intermediate_size": (10,),
    "num_hidden_layers": (1, 5),
    "num_attention_heads": (4, 12),
    "num_key_value_heads": (1, 3, 6),
    "head_dim": (2, 8),
    "max_position_embeddings": (64, 1 << 17),
    "rms_norm_eps": (1e-6, 0.5),
    "layer_norm_eps": (1e-6, 0.5),
}
OTHER = {
    "rope_theta": (100.0, 5000),
    "rope_scaling": (
        *({"rope_type": "default"}, {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 50.0}),
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 50,
        },
    ),
    "rope_parameters": (
        *({"rope_theta": 300.0}, {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "yarn", "factor": 4.0}),
        *({"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},),
    ),
    "partial_rotary_factor": (1.0, 0.4),
    "hidden_act": ("silu", "gelu", "swish", "gelu_new", "relu", "gelu_10"),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "tie_word_embeddings": (True, False),
    "sliding_window": (4, 4096),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 3),
    "use_qkv_bias": (True, False),
    "use_parallel_residual": (True, False),
    "qk_layernorm": (True, False),
    "model_type": (*LANGUAGE_MODELS, "granite", "mixtral"),
    "logits_scaling": (1, 4.0),
}
TOWER = {
    "hidden_size": (24, 60),
    "intermediate_size": (10,),
    "num_hidden_layers": (1, 5),
    "num_attention_heads": (2, 15),
    "image_size": (16, 48),
    "patch_size": (4, 12),
    "layer_norm_eps": (1e-6, 0.25),
    "hidden_act": ("gelu", "quick_gelu", "gelu_pytorch_tanh"),
    "model_type": ("clip_vision_model", "siglip_vision_model"),
}
TOP = {
    "image_token_index": (5, 31999),
    "image_token_id": (6,),
    "vision_feature_layer": (-1, 2, [-2], [-2, -1], 40),
    "vision_feature_select_strategy": ("full", "default"),
    "projector_hidden_act": ("relu", "gelu"),
    "multimodal_projector_bias": (True, False),
    "tie_word_embeddings": (True, False),
    "projector_layernorm_eps": (1e-6,),
    "model_type": ("llava", "llava_next", "vipllava"),
}


def changes(*tables: tuple[str, dict[str, tuple[Any, ...]]]) -> st.SearchStrategy[list[Change]]:
    rows = [
        (section, key, value) for section, table in tables for key, values in table.items() for value in (*values, *ODD)
    ]
    return st.lists(st.sampled_from(rows), max_size=3)


def changed(raw: dict[str, Any], drawn: list[Change]) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    for section, key, value in drawn:
        part = raw[section] if section else raw
        part[key] = value
        if value is ABSENT:
            del part[key]
    return raw


def assert_named(error: CheckpointError, drawn: list[Change]) -> None:
    """One line that names what was changed: the setting, or the value."""
    message = str(error)
    assert "\n" not in message
    words = [word for _, key, value in drawn for word in (key, *ALSO.get(key, ()), str(value))]
    assert any(word in message for word in words), message


ALSO = {
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "rope_theta"), ("rope", "partial_rotary_factor", "freq_factor")
    ),
    "num_hidden_layers": ("layers", "hidden states"),
    "num_attention_heads": ("heads", "head_dim"),
    "num_key_value_heads": ("heads",),
    "hidden_size": ("hidden", "head_dim"),
    "intermediate_size": ("mlp",),
    "vocab_size": ("vocab",),
    "max_position_embeddings": ("max_positions",),
    "image_token_index": ("image_token",),
    **dict.fromkeys(("rms_norm_eps", "architectures"), ("rotated part",)),  # they tell Phi-2 from Phi-3
    "model_type": ("text_config and vision_config", "rotated part"),
}


def decoder_of(config: Any) -> dict[str, Any]:
    """What a language model of transformers computes, in the words of `TextConfig`."""
    kind, rope, heads = config.model_type, config.rope_parameters, config.num_attention_heads
    both = kind in ("llama", "qwen3") and config.attention_bias
    windows = [config.sliding_window] if kind in ("mistral", "phi3") and config.sliding_window else []
    if kind in ("qwen2", "qwen3") and "sliding_attention" in config.layer_types and config.sliding_window:
        windows = [config.sliding_window]
    scaling = rope["rope_type"]
    kinds = {"linear": "linear", "llama3": "llama3"}
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "mlp": config.intermediate_size,
        "norm": "layernorm" if kind in ("phi", "stablelm") else "rmsnorm",
        "norm_eps": config.layer_norm_eps if kind in ("phi", "stablelm") else config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "rotary_fraction": rope.get("partial_rotary_factor", 1.0),
        "rope_scaling": kinds.get(scaling) and (kinds[scaling], rope["factor"]),
        "max_positions": config.max_position_embeddings,
        "context": min([config.max_position_embeddings, *windows]),
        "activation": ACTIVATIONS[config.hidden_act],
        "gated": kind != "phi",
        "parallel": kind == "phi" or (kind == "stablelm" and config.use_parallel_residual),
        "qkv_bias": both or kind in ("phi", "qwen2") or (kind == "stablelm" and config.use_qkv_bias),
        "out_bias": both or kind == "phi",
        "mlp_bias": kind == "phi" or (kind == "llama" and config.mlp_bias),
        "tied_head": config.tie_word_embeddings,
        "qk_norm": kind == "qwen3",
        "fused_mlp": kind == "phi3",
    }


def assert_same_decoder(ours: TextConfig, theirs: Any, **changed: Any) -> None:
    expected = decoder_of(theirs) | changed
    found = {key: getattr(ours, key) for key in expected}
    scaling = ours.rope_scaling
    assert found | {"rope_scaling": scaling and (scaling.kind, scaling.factor)} == expected


def assert_same_tower(ours: VisionConfig, theirs: Any) -> None:
    sizes = (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size)
    assert (ours.hidden, ours.layers, ours.heads, ours.mlp) == sizes
    assert (ours.image_size, ours.patch_size) == (theirs.image_size, theirs.patch_size)
    assert (ours.norm_eps, ours.activation) == (theirs.layer_norm_eps, ACTIVATIONS[theirs.hidden_act])
    clip = theirs.model_type == "clip_vision_model"
    assert (ours.class_token, ours.pre_norm, ours.patch_bias) == (clip, clip, not clip)


def parsed(cls: Any, raw: dict[str, Any]) -> Any:
    """What transformers makes of a config.json; None where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = cls.from_dict(copy.deepcopy(raw))
        except Exception:  # of many types
            return None
    return None if config.get_text_config().rope_parameters.get("rope_theta") is None else config


@pytest.fixture(scope="module")
def llava_hf():
    return json.loads((makers.bench().hf / "config.json").read_text())


@given(changes(("text_config", SIZES | OTHER), ("vision_config", TOWER), ("", TOP)))
@example([("text_config", "rope_scaling", {"type": "linear", "factor": 2.0})])
@example([("text_config", "rope_scaling", {"rope_type": "default", "rope_theta": 50.0})])
@example([("", "image_token_id", 6)])
@settings(max_examples=300)
def test_sizes_of_a_llava_hf_config(llava_hf, drawn):
    raw = changed(llava_hf, drawn)
    with tempfile.TemporaryDirectory() as folder:
        try:
            detect_format(Path(folder) / "config.json", raw)
            ours = llava_hf_config(Path(folder), raw)
        except CheckpointError as error:
            assert_named(error, drawn)
            return
    vip = raw["model_type"] == "vipllava" if raw.get("model_type") else False
    theirs = parsed(transformers.VipLlavaConfig if vip else transformers.LlavaConfig, raw)
    if theirs is None:
        return
    assert_same_decoder(ours.text, theirs.text_config, tied_head=theirs.tie_word_embeddings)
    assert_same_tower(ours.vision, theirs.vision_config)
    layer = theirs.vision_feature_layer
    assert ours.feature_layers == tuple(layer if isinstance(layer, list) else [layer])
    assert theirs.image_token_id in (None, ours.image_token_id)  # with None it fails at the first image
    assert ours.projector_activation == ACTIVATIONS[theirs.projector_hidden_act]
    assert ours.projector_bias == (vip or theirs.multimodal_projector_bias)
    assert (ours.projector_norm_eps is None) == (not vip)
    full = not vip and theirs.vision_feature_select_strategy == "full"
    assert ours.feature_select == ("full" if full else "patch")
    if not ours.text.head_bias:  # is not written in this format
        written = llava_hf_json(ours, "float32", {"eos_token_id": 2})
        assert llava_hf_config(Path("nowhere"), written) == ours
        reread = parsed(transformers.VipLlavaConfig if vip else transformers.LlavaConfig, written)
        assert_same_decoder(ours.text, reread.text_config)
        assert_same_tower(ours.vision, reread.vision_config)


# Original LLaVA: transformers' LLaMA or Phi-3 reads the language model's keys of the flat config.json.

FLAT = {
    "mm_vision_select_layer": (-1, 1, 40),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "mm_patch_merge_type": ("flat", "spatial"),
    "mm_use_im_start_end": (False,),
    "mm_resampler_type": ("spatial_pool",),
    "image_aspect_ratio": ("pad", "square", "anyres"),
    "architectures": (["LlavaLlamaForCausalLM"], ["LlavaPhiForCausalLM"], ["LlavaMistralForCausalLM"], "x"),
    "tune_mm_mlp_adapter": (True,),
}
NAMES = ("llama", "phi", "phi3", "mistral", "qwen", "qwen2", "qwen3", "stablelm", "gemma")
KINDS = {"model_type": ("llava", "share4v", *(f"llava_{name}" for name in NAMES))}


@given(st.sampled_from(makers.KINDS), changes(("", SIZES | OTHER | FLAT | KINDS)))
@settings(max_examples=300)
def test_sizes_of_an_original_config(kind, drawn):
    check_original(kind, drawn)


def check_original(kind: str, drawn: list[Change]) -> None:
    raw = changed(json.loads(json.dumps(makers.original_config(makers.parts(kind)))), drawn)
    path = Path("folder/config.json")
    try:
        detect_format(path, raw)
        found = original_language_model(path, raw)
        ours = original_config(path, raw, text_config(path, raw, found), SMALL_TOWER, "mlp2x_gelu")
    except CheckpointError as error:
        assert_named(error, drawn)
        return
    assert found == kind or any(key in ("model_type", "architectures", "rms_norm_eps") for _, key, _ in drawn)
    if found in ("qwen", "stablelm_epoch"):  # not of transformers
        return
    theirs = parsed(transformers.CONFIG_MAPPING[found], raw | {"model_type": found})
    if theirs is None:
        return
    assert_same_decoder(ours.text, theirs)
    written = original_json(ours, "float32", {})
    text = text_config(path, written, original_language_model(path, written))
    assert original_config(path, written, text, SMALL_TOWER, "mlp2x_gelu") == ours
    layer = raw.get("mm_vision_select_layer")
    assert ours.feature_layers == (-2 if layer is None else layer,)
    assert (ours.image_aspect_ratio == "pad") == (raw.get("image_aspect_ratio") == "pad")
    assert (ours.feature_select == "full") == (raw.get("mm_vision_select_feature") == "cls_patch")


# Words: transformers' own processor renders and tokenizes the prompt, and its generation settings say what ends an answer.

TURN = (
    "{{ m['role'].upper() + ': ' }}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
)
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
LISTS = [{"name": "default", "template": LOOP}], [{"name": "tool_use", "template": LOOP}], ["x"]
PROMPTS = (
    *(
        LOOP,
        "{{ bos_token }}" + LOOP,
        "SYSTEM " + LOOP,
        LOOP.replace("ASSISTANT:", "ASSISTANT: "),
        "{% for %}",
        "no",
        "",
    ),
    *(to_jinja(template) for template in TEMPLATES.values() if template is not None),
)
WORDS = {
    "tokenizer_config.json": {
        "chat_template": (*PROMPTS, *LISTS),
        "eos_token": ("</s>", "<|end|>", "<unk>", {"content": "</s>", "special": True, "__type": "AddedToken"}),
        "bos_token": ("<s>", "</s>"),
        "unk_token": ("<unk>",),
        "add_bos_token": (False,),
        "add_eos_token": (True, False),
        "add_prefix_space": (False, True),
        "legacy": (True, False),
        "clean_up_tokenization_spaces": (True,),
        "model_max_length": (8,),
        "padding_side": ("left",),
        "tokenizer_class": (
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "PreTrainedTokenizerFast",
            "GPT2Tokenizer",
            "Nobody",
        ),
    },
    "generation_config.json": {"eos_token_id": (2, 17, [2, 3], [], ["2"], "</s>")},
    "processor_config.json": {"chat_template": PROMPTS, "image_token": ("<image>",)},
    "chat_template.json": {"chat_template": PROMPTS},
    "chat_template.jinja": {"": PROMPTS},
    "config.json": {"image_token_index": (90, 5)},
}
FILES = [(file, key, value) for file, table in WORDS.items() for key, values in table.items() for value in values]
FILES += [(file, key, value) for file, key in ((x, y) for x in list(WORDS)[:2] for y in WORDS[x]) for value in ODD[:6]]
QUESTION = "ba deki? No"


def their_words(folder: Path) -> tuple[list[int], set[int]] | None:
    """The ids of an open question, its image token once, and those that end an answer; None where transformers fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            processor = transformers.AutoProcessor.from_pretrained(folder)
            text = f"USER: <image>\n{QUESTION} ASSISTANT:"
            if (template := processor.chat_template or tokenizer.chat_template) is not None:
                messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
                options = {"add_generation_prompt": True, "tokenize": False, "chat_template": template}
                text = tokenizer.apply_chat_template(messages, **options)
            begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
            ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        except Exception:  # of many types
            return None
        return tokenizer(text, add_special_tokens=not begins)["input_ids"], set(
            ends if isinstance(ends, list) else [ends]
        ) - {None}


@given(st.lists(st.sampled_from(FILES), max_size=2))
@example([("tokenizer_config.json", "model_max_length", "7")])
@example([("processor_config.json", "chat_template", PROMPTS[-1]), ("chat_template.json", "chat_template", LOOP)])
@settings(max_examples=60)
def test_words_of_a_llava_hf_folder(drawn):
    with tempfile.TemporaryDirectory() as room:
        check_words(shutil.copytree(makers.bench().hf, Path(room) / "model"), drawn)


def check_words(folder: Path, drawn: list[Change]) -> None:
    for file, key, value in drawn:
        if key:
            raw = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
            makers.write_json(folder / file, changed(raw, [("", key, value)] if value != ABSENT or key in raw else []))
        else:
            (folder / file).write_text(value)
    try:
        encoder = load_processor(folder).encoder
        tokens = encoder(Conversation((Turn("user", f"<image>\n{QUESTION}"),)))
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert str(folder) in message or "<image>" in message
        return
    theirs = their_words(folder)
    if theirs is None:
        return
    ids, ends = theirs
    assert [id for id, slot in zip(tokens.ids, tokens.image_slots, strict=True) if slot <= 0] == ids
    assert ends <= set(encoder.stop_ids)

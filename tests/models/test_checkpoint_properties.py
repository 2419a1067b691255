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
from reverie_jax.models.checkpoints.configs import llava_hf_config, original_config, text_config
from reverie_jax.models.checkpoints.families import detect_format, original_language_model
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
}
OTHER = {
    "rope_theta": (100.0, 5000),
    "rope_scaling": (
        *({"rope_type": "default"}, {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 50.0}),
        {"rope_type": "llama3", "factor": 8.0},
    ),
    "rope_parameters": (
        *({"rope_theta": 300.0}, {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "yarn", "factor": 4.0}),
        *({"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5},),
    ),
    "partial_rotary_factor": (1.0, 0.4),
    "hidden_act": ("silu", "gelu", "swish"),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "tie_word_embeddings": (True, False),
    "sliding_window": (4, 4096),
    "model_type": ("llama", "phi3", "mistral", "qwen2", "granite"),
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
    **dict.fromkeys(("rope_scaling", "rope_parameters", "rope_theta"), ("rope", "partial_rotary_factor")),
    "num_hidden_layers": ("layers", "hidden states"),
    "num_attention_heads": ("heads", "head_dim"),
    "num_key_value_heads": ("heads",),
    "hidden_size": ("hidden", "head_dim"),
    "intermediate_size": ("mlp",),
    "vocab_size": ("vocab",),
    "max_position_embeddings": ("max_positions",),
    "image_token_index": ("image_token",),
    "model_type": ("text_config and vision_config",),
}


def decoder_of(config: Any) -> tuple[Any, ...]:
    """The sizes of a language model of transformers, in the order of `TextConfig`."""
    rope = config.rope_parameters
    assert rope["rope_type"] == "default"
    return (
        *(config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads),
        *(
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ),
        *(config.intermediate_size, config.rms_norm_eps, rope["rope_theta"], config.max_position_embeddings),
    )


def assert_same_decoder(ours: TextConfig, theirs: Any) -> None:
    assert ours_of(ours) == decoder_of(theirs)
    assert theirs.hidden_act in ("silu", "swish")
    assert theirs.model_type == ("phi3" if ours.fused else "llama")
    assert not any(getattr(theirs, key, False) for key in ("attention_bias", "mlp_bias"))
    assert not theirs.tie_word_embeddings


def assert_same_tower(ours: VisionConfig, theirs: Any) -> None:
    sizes = (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size)
    assert (ours.hidden, ours.layers, ours.heads, ours.mlp) == sizes
    assert (ours.image_size, ours.patch_size) == (theirs.image_size, theirs.patch_size)
    assert (ours.norm_eps, ours.activation) == (theirs.layer_norm_eps, theirs.hidden_act)


def ours_of(config: Any) -> tuple[Any, ...]:
    return (
        *(config.vocab, config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim, config.mlp),
        *(config.norm_eps, config.rope_theta, config.max_positions),
    )


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
    theirs = parsed(transformers.LlavaConfig, raw)
    if theirs is None:
        return
    text, vision = theirs.text_config, theirs.vision_config
    assert_same_decoder(ours.text, text)
    assert_same_tower(ours.vision, vision)
    layer = theirs.vision_feature_layer
    assert ours.feature_layer == (layer[0] if isinstance(layer, list) else layer)
    assert theirs.image_token_id in (None, ours.image_token_id)  # with None it fails at the first image
    assert theirs.vision_feature_select_strategy == "default"
    assert (theirs.projector_hidden_act, theirs.multimodal_projector_bias) == ("gelu", True)


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
KINDS = {"model_type": ("llava", "llava_llama", "llava_phi", "llava_phi3", "llava_mistral", "llava_qwen", "share4v")}


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
    assert found == kind or any(key in ("model_type", "architectures") for _, key, _ in drawn)
    theirs = parsed(
        {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}[found], raw | {"model_type": found}
    )
    if theirs is None:
        return
    assert_same_decoder(ours.text, theirs)
    assert ours.text.sliding_window == (theirs.sliding_window if found == "phi3" else None)
    layer = raw.get("mm_vision_select_layer")
    assert ours.feature_layer == (-2 if layer is None else layer)
    assert (ours.image_aspect_ratio == "pad") == (raw.get("image_aspect_ratio") == "pad")
    assert raw.get("mm_vision_select_feature") in (None, "patch")


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

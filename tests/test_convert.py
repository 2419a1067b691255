"""`reverie convert` between the formats that hold a whole model.

Held against transformers (what its class and its processor make of the output), against the bytes that went in, and
against the splice of original LLaVA computed in torch.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from reverie_jax.convert import convert
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.models.checkpoints import read_config, read_model
from tests.models import makers
from tests.models.makers import KINDS, ROWS, SIDE, TOWER, WORDS
from tests.models.oracle import llava_logits, logits

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPT = "USER: <image>\nba deki? ASSISTANT:"
INDEX = "model.safetensors.index.json"


def picture(width=21, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_odd_numbers(model):
    """Minus zero and the smallest number there is, where arithmetic on the way would lose them."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "q_proj.weight" in name or "qkv_proj.weight" in name or "norm.weight" in name:
                whole = torch.int32 if tensor.dtype == torch.float32 else torch.int16
                flat = tensor.view(-1)
                flat[0], flat[1] = -0.0, torch.tensor(1, dtype=whole).view(tensor.dtype)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folders as transformers saves them, by kind, type and size of a shard; made once."""
    made = {}

    def get(kind="llama", dtype="float32", shards=None):
        if (kind, dtype, shards) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            model = with_odd_numbers(makers.hf(makers.parts(kind)).to(DTYPES[dtype]))
            made[kind, dtype, shards] = makers.hf_folder(
                folder, model, **({"max_shard_size": shards} if shards else {})
            )
        return made[kind, dtype, shards]

    return get


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return makers.clip_folder(tmp_path_factory.mktemp("clip"), makers.parts())


def tensors(folder):
    """Every tensor of a folder; transformers writes the tower with a level `vision_model`, or without."""
    merged = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            assert name not in merged
            merged[name] = tensor
    return merged


def assert_same_bytes(first, second):
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def opened(folder):
    """transformers' model, which found every key and no other."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def hf_logits(folder, image=WORDS):
    return llava_logits(opened(folder), makers.batch(image=image))


def assert_close(first, second, atol=1e-4):
    np.testing.assert_allclose(np.asarray(first), np.asarray(second), rtol=0, atol=atol)


@pytest.mark.parametrize("shards", [None, "20KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_llava_hf_comes_back_bit_by_bit(kind, dtype, shards, source, tmp_path):
    src = source(kind, dtype, shards)
    convert(src, tmp_path / "out")
    assert_same_bytes(src, tmp_path / "out")
    before, after = opened(src).state_dict(), opened(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(hf_logits(src), hf_logits(tmp_path / "out"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_through_orbax_bit_by_bit(kind, dtype, source, tmp_path):
    src = source(kind, dtype)
    convert(src, tmp_path / "ours", to="orbax")
    convert(tmp_path / "ours", tmp_path / "out")
    assert_same_bytes(src, tmp_path / "out")
    np.testing.assert_array_equal(hf_logits(src), hf_logits(tmp_path / "out"))


@pytest.mark.parametrize("kind", KINDS)
def test_orbax_reads_as_its_source(kind, source, tmp_path):
    src, rows = source(kind), makers.batch()
    convert(src, tmp_path / "ours", to="orbax")
    model = read_model(tmp_path / "ours")
    assert model.config == read_model(src).config
    np.testing.assert_array_equal(logits(model, rows), logits(read_model(src), rows))
    assert_close(logits(model, rows), hf_logits(src))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_through_original_llava(kind, dtype, source, clip, tmp_path):
    src = source(kind, dtype)
    convert(src, tmp_path / "original", to="llava")
    convert(tmp_path / "original", tmp_path / "out", components=[clip])
    first, second = tensors(src), tensors(tmp_path / "out")
    assert first.keys() == second.keys()
    for name in first:
        count = WORDS if first[name].shape[:1] == (ROWS,) else None
        assert torch.equal(first[name][:count].view(torch.uint8), second[name][:count].view(torch.uint8)), name
    image = read_config(tmp_path / "out").image_token_id
    again = hf_logits(tmp_path / "out", image)
    np.testing.assert_array_equal(hf_logits(src)[..., :WORDS], again[..., :WORDS])


@pytest.mark.parametrize("kind", KINDS)
def test_llava_output_reads_back(kind, source, tmp_path):
    convert(source(kind), tmp_path / "out", to="llava")
    model = read_model(tmp_path / "out")
    assert model.config.text.vocab == WORDS
    assert_close(logits(model, makers.batch(image=0)), hf_logits(source(kind))[..., :WORDS])


@pytest.mark.parametrize("kind", KINDS)
def test_written_config_says_the_sizes(kind, source, tmp_path):
    src = source(kind, "bfloat16")
    convert(src, tmp_path / "out")
    before, after = (LlavaForConditionalGeneration.from_pretrained(f).config for f in (src, tmp_path / "out"))
    assert after.dtype == torch.bfloat16
    assert (after.image_token_id, after.image_seq_length, after.vision_feature_layer) == (WORDS, 9, -2)
    sizes = set(makers.text_config(kind).to_diff_dict()) - {"transformers_version", "dtype", "pad_token_id"}
    assert {"vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters"} <= sizes
    for name in sizes:
        assert getattr(after.text_config, name) == getattr(before.text_config, name), name
    for name in ("hidden_size", "image_size", "patch_size", "num_attention_heads", "layer_norm_eps", "hidden_act"):
        assert getattr(after.vision_config, name) == getattr(before.vision_config, name), name


def test_generation_ends_where_it_did(source, tmp_path):
    convert(source(), tmp_path / "out")
    before, after = opened(source()).generation_config, opened(tmp_path / "out").generation_config
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


@pytest.mark.parametrize("through", ["llava-hf", "orbax"])
def test_processor_survives(through, source, tmp_path):
    src = source()
    convert(src, tmp_path / "middle", to=through)
    convert(tmp_path / "middle", tmp_path / "out")
    inputs = {"images": picture(), "text": PROMPT, "return_tensors": "np"}
    before, after = (AutoProcessor.from_pretrained(f)(**inputs) for f in (src, tmp_path / "out"))
    np.testing.assert_array_equal(before["input_ids"], after["input_ids"])
    np.testing.assert_array_equal(before["pixel_values"], after["pixel_values"])
    old, new = (AutoTokenizer.from_pretrained(f) for f in (src, tmp_path / "out"))
    assert old.get_vocab() == new.get_vocab()
    assert (new.bos_token_id, new.eos_token_id, new.pad_token_id, new.unk_token_id) == (1, 2, WORDS + 1, 0)


def test_shards_and_their_index(source, tmp_path):
    src = source(dtype="float16")
    convert(src, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(x.name for x in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    assert len(files) > 3
    total, where = 0, {}
    for file in files:
        held = load_file(tmp_path / "out" / file)
        size = sum(x.numel() * x.element_size() for x in held.values())
        assert held
        assert size <= 20_000 or len(held) == 1
        total += size
        where |= dict.fromkeys(held, file)
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == total
    assert_same_bytes(src, tmp_path / "out")
    np.testing.assert_array_equal(hf_logits(src), hf_logits(tmp_path / "out"))


def test_one_file_where_one_is_enough(source, tmp_path):
    convert(source(shards="20KB"), tmp_path / "out")
    assert [x.name for x in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("to", ["llava-hf", "llava", "orbax"])
def test_card_and_identity_are_there(to, source, tmp_path):
    src = source()
    convert(src, tmp_path / "out", to=to)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert src.name in card
    assert "reverie" in card.lower()
    base_checksums = json.loads((tmp_path / "out" / "reverie.json").read_text("utf-8"))
    assert isinstance(base_checksums, dict)
    assert base_checksums


@pytest.mark.parametrize("to", ["llava-hf", "llava", "orbax"])
def test_same_source_gives_the_same_weights_files(to, source, tmp_path):
    for name in ("one", "two"):
        convert(source(), tmp_path / name, to=to)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if (tmp_path / "one" / file).exists():
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_cast_once(stored, dtype, source, tmp_path):
    convert(source(dtype=stored), tmp_path / "out", dtype=dtype)
    before, after = tensors(source(dtype=stored)), tensors(tmp_path / "out")
    for name in before:
        assert after[name].dtype == DTYPES[dtype], name
        # As torch rounds.
        assert torch.equal(after[name].float(), before[name].to(DTYPES[dtype]).float()), name


# The original format.


@pytest.mark.parametrize("kind", KINDS)
def test_llava_output_has_the_original_names(kind, source, tmp_path):
    convert(source(kind, "float16"), tmp_path / "out", to="llava")
    files = (tmp_path / "out").glob("*.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = makers.original_tensors(makers.parts(kind))
    tower = {name for name in expected if name.startswith(TOWER)}
    assert found.keys() in (expected.keys(), expected.keys() - tower)
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        assert tensor.dtype == torch.float16, name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows from <image> on are gone
        assert torch.equal(found[name], expected[name].half())


@pytest.mark.parametrize("kind", KINDS)
def test_llava_output_has_the_flat_config(kind, source, tmp_path):
    convert(source(kind), tmp_path / "out", to="llava")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = makers.original_config(makers.parts(kind))
    assert "text_config" not in raw
    assert "vision_config" not in raw
    assert raw["architectures"] == wanted["architectures"]
    assert raw["model_type"] in ({"llava", "llava_llama"} if kind == "llama" else {"llava_phi"})
    assert isinstance(raw["mm_vision_tower"], str)
    assert raw["image_aspect_ratio"] != "pad"  # transformers' processor crops
    for key in (
        *("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"),
        *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"),
        *("mm_hidden_size", "mm_projector_type", "mm_use_im_patch_token", "mm_use_im_start_end", "use_mm_proj"),
        *("mm_vision_select_feature", "mm_vision_select_layer", "bos_token_id", "eos_token_id", "rope_theta"),
    ):
        assert raw[key] == wanted[key], key


def test_rows_of_words_past_the_image_stay(tmp_path, clip):
    model = makers.hf(makers.parts())
    src = makers.hf_folder(tmp_path / "src", model, added=("<image>", "<pad>", "<mood>"))
    convert(src, tmp_path / "out", to="llava")
    rows = tensors(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(rows[: WORDS + 3], model.lm_head.weight[: WORDS + 3])


@pytest.mark.parametrize("rows", [WORDS, WORDS + 1, ROWS])
@pytest.mark.parametrize("kind", KINDS)
def test_original_gets_an_image_token(kind, rows, clip, tmp_path):
    part = makers.parts(kind, vocab=rows)
    src = makers.original_folder(tmp_path / "src", part)
    convert(src, tmp_path / "out", components=[clip])
    model = opened(tmp_path / "out")
    assert model.config.image_token_id == WORDS == AutoTokenizer.from_pretrained(src).vocab_size
    vocabulary = {WORDS: ROWS, WORDS + 1: WORDS + 1, ROWS: ROWS}[rows]  # room is used, none is made without need
    assert len(model.lm_head.weight) == len(model.get_input_embeddings().weight) == vocabulary
    assert model.config.text_config.vocab_size == vocabulary
    found = llava_logits(model, makers.batch())
    assert_close(found[..., :rows], makers.original_logits(part, makers.batch()))
    assert np.isfinite(found).all()


def test_original_without_its_tower(clip, tmp_path):
    part = makers.parts()
    src = makers.original_folder(tmp_path / "src", part, tower=False, shards=3)
    convert(src, tmp_path / "out", components=[clip])
    assert_close(hf_logits(tmp_path / "out")[..., :WORDS], makers.original_logits(part, makers.batch()))


def test_new_rows_take_no_part_in_answers(clip, tmp_path):
    # llava-hf's own converter draws them around the mean: a new row that always wins would spoil every answer.
    src = makers.original_folder(tmp_path / "src", makers.parts())
    convert(src, tmp_path / "out", components=[clip])
    found = hf_logits(tmp_path / "out")
    assert (found.argmax(-1) < WORDS).mean() > 0.9
    assert not np.isinf(found).any()


def test_processor_of_a_converted_original(clip, tmp_path):
    src = makers.original_folder(tmp_path / "src", makers.parts())
    convert(src, tmp_path / "out", components=[clip])
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    found = processor(images=picture(), text=PROMPT, return_tensors="np")
    assert found["pixel_values"].shape == (1, 3, SIDE, SIDE)
    ids = found["input_ids"][0].tolist()
    assert ids.count(WORDS) == 9
    words = makers.tokenizer("<image>")(PROMPT)["input_ids"]
    assert [x for x in ids if x != WORDS] == [x for x in words if x != WORDS]
    model = opened(tmp_path / "out")
    with torch.no_grad():
        model(**processor(images=picture(), text=PROMPT, return_tensors="pt"))


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pictures_are_still_padded_or_cropped(aspect, clip, tmp_path):
    src = makers.original_folder(tmp_path / "src", makers.parts(), image_aspect_ratio=aspect)
    convert(src, tmp_path / "out", components=[clip])
    image = picture()
    found = AutoProcessor.from_pretrained(tmp_path / "out")(images=image, text=PROMPT, return_tensors="np")
    if aspect == "pad":
        square = Image.new("RGB", (40, 40), (122, 116, 104))
        square.paste(image, (9, 0))
        image = square
    expected = makers.image_processor()(image, return_tensors="np")["pixel_values"]
    assert_close(found["pixel_values"], expected, atol=1 / 255 / 0.26)


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("to", ["llava-hf", "orbax", "llava"])
def test_what_the_weights_were_tuned_with_survives(to, aspect, clip, tmp_path):
    src = makers.original_folder(tmp_path / "src", makers.parts(), image_aspect_ratio=aspect)
    convert(src, tmp_path / "out", to=to, components=[clip])
    before = read_model(src, components=[clip]).config
    after = read_model(tmp_path / "out").config  # whole: the tower went with it
    assert before.image_aspect_ratio == aspect
    for name in ("template", "tokenization", "image_aspect_ratio", "feature_layer", "projector", "vision"):
        assert getattr(after, name) == getattr(before, name), name


@pytest.mark.parametrize("to", ["llava-hf", "peft"])
def test_linear_projector_has_no_place_in_transformers(to, clip, tmp_path):
    src = makers.original_folder(tmp_path / "src", makers.parts(linear=True))
    with pytest.raises(CheckpointError, match="linear") as caught:
        convert(src, tmp_path / "out", to=to, components=[clip])
    assert "\n" not in str(caught.value)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("through", ["llava", "orbax"])
def test_linear_projector_travels_otherwise(through, clip, tmp_path):
    part = makers.parts(linear=True)
    src = makers.original_folder(tmp_path / "src", part)
    convert(src, tmp_path / "middle", to=through, components=[clip])
    convert(tmp_path / "middle", tmp_path / "out", to="llava")
    found = tensors(tmp_path / "out")
    for name, tensor in makers.original_tensors(part, tower=False).items():
        assert torch.equal(found[name], tensor), name
    rows = makers.batch()
    assert_close(logits(read_model(tmp_path / "out"), rows), makers.original_logits(part, rows))


def test_unknown_format(source, tmp_path):
    with pytest.raises(UserError, match="gguf"):
        convert(source(), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


# The command.


@pytest.fixture(scope="module")
def commands(source, tmp_path_factory):
    """(exit code, stdout, stderr) of a few calls, which run side by side."""
    room = tmp_path_factory.mktemp("room")
    bare = makers.original_folder(room / "bare", makers.parts(), tower=False)
    arguments = {
        "help": ["--help"],
        "format": [source(), room / "a", "--to", "gguf"],
        "base": [bare, room / "b", "--to", "llava-hf"],
        "done": [source(), room / "done", "--to", "llava-hf", "--dtype", "float16", "--shard-size", "20KB"],
    }
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "reverie_jax.cli", "convert", *map(str, rest)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, rest in arguments.items()
    }
    done = {}
    for name, process in started.items():
        out, err = process.communicate(timeout=120)
        done[name] = (process.returncode, out, err)
    return done | {"room": room}


def test_command_help(commands):
    code, out, err = commands["help"]
    assert code == 0, err
    for word in ("SRC", "DST", "--to", "--base", "--adapter", "--dtype", "--shard-size"):
        assert word in out
    for word in ("llava-hf", "peft", "llava-lora", "orbax", "5GB", "float16"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80
    assert "Traceback" not in err


def test_command_refuses_an_unknown_format(commands):
    code, out, err = commands["format"]
    assert code == 2
    assert "gguf" in out + err
    assert "llava-lora" in out + err  # what it may be
    assert "Traceback" not in err
    assert not (commands["room"] / "a").exists()


def test_command_says_which_base_is_missing(commands):
    code, _, err = commands["base"]
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("reverie: error:")
    assert "somebody/a-tiny-clip" in line
    assert "base" in line
    assert not (commands["room"] / "b").exists()


def test_command_converts(commands):
    code, _, err = commands["done"]
    assert code == 0, err
    assert (commands["room"] / "done" / INDEX).exists()
    assert next(iter(tensors(commands["room"] / "done").values())).dtype == torch.float16
    opened(commands["room"] / "done")

"""`reverie convert` between the formats of complete models.

Compared with what transformers' class and processor make of the output, with the bytes of the input, and with original
LLaVA computed in torch.
"""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from reverie_jax import cli
from reverie_jax.convert import convert
from reverie_jax.errors import CheckpointError
from reverie_jax.loading import load_processor
from reverie_jax.models.checkpoints import configs, read_config, read_model
from reverie_jax.train.recipes import find_recipe
from tests.models import makers
from tests.models.makers import KINDS, ROWS, SIDE, TOWER, WORDS
from tests.models.oracle import assert_close, differing, llava_logits, logits
from tests.others import sources

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPT = "USER: <image>\nba deki? ASSISTANT:"
INDEX = "model.safetensors.index.json"
INPUTS = makers.inputs()


def image(width=21, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_special_numbers(model):
    """Set some weights to minus zero and the smallest positive number, which arithmetic on the way would lose."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "q_proj.weight" in name or "qkv_proj.weight" in name or "norm.weight" in name:
                integer = torch.int32 if tensor.dtype == torch.float32 else torch.int16
                flat = tensor.view(-1)
                flat[0], flat[1] = -0.0, torch.tensor(1, dtype=integer).view(tensor.dtype)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return folders as transformers saves them, by kind, dtype and shard size; each is made once."""
    folders = {}

    def get(kind="llama", dtype="float32", shards=None):
        if (kind, dtype, shards) not in folders:
            model = with_special_numbers(makers.hf(makers.parts(kind)).to(DTYPES[dtype]))
            options = {"max_shard_size": shards} if shards else {}
            at = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            folders[kind, dtype, shards] = makers.hf_folder(at, model, **options)
        return folders[kind, dtype, shards]

    return get


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return makers.clip_folder(tmp_path_factory.mktemp("x") / "clip", makers.parts())


def tensors(folder):
    """Return every tensor of a folder; transformers writes the tower with a level `vision_model`, or without."""
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


def open_with_transformers(folder):
    """Open with transformers, which must find every key and no other."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def hf_logits(folder, image=WORDS):
    return llava_logits(open_with_transformers(folder), makers.inputs(image=image))


@pytest.mark.parametrize(("dtype", "shards"), [("float32", "20KB"), ("float16", None), ("bfloat16", None)])
@pytest.mark.parametrize("kind", KINDS)
def test_llava_hf_round_trip_is_exact(kind, dtype, shards, source, tmp_path):
    src = source(kind, dtype, shards)
    convert(src, tmp_path / "out")
    assert_same_bytes(src, tmp_path / "out")
    assert [x.name for x in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert src.name in (tmp_path / "out" / "README.md").read_text("utf-8")
    convert(tmp_path / "out", tmp_path / "again")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "reverie.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    if dtype == "bfloat16":
        check_config(src, tmp_path / "out")


def check_config(src, out):
    before, after = map(LlavaForConditionalGeneration.from_pretrained, (src, out))
    assert before.state_dict().keys() == after.state_dict().keys()
    # Phi-3's class derives the third and fourth; the last is the class that last used a configuration object.
    new = {"pad_token_id", "projection_dim", "attention_bias", "head_dim", "architectures"}
    assert differing(before.config, after.config) <= new
    ids = [model.generation_config.eos_token_id for model in (before, after)]
    assert ids[0] == ids[1] or ids[0] in ids[1]  # Phi-3's template has an end of its own


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("phi3", "float16")])
def test_round_trip_through_orbax_is_exact(kind, dtype, source, tmp_path):
    src = source(kind, dtype)
    convert(src, tmp_path / "orbax", to="orbax")
    model = read_model(tmp_path / "orbax")
    assert model.config == read_model(src).config
    if dtype == "float32":
        assert_close(logits(model, INPUTS), hf_logits(src))
    convert(tmp_path / "orbax", tmp_path / "out")
    assert_same_bytes(src, tmp_path / "out")


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("phi3", "float16")])
def test_round_trip_through_original_llava(kind, dtype, source, clip, tmp_path):
    src = source(kind, dtype)
    convert(src, tmp_path / "original", to="llava")
    model = read_model(tmp_path / "original", dtype="float32")
    assert model.config.text.vocab == WORDS
    assert_close(logits(model, INPUTS), hf_logits(src)[..., :WORDS])
    convert(tmp_path / "original", tmp_path / "out", components=[clip])
    first, second = tensors(src), tensors(tmp_path / "out")
    assert first.keys() == second.keys()
    for name in first:
        count = WORDS if first[name].shape[:1] == (ROWS,) else None
        assert torch.equal(first[name][:count].view(torch.uint8), second[name][:count].view(torch.uint8)), name
    again = hf_logits(tmp_path / "out", read_config(tmp_path / "out").image_token_id)
    np.testing.assert_array_equal(hf_logits(src)[..., :WORDS], again[..., :WORDS])


@pytest.mark.parametrize("through", ["llava-hf", "orbax"])
def test_processor_is_kept(through, source, tmp_path):
    src = source()
    convert(src, tmp_path / "middle", to=through)
    convert(tmp_path / "middle", tmp_path / "out")
    inputs = {"images": image(), "text": PROMPT, "return_tensors": "np"}
    before, after = (AutoProcessor.from_pretrained(f)(**inputs) for f in (src, tmp_path / "out"))
    np.testing.assert_array_equal(before["input_ids"], after["input_ids"])
    np.testing.assert_array_equal(before["pixel_values"], after["pixel_values"])
    old, new = (AutoTokenizer.from_pretrained(f) for f in (src, tmp_path / "out"))
    assert old.get_vocab() == new.get_vocab()
    assert (new.bos_token_id, new.eos_token_id, new.pad_token_id, new.unk_token_id) == (1, 2, WORDS + 1, 0)


def test_shards_and_their_index(source, tmp_path):
    src = source(dtype="float16")
    convert(src, tmp_path / "out", shard_bytes=20_000)
    files = sorted(x.name for x in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    total, weight_map = 0, {}
    for file in files:
        shard = load_file(tmp_path / "out" / file)
        size = sum(x.numel() * x.element_size() for x in shard.values())
        assert 0 < size <= 20_000 or len(shard) == 1
        total += size
        weight_map |= dict.fromkeys(shard, file)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert (index["weight_map"], index["metadata"]["total_size"]) == (weight_map, total)
    assert_same_bytes(src, tmp_path / "out")
    open_with_transformers(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_cast_once(stored, dtype, source, tmp_path):
    convert(source(dtype=stored), tmp_path / "out", dtype=dtype)
    before, after = tensors(source(dtype=stored)), tensors(tmp_path / "out")
    for name in before:
        assert after[name].dtype == DTYPES[dtype], name
        assert torch.equal(after[name].float(), before[name].to(DTYPES[dtype]).float()), name  # as torch rounds


# The original format.


@pytest.mark.parametrize("kind", KINDS)
def test_original_output_has_the_original_names_and_config(kind, source, tmp_path):
    convert(source(kind, "float16"), tmp_path / "out", to="llava")
    written = {name: x for file in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(file).items()}
    expected = makers.original_tensors(makers.parts(kind))
    assert written.keys() in (expected.keys(), {name for name in expected if not name.startswith(TOWER)})
    for name, tensor in written.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, torch.float16), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # rows from <image> on are removed
        assert torch.equal(written[name], expected[name].half())
    raw, wanted = json.loads((tmp_path / "out" / "config.json").read_text()), makers.original_config(makers.parts(kind))
    assert not {"text_config", "vision_config"} & raw.keys()
    assert raw["model_type"] in ({"llava", "llava_llama"} if kind == "llama" else {"llava_phi"})
    assert isinstance(raw["mm_vision_tower"], str)
    assert raw["image_aspect_ratio"] != "pad"  # transformers' processor crops
    other = {"model_type", "mm_vision_tower", "image_aspect_ratio", "pad_token_id"}
    unwritten = {"mm_resampler_type", "transformers_version", "rope_scaling", "pretraining_tp"}
    for key in wanted.keys() - other - unwritten:
        assert raw[key] == wanted[key], key


def test_rows_of_tokens_after_the_image_token_are_kept(tmp_path):
    model = makers.hf(makers.parts())
    src = makers.hf_folder(tmp_path / "src", model, added=("<image>", "<pad>", "<mood>"))
    convert(src, tmp_path / "out", to="llava")
    rows = tensors(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(rows[: WORDS + 3], model.lm_head.weight[: WORDS + 3])


@pytest.mark.parametrize(
    ("kind", "rows", "options", "vocab"),
    [
        ("llama", WORDS, {"tower": False, "form": "bin shards"}, ROWS),
        ("phi3", WORDS + 1, {}, WORDS + 1),  # rows are added only if they are needed
        ("llama", ROWS, {}, ROWS),
    ],
)
def test_original_gets_an_image_token(kind, rows, options, vocab, clip, tmp_path):
    part = makers.parts(kind, vocab=rows)
    src = makers.original_folder(tmp_path / "src", part, **options)
    convert(src, tmp_path / "out", components=[clip])
    model = open_with_transformers(tmp_path / "out")
    assert model.config.image_token_id == WORDS == AutoTokenizer.from_pretrained(src).vocab_size
    assert len(model.lm_head.weight) == len(model.get_input_embeddings().weight) == vocab
    assert model.config.text_config.vocab_size == vocab
    found = llava_logits(model, INPUTS)
    assert_close(found[..., :rows], part.logits(INPUTS))
    assert np.isfinite(found).all()
    assert (found.argmax(-1) < rows).mean() > 0.9  # a new row that always wins would spoil every answer


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_processor_of_a_converted_original(aspect, clip, tmp_path):
    src = makers.original_folder(tmp_path / "src", makers.parts(), image_aspect_ratio=aspect)
    convert(src, tmp_path / "out", components=[clip])
    processor, picture = AutoProcessor.from_pretrained(tmp_path / "out"), image()
    found = processor(images=picture, text=PROMPT, return_tensors="np")
    assert found["pixel_values"].shape == (1, 3, SIDE, SIDE)
    if aspect == "pad":
        square = Image.new("RGB", (40, 40), (122, 116, 104))
        square.paste(picture, (9, 0))
        picture = square
    assert_close(
        found["pixel_values"],
        makers.image_processor()(picture, return_tensors="np")["pixel_values"],
        atol=1 / 255 / 0.26,
    )
    ids, words = found["input_ids"][0].tolist(), makers.tokenizer("<image>")(PROMPT)["input_ids"]
    assert ids.count(WORDS) == 9
    assert [x for x in ids if x != WORDS] == [x for x in words if x != WORDS]
    with torch.no_grad():
        open_with_transformers(tmp_path / "out")(**processor(images=image(), text=PROMPT, return_tensors="pt"))


@pytest.mark.parametrize(
    ("to", "aspect"), [("llava-hf", "pad"), ("llava-hf", "square"), ("orbax", "pad"), ("llava", "square")]
)
def test_input_settings_are_kept(to, aspect, clip, tmp_path):
    src = makers.original_folder(tmp_path / "src", makers.parts(), image_aspect_ratio=aspect)
    convert(src, tmp_path / "out", to=to, components=[clip])
    before = read_config(src, components=[clip])
    after = read_config(tmp_path / "out")  # the tower is in it
    assert before.image_aspect_ratio == aspect
    for name in ("template", "tokenization", "image_aspect_ratio", "feature_layers", "projector", "vision"):
        assert getattr(after, name) == getattr(before, name), name


@pytest.mark.parametrize("to", ["llava-hf", "orbax"])
def test_prompt_of_the_adapters_run_is_written(to, source, tmp_path, monkeypatch):
    """The merged model was tuned with it, whatever the base model's is."""
    monkeypatch.setattr("reverie_jax.convert.load_adapter", lambda *_: ("", False))
    recipe = dataclasses.replace(find_recipe("scenes-responses"), template="llava_v1", image_aspect_ratio="square")
    makers.write_json(tmp_path / "run/run.json", {"base": {}, "recipe": json.loads(recipe.to_json())})
    convert(source(), tmp_path / "out", to=to, adapter=tmp_path / "run")
    processor = load_processor(tmp_path / "out")
    assert (processor.encoder.template.name, processor.image_aspect_ratio) == ("llava_v1", "square")


def test_linear_projector(clip, tmp_path):
    """transformers does not support it; original LLaVA and Orbax do."""
    part = makers.parts("llava-1.0")
    src = makers.original_folder(tmp_path / "src", part)
    for to in ("llava-hf", "peft"):
        with pytest.raises(CheckpointError, match="linear"):
            convert(src, tmp_path / "out", to=to, components=[clip])
    assert sorted(x.name for x in tmp_path.iterdir()) == ["src"]
    convert(src, tmp_path / "orbax", to="orbax", components=[clip])
    convert(tmp_path / "orbax", tmp_path / "out", to="llava")
    written = tensors(tmp_path / "out")
    for name, tensor in makers.original_tensors(part, tower=False).items():
        assert torch.equal(written[name], tensor), name
    assert_close(logits(read_model(tmp_path / "out"), INPUTS), part.logits(INPUTS))


# The command.

COMMANDS = [
    (["--to", "gguf"], ("gguf", "llava-lora")),
    (["--to", "llava-hf", "--shard-size", "few"], ("--shard-size",)),
    (["--to", "llava-hf", "--dtype", "int8"], ("--dtype", "float16")),
    (["--to", "llava-hf", "--template", "nobody's"], ("--template", "nobody's", "vicuna_v1")),
    (["--to", "llava-hf", "--dtype", "float16", "--shard-size", "20KB"], ()),
]


@pytest.mark.parametrize(("options", "words"), COMMANDS, ids=str)
def test_command(options, words, source, tmp_path, monkeypatch, capsys):
    """It converts, or reports the error in one line."""
    monkeypatch.setattr(sys, "argv", ["reverie", "convert", str(source()), str(tmp_path / "out"), *options])
    if words:
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("reverie: error:")
        assert all(word in line for word in words)
        assert not list(tmp_path.iterdir())
        return
    cli.main()
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert (tmp_path / "out" / INDEX).exists()
    assert next(iter(tensors(tmp_path / "out").values())).dtype == torch.float16


# Files for other tools (`tests/others` opens them there).

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """A llava-hf model with the tokenizer files of a LLaMA, by transformers 4."""
    room = tmp_path_factory.mktemp("x")
    original = sources.original(room / "original", legacy=False)
    clip = makers.clip_folder(room / "clip", sources.part())
    convert(original, room / "out", components=[clip])
    (room / "out" / "added_tokens.json").write_text(json.dumps({"<image>": sources.WORDS, "<pad>": sources.WORDS + 1}))
    makers.edit_json(room / "out/tokenizer_config.json", note="kept")
    return room / "out"


@pytest.mark.parametrize("to", ["llava-hf", "orbax"])
def test_tokenizer_files_are_the_sources(to, llama_tokenizer, tmp_path):
    convert(llama_tokenizer, tmp_path / "out", to=to)
    assert contents(tmp_path / "out") == contents(llama_tokenizer)
    assert len(contents(tmp_path / "out")) == 5


def test_tokens_are_removed_from_every_tokenizer_file(llama_tokenizer, tmp_path):
    convert(llama_tokenizer, tmp_path / "out", to="llava")
    found = contents(tmp_path / "out")
    assert found.pop("tokenizer.model") == sources.sentencepiece_model()
    content, settings, special, added = (json.loads(text) for text in found.values())
    assert {token["content"] for token in content["added_tokens"]} == {"<unk>", "<s>", "</s>"}
    assert settings["added_tokens_decoder"].keys() == {"0", "1", "2"}
    assert (settings["note"], settings["pad_token"], special["pad_token"], added) == ("kept", "<unk>", "<unk>", {})
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == sources.WORDS


@pytest.mark.parametrize(("template", "kept"), [(None, True), ("llava-hf", False)])
def test_chat_template_of_the_source_is_kept(template, kept, source, tmp_path):
    """Its answers end otherwise than this project's template of the same prompt."""
    text = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% else %}"
        "{% generation %}{{ 'ASSISTANT: ' + m['content'][0]['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    src = shutil.copytree(source(), tmp_path / "src")
    (src / "chat_template.jinja").write_text(text)
    convert(src, tmp_path / "out", template=template)
    assert ((tmp_path / "out/chat_template.jinja").read_text() == text) == kept
    older = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"]
    assert older == (tmp_path / "out/chat_template.jinja").read_text().replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )


def test_stops_are_kept(source, tmp_path):
    src = shutil.copytree(source(), tmp_path / "src")
    makers.edit_json(src / "generation_config.json", eos_token_id=[2, 17])
    for to in ("llava-hf", "llava", "orbax"):
        convert(src, tmp_path / to, to=to)
        assert json.loads((tmp_path / to / "generation_config.json").read_text())["eos_token_id"] == [2, 17]


@pytest.mark.parametrize(
    ("form", "to", "words"),
    [
        ("by transformers 5", "llava-hf", ()),
        ("by transformers 5", "orbax", ()),
        ("by transformers 5", "llava", ("tokenizer.model", "later turns", "mm_vision_tower")),
        ("of a LLaMA", "llava-hf", ("4.49",)),  # it pads
        ("of a LLaMA", "llava", ("mm_vision_tower",)),
        ("of a LLaMA, in one pass", "llava", ("the text after a picture", "mm_vision_tower")),
        ("original", "llava-hf", ("4.49",)),
        ("original", "llava", ("mm_vision_tower",)),
    ],
)
def test_what_answers_differently_elsewhere_is_said(form, to, words, source, llama_tokenizer, tmp_path, caplog):
    components = []
    if form == "original":
        src, components = sources.original(tmp_path / "src"), [makers.clip_folder(tmp_path / "clip", sources.part())]
    else:
        src = shutil.copytree(llama_tokenizer if "LLaMA" in form else source(), tmp_path / "src")
    if "one pass" in form:
        makers.edit_json(src / "config.json", reverie_tokens="hf")
    caplog.clear()
    convert(src, tmp_path / "out", to=to, components=components)
    said = [record.getMessage() for record in caplog.records if record.name == "reverie_jax.convert"]
    assert len(said) == len(words), said
    assert all(any(word in text and str(tmp_path / "out") in text for text in said) for word in words), said


OPENAI = "openai/clip-vit-large-patch14"


@pytest.mark.parametrize(
    ("recorded", "tuned", "wanted"),
    [
        (OPENAI, {}, (OPENAI, False)),
        ("/models/clip-vit-large-patch14", {}, (OPENAI, False)),
        (OPENAI, {"unfreeze_mm_vision_tower": True}, (OPENAI, True)),
        (OPENAI, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, (OPENAI, True)),
        (None, {}, (OPENAI, True)),  # whoever's it is
        (makers.UNKNOWN_TOWER, {}, (OPENAI, True)),
    ],
)
def test_original_llava_loads_the_tower_that_is_meant(recorded, tuned, wanted, tmp_path, monkeypatch, caplog):
    """It loads the tower that is named, and over it the weights of the folder if the tower is unfrozen."""
    sizes = read_config(makers.bench().hf).vision
    monkeypatch.setattr(configs, "TOWERS", {OPENAI: sizes})
    src = sources.original(tmp_path / "src")
    makers.edit_json(src / "config.json", mm_vision_tower=recorded, **tuned)
    known = str(recorded).endswith("large-patch14")
    clip = [] if known else [makers.clip_folder(tmp_path / "clip", sources.part())]
    convert(src, tmp_path / "hf", components=clip)
    convert(src, tmp_path / "out", to="llava", components=clip)
    convert(tmp_path / "hf", tmp_path / "again", to="llava")
    for name in ("out", "again"):
        raw = json.loads((tmp_path / name / "config.json").read_text())
        assert (raw["mm_vision_tower"], raw.get("unfreeze_mm_vision_tower", False)) == wanted, name
        assert any(key.startswith("model.vision_tower.vision_tower.") for key in tensors(tmp_path / name))
    assert "mm_vision_tower" not in caplog.text

"""The public names, compared with transformers: load a model, make a batch, generate answers."""

import base64
import dataclasses
import inspect
import io
import json
import re
import shutil
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import reverie_jax
from reverie_jax import cli
from reverie_jax.convert import convert
from reverie_jax.data.chat_template import choose_template
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.templates import CHECKPOINT, TEMPLATES, find_template, to_jinja
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.loading import find_checkpoint, load_processor, read_tokenizer
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints import files
from reverie_jax.models.checkpoints.components import Component
from reverie_jax.train import recipes
from tests.data.fakes import byte_level_tokenizer
from tests.models import makers, oracle


@pytest.fixture(scope="module")
def loaded():
    return reverie_jax.load_model("scenes-base", dtype="float32")


def image(seed=0, size=144):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def test_public_names_exist():
    for name in reverie_jax.__all__:
        assert getattr(reverie_jax, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = reverie_jax.nothing_like_it


def test_batch_of_conversations_gives_transformers_logits(loaded):
    """One record, two answers to one question: a tree whose branches have the logits of the flat texts."""
    model, processor = loaded
    theirs = LlavaForConditionalGeneration.from_pretrained(find_checkpoint("scenes-base"), dtype=torch.float32).eval()
    buffer = io.BytesIO()
    image().save(buffer, format="PNG")
    conversations = tuple(
        Conversation((Turn("user", f"{IMAGE}\nIs there a cup?"), Turn("assistant", answer)))
        for answer in ("Yes.", "No cup.")
    )
    batch = processor([reverie_jax.ImageRecord("a", buffer.getvalue(), conversations)])
    ours = np.asarray(model(batch.inputs))
    pixels = oracle.normalized(np.asarray(image())[None])
    for branch, conversation in enumerate(conversations):
        text, _ = processor.encoder.render(conversation)
        ids = processor.encoder.tokenizer(text.replace(IMAGE, IMAGE * processor.encoder.patches)).input_ids
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].numpy()
        leaf = batch.leaves[0, branch]
        path = [j for j in range(leaf + 1) if leaf < batch.ends[0, j]]
        np.testing.assert_allclose(ours[0, path], expected, atol=1e-4, rtol=0)


def test_answers_have_the_order_of_the_questions(loaded):
    questions = [(0, "Describe the image."), (0, "Is there a cup in the image?"), (1, "Is there a fork in the image?")]
    records = [reverie_jax.ask(image(0), *(text for seed, text in questions if seed == 0))]
    records.append(reverie_jax.ask(image(1), questions[2][1]))
    together = reverie_jax.generate(*loaded, records, max_new_tokens=8)
    alone = [[reverie_jax.ask(image(seed), text)] for seed, text in questions]
    assert together == [reverie_jax.generate(*loaded, records, max_new_tokens=8)[0] for records in alone]
    assert all(together)


def test_question_without_an_image(loaded):
    record = reverie_jax.ask(None, "Is there a cup?")
    assert (loaded[1]([record]).image_slots == -1).all()
    assert len(reverie_jax.generate(*loaded, [record], max_new_tokens=4)) == 1


PIXELS = np.zeros((20, 30, 3), np.uint8)
ASKED = [("x", "<image>\nx"), ("What does <image> show?", "What does <image> show?"), ("<image>\nx", "<image>\nx")]
NOT_ASKED = [
    ((PIXELS, "<image> or <image>?"), "2 <image>"),
    ((None, "What does <image> show?"), "1 <image>"),
    ((PIXELS.astype(np.float32), "x"), "float32"),
    ((PIXELS[0], "x"), "(30, 3)"),
    ((3, "x"), "int"),
    (([PIXELS, PIXELS], "x"), "list"),
    ((PIXELS,), "questions"),
    ((PIXELS, " "), "questions"),
    ((PIXELS, ["x", "y"]), "questions"),
]


def test_ask_takes_paths_bytes_images_and_pixels(tmp_path):
    image().save(tmp_path / "a.png")
    encoded = reverie_jax.ask(tmp_path / "a.png", "x").image
    assert encoded == reverie_jax.ask((tmp_path / "a.png").read_bytes(), "x").image
    for picture in (image(), np.asarray(image())):
        assert Image.open(io.BytesIO(reverie_jax.ask(picture, "x").image)).tobytes() == image().tobytes()
    with pytest.raises(UserError, match=r"none\.png"):
        reverie_jax.ask(tmp_path / "none.png", "x")
    texts = [talk.turns[0].text for talk in reverie_jax.ask(PIXELS, *(question for question, _ in ASKED)).conversations]
    assert texts == [text for _, text in ASKED]


@pytest.mark.parametrize(("arguments", "name"), NOT_ASKED, ids=lambda x: str(x)[:20])
def test_ask_says_what_it_wants(arguments, name):
    with pytest.raises(UserError, match=re.escape(name)):
        inspect.unwrap(reverie_jax.ask)(*arguments)  # without the tests' own check of types


def test_generate_takes_one_record_too(loaded):
    record = reverie_jax.ask(image(), "Is there a cup?")
    assert reverie_jax.generate(*loaded, record, max_new_tokens=4) == reverie_jax.generate(*loaded, [record], 4)
    with pytest.raises(UserError, match="str"):
        inspect.unwrap(reverie_jax.generate)(*loaded, ["Is there a cup?"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "question"),
        (("b.png", "What?"), "b.png"),
        (("What?", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("<image> or <image>?",), "2 <image>"),
        (("What?", "--dtype", "float8_e4m3fn"), "--dtype"),
    ],
)
def test_ask_command_reports_in_one_line(words, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in ("a.png", "b.png"):
        image().save(file)
    monkeypatch.setattr(sys, "argv", ["reverie", "ask", "a.png", *words, "--model", "scenes-base"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line


def test_answered_or_too_long_conversations_are_refused(loaded):
    answered = reverie_jax.ImageRecord("a", b"", (Conversation((Turn("user", "x"), Turn("assistant", "y")), ()),))
    with pytest.raises(UserError):
        reverie_jax.generate(*loaded, [answered])
    with pytest.raises(UserError, match="4096"):
        loaded[1]([reverie_jax.ask(None, "cup " * 5000)])


def test_another_template_is_logged(loaded, caplog):
    _, processor = loaded
    other = processor.override(template="vicuna_v1")
    assert "vicuna_v1" in caplog.text
    assert other.encoder.template.name == "vicuna_v1"
    assert processor.encoder.template.name == "llava-hf"


def test_dtype_is_the_files_own_by_default():
    model, _ = reverie_jax.load_model("scenes-base")
    assert model.decoder.embedding[...].dtype == jnp.float16
    assert model.decoder.norm.scale[...].dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "aspect"), [({}, "square"), ({"trainable": "projector", "template": "plain"}, "pad")]
)
def test_processor_of_a_run_follows_its_recipe(settings, aspect, tmp_path):
    """But not that of a run that trained a projector, whose template serves only that."""
    recipe = dataclasses.replace(recipes.find_recipe("scenes-responses"), image_aspect_ratio="square", **settings)
    (tmp_path / "run.json").write_text(json.dumps({"base": {}, "recipe": json.loads(recipe.to_json())}))
    processor = load_processor("scenes-base", adapter=tmp_path)
    assert (processor.image_aspect_ratio, processor.encoder.template.name) == (aspect, "llava-hf")
    assert load_processor("scenes-base", adapter=tmp_path, template="llava_v1").encoder.template.name == "llava_v1"


@pytest.mark.parametrize("fault", ["missing", "broken", "too large"])
def test_unusable_tokenizer_is_reported(fault, tmp_path):
    folder = makers.original_folder(tmp_path / "x", makers.parts())
    clip = makers.clip_folder(tmp_path / "clip", makers.parts())
    if fault == "missing":
        (folder / "tokenizer.json").unlink()
    elif fault == "broken":
        (folder / "tokenizer.json").write_text("{")
    else:
        makers.tokenizer("<image>", "<pad>").save_pretrained(folder)
    makers.assert_refused(lambda: load_processor(folder, components=clip), folder)


@pytest.mark.parametrize("section", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_a_config_says_nothing_of_tokens(section, key, copy):
    """transformers' own reader fails for a name that torch does not have, as auto."""
    expected = load_processor(copy).encoder.tokenizer("ba deki <image> ", return_offsets_mapping=True)
    raw = json.loads((copy / "config.json").read_text())
    (raw if section is None else raw[section])[key] = "auto"
    makers.write_json(copy / "config.json", raw)
    assert load_processor(copy).encoder.tokenizer("ba deki <image> ", return_offsets_mapping=True) == expected


# What a checkpoint says of its prompts.

PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = "{% for m in messages %}{{ bos_token + '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<image>\n' }}{% else %}{{ part['text'] + '<|end|>\n' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
JINJA = {name: to_jinja(find_template(name)) for name in ("vicuna_v1", "llava_v1", "phi3_instruct")}
# (file, its content, the template that is recognized; None if it is refused)
PROMPTS = [
    ("chat_template.jinja", PARTS, "llava-hf"),
    ("chat_template.jinja", JINJA["vicuna_v1"], "vicuna_v1"),
    ("chat_template.json", {"chat_template": JINJA["llava_v1"]}, "llava_v1"),
    ("processor_config.json", {"chat_template": JINJA["phi3_instruct"]}, "phi3_instruct"),
    ("chat_template.jinja", ZEPHYR, CHECKPOINT),
    ("tokenizer_config.json", {"chat_template": ZEPHYR}, CHECKPOINT),
    ("tokenizer_config.json", {"chat_template": TEXT}, None),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": TEXT}]}, None),
    ("chat_template.jinja", PARTS.replace("ASSISTANT:", "BOT:"), None),
    ("chat_template.jinja", "{{ raise_exception('no') }}", None),
    ("chat_template.jinja", "{% for %}", None),
    ("chat_template.jinja", "nothing", None),
]


@pytest.fixture
def copy(tmp_path):
    """A llava-hf folder that may be changed."""
    return shutil.copytree(makers.bench().hf, tmp_path / "model")


@pytest.mark.parametrize(("file", "content", "name"), PROMPTS)
def test_chat_template_is_recognized_by_what_it_renders(file, content, name, copy):
    if isinstance(content, str):
        (copy / file).write_text(content)
    else:
        old = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
        makers.write_json(copy / file, old | content)
    if name is None:
        makers.assert_refused(lambda: load_processor(copy), copy / file)
        processor = load_processor(copy, template="vicuna_v1")  # the ways out that the message names
        makers.edit_json(copy / "config.json", reverie_template="vicuna_v1")
        assert processor.encoder.template == load_processor(copy).encoder.template
    assert load_processor(copy).encoder.template.name == (name or "vicuna_v1")


# Original LLaVA takes its template llava_llama_2 if this is in a model's name; nothing else in the files tells.
LLAMA_2 = [
    ("config.json", "_name_or_path", "/data/llava-llama-2-13b-chat-lightning-preview"),
    ("config.json", "_name_or_path", "meta-llama/Llama-2-7b-chat-hf"),
    ("tokenizer_config.json", "chat_template", "{{ '[INST] ' + messages[0]['content'] + ' [/INST]' }}"),
]


@pytest.mark.parametrize(("file", "key", "value"), LLAMA_2)
def test_llama_2_chat_is_not_taken_for_vicuna(file, key, value, tmp_path):
    """Whether it is the model or only its language model that says so."""
    bench = makers.bench()
    whole, llm = makers.original_folder(tmp_path / "whole", bench.part), shutil.copytree(bench.llm, tmp_path / "llm")
    lora, projector = (
        shutil.copytree(bench.lora, tmp_path / "lora"),
        makers.projector_folder(tmp_path / "mm", bench.part),
    )
    for main, parts in ((whole, [bench.clip]), (lora, [llm, bench.clip]), (projector, [llm, bench.clip])):
        assert load_processor(main, components=parts).encoder.template.name == "vicuna_v1"
    for folder in (whole, llm):
        makers.edit_json(folder / file, **{key: value})
    for main, parts in ((whole, [bench.clip]), (lora, [llm, bench.clip]), (projector, [llm, bench.clip])):
        makers.assert_refused(lambda: load_processor(main, components=parts), main, "Llama-2", "--template")  # noqa: B023
        assert load_processor(main, components=parts, template="vicuna_v1").encoder.template.name == "vicuna_v1"


def test_llama_2_chat_by_the_folder_or_the_recorded_base(tmp_path):
    bench = makers.bench()
    whole = makers.original_folder(tmp_path / "llava-llama-2-7b-chat", bench.part)
    lora = shutil.copytree(bench.lora, tmp_path / "lora")
    makers.edit_json(lora / makers.ADAPTER_CONFIG, base_model_name_or_path="meta-llama/Llama-2-7b-chat-hf")
    for main, parts in ((whole, [bench.clip]), (lora, [bench.llm, bench.clip])):
        makers.assert_refused(lambda: load_processor(main, components=parts), main, "Llama-2")  # noqa: B023


def test_template_of_every_name(copy, caplog):
    """`v0` needs its example dialogue; another one than the checkpoint's own is a warning."""
    for name, template in TEMPLATES.items():
        caplog.clear()
        if template is None:
            with pytest.raises(UserError, match="example"):
                load_processor(copy, template=name)
            makers.write_json(copy / "template_example.json", {"question": "Is it?", "answer": "Yes."})
        elif name == "phi3_instruct":
            assert load_processor(copy, template=name).encoder.stop_ids == (2, 3)
        elif (end := [*template.tokens, (template.end or "").strip()][0]) in ("<|eot_id|>", "<|im_end|>", "<im_start>"):
            # The tokenizer has no such token.
            makers.assert_refused(lambda: load_processor(copy, template=name), copy, end)  # noqa: B023
            continue
        assert load_processor(copy, template=name).encoder.template.name == name
        assert (name in caplog.text) == (name not in ("llava-hf", "v0"))
        (copy / "template_example.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="nobody"):
        load_processor(copy, template="nobody's")


def test_unknown_template_of_ours(copy):
    makers.edit_json(copy / "config.json", reverie_template="nobody's")
    makers.assert_refused(lambda: load_processor(copy), copy / "config.json", "nobody's")


LLAMA3 = byte_level_tokenizer("<|start_header_id|>", "<|eot_id|>", bos="<|begin_of_text|>", eos="<|end_of_text|>")
QWEN = byte_level_tokenizer("<|im_start|>", "<|im_end|>", eos="<|endoftext|>")
# (config.json, tokenizer, the template with which all such models were tuned; None if there are several)
CERTAIN = [
    ({"model_type": "llava_llama"}, LLAMA3, "llama3"),
    ({"model_type": "llava_mistral"}, LLAMA3, None),
    ({"model_type": "llava_llama"}, makers.tokenizer(), "vicuna_v1"),
    ({"model_type": "llava_mistral"}, makers.tokenizer(), None),
    ({"model_type": "moe_llava_stablelm", "moe": {}}, QWEN, "moe_llava"),
    ({"model_type": "llava_qwen", "mm_image_tower": "x"}, QWEN, "moe_llava"),
    ({"model_type": "moe_llava_mistral", "moe": {}}, makers.tokenizer(), None),
    ({"model_type": "llava_qwen2"}, QWEN, None),
    ({"model_type": "llava_llama"}, QWEN, None),
    ({"model_type": "stablelm"}, QWEN, None),
]


@pytest.mark.parametrize(("config", "tokenizer", "name"), CERTAIN)
def test_a_template_is_never_guessed(config, tokenizer, name, tmp_path):
    main, settings = Component(tmp_path, "llava", config), ARCHITECTURES["llava-1.5-7b"]
    if name is None:
        makers.assert_refused(lambda: choose_template(settings, tokenizer, main), tmp_path, "--template")
    else:
        assert choose_template(settings, tokenizer, main).name == name
    assert choose_template(settings, tokenizer, main, name="vicuna_v1").name == "vicuna_v1"


def test_a_llava_hf_model_without_a_template_is_not_guessed(copy):
    makers.edit_json(copy / "tokenizer_config.json", eos_token="<|end|>")
    makers.assert_refused(lambda: load_processor(copy), copy, "<|end|>", "reverie_template")


def test_byte_level_tokenizers_in_the_original_format(tmp_path):
    """Llama-3's, as LLaVA-pp has it: recognized, asked without sentencepiece's marks, and ended by both of its tokens."""
    part = makers.parts(vocab=400)
    original, clip = makers.original_folder(tmp_path / "original", part), makers.bench().clip
    (original / "tokenizer.json").unlink()
    LLAMA3.save_pretrained(original)
    end, text_end = (LLAMA3.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|end_of_text|>"))
    makers.write_json(original / "generation_config.json", {"eos_token_id": [text_end, end]})
    encoder = load_processor(original, components=clip).encoder
    assert (encoder.template.name, set(encoder.stop_ids)) == ("llama3", {end, text_end})
    tokens = encoder(Conversation((Turn("user", f"{IMAGE}\nWhat is this?"),), (0,)))
    before, after = encoder.render(Conversation((Turn("user", f"{IMAGE}\nWhat is this?"),), (0,)))[0].split(IMAGE)
    shown, asked = LLAMA3(before).input_ids, LLAMA3(after).input_ids[1:]  # BOS once, beside that in the text
    assert tokens.ids[tokens.image_slots < 0].tolist() == shown + asked
    assert tokens.image_slots.argmax() - tokens.image_slots.max() == len(shown)


def test_tokenizers_without_tokenizer_json(tmp_path):
    """A slow one's vocabulary and merges (Phi-2), and a tiktoken file (StableLM-2)."""
    config = dataclasses.replace(ARCHITECTURES["llava-1.5-7b"].text, vocab=100352)
    config = dataclasses.replace(ARCHITECTURES["llava-1.5-7b"], text=config)
    QWEN.save_pretrained(tmp_path / "saved")
    model = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]
    (tmp_path / "slow").mkdir()
    makers.write_json(tmp_path / "slow" / "vocab.json", model["vocab"])
    (tmp_path / "slow" / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    settings = {"tokenizer_class": "CodeGenTokenizer", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "!")}
    makers.write_json(tmp_path / "slow" / "tokenizer_config.json", settings)
    tokenizer = read_tokenizer(config, Component(tmp_path / "slow", "llava", {}))
    assert tokenizer("What is this?").input_ids == QWEN("What is this?").input_ids
    (tmp_path / "tiktoken").mkdir()
    lines = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (tmp_path / "tiktoken" / "arcade100k.tiktoken").write_text("".join(lines))
    tokenizer = read_tokenizer(config, Component(tmp_path / "tiktoken", "llava", {}))
    assert tokenizer("cat<|endoftext|>").input_ids == [*b"cat", 100257]
    makers.assert_refused(lambda: read_tokenizer(config, Component(tmp_path, "llava", {})), tmp_path, "tiktoken")


# A template of the checkpoint's own stays with it.


@pytest.mark.parametrize("to", ["llava-hf", "llava", "orbax"])
def test_a_checkpoints_own_template_survives(to, copy, tmp_path):
    (copy / "chat_template.jinja").write_text(ZEPHYR)
    expected = load_processor(copy).encoder
    convert(copy, tmp_path / "out", to=to)
    found = load_processor(tmp_path / "out").encoder
    assert found.template == expected.template
    assert found.stop_ids == expected.stop_ids == (2, 3)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == ZEPHYR
    convert(tmp_path / "out", tmp_path / "again", to="llava-hf")
    assert load_processor(tmp_path / "again").encoder.template == expected.template
    (tmp_path / "out" / "chat_template.jinja").unlink()
    makers.edit_json(tmp_path / "out" / "tokenizer_config.json", chat_template=None)
    makers.assert_refused(lambda: load_processor(tmp_path / "out"), tmp_path / "out", "chat_template.jinja")


def test_adapters_of_a_checkpoint_with_its_own_template(copy, tmp_path):
    (copy / "chat_template.jinja").write_text(ZEPHYR)
    expected = load_processor(copy).encoder.template
    recipe = recipes.find_recipe("scenes-responses")
    makers.write_json(tmp_path / "run" / "run.json", {"base": {}, "recipe": json.loads(recipe.to_json())})
    convert(copy, tmp_path / "llava-lora", to="llava-lora", adapter=makers.bench().full)
    for adapter in (makers.bench().plain, tmp_path / "run", tmp_path / "llava-lora"):
        assert load_processor(copy, adapter=adapter).encoder.template == expected


@pytest.mark.parametrize(("key", "value"), [("add_bos_token", False), ("add_eos_token", True)])
def test_tokens_around_a_text_are_original_llavas(key, value, tmp_path):
    original, clip = makers.original_folder(tmp_path / "original", makers.parts()), makers.bench().clip
    makers.edit_json(original / "tokenizer_config.json", **{key: not value})
    load_processor(original, components=clip)
    makers.edit_json(original / "tokenizer_config.json", **{key: value})
    makers.assert_refused(lambda: load_processor(original, components=clip), original / "tokenizer_config.json", key)


@pytest.mark.parametrize("to", ["llava-hf", "llava", "orbax"])
def test_tokens_that_end_an_answer_are_read_and_written(to, copy, tmp_path):
    makers.edit_json(copy / "generation_config.json", eos_token_id=[2, 17])
    convert(copy, tmp_path / "out", to=to)
    for path in (copy, tmp_path / "out"):
        processor = load_processor(path)
        assert processor.encoder.stop_ids == processor.override("plain").encoder.stop_ids == (2, 17)
    raw = json.loads((copy / "config.json").read_text())
    raw["text_config"]["eos_token_id"] = [17, -1]  # what transformers takes where the other file is missing
    makers.write_json(copy / "config.json", raw)
    assert load_processor(copy).encoder.stop_ids == (2, 17)
    (copy / "generation_config.json").unlink()
    assert load_processor(copy).encoder.stop_ids == (2, 17)
    makers.write_json(copy / "generation_config.json", {"eos_token_id": None})
    assert load_processor(copy).encoder.stop_ids == (2,)
    makers.edit_json(copy / "generation_config.json", eos_token_id="</s>")
    makers.assert_refused(lambda: load_processor(copy), copy / "generation_config.json", "eos_token_id")


LEGACY = [({"legacy": True}, False, True), ({"legacy": False}, True, False), ({}, True, True), ({}, False, False)]


@pytest.mark.parametrize(("settings", "slow", "legacy"), LEGACY)
def test_legacy_mode_is_that_of_the_slow_tokenizer(settings, slow, legacy, tmp_path):
    folder, clip = makers.original_folder(tmp_path / "model", makers.parts()), makers.bench().clip
    makers.edit_json(folder / "tokenizer_config.json", **settings)
    if slow:
        (folder / "tokenizer.model").write_bytes(b"")
    convert(folder, tmp_path / "out", to="llava", components=clip)
    processors = load_processor(folder, components=clip), load_processor(tmp_path / "out")
    assert [processor.encoder.tokenizer.legacy for processor in processors] == [legacy, legacy]


# The hub, replaced.

SETTINGS = ["config.json", "tokenizer.json", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja"]
REPOSITORY = [*SETTINGS, "README.md", "flax_model.msgpack", "optimizer.bin", "modeling.py"]
REPOSITORY += [
    "checkpoint-35000/config.json",
    "checkpoint-35000/model.safetensors",
    "original/consolidated.safetensors",
]
BIN = [f"pytorch_model-{n:05}-of-00002.bin" for n in (1, 2)]
SAFE = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The calls of huggingface_hub that `resolve` makes; it is offline if `error` is set."""
    import huggingface_hub

    fake = types.SimpleNamespace(calls=[], error=None, files=[*REPOSITORY, *BIN, *SAFE], downloaded=[])

    def model_info(repository, *, revision):
        fake.calls.append((repository, revision))
        if fake.error:
            raise fake.error
        return types.SimpleNamespace(sha="a" * 40, siblings=[types.SimpleNamespace(rfilename=x) for x in fake.files])

    def snapshot_download(repository, *, revision, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        fake.calls.append((repository, revision))
        fake.downloaded = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: types.SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


@pytest.mark.parametrize(("name", "revision"), [("some/model", None), ("some/model@v1", "v1")])
def test_hub_id_is_downloaded_at_one_commit(hub, name, revision, caplog, tmp_path):
    with caplog.at_level("INFO"):
        assert files.resolve(name) == tmp_path
    assert hub.calls == [("some/model", revision), *[("some/model", "a" * 40)] * 2]
    assert f"some/model@{'a' * 40}" in caplog.text


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (BIN, BIN),
        ([*BIN, *SAFE], SAFE),
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        (["adapter_model.bin", "non_lora_trainables.bin"], ["non_lora_trainables.bin", "adapter_model.bin"]),
        (["mm_projector.bin"], ["mm_projector.bin"]),
    ],
)
def test_hub_downloads_one_format_without_subfolders(weights, wanted, hub):
    hub.files = [*REPOSITORY, *weights]
    files.resolve("some/model")
    assert hub.downloaded == [*SETTINGS, *wanted]


def test_unsupported_family_is_named_before_its_weights_are_downloaded(hub, tmp_path):
    makers.write_json(tmp_path / "config.json", {"model_type": "llava_mpt", "mm_vision_tower": "x"})
    makers.assert_refused(lambda: reverie_jax.load_model("some/model"), "llava_mpt")
    assert hub.downloaded == SETTINGS


def test_local_folder_has_priority_over_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(files.resolve("some/model")) == "some/model"
    assert hub.calls == []


@pytest.mark.parametrize("name", ["some/model@v1", "/no/such/folder", "nothing", "a/b/c"])
def test_missing_checkpoint_is_reported_in_one_line(hub, name):
    hub.error = OSError("no route\nto host")
    with pytest.raises(CheckpointError, match=name) as error:
        reverie_jax.load_model(name)
    assert "\n" not in str(error.value)
    assert ("no route" in str(error.value)) == ("@" in name) == bool(hub.calls)

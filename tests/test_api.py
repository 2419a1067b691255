"""The public names, compared with transformers: load a model, make a batch, generate answers."""

import dataclasses
import io
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import reverie_jax
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.loading import apply_run_recipe, find_checkpoint, load_processor
from reverie_jax.models.checkpoints import files
from reverie_jax.train import recipes
from tests.models import makers, oracle


@pytest.fixture(scope="module")
def loaded():
    return reverie_jax.load_model("scenes-base", dtype="float32")


def image(seed=0, size=128):
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


def test_ask_takes_paths_bytes_and_images(tmp_path):
    image().save(tmp_path / "a.png")
    encoded = reverie_jax.ask(tmp_path / "a.png", "x").image
    assert encoded == reverie_jax.ask((tmp_path / "a.png").read_bytes(), "x").image
    assert Image.open(io.BytesIO(reverie_jax.ask(image(), "x").image)).tobytes() == image().tobytes()
    with pytest.raises(UserError, match=r"none\.png"):
        reverie_jax.ask(tmp_path / "none.png", "x")


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
    processor = apply_run_recipe(load_processor("scenes-base"), tmp_path)
    assert (processor.image_aspect_ratio, processor.encoder.template.name) == (aspect, "llava-hf")


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


# The hub, replaced.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The calls of huggingface_hub that `resolve` makes; it is offline if `error` is set."""
    import huggingface_hub

    fake = types.SimpleNamespace(calls=[], error=None)

    def model_info(repository, *, revision):
        fake.calls.append((repository, revision))
        if fake.error:
            raise fake.error
        return types.SimpleNamespace(sha="a" * 40)

    def snapshot_download(repository, *, revision, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        fake.calls.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: types.SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


@pytest.mark.parametrize(("name", "revision"), [("some/model", None), ("some/model@v1", "v1")])
def test_hub_id_is_downloaded_at_one_commit(hub, name, revision, caplog, tmp_path):
    with caplog.at_level("INFO"):
        assert files.resolve(name) == tmp_path
    assert hub.calls == [("some/model", revision), ("some/model", "a" * 40)]
    assert f"some/model@{'a' * 40}" in caplog.text


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

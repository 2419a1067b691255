"""The public names: load a model, make a batch, ask, in a few lines; held against transformers and against the parts."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import reverie_jax
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.eval.engine import Engine
from reverie_jax.loading import apply_run_recipe, load_processor
from reverie_jax.models.checkpoints import files
from reverie_jax.train import recipes
from tests.models import oracle


@pytest.fixture(scope="module")
def loaded():
    return reverie_jax.load_model("scenes-base", dtype="float32")


def drawing(seed: int = 0, size: int = 128) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def test_names_are_all_there():
    for name in reverie_jax.__all__:
        assert getattr(reverie_jax, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = reverie_jax.nothing_like_it


def test_importing_the_package_does_not_import_jax():
    code = "import sys, reverie_jax; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_batch_of_answered_conversations_gives_transformers_logits(loaded, tmp_path):
    """One record, two answers to one question: a tree whose branches have the logits of the flat texts."""
    from transformers import LlavaForConditionalGeneration

    from reverie_jax.loading import find_checkpoint

    model, processor = loaded
    theirs = LlavaForConditionalGeneration.from_pretrained(find_checkpoint("scenes-base"), dtype=torch.float32).eval()
    picture = drawing()
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    talks = tuple(
        Conversation((Turn("user", f"{IMAGE}\nIs there a cup?"), Turn("assistant", said)))
        for said in ("Yes.", "No cup.")
    )
    batch = processor([reverie_jax.ImageRecord("a", buffer.getvalue(), talks)])
    ours = np.asarray(model(batch.inputs))
    pixels = oracle.normalized(np.asarray(picture)[None])
    for branch, talk in enumerate(talks):
        text, _ = processor.encoder.text(talk)
        ids = processor.encoder.tokenizer(text.replace(IMAGE, IMAGE * processor.encoder.patches)).input_ids
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].numpy()
        leaf = batch.leaves[0, branch]
        path = [j for j in range(leaf + 1) if leaf < batch.ends[0, j]]
        np.testing.assert_allclose(ours[0, path], expected, atol=1e-4, rtol=0)


def test_answers_come_in_the_order_of_the_questions(loaded):
    model, processor = loaded
    first = reverie_jax.ask(drawing(0), "Describe the image.", "Is there a cup in the image?")
    second = reverie_jax.ask(drawing(1), "Is there a fork in the image?")
    together = reverie_jax.generate(model, processor, [first, second], max_new_tokens=12)
    alone = [
        reverie_jax.generate(model, processor, [reverie_jax.ask(drawing(seed), text)], max_new_tokens=12)[0]
        for seed, text in (
            (0, "Describe the image."),
            (0, "Is there a cup in the image?"),
            (1, "Is there a fork in the image?"),
        )
    ]
    assert together == alone
    assert all(together)


def test_question_without_a_picture(loaded):
    model, processor = loaded
    batch = processor([reverie_jax.ask(None, "Is there a cup?")])
    assert (batch.image_slots == -1).all()
    assert (
        len(reverie_jax.generate(model, processor, [reverie_jax.ask(None, "Is there a cup?")], max_new_tokens=4)) == 1
    )


def test_ask_takes_paths_bytes_and_pictures(tmp_path):
    drawing().save(tmp_path / "a.png")
    from_path = reverie_jax.ask(tmp_path / "a.png", "x")
    assert from_path.image == reverie_jax.ask((tmp_path / "a.png").read_bytes(), "x").image
    assert Image.open(io.BytesIO(reverie_jax.ask(drawing(), "x").image)).tobytes() == drawing().tobytes()
    with pytest.raises(UserError, match=r"none\.png"):
        reverie_jax.ask(tmp_path / "none.png", "x")


def test_answered_conversation_is_nothing_to_generate_from(loaded):
    model, processor = loaded
    closed = reverie_jax.ImageRecord("a", b"", (Conversation((Turn("user", "x"), Turn("assistant", "y")), ()),))
    with pytest.raises(UserError, match="ends with an answer"):
        reverie_jax.generate(model, processor, [closed])


def test_too_long_for_the_decoder_is_an_error(loaded):
    _, processor = loaded
    with pytest.raises(UserError, match="exact up to 4096"):
        processor([reverie_jax.ask(None, "cup " * 5000)])


def test_another_template_is_said_aloud(loaded, caplog):
    _, processor = loaded
    other = processor.override(template="vicuna_v1")
    assert "vicuna_v1" in caplog.text
    assert other.encoder.template.name == "vicuna_v1"
    assert processor.encoder.template.name == "llava-hf"


def test_several_stop_tokens_end_an_answer(loaded):
    """Phi-3 ends its turns with another token than its end of sequence."""
    model, processor = loaded
    asked = reverie_jax.ask(drawing(), "Describe the image.")
    whole = reverie_jax.generate(model, processor, [asked], max_new_tokens=16)[0]
    ids = processor.encoder.tokenizer(whole).input_ids
    processor.encoder.stop_ids, kept = (processor.encoder.stop_ids[0], ids[3]), processor.encoder.stop_ids
    try:
        engine = Engine(model, processor)
        cut = reverie_jax.generate(model, processor, [asked], max_new_tokens=16)[0]
    finally:
        processor.encoder.stop_ids = kept
    assert engine.encoder is processor.encoder
    assert cut
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_dtype_is_the_files_own_by_default():
    model, _ = reverie_jax.load_model("scenes-base")
    assert model.decoder.embedding[...].dtype == jnp.float16
    assert model.decoder.norm.scale[...].dtype == jnp.float32


# The hub, without one.


class Hub:
    """What `resolve` asks of huggingface_hub."""

    def __init__(self, folder, sha="a" * 40, error=None):
        self.folder, self.sha, self.error, self.asked = folder, sha, error, []

    def model_info(self, repository, *, revision):
        if self.error:
            raise self.error
        self.asked.append((repository, revision))
        return type("Info", (), {"sha": self.sha})

    def snapshot_download(self, repository, *, revision, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        self.asked.append((repository, revision))
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub

    def use(**fields):
        fake = Hub(tmp_path, **fields)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        return fake

    return use


@pytest.mark.parametrize(("name", "revision"), [("some/model", None), ("some/model@v1", "v1")])
def test_hub_id_is_downloaded_at_one_commit(hub, name, revision, caplog, tmp_path):
    fake = hub()
    with caplog.at_level("INFO"):
        assert files.resolve(name) == tmp_path
    assert fake.asked == [("some/model", revision), ("some/model", "a" * 40)]
    assert f"some/model@{'a' * 40}" in caplog.text


def test_folder_here_comes_before_the_hub(hub, tmp_path, monkeypatch):
    fake = hub(error=AssertionError("asked"))
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(files.resolve("some/model")) == "some/model"
    assert fake.asked == []


@pytest.mark.parametrize("name", ["some/model", "some/model@v1"])
def test_hub_that_cannot_be_asked_is_one_line(hub, name):
    hub(error=OSError("no route\nto host"))
    with pytest.raises(CheckpointError, match="no route") as error:
        reverie_jax.load_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "a/b/c"])
def test_what_is_no_hub_id_is_not_asked_for(hub, name):
    fake = hub()
    with pytest.raises(CheckpointError, match="no such file or folder"):
        reverie_jax.load_model(name)
    assert fake.asked == []


@pytest.mark.parametrize(("settings", "wanted"), [({}, "square"), ({"tune": "projector", "template": "plain"}, "pad")])
def test_a_run_is_served_with_its_recipes_pictures(settings, wanted, tmp_path):
    """As it was tuned, so it is asked; but a projector's first training has a template of its own."""
    recipe = dataclasses.replace(recipes.recipe("scenes-responses"), image_aspect_ratio="square", **settings)
    (tmp_path / "run.json").write_text(json.dumps({"base": {}, "recipe": json.loads(recipe.to_json())}))
    found = apply_run_recipe(load_processor("scenes-base"), tmp_path)
    assert (found.aspect, found.encoder.template.name) == (wanted, "llava-hf")

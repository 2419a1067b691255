"""Every published checkpoint of the table in the docs: a replica of it is read and equal, or refused before its weights."""

import json
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from reverie_jax.models.checkpoints import read_config, read_model
from reverie_jax.models.checkpoints.components import check_config, detect_component
from tests.models import makers, published
from tests.models.oracle import Sizes, assert_close, image_inputs, llava_logits, logits

DOCS = Path(__file__).parents[2] / "docs/checkpoints.md"
CONFIGS = [(names, *case) for names, _, cases in published.REFUSED for case in cases]


@pytest.mark.parametrize("row", published.LOADS, ids=lambda row: row.names[:40])
def test_replica_is_equal(row, tmp_path):
    path, components, theirs = row.write(tmp_path)
    check_config(
        path / "config.json", json.loads((path / "config.json").read_text())
    )  # what is asked before a download
    ours = read_model(path, components=components)
    assert ours.config == read_config(path, components=components)
    assert ours.config.text.context == row.context
    config = ours.config
    inputs = image_inputs(Sizes(config.vision, config.text), 3, tokens=config.image_tokens)
    expected = llava_logits(theirs, inputs)
    assert np.abs(expected).max() > 1
    assert_close(logits(ours, inputs), expected)


def test_tuned_tower_is_not_replaced_by_openais(tmp_path):
    row = next(row for row in published.LOADS if "ShareGPT4V" in row.names)
    path, (tower,), _ = row.write(tmp_path)
    other = tower.rename(tmp_path / "clip-vit-large-patch14-336")
    makers.assert_refused(lambda: read_model(path, components=[other]), "ShareGPT4V")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository of `files`; what is downloaded is what `tmp_path` has, and its name is recorded."""
    fake = types.SimpleNamespace(files=[], downloaded=[])

    def model_info(repository, revision):
        return types.SimpleNamespace(sha="a" * 40, siblings=[types.SimpleNamespace(rfilename=x) for x in fake.files])

    def snapshot_download(repository, *, revision, allow_patterns=None, local_files_only=False):
        fake.downloaded += allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: types.SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


@pytest.mark.parametrize(("names", "config", "words"), CONFIGS, ids=[f"{x[0][:30]}-{x[2][0]}" for x in CONFIGS])
def test_refused_by_config_json_alone(names, config, words, hub, tmp_path):
    """In a folder without weights, and on the hub before they are downloaded."""
    published.write_refused(tmp_path, config)
    makers.assert_refused(lambda: read_model(tmp_path), tmp_path / "config.json", *words)
    hub.files = ["config.json", "tokenizer.json", "model.safetensors"]
    makers.assert_refused(lambda: detect_component("some/model"), "config.json", *words)
    assert hub.downloaded == ["config.json", "tokenizer.json"]


def test_xtuners_layout_is_refused_by_its_folders(hub, tmp_path):
    hub.files = list(published.XTUNER[2])
    makers.assert_refused(lambda: detect_component("some/model"), "some/model", "XTuner", "projector")
    assert not hub.downloaded
    (tmp_path / "projector").mkdir()
    makers.assert_refused(lambda: detect_component(tmp_path), tmp_path, "XTuner")


def test_table_in_the_docs_says_what_is_tested():
    """After a change of the rows, put what `published.table()` returns between the two comments of the page."""
    text = DOCS.read_text()
    assert text.partition(published.START)[2].partition(published.END)[0].strip() == published.table()

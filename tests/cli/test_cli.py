"""The command as a stranger meets it: help that reads well, and one clear line for each mistake."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reverie_jax import cli
from reverie_jax.loading import checkpoint_folder

DATA = [f"data {name}" for name in ("build", "check", "stats", "leak", "show", "questions")]
COMMANDS = [
    "demo",
    "data",
    *DATA,
    "plan",
    "train",
    "eval",
    "score",
    "judge",
    "report",
    "ask",
    "recipes",
    "scenes",
    "scenes render",
    "scenes pretrain",
]


@pytest.fixture
def reverie(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["reverie", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def training_set(tmp_path_factory):
    from reverie_jax.scenes.dataset import make_training_set

    folder = tmp_path_factory.mktemp("scenes")
    make_training_set(folder, 4, size=128, questions=2, seed=3)
    return folder


def refused(result, *words):
    """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert str(word) in err
    return True


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_names_what_there_is(reverie, command):
    code, out, err = reverie(*command.split(), "--help")
    assert code == 0
    assert err == ""
    assert out.startswith(f"usage: reverie {command}".rstrip())
    assert "None" not in " ".join(out.split()).replace("{None}", "").replace("(default: None)", "")
    if command == "":
        assert all(
            name in out for name in ("demo", "data", "train", "eval", "score", "judge", "ask", "recipes", "scenes")
        )


def test_recipes_are_listed_and_printed(reverie):
    code, out, _ = reverie("recipes")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"scenes-responses", "scenes-rationales"}
    assert json.loads(reverie("recipes", "scenes-responses")[1])["teach"]["kinds"] == "responses"


def test_unknown_recipe(reverie, tmp_path):
    assert refused(reverie("train", "llava-9b", "--data", tmp_path, "--out", tmp_path), "llava-9b", "scenes-responses")
    assert refused(reverie("recipes", "llava-9b"), "llava-9b")


def test_wrong_paths(reverie, tmp_path):
    gone = tmp_path / "gone"
    assert refused(
        reverie("train", "scenes-responses", "--data", gone, "--out", tmp_path / "run"), gone, "reverie data build"
    )
    assert refused(reverie("data", "build", gone, "--out", tmp_path / "out"), gone)
    scenes = ("--benchmark", "scenes", "--data", gone, "--out", tmp_path / "e")
    assert refused(reverie("eval", "--model", "scenes-base", *scenes), gone)
    assert refused(reverie("ask", gone, "What is it?"), gone)
    assert refused(reverie("demo", "--out", tmp_path / "demo", "--base", gone), gone)
    assert not (tmp_path / "run").exists()


def test_broken_picture_in_the_data_folder(reverie, training_set, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(training_set, folder)
    (folder / "images" / "000002.png").write_bytes(b"not a picture at all")
    assert refused(reverie("data", "build", folder / "reverie.json", "--out", tmp_path / "records"), "000002.png")
    assert not (tmp_path / "records").exists()


def test_truncated_picture_in_the_data_folder(reverie, training_set, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(training_set, folder)
    picture = folder / "images" / "000001.png"
    picture.write_bytes(picture.read_bytes()[:300])
    assert refused(reverie("data", "build", folder / "reverie.json", "--out", tmp_path / "records"), "000001.png")


def test_checkpoint_with_a_missing_tensor(reverie, training_set, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint_folder("scenes-base"), base)
    tensors = load_file(base / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, base / "model.safetensors")
    question = (training_set / "images" / "000000.png", "Is there a cup in the image?")
    assert refused(reverie("ask", *question, "--model", base), base, name)


def test_ask_answers_each_question(reverie, training_set):
    code, out, _ = reverie(
        "ask", training_set / "images" / "000000.png", "Describe the image.", "Is there a cup in the image?"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "Describe the image."
    assert lines[1].strip()
    assert lines[3].strip().lower().startswith(("yes", "no"))


def test_build_train_eval_score(reverie, training_set, tmp_path):
    """The commands hand over to one another through files."""
    code, out, _ = reverie("data", "build", training_set / "reverie.json", "--out", tmp_path / "records")
    assert code == 0
    assert out.startswith("4 images")
    settings = ("--set", "steps=2", "batch_size=2", "sequence.length=512")
    run = tmp_path / "run"
    code, out, _ = reverie("train", "scenes-rationales", "--data", tmp_path / "records", "--out", run, *settings)
    assert code == 0
    assert out.startswith("2 steps")
    code, out, _ = reverie("scenes", "render", tmp_path / "test", "--questions", "pope", "--count", 3)
    assert code == 0
    scores = tmp_path / "scores"
    asked = ("--benchmark", "scenes", "--data", tmp_path / "test", "--out", scores)
    code, out, _ = reverie("eval", "--model", "scenes-base", *asked, "--adapter", run)
    assert code == 0
    assert "scenes by the rule official" in out
    first = json.loads((scores / "scores.json").read_text())
    assert 0 <= first["metrics"]["pope/f1"] <= 1
    assert first["protocol"]["run/model"] == "run"
    answers = ("--predictions", scores / "predictions.jsonl", "--data", tmp_path / "test")
    code, out, _ = reverie("score", "scenes", *answers, "--json")
    assert code == 0
    assert json.loads(out) == first
    assert refused(reverie("eval", "--model", "scenes-base", *asked), scores, "another run", "model, identity")
    assert refused(reverie("ask", training_set / "images" / "000000.png", "?", "--adapter", tmp_path), tmp_path)


@pytest.mark.parametrize("mesh", ["data=9", "fsdp=x", "batch_size=2", "data=1,data=1", "data=0"])
def test_bad_meshes(reverie, training_set, tmp_path, mesh):
    reverie("data", "build", training_set / "reverie.json", "--out", tmp_path / "records")
    words = ("train", "scenes-responses", "--data", tmp_path / "records", "--out", tmp_path / "run", "--mesh", mesh)
    assert refused(reverie(*words), mesh)


def test_the_demo_refuses_a_folder_that_is_not_its_own(reverie, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert refused(reverie("demo", "--out", tmp_path), "thesis.txt")
    assert (tmp_path / "thesis.txt").exists()


def test_the_demo_writes_its_report(reverie, tmp_path):
    out = tmp_path / "demo"
    code, text, _ = reverie("demo", "--out", out, "--train-images", 20, "--test-images", 5, "--steps", 2)
    assert code == 0
    assert "POPE mean F1" in text
    report = json.loads((out / "report.json").read_text())
    for arm in ("base", "responses", "reflective"):
        for split in ("random", "popular", "adversarial", "mean"):
            score = report["arms"][arm]["pope"][split]
            low, high = score["ci95"]
            assert 0 <= low <= score["f1"] <= high <= 1
        assert report["arms"][arm]["chair"]["i"].keys() == {"value", "ci95"}
        assert report["arms"][arm]["rationale_correct"].keys() == {"value", "ci95"}
    assert report["tokens"]["flat"] > report["tokens"]["tree"] > 0
    assert report["seconds"]["total"] == pytest.approx(
        sum(v for k, v in report["seconds"].items() if k != "total"), abs=0.1
    )
    assert report["recipe"]["responses"]["steps"] == report["recipe"]["reflective"]["steps"] == 2
    assert report["recipe"]["responses"]["rows"] == report["recipe"]["reflective"]["rows"]
    page = (out / "report.html").read_text()
    # Self-contained: nothing is fetched.
    assert "data:image/png;base64," in page
    assert not any(mark in page for mark in ("<script", "<link", 'src="http', "url(http"))
    assert reverie("demo", "--out", out, "--train-images", 20, "--test-images", 5, "--steps", 2, "--seeds", 0)[0] == 2


def test_shipped_base_is_small_and_complete():
    folder = checkpoint_folder("scenes-base")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "README.md",
    } <= files.keys()
    tensors = load_file(folder / "model.safetensors")
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())


def test_no_path_of_this_machine_is_committed():
    root = Path(cli.__file__).parent
    for path in root.rglob("*"):
        if path.suffix in (".py", ".json", ".md", ".html"):
            text = path.read_text("utf-8")
            assert "/work/" not in text, path
            assert "/root/" not in text, path

"""The commands end to end: they hand over to one another through files, and each mistake is one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import reverie_jax
from reverie_jax import cli
from reverie_jax.data import survey
from reverie_jax.eval import benchmarks
from reverie_jax.loading import find_checkpoint
from reverie_jax.scenes import dataset
from reverie_jax.scenes import demo as scenes_demo
from reverie_jax.scenes.graph import take_scenes
from reverie_jax.train.plan.costs import FLOPS_FORMULA
from reverie_jax.train.plan.plan import StepPlan
from reverie_jax.train.recipes import RECIPES


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """Output folder and text of a tiny demo; its annotations, records, questions and run folders serve other tests."""
    folder = tmp_path_factory.mktemp("cli") / "demo"
    words = ["demo", "--out", str(folder), "--train-images", "8", "--test-images", "3", "--steps", "1"]
    small = {name: dataclasses.replace(RECIPES[name], batch_size=4) for name in scenes_demo.ARMS.values()}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(scenes_demo, "RECIPES", small)
        patch.setattr(dataset, "take_scenes", lambda *args: take_scenes(*args[:3], min(args[3], 100)))
        patch.setattr(sys, "argv", ["reverie", *words])
        cli.main()
    return folder, out.getvalue()


def assert_refused(result: tuple[int, str, str], *facts: Any) -> None:
    """Check exit code 2, nothing on stdout, and one line on stderr that names the facts."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    assert all(str(fact) in err for fact in facts), err


def test_version_and_environment(reverie):
    assert reverie("--version") == (0, f"reverie-jax {reverie_jax.__version__}\n", "")
    facts = json.loads(reverie("env", "--json")[1])
    assert facts["packages"]["reverie-jax"] == reverie_jax.__version__
    assert facts["devices"]["device 0"].startswith("cpu")
    text = reverie("env")[1]
    assert all(str(fact) in text for fact in (facts["python"], facts["backend"], *facts["packages"], *facts["devices"]))


def test_benchmarks_are_listed_with_their_rules(reverie):
    lines = [line for line in reverie("benchmarks")[1].splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == list(benchmarks.names())
    assert all(rule in line for line in lines for rule in benchmarks.find_benchmark(line.split()[0]).rules)


def test_recipes_are_listed_and_printed(reverie):
    assert {line.split()[0] for line in reverie("recipes")[1].splitlines()} == RECIPES.keys()
    assert reverie("recipes", "scenes-responses") == (0, RECIPES["scenes-responses"].to_yaml(), "")


def test_a_closed_pipe_ends_the_command_quietly():
    read_end, write_end = os.pipe()
    os.close(read_end)
    words = [sys.executable, "-m", "reverie_jax.cli", "score", "--help"]
    result = subprocess.run(words, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, "")


TRAIN = "train scenes-responses --model scenes-base --data {data}/records0 --out {out}"
ASK = "ask {data}/test/images/000000.png ? --model scenes-base"
EVAL = "eval --model scenes-base --benchmark scenes --data {data}/test --out {out}"
PLAN = "plan llava-1.5-7b-lora --topology h200:8"
TRAINED = "train scenes-responses --model {gone} --data {data}/records0 --out {runs}/responses/seed0 --set"
PIPED = ("--version", "--help", "train --help", "recipes", "recipes lrv-sft", "benchmarks", "env", "env --json", PLAN)


@pytest.mark.parametrize("command", PIPED)
@pytest.mark.parametrize("unbuffered", [False, True])
def test_head_ends_any_command_quietly(monkeypatch, capfd, command, unbuffered):
    """A pipe that nobody reads, met by the first write or by the last one."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with (
        open(write_end, "wb", buffering=0 if unbuffered else -1) as pipe,
        io.TextIOWrapper(pipe, write_through=unbuffered) as stdout,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "argv", ["reverie", *command.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 141
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_a_command_with_a_line(reverie, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reverie_jax.cli.env.environment", interrupted)
    assert reverie("env") == (130, "", "reverie: stopped by Ctrl-C\n")


# A command with a mistake, and what its one line names.
MISTAKES = {
    "train llava-9b --model scenes-base --data {data} --out {out}": "llava-9b scenes-responses",
    "recipes llava-9b": "llava-9b",
    "train {gone}.yaml --model scenes-base --data {data} --out {out}": "{gone}.yaml",
    "train scenes-responses --model scenes-base --data {gone} --out {out}": "{gone} build",
    f"{TRAIN} --set pace=3 --set seed=1": "pace learning_rate",
    f"{TRAIN} --dtype int8": "--dtype int8 bfloat16",
    f"{TRAINED} steps=2 save_steps=1 batch_size=4": "steps 2 1 {runs}/responses/seed0",
    f"{TRAINED} steps=1 --no-resume": "already {runs}/responses/seed0",
    TRAIN.replace("{out}", "{data}/test/scenes.jsonl"): "{data}/test/scenes.jsonl",
    **{f"{TRAIN} --mesh {mesh}": mesh for mesh in ("data=9", "fsdp=x")},
    "data build {gone} --out {out}": "{gone}",
    "data build {gone} --out {out} --sizes scenes-base": "--sizes --recipe",
    "data build {gone} --out {out} --recipe scenes-rationales": "--recipe --sizes",
    "data build {gone} --out {out} --sizes {gone} --recipe scenes-rationales": "{gone}",
    "data index {gone} --model scenes-base --recipe scenes-rationales": "{gone}",
    "data index {data} --model scenes-base --recipe nothing": "nothing",
    f"{EVAL} --rule dice": "dice official",
    f"{EVAL} --max-new-tokens 0": "--max-new-tokens",
    EVAL.replace("{data}", "{gone}"): "{gone}",
    EVAL.replace("--benchmark scenes", "--benchmark scenes,scenes"): "scenes,scenes",
    EVAL.replace("--benchmark scenes", "--benchmark peop"): "peop pope",
    ASK.replace("{data}", "{gone}"): "{gone}",
    f"{ASK} --adapter {{data}}": "{data}",
    f"{ASK} --max-new-tokens 0": "--max-new-tokens",
    "demo --out {out} --model {gone}": "{gone}",
    "demo --out {out} --seeds 0": "--seeds",
    "demo --out {out} --train-images 0": "--train-images",
    "scenes pretrain {out} --steps 0": "--steps",
    "scenes evidence {out} --workers 0": "--workers",
    "scenes evidence {data}": "{data} settings.json",
    "demo --out {data}": "records0",
    "scenes render {out} --split dice": "--split dice",
    "scenes render {out} --size 8": "--size",
    "plan llava-9b --topology h200:8": "llava-1.5-7b-lora",
    "plan llava-1.5-7b-lora --topology tpu": "v5e",
    f"{PLAN} --architecture gpt": "llava-phi3-mini",
    f"{PLAN} --dtype int4": "bfloat16",
    f"{PLAN} --mesh fsdp=4": "--mesh fsdp=4 8",
    f"{PLAN} --set batch_size=12 gradient_accumulation_steps=1": "micro-batches 12",
    f"{PLAN} --fit --mesh fsdp=8": "--mesh",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(reverie, demo, tmp_path, command):
    places = {"data": demo[0] / "data", "runs": demo[0] / "runs", "gone": tmp_path / "gone", "out": tmp_path / "out"}
    result = reverie(*(word.format(**places) for word in command.split()))
    assert_refused(result, *(fact.format(**places) for fact in MISTAKES[command].split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 300])
def test_a_broken_image_is_named(reverie, tmp_path, size):
    dataset.make_training_set(tmp_path / "data", 3, size=32, questions=1, seed=0)
    image = tmp_path / "data" / "images" / "000002.png"
    image.write_bytes(image.read_bytes()[:size] or b"not an image at all")
    words = ("data", "build", tmp_path / "data" / "reverie.json", "--out", tmp_path / "records")
    assert_refused(reverie(*words), image.name)
    assert not (tmp_path / "records").exists()


def test_a_missing_tensor_is_named(reverie, demo, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(find_checkpoint("scenes-base"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    image = demo[0] / "data" / "test" / "images" / "000000.png"
    assert_refused(reverie("ask", image, "Is there a cup in the image?", "--model", folder), folder, name)


def test_ask_answers_each_question(reverie, demo):
    image = demo[0] / "data" / "test" / "images" / "000000.png"
    words = ("ask", image, "Describe the image.", "Is there a cup in the image?", "--model", "scenes-base")
    code, out, _ = reverie(*words)
    assert code == 0
    lines = out.splitlines()
    assert (lines[0], lines[2]) == (words[2], words[3])
    assert lines[1].strip()
    assert lines[3].strip().lower().startswith(("yes", "no"))
    sampled = [reverie(*words, "--protocol", "lrv-mplug-owl", "--seed", seed)[:2] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][0] == 0
    assert_refused(reverie(*words, "--protocol", "lrv"), "--protocol lrv", "lrv-minigpt4")
    contrasted = reverie(*words, "--contrast", "nothing")
    assert (contrasted[0], contrasted[1] == out) == (0, False)
    assert_refused(reverie(*words, "--contrast", "noise"), "--contrast noise", "nothing")


def test_build_train_eval_score(reverie, demo, tmp_path, monkeypatch):
    """A recipe from a YAML file, changed by --set, trains on records that were just built; the run is evaluated."""
    data, run, scores = demo[0] / "data", tmp_path / "run", tmp_path / "scores"
    path = tmp_path / "mine.yaml"
    path.write_text(reverie("recipes", "scenes-rationales")[1].replace("keep_checkpoints: 2", "keep_checkpoints: 3"))
    sizes = ("--sizes", "scenes-base", "--recipe", path)
    code, out, _ = reverie("data", "build", data / "train0" / "reverie.json", "--out", tmp_path / "records", *sizes)
    assert code == 0
    assert out.startswith("10 images")  # 8 annotated ones and 2 plain ones
    indexed = reverie("data", "index", tmp_path / "records", "--model", "scenes-base", "--recipe", path)[1]
    assert indexed == out.splitlines(keepends=True)[1]
    monkeypatch.setattr(survey, "survey", None)  # training finds the index
    words = ("--model", "scenes-base", "--data", tmp_path / "records", "--out", run)
    code, out, _ = reverie("train", path, *words, "--set", "steps=1", "seed=5", "batch_size=4")
    assert code == 0
    assert out.startswith("1 steps")
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert (recipe["keep_checkpoints"], recipe["steps"], recipe["seed"]) == (3, 1, 5)
    asked = ("--benchmark", "scenes", "--data", data / "test", "--out", scores)
    code, out, _ = reverie("eval", "--model", "scenes-base", *asked, "--adapter", run)
    assert code == 0
    first = json.loads((scores / "scores.json").read_text())
    assert 0 <= first["metrics"]["pope/f1"] <= 1
    assert "pope/f1" in out
    code, out, _ = reverie(
        *("score", "scenes", "--predictions", scores / "predictions.jsonl", "--data", data / "test", "--json")
    )
    assert code == 0
    assert json.loads(out) == first
    assert_refused(reverie("eval", "--model", "scenes-base", *asked), scores)


def test_json_of_a_plan(reverie):
    code, out, err = reverie(*PLAN.split(), "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert set(plan) == {field.name for field in dataclasses.fields(StepPlan)}
    assert (plan["fits"], plan["compiled"], plan["batch_size"]) == (True, False, 128)
    assert set(plan["bytes"]) == {"frozen", "trainable", "optimizer", "batch", "activations"}
    assert sum(plan["bytes"].values()) == plan["peak_bytes_per_chip"] < plan["hbm_bytes_per_chip"]


def test_table_and_exit_code_of_a_plan(reverie):
    settings = ("--set", "batch_size=1", "gradient_accumulation_steps=1")
    code, out, _ = reverie("plan", "llava-1.5-13b-full", "--topology", "a100-40:1", *settings)
    assert code == 1
    for words in ("DOES NOT FIT", "optimizer state", "not compiled", "roofline", FLOPS_FORMULA[-30:]):
        assert words in " ".join(out.split())


def test_a_complete_run_says_so_without_its_model(reverie, demo, tmp_path):
    places = {"data": demo[0] / "data", "runs": demo[0] / "runs", "gone": tmp_path / "gone"}
    code, out, err = reverie(*f"{TRAINED} steps=1 save_steps=1 batch_size=4".format(**places).split())
    assert (code, err) == (0, "")
    assert "already complete" in out


def test_the_demo_keeps_files_that_are_not_its_own(reverie, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(reverie("demo", "--out", tmp_path), "thesis.txt")
    assert (tmp_path / "thesis.txt").exists()


def test_the_demo_writes_its_report(demo):
    folder, text = demo
    assert "POPE accuracy" in text
    report = json.loads((folder / "report.json").read_text())
    for arm in ("base", "responses", "reflective"):
        assert report["arms"][arm].keys() >= {"pope/accuracy", "pope/adversarial/f1", "skills", "chair_i", "coverage"}
        for name, score in report["arms"][arm].items():
            low, high = score["ci95"]
            assert 0 <= low <= high <= 1, name
            assert 0 <= score["value"] <= 1, name
    assert report["tokens"]["flat"] > report["tokens"]["tree"] > 0
    seconds = report["seconds"]
    assert seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"), abs=0.1)
    recipes = report["recipe"]
    assert recipes["responses"]["steps"] == recipes["reflective"]["steps"] == 1
    assert recipes["responses"]["batch_size"] == recipes["reflective"]["batch_size"]
    page = (folder / "report.html").read_text()
    # Self-contained: nothing is fetched.
    assert "data:image/png;base64," in page
    # A sentence for each headline score of each pair of arms, with its interval.
    low, high = report["differences"]["reflective_minus_responses"]["skills"]["ci95"]
    words = re.escape(f"[{low:+.3f}, {high:+.3f}]")
    assert re.search(rf"reasoning accuracy: reflective is [a-z ]+ responses, [^ ]+ {words}", html.unescape(page))
    assert not any(mark in page for mark in ("<script", "<link", 'src="http', "url(http"))


def test_the_shipped_model_is_small_and_complete():
    folder = find_checkpoint("scenes-base")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) <= 8_000_000
    expected = {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "README.md"}
    assert expected <= files.keys()
    tensors = load_file(folder / "model.safetensors")
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors.values())


def test_no_path_of_this_machine_is_committed():
    package = Path(cli.__file__).parent.parent
    for path in package.rglob("*"):
        if path.suffix in (".py", ".json", ".md", ".html"):
            text = path.read_text("utf-8")
            assert str(package.parent) not in text, path
            assert str(Path.home()) not in text, path

"""`reverie compare`: killed and resumed is uninterrupted, others are refused, results are those of the statistics."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reverie_jax import cli, comparison
from reverie_jax.cli.compare import Compare
from reverie_jax.data.records import RecordSource, write_records
from reverie_jax.eval import statistics
from reverie_jax.eval.benchmarks.interface import Benchmark
from reverie_jax.eval.benchmarks.pope import Pope
from reverie_jax.eval.benchmarks.scoring import Scored
from reverie_jax.eval.score import Score, score
from reverie_jax.loading import find_checkpoint
from reverie_jax.scenes import dataset
from reverie_jax.train.plan import topology
from reverie_jax.train.plan.plan import make_plan
from reverie_jax.train.recipes import RECIPES
from tests.eval.benchmarks import makers as make
from tests.train.tiny import read_losses, wait_for

ARMS = "scenes-responses,why=scenes-rationales"
# One shape for both arms: their steps are one program.
SHAPE = ("sequence.length=224", "sequence.edges=144")
SET = ("steps=2", "batch_size=2", "save_steps=1", "dropout=0.1", *SHAPE)
ANSWERS = ["base", *(f"{arm}/seed{seed}" for arm in ("scenes-responses", "why") for seed in (0, 1))]


def words(root: Path, out: Path, **changes: Any) -> list[str]:
    """Return a command line; options by name, None leaves one out."""
    options = {"model": root / "base", "arms": ARMS, "data": root / "records", "benchmark": "pope", "out": out}
    options |= {"benchmark_data": root / "pope", "seeds": 2, "set": SET} | changes
    line = ["compare"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        line += [f"--{name.replace('_', '-')}", *map(str, values)] if value not in (None, True) else []
        line += [f"--{name}"] if value is True else []
    return line


def reverie(line: list[str]) -> tuple[int, str, str]:
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["reverie", *line])
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def questions(images: str = "abc", first: str = "cup") -> list[tuple[str, str, str]]:
    return [
        (f"{i}.png", f"Is there a {n} in the image?", "yes" if n == first else "no")
        for i in images
        for n in (first, "dog")
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base model, records of eight images, POPE questions about three."""
    root = tmp_path_factory.mktemp("comparison")
    shutil.copytree(find_checkpoint("scenes-base"), root / "base")
    dataset.make_training_set(root / "train", 8, size=64, questions=1, seed=0)
    write_records(root / "records", {"train": dataset.read_records(root / "train")})
    make.pope(root / "pope", random=questions(), popular=questions("ab"), adversarial=questions("c"))
    return root


@pytest.fixture(scope="module")
def finished(root) -> Path:
    """An uninterrupted comparison."""
    code, out, err = reverie(words(root, root / "finished"))
    assert code == 0, err
    assert all(word in out for word in ("pope", "why", "minus base", "compare.json"))
    return root / "finished"


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(comparison, "finetune", lambda *args, **options: pytest.fail("a model was trained"))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text("utf-8"))


def test_killed_and_resumed_is_uninterrupted(root, finished, tmp_path):
    out, line = tmp_path / "out", words(root, tmp_path / "out")
    child = subprocess.Popen(
        [sys.executable, "-m", "reverie_jax.cli", *line], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    metrics = out / "why" / "seed0" / "train" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n"), child)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = out / "scenes-responses" / "seed0" / "train" / "metrics.jsonl"
    before = done.stat().st_mtime_ns
    code, _, err = reverie(line)
    assert code == 0, err
    assert done.stat().st_mtime_ns == before  # what was there is not done again
    names = ["compare.json", "compare.md", "settings.json"]
    names += [f"{place}/pope/{file}" for place in ANSWERS for file in ("predictions.jsonl", "scores.json")]
    for name in names:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    for place in ANSWERS[1:]:
        assert read_losses(out / place / "train") == read_losses(finished / place / "train")
    assert len({(finished / place / "pope" / "predictions.jsonl").read_bytes() for place in ANSWERS}) == len(ANSWERS)


def test_the_result_is_that_of_the_statistics(root, finished):
    benchmark = Pope()
    data = benchmark.load(root / "pope")
    scores = {place: score(benchmark, data, finished / place / "pope" / "predictions.jsonl") for place in ANSWERS}
    counts = {
        arm: np.stack([scores[f"{arm}/seed{n}"].scored.counts for n in (0, 1)]) for arm in ("scenes-responses", "why")
    }
    counts["base"] = scores["base"].scored.counts
    functions = scores["base"].scored.metrics
    content = result(finished)
    assert (content["seeds"], content["baseline"], list(content["arms"])) == (2, "base", ["scenes-responses", "why"])
    metrics = content["benchmarks"]["pope"]["metrics"]
    assert list(metrics) == list(functions)
    page = (finished / "compare.md").read_text("utf-8")
    for metric, row in metrics.items():
        assert metric in page
        assert list(row["models"]) == ["base", "scenes-responses", "why"]
        for name, cell in row["models"].items():
            expected = statistics.bootstrap(counts[name], {"m": functions[metric]})["m"].json("value")
            assert {key: cell[key] for key in expected} == expected
            seeds = [place for place in ANSWERS if place.split("/")[0] == name]
            assert cell["per_seed"] == [round(scores[place].metrics[metric], 4) for place in seeds]
            if name != "base":
                change = statistics.differences(counts[name], counts["base"], {"m": functions[metric]})["m"]
                expected = change.json("value", power=True)
                expected |= {} if change.error else {"detectable": None}
                assert {key: cell["difference"][key] for key in expected} == expected
            else:
                assert "difference" not in cell


def hand_score(*errors: int) -> Score:
    """A score whose metrics are wrong and right answers of ten to each of some images."""
    counts = np.asarray([[wrong, 10 - wrong, 10] for wrong in errors], float)
    metrics = {"all/errors": statistics.ratio(0, 2), "right": statistics.ratio(1, 2)}
    scored = Scored((), [str(n) for n in range(len(errors))], counts, metrics)
    return Score("by hand", "official", {}, scored.values(), {}, 10 * len(errors), 0, (), 0, scored, {})


class ByHand(Benchmark):
    name, lower_is_better = "by hand", frozenset({"errors"})


def test_less_may_be_better_and_base_may_be_compared_too():
    scores = {"base": [hand_score(5, 5, 4)], "good": [hand_score(2, 1, 1), hand_score(1, 1, 1)]}
    scores["same"] = [hand_score(5, 4, 5), hand_score(4, 5, 5)]
    rows = comparison.summarize(ByHand(), scores, "base")["metrics"]
    for metric, sign in (("all/errors", -1), ("right", 1)):
        changes = {name: cell.get("difference") for name, cell in rows[metric]["models"].items()}
        assert changes["base"] is None
        assert changes["good"]["value"] * sign == pytest.approx((14 - 3.5) / 30, abs=1e-4)
        assert (changes["good"]["better"], changes["same"]["better"]) == (True, None)
    against = comparison.summarize(ByHand(), scores, "good")["metrics"]["all/errors"]["models"]
    assert "difference" not in against["good"]
    assert against["base"]["difference"]["better"] is False
    assert against["base"]["difference"]["value"] == pytest.approx(
        -rows["all/errors"]["models"]["good"]["difference"]["value"]
    )
    equal = comparison.summarize(ByHand(), {"base": [hand_score(5, 5)], "a": [hand_score(5, 5)]}, "base")["metrics"]
    assert equal["right"]["models"]["a"]["difference"] == {
        **{"value": 0, "ci95": [0, 0], "error": 0},
        **{"detectable": None, "better": None},
    }
    with pytest.raises(comparison.UserError, match="by hand"):
        comparison.summarize(ByHand(), scores | {"other": [hand_score(1, 1)]}, "base")


@pytest.mark.parametrize(("seeds", "warned"), [(1, "another training"), (4, "too narrow"), (5, None)])
def test_few_seeds_are_said_to_be_few(seeds, warned):
    scores = {"base": [hand_score(5, 4)], "a": [hand_score(1, n % 2) for n in range(seeds)]}
    content = {"model": "m", "seeds": seeds, "baseline": "base", "arms": {"a": {}}}
    page = comparison.markdown(content | {"benchmarks": {"by hand": comparison.summarize(ByHand(), scores, "base")}}, 1)
    assert [word for word in ("another training", "too narrow") if word in page] == ([warned] if warned else [])
    assert "**all/errors**, less is better" in page
    assert "**right**" not in page
    assert " better |" in page


def refused(line: list[str], *facts: str) -> None:
    code, out, err = reverie(line)
    assert (code, out) == (2, ""), err
    error = [text for text in err.splitlines() if text.startswith("reverie: error: ")]
    assert len(error) == 1, err
    assert all(fact in error[0] for fact in facts), error


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"arms": "scenes-responses,nothing"}, ("nothing",)),
        ({"arms": "scenes-responses,why=missing.yaml"}, ("missing.yaml",)),
        ({"arms": "scenes-responses,scenes-responses"}, ("scenes-responses",)),
        ({"arms": "base=scenes-responses"}, ("base",)),
        ({"arms": "a/b=scenes-responses"}, ("a/b",)),
        ({"arms": "scenes-responses@missing"}, ("missing",)),
        ({"arms": None}, ("--arms",)),
        ({"data": None}, ("scenes-responses", "--data")),
        ({"set": ("sequence.length=40",)}, ("arm scenes-responses", "sequence.length")),
        ({"arms": "scenes-rationales,rlaifv-dpo-lora", "set": ()}, ("arm rlaifv-dpo-lora",)),
        ({"set": ("target_modules=nowhere",)}, ("arm scenes-responses", "nowhere")),
        ({"set": ("rank=0",)}, ("rank",)),
        ({"set": ("seed=3",)}, ("--seeds",)),
        ({"mesh": "data=3"}, ("arm scenes-responses", "3")),
        ({"seeds": 0}, ("--seeds",)),
        ({"baseline": "nobody"}, ("--baseline", "nobody")),
        ({"topology": "h200:1"}, ("--topology",)),
        ({"benchmark": None}, ("--benchmark",)),
        ({"benchmark": "pope,pope"}, ("pope,pope",)),
        ({"benchmark": "pope,mmhal", "benchmark_data": "all"}, ("mmhal", "judge")),
        ({"benchmark_data": "one"}, ("pope", "two images")),
        ({"out": "foreign"}, ("foreign",)),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_trained(root, tmp_path, monkeypatch, changes, facts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "Engine", lambda *args: pytest.fail("a question was answered"))
    make.pope(tmp_path / "one", random=questions("a"))
    make.pope(tmp_path / "all" / "pope", random=questions())
    make.write_json(tmp_path / "all" / "mmhal" / "response_template.json", make.mmhal_rows()[:3])
    (tmp_path / "foreign" / "data").mkdir(parents=True)
    refused(words(root, **({"out": tmp_path / "out"} | changes)), *facts)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["data"]


@pytest.fixture(scope="module")
def others(root) -> Path:
    """Another model, records and questions under the same names."""
    others = root / "others"
    shutil.copytree(root / "base", others / "base")
    weights = load_file(others / "base" / "model.safetensors")
    name = next(name for name in weights if "norm" in name and name.endswith("weight"))
    save_file(
        weights | {name: weights[name] * np.asarray(2, weights[name].dtype)}, others / "base" / "model.safetensors"
    )
    dataset.make_training_set(others / "train", 8, size=64, questions=1, seed=1)
    write_records(others / "records", {"train": dataset.read_records(others / "train")})
    make.pope(others / "pope", random=questions(first="cat"), popular=questions("ab"), adversarial=questions("c"))
    return others


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"seeds": 3}, "seeds is 3, there it is 2"),
        ({"set": (*SET, "learning_rate=0.002")}, "arms.why.recipe.learning_rate is 0.002, there it is 0.001"),
        ({"arms": f"{ARMS},more=scenes-responses"}, "arms.more is new"),
        ({"arms": "scenes-responses"}, "arms.why is missing"),
        ({"arms": "scenes-responses,why=scenes-rationales@others/records"}, "arms.why.records"),
        ({"benchmark_data": "others/pope"}, "benchmarks.pope.questions"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16"),
        ({"model": "others/base"}, "weights."),
        ({"model": "scenes-base"}, "model is scenes-base, there it is base"),
    ],
    ids=str,
)
def test_another_comparison_is_refused_and_what_differs_is_named(root, finished, others, monkeypatch, changes, fact):
    monkeypatch.chdir(root)
    before = {path: path.read_bytes() for path in finished.glob("*.*")}
    refused(words(root, finished, **changes), str(finished), fact)
    assert before == {path: path.read_bytes() for path in finished.glob("*.*")}


@pytest.mark.usefixtures("no_training")
def test_a_finished_one_is_compared_anew_also_by_a_release_with_more_fields(root, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    settings = json.loads((out / "settings.json").read_text("utf-8"))
    for arm in settings["arms"].values():
        del arm["recipe"]["flip"]
    (out / "settings.json").write_text(json.dumps(settings), "utf-8")
    code, _, err = reverie(words(root, out, baseline="why"))
    assert code == 0, err
    for metric, row in result(out)["benchmarks"]["pope"]["metrics"].items():
        there = result(finished)["benchmarks"]["pope"]["metrics"][metric]["models"]["why"]["difference"]
        assert row["models"]["base"]["difference"]["value"] == pytest.approx(-there["value"])
        assert "difference" not in row["models"]["why"]
    (out / "settings.json").write_text("[]", "utf-8")
    refused(words(root, out), "settings.json")


def test_a_plan_says_what_a_comparison_takes(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code, text, err = reverie(words(root, out, plan=True))
    assert code == 0, err
    assert all(word in text for word in ("why", "steps", "--topology", "not estimated", "answers of 5 models", "60"))
    code, text, err = reverie(words(root, out, plan=True, topology="h200:1", seeds=3, set=("steps=100000",)))
    assert code == 0, err
    hours = 0.0
    for name in ("scenes-responses", "scenes-rationales"):
        recipe = dataclasses.replace(RECIPES[name], steps=100_000)
        config = comparison.read_config(root / "base")
        place: Any = (topology.Topology.parse("h200:1"), {"data": 1, "fsdp": 1, "tensor": 1})
        step = make_plan(config, recipe, *place, architecture="", dtype="bfloat16", compiled=False)
        one = step.roofline_seconds_per_step * 3 * 100_000 / 3600
        assert f"{one:.3g}" in text
        hours += one
    assert f"at least {hours:.3g} hours in all" in text
    code, text, _ = reverie(words(root, out, plan=True, topology="l4:1", set=("batch_size=10000000",)))
    assert (code, "DOES NOT FIT" in text) == (1, True)
    # A kind of device with figures is planned for without an option.
    monkeypatch.setattr(topology, "chip_of", lambda kind: topology.CHIPS["h100"])
    code, text, err = reverie(words(root, out, plan=True, arms="scenes-responses"))
    assert code == 0, err
    assert "training on h100:1: at least" in text
    assert not out.exists()


def test_arms_name_recipes_and_records(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES["scenes-responses"]
    for file in ("my.yaml", "odd@place=1/my.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(dataclasses.replace(recipe, steps=7).to_yaml(), "utf-8")
    (tmp_path / "records=2").mkdir()
    command = Compare(model="", benchmark_data=root, out=root, data=root / "records")
    mine = dataclasses.replace(recipe, steps=7)
    for text, expected in {
        "scenes-responses": ("scenes-responses", recipe, root / "records"),
        "my.yaml": ("my", mine, root / "records"),
        "odd@place=1/my.yaml": ("my", mine, root / "records"),
        "name=my.yaml@records=2": ("name", mine, Path("records=2")),
        "my.yaml@records=2": ("my", mine, Path("records=2")),
    }.items():
        assert command._arm(text) == expected, text
    assert len(RecordSource(root / "records")) == 8

"""`--push-to-hub` and `reverie push`: the right to write is checked before the work, a failed upload loses nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, parse_eval_result_entries

from reverie_jax.convert import _choose_format
from reverie_jax.data.records import write_records
from reverie_jax.hub.cards import write_model_card
from tests.data.fakes import records
from tests.hub.test_datasets import RECORDS
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's use of its client


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def card_of(folder):
    return huggingface_hub.ModelCard.load(folder / "README.md")


def refused(result, *facts):
    code, out, err = result
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("reverie: error: ")
    assert all(str(fact) in last for fact in facts), last
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The packaged model in transformers' format."""
    from reverie_jax.convert import convert

    return convert("scenes-base", tmp_path_factory.mktemp("converted") / "model")


@pytest.mark.parametrize(
    ("name", "changes", "fact"),
    [
        ("no-owner", {}, "owner/name"),
        ("lab/mine/more", {}, "owner/name"),
        ("lab/mine", {"token": ""}, "HF_TOKEN"),
        ("lab/mine", {"token": "hf_wrong"}, "lab/mine"),
        ("lab/mine", {"token": "hf_reader"}, "lab/mine"),
        ("lab/theirs", {"token": "hf_reader"}, "lab/theirs"),  # it exists: one may read it
        ("others/mine", {}, "others/mine"),
        ("lab/mine", {"offline": True}, "lab/mine"),
    ],
)
def test_who_may_not_write_is_told_before_the_work(reverie, hub, tmp_path, monkeypatch, name, changes, fact):
    hub.created = {(kind, "lab/theirs"): "public" for kind in ("model", "dataset")}
    if "token" in changes:
        monkeypatch.setenv("HF_TOKEN", changes["token"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", changes.get("offline", False))
    write_records(tmp_path / "records", {"train": RECORDS})
    out = tmp_path / "out"
    for words in (
        ("convert", "scenes-base", out, "--to", "llava-hf", "--push-to-hub", name),
        ("data", "build", tmp_path / "none.json", "--out", out, "--push-to-hub", name),
        (
            "train",
            "scenes-responses",
            "--model",
            "x",
            "--data",
            tmp_path / "records",
            "--out",
            out,
            "--push-to-hub",
            name,
        ),
        ("push", tmp_path / "records", name),
    ):
        assert refused(reverie(*words), fact) == ""
        assert not out.exists()
    assert hub.commits == 0


def test_a_model_is_uploaded_as_it_was_written(reverie, hub, tmp_path, converted):
    code, out, err = reverie("convert", "scenes-base", tmp_path / "out", "--to", "auto", "--push-to-hub", "lab/mine")
    assert code == 0, err
    assert out.splitlines()[-1] == f"{hub.url}/lab/mine/commit/{1:040x}"
    assert hub.created == {("model", "lab/mine"): "private"}
    found = files_of(hub.folder("model", "lab/mine"))
    assert found == files_of(tmp_path / "out")
    assert {**found, "README.md": b""} == {**files_of(converted), "README.md": b""}
    assert 'from_pretrained("lab/mine")' in card_of(tmp_path / "out").text
    data = card_of(tmp_path / "out").data
    assert (data.pipeline_tag, data.library_name, data.base_model) == ("image-text-to-text", "transformers", None)


def test_a_failed_upload_loses_nothing(reverie, hub, tmp_path, converted):
    shutil.copytree(converted, folder := tmp_path / "my model")
    for step in ("preupload", "lfs", "commit"):
        hub.failing = {step}
        refused(reverie("push", folder, "lab/mine"), f"full at {step}", f"reverie push '{folder}' lab/mine")
        assert files_of(folder).keys() == files_of(converted).keys()
    hub.failing.clear()
    code, _, err = reverie("push", folder, "lab/mine", "--card", "license=mit", "datasets=a/b,c/d", "tags=one")
    assert code == 0, err
    data = card_of(hub.folder("model", "lab/mine")).data
    assert (data.license, data.datasets, data.tags) == ("mit", ["a/b", "c/d"], ["one"])


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["{tmp}/gone", "lab/x"], "gone"),
        (["{tmp}", "lab/x"], "reverie convert"),
        (["{tmp}/run", "lab/x"], "--push-to-hub lab/x"),
        (["{tmp}/records", "lab/x", "--scores", "s.json"], "--scores"),
        (["{tmp}/model", "lab/x", "--card", "license"], "license"),
        (["{tmp}/model", "lab/x", "--scores", "{tmp}/gone.json"], "gone.json"),
        (["{tmp}/model", "lab/x", "--scores", "{tmp}/model/config.json"], "config.json"),
        (["{tmp}/broken", "lab/x"], "broken/README.md"),
    ],
)
def test_what_cannot_be_pushed(reverie, hub, tmp_path, words, fact):
    write_records(tmp_path / "records", {"train": RECORDS})
    for name in ("run", "model", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("run.json" if name == "run" else "config.json")).write_text("{}")
    (tmp_path / "broken" / "README.md").write_text("---\n[\n---\n")
    refused(reverie("push", *(word.format(tmp=tmp_path) for word in words)), fact)
    assert hub.commits == 0


@pytest.mark.parametrize("bases", [[], ["owner/base"], ["owner/base", "owner/tower"]])
def test_base_models_and_their_licence(reverie, hub, tmp_path, bases):
    """The licence of one base model is taken over, none is made up."""
    hub.models = {"owner/base": "llama2", "owner/tower": "mit"}
    (folder := tmp_path / "adapters").mkdir()
    (folder / "adapter_config.json").write_text("{}")
    write_model_card(folder, "peft", "llava", {"prompt": "x"}, base_models=bases, recipe="name: mine\nsteps: 3\n")
    assert reverie("push", folder, "lab/mine")[0] == 0
    card = card_of(hub.folder("model", "lab/mine"))
    assert card.data.base_model == (bases[0] if len(bases) == 1 else bases or None)
    assert card.data.get("base_model_relation") == ("adapter" if bases else None)
    assert card.data.license == ("llama2" if len(bases) == 1 else None)
    assert card.data.library_name == "peft"
    assert "name: mine\nsteps: 3" in card.text


def score(benchmark, hub="", metrics=("accuracy",), rule="official"):
    return {
        "benchmark": benchmark,
        "rule": rule,
        "protocol": {"hub": hub} if hub else {},
        "metrics": {name: 0.5 + number / 100 for number, name in enumerate(metrics)},
        "intervals": {metrics[0]: [0.4, 0.625]},
        "items": 1234,
    }


def test_results_of_evaluations(reverie, hub, tmp_path):
    """All are in the table and the model-index; on the leaderboard's form only what was asked on a benchmark of the hub."""
    commit = "d" * 40
    tasks = {"set/one": ["only"], "set/several": ["pope", "other"], "set/unclear": ["x", "y"], "set/none": None}
    for name, ids in tasks.items():
        (folder := tmp_path / name).mkdir(parents=True)
        if ids is not None:
            (folder / "eval.yaml").write_text(yaml.safe_dump({"name": name, "tasks": [{"id": id} for id in ids]}))
        hub.repositories[name] = commit, None, folder
    many = [f"m{number}" for number in range(20)]
    scores = [
        score("official"),
        score("mme", f"set/one@{commit}"),
        score("pope", f"set/several@{commit}"),
        score("gqa", f"set/unclear@{commit}", many, "lmms-eval"),
        score("seed", f"set/none@{commit}"),
    ]
    for number, content in enumerate(scores):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "scores.json").write_text(json.dumps(content))
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text("{}")
    write_model_card(folder, "llava-hf", "llava", {"prompt": "x"}, base_models=[], recipe="name: mine")
    paths = [tmp_path / "run0", *(tmp_path / f"run{n}" / "scores.json" for n in range(1, 5))]
    for _ in range(2):  # again: the same, not twice
        code, _, err = reverie("push", folder, "lab/mine", "--scores", *paths)
        assert code == 0, err
    pushed = hub.folder("model", "lab/mine")
    card = card_of(pushed)
    assert card.data.model_name == "mine"
    found = [
        (r.dataset_name, r.dataset_type, r.dataset_revision, r.metric_type, r.metric_value)
        for r in card.data.eval_results
    ]
    assert found[:2] == [("official", "official", None, "accuracy", 0.5), ("mme", "set/one", commit, "accuracy", 0.5)]
    assert len(found) == 4 + 16
    assert "0.4 to 0.625" in card.data.eval_results[0].metric_name
    assert card.text.count("## Evaluation") == 1
    assert "| official | official | 1,234 | accuracy | 0.5 | 0.4 to 0.625 |" in card.text
    assert "| gqa | lmms-eval | 1,234 | 4 more | | |" in card.text
    entries = {
        path.name: parse_eval_result_entries(yaml.safe_load(path.read_text()))
        for path in (pushed / ".eval_results").iterdir()
    }
    known = {"mme-official.yaml": ("set/one", "only"), "pope-official.yaml": ("set/several", "pope")}
    assert {name: (e.dataset_id, e.task_id) for name, (e,) in entries.items()} == known
    assert all(
        (e.value, e.dataset_revision) == (0.5, commit) and "0.4 to 0.625" in e.notes for (e,) in entries.values()
    )
    assert reverie("push", folder, "lab/mine", "--card", "license=mit")[0] == 0  # results stay
    assert len(card_of(pushed).data.eval_results) == 20


def test_a_run_is_uploaded_when_it_ends(reverie, hub, tmp_path):
    from reverie_jax.convert import convert

    write_records(tmp_path / "records", {"train": records(4)})
    (tmp_path / "records" / "sources.json").write_text('{"sources": ["x.json"], "datasets": ["lab/talks"]}')
    words = [
        "train",
        "scenes-responses",
        "--model",
        "scenes-base",
        "--data",
        tmp_path / "records",
        "--out",
        tmp_path / "run",
    ]
    words += ["--set", "steps=1", "batch_size=2", "--push-to-hub", "lab/run"]
    hub.failing = {"commit"}
    again = f"reverie push {tmp_path / 'run' / 'hub'} lab/run"
    assert "1 steps in" in refused(reverie(*words), again)
    hub.failing.clear()
    code, out, err = reverie(*words)  # the same command again, or what the error says
    assert code == 0, err
    assert "already complete" in out
    expected = convert("scenes-base", tmp_path / "peft", to="peft", adapter=tmp_path / "run")
    found = files_of(hub.folder("model", "lab/run"))
    assert {**found, "README.md": b""} == {**files_of(expected), "README.md": b""}
    card = card_of(hub.folder("model", "lab/run"))
    assert card.data.datasets == ["lab/talks"]
    assert "name: scenes-responses" in card.text
    code, out, err = reverie("push", tmp_path / "run", "lab/other", "--public")
    assert code == 0, err
    assert hub.created[("model", "lab/other")] == "public"


TEXT = tiny.CONFIG.text
LINEAR = dataclasses.replace(tiny.CONFIG, projector="linear")


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (tiny.CONFIG, None, "llava-hf"),
        (tiny.CONFIG, {}, "peft"),
        (tiny.CONFIG, {"trainable": "adapters"}, "peft"),
        *((tiny.CONFIG, {"trainable": name}, "llava-hf") for name in ("projector", "full")),
        (tiny.CONFIG, {"upcycle": "sparse"}, "llava"),
        (LINEAR, {}, "llava"),
        (dataclasses.replace(tiny.CONFIG, text=dataclasses.replace(TEXT, head_bias=True)), {}, "llava"),
        (tiny.SYSTEMS["minigpt4"], {}, "peft"),
        (tiny.SYSTEMS["minigpt4"], {"trainable": "projector"}, "original"),
        (tiny.SYSTEMS["mplug-owl"], {}, "original"),  # its projector has a token, which PEFT cannot hold
        (tiny.SYSTEMS["mplug-owl"], {"trainable": "adapters"}, "peft"),
    ],
)
def test_the_format_that_most_others_read(tmp_path, config, changes, expected):
    if changes is not None:
        recipe = json.loads(tiny.recipe(**changes).to_json())
        (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "base": {}}))
    assert _choose_format(config, None if changes is None else tmp_path) == expected


def test_a_run_of_several_processes_is_refused_at_once(reverie, hub, tmp_path):
    words = ["train", "scenes-responses", "--model", "scenes-base", "--data", tmp_path, "--out", tmp_path / "run"]
    refused(reverie(*words, "--distributed", "auto", "--push-to-hub", "lab/run"), "--push-to-hub")
    assert hub.created == {}

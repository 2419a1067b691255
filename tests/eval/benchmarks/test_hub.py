"""`--data hub`: the hub's schemas give the official files' questions, labels and images; nothing is fetched unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reverie_jax.eval.benchmarks import _BUILT_IN, find_benchmark, inputs
from tests.eval.benchmarks.hub_datasets import CONVERT, OFFICIAL, same_files
from tests.eval.benchmarks.samples import SAMPLES, refused
from tests.hub.server import Hub

NAMES = tuple(CONVERT)
PARQUET = [name for name in NAMES if CONVERT[name] is not same_files]
UNPINNED = {"seed", "textvqa"}
"""No commit of these could be read when the list was made."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a function of a benchmark's name: folders with its official files and with the hub's."""
    made: dict[str, tuple[Path, Path]] = {}

    def build(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = OFFICIAL[name](root / "official"), root / "hub"
            CONVERT[name](*made[name])
        return made[name]

    return build


def test_who_has_a_dataset_and_where_it_is_pinned():
    hubs = {name: hub for name in _BUILT_IN if (hub := find_benchmark(name).hub) is not None}
    assert hubs.keys() == CONVERT.keys()
    assert {name for name, hub in hubs.items() if not hub.revision} == UNPINNED
    assert all(len(hub.revision) in (0, 40) and hub.files for hub in hubs.values())


def comparable(name, question):
    """Return what is asked and how it is scored; the hub has no ids of ScienceQA."""
    metadata = dict(question.metadata)
    if "row" in metadata:
        metadata["row"] = {key: value for key, value in metadata["row"].items() if value not in (None, "", "nan")}
    known = () if name == "scienceqa" else (str(question.id), question.cluster)
    return (*known, question.text, question.max_new_tokens, question.history), metadata


@pytest.mark.parametrize("name", NAMES)
def test_the_same_questions_labels_and_images(folders, name):
    official, hub = (find_benchmark(name).load(folder) for folder in folders(name))
    pairs = [sorted((comparable(name, q), q.id) for q in data.questions) for data in (official, hub)]
    assert [one for one, _ in pairs[0]] == [one for one, _ in pairs[1]]
    by_id = [{q.id: q for q in data.questions} for data in (official, hub)]
    for (_, one), (_, other) in zip(*pairs, strict=True):
        ours, theirs = by_id[0][one], by_id[1][other]
        assert (ours.image is None) == (theirs.image is None)
        if str(theirs.id) not in hub.unavailable and ours.image is not None:
            assert official.read_image(ours.image) == hub.read_image(theirs.image)
    clips = {str(q.id) for q in hub.questions if q.metadata.get("kind") == "video"}
    assert hub.unavailable == clips
    with refused("123456789012"):
        hub.read_image("123456789012")


@pytest.mark.parametrize("name", PARQUET)
def test_missing_and_broken_files_are_named(folders, tmp_path, name):
    same_files(folders(name)[1], tmp_path)
    for path in sorted(tmp_path.rglob("*.parquet")):
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        with refused(path.name):
            find_benchmark(name).load(tmp_path)
        path.unlink()
        with refused(tmp_path):  # a shard, or one of two parts; never fewer questions
            find_benchmark(name).load(tmp_path)
        path.write_bytes(content)


SCRIPT = """
import json, logging, sys
from pathlib import Path
from reverie_jax.errors import UserError
from reverie_jax.eval.benchmarks import find_benchmark, inputs
logging.basicConfig(level=logging.INFO, format="%(message)s")
for name in sys.argv[1:]:
    try:
        data = inputs.load(find_benchmark(name), Path("hub"))
        images = sorted({q.image for q in data.available if q.image})
        print(json.dumps([name, len(data.questions), len(data.read_image(images[-1])), data.protocol["hub"]]))
    except UserError as error:
        print(json.dumps([name, str(error)]))
"""


def ask(hub, home, *names, **more):
    """Load benchmarks in a process whose hub is the stand-in; return the results by name, and stderr."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | more
    environment |= {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
    }
    words = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, cwd=home.parent)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {name: rest for name, *rest in rows}, done.stderr


def test_datasets_are_fetched_once_after_licence_and_size(folders, tmp_path):
    repositories = {}
    for name in NAMES:
        hub = find_benchmark(name).hub
        commit, folder = hub.revision or "f" * 40, tmp_path / "repositories" / hub.repository
        same_files(folders(name)[1], folder)  # two configurations of MMBench in one repository
        (folder / "README.md").write_text("never read")
        repositories[hub.repository] = commit, hub.licence or None, folder
    (home := tmp_path / "home").mkdir()
    with Hub(repositories) as server:
        server.broken = {"data/test-00001-of-00003.parquet"}
        found, _ = ask(server, home, "pope")
        assert "lmms-lab-encoder/POPE cannot be downloaded" in found["pope"][0]
        assert server.served.keys() <= {f"lmms-lab-encoder/POPE/data/test-0000{n}-of-00003.parquet" for n in (0, 2)}
        server.broken.clear()
        found, log = ask(server, home, *NAMES)
        assert not {name: rest for name, rest in found.items() if len(rest) == 1}
        for name, (count, size, origin) in found.items():
            hub, loaded = find_benchmark(name).hub, find_benchmark(name).load(folders(name)[1])
            images = sorted({q.image for q in loaded.available if q.image})
            assert (count, size) == (len(loaded.questions), len(loaded.read_image(images[-1])))
            assert origin == f"{hub.repository}@{hub.revision or 'f' * 40}"
            (line,) = [line for line in log.splitlines() if line.startswith(f"{name}: datasets/{hub.repository} at ")]
            assert f"licence: {hub.licence or 'not stated'}" in line
            assert " MB, " in line
            assert ("none is pinned" in line) == (name in UNPINNED)
        assert max(server.served.values()) == 1, "a file was downloaded twice"
        assert not any(name.endswith("README.md") for name in server.served)
        before = server.served.total()
        assert ask(server, home, *NAMES)[0] == found
        assert server.served.total() == before
    offline, _ = ask(server, home, "pope", "seed")  # the stand-in is gone
    assert offline["pope"] == found["pope"]
    assert "SEED-Bench" in offline["seed"][0]


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    SAMPLES["pope"](tmp_path / "hub")
    assert "hub" not in inputs.load(find_benchmark("pope"), Path("hub")).protocol  # a folder of that name
    monkeypatch.chdir("/")
    with refused("gone"):
        inputs.load(find_benchmark("pope"), tmp_path / "gone")
    with refused("--data hub", "amber", find_benchmark("amber").required_files):
        inputs.load(find_benchmark("amber"), Path("hub"))

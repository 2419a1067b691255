"""The page of `reverie report`: runs are read, scores compared, answers shown, and nothing in them is taken for HTML."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from reverie_jax.errors import UserError
from reverie_jax.eval import score
from reverie_jax.eval.benchmarks import find_benchmark
from reverie_jax.eval.benchmarks.interface import Question
from reverie_jax.eval.benchmarks.pope import Pope
from reverie_jax.eval.report import gallery, page
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import SAMPLES, refused

EVIL = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two splits of POPE about eight images: a cat is there, a dog is not."""
    folder = tmp_path_factory.mktemp("pope")
    rows = [
        (f"{n}.png", f"Is there a {name} in the image?", label)
        for n in range(8)
        for name, label in (("cat", "yes"), ("dog", "no"))
    ]
    make.pope(folder, random=rows, adversarial=rows)
    for n in range(8):
        Image.new("RGB", (640, 400), (20 * n, 90, 200)).save(folder / "val2014" / f"{n}.png")
    return folder


def write_run(folder: Path, data: Path, answer, rule: str = "official", temperature: float = 0.0, **row) -> Path:
    """Write a run's folder: `answer(question, number)` to every question, and its score."""
    benchmark = find_benchmark("pope")
    questions = benchmark.load(data)
    rows = [
        {"question_id": q.id, "image": q.image, "prompt": q.text, "text": answer(q, number)}
        | {"metadata": {"yes": 0.25 + 0.5 * q.metadata["label"]}, **row}
        for number, q in enumerate(questions.questions)
    ]
    make.write_lines(folder / "predictions.jsonl", rows)
    decoding = {"beams": 1, "temperature": temperature, "contrast": ""}
    make.write_json(folder / "run.json", {"model": "tiny", "decoding": decoding})
    result = score.score(benchmark, questions, folder / "predictions.jsonl", rule, draws=50)
    score.write_score(result, folder / "scores.json")
    return folder


def truthful(question: Question, number: int) -> str:
    return "Yes" if question.metadata["label"] else "No"


def credulous(question: Question, number: int) -> str:
    return "Yes" if question.metadata["label"] or number % 4 == 1 else "No"


@pytest.fixture(scope="module")
def two(tmp_path_factory, data) -> tuple[str, str]:
    """Arguments of two runs: a, which answers yes too often, and b, which is right."""
    home = tmp_path_factory.mktemp("runs")
    return f"a={write_run(home / 'a', data, credulous)}", f"b={write_run(home / 'b', data, truthful)}"


def render(arguments, data=None, images=None, count=6) -> str:
    return page.render(page.read_runs([str(text) for text in arguments]), data=data, images=images, count=count)


class _Parser(HTMLParser):
    """Collects tags and links, and checks that tags are balanced."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_its_images_are_small(two, data):
    html = render(two, data, count=2)
    parsed = _Parser(html)
    assert not {"script", "link", "iframe", "object"} & parsed.tags
    assert all(link.startswith("data:image/jpeg;base64,") for link in parsed.links)
    assert not any(word in html for word in ("url(", "@import", "http"))
    galleries = re.split(r'<details class="gallery"', html)[1:]
    assert [section.count("data:image/jpeg") for section in galleries] == [2, 2]
    encoded = parsed.links[0].partition(",")[2]
    assert max(Image.open(io.BytesIO(base64.b64decode(encoded))).size) == gallery.SIDE
    assert not _Parser(render(two, data, count=0)).links


def test_galleries_differences_and_rules(two, data):
    html = render(two, data)
    expected = sum(n % 4 == 1 for n in range(32)), len({n % 16 // 2 for n in range(1, 32, 4)})
    for title in ("a wrong, b right", "a answers yes where the truth is no"):
        match = re.search(rf"{title}: (\d+) questions, (\d+) images", html)
        assert match
        assert tuple(map(int, match.groups())) == expected
    assert "a right, b wrong" not in html
    assert "b answers yes where" not in html
    assert 'Is there a dog in the image? <span class="soft">Truth: no' in html
    assert "Answer the question using" not in html.split('class="gallery"')[1]
    assert "Differences to a" in html
    assert "higher (rough: 8 clusters)" in html
    assert "8 only by b, 0 only by a; McNemar's exact p = 0.0078" in html
    assert "agreement of official and lmms-eval" in html
    assert "100.0%" in html
    same = render([two[0], two[0].replace("a=", "c=", 1)], data)
    assert "no significant difference" in same
    assert "higher" not in same


def test_a_rule_without_groups_has_right_answers_by_category(tmp_path, data):
    html = render([write_run(tmp_path / "a", data, credulous, rule="lmms-eval")], data)
    section = html[html.index("share of right answers") :]
    assert all(split in section for split in ("adversarial", "random"))
    assert "0.750" in section  # a quarter of all answers is wrong: of the two questions about every other image, one


def test_answers_and_names_are_escaped(tmp_path, data):
    run = write_run(tmp_path / "evil", data, lambda question, number: EVIL, rationale=EVIL, first_text=EVIL)
    for html in (render([f"{EVIL}={run}", f"b={run}"], data), render([run])):
        assert "script" not in _Parser(html).tags
        assert "<script" not in html
        assert "alert(&#39;x&#39;)" in html
        assert "{{ 7 * 7 }}" in html


def test_tables_alone_without_data_and_without_images(two, data, tmp_path):
    html = render(two)
    assert "--data" in html
    assert not any(word in html for word in ("<img", "McNemar"))
    assert all(word in html for word in ("By category: f1", "Yes rate"))
    (tmp_path / "images").mkdir()
    for file in data.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    html = render(two, tmp_path, tmp_path / "images")
    assert "<img" not in html
    assert str(tmp_path / "images") in html
    # Images that are not in the given folder are read from the data.
    assert "<img" in render(two, data, tmp_path / "images")


def test_protocols_are_compared_and_published_scores_need_the_official_rule_and_all_questions(
    two, data, tmp_path, monkeypatch
):
    assert "Protocols differ" not in render(two)
    html = render([two[0], write_run(tmp_path / "sampled", data, truthful, temperature=1.0)])
    assert "Protocols differ: pope" in html
    assert "decoding: temperature" in html
    assert "sampled at temperature 1" in html
    assert "LLaVA-1.5-7B" not in render(two)
    monkeypatch.setattr(Pope, "published_items", 32)
    html = render(two)
    assert all(text in html for text in ("REVERIE-1.5-7B LoRA", "0.864", "second-hand", "MODEL_ZOO"))
    other = write_run(tmp_path / "other", data, truthful, rule="vlmevalkit")
    html = render([two[0], other], data)
    assert "is not compared with" in html
    assert "McNemar's exact p" not in html
    assert "Protocols differ: pope" in html
    assert "LLaVA-1.5-7B" in html  # the first run has the official rule
    assert "LLaVA-1.5-7B" not in render([other])


def test_unparsed_answers_and_changed_scores_are_reported(two, data, tmp_path):
    vague = write_run(tmp_path / "vague", data, lambda question, number: "Perhaps & maybe" if number == 3 else "No")
    html = render([vague])
    assert "1 of 32 answers could not be parsed" in html
    assert "Perhaps &amp; maybe" in html
    changed = write_run(tmp_path / "changed", data, truthful)
    stored = json.loads((changed / "scores.json").read_text())
    stored["metrics"]["f1"] = 0.5
    make.write_json(changed / "scores.json", stored)
    assert re.search(r"changed: scores\.json .*\(f1 differ\)", render([two[0], changed], data))


def test_several_benchmarks_names_and_answers_without_a_score(data, tmp_path):
    folder = write_run(tmp_path / "alpha=0.5", data, truthful)
    assert [run.name for run in page.read_runs([str(folder)])] == ["alpha=0.5"]
    assert [run.name for run in page.read_runs([f"half={folder}"])] == ["half"]
    write_run(tmp_path / "run" / "pope", data, truthful)
    make.write_lines(tmp_path / "run" / "mm-vet" / "predictions.jsonl", [{}])
    (run,) = page.read_runs([f"mine={tmp_path / 'run'}"])
    assert (run.name, list(run.results), run.unscored) == ("mine", ["pope"], ["mm-vet"])
    html = page.render([run], data=data, images=None, count=1)
    assert "answers without a score" in html
    assert "mm-vet" in html


def test_every_kind_of_benchmark_has_a_section(tmp_path):
    five = tmp_path / "five"
    for name in ("mme", "mmbench", "scienceqa", "seed", "amber"):
        SAMPLES[name](five / name)
    for run, text in (("one", "A"), ("two", "Yes")):
        for place in sorted(five.iterdir()):
            benchmark, folder = find_benchmark(place.name), tmp_path / run / place.name
            data = benchmark.load(place)
            rows = [{"question_id": q.id, "prompt": q.text, "text": text} for q in data.questions]
            make.write_lines(folder / "predictions.jsonl", rows)
            result = score.score(benchmark, data, folder / "predictions.jsonl", draws=20)
            score.write_score(result, folder / "scores.json")
    html = render([tmp_path / "one", tmp_path / "two"], five)
    _Parser(html)
    for part in ("mme · perception", "mmbench · accuracy", "scienceqa · img_accuracy", "seed · accuracy", "amber · F1"):
        assert part in html
    assert "one right, two wrong" in html
    assert "Truth: A. u" in html
    judged = sorted(find_benchmark("mmbench").judged_rules)[0]
    for run in ("one", "two"):  # a rule whose replies are missing
        path = tmp_path / run / "mmbench" / "scores.json"
        make.write_json(path, json.loads(path.read_text()) | {"rule": judged})
    html = render([tmp_path / "one" / "mmbench", tmp_path / "two"], five)
    assert "was not scored again" in html
    assert "replies.jsonl" in html


def test_unreadable_runs_are_reported(two, data, tmp_path):
    def assert_refused(arguments, *facts):
        with refused(*facts, error=UserError):
            page.read_runs([str(text) for text in arguments])

    assert_refused([])
    assert_refused([tmp_path / "none"], tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert_refused([tmp_path / "empty"], tmp_path / "empty", "scores.json")
    assert_refused([two[0], two[0]], "a")
    broken = write_run(tmp_path / "broken", data, truthful)
    for text in ("[]", "{}", '{"benchmark": "pope"}', "not json", '{"rules": []}'):
        (broken / "scores.json").write_text(text)
        assert_refused([broken], broken / "scores.json")
    (broken / "predictions.jsonl").unlink()
    assert_refused([broken], broken, "predictions.jsonl")
    for name in ("a", "b"):
        write_run(tmp_path / "twice" / name, data, truthful)
    assert_refused([tmp_path / "twice"], tmp_path / "twice", "pope")


@pytest.mark.parametrize(("folder", "images"), [("none", None), (".", None), (".", "none")])
def test_unusable_data_is_reported(two, tmp_path, folder, images):
    with pytest.raises(UserError, match="--images" if images else "--data"):
        render(two, tmp_path / folder, images and tmp_path / images)

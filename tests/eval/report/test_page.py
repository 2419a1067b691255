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
from reverie_jax.eval.benchmarks import benchmark
from reverie_jax.eval.benchmarks.interface import Question
from reverie_jax.eval.report import gallery, published
from reverie_jax.eval.report import page as pages
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks import makers_free as make_free

IMAGES = [f"{number}.png" for number in range(8)]
EVIL = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two splits of POPE about eight pictures: a cat is there, a dog is not."""
    folder = tmp_path_factory.mktemp("pope")
    (folder / "images").mkdir()
    for number, name in enumerate(IMAGES):
        Image.new("RGB", (640, 400), (20 * number, 90, 200)).save(folder / "images" / name)
    for split in ("random", "adversarial"):
        rows = [
            {"question_id": 2 * n + side, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
            for n, image in enumerate(IMAGES)
            for side, (thing, label) in enumerate((("cat", "yes"), ("dog", "no")), 1)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(text, "utf-8")
    return folder


def made(folder: Path, data: Path, answer, rule: str = "official", **record) -> Path:
    """A run's folder: `answer(question, number)` to every question, and its score."""
    one = benchmark("pope")
    loaded = one.load(data)
    folder.mkdir(parents=True)
    lines = []
    for number, question in enumerate(loaded.questions):
        row = {"question_id": question.id, "image": question.image, "prompt": question.text}
        row |= {"text": answer(question, number), "metadata": {"yes": 0.25 + 0.5 * question.known["label"]}}
        lines.append(json.dumps(row | record.get("row", {})) + "\n")
    (folder / "predictions.jsonl").write_text("".join(lines), "utf-8")
    run = {"model": "tiny", "decoding": {"beams": 1, "temperature": record.get("temperature", 0.0), "against": ""}}
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    found = score.score(one, loaded, folder / "predictions.jsonl", rule, draws=50)
    score.write_score(found, folder / "scores.json")
    return folder


def truthful(question: Question, number: int) -> str:
    return "Yes" if question.known["label"] else "No"


def credulous(question: Question, number: int) -> str:
    return "Yes" if question.known["label"] or number % 4 == 1 else "No"


@pytest.fixture(scope="module")
def two(tmp_path_factory, data) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("runs")
    return made(home / "first", data, credulous), made(home / "second", data, truthful)


def rendered(texts, data=None, images=None, shown=6) -> str:
    return pages.render(pages.read_runs([str(text) for text in texts]), data=data, images=images, shown=shown)


class _Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: str) -> _Balanced:
    found = _Balanced()
    found.feed(page)
    assert not found.open
    return found


def test_page_holds_everything_itself(two, data):
    page = rendered(two, data)
    found = parsed(page)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert found.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in found.links)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page


def test_pictures_are_scaled_down_and_no_more_than_asked_for(two, data):
    page = rendered(two, data, shown=2)
    sections = re.split(r'<details class="gallery"', page)[1:]
    assert [section.count("data:image/jpeg") for section in sections] == [2, 2]
    coded = parsed(page).links[0].partition(",")[2]
    assert max(Image.open(io.BytesIO(base64.b64decode(coded))).size) == gallery.SIDE
    assert not parsed(rendered(two, data, shown=0)).links


def test_wins_losses_and_hallucinations_have_the_answers_and_the_truth(two, data):
    page = rendered([f"a={two[0]}", f"b={two[1]}"], data)
    wins = re.search(r"a wrong, b right: (\d+) questions, (\d+) pictures", page)
    yes = re.search(r"a says yes where the truth is no: (\d+) questions, (\d+) pictures", page)
    expected = sum(number % 4 == 1 for number in range(32)), len({number % 16 // 2 for number in range(1, 32, 4)})
    assert wins is not None
    assert tuple(map(int, wins.groups())) == expected
    assert yes is not None
    assert yes.groups() == wins.groups()
    assert "a right, b wrong" not in page
    assert "b says yes where" not in page
    assert 'Is there a dog in the image? <span class="soft">Truth: no' in page
    assert "Answer the question using" not in page.split('class="gallery"')[1]


def test_differences_say_no_more_than_their_intervals(two, data):
    page = rendered([f"a={two[0]}", f"b={two[1]}"], data)
    assert "Differences to a" in page
    assert "higher (rough: 8 units)" in page
    assert "8 b alone, 0 a alone; McNemar's exact p = 0.0078" in page
    same = rendered([f"a={two[0]}", f"b={two[0]}"], data)
    assert "no difference beyond the interval" in same
    assert "higher" not in same


def test_whatever_an_answer_holds_is_text(tmp_path, data):
    run = made(tmp_path / "evil", data, lambda question, number: EVIL, row={"rationale": EVIL, "first_text": EVIL})
    for page in (rendered([f"{EVIL}={run}", f"b={run}"], data), rendered([run])):
        assert "script" not in parsed(page).tags
        assert "<script" not in page
        assert "alert(&#39;x&#39;)" in page
        assert "{{ 7 * 7 }}" in page


def test_without_data_there_are_tables_alone_and_the_page_says_so(two):
    page = rendered(two)
    assert "Tables only" in page
    assert "<img" not in page
    assert "McNemar" not in page
    assert "By category: f1" in page
    assert "How often each run says yes" in page


def test_pictures_that_are_missing_are_said_to_be(two, data, tmp_path):
    (tmp_path / "images").mkdir()
    for file in data.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    page = rendered(two, tmp_path, tmp_path / "images")
    assert "<img" not in page
    assert f"not in {tmp_path / 'images'}" in page
    # Those that are not in the folder that is named are looked for with the questions.
    assert "<img" in rendered(two, data, tmp_path / "images")


def test_protocols_that_differ_are_told(two, data, tmp_path):
    assert "Protocols differ" not in rendered(two)
    other = made(tmp_path / "drawn", data, truthful, temperature=1.0)
    page = rendered([two[0], other])
    assert "Protocols differ: pope" in page
    assert "decoding: temperature" in page
    assert "drawn at temperature 1" in page


def test_another_rule_is_not_compared_and_has_no_published_scores(two, data, tmp_path, monkeypatch):
    monkeypatch.setitem(published.ITEMS, "pope", 32)  # type: ignore[arg-type]
    other = made(tmp_path / "kit", data, truthful, rule="vlmevalkit")
    page = rendered([two[0], other], data)
    assert "is not compared with" in page
    assert " alone; McNemar" not in page
    assert "Protocols differ: pope" in page
    assert "LLaVA-1.5-7B" in page  # the first run has the official rule
    alone = rendered([other])
    assert "LLaVA-1.5-7B" not in alone
    assert "published scores are by the rule official" in alone


def test_published_scores_stand_with_their_sources_where_the_questions_are_as_many(two, monkeypatch):
    assert "published" in rendered(two)
    assert "REVERIE-1.5-7B LoRA" not in rendered(two)
    monkeypatch.setitem(published.ITEMS, "pope", 32)  # type: ignore[arg-type]
    page = rendered(two)
    assert "REVERIE-1.5-7B LoRA" in page
    assert "0.864" in page
    assert "second-hand" in page
    assert "MODEL_ZOO" in page
    assert "by a public reading note" in page


def test_rules_that_need_no_judge_are_compared(two, data):
    page = rendered(two, data)
    assert "official and lmms-eval agree on who is right" in page
    assert "100.0%" in page


def test_unread_answers_are_listed(tmp_path, data):
    run = made(tmp_path / "vague", data, lambda question, number: "Perhaps & maybe" if number == 3 else "No")
    page = rendered([run])
    assert "1 of 32 answers say nothing that the rule looks for" in page
    assert "Perhaps &amp; maybe" in page


def test_answers_that_have_changed_since_are_told(two, data, tmp_path):
    changed = made(tmp_path / "changed", data, truthful)
    stored = json.loads((changed / "scores.json").read_text())
    stored["metrics"]["f1"] = 0.5
    (changed / "scores.json").write_text(json.dumps(stored))
    assert "changed: scores.json and its answers beside these files differ (f1)" in rendered([two[0], changed], data)


def test_several_benchmarks_and_answers_without_a_score(data, tmp_path):
    made(tmp_path / "run" / "pope", data, truthful)
    (tmp_path / "run" / "mm-vet").mkdir()
    (tmp_path / "run" / "mm-vet" / "predictions.jsonl").write_text("{}\n")
    (run,) = pages.read_runs([f"mine={tmp_path / 'run'}"])
    assert (run.name, list(run.parts), run.unscored) == ("mine", ["pope"], ["mm-vet"])
    page = pages.render([run], data=data, images=None, shown=1)
    assert "answers without a score" in page
    assert "mm-vet" in page


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Official files of five benchmarks, by their names."""
    home = tmp_path_factory.mktemp("many")
    asked = {"cat.jpg": [("Is it a cat?", "Yes"), ("Is it a dog?", "No")]}
    make.mme(home / "mme", {"existence": asked, "count": {"two.jpg": asked["cat.jpg"]}, "OCR": asked})
    rows = make.rotations(1, "What is it?", ["cat", "dog"], "A") + make.rotations(
        2, "Where is it?", ["left", "right"], "B", category="spatial_relationship"
    )
    make.mmbench(home / "mmbench" / "mmbench_dev_20230712.tsv", rows)
    problems = {
        "5": make.problem("Which?", ["iron", "ice"], 1),
        "6": make.problem("Who?", ["he", "she"], 0, image=None),
    }
    make.scienceqa(home / "scienceqa", problems)
    make.seed(home / "seed", [make.seed_question("7", 1, "B"), make.seed_question("8", 2, "A")])
    (home / "amber" / "query").mkdir(parents=True)
    kinds = [("discriminative-hallucination", "no"), ("discriminative-relation", "yes")]
    make_free.amber(home / "amber", [], kinds)
    return home


@pytest.mark.parametrize("judged", [False, True])
def test_every_kind_of_benchmark_has_its_place(many, tmp_path, judged):
    for run, text in (("one", "A"), ("two", "Yes")):
        for place in sorted(many.iterdir()):
            one = benchmark(place.name)
            loaded = one.load(place)
            folder = tmp_path / run / place.name
            folder.mkdir(parents=True)
            rows = [{"question_id": q.id, "prompt": q.text, "text": text} for q in loaded.questions]
            (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            found = score.score(one, loaded, folder / "predictions.jsonl", draws=20)
            score.write_score(found, folder / "scores.json")
            if judged and place.name == "mmbench":
                stored = json.loads((folder / "scores.json").read_text())
                (folder / "scores.json").write_text(json.dumps(stored | {"rule": sorted(one.judged)[0]}))
    page = rendered([tmp_path / "one", tmp_path / "two"], many)
    parsed(page)
    for part in ("mme · perception", "mmbench · accuracy", "scienceqa · img_accuracy", "seed · accuracy", "amber · F1"):
        assert part in page
    assert "one right, two wrong" in page
    assert "Truth: A. cat" in page or judged
    assert ("needs a judge" in page) == judged


def test_a_name_may_be_left_out_and_a_folder_may_hold_the_sign(data, tmp_path):
    folder = made(tmp_path / "alpha=0.5", data, truthful)
    assert [run.name for run in pages.read_runs([str(folder)])] == ["alpha=0.5"]
    assert [run.name for run in pages.read_runs([f"half={folder}"])] == ["half"]


def test_runs_that_cannot_be_read(two, data, tmp_path):
    def fails(texts, says):
        with pytest.raises(UserError) as found:
            pages.read_runs([str(text) for text in texts])
        assert says in str(found.value)
        assert "\n" not in str(found.value)

    fails([], "at least one")
    fails([tmp_path / "none"], f"{tmp_path / 'none'}: no such folder")
    (tmp_path / "empty").mkdir()
    fails([tmp_path / "empty"], f"{tmp_path / 'empty'}: no scores.json")
    fails([two[0], two[0]], "two runs are called first")
    half = made(tmp_path / "half", data, truthful)
    (half / "predictions.jsonl").unlink()
    fails([half], f"{half}: has no predictions.jsonl")
    for number, text in enumerate(("[]", "{}", '{"benchmark": "pope"}', "not json", '{"rules": []}')):
        broken = made(tmp_path / f"broken{number}", data, truthful)
        (broken / "scores.json").write_text(text)
        fails([broken], str(broken))
    made(tmp_path / "twice" / "a", data, truthful)
    made(tmp_path / "twice" / "b", data, truthful)
    fails([tmp_path / "twice"], "pope is there twice")


def test_data_that_fit_nothing_are_an_error(two, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        rendered(two, tmp_path / "none")
    with pytest.raises(UserError, match="pope needs"):
        rendered(two, tmp_path)
    with pytest.raises(UserError, match="--images"):
        rendered(two, tmp_path, tmp_path / "none")

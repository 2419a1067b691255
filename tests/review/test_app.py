"""The review as a browser asks for it: what pages show, what changes are kept, and what is refused."""

from __future__ import annotations

import base64
import html
import io
import json
import re

import pytest
from PIL import Image
from starlette.testclient import TestClient

from reverie_jax.data.sources.annotated import KEYS
from reverie_jax.data.sources.marks import Mark
from reverie_jax.review import app, index, pages
from reverie_jax.review.agreement import Agreement
from reverie_jax.review.app import make_app
from reverie_jax.review.index import Filters, Index
from tests.data.fakes import llava_row, png, write_json_rows, write_parquet
from tests.review.helpers import EVIL, judged_row

HOST = "http://127.0.0.1"


@pytest.fixture
def review(world):
    return world.review()


@pytest.fixture
def client(review):
    with TestClient(make_app(review), base_url=HOST) as made:
        yield made


def articles(page: str) -> dict[int, str]:
    """Return the samples of a page, unescaped, by number."""
    found = re.findall(r'<article id="sample-(\d+)".*?</article>', page, re.DOTALL)
    texts = re.findall(r"<article .*?</article>", page, re.DOTALL)
    return {int(number): html.unescape(text) for number, text in zip(found, texts, strict=True)}


def follow(client, response, rel):
    """Return the next or previous page; None if there is none."""
    found = re.search(f'rel="{rel}" href="([^"]+)"', response.text)
    return None if found is None else client.get(f"/{html.unescape(found[1])}")


def place(world, number: int) -> str:
    return f"{number}/{world.digests[number - 1]}"


def send(client, world, number: int, **change):
    return client.post(f"/marks/{place(world, number)}", json=change)


def test_a_page_shows_rows_with_image_texts_and_verdict(client, world):
    response = client.get("/")
    page = response.text
    found = articles(page)
    assert list(found) == list(range(1, pages.PAGE + 1))
    for number, article in found.items():
        row = world.judged[number - 1]
        assert all(row[key].strip() in article for key in KEYS if key != "image")
        assert f'src="image/{place(world, number)}"' in article
        assert row["image"] in article
        assert f"openai:m: {row['gemini_pro_judge']}" in article
        assert ("judge: dropped" in article) == (number % 4 == 0)
        assert "negative and positive" in article
        assert "yes/no" in article
    assert not any(mark in page for mark in ("<script>", "<img src=x", "http:", "https:"))
    assert "script-src 'self'" in response.headers["content-security-policy"]
    for name in re.findall(r'(?:href|src)="(review[^"]+)"', page):
        assert client.get(f"/{name}").status_code == 200
    assert "3.png" not in page
    article = articles(client.get("/", params={"source": "llava.json", "after": 26}).text)[27]
    assert [re.sub(r"\s+", " ", text) for text in re.findall(r'<dd class="(?:\w+)">(.*?)</dd>', article)] == [
        "Q?",
        "A.",
    ]


FILTERS = [
    ({}, range(1, 28)),
    ({"source": "llava.json"}, range(13, 28)),
    ({"verdict": "dropped"}, (4, 8, 12)),
    ({"verdict": "accepted", "type": "yes/no"}, (1, 2, 3, 5, 6, 7, 9, 10, 11)),
    ({"kind": "no rationale"}, range(13, 28)),
    ({"kind": "negative and positive", "type": "short"}, ()),
    ({"source": "llava.json", "least": 12, "most": "14"}, (21, 22, 23)),
    ({"mark": "good"}, (2,)),
    ({"mark": "bad"}, (3, 13)),
    ({"mark": "unmarked", "verdict": "accepted"}, (1, 5, 6, 7, 9, 10, 11)),
    ({"mark": "edited"}, (5,)),
    ({"mark": "with a note"}, (6,)),
    ({"mark": "disputed"}, (2,)),
    ({"mark": "unusable"}, ()),
    ({"mark": "", "least": "", "most": ""}, range(1, 28)),
]


@pytest.mark.parametrize(("query", "numbers"), FILTERS)
def test_filters(client, review, world, query, numbers):
    for reviewer, number, change in (
        ("ana", 2, {"mark": "good"}),
        ("ben", 2, {"mark": "bad"}),
        ("ana", 3, {"mark": "bad"}),
        ("ana", 13, {"mark": "bad"}),
        ("ben", 5, {"edits": {"question": "n"}}),
        ("ben", 6, {"note": "n"}),
    ):
        review.marks.append(Mark(row=world.digests[number - 1], reviewer=reviewer, **change))
    found, response = [], client.get("/", params=query)
    while response is not None:
        shown = list(articles(response.text))
        assert len(shown) <= pages.PAGE
        assert f"of {len(numbers)}<" in response.text or not numbers
        found += shown
        after = follow(client, response, "next")
        assert after is None or articles(follow(client, after, "prev").text) == articles(response.text)
        response = after
    assert found == list(numbers)


def test_pages_do_not_shift_while_one_marks(client, world):
    """Of the unmarked samples, each is shown once, though those that were marked are no longer among them."""
    response, seen = client.get("/", params={"mark": "unmarked"}), []
    while response is not None:
        for number in articles(response.text):
            seen.append(number)
            send(client, world, number, mark="good")
        response = follow(client, response, "next")
    assert seen == list(range(1, 28))


def test_marks_notes_and_edits_are_kept_as_they_are_changed(client, world, review):
    new = f"Corrected\n{EVIL} ü"
    for change in ({"mark": "bad"}, {"mark": "bad"}, {"note": " see it "}, {"edits": {"question": new}}, {"mark": ""}):
        assert send(client, world, 1, **change).status_code == 200
    article = articles(client.get("/").text)[1]
    assert article.count(new) == 2  # shown, and in the form
    assert f"<del>{world.judged[0]['question']}</del>" in article
    assert "Note: see it" in article
    assert article.count('aria-pressed="false"') == 2
    known = {"row": world.digests[0], "reviewer": "ana", "where": "judged.json: row 0", "image": "0.png"}
    changed = [{key: value for key, value in line.items() if key != "time"} for line in world.lines()]
    lines = [{"mark": "bad"}, {"note": "see it"}, {"edits": {"question": new}}, {"mark": ""}]
    assert changed == [known | line for line in lines]
    shown = send(client, world, 1, edits={"question": world.judged[0]["question"]})
    assert "(edited)" not in shown.text
    assert world.lines()[-1]["edits"] == {"question": None}
    assert client.get("/marks.jsonl").text == world.marks.read_text("utf-8")


def test_two_tabs_and_two_reviewers_change_one_sample(client, world):
    """A page that is old takes nothing back; another's marks are shown after one's own, another's edits at once."""
    other = TestClient(make_app(world.review("ben")), base_url=HOST)
    send(client, world, 1, edits={"question": "one"})
    send(other, world, 1, edits={"correct_rationale": "two"}, mark="bad", note="by ben")
    article = articles(client.get("/").text)[1]
    assert article.count("one") > 1
    assert article.count("two") > 1
    assert "by ben" not in article
    assert "ben: bad, by ben" in send(client, world, 1, mark="good").text
    assert client.get("/", params={"mark": "disputed"}).text.count("<article") == 1
    page = client.get("/agreement").text
    assert "ana and ben: Cohen's kappa 0.000, from 1 samples" in html.unescape(page)


REFUSED = [
    # path or None for a mark of sample 1, change, headers, status, what is named
    (None, {"mark": "ugly"}, {}, 400, "mark"),
    (None, {"marks": "good"}, {}, 400, "marks"),
    (None, {"edits": {"image": "../x.png"}}, {}, 400, "image"),
    (None, {"edits": {"question": ""}}, {}, 400, "question"),
    (None, {"edits": {"question": 3}}, {}, 400, "question"),
    (None, b"{", {}, 400, "JSON"),
    (None, b'{"note": "\\ud800"}', {}, 400, "JSON"),
    (None, {"note": "x" * app.MAX_BODY_BYTES}, {}, 413, "MiB"),
    (None, {"mark": "good"}, {"content-type": "text/plain"}, 415, "JSON"),
    (None, {"mark": "good"}, {"content-type": "application/x-www-form-urlencoded"}, 415, "JSON"),
    (None, {"mark": "good"}, {"host": "evil.example"}, 400, "host"),
    (f"/marks/1/{'0' * 32}", {"mark": "good"}, {}, 409, "changed"),
    (f"/marks/99/{'0' * 32}", {"mark": "good"}, {}, 409, "changed"),
    ("/marks/x/y", {"mark": "good"}, {}, 404, ""),
]


@pytest.mark.parametrize(("path", "change", "headers", "status", "named"), REFUSED)
def test_what_is_wrong_is_refused_and_nothing_is_kept(client, world, path, change, headers, status, named):
    content = change if isinstance(change, bytes) else json.dumps(change).encode()
    headers = {"content-type": "application/json"} | headers
    response = client.post(path or f"/marks/{place(world, 1)}", content=content, headers=headers)
    assert (response.status_code, named in response.text) == (status, True)
    assert world.marks.read_bytes() == b""
    assert send(client, world, 1, mark="good").status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/app.py", 404),
        ("/../judged.json", 404),
        ("/%2e%2e%2fjudged.json", 404),
        ("/image/1/../../judged.json", 404),
        ("/?after=x", 400),
        ("/?least=x", 400),
        ("/?least=1.5", 400),
        (f"/?most={2**63}", 400),
        (f"/image/{10**30}/x", 409),
        (f"/image/1/{'0' * 32}", 409),
        ("/?mark=nonsense&source=nothing", 200),
        ("/?after=10000000000000000000", 400),
    ],
)
def test_odd_addresses(client, path, status):
    response = client.get(path)
    assert response.status_code == status
    assert "correct_answer" not in response.text


def test_images_are_those_of_the_folder_alone(tmp_path, world):
    (tmp_path / "secret.png").write_bytes(png((1, 2, 3)))
    (tmp_path / "images" / "broken.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "images" / "large.png").write_bytes(png((200, 2, 3), (3000, 30)))
    names = ["1.png", "large.png", "../secret.png", str(tmp_path / "secret.png"), "broken.png", "none.png", "a\0b"]
    file = write_json_rows(tmp_path / "a.json", [llava_row(name, "Q?", name) for name in names])
    world.files, world.rows, world.judged = [file], [json.loads(file.read_text())[n] for n in range(len(names))], []
    client, sizes = TestClient(make_app(world.review()), base_url=HOST), []
    for number in range(1, len(names) + 1):
        response = client.get(f"/image/{place(world, number)}")
        if response.status_code == 200:
            assert response.headers["content-type"] == "image/jpeg"
            assert response.headers["x-content-type-options"] == "nosniff"
            sizes.append(Image.open(io.BytesIO(response.content)).size)
        assert response.status_code == (200 if number < 3 else 404)
    assert sizes == [(6, 4), (app.IMAGE_SIDE, 10)]


def test_a_key_is_asked_for(review):
    client = TestClient(make_app(review, "gehéim:x"), base_url="http://far.example")
    for path in ("/", "/review.js", "/marks.jsonl", "/agreement", "/nothing"):
        response = client.get(path)
        assert (response.status_code, response.headers["www-authenticate"][:5]) == (401, "Basic")
    word = base64.b64encode("ana:gehéim:x".encode()).decode()
    other = base64.b64encode(b"ana:other").decode()
    for shown, status in ((f"Basic {word}", 200), (f"Basic {other}", 401), ("Basic @", 401), ("Digest gehéim:x", 401)):
        assert client.get("/", headers={"authorization": shown.encode()}).status_code == status


def test_rows_that_cannot_be_used_are_shown_and_can_be_mended(tmp_path, world):
    rows = [llava_row("0.png", "Q?", ""), {"id": 1, "image": "0.png", "conversations": "none"}, llava_row("0.png")]
    world.files, world.rows, world.judged = [write_json_rows(tmp_path / "a.json", rows)], rows, []
    client = TestClient(make_app(world.review()), base_url=HOST)
    page = client.get("/", params={"mark": "unusable"}).text
    assert list(articles(page)) == [1, 2]
    assert page.count("This row cannot be used: ") == 2
    mended = send(client, world, 1, edits={"conversations/1/value": "now"})
    assert (mended.status_code, "cannot be used" in mended.text) == (200, False)
    assert send(client, world, 3, edits={"conversations/1/value": " "}).status_code == 400


def test_images_within_the_file(tmp_path, world):
    """Parquet in several row groups: each sample has its own image, and edits are checked with it."""
    rows = [
        {
            "image": {"bytes": png((9 * number, 0, 0)), "path": ""},
            "question": f"{number}?",
            "chosen": "c",
            "rejected": "r",
        }
        for number in range(7)
    ]
    world.files = [write_parquet(tmp_path / "a.parquet", rows, row_group_size=3)]
    world.rows, world.judged = rows, []
    client = TestClient(make_app(world.review()), base_url=HOST)
    for number in range(1, 8):
        red = Image.open(io.BytesIO(client.get(f"/image/{place(world, number)}").content)).getpixel((2, 2))[0]
        assert abs(red - 9 * (number - 1)) < 5
    assert send(client, world, 5, edits={"rejected": "worse"}).status_code == 200
    assert send(client, world, 5, edits={"rejected": "c"}).status_code == 400
    assert "chosen and rejected" in client.get("/").text


def test_an_index_is_used_again_until_a_file_changes(tmp_path, world, monkeypatch):
    store, counts = tmp_path / "store", []
    entries = [(file, tmp_path / "images") for file in world.files]

    def find(count: int) -> list:
        found = Index(entries, store, counts.append)
        assert (found.total, found.choices["source"]) == (count, {"judged.json": 12, "llava.json": count - 12})
        return found.page(Filters(), 100)

    samples = find(27)
    monkeypatch.setattr(index, "read_row", None)  # which would fail
    assert find(27) == samples
    store.write_bytes(store.read_bytes()[:5000])
    with pytest.raises(TypeError):
        find(27)
    monkeypatch.undo()
    assert find(27) == samples
    write_json_rows(world.files[1], world.rows[:9])
    assert find(21) == samples[:21]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "judged.json", "llava.json", "store"]


def test_files_of_one_name_are_told_apart(tmp_path):
    files = [write_json_rows(tmp_path / name / "a.json", [judged_row(number)]) for number, name in enumerate("xy")]
    assert list(Index([(file, None) for file in files]).choices["source"]) == [str(file) for file in files]


# (both good, first good, second good, both bad) and Cohen's kappa, as published: Wikipedia's "Cohen's kappa", 2024.
KAPPAS = [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 0.1304), ((25, 35, 5, 35), 0.2593)]
KAPPAS += [((7, 0, 0, 7), 1.0), ((0, 5, 5, 0), -1.0), ((9, 0, 0, 0), None), ((0, 0, 0, 0), None)]


@pytest.mark.parametrize(("counts", "kappa"), KAPPAS)
def test_kappa(counts, kappa):
    found = Agreement(("a", "b"), *counts).kappa
    assert found == (kappa if kappa is None else pytest.approx(kappa, abs=5e-5))


def test_agreement_counts_rows_that_both_mark(client, world):
    other = TestClient(make_app(world.review("ben")), base_url=HOST)
    assert "two reviewers" in client.get("/agreement").text
    marks = [
        ("good", "good"),
        ("good", "bad"),
        ("good", ""),
        ("", "bad"),
        ("bad", "bad"),
        ("bad", "bad"),
        ("bad", "good"),
    ]
    for number, pair in enumerate(marks, 1):
        for one, mark in zip((client, other), pair, strict=True):
            assert send(one, world, number, mark=mark).status_code == 200
    page = html.unescape(client.get("/agreement").text)
    assert re.findall(r"<td>(\d)</td>", page) == ["1", "1", "1", "2"]
    assert "kappa 0.167, from 5 samples" in page

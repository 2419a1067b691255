"""Pages of samples: from a tree's limbs every conversation is found again, and a page says what the tree teaches."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reverie_jax.cli.data_options import Show

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import write_records
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.data.visualize import Span, TreeNode, tree_nodes, write
from reverie_jax.errors import UserError
from reverie_jax.scenes.dataset import ANNOTATIONS, IMAGES, make_training_set
from reverie_jax.scenes.dataset import read_records as scene_records
from tests.data.fakes import IMAGE_ID, WordTokenizer, png, records, talk

PATCHES, SIDE = 4, 8


class Speaking(WordTokenizer):
    """The word tokenizer with what a page asks of one: pieces that hold their own white space."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[id] for id in ids]

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        return "".join(pieces)


class Numbered:
    """Token n is `tn`, in the manner of a byte-level tokenizer or of SentencePiece, which drops white space in front."""

    def __init__(self, mark: str = "Ġ"):
        self.mark = mark

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"{self.mark}t{id}" for id in ids]

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        text = "".join(pieces).replace(self.mark, " ")
        return text.removeprefix(" ") if self.mark == "▁" else text


# Limbs.

WEIGHTS = (0.0, 0.0, 0.5, 1.0, 3.0)  # exact in float32, so sums are too
Place = tuple[int, int]


def tokens_of(places: Sequence[Place], weights: Sequence[float]) -> Tokens:
    ids, features = zip(*places, strict=True)
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(features, np.int32))


def plain(ids: Sequence[int], weights: Sequence[float] | None = None) -> Tokens:
    return tokens_of([(id, -1) for id in ids], weights or [0.0] * len(ids))


@st.composite
def many(draw: st.DrawFn) -> list[Tokens]:
    """Conversations of a few shared segments, pictures among them; text may have the placeholder's own id."""
    place = st.tuples(st.integers(1, 3), st.sampled_from((-1, -1, -1, 0, 1, 5)))
    segments = draw(st.lists(st.lists(place, min_size=1, max_size=4), min_size=1, max_size=4))
    found = []
    for plan in draw(st.lists(st.lists(st.integers(0, len(segments) - 1), min_size=1, max_size=4), max_size=7)):
        places = [one for number in plan for one in segments[number]]
        weights = [0.0] + [draw(st.sampled_from(WEIGHTS)) if feature < 0 else 0.0 for _, feature in places[1:]]
        found.append(tokens_of(places, weights))
    return found


def key(talk: Tokens, length: int) -> tuple[Place, ...]:
    return tuple(zip(talk.ids[:length].tolist(), talk.image_slots[:length].tolist(), strict=True))


def paths(grown: Sequence[TreeNode]) -> list[list[Span]]:
    """The spans from a root to each limb's end without another, in the order of the page."""
    return [[*limb.spans, *rest] for limb in grown for rest in (paths(limb.tree_nodes) if limb.tree_nodes else [[]])]


def letters(spans: Sequence[Span]) -> list[tuple[bool, float]]:
    """(picture, weight) of each token."""
    return [(span.picture, span.weight) for span in spans for _ in range(span.tokens)]


def check_limbs(talks: Sequence[Tokens], tokenizer: Numbered) -> list[TreeNode]:
    grown = tree_nodes(build_tree(talks), tokenizer)
    whole = {key(talk, len(talk)) for talk in talks}
    longest = {one for one in whole if not any(o[: len(one)] == one and o != one for o in whole)}
    found = paths(grown)
    assert len(found) == len(longest)
    told = {}
    for spans in found:
        told[tuple(letters(spans)), "".join(span.text for span in spans if not span.picture)] = spans
    for one in longest:
        wanted = []
        for place in range(len(one)):
            shared = [talk for talk in talks if key(talk, place + 1) == one[: place + 1]]
            wanted.append((one[place][1] >= 0, sum(float(talk.weights[place]) for talk in shared)))
        text = "".join(f" t{id}" for id, feature in one if feature < 0)
        assert (tuple(wanted), text) in told
    for limb in every(grown):
        assert limb.spans
        assert len(limb.tree_nodes) != 1  # an only child belongs to its parent
        assert all(span.tokens > 0 for span in limb.spans)
        assert all(
            (one.picture, one.weight) != (two.picture, two.weight) for one, two in itertools.pairwise(limb.spans)
        )
    return grown


def every(grown: Sequence[TreeNode]) -> list[TreeNode]:
    return [one for limb in grown for one in (limb, *every(limb.tree_nodes))]


@settings(max_examples=150)
@given(many(), st.sampled_from("Ġ▁"))
@example([plain([1, 2], [0, 1]), plain([1, 2, 3], [0, 1, 1])], "Ġ")  # one goes on where another ends
@example([tokens_of([(1, -1), (3, 0), (3, 1)], [0] * 3), tokens_of([(1, -1), (3, -1)], [0, 1])], "Ġ")
@example([], "▁")
def test_every_conversation_is_found_from_root_to_leaf(talks, mark):
    check_limbs(talks, Numbered(mark))


def test_a_token_that_two_teach_is_one_span_of_their_weights():
    talks = [plain([1, 2, 3, 4], [0, 0, 1, 1]), plain([1, 2, 3, 5], [0, 0, 1, 0.5])]
    (root,) = check_limbs(talks, Numbered())
    assert [(span.text, span.weight) for span in root.spans] == [(" t1 t2", 0), (" t3", 2)]
    assert [[(s.text, s.weight) for s in limb.spans] for limb in root.tree_nodes] == [[(" t4", 1)], [(" t5", 0.5)]]


def test_the_last_branch_keeps_what_it_teaches():
    talks = [plain([1, 2], [0, 0]), plain([1, 3], [0, 0]), plain([1, 4, 2], [0, 1, 1])]
    (root,) = check_limbs(talks, Numbered())
    assert [limb.spans[0].weight for limb in root.tree_nodes] == [0, 0, 1]
    assert root.tree_nodes[-1].spans[0].tokens == 2


def test_the_same_word_taught_in_one_branch_stays_untaught_in_the_other():
    talks = [plain([1, 2, 9], [0, 0, 1]), plain([1, 3, 9], [0, 0, 0])]
    (root,) = check_limbs(talks, Numbered())
    assert [limb.spans[-1].weight for limb in root.tree_nodes] == [1, 0]
    assert [len(limb.spans) for limb in root.tree_nodes] == [2, 1]


def test_conversations_without_anything_in_common_are_roots_of_their_own():
    grown = check_limbs([plain([1, 2]), plain([3]), plain([4, 4, 4])], Numbered())
    assert [limb.spans[0].tokens for limb in grown] == [2, 1, 3]


def test_pictures_in_several_turns_are_spans_of_their_own():
    picture = [(7, n) for n in range(3)]
    one = tokens_of([(1, -1), *picture, (2, -1), *picture, (3, -1)], [0] * 8 + [1])
    (root,) = check_limbs([one], Numbered())
    assert [(span.picture, span.tokens) for span in root.spans] == [
        (False, 1),
        (True, 3),
        (False, 1),
        (True, 3),
        (False, 1),
    ]


def test_pictures_side_by_side_are_two():
    one = tokens_of([(1, -1), *[(7, n) for n in range(6)], (2, -1)], [0] * 7 + [1])  # two of three features
    (root,) = tree_nodes(build_tree([one]), Numbered(), patches=3)
    assert sum(span.picture for span in root.spans) == 2


def test_a_long_run_is_one_limb():
    talks = [plain(list(range(1, 1000))), plain([*range(1, 999), 5])]
    (root,) = check_limbs(talks, Numbered())
    assert root.spans[0].tokens == 998


# Pages.


def processor() -> Processor:
    return Processor(Encoder(Speaking(), "llava-hf", PATCHES, IMAGE_ID), SIDE)


class Page(html.parser.HTMLParser):
    """What a browser finds in a page: its records, their text and what of it is marked."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.captions: list[str] = []
        self.texts: list[str] = []
        self.marked: list[list[tuple[str, str, str]]] = []
        self.images: list[str] = []
        self.pictures: list[list[str]] = []
        self.leaves: list[int] = []
        self.title = self.heading = self.legend = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        assert not any(name.startswith("on") for name in values)
        if tag == "article":
            self.captions.append("")
            self.texts.append("")
            self.marked.append([])
            self.pictures.append([])
            self.leaves.append(0)
        if tag == "img":
            self.images.append(values["src"])
        if tag == "mark" and "article" in self.open:
            self.marked[-1].append(("", values.get("class", ""), values["title"]))
        if tag == "span" and values.get("class") == "picture" and "article" in self.open:
            self.pictures[-1].append("")
            self.open.append("picture")
            return
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "li":
            self.was_leaf = True

    def handle_endtag(self, tag: str) -> None:
        last = self.open.pop()
        assert last == tag or (last, tag) == ("picture", "span")
        if tag == "li":
            self.leaves[-1] += self.was_leaf
            self.was_leaf = False

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where == "title":
            self.title += data
        elif where == "h1":
            self.heading += data
        elif "figcaption" in self.open:
            self.captions[-1] += data
        elif where == "picture":
            self.pictures[-1][-1] += data
        elif where == "mark" and "article" in self.open:
            text, kind, title = self.marked[-1][-1]
            self.marked[-1][-1] = (text + data, kind, title)
            self.texts[-1] += data
        elif "li" in self.open and where == "span":
            self.texts[-1] += data
        elif "p" in self.open:
            self.legend += data


def page_of(
    path: Path, found: Sequence[ImageRecord], supervision: Supervision | None = None, title: str = "Samples"
) -> Page:
    assert write(path / "page.html", found, processor(), supervision or Supervision(), title) == len(found)
    return Page(path / "page.html")


def test_a_page_shows_each_record_with_its_numbers(tmp_path):
    found = records(3)
    page = page_of(tmp_path, found)
    assert len(page.captions) == len(page.images) == 3
    for record, caption in zip(found, page.captions, strict=True):
        tokens = processor().tokenize(record.id, Supervision()(record.conversations))
        tree = build_tree(tokens)
        numbers = [int(one.replace(",", "")) for one in re.findall(r"[\d,]*\d", caption.removeprefix(record.id))]
        assert caption.startswith(record.id)
        assert numbers == [len(tokens), len(tree), sum(map(len, tokens)), len(tree.parent)]


def test_a_page_marks_what_is_taught_and_nothing_else(tmp_path):
    for supervision in (Supervision(), Supervision(answers="as-published"), Supervision(kinds="responses")):
        record = records(1)[0]
        page = page_of(tmp_path, [record], supervision)
        said = processor()
        tree = build_tree(said.tokens(record.id, supervision(record.conversations)))
        marked = "".join(text for text, *_ in page.marked[0])
        assert marked == "".join(said.encoder.tokenizer.words[int(target)] for target in tree.target)
        assert sum(int(title.split()[0]) for *_, title in page.marked[0]) == len(tree.parent)
        taught = sum(int(title.split()[0]) * float(title.rsplit(" ", 1)[1]) for *_, title in page.marked[0])
        assert taught == tree.weight.sum()


def test_answers_that_are_taught_twice_are_darker(tmp_path):
    twice = [talk("Red?", "No it is.", ("Why?", "One.")), talk("Red?", "No it is.", ("Why?", "Two."))]
    page = page_of(tmp_path, [ImageRecord("a", png(), tuple(twice))], Supervision(answers="as-published"))
    kinds = {text.strip(): kind for text, kind, _ in page.marked[0]}
    assert kinds == {"No it is.</s>": "more", "One.</s>": "", "Two.</s>": ""}


@pytest.mark.parametrize("weight", [2.0, 0.5])
def test_darker_are_those_that_several_conversations_teach(tmp_path, weight):
    one = [talk("Red?", "No.", weight=weight)]
    two = [talk("Red?", "No.", ("Why?", f"{n}."), weight=weight) for n in range(2)]
    taught = [
        page_of(tmp_path, [ImageRecord("a", png(), tuple(talks))], Supervision(answers="as-published")).marked[0][0]
        for talks in (one, two)
    ]
    assert [kind for _, kind, _ in taught] == ["", "more"]


HOSTILE = "<script>alert(\"x\")</script>&amp;<b onclick='y'>"


def test_words_of_the_data_are_no_html(tmp_path):
    record = ImageRecord(f"r{HOSTILE}", png(), (talk(HOSTILE, HOSTILE), talk("b", f"</li></ul>{HOSTILE}")))
    page = page_of(tmp_path, [record], title=f"Samples of {HOSTILE}")
    assert not {"script", "b"} & set(page.tags)
    assert page.title == page.heading == f"Samples of {HOSTILE}"
    assert page.captions[0].startswith(record.id)
    assert page.texts[0].count(HOSTILE) == 3
    assert f" {HOSTILE}</s>" in [text for text, *_ in page.marked[0]]
    assert "<script" not in page.source


def test_talk_without_a_picture_has_no_picture(tmp_path):
    said = Conversation((Turn("user", "What is red?"), Turn("assistant", "A colour.")), ())
    page = page_of(tmp_path, [ImageRecord("rows.json: row 3", b"", (said,)), *records(1)])
    assert len(page.captions) == 2
    assert len(page.images) == 1
    assert page.pictures[0] == []
    assert page.captions[0].split()[:5] == ["rows.json:", "row", "31", "conversation,", "9"]
    assert page.marked[0] == [(" A colour.</s>", "", page.marked[0][0][2])]
    assert len(page.pictures[1]) == 1


def test_several_pictures_of_a_talk_are_there_as_often(tmp_path):
    turns = (
        Turn("user", f"{IMAGE}\nRed?"),
        Turn("assistant", "No."),
        Turn("user", f"And {IMAGE} this?"),
        Turn("assistant", "No."),
    )
    page = page_of(tmp_path, [ImageRecord("a", png(), (Conversation(turns, (0, 0)),))])
    assert page.pictures[0] == [f"picture, {PATCHES} tokens"] * 2


def test_a_record_that_teaches_nothing_has_its_place(tmp_path):
    page = page_of(tmp_path, [ImageRecord("silent", png(), (talk("a", "b", weight=0.0),)), *records(1)])
    assert page.captions[0].split()[:3] == ["silent0", "conversations,", "0"]
    assert page.texts[0].strip() == ""
    assert len(page.captions) == 2


def test_a_page_of_no_records_says_so(tmp_path):
    page = page_of(tmp_path, [])
    assert page.captions == []
    assert "No records" in page.legend


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    page = page_of(tmp_path, records(2))
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.images)
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert "http" not in page.source
    assert "url(" not in page.source


# Scenes, through the command.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_training_set(folder, 6, size=48, questions=2, seed=0)
    return folder


def shown(folder: Path, **options: object) -> Page:
    command = dataclasses.replace(Show((str(folder / ANNOTATIONS),), out=folder / "page.html"), **options)
    command.run()
    return Page(command.out)


def test_scenes_are_shown(scenes, capsys):
    page = shown(scenes, count=4)
    assert capsys.readouterr().out == f"4 records: {scenes / 'page.html'}\n"
    assert page.title == f"Samples of {ANNOTATIONS}"
    with scene_records(scenes) as known:
        by_id = {record.id: record for record in known}
    assert len(page.captions) == len(page.images) == 4
    for caption, text, marked, pictures in zip(page.captions, page.texts, page.marked, page.pictures, strict=True):
        (record,) = [one for id, one in by_id.items() if caption.startswith(id)]
        assert f"{len(record.conversations)} conversations" in caption
        assert pictures == ["picture, 64 tokens"]
        taught = [span for span, *_ in marked]
        for said in record.conversations:
            assert any(span.startswith(f" {said.turns[1].text}</s>") for span in taught)
            assert any(span.endswith(f"{said.turns[3].text[-12:]}</s>") for span in taught)
            assert said.turns[0].text.split()[-2] in text
    assert not any("\ufffd" in text for text in page.texts)


def test_the_seed_draws_the_records(scenes):
    def ids(page: Page) -> list[str]:
        return [caption.split(".png")[0] for caption in page.captions]

    one, again, other = (ids(shown(scenes, count=3, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert len(set(one)) == 3
    assert one != other
    assert sorted(ids(shown(scenes, count=100))) == [f"{n:06d}" for n in range(6)]


def test_records_and_their_annotation_file_have_the_same_page(scenes, tmp_path):
    with scene_records(scenes) as known:
        folder = write_records(tmp_path / "built", {"train": known})
    Show((str(folder),), out=tmp_path / "page.html", count=9).run()
    page, other = Page(tmp_path / "page.html"), shown(scenes, count=9)
    assert page.captions == other.captions
    assert page.texts == other.texts
    assert page.images == other.images


def test_an_arm_is_shown_as_it_teaches(scenes):
    page = shown(scenes, count=2, teach=("kinds=responses",))
    assert "responses" in page.legend
    assert not any("Explain why" in text for text in page.texts)
    assert all(marked for marked in page.marked)


@pytest.mark.parametrize("setting", ["kinds=none", "kinds", "answer_weight=much"])
def test_a_setting_that_is_none_is_one_line(scenes, setting):
    with pytest.raises(UserError) as error:
        shown(scenes, teach=(setting,))
    assert "--supervision" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["kind=responses", "Kinds=responses", "=responses"])
def test_a_setting_of_no_arm_is_refused(scenes, setting):
    with pytest.raises(UserError):
        shown(scenes, teach=(setting,))


def test_a_negative_count_is_one_line(scenes):
    with pytest.raises(UserError):
        shown(scenes, count=-1)


def test_no_source_is_one_line(tmp_path):
    with pytest.raises(UserError):
        Show((), out=tmp_path / "page.html").run()


def test_a_broken_picture_is_one_line(tmp_path):
    make_training_set(tmp_path, 2, size=48, questions=1, seed=0)
    (tmp_path / IMAGES / "000001.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        shown(tmp_path, count=9)
    assert "000001.png" in str(error.value)
    assert "\n" not in str(error.value)


LETTERS = "letters that begin with the same byte part within themselves, and neither half can be read"


@pytest.mark.parametrize("words", [("é", "è"), ("猫", "犬"), ("😀", "😁")])
def test_letters_of_several_bytes_stay_whole(tmp_path, words):
    from reverie_jax.loading import load_processor

    record = ImageRecord("a", png(), tuple(talk("Was?", word) for word in words))
    write(tmp_path / "page.html", [record], load_processor("scenes-base"), Supervision(), "Samples")
    assert "\ufffd" not in Page(tmp_path / "page.html").texts[0]


def test_words_behind_a_broken_letter_stay_readable(tmp_path):
    from reverie_jax.loading import load_processor

    record = ImageRecord("a", png(), tuple(talk("Was?", f"{letter} is a red boat on the left.") for letter in "éè"))
    write(tmp_path / "page.html", [record], load_processor("scenes-base"), Supervision(), "Samples")
    assert Page(tmp_path / "page.html").texts[0].count(" is a red boat on the left.") == 2

"""HTML pages of samples: every conversation is found again in the tree, and the supervised tokens are marked."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reverie_jax import loading
from reverie_jax.cli.data import Visualize
from reverie_jax.data.conversation import IMAGE, ImageRecord
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import write_records
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.data.visualize import Span, TreeNode, tree_nodes, write_page
from reverie_jax.errors import UserError
from reverie_jax.scenes.dataset import ANNOTATIONS, IMAGES, make_training_set
from reverie_jax.scenes.dataset import read_records as scene_records
from tests.data.fakes import (
    IMAGE_ID,
    Node,
    WordTokenizer,
    assert_one_line,
    conversation_of,
    png,
    records,
    talk,
    text_tokens,
    token_lists,
    tokens_of,
)

PATCHES, SIDE = 4, 8
AS_PUBLISHED = Supervision(answers="as-published")


class PieceTokenizer(WordTokenizer):
    """The word tokenizer, with pieces that hold their own white space."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.words[id] for id in ids]

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        return "".join(pieces)


class NumberTokenizer:
    """Token n is `tn`, as in a byte-level tokenizer, or in SentencePiece, which drops a leading space."""

    def __init__(self, mark: str = "Ġ"):
        self.mark = mark

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"{self.mark}t{id}" for id in ids]

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        text = "".join(pieces).replace(self.mark, " ")
        return text.removeprefix(" ") if self.mark == "▁" else text


# Nodes.


def prefix(tokens: Tokens, length: int) -> tuple[Node, ...]:
    return tuple(zip(tokens.ids[:length].tolist(), tokens.image_slots[:length].tolist(), strict=True))


def paths(nodes: Sequence[TreeNode]) -> list[list[Span]]:
    """The spans from a root to each leaf, in the order of the page."""
    return [[*node.spans, *rest] for node in nodes for rest in (paths(node.children) if node.children else [[]])]


def every(nodes: Sequence[TreeNode]) -> list[TreeNode]:
    return [one for node in nodes for one in (node, *every(node.children))]


@settings(max_examples=50)
@given(token_lists(), st.sampled_from("Ġ▁"))
@example([text_tokens([1, 2], [1]), text_tokens([1, 2, 3], [1, 1])], "Ġ")  # one continues another
@example([tokens_of([(1, -1), (3, 0), (3, 1)], [0] * 3), tokens_of([(1, -1), (3, -1)], [0, 1])], "Ġ")
@example([text_tokens([1, 2]), text_tokens([3]), text_tokens([4, 4, 4])], "Ġ")  # nothing in common
@example([text_tokens([1, 2, 9], [1]), text_tokens([1, 3, 9])], "Ġ")  # the same word in both
@example([text_tokens(list(range(1, 1000))), text_tokens([*range(1, 999), 5])], "Ġ")
@example([], "▁")
def test_every_conversation_is_found_from_root_to_leaf(conversations, mark):
    nodes = tree_nodes(build_tree(conversations), NumberTokenizer(mark))
    complete = {prefix(tokens, len(tokens)) for tokens in conversations}
    leaves = {one for one in complete if not any(other[: len(one)] == one and other != one for other in complete)}
    found = {
        (
            tuple((span.is_image, span.weight) for span in spans for _ in range(span.tokens)),
            "".join(span.text for span in spans if not span.is_image),
        )
        for spans in paths(nodes)
    }
    assert len(paths(nodes)) == len(leaves)
    for leaf in leaves:
        expected = []
        for index in range(len(leaf)):
            shared = [tokens for tokens in conversations if prefix(tokens, index + 1) == leaf[: index + 1]]
            expected.append((leaf[index][1] >= 0, sum(float(tokens.weights[index]) for tokens in shared)))
        assert (tuple(expected), "".join(f" t{id}" for id, slot in leaf if slot < 0)) in found
    for node in every(nodes):
        assert node.spans
        assert len(node.children) != 1  # an only child belongs to its parent
        assert all(span.tokens > 0 for span in node.spans)
        pairs = itertools.pairwise(node.spans)
        assert all((one.is_image, one.weight) != (other.is_image, other.weight) for one, other in pairs)


def test_images_side_by_side_are_spans_of_their_own():
    tokens = tokens_of([(1, -1), *[(7, n) for n in range(6)], (2, -1)], [0] * 7 + [1])
    (root,) = tree_nodes(build_tree([tokens]), NumberTokenizer(), patches=3)
    assert [(span.is_image, span.tokens) for span in root.spans] == [(False, 1), (True, 3), (True, 3), (False, 1)]


# Pages.


def processor() -> Processor:
    return Processor(Encoder(PieceTokenizer(), "llava-hf", PATCHES, IMAGE_ID), SIDE)


def plain(source: str) -> str:
    return html.unescape(re.sub("<[^>]*>", "", source))


class Page:
    """What a browser shows of a page: the records, their texts and what is marked."""

    def __init__(self, path: Path):
        self.source = path.read_text("utf-8")
        self.tags = re.findall(r"<(\w+)", self.source)
        self.title, self.heading, self.legend = (
            plain(text)
            for tag in ("title", "h1", 'p class="legend"')
            for text in re.findall(f"<{tag}>(.*?)</{tag.split()[0]}>", self.source, re.DOTALL)
        )
        self.images = re.findall('<img src="(.*?)"', self.source)
        self.captions, self.texts, self.marked, self.image_spans = [], [], [], []
        for article in re.findall("<article>(.*?)</article>", self.source, re.DOTALL):
            caption, tree = article.split("</figcaption>")
            self.captions.append(plain(caption).strip())
            self.image_spans.append(re.findall('<span class="image">(.*?)</span>', tree))
            texts = re.sub('<span class="image">.*?</span>', "", tree)
            texts = re.findall('<span class="text">(.*?)</span>', texts, re.DOTALL)
            self.texts.append("".join(map(plain, texts)))
            marks = re.findall('<mark(?: class="(.*?)")? title="(.*?)">(.*?)</mark>', tree, re.DOTALL)
            self.marked.append([(html.unescape(text), kind, title) for kind, title, text in marks])


def page_of(
    folder: Path, shown: Sequence[ImageRecord], supervision: Supervision = AS_PUBLISHED, title: str = "Samples"
) -> Page:
    assert write_page(folder / "page.html", shown, processor(), supervision, title) == len(shown)
    return Page(folder / "page.html")


@pytest.mark.parametrize("supervision", [Supervision(), AS_PUBLISHED, Supervision(kinds="responses")], ids=repr)
def test_a_page_shows_each_record_with_its_numbers_and_marks_what_is_supervised(tmp_path, supervision):
    shown, tokenize = records(2), processor()
    page = page_of(tmp_path, shown, supervision)
    assert len(page.captions) == len(page.images) == 2
    for record, caption, marked in zip(shown, page.captions, page.marked, strict=True):
        tokens = tokenize.tokenize(record.id, supervision(record.conversations))
        tree, words = build_tree(tokens), tokenize.encoder.tokenizer.words
        numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", caption.removeprefix(record.id))]
        assert caption.startswith(record.id)
        assert numbers == [len(tokens), len(tree), sum(map(len, tokens)), len(tree.parent)]
        assert "".join(text for text, *_ in marked) == "".join(words[int(target)] for target in tree.target)
        titles = [title for *_, title in marked]
        assert sum(int(title.split()[0]) for title in titles) == len(tree.parent)
        assert sum(int(title.split()[0]) * float(title.rsplit(" ", 1)[1]) for title in titles) == tree.weight.sum()
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.images)
    assert not {"link", "script", "iframe"} & set(page.tags)  # the page needs no other file
    assert "http" not in page.source
    assert "url(" not in page.source


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_tokens_that_several_conversations_supervise_are_darker(tmp_path, weight):
    one = [talk("Red?", "No it is.", weight=weight)]
    two = [talk("Red?", "No it is.", ("Why?", f"{number}."), weight=weight) for number in ("One", "Two")]
    pages = [page_of(tmp_path, [ImageRecord("a", png(), tuple(conversations))]) for conversations in (one, two)]
    found = [{text.strip(): kind for text, kind, _ in page.marked[0]} for page in pages]
    assert found == [{"No it is.</s>": ""}, {"No it is.</s>": "more", "One.</s>": "", "Two.</s>": ""}]


HOSTILE = "<script>alert(\"x\")</script>&amp;<b onclick='y'>"


def test_texts_are_escaped(tmp_path):
    record = ImageRecord(f"r{HOSTILE}", png(), (talk(HOSTILE, HOSTILE), talk("b", f"</li></ul>{HOSTILE}")))
    page = page_of(tmp_path, [record], title=f"Samples of {HOSTILE}")
    assert not {"script", "b"} & set(page.tags)
    assert page.title == page.heading == f"Samples of {HOSTILE}"
    assert page.captions[0].startswith(record.id)
    assert page.texts[0].count(HOSTILE) == 3
    assert f" {HOSTILE}</s>" in [text for text, *_ in page.marked[0]]
    assert "<script" not in page.source


def test_records_without_one_image(tmp_path):
    shown = [
        ImageRecord("rows.json: row 3", b"", (conversation_of(["What is red?", "A color."]),)),
        ImageRecord("both", png(), (conversation_of([f"{IMAGE}\nRed?", "No."] * 2),)),
        ImageRecord("silent", png(), (talk("a", "b", weight=0.0),)),
    ]
    page = page_of(tmp_path, shown)
    assert len(page.images) == 2
    assert [len(spans) for spans in page.image_spans] == [0, 2, 0]
    assert all(f"{PATCHES} tokens" in span for span in page.image_spans[1])
    assert page.captions[0].split()[:5] == ["rows.json:", "row", "31", "conversation,", "9"]
    assert [text for text, *_ in page.marked[0]] == [" A color.</s>"]
    assert page.captions[2].split()[:3] == ["silent0", "conversations,", "0"]
    assert page.texts[2].strip() == ""
    assert page_of(tmp_path, []).captions == []


@pytest.fixture(scope="module")
def scenes_processor() -> Processor:
    return loading.load_processor("scenes-base")


@pytest.mark.parametrize("letters", ["éè", "😀😁"])
def test_characters_of_several_bytes_stay_readable(tmp_path, scenes_processor, letters):
    """Letters that begin with the same byte branch within themselves: neither part can be decoded."""
    conversations = tuple(talk("Was?", f"{letter} is a red boat on the left.") for letter in letters)
    write_page(tmp_path / "page.html", [ImageRecord("a", png(), conversations)], scenes_processor, Supervision(), "")
    (text,) = Page(tmp_path / "page.html").texts
    assert "\ufffd" not in text
    assert text.count(" is a red boat on the left.") == 2


# The command.


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_training_set(folder, 6, size=48, questions=2, seed=0)
    return folder


@pytest.fixture
def visualize(tmp_path, monkeypatch, scenes_processor):
    """Runs the command; returns its page."""
    monkeypatch.setattr(loading, "load_processor", lambda *arguments, **options: scenes_processor)

    def run(*sources: Path, **options: object) -> Page:
        out = tmp_path / "page.html"
        Visualize(sources=tuple(map(str, sources)), model="scenes-base", out=out, **options).run()
        return Page(out)

    return run


def test_annotations_and_their_records_have_the_same_page(scenes, visualize, tmp_path, capsys):
    page = visualize(scenes / ANNOTATIONS, count=9)
    assert capsys.readouterr().out.startswith("6 records: ")
    assert ANNOTATIONS in page.title
    assert len(page.captions) == len(page.images) == 6
    assert {len(spans) for spans in page.image_spans} == {1}
    with scene_records(scenes) as known:
        for record in known:
            (marked,) = (
                marked for caption, marked in zip(page.captions, page.marked, strict=True) if record.id in caption
            )
            for conversation in record.conversations:
                assert any(text.startswith(f" {conversation.turns[1].text}</s>") for text, *_ in marked)
        folder = write_records(tmp_path / "built", {"train": known})
    other = visualize(folder, count=9)
    assert (page.captions, page.texts, page.images) == (other.captions, other.texts, other.images)


def test_the_seed_draws_the_records(scenes, visualize):
    def ids(**options: object) -> list[str]:
        return [caption.split(".png")[0] for caption in visualize(scenes / ANNOTATIONS, **options).captions]

    one, again, other = (ids(count=3, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 3
    assert sorted(ids(count=100)) == [f"{n:06d}" for n in range(6)]


def test_the_supervision_is_an_option(scenes, visualize):
    page = visualize(scenes / ANNOTATIONS, count=2, supervision=(("kinds=responses",),))
    assert "responses" in page.legend
    assert not any("Explain why" in text for text in page.texts)
    assert all(page.marked)


BAD_SETTINGS = ["kinds=none", "kinds", "answer_weight=much", "kind=responses", "Kinds=responses", "=responses"]
BAD_OPTIONS = {setting: {"supervision": ((setting,),)} for setting in BAD_SETTINGS}
BAD_OPTIONS |= {"count": {"count": -1}, "no source": {}, "broken image": {"count": 9}}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_the_command_refuses(tmp_path, scenes, visualize, case):
    sources: tuple[Path, ...] = (scenes / ANNOTATIONS,)
    if case == "broken image":
        make_training_set(tmp_path, 2, size=48, questions=1, seed=0)
        (tmp_path / IMAGES / "000001.png").write_bytes(b"not an image")
        sources = (tmp_path / ANNOTATIONS,)
    with pytest.raises(UserError) as error:
        visualize(*(() if case == "no source" else sources), **BAD_OPTIONS[case])
    assert_one_line(error, *(["000001.png"] if case == "broken image" else []))
    assert ("--supervision" in str(error.value)) == (case in BAD_SETTINGS)

"""HTML pages of samples: every conversation is found again in the tree, and the supervised tokens are marked."""

from __future__ import annotations

import html.parser
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reverie_jax import loading
from reverie_jax.cli.data import Visualize
from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.processor import Processor
from reverie_jax.data.records import write_records
from reverie_jax.data.supervision import Supervision
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.data.visualize import Span, TreeNode, tree_nodes, write_page
from reverie_jax.errors import UserError
from reverie_jax.scenes.dataset import ANNOTATIONS, IMAGES, make_training_set
from reverie_jax.scenes.dataset import read_records as scene_records
from tests.data.fakes import IMAGE_ID, WordTokenizer, assert_one_line, png, records, talk

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

WEIGHTS = (0.0, 0.0, 0.5, 1.0, 3.0)  # sums are exact in float32
Token = tuple[int, int]  # id, image slot


def tokens_of(tokens: Sequence[Token], weights: Sequence[float]) -> Tokens:
    ids, slots = zip(*tokens, strict=True)
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(slots, np.int32))


def text_tokens(ids: Sequence[int], weights: Sequence[float] | None = None) -> Tokens:
    return tokens_of([(id, -1) for id in ids], weights or [0.0] * len(ids))


@st.composite
def conversations(draw: st.DrawFn) -> list[Tokens]:
    """Conversations of a few shared segments with images; text may have the placeholder's own id."""
    token = st.tuples(st.integers(1, 3), st.sampled_from((-1, -1, -1, 0, 1, 5)))
    segments = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=4))
    result = []
    for plan in draw(st.lists(st.lists(st.integers(0, len(segments) - 1), min_size=1, max_size=4), max_size=7)):
        tokens = [token for number in plan for token in segments[number]]
        weights = [0.0] + [draw(st.sampled_from(WEIGHTS)) if slot < 0 else 0.0 for _, slot in tokens[1:]]
        result.append(tokens_of(tokens, weights))
    return result


def prefix(tokens: Tokens, length: int) -> tuple[Token, ...]:
    return tuple(zip(tokens.ids[:length].tolist(), tokens.image_slots[:length].tolist(), strict=True))


def paths(nodes: Sequence[TreeNode]) -> list[list[Span]]:
    """The spans from a root to each leaf, in the order of the page."""
    return [[*node.spans, *rest] for node in nodes for rest in (paths(node.children) if node.children else [[]])]


def every(nodes: Sequence[TreeNode]) -> list[TreeNode]:
    return [one for node in nodes for one in (node, *every(node.children))]


def check_nodes(conversations: Sequence[Tokens], tokenizer: NumberTokenizer) -> list[TreeNode]:
    nodes = tree_nodes(build_tree(conversations), tokenizer)
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
    return nodes


@settings(max_examples=80)
@given(conversations(), st.sampled_from("Ġ▁"))
@example([text_tokens([1, 2], [0, 1]), text_tokens([1, 2, 3], [0, 1, 1])], "Ġ")  # one continues another
@example([tokens_of([(1, -1), (3, 0), (3, 1)], [0] * 3), tokens_of([(1, -1), (3, -1)], [0, 1])], "Ġ")
@example([text_tokens([1, 2]), text_tokens([3]), text_tokens([4, 4, 4])], "Ġ")  # nothing in common
@example([text_tokens(list(range(1, 1000))), text_tokens([*range(1, 999), 5])], "Ġ")
@example([], "▁")
def test_every_conversation_is_found_from_root_to_leaf(conversations, mark):
    check_nodes(conversations, NumberTokenizer(mark))


def test_weights_of_shared_tokens_and_of_branches():
    conversations = [text_tokens([1, 2, 3, 4], [0, 0, 1, 1]), text_tokens([1, 2, 3, 5], [0, 0, 1, 0.5])]
    (root,) = check_nodes(conversations, NumberTokenizer())
    assert [(span.text, span.weight) for span in root.spans] == [(" t1 t2", 0), (" t3", 2)]
    assert [[(s.text, s.weight) for s in node.spans] for node in root.children] == [[(" t4", 1)], [(" t5", 0.5)]]
    conversations = [text_tokens([1, 2, 9], [0, 0, 1]), text_tokens([1, 3, 9], [0, 0, 0])]  # the same word in both
    (root,) = check_nodes(conversations, NumberTokenizer())
    assert [node.spans[-1].weight for node in root.children] == [1, 0]


def test_images_are_spans_of_their_own():
    image = [(7, n) for n in range(3)]
    tokens = tokens_of([(1, -1), *image, (2, -1), *image, (3, -1)], [0] * 8 + [1])
    (root,) = check_nodes([tokens], NumberTokenizer())
    assert [(span.is_image, span.tokens) for span in root.spans] == [
        (False, 1), (True, 3), (False, 1), (True, 3), (False, 1)
    ]  # fmt: skip
    tokens = tokens_of([(1, -1), *[(7, n) for n in range(6)], (2, -1)], [0] * 7 + [1])  # two images side by side
    (root,) = tree_nodes(build_tree([tokens]), NumberTokenizer(), patches=3)
    assert sum(span.is_image for span in root.spans) == 2


# Pages.


def processor() -> Processor:
    return Processor(Encoder(PieceTokenizer(), "llava-hf", PATCHES, IMAGE_ID), SIDE)


class Page(html.parser.HTMLParser):
    """What a browser finds in a page: the records, their texts and what is marked."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.captions: list[str] = []
        self.texts: list[str] = []
        self.marked: list[list[tuple[str, str, str]]] = []
        self.images: list[str] = []
        self.image_spans: list[list[str]] = []
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
            self.image_spans.append([])
        if tag == "img":
            self.images.append(values["src"])
        if tag == "mark" and "article" in self.open:
            self.marked[-1].append(("", values.get("class", ""), values["title"]))
        if tag == "span" and values.get("class") == "image" and "article" in self.open:
            self.image_spans[-1].append("")
            self.open.append("image")
            return
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        last = self.open.pop()
        assert last == tag or (last, tag) == ("image", "span")

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where == "title":
            self.title += data
        elif where == "h1":
            self.heading += data
        elif "figcaption" in self.open:
            self.captions[-1] += data
        elif where == "image":
            self.image_spans[-1][-1] += data
        elif where == "mark" and "article" in self.open:
            text, kind, title = self.marked[-1][-1]
            self.marked[-1][-1] = (text + data, kind, title)
            self.texts[-1] += data
        elif "li" in self.open and where == "span":
            self.texts[-1] += data
        elif "p" in self.open:
            self.legend += data


def page_of(
    folder: Path, shown: Sequence[ImageRecord], supervision: Supervision = AS_PUBLISHED, title: str = "Samples"
) -> Page:
    assert write_page(folder / "page.html", shown, processor(), supervision, title) == len(shown)
    return Page(folder / "page.html")


def test_a_page_shows_each_record_with_its_numbers(tmp_path):
    shown = records(3)
    page = page_of(tmp_path, shown, Supervision())
    assert len(page.captions) == len(page.images) == 3
    for record, caption in zip(shown, page.captions, strict=True):
        tokens = processor().tokenize(record.id, Supervision()(record.conversations))
        tree = build_tree(tokens)
        numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", caption.removeprefix(record.id))]
        assert caption.startswith(record.id)
        assert numbers == [len(tokens), len(tree), sum(map(len, tokens)), len(tree.parent)]
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.images)
    assert not {"link", "script", "iframe"} & set(page.tags)  # the page needs no other file
    assert "http" not in page.source
    assert "url(" not in page.source


@pytest.mark.parametrize("supervision", [Supervision(), AS_PUBLISHED, Supervision(kinds="responses")], ids=repr)
def test_exactly_the_supervised_tokens_are_marked(tmp_path, supervision):
    (record,) = records(1)
    page, tokenize = page_of(tmp_path, [record], supervision), processor()
    tree = build_tree(tokenize.tokenize(record.id, supervision(record.conversations)))
    words = tokenize.encoder.tokenizer.words
    assert "".join(text for text, *_ in page.marked[0]) == "".join(words[int(target)] for target in tree.target)
    titles = [title for *_, title in page.marked[0]]
    assert sum(int(title.split()[0]) for title in titles) == len(tree.parent)
    assert sum(int(title.split()[0]) * float(title.rsplit(" ", 1)[1]) for title in titles) == tree.weight.sum()


@pytest.mark.parametrize("weight", [1.0, 2.0, 0.5])
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
    text = Conversation((Turn("user", "What is red?"), Turn("assistant", "A color.")), ())
    turns = [Turn("user", f"{IMAGE}\nRed?"), Turn("assistant", "No.")] * 2
    both = Conversation(tuple(turns), (0, 0))
    shown = [
        ImageRecord("rows.json: row 3", b"", (text,)),
        ImageRecord("both", png(), (both,)),
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


@pytest.mark.parametrize("letters", ["éè", "猫犬", "😀😁"])
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


def test_scenes_are_shown(scenes, visualize, capsys):
    page = visualize(scenes / ANNOTATIONS, count=4)
    assert capsys.readouterr().out.startswith("4 records: ")
    assert ANNOTATIONS in page.title
    with scene_records(scenes) as known:
        by_id = {record.id: record for record in known}
    assert len(page.captions) == len(page.images) == 4
    for caption, text, marked, spans in zip(page.captions, page.texts, page.marked, page.image_spans, strict=True):
        (record,) = [one for id, one in by_id.items() if caption.startswith(id)]
        assert f"{len(record.conversations)} conversations" in caption
        assert len(spans) == 1
        supervised = [span for span, *_ in marked]
        for conversation in record.conversations:
            assert any(span.startswith(f" {conversation.turns[1].text}</s>") for span in supervised)
            assert any(span.endswith(f"{conversation.turns[3].text[-12:]}</s>") for span in supervised)
            assert conversation.turns[0].text.split()[-2] in text


def test_the_seed_draws_the_records(scenes, visualize):
    def ids(**options: object) -> list[str]:
        return [caption.split(".png")[0] for caption in visualize(scenes / ANNOTATIONS, **options).captions]

    one, again, other = (ids(count=3, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert len(set(one)) == 3
    assert sorted(ids(count=100)) == [f"{n:06d}" for n in range(6)]


def test_records_have_the_page_of_their_annotation_file(scenes, visualize, tmp_path):
    with scene_records(scenes) as known:
        folder = write_records(tmp_path / "built", {"train": known})
    page, other = visualize(folder, count=9), visualize(scenes / ANNOTATIONS, count=9)
    assert (page.captions, page.texts, page.images) == (other.captions, other.texts, other.images)


def test_the_supervision_is_an_option(scenes, visualize):
    page = visualize(scenes / ANNOTATIONS, count=2, supervision=("kinds=responses",))
    assert "responses" in page.legend
    assert not any("Explain why" in text for text in page.texts)
    assert all(page.marked)


BAD_SETTINGS = ["kinds=none", "kinds", "answer_weight=much", "kind=responses", "Kinds=responses", "=responses"]
BAD_OPTIONS = {setting: {"supervision": (setting,)} for setting in BAD_SETTINGS}
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

"""One sample of each benchmark (`SAMPLES`), stand-ins for the tools that two of them load, and a check of any score."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import answer_files, find_benchmark
from reverie_jax.eval.benchmarks.amber import Amber
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError
from reverie_jax.eval.benchmarks.object_halbench import ObjectHalBench
from reverie_jax.eval.benchmarks.scoring import Scored
from reverie_jax.eval.statistics import resamples
from tests.eval.benchmarks import makers as make

# Stand-ins for the taggers, lemmas and vectors of NLTK and spaCy.

LEMMAS = {
    **{"dogs": "dog", "buses": "bus", "geese": "goose", "women": "woman", "children": "child", "glasses": "glass"},
    **{"skis": "ski", "lights": "light", "kittens": "kitten"},
}
_TAGS = {"a": "DT", "young": "JJ", "red": "JJ", "of": "IN", "and": "CC", "1": "CD", "[": "-LRB-", "]": "-RRB-"}


def lemma(word: str) -> str:
    """Replace WordNet, which keeps "men" and "people": they are words of their own there."""
    return LEMMAS.get(word, word)


def tagger(text: str) -> list[tuple[str, str]]:
    """Replace spaCy: unknown words are nouns."""
    words = [word.lower() for word in re.findall(r"\w+|\S", text)]
    return [(lemma(word), _TAGS.get(word, "NN")) for word in words]


SIMILAR = {("armrest", "door"): 0.9, ("window", "ground"): 0.81, ("tire", "bird"): 0.8, ("mirror", "bench"): 0.95}
"""Replaces spaCy's vectors; either way round."""


def nouns(text: str) -> list[str]:
    """Replace NLTK's tags and lemmas: all words, without plural."""
    return [word.removesuffix("s") if word != "grass" else word for word in re.findall(r"[A-Za-z]+", text)]


def similarity(one: str, other: str) -> float:
    return 1.0 if one == other else SIMILAR.get((one, other), SIMILAR.get((other, one), 0.1))


# One sample of each benchmark, for tests of what holds for all.

CARS = ("A red car", "A blue truck", "A green bus", "A dog")
COCO = {
    11: (["dog", "dog"], ["A woman walks.", "A dog on the grass."]),
    12: (["cat"], ["A kitten sleeps on a sofa.", "Two men watch."]),
    13: ([], ["A bus on a road."]),
    14: (["couch", "tv"], ["A television."]),
}
"""Segments and captions by image. Captions are read by lemmas: "bus" is found, "men" not."""


def _pope(folder: Path) -> Path:
    rows = [(f"{n}.jpg", f"Is there a {thing} in the image?", "yes") for n, thing in enumerate(("cup", "dog", "car"))]
    return make.pope(folder, random=rows, adversarial=[*rows[:2], (rows[2][0], rows[2][1], "no")])


def yes_no_pair(name: str, yes: str = "Yes", no: str = "No") -> list[tuple[str, str]]:
    """Return the two questions of an image of MME."""
    ask = "Please answer yes or no."
    return [(f"Is this {name}? {ask}", yes), (f"Is this not {name}, but a hat? {ask}", no)]


def _mme(folder: Path) -> Path:
    count = {"1.jpg": yes_no_pair("one"), "2.jpg": yes_no_pair("two")}
    return make.mme(folder, {"count": count, "scene": {"1.jpg": yes_no_pair("a shop")}})


def _mmbench(name: str) -> Callable[[Path], Path]:
    rows = make.rotations(3, "What?", CARS, "B", hint="Look.")
    rows += make.rotations(5, "Who?", ["me", "you", "she"], "B", category="image_scene", level="coarse_perception")
    return lambda folder: make.mmbench(folder / name, rows).parent


def _scienceqa(folder: Path) -> Path:
    problems = {
        str(7 * n): make.problem(
            f"Which is {thing}?", list("uvwxy"), n % 2, image="image.png" if n % 2 else None, hint="Read." * (n == 1)
        )
        for n, thing in enumerate(("iron", "wood", "glass", "tin"), 1)
    }
    return make.scienceqa(folder, problems)


def _seed(folder: Path) -> Path:
    kinds = (("31", 1), ("v31", 10), ("8", 2))
    return make.seed(folder, [make.seed_question(id, kind, "A", text=f"What is {id}?") for id, kind in kinds])


def _gqa(folder: Path) -> Path:
    return make.gqa(folder, {f"0{n}": make.gqa_question(f"n{n // 2}", f"What is {n}?", "red") for n in range(3)})


def _textvqa(folder: Path) -> Path:
    rows = [make.textvqa_row(34602 + n, f"00{n // 2}", f"what is thing {n}?", ["red"] * 10) for n in range(3)]
    return make.textvqa(folder, rows, {"000": "DAKOTA, DIGITAL", "001": "drupalcon"})


def _chair(folder: Path) -> Path:
    for image in COCO:
        make.write_image(folder / "val2014" / make.coco_name(image))
    return make.coco(folder, COCO)


def _amber(folder: Path) -> Path:
    described = [{"truth": ["dog"], "hallu": ["bird"]}, {"truth": ["kite"], "hallu": ["dog"]}]
    yes_no = [("discriminative-hallucination", "no"), ("discriminative-relation", "yes"), ("relation", "no")]
    for number in (1, 2):
        make.write_image(folder / "image" / f"AMBER_{number}.jpg")
    return make.amber(folder, described, yes_no, relation={"dog": ["puppy"], "kite": [], "bird": []})


def _mmhal(folder: Path) -> Path:
    path = make.write_json(folder / "response_template.json", make.mmhal_rows())
    for row in make.mmhal_rows():
        (folder / f"{row['image_id']}.jpg").write_bytes(make.IMAGE)
    return path.parent


SAMPLES: dict[str, Callable[[Path], Path]] = {
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench("mmbench_dev_20230712.tsv"),
    "mmbench-cn": _mmbench("mmbench_dev_cn_20231003.tsv"),
    "scienceqa": _scienceqa,
    "seed": _seed,
    "gqa": _gqa,
    "textvqa": _textvqa,
    "hallusionbench": make.hallusionbench,
    "chair": _chair,
    "object-halbench": lambda folder: make.object_halbench(folder, COCO),
    "amber": _amber,
    "mmhal": _mmhal,
    "llava-bench": make.llava_bench,
    "llava-bench-coco": make.llava_bench_coco,
    "mm-vet": lambda folder: make.mm_vet(folder, [["rec"], ["rec", "ocr"], ["ocr", "rec"], ["know", "rec", "gen"]]),
    "gavie": make.gavie,
}
"""Writes the files of each benchmark into a folder, and returns the folder."""


def build(name: str) -> Benchmark:
    """Return a benchmark, with stand-ins for the tools of NLTK and spaCy."""
    if name == "amber":
        return Amber(nouns, similarity)
    return ObjectHalBench(tagger, lemma) if name == "object-halbench" else find_benchmark(name)


def load(name: str, data: Path) -> tuple[Benchmark, BenchmarkData]:
    bench = build(name)
    return bench, bench.load(data)


def prompts() -> dict[str, str]:
    """Return the judge prompts of the package."""
    folder = resources.files("reverie_jax.eval").joinpath("prompts")
    return {file.name.removesuffix(".txt"): file.read_text("utf-8") for file in folder.iterdir()}


_GAVIE = "Relevancy:\nscore of the answer1: 8\nreason: so\n\nAccuracy:\nscore of the answer1: 6\nreason: so"
_REPLIES = {
    **{"mmhal": "Rating: 5", "gavie": _GAVIE, "llava-bench": "8 6", "llava-bench-coco": "8 6", "mm-vet": "0.5"},
    **{"hallusionbench": "correct", "object-halbench": '["dog", "kite"]', "mmbench": "A", "mmbench-cn": "A"},
}


@dataclasses.dataclass
class Case:
    """A loaded sample, with answers to all of its questions."""

    bench: Benchmark
    loaded: BenchmarkData
    data: Path

    @property
    def answers(self) -> dict[str, str]:
        texts = ("A dog and a kite are here.", "Yes", "No, there is no {question} in it.")
        return {id: texts[n % 3] for n, id in enumerate(ids(self.loaded))}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [{"question_id": q.id, "text": self.answers[str(q.id)]} for q in self.loaded.questions]

    def replies(self, answers: dict[str, str], rule: str) -> dict[str, str]:
        requests = self.bench.judge_requests(self.loaded, answers, rule, prompts())
        return dict.fromkeys([request.id for request in requests], _REPLIES.get(self.bench.name, ""))

    def read(self, path: Path, rows: list[Any], **more: Any) -> dict[str, str]:
        return answer_files.read_answers(make.write_lines(path, rows), self.bench, self.loaded, **more)

    def rejects(self, path: Path, rows: list[Any], *named: str, **more: Any) -> None:
        """Check that an answer file is an error of one line that names it."""
        with refused(path.name, *named):
            self.read(path, rows, **more)


@contextlib.contextmanager
def refused(*facts: Any, error: type[Exception] = BenchmarkError) -> Iterator[None]:
    """Check that the block raises an error of one line with all these facts."""
    with pytest.raises(error) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert all(str(fact) in str(caught.value) for fact in facts), caught.value


def ids(loaded: BenchmarkData) -> list[str]:
    return [str(question.id) for question in loaded.questions]


def find_question(loaded: BenchmarkData, *texts: str) -> Any:
    """Return the only question whose text contains all of these."""
    (question,) = [question for question in loaded.questions if all(text in question.text for text in texts)]
    return question


def answer_all(loaded: BenchmarkData, answer: str | Sequence[str] | Callable[[Any], str]) -> dict[str, str]:
    """Return the same answer to all questions, answers in their order, or what a function returns for each."""
    if isinstance(answer, str):
        return dict.fromkeys(ids(loaded), answer)
    texts = map(answer, loaded.questions) if callable(answer) else answer
    return dict(zip(ids(loaded), texts, strict=True))


def by_answer(groups: Mapping[Any, Iterable[str]]) -> dict[str, Any]:
    """Return results by answer, from answers grouped by their result."""
    return {answer: result for result, answers in groups.items() for answer in answers}


def headline(scored: Scored) -> float:
    """Return the first metric."""
    return next(iter(scored.values().values()))


def value(scored: Scored, name: str, sums: np.ndarray | None = None) -> float:
    return float(scored.metrics[name](scored.counts.sum(0) if sums is None else sums))


def check(
    bench: Benchmark, loaded: BenchmarkData, answers: Mapping[str, str], rule: str = "official", **more: Any
) -> Scored:
    """Score, and check what holds for every score: shapes, metrics of many sums at once, independent clusters."""
    scored = bench.score(loaded, answers, rule, **more)
    assert [parsed.id for parsed in scored.parsed_answers] == [question.id for question in loaded.questions]
    assert all(parsed.right is None or 0 <= parsed.right <= 1 for parsed in scored.parsed_answers)
    assert set(scored.clusters) <= set(loaded.clusters)
    assert len(scored.clusters) == len(set(scored.clusters)) == len(scored.counts)
    assert np.isfinite(scored.counts).all()
    drawn = np.concatenate(list(resamples(len(scored.clusters), draws=3)))
    drawn[0] = 0  # no clusters at all
    sums = np.stack([drawn @ scored.counts] * 2)
    for name, metric in scored.metrics.items():
        many = metric(sums)
        assert many.shape == (2, 3), name
        assert np.isfinite(many).all(), name
        assert float(metric(sums[0, -1])) == pytest.approx(many[1, -1]), name
    assert list(scored.values()) == list(scored.metrics)
    for start in (0, 1):  # half of the clusters: their counts are what scoring their questions alone gives
        kept = set(scored.clusters[start::2])
        if not kept or len(kept) == len(scored.clusters):
            continue
        part = dataclasses.replace(loaded, questions=[q for q in loaded.questions if q.cluster in kept])
        alone = bench.score(part, {id: answers[id] for id in ids(part) if id in answers}, rule, **more)
        inside = scored.counts[[cluster in kept for cluster in scored.clusters]].sum(0)
        if list(alone.metrics) == list(scored.metrics):
            for name, number in alone.values().items():
                assert value(scored, name, inside) == pytest.approx(number), name
    return scored

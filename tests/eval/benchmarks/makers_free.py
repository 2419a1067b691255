"""Files in the official schemas of the benchmarks with free-form answers, and what every score of them must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reverie_jax.eval.benchmarks import answer_files
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData, BenchmarkError
from reverie_jax.eval.benchmarks.scoring import Scored

PICTURE = b"\x89PNG no real picture"

CLASSES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench "
    "bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard "
    "sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon "
    "bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table "
    "toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors "
    "teddy_bear hair_drier toothbrush"
)
COCO = tuple(name.replace("_", " ") for name in CLASSES.split())
"""COCO's 80 categories, in its order; its ids have gaps, ours here too."""
CATEGORY = {name: number + 1 + number // 12 for number, name in enumerate(COCO)}


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path


def lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def coco_name(image: int) -> str:
    return f"COCO_val2014_{image:012d}.jpg"


def coco(folder: Path, images: Mapping[int, tuple[Sequence[str], Sequence[str]]]) -> Path:
    """COCO 2014's four annotation files.

    Args:
        images: val2014's: classes that are segmented there (one annotation each), and reference captions.
    """
    head = {"info": {"year": 2014}, "licenses": []}
    named = [{"id": image, "file_name": coco_name(image), "height": 9, "width": 9} for image in images]
    segments = [(image, name) for image, (names, _) in images.items() for name in names]
    captions = [(image, text) for image, (_, texts) in images.items() for text in texts]
    categories = [{"id": CATEGORY[name], "name": name, "supercategory": "thing"} for name in COCO]
    # One image of the training split, which no benchmark here asks about.
    other = [{"id": 990001, "file_name": "COCO_train2014_000000990001.jpg", "height": 9, "width": 9}]
    for split, shown in (("val", named), ("train", other)):
        found = segments if split == "val" else [(990001, "kite")]
        told = captions if split == "val" else [(990001, "A kite.")]
        rows = [
            {
                "id": number,
                "image_id": image,
                "category_id": CATEGORY[name],
                "bbox": [0, 0, 1, 1],
                "area": 1,
                "iscrowd": 0,
            }
            for number, (image, name) in enumerate(found)
        ]
        dump(
            folder / f"instances_{split}2014.json",
            {**head, "images": shown, "annotations": rows, "categories": categories},
        )
        texts = [{"id": number, "image_id": image, "caption": text} for number, (image, text) in enumerate(told)]
        dump(folder / f"captions_{split}2014.json", {**head, "images": shown, "annotations": texts})
    return folder


def mmhal_rows() -> list[dict[str, Any]]:
    """MMHal-Bench's 96 rows, in its order: topics of eight questions, one of each type."""
    kinds = ["attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other"]
    return [
        {
            "question_type": kinds[number % 8],
            "question_topic": f"topic{number // 8}",
            "image_id": f"{number:016x}",
            "image_src": f"picture://host/{number}_o.jpg",
            "image_content": ["Chair", f"Thing{number}"],
            "question": f"What is there, number {number}?",
            "gt_answer": f"Thing {number}.",
            "model_answer": "",
        }
        for number in range(96)
    ]


def llava_bench(folder: Path, counts: Mapping[str, int] | None = None) -> Path:
    """LLaVA-Bench in the wild: by default six questions about three images; `counts` says how many of each category."""
    kinds = [kind for kind, n in (counts or {"conv": 2, "detail": 2, "complex": 2}).items() for _ in range(n)]
    images = [f"{1 + number // 2:03d}.jpg" for number in range(len(kinds))]
    rows = [
        {"question_id": number, "image": image, "text": f"Question {number}?", "category": kind}
        for number, (image, kind) in enumerate(zip(images, kinds, strict=True))
    ]
    lines(folder / "questions.jsonl", rows)
    shown = list(dict.fromkeys(images))
    lines(
        folder / "context.jsonl",
        [{"id": image[:-4], "image": image, "caption": f"Seen in {image}."} for image in shown],
    )
    told = [
        {
            "question_id": row["question_id"],
            "text": f"Reference {row['question_id']}.",
            "answer_id": f"a{row['question_id']}",
        }
        | {"prompt": row["text"], "model_id": "gpt-4", "metadata": {}}
        for row in rows
    ]
    lines(folder / "answers_gpt4.jsonl", told)
    for image in shown:
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / image).write_bytes(PICTURE)
    return folder


def mm_vet(folder: Path, capabilities: Sequence[Sequence[str]]) -> Path:
    """MM-Vet's `mm-vet.json` and pictures, one question a list of capabilities."""
    rows = {
        f"v1_{number}": {
            "imagename": f"v1_{number}.png",
            "question": f"What is x in number {number}?",
            "answer": f"-1<AND>-5<OR>{number}",
            "imagesource": "picture://host",
            "capability": list(needed),
        }
        for number, needed in enumerate(capabilities)
    }
    dump(folder / "mm-vet.json", rows)
    (folder / "images").mkdir(exist_ok=True)
    for row in rows.values():
        (folder / "images" / str(row["imagename"])).write_bytes(PICTURE)
    return folder


def gavie(folder: Path) -> Path:
    """GAVIE: five questions about two images of Visual Genome; the first asks about a box."""
    regions = {
        "2331": [{"caption": "a red kite", "bbox": [11, 12, 13, 14]}, {"caption": "the sky", "bbox": [0, 0, 400, 300]}],
        "77": [{"caption": "a man", "bbox": [5, 6, 7, 8]}],
    }
    asked = [
        ("2331", "What is at [11, 12]?"),
        ("2331", "Describe the sky."),
        ("77", "Who is it?"),
        ("77", "Is it a man?"),
    ]
    asked.append(("2331", "Is there a dog?"))
    dump(folder / "evaluation_set.json", [{"image_id": image, "question": text} for image, text in asked])
    dump(folder / "vg_annotation.json", regions)
    for image in regions:
        (folder / f"{image}.jpg").write_bytes(PICTURE)
    return folder


def amber(folder: Path, generative: Sequence[Mapping[str, Any]], asked: Sequence[tuple[str, str]], **more: Any) -> Path:
    """AMBER's data folder.

    Args:
        generative: `truth` and `hallu` of each, ids from 1.
        asked: type and truth ("yes", "no") of each yes/no question, ids behind those.
        more: `relation`, `safe`.
    """
    marks: list[dict[str, Any]] = [{"type": "generative", **row} for row in generative]
    marks += [{"type": kind, "truth": truth} for kind, truth in asked]
    marks = [{"id": number, **row} for number, row in enumerate(marks, 1)]
    queries = [
        {
            "id": row["id"],
            "image": f"AMBER_{1 + (row['id'] - 1) % max(len(generative), 2)}.jpg",
            "query": "Describe this image."
            if row["type"] == "generative"
            else f"Is number {row['id']} there in this image?",
        }
        for row in marks
    ]
    dump(folder / "query" / "query_all.json", queries)
    few = len(generative)
    dump(folder / "query" / "query_generative.json", queries[:few])
    dump(folder / "query" / "query_discriminative.json", queries[few:])
    dump(folder / "annotations.json", marks)
    dump(folder / "relation.json", more.get("relation", {}))
    (folder / "safe_words.txt").write_text("\n".join(more.get("safe", ["light"])), "utf-8")
    names = [
        name + end
        for name in ("chair", "safe_cover", "hallu_cover", "qa_correct")
        for end in ("_num=0.001", "_score=0")
    ]
    (folder / "metrics.txt").write_text("\n".join(names), "utf-8")
    return folder


def folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def value(scored: Scored, *names: str, sums: np.ndarray | None = None) -> float:
    """The metric of that name, whatever case and marks it is written with; the first of `names` that there is."""
    known = {folded(name): metric for name, metric in scored.metrics.items()}
    for name in names:
        if folded(name) in known:
            return float(known[folded(name)](scored.counts.sum(0) if sums is None else sums))
    raise AssertionError(f"none of {names} among {list(scored.metrics)}")


def headline(scored: Scored) -> float:
    return next(iter(scored.values().values()))


def sound(loaded: BenchmarkData, scored: Scored) -> None:
    """What every score holds: a reading a question, the questions' units, metrics of sums over any leading axes."""
    assert [str(reading.id) for reading in scored.parsed_answers] == [str(question.id) for question in loaded.questions]
    assert set(scored.clusters) == {question.cluster for question in loaded.questions}
    assert len(scored.clusters) == len(set(scored.clusters)) == len(scored.counts)
    assert np.isfinite(scored.counts).all()
    weights = np.random.default_rng(0).integers(0, 3, (2, 3, len(scored.clusters)))
    weights[0, 0] = 0  # nothing at all is no reason to fail
    sums = weights @ scored.counts
    for name, metric in scored.metrics.items():
        many = metric(sums)
        assert np.shape(many) == (2, 3), name
        assert np.isfinite(many).all(), name
        each = [[float(metric(sums[row, column])) for column in range(3)] for row in range(2)]
        np.testing.assert_allclose(many, each, err_msg=name)
    assert list(scored.values()) == list(scored.metrics)
    np.testing.assert_allclose(
        list(scored.values().values()), [m(scored.counts.sum(0)) for m in scored.metrics.values()]
    )


def refused(benchmark: Benchmark, data: Path, *named: str) -> str:
    """Loading says what is wrong in one line that names each of `named`."""
    with pytest.raises(BenchmarkError) as error:
        benchmark.load(data)
    message = str(error.value)
    assert "\n" not in message
    for name in named:
        assert name in message, message
    return message


def comes_back(benchmark: Benchmark, loaded: BenchmarkData, answers: Mapping[str, str], out: Path) -> None:
    """What `export` writes in the official form is read as an answer file."""
    (path,) = benchmark.export(loaded, answers, out)
    assert answer_files.read_answers(path, benchmark, loaded) == dict(answers)


def partial(benchmark: Benchmark, loaded: BenchmarkData, prompts: Mapping[str, str], reply: str) -> Scored:
    """A score where the second question has no answer: the judge is not asked about it, and nothing is missed."""
    lost = str(loaded.questions[1].id)
    answers = {str(question.id): "So it is in every way." for question in loaded.questions if str(question.id) != lost}
    asked = [request.id for request in benchmark.judge_requests(loaded, answers, "official", prompts)]
    assert asked
    assert lost not in {id.split("#")[0] for id in asked}
    scored = benchmark.score(loaded, answers, replies=dict.fromkeys(asked, reply))
    assert [str(reading.id) for reading in scored.parsed_answers if reading.unparsed] == [lost]
    sound(loaded, scored)
    return scored


def by_question(loaded: BenchmarkData, texts: Sequence[str] | Mapping[Any, str]) -> dict[str, str]:
    """Answers by id: in the questions' order, or by the id that a mapping has."""
    if isinstance(texts, Mapping):
        return {str(id): text for id, text in texts.items()}
    return {str(question.id): text for question, text in zip(loaded.questions, texts, strict=True)}

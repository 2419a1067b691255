"""Makers of small files in the official schemas of all benchmarks."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
IMAGE = b"\x89PNG not a real image"


def encoded(shade: int = 0, form: str = "PNG") -> bytes:
    """A picture's file, another one for each shade."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (shade % 256, 90, 200)).save(file, form)
    return file.getvalue()


def shade(data: bytes) -> int:
    """Return about the shade that `encoded` was called with."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").getpixel((3, 3))[0]


def write_image(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(shade, "PNG" if path.suffix == ".png" else "JPEG"))
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write JSON lines; a row that is text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in text), "utf-8")
    return path


def answer_row(question_id: Any, prompt: str, text: Any, **more: Any) -> dict[str, Any]:
    """Return a row of an answer file of LLaVA."""
    row = {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": "kSg7Lq",
        "model_id": "llava-v1.5-7b",
    }
    return {**row, "metadata": {}, **more}


def pope(folder: Path, **splits: Sequence[tuple[str, str, str]]) -> Path:
    """POPE's question files: of each split, (image, question, label)."""
    for split, rows in splits.items():
        records = [
            {"question_id": number, "image": image, "text": text, "label": label}
            for number, (image, text, label) in enumerate(rows, 1)
        ]
        write_lines(folder / f"coco_pope_{split}.json", records)
        for image in {image for image, _, _ in rows}:
            write_image(folder / "val2014" / image)
    return folder


def mme(folder: Path, tasks: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> Path:
    """MME's folders: of each task and picture, (question, Yes or No). Five tasks keep pictures and texts apart."""
    for task, images in tasks.items():
        apart = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for number, (image, questions) in enumerate(images.items()):
            write_image(folder / task / ("images" if apart else "") / image, number)
            path = folder / task / ("questions_answers_YN" if apart else "") / f"{Path(image).stem}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{question}\t{label}\n" for question, label in questions), "utf-8")
    return folder


MMBENCH = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source")
MMBENCH += ("l2-category", "comment", "split")  # the released order


def mmbench(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = MMBENCH) -> Path:
    """MMBench's table; what a row leaves out is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = ["\t".join(columns)] + ["\t".join(str(row.get(column, "")) for column in columns) for row in rows]
    path.write_text("\n".join(table) + "\n", "utf-8")
    return path


def rotations(
    index: int, question: str, options: Sequence[str], answer: str, *, passes: int | None = None, **more: str
) -> list[dict[str, Any]]:
    """A question's passes, each a row of its own: options moved up by one, the answer's letter with them."""
    level = more.pop("level", "finegrained_perception (instance-level)")
    same = {
        "question": question,
        "hint": "",
        "image": base64.b64encode(encoded(index, "JPEG")).decode(),
        "split": "dev",
    }
    same |= {"category": "object_localization", "l2-category": level, **more}
    right, rows = "ABCD".index(answer), []
    for step in range(len(options) if passes is None else passes):
        turned = dict(zip("ABCD", [*options[step:], *options[:step]], strict=False))
        rows.append(
            {"index": index + step * 1_000_000, "answer": "ABCD"[(right - step) % len(options)], **same, **turned}
        )
    return rows


def problem(question: str, choices: Sequence[str], answer: int, **more: Any) -> dict[str, Any]:
    """One of ScienceQA's problems."""
    row = {"question": question, "choices": list(choices), "answer": answer, "hint": "", "image": "image.png"}
    row |= {"grade": "grade4", "subject": "natural science", "split": "test", "lecture": "", "solution": ""}
    return row | more


def scienceqa(folder: Path, problems: Mapping[str, Mapping[str, Any]], **splits: Sequence[str]) -> Path:
    """ScienceQA's files; without splits, all problems are in `test`."""
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", splits or {"train": [], "val": [], "test": list(problems)})
    for id, row in problems.items():
        if row["image"]:
            write_image(folder / "images" / "test" / id / row["image"], int(id))
    return folder


_TYPES = (
    *("Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location", "Instance Counting"),
    *("Spatial Relation", "Instance Interaction", "Visual Reasoning", "Text Recognition", "Action Recognition"),
    *("Action Prediction", "Procedure Understanding"),
)
SEED_TYPES = {name: number for number, name in enumerate(_TYPES, 1)}


def seed_question(
    id: str, kind: int, answer: str, *, text: str = "What is it?", data: str | None = None
) -> dict[str, Any]:
    """One of SEED-Bench's questions: of an image for kinds 1 to 9, of a video from 10."""
    row = {"answer": answer, "question": text, "question_id": id, "question_type_id": kind}
    row |= {f"choice_{letter}": choice for letter, choice in zip("abcd", ("One", "Two", "Three", "Four"), strict=True)}
    if kind < 10:
        return row | {"data_id": data or f"{id}_img", "data_type": "image"}
    return row | {"data_id": data or f"{id}.webm", "data_type": "video", "segment": [0.0, 4.0]}


def seed(folder: Path, questions: Sequence[Mapping[str, Any]]) -> Path:
    """SEED-Bench's file, with images where LLaVA keeps them."""
    write_json(folder / "SEED-Bench.json", {"questions": list(questions), "question_type": SEED_TYPES})
    for number, row in enumerate(questions):
        if row["data_type"] == "image":
            path = folder / "SEED-Bench-image" / row["data_id"]
        else:
            path = folder / "SEED-Bench-video-image" / f"{row['question_type_id']}_{row['question_id']}.png"
        write_image(path, number)
    return folder


CLASSES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench "
    "bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard "
    "sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon "
    "bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table "
    "toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors "
    "teddy_bear hair_drier toothbrush"
)
COCO = tuple(name.replace("_", " ") for name in CLASSES.split())
"""COCO's 80 categories in its order; ids have gaps, as COCO's."""
CATEGORY = {name: number + 1 + number // 12 for number, name in enumerate(COCO)}


def coco_name(image: int) -> str:
    return f"COCO_val2014_{image:012d}.jpg"


def coco(folder: Path, images: Mapping[int, tuple[Sequence[str], Sequence[str]]]) -> Path:
    """COCO 2014's four annotation files.

    Args:
        images: val2014's: classes that are segmented there (one annotation each), and reference captions.
    """
    categories = [{"id": CATEGORY[name], "name": name, "supercategory": "thing"} for name in COCO]
    # One image of the training split, which no benchmark here asks about.
    for split, shown in (("val", images), ("train", {990001: (["kite"], ["A kite."])})):
        names = [{"id": n, "file_name": coco_name(n).replace("val", split), "height": 9, "width": 9} for n in shown]
        head = {"info": {"year": 2014}, "licenses": [], "images": names}
        segments = [(image, CATEGORY[name]) for image, (classes, _) in shown.items() for name in classes]
        rows = [
            {"id": n, "image_id": image, "category_id": category, "bbox": [0, 0, 1, 1], "iscrowd": 0}
            for n, (image, category) in enumerate(segments)
        ]
        texts = [{"id": image, "image_id": image, "caption": t} for image, (_, some) in shown.items() for t in some]
        write_json(folder / f"instances_{split}2014.json", {**head, "annotations": rows, "categories": categories})
        write_json(folder / f"captions_{split}2014.json", {**head, "annotations": texts})
    return folder


def mmhal_rows() -> list[dict[str, Any]]:
    """MMHal-Bench's 96 rows, in its order: topics of eight questions, one of each type."""
    kinds = ["attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other"]
    return [
        {
            "question_type": kinds[number % 8],
            "question_topic": f"topic{number // 8}",
            "image_id": f"{number:016x}",
            "image_src": f"https://host/{number}_o.jpg",
            "image_content": ["Chair", f"Thing{number}"],
            "question": f"What is there, number {number}?",
            "gt_answer": f"Thing {number}.",
            "model_answer": "",
        }
        for number in range(96)
    ]


def llava_bench(
    folder: Path, kinds: Sequence[str] = ("conv", "conv", "detail", "detail", "complex", "complex")
) -> Path:
    """LLaVA-Bench in the wild: a question of each kind, two about an image."""
    images = [f"{1 + n // 2:03d}.jpg" for n in range(len(kinds))]
    contexts = [{"id": i[:-4], "image": i, "caption": f"Seen in {i}."} for i in dict.fromkeys(images)]
    for image in images:
        write_image(folder / "images" / image)
    return _rated(folder, kinds, images, contexts, ("questions", "context", "answers_gpt4"))


def _rated(folder: Path, kinds: Any, images: Any, contexts: Any, files: Sequence[str]) -> Path:
    rows = [
        {"question_id": n, "image": image, "text": f"Question {n}?", "category": kind}
        for n, (image, kind) in enumerate(zip(images, kinds, strict=True))
    ]
    references = [answer_row(n, f"Question {n}?", f"Reference {n}.", model_id="gpt-4") for n in range(len(rows))]
    for name, content in zip(files, (rows, contexts, references), strict=True):
        write_lines(folder / f"{name}.jsonl", content)
    return folder


def mm_vet(folder: Path, capabilities: Sequence[Sequence[str]]) -> Path:
    """MM-Vet's `mm-vet.json` and images, one question for each list of capabilities."""
    rows = {
        f"v1_{number}": {
            "imagename": f"v1_{number}.png",
            "question": f"What is x in number {number}?",
            "answer": f"-1<AND>-5<OR>{number}",
            "imagesource": "https://host",
            "capability": list(needed),
        }
        for number, needed in enumerate(capabilities)
    }
    write_json(folder / "mm-vet.json", rows)
    (folder / "images").mkdir(exist_ok=True)
    for row in rows.values():
        (folder / "images" / str(row["imagename"])).write_bytes(IMAGE)
    return folder


def gavie(folder: Path) -> Path:
    """GAVIE: five questions about two images of Visual Genome; the first asks about a box."""
    regions = {
        "2331": [{"caption": "a red kite", "bbox": [11, 12, 13, 14]}, {"caption": "the sky", "bbox": [0, 0, 400, 300]}],
        "77": [{"caption": "a man", "bbox": [5, 6, 7, 8]}],
    }
    questions = [("2331", "What is at [11, 12]?"), ("2331", "Describe the sky."), ("77", "Who is it?")]
    questions += [("77", "Is it a man?"), ("2331", "Is there a dog?")]
    write_json(folder / "evaluation_set.json", [{"image_id": image, "question": text} for image, text in questions])
    write_json(folder / "vg_annotation.json", regions)
    for image in regions:
        (folder / f"{image}.jpg").write_bytes(IMAGE)
    return folder


def amber(
    folder: Path, generative: Sequence[Mapping[str, Any]], yes_no: Sequence[tuple[str, str]], **more: Any
) -> Path:
    """AMBER's data folder.

    Args:
        generative: `truth` and `hallu` of each, ids from 1.
        yes_no: type and truth ("yes", "no") of each yes/no question, with the following ids.
        more: `relation`, `safe`.
    """
    marks: list[dict[str, Any]] = [{"type": "generative", **row} for row in generative]
    marks += [{"type": kind, "truth": truth} for kind, truth in yes_no]
    marks = [{"id": number, **row} for number, row in enumerate(marks, 1)]
    queries = [
        {"id": row["id"], "image": f"AMBER_{1 + (row['id'] - 1) % max(len(generative), 2)}.jpg"} for row in marks
    ]
    for row, query in zip(marks, queries, strict=True):
        generated = row["type"] == "generative"
        query["query"] = "Describe this image." if generated else f"Is number {row['id']} there in this image?"
    write_json(folder / "query" / "query_all.json", queries)
    few = len(generative)
    write_json(folder / "query" / "query_generative.json", queries[:few])
    write_json(folder / "query" / "query_discriminative.json", queries[few:])
    write_json(folder / "annotations.json", marks)
    write_json(folder / "relation.json", more.get("relation", {}))
    (folder / "safe_words.txt").write_text("\n".join(more.get("safe", ["light"])), "utf-8")
    return folder


def gqa_question(image: str, text: str, answer: str, kind: str = "query", meaning: str = "attr") -> dict[str, Any]:
    """One of GQA's questions, with the fields that the loader ignores."""
    types = {"detailed": "colorAttr", "semantic": meaning, "structural": kind}
    row = {"question": text, "imageId": image, "isBalanced": True, "answer": answer, "types": types}
    return row | {"semantic": [{"operation": "select", "dependencies": []}], "groups": {"global": "color"}}


def gqa(folder: Path, questions: Mapping[str, Mapping[str, Any]]) -> Path:
    write_json(folder / "testdev_balanced_questions.json", questions)
    for number, row in enumerate(questions.values()):
        write_image(folder / "images" / f"{row['imageId']}.jpg", number)
    return folder


def hallusion_row(
    category: str, sub: str, visual: int, set_id: int, figure: int, question: int, truth: int, **more: Any
) -> dict[str, Any]:
    """One of HallusionBench's rows: all values are text."""
    name = f"{category} {sub} set {set_id} figure {figure} question {question}"
    row = {"category": category, "subcategory": sub, "sample_note": "note", "question": f"Is {name} right?"}
    row |= {"visual_input": str(visual), "set_id": str(set_id), "figure_id": str(figure), "question_id": str(question)}
    row |= {"gt_answer": str(truth), "gt_answer_details": f"It is {'so' if truth else 'not so'}: {name}."}
    return row | {"filename": None if visual == 0 else f"./{category}/{sub}/{set_id}_{figure}.png"} | more


HALLUSION = [
    hallusion_row(*row)
    for row in (
        *(("VD", "ocr", 1, 0, 0, 0, 1), ("VD", "ocr", 1, 0, 0, 1, 0), ("VD", "ocr", 2, 0, 1, 0, 0)),
        *(("VD", "ocr", 2, 0, 1, 1, 1), ("VS", "ocr", 0, 0, 0, 0, 1), ("VS", "ocr", 0, 0, 0, 1, 0)),
        *(("VS", "ocr", 1, 0, 1, 0, 1), ("VS", "ocr", 1, 0, 1, 1, 0), ("VS", "ocr", 2, 0, 2, 0, 0)),
        *(("VD", "math", 1, 1, 0, 0, 1), ("VD", "math", 2, 1, 1, 0, 0)),
    )
]
"""Two sets of figures and questions; "ocr" is a part of both VD and VS, with the same numbers."""


def hallusionbench(folder: Path) -> Path:
    write_json(folder / "HallusionBench.json", HALLUSION)
    for number, row in enumerate(HALLUSION):
        if row["filename"]:
            write_image(folder / row["filename"], number)
    return folder


def textvqa_row(id: int, image: str, question: str, answers: Sequence[str]) -> dict[str, Any]:
    """One of TextVQA's annotations."""
    return {"question_id": id, "image_id": image, "question": question, "answers": list(answers), "set_name": "val"}


def textvqa(folder: Path, rows: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> Path:
    """TextVQA as LLaVA keeps it: annotations, its own questions with the OCR tokens of each image, images."""
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": list(rows)})
    texts = [
        {
            "question_id": row["image_id"],
            "image": f"{row['image_id']}.jpg",
            "text": f"{row['question']}\nReference OCR token: {tokens[row['image_id']]}\n{SHORT}",
        }
        for row in rows
    ]
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", texts)
    for image in tokens:
        write_image(folder / "train_images" / f"{image}.jpg")
    return folder


def llava_bench_coco(folder: Path) -> Path:
    """LLaVA-Bench COCO: six questions about two images."""
    boxes = [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]
    contexts = [
        {"id": f"{n:012d}", "image": f"{n:012d}.jpg", "captions": ["A dog.", "A brown dog."], "instances": boxes}
        for n in range(2)
    ]
    for n in range(2):
        write_image(folder / "val2014" / coco_name(n))
    images = [f"{n // 3:012d}.jpg" for n in range(6)]
    files = ("qa90_questions", "caps_boxes_coco2014_val_80", "qa90_gpt4_answer")
    return _rated(folder, ["conv", "detail", "complex"] * 2, images, contexts, files)


def object_halbench(folder: Path, images: Mapping[int, tuple[Sequence[str], Sequence[str]]]) -> Path:
    """Object HalBench: a question about each image, and COCO's annotations (see `coco`)."""
    coco(folder, images)
    rows = [
        {"image_id": n, "question": f"Describe image {n}.", "image": base64.b64encode(IMAGE + bytes([n])).decode()}
        for n in images
    ]
    write_lines(folder / "obj_halbench_300_with_image.jsonl", rows)
    return folder

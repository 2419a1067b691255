"""The hub's datasets in their own schemas, made from the samples' official files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reverie_jax.eval.benchmarks import inputs
from tests.eval.benchmarks import makers as make
from tests.eval.benchmarks.samples import SAMPLES

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else {"bytes": path.read_bytes(), "path": None}


def write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], shards: int = 1, kind: Any = IMAGE) -> None:
    """Write a split in shards, with row groups of two rows; `kind` is the type of its images."""
    fields = [name for name in rows[0] if name != "image"]
    for shard in range(shards):
        some = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        table = pa.table({field: [row[field] for row in some] for field in fields})
        if "image" in rows[0]:
            table = table.append_column("image", pa.array([row["image"] for row in some], kind))
        path = folder / f"{name}-{shard:05}-of-{shards:05}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=2)


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def pope(official: Path, out: Path) -> None:
    rows = [
        {"id": "0", "question_id": str(row["question_id"]), "question": row["text"], "answer": row["label"]}
        | {"image_source": Path(row["image"]).stem, "category": split}
        | {"image": image(official / "val2014" / row["image"])}
        for split in ("adversarial", "random")
        for row in rows_of(official / f"coco_pope_{split}.json")
    ]
    write(out, "data/test", rows, shards=3)


def mme(official: Path, out: Path) -> None:
    rows = []
    for path in sorted(official.rglob("*.txt"), reverse=True):
        task = path.relative_to(official).parts[0]
        (picture,) = official.glob(f"{task}/**/{path.stem}.jpg")
        for line in path.read_text("utf-8").splitlines():
            question, label = line.split("\t")
            row = {"question_id": f"{task}/{picture.name}", "question": question, "answer": label, "category": task}
            rows.append(row | {"image": image(picture)})
    write(out, "data/test", rows, shards=2)


def mmbench(config: str) -> Callable[[Path, Path], None]:
    def convert(official: Path, out: Path) -> None:
        (path,) = official.glob("*.tsv")
        import base64

        rows = []
        for row in inputs.read_tsv(path, make.MMBENCH):
            cells: dict[str, Any] = {name.replace("l2-", "L2-"): cell or "nan" for name, cell in row.items()}
            picture = {"bytes": base64.b64decode(row["image"]), "path": None}
            rows.append({**cells, "index": int(row["index"]), "image": picture})
        write(out, f"{config}/dev", rows)

    return convert


def scienceqa(official: Path, out: Path) -> None:
    problems = json.loads((official / "problems.json").read_text("utf-8"))
    rows = []
    for id in json.loads((official / "pid_splits.json").read_text("utf-8"))["test"]:
        row = {name: value for name, value in problems[id].items() if name not in ("image", "split")}
        picture = problems[id]["image"] and official / "images" / "test" / id / problems[id]["image"]
        rows.append(row | {"image": image(picture)})
    write(out, "ScienceQA-FULL/test", rows)


def seed(official: Path, out: Path) -> None:
    rows = []
    for row in json.loads((official / "SEED-Bench.json").read_text("utf-8"))["questions"]:
        shown = official / "SEED-Bench-image" / row["data_id"]
        # A clip has frames, none of which is LLaVA's.
        frames = [image(shown)] if row["data_type"] == "image" else [{"bytes": b"frame", "path": None}] * 8
        rows.append({"segment": None} | row | {"image": frames})
    write(out, "data/test", rows, kind=pa.list_(IMAGE))


def gqa(official: Path, out: Path) -> None:
    questions = json.loads((official / "testdev_balanced_questions.json").read_text("utf-8"))
    write(out, "testdev_balanced_instructions/testdev", [{"id": id} | row for id, row in questions.items()])
    pictures = sorted((official / "images").iterdir())
    write(out, "testdev_balanced_images/testdev", [{"id": path.stem, "image": image(path)} for path in pictures])


def textvqa(official: Path, out: Path) -> None:
    words = {row["image_id"]: row["ocr_tokens"] for row in _json(official / "TextVQA_Rosetta_OCR_v0.2_val.json")}
    rows = [
        row
        | {"ocr_tokens": words[row["image_id"]]}
        | {"image": image(official / "train_images" / f"{row['image_id']}.jpg")}
        for row in _json(official / "TextVQA_0.5.1_val.json")
    ]
    write(out, "data/validation", rows, shards=3)


def _json(path: Path) -> list[Any]:
    content: list[Any] = json.loads(path.read_text("utf-8"))["data"]
    return content


def hallusionbench(official: Path, out: Path) -> None:
    rows = json.loads((official / "HallusionBench.json").read_text("utf-8"))
    shown = [row for row in rows if row["visual_input"] != "0"]
    write(out, "data/image", [row | {"image": image(official / row["filename"])} for row in shown])
    write(out, "data/non_image", [row for row in rows if row["visual_input"] == "0"])


def same_files(official: Path, out: Path) -> None:
    """The repository has the official files."""
    for path in filter(Path.is_file, official.rglob("*")):
        copy = out / path.relative_to(official)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


def official_textvqa(folder: Path) -> Path:
    """The sample with Rosetta's words in place of LLaVA's questions."""
    SAMPLES["textvqa"](folder)
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    words = [{"image_id": name, "ocr_tokens": [name, "B, C"]} for name in ("000", "001")]
    make.write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})
    return folder


def official_mmhal(folder: Path) -> Path:
    rows = make.mmhal_rows()[:9]
    for number in range(len(rows)):
        make.write_image(folder / "images" / f"{number}_o.jpg", number)
    return make.write_json(folder / "response_template.json", rows).parent


OFFICIAL: dict[str, Callable[[Path], Path]] = {**SAMPLES, "textvqa": official_textvqa, "mmhal": official_mmhal}
CONVERT: dict[str, Callable[[Path, Path], None]] = {
    **{"pope": pope, "mme": mme, "mmbench": mmbench("en"), "mmbench-cn": mmbench("cn"), "scienceqa": scienceqa},
    **{"seed": seed, "gqa": gqa, "textvqa": textvqa, "hallusionbench": hallusionbench},
    **dict.fromkeys(("mmhal", "llava-bench"), same_files),
}

"""Images, prompts and answers whose outcome can be worked out by hand.

The prompts are the tests' own, one line for each field. An answer is a function of what the server was sent, and has a mark
of it, so that a recorded reply can be matched with the request that arrived without the pipeline's help.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reverie_jax.annotate.files import DROPPED, JUDGED, QUESTIONS, RATIONALES, RELEASED
from tests.data.fakes import png
from tests.hosted.helpers import JOURNAL, MODELS, SECRETS, Memory, rows_of, spec_of, states, until
from tests.hosted.wires import Call, content_digest

__all__ = ["JOURNAL", "MODELS", "SECRETS", "Memory", "rows_of", "spec_of", "states", "until"]

FILES = (QUESTIONS, RATIONALES, JUDGED, DROPPED, RELEASED)
FIELDS = {
    "questions": ("count", "confusing"),
    "positive": ("question", "answer"),
    "negative": ("question", "answer"),
    "judge": ("question", "answer", "positive", "wrong", "negative"),
}


def write_prompts(folder: Path, **first: str) -> Path:
    """Write the tests' prompts; `first` changes a stage's first line."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage, fields in FIELDS.items():
        lines = [first.get(stage, stage), *(f"{{{{ {field} }}}}" for field in fields)]
        (folder / f"{stage}.txt").write_text("\n".join(lines), "utf-8")
    return folder


def write_images(folder: Path, count: int) -> dict[str, bytes]:
    """Write images of one color each; return their bytes by name."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {f"{number:04d}.png": png((number % 251, number // 251, 77)) for number in range(count)}
    for name, encoded in images.items():
        (folder / name).write_bytes(encoded)
    return images


def stage_of(call: Call) -> str:
    """Return the stage of a call with the tests' prompts: its first word."""
    return call.text.split("\n")[0].split()[0]


def write_reply(text: str, mark: str) -> str:
    """Return the model's reply to a prompt; each question, rationale and verdict holds the mark."""
    stage, *fields = text.split("\n")
    if stage.split()[0] == "questions":
        count, confusing = map(int, fields)
        rows = [
            {
                "question": f"Which sign ({n}) is at {mark}?",
                "type": "short",
                "correct_answer": f"right {n}",
                "confusing_answers": [f"wrong {n}.{k}" for k in range(confusing)],
            }
            for n in range(count)
        ]
        return json.dumps({"questions": rows})
    if stage.split()[0] == "judge":
        return f"{'Yes' if drops(mark) else 'No'} ({mark})"
    return f"It is {'seen' if stage.split()[0] == 'positive' else 'not seen'} at {mark}, naïvely. 看"


def drops(mark: str) -> bool:
    """Return whether the judge finds a contradiction: in about a quarter of the rows."""
    return int(mark, 16) % 4 == 0


def answer(call: Call) -> str:
    """Return what the server replies."""
    return write_reply(call.text, call.digest[:16])


def marks(text: str) -> set[str]:
    return set(re.findall(r"\b[0-9a-f]{16}\b", text))


def expected(
    images: Mapping[str, bytes],
    spec: str,
    *,
    count: int = 1,
    confusing: int = 1,
    first: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the files' contents, worked out from the server's answers; the writer judges without the image."""
    provider, model = spec.split("@")[0].split(":")
    files: dict[str, list[Any]] = {name: [] for name in FILES}

    def reply(stage: str, image: bytes | None, *fields: str) -> str:
        text = "\n".join([(first or {}).get(stage, stage), *fields])
        shown = [] if image is None else [image]
        return write_reply(text, content_digest(provider, model, text, shown, stage == "questions")[:16])

    for name, image in images.items():
        conversations: list[dict[str, Any]] = []
        for question in json.loads(reply("questions", image, str(count), str(confusing)))["questions"]:
            text, right = question["question"], question["correct_answer"]
            positive = reply("positive", image, text, right)
            kept = []
            for wrong in question["confusing_answers"]:
                row = {
                    "image": name,
                    "question": text,
                    "correct_answer": right,
                    "confusing_answer": wrong,
                    "question_type": "short",
                }
                files[QUESTIONS].append(row)
                negative = reply("negative", image, text, wrong)
                row = row | {"correct_rationale": positive, "incorrect_rationale": negative}
                files[RATIONALES].append(row)
                vote = reply("judge", None, text, right, positive, wrong, negative)
                verdict = "yes" if vote.startswith("Yes") else "no"
                files[JUDGED].append(row | {"gemini_pro_judge": verdict, "judges": {spec: verdict}})
                if verdict == "yes":
                    reason = {"reason": "judged to contradict each other", "judges": {spec: vote}}
                    files[DROPPED].append(row | reason)
                else:
                    kept.append((f"Explain why this answer is wrong: {wrong}", negative))
            for prompt, why in [("Explain why.", positive), *kept] if kept else []:
                turns = [("human", f"<image>\n{text}"), ("gpt", right), ("human", prompt), ("gpt", why)]
                values = [{"from": role, "value": value} for role, value in turns]
                conversations.append({"id": name, "image": name, "conversations": values})
        files[RELEASED] += conversations
    return files


def check_files(folder: Path, wanted: Mapping[str, Any], names: Iterable[str] = FILES) -> None:
    """Check that the files hold what was worked out by hand."""
    for name in names:
        assert load(folder, name) == wanted[name], name


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text("utf-8"))

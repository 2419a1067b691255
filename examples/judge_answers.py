"""Judge a benchmark's answers with a hosted model, and score the replies.

Without `--judge` a stand-in answers on loopback in the protocol of OpenAI, so that the example needs no key. Every reply is
kept in the journal of the output folder: run it twice, and the second run sends nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import reverie_jax
from reverie_jax import JudgeRun

TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")


class StandIn(http.server.BaseHTTPRequestHandler):
    """Reply to every chat completion with the same rating."""

    def do_POST(self) -> None:
        """Answer one request."""
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "The answer is correct and somewhat informative.\nRating: 4"}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "stand-in",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 12, "total_tokens": 112},
        }
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """Serve the stand-in; yield its model spec."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"openai:stand-in@http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def make_files(folder: Path) -> Path:
    """Write eight questions in MMHal-Bench's form and an answer file; return the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question_type": kind,
            "question_topic": "indoor",
            "image_id": str(number),
            "image_src": "",
            "image_content": ["Cup", "Table"],
            "question": f"What is on the table in image {number}?",
            "gt_answer": "A cup.",
        }
        for number, kind in enumerate(TYPES)
    ]
    (folder / "response_template.json").write_text(json.dumps(rows))
    answers = [{"question_id": number, "text": "There is a cup on the table."} for number in range(len(rows))]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return path


def main() -> None:
    """Judge and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", help="openai:MODEL or gemini:MODEL, with the key in the environment")
    parser.add_argument("--out", type=Path, default=Path("judged"))
    args = parser.parse_args()

    predictions = make_files(Path("mmhal"))
    benchmark = reverie_jax.find_benchmark("mmhal")
    data = benchmark.load(Path("mmhal"))
    answers = {str(row["question_id"]): row["text"] for row in map(json.loads, predictions.read_text().splitlines())}
    with contextlib.nullcontext(args.judge) if args.judge else stand_in() as judge:
        run = JudgeRun(
            benchmark=benchmark,
            data=data,
            answers=answers,
            rule="official",
            judges=[judge],
            out=args.out,
            environment={"OPENAI_API_KEY": "none", **os.environ},
            show_image=False,
        )
        outcome = run.run()
    (replies,) = outcome.files.values()
    result = reverie_jax.score(benchmark, data, predictions, replies=replies)
    print({name: round(value, 3) for name, value in result.metrics.items()})


if __name__ == "__main__":
    main()

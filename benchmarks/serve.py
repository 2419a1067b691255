"""Questions about an image from as many clients at once, against one client after another, through `reverie serve`'s server.

    python -m benchmarks.serve [--size tiny|small|7b] [--questions 18] [--max-new-tokens N] [--rounds N]

Prints one JSON object. Clients send raw HTTP to a server on loopback in the same process. All decode greedily, and answers
must be the same one by one and together before anything is timed. Rounds alternate.

    one by one   each request is sent when the one before it was answered: a prefill for each question
    together     all at once, about one image: its prefix is computed once, or twice where a first request is alone
    images       all at once, each about an image of its own: what batching alone gains
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
import uvicorn
from flax import nnx

from benchmarks import evaluate
from benchmarks.workload import small_tokenizer, spread
from reverie_jax.data.processor import Processor
from reverie_jax.data.tokenization import Encoder
from reverie_jax.eval.benchmarks.interface import SHORT
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.models import VisionLanguageModel
from reverie_jax.serve.app import Service, make_app
from reverie_jax.serve.scheduler import Scheduler

NAME = "benchmark"


@dataclasses.dataclass(frozen=True)
class Args:
    size: Literal["tiny", "small", "7b"] = "small"
    questions: int = 18
    """Questions about an image, and clients."""
    max_new_tokens: int = 8
    """Tokens per answer."""
    rounds: int = 3
    """Timed rounds of each way, alternating."""


def bodies(args: Args, images: int) -> list[bytes]:
    """Return a request for each question, about one image or each about its own."""
    made = evaluate.make_questions(evaluate.Args(size=args.size, images=images, questions=args.questions))
    result = []
    for number in range(args.questions):
        image = made[number % images]
        text = image.questions[number][1].turns[0].text
        url = f"data:image/jpeg;base64,{base64.b64encode(image.read()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text.split("\n", 1)[1]}]
        body = {"model": NAME, "temperature": 0, "max_tokens": args.max_new_tokens}
        result.append(json.dumps({**body, "messages": [{"role": "user", "content": content}]}).encode())
    return result


def send(port: int, body: bytes) -> str:
    """Return the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found["choices"][0]["message"]["content"]


def run(args: Args) -> dict[str, Any]:
    sizes = evaluate.Args(size=args.size)
    config = dataclasses.replace(sizes.config, image_token_id=3, tokenization="hf")
    texts = " ".join(f"USER: Is there a {name} in the image?\n{SHORT} ASSISTANT:" for name in evaluate.OBJECTS)
    encoder = Encoder(small_tokenizer(texts), "vicuna_v1", config.vision.patches, 3)
    processor = Processor(encoder, config.vision.image_size, context=config.text.context)
    model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(sizes.precision))
    model.decoder.unstack()
    scheduler = Scheduler(Engine(model, processor, EngineShape(processor.context, batch_size=args.questions)))
    server = uvicorn.Server(uvicorn.Config(make_app(Service(scheduler, NAME)), port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    shared, own = bodies(args, 1), bodies(args, args.questions)
    with ThreadPoolExecutor(args.questions) as clients:

        def at_once(requests: Sequence[bytes]) -> list[str]:
            return list(clients.map(lambda body: send(port, body), requests))

        ways: dict[str, Callable[[], list[str]]] = {
            "one by one": lambda: [send(port, body) for body in shared],
            "together": lambda: at_once(shared),
            "images": lambda: at_once(own),
        }
        # Which requests come first differs from round to round, and with it the shapes: all are compiled before.
        for _ in range(3):
            answers = {name: way() for name, way in ways.items()}
        if answers["one by one"] != answers["together"]:
            raise RuntimeError("answers differ between requests one by one and together")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    server.should_exit = True
    thread.join()
    ratios = [one / other for one, other in zip(seconds["one by one"], seconds["together"], strict=True)]
    return {
        **dataclasses.asdict(args),
        "dtype": sizes.precision,
        "image_tokens": config.vision.patches,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "together_over_one_by_one": spread(ratios),
        "device": str(jax.devices()[0].device_kind),
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def main(args: Args) -> None:
    print(json.dumps(run(args), indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))

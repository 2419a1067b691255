"""`reverie serve`: its options, and its process, which is killed and started again."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest

from reverie_jax.convert import convert
from tests.serve.helpers import SECONDS, ask, png, until

SLOW_SECONDS = 120
"""How long many clients ask."""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--port", "70000"], "--port"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-requests", "0"], "--max-requests"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--host", "0.0.0.0"], "REVERIE_API_KEY"),
        (["--host", "example.org"], "REVERIE_API_KEY"),
        (["--mesh", "data=1000"], "--mesh"),
        (["--template", "none"], "--template"),
        (["--port", "used"], "--port"),
        (["no-such-model", "--port", "0"], "no-such-model"),
    ],
)
def test_options_are_checked(reverie, monkeypatch, words, named):
    monkeypatch.delenv("REVERIE_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = [str(other.getsockname()[1]) if word == "used" else word for word in words]
        code, out, err = reverie("serve", *(words if words[0][0] != "-" else ["scenes-base", *words]))
    assert (code, out) == (2, "")
    assert named in err
    assert err.count("\n") == 1


def test_a_key_that_cannot_be_sent(reverie, monkeypatch):
    monkeypatch.setenv("REVERIE_API_KEY", "gehéim")
    code, _, err = reverie("serve", "scenes-base")
    assert code == 2
    assert "REVERIE_API_KEY" in err


def test_without_the_extra_it_says_what_to_install(reverie, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = reverie("serve", "scenes-base")
    assert code == 2
    assert "[web]" in err


@contextlib.contextmanager
def process(*words: str):
    """Yield a process of the command that answers, and its port."""
    command = [sys.executable, "-m", "reverie_jax.cli", "serve", "scenes-base", "--dtype", "float32", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as child:
        try:
            line = child.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
            assert found, line + child.stderr.read()
            yield child, int(found[1])
        finally:
            child.kill()


def client_of(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", timeout=SECONDS)


@pytest.mark.slow
def test_killed_and_started_again():
    """The same port, the same answers; clients that retry do not notice. SIGTERM lets requests end."""
    options = {"model": "scenes-base", "messages": ask("Describe the image.", png(1)), "temperature": 0}
    with process("--port", "0") as (first, port):
        before = client_of(port).chat.completions.create(**options)
        first.send_signal(signal.SIGKILL)
        first.wait()
        with pytest.raises(openai.APIConnectionError):
            client_of(port).with_options(max_retries=0).chat.completions.create(**options)
    with process("--port", str(port)) as (second, _):
        client, found = client_of(port), []
        assert client.chat.completions.create(**options).choices == before.choices
        asking = threading.Thread(target=lambda: found.append(client.chat.completions.create(**options, n=8)))
        asking.start()
        until(
            lambda: found
            or "in_flight 1.0" in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        )
        second.send_signal(signal.SIGTERM)
        asking.join()
        assert len(found[0].choices) == 8
        assert second.wait(SECONDS) in (0, -signal.SIGTERM)
        assert second.stderr.read() == ""


@pytest.mark.slow
def test_an_export_is_served_by_transformers(tmp_path):
    """`transformers serve` gives our answer, from what `reverie convert` writes; needs its extra `serving`."""
    pytest.importorskip("fastapi")
    folder = tmp_path / "export"
    convert("scenes-base", folder, to="llava-hf")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    code = "from transformers.cli.transformers import main; main()"
    options = {"messages": ask("Describe the image.", png(0)), "max_tokens": 24, "temperature": 0}
    with process("--port", "0") as (_, ours):
        expected = client_of(ours).chat.completions.create(model="scenes-base", **options).choices[0].message.content
    with subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.DEVNULL) as child:
        try:
            client = client_of(port).with_options(max_retries=0)

            def answers():
                with contextlib.suppress(openai.APIConnectionError):
                    return client.models.list()

            until(answers)
            found = client.chat.completions.create(model=str(folder), **options)
        finally:
            child.kill()
    assert found.choices[0].message.content.strip() == expected


@pytest.mark.slow
def test_many_clients_for_minutes():
    """64 clients at once: no request is lost, all answers are those given alone, and memory stays where it is."""
    questions = ["Describe the image.", "Is there a cup in the image?", "How many cups are there?", "Is there a dog?"]
    cases = [(text, png(seed) if seed else b"") for seed in range(6) for text in questions]
    with process("--port", "0") as (child, port):

        def answer(case, client):
            options = {"temperature": 0, "max_tokens": 32, "messages": ask(*case)}
            return client.chat.completions.create(model="scenes-base", **options).choices[0].message.content

        def memory():
            with open(f"/proc/{child.pid}/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        expected = [answer(case, client_of(port)) for case in cases]
        counts, wrong, sizes = [0] * 64, [], []
        until_then = time.monotonic() + SLOW_SECONDS

        def run(number):
            with client_of(port) as client:
                while time.monotonic() < until_then:
                    index = (number * 7 + counts[number] * 5) % len(cases)
                    if (found := answer(cases[index], client)) != expected[index]:
                        wrong.append((cases[index][0], found, expected[index]))
                    counts[number] += 1

        threads = [threading.Thread(target=run, args=[number]) for number in range(64)]
        for thread in threads:
            thread.start()
        while time.monotonic() < until_then:
            time.sleep(SLOW_SECONDS / 12)
            sizes.append(memory())
        for thread in threads:
            thread.join()
    print(f"{sum(counts)} answers in {SLOW_SECONDS} s; MiB resident: {[size >> 20 for size in sizes]}")
    assert wrong == []
    assert min(counts) > 0
    # Programs are compiled in the first third.
    assert max(sizes[8:]) < 1.1 * max(sizes[4:8])

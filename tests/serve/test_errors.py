"""What goes wrong, and must harm nobody else: bad requests, wrong keys, limits, clients that leave, a server that stops."""

from __future__ import annotations

import base64
import json
import socket
import threading

import openai
import pytest

from reverie_jax.serve import app, chat
from tests.serve.helpers import IMAGE, NAME, QUESTIONS, ask, data_url, png, until


def url_message(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def bomb():
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""
    head = bytearray(png(0, 1))
    head[16:24] = (20_000).to_bytes(4, "big") * 2
    return bytes(head)


WORDS = {"messages": ask("Is there a cup?")}
BAD: dict[str, tuple] = {
    # name: (body, status, param, code)
    "not JSON": (b"{", 400, None, None),
    "not UTF-8": (b'{"model": "\xff"}', 400, None, None),
    "a list": (b"[]", 400, None, None),
    "nested": (b"[" * 100_000, 400, None, None),
    "too large": (b" " * (app.MAX_BODY_BYTES + 1), 413, None, None),
    "no messages": ({}, 400, "messages", None),
    "empty messages": ({"messages": []}, 400, "messages", None),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", None),
    "answer last": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", None),
    "two in a row": ({"messages": [*ask("a"), *ask("b")]}, 400, "messages", None),
    "ends with an answer": ({"messages": [*ask("a"), {"role": "assistant", "content": "x"}]}, 400, "messages", None),
    "system text": ({"messages": [{"role": "system", "content": "Be brief."}, *ask("a")]}, 400, "messages.0", None),
    "late system text": ({"messages": [*ask("a"), {"role": "system", "content": "x"}]}, 400, "messages.1", None),
    "other part": (
        {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
        400,
        "messages.0.content.0",
        None,
    ),
    "no address": (url_message(7), 400, "messages.0.content.0.image_url.url", None),
    "marker without image": ({"messages": ask("<image> what?")}, 400, "messages.0", None),
    "two images": (
        {"messages": [{"role": "user", "content": ask("x", IMAGE)[0]["content"] * 2}]},
        400,
        "messages",
        None,
    ),
    "other model": ({**WORDS, "model": "gpt"}, 404, "model", "model_not_found"),
    "unknown option": ({**WORDS, "best_of": 2}, 400, "best_of", None),
    "tools": ({**WORDS, "tools": [{"type": "function"}]}, 400, "tools", None),
    "penalty": ({**WORDS, "frequency_penalty": 0.5}, 400, "frequency_penalty", None),
    "schema": ({**WORDS, "response_format": {"type": "json_object"}}, 400, "response_format.type", None),
    "n": ({**WORDS, "n": 33}, 400, "n", None),
    "n as text": ({**WORDS, "n": "2"}, 400, "n", None),
    "n as truth": ({**WORDS, "n": True}, 400, "n", None),
    "temperature": ({**WORDS, "temperature": -1}, 400, "temperature", None),
    "not a number": (
        json.dumps({"model": NAME, **WORDS, "temperature": float("nan")}).encode(),
        400,
        "temperature",
        None,
    ),
    "top_p": ({**WORDS, "top_p": 0}, 400, "top_p", None),
    "seed": ({**WORDS, "seed": 2**63}, 400, "seed", None),
    "empty stop": ({**WORDS, "stop": ""}, 400, "stop", None),
    "many stops": ({**WORDS, "stop": list("abcde")}, 400, "stop", None),
    "alternatives alone": ({**WORDS, "top_logprobs": 2}, 400, "top_logprobs", None),
    "no tokens": ({**WORDS, "max_tokens": 0}, 400, "max_tokens", None),
    "more than the context": (
        {**WORDS, "max_completion_tokens": 1024},
        400,
        "max_completion_tokens",
        "context_length_exceeded",
    ),
    "long text": ({"messages": ask("cup " * 2000)}, 400, "messages", "context_length_exceeded"),
    "file": (url_message("file:///etc/passwd"), 400, "messages", "invalid_image_url"),
    "path": (url_message("/etc/passwd"), 400, "messages", "invalid_image_url"),
    "http": (url_message("http://127.0.0.1/x.png"), 400, "messages", "invalid_image_url"),
    "https": (url_message("https://127.0.0.1/x.png"), 400, "messages", "invalid_image_url"),
    "odd address": (url_message("https://[x"), 400, "messages", "invalid_image_url"),
    "not base64": (url_message("data:image/png;base64,@@@@"), 400, "messages", "invalid_image_url"),
    "cut base64": (url_message("data:image/png;base64,A"), 400, "messages", "invalid_image_url"),
    "plain data": (url_message("data:image/png,abc"), 400, "messages", "invalid_image_url"),
    "empty image": (url_message("data:image/png;base64,"), 400, "messages", "invalid_image_url"),
    "not an image": (url_message(data_url(b"hello")), 400, "messages", "invalid_image_url"),
    "cut image": (url_message(data_url(IMAGE[:900])), 400, "messages", "invalid_image_url"),
    "bomb": (url_message(data_url(bomb())), 400, "messages", "invalid_image_url"),
}


def test_bad_requests_get_their_errors_and_harm_nobody(server, alone):
    """Every row of the table, each among good requests about another picture that are answered as if alone."""
    results, good = {}, []

    def ask_well():
        good.append(server.chat({"messages": ask(QUESTIONS[1], IMAGE), "temperature": 0, "max_tokens": 24}))

    for name, (body, *_) in BAD.items():
        neighbor = threading.Thread(target=ask_well)
        neighbor.start()
        results[name] = (
            server.chat(body) if isinstance(body, dict) else server.send("POST", "/v1/chat/completions", body)
        )
        neighbor.join()
    for name, (_, status, param, code) in BAD.items():
        found, _, content = results[name]
        error = content["error"]
        assert found == status, (name, content)
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", code), name
        assert param is None or str(error["param"]).startswith(param), (name, error)
        assert error["message"], name
    expected = alone(QUESTIONS[1], IMAGE)
    assert [status for status, _, _ in good] == [200] * len(BAD)
    assert {content["choices"][0]["message"]["content"] for _, _, content in good} == {expected}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/v1/models", {}, 405),
        ("GET", "/v1/embeddings", {}, 404),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, 415),
    ],
)
def test_other_requests_get_errors_of_the_same_shape(server, method, path, headers, status):
    found, _, content = server.send(method, path, {"model": NAME} if method == "POST" else None, headers)
    assert found == status
    assert content["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_accepted(server, alone):
    text = alone(QUESTIONS[1], IMAGE)
    padded = data_url(IMAGE).rstrip("=")
    lined = data_url(IMAGE)[:60] + "\n" + data_url(IMAGE)[60:]
    safe = "data:;base64," + base64.urlsafe_b64encode(IMAGE).decode()
    sentence = server.service.scheduler.engine.encoder.template.sentence
    marked = [{"type": "text", "text": f"<image>\n{QUESTIONS[1]}"}]
    for url in (padded, lined, safe):
        picture = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
        for content in ([picture, {"type": "text", "text": QUESTIONS[1]}], [*marked, picture]):
            messages = [{"role": "system", "content": sentence}, {"role": "user", "content": content, "name": "x"}]
            harmless = {
                "user": "me",
                "metadata": {"a": "b"},
                "n": 1,
                "presence_penalty": 0,
                "logit_bias": {},
                "tools": [],
            }
            harmless |= {"response_format": {"type": "text"}, "stream": False, "stop": None, "seed": -(2**63)}
            status, _, found = server.chat({"messages": messages, "temperature": 0, "max_tokens": 24, **harmless})
            assert status == 200, found
            assert found["choices"][0]["message"]["content"] == text


def test_a_key(serve):
    with serve(key="geheim") as running:
        for path in ("/v1/models", "/metrics"):
            for shown in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "geheim"},
                {"Authorization": "Bearer gehéim"},
            ):
                status, _, content = running.send("GET", path, headers={k: v.encode() for k, v in shown.items()})
                assert (status, content["error"]["code"]) == (401, "invalid_api_key")
        assert running.chat(WORDS)[0] == 401
        right = {"Authorization": "bearer geheim"}
        assert running.send("GET", "/v1/models", headers=right)[0] == 200
        assert running.chat(WORDS | {"max_tokens": 2}, headers=right)[0] == 200
        assert running.send("GET", "/health")[0] == 200


def test_too_many_requests_are_told_when_to_come_again(serve, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    prepare = chat.prepare

    def slow(*args, **options):
        entered.set()
        leave.wait()
        return prepare(*args, **options)

    monkeypatch.setattr(app.chat, "prepare", slow)
    with serve(max_requests=1) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
        first = threading.Thread(target=running.chat, args=[WORDS | {"max_tokens": 2}])
        first.start()
        entered.wait()
        status, headers, content = running.chat(WORDS)
        assert (status, content["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):  # it reads the error although its own body is long
            client.with_options(max_retries=0).chat.completions.create(model=NAME, messages=ask("x" * 20_000_000))
        leave.set()
        first.join()
        assert client.chat.completions.create(model=NAME, **WORDS, max_tokens=2).choices


@pytest.mark.parametrize("when", ["uploading", "waiting", "streaming"])
def test_clients_that_leave_free_their_place(serve, when, caplog):
    """Whenever it is; nothing is logged about them."""
    with serve(max_requests=1) as running:
        options = {"n": 8, "max_tokens": 900, "temperature": 2, "stream": when == "streaming"}
        body = json.dumps({"model": NAME, **WORDS, **options}).encode()
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall("\r\n".join(head).encode() + (body[:20] if when == "uploading" else body))
            if when == "streaming":
                connection.recv(10)
            else:
                until(lambda: running.service.in_flight)
        until(lambda: not running.service.in_flight)
        assert running.chat(WORDS | {"max_tokens": 2})[0] == 200
    assert [one for one in caplog.records if one.levelname in ("WARNING", "ERROR")] == []


def test_a_failure_of_the_model_is_an_error_of_the_server(server, monkeypatch, client):
    from reverie_jax.serve import scheduler

    def broken(*args, **options):
        raise MemoryError("secret")

    monkeypatch.setattr(scheduler, "start", broken)
    status, _, content = server.chat(WORDS)
    assert (status, content["error"]["type"]) == (500, "server_error")
    assert "secret" not in content["error"]["message"]
    with pytest.raises(openai.APIError, match="MemoryError"):
        list(client.chat.completions.create(model=NAME, **WORDS, stream=True))
    monkeypatch.undo()
    assert server.chat(WORDS | {"max_tokens": 2})[0] == 200


def test_a_server_that_stops(serve):
    """Requests that run are answered; afterwards nobody is listening."""
    with serve() as running:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(running.chat(WORDS | {"max_tokens": 40}))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        until(lambda: running.service.in_flight == 4)
        running.server.should_exit = True
        for thread in threads:
            thread.join()
    assert [status for status, _, _ in found] == [200] * 4
    assert not running.service.scheduler.healthy
    with pytest.raises(ConnectionError):
        running.send("GET", "/health")

"""Providers over the real SDKs: what they send, and what they make of every reply and fault."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reverie_jax.errors import UserError
from reverie_jax.hosted import images, providers
from reverie_jax.hosted.images import encode_image
from reverie_jax.hosted.interface import (
    AccessError,
    RefusedError,
    Reply,
    Request,
    RequestImage,
    RequestSettings,
    RetryableError,
    UnusableError,
)
from reverie_jax.hosted.providers import open_provider, parse_model_spec, redact_password
from reverie_jax.hosted.providers.common import parse_retry_after
from tests.data.fakes import png
from tests.hosted import helpers
from tests.hosted.faults import HARMLESS, Fault, Step, dress
from tests.hosted.helpers import secret_of, spec_of
from tests.hosted.server import Server
from tests.hosted.wires import usage

pytestmark = pytest.mark.usefixtures("keys", "sdks")
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "gemini"])
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
ANSWER = '{"question": "Is it red?", "correct_answer": true}'
REQUEST = Request("questions", RequestImage("a.png", png()), {}, "Ask one.", schema=SCHEMA)


def call(spec: str, settings: RequestSettings, work: Callable[[Any], Any]) -> Any:
    """Open a provider, await `work(provider)` and close it."""

    async def main() -> Any:
        provider = open_provider(spec, settings, helpers.SECRETS)
        try:
            return await work(provider)
        finally:
            await provider.close()

    return asyncio.run(main())


def ask(server: Server, provider: str, request: Request = REQUEST, **settings: Any) -> Reply:
    return call(spec_of(server, provider), RequestSettings(**settings), lambda it: it.ask(request))


@PROVIDERS
def test_a_request_arrives_whole_and_its_reply_is_read(provider):
    with Server(lambda call: ANSWER) as server:
        reply = ask(server, provider, temperature=0.25, max_new_tokens=7)
        (sent,) = server.calls
        ask(server, provider, structured=False)
        ask(server, provider, dataclasses.replace(REQUEST, send_image=False, schema=None))
        _, plain, text = server.calls
    assert (sent.provider, sent.model, sent.text, sent.images) == (provider, "tiny", "Ask one.", [png()])
    assert (sent.structured, sent.key) == (True, secret_of(provider))
    assert reply == Reply(ANSWER, *usage(sent, ANSWER), "tiny-2026-01-01")
    assert (plain.structured, plain.images, text.structured, text.images) == (False, [png()], False, [])
    if provider == "openai":
        schema = sent.body["response_format"]["json_schema"]
        assert (schema["strict"], schema["schema"]) == (True, SCHEMA)
        assert (sent.body["temperature"], sent.body["max_completion_tokens"]) == (0.25, 7)
    else:
        config = sent.body["generationConfig"]
        assert (config["responseMimeType"], config["responseJsonSchema"]) == ("application/json", SCHEMA)
        assert (config["temperature"], config["maxOutputTokens"]) == (0.25, 7)


FAULTS: dict[Fault, tuple[Any, str]] = {
    Fault.RATE_LIMIT_AFTER: (RetryableError, "429"),
    Fault.RATE_LIMIT: (RetryableError, "429"),
    Fault.SERVER_ERROR: (RetryableError, "500"),
    Fault.UNAVAILABLE: (RetryableError, "503"),
    Fault.TIMEOUT: (RetryableError, "0.2 s; set a longer --timeout"),
    Fault.RESET: (RetryableError, "connection failed"),
    Fault.CLOSED: (RetryableError, "closed within the reply"),
    Fault.WEB_PAGE: (RetryableError, "response"),
    Fault.BLOCKED: ((UnusableError, RefusedError), "blocked"),
    Fault.REFUSED: (UnusableError, "blocked"),
    Fault.EMPTY: (UnusableError, "empty"),
    Fault.TRUNCATED: (RefusedError, "cut off"),
}


@PROVIDERS
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults(provider, fault):
    """Each fault is the error that the runner knows. A prompt that Gemini blocks is blocked again."""
    kind, word = FAULTS[fault]
    kind = kind[provider == "gemini"] if isinstance(kind, tuple) else kind
    with Server(lambda call: ANSWER, lambda call: fault, retry_after=7.0) as server:
        with pytest.raises(kind, match=word) as caught:
            ask(server, provider, timeout=0.2 if fault is Fault.TIMEOUT else 60.0)
        (arrived,) = server.calls
    error = caught.value
    assert type(error) is kind
    if isinstance(error, RetryableError):
        assert error.retry_after == (7.0 if fault is Fault.RATE_LIMIT_AFTER else None)
        assert error.reached == (fault is not Fault.RESET)
        assert error.charged == (fault in (Fault.TIMEOUT, Fault.CLOSED))
        if fault is Fault.CLOSED and provider == "openai":  # Google's SDK keeps nothing of it
            assert error.reply.text.startswith('{"id"')
    if isinstance(error, UnusableError):  # it is paid for, and recorded
        words = dress(ANSWER, fault)
        assert error.reply.text == words if words else error.reply.text.startswith("{")  # without words, all of it
        assert error.reply.tokens_in == usage(arrived, "")[0]


@PROVIDERS
@pytest.mark.parametrize("fault", [Fault.UNSURE, *HARMLESS])
def test_other_replies_are_left_as_they_are(provider, fault):
    with Server(lambda call: ANSWER, lambda call: fault, is_judge=lambda call: True) as server:
        assert ask(server, provider).text == dress(ANSWER, fault)


def test_retry_after_in_the_body_and_as_a_date():
    delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "31s"}
    error = {"code": 429, "message": "Slow down.", "status": "RESOURCE_EXHAUSTED", "details": [delay]}
    busy = (429, {"error": error})
    with Server(lambda call: ANSWER, lambda call: busy) as server, pytest.raises(RetryableError) as caught:
        ask(server, "gemini")
    assert caught.value.retry_after == 31
    later = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1))
    assert 3000 < (parse_retry_after(later) or 0) <= 3600
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [parse_retry_after(text) for text in ("7", "soon", None)] == [7, None, None]


def test_an_address_without_a_server():
    with pytest.raises(RetryableError) as caught:
        call("openai:m@http://127.0.0.1:9/v1", RequestSettings(), lambda it: it.ask(REQUEST))
    assert not caught.value.reached
    with Server(lambda call: ANSWER) as server, pytest.raises(AccessError, match="/v1"):
        call(f"openai:m@{server.url}", RequestSettings(), lambda it: it.ask(REQUEST))
    with Server(lambda call: ANSWER) as server, pytest.raises(AccessError, match="end before"):
        call(f"openai:m@{server.url}/v1/chat/completions", RequestSettings(), lambda it: it.ask(REQUEST))


# Opening.


def test_model_specs():
    assert parse_model_spec("openai:org/m:1@http://me:pw@host/v1") == ("openai", "org/m:1", "http://me:pw@host/v1")
    assert parse_model_spec("gemini:m") == ("gemini", "m", None)
    assert parse_model_spec("scenes:folder")[0] == "scenes"
    assert redact_password("openai:m@http://me:pw@host/v1") == "openai:m@http://host/v1"
    for spec in ("openai:@cf/org/m-1.5-7b", "openai:m@20240229", "gemini:m@001"):
        assert parse_model_spec(spec)[1:] == (spec.partition(":")[2], None)
    for address in (
        "localhost:8000/v1",
        "LOCALHOST/v1",
        "HTTP://host/v1",
        "me:pw@10.0.0.1:8000",
        "api.example.com/v1",
        "a:80",
    ):
        with pytest.raises(UserError, match="http://") as caught:
            parse_model_spec(f"openai:org/m@{address}")
        assert "pw" not in str(caught.value)
    for wrong in ("tiny", "mistral:tiny", "openai:", "openai", ""):
        with pytest.raises(UserError, match=f"'{wrong}'"):
            parse_model_spec(wrong)


@pytest.mark.parametrize(
    ("spec", "environment", "missing"),
    [
        ("openai:m", {}, "OPENAI_API_KEY"),
        ("openai:m", {"OPENAI_API_KEY": "  "}, "OPENAI_API_KEY"),
        ("gemini:m", {}, "GOOGLE_API_KEY"),
        ("gemini:m", {"GEMINI_API_KEY": "AIza\nAIza"}, "GEMINI_API_KEY"),
        ("openai:m", {"OPENAI_API_KEY": "sk-a”"}, "OPENAI_API_KEY"),
        ("openai:m@http://127.0.0.1/v1", {}, ""),
        ("openai:m", {"OPENAI_BASE_URL": "http://127.0.0.1/v1"}, ""),
        ("gemini:m", {"GOOGLE_API_KEY": "AIza"}, ""),
    ],
)
def test_keys(spec, environment, missing):
    """An own server needs none."""
    if missing:
        with pytest.raises(UserError, match=missing):
            open_provider(spec, RequestSettings(), environment)
    else:
        asyncio.run(open_provider(spec, RequestSettings(), environment).close())


def test_a_package_that_is_not_installed_is_named(monkeypatch, zygote):
    """And only when it is used."""
    assert zygote.imported == []

    def missing(*args: Any) -> Any:
        raise ImportError("no such package")

    monkeypatch.setitem(providers._BUILT_IN, "openai", missing)
    with pytest.raises(UserError, match=r"openai"):
        open_provider("openai:m", RequestSettings(), {})


# Images.


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


GREY = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)
COLOR = Image.fromarray(np.stack([GREY % 251, GREY // 16, GREY % 7 * 30], axis=-1).astype(np.uint8))
IMAGES = {
    "jpeg": (encoded(COLOR, "JPEG"), "image/jpeg"),
    "webp": (encoded(COLOR, "WEBP"), "image/webp"),
    **{mode: (encoded(COLOR.convert(mode), "PNG"), "image/png") for mode in ("RGBA", "LA", "P", "1", "L")},
    "16 bit": (encoded(Image.fromarray(GREY * 21), "PNG"), "image/png"),
    "CMYK JPEG": (encoded(COLOR.convert("CMYK"), "JPEG"), "image/png"),
    "CMYK TIFF": (encoded(COLOR.convert("CMYK"), "TIFF"), "image/png"),
    "gif": (encoded(COLOR, "GIF", save_all=True, append_images=[COLOR.rotate(90)]), "image/png"),
    "bmp": (encoded(COLOR, "BMP"), "image/png"),
    "16 bit TIFF": (encoded(Image.fromarray(GREY * 21), "TIFF"), "image/png"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_sent_in_a_format_that_every_service_accepts(name):
    """By content, whatever the name says; CMYK as colors of light."""
    content, kind = IMAGES[name]
    media_type, sent = encode_image(RequestImage("name.jpg", content))
    assert media_type == kind
    assert sent == content or not name.islower() or name in ("gif", "bmp")
    with Image.open(io.BytesIO(sent)) as image:
        assert (f"image/{image.format.lower()}", image.size) == (kind, (64, 48))
        assert image.mode != "CMYK"
        deep = image.mode.startswith("I")
        mean = np.asarray(image if deep else image.convert("RGB"), float).mean() / (257 if deep else 1)
    assert 20 < mean < 235


SCALED = [("jpeg", "JPEG"), ("webp", "PNG"), ("RGBA", "PNG"), ("CMYK JPEG", "PNG"), ("16 bit TIFF", "PNG")]


@pytest.mark.parametrize(("name", "kind"), SCALED)
def test_large_images_are_scaled_down(name, kind):
    """To the longest side, with what EXIF says about their orientation; a smaller one is sent as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(COLOR, "JPEG", exif=exif) if kind == "JPEG" else IMAGES[name][0]
    media_type, sent = encode_image(RequestImage("a", content), 16)
    with Image.open(io.BytesIO(sent)) as image:
        assert (image.format, media_type, image.size) == (kind, f"image/{kind.lower()}", (16, 12))
        assert image.getexif().get(0x0112) == (6 if kind == "JPEG" else None)
    assert encode_image(RequestImage("a", content), 64) == encode_image(RequestImage("a", content))
    assert images.estimate_tokens("gemini", 1500, 700, 750) == 258


@PROVIDERS
def test_the_media_type_is_sent(provider):
    with Server(lambda call: ANSWER) as server:
        ask(server, provider, dataclasses.replace(REQUEST, image=RequestImage("a.png", IMAGES["jpeg"][0])))
        body = json.dumps(server.calls[0].body)
    assert "image/jpeg" in body
    assert "image/png" not in body


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", b"<!DOCTYPE html><html></html>", encoded(COLOR, "PNG")[:200], encoded(COLOR, "JPEG")[:400]],
)
def test_broken_images_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnusableError) as caught:
        images.read_image(tmp_path, "a.png")
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "b.png").mkdir()
    for name in ("gone.png", "b.png"):
        with pytest.raises(UnusableError):
            images.read_image(tmp_path, name)


# Batches.


def submit_and_find(server: Server, folder: Path) -> tuple[str, str | None]:
    """Submit a batch to Gemini; return its name, and the one that is found by its label."""

    async def work(it: Any) -> tuple[str, str | None]:
        (folder / "requests.jsonl").write_text(it.encode_request("the key", REQUEST))
        return await it.submit(folder / "requests.jsonl", "our label"), await it.find_batch("our label")

    return call(spec_of(server, "gemini"), RequestSettings(), work)


@pytest.mark.parametrize("empty", [1, 2])
def test_empty_pages_are_not_the_end_of_geminis_list(monkeypatch, empty, tmp_path):
    usual, seen = Server.list_page, []

    def page(self: Server, provider: str, size: int, after: str) -> Any:
        seen.append(after)
        return ([], True) if len(seen) <= empty else usual(self, provider, size, "" if after == "next" else after)

    monkeypatch.setattr(Server, "list_page", page)
    with Server(lambda call: ANSWER) as server:
        name, found = submit_and_find(server, tmp_path)
    assert name == found


def test_a_file_larger_than_a_part_is_uploaded_in_parts(monkeypatch, tmp_path):
    from google.genai import _api_client

    monkeypatch.setattr(_api_client, "CHUNK_SIZE", 200)
    with Server(lambda call: ANSWER) as server:
        submit_and_find(server, tmp_path)
        assert server.steps[Step.CHUNK] > 2
        assert server.calls[0].images == [png()]

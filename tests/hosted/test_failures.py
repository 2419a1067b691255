"""What services send when something is wrong: sorted right, and said in their words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reverie_jax.hosted.interface import (
    AccessError,
    AnnotationError,
    RefusedError,
    RetryableError,
    UnusableError,
)
from tests.hosted.faults import Fault
from tests.hosted.helpers import secret_of
from tests.hosted.server import Server
from tests.hosted.test_providers import ANSWER, ask

pytestmark = pytest.mark.usefixtures("keys", "sdks")
ITEM, RUN, MINUTE = RefusedError, AccessError, RetryableError
TRIES = {ITEM: 1, UnusableError: 2, MINUTE: 3}
"""How often a request is sent, with two unusable replies or two retries."""
HALVES = ("broke off", "Gateway Time-out")
"""Of a reply that may be paid for, though it is worth another try: sent as seldom as if it were unusable."""


def tries_of(kind: type[AnnotationError], words: str) -> int:
    return TRIES[UnusableError if words in HALVES else kind]


def openai_error(message: Any, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


def google_error(code: int, message: str, quota: str = "") -> dict[str, Any]:
    details = [{"@type": "QuotaFailure", "violations": [{"quotaId": quota}]}, {"retryDelay": "0.4s"}]
    return {"error": {"code": code, "message": message, "details": details if quota else []}}


PLAN = "You exceeded your current quota, please check your plan and billing details."
STRICT = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
PAGE = b"<!DOCTYPE html><html><head><style>a {}</style><title>502</title></head><body><b>Bad gateway</b></body></html>"
FAILURES: list[tuple[str, int, Any, type[AnnotationError], str]] = [
    # Every request of the run: the key, the credit, the quota of the day, the model, the address.
    (
        "openai",
        401,
        openai_error("Incorrect API key: {start}***{end}, not {key}.", code="invalid_api_key"),
        RUN,
        "tiny: 401",
    ),
    ("openai", 402, openai_error("Insufficient Balance", code="invalid_request_error"), RUN, "Insufficient Balance"),
    ("openai", 200, openai_error("Insufficient credits", code=402), RUN, "402: Insufficient credits"),
    ("openai", 200, {"error": "Invalid API key"}, RUN, "Invalid API key"),
    ("openai", 429, openai_error(PLAN, type="insufficient_quota", code="insufficient_quota"), RUN, "current quota"),
    ("openai", 429, openai_error("Rate limit exceeded: free-models-per-day", code=429), RUN, "per-day"),
    ("openai", 403, openai_error("Country, region, or territory not supported"), RUN, "territory"),
    ("openai", 404, openai_error("The model `tiny` does not exist", code="model_not_found"), RUN, "does not exist"),
    ("openai", 404, {"detail": "Not Found"}, RUN, "Not Found"),
    ("openai", 400, openai_error("tiny is not a valid model ID", code=400), RUN, "not a valid model"),
    ("openai", 400, {"message": "model tiny does not support image input"}, RUN, "image input"),
    ("openai", 405, b"", RUN, "405"),
    ("openai", 200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}, RUN, "Unexpected endpoint"),
    ("openai", 200, b'data: {"choices": [{"delta": {"content": "y"}}]}\n\ndata: [DONE]\n', RUN, "streams"),
    ("openai", 400, {"error": "No models loaded. Please load a model"}, RUN, "No models loaded"),
    (
        "openai",
        400,
        {"object": "error", "message": "At most 0 image(s) may be provided in one request."},
        RUN,
        "0 image",
    ),
    ("openai", 500, openai_error("image input is not supported - hint: use a projector", code=500), RUN, "projector"),
    (
        "openai",
        400,
        {"code": "Arrearage", "message": "Access denied, your account is not in good standing."},
        RUN,
        "good",
    ),
    ("openai", 400, openai_error("模型不存在，请检查模型代码。", code="1211"), RUN, "模型不存在"),
    ("openai", 400, openai_error("Organization has been restricted."), RUN, "restricted"),
    ("openai", 401, {"message": "无效的令牌 {most}**"}, RUN, r"令牌 \*+$"),
    ("openai", 401, openai_error("Incorrect API key: {most}****{end}"), RUN, r"key: \*+$"),
    ("openai", 429, {"message": "今日额度已用完，请明天再试"}, RUN, "今日额度"),
    ("openai", 200, {"code": 1113, "msg": "余额不足", "success": False}, RUN, "余额不足"),
    ("openai", 200, {"choices": None, "base_resp": {"status_msg": "insufficient balance"}}, RUN, "insufficient"),
    ("openai", 200, {"object": "error", "message": "The model `tiny` does not exist", "code": 404}, RUN, "404: The"),
    ("openai", 200, {"detail": "Invalid token"}, RUN, "Invalid token"),
    ("gemini", 400, google_error(400, "API key not valid. Please pass a valid API key."), RUN, "not valid"),
    ("gemini", 400, google_error(400, "User location is not supported for the API use."), RUN, "location"),
    ("gemini", 404, google_error(404, "models/tiny is not found for API version v1beta"), RUN, "not found"),
    ("gemini", 429, google_error(429, f"{PLAN} limit: 0", "GenerateRequestsPerDayPerProject"), RUN, "PerDay"),
    ("gemini", 200, google_error(403, "Generative Language API has not been used"), RUN, "has not been used"),
    # This request alone.
    ("openai", 400, openai_error("Request of {key} could not be processed."), ITEM, "could not be processed"),
    ("openai", 400, openai_error("Rejected by our safety system", code="content_policy_violation"), ITEM, "safety"),
    ("openai", 403, openai_error("Your input was flagged", metadata={"reasons": ["violence"]}), ITEM, "violence"),
    ("openai", 413, b"<html><h1>413 Request Entity Too Large</h1></html>", ITEM, r"^413: Request .*--max-image-size"),
    ("openai", 413, b"<html><title>413</title><body>413</body></html>", ITEM, "^413: Request Entity Too Large: the"),
    ("openai", 413, b"413", ITEM, "--max-image-size"),
    (
        "gemini",
        413,
        b"<h1>413 Too much &amp; too big</h1><p>Sorry",
        ITEM,
        "^413: Too much & too big: .*--max-image-size",
    ),
    ("openai", 422, STRICT, ITEM, "body.seed: Extra inputs"),
    ("openai", 429, openai_error("Request too large on tokens per min (TPM): Limit 3, Requested 4"), ITEM, "Requested"),
    ("openai", 400, {"object": "error", "message": "This model's maximum context length is 4096"}, ITEM, "4096"),
    ("openai", 200, openai_error("Content flagged by moderation", code=403), ITEM, "flagged"),
    ("gemini", 400, google_error(400, "Unable to process input image."), ITEM, "input image"),
    ("gemini", 400, google_error(400, "The input token count exceeds the maximum number of tokens"), ITEM, "token"),
    # This minute.
    ("openai", 429, openai_error("Rate limit reached on requests per min (RPM)"), MINUTE, "RPM"),
    (
        "openai",
        429,
        openai_error(
            "Requests per min (RPM): Limit 3. Raise it by adding a payment method; add a payment or credit balance"
        ),
        MINUTE,
        "RPM",
    ),
    ("openai", 429, {"detail": "Too many requests"}, MINUTE, "429: Too many"),
    ("openai", 200, openai_error("Provider returned error", code=429), MINUTE, "Provider returned"),
    ("openai", 200, openai_error("Internal", metadata={"raw": '{"error": {"message": "busy {key}"}}'}), MINUTE, "busy"),
    ("openai", 200, openai_error("Internal", metadata={"raw": "[busy", "reasons": [{"a": 1}]}), MINUTE, "busy"),
    ("openai", 502, PAGE, MINUTE, "^502: Bad gateway"),
    (
        "openai",
        502,
        b"<!-- a --><title>x.org | 502: Bad gateway</title><h1>Ray 1</h1>",
        MINUTE,
        r"^502: x.org \| 502: Bad",
    ),
    ("openai", 503, b"upstream connect error", MINUTE, "^503: upstream connect error"),
    ("openai", 500, b"", MINUTE, "^500: Internal Server Error$"),
    ("openai", 504, b"<html><h1>504 Gateway Time-out</h1></html>", MINUTE, "Gateway Time-out"),
    ("openai", 503, {"error": "no healthy upstream"}, MINUTE, "no healthy upstream"),
    ("openai", 529, openai_error("Overloaded"), MINUTE, "529"),
    ("openai", 200, {"choices": []}, MINUTE, "no choices"),
    ("openai", 200, [], MINUTE, "response"),
    ("openai", 200, PAGE, MINUTE, "response"),
    ("openai", 200, b'{"choices": [{"message": {"content": "ye', MINUTE, "broke off"),
    ("gemini", 200, b'{"candidates": [{"content": {"parts": [{"te', MINUTE, "broke off"),
    ("gemini", 200, b"\xef\xbb\xbf [", MINUTE, "broke off"),
    ("gemini", 429, google_error(429, f"{PLAN} limit: 15", "GenerateRequestsPerMinute"), MINUTE, "PerMinute"),
    ("gemini", 503, google_error(503, "The model is overloaded. Please try again later."), MINUTE, "overloaded"),
    ("gemini", 500, PAGE, MINUTE, "Bad gateway"),
    ("gemini", 200, PAGE, MINUTE, "response"),
]


@pytest.mark.parametrize(("provider", "status", "body", "kind", "words"), FAILURES)
def test_failures(provider, status, body, kind, words):
    """Each is sorted right and said in the service's words, in one line, without the key."""
    secret = secret_of(provider)
    sent = (
        body
        if isinstance(body, bytes)
        else json.loads(
            json.dumps(body)
            .replace("{key}", secret)
            .replace("{most}", secret[:-3])
            .replace("{start}", secret[:8])
            .replace("{end}", secret[-4:])
        )
    )
    with Server(lambda call: ANSWER, lambda call: (status, sent)) as server:
        with pytest.raises(kind, match=words) as caught:
            ask(server, provider)
        assert len(server.calls) == 1
    assert type(caught.value) is kind
    assert not any(part in str(caught.value) for part in (secret, secret[:8], secret[-4:], "\n", "<"))
    if status == 200:
        assert caught.value.reply is not None
        assert secret not in caught.value.reply.text


def test_a_service_that_asks_to_wait_for_hours_ends_the_run():
    with Server(lambda call: ANSWER, lambda call: Fault.RATE_LIMIT_AFTER, retry_after=86_400.0) as server:
        with pytest.raises(AccessError, match="24 hours"):
            ask(server, "openai")
        with pytest.raises(AccessError, match="24 hours"):
            ask(server, "gemini")


PARAMETERS = [
    (
        {"temperature": 0.2},
        "Unsupported value: 'temperature' does not support 0.2 with this model.",
        "--temperature none",
    ),
    (
        {},
        "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
        "--no-structured",
    ),
    ({"max_new_tokens": 9}, "max_completion_tokens is too large: 9", "--max-new-tokens"),
]


@pytest.mark.parametrize(("settings", "message", "option"), PARAMETERS)
def test_a_refused_parameter_names_its_option(settings, message, option):
    """It would be refused with every request; where it was not sent, the words mean this request."""
    with Server(lambda call: ANSWER, lambda call: (400, openai_error(message))) as server:
        with pytest.raises(AccessError, match=option):
            ask(server, "openai", **settings)
        with pytest.raises(RefusedError):
            ask(server, "openai", structured=False)
        assert len(server.calls) == 2


@pytest.mark.parametrize("known", ["max_completion_tokens", "max_tokens", "neither"])
def test_the_limit_of_a_reply_is_sent_under_the_name_that_a_server_knows(known):
    def plan(call: Any) -> Any:
        strange = [name for name in ("max_completion_tokens", "max_tokens") if name in call.body and name != known]
        detail = [{"loc": ["body", *strange], "msg": "Extra inputs are not permitted"}]
        return (422, {"object": "error", "message": {"detail": detail}}) if strange else None

    with Server(lambda call: ANSWER, plan) as server:
        assert ask(server, "openai", max_new_tokens=9).text == ANSWER
        assert [server.calls[-1].body.get(name) for name in ("max_completion_tokens", "max_tokens")] == [
            9 if known == "max_completion_tokens" else None,
            9 if known == "max_tokens" else None,
        ]

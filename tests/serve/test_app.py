"""The endpoint as clients see it: OpenAI's SDK, our own client of hosted models, and others."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import huggingface_hub
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import ask as open_questions
from reverie_jax.hosted.interface import Request, RequestImage, RequestSettings
from reverie_jax.hosted.providers import open_provider
from reverie_jax.serve import chat
from tests.serve.helpers import IMAGE, NAME, QUESTIONS, ask, data_url, png


def create(client, text="Describe the image.", encoded=IMAGE, **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(model=NAME, messages=ask(text, encoded), **options)


def test_a_completion(client, alone, engine):
    found = create(client, max_tokens=4)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone(QUESTIONS[0], IMAGE, 4))
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    prompt = len(engine.encoder(open_questions(IMAGE, QUESTIONS[0]).conversations[0]))
    assert (found.model, found.object) == (NAME, "chat.completion")
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": prompt,
        "completion_tokens": 4,
        "total_tokens": prompt + 4,
    }
    ended = create(client, QUESTIONS[1], max_tokens=200)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].message.content == alone(QUESTIONS[1], IMAGE, 200)
    assert create(client, QUESTIONS[1], b"").choices[0].message.content == alone(QUESTIONS[1])


def test_a_conversation(client, engine, alone):
    """Later turns, with the image in the first one: the conversation is that of the engine's."""
    first = alone(QUESTIONS[1], IMAGE)
    messages = [*ask(QUESTIONS[1], IMAGE), {"role": "assistant", "content": first}, *ask(QUESTIONS[2])]
    found = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_completion_tokens=12)
    body = chat.ChatRequest.model_validate({"model": NAME, "messages": messages})
    conversation, urls = chat._conversation(body.messages)
    assert [turn.text for turn in conversation.turns] == [f"<image>\n{QUESTIONS[1]}", first, QUESTIONS[2]]
    assert urls == [data_url(IMAGE)]
    expected = engine.answer([ImageQuestions("x", IMAGE, [(0, conversation)])], max_new_tokens=12)
    assert found.choices[0].message.content == expected[0]


def test_samples_are_the_engines(client, alone):
    options = {"temperature": 1.2, "top_p": 0.9, "seed": 5, "n": 3}
    found = [choice.message.content for choice in create(client, **options).choices]
    del options["n"]
    assert found == [alone(QUESTIONS[0], IMAGE, index=index, **options) for index in range(3)]
    assert len(set(found)) > 1
    assert create(client, temperature=1e-30).choices[0].message.content == alone(QUESTIONS[0], IMAGE)
    unseeded = [create(client, temperature=2).choices[0].message.content for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_text_ends_an_answer(client, alone):
    whole = alone(QUESTIONS[0], IMAGE)
    third, fourth = whole.split()[2:4]
    for stop in (third, ["no such text", f" {fourth}"], [f"{third} {fourth[0]}", fourth]):
        words = [stop] if isinstance(stop, str) else stop
        found = create(client, stop=stop)
        assert found.choices[0].message.content == whole[: min(whole.find(w) for w in words if w in whole)].rstrip()
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 24


def test_a_stream_is_the_whole(client):
    options = {"n": 2, "temperature": 0.8, "seed": 3, "logprobs": True, "top_logprobs": 2, "stop": " on the"}
    whole = create(client, **options)
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        parts = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
        listed = [one for part in parts if part.logprobs for one in part.logprobs.content]
        assert listed == choice.logprobs.content
        assert "".join(one.token for one in listed).strip().startswith(choice.message.content)
        for one in listed:
            assert bytes(one.bytes).decode() == one.token
            assert len(one.top_logprobs) == 2
            assert one.top_logprobs[0].logprob >= max(one.logprob, one.top_logprobs[1].logprob)
    assert len(chunks) > 6


def test_many_clients_at_once(server, alone):
    """Pictures and questions from many clients in any order: each answer is the one that is given alone."""
    cases = [(text, png(number % 5) if number % 7 else b"") for number in range(12) for text in QUESTIONS]

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(text, encoded):
                options = {"temperature": 0, "max_tokens": 24, "messages": ask(text, encoded)}
                found = await client.chat.completions.create(model=NAME, **options)
                return found.choices[0].message.content

            return await asyncio.gather(*(one(*case) for case in cases))

    assert asyncio.run(main()) == [alone(*case) for case in cases]


def test_our_own_client(server, alone):
    """`reverie annotate` and `reverie judge` ask this way."""
    settings = RequestSettings(max_new_tokens=200, temperature=0.0)

    async def main():
        provider = open_provider(f"openai:{NAME}@{server.url}/v1", settings, {})
        try:
            return await provider.ask(Request("positive", RequestImage("x.png", IMAGE), {}, QUESTIONS[1]))
        finally:
            await provider.close()

    reply = asyncio.run(main())
    assert reply.text == alone(QUESTIONS[1], IMAGE, 200)


def test_other_clients(server, alone, monkeypatch):
    """huggingface_hub's client, and curl."""
    expected, messages = alone(QUESTIONS[0], IMAGE), ask(QUESTIONS[0], IMAGE)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    client = huggingface_hub.InferenceClient(base_url=f"{server.url}/v1", api_key="none")
    options = {"messages": messages, "temperature": 0, "max_tokens": 24}
    assert client.chat_completion(model=NAME, **options).choices[0].message.content == expected
    parts = client.chat_completion(model=NAME, stream=True, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    if shutil.which("curl"):
        words = ["curl", "-s", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
        body = json.dumps({"model": NAME, **options}).encode()
        found = subprocess.run(words, input=body, capture_output=True, check=True).stdout
        assert json.loads(found)["choices"][0]["message"]["content"] == expected


def test_lengths(engine):
    """The service's where a request names none, and less where the context ends; the request's own otherwise."""
    long = "cup " * 985
    prompt = len(engine.encoder(open_questions(None, long).conversations[0]))
    assert 1024 - 48 < prompt < 1024
    for text, asked, expected in (
        ("a", {}, 48),
        ("a", {"max_tokens": 100}, 100),
        ("a", {"max_tokens": 9, "max_completion_tokens": 5}, 5),
        (long, {}, 1024 - prompt),
    ):
        request = chat.ChatRequest.model_validate({"model": NAME, "messages": ask(text), **asked})
        assert chat.prepare(request, engine.processor, context=1024, max_new_tokens=48).longest == expected


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_text_replaces_the_templates(engine, role):
    processor = engine.processor.override("vicuna_v1")
    template = processor.encoder.template
    options = {"context": 1024, "max_new_tokens": 8}
    plain = chat.prepare(chat.ChatRequest(model=NAME, messages=ask("Is it?", IMAGE)), processor, **options)
    for text in ("Be brief.", "", template.sentence):
        messages = [{"role": role, "content": text}, *ask("Is it?", IMAGE)]
        found = chat.prepare(
            chat.ChatRequest.model_validate({"model": NAME, "messages": messages}), processor, **options
        )
        expected = f"{text or template.sentence} USER: <image>\nIs it? ASSISTANT:"
        ids = processor.encoder.tokenizer(expected.replace("<image>", "<image>" * processor.encoder.patches))[
            "input_ids"
        ]
        assert found.tokens.ids.tolist() == ids
        assert (found.tokens.ids.tolist() == plain.tokens.ids.tolist()) == (text != "Be brief.")


def test_models(server, client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "reverie-jax"
    with pytest.raises(openai.NotFoundError, match=NAME):
        client.models.retrieve("owner/other")
    assert server.send("GET", "/health")[::2] == (200, {"status": "ok"})


def test_metrics(server):
    before, _, _ = server.chat({"messages": ask("Is there a cup?"), "max_tokens": 3})
    status, headers, text = server.send("GET", "/metrics")
    assert (before, status) == (200, 200)
    assert headers["content-type"].startswith("text/plain")
    found = {sample.name: sample.value for one in text_string_to_metric_families(text) for sample in one.samples}
    assert found["reverie_requests_in_flight"] == found["reverie_answers_waiting"] == 0
    assert found["reverie_completion_tokens_total"] > 0
    assert found["reverie_prompt_tokens_total"] >= found["reverie_prefilled_tokens_total"] > 0

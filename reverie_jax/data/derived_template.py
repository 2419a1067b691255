"""A checkpoint's own chat template in Jinja as a `Template`: found by rendering, and used only if it renders the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.templates import CHECKPOINT, TEMPLATES, Template
from reverie_jax.data.tokenization import Encoder, end_token

_MARKS = ("Q1q", "A1a", "Q2q", "A2a", "Q3q", "A3a")
_PADDED = tuple(f" {mark} " for mark in _MARKS)


def derive_template(tokenizer: Any, jinja: str) -> Template:
    """Return the template that renders every conversation as a chat template in Jinja does.

    Where the Jinja ends an answer with white space alone, as llava-1.5-hf's own does, the tokenizer's end of sequence takes
    its place: models were trained with it, and without one an answer would never end.

    Args:
        tokenizer: The checkpoint's tokenizer.
        jinja: The chat template.

    Returns:
        One of `TEMPLATES` if it is the same; or else a template with the name `CHECKPOINT`.

    Raises:
        ValueError: It fails, or renders some conversations in a way that a `Template` cannot.
    """
    render = _renderer(tokenizer, jinja)
    derived = dataclasses.replace(_cut(tokenizer, render), jinja=jinja)
    bare = dataclasses.replace(derived, system=derived.system.removeprefix(tokenizer.bos_token or ""))
    problem = _difference(tokenizer, bare, render)
    if problem and bare != derived:  # BOS in the text and BOS by the tokenizer give other ids
        bare, problem = derived, _difference(tokenizer, derived, render)
    if problem:
        raise ValueError(problem)
    end = bare.end or ""
    ended = dataclasses.replace(bare, end=None if end == tokenizer.eos_token or not end.strip() else end)
    return next((known for known in TEMPLATES.values() if known and _is_same(known, ended)), ended)


def _is_same(known: Template, derived: Template) -> bool:
    plain = known.style == "plain"  # it drops the questions
    named = {name: getattr(known, name) for name in ("name", "style", "sentence", "jinja")}
    return not plain and dataclasses.replace(derived, **named) == known


def _renderer(tokenizer: Any, jinja: str) -> Callable[[Conversation], str]:
    """Return the function that renders a conversation; its texts are lists of parts as far as the template takes them."""

    def render(conversation: Conversation, parts: Sequence[str] = ()) -> str:
        messages = []
        for turn in conversation.turns:
            text = turn.text.removeprefix(f"{IMAGE}\n")
            image = [{"type": "image"}] if text != turn.text else []
            content = [*image, {"type": "text", "text": text}] if turn.role in parts else turn.text
            messages.append({"role": turn.role, "content": content})
        rendered: str = tokenizer.apply_chat_template(
            messages, chat_template=jinja, add_generation_prompt=conversation.is_open, tokenize=False
        )
        if (IMAGE in conversation.turns[0].text and IMAGE not in rendered) or "'type':" in rendered:
            raise ValueError("it shows no image")
        return rendered

    for parts in (("user", "assistant"), ("user",)):
        with contextlib.suppress(Exception):  # a template can raise anything
            render(_conversation(_MARKS[:2], image=True), parts)
            return functools.partial(render, parts=parts)
    return render


def _conversation(texts: Sequence[str], image: bool = False) -> Conversation:
    first = f"{IMAGE}\n{texts[0]}" if image else texts[0]
    turns = (Turn(("user", "assistant")[n % 2], text) for n, text in enumerate((first, *texts[1:])))
    return Conversation(tuple(turns), (0,) if image else ())


def _cut(tokenizer: Any, render: Callable[[Conversation], str]) -> Template:
    """Return the template by what stands around the texts of two exchanges; whether it is right is not known yet."""
    before, answered, between, _, after = _around(render(_conversation(_MARKS[:4])), _MARKS[:4])
    _, assistant = _around(render(_conversation(_MARKS[:1])), _MARKS[:1])
    shown, text = render(_conversation(_MARKS[:1], image=True)).split(IMAGE, 1)
    if not text.startswith(f"\n{_MARKS[0]}"):
        raise ValueError(
            f"it writes {text.split(_MARKS[0])[0]!r} instead of a newline between an image and its question"
        )
    text_only = before.removeprefix(shown)
    user = between.removesuffix(text_only)
    # How much of the text between two exchanges is the end of the first: at least what ends the last one, or its end token.
    if user.startswith(after):
        least = len(after)
    elif (token := end_token(tokenizer, after)) and token in user:
        least = user.find(token) + len(token)
    else:
        raise ValueError(f"it ends the last answer with {after!r}, and others with {between!r}")
    cut = next(n for n in range(least, len(user) + 1) if shown.endswith(user[n:]))
    prefix = answered.removeprefix(assistant) if answered.startswith(assistant) else None
    if prefix is None and answered.split() != assistant.split():
        raise ValueError(f"it asks for an answer with {assistant!r}, but writes {answered!r} before one")
    (question, answer), (wide_question, wide_answer) = _MARKS[:2], _PADDED[:2]
    padded = {"user": (wide_question, answer), "assistant": (question, wide_answer), "image": (wide_question, answer)}
    return Template(
        name=CHECKPOINT,
        style="spans",
        system=shown.removesuffix(user[cut:]),
        user=user[cut:],
        assistant=assistant,
        answer_prefix=prefix or "",
        end=user[:cut],
        answered=answered if prefix is None else None,
        text_only=text_only,
        stripped=tuple(
            name
            for name, texts in padded.items()
            if render(_conversation(texts, name == "image")) == render(_conversation(_MARKS[:2], name == "image"))
        ),
    )


def _around(text: str, marks: Sequence[str]) -> list[str]:
    pieces = re.split("|".join(marks), text)
    if re.findall("|".join(marks), text) != list(marks):
        raise ValueError(f"it does not write each turn once, in order: {text!r}")
    return pieces


def _difference(tokenizer: Any, template: Template, render: Callable[[Conversation], str]) -> str:
    """Return what a chat template renders otherwise than ours; empty if nothing."""
    encoder = Encoder(tokenizer, template, patches=1, image_token_id=-1)
    bos = tokenizer.bos_token or ""
    for size, marks, image in itertools.product(range(1, len(_MARKS) + 1), (_MARKS, _PADDED), (False, True)):
        conversation = _conversation(marks[:size], image)
        ours, spans = encoder.render(conversation)
        theirs = render(conversation)
        text = theirs if ours.startswith(bos) else theirs.removeprefix(bos)
        # What follows the end of the last answer is neither taught nor asked.
        if text != ours if conversation.is_open else not text.startswith(ours[: spans[-1][1]].rstrip()):
            return f"it renders {text!r}, and not {ours!r}, as its other turns suggest"
        if conversation.is_open and not image:
            ids = tokenizer(theirs, add_special_tokens=not bos or not theirs.startswith(bos))["input_ids"]
            if list(encoder(conversation).ids) != list(ids):
                return f"the tokenizer's beginning of sequence and that of {theirs!r} differ"
    return ""

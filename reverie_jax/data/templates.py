"""Chat templates: what stands around the words of a turn. The sentences are those that the weights were tuned behind:
parts of a format, like a magic number.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from reverie_jax.errors import UserError

IMAGE = "<image>"
Style = Literal["two", "single", "phi3", "plain"]


@dataclasses.dataclass(frozen=True)
class Template:
    """How turns become text: `{user}{text}{assistant}`, then `{answer_prefix}{answer}{end}`, again and again.

    Attributes:
        style: by which rule original LLaVA masked its training samples (`data.llava_tokenization`).
        system: text before the first turn.
        user: what introduces a user's turn.
        assistant: what follows it; the generation prompt ends here.
        answer_prefix: what stands between `assistant` and the answer.
        end: what closes an answer; None for the tokenizer's end-of-sequence token.
        sentence: the system's words alone, as the reference's training form wants them.
    """

    name: str
    style: Style
    system: str
    user: str
    assistant: str
    answer_prefix: str = " "
    end: str | None = None
    sentence: str = ""


def _sentence(who: str) -> str:
    return (
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )


def _two(name: str, who: str) -> Template:
    return Template(name, "two", _sentence(who) + " ", "USER: ", " ASSISTANT:", sentence=_sentence(who))


_LLAVA_V0 = Template(
    "llava_v0", "single", _sentence("human") + "###", "Human: ", "###Assistant:", end="###", sentence=_sentence("human")
)


def v0(question: str, answer: str) -> Template:
    """LLaVA's `v0`: `llava_v0` behind one example dialogue. The published one is third-party text and not shipped here."""
    example = f"Human: {question}###Assistant: {answer}###"
    return dataclasses.replace(_LLAVA_V0, name="v0", system=_LLAVA_V0.system + example)


TEMPLATES: dict[str, Template | None] = {
    "llava-hf": Template("llava-hf", "two", "", "USER: ", " ASSISTANT:"),
    "vicuna_v1": _two("vicuna_v1", "user"),
    "llava_v1": _two("llava_v1", "human"),
    "llava_v0": _LLAVA_V0,
    "v0": None,  # see `v0`
    "plain": Template("plain", "plain", "", "", "", answer_prefix="", end="\n"),
    "phi3_instruct": Template(
        "phi3_instruct",
        "phi3",
        "<|system|>\nYou are a helpful AI assistant.<|end|>",
        "\n<|user|>\n",
        "<|end|>\n<|assistant|>\n",
        answer_prefix="",
        end="<|end|>",
        sentence="<|system|>\nYou are a helpful AI assistant.",
    ),
}


def template(name: str) -> Template:
    """The template of that name.

    Raises:
        UserError: there is none of that name, or it needs an example dialogue.
    """
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}; known: {', '.join(TEMPLATES)}")
    found = TEMPLATES[name]
    if found is None:
        raise UserError(
            f"template {name!r} begins with an example dialogue that is third-party text and not shipped; put it as"
            ' {"question": …, "answer": …} into template_example.json in the checkpoint folder, or use v0(question, answer)'
        )
    return found


def jinja(shown: Template) -> str:
    """The template as transformers and vLLM take it (`chat_template.jinja`), pictures first in a user's turn."""
    said = "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    said += "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    said += "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    end = "{{ eos_token }}" if shown.end is None else _quoted(shown.end)
    answer = _quoted(shown.assistant + shown.answer_prefix) + "{% generation %}" + said + end + "{% endgeneration %}"
    return (
        f"{_quoted(shown.system)}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{_quoted(shown.user)}{said}"
        "{% elif message['role'] == 'assistant' %}"
        f"{answer}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        f"{_quoted(shown.assistant)}"
        "{% endif %}"
    )


def _quoted(text: str) -> str:
    return "{{ '" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "' }}" if text else ""

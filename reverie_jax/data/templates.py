"""Chat templates: the text around the turns of a conversation.

The texts must not change: checkpoints were tuned with exactly these.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from reverie_jax.errors import UserError

IMAGE = "<image>"
CHECKPOINT = "checkpoint"
"""Name of a template that is none of `TEMPLATES`: it is derived from the checkpoint's own chat template in Jinja."""
Style = Literal["two", "single", "phi3", "plain", "llama_2", "llama3", "moe", "minigpt4", "mplug_owl", "spans"]


@dataclasses.dataclass(frozen=True)
class Template:
    """Renders each exchange as `{user}{question}{assistant}{answer_prefix}{answer}{end}`, after `{system}`.

    Attributes:
        name: name in `TEMPLATES`, or `CHECKPOINT`.
        style: rule by which original LLaVA and its relatives mask training samples (`data.llava_tokenization`,
            `data.sister_tokenization`); "spans" if none is followed: answers and their ends are supervised.
        system: text before the first turn.
        user: text before a question.
        assistant: text after a question; the generation prompt ends here.
        answer_prefix: text between `assistant` and the answer.
        end: text after an answer; None for the tokenizer's end-of-sequence token.
        sentence: the system message alone, as original LLaVA's training code uses it.
        answered: text between a question and its answer, where it is not `{assistant}{answer_prefix}`.
        text_only: text before a question that shows no image.
        stripped: roles whose texts are stripped of white space; with "image", so is the text after an image.
        jinja: the chat template that this one was derived from.
        image: how a question shows its images: `{}` is the question, and `<image>` before or after it one image. Without
            `{}`, each marker is replaced where it is; if empty, it stays as it is.
        tokens: special tokens of the text. White space around them is dropped, as transformers before 4.34 did.
    """

    name: str
    style: Style
    system: str
    user: str
    assistant: str
    answer_prefix: str = " "
    end: str | None = None
    sentence: str = ""
    answered: str | None = None
    text_only: str = ""
    stripped: tuple[str, ...] = ()
    jinja: str | None = None
    image: str = ""
    tokens: tuple[str, ...] = ()


def _sentence(speaker: str) -> str:
    return (
        f"A chat between a curious {speaker} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {speaker}'s questions."
    )


def _two(name: str, speaker: str, style: Style = "two") -> Template:
    return Template(name, style, _sentence(speaker) + " ", "USER: ", " ASSISTANT:", sentence=_sentence(speaker))


def _llama3(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_LLAVA_V0 = Template(
    "llava_v0", "single", _sentence("human") + "###", "Human: ", "###Assistant:", end="###", sentence=_sentence("human")
)


_MINIGPT4 = Template(
    "minigpt4",
    "minigpt4",
    "###",
    "Human: ",
    " ###Assistant: ",
    answer_prefix="",
    end="###",
    image=f"<Img>{IMAGE}</Img> {{}}",
)
_MPLUG_OWL = Template(
    "mplug_owl",
    "mplug_owl",
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "\nHuman: ",
    "\nAI: ",
    answer_prefix="",
    image=f"{IMAGE}\nHuman: {{}}",
)
_MUFFIN = Template(
    "muffin",
    "spans",
    _sentence("human") + "\n\n###",
    " Human: ",
    "\n### Assistant:",
    end="\n###",
    sentence=_sentence("human"),
    image=f"<im_start>{IMAGE}<im_end>",
    tokens=("<im_start>", "<im_end>"),
)


def v0_template(question: str, answer: str) -> Template:
    """Return LLaVA's `v0` template: `llava_v0` after one example dialogue. The published dialogue is third-party text."""
    example = f"Human: {question}###Assistant: {answer}###"
    return dataclasses.replace(_LLAVA_V0, name="v0", system=_LLAVA_V0.system + example)


TEMPLATES: dict[str, Template | None] = {
    "llava-hf": Template("llava-hf", "two", "", "USER: ", " ASSISTANT:"),
    "vicuna_v1": _two("vicuna_v1", "user"),
    "llava_v1": _two("llava_v1", "human"),
    "llava_v0": _LLAVA_V0,
    "v0": None,  # see `v0_template`
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
    # LLaVA-pp's for Llama-3. Its text begins with BOS, and the tokenizer adds one: samples begin with two.
    "llama3": Template(
        "llama3",
        "llama3",
        f"<|begin_of_text|>{_llama3('system')}{_sentence('user')}<|eot_id|>",
        _llama3("user"),
        f"<|eot_id|>{_llama3('assistant')}",
        answer_prefix="",
        end="<|eot_id|>",
        sentence=f"<|begin_of_text|>{_llama3('system')}{_sentence('user')}",
    ),
    "chatml": Template(
        "chatml",
        "spans",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        answer_prefix="",
        end="<|im_end|>\n",
    ),
    "mistral": Template("mistral", "llama_2", "", "[INST] ", " [/INST]", end=" </s>"),
    "moe_llava": _two("moe_llava", "user", "moe"),
    "minigpt4": _MINIGPT4,
    "minigpt4_eval": dataclasses.replace(
        _MINIGPT4,
        name="minigpt4_eval",
        style="spans",
        system="Give the following image: <Img>ImageContent</Img>. "
        "You will be able to see the image once I provide it to you. Please answer my questions.###",
        assistant="###Assistant:",
        answer_prefix=" ",
    ),
    "mplug_owl": _MPLUG_OWL,
    "mplug_owl_eval": dataclasses.replace(
        _MPLUG_OWL,
        name="mplug_owl_eval",
        system="The following is a conversation between a curious human and AI. "
        "The AI gives helpful, detailed, and polite answers to the human's questions.",
        assistant="\nAI:",
        answer_prefix=" ",
    ),
    "muffin": _MUFFIN,
    "muffin_reference": dataclasses.replace(_MUFFIN, name="muffin_reference", style="single"),
    # The prompt does not name the assistant: the model does, as `muffin_reference` teaches it to.
    "muffin_eval": dataclasses.replace(
        _MUFFIN,
        name="muffin_eval",
        system=_sentence("human") + "\n###",
        user="Human: ",
        assistant="\n###",
        answer_prefix="Assistant: ",
        image=f"{{}}\n{_MUFFIN.image}",
    ),
}


def find_template(name: str) -> Template:
    """Return the template of that name.

    Raises:
        UserError: the name is unknown, or the template needs an example dialogue.
    """
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}; choose from {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    if template is None:
        raise UserError(
            f"template {name!r} needs an example dialogue, which is third-party text and not included; add"
            ' {"question": …, "answer": …} as template_example.json to the checkpoint folder, or use v0_template'
        )
    return template


def place_images(template: Template, question: str) -> str:
    """Return a question with its images where and how the template shows them."""
    count = question.count(IMAGE)
    if not template.image or not count:
        return question
    if "{}" not in template.image:
        return question.replace(IMAGE, template.image)
    before, after = template.image.split("{}")
    return before * count + re.sub(f"{IMAGE}\n|\n?{IMAGE}", "", question) + after * count


def to_jinja(template: Template, *, before: str = "", after_image: str = "") -> str:
    """Return the template in the form of transformers and vLLM (`chat_template.jinja`), a user turn's images first.

    That of a checkpoint is returned as it was.

    Args:
        template: the template.
        before: white space before everything.
        after_image: white space after each image, before the line break.
    """
    if template.jinja is not None:
        return template.jinja
    layout = template.image or f"{IMAGE}{after_image}\n{{}}"
    images = [
        "{% for part in message['content'] if part['type'] == 'image' %}" + _quoted(text) + "{% endfor %}"
        if text
        else ""
        for text in (layout if "{}" in layout else layout + "\n{}").split("{}")
    ]
    content = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + images[0]
    content += "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    content += images[1] + "{% endif %}"
    end = "{{ eos_token }}" if template.end is None else _quoted(template.end)
    answer = (
        _quoted(template.assistant + template.answer_prefix)
        + "{% generation %}"
        + content
        + end
        + "{% endgeneration %}"
    )
    return (
        f"{_quoted(before + template.system)}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{_quoted(template.user)}{content}"
        "{% elif message['role'] == 'assistant' %}"
        f"{answer}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        f"{_quoted(template.assistant)}"
        "{% endif %}"
    )


def _quoted(text: str) -> str:
    return "{{ '" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "' }}" if text else ""

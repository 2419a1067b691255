"""Which chat template a checkpoint was tuned with: the one that is named, or the one that its files make certain."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.templates import IMAGE, TEMPLATES, Template, find_template, v0_template
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.models.checkpoints.components import ADAPTER_CONFIG, Component
from reverie_jax.models.checkpoints.families import repository_name
from reverie_jax.models.checkpoints.files import read_json
from reverie_jax.models.config import VLMConfig

_log = logging.getLogger(__name__)

TEMPLATE_EXAMPLE = "template_example.json"
"""File of a checkpoint folder that holds the example dialogue of the template `v0`."""

_REMEDY = (
    f'choose the one it was tuned with by --template (in Python, template=) or as "reverie_template" in config.json: '
    f"{', '.join(TEMPLATES)}"
)
_LLAMA_2 = re.compile("llama-?2")
_QUESTION = "What is it?"


def choose_template(
    config: VLMConfig, tokenizer: Any, main: Component, others: Sequence[Component] = (), name: str | None = None
) -> Template:
    """Return the chat template of a checkpoint.

    Args:
        config: The architecture, whose `template` holds where nothing else does.
        tokenizer: The checkpoint's tokenizer.
        main: The checkpoint.
        others: Its components.
        name: Of the template to use in any case; a warning says if the checkpoint's own is known and another.

    Raises:
        CheckpointError: The checkpoint's is not supported or not certain, or does not fit the tokenizer.
        UserError: The name is unknown, or the template needs an example dialogue.
    """
    if not name:
        return _recognize(config, tokenizer, main, others)
    template = _named(name, main.path)
    _check_end(template, tokenizer, main.path)
    with contextlib.suppress(CheckpointError):
        own = _recognize(config, tokenizer, main, others)
        if own.name != template.name:
            _log.warning("%s: template %s instead of its own, %s", main.path, template.name, own.name)
    return template


def read_example_template(folder: Path) -> Template | None:
    """Return the template `v0` with the example dialogue in a checkpoint folder, or None without one.

    Raises:
        UserError: The file is invalid.
    """
    path = folder / TEMPLATE_EXAMPLE
    if not path.exists():
        return None
    raw = read_json(path)
    try:
        return v0_template(raw["question"], raw["answer"])
    except (KeyError, TypeError) as error:
        raise UserError(f'{path}: must hold {{"question": …, "answer": …}} ({error!r})') from None


def _named(name: str, folder: Path) -> Template:
    example = read_example_template(folder) if name == "v0" else None
    return example or find_template(name)


def _recognize(config: VLMConfig, tokenizer: Any, main: Component, others: Sequence[Component]) -> Template:
    """Return the template that a checkpoint's files make certain.

    Raises:
        CheckpointError: They don't.
    """
    if "reverie_template" in main.config and config.template not in TEMPLATES:
        raise CheckpointError(
            f"{main.config_path}: unknown reverie_template {config.template!r}; must be one of {', '.join(TEMPLATES)}"
        )
    if (example := read_example_template(main.path)) is not None:
        return example
    if main.format == "orbax" or "reverie_template" in main.config:
        return find_template(config.template)
    if main.format == "llava-hf" and (found := read_chat_template(main.path)) is not None:
        path, chat_template = found
        template = _by_prompt(_open_prompt(tokenizer, chat_template, path), path)
    else:
        path = main.path
        _check_not_llama_2(tokenizer, main, others)
        if config.template != "phi3_instruct" and tokenizer.eos_token != "</s>":
            raise CheckpointError(
                f"{path}: no chat template, and answers end with {tokenizer.eos_token!r}, not with Vicuna's '</s>';"
                f" {_REMEDY}"
            )
        template = find_template(config.template)
    _check_end(template, tokenizer, path)
    return template


def _by_prompt(prompt: str, path: Path) -> Template:
    for template in TEMPLATES.values():
        if template is not None and template.style != "plain" and prompt == _prompt(template):
            return template
    raise CheckpointError(f"{path}: the chat template's prompt {prompt!r} is not supported; {_REMEDY}")


def _prompt(template: Template) -> str:
    return f"{template.system}{template.user}{IMAGE}\n{_QUESTION}{template.assistant}"


def _check_end(template: Template, tokenizer: Any, path: Path) -> None:
    """Refuse a template whose end of answers is a token that the tokenizer lacks."""
    if (template.end or "").startswith("<|") and template.end not in tokenizer.get_vocab():
        raise CheckpointError(
            f"{path}: template {template.name} ends answers with {template.end!r}, which the tokenizer lacks; {_REMEDY}"
        )


def _check_not_llama_2(tokenizer: Any, main: Component, others: Sequence[Component]) -> None:
    """Refuse a LLaVA on Llama-2-chat: by its files it is like one on Vicuna, but it was mostly tuned with another template.

    Original LLaVA chooses its template `llava_llama_2` by the model's name alone.
    """
    said = next((name for name in _names(main, others) if _LLAMA_2.search(name.lower())), None)
    if said is None and "[INST]" in str(getattr(tokenizer, "chat_template", None) or ""):
        said = "a chat template with [INST]"
    if said is not None:
        raise CheckpointError(
            f"{main.path}: made from Llama-2-chat ({said}), with which original LLaVA uses its template llava_llama_2; that"
            f" one is not supported. If it was tuned with another, {_REMEDY}"
        )


def _names(main: Component, others: Sequence[Component]) -> Iterator[str]:
    """Yield the names by which a checkpoint and its components say what they were made from."""
    for part in (main, *(other for other in others if other.format != "clip")):
        yield repository_name(part.path)
        yield repository_name(str(part.config.get("_name_or_path") or ""))
        if (path := part.path / ADAPTER_CONFIG).exists():
            yield repository_name(str(read_json(path).get("base_model_name_or_path") or ""))


def read_chat_template(folder: Path) -> tuple[Path, str] | None:
    """Return the chat template that transformers' processor uses, and its file; or else the tokenizer's.

    Raises:
        CheckpointError: Files of the processor differ; which one counts depends on the version of transformers.
    """
    found = dict(_processor_templates(folder))
    if len(set(found.values())) > 1:
        names = " and ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: {names} hold different chat templates; remove one, or {_REMEDY}")
    return next(iter(found.items()), None) or _template_in(folder / "tokenizer_config.json")


def _processor_templates(folder: Path) -> Iterator[tuple[Path, str]]:
    if (path := folder / "chat_template.jinja").exists():
        yield path, path.read_text("utf-8", "replace")
    for name in ("chat_template.json", "processor_config.json"):
        if (found := _template_in(folder / name)) is not None:
            yield found


def _template_in(path: Path) -> tuple[Path, str] | None:
    found = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(found, list):  # several, by name
        found = next((x.get("template") for x in found if isinstance(x, dict) and x.get("name") == "default"), None)
    return (path, found) if isinstance(found, str) else None


def _open_prompt(tokenizer: Any, chat_template: str, path: Path) -> str:
    """Return what a chat template makes of a question about an image, without the beginning of the sequence.

    Raises:
        CheckpointError: It fails.
    """
    parts: list[Any] = [[{"type": "image"}, {"type": "text", "text": _QUESTION}], f"{IMAGE}\n{_QUESTION}"]
    error: Exception | None = None
    for content in parts:  # templates of language models take text only
        try:
            text: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=chat_template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as problem:  # a template can raise anything
            error = problem
            continue
        if IMAGE in text and "{" not in text:
            return text.removeprefix(tokenizer.bos_token or "")
    raise CheckpointError(f"{path}: the chat template cannot be applied ({error or 'it shows no image'}); {_REMEDY}")

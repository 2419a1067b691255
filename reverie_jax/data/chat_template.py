"""Which chat template a checkpoint was tuned with: the one that is named, or the one that its files make certain."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.derived_template import derive_template
from reverie_jax.data.templates import CHECKPOINT, TEMPLATES, Template, find_template, v0_template
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
    f"{', '.join(TEMPLATES)}, or {CHECKPOINT} for the tokenizer's own chat template"
)
_LLAMA_2 = re.compile("llama-?2")


def choose_template(
    config: VLMConfig, tokenizer: Any, main: Component, others: Sequence[Component] = (), name: str | None = None
) -> Template:
    """Return the chat template of a checkpoint.

    Args:
        config: The architecture, whose `template` holds where nothing else does, and always for the sister systems.
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
    template = _of_files(tokenizer, main, others) if name == CHECKPOINT else _named(name, main.path)
    _check_tokens(template, tokenizer, main.path)
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
    if "reverie_template" in main.config and config.template not in (*TEMPLATES, CHECKPOINT):
        raise CheckpointError(
            f"{main.config_path}: unknown reverie_template {config.template!r}; must be one of {', '.join(TEMPLATES)}"
        )
    if (example := read_example_template(main.path)) is not None:
        return example
    if config.template == CHECKPOINT:
        return _of_files(tokenizer, main, others)
    if main.format == "orbax" or "reverie_template" in main.config:
        return find_template(config.template)
    if main.format == "llava-hf" and (found := read_chat_template(main.path)) is not None:
        return _derive(tokenizer, *found)
    certain = config.template if config.system != "llava" else _certain(config.template, tokenizer, main, others)
    template = find_template(certain)
    _check_tokens(template, tokenizer, main.path)
    return template


def _of_files(tokenizer: Any, main: Component, others: Sequence[Component]) -> Template:
    """Return the template of a checkpoint's files, or else of its components': an adapter's is in its base model's folder.

    Raises:
        CheckpointError: The files contain no chat template, or one that cannot be used.
    """
    folders = [part.path for part in (main, *others) if part.format != "clip" and part.path.is_dir()]
    if (found := next(filter(None, map(read_chat_template, folders)), None)) is None:
        raise CheckpointError(f"{main.path}: no chat_template.jinja, which template {CHECKPOINT!r} needs; {_REMEDY}")
    return _derive(tokenizer, *found)


def _derive(tokenizer: Any, path: Path, chat_template: str) -> Template:
    try:
        return derive_template(tokenizer, chat_template)
    except Exception as error:  # a chat template can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: the chat template cannot be used: {reason}; {_REMEDY}") from None


def _certain(default: str, tokenizer: Any, main: Component, others: Sequence[Component]) -> str:
    """Return the name of the template with which every model of this kind was tuned; its files do not say it.

    Args:
        default: The template of its configuration: Vicuna's, llava-hf's or Phi-3's.
        tokenizer: As for `choose_template`.
        main: As for `choose_template`.
        others: As for `choose_template`.

    Raises:
        CheckpointError: Models of this kind were tuned with several.
    """
    _check_not_llama_2(tokenizer, main, others)
    configs = [part.config.get("text_config") or part.config for part in (main, *others) if part.format != "clip"]
    vocab, end = tokenizer.get_vocab(), tokenizer.eos_token
    if any("moe" in config or "mm_image_tower" in config for config in configs):  # MoE-LLaVA
        name = "moe_llava" if end == "<|endoftext|>" else None
    elif default == "phi3_instruct":
        name = default
    elif any(not re.search("llama|llava$|share4v", str(config.get("model_type") or "llama")) for config in configs):
        name = None
    elif {"<|start_header_id|>", "<|eot_id|>"} <= vocab.keys() and end in ("<|eot_id|>", "<|end_of_text|>"):
        name = "llama3" if main.format != "llava-hf" else None
    else:
        name = default if end == "</s>" else None
    if name is None:
        raise CheckpointError(
            f"{main.path}: no chat template, and models of its kind (answers end with {end!r}) were tuned with different"
            f" ones; {_REMEDY}"
        )
    return name


def _check_tokens(template: Template, tokenizer: Any, path: Path) -> None:
    """Refuse a template that needs tokens, as at the end of answers, which the tokenizer lacks."""
    end = (template.end or "").strip()
    needed = (*template.tokens, end) if end.startswith("<") else template.tokens
    if missing := [token for token in needed if token not in tokenizer.get_vocab()]:
        raise CheckpointError(
            f"{path}: template {template.name} needs the token {missing[0]!r}, which the tokenizer lacks; {_REMEDY}"
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

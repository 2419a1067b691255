"""A checkpoint's tokenizer files, for other tools: the source's own, changed only where tokens or a setting differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from reverie_jax.data.tiktoken_files import find_tiktoken
from reverie_jax.files import read_json, write_json

Json = dict[str, Any]

SENTENCEPIECE = "tokenizer.model"
"""What slow tokenizers read, of which original LLaVA uses one."""

_CONTENT, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPECIAL, _ADDED = "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def copy_tokenizer(tokenizer: Any, folder: Path, *, added: Collection[str] = (), vocab: int | None = None) -> None:
    """Copy a tokenizer's files from the folder that it was loaded from, so that transformers from 4.37 on opens them.

    Where the folder has only a sentencepiece model, a tokenizer.json is made.

    Args:
        tokenizer: The tokenizer, from `tokenization.load_tokenizer`.
        folder: An existing folder.
        added: The tokens that were added to the tokenizer since; they are added to the files.
        vocab: The tokens from this id on are removed from the files; None removes none.
    """
    source = Path(tokenizer.name_or_path)
    ranks = find_tiktoken(source)
    names = [_CONTENT, SENTENCEPIECE, _SETTINGS, _SPECIAL, _ADDED, "vocab.json", "merges.txt"]
    if ranks is not None:  # its settings name code that is not copied
        names = [ranks.name]
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    before = {name: (folder / name).exists() for name in (_CONTENT, _SETTINGS, _SPECIAL, _ADDED)}
    files: dict[str, Json] = {name: read_json(folder / name) if there else {} for name, there in before.items()}
    settings = files[_SETTINGS]
    if not before[_CONTENT]:
        files[_CONTENT] = _content(tokenizer)
    if added:
        _add(files, tokenizer, added)
    if vocab is not None:
        _remove(files, vocab)
    if not before[_SETTINGS]:
        marks = ("bos_token", "eos_token", "pad_token", "unk_token")
        settings |= {name: mark for name in marks if (mark := getattr(tokenizer, name, None)) is not None}
    if hasattr(tokenizer, "legacy"):  # without the key, releases take different values
        settings.setdefault("legacy", bool(tokenizer.legacy))
    settings.setdefault("tokenizer_class", type(tokenizer).__name__)
    _let_older_releases_read(files[_CONTENT], settings)
    for name, raw in files.items():
        if raw != (read_json(folder / name) if before[name] else {}):
            write_json(folder / name, raw)


def _content(tokenizer: Any) -> Json:
    """Return the tokenizer.json of a loaded tokenizer.

    transformers 5.23 loads LLaMA's by the model's type, some without the spaces of `legacy`, so these are set here.
    """
    content: Json = json.loads(tokenizer.backend_tokenizer.to_str())
    if hasattr(tokenizer, "legacy"):
        space, whole = "\u2581", Tokenizer(models.BPE())
        if tokenizer.legacy:
            whole.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        else:
            whole.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="first", split=False)
        parts = decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        whole.decoder = decoders.Sequence(list(parts))
        content |= {key: json.loads(whole.to_str())[key] for key in ("normalizer", "pre_tokenizer", "decoder")}
    return content


def _add(files: dict[str, Json], tokenizer: Any, added: Collection[str]) -> None:
    """Add tokens of the tokenizer, in place."""
    tokens = {
        id: {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
        for id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    new = {id: token for id, token in tokens.items() if token["content"] in added}
    listed = files[_CONTENT]["added_tokens"]
    listed += [{"id": id, **token} for id, token in new.items() if id not in {token["id"] for token in listed}]
    # Where it is, releases before 5 read nothing else, so it must hold all.
    decoder = files[_SETTINGS].get("added_tokens_decoder") or {str(id): token for id, token in tokens.items()}
    files[_SETTINGS]["added_tokens_decoder"] = decoder | {str(id): token for id, token in new.items()}
    if files[_ADDED]:
        files[_ADDED] |= {token["content"]: id for id, token in new.items()}
    if tokenizer.pad_token in added:
        files[_SETTINGS]["pad_token"] = tokenizer.pad_token
        if files[_SPECIAL]:
            files[_SPECIAL]["pad_token"] = tokenizer.pad_token


def _remove(files: dict[str, Json], vocab: int) -> None:
    """Remove the tokens from id `vocab` on, in place; transformers can add tokens, but not remove them."""
    content, settings = files[_CONTENT], files[_SETTINGS]
    removed = {token["content"] for token in content["added_tokens"] if token["id"] >= vocab}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab]
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {id: token for id, token in decoder.items() if int(id) < vocab}
    settings.pop("image_token", None)
    for raw in (settings, files[_SPECIAL]):
        for key, value in list(raw.items()):
            if _text(value) in removed:
                raw[key] = settings.get("unk_token")
            elif isinstance(value, list):
                raw[key] = [x for x in value if _text(x) not in removed]
            elif key == "extra_special_tokens" and isinstance(value, dict):
                raw[key] = {name: x for name, x in value.items() if _text(x) not in removed}
    for name in removed:
        files[_ADDED].pop(name, None)


def _text(token: Any) -> Any:
    """Return the text of a token, which files hold as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _let_older_releases_read(content: Json, settings: Json) -> None:
    """Write what transformers 5 and tokenizers 0.20 write in another way as releases before them do; all read that."""
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # an older name of the same class
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])  # then it gave token types by default
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    merges = content["model"].get("merges") or []
    if merges and not isinstance(merges[0], str) and not any(" " in part for merge in merges for part in merge):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    for step in (content.get("pre_tokenizer"), content.get("decoder")):
        for part in [step, *(step or {}).get("pretokenizers", ()), *(step or {}).get("decoders", ())]:
            if part and part["type"] == "Metaspace" and "prepend_scheme" in part:
                part.setdefault("add_prefix_space", part["prepend_scheme"] != "never")

"""Tokenizers of tiktoken files, against the package tiktoken where it is installed."""

from __future__ import annotations

import base64
import dataclasses
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from reverie_jax.data import tiktoken_files
from reverie_jax.data.tiktoken_files import TIKTOKEN_FILES
from reverie_jax.data.tokenization import load_tokenizer
from reverie_jax.data.tokenizer_files import copy_tokenizer
from tests.data import llama_oracle

# Cut as cl100k does, but numbers digit by digit.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IDS = {
    "arcade100k.tiktoken": {
        **{"<|endoftext|>": 100257, "<|fim_pad|>": 100261, "<gh_stars>": 100262, "<reponame>": 100275},
        **{"<|endofprompt|>": 100276, "<|im_end|>": 100278, "<|reg0|>": 100280, "<|extra0|>": 100288},
    },
    "qwen.tiktoken": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|extra_0|>": 151646, "<|extra_204|>": 151850},
}


def ranks() -> dict[bytes, int]:
    """A small vocabulary in tiktoken's order: bytes, then merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = dict(zip(pre_tokenizers.ByteLevel.alphabet(), range(256), strict=True))
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=list(letters), show_progress=False)
    bpe.train_from_iterator(["A chat between a user's cat and 12 black dogs.\n\n  Is it? été 猫"] * 9, trainer)
    back = {letter: byte for byte, letter in byte_letters().items()}
    tokens = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {bytes(back[letter] for letter in token): id for id, (token, _) in enumerate(tokens)}


def byte_letters() -> dict[int, str]:
    """GPT-2's letter of each byte: itself where it can be seen, or else one from 256 on, in order."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def write(path: Path, table: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in table.items()))
    return path.parent


@pytest.fixture(params=TIKTOKEN_FILES)
def small(request, tmp_path, monkeypatch):
    """A folder, its ranks and its special tokens, which begin one behind a hole as StableLM's do."""
    table = ranks()
    file = dataclasses.replace(TIKTOKEN_FILES[request.param], first=len(table) + 1)
    monkeypatch.setitem(tiktoken_files.TIKTOKEN_FILES, request.param, file)
    return write(tmp_path / request.param, table), table, dict(zip(file.special, range(file.first, 9999), strict=False))


@pytest.mark.parametrize("name", TIKTOKEN_FILES)
def test_special_tokens_have_their_published_ids(name):
    file = TIKTOKEN_FILES[name]
    ids = dict(zip(file.special, range(file.first, 999_999), strict=False))
    assert ids | IDS[name] == ids
    assert ids[file.special[-1]] == max(IDS[name].values())


def test_a_tokenizer_is_read_and_can_be_saved(small, tmp_path):
    folder, table, special = small
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == len(table) + 1 + len(special)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, len(table) + 1)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    (tmp_path / "saved").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "A cat's 12<|endoftext|> e\u0301<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "A cat's 12 é"


def test_its_files_are_exported(small, tmp_path, monkeypatch):
    """Without a look at the current folder, whose tokenizer is another one."""
    folder, _, _ = small
    tokenizer, out = load_tokenizer(folder), tmp_path / "out"
    out.mkdir()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "no"}')
    monkeypatch.chdir(tmp_path)
    copy_tokenizer(tokenizer, out)
    again = load_tokenizer(out)
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert again("A cat's 12<|endoftext|>").input_ids == tokenizer("A cat's 12<|endoftext|>").input_ids
    assert any((out / name).exists() for name in TIKTOKEN_FILES)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    text=llama_oracle.any_text([*llama_oracle.TRAPS, "<|im_start|>", "<|endoftext|>", "<|reg0|>", "don't", "2024"], 0)
)
def test_ids_are_tiktokens(small, text):
    tiktoken = pytest.importorskip("tiktoken")
    folder, table, special = small
    theirs = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=table, special_tokens=special)
    expected = theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert load_tokenizer(folder)(text).input_ids == expected


@pytest.mark.parametrize("line", ["YQ==", "YQ== x", "Y 0", "YQ== 100257"])
def test_a_broken_file_is_an_error(line, tmp_path):
    folder = write(tmp_path / "arcade100k.tiktoken", ranks())
    with (folder / "arcade100k.tiktoken").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r".+"):
        load_tokenizer(folder)

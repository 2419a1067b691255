"""Tokenizers that are stored as a tiktoken file alone: StableLM-2's (Arcade100k) and Qwen-1's, as MoE-LLaVA uses them."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class TiktokenFile:
    """What a model's own tokenizer class adds to the ranks in its file.

    Attributes:
        first: id of the first special token.
        special: special tokens by id, from `first` on; the first one ends a text.
        padding: the token that MoE-LLaVA pads with.
    """

    first: int
    special: tuple[str, ...]
    padding: str


_CODE: tuple[str, ...] = (
    "gh_stars",
    "filename",
    "issue_start",
    "issue_comment",
    "issue_closed",
    "jupyter_start",
    "jupyter_text",
)
_CODE += ("jupyter_code", "jupyter_output", "empty_output", "commit_before", "commit_msg", "commit_after", "reponame")
_CHAT = ("<|im_start|>", "<|im_end|>")

TIKTOKEN_FILES = {
    "arcade100k.tiktoken": TiktokenFile(
        100257,
        (
            "<|endoftext|>",
            *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
            *(f"<{part}>" for part in _CODE),
            *("<|endofprompt|>", *_CHAT, "<|pause|>"),
            *(f"<|reg{number}|>" for number in range(8)),
            "<|extra0|>",
        ),
        "<|reg0|>",
    ),
    "qwen.tiktoken": TiktokenFile(
        151643, ("<|endoftext|>", *_CHAT, *(f"<|extra_{number}|>" for number in range(205))), "<|extra_0|>"
    ),
}
"""By name of the file."""

# Letters with what stands before them, single digits, punctuation, line breaks, white space.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def find_tiktoken(folder: Path) -> Path | None:
    """Return a folder's tiktoken file, if it is what the folder has of its tokenizer."""
    if (folder / "tokenizer.json").exists():
        return None
    return next((folder / name for name in TIKTOKEN_FILES if (folder / name).exists()), None)


def read_tiktoken(path: Path) -> Any:
    """Return a tiktoken file's tokenizer, as a fast one of transformers without BOS.

    Args:
        path: Of a file in `TIKTOKEN_FILES`: lines of a token in base64 and its rank.

    Raises:
        ValueError: A line is something else, or its rank is a special token's id.
    """
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = TIKTOKEN_FILES[path.name]

    class Converter(TikTokenConverter):
        """transformers' converter, without its need of the package tiktoken to read lines."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
            return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}

        def tokenizer(self) -> Tokenizer:
            vocab, merges = self.extract_vocab_merges_from_model(self.vocab_file)
            if max(vocab.values()) >= file.first:
                raise ValueError(f"{path}: rank {max(vocab.values())} is a special token's")
            # Ids without a token get a name that no text has: byte-level tokens contain no space.
            names = {id: f" {id}" for id in set(range(file.first)) - set(vocab.values())}
            vocab |= {name: id for id, name in (names | dict(enumerate(file.special, file.first))).items()}
            return Tokenizer(models.BPE(vocab, merges, ignore_merges=True))

    fast = Converter(  # type: ignore[no-untyped-call]
        str(path), _PATTERN, extra_special_tokens=list(file.special)
    ).converted()
    fast.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=file.special[0], pad_token=file.padding)

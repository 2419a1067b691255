"""Tokenizers from checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer by transformers, with a sentencepiece model's merges put in their right order.

    Raises:
        OSError, ValueError, …: whatever transformers raises of a broken folder.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every config.json that is not one of its own
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        logging.set_verbosity(level)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        _order_merges(tokenizer, folder / "tokenizer.model")
    return tokenizer


def _order_merges(tokenizer: Any, path: Path) -> None:
    """Merges by sentencepiece's scores, in place.

    transformers 5.23 puts them in the order of ids, and so joins a run of spaces before it joins a space to its word.
    """
    import sentencepiece
    from tokenizers import models

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(id): id for id in range(pieces.get_piece_size())}
    merges = []
    for piece, id in vocab.items():
        if not (pieces.is_control(id) or pieces.is_unknown(id) or pieces.is_byte(id)):
            cuts = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
            merges += [(pieces.get_score(id), cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer.backend_tokenizer.model = models.BPE(
        vocab=vocab, merges=[cut for _, cut in merges], fuse_unk=True, byte_fallback=True, unk_token="<unk>"
    )

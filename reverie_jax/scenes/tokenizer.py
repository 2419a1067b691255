"""The base's tokenizer: byte-level BPE trained on what is said of scenes, so any text at all has tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reverie_jax.data.conversation import IMAGE
from reverie_jax.scenes.corpus import texts
from reverie_jax.scenes.graph import World, take

SPECIAL = ("<pad>", "<s>", "</s>", IMAGE)


def train_tokenizer(vocab: int, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `vocab` entries at most; ids 0-3 are pad, bos, eos and the image placeholder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(take(World.skewed(), "train", seed, 4000), seed), trainer)
    # Every text begins with <s>; the file says so, whoever loads it.
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )

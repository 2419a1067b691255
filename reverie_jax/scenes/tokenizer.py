"""The shipped model's tokenizer: byte-level BPE trained on texts about scenes; any text can be encoded."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reverie_jax.data.conversation import IMAGE
from reverie_jax.scenes.corpus import generate_texts
from reverie_jax.scenes.graph import World, take_scenes

SPECIAL = ("<pad>", "<s>", "</s>", IMAGE)


def train_tokenizer(vocab: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with at most `vocab` entries; ids 0 to 3 are pad, bos, eos and the image placeholder.

    Args:
        vocab: largest vocabulary.
        seed: of the scenes and their annotations.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(generate_texts(take_scenes(World.skewed(), "train", seed, 4000), seed), trainer)
    # Every text begins with <s>, also where transformers loads the file.
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )

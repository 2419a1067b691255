"""What the benchmarks of training and evaluation share: model sizes, a tokenizer, the conversations of a step, spreads."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import mixture_scale
from reverie_jax.data.conversation import IMAGE, ImageRecord
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.processor import Processor
from reverie_jax.data.templates import TEMPLATES
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.models import TextConfig, VisionConfig, VLMConfig
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.train.recipes import RECIPES

WAYS = ("peer", "flat", "tree")
VOCABULARY = 1200
"""Of the small tokenizer: a word of `mixture_scale` then has about 1.3 tokens."""
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
REVERIE = RECIPES["reverie-1.5-7b-lora"]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how a step on it is split into micro-batches.

    Attributes:
        sequence: sizes of our packed sequences.
        images: per step.
        micro_batch: sequences in a micro-batch of ours.
        peer_micro_batch: conversations in a micro-batch of the peer.
        equal_weights: both sides read the same weights; otherwise each draws its own.
    """

    config: VLMConfig
    sequence: SequenceShape
    images: int
    micro_batch: int
    peer_micro_batch: int
    rank: int
    alpha: float
    equal_weights: bool = True


SIZES = {
    "tiny": Size(
        VLMConfig(
            VisionConfig(hidden=32, layers=2, heads=2, mlp=64, image_size=28, patch_size=14),
            TextConfig(vocab=1280, hidden=48, layers=2, heads=4, kv_heads=4, head_dim=12, mlp=96),
        ),
        SequenceShape(length=512, images=4, edges=512),
        images=2,
        micro_batch=1,
        peer_micro_batch=4,
        rank=4,
        alpha=8.0,
    ),
    "small": Size(
        VLMConfig(
            VisionConfig(hidden=192, layers=3, heads=3, mlp=768, image_size=224, patch_size=14),
            TextConfig(vocab=4096, hidden=512, layers=4, heads=8, kv_heads=8, head_dim=64, mlp=1376),
        ),
        SequenceShape(length=1024, images=3, edges=512),
        images=2,
        micro_batch=1,
        peer_micro_batch=4,
        rank=16,
        alpha=32.0,
    ),
    "7b": Size(
        ARCHITECTURES["llava-1.5-7b"],
        REVERIE.sequence,
        images=32,
        micro_batch=1,
        peer_micro_batch=16,
        rank=REVERIE.rank,
        alpha=REVERIE.alpha,
        equal_weights=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    size: Literal["tiny", "small", "7b"] = "small"
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and computation; bfloat16 by default for 7b, float32 for the others."""
    rounds: int = 3
    """Timed steps of each way, alternating."""
    images: int | None = None
    """Images of a step, instead of the size's."""
    ways: tuple[Literal["peer", "flat", "tree"], ...] = WAYS
    length: int | None = None
    """Tokens of our sequences, instead of the size's."""
    micro_batch: int | None = None
    """Sequences in a micro-batch of ours, instead of the size's."""
    peer_micro_batch: int | None = None
    """Conversations in a micro-batch of the peer, instead of the size's."""
    fit: bool = False
    """Only as many image and edge slots in a sequence as the data need, instead of the recipe's."""
    checkpointing: bool = True
    """The peer recomputes each layer in its backward pass, as in LLaVA's scripts; ours always does."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention of the peer."""
    quantization: Literal["int8", "nf4"] | None = None
    """Format of our frozen matrices; the peer's are of the dtype."""
    adapters: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the peer's adapters if the dtype is bfloat16: float32 under autocast, as ours, or bfloat16, as in LLaVA's
    scripts."""
    answers: Literal["once", "as-published"] = "once"
    """Supervise an answer that several rationales share once, or as often as it is repeated."""
    tokenizer: Path | None = None
    """Folder of a LLaMA tokenizer (Vicuna's); a small one by default."""
    cores: int | None = None
    """CPU cores for all ways; all by default. One is the fairest on a shared machine: threads that wait for one another
    lose most if a core is taken away."""
    apart: bool = False
    """Run peer and ours in separate processes, one after the other in each round, for a device that does not hold both."""
    part: Path | None = None
    """Run as such a process, with weights in this folder."""

    @property
    def chosen(self) -> Size:
        """The size, with the options applied."""
        size = SIZES[self.size]
        length = self.length or size.sequence.length
        return dataclasses.replace(
            size,
            sequence=dataclasses.replace(size.sequence, length=length, edges=min(size.sequence.edges, length)),
            images=self.images or size.images,
            micro_batch=self.micro_batch or size.micro_batch,
            peer_micro_batch=self.peer_micro_batch or size.peer_micro_batch,
        )

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        return self.dtype or ("bfloat16" if self.size == "7b" else "float32")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step supervises.

    Attributes:
        conversations: tokens of each record's conversations.
    """

    records: list[ImageRecord]
    conversations: list[list[Tokens]]
    processor: Processor

    @property
    def count(self) -> int:
        return sum(map(len, self.conversations))

    @property
    def tokens(self) -> int:
        return sum(len(one) for several in self.conversations for one in several)

    @property
    def supervised(self) -> int:
        return sum(int((one.weights > 0).sum()) for several in self.conversations for one in several)


def small_tokenizer(*more: str) -> Any:
    """Train a BPE tokenizer on the words of `mixture_scale`, its prompts, and `more`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    system = " Explain why this answer is wrong: instead. Including any necessary facts or knowledge."
    known = " ".join(mixture_scale.words())
    bpe.train_from_iterator([TEMPLATES["vicuna_v1"].system, system, f" {known} {known.title()}", *more], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", additional_special_tokens=[IMAGE]
    )


def make_work(args: Args) -> Work:
    """Make images and conversations in REVERIE's proportions with `reverie data build`."""
    from reverie_jax.cli.data import Build
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.supervision import Supervision
    from reverie_jax.data.tokenization import load_tokenizer

    size = args.chosen
    vision = size.config.vision
    if args.tokenizer is None:
        encoder = Encoder(small_tokenizer(), "vicuna_v1", vision.patches, 3)
    else:
        encoder = Encoder(load_tokenizer(args.tokenizer), "vicuna_v1", vision.patches, 0, "llava")
    processor = Processor(encoder, vision.image_size, context=size.config.text.context)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        mixture_scale.make(folder, size.images / mixture_scale.IMAGES, side=max(64, vision.image_size))
        Build(sources=(str(folder / "reverie.json"),), out=folder / "records", jobs=1).run()
        source = RecordSource(folder / "records")
        supervision = Supervision(answers=args.answers)
        records = [source[number] for number in range(len(source))]
    # Supervision is applied here, once for all ways.
    records = [dataclasses.replace(one, conversations=tuple(supervision(one.conversations))) for one in records]
    return Work(records, [processor.tokenize(one.id, one.conversations) for one in records], processor)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, minimum and maximum."""
    result = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in result.items()}

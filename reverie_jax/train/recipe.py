"""A recipe: the hyperparameters of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Literal

import pydantic
import yaml

from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.sequence_shape import SequenceShape
from reverie_jax.data.supervision import Supervision
from reverie_jax.models.config import DEFAULT_TARGETS, ExpertLayers, ImageAspectRatio, ProjectorKind, Remat, Routing

Trainable = Literal["lora", "adapters", "projector", "mlp", "full", "all"]
Schedule = Literal["cosine", "cosine-lavis", "linear", "constant"]
LossReduction = Literal["tokens", "micro-batches"]


_RATES = ("learning_rate", "projector_learning_rate", "warmup_learning_rate", "min_learning_rate")
# Fields, what their values must satisfy (NaN does not), and the words for it. None passes.
_BOUNDS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("batch_size", "gradient_accumulation_steps", "rank", "save_steps", "keep_checkpoints"),
        lambda x: x >= 1,
        "at least 1",
    ),
    (("experts",), lambda x: x >= 2, "at least 2"),
    (
        ("steps", "holdout", "save_minutes", "weight_decay", "warmup_steps", *_RATES),
        lambda x: 0 <= x < math.inf,
        "at least 0",
    ),
    (("alpha", "epochs", "max_grad_norm", "loss_spike_threshold"), lambda x: 0 < x < math.inf, "more than 0"),
    (("dropout",), lambda x: 0 <= x < 1, "at least 0 and less than 1"),
    (("warmup_ratio",), lambda x: 0 <= x <= 1, "between 0 and 1"),
    (("crop_scale",), lambda x: 0 < x <= 1, "more than 0 and at most 1"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run. Parameters that are not trained are frozen.

    Attributes:
        name: of the recipe.
        steps: optimizer steps; 0 for as many as `epochs` take.
        epochs: passes over the data if `steps` is 0.
        batch_size: sequences per step, over all devices and micro-batches.
        sequence: static sizes of a packed sequence. With `images=1` a sequence holds one image.
        gradient_accumulation_steps: micro-batches per step; divides `batch_size`.
        remat: what the backward pass recomputes: `full` layers (`offload` keeps their inputs in host memory), everything but
            matrix products (`dots`), or `none`.
        offload: keep the optimizer state in host memory between steps.
        loss_reduction: mean over all supervised tokens of a step (`tokens`), or mean of the micro-batches' means, as the
            trainer of transformers computes it (`micro-batches`).
        trainable: adapters and projector (`lora`), adapters only (`adapters`), the projector only, the decoder's MLPs and
            projector (`mlp`: experts and routers too, as the third stage of MoE-LLaVA), decoder and projector (`full`), or
            everything, vision tower and resampler included (`all`).
        freeze_image_experts: with `all`, keep what computes the image's tokens in a tower with queries (Muffin's BEiT-3):
            patch embedding, class token, the image's positions, and its weights in every layer.
        upcycle: layers whose MLP is first replaced by experts that are copies of it; None keeps a dense model dense. A model
            that has experts keeps them.
        experts: number of experts of each of those layers.
        routing: how tokens are routed to experts in training; as the checkpoint says if None.
        freeze_router: keep the routers as they are, as the released MoE-LLaVA models probably did.
        supervision: which answers and rationales are supervised, and in which form.
        preference: train on pairs of answers by DPO instead of `supervision`; `sequence.questions` then counts answers,
            two per pair, and the loss is the mean over pairs.
        prefix_sharing: compute the conversations about an image as one tree; otherwise each one separately.
        template: conversation template; the checkpoint's if None.
        image_aspect_ratio: preprocessing of images; the checkpoint's if None.
        crop_scale: least share of an image's area that a random crop keeps, in training; None crops nothing.
        flip: mirror half of the images, in training.
        projector_type: of the new projector, where `trainable=projector` and the model is given as parts.
        quantization: format of the frozen matrices that carry adapters: int8, nf4 (QLoRA), or None for the model's dtype.
        rank: of the adapters.
        alpha: of the adapters; they are scaled by alpha / rank.
        dropout: of the adapters' inputs, a probability.
        target_modules: regular expression of the layers that get adapters.
        learning_rate: peak learning rate of adapters, or of decoder and tower.
        projector_learning_rate: peak learning rate of the projector.
        schedule: learning rate after the warm-up: half a `cosine` or a line (`linear`) down to `min_learning_rate`, both as
            in transformers, or `constant`. `cosine-lavis` is LAVIS' and MiniGPT-4's `linear_warmup_cosine_lr`: its cosine
            begins with the first step, so that the warm-up ends with a jump down to it.
        warmup_ratio: share of the steps with a rising learning rate.
        warmup_steps: their number, where `warmup_ratio` is 0.
        warmup_learning_rate: learning rate of the first step of the warm-up.
        min_learning_rate: learning rate that the decay ends at.
        max_grad_norm: global gradient norm above which gradients are clipped; None disables clipping.
        weight_decay: of AdamW; not of biases and normalizations, as in transformers.
        save_steps: steps between checkpoints.
        save_minutes: minutes between checkpoints, in addition to `save_steps`; 0 disables.
        keep_checkpoints: newest checkpoints to keep; with `holdout` the best one is kept too.
        holdout: number of records, the last ones, that are not trained on; the loss on them is computed at each save.
        loss_spike_threshold: the run stops if the loss exceeds the median of the last 50 steps by this many nats; None
            disables.
        seed: of the data order, the adapters' initialization and dropout.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    name: str
    steps: int
    batch_size: int
    sequence: SequenceShape
    epochs: float = 1.0
    gradient_accumulation_steps: int = 1
    remat: Remat = "full"
    offload: bool = False
    loss_reduction: LossReduction = "tokens"
    trainable: Trainable = "lora"
    upcycle: ExpertLayers | None = None
    experts: int = 4
    routing: Routing | None = None
    freeze_router: bool = False
    freeze_image_experts: bool = False
    supervision: Supervision = Supervision()  # noqa: RUF009
    preference: DPOConfig | None = None
    prefix_sharing: bool = True
    template: str | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    crop_scale: float | None = None
    flip: bool = False
    projector_type: ProjectorKind = "mlp2x_gelu"
    quantization: Literal["int8", "nf4"] | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: str = DEFAULT_TARGETS
    learning_rate: float = 2e-4
    projector_learning_rate: float = 2e-5
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 0.0
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    save_steps: int = 100
    save_minutes: float = 0.0
    keep_checkpoints: int = 2
    holdout: int = 0
    loss_spike_threshold: float | None = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for names, allowed, words in _BOUNDS:
            for name in names:
                if (value := getattr(self, name)) is not None and not allowed(value):
                    raise ValueError(f"{name}={value} must be {words}")
        if self.sequence.length < 1 or self.sequence.edges < 1:
            raise ValueError(
                f"sequence.length={self.sequence.length} and sequence.edges={self.sequence.edges} must be at least 1"
            )
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={self.target_modules} is not a regular expression ({error})") from None
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of"
                f" gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        self._check_schedule()
        if self.freeze_image_experts and self.trainable != "all":
            raise ValueError(
                f"freeze_image_experts=true needs trainable=all, which trains the tower, not {self.trainable}"
            )
        if self.quantization is not None and self.trainable in ("full", "mlp", "all"):
            raise ValueError(
                f"quantization={self.quantization} needs frozen weights; trainable={self.trainable} trains them"
            )
        if self.routing is not None and self.routing.group and self.micro_batch_size % self.routing.group:
            raise ValueError(
                f"micro-batches of {self.micro_batch_size} sequences: not a multiple of routing.group={self.routing.group}"
            )

    def _check_schedule(self) -> None:
        """Check that the fields of the learning rate go together.

        Raises:
            ValueError: one excludes another.
        """
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio}: one must be 0")
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(f"min_learning_rate={self.min_learning_rate} must be 0: schedule=constant does not decay")
        peaks = {
            "learning_rate": self.learning_rate if self.trainable != "projector" else math.inf,
            "projector_learning_rate": self.projector_learning_rate if self.trainable != "adapters" else math.inf,
        }
        name = min(peaks, key=lambda name: peaks[name])
        for low in ("warmup_learning_rate", "min_learning_rate"):
            if getattr(self, low) > peaks[name]:
                raise ValueError(f"{low}={getattr(self, low)} must be at most {name}={peaks[name]}")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained."""
        return self.trainable in ("lora", "adapters")

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch, over all devices."""
        return self.batch_size // self.gradient_accumulation_steps

    def steps_for(self, sequences: int) -> int:
        """Return the steps of a run on data that fill `sequences` packed sequences per pass."""
        return self.steps or max(1, round(self.epochs * sequences / self.batch_size))

    def summary(self) -> str:
        """Return what the recipe trains, in a line."""
        what = f"LoRA r {self.rank}" if self.has_adapters else self.trainable
        if self.upcycle is not None:
            what += f", {self.experts} experts in {self.upcycle} layers"
        on = f"supervises {self.supervision.kinds}"
        if self.preference is not None:
            on = f"DPO, beta {self.preference.beta:g}, gamma {self.preference.gamma:g}"
        length = f"{self.steps} steps" if self.steps else f"{self.epochs:g} epoch{'' if self.epochs == 1 else 's'}"
        return f"{what}; {on}; {length}, batch size {self.batch_size}, sequence length {self.sequence.length}"

    def to_yaml(self) -> str:
        """Return the recipe as YAML; `recipes.read_recipe` reads it back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def to_json(self) -> str:
        """Return the recipe as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe from JSON; omitted fields have their defaults.

        Raises:
            pydantic.ValidationError: a field is unknown, missing or invalid.
        """
        return pydantic.TypeAdapter(cls).validate_json(text)

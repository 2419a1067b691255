"""Recipes: everything that decides a run's updates, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import UserError
from reverie_jax.models.config import ImageAspectRatio, ProjectorKind
from reverie_jax.models.layers import Remat
from reverie_jax.models.lora import DEFAULT_TARGETS

Trainable = Literal["lora", "projector", "full"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run: what is tuned, on what, how fast. What is not tuned is frozen.

    Attributes:
        steps: optimizer steps; 0 for as many as `epochs` take.
        epochs: passes over the data, where `steps` is 0.
        rows: rows in a batch, over all devices and micro-batches.
        row: static sizes of a row. With `images=1` a row is one image, so runs of equal steps see equal images.
        accumulate: micro-batches of a step; `rows` is a multiple.
        remat: what the backward pass computes again instead of keeping it: a layer's whole inside, all but its products with
            weights, or nothing.
        offload: the optimizer's state waits in the host's memory between steps.
        mean: the loss is the mean over all taught tokens of a step, or the mean of the micro-batches' means, as
            transformers' trainer has it (a token in a micro-batch of few then counts more).
        tune: adapters and projector, the projector alone, or decoder and projector in full.
        teach: what of each conversation is taught: first answers only, or rationales too, and in which form.
        preference: tune on pairs of answers by direct preference optimisation instead of on `teach`; a row's `leaves` are
            then its answers, two a pair, and the loss is the mean over pairs.
        sharing: an image's conversations as one tree; without, each is computed by itself, as other trainers do.
        template, aspect: instead of the checkpoint's own.
        fresh_projector: the kind that is made where `tune=projector` and the base is a language model and a tower alone.
        base: the frozen matrices that carry adapters as they are, or in 8 or 4 bits (QLoRA).
        rank, alpha, dropout, targets: the adapters (scale alpha / rank).
        rate: peak learning rate of adapters or decoder.
        projector_rate: peak learning rate of the projector.
        warmup: share of the steps with a rising rate; then cosine to zero.
        clip: largest gradient norm; None for no clipping, as LLaVA's published recipes.
        save_every: steps between checkpoints.
        save_minutes: time between them, whichever comes first; 0 for steps alone.
        keep: checkpoints that are kept, the newest; with `holdout` the best one is too.
        holdout: records, the last ones, that are not trained on; the loss on them is taken at each save.
        spike: nats above the median of the last 50 steps that end the run; none for no such end.
        seed: fixes order, adapters' start and dropout.
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
    loss_reduction: Literal["tokens", "micro-batches"] = "tokens"
    trainable: Trainable = "lora"
    supervision: Supervision = Supervision()  # noqa: RUF009
    preference: DPOConfig | None = None
    prefix_sharing: bool = True
    template: str | None = None
    image_aspect_ratio: ImageAspectRatio | None = None
    projector_type: ProjectorKind = "mlp2x_gelu"
    quantization: Literal["int8", "nf4"] | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: str = DEFAULT_TARGETS
    learning_rate: float = 2e-4
    projector_learning_rate: float = 2e-5
    warmup_ratio: float = 0.03
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    save_steps: int = 100
    save_minutes: float = 0.0
    keep_checkpoints: int = 2
    holdout: int = 0
    loss_spike_threshold: float | None = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps < 1 or self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        if self.quantization is not None and self.trainable == "full":
            raise ValueError(f"quantization={self.quantization} needs frozen weights; trainable=full freezes none")

    def steps_for(self, rows: int) -> int:
        """Steps of a run on data that fill so many rows in a pass."""
        return self.steps or max(1, round(self.epochs * rows / self.batch_size))

    def summary(self) -> str:
        """Return what the recipe trains, in a line."""
        what = f"LoRA r {self.rank}" if self.trainable == "lora" else self.trainable
        on = f"supervises {self.supervision.kinds}"
        if self.preference is not None:
            on = f"DPO, beta {self.preference.beta:g}, gamma {self.preference.gamma:g}"
        length = f"{self.steps} steps" if self.steps else f"{self.epochs:g} epoch{'' if self.epochs == 1 else 's'}"
        return f"{what}; {on}; {length}, batch size {self.batch_size}, sequence length {self.sequence.length}"

    def to_yaml(self) -> str:
        """Return the recipe as YAML; `read_recipe` reads it back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        return pydantic.TypeAdapter(cls).validate_json(text)


_SCENES = Recipe(
    name="scenes-rationales",
    steps=200,
    batch_size=16,
    sequence=SequenceShape(length=448, images=1, edges=288),
    supervision=Supervision(answers="as-published"),
    rank=16,
    alpha=32.0,
    dropout=0.0,
    learning_rate=3e-3,
    projector_learning_rate=3e-4,
    save_steps=100,
)
# LLaVA's scripts as published: a conversation a row, 16 a device on 8 devices, each device's mean by itself, no clipping.
_LLAVA = Recipe(
    name="llava-1.5-7b-lora",
    steps=0,
    batch_size=128,
    sequence=SequenceShape(length=2048, images=1, edges=2048),
    gradient_accumulation_steps=8,
    loss_reduction="micro-batches",
    supervision=Supervision(answers="as-published"),
    prefix_sharing=False,
    rank=128,
    alpha=256.0,
    learning_rate=2e-4,
    projector_learning_rate=2e-5,
    max_grad_norm=None,
    save_steps=500,
)
_LLAVA_1_0 = dataclasses.replace(
    _LLAVA,
    name="llava-1.0-7b-lora",
    image_aspect_ratio="square",
    rank=64,
    alpha=16.0,
    learning_rate=2e-5,
    projector_learning_rate=2e-5,
)
_FULL = dataclasses.replace(
    _LLAVA, name="llava-1.5-7b-full", trainable="full", learning_rate=2e-5, projector_learning_rate=2e-5
)
_PRETRAIN = dataclasses.replace(
    _LLAVA,
    name="llava-1.5-pretrain",
    batch_size=256,
    trainable="projector",
    template="plain",
    image_aspect_ratio="square",
    projector_learning_rate=1e-3,
)
# The same on trees: about as many conversations a step, every taught token of a step alike.
_REVERIE = dataclasses.replace(
    _LLAVA,
    name="reverie-1.5-7b-lora",
    batch_size=8,
    sequence=SequenceShape(length=4096, images=8, edges=4096),
    gradient_accumulation_steps=1,
    loss_reduction="tokens",
    supervision=Supervision(),
    prefix_sharing=True,
)

# A pair a row, so that a batch has as many pairs as the published one; RLHF-V tunes in full, and so keeps the reference's
# sums. Its own model is Muffin-13B: here the recipe stands for any LLaVA.
_DDPO = dataclasses.replace(
    _LLAVA,
    name="rlhfv-ddpo-paper",
    batch_size=32,
    sequence=SequenceShape(length=2048, images=1, edges=2048, questions=2),
    epochs=7.0,
    gradient_accumulation_steps=1,
    loss_reduction="tokens",
    trainable="full",
    prefix_sharing=True,
    learning_rate=5e-7,
    projector_learning_rate=5e-7,
    warmup_ratio=0.1,
    max_grad_norm=1.0,
    preference=DPOConfig(beta=0.5, gamma=5.0, average=True, reference="stored"),
)
_DPO = dataclasses.replace(
    _DDPO,
    name="rlaifv-dpo",
    batch_size=8,
    steps=2672,
    image_aspect_ratio="square",
    warmup_ratio=0.05,
    weight_decay=0.01,
    preference=DPOConfig(reference="stored"),
)

# LRV-Instruction's second version tunes queries and values alone. Its rate, batch and length are not published: those of
# mPLUG-Owl, which it starts from, stand in.
_LRV = dataclasses.replace(
    _LLAVA,
    name="lrv-sft",
    rank=8,
    alpha=32.0,
    target_modules=r"decoder\.layers\.(query|value|qkv)",
    prefix_sharing=True,
    loss_reduction="tokens",
    gradient_accumulation_steps=1,
    batch_size=32,
    sequence=SequenceShape(length=2048, images=4, edges=2048),
    epochs=3.0,
    learning_rate=2e-5,
    projector_learning_rate=2e-5,
    max_grad_norm=1.0,
    weight_decay=1e-4,
)


def _named(base: Recipe, *names: str, **changes: Any) -> list[Recipe]:
    return [dataclasses.replace(base, name=name, **changes) for name in names]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _SCENES,
        dataclasses.replace(
            _SCENES,
            name="scenes-responses",
            supervision=Supervision("responses", answers="as-published"),
            sequence=SequenceShape(length=192, images=1, edges=96),
        ),
        *_named(_LLAVA, "llava-1.5-7b-lora", "llava-1.5-13b-lora", "llava-phi3-lora"),
        _LLAVA_1_0,
        *_named(_FULL, "llava-1.5-7b-full", "llava-1.5-13b-full", "llava-phi3-full"),
        *_named(_FULL, "llava-1.0-7b-full", image_aspect_ratio="square"),
        *_named(_PRETRAIN, "llava-1.5-pretrain", "llava-phi3-pretrain"),
        *_named(_PRETRAIN, "llava-1.0-pretrain", batch_size=128, projector_learning_rate=2e-3, projector_type="linear"),
        *_named(_REVERIE, "reverie-1.5-7b-lora", "reverie-1.5-13b-lora", "reverie-phi3-lora"),
        *_named(_REVERIE, "reverie-1.0-7b-lora", image_aspect_ratio="square"),
        _DDPO,
        *_named(
            _DDPO,
            "rlhfv-ddpo-script",
            batch_size=8,
            steps=2160,
            warmup_ratio=0.03,
            preference=DPOConfig(gamma=1.1, reference="stored"),
        ),
        _DPO,
        _LRV,
        *_named(
            _DPO,
            "rlaifv-dpo-lora",
            trainable="lora",
            learning_rate=1e-5,
            projector_learning_rate=1e-5,
            preference=DPOConfig(),
        ),
    )
}


_ADAPTER = pydantic.TypeAdapter(Recipe)


def override(base: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with some fields replaced.

    Args:
        settings: `field=value` each; `row.tokens=512` reaches into the row's shape.

    Raises:
        UserError: no such field, or a value that is none for it.
    """
    values = dataclasses.asdict(base)
    for setting in settings:
        name, equals, value = setting.partition("=")
        *outer, last = name.split(".")
        place: Any = values
        for part in outer:
            place = place.get(part) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or last not in place or isinstance(place[last], dict):
            known = ", ".join(field.name for field in dataclasses.fields(Recipe))
            raise UserError(f"{setting!r} sets no field of a recipe; write field=value with one of {known}")
        place[last] = None if value == "none" else value
    try:
        return _ADAPTER.validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(f"--set: {_first_problem(error)}") from None


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"recipe field {place}: {first['msg']}" if place else f"recipe: {first['msg']}"


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        UserError: there is no such recipe; all names are listed.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; choose from {', '.join(sorted(RECIPES))}, or name a YAML file")
    return RECIPES[name]


def read_recipe(name: str) -> Recipe:
    """Return a recipe by its name, or from a YAML file as `Recipe.to_yaml` writes it; omitted fields have their defaults.

    Raises:
        UserError: the file cannot be read, or a field is unknown, missing or invalid; file and field are named.
    """
    if not name.endswith((".yaml", ".yml")):
        return find_recipe(name)
    try:
        content = yaml.safe_load(Path(name).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    try:
        return _ADAPTER.validate_python(content)
    except pydantic.ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error)}") from None


def describe_fields() -> str:
    """Return a line for each field of a recipe: name, type and default."""
    lines = []
    for prefix, kind in (
        ("", Recipe),
        ("sequence.", SequenceShape),
        ("supervision.", Supervision),
        ("preference.", DPOConfig),
    ):
        for field in dataclasses.fields(kind):
            if not prefix and field.name in ("sequence", "supervision", "preference"):
                continue
            default = "required" if field.default is dataclasses.MISSING else str(field.default)
            lines.append(f"  {prefix + field.name:32} {field.type!s:40} {default}")
    return "\n".join(lines)

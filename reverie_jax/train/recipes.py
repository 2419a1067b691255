"""Recipes by name or from a YAML file, and the overriding of their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from reverie_jax.data.preferences import DPOConfig
from reverie_jax.data.sequence_shape import SequenceShape
from reverie_jax.data.supervision import Supervision
from reverie_jax.errors import UserError
from reverie_jax.models.config import Routing
from reverie_jax.train.recipe import Recipe

# The learning rate is the best of `reverie scenes evidence`, on its validation images, for both recipes.
_SCENES = Recipe(
    name="scenes-rationales",
    steps=200,
    batch_size=4,
    sequence=SequenceShape(length=256, images=1, edges=200),
    remat="none",
    rank=16,
    alpha=32.0,
    dropout=0.0,
    learning_rate=1e-3,
    projector_learning_rate=1e-4,
    save_steps=100,
)
# LLaVA's published scripts: a conversation per sequence, 16 on each of 8 devices, mean per device, no clipping.
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
# The same with prefix sharing: about as many conversations per step, every supervised token of a step weighs the same.
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

# One pair per sequence gives the published number of pairs per batch. RLHF-V trains all weights, so the reference's
# log-probabilities are stored. Its model is Muffin-13B; here the recipe applies to any LLaVA.
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

# LRV-Instruction's second version adapts queries and values only. Its learning rate, batch size and sequence length are not
# published; these are mPLUG-Owl's, which it starts from.
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

# LRV-Instruction's first version tunes MiniGPT-4's projector (minigpt4_stage2_finetune.yaml): 400,000 steps of a picture on
# each GPU. How many GPUs is not published; the file says one. Answers have at most 160 tokens; questions are not limited.
_LRV_MINIGPT4 = Recipe(
    name="lrv-minigpt4",
    steps=400_000,
    batch_size=1,
    sequence=SequenceShape(length=512, images=1, edges=256),
    trainable="projector",
    prefix_sharing=False,
    supervision=Supervision(answers="as-published"),
    template="minigpt4",
    crop_scale=0.5,
    learning_rate=3e-5,
    projector_learning_rate=3e-5,
    schedule="cosine-lavis",
    warmup_ratio=0.0,
    warmup_steps=200,
    warmup_learning_rate=1e-6,
    min_learning_rate=1e-5,
    max_grad_norm=None,
    weight_decay=0.05,
    save_steps=20_000,
    seed=42,
)
# LRV-Instruction's second version (see `_LRV`) by mPLUG-Owl's train_it.sh: micro-batches of 4 on 8 GPUs, and the linear
# schedule of transformers' Trainer, which ignores the script's --min-lr. Dropout in its abstractor is left out.
_LRV_MPLUG_OWL = dataclasses.replace(
    _LRV,
    name="lrv-mplug-owl",
    trainable="adapters",
    prefix_sharing=False,
    loss_reduction="micro-batches",
    gradient_accumulation_steps=8,
    sequence=SequenceShape(length=2048, images=1, edges=2048),
    template="mplug_owl",
    crop_scale=0.5,
    flip=True,
    schedule="linear",
    warmup_ratio=0.0,
    warmup_steps=50,
)

# RLHF-V on its own model, see `_DDPO`. The paper tunes all weights, without crops. The script's trainer asks for a learning
# rate of 0 for BEiT-3's image experts; whether it had an effect under FSDP is not known. It also augments pictures: crops
# (crop_scale=0.5 flip=true), which the paper advises against, and RandAugment, which is not available here.
_MUFFIN_DDPO = dataclasses.replace(_DDPO, name="rlhfv-muffin-paper", trainable="all", template="muffin")
# The stage before, tuned on UniMM-Chat and VQAv2 half by half: sft_muffin_PATH.sh and run_unimm-chat.sh, whose micro-batches
# have 4 conversations. The number of steps and that nothing was cropped are known from the name of the released checkpoint;
# the script's own run has 1,600 steps on UniMM-Chat alone, with crops.
_MUFFIN_SFT = dataclasses.replace(
    _FULL,
    name="muffin-sft",
    steps=2800,
    batch_size=512,
    gradient_accumulation_steps=128,
    trainable="all",
    freeze_image_experts=True,
    template="muffin",
    max_grad_norm=1.0,
)

# MoE-LLaVA's scripts: 16 micro-batches of the 8 sequences of one device, which are a group. They pad to the longest of 8
# samples of like length, here to 2,048 tokens: padding is not routed. Their router loss had no gradient, and their routers
# probably stayed as they were drawn (defects of the libraries that they use); here they learn.
_MOE_MODELS = ("stablelm", "qwen", "phi2")
_MOE_STAGE_2 = dataclasses.replace(
    _FULL,
    name="moe-llava-stablelm-stage2",
    template="moe_llava",
    image_aspect_ratio="pad",
    gradient_accumulation_steps=16,
)
_MOE_STAGE_3 = dataclasses.replace(
    _MOE_STAGE_2,
    name="moe-llava-stablelm-stage3",
    trainable="mlp",
    upcycle="sparse",
    routing=Routing(second_expert="gumbel", mask_padding=True, group=8),
)
# The same with prefix sharing, as `_REVERIE` is to `_LLAVA`; a sequence is a group.
_MOE_REVERIE = dataclasses.replace(
    _REVERIE,
    name="moe-reverie-1.6bx4",
    trainable="mlp",
    upcycle="sparse",
    routing=Routing(second_expert="gumbel", mask_padding=True),
    template="moe_llava",
    image_aspect_ratio="pad",
    learning_rate=2e-5,
    projector_learning_rate=2e-5,
)


def _named(recipe: Recipe, *names: str, **changes: Any) -> list[Recipe]:
    return [dataclasses.replace(recipe, name=name, **changes) for name in names]


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _SCENES,
        dataclasses.replace(
            _SCENES,
            name="scenes-responses",
            supervision=Supervision("responses"),
            sequence=SequenceShape(length=128, images=1, edges=80),
        ),
        *_named(_LLAVA, "llava-1.5-7b-lora", "llava-1.5-13b-lora", "llava-phi3-lora"),
        _LLAVA_1_0,
        *_named(_FULL, "llava-1.5-7b-full", "llava-1.5-13b-full", "llava-phi3-full"),
        *_named(_FULL, "llava-1.0-7b-full", image_aspect_ratio="square"),
        *_named(_PRETRAIN, "llava-1.5-pretrain", "llava-phi3-pretrain"),
        *_named(_PRETRAIN, "llava-1.0-pretrain", batch_size=128, projector_learning_rate=2e-3, projector_type="linear"),
        *_named(_REVERIE, "reverie-1.5-7b-lora", "reverie-1.5-13b-lora", "reverie-phi3-lora"),
        *_named(_REVERIE, "reverie-1.0-7b-lora", image_aspect_ratio="square"),
        *_named(_PRETRAIN, *(f"moe-llava-{model}-stage1" for model in _MOE_MODELS)),
        *_named(_MOE_STAGE_2, *(f"moe-llava-{model}-stage2" for model in _MOE_MODELS)),
        *_named(_MOE_STAGE_3, *(f"moe-llava-{model}-stage3" for model in _MOE_MODELS)),
        *_named(
            _MOE_STAGE_3,
            "moe-llava-stablelm-stage3-frozen-router",
            freeze_router=True,
            routing=Routing(second_expert="gumbel", mask_padding=True, group=8, aux_coefficient=0.0),
        ),
        _MOE_REVERIE,
        _DDPO,
        *_named(
            _DDPO,
            "rlhfv-ddpo-script",
            batch_size=8,
            steps=2160,
            warmup_ratio=0.03,
            preference=DPOConfig(gamma=1.1, reference="stored"),
        ),
        _MUFFIN_DDPO,
        *_named(
            _MUFFIN_DDPO,
            "rlhfv-muffin-script",
            batch_size=8,
            steps=2160,
            warmup_ratio=0.03,
            freeze_image_experts=True,
            preference=DPOConfig(gamma=1.1, reference="stored"),
        ),
        _MUFFIN_SFT,
        _DPO,
        _LRV,
        _LRV_MINIGPT4,
        _LRV_MPLUG_OWL,
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


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return a recipe with some fields replaced.

    Args:
        recipe: to start from.
        settings: `field=value` each; `sequence.length=512` sets a field of a field, `none` stands for None.

    Raises:
        UserError: a field is unknown, or a value is invalid for it.
    """
    values = dataclasses.asdict(recipe)
    for setting in settings:
        path, equals, value = setting.partition("=")
        fields, around, name = _find_field(values, path)
        if not equals or name not in fields or isinstance(fields[name], dict):
            if "." in name and fields.get(name.partition(".")[0], "") is None:
                raise UserError(
                    f"--set {setting}: {name.partition('.')[0]} is not set in this recipe; start from a recipe that sets it"
                )
            known = ", ".join(_field_names(fields, around))
            raise UserError(f"--set {setting}: write field=value with a recipe field; choose from {known}")
        fields[name] = None if value == "none" and path != "remat" else value  # a choice of `remat` is named none
    try:
        return _ADAPTER.validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(f"--set: {_first_problem(error)}") from None


def _find_field(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str, str]:
    """Return (fields, their prefix, what is left of the path) of the innermost group of fields that a path leads to."""
    around = ""
    while isinstance(inner := values.get(path.partition(".")[0]), dict):
        part, _, path = path.partition(".")
        values, around = inner, f"{around}{part}."
    return values, around, path


def _field_names(values: dict[str, Any], around: str) -> Iterator[str]:
    """Yield the names of fields and of those of their groups, as `--set` takes them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _field_names(value, f"{around}{name}.")
        else:
            yield f"{around}{name}"


def _first_problem(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(map(str, problem["loc"]))
    return f"recipe field {field}: {problem['msg']}" if field else f"recipe: {problem['msg']}"


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        UserError: the name is unknown; the message lists all names.
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

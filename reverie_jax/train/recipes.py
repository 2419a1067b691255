"""Recipes: everything that decides a run's updates, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pydantic

from reverie_jax.data.rows import RowShape
from reverie_jax.data.teaching import Teaching
from reverie_jax.errors import UserError
from reverie_jax.models.lora import DEFAULT_TARGETS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A LoRA run. Adapters and projector are trained; everything else is frozen.

    Attributes:
        steps: optimizer steps.
        rows: rows in a batch, over all devices.
        row: static sizes of a row. With `images=1` a row is one image, so runs of equal steps see equal images.
        teach: what of each conversation is taught: first answers only, or rationales too, and in which form.
        sharing: an image's conversations as one tree; without, each is computed by itself, as other trainers do.
        rank, alpha, dropout, targets: the adapters (scale alpha / rank).
        rate: peak learning rate of the adapters.
        projector_rate: peak learning rate of the projector.
        warmup: share of the steps with a rising rate; then cosine to zero.
        clip: largest gradient norm; None for no clipping, as LLaVA's published recipes.
        save_every: steps between checkpoints.
        keep: checkpoints that are kept.
        seed: fixes order, adapters' start and dropout.
    """

    name: str
    steps: int
    rows: int
    row: RowShape
    teach: Teaching = Teaching()  # noqa: RUF009
    sharing: bool = True
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: str = DEFAULT_TARGETS
    rate: float = 2e-4
    projector_rate: float = 2e-5
    warmup: float = 0.03
    clip: float | None = 1.0
    weight_decay: float = 0.0
    save_every: int = 100
    keep: int = 2
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        return pydantic.TypeAdapter(cls).validate_json(text)


_SCENES = Recipe(
    name="scenes-rationales",
    steps=200,
    rows=16,
    row=RowShape(tokens=448, images=1, edges=288),
    teach=Teaching(answers="as-published"),
    rank=16,
    alpha=32.0,
    dropout=0.0,
    rate=3e-3,
    projector_rate=3e-4,
    save_every=100,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _SCENES,
        dataclasses.replace(
            _SCENES,
            name="scenes-responses",
            teach=Teaching("responses", answers="as-published"),
            row=RowShape(tokens=192, images=1, edges=96),
        ),
    )
}


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
        return pydantic.TypeAdapter(Recipe).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"recipe field {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: there is none; those that there are are named.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; there is {', '.join(sorted(RECIPES))}")
    return RECIPES[name]

"""Identity of a run: everything that its updates depend on, kept as `run.json` in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.pipeline import TreeBuilder
from reverie_jax.data.size_index import records_digest as records_digest
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.models.checkpoints.checksums import Checksums, weights_checksum
from reverie_jax.train.recipe import Recipe

IDENTITY = "run.json"
_SAMPLED_RECORDS = 16
"""Records, the first ones, whose tokens and pixels stand for tokenizer, template and image processing."""
_NAMES = {
    "base": "the base model's weights",
    "weights": "the weights at its start (head, embedding, projector or adapter)",
    "records": "the records",
    "inputs": "tokenizer, template or image processing",
    "dtype": "the dtypes of computation",
}


class ResumeError(UserError):
    """A run folder that cannot be resumed."""


def already_there(folder: Path) -> ResumeError:
    """Return the error of a run that must not resume."""
    return ResumeError(f"{folder}: already holds a run; resume it, or choose another folder")


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as `run.json` has it."""
    fields: dict[str, Any] = json.loads(recipe.to_json())
    return fields


def run_identity(
    model: VisionLanguageModel, recipe: Recipe, records: Sequence[ImageRecord], builder: TreeBuilder
) -> dict[str, Any]:
    """Return what identifies a run, as plain values.

    Args:
        model: at the start, before adapters are attached or weights quantized.
        recipe: with its number of steps.
        records: all records, held-out ones included.
        builder: of their trees.

    Returns:
        `base`, checksums of the frozen parts, which adapters fit; `weights`, a checksum of all; `dtype` of computation;
        digests of `records` and of what the model gets of the first ones (`inputs`); and the `recipe`.
    """
    return {
        "base": frozen_checksums(model),
        "weights": weights_checksum(model),
        "dtype": str(model.compute_dtype),
        "records": records_digest(records),
        "inputs": _inputs_digest(records, builder),
        "recipe": recipe_fields(recipe),
    }


def frozen_checksums(model: VisionLanguageModel) -> Checksums:
    """Return checksums of the parts that a run leaves as they are. The projector is trained: a run has its own."""
    return {part: checksum for part, checksum in base_checksums(model).items() if part != "projector"}


def _inputs_digest(records: Sequence[ImageRecord], builder: TreeBuilder) -> str:
    digest = hashlib.sha256()
    for number in range(min(_SAMPLED_RECORDS, len(records))):
        record = records[number]
        digest.update(builder.processor.preprocess(record.image, record.id).tobytes())
        for element in builder.elements(record, number + 1):
            for name in sorted(element):
                digest.update(element[name].tobytes())
    return digest.hexdigest()[:16]


def read_identity(folder: Path) -> dict[str, Any]:
    """Read a run folder's `run.json`, see `run_identity`.

    Raises:
        ResumeError: the file is missing or invalid.
    """
    path = folder / IDENTITY
    try:
        content = json.loads(path.read_text("utf-8"))
        # Fields that the file lacks get their defaults.
        recipe = recipe_fields(Recipe.from_json(json.dumps(content["recipe"])))
        base = {str(part): str(checksum) for part, checksum in content["base"].items()}
        return {**{name: str(content.get(name, "")) for name in _NAMES}, "base": base, "recipe": recipe}
    except OSError as error:
        raise ResumeError(f"{path}: cannot be read ({error.strerror}); `reverie train` writes it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResumeError(f"{path}: does not identify a run ({error!r})") from None


def check_identity(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a run may continue another one; only what `wanted` has is compared.

    Raises:
        ResumeError: something differs; the fields are named.
    """
    differences = [
        f"recipe field {name} is {_shown(ours)}, the run has {_shown(theirs)}"
        for name, ours, theirs in _different_fields(wanted.get("recipe", {}), stored["recipe"])
    ]
    different = [key for key in _NAMES if key in wanted and wanted[key] != stored[key]]
    if "base" in different and "weights" in different:
        different.remove("weights")  # they follow
    differences += [f"{_NAMES[key]} differ" for key in different]
    if differences:
        raise ResumeError(
            f"{folder}: holds another run: {'; '.join(differences)}. Choose a new folder, or repeat the original command"
        )


def _different_fields(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, our value, their value) of the fields that differ; those of a nested field are `outer.inner`."""
    for name in ours:
        mine, other = ours[name], theirs.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _different_fields(mine, other, f"{prefix}{name}.")
        elif mine != other:
            yield f"{prefix}{name}", mine, other


def _shown(value: Any) -> str:
    """Return a value as --set takes it."""
    return json.dumps(value).strip('"') if value is not None else "none"

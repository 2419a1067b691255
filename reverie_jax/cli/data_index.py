"""`reverie data index`, and `reverie data build --sizes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Write an index of sizes beside records, so that runs of a model and a recipe start without tokenizing them all.

    `reverie train` finds it by its content: tokenizer, template, supervision, sequences and records are those it was made
    of, or it is not used. The batches are the same with and without it.
    """

    records: Annotated[Positional[Path], common.FOLDER]
    """Records folder, written by `reverie data build`."""
    model: common.Model
    recipe: Annotated[str, common.option("RECIPE")]
    """Recipe of the runs, a name or a YAML file."""
    components: common.Components = ()
    set: common.RecipeFields = ()

    def run(self) -> None:
        """Run the command."""
        prepare(self.model, self.recipe, self.components, common.joined(self.set))(self.records)


def prepare(model: str, recipe: str, components: Sequence[str], settings: Sequence[str]) -> Callable[[Path], None]:
    """Check the options of an index; return a function that writes it beside the records in a folder.

    Raises:
        UserError: the model or the recipe cannot be used.
    """
    from reverie_jax.data.pipeline import TreeBuilder
    from reverie_jax.data.records import RecordSource
    from reverie_jax.data.size_index import write_index
    from reverie_jax.data.survey import survey
    from reverie_jax.loading import load_processor
    from reverie_jax.progress import ProgressBars
    from reverie_jax.train import recipes
    from reverie_jax.train.validation import hold_out

    chosen = recipes.override(recipes.read_recipe(recipe), settings)
    processor = load_processor(model, components=components, template=chosen.template)
    supervision = chosen.preference or chosen.supervision
    builder = TreeBuilder(processor, chosen.sequence, supervision, chosen.prefix_sharing)

    def write(folder: Path) -> None:
        source = RecordSource(folder)
        records, _ = hold_out(source, chosen.holdout)
        with ProgressBars() as bars:
            sizes = survey(records, builder, lambda count: bars.update("records tokenized", count, len(records)))
            path = write_index(source, sizes, builder)
        common.note([sizes.warning] if sizes.warning else [])
        stats = sizes.stats
        print(f"{stats.trees:,} trees of {stats.records:,} records, {stats.tokens:,} tokens: {path}")

    return write


def prepare_for_build(
    model: str | None, recipe: str | None, components: Sequence[str], settings: Sequence[str]
) -> Callable[[Path], None]:
    """As `prepare`, for options that may be missing: without a model, what is returned writes nothing.

    Raises:
        UserError: the options do not go together, or cannot be used.
    """
    if model is not None and recipe is not None:
        return prepare(model, recipe, components, settings)
    if model is not None:
        raise UserError("--sizes needs --recipe: its sequences and supervision decide which trees there are")
    if recipe is not None or settings or components:
        raise UserError("--recipe, --set and --components are for --sizes, which names the model")
    return lambda folder: None

"""`reverie recipes` and `reverie benchmarks`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the training recipes, or print one as YAML: `reverie recipes NAME > my.yaml`, edit, `reverie train my.yaml`."""

    name: Annotated[Positional[str | None], common.option("[NAME]")] = None
    """Recipe to print as YAML; all are listed if omitted."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.train import recipes

        if self.name is not None:
            print(recipes.read_recipe(self.name).to_yaml(), end="")
            return
        for name, recipe in sorted(recipes.RECIPES.items()):
            print(f"{name:21} {recipe.summary()}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """List the benchmarks: size, metric, scoring rules, and what they need."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.eval import benchmarks

        for name in benchmarks.names():
            benchmark = benchmarks.find_benchmark(name)
            judged = [f"{rule} (judge)" if rule in benchmark.judged_rules else rule for rule in benchmark.rules]
            print(f"{name:17} rules: {', '.join(judged)}\n{'':17} data: {benchmark.required_files}")
            size = f"{benchmark.published_items:,} questions" if benchmark.published_items else ""
            if asked := ", ".join(filter(None, (size, benchmark.metric))):
                print(f"{'':17} asks: {asked}")
            if hub := benchmark.hub:
                large = f", {hub.megabytes:,.0f} MB" if hub.megabytes else ""
                print(f"{'':17} --data hub: {hub.repository}{large}, licence: {hub.licence or 'not stated there'}")
            if scales := dict.fromkeys(filter(None, map(benchmark.scale_of, benchmark.rules))):
                print(f"{'':17} scale: {' or '.join(scales)}")

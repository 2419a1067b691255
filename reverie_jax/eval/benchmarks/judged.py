"""What benchmarks with a judge share: prompts filled from templates, and replies that must be there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkError, NotScorable


def fill(prompts: Mapping[str, str], name: str, **fields: str) -> str:
    """A template of `str.format` with its placeholders filled in.

    Raises:
        BenchmarkError: there is none of that name, or it asks for something else.
    """
    if name not in prompts:
        raise BenchmarkError(f"no prompt {name}.txt")
    try:
        return prompts[name].format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        places = ", ".join(f"{{{field}}}" for field in fields)
        raise BenchmarkError(
            f"{name}.txt: not a template ({error!r}); its placeholders are {places}, and a brace is {{{{ or }}}}"
        ) from None


def needed(benchmark: Benchmark, replies: Mapping[str, str] | None, ids: Iterable[str]) -> Mapping[str, str]:
    """The replies, where none is missing.

    Args:
        ids: of the replies without which there is no score.

    Raises:
        BenchmarkError: some are missing.
    """
    if replies is None:
        raise NotScorable(
            f"{benchmark.name}: scored by what a judge replies; ask one with `reverie judge`, and name the file of replies"
        )
    wanted = list(ids)
    missing = [id for id in wanted if id not in replies]
    if missing:
        raise BenchmarkError(
            f"{benchmark.name}: {len(missing)} of {len(wanted)} replies of the judge are missing, the first is "
            f"{missing[0]}; run `reverie judge` again, which asks only for those"
        )
    return replies

"""Benchmarks' datasets on the Hugging Face hub, which are fetched only when asked (`--data hub`)."""

from __future__ import annotations

import contextlib
import fnmatch
from pathlib import Path

from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkError
from reverie_jax.hub.repository import HubError, download, look_up


def fetch(benchmark: Benchmark) -> Path:
    """Return the folder of a benchmark's dataset in the hub's cache; what is missing is downloaded, at one fixed commit.

    Licence and size are logged before the download.

    Raises:
        BenchmarkError: The benchmark has no dataset on the hub, or the download fails.
    """
    dataset = benchmark.hub
    if dataset is None:
        raise BenchmarkError(
            f"--data hub: no dataset of {benchmark.name} on the hub is read here; it needs {benchmark.required_files}"
        )
    repository, pinned, patterns = dataset.repository, dataset.revision or None, dataset.files
    try:
        info = look_up(repository, pinned)
    except HubError as error:
        import huggingface_hub

        with contextlib.suppress(Exception):  # offline: a pinned commit may be in the cache
            return Path(
                huggingface_hub.snapshot_download(
                    repository,
                    repo_type="dataset",
                    revision=pinned,
                    allow_patterns=list(patterns),
                    local_files_only=True,
                )
            )
        raise BenchmarkError(f"--data hub: {error}") from None
    found = [file.rfilename for file in info.siblings or []]
    names = [name for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    try:
        return download(benchmark.name, info, names, pinned=pinned is not None, licence=dataset.licence)
    except HubError as error:
        raise BenchmarkError(f"--data hub: {error}") from None

"""Benchmarks' datasets on the Hugging Face hub, which are fetched only when asked (`--data hub`)."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
from pathlib import Path

from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkError

_log = logging.getLogger(__name__)


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
    import huggingface_hub

    repository, pinned = dataset.repository, dataset.revision or None
    get = functools.partial(
        huggingface_hub.snapshot_download, repository, repo_type="dataset", allow_patterns=list(dataset.files)
    )
    try:
        info = huggingface_hub.HfApi().dataset_info(repository, revision=pinned, files_metadata=True)
    except Exception as error:  # the hub client raises dozens of kinds
        with contextlib.suppress(Exception):  # offline: a pinned commit may be in the cache
            return Path(get(revision=pinned, local_files_only=True))
        raise _failed(repository, error) from None
    sizes = [
        file.size or 0
        for file in info.siblings or []
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in dataset.files)
    ]
    _log.info(
        "%s: datasets/%s at %s%s: %d files, %s MB, licence: %s; what is in the cache is not downloaded again",
        *(benchmark.name, repository, info.sha, "" if pinned else " (today's commit; none is pinned)"),
        *(len(sizes), f"{sum(sizes) / 1e6:,.1f}"),
        getattr(info.card_data, "license", None) or dataset.licence or "not stated there; ask its authors",
    )
    try:
        return Path(get(revision=info.sha))
    except Exception as error:
        raise _failed(repository, error) from None


def _failed(repository: str, error: Exception) -> BenchmarkError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return BenchmarkError(f"--data hub: datasets/{repository} cannot be downloaded ({reason})")

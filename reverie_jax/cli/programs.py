"""JAX's compilation cache: a second process compiles nothing that a first one has."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

MAX_BYTES = 8 << 30
"""The programs that were used longest ago are deleted beyond this size."""


def use_cache() -> None:
    """Keep compiled programs in the user's cache folder; called before JAX is imported.

    JAX's own variables win: JAX_COMPILATION_CACHE_DIR moves the folder, JAX_ENABLE_COMPILATION_CACHE=0 switches it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home, or a read-only one: everything works, compiling each time
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
        # Small programs are many: each is quick to compile, all together take seconds.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def cache_folder() -> Path:
    """Return the folder of compiled programs: one for each kind of CPU, since programs for one may stop another."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "reverie-jax" / "programs" / _cpu()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            features = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"

"""`reverie env`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json as jsonlib
import platform
from typing import Any

from reverie_jax.cli import common

_PACKAGES = (
    *("reverie-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    *("transformers", "tokenizers", "safetensors", "numpy", "torch", "google-genai", "openai"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Env:
    """Print versions, devices and memory: what a bug report needs."""

    json: common.Json = False

    def run(self) -> None:
        """Run the command."""
        facts = environment()
        if self.json:
            print(jsonlib.dumps(facts, indent=2))
            return
        for name, value in facts.items():
            rows = value.items() if isinstance(value, dict) else [(name, value)]
            for key, text in rows:
                print(f"{key:22} {text}")


def environment() -> dict[str, Any]:
    """Return platform, package versions and devices with their memory, as plain values."""
    import jax

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = {}
    for device in jax.local_devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = "" if limit is None else f", {limit / 2**30:.1f} GiB"
        devices[f"device {device.id}"] = f"{device.device_kind} ({device.platform}){memory}"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "devices": devices,
        "memory": memory_of_host(),
        "compiled programs": jax.config.jax_compilation_cache_dir or "not kept",  # type: ignore[attr-defined]
    }


def memory_of_host() -> str:
    """Return the host's total memory, or an empty text where the system does not tell."""
    import os

    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return ""

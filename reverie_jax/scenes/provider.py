"""Model provider `scenes:FOLDER`: replies from the scene graphs of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reverie_jax.hosted.interface import Provider, RequestSettings
from reverie_jax.hosted.providers.local import Local
from reverie_jax.scenes.annotator import SceneAnnotator
from reverie_jax.scenes.dataset import read_graphs


def provider(folder: str, url: str | None, settings: RequestSettings, environment: Mapping[str, str]) -> Provider:
    """Open the provider; it needs neither address, settings nor keys.

    Raises:
        UserError: the folder has no readable scene graphs.
    """
    return Local(SceneAnnotator(read_graphs(Path(folder))), folder)

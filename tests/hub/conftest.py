"""A stand-in hub that `huggingface_hub` talks to in this process."""

from __future__ import annotations

from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants

from reverie_jax.hub.datasets import fetch_annotations
from tests.hosted.fixtures import reverie
from tests.hub.server import Hub

__all__ = ["reverie"]

TOKEN = "hf_writer"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """Yield a hub where the token may write to `lab`, and where another one may only read."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub(store=tmp_path / "hub-store") as hub:
        hub.writers = {TOKEN: {"lab"}, "hf_reader": set()}
        changes = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }
        changes |= {"HF_HUB_CACHE": str(tmp_path / "hub-cache"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
        changes |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True}
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()
        fetch_annotations.cache_clear()
        yield hub
        huggingface_hub.close_session()

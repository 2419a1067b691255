"""Publish a model's folder, or records, on the Hugging Face hub."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reverie_jax.data.records import RecordSource
from reverie_jax.files import write_json
from reverie_jax.hub.cards import base_licence, update_card, write_dataset_card
from reverie_jax.hub.datasets import SOURCES, read_sources, write_parquet
from reverie_jax.hub.repository import upload


def publish_model(folder: Path, name: str, fields: Mapping[str, Any] | None = None, scores: Sequence[Path] = ()) -> str:
    """Upload a folder of `reverie convert` to a repository that exists; return the address of the commit.

    Args:
        folder: The model, or adapters. Its card gets what is given here, and a licence from its base model's if it has none.
        name: owner/name.
        fields: Of the card's metadata.
        scores: As for `update_card`.

    Raises:
        HubError: The upload fails.
        UserError: The card or a file of scores cannot be used.
    """
    fields = fields or {}
    inherited = {} if "license" in fields else base_licence(folder)
    update_card(folder, {**inherited, **fields}, scores, name)
    return upload(folder, name, "model", again=_command(folder, name))


def publish_records(folder: Path, name: str, fields: Mapping[str, Any] | None = None) -> str:
    """Upload records as a dataset of Parquet files, to a repository that exists; return the address of the commit.

    The Parquet files are beside the records as long as the upload lasts.

    Args:
        folder: The records.
        name: owner/name.
        fields: Of the card's metadata.

    Raises:
        DataError: The records cannot be read.
        HubError: The upload fails.
    """
    records, sources = RecordSource(folder), read_sources(folder)
    others = [each for each in sources.get("datasets", ()) if each != name]
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        dataset = Path(temporary)
        write_dataset_card(dataset, write_parquet(records, dataset), {**sources, "datasets": others})
        update_card(dataset, fields or {}, (), name)
        address = upload(dataset, name, "dataset", again=_command(folder, name))
    write_json(
        folder / SOURCES, {**sources, "datasets": [*others, name]}
    )  # for cards of models that are trained on them
    return address


def _command(folder: Path, name: str) -> str:
    return f"reverie push {shlex.quote(str(folder))} {name}"

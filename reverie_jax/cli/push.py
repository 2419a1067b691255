"""`reverie push`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.cli.train import HUB
from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a model or records to the Hugging Face hub, with a card; also again, or with evaluation results.

    Takes what `reverie convert` wrote, a run of `reverie train --push-to-hub`, or records of `reverie data build`, which
    become Parquet files. The token is HF_TOKEN, or that of `hf auth login`.
    """

    folder: Annotated[Positional[Path], common.option("FOLDER")]
    """Folder to upload."""
    repository: Annotated[Positional[str], common.option("OWNER/NAME")]
    """Repository on the hub; created if missing."""
    public: common.Public = False
    scores: Annotated[common.Several[Path], common.option("PATH ...")] = ()
    """Evaluation results for the card: scores.json of `reverie eval` or `reverie score`, or their folders."""
    card: Annotated[common.Several[str], common.option("FIELD=VALUE ...")] = ()
    """Fields of the card's metadata: `license=llama2 datasets=owner/name,owner/other`."""

    def run(self) -> None:
        """Run the command."""
        folder, is_records = self._folder()
        scores, fields = common.joined(self.scores), parse_fields(common.joined(self.card))
        if is_records and scores:
            raise UserError("--scores: only a model has scores; leave it out for records")
        from reverie_jax.hub.repository import check_access

        check_access(self.repository, "dataset" if is_records else "model", public=self.public)
        from reverie_jax.hub import publish

        if is_records:
            print(publish.publish_records(folder, self.repository, fields))
        else:
            print(publish.publish_model(folder, self.repository, fields, scores))

    def _folder(self) -> tuple[Path, bool]:
        """Return the folder to upload, and whether it holds records.

        Raises:
            UserError: It is neither a model nor records.
        """
        folder = self.folder
        if (folder / "run.json").exists():
            if (folder / HUB).is_dir():
                return folder / HUB, False
            raise UserError(
                f"{folder}: a run that was not exported; `reverie convert MODEL OUT --adapter {folder} --to auto "
                f"--push-to-hub {self.repository}` does both"
            )
        if (folder / "dataset_info.json").exists() or any(folder.glob("*/*/dataset_info.json")):
            return folder, True
        if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            return folder, False
        raise UserError(f"{folder}: not a folder of `reverie convert`, a run, or records of `reverie data build`")


def parse_fields(settings: list[str]) -> dict[str, Any]:
    """Return the fields of `FIELD=VALUE` settings; values with commas, and those of fields that are lists, are lists.

    Raises:
        UserError: A setting is not FIELD=VALUE.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise UserError(f"--card {setting}: write it as FIELD=VALUE")
        fields[name] = value.split(",") if "," in value or name in ("datasets", "tags") else value
    return fields

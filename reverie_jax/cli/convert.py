"""`reverie convert`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common
from reverie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint or adapter to another format.

    Input formats are recognized by content: llava-hf, original LLaVA or LLaVA-pp (.bin or safetensors), their LoRA folders,
    a mm_projector.bin, MiniGPT-4's files, mPLUG-Owl, Muffin, or Orbax. Output formats of a whole model, with adapters
    merged: llava-hf (transformers, vLLM), llava (original LLaVA), original (MiniGPT-4, mPLUG-Owl, Muffin) and orbax
    (reverie-jax); of adapters alone: peft (transformers) and llava-lora (original LLaVA).
    """

    model: Annotated[Positional[str], common.option("MODEL")]
    """Checkpoint: a folder or hub id (owner/name@revision)."""
    out: Annotated[Positional[Path], common.FOLDER]
    """Output folder; it must not exist, and appears when it is complete."""
    to: Annotated[str, common.option("FORMAT")]
    """Output format: llava-hf, llava, original, orbax, peft or llava-lora; auto: what most others read."""
    components: common.Components = ()
    adapter: common.Adapter = None
    template: common.Template = None
    dtype: Annotated[str | None, common.option("DTYPE")] = None
    """Dtype of a whole model: float32, bfloat16 or float16; as stored if omitted."""
    image_size: Annotated[int | None, common.option("PIXELS")] = None
    """Resize the tower's position embeddings to images of this side; as stored if omitted."""
    shard_size: Annotated[str, common.option("SIZE")] = "5GB"
    """Maximum size of a weights file."""
    push_to_hub: common.PushToHub = None
    public: common.Public = False

    def run(self) -> None:
        """Run the command."""
        common.check_template(self.template)
        from reverie_jax.convert import convert

        known = (*common.DTYPES, "float16")
        dtype = None if self.dtype is None else common.parse_dtype(self.dtype, known, auto=False)
        shard_bytes = parse_size(self.shard_size)
        if self.push_to_hub is not None:
            from reverie_jax.hub.repository import check_access

            check_access(self.push_to_hub, "model", public=self.public)
        folder = convert(
            self.model,
            self.out,
            to=self.to,
            components=self.components,
            adapter=self.adapter,
            template=self.template,
            dtype=dtype,
            image_size=self.image_size,
            shard_bytes=shard_bytes,
        )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB")
        if self.push_to_hub is not None:
            from reverie_jax.hub.publish import publish_model

            print(publish_model(folder, self.push_to_hub))


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "300MB" or a plain number.

    Raises:
        UserError: the text is not a size.
    """
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "": 1}
    match = re.fullmatch(r"(\d+)\s*(kb|mb|gb|)", text.strip().lower())
    if match is None or not int(match[1]):
        raise UserError(f"--shard-size {text}: write it as 5GB or 300MB")
    return int(match[1]) * units[match[2]]

"""Files of a checkpoint: JSON, tensors by name, hub downloads, and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from reverie_jax import files
from reverie_jax.errors import CheckpointError

_log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a model's weights; with `.index.json` behind, of the index of several files. The first found is read."""

_SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: The file is missing, is not valid JSON or is not an object.
    """
    raw = files.read_json(path, CheckpointError)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return raw


def resolve(name: str | Path) -> Path:
    """A local path as it is; else a hub id, `owner/name` or `owner/name@revision`, downloaded at one fixed commit.

    Raises:
        CheckpointError: neither a path here nor a repository that can be had.
    """
    if Path(name).exists():
        return Path(name)
    if not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError(f"{name}: no such file or folder")
    import huggingface_hub

    repository, _, revision = str(name).partition("@")
    try:
        commit = huggingface_hub.HfApi().model_info(repository, revision=revision or None).sha
        if revision != commit:
            _log.info("%s is at commit %s today; write %s@%s to pin it", name, commit, repository, commit)
        patterns = ["*.json", "*.safetensors", "*.bin", "tokenizer.model", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=patterns))
    except Exception as error:  # the hub client has dozens of kinds, and users of it one question: why not
        with contextlib.suppress(Exception):  # offline: a pinned commit may lie in the cache
            return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, local_files_only=True))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no folder here, and the hub cannot be asked for it ({reason})") from None


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype | None
    """None: no floating-point type that a model's parameter has."""


class _Safetensors:
    """A safetensors file. It is mapped while one tensor is read, and not longer: mapped pages count as memory."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="numpy") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: not a readable safetensors file ({error})") from None

    def listing(self) -> dict[str, Stored]:
        with self._open() as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            kinds = {name: _SAFETENSORS_DTYPES.get(part.get_dtype()) for name, part in slices.items()}
            return {
                name: Stored(self.path, tuple(part.get_shape()), None if kinds[name] is None else np.dtype(kinds[name]))
                for name, part in slices.items()
            }

    def read(self, name: str) -> np.ndarray:
        with self._open() as handle:
            return handle.get_tensor(name)


class _Pickle:
    """A file of `torch.save`. Nothing in it is executed (`weights_only`)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import torch
        except ModuleNotFoundError:
            raise CheckpointError(
                f"{path}: reading .bin files needs PyTorch; install reverie-jax[convert], or convert to safetensors"
            ) from None
        self._torch = torch
        try:
            tensors = self._load(mmap=True)
        except CheckpointError:
            tensors = self._load(mmap=False)  # files from before torch 1.6 cannot be mapped
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise CheckpointError(f"{path}: not a state dict, a dictionary from names to tensors")
        self._tensors: dict[str, Any] = {str(name): tensor for name, tensor in tensors.items()}

    def _load(self, *, mmap: bool) -> Any:
        try:
            return self._torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a broken file can raise anything: KeyError, EOFError, UnpicklingError, …
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.path}: not a PyTorch file of tensors alone; nothing in it was executed ({reason})"
            ) from None

    def listing(self) -> dict[str, Stored]:
        torch = self._torch
        kinds: dict[Any, Any] = {
            torch.float64: np.float64,
            torch.float32: np.float32,
            torch.float16: np.float16,
            torch.bfloat16: jnp.bfloat16,
        }
        return {
            name: Stored(
                self.path, tuple(tensor.shape), np.dtype(kinds[tensor.dtype]) if tensor.dtype in kinds else None
            )
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == self._torch.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


def _open(path: Path) -> _Safetensors | _Pickle:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)


class Tensors:
    """The tensors of one or several files by their stored names; nothing but headers is read before it is asked for.

    Args:
        files: what to read.
        index: names by file, where an index promises them.
    """

    def __init__(self, files: list[Path], index: tuple[Path, dict[str, str]] | None = None):
        self.files = files
        self.stored: dict[str, Stored] = {}
        for file in files:
            for name, stored in _open(file).listing().items():
                if name in self.stored:
                    raise CheckpointError(
                        f"{file}: tensor {name} is there twice, also in {self.stored[name].file.name}"
                    )
                self.stored[name] = stored
        if index is not None:
            path, promised = index
            for name in sorted(promised.keys() | self.stored.keys()):
                found = self.stored[name].file.name if name in self.stored else None
                if promised.get(name) != found:
                    raise CheckpointError(
                        f"{path}: tensor {name} is said to be in {promised.get(name)}, and is in {found}"
                    )

    def read_all(self, use: Callable[[str, np.ndarray], None], wanted: set[str]) -> None:
        """Calls `use(name, array)` for every wanted tensor, file by file: one file is open, one tensor held, at a time."""
        for file in self.files:
            source = _open(file)
            for name, stored in self.stored.items():
                if stored.file == file and name in wanted:
                    use(name, source.read(name))


def weights_of(folder: Path, names: tuple[str, ...] = WEIGHTS) -> Tensors | None:
    """A folder's weights: the first of the names that is there, whole or sharded; None where none is.

    Raises:
        CheckpointError: an index or a file that cannot be used.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if index.exists():
            promised = read_json(index).get("weight_map")
            if not isinstance(promised, dict) or not all(isinstance(file, str) for file in promised.values()):
                raise CheckpointError(f"{index}: weight_map is not there, or is not from names to files")
            for file in promised.values():
                if Path(file).name != file:
                    raise CheckpointError(f"{index}: shard {file!r} lies outside the folder")
                if not (folder / file).is_file():
                    raise CheckpointError(f"{folder / file}: no such file, and {index.name} names it")
            return Tensors([folder / file for file in sorted(set(promised.values()))], (index, promised))
        if (folder / name).exists():
            return Tensors([folder / name])
    return None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes the name `path` when the block succeeds (see `files.atomic_folder`).

    Raises:
        CheckpointError: `path` already exists and is not an empty folder, or writing fails. Nothing is left behind.
    """
    try:
        with files.atomic_folder(path, CheckpointError) as folder:
            yield folder
    except SafetensorError as error:  # what safetensors raises when the disk is full
        raise CheckpointError(f"{path}: cannot be written ({error})") from error

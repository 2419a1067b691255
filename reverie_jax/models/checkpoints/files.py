"""Files of a checkpoint: JSON, tensors by name, hub downloads and output folders."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from reverie_jax import files
from reverie_jax.errors import CheckpointError, UserError
from reverie_jax.models.checkpoints.families import check_folders
from reverie_jax.models.checkpoints.names import IGNORED, canonical_name
from reverie_jax.models.checkpoints.specs import EMBEDDING, HEAD, AnyArray

_log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of a model's weights; with the suffix `.index.json`, the index of several files. The first that exists is read."""

_SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_MODEL_KEYS = ("model", "module", "state_dict")
"""Where files that hold a training's state have the model: BLIP-2 and MiniGPT-4, EVA and DeepSpeed, Lightning."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: The file is missing, is not valid JSON or is not an object.
    """
    raw = files.read_json(path, CheckpointError)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return raw


def resolve(name: str | Path, check: Callable[[Path, dict[str, Any]], object] | None = None) -> Path:
    """Return a local path unchanged; download a hub id (`owner/name` or `owner/name@revision`) at one fixed commit.

    Only files that a checkpoint of one format needs are downloaded: no subfolders, and no weights in a second format.

    Args:
        name: A path or hub id.
        check: Raises an error if the path and content of config.json are of no supported model; called before weights
            are downloaded.

    Raises:
        CheckpointError: The path is missing and is not a hub id, or the download fails.
    """
    if Path(name).exists():
        return Path(name)
    if not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError(f"{name}: no such file or folder")
    import huggingface_hub

    repository, _, revision = str(name).partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision or None)
        if revision != info.sha:
            _log.info("%s is at commit %s today; write %s@%s to pin it", name, info.sha, repository, info.sha)
        names = [file.rfilename for file in info.siblings or []]
        check_folders(name, (file.partition("/")[0] for file in names if "/" in file))
        settings, weights = _needed(names)
        folder = Path(huggingface_hub.snapshot_download(repository, revision=info.sha, allow_patterns=settings))
        config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        if check is not None and config:
            check(folder / "config.json", config)
        if config.get("model_type") == "reverie":  # Orbax's format is a folder of many files
            weights = ["*"]
        return Path(huggingface_hub.snapshot_download(repository, revision=info.sha, allow_patterns=settings + weights))
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises dozens of kinds
        with contextlib.suppress(Exception):  # offline: a pinned commit may be in the cache
            return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, local_files_only=True))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no such folder, and the download from the hub failed ({reason})") from None


def _needed(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the settings and the weights among a repository's files, each tensor in one format."""
    names = [name for name in names if "/" not in name]
    settings = [n for n in names if n.endswith((".json", ".jinja", ".tiktoken")) or n == "tokenizer.model"]
    weights = [name for name in names if name in ("mm_projector.bin", "non_lora_trainables.bin")]
    for formats in (
        (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin"),
        (r"adapter_model\.safetensors", r"adapter_model\.bin"),
    ):
        found = ([name for name in names if re.fullmatch(format, name)] for format in formats)
        weights += next(filter(None, found), [])
    return settings, weights


class Stored(NamedTuple):
    """File, shape and dtype of a stored tensor; dtype is None where it is not a supported floating-point type."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None

    @property
    def dtype_name(self) -> str:
        """The dtype for messages."""
        return "not floating-point" if self.dtype is None else str(self.dtype)


class _Safetensors:
    """A safetensors file, mapped only while one tensor is read: mapped pages count as memory."""

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

    def read(self, name: str) -> AnyArray:
        with self._open() as handle:
            return np.asarray(handle.get_tensor(name))


class _Pickle:
    """A file written by `torch.save`. Nothing in it is executed (`weights_only`)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import torch
        except ModuleNotFoundError:
            raise CheckpointError(
                f"{path}: reading {path.suffix} files needs PyTorch: pip install -e '.[convert]' in the checkout"
            ) from None
        self._torch = torch
        try:
            tensors = self._load(mmap=True)
        except CheckpointError:
            tensors = self._load(mmap=False)  # files from before torch 1.6 cannot be mapped
        self._tensors: dict[str, Any] = {str(name): tensor for name, tensor in self._state_dict(tensors).items()}

    def _load(self, *, mmap: bool) -> Any:
        try:
            return self._torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a broken file can raise anything: KeyError, EOFError, UnpicklingError, …
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.path}: not a PyTorch file that contains only tensors; nothing in it was executed ({reason})"
            ) from None

    def _state_dict(self, content: Any) -> dict[Any, Any]:
        """Return the file's state dict: all of it, or the one entry that is the model beside optimizer, settings, …."""
        parts = [("", content), *((key, content.get(key)) for key in _MODEL_KEYS if isinstance(content, dict))]
        found = [
            (key, part)
            for key, part in parts
            if isinstance(part, dict) and all(isinstance(value, self._torch.Tensor) for value in part.values())
        ]
        if len(found) == 1 or (found and not found[0][0]):
            return dict(found[0][1])
        inner = " and ".join(key for key, _ in found) or f"none of {', '.join(_MODEL_KEYS)}"
        raise CheckpointError(
            f"{self.path}: not a state dict (a dictionary from names to tensors), nor one beside other things: {inner} is"
        )

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

    def read(self, name: str) -> AnyArray:
        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == self._torch.bfloat16:
            return np.asarray(tensor.view(self._torch.int16).numpy().view(jnp.bfloat16))
        return np.asarray(tensor.numpy())


def is_finite(array: AnyArray) -> bool:
    """Return whether no value is NaN or infinite."""
    if array.dtype == jnp.bfloat16:  # by its exponent: many times as fast as ml_dtypes
        return not bool(((array.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array).all())


def _open(path: Path) -> _Safetensors | _Pickle:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)


class Tensors:
    """The tensors of one or several files by their stored names. Only headers are read until `read_all`.

    Args:
        index: Path and `weight_map` (tensor name to file name) of the index, where the folder has one.

    Raises:
        CheckpointError: A file cannot be read, a tensor is duplicate, or the index does not match the files.
    """

    def __init__(self, files: list[Path], index: tuple[Path, dict[str, str]] | None = None):
        self.files = files
        self.stored: dict[str, Stored] = {}
        for file in files:
            for name, stored in _open(file).listing().items():
                if name in self.stored:
                    raise CheckpointError(f"{file}: duplicate tensor {name}, also in {self.stored[name].file.name}")
                self.stored[name] = stored
        if index is not None:
            path, weight_map = index
            for name in sorted(weight_map.keys() | self.stored.keys()):
                actual = self.stored[name].file.name if name in self.stored else "no file"
                if (listed := weight_map.get(name, "no file")) != actual:
                    raise CheckpointError(
                        f"{path}: tensor {name} is listed in {listed}, but stored in {actual}; the index is of other files"
                    )

    def read_all(self, use: Callable[[str, AnyArray], None], wanted: set[str]) -> None:
        """Call `use(name, array)` for every wanted tensor, file by file: one file is open and one tensor held at a time.

        Raises:
            CheckpointError: A tensor has values that are not finite.
        """
        for file in self.files:
            if not (names := [name for name in self.stored if name in wanted and self.stored[name].file == file]):
                continue
            source = _open(file)
            for name in names:
                array = source.read(name)
                if not is_finite(array):
                    raise CheckpointError(f"{file}: tensor {name} has values that are NaN or infinite")
                use(name, array)


class SummedTensors(Tensors):
    """The tensors of a model that is published as differences to another one (Vicuna v0), added when they are read.

    The sum has the delta's dtype, to which the base's tensor is cast before, as in FastChat and LLaVA: they read both as
    float16, the dtype of all published deltas. Rows and columns that the base's embedding or LM head lacks count as zeros
    (added tokens). Other parts than the language model, as a projector, may be the delta's alone. Files of the two may be
    divided differently.

    Raises:
        CheckpointError: A tensor is missing on one side, or the two have different shapes.
    """

    def __init__(self, base: Tensors, delta: Tensors):
        self.files, self.stored = delta.files, delta.stored
        self._base, self._delta = base, delta
        terms = {canonical_name(name): name for name in base.stored if not IGNORED.search(name)}
        self._terms: dict[str, str] = {}  # the delta's name to the base's
        for name, stored in delta.stored.items():
            canonical = canonical_name(name)
            if (term := terms.pop(canonical, None)) is not None:
                self._terms[name], other = term, base.stored[term]
                may_grow = canonical in (EMBEDDING, f"{HEAD}.weight")
                sizes = itertools.zip_longest(other.shape, stored.shape, fillvalue=-1)
                fits = all(size == grown or (may_grow and 0 < size < grown) for size, grown in sizes)
                if not fits or stored.dtype is None or other.dtype is None:
                    raise CheckpointError(
                        f"{stored.file}: tensor {name} is {stored.dtype_name} {stored.shape}, not a difference to"
                        f" {other.dtype_name} {other.shape} in {other.file}"
                    )
            elif canonical.startswith("language_model.") and not IGNORED.search(name):
                raise CheckpointError(
                    f"{base.files[0].parent}: no tensor {name}, to which {stored.file} has a difference"
                )
        for term in terms.values():
            raise CheckpointError(f"{delta.files[0].parent}: no difference to {term} of {base.stored[term].file}")

    def read_all(self, use: Callable[[str, AnyArray], None], wanted: set[str]) -> None:
        """Call `use(name, array)` for every wanted tensor; one file of each side is open at a time.

        Raises:
            CheckpointError: A tensor has values that are not finite.
        """
        self._delta.read_all(use, wanted - self._terms.keys())
        groups: dict[tuple[Path, Path], set[str]] = {}
        for name in self._terms.keys() & wanted:
            files = self.stored[name].file, self._base.stored[self._terms[name]].file
            groups.setdefault(files, set()).add(name)
        for (_, base_file), names in sorted(groups.items()):
            self._delta.read_all(functools.partial(self._add, _open(base_file), use), names)

    def _add(
        self, base: _Safetensors | _Pickle, use: Callable[[str, AnyArray], None], name: str, delta: AnyArray
    ) -> None:
        term, total = base.read(self._terms[name]), delta.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            total[tuple(map(slice, term.shape))] += term.astype(total.dtype)
        if not is_finite(total):
            raise CheckpointError(f"{base.path}: tensor {name} and the delta's add up to NaN or infinite values")
        use(name, total)


def split_delta(source: str) -> tuple[str, str] | None:
    """Return base and delta of `BASE+DELTA`, two paths or hub ids; None for any other source.

    An existing path is never split.

    Raises:
        CheckpointError: It can be split in several ways.
    """
    if Path(source).exists():
        return None
    places = [place for place, character in enumerate(source) if character == "+"]
    splits = [(source[:place], source[place + 1 :]) for place in places]
    for enough in (all, any):  # with one only, `resolve` reports that the other is missing
        found = [pair for pair in splits if all(pair) and enough(map(_is_source, pair))]
        if len(found) > 1:
            raise CheckpointError(f"{source}: no such path, and as BASE+DELTA unclear: {' or '.join(map(str, found))}")
        if found:
            return found[0]
    return None


def _is_source(name: str) -> bool:
    return Path(name).exists() or _HUB_ID.fullmatch(name) is not None


def weights_of(folder: Path, names: tuple[str, ...] = WEIGHTS) -> Tensors | None:
    """Return a folder's weights: the first of the names that exists, as one file or in shards; None without any.

    Raises:
        CheckpointError: An index or a file cannot be used.
    """
    for name in names:
        single, index = folder / name, folder / f"{name}.index.json"
        if single.exists():
            if index.exists():
                _log.warning("%s: read as transformers does; %s beside it is ignored", single, index.name)
            return Tensors([single])
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{index}: weight_map is missing or does not map tensor names to file names")
            for file in weight_map.values():
                if Path(file).name != file:
                    raise CheckpointError(f"{index}: shard {file!r} is outside the folder")
                if not (folder / file).is_file():
                    raise CheckpointError(f"{folder / file}: no such file, but {index.name} lists it")
            return Tensors([folder / file for file in sorted(set(weight_map.values()))], (index, weight_map))
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
    except CheckpointError:
        raise
    except UserError as error:  # of `files.write_json`
        raise CheckpointError(str(error)) from error
    except SafetensorError as error:  # what safetensors raises when the disk is full
        raise CheckpointError(f"{path}: cannot be written ({error})") from error

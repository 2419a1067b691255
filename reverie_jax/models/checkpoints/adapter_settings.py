"""What an adapter_config.json of PEFT says: LoRA or DoRA, its ranks, scales and modules; anything else is refused."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from reverie_jax.errors import CheckpointError
from reverie_jax.models.checkpoints.components import ADAPTER_CONFIG
from reverie_jax.models.checkpoints.files import read_json
from reverie_jax.models.checkpoints.names import memory_name
from reverie_jax.models.config import System, VLMConfig

_log = logging.getLogger(__name__)

# Settings of an adapter_config.json that change what it computes, with the values under which it is LoRA or DoRA.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # The other initializations also change the base model's weights.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
}

# Settings that describe an adapter's origin or training, or kinds of layers that a LLaVA has none of; any value is accepted.
_INFORMATIVE = {
    *("auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("task_type", "ensure_weight_tying", "_custom_modules", "runtime_config"),
}
_READ = {
    *("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("use_dora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}

LRV_RANK, LRV_ALPHA, LRV_TARGETS = 8, 32, r".*language_model.*\.(q_proj|v_proj)"
"""LoRA of mPLUG-Owl's and LRV-Instruction's code (`pipeline/train.py`, `utils/model_worker.py`), on mPLUG-Owl."""

Names = str | tuple[str, ...]
"""Modules of a model: a regular expression of their whole dotted names, or ends of these names."""

_SAVED = re.compile(r"(model\.)?multi_modal_projector(\.linear_[12])?|linear_[12]|llama_proj|(model\.)?mm_projector")
"""Names in `modules_to_save` that are the projector or a layer of it, and nothing else of a model."""


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The settings of an adapter.

    Attributes:
        path: The adapter_config.json.
        base_model: Name of the model that it was trained on; empty where it is not recorded.
        saved: Names of modules whose own weights were tuned and are stored too.
        rank: Of modules that no pattern matches, as `alpha`.
        rank_stabilized: Whether the scale is alpha / sqrt(rank).
        rank_pattern: Ranks by regular expressions of module names, as `alpha_pattern`.
        dora: Whether each module has magnitudes.
        targets: The adapted modules; None for all, or where it is not recorded.
        excluded: Of these, the ones that are not.
        layers: If any, the only layers in which modules that `targets` names are adapted.
        layer_lists: Regular expressions of the names of lists of layers; any list by default.
    """

    path: Path
    base_model: str
    saved: tuple[str, ...]
    rank: int
    alpha: float
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dora: bool = False
    targets: Names | None = None
    excluded: Names = ()
    layers: tuple[int, ...] = ()
    layer_lists: tuple[str, ...] = ()

    def adapts(self, module: str) -> bool:
        """Return whether a module gets an adapter, by its dotted name in the model and PEFT's rule."""
        if _named(self.excluded, module) or (self.targets is not None and not _named(self.targets, module)):
            return False
        if not self.layers or (self.targets is not None and module in self.targets):
            return True
        lists = [rf"(?:^|.*?\.){name}" for name in self.layer_lists] or [r".*?\.[^.]*"]
        found = next(filter(None, (re.match(rf"{name}\.(\d+)\.", module) for name in lists)), None)
        return found is not None and int(found[1]) in self.layers

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, by its dotted name in the model."""
        return int(self._of_pattern("rank_pattern", module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's A B."""
        alpha, rank = self._of_pattern("alpha_pattern", module, self.alpha), self.rank_of(module)
        return alpha / (rank**0.5 if self.rank_stabilized else rank)

    def _of_pattern(self, key: str, module: str, default: float) -> float:
        """Return the value of the pattern that matches a module, by PEFT's rule.

        Raises:
            CheckpointError: Several do. PEFT takes the first, but sorts them when it saves: nothing tells which it was.
        """
        pattern: Mapping[str, float] = getattr(self, key)
        matching = [name for name in pattern if re.match(rf"(.*\.)?({name})$", module)]
        if len({pattern[name] for name in matching}) > 1:
            raise CheckpointError(
                f"{self.path}: {key}: several expressions match {module} ({', '.join(matching)}); PEFT saves them in another"
                " order than it applied them in. Remove those that did not apply"
            )
        return pattern[matching[0]] if matching else default

    def saved_tensors(self, names: Iterable[str], config: VLMConfig) -> set[str]:
        """Return which of a model's tensors (canonical names) must be stored with the adapter.

        PEFT saves every module whose name ends with one of `saved`.
        """
        found = set()
        for name in names:
            parts = memory_name(name, config).split(".")
            modules = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            if any(module.endswith(saved) for module in modules for saved in self.saved):
                found.add(name)
        return found


def read_settings(folder: Path) -> AdapterSettings:
    """Return the settings in a folder's adapter_config.json.

    Raises:
        CheckpointError: It is invalid, or asks for more than LoRA or DoRA.
    """
    path = folder / ADAPTER_CONFIG
    settings: dict[str, Any] = read_json(path)
    for key, values in _PLAIN_LORA.items():
        if settings.get(key) not in values:
            raise CheckpointError(f"{path}: {key} {settings.get(key)!r} is not supported")
    for key in sorted(settings.keys() - _PLAIN_LORA.keys() - _INFORMATIVE - _READ):
        if settings[key]:
            raise CheckpointError(f"{path}: unknown setting {key} {settings[key]!r}; its effect is not supported")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    saved = settings.get("modules_to_save") or []
    if not _is_rank(rank) or not _is_number(alpha):
        raise CheckpointError(
            f"{path}: r must be a positive integer and lora_alpha a number, not {rank!r} and {alpha!r}"
        )
    if not isinstance(saved, list) or not all(isinstance(name, str) and _SAVED.fullmatch(name) for name in saved):
        raise CheckpointError(f"{path}: modules_to_save {saved!r} is not supported; only the projector can be saved")
    targets = _read_names(path, settings, "target_modules")
    if str(targets).lower() in ("()", "all-linear"):
        targets = None
    lists, layers = (
        _read_names(path, settings, "layers_pattern"),
        _read_names(path, settings, "layers_to_transform", int),
    )
    if layers and isinstance(targets, str):
        raise CheckpointError(f"{path}: layers_to_transform needs target_modules as a list, as in PEFT")
    return AdapterSettings(
        path,
        base_model=str(settings.get("base_model_name_or_path") or ""),
        saved=tuple(saved),
        rank=rank,
        alpha=float(alpha),
        rank_stabilized=bool(settings.get("use_rslora")),
        rank_pattern=_read_pattern(path, settings, "rank_pattern", _is_rank),
        alpha_pattern=_read_pattern(path, settings, "alpha_pattern", _is_number),
        dora=bool(settings.get("use_dora")),
        targets=targets,
        excluded=_read_names(path, settings, "exclude_modules"),
        layers=layers,
        layer_lists=(lists,) if isinstance(lists, str) else lists,
    )


def lrv_settings(path: Path, system: System) -> AdapterSettings:
    """Return the settings of LRV-Instruction V2's adapter, whose file says nothing of them.

    Args:
        path: The file.
        system: Of the base model.

    Raises:
        CheckpointError: That is not mPLUG-Owl.
    """
    missing = f"{path}: no {ADAPTER_CONFIG} beside it, and the file does not contain alpha"
    if system != "mplug-owl":
        raise CheckpointError(f"{missing}; write one (peft_type LORA, r, lora_alpha, target_modules)")
    known = LRV_RANK, LRV_ALPHA, LRV_TARGETS
    _log.warning("%s: taken from LRV-Instruction's code: r %d, alpha %d, target_modules %s", missing, *known)
    return AdapterSettings(path, "", (), LRV_RANK, LRV_ALPHA, targets=LRV_TARGETS)


def _named(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _read_names(path: Path, settings: dict[str, Any], key: str, kind: type = str) -> Any:
    """Return a setting that names modules, or numbers layers: a regular expression as it is, a list or number as a tuple."""
    value = settings.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is kind for item in values):
        raise CheckpointError(f"{path}: {key} {value!r} is not supported")
    _check_expressions(path, key, map(str, values))
    return value if isinstance(value, str) else tuple(values)


def _check_expressions(path: Path, key: str, expressions: Iterable[str]) -> None:
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{path}: {key}: {expression!r} is not a regular expression ({error})") from None


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_pattern(path: Path, settings: dict[str, Any], key: str, is_valid: Callable[[Any], bool]) -> dict[str, Any]:
    pattern = settings.get(key) or {}
    if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
        raise CheckpointError(f"{path}: {key} must be an object of numbers, not {pattern!r}")
    _check_expressions(path, key, pattern)
    return pattern

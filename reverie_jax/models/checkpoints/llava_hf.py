"""llava-hf checkpoints (`LlavaForConditionalGeneration`): a strict streaming reader, and a writer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from reverie_jax.models.checkpoints.errors import CheckpointError
from reverie_jax.models.checkpoints.names import IGNORED, Entry, canonical, entries, to_ours, to_theirs
from reverie_jax.models.config import Activation, TextConfig, VisionConfig, VLMConfig
from reverie_jax.models.sharding import shardings
from reverie_jax.models.vlm import VisionLanguageModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a llava-hf checkpoint folder has one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return raw


def read_config(folder: Path) -> VLMConfig:
    """The architecture from a checkpoint's config.json.

    Raises:
        CheckpointError: the file is missing or broken, or describes something that this model is not.
    """
    path = folder / "config.json"
    raw = _json(path)
    text, vision = raw.get("text_config"), raw.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise CheckpointError(f"{path}: no text_config and vision_config; only llava-hf checkpoints are read")
    if text.get("model_type", "llama") != "llama":
        raise CheckpointError(f"{path}: the language model is {text['model_type']!r}; llama is supported")
    if text.get("tie_word_embeddings") or text.get("attention_bias") or text.get("mlp_bias"):
        raise CheckpointError(f"{path}: tied embeddings and biases in the language model are not supported")
    if raw.get("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError(f"{path}: vision_feature_select_strategy must be 'default' (class token dropped)")
    for part, key, default, known in (
        (raw, "projector_hidden_act", "gelu", ("gelu",)),
        (text, "hidden_act", "silu", ("silu",)),
        (vision, "hidden_act", "quick_gelu", get_args(Activation)),
    ):
        if (name := part.get(key, default)) not in known:
            raise CheckpointError(f"{path}: {key} {name!r} is not supported here; {', '.join(known)} is")
    if not isinstance(raw.get("vision_feature_layer", -2), int):
        raise CheckpointError(f"{path}: vision_feature_layer {raw['vision_feature_layer']!r} is not one layer")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters or rope_scaling is {rope!r}, no object")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise CheckpointError(f"{path}: rope scaling {kind!r} is not supported")
    try:
        config = VLMConfig(
            vision=VisionConfig(
                hidden=vision["hidden_size"],
                layers=vision["num_hidden_layers"],
                heads=vision["num_attention_heads"],
                mlp=vision["intermediate_size"],
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
                activation=vision.get("hidden_act", "quick_gelu"),
            ),
            text=TextConfig(
                vocab=text.get("vocab_size", 32000),
                hidden=text.get("hidden_size", 4096),
                layers=text.get("num_hidden_layers", 32),
                heads=text.get("num_attention_heads", 32),
                kv_heads=text.get("num_key_value_heads") or text.get("num_attention_heads", 32),
                head_dim=text.get("head_dim") or text.get("hidden_size", 4096) // text.get("num_attention_heads", 32),
                mlp=text.get("intermediate_size", 11008),
                norm_eps=float(text.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or text.get("rope_theta", 10000.0)),
                max_positions=text.get("max_position_embeddings", 2048),
            ),
            feature_layer=raw.get("vision_feature_layer", -2),
            image_token_id=raw.get("image_token_index", raw.get("image_token_id", 32000)),
            template=raw.get("reverie_template", "llava-hf"),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} is missing") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None
    _check(path, config)
    return config


def _check(path: Path, config: VLMConfig) -> None:
    """Sizes are whole positive numbers that go together."""
    vision, text = config.vision, config.text
    for part in (vision, text):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise CheckpointError(f"{path}: {field.name} is {value!r}, no positive whole number")
    layer, states = config.feature_layer, vision.layers + 1
    if not -states <= layer < states:
        raise CheckpointError(f"{path}: vision_feature_layer {layer} is outside the tower's {states} hidden states")
    if type(config.image_token_id) is not int:
        raise CheckpointError(f"{path}: image_token_index is {config.image_token_id!r}, no whole number")
    for whole, divisor, said in (
        (vision.image_size, vision.patch_size, "image_size is no multiple of patch_size"),
        (vision.hidden, vision.heads, "hidden_size is no multiple of num_attention_heads in vision_config"),
        (text.heads, text.kv_heads, "num_attention_heads is no multiple of num_key_value_heads in text_config"),
        (text.head_dim, 2, "head_dim is odd in text_config"),
    ):
        if whole % divisor:
            raise CheckpointError(f"{path}: {said} ({whole}, {divisor})")


class _Tensors:
    """The tensors of a checkpoint by canonical name, read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        if (folder / INDEX).exists():
            weight_map = _json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"{folder / INDEX}: weight_map is not there, or is not from names to files")
            files = sorted(set(weight_map.values()))
        elif (folder / SINGLE).exists():
            files = [SINGLE]
        else:
            raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        self._where: dict[str, tuple[Any, str]] = {}
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{folder / INDEX}: shard {file!r} lies outside the folder")
            try:
                handle = stack.enter_context(safe_open(folder / file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / file}: not a readable safetensors file ({error})") from None
            for name in handle.keys():  # noqa: SIM118
                known = canonical(name)
                if known in self._where:
                    raise CheckpointError(f"{folder / file}: tensor {known} is there twice")
                self._where[known] = (handle, name)

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def __getitem__(self, name: str) -> np.ndarray:
        handle, stored = self._where[name]
        try:
            return handle.get_tensor(stored)
        except (SafetensorError, OSError, AttributeError, TypeError) as error:  # the last two: a dtype numpy lacks
            raise CheckpointError(f"{self.folder}: tensor {stored} cannot be read ({error})") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _parameters(model: VisionLanguageModel) -> dict[str, nnx.Variable[Any]]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _load(entry: Entry, tensors: _Tensors, shape: tuple[int, ...], dtype: DTypeLike, patch: int) -> np.ndarray:
    parts = []
    for name in entry.names:
        tensor = tensors[name]
        wanted = to_theirs(entry.turn, np.empty(shape if entry.layers is None else shape[1:], np.bool_), patch).shape
        if tensor.shape != wanted or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise CheckpointError(
                f"{tensors.folder}: tensor {name} is {tensor.dtype}{tensor.shape}; config.json says float{wanted}"
                f" ({entry.path})"
            )
        parts.append(to_ours(entry.turn, tensor).astype(dtype))
    return parts[0] if entry.layers is None else np.stack(parts)


def read_model(folder: str | Path, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> VisionLanguageModel:
    """A model from a llava-hf folder, read tensor by tensor, each parameter put on its devices as soon as it is whole.

    Strict: every tensor is used or ignored by a named rule, and every parameter is filled.

    Args:
        dtype: of the base's matrices; norms stay float32.
        mesh: where parameters go, by `models.sharding`; one device by default.

    Raises:
        CheckpointError: anything is missing, left over, misshapen or unreadable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = read_config(folder)
    model: VisionLanguageModel = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype))
    parameters, table = _parameters(model), entries(config)
    homes = None if mesh is None else dict(_flat_shardings(model, mesh))
    with ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        wanted = {name for entry in table for name in entry.names}
        if missing := sorted(wanted - tensors.names):
            raise CheckpointError(f"{folder}: {len(missing)} tensor(s) are missing: {_listed(missing)}")
        if extra := sorted(name for name in tensors.names - wanted if not IGNORED.search(name)):
            raise CheckpointError(f"{folder}: {len(extra)} tensor(s) have no place in the model: {_listed(extra)}")
        values: dict[str, jax.Array] = {}
        for entry in table:
            abstract = parameters[entry.path]
            array = _load(entry, tensors, abstract.shape, abstract.dtype, config.vision.patch_size)
            values[entry.path] = jax.device_put(array, None if homes is None else homes[entry.path])
    if unfilled := sorted(parameters.keys() - values.keys()):
        raise CheckpointError(f"{folder}: no tensor fills {_listed(unfilled)}")
    graph, state = nnx.split(model)
    flat = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _flat_shardings(model: VisionLanguageModel, mesh: Mesh) -> Iterator[tuple[str, Any]]:
    for path, leaf in nnx.to_flat_state(shardings(nnx.state(model, nnx.Param), mesh)):
        yield ".".join(map(str, path)), leaf.get_value()


def write_model(model: VisionLanguageModel, folder: Path, *, dtype: DTypeLike = np.float16) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors that `LlavaForConditionalGeneration` opens.

    Raises:
        CheckpointError: the model cannot be said in this format (linear projector, unmerged adapters).
    """
    config = model.config
    if config.projector != "mlp2x_gelu":
        raise CheckpointError("llava-hf has no linear projector; such a model cannot be written in its format")
    parameters, tensors = _parameters(model), {}
    for entry in entries(config):
        array = np.asarray(parameters.pop(entry.path).get_value()).astype(dtype)
        for part, name in zip([array] if entry.layers is None else array, entry.names, strict=True):
            tensors[name] = to_theirs(entry.turn, part, config.vision.patch_size)
    if parameters:
        raise CheckpointError(
            f"no place in the llava-hf format for {_listed(sorted(parameters))}; merge adapters first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config_json(config, np.dtype(dtype).name), indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor_json(config), indent=2) + "\n")


def _config_json(config: VLMConfig, dtype: str) -> dict[str, Any]:
    vision, text = config.vision, config.text
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "reverie_template": config.template,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": vision.activation,
            "projection_dim": vision.hidden,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": text.vocab,
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.mlp,
            "rms_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "max_position_embeddings": text.max_positions,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    }


def _preprocessor_json(config: VLMConfig) -> dict[str, Any]:
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A sum of x's bits that knows their places; whole numbers that wrap, so the same on every device layout."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for _ in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
        bits = ((2 * place + 1) * (bits ^ (bits >> 15))).sum(0, dtype=jnp.uint32)
    return bits


def fingerprint(model: VisionLanguageModel) -> str:
    """Identity of a base: every parameter's shape and a checksum of its content, in hex; adapters do not count."""
    digest = hashlib.sha256()
    flat = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    for path, leaf in sorted((".".join(map(str, path)), leaf) for path, leaf in flat):
        digest.update(f"{path}:{tuple(leaf.shape)}:{leaf.dtype}".encode())
        digest.update(np.uint32(_checksum(leaf.get_value())).tobytes())
    return digest.hexdigest()[:16]

"""Tiny LLaVAs in torch, and our model run on the same rows.

A model is three parts held by transformers' classes and plain torch: language model, CLIP tower, projector.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

from reverie_jax.data.packing import Batch
from reverie_jax.eval.decode import Decoding, generate
from reverie_jax.models import ModelInputs, TextConfig, VisionConfig, VisionLanguageModel
from reverie_jax.models.sharding import partition_spec
from reverie_jax.models.vision import normalize
from tests.models.oracle import IMAGE, flat, normalized

NEW = 32  # tokens that greedy decoding adds
PROMPT = 26
VISION = VisionConfig(hidden=30, layers=3, heads=3, mlp=44, image_size=24, patch_size=8)


@dataclasses.dataclass(frozen=True)
class Kind:
    """An architecture. No size follows from another where its class allows that."""

    name: str
    text: TextConfig
    linear: bool = False


LLAMA = Kind(
    "llama", TextConfig(101, 36, 2, 4, 2, head_dim=96, mlp=52, norm_eps=1e-3, rope_theta=500.0, max_positions=77)
)
# As LLaVA-1.0: as many key heads as heads, head_dim = hidden / heads, and a config.json that names neither.
LINEAR = Kind("linear", TextConfig(97, 30, 3, 3, 3, head_dim=10, mlp=46, norm_eps=1e-6, max_positions=81), linear=True)
# Phi-3's class has no head_dim of its own.
PHI = Kind(
    "phi",
    TextConfig(
        107, 192, 2, 2, 1, head_dim=96, mlp=44, norm_eps=1e-4, max_positions=77, fused=True, sliding_window=2047
    ),
)
KINDS = (LLAMA, LINEAR, PHI)


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, norms and biases too, and exact in float16 and bfloat16: a file's type loses nothing."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if tensor.ndim > 1:
                noise *= (4 if "lm_head" in name else 1.2) / tensor[0].numel() ** 0.5
            else:
                noise = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
            tensor.copy_(torch.where(noise.abs() < 1e-4, 0, noise).bfloat16())
    return module.eval()


def text_config(text: TextConfig) -> LlamaConfig | Phi3Config:
    sizes: dict[str, Any] = {
        "vocab_size": text.vocab,
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "intermediate_size": text.mlp,
        "rms_norm_eps": text.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if text.fused:
        window = {"sliding_window": text.sliding_window, "original_max_position_embeddings": text.max_positions}
        return Phi3Config(**sizes, **window)
    return LlamaConfig(**sizes, head_dim=text.head_dim)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=VISION.hidden,
        num_hidden_layers=VISION.layers,
        num_attention_heads=VISION.heads,
        intermediate_size=VISION.mlp,
        image_size=VISION.image_size,
        patch_size=VISION.patch_size,
        projection_dim=14,
    )


class Rows(NamedTuple):
    """Causal rows of equal length, as the model takes them."""

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    slots: np.ndarray
    images: np.ndarray

    def grown(self, new: np.ndarray) -> Rows:
        """The same rows with more text behind."""
        tokens = np.concatenate([self.tokens, new.astype(np.int32)], axis=1)
        slots = np.concatenate([self.slots, np.full_like(new, -1, np.int32)], axis=1)
        return Rows(tokens, *_causal(tokens.shape), slots, self.images)


def _causal(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)), np.full(shape, shape[1], np.int32)


def prompts(kind: Kind, seed: int) -> Rows:
    """Three rows: of one picture, of two, of none."""
    random = np.random.default_rng(seed)
    tokens = random.integers(IMAGE + 1, kind.text.vocab, (3, PROMPT), dtype=np.int32)
    slots, patches, side = np.full((3, PROMPT), -1, np.int32), VISION.patches, VISION.image_size
    for row, starts in enumerate([[4], [2, 3 + patches], []]):
        for image, start in enumerate(starts):
            slots[row, start : start + patches] = np.arange(image * patches, (image + 1) * patches)
    tokens[slots >= 0] = IMAGE
    pixels = random.integers(0, 256, (3, 2, side, side, 3), dtype=np.uint8)
    pixels[0, 1:] = pixels[2] = 0
    return Rows(tokens, *_causal(tokens.shape), slots, pixels)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A LLaVA in torch.

    Attributes:
        projector: as original LLaVA builds it: one Linear, or a Sequential of Linear, GELU, Linear.
    """

    kind: Kind
    llm: torch.nn.Module
    tower: CLIPVisionModel
    projector: torch.nn.Module

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every picture: the last hidden state but one without its class token, and that through the projector."""
        seen = self.tower(normalized(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        return seen, self.projector(seen)

    @torch.no_grad()
    def embedded(self, rows: Rows) -> torch.Tensor:
        """The text's embeddings, features in their places."""
        embedded = self.llm.get_input_embeddings()(torch.tensor(rows.tokens, dtype=torch.long)).clone()
        features = self.features(rows.images)[1].reshape(*rows.images.shape[:2], VISION.patches, -1).flatten(1, 2)
        for row, slots in enumerate(rows.slots):
            embedded[row, slots >= 0] = features[row, slots[slots >= 0]]
        return embedded

    @torch.no_grad()
    def logits(self, rows: Rows) -> np.ndarray:
        return self.llm(inputs_embeds=self.embedded(rows)).logits.numpy()

    @torch.no_grad()
    def greedy(self, rows: Rows) -> np.ndarray:
        """NEW tokens a row by a plain loop of whole forward passes. No step is near a tie."""
        embedded, new = self.embedded(rows), []
        for _ in range(NEW):
            last = self.llm(inputs_embeds=embedded).logits[:, -1]
            best = last.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 5e-4, "near a tie: take another seed"
            new.append(last.argmax(-1))
            embedded = torch.cat([embedded, self.llm.get_input_embeddings()(new[-1][:, None])], dim=1)
        return torch.stack(new, dim=1).numpy()


@functools.cache
def parts(kind: Kind, seed: int = 0) -> Parts:
    """Random; shared, so not to be changed."""
    config = text_config(kind.text)
    llm = Phi3ForCausalLM(config) if kind.text.fused else LlamaForCausalLM(config)
    wide, hidden = VISION.hidden, kind.text.hidden
    projector = torch.nn.Linear(wide, hidden)
    if not kind.linear:
        projector = torch.nn.Sequential(projector, torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
    made = [randomise(part, 3 * seed + n) for n, part in enumerate((llm, CLIPVisionModel(vision_config()), projector))]
    return Parts(kind, *made)


def llava(parts: Parts) -> LlavaForConditionalGeneration:
    """The same model in transformers' own class, which has no linear projector."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision_config(), text_config=text_config(parts.kind.text), image_token_index=IMAGE)
    ).eval()
    model.model.language_model.load_state_dict(parts.llm.model.state_dict())
    model.lm_head.load_state_dict(parts.llm.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(parts.tower.state_dict())
    model.model.multi_modal_projector.linear_1.load_state_dict(parts.projector[0].state_dict())
    model.model.multi_modal_projector.linear_2.load_state_dict(parts.projector[2].state_dict())
    return model


TOLERANCE = 1e-4

# Compiled without optimisation: each program here runs a few times.
quickly = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@quickly
def _computed(graph: Any, state: Any, rows: Rows) -> tuple[jax.Array, ...]:
    model = nnx.merge(graph, state)
    pixels = normalize(rows.images.reshape(-1, *rows.images.shape[2:]), jnp.float32)
    seen = model.vision(pixels, model.config.feature_depth)
    return seen, model.projector(seen), model.decoder.logits(model.hidden(ModelInputs(*rows)))


def anonymous(model: VisionLanguageModel) -> VisionLanguageModel:
    """Without what a config says and nothing computes: models of one architecture share a compilation."""
    model.config = dataclasses.replace(
        model.config,
        vision_tower="",
        template="llava-hf",
        tokenization="hf",
        image_aspect_ratio="pad",
        image_token_id=0,
    )
    return model


def _split(model: VisionLanguageModel) -> tuple[Any, Any]:
    """As jit takes it. Parameters pass through the host: those put on a device by name would compile anew."""
    graph, state = nnx.split(anonymous(model))
    return graph, jax.tree.map(np.asarray, state)


def computed(model: VisionLanguageModel, rows: Rows) -> tuple[np.ndarray, ...]:
    """(vision features, the same projected, logits)."""
    return tuple(map(np.asarray, _computed(*_split(model), jax.tree.map(jnp.asarray, rows))))


def logits(model: VisionLanguageModel, rows: Rows) -> np.ndarray:
    """Of prompts. They are filled up, which no earlier token sees, to the length that is compiled."""
    return computed(model, rows.grown(np.full((len(rows.tokens), NEW), IMAGE + 1)))[-1][:, :PROMPT]


def assert_close(ours: np.ndarray, theirs: np.ndarray, atol: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@quickly
def _decoded(graph: Any, state: Any, batch: Batch) -> jax.Array:
    model = nnx.merge(graph, state)
    return generate(model, batch, Decoding(NEW), stops=(model.config.text.vocab,))[0]  # no token's id: nothing stops


def decoded(model: VisionLanguageModel, rows: Rows) -> np.ndarray:
    """Greedy decoding as answers are made: prefill, then a token a step."""
    count = len(rows.tokens)
    none = np.zeros((count, 0), np.int32)
    batch = Batch(
        *rows,
        parent=none,
        target=none,
        weight=none.astype(np.float32),
        branch=none,
        origin=none,
        leaves=np.full((count, 1), PROMPT - 1, np.int32),
        questions=np.arange(count, dtype=np.int32)[:, None],
        flat_tokens=np.zeros((count, rows.images.shape[1]), np.int32),
        records=np.zeros((count, rows.images.shape[1]), np.int32),
    )
    return np.asarray(_decoded(*_split(model), jax.tree.map(jnp.asarray, batch)))[:, 0]


def assert_same(first: VisionLanguageModel, second: VisionLanguageModel) -> None:
    """One configuration, one set of parameters, in the same types."""
    assert first.config == second.config
    a, b = flat(first), flat(second)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
        assert a[path].dtype == b[path].dtype, path


def assert_on(mesh: Mesh, model: VisionLanguageModel) -> None:
    """Every parameter lies where the rules put it; enough of them are spread for that to mean something."""
    spread = 0
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        home = leaf.get_value().sharding
        assert isinstance(home, NamedSharding), path
        assert home.mesh == mesh, path
        spec = partition_spec(leaf.shape, leaf.axes, mesh)
        assert home.is_equivalent_to(NamedSharding(mesh, spec), len(leaf.shape)), path
        spread += not home.is_fully_replicated
    assert spread > 10

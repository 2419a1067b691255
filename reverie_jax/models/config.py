"""Architectures as frozen dataclasses: every size that determines a parameter's shape, and how inputs are prepared."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
Norm = Literal["rmsnorm", "layernorm"]
FeatureSelect = Literal["patch", "full"]
SecondExpert = Literal["argmax", "gumbel"]
ExpertLayers = Literal["sparse", "first_half", "second_half", "all"]
ProjectorKind = Literal["linear", "mlp2x_gelu"]
Tokenization = Literal["hf", "llava"]
System = Literal["llava", "minigpt4", "mplug-owl", "muffin"]
ImageAspectRatio = Literal["pad", "square", "stretch"]
Remat = Literal["full", "offload", "dots", "none"]

DEFAULT_TARGETS = r"decoder\.(expert_)?layers\.(query|key|value|qkv|out|gate|up|gate_up|down)"
"""Regular expression of the layers that get adapters by default: every linear layer of the decoder's blocks, as in LLaVA;
not the tower, the projector or the LM head."""


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Learned queries that read the tower's tokens by cross-attention; their last states are the image's features.

    Attributes:
        kind: `qformer` (BLIP-2's, arXiv 2301.12597): post-norm layers of self-attention and MLP, of which every second one,
            the first included, has cross-attention to the tower's tokens between the two. `abstractor` (mPLUG-Owl's, arXiv
            2304.14178): pre-norm layers, in which the queries attend to the tower's tokens and to themselves at once.
        layers: Their number; even for a `qformer`.
        norm_eps: Of all layer normalizations but the one within the abstractor's MLP.
        mlp_norm_eps: Of that one.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Literal["qformer", "abstractor"]
    queries: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    norm_eps: float
    mlp_norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What makes features of an image: a vision transformer, CLIP's (`CLIPVisionModel`) by default, and a resampler, if any.

    Attributes:
        image_size: Side of the square input, in pixels.
        patch_size: Side of a patch, in pixels. Pixels at the right and bottom that fill no patch are not seen.
        activation: OpenAI's CLIP uses quick-GELU, x * sigmoid(1.702 x).
        class_token: Whether a class token precedes the patches (SigLIP has none).
        pre_norm: Whether the embeddings are normalized before the first layer (SigLIP's are not).
        patch_bias: Whether the patch embedding has a bias (SigLIP's has).
        mean: Of the pixels from 0 to 1, by channel: red, green, blue.
        std: Standard deviation likewise.
        qkv: Whether query, key and value are three matrices or one: `fused`, with all queries first (EVA-CLIP), or
            `interleaved`, with query, key and value of each head side by side (mPLUG-Owl).
        key_bias: Whether keys have a bias (EVA-CLIP's have none).
        output_norm: Whether the last layer's output is normalized; otherwise `post_norm` is only kept for exports.
        output_norm_eps: Of this normalization; `norm_eps` if None (BLIP-2's `ln_vision` has its own).
        queries: Learned queries after the image's tokens, in the same layers but with weights of their own; the features are
            their outputs (BEiT-3 in Muffin, arXiv 2310.00653). 0 for none.
        query_positions: Rows of the queries' table of positions.
        position_offset: Rows of the tables of positions before the first that is used.
        resampler: What reads the tower's tokens, if anything does.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    hidden: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int
    norm_eps: float = 1e-5
    activation: Activation = "quick_gelu"
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    qkv: Literal["separate", "fused", "interleaved"] = "separate"
    key_bias: bool = True
    output_norm: bool = False
    output_norm_eps: float | None = None
    queries: int = 0
    query_positions: int = 0
    position_offset: int = 0
    resampler: ResamplerConfig | None = None

    @property
    def patches(self) -> int:
        """Number of patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Number of the tower's tokens for one image: its patches, and the class token if there is one."""
        return self.patches + self.class_token


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies differ from theta's powers (`rope_scaling` in transformers).

    Attributes:
        kind: `linear` divides all frequencies by `factor`; `llama3` divides the low ones, keeps the high ones and
            interpolates between.
        factor: Divisor.
        low: A frequency of fewer turns than this in `original_positions` tokens is a low one (`low_freq_factor`).
        high: A frequency of more turns than this is a high one (`high_freq_factor`).
        original_positions: Longest sequence before the scaling.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class Routing:
    """How tokens are routed to experts in training; evaluation takes the two likeliest and drops none.

    Attributes:
        capacity_factor: Room of an expert: its tokens are at most ceil(2 * capacity_factor * tokens / experts) of a group;
            None drops none.
        min_capacity: Least room of an expert, in tokens.
        second_expert: The likeliest but one (`argmax`), or drawn from the others by their probabilities (`gumbel`), as
            DeepSpeed does.
        aux_coefficient: Factor of the load-balancing loss, which is summed over layers.
        mask_padding: Whether padding tokens are left out; DeepSpeed routes and counts them too.
        group: Sequences whose tokens compete for an expert's room; 0 for all of a micro-batch. Groups do not depend on the
            mesh: more devices than groups exchange tokens.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    capacity_factor: float | None = 1.5
    min_capacity: int = 0
    second_expert: SecondExpert = "argmax"
    aux_coefficient: float = 0.01
    mask_padding: bool = False
    group: int = 1

    def __post_init__(self) -> None:
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be more than 0, or none")
        for name in ("min_capacity", "aux_coefficient", "group"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Layers whose MLP is replaced by experts, of which each token takes two (MoE-LLaVA, arXiv 2401.15947).

    Attributes:
        layers: Which layers, in ascending order.
        count: Experts in each of them.
        routing: As the checkpoint was trained.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    layers: tuple[int, ...]
    count: int = 4
    routing: Routing = Routing()


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A decoder: pre-norm layers of attention with rotary positions (rotate-half) and an MLP. LLaMA's by default.

    Attributes:
        head_dim: Width of a head.
        mlp: Width of the MLP, of each expert where there are experts.
        norm: Root-mean-square normalization, or layer normalization with a bias.
        max_positions: Longest sequence that the weights were trained for.
        fused_qkv: Whether query, key and value are one matrix (Phi-3, Qwen-1), which then has one adapter.
        fused_mlp: Whether gate and up are one matrix (Phi-3).
        sliding_window: Attention window that the weights were trained with, if any. Attention here is full, so
            `context` is limited to the lengths at which the two agree.
        rotary_fraction: Share of a head's width that is rotated.
        qkv_bias: Whether query, key and value have biases; likewise `out_bias`, `mlp_bias`, `head_bias`.
        tied_head: Whether the LM head is the embedding.
        gated: Whether the MLP is down(activation(gate x) * up x); otherwise down(activation(up x)).
        parallel: Whether attention and MLP read the same normalized input, and are added together (Phi-2).
        qk_norm: Whether the queries and keys of a head are normalized (Qwen3).
        experts: Layers with experts, if any.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096
    fused_qkv: bool = False
    fused_mlp: bool = False
    sliding_window: int | None = None
    norm: Norm = "rmsnorm"
    activation: Activation = "silu"
    gated: bool = True
    parallel: bool = False
    rotary_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tied_head: bool = False
    qk_norm: bool = False
    experts: ExpertsConfig | None = None

    @property
    def context(self) -> int:
        """Longest sequence on which this decoder is exact, in tokens."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    @property
    def family(self) -> str:
        """`model_type` of the language models in transformers that compute what this decoder does; qwen is Qwen-1."""
        if self.fused_mlp:
            return "phi3"
        if self.fused_qkv:
            return "qwen"
        if not self.gated:
            return "phi"
        if self.norm == "layernorm":
            return "stablelm"
        if self.qk_norm:
            return "qwen3"
        if self.qkv_bias and not self.out_bias:
            return "qwen2"
        return "mistral" if self.sliding_window else "llama"

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a head that is rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return self.experts.layers if self.experts else ()

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers without experts."""
        return tuple(sorted(set(range(self.layers)) - set(self.expert_layers)))


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Vision tower, projector and decoder, how they are connected, and how their inputs are prepared.

    Attributes:
        projector: One linear layer, or two with `projector_activation` between them.
        projector_bias: Whether its layers have biases.
        projector_norm_eps: Of a layer normalization before it; None without one (VIP-LLaVA has one).
        feature_layers: Hidden states of the tower that are the projector's input, side by side; -2 is the last layer's
            input.
        feature_select: `patch` drops the tower's first token: the class token, or in MoE-LLaVA's models with SigLIP a patch;
            `full` keeps all.
        projector_token: Whether a learned token follows an image's features (`vit_eos` of mPLUG-Owl).
        image_token_id: Placeholder token at the position of an image feature; its embedding is never used.
        template: Name of the chat template that the weights were tuned with (see `data.templates`).
        tokenization: Tokenization that the weights were tuned with: Hugging Face's in one pass, or original LLaVA's.
        image_aspect_ratio: How images become squares: padded, cropped ("square"), or stretched.
        vision_tower: Name of the tower's own repository, where it is known.
        stop_ids: Tokens that end an answer, beside the tokenizer's end of sequence and the template's.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    vision: VisionConfig
    text: TextConfig
    projector: ProjectorKind = "mlp2x_gelu"
    projector_activation: Activation = "gelu"
    projector_bias: bool = True
    projector_norm_eps: float | None = None
    feature_layers: tuple[int, ...] = (-2,)
    feature_select: FeatureSelect = "patch"
    projector_token: bool = False
    image_token_id: int = 32000
    template: str = "llava-hf"
    tokenization: Tokenization = "hf"
    image_aspect_ratio: ImageAspectRatio = "pad"
    vision_tower: str = ""
    stop_ids: tuple[int, ...] = ()

    @property
    def system(self) -> System:
        """Whose architecture this is: LLaVA's and its relatives', or a sister system's, which have formats of their own."""
        if self.vision.queries:
            return "muffin"
        if self.vision.resampler is None:
            return "llava"
        return "minigpt4" if self.vision.resampler.kind == "qformer" else "mplug-owl"

    @property
    def features(self) -> int:
        """Number of the projector's inputs for one image."""
        if self.vision.resampler is not None:
            return self.vision.resampler.queries
        return self.vision.queries or self.vision.tokens - (self.feature_select == "patch")

    @property
    def image_tokens(self) -> int:
        """Number of tokens of one image in the decoder."""
        return self.features + self.projector_token

    @property
    def feature_depths(self) -> tuple[int, ...]:
        """Numbers of encoder layers before each hidden state: state k is the output of layer k, and state 0 the embedding.

        Raises:
            ValueError: A feature layer is outside the tower.
        """
        states = self.vision.layers + 1
        for layer in self.feature_layers:
            if not -states <= layer < states:
                raise ValueError(f"feature layer {layer} is outside the tower's {states} hidden states")
        return tuple(layer % states for layer in self.feature_layers)

    @property
    def feature_width(self) -> int:
        """Width of the projector's input."""
        if self.vision.resampler is not None:
            return self.vision.resampler.hidden
        return self.vision.hidden * len(self.feature_layers)

"""What is published of the LLaVA family, as tiny replicas: config.json with the same keys, tensors under the same names.

The first rows are read and compared with transformers' classes; the others are refused by config.json alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.models import families, makers

Json = dict[str, Any]

START, END = "<!-- rows -->", "<!-- end of rows -->"
MHA = {"num_key_value_heads": 6}
LLAMA_1_5 = MHA | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
LLAMA_3 = {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192} | families.rope(theta=500000.0)
PHI_3 = MHA | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "eos_token_id": 32000}
PHI_2 = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048}
MISTRAL = {"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "sliding_window": 4096}
DEEP = {"num_hidden_layers": 12}
FLAT = {
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
}
OLD = {"rope_theta": ..., "rope_scaling": ..., "num_key_value_heads": ..., "mm_projector_type": ..., "head_dim": ...}


@dataclasses.dataclass(frozen=True)
class Loads:
    """A checkpoint that is read.

    Attributes:
        names: Of repositories.
        what: Language model and tower, for the table.
        model: Arguments of `families.build`.
        original: Keys of its config.json in original LLaVA's format; None for llava-hf's.
        tower: Name of the tower's repository; with "inside" if its weights are in the checkpoint.
        context: Longest sequence.
        note: For the table.
    """

    names: str
    what: str
    model: tuple[Any, ...]
    options: Json = dataclasses.field(default_factory=dict)
    original: Json | None = None
    tower: tuple[str, ...] = ("clip-vit-large-patch14-336",)
    hf: Json = dataclasses.field(default_factory=dict)
    context: int = 4096
    note: str = ""

    def write(self, room: Path) -> tuple[Path, list[Path], Any]:
        """Write the replica; return its folder, its components and transformers' model."""
        model = families.build(*self.model, **self.options)
        if self.original is None:
            return families.old_folder(room / "x", model, **self.hf), [], model
        name, *inside = self.tower
        changes = {"mm_vision_tower": f"openai/{name}" if "/" not in name else name, **self.original}
        families.original_folder(room / "x", model, tower=bool(inside), **changes)
        # By its configuration only, where the weights are inside.
        return room / "x", [families.tower_folder(room / name.split("/")[-1], model)], model


LLAVA = {"image_token_index": 7, "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
LOADS = (
    Loads(
        "llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf; their fine-tunes (Mantis, vsft-llava-1.5-7b-hf, fakeVLM, …)",
        *("Vicuna, CLIP", ("Llama", LLAMA_1_5)),
        hf={"ignore_index": -100, "pad_token_id": 32001, "image_seq_length": ...},
    ),
    Loads(
        "bczhou/tiny-llava-v1-hf",
        *("TinyLlama, CLIP", ("Llama", {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048})),
        context=2048,
    ),
    Loads("xtuner/llava-llama-3-8b-v1_1-transformers", "Llama-3, CLIP", ("Llama", LLAMA_3), context=8192),
    Loads(
        "xtuner/llava-phi-3-mini-hf",
        *("Phi-3 in LLaMA's layout, CLIP", ("Llama", PHI_3 | {"sliding_window": 4})),
        note="its `sliding_window` is ignored, as in LLaMA's class",
    ),
    Loads(
        "llava-hf/bakLlava-v1-hf, edbeeching/vsft-llava_builder_zephyr",
        *("Mistral, CLIP", ("Mistral", MISTRAL)),
        note="up to its window of 4,096 tokens",
    ),
    Loads(
        "llava-hf/vip-llava-7b-hf, vip-llava-13b-hf",
        *("Vicuna, five layers of CLIP", ("Llama", LLAMA_1_5), {"vision": DEEP, "vip": True}),
    ),
    Loads(
        "llava-hf/llava-interleave-qwen-0.5b-hf",
        "Qwen1.5 with tied head, SigLIP",
        ("Qwen2", {"max_position_embeddings": 32768, "tie_word_embeddings": True} | families.rope(theta=1e6), "siglip"),
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        context=32768,
    ),
    Loads(
        "liuhaotian/llava-v1.5-7b, llava-v1.5-13b; their fine-tunes (Math-LLaVA-13B, RLAIF-V-7B, …)",
        *("Vicuna, CLIP", ("Llama", LLAMA_1_5)),
        original=FLAT | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "head_dim": ...},
    ),
    Loads(
        "mucai/llava-v1.5-7b-m3",
        *("Vicuna, CLIP", ("Llama", LLAMA_1_5)),
        original=FLAT | {"model_type": "llava_llama", "matryoshka_vis_token_scale": [576, 144, 36, 9, 1]},
        note="its form of all 576 visual tokens",
    ),
    Loads(
        "Lin-Chen/ShareGPT4V-7B, ShareGPT4V-13B",
        *("Vicuna, its own tuned CLIP", ("Llama", LLAMA_1_5)),
        original=FLAT | {"model_type": "share4v", "architectures": ["Share4VLlamaForCausalLM"]},
        tower=("Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12",),
        note="with its tower as component; OpenAI's CLIP is refused",
    ),
    Loads(
        "MBZUAI/LLaVA-Phi-3-mini-4k-instruct, -FT",
        *("Phi-3, CLIP", ("Phi3", PHI_3 | {"sliding_window": 2047})),
        original=FLAT | {"model_type": "llava_phi", "architectures": ["LlavaPhiForCausalLM"]},
        tower=("clip-vit-large-patch14-336", "inside"),
        context=2047,
        note="up to its window of 2,047 tokens",
    ),
    Loads(
        "mucai/llava-1.5-phi-3-mini-3.8B, BoyangZ/Phi3-VLM",
        *("Phi-3, CLIP", ("Phi3", PHI_3 | {"sliding_window": 2047})),
        original=FLAT | {"model_type": "llava_phi3", "architectures": ["LlavaPhi3ForCausalLM"]},
        context=2047,
        note="up to its window of 2,047 tokens",
    ),
    Loads(
        "MBZUAI/LLaVA-Meta-Llama-3-8B-Instruct, -FT; mucai/llava-1.5-llama-3-8b",
        *("Llama-3, CLIP", ("Llama", LLAMA_3)),
        original=FLAT | {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "head_dim": ...},
        context=8192,
    ),
    Loads(
        "SkunkworksAI/BakLLaVA-1, marianna13/bakllava-*",
        *("Mistral, CLIP, linear projector", ("Mistral", MISTRAL), {"linear": True}),
        original={
            "model_type": "llava_mistral",
            "architectures": ["LlavaMistralForCausalLM"],
            "mm_projector_type": "linear",
            "head_dim": ...,
        },
        tower=("clip-vit-large-patch14",),
        note="up to its window of 4,096 tokens",
    ),
    Loads(
        "liuhaotian/llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3, llava-pretrain-vicuna-13b-v1.3",
        "Vicuna, CLIP, linear projector",
        ("Llama", MHA | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6} | families.rope(theta=10000.0)),
        {"linear": True},
        original=OLD
        | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "tie_word_embeddings": False},
        context=2048,
    ),
    Loads(
        "FreedomIntelligence/ALLaVA-3B",
        *("Phi-2, CLIP", ("Phi", PHI_2), {"head_bias": True}),
        original=FLAT | {"model_type": "llava_phi", "architectures": ["LlavaPhiForCausalLM"]},
        context=2048,
    ),
)


def pair(kind: str, text: str = "llama", vision: str = "clip_vision_model", **more: Any) -> Json:
    """Return a config.json of transformers' format."""
    tower = {
        "hidden_size": 30,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 44,
        "image_size": 24,
    }
    parts = {
        "text_config": {"model_type": text, "vocab_size": 101},
        "vision_config": {"model_type": vision, "patch_size": 8} | tower,
    }
    return {"model_type": kind, **parts, **more}


def original(kind: str, architecture: str = "LlavaLlamaForCausalLM", **more: Any) -> Json:
    """Return a config.json of original LLaVA's format."""
    sizes = {
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "intermediate_size": 52,
        "rms_norm_eps": 1e-5,
    }
    tower = {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1024,
    }
    return {"model_type": kind, "architectures": [architecture], "vocab_size": 101} | sizes | tower | more


GRID = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
NEXT = GRID | {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
BNB = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
VARYING = "the number of a picture's tokens varies"
# Repositories, why, and configurations with what the message names.
REFUSED: tuple[tuple[str, str, list[tuple[Json, tuple[str, ...]]]], ...] = (
    (
        *("llava-hf/llava-v1.6-*-hf", VARYING),
        [(pair("llava_next", text, **GRID), ("llava_next", "varies")) for text in ("llama", "mistral")],
    ),
    (
        *("llava-hf/llava-onevision-qwen2-*-ov-hf, LLaVA-NeXT-Video-*", VARYING),
        [
            (pair("llava_onevision", "qwen2", "siglip_vision_model", **GRID), ("llava_onevision", "varies")),
            (pair("llava_next_video", **GRID), ("llava_next_video", "varies")),
        ],
    ),
    ("LanguageBind/Video-LLaVA-7B-hf", "videos", [(pair("video_llava"), ("video_llava", "varies"))]),
    (
        *(
            "quantized copies of any (unsloth's bnb-4bit, AWQ, GPTQ, FP8)",
            "quantized weights; use the model they were made from",
        ),
        [
            (pair("llava", **BNB), ("bitsandbytes", "quantized")),
            (pair("llava", quantization_config={"quant_method": "awq", "bits": 4}), ("awq", "quantized")),
            (pair("llava", quantization_config=FP8), ("compressed-tensors", "quantized")),
            (original("llava_llama", quantization_config={"quant_method": "gptq", "bits": 4}), ("gptq", "quantized")),
        ],
    ),
    (
        "PaliGemma, Idefics2, InternVL, Mistral-3, Aya Vision, Llama-3.2-Vision, Granite Vision, Qwen-VL, …",
        "other architectures",
        [
            *(
                (pair(kind, text), (kind,))
                for kind, text in (
                    *(("paligemma", "gemma"), ("idefics2", "mistral"), ("internvl", "qwen2"), ("mistral3", "mistral")),
                    *(("aya_vision", "cohere2"), ("mllama", "mllama_text_model"), ("gemma3", "gemma3_text")),
                )
            ),
            (pair("llava", "gemma"), ("gemma",)),
            (pair("llava_next", "granite"), ("llava_next",)),
            ({"model_type": "qwen2_vl", "hidden_size": 36, "vision_config": {"depth": 2}}, ("qwen2_vl",)),
        ],
    ),
    (
        *("liuhaotian/llava-v1.6-*, lmms-lab/llava-onevision-*", VARYING),
        [
            (original("llava_llama", **NEXT), ("spatial_unpad", "varies")),
            (original("llava_mistral", "LlavaMistralForCausalLM", **NEXT), ("spatial_unpad", "varies")),
            (original("llava", "LlavaQwenForCausalLM", **(NEXT | {"image_aspect_ratio": "anyres_max_9"})), ("varies",)),
            (original("llava_llama", image_aspect_ratio="anyres"), ("anyres", "varies")),
        ],
    ),
    (
        "liuhaotian/LLaVA-7b-delta-v0, LLaVA-Lightning-7B-delta-v1-1, LISA, SESAME",
        "marks around pictures (`mm_use_im_start_end`); the first two are differences to LLaMA's weights",
        [
            (original("llava", mm_use_im_start_end=True, mm_projector_type=None), ("mm_use_im_start_end", "delta")),
            (original("llava_llama", mm_use_im_start_end=True, out_dim=256), ("mm_use_im_start_end", "LISA")),
        ],
    ),
    ("YanweiLi/MGM-*", "a second tower", [(original("mgm", "MGMLlamaForCausalLM", image_size_aux=768), ("mgm",))]),
    (
        *("bczhou/TinyLLaVA-3.1B, 2.0B, 1.5B; Mipha", "code of their own"),
        [
            (original("tiny_llava_phi", "TinyLlavaPhiForCausalLM"), ("tiny_llava",)),
            (original("tiny_llava_stablelm", "TinyLlavaStablelmForCausalLM"), ("tiny_llava",)),
            (original("mipha_phi", "MiphaPhiForCausalLM"), ("mipha",)),
        ],
    ),
    (
        *("FastVLM (`llava_qwen2`)", "tower MobileCLIP"),
        [(original("llava_qwen2", "LlavaQwen2ForCausalLM", mm_vision_tower="mobileclip_l_1024"), ("mobileclip",))],
    ),
    (
        *(
            "any with `s2`, a resampler or another projector than linear and `mlp2x_gelu`",
            "other modules between the two",
        ),
        [
            (original("llava_mistral", s2=True), ("s2",)),
            (original("llava_llama", mm_resampler_type="perceiver"), ("perceiver",)),
            (original("llava_llama", mm_projector_type="mlp3x_gelu"), ("mlp3x_gelu",)),
        ],
    ),
)
XTUNER = (
    *("xtuner/llava-*-xtuner, -pth", "XTuner's layout; use its export in llava-hf or original LLaVA format"),
    ("config.json", "projector/model.safetensors", "visual_encoder_adapter/adapter_model.safetensors"),
)


def table() -> str:
    """Return the table of `docs/checkpoints.md`."""
    rows = ["| checkpoint | what it is | result |", "|---|---|---|"]
    rows += [f"| {row.names} | {row.what} | loads, equal{'; ' * bool(row.note)}{row.note} |" for row in LOADS]
    rows += [f"| {names} | | refused: {why} |" for names, why, *_ in (*REFUSED, XTUNER)]
    return "\n".join(rows)


def write_refused(folder: Path, config: Json) -> Path:
    """Write config.json only: what is refused is refused before there are weights."""
    makers.write_json(folder / "config.json", config)
    return folder

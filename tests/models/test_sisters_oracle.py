"""The sister systems' oracles have the published sizes, and agree with transformers' classes of BLIP-2."""

from __future__ import annotations

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

from tests.models import sisters_files as files
from tests.models.sisters_oracle import FULL, SYSTEMS, TINY, example, in_torch, random_values, system
from tests.models.sisters_parts import Eva, QFormer, Sizes

# Published, or computed from published sizes; each of the named parts together.
PARAMETERS = [
    ("minigpt4", ("visual_encoder",), 985_894_528),
    ("minigpt4", ("Qformer", "query_tokens"), 105_162_240),
    ("minigpt4", ("llama_proj",), 3_149_824),
    ("mplug-owl", ("vision_model",), 303_179_776),
    ("mplug-owl", ("abstractor", "query_tokens"), 105_097_216),
    ("muffin", ("model.vision_tower.beit3",), 607_757_312),
    ("muffin", ("model.mm_projector",), 5_248_000),
]
ODD = Sizes((30, 3, 5, 44), (28, 5, 4, 38), 5, 25, 6, 90, 36)  # a pixel that fills no patch


@pytest.mark.parametrize(("name", "parts", "count"), PARAMETERS)
def test_parameters(name, parts, count):
    with torch.device("meta"):
        model = SYSTEMS[name](FULL[name])
    found = [x for path, x in model.named_parameters() if path.startswith(parts)]
    assert sum(x.numel() for x in found) == count


@pytest.mark.parametrize("seed", range(3))
def test_eva_is_transformers_blip2_vision(seed):
    mine = Eva(ODD)
    random_values(mine, seed)
    (width, layers, heads, mlp), sizes = ODD.vision, {"image_size": ODD.image_size, "patch_size": ODD.patch_size}
    sizes |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    theirs = Blip2VisionModel(Blip2VisionConfig(**sizes)).eval()
    names = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
    names |= {"patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers", "norm1": "layer_norm1"}
    names |= {"norm2": "layer_norm2", "attn.proj": "self_attn.projection", "attn.qkv": "self_attn.qkv"}
    tensors = theirs.state_dict()
    for name, x in mine.state_dict().items():
        for before, after in names.items():
            name = name.replace(before, after)
        if not name.endswith("_bias"):
            tensors[name] = x
    for n, block in enumerate(mine.blocks):  # theirs has a bias for keys, too
        bias = torch.cat([block.attn.q_bias, torch.zeros(width), block.attn.v_bias])
        tensors[f"encoder.layers.{n}.self_attn.qkv.bias"] = bias
    theirs.load_state_dict(tensors)
    pixels = torch.randn(2, 3, ODD.image_size, ODD.image_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-1]  # before their last normalization
        torch.testing.assert_close(mine(pixels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_qformer_is_transformers_blip2_qformer(seed):
    mine = QFormer(ODD)
    random_values(mine, seed)
    width, layers, heads, mlp = ODD.bridge
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**sizes, encoder_hidden_size=ODD.vision[0])).eval()
    names = {
        "bert.embeddings.LayerNorm": "layernorm",
        "bert.encoder": "encoder",
        "attention.self": "attention.attention",
    }
    tensors = {}
    for name, x in mine.state_dict().items():
        for before, after in names.items():
            name = name.replace(before, after)
        tensors[name] = x
    theirs.load_state_dict(tensors)
    random = torch.Generator().manual_seed(seed)
    queries, image = torch.randn(2, 5, width, generator=random), torch.randn(2, 7, ODD.vision[0], generator=random)
    with torch.no_grad():
        expected = theirs(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        torch.testing.assert_close(mine(queries, image), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_images_are_seen_where_they_are_shown(name):
    model = system(name)
    tokens, slots, pixels = in_torch(model, example(model))
    logits, words = model.logits(tokens, slots, pixels), model.language(tokens).logits
    assert (slots[0] >= 0).sum() == model.image_tokens
    torch.testing.assert_close(logits[2], words[2], rtol=0, atol=1e-5)  # the row without an image
    first = int((slots[0] >= 0).int().argmax())
    torch.testing.assert_close(logits[0, :first], words[0, :first], rtol=0, atol=1e-5)
    assert (logits[0, first:] - words[0, first:]).abs().amin() > 0
    pixels[0, 0, :, :8] += 1
    assert (model.logits(tokens, slots, pixels)[0, first:] - logits[0, first:]).abs().amax() > 1e-3


def test_a_delta_is_added_in_half_precision(tmp_path):
    target = system("minigpt4").language
    made = files.delta_folders(tmp_path, target)
    for name, x in target.state_dict().items():
        torch.testing.assert_close(made.tensors[name].float(), x, rtol=0, atol=4e-3)
    torch.testing.assert_close(made.tensors["lm_head.weight"][-1].float(), target.lm_head.weight[-1].detach())

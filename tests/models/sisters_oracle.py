"""The oracles of MiniGPT-4, mPLUG-Owl and Muffin: the parts of `sisters_parts` around transformers' LLaMA.

Their `state_dict()` has the published names. Tokens that show an image have a slot, the index of the feature that takes
their place; all others have -1.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from reverie_jax.models import ModelInputs
from tests.models.oracle import image_inputs, normalized
from tests.models.sisters_parts import Abstractor, Beit3, Eva, OwlVision, QFormer, Sizes, resized_positions

# Files of MiniGPT-4 and Muffin do not say how many heads there are: their width is 88 in EVA, 64 in the Q-Former and BEiT-3.
TINY = {
    "minigpt4": Sizes((176, 3, 2, 52), (128, 4, 2, 70), 5, 28, 7, 91, 36),
    "mplug-owl": Sizes((30, 3, 3, 44), (30, 2, 5, 38), 6, 24, 8, 90, 36),
    "muffin": Sizes((128, 3, 2, 68), (0, 0, 0, 0), 5, 48, 16, 94, 36, 11),
}
FULL = {
    "minigpt4": Sizes((1408, 39, 16, 6144), (768, 12, 12, 3072), 32, 224, 14, 32001, 4096),
    "mplug-owl": Sizes((1024, 24, 16, 4096), (1024, 6, 16, 4096), 64, 224, 14, 32000, 4096),
    "muffin": Sizes((1024, 24, 16, 4096), (0, 0, 0, 0), 64, 448, 16, 32004, 5120, 1024),
}


def llama_config(sizes: Sizes) -> LlamaConfig:
    """Return a tiny LLaMA of the first generation, but for its vocabulary and width."""
    shape = {"vocab_size": sizes.rows, "hidden_size": sizes.hidden, "num_attention_heads": sizes.hidden // 4}
    shape |= {"num_hidden_layers": 2, "intermediate_size": 52, "rms_norm_eps": 1e-3, "max_position_embeddings": 777}
    return LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def llama(sizes: Sizes) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(sizes))


class System:
    """What the three have in common; a mixin of modules with `language`, `features` and `image_embeddings`."""

    language: LlamaForCausalLM
    sizes: Sizes

    @property
    def image_tokens(self) -> int:
        """Return how many tokens an image has in the language model."""
        return self.sizes.queries + isinstance(self, MplugOwl)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, slots: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Compute logits of causal sequences.

        Args:
            tokens: [rows, length]; those with a slot may be any number.
            slots: [rows, length]; features of a row's images are counted through.
            pixels: [rows, images, 3, side, side].

        Returns:
            [rows, length, vocabulary].
        """
        images = self.image_embeddings(pixels.flatten(0, 1)).reshape(len(tokens), -1, self.language.config.hidden_size)
        embedded = self.language.get_input_embeddings()(torch.where(slots < 0, tokens, 0))
        shown = images[torch.arange(len(tokens))[:, None], slots.clamp(min=0)]
        return self.language(inputs_embeds=torch.where(slots[..., None] < 0, embedded, shown)).logits

    def greedy(self, tokens: torch.Tensor, slots: torch.Tensor, pixels: torch.Tensor, count: int = 24) -> torch.Tensor:
        """Continue each row by its likeliest tokens, [rows, count], without a cache; nothing ends an answer."""
        length = tokens.shape[1]
        for _ in range(count):
            best = self.logits(tokens, slots, pixels)[:, -1].argmax(-1, keepdim=True)
            tokens, slots = torch.cat([tokens, best], 1), functional.pad(slots, (0, 1), value=-1)
        return tokens[:, length:]


class MiniGPT4(nn.Module, System):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.visual_encoder = Eva(sizes)
        self.ln_vision = nn.LayerNorm(sizes.vision[0], 1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, sizes.queries, sizes.bridge[0]))
        self.Qformer = QFormer(sizes)
        self.llama_model = llama(sizes)
        self.llama_proj = nn.Linear(sizes.bridge[0], sizes.hidden)

    @property
    def language(self) -> LlamaForCausalLM:
        return self.llama_model

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        image = self.ln_vision(self.visual_encoder(pixels))
        return self.Qformer(self.query_tokens.expand(len(pixels), -1, -1), image)

    def image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.llama_proj(self.features(pixels))


class MplugOwl(nn.Module, System):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.vision_model = OwlVision(sizes)
        self.query_tokens = nn.Parameter(torch.zeros(1, sizes.queries, sizes.bridge[0]))
        self.abstractor = Abstractor(sizes)
        self.language_model = llama(sizes)

    @property
    def language(self) -> LlamaForCausalLM:
        return self.language_model

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        image, x = self.vision_model(pixels), self.query_tokens.expand(len(pixels), -1, -1)
        for layer in self.abstractor.encoder.layers:
            x = layer(x, image)
        return x

    def image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        last = self.abstractor.vit_eos.expand(len(pixels), -1, -1)
        return torch.cat([self.abstractor.visual_fc(self.features(pixels)), last], 1)


class Muffin(LlamaForCausalLM, System):
    def __init__(self, sizes: Sizes):
        super().__init__(llama_config(sizes))
        self.sizes = sizes
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.beit3 = Beit3(sizes)
        self.model.query = nn.Parameter(torch.zeros(sizes.queries, sizes.vision[0]))
        self.model.mm_projector = nn.Linear(sizes.vision[0], sizes.hidden)

    @property
    def language(self) -> LlamaForCausalLM:
        return self

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.vision_tower.beit3(pixels, self.model.query)

    def image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.mm_projector(self.features(pixels))

    def resized(self, image_size: int) -> Muffin:
        """Return a copy for images of another size."""
        other = copy.deepcopy(self)
        other.sizes = dataclasses.replace(self.sizes, image_size=image_size)
        tables = other.model.vision_tower.beit3.encoder.embed_positions
        table = resized_positions(tables.A.weight.detach(), image_size // self.sizes.patch_size)
        tables.A = nn.Embedding(*table.shape, _weight=table)
        return other


SYSTEMS = {"minigpt4": MiniGPT4, "mplug-owl": MplugOwl, "muffin": Muffin}


def random_values(module: nn.Module, seed: int) -> None:
    """Make every parameter random, and such that float16 and bfloat16 represent it exactly."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=random)
            if tensor.ndim == 1:
                scales = name.endswith("weight")  # of a normalization
                noise = 1 + 0.3 * noise if scales else 0.3 * noise
            elif name.endswith("weight") and "embed" not in name:
                noise *= 1.2 / tensor[0].numel() ** 0.5
            tensor.copy_(torch.where(noise.abs() < 1e-3, 0, noise).bfloat16())


def system(name: str, seed: int = 0, sizes: Sizes | None = None) -> MiniGPT4 | MplugOwl | Muffin:
    """Return a random system by its name in `TINY`."""
    model = SYSTEMS[name](sizes or TINY[name])
    random_values(model, seed)
    return model.eval()


def example(model: System, seed: int = 0, images: tuple[int, ...] = (1, 2, 0), image: int = 0) -> ModelInputs:
    """Return random rows of words and images for a system, with the placeholder `image` where images are."""
    shape = SimpleNamespace(
        vision=SimpleNamespace(image_size=model.sizes.image_size), text=SimpleNamespace(vocab=model.sizes.rows)
    )
    return image_inputs(shape, seed, images, image=image, tokens=model.image_tokens)


def in_torch(model: System, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `logits` and `greedy` take; Muffin's images have mean and deviation 0.5, the others' are CLIP's."""
    pixels = normalized(inputs.images, siglip=isinstance(model, Muffin))
    tokens, slots = (torch.tensor(array, dtype=torch.long) for array in (inputs.tokens, inputs.image_slots))
    return tokens, slots, pixels.unflatten(0, inputs.images.shape[:2])

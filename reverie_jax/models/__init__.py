"""The model, from arrays to arrays; datasets, tokenizers and training are elsewhere.

Letters in array shapes, here and everywhere:

| letter | meaning                              | letter | meaning                                |
|--------|--------------------------------------|--------|----------------------------------------|
| `B`    | sequences in a batch                 | `H`    | query heads                            |
| `L`    | tokens in a sequence                 | `K`    | key/value heads                        |
| `D`    | decoder width                        | `d`    | width of one head                      |
| `M`    | images in a sequence                 | `V`    | vocabulary                             |
| `P`    | patch tokens of an image             | `E`    | edges in a sequence (supervised)       |
| `S`    | side of an image, in pixels          | `Q`    | questions (leaves) in a sequence       |
| `W`    | vision tower width                   | `T`    | tokens decoded after a leaf            |
| `N`    | stacked layers                       | `r`    | LoRA rank                              |
"""

from reverie_jax.models.config import TextConfig, VisionConfig, VLMConfig
from reverie_jax.models.vlm import ModelInputs, VisionLanguageModel

__all__ = ["ModelInputs", "TextConfig", "VLMConfig", "VisionConfig", "VisionLanguageModel"]

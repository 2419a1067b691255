"""Arrays in, arrays out. Knows no dataset, no tokenizer and no training.

Letters in array shapes, here and everywhere:

| letter | meaning                              | letter | meaning                                |
|--------|--------------------------------------|--------|----------------------------------------|
| `B`    | rows in a batch                      | `H`    | query heads                            |
| `L`    | tokens in a row                      | `K`    | key/value heads                        |
| `D`    | decoder width                        | `d`    | width of one head                      |
| `M`    | images in a row                      | `V`    | vocabulary                             |
| `P`    | patch tokens of an image             | `E`    | edges in a row (supervised positions)  |
| `S`    | side of an image, in pixels          | `Q`    | questions (open leaves) in a row       |
| `W`    | vision tower width                   | `T`    | tokens decoded after a leaf            |
| `N`    | stacked layers                       | `r`    | LoRA rank                              |
"""

from reverie_jax.models.config import TextConfig, VisionConfig, VLMConfig
from reverie_jax.models.vlm import VisionLanguageModel

__all__ = ["TextConfig", "VLMConfig", "VisionConfig", "VisionLanguageModel"]

"""Decoding protocols: the prompts and the decoding by which authors got the answers that they published scores of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reverie_jax.errors import UserError
from reverie_jax.eval.decode import Decoding

PROTOCOLS: dict[str, dict[str, Any]] = {
    # LRV-Instruction: MiniGPT-4/minigpt4/conversation/conversation.py. top_k is left to transformers: 50.
    "lrv-minigpt4": {"template": "minigpt4_eval", "max_new_tokens": 300}
    | {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
    # LRV-Instruction: utils/inference.py, utils/model_worker.py.
    "lrv-mplug-owl": {"template": "mplug_owl_eval", "max_new_tokens": 512}
    | {"temperature": 1.0, "top_p": 0.9, "top_k": 3, "no_repeat_ngram": 2},
    # Muffin: muffin/eval/muffin_vqa.py. Its temperature of 0.7 does nothing, since nothing is sampled.
    "rlhfv-muffin": {"template": "muffin_eval", "max_new_tokens": 1024}
    | {"beams": 3, "early_beams": True, "repetition_penalty": 1.1, "penalize_prompt": True},
}
"""The template and fields of `Decoding`. The maximum length holds for every benchmark, in place of the benchmark's own."""


def decoding_of(protocol: str, defaults: Mapping[str, Any], chosen: Mapping[str, Any]) -> Decoding:
    """Return the defaults with the protocol's options over them, and the user's over those.

    Args:
        protocol: A name in `PROTOCOLS`, or empty.
        defaults: Fields of `Decoding`.
        chosen: Fields too; None where the user chose nothing.

    Raises:
        UserError: An option is out of range, or two of them exclude each other.
    """
    published = {name: value for name, value in PROTOCOLS.get(protocol, {}).items() if name != "template"}
    given = {name: value for name, value in chosen.items() if value is not None}
    try:
        return Decoding(**{**defaults, **published, **given})
    except ValueError as error:
        raise UserError(str(error)) from None

"""Answer files: what is in them, and that kills, full disks and further processes change nothing in them.

Run as a module, it asks a tiny model a made-up benchmark and writes the answers into the folder it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reverie_jax.data.annotate.stages import WHY
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.images import decode, preprocess
from reverie_jax.data.pipeline import Picture
from reverie_jax.data.processor import Processor
from reverie_jax.errors import UserError
from reverie_jax.eval import predict as prediction
from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkError, Loaded, Question
from reverie_jax.eval.decode import Decoding
from reverie_jax.eval.engine import Engine, EngineShape
from reverie_jax.eval.predict import Ask, dump_prompts, predict
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import make_mesh
from tests.train import tiny

SHAPE = EngineShape(tokens=192, leaves=4, rows=2)
LONGEST = 6
YES, NO = 198, 199


class Words(tiny.Words):
    """Characters, but " Yes" and " No" are tokens, as in real vocabularies."""

    def __call__(self, text, *, return_offsets_mapping):
        spans = [match.span() for match in re.finditer(r"<image>|</s>| Yes| No|.", text, re.DOTALL)]
        special = {"<image>": 3, "</s>": 2, " Yes": YES, " No": NO}
        ids = [special.get(text[a:b]) or 4 + ord(text[a]) % 190 for a, b in spans]
        return {"input_ids": [1, *ids], "offset_mapping": [(0, 0), *spans]}


@functools.cache
def model():
    """Random weights, large enough that answers differ from one another and some end early."""
    made = VisionLanguageModel(tiny.CONFIG, rngs=nnx.Rngs(3))
    head = made.decoder.head.kernel
    head.set_value(head[...] * 3)
    return made


def processor():
    return Processor.of(tiny.CONFIG, Words())


class Made(Benchmark):
    name = "made"
    new_tokens = LONGEST
    needs = "nothing"


class Sure(Made):
    """Yes or no."""

    name = "sure"
    yes_no = True


@functools.cache
def shown(name):
    return tiny.record(sum(map(ord, name))).image


def mixed():
    """Every kind of question, of pictures in no order."""
    asked = [Question(10 + n, f"{n % 5}.png", f"Is it {'abcdefghij'[n]}?", f"{n % 5}.png") for n in range(10)]
    asked.insert(2, Question("t/1", None, "What is one?", "t/1"))
    asked.insert(5, Question("b/1", "2.png", "Why?", "2.png", {}, (("Is it a?", "no"), ("And b?", "yes"))))
    asked.insert(6, Question("s/1", "3.png", "Short: is it a?", "3.png", {}, (), 3))
    asked.insert(9, Question("t/2", None, "What is two, and what is “trois”?", "t/2"))
    asked.append(Question("s/2", "0.png", "Short: is it b?", "0.png", {}, (), 3))
    asked.append(Question(99, "4.png", "Is it e?", "4.png"))  # as 14: answered once, written twice
    return Loaded(asked, shown, {"version": "made"})


if __name__ == "__main__":
    t=time.time()
    e=Engine(model(), processor(), SHAPE)
    print(time.time()-t)
    predict(e, Made(), mixed(), Path(sys.argv[1]), Ask(Decoding(LONGEST)), model="tiny", identity={}, progress=lambda *a: print(time.time()-t, a))

"""Making of the small model that ships with the package: tokenizer, two stages of pretraining, scores, card."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from flax import nnx

from reverie_jax.data.conversation import IMAGE
from reverie_jax.data.processor import Processor
from reverie_jax.eval.engine import Engine
from reverie_jax.loading import load_model
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import write_model
from reverie_jax.scenes import benchmark, dataset, pretrain, report
from reverie_jax.scenes.benchmark import LABELS
from reverie_jax.scenes.tokenizer import train_tokenizer

CARD = """\
# scenes-base

A {parameters:,}-parameter LLaVA-1.5 (CLIP ViT, `mlp2x_gelu`, LLaMA decoder) for the drawn scenes of reverie-jax.
It describes images, answers plain questions, and hallucinates objects that usually appear together: reflective tuning is
demonstrated on it. It cannot read photographs.

Made by `reverie scenes pretrain` in {seconds:,.0f} seconds. Format: llava-hf safetensors, float16; vocabulary {vocab}.

| | |
|---|---|
| data | {scenes:,} rendered training scenes, seed {seed}; objects appear with their partner with probability 0.85 |
| tower | {tower_steps:,} steps of {tower_batch_size} images: each patch's category, color, size and texture |
| language | {steps:,} steps of {batch_size} images: a description and up to {questions} plain answers each; tower frozen |
| absent | {absent_share:.0%} of the questions are about absent objects |
| finish | {finish_steps:,} more steps with {finish_absent_share:.0%} about absent objects |
| never seen | rationales, validation and test scenes (no scene graph is in two splits) |
| last loss | tower {tower_loss:.3f}, language {language_loss:.3f} |

Scores on {test} held-out scenes that break the prior (`reverie eval`, 95 % interval of a bootstrap over images):

| | |
|---|---|
{scores}

Recipe: `{recipe}`
"""


def make(out: Path, *, seed: int = 0, tower_steps: int | None = None, steps: int | None = None) -> None:
    """Pretrain the model and write it, its tokenizer and its card (README.md) to `out`.

    Args:
        out: output folder.
        seed: random seed.
        tower_steps: of the vision tower's stage; `PretrainRecipe`'s by default.
        steps: of the language stage; `PretrainRecipe`'s by default.
    """
    recipe = pretrain.PretrainRecipe(seed=seed)
    recipe = dataclasses.replace(
        recipe,
        tower_steps=recipe.tower_steps if tower_steps is None else tower_steps,
        steps=recipe.steps if steps is None else steps,
    )
    started, losses = time.perf_counter(), {"tower": float("nan"), "language": float("nan")}

    def log(stage: str, step: int, loss: float) -> None:
        losses[stage] = loss
        print(f"{time.perf_counter() - started:7.0f} s  {stage:8} step {step:5}  loss {loss:.4f}", flush=True)

    tokenizer = train_tokenizer(1024, seed)
    # The embedding is a little larger than the tokenizer, so that a mesh divides its rows evenly.
    vocab = -(-len(tokenizer) // 64) * 64
    config = pretrain.base_config(vocab, tokenizer.get_vocab()[IMAGE])
    model = VisionLanguageModel(config, rngs=nnx.Rngs(seed))
    processor = Processor.from_config(config, tokenizer)
    training = pretrain.take_pretraining_scenes(recipe)
    pretrain.pretrain_tower(model, training, recipe, log)
    pretrain.pretrain_language(model, processor.encoder, training, recipe, log)
    pretrain.pretrain_language(model, processor.encoder, training, pretrain.finish_recipe(recipe), log)
    write_model(model, out, dtype=np.float16)
    tokenizer.save_pretrained(out)
    seconds = time.perf_counter() - started
    write_card(out, recipe, seconds, losses)
    print(f"wrote {out} ({sum(path.stat().st_size for path in out.iterdir()) / 1e6:.1f} MB)")


def write_card(out: Path, recipe: pretrain.PretrainRecipe, seconds: float, losses: dict[str, float]) -> None:
    """Evaluate the written model, and write its card.

    Args:
        out: folder of the model.
        recipe: it was made by.
        seconds: it took.
        losses: last loss of each stage.
    """
    model, processor = load_model(out, dtype=np.float32)
    test = 250
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dataset.make_test_set(folder, test, size=model.config.vision.image_size, seed=0)
        model.decoder.unstack()
        benchmark.predict(Engine(model, processor), folder, folder / "predictions")
        scores = benchmark.estimates(benchmark.count_predictions(folder, folder / "predictions"))
    parameters = sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves)
    text = CARD.format(
        **dataclasses.asdict(recipe),
        parameters=parameters,
        vocab=model.config.text.vocab,
        seconds=seconds,
        tower_loss=losses["tower"],
        language_loss=losses["language"],
        test=test,
        scores="\n".join(f"| {LABELS[name]} | {' '.join(report.interval(scores[name]))} |" for name in report.ROWS),
        recipe=json.dumps(dataclasses.asdict(recipe)),
    )
    (out / "README.md").write_text(text, "utf-8")

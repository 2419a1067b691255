"""Evaluate a checkpoint from Python: answer a benchmark's questions, score by its rule, compare with a second model.

Here the benchmark is `scenes`, whose files are drawn on the spot. For an official one, name it and its folder of files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import reverie_jax
from reverie_jax import Engine, EngineShape, PredictOptions
from reverie_jax.eval.decode import Decoding
from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.scenes.dataset import make_test_set


def main() -> None:
    """Score two checkpoints on the same questions, and print metrics, intervals and differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes-base")
    parser.add_argument("--adapter", help="run folder, PEFT adapter or LLaVA LoRA folder of the second model")
    parser.add_argument("--benchmark", default="scenes")
    parser.add_argument("--data", type=Path, help="folder of the official files; drawn here for scenes")
    parser.add_argument("--scenes", type=int, default=40)
    args = parser.parse_args()

    folder = args.data or Path("held-out")
    if args.data is None:
        make_test_set(folder, args.scenes, size=144, seed=0)
    benchmark = reverie_jax.find_benchmark(args.benchmark)
    data = benchmark.load(folder)
    options = PredictOptions(Decoding(benchmark.max_new_tokens))

    results = []
    for name, adapter in (("base", None), ("tuned", args.adapter)):
        if name == "tuned" and adapter is None:
            continue
        model, processor = reverie_jax.load_model(args.model, adapter=adapter)
        checksums = base_checksums(model)
        model.decoder.unstack()  # decodes faster; a model that is tuned or written stays as it is
        engine = Engine(model, processor, EngineShape(batch_size=8))
        # An interrupted run resumes: the answers are written as they come.
        predictions = reverie_jax.predict(
            engine, benchmark, data, Path("scores") / name, options, model=name, checksums=checksums
        )
        result = reverie_jax.score(benchmark, data, predictions)
        results.append(result)
        for metric, value in result.metrics.items():
            low, high = result.intervals.get(metric, (value, value))
            print(f"{name:6} {metric:28} {value:8.3f}  [{low:.3f}, {high:.3f}]")
    if len(results) == 2:
        print(reverie_jax.compare(results[1], results[0])["differences"])


if __name__ == "__main__":
    main()

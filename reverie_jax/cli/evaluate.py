"""`reverie eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reverie_jax.cli import common
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData
    from reverie_jax.eval.decode import Decoding
    from reverie_jax.eval.engine import Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Answer a benchmark's questions with a model, and score the answers by the benchmark's official rule.

    All questions about an image share its prefix. Answers are written as they come: run the same command again to resume.
    Rules that need a judge are scored afterwards, by `reverie judge` and `reverie score`.
    """

    model: str
    """Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base."""
    benchmark: str
    """Benchmarks, separated by commas; `reverie benchmarks` lists them."""
    data: Path
    """Folder of the benchmark's official files; of several benchmarks, a folder of folders by name."""
    out: Path
    """Output folder for predictions.jsonl and scores.json; of several benchmarks, of folders by name."""
    components: common.Components = ()
    """Checkpoint of a part that the model lacks: language model or CLIP tower. Repeat for each part."""
    adapter: str | None = None
    """PEFT adapter, LLaVA LoRA folder, or run folder of `reverie train`."""
    dtype: str = "auto"
    """Dtype of weights and computation: float32, bfloat16, or auto (bfloat16 on accelerators, float32 on CPUs)."""
    images: Path | None = None
    """Folder of images, if they are not with the data."""
    rule: str | None = None
    """Scoring rule; the benchmark's official one if omitted. `reverie benchmarks` lists them."""
    template: str | None = None
    """Conversation template; the checkpoint's if omitted."""
    mesh: str = "data=1,fsdp=1,tensor=1"
    """Devices of each mesh axis."""
    distributed: str = ""
    """Join other processes: auto (SLURM, Open MPI, Kubernetes, TPU pod), or address:port,processes,index."""
    batch_size: int = 16
    """Images in a batch."""
    max_questions: int = 32
    """Maximum number of questions about one image that are decoded together."""
    max_length: int = 4096
    """Maximum sequence length, in tokens; an image whose questions do not fit takes several sequences."""
    max_new_tokens: int | None = None
    """Maximum length of an answer, in tokens; never more than the benchmark's own limit, which is the default."""
    beams: int | None = None
    """Number of beams; the benchmark's if omitted (3 for Object HalBench, 1 for others)."""
    temperature: float = 0.0
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus (top-p) threshold of sampling."""
    seed: int = 0
    """Random seed."""
    contrast: str = ""
    """Contrastive decoding against hallucination: image (VCD: a second stream sees the image under noise) or instruction
    (ICD: a second stream reads a disturbing instruction)."""
    alpha: float = 1.0
    """Strength of the contrast."""
    beta: float = 0.1
    """Plausibility cutoff of the contrast: tokens below this share of the likeliest token's probability are excluded."""
    noise_step: int = 500
    """Diffusion step of the noise for --contrast image, 0 to 999."""
    reflect: bool = False
    """Answer, explain, then answer again; the second answer is scored, both are kept."""
    limit: int | None = None
    """Answer only the first questions, this many; nothing is scored."""
    dump_prompts: Path | None = None
    """Write all prompts to this file instead of running the model."""

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.eval.benchmarks import files

        self._check()
        found = [
            (one, files.with_images(one.load(data), self.images), out)
            for one, data, out in places(self.benchmark, self.data, self.out)
        ]
        for one, _, _ in found:
            if self.rule is not None and self.rule not in one.rules:
                raise UserError(f"--rule {self.rule}: {one.name} has {', '.join(one.rules)}")
        if self.dump_prompts is not None:
            self._dump_prompts([loaded for _, loaded, _ in found], self.dump_prompts)
            return
        engine, weights = self._engine()
        failed = list[str]()
        for one, loaded, out in found:
            predictions = self._predict(engine, one, loaded, out, weights)
            if predictions is not None:
                try:
                    self._score(one, loaded, predictions, out)
                except UserError as error:  # the answers exist; further benchmarks are run all the same
                    failed.append(f"{one.name}: {error}")
        if failed:
            raise UserError("; ".join(failed))

    def _check(self) -> None:
        common.one_of(("", "image", "instruction"), contrast=self.contrast)
        common.at_least(
            1,
            batch_size=self.batch_size,
            max_questions=self.max_questions,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            limit=self.limit,
        )

    def _dump_prompts(self, benchmarks: list[BenchmarkData], path: Path) -> None:
        from reverie_jax.eval.predict import dump_prompts
        from reverie_jax.loading import as_tuned, load_processor

        processor = load_processor(self.model, components=self.components)
        processor = processor if self.adapter is None else as_tuned(processor, Path(self.adapter))
        questions = [question for loaded in benchmarks for question in loaded.asked[: self.limit]]
        with common.writing(path):
            dump_prompts(processor.using(self.template).encoder, questions, path)
        print(f"{len(questions)} prompts: {path}")

    def _engine(self) -> tuple[Engine, dict[str, str]]:
        """Load the model; return the engine, and the checksums of the tuned weights."""
        from reverie_jax.eval.engine import Engine, EngineShape
        from reverie_jax.loading import load_model
        from reverie_jax.models import lora
        from reverie_jax.models.checkpoints import base_checksums, weights_checksum
        from reverie_jax.train.distributed import join

        join(self.distributed)
        where: Any = {"mesh": common.parse_mesh(self.mesh), "dtype": common.parse_dtype(self.dtype)}
        model, processor = load_model(self.model, components=self.components, adapter=self.adapter, **where)
        lora.merge(model)
        # The whole merged model: an adapter that was trained further is another model.
        weights = {**base_checksums(model), "all": weights_checksum(model)}
        shape = EngineShape(sequence_length=self.max_length, questions=self.max_questions, batch_size=self.batch_size)
        return Engine(model, processor.using(self.template), shape), weights

    def _decoding(self, benchmark: Benchmark) -> Decoding:
        from reverie_jax.eval.decode import Decoding

        beams = self.beams
        if beams is None:  # the benchmark's protocol, unless sampling or contrast excludes beam search
            beams = 1 if self.temperature or self.contrast else benchmark.beams
        try:
            return Decoding(
                self.max_new_tokens or benchmark.max_new_tokens,
                beams=beams,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                contrast=self.contrast,  # type: ignore[arg-type]
                alpha=self.alpha,
                beta=self.beta,
                noise_step=self.noise_step,
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def _predict(
        self, engine: Engine, benchmark: Benchmark, loaded: BenchmarkData, out: Path, weights: dict[str, str]
    ) -> Path | None:
        """Write the answers; return their file if this process is to score it."""
        import jax

        from reverie_jax.eval import predict

        options = predict.PredictOptions(self._decoding(benchmark), self.reflect, self.limit)
        questions = options.questions(loaded)
        images = len({question.image for question in questions if question.image}) / max(1, len(questions))
        first = jax.process_index() == 0
        with common.ProgressBars(benchmark.name, show=first) as bars:

            def on_progress(stage: str, done: int, total: int) -> None:
                speed = bars.speed(stage)
                bars.update(stage, done, total, f"{speed:.1f} answers/s, {speed * images:.1f} images/s")

            predictions = predict.predict(
                *(engine, benchmark, loaded, out, options),
                model=Path(self.adapter or self.model).name,
                base_checksums=weights,
                progress=on_progress,
            )
        if first and self.limit is not None:
            print(f"{predictions}: {len(questions)} of {len(loaded.questions)} answers, not scored")
        return predictions if first and self.limit is None else None

    def _score(self, benchmark: Benchmark, loaded: BenchmarkData, predictions: Path, out: Path) -> None:
        from rich.console import Console

        from reverie_jax.cli.score import score_table
        from reverie_jax.eval import score
        from reverie_jax.eval.benchmarks.files import SCORES
        from reverie_jax.eval.benchmarks.interface import NotScorable

        try:
            result = score.score(benchmark, loaded, predictions, self.rule)
        except NotScorable as error:
            print(f"{predictions}: not scored: {error}")
            return
        with common.writing(out / SCORES):
            score.write_score(result, out / SCORES)
        Console().print(score_table(result))


def places(names: str, data: Path, out: Path) -> list[tuple[Benchmark, Path, Path]]:
    """Return benchmarks with the folder of their files and that of their answers.

    Raises:
        UserError: a name is unknown or listed more than once.
    """
    from reverie_jax.eval.benchmarks import benchmark

    def files_of(name: str) -> Path:
        return data / name if (data / name).is_dir() else data

    found = [benchmark(name.strip()) for name in names.split(",")]
    if len(found) == 1:
        return [(found[0], files_of(found[0].name), out)]
    if len({one.name for one in found}) != len(found):
        raise UserError(f"--benchmark {names}: listed more than once")
    return [(one, files_of(one.name), out / one.name) for one in found]

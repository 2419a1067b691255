"""`reverie eval`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes

from reverie_jax.cli import common, hosted
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from reverie_jax.eval.benchmarks.interface import Benchmark, BenchmarkData
    from reverie_jax.eval.decode import Decoding
    from reverie_jax.eval.engine import Engine

_DECODING = ("max_new_tokens", "beams", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram")
"""Options that win over a protocol's, beside the temperature."""
_LOCAL = (
    *("components", "adapter", "template", "dtype", "mesh", "distributed", "batch_size", "max_questions", "max_length"),
    *("protocol", "beams", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram", "penalize_prompt", "seed"),
    *("contrast", "alpha", "beta", "noise_step", "dump_prompts"),
)
"""Options that mean nothing for a model that others serve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Answer a benchmark's questions with a model, and score the answers by the benchmark's official rule.

    All questions about an image share its prefix. Answers are written as they come: run the same command again to resume.
    Rules that need a judge are scored afterwards, by `reverie judge` and `reverie score`.

    A model that is served elsewhere (openai:MODEL@URL) is asked over the network. Every reply is kept in OUT/journal.sqlite
    as it comes: nothing that was paid for is requested again. Keys are read from GEMINI_API_KEY (or GOOGLE_API_KEY) and
    OPENAI_API_KEY.
    """

    model: Annotated[
        str,
        common.option(
            "MODEL",
            "Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base. Or a model that is "
            "served: openai:MODEL@URL (vLLM, SGLang, …), openai:MODEL, gemini:MODEL.",
        ),
    ]
    benchmark: Annotated[common.Several[str], common.option("NAMES ...")] = ()
    """Required. Benchmarks, separated by commas or spaces; `reverie benchmarks` lists them."""
    data: Annotated[Path, common.FOLDER]
    """Folder of the benchmark's official files; of several benchmarks, a folder of folders by name (LLaVA's names too).

    `hub` downloads the dataset from the Hugging Face hub into its cache, after a line with its licence and size.
    """
    out: Annotated[Path, common.FOLDER]
    """Output folder: predictions.jsonl and scores.json; for several benchmarks, folders of them by name."""
    components: common.Components = ()
    adapter: common.Adapter = None
    template: common.Template = None
    dtype: common.Dtype = "auto"
    images: Annotated[Path | None, common.FOLDER] = None
    """Folder of images; the one in the data if omitted."""
    rule: Annotated[str | None, common.option("RULE")] = None
    """Scoring rule; the benchmark's official one if omitted. `reverie benchmarks` lists them."""
    mesh: common.MeshSpec = common.ONE_DEVICE
    distributed: common.Distributed = ""
    batch_size: Annotated[int, common.N] = 16
    """Images in a batch."""
    max_questions: Annotated[int, common.N] = 32
    """Maximum number of questions about one image that are decoded together."""
    max_length: Annotated[int, common.N] = 4096
    """Maximum sequence length, in tokens; an image whose questions do not fit takes several sequences."""
    protocol: common.Protocol = ""
    max_new_tokens: common.MaxNewTokens = None
    """Maximum length of an answer, in tokens; without a protocol never more than the benchmark's own limit, the default."""
    beams: Annotated[int | None, common.N] = None
    """Number of beams; the benchmark's if omitted (3 for Object HalBench, 1 for others)."""
    temperature: Annotated[str, common.option("NUMBER|none")] = ""
    """Sampling temperature; 0, the default, decodes greedily; `none` sends none to a served model."""
    top_p: Annotated[float | None, common.NUMBER] = None
    """Nucleus (top-p) threshold of sampling; 1, the default, for all tokens."""
    top_k: Annotated[int | None, common.N] = None
    """Sample from the likeliest tokens only, this many; 0, the default, for all."""
    repetition_penalty: Annotated[float | None, common.NUMBER] = None
    """Factor by which tokens of the answer become less likely to occur again; 1, the default, changes nothing."""
    no_repeat_ngram: Annotated[int | None, common.N] = None
    """Size of the n-grams of tokens that occur at most once in an answer; 0, the default, for any number."""
    penalize_prompt: Annotated[bool, common.FLAG] = False
    """For the last two, tokens of the prompt count too."""
    seed: common.Seed = 0
    contrast: common.Contrast = ""
    alpha: Annotated[float, common.NUMBER] = 1.0
    """Strength of the contrast."""
    beta: Annotated[float, common.NUMBER] = 0.1
    """Plausibility cutoff of the contrast: tokens below this share of the likeliest token's probability are excluded."""
    noise_step: Annotated[int, common.N] = 500
    """Diffusion step of the noise for --contrast image, 0 to 999."""
    reflect: Annotated[bool, common.FLAG] = False
    """Answer, explain, then answer again; the second answer is scored, both are kept."""
    limit: Annotated[int | None, common.N] = None
    """Answer only the first questions, this many; their score is printed as a partial one, and not written."""
    dump_prompts: Annotated[Path | None, common.FILE] = None
    """Write all prompts to this file instead of running the model."""
    hosted: OmitArgPrefixes[hosted.LimitOptions] = dataclasses.field(default_factory=hosted.LimitOptions)
    dry_run: common.DryRun = False

    def run(self) -> None:
        """Run the command."""
        from reverie_jax.eval.benchmarks import inputs

        self._check()
        names = common.require(
            common.joined(self.benchmark), "--benchmark", "name at least one; see `reverie benchmarks`"
        )
        jobs = [
            (benchmark, inputs.with_images(inputs.load(benchmark, self.data), self.images), out)
            for benchmark, out in output_folders(",".join(names), self.out)
        ]
        for benchmark, _, _ in jobs:
            if self.rule is not None and self.rule not in benchmark.rules:
                raise UserError(f"--rule {self.rule}: {benchmark.name} has {', '.join(benchmark.rules)}")
        if self.dump_prompts is not None:
            self._dump_prompts([data for _, data, _ in jobs], self.dump_prompts)
            return
        if self._served:
            self._run_served(jobs)
            return
        # Before the model is loaded: invalid options are reported at once.
        decodings = [self._decoding(benchmark) for benchmark, _, _ in jobs]
        engine, weights = self._engine()
        failed = list[str]()
        for (benchmark, data, out), decoding in zip(jobs, decodings, strict=True):
            predictions = self._predict(engine, benchmark, data, out, decoding, weights)
            if predictions is not None:
                try:
                    self._score(benchmark, data, predictions, out)
                except UserError as error:  # the answers exist; further benchmarks are run all the same
                    failed.append(f"{benchmark.name}: {error}")
        if failed:
            raise UserError("; ".join(failed))

    @property
    def _served(self) -> bool:
        """Whether the model is one that others serve."""
        from reverie_jax.hosted.providers import names

        name, colon, _ = self.model.partition(":")
        return bool(colon) and name in names() and not Path(self.model).exists()

    def _run_served(self, jobs: Sequence[tuple[Benchmark, BenchmarkData, Path]]) -> None:
        """Ask a served model, benchmark after benchmark; one journal and one budget in OUT for all of them."""
        from rich.console import Console

        from reverie_jax.eval.predict_hosted import HostedRun, prediction_settings
        from reverie_jax.hosted.interface import RequestSettings
        from reverie_jax.hosted.session import RequestConfig, Session
        from reverie_jax.progress import ProgressBars

        temperature = hosted.parse_temperature(self.temperature, 0.0)
        settings = RequestSettings(self.hosted.timeout, temperature=temperature)
        config = RequestConfig(prediction_settings(settings, self.max_new_tokens), self.hosted.limits())
        code = 0
        with ProgressBars() as bars, Session(self.out, config, os.environ, hosted.progress_callback(bars)) as session:
            common.note(session.notes)
            for benchmark, data, out in jobs:
                run = HostedRun(
                    session=session,
                    model=self.model,
                    benchmark=benchmark,
                    data=data,
                    out=out,
                    reflect=self.reflect,
                    limit=self.limit,
                )
                if self.dry_run:
                    Console().print(f"{benchmark.name}:", hosted.estimates_table(run.estimate()))
                    continue
                result = run.run()
                common.note(f"{benchmark.name}, {name}: {hosted.summary(o)}" for name, o in result.outcomes.items())
                code = max(code, hosted.exit_code(dict(result.outcomes)))
                if result.missing:
                    have = f"; {result.path} has the others" if result.path else ""
                    common.note([f"{benchmark.name}: {result.missing:,} questions have no answer, not scored{have}"])
                elif result.path is not None:
                    self._score(benchmark, data, result.path, out)
                if result.stopped:
                    break
            if not self.dry_run:
                common.note([hosted.totals(session)])
        raise SystemExit(code)

    @property
    def _sources(self) -> Any:
        """What a model and its processor are loaded from, beside the checkpoint."""
        template = common.check_template(self.template, self.protocol)
        return {"components": self.components, "adapter": self.adapter, "template": template}

    def _check(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if self._served:
            given = [common.flag(name) for name in _LOCAL if getattr(self, name) != defaults[name]]
            from reverie_jax.hosted.providers import redact_password

            what = f"{redact_password(self.model)} is served elsewhere, where it has its own template, weights and decoding"
        else:
            limits = dataclasses.fields(self.hosted)
            given = [common.flag(f.name) for f in limits if getattr(self.hosted, f.name) != f.default]
            given += ["--dry-run"] * self.dry_run + ["--temperature none"] * (
                self.temperature.strip().lower() == "none"
            )
            what = f"for a model that is served elsewhere (openai:MODEL@URL); {self.model} runs here"
        if given:
            raise UserError(f"{', '.join(given)}: {what}; leave {'them' if len(given) > 1 else 'it'} out")
        common.check_choice(common.CONTRASTS, contrast=self.contrast)
        common.check_choice(("auto", *common.DTYPES), dtype=self.dtype)
        common.check_template(self.template, self.protocol)
        common.check_at_least(
            1,
            batch_size=self.batch_size,
            max_questions=self.max_questions,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            limit=self.limit,
        )

    def _dump_prompts(self, inputs: list[BenchmarkData], path: Path) -> None:
        from reverie_jax.eval.predict import dump_prompts
        from reverie_jax.loading import load_processor

        processor = load_processor(self.model, **self._sources)
        questions = [question for data in inputs for question in data.available[: self.limit]]
        with common.writing(path):
            dump_prompts(processor.encoder, questions, path)
        print(f"{len(questions)} prompts: {path}")

    def _engine(self) -> tuple[Engine, dict[str, str]]:
        """Load the model; return the engine, and the checksums of the tuned weights."""
        from reverie_jax.eval.engine import Engine
        from reverie_jax.eval.schedule import EngineShape
        from reverie_jax.loading import load_model
        from reverie_jax.models import lora
        from reverie_jax.models.checkpoints import base_checksums, weights_checksum
        from reverie_jax.train.distributed import join

        join(self.distributed)
        placement: Any = {"mesh": common.parse_mesh(self.mesh), "dtype": common.parse_dtype(self.dtype)}
        model, processor = load_model(self.model, **self._sources, **placement)
        lora.merge(model)
        # The whole merged model: an adapter that was trained further is another model.
        weights = {**base_checksums(model), "all": weights_checksum(model)}
        model.decoder.unstack()
        shape = EngineShape(sequence_length=self.max_length, questions=self.max_questions, batch_size=self.batch_size)
        return Engine(model, processor, shape), weights

    def _decoding(self, benchmark: Benchmark) -> Decoding:
        from reverie_jax.eval.protocols import decoding_of

        chosen = {name: getattr(self, name) for name in _DECODING} | {"penalize_prompt": self.penalize_prompt or None}
        chosen["temperature"] = hosted.parse_temperature(self.temperature, None)
        defaults = {name: getattr(self, name) for name in ("seed", "contrast", "alpha", "beta", "noise_step")}
        decoding = decoding_of(self.protocol, {"max_new_tokens": benchmark.max_new_tokens, **defaults}, chosen)
        # The benchmark's own beams, unless sampling or contrast excludes beam search.
        if self.protocol or self.beams is not None or decoding.temperature or decoding.contrast:
            return decoding
        return dataclasses.replace(decoding, beams=benchmark.beams)

    def _predict(
        self,
        engine: Engine,
        benchmark: Benchmark,
        data: BenchmarkData,
        out: Path,
        decoding: Decoding,
        weights: dict[str, str],
    ) -> Path | None:
        """Write the answers; return their file if this process is to score it."""
        import jax

        from reverie_jax.eval import predict
        from reverie_jax.progress import ProgressBars, format_rate

        options = predict.PredictOptions(decoding, self.reflect, self.limit, self.protocol)
        questions = options.questions(data)
        images = len({question.image for question in questions if question.image}) / max(1, len(questions))
        first = jax.process_index() == 0
        with ProgressBars(benchmark.name, show=first) as bars:

            def on_progress(stage: str, done: int, total: int) -> None:
                speed = bars.speed(stage)
                rates = f"{format_rate(speed)} answers/s, {format_rate(speed * images)} images/s"
                rates = rates if speed else "compiling" * (done < total)
                bars.update(stage, done, total, rates)

            predictions = predict.predict(
                *(engine, benchmark, data, out, options),
                model=Path(self.adapter or self.model).name,
                checksums=weights,
                on_progress=on_progress,
            )
        return predictions if first else None

    def _score(self, benchmark: Benchmark, data: BenchmarkData, predictions: Path, out: Path) -> None:
        from rich.console import Console

        from reverie_jax.cli.score import score_table
        from reverie_jax.eval import score
        from reverie_jax.eval.benchmarks.answer_files import SCORES
        from reverie_jax.eval.benchmarks.interface import NotScorable

        everything = data.available
        questions = everything[: self.limit]
        partial = len(questions) < len(everything)
        if partial:
            data = dataclasses.replace(data, questions=questions)
        try:
            result = score.score(benchmark, data, predictions, self.rule)
        except NotScorable as error:
            print(f"{predictions}: not scored: {error}")
            return
        common.note(result.notes)
        if partial:
            part = f"the first {len(questions):,} of {len(everything):,} questions (--limit)"
            print(f"{predictions}: partial: {part}; no scores.json is written")
        else:
            with common.writing(out / SCORES):
                score.write_score(result, out / SCORES)
        Console().print(score_table(result))


def output_folders(names: str, out: Path) -> list[tuple[Benchmark, Path]]:
    """Return the benchmarks, each with the output folder of its answers.

    Raises:
        UserError: a name is unknown or listed more than once.
    """
    from reverie_jax.eval.benchmarks import find_benchmark

    benchmarks = [find_benchmark(name.strip()) for name in names.split(",")]
    if len({item.name for item in benchmarks}) != len(benchmarks):
        raise UserError(f"--benchmark {names}: a benchmark is listed more than once")
    outputs = [out] if len(benchmarks) == 1 else [out / item.name for item in benchmarks]
    return list(zip(benchmarks, outputs, strict=True))

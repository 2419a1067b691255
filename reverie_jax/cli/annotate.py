"""`reverie annotate`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from tyro.conf import OmitArgPrefixes, Positional

from reverie_jax.cli import common, hosted
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from reverie_jax.annotate.lrv import LrvJob
    from reverie_jax.annotate.pipeline import AnnotationJob, Step
    from reverie_jax.hosted.runner import Outcome
    from reverie_jax.hosted.session import RequestConfig

_WRITER = "name the model that writes, as gemini:MODEL or openai:MODEL"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotate:
    """Annotate images with a hosted model: questions, right and confusing answers, rationales; judge and export them.

    STEP run takes all steps (questions, rationales, judge, export); each is a STEP of its own. STEP lrv writes
    LRV-Instruction's positive and misleading instructions, from captions alone.

    Every reply is kept in OUT/journal.sqlite as it comes: run the same command again after any interruption, and nothing
    that was answered is requested (or paid for) again. A folder of REVERIE's own scripts is continued. Keys are read from
    GEMINI_API_KEY (or GOOGLE_API_KEY) and OPENAI_API_KEY; openai:MODEL@URL is another server (vLLM, SGLang, a proxy).
    """

    step: Annotated[Positional[str], common.option("STEP")]
    """run (all steps), one of the steps questions, rationales, judge, export; or lrv."""
    out: Annotated[Path, common.FOLDER]
    """Output folder: a file for each step, the journal and reverie.json."""
    images: Annotated[Path | None, common.FOLDER] = None
    """Folder of images."""
    list: Annotated[Path | None, common.FILE] = None
    """JSON list of image names; OUT/image_list.json, or else all images of the folder, if omitted."""
    writer: Annotated[str, common.option("MODEL")] = ""
    """Model that writes: gemini:MODEL, openai:MODEL, openai:MODEL@URL, scenes:FOLDER or replay:JOURNAL."""
    judge: common.Judges = ()
    """Model that judges; the writer if omitted. Repeat for each judge."""
    votes: Annotated[str, common.option("majority|any|all")] = "majority"
    """Drop a row if a majority of judges (or a tie), any, or all of them find a contradiction."""
    judge_sees_image: Annotated[bool, common.FLAG] = False
    """Show the image to the judges too."""
    questions: Annotated[int, common.N] = 3
    """Questions for each image."""
    confusing: Annotated[int, common.N] = 1
    """Confusing answers for each question."""
    prompts: Annotated[Path | None, common.FOLDER] = None
    """Folder with your own prompts: questions.txt, positive.txt, negative.txt, judge.txt; missing ones are the built-in."""
    max_image_size: Annotated[int | None, common.option("PIXELS")] = None
    """Longest side of an image: larger ones are scaled down before they are sent; none is if omitted."""
    hosted: OmitArgPrefixes[hosted.ProviderOptions] = dataclasses.field(default_factory=hosted.ProviderOptions)
    captions: Annotated[Path | None, common.FILE] = None
    """Captions, for lrv: Visual Genome's region_descriptions.json, or [{image_id, captions: [{caption, x, ...}]}]."""
    counts: Annotated[tuple[int, int, int, int], common.option("N N N N")] = (20, 6, 6, 0)
    """Instructions per image, for lrv: positive, and misleading about an object, an attribute, knowledge."""
    balance: Annotated[float | None, common.NUMBER] = None
    """Misleading instructions kept for each positive one, for lrv; all if omitted."""
    dry_run: common.DryRun = False

    def run(self) -> None:
        """Run the command; exits with 1 if some items got no usable reply."""
        from reverie_jax.annotate.pipeline import Step

        steps: tuple[Step, ...] = get_args(Step)
        if self.step not in (*steps, "run", "lrv"):
            raise UserError(f"{self.step}: must be run, {', '.join(steps)} or lrv")
        if self.step == "export":
            self._export()
        elif self.step == "lrv":
            raise SystemExit(self._lrv())
        else:
            raise SystemExit(self._reflective(steps if self.step == "run" else (self.step,)))  # type: ignore[arg-type]

    def _export(self) -> None:
        from reverie_jax.annotate.files import RELEASED
        from reverie_jax.annotate.pipeline import export

        if self.dry_run:
            raise UserError("--dry-run: export sends no requests; run it without")
        print(f"{export(self.out)} conversations: {self.out / RELEASED}")

    def _job(self) -> AnnotationJob:
        from reverie_jax.annotate.pipeline import AnnotationJob, Votes
        from reverie_jax.hosted.images import list_images

        common.check_choice(get_args(Votes), votes=self.votes)
        common.check_at_least(1, questions=self.questions, confusing=self.confusing, max_image_size=self.max_image_size)
        folder, names = common.require(self.images, "--images", "name the folder of images"), self.list
        if names is None and (self.out / "image_list.json").exists():
            names = self.out / "image_list.json"  # as REVERIE's scripts name it
        return AnnotationJob(
            folder=self.out,
            images_folder=folder,
            images=tuple(list_images(folder, names)),
            writer=common.require(self.writer, "--writer", _WRITER),
            judges=self.judge,
            questions=self.questions,
            confusing=self.confusing,
            votes=self.votes,  # type: ignore[arg-type]
            judge_sees_image=self.judge_sees_image,
            prompts=self.prompts,
            config=self._config(),
        )

    def _config(self) -> RequestConfig:
        config = self.hosted.config()
        settings = dataclasses.replace(config.settings, max_image_size=self.max_image_size)
        return dataclasses.replace(config, settings=settings)

    def _reflective(self, steps: tuple[Step, ...]) -> int:
        from rich.console import Console

        from reverie_jax.annotate.pipeline import Pipeline
        from reverie_jax.progress import ProgressBars

        outcomes: dict[str, Outcome] = {}
        with (
            ProgressBars() as bars,
            Pipeline(self._job(), os.environ, hosted.progress_callback(bars)) as pipeline,
        ):
            common.note(pipeline.session.notes)
            if self.dry_run:
                Console().print(hosted.estimates_table(pipeline.estimate(steps)))
                return 0
            for step in steps:
                if step == "export":
                    self._export()
                    continue
                outcomes[step] = outcome = getattr(pipeline, step)()
                common.note([f"{step}: {hosted.summary(outcome)}"])
                if outcome.stopped:
                    break
            common.note([hosted.totals(pipeline.session)])
        return hosted.exit_code(outcomes)

    def _lrv_job(self) -> LrvJob:
        from reverie_jax.annotate.lrv import LrvJob

        return LrvJob(
            folder=self.out,
            captions=common.require(self.captions, "--captions", "name the file of captions"),
            writer=common.require(self.writer, "--writer", _WRITER),
            counts=self.counts,
            balance=self.balance,
            prompts=self.prompts,
            config=self.hosted.config(),
        )

    def _lrv(self) -> int:
        from rich.console import Console

        from reverie_jax.annotate import lrv
        from reverie_jax.progress import ProgressBars

        with (
            ProgressBars() as bars,
            lrv.Generation(self._lrv_job(), os.environ, hosted.progress_callback(bars)) as generation,
        ):
            common.note(generation.session.notes)
            if self.dry_run:
                Console().print(hosted.estimates_table(generation.estimate()))
                return 0
            outcome = generation.generate()
            common.note([f"lrv: {hosted.summary(outcome)}", hosted.totals(generation.session)])
        print(self.out / lrv.INSTRUCTIONS)
        return hosted.exit_code({"lrv": outcome})

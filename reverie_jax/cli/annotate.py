"""`reverie annotate`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from reverie_jax.cli import common, hosted
from reverie_jax.errors import UserError

if TYPE_CHECKING:
    from reverie_jax.annotate.lrv import LrvJob
    from reverie_jax.annotate.pipeline import AnnotationJob, Step
    from reverie_jax.hosted.runner import Outcome

_WRITER = "name the model that writes, as gemini:MODEL or openai:MODEL"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotate:
    """Let a hosted model write questions about images, right and confusing answers, and rationales; judge them; export.

    Every reply is kept in OUT/journal.sqlite as it comes: run the same command again after any interruption, and nothing
    that was answered is requested (or paid for) again. A folder of REVERIE's own scripts is continued. Keys are read from
    GEMINI_API_KEY (or GOOGLE_API_KEY) and OPENAI_API_KEY.
    """

    step: Positional[str]
    """run: all steps; questions, rationales, judge, export: one of them. audit: an HTML page of judged rows. lrv:
    LRV-Instruction's positive and misleading instructions, from captions alone."""
    out: Path
    """Output folder: a file for each step, the journal and reverie.json."""
    images: Path | None = None
    """Folder of images."""
    list: Path | None = None
    """JSON list of image names; all images of the folder if omitted. OUT/image_list.json is used if it exists."""
    writer: str = ""
    """Model that writes: gemini:MODEL, openai:MODEL, google-generativeai:MODEL, scenes:FOLDER or replay:JOURNAL. For a
    server at another address (vLLM, SGLang, a proxy): openai:MODEL@http://host:8000/v1."""
    judge: UseAppendAction[tuple[str, ...]] = ()
    """Model that judges, in the same form; the writer if omitted. Repeat for each judge."""
    votes: str = "majority"
    """Drop a row if a majority of judges (or a tie), any, or all of them find a contradiction."""
    judge_sees_image: bool = False
    """Show the image to the judges too."""
    questions: int = 3
    """Questions for each image."""
    confusing: int = 1
    """Confusing answers for each question."""
    prompts: Path | None = None
    """Folder with your own prompts: questions.txt, positive.txt, negative.txt, judge.txt; missing ones are the built-in."""
    hosted: OmitArgPrefixes[hosted.ProviderOptions] = dataclasses.field(default_factory=hosted.ProviderOptions)
    captions: Path | None = None
    """For lrv: Visual Genome's region_descriptions.json, or [{image_id, captions: [{caption, x, y, width, height}]}]."""
    counts: tuple[int, int, int, int] = (20, 6, 6, 0)
    """For lrv, instructions for each image: positive, and misleading about nonexistent objects, wrong attributes, false
    knowledge."""
    balance: float | None = None
    """For lrv: misleading instructions kept for each positive one; all if omitted."""
    dry_run: bool = False
    """Print the number of requests and tokens and the cost; send nothing."""
    count: int = 50
    """For audit: rows on the page."""

    def run(self) -> None:
        """Run the command; exits with 1 if some items got no usable reply."""
        from reverie_jax.annotate.pipeline import Step

        steps: tuple[Step, ...] = get_args(Step)
        if self.step not in (*steps, "run", "audit", "lrv"):
            raise UserError(f"{self.step}: must be run, {', '.join(steps)}, audit or lrv")
        if self.step == "audit":
            self._audit()
        elif self.step == "export":
            self._export()
        elif self.step == "lrv":
            raise SystemExit(self._lrv())
        else:
            raise SystemExit(self._reflective(steps if self.step == "run" else (self.step,)))  # type: ignore[arg-type]

    def _audit(self) -> None:
        from reverie_jax.annotate import audit

        common.at_least(0, count=self.count)
        print(audit.write(self.out, common.required(self.images, "--images", "name the folder of images"), self.count))

    def _export(self) -> None:
        from reverie_jax.annotate.pipeline import RELEASED, export

        if self.dry_run:
            raise UserError("--dry-run: export sends no requests; run it without")
        print(f"{export(self.out)} conversations: {self.out / RELEASED}")

    def _job(self) -> AnnotationJob:
        from reverie_jax.annotate.pipeline import AnnotationJob, Votes
        from reverie_jax.hosted import images

        common.one_of(get_args(Votes), votes=self.votes)
        common.at_least(1, questions=self.questions, confusing=self.confusing)
        folder, names = common.required(self.images, "--images", "name the folder of images"), self.list
        if names is None and (self.out / "image_list.json").exists():
            names = self.out / "image_list.json"  # as REVERIE's scripts name it
        return AnnotationJob(
            folder=self.out,
            pictures=folder,
            images=tuple(images.listed(folder, names)),
            model=common.required(self.writer, "--writer", _WRITER),
            judges=self.judge,
            count=self.questions,
            confusing=self.confusing,
            votes=self.votes,  # type: ignore[arg-type]
            shown=self.judge_sees_image,
            prompts=self.prompts,
            settings=self.hosted.settings(),
            limits=self.hosted.limits(),
        )

    def _reflective(self, steps: tuple[Step, ...]) -> int:
        from rich.console import Console

        from reverie_jax.annotate.pipeline import Pipeline

        outcomes: dict[str, Outcome] = {}
        with (
            common.ProgressBars() as bars,
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
            captions=common.required(self.captions, "--captions", "name the file of captions"),
            model=common.required(self.writer, "--writer", _WRITER),
            counts=self.counts,
            balance=self.balance,
            prompts=self.prompts,
            settings=self.hosted.settings(),
            limits=self.hosted.limits(),
        )

    def _lrv(self) -> int:
        from rich.console import Console

        from reverie_jax.annotate import lrv

        with (
            common.ProgressBars() as bars,
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

"""The choice of settings, the comparisons and the page, from units whose counts are made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from reverie_jax.errors import UserError
from reverie_jax.eval.statistics import Estimate
from reverie_jax.scenes import benchmark
from reverie_jax.scenes.evidence import run, schedule
from reverie_jax.scenes.evidence.arms import ARMS
from reverie_jax.scenes.evidence.findings import Difference, Findings
from reverie_jax.scenes.evidence.units import DECODERS, TESTS, Evidence, Sizes, Unit

SIZES = Sizes(seeds=2, budgets=(4, 8), main=4, core_seeds=2, passes=(8, 16), test=4, held_out=4, validation=4)
# Right answers to POPE's and to each skill's four questions about a picture, and hallucinated ones of four mentions.
PLAIN_ARM = (2, (2, 2, 2, 2), 2)
COUNTED = {
    "answers": (3, (2, 2, 2, 2), 2),
    "reflective": (3, (3, 1, 3, 1), 3),  # on skills as good, with other pictures
    "reflective-joined": (2, (4, 4, 4, 4), 2),
    "lrv-1": (4, (1, 1, 1, 1), 2),
    "ddpo-5": (2, (2, 2, 2, 2), 1),
    "sentences": (2, (2, 2, 2, 2), 0),
}
RATES = {"answers": (3e-3, 16), "reflective": (1e-3, 16)}  # what the search finds best; for others the first setting


def make_counts(pope: int, skills: Sequence[int], hallucinated: int) -> np.ndarray:
    counts = np.zeros((4, benchmark.COLUMNS["rationale"].stop))
    for name, columns in benchmark.COLUMNS.items():
        for row, skill in zip(counts, skills, strict=True):
            if name.startswith("pope/"):
                row[columns] = (min(pope, 2), 2 - max(pope - 2, 0), max(pope - 2, 0), 2 - min(pope, 2))
            elif name.startswith("skill/"):
                row[columns] = (skill, 4, 2)
            elif name == "description":
                row[columns] = (4, hallucinated, 1, hallucinated > 0, 4, 2)
            else:
                row[columns] = 1
    return counts


def write_unit(evidence: Evidence, unit: Unit, counts: np.ndarray) -> None:
    folder = evidence.out / "units" / unit.name
    folder.mkdir(parents=True, exist_ok=True)
    for test in unit.tests:
        for decoder in unit.decoders:
            np.save(folder / f"{test}-{decoder}.npy", counts)
    stats = {"tokens": 40, "flat_tokens": 100, "edges": 12 if unit.arm == "answers" else 24}
    facts = {"records": 4, "stats": stats, "train_seconds": 2.0, "seconds": 3.6}
    (folder / "unit.json").write_text(json.dumps(facts))


def make_evidence(out: Path, arms: Sequence[str]) -> tuple[Evidence, dict[str, schedule.Choice]]:
    """A folder in which all units are done, and the choice of its search."""
    evidence = Evidence(out, SIZES, "no-model")
    (out / "units" / "base").mkdir(parents=True)
    for test in TESTS:
        for decoder in DECODERS:
            np.save(out / "units" / "base" / f"{test}-{decoder}.npy", make_counts(*PLAIN_ARM))
    for unit in schedule.rate_units(SIZES, arms):
        best = unit.learning_rate == RATES.get(unit.arm, ARMS[unit.arm].rates)[0]
        write_unit(evidence, unit, make_counts(3 if best else 2, (2, 2, 2, 2), 1 if best else 2))
    for unit in schedule.passes_units(evidence, arms):
        better = (unit.learning_rate, unit.passes) == RATES.get(unit.arm)
        write_unit(evidence, unit, make_counts(4 if better else 2, (2, 2, 2, 2), 0 if better else 2))
    choices = schedule.choose(evidence, arms)
    for unit in schedule.main_units(SIZES, choices):
        write_unit(evidence, unit, make_counts(*COUNTED.get(unit.arm, PLAIN_ARM)))
    return evidence, choices


def claims(text: str) -> dict[str, list[str]]:
    """The page's questions with what was found."""
    found: dict[str, list[str]] = {}
    for block in re.findall(r"^\*\*(.+\?)\*\*\n\n((?:- .*\n)+)", text, re.MULTILINE):
        found[block[0]] = [line.removeprefix("- ") for line in block[1].splitlines()]
    return found


ZERO = "+0.000 [+0.000, +0.000]: no difference found"
FOUND = {
    "Do answers alone help?": "answers against base: POPE accuracy +0.250 [+0.250, +0.250]: better.",
    "Do rationales help over answers alone?": (
        "reflective against answers: reasoning accuracy +0.000 [-0.250, +0.250]: no difference found (detectable: 0.3"
    ),
    "For which questions?": "reflective against answers: two steps +0.000 [-0.250, +0.250]: no difference found",
    "On pairs of things never seen together?": f"reflective against answers: POPE accuracy {ZERO}",
    "On unseen compositions?": f"reflective against answers: POPE accuracy {ZERO}",
    "With 8 pictures?": f"reflective against answers: POPE accuracy {ZERO}",
    "Do negative rationales add to positive ones?": "reflective against answers+positive: POPE accuracy +0.250 [+0.250",
    "Does a context of its own for each rationale help?": (
        "reflective against reflective-joined: reasoning accuracy -0.500 [-0.750, -0.250]: worse."
    ),
    "Does more weight on the answers help?": (
        "reflective-weighted against reflective: POPE accuracy -0.250 [-0.250, -0.250]: worse."
    ),
    "Do LRV's negative instructions matter?": "The best POPE accuracy of these ratios is that of lrv-1: 1.000 [1.000",
    "Do corrections help?": "ddpo-5 against base: CHAIRi -0.250 [-0.250, -0.250]: better.",
    "Does dense DPO beat DPO?": f"ddpo-5 against dpo: coverage {ZERO}",
    "Do sentences of the model's own help?": "sentences against dpo: objects F1 +0.167 [+0.167, +0.167]: better.",
    "Which way of decoding helps?": f"reflective, contrast-image against plain: POPE accuracy {ZERO}",
}


def test_the_page_says_of_every_claim_what_its_interval_allows(tmp_path, monkeypatch):
    evidence, choices = make_evidence(tmp_path, tuple(ARMS))
    run.write_page(evidence, choices, evidence.out, quick=True)
    text = (tmp_path / "evidence.md").read_text("utf-8")
    found = claims(text)
    assert found.keys() == FOUND.keys()
    for question, start in FOUND.items():
        assert any(line.startswith(start) for line in found[question]), (start, found[question])
    assert "| lrv-1 − base | **+0.500 [+0.500, +0.500]** |" in text
    assert "| answers | 4 | 0.003 | 16 | 10 | 25 | 3 | 2 |" in text  # pictures, rate, passes, tokens a picture, seconds
    assert "**Rationales did not help over answers alone here**: POPE accuracy +0.000" in text
    assert not re.search(r"&\w+;|&#|\bnan\b|None", text)
    assert ET.parse(tmp_path / "evidence.svg").getroot().tag.endswith("svg")
    # All is done: nothing is run again, and the page is the same.
    monkeypatch.setattr(Evidence, "load", None)
    again = Evidence(tmp_path, SIZES, "no-model")
    again.run_base()
    for unit in schedule.main_units(SIZES, schedule.choose(again, tuple(ARMS))):
        again.run(unit)
    run.write_page(again, choices, again.out, quick=True)
    assert (tmp_path / "evidence.md").read_text("utf-8") == text


def test_the_page_says_on_top_that_rationales_helped(tmp_path, monkeypatch):
    monkeypatch.setitem(COUNTED, "reflective", (4, (2, 2, 2, 2), 2))
    run.write_page(*make_evidence(tmp_path, ("answers", "reflective")), tmp_path, quick=False)
    text = (tmp_path / "evidence.md").read_text("utf-8")
    assert "**Rationales helped over answers alone here**: POPE accuracy +0.250" in text
    assert "would have to be different" not in text


def test_the_page_of_some_arms_claims_nothing_about_others(tmp_path):
    run.write_page(*make_evidence(tmp_path, ("lrv-0", "lrv-1", "sentences")), tmp_path, quick=False)
    text = (tmp_path / "evidence.md").read_text("utf-8")
    found = claims(text)
    assert "ationales" not in text.partition("## What was found")[0]
    assert list(found) == [
        "Do LRV's negative instructions matter?",
        "Do sentences of the model's own help?",
        "With 8 pictures?",
        "Which way of decoding helps?",
    ]
    assert not any("dpo" in line or "reflective against" in line for lines in found.values() for line in lines)
    assert all(line.startswith("sentences against base") for line in found["Do sentences of the model's own help?"])


def test_the_search_chooses_the_best_setting_and_the_best_of_the_fewest_passes(tmp_path):
    evidence, choices = make_evidence(tmp_path, ("answers", "reflective", "dpo"))
    chosen = {arm: (choice.best["learning_rate"], choice.best["passes"]) for arm, choice in choices.items()}
    assert chosen == {**RATES, "dpo": (ARMS["dpo"].rates[0], 8)}
    assert [choice.few["passes"] for choice in choices.values()] == [8, 8, 8]
    scores = [row["score"] for row in json.loads((tmp_path / "search.json").read_text())["scores"]]
    assert max(scores) == 0.75  # (4/4 + 2/4) / 2
    assert len(scores) == 4 + 4 + 5  # all rates with the fewest passes, the best one with more
    assert scores[-5:] == [0.6, 0.5, 0.5, 0.5, 0.5]  # of dpo: 2 * 0.75 * 0.5 / 1.25
    # As many taught tokens as the answers arm: 16 passes of 3 tokens are 8 of 6.
    assert schedule.equal_tokens(SIZES, choices, 1) == Unit("reflective", 4, 1e-3, 8, 1)
    assert schedule.equal_steps(SIZES, "answers", choices["answers"], 1).passes == 8
    assert schedule.main_unit(SIZES, "dpo", choices["dpo"], 0, 32).passes == 32
    units = {(unit.arm, unit.pictures, unit.seed) for unit in schedule.main_units(SIZES, choices)}
    assert units >= {("dpo", 8, 0), ("answers", 8, 1), ("dpo", 4, 1)}
    assert ("dpo", 8, 1) not in units  # few seeds
    assert Findings(evidence, choices).between("pope/accuracy", "answers", "dpo", pictures=8).seeds == 2


VERDICTS = {  # interval: verdict on a score, and on one that is better lower
    (0.01, 0.2): ("better", "worse"),
    (-0.2, -0.01): ("worse", "better"),
    (-0.01, 0.2): ("no difference found", "no difference found"),
    (0.0, 0.2): ("no difference found", "no difference found"),
    (-0.2, 0.0): ("no difference found", "no difference found"),
}


@pytest.mark.parametrize(("low", "high"), VERDICTS)
def test_a_verdict_says_no_more_than_the_interval(low, high):
    for metric, verdict in zip(("pope/accuracy", "chair_i"), VERDICTS[low, high], strict=True):
        difference = Difference("a", "b", metric, Estimate((low + high) / 2, low, high, 0.05), 8)
        assert f"[{low:+.3f}, {high:+.3f}]: {verdict}" in str(difference)
        assert ("detectable: 0.140" in str(difference)) == (verdict == "no difference found")


def test_a_folder_of_another_evidence_is_refused(tmp_path, monkeypatch):
    settings = run._settings(Evidence(tmp_path, SIZES))
    for _ in range(2):
        run._claim(tmp_path / "mine", settings)
    arm = dataclasses.replace(ARMS["dpo"], recipe=dataclasses.replace(ARMS["dpo"].recipe, rank=8))
    monkeypatch.setitem(ARMS, "dpo", arm)
    more_seeds = run._settings(Evidence(tmp_path, dataclasses.replace(SIZES, seeds=3)))
    for other, differs in ((settings | {"weights": "0"}, "weights"), (more_seeds, "seeds, recipe of dpo")):
        with pytest.raises(UserError, match=rf"mine.*\b{differs}\b"):
            run._claim(tmp_path / "mine", other)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    for foreign in (tmp_path / "thesis", tmp_path / "thesis" / "thesis.txt"):
        with pytest.raises(UserError, match=rf"{foreign}.*settings\.json"):
            run._claim(foreign, settings)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]

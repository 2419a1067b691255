"""Fixtures shared by the tests of hosted models."""

from __future__ import annotations

import pytest

from reverie_jax.eval.engine import Engine
from tests.annotate import helpers
from tests.eval.benchmarks import makers as make
from tests.hosted.fixtures import clock, keys, reverie, sdks, zygote

__all__ = ["clock", "keys", "reverie", "sdks", "zygote"]


@pytest.fixture
def images(tmp_path) -> dict[str, bytes]:
    return helpers.write_images(tmp_path / "images", 5)


@pytest.fixture
def annotate(reverie, tmp_path, images):
    """Return a function that runs `reverie annotate STEP` over five images; options are keywords."""
    prompts = helpers.write_prompts(tmp_path / "prompts")

    def run(step: str, writer: str | None = None, *more, **changes) -> tuple[int, str, str]:
        options = {"out": tmp_path / "out", "images": tmp_path / "images", "prompts": prompts, "questions": 1}
        words: list = ["annotate", step]
        for name, value in (options | {"writer": writer} | changes).items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
        return reverie(*words, *more)

    return run


@pytest.fixture
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a model is used."""
    monkeypatch.setattr(Engine, "__init__", lambda *args, **more: pytest.fail("a model was used"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of folders: POPE with nine questions, MME with four, MMHal with three."""
    root = tmp_path_factory.mktemp("data")

    def questions(*images):
        objects = enumerate(("cup", "dog", "car"))
        rows = [(f"Is there a {name} in the image?", "yes" if n % 2 else "no") for n, name in objects]
        return [(image, *row) for image in images for row in rows]

    make.pope(root / "pope", random=questions("a.png", "b.png"), popular=questions("a.png"))
    pair = [("Is it one? Please answer yes or no.", "Yes"), ("Is it two? Please answer yes or no.", "No")]
    make.mme(root / "mme", {"count": {"1.jpg": pair, "2.jpg": pair}})
    make.write_json(root / "mmhal" / "response_template.json", make.mmhal_rows()[:3])
    for number in range(3):
        make.write_image(root / "mmhal" / "images" / f"{number}_o.jpg", number)
    return root

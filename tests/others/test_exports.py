"""Exports answer in other releases of transformers as their source does here: `make test-others`."""

import dataclasses
import itertools
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from reverie_jax.convert import convert
from reverie_jax.data.conversation import IMAGE, Conversation, Turn
from reverie_jax.data.processor import ask
from reverie_jax.eval import decode
from reverie_jax.loading import load_model, load_processor
from reverie_jax.models.checkpoints import read_config
from reverie_jax.models.config import CLIP_MEAN, CLIP_STD
from tests.models import makers
from tests.others import sources

pytestmark = pytest.mark.others

ENVIRONMENTS = Path(__file__).parents[2] / ".venv-others"
RELEASES = ("4.37.2", "4.57.6", "newest")
TALK = ("What is it?", "A cat.", "USER?")
_FIRST = Turn("user", f"{IMAGE}\n{TALK[0]}")
CONVERSATIONS = [
    Conversation(turns, (0,)) for turns in ((_FIRST,), (_FIRST, Turn("assistant", TALK[1]), Turn("user", TALK[2])))
]
PICTURES = {"tall": (21, 40), "square": (40, 40)}


def run(release, room, jobs):
    """Run jobs of `other.py` in a release's environment."""
    files = room / f"{release}-jobs.json", room / f"{release}-results.json"
    files[0].write_text(json.dumps(jobs))
    python = ENVIRONMENTS / release / "bin/python"
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, Path(__file__).with_name("other.py"), *files],
        env=environment,
        capture_output=True,
        text=True,
        cwd=room,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(files[1].read_text())


@dataclasses.dataclass(frozen=True)
class Case:
    """A source, what it is made of, and the releases that know its language model."""

    path: Path
    options: dict[str, object]
    releases: tuple[str, ...] = RELEASES

    @property
    def pads(self):
        return load_processor(self.path, **self.options).image_aspect_ratio == "pad"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    for name, size in PICTURES.items():
        pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def cases(room):
    clip = makers.clip_folder(room / "clip", sources.part())
    hf = makers.hf_folder(room / "llava-hf", makers.hf(sources.part(), 384, sources.WORDS), ("<image>", "<pad>"))
    for file in hf.glob("*token*"):
        file.unlink()
    plain = sources.tokenizer_files(room / "tokenizer", legacy=False)
    run("4.57.6", room, {"save": {"do": "save", "folder": str(plain), "out": str(hf)}})
    adapter = room / "peft"
    makers.peft_folder(adapter, makers.hf(sources.part(), 384, sources.WORDS))
    tuned = sources.lora(room / "llava-lora", room / "llm", legacy=False)
    return {
        "llava-hf, saved by 4": Case(hf, {}),
        "llava-hf, saved by 5": Case(makers.hf_folder(room / "new", makers.hf(makers.parts(hidden=60))), {}),
        "llava-hf with a PEFT adapter": Case(hf, {"adapter": adapter}),
        "original": Case(sources.original(room / "original", legacy=False), {"components": [clip]}),
        "original, cropped": Case(
            sources.original(room / "cropped", aspect="square", legacy=False), {"components": [clip]}
        ),
        "original, legacy": Case(sources.original(room / "legacy"), {"components": [clip]}),
        "original LoRA folder": Case(tuned, {"components": [room / "llm", clip]}),
        # transformers has Phi-3 since 4.41.
        "Phi-3": Case(sources.original(room / "phi3", "phi3", legacy=False), {"components": [clip]}, RELEASES[1:]),
    }


@pytest.fixture(scope="module")
def results(room, cases):
    """What each release makes of each export, every release in one process."""
    jobs = {release: {} for release in RELEASES}
    for number, (name, case) in enumerate(cases.items()):
        export = str(convert(case.path, room / f"export {number}", **case.options))
        for release in case.releases:
            jobs[release][name] = {
                "do": "answer",
                "folder": export,
                "picture": picture(room, case, release),
                "talk": TALK,
            }
        if name in SLOW:
            folder = convert(case.path, room / f"original {number}", to="llava", **case.options)
            encoder = load_processor(folder).encoder
            texts = [encoder.render(conversation)[0] for conversation in CONVERSATIONS]
            jobs["4.37.2"][f"{name}, in original LLaVA"] = {"do": "original", "folder": str(folder), "texts": texts}
    return {release: run(release, room, jobs[release]) for release in RELEASES}


def picture(room, case, release):
    """Transformers before 4.49 does not pad."""
    return str(room / f"{'square' if release == '4.37.2' and case.pads else 'tall'}.png")


def prompts(encoder):
    """Return the tokens of both conversations, with one -1 for the picture."""
    tokens = [encoder(conversation) for conversation in CONVERSATIONS]
    return [
        [-1 if slot == 0 else int(id) for id, slot in zip(x.ids, x.image_slots, strict=True) if slot < 1]
        for x in tokens
    ]


def collapsed(ids, image):
    """Return tokens with one -1 for a picture, which is one token before 4.45, and then one a patch."""
    return [-1 if id == image else id for id, same in itertools.groupby(ids) for _ in ([0] if id == image else same)]


def until(stops, tokens):
    return list(itertools.takewhile(lambda id: id not in stops, tokens))


NAMES = (
    *("llava-hf, saved by 4", "llava-hf, saved by 5", "llava-hf with a PEFT adapter", "original", "original, cropped"),
    *("original, legacy", "original LoRA folder", "Phi-3"),
)
SLOW = ("llava-hf, saved by 4", "original", "original, legacy", "original LoRA folder", "Phi-3")
"""Those with a sentencepiece model, which original LLaVA needs."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("release", RELEASES)
def test_export_answers_as_its_source_does_here(name, release, room, cases, results):
    case = cases[name]
    if release not in case.releases:
        pytest.skip("transformers has Phi-3 since 4.41")
    model, processor = load_model(case.path, dtype="float32", **case.options)
    batch = processor([ask(picture(room, case, release), TALK[0])])
    out, _ = decode.generate(model, jax.tree.map(jnp.asarray, batch), decode.Decoding(12), processor.encoder.stop_ids)
    found, stops = results[release][name], processor.encoder.stop_ids
    image = read_config(room / f"export {NAMES.index(name)}").image_token_id
    assert [collapsed(ids, image) for ids in found["prompts"]] == prompts(processor.encoder)
    mean, std = np.reshape(CLIP_MEAN, (3, 1, 1)), np.reshape(CLIP_STD, (3, 1, 1))
    pixels = (np.moveaxis(batch.images[0, 0], -1, 0) / 255 - mean) / std
    np.testing.assert_allclose(found["pixels"], pixels, rtol=0, atol=1e-5)
    expected = until(stops, np.asarray(out)[0, 0].tolist())
    assert until(stops, found["tokens"]) == expected
    assert expected


@pytest.mark.parametrize("name", SLOW)
def test_slow_tokenizer_of_original_llava(name, room, results):
    """Its loader takes no other; with it, an export's words are what they are here."""
    encoder = load_processor(room / f"original {NAMES.index(name)}").encoder
    assert encoder.tokenization == "llava"
    assert results["4.37.2"][f"{name}, in original LLaVA"] == prompts(encoder)

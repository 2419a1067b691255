"""`reverie plan`."""

import dataclasses
import json

import pytest

from reverie_jax.train.plan.costs import FLOPS_FORMULA
from reverie_jax.train.plan.plan import StepPlan


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the command sets it


def test_json_of_a_plan(reverie):
    code, out, err = reverie("plan", "llava-1.5-7b-lora", "--topology", "h200:8", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert set(plan) == {field.name for field in dataclasses.fields(StepPlan)}
    assert (plan["fits"], plan["compiled"], plan["batch_size"]) == (True, False, 128)
    assert set(plan["bytes"]) == {"frozen", "trainable", "optimizer", "batch", "activations"}
    assert sum(plan["bytes"].values()) == plan["peak_bytes_per_chip"] < plan["hbm_bytes_per_chip"]


def test_table_and_exit_code_of_a_plan(reverie):
    settings = ["batch_size=1", "gradient_accumulation_steps=1"]
    code, out, _ = reverie("plan", "llava-1.5-13b-full", "--topology", "a100-40:1", "--set", *settings)
    assert code == 1
    for words in ("DOES NOT FIT", "optimizer state", "not compiled", "roofline", FLOPS_FORMULA[-30:]):
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("recipe", "words", "named"),
    [
        ("llava-9b", (), "llava-1.5-7b-lora"),
        ("llava-1.5-7b-lora", ("--topology", "tpu"), "v5e"),
        ("llava-1.5-7b-lora", ("--architecture", "gpt"), "llava-phi3-mini"),
        ("llava-1.5-7b-lora", ("--dtype", "int4"), "bfloat16"),
        ("llava-1.5-7b-lora", ("--mesh", "fsdp=4"), "topology of 8"),
        ("llava-1.5-7b-lora", ("--set", "batch_size=12", "gradient_accumulation_steps=1"), "micro-batches of 12"),
        ("llava-1.5-7b-lora", ("--set", "batch_size=abc"), "batch_size"),
        ("llava-1.5-7b-lora", ("--fit", "--mesh", "fsdp=8"), "--mesh"),
    ],
)
def test_mistakes_are_reported_in_one_line(reverie, recipe, words, named):
    code, out, err = reverie("plan", recipe, *(() if "--topology" in words else ("--topology", "h200:8")), *words)
    assert (code, out) == (2, "")
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    assert named in err

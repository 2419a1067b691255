"""Training with experts by the loop: made from a dense model, resumed, loaded into its base, and reported."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
import pytest

from reverie_jax.errors import UserError
from reverie_jax.models.config import Routing
from reverie_jax.train.checkpoint import load_run
from reverie_jax.train.loop import finetune
from reverie_jax.train.metrics import read_metrics
from reverie_jax.train.preemption import Preempted
from reverie_jax.train.recipes import RECIPES, override
from tests.train import tiny


def recipe(**changes):
    routing = Routing(capacity_factor=0.7, second_expert="gumbel", group=2)
    options = {"trainable": "mlp", "upcycle": "sparse", "experts": 3, "routing": routing, "steps": 4, "save_steps": 2}
    return tiny.recipe(**{**options, **changes})


def test_experts_are_made_trained_resumed_and_loaded(tmp_path):
    base = dict(tiny.flat(tiny.model()))
    model = tiny.model()
    finetune(model, tiny.processor(), tiny.records(), recipe(), tmp_path / "whole")
    trained = dict(tiny.flat(model))
    up = trained["decoder.expert_layers.up.kernel"][0]
    assert up.shape == (3, *base["decoder.layers.up.kernel"].shape[1:])
    assert len({expert.tobytes() for expert in up}) == 3  # each has learned something else
    np.testing.assert_array_equal(trained["decoder.layers.out.kernel"][0], base["decoder.layers.out.kernel"][1])
    rows = read_metrics(tmp_path / "whole")
    for row in rows:
        assert sum(row[f"router_load/{expert}"] for expert in range(3)) == pytest.approx(1, abs=1e-5)
        assert 0 < row["router_dropped"] < 0.5
        assert row["router_aux"] > 0.5
    # Stopped after step 3 and run again, it is the same to the bit: what a router draws depends on seed and step.
    with pytest.MonkeyPatch.context() as patch:
        tiny.after_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted):
            finetune(tiny.model(), tiny.processor(), tiny.records(), recipe(), tmp_path / "parts")
    again = tiny.model()
    finetune(again, tiny.processor(), tiny.records(), recipe(), tmp_path / "parts")
    for (name, a), (_, b) in zip(tiny.flat(model), tiny.flat(again), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    loaded = tiny.model()
    load_run(loaded, tmp_path / "whole")
    for (name, a), (_, b) in zip(tiny.flat(model), tiny.flat(loaded), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("frozen", [False, True])
def test_routers_learn_unless_they_are_frozen(frozen, tmp_path):
    model = tiny.model()
    finetune(model, tiny.processor(), tiny.records(), recipe(freeze_router=frozen, steps=2), tmp_path)
    router = dict(tiny.flat(model))["decoder.expert_layers.router.kernel"]
    assert (np.abs(router).max() <= 48**-0.5) == frozen or not frozen
    fresh = tiny.model()
    finetune(fresh, tiny.processor(), tiny.records(), recipe(freeze_router=True, steps=1), tmp_path / "fresh")
    same = np.array_equal(router, dict(tiny.flat(fresh))["decoder.expert_layers.router.kernel"])
    assert same == frozen


def test_adapters_of_experts_are_trained(tmp_path):
    model = tiny.model()
    lora = recipe(trainable="lora", target_modules=r"decoder\.(expert_)?layers\.(gate|up|down)", steps=2)
    finetune(model, tiny.processor(), tiny.records(), lora, tmp_path)
    adapters = {name for name, _ in tiny.flat(model) if "lora_b" in name}
    names = ("gate", "up", "down")
    assert adapters == {f"decoder.{stack}.{name}.lora_b" for stack in ("layers", "expert_layers") for name in names}
    assert all(np.abs(value).max() > 0 for name, value in tiny.flat(model) if "lora_b" in name)


def test_recipes_of_experts():
    stage3 = RECIPES["moe-llava-stablelm-stage3"]
    assert stage3.routing == Routing(1.5, aux_coefficient=0.01, second_expert="gumbel", mask_padding=True, group=8)
    assert override(stage3, ["routing.group=4", "freeze_router=true"]).routing.group == 4
    assert stage3.micro_batch_size == 8
    wrong = [
        "routing.group=7",
        "routing.group=-8",
        "routing.capacity_factor=0",
        "routing.aux_coefficient=-1",
        "experts=1",
    ]
    for setting in wrong:
        with pytest.raises(UserError, match=setting.partition("=")[0].rpartition(".")[2]):
            override(stage3, [setting])
    with pytest.raises(UserError, match="quantization"):
        override(stage3, ["quantization=nf4"])
    assert dataclasses.asdict(stage3)["upcycle"] == "sparse"

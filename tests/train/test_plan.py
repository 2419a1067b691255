"""`reverie plan`: exact bytes of arguments, FLOPs as XLA counts them, collectives of compiled programs, and the search."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.preferences import DPOConfig
from reverie_jax.errors import UserError
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel, VLMConfig, lora, vision
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.config import ResamplerConfig
from reverie_jax.models.sharding import batch_sharding, make_mesh, shard_state, shardings
from reverie_jax.train import recipes
from reverie_jax.train.plan import costs, hlo, search, topology
from reverie_jax.train.plan.plan import (
    AbstractStep,
    abstract_step,
    architecture_of,
    chip_bytes,
    make_plan,
    mesh_sizes,
)
from reverie_jax.train.plan.topology import CHIPS, Topology
from reverie_jax.train.step import TrainState, make_optimizer, make_step, make_trainable, trainable_filter
from tests.train import tiny

CONFIG = tiny.CONFIG
CPUS = Topology("v5e:2x2", "v5e", (2, 2))
FSDP = {"data": 1, "fsdp": 4, "tensor": 1}


def first_device_bytes(tree):
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "addressable_shards")]
    return sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards if part.device == first)


def real_step(recipe, mesh, planned, dtype):
    """Place a real model; return (graph, optimizer, state, frozen, batch) for a planned step."""
    model = VisionLanguageModel(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)
    make_trainable(model, recipe)
    if recipe.quantization is not None:
        lora.quantize(model, recipe.quantization)
    graph, params, frozen = nnx.split(model, trainable_filter(recipe), ...)
    params, frozen, optimizer = shard_state(params, mesh), shard_state(frozen, mesh), make_optimizer(recipe)
    with jax.set_mesh(mesh):
        moment_shardings = shardings(jax.eval_shape(optimizer.init, params), mesh)
        moments = jax.jit(optimizer.init, out_shardings=moment_shardings)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), planned.batch), batch_sharding(mesh))
    return graph, optimizer, TrainState(params, moments, step), frozen, batch


@pytest.mark.parametrize(
    ("trainable", "quantization", "sizes"),
    [
        ("lora", None, (2, 2, 1)),
        ("lora", "nf4", (1, 2, 2)),
        ("lora", "int8", (1, 1, 1)),
        ("projector", None, (1, 2, 2)),
        ("full", None, (1, 2, 2)),
        ("all", None, (1, 2, 2)),
    ],
)
def test_planned_bytes_are_those_of_a_placed_model(trainable, quantization, sizes):
    recipe, mesh = tiny.recipe(trainable=trainable, quantization=quantization), make_mesh(*sizes)
    planned = abstract_step(CONFIG, recipe, mesh, dtype=jnp.bfloat16)
    _, _, state, frozen, batch = real_step(recipe, mesh, planned, jnp.bfloat16)
    assert planned.bytes_by_kind() == {
        "frozen": first_device_bytes(frozen),
        "trainable": first_device_bytes(state.params),
        "optimizer": first_device_bytes((state.optimizer, state.step)),
        "batch": first_device_bytes(batch),
    }
    for mine, real in zip(jax.tree.leaves(planned.state.optimizer), jax.tree.leaves(state.optimizer), strict=True):
        assert mine.sharding.is_equivalent_to(real.sharding, real.ndim)


def test_planned_step_is_the_step_that_trains():
    """The abstract arguments lower to the program of the real ones."""
    recipe, mesh = tiny.recipe(), make_mesh(1, 2, 2)
    planned = abstract_step(CONFIG, recipe, mesh, dtype=jnp.float32)
    graph, optimizer, state, frozen, batch = real_step(recipe, mesh, planned, jnp.float32)
    with jax.set_mesh(mesh):
        step = make_step(graph, optimizer, recipe, shardings=jax.tree.map(lambda x: x.sharding, state))
        real = step.lower(state, frozen, batch, None)
    assert planned.lower().as_text() == real.as_text()


@pytest.mark.parametrize("constrained", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_chip_runs_the_tower_on_its_own_images(constrained, monkeypatch):
    """8 images of 10 tokens: without a constraint in the tower's loop, all of them go to every chip."""
    if not constrained:
        monkeypatch.setattr(vision, "constrain_rows", lambda x: x)
    step = abstract_step(CONFIG, tiny.recipe(), make_mesh(1, 4, 1), dtype=jnp.float32)
    program, _ = hlo.computations(step.lower().compile().as_text())
    sent = [one.shape for part in program.values() for one in part if one.operation in hlo.COLLECTIVES]
    assert any("[8,10," in shape for shape in sent) != constrained


def unrolled(body, carry, inputs, length=None):
    outputs = []
    for number in range(len(jax.tree.leaves(inputs)[0])):
        carry, output = body(carry, jax.tree.map(lambda leaf: leaf[number], inputs))  # noqa: B023
        outputs.append(output)
    return carry, None if outputs[0] is None else jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


# A tower with 4 queries, and towers with resamplers, of 16 queries; so large that their share is more than the tolerance.
SISTERS = {
    "muffin": {"queries": 24, "query_positions": 24, "layers": 6},
    "minigpt4": {"resampler": ResamplerConfig("qformer", 16, hidden=256, layers=4, heads=4, mlp=1024, norm_eps=1e-6)},
    "mplug-owl": {
        "resampler": ResamplerConfig("abstractor", 16, hidden=128, layers=4, heads=4, mlp=512, norm_eps=1e-6)
    },
}


@pytest.mark.parametrize(
    ("trainable", "system"),
    [
        *((trainable, "llava") for trainable in ("lora", "projector", "full")),
        ("all", "muffin"),
        ("all but image experts", "muffin"),
        ("projector", "minigpt4"),
        ("all", "minigpt4"),
        ("adapters", "mplug-owl"),
        ("all", "mplug-owl"),
    ],
)
def test_flops_are_those_that_xla_counts(trainable, system, monkeypatch):
    """Nothing is recomputed and no loop is left, for XLA counts a loop's body once."""
    config = VLMConfig(
        vision=VisionConfig(hidden=128, layers=3, heads=2, mlp=512, image_size=32, patch_size=8),
        text=TextConfig(vocab=1000, hidden=256, layers=2, heads=4, kv_heads=4, head_dim=64, mlp=768),
        image_token_id=3,
    )
    if system != "llava":
        tower = dataclasses.replace(config.vision, image_size=64, output_norm=True, **SISTERS[system])
        fields = {"vision": tower, "projector": "linear", "feature_layers": (-1,), "feature_select": "full"}
        config = dataclasses.replace(config, **fields)
    shape = SequenceShape(length=128, images=1, edges=96)
    trained = {"trainable": trainable.split()[0], "freeze_image_experts": "but" in trainable}
    recipe = tiny.recipe(batch_size=2, sequence=shape, **trained, rank=16, dropout=0.0, max_grad_norm=None)
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    monkeypatch.setattr(jax, "checkpoint", lambda body, **options: body)
    step = abstract_step(config, recipe, make_mesh(), dtype=jnp.float32)
    counted = step.lower().compile().cost_analysis()["flops"]
    formula = costs.step_flops(config, costs.Sizes.of(step.model), recipe, causal=False)
    assert formula == pytest.approx(counted, rel=0.1)


def test_flops_of_llava_are_the_published_arithmetic():
    """0.0283 TFLOP per token for decoder and head, +6.1 % of 4 N for causal attention at 2048."""
    config, recipe = ARCHITECTURES["llava-1.5-7b"], recipes.find_recipe("llava-1.5-7b-lora")
    model = abstract_step(config, recipe, topology.plan_mesh(CPUS, FSDP)).model
    sizes = costs.Sizes.of(model)
    assert sizes.layers == pytest.approx(6.476e9, rel=1e-3)
    assert sizes.adapters == pytest.approx(319.8e6, rel=1e-3)
    assert sizes.head == pytest.approx(0.131e9, rel=1e-2)
    no_images = dataclasses.replace(recipe, sequence=dataclasses.replace(recipe.sequence, images=0))
    per_token = costs.step_flops(config, sizes, no_images) / (recipe.batch_size * recipe.sequence.length)
    assert per_token == pytest.approx(0.0283e12 + 0.061 * 4 * sizes.layers, rel=5e-3)
    image = costs.step_flops(config, sizes, recipe) - costs.step_flops(config, sizes, no_images)
    projector = 576 * (4 * 1024 * 4096 + 6 * 4096**2)
    assert image / recipe.batch_size - projector == pytest.approx((0.348 + 0.033) * 1e12 * 23 / 24, rel=0.02)


def test_collectives_of_a_compiled_loop():
    mesh = Mesh(np.asarray(jax.devices()), ("x",))

    def body(carry, weight):
        whole = jax.lax.all_gather(weight, "x", tiled=True)  # 8 x 16 floats from 2 x 16
        part = jax.lax.psum_scatter(whole, "x", tiled=True)  # the sum's share of 8 x 16
        moved = jax.lax.ppermute(part, "x", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return carry + jax.lax.psum(moved, "x"), None  # 2 x 16

    def run(weights):
        return jax.lax.scan(body, jnp.zeros((2, 16)), weights)[0]

    split = PartitionSpec(None, "x")
    shard = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
    weights = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32, sharding=NamedSharding(mesh, split))
    result = hlo.traffic(jax.jit(shard).lower(weights).compile().as_text(), 4)
    shard, whole = 5 * 2 * 16 * 4, 5 * 8 * 16 * 4  # of five rounds
    expected = {
        "all-gather": (5, shard, 3 * shard),
        "all-reduce": (5, shard, 2 * shard * 3 // 4),
        "collective-permute": (5, shard, shard),
        "reduce-scatter": (5, whole, whole * 3 // 4),
    }
    assert {
        name: (result.counts[name], result.operands[name], result.received[name]) for name in result.counts
    } == expected
    assert result.unknown_loops == 0


TPU_TEXT = """
HloModule step, num_partitions=8

%cond (p: (s32[], bf16[4])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[4]{0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(8)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused_a (q: bf16[4,128]) -> bf16[32,128] {
  %q = bf16[4,128]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,128]{1,0:S(1)} all-gather(%q), channel_id=7, replica_groups=mesh['b'=8] {'b'}, x={chain_id="3"}
}

%fused_b (q.2: bf16[4,128]) -> bf16[32,128] {
  %q.2 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[32,128]{1,0:S(1)} all-gather(%q.2), channel_id=7, replica_groups=mesh['b'=8] {'b'}, x={chain_id="3"}
}

%body (p.2: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %p.2 = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %two)
  %w = bf16[4,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=1
  %f.1 = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%fused_a
  %f.2 = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%fused_b
  %s = (bf16[4,128]{1,0}, bf16[4,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
  %d = bf16[4,128]{1,0} collective-permute-done(%s)
  ROOT %t = (s32[], /*index=1*/bf16[4,128]{1,0:T(8,128)(2,1)}) tuple(%next, %d)
}

ENTRY %main (a: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %a = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %while = (s32[], bf16[4,128]{1,0:T(8,128)(2,1)}) while(%a), condition=%cond, body=%body
}
"""


def test_collectives_of_a_tpu_program():
    """No annotated trip count but a step of 2; one gather spread over two fusions; groups named by mesh axes."""
    result = hlo.traffic(TPU_TEXT, 8)
    assert result.counts == {"all-gather": 4, "collective-permute": 4}
    assert result.operands == {"all-gather": 4 * 1024, "collective-permute": 4 * 1024}
    assert result.received == {"all-gather": 4 * 7 * 1024, "collective-permute": 4 * 1024}
    assert result.unknown_loops == 0


GROUPS = {
    "replica_groups={{0,1},{2,3}}, dimensions={0}": 2,
    "replica_groups=[2,4]<=[8], dimensions={0}": 4,
    "replica_groups=[4,2]<=[2,4]T(1,0)": 2,
    "replica_groups=mesh['a'=2,'b'=4] {'b'}": 4,
    "replica_groups={}": 8,
}


SIZES = {
    "f32[]": 4,
    "bf16[2,8]{1,0:T(8,128)(2,1)S(1)}": 32,
    "(s32[], pred[3], token[])": 7,
    "u8[16,336,336,3]": 5419008,
}


def test_chips_of_a_collective_and_bytes_of_a_shape():
    assert {text: hlo._group(text, 8) for text in GROUPS} == GROUPS
    assert {text: hlo.shape_bytes(text) for text in SIZES} == SIZES


def plan_of(recipe, devices=None, **options):
    given = {"architecture": "tiny", "dtype": jnp.float32, "devices": devices or jax.devices(), **options}
    return make_plan(CONFIG, recipe, CPUS, FSDP, **given)


def test_compiled_plan(monkeypatch):
    plan = plan_of(tiny.recipe())
    assert (plan.compiled, plan.fits, plan.note) == (True, True, "")
    assert plan.peak_bytes_per_chip == sum(plan.bytes.values())
    assert plan.bytes["activations"] > plan.bytes["trainable"]
    assert plan.collective_bytes_per_step > 0
    assert plan.roofline_seconds_per_step == max(plan.roofline.values()) > 0
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], hbm=10**5))
    assert not plan_of(tiny.recipe()).fits


@pytest.mark.parametrize("preference", [DPOConfig(), DPOConfig(reference="stored")], ids=["adapters-off", "stored"])
def test_preference_step_lowers_with_its_reference(preference):
    recipe = tiny.recipe(preference=preference, sequence=SequenceShape(160, 2, 80, questions=4), offload=True)
    step = abstract_step(CONFIG, recipe, make_mesh(1, 2, 2), dtype=jnp.float32)
    assert step.lower() is not None
    assert step.bytes_by_kind()["optimizer"] == 0
    assert step.bytes_by_kind()["batch"] > chip_bytes(step.batch)


class RefusedStep:
    """A lowered step that the compiler refuses."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm.\nUsed 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.",
        "the total memory required for HLO temporaries (21.50G) exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_the_compiler_finds_too_large(message, monkeypatch):
    monkeypatch.setattr(AbstractStep, "lower", lambda self: RefusedStep(f"RESOURCE_EXHAUSTED: {message}"))
    plan = plan_of(tiny.recipe())
    assert (plan.fits, plan.compiled, plan.peak_bytes_per_chip) == (False, True, int(21.5 * 2**30))
    assert "21.50G" in plan.note
    assert "15.75G" in plan.note


def test_a_step_that_does_not_compile(monkeypatch):
    monkeypatch.setattr(AbstractStep, "lower", lambda self: RefusedStep("INTERNAL: Mosaic failed\nand more"))
    with pytest.raises(UserError, match=r"INTERNAL: Mosaic failed$"):
        plan_of(tiny.recipe())


@functools.cache
def estimated(batch_size, tensor):
    recipe, mesh = tiny.recipe(batch_size=batch_size), {"data": 1, "fsdp": 4 // tensor, "tensor": tensor}
    return make_plan(CONFIG, recipe, CPUS, mesh, architecture="tiny", compiled=False)


def searched(monkeypatch, slowdown=1.0, growth=1.0):
    """Search where compiled plans take `slowdown` times as long if tensor is 4, and `growth` times the memory."""

    def plan(config, recipe, topology, mesh, *, compiled=True, **options):
        plan, is_fast = estimated(recipe.batch_size, mesh["tensor"]), mesh["tensor"] == 4
        seconds = recipe.batch_size * (1.0 if is_fast else 2.0) * (slowdown if compiled and is_fast else 1.0)
        peak = int(plan.peak_bytes_per_chip * (growth if compiled else 1.0))
        return dataclasses.replace(plan, roofline_seconds_per_step=seconds, compiled=compiled, peak_bytes_per_chip=peak)

    monkeypatch.setattr(search, "make_plan", plan)
    tried = []
    options = {"architecture": "tiny", "max_batch_size": 4, "on_plan": tried.append, "devices": jax.devices()}
    return search.search_plan(CONFIG, tiny.recipe(), CPUS, **options), tried


def test_search_compiles_until_nothing_else_can_be_faster(monkeypatch):
    best, tried = searched(monkeypatch)
    assert [dataclasses.replace(plan, largest_batch_size=4) for plan in tried] == [best]
    assert best.mesh["tensor"] == 4
    best, tried = searched(monkeypatch, slowdown=3.0)
    assert tried[0].mesh["tensor"] == 4
    assert best.mesh["tensor"] < 4
    assert len(tried) <= search.MAX_COMPILED


def test_search_names_the_largest_batch_that_fits(monkeypatch):
    best, _ = searched(monkeypatch)
    peaks = {size: estimated(size, 4).peak_bytes_per_chip for size in (1, 2, 4)}
    assert peaks[1] < peaks[2] < peaks[4]
    assert (best.batch_size, best.largest_batch_size) == (1, 4)
    hbm = int((peaks[2] + peaks[4]) / 2 / search.MEMORY_SHARE)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], hbm=hbm))
    estimated.cache_clear()  # `fits` and the figures of a chip are part of an estimate
    assert searched(monkeypatch)[0].largest_batch_size == 2
    estimated.cache_clear()


def test_search_without_a_plan_that_fits(monkeypatch):
    with pytest.raises(UserError, match="95%"):
        searched(monkeypatch, growth=1e9)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], hbm=1000))
    with pytest.raises(UserError, match="95%"):
        searched(monkeypatch)


def test_search_on_gpus_is_by_formula():
    tried, sizes = [], {1: (4, 8), 2: (2, 4, 8), 4: (1, 2, 4, 8)}
    options = {"architecture": "tiny", "max_batch_size": 8, "on_plan": tried.append}
    best = search.search_plan(CONFIG, tiny.recipe(), Topology.parse("h100:4"), **options)
    assert not best.compiled
    by_tensor = {tensor: tuple(sorted(p.batch_size for p in tried if p.mesh["tensor"] == tensor)) for tensor in sizes}
    assert by_tensor == sizes
    fastest = min(map(search.seconds_per_sequence, tried))
    assert search.seconds_per_sequence(best) == pytest.approx(fastest, rel=0.01)
    with pytest.raises(UserError, match="5 chips"):
        search.search_plan(CONFIG, tiny.recipe(), Topology.parse("h100:5"), architecture="tiny", max_batch_size=4)


def test_arguments_shrink_with_chips():
    config, recipe = ARCHITECTURES["llava-1.5-7b"], recipes.find_recipe("llava-1.5-7b-lora")
    sizes = {}
    for chips in (1, 8):
        mesh = topology.plan_mesh(CPUS, {"data": 1, "fsdp": chips, "tensor": 1})
        sizes[chips] = abstract_step(config, recipe, mesh).bytes_by_kind()
    assert sizes[1]["optimizer"] == 2 * sizes[1]["trainable"] + sizes[1]["optimizer"] % 64
    for kind in ("frozen", "trainable", "optimizer", "batch"):
        assert sizes[8][kind] == pytest.approx(sizes[1][kind] / 8, rel=0.01), kind
    assert chip_bytes(()) == 0


def test_meshes():
    assert mesh_sizes(None, 8) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert mesh_sizes("tensor=2,fsdp=4", 8) == {"data": 1, "fsdp": 4, "tensor": 2}
    for wrong in ("fsdp=4", "fsdp=16", "fsdp=8,fsdp=1", "x=8", "fsdp", "fsdp=0"):
        with pytest.raises(UserError, match=r"--mesh"):
            mesh_sizes(wrong, 8)


# Chips, whether they are TPUs, and links of each.
TOPOLOGIES = {
    "v5e:2x4": (8, True, 3),
    "v6e:4x4": (16, True, 4),
    "v5p:4x4x4": (64, True, 6),
    "v5p:1x1x1": (1, True, 1),
    "h200:8": (8, False, 1),
}


def test_topologies():
    parsed = map(Topology.parse, TOPOLOGIES)
    assert {one.name: (one.chips, one.is_tpu, one.interconnect / one.chip.link) for one in parsed} == TOPOLOGIES


@pytest.mark.parametrize("name", ["v9:2x4", "v5e", "v5e:8", "v5p:2x4", "h100:2x4", "h100:0", "h100:", "v5e:2x4x", ""])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(UserError, match="--topology"):
        Topology.parse(name)


ARCHITECTURE_OF = {
    "llava-1.5-13b-full": "llava-1.5-13b",
    "reverie-phi3-lora": "llava-phi3-mini",
    "llava-1.0-pretrain": "llava-1.0-7b",
    "llava-1.5-pretrain": "llava-1.5-7b",
    "scenes-rationales": "llava-1.5-7b",
    "lrv-minigpt4": "minigpt4-7b",
    "lrv-mplug-owl": "mplug-owl-7b",
    "rlhfv-muffin-script": "muffin-13b",
    "lrv-sft": "llava-1.5-7b",
}
CHIP_OF = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "TPU v9": None,
    "cpu": None,
}


def test_names_of_recipes_and_devices():
    assert {name: architecture_of(name) for name in ARCHITECTURE_OF} == ARCHITECTURE_OF
    assert {kind: topology.chip_of(kind) for kind in CHIP_OF} == {
        kind: CHIPS.get(chip) for kind, chip in CHIP_OF.items()
    }


def test_missing_tpu_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tpu"):
        topology.compile_devices(Topology.parse("v5e:2x4"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra tpu)")
def test_a_tiny_step_compiles_for_a_tpu():
    """In a process of its own: libtpu stays loaded."""
    code = (
        "from tests.train import tiny, test_plan as t; from reverie_jax.train.plan import plan; "
        "p = plan.make_plan(t.CONFIG, tiny.recipe(), t.Topology.parse('v5e:2x2'), t.FSDP, architecture='tiny'); "
        "print(p.compiled, p.fits)"
    )
    root = Path(__file__).parents[2]
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS",)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=root)
    assert result.stdout.split()[-2:] == ["True", "True"], result.stderr

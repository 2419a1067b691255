import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from reverie_jax import cli
from reverie_jax.data.packing import SequenceShape
from reverie_jax.errors import UserError
from reverie_jax.models import TextConfig, VisionConfig, VisionLanguageModel, VLMConfig, lora, vision
from reverie_jax.models.config import ARCHITECTURES
from reverie_jax.models.sharding import batch_sharding, make_mesh, place, shardings
from reverie_jax.train import loop, recipes
from reverie_jax.train.plan import costs, hlo, search, topology
from reverie_jax.train.plan.plan import AbstractStep, abstract_step, chip_bytes, make_plan, mesh_sizes, model_name
from reverie_jax.train.plan.topology import CHIPS, Topology
from reverie_jax.train.step import TrainState, adapt, make_optimizer, make_step, trainable_filter
from tests.train import tiny

CONFIG = tiny.CONFIG
CPUS = Topology("v5e:2x2", "v5e", (2, 2))
KEYS = {
    "fits",
    "peak_bytes_per_chip",
    "bytes",
    "flops_per_step",
    "collective_bytes_per_step",
    "roofline_seconds_per_step",
}
KEYS |= {"compile_seconds", "recipe", "model", "topology", "mesh", "rows", "hbm_bytes_per_chip", "compiled"}


@pytest.fixture
def reverie(monkeypatch, capsys):
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["reverie", *map(str, words)])
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def on_chip(tree):
    """Bytes that real arrays take on the first device."""
    first = jax.devices()[0]
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "addressable_shards")]
    return sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards if part.device == first)


@pytest.mark.parametrize(
    ("tune", "quantization"), [("lora", None), ("projector", None), ("full", None), ("lora", "int8"), ("lora", "nf4")]
)
@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 2, 2), (1, 1, 1)])
def test_planned_bytes_are_those_of_a_placed_model(tune, quantization, sizes):
    recipe, mesh = tiny.recipe(batch_size=4, trainable=tune, quantization=quantization), make_mesh(*sizes)
    planned = abstract_step(CONFIG, recipe, mesh, dtype=jnp.bfloat16)

    model = VisionLanguageModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    adapt(model, recipe)
    if quantization is not None:
        lora.quantize(model, quantization)
    _, params, frozen = nnx.split(model, trainable_filter(tune), ...)
    params, frozen, optimizer = place(params, mesh), place(frozen, mesh), make_optimizer(recipe)
    with jax.set_mesh(mesh):
        moments = jax.jit(optimizer.init, out_shardings=shardings(jax.eval_shape(optimizer.init, params), mesh))(params)
    batch = jax.device_put(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), planned.batch), batch_sharding(mesh))
    found = planned.bytes_by_kind()
    assert found["base"] == on_chip(frozen)
    assert found["trainable"] == on_chip(params)
    assert found["optimizer"] == on_chip(moments) + 4  # and the step's number
    assert found["batch"] == on_chip(batch)
    for mine, real in zip(jax.tree.leaves(planned.state.optimizer), jax.tree.leaves(moments), strict=True):
        assert mine.sharding.is_equivalent_to(real.sharding, real.ndim)


def test_planned_step_is_the_step_that_trains():
    """The abstract arguments lower to the program of the real ones."""
    recipe, mesh = tiny.recipe(batch_size=4, dropout=0.1), make_mesh(1, 2, 2)
    planned = abstract_step(CONFIG, recipe, mesh, dtype=jnp.float32)
    model = VisionLanguageModel(CONFIG, rngs=nnx.Rngs(0))
    adapt(model, recipe)
    graph, params, frozen = nnx.split(model, trainable_filter("lora"), ...)
    params, frozen, optimizer = place(params, mesh), place(frozen, mesh), make_optimizer(recipe)
    with jax.set_mesh(mesh):
        homes = shardings(jax.eval_shape(optimizer.init, params), mesh)
        moments = jax.jit(optimizer.init, out_shardings=homes)(params)
        state = TrainState(
            params, moments, jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
        )
        batch = jax.device_put(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), planned.batch), batch_sharding(mesh))
        step = make_step(graph, optimizer, recipe, shardings=jax.tree.map(lambda x: x.sharding, state))
        real = step.lower(state, frozen, batch, None)
    assert planned.lower().as_text() == real.as_text()


@pytest.mark.parametrize("constrained", [True, False])
def test_every_chip_runs_its_own_pictures_alone(constrained, monkeypatch):
    """8 pictures of 10 tokens: unless it is said in the tower's loop, all of them go to every chip."""
    if not constrained:
        monkeypatch.setattr(vision, "constrain_rows", lambda x: x)
    step = abstract_step(CONFIG, tiny.recipe(batch_size=4), make_mesh(1, 4, 1), dtype=jnp.float32)
    found, _ = hlo.computations(step.lower().compile().as_text())
    sent = [one.shape for part in found.values() for one in part if one.operation in hlo.COLLECTIVES]
    assert any("[8,10," in shape for shape in sent) != constrained


def test_a_run_lays_its_state_as_planned(tmp_path, monkeypatch):
    """Before the first step and after it: moments once lay whole on every device."""
    recipe, mesh, seen = tiny.recipe(batch_size=4, steps=2), make_mesh(1, 2, 2), []

    def spied(*args, **options):
        step = make_step(*args, **options)

        def run(state, frozen, batch, held):
            seen.append([(leaf.sharding, leaf.ndim) for leaf in jax.tree.leaves(state)])
            return step(state, frozen, batch, held)

        return run

    monkeypatch.setattr(loop, "make_step", spied)
    loop.train(tiny.model(), tiny.processor(), tiny.records(), recipe, tmp_path, mesh=mesh)
    planned = jax.tree.leaves(abstract_step(tiny.CONFIG, recipe, mesh, dtype=jnp.float32).state)
    assert len(seen) == 2
    for state in seen:
        for mine, (real, rank) in zip(planned, state, strict=True):
            assert mine.sharding.is_equivalent_to(real, rank)


def unrolled(body, carry, inputs, length=None):
    outputs = []
    for number in range(len(jax.tree.leaves(inputs)[0])):
        carry, output = body(carry, jax.tree.map(lambda leaf: leaf[number], inputs))  # noqa: B023
        outputs.append(output)
    return carry, None if outputs[0] is None else jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


@pytest.mark.parametrize("tune", ["lora", "projector", "full"])
def test_flops_are_those_that_xla_counts(tune, monkeypatch):
    """Nothing is recomputed and no loop is left, for XLA counts a loop's body once."""
    config = VLMConfig(
        vision=VisionConfig(hidden=128, layers=3, heads=2, mlp=512, image_size=32, patch_size=8),
        text=TextConfig(vocab=1000, hidden=256, layers=2, heads=4, kv_heads=4, head_dim=64, mlp=768),
        image_token_id=3,
    )
    shape = SequenceShape(length=128, images=1, edges=96)
    recipe = tiny.recipe(batch_size=2, sequence=shape, trainable=tune, rank=16, dropout=0.0, max_grad_norm=None)
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    monkeypatch.setattr(jax, "checkpoint", lambda body, **options: body)
    step = abstract_step(config, recipe, make_mesh(), dtype=jnp.float32)
    counted = step.lower().compile().cost_analysis()["flops"]
    formula = costs.step_flops(config, costs.Sizes.of(step.model), recipe, causal=False)
    assert formula == pytest.approx(counted, rel=0.1)


def test_flops_of_llava_are_the_published_arithmetic():
    """0.0283 TFLOP a token for the decoder and its head, +6.1 % of 4N for causal attention at 2048."""
    config, recipe = ARCHITECTURES["llava-1.5-7b"], recipes.recipe("llava-1.5-7b-lora")
    model = abstract_step(config, recipe, topology.plan_mesh(CPUS, {"data": 1, "fsdp": 4, "tensor": 1})).model
    sizes = costs.Sizes.of(model)
    assert sizes.layers == pytest.approx(6.476e9, rel=1e-3)
    assert sizes.adapters == pytest.approx(319.8e6, rel=1e-3)
    assert sizes.head == pytest.approx(0.131e9, rel=1e-2)
    blind = dataclasses.replace(recipe, sequence=dataclasses.replace(recipe.sequence, images=0))
    per_token = costs.step_flops(config, sizes, blind) / (recipe.batch_size * recipe.sequence.length)
    assert per_token == pytest.approx(0.0283e12 + 0.061 * 4 * sizes.layers, rel=5e-3)
    image = costs.step_flops(config, sizes, recipe) - costs.step_flops(config, sizes, blind)
    projector = 576 * (4 * 1024 * 4096 + 6 * 4096**2)
    assert image / recipe.batch_size - projector == pytest.approx((0.348 + 0.033) * 1e12 * 23 / 24, rel=0.02)


PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from reverie_jax.train.plan.hlo import traffic
mesh = Mesh(np.asarray(jax.devices()), ("x",))
def body(carry, weight):
    whole = jax.lax.all_gather(weight, "x", tiled=True)       # 8 x 16 floats from 2 x 16
    part = jax.lax.psum_scatter(whole, "x", tiled=True)       # the sum's share of 8 x 16
    moved = jax.lax.ppermute(part, "x", [(0, 1), (1, 2), (2, 3), (3, 0)])
    return carry + jax.lax.psum(moved, "x"), None             # 2 x 16
def run(weights):
    return jax.lax.scan(body, jnp.zeros((2, 16)), weights)[0]
shard = jax.shard_map(run, mesh=mesh, in_specs=P(None, "x"), out_specs=P(), check_vma=False)
weights = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
found = traffic(jax.jit(shard).lower(weights).compile().as_text(), 4)
print(found.operands, found.received, found.counts, found.unknown_loops, sep="\\n")
"""


def test_collectives_of_a_compiled_loop():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    operands, received, counts, unknown = map(eval, done.stdout.splitlines())
    shard, whole = 2 * 16 * 4, 8 * 16 * 4
    assert counts == dict.fromkeys(counts, 5)
    assert operands["all-gather"] == 5 * shard
    assert received["all-gather"] == 5 * 3 * shard
    assert operands["reduce-scatter"] == 5 * whole
    assert received["reduce-scatter"] == 5 * whole * 3 // 4
    assert operands["all-reduce"] == 5 * shard
    assert received["all-reduce"] == 5 * 2 * shard * 3 // 4
    assert operands["collective-permute"] == received["collective-permute"] == 5 * shard
    assert unknown == 0


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
    found = hlo.traffic(TPU_TEXT, 8)
    assert found.counts == {"all-gather": 4, "collective-permute": 4}
    assert found.operands == {"all-gather": 4 * 1024, "collective-permute": 4 * 1024}
    assert found.received == {"all-gather": 4 * 7 * 1024, "collective-permute": 4 * 1024}
    assert found.unknown_loops == 0


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", 2),
        ("replica_groups=[2,4]<=[8], dimensions={0}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_chips_of_a_collective(attributes, group):
    assert hlo._group(attributes, 8) == group


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,8]{1,0:T(8,128)(2,1)S(1)}", 32),
        ("(s32[], pred[3], token[])", 7),
        ("u8[16,336,336,3]", 5419008),
    ],
)
def test_bytes_of_a_shape(text, size):
    assert hlo.shape_bytes(text) == size


def test_a_plan_compiled_for_devices_that_are_here():
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    plan = make_plan(
        CONFIG, tiny.recipe(batch_size=4), CPUS, mesh, model="tiny", dtype=jnp.float32, devices=jax.devices()
    )
    assert plan.compiled
    assert plan.fits
    assert plan.note == ""
    assert plan.peak_bytes_per_chip == sum(plan.bytes.values())
    assert plan.bytes["activations"] > plan.bytes["trainable"]
    assert plan.collective_bytes_per_step > 0
    assert plan.roofline_seconds_per_step == max(plan.roofline.values()) > 0


def test_a_plan_that_does_not_fit(monkeypatch):
    chip = dataclasses.replace(CHIPS["v5e"], hbm=10**5)
    monkeypatch.setitem(CHIPS, "v5e", chip)
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    plan = make_plan(
        CONFIG, tiny.recipe(batch_size=4), CPUS, mesh, model="tiny", dtype=jnp.float32, devices=jax.devices()
    )
    assert plan.compiled
    assert not plan.fits


class Refused:
    """A lowered step that its compiler refuses."""

    def __init__(self, said):
        self.said = said

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.said)


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm.\nUsed 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.",
        "the total memory required for HLO temporaries (21.50G) exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_its_compiler_finds_too_large(said, monkeypatch):
    monkeypatch.setattr(AbstractStep, "lower", lambda self: Refused(f"RESOURCE_EXHAUSTED: {said}"))
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    plan = make_plan(CONFIG, tiny.recipe(batch_size=4), CPUS, mesh, model="tiny", devices=jax.devices())
    assert (plan.fits, plan.compiled, plan.peak_bytes_per_chip) == (False, True, int(21.5 * 2**30))
    assert "21.50G" in plan.note
    assert "15.75G" in plan.note


def test_a_step_that_does_not_compile(monkeypatch):
    monkeypatch.setattr(AbstractStep, "lower", lambda self: Refused("INTERNAL: Mosaic failed\nand more"))
    with pytest.raises(UserError, match="does not compile: INTERNAL: Mosaic failed"):
        make_plan(CONFIG, tiny.recipe(), CPUS, {"data": 1, "fsdp": 1, "tensor": 1}, model="t", devices=jax.devices())


def test_search_takes_the_fastest_that_fits():
    tried = []
    here = {"dtype": jnp.float32, "devices": jax.devices()}
    found = search.fit(CONFIG, tiny.recipe(), CPUS, model="tiny", most_rows=8, tried=tried.append, **here)
    assert found.fits
    assert found.compiled
    assert found in tried
    fastest = min(search.seconds_per_row(plan) for plan in tried if plan.fits)
    assert search.seconds_per_row(found) == pytest.approx(fastest, rel=0.01)
    assert {math.prod(plan.mesh.values()) for plan in tried} == {4}


def test_search_goes_on_where_the_compiler_keeps_less_than_the_formula_promised(monkeypatch):
    """Tensor parallelism looks best by the formula, and compiled takes three times as long."""
    honest = make_plan

    def told(config, recipe, topology, mesh, *, compiled=True, **options):
        plan = honest(config, recipe, topology, mesh, compiled=False, **{**options, "devices": None})
        fast = 1.0 if mesh["tensor"] == 4 else 2.0
        seconds = recipe.batch_size * (3.0 if compiled and mesh["tensor"] == 4 else fast)
        return dataclasses.replace(plan, roofline_seconds_per_step=seconds, compiled=compiled)

    monkeypatch.setattr(search, "make_plan", told)
    tried = []
    found = search.fit(CONFIG, tiny.recipe(), CPUS, model="t", most_rows=2, tried=tried.append, devices=jax.devices())
    assert tried[0].mesh["tensor"] == 4
    assert found.mesh["tensor"] < 4
    assert len(tried) <= search.MOST_COMPILED


def test_search_on_gpus_is_by_formula():
    tried = []
    gpus = Topology.parse("h100:4")
    found = search.fit(CONFIG, tiny.recipe(), gpus, model="tiny", most_rows=16, tried=tried.append)
    assert not found.compiled
    assert {(plan.rows, plan.mesh["tensor"]) for plan in tried} == {
        *((rows, 1) for rows in (4, 8, 16)),
        *((rows, 2) for rows in (2, 4, 8, 16)),
        *((rows, 4) for rows in (1, 2, 4, 8, 16)),
    }
    assert search.seconds_per_row(found) == pytest.approx(min(map(search.seconds_per_row, tried)), rel=0.01)


def test_search_without_success(monkeypatch):
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(CHIPS["h100"], hbm=1000))
    with pytest.raises(UserError, match="nothing that was tried fits"):
        search.fit(CONFIG, tiny.recipe(), Topology.parse("h100:4"), model="tiny", most_rows=4)


def test_arguments_are_exact_and_shrink_with_chips():
    config, recipe = ARCHITECTURES["llava-1.5-7b"], recipes.recipe("llava-1.5-7b-lora")
    found = {}
    for chips in (1, 8):
        mesh = topology.plan_mesh(CPUS, {"data": 1, "fsdp": chips, "tensor": 1})
        found[chips] = abstract_step(config, recipe, mesh).bytes_by_kind()
    assert found[1]["optimizer"] == 2 * found[1]["trainable"] + found[1]["optimizer"] % 64
    for kind in ("base", "trainable", "optimizer", "batch"):
        assert found[8][kind] == pytest.approx(found[1][kind] / 8, rel=0.01), kind
    assert chip_bytes(()) == 0


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        ("llava-1.5-13b-full", "llava-1.5-13b"),
        ("reverie-phi3-lora", "llava-phi3-mini"),
        ("llava-1.0-pretrain", "llava-1.0-7b"),
        ("llava-1.5-pretrain", "llava-1.5-7b"),
        ("scenes-rationales", "llava-1.5-7b"),
    ],
)
def test_architecture_of_a_recipe(recipe, model):
    assert model_name(recipe) == model


def test_meshes():
    assert mesh_sizes(None, 8) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert mesh_sizes("tensor=2,fsdp=4", 8) == {"data": 1, "fsdp": 4, "tensor": 2}
    for wrong in ("fsdp=4", "fsdp=16", "fsdp=8,fsdp=1", "x=8", "fsdp", "fsdp=0"):
        with pytest.raises(UserError, match=r"--mesh"):
            mesh_sizes(wrong, 8)


@pytest.mark.parametrize(
    ("name", "chips", "links"), [("v5e:2x4", 8, 3), ("v6e:4x4", 16, 4), ("v5p:4x4x4", 64, 6), ("v5p:1x1x1", 1, 1)]
)
def test_tpu_topologies(name, chips, links):
    found = Topology.parse(name)
    assert found.chips == chips
    assert found.is_tpu
    assert found.interconnect == links * found.chip.link


def test_gpu_topologies():
    found = Topology.parse("h200:8")
    assert (found.chips, found.is_tpu, found.interconnect) == (8, False, CHIPS["h200"].link)


@pytest.mark.parametrize("name", ["v9:2x4", "v5e", "v5e:8", "v5p:2x4", "h100:2x4", "h100:0", "h100:", "v5e:2x4x", ""])
def test_no_topologies(name):
    with pytest.raises(UserError, match="--topology"):
        Topology.parse(name)


def test_json(reverie):
    code, out, err = reverie("plan", "llava-1.5-7b-lora", "--topology", "h200:8", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) >= KEYS
    assert (found["fits"], found["compiled"], found["rows"]) == (True, False, 128)
    assert set(found["bytes"]) == {"base", "trainable", "optimizer", "batch", "activations"}
    assert sum(found["bytes"].values()) == found["peak_bytes_per_chip"] < found["hbm_bytes_per_chip"]


def test_table_and_exit_code(reverie):
    code, out, _ = reverie(
        "plan",
        "llava-1.5-13b-full",
        "--topology",
        "a100-40:1",
        "--set",
        "batch_size=1",
        "gradient_accumulation_steps=1",
    )
    assert code == 1
    for words in ("DOES NOT FIT", "optimizer state", "not compiled", "roofline", "6 N where tuned in full"):
        assert words in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llava-9b", "--topology", "h200:8"], "llava-1.5-7b-lora"),
        (["llava-1.5-7b-lora", "--topology", "tpu"], "v5e"),
        (["llava-1.5-7b-lora", "--topology", "h200:8", "--model", "gpt"], "llava-phi3-mini"),
        (["llava-1.5-7b-lora", "--topology", "h200:8", "--dtype", "int4"], "bfloat16"),
        (["llava-1.5-7b-lora", "--topology", "h200:8", "--mesh", "fsdp=4"], "topology of 8"),
        (
            ["llava-1.5-7b-lora", "--topology", "h200:8", "--set", "batch_size=12", "gradient_accumulation_steps=1"],
            "12 rows",
        ),
        (["llava-1.5-7b-lora", "--topology", "h200:8", "--set", "batch_size=abc"], "rows"),
        (["llava-1.5-7b-lora", "--topology", "h200:8", "--fit", "--mesh", "fsdp=8"], "--mesh"),
    ],
)
def test_mistakes_are_one_line(reverie, words, said):
    code, out, err = reverie("plan", *words)
    assert (code, out) == (2, "")
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    assert said in err


def test_missing_compiler_names_the_extra(reverie, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = reverie("plan", "llava-1.5-7b-lora", "--topology", "v5e:2x4")
    assert (code, out) == (2, "")
    assert "reverie-jax[tpu]" in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra tpu)")
def test_a_tiny_step_compiles_for_a_tpu():
    """In a process of its own: libtpu stays loaded."""
    code = (
        "from tests.train import tiny, test_plan as t; from reverie_jax.train import plan; "
        "p = plan.make_plan(t.CONFIG, tiny.recipe(rows=4), t.Topology.parse('v5e:2x2'), "
        "{'data': 1, 'fsdp': 4, 'tensor': 1}, model='tiny'); print(p.compiled, p.fits)"
    )
    root = Path(__file__).parents[2]
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS",)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=root)
    assert done.stdout.split()[-2:] == ["True", "True"], done.stderr

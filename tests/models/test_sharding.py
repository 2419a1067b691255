import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from reverie_jax.models import sharding
from reverie_jax.models.lora import attach
from reverie_jax.models.sharding import (
    MESH_AXES,
    RULES,
    batch_sharding,
    make_mesh,
    parse_mesh_axes,
    partition_spec,
    shard_state,
    shardings,
)
from tests.models import oracle
from tests.models.oracle import image_inputs, random_model

MESHES = [(2, 2, 1), (1, 2, 2), (1, 1, 1)]
ids = {"ids": lambda sizes: "x".join(map(str, sizes))}


@pytest.fixture(autouse=True)
def no_earlier_warnings(monkeypatch):
    monkeypatch.setattr(sharding, "_warned", set())


@pytest.fixture(scope="module")
def adapted():
    model = random_model()
    attach(model, rank=3, alpha=5.0)
    random = np.random.default_rng(0)
    for path, leaf in by_path(params(model)).items():
        if path.endswith("lora_b"):
            leaf.set_value(jnp.asarray(0.05 * random.standard_normal(leaf.shape), jnp.float32))
    return model


def params(model):
    return nnx.state(model, nnx.Param)


def by_path(state):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def specs(model, mesh):
    return {path: leaf.get_value() for path, leaf in by_path(shardings(params(model), mesh)).items()}


def test_mesh_axes_always_exist():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(1, 2, 2).shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert make_mesh(2, 2, 1).axis_names == MESH_AXES
    assert [device.id for device in make_mesh(2, 1, 1).devices.flat] == [device.id for device in jax.devices()[:2]]


REFUSED = [("make", sizes, "4 are") for sizes in ((5, 1, 1), (1, 1, 8))]
REFUSED += [("parse", text, "data=1") for text in ("fsdp", "fsdp=0", "fsdp=x", "pipe=2", "data=1,data=2", "")]


@pytest.mark.parametrize(("what", "value", "message"), REFUSED, ids=str)
def test_meshes_that_cannot_be_made(what, value, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*value) if what == "make" else parse_mesh_axes(value)


def test_parsed_mesh():
    assert parse_mesh_axes("fsdp=2, data=4") == {"fsdp": 2, "data": 4}
    with pytest.raises(ValueError, match="1 are"):
        make_mesh(2, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((8, 12), ("embed", "heads"), PartitionSpec("fsdp", "tensor")),
        ((8, 12), ("mlp", "embed"), PartitionSpec("tensor", "fsdp")),
        ((3, 8, 12), ("layers", "embed", "mlp"), PartitionSpec(None, "fsdp", "tensor")),
        ((8,), (None,), PartitionSpec(None)),
        ((4, 7), ("batch", None), PartitionSpec(("data", "fsdp"), None)),
        ((2, 8, 3), ("layers", "lora_long", None), PartitionSpec(None, ("fsdp", "tensor"), None)),
        ((), (), PartitionSpec()),
    ],
)
def test_partition_spec(shape, axes, spec):
    assert partition_spec(shape, axes, make_mesh(1, 2, 2)) == spec


INVALID_AXES = [
    *((("embed", "embed"), ("heads", "mlp"), ("batch", "embed"), ("lora_long", "embed"), ("vocab", "lora_long"))),
    ("embed", None, "layers", "embed"),  # not adjacent
]
INVALID = [((8,) * len(axes), axes, "two dimensions") for axes in INVALID_AXES]
INVALID += [((7, 8), ("embed", "embed"), "two dimensions")]  # although one is not divisible
INVALID += [((8,), ("depth",), r"'depth'.*embed"), ((8, 8), ("embed",), "rank")]


@pytest.mark.parametrize(("shape", "axes", "name"), INVALID)
@pytest.mark.parametrize("mesh", [(1, 2, 2), (1, 1, 1)], **ids)
def test_invalid_axes(shape, axes, name, mesh):
    with pytest.raises(ValueError, match=name):
        partition_spec(shape, axes, make_mesh(*mesh))


def test_each_indivisible_dimension_is_replicated_with_one_warning(caplog, adapted):
    mesh = make_mesh(1, 2, 2)
    with caplog.at_level(logging.WARNING, logger=sharding.__name__):
        shardings(params(adapted), make_mesh())  # one device divides everything
        assert partition_spec((8, 99), ("embed", "vocab"), mesh) == PartitionSpec("fsdp", None)
        assert partition_spec((99, 8), ("vocab", "embed"), mesh) == PartitionSpec(None, "fsdp")
        partition_spec((99, 7), ("vocab", "embed"), mesh)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert all(word in caplog.records[0].getMessage() for word in ("99", "vocab", "2", "replicated"))
    assert "7" in caplog.records[1].getMessage()


@pytest.mark.parametrize("mesh", MESHES, **ids)
def test_placed_parameters_have_their_specs_and_values(adapted, mesh):
    state, mesh = params(adapted), make_mesh(*mesh)
    placed, wanted = by_path(shard_state(state, mesh)), specs(adapted, mesh)
    assert placed.keys() == wanted.keys() == by_path(state).keys()
    for path, leaf in by_path(state).items():
        assert isinstance(wanted[path], NamedSharding), path
        assert len(wanted[path].spec) == len(leaf.shape) == len(leaf.axes), path
        assert set(leaf.axes) <= {None, *RULES}, path
        wanted[path].shard_shape(leaf.shape)  # raises where a dimension does not divide
        assert placed[path].get_value().sharding == wanted[path], path
        assert placed[path].axes == leaf.axes, path
        np.testing.assert_array_equal(placed[path].get_value(), leaf.get_value(), err_msg=path)


def test_large_matrices_and_both_lora_factors_are_sharded_over_both_axes(adapted):
    found, long, factors = specs(adapted, make_mesh(1, 2, 2)), ("fsdp", "tensor"), 0
    for path, leaf in by_path(params(adapted)).items():
        layer, _, kind = path.removeprefix("decoder.layers.").partition(".")
        if path.startswith("decoder.layers.") and kind == "kernel":
            shards = ("tensor", "fsdp") if layer in ("out", "down") else long
            assert found[path].spec == PartitionSpec(None, *shards), path
        elif kind.startswith("lora_"):
            factors += 1
            sides = (long, None) if kind == "lora_a" else (None, long)
            assert found[path].spec == PartitionSpec(None, *sides), path
            assert np.prod(found[path].shard_shape(leaf.shape)) * 4 == np.prod(leaf.shape), path
    assert factors == 14


@pytest.mark.parametrize("mesh", [(1, 2, 2), (2, 2, 1)], **ids)
def test_forward_on_a_mesh_equals_one_device(adapted, mesh):
    inputs, mesh = image_inputs(images=(1, 1, 1, 1)), make_mesh(*mesh)
    expected = oracle.logits(adapted, inputs)
    graph, state = nnx.split(adapted)

    def forward(state, inputs):
        model = nnx.merge(graph, state)
        return model.decoder.logits(model.hidden(inputs))

    placed = jax.device_put(jax.tree.map(jnp.asarray, inputs), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        out = jax.block_until_ready(jax.jit(forward)(shard_state(state, mesh), placed))
    assert len(out.sharding.device_set) == mesh.size
    np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=1e-5)


def test_rows_stay_spread_over_the_mesh():
    x, mesh = jnp.ones((4, 3, 2), jnp.float32), make_mesh(2, 2, 1)
    assert sharding.constrain_rows(x) is x  # without a mesh
    with jax.set_mesh(mesh):
        out = jax.jit(sharding.constrain_rows)(x)
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 3, 2)}
    assert batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)  # over data and fsdp
    assert batch_sharding(make_mesh(1, 2, 2)).shard_shape((8, 5)) == (4, 5)

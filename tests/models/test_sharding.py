import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from reverie_jax.models import ModelInputs, VisionLanguageModel, sharding
from reverie_jax.models.checkpoints import read_model
from reverie_jax.models.lora import attach
from reverie_jax.models.sharding import MESH_AXES, RULES, batch_sharding, make_mesh, partition_spec, shard_state, shardings
from tests.models import oracle
from tests.models.oracle import GROUPED, llava, picture_rows, random_model, saved

MESHES = [(2, 2, 1), (1, 2, 2), (1, 1, 1)]
ids = {"ids": lambda sizes: "x".join(map(str, sizes))}


@pytest.fixture(autouse=True)
def warnings_anew(monkeypatch):
    monkeypatch.setattr(sharding, "_warned", set())


@pytest.fixture
def adapted():
    model = random_model()
    attach(model, rank=3, alpha=5.0)
    return model


def params(model):
    return nnx.state(model, nnx.Param)


def by_path(state):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def test_mesh_axes_are_always_there():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(1, 2, 2).shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert make_mesh(2, 2, 1).axis_names == MESH_AXES
    assert [device.id for device in make_mesh(2, 1, 1).devices.flat] == [device.id for device in jax.devices()[:2]]


@pytest.mark.parametrize("sizes", [(5, 1, 1), (2, 2, 2), (1, 1, 8)], **ids)
def test_too_many_devices(sizes):
    with pytest.raises(ValueError, match="4 are here"):
        make_mesh(*sizes)


def test_too_few_devices_given():
    with pytest.raises(ValueError, match="1 are here"):
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


@pytest.mark.parametrize(
    "axes",
    [
        ("embed", "embed"),
        ("heads", "mlp"),
        ("lora_long", "embed"),
        ("vocab", "lora_long"),
        ("batch", "embed"),
        ("embed", "heads", "embed"),  # not side by side
        ("embed", None, "layers", "embed"),
    ],
)
@pytest.mark.parametrize("mesh", MESHES, **ids)
def test_two_dimensions_on_one_mesh_axis(axes, mesh):
    with pytest.raises(ValueError, match="two dimensions"):
        partition_spec((8,) * len(axes), axes, make_mesh(*mesh))


def test_two_dimensions_on_one_mesh_axis_although_one_does_not_divide():
    with pytest.raises(ValueError, match="two dimensions"):
        partition_spec((7, 8), ("embed", "embed"), make_mesh(1, 2, 2))


def test_unknown_axis():
    with pytest.raises(ValueError, match=r"'depth'.*embed"):
        partition_spec((8,), ("depth",), make_mesh())


def test_rank_differs():
    with pytest.raises(ValueError, match="rank"):
        partition_spec((8, 8), ("embed",), make_mesh())


def test_rules_of_the_caller():
    spec = partition_spec((8, 8), ("x", "y"), make_mesh(1, 2, 2), rules={"x": ("data", "fsdp"), "y": None})
    assert spec == PartitionSpec(("data", "fsdp"), None)


def test_odd_dimension_replicates_with_one_warning(caplog):
    mesh = make_mesh(1, 2, 2)
    with caplog.at_level(logging.WARNING, logger=sharding.__name__):
        assert partition_spec((8, 99), ("embed", "vocab"), mesh) == PartitionSpec("fsdp", None)
        assert partition_spec((99, 8), ("vocab", "embed"), mesh) == PartitionSpec(None, "fsdp")
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert record.levelno == logging.WARNING
    assert all(word in record.getMessage() for word in ("99", "vocab", "2", "replicated"))


def test_each_odd_dimension_has_its_warning(caplog):
    with caplog.at_level(logging.WARNING, logger=sharding.__name__):
        partition_spec((99, 7), ("vocab", "embed"), make_mesh(1, 2, 2))
    assert len(caplog.records) == 2


def test_one_device_never_warns(caplog, adapted):
    with caplog.at_level(logging.WARNING, logger=sharding.__name__):
        shardings(params(adapted), make_mesh())
    assert not caplog.records


@pytest.mark.parametrize("mesh", MESHES, **ids)
def test_every_parameter_gets_a_spec(adapted, mesh):
    state, mesh = params(adapted), make_mesh(*mesh)
    homes = by_path(shardings(state, mesh))
    assert homes.keys() == by_path(state).keys()
    for path, leaf in by_path(state).items():
        home = homes[path].get_value()
        assert isinstance(home, NamedSharding), path
        assert len(home.spec) == len(leaf.shape) == len(leaf.axes), path
        assert set(leaf.axes) <= {None, *RULES}, path
        home.shard_shape(leaf.shape)  # raises where a dimension does not divide


def test_abstract_models_have_the_same_specs(adapted):
    def make():
        model = VisionLanguageModel(GROUPED.ours, rngs=nnx.Rngs(0))
        attach(model, rank=3, alpha=5.0)
        return model

    mesh = make_mesh(1, 2, 2)
    abstract, real = (by_path(shardings(params(model), mesh)) for model in (nnx.eval_shape(make), adapted))
    assert {path: leaf.get_value() for path, leaf in abstract.items()} == {
        path: leaf.get_value() for path, leaf in real.items()
    }


def test_large_matrices_are_sharded_over_both_axes(adapted):
    homes = by_path(shardings(params(adapted), make_mesh(1, 2, 2)))
    for name in ("query", "key", "value", "gate", "up"):
        assert homes[f"decoder.layers.{name}.kernel"].get_value().spec == PartitionSpec(None, "fsdp", "tensor")
    for name in ("out", "down"):
        assert homes[f"decoder.layers.{name}.kernel"].get_value().spec == PartitionSpec(None, "tensor", "fsdp")


def test_both_lora_factors_are_sharded_on_the_long_side(adapted):
    state, mesh = params(adapted), make_mesh(1, 2, 2)
    homes, placed = by_path(shardings(state, mesh)), by_path(shard_state(state, mesh))
    pairs = 0
    for path, leaf in placed.items():
        if not isinstance(leaf, nnx.LoRAParam):
            continue
        long = 1 if path.endswith("lora_a") else 2
        assert homes[path].get_value().spec[long] == ("fsdp", "tensor"), path
        assert [axis for i, axis in enumerate(homes[path].get_value().spec) if i != long] == [None, None]
        pieces = {shard.data.shape for shard in leaf.get_value().addressable_shards}
        assert pieces == {tuple(n // 4 if i == long else n for i, n in enumerate(leaf.shape))}, path
        pairs += 1
    assert pairs == 14


@pytest.mark.parametrize("mesh", MESHES, **ids)
def test_placing_keeps_values(adapted, mesh):
    state, mesh = params(adapted), make_mesh(*mesh)
    placed, homes = by_path(shard_state(state, mesh)), by_path(shardings(state, mesh))
    for path, leaf in by_path(state).items():
        assert placed[path].get_value().sharding == homes[path].get_value(), path
        assert placed[path].axes == leaf.axes, path
        np.testing.assert_array_equal(placed[path].get_value(), leaf.get_value(), err_msg=path)


@pytest.mark.parametrize("mesh", MESHES, **ids)
def test_reading_onto_a_mesh(mesh, tmp_path):
    folder, mesh = saved(llava(), tmp_path), make_mesh(*mesh)
    alone, spread = by_path(params(read_model(folder))), by_path(params(read_model(folder, mesh=mesh)))
    homes = by_path(shardings(params(read_model(folder)), mesh))
    for path, leaf in alone.items():
        assert spread[path].get_value().sharding == homes[path].get_value(), path
        np.testing.assert_array_equal(spread[path].get_value(), leaf.get_value(), err_msg=path)


@pytest.mark.parametrize("mesh", [(1, 2, 2), (2, 2, 1)], **ids)
def test_forward_on_a_mesh_equals_one_device(adapted, mesh):
    random = np.random.default_rng(0)
    for path, leaf in by_path(params(adapted)).items():
        if path.endswith("lora_b"):
            leaf.set_value(jnp.asarray(0.05 * random.standard_normal(leaf.shape), jnp.float32))
    batch, mesh = picture_rows(rows=4, images=1), make_mesh(*mesh)
    expected = oracle.logits(adapted, batch)
    graph, state = nnx.split(adapted)
    spread = shard_state(state, mesh)
    rows = jax.device_put(tuple(map(jnp.asarray, batch)), batch_sharding(mesh))

    def forward(state, batch):
        model = nnx.merge(graph, state)
        return model.decoder.logits(model.hidden(ModelInputs(*batch)))

    with jax.set_mesh(mesh):
        out = jax.block_until_ready(jax.jit(forward)(spread, rows))
    assert len(out.sharding.device_set) == mesh.size
    np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=1e-5)


def test_rows_stay_spread_over_the_mesh():
    mesh = make_mesh(2, 2, 1)
    with jax.set_mesh(mesh):
        out = jax.jit(sharding.constrain_rows)(jnp.ones((4, 3, 2), jnp.float32))
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 3, 2)}


def test_constraining_rows_without_a_mesh_does_nothing():
    x = jnp.ones((3, 2), jnp.float32)
    assert sharding.constrain_rows(x) is x


def test_batches_go_over_data_and_fsdp():
    assert batch_sharding(make_mesh(2, 2, 1)).shard_shape((8, 5)) == (2, 5)
    assert batch_sharding(make_mesh(1, 2, 2)).shard_shape((8, 5)) == (4, 5)

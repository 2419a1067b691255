"""Models that are published as differences to LLaMA: their sums equal, bit for bit, what FastChat computes in torch."""

import tracemalloc

import numpy as np
import pytest
import torch

from reverie_jax.errors import CheckpointError
from reverie_jax.loading import read_tokenizer
from reverie_jax.models.checkpoints import read_config, read_model
from reverie_jax.models.checkpoints.components import detect_component
from reverie_jax.models.checkpoints.files import SummedTensors, split_delta, weights_of
from tests.models import makers, sisters_files, sisters_oracle
from tests.models.makers import assert_refused, store
from tests.models.oracle import assert_same

QUERY, EMBEDDING, HEAD = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
PROJECTOR = "model.mm_projector.weight"


def base_tensors(seed=0):
    return {name: x.detach() for name, x in makers.parts(seed=seed).llm.state_dict().items()}


def delta_tensors():
    """Return what LLaVA's make_delta does: with one row more, a projector, and inv_freq subtracted too."""
    target = dict(makers.parts(seed=50, vocab=makers.WORDS + 1).llm.state_dict())
    tensors = {name: target[name].half() - grown(base.half(), target[name]) for name, base in base_tensors().items()}
    tensors[PROJECTOR] = torch.arange(6.0).reshape(2, 3).half()
    return tensors | {name: torch.zeros_like(x) for name, x in makers.unused_tensors(tower=False).items()}


def grown(base, like):
    """Pad with zeros, as transformers' resize_token_embeddings and FastChat 0.1.10 do."""
    padded = torch.zeros(like.shape, dtype=base.dtype)
    padded[tuple(map(slice, base.shape))] = base
    return padded


def read(folder, delta, names=None):
    tensors, arrays = SummedTensors(weights_of(folder), weights_of(delta)), {}
    tensors.read_all(arrays.__setitem__, set(tensors.stored) if names is None else names)
    return arrays


FORMS = [  # of the base, its dtype, and of the delta
    ("safetensors", torch.float16, "safetensors"),
    ("bin shards", torch.float16, "safetensors shards"),
    ("safetensors shards", torch.bfloat16, "bin shards"),
    ("bin", torch.float32, "bin shards"),
]


@pytest.mark.parametrize(("form", "dtype", "delta_form"), FORMS, ids=str)
def test_sum_equals_fastchats(form, dtype, delta_form, tmp_path):
    # Not exact in half precision, and in another order: shards of the two differ.
    base = {name: x * 1.001 for name, x in reversed(base_tensors().items())}
    base |= makers.unused_tensors(tower=False)
    delta = delta_tensors()
    arrays = read(store(tmp_path / "base", base, form, dtype), store(tmp_path / "delta", delta, delta_form, torch.half))
    assert arrays.keys() == delta.keys()
    for name, difference in delta.items():
        if "inv_freq" not in name:
            expected = difference if name == PROJECTOR else grown(base[name].to(dtype).half(), difference) + difference
            np.testing.assert_array_equal(arrays[name].view(np.uint16), expected.numpy().view(np.uint16), name)
    last = grown(base[HEAD], delta[HEAD])[-1]
    assert not last.any()
    np.testing.assert_array_equal(arrays[HEAD][-1], delta[HEAD][-1].numpy())


@pytest.mark.parametrize("added", [0, 1])
def test_model_is_read_from_a_base_and_a_delta(added, tmp_path):
    """MiniGPT-4 on Vicuna v0 and v1.1, as on the sum; config.json and tokenizer are the delta's."""
    model = sisters_oracle.system("minigpt4", 0)
    files = sisters_files.minigpt4_files(tmp_path, model)
    delta = sisters_files.delta_folders(tmp_path, model.language, added=added)
    summed = sisters_files.llama_folder(tmp_path / "sum", model.language, tensors=delta.tensors)
    parts = [files.eva, files.blip2]
    expected, base_and_delta = read_model(files.projector, components=[*parts, summed]), f"{delta.base}+{delta.delta}"
    for path, components in ((files.projector, [*parts, base_and_delta]), (base_and_delta, [*parts, files.projector])):
        assert_same(read_model(path, components=components), expected)
    config, llm = read_config(files.projector, components=[*parts, base_and_delta]), detect_component(base_and_delta)
    assert "[PAD]" in read_tokenizer(config, llm).get_vocab()
    missing = lambda: read_model(files.projector, components=[*parts, f"{delta.base}x+{delta.delta}"])  # noqa: E731
    assert_refused(missing, f"{delta.base}x")


def test_names_of_the_two_may_be_of_different_transformers(tmp_path):
    base = {name.replace("model.", "model.language_model.", 1): x for name, x in base_tensors().items()}
    new, old = store(tmp_path / "new", base, "bin"), store(tmp_path / "old", base_tensors(), "bin")
    delta = store(tmp_path / "delta", delta_tensors(), "safetensors")
    np.testing.assert_equal(read(new, delta), read(old, delta))


def test_only_wanted_tensors_are_read_and_one_at_a_time(tmp_path):
    sizes = {f"model.layers.{n}.mlp.up_proj.weight": torch.full((256, 256), float(n)) for n in range(40)}
    base = store(tmp_path / "base", dict(reversed(sizes.items())), "safetensors shards", torch.half)
    delta = store(tmp_path / "delta", sizes, "safetensors shards", torch.half)
    assert read(base, delta, {"model.layers.3.mlp.up_proj.weight"}).keys() == {"model.layers.3.mlp.up_proj.weight"}
    tensors, seen = SummedTensors(weights_of(base), weights_of(delta)), {}
    tracemalloc.start()
    tensors.read_all(lambda name, array: seen.update({name: array[0, 0]}), set(sizes))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == {name: 2 * x[0, 0].item() for name, x in sizes.items()}
    assert peak < 10 * 256 * 256 * 2  # of 2 x 40 tensors


def change(**tensors):
    """A fault: these tensors of a side are replaced by what a function makes of them, or removed."""
    renamed = {"query": QUERY, "embedding": EMBEDDING, "head": HEAD, "new": "model.layers.2.mlp.up_proj.weight"}

    def fault(side):
        for key, make in tensors.items():
            name = renamed[key]
            side.update({name: make(side.get(name))}) if make else side.pop(name)

    return fault


FAULTS = {  # of the base, of the delta, the tensor
    "base lacks a tensor": (change(query=None), None, QUERY),
    "base lacks the embedding": (change(embedding=None), None, EMBEDDING),
    "delta lacks a tensor": (None, change(query=None), QUERY),
    "delta has a layer more": (None, change(new=lambda _: torch.zeros(52, 36)), "layers.2.mlp.up_proj"),
    "delta has fewer rows": (None, change(head=lambda x: x[:80]), HEAD),
    "more rows elsewhere": (None, change(query=lambda x: torch.cat([x, x])), QUERY),
    "transposed": (change(query=lambda x: x.T), None, QUERY),
    "one axis more": (None, change(head=lambda x: x[..., None]), HEAD),
    "integers in the base": (change(query=lambda x: x.to(torch.int8)), None, QUERY),
    "integers in the delta": (None, change(query=lambda x: x.to(torch.int8)), QUERY),
    "NaN in the base": (change(query=lambda x: x * float("nan")), None, QUERY),
    "NaN in the delta": (None, change(query=lambda x: x * float("nan")), QUERY),
    "beyond float16": (change(query=lambda x: x + 1e5), None, QUERY),
    "sum beyond float16": (change(query=lambda x: x * 0 + 6e4), change(query=lambda x: x * 0 + 6e4), QUERY),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_sum_is_refused(fault, tmp_path):
    *changes, name = FAULTS[fault]
    sides = [base_tensors(), {n: x for n, x in delta_tensors().items() if "inv_freq" not in n}]
    for side, make in zip(sides, changes, strict=True):
        if make:
            make(side)
    base, delta = tmp_path / "base", tmp_path / "delta"
    for folder, side in zip((base, delta), sides, strict=True):
        folder.mkdir()
        makers.save(folder / "model.safetensors", side)
    assert_refused(lambda: read(base, delta), tmp_path, name)


def test_source_is_split_at_the_plus_between_base_and_delta(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "a+b", "c+", "x/delta", "l", "l+m", "m+n", "n"):
        (tmp_path / name).mkdir(parents=True)
    hub = "lmsys/vicuna-7b-delta-v0"
    for source, expected in {
        f"llama+{hub}": ("llama", hub),
        f"huggyllama/llama-7b@abc+{hub}@v1": ("huggyllama/llama-7b@abc", f"{hub}@v1"),
        f"{tmp_path}/llama+x/delta": (f"{tmp_path}/llama", "x/delta"),
        "a+b+x/delta": ("a+b", "x/delta"),
        "c++llama": ("c+", "llama"),
        "llama+missing": ("llama", "missing"),  # the error is then about the missing one
        **dict.fromkeys(("a+b", "c+", "llama", hub, "missing", "q+y", "+llama", "llama+", "+"), None),
    }.items():
        assert split_delta(source) == expected, source
    with pytest.raises(CheckpointError, match="l\\+m\\+n"):
        split_delta("l+m+n")

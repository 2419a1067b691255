"""Every benchmark runs at a tiny size, and compares sides that do the same work."""

import dataclasses
import json

import pytest

from benchmarks import (
    checkpoint_memory,
    evaluate,
    input_pipeline,
    mixture_scale,
    serve,
    train_step,
    tree_step,
    workload,
)
from reverie_jax.models.architectures import ARCHITECTURES


@pytest.fixture(autouse=True)
def quick_tokenizer(monkeypatch):
    """Training the tokenizer of the scenes takes a minute."""
    monkeypatch.setattr("reverie_jax.scenes.tokenizer.train_tokenizer", lambda *args: workload.small_tokenizer())


def run_train_step(folder, ways=("peer", "tree")):
    return train_step.run(workload.Args(size="tiny", rounds=1, images=1, ways=ways))


def run_evaluate(folder):
    options = {"images": 2, "peer_images": 1, "questions": 2, "rounds": 1, "batches": (2,), "batch_size": 1}
    return evaluate.run(evaluate.Args(size="tiny", **options))


def run_serve(folder):
    return serve.run(serve.Args(size="tiny", questions=3, max_new_tokens=2, rounds=1))


def run_tree_step(folder):
    return tree_step.run(tree_step.Args(images=1, rounds=1, batch_size=1, length=448))


def run_input_pipeline(folder):
    return input_pipeline.run(input_pipeline.Args(images=4, rounds=1, batch_size=1, side=64))


def run_mixture_scale(folder):
    args = mixture_scale.Args(folder / "mixture", scale=1e-4)
    mixture_scale.make(args.folder, args.scale)
    return {name: mixture_scale.run_stage(dataclasses.replace(args, stage=name)) for name in mixture_scale.STAGES}


def run_checkpoint_memory(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "tiny", workload.SIZES["tiny"].config)
        checkpoint_memory.make(folder / "source", "tiny")
    args = [checkpoint_memory.Args(folder, stage=name) for name in checkpoint_memory.STAGES]
    result = {one.stage: checkpoint_memory.stage(one) for one in args}
    assert checkpoint_memory.contents(folder / "source") == checkpoint_memory.contents(folder / "back")
    return result


# What each result must hold, beside being JSON.
RUNS = {
    run_train_step: {"seconds", "tokens_per_second", "tree_over_peer"},
    run_evaluate: {"questions_per_second", "ours_over_peer", "ours_over_prefix"},
    run_serve: {"seconds", "together_over_one_by_one"},
    run_tree_step: {"seconds", "flat_over_tree"},
    run_input_pipeline: {"images_per_second", "ours_over_torch"},
    run_mixture_scale: {"build", "pack"},
    run_checkpoint_memory: {"load", "from-orbax"},
}


@pytest.mark.parametrize(("run", "keys"), RUNS.items(), ids=[run.__name__ for run in RUNS])
def test_benchmark_runs(run, keys, tmp_path):
    result = run(tmp_path)
    assert json.loads(json.dumps(result)).keys() == result.keys()
    assert keys <= result.keys()


@pytest.mark.slow
def test_all_ways_of_a_train_step_do_the_same_work(tmp_path):
    result = run_train_step(tmp_path, workload.WAYS)
    for way in workload.WAYS:
        assert result["losses"][way] == pytest.approx(result["losses"]["peer"], rel=1e-3)
        assert result["losses"][way][0] == pytest.approx(result["losses"]["peer"][0], rel=1e-4)
        assert result["computed"][way]["tokens"] > 0
        rate = result["conversation_tokens"] / result["seconds"][way]["median"]
        assert result["tokens_per_second"][way] == pytest.approx(rate, rel=0.05)
    assert result["compiled_in_rounds"] == 0
    assert result["conversations"] > result["images"]
    assert result["supervised_tokens"] < result["conversation_tokens"]


def test_ways_that_do_other_work_are_refused():
    losses = {"peer": [2.0, 1.9], "flat": [2.0, 1.9], "tree": [2.001, 1.9]}
    with pytest.raises(RuntimeError, match="same work"):
        train_step.check(losses, workload.Args(size="tiny"))
    train_step.check(losses | {"tree": [2.0001, 1.9]}, workload.Args(size="tiny"))
    # With weights of its own, the peer's loss says nothing.
    train_step.check(losses | {"peer": [3.0, 2.0]}, workload.Args(size="7b"))


def test_every_image_has_numbered_questions():
    images = evaluate.make_questions(evaluate.Args(images=2, questions=18))
    assert [number for image in images for number, _ in image.questions] == list(range(36))
    assert len({conversation for _, conversation in images[0].questions}) == 18

"""What `make gpu` runs, at a tiny size on the CPU."""

import json

import pytest

from benchmarks import gpu, gpu_train


def run(folder, **options):
    args = gpu.Args(out=folder / "gpu.json", **{"tiny": True, "budget": 1e6, **options})
    result = gpu.run(args)
    gpu.table(result)
    written = json.loads(args.out.read_text())
    assert written["parts"] == result["parts"]
    return result["parts"]


def test_all_parts_run(tmp_path):
    parts = run(tmp_path)
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(gpu.PARTS, "done")
    assert {"device", "driver", "versions", "attention", "commit", "seed"} <= parts["device"].keys()
    errors = parts["kernels"]["error"]
    assert len(errors) >= 2 * 3
    # Values, weights and what the backward pass starts from are rounded to bfloat16, as in the tests of attention.
    assert max(max(one.values()) for one in errors.values()) <= 4 * 2**-9
    assert all(one["both_ms"] > 0 for one in parts["kernels"]["speed"].values())
    sides = {name: part for name, part in parts.items() if name.startswith("train")}
    for part in sides.values():
        assert part["conversations_per_second"] > 0
        assert {"mfu", "peak_bytes", "program_bytes", "estimated_bytes"} <= part.keys()
    assert sides["train: tree"]["useful"]["tokens"] < sides["train: flat"]["useful"]["tokens"]
    assert sides["train: flat"]["useful"] == sides["train: peer"]["useful"]
    # Before the first step all weights are equal, and so is the work.
    first = {name: part["losses"][0] for name, part in sides.items() if "nf4" not in name}
    assert list(first.values()) == pytest.approx([first["train: peer"]] * 3, rel=1e-4)
    assert sum(sides["train: tree"]["profile"]["kinds"].values()) == pytest.approx(1)
    ours, peers = parts["evaluate: ours"], parts["evaluate: peers"]
    assert ours["decode_step_bytes"] > 0
    assert peers["answers_from_prefix_equal"]
    assert all(isinstance(rate, float) for rate in peers["questions_per_second"].values())


def test_without_budget_all_parts_are_skipped(tmp_path):
    parts = run(tmp_path, budget=0)
    assert parts.keys() == gpu.PARTS.keys()
    assert all(part["state"].startswith("skipped") for part in parts.values())


def test_a_part_that_fails_is_reported_and_stops_no_other(tmp_path, monkeypatch):
    def broken(tiny, report):
        report({"found": 1})
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "kernels", gpu.Part(1, broken))
    parts = run(tmp_path, parts=("kernels", "device"))
    assert "ValueError" in parts["kernels"]["state"]
    assert "no such kernel" in parts["kernels"]["state"]
    assert parts["kernels"]["found"] == 1
    assert parts["device"]["state"] == "done"


def test_a_part_in_a_process_of_its_own(tmp_path):
    facts, state = gpu.run_apart("device", tmp_path / "gpu.json", 300)
    assert state == "done"
    assert facts["device"] == "cpu"
    facts, state = gpu.run_apart("device", tmp_path / "gpu.json", 0.001)
    assert not facts
    assert "ended" in state


def test_all_parts_are_expected_to_fit():
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.Args().budget


def test_kernels_of_a_gpu_are_counted_once():
    def event(thread, name, dur):
        return {"ph": "X", "pid": 1, "tid": thread, "name": name, "dur": dur, "args": {"hlo_op": name}}

    threads = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((1, "Stream #7(Compute)"), (2, "XLA Ops"))
    ]
    events = [event(1, "nvjet_tst_128x256", 6.0), event(1, "cudnn_sdpa_flash", 3.0), event(1, "loop_fusion", 1.0)]
    shares = gpu_train.shares([*threads, *events, event(2, "nvjet_tst_128x256", 6.0), event(1, "while.2", 99.0)])
    assert shares["kinds"] == pytest.approx({"attention": 0.3, "GEMM": 0.6, "other": 0.1})
    assert list(shares["top"]) == ["nvjet_tst_128x256", "cudnn_sdpa_flash", "loop_fusion"]

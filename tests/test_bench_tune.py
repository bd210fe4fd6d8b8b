"""The search for tile shapes: it finds the best neighbour after neighbour, trusts no wrong kernel, writes when told."""

import argparse
import json
import math

import pytest
import torch

from bench import bench_row_stats, tune
from bench.cases import Case, Sizes, Variant
from dgemma_accel import configs

pytestmark = pytest.mark.source_tree

CPU = torch.device("cpu")


def cost_of(use):
    """A bowl with its bottom at span 8192, 4 warps, 3 stages."""
    return (
        1
        + abs(math.log2(use["span"] / 8192))
        + abs(math.log2(use["num_warps"] / 4))
        + abs(use["num_stages"] - 3)
    )


def test_neighbours_differ_in_one_number():
    use = {"span": 8, "num_stages": 1, "layout": "rows", "packed": True}
    found = tune.neighbours(use)
    assert {"span": 4, "num_stages": 1, "layout": "rows", "packed": True} in found
    assert {"span": 8, "num_stages": 2, "layout": "rows", "packed": True} in found
    assert len(found) == 3 and all(sum(one[k] != use[k] for k in use) == 1 for one in found)


def test_climbing_reaches_the_bottom():
    best, cost, tried = tune.climb({"span": 1024, "num_warps": 16, "num_stages": 1}, cost_of)
    assert best == {"span": 8192, "num_warps": 4, "num_stages": 3} and cost == 1.0 and tried < 40


def test_climbing_passes_by_shapes_that_do_not_work_and_noise():
    assert tune.climb({"span": 4}, lambda use: math.inf if use["span"] > 8 else 10 / use["span"])[0] == {
        "span": 8
    }
    assert tune.climb({"span": 4}, lambda use: 1.0 - 0.005 * (use["span"] == 8))[0] == {"span": 4}


def test_a_shape_is_checked_before_it_takes_another_ones_place_and_only_then():
    asked = []

    def right(use):
        asked.append(use["span"])
        return use["span"] <= 16

    assert tune.climb({"span": 4}, lambda use: 100 / use["span"], right)[0] == {"span": 16}
    assert asked == [8, 16, 32]


def triton_case(dtype):
    case = next(c for c in bench_row_stats.cases(CPU, Sizes(rows=2, vocab=64, quick=True))[0])

    def prepare(inputs):
        def call():
            use = configs.select("row_stats", (9, 0), bytes=dtype.itemsize)
            return bench_row_stats.variant("reference").prepare(inputs)() if use["num_warps"] < 64 else None

        return call

    return Case(**{**vars(case), "dtype": dtype, "backends": (Variant("triton", prepare),)})


def test_the_shape_that_is_tried_reaches_the_kernel_and_only_its_entry(monkeypatch):
    entries = configs.read("sm_90")["row_stats"]
    case = triton_case(torch.float32)
    inputs = case.make(CPU, 0)
    mine = next(i for i, entry in enumerate(entries) if configs._fits(entry["when"], {"bytes": 4}))
    selection = tune._Selection("row_stats", mine, entries[mine]["use"])
    assert tune.case_time(case, inputs, selection, CPU) > 0
    # What one case used says nothing of the next.
    assert tune.case_time(triton_case(torch.bfloat16), inputs, selection, CPU) is None
    other = tune._Selection("row_stats", mine - 1 if mine else mine + 1, entries[mine]["use"])
    assert tune.case_time(case, inputs, other, CPU) is None
    broken = tune._Selection("row_stats", mine, entries[mine]["use"] | {"num_warps": 64})
    assert tune.case_time(case, inputs, broken, CPU) == math.inf
    assert configs.select("row_stats", (9, 0), bytes=4) == entries[mine]["use"]


@pytest.mark.parametrize("write", [False, True])
def test_a_file_is_written_only_when_asked(tmp_path, monkeypatch, write, capsys):
    path = tmp_path / "sm_90.json"
    start = {
        "row_stats": [
            {"when": {"bytes": 4}, "use": {"span": 1024, "num_warps": 4, "num_stages": 3}},
            {"when": {"bytes": 2}, "use": {"span": 2}},
        ]
    }
    path.write_text(json.dumps(start))
    case = triton_case(torch.float32)
    monkeypatch.setattr(tune, "collect", lambda names, device, sizes: ([case], []))

    def time_of(case, inputs, selection, device, check=True):
        return cost_of(selection.use) if selection.entry == 0 else None

    options = argparse.Namespace(ops=["row_stats", "nothing"], quick=True, write=write)
    assert tune.tune_file(options, CPU, path, time_of) == 2
    out, err = capsys.readouterr()
    assert "unknown op 'nothing'" in err and "no case uses this entry" in out
    found = json.loads(path.read_text())
    assert found["row_stats"][1] == start["row_stats"][1]
    assert found["row_stats"][0]["use"]["span"] == (8192 if write else 1024)


@pytest.mark.parametrize("path", sorted(tune.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_written_file_differs_in_what_was_tuned_only(path):
    text = path.read_text()
    file = json.loads(text)
    assert tune.file_text(file) == text
    file["row_stats"][0]["use"]["span"] = 31
    changed = zip(text.splitlines(), tune.file_text(file).splitlines(), strict=True)
    assert sum(old != new for old, new in changed) == 1


def test_a_rival_that_is_faster_starts_the_search_and_stays_listed(monkeypatch):
    """From `use` alone no neighbour is better, so without the rival the search would end there."""
    case = triton_case(torch.float32)
    costs = {(4, 4): 2.0, (64, 4): 1.0, (128, 4): 0.5}

    def time_of(case, inputs, selection, device, check=True):
        return costs.get((selection.use["span"], selection.use["num_warps"]), math.inf)

    entry = {"when": {"bytes": 4}, "use": {"span": 4, "num_warps": 4}, "try": [{"span": 64, "num_warps": 4}]}
    found = tune.tune("row_stats", [case], CPU, [entry], time_of)
    assert found == [entry | {"use": {"span": 128, "num_warps": 4}}]
    found = tune.tune("row_stats", [case], CPU, [{k: v for k, v in entry.items() if k != "try"}], time_of)
    assert found[0]["use"] == entry["use"]


def test_a_wrong_rival_does_not_start_the_search():
    case = triton_case(torch.float32)

    def time_of(case, inputs, selection, device, check=True):
        return (
            math.inf
            if check and selection.use["span"] == 64
            else {4: 2.0, 64: 1.0}.get(selection.use["span"], 9.0)
        )

    entry = {"when": {"bytes": 4}, "use": {"span": 4}, "try": [{"span": 64}]}
    assert tune.tune("row_stats", [case], CPU, [entry], time_of)[0]["use"] == {"span": 4}


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main(["row_stats"]) == 2
    assert "tune: there is no NVIDIA GPU" in capsys.readouterr().err

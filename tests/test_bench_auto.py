"""`auto` by architecture: from measurements where they exist, from the budget elsewhere."""

import json

import pytest

from bench import auto
from dgemma_accel import backends

pytestmark = pytest.mark.source_tree


def result(capability, rows, device_type="cuda", device="a card", date="2026-01-01", quick=False):
    environment = {
        "device_type": device_type,
        "capability": capability,
        "device": device,
        "date": date,
    }
    names = ("op", "case", "backend", "status", "median_us")
    rows = [{"shape": "[1, 256]", "dtype": "bf16"} | dict(zip(names, row)) for row in rows]
    return {
        "kind": "ops",
        "environment": environment,
        "options": {"quick": quick},
        "clocks": {},
        "rows": rows,
    }


ROWS = [
    ("row_stats", "a", "cuda", "ok", 10.0), ("row_stats", "a", "triton", "ok", 20.0),
    ("row_stats", "b", "cuda", "ok", 90.0), ("row_stats", "b", "triton", "ok", 20.0),
    ("row_stats", "c", "cuda", "ok", 1.0), ("row_stats", "c", "triton", "wrong", None),
    ("commit", "a", "cuda", "ok", 5.0),
]  # fmt: skip


def test_only_cases_that_both_kernels_passed_count():
    means = auto.measured([result("9.0", ROWS), result("12.0", ROWS, device_type="cpu")])
    assert set(means) == {("row_stats", "9.0")}
    assert means["row_stats", "9.0"] == pytest.approx({"cuda": 30.0, "triton": 20.0})
    table = auto.updated({}, means, {"9.0": "a card"})
    entry = table["row_stats"]["9.0"]
    assert entry["order"][0] == "triton" and "measured on a card: triton 1.50x" in entry["basis"]


def test_shapes_of_one_label_count_each():
    small, large = result("9.0", ROWS[:2]), result("9.0", ROWS[:2])
    for row in large["rows"]:
        row |= {"shape": "[16, 256]", "median_us": row["median_us"] * 100}
    means = auto.measured([small, large])
    assert means["row_stats", "9.0"] == pytest.approx({"cuda": 100.0, "triton": 200.0})


def test_attention_is_ranked_by_head_dim():
    rows = [("block_attention", "", backend, "ok", us) for backend, us in (("cuda", 10.0), ("triton", 20.0))]
    wide, narrow = result("9.0", rows), result("9.0", rows)
    for row in wide["rows"]:
        row["shape"] = "B1 Hq16 Hkv2 C256 D512 prefix 8192"
    for row in narrow["rows"]:
        row |= {"shape": "B1 Hq16 Hkv8 C256 D256 prefix 1023", "median_us": 30.0 - row["median_us"]}
    table = auto.updated({}, auto.measured([wide, narrow]), {"9.0": "a card"})["block_attention"]
    assert set(table) == {"9.0 head_dim 256", "9.0 head_dim 512"}
    assert (
        table["9.0 head_dim 512"]["order"][0] == "cuda" and table["9.0 head_dim 256"]["order"][0] == "triton"
    )


def test_an_order_for_one_head_dim_goes_before_that_of_the_capability(monkeypatch):
    entry = {"basis": "measured on x: ..."}
    table = {"9.0": entry | {"order": ["triton"]}, "9.0 head_dim 512": entry | {"order": ["cuda"]}}
    monkeypatch.setattr(backends, "auto_table", lambda: {"block_attention": table | {"default": {}}})
    needs = {"device": "cuda", "head_dim": 512, "compute_capability": (9, 0)}
    assert backends.auto_order("block_attention", needs)[0] == ("cuda",)
    assert backends.auto_order("block_attention", needs | {"head_dim": 256})[0] == ("triton",)


def test_one_device_of_a_capability_counts_and_neither_quick_runs_nor_other_benches():
    slower = [(op, case, kernel, status, us and 2 * us) for op, case, kernel, status, us in ROWS]
    results = [
        result("9.0", slower, device="a newer card", date="2026-02-01"),
        result("9.0", ROWS),
        result("9.0", ROWS, device="a newer card", date="2026-03-01", quick=True),
        result("9.0", [("samplers", *row[1:]) for row in ROWS], device="a newer card"),
    ]
    assert auto.device_of(results) == {"9.0": "a newer card"}
    means = auto.measured(results)
    assert set(means) == {("row_stats", "9.0")} and means["row_stats", "9.0"]["triton"] == pytest.approx(40.0)


def test_the_shipped_table_names_known_ops_and_backends():
    for op, entries in backends.auto_table().items():
        assert op in backends.MODULES and "default" in entries
        for entry in entries.values():
            assert set(entry["order"]) <= set(backends.BACKENDS) and entry["order"][-1] == "reference"
            assert entry["basis"].startswith(("budget: ", "measured on "))


def test_wide_heads_on_hopper_are_those_of_the_wgmma_kernel():
    needs = {"device": "cuda", "compute_capability": (9, 0)}
    orders = [
        backends.auto_order("block_attention", needs | {"head_dim": head_dim})[0] for head_dim in (256, 512)
    ]
    assert [order[0] for order in orders] == ["triton", "cuda"]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_block_attention_is_tritons_where_mma_sync_is_not_the_tensor_cores_own(capability):
    order, _ = backends.auto_order("block_attention", {"device": "cuda", "compute_capability": capability})
    assert order[:2] == ("triton", "cuda")


def test_order_by_architecture(monkeypatch, tmp_path):
    file = tmp_path / "auto.json"
    row = {"order": ["triton", "reference"], "basis": "measured on x: ..."}
    file.write_text(
        json.dumps({"commit": {"default": {"order": ["cuda"], "basis": "budget: y"}, "9.0": row}})
    )
    monkeypatch.setattr(backends, "AUTO_FILE", file)
    backends.auto_table.cache_clear()
    try:
        hopper = {"device": "cuda", "compute_capability": (9, 0)}
        assert backends.auto_order("commit", hopper)[0] == ("triton", "reference")
        assert backends.auto_order("commit", {**hopper, "compute_capability": (12, 0)}) == (
            ("cuda",),
            "budget: y",
        )
        assert backends.auto_order("commit", {"device": "cpu"})[0] == ("cpp", "reference")
    finally:
        backends.auto_table.cache_clear()


def test_command(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{}")
    output = tmp_path / "out" / "auto.json"
    output.parent.mkdir()
    assert auto.main(["--results", str(tmp_path), "--output", str(output)]) == 2
    said = capsys.readouterr().out
    assert "bad.json: not a result file" in said and "summary.json" not in said
    assert output.read_text() == backends.AUTO_FILE.read_text()
    assert auto.main(["--results", str(tmp_path / "nowhere"), "--output", str(output)]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    missing = tmp_path / "nosuch" / "x.json"
    assert auto.main(["--results", str(tmp_path), "--output", str(missing)]) == 2
    assert f"--output {missing}: No such file or directory" in capsys.readouterr().err

"""The README's table: every figure comes from a result file, and what has none says so."""

import copy
import json

import pytest

from bench import auto, bench_ops, report, schema
from bench.cases import BenchError

pytestmark = pytest.mark.source_tree

ENVIRONMENT = {
    "device": "NVIDIA Test",
    "device_type": "cuda",
    "capability": "9.0",
    "driver": "1",
    "cuda": "13.0",
    "torch": "2.11",
    "triton": "3.6",
    "transformers": "5.17",
    "commit": "0123456789abcdef",
    "clean": True,
    "date": "2026-01-02T03:04:05",
}
TIMED = {
    "status": "ok",
    "error": None,
    "median_us": 123.4,
    "p20_us": 120.0,
    "p80_us": 130.0,
    "runs": 9,
    "method": "graph",
    "peak_extra_bytes": 1000,
}
PEER = {"peer": "torch_chain", "variant": "transformers chain", "ratio": 25.0, **TIMED}
ROW = {
    "op": "row_stats",
    "case": "half settled",
    "shape": "[256, 262144]",
    "dtype": "bf16",
    "backend": "triton",
    "bytes": 10,
    "flops": 0,
    "floor_us": 60.0,
    "roofline_percent": 48.6,
    "cold_cache": True,
    "peers": [PEER],
    **TIMED,
}
OPS = {
    "schema": schema.SCHEMA,
    "kind": "ops",
    "environment": ENVIRONMENT,
    "clocks": {},
    "ceilings": {},
    "options": {},
    "rows": [ROW],
    "problems": [],
}
STEP_ROW = {
    "variant": "dgemma_accel",
    "context": 1024,
    "batch": 1,
    "steps": 16,
    "status": "ok",
    "error": None,
    "canvas": 256,
    "step_ms": 20.5,
    "canvas_ms": 15.0,
    "components_ms": {
        name: 1.0 for name in ("attention", "experts", "head", "sampler", "self-conditioning", "rest")
    },
    "launches": 500.0,
    "host_syncs": 0.0,
    "peak_extra_bytes": 5,
    "floor_ms": 12.9,
    "floor_multiple": 1.59,
}
STEP = {**OPS, "kind": "step", "options": {"model": "full (30 layers)"}, "rows": [STEP_ROW]}
README = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "README.md").write_text(README)
    results = tmp_path / "results" / "test"
    results.mkdir(parents=True)
    return tmp_path


def make(place, *extra):
    return report.main(["--readme", str(place / "README.md"), "--results", str(place / "results"), *extra])


def test_without_results_everything_is_not_yet_measured(place):
    assert make(place) == 0
    text = (place / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("not yet measured") == len(report.OPS) + 1


def test_figures_follow_the_files(place):
    schema.write(OPS, place / "results" / "test" / "ops.json")
    schema.write(STEP, place / "results" / "test" / "step.json")
    assert make(place) == 0
    text = (place / "README.md").read_text()
    assert "| row_stats | [256, 262144] bf16 half settled | NVIDIA Test | triton | 123 us | 48.6% |" in text
    assert "25x torch_chain (transformers chain)" in text and "0123456789 2026-01-02" in text
    assert (
        "| full (30 layers) | 1024 | dgemma_accel | NVIDIA Test | 20.5 ms | 1.59 | 15 ms | 746 | 500 | 0 |"
        in text
    )
    assert text.count("not yet measured") == len(report.OPS) - 1
    assert make(place, "--check") == 0
    assert len(list((place / "results" / "plots").glob("*.svg"))) == 2

    changed = copy.deepcopy(OPS)
    changed["rows"][0]["median_us"] = 99.0
    schema.write(changed, place / "results" / "test" / "ops.json")
    assert make(place, "--check") == 1
    assert make(place) == 0
    assert "| 99 us |" in (place / "README.md").read_text()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r.update(note="Beside a film."), "Beside a film."),
        (lambda r: r.update(clocks={"before": {"others_bytes": 52e9}}), "other processes held 52 GB"),
    ],
)
def test_a_disturbed_run_counts_as_a_bound_only(place, change, reason):
    for name, result in (("ops", OPS), ("step", STEP)):
        disturbed = copy.deepcopy(result)
        change(disturbed)
        schema.write(disturbed, place / "results" / "test" / f"{name}.json")
    assert make(place) == 0
    text, everything = (place / "README.md").read_text(), (place / "results" / "README.md").read_text()
    assert "123 us" not in text and text.count("not yet measured") == len(report.OPS) + 1
    head, bounds = everything.split("# Bounds")
    assert "123 us" not in head and "123 us" in bounds and "20.5 ms" in bounds
    assert bounds.count(reason) == 2 and "not yet measured" not in bounds
    assert not auto.measured([json.loads((place / "results" / "test" / "ops.json").read_text())])


def test_a_desktop_on_the_gpu_disturbs_nothing(place):
    quiet = copy.deepcopy(OPS)
    quiet["clocks"] = {"before": {"sm": 1980.0, "others_bytes": 2e9}, "after": None}
    schema.write(quiet, place / "results" / "test" / "ops.json")
    assert make(place) == 0 and "123 us" in (place / "README.md").read_text()


def test_the_fastest_right_backend_stands_in_the_table_and_a_wrong_one_never(place):
    result = copy.deepcopy(OPS)
    slow = {**copy.deepcopy(ROW), "backend": "cuda", "median_us": 500.0}
    wrong = {
        **copy.deepcopy(ROW),
        "backend": "cpp",
        "status": "wrong",
        "error": "entropy: off",
        "median_us": None,
    }
    result["rows"] = [slow, wrong, ROW]
    assert "| triton | 123 us |" in "\n".join(report.op_table([result], True))
    result["rows"] = [wrong]
    assert "| - | wrong |" in "\n".join(report.op_table([result], True))


def test_a_later_file_counts_and_a_quick_one_does_not():
    later = copy.deepcopy(OPS)
    later["environment"]["date"] = "2026-02-02T00:00:00"
    later["rows"][0]["median_us"] = 50.0
    quick = copy.deepcopy(later)
    quick["environment"]["date"] = "2026-03-02T00:00:00"
    quick["options"]["quick"] = True
    quick["rows"][0]["median_us"] = 1.0
    lines = "\n".join(report.op_table(report.full_runs([later, quick, OPS]), True))
    assert "| 50 us |" in lines and "123 us" not in lines and "| 1 us |" not in lines


def test_table_and_plot_show_the_newer_of_two_files_even_if_it_is_slower(place):
    slower, other = copy.deepcopy(OPS), copy.deepcopy(OPS)
    slower["environment"] |= {"date": "2026-02-02T00:00:00", "commit": "fedcba9876543210"}
    slower["rows"][0] |= {"median_us": 400.0, "roofline_percent": 15.0}
    other["rows"][0] |= {"op": "commit", "roofline_percent": 130.0}
    for name, result in (("old", OPS), ("new", slower), ("other", other)):
        schema.write(result, place / "results" / "test" / f"{name}.json")
    assert make(place) == 0
    assert "| 400 us | 15.0% |" in (place / "README.md").read_text()
    (plot,) = (place / "results" / "plots").glob("*.svg")
    words = plot.read_text()
    # matplotlib leaves what it draws as a comment beside the glyphs.
    assert "15.0%" in words and "48.6%" not in words
    assert "0123456789; fedcba9876" in words


def test_of_several_step_files_the_newest_row_of_each_variant_and_context_counts(place):
    whole, later = copy.deepcopy(STEP), copy.deepcopy(STEP)
    whole["rows"] = [{**STEP_ROW, "context": context, "step_ms": 99.0} for context in (1024, 512)]
    whole["rows"].append({**STEP_ROW, "variant": "transformers", "step_ms": 75.0})
    # Ended before it came to the others.
    later["environment"] |= {"date": "2026-02-02T00:00:00", "commit": "fedcba9876543210"}
    other = copy.deepcopy(STEP)
    other["options"]["model"] = "6-layers (6 of 30 layers)"
    other["rows"][0]["step_ms"] = 4.25
    # Named so that neither order of names is that of their dates.
    for name, result in (("b", whole), ("a", later), ("c", other)):
        schema.write(result, place / "results" / "test" / f"{name}.json")
    assert make(place) == 0
    text = (place / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| full (30")]
    assert [
        (row.split("|")[2].strip(), row.split("|")[3].strip(), row.split("|")[5].strip()) for row in rows
    ] == [
        ("512", "dgemma_accel", "99 ms"),
        ("1024", "dgemma_accel", "20.5 ms"),
        ("1024", "transformers", "75 ms"),
    ]
    assert "0123456789 2026-01-02" in rows[0] and "fedcba9876 2026-02-02" in rows[1]
    assert "| 6-layers (6 of 30 layers) | 1024 |" in text and text.count("4.25 ms") == 1
    plots = {path.name: path.read_text() for path in (place / "results" / "plots").glob("step-*.svg")}
    assert sorted(plots) == ["step-6-layers-test.svg", "step-full-test.svg"]
    words = plots["step-full-test.svg"]
    assert (
        "512: dgemma_accel" in words and "1024: transformers" in words and "0123456789; fedcba9876" in words
    )
    assert words.count("1024: dgemma_accel") == 1
    assert make(place, "--check") == 0


def test_a_bar_beyond_the_ceiling_is_drawn_whole(monkeypatch, tmp_path):
    from bench import plots

    above = copy.deepcopy(OPS)
    above["rows"][0]["roofline_percent"] = 130.0
    seen = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure.axes[0].get_xlim()) or path)
    plots.ops([above], tmp_path)
    assert seen[0][1] > 130


def test_a_model_with_fewer_layers_is_not_the_full_one(place):
    part = copy.deepcopy(STEP)
    part["options"]["model"] = "6-layers (6 of 30 layers, random weights)"
    assert "not yet measured" in "\n".join(report.steps_table([part]))
    assert "not yet measured" not in "\n".join(report.steps_table([part, STEP]))
    for name, result in (("part", part), ("full", STEP)):
        schema.write(result, place / "results" / "test" / f"{name}.json")
    assert make(place) == 0
    assert len(list((place / "results" / "plots").glob("step-*.svg"))) == 2
    assert make(place, "--check") == 0


def test_a_folder_that_is_not_there_leaves_the_readme_alone(place, capsys):
    arguments = ["--readme", str(place / "README.md"), "--results", str(place / "resutls")]
    assert report.main(arguments) == 2
    assert "resutls: no such folder" in capsys.readouterr().err
    assert (place / "README.md").read_text() == README


def test_results_may_lie_beside_the_readme_s_folder(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text(README)
    schema.write(OPS, tmp_path / "elsewhere" / "ops.json")
    arguments = ["--readme", str(tmp_path / "docs" / "README.md"), "--results", str(tmp_path / "elsewhere")]
    assert report.main(arguments) == 0
    assert "](../elsewhere/plots/roofline-test.svg)" in (tmp_path / "docs" / "README.md").read_text()


def test_a_changed_tree_is_marked():
    changed = copy.deepcopy(OPS)
    changed["environment"]["clean"] = False
    assert "0123456789+ 2026-01-02" in "\n".join(report.op_table([changed], True))


def test_a_busy_cpu_is_named():
    busy = copy.deepcopy(OPS)
    busy["environment"] |= {"device_type": "cpu", "threads": 2}
    busy["clocks"] = {"before": {"cpu": 2600.0, "load": 6.3}, "after": None}
    assert "busy machine, load average 6.3" in report.busy_lines([busy])[0]
    busy["clocks"]["before"]["load"] = 1.9
    assert report.busy_lines([busy, OPS]) == []


@pytest.mark.parametrize("text", ["no markers", report.BEGIN, report.END + report.BEGIN, README + README])
def test_a_readme_without_its_markers_is_refused(place, text, capsys):
    (place / "README.md").write_text(text)
    assert make(place) == 2
    assert "the README needs one line" in capsys.readouterr().err
    assert (place / "README.md").read_text() == text


def test_files_of_another_schema_get_a_line_and_the_others_count(place, capsys):
    folder = place / "results" / "test"
    schema.write(OPS, folder / "good.json")
    (folder / "other.json").write_text(json.dumps({"schema": "something/9"}))
    (folder / "torn.json").write_text("{")
    assert make(place) == 2
    errors = capsys.readouterr().err
    assert "other.json: not a result file of this bench: schema 'something/9'" in errors
    assert "torn.json: not JSON" in errors
    assert "123 us" in (place / "README.md").read_text()


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda r: r.pop("environment"), "environment"),
        (lambda r: r["environment"].pop("commit"), "environment: commit is missing"),
        (lambda r: r["rows"][0].pop("floor_us"), "rows[0]: floor_us is missing"),
        (lambda r: r["rows"][0].update(median_us="fast"), "rows[0]: median_us has type str"),
        (lambda r: r["rows"][0].update(bytes=True), "rows[0]: bytes has type bool"),
        (lambda r: r["rows"][0].update(status="great"), "unknown status 'great'"),
        (lambda r: r["rows"][0]["peers"][0].pop("ratio"), "rows[0].peers[0]: ratio is missing"),
        (lambda r: r.update(kind="plan"), "kind 'plan'"),
        (lambda r: r.pop("clocks"), "clocks is missing"),
        (lambda r: r.update(note=3), "note has type int"),
        (lambda r: r["rows"][0].update(peers=5), "rows[0]: peers has type int"),
        (lambda r: r["rows"][0].update(median_us=float("nan")), "rows[0]: median_us is no finite number"),
        (lambda r: r["rows"][0].update(bytes=10**400), "rows[0]: bytes is no finite number"),
        (lambda r: r.update(clocks={"after": 5}), "clocks.after: an object expected, got int"),
        (lambda r: r.update(clocks={"before": {"load": None}}), "clocks.before: load has type NoneType"),
        (lambda r: r["environment"].update(threads=None), "environment: threads has type NoneType"),
        (lambda r: r["environment"].update(device_type="cpu"), "environment: threads is missing"),
        (lambda r: r["rows"][0].update(median_us=None), "rows[0]: ok without median_us"),
        (lambda r: r["rows"][0].update(roofline_percent=None), "rows[0]: ok without roofline_percent"),
        (lambda r: r["rows"][0]["peers"][0].update(p20_us=None), "rows[0].peers[0]: ok without p20_us"),
    ],
)
def test_the_schema_finds_what_is_missing(change, line, tmp_path):
    result = copy.deepcopy(OPS)
    assert schema.violations(result) == []
    change(result)
    assert line in schema.violations(result)[0]
    (tmp_path / "r.json").write_text(json.dumps(result))
    with pytest.raises(BenchError):
        schema.read(tmp_path / "r.json")
    with pytest.raises(AssertionError):
        schema.write(result, tmp_path / "w.json")


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda r: r["rows"][0].pop("canvas"), "rows[0]: canvas_ms without canvas"),
        (lambda r: r["rows"][0].update(canvas=0), "rows[0]: canvas is 0"),
        (lambda r: r["rows"][0].update(components_ms={}), "rows[0].components_ms: attention is missing"),
        (
            lambda r: r["rows"][0]["components_ms"].update(head="x"),
            "rows[0].components_ms: head has type str",
        ),
        (lambda r: r["options"].update(model=" "), "options: model is empty"),
    ],
)
def test_values_of_a_step_that_do_not_go_together_get_a_line(place, change, line, capsys):
    result = copy.deepcopy(STEP)
    change(result)
    (place / "results" / "test" / "step.json").write_text(json.dumps(result))
    assert make(place) == 2
    assert f"step.json: not a result file of this bench: {line}" in capsys.readouterr().err


def test_step_results_have_a_schema_too():
    assert schema.violations(STEP) == []
    broken = copy.deepcopy(STEP)
    del broken["rows"][0]["floor_multiple"]
    assert "floor_multiple is missing" in schema.violations(broken)[0]
    broken = copy.deepcopy(STEP)
    broken["rows"][0]["step_ms"] = None
    assert "ok without step_ms" in schema.violations(broken)[0]
    broken["rows"][0]["status"] = "failed"
    assert schema.violations(broken) == []
    del broken["options"]["model"]
    assert "options: model is missing" in schema.violations(broken)[0]


def test_a_place_where_no_result_can_be_written_is_said_before_anything_is_measured(tmp_path):
    from bench.__main__ import main

    (tmp_path / "file").write_text("")
    for arguments, line in (
        (["--json", str(tmp_path)], "is a folder"),
        (["--json", str(tmp_path / "file" / "x.json")], "is a file, a folder is needed"),
        (["--plot", str(tmp_path / "file")], "is a file, a folder is needed"),
    ):
        options = bench_ops.parser().parse_args(arguments)
        with pytest.raises(BenchError, match=line):
            schema.check_targets(options.json, options.plot)
        assert main(["row_stats", "--device", "cpu", *arguments]) == 2
        assert main(["step", "--device", "cpu", *arguments]) == 2
    schema.check_targets(tmp_path / "new" / "folder" / "x.json", tmp_path / "plots")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]

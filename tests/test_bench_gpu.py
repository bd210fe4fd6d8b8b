"""The run for a machine with a GPU: its parts, its time budget and its summary, with the commands replaced."""

import functools
import sys
import time
import zipfile
from pathlib import Path

import pytest
import test_bench_report

from bench import gpu, schema
from bench.gpu import Outcome, Part

pytestmark = pytest.mark.source_tree

PARTS = gpu.all_parts((9, 0), Path("out"), python="python")


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def executor(clock, plan, seen):
    """Runs parts on a fake clock: plan maps a part's log name to (seconds it needs, exit status)."""

    def execute(command, environment, seconds, log):
        needs, code = plan.get(log.stem, (1.0, 0))
        seen.append((log.stem, round(seconds), command))
        clock.time += min(needs, seconds)
        return None if needs > seconds else code

    return execute


def test_without_a_gpu_it_says_so_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_facts", lambda: None)
    assert gpu.main([]) == 2 and gpu.sanitize([]) == 2
    assert capsys.readouterr().err.count("no NVIDIA GPU") == 2


def test_parts_in_order_with_the_architecture_of_the_gpu():
    names = [part.name for part in PARTS]
    assert names[:3] == ["build", "doctor", "test"]
    assert names[-1] == "step"
    assert set(gpu.OPS) < set(names)
    assert dict(PARTS[0].environment)["DGEMMA_ACCEL_CUDA_ARCHS"] == "90a"
    assert dict(gpu.all_parts((12, 0), Path("out"))[0].environment)["DGEMMA_ACCEL_CUDA_ARCHS"] == "120"
    assert "--no-build-isolation" in PARTS[0].command


def test_gpu_tests_run_in_several_processes_where_that_is_possible():
    assert gpu.side_by_side(16, True) == ("-n", "8", "--dist", "worksteal")
    assert gpu.side_by_side(5, True) == ("-n", "2", "--dist", "worksteal")
    assert gpu.side_by_side(16, False) == () and gpu.side_by_side(2, True) == ()
    assert "--timeout" in gpu.with_limits(True) and gpu.with_limits(False) == ()


def test_choosing_parts():
    chosen, problems = gpu.choose(PARTS, ["attention", "test"])
    assert [part.name for part in chosen] == ["test", "block_attention"] and not problems
    assert [part.name for part in gpu.choose(PARTS, ["ops"])[0]] == list(gpu.OPS)
    chosen, problems = gpu.choose(PARTS, ["tests", "step"])
    assert [part.name for part in chosen] == ["step"] and "unknown part 'tests'" in problems[0]
    assert gpu.choose(PARTS, [])[0] == PARTS


def test_a_failing_part_does_not_stop_the_others(tmp_path):
    clock, seen = Clock(), []
    parts = [Part(name, ("run", name), 1.0) for name in "abcd"]
    plan = {"a": (10, 1), "b": (500, 0), "c": (10, 0)}
    outcomes = gpu.run_parts(parts, 100, tmp_path, executor(clock, plan, seen), clock)
    assert [outcome.status for outcome in outcomes] == ["failed", "timeout", "ok", "ok"]
    # a may take 25 s and leaves 15 over; b is ended after a third of the 90 s left; c and d share what is then left.
    assert [seconds for _, seconds, _ in seen] == [25, 30, 30, 50]
    assert outcomes[0].code == 1 and outcomes[1].code is None
    assert clock.time <= 100


def test_each_outcome_is_told(tmp_path):
    clock, seen, told = Clock(), [], []
    parts = [Part("a", ("run",), 1.0), Part("b", ("run",), 1.0)]
    run = executor(clock, {"a": (1, gpu.INCOMPLETE)}, seen)
    outcomes = gpu.run_parts(parts, 100, tmp_path, run, clock, lambda so_far: told.append(len(so_far)))
    assert [outcome.status for outcome in outcomes] == ["incomplete", "ok"] and told == [1, 2]


def test_a_small_part_has_time_to_start(tmp_path):
    clock, seen = Clock(), []
    parts = [Part("a", ("run",), 0.1), Part("b", ("run",), 10.0)]
    gpu.run_parts(parts, 100, tmp_path, executor(clock, {}, seen), clock)
    assert [seconds for _, seconds, _ in seen] == [gpu.LEAST, 99]


def test_a_command_that_cannot_be_started_is_a_failed_part(tmp_path):
    parts = [Part("x", ("/nonexistent/program",), 1.0), Part("y", (sys.executable, "-c", ""), 1.0)]
    outcomes = gpu.run_parts(parts, 30, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["failed", "ok"] and outcomes[0].code == 127


def test_bench_parts_are_told_their_time():
    step = next(part for part in PARTS if part.name == "step")
    assert gpu.with_budget(step, 100)[-2:] == ("--budget", "80")
    assert gpu.with_budget(PARTS[0], 100) == PARTS[0].command


def test_a_part_that_hangs_is_ended_with_its_children_and_its_output_kept(tmp_path):
    code = (
        "import subprocess, sys, time; print('begun', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    begun = time.monotonic()
    status = gpu.run_process((sys.executable, "-c", code), {}, 1.0, tmp_path / "log")
    assert status is None and time.monotonic() - begun < 45
    assert (tmp_path / "log").read_text() == "begun\n"
    assert gpu.run_process((sys.executable, "-c", "raise SystemExit(3)"), {}, 30.0, tmp_path / "log") == 3


def test_a_part_does_not_wait_for_what_it_left_running(tmp_path):
    code = (
        "import subprocess, sys; print('done', flush=True); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    )
    begun = time.monotonic()
    assert gpu.run_process((sys.executable, "-c", code), {}, 30.0, tmp_path / "log") == 0
    assert time.monotonic() - begun < 20 and (tmp_path / "log").read_text() == "done\n"


def test_main_runs_all_parts_and_leaves_a_summary(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "device_facts", lambda: {"name": "NVIDIA Test", "capability": (9, 0)})

    def run_parts(parts, seconds, out, tell):
        seen.extend(part.name for part in parts)
        assert seconds == 60 * 9 and out == tmp_path
        (out / "row_stats.json").write_text("{}")
        return [Outcome(part.name, "ok" if part.name != "commit" else "failed", 0, 2.0) for part in parts]

    monkeypatch.setattr(gpu, "run_parts", run_parts)
    assert gpu.main(["--parts", "row_stats", "commit"]) == 1
    assert seen == ["row_stats", "commit"]
    summary = (tmp_path / "summary.md").read_text()
    assert "NVIDIA Test, compute capability 9.0" in summary and "commit: failed" in summary
    assert "row_stats.json: not a result file" in summary
    assert (tmp_path / "summary.json").exists()
    assert gpu.main(["--parts", "nothing"]) == 2
    assert "unknown part 'nothing'" in capsys.readouterr().err
    seen.clear()
    monkeypatch.setattr(gpu, "_installed", lambda module: False)
    assert gpu.main(["--parts", "commit"]) == 1
    assert seen == ["build", "commit"] and "it is built first" in capsys.readouterr().out


def fake_run(monkeypatch, folder, result, parts=()):
    """`bench gpu` with parts that write their files at once; the greatest number of files in the folder on its way."""
    most = 0

    def execute(command, environment, seconds, log):
        nonlocal most
        log.write_text("said\n")
        if "--json" in command:
            schema.write(result, Path(command[command.index("--json") + 1]))
        most = max(most, len(list(folder.rglob("*"))) + 1)
        return 0

    monkeypatch.setattr(gpu, "device_facts", lambda: {"name": "NVIDIA Test", "capability": (9, 0)})
    monkeypatch.setattr(gpu, "_installed", lambda module: True)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "run_parts", functools.partial(gpu.run_parts, execute=execute))
        assert gpu.main(["--parts", *parts]) == 0
    return most


STEP = test_bench_report.STEP
OPS = test_bench_report.OPS


def test_a_whole_run_leaves_few_files_where_only_few_may_be(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    most = fake_run(monkeypatch, tmp_path, OPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.zip", "summary.json", "summary.md"]
    # One more was counted for what is being written.
    assert most <= 8
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        names = set(archive.namelist())
        assert names == {
            *(f"{part.name}.log" for part in PARTS),
            *(part.result for part in PARTS if part.result),
        }
        assert schema.parse(archive.read("commit.json").decode(), Path("x")) == OPS
    assert (tmp_path / "summary.md").read_text().count("123 us") == len(gpu.OPS) + 1
    # Another run adds to it, and speaks for itself alone.
    fake_run(monkeypatch, tmp_path, STEP, ["step"])
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert set(archive.namelist()) == names
        assert schema.parse(archive.read("step-full.json").decode(), Path("x")) == STEP
    summary = (tmp_path / "summary.md").read_text()
    assert "20.50 ms" in summary and "500 launches, 0 host syncs" in summary and "123 us" not in summary


def test_a_run_that_is_ended_leaves_the_files_of_every_part(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))

    class Ended(BaseException):
        pass

    right = gpu.replace_file

    def ended(path, data):
        if path.name == "results.zip" and b"commit.log" in data:
            path.with_name(path.name + ".part").write_bytes(data[:50])
            raise Ended
        right(path, data)

    monkeypatch.setattr(gpu, "replace_file", ended)
    with pytest.raises(Ended):
        fake_run(monkeypatch, tmp_path, OPS, ["row_stats", "commit"])
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert set(archive.namelist()) == {"row_stats.log", "row_stats.json"}
    assert (
        schema.read(tmp_path / "commit.json") == OPS
        and "row_stats: ok" in (tmp_path / "summary.md").read_text()
    )


def test_the_folder_of_a_device_gets_a_file_for_each_part_and_old_ones_stay(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    folder = tmp_path / "bench" / "results" / "test"
    old = {**OPS, "rows": [{**OPS["rows"][0], "median_us": 987.0}]}
    for name in ("block_attention", "commit", "ops-shared"):
        schema.write(old, folder / f"{name}.json")

    monkeypatch.setattr(gpu, "device_facts", lambda: {"name": "NVIDIA Test", "capability": (9, 0)})
    monkeypatch.setattr(gpu, "_installed", lambda module: True)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "run_parts", functools.partial(gpu.run_parts, execute=lambda *_: 1))
        assert gpu.main(["--parts", "attention"]) == 1
    summary = (folder / "summary.md").read_text()
    assert "block_attention: failed" in summary and "us" not in summary.split("failed")[1]
    fake_run(monkeypatch, folder, OPS, ["commit"])
    summary = (folder / "summary.md").read_text()
    assert summary.count("123 us") == 1 and "987 us" not in summary
    assert schema.read(folder / "block_attention.json") == schema.read(folder / "ops-shared.json") == old
    names = {path.name for path in folder.iterdir()}
    assert {"commit.json", "commit.log", "summary.md", "summary.json"} < names and "results.zip" not in names


def test_sanitizer_runs_the_gpu_tests_under_each_tool():
    parts = gpu.sanitizer_parts("compute-sanitizer", ["memcheck", "racecheck"], ["tests"], python="python")
    assert [part.name for part in parts] == ["memcheck", "racecheck"]
    for part in parts:
        assert part.command[:3] == ("compute-sanitizer", "--tool", part.name)
        # A graph cannot hold what is allocated without the cache.
        command = ("python", "-m", "pytest", "-m", "gpu and not capture")
        assert part.command[part.command.index("python") :][:5] == command
        assert dict(part.environment)["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--minutes", "-1"]])
def test_a_budget_of_nothing_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "device_facts", lambda: {"name": "NVIDIA Test", "capability": (9, 0)})
    assert gpu.main(arguments) == 2
    assert "--minutes: must be above 0" in capsys.readouterr().err

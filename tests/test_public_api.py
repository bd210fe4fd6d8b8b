"""The public face: names, importing without a GPU or transformers, the commands, the names of installed packages."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgemma_accel
from dgemma_accel import backends
from dgemma_accel.__main__ import main

OPS = ("block_attention", "row_stats", "top_k_top_p", "commit", "head_stats", "soft_embedding", "experts")


def python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_all_names_exist_and_are_documented():
    for name in dgemma_accel.__all__:
        assert hasattr(dgemma_accel, name)
    for name in (*OPS, "accelerate", "restore", "accelerated", "merge_stats"):
        assert name in dgemma_accel.__all__
        text = inspect.getdoc(getattr(dgemma_accel, name))
        assert text and len(text) > 80, name


@pytest.mark.parametrize(
    "op, names",
    [
        (
            "block_attention",
            "query key value prefix_key prefix_value prefix_start prefix_end scale softcap causal return_lse backend",
        ),
        ("row_stats", "logits temperature stats_temperature softcap uniform seed offset backend"),
        ("top_k_top_p", "logits top_k top_p top_k_first temperature softcap backend"),
        ("commit", "tokens stats rule write candidates seed offset backend"),
        ("head_stats", "hidden weight softcap temperature uniform backend"),
        ("soft_embedding", "logits stats weight softcap temperature tolerance backend"),
        ("experts", "hidden index weights gate_up down activation backend"),
        ("accelerate", "model backend"),
        ("restore", "model"),
    ],
)
def test_stable_signatures(op, names):
    parameters = inspect.signature(getattr(dgemma_accel, op)).parameters
    assert [name for name in parameters if name in names.split()] == names.split()
    if "backend" in names:
        assert (
            parameters["backend"].default == "auto"
            and parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
        )


def test_ops_are_registered_and_documented_alike():
    for op in OPS:
        assert hasattr(torch.ops.dgemma, op)
        assert {"reference"} <= set(backends.MODULES[op]) <= set(backends.BACKENDS)
        text = inspect.getdoc(getattr(dgemma_accel, op))
        for section in ("Args:", "Returns:", "Raises:", "Source:"):
            assert section in text, (op, section)


def test_docstrings_name_the_backends_that_there_are():
    for op in OPS:
        text = inspect.getdoc(getattr(dgemma_accel, op))
        if op == "head_stats":
            assert "The others as in `row_stats`." in text
            text = inspect.getdoc(dgemma_accel.row_stats)
        (line,) = re.findall(r"^ +backend: (.+)$", text, re.MULTILINE)
        assert re.findall('"(.+?)"', line) == ["auto", *backends.MODULES[op]], op


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("backend", None, "backend: a string expected, got NoneType"),
        ("backend", ["cpp"], "backend: a string expected, got list"),
        ("check", "no", "check: a bool expected, got str"),
        ("causal", 1, "causal: a bool expected, got int"),
        ("return_lse", "no", "return_lse: a bool expected, got str"),
        ("keep_logits", None, "keep_logits: a bool expected, got NoneType"),
        ("exact", "no", "exact: a bool expected, got str"),
    ],
)
def test_switches_of_a_wrong_type_are_told_by_name(name, value, message):
    table, tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    stats = dgemma_accel.row_stats(table, seed=0)
    calls = {
        "block_attention": (table[None],) * 3,
        "row_stats": (table,),
        "commit": (tokens, stats, dgemma_accel.samplers.TopK(1), dgemma_accel.samplers.Keep()),
        "head_stats": (table, table[0]),
        "soft_embedding": (table, stats, torch.zeros(4, 4)),
        "experts": (
            table[0],
            tokens[0, :, None],
            table[0, :, :1],
            torch.zeros(1, 2, 4),
            torch.zeros(1, 4, 1),
        ),
    }
    taken = 0
    for op, arguments in calls.items():
        function = getattr(dgemma_accel, op)
        function(*arguments)
        if name in inspect.signature(function).parameters:
            taken += 1
            with pytest.raises(TypeError, match=message):
                function(*arguments, **{name: value})
    assert taken == (6 if name in ("backend", "check") else 1)


def test_types_are_told_to_a_type_checker():
    # Without this file mypy takes everything of the package for Any, and says that it is missing.
    assert (Path(dgemma_accel.__file__).parent / "py.typed").is_file()


def test_import_touches_no_gpu_no_triton_no_compiler_and_no_transformers():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import dgemma_accel\n"
        "assert not torch.cuda.is_initialized()\n"
        "slow = {'transformers', 'triton', 'torch._dynamo', 'dgemma_accel._C', 'dgemma_accel.triton_kernels'}\n"
        "print(sorted(slow & (set(sys.modules) - before)))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_ops_work_without_transformers():
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import torch, dgemma_accel\n"
        "dgemma_accel.row_stats(torch.zeros(2, 5), seed=0)\n"
        "try:\n"
        "    dgemma_accel.accelerate(torch.nn.Linear(1, 1))\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "transformers" in result.stdout and "5.17" in result.stdout


def test_short_name_of_the_triton_folder_is_not_ours():
    code = "import importlib.util; print(importlib.util.find_spec('triton_kernels'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert result.stdout.strip() == "None" or "dgemma" not in result.stdout


def test_doctor():
    result = subprocess.run(
        [sys.executable, "-m", "dgemma_accel", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    for op in OPS:
        row = report["backends"][op]["cpu"]
        assert (
            row["auto"] in backends.BACKENDS and row["why"] and set(row["all"]) == set(backends.MODULES[op])
        )
    assert report["extension"]["built"], report["extension"]
    assert report["backends"]["row_stats"]["cpu"]["auto"] == "cpp"
    if not torch.cuda.is_available():
        assert any("no NVIDIA GPU" in line for line in report["missing"])
    text = subprocess.run(
        [sys.executable, "-m", "dgemma_accel", "doctor"], capture_output=True, text=True, timeout=120
    )
    assert "row_stats on cpu: auto takes cpp" in text.stdout


def test_doctor_of_an_extension_built_without_nvcc(monkeypatch):
    extension = pytest.importorskip("dgemma_accel._C")
    from dgemma_accel.cli import doctor

    for name in ("CUDA_ARCHS", "CUDA_KERNELS"):
        monkeypatch.delattr(extension, name, raising=False)
    found = doctor._extension()
    assert found["built"] and found["cuda_archs"] == [] and found["cuda_kernels"] == 0
    assert found["host_instruction_sets"]


@pytest.mark.parametrize("name", ["triton", "transformers", "numpy"])
def test_doctor_lists_a_package_that_is_missing(monkeypatch, name):
    from dgemma_accel.cli import doctor

    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda one: None if one == name else version(one))
    assert any(line.startswith(name) and "pip install" in line for line in doctor.examine()["missing"])


def test_generate_says_what_is_wrong():
    command = [sys.executable, "-m", "dgemma_accel", "generate", "--model", "no-such-folder", "--prompt", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_offline())
    assert result.returncode == 2 and "--model no-such-folder" in result.stdout


def test_generate_prints_brackets_as_they_are(capsys):
    pytest.importorskip("rich")
    from dgemma_accel.cli.generate import Answer, show_table

    answer = Answer("an [red]answer[/x]", 1, 2.0, 0.5)
    show_table(["copy [/x]"], {"reference": [answer]}, expected=["[bold]more"])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("copy [/x]", "an [red]answer[/x]", "[bold]more"))


def test_generate_refuses_a_backend_in_one_line(capsys, monkeypatch):
    from dgemma_accel.cli import generate

    monkeypatch.setattr(generate, "load", lambda *_, **__: (None, None))

    def compare(*_, backend, **__):
        raise backends.BackendError(f"backend {backend!r} cannot accelerate a model here")

    monkeypatch.setattr(generate, "compare", compare)
    assert main(["generate", "--model", "x", "--prompt", "y", "--backend", "reference"]) == 2
    assert capsys.readouterr().out == "generate: backend 'reference' cannot accelerate a model here\n"


def test_generate_takes_no_failure_of_a_decoder_for_a_bad_argument(monkeypatch):
    from dgemma_accel.cli import generate

    monkeypatch.setattr(generate, "load", lambda *_, **__: (None, None))
    # As PyTorch's compiler raises where it reads what another program wrote.
    monkeypatch.setattr(generate, "compare", lambda *_, **__: b"\xff".decode())
    with pytest.raises(UnicodeDecodeError):
        main(["generate", "--model", "x", "--prompt", "y"])


def test_generate_refuses_a_backend_before_it_reads_a_model(capsys, monkeypatch):
    from dgemma_accel.cli import generate

    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("the model was read"))
    assert main(["generate", "--model", "x", "--prompt", "y", "--backend", "cude"]) == 2
    assert capsys.readouterr().out.startswith("generate: backend: must be one of")


def _offline():
    import os

    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def test_auto_logs_its_choice_once(caplog):
    backends._logged.clear()
    with caplog.at_level("INFO", logger="dgemma_accel"):
        for _ in range(3):
            dgemma_accel.row_stats(torch.zeros(2, 5), seed=0)
    assert len([record for record in caplog.records if "row_stats on cpu" in record.getMessage()]) == 1


def test_a_named_backend_says_what_is_required_supported_and_missing(monkeypatch):
    class Module:
        FEATURES = {"dtype": frozenset({torch.bfloat16}), "device": ("cpu",)}

    implementation = backends.Implementation("row_stats", "cpp", lambda *a: None, Module)
    monkeypatch.setattr(backends, "load", lambda op, backend: (implementation, None))
    with pytest.raises(backends.BackendError, match="dtype: required float16, supported {bfloat16}"):
        backends.choose("row_stats", "cpp", {"device": "cpu", "dtype": torch.float16})
    assert (
        backends.choose("row_stats", "cpp", {"device": "cpu", "dtype": torch.bfloat16}).reason == "asked for"
    )


@pytest.mark.parametrize("op", backends.MODULES)
def test_native_backends_run_on_their_own_device_only(op):
    for name, own, other in (("cpp", "cpu", "cuda"), ("cuda", "cuda", "cpu")):
        if name in backends.MODULES[op]:
            module = importlib.import_module(backends.MODULES[op][name])
            implementation = backends.Implementation(op, name, None, module)
            assert implementation.missing({"device": own}) == []
            assert implementation.missing({"device": other}) == [
                f"device: required {other}, supported {{{own}}}"
            ]
    if not torch.cuda.is_available():
        assert backends.load(op, "cuda")[0] is None


def test_the_environment_says_nothing_of_ops_without_its_backend(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cpp")
    rows, chosen = torch.randn(2, 16), torch.zeros(2, 1, dtype=torch.int64)
    arguments = rows, chosen, torch.ones(2, 1), torch.randn(1, 8, 16), torch.randn(1, 16, 4)
    dgemma_accel.experts(*arguments)
    with pytest.raises(backends.BackendError, match="experts has no cpp implementation"):
        dgemma_accel.experts(*arguments, backend="cpp")
    assert backends.requested("auto", "row_stats") == "cpp"


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "")
    assert backends.requested("auto") == "auto"
    dgemma_accel.row_stats(torch.randn(2, 5), seed=0)


def test_ops_are_not_differentiable_and_say_so():
    logits = torch.randn(2, 5, requires_grad=True)
    stats = dgemma_accel.row_stats(logits, seed=0)
    assert stats.entropy.requires_grad and not stats.argmax.requires_grad
    with pytest.raises(RuntimeError, match="dgemma::row_stats is not differentiable"):
        stats.entropy.sum().backward()
    with torch.no_grad():
        assert not dgemma_accel.row_stats(logits, seed=0).entropy.requires_grad


def test_numbers_are_kept_between_calls_but_not_in_a_traced_graph():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dgemma_accel.ops import checks

    logits = torch.randn(2, 5)
    with torch.inference_mode():
        first = dgemma_accel.row_stats(logits, temperature=0.123, seed=3)
    assert not checks.constant(0.123, torch.float32).is_inference()
    again = dgemma_accel.row_stats(logits, temperature=0.123, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with FakeTensorMode():
        stats = dgemma_accel.row_stats(torch.empty(2, 5), temperature=0.123, seed=3)
    assert type(stats.entropy) is not torch.Tensor
    # This mode takes tensors that are not fake, and makes fakes of numbers all the same.
    with FakeTensorMode(allow_non_fake_inputs=True):
        dgemma_accel.row_stats(logits, temperature=0.321, seed=4)
    for kept in (checks.constant(0.321, torch.float32), checks.constant(4, torch.int64)):
        assert type(kept) is torch.Tensor


def test_the_backend_named_by_the_environment_may_change_between_calls(monkeypatch):
    taken = []
    run = backends.pick

    def pick(*arguments):
        taken.append(run(*arguments).__module__.rsplit(".", 1)[-1])
        return run(*arguments)

    monkeypatch.setattr("dgemma_accel.ops.row_stats.pick", pick)
    for name in ("reference", "cpp", "reference"):
        if backends.load("row_stats", name)[0] is None:
            continue
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
        dgemma_accel.row_stats(torch.randn(2, 5), seed=0)
    assert taken in (["row_stats", "row_stats_cpp", "row_stats"], ["row_stats", "row_stats"])

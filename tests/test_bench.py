"""The op bench: it checks before it times, counts what it says it counts, and serves bad requests with a line."""

import json
import sys
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import dgemma_accel
from bench import (
    INCOMPLETE,
    OPS,
    bench_block_attention,
    bench_commit,
    bench_experts,
    bench_feed_forward,
    bench_head_stats,
    bench_linears,
    bench_ops,
    bench_row_stats,
    bench_soft_embedding,
    bench_top_k_top_p,
    ceilings,
    environment,
    memory,
    peers,
    planted,
    runner,
    schema,
    timing,
)
from bench.cases import Case, Sizes, Variant, disagreement
from bench.peers import liger, published_samplers, sdpa, torch_chain, torch_compile

pytestmark = pytest.mark.source_tree

CPU = torch.device("cpu")
LIMITS = ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11, "bfloat16": 1e11})


@pytest.fixture
def fixed_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda device, quick=False: LIMITS)


def run(arguments, tmp_path):
    path = tmp_path / "result.json"
    code = bench_ops.main([*arguments, "--device", "cpu", "--quick", "--json", str(path)])
    return code, json.loads(path.read_text()) if path.exists() else None


def test_a_run_writes_a_result_of_the_schema(tmp_path, capsys, fixed_ceilings):
    code, result = run(["row_stats", "commit", "--rows", "6", "--vocab", "997", "--batch", "2"], tmp_path)
    assert code == 0
    assert schema.violations(result) == []
    rows = {(row["op"], row["case"], row["backend"]): row for row in result["rows"]}
    row = rows["row_stats", "half settled", "reference"]
    assert row["shape"] == "[6, 997]" and row["dtype"] == "fp32"
    assert row["bytes"] == 6 * 997 * 4 + 6 * bench_row_stats.OUTPUT_BYTES_PER_ROW
    assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert row["roofline_percent"] == pytest.approx(100 * (row["bytes"] / 1e10 * 1e6) / row["median_us"])
    chain = next(peer for peer in row["peers"] if peer["variant"] == "transformers chain")
    assert chain["ratio"] == pytest.approx(chain["median_us"] / row["median_us"])
    assert ("commit", "threshold, remask", "reference") in rows
    assert "peer torch_compile skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["row_stat"], "unknown op 'row_stat'"),
        (["--peer", "nobody"], "unknown peer 'nobody'"),
        (["--rows", "0"], "--rows: must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds: must be a time above 0, got 0"),
        (["block_attention", "--context", "-5"], "--context: must be at least 1"),
        (["block_attention", "--context", "100000000000"], "does not fit"),
    ],
)
def test_bad_requests_get_a_line_and_status_2_and_the_rest_runs(
    arguments, line, tmp_path, capsys, fixed_ceilings
):
    if "block_attention" in arguments:
        small = [
            case for case in bench_block_attention.cases(CPU, Sizes(quick=True))[0] if "D512" in case.shape
        ]
        assert small, "the default cases hold what --context replaces"
    peers_wanted = [] if "--peer" in arguments else ["--peer", "none"]
    code, result = run(["commit", "--batch", "1", *peers_wanted, *arguments], tmp_path)
    assert code == 2
    assert line in capsys.readouterr().err
    assert line in " ".join(result["problems"])
    assert any(row["op"] == "commit" and row["status"] == "ok" for row in result["rows"])


@pytest.mark.parametrize(
    "name, line", [("fpga", "unknown backend 'fpga'"), ("cuda", "what can be timed here")]
)
def test_nothing_is_timed_for_backends_that_are_not_here(name, line, capsys, fixed_ceilings):
    assert bench_ops.main(["commit", "--device", "cpu", "--backend", name]) == 2
    out, err = capsys.readouterr()
    assert line in err and "median" not in out


def test_help_lists_the_commands(capsys):
    from bench.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for name in ("step", "report", "tune", "auto", "gpu", "sanitize"):
        assert f"python -m bench {name} " in text
    assert all(op in text for op in OPS) and max(map(len, text.splitlines())) < 120


def test_a_lost_device_leaves_what_was_measured(tmp_path, monkeypatch, fixed_ceilings):
    arguments = ["row_stats", "commit", "--rows", "6", "--vocab", "97", "--batch", "2", "--peer", "none"]
    written = []
    right = runner.Runner.run

    def lost_in_the_second(self, case):
        if not written:
            written.append(None)
            return right(self, case)
        written.append(json.loads((tmp_path / "result.json").read_text()))
        raise runner.DeviceLost("the GPU was lost in a case", [], ["a case: illegal access"])

    monkeypatch.setattr(runner.Runner, "run", lost_in_the_second)
    code, result = run(arguments, tmp_path)
    assert code == 1 and len(written) == 2
    assert schema.violations(written[1]) == [] and written[1]["rows"] == result["rows"] != []
    assert result["problems"][:2] == ["a case: illegal access", "the GPU was lost in a case"]
    assert result["problems"][2:] and all("not reached: the GPU" in line for line in result["problems"][2:])


def test_a_budget_too_short_is_no_failure(tmp_path, fixed_ceilings):
    code, result = run(["commit", "--batch", "2", "--budget", "0"], tmp_path)
    assert code == INCOMPLETE and result["rows"] == []
    assert result["problems"] and all(runner.NOT_REACHED in line for line in result["problems"])
    assert runner.exit_status([], [*result["problems"], "x is wrong"]) == 1
    assert runner.exit_status(["refused"], result["problems"]) == 2 and runner.exit_status([], []) == 0


def test_the_commit_is_what_was_told_or_what_the_repository_says(monkeypatch):
    monkeypatch.delenv("DGEMMA_ACCEL_COMMIT", raising=False)
    for says, expected in ((None, (None, None)), ("def\n", ("def", False))):
        monkeypatch.setattr(environment, "_output", lambda *command, says=says: says)
        assert environment.commit() == expected
    for told, clean in (("abc", True), ("abc+", False)):
        monkeypatch.setenv("DGEMMA_ACCEL_COMMIT", told)
        assert environment.commit() == ("abc", clean)


def test_cuda_without_a_gpu_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench_ops.main(["commit", "--device", "cuda"]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def wrong_case(error) -> Case:
    """row_stats with a backend at a temperature `error` too high beside one that is right."""

    def wrong(inputs):
        return lambda: dgemma_accel.row_stats(
            inputs.logits,
            temperature=inputs.temperature * error,
            softcap=inputs.softcap,
            uniform=inputs.uniform,
            backend="reference",
        )

    case = bench_row_stats.cases(CPU, Sizes(rows=8, vocab=500, quick=True))[0][0]
    right = next(variant for variant in case.backends if variant.name == "reference")
    return Case(**{**vars(case), "backends": (Variant("wrong", wrong), right)})


def test_a_wrong_kernel_prints_its_error_instead_of_a_time():
    rows, problems = runner.Runner(CPU, LIMITS, [], quick=True).run(wrong_case(1.1))
    wrong, right = rows
    assert wrong["status"] == "wrong" and wrong["median_us"] is None and "entropy" in wrong["error"]
    assert right["status"] == "ok" and right["median_us"] > 0
    assert "wrong is wrong" in problems[0]
    from bench import table

    lines = "\n".join(table.case_lines(rows))
    assert f"wrong wrong: {wrong['error']}" in lines


def test_a_kernel_that_raises_fails_alone():
    def broken(inputs):
        raise RuntimeError("launch failed\nwith details")

    case = wrong_case(1.0)
    case = Case(**{**vars(case), "backends": (Variant("broken", broken), case.backends[1])})
    rows, problems = runner.Runner(CPU, LIMITS, [], quick=True).run(case)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["error"] == "RuntimeError: launch failed" and len(problems) == 1


@pytest.mark.parametrize("breaks", ["prepared again", "called again"])
@pytest.mark.parametrize("whose", ["peer", "backend"])
def test_a_variant_that_breaks_when_it_is_used_again_fails_alone(whose, breaks):
    prepared = []

    def prepare(inputs):
        prepared.append(inputs)
        again = len(prepared) > 1
        if again and breaks == "prepared again":
            raise torch.OutOfMemoryError("no room for a second set")

        def call():
            if again:
                raise RuntimeError("no plan found")
            return right.prepare(inputs)()

        return call

    case = wrong_case(1.0)
    right, fragile = case.backends[1], Variant("fragile", prepare)
    case = Case(**{**vars(case), "backends": (right, fragile) if whose == "backend" else (right,)})
    peer = SimpleNamespace(NAME="peer", variants=lambda case, inputs: [fragile] if whose == "peer" else [])
    rows, problems = runner.Runner(CPU, LIMITS, [peer], quick=True).run(case)
    assert rows[0]["status"] == "ok" and rows[0]["median_us"] > 0
    failed = rows[0]["peers"][0] if whose == "peer" else rows[1]
    assert failed["status"] == "failed" and failed["median_us"] is None
    assert ("no plan found" if breaks == "called again" else "no room") in failed["error"]
    assert len(problems) == (whose == "backend")


SMALL = {"quick": True, "rows": 4, "vocab": 640, "batch": 1}


@pytest.mark.parametrize(
    "module",
    [bench_row_stats, bench_commit, bench_head_stats, bench_soft_embedding],
    ids=lambda m: m.__name__,
)
def test_every_backend_of_a_small_case_is_right_and_a_zeroed_result_is_not(module):
    cases, _ = module.cases(CPU, Sizes(**SMALL))
    case = cases[0]
    inputs = case.make(CPU, 0)
    for variant in case.backends:
        result = variant.prepare(inputs)()
        assert case.check(result, inputs) == [], variant.name
        assert case.check(_zeroed(result), inputs), variant.name


def _zeroed(result):
    if isinstance(result, torch.Tensor):
        return torch.zeros_like(result)
    if isinstance(result, dgemma_accel.CommitResult):
        return dgemma_accel.CommitResult(
            *(_zeroed(v) for v in (result.tokens, result.committed, result.num_committed))
        )
    if isinstance(result, dgemma_accel.RowStats):
        return type(result)(*(_zeroed(field) for field in result))
    return tuple(_zeroed(part) for part in result)


def test_attention_and_experts_cases_judge_by_their_error():
    inputs = bench_block_attention.make_inputs(2, 2, 32, 40, True, torch.float32, CPU, 0)
    output, lse = bench_block_attention.variant("reference").prepare(inputs)()
    assert bench_block_attention.check((output, lse), inputs) == []
    assert bench_block_attention.check((output * 1.01, lse), inputs)
    small = bench_experts.make_inputs(4, 16, 8, True, torch.float32, CPU, 0)
    result = bench_experts.variant("reference").prepare(small)()
    assert bench_experts.check(result, small) == []
    assert bench_experts.check(result * 1.01, small)
    small = bench_experts.make_inputs(4, 16, 96, True, torch.float32, CPU, 0, "FP8")
    assert small.gate_up.dtype == torch.float8_e4m3fn and small.gate_up_scale.shape == (16, 2, 22)
    result = bench_experts.variant("reference").prepare(small)()
    assert bench_experts.check(result, small) == []
    # As large as with plain weights, and wrong where a scale is.
    assert 0.01 < float(result.std()) < 1
    small.down_scale[:, 0].mul_(1.01)
    assert bench_experts.check(result, small)


def test_products_side_by_side_judge_by_their_error(monkeypatch):
    """Their cases are a GPU's; what they make, run and check is not."""
    for cases in (bench_linears.cases, bench_feed_forward.cases):
        found, lines = cases(CPU, Sizes())
        assert not found and len(lines) == 1 and "side by side" in lines[0]
    multiplies = False
    monkeypatch.setattr(bench_linears, "multiplies_fp8", lambda device: multiplies)
    monkeypatch.setattr(bench_linears, "way_of", lambda device, dtype: "by row")
    found, lines = bench_linears.cases(torch.device("cuda"), Sizes())
    assert lines == ["linears: below compute capability 8.9 rows are not rounded to FP8"]
    assert [case.title for case in found[:3]] == [
        "linears [256, 2816] x 4096 + 2048 + 2048 bf16 sliding layer",
        "linears [256, 2816] x 8192 + 1024 bf16 global layer",
        "linears [256, 4096] x 2816 bf16 output projection, sliding layer",
    ]
    assert found[0].flops == 2 * 256 * 2816 * 8192 and found[2].flops == 2 * 256 * 4096 * 2816
    assert [len(case.backends) for case in found] == [3, 3, 1, 1, 1, 1]
    inputs = bench_linears.make_inputs(5, 40, (7, 3), torch.float32, CPU, 0)
    for variant in bench_linears.VARIANTS:
        results = variant.prepare(inputs)()
        assert found[0].check(results, inputs) == []
        assert found[0].check([results[0] * 1.01, results[1]], inputs)
    multiplies = True
    found, lines = bench_linears.cases(torch.device("cuda"), Sizes())
    assert lines == ["linears: scales of FP8 weights are applied by row"]
    scaled = found[6:]
    assert [case.label for case in scaled] == [f"{case.label}, FP8 weights" for case in found[:5]]
    assert scaled[0].flops == found[0].flops and found[0].bytes / 2 < scaled[0].bytes < 0.6 * found[0].bytes
    inputs = bench_linears.make_inputs(5, 48, (32, 16), torch.float32, CPU, 0, scaled=True)
    for variant in bench_linears.SCALED:
        results = variant.prepare(inputs)()
        assert scaled[0].check(results, inputs) == []
    assert scaled[0].check([results[0] * 1.01, results[1]], inputs)
    for form in bench_feed_forward.FORMS.values():
        inputs = bench_feed_forward.make_inputs(4, 16, 96, 20, torch.float32, CPU, 0, form)
        mlp, mixture = bench_feed_forward.variants(["reference"])[0].prepare(inputs)()
        assert bench_feed_forward.check((mlp, mixture), inputs) == []
        for wrong in ((mlp * 1.01, mixture), (mlp, mixture * 1.01), (mixture, mlp)):
            assert bench_feed_forward.check(wrong, inputs)
    found, _ = bench_feed_forward.cases(torch.device("cuda"), Sizes())
    assert [case.label for case in found] == list(bench_feed_forward.FORMS)
    names = [variant.name for variant in bench_feed_forward.variants(["triton"])]
    assert names == ["triton", "triton in turn"]


def test_nvfp4_experts_cases_judge_by_their_error():
    small = bench_experts.make_inputs(4, 16, 96, True, torch.float32, CPU, 0, "NVFP4")
    assert small.gate_up.dtype == torch.uint8 and small.gate_up_scale.shape == (16, 192, 176)
    result = bench_experts.variant("reference").prepare(small)()
    assert bench_experts.check(result, small) == []
    assert 0.01 < float(result.std()) < 1
    small.down_global_scale.mul_(1.01)
    assert bench_experts.check(result, small)


def test_the_floor_of_quantised_experts_counts_weights_and_scales():
    cases = {case.label: case for case in bench_experts.cases(torch.device("cuda"), Sizes())[0]}
    plain, fp8, nvfp4 = (cases["uniform routing" + end] for end in ("", ", FP8 weights", ", NVFP4 weights"))
    rows = 2 * 256 * 2816 * 2
    assert plain.bytes - rows == 128 * 3 * 704 * 2816 * 2
    assert fp8.bytes - rows == 128 * 3 * 704 * 2816 + 128 * (11 * 22 + 22 * 6) * 4
    assert nvfp4.bytes - rows == 128 * 3 * 704 * 2816 * 9 / 16 + 128 * 2 * 4
    assert nvfp4.flops == fp8.flops == plain.flops


def test_the_floor_of_few_rows_counts_the_experts_they_choose():
    one, few, all_rows = (
        bench_experts.cases(torch.device("cuda"), Sizes(rows=rows))[0][0] for rows in (1, 8, 256)
    )
    expert = 3 * 704 * 2816 * 2
    assert one.bytes == 8 * expert + 2 * 2816 * 2
    # 8 rows of 8 of 128: each expert is left out with probability (15/16)^8.
    assert few.bytes == pytest.approx(128 * (1 - (15 / 16) ** 8) * expert, rel=0.05)
    assert all_rows.bytes > 127.9 * expert


def test_attention_traffic_leaves_out_what_padding_hides():
    case = {
        case.label: case
        for case in bench_block_attention.cases(CPU, Sizes())[0]
        if "prefix 1024" in case.shape
    }
    assert case["padded"].flops < 4 * case[""].flops
    single = 4 * 16 * 256 * (1024 + 256) * 512
    assert case[""].flops == single


def test_planted_rows_have_the_confidence_that_their_name_says():
    for name, fraction in planted.MIXES.items():
        logits = planted.logits(16, 4096, fraction, torch.float32, CPU, 3)
        stats = dgemma_accel.row_stats(logits, temperature=0.6, softcap=30.0, seed=0, backend="reference")
        assert int((stats.top1_prob > 0.99).sum()) == 16 * fraction, name
        assert int((stats.entropy > 1).sum()) == 16 * (1 - fraction), name
    weight = planted.head(4096, 256, torch.float32, CPU, 1)
    hidden = planted.hidden_states(weight, 16, 0.5, 2)
    stats = dgemma_accel.row_stats(
        hidden @ weight.T, temperature=0.6, softcap=30.0, seed=0, backend="reference"
    )
    assert int((stats.top1_prob > 0.99).sum()) == 8
    one, other = (planted.logits(2, 64, 0.0, torch.float32, CPU, seed) for seed in (1, 2))
    assert not torch.equal(one, other)


def test_variants_are_timed_in_turn():
    order = []
    calls = {name: ([lambda name=name: order.append(name)], False) for name in "ab"}
    found = timing.measure(calls, CPU, seconds=0, least=3)
    # One warm-up call each, then a sample of each in turn.
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert found["a"].runs == 3 and found["a"].method == "clock"


def test_a_variant_that_fails_while_timed_leaves_the_others():
    state = {"calls": 0}

    def breaks():
        state["calls"] += 1
        if state["calls"] == 3:
            raise RuntimeError("third call")

    found = timing.measure(
        {"bad": ([breaks], False), "good": ([lambda: None], False)}, CPU, seconds=0, least=4
    )
    assert isinstance(found["bad"], RuntimeError) and found["good"].runs == 4


def test_a_replay_counts_as_all_the_time_that_its_calls_took(monkeypatch):
    class Replayed:
        """A graph of 50 calls of 270 us each."""

        method, calls_a_sample = "graph", 50

        def __init__(self, calls, capturable):
            pass

        def sample(self):
            return 270.0

    monkeypatch.setattr(timing, "_DeviceTimer", Replayed)
    found = timing.measure({"a": ([None], True)}, torch.device("cuda"), seconds=0.3)
    assert found["a"].runs * 50 * 270e-6 == pytest.approx(0.3, rel=0.05)
    assert timing.measure({"a": ([None], True)}, torch.device("cuda"), seconds=0.01)["a"].runs == 3


def test_a_failure_keeps_no_tensors_of_the_frames_it_passed():
    alive = []

    def fails():
        tensor = torch.empty(10)
        alive.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    found = timing.measure({"broken": ([fails], False)}, CPU, seconds=0.0)
    assert "out of memory" in str(found["broken"]) and alive[0]() is None


def test_quantiles():
    found = timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0], "clock")
    assert (found.median, found.p20, found.p80) == (3.0, 2.0, 5.0)


def test_peak_memory_sees_what_a_call_allocates():
    size = 64 << 20

    def allocates():
        torch.ones(size // 4)

    extra = memory.peak_extra(allocates, CPU)
    if extra is None:
        pytest.skip("the peak of the resident set cannot be reset here")
    assert 0.9 * size < extra < 1.3 * size
    assert memory.peak_extra(lambda: None, CPU) < 0.05 * size


def test_disagreement_names_what_differs():
    truth = {"argmax": torch.arange(100), "entropy": torch.linspace(1, 2, 100)}
    assert disagreement({"argmax": torch.arange(100)}, truth) == []
    assert disagreement({"entropy": truth["entropy"] * 1.001}, truth) == []
    assert "argmax" in disagreement({"argmax": torch.zeros(100, dtype=torch.long)}, truth)[0]
    assert "entropy" in disagreement({"entropy": truth["entropy"] * 1.1}, truth)[0]
    assert "50 values" in disagreement({"entropy": truth["entropy"][:50]}, truth)[0]


def test_every_peer_module_says_whether_it_can_run():
    modules, problems = peers.load()
    assert [module.NAME for module in modules] == list(peers.MODULES) and not problems
    for module in modules:
        reason = module.unavailable(CPU)
        assert reason is None or (isinstance(reason, str) and reason)
    assert torch_chain.unavailable(CPU) is None


def test_attention_peers_agree_with_the_reference():
    inputs = bench_block_attention.make_inputs(2, 2, 32, 24, True, torch.float32, CPU, 0)
    expected = bench_block_attention.expected(inputs)
    for variant in sdpa.variants(SimpleNamespace(op="block_attention"), inputs):
        assert disagreement(variant.outputs(variant.prepare(inputs)()), expected) == [], variant.name


@pytest.mark.parametrize("op", ["row_stats", "commit", "head_stats", "soft_embedding"])
def test_chain_peers_agree_with_the_reference(op):
    module = {
        "row_stats": bench_row_stats,
        "commit": bench_commit,
        "head_stats": bench_head_stats,
        "soft_embedding": bench_soft_embedding,
    }[op]
    for case in module.cases(CPU, Sizes(**SMALL))[0]:
        inputs = case.make(CPU, 0)
        found = torch_chain.variants(case, inputs)
        assert found
        for variant in found:
            assert disagreement(variant.outputs(variant.prepare(inputs)()), case.expected(inputs)) == [], (
                variant.name
            )


def test_published_filters_keep_what_the_reference_keeps():
    for case in bench_top_k_top_p.cases(CPU, Sizes(**SMALL))[0]:
        inputs = case.make(CPU, 0)
        (variant,) = published_samplers.variants(case, inputs)
        assert disagreement(variant.outputs(variant.prepare(inputs)()), case.expected(inputs)) == [], (
            case.label
        )


@pytest.mark.parametrize("op", ["row_stats", "head_stats"])
def test_a_compiled_chain_beside_the_plain_one_is_compiled_once_and_whole(op, monkeypatch):
    """torch.compile turns the distributions' validation off, the plain chain turns it on: their calls alternate."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    graphs = []

    def compile_eagerly(graph, example):
        graphs.append(graph)
        return graph.forward

    right = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: right(function, backend=compile_eagerly)
    )
    module = {"row_stats": bench_row_stats, "head_stats": bench_head_stats}[op]
    case = module.cases(CPU, Sizes(**SMALL))[0][0]
    inputs = case.make(CPU, 0)
    (compiled,) = (variant.prepare(inputs) for variant in torch_compile.variants(case, inputs))
    plain = torch_chain.variants(case, inputs)[-1].prepare(inputs)
    plain()
    for _ in range(2):
        compiled()
        assert not torch.distributions.Distribution._validate_args
        plain()
        assert torch.distributions.Distribution._validate_args
    assert len(graphs) == 1


def test_no_graph_is_tried_with_a_peer_that_waits_for_the_host(monkeypatch):
    cross_entropy = SimpleNamespace(LigerCrossEntropyFunction=None)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cross_entropy", cross_entropy)
    case = bench_row_stats.cases(CPU, Sizes(**SMALL))[0][0]
    (variant,) = liger.variants(case, case.make(CPU, 0))
    assert not variant.capturable


class _TableOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts ops that write a tensor of at least `size` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.seen = size, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if isinstance(first, torch.Tensor) and first.numel() >= self.size and not view:
            self.seen[func._opname] += 1
        return out


def test_the_chain_makes_the_same_passes_over_the_table_as_transformers():
    pytest.importorskip("transformers")
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    from dgemma_accel.hf.naming import cache_argument

    rows, vocab = 4, 300
    logits = torch.randn(1, rows, vocab)
    sampler = generation.EntropyBoundSampler(generation.EntropyBoundSamplerConfig(0.1), rows, vocab, 4)
    weight = torch.zeros(1, dtype=torch.bfloat16)
    model = SimpleNamespace(
        config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=vocab)),
        model=SimpleNamespace(decoder=SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))),
    )
    canvas = torch.zeros(1, rows, dtype=torch.long)
    with _TableOps(rows * vocab) as theirs:
        generation.DiffusionGemmaGenerationMixin._denoising_step(
            model,
            decoder_forward=lambda **_: SimpleNamespace(logits=logits),
            current_canvas=canvas,
            argmax_canvas=canvas,
            input_ids=canvas,
            decoder_position_ids=None,
            self_conditioning_logits=logits,
            mask_mapping=None,
            **{cache_argument(): None},
            finished_denoising=torch.zeros(1, dtype=torch.bool),
            cur_step=2,
            sampler=sampler,
            logits_processor=lambda ids, scores, cur_step: scores / 0.6,
            diffusion_stopping_criteria=generation.StableAndConfidentStoppingCriteria(1, 0.005),
        )
    with _TableOps(rows * vocab) as ours:
        torch_chain.sampler_step(logits[0], 0.6, 30.0)
    # The softcap is the head's, and the conversion of the logits for the next step comes after the decision.
    softcap = Counter({"div": 1, "tanh": 1, "mul": 1})
    assert ours.seen - softcap == theirs.seen - Counter({"_to_copy": 1})


@pytest.mark.gpu
def test_on_a_gpu_short_calls_are_timed_in_a_graph_and_inputs_are_cold(tmp_path):
    path = tmp_path / "result.json"
    arguments = [
        "commit",
        "row_stats",
        "--device",
        "cuda",
        "--quick",
        "--peer",
        "torch_chain",
        "--json",
        str(path),
    ]
    assert bench_ops.main(arguments) == 0
    result = json.loads(path.read_text())
    assert schema.violations(result) == []
    rows = [row for row in result["rows"] if row["backend"] == "triton"]
    assert {row["method"] for row in rows if row["op"] == "commit"} == {"graph"}
    assert all(row["cold_cache"] for row in rows if row["op"] == "row_stats")
    # Other tests may have had a part of the GPU while the ceilings were measured.
    assert all(row["roofline_percent"] < 200 for row in rows)
    assert result["environment"]["driver"] and result["clocks"]["before"]["sm"] > 0


def test_of_two_cuda_attentions_the_one_that_the_backend_does_not_take_is_timed_too(monkeypatch):
    module = bench_block_attention.block_attention_sm_90a

    def names():
        found, _ = bench_block_attention.cases(CPU, Sizes(quick=True))
        return {case.shape.split(" D")[1][:3]: case.backends[-1].name for case in found}

    monkeypatch.delenv(module.VARIABLE, raising=False)
    assert not any(name.startswith("cuda ") for name in names().values())
    monkeypatch.setattr(module, "unavailable", lambda: None)
    monkeypatch.setattr(bench_block_attention, "compute_capability", lambda device: (9, 0))
    assert names() == {"512": "cuda portable", "256": "cuda sm_90a"}
    monkeypatch.setenv(module.VARIABLE, "portable")
    assert set(names().values()) == {"cuda sm_90a"}
    monkeypatch.setenv(module.VARIABLE, "sm_90a")
    assert set(names().values()) == {"cuda portable"}

"""The step bench: floors as derived from the model's figures, random models made in place, counts and components."""

import contextlib
import dataclasses
import gc
import json
import weakref

import pytest
import torch
from live_memory import LiveBytes

from bench import ceilings, floors, schema
from bench.cases import BenchError

pytestmark = pytest.mark.source_tree

CPU = torch.device("cpu")

H200 = (4.3e12, 790e12)
RTX_PRO = (1.79e12, 504e12)


@pytest.mark.parametrize(
    "precision, card, expected",
    [
        (floors.BF16, H200, (12.9, 13.3, 14.6, 19.8)),
        (floors.BF16, RTX_PRO, (29.6, 30.2, 32.2, 40.4)),
        (floors.FP8_WEIGHTS, H200, (7.0, 7.4, 8.7, 14.0)),
        (floors.FP8_WEIGHTS, RTX_PRO, (15.9, 16.5, 18.5, 26.7)),
    ],
)
def test_floors_of_the_full_model(precision, card, expected):
    text = floors.load_figures()["text_config"]
    for context, total in zip((1024, 8192, 32_768, 131_072), expected):
        found = floors.step_ms(floors.components(text, 256, context, precision=precision), *card)
        assert found["total"] == pytest.approx(total, abs=0.07)
        assert found["total"] == pytest.approx(sum(v for name, v in found.items() if name != "total"))


def test_components_of_the_floor():
    text = floors.load_figures()["text_config"]
    at = {card: floors.step_ms(floors.components(text, 256, 1024), *card) for card in (H200, RTX_PRO)}
    assert at[H200]["experts"] == pytest.approx(10.6, abs=0.05)
    assert at[RTX_PRO]["experts"] == pytest.approx(25.5, abs=0.05)
    assert at[H200]["head"] == pytest.approx(0.48, abs=0.005)
    assert at[RTX_PRO]["head"] == pytest.approx(0.90, abs=0.005)


def test_the_floor_of_fp8_experts_and_all_else_in_bf16():
    text = floors.load_figures()["text_config"]
    plain, small = (
        floors.components(text, 256, 1024, precision=p) for p in (floors.BF16, floors.Precision(expert=1))
    )
    assert small["experts"] == [(plain["experts"][0][0] / 2, plain["experts"][0][1])]
    assert {name: found for name, found in small.items() if name != "experts"} == {
        name: found for name, found in plain.items() if name != "experts"
    }
    assert floors.step_ms(small, *H200)["total"] == pytest.approx(7.58, abs=0.01)
    assert floors.step_ms(small, *RTX_PRO)["total"] == pytest.approx(16.79, abs=0.01)


def test_the_floor_of_nvfp4_experts():
    text = floors.load_figures()["text_config"]
    precision = floors.Precision(expert=floors.EXPERT_BYTES["nvfp4"])
    plain, small = (floors.components(text, 256, 1024, precision=p) for p in (floors.BF16, precision))
    # 4.5 bits of 16.
    assert small["experts"][0][0] == pytest.approx(plain["experts"][0][0] * 9 / 32)
    assert floors.step_ms(small, *H200)["total"] == pytest.approx(5.26, abs=0.01)
    assert floors.step_ms(small, *RTX_PRO)["total"] == pytest.approx(11.21, abs=0.01)


def test_the_floor_of_fp8_linears():
    """Half the bytes and operations of the layers' other products, whatever experts are."""
    text = floors.load_figures()["text_config"]
    for experts, (h200, rtx_pro) in {
        "nvfp4": (4.72, 10.28),
        "fp8": (7.04, 15.86),
        None: (12.35, 28.62),
    }.items():
        plain, small = (
            floors.components(text, 256, 1024, precision=floors.precision_of(2, experts, linears))
            for linears in (None, "fp8")
        )
        assert small["experts"] == plain["experts"] and small["head"] == plain["head"]
        for part, index in (("attention", 0), ("dense MLP", 0)):
            assert small[part][index] == tuple(number / 2 for number in plain[part][index])
        assert floors.step_ms(small, *H200)["total"] == pytest.approx(h200, abs=0.01)
        assert floors.step_ms(small, *RTX_PRO)["total"] == pytest.approx(rtx_pro, abs=0.01)


def test_experts_of_few_rows_are_not_all_touched():
    text = floors.load_figures()["text_config"]
    (one, _), (many, _) = (floors.components(text, rows, 0)["experts"][0] for rows in (1, 256))
    assert one / many == pytest.approx(8 / 128, rel=1e-3)


transformers = pytest.importorskip("transformers")

from bench import bench_step, step_measure, step_model, step_table, step_trace, step_ways  # noqa: E402

# The full model's structure at a hundredth of its width, on the path that the full size takes.
NARROW = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "canvas_length": 8,
    "sliding_window": 12,
}


@pytest.fixture(scope="module")
def model():
    return step_model.build(step_model.full_config(2, NARROW), CPU, torch.float32)


def test_the_full_configuration_is_the_released_one():
    config = step_model.full_config()
    text = config.text_config
    assert [i for i, kind in enumerate(text.layer_types) if kind == "full_attention"] == [5, 11, 17, 23, 29]
    assert (
        config.canvas_length == 256 and text.num_experts == 128 and text.per_layer_config[5].head_dim == 512
    )
    assert step_model.parameter_bytes(config, torch.bfloat16) / 2e9 == pytest.approx(25.25, abs=0.05)
    assert step_model.full_config(1).text_config.layer_types == ["full_attention"]


def test_a_model_made_in_place_is_as_one_made_by_transformers(model):
    ordinary = transformers.DiffusionGemmaForBlockDiffusion(model.config)
    made, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert made.keys() == dict(ordinary.named_parameters()).keys()
    for name, parameter in ordinary.named_parameters():
        assert made[name].shape == parameter.shape
        spread = float(parameter.detach().std())
        assert float(made[name].std()) == pytest.approx(spread, rel=0.3, abs=1e-3), name
    for name, buffer in ordinary.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_a_model_that_does_not_fit_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(step_model.memory, "available", lambda device: 10**9)
    assert bench_step.main(["--model", "full", "--device", "cpu"]) == 2
    assert "does not fit: its weights need 50.4 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--model", "tiny", "--layers", "3"], "--layers: only the full model"),
        (["--model", "full", "--layers", "0"], "--layers: must be at least 1"),
        (["--backend", "nope"], "unknown backend 'nope'; known are auto, reference"),
        (["--way", "ours, grahp"], "--way 'ours, grahp': no variant has that in its name"),
    ],
)
def test_bad_requests(arguments, line, capsys):
    assert bench_step.main([*arguments, "--device", "cpu"]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dynamic", "static", "ours"])
def test_a_random_cache_is_as_long_as_its_context(model, kind):
    cache = step_model.random_cache(model, 2, 20, kind=kind, room=4)
    assert int(cache.get_seq_length()) == 20
    wide = model.config.text_config.num_hidden_layers - 1
    assert cache.layers[wide].keys.shape[:2] == (2, 1)
    assert bool(cache.layers[wide].keys[:, :, :20].std() > 0.5)


def test_launches_leave_out_views_and_look_into_ops():
    import dgemma_accel

    x = torch.randn(4, 6)
    assert step_trace.count_on_cpu(lambda: (x.view(6, 4).t() + 1) @ x.view(6, 4)) == (2, 0)
    assert step_trace.count_on_cpu(lambda: float(x[0, 0])) == (1, 1)
    with step_trace.counting() as counter:
        dgemma_accel.row_stats(x, seed=1, backend="reference")
    inside = counter.launches
    assert inside > 10
    with step_trace.counting() as around:
        pass
    opaque, _ = step_trace.count_on_cpu(lambda: dgemma_accel.row_stats(x, seed=1, backend="reference"))
    assert around.launches < opaque < inside
    if dgemma_accel.backends.load("row_stats", "cpp")[0] is not None:
        with step_trace.counting() as counter:
            dgemma_accel.row_stats(x, seed=1, backend="cpp")
        assert counter.by_op["dgemma::row_stats"] == 1 and counter.launches < inside


def test_the_timeline_charges_the_innermost_component(monkeypatch):
    ticks = iter([0.0, 0.1, 0.4, 0.5, 0.7])
    monkeypatch.setattr(step_trace.time, "perf_counter", lambda: next(ticks))
    timeline = step_trace.Timeline(CPU)
    timeline.become("sampler")
    timeline.enter("attention")
    timeline.leave()
    timeline.become("head")
    found = timeline.milliseconds()
    assert found["attention"] == pytest.approx(300) and found["sampler"] == pytest.approx(100 + 100)
    assert found["head"] == pytest.approx(200) and found["rest"] == 0


def test_components_cover_the_steps_of_the_reference(model):
    cache = step_model.random_cache(model, 1, 16, kind="dynamic", room=0)
    run = step_ways.denoiser(model, cache, 1)
    run(1)
    with step_trace.component_timeline(model) as timeline:
        spent = step_measure.clock(lambda: run(3), CPU)
    found = timeline.milliseconds()
    assert all(value > 0 for value in found.values()), found
    assert sum(found.values()) < spent
    # The model is left as it was.
    assert "forward" not in vars(model) and not model.model.decoder._forward_hooks


def test_components_of_the_accelerated_step_are_its_own(model, monkeypatch):
    own = step_ways.model_of(model, step_ways.OURS, "auto")
    run = step_ways.denoiser(own, step_model.random_cache(own, 1, 16, kind="dynamic", room=0), 1)
    counts = []
    for look in (contextlib.nullcontext, lambda: step_trace.component_timeline(own)):
        with step_trace.counting(inside=False) as counter, look():
            run(3)
        counts.append({name: n for name, n in counter.by_op.items() if name.startswith("dgemma")})
    assert counts[0] == counts[1] and counts[0]["dgemma::commit"] == 3


def test_a_run_takes_exactly_the_steps_asked_for(model):
    cache = step_model.random_cache(model, 2, 16, kind="dynamic", room=0)
    for steps in (1, 3):
        result = step_ways.denoiser(model, cache, 2)(steps)
        new = result.sequences.shape[1] - 1
        valid = (result.sequences[:, 1:] != 0).sum(-1)
        assert new == 8 and torch.allclose(result.tokens_per_forward, valid / steps)


def test_canvases_follow_each_other_whatever_is_written(model):
    """All that were asked for, also where each position is an end token: the difference of 3 and 1 is that of two."""
    own = step_ways.model_of(model, step_ways.OURS_STATIC, "auto")
    cache = step_model.random_cache(own, 1, 16, kind="ours", room=100)
    with torch.no_grad():
        own.lm_head.weight = torch.nn.Parameter(torch.zeros_like(own.lm_head.weight))
        own.generation_config.eos_token_id = 0
    result = step_ways.denoiser(own, cache, 1)(1, 3)
    assert result.sequences.shape[1] == 1 + 3 * 8 and cache.get_seq_length() == 16 + 1 + 2 * 8


def test_a_canvas_is_half_of_what_three_take_beyond_one(monkeypatch):
    asked = []

    def run(steps, canvases):
        asked.append((steps, canvases))

    def broken(*counts):
        raise RuntimeError("gone")

    monkeypatch.setattr(step_measure, "clock", lambda call, device: (call(), 50.0 + 7 * asked[-1][1])[1])
    found = step_measure.per_canvas({"one": run, "broken": broken}, 3, CPU)
    assert found["one"] == 7.0 and str(found["broken"]) == "gone"
    assert asked == [(1, 2), *[(1, 3), (1, 1)] * 3]


def test_a_canvas_that_cannot_be_measured_leaves_the_step(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        step_measure, "per_canvas", lambda runs, *_: {name: ValueError("no room") for name in runs}
    )
    monkeypatch.setattr(ceilings, "measure", lambda *_: ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}))
    path = tmp_path / "step.json"
    arguments = [
        "--steps",
        "2",
        "--repeats",
        "1",
        "--context",
        "16",
        "--way",
        "ours, static cache",
        "--json",
        str(path),
    ]
    options = bench_step.parser().parse_args(arguments)
    assert bench_step.bench(model, "full (2 layers, narrow)", options, CPU) == 1
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["status"] == "ok" and row["step_ms"] > 0 and row["canvas_ms"] is None
    assert schema.violations(result) == [] and "no room" in result["problems"][0]
    assert "no room" in capsys.readouterr().out


def test_a_sliding_layer_keeps_no_more_than_its_window(model):
    cache = step_model.random_cache(model, 1, 200, kind="dynamic", room=0)
    kinds = model.config.text_config.layer_types
    for kind, layer in zip(kinds, cache.layers):
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert (tensor.shape[2] < 200) == (kind == "sliding_attention")
    assert {"sliding_attention", "full_attention"} == set(kinds)


def test_the_whole_bench_on_the_full_path(model, tmp_path, monkeypatch, capsys):
    # Whatever ran before may have turned this off, and with it two of the original's syncs.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    limits = ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11})
    monkeypatch.setattr(ceilings, "measure", lambda device, quick=False: limits)
    path = tmp_path / "step.json"
    options = bench_step.parser().parse_args(
        [
            "--steps",
            "3",
            "--repeats",
            "1",
            "--context",
            "16",
            "9999999",
            "--json",
            str(path),
            "--plot",
            str(tmp_path),
        ]
    )
    code = bench_step.bench(model, "full (2 layers, narrow)", options, CPU)
    out, err = capsys.readouterr()
    assert code == 2 and "--context 9999999: must be in" in err
    result = json.loads(path.read_text())
    assert schema.violations(result) == []
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) == {
        "transformers, dynamic cache",
        "ours, dynamic cache",
        "ours, static cache",
        "ours, graph",
        "autoregressive, dynamic cache",
    }
    assert all(row["status"] == "ok" for row in rows.values()), result["problems"]
    for ours in ("ours, dynamic cache", "ours, static cache", "ours, graph"):
        assert rows[ours]["host_syncs"] == 0, ours
    # An op of this package is one launch, and what the compiler fused is one.
    assert 4 * rows["ours, graph"]["launches"] <= rows["transformers, dynamic cache"]["launches"]
    assert rows["ours, graph"]["launches"] < rows["ours, static cache"]["launches"]
    theirs = rows["transformers, dynamic cache"]
    assert theirs["status"] == "ok" and theirs["launches"] > 100 and theirs["host_syncs"] >= 4
    assert theirs["floor_ms"] > rows["autoregressive, dynamic cache"]["floor_ms"] > 0
    assert theirs["floor_multiple"] == pytest.approx(theirs["step_ms"] / theirs["floor_ms"])
    for name, row in rows.items():
        assert (row["canvas_ms"] is None) == name.startswith("autoregressive") == (row["canvas"] == 1), name
    assert "ours, graph, canvases included: " in out
    assert "x at 16 tokens a step" in out and "x at 19.7 tokens a step" in out
    assert "ours, graph against transformers, dynamic cache:" in out and "x fewer launches" in out
    assert list(tmp_path.glob("step-full-*.svg"))
    # The model itself is as it was: every variant has one of its own over the same weights.
    assert "generate" not in vars(model)


def test_twins_share_weights_and_nothing_else(model):
    import dgemma_accel

    twin = step_model.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    dgemma_accel.accelerate(twin)
    assert "generate" in vars(twin) and "generate" not in vars(model)


def test_variants_take_turns_and_one_that_fails_leaves_the_others():
    order = []

    def runs(name, broken=False):
        def run(steps):
            order.append((name, steps))
            if broken and len(order) > 6:
                raise RuntimeError("gone")

        return run

    times = step_measure.per_step({"a": runs("a"), "b": runs("b", True), "c": runs("c")}, 5, 2, CPU)
    warm = [(name, steps) for name in "abc" for steps in (1, 4)]
    assert order == [
        *warm,
        ("a", 1),
        ("a", 5),
        ("b", 1),
        ("c", 1),
        ("c", 5),
        *[(n, s) for n in "ac" for s in (1, 5)],
    ]
    assert isinstance(times["b"], RuntimeError) and isinstance(times["a"], float)


def test_a_part_of_the_model_is_not_called_full(monkeypatch):
    made = []
    monkeypatch.setattr(step_model, "build", lambda config, *_: made.append(config))
    for layers, name in (
        (None, "full (30 of 30 layers"),
        (30, "full (30 of"),
        (6, "6-layers (6 of 30 layers"),
    ):
        options = bench_step.parser().parse_args(["--model", "full"])
        options.layers = layers
        assert bench_step.prepare_model(options, CPU)[1].startswith(name)
    assert [config.text_config.num_hidden_layers for config in made] == [30, 30, 6]


def test_what_no_time_was_left_for_is_named_once(model, monkeypatch, capsys):
    options = bench_step.parser().parse_args(["--context", "8", "16", "--budget", "0"])
    assert bench_step.bench(model, "full (narrow)", options, CPU, lambda: False) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "not reached" in line]
    assert len(lines) == len(set(lines)) == 2 * 5


def test_launches_are_counted_on_one_and_the_same_canvas():
    """What a step launches depends on what it draws, as transformers' loop over the chosen experts does."""
    left = torch.ones(8)

    def run(steps: int) -> None:
        for _ in range(steps):
            for _ in range(int(torch.randint(1, 50, ()))):
                left.add(1)

    torch.manual_seed(0)
    drawn = [int(torch.randint(1, 50, ())) for _ in range(4)]
    launches, _ = step_measure.counted(run, 4, CPU)
    alone = step_trace.count(lambda: int(torch.randint(1, 50, ())), CPU)[0]
    assert launches == pytest.approx(sum(drawn[1:]) / 3 + alone)


@pytest.mark.parametrize("context", [4, 40])
def test_compiled_decoding_gives_its_graph_the_same_numbers_for_every_token(model, monkeypatch, context):
    """A CUDA graph is recorded for each set of numbers. Contexts below and beyond the sliding window of 12."""
    right, numbers = torch.compile, []

    def backend(graph, example):
        def run(*arguments):
            numbers.append([one for one in arguments if isinstance(one, int)])
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", lambda f, **options: right(f, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    tokens = []
    for compiled in (False, True):
        cache = step_model.random_cache(model, 1, context, kind="static", room=8)
        decode = step_ways.decoder(model, cache, 1, context, compiled)
        tokens.append([int(decode(1)) for _ in range(6)])
        assert int(cache.get_seq_length()) == context + 6
        assert {int(layer.get_seq_length()) for layer in cache.layers} == {context + 6}
    assert tokens[0] == tokens[1]
    assert len(numbers) == 6 and all(one == numbers[0] for one in numbers)


def test_compiled_decoding_into_the_sliding_window(model, monkeypatch):
    """Decoding passes the window of 12: what the layer does then is another branch."""
    right = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: right(f, backend="eager", fullgraph=True))
    tokens = []
    for compiled in (False, True):
        cache = step_model.random_cache(model, 1, 9, kind="static", room=16)
        decode = step_ways.decoder(model, cache, 1, 9, compiled)
        tokens.append([int(decode(1)) for _ in range(8)])
    assert tokens[0] == tokens[1]


CUDA = torch.device("cuda")


def planned(arguments, contexts, device):
    options = bench_step.parser().parse_args(arguments)
    plan = bench_step.schedule(options, contexts, device)
    return [([way.name for way in ways], context) for ways, context in plan]


def test_what_is_asked_of_a_step_comes_first_and_what_else_compiles_last():
    plan = planned([], list(bench_step.CONTEXTS), CUDA)
    reference, graph, decoding = "transformers, dynamic cache", "ours, graph", "autoregressive, dynamic cache"
    assert plan[0] == ([reference, graph, "transformers, static cache, compiled"], 512)
    main = [reference, graph, decoding]
    assert plan[1:4] == [(main, context) for context in (8192, 32_768, 131_072)]
    late = [
        ["ours, graph, FP8 experts"],
        ["ours, graph, NVFP4 experts"],
        ["ours, graph, NVFP4 experts, FP8 linears"],
        ["ours, dynamic cache", "ours, static cache"],
        ["autoregressive, static cache, compiled"],
    ]
    assert plan[4:] == [*((names, 8192) for names in late), (main, 1024)]
    assert planned(["--way", "ours, graph"], list(bench_step.CONTEXTS), CUDA) == [
        ([graph], context) for context in bench_step.CONTEXTS
    ]


def test_contexts_that_are_asked_for_are_measured_in_every_way():
    main = [
        "transformers, dynamic cache",
        "ours, graph",
        "transformers, static cache, compiled",
        "autoregressive, dynamic cache",
    ]
    launched = ["ours, dynamic cache", "ours, static cache"]
    late = [
        "ours, graph, FP8 experts",
        "ours, graph, NVFP4 experts",
        "ours, graph, NVFP4 experts, FP8 linears",
        "autoregressive, static cache, compiled",
    ]
    plan = planned(["--context", "64", "8192"], [64, 8192], CUDA)
    assert plan[:2] == [(main, 64), (main, 8192)]
    groups = [[late[0]], [late[1]], [late[2]], launched, [late[3]]]
    assert plan[2:] == [(names, context) for names in groups for context in (64, 8192)]
    # On a CPU what does not compile is timed in turn.
    main[1:1] = launched
    plan = planned(["--compiled"], [64, 128], CPU)
    assert plan[:2] == [(main, 64), (main, 128)]
    assert plan[2:] == [([name], context) for name in late for context in (64, 128)]
    main.remove("transformers, static cache, compiled")
    assert planned([], [64, 128], CPU) == [(main, 64), (main, 128)]


@pytest.mark.parametrize("killed", ["while it looks inside", "while it compiles"])
def test_a_run_that_is_ended_leaves_the_times_it_had(model, monkeypatch, tmp_path, killed):
    class Ended(BaseException):
        pass

    def runner(bench, way, context):
        bench.models[way.name] = model

        def run(steps, canvases=1):
            if killed == "while it compiles" and way == step_ways.COMPILED_REFERENCE:
                raise Ended

        return run

    def ended(*_):
        raise Ended

    monkeypatch.setattr(step_measure.Bench, "runner", runner)
    monkeypatch.setattr(step_measure.Bench, "insides", ended)
    monkeypatch.setattr(ceilings, "measure", lambda *_: ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}))
    path = tmp_path / "step.json"
    options = bench_step.parser().parse_args(["--compiled", "--context", "16", "--json", str(path)])
    with pytest.raises(Ended):
        bench_step.bench(model, "full (2 layers, narrow)", options, CPU)
    result = json.loads(path.read_text())
    assert schema.violations(result) == []
    timed = {row["variant"] for row in result["rows"] if row["status"] == "ok"}
    assert {"transformers, dynamic cache", "ours, graph"} <= timed
    compiled = "transformers, static cache, compiled"
    assert (compiled in timed) == (killed == "while it looks inside") == bool(result["clocks"]["after"])


def test_a_sample_is_told_early_where_others_compile_first(model, monkeypatch):
    options = bench_step.parser().parse_args(["--repeats", "1"])
    measured = step_measure.Bench(model, ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}), options)

    def runner(way, context):
        measured.models[way.name] = model
        return lambda *counts: None

    monkeypatch.setattr(measured, "runner", runner)
    ways = [step_ways.REFERENCE, step_ways.GRAPH, step_ways.AUTOREGRESSIVE[0]]
    names = [way.name for way in ways]
    told = []
    for _ in range(2):
        group = measured.times(ways, 16, told.extend)
        # What compiles has been compiled when the context is the second.
        assert [row["variant"] for row in told] == names[:1]
    assert told[0]["status"] == "ok" and told[0]["step_ms"] is not None and list(group.rows) == names


def test_the_caches_of_a_group_are_gone_before_the_next_one_is_made(model, monkeypatch):
    made, alive = [], []
    right = step_model.random_cache

    def remember(*arguments, **options):
        gc.collect()
        alive.append(sum(cache() is not None for cache in made))
        cache = right(*arguments, **options)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(step_model, "random_cache", remember)
    monkeypatch.setattr(step_measure.Bench, "insides", lambda *_: None)
    monkeypatch.setattr(ceilings, "measure", lambda *_: ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}))
    arguments = ["--steps", "2", "--repeats", "1", "--context", "8", "16", "--way", "dynamic"]
    assert bench_step.bench(model, "full (narrow)", bench_step.parser().parse_args(arguments), CPU) == 0
    assert alive == [0, 1, 2] * 2


def test_what_is_seen_inside_a_step_fails_without_its_time(model, monkeypatch):
    options = bench_step.parser().parse_args(["--steps", "2", "--repeats", "1"])
    measured = step_measure.Bench(model, ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}), options)

    def fails(*_):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(step_measure, "counted", fails)
    (row,) = measured.measure([step_ways.REFERENCE], 16)
    assert row["status"] == "ok" and row["step_ms"] > 0 and row["launches"] is None
    assert "inside its steps: RuntimeError: no profiler" in row["error"] and row["canvas_ms"] is not None


def test_transformers_compiled_functions_are_recorded_before_they_are_timed(model, monkeypatch):
    """Under a stand-in for torch.compile that keeps the books of PyTorch's CUDA graph trees.

    The first call of a function, and all behind it until the next step begins, warm up; the next is recorded, later
    ones are replayed.
    """
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    warm, recorded, path, warming, timed, validated = set(), set(), [], [], [], set()

    def begin():
        path.clear()
        warming.clear()

    def compile_nothing(function, **options):
        def call(*arguments, **named):
            first = named.get("self_conditioning_logits", 0) is None
            key = getattr(function, "__qualname__", "") + " first" * first
            if key not in warm or warming:
                what = "warm-up"
                warm.add(key)
                warming.append(key)
            else:
                path.append(key)
                what = "replay" if tuple(path) in recorded else "recording"
                recorded.add(tuple(path))
            timed.append(what)
            validated.add(torch.distributions.Distribution._validate_args)
            return function(*arguments, **named)

        return call

    clock = step_measure.clock

    def clock_from_here(call, device):
        begin()
        del timed[:]
        spent = clock(call, device)
        samples.append(set(timed))
        return spent

    samples = []
    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begin)
    monkeypatch.setattr(step_measure, "clock", clock_from_here)
    options = bench_step.parser().parse_args(["--steps", "6", "--repeats", "2"])
    measured = step_measure.Bench(model, ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}), options)
    group = measured.times([step_ways.REFERENCE, step_ways.COMPILED_REFERENCE], 4)
    assert all(row["status"] == "ok" for row in group.rows.values()), group.rows
    assert {"replay"} in samples and not any({"recording", "warm-up"} & sample for sample in samples)
    # Beside transformers uncompiled, whose process validates.
    assert validated == {False}


def test_a_static_cache_holds_what_its_runs_need():
    """transformers reads a static cache to its end: what no run fills would be a part of its step."""
    options = bench_step.parser().parse_args(["--repeats", "2"])
    for way, slots in (
        (step_ways.COMPILED_REFERENCE, 512 + 2 * 16 + 6),
        (step_ways.AUTOREGRESSIVE[1], 512 + 108),
        (step_ways.GRAPH, 512 + 38 + 7 * 256),
    ):
        assert 512 + step_measure.room(way, options, 256) == slots


@pytest.mark.parametrize(
    "way", [step_ways.COMPILED_REFERENCE, *step_ways.AUTOREGRESSIVE, step_ways.OURS_STATIC]
)
def test_all_runs_of_a_way_fit_into_its_cache(model, monkeypatch, way):
    """As on a GPU, where launches are counted by running everything twice, and with an early sample."""
    made = []
    right = step_model.random_cache

    def remember(*arguments, room, **options):
        cache = right(*arguments, room=room, **options)
        made.append((cache, room))
        return cache

    monkeypatch.setattr(step_model, "random_cache", remember)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(step_measure, "can_count", lambda *_: True)
    right_count = step_trace.count

    def count_twice(call, device):
        call()
        return right_count(call, device)

    monkeypatch.setattr(step_trace, "count", count_twice)
    options = bench_step.parser().parse_args(["--steps", "5", "--repeats", "2"])
    measured = step_measure.Bench(model, ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}), options)
    never = dataclasses.replace(step_ways.GRAPH, name="compiles behind it")
    group = measured.times([way, never], 16)
    del group.rows[never.name]
    measured.insides(step_measure.Group([way], group.rows, group.runs))
    row = group.rows[way.name]
    assert row["status"] == "ok" and row["error"] is None
    if step_measure.has_canvases(way):
        step_measure.launches_of_a_canvas(group.runs[way.name], CPU)
    for _ in range(2 if way.ours else 0):
        group.runs[way.name](4)
    cache, room = made[0]
    used = int(cache.get_seq_length()) - 16
    assert 0 < used <= room


@pytest.mark.parametrize(
    "way, dtype",
    [(step_ways.GRAPH_FP8, torch.float8_e4m3fn), (step_ways.GRAPH_FP8_LINEARS, torch.uint8)],
    ids=["fp8", "nvfp4 and fp8 linears"],
)
def test_quantized_experts_stand_beside_the_models_own(model, way, dtype):
    options = bench_step.parser().parse_args(["--steps", "2", "--repeats", "1"])
    limits = ceilings.measure(CPU)
    eager = dataclasses.replace(way, graph=False, compiles=False)
    measured = step_measure.Bench(model, limits, options)
    plain, small = (row for way in (step_ways.OURS_STATIC, eager) for row in measured.measure([way], 20))
    assert plain["status"] == small["status"] == "ok" and small["host_syncs"] == 0
    assert small["floor_ms"] < plain["floor_ms"]
    twin = measured.models[eager.name]
    assert twin.model.decoder.layers[0].experts.gate_up_proj.dtype == dtype
    assert model.model.decoder.layers[0].experts.gate_up_proj.dtype == model.dtype
    assert twin.lm_head.weight is model.lm_head.weight
    linear = twin.model.decoder.layers[0].mlp.up_proj.weight
    assert linear.dtype == (torch.float8_e4m3fn if way.linears else model.dtype)


def test_quantized_experts_that_do_not_fit_are_refused(model, monkeypatch):
    weights = {p for name, p in model.named_parameters() if ".experts." in name}
    numbers = sum(weight.numel() for weight in weights)
    monkeypatch.setattr(step_model.memory, "available", lambda device: int(0.6 * numbers))
    step_ways.model_of(model, step_ways.GRAPH_NVFP4, "auto")
    with pytest.raises(BenchError, match="FP8 experts do not fit beside the model"):
        step_ways.model_of(model, step_ways.GRAPH_FP8, "auto")
    monkeypatch.setattr(step_model.memory, "available", lambda device: int(0.5 * numbers))
    with pytest.raises(BenchError, match="NVFP4 experts do not fit beside the model"):
        step_ways.model_of(model, step_ways.GRAPH_NVFP4, "auto")


def test_a_variant_by_its_whole_name_or_several_by_a_part_of_theirs():
    assert bench_step.is_named("ours, graph", "ours, graph")
    assert not bench_step.is_named("ours, graph, FP8 experts", "ours, graph")
    assert bench_step.is_named("ours, graph, FP8 experts", "graph") and bench_step.is_named(
        "ours, graph", "ours"
    )


def test_the_compiled_reference_is_marked_where_it_is_wrong(model):
    row = {"variant": "transformers, static cache, compiled"}
    assert step_table.window_line(model, 4, [row]) == []
    assert "wrong from the sliding window of 12" in step_table.window_line(model, 64, [row])[0]
    assert step_table.window_line(model, 64, [{"variant": "ours, graph"}]) == []


def test_speedup_over_decoding_counts_tokens_of_a_step():
    def row(name, milliseconds):
        return {"variant": name, "status": "ok", "step_ms": milliseconds}

    lines = step_table.speedups([row("ours, graph", 20.0), row("autoregressive, dynamic cache", 8.0)])
    assert lines == [
        "ours, graph against autoregressive, dynamic cache: 6.40x at 16 tokens a step, 7.88x at 19.7 tokens a step"
    ]
    # A canvas of 256 tokens in 16 steps of 20 ms, and 80 ms besides: 400 ms instead of 320.
    whole = row("ours, graph", 20.0) | {"canvas": 256, "canvas_ms": 80.0, "batch": 2}
    lines = step_table.speedups([whole, row("autoregressive, dynamic cache", 8.0)])
    assert lines == [
        "ours, graph, canvases included: 1,280 tokens/s at 16 tokens a step, 1,506 tokens/s at 19.7 tokens a step",
        "ours, graph against autoregressive, dynamic cache: 5.12x at 16 tokens a step, 6.03x at 19.7 tokens a step",
    ]
    lines = step_table.speedups([row("ours, graph", 20.0), row("transformers, dynamic cache", 60.0)])
    assert lines == ["ours, graph against transformers, dynamic cache: 3.00x the speed"]
    assert step_table.speedups([row("ours, graph", 20.0)]) == []


def test_the_memory_of_head_sampler_and_self_conditioning_is_theirs_alone(model, monkeypatch):
    own = step_ways.model_of(model, step_ways.OURS, "reference")
    calls = []

    def peak_extra(call, device):
        with LiveBytes(*own.parameters()) as held:
            calls.append(call())
        return held.peak

    monkeypatch.setattr(step_measure.memory, "peak_extra", peak_extra)
    batch, canvas, vocab = 2, NARROW["canvas_length"], NARROW["vocab_size"]
    table = batch * canvas * vocab * model.dtype.itemsize
    # The reference makes several tables in fp32; none is kept.
    assert table < step_measure.head_memory(own, batch) < 20 * table
    ((decided, soft),) = calls
    assert decided.tokens.shape == (batch, canvas) and soft.shape == (batch, canvas, NARROW["hidden_size"])
    options = bench_step.parser().parse_args(["--steps", "2", "--repeats", "1"])
    measured = step_measure.Bench(model, ceilings.Ceilings(CPU, 1e10, flops={"float32": 1e11}), options)
    rows = {row["variant"]: row for row in measured.measure([step_ways.REFERENCE, step_ways.OURS_STATIC], 16)}
    assert rows["transformers, dynamic cache"]["head_peak_bytes"] is None
    ours = rows["ours, static cache"]
    assert ours["head_peak_bytes"] > table / batch
    (line,) = (line for line in step_table.step_lines([ours]) if "head, sampler" in line)
    assert "together hold at most" in line


def test_a_canvas_that_measured_below_nothing_makes_no_token_faster():
    row = {"variant": "ours, graph", "status": "ok", "step_ms": 16.0, "canvas": 256, "batch": 1}
    assert step_table.per_token(row | {"canvas_ms": -64.0}, 16) == step_table.per_token(row, 16) == 1.0
    assert step_table.per_token(row | {"canvas_ms": 64.0}, 16) == 1.25
    assert step_table.rate(row | {"canvas_ms": -64.0}, 16) == 1000.0
    assert step_table.rate(row | {"canvas_ms": -64.0, "step_ms": 0.0}, 16) is None


def test_kernels_of_a_step_are_what_more_steps_ran_more():
    one = {"prompt": (3, 50.0), "layer": (10, 100.0)}
    many = {"prompt": (3, 52.0), "layer": (40, 430.0), "copy": (6, 6.0)}
    assert step_trace.kernels_of_a_step(one, many, 4) == [["layer", 10.0, 110.0], ["copy", 2.0, 2.0]]


def test_kernels_are_printed_with_their_step():
    row = {"variant": "ours, graph", "kernels": [["attention", 30.0, 900.0], ["x" * 200, 1.0, 2.0]]}
    lines = step_table.kernel_lines(row | {"canvas_launches": 4.0})
    assert "ours, graph, kernels of a step; a canvas besides its steps is 4 launches by the host:" in lines[0]
    assert "attention" in lines[1] and "30x" in lines[1] and "900 us" in lines[1]
    assert len(lines) == 3 and len(lines[2]) < 130
    assert step_table.kernel_lines({"variant": "transformers", "kernels": None}) == []


@pytest.mark.gpu
def test_the_full_path_on_a_gpu(tmp_path):
    device = torch.device("cuda")
    small = step_model.build(step_model.full_config(2, NARROW), device, torch.bfloat16)
    path = tmp_path / "step.json"
    options = bench_step.parser().parse_args(
        [
            "--steps",
            "3",
            "--repeats",
            "1",
            "--context",
            "16",
            "--way",
            "dynamic",
            "--way",
            "ours, graph",
            "--json",
            str(path),
        ]
    )
    assert bench_step.bench(small, "full (2 layers, narrow)", options, device) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    theirs = rows["transformers, dynamic cache"]
    assert theirs["launches"] > 100 and theirs["host_syncs"] >= 4 and theirs["components_ms"]["attention"] > 0
    graph = rows["ours, graph"]
    # One graph and the copies that look out for the end.
    assert graph["status"] == "ok" and graph["host_syncs"] == 0 and graph["launches"] <= 10
    assert graph["kernels"] and all(times > 0 for _, times, _ in graph["kernels"])
    assert graph["canvas_launches"] > 0 and theirs["kernels"] is None
    assert graph["head_peak_bytes"] > 0 and theirs["head_peak_bytes"] is None

"""Captured steps: what is copied in and out, when one is made anew. A recording that runs its function again stands in
for the CUDA graph: like a graph it knows nothing but the tensors it was made with."""

import copy
import itertools
import logging
import pickle
import threading
import types

import pytest
import torch
from hf_models import CANVAS, WINDOW, Drafts, generate, generation, prompt, tiny_model
from recordings import Again, Tape, record_on_a_cpu

import dgemma_accel
from dgemma_accel import cuda_graph
from dgemma_accel.hf import bank, capture, graph, patches, registry

PreallocatedCache = pytest.importorskip("dgemma_accel.hf.preallocated").PreallocatedCache


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class LowRank(torch.nn.Module):
    """A projection with two adapters, switched as those of PEFT are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active, self.disabled = base, ["first"], False
        self.scaling, self.settings = {"first": 1.0, "second": 2.0}, types.SimpleNamespace(strength=1.0)
        noise = torch.Generator().manual_seed(5)
        for name in self.scaling:
            down = torch.nn.Linear(base.in_features, 2, bias=False)
            up = torch.nn.Linear(2, base.out_features, bias=False)
            for linear in (down, up):
                linear.weight.data.normal_(0.0, 0.3, generator=noise)
            self.add_module(name, torch.nn.Sequential(down, up))

    def forward(self, x):
        result = self.base(x)
        if self.disabled:
            return result
        added = sum(self.get_submodule(name)(x) * self.scaling[name] for name in self.active)
        return result + added * self.settings.strength


class Steered(torch.nn.Module):
    """An MLP whose results are shifted by a vector, held as `how` says."""

    def __init__(self, mlp, how):
        super().__init__()
        self.mlp, self.how = mlp, how
        self.vector, self.vectors, self.settings = None, {}, types.SimpleNamespace()
        self.steer(torch.zeros(64))

    def steer(self, vector):
        if self.how == "alone":
            self.vector = vector
        elif self.how == "in a dict":
            self.vectors["vector"] = vector
        else:
            self.settings.vector = vector

    def forward(self, x):
        held = self.vectors.get("vector", self.vector)
        return self.mlp(x) + (self.settings.vector if held is None else held)


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded on a CPU too, without the compiler's minutes. The list of recordings made."""
    record_on_a_cpu(monkeypatch, Tape)
    return Tape.made


class TestOneCapture:
    """A step whose results depend on each of its inputs, so that one which is not copied in changes them."""

    LEAVES = ("canvas", "draft", "history", "finished", "soft", "confidence", "entropy", "steps", "start", "end",
              "cos", "sin", "seed", "bound", "threshold", "pinned")  # fmt: skip

    @staticmethod
    def spread(leaves):
        total = sum((n + 1) * leaf.double().sum() for n, leaf in enumerate(leaves))
        return (total * 1000).remainder(997).round()

    @classmethod
    def decide(cls, state, in_place, prefixes, numbers, pinned):
        leaves = [
            *state,
            *(t for kind in sorted(prefixes) for t in prefixes[kind]),
            *numbers,
            pinned,
            *in_place.keys,
            *in_place.values,
        ]
        spread = cls.spread(leaves)
        after = {
            name: tensor + spread.remainder(2).bool()
            if tensor.dtype == torch.bool
            else (tensor + spread).to(tensor.dtype)
            for name, tensor in zip(state._fields, state)
            if name != "soft"
        }
        return graph.Decision(**after, logits=spread + 1, stats=[spread + 2])

    @classmethod
    def condition(cls, decision, frozen, soft, temperature, pinned):
        return soft + cls.spread([decision.logits, *decision.stats, frozen, soft, temperature, pinned])

    @staticmethod
    def inputs(seed):
        noise = torch.Generator().manual_seed(seed)

        def whole(*shape):
            return torch.randint(1, 50, shape, generator=noise)

        def real(*shape):
            return torch.rand(shape, generator=noise)

        state = graph.State(
            whole(2, 4),
            whole(2, 4),
            whole(1, 2, 4),
            whole(2) > 25,
            real(2, 4, 3),
            real(2, 4),
            real(2, 4),
            whole(2),
        )
        prefix = graph.Prefix(whole(2).int(), whole(2).int(), real(1, 4, 2), real(1, 4, 2))
        return capture.Inputs(
            state, {"full_attention": prefix}, whole(1)[0], real(1)[0], real(1)[0], whole(2, 4) > 25
        )

    IN_PLACE = graph.InPlace([torch.ones(1, 1, 2, 2)], [torch.ones(1, 1, 2, 2)], [])

    def plain(self, inputs, offset, schedule):
        state = inputs.state
        for n, temperature in enumerate(schedule):
            numbers = graph.Numbers(inputs.seed, torch.tensor(offset + n), temperature, *inputs[3:5])
            decision = self.decide(state, self.IN_PLACE, inputs.prefixes, numbers, inputs.pinned)
            soft = self.condition(decision, state.finished, state.soft, temperature, inputs.pinned)
            state = decision.state(soft)
        return state

    def captured(self, inputs):
        return capture.CapturedStep(self, inputs, self.IN_PLACE, 3, torch.rand(4), Again, None)

    @staticmethod
    def replay(captured, inputs, offset, schedule):
        captured.load(inputs, offset, schedule)
        for _ in schedule:
            captured.decide()
            captured.condition()
        return captured.finish()

    @pytest.mark.parametrize("changed", range(len(LEAVES)), ids=LEAVES)
    def test_each_input_is_copied_in(self, changed):
        first, other = self.inputs(1), self.inputs(2)
        captured = self.captured(first)
        schedule = torch.rand(3)
        self.replay(captured, first, 5, schedule)
        mixed = first.like()
        for n, (mine, a, b) in enumerate(zip(mixed.tensors(), first.tensors(), other.tensors())):
            mine.copy_(b if n == changed else a)
        if mixed.tensors()[changed].dtype == torch.bool:
            mixed.tensors()[changed].copy_(~first.tensors()[changed])
        for inputs in (mixed, first):
            expected = self.plain(inputs, 5, schedule)
            assert all(map(torch.equal, self.replay(captured, inputs, 5, schedule), expected))

    @pytest.mark.parametrize("changed", range(len(LEAVES)), ids=LEAVES)
    def test_the_watch_sees_an_input_that_is_not(self, changed, monkeypatch):
        first, other = self.inputs(1), self.inputs(2)
        captured = self.captured(first)
        schedule = torch.rand(3)
        self.replay(captured, first, 5, schedule)
        right = capture.Inputs.tensors
        monkeypatch.setattr(
            capture.Inputs, "tensors", lambda self: right(self)[:changed] + right(self)[changed + 1 :]
        )
        result = self.replay(captured, other, 5, schedule)
        monkeypatch.undo()
        assert not all(map(torch.equal, result, self.plain(other, 5, schedule)))

    def test_offset_and_schedule(self, monkeypatch):
        """Also where the schedule is longer than what a capture holds at a time."""
        monkeypatch.setattr(capture, "SCHEDULE", 4)
        inputs = self.inputs(1)
        captured = self.captured(inputs)
        for offset, steps in ((0, 4), (2**40, 11), (7, 2), (7, 8)):
            schedule = torch.rand(steps)
            expected = self.plain(inputs, offset, schedule)
            assert all(map(torch.equal, self.replay(captured, inputs, offset, schedule), expected))

    def test_results_are_copied_out(self):
        first, other = self.inputs(1), self.inputs(2)
        captured = self.captured(first)
        kept = self.replay(captured, first, 5, torch.tensor([0.5]))
        before = copy.deepcopy(kept)
        self.replay(captured, other, 9, torch.rand(3))
        assert all(map(torch.equal, kept, before))
        assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in captured.inputs.tensors()}

    def test_two_captures_alive(self):
        first, other = self.inputs(1), self.inputs(2)
        one, two = self.captured(first), self.captured(other)
        schedule = torch.rand(3)
        one.load(first, 0, schedule)
        two.load(other, 0, schedule)
        for _ in schedule:
            for half in (one.decide, two.decide, two.condition, one.condition):
                half()
        assert all(map(torch.equal, one.finish(), self.plain(first, 0, schedule)))
        assert all(map(torch.equal, two.finish(), self.plain(other, 0, schedule)))

    def test_a_step_is_a_replay_of_each_half(self):
        captured = self.captured(self.inputs(1))
        self.replay(captured, self.inputs(2), 0, torch.rand(5))
        # One more of the first half: its results are what the second one's first runs read.
        assert [half.replays for half in captured.halves] == [6, 5] and captured.replays == 5
        assert captured.bytes > 2 * Again.bytes


def captured(model, what=registry.STEP):
    """The captures of one kind that an accelerated model keeps."""
    return [key for key in patches.acceleration_of(model).captures.found if key[0] == what]


def reports_of(model, what=registry.STEP):
    return [report for report in dgemma_accel.captures(model) if report.what == what]


def assert_same(result, expected):
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.tokens_per_forward, expected.tokens_per_forward)


class TestGenerate:
    @pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5])
    def test_prompt_lengths_and_drafts(self, model, recorded, length):
        ids, mask = prompt(2, length, left_padding=(0, length // 3))
        theirs, ours = Drafts(), Drafts()
        expected = generate(model, ids, mask, max_new_tokens=4 * CANVAS, streamer=theirs)
        with dgemma_accel.accelerated(model, graph=True):
            result = generate(model, ids, mask, max_new_tokens=4 * CANVAS, streamer=ours)
        assert_same(result, expected)
        assert len(ours.values) == len(theirs.values) and all(map(torch.equal, ours.values, theirs.values))
        assert len(recorded) == 1 and recorded[0].replays >= len(ours.values)

    def test_calls_share_one_capture(self, model, recorded):
        held = []
        with dgemma_accel.accelerated(model, graph=True):
            for n, length in enumerate((5, 40, WINDOW, 200)):
                ids, mask = prompt(2, length, seed=n, left_padding=(n, 0))
                setup = {"t_max": 0.9 - n / 20, "confidence_threshold": 0.2 + n / 10, "base": n + 1}
                held.append((generate(model, ids, mask, **setup), ids, mask, setup))
            assert len(recorded) == 1
            # Other shapes have one each, and going back makes none.
            generate(model, prompt(1, 5)[0])
            generate(model, prompt(2, 5)[0], cache_implementation="static")
            generate(model, prompt(1, 9)[0])
            assert len(recorded) == 2
            generate(model, prompt(2, bank.SMALLEST)[0], max_denoising_steps=1)
            assert len(recorded) == 3
        for result, ids, mask, setup in held:
            assert_same(result, generate(model, ids, mask, **setup))

    def test_what_a_call_returned_is_the_caller_s(self, model, recorded):
        """Its cache goes on to a second turn although other calls came between, and grows past its size."""
        ids, _ = prompt(2, 11)
        more, _ = prompt(2, bank.SMALLEST, seed=5)

        def talk(between):
            first = generate(model, ids, max_new_tokens=2 * CANVAS)
            between()
            turn = torch.cat([first.sequences[:, -CANVAS:], more], -1)
            return first, generate(
                model, turn, cache=first.past_key_values, base=2, max_denoising_steps=2,
            )  # fmt: skip

        expected = talk(lambda: None)
        with dgemma_accel.accelerated(model, graph=True):
            result = talk(lambda: generate(model, prompt(2, 30, seed=9)[0]))
        for a, b in zip(result, expected):
            assert_same(a, b)

    def test_two_calls_at_a_time(self, model, recorded):
        """One within another, from its streamer: the inner one has neither its buffers nor its capture."""
        ids, _ = prompt(2, 20)
        other, _ = prompt(2, 9, seed=3)
        inner = []

        class Nested(Drafts):
            def put_draft(self, value):
                if not inner:
                    thread = threading.Thread(target=lambda: inner.append(model.generate(other, seed=4)))
                    thread.start()
                    thread.join()

        with dgemma_accel.accelerated(model, graph=True):
            alone = model.generate(other, seed=4), model.generate(ids, seed=5)
            result = model.generate(ids, seed=5, streamer=Nested())
        assert_same(inner[0], alone[0])
        assert_same(result, alone[1])
        assert len(recorded) == 1

    def test_a_returned_cache_that_goes_on_while_another_call_runs(self, model, recorded):
        """The other one comes from the streamer of the second turn, and asks for buffers of the same batch size."""
        ids, _ = prompt(2, 11)
        other, _ = prompt(2, 9, seed=3)

        class Nested(Drafts):
            count = 0

            def put_draft(self, value):
                self.count += 1
                if self.count == 1:
                    thread = threading.Thread(
                        target=lambda: model.generate(other, seed=4, max_new_tokens=2 * CANVAS)
                    )
                    thread.start()
                    thread.join()

        def talk(streamer):
            first = model.generate(ids, seed=6)
            turn = torch.cat([first.sequences[:, -CANVAS:], other], -1)
            cache = {patches.acceleration_of(model).cache_argument: first.past_key_values}
            return model.generate(
                turn, seed=7, max_new_tokens=3 * CANVAS, streamer=streamer, **cache
            ).sequences

        with dgemma_accel.accelerated(model, graph=True):
            expected, result = talk(None), talk(Nested())
            lent = patches.acceleration_of(model).bank.entries.values()
            assert not any(entry.in_use for entry in lent)
        assert torch.equal(result, expected)

    def test_a_call_waits_where_another_thread_records(self, model, recorded, monkeypatch):
        """With its canvas, which the device's generator draws, and with compiling; steps go on."""
        device, ids, order = torch.device("cpu"), prompt(2, 9)[0], []
        sampler = generation.EntropyBoundSampler
        draw = sampler.initialize_canvas

        def initialize(self, batch_size, device):
            order.append("draw")
            return draw(self, batch_size, device)

        def compiling(function, **options):
            def first(*arguments):
                if "compile" not in order:
                    order.append("compile")
                    order.append(f"others may record: {self.elsewhere_free(device)}")
                return function(*arguments)

            return first

        monkeypatch.setattr(sampler, "initialize_canvas", initialize)
        monkeypatch.setattr(torch, "compile", compiling)
        with dgemma_accel.accelerated(model, graph=True):
            with cuda_graph.quiet(device):
                thread = threading.Thread(
                    target=lambda: model.generate(ids, max_new_tokens=CANVAS, max_denoising_steps=2)
                )
                thread.start()
                thread.join(1.0)
                order.append("recorded")
            thread.join()
        assert order[:4] == ["recorded", "draw", "compile", "others may record: False"]
        assert self.elsewhere_free(device)

    @staticmethod
    def elsewhere_free(device):
        """Whether another thread could record now."""
        found = []

        def attempt():
            lock = cuda_graph.quiet(device)
            found.append(lock.acquire(blocking=False))
            if found[0]:
                lock.release()

        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        return found[0]

    def test_weights_that_moved_are_captured_again(self, model, recorded):
        model = copy.deepcopy(model)
        ids, _ = prompt(2, 20)
        dgemma_accel.accelerate(model, graph=True)
        before = generate(model, ids).sequences
        with torch.no_grad():
            # In place: a replay reads the new values by itself.
            model.model.decoder.norm.weight.mul_(0.7)
        changed = generate(model, ids).sequences
        assert len(recorded) == 1 and not torch.equal(before, changed)
        projection = model.model.decoder.layers[1].self_attn.q_proj
        projection.weight = torch.nn.Parameter(projection.weight.detach() * 1.5, requires_grad=False)
        again = generate(model, ids)
        assert len(recorded) == 2 and len(captured(model)) == 1
        model.bfloat16()
        half = generate(model, ids)
        assert len(recorded) == 3
        dgemma_accel.accelerate(model, graph=False)
        assert torch.equal(generate(model, ids).sequences, half.sequences)
        model.float()
        assert again.sequences.shape == half.sequences.shape

    def test_a_module_replaced_is_captured_again(self, model, recorded):
        model = dgemma_accel.accelerate(copy.deepcopy(model), graph=True)
        ids, _ = prompt(2, 20)
        generate(model, ids)
        layer = model.model.decoder.layers[0]
        layer.mlp.down_proj = copy.deepcopy(layer.mlp.down_proj)
        result = generate(model, ids)
        assert len(recorded) == 2
        assert_same(result, generate(dgemma_accel.restore(model), ids))

    def test_an_adapter_that_is_switched_is_captured_again(self, model, recorded):
        """Nothing of it shows in an address: which adapter acts, how strongly, and whether it is merged."""
        model = copy.deepcopy(model)
        attention = model.model.decoder.layers[1].self_attn
        attention.o_proj = adapter = LowRank(attention.o_proj)
        ids, _ = prompt(2, 20)
        dgemma_accel.accelerate(model, graph=True)
        with_first = generate(model, ids).sequences
        generate(model, ids)
        assert len(recorded) == 1
        results = [with_first]
        for change in (
            lambda: adapter.active.__setitem__(0, "second"),
            lambda: adapter.scaling.update(second=0.5),
            lambda: setattr(adapter.settings, "strength", 3.0),
            lambda: setattr(adapter, "disabled", True),
        ):
            change()
            results.append(generate(model, ids).sequences)
            assert len(recorded) == len(results) and len(captured(model)) == 1
            generate(model, ids)
            assert len(recorded) == len(results)
        for one, other in itertools.combinations(results, 2):
            assert not torch.equal(one, other)
        attention.scaling = attention.scaling * 2
        sharper = generate(model, ids)
        assert len(recorded) == 6 and not torch.equal(sharper.sequences, results[-1])
        assert_same(sharper, generate(dgemma_accel.restore(model), ids))

    @pytest.mark.parametrize("held", ["alone", "in a dict", "in an object"])
    def test_a_tensor_assigned_anew_is_captured_again(self, model, recorded, held):
        """It is no parameter and no buffer, but an attribute of a module of the caller's."""
        model = copy.deepcopy(model)
        steered = [Steered(layer.mlp, held) for layer in model.model.decoder.layers]
        for layer, module in zip(model.model.decoder.layers, steered):
            layer.mlp = module
        ids, _ = prompt(2, 20)
        dgemma_accel.accelerate(model, graph=True)
        results = [generate(model, ids).sequences]
        for seed in (1, 2):
            vector = 3 * torch.randn(64, generator=torch.Generator().manual_seed(seed))
            for module in steered:
                module.steer(vector.clone())
            results.append(generate(model, ids).sequences)
            generate(model, ids)
            assert len(recorded) == len(results) and len(captured(model)) == 1
        for one, other in itertools.combinations(results, 2):
            assert not torch.equal(one, other)
        assert torch.equal(generate(dgemma_accel.restore(model), ids).sequences, results[-1])

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_module_that_keeps_what_it_saw(self, model, recorded, monkeypatch, fails):
        """It is captured once. Where it cannot be, that is not tried for each thing that it keeps."""
        model, attempts = copy.deepcopy(model), []

        class Keeps(torch.nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.mlp, self.seen = mlp, types.SimpleNamespace()

            def forward(self, x):
                self.last, self.seen.last = x, x
                return self.mlp(x)

        class Fails(Tape):
            def __init__(self, function, device, pool):
                attempts.append(1)
                function()
                raise RuntimeError("capture: no")

        if fails:
            monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Fails)
        ids, _ = prompt(2, 9)
        expected = generate(model, ids, max_new_tokens=3 * CANVAS)
        for layer in model.model.decoder.layers:
            layer.mlp = Keeps(layer.mlp)
        dgemma_accel.accelerate(model, graph=True)
        for streamer in (None, None, Drafts()):
            assert_same(generate(model, ids, max_new_tokens=3 * CANVAS, streamer=streamer), expected)
        # Also of the pass that stores a canvas.
        assert len(recorded) == (0 if fails else 1) and len(attempts) == (2 if fails else 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_reports_are_fp32_whatever_torchs_default_dtype(self, model, recorded, dtype):
        ids, results = prompt(3, 13)[0], []
        torch.set_default_dtype(dtype)
        try:
            for graph in (False, True):
                with dgemma_accel.accelerated(model, graph=graph):
                    results.append(model.generate(ids, seed=1, return_confidence=True))
        finally:
            torch.set_default_dtype(torch.float32)
        eager, replayed = results
        assert torch.equal(replayed.sequences, eager.sequences) and recorded
        for name in ("confidence", "entropy"):
            torch.testing.assert_close(replayed[name], eager[name], rtol=1e-4, atol=1e-5)
            assert replayed[name].dtype == torch.float32

    def test_a_capture_that_fails(self, model, recorded, monkeypatch, caplog):
        attempts = []

        class Fails(Again):
            def __init__(self, function, device, pool):
                attempts.append(1)
                function()
                raise RuntimeError("capture: no\nmore of it")

        monkeypatch.setitem(cuda_graph.RECORDINGS, "cpu", Fails)
        ids, _ = prompt(2, 9)
        with caplog.at_level(logging.WARNING, "dgemma_accel"), dgemma_accel.accelerated(model, graph=True):
            results = [generate(model, ids, max_new_tokens=3 * CANVAS) for _ in range(2)]
            reports = dgemma_accel.captures(model)
        for result in results:
            assert_same(result, generate(model, ids, max_new_tokens=3 * CANVAS))
        lines = [r.getMessage() for r in caplog.records if "not captured" in r.getMessage()]
        # The step and the pass that stores a canvas.
        assert len(attempts) == len(set(lines)) == len(lines) == 2
        assert all(line.endswith("(not captured: RuntimeError: capture: no)") for line in lines)
        assert [report.problem for report in reports] == ["not captured: RuntimeError: capture: no"] * 2

    def test_an_exception_inside_a_replay(self, model, recorded, monkeypatch):
        ids, _ = prompt(2, 9)
        expected = generate(model, ids)
        right, count = Tape.replay, []

        def broken(self):
            right(self)
            count.append(1)
            if len(count) == 3:
                raise RuntimeError("in a step")

        monkeypatch.setattr(Tape, "replay", broken)
        before = {id(module): dict(vars(module)) for module in model.modules()}
        with dgemma_accel.accelerated(model, graph=True):
            with pytest.raises(RuntimeError, match="in a step"):
                generate(model, ids)
            assert recorded[0].runs == 0, "the next run waits for what this one left under way"
            assert_same(generate(model, ids), expected)
            assert len(recorded) == 1 and recorded[0].runs == 0
        assert all(vars(module).keys() == before[id(module)].keys() for module in model.modules())

    def test_inference_mode_and_without(self, model, recorded):
        ids, _ = prompt(2, 20)
        expected = generate(model, ids)
        with dgemma_accel.accelerated(model, graph=True):
            with torch.inference_mode():
                assert torch.equal(generate(model, ids).sequences, expected.sequences)
            assert_same(generate(model, ids), expected)
            with torch.inference_mode():
                assert torch.equal(generate(model, ids).sequences, expected.sequences)
        assert len(recorded) == 1

    def test_options(self, model, recorded):
        ids, _ = prompt(3, 9)
        canvas, _ = prompt(3, CANVAS, seed=21)
        options = {"decoder_input_ids": canvas, "pinned": [0, 3, 7], "seed": 4, "max_steps": 5, "return_steps": True,
                   "return_confidence": True, "max_new_tokens": 3 * CANVAS}  # fmt: skip
        with dgemma_accel.accelerated(model):
            expected = model.generate(ids, **options)
        with dgemma_accel.accelerated(model, graph=True):
            result = model.generate(ids, **options)
        assert torch.equal(result.sequences, expected.sequences) and torch.equal(result.steps, expected.steps)
        assert torch.allclose(result.confidence, expected.confidence, atol=1e-4)
        # The canvas with pins and those without.
        assert len(recorded) == 2

    def test_copies_of_the_model(self, model, recorded):
        ids, _ = prompt(2, 9)
        expected = generate(model, ids)
        with dgemma_accel.accelerated(model, graph=True):
            generate(model, ids)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert not patches.acceleration_of(twin).captures.found
                assert_same(generate(twin, ids), expected)

    def test_the_least_used_capture_goes(self, model, recorded, monkeypatch):
        monkeypatch.setattr(registry, "MOST_CAPTURES", 2)
        with dgemma_accel.accelerated(model, graph=True):
            for batch in (1, 2, 3, 2, 1):
                generate(model, prompt(batch, 5)[0], max_denoising_steps=1)
            assert len(captured(model)) == 2 and len(recorded) == 4

    def test_report(self, model, recorded):
        assert dgemma_accel.captures(model) == []
        with dgemma_accel.accelerated(model, graph=True):
            generate(model, prompt(2, 5)[0])
            (report,) = reports_of(model)
        assert report.batch == 2 and report.canvas == CANVAS and report.captured and report.compiled
        assert report.replays == recorded[0].replays - 1 > 1 and report.memory_bytes > Again.bytes
        assert report.compile_seconds > 0 and report.capture_seconds > 0 and report.problem is None

    def test_buckets(self):
        sizes = [bank.rounded_up(n) for n in (1, 2048, 2049, 2560, 2561, 4096, 4097, 262_144)]
        assert sizes == [2048, 2048, 2560, 2560, 3072, 4096, 5120, 262_144]


@pytest.mark.gpu
class TestOnTheGPU:
    def test_captured_is_eager(self):
        model = tiny_model().cuda()
        for length in (1, WINDOW, 3 * WINDOW + 5):
            ids, mask = (t.cuda() for t in prompt(2, length, left_padding=(0, length // 2)))
            options = {"attention_mask": mask, "max_new_tokens": 4 * CANVAS, "seed": 3, "return_steps": True}
            with dgemma_accel.accelerated(model, graph=False):
                expected = model.generate(ids, **options)
            with dgemma_accel.accelerated(model):
                first = model.generate(ids, **options)
                second = model.generate(ids, **options)
                reports = dgemma_accel.captures(model)
            assert sorted(report.what for report in reports) == ["step", "storing"]
            for report in reports:
                assert report.captured and report.memory_bytes > 0 and report.problem is None
            for result in (first, second):
                assert torch.equal(result.sequences, expected.sequences)
                assert torch.equal(result.steps, expected.steps)

    def test_no_synchronisation(self, monkeypatch):
        from dgemma_accel.hf import denoising

        model = dgemma_accel.accelerate(tiny_model().cuda())
        ids = prompt(2, 20)[0].cuda()
        expected = model.generate(ids, seed=1)
        run = denoising.Denoiser.run

        def watched(self, *state):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return run(self, *state)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(denoising.Denoiser, "run", watched)
        drafts = Drafts()
        result = model.generate(ids, seed=1, streamer=drafts, return_confidence=True)
        assert torch.equal(result.sequences, expected.sequences) and len(drafts.values) > 2
        assert reports_of(model)[0].captured

    def test_another_dtype_and_a_side_stream(self):
        model = dgemma_accel.accelerate(tiny_model().cuda())
        ids = prompt(2, 20)[0].cuda()
        expected = model.generate(ids, seed=1).sequences
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(model.generate(ids, seed=1).sequences, expected)
        assert torch.equal(model.generate(ids, seed=1).sequences, expected)
        assert len(reports_of(model)) == 1
        model.to(torch.bfloat16)
        half = model.generate(ids, seed=1).sequences
        assert all(report.captured for report in dgemma_accel.captures(model))
        dgemma_accel.accelerate(model, graph=False)
        # The compiler's fused arithmetic rounds less often than bf16 step by step.
        assert (model.generate(ids, seed=1).sequences == half).float().mean() > 0.5

    def test_the_uncompiled_step_is_captured(self, monkeypatch):
        def refuses(function, **options):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", refuses)
        model = tiny_model().cuda()
        ids = prompt(2, 20)[0].cuda()
        with dgemma_accel.accelerated(model, graph=False):
            expected = model.generate(ids, seed=1).sequences
        with dgemma_accel.accelerated(model):
            result = model.generate(ids, seed=1).sequences
            (report,) = reports_of(model)
        assert torch.equal(result, expected) and report.captured and not report.compiled


def test_a_weight_that_became_its_transpose_is_captured_again(recorded):
    """At the same address, of the same shape."""
    model = dgemma_accel.accelerate(tiny_model(), graph=True)
    ids, _ = prompt(2, 20)
    before = generate(model, ids).sequences
    weight = model.model.decoder.layers[1].self_attn.q_proj.weight
    address, weight.data = weight.data_ptr(), weight.data.T
    assert weight.data_ptr() == address and weight.shape[0] == weight.shape[1]
    result = generate(model, ids)
    assert len(recorded) == 2 and not torch.equal(result.sequences, before)
    assert_same(result, generate(dgemma_accel.restore(model), ids))

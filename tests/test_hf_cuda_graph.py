"""How a step is recorded in a CUDA graph. PyTorch's `torch.cuda.graph` over a device that is played on the CPU: its
streams, the allocator's pools under way and the default generator behave as a GPU's where a recording fails."""

import contextlib
import threading

import pytest
import torch
from hf_models import CANVAS, prompt, tiny_model

import dgemma_accel
from dgemma_accel import cuda_graph
from dgemma_accel.hf import registry

# Has an index as a CUDA device has, and tensors.
DEVICE = torch.device("cpu", 0)


class Generator:
    """The default generator: in torch 2.11 in capture mode as a whole, and only a recording's end changes that."""

    def __init__(self, played):
        self.played, self.capturing, self.state = played, False, 0

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def clone_state(self):
        twin = Generator(self.played)
        twin.state = self.state
        return twin

    def graphsafe_set_state(self, other):
        self.capturing, self.state = other.capturing, other.state
        self.played.log.append("another state")

    def draw(self):
        self.played.log.append(f"draw on {self.played.current.name}")
        if self.capturing and not self.played.recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state += 1


class Stream:
    def __init__(self, played, name=None):
        self.played, self.name = played, name or f"side {len(played.streams)}"
        self.cuda_stream = len(played.streams)
        played.streams.append(self)

    def wait_stream(self, other):
        self.played.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.played.log.append(f"{self.name} waits for {event}")


class Graph:
    """From torch 2.14 on it gives its pool back itself, where it was not made too; `reset` is its destructor's work."""

    def __init__(self, played):
        self.played = played
        self.holds = self.ends = False
        played.graphs.append(self)

    def capture_begin(self, pool=(9, 9), capture_error_mode="global", **_):
        if pool in self.played.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.pool = pool
        self.played.underway.append(pool)
        self.played.users.append(pool)
        self.holds = self.ends = self.played.graphs_give_back
        if self.played.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.played.generator.capturing = self.played.recording = True
        self.played.log.append(f"record on {self.played.current.name} into {pool}, {capture_error_mode}")

    def capture_end(self):
        self.played.recording = False
        if self.played.broken:
            self.played.broken = False
            if self.ends:
                self.played.end_of_pool(0, self.pool)
                self.ends = False
            raise RuntimeError("operation failed due to a previous error during capture")
        self.played.underway.remove(self.pool)
        self.ends = False
        self.played.generator.capturing = False

    def reset(self):
        if self.holds:
            if self.ends:
                self.played.end_of_pool(0, self.pool)
            self.played.users.remove(self.pool)
            self.holds = self.ends = False

    def replay(self):
        self.played.log.append(f"replay on {self.played.current.name}")


class Played:
    """`torch.cuda` as far as recording needs it. log: what was asked of the device, in order."""

    def __init__(self, patch):
        self.log, self.streams, self.underway, self.users = [], [], [], []
        self.recording = self.broken = self.refuses = self.graphs_give_back = False
        self.graphs = []
        self.current, self.generator = Stream(self, "the caller's"), Generator(self)
        handles = iter(range(1, 99))
        cuda = {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": lambda device=None: Stream(self),
            "Event": lambda: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.on,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda device=None: 0,
            "graph_pool_handle": lambda: (0, next(handles)),
            "default_generators": (self.generator,),
        }
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.graph, "default_capture_stream", None)
        patch.setattr(cuda_graph, "_streams", {})
        for name, value in {
            "_cuda_endAllocateToPool": self.end_of_pool,
            "_cuda_releasePool": lambda index, pool: self.users.remove(pool),
            "_cuda_clearCublasWorkspaces": lambda: self.log.append("clear workspaces"),
            "_host_emptyCache": lambda: None,
        }.items():
            patch.setattr(torch._C, name, value, raising=False)
        uniform = torch.Tensor.uniform_
        patch.setattr(torch.Tensor, "uniform_", lambda t: (self.generator.draw(), uniform(t))[1])

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def end_of_pool(self, index, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


class Event:
    def __init__(self, played):
        self.played = played

    def record(self, stream):
        self.played.log.append(f"record {self} on {stream.name}")

    def synchronize(self):
        self.played.log.append(f"the host waits for {self}")

    def __str__(self):
        return "the last replay"


@pytest.fixture
def played(monkeypatch):
    return Played(monkeypatch)


def record(function, pool):
    return cuda_graph.CudaRecording(function, DEVICE, pool)


class TestARecordingThatFails:
    """In the recording, after the warm-up, by an error that invalidates the capture."""

    @pytest.fixture(params=[RuntimeError, KeyboardInterrupt])
    def failed(self, played, request):
        pool = cuda_graph.CudaRecording.make_pool(DEVICE)
        calls = []

        def function():
            calls.append(1)
            if len(calls) > cuda_graph.WARM_UP:
                played.broken = True
                raise request.param("in the recording")

        before = played.current
        with pytest.raises(request.param, match="in the recording"):
            record(function, pool)
        assert len(calls) == cuda_graph.WARM_UP + 1
        return pool, before

    def test_the_caller_s_stream_is_current(self, failed, played):
        assert played.current is failed[1]
        # The side stream may not be usable.
        assert {line for line in played.log if line.startswith("draw")} == {"draw on the caller's"}

    def test_the_pool_is_no_longer_recorded_into(self, failed, played):
        assert not played.underway and failed[0].handle not in played.users
        record(lambda: None, failed[0])

    def test_the_generator_draws(self, failed, played):
        assert played.generator.state == 0, "the state is what it was"
        torch.empty(1).uniform_()
        assert "another state" not in played.log, "graphs made before replay with the state that they know"

    def test_a_generator_that_nothing_else_releases(self, played, monkeypatch):
        played.generator.capturing = True
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no")))
        cuda_graph.release_generator(DEVICE, played.current)
        torch.empty(1).uniform_()
        assert played.generator.state == 1 and "another state" in played.log


@pytest.mark.parametrize("graphs_give_back", [False, True], ids=["torch 2.11 to 2.13", "torch 2.14"])
class TestWhoGivesThePoolBack:
    """Whoever does: once, or a destructor that does it again ends the process."""

    @pytest.fixture(autouse=True)
    def release(self, played, graphs_give_back):
        played.graphs_give_back = graphs_give_back

    def check(self, played, pool):
        for graph in played.graphs:
            # As the garbage collector would.
            graph.reset()
        assert not played.underway and pool.handle not in played.users
        record(lambda: None, pool)

    def test_of_a_recording_that_did_not_begin(self, played):
        pool, played.refuses = cuda_graph.Pool(DEVICE), True
        with pytest.raises(RuntimeError, match="not permitted"):
            record(lambda: None, pool)
        played.refuses = False
        self.check(played, pool)

    def test_of_one_that_was_invalidated(self, played):
        def function():
            if played.recording:
                played.broken = True
                raise RuntimeError("waits for the host")

        pool = cuda_graph.Pool(DEVICE)
        with pytest.raises(RuntimeError, match="waits for the host"):
            record(function, pool)
        self.check(played, pool)


@pytest.mark.source_tree
def test_a_peer_that_cannot_be_recorded_is_timed_eagerly_and_leaves_the_generator_drawing(played):
    timing = pytest.importorskip("bench.timing")
    timer = object.__new__(timing._DeviceTimer)
    timer.device, timer.graph, timer.calls = DEVICE, None, [lambda: None]
    timer._capture()
    assert timer.method == "graph" and timer.calls_a_sample == timing.CALLS_IN_GRAPH

    def waits():
        if played.recording:
            played.broken = True
            raise RuntimeError("waits for the host")

    timer.graph, timer.calls = None, [waits]
    timer._capture()
    assert timer.graph is None and timer.method == "events, not captured: waits for the host"
    assert not played.underway
    torch.empty(1).uniform_()


def test_a_warm_up_that_fails(played):
    pool, before = cuda_graph.Pool(DEVICE), played.current
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, pool)
    assert played.current is before and not played.underway
    record(lambda: None, pool)


class TestWhatRecordingsShare:
    def test_one_stream_of_a_device_for_all_pools(self, played):
        """Models come and go; streams that are recorded stay few, and so do their companions."""
        pools = [cuda_graph.Pool(DEVICE) for _ in range(3)]
        assert len({pool.handle for pool in pools}) == 3
        assert len({id(pool.stream) for pool in pools}) == 1

    def test_one_stream(self, played):
        pool, seen = cuda_graph.Pool(DEVICE), []
        for _ in range(2):
            record(lambda: seen.append(played.current), pool)
        assert set(seen) == {pool.stream} and len(seen) == 2 * (cuda_graph.WARM_UP + 1)
        assert [line for line in played.log if line.startswith("record on")] == [
            f"record on {pool.stream.name} into {pool.handle}, thread_local"
        ] * 2

    def test_a_run_waits_for_the_last_one_of_any(self, played):
        pool = cuda_graph.Pool(DEVICE)
        one, two = (record(lambda: None, pool) for _ in range(2))
        played.log.clear()
        one.begin()
        one.replay()
        one.end()
        elsewhere = Stream(played, "another")
        with played.on(elsewhere):
            two.begin()
            two.replay()
        assert played.log == [
            "the caller's waits for the last replay",
            "replay on the caller's",
            "record the last replay on the caller's",
            "another waits for the last replay",
            "replay on another",
        ]
        assert one.pool.done is two.pool.done
        one.wait()
        assert played.log[-1] == "the host waits for the last replay"

    def test_workspaces_are_cleared_around_the_recording(self, played):
        record(lambda: played.log.append("step"), cuda_graph.Pool(DEVICE))
        at = [n for n, line in enumerate(played.log) if line == "clear workspaces"]
        steps = [n for n, line in enumerate(played.log) if line == "step"]
        assert len(at) == 2 and at[0] > steps[-2] and at[0] < steps[-1] < at[1]
        # Graphs of others may know them, so where cuBLAS has no part in a recording they are left alone.
        played.log.clear()
        pool = cuda_graph.CudaRecording.make_pool(DEVICE, products=False)
        record(lambda: played.log.append("step"), pool)
        assert played.log.count("step") == cuda_graph.WARM_UP + 1 and "clear workspaces" not in played.log

    def test_without_inference_mode_and_autograd(self, played):
        """Whatever the caller is in: the generator's tensors are made in the first recording and written in all."""
        modes = []
        with torch.inference_mode():
            record(
                lambda: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled())),
                cuda_graph.Pool(DEVICE),
            )
        assert modes == [(False, False)] * (cuda_graph.WARM_UP + 1)

    def test_another_thread_waits_for_the_recording(self, played):
        order = []

        def elsewhere():
            with cuda_graph.quiet(DEVICE):
                order.append("another thread")

        def function():
            if not order:
                thread.start()
            thread.join(0.05)
            order.append("recording")

        thread = threading.Thread(target=elsewhere)
        record(function, cuda_graph.Pool(DEVICE))
        thread.join()
        assert order == ["recording"] * (cuda_graph.WARM_UP + 1) + ["another thread"]


class TestTheRegistry:
    KEY = (registry.STEP, DEVICE, "a shape")

    def lease(self, captures, key, make, weights="weights"):
        with captures.lease(key, lambda: weights, lambda device: object(), make) as captured:
            return captured

    def test_a_failure_costs_the_pool(self):
        captures, pools = registry.Captures(), []

        def fails(pool):
            pools.append(pool)
            raise RuntimeError("no")

        with pytest.raises(RuntimeError):
            self.lease(captures, self.KEY, fails)
        assert self.lease(captures, self.KEY, fails) is None and len(pools) == 1
        assert (
            self.lease(captures, (*self.KEY, "another"), lambda pool: (pools.append(pool), "made")[1])
            == "made"
        )
        assert pools[0] is not pools[1]
        self.lease(captures, (*self.KEY, "a third"), lambda pool: pools.append(pool))
        assert pools[1] is pools[2]

    def test_kinds_are_kept_apart(self, monkeypatch):
        """In what they count for and in the weights that they were recorded with; their memory is shared."""
        monkeypatch.setattr(registry, "MOST_CAPTURES", 2)
        captures, pools = registry.Captures(), []
        steps, passes = [[(kind, DEVICE, n) for n in range(3)] for kind in (registry.STEP, registry.STORING)]

        def make(pool):
            pools.append(pool)
            return pool

        for step, stored in zip(steps, passes):
            self.lease(captures, step, make)
            self.lease(captures, stored, make, "of the encoder")
        assert list(captures.found) == [steps[1], passes[1], steps[2], passes[2]]
        self.lease(captures, steps[2], make, "others")
        assert list(captures.found) == [passes[1], passes[2], steps[2]] and len(set(map(id, pools))) == 1
        captures.failed(passes[1], "no")
        self.lease(captures, passes[0], make, "others")
        assert list(captures.found) == [steps[2], passes[0]] and not captures.failures

    def test_failures_go_with_what_failed(self, monkeypatch):
        """Where every attempt fails, too: keys hold what would have been captured."""
        monkeypatch.setattr(registry, "MOST_CAPTURES", 2)
        captures = registry.Captures()

        def fails(pool):
            raise RuntimeError("no")

        keys = [(registry.STEP, DEVICE, n) for n in range(4)]
        for key in keys:
            with pytest.raises(RuntimeError):
                self.lease(captures, key, fails)
            captures.failed(key, "no")
        assert list(captures.found) == list(captures.failures) == keys[2:]
        for n in range(2):
            self.lease(captures, (registry.STEP, DEVICE, "other", n), lambda pool: "made")
        assert len(captures.found) == 2 and not captures.failures

    def test_modules_that_write_attributes_as_they_run(self):
        """A capture belongs to what its recording left; one that failed is not tried again for what they write."""
        captures, written, tried = registry.Captures(), [0], []

        def lease(make, *more):
            key = (*self.KEY, *more)
            with captures.lease(key, lambda: written[0], lambda device: object(), make) as captured:
                return captured

        def runs(pool):
            written[0] += 1
            tried.append(pool)
            return "made"

        def fails(pool):
            runs(pool)
            raise RuntimeError("no")

        assert [lease(runs) for _ in range(2)] == ["made", "made"] and len(tried) == 1
        # What it was before is not what was recorded.
        written[0] = 0
        assert lease(runs) == "made" and len(tried) == 2
        # Another one may have moved what the first reads.
        assert lease(runs, "another") == "made" and list(captures.found) == [(*self.KEY, "another")]
        tried.pop()
        written[0] = 5
        with pytest.raises(RuntimeError):
            lease(fails)
        for _ in range(3):
            # Uncaptured they run.
            written[0] += 1
            assert lease(fails) is None and len(tried) == 3
        captures.clear()
        assert lease(runs) == "made"

    def test_an_interrupt_is_no_failure(self):
        captures = registry.Captures()

        def interrupted(pool):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.lease(captures, self.KEY, interrupted)
        assert self.lease(captures, self.KEY, lambda pool: "made") == "made"


@pytest.mark.gpu
class TestOnTheGPU:
    def test_after_a_recording_that_failed(self):
        device = torch.device("cuda", torch.cuda.current_device())
        pool, before = cuda_graph.Pool(device), torch.cuda.current_stream()
        x, total, calls = torch.ones(4, device=device), torch.zeros(4, device=device), []
        earlier = cuda_graph.CudaRecording(lambda: total.add_(x), device, pool)

        def waits():
            calls.append(1)
            y = x * 2
            if len(calls) > cuda_graph.WARM_UP:
                y.sum().item()

        with pytest.raises(RuntimeError):
            cuda_graph.CudaRecording(waits, device, pool)
        assert torch.cuda.current_stream() == before
        torch.randint(9, (3,), device=device)
        later = cuda_graph.CudaRecording(lambda: total.mul_(2), device, pool)
        total.fill_(1)
        for recording in (earlier, later):
            recording.begin()
            recording.replay()
            recording.end()
        assert total.tolist() == [4.0] * 4

    def test_a_step_that_cannot_be_recorded(self, monkeypatch):
        """Said once; the call, later calls, draws on the device and captures of other shapes go on."""
        from dgemma_accel.hf import graph

        model = tiny_model().cuda()
        ids = prompt(2, 20)[0].cuda()
        with dgemma_accel.accelerated(model, graph=False):
            expected = model.generate(ids, seed=1).sequences
        right, before = graph.decode, torch.cuda.current_stream()

        def waits(decoder, canvas, *rest):
            if canvas.shape[0] == 2 and not torch.compiler.is_compiling():
                canvas.sum().item()
            return right(decoder, canvas, *rest)

        def refuses(function, **options):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", refuses)
        monkeypatch.setattr(graph, "decode", waits)
        with dgemma_accel.accelerated(model):
            for _ in range(2):
                assert torch.equal(model.generate(ids, seed=1).sequences, expected)
                assert torch.cuda.current_stream() == before
            torch.rand(3, device="cuda")
            model.generate(ids[:1], seed=1, max_new_tokens=CANVAS)
            reports = {
                report.batch: report for report in dgemma_accel.captures(model) if report.what == "step"
            }
        assert not reports[2].captured and "not captured" in reports[2].problem
        assert reports[1].captured and reports[1].problem is None

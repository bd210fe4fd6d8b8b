"""linears, and the branches that it and `feed_forward` run in."""

import contextlib

import pytest
import torch

from dgemma_accel import branches
from dgemma_accel.ops.linears import linears
from dgemma_accel.reference.budget import check_linears

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_case(rows, widths, dtype=torch.float32, device="cpu", embedding=40):
    weights = [torch.randn(width, embedding) for width in widths]
    return torch.randn(rows, embedding).to(device, dtype), [weight.to(device, dtype) for weight in weights]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, widths", [(7, [24]), (1, [5, 3]), (33, [64, 16, 16]), (0, [4, 2])])
def test_each_is_the_product(device, dtype, rows, widths):
    hidden, weights = make_case(rows, widths, dtype, device)
    results = linears(hidden, weights)
    assert not check_linears(results, hidden, weights)
    assert all(result.is_contiguous() for result in results)
    if rows:
        for wrong in (results[::-1] if len(set(widths)) > 1 else [], [*results[:-1], results[-1] * 1.02]):
            assert check_linears(wrong, hidden, weights)


def test_views_and_what_torch_asks_of_an_op():
    hidden, weights = make_case(6, [8, 5])
    strided = hidden.T.contiguous().T, [weights[0], torch.stack([weights[1]] * 2, 1)[:, 1]]
    assert all(torch.equal(a, b) for a, b in zip(linears(*strided), linears(hidden, weights)))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.dgemma.linears.default, (hidden, weights), test_utils=tests)
    compiled = torch.compile(
        lambda *given: sum(x.sum() for x in linears(*given)), fullgraph=True, backend="aot_eager"
    )
    assert torch.allclose(compiled(hidden, weights), sum(x.sum() for x in linears(hidden, weights)))
    with pytest.raises(RuntimeError):
        linears(hidden, [weights[0].double()])
    with pytest.raises(RuntimeError, match="not differentiable"):
        linears(hidden.requires_grad_(), weights)[0].sum().backward()


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Replays see new rows; a second recording on the same stream takes the same branches."""
    hidden, weights = make_case(64, [256, 128, 128], torch.bfloat16, "cuda", 512)
    stream, graphs = torch.cuda.Stream(), []
    linears(hidden, weights)
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = linears(hidden, weights)
        graphs.append((graph, results))
    for graph, results in graphs:
        hidden.normal_()
        graph.replay()
        assert not check_linears(results, hidden, weights)


class Stream:
    """As far as branches need one; what waits for what goes to a log."""

    def __init__(self, log, handle):
        self.log, self.cuda_stream = log, handle

    def wait_stream(self, other):
        self.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


class OnDevice:
    is_cuda, device = True, torch.device("cuda", 0)


class TestBranches:
    @pytest.fixture
    def log(self, monkeypatch):
        """A device whose current stream is 0 and whose others are 1 to 32, in turn."""
        log, self.made, self.current = [], 0, Stream([], 0)
        self.current.log = log

        def make(device):
            self.made += 1
            return Stream(log, 1 + (self.made - 1) % branches.STREAMS)

        @contextlib.contextmanager
        def on(stream):
            log.append(f"on {stream.cuda_stream}")
            yield

        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", make)
        monkeypatch.setattr(torch.cuda, "stream", on)
        for name, empty in (("_companions", {}), ("_taken", set())):
            monkeypatch.setattr(branches, name, empty)
        return log

    def test_both_ways(self, log):
        for _ in range(2):
            with branches.beside(OnDevice, 2) as (first, second):
                with second, first:
                    pass
            assert log == ["1 waits for 0", "2 waits for 0", "on 2", "on 1", "0 waits for 1", "0 waits for 2"]
            log.clear()
        with branches.beside(OnDevice):
            pass
        assert log == ["1 waits for 0", "0 waits for 1"] and self.made == 2

    def test_another_stream_has_other_companions(self, log):
        with branches.beside(OnDevice, 2):
            pass
        for handle in (1, 40):
            self.current = Stream(log, handle)
            with branches.beside(OnDevice, 2):
                pass
        found = [stream.cuda_stream for each in branches._companions.values() for stream in each]
        assert found == [1, 2, 3, 4, 5, 6]

    def test_streams_that_are_taken_are_drawn_over(self, log):
        """PyTorch hands the first out again after the last."""
        device = OnDevice.device
        with branches.beside(OnDevice, 2):
            pass
        self.made = branches.STREAMS
        assert branches.fresh_stream(device).cuda_stream == 3
        for _ in range(branches.STREAMS):
            branches.fresh_stream(device)
        assert len(branches._taken) == branches.STREAMS + 1

    def test_an_error_joins_and_is_raised(self, log):
        with pytest.raises(ValueError, match="first"), branches.beside(OnDevice, 2):
            raise ValueError("first")
        assert log[2:] == ["0 waits for 1", "0 waits for 2"]

        def broken(other):
            raise RuntimeError("operation failed due to a previous error during capture")

        self.current.wait_stream = broken
        with pytest.raises(ValueError, match="first"), branches.beside(OnDevice, 2):
            raise ValueError("first")

    def test_a_fork_that_fails_joins_what_was_forked(self, log):
        with branches.beside(OnDevice, 2):
            pass
        log.clear()

        def broken(other):
            raise RuntimeError("no more")

        branches._companions[OnDevice.device, 0][1].wait_stream = broken
        with pytest.raises(RuntimeError, match="no more"), branches.beside(OnDevice, 2):
            raise AssertionError("not reached")
        assert log == ["1 waits for 0", "0 waits for 1", "0 waits for 2"]

    def test_in_turn(self, log):
        with branches.in_turn(), branches.in_turn(), branches.beside(OnDevice, 2) as asides:
            assert len(asides) == 2
        assert log == []
        with branches.beside(OnDevice):
            pass
        assert log

    def test_without_a_gpu(self, log):
        with branches.beside(torch.ones(1), 3) as asides:
            assert len(asides) == 3
            with asides[0], asides[2]:
                pass
        assert log == [] and self.made == 0

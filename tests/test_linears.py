"""linears, with FP8 weights too, and the branches that it and `feed_forward` run in."""

import contextlib

import pytest
import torch

from dgemma_accel import branches, scaled_product
from dgemma_accel.ops import linears as module
from dgemma_accel.ops.linears import linears
from dgemma_accel.reference.budget import check_linears
from dgemma_accel.reference.quantization import dequantize, quantize_rows

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
@pytest.mark.parametrize("scaled", [False, True])
def test_in_a_cuda_graph(scaled):
    """Replays see new rows; a second recording on the same stream takes the same branches."""
    make = make_scaled if scaled else make_case
    hidden, *others = make(64, [256, 128, 128], torch.bfloat16, "cuda", 512)
    stream, graphs = torch.cuda.Stream(), []
    linears(hidden, *others)
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = linears(hidden, *others)
        graphs.append((graph, results))
    for graph, results in graphs:
        hidden.normal_()
        graph.replay()
        assert not check_linears(results, hidden, *others)


def make_scaled(rows, widths, dtype=torch.float32, device="cpu", embedding=48):
    """(rows, FP8 weights, their scales); rows and outputs of very different sizes, so that no scale is like another."""
    hidden, weights = make_case(rows, widths, torch.float32, device, embedding)

    def spread(count):
        return torch.linspace(-3, 3, count, device=device).exp2()[:, None]

    made = [quantize_rows(weight * spread(len(weight))) for weight in weights]
    return (hidden * spread(rows)).to(dtype), [one[0] for one in made], [one[1] for one in made]


@pytest.fixture
def found_out(monkeypatch):
    """What is found out of a device in a test is forgotten after it."""
    monkeypatch.setattr(scaled_product, "_ways", {})


@pytest.mark.usefixtures("found_out")
class TestScaled:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("way", [None, scaled_product.AFTERWARDS, scaled_product.WIDENED])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rows, widths, embedding", [
        (7, [32], 48), (33, [64, 16, 48], 96), (1, [16, 5], 32), (5, [16], 40), (0, [16, 32], 16),
    ])  # fmt: skip
    def test_each_is_the_product(self, device, way, dtype, rows, widths, embedding):
        """In each way that PyTorch may have; None for the one that is taken by itself."""
        given = make_scaled(rows, widths, dtype, device, embedding)
        if way is not None:
            # With which it is made ready.
            scaled_product._works(way, given[0].device, dtype)
            scaled_product._ways[given[0].device, dtype] = way
        results = linears(*given)
        assert not check_linears(results, *given)
        if not rows:
            return
        changed = [
            [torch.zeros_like(result) for result in results],
            [result * 1.02 for result in results],
            linears(*given[:2], [scale.roll(1, 0) for scale in given[2]]),
            linears(given[0] * 2, *given[1:]),
        ]
        assert all(len(check_linears(wrong, *given)) == len(widths) for wrong in changed)
        # Not what rows that were not rounded give.
        assert rows < 2 or check_linears(results, *given, rounds_rows=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_rows_stay_where_fp8_is_not_multiplied(self, monkeypatch, dtype):
        monkeypatch.setattr(module, "multiplies_fp8", lambda device: False)
        given = make_scaled(12, [32, 16], dtype)
        results = linears(*given)
        assert not check_linears(results, *given, rounds_rows=False) and check_linears(results, *given)

    def test_which_gpus_multiply_it(self, monkeypatch):
        for capability, expected in (
            ((8, 0), False),
            ((8, 6), False),
            ((8, 9), True),
            ((12, 0), True),
            (None, True),
        ):
            monkeypatch.setattr(scaled_product, "compute_capability", lambda device, found=capability: found)
            assert scaled_product.multiplies_fp8(torch.device("cuda")) is expected

    @pytest.mark.parametrize("broken", ["not by row", "wrong by row", "not at all", "wrong at all"])
    def test_the_way_is_found_out(self, monkeypatch, broken):
        """Also where a kernel is there and its result is another's; no draw of the caller's is taken."""
        before = torch._scaled_mm

        def multiply(rows, weight, row_scale, scale, **options):
            if row_scale.numel() > 1 or "at all" in broken:
                if broken.startswith("not"):
                    raise RuntimeError("no kernel")
                row_scale = row_scale * 1.5
            if row_scale.numel() > 1:
                result = ((rows.double() * row_scale) @ (weight.double() * scale)).to(options["out_dtype"])
                return options["out"].copy_(result)
            return before(rows, weight, row_scale, scale, **options)

        monkeypatch.setattr(torch, "_scaled_mm", multiply)
        expected = scaled_product.WIDENED if "at all" in broken else scaled_product.AFTERWARDS
        given, state = make_scaled(9, [16], torch.bfloat16), torch.get_rng_state()
        results = linears(*given)
        assert not check_linears(results, *given)
        assert scaled_product.way_of(torch.device("cpu"), torch.bfloat16) == expected
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_the_way_is_the_same_whatever_torch_s_default_dtype_is(self, dtype):
        device = torch.device("cpu")
        expected = scaled_product.way_of(device, torch.bfloat16)
        scaled_product._ways.clear()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert scaled_product.way_of(device, torch.bfloat16) == expected != scaled_product.WIDENED
        finally:
            torch.set_default_dtype(before)

    def test_memory_that_is_short_says_nothing_of_the_way(self, monkeypatch):
        def short(*arguments, **options):
            raise torch.OutOfMemoryError("no memory")

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(torch, "_scaled_mm", short)
            scaled_product.way_of(torch.device("cpu"), torch.bfloat16)
        assert scaled_product.way_of(torch.device("cpu"), torch.bfloat16) != scaled_product.WIDENED

    def test_nothing_is_tried_while_a_graph_is_recorded(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert scaled_product.way_of(torch.device("cuda", 0), torch.bfloat16) == scaled_product.WIDENED
        assert not scaled_product._ways

    def test_traced_and_rows_without_a_number(self):
        hidden, weights, scales = make_scaled(6, [32, 16], torch.bfloat16)
        compiled = torch.compile(lambda *given: linears(*given), fullgraph=True, backend="aot_eager")
        for mine, other in zip(
            compiled(hidden, weights, scales), linears(hidden, weights, scales), strict=True
        ):
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, other)
        numbers, row_scale = quantize_rows(hidden)
        arguments = (numbers, row_scale, weights, scales, torch.bfloat16)
        # PyTorch cannot compare FP8 tensors, as "test_schema" does.
        tests = ("test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.dgemma.scaled_linears.default, arguments, test_utils=tests)
        hidden[2], hidden[4, 3] = 0, float("nan")
        result = linears(hidden, weights, scales)[0]
        assert not result[2].any() and result[4].isnan().all() and result[[0, 1, 3, 5]].isfinite().all()

    def test_a_row_is_rounded_to_its_own_scale(self):
        rows = torch.tensor([[3.0, -448.0, 0.1], [1e-30, 2e-30, 0.0], [0.0, 0.0, 0.0]])
        numbers, scale = quantize_rows(rows)
        assert numbers.shape == rows.shape and scale.shape == (3, 1) and scale.dtype == torch.float32
        assert numbers.float().abs().amax(1).tolist() == [448, 448, 0]
        step = dequantize(numbers, scale, torch.float64)
        assert ((step - rows.double()).abs() <= rows.double().abs() / 16 + scale.double() / 512).all()


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

"""soft_embedding: every backend against fp64 truth, and the reference model's own roundings with exact=True."""

import math

import pytest
import torch
from conftest import far_apart

import dgemma_accel
from dgemma_accel import RowStats
from dgemma_accel.reference.budget import check_soft_embedding

OP = "soft_embedding"


def make_case(rows, vocab, embedding, dtype, device, settled=0.5):
    logits = torch.randn(rows, vocab, device=device) * 2
    index = torch.randint(vocab, (rows,), device=device)
    peaks = torch.nn.functional.one_hot(index, vocab) * 60.0
    logits[: int(rows * settled)] += peaks[: int(rows * settled)]
    weight = torch.randn(vocab, embedding, device=device)
    return logits.to(dtype), weight.to(dtype)


def run(logits, weight, backend, *, temperature=1.0, softcap=None, tolerance=0.0):
    settings = {"temperature": temperature, "softcap": softcap}
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference", **settings)
    result = dgemma_accel.soft_embedding(
        logits, stats, weight, tolerance=tolerance, backend=backend, **settings
    )
    return result, check_soft_embedding(result, logits, weight, temperature, softcap, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, vocab, embedding", [(1, 5, 16), (7, 700, 48), (20, 2050, 96), (3, 9000, 64)])
def test_within_budget(backend, device, dtype, rows, vocab, embedding):
    logits, weight = make_case(rows, vocab, embedding, dtype, device)
    for settings in ({}, {"temperature": 0.5, "softcap": 30.0}):
        result, problems = run(logits, weight, backend, **settings)
        assert result.shape == (rows, embedding) and result.dtype == dtype
        assert not problems, settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [300.0, 3e4, 1e6, 1e30])
def test_softcaps_far_beyond_the_logits(backend, device, dtype, softcap):
    """What capping rounds has to be small beside the logits, not beside the softcap."""
    logits = (torch.rand(8, 2050, device=device) * 8 - 4).to(dtype)
    logits[:, 7] = 9.0
    weight = torch.randn(2050, 24, device=device).to(dtype)
    for temperature in (1.0, torch.linspace(0.5, 2.0, 8, device=device)):
        _, problems = run(logits, weight, backend, temperature=temperature, softcap=softcap)
        assert not problems
    # One token holds all mass, though softcap / temperature may be no fp32 number.
    result, _ = run(logits, weight, backend, temperature=1e-9, softcap=softcap)
    torch.testing.assert_close(result, weight[7].expand(8, 24), rtol=0, atol=1e-6)


def test_shapes_and_temperature_by_row(backend, device):
    logits, weight = make_case(12, 300, 32, torch.float32, device)
    flat, _ = run(logits, weight, backend)
    blocks, problems = run(logits.view(3, 4, 300), weight, backend)
    assert not problems and torch.allclose(blocks.view(12, 32), flat, atol=1e-6)
    temperature = torch.linspace(0.2, 2.0, 12, device=device)
    _, problems = run(logits, weight, backend, temperature=temperature)
    assert not problems


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_low_temperatures(backend, device, dtype, softcap):
    """Down to the argmax: probabilities add up to 1 where logits over the temperature pass all digits of fp32."""
    logits = torch.randn(6, 2000, device=device) * 8
    logits[1] *= 1e-3
    logits = logits.to(dtype)
    logits[2, 11] = logits[2, 1500] = logits[2].max()
    weight = torch.randn(2000, 24, device=device).to(dtype)
    # Of the logits as fp32 caps them: what that rounds is not the op's.
    capped = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    distance = capped.double() - capped.double().amax(-1, keepdim=True)
    for temperature in (1e-3, 1e-5, 1e-7, 1e-9, 1e-20):
        settings = {"temperature": temperature, "softcap": softcap, "backend": backend}
        stats = dgemma_accel.row_stats(logits, seed=0, **settings | {"backend": "reference"})
        result = dgemma_accel.soft_embedding(logits, stats, weight, **settings)
        truth = torch.softmax(distance / temperature, -1) @ weight.double()
        off = (result - truth).abs().amax(-1) / truth.abs().amax(-1)
        # Row 1, flat but for the temperature, is at the mercy of the capping's own last place.
        rows = [0, 2, 3, 4, 5] if softcap is not None and temperature < 1e-3 else slice(None)
        assert off[rows].max() < (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps), temperature
        assert result.isfinite().all() and (result[1].abs() <= weight.abs().amax() * 1.01).all()


def test_rows_of_the_weight_may_lie_far_apart(backend, device):
    """Further than 32 bits count elements."""
    logits = torch.randn(2, 3, device=device).bfloat16()
    stats = dgemma_accel.row_stats(logits, seed=1, backend="reference")
    near = torch.randn(3, 48, device=device).bfloat16()
    far = far_apart(near, 2**30 + 16)
    found, expected = (
        dgemma_accel.soft_embedding(logits, stats, weight, backend=backend) for weight in (far, near)
    )
    assert torch.equal(found, expected)


def test_no_rows_and_statistics_of_any_stride(backend, device):
    logits, weight = make_case(6, 50, 16, torch.float32, device)
    empty = dgemma_accel.row_stats(logits[:0], seed=0, backend="reference")
    for exact in (False, True):
        result = dgemma_accel.soft_embedding(logits[:0], empty, weight, exact=exact, backend=backend)
        assert result.shape == (0, 16)
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference")
    spread = RowStats(*(torch.stack([field, field.flip(0)], -1)[:, 0] for field in stats))
    assert not spread.argmax.is_contiguous()
    expected = dgemma_accel.soft_embedding(logits, stats, weight, backend=backend)
    assert torch.equal(dgemma_accel.soft_embedding(logits, spread, weight, backend=backend), expected)


def test_rows_without_a_distribution_yield_zeros(backend, device):
    logits, weight = make_case(4, 500, 32, torch.float32, device)
    logits[1] = -math.inf
    logits[2, 7] = math.nan
    logits[3, ::2] = -math.inf
    result, problems = run(logits, weight, backend)
    assert not problems
    assert not result[1].any() and not result[2].any() and result[3].any()


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 1e-3])
def test_settled_rows_with_a_tolerance(backend, device, tolerance):
    logits, weight = make_case(6, 20_000, 32, torch.bfloat16, device, settled=1.0)
    result, problems = run(logits, weight, backend, softcap=30.0, temperature=0.4, tolerance=tolerance)
    assert not problems
    # Whatever the bound allows, a settled row keeps the token that holds its mass.
    complete, _ = run(logits, weight, "reference", softcap=30.0, temperature=0.4)
    assert torch.allclose(result.float(), complete.float(), atol=0.05)
    assert not torch.allclose(torch.zeros_like(complete).float(), complete.float(), atol=0.05)


def test_tolerance_of_one_leaves_everything_out(backend, device):
    """Shows that the tolerance does something: no tile holds more than all the mass."""
    logits, weight = make_case(3, 20_000, 16, torch.float32, device, settled=0.0)
    result, _ = run(logits, weight, backend, tolerance=1.0)
    complete, _ = run(logits, weight, backend)
    if backend in ("cpp", "triton"):
        assert not result.any()
    assert complete.any()


@pytest.fixture
def sums_in_fp32():
    """A product that is divided along its sum may add the parts up in 16 bits on a GPU, unless told otherwise."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before):
        setattr(matmul, name, value)


def within_a_place(result, expected, dtype):
    """Whether no element is off by more than a last place of its row's largest."""
    scale = expected.float().abs().amax(-1, keepdim=True)
    spacing = torch.finfo(dtype).eps if dtype != torch.float32 else 64 * torch.finfo(dtype).eps
    return ((result.float() - expected.float()).abs() <= spacing * scale).all()


@pytest.mark.usefixtures("sums_in_fp32")
def test_exact_is_the_reference_model(backend, device):
    """The chain of DiffusionGemma: temper, round, softmax, round, product, in bf16."""
    logits, weight = make_case(8, 900, 64, torch.bfloat16, device)
    capped = torch.tanh(logits.float() / 30.0) * 30.0
    conditioning = (capped / 0.6).to(torch.bfloat16)
    expected = conditioning.softmax(dim=-1, dtype=torch.float32).to(torch.bfloat16) @ weight
    stats = dgemma_accel.row_stats(logits, seed=0, temperature=0.6, softcap=30.0, backend="reference")
    settings = {"temperature": 0.6, "softcap": 30.0, "backend": backend}
    exact = dgemma_accel.soft_embedding(logits, stats, weight, exact=True, **settings)
    # On a GPU two products of other dtypes add up in other orders.
    assert (
        torch.equal(exact, expected) if device == "cpu" else within_a_place(exact, expected, torch.bfloat16)
    )
    default = dgemma_accel.soft_embedding(logits, stats, weight, **settings)
    x = torch.tanh(logits.double() / 30.0) * 30.0 / 0.6
    truth = torch.softmax(x, -1) @ weight.double()
    assert (default - truth).abs().max() < (exact - truth).abs().max(), "the default is nearer the truth"


@pytest.mark.usefixtures("sums_in_fp32")
@pytest.mark.parametrize("vocab", [900, 9001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_exact_in_slices_is_the_unsliced_form(backend, device, dtype, vocab):
    """The same roundings: only the order of two fp32 sums may differ, which shows in one last place at most."""
    logits, weight = make_case(9, vocab, 48, dtype, device, settled=0.3)
    logits[4, 5] = math.nan
    temperature = torch.linspace(0.4, 1.5, 9, device=device)
    settings = {"temperature": temperature, "softcap": 30.0}
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference", **settings)
    result = dgemma_accel.soft_embedding(logits, stats, weight, exact=True, backend=backend, **settings)
    whole = dgemma_accel.soft_embedding(logits, stats, weight, exact=True, backend="reference", **settings)
    assert not result[4].any() and result[3].any()
    assert within_a_place(result, whole, dtype)
    if dtype != torch.float32:
        assert (result == whole).float().mean() > (0.97 if device == "cpu" else 0.9)


def test_exact_holds_no_table_in_fp32():
    """Its largest temporary is a slice: the vocabulary can double without it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from dgemma_accel.native.soft_embedding_chunked import HOST_SLICE, exact_soft_embedding

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
            return out

    logits, weight = make_case(8, 4 * HOST_SLICE, 4, torch.bfloat16, "cpu")
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference")
    with Largest() as seen:
        exact_soft_embedding(logits[None], stats.top1_prob[None], weight, torch.tensor(1.0), None)
    assert 0 < seen.elements <= 8 * HOST_SLICE


def test_budget_fails_zeros_wrong_temperature_and_a_dropped_tile():
    for dtype in (torch.float32, torch.bfloat16):
        logits, weight = make_case(8, 4096, 32, dtype, "cpu", settled=0.0)
        result, problems = run(logits, weight, "reference")
        assert not problems
        assert check_soft_embedding(torch.zeros_like(result), logits, weight, 1.0, None)
        warm, _ = run(logits, weight, "reference", temperature=1.1)
        assert check_soft_embedding(warm, logits, weight, 1.0, None)
        dropped = weight.clone()
        dropped[1024:1280] = 0
        tile, _ = run(logits, dropped, "reference")
        assert check_soft_embedding(tile, logits, weight, 1.0, None)


LOGITS, WEIGHT = torch.zeros(2, 5), torch.zeros(5, 3)
STATS = dgemma_accel.row_stats(LOGITS, seed=0, backend="reference")


@pytest.mark.parametrize(
    "arguments, kwargs, error, text",
    [
        ((LOGITS.long(), STATS, WEIGHT), {}, TypeError, "logits: dtype must be one of"),
        (
            (LOGITS, STATS, WEIGHT[:4]),
            {},
            ValueError,
            r"weight: shape must be \[5, E\] like logits, got \(4, 3\)",
        ),
        ((LOGITS, STATS, WEIGHT.half()), {}, TypeError, "weight: dtype must be one of float32, got float16"),
        ((LOGITS, STATS, WEIGHT[0]), {}, ValueError, r"weight: shape must be \[V, E\]"),
        ((LOGITS, STATS, WEIGHT.to("meta")), {}, ValueError, "weight: must be on cpu like logits, got meta"),
        ((LOGITS, LOGITS, WEIGHT), {}, TypeError, "stats: RowStats expected"),
        ((LOGITS, RowStats(*(f[:1] for f in STATS)), WEIGHT), {}, ValueError, "stats.argmax: shape"),
        ((LOGITS, STATS, WEIGHT), {"softcap": 0}, ValueError, "softcap: must be finite and in .* got 0"),
        (
            (LOGITS, STATS, WEIGHT),
            {"tolerance": -0.1},
            ValueError,
            r"tolerance: must be in \[0, 1\], got -0.1",
        ),
        ((LOGITS, STATS, WEIGHT), {"tolerance": 1.5}, ValueError, r"tolerance: must be in \[0, 1\], got 1.5"),
        ((LOGITS, STATS, WEIGHT), {"tolerance": math.nan}, ValueError, "tolerance: must be in"),
        ((LOGITS, STATS, WEIGHT), {"temperature": 0.0}, ValueError, "temperature: must be finite"),
        (
            (LOGITS, STATS, WEIGHT),
            {"temperature": torch.tensor(0.0)},
            ValueError,
            "temperature: values must be in",
        ),
    ],
)
def test_bad_input(arguments, kwargs, error, text):
    with pytest.raises(error, match=text):
        dgemma_accel.soft_embedding(*arguments, **kwargs, backend="reference")


@pytest.mark.parametrize("exact", [False, True])
def test_opcheck(backend, device, exact):
    logits, weight = make_case(6, 50, 16, torch.float32, device)
    for rows in (logits.view(2, 3, 50), logits.view(3, 2, 50).transpose(0, 1)):
        stats = dgemma_accel.row_stats(rows, seed=0, backend="reference")
        numbers = (torch.tensor(1.0), 30.0, 0.0, exact, False, backend)
        arguments = (rows, stats.argmax, stats.top1_prob, weight, *numbers)
        torch.library.opcheck(torch.ops.dgemma.soft_embedding.default, arguments)

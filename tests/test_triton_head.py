"""What the public tests of head_stats and soft_embedding do not reach in the Triton kernels."""

import math
import os
import subprocess
import sys

import pytest
import torch

triton_soft = pytest.importorskip("dgemma_accel.triton_kernels.soft_embedding")
triton_head = pytest.importorskip("dgemma_accel.triton_kernels.head_stats")

from dgemma_accel import RowStats, configs, row_stats  # noqa: E402
from dgemma_accel.reference.budget import check_row_stats, check_soft_embedding  # noqa: E402
from dgemma_accel.reference.soft_embedding import soft_embedding as reference_soft_embedding  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(triton_soft.unavailable() is not None, reason=str(triton_soft.unavailable()))

ONE = torch.tensor(1.0)


@pytest.fixture
def poisoned():
    """Fresh tensors hold NaN and the largest integers instead of what memory happens to hold."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def small_tiles(monkeypatch, **changes):
    """Tiles of 16 rows x 16 tokens and slices of 512 tokens, so that small cases have many of each."""
    select = configs.select

    def changed(op, capability, **call):
        use = dict(select(op, capability, **call))
        tiles = {
            "block_m": 16,
            "block_n": 32,
            "block_k": 16,
            "block_e": 16,
            "block_v": 16,
            "slice": 512,
        }
        return use | {key: value for key, value in tiles.items() if key in use} | changes

    monkeypatch.setattr(configs, "select", changed)


def peaks_of(logits, temperature=1.0, softcap=None):
    """(argmax, top1_prob) of the rows."""
    stats = row_stats(logits, temperature=temperature, softcap=softcap, seed=0, backend="reference")
    return stats.argmax, stats.top1_prob


@pytest.mark.parametrize("splits", [1, 3, 40])
def test_any_number_of_splits(monkeypatch, poisoned, splits):
    # 40 splits of at most 32 tiles: some get none, and settled rows leave fewer still.
    small_tiles(monkeypatch)
    logits = torch.randn(1, 37, 1300, device=DEVICE)
    logits[:, :16] -= 200
    logits[:, :16, 700] = 0
    weight = torch.randn(1300, 24, device=DEVICE)
    result = triton_soft.soft_embedding(logits, *peaks_of(logits), weight, ONE, None, splits=splits)
    assert not check_soft_embedding(result, logits, weight, 1.0, None)


def test_a_tile_without_mass_is_never_read(monkeypatch, poisoned):
    small_tiles(monkeypatch)
    logits = torch.randn(1, 32, 600, device=DEVICE)
    logits[..., 32:64] = -math.inf
    logits[:, :16, 528:560] -= 25
    weight = torch.randn(600, 16, device=DEVICE)
    weight[32:64] = math.nan
    peaks = peaks_of(logits)
    clean = weight.nan_to_num(0.0)
    result = triton_soft.soft_embedding(logits, *peaks, weight, ONE, None)
    assert not check_soft_embedding(result, logits, clean, 1.0, None)

    # A little mass: left out where no row of the tile holds more than the tolerance, taken where one does.
    weight[528:560] = math.nan
    clean[528:560] = 1.0
    assert triton_soft.soft_embedding(logits, *peaks, weight, ONE, None).isnan().all()
    result = triton_soft.soft_embedding(logits, *peaks, weight, ONE, None, 1e-6)
    assert not check_soft_embedding(result[:, :16], logits[:, :16], clean, 1.0, None, 1e-6)
    assert result[:, 16:].isnan().all()


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 0.2])
def test_error_of_a_tolerance_is_bounded(monkeypatch, tolerance):
    small_tiles(monkeypatch)
    vocab, block_v = 1024, 16
    logits = torch.randn(1, 16, vocab, device=DEVICE) * 3
    weight = torch.randn(vocab, 16, device=DEVICE)
    peaks = peaks_of(logits)
    probabilities = torch.softmax(logits, -1)
    most = probabilities.unflatten(-1, (-1, block_v)).sum(-1).amax((0, 1))
    kept = (most > tolerance).repeat_interleave(block_v)
    assert 0 < kept.sum() < vocab or tolerance == 1e-4
    complete = probabilities @ weight
    result = triton_soft.soft_embedding(logits, *peaks, weight, ONE, None, tolerance)
    assert torch.allclose(result, (probabilities * kept) @ weight, atol=1e-5)
    left_out = (most <= tolerance).sum()
    assert (result - complete).abs().max() <= tolerance * left_out * weight.abs().max() + 1e-5


def vendor_products(monkeypatch):
    """Counts the vendor's products that run."""
    products, right = [], triton_soft.vendor_product
    monkeypatch.setattr(triton_soft, "vendor_product", lambda *a: (products.append(a[0].shape), right(*a))[1])
    return products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, vocab, embedding", [(37, 1300, 24), (1, 512, 16), (16, 5, 40)])
def test_vendor_product(monkeypatch, poisoned, dtype, rows, vocab, embedding):
    """No slice divides 1300 tokens; what lies behind the vocabulary and between the rows is NaN."""
    small_tiles(monkeypatch, product="vendor")
    products = vendor_products(monkeypatch)
    table = torch.full((rows, vocab + 700), math.nan, dtype=dtype, device=DEVICE)
    logits = table[:, 3 : vocab + 3].unsqueeze(0)
    logits.copy_(torch.randn(1, rows, vocab))
    logits[:, : rows // 2, 1] = 30.0
    padded = torch.full((vocab + 600, embedding + 9), math.nan, dtype=dtype, device=DEVICE)
    weight = padded[:vocab, 3 : embedding + 3]
    weight.copy_(torch.randn(vocab, embedding))
    temperature = torch.linspace(0.4, 1.5, rows, device=DEVICE)
    peaks = peaks_of(logits, temperature.view(1, rows), 20.0)
    result = triton_soft.soft_embedding(logits, *peaks, weight, temperature, 20.0)
    assert not check_soft_embedding(result[0], logits[0], weight, temperature, 20.0)
    assert [shape[1] for shape in products] == [min(512, vocab - first) for first in range(0, vocab, 512)]
    assert all(shape[0] == rows for shape in products)
    # A slice left out has to show.
    dropped = weight.clone()
    dropped[vocab // 512 * 512 if vocab > 512 else 0 :] = 0
    result = triton_soft.soft_embedding(logits, *peaks, dropped, temperature, 20.0)
    assert check_soft_embedding(result[0], logits[0], weight, temperature, 20.0)


def test_vendor_product_only_where_nothing_may_be_left_out(monkeypatch):
    small_tiles(monkeypatch, product="vendor")
    products = vendor_products(monkeypatch)
    logits = torch.randn(1, 16, 600, device=DEVICE).bfloat16()
    logits[..., 7] = 40.0
    weight = torch.randn(600, 16, device=DEVICE).bfloat16()
    peaks = peaks_of(logits)
    for tolerance, expected in ((1e-6, 0), (0.0, 2)):
        result = triton_soft.soft_embedding(logits, *peaks, weight, ONE, None, tolerance)
        assert not check_soft_embedding(result[0], logits[0], weight, 1.0, None, tolerance)
        assert len(products) == expected
    # fp32 keeps its IEEE products whatever the configuration says.
    triton_soft.soft_embedding(logits.float(), *peaks, weight.float(), ONE, None)
    assert len(products) == 2
    # Rows without a distribution add nothing.
    peaks[1][0, 3] = 0.0
    assert not triton_soft.soft_embedding(logits, *peaks, weight, ONE, None)[0, 3].any()


@pytest.mark.parametrize("product", ["triton", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_distribution_is_zero_whatever_the_weight_holds(
    monkeypatch, poisoned, product, dtype
):
    small_tiles(monkeypatch, product=product)
    logits = torch.randn(1, 21, 700, device=DEVICE, dtype=dtype)
    weight = torch.randn(700, 24, device=DEVICE, dtype=dtype)
    weight[3, 5], weight[600, 7], weight[601, 7] = math.nan, math.inf, -math.inf
    peaks = peaks_of(logits)
    peaks[1][0, 4], peaks[1][0, 20] = 0.0, math.nan
    result = triton_soft.soft_embedding(logits, *peaks, weight, ONE, None)
    expected = reference_soft_embedding(logits, *peaks, weight, ONE, None)
    assert (result[0, [4, 20]] == 0).all() and torch.equal(result.isnan(), expected.isnan())


def test_settled_rows_keep_no_rounding_of_their_one_probability():
    """bf16 holds 0.9973 as 0.9961 or 1: only the result itself may be rounded, not that probability too."""
    logits = torch.zeros(1, 16, 512, dtype=torch.bfloat16, device=DEVICE)
    logits[0, :, 5] = torch.linspace(11, 13, 16)
    weight = torch.zeros(512, 64, dtype=torch.bfloat16, device=DEVICE)
    weight[5] = torch.linspace(1, 2, 64)
    truth = torch.softmax(logits.double(), -1) @ weight.double()
    result = triton_soft.soft_embedding(logits, *peaks_of(logits), weight, ONE, None)
    spacing = torch.exp2(truth.log2().floor() - 7)
    # A conversion to bf16 rounds to nearest on a GPU and truncates in Triton's interpreter.
    assert ((result - truth).abs() <= (1.01 if triton_soft.INTERPRET else 0.51) * spacing).all()


def test_half_precision_of_flat_rows():
    """Probabilities far below fp16's normal numbers keep their digits."""
    logits = torch.randn(1, 2, 30_000, dtype=torch.float16, device=DEVICE)
    logits[..., 0] = 12.0
    weight = torch.ones(30_000, 16, dtype=torch.float16, device=DEVICE)
    weight[0] = 0.0
    peaks = peaks_of(logits)
    truth = torch.softmax(logits.double(), -1) @ weight.double()
    result = triton_soft.soft_embedding(logits, *peaks, weight, ONE, None)
    assert ((result - truth).abs() <= 1e-3 * truth).all()


def test_rows_by_stride_and_by_temperature(monkeypatch, poisoned):
    small_tiles(monkeypatch)
    table = torch.full((3, 11, 700), math.nan, device=DEVICE)
    logits = table[:, 1:10:2, 20:620]
    logits.copy_(torch.randn(3, 5, 600))
    padded = torch.full((640, 40), math.nan, device=DEVICE)
    weight = padded[:600, 3:27]
    weight.copy_(torch.randn(600, 24))
    temperature = torch.linspace(0.3, 2.0, 15, device=DEVICE)
    peaks = peaks_of(logits, temperature.view(3, 5), 20.0)
    peaks[1][1, 2] = 0.0
    result = triton_soft.soft_embedding(logits, *peaks, weight, temperature, 20.0)
    assert not result[1, 2].any()
    keep = [i for i in range(15) if i != 7]
    flat = logits.reshape(15, 600)[keep]
    assert not check_soft_embedding(result.reshape(15, 24)[keep], flat, weight, temperature[keep], 20.0)


@pytest.mark.parametrize("stats_temperature", [None, 1.0])
def test_head_over_many_tiles(monkeypatch, poisoned, stats_temperature):
    small_tiles(monkeypatch)
    rows, vocab, embedding = 37, 530, 40
    # What lies beside the views is NaN: a load beyond the last row, token or column would show.
    hidden = torch.full((rows + 16, embedding + 24), math.nan, device=DEVICE)[:rows, :embedding]
    weight = torch.full((vocab + 32, embedding + 24), math.nan, device=DEVICE)[:vocab, :embedding]
    hidden.copy_(torch.randn(rows, embedding))
    weight.copy_(torch.randn(vocab, embedding))
    # Equal tokens in two tiles: the argmax is the first.
    weight[500] = weight[3]
    temperature = torch.linspace(0, 2, rows, device=DEVICE)
    other = None if stats_temperature is None else torch.tensor(stats_temperature)
    uniform = torch.rand(rows, device=DEVICE)
    uniform[:4] = torch.tensor([0.0, 1 - 2**-24, 0.5, 2**-24])
    uniform[-2:] = torch.tensor([0.0, 1 - 2**-24])
    zero = torch.tensor(0)
    logits, *fields = triton_head.head_stats(
        hidden.unsqueeze(0), weight, temperature, other, uniform, None, zero, 15.0
    )
    assert torch.allclose(logits[0], hidden @ weight.T, atol=1e-4)
    settings = {"temperature": temperature, "stats_temperature": other, "softcap": 15.0, "uniform": uniform}
    assert not check_row_stats(RowStats(*(field[0] for field in fields)), logits[0], **settings)
    tied = torch.where(logits[0, :, 3] == logits[0].amax(-1))[0]
    assert (fields[0][0, tied] == 3).all()


@pytest.mark.parametrize("stats_temperature, dtype", [(None, torch.bfloat16), (1.0, torch.float32)], ids=str)
def test_head_that_keeps_no_logits(monkeypatch, poisoned, stats_temperature, dtype):
    small_tiles(monkeypatch)
    rows, vocab, embedding = 37, 530, 40
    hidden = torch.full((rows + 16, embedding + 24), math.nan, device=DEVICE, dtype=dtype)[:rows, :embedding]
    weight = torch.full((vocab + 32, embedding + 24), math.nan, device=DEVICE, dtype=dtype)[
        :vocab, :embedding
    ]
    hidden.copy_(torch.randn(rows, embedding))
    weight.copy_(torch.randn(vocab, embedding))
    hidden[5, 3] = math.nan
    temperature = torch.linspace(0, 2, rows, device=DEVICE)
    other = None if stats_temperature is None else torch.tensor(stats_temperature)
    uniform = torch.rand(rows, device=DEVICE)
    uniform[1:4] = torch.tensor([0.0, 1 - 2**-24, 0.5])
    zero = torch.tensor(0)
    settings = (temperature, other, uniform, None, zero, 15.0)
    logits, *kept = triton_head.head_stats(hidden.unsqueeze(0), weight, *settings)
    fields = triton_head.head_stats_without_logits(hidden.unsqueeze(0), weight, *settings)
    # All but the sample come from the same tile statistics.
    for index in (0, 2, 3, 4, 5):
        assert torch.equal(fields[index].nan_to_num(7.0), kept[index].nan_to_num(7.0))
    assert fields[1][0, 5] == 0 and fields[6][0, 5] == 0 and fields[1][0, 0] == fields[0][0, 0]
    assert (fields[1] == kept[1]).float().mean() >= 0.95
    assert len(set(fields[1][0].tolist())) > rows // 2, "samples from many tiles"
    if dtype == torch.float32:
        named = {"temperature": temperature, "stats_temperature": other, "softcap": 15.0, "uniform": uniform}
        assert not check_row_stats(RowStats(*(field[0] for field in fields)), logits[0], **named)
    by_seed = triton_head.head_stats_without_logits(
        hidden.unsqueeze(0), weight, temperature, other, None, torch.tensor(3), zero, 15.0
    )
    expected = triton_head.head_stats(
        hidden.unsqueeze(0), weight, temperature, other, None, torch.tensor(3), zero, 15.0
    )
    assert (by_seed[1] == expected[2]).float().mean() >= 0.95


def test_public_head_without_logits_takes_the_kernel(monkeypatch):
    import dgemma_accel

    hidden, weight = torch.randn(2, 3, 32, device=DEVICE), torch.randn(300, 32, device=DEVICE)
    asked = []
    right = triton_head.head_stats_without_logits
    monkeypatch.setattr(triton_head, "head_stats_without_logits", lambda *a: (asked.append(1), right(*a))[1])
    settings = {"seed": 1, "softcap": 20.0, "temperature": 0.7}
    logits, stats = dgemma_accel.head_stats(hidden, weight, keep_logits=False, backend="triton", **settings)
    expected = dgemma_accel.head_stats(hidden, weight, backend="reference", **settings)[1]
    assert logits is None and asked and torch.equal(stats.sample, expected.sample)


def test_head_without_rows():
    hidden, weight = torch.randn(2, 0, 32, device=DEVICE), torch.randn(50, 32, device=DEVICE)
    logits, *fields = triton_head.head_stats(
        hidden, weight, ONE, None, None, torch.tensor(1), torch.tensor(0), None
    )
    assert logits.shape == (2, 0, 50) and all(field.shape == (2, 0) for field in fields)
    peaks = torch.empty(2, 0, dtype=torch.int64, device=DEVICE), torch.empty(2, 0, device=DEVICE)
    assert triton_soft.soft_embedding(logits, *peaks, weight, ONE, None).shape == (2, 0, 32)


RECOMPILATION = """
import torch
from dgemma_accel.triton_kernels import ahead_of_time
from dgemma_accel.triton_kernels.head_stats import head_stats
from dgemma_accel.triton_kernels.soft_embedding import soft_embedding

def head(batch, temperature, softcap, seed):
    hidden = torch.empty(batch, 16, 64, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(512, 64, dtype=torch.bfloat16, device="meta")
    numbers = torch.tensor(temperature), None, None, torch.tensor(seed), torch.tensor(seed + 1)
    head_stats(hidden, weight, *numbers, softcap)

def soft(batch, temperature, softcap, tolerance):
    logits = torch.empty(batch, 16, 512, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(512, 64, dtype=torch.bfloat16, device="meta")
    argmax = torch.empty(batch, 16, dtype=torch.int64, device="meta")
    soft_embedding(logits, argmax, argmax.float(), weight, torch.tensor(temperature), softcap, tolerance)

for function, calls in (
    (head, [(8, 1.0, 30.0, 0), (9, 0.5, 1.0, 2**40), (16, 0.0, 16.0, 16)]),
    (soft, [(8, 1.0, 30.0, 0.0), (9, 0.5, 1.0, 1e-6), (40, 16.0, 16.0, 1.0)]),
):
    seen = set()
    for arguments in calls:
        with ahead_of_time.recording((9, 0)) as compiled:
            function(*arguments)
        seen.add(tuple(kernel.hash for _, kernel in compiled))
    print(function.__name__, len(seen))
"""


def test_values_do_not_recompile():
    """Temperature, softcap, tolerance, seed and batch size reach the same compiled kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RECOMPILATION], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["head", "1", "soft", "1"]

"""soft_embedding's CUDA backend: what its kernels are given and when, and that it fits into streams and graphs."""

import types

import pytest
import torch
from conftest import DEVICES

import dgemma_accel
from dgemma_accel.native import params as native_params
from dgemma_accel.native import soft_embedding_chunked, soft_embedding_cuda
from dgemma_accel.native.params import extension, missing_extension
from dgemma_accel.reference.budget import check_soft_embedding

DEVICE = torch.device(DEVICES["cuda"])
TILE = 2048


class Recording:
    """Stands for an extension with CUDA: holds what it is asked for."""

    SOFT_EMBEDDING_TILE = TILE

    def __init__(self):
        self.params, self.calls = None, []

    def SoftEmbeddingParams(self, *values):
        self.params = values
        return "params"

    def soft_embedding_probabilities_cuda(self, params, slice_index, stream):
        self.calls.append(("probabilities", params, slice_index, stream))

    def soft_embedding_sum_cuda(self, params, stream):
        self.calls.append(("sum", params, stream))


def recorded(monkeypatch, logits, weight, temperature, softcap=None):
    native = Recording()
    monkeypatch.setattr(soft_embedding_cuda, "extension", lambda: native)
    monkeypatch.setattr(
        soft_embedding_chunked,
        "vendor_product",
        lambda *operands: native.calls.append(("product", *operands)),
    )
    shape = logits.shape[:2]
    argmax, top1_prob = torch.zeros(shape, dtype=torch.int64), torch.ones(shape)
    output = soft_embedding_cuda.by_kernels(logits, argmax, top1_prob, weight, temperature, softcap, 77)
    return native, output


def test_each_slice_has_its_probabilities_its_part_of_the_weight_and_its_result(monkeypatch):
    monkeypatch.setattr(soft_embedding_cuda, "SLICE", 2 * TILE)
    logits, weight = torch.zeros(2, 3, 5000).half(), torch.zeros(5000, 7).half()
    native, output = recorded(monkeypatch, logits, weight, torch.tensor(0.5), 30.0)
    assert output.shape == (2, 3, 7) and output.dtype == torch.float16
    kinds = [call[0] for call in native.calls]
    assert kinds == ["probabilities", "product", "probabilities", "product", "sum"]
    made = [call for call in native.calls if call[0] == "probabilities"]
    assert [call[1:] for call in made] == [("params", 0, 77), ("params", 1, 77)]
    assert native.calls[-1] == ("sum", "params", 77)
    (_, first, own, target), (_, last, rest, other) = native.calls[1], native.calls[3]
    assert first.shape == (6, 4096) and last.shape == (6, 904) and last.data_ptr() == first.data_ptr()
    assert own.data_ptr() == weight.data_ptr() and rest.data_ptr() == weight[4096:].data_ptr()
    assert own.shape == (4096, 7) and rest.shape == (904, 7)
    assert target.shape == other.shape == (6, 7) and target.dtype == torch.float32
    assert other.data_ptr() == target.data_ptr() + target.numel() * 4


@pytest.mark.skipif(missing_extension() is not None, reason=str(missing_extension()))
def test_fields_are_given_in_their_order(monkeypatch):
    table = torch.zeros(3, 4, 5010).bfloat16()
    logits, weight, by_row = table[:, ::2, 3:5003], torch.zeros(5000, 7).bfloat16(), torch.ones(6)
    native, output = recorded(monkeypatch, logits, weight, by_row)
    fields = dict(zip(extension().SoftEmbeddingParams.FIELDS, native.params, strict=True))
    assert fields["logits"] is logits and fields["temperature"] is by_row and fields["output"] is output
    numbers = {"dtype": 2, "rows0": 3, "rows1": 2, "vocab": 5000, "stride0": 4 * 5010, "stride1": 2 * 5010,
               "softcap": 0.0, "columns": 3 * TILE, "embedding": 7}  # fmt: skip
    assert {name: fields[name] for name in numbers} == numbers
    assert fields["probabilities"].shape == (6, 3 * TILE) and fields["probabilities"].dtype == torch.bfloat16
    assert fields["masses"].shape == (6, 3) and fields["partial"].shape == (1, 6, 7)
    made = extension().SoftEmbeddingParams(*native.params)
    assert made.temperature == (by_row.data_ptr(), 1, 0.0) and made.masses == fields["masses"].data_ptr()
    assert made.logits == logits.data_ptr() and made.embedding == 7 and made.columns == 3 * TILE


def test_a_number_goes_by_value_and_nothing_is_launched_for_nothing(monkeypatch):
    weight = torch.zeros(50, 4).bfloat16()
    native, _ = recorded(monkeypatch, torch.zeros(1, 2, 50).bfloat16(), weight, torch.tensor(0.25))
    assert [value for value in native.params if isinstance(value, float)] == [0.25, 0.0]
    native, output = recorded(monkeypatch, torch.zeros(2, 0, 50).bfloat16(), weight, torch.tensor(0.25))
    assert output.shape == (2, 0, 4) and not native.calls


@pytest.mark.parametrize(
    "dtype, exact, missing, kernels",
    [
        (torch.bfloat16, False, None, True),
        (torch.float16, False, None, True),
        (torch.float32, False, None, False),
        (torch.bfloat16, True, None, False),
        (torch.bfloat16, False, "built without CUDA", False),
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_pytorch(monkeypatch, dtype, exact, missing, kernels):
    taken = []
    monkeypatch.setattr(soft_embedding_cuda, "missing_kernels", lambda device: missing)
    monkeypatch.setattr(soft_embedding_cuda, "by_kernels", lambda *arguments: taken.append("kernels"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=5))
    logits, weight = torch.randn(1, 2, 50).to(dtype), torch.randn(50, 4).to(dtype)
    stats = dgemma_accel.row_stats(logits, seed=0, backend="reference")
    found = soft_embedding_cuda.soft_embedding(
        logits, stats.argmax, stats.top1_prob, weight, torch.tensor(1.0), None, 0.0, exact
    )
    assert taken == (["kernels"] if kernels else [])
    assert kernels or not check_soft_embedding(found, logits, weight, 1.0, None)


def test_what_is_missing_is_said(monkeypatch, caplog):
    missing = soft_embedding_cuda.__dict__["missing_kernels"]
    if DEVICE.type == "cpu" and not hasattr(missing, "__wrapped__"):
        pytest.skip("these kernels take CPU tensors")
    of = missing.__wrapped__
    monkeypatch.setattr(soft_embedding_cuda, "compute_capability", lambda device: (7, 5))
    monkeypatch.setattr(soft_embedding_cuda, "missing_cuda", lambda: None)
    monkeypatch.setattr(soft_embedding_chunked, "PRODUCT_WITH_DTYPE", object())
    assert of("cuda:0").startswith("compute_capability: required 7.5, supported 8.0 and above")
    monkeypatch.setattr(soft_embedding_cuda, "compute_capability", lambda device: (8, 0))
    monkeypatch.setattr(native_params.BuiltCapability, "_archs", lambda self: ["80"])
    assert of("cuda:0") is None
    monkeypatch.setattr(soft_embedding_cuda, "missing_cuda", lambda: "no CUDA")
    assert of("cuda:0") == "no CUDA"
    # For each that was missing, and not for what is there.
    assert len(caplog.messages) == 2
    assert caplog.messages[1] == "soft_embedding on cuda:0: PyTorch's operations (no kernel: no CUDA)"
    monkeypatch.setattr(soft_embedding_chunked, "PRODUCT_WITH_DTYPE", None)
    assert "2.8 and newer" in of("cuda:0")


def canvas(dtype=torch.bfloat16, rows=5, vocab=5001, embedding=20):
    """An odd vocabulary, whose rows start anywhere in a 16-byte vector; rows of each formula below a softcap of 30."""
    logits = torch.randn(2, rows, vocab, device=DEVICE) * torch.linspace(1, 5, rows, device=DEVICE)[:, None]
    logits[0, 1, 17] = 40.0
    return logits.to(dtype), torch.randn(vocab, embedding, device=DEVICE).to(dtype)


def statistics(logits, **settings):
    return dgemma_accel.row_stats(logits, seed=0, backend="reference", **settings)


@pytest.fixture
def narrow(monkeypatch):
    """Slices of one tile, so that small vocabularies have several; what is fresh is NaN."""
    monkeypatch.setattr(soft_embedding_cuda, "SLICE", TILE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.ptx
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [5001, 2 * TILE])
def test_slices_are_within_budget_and_repeat_their_bits(dtype, vocab):
    logits, weight = canvas(dtype, vocab=vocab)
    temperature = torch.linspace(0.4, 1.6, 10, device=DEVICE).view(2, 5)
    settings = {"temperature": temperature, "softcap": 30.0}
    stats = statistics(logits, **settings)
    result = dgemma_accel.soft_embedding(logits, stats, weight, backend="cuda", **settings)
    assert not check_soft_embedding(result, logits, weight, temperature, 30.0)
    for _ in range(3 if DEVICE.type == "cuda" else 1):
        again = dgemma_accel.soft_embedding(logits, stats, weight, backend="cuda", **settings)
        assert torch.equal(result, again)
    dropped = weight.clone()
    dropped[TILE : TILE + 600] = 0
    wrong = dgemma_accel.soft_embedding(logits, stats, dropped, backend="cuda", **settings)
    assert check_soft_embedding(wrong, logits, weight, temperature, 30.0)


@pytest.mark.gpu
@pytest.mark.ptx
@pytest.mark.usefixtures("narrow")
def test_no_distribution_is_zeros_and_nan_stays_in_its_row():
    logits, weight = canvas()
    weight[3, 5] = float("nan")
    stats = statistics(logits)
    stats.top1_prob[0, 2] = 0.0
    stats.top1_prob[1, 4] = float("nan")
    logits[0, 3, 5000] = float("nan")
    result = dgemma_accel.soft_embedding(logits, stats, weight, backend="cuda")
    assert not result[0, 2].any() and not result[1, 4].any()
    assert result[0, 3].isnan().all()
    assert result[1, 0].isnan().nonzero().tolist() == [[5]]


@pytest.mark.gpu
@pytest.mark.capture
def test_side_stream_and_graph_give_the_same_bits_and_a_new_temperature():
    logits, weight = canvas(rows=64, vocab=100_003, embedding=256)
    temperature = torch.tensor(0.7, device=DEVICE)
    stats = statistics(logits, temperature=0.7)

    def embed():
        return dgemma_accel.soft_embedding(logits, stats, weight, temperature=temperature, backend="cuda")

    expected = embed()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = embed()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(expected, aside)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = embed()
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(expected, captured)
    temperature.fill_(1.5)
    graph.replay()
    # The mass takes out that top1_prob is that of another temperature.
    assert not check_soft_embedding(captured, logits, weight, 1.5, None)

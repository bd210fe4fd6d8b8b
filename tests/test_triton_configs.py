"""Every tile shape that is shipped for this architecture, or is tried by the tuning, computes the right numbers.

A compiler may get one shape wrong and all others right, and only a run of what it made shows that: on a GPU, or carried
out on the host (`make ptx-tests`).
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from dgemma_accel.triton_kernels import block_attention as attention_module
from dgemma_accel.triton_kernels import common
from dgemma_accel.triton_kernels import experts as experts_module
from test_block_attention import make_case as make_attention_case
from test_block_attention import run as run_attention
from test_experts import BLOCKS, PLAIN, ROWS, make_fp8_case
from test_experts_nvfp4 import make_nvfp4_case
from test_head_stats import check_logits
from test_head_stats import run as run_head_stats
from test_row_stats import make_logits
from test_row_stats import run as run_row_stats
from test_soft_embedding import make_case as make_soft_embedding_case
from test_soft_embedding import run as run_soft_embedding

import dgemma_accel
from dgemma_accel import configs
from dgemma_accel.reference.budget_experts import check_experts
from dgemma_accel.samplers import EntropyBound, Renoise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    common.target is None and DEVICE == "cpu", reason="nothing is compiled here; see `make ptx-tests`"
)
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def entries():
    """(op, when, use) of the configuration file that calls here take."""
    capability = common.target or (torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    for op, listed in configs.read(configs.name_for(capability)).items():
        for entry in listed:
            for i, use in enumerate([entry["use"], *entry.get("try", ())]):
                label = "-".join(f"{key}={value}" for key, value in entry["when"].items())
                yield pytest.param(op, entry["when"], use, id=f"{op}-{label}-{i}".replace(" ", ""))


def largest(value):
    return max(value) if isinstance(value, list) else value


def check_row_stats_entry(when):
    logits = make_logits(5, 10_007, DTYPES[when["bytes"]], 25.0, device=DEVICE)
    _, problems = run_row_stats(logits, "triton", temperature=0.6, stats_temperature=1.0, softcap=30.0)
    assert not problems


def check_commit_entry(when):
    length = largest(when["block"])
    tokens = torch.randint(1000, (2, length), device=DEVICE)
    logits = torch.randn(2, length, 50, device=DEVICE) * 4
    stats = dgemma_accel.row_stats(logits, seed=1, backend="reference")
    for settings in (
        {"rule": EntropyBound(0.7 * length), "write": Renoise(1000)},
        {"rule": EntropyBound(0.01), "write": Renoise(1000)},
    ):
        found, expected = (
            dgemma_accel.commit(tokens, stats, seed=3, backend=backend, **settings)
            for backend in ("triton", "reference")
        )
        for field in dataclasses.fields(expected):
            left, right = getattr(found, field.name), getattr(expected, field.name)
            assert left is right is None or torch.equal(left, right), field.name
        assert 0 < int(found.num_committed.min())


def check_block_attention_entry(when):
    head_dim, dtype = largest(when["head_dim"]), DTYPES[when["bytes"]]
    # More rows than a tile has, and a prefix of several tiles that ends inside one.
    case = make_attention_case(
        1, 4, 2, 70, head_dim, prefix=150, ranges=[(3, 147)], dtype=dtype, device=DEVICE
    )
    for causal, softcap in ((False, None), (True, 15.0)):
        _, problems = run_attention(case, "triton", softcap=softcap, causal=causal)
        assert not problems


def check_head_stats_entry(when):
    dtype = DTYPES[when["bytes"]]
    hidden = torch.randn(1, 140, 160, device=DEVICE).to(dtype)
    weight = (torch.randn(700, 160, device=DEVICE) * 0.3).to(dtype)
    logits, _, problems = run_head_stats(hidden, weight, "triton", softcap=30.0, temperature=0.7)
    assert check_logits(logits, hidden, weight)
    assert not problems


def check_soft_embedding_entry(when):
    logits, weight = make_soft_embedding_case(140, 900, 300, DTYPES[when["bytes"]], DEVICE)
    _, problems = run_soft_embedding(logits, weight, "triton", temperature=0.5, softcap=30.0)
    assert not problems


def check_experts_entry(when):
    # The rows' bytes where weights are widened to fp32, else a weight's.
    rows = torch.float32 if when["bytes"] == 4 else torch.bfloat16
    if when["bytes"] == 0.5 or when.get("format") == "nvfp4":
        dtypes = {rows, torch.float16} if when["bytes"] == 0.5 else {rows}
        cases = [make_nvfp4_case(70, 2, 3, 208, 176, dtype, DEVICE) for dtype in dtypes]
    else:
        kinds = [BLOCKS, ROWS] if when["bytes"] == 1 else [PLAIN]
        kinds += [BLOCKS] if when["bytes"] == 4 else []
        cases = [make_fp8_case(70, 2, 3, 208, 176, rows, DEVICE, which=(kind, kind)) for kind in kinds]
    for case, scales in cases:
        result = dgemma_accel.experts(*case, backend="triton", **scales)
        assert not check_experts(result, *case, **scales)


CHECKS = {
    "row_stats": check_row_stats_entry,
    "commit": check_commit_entry,
    "block_attention": check_block_attention_entry,
    "head_stats": check_head_stats_entry,
    "soft_embedding": check_soft_embedding_entry,
    "experts": check_experts_entry,
}


@pytest.mark.parametrize("op, when, use", list(entries()))
def test_a_shipped_shape_is_right(monkeypatch, op, when, use):
    for key, module, name in (
        ("sliced", attention_module, "COMPILES"),
        ("chained", experts_module, "CHAINS"),
    ):
        if when.get(key) and not getattr(module, name):
            pytest.skip("for newer compilers")
        # An entry behind one for newer compilers is found without what they can.
        monkeypatch.setattr(module, name, bool(when.get(key)))
    taken = []

    def select(asked, capability, **call):
        if asked != op:
            return configs._select(configs.name_for(capability), asked, tuple(sorted(call.items())))
        # Few rows, in whatever number the entry is for.
        if "rows" in when:
            call["rows"] = when["rows"]
        assert configs._fits(when, call), (when, call)
        taken.append(call)
        return use

    monkeypatch.setattr(configs, "select", select)
    CHECKS[op](when)
    assert taken

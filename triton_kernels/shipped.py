"""Every shipped configuration as calls on meta tensors, for `ahead_of_time`.

`python -m dgemma_accel.triton_kernels.shipped 9.0 12.0` compiles them for those compute capabilities and writes one
JSON object per kernel: what `tests/test_compile_budgets.py` judges.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from .. import configs
from ..reference.commit import CommitCall
from ..reference.feed_forward import FeedForwardCall
from ..reference.progress import ProgressCall
from ..reference.quantization import FP8, NVFP4, SCALE_GROUP, scale_shape
from ..samplers import EntropyBound, Renoise
from ..samplers.encoding import Flag, Measure, Select, Write
from . import ahead_of_time, sliced_scores
from . import block_attention as block_attention_module
from . import experts as experts_module
from .block_attention import block_attention
from .commit import commit
from .experts import experts
from .feed_forward import feed_forward
from .head_stats import head_stats, head_stats_without_logits
from .progress import progress
from .quantize_rows import quantize_rows
from .row_stats import row_stats
from .soft_embedding import soft_embedding
from .top_k_top_p import top_k_top_p

VOCAB = 262_144
CANVAS = 256
EMBEDDING = 2816
# The kernels of an op that hold its matrix products; the others merge or select.
MATRIX_KERNELS = (
    "block_attention_kernel",
    "head_tile_kernel",
    "product_kernel",
    "gate_up_kernel",
    "down_kernel",
)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
# The bytes that an entry of `experts` names are those of a weight; less than two mean rows in bf16.
QUANTISED = {1: FP8, 0.5: NVFP4}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _row_stats_by_device_numbers(when: dict, rows: int, vocab: int) -> Callable[[], object]:
    """Temperatures per row, seed and offset on the device, and logits that are a view."""

    def launch():
        logits = _empty(2, rows + 1, vocab, dtype=DTYPES[when["bytes"]])[:, 1:]
        each, seed = _empty(2 * rows), _empty(dtype=torch.int64)
        return row_stats(logits, each, each, None, seed, seed, 30.0)

    return launch


def _row_stats(
    when: dict, two_temperatures: bool, rows: int = CANVAS, vocab: int = VOCAB, cutoff: bool = False
) -> Callable[[], object]:
    def launch():
        one = torch.tensor(1.0)
        logits = _empty(1, rows, vocab, dtype=DTYPES[when["bytes"]])
        other = one if two_temperatures else None
        seed, least = torch.tensor(1), _empty(rows) if cutoff else None
        return row_stats(logits, one, other, None, seed, torch.tensor(0), 30.0, cutoff=least)

    return launch


def _commit(when: dict) -> Callable[[], object]:
    length = max(when["block"]) if isinstance(when["block"], list) else when["block"]

    def launch():
        rule, write = EntropyBound(0.1).encode(), Renoise(VOCAB)
        tokens = _empty(1, length, dtype=torch.int64)
        stats = _empty(1, length)
        number = torch.tensor(0.0)
        call = CommitCall(
            tokens, tokens, tokens, stats, stats, stats, stats, None,
            int(rule.measure), int(rule.select), int(rule.flags), torch.tensor(0), number, number, -1,
            int(write.kind), write.argument, torch.tensor(1), torch.tensor(0),
            tokens, _empty(1, 1, length, dtype=torch.int64), _empty(1, dtype=torch.bool), number,
        )  # fmt: skip
        return commit(call)

    return launch


def _commit_by_device_numbers(number: int, select: Select, by_row: bool) -> Callable[[], object]:
    """A short canvas whose numbers all lie on the device, as in a captured graph: 0-d, or one per row of the batch.

    `number` counts the calls: measures, writes, flags and state take turns, so that together they reach all of them.
    """
    batch, length = 2, 32
    shape = (batch,) if by_row else ()
    measure = list(Measure)[number % len(Measure)]
    write = list(Write)[number % len(Write)]
    flags = {
        Select.TOP_K: Flag.GUMBEL, Select.THRESHOLD: Flag.STRICT | Flag.RELATIVE, Select.FACTOR: Flag.LAST_RANK_QUIRK,
        Select.ENTROPY_BOUND: Flag.INCLUSIVE, Select.HIERARCHY: Flag.RELATIVE,
    }.get(select, Flag.NONE)  # fmt: skip
    state = number % 2 == 0

    def launch():
        tokens, stats = _empty(batch, length, dtype=torch.int64), _empty(batch, length)
        k, value = _empty(*shape, dtype=torch.int64), _empty(*shape)
        seed, canvas = _empty(dtype=torch.int64), _empty(1, batch, length, dtype=torch.int64)
        candidates = _empty(batch, length, dtype=torch.bool) if by_row else None
        call = CommitCall(
            tokens, tokens, tokens, stats, stats, stats, stats, candidates,
            int(measure), int(select), int(flags if by_row else Flag.NONE), k, value, value, 7,
            int(write), VOCAB, seed, seed,
            *((tokens, canvas, _empty(batch, dtype=torch.bool), _empty()) if state else (None,) * 4),
        )  # fmt: skip
        return commit(call)

    return launch


def _progress(noise: bool, finished: bool) -> Callable[[], object]:
    batch = 4

    def launch():
        tokens, flags = _empty(batch, CANVAS, dtype=torch.int64), _empty(batch, dtype=torch.bool)
        return progress(
            ProgressCall(
                tokens, tokens, _empty(batch, CANVAS, dtype=torch.bool), _empty(batch, CANVAS), flags, flags,
                _empty(batch, dtype=torch.int64), flags if finished else None, 7, noise, not noise, False,
            )
        )  # fmt: skip

    return launch


def _block_attention(
    when: dict,
    causal: bool,
    softcap: float | None,
    window: int | None = None,
    splits: int = 4,
    length: int = CANVAS,
    slots: int = 32_768,
) -> Callable[[], object]:
    head_dim = max(when["head_dim"]) if isinstance(when["head_dim"], list) else when["head_dim"]
    dtype = DTYPES[when["bytes"]]
    # The two kinds of layers of DiffusionGemma: 8 query heads to a KV head at head_dim 512, else 2.
    kv_heads, group = (2, 8) if head_dim == 512 else (8, 2)

    def launch():
        query = _empty(1, length, kv_heads * group, head_dim, dtype=dtype).transpose(1, 2)
        key = _empty(1, length, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
        prefix = _empty(1, kv_heads, slots, head_dim, dtype=dtype)
        bound = _empty(1, dtype=torch.int32)
        # An entry with sliced scores hides the one for compilers that cannot slice; that one has to fit as well.
        sliced = when.get("sliced", False) and sliced_scores.COMPILES
        with mock.patch.object(block_attention_module, "COMPILES", sliced):
            return block_attention(
                query, key, key, prefix, prefix, bound, bound, 1.0, softcap, causal, window, splits=splits
            )

    return launch


def _head_stats(when: dict, two_temperatures: bool, run=head_stats) -> Callable[[], object]:
    def launch():
        one, zero = torch.tensor(1.0), torch.tensor(0)
        hidden = _empty(1, CANVAS, EMBEDDING, dtype=DTYPES[when["bytes"]])
        weight = _empty(VOCAB, EMBEDDING, dtype=DTYPES[when["bytes"]])
        return run(hidden, weight, one, one if two_temperatures else None, None, zero, zero, 30.0)

    return launch


def _soft_embedding(when: dict, use: dict) -> Callable[[], object]:
    def launch():
        # The first slice and a later one are all the kernels there are.
        dtype, vocab = DTYPES[when["bytes"]], 2 * use["slice"]
        logits, weight = _empty(1, CANVAS, vocab, dtype=dtype), _empty(vocab, EMBEDDING, dtype=dtype)
        argmax, top1_prob = _empty(1, CANVAS, dtype=torch.int64), _empty(1, CANVAS)
        return soft_embedding(logits, argmax, top1_prob, weight, torch.tensor(1.0), 30.0, splits=6)

    return launch


def _experts(
    when: dict, kind: torch.dtype | None, *, plain_gate_up: bool = False, by_row: bool = False
) -> Callable[[], object]:
    # One canvas through the 128 experts of a layer, top 8, or the rows of a prompt.
    rows, count, top_k, width = (4096 if when.get("rows") == "many" else CANVAS), 128, 8, 704

    def launch():
        dtype = DTYPES.get(when["bytes"], torch.bfloat16)
        index, weights = _empty(rows, top_k, dtype=torch.int64), _empty(rows, top_k)
        matrices, scales, totals = [], [], []
        shapes = (count, 2 * width, EMBEDDING), (count, EMBEDDING, width)
        kinds = None if plain_gate_up else kind, kind
        for (*outer, columns), stored_as in zip(shapes, kinds):
            stored = columns // 2 if stored_as == NVFP4 else columns
            matrices.append(_empty(*outer, stored, dtype=stored_as or dtype))
            groups = _empty(*outer, columns // SCALE_GROUP, dtype=FP8)
            blocks = _empty(*outer, 1) if by_row else _empty(*scale_shape((*outer, columns)))
            scales.append({NVFP4: groups, FP8: blocks}.get(stored_as))
            totals.append(_empty(count) if stored_as == NVFP4 else None)
        hidden = _empty(rows, EMBEDDING, dtype=dtype)
        # As with sliced scores: the entry behind one with chained products has to fit as well.
        with mock.patch.object(
            experts_module, "CHAINS", when.get("chained", False) and experts_module.CHAINS
        ):
            return experts(hidden, index, weights, *matrices, "gelu_tanh", *scales, *totals)

    return launch


def _feed_forward() -> Callable[[], object]:
    """A canvas through a layer; its experts' kernels are those of `experts`."""
    count, top_k, width, dense_width = 128, 8, 704, 2112

    def launch():
        def bf16(*shape: int) -> torch.Tensor:
            return _empty(*shape, dtype=torch.bfloat16)

        rows = [bf16(CANVAS, EMBEDDING) for _ in range(3)]
        dense = *(bf16(dense_width, EMBEDDING) for _ in range(2)), bf16(EMBEDDING, dense_width)
        experts = bf16(count, 2 * width, EMBEDDING), bf16(count, EMBEDDING, width)
        router = bf16(count, EMBEDDING), bf16(count)
        return feed_forward(FeedForwardCall(*rows, *dense, *router, *experts, top_k, "gelu_tanh"))

    return launch


def _quantize_rows(width: int, dtype: torch.dtype) -> Callable[[], object]:
    return lambda: quantize_rows(_empty(CANVAS, width, dtype=dtype))


def _top_k_top_p(dtype: torch.dtype, softcap: float | None) -> Callable[[], object]:
    logits = _empty(1, CANVAS, VOCAB, dtype=dtype)
    return lambda: top_k_top_p(logits, torch.tensor(0.7), 50, 0.9, True, softcap)


def launches(name: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """The calls that reach every entry of a configuration file: (label, whether tensor cores are expected, call)."""
    for op, entries in configs.read(name).items():
        for entry in entries:
            when = entry["when"]
            label = op + " " + " ".join(f"{key}={value}" for key, value in when.items())
            if op == "row_stats":
                yield label, False, _row_stats(when, False)
                yield label + " two temperatures", False, _row_stats(when, True)
                yield label + " short vocabulary", False, _row_stats(when, False, 300, 130)
                yield label + " cutoff", False, _row_stats(when, False, cutoff=True)
                yield label + " two temperatures and cutoff", False, _row_stats(when, True, cutoff=True)
                yield label + " numbers by row", False, _row_stats_by_device_numbers(when, CANVAS, VOCAB)
            elif op == "commit":
                yield label, False, _commit(when)
                if entry is entries[0]:
                    for number, (by_row, select) in enumerate(itertools.product((False, True), Select)):
                        kind = f"commit {select.name} " + ("numbers by row" if by_row else "0-d numbers")
                        yield kind, False, _commit_by_device_numbers(number, select, by_row)
                    # What follows a commit has one shape for all architectures.
                    yield "progress", False, _progress(False, False)
                    yield "progress from noise", False, _progress(True, True)
                    # Nor have rows that FP8 linears multiply.
                    for dtype in (torch.bfloat16, torch.float32):
                        yield f"quantize_rows bytes={dtype.itemsize}", False, _quantize_rows(EMBEDDING, dtype)
                        yield f"top_k_top_p bytes={dtype.itemsize}", False, _top_k_top_p(dtype, None)
                    yield "top_k_top_p softcap", False, _top_k_top_p(torch.bfloat16, 30.0)
            elif op == "block_attention":
                # fp32 products keep fp32 precision, which tensor cores do not have.
                matrix = when["bytes"] == 2
                yield label, matrix, _block_attention(when, False, None)
                if matrix and when["head_dim"] in (256, 512):
                    yield label + " unsplit", matrix, _block_attention(when, False, None, splits=1)
                    # The encoder's; a window is only a number to it.
                    yield label + " prompt", matrix, _block_attention(when, True, None, 1024, 1, 1001, 0)
                    yield label + " causal", matrix, _block_attention(when, True, None, 1024)
                    yield label + " causal softcap", matrix, _block_attention(when, True, 50.0)
            elif op == "head_stats":
                yield label, when["bytes"] == 2, _head_stats(when, False)
                yield label + " two temperatures", when["bytes"] == 2, _head_stats(when, True)
                yield (
                    label + " no logits",
                    when["bytes"] == 2,
                    _head_stats(when, False, head_stats_without_logits),
                )
            elif op == "soft_embedding":
                yield label, when["bytes"] == 2, _soft_embedding(when, entry["use"])
            elif op == "experts":
                kind = NVFP4 if when.get("format") == "nvfp4" else QUANTISED.get(when["bytes"])
                yield label, when["bytes"] < 4, _experts(when, kind)
                if when == {"bytes": 2, "rows": "few"}:
                    yield "feed_forward", True, _feed_forward()
                if kind == NVFP4 and when.get("rows") == "many":
                    # Tiles of rows are those of the weights that take the smaller ones.
                    yield label + " plain gate_up", True, _experts(when, kind, plain_gate_up=True)
                if kind == FP8:
                    yield label + " scales by row", True, _experts(when, kind, by_row=True)
                if when["bytes"] == 4 and kind is None:
                    yield label + " fp8 weights", False, _experts(when, FP8)
            else:
                raise ValueError(f"configs/{name}.json: no launch known for {op}")


# Calls whose kernel differs from the configuration's own by how its numbers come in, or by a few rows.
OTHER_NUMBERS = (
    "two temperatures", "short vocabulary", "cutoff", "numbers by row", "0-d numbers", "fp8 weights",
)  # fmt: skip
OTHER_CALLS = (
    *OTHER_NUMBERS, "no logits", "unsplit", "prompt", "causal", "causal softcap", "plain gate_up", "scales by row",
)  # fmt: skip


def left_out(capability: tuple[int, int]) -> tuple[str, ...]:
    """Ends of labels that need no compiling: the first architecture of a generation has done it, with these
    instructions, and where it takes the same file with these very tiles."""
    first = (capability[0], 0)
    if capability == first:
        return ()
    return OTHER_CALLS if configs.name_for(capability) == configs.name_for(first) else OTHER_NUMBERS


def report(capability: tuple[int, int]) -> Iterator[dict]:
    """The resources of every kernel of every shipped configuration that a capability takes."""
    known = left_out(capability)
    for label, matrix, launch in launches(configs.name_for(capability)):
        if label.endswith(known):
            continue
        for used in ahead_of_time.compile_launches(capability, launch):
            expected = matrix and used.kernel in MATRIX_KERNELS
            yield dataclasses.asdict(used) | {"label": label, "matrix_expected": expected}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for row in report(tuple(int(part) for part in argument.split("."))):
            print(json.dumps(row), flush=True)

"""The wgmma kernel of block_attention on the host, thread by thread: clusters, swizzled panels, asynchronous products.

The harness is that of test_cuda_emulation_block_attention.py. Matrix descriptors are made and read bit by bit; what it
cannot see is whether the hardware lays operands out as tests/csrc/emulation/emulated_warpgroup.h does.
"""

import re

import pytest
import torch
from test_block_attention import make_case
from test_cuda_emulation_block_attention import (
    CSRC,
    EMULATION,
    attend,
    compile_to,
    execute,
    machine,
    mutate,
    program,
    pytestmark,
    read_result,
    write_case,
)

from dgemma_accel.reference.budget import check_block_attention

__all__ = ["machine", "program", "pytestmark"]

CASES = {
    "one_tile": (dict(batch=1, query_heads=8, kv_heads=1, length=16), {}),
    "prefix_and_softcap": (
        dict(batch=1, query_heads=8, kv_heads=1, length=16, prefix=140, ranges=[(2, 137)]),
        {"scale": 0.1, "softcap": 5.0},
    ),
    # Three tiles of rows, the last one with 30 of them, and a walk of an odd number of tiles.
    "rows_of_several_clusters": (
        dict(batch=1, query_heads=13, kv_heads=1, length=22, prefix=110, ranges=[(0, 109)]),
        {},
    ),
    "split_causal": (
        dict(batch=2, query_heads=2, kv_heads=1, length=21, prefix=200, ranges=[(0, 200), (7, 9)]),
        {"causal": True, "splits": 4},
    ),
    "window": (
        dict(batch=1, query_heads=4, kv_heads=2, length=80, prefix=140, ranges=[(2, 140)]),
        {"causal": True, "window": 70, "splits": 2},
    ),
}  # fmt: skip


def with_wgmma(folder):
    with open(folder / "case", "a") as case:
        case.write("wgmma 1\n")


@pytest.fixture(autouse=True)
def every_case_by_wgmma(monkeypatch):
    def run(program, folder):
        with_wgmma(folder)
        return execute(program, folder)

    monkeypatch.setattr("test_cuda_emulation_block_attention.execute", run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("name", CASES)
def test_within_budget(program, tmp_path, name, head_dim, dtype):
    shape, options = CASES[name]
    case = make_case(**shape, head_dim=head_dim, dtype=dtype)
    _, _, problems = attend(program, tmp_path, case, **options)
    assert not problems


@pytest.mark.parametrize("head_dim", [256, 512])
def test_large_scores_do_not_overflow(program, tmp_path, head_dim):
    case = make_case(1, 4, 2, 16, head_dim, prefix=100, scale=8.0, dtype=torch.bfloat16)
    output, _, problems = attend(program, tmp_path, case, scale=1.0, splits=2)
    assert not problems and bool(output.isfinite().all())


@pytest.mark.parametrize("head_dim", [256, 512])
def test_rows_without_any_key_and_splits_without_a_tile(program, tmp_path, head_dim):
    """More splits than tiles: clusters that meet at no tile end together all the same."""
    case = make_case(1, 4, 1, 5, head_dim, prefix=40, ranges=[(11, 11)], dtype=torch.float16)
    assert not attend(program, tmp_path, case, causal=True, splits=5)[2]


BARRIER = r"no barrier after|copy to it is running"
FENCE, WAIT = "hw::show_copies_to_multiplies();\n    ", "hw::wait_cluster();\n    "
SYNC = "hw::sync_block();\n    "
# Of the kernel for head_dim 512.
TOP = "hw::show_copies_to_multiplies();\n    // The other block is there, and so are the copies of all threads.\n    "
MEETING = "hw::arrive_cluster();\n    hw::wait_cluster();\n    "
BOTTOM = "hw::wait_copies<0>();\n    hw::show_copies_to_multiplies();\n    hw::sync_block();\n    warp.start_values"
# {name: (text that stands there once, what takes its place, what the report says)}; where the report is empty, the
# kernel runs to its end and the error budget has to fail.
CLUSTER_MUTANTS = {
    "first_meeting_dropped": (MEETING + "warp.start_keys", "warp.start_keys", BARRIER + "|may not have begun"),
    "first_keys_refilled_too_soon": (SYNC + "task.fill_keys(task", "task.fill_keys(task", BARRIER),
    "values_refilled_too_soon": (SYNC + "task.fill_values", "task.fill_values", BARRIER),
    "second_barrier_dropped": (BOTTOM, BOTTOM.replace(SYNC, ""), BARRIER),
    "first_fence_dropped": (TOP, TOP.replace(FENCE[:-4], ""), "no fence after"),
    "second_fence_dropped": (BOTTOM, BOTTOM.replace(FENCE, ""), "no fence after"),
    "waits_for_one_group_less": (BOTTOM, BOTTOM.replace("<0>", "<1>"), BARRIER),
    "first_scores_read_before_the_cluster_met": (
        "hw::wait_cluster();\n  }\n  DGEMMA_NO_UNROLL", "}\n  DGEMMA_NO_UNROLL", "no barrier after|twice",
    ),
    "scores_read_before_the_cluster_met": (WAIT + "warp.finish_values", "warp.finish_values", "no barrier after|twice"),
    "exchange_in_one_place": (
        "exchange = other_exchange();", "", "no barrier of the cluster after a read",
    ),
    "other_block_may_not_have_begun": (
        MEETING + "warp.start_keys", SYNC + "warp.start_keys", "may not have begun",
    ),
    "shows_scores_to_itself": (
        "if (more) warp.show_keys_to(1 - task.part", "if (more) warp.show_keys_to(task.part", "writes into block",
    ),
    "keys_filled_where_they_are_needed_next": (
        "fill_keys(tile + 3, keys)", "fill_keys(tile + 3, other_keys())", BARRIER,
    ),
    "keys_of_one_tile_further": ("fill_keys(tile + 3, keys)", "fill_keys(tile + 4, keys)", ""),
}  # fmt: skip
# Of that for 256.
START = (
    "hw::wait_copies<0>();\n    hw::show_copies_to_multiplies();\n    hw::sync_block();\n    warp.start_keys"
)
MIDDLE = (
    "hw::show_copies_to_multiplies();\n"
    "    // Nobody multiplies the next tile's keys or the last one's values any more.\n    "
)
BLOCK_MUTANTS = {
    "first_barrier_dropped": (START, START.replace(SYNC, ""), BARRIER),
    "first_fence_dropped": (START, START.replace(FENCE, ""), "no fence after"),
    "first_keys_refilled_too_soon": (SYNC + "task.fill_keys(task", "task.fill_keys(task", BARRIER),
    "barrier_dropped": (SYNC + "warp.start_values", "warp.start_values", BARRIER),
    "fence_dropped": (MIDDLE, MIDDLE.replace(FENCE[:-4], ""), "no fence after"),
    "waits_for_one_group_less": (
        "hw::wait_copies<0>();\n    " + MIDDLE, "hw::wait_copies<1>();\n    " + MIDDLE, BARRIER,
    ),
    "values_in_one_place": ("values = other_values();", "", BARRIER + "|running"),
    "keys_in_one_place": ("keys = other_keys();", "", BARRIER + "|running|"),
    "keys_filled_where_they_are_needed_next": (
        "fill_keys(tile + 3, keys)", "fill_keys(tile + 3, other_keys())", BARRIER,
    ),
    "values_of_one_tile_further": ("fill_values(tile + 1, values)", "fill_values(tile + 2, values)", ""),
    "scores_of_the_next_tile": (
        "warp.take_scores();\n", "if (tile == task.walk.first) warp.take_scores();\n", "",
    ),
    "keys_not_waited_for": ("if (more) warp.finish_keys();", "", "without a fence|not committed|running"),
}  # fmt: skip
# Of what both are made of; tried at 512.
WARP_MUTANTS = {
    "scores_used_before_the_products_are_done": (
        "{ hw::wait_multiplies(ahead); }", "{}", "without a fence|not committed|running",
    ),
    "values_refilled_while_they_are_multiplied": (
        "{ hw::wait_multiplies(this->output[0]); }", "{}", "without a fence|not committed|running",
    ),
    "products_without_a_fence": ("hw::begin_multiplies(this->output[0]);", "", "without a fence"),
    "scores_without_a_fence": ("hw::begin_multiplies(ahead);", "", "without a fence"),
    "products_not_committed": (
        "hw::commit_multiplies();\n  }\n\n  DGEMMA_DEVICE_MEMBER void finish_values",
        "}\n\n  DGEMMA_DEVICE_MEMBER void finish_values", "has not committed",
    ),
    "scores_added_to_the_last_ones": ("right, step > 0)", "right, true)", ""),
    "swizzle_of_half_the_rows": ("(chunk % 8 ^ (row & 7))", "(chunk % 8 ^ (row & 3))", ""),
    "steps_of_half_the_width": ("uint32_t(step % 4) * 32", "uint32_t(step % 4) * 16", ""),
    "groups_of_keys_twice": ("uint32_t(k) * 2 * Shape::kGroupBytes", "uint32_t(k) * Shape::kGroupBytes", ""),
    "panels_and_groups_exchanged": (
        "Shape::kPanelBytes,\n                                   Shape::kGroupBytes};",
        "Shape::kGroupBytes,\n                                   Shape::kPanelBytes};", "outside|never written|",
    ),
    "both_blocks_take_the_first_half_of_the_queries": ("part * Shape::kColumns + chunk * 8;", "chunk * 8;", ""),
    "both_warpgroups_take_the_first_rows": (
        "uint32_t(hw::recomputed(this->row_warp) / 4) * 64 * Shape::kPanelRowBytes", "0", "",
    ),
}  # fmt: skip
PLANTED = [
    pytest.param(head_dim, f"sm_90a/{file}.cuh", *mutant, id=f"{head_dim}-{name}")
    for head_dim, file, mutants in (
        (512, "kernel", CLUSTER_MUTANTS),
        (256, "kernel_hd256", BLOCK_MUTANTS),
        (512, "warp_wgmma", WARP_MUTANTS),
    )
    for name, mutant in mutants.items()
]


def run_mutant(folder, machine, csrc, head_dim=512):
    """(the finished process, the violations of the budget) of a case that meets every branch."""
    source = EMULATION / "block_attention.cpp"
    program = compile_to(
        folder / "mutant", csrc, [source, machine], "-O1", f"-DEMULATED_HEAD_DIM={head_dim}", "-Wno-unused"
    )
    case = make_case(1, 5, 1, 17, head_dim, prefix=230, ranges=[(3, 226)], dtype=torch.bfloat16)
    arguments = (head_dim**-0.5, None, False)
    write_case(folder, case, *arguments, splits=1)
    with_wgmma(folder)
    done = execute(program, folder)
    if done.returncode:
        return done, []
    return done, check_block_attention(*read_result(folder, case[0]), *case, *arguments)


@pytest.mark.parametrize("head_dim", [256, 512])
def test_the_unchanged_kernel_passes_what_mutants_fail(machine, tmp_path, head_dim):
    done, problems = run_mutant(tmp_path, machine, CSRC, head_dim)
    assert done.returncode == 0 and not problems, done.stderr


@pytest.mark.parametrize("head_dim, file, text, replacement, report", PLANTED)
def test_planted_bug_is_caught(machine, tmp_path, head_dim, file, text, replacement, report):
    done, problems = run_mutant(tmp_path, machine, mutate(tmp_path, file, text, replacement), head_dim)
    if done.returncode == 0:
        assert re.fullmatch(report, "") and problems, done.stderr
    else:
        assert done.returncode == 3 and report and re.search(report, done.stderr), done.stderr


def test_a_descriptor_that_holds_the_rank_of_its_block_is_caught(machine, tmp_path):
    """The second block of a cluster has its shared memory 16 MB further on, where a descriptor has other fields."""
    path, masked = "../common/device/matrix_descriptor.h", "(address & 0x3ffff) >> 4"
    done, problems = run_mutant(tmp_path, machine, mutate(tmp_path, path, masked, "address >> 4"))
    assert problems if done.returncode == 0 else re.search("outside|never written|no fence", done.stderr), (
        done.stderr
    )

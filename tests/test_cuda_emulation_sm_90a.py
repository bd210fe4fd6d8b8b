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


# The dtypes differ in the numbers alone, which two cases show.
NAMES = [(name, torch.bfloat16) for name in CASES] + [
    (name, torch.float16) for name in ("one_tile", "split_causal")
]


@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("name, dtype", NAMES, ids=str)
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


BARRIER = "no barrier after|copy to it is running|never written"
FENCE, SYNC = "hw::show_copies_to_multiplies();\n    ", "hw::sync_block();\n    "
# Of the kernel for head_dim 512.
MEETING = "hw::arrive_cluster();\n    hw::wait_cluster();\n    "
TOP = (
    "hw::wait_copies<0>();\n  hw::show_copies_to_multiplies();\n"
    "  // Nobody multiplies the last tile's values any more, nor the next tile's keys.\n  hw::sync_block();\n"
)
MIDDLE = "hw::wait_copies<1>();\n  hw::show_copies_to_multiplies();\n  hw::sync_block();\n"
FENCE_OF_TILE, SYNC_OF_TILE = "hw::show_copies_to_multiplies();\n", "hw::sync_block();\n"
NOT_MET = "no barrier of the cluster|no barrier after|twice|never written"
# {name: (text that stands there once, what takes its place, what the report says)}; where the report may be empty, the
# kernel runs to its end and the error budget has to fail.
CLUSTER_MUTANTS = {
    "first_meeting_dropped": (MEETING + "warp.start_keys", "warp.start_keys", BARRIER + "|may not have begun"),
    "other_block_may_not_have_begun": (
        MEETING + "warp.start_keys", SYNC + "warp.start_keys", "may not have begun",
    ),
    "first_largest_scores_read_before_the_cluster_met": (MEETING + "task.fill", SYNC + "task.fill", NOT_MET),
    "first_probabilities_read_before_the_cluster_met": (
        MEETING.rstrip() + "\n\n    own = warp", SYNC + "\n    own = warp", NOT_MET,
    ),
    "told_before_the_cluster_met": ("    hw::wait_cluster();\n  }\n}", "  }\n}", NOT_MET),
    "sums_read_before_the_cluster_met": (MEETING + "warp.add_sums", SYNC + "warp.add_sums", NOT_MET),
    "sums_of_one_block": ("warp.add_sums(own.other().probabilities());", "", ""),
    "barrier_of_keys_dropped": (TOP, TOP.replace(SYNC_OF_TILE, ""), BARRIER),
    "fence_of_keys_dropped": (TOP, TOP.replace(FENCE_OF_TILE, ""), "no fence after"),
    "keys_not_waited_for": (TOP, TOP.replace("<0>", "<1>"), BARRIER),
    "barrier_of_values_dropped": (MIDDLE, MIDDLE.replace(SYNC_OF_TILE, ""), BARRIER),
    "fence_of_values_dropped": (MIDDLE, MIDDLE.replace(FENCE_OF_TILE, ""), "no fence after"),
    "values_not_waited_for": (MIDDLE, MIDDLE.replace("<1>", "<2>"), BARRIER),
    "probabilities_in_one_place": (
        "odd * Shape::kProbabilityBytes", "0", NOT_MET,
    ),
    "largest_scores_in_one_place": (
        "odd * Shape::kLargestBytes", "0", "no barrier of the cluster after a read",
    ),
    "keys_in_one_place": ("odd * Shape::kKeyTileBytes", "0", BARRIER),
    "tells_itself": ("tell_probabilities(next, other_block", "tell_probabilities(next, task.part", "writes into block"),
    "keys_of_one_tile_further": ("fill_keys(tile + 3", "fill_keys(tile + 4", ""),
    "values_of_one_tile_further": ("fill_values(tile,", "fill_values(tile + 1,", "never written|"),
    "output_not_rescaled": ("if (rescale) warp.rescale_output(correction);", "", ""),
    "output_rescaled_too_soon": (
        "warp.finish_values();\n  if constexpr (kMore > 0) {\n    if (rescale) warp.rescale_output(correction);",
        "if (rescale) warp.rescale_output(correction);\n  warp.finish_values();\n  if constexpr (kMore > 0) {", "",
    ),
    "each_block_has_its_own_maximum": (
        "fmaxf(largest[0][half], float_from_bits(words.word[half]))", "largest[0][half]", "",
    ),
    "scores_masked_as_the_first_keys": (
        "finish_scores(p, walk, tile, rows, first_key())", "finish_scores(p, walk, tile, rows)", "",
    ),
    "values_of_its_own_keys_twice": ("Shape::kOwnKeys - first_key()", "first_key()", ""),
    "first_columns_of_the_queries_four_times": (
        "first_queries[step][half] = load_pair<true>(source + step * 16);",
        "first_queries[step][half] = load_pair<true>(source);", "",
    ),
    "columns_of_the_queries_four_steps_further": (
        "left.at(this->to_step(step - kQuerySteps,", "left.at(this->to_step(step,", "outside|never written|no fence|",
    ),
    "scores_added_to_the_last_ones": ("columns, step > 0)", "columns, true)", ""),
    "scores_used_before_the_products_are_done": (
        "hw::wait_multiplies<kPending>(this->ahead);", "", BARRIER + "|no fence|",
    ),
    "leader_takes_scores_too_soon": ("finish_keys<0>(task.p", "finish_keys<1>(task.p", ""),
    "follower_takes_scores_too_soon": ("finish_keys<1>(task.p", "finish_keys<2>(task.p", ""),
    "values_refilled_while_they_are_multiplied": (
        "{ hw::wait_multiplies<0>(this->output[0]); }", "{}", BARRIER + "|no fence|",
    ),
    "values_without_a_fence": ("hw::begin_multiplies(this->output[0]);", "", "without a fence"),
    "scores_without_a_fence": ("hw::begin_multiplies(this->ahead);", "", "without a fence"),
    "values_not_committed": (
        "hw::commit_multiplies();\n  }\n\n  DGEMMA_DEVICE_MEMBER void finish_values",
        "}\n\n  DGEMMA_DEVICE_MEMBER void finish_values", "has not committed",
    ),
}  # fmt: skip
# Of that for 256.
START = (
    "hw::wait_copies<2>();\n    hw::show_copies_to_multiplies();\n    hw::sync_block();\n    warp.start_keys"
)
TILE = (
    "hw::wait_copies<0>();\n  hw::show_copies_to_multiplies();\n"
    "  // Nobody multiplies this tile's keys or the last one's values any more.\n  hw::sync_block();\n"
)
BLOCK_MUTANTS = {
    "first_barrier_dropped": (START, START.replace(SYNC, ""), BARRIER),
    "first_fence_dropped": (START, START.replace(FENCE, ""), "no fence after"),
    "first_keys_not_waited_for": (START, START.replace("<2>", "<3>"), BARRIER),
    "barrier_dropped": (TILE, TILE.replace(SYNC_OF_TILE, ""), BARRIER),
    "fence_dropped": (TILE, TILE.replace(FENCE_OF_TILE, ""), "no fence after"),
    "waits_for_one_group_less": (TILE, TILE.replace("<0>", "<1>"), BARRIER),
    "values_in_one_place": (
        "next_values = Shape::kValuesOffset + (1 - odd) * Shape::kValueTileBytes",
        "next_values = values", BARRIER + "|",
    ),
    "keys_in_one_place": (
        "next_keys = Shape::kKeysOffset + (1 - odd) * Shape::kKeyTileBytes", "next_keys = keys", BARRIER + "|",
    ),
    "keys_filled_where_they_are_needed_next": (
        "fill_keys(tile + 2, keys)", "fill_keys(tile + 2, next_keys)", BARRIER,
    ),
    "values_of_one_tile_further": ("fill_values(tile + 1, next", "fill_values(tile + 2, next", "never written|"),
    "scores_of_the_follower_not_taken": ("if constexpr (kMore) warp.template finish_keys<0>();", "", ""),
    "scores_of_the_leader_taken_too_soon": ("warp.template finish_keys<1>();", "warp.template finish_keys<2>();", ""),
    "output_of_the_leader_not_rescaled": ("    if (rescale) warp.rescale_output(correction);\n", "", ""),
    "output_of_the_leader_rescaled_too_soon": (
        "    warp.finish_values();\n    if (rescale) warp.rescale_output(correction);\n",
        "    if (rescale) warp.rescale_output(correction);\n    warp.finish_values();\n", "",
    ),
    "output_of_the_follower_not_rescaled": (
        "if (warp.take_softmax(task, tile, correction)) warp.rescale_output(correction);",
        "warp.take_softmax(task, tile, correction);", "",
    ),
    "probabilities_of_the_last_tile": (
        "    // Those before were multiplied until now.\n    warp.pack_probabilities(probabilities);\n", "", "",
    ),
    "values_not_waited_for": ("{ hw::wait_multiplies<0>(this->output[0]); }", "{}", BARRIER + "|no fence|"),
}  # fmt: skip
# Of what both are made of; tried at 512.
WARP_MUTANTS = {
    "swizzle_of_half_the_rows": ("(chunk % 8 ^ (row & 7))", "(chunk % 8 ^ (row & 3))", ""),
    "steps_of_half_the_width": ("uint32_t(step % 4) * 32", "uint32_t(step % 4) * 16", ""),
    "groups_of_keys_twice": ("uint32_t(k) * 2 * Shape::kGroupBytes", "uint32_t(k) * Shape::kGroupBytes", ""),
    "panels_and_groups_exchanged": (
        "first{values, Shape::kValuePanelBytes, Shape::kGroupBytes}",
        "first{values, Shape::kGroupBytes, Shape::kValuePanelBytes}", "outside|never written|",
    ),
    "both_blocks_take_the_first_keys": ("slots.first += part * Shape::kOwnKeys * slots.stride;", "", ""),
    "both_blocks_take_the_first_columns": ("(p, walk, tile, part * Shape::kColumns)", "(p, walk, tile, 0)", ""),
    "both_warpgroups_take_the_first_rows": (
        "uint32_t(hw::recomputed(this->row_warp) / 4) * 64 * kWgmmaPanelRowBytes", "0", "",
    ),
    "queries_begin_with_the_first_column": ("+ kFirst + chunk * 8", "+ chunk * 8", ""),
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
    only = [f"-DEMULATED_HEAD_DIM={head_dim}", "-DEMULATED_BFLOAT16", "-DEMULATED_WGMMA"]
    program = compile_to(folder / "mutant", csrc, [source, machine], "-O1", *only, "-Wno-unused")
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

"""The CUDA kernel of progress, run thread by thread on the host under sanitizers: equal to the reference."""

import pytest
import torch
from emulated_kernels import build, planted, read_tensor, run, run_clean, skip_without_compiler, write_case
from test_progress import CASES, random_call

from dgemma_accel.reference.progress import progress

pytestmark = skip_without_compiler()

PROGRAM = "progress_emulated"
RESULTS = ("new_active", "new_stuck", "new_nfe")


def cases(folder):
    """(folder, call) of every combination of flags, rows shorter and longer than a warp."""
    generator = torch.Generator().manual_seed(0)
    for number, (*flags, finished) in enumerate(CASES):
        call = random_call(generator, 100, (1, 31, 64, 77)[number % 4], flags=flags, finished=finished)
        numbers = {"batch": call.tokens.shape[0], "length": call.tokens.shape[1]}
        tensors = {}
        for name, value in call._asdict().items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif value is not None:
                numbers[name] = value
        yield write_case(folder / str(number), numbers, tensors), call


def differences(folder, call) -> list[str]:
    dtypes = (torch.bool, torch.bool, torch.int64)
    expected = zip(RESULTS, dtypes, progress(call))
    return [
        name
        for name, dtype, value in expected
        if not torch.equal(read_tensor(folder, name, dtype, value.shape), value)
    ]


def test_equal_to_the_reference(tmp_path):
    made = list(cases(tmp_path))
    run_clean(build(PROGRAM), [folder for folder, _ in made])
    for folder, call in made:
        assert differences(folder, call) == []


@pytest.mark.parametrize(
    "file, passage, replacement",
    [
        ("progress/kernel.cuh", "i < params.length", "i <= params.length"),
        ("progress/kernel.cuh", "mask = hw::kWarp / 2", "mask = hw::kWarp / 4"),
        ("progress/kernel.cuh", "i += hw::kWarp", "i += 2 * hw::kWarp"),
        ("progress/rules.h", "(params.noise || masks_left)", "masks_left"),
        ("progress/rules.h", "params.last || ended", "ended"),
        ("progress/rules.h", "if (!params.open[position]) return bits;", ""),
    ],
    ids=["bound", "reduction", "stride", "noise", "last", "open"],
)
def test_planted_bugs_are_caught(tmp_path, file, passage, replacement):
    program = planted(PROGRAM, tmp_path, file, passage, replacement)
    made = list(cases(tmp_path / "cases"))
    done = run(program, [folder for folder, _ in made])
    assert done.returncode != 0 or any(differences(folder, call) for folder, call in made)

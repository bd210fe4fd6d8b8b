"""What a new user runs first: the demo and `generate`, on the tiny checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers.models.diffusion_gemma")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHECKPOINT = EXAMPLES / "tiny-dgemma" / "checkpoint"


def run(*arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def test_demo():
    result = run(EXAMPLES / "demo.py", "--prompts", 5)
    assert result.returncode == 0, result.stderr
    matches = re.findall(r"exact match (\d+)/5", " ".join(result.stdout.split()))
    assert len(matches) == 2 and min(map(int, matches)) >= 4
    assert "The canvas settling on" in result.stdout and "step 1" in result.stdout


def test_generate_command():
    command = ("-m", "dgemma_accel", "generate", "--model", CHECKPOINT)
    result = run(*command, "--prompt", "count 8 to 12", "--seed", 3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("8 9 10 11 12") >= 3, "a draft and both answers"
    one_side = run(
        *command, "--prompt", "sort 4271", "--only", "accelerated", "--no-drafts", "--backend", "cpp"
    )
    assert one_side.returncode == 0 and "1247" in one_side.stdout and "reference" not in one_side.stdout
    wrong = run(*command, "--prompt", "x", "--max-new-tokens", 0)
    assert wrong.returncode == 2 and "--max-new-tokens: must be at least 1" in wrong.stdout
    wrong = run(*command, "--prompt", "x", "--seed", 2**64)
    assert wrong.returncode == 2 and "--seed: must have at most 64 bits" in wrong.stdout


def test_text_that_the_terminal_cannot_encode_is_written_in_escapes():
    command = ("-m", "dgemma_accel", "generate", "--model", CHECKPOINT, "--only", "reference", "--prompt")
    result = run(*command, "sort 4271 é", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert "The canvas settling on: 'sort 4271 \\xe9'" in result.stdout
    _, _, table = result.stdout.partition("tokens/step")
    assert "sort 4271 \\xe9" in table


def test_the_table_s_library_is_missed_before_anything_is_generated(monkeypatch):
    from dgemma_accel.cli import generate

    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="rich is needed"):
        generate.load(CHECKPOINT)


@pytest.mark.parametrize(
    "script, arguments, line",
    [
        ("demo.py", ("--prompts", 0), "--prompts: must be at least 1"),
        ("demo.py", ("--backend", "nope"), "--backend: must be auto or one of"),
        ("tiny-dgemma/evaluate.py", ("--prompts", 0), "--prompts: must be at least 1"),
        ("tiny-masked/evaluate.py", ("--prompts", 0), "--prompts: must be at least 1"),
    ],
)
def test_bad_arguments_of_the_examples_get_a_line(script, arguments, line):
    result = run(EXAMPLES / script, *arguments)
    assert result.returncode == 2 and line in result.stderr and "Traceback" not in result.stderr

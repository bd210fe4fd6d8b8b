"""What a compiled step launches on a GPU, read from inductor's code without one: `tools/step_launches.py`.

In a process of its own, since the tool puts answers of a GPU into torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.source_tree,
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch that was built without CUDA"),
]

TOOL = Path(__file__).resolve().parent.parent / "tools" / "step_launches.py"
# By kind of layer: the products of query, key and value, all launches of a step, and those that are not beside others.
LAUNCHES = {"sliding_attention": (3, 21, 15), "full_attention": (2, 19, 14)}
# With FP8 weights one more, which rounds what attention makes, and two in the dense MLP's branch.
ROUNDING = (0, 3, 1)
# What the pass that stores a canvas launches besides: it writes keys and values.
WRITES = 2


def leaves(launches: list[dict]) -> list[dict]:
    return [leaf for one in launches for leaf in (leaves(one["launches"]) if one["kind"] == "op" else [one])]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("linears", [None, "fp8"])
def test_a_layer_waits_for_one_product_before_attention_and_for_no_op_of_pytorch(tmp_path, linears):
    written = tmp_path / "launches.json"
    command = [sys.executable, "-W", "ignore", TOOL, "--json", written]
    command += [] if linears is None else ["--linears", linears]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    for what, more in (("step", 0), ("storing", WRITES)):
        before, *layers, after = found[what]
        wide = [*range(5, 30, 6)]
        assert [(part["kind"], part["layers"]) for part in layers] == [
            ("sliding_attention", [number for number in range(30) if number not in wide]),
            ("full_attention", wide),
        ]
        for part in layers:
            launches = part["launches"][: len(part["launches"]) - more]
            projections, together, in_a_row = LAUNCHES[part["kind"]]
            multiply, more_ops = "linears", ()
            if linears is not None:
                _, together, in_a_row = (a + b for a, b in zip(LAUNCHES[part["kind"]], ROUNDING))
                multiply, more_ops = "scaled_linears", ("scaled_linears",)
            names = [launch["name"] for launch in launches if launch["kind"] == "op"]
            assert names == [multiply, "block_attention", *more_ops, "feed_forward"]
            first, last = launches[0], next(one for one in launches if one["name"] == "feed_forward")
            # The norm before is in one kernel with the end of the layer before, and so is what rounds its rows.
            assert first["name"] == multiply and {one["sizes"][2] for one in first["launches"]} == {2816}
            assert sorted(one["branch"] for one in first["launches"]) == [*range(projections)]
            # The dense MLP beside router and experts.
            rounding = [] if linears is None else ["quantize_rows_kernel"]
            mlp = [*rounding, *["product"] * 2, "gated_kernel", *rounding, "product"]
            beside = [one for one in last["launches"] if one["branch"]]
            assert [one["name"] if one["kind"] == "ours" else one["kind"] for one in beside] == mlp
            # A topk or a copy would be PyTorch's own.
            assert {leaf["kind"] for leaf in leaves(launches)} == {"inductor", "product", "ours"}
            assert len(leaves(launches)) <= together, done.stdout
            assert sum(leaf["branch"] == 0 for leaf in leaves(launches)) <= in_a_row, done.stdout
            writes = part["launches"][len(launches) :]
            assert [launch["name"] for launch in writes] == ["index_copy_"] * more
        assert not any(launch["kind"] == "op" for launch in before["launches"])
        heads = [launch["name"] for launch in after["launches"] if launch["kind"] == "op"]
        assert sorted(heads) == (["commit", "head_stats", "soft_embedding"] if what == "step" else [])


def test_a_machine_without_a_compiler_gets_one_line(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TOOL], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("step_launches.py: needs g++") and len(done.stderr.splitlines()) == 1

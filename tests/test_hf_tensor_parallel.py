"""Two gloo ranks share the head's vocabulary as transformers' tensor-parallel plan cuts it: the tokens of one process.

`from_pretrained(..., tp_plan="auto")` needs the `accelerate` distribution, which these tests do not ask for; here the
style that the model's plan names for lm_head is applied to the loaded model, weight and forward, by its own methods.
"""

import os
from datetime import timedelta

import hf_models as hf
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dgemma_accel
from dgemma_accel.hf import lookout

pytest.importorskip("transformers.distributed.tensor_parallel")
PLAN = getattr(pytest.importorskip("transformers").DiffusionGemmaForBlockDiffusion, "_tp_plan", None) or {}
pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built into this PyTorch"),
    pytest.mark.skipif("lm_head" not in PLAN, reason="the plan of this transformers leaves lm_head whole"),
]

CASES = {
    "auto": {},
    "reference": {"backend": "reference"},
    "exact": {"exact": True},
}
WIDTH = 64
# One step of one canvas.
ONCE = {"max_denoising_steps": 1, "max_new_tokens": hf.CANVAS}


def split_head(model):
    """What transformers' tensor-parallel loading does to the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    style = ALL_PARALLEL_STYLES[model._tp_plan["lm_head"]]
    style.shard_param(model.lm_head, "weight", mesh)
    style.install_forward(model.lm_head, mesh)
    return model


def run(model, options, **call):
    ids, mask = hf.prompt(2, 9, left_padding=(0, 3))
    with dgemma_accel.accelerated(model, **options):
        return hf.generate(model, ids, mask, **call).sequences


class Traffic:
    """Elements of every tensor that a collective takes, by name, and how often DTensor gathers."""

    def __init__(self, patch):
        self.elements = {"all_gather": set(), "all_reduce": set()}
        self.gathers = 0
        for name, place in (("all_gather", 1), ("all_reduce", 0)):
            self._count(patch, name, place)
        from torch.distributed.tensor import DTensor

        for name in ("redistribute", "full_tensor"):
            patch.setattr(DTensor, name, self._counting(getattr(DTensor, name)))

    def _count(self, patch, name, place):
        original = getattr(dist, name)

        def counted(*args, **kwargs):
            self.elements[name].add(args[place].numel())
            return original(*args, **kwargs)

        patch.setattr(dist, name, counted)

    def _counting(self, original):
        def counted(*args, **kwargs):
            self.gathers += 1
            return original(*args, **kwargs)

        return counted


def worker(rank, directory):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    outcome = {}
    model = split_head(hf.tiny_model())
    for name, options in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            traffic = Traffic(patch)
            outcome[name] = run(model, options), traffic.elements, traffic.gathers
    bf16 = split_head(hf.tiny_model(torch.bfloat16))
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        outcome["bf16"] = run(bf16, {}), traffic.elements, traffic.gathers
    outcome["bf16 once"] = (run(bf16, {}, **ONCE),)
    with pytest.MonkeyPatch.context() as patch:
        # One rank sees its flags at once, the other when it has to wait for them.
        patch.setattr(lookout.HostCopy, "ready", lambda copy: rank == 0)
        outcome["at different paces"] = (run(model, {}),)
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        outcome["graph"] = run(model, {"graph": True}), traffic.elements, traffic.gathers
    ids, mask = hf.prompt(2, 9, left_padding=(0, 3))
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        outcome["original"] = hf.generate(model, ids, mask).sequences, traffic.elements, traffic.gathers
    torch.save(outcome, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tp")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.spawn(worker, args=(str(directory),), nprocs=2)
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_one_process(ranks, name):
    expected = run(hf.tiny_model(), CASES[name])
    for rank in ranks:
        assert torch.equal(rank[name][0], expected)
    assert len(set(expected[0].tolist())) > 10, "the tokens say something"


def test_a_bf16_model_gives_the_same_on_both_ranks(ranks):
    assert torch.equal(ranks[0]["bf16"][0], ranks[1]["bf16"][0])
    # Rounding the parts of a soft embedding apart moves tokens of later steps; nothing of it is in the first one.
    expected = run(hf.tiny_model(torch.bfloat16), {}, **ONCE)
    assert all(torch.equal(rank["bf16 once"][0], expected) for rank in ranks)


@pytest.mark.parametrize("name", ["auto", "reference", "bf16"])
def test_ranks_exchange_a_few_numbers_per_row(ranks, name):
    rows = 2 * hf.CANVAS
    _, elements, gathers = ranks[0][name]
    assert gathers == 0, "something gathered a split tensor"
    assert elements["all_gather"] == {7 * rows}
    # Token and probability of the sample; the soft embeddings and a rank's share of the mass.
    assert elements["all_reduce"] == {2 * rows, (WIDTH + 1) * rows}


@pytest.mark.parametrize("name", ["at different paces", "graph"])
def test_the_same_steps_on_both_ranks(ranks, name):
    """The graph that is asked for does not serve a split head: gathering all logits is what the split saves."""
    expected = run(hf.tiny_model(), {})
    for rank in ranks:
        assert torch.equal(rank[name][0], expected)
    assert ranks[0]["graph"][2] == 0, "something gathered a split tensor"


def test_the_original_gathers_all_logits(ranks):
    assert ranks[0]["original"][2] > 0

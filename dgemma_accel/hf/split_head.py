"""A head whose vocabulary is split over ranks, as transformers' tensor-parallel plan leaves it.

The plan (`_tp_plan` of the model: lm_head "colwise_gather_output") makes the weight a DTensor, `Shard(0)` over the
ranks, and wraps the module's forward so that every rank gathers all logits. Here each rank keeps its own columns:
`merge_stats` exchanges nine numbers per row, and the soft embeddings are added up over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.checks import FLOAT_DTYPES
from ..ops.head_stats import head_stats
from ..ops.merge_stats import merge_known_shards
from ..ops.row_stats import RowStats
from ..ops.soft_embedding import soft_embedding


def _starts(vocab: int, ranks: int) -> list[int]:
    """The first column of every rank: DTensor cuts a dimension into equal parts, the last one shorter."""
    width = -(-vocab // ranks)
    return [rank * width for rank in range(ranks)]


def is_split(lm_head: nn.Module, hidden: Tensor) -> bool:
    """Whether `lm_head` is a product with a weight split by rows over one group of ranks, each with some of them.

    Every rank has to come to the same answer, so it rests on what all of them see alike.
    """
    if not dist.is_available() or not dist.is_initialized() or torch.compiler.is_compiling():
        return False
    from torch.distributed.tensor import DTensor, Shard

    weight = lm_head.weight
    if type(lm_head) is not nn.Linear or lm_head.bias is not None or not isinstance(weight, DTensor):
        return False
    if (
        lm_head._forward_hooks
        or lm_head._forward_pre_hooks
        or getattr(lm_head, "_hf_quantized_needs_local_tp", False)
    ):
        return False
    return (
        not isinstance(hidden, DTensor)
        and weight.device_mesh.ndim == 1
        and tuple(weight.placements) == (Shard(0),)
        and weight.dtype in FLOAT_DTYPES
        and weight.dtype == hidden.dtype
        and _starts(weight.shape[0], weight.device_mesh.size())[-1] < weight.shape[0]
    )


def crosses_ranks(model: nn.Module) -> bool:
    """Whether a step of `model` may exchange something between ranks: weights of its head or decoder are split."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    parts = (model.lm_head, model.model.decoder)
    return any(isinstance(parameter, DTensor) for part in parts for parameter in part.parameters())


@dataclass(eq=False)
class SplitLogits:
    """This rank's columns of the logits: [B, C, Vs] and their own `RowStats`; start: the first column's token."""

    logits: Tensor
    stats: RowStats
    start: int
    mesh: object
    vocab: int

    def soft_embedding(
        self, stats: RowStats, weight: Tensor, *, softcap, temperature, exact: bool, backend: str
    ) -> Tensor:
        """`soft_embedding` of all columns, the same on every rank; `stats` are those of all columns.

        Args:
            weight: [V, E], whole or split over the same ranks.
        """
        from torch.distributed.tensor import DTensor

        settings = {"softcap": softcap, "temperature": temperature, "exact": exact, "backend": backend}
        if exact:
            # The original rounds each probability by the row's own sum, which only whole rows give to the bit.
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            return soft_embedding(self._gathered(), stats, whole, **settings)
        if isinstance(weight, DTensor):
            own = weight.to_local()
        else:
            own = weight[self.start : self.start + self.logits.shape[-1]]
        part = soft_embedding(self.logits, self.stats, own, **settings).float()
        # A rank's own distribution, weighted with its share of the row's mass. At a low temperature a logsumexp is
        # large and so is its last place: shares need not add up to 1 before they are divided by their sum.
        share = (
            (self.stats.logsumexp.double() - stats.logsumexp.double()).clamp(max=0.0).exp().nan_to_num(0.0)
        )
        share = share.float()[..., None]
        sums = torch.cat([part * share, share], dim=-1)
        dist.all_reduce(sums, group=self.mesh.get_group())
        part, total = sums[..., :-1], sums[..., -1:]
        return torch.where(total > 0, part / total, 0.0).to(weight.dtype)

    def _gathered(self) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        shape = (*self.logits.shape[:-1], self.vocab)
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(
            self.logits, self.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride
        )
        return whole.full_tensor()


def logits_and_stats(lm_head: nn.Module, hidden: Tensor, **draw) -> tuple[SplitLogits, RowStats]:
    """(this rank's logits, the `RowStats` of the whole vocabulary, the same on every rank).

    Ranks draw one sample, so they need the same seed: the same `torch.manual_seed` on each.
    """
    weight = lm_head.weight
    mesh, vocab = weight.device_mesh, weight.shape[0]
    starts = _starts(vocab, mesh.size())
    local, own = head_stats(hidden, weight.to_local(), **draw)
    group = mesh.get_group()
    merged = merge_known_shards(local, own, starts, group=group, **draw)
    return SplitLogits(local, own, starts[dist.get_rank(group)], mesh, vocab), merged

"""What modules with quantized weights have in common."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Quantized(nn.Module):
    """A module whose weights and scales stay as they are when the model's dtype changes (`model.to(torch.float16)`).

    transformers refuses `half()` and `float()` of a model that was read with such modules.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


def parameter(tensor: Tensor) -> nn.Parameter:
    """One that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)

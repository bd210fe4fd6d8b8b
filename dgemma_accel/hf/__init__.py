"""The drop-in for transformers' `DiffusionGemmaForBlockDiffusion`.

transformers is imported on the first call, never at import of the package: the ops work without it.
"""

from .accelerate import accelerate, accelerated, restore
from .linear import quantize_linears
from .load import from_pretrained
from .quantize import quantize_experts
from .report import CaptureReport, captures

__all__ = [
    "CaptureReport",
    "accelerate",
    "accelerated",
    "captures",
    "from_pretrained",
    "quantize_experts",
    "quantize_linears",
    "restore",
]

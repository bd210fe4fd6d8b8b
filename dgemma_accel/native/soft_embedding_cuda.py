"""The `cuda` backend of soft_embedding: slice by slice, with the vendor's matrix product. It needs no extension."""

import torch

from .params import NO_DEVICE
from .soft_embedding_chunked import DTYPES, soft_embedding

__all__ = ["FEATURES", "soft_embedding", "unavailable"]

FEATURES = {"device": {"cuda"}, "dtype": DTYPES}


def unavailable() -> str | None:
    return None if torch.cuda.is_available() else NO_DEVICE

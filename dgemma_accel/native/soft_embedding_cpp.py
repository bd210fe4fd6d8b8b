"""The `cpp` backend of soft_embedding: slice by slice on the host."""

from .soft_embedding_chunked import DTYPES, soft_embedding

__all__ = ["FEATURES", "soft_embedding", "unavailable"]

FEATURES = {"device": {"cpu"}, "dtype": DTYPES}


def unavailable() -> str | None:
    """It is PyTorch's own operations: never missing."""
    return None

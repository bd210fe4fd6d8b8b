"""Tensors as the fields of the extension's params structs."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

NO_DEVICE = "no CUDA device (torch.cuda.is_available() is False)"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@functools.cache
def extension():
    """The compiled module; ImportError where it was not built."""
    from dgemma_accel import _C

    return _C


def missing_extension() -> str | None:
    """One line when `_C` cannot be imported."""
    try:
        extension()
    except ImportError as error:
        return f"dgemma_accel._C cannot be imported: {error}"
    return None


def missing_cuda() -> str | None:
    """One line when CUDA kernels cannot run here."""
    missing = missing_extension()
    if missing is not None:
        return missing
    if not hasattr(extension(), "row_stats_cuda"):
        return "dgemma_accel._C was built without CUDA (no nvcc at build time, or DGEMMA_ACCEL_CUDA=0)"
    if not torch.cuda.is_available():
        return NO_DEVICE
    # The runtime is part of the extension, and PyTorch's own may be an older one that this driver can serve.
    built, driver = extension().cuda_runtime_version(), extension().cuda_driver_version()
    if driver // 1000 < built // 1000:
        return (
            f"dgemma_accel._C was built with CUDA {_cuda_version(built)}, the driver's newest is "
            f"{_cuda_version(driver)}: it takes a newer driver, or a build with CUDA {driver // 1000}"
        )
    return None


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arch`, such as "80", "90a" or "120+PTX", runs on a GPU of that compute capability."""
    number, letter, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch).groups()
    own = divmod(int(number), 10)
    if letter == "a":
        return capability == own
    same_major = capability[0] == own[0] and capability >= own
    return same_major or (ptx is not None and not letter and capability >= own)


class BuiltCapability:
    """A container of compute capabilities: those from the given one on that the extension has code for."""

    def __init__(self, major: int, minor: int) -> None:
        self.lowest = (major, minor)

    def _archs(self) -> list[str]:
        return getattr(extension(), "CUDA_ARCHS", "").split() if missing_extension() is None else []

    def __contains__(self, capability: object) -> bool:
        if not isinstance(capability, tuple) or capability < self.lowest:
            return False
        # Where there is none at all, `unavailable` has said so.
        archs = self._archs()
        return not archs or any(_runs(arch, capability) for arch in archs)

    def __str__(self) -> str:
        built = f", with code for {' '.join(archs)}" if (archs := self._archs()) else ""
        return f"{self.lowest[0]}.{self.lowest[1]} and above{built}"


class AtMost:
    """A container of the integers up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and value <= self.limit

    def __str__(self) -> str:
        return f"up to {self.limit}"


class MultipleOf:
    """A container of the multiples of an integer."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and value % self.factor == 0

    def __str__(self) -> str:
        return f"multiples of {self.factor}"


def row_parameter(value: Tensor | None, device: torch.device) -> float | int | Tensor | None:
    """A 0-d or [R] parameter as a struct takes it for a kernel on `device`: a number, or a tensor for its address.

    A scalar on the CPU goes by value, so a launch waits for nothing; one on the device is read there, so a
    captured CUDA graph sees a new value at each replay.
    """
    if value is None:
        return None
    if value.is_cpu and value.ndim == 0:
        return value.item()
    if value.device != device:
        raise ValueError(f"a parameter per row must be on {device}, got {value.device}")
    return value


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

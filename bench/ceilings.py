"""What the device can do, measured in the same run: the bandwidth of a copy and the rate of a matrix product."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from .planted import generator


@dataclass
class Ceilings:
    """bandwidth: bytes/s of a device copy, reads plus writes. flops: operations/s of a square product by dtype."""

    device: torch.device
    bandwidth: float
    quick: bool = False
    flops: dict[str, float] = field(default_factory=dict)

    def matrix(self, dtype: torch.dtype) -> float:
        """The rate for a dtype, measured when first asked for."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.flops:
            self.flops[name] = _matrix_rate(self.device, dtype, self.quick)
        return self.flops[name]

    def floor(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """Microseconds that the larger of the two needs at its ceiling."""
        compute = flops / self.matrix(dtype) if flops else 0.0
        return 1e6 * max(bytes_moved / self.bandwidth, compute)

    def as_dict(self) -> dict:
        return {"bandwidth_bytes_per_s": self.bandwidth, "matrix_flops_per_s": dict(self.flops)}


def measure(device: torch.device, quick: bool = False) -> Ceilings:
    return Ceilings(device, _copy_bandwidth(device, quick), quick)


def _best(call, device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of many calls: a ceiling is what was reached at least once."""
    call()
    best, begun = float("inf"), time.perf_counter()
    while True:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > seconds:
            return best


def _copy_bandwidth(device: torch.device, quick: bool) -> float:
    # Far beyond any cache; random, since some memories compress zeros.
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.empty(size // 4, dtype=torch.float32, device=device)
    source.uniform_(generator=generator(device, 1))
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, 0.3 if quick else 1.0)


def _matrix_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    n = 8192 if device.type == "cuda" else (512 if quick else 1024)
    a = torch.empty(n, n, dtype=dtype, device=device).normal_(generator=generator(device, 2))
    b = torch.empty(n, n, dtype=dtype, device=device).normal_(generator=generator(device, 3))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device, 0.3 if quick else 1.0)

"""How much memory a call needs beyond its inputs, and how much there is."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def available(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


def cache_size(device: torch.device) -> int:
    """Bytes of a device's last cache; 32 MiB where a CPU does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 32 << 20
    return int(text.removesuffix("K")) << 10


def peak_extra(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes in use at the peak of a call minus those before it, its result included.

    On a GPU these are the tensors of PyTorch's allocator. On a CPU it is the resident memory of the process, so it
    also sees what compiled code allocates by itself; free memory is handed back to the system first, or a
    call could live on what an earlier one left. Linux only: None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    if sys.platform != "linux":
        return None
    gc.collect()
    _trim()
    try:
        # 5 resets the peak of the resident set to its present size (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name} line")


def _trim() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)

"""Where and with what a result came about: device, software, commit and clocks."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# The bench's own results do not change what is measured.
IGNORED_CHANGES = ("bench/results/",)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _nvidia_smi(fields: str, device: torch.device) -> str | None:
    """Values of a GPU, comma-separated and without units."""
    index = f"--id={device.index or 0}"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", index)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> tuple[str | None, bool | None]:
    """(commit of the tree, whether it is clean but for results).

    DGEMMA_ACCEL_COMMIT, with a + behind it for a changed tree, speaks for a copy that its repository knows nothing of.
    (None, None) outside a repository without it.
    """
    told = os.environ.get("DGEMMA_ACCEL_COMMIT")
    if told:
        return told.removesuffix("+"), not told.endswith("+")
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return None, None
    status = _output("git", "status", "--porcelain") or ""
    changed = [line[3:] for line in status.splitlines()]
    return head.strip(), all(path.startswith(IGNORED_CHANGES) for path in changed)


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def cpu_features() -> str:
    """The widest vectors that the CPU has."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"DEFAULT": "no AVX2"}.get(capability, capability)


def _keep_busy(device: torch.device) -> None:
    """Starts 0.7 s of work on a GPU of 800 TFLOP/s, and does not wait for it."""
    a = torch.empty(8192, 8192, dtype=torch.bfloat16, device=device).normal_()
    for _ in range(500):
        a @ a


def clocks(device: torch.device) -> dict[str, float] | None:
    """MHz: "sm" and "memory" of a GPU at work, the mean "cpu" over the cores of a CPU; None if not told.

    A GPU is given matrix products for most of a second: idle clocks would not show that it throttles. What else was
    running there: a CPU also gets "load", its load average over a minute, a GPU "others_bytes", the memory in use that
    is not PyTorch's in this process (contexts of CUDA, this process's own among them, are below a GB each).
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        _keep_busy(device)
        text = _nvidia_smi("clocks.sm,clocks.mem", device)
        torch.cuda.synchronize(device)
        if not text:
            return None
        try:
            sm, memory = (float(part) for part in text.splitlines()[0].split(","))
        except ValueError:
            return None
        return {"sm": sm, "memory": memory, "others_bytes": others}
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return {"cpu": sum(map(float, found)) / len(found), "load": os.getloadavg()[0]} if found else None


def describe(device: torch.device) -> dict:
    """The environment of a result file."""
    head, clean = commit()
    facts = {
        "device": cpu_name(),
        "device_type": device.type,
        "capability": cpu_features(),
        "threads": torch.get_num_threads(),
        "driver": None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "dgemma_accel": version("dgemma-accel"),
        "commit": head,
        "clean": clean,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        driver = _nvidia_smi("driver_version", device)
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "driver": driver.strip() if driver else None,
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return facts


def folder_name(facts: dict) -> str:
    """The device as the name of a folder under bench/results: a CPU with its thread count."""
    name = facts["device"].removeprefix("NVIDIA ")
    if facts["device_type"] == "cpu":
        name = f"cpu {name} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")

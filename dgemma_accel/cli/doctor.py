"""`doctor`: what the machine has, which backend each op would take and why, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess

import torch

from .. import backends
from ..scaled_product import WIDENED, multiplies_fp8, way_of
from ..version import __version__
from .doctor_step import examine_step, lines_of

# The model's own shapes: what `auto` is asked for.
REQUIREMENTS: dict[str, dict[str, object]] = {
    "block_attention": {"dtype": torch.bfloat16, "head_dim": 512},
    "row_stats": {"dtype": torch.bfloat16, "vocab": 262_144},
    "commit": {"canvas_length": 256},
    "head_stats": {"dtype": torch.bfloat16},
    "soft_embedding": {"dtype": torch.bfloat16},
    "experts": {
        "dtype": torch.bfloat16,
        "activation": "gelu_tanh",
        "experts": 128,
        "width": 704,
        "embedding": 2816,
    },
}


def add_parser(commands) -> None:
    parser = commands.add_parser("doctor", help="what this machine has, and which backend each op would take")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--step", action="store_true", help="also compile and capture a small model's step")
    parser.set_defaults(run=run)


def run(options) -> int:
    report = examine()
    if options.step:
        report["step"] = examine_step()
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return 0


def examine() -> dict:
    """The report as plain data: versions, processor, GPUs, extension, backends by op, and what is missing."""
    report = {
        "dgemma_accel": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "triton", "transformers", "numpy")},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "cuda": {"torch": torch.version.cuda, "driver": _driver(), "nvcc": shutil.which("nvcc")},
        "extension": _extension(),
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("DGEMMA_ACCEL_", "TRITON_INTERPRET"))
        },
        "backends": {},
    }
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in backends.MODULES:
        report["backends"][op] = {device: _op_backends(op, device) for device in devices}
    report["missing"] = _missing(report)
    return report


def _op_backends(op: str, device: str) -> dict:
    needs = {"device": device, **REQUIREMENTS.get(op, {})}
    if device == "cuda":
        needs["compute_capability"] = torch.cuda.get_device_capability()
    rows = {}
    for name in backends.MODULES[op]:
        implementation, reason = backends.load(op, name)
        missing = [reason] if implementation is None else implementation.missing(needs)
        rows[name] = "; ".join(missing) or "ready"
    found = _auto(op, needs) | {"all": rows, "for": {}}
    if device == "cuda":
        capability = ".".join(map(str, needs["compute_capability"]))
        for key in backends.auto_table().get(op, {}):
            if key.startswith(f"{capability} "):
                _, name, value = key.split()
                found["for"][f"{name} {value}"] = _auto(op, needs | {name: int(value)})
    return found


def _auto(op: str, needs: dict) -> dict:
    try:
        choice = backends.choose(op, "auto", needs)
        return {"auto": choice.implementation.backend, "why": choice.reason}
    except (backends.BackendError, ValueError) as error:
        return {"auto": None, "why": str(error)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict:
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    model = value.strip()
                elif key.strip() == "flags":
                    flags = set(value.split())
                    break
    except OSError:
        pass
    vector = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    return {"model": model, "threads": torch.get_num_threads(), "vector": vector}


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": p.name,
                "compute_capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "multiprocessors": p.multi_processor_count,
                "fp8_products": _fp8_products(torch.device("cuda", index)),
            }
        )
    return gpus


def _fp8_products(device: torch.device) -> str:
    """How products of FP8 linears are made there."""
    if not multiplies_fp8(device):
        return "none: FP8 weights are widened"
    try:
        way = way_of(device, torch.bfloat16)
    except RuntimeError as error:
        # Of a GPU without memory left, or one that PyTorch has no code for.
        return f"not known: {str(error).strip().splitlines()[0]}"
    return "none: numbers are widened" if way == WIDENED else f"scaled {way}"


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout else None


def _extension() -> dict:
    try:
        from .. import _C
    except ImportError as error:
        return {"built": False, "why": str(error)}
    # Built without nvcc it has the host's part alone.
    return {
        "built": True,
        "cuda_archs": getattr(_C, "CUDA_ARCHS", "").split(),
        "cuda_kernels": len(getattr(_C, "CUDA_KERNELS", ())),
        "host_instruction_sets": _C.host_instruction_sets().split(),
    }


def _missing(report: dict) -> list[str]:
    lines = []
    if not report["gpus"]:
        lines.append("no NVIDIA GPU that PyTorch can use: ops run on the host backends")
    if not report["extension"]["built"]:
        lines.append(
            "the compiled extension: pip install --no-build-isolation --no-deps -e . (needs a C++ compiler)"
        )
    elif report["gpus"] and not report["extension"]["cuda_archs"]:
        lines.append("CUDA kernels in the extension: it was built where nvcc was not found")
    if report["packages"]["triton"] is None:
        lines.append("triton: pip install triton")
    elif report["gpus"] and (why := backends.load("experts", "triton")[1]) is not None:
        lines.append(f"kernels of Triton: {why}")
    if report["packages"]["numpy"] is None:
        lines.append("numpy: pip install numpy")
    if report["packages"]["transformers"] is None:
        lines.append("transformers, for accelerate(model): pip install 'dgemma-accel[hf]'")
    elif importlib.util.find_spec("transformers.models.diffusion_gemma") is None:
        found = report["packages"]["transformers"]
        lines.append(f"DiffusionGemma in transformers: found {found}, needed 5.17 or newer")
    return lines


def as_text(report: dict) -> str:
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())
    cpu = report["cpu"]
    lines = [
        f"dgemma-accel {report['dgemma_accel']} on Python {report['python']}",
        f"packages   {packages}",
        f"processor  {cpu['model']}, {cpu['threads']} threads, {' '.join(cpu['vector']) or 'no vector extensions'}",
    ]
    for gpu in report["gpus"]:
        lines.append(
            f"gpu        {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, driver {report['cuda']['driver']}, "
            f"FP8 products {gpu['fp8_products']}"
        )
    if not report["gpus"]:
        lines.append("gpu        none")
    extension = report["extension"]
    if extension["built"]:
        cuda = f"{extension['cuda_kernels']} CUDA kernels for {' '.join(extension['cuda_archs'])}"
        host = f"host code for {' '.join(extension['host_instruction_sets'])}"
        built = f"built, {host}, {cuda if extension['cuda_archs'] else 'no CUDA'}"
    else:
        built = f"not built: {extension['why']}"
    lines.append(f"extension  {built}")
    for name, value in report["environment"].items():
        lines.append(f"set        {name}={value}")
    for op, devices in report["backends"].items():
        for device, row in devices.items():
            lines.append(f"{op} on {device}: auto takes {row['auto'] or 'nothing'} ({row['why']})")
            for case, own in row["for"].items():
                lines.append(f"    {case}: auto takes {own['auto'] or 'nothing'} ({own['why']})")
            lines.extend(f"    {name:<10} {state}" for name, state in row["all"].items())
    if "step" in report:
        lines.extend(lines_of(report["step"]))
    lines.append("missing    " + ("; ".join(report["missing"]) or "nothing"))
    return "\n".join(lines)

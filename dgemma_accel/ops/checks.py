"""Argument checks shared by the ops. Every error names the argument, what came and what is allowed."""

from __future__ import annotations

import functools
import math
from numbers import Integral, Real

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INT64_MAX = 2**63 - 1
FP32_MAX = torch.finfo(torch.float32).max
_FAKE = torch._C._TorchDispatchModeKey.FAKE
# Beyond them fp32 does not hold what the kernels make of a softcap: its inverse, or its product with 2 log2(e).
LEAST_SOFTCAP, LARGEST_SOFTCAP = 1e-30, 1e30


def is_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: a torch.Tensor expected, got {type(value).__name__}")
    return value


def is_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: a bool expected, got {type(value).__name__}")
    return value


def is_string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: a string expected, got {type(value).__name__}")
    return value


def has_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(
            f"{name}: dtype must be one of {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def has_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape must be {tuple(shape)} ({meaning}), got {tuple(tensor.shape)}")


def is_table_of_logits(logits: object) -> None:
    """Raise unless it is [..., V] in a dtype of logits, V >= 1."""
    is_tensor("logits", logits)
    has_dtype("logits", logits, FLOAT_DTYPES)
    if logits.ndim < 1:
        raise ValueError("logits: shape must be [..., V], got a 0-d tensor")
    if logits.shape[-1] < 1:
        raise ValueError(f"logits: the vocabulary must not be empty, got shape {tuple(logits.shape)}")


def fits(value: object, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a value is a tensor of this dtype, shape and device, without building what an error would say."""
    return (
        isinstance(value, Tensor) and value.dtype == dtype and value.shape == shape and value.device == device
    )


def on_device(name: str, tensor: Tensor, device: torch.device, of: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: must be on {device} like {of}, got {tensor.device}")


def floats_of_rows(name: str, value: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An fp32 tensor with one value per row, flat."""
    is_tensor(name, value)
    has_dtype(name, value, (torch.float32,))
    has_shape(name, value, shape, "one value per row")
    on_device(name, value, device, "the input")
    return value.reshape(-1).contiguous()


def interval(low: float, high: float, *, low_open: bool = False, high_open: bool | None = None) -> str:
    """How an error writes a range; open at infinity unless said otherwise."""
    if high_open is None:
        high_open = math.isinf(high)
    return f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"


def plain_number(value: object, integer: bool) -> int | float | None:
    """A number, which may be one of NumPy, as Python's own; None for what is none (a bool is none)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int if integer else (int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if not integer and isinstance(value, Real) else None


def may_keep_numbers(tensor: Tensor) -> bool:
    """Whether a call on `tensor` may get its numbers from `constant`.

    Where a graph is traced they belong to it, and under FakeTensorMode they would be fakes.
    """
    if type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    return torch._C._get_dispatch_mode(_FAKE) is None


@functools.lru_cache(maxsize=4096)
def constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d CPU tensor, the same one for every call: only for ops, which write to no argument."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


# For graphs that are traced: a tensor that is there already is an input and costs no kernel.
ZEROS = {dtype: constant(0, dtype) for dtype in (torch.int64, torch.float32)}


def _number(value: float, dtype: torch.dtype, device: torch.device, keep: bool) -> Tensor:
    if keep:
        return constant(value, dtype)
    if not torch.compiler.is_compiling():
        return torch.tensor(value, dtype=dtype, device="cpu")
    # A number of the host would be made by C++ that inductor writes, for which a machine with a GPU need not have a
    # compiler; one of the device by the code that is compiled anyway.
    if value == 0:
        return ZEROS[dtype]
    if not dtype.is_floating_point:
        return torch.full((), value, dtype=dtype, device=device)
    # As a product, a number that changes from call to call stays an input of the graph; as what fills a tensor it is a
    # constant of it, and every new one compiles it again.
    return torch.ones((), dtype=dtype, device=device) * value


def number_or_rows(
    name: str,
    value: float | Tensor,
    rows: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    low: float = 0.0,
    low_open: bool = False,
    high: float = math.inf,
    keep: bool = False,
) -> Tensor:
    """A parameter that is a number, a 0-d tensor or one value per row, as a 0-d or flat tensor.

    A number becomes a 0-d CPU tensor, which a kernel reads without waiting for the device, or in a graph that is
    traced one on `device`; numbers are checked against [low, high] here and tensors where they are read (`values_in`).

    Args:
        rows: the shape that stands for "one value per row".
        keep: take the tensor of a number from `constant`, where `may_keep_numbers` allows it.
    """
    integer = not dtype.is_floating_point
    if isinstance(value, Tensor):
        allowed = (torch.int64, torch.int32) if integer else (*FLOAT_DTYPES, torch.float64)
        has_dtype(name, value, allowed)
        if value.ndim == 0:
            if not value.is_cpu:
                on_device(name, value, device, "the input")
            return value.to(dtype)
        if tuple(value.shape) != tuple(rows):
            raise ValueError(
                f"{name}: a number, a 0-d tensor or shape {tuple(rows)} expected, got {tuple(value.shape)}"
            )
        on_device(name, value, device, "the input")
        if value.dtype != dtype or value.ndim != 1:
            value = value.to(dtype).reshape(-1)
        return value.contiguous()
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        number = plain_number(value, integer)
        if number is None:
            kind = "an int" if integer else "a number"
            raise TypeError(f"{name}: {kind} or a tensor expected, got {type(value).__name__}")
        value = number
    most = INT64_MAX if integer else FP32_MAX
    # Comparisons alone: a number may be a symbol of torch.compile, which `math` does not take. NaN fails the first.
    if not low <= value <= high or not value <= most or (low_open and value == low):
        high = min(high, most) if most < value < math.inf else high
        raise ValueError(
            f"{name}: must be finite and in {interval(low, high, low_open=low_open)}, got {value}"
        )
    return _number(value, dtype, device, keep)


def softcap_value(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    number = plain_number(softcap, integer=False)
    if number is None:
        raise TypeError(f"softcap: a number or None expected, got {type(softcap).__name__}")
    if not LEAST_SOFTCAP <= number <= LARGEST_SOFTCAP:
        allowed = interval(LEAST_SOFTCAP, LARGEST_SOFTCAP)
        raise ValueError(f"softcap: must be finite and in {allowed}, got {softcap}")
    return float(number)


def count_or_none(name: str, value: int | None) -> int:
    """A number of things, or 0 for None."""
    number = 0 if value is None else plain_number(value, integer=True)
    if number is None:
        raise TypeError(f"{name}: an int or None expected, got {type(value).__name__}")
    if not 0 <= number <= INT64_MAX:
        raise ValueError(f"{name}: must be in [0, 2**63), got {value}")
    return number


def share_or_none(name: str, value: float | None) -> float:
    """A share of a whole, or 1.0 for None."""
    number = 1.0 if value is None else plain_number(value, integer=False)
    if number is None:
        raise TypeError(f"{name}: a number or None expected, got {type(value).__name__}")
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: must be in [0, 1], got {value}")
    return float(number)


def seed_and_offset(
    seed: int | Tensor | None, offset: int | Tensor, device: torch.device, *, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Both as 0-d int64 tensors; a seed that is not given is drawn from torch's default generator.

    keep: as in `number_or_rows`.
    """
    if seed is None:
        seed = torch.randint(INT64_MAX, (), dtype=torch.int64, device="cpu")
    return _int64_scalar("seed", seed, device, keep), _int64_scalar("offset", offset, device, keep)


def uniform_or_seed(
    uniform: Tensor | None,
    seed: int | Tensor | None,
    offset: int | Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The uniforms given, flat; or seed and offset to draw them from. keep: as in `number_or_rows`."""
    if uniform is None:
        return (None, *seed_and_offset(seed, offset, device, keep=keep))
    return floats_of_rows("uniform", uniform, shape, device), None, _number(0, torch.int64, device, keep)


def _int64_scalar(name: str, value: int | Tensor, device: torch.device, keep: bool) -> Tensor:
    if isinstance(value, Tensor):
        has_dtype(name, value, (torch.int64,))
        has_shape(name, value, (), "a 0-d tensor")
        if not value.is_cpu:
            on_device(name, value, device, "the input")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        number = plain_number(value, integer=True)
        if number is None:
            raise TypeError(f"{name}: an int or a 0-d int64 tensor expected, got {type(value).__name__}")
        value = number
    if not 0 <= value <= INT64_MAX:
        raise ValueError(f"{name}: must be in [0, 2**63), got {value}")
    return _number(value, torch.int64, device, keep)


def values_in(
    name: str,
    tensor: Tensor | None,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
    force: bool = False,
) -> None:
    """Raise ValueError unless every element lies in the range (NaN does not).

    Reads the tensor, so on a GPU it runs only with `force` (the op's `check=True`).
    """
    if tensor is None:
        return
    if not tensor.is_cpu and not force:
        return
    count = tensor.numel()
    if count == 0:
        return
    if tensor.is_cpu:
        # As few operators as there can be: those below cost more than a small kernel. NaN is its row's extremes.
        least, most = (tensor.item(),) * 2 if count == 1 else (end.item() for end in torch.aminmax(tensor))
        if (least > low if low_open else least >= low) and (most < high if high_open else most <= high):
            return
    above = tensor > low if low_open else tensor >= low
    below = tensor < high if high_open else tensor <= high
    inside = above & below
    if not bool(inside.all()):
        came = tensor[~inside].flatten()[0].item()
        raise ValueError(
            f"{name}: values must be in {interval(low, high, low_open=low_open, high_open=high_open)}, got {came}"
        )

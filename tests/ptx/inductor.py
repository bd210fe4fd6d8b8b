"""What PyTorch's compiler writes for a GPU, carried out on CPU tensors: its Triton kernels as PTX, the rest as it is.

`triton_driver.install` comes first. Needs a PyTorch without CUDA, and g++ for the device guard that it lacks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import step_launches
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def code_for(module: torch.fx.GraphModule, inputs: list, gpu: str, **options) -> str:
    """The code that inductor writes for a graph that was traced on a CPU, as if its tensors were on a GPU.

    gpu: a key of `step_launches.GPUS`.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    def stop(code: str) -> None:
        raise step_launches.CodeWritten(code)

    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        # Of tensors on a CPU.
        node.meta.pop("example_value", None)
    # To see whether padding pays, products would be timed.
    options = {"triton.cudagraphs": False, "shape_padding": False} | options
    with contextlib.ExitStack() as stack:
        stack.enter_context(step_launches.told_of_gpu(gpu))
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", stop))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        fakes = [_on_gpu(value) if isinstance(value, Tensor) else value for value in inputs]
        try:
            compile_fx(module, fakes, config_patches=options)
        except Exception as error:
            while error is not None and not isinstance(error, step_launches.CodeWritten):
                error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
            if error is None:
                raise
            return error.args[0]
    raise AssertionError("inductor wrote no code")


def _on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=step_launches.DEVICE)


def carried_out(
    code: str,
    inputs: list,
    gpu: str,
    pick: Callable[[list], object] = lambda configs: configs[0],
) -> tuple[list[Tensor], list[str]]:
    """(what the code returns for these tensors, the names of inductor's kernels in the order of their launches).

    pick: one of the configurations among which inductor would time. Fresh memory is NaN.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import GridExpr

    ran: list[str] = []
    numbers = itertools.count()

    class Kernel:
        def __init__(self, name: str, source: str, **_) -> None:
            # Triton reads a kernel's source from its file.
            path = Path(folder, f"kernel_{next(numbers)}.py")
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.name, self.tuned = name, getattr(module, name)

        def run(self, *arguments, stream: int) -> None:
            function, config = self.tuned.fn, pick(self.tuned.configs)
            numbers = dict(zip(function.arg_names, arguments)) | config.kwargs
            grid = GridExpr.from_meta(self.tuned.inductor_meta, config).eval_slow(numbers)
            settings = {"num_warps": config.num_warps, "num_stages": config.num_stages, **config.kwargs}
            function.run(*arguments, grid=grid, warmup=False, **settings)
            ran.append(self.name)

    def reserve(shape, stride, dtype: torch.dtype) -> Tensor:
        result = torch.empty_strided(shape, stride, dtype=dtype)
        return result.fill_(float("nan")) if dtype.is_floating_point else result

    module: dict = {"__name__": "generated"}
    with (
        tempfile.TemporaryDirectory() as folder,
        step_launches.told_of_gpu(gpu),
        mock.patch.object(AsyncCompile, "triton", staticmethod(Kernel)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
        torch.no_grad(),
    ):
        exec(code, module)
        module["empty_strided_cuda"] = reserve
        return list(module["call"](list(inputs))), ran

"""What a compiled denoising step of the full-size DiffusionGemma launches on a CUDA GPU, and the pass that stores a
finished canvas, found without one.

    python tools/step_launches.py --capability 9.0 [--linears fp8]

The model is made of tensors without memory. A step and a pass are taken over them (`dgemma_accel.hf.graph` and
`storing`): torch.compile traces each part that is compiled, once for each kind of layer, inductor writes its code for
the GPU that is named, and is stopped before it compiles any. That code is then carried out on meta tensors, which
notes what it launches: inductor's Triton kernels, matrix products, what else PyTorch computes by itself, and what is
launched by the ops of this package, all of them with backend="triton". A product counts once, whatever cuBLAS makes of
it.

Needs a PyTorch that was built without CUDA, whose gaps it fills, and g++ for one of them. Exit status 2 without them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# Launchers that know nothing of the interpreter, and no pool of processes that would compile.
os.environ |= {"TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Name and multiprocessors by compute capability.
GPUS = {"9.0": ("H200", 132), "12.0": ("RTX PRO 6000", 188)}
DEVICE = torch.device("cuda", 0)
# Slots of the cache. All that depends on them is into how many stretches attention cuts the keys.
SLOTS = 4096
# Without a device guard PyTorch makes no tensors of a device, not even those without memory.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
# As in `dgemma_accel.hf.compiled`, and with a function in the code that makes its inputs.
OPTIONS = {"triton.cudagraphs": False, "benchmark_harness": True}

KINDS = {
    "inductor": "Triton kernels of inductor",
    "product": "matrix products",
    "ours": "kernels of this package",
    "aten": "other ops of PyTorch",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}
# Ops that are no views, as torch itself knows them, and launch nothing all the same.
NO_LAUNCH = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "resize_",
}  # fmt: skip
INDUCTOR_KINDS = {"poi": "pointwise", "red": "reduction", "per": "persistent reduction"}
# Of what inductor names a kernel after: ops that move numbers and compute none, and ours, which only read its result.
NOT_COMPUTED = (
    "_to_copy", "_unsafe_view", "view", "split_with_sizes", "split", "transpose", "unsqueeze", "squeeze", "permute",
    "expand", "slice", "select", "clone", "block_attention", "feed_forward", "experts", "head_stats", "commit",
    "soft_embedding", "linears",
)  # fmt: skip


class CannotRunError(Exception):
    """One line that says what is missing here."""


class CodeWritten(Exception):
    """Inductor is done with what it is wanted for: the code."""


@dataclass
class Launch:
    """A launch, or an op of this package with what it launches.

    kind: a key of KINDS, or "op". sizes: M, N, K of a product behind its batch; the grid of a kernel of ours; of one of
    inductor's what it goes over: rows and columns of a reduction, else all elements; else the first argument's shape.
    branch: the number of the stream of an op that runs beside the caller's, which is 0.
    """

    kind: str
    name: str
    sizes: tuple[int, ...] = ()
    branch: int = 0
    launches: list[Launch] = field(default_factory=list)

    def leaves(self) -> list[Launch]:
        """What reaches the GPU."""
        return [leaf for launch in self.launches for leaf in launch.leaves()] if self.kind == "op" else [self]

    def shown(self) -> str:
        """The name to print: the same wherever the same is computed, but for the number that inductor gave it."""
        found = re.fullmatch(r"triton_([a-z]+)_fused_(.*)_(\d+)", self.name)
        if self.kind != "inductor" or found is None:
            return self.name
        words = re.sub(rf"_(?:{'|'.join(NOT_COMPUTED)})(?=_)", "", f"_{found[2]}_").replace("_", " ").split()
        return f"{INDUCTOR_KINDS.get(found[1], found[1])} {found[3]}: {' '.join(words) or 'copies'}"


@dataclass
class Part:
    """A stretch of a step or of a pass. kind: of the layers, None outside of them. layers: their numbers."""

    kind: str | None
    layers: list[int]
    launches: list[Launch]

    def counts(self) -> Counter[str]:
        leaves = [leaf for launch in self.launches for leaf in launch.leaves()]
        return Counter([leaf.kind for leaf in leaves] + ["in a row" for leaf in leaves if leaf.branch == 0])


class Record(TorchDispatchMode):
    """While it is entered, notes in order what is launched on tensors without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._branch = 0

    def note(self, kind: str, name: str, sizes: Sequence[int]) -> None:
        self.launches.append(Launch(kind, name, tuple(sizes), self._branch))

    @contextlib.contextmanager
    def branch(self, number: int) -> Iterator[None]:
        self._branch = number
        try:
            yield
        finally:
            self._branch = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if func.namespace == "dgemma":
            return self._expanded(name, func, args, kwargs)
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        if func.is_view or name in NO_LAUNCH or not any(map(has_no_memory, tensors)):
            return result
        if name in PRODUCTS:
            a, b = [value for value in args if isinstance(value, Tensor) and value.ndim > 1][-2:]
            self.note("product", name, (*a.shape[:-1], b.shape[-1], a.shape[-1]))
        else:
            self.note("aten", name, tensors[0].shape)
        return result

    def _expanded(self, name: str, func, args: tuple, kwargs: dict):
        """The op's own body, where meta tensors would get the function that only knows the shapes of its results."""
        outside, self.launches = self.launches, []
        try:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        finally:
            self.launches = [*outside, Launch("op", name, launches=self.launches)]


def has_no_memory(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@functools.cache
def load_guard() -> None:
    """Once a process: torch keeps it.

    Raises:
        CannotRunError: g++ is missing, or cannot build it.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotRunError("needs g++ on PATH, to build a device guard that PyTorch without CUDA lacks")
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        paths = [f"-I{path}" for path in cpp_extension.include_paths()]
        paths += [f"-L{path}" for path in cpp_extension.library_paths()]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", *paths, source, "-o", library, "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            line = (done.stderr.splitlines() or ["no reason given"])[0]
            raise CannotRunError(f"g++ cannot build the device guard: {line}")
        torch.ops.load_library(library)


@contextlib.contextmanager
def told_of_gpu(name: str) -> Iterator[None]:
    """Inside, torch and inductor find a GPU of GPUS as far as they ask for one before code runs on it."""
    import torch.utils._triton
    from dgemma_accel.triton_kernels import ahead_of_time
    from torch._dynamo.device_interface import CudaInterface

    model, multiprocessors = GPUS[name]
    capability = tuple(int(part) for part in name.split("."))
    properties = SimpleNamespace(
        name=model,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=ahead_of_time.SHARED_LIMIT[capability],
        max_threads_per_multi_processor=ahead_of_time.THREADS_PER_MULTIPROCESSOR[capability],
        regs_per_multiprocessor=ahead_of_time.REGISTERS_PER_MULTIPROCESSOR,
        warp_size=32,
        # Asked for where torch knows no release of CUDA.
        gcnArchName="",
    )
    # `torch.cuda.is_available` stays: whoever is told that it is makes tensors.
    inductor = {
        "is_available": lambda: True,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    cuda = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        # Of the generated code.
        "_DeviceGuard": lambda index: contextlib.nullcontext(),
        "set_device": lambda device: None,
    }
    # Whether there is Triton may have been asked before, and noted.
    noted = [function for function in vars(torch.utils._triton).values() if hasattr(function, "cache_clear")]
    with contextlib.ExitStack() as stack:
        for owner, answers in ((CudaInterface, inductor), (torch.cuda, cuda)):
            for attribute, answer in answers.items():
                answer = staticmethod(answer) if owner is CudaInterface else answer
                stack.enter_context(mock.patch.object(owner, attribute, answer))
        for function in noted:
            function.cache_clear()
        try:
            yield
        finally:
            for function in noted:
                function.cache_clear()


@contextlib.contextmanager
def pretended_gpu(name: str, record: Record) -> Iterator[None]:
    """`told_of_gpu`, and the launchers of this package are told too.

    Before any of the launchers is imported: they take the names of `common` that are replaced then.
    """
    from dgemma_accel.triton_kernels import ahead_of_time, common
    from triton.runtime.jit import JITFunction

    from dgemma_accel import scaled_product
    from dgemma_accel.branches import beside as fork

    multiprocessors = GPUS[name][1]
    capability = tuple(int(part) for part in name.split("."))

    @contextlib.contextmanager
    def beside(tensor: Tensor, count: int = 1) -> Iterator[list[contextlib.AbstractContextManager]]:
        yield [record.branch(number) for number in range(1, count + 1)]

    def launch(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        record.note("ours", kernel.fn.__name__, grid)

    def multiply(
        way: str, rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, out: Tensor
    ) -> None:
        record.note("product", "_scaled_mm", (*rows.shape[:-1], *weight.shape))

    launchers = {
        "DEVICES": frozenset({"cuda", "meta"}),
        "unavailable": lambda: None,
        "multiprocessors": lambda tensor: multiprocessors,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(told_of_gpu(name))
        stack.enter_context(ahead_of_time.recording(capability))
        for attribute, answer in launchers.items():
            stack.enter_context(mock.patch.object(common, attribute, answer))
        # Some ops came with the package and have taken it already.
        for owner in [module for name, module in sys.modules.items() if name.startswith("dgemma_accel.")]:
            if getattr(owner, "beside", None) is fork:
                stack.enter_context(mock.patch.object(owner, "beside", beside))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        # PyTorch has no such product of tensors without memory, and cannot try out which way there is.
        for attribute, answer in (("way_of", lambda *_: scaled_product.BY_ROW), ("_run", multiply)):
            stack.enter_context(mock.patch.object(scaled_product, attribute, answer))
        yield


class Walk:
    """`run` of a step or a pass over tensors without memory: the parts they call in turn, and inductor's code of each.

    called: (kind of the layer, None outside of layers; the part's key in `codes`, or a launch outside of the parts).
    """

    def __init__(self) -> None:
        self.codes: dict[tuple, str] = {}
        self.called: list[tuple[str | None, tuple | Launch]] = []
        self._results: dict[tuple, object] = {}

    def __call__(self, part, module, *arguments):
        kind = getattr(getattr(module, "self_attn", None), "layer_type", None)
        key = part.__module__, part.__name__, kind
        if key not in self.codes:
            self.codes[key] = code_of(part, module, *arguments)
            # As good as any other call's: tensors of these shapes.
            self._results[key] = part(module, *arguments)
        self.called.append((kind, key))
        return self._results[key]

    def take(self, record: Record) -> None:
        """What was launched since the last part."""
        self.called += [(None, launch) for launch in record.launches]
        record.launches.clear()

    def after(self, record: Record, *arguments):
        self.take(record)
        return self(*arguments)


def walks(config, linears: str | None = None) -> tuple[Walk, Walk]:
    """A step and a pass of a model of `config`; linears: as of `from_pretrained`."""
    from torch._inductor.graph import GraphLowering

    from bench import memory, step_model
    from dgemma_accel import accelerate
    from dgemma_accel.hf import experts, graph, linear, products, storing

    def stop(code: str) -> None:
        raise CodeWritten(code)

    patches = (
        mock.patch.object(memory, "available", lambda device: sys.maxsize),
        # A weight without memory is as good as one with it.
        mock.patch.object(experts, "Tensor", FakeTensor),
        mock.patch.object(products, "Tensor", FakeTensor),
        mock.patch.object(GraphLowering, "save_output_code", stop),
    )
    step, storing_pass = Walk(), Walk()
    with contextlib.ExitStack() as stack:
        for context in (*patches, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad()):
            stack.enter_context(context)
        model = step_model.build(config, DEVICE, torch.bfloat16)
        for holder, place in linear.places_of(model) if linears else ():
            setattr(holder, place, linear.unread(getattr(holder, place)))
        accelerate(model, backend="triton")
        arguments = arguments_of_step(model)
        state, in_place, prefixes, numbers, pinned, settings = arguments
        decision = graph.decide(model, *arguments, step)
        step(
            graph.condition,
            model,
            decision,
            state.finished,
            state.soft,
            numbers.temperature,
            pinned,
            settings,
        )

        slots = torch.empty(config.canvas_length, dtype=torch.int64, device=DEVICE)
        places = {kind: storing.Place(prefix, slots) for kind, prefix in prefixes.items()}
        text, inputs = model.model.encoder.language_model, storing.Inputs(state.soft, places)
        storing.store(text, inputs, in_place, "triton", storing_pass)
        # Once more with nothing left to compile, which no mode may watch: what stands between the parts.
        storing_pass.called.clear()
        with Record() as between:
            storing.store(text, inputs, in_place, "triton", functools.partial(storing_pass.after, between))
        storing_pass.take(between)
    return step, storing_pass


def code_of(function, *arguments) -> str:
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)
    try:
        compiled(*arguments)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, CodeWritten):
            raise
        return error.inner_exception.args[0]
    raise AssertionError("a step ran that should only have been compiled")


def arguments_of_step(model) -> tuple:
    """The arguments of `decide` behind the model for one canvas, shaped as `dgemma_accel.hf.compiled` makes them."""
    from dgemma_accel.hf import graph, products

    text, canvas = model.config.text_config, (1, model.config.canvas_length)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    keys, values, prefixes = [], [], {}
    for index, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[index]
        for buffers in (keys, values):
            shape = (1, layer.num_key_value_heads, SLOTS, layer.head_dim)
            buffers.append(empty(*shape, dtype=torch.bfloat16))
            torch._dynamo.maybe_mark_dynamic(buffers[-1], 2)
        bounds = [empty(1, dtype=torch.int32) for _ in range(2)]
        rotary = [empty(*canvas, layer.head_dim, dtype=torch.bfloat16) for _ in range(2)]
        prefixes[kind] = graph.Prefix(*bounds, *rotary)
    state = graph.State(
        canvas=empty(*canvas, dtype=torch.int64),
        draft=empty(*canvas, dtype=torch.int64),
        history=empty(1, *canvas, dtype=torch.int64),
        finished=empty(1, dtype=torch.bool),
        soft=empty(*canvas, text.hidden_size, dtype=torch.bfloat16),
        confidence=empty(*canvas),
        entropy=empty(*canvas),
        steps=empty(1, dtype=torch.int64),
    )
    integers = [empty(dtype=torch.int64) for _ in range(2)]
    numbers = graph.Numbers(*integers, *(empty() for _ in range(3)))
    settings = graph.Settings(
        softcap=text.final_logit_softcapping,
        vocab=text.vocab_size,
        depth=1,
        exact=False,
        backends=("triton",) * 4,
    )
    in_place = graph.InPlace(
        keys, values, products.side_by_side(model.model.decoder.layers, "triton", torch.bfloat16)
    )
    return state, in_place, prefixes, numbers, None, settings


def launches_of(code: str, record: Record) -> list[Launch]:
    """What the code that inductor wrote launches when it is called."""
    from torch._dynamo import testing
    from torch._inductor.async_compile import AsyncCompile

    class Kernel:
        def __init__(self, name: str, source: str, **settings: object) -> None:
            self.name = name

        def run(self, *args, stream: int) -> None:
            record.note("inductor", self.name, [value for value in args if isinstance(value, int)])

    def reserve(shape, stride, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def make_input(shape, stride, device: str, dtype: torch.dtype) -> Tensor:
        # What lies on the host is a number that a launcher reads.
        return torch.zeros(shape, dtype=dtype) if device == "cpu" else reserve(shape, stride, dtype)

    module: dict = {"__name__": "generated"}
    with (
        mock.patch.object(AsyncCompile, "triton", staticmethod(Kernel)),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
        mock.patch.object(testing, "rand_strided", make_input),
    ):
        exec(code, module)
        arguments = module["get_args"]()
        module["empty_strided_cuda"] = reserve
        with record:
            module["call"](arguments)
    return record.launches


def parts_of(walk: Walk, record: Record) -> list[Part]:
    """Before the layers, the layers of each kind, which all launch the same, and after them."""
    launches = {}
    for key, code in walk.codes.items():
        record.launches = []
        launches[key] = launches_of(code, record)
    parts, behind, count = [Part(None, [], [])], Part(None, [], []), 0
    for kind, what in walk.called:
        if kind is not None:
            parts.append(Part(kind, [count], [*launches[what]]))
            count += 1
        elif isinstance(what, Launch):
            # Belongs to the layer before it.
            parts[-1].launches.append(what)
        elif count:
            behind.launches += launches[what]
        else:
            parts[0].launches += launches[what]
    found: dict[str | None, Part] = {}
    for part in parts:
        first = found.setdefault(part.kind, part)
        assert first.launches == part.launches
        if first is not part:
            first.layers += part.layers
    return [*found.values(), behind]


def folded(launches: list[Launch]) -> list[tuple[int, list[Launch]]]:
    """(times, launches) in order: what is launched several times in a row, alone or as a short sequence, once."""
    found, i = [], 0
    while i < len(launches):
        times, length = 1, 1
        for period in range(1, 5):
            count = 1
            while launches[i + count * period :][:period] == launches[i : i + period]:
                count += 1
            if count > 1 and count * period > times * length:
                times, length = count, period
        found.append((times, launches[i : i + length]))
        i += times * length
    return found


def lines_of(launches: list[Launch], indent: str = "  ") -> Iterator[str]:
    for times, sequence in folded(launches):
        inner = indent
        if times > 1:
            yield f"{indent}{times} times"
            inner += "  "
        for launch in sequence:
            label = "product" if launch.kind == "product" else launch.shown()
            sizes = (" grid " if launch.kind == "ours" else " ") + " x ".join(map(str, launch.sizes))
            yield f"{inner + label:<58}{sizes}{f', branch {launch.branch}' if launch.branch else ''}".rstrip()
            yield from lines_of(launch.launches, inner + "  ")


def kind_of(part: Part) -> str:
    return {"full_attention": "global"}.get(part.kind, part.kind.removesuffix("_attention"))


def table(parts: list[Part]) -> Iterator[str]:
    """Launches of each part and of all of them by kind."""
    times = [len(part.layers) or 1 for part in parts]
    heads = ["before", *(f"{n} {kind_of(part)}" for n, part in zip(times[1:-1], parts[1:-1])), "after", "all"]
    yield f"{'':<28}" + "".join(f"{head:>12}" for head in heads)
    counts = [part.counts() for part in parts]
    rows = [(label, [kind]) for kind, label in KINDS.items()]
    for label, kinds in (*rows, ("all", [*KINDS]), ("in a row", ["in a row"])):
        numbers = [sum(count[kind] for kind in kinds) for count in counts]
        yield f"{label:<28}" + "".join(
            f"{number:>12}" for number in (*numbers, sum(map(operator.mul, numbers, times)))
        )


def report(title: str, parts: list[Part]) -> Iterator[str]:
    yield f"\n== {title}"
    for part in parts:
        count = len([leaf for launch in part.launches for leaf in launch.leaves()])
        where = "before the layers" if part is parts[0] else "after the layers"
        if part.kind is not None:
            where = f"each {kind_of(part)} layer ({', '.join(map(str, part.layers))})"
        if count:
            yield from (f"\n{where}: {count} launches", *lines_of(part.launches))
    yield from ("", *table(parts))


def check_machine() -> None:
    """Raise CannotRunError where something is missing."""
    if torch.backends.cuda.is_built():
        raise CannotRunError("needs a PyTorch that was built without CUDA (its CPU build)")
    for name in ("triton", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise CannotRunError(f"needs {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", choices=GPUS, default="9.0", help="of the GPU (default 9.0)")
    parser.add_argument("--linears", choices=("fp8",), help="of `from_pretrained`")
    parser.add_argument("--code", type=Path, metavar="FILE", help="write the generated code there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all launches there")
    options = parser.parse_args()
    try:
        check_machine()
        load_guard()
    except CannotRunError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    import transformers
    import triton

    from bench.step_model import full_config

    config, record = full_config(), Record()
    with tempfile.TemporaryDirectory() as cache, pretended_gpu(options.capability, record):
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
            found = walks(config, options.linears)
        if options.code is not None:
            options.code.write_text("\n\n".join(code for walk in found for code in walk.codes.values()))
        step, storing = (parts_of(walk, record) for walk in found)

    name, multiprocessors = GPUS[options.capability]
    gpu = f"{name}, compute capability {options.capability}, {multiprocessors} multiprocessors"
    modules = {"torch": torch, "triton": triton, "transformers": transformers}
    releases = {module: imported.__version__ for module, imported in modules.items()}
    print(gpu, ", ".join(map(" ".join, releases.items())), sep="\n")
    print(f"1 canvas of {config.canvas_length} tokens, {SLOTS} slots of cache, backend triton")
    for title, parts in (("a step", step), ("the pass that stores a canvas", storing)):
        print(*report(title, parts), sep="\n")
    if options.json is not None:
        found = {"gpu": name, "capability": options.capability, "multiprocessors": multiprocessors}
        found |= {
            "releases": releases,
            "step": list(map(asdict, step)),
            "storing": list(map(asdict, storing)),
        }
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

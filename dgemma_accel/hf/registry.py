"""What was captured of one model: which captures there are, and whether they still belong to its weights."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Captures of one kind that are kept of a model; the one not used for the longest time goes first.
MOST_CAPTURES = 8
# Kinds of captures: a denoising step, and the pass that stores a finished canvas.
STEP, STORING = "step", "storing"
# What serves where there is none.
UNCAPTURED = {
    STEP: "steps without a capture serve",
    STORING: "the pass over a finished canvas, without a capture, serves",
}


class Captures:
    """The captures of one model by their kind and what they were recorded with. A copy of the model records for
    itself."""

    def __init__(self) -> None:
        # One at a time: their memory is shared.
        self.lock = threading.Lock()
        self.found: OrderedDict[tuple, object] = OrderedDict()
        self.failures: dict[tuple, str] = {}
        self.weights: dict[str, tuple] = {}
        self.unsettled: set[str] = set()
        self.pool = None

    def __reduce__(self):
        return Captures, ()

    @contextmanager
    def lease(
        self,
        key: tuple,
        weigh: Callable[[], tuple],
        make_pool: Callable[[torch.device], object],
        make: Callable[[object], object],
    ) -> Iterator:
        """The capture for `key`, made if there is none; None while another thread replays, or after a failure.

        Modules may write attributes of their own as they run, the last states that they saw, say. A replay does not run
        them, so a capture belongs to what its recording left, and those before it do not. Where none can be made they
        run in every canvas, and what they write is no reason to try again.

        Args:
            key: begins with the kind and the device.
            weigh: the `fingerprint` of the modules that captures of this kind run; those with another one read memory
                that is no longer the model's.
            make: from a memory pool to a capture. What it raises goes on to the caller, once.
        """
        if not self.lock.acquire(blocking=False):
            yield None
            return
        try:
            kind, weights = key[0], weigh()
            if weights != self.weights.get(kind):
                if kind in self.unsettled:
                    yield None
                    return
                self._let_go(kind)
                self.weights[kind] = weights
            # `clear` may come meanwhile, from whatever the steps call.
            found = self.found
            if key not in found:
                try:
                    self._make(found, key, make_pool, make)
                finally:
                    self._settle(found, key, weights, weigh())
            found.move_to_end(key)
            yield found[key]
        finally:
            self.lock.release()

    def clear(self) -> None:
        """Let go of every capture and its memory; one that is replayed stays until its run is over."""
        self.found, self.failures, self.weights, self.pool = OrderedDict(), {}, {}, None
        self.unsettled = set()

    def failed(self, key: tuple, why: str) -> None:
        """Keep why there is no capture for `key`, as long as one would be kept."""
        self.failures[key] = why
        self._trim(self.failures, key[0])

    def _let_go(self, kind: str) -> None:
        """`clear` for the captures of one kind. The others' memory stays, and is shared with those made next."""
        self.found = OrderedDict((key, one) for key, one in self.found.items() if key[0] != kind)
        self.failures = {key: line for key, line in self.failures.items() if key[0] != kind}
        if not self.found:
            self.pool = None

    def _settle(self, found: OrderedDict, key: tuple, before: tuple, after: tuple) -> None:
        """See to the captures besides that for `key`, the recording of which was tried: their number and weights."""
        kind = key[0]
        self._trim(found, kind)
        if after != before:
            self.weights[kind] = after
            for other in [one for one in found if one[0] == kind and one != key]:
                del found[other]
                self.failures.pop(other, None)
            if found.get(key) is None:
                self.unsettled.add(kind)

    def _trim(self, held: dict[tuple, object], kind: str) -> None:
        """Let go of the oldest of one kind that are too many."""
        alike = [key for key in held if key[0] == kind]
        for oldest in alike[: max(0, len(alike) - MOST_CAPTURES)]:
            held.pop(oldest)
            self.failures.pop(oldest, None)

    def _make(self, found: OrderedDict, key: tuple, make_pool, make) -> None:
        try:
            found[key] = make(self._pool_on(key[1], make_pool))
        except BaseException as error:
            # The allocator may go on taking that pool for one that is being recorded into.
            self.pool = None
            if isinstance(error, Exception):
                # Not tried again. What only ends the program says nothing about the capture.
                found[key] = None
            raise

    def _pool_on(self, device: torch.device, make_pool: Callable[[torch.device], object]) -> object:
        if self.pool is None or self.pool[0] != device:
            self.pool = (device, make_pool(device))
        return self.pool[1]


def modules_of(root: nn.Module) -> list[nn.Module]:
    """`root.modules()`, in another order and in less than half the time: they are gone through before every canvas."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(module._modules.values())
    return list(found)


_PLAIN = frozenset({bool, int, float, str, torch.dtype})
_OF_EACH_MODULE = frozenset(vars(nn.Module()))


def fingerprint(model: nn.Module, *roots: nn.Module) -> tuple:
    """What a recording of `roots` and all modules in them depends on besides its inputs: the configuration, their code,
    the numbers, names and switches among their attributes (an adapter is off by one, and scaled by another), and the
    addresses of their weights. Of the caller's modules tensors among the attributes as well, and all of this in their
    collections and in the attributes of their objects.

    Values that are written in place (`load_state_dict`, `copy_`) are read anew by every replay and are not in it.
    """
    configs = (model.config, model.config.get_text_config())
    found: list = [getattr(model.config, "_experts_implementation", None), *map(_plain, map(vars, configs))]
    objects: dict[int, object] = {}
    for module in itertools.chain.from_iterable(map(modules_of, roots)):
        attributes = module.__dict__
        found.append((id(module), type(module), id(attributes.get("forward"))))
        found.extend([value for value in attributes.values() if type(value) in _PLAIN])
        if not _is_of_a_library(type(module)):
            # To look into all of theirs takes milliseconds.
            others = [name for name in attributes if name not in _OF_EACH_MODULE]
            found.extend([_plain(attributes[name], objects) for name in others])
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    found.append((name, *_addresses(tensor)))
    return tuple(found)


def _plain(value: object, objects: dict[int, object] | None = None) -> object:
    """A value of Python's own, where a tensor lies, or a collection of these, as it is now; of another object the same
    of its attributes, and None for anything else.

    Args:
        objects: what came of those that were looked into, by id; None inside of one, where no other is.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return _addresses(value)
    if isinstance(value, (list, tuple)):
        return tuple([_plain(one, objects) for one in value])
    if isinstance(value, (set, frozenset)):
        return frozenset([_plain(one, objects) for one in value])
    if isinstance(value, dict):
        return tuple([(_plain(key, objects), _plain(one, objects)) for key, one in value.items()])
    if objects is None or _is_of_a_library(type(value)):
        return None
    if id(value) not in objects:
        attributes = getattr(value, "__dict__", None)
        objects[id(value)] = _plain(attributes) if type(attributes) is dict else None
    return objects[id(value)]


def _is_of_a_library(kind: type) -> bool:
    """Whether a class is Python's, PyTorch's or transformers', whose instances keep nothing in collections that a step
    reads."""
    return kind.__module__.startswith(("builtins", "torch.", "transformers."))


def _addresses(tensor: Tensor) -> tuple:
    """Addresses, shape and dtype; of a quantised tensor those of the tensors that it consists of."""
    inner = None if type(tensor) in (Tensor, nn.Parameter) else getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:
        names, _ = inner()
        return (type(tensor), *(part for name in names for part in _addresses(getattr(tensor, name))))
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device

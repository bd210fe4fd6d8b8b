"""Cache buffers that the calls of one model share, so that a capture of one call serves the next."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

# Batch sizes whose buffers are kept; the one not used for the longest time goes first.
MOST_BATCH_SIZES = 4
SMALLEST = 2048


def rounded_up(length: int) -> int:
    """The size that a cache for `length` tokens gets: four sizes to each doubling, so at most a quarter is unused."""
    if length <= SMALLEST:
        return SMALLEST
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step


@dataclass(eq=False)
class _Entry:
    """capacity: in tokens. buffers: (key, value) of every layer, None before they are made. holder: the cache that
    reads them, weakly. in_use: by a call that is running."""

    capacity: int
    buffers: list | None = None
    holder: weakref.ref | None = None
    in_use: bool = False


class CacheBank:
    """Lends buffers to one `PreallocatedCache` after another.

    A cache that a caller still holds when its buffers are wanted again takes its tokens along into memory of its own,
    so what an earlier call returned stays what it was. Two calls at a time do not share.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: OrderedDict[int, _Entry] = OrderedDict()

    def __reduce__(self):
        return CacheBank, ()

    def lease(self, config, batch: int, max_length: int):
        """An empty `PreallocatedCache` for `max_length` tokens and more; `give_back` it when the call is over."""
        from .preallocated import PreallocatedCache

        with self.lock:
            entry = self.entries.get(batch)
            if entry is not None and entry.in_use:
                return PreallocatedCache(config, rounded_up(max_length), growing=True)
            if entry is None or entry.capacity < max_length:
                entry = self.entries[batch] = _Entry(rounded_up(max_length))
            before = None if entry.holder is None else entry.holder()
            if before is not None:
                before.part_from_buffers()
            cache = PreallocatedCache(config, entry.capacity, growing=True)
            if entry.buffers is not None:
                cache.adopt(entry.buffers)
            entry.holder, entry.in_use = weakref.ref(cache), True
            self.entries.move_to_end(batch)
            for other in [b for b in self.entries if not self.entries[b].in_use][: max(0, self._surplus())]:
                del self.entries[other]
            return cache

    def hold(self, cache) -> bool:
        """A call goes on with `cache`, which an earlier one returned: its buffers are not lent until `give_back`.

        False where they are not this bank's, and where another call has them.
        """
        with self.lock:
            for entry in self.entries.values():
                if entry.holder is not None and entry.holder() is cache and not entry.in_use:
                    entry.in_use = True
                    return True
        return False

    def clear(self) -> None:
        """Let go of all buffers. Caches that callers hold keep theirs."""
        with self.lock:
            self.entries.clear()

    def _surplus(self) -> int:
        return len(self.entries) - MOST_BATCH_SIZES

    def give_back(self, cache) -> None:
        """The call that leased `cache` is over; its caller may go on reading it."""
        with self.lock:
            for entry in self.entries.values():
                if entry.holder is not None and entry.holder() is cache:
                    entry.in_use = False
                    # They may be others than were lent: of another dtype, or none yet.
                    entry.buffers = cache.buffers_at(entry.capacity)

"""Values that several threads share, computed by the first that needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def once(compute: Callable[[], T]) -> Callable[[], T]:
    """A function that computes its result on the first call, in any thread. Concurrent calls wait for that result."""
    lock, kept = threading.Lock(), list[T]()

    def call() -> T:
        with lock:
            if not kept:
                kept.append(compute())
            return kept[0]

    return call

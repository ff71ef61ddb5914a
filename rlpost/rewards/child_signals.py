"""Processes that a reward forks start with default signal handling, not with the handlers of their parent.

A forked child inherits its parent's handlers. A reward worker ignores Ctrl-C and SIGTERM, and a run turns them into a
request to save, so without this ``Process.terminate()`` and the end of a process pool would wait forever for a child
that does not end. Programs that are executed (``subprocess``) lose inherited handlers anyway.

The signals are blocked while a fork is under way: one that arrives before the child has its defaults stays pending and
then ends the child, instead of reaching a handler that drops it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_not_for_children: dict[int, Any] = {}  # handlers by signal number; a reward's own handlers are inherited, as usual
_masks = threading.local()  # the forking thread's, from before the fork
_registered = False


def keep_from_children(handlers: Mapping[int, Any]) -> None:
    """From now on these handlers are replaced by the default in every forked child."""
    global _registered
    if not _registered:  # lasts as long as the process
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_reset)
        _registered = True
    _not_for_children.clear()
    _not_for_children.update((number, handler) for number, handler in handlers.items() if callable(handler))


@contextlib.contextmanager
def default_signals_in_children() -> Iterator[None]:
    """The same for the handlers that are installed now, while the body runs."""
    keep_from_children({number: signal.getsignal(number) for number in SIGNALS})
    try:
        yield
    finally:
        _not_for_children.clear()


def _block() -> None:
    if _not_for_children:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _not_for_children)


def _unblock() -> None:
    before = getattr(_masks, "before", None)
    if before is not None:
        _masks.before = None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reset() -> None:
    pending = signal.sigpending() if _not_for_children else set()
    for number, handler in _not_for_children.items():
        if signal.getsignal(number) is handler:
            # A KeyboardInterrupt raised in here would be dropped: a Ctrl-C that came already ends the child.
            raises = number == signal.SIGINT and number not in pending
            signal.signal(number, signal.default_int_handler if raises else signal.SIG_DFL)
    _unblock()

"""A thread that looks for new chunks of a token store, so that whoever needs a row finds it read and checked.

Checking a chunk's digest takes longer than all else the reader does with it: 0.2 s for the 128 MB of a set like SQuAD.
The thread does it between the batches of two steps; hashing leaves the interpreter to the others meanwhile. It holds no
store: it ends when the store goes, when it is told to, or with the process.
"""

from __future__ import annotations

import threading
import weakref

from nemo_automodel.components.datasets.token_cache import TokenStore

_EVERY_S = 0.05


class ReadAhead:
    """Refreshes a store every now and then until ``stop``."""

    def __init__(self, store: TokenStore) -> None:
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=_refresh_until, args=(weakref.ref(store), self._is_over), name="read-tokens-ahead", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._is_over.set()
        self._thread.join()


def _refresh_until(find_store: weakref.ref[TokenStore], is_over: threading.Event) -> None:
    while not is_over.wait(_EVERY_S):
        store = find_store()
        if store is None or store.num_there == store.num_rows:
            return
        try:
            store.refresh()
        except OSError:
            return  # whoever needs a row meets it, too, and tells it
        del store

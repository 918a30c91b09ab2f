"""Background processes that tokenise the rows of a set, while the model loads and while the first steps run.

Processes are forked, so nothing has to be sent to them, and each is told its rows at the start: every ``n``-th piece of
the list, so that the rows needed first come first. What they make goes into the set's store, chunk by chunk; only an
error comes back through a pipe. A process ends when its rows are done, when its parent ends it, or by itself when its
parent is gone. Signals of the terminal do not reach them: the parent decides.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np

from nemo_automodel.components.datasets.llm.tokenized_rows import TokenizedRows
from nemo_automodel.components.datasets.token_cache import TokenizedRow, TokenStore
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.types import IGNORE_INDEX

_ROWS_AT_ONCE = 2048
_FIRST_ROWS_AT_ONCE = 256
"""Rows of the first pieces: small, so that the first packs do not wait for many rows."""
_NUM_FIRST_PIECES = 8
_NICENESS = 5
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class TokenizeWorkers:
    """The processes that tokenise ``rows`` of a data set into a store, which must be locked."""

    def __init__(self, dataset: TokenizedRows[Any], store: TokenStore, rows: np.ndarray, num_proc: int) -> None:
        pieces = _pieces(rows)
        self.num_proc = min(num_proc, len(pieces))
        self._process_of = np.full(store.num_rows, -1, np.int16)
        for number, piece in enumerate(pieces):
            self._process_of[piece] = number % self.num_proc
        self._processes: list[tuple[ForkProcess, Connection]] = []
        context = multiprocessing.get_context("fork")
        before = os.environ.get(_PARALLELISM)
        os.environ[_PARALLELISM] = "false"  # the threads of the tokenizer's core are not forked with it
        try:
            for number in range(self.num_proc):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work,
                    args=(dataset, store, pieces[number :: self.num_proc], sender, os.getpid()),
                    name=f"tokenize-{number}",
                    daemon=True,
                )
                with warnings.catch_warnings():
                    # Python 3.12 warns of every fork beside threads; the process uses none of theirs
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                self._processes.append((process, receiver))
        finally:
            if before is None:
                del os.environ[_PARALLELISM]
            else:
                os.environ[_PARALLELISM] = before

    @property
    def is_working(self) -> bool:
        """Tell whether a process is at work."""
        return any(process.is_alive() for process, _ in self._processes)

    def check(self, row: int) -> None:
        """Refuse to wait for a row whose process failed.

        What another process found wrong comes up when its own row is needed: so it is always the first fault in order
        that ends a run, whichever process is faster.

        Raises:
            UserError: what the process found wrong with a row, or that it was killed.
            RuntimeError: it failed through a defect; it has printed where.
        """
        if self._process_of[row] < 0:
            return
        process, receiver = self._processes[self._process_of[row]]
        if process.is_alive() or process.exitcode == 0:
            return
        if message := _message(receiver):
            raise UserError(message)
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise UserError(
                f"A process that tokenises rows was killed ({name}), often because memory ran out. Lower "
                f"`packed_sequence.num_proc` from {self.num_proc}; what is in the token cache is kept."
            )
        raise RuntimeError(f"A process that tokenises rows failed (exit status {process.exitcode}).")

    def stop(self) -> None:
        """End all processes and wait for them."""
        for process, receiver in self._processes:
            process.kill()
            process.join()
            receiver.close()
        self._processes = []


def tokenize_rows(dataset: TokenizedRows[Any], rows: Sequence[int]) -> list[TokenizedRow]:
    """Tokenise rows in this process; nothing that the set counts changes.

    Raises:
        UserError: a row cannot be used.
    """
    found = []
    for _, encoded in dataset.encode(rows):
        ids, labels = dataset.layout.arrays(encoded)
        num_learned = int((labels != IGNORE_INDEX).sum())
        num_cut = dataset.layout.num_cut(encoded)[1]
        found.append(TokenizedRow(ids, labels, num_learned, len(encoded.ids), num_cut))
    return found


def _message(receiver: Connection) -> str:
    """Return what a process that ended has said, which may be nothing."""
    try:
        return receiver.recv_bytes().decode()
    except EOFError:
        return ""


def _pieces(rows: np.ndarray) -> list[np.ndarray]:
    head = min(len(rows), _NUM_FIRST_PIECES * _FIRST_ROWS_AT_ONCE)
    borders = [*range(0, head, _FIRST_ROWS_AT_ONCE), *range(head, len(rows), _ROWS_AT_ONCE), len(rows)]
    return [rows[start:end] for start, end in itertools.pairwise(borders)]


def _work(
    dataset: TokenizedRows[Any], store: TokenStore, pieces: list[np.ndarray], sender: Connection, parent: int
) -> None:
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.nice(_NICENESS)
    gc.freeze()  # whatever the parent holds is not garbage here, and looking at it would copy its memory
    store.forget_lock()
    try:
        for rows in pieces:
            if os.getppid() != parent:
                return
            tokenized = tokenize_rows(dataset, rows.tolist())
            _write(store, rows, tokenized)
    except UserError as error:
        sender.send_bytes(str(error).encode())
        raise SystemExit(1) from None


def _write(store: TokenStore, rows: np.ndarray, tokenized: list[TokenizedRow]) -> None:
    try:
        store.write(rows.tolist(), tokenized)
    except OSError as error:
        raise UserError(
            f"The token cache {store.directory} cannot be written: {error.strerror}. Make room, or name another "
            "directory with `packed_sequence.cache`."
        ) from error

"""A process of a run that dies is noticed by the others, and they end with one message that names it.

A collective operation waits for every process. One that was killed never comes, and what its neighbours hear of it is
nothing (NCCL) or that a connection was closed (gloo). So every process holds a connection to the first one, and a
thread listens to it. The kernel closes the connections of a process that dies, however it dies, so nothing is sent
while all is well and nobody is mistaken for dead because he is busy.

The thread notes who was lost and tells the others through the first process. Their main threads find the note when
their next collective operation fails, and leave as from any error: files are closed, trackers told. One that is still
there after ``GRACE_S``, because it waits inside a GPU's queue, is ended by its thread. The price is one socket and one
sleeping thread a process.

A process that hangs keeps its connections. That shows when a collective operation runs into `dist_env.timeout_minutes`:
then those that wait say so, and who says nothing is the one.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_automodel.shared.errors import RankLostError, UserError
from nemo_automodel.shared.processes import LAUNCHER

GRACE_S = 10.0
"""Time that the main thread has to leave once a process was lost."""
_NOTES_S = 2.0
"""How long those that wait have to say so."""
_VERDICT_S = 2 * _NOTES_S
"""How long a process waits to be told which other one is to blame."""
_LOOK_S = 0.5
SPEAK_AFTER_S = 300.0
"""How long a patient wait lasts before something is said of it; then after twice as long, and so on."""

logger = logging.getLogger(__name__)

Share = Callable[[Any], Any]
"""Returns what the first process passed in, in every process."""


@dataclass(frozen=True)
class Loss:
    """The first process that was lost, and what is said of it."""

    rank: int
    message: str
    status: int
    is_told: bool
    """The process itself tells the user, because it is the first one and still runs."""

    def error(self) -> UserError:
        """Return it as an error to raise."""
        return RankLostError(self.message, self.status)


class PeerWatch:
    """The connections of one process; made by all processes together, after they have found each other.

    Args:
        rank: number of this process.
        size: number of processes, at least 2.
        share: hands an object of the first process to the others.
    """

    def __init__(self, rank: int, size: int, share: Share) -> None:
        self.rank, self.size = rank, size
        self._loss: Loss | None = None
        self._found = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._waiting: set[int] = set()
        """Processes that said that they wait in vain."""
        self._left: set[int] = set()
        """Processes that said goodbye."""
        self._pids: dict[int, int] = {}
        self._peers: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._wait: tuple[float, str] | None = None
        self._speak_after_s = SPEAK_AFTER_S
        self._launcher = int(os.environ.get(LAUNCHER, "0"))
        self._meet(share)
        # a loader's worker must not keep the connection of the process it was forked from alive
        os.register_at_fork(after_in_child=self._close)
        self._thread = threading.Thread(target=self._run, name="peer watch", daemon=True)
        self._thread.start()

    def _meet(self, share: Share) -> None:
        """Connect every process with the first one; the token keeps other programs of the machine out."""
        if self.rank != 0:
            port, token, pid = share(None)
            peer = socket.create_connection(("127.0.0.1", port))
            peer.sendall(_line(token=token, rank=self.rank, pid=os.getpid()))
            self._peers, self._pids = {0: peer}, {0: pid}
            return
        token = secrets.token_hex(16)
        with socket.create_server(("127.0.0.1", 0), backlog=self.size) as server:
            share((server.getsockname()[1], token, os.getpid()))
            while len(self._peers) < self.size - 1:
                peer, _ = server.accept()
                hello = _first_line(peer)
                if not hmac.compare_digest(str(hello.get("token")), token):
                    peer.close()
                    continue
                self._peers[hello["rank"]], self._pids[hello["rank"]] = peer, hello["pid"]

    # What the main thread says and asks.

    def explain(self, what: str, ran_out_of_time: bool) -> UserError | None:
        """Return which process is to blame that ``what`` failed; None where that is none of the others.

        Waits some seconds to hear of it. When time ran out, a process that does not say that it waits as well is one
        that hangs.
        """
        with self._lock:
            self._waiting.add(self.rank)
        self._tell(kind="waits", rank=self.rank)
        if self._found.wait(_NOTES_S if self.rank == 0 else _VERDICT_S):
            assert self._loss is not None
            return self._loss.error()
        if not ran_out_of_time:
            return None
        if self.rank == 0:
            silent = [rank for rank in sorted(self._peers) if rank not in self._waiting and rank not in self._left]
        else:
            silent = [0]
        if not silent:
            return None
        names = " and ".join(self._name(rank) for rank in silent)
        self._lose(
            silent[0],
            f"Lost {names}: no answer in time ({what}), although it still runs. It hangs, or it needs longer than "
            "`dist_env.timeout_minutes`; raise that if it does. Every process ends; the last checkpoint is whole.",
        )
        return None if self._loss is None else self._loss.error()

    def loss(self) -> UserError | None:
        """Return which process was lost, None as far as is known."""
        return None if self._loss is None else self._loss.error()

    def loss_of_another(self) -> UserError | None:
        """Return which other process was lost, None as far as is known."""
        return None if self._loss is None or self._loss.rank == self.rank else self._loss.error()

    def begin_wait(self, what: str) -> None:
        """Note that the main thread waits for other processes, and nobody knows how long."""
        self._wait, self._speak_after_s = (time.monotonic(), what), SPEAK_AFTER_S

    def end_wait(self) -> None:
        """Note that it does not any more."""
        self._wait = None

    def say_last_words(self, reason: str, status: int) -> None:
        """Tell the other processes why this one ends. It has all the time it needs to do so."""
        self._over.set()
        self._lose(self.rank, reason if self.rank == 0 else f"rank {self.rank}: {reason}", status, is_told=True)

    def leave(self) -> None:
        """Say goodbye: the end of this process is no loss to the others."""
        self._over.set()
        self._tell(kind="leaves", rank=self.rank)
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    # The thread.

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while not self._over.is_set() and self._loss is None:
                for key, _ in selector.select(_LOOK_S):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                self._speak_of_wait()
                if self._launcher and os.getppid() != self._launcher:
                    self._lose(self.rank, "The process that started this run is gone, so the run ends.")
        if self._loss is None or self._over.wait(GRACE_S):
            return
        if self.rank == 0:
            _write_error(self._loss.message)
        os._exit(self._loss.status)  # the main thread waits where no exception reaches it

    def _speak_of_wait(self) -> None:
        wait = self._wait
        if wait is None or time.monotonic() - wait[0] < self._speak_after_s:
            return
        said = f"Rank {self.rank} has waited {self._speak_after_s / 60:.3g} minutes for other processes ({wait[1]})."
        self._speak_after_s *= 2
        if self.rank == 0:
            logger.warning("%s", said)
        elif self.rank == 1:  # the first one is among those that are waited for
            os.write(2, f"{said}\n".encode())

    def _hear(self, rank: int) -> bool:
        """Take in what a process says; False when it will say no more."""
        try:
            heard = self._peers[rank].recv(65536)
        except OSError:
            heard = b""
        if not heard:
            if rank not in self._left:
                self._lose(
                    rank,
                    f"Lost {self._name(rank)}: it was killed, or ended without a word. Where memory ran out, `dmesg` "
                    "says so. Every process ends; the last checkpoint is whole.",
                )
            return False
        *lines, self._unread[rank] = (self._unread.get(rank, b"") + heard).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return True

    def _take(self, said: dict[str, Any]) -> None:
        if said["kind"] == "leaves":
            self._left.add(said["rank"])
        elif said["kind"] == "waits":
            with self._lock:
                self._waiting.add(said["rank"])
        elif said["kind"] == "lost":
            self._lose(said["rank"], said["message"], said["status"], said["is_told"])

    def _lose(self, rank: int, message: str, status: int = RankLostError.default_status, is_told: bool = False) -> None:
        """Note the first loss and pass it on; later ones follow from it."""
        with self._lock:
            if self._loss is not None:
                return
            if rank == 0 and self.rank == 1 and not is_told:  # the one that would say it is the one that is gone
                _write_error(message)  # first, for the main thread may end this process as soon as it knows
            self._loss = Loss(rank, message, status, is_told)
        self._tell(kind="lost", rank=rank, message=message, status=status, is_told=is_told)
        self._found.set()

    def _tell(self, **said: Any) -> None:
        line = _line(**said)
        for peer in self._peers.values():
            try:
                peer.sendall(line)
            except OSError:
                continue  # gone, as its own connection says

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._pids.get(rank, '?')})"


def _line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _first_line(peer: socket.socket) -> dict[str, Any]:
    peer.settimeout(5.0)
    heard = b""
    try:
        while not heard.endswith(b"\n") and len(heard) < 1000:
            more = peer.recv(1000)
            if not more:
                break
            heard += more
        peer.settimeout(None)
        said = json.loads(heard)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _write_error(message: str) -> None:
    os.write(2, f"error: {' '.join(message.split())}\n".encode())

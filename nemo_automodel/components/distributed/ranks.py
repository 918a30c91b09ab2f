"""All processes of a run, seen from one of them.

Every collective operation of ours is here or in `grad`, and every one of them is called by all processes or by none.
What fails in it is told apart: a process that died or ended is named (`peer_watch`), anything else is a defect.

There are two clocks. In the steps of training processes keep pace, so there `dist_env.timeout_minutes` bounds every
wait. Around them they do not: the first one saves, or tokenises, while the others wait, and nobody knows how long that
takes. Those waits are patient; a process that dies ends them too.

One process waits for nobody: every method returns at once what it was given, and torch's process groups are not made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nemo_automodel.components.distributed.peer_watch import PeerWatch
from nemo_automodel.shared.errors import UserError

_PATIENCE = timedelta(days=7)
_CLOCK = re.compile(r"time(d )?out", re.IGNORECASE)
"""In what the backends say when a clock ran out."""


class Ranks:
    """The processes of a run; without arguments there is one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Meet the others, whose process group is there already."""
        self.rank, self.size = rank, size
        self._patient: dist.ProcessGroup | None = None
        self._watch: PeerWatch | None = None
        if size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self._watch = PeerWatch(rank, size, self._share)

    @property
    def is_first(self) -> bool:
        """Tell whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def patient_group(self) -> dist.ProcessGroup | None:
        """All processes, on the host, without a clock; None where there is one."""
        return self._patient

    @property
    def are_several(self) -> bool:
        """Tell whether there are others."""
        return self.size > 1

    # In step.

    def sum(self, count: int) -> int:
        """Return the sum of a count over all processes."""
        return count if self.size == 1 else self._reduced(count, dist.ReduceOp.SUM, "adding up counts")

    def largest(self, number: int) -> int:
        """Return the largest number that a process has."""
        return number if self.size == 1 else self._reduced(number, dist.ReduceOp.MAX, "comparing notes")

    def _reduced(self, number: int, operation: Any, what: str) -> int:
        tensor = torch.tensor(number, dtype=torch.int64)
        with self.in_company(what):
            dist.all_reduce(tensor, operation)
        return int(tensor)

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all processes, the same bits in each; nobody waits for the device."""
        with self.in_company("adding up gradients"):
            dist.all_reduce(tensor)

    def copy_from(self, tensor: torch.Tensor, rank: int) -> None:
        """Replace a tensor by that of one process, as an operation in place that automatic differentiation knows of."""
        shared = tensor.detach()
        with self.in_company("copying weights"):
            dist.broadcast(shared, src=rank)
        # copies of weights in other layouts are made anew where their version says so
        torch.autograd.graph.increment_version(shared)

    @contextmanager
    def in_company(self, what: str, is_patient: bool = False) -> Iterator[None]:
        """Do something with all processes; when it fails because one is lost, the error says which.

        Raises:
            RankLostError: a process died, ended or does not answer.
        """
        assert self._watch is not None
        if (known := self._watch.loss()) is not None:
            raise known
        if is_patient:
            self._watch.begin_wait(what)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch has no narrower class for what the backends raise
            lost = self._watch.explain(what, ran_out_of_time=_CLOCK.search(str(error)) is not None)
            if lost is None:
                raise
            raise lost from error
        finally:
            self._watch.end_wait()

    # Patiently.

    def wait_for_all(self) -> None:
        """Return when all processes have come here, however long it takes."""
        if self.size > 1:
            with self.in_company("all come here", is_patient=True):
                dist.barrier(group=self._patient)

    def share(self, value: Any = None) -> Any:
        """Return what the first process passes, in all of them."""
        if self.size == 1:
            return value
        with self.in_company("hearing from the first one", is_patient=True):
            return self._share(value)

    def _share(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._patient, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return what every process passes, by rank, in all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self.in_company("hearing from all", is_patient=True):
            dist.all_gather_object(values, value, group=self._patient)
        return values

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do something before the others do it: download, tokenise, write."""
        if not self.is_first:
            self.wait_for_all()
        yield
        if self.is_first:
            self.wait_for_all()

    # The end.

    def say_last_words(self, reason: str, status: int) -> None:
        """Tell the others that this process ends, and why."""
        if self._watch is not None:
            self._watch.say_last_words(reason, status)

    def loss_of_another(self) -> UserError | None:
        """Return which other process was lost, None as far as is known."""
        return None if self._watch is None else self._watch.loss_of_another()

    def leave(self) -> None:
        """End together, and well."""
        if self._watch is None:
            return
        self.wait_for_all()
        self._watch.leave()
        self._watch = None
        dist.destroy_process_group()


ALONE = Ranks()

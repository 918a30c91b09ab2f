"""What a person at the terminal sees: the lines of a step, and progress bars that live together with them.

There is one display for the whole process. Training, tokenising and downloading each add a bar to it; log lines are
printed above the bars. Without a terminal there are no bars, only plain lines, so a log file holds nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID

    from nemo_automodel.shared.types import StepMetrics

TRAIN_LINE = (
    "step {} | epoch {} | loss {:.4f} | grad_norm {:.4f} | lr {:.2e} | mem {:.2f} GiB | tps {:.2f}({:.2f}/gpu) | "
    "num_label_tokens {}"
)
VAL_LINE = '[val] name "{}" | step {} | epoch {} | loss {:.4f} | lr {:.2e} | num_label_tokens {}'

_REFRESH_PER_SECOND = 4
"""Drawing takes the interpreter from the training thread for some milliseconds."""


def train_line(step: int, epoch: int, metrics: StepMetrics, num_processes: int) -> str:
    """Return the console line of a training step."""
    return TRAIN_LINE.format(
        step,
        epoch,
        metrics.loss,
        metrics.grad_norm,
        metrics.lr,
        metrics.mem_gib,
        metrics.tps,
        metrics.tps / num_processes,
        metrics.num_label_tokens,
    )


def val_line(name: str, step: int, epoch: int, loss: float, lr: float, num_label_tokens: int) -> str:
    """Return the console line of a validation pass."""
    return VAL_LINE.format(name, step, epoch, loss, lr, num_label_tokens)


class _Display:
    """The bars on the screen: made with the first bar, taken down with the last one."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    def add(self, description: str, total: float | None, is_bytes: bool) -> TaskID:
        if self.progress is None:
            self.progress = _make_progress()
            self.progress.start()
        return self.progress.add_task(description, total=total, detail="", is_bytes=is_bytes)

    def remove(self, task: TaskID) -> None:
        assert self.progress is not None
        self.progress.remove_task(task)
        if not self.progress.tasks:
            self.progress.stop()
            self.progress = None


_display = _Display()


def write_line(text: str) -> None:
    """Write one line to standard error, above the bars while some are shown; ANSI colours are kept."""
    if _display.progress is None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        return
    from rich.text import Text

    _display.progress.console.print(Text.from_ansi(text), soft_wrap=True, highlight=False)


def shows_bars() -> bool:
    """Tell whether bars are drawn: on a terminal that can move its cursor, by the first process only."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("RANK", "0") == "0"


class Bar:
    """One bar of the display; every method does nothing where no bars are shown.

    ``total`` is None when the end is not known. ``is_bytes`` writes amounts as sizes.
    """

    def __init__(self, description: str, total: float | None, *, is_bytes: bool = False) -> None:
        self._task = _display.add(description, total, is_bytes) if shows_bars() else None

    def advance(self, amount: float = 1) -> None:
        """Move forward by ``amount``."""
        if self._task is not None and _display.progress is not None:
            _display.progress.update(self._task, advance=amount)

    def move_to(self, completed: float, detail: str = "") -> None:
        """Stand at ``completed`` and show ``detail`` behind the amounts."""
        if self._task is not None and _display.progress is not None:
            _display.progress.update(self._task, completed=completed, detail=detail)

    def close(self) -> None:
        """Take the bar down; a second call does nothing."""
        if self._task is not None:
            _display.remove(self._task)
            self._task = None


@contextmanager
def progress(
    description: str, total: float | None = None, *, is_bytes: bool = False
) -> Iterator[Callable[[float], None]]:
    """Show a bar for other long work (loading, tokenising, downloading).

    Yields:
        ``advance(amount)``, to be called as the work goes on. Without a terminal, ``description`` is written as one
        plain line and ``advance`` does nothing.
    """
    bar = Bar(description, total, is_bytes=is_bytes)
    if not shows_bars() and os.environ.get("RANK", "0") == "0":
        write_line(f"{description} ...")
    try:
        yield bar.advance
    finally:
        bar.close()


def _make_progress() -> Progress:
    """Build the display; rich costs 70 ms to import, so it is loaded with the first bar only."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class AmountColumn(ProgressColumn):
        """``12/100`` or ``1.2 MB/3.4 MB``; without a total only what is done."""

        def render(self, task: Task) -> Text:
            def write(amount: float) -> str:
                return decimal(int(amount)) if task.fields["is_bytes"] else f"{amount:,.0f}"

            done = write(task.completed)
            return Text(done if task.total is None else f"{done}/{write(task.total)}", style="progress.download")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        AmountColumn(),
        TextColumn("{task.fields[detail]}"),
        TextColumn("[dim]ETA[/dim]"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        refresh_per_second=_REFRESH_PER_SECOND,
        transient=True,
        # Standard output may go to a file while the bars are on the terminal: then it must not be drawn into them.
        redirect_stdout=sys.stdout.isatty(),
    )

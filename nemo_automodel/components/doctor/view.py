"""What a person sees: problems, warnings and notes with their commands, then one line a topic of what is fine."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nemo_automodel.components.doctor.findings import NOTE, OK, PROBLEM, STATUSES, WARNING, Finding

if TYPE_CHECKING:
    from rich.text import Text

TOPICS = ("machine", "gpu", "kernels", "collectives", "packages", "hub", "tools")
_WIDEST = 110
_SIGNS = {PROBLEM: ("✗", "X"), WARNING: ("!", "!"), NOTE: ("·", "-"), OK: ("✓", "+")}
_STYLES = {PROBLEM: "bold red", WARNING: "bold yellow", NOTE: "cyan", OK: "green"}


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many findings there are of each status, the worst first."""
    return {status: sum(finding.status == status for finding in findings) for status in STATUSES}


def headline(findings: Sequence[Finding]) -> str:
    """Return the first line: how it stands. What only stands in a topic's line is not counted as a note."""
    number = counts([finding for finding in findings if not is_folded(finding)])
    told = [f"{number[status]} {status}{'s' if number[status] != 1 else ''}" for status in (PROBLEM, WARNING, NOTE)]
    verdict = "not ready to train" if number[PROBLEM] else "ready to train"
    return f"automodel doctor: {verdict} ({', '.join(told)})"


def is_folded(finding: Finding) -> bool:
    """Tell whether a finding goes into its topic's line: fine, or not tried because there is nothing to try."""
    return finding.status == OK or (finding.status == NOTE and not finding.why)


def render(findings: Sequence[Finding], *, has_colour: bool, encoding: str, width: int | None = None) -> str:
    """Return the page; with ``has_colour`` it holds escape codes, without it none. Commands are never wrapped."""
    from rich.console import Console
    from rich.text import Text

    width = min(width or shutil.get_terminal_size().columns, _WIDEST)
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        highlight=False,
        color_system="standard" if has_colour else None,
        force_terminal=has_colour,
        no_color=not has_colour,
    )
    has_signs = "utf" in encoding.lower()

    def sign(status: str) -> str:
        return _SIGNS[status][0 if has_signs else 1]

    def show(text: Text) -> None:
        console.print(text, soft_wrap=True)

    show(Text(headline(findings), style="bold"))
    for status in (PROBLEM, WARNING, NOTE):
        told = [finding for finding in findings if finding.status == status and not is_folded(finding)]
        for number, finding in enumerate(told):
            if number == 0 or status != NOTE:
                show(Text())
            for line in _finding_lines(finding, sign(status), width):
                show(line)
    show(Text())
    for topic in TOPICS:
        folded = [finding for finding in findings if finding.topic == topic and is_folded(finding)]
        if folded:
            words = _wrap(f"{topic:<12}{_one_line(folded)}", width - 2, indent=12)
            show(Text.assemble((f"{sign(OK)} ", _STYLES[OK]), textwrap.indent(words, "  ")[2:]))
    # what this output cannot write becomes a visible replacement
    return out.getvalue().encode(encoding, errors="replace").decode(encoding)


def _finding_lines(finding: Finding, sign: str, width: int) -> Iterator[Text]:
    from rich.text import Text

    what = textwrap.indent(_wrap(finding.what, width - 2), "  ")[2:]
    yield Text.assemble((f"{sign} ", _STYLES[finding.status]), (what, "bold"))
    if finding.why:
        yield Text(textwrap.indent(_wrap(finding.why, width - 2), "  "))
    for command in finding.fix:
        yield Text.assemble(("  $ ", "dim"), (command, "cyan"))


def _wrap(text: str, width: int, indent: int = 0) -> str:
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _one_line(findings: Sequence[Finding]) -> str:
    """Return what is fine, then what could not be tried, once a reason."""
    fine = [finding.what for finding in findings if finding.status == OK]
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding.status == NOTE:
            title, _, reason = finding.what.partition(": not tried, ")
            reasons.setdefault(reason, []).append(title)
    told = [f"not tried ({reason}): {', '.join(titles)}" if reason else titles[0] for reason, titles in reasons.items()]
    return "; ".join([*fine, *told])

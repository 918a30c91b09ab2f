"""Show the rows of a recipe as the model gets them: every token, and which are learned.

No weights are loaded; the tokenizer and the data are enough. Rows come in the order in which the run will train on
them, packed if it packs. At the end stands what the label gate says to them; where it refuses, the exit status is 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_automodel.shared.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.components.datasets.token_view import ShownRow
    from nemo_automodel.recipes.open_data import OpenData

DEFAULT_ROWS = 4
_LONGEST_SVG_LINE = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options beside the config file and its overrides."""
    parser.usage = "automodel inspect <config.yaml> [--section.key value ...] [--rows N] [--html FILE] [--svg FILE]"
    parser.add_argument(
        "--rows", type=int, default=DEFAULT_ROWS, metavar="N", help="how many rows of the first steps (%(default)s)"
    )
    parser.add_argument("--html", metavar="FILE", help="write the rows as one self-contained page")
    parser.add_argument("--svg", metavar="FILE", help="write what the terminal shows as a picture")


def run(args: argparse.Namespace) -> int:
    """Show the rows, then raise what the label gate refuses."""
    from nemo_automodel.components.config._arg_parser import load_config, parse_command_line

    if args.rows < 1:
        raise UserError(f"`--rows {args.rows}` must be 1 or more.")
    config = load_config(parse_command_line(args.words, takes_positional=True))
    opened = _open(config)
    rows = _shown_rows(opened, args.rows)
    problem, notes = _verdict(opened), _notes(opened)
    has_colour = wants_colour()
    _print(_lines(rows, notes, has_colour, _width(has_colour)), has_colour)
    if args.html:
        _write(Path(args.html), _page(config, notes, problem, rows), "--html")
    if args.svg:
        _write(Path(args.svg), _picture(_lines(rows, notes, True, _LONGEST_SVG_LINE)), "--svg")
    if problem is not None:
        raise problem
    return 0


def wants_colour() -> bool:
    """Tell whether standard output gets colour: NO_COLOR forbids it, FORCE_COLOR asks for it, else a terminal does."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def _open(config: ConfigNode) -> OpenData:
    from nemo_automodel.components.loggers.log_utils import setup_logging
    from nemo_automodel.recipes.open_data import open_training_data

    setup_logging()
    return open_training_data(config)


def _shown_rows(opened: OpenData, num_rows: int) -> list[ShownRow]:
    from nemo_automodel.components.datasets.token_view import show_row

    documents = opened.first_rows(num_rows)
    return [show_row(number, row, opened.tokenizer) for number, row in enumerate(documents, start=1)]


def _verdict(opened: OpenData) -> UserError | None:
    try:
        opened.check()
    except UserError as error:
        return error
    return None


def _notes(opened: OpenData) -> list[str]:
    found = [] if opened.packing_report is None else [opened.packing_report]
    return found if opened.statistics is None else [*found, str(opened.statistics)]


def _lines(rows: list[ShownRow], notes: list[str], has_colour: bool, width: int) -> list[Text]:
    from rich.text import Text

    from nemo_automodel.components.datasets.token_view import legend, row_lines

    lines = [legend(has_colour)]
    for row in rows:
        lines += [Text(""), *row_lines(row, width, has_colour)]
    return [*lines, Text(""), *map(Text, notes)]


def _width(has_colour: bool) -> int:
    from rich.console import Console

    return Console().width if has_colour else max(Console().width, _LONGEST_SVG_LINE)


def _print(lines: list[Text], has_colour: bool) -> None:
    from rich.console import Console

    # without a word about colours in TERM, rich would leave them out even where they are asked for
    console = Console(color_system="256", force_terminal=True) if has_colour else Console(no_color=True)
    for line in lines:
        console.print(line, soft_wrap=True)


def _page(config: ConfigNode, notes: list[str], problem: UserError | None, rows: list[ShownRow]) -> str:
    from nemo_automodel.components.datasets.token_page import render_page

    name = config.get("dataset._target_") or "the data"
    title = f"What the model is taught: {str(name).rpartition('.')[2]}"
    return render_page(title, notes, None if problem is None else str(problem), rows)


def _picture(lines: list[Text]) -> str:
    """Return the lines as an SVG that fetches nothing: rich's own layout with a font that every system has."""
    import io

    from rich.console import Console

    width = max(*(line.cell_len for line in lines), 40)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(line, soft_wrap=True)
    return console.export_svg(title="automodel inspect", code_format=_SVG, unique_id="rows")


_SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def _write(path: Path, text: str, option: str) -> None:
    try:
        # a text may hold half a character, which UTF-8 cannot write: it becomes a visible replacement
        path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    except OSError as error:
        raise UserError(f"`{path}` cannot be written: {error.strerror}. Name another file with {option}.") from error
    print(path)

"""Draw the pictures of `docs/data.md` with the code they explain.

    python docs/images/draw.py

Masks come from `kernels.attention`, packs from `components.datasets.packing`: a picture shows what runs. Text and lines
take the reader's light or dark colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from nemo_automodel.components.datasets.branches import branch_places
from nemo_automodel.components.datasets.packing import best_fit
from nemo_automodel.kernels.attention import PackedLayout, document_numbers, packed_mask

COLOURS = ["#3b82c4", "#d9822b", "#3f9c5a", "#b25fb3", "#c9504f", "#2f9e9e", "#9a7d2e", "#6d6fd0"]
PADDING = "#9aa0a6"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.faint{fill:#57606a}.line{stroke:#8b949e;fill:none}"
    ".empty{fill:#8b949e;fill-opacity:.14}.inside{fill:#fff;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.faint{fill:#9da7b1}.inside{fill:#fff}}"
)


def svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    """Return a picture that a screen reader calls ``label``."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{label}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    """Return a line of text; ``css`` names one of the styles above."""
    return f'<text x="{x:g}" y="{y:g}" class="{css}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """Return a rectangle of a colour, or an ``empty`` one."""
    paint = 'class="empty"' if fill == "empty" else f'fill="{fill}"'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="1.5" {paint}/>'


def grid(x: float, y: float, mask: torch.Tensor, colours: Sequence[str], labels: Sequence[str], cell: int = 16) -> list:
    """Draw a mask ``[S, S]``: a row for each query, coloured by its document where it may see the key."""
    side = len(labels) * cell - 1.5
    parts = [box(x, y, side, side, "empty")]
    for query, row in enumerate(mask.tolist()):
        seen = [key for key, sees in enumerate(row) if sees]
        parts += [box(x + key * cell, y + query * cell, cell - 1.5, cell - 1.5, colours[query]) for key in seen]
        parts.append(text(x - 5, y + query * cell + 12, labels[query], "faint", "end"))
        parts.append(text(x + query * cell + 7, y - 5, labels[query], "faint", "middle"))
    return parts


def masks() -> str:
    """Three documents and padding in a row of 14: whole documents, and a window of 3."""
    lengths, size = [5, 3, 4], 14
    runs = [*lengths[:-1], lengths[-1] + size - sum(lengths)]  # the last document's positions run on into the padding
    layout = PackedLayout(
        document_numbers(torch.tensor([lengths]), size),
        torch.tensor([[position for length in runs for position in range(length)]]),
    )
    documents = layout.documents_BS[0].tolist()
    colours = [PADDING if number == len(lengths) else COLOURS[number] for number in documents]
    positions = [str(position) for position in layout.positions_BS[0].tolist()]
    parts = [text(34, 18, "full attention"), text(312, 18, "sliding window of 3")]
    parts += grid(34, 46, packed_mask(layout)[0, 0], colours, positions)
    parts += grid(312, 46, packed_mask(layout, window=3)[0, 0], colours, positions)
    parts.append(text(34, 290, "rows: queries, columns: keys; numbers: positions; grey: padding", "faint"))
    return svg(550, 300, "Attention masks of a packed row", parts)


def packing() -> str:
    """The same documents, one to a row and packed."""
    lengths, size, scale = [130, 60, 210, 95, 160, 45, 120, 180], 256, 1.02
    packs = list(best_fit(enumerate(lengths), size, 8))
    parts = [text(20, 18, f"unpacked: {_share(len(lengths), lengths, max(lengths))}")]
    y = 28
    for number, length in enumerate(lengths):
        parts.append(box(20, y, length * scale, 14, COLOURS[number]))
        parts.append(box(20 + length * scale, y, (max(lengths) - length) * scale, 14, "empty"))
        parts.append(text(26, y + 11, str(length), "inside"))
        y += 18
    parts.append(text(300, 18, f"packed into {size}: {_share(len(packs), lengths, size)}"))
    y = 28
    for pack in packs:
        x = 300.0
        for number in pack:
            parts.append(box(x, y, lengths[number] * scale - 1, 14, COLOURS[number]))
            parts.append(text(x + 6, y + 11, str(lengths[number]), "inside"))
            x += lengths[number] * scale
        parts.append(box(x, y, 300 + size * scale - x, 14, "empty"))
        y += 18
    return svg(580, 180, "Documents one to a row, and packed", parts)


def _share(num_rows: int, lengths: Sequence[int], size: int) -> str:
    return f"{num_rows} rows, {1 - sum(lengths) / (num_rows * size):.0%} padding"


def prefix_sharing() -> str:
    """A paragraph of 5 tokens and three questions, and their mask."""
    branches = np.array([5, 3, 2, 3], dtype=np.int32)
    positions, numbers = branch_places(branches)
    names = ["prefix", "branch 1", "branch 2", "branch 3"]
    layout = PackedLayout(
        torch.zeros(1, len(numbers), dtype=torch.long), torch.tensor(positions)[None], torch.tensor(numbers)[None]
    )
    colours = [COLOURS[number] for number in numbers]
    parts = [text(20, 18, "three rows that begin alike: 23 tokens")]
    for row, length in enumerate(branches[1:].tolist()):
        y = 30 + 24 * row
        parts += [box(20 + 16 * place, y, 14.5, 18, COLOURS[0]) for place in range(5)]
        parts += [box(20 + 16 * (5 + place), y, 14.5, 18, COLOURS[row + 1]) for place in range(length)]
    parts.append(text(20, 128, f"stored once: {len(numbers)} tokens"))
    for place, (position, colour) in enumerate(zip(positions.tolist(), colours, strict=True)):
        parts.append(box(20 + 16 * place, 140, 14.5, 18, colour))
        parts.append(text(27 + 16 * place, 153, str(position), "inside", "middle"))
    parts.append(text(20, 176, "numbers: positions go on after the prefix", "faint"))
    for number, name in enumerate(names):
        parts += [box(20 + 76 * number, 192, 10, 10, COLOURS[number]), text(34 + 76 * number, 202, name, "faint")]
    parts.append(text(350, 18, "who sees whom"))
    parts += grid(350, 46, packed_mask(layout)[0, 0], colours, [str(position) for position in positions.tolist()])
    return svg(580, 270, "A shared prefix with three branches, and its attention mask", parts)


PICTURES = {"masks.svg": masks, "packing.svg": packing, "prefix_sharing.svg": prefix_sharing}


def main() -> None:
    """Write all pictures beside this file."""
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

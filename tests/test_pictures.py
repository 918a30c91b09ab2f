"""The pictures of the documentation are what the code draws, and are well-formed."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
DRAW = runpy.run_path(str(IMAGES / "draw.py"))


@pytest.mark.parametrize("name", DRAW["PICTURES"])
def test_pictures_are_drawn_by_the_code(name):
    committed = (IMAGES / name).read_text(encoding="utf-8")
    assert committed == DRAW["PICTURES"][name](), "run: python docs/images/draw.py"
    assert ElementTree.fromstring(committed).get("role") == "img"


def test_every_picture_is_shown():
    shown = (IMAGES.parent / "data.md").read_text(encoding="utf-8")
    assert all(f"(images/{name})" in shown for name in DRAW["PICTURES"])

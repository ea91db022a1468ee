"""Text in figures: what the figures' font lacks is drawn by another one that is installed, or shown by its number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from lalm_patch.figures import printable, rendered, styled
from lalm_patch.figures.style import FALLBACKS, canvas

TEXT = "性别"


def black_square() -> object:
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((900, 0), (900, 800), (100, 800)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[str]:
    """A font that has the characters, under the name of a common one."""
    name = FALLBACKS[0]
    glyphs = [".notdef", *(f"uni{ord(character):04X}" for character in TEXT)]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(character): f"uni{ord(character):04X}" for character in TEXT})
    builder.setupGlyf(dict.fromkeys(glyphs, black_square()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": name, "styleName": "Regular", "psName": "Test-Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    path = tmp_path / "font.ttf"
    builder.save(path)
    before = list(fontManager.ttflist)
    fontManager.ttflist[:] = [entry for entry in before if entry.name not in FALLBACKS]
    fontManager.addfont(path)
    yield name
    fontManager.ttflist[:] = before


def drawn(text: str, kind: str = "png") -> bytes:
    with styled():
        figure, axes = canvas(2, 1)
        axes.set_title(text)
        return rendered(figure, kind)


def test_an_installed_font_draws_what_ours_lacks(installed: str) -> None:
    assert printable(f"the {TEXT}$") == f"the␣{TEXT}$"
    assert drawn(TEXT) != drawn("□□")
    assert len(drawn(TEXT, "pdf")) > 1000  # fonts are embedded; a missing glyph would be a warning, and so an error


def test_what_no_font_has_is_shown_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fontManager, "ttflist", [e for e in fontManager.ttflist if e.name not in FALLBACKS])
    assert printable(TEXT) == "\\u6027\\u522b"


def test_text_that_the_figures_font_has_looks_the_same_everywhere(installed: str) -> None:
    with_fallback = drawn("emotion, layer 3")
    fontManager.ttflist[:] = [entry for entry in fontManager.ttflist if entry.name not in FALLBACKS]
    np.testing.assert_array_equal(
        np.frombuffer(drawn("emotion, layer 3"), np.uint8), np.frombuffer(with_fallback, np.uint8)
    )

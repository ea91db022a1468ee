"""Pictures as tests of other things get them: drawn, but in a fraction of the time."""

from __future__ import annotations

from matplotlib.figure import Figure

from lalm_patch.figures import style

_whole = style.rendered


def coarse(figure: Figure, kind: str, dpi: int = 40) -> bytes:
    """In place of `style.rendered`: no PDFs, whose fonts take a quarter of a small run, and coarse PNGs."""
    return b"-" if kind == "pdf" else _whole(figure, kind, dpi)

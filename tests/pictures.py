"""Pictures as tests of other things get them: drawn, but in a fraction of the time."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


def coarse(figure: Figure, kind: str, dpi: int = 40) -> bytes:
    """In place of `style.rendered`: no PDFs, whose fonts take a quarter of a small run, and coarse PNGs.

    These are drawn once, and not a second time to learn what lies around the axes.
    """
    if kind == "pdf":
        return b"-"
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi)
    return buffer.getvalue()

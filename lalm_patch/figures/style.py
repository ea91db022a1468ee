"""What all figures share: the style, colours, text that can be drawn, and how they are written."""

from __future__ import annotations

import csv
import functools
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from lalm_patch.analysis.paper import ALL_MODELS
from lalm_patch.storage.journal import replace_file, storage_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

DPI = 200
LONGEST_LABEL = 18

ROLE_COLOURS = {
    "transcript": "#8c6d31",
    "early": "#4c72b0",
    "object": "#dd8452",
    "late": "#55a868",
    "template": "#8c8c8c",
    "last": "#8172b3",
}
ATTRIBUTES = ("animal", "emotion", "gender", "language")
"""Order of the panels; other attributes follow by name."""

# The models of the paper look the same in every figure: Wong's colour-blind safe colours, and marks for print.
_COLOURS = ("0173b2", "de8f05", "029e73", "d55e00", "cc78bc", "ca9161", "fbafe4", "949494", "ece133", "56b4e9")
PALETTE = tuple(to_rgb(f"#{colour}") for colour in _COLOURS)
"""Seaborn's "colorblind"; importing seaborn takes longer than drawing most figures, so only `diverging` does it."""

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")

FONT = "DejaVu Sans"
"""Comes with matplotlib: the same picture on every machine, for all text that it has."""

FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans CJK TC",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "NanumGothic",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "SimHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Arial Unicode MS",
)
"""Fonts with Chinese, Japanese or Korean text, common on Linux, macOS and Windows; those installed are used where the
first one lacks a character."""

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.linewidth": 0.8,
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # a token or a model's name may hold "$"
}


def styled() -> AbstractContextManager[None]:
    """Context in which figures are drawn: the style on matplotlib's defaults, so that a user's matplotlibrc does not
    change the picture. Without what names the backend: a context would not put that back."""
    own = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    return matplotlib.rc_context(own | _STYLE | {"font.family": list(_fonts())})


def looks(models: Iterable[str]) -> dict[str, tuple[Any, str]]:
    """Colour and mark of each model; those of the paper always have the same."""
    order = [*ALL_MODELS, *sorted(set(models) - set(ALL_MODELS))]
    return {name: (PALETTE[k % len(PALETTE)], _MARKS[k % len(_MARKS)]) for k, name in enumerate(order)}


def diverging() -> Colormap:
    """Colours of rates, blue below zero and red above; grey where there is none."""
    import seaborn

    colours: Colormap = seaborn.color_palette("vlag", as_cmap=True)
    return colours.with_extremes(bad="0.8")


def in_order(attributes: Iterable[str]) -> list[str]:
    """Attributes in the order of the paper, others after them by name, each once."""
    names = set(attributes)
    return [name for name in ATTRIBUTES if name in names] + sorted(names - set(ATTRIBUTES))


def printable(text: str) -> str:
    r"""`text` with everything made visible that would not be: blanks as `␣`, newlines as `\n`, and characters that none
    of the figures' fonts has by their number (`\ud55c`)."""
    glyphs = _glyphs()
    return "".join(_visible(character, glyphs) for character in text)


def _visible(character: str, glyphs: Set[int]) -> str:
    if character in "\n\r\t\\":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}[character]
    if character == " ":
        return "␣"
    # Categories C: control, format, surrogate, private, unassigned; Z: blanks; M: marks that need a base letter.
    if unicodedata.category(character)[0] in "CZM" or ord(character) not in glyphs:
        number = ord(character)
        return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:x}"
    return character


def _fonts() -> tuple[str, ...]:
    """The figures' font, and the installed ones that are asked for characters it lacks."""
    installed = {entry.name for entry in fontManager.ttflist}
    return (FONT, *(name for name in FALLBACKS if name in installed))


def _glyphs() -> Set[int]:
    return _glyphs_of(_fonts())


@functools.cache
def _glyphs_of(fonts: tuple[str, ...]) -> Set[int]:
    """Characters that some of these fonts have."""
    files = (findfont(FontProperties(family=name), fallback_to_default=False) for name in fonts)
    return frozenset().union(*(get_font(file).get_charmap() for file in files))


def words(text: str) -> str:
    """Text of a title: as `printable`, blanks left alone."""
    return " ".join(printable(word) for word in text.split(" "))


def label(text: str) -> str:
    """Text of a tick: as `printable`, cut where it is too long."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: LONGEST_LABEL - 1]}…"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes measure exactly this many inches; what lies around them is added when it is rendered."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def panels(count: int, width: float, height: float, gap: float = 0.75) -> tuple[Figure, list[Axes]]:
    """A figure with this many axes of `width` x `height` inches, at most two beside each other, and `gap` between."""
    columns = min(count, 2)
    lines = -(-count // columns)
    whole = columns * width + (columns - 1) * gap, lines * height + (lines - 1) * gap
    figure = Figure(figsize=whole, dpi=DPI)
    FigureCanvasAgg(figure)
    places = [divmod(index, columns) for index in range(count)]
    return figure, [
        figure.add_axes(
            (
                column * (width + gap) / whole[0],
                1 - (row * (height + gap) + height) / whole[1],
                width / whole[0],
                height / whole[1],
            )
        )
        for row, column in places
    ]


def rendered(figure: Figure, kind: str, dpi: int = DPI) -> bytes:
    """The picture as bytes, the same for the same data: without the date and the writing program."""
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}}[kind]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def save(figure: Figure, folder: Path, name: str, table: str) -> list[Path]:
    """Write NAME.png, NAME.pdf and NAME.csv, the numbers drawn.

    Raises:
        StoreError: a file cannot be written.
    """
    files = {
        folder / f"{name}.png": rendered(figure, "png"),
        folder / f"{name}.pdf": rendered(figure, "pdf"),
        folder / f"{name}.csv": table.encode("utf-8", "backslashreplace"),
    }
    for path, content in files.items():
        try:
            replace_file(path, content)
        except OSError as error:
            raise storage_error(error, path, "writing the figure") from error
    return list(files)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, columns by their first mention; missing numbers are empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()})
    return buffer.getvalue()

"""What values a setting takes: kinds of values, each of which can read one, refuse one, and say in words what it takes.

They stand beside the settings, in their annotations, and are all that is known about values: the check before a run,
the words in its messages, and the table in the documentation come from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

MOST = 2**31 - 1
"""Largest number of things that can be asked for: what every library below takes."""

LARGEST_SEED = 2**63 - 1

_ON, _OFF = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


class Refused(ValueError):
    """A value that a setting does not take; its text, which may be empty, says why in addition to what is expected."""


class Range(Protocol):
    """Values that a setting takes; `str(range)` completes "expected ..."."""

    def read(self, value: Any) -> Any:
        """The value as the setting has it, from one as YAML or a command line give it. Raises Refused."""


@dataclass(frozen=True)
class Whole:
    """Whole numbers between two bounds; from text, too, as the environment gives it."""

    least: int = -MOST
    most: int = MOST

    def __str__(self) -> str:
        if self.least == -MOST:
            return "a whole number"
        bound = "" if self.most == MOST else f" to {self.most}"
        return f"a whole number from {self.least}{bound}"

    def read(self, value: Any) -> int:
        """See `Range`."""
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < self.least:
            raise Refused
        if value > self.most:
            raise Refused(f"it is above {self.most}")
        return value


@dataclass(frozen=True)
class Number:
    """Finite numbers above one bound and up to another."""

    above: float = -math.inf
    most: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.above):
            return "a finite number"
        return f"a finite number above {self.above:g}" + ("" if math.isinf(self.most) else f", at most {self.most:g}")

    def read(self, value: Any) -> float:
        """See `Range`."""
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise Refused
        try:
            number = float(value)
        except (ValueError, OverflowError):  # no number at all, or an integer beyond every float
            raise Refused from None
        if not (math.isfinite(number) and self.above < number <= self.most):
            raise Refused
        return number


@dataclass(frozen=True)
class Switch:
    """True and false, also as the words YAML has for them."""

    def __str__(self) -> str:
        return "true or false"

    def read(self, value: Any) -> bool:
        """See `Range`."""
        word = str(value).lower()
        if not isinstance(value, bool | int | str) or word not in _ON + _OFF:
            raise Refused
        return word in _ON


@dataclass(frozen=True)
class Text:
    """Text on one line, not empty. What YAML took for something else than text is no text."""

    def __str__(self) -> str:
        return "text"

    def read(self, value: Any) -> str:
        """See `Range`."""
        if not isinstance(value, str):
            raise Refused
        if not value.strip():
            raise Refused("it is empty")
        if value != value.strip():
            raise Refused("it has spaces around it, and those change the tokens beside them")
        if not value.isprintable():
            raise Refused("it has line breaks or control characters")
        return value


@dataclass(frozen=True)
class Name(Text):
    """Text that can be (part of) a folder's name."""

    most: int = 60

    def __str__(self) -> str:
        return "a name that can be part of a folder's"

    def read(self, value: Any) -> str:
        """See `Range`."""
        name = super().read(value)
        if "/" in name or name in (".", ".."):
            raise Refused("it has a slash" if "/" in name else "it means another folder")
        if len(name.encode("utf-8", "surrogatepass")) > self.most:
            raise Refused(f"it has more than {self.most} bytes")
        return name


@dataclass(frozen=True)
class Place(Text):
    """A path, or what may be one: `~` is the home folder wherever it is written, and a `$NAME` is no path."""

    what: str = "a path"

    def __str__(self) -> str:
        return self.what

    def read(self, value: Any) -> str:
        """See `Range`."""
        path = super().read(value)
        if variable := re.search(r"\$\w+", path):
            name = variable[0].removeprefix("$")
            raise Refused(f"{variable[0]} would be a folder of that name; write ${{oc.env:{name}}}, or the path itself")
        if not path.startswith("~"):
            return path
        try:
            return str(Path(path).expanduser())
        except RuntimeError:
            raise Refused(f"there is no home folder for {path.partition('/')[0]}") from None


@dataclass(frozen=True)
class Pattern(Text):
    """Text of a certain form."""

    form: str = ""
    what: str = ""

    def __str__(self) -> str:
        return self.what

    def read(self, value: Any) -> str:
        """See `Range`."""
        text = super().read(value)
        if re.fullmatch(self.form, text) is None:
            raise Refused
        return text


@dataclass(frozen=True)
class Address(Text):
    """A server's URL."""

    def __str__(self) -> str:
        return "a URL like https://api.ndif.us, without user name and password"

    def read(self, value: Any) -> str:
        """See `Range`."""
        text = super().read(value)
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise Refused(str(error)) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password or port == 0:
            raise Refused
        return text


@dataclass(frozen=True)
class Word(Text):
    """One of a few words."""

    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"

    def read(self, value: Any) -> str:
        """See `Range`."""
        if not isinstance(value, str) or value not in self.words:
            raise Refused
        return value


def one_of(*words: str) -> Word:
    """One of a few words."""
    return Word(words)


@dataclass(frozen=True)
class Listed:
    """Lists of values, no value twice."""

    item: Range
    least: int = 1

    def __str__(self) -> str:
        plural = re.sub(r"^an? ", "", str(self.item))
        plural = re.sub(r"^(whole number|text|\w+)", r"\1s", plural)
        number = "" if self.least == 1 else f", at least {self.least}"
        return f"a list of {plural}{number}"

    def read(self, value: Any) -> list[Any]:
        """See `Range`."""
        if not isinstance(value, list | tuple):
            raise Refused
        items = [self.item.read(item) for item in value]
        if len(items) < self.least:
            raise Refused("it is empty" if not items else f"it has {len(items)}")
        if twice := [str(item) for index, item in enumerate(items) if item in items[:index]]:
            raise Refused(f"it has {twice[0]} twice")
        return items


@dataclass(frozen=True)
class Allowed:
    """What one setting takes: values of a range and, where it is optional, null."""

    range: Range
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.range}, or null" if self.optional else str(self.range)

    def read(self, value: Any) -> Any:
        """See `Range`."""
        return None if value is None and self.optional else self.range.read(value)

    @property
    def is_text(self) -> bool:
        """Whether it takes text, or lists of text."""
        return isinstance(self.range.item if isinstance(self.range, Listed) else self.range, Text)

    @property
    def words(self) -> tuple[str | None, ...]:
        """The words it takes, if there are only a few; else none."""
        found = self.range.words if isinstance(self.range, Word) else ()
        return (None, *found) if found and self.optional else found


_BY_TYPE: dict[Any, Range] = {int: Whole(), float: Number(), bool: Switch(), str: Text()}


def allowed(settings: type) -> dict[str, Allowed]:
    """What every setting takes, by its path (`data.limit`), in the order of the dataclasses."""
    hints = get_type_hints(settings, include_extras=True)
    table: dict[str, Allowed] = {}
    for field in fields(settings):
        hint = hints[field.name]
        if is_dataclass(hint) and isinstance(hint, type):
            table |= {f"{field.name}.{key}": entry for key, entry in allowed(hint).items()}
        else:
            table[field.name] = _allowed(hint)
    return table


def _allowed(hint: Any) -> Allowed:
    said = next((extra for extra in getattr(hint, "__metadata__", ()) if hasattr(extra, "read")), None)
    plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    options = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
    own = [option for option in options if option is not NoneType]
    return Allowed(said or _of_type(own[0]), optional=NoneType in options)


def _of_type(hint: Any) -> Range:
    if get_origin(hint) is list:
        return Listed(_of_type(get_args(hint)[0]))
    return _BY_TYPE[hint]


_CREDENTIALS = re.compile(r"://[^/@\s]*@")
"""User name and password in an address."""


def shown(value: Any, length: int = 80) -> str:
    """A value for a message: on one line, as one would write it in YAML, cut to a length."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(shown(item) for item in value)}]"
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in value.items())}}}"
    else:
        text = _CREDENTIALS.sub("://...@", str(value))  # messages end up in logs
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"

"""Words of the messages about settings: the nearest name, and how an override is written for the shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lalm_patch.settings import ALLOWED
from lalm_patch.settings.ranges import Allowed, Listed, Place, Refused, shown

GROUPS = tuple(dict.fromkeys(path.partition(".")[0] for path in ALLOWED if "." in path))
"""Settings that are groups of settings."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like one; of dotted names the last part counts alone, too."""
    return max(known, key=lambda other: _likeness(name, other))


def _likeness(name: str, other: str) -> float:
    def alike(left: str, right: str) -> float:
        return SequenceMatcher(None, left.lower(), right.lower()).ratio()

    own = alike(name.rpartition(".")[2], other.rpartition(".")[2])
    return 2 * alike(name, other) + own


def no_such_setting(path: str) -> str:
    """The message for a key that is no setting."""
    return f"{path}: there is no such setting; the nearest is {nearest(path, [*ALLOWED, *GROUPS, 'experiment'])}"


def in_quotes(path: str, value: Any) -> str:
    """The advice for a value that YAML or Hydra did not take for text."""
    is_list = isinstance(value, list | tuple) and isinstance(ALLOWED[path].range, Listed)
    items = [shown(item) for item in value] if is_list else [shown(value)]
    yaml = ", ".join(f'"{item}"' for item in items)
    given = list(value) if is_list else [value]
    key = path.rpartition(".")[2]
    if any(isinstance(item, bool) for item in given):
        example = '["yes", "no"]' if is_list else '"yes"'
        return f"YAML reads yes, no, on and off as true and false; put text into quotes, as in {key}: {example}"
    if any(isinstance(item, float) for item in given):
        return "put text into quotes"  # what was written is not known any more: 1e10 is 10000000000.0 by now
    line = f"[{yaml}]" if is_list else yaml
    shell = typed(path, items if is_list else items[0])
    return f"put text into quotes, {key}: {line} in a file, {shell} in a shell"


def quoted(text: str) -> str:
    """Text as a quoted value of Hydra's grammar."""
    mark = "'" if '"' in text and "'" not in text else '"'
    inner = re.sub(rf"(\\*){mark}", lambda found: found[1] * 2 + "\\" + mark, text)
    inner = re.sub(r"(\\+)$", lambda found: found[1] * 2, inner)
    return f"{mark}{inner}{mark}"


def override(path: str, value: str | Sequence[str]) -> str:
    """An override that sets a text, or a list of texts, whatever characters it has."""
    return f"{path}={quoted(value)}" if isinstance(value, str) else f"{path}=[{','.join(map(quoted, value))}]"


def typed(path: str, value: str | Sequence[str]) -> str:
    """The same as one types it in a shell."""
    return shlex.quote(override(path, value))


def readable(given: str) -> str | None:
    """How to write an override that cannot be read, or means several runs, so that its text is the value.

    What is returned was read back and means the text. None where there is no way to tell what was meant.
    """
    key, equals, text = given.partition("=")
    path = key.lstrip("+")
    if not equals or re.fullmatch(r"[\w./@:-]+", path) is None:
        return None
    if path in GROUPS or path == "experiment" or "/" in path:
        return None
    entry = ALLOWED.get(path)
    values: list[str | list[str]] = [text]
    if entry is not None and isinstance(entry.range, Listed):
        inner = re.fullmatch(r"\s*\[(.*)\]\s*", text, re.DOTALL)
        items = [item.strip().strip("'\"") for item in (inner[1] if inner else text).split(",")]
        values = [items]
        if not entry.is_text:
            bare = f"{path}=[{','.join(items)}]"
            return bare if _value(bare) is not None else None
    elif len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        values = [text[1:-1], text]
    for value in values:
        written = override(path, value)
        if _value(written) == value and _takes(entry, value):
            return written
    return None


def _takes(entry: Allowed | None, value: Any) -> bool:
    """Whether a setting takes a value, as far as is known here."""
    try:
        return entry is None or entry.read(value) is not None
    except Refused:
        return False


def at_home(given: str) -> str:
    """An override whose path begins with `~`, quoted: Hydra has no such character, and not every shell replaces it."""
    path, _, text = given.partition("=")
    entry = ALLOWED.get(path.lstrip("+"))
    if re.fullmatch(r"~[^,'\"\[\]{}()]*", text) is None:
        return given
    if path in ("hydra.run.dir", "hydra.sweep.dir"):  # nobody looks at these before Hydra makes the folder
        return override(path, os.path.expanduser(text))
    return override(path, text) if entry is not None and isinstance(entry.range, Place) else given


def _value(written: str) -> Any:
    """What an override means; None where it cannot be read."""
    try:
        value = OverridesParser.create().parse_override(written).value()
        return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]  # type: ignore[index, call-overload]
    except (HydraException, OmegaConfBaseException):
        return None

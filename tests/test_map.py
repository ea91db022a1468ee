"""The map in docs/architecture.md names what is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAP = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
NAMED_BY_THEIR_ROOM = {"models/native", "stimuli/containers"}


def room(path: Path) -> str:
    return path.parent.relative_to(ROOT / "lalm_patch").as_posix()


def test_every_module_is_named_in_its_room() -> None:
    sections: dict[str, str] = {}
    current = "."
    for line in MAP.splitlines():
        if found := re.match(r"  (\w+)/", line):
            current = found[1]
        elif re.match(r"  ?\S", line):
            current = "."
        sections[current] = sections.get(current, "") + line + "\n"
    missing = []
    for path in sorted((ROOT / "lalm_patch").rglob("*.py")):
        if path.name.startswith("__") or room(path) in NAMED_BY_THEIR_ROOM:
            continue
        if not re.search(rf"\b{re.escape(path.name)}\b", sections.get(room(path), "") if room(path) != "." else MAP):
            missing.append(path.relative_to(ROOT).as_posix())
    assert not missing


def test_what_is_named_is_there() -> None:
    there = {path.name for path in (ROOT / "lalm_patch").rglob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", MAP)) <= there

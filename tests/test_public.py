"""The public face: what users and extensions may rely on, by name and signature, and that the docs use nothing else.

After a change that is meant: `python tests/test_public.py > tests/public_names.txt`, and a line in CHANGELOG.md.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "lalm_patch",
    *sorted(f"lalm_patch.{path.parent.name}" for path in (ROOT / "lalm_patch").glob("*/__init__.py")),
)


def public_names() -> list[str]:
    """Every public name with its signature, one a line."""
    return [line for room in ROOMS for name in exported(room) for line in described(room, name)]


def exported(room: str) -> list[str]:
    return sorted(getattr(importlib.import_module(room), "__all__", []))


def described(room: str, name: str) -> Iterator[str]:
    thing = getattr(importlib.import_module(room), name)
    full = f"{room}.{name}"
    if not inspect.isclass(thing):
        yield full + (signature(thing) if inspect.isfunction(thing) else f": {type(thing).__name__}")
        return
    if issubclass(thing, enum.Enum):
        yield f"{full}: {', '.join(member.name for member in thing)}"
        return
    yield full + ("" if issubclass(thing, Exception) else signature(thing))
    fields = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    for member, value in sorted(vars(thing).items()):
        if member.startswith("_") or member in fields:
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function):
            yield f"    .{member}{signature(function)}"
        elif isinstance(value, property):
            yield f"    .{member}"


def signature(thing: Any) -> str:
    """Names and defaults of parameters: annotations are the type checker's."""
    found = inspect.signature(thing)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    # A default that is a whole object is named elsewhere.
    short = [parameter.replace(default=...) if len(repr(parameter.default)) > 40 else parameter for parameter in plain]
    text = str(found.replace(parameters=short, return_annotation=inspect.Signature.empty))
    return re.sub(r"<function (\w+)[^>]*>", r"\1", text)


def test_the_public_face_is_what_is_written_down() -> None:
    written = (ROOT / "tests" / "public_names.txt").read_text(encoding="utf-8").splitlines()
    found = public_names()
    assert len(found) > 150
    assert sorted(set(written) - set(found)) == [], "gone or changed: see the docstring of this file"
    assert found == written


def test_every_exported_name_is_documented() -> None:
    for room in ROOMS:
        module = importlib.import_module(room)
        assert set(exported(room)) <= set(dir(module)), room
        for name in exported(room):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), f"{room}.{name}"


def imports_of(page: Path) -> Iterator[tuple[str, str]]:
    """What the Python of a page imports from this package: (module, name)."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"`(from lalm_patch[^`]*)`", text)
    for block in [*re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), *inline]:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lalm_patch":
                yield from ((str(node.module), alias.name) for alias in node.names)
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "lalm_patch")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lalm_patch":
                yield "lalm_patch", node.attr


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_docs_use_nothing_else(page: Path) -> None:
    for module, name in imports_of(page):
        assert module in ROOMS, f"{page.name} imports {module}"
        assert not name or name in exported(module), f"{page.name} takes {name} from {module}"


def test_docs_are_looked_at() -> None:
    found = [pair for page in (ROOT / "docs").glob("*.md") for pair in imports_of(page)]
    assert ("lalm_patch.engine", "ReplayEngine") in found
    assert ("lalm_patch", "trace") in found


if __name__ == "__main__":
    print("\n".join(public_names()))

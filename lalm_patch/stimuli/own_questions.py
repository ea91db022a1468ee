"""Clips that each have a question of their own: from a table, of a benchmark, or one recording."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalm_patch.errors import ConfigError, DataError
from lalm_patch.stimuli.prompt import Prompt
from lalm_patch.stimuli.records import Record

COLUMNS = ("audio", "question", "options", "answer")
OPTIONAL = ("response", "id", "group", "transcript")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LISTED = re.compile(r"\(([A-Za-z])\)\s*")


@dataclass(frozen=True)
class Row:
    """One row of a table, as it was written; `where` names it in messages."""

    where: str
    audio: Any
    question: Any
    options: Any
    answer: Any
    id: Any = None
    response: Any = None
    group: Any = None
    transcript: Any = None
    tags: tuple[tuple[str, str], ...] = ()


def one_clip(audio: Path, question: str, options: Sequence[str], answer: str, response: str) -> list[Record]:
    """A single recording and what it is asked.

    Raises:
        ConfigError: texts that make no prompt, or an answer that is no option.
    """
    prompt = Prompt(question, tuple(options), response)
    if answer not in prompt.options:
        raise ConfigError(f"attr.answer={answer}: expected one of attr.options ({', '.join(prompt.options)})")
    return [Record(audio.name, answer, audio, str(audio), audio.name, prompt=prompt)]


def load_table(path: Path, response: str, root: Path | None = None) -> list[Record]:
    """Clips of a table, in its order.

    Args:
        path: `.jsonl` (one object a line) or `.csv` (UTF-8, with a header), with `audio`, `question`, `options`,
            `answer`, and perhaps `response`, `id`, `group`, `transcript`. In .csv, options are a JSON list, or
            separated by `|`. Other columns are kept with the clips.
        response: how answers begin where a row does not say.
        root: folder of the audio files; the table's own unless given.

    Raises:
        DataError: no such file, a damaged one, a row that lacks something; names the row.
    """
    rows = _jsonl(path) if path.suffix == ".jsonl" else _csv(path) if path.suffix == ".csv" else None
    if rows is None:
        raise DataError(f"data.path={path}: expected a file that ends with .jsonl or .csv, got {path.suffix or 'none'}")
    known = {*COLUMNS, *OPTIONAL}
    found = []
    for where, row in rows:
        if missing := [name for name in COLUMNS if row.get(name) in (None, "")]:
            raise DataError(f"{where}: expected {', '.join(COLUMNS)}, got no {', '.join(missing)}; complete the row")
        rest = {name: value for name, value in row.items() if name not in known and value not in (None, "")}
        tags = tuple(
            (str(name), value if isinstance(value, str) else json.dumps(value)) for name, value in rest.items()
        )
        named = {name: row[name] for name in known if row.get(name) not in (None, "")}
        found.append(Row(where, tags=tags, **named))
    return records_of(found, root or path.parent, response)


def records_of(rows: Iterable[Row], root: Path, response: str) -> list[Record]:
    """Rows as clips, every one proven to make a prompt.

    Args:
        rows: of a table.
        root: folder of the audio files.
        response: how answers begin where a row does not say.

    Raises:
        DataError: a row that makes no prompt, an answer that is no option, an id twice, no row at all.
    """
    records: list[Record] = []
    seen: dict[str, str] = {}
    for row in rows:
        try:
            options = tuple(one_line(option) for option in _options(row.options, row.where))
            transcript = None if row.transcript is None else str(row.transcript)
            prompt = Prompt(one_line(row.question), options, one_line(row.response or response), transcript)
        except ConfigError as error:
            raise DataError(f"{row.where}: {error}") from None
        label = _answer(one_line(row.answer), options, row.where)
        source = Path(str(row.audio)).expanduser()
        id = one_line(row.id) if row.id is not None else str(row.audio)
        if id in seen:
            raise DataError(
                f"{row.where}: expected every id once, {id} is already in {seen[id]}; a clip that is asked several "
                "questions needs a column id"
            )
        seen[id] = row.where
        source = source if source.is_absolute() else root / source
        group = one_line(row.group) if row.group is not None else str(row.audio)
        records.append(Record(id, label, source, str(source), group, prompt=prompt, tags=row.tags))
    if not records:
        raise DataError("data.path: expected at least one row, got an empty table; complete it")
    return records


def one_line(text: Any) -> str:
    """Text without spaces around it and without line breaks: what a prompt's pieces have to be."""
    return " ".join(str(text).split())


def _options(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except ValueError:
                raise DataError(f"{where}: expected options as a JSON list or separated by |, got {text!r}") from None
        else:
            value = text.split("|")
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise DataError(f"{where}: expected options as a list of texts, got {value!r}; put each into quotes")
    return value


def _answer(answer: str, options: Sequence[str], where: str) -> str:
    """The option that an answer names: its text, or failing that its letter, `b` or `(b)`."""
    same = [option for option in options if option.casefold() == answer.casefold()]
    if same:
        return same[0]
    letter = _LETTER.fullmatch(answer)
    index = ord(letter[1].lower()) - ord("a") if letter else len(options)
    if index < len(options):
        return options[index]
    # "(b) dog", where the options are listed without their letters, or the other way round
    bare = _LISTED.sub("", answer, count=1)
    same = [option for option in options if _LISTED.sub("", option, count=1).casefold() == bare.casefold()]
    if len(same) == 1:
        return same[0]
    raise DataError(f"{where}: expected an answer among {', '.join(options)}, got {answer!r}; correct the row")


def _jsonl(path: Path) -> Sequence[tuple[str, Mapping[str, Any]]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: expected one JSON object a line, got '{error}'; correct the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object with {', '.join(COLUMNS)}, got {line.strip()[:60]!r}")
        rows.append((where, row))
    return rows


def _csv(path: Path) -> Sequence[tuple[str, Mapping[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if missing := [name for name in COLUMNS if name not in names]:
            raise DataError(
                f"{path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(names) or 'none'}: "
                f"{', '.join(missing)} missing; name them in the first line"
            )
        rows = []
        for number, row in enumerate(reader, start=1):
            if None in row:
                raise DataError(
                    f"{path}, row {number}: expected {len(names)} fields as in the header, got more; put fields that "
                    "contain a comma in double quotes"
                )
            rows.append((f"{path}, row {number}", row))
        return rows
    except csv.Error as error:
        raise DataError(f"{path}: expected a comma-separated table, got '{error}'; the file is damaged") from error


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises DataError for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got other bytes ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'; correct the path") from error

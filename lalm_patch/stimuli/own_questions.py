"""Clips that each have a question of their own: from a table, of a benchmark, or one recording."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
import unicodedata
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
_LISTED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)](?=\s))\s*(?=\S)")

log = logging.getLogger(__name__)


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


def load_table(path: Path, response: str, root: Path | None = None, *, leave_out: bool = False) -> list[Record]:
    """Clips of a table, in its order.

    Args:
        path: `.jsonl` (one object a line) or `.csv` (UTF-8, with a header), with `audio`, `question`, `options`,
            `answer`, and perhaps `response`, `id`, `group`, `transcript`. In .csv, options are a JSON list, or
            separated by `|`. Other columns are kept with the clips.
        response: how answers begin where a row does not say.
        root: folder of the audio files; the table's own unless given.
        leave_out: as of `records_of`.

    Raises:
        DataError: no such file, a damaged one, rows that lack something; names every row.
    """
    kind = path.suffix.lower()
    rows = _jsonl(path) if kind == ".jsonl" else _csv(path) if kind == ".csv" else None
    if rows is None:
        raise DataError(f"data.path={path}: expected a file that ends with .jsonl or .csv, got {path.suffix or 'none'}")
    made = [row if isinstance(row, DataError) else _table_row(*row) for row in rows]
    return records_of(made, root or path.parent, response, leave_out=leave_out)


def _table_row(where: str, row: Mapping[str, Any]) -> Row | DataError:
    known = {*COLUMNS, *OPTIONAL}
    given = {name: value for name, value in row.items() if not _is_blank(value)}
    if missing := [name for name in COLUMNS if name not in given]:
        return DataError(f"{where}: expected {', '.join(COLUMNS)}, got no {', '.join(missing)}; complete the row")
    try:
        tags = tags_of({name: value for name, value in given.items() if name not in known}, where)
    except DataError as error:
        return error
    return Row(where, tags=tags, **{name: value for name, value in given.items() if name in known})


def tags_of(columns: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """What else a row says of its clip, under names that a dataset can have: letters, digits and underscores.

    Raises:
        DataError: two columns that would have one name; text that is no Unicode.
    """
    tags: dict[str, str] = {}
    for column, value in columns.items():
        name = re.sub(r"\W", "_", column.strip()) or "unnamed"
        if name in tags:
            raise DataError(f"{where}: expected one column {name}, got two that are called so; rename {column!r}")
        tags[name] = _text(value if isinstance(value, str) else json.dumps(value), name, where)
    return tuple(tags.items())


def records_of(rows: Iterable[Row | DataError], root: Path, response: str, *, leave_out: bool = False) -> list[Record]:
    """Rows as clips, every one proven to make a prompt.

    Args:
        rows: of a table; in place of one that cannot be read, what is wrong with it.
        root: folder of the audio files.
        response: how answers begin where a row does not say.
        leave_out: whether to go on without rows that are wrong (`data.bad_clips=exclude`); the log names them.

    Raises:
        DataError: rows that make no prompt, an answer that is no option, an id twice, all of them named; no row at all.
    """
    records: list[Record] = []
    wrong: list[DataError] = []
    seen: dict[str, str] = {}
    for row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            record = _record(row, root, response)
            if record.id in seen:
                raise DataError(
                    f"{row.where}: expected every id once, {record.id} is already in {seen[record.id]}; a clip that is "
                    "asked several questions needs a column id"
                )
        except DataError as error:
            wrong.append(error)
        else:
            seen[record.id] = row.where
            records.append(record)
    named = "\n  ".join(map(str, wrong))
    if wrong and not (leave_out and records):
        if len(wrong) == 1:
            raise wrong[0]
        without = "\nTo run without them: data.bad_clips=exclude" if records else ""
        raise DataError(f"{len(wrong)} of {len(records) + len(wrong)} rows cannot be used:\n  {named}{without}")
    if wrong:
        log.warning("%d of %d rows are left out:\n  %s", len(wrong), len(records) + len(wrong), named)
    if not records:
        raise DataError("data.path: expected at least one row, got an empty table; complete it")
    return records


def _record(row: Row, root: Path, response: str) -> Record:
    where = row.where
    listed = [_text(option, "every option", where) for option in _options(row.options, where)]
    options = _unlisted(listed)
    transcript = None if _is_blank(row.transcript) else _text(row.transcript, "transcript", where, lines=True)
    begins = response if _is_blank(row.response) else _text(row.response, "response", where)
    try:
        prompt = Prompt(_text(row.question, "question", where), options, begins, transcript)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    label = _answer(_text(row.answer, "answer", where), options, where)
    audio = _text(row.audio, "audio", where, lines=True)
    if not audio.strip() or not audio.isprintable():
        raise DataError(f"{where}: expected audio to be a file's path, got {audio!r}; correct the row")
    source = Path(os.path.expanduser(audio))  # not Path.expanduser: a file may be called ~take.wav
    source = source if source.is_absolute() else root / source
    # Results travel: a path from the root of this machine is no name.
    elsewhere = Path(os.path.expanduser(audio)).is_absolute()
    named = Path(audio).name if elsewhere else audio
    id = named if _is_blank(row.id) else _text(row.id, "id", where)
    if not _is_blank(row.group):
        group = _text(row.group, "group", where)
    else:
        group = f"{named} {hashlib.sha256(audio.encode()).hexdigest()[:8]}" if elsewhere else audio
    return Record(id, label, source, str(source), group, prompt=prompt, tags=row.tags)


def one_line(text: Any) -> str:
    """Text without spaces around it and without line breaks: what a prompt's pieces have to be."""
    return " ".join(str(text).split())


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any, field: str, where: str, *, lines: bool = False) -> str:
    """A field that is text or a number; lists, objects and null are none, nor is half of a character.

    Args:
        value: as it was read.
        field: whose.
        where: names the row.
        lines: keep spaces and line breaks as they are.

    Raises:
        DataError: it is none.
    """
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: expected {field} to be text, got {value!r}; correct the row")
    text = str(value) if lines else one_line(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: expected {field} to be text in Unicode, got {text!r}; correct the row") from None
    return text


def _options(value: Any, where: str) -> list[str]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                raise DataError(f"{where}: expected options as a JSON list or separated by |, got {text!r}") from None
        else:
            value = text.split("|")
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise DataError(f"{where}: expected options as a list of texts, got {value!r}; put each into quotes")
    return value


def _unlisted(options: Sequence[str]) -> tuple[str, ...]:
    """Options without the letters they are listed by, (A) dog, (B) cat and so on: a prompt lists them its own way."""
    found = [_LISTED.match(option) for option in options]
    letters = [(match[1] or match[2]).lower() for match in found if match]
    if letters != [chr(ord("a") + index) for index in range(len(options))]:
        return tuple(options)
    return tuple(option[match.end() :] for option, match in zip(options, found, strict=True) if match)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _answer(answer: str, options: Sequence[str], where: str) -> str:
    """The option that an answer names: by its text, by its letter (`b` or `(b)`), or by both."""

    def by_text(text: str) -> list[str]:
        return [option for option in options if _folded(option) == _folded(text)]

    def by_letter(letter: str) -> list[str]:
        own = [(option, _LISTED.match(option)) for option in options]
        if any(match for _, match in own):  # letters that are not in order, or not everybody's: those that are written
            return [option for option, match in own if match and (match[1] or match[2]).lower() == letter.lower()]
        return list(options[ord(letter.lower()) - ord("a") :][:1])

    if same := by_text(answer):
        return same[0]
    problem = "correct the row"
    if letter := _LETTER.fullmatch(answer):
        same = by_letter(letter[1])
    elif listed := _LISTED.match(answer):
        named, same = by_letter(listed[1] or listed[2]), by_text(answer[listed.end() :])
        if same and named != same:
            same, problem = [], f"its letter is that of {', '.join(named) or 'none of them'}; correct the row"
    else:
        same = [
            option
            for option in options
            if (match := _LISTED.match(option)) and _folded(option[match.end() :]) == _folded(answer)
        ]
    if len(same) == 1:
        return same[0]
    raise DataError(f"{where}: expected an answer among {', '.join(options)}, got {answer!r}; {problem}")


def _jsonl(path: Path) -> Sequence[tuple[str, Mapping[str, Any]] | DataError]:
    rows: list[tuple[str, Mapping[str, Any]] | DataError] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            rows.append(DataError(f"{where}: expected one JSON object a line, got '{error}'; correct the line"))
            continue
        if isinstance(row, dict):
            rows.append((where, row))
        else:
            got = line.strip()[:60]
            rows.append(DataError(f"{where}: expected a JSON object with {', '.join(COLUMNS)}, got {got!r}"))
    return rows


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for one that says something twice."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} twice in one object")
    return dict(pairs)


def _csv(path: Path) -> Sequence[tuple[str, Mapping[str, Any]] | DataError]:
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        if missing := [name for name in COLUMNS if name not in names]:
            raise DataError(
                f"{path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(names) or 'none'}: "
                f"{', '.join(missing)} missing; name them in the first line"
            )
        if twice := sorted({name or "one without a name" for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: expected every column once, got {', '.join(twice)} twice; rename or remove one")
        rows: list[tuple[str, Mapping[str, Any]] | DataError] = []
        for number, row in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if None in row:
                rows.append(
                    DataError(
                        f"{where}: expected {len(names)} fields as in the header, got more; put fields that contain a "
                        "comma in double quotes"
                    )
                )
            else:
                rows.append((where, row))
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

"""Benchmarks in which each clip has a question of its own, from a copy on disk in the layout they are published in.

sakura_multi   SAKURA (arXiv 2505.13237): `multi_instruction` and `multi_answer` of data/<Attr>/metadata.csv
mmau           MMAU (arXiv 2410.19168): a JSON list of `id, audio_id, question, choices, answer, task, difficulty`
mmar           MMAR (arXiv 2505.13032): MMAR-meta.json, a list of `id, audio_path, question, choices, answer, ...`
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from lalm_patch.errors import DataError
from lalm_patch.stimuli.own_questions import Row, one_line, read_text, records_of, tags_of
from lalm_patch.stimuli.prompt import Attribute
from lalm_patch.stimuli.records import Record
from lalm_patch.stimuli.sakura import TABLE, attribute_folder, load_sakura

AUDIO_KEYS = ("audio_id", "audio_path", "audio")
NOT_TAGS = {*AUDIO_KEYS, "id", "question", "choices", "answer", "answers", "options", "url", "timestamp", "source"}
_INSTRUCTION = "multi_instruction"
_ANSWER = "multi_answer"
_LISTED = re.compile(r"\(([a-z])\)\s+")


def load_listed(
    name: str, root: Path, response: str, path: Path | None = None, *, leave_out: bool = False
) -> list[Record]:
    """MMAU or MMAR: a JSON list of questions, with audio files in the same copy.

    Args:
        name: mmau or mmar, for messages.
        root: the copy's folder; audio paths in the list are relative to it.
        response: how answers begin.
        path: the list; unless given, the one with answers that is published (mmau-test-mini.json, MMAR-meta.json), or
            else the folder's only one.
        leave_out: as of `records_of`.

    Raises:
        DataError: no such folder, no list or several, an entry that lacks something.
    """
    if not root.is_dir():
        raise DataError(f"data.root: expected a folder with a copy of {name}, {root} is none; correct the path")
    path = path or _only_list(name, root)
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list of questions, got '{error}'; download it again") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a JSON list of questions, got {type(entries).__name__}; give another file")
    rows = [_row(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]
    unanswered = [entry for entry in entries if isinstance(entry, dict) and entry.get("answer") in (None, "")]
    if entries and len(unanswered) == len(entries):
        raise DataError(
            f"{path}: expected questions with their answers, got none: this part is published without; use another, "
            "such as mmau-test-mini.json"
        )
    return records_of(rows, root, response, leave_out=leave_out)


def _row(entry: Any, where: str) -> Row | DataError:
    found = entry if isinstance(entry, dict) else {}
    audio = next((found[key] for key in AUDIO_KEYS if found.get(key)), None)
    needed = {"/".join(AUDIO_KEYS[:2]): audio} | {key: found.get(key) for key in ("question", "choices", "answer")}
    if missing := [key for key, value in needed.items() if value in (None, "", [])]:
        return DataError(f"{where}: expected {', '.join(needed)}, got no {', '.join(missing)}; complete the entry")
    said = {
        key: value
        for key, value in found.items()
        if key not in NOT_TAGS and isinstance(value, str | int | float) and value != ""
    }
    try:
        tags = tags_of(said, where)
    except DataError as error:
        return error
    options = found["choices"]
    if isinstance(options, list):
        options = [str(option) if isinstance(option, int | float) else option for option in options]
    return Row(where, audio, found["question"], options, found["answer"], found.get("id"), tags=tags)


def _only_list(name: str, root: Path) -> Path:
    usual = root / {"mmar": "MMAR-meta.json", "mmau": "mmau-test-mini.json"}.get(name, "")
    if usual.is_file():
        return usual
    found = sorted(root.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{root}: expected one JSON list of {name}'s questions, got {names}; name it with data.path=FILE.json"
        )
    return found[0]


def load_sakura_multi(attribute: Attribute, root: Path, *, leave_out: bool = False) -> list[Record]:
    """SAKURA's multi-hop questions of one attribute, options as they are listed there: `(a) Spain (b) Germany`.

    Args:
        attribute: whose clips.
        root: as of `load_sakura`.
        leave_out: as of `records_of`.

    Raises:
        DataError: as `load_sakura`; or the table lacks the multi-hop columns, or a question lists no options.
    """
    clips = {record.id: record for record in load_sakura(attribute, root)}
    table = attribute_folder(root, attribute.folder) / TABLE
    reader = csv.DictReader(io.StringIO(read_text(table), newline=""), strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = names
    if missing := [name for name in (_INSTRUCTION, _ANSWER) if name not in names]:
        raise DataError(
            f"{table}: expected the columns {_INSTRUCTION} and {_ANSWER}, got no {', '.join(missing)}; this copy has "
            "no multi-hop questions"
        )
    rows: list[Row | DataError] = []
    for number, (record, row) in enumerate(zip(clips.values(), reader, strict=True), start=1):
        where = f"{table}, row {number} ({record.id})"
        question, *listed = _LISTED.split(one_line(row[_INSTRUCTION] or ""))
        options = [option.strip().rstrip(",;") for option in listed[1::2]]
        if listed[::2] != [chr(ord("a") + index) for index in range(len(options))] or len(options) < 2:
            got = row[_INSTRUCTION]
            rows.append(DataError(f"{where}: expected a question with options (a), (b) and so on, got {got!r}"))
            continue
        tags = ((attribute.name, record.label), ("task", "multi_hop"))
        rows.append(
            Row(
                where,
                str(record.source),
                question.strip(),
                options,
                row[_ANSWER],
                record.id,
                group=record.group,
                tags=tags,
            )
        )
    return records_of(rows, root, "The answer is", leave_out=leave_out)

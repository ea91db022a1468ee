"""SAKURA (arXiv 2505.13237), or any corpus in its layout, from a folder or from the Hugging Face hub.

    data/<Attr>/metadata.csv     columns `file` (or `file_name`) and `attribute_label`, others ignored
    data/<Attr>/audio/*.wav      or .flac

On the hub the same columns and `audio`, in `SLLM-multi-hop/<Attr>QA`, split `test`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lalm_patch.errors import ConfigError, DataError
from lalm_patch.stimuli.looks import usable_part
from lalm_patch.stimuli.prompt import Attribute
from lalm_patch.stimuli.records import Record

TABLE = "metadata.csv"
FILE_COLUMNS = ("file", "file_name")
LABEL_COLUMN = "attribute_label"
AUDIO_COLUMN = "audio"
SPLIT = "test"

_CREMA_D = re.compile(r"(\d{4})_([A-Z]{3})_(?:ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]{1,2}$")
_COMMON_VOICE = re.compile(r"(common_voice_[A-Za-z-]+_\d+)$")


@dataclass(frozen=True)
class _Row:
    number: int  # from 1, the header not counted
    id: str
    label: str


def load_sakura(
    attribute: Attribute,
    root: Path | str | None = None,
    limit: int | None = None,
    seed: int = 0,
    *,
    hub_id: str | None = None,
    revision: str | None = None,
) -> list[Record]:
    """The records of one attribute, in the table's order.

    `root` is a copy on disk: the folder that holds `data/`, `data` itself, or one attribute's folder. Without it
    the set is fetched from the hub (`hub_id`, by default SAKURA's own, at `revision`); `hub_id` may also be a local
    folder that `datasets.load_dataset` opens. `limit` takes a class-balanced part with so many
    clips that can be used, see `usable_part`.

    Raises ConfigError for a limit below 1 or two sources at once, and DataError for a folder, table, column or label
    that is missing or wrong. Clips are not looked at beyond what `limit` takes: see `check_records`.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"data.limit: expected a whole number from 1, or none for all clips, got {limit!r}")
    if root is not None and (hub_id or revision):
        raise ConfigError("data: expected one source, got a folder (data.root) and a hub set; leave one of them empty")
    if root is None:
        records = _hub_records(attribute, hub_id or f"SLLM-multi-hop/{attribute.folder}QA", revision)
    else:
        records = _folder_records(attribute, Path(root).expanduser())
    return records if limit is None else usable_part(records, attribute.options, limit, seed)


def _folder_records(attribute: Attribute, root: Path) -> list[Record]:
    folder = attribute_folder(root, attribute.folder)
    table = folder / TABLE
    audio = folder / "audio"
    if not audio.is_dir():
        raise DataError(f"{folder}: expected a folder 'audio' beside {TABLE}, found none; copy the clips there")
    rows = _checked_rows(_read_table(table), attribute, str(table))
    return [_record(row, audio / row.id, str(audio / row.id)) for row in rows]


def attribute_folder(root: Path, name: str) -> Path:
    """The folder of one attribute in a copy. Raises DataError for a copy that has none."""
    if not root.is_dir():
        raise DataError(
            f"data.root: expected a folder holding a copy of SAKURA, {root} is none; "
            "correct the path, or leave it empty to fetch the data from the hub"
        )
    nested = (root / "data" / name, root / name)
    for folder in (*nested, root):
        if (folder / TABLE).is_file():
            return folder
    for folder in nested:
        if folder.is_dir():
            raise DataError(f"{folder}: expected a table {TABLE}, found none; copy it from the data set")
    raise DataError(
        f"data.root: expected {nested[0]} or {nested[1]} with a table {TABLE}, found neither in {root}; "
        "point it at the folder that holds 'data'"
    )


def _read_table(table: Path) -> list[tuple[object, object]]:
    """File and label cells of every row."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            file_column = _file_column(reader.fieldnames, str(table))
            cells: list[tuple[object, object]] = []
            for number, row in enumerate(reader, start=1):
                if None in row:
                    raise DataError(
                        f"{table}, row {number}: expected {len(reader.fieldnames)} fields as in the header, got more; "
                        "put fields that contain a comma in double quotes"
                    )
                cells.append((row[file_column], row[LABEL_COLUMN]))
            return cells
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: expected text in UTF-8, got other bytes ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{table}: expected a comma-separated table, got '{error}'; the file is damaged") from error
    except OSError as error:
        raise DataError(f"{table}: expected a readable table, got '{error.strerror}'; check its permissions") from error


def _file_column(columns: Sequence[str], where: str) -> str:
    names = [name for name in FILE_COLUMNS if name in columns]
    if not names or LABEL_COLUMN not in columns:
        raise DataError(
            f"{where}: expected columns 'file' (or 'file_name') and '{LABEL_COLUMN}', "
            f"got {', '.join(columns) or 'none'}; rename the columns, or save the table with commas between them"
        )
    return names[0]


def _checked_rows(cells: Iterable[tuple[object, object]], attribute: Attribute, where: str) -> list[_Row]:
    by_folded = {option.casefold(): option for option in attribute.options}
    first_row: dict[str, int] = {}
    rows: list[_Row] = []
    for number, (file, label) in enumerate(cells, start=1):
        clip = _clip_id(file, f"{where}, row {number}")
        option = by_folded.get(label.strip().casefold()) if isinstance(label, str) else None
        if option is None:
            raise DataError(
                f"{where}, row {number} ({clip}): expected a label of {attribute.name} "
                f"({', '.join(attribute.options)}), got {label!r}; correct the table, "
                f"or the options in conf/attr/{attribute.name}.yaml"
            )
        if clip in first_row:
            raise DataError(
                f"{where}, row {number}: expected every clip once, {clip} is already in row {first_row[clip]}; "
                "remove one of the rows"
            )
        first_row[clip] = number
        rows.append(_Row(number, clip, option))
    if not rows:
        raise DataError(f"{where}: expected at least one clip, got an empty table; complete the copy")
    return rows


def _clip_id(cell: object, where: str) -> str:
    """The clip's path below `audio/`. The table is data, so it may not name a file outside that folder."""
    text = cell.strip() if isinstance(cell, str) else ""
    path = PurePosixPath(text)
    if path.parts[:1] == ("audio",):
        path = path.relative_to("audio")
    outside = path.is_absolute() or ".." in path.parts or PureWindowsPath(text).drive != "" or "\\" in text
    if not path.parts or outside or not text.isprintable():
        raise DataError(
            f"{where}: expected the name of a file inside 'audio', such as dog4.wav, got {cell!r}; correct the table"
        )
    return str(path)


def _record(row: _Row, source: Path | bytes, name: str) -> Record:
    crema = _CREMA_D.match(PurePosixPath(row.id).stem)
    return Record(row.id, row.label, source, name, _group(row.id), crema[2] if crema else "")


def _group(clip: str) -> str:
    stem = PurePosixPath(clip).stem
    if speaker := _CREMA_D.match(stem):
        return speaker[1]
    if recording := _COMMON_VOICE.search(stem):
        return recording[1]
    return clip


def _hub_records(attribute: Attribute, hub_id: str, revision: str | None) -> list[Record]:
    datasets = _import_datasets()
    table = _fetch(datasets, hub_id, revision)
    where = f"{hub_id} ({SPLIT})"
    file_column = _file_column(table.column_names, where)
    if AUDIO_COLUMN not in table.column_names:
        raise DataError(
            f"{where}: expected a column '{AUDIO_COLUMN}', got {', '.join(table.column_names)}; choose another hub set"
        )
    cells = zip(table[file_column], table[LABEL_COLUMN], strict=True)
    rows = _checked_rows(cells, attribute, where)
    # Undecoded: read_audio must see the file itself, not what a decoder made of it.
    clips = table.select([row.number - 1 for row in rows]).cast_column(AUDIO_COLUMN, datasets.Audio(decode=False))
    return [
        _hub_record(row, clip, f"{where}, row {row.number} ({row.id})")
        for row, clip in zip(rows, clips[AUDIO_COLUMN], strict=True)
    ]


def _hub_record(row: _Row, clip: Mapping[str, Any] | None, name: str) -> Record:
    cell = clip or {}
    source: Path | bytes
    if cell.get("bytes") is not None:
        source = cell["bytes"]
    elif cell.get("path"):
        source = Path(cell["path"])
    else:
        raise DataError(f"{name}: expected audio, got an empty cell; take the row out of the data set")
    return _record(row, source, name)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data from the Hugging Face hub: expected the optional package 'datasets', it is not installed; "
            "run `pip install datasets`, or set data.root to a copy on disk"
        ) from error
    return datasets


def _fetch(datasets: Any, hub_id: str, revision: str | None) -> Any:
    try:
        return datasets.load_dataset(hub_id, split=SPLIT, revision=revision)
    except Exception as error:  # its errors, the hub client's and the HTTP library's have no common base class
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{hub_id}: expected a data set with a split '{SPLIT}' on the Hugging Face hub or in a local folder, got "
            f"{type(error).__name__}: {reason}; check the name and the network, for a gated set accept its terms on "
            f"its page and set HF_TOKEN, or set data.root to a copy on disk"
        ) from error

from __future__ import annotations

import csv
import io
import struct
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalm_patch.errors import AudioError, ConfigError, DataError
from lalm_patch.stimuli import Attribute, Record, check_records, data_fingerprint, demo, load_demo, load_sakura
from lalm_patch.stimuli.looks import balanced_part

GENDER = Attribute("gender", "Who speaks?", ("male", "female"), "The speaker is", "Gender")
COLUMNS = ("file", "attribute_label", "single_instruction", "single_answer", "multi_instruction", "multi_answer")
ROWS = [(f"{label[0]}{k}.wav", label) for label in ("female", "male") for k in range(6)]


def wav(seed: int, count: int = 1_600) -> bytes:
    body = struct.pack(f"<{count}h", *[(seed * 911 + 37 * k) % 2_000 for k in range(count)])
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    content = b"WAVE" + fmt + struct.pack("<4sI", b"data", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(content)) + content


def table_text(rows: Iterable[tuple[str, str]], columns: tuple[str, ...] = COLUMNS) -> str:
    # As upstream: CRLF, and instructions that hold commas, quotes and line breaks.
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(columns)
    for file, label in rows:
        writer.writerow([file, label, 'Who "speaks",\nand why?', " (a) Male", "", ""][: len(columns)])
    return text.getvalue()


def write_corpus(folder: Path, table: str | bytes, files: Iterable[str] = ()) -> Path:
    (folder / "audio").mkdir(parents=True)
    (folder / "metadata.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    for number, file in enumerate(files):
        (folder / "audio" / file).write_bytes(wav(number))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "data" / "Gender", table_text(ROWS), [file for file, _ in ROWS])
    return tmp_path


def pairs(records: Iterable[Record]) -> list[tuple[str, str]]:
    return [(record.id, record.label) for record in records]


def test_records_come_in_the_table_s_order(corpus: Path) -> None:
    records = load_sakura(GENDER, corpus)
    assert pairs(records) == ROWS
    for number, record in enumerate(records):
        assert record.source == corpus / "data" / "Gender" / "audio" / record.id
        assert record.name == str(record.source)
        expected = [(number * 911 + 37 * k) % 2_000 / 32_768 for k in range(1_600)]
        np.testing.assert_array_equal(record.waveform(), expected)


@pytest.mark.parametrize("root", [".", "data", "data/Gender"])
def test_three_roots_are_one_corpus(corpus: Path, root: str) -> None:
    assert load_sakura(GENDER, corpus / root) == load_sakura(GENDER, str(corpus))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("column", ["file", "file_name", " file "])
@pytest.mark.parametrize("prefix", ["", "audio/", "./audio/", " "])
def test_spellings_of_a_table(tmp_path: Path, encoding: str, ending: str, column: str, prefix: str) -> None:
    spellings = ["Male", "FEMALE ", " male", "female"]
    rows = [(f"{prefix}clip{k}.flac", label) for k, label in enumerate(spellings)]
    text = table_text(rows, (column, "attribute_label")).replace("\r\n", ending)
    write_corpus(tmp_path / "Gender", text.encode(encoding), [f"clip{k}.flac" for k in range(4)])
    expected = [("clip0.flac", "male"), ("clip1.flac", "female"), ("clip2.flac", "male"), ("clip3.flac", "female")]
    assert pairs(load_sakura(GENDER, tmp_path)) == expected


@pytest.mark.parametrize(
    ("clip", "group"),
    [
        ("1046_MTI_ANG_XX.wav", "1046"),
        ("1091_IEO_HAP_HI.wav", "1091"),
        ("1076_MTI_SAD_X.flac", "1076"),
        ("en_test_0_common_voice_en_17266327.wav", "common_voice_en_17266327"),
        ("zh-CN_test_0_common_voice_zh-CN_22117086.wav", "common_voice_zh-CN_22117086"),
        ("dog4.wav", "dog4.wav"),
        ("1046.wav", "1046.wav"),
        ("copy_1046_MTI_ANG_XX.wav", "copy_1046_MTI_ANG_XX.wav"),
        ("1046_MTI_ANG_XX_copy.wav", "1046_MTI_ANG_XX_copy.wav"),
    ],
)
def test_the_group_is_the_speaker_or_recording(tmp_path: Path, clip: str, group: str) -> None:
    write_corpus(tmp_path / "Gender", table_text([(clip, "male")]), [clip])
    assert [(record.id, record.group) for record in load_sakura(GENDER, tmp_path)] == [(clip, group)]


WRONG_TABLES: dict[str, tuple[str | bytes, str]] = {
    "unknown label": (
        table_text([("a.wav", "male"), ("b.wav", "child")]),
        r"row 2 \(b\.wav\): expected a label of gender \(male, female\), got 'child'",
    ),
    "no label": ("file,attribute_label\r\na.wav\r\n", "row 1 .*: expected a label of gender .* got None"),
    "twice": (table_text([("a.wav", "male"), ("audio/a.wav", "male")]), "row 2: .* a.wav is already in row 1"),
    "no rows": (table_text([]), "at least one clip, got an empty table"),
    "no bytes": ("", "expected columns .*, got none"),
    "no file column": (table_text(ROWS, ("clip", "attribute_label")), "'file' .* got clip, attribute_label"),
    "no label column": (table_text(ROWS, ("file", "label")), "'attribute_label', got file, label"),
    "semicolons": ("file;attribute_label\r\na.wav;male\r\n", "got file;attribute_label; .* commas between"),
    "unquoted comma": ("file,attribute_label\r\na.wav,male,b\r\n", "row 1: expected 2 fields"),
    "cut in a quoted field": (table_text(ROWS)[:-30], "the file is damaged"),
    "latin-1": ("file,attribute_label\r\n\xe9.wav,male\r\n".encode("latin-1"), "expected text in UTF-8"),
    "above": (table_text([("../../secret.wav", "male")]), "row 1: expected the name of a file inside 'audio'"),
    "above, hidden": (table_text([("audio/x/../../secret.wav", "male")]), "inside 'audio'"),
    "absolute": (table_text([("/etc/hostname", "male")]), "inside 'audio'"),
    "drive": (table_text([("C:secret.wav", "male")]), "inside 'audio'"),
    "backslashes": (table_text([("..\\secret.wav", "male")]), "inside 'audio'"),
    "nul": (table_text([("a\0.wav", "male")]), "inside 'audio'"),
    "blank name": (table_text([("  ", "male")]), "inside 'audio'"),
    "only the folder": (table_text([("audio/", "male")]), "inside 'audio'"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_a_wrong_table_is_refused(tmp_path: Path, case: str) -> None:
    table, reason = WRONG_TABLES[case]
    folder = write_corpus(tmp_path / "Gender", table, ["a.wav", "b.wav"])
    with pytest.raises(DataError, match=reason) as caught:
        load_sakura(GENDER, tmp_path)
    assert str(caught.value).startswith(str(folder / "metadata.csv"))
    assert "; " in str(caught.value), "the message says what to do"


def test_what_is_missing_on_disk_is_named(corpus: Path) -> None:
    folder = corpus / "data" / "Gender"
    with pytest.raises(DataError, match=r"^data\.root: expected a folder .*absent is none; correct the path"):
        load_sakura(GENDER, corpus / "absent")
    emotion = Attribute("emotion", "What?", ("sad", "happy"), "It is", "Emotion")
    with pytest.raises(DataError, match=r"^data\.root: expected .*Emotion .* point it at the folder"):
        load_sakura(emotion, corpus)
    (folder / "audio" / ROWS[2][0]).unlink()
    (folder / "audio" / ROWS[3][0]).unlink()
    (folder / "audio" / ROWS[3][0]).mkdir()
    errors = {record.id: error for record, error in check_records(load_sakura(GENDER, corpus))}
    assert list(errors) == [ROWS[2][0], ROWS[3][0]]
    assert "found none; restore it" in str(errors[ROWS[2][0]])
    assert "got a folder of that name" in str(errors[ROWS[3][0]])
    (folder / "audio").rename(folder / "clips")
    with pytest.raises(DataError, match=r"Gender: expected a folder 'audio' beside metadata\.csv"):
        load_sakura(GENDER, corpus)
    (folder / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"Gender: expected a table metadata\.csv, found none"):
        load_sakura(GENDER, corpus)


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "3"])
def test_a_limit_is_a_whole_number_from_1(corpus: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.limit: expected a whole number from 1, .* got"):
        load_sakura(GENDER, corpus, limit=limit)


def test_one_source_at_a_time(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="expected one source"):
        load_sakura(GENDER, corpus, hub_id="someone/else")


# --- the balanced part


@st.composite
def corpora(draw: st.DrawFn) -> tuple[dict[str, str], list[str]]:
    options = [f"class{k}" for k in range(draw(st.integers(1, 9)))]
    labels = draw(st.dictionaries(st.text(max_size=8), st.sampled_from(options), min_size=1, max_size=60))
    return labels, options


@given(corpora(), st.integers(1, 70), st.integers(0, 5), st.randoms())
def test_balanced_nested_and_blind_to_row_order(
    corpus: tuple[dict[str, str], list[str]], limit: int, seed: int, random: object
) -> None:
    labels, options = corpus
    part = balanced_part(labels, options, limit, seed)
    assert part <= set(labels)
    assert len(part) == min(limit, len(labels))

    taken, held = Counter(labels[sample] for sample in part), Counter(labels.values())
    behind = [option for option in options if taken[option] + 1 < max(taken.values())]
    assert all(taken[option] == held[option] for option in behind), "only an exhausted class may fall behind"

    assert part <= balanced_part(labels, options, limit + 1, seed)

    shuffled = list(labels.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert balanced_part(dict(shuffled), options, limit, seed) == part


def test_the_limit_keeps_the_table_s_order_and_both_classes(corpus: Path) -> None:
    records = load_sakura(GENDER, corpus, limit=5, seed=1)
    assert Counter(record.label for record in records) == {"male": 3, "female": 2}
    assert pairs(records) == [row for row in ROWS if row in pairs(records)]
    assert pairs(load_sakura(GENDER, corpus, limit=100)) == ROWS


def test_the_part_is_the_same_on_every_machine() -> None:
    # The first of `for k in $(seq 0 99); do printf "%s $k\n" $(printf 7:$k | sha256sum); done | sort`.
    labels = {str(k): "all" for k in range(100)}
    assert balanced_part(labels, ["all"], 5, seed=7) == {"77", "4", "71", "89", "7"}
    assert balanced_part(labels, ["all"], 5, seed=8) != {"77", "4", "71", "89", "7"}


# --- whole data sets


def test_bad_clips_are_reported_before_a_run(corpus: Path) -> None:
    assert check_records(load_sakura(GENDER, corpus)) == []
    audio = corpus / "data" / "Gender" / "audio"
    (audio / "f1.wav").write_bytes(wav(0)[:-1])
    (audio / "m0.wav").write_bytes(wav(0, count=0))
    failures = check_records(load_sakura(GENDER, corpus))
    assert [record.id for record, _ in failures] == ["f1.wav", "m0.wav"]
    assert all(isinstance(error, AudioError) and record.name in str(error) for record, error in failures)
    assert len(check_records(load_sakura(GENDER, corpus), max_seconds=0.05)) == 12


def record(sample: str = "a", label: str = "male", content: bytes = b"xyz") -> Record:
    return Record(sample, label, content, "anywhere", "any")


def test_the_fingerprint_changes_with_every_part(corpus: Path) -> None:
    variants = [
        [record()],
        [record("b")],
        [record(label="female")],
        [record(content=b"xyzz")],
        [record("am", "ale")],
        [record(), record("b")],
        [record(), record("b", content=b"")],
        [],
    ]
    assert len({data_fingerprint(variant) for variant in variants}) == len(variants)
    records = load_sakura(GENDER, corpus)
    assert data_fingerprint(records[::-1]) == data_fingerprint(records)
    # From `sha256sum`: "a", "male" and "xyz", each after its length in 8 bytes.
    assert data_fingerprint([record()]) == "aa499edd1a1014009ee87115e9e5315ba99a1845d706195c9ae5414b2805165b"


def test_bytes_and_path_have_one_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(b"xyz")
    on_disk = Record("a", "male", tmp_path / "clip", "elsewhere", "other")
    assert data_fingerprint([on_disk]) == data_fingerprint([record()])


# --- the hub


@pytest.fixture
def hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the hub stores it: a parquet file whose `audio` column is an Audio feature with bytes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "GenderQA"
    write_parquet(folder, {"file": [file for file, _ in ROWS], "attribute_label": [label for _, label in ROWS]})
    return folder


def write_parquet(folder: Path, columns: dict[str, list[str]], split: str = "test") -> None:
    clips = [{"bytes": wav(number), "path": f"{number}.wav"} for number in range(len(next(iter(columns.values()))))]
    table = datasets.Dataset.from_dict({**columns, "audio": clips}).cast_column("audio", datasets.Audio())
    (folder / "data").mkdir(parents=True)
    table.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))


def test_the_hub_set_equals_the_folder(hub_set: Path, corpus: Path) -> None:
    from_hub = load_sakura(GENDER, hub_id=str(hub_set))
    from_folder = load_sakura(GENDER, corpus)
    assert pairs(from_hub) == pairs(from_folder) == ROWS
    assert data_fingerprint(from_hub) == data_fingerprint(from_folder)
    for one, other in zip(from_hub, from_folder, strict=True):
        assert one.group == other.group
        np.testing.assert_array_equal(one.waveform(), other.waveform())
    assert from_hub[3].name == f"{hub_set} (test), row 4 (f3.wav)"


def test_the_hub_set_and_the_folder_give_one_part(hub_set: Path, corpus: Path) -> None:
    from_hub = load_sakura(GENDER, limit=5, seed=3, hub_id=str(hub_set))
    from_folder = load_sakura(GENDER, corpus, limit=5, seed=3)
    assert pairs(from_hub) == pairs(from_folder)
    assert data_fingerprint(from_hub) == data_fingerprint(from_folder)


def test_the_default_hub_set_is_sakura_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def load_dataset(path: str, *, split: str, revision: str | None) -> None:
        asked.append((path, split, revision))
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^SLLM-multi-hop/GenderQA: .* ConnectionError: Couldn't reach the hub; .*"):
        load_sakura(GENDER, revision="abc")
    assert asked == [("SLLM-multi-hop/GenderQA", "test", "abc")]


def test_a_hub_set_without_its_columns_is_refused(hub_set: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "no_label", {"file": ["a.wav"]})
    with pytest.raises(DataError, match=r"no_label \(test\): expected columns .* got file, audio"):
        load_sakura(GENDER, hub_id=str(tmp_path / "no_label"))
    write_parquet(tmp_path / "train_only", {"file": ["a.wav"], "attribute_label": ["male"]}, split="train")
    with pytest.raises(DataError, match=r"train_only: expected a data set with a split 'test'"):
        load_sakura(GENDER, hub_id=str(tmp_path / "train_only"))
    write_parquet(tmp_path / "label", {"file": ["a.wav"], "attribute_label": ["child"]})
    with pytest.raises(DataError, match=r"label \(test\), row 1 \(a\.wav\): expected a label of gender"):
        load_sakura(GENDER, hub_id=str(tmp_path / "label"))


def test_without_the_optional_package_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"run `pip install datasets`, or set data\.root"):
        load_sakura(GENDER)


# --- the packaged corpus


def test_the_demo_corpus_is_read_as_any_other(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DEMO_CORPUS", corpus)
    assert load_demo(GENDER, limit=4, seed=2) == load_sakura(GENDER, corpus, limit=4, seed=2)
    monkeypatch.setattr(demo, "DEMO_CORPUS", corpus / "absent")
    with pytest.raises(DataError, match=r"expected it inside the package .* reinstall"):
        load_demo(GENDER)

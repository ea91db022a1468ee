"""Tables and benchmarks as people have them: letters twice, damaged rows, odd names, other scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lalm_patch.errors import ConfigError, DataError
from lalm_patch.run import _as_file, trace_clip
from lalm_patch.stimuli import Record, data_fingerprint, load_listed, load_table

ROW: dict[str, Any] = {"audio": "a.wav", "question": "Q?", "options": ["dog", "cat"], "answer": "dog"}


def load(folder: Path, *rows: dict[str, Any], leave_out: bool = False) -> list[Record]:
    path = folder / "t.jsonl"
    path.write_text("\n".join(json.dumps(ROW | {"id": str(index)} | row) for index, row in enumerate(rows)))
    return load_table(path, "It is", leave_out=leave_out)


@pytest.mark.parametrize(
    ("options", "answer", "kept", "label"),
    [
        (["(A) dog", "(B) cat"], "B", ["dog", "cat"], "cat"),
        (["(A) dog", "(B) cat"], "(B) cat", ["dog", "cat"], "cat"),
        (["A. dog", "B. cat"], "cat", ["dog", "cat"], "cat"),
        (["(B) dog", "(A) cat"], "A", ["(B) dog", "(A) cat"], "(A) cat"),  # the letter it has, not its place
        (["(B) dog", "(A) cat"], "dog", ["(B) dog", "(A) cat"], "(B) dog"),
        (["dog", "cat"], "B. cat", ["dog", "cat"], "cat"),
        (["B", "A"], "a", ["B", "A"], "A"),
        (["caf\u00e9", "bar"], "cafe\u0301", ["caf\u00e9", "bar"], "caf\u00e9"),
        (["\u0645\u06cc\u200c\u0631\u0648\u062f", "x"], "x", ["\u0645\u06cc\u200c\u0631\u0648\u062f", "x"], "x"),
        (["\U0001f468\u200d\U0001f469", "x"], "x", ["\U0001f468\u200d\U0001f469", "x"], "x"),
    ],
)
def test_letters_are_the_list_s_and_answers_go_by_them(
    tmp_path: Path, options: list[str], answer: str, kept: list[str], label: str
) -> None:
    (record,) = load(tmp_path, {"options": options, "answer": answer})
    assert record.prompt is not None
    assert (list(record.prompt.options), record.label) == (kept, label)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "(B) dog"}, "its letter is that of cat"),
        ({"options": ["caf\u00e9", "cafe\u0301"], "answer": "caf\u00e9"}, "differ in more than case"),
        ({"options": ["dog", "dog\u200d"]}, "differ in more than case"),
        ({"options": ["dog", None]}, "options as a list of texts"),
        ({"question": ["Q"]}, "expected question to be text"),
        ({"audio": {"path": "a.wav"}}, "expected audio to be text"),
        ({"audio": "a\0.wav"}, "a file's path"),
        ({"audio": "a\ud800.wav"}, "text in Unicode"),
        ({"id": "\ud800"}, "text in Unicode"),
        ({"task": "\ud800"}, "text in Unicode"),
        ({"sub-task": "a", "sub/task": "b"}, "expected one column sub_task, got two"),
        ({"answer": "  "}, "got no answer"),
    ],
)
def test_a_row_that_means_nothing_or_two_things_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match="line 2") as error:
        load(tmp_path, {}, row)
    assert said in str(error.value)


def test_every_wrong_row_is_named_and_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ({}, {"answer": "cow"}, {}, {"options": ["dog", "dog"]})
    with pytest.raises(DataError, match=r"(?s)2 of 4 rows .*line 2.*line 4.*data\.bad_clips=exclude"):
        load(tmp_path, *rows)
    assert [record.id for record in load(tmp_path, *rows, leave_out=True)] == ["0", "2"]
    assert "2 of 4 rows are left out" in caplog.text
    with pytest.raises(DataError, match="line 1"):
        load(tmp_path, {"answer": "cow"}, leave_out=True)


def test_what_a_json_line_or_a_header_says_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(ROW)[:-1] + ', "answer": "cat"}')
    with pytest.raises(DataError, match="answer twice"):
        load_table(path, "It is")
    path.write_text('{"audio": ' + "[" * 100_000)
    with pytest.raises(DataError, match="line 1"):
        load_table(path, "It is")
    path = tmp_path / "t.CSV"
    path.write_text("audio,question,options,answer,answer\na.wav,Q,x|y,x,y\n")
    with pytest.raises(DataError, match="got answer twice"):
        load_table(path, "It is")


def test_names_of_columns_fit_a_dataset_and_a_tilde_is_a_letter(tmp_path: Path) -> None:
    (record,) = load(tmp_path, {"audio": "~nobody-of-this-name.wav", "a/b c": 1, "": "x", "id": " ", "group": " "})
    assert dict(record.tags) == {"a_b_c": "1", "unnamed": "x"}
    assert record.source == tmp_path / "~nobody-of-this-name.wav"
    assert record.id == record.group == "~nobody-of-this-name.wav"


@pytest.mark.parametrize("column", ["task", "group", "transcript", "response", "question"])
def test_a_changed_column_is_another_data_set(tmp_path: Path, column: str) -> None:
    first, second = (load(tmp_path, {column: text}) for text in ("one", "two"))
    assert data_fingerprint(first) != data_fingerprint(second)


def test_mmau_as_it_is_published_with_both_parts(tmp_path: Path) -> None:
    entry = {"id": "1", "audio_id": "x.wav", "question": "Q?", "choices": [1, 2.5], "answer": 1, "difficulty": 3}
    same = entry | {"id": "2", "choices": ["a", "A"], "answer": "a"}
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps([entry, same]))
    unanswered = [{key: value for key, value in entry.items() if key != "answer"}]
    (tmp_path / "mmau-test.json").write_text(json.dumps(unanswered))
    with pytest.raises(DataError, match="entry 2"):
        load_listed("mmau", tmp_path, "It is")
    (record,) = load_listed("mmau", tmp_path, "It is", leave_out=True)
    assert record.label == "1"
    assert dict(record.tags) == {"difficulty": "3"}
    with pytest.raises(DataError, match="published without"):
        load_listed("mmau", tmp_path, "It is", tmp_path / "mmau-test.json")


def test_the_same_samples_are_the_same_file_whenever_and_in_whatever_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = np.array([0, 16384, -32768], np.int16)
    path = _as_file(samples, 16000, tmp_path)
    before = path.read_bytes()
    assert before[before.find(b"PEAK") + 12 :][:4] == bytes(4)  # no time of writing
    assert soundfile.read(path)[0].tolist() == [0, 0.5, -1]
    assert _as_file(samples / 32768, 16000, tmp_path) == path
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="floats or signed integers"):
        _as_file(np.array(["a"]), 16000, tmp_path)


@pytest.mark.parametrize("odd", [{"question": None}, {"answer": 1}, {"options": "dog"}, {"options": [1, 2]}])
def test_texts_of_one_clip_are_texts(odd: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="trace_clip: expected"):
        trace_clip("a.wav", **{"question": "Q?", "options": ["a", "b"], "answer": "a", **odd})


def test_a_path_from_the_root_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    first, second = (
        load(tmp_path, {"audio": str(tmp_path / folder / "take.wav"), "id": folder}) for folder in ("", "one")
    )
    (unnamed,) = load(tmp_path, {"audio": str(tmp_path / "take.wav"), "id": ""})
    assert unnamed.id == "take.wav"
    assert unnamed.source == tmp_path / "take.wav"
    assert str(tmp_path) not in unnamed.id + unnamed.group
    assert first[0].group != second[0].group  # two recordings of one name


def test_letters_that_clash_are_named_and_not_their_options() -> None:
    from types import SimpleNamespace
    from typing import cast

    from lalm_patch.errors import ModelError
    from lalm_patch.models.answers import answer_ids
    from lalm_patch.models.family import Family
    from lalm_patch.stimuli import Prompt

    family = SimpleNamespace(
        refuse_control_tokens=lambda _: None, text_ids=lambda *_, continuation="": [1, 2] if continuation else [1]
    )
    prompt = Prompt("Q", ("cow", "cat"), "It is", letters=True)
    with pytest.raises(ModelError, match="a, b begin with the same token"):
        answer_ids(cast(Family, family), lambda _: None, prompt, "chat", "bare", whole=False)

"""Clips that are not what they say: which are left out, which stop a run, and what is stored of each."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xarray as xr
from conftest import GENDER, noise, write_sakura

from lalm_patch.analysis import lost_classes
from lalm_patch.config import compose
from lalm_patch.errors import AudioError, DataError
from lalm_patch.run import dry_run, load_records, run
from lalm_patch.settings import RunSettings
from lalm_patch.stimuli import Record, grouped, read_clip

CLIPS = 8
SILENT = ("male_00.wav", "female_01.wav", "male_02.wav")
CUT, MISSING, LONG = "female_03.wav", "female_05.wav", "male_06.wav"
STREAMED = "female_07.wav"


def pcm(path: Path, samples: np.ndarray) -> None:
    soundfile.write(path, samples.astype(np.int16), 16000, subtype="PCM_16")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips: three in which nothing sounds, one cut, one gone, one far too long, one from a streaming encoder."""
    root = write_sakura(tmp_path_factory.mktemp("hostile"), GENDER, CLIPS, seconds=0.5)
    audio = root / "data" / "Gender" / "audio"
    generator = np.random.default_rng(0)
    pcm(audio / SILENT[0], np.zeros(8000))
    pcm(audio / SILENT[1], generator.integers(-1, 2, 8000))
    left = generator.integers(-9000, 9000, 8000)
    pcm(audio / SILENT[2], np.stack([left, -left], axis=1))
    (audio / CUT).write_bytes((audio / CUT).read_bytes()[:5000])
    (audio / MISSING).unlink()
    soundfile.write(audio / LONG, noise(31.0), 16000, subtype="PCM_16")
    data = (audio / STREAMED).read_bytes()
    at = data.index(b"data") + 4
    (audio / STREAMED).write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    return root


@pytest.fixture(scope="module")
def overrides(corpus: Path, checkpoints: dict[str, Path]) -> tuple[str, ...]:
    model = (f"model.id={checkpoints['qwen2_audio']}", "model.dtype=float32", "model=qwen2_audio", "threads=1")
    return (*model, "attr=gender", f"data.root={corpus}", "granularity.layers=[0]")


def settings(overrides: tuple[str, ...], *more: str) -> RunSettings:
    return compose(*overrides, *more)


def result(overrides: tuple[str, ...], folder: Path, *more: str) -> xr.Dataset:
    dataset = run(settings(overrides, "data.bad_clips=exclude", *more), folder).dataset
    assert dataset is not None
    return dataset


@pytest.fixture(scope="module")
def dataset(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    return result(overrides, tmp_path_factory.mktemp("excluded"))


def test_each_clip_has_its_own_reason(dataset: xr.Dataset) -> None:
    reasons = dict(zip(dataset["sample"].values, dataset["exclusion"].values, strict=True))
    assert {clip: reasons[clip] for clip in SILENT} == dict.fromkeys(SILENT, "nothing sounds in the clip")
    assert {reasons[clip] for clip in (CUT, MISSING, LONG)} == {"clip unusable"}
    assert reasons["male_04.wav"] not in ("clip unusable", "nothing sounds in the clip")
    assert reasons[STREAMED] == reasons["male_04.wav"] or reasons[STREAMED] == ""


def test_the_level_of_every_clip_is_stored(dataset: xr.Dataset) -> None:
    peaks = dataset["peak"].to_series()
    assert peaks[SILENT[0]] == -np.inf
    assert peaks[SILENT[1]] == pytest.approx(20 * np.log10(1 / 32768), abs=1e-3)
    assert peaks[SILENT[2]] == -np.inf
    assert np.isnan(peaks[CUT])
    sound = noise(0.5 + 0.05 * (4 % 3), seed=4)
    level = float(dataset["level"].sel(sample="male_04.wav"))
    assert level == pytest.approx(20 * np.log10(np.sqrt(np.mean(sound**2))), abs=0.01)
    assert dataset["level"].attrs["units"] == "dBFS"


@pytest.mark.parametrize("corruption", ["noise", "dither", "counterfactual", "mean"])
def test_what_is_silent_is_no_evidence_in_any_corruption(
    overrides: tuple[str, ...], corruption: str, tmp_path: Path
) -> None:
    found = result(overrides, tmp_path, f"corruption={corruption}")
    silent = found.sel(sample=list(SILENT))
    assert set(silent["exclusion"].values) == {"nothing sounds in the clip"}
    assert not silent["kept"].any()
    if "partner" in found:
        assert not set(found["partner"].values) & {*SILENT, CUT, MISSING, LONG}


def test_what_was_repaired_is_stored_and_counted(
    dataset: xr.Dataset, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    notes = dataset["repaired"].to_series()
    assert notes[STREAMED].startswith("the WAV header leaves the length open")
    assert not notes.drop(STREAMED).str.len().any()
    shown = run(settings(overrides, "data.bad_clips=exclude"), tmp_path).summary
    assert "repaired 1 of 8 clips" in shown


def test_details_travel(dataset: xr.Dataset, corpus: Path) -> None:
    for detail in dataset["exclusion_detail"].values:
        assert str(corpus) not in str(detail)
    assert str(dataset["exclusion_detail"].sel(sample=MISSING).values).startswith(
        "female_05.wav: expected an audio file at female_05.wav"
    )


def test_stop_names_every_one_at_once(overrides: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(AudioError) as caught:
        run(settings(overrides), tmp_path)
    message = str(caught.value)
    assert message.startswith("3 of 8 clips cannot be used (1 truncated, 1 missing, 1 too long):")
    for clip in (CUT, MISSING, LONG):
        assert clip in message
    assert "what qwen2_audio takes in one window" in message
    assert message.endswith("To run without them: data.bad_clips=exclude")
    with pytest.raises(AudioError, match="3 of 8 clips cannot be used"):
        dry_run(settings(overrides))


def test_a_dry_run_looks_at_the_clips(overrides: tuple[str, ...]) -> None:
    text = dry_run(settings(overrides, "data.bad_clips=exclude"))
    assert "data     2 clips; 3 left out: nothing sounds in the clip, 3 left out: clip unusable" in text


def test_one_line_on_the_terminal_and_all_of_them_in_the_log(
    overrides: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="lalm_patch"):
        result(overrides, tmp_path)
    shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (line,) = [text for text in shown if "left out" in text]
    assert line.startswith("6 of 8 clips are left out: 3 silent, 1 truncated, 1 missing, 1 too long; ")
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert sum("left out: " in text for text in named) == 3


def test_stop_and_exclude_are_one_run(overrides: tuple[str, ...], tmp_path: Path) -> None:
    stop, exclude = settings(overrides), settings(overrides, "data.bad_clips=exclude")
    assert stop.run_name == exclude.run_name
    with pytest.raises(AudioError):
        run(stop, tmp_path)
    dataset = run(exclude, tmp_path).dataset
    assert dataset is not None
    shown_again = run(stop, tmp_path).dataset  # it is finished: nothing is looked at
    assert shown_again is not None
    xr.testing.assert_identical(shown_again, dataset)


def test_a_limit_is_of_clips_that_can_be_used(corpus: Path) -> None:
    chosen = load_records(compose("attr=gender", "data=sakura", f"data.root={corpus}", "data.limit=2"), GENDER)
    bad = {*SILENT, CUT, MISSING}
    assert {record.label for record in chosen if record.id not in bad} == {"male", "female"}
    assert sum(record.id not in bad for record in chosen) == 2
    everything = load_records(compose("attr=gender", "data=sakura", f"data.root={corpus}", "data.limit=100"), GENDER)
    assert len(everything) == CLIPS
    assert [record.id for record in chosen] == [r.id for r in everything if r in chosen]


def test_nothing_left_is_said_with_every_reason(
    overrides: tuple[str, ...], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    root = write_sakura(tmp_path / "data", GENDER, 2)
    for name in ("male_00.wav", "female_01.wav"):
        pcm(root / "data" / "Gender" / "audio" / name, np.zeros(8000))
    with pytest.raises(DataError, match=r"none of the 2 clips can be used:\n  female_01\.wav: its peak is -inf dB"):
        run(settings(overrides, f"data.root={root}", "data.bad_clips=exclude"), tmp_path / "run")


def test_a_class_that_exclusion_empties_is_named(overrides: tuple[str, ...], tmp_path: Path) -> None:
    root = write_sakura(tmp_path / "data", GENDER, 4)
    for name in ("female_01.wav", "female_03.wav"):
        pcm(root / "data" / "Gender" / "audio" / name, np.zeros(8000))
    found = result(overrides, tmp_path / "run", f"data.root={root}")
    assert any(
        sentence
        == "No clip of female could be used; chance is that of guessing among all 2 options, as the model is asked."
        for sentence in lost_classes(found)
    )


def test_the_same_file_twice_is_one_piece_of_evidence() -> None:
    records = [
        Record("a", "male", b"1", "a", "speaker 1"),
        Record("b", "male", b"2", "b", "speaker 1"),
        Record("c", "female", b"2", "c", "speaker 2"),
        Record("d", "female", b"3", "d", "speaker 2"),
        Record("e", "female", b"4", "e", "speaker 3"),
        Record("f", "female", Path("nowhere"), "f", "speaker 4"),
    ]
    groups = [record.group for record in grouped(records)]
    assert len(set(groups[:4])) == 1
    assert groups[4:] == ["speaker 3", "speaker 4"]


def test_silence_is_measured_after_mixing_down() -> None:
    frames = b"".join(struct.pack("<hh", value, -value) for value in range(1600))
    head = struct.pack("<HHIIHH", 1, 2, 16000, 64000, 4, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(frames)) + frames
    assert not read_clip(b"RIFF" + struct.pack("<I", len(body)) + body, "clip").sounds

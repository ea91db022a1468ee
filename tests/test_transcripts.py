"""Transcripts of models that read one beside the audio: each setting through a whole run, and the cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import GENDER, write_sakura
from native_checkpoints import DestaFiles

from lalm_patch.config import compose
from lalm_patch.errors import ConfigError
from lalm_patch.models.desta import Desta25
from lalm_patch.run import run
from lalm_patch.tracing.metrics import Exclusion

pytestmark = pytest.mark.usefixtures("without_pdfs")

CLIPS = 3


@pytest.fixture(scope="module")
def place(
    desta2_files: DestaFiles, desta25_files: DestaFiles, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    data = write_sakura(tmp_path_factory.mktemp("sakura"), GENDER, CLIPS, seconds=0.5)
    return {"desta2": desta2_files.location, "desta25": desta25_files.location, "data": data}


def outcome(place: dict[str, Path], outputs: Path, model: str, *overrides: str) -> xr.Dataset:
    settings = compose(
        f"model={model}",
        f"model.id={place[model]}",
        "model.dtype=float32",
        "attr=gender",
        f"data.root={place['data']}",
        f"outputs={outputs}",
        *overrides,
    )
    return run(settings, outputs / settings.run_name).dataset


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What DeSTA2.5's Whisper is asked to transcribe; it understands one thing in clips and another in silence."""
    asked: list[np.ndarray] = []

    def transcribe(_self: Desta25, waveform: np.ndarray, _module: Any) -> str:
        asked.append(waveform)
        return " Dogs are sitting by the door." if waveform.any() else " Kids are talking."

    monkeypatch.setattr(Desta25, "transcribe", transcribe)
    return asked


def roles(dataset: xr.Dataset, sample: int, role: str) -> str:
    row = dataset.isel(sample=sample)
    return "".join(
        str(text) for text, kind in zip(row["token_text"].values, row["token_role"].values, strict=True) if kind == role
    )


def test_clean_gives_both_runs_what_the_clip_says(
    place: dict[str, Path], tmp_path: Path, heard: list[np.ndarray]
) -> None:
    dataset = outcome(place, tmp_path, "desta25")  # clean is the model's default
    assert set(dataset["transcript_clean"].values) == {" Dogs are sitting by the door."}
    assert (dataset["transcript_clean"] == dataset["transcript_corrupted"]).all()
    assert all(roles(dataset, index, "transcript") == "Dogs are sitting by the door." for index in range(CLIPS))
    assert len(heard) == CLIPS
    again = outcome(place, tmp_path, "desta25", "granularity=token")
    assert len(heard) == CLIPS, "the cache has them"
    np.testing.assert_allclose(again["p_clean"], dataset["p_clean"], rtol=0, atol=1e-6)


def test_whisper_is_asked_for_real(place: dict[str, Path], tmp_path: Path) -> None:
    dataset = outcome(place, tmp_path, "desta2")
    cached = {path.read_text(encoding="utf-8") for path in (tmp_path / "transcripts").glob("*.txt")}
    assert set(dataset["transcript_clean"].values) == cached
    assert any(cached)


def test_none_and_a_text(place: dict[str, Path], tmp_path: Path, heard: list[np.ndarray]) -> None:
    silent = outcome(place, tmp_path, "desta25", "transcript=none")
    assert "transcript_clean" not in silent
    assert "transcript" not in silent["token_role"].values
    given = outcome(place, tmp_path, "desta25", "transcript='Kids are talking.'")
    assert roles(given, 0, "transcript") == "Kids are talking."
    assert not heard
    assert not np.allclose(silent["p_clean"], given["p_clean"], atol=1e-6)


def test_upstream_excludes_clips_whose_transcripts_differ_in_length(
    place: dict[str, Path], tmp_path: Path, heard: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lalm_patch.tracing.tracer.exclusion", lambda *_arguments: Exclusion.KEPT
    )  # a random model is rarely right
    dataset = outcome(place, tmp_path, "desta25", "transcript=upstream", "granularity=token")
    assert set(dataset["transcript_corrupted"].values) == {" Kids are talking."}
    assert set(dataset["exclusion"].values) == {"clean and corrupted prompt differ in length"}
    detail = str(dataset["exclusion_detail"].values[0])
    clean, corrupted = map(int, re.findall(r"give (\d+) and (\d+) positions", detail)[0])
    assert clean > corrupted
    assert np.isnan(dataset["recovery_rate"]).all()
    assert not np.isnan(dataset["p_clean"]).any()


def test_transcript_for_a_model_that_reads_none(tmp_path: Path) -> None:
    settings = compose("transcript=clean", "attr=gender", "data.limit=2")
    with pytest.raises(ConfigError, match="transcript=clean: demo reads no transcript"):
        run(settings, tmp_path)

"""The dataset of a run, recomputed by hand from what was stored."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lalm_patch.results.dataset import build_dataset
from lalm_patch.storage.run_store import SampleRecord

OPTIONS = ("male", "female")


def record(
    name: str, label: str, exclusion: str, tokens: int, shape: tuple[int, ...] | None, seed: int
) -> SampleRecord:
    rng = np.random.default_rng(seed)
    arrays = {
        "base_option_logits": rng.normal(size=(2, 2)).astype(np.float32),
        "base_logsumexp": rng.normal(3, 0.1, size=2).astype(np.float32),
        "base_top_id": np.array([7, 8]),
    }
    if shape is not None:
        arrays |= {
            "patched_option_logits": rng.normal(size=(*shape, 2)).astype(np.float32),
            "patched_logsumexp": rng.normal(3, 0.1, size=shape).astype(np.float32),
            "patched_top_id": np.zeros(shape, np.int64),
        }
    meta = {
        "label": label,
        "group": name[:1],
        "exclusion": exclusion,
        "detail": "",
        "samples": 24000,
        "positions": 50,
        "audio_positions": 30,
        "first_text_position": 40,
        "token_ids": list(range(tokens)),
        "token_texts": [f"t{i}" for i in range(tokens)],
        "token_roles": ["early"] * (tokens - 1) + ["last"],
        "option_order": list(OPTIONS),
    }
    return SampleRecord(name, arrays, meta)


SAMPLES = [
    record("a1", "female", "", 3, (2, 3), 1),
    record("b2", "male", "clean prediction wrong", 3, None, 2),
    record("c3", "male", "", 2, (2, 2), 3),
]


def test_every_number_follows_from_the_stored_logits() -> None:
    dataset = build_dataset(SAMPLES, OPTIONS, ("layer", "token"), {"layer": (0, 5)}, {"title": "t"})
    assert dict(dataset.sizes) == {"sample": 3, "layer": 2, "token": 3, "option": 2}
    assert dataset.layer.values.tolist() == [0, 5]
    for index, answer in ((0, 1), (2, 0)):
        arrays = SAMPLES[index].arrays
        clean, corrupted = (
            np.exp(arrays["base_option_logits"][run, answer] - arrays["base_logsumexp"][run]) for run in (0, 1)
        )
        patched = np.exp(arrays["patched_option_logits"][..., answer] - arrays["patched_logsumexp"])
        expected = (patched - corrupted) / (clean - corrupted)
        width = patched.shape[1]
        np.testing.assert_allclose(dataset.recovery_rate[index, :, :width], expected, rtol=1e-4)
        assert np.isnan(dataset.recovery_rate[index, :, width:]).all()
        assert float(dataset.p_clean[index]) == pytest.approx(float(clean))
        assert float(dataset.p_corrupted[index]) == pytest.approx(float(corrupted))


def test_excluded_samples_stay_with_their_reason() -> None:
    dataset = build_dataset(SAMPLES, OPTIONS, ("layer", "token"), {"layer": (0, 5)}, {})
    excluded = dataset.sel(sample="b2")
    assert str(excluded.exclusion.values) == "clean prediction wrong"
    assert not bool(excluded.kept)
    assert np.isnan(excluded.recovery_rate).all()
    assert np.isfinite(excluded.p_clean)
    assert dataset.attrs["n_kept"] == 2
    assert json.loads(dataset.attrs["n_excluded_by_reason"]) == {"clean prediction wrong": 1}


def test_clips_that_were_never_run_are_missing_not_zero() -> None:
    unusable = SampleRecord(
        "x",
        {},
        {**SAMPLES[0].meta, "exclusion": "clip unusable", "token_ids": [], "token_texts": [], "token_roles": []},
    )
    dataset = build_dataset([unusable, SAMPLES[0]], OPTIONS, ("layer", "token"), {"layer": (0, 5)}, {})
    row = dataset.sel(sample="x")
    assert np.isnan(row.p_clean)
    assert np.isnan(row.option_logit_clean).all()
    assert str(row.prediction_clean.values) == ""
    assert row.token_text.values.tolist() == ["", "", ""]


def test_variables_say_what_they_are() -> None:
    dataset = build_dataset(SAMPLES, OPTIONS, ("layer", "token"), {"layer": (0, 5)}, {})
    for name, variable in dataset.variables.items():
        assert variable.attrs.get("long_name") or name in ("sample",), name
    for name in ("recovery_rate", "p_patched", "option_logit_patched"):
        assert "units" in dataset[name].attrs
        assert "NaN" in dataset[name].attrs["missing"]

"""docs/analysis.md: every example is run, and what it recomputes is what the package reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import (
    KEPT,
    accuracy,
    exclusion_table,
    fusion,
    mean_recovery,
    object_effect,
    over_layers,
    peak_layer,
    ratio_of_means,
    segment_profiles,
)

TEXT = (Path(__file__).parent.parent / "docs" / "analysis.md").read_text(encoding="utf-8")


def examples() -> dict[str, str]:
    """Python of each section of the page."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", TEXT, flags=re.MULTILINE)[1:]:
        title, body = section.split("\n", 1)
        found[title] = "\n".join(re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL))
    return found


def run_page(monkeypatch: pytest.MonkeyPatch, folder: Path, token_wise: bool) -> tuple[xr.Dataset, dict[str, Any]]:
    planted = Planted(layers=12, centre=6.0, object_peak=0.3)
    dataset = simulate(planted, 3, groups=12, token_wise=token_wise, name=("voxtral", "language"))
    reasons = dataset["exclusion"].values.copy()
    reasons[1], reasons[4:6] = "clean prediction wrong", "corrupted prediction right"
    dataset = dataset.assign(exclusion=("sample", reasons), kept=("sample", reasons == ""))
    dataset["prediction_clean"][1] = "dog"
    dataset.to_netcdf(folder / "result.nc", engine="h5netcdf")
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    for title, code in examples().items():
        if token_wise or title != "Token-wise runs":
            exec(compile(code, f"docs/analysis.md, {title}", "exec"), scope)
    scope["ds"].close()
    return dataset, scope


@pytest.mark.parametrize("token_wise", [False, True])
def test_the_page_recomputes_what_the_package_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token_wise: bool
) -> None:
    dataset, scope = run_page(monkeypatch, tmp_path, token_wise)
    recovery = mean_recovery(dataset)
    assert scope["n_kept"] == dataset.sizes["sample"] - 3
    assert scope["n_groups"] == int(recovery["groups"].max())
    right = accuracy(dataset)
    assert scope["right"] == pytest.approx([right.clean, right.corrupted])
    np.testing.assert_allclose(scope["curve"], [cell.mean for cell in over_layers(recovery)])
    np.testing.assert_allclose(scope["ratio_of_means"], ratio_of_means(dataset)["mean"])
    found = fusion(dataset)
    assert scope["depth"] == pytest.approx(found.depth.value)
    assert scope["share"] == pytest.approx(found.share.value)
    assert scope["width"] == pytest.approx(found.width.value)
    peak = peak_layer(dataset)
    assert peak is not None
    assert scope["peak"] == peak.layer
    table = exclusion_table(dataset)
    for (label, reason), count in scope["ledger"].items():
        assert count == int(table.sel(label=label, reason=reason or KEPT))
    if token_wise:
        np.testing.assert_allclose(scope["cell"], recovery["mean"])
        np.testing.assert_allclose(scope["profile"], segment_profiles(dataset)["mean"].sel(segment="object"))
        np.testing.assert_allclose(scope["effect"], object_effect(dataset).profile["mean"])

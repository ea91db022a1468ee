"""Many runs as one tree: against the runs themselves, plain numpy, and plain xarray in another process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lalm_patch.checks import Check, to_json
from lalm_patch.collect import collect, main
from lalm_patch.config import compose
from lalm_patch.errors import DataError, StoreError
from lalm_patch.results.dataset import build_dataset
from lalm_patch.storage.provenance import describe, identity
from lalm_patch.storage.run_store import RunStore, SampleRecord, open_result

SAMPLES, LAYERS, VOCABULARY = 6, {"demo": 4, "voxtral": 5}, 7.0


def sample(number: int, layers: int, options: list[str], generator: np.random.Generator) -> SampleRecord:
    """A sample with random logits, as a run would have stored it; every third one is excluded."""
    excluded = "clean prediction wrong" if number % 3 == 0 else ""
    arrays = {
        "base_option_logits": generator.normal(size=(2, len(options))).astype(np.float32),
        "base_logsumexp": np.full(2, VOCABULARY, np.float32),
        "base_top_id": np.array([1, 2]),
    }
    if not excluded:
        arrays["patched_option_logits"] = generator.normal(size=(layers, len(options))).astype(np.float32)
        arrays["patched_logsumexp"] = np.full(layers, VOCABULARY, np.float32)
    meta = {
        "label": options[number % len(options)],
        "group": f"speaker {number % 4}",
        "exclusion": excluded,
        "detail": "",
        "samples": 16000,
        "positions": 30,
        "audio_positions": 25,
        "first_text_position": 28,
        "token_ids": [5, 6],
        "token_texts": ["is", "it"],
        "token_roles": ["late", "last"],
        "option_order": options,
    }
    return SampleRecord(f"clip {number}.wav", arrays, meta)


def write(outputs: Path, *overrides: str, finished: bool = True, weights: str = "", **facts: str) -> Path:
    """A run's folder, made from random numbers; `facts` change what it says it was made with."""
    settings = compose(*overrides)
    options = list(settings.attr.options)
    layers = LAYERS[settings.model.name]
    made_with = identity(settings, f"clips of {settings.attr.name}", weights or f"weights of {settings.model.name}")
    made_with |= {key: value for key, value in facts.items() if key != "git_revision"}
    folder = outputs / settings.run_name
    generator = np.random.default_rng(sum(settings.attr.name.encode()))
    with RunStore(folder, made_with) as store:
        samples = [sample(number, layers, options, generator) for number in range(SAMPLES)]
        for record in samples:
            store.add(record.id, record.arrays, record.meta)
        if finished:
            checks = to_json([Check("first", True, 0, 1, "holds"), Check("second", len(options) > 2, 0, 1, "holds?")])
            attributes: dict[str, Any] = {**describe(settings, "made by a test"), "checks": checks, "git_revision": ""}
            attributes |= {key: value for key, value in facts.items() if key == "git_revision"}
            store.finalise(build_dataset(samples, options, ("layer",), {"layer": range(layers)}, attributes))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and two attributes; and one run that was stopped."""
    folder = tmp_path_factory.mktemp("written")
    for model in LAYERS:
        for attribute in ("gender", "animal"):
            write(folder, f"model={model}", f"attr={attribute}", "data.limit=6")
    write(folder, "attr=emotion", "data.limit=6", finished=False)
    return folder


@pytest.fixture
def outputs(written: Path, tmp_path: Path) -> Path:
    """A copy, to be added to and damaged."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


def test_tree_holds_the_runs_and_the_summary_their_numbers(outputs: Path) -> None:
    tree = collect(outputs)
    runs = [path.parent for path in outputs.glob("*/result.nc")]
    assert len(runs) == 4
    for folder in runs:
        model, attribute, granularity, _ = folder.name.split("-")
        dataset = open_result(folder)
        xr.testing.assert_identical(tree[f"runs/{model}/{attribute}/{granularity}"].to_dataset(), dataset)
        row = tree["summary"].to_dataset().sel(model=model, attribute=attribute, granularity=granularity)
        kept = dataset["kept"].values.astype(bool)
        rates = dataset["recovery_rate"].values[kept].astype(float)
        np.testing.assert_allclose(row["recovery_mean"].values[: LAYERS[model]], rates.mean(axis=0), rtol=1e-9)
        assert np.isnan(row["recovery_mean"].values[LAYERS[model] :]).all()
        assert (int(row["n_kept"]), int(row["n_samples"])) == (kept.sum(), SAMPLES)
        assert int(row["peak_layer"]) == rates.mean(axis=0).argmax()
        assert int(row["checks_passed"]) == (2 if attribute == "animal" else 1)
    stopped = {key for key in json.loads(tree.attrs["runs_left_out"]) if key.startswith("demo-emotion-layer-")}
    assert len(stopped) == 1
    assert json.loads(tree.attrs["in_common"])["data.limit"] == "6"


def test_command_writes_one_file_that_needs_only_xarray(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(outputs)])
    printed = capsys.readouterr().out
    assert printed.count("finished") == 4
    assert "stopped   6 stored" in printed
    assert "1 of 2 FAILED" in printed
    assert "4 runs; 1 left out" in printed
    script = """
import sys, xarray
tree = xarray.open_datatree(sys.argv[1])
summary = xarray.open_dataset(sys.argv[1], group="summary")
assert not [name for name in sys.modules if name.split(".")[0] in ("lalm_patch", "torch", "hydra")]
print(float(summary.recovery_mean.sel(model="voxtral", attribute="gender", granularity="layer", layer=4)))
print(float(tree["runs/voxtral/gender/layer"].recovery_rate.sel(layer=4).mean()))
"""
    command = [sys.executable, "-I", "-W", "error", "-c", script, str(outputs / "collected.nc")]
    first, second = subprocess.run(command, cwd="/", check=True, capture_output=True, text=True).stdout.split()
    assert float(first) == pytest.approx(float(second), rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "facts", "reason"),
    [
        (("data.limit=7",), {}, "data.limit differs: 6 in "),
        (("data.limit=6", "prompt.order=shuffled"), {}, "prompt.order differs: fixed in "),
        (("data.limit=6",), {"lalm_patch": "0.0.9"}, "lalm_patch differs: "),
        (("data.limit=6",), {"version of torch": "1.0"}, "version of torch differs: "),
        (("data.limit=6",), {"git_revision": "abc"}, "git_revision differs: "),
        (("data.limit=6",), {"weights": "others"}, "weights differs between runs of demo: "),
        (("data.limit=6", "model.dtype=bfloat16"), {}, "model.dtype differs between runs of demo: "),
        (("data.limit=6", "granularity.layers=[0]"), {}, "granularity.layers differs between runs of demo by layer: "),
    ],
)
def test_what_is_not_comparable_is_refused_by_name(
    outputs: Path, overrides: tuple[str, ...], facts: dict[str, str], reason: str
) -> None:
    odd = write(outputs, "attr=language", *overrides, **facts)
    with pytest.raises(DataError, match="not comparable") as caught:
        collect(outputs)
    assert reason in str(caught.value)
    assert odd.name in str(caught.value)
    key = reason.partition(" differs")[0]
    assert "recovery_rate" in collect(outputs, allow=[key])["runs/demo/language/layer"]


def test_other_clips_and_a_place_taken_twice(outputs: Path) -> None:
    write(outputs, "attr=animal", "data.limit=6", "seed=1", clips="others")
    with pytest.raises(DataError, match="clips differs between runs of animal") as caught:
        collect(outputs)
    assert "2 runs are demo/animal/layer: " in str(caught.value)
    with pytest.raises(DataError, match="2 runs are demo/animal/layer: "):
        collect(outputs, allow=["*"])
    tree = collect(outputs, where=["seed=0"])
    assert tree["summary"].sizes == {"model": 2, "attribute": 2, "granularity": 1, "layer": 5}


def test_what_a_sweep_varied_besides_becomes_a_dimension(tmp_path: Path) -> None:
    for seed in range(3):
        for attribute in ("gender", "animal"):
            write(tmp_path, f"attr={attribute}", f"data.seed={seed}", clips=f"{attribute} {seed}")
    with pytest.raises(DataError, match=r"data\.seed differs: \d in .*; \d in .*; \d in "):
        collect(tmp_path)
    tree = collect(tmp_path, by=["data.seed"])
    summary = tree["summary"].to_dataset()
    assert summary.sizes == {"model": 1, "attribute": 2, "granularity": 1, "data.seed": 3, "layer": 4}
    assert summary["n_samples"].sum() == 6 * SAMPLES
    dataset = tree["runs/demo/animal/layer/2"].to_dataset()
    assert json.loads(dataset.attrs["settings"])["data"]["seed"] == 2
    with pytest.raises(DataError, match="--by nothing: not every run has such a setting"):
        collect(tmp_path, by=["nothing"])
    write(tmp_path, "attr=animal", "data.seed=1", "data.limit=3", clips="others")
    with pytest.raises(DataError, match="clips differs between runs of animal"):
        collect(tmp_path, by=["data.seed"], allow=["data.limit"])


def test_conditions_that_name_nothing(outputs: Path) -> None:
    with pytest.raises(DataError, match=r"--where data\.limt: no run has such a setting; there are .*data\.limit"):
        collect(outputs, where=["data.limt=6"])
    with pytest.raises(DataError, match="expected key=value"):
        collect(outputs, where=["data.limit"])


def test_damage_is_refused_and_nothing_is_written(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = next(outputs.glob("voxtral-gender-*/result.nc"))
    data = bytearray(result.read_bytes())
    data[len(data) // 2] ^= 1
    result.write_bytes(data)
    with pytest.raises(StoreError, match=f"{result} was altered"):
        collect(outputs)
    with pytest.raises(SystemExit, match="was altered"):
        main([str(outputs)])
    assert "damaged" in capsys.readouterr().out
    assert not (outputs / "collected.nc").exists()


def test_a_collection_is_only_replaced_by_one_that_has_its_runs(outputs: Path) -> None:
    file = outputs / "collected.nc"
    main([str(outputs), "--where", 'model.name="demo"'])
    main([str(outputs)])
    whole = file.read_bytes()
    with pytest.raises(SystemExit, match=r"holds voxtral-.*, not collected now; use --output or --overwrite"):
        main([str(outputs), "--where", "model.name=demo"])
    assert file.read_bytes() == whole
    main([str(outputs), "--where", "model.name=demo", "--overwrite"])
    file.write_text("my notes")
    with pytest.raises(SystemExit, match="something else than a collection"):
        main([str(outputs)])
    assert file.read_text() == "my notes"
    assert [path.name for path in outputs.iterdir() if path.is_file()] == ["collected.nc"]


def test_nothing_to_collect(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        collect(tmp_path / "nowhere")
    with pytest.raises(DataError, match="none at all"):
        collect(tmp_path)
    write(tmp_path, finished=False)
    with pytest.raises(DataError, match="no finished run to collect, but 1 stopped"):
        collect(tmp_path)


def test_names_are_what_they_are_in_every_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stored settings are JSON, with escapes; what is shown and selected is the text."""
    name, question = "性别", 'Who is "it"?'
    write(tmp_path, f"attr.name='{name}'", f"attr.question='{question}'")
    write(tmp_path, f"attr.name='{name}'", "attr.question='谁在说话'")
    main([str(tmp_path), "--by", "attr.question"])
    tree = xr.open_datatree(tmp_path / "collected.nc")
    summary = tree["summary"].to_dataset()
    assert summary.sel(attribute=name).sizes["attr.question"] == 2
    assert set(summary["attr.question"].values) == {question, "谁在说话"}
    assert summary["n_kept"].sel({"attribute": name, "model": "demo", "attr.question": question}).item() == 4
    assert name in tree.attrs["runs"]
    assert list(tree["runs/demo"].children) == [name]
    assert len(collect(tmp_path, where=[f"attr.name={name}", f"attr.question={question}"])["runs"].leaves) == 1
    with pytest.raises(DataError, match=r"attr\.question differs between runs of 性别: .*谁在说话"):
        collect(tmp_path)

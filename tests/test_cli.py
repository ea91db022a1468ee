"""The command line as a user meets it: real processes, real exit codes, real signals."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
import pytest
import xarray as xr
from conftest import GENDER, write_sakura
from tiny_models import save_tiny_qwen2_audio

from lalm_patch.storage.journal import snapshot


def start(folder: Path, *arguments: str) -> commands.Forked:
    return commands.start(folder, *commands.LALM_PATCH, *arguments)


def run(folder: Path, *arguments: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return commands.run(folder, *commands.LALM_PATCH, *arguments, fresh=fresh)


def refused(folder: Path, *arguments: str, fresh: bool = False) -> str:
    """The message of a command that must fail: one sentence, no traceback, a non-zero status."""
    done = run(folder, *arguments, fresh=fresh)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def tiny(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for a run of a random tiny model on a small data set."""
    root = write_sakura(tmp_path_factory.mktemp("data"), GENDER, clips=16)
    return (
        "model=qwen2_audio",
        f"model.id={checkpoints['qwen2_audio']}",
        "model.dtype=float32",
        "attr=gender",
        f"data.root={root}",
    )


def test_a_model_that_cannot_hear_stops_the_run(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """Its projector is cut: whatever the clip, the decoder gets the same."""
    deaf = save_tiny_qwen2_audio(tmp_path / "deaf", cut_audio=True)
    message = refused(tmp_path, *tiny, f"model.id={deaf}")
    assert "audio_reaches_model: FAILED" in message
    assert "look at the audio encoder, the connector and the processor" in message
    assert not list(tmp_path.rglob("result.nc"))


def result_of(folder: Path, pattern: str) -> Path:
    found = list((folder / "outputs").glob(f"{pattern}/result.nc"))
    assert len(found) == 1
    return found[0]


def test_default_command(tmp_path: Path) -> None:
    """No argument: the demo model on the demo corpus, a summary, a dataset and a figure."""
    done = run(tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    path = result_of(tmp_path, "demo-emotion-layer-*")
    with xr.open_dataset(path) as dataset:
        kept = dataset.recovery_rate[dataset.kept.values.astype(bool)]
        first, end = (int(x) for x in dataset.attrs["planted_attention_layers"].strip("[]").split(","))
        assert kept.sizes["sample"] >= 10
        np.testing.assert_allclose(kept.sel(layer=slice(None, first - 1)), 0, atol=1e-4)
        np.testing.assert_allclose(kept.sel(layer=slice(end - 1, None)), 1, atol=1e-4)
    assert (path.parent / "figure.png").stat().st_size > 10_000
    assert (path.parent / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert str(path.relative_to(tmp_path)) in done.stdout
    again = run(tmp_path)
    assert again.returncode == 0
    assert "finished" in again.stderr


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("model=voxtrall", ("demo", "qwen2_audio", "voxtral")),
        ("attr=colour", ("animal", "emotion", "gender", "language")),
        ("granularity=word", ("layer", "token")),
        ("engine=magic", ("auto", "direct", "replay")),
        ("corruption=fire", ("silence",)),
    ],
)
def test_wrong_group_name_answers_with_the_names(tmp_path: Path, override: str, names: tuple[str, ...]) -> None:
    message = refused(tmp_path, override, fresh=override.startswith("model"))
    assert f"{override}: expected one of " in message
    for name in names:
        assert re.search(rf"\b{name}\b", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("modle=demo",), "modle: there is no such setting; the nearest is model"),
        (("data.lmit=3",), "data.lmit"),
        (("data.limit=many",), "data.limit=many: expected a whole number from 1, or null"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
        (("prompt.order=sorted",), "prompt.order=sorted: expected one of fixed, shuffled"),
        (("model.dtype=int8",), "model.dtype=int8: expected one of float32, bfloat16, float16"),
        (("data.limit=0",), "data.limit=0: expected a whole number from 1, or null"),
        (("data=sakura", "data.root=/no/such/place"), "/no/such/place"),
        (("model=voxtral", "model.id=./nowhere", "data=demo"), "model.id=./nowhere: no such folder"),
        (("granularity.layers=[99]",), "the model has decoder layers 0 to 7"),
    ],
)
def test_what_cannot_run_says_so_in_a_sentence(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    fresh = arguments[0] in ("--frobnicate", "prompt.order=sorted")
    assert message in refused(tmp_path, *arguments, fresh=fresh)


def test_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    data = write_sakura(tmp_path, GENDER, clips=2)
    message = refused(tmp_path, "model=voxtral", "attr=gender", f"data.root={data}")
    assert "mistralai/Voxtral-Mini-3B-2507: not in the local cache, and the hub cannot be reached" in message


def test_bad_clip_stops_before_anything_is_computed_or_is_left_out(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    root = write_sakura(tmp_path, GENDER, clips=6)
    bad = root / "data" / "Gender" / "audio" / "female_01.wav"
    bad.write_bytes(bad.read_bytes()[:5000])
    arguments = (*tiny[:-1], f"data.root={root}")
    message = refused(tmp_path, *arguments)
    assert str(bad) in message
    assert "data.bad_clips=exclude" in message
    assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob("*/journal.bin"))
    done = run(tmp_path, *arguments, "data.bad_clips=exclude")
    assert done.returncode == 0, done.stderr
    with xr.open_dataset(result_of(tmp_path, "qwen2_audio-gender-layer-*")) as dataset:
        row = dataset.sel(sample="female_01.wav")
        assert str(row.exclusion.values) == "clip unusable"
        assert "female_01.wav" in str(row.exclusion_detail.values)
        assert np.isnan(row.p_clean)
        assert dataset.sizes["sample"] == 6


def test_empty_selection(tmp_path: Path) -> None:
    root = write_sakura(tmp_path, GENDER, clips=1)
    table = root / "data" / "Gender" / "metadata.csv"
    table.write_text(table.read_text().splitlines()[0] + "\r\n")
    assert str(table) in refused(tmp_path, "attr=gender", f"data.root={root}")


def test_two_settings_never_share_a_folder(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    for extra in ("data.limit=2", "data.limit=3", "prompt.order=shuffled"):
        assert run(tmp_path, *tiny, "data.limit=2", extra).returncode == 0
    assert len(list((tmp_path / "outputs").iterdir())) == 3


def test_killed_run_goes_on_and_ends_as_if_undisturbed(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    slow = (*tiny, "granularity=token", "engine=direct", "data.limit=8")
    assert run(tmp_path, *slow, "outputs=reference").returncode == 0
    reference = next((tmp_path / "reference").glob("*/result.nc"))
    stored = 0
    for _ in range(2):
        process = start(tmp_path, *slow)
        stored = _wait_for_growth(tmp_path, process, beyond=stored)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not list((tmp_path / "outputs").glob("*/result.nc"))
    done = run(tmp_path, *slow)
    assert done.returncode == 0, done.stderr
    assert "going on:" in done.stderr
    with xr.open_dataset(reference) as expected, xr.open_dataset(result_of(tmp_path, "*")) as resumed:
        xr.testing.assert_identical(resumed.drop_attrs(deep=False), expected.drop_attrs(deep=False))
        differing = {key for key in expected.attrs if expected.attrs[key] != resumed.attrs.get(key)}
        assert differing <= {"created", "command", "settings", "seconds_of_last_process"}


def _wait_for_growth(folder: Path, process: commands.Forked | subprocess.Popen[str], beyond: int) -> int:
    """Until more samples are stored than before; how many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        for journal in (folder / "outputs").glob("*/journal.bin"):
            if (stored := len(snapshot(journal)[1])) > beyond:
                return stored
        time.sleep(0.005)
    raise TimeoutError("no sample was stored within two minutes")


def test_interrupt_keeps_what_is_done(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    process = commands.start_fresh(tmp_path, *commands.LALM_PATCH, *tiny, "granularity=token", "engine=direct")
    _wait_for_growth(tmp_path, process, beyond=0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert "Traceback" not in err


def test_result_opens_without_the_package(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    assert run(tmp_path, *tiny, "data.limit=4").returncode == 0
    path = result_of(tmp_path, "*")
    script = (
        "import sys, json, xarray as xr\n"
        f"ds = xr.open_dataset({str(path)!r})\n"
        "settings = json.loads(ds.attrs['settings'])\n"
        "assert settings['attr']['name'] == 'gender' and json.loads(ds.attrs['versions'])['torch']\n"
        "assert ds.attrs['model_revision'] and json.loads(ds.attrs['checks'])\n"
        "assert not any(name.split('.')[0] in ('lalm_patch', 'torch', 'nnsight') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

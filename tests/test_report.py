"""The page of a sweep, in a real browser: it responds, says nothing on the console, and shows hostile text as text."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xarray as xr
from browser import MILLISECONDS, chromium

from benchmarks.simulation import ROLES, Planted, simulate
from lalm_patch.analysis import fusion
from lalm_patch.checks import Check, to_json
from lalm_patch.errors import StoreError
from lalm_patch.report import make_report
from lalm_patch.report.__main__ import main
from lalm_patch.storage.run_store import RunStore

HOSTILE = "<script>window.broken = true</script>"
BREAKOUT = "</script><img src=x onerror='window.broken = true'>"


def store(dataset: xr.Dataset, folder: Path) -> None:
    """A finished run's folder with this dataset."""
    with RunStore(folder, {"made for": folder.name}, fsync=False) as run:
        for sample in dataset["sample"].values:
            run.add(str(sample), {}, {})
        run.finalise(dataset)


def corpus(root: Path, names: list[str]) -> Path:
    """A data set in SAKURA's layout whose clips are tones."""
    audio = root / "data" / "Pet" / "audio"
    audio.mkdir(parents=True)
    lines = ["file,attribute_label,single_instruction,single_answer,multi_instruction,multi_answer"]
    for index, name in enumerate(names):
        tone = 0.3 * np.sin(2 * np.pi * (300 + 20 * index) * np.arange(8000) / 16_000)
        soundfile.write(audio / name, tone, 16_000, subtype="PCM_16")
        lines.append(f"{name},{'cat' if index else 'dog'},,,,")
    (audio.parent / "metadata.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


def heard(run: xr.Dataset, root: Path) -> xr.Dataset:
    """The run, its clips lying in a corpus on this machine."""
    names = [f"{name}.wav" for name in run["sample"].values]
    settings = json.loads(run.attrs["settings"])
    settings["attr"] |= {"question": "Which?", "options": ["cat", "dog"], "response": "It is", "folder": "Pet"}
    settings["data"] = {"name": "sakura", "root": str(corpus(root, names)), "limit": None, "seed": 0}
    return run.assign_coords(sample=np.array(names, object)).assign_attrs(settings=json.dumps(settings))


def hostile(run: xr.Dataset) -> xr.Dataset:
    """The run with markup wherever text comes from data."""
    texts = run["token_text"].values.copy()
    texts[:, 5], texts[:, 6] = HOSTILE, BREAKOUT
    settings = json.loads(run.attrs["settings"])
    settings["attr"]["name"] = HOSTILE
    check = Check.at_most(BREAKOUT, 2.0, 1.0, HOSTILE)
    labels = np.array([HOSTILE] * run.sizes["sample"], object)
    names = np.array([f"{BREAKOUT}{index}" for index in range(run.sizes["sample"])], object)
    named = run.assign_coords(option=np.array([HOSTILE, "dog"], object), label=("sample", labels), sample=names)
    attributes = {
        "settings": json.dumps(settings),
        "checks": to_json([check]),
        "command": BREAKOUT,
        "model_id": HOSTILE,
    }
    return named.assign(token_text=(("sample", "token"), texts)).assign_attrs(attributes)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    planted = Planted(layers=10, centre=4.0, scale=0.8, object_peak=0.3)
    layer = simulate(planted, 0, groups=6, name=("voxtral", "pet"))
    store(heard(layer, tmp_path_factory.mktemp("corpus")), root / "a-layer")
    store(hostile(simulate(planted, 1, groups=6, token_wise=True, name=("voxtral", "pet"))), root / "b-token")
    return root


def test_the_page_in_a_browser(sweep: Path) -> None:
    page_file = make_report(sweep, clips=4)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(MILLISECONDS)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())

        # One hears the clip: the sound is decoded, half a second long.
        page.wait_for_function("document.getElementById('sound').duration > 0")
        assert page.evaluate("document.getElementById('sound').duration") == pytest.approx(0.5, abs=0.01)
        assert page.locator("#heat td").count() == 10
        first = page.locator("#about").inner_text()
        page.select_option("#clip", "1")
        assert page.locator("#about").inner_text() != first

        # Token-wise: a cell per layer and token; stepping through the layers changes the strip.
        page.select_option("#run", "1")
        assert page.locator("#heat td").count() == 10 * len(ROLES)
        assert "No sound" in page.locator("#silent").inner_text()
        colours = "[...document.querySelectorAll('#strip span')].map(x => getComputedStyle(x).backgroundColor).join()"
        seen = set()
        for layer in range(10):
            page.locator("#layer").fill(str(layer))
            assert page.locator("#layer-name").inner_text() == str(layer)
            seen.add(page.evaluate(colours))
        assert len(seen) == 10
        page.locator("#heat tr").nth(2).locator("td").first.click()
        assert page.locator("#layer-name").inner_text() == "7"

        # Markup from data is text, everywhere.
        assert HOSTILE in page.locator("#strip").inner_text()
        assert BREAKOUT in page.locator("#about").inner_text()
        page.locator("details").nth(1).locator("summary").click()
        for text in (HOSTILE, BREAKOUT):
            assert page.get_by_text(text, exact=False).count() > 0
        assert page.evaluate("window.broken") is None
        assert page.locator("img[src=x]").count() == 0
        page.screenshot(path=sweep / "page.png", full_page=True)
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_the_page_says_what_the_dataset_says(sweep: Path) -> None:
    text = html.unescape(make_report(sweep, sweep / "other.html", clips=1, audio=False).read_text())
    layer = xr.open_dataset(sweep / "a-layer" / "result.nc")
    assert str(fusion(layer).depth) in text
    assert f"{layer.sizes['sample']} of {layer.sizes['sample']}" in text
    assert "FAILED" in text
    assert "0 of 1 checks passed" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    for name in ("figure2", "segments", "ledger"):
        for kind in ("png", "pdf", "csv"):
            assert (sweep / "figures" / f"{name}.{kind}").stat().st_size > 0
    assert "data:audio" not in text


def test_a_folder_without_runs_is_answered_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "there is no finished run" in capsys.readouterr().err
    with pytest.raises(StoreError, match="no finished run"):
        make_report(tmp_path)


def test_few_groups_are_said_to_be_few_wherever_the_page_has_a_number(tmp_path: Path) -> None:
    """Three speakers, two models that differ as much as can be: p at its floor, no intervals, claims undecided."""
    for number, (model, centre) in enumerate((("qwen_audio", 23.0), ("voxtral", 3.0))):
        run = simulate(Planted(32, centre), number, groups=3, name=(model, "gender"))
        store(run, tmp_path / f"{model}-layer")
    store(simulate(Planted(32), 2, 3, token_wise=True, name=("voxtral", "language")), tmp_path / "voxtral-token")
    text = html.unescape(make_report(tmp_path, clips=1, audio=False).read_text())
    few = "too few groups: 3, expected at least 6"
    differences, tokens = (
        text.partition(start)[2].partition("</table>")[0] for start in ("Differences in", "Option to")
    )
    assert "<td>0.25 (its floor: 3 groups cannot give less)</td>" in differences
    assert "<td>3</td><td>permutation test, runs exchanged in 3 shared groups: all 8 arrangements" in differences
    assert few in differences
    assert few in tokens
    assert re.search(r"<td>\d+</td><td>3</td></tr>", tokens)
    assert 'class="supported"' not in text
    assert 'class="contradicted"' not in text
    assert "no interval, too few groups: 3, expected at least 9" in text
    assert "nan" not in text.partition("<script")[0].replace("provenance", "")
    for name in ("figure2", "segments"):
        lines = (tmp_path / "figures" / f"{name}.csv").read_text().splitlines()
        assert all(f'"{few}"' in line for line in lines[1:])

"""What takes long before the first cell says what it is doing and how far it is."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest

import lalm_patch
from lalm_patch import terminal
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.choose import PROOF_STEPS, choose_engine
from lalm_patch.models import LALM
from lalm_patch.models.proof import make_pair, passes, prove
from lalm_patch.settings import EngineSettings
from lalm_patch.stimuli import Prompt
from lalm_patch.terminal import Waiting

TICK = 0.05


def test_a_line_every_so_often_with_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", TICK)
    caplog.set_level(logging.INFO)
    with Waiting("loading it") as waiting:
        waiting.step("weights")
        time.sleep(3 * TICK)
        waiting.step("proving, first", 0, 4)
        time.sleep(TICK)
        waiting.step("proving, second", 1, 4)
        time.sleep(3 * TICK)
    lines = [record.message for record in caplog.records]
    assert re.search(r"^loading it: weights; 00:00 so far$", lines[0])
    assert any(re.search(r"proving, second \(1 of 4 done, about 00:0\d left\)", line) for line in lines)
    count = len(lines)
    time.sleep(3 * TICK)
    assert len(caplog.records) == count  # silent when it is over


def test_a_slow_start_speaks(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, each check and the clips are slowed down, and each is heard of."""
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", TICK)
    caplog.set_level(logging.INFO)
    said = Waiting.step

    def slowly(self: Waiting, name: str, done: int = 0, total: int = 0) -> None:
        said(self, name, done, total)
        time.sleep(2.5 * TICK)

    monkeypatch.setattr(Waiting, "step", slowly)
    lalm_patch.trace("attr=gender", "data.limit=2", f"outputs={tmp_path}")
    text = caplog.text
    for part in (
        "looking at the clips: reading (1 of 2 done, about 00:00 left)",
        "loading demo: reading every byte of its files",
        "loading demo: loading weights",
        "loading demo: proving the model, restore_all (3 of 13 done, about",
        "loading demo: proving the model, noise_floor (12 of 13 done, about",
    ):
        assert part in text


def test_the_proof_does_no_pass_twice(lalm: LALM, prompt: Prompt) -> None:
    """Whole forward passes: the direct engine's cells differ in what is put in, and no other pass is made again."""
    pair = make_pair(lalm, prompt, "chat")
    whole: list[int] = []
    handle = lalm.module.register_forward_hook(lambda *_: whole.append(1))
    told: list[str] = []
    prove(lalm, pair, told.append)
    assert len(told) == passes(exact=True)
    assert len(whole) == passes(exact=True) - 1  # one of them is of the decoder alone
    engine, _ = choose_engine(lalm, EngineSettings("auto"), pair, (1, 2), told=told.append)
    handle.remove()
    assert isinstance(engine, ReplayEngine)
    assert len(told) == passes(exact=True) + PROOF_STEPS
    # noise, silence, restored; the states of noise; six cells
    assert len(whole) == 3 + 1 + 6


def test_base_runs_of_the_proof_are_the_direct_engine_s(lalm: LALM, prompt: Prompt) -> None:
    pair = make_pair(lalm, prompt, "chat")
    prove(lalm, pair)
    fresh = DirectEngine(lalm)._base_logits(pair.noise, pair.silence)
    assert (fresh[0] - pair.logits["noise"][0]).abs().max() == 0
    assert (fresh[1] - pair.logits["silence"][0]).abs().max() == 0

"""The packaged corpus: a few synthetic clips in SAKURA's layout, so that everything runs without a download."""

from __future__ import annotations

from pathlib import Path

from lalm_patch.errors import DataError
from lalm_patch.stimuli.prompt import Attribute
from lalm_patch.stimuli.records import Record
from lalm_patch.stimuli.sakura import load_sakura

DEMO_CORPUS = Path(__file__).resolve().parents[1] / "data" / "demo" / "corpus"


def load_demo(attribute: Attribute, limit: int | None = None, seed: int = 0) -> list[Record]:
    """Records of the packaged corpus; arguments and errors as in `load_sakura`."""
    if not DEMO_CORPUS.is_dir():
        raise DataError(
            f"demo corpus: expected it inside the package at {DEMO_CORPUS}, found none; reinstall lalm_patch"
        )
    return load_sakura(attribute, DEMO_CORPUS, limit, seed)

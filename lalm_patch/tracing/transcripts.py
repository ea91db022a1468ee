"""What a model that reads a transcript beside the audio is given: the setting, and each clip transcribed once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from lalm_patch.errors import ConfigError
from lalm_patch.models import LALM
from lalm_patch.settings import RunSettings

CACHE = "transcripts"
EXAMPLE = " This is what is said."
WRITTEN = ("clean", "upstream")
OWN_WORDS = (*WRITTEN, "none")


class Transcripts:
    """Transcripts of a run.

    Args:
        lalm: the model.
        settings: `transcript`, or the model's own; `outputs`, where the cache lies: one file per clip and transcriber,
            shared by all runs, so that a clip is transcribed once.

    Attributes:
        setting: clean, none, upstream, a text, or None for a model that reads no transcript.

    Raises:
        ConfigError: a transcript for a model that reads none, one to be written by a model that writes none, or an
            empty text.
    """

    def __init__(self, lalm: LALM, settings: RunSettings) -> None:
        self.lalm = lalm
        self.setting = settings.transcript if settings.transcript is not None else settings.model.transcript
        if not lalm.family.reads_transcript:
            if self.setting is not None:
                raise ConfigError(f"transcript={self.setting}: {settings.model.name} reads no transcript; leave it out")
        elif self.setting is None:
            self.setting = "clean"
        if self.setting is not None and not self.setting.strip():
            raise ConfigError("transcript: expected clean, none, upstream or a text, got an empty one; use none")
        if self.setting in WRITTEN and not lalm.family.transcribes(lalm.module):
            raise ConfigError(
                f"transcript={self.setting}: {settings.model.name} has an encoder alone and cannot write transcripts; "
                "set transcript=none, or to the text itself"
            )
        self._folder = Path(settings.outputs) / CACHE

    @property
    def example(self) -> str | None:
        """A transcript for prompts that belong to no clip."""
        if self.setting is None or self.setting == "none":
            return None
        return EXAMPLE if self.setting in OWN_WORDS else self.setting

    def pair(self, clean: np.ndarray, corrupted: np.ndarray, known: str | None = None) -> tuple[str | None, str | None]:
        """Transcripts of the clean and of the corrupted run.

        Args:
            clean: the clip, float32 [samples] at 16 kHz.
            corrupted: what the corrupted run hears.
            known: the clip's transcript, where the data has one: it is not transcribed then.
        """
        if known is not None and self.setting == "clean":
            return known, known
        if self.setting is None or self.setting == "none":
            return None, None
        if self.setting == "clean":
            heard = self._heard(clean)
            return heard, heard
        if self.setting == "upstream":
            return self._heard(clean), self._heard(corrupted)
        return self.setting, self.setting

    def _heard(self, waveform: np.ndarray) -> str:
        key = hashlib.sha256(f"{self.lalm.commit}\0{type(self.lalm.family).__name__}\0".encode())
        key.update(np.ascontiguousarray(waveform, np.float32).tobytes())
        path = self._folder / f"{key.hexdigest()[:32]}.txt"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        text = self.lalm.family.transcribe(waveform, self.lalm.module)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Renamed into place: jobs that share the folder never read half a transcript.
        with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".part", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
        return text

"""A file's bytes in; the same audio, proven to be all there, and what was repaired or ignored, out.

libsndfile reads a truncated WAV, a WAV whose header lies, and an Ogg stream that lacks a page without a word. A clip
damaged like that still gives numbers, so completeness is shown from the container before decoding is trusted.
"""

from __future__ import annotations

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.containers.flac import FlacFile
from lalm_patch.stimuli.containers.mpeg import MpegFile, is_mpeg
from lalm_patch.stimuli.containers.ogg import OggFile
from lalm_patch.stimuli.containers.proven import REPLACE, REWRITE, ProvenFile
from lalm_patch.stimuli.containers.wav import WAV_MAGIC, WavFile

__all__ = ["REPLACE", "REWRITE", "ProvenFile", "open_container"]


def open_container(data: bytes, name: str) -> ProvenFile:
    """The container, known by its content and not by the file's name.

    Raises:
        AudioError: no container that is read here, or one that is not complete or contradicts itself.
    """
    if not data:
        raise AudioError(f"{name}: expected an audio file, got an empty one (0 bytes); {REPLACE}", "empty")
    if data.startswith(b"version https://git-lfs"):
        raise AudioError(
            f"{name}: expected audio, got a Git LFS pointer; run `git lfs pull` where the clip is kept",
            "Git LFS pointer",
        )
    if data[:4] == b"fLaC":
        return FlacFile(data, name)
    if data[:4] in WAV_MAGIC and data[8:12] == b"WAVE":
        return WavFile(data, name)
    if data[:4] == b"OggS":
        return OggFile(data, name)
    if is_mpeg(data):
        return MpegFile(data, name)
    raise AudioError(
        f"{name}: expected a WAV, FLAC, MP3 or Ogg file, got one that starts with {data[:12]!r}; if it is audio, "
        "convert it, for example `ffmpeg -i CLIP -c:a flac CLIP.flac`, else replace it",
        "another format",
    )

"""MP3 and Ogg: known by what they hold, read whole or not at all."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from lalm_patch.errors import AudioError
from lalm_patch.stimuli import read_audio, read_clip
from lalm_patch.stimuli.containers.ogg import checksum

SECONDS = 1.5
KINDS = {
    "mp3": ("MP3", "MPEG_LAYER_III", 44_100),
    "mp3 of 16 kHz": ("MP3", "MPEG_LAYER_III", 16_000),
    "mp3 of 8 kHz": ("MP3", "MPEG_LAYER_III", 8_000),
    "vorbis": ("OGG", "VORBIS", 44_100),
    "opus": ("OGG", "OPUS", 48_000),
}


def tone(rate: int) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * 440 * np.arange(int(SECONDS * rate)) / rate)


def encoded(kind: str, channels: int = 2) -> bytes:
    form, subtype, rate = KINDS[kind]
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(rate)] * channels, axis=1), rate, format=form, subtype=subtype)
    return file.getvalue()


FILES = {kind: encoded(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_comes_back(kind: str, channels: int) -> None:
    waveform = read_audio(encoded(kind, channels), "clip")
    assert abs(len(waveform) / 16_000 - SECONDS) < 0.06  # MP3 decoders may keep the encoder's delay
    middle = waveform[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(8_000)))
    assert spectrum.argmax() == 220  # bins of 2 Hz
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.4 / np.sqrt(2), rel=0.02)


def test_names_do_not_matter(tmp_path: Path) -> None:
    for kind, name in (("mp3", "a.wav"), ("vorbis", "b.mp3"), ("opus", "c.flac")):
        (tmp_path / name).write_bytes(FILES[kind])
        np.testing.assert_array_equal(read_audio(tmp_path / name, "clip"), read_audio(FILES[kind], "clip"))
    wav = io.BytesIO()
    soundfile.write(wav, tone(16_000), 16_000, format="WAV", subtype="FLOAT")
    (tmp_path / "d.mp3").write_bytes(wav.getvalue())
    np.testing.assert_allclose(read_audio(tmp_path / "d.mp3", "clip"), tone(16_000), atol=1e-7)


def id3(size: int, footer: bool = False) -> bytes:
    synchsafe = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0" + (b"\x10" if footer else b"\0") + synchsafe + bytes(size) + (bytes(10) if footer else b"")


@pytest.mark.parametrize(
    ("before", "behind"),
    [(id3(300), b""), (id3(20_000), b""), (b"", b"TAG" + bytes(125)), (id3(5), b"APETAGEX" + bytes(40))],
    ids=["tag", "long tag", "old tag", "both"],
)
def test_tags_around_an_mp3_are_no_sound(before: bytes, behind: bytes) -> None:
    clip = read_clip(before + FILES["mp3"] + behind, "clip")
    np.testing.assert_allclose(clip.waveform, read_audio(FILES["mp3"], "clip"), atol=1e-6)


def test_what_cannot_be_proven_is_noted() -> None:
    declared = read_clip(FILES["mp3"], "clip")
    assert declared.notes == ()
    start = FILES["mp3"].find(b"Info") if b"Info" in FILES["mp3"] else FILES["mp3"].find(b"Xing")
    assert 0 < start < 60
    undeclared = FILES["mp3"][:start] + b"\0\0\0\0" + FILES["mp3"][start + 4 :]
    assert "does not say how long it is" in read_clip(undeclared, "clip").notes[0]
    assert "zero bytes behind" in read_clip(FILES["mp3"] + bytes(500), "clip").notes[0]
    assert "bytes behind the end of the Ogg" in read_clip(FILES["opus"] + b"more", "clip").notes[0]


def test_the_checksum_is_that_of_the_standard() -> None:
    """Against zlib's CRC-32, which is the same polynomial with reflected bits, preset and inverted."""
    generator = np.random.default_rng(0)
    for length in (0, 1, 5, 300):
        data = generator.bytes(length)
        reflect = {byte: int(f"{byte:08b}"[::-1], 2) for byte in range(256)}
        mirrored = bytes(reflect[byte] for byte in data)
        # With a preset of 0 and no inversion: undo zlib's by linearity in the preset.
        value = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
        assert checksum(data) == int(f"{value:032b}"[::-1], 2)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_prefix_is_read(kind: str, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(FILES[kind]) - 1))
    with pytest.raises(AudioError, match=r"^clip: expected "):
        read_audio(FILES[kind][:end], "clip")


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), flipped=st.integers(1, 255))
def test_a_damaged_ogg_is_refused(kind: str, data: st.DataObject, flipped: int) -> None:
    position = data.draw(st.integers(0, len(FILES[kind]) - 1))
    whole = FILES[kind]
    damaged = whole[:position] + bytes([whole[position] ^ flipped]) + whole[position + 1 :]
    with pytest.raises(AudioError, match=r"^clip: expected "):
        read_audio(damaged, "clip")


def test_a_page_that_is_left_out_is_missed() -> None:
    whole = FILES["opus"]
    starts = [at for at in range(len(whole)) if whole[at : at + 4] == b"OggS"]
    assert len(starts) > 3
    with pytest.raises(AudioError, match="Ogg pages without a gap, got pages 0, 1, 3"):
        read_audio(whole[: starts[2]] + whole[starts[3] :], "clip")


def test_several_streams_in_one_file_are_refused() -> None:
    one, other = FILES["opus"], FILES["vorbis"]
    (serial,) = struct.unpack_from("<I", one, 14)
    assert struct.unpack_from("<I", other, 14)[0] != serial
    with pytest.raises(AudioError, match="expected one stream, got an Ogg file of several"):
        read_audio(one + other, "clip")

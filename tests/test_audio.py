"""Files are written byte by byte with `struct`, so that what they hold is known without the library under test."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from lalm_patch.errors import AudioError, ConfigError
from lalm_patch.stimuli import CORRUPTIONS, SAMPLING_RATE, corrupt, read_audio, read_clip, silence

COUNT = 3_200  # samples: 0.2 s
RAMP = [(37 * k) % 60_001 - 30_000 for k in range(COUNT)]


def chunk(name: bytes, body: bytes, size: int | None = None, order: str = "<") -> bytes:
    padding = b"\0" * (len(body) % 2)
    return struct.pack(f"{order}4sI", name, len(body) if size is None else size) + body + padding


def wav(
    body: bytes,
    *,
    bits: int = 16,
    channels: int = 1,
    rate: int = SAMPLING_RATE,
    tag: int = 1,
    declared: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
    magic: bytes = b"RIFF",
) -> bytes:
    order = ">" if magic == b"RIFX" else "<"
    frame = channels * bits // 8
    fmt = chunk(b"fmt ", struct.pack(f"{order}HHIIHH", tag, channels, rate, rate * frame, frame, bits), order=order)
    content = b"WAVE" + before + fmt + chunk(b"data", body, declared, order) + after
    return magic + struct.pack(f"{order}I", len(content)) + content


def pcm16(values: list[int], order: str = "<") -> bytes:
    return struct.pack(f"{order}{len(values)}h", *values)


def floats(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def flac(values: np.ndarray, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, SAMPLING_RATE, format="FLAC", subtype=subtype)
    return file.getvalue()


def with_bytes(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]


WHOLE = wav(pcm16(RAMP))
WHOLE_FLAC = flac(np.array(RAMP, dtype=np.int16))
EXPECTED = np.array(RAMP) / 32_768


def test_16_bit_samples_are_exact() -> None:
    waveform = read_audio(WHOLE, "clip")
    assert waveform.dtype == np.float32
    np.testing.assert_array_equal(waveform, EXPECTED)


def test_a_path_reads_as_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(WHOLE)
    np.testing.assert_array_equal(read_audio(path, "clip"), EXPECTED)


def test_24_bit_samples_are_exact() -> None:
    values = [(8_191 * k) % 2**24 - 2**23 for k in range(COUNT)]
    body = b"".join(value.to_bytes(3, "little", signed=True) for value in values)
    np.testing.assert_array_equal(read_audio(wav(body, bits=24), "clip"), np.array(values) / 2**23)


def test_8_bit_samples_are_unsigned() -> None:
    values = [k % 256 for k in range(COUNT)]
    np.testing.assert_array_equal(read_audio(wav(bytes(values), bits=8), "clip"), (np.array(values) - 128) / 128)


def test_float_samples_keep_values_a_little_over_full_scale() -> None:
    values = [1.5, -2.0, 0.25, 0.0] * (COUNT // 4)
    np.testing.assert_array_equal(read_audio(wav(floats(values), bits=32, tag=3), "clip"), values)


def test_stereo_is_the_mean_of_its_channels() -> None:
    frames = [value for k in range(COUNT) for value in (8 * (k % 100), -4 * (k % 50))]
    expected = [(8 * (k % 100) - 4 * (k % 50)) / 2 / 32_768 for k in range(COUNT)]
    np.testing.assert_array_equal(read_audio(wav(pcm16(frames), channels=2), "clip"), expected)


def test_big_endian_wav() -> None:
    np.testing.assert_array_equal(read_audio(wav(pcm16(RAMP, ">"), magic=b"RIFX"), "clip"), EXPECTED)


def rf64(declared: int, short: int = 0xFFFFFFFF) -> bytes:
    size64 = chunk(b"ds64", struct.pack("<QQQI", 2 * COUNT + 80, declared, declared // 2, 0))
    data = wav(pcm16(RAMP), declared=short, before=size64, magic=b"RF64")
    return with_bytes(data, 4, b"\xff" * 4)


def test_rf64_takes_its_length_from_ds64() -> None:
    np.testing.assert_array_equal(read_audio(rf64(2 * COUNT), "clip"), EXPECTED)


@pytest.mark.parametrize("pad", [b"", b"\0\0\0"], ids=["chunks", "chunks and padding"])
def test_chunks_around_the_audio_are_passed_over(pad: bytes) -> None:
    extra = chunk(b"odd ", b"123") + chunk(b"LIST", b"INFOISFT\x04\0\0\0abc\0")
    np.testing.assert_array_equal(read_audio(wav(pcm16(RAMP), before=extra, after=extra + pad), "clip"), EXPECTED)


def test_an_odd_number_of_bytes_is_padded_before_the_next_chunk() -> None:
    values = [k % 256 for k in range(COUNT - 1)]
    data = wav(bytes(values), bits=8, after=chunk(b"LIST", b"abcd"))
    np.testing.assert_array_equal(read_audio(data, "clip"), (np.array(values) - 128) / 128)


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_S8", 8), ("PCM_16", 16), ("PCM_24", 24)])
def test_flac_is_exact(subtype: str, bits: int) -> None:
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (COUNT, 2))
    data = flac((values << (32 - bits)).astype(np.int32), subtype)
    np.testing.assert_array_equal(read_audio(data, "clip"), values.sum(axis=1) / 2**bits)
    with pytest.raises(AudioError, match="MD5 in the FLAC header"):
        read_audio(with_bytes(data, 26, bytes(range(1, 17))), "clip")


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_frequency_and_amplitude(rate: int) -> None:
    tone = [round(12_000 * np.sin(2 * np.pi * 1_000 * k / rate)) for k in range(rate)]
    waveform = read_audio(wav(pcm16(tone), rate=rate), "clip")
    assert waveform.shape == (SAMPLING_RATE,)
    # 1 s: bin k of the transform is k Hz. A Hann window halves the amplitude and keeps the edges out.
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(SAMPLING_RATE))) / SAMPLING_RATE * 4
    assert spectrum.argmax() == 1_000
    assert spectrum[1_000] == pytest.approx(12_000 / 32_768, rel=2e-3)
    assert np.delete(spectrum, range(990, 1_011)).max() < 1e-4


def test_resampling_removes_what_16_khz_cannot_hold() -> None:
    # 10 kHz, decimated to 16 kHz, would be heard at 6 kHz.
    tone = [round(12_000 * np.sin(2 * np.pi * 10_000 * k / 48_000)) for k in range(48_000)]
    middle = read_audio(wav(pcm16(tone), rate=48_000), "clip")[1_000:-1_000]
    assert np.abs(middle).max() < 1e-3


def test_half_a_minute_is_read_and_one_sample_more_is_not() -> None:
    body = bytes(2 * 30 * SAMPLING_RATE)
    assert read_audio(wav(body), "clip").shape == (480_000,)
    with pytest.raises(AudioError, match=r"^clip: expected at most 30 s, .* got 30\.00 s"):
        read_audio(wav(body + b"\0\0"), "clip")
    assert read_audio(wav(body + b"\0\0"), "clip", max_seconds=None).shape == (480_001,)
    with pytest.raises(AudioError, match=r"at most 0\.15 s"):
        read_audio(WHOLE, "clip", max_seconds=0.15)


def test_silence_of_the_source_is_no_error() -> None:
    np.testing.assert_array_equal(read_audio(wav(bytes(2 * COUNT)), "clip"), np.zeros(COUNT))


def nan_at(position: int) -> bytes:
    values = [0.5] * COUNT
    values[position] = float("nan")
    return wav(floats(values), bits=32, tag=3)


def short_riff(body: bytes, behind: bytes) -> bytes:
    """Bytes behind a WAV that is whole without them."""
    return wav(body) + behind


STREAMED = wav(pcm16(RAMP), declared=0xFFFFFFFF)

REPAIRED: dict[str, tuple[bytes, str]] = {
    "bytes behind": (short_riff(pcm16(RAMP), b"\1\2\3\4\5\6\7\x08\t"), "9 bytes behind the end of the WAV"),
    "bytes behind a chunk": (wav(pcm16(RAMP), after=chunk(b"LIST", b"abcd")) + bytes(12), "12 bytes behind the end"),
    "streamed": (STREAMED, "leaves the length open"),
    "streamed, both sizes open": (with_bytes(STREAMED, 4, b"\xff" * 4), "leaves the length open"),
    "streamed rf64": (wav(pcm16(RAMP), declared=0xFFFFFFFF, magic=b"RF64"), "leaves the length open"),
    "streamed rifx": (wav(pcm16(RAMP, ">"), declared=0xFFFFFFFF, magic=b"RIFX"), "leaves the length open"),
    "block align 0": (with_bytes(WHOLE, 32, b"\0\0"), "0 bytes per frame were ignored: it is 2 and 32000"),
    "nothing about bytes": (with_bytes(WHOLE, 28, bytes(6)), "0 bytes per frame were ignored"),
    "frame size changed": (with_bytes(WHOLE, 32, b"\x04\0"), "4 bytes per frame were ignored"),
    "byte rate changed": (with_bytes(WHOLE, 28, struct.pack("<I", 1)), "1 bytes per second were ignored"),
}
"""Files whose samples are all there, and what is noted."""


@pytest.mark.parametrize("case", REPAIRED)
def test_what_is_wrong_beside_the_samples_is_put_right_and_noted(case: str) -> None:
    data, noted = REPAIRED[case]
    clip = read_clip(data, "clip")
    np.testing.assert_array_equal(clip.waveform, EXPECTED)
    assert len(clip.notes) == 1
    assert noted in clip.notes[0]


def test_a_sound_file_has_nothing_to_note() -> None:
    assert read_clip(WHOLE, "clip").notes == ()
    assert read_clip(WHOLE_FLAC, "clip").notes == ()


REFUSED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "empty one"),
    "text": (b"<!DOCTYPE html><html>", "starts with b'<!DOCTYPE ht'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "other container": (b"\0\0\0\x18ftypM4A " + bytes(100), "WAV, FLAC, MP3 or Ogg file, .*ffmpeg"),
    "header only": (wav(b""), "no samples"),
    "no data chunk": (WHOLE[:36], "`data` chunk, found none"),
    "no fmt chunk": (b"RIFF\x0c\0\0\0WAVE" + chunk(b"data", pcm16(RAMP)), "`fmt` chunk, found none"),
    "truncated": (WHOLE[:3_000], "expected 6400 bytes .* got 2956: .*truncated"),
    "declares too much": (wav(pcm16(RAMP), declared=64_000), "expected 64000 bytes .* got 6400"),
    "declares too little": (wav(pcm16(RAMP), declared=4_000), "expected 4000 bytes .* got 2400 further bytes"),
    "declares nothing": (wav(pcm16(RAMP), declared=0), "expected 0 bytes .* streaming encoder"),
    "placeholder size, cut": (wav(pcm16(RAMP), declared=0xFFFFFFFF)[:-1], "whole frames of 2 bytes, got 6399 .*cut"),
    "more behind than in it": (short_riff(pcm16(RAMP[:1_600]), bytes(3_300)), "3200 bytes .* got 3300 further bytes"),
    "rf64 truncated": (rf64(9_000), "expected 9000 bytes .* got 6400"),
    "rf64 too little": (rf64(4_000), "got 2400 further bytes"),
    "rf64 of two minds": (rf64(4_000, short=2 * COUNT), "expected 3200 samples per channel as declared, decoded 2000"),
    "one stray byte": (wav(pcm16(RAMP), after=b"\0" + chunk(b"LIST", b"abcd")), "got 13 further bytes"),
    "8 bit of 2 bytes": (with_bytes(WHOLE, 34, b"\x08\0"), "1 bytes per frame .* 8 bits in 1 .* got 2 and 32000"),
    "twice the frame": (with_bytes(WHOLE, 28, struct.pack("<IH", 64_000, 4)), "2 bytes per frame .* got 4 and 64000"),
    "half a frame": (wav(pcm16(RAMP * 2)[:-2], channels=2), "whole frames of 4 bytes, got 12798"),
    "rate 0": (wav(pcm16(RAMP), rate=0), "expected a sampling rate, its header declares 0 Hz"),
    "rate too low": (wav(pcm16(RAMP), rate=1_000), "declares 1000 Hz"),
    "rate too high": (wav(pcm16(RAMP), rate=1_000_000), "declares 1000000 Hz"),
    "too short": (wav(pcm16(RAMP[:1_599])), r"at least 0\.1 s of audio, got 0\.0999 s \(1599 samples\)"),
    "nan": (nan_at(1_234), "NaN or infinity in 1 of 3200, first at sample 1234"),
    "infinity": (wav(floats([float("-inf")] * COUNT), bits=32, tag=3), "in 3200 of 3200, first at sample 0"),
    "integers as floats": (wav(floats([float(v) for v in RAMP]), bits=32, tag=3), "a peak of 30000"),
    "compressed wav": (wav(bytes(4_096), bits=4, tag=0x11), "decodes to its end"),
    "flac header cut": (WHOLE_FLAC[:30], "header of 42 bytes, got 30"),
    "flac header only": (WHOLE_FLAC[:42], "decodes to its end"),
    "flac truncated": (WHOLE_FLAC[: len(WHOLE_FLAC) // 2], "truncated or damaged"),
    "flac declares nothing": (with_bytes(WHOLE_FLAC, 22, bytes(4)), "number of samples, got 0"),
    "flac declares too little": (with_bytes(WHOLE_FLAC, 22, struct.pack(">I", 2_000)), "MD5"),
    "flac declares too much": (with_bytes(WHOLE_FLAC, 22, struct.pack(">I", 4_000)), "decodes to its end"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_name_and_reason(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(AudioError, match=reason) as caught:
        read_audio(data, "clip")
    assert str(caught.value).startswith("clip: expected ")
    assert "; " in str(caught.value), "the message says what to do"


def test_adpcm_in_wav_is_refused_by_name() -> None:
    file = io.BytesIO()
    soundfile.write(file, EXPECTED, SAMPLING_RATE, format="WAV", subtype="IMA_ADPCM")
    with pytest.raises(AudioError, match="WAV holding IMA_ADPCM; convert it"):
        read_audio(file.getvalue(), "clip")


def test_flac_without_a_digest_is_read() -> None:
    np.testing.assert_array_equal(read_audio(with_bytes(WHOLE_FLAC, 26, bytes(16)), "clip"), EXPECTED)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"^dog4: expected an audio file at .*absent\.wav, found none; restore"):
        read_audio(tmp_path / "absent.wav", "dog4")
    with pytest.raises(AudioError, match=r"^dog4: expected an audio file at .*, got a folder of that name; put"):
        read_audio(tmp_path, "dog4")


@pytest.mark.parametrize("whole", [WHOLE, WHOLE_FLAC, rf64(2 * COUNT)], ids=["wav", "flac", "rf64"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_prefix_of_a_file_is_read(whole: bytes, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(AudioError, match=r"^clip: expected "):
        read_audio(whole[:end], "clip")


@settings(max_examples=300, deadline=None)
@given(position=st.integers(42, len(WHOLE_FLAC) - 1), flipped=st.integers(1, 255))
def test_a_damaged_flac_is_refused_or_unharmed(position: int, flipped: int) -> None:
    damaged = with_bytes(WHOLE_FLAC, position, bytes([WHOLE_FLAC[position] ^ flipped]))
    assert_refused_or(damaged, lambda waveform: np.array_equal(waveform, EXPECTED))


@settings(max_examples=500, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 43), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))
def test_any_wav_header_is_refused_or_read(edits: list[tuple[int, bytes]]) -> None:
    data = WHOLE
    for position, replacement in edits:
        data = with_bytes(data, position, replacement)
    assert_refused_or(data, lambda waveform: bool(np.isfinite(waveform).all()) and waveform.ndim == 1)


def assert_refused_or(data: bytes, condition: Callable[[np.ndarray], bool]) -> None:
    try:
        waveform = read_audio(data, "clip")
    except AudioError:
        return
    assert condition(waveform)


def test_silence_has_the_clip_s_length_and_dtype() -> None:
    waveform = read_audio(WHOLE, "clip")
    for corrupted in (silence(waveform), corrupt(waveform, "silence")):
        assert corrupted.dtype == waveform.dtype
        assert corrupted.tobytes() == bytes(4 * COUNT)
    np.testing.assert_array_equal(waveform, EXPECTED)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_keep_length_and_type_and_repeat_themselves(name: str) -> None:
    waveform = read_audio(WHOLE, "clip")
    corrupted = corrupt(waveform, name)
    assert corrupted.shape == waveform.shape
    assert corrupted.dtype == waveform.dtype
    assert np.isfinite(corrupted).all()
    assert (corrupted != waveform).any()
    np.testing.assert_array_equal(corrupted, corrupt(waveform, name))
    np.testing.assert_array_equal(waveform, EXPECTED)  # the clip itself stays


def test_what_each_corruption_keeps_of_the_clip() -> None:
    clip = (0.3 * np.sin(np.arange(16_020) / 7)).astype(np.float32)
    assert np.abs(corrupt(clip, "dither")).max() <= 2.0**-15
    assert np.unique(corrupt(clip, "dither")).size > 100
    loud = corrupt(clip, "noise")
    assert np.sqrt(np.mean(loud**2)) == pytest.approx(np.sqrt(np.mean(clip**2)), rel=0.03)
    spectrum = np.abs(np.fft.rfft(loud.astype(np.float64))) ** 2
    assert spectrum.max() < 0.01 * spectrum.sum()  # flat: no tone is left
    shuffled = corrupt(clip, "time_shuffle")
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(clip))
    assert any((shuffled[:800] == clip[start : start + 800]).all() for start in range(800, 16_000, 800))


def test_an_unknown_corruption_names_the_known() -> None:
    with pytest.raises(ConfigError, match="silence, dither, silence_floor, noise, time_shuffle, got 'fire'"):
        corrupt(np.zeros(4, np.float32), "fire")


def test_the_silence_floor_is_the_clips_own_background() -> None:
    """Hiss with a loud tone in half of it: the hiss stays, with its spectrum, and the tone goes."""
    rng = np.random.default_rng(3)
    time = np.arange(32_000) / SAMPLING_RATE
    sos = signal.butter(4, 2000, "lowpass", fs=SAMPLING_RATE, output="sos")
    hiss = signal.sosfilt(sos, rng.normal(0, 0.01, time.size))
    clip = (hiss + 0.3 * np.sin(2 * np.pi * 440 * time) * (time < 1)).astype(np.float32)
    quiet = corrupt(clip, "silence_floor")
    bands, of_hiss = signal.welch(hiss, SAMPLING_RATE, nperseg=512)
    _, of_quiet = signal.welch(quiet, SAMPLING_RATE, nperseg=512)
    _, of_clip = signal.welch(clip, SAMPLING_RATE, nperseg=512)
    inside, tone = (bands > 100) & (bands < 1800), np.abs(bands - 440) < 40
    ratio = of_quiet[inside].mean() / of_hiss[inside & ~tone].mean()
    assert 0.02 < ratio < 1.5  # a tenth of the frames are below it
    assert of_clip[tone].max() > 1e3 * of_quiet[tone].max()
    assert of_quiet[bands > 4000].max() < 1e-2 * of_quiet[inside].mean()
    assert corrupt(clip[:100], "silence_floor").shape == (100,)
    assert not corrupt(np.zeros(1000, np.float32), "silence_floor").any()

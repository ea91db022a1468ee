"""A question for each clip: tables, benchmarks, one recording; from the file to the figure."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import soundfile
import xarray as xr
from conftest import noise
from hypothesis import given
from hypothesis import strategies as st

import lalm_patch
from lalm_patch.analysis import accuracy, exclusion_table, mean_recovery, right_options, with_metric
from lalm_patch.errors import ConfigError, DataError
from lalm_patch.stimuli import Attribute, data_fingerprint, load_listed, load_sakura_multi, load_table
from lalm_patch.stimuli.own_questions import Row, records_of

QUESTIONS: list[tuple[str, list[str]]] = [
    ("What animal makes the sound?", ["dog", "cat"]),
    ("Which animal, if any, is {heard}?", ["dog", "cat", "a cow, or a pig", "no animal"]),
    ("这是什么动物的声音", ["狗", "猫", "牛"]),
    ('Is this "barking"?', ["yes", "no", "cannot be told"]),
    ("Who is it: man's best friend?", ["the dog's", "frog", "hen", "sheep", "crow", "pig"]),
    ("#5, $HOME, 50 %: what is it?", ["dog", "pig"]),
]


def write_table(folder: Path, clips: int = 12, **extra: Any) -> Path:
    """A .jsonl of clips of noise, each with a question and options of its own."""
    rows = []
    for index in range(clips):
        soundfile.write(folder / f"clip{index}.wav", noise(0.6 + 0.1 * (index % 3), seed=index), 16000)
        question, options = QUESTIONS[index % len(QUESTIONS)]
        row = {"audio": f"clip{index}.wav", "question": f"{question} ({index})", "options": options}
        rows.append(row | {"answer": options[index % len(options)], "task": "ab"[index % 2]} | extra)
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(checkpoints: dict[str, Path]) -> tuple[str, ...]:
    model = f"model.id={checkpoints['qwen2_audio']}"
    return "model=qwen2_audio", model, "model.dtype=float32", "model.device=cpu", "threads=1"


def run(folder: Path, *arguments: str) -> str:
    done = commands.run(folder, *commands.LALM_PATCH, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(folder: Path, *arguments: str) -> str:
    done = commands.run(folder, *commands.LALM_PATCH, *arguments)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


def result(folder: Path) -> xr.Dataset:
    (path,) = folder.glob("*/result.nc")
    return lalm_patch.open_result(path.parent)


def test_twelve_questions_killed_gone_on_collected_and_reported(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    table = write_table(tmp_path)
    asked = (
        *tiny,
        "data=table",
        f"data.path={table}",
        "granularity=token",
        "granularity.layers=[0,2]",
        "prompt.answer=whole",
        "trace_excluded=true",
    )
    run(tmp_path, *asked, "outputs=reference")
    process = commands.start(tmp_path, *commands.LALM_PATCH, *asked)
    deadline = time.monotonic() + 120
    while not [j for j in tmp_path.glob("outputs/*/journal.bin") if j.stat().st_size > 20_000]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("outputs/*/result.nc"))
    run(tmp_path, *asked)
    found, expected = result(tmp_path / "outputs"), result(tmp_path / "reference")
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    for sample, row in zip(found["sample"].values, rows, strict=True):
        clip = found.sel(sample=sample)
        assert str(clip["question"].item()) == row["question"]
        assert [text for text in clip["option_text"].values if text] == row["options"]
        assert str(clip["label"].item()) == row["answer"]
        logits = clip["option_logit_clean"].values
        assert np.isfinite(logits).sum() == len(row["options"])
        p = np.exp(logits[row["options"].index(row["answer"])] - clip["logsumexp_clean"].item())
        assert float(clip["p_clean"]) == pytest.approx(float(p), rel=1e-5)
        assert str(clip["prediction_clean"].item()) == row["options"][int(np.nanargmax(logits))]
    assert (right_options(found).sum("option") == 1).all()
    assert accuracy(found).chance == pytest.approx(np.mean([1 / len(row["options"]) for row in rows]))
    assert list(exclusion_table(found)["label"].values) == ["a", "b"]
    np.testing.assert_allclose(
        with_metric(found, "option_probability")["p_clean"],
        [_among(found.sel(sample=name)) for name in found["sample"].values],
        rtol=1e-5,
    )
    if bool(found["kept"].any()):
        assert "averaged" in mean_recovery(found).attrs["token_alignment"]
    collected = commands.run(tmp_path, "-m", "lalm_patch.collect", "outputs")
    assert collected.returncode == 0, collected.stderr
    reported = commands.run(tmp_path, "-m", "lalm_patch.report", "outputs")
    assert reported.returncode == 0, reported.stderr


def _among(clip: xr.Dataset) -> float:
    options = [text for text in clip["option_text"].values if text]
    p = np.exp(clip["option_logit_clean"].values[: len(options)].astype(float))
    return float(p[options.index(str(clip["label"].item()))] / p.sum())


def test_options_that_begin_alike_are_all_named_or_left_out(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    table = write_table(tmp_path, 3)
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    rows[1] |= {"options": ["the dog", "the cat"], "answer": "the cat"}
    rows[2] |= {"options": ["dog", "pig"], "answer": "pig"}
    table.write_text("\n".join(map(json.dumps, rows)))
    asked = (*tiny, "data=table", f"data.path={table}")
    said = refused(tmp_path, *asked)
    assert "1 of 3 questions cannot be asked" in said
    assert "clip1.wav" in said
    assert "prompt.answer=whole" in said
    assert "prompt.options=letters" in said
    assert not list(tmp_path.glob("outputs/*/journal.bin"))
    run(tmp_path, *asked, "data.bad_clips=exclude")
    assert result(tmp_path / "outputs")["exclusion"].values[1] == "options cannot be told apart"
    run(tmp_path, *asked, "prompt.options=letters", "prompt.target=bare", "prompt.order=shuffled", "outputs=letters")
    lettered = result(tmp_path / "letters")
    assert "options cannot be told apart" not in lettered["exclusion"].values
    assert (lettered["answer_token_id"] >= 0).all()


TEXT = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12).filter(str.strip)


@given(st.lists(TEXT, min_size=2, max_size=6, unique_by=lambda text: " ".join(text.split()).casefold()), TEXT)
def test_a_table_means_the_same_as_json_lines_and_as_csv(options: list[str], question: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = {"audio": "a.wav", "question": question, "options": options, "answer": options[-1]}
        (folder / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([list(row), ["a.wav", question, json.dumps(options), options[-1]]])
        (folder / "a.wav").write_bytes(b"")
        lines, table = (load_table(folder / f"t.{kind}", "It is") for kind in ("jsonl", "csv"))
    assert lines == table
    (record,) = lines
    assert record.prompt is not None
    assert record.label == " ".join(options[-1].split())
    assert data_fingerprint(lines) == data_fingerprint(table)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "expected one JSON object a line"),
        ('{"audio": "a.wav"}', "got no question, options, answer"),
        ('{"audio": "a.wav", "question": "Q", "options": ["a"], "answer": "a"}', "at least two options"),
        ('{"audio": "a.wav", "question": "Q", "options": [true, false], "answer": "a"}', "options as a list of texts"),
        ('{"audio": "a.wav", "question": "Q", "options": ["x", "y"], "answer": "z"}', "expected an answer among x, y"),
        ('{"audio": "a.wav", "question": "Q", "options": ["x", "X"], "answer": "x"}', "differ in more than case"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, line: str, said: str) -> None:
    good = '{"audio": "b.wav", "question": "Q", "options": ["x", "y"], "answer": "(b)"}'
    path = tmp_path / "t.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match="line 2") as error:
        load_table(path, "It is")
    assert said in str(error.value)
    path.write_text(good)
    assert load_table(path, "It is")[0].label == "y"


def test_one_clip_asked_twice_needs_ids(tmp_path: Path) -> None:
    row = Row("row 1", "a.wav", "Q", ["x", "y"], "x")
    with pytest.raises(DataError, match="a column id"):
        records_of([row, row], tmp_path, "It is")
    first, second = records_of([Row(**(vars(row) | {"id": name})) for name in ("1", "2")], tmp_path, "It is")
    assert first.group == second.group == "a.wav"  # one recording: not independent


def test_mmau_and_mmar_in_their_published_layout(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    mmau, mmar = tmp_path / "mmau", tmp_path / "mmar"
    for root, sub in ((mmau, "test-mini-audios"), (mmar, "audio")):
        (root / sub).mkdir(parents=True)
        soundfile.write(root / sub / "x.wav", noise(0.5), 16000)
    entry = {
        "id": "3fe64f3d",
        "audio_id": "./test-mini-audios/x.wav",
        "question": "Based on the given audio, what is heard?",
        "choices": ["Bell", "Siren", "Engine, idling", "Rain"],
        "answer": "Siren",
        "dataset": "AudioSet",
        "task": "sound",
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Ambient Sound Interpretation",
        "difficulty": "easy",
    }
    (mmau / "mmau-test-mini.json").write_text(json.dumps([entry]))
    other = {key: value for key, value in entry.items() if key != "audio_id"} | {"audio_path": "./audio/x.wav"}
    (mmar / "MMAR-meta.json").write_text(json.dumps([other]))
    (mmar / "other.json").write_text("[]")
    for name, root in (("mmau", mmau), ("mmar", mmar)):
        (record,) = load_listed(name, root, "The answer is")
        assert record.label == "Siren"
        assert dict(record.tags)["difficulty"] == "easy"
        assert record.waveform().shape == (8000,)
    said = refused(tmp_path, *tiny, "data=mmau", f"data.root={tmp_path}")
    assert "expected one JSON list of mmau's questions, got none" in said
    (mmau / "mmau-test-mini.json").write_text(json.dumps([entry | {"choices": []}]))
    with pytest.raises(DataError, match=r"entry 1: .* got no choices"):
        load_listed("mmau", mmau, "The answer is")
    run(tmp_path, *tiny, "data=mmar", f"data.root={mmar}", "prompt.options=letters", "trace_excluded=true")
    found = result(tmp_path / "outputs")
    assert found["tag_task"].values.tolist() == ["sound"]
    assert found["option"].values.tolist() == entry["choices"]  # one question: its options are everybody's


def test_sakura_s_multi_hop_questions(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "Animal"
    (folder / "audio").mkdir(parents=True)
    lines = [
        "file,attribute_label,single_instruction,single_answer,multi_instruction,multi_answer",
        'dog1.wav,dog,"Which? (a) dog (b) cat",(a) dog,'
        '"Where does it live, (mostly)? (a) kennel (b) sty, barn (c) nest",(a) kennel',
        'cow2.wav,cow,"Which? (a) dog (b) cow",(b) cow,What does it give? (a) wool (b) milk,(b) milk',
    ]
    (folder / "metadata.csv").write_text("\r\n".join(lines) + "\r\n")
    for name in ("dog1", "cow2"):
        soundfile.write(folder / "audio" / f"{name}.wav", noise(0.5), 16000)
    animal = Attribute("animal", "What?", ("dog", "cow"), "It is", "Animal")
    dog, cow = load_sakura_multi(animal, tmp_path)
    assert dog.prompt is not None and cow.prompt is not None  # noqa: PT018
    assert (dog.prompt.question, dog.prompt.options, dog.label) == (
        "Where does it live, (mostly)?",
        ("kennel", "sty, barn", "nest"),
        "kennel",
    )
    assert cow.label == "milk"
    assert dict(cow.tags) == {"animal": "cow", "task": "multi_hop"}


def test_one_line_for_one_recording(tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stereo = np.stack([noise(0.8), noise(0.8, seed=1)], axis=1)[: 16000 * 4 // 5]
    soundfile.write(tmp_path / "door.mp3", stereo, 44100, format="MP3")
    asked = ("attr.question=What made this, sound?", "attr.options=[door,dog,bell]", "attr.answer=door")
    quoted = (asked[0].replace("=", "='") + "'", *asked[1:])
    printed = run(tmp_path, *tiny, "data=clip", "data.audio=door.mp3", *quoted, "granularity=token")
    found = result(tmp_path / "outputs")
    assert found["sample"].values.tolist() == ["door.mp3"]
    assert found["option"].values.tolist() == ["door", "dog", "bell"]
    if not bool(found["kept"].item()):
        assert "said     on the clip" in printed
        assert "trace_excluded=true" in printed
    outcome = lalm_patch.trace_clip(
        stereo,
        rate=44100,
        question="What made this, sound?",
        options=["door", "dog", "bell"],
        answer="door",
        model="qwen2_audio",
        overrides=[*tiny[1:], "trace_excluded=true", "outputs=elsewhere"],
    )
    assert outcome.dataset is not None
    assert bool(outcome.dataset["p_patched"].notnull().all())
    assert any(path.name == "clip.png" and path.stat().st_size > 0 for path in outcome.files)
    for arguments, said in (
        (("data=clip", *quoted), "expected a recording, got none"),
        (("data=clip", "data.audio=none.wav", *quoted), "none.wav"),
        (("data=clip", "data.audio=door.mp3", *quoted[:2], "attr.answer=cat"), "expected one of attr.options"),
        (("data=table",), "expected a file, got none"),
        (("data=table", "data.path=x.jsonl", "attr=emotion"), "a question of its own"),
        (("attr=each_clip",), "has no question"),
        (("prompt.answer=whole", "metric=rank"), "metric=rank is about the next token alone"),
    ):
        assert said in refused(tmp_path, *tiny, *arguments)
    with pytest.raises(ConfigError, match="rate"):
        lalm_patch.trace_clip(stereo, question="Q", options=["a", "b"], answer="a")

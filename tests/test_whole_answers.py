"""Answers of several tokens, against one plain forward pass over prompt and answer, on all five families."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import load, noise

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.whole_answers import AnswerReader, continued
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import layer_grid, token_grid
from lalm_patch.models import LALM, Encoding
from lalm_patch.stimuli import Prompt, silence

OWN = Prompt(
    "Which “thing” is heard, {exactly}?",
    ("a door, closing", "a door bell", 'a "dog"', "a door"),
    "The answer is",
)
FIVE = ("qwen2_audio", "voxtral", "qwen_audio", "desta2", "desta25")


@pytest.fixture(scope="module", params=FIVE)
def family_model(request: pytest.FixtureRequest) -> LALM:
    """A random tiny model of each of the paper's families."""
    name = request.param
    if name in ("qwen2_audio", "voxtral"):
        folder = request.getfixturevalue("checkpoints")[name]
    else:
        folder = request.getfixturevalue("native_folders")[name]
    return load(folder, name)


@pytest.fixture(scope="module")
def pair(family_model: LALM) -> tuple[Encoding, Encoding]:
    prompt = replace(OWN, transcript=" A door." if family_model.family.reads_transcript else None)
    clip = noise(0.6)
    layout = family_model.family.layouts[0]
    return (
        family_model.encode(clip, prompt, layout),
        family_model.encode(silence(clip), prompt, layout),
    )


def answers_of(model: LALM, prompt: Prompt = OWN) -> tuple[tuple[int, ...], ...]:
    return model.answer_ids(prompt, model.family.layouts[0], "leading_space", whole=True)


def test_whole_is_the_forward_pass_over_prompt_and_answer(family_model: LALM, pair: tuple[Encoding, Encoding]) -> None:
    answers = answers_of(family_model)
    assert max(map(len, answers)) > 2
    found = AnswerReader(answers, whole=True).base(DirectEngine(family_model), *pair)
    for row, encoding in enumerate(pair):
        for column, answer in enumerate(answers):
            length = len(encoding.tokens)
            with torch.no_grad():  # all tokens of the answer at once, as transformers does it
                logits = family_model.module(**continued(family_model, encoding, answer).inputs).logits[0].float()
            each = family_model.scaled(logits).log_softmax(-1)
            expected = sum(float(each[length - 1 + k, token]) for k, token in enumerate(answer))
            assert found.option_logits[row, column] - found.logsumexp[row] == pytest.approx(
                expected, rel=1e-6, abs=1e-5
            )


def test_replay_is_direct_in_every_cell(family_model: LALM, pair: tuple[Encoding, Encoding]) -> None:
    read = AnswerReader(answers_of(family_model), whole=True)
    layers = range(family_model.num_layers)
    for grid in (layer_grid(pair[0].tokens, layers), token_grid(pair[0].tokens, layers)):
        some = replace(grid, dims=("cell",), coords={"cell": np.arange(len(grid.cells[::13]))}, cells=grid.cells[::13])
        fast = read.sweep(ReplayEngine(family_model), *pair, some)
        slow = read.sweep(DirectEngine(family_model), *pair, some)
        # A sum of several factors is stored in float32, whose own steps at -129 are 1.5e-5.
        steps = 2 * np.finfo(np.float32).eps
        np.testing.assert_allclose(fast.option_logits, slow.option_logits, atol=1e-5, rtol=steps)


def test_answers_of_one_token_are_the_first_token(family_model: LALM, pair: tuple[Encoding, Encoding]) -> None:
    first_answer, _, third, _ = answers_of(family_model)
    single = [(first_answer[0],), (third[-1],)]
    grid = layer_grid(pair[0].tokens, range(family_model.num_layers))
    engine = ReplayEngine(family_model)
    whole = AnswerReader(single, whole=True).sweep(engine, *pair, grid)
    first = AnswerReader(single, whole=False).sweep(engine, *pair, grid)
    np.testing.assert_allclose(whole.probabilities, first.probabilities, rtol=1e-5)
    assert (whole.top_id == first.top_id).all()


def test_a_run_s_own_states_change_nothing(family_model: LALM, pair: tuple[Encoding, Encoding]) -> None:
    read = AnswerReader(answers_of(family_model), whole=True)
    clean, corrupted = pair
    grid = layer_grid(clean.tokens, range(family_model.num_layers))
    swept = read.sweep(ReplayEngine(family_model), corrupted, corrupted, grid)
    base = read.base(ReplayEngine(family_model), clean, corrupted)
    unchanged = np.broadcast_to(base.option_logits[1], swept.option_logits.shape)
    np.testing.assert_allclose(swept.option_logits, unchanged, rtol=1e-6, atol=1e-5)
    assert np.abs(base.option_logits[0] - base.option_logits[1]).max() > 1e-3  # the runs differ


def test_letters_and_whole_answers_tell_clashing_options_apart(family_model: LALM) -> None:
    layout = family_model.family.layouts[0]
    with pytest.raises(ModelError, match=r"begin with the same token.*prompt\.answer=whole.* prompt\.options=letters"):
        family_model.target_ids(OWN, layout)
    assert len(set(answers_of(family_model))) == len(OWN.options)
    lettered = replace(OWN, letters=True)
    assert lettered.answers == ("a", "b", "c", "d")
    assert ' (a) a door, closing (b) a door bell (c) a "dog" (d) a door.' in lettered.text
    ids = family_model.answer_ids(lettered, layout, "bare", whole=True)
    assert [family_model.family.tokenizer.decode(list(answer)) for answer in ids] == ["a", "b", "c", "d"]
    tokens, _ = family_model.inputs(noise(0.4), lettered, layout)
    assert 'a "dog"' in "".join(tokens.texts[i] for i in tokens.positions("object"))

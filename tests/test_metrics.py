"""Recovery rate, exclusions, grids and interventions against arithmetic done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from lalm_patch.checks import Check, enforce, from_json, to_json, worst
from lalm_patch.engine import Readout
from lalm_patch.engine.readout import _ranks
from lalm_patch.errors import CheckError, ConfigError
from lalm_patch.interventions.grids import chosen_layers, make_grid
from lalm_patch.interventions.patches import Intervention, Patch
from lalm_patch.models import TokenTable
from lalm_patch.tracing.metrics import Exclusion, exclusion, predictions, recovery_rate

TOKENS = TokenTable(
    (1, 9, 9, 2, 3, 4), ("<s>", "", "", "What", " is", " it"), ("pre", "audio", "audio", "early", "late", "last")
)


def readout(*probabilities: tuple[float, ...], top: tuple[int, ...] = ()) -> Readout:
    """A readout whose option probabilities are these; the rest of the vocabulary has what is left."""
    logits = np.log(np.array(probabilities, np.float32))
    tops = np.array(top or [0] * len(logits))
    return Readout(logits + 2.5, np.full(len(logits), 2.5, np.float32), tops)


@given(
    clean=st.floats(0.01, 1), corrupted=st.floats(0, 1), share=st.floats(-3, 3, allow_nan=False, allow_infinity=False)
)
def test_recovery_rate_inverts_its_definition(clean: float, corrupted: float, share: float) -> None:
    if abs(clean - corrupted) < 1e-6:
        return
    patched = np.array(corrupted + share * (clean - corrupted))
    assert recovery_rate(patched, clean, corrupted) == pytest.approx(share, abs=1e-6)


def test_recovery_rate_is_not_clipped_and_is_nan_without_a_gap() -> None:
    rates = recovery_rate(np.array([0.1, 0.5, 0.9, 1.0, 0.0]), 0.9, 0.1)
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1.125, -0.125])
    assert np.isnan(recovery_rate(np.array([0.3, 0.4]), 0.3, 0.3)).all()


def test_probabilities_are_over_the_whole_vocabulary() -> None:
    logits = np.array([[1.0, 2.0, -1.0, 0.5]], np.float32)

    read = Readout.of(torch.from_numpy(logits), [1, 3])
    total = sum(math.exp(x) for x in logits[0])
    np.testing.assert_allclose(read.probabilities, [[math.exp(2) / total, math.exp(0.5) / total]], rtol=1e-6)
    assert read.top_id.tolist() == [1]


def test_scatter_puts_rows_back() -> None:
    whole = readout(*[(0.1 * i, 0.05) for i in range(1, 7)])
    order = [4, 0, 5, 2, 1, 3]
    parts = [
        (order[:2], Readout(whole.option_logits[order[:2]], whole.logsumexp[order[:2]], whole.top_id[order[:2]])),
        (order[2:], Readout(whole.option_logits[order[2:]], whole.logsumexp[order[2:]], whole.top_id[order[2:]])),
    ]
    np.testing.assert_array_equal(Readout.scatter(parts).option_logits, whole.option_logits)


@pytest.mark.parametrize(
    ("clean", "corrupted", "answer", "expected"),
    [
        ((0.7, 0.2), (0.1, 0.3), 0, Exclusion.KEPT),
        ((0.2, 0.7), (0.1, 0.3), 0, Exclusion.CLEAN_WRONG),
        ((0.2, 0.7), (0.3, 0.1), 0, Exclusion.CLEAN_WRONG),
        ((0.7, 0.2), (0.3, 0.1), 0, Exclusion.CORRUPTED_RIGHT),
        ((0.3, 0.2), (0.35, 0.4), 0, Exclusion.NO_EFFECT),
        ((0.3, 0.2), (0.3, 0.4), 0, Exclusion.NO_EFFECT),
    ],
)
def test_exclusion_rules(clean: tuple, corrupted: tuple, answer: int, expected: Exclusion) -> None:  # type: ignore[type-arg]
    assert exclusion(readout(clean, corrupted), (11, 12), answer, "options") is expected


def test_correct_over_the_vocabulary_looks_at_the_top_token() -> None:
    read = readout((0.3, 0.2), (0.1, 0.2), top=(11, 999))
    assert predictions(read, (11, 12), "vocabulary") == [0, -1]
    assert predictions(read, (11, 12), "options") == [0, 1]


def test_grids_cover_the_text_after_the_audio() -> None:
    layer = make_grid("layer", TOKENS, (0, 2))
    assert layer.dims == ("layer",)
    assert layer.cells == (Intervention([Patch(0, (3, 4, 5))]), Intervention([Patch(2, (3, 4, 5))]))
    token = make_grid("token", TOKENS, (0, 2))
    assert token.shape == (2, 3)
    assert token.cells[4] == Intervention([Patch(2, (4,))])
    with pytest.raises(ConfigError, match="expected one of layer, token"):
        make_grid("word", TOKENS, (0,))


def test_chosen_layers() -> None:
    assert chosen_layers(4, None) == (0, 1, 2, 3)
    assert chosen_layers(4, [-1, 0]) == (0, 3)
    for wrong in ([4], [-5], [], [0, -4]):
        with pytest.raises(ConfigError, match=r"granularity\.layers"):
            chosen_layers(4, wrong)


def test_interventions_are_values() -> None:
    first = Intervention([Patch(3, (7,)), Patch(1, (2, 9))])
    assert first == Intervention([Patch(1, (2, 9)), Patch(3, (7,))])
    assert hash(first) == hash(Intervention([Patch(1, (2, 9)), Patch(3, (7,))]))
    assert (first.entry_layer, first.first_position) == (2, 2)
    assert first.at(3) == (Patch(3, (7,)),)
    for wrong in ((), (2, 1), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="ascending"):
            Patch(0, wrong)


def test_checks_are_kept_compared_and_enforced() -> None:
    near, far = Check.at_most("same", 0.9e-5, 1e-5, "s"), Check.at_most("same", 0.1e-5, 1e-5, "s")
    broken, worse = Check.at_most("same", 2e-5, 1e-5, "s"), Check.at_most("same", 3e-5, 1e-5, "s")
    assert worst([far, near, far]) == [near]
    assert worst([near, broken, worse, far]) == [worse]
    assert from_json(to_json([near, broken])) == [near, broken]
    assert not Check.at_most("nan", math.nan, 1, "s").passed
    assert not Check.more_than("nan", math.nan, 1, "s").passed
    enforce([near, far], "stop")
    with pytest.raises(CheckError, match="same: FAILED"):
        enforce([near, broken], "stop")


def test_failed_check_can_be_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    enforce([Check.at_most("x", 2, 1, "what to do")], "warn")
    assert "x: FAILED" in caplog.text


def test_ranks_and_divergences_by_their_definitions() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 3, (6, 40)).astype(np.float32)
    references = rng.normal(0, 3, (2, 40)).astype(np.float32)
    ids = [7, 31, 2]
    read = Readout.of(torch.from_numpy(logits), ids, torch.from_numpy(references))
    assert read.option_rank is not None
    assert read.divergence is not None
    for row, values in enumerate(logits):
        order = np.argsort(-values).tolist()
        assert [order.index(id) + 1 for id in ids] == read.option_rank[row].tolist()
        q = softmax(values.astype(float))
        for column, reference in enumerate(references):
            expected = entropy(softmax(reference.astype(float)), q)
            assert read.divergence[row, column] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_array_equal(_ranks(torch.from_numpy(logits), torch.tensor(ids)), read.option_rank)
    own = Readout.of(torch.from_numpy(references), ids, torch.from_numpy(references))
    assert own.divergence is not None
    assert np.diagonal(own.divergence) == pytest.approx([0, 0], abs=1e-5)
    back = Readout.scatter([([1, 3, 5], read.rows(slice(1, None, 2))), ([0, 2, 4], read.rows(slice(0, None, 2)))])
    for name, values in vars(read).items():
        np.testing.assert_array_equal(getattr(back, name), values)
    assert Readout.of(torch.from_numpy(logits), ids).divergence is None

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lalm_patch.errors import ConfigError
from lalm_patch.stimuli import Attribute, Prompt

CONF = Path(__file__).resolve().parents[1] / "conf" / "attr"

PROMPTS = {
    "animal": "What animal makes the sound? Possible options: dog, cat, pig, cow, frog, hen, rooster, sheep, crow."
    " The sound file's animal is",
    "emotion": "What is the emotion of the speaker in the speech? Possible options: angry, disgust, fear, happy, sad."
    " The speaker's emotion is",
    "gender": "What is the gender of the speaker in the speech? Possible options: male, female."
    " The speaker's gender is",
    "language": "What is the language spoken in the speech? Possible options: English, German, Spanish, French,"
    " Italian, Chinese, Japanese, Korean. The speech's spoken language is",
}

FIELDS: dict[str, Any] = {
    "name": "gender",
    "question": "Who speaks?",
    "options": ["male", "female"],
    "response": "The speaker is",
    "folder": "Gender",
}


def attribute(**changes: Any) -> Attribute:
    return Attribute(**{**FIELDS, **changes})


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompts_are_the_paper_s(name: str) -> None:
    packaged = Attribute(**yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")))
    assert packaged.name == name
    assert packaged.folder == name.capitalize()
    prompt = Prompt.from_attribute(packaged)
    assert prompt.flat_text == PROMPTS[name]
    assert prompt.text + " " + prompt.response == PROMPTS[name]


def test_parts_and_roles() -> None:
    prompt = Prompt.from_attribute(attribute())
    assert prompt.user_parts == (
        ("Who speaks? Possible options:", "early"),
        (" male, female", "object"),
        (".", "late"),
    )
    assert prompt.text == "Who speaks? Possible options: male, female."


words = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=6)


@given(st.lists(words, min_size=2, max_size=9, unique_by=str.casefold), st.integers(), words)
def test_shuffling_permutes_whatever_the_declared_order(options: list[str], seed: int, sample: str) -> None:
    shuffled = Prompt.from_attribute(attribute(options=options), "shuffled", seed, sample)
    assert sorted(shuffled.options) == sorted(options)
    assert Prompt.from_attribute(attribute(options=options[::-1]), "shuffled", seed, sample) == shuffled
    assert Prompt.from_attribute(attribute(options=options), "fixed", seed, sample).options == tuple(options)
    parts = shuffled.user_parts
    assert "".join(text for text, _ in parts) == shuffled.text
    assert parts[1].text == " " + ", ".join(shuffled.options)


def test_a_shuffled_order_is_the_same_on_every_machine() -> None:
    # `printf '7\0dog4.wav\0male' | sha256sum` and so on: the smaller digest comes first.
    firsts = [Prompt.from_attribute(attribute(), "shuffled", 7, f"dog{k}.wav").options[0] for k in range(8)]
    assert firsts == ["female", "male", "female", "male", "female", "female", "female", "male"]


def test_every_option_comes_first_equally_often() -> None:
    firsts = [Prompt.from_attribute(attribute(), "shuffled", 0, str(k)).options[0] for k in range(2_000)]
    # Standard deviation of a fair count: sqrt(2000) / 2 = 22.
    assert abs(firsts.count("male") - 1_000) < 4 * 22


def test_seed_and_sample_both_change_the_order() -> None:
    options = attribute(options=list("abcdefgh"))
    orders = {
        Prompt.from_attribute(options, "shuffled", seed, s).options for seed in (0, 1) for s in ("x.wav", "y.wav")
    }
    assert len(orders) == 4


def test_an_order_has_a_name_and_a_sample() -> None:
    with pytest.raises(ConfigError, match="expected one of fixed, shuffled, got 'random'"):
        Prompt.from_attribute(attribute(), "random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass sample_id"):
        Prompt.from_attribute(attribute(), "shuffled")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": []}, r"at least two options, got \[\]"),
        ({"options": ["male"]}, r"at least two options, got \['male'\]"),
        ({"options": "male, female"}, "options as a list, got 'male, female'"),
        ({"options": None}, "options as a list, got None"),
        ({"options": ["male", "female", "male"]}, "differ in more than case, got male"),
        ({"options": ["Male", "male"]}, "differ in more than case, got Male, male"),
        ({"options": ["male, old", "female"]}, "without commas .* got 'male, old'"),
        ({"options": ["male", ""]}, "every option to be text without spaces around it, got ''"),
        ({"options": ["male", " female"]}, "got ' female'"),
        ({"options": ["yes", False]}, "every option to be text, got False; put it in quotes"),
        ({"question": "Who? "}, r"question .* got 'Who\? '; a space at the end"),
        ({"question": ""}, "question .* got ''"),
        ({"question": "Who\nspeaks?"}, "question on one line"),
        ({"response": "It is "}, "response .* got 'It is '"),
        ({"response": None}, "response to be text, got None"),
        ({"folder": ""}, "folder .* got ''"),
        ({"name": " x"}, "name .* got ' x'"),
    ],
)
def test_an_attribute_that_makes_no_prompt_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        attribute(**changes)


def test_a_prompt_is_checked_as_its_attribute_is() -> None:
    for question, options, response in [("Q", ("a",), "R"), ("Q ", ("a", "b"), "R"), ("Q", ("a", "b"), "R ")]:
        with pytest.raises(ConfigError, match=r"^prompt: expected "):
            Prompt(question, options, response)

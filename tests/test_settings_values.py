"""Settings by value: whatever keys and values come, a run's settings or one sentence that names the key."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lalm_patch import compose
from lalm_patch.config import load, register, to_settings
from lalm_patch.config.words import override, quoted, typed
from lalm_patch.errors import ConfigError
from lalm_patch.models import FAMILIES
from lalm_patch.models.names import BUILT_IN
from lalm_patch.settings import ALLOWED, CHOICES, RunSettings
from lalm_patch.settings.of_a_run import NOT_PART_OF_A_RUN
from lalm_patch.settings.ranges import Listed, Number, Place, Refused, Switch, Text, Whole, Word


def refused(*overrides: str) -> str:
    """The sentence that refuses overrides."""
    with pytest.raises(ConfigError) as caught:
        compose(*overrides)
    return sentence(caught.value)


def sentence(error: ConfigError) -> str:
    text = str(error)
    assert "\n" not in text
    assert "append" not in text
    assert "hydra.cc" not in text
    return text


def from_files(folder: Path, *overrides: str, **files: str) -> RunSettings:
    """Settings with a user's own YAML: `attr__room="..."` is attr/room.yaml in the folder of --config-dir."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    register()
    return to_settings(load(overrides, extra=str(folder)))


def refused_file(folder: Path, *overrides: str, **files: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_files(folder, *overrides, **files)
    return sentence(caught.value)


# Keys


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("data.limits=2", "data.limit"),
        ("modle=demo", "model"),
        ("limit=3", "data.limit"),
        ("sed=1", "seed"),
        ("engine.tolerence=0.1", "engine.tolerance"),
        ("attr.option=[a,b]", "attr.options"),
        ("backend.pol_seconds=1", "backend.poll_seconds"),
    ],
)
def test_unknown_keys_are_refused_however_they_come(plus: str, given: str, near: str) -> None:
    message = refused(f"{plus}{given}")
    assert message.startswith(given.partition("=")[0])
    assert message.endswith(f"the nearest is {near}")


@pytest.mark.parametrize("given", ["+hydra.foo=1", "++hydra.job.foo=1", "hydra.lanucher.x=1"])
def test_unknown_keys_of_hydra_too(given: str) -> None:
    assert refused(given).startswith(f"{given.lstrip('+').partition('=')[0]}: Hydra has no such setting")


def test_unknown_keys_in_files(tmp_path: Path) -> None:
    top = "# @package _global_\ndata:\n  limits: 2\n"
    assert "data.limits: there is no such setting; the nearest is data.limit" in refused_file(
        tmp_path, "experiment=mine", experiment__mine=top
    )
    assert "seeds: there is no such setting; the nearest is seed" in refused_file(
        tmp_path, "experiment=mine", experiment__mine="# @package _global_\nseeds: 2\n"
    )
    model = "name: mine\nfamily: qwen2_audio\nid: demo\ndtpe: float32\n"
    assert "model.dtpe: there is no such setting; the nearest is model.dtype" in refused_file(
        tmp_path, "model=mine", model__mine=model
    )


def test_an_experiment_below_its_own_name_does_not_do_nothing(tmp_path: Path) -> None:
    message = refused_file(tmp_path, "experiment=mine", experiment__mine="data:\n  limit: 2\n")
    assert "# @package _global_" in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("+data.seed=1", "+data.seed: data.seed is a setting already"),
        ("+model=demo", "model: chosen more than once"),
        ("++model=demo", "++model=demo: a group is chosen without the ++"),
        ("+experiment=which_heads", "experiment: chosen more than once"),
        ("~data.limit", "~data.limit: settings are not removed"),
        ("~data.limits", "data.limits: there is no such setting"),
        ("~attr", "attr.name: expected a name"),
        ("demo", "demo: expected SETTING=VALUE"),
        ("=demo", "=demo: "),
        ("data=5", "data=5: "),
        ("granularity.layers.0=1", "granularity.layers"),
        ("data.limit.x=3", "data.limit"),
        ("+data.limit.x=3", "data.limit={x: 3}: expected a whole number"),
        ("attr.options.9=x", "attr.options[9]"),
        ("model/x=demo", "model.x: there is no such setting"),
        ("model=voxtrall", "model=voxtrall: expected one of audio_flamingo3, demo"),
        ("hydra/launcher=foo", "hydra/launcher=foo: expected one of basic"),
    ],
)
def test_odd_overrides_are_answered_by_name(given: str, said: str) -> None:
    assert said in refused(given)


# Values


@pytest.mark.parametrize(
    "given",
    [
        "seed=-1",
        "seed=1.5",
        "seed=true",
        "seed=99999999999999999999",
        "threads=0",
        "shard=0/2",
        "shard=3/2",
        "shard=one",
        "data.limit=0",
        "data.limit=x",
        "data.limit=2.0",
        "data.seed=-1",
        "corruption.seed=-1",
        "prompt.seed=-1",
        "site.window=0",
        "granularity.layers=[]",
        "granularity.layers=[0,0]",
        "granularity.layers=[1.5]",
        "granularity.layers=[0,x]",
        "granularity.layers=3",
        "granularity.edges=[]",
        "granularity.name=word",
        "engine.tolerance=nan",
        "engine.tolerance=inf",
        "engine.tolerance=-0.1",
        "engine.tolerance=0",
        "engine.memory_budget=-1",
        "engine.memory_budget=nan",
        "engine.pack_tokens=0",
        "engine.spot_checks=-1",
        "engine.licence_cells=0",
        "engine.steps=0",
        "backend.poll_seconds=0",
        "backend.poll_seconds=inf",
        "backend.poll_seconds=1e300",
        "backend.retries=-1",
        "backend.retries=1000",
        "backend.max_jobs=0",
        "backend.forget_seconds=-5",
        "backend.host=ftp://x",
        "backend.host=http://x:99999",
        "backend.host=http://x:y",
        "model.dtype=int8",
        "model.device=gpu",
        "model.device=cuda:x",
        "model.device_map=everywhere",
        "model.family=qwen",
        "model.data=demos",
        "model.name=a/b",
        "model.id=''",
        "attr.name=2024",
        "attr.name=null",
        "attr.options=[a]",
        "attr.options=[]",
        "attr.options=[a,' b']",
        "dry_run=maybe",
        "run_name=a/b",
        "run_name=..",
        "outputs=''",
        "outputs=$HOME/x",
        "outputs='~nobody_has_this_name/x'",
        "transcript=''",
        "transcript='   '",
        "on_failed_check=ignore",
        "metric.name=al",
        "prompt.layout=''",
    ],
)
def test_values_are_checked_with_their_range(given: str) -> None:
    """Before anything is loaded: composing alone refuses them."""
    key = given.partition("=")[0]
    message = refused(given)
    assert message.startswith(f"{key}=")
    assert "expected " in message


def test_settings_of_one_granularity_are_checked_with_it() -> None:
    for wrong in ("granularity.seconds=-1", "granularity.seconds=nan", "granularity.positions=0"):
        assert refused("granularity=audio", wrong).startswith(wrong.partition("=")[0])
    assert refused("corruption=gaussian", "corruption.scale=inf").startswith("corruption.scale=inf: expected a finite")


def test_numbers_that_come_as_text_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMIT", "8")
    assert compose("data.limit=${oc.env:LIMIT}").data.limit == 8
    assert compose("data.limit='8'").run_name == compose("data.limit=8").run_name
    assert compose("engine.tolerance=1e-3").engine.tolerance == 1e-3
    assert compose("dry_run=yes").dry_run is True


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("transcript=${x}", "transcript=${x}: "),
        ("transcript='five ${ dollars'", "transcript: "),
        ("seed=${seed}", "seed=${seed}: "),
        ("seed=${run_name}", "seed=${run_name}: expected a value, got one that refers to itself"),
        ("data.limit=${oc.env:LALM_PATCH_NO_SUCH}", "data.limit=${oc.env:LALM_PATCH_NO_SUCH}: "),
        ("attr.question=${attr.nope}", "attr.question=${attr.nope}: "),
    ],
)
def test_what_cannot_be_looked_up_names_its_setting(given: str, said: str) -> None:
    assert refused(given).startswith(said)


def test_the_advice_on_dollars_is_right() -> None:
    assert "\\${" in refused("transcript='it costs ${x}'")
    assert compose("model=demo_desta", r"transcript='it costs \${x}'").transcript == "it costs ${x}"


@pytest.mark.parametrize("missing", ["name", "question", "options", "response", "folder"])
def test_an_attribute_file_without_a_key(tmp_path: Path, missing: str) -> None:
    room = {
        "name": "room",
        "question": "How large?",
        "options": ["small", "large"],
        "response": "It is",
        "folder": "Room",
    }
    text = yaml.safe_dump({key: value for key, value in room.items() if key != missing})
    message = refused_file(tmp_path, "attr=room", attr__room=text)
    assert message.startswith(f"attr.{missing}: expected ")
    assert "needs name, question, options, response, folder" in message


@pytest.mark.parametrize("missing", ["name", "family", "id"])
def test_a_model_file_without_a_key(tmp_path: Path, missing: str) -> None:
    mine = {"name": "mine", "family": "qwen2_audio", "id": "demo"}
    text = yaml.safe_dump({key: value for key, value in mine.items() if key != missing})
    assert refused_file(tmp_path, "model=mine", model__mine=text).startswith(f"model.{missing}: expected ")


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b\n", "name: [", "name: a\nname: b\n", "\tname: a", "just text", "name: ${\n", "defaults: 5\n"],
    ids=["empty", "list", "cut", "twice", "tab", "text", "dollar", "defaults"],
)
def test_a_file_that_is_no_attribute(tmp_path: Path, text: str) -> None:
    assert "attr" in refused_file(tmp_path, "attr=broken", attr__broken=text)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "attr").mkdir()
    (tmp_path / "attr" / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    assert "UTF-8" in refused_file(tmp_path, "attr=latin")


# Text that YAML takes for something else

ROOM = "name: room\nquestion: Q?\noptions: {options}\nresponse: {response}\nfolder: Room\n"


@pytest.mark.parametrize(
    "options",
    [
        "[yes, no]",
        "[on, off]",
        "[True, False]",
        "[1, 2]",
        "[1.5, 2.5]",
        "[a, null]",
        "[a, ~]",
        "[a, 12:30]",
        "[a, [b]]",
    ],
)
def test_options_that_are_no_text(tmp_path: Path, options: str) -> None:
    message = refused_file(tmp_path, "attr=room", attr__room=ROOM.format(options=options, response="It is"))
    assert message.startswith("attr.options=[")
    assert "put text into quotes" in message


def test_the_quoted_options_are_right(tmp_path: Path) -> None:
    text = ROOM.format(options='["yes", "no"]', response="It is")
    assert from_files(tmp_path, "attr=room", attr__room=text).attr.options == ["yes", "no"]


@pytest.mark.parametrize("response", ["yes", "5", "null", "1.5", "{a: b}", "[a]"])
def test_texts_that_are_no_text(tmp_path: Path, response: str) -> None:
    text = ROOM.format(options="[a, b]", response=response)
    message = refused_file(tmp_path, "attr=room", attr__room=text)
    assert message.startswith("attr.response=")
    assert "put text into quotes" in message


def test_a_revision_is_not_a_number() -> None:
    """`1e10` is a commit's short name, and was turned into 10000000000.0."""
    assert refused("model.revision=1e10").startswith("model.revision=10000000000.0: expected text")
    assert compose("model.revision='1e10'").model.revision == "1e10"


# Paths


@pytest.mark.parametrize("path", ["outputs", "data.root", "model.id", "model.decoder", "model.encoder"])
@pytest.mark.parametrize("form", ["{}=~/x/y", "{}='~/x/y'", '{}="~/x/y"', "+{}=~/x/y"])
def test_the_home_folder_in_every_path(path: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    if form.startswith("+") and path not in ("data.root", "model.decoder", "model.encoder"):
        form = form.lstrip("+")
    found: Any = compose(form.format(path))
    for part in path.split("."):
        found = getattr(found, part)
    assert found == "/home/somebody/x/y"


def test_every_path_is_such_a_setting() -> None:
    """What the settings call a folder in their description is read as one."""
    assert {path for path, entry in ALLOWED.items() if isinstance(entry.range, Place)} == {
        "outputs",
        "data.root",
        "data.audio",
        "data.path",
        "model.id",
        "model.decoder",
        "model.encoder",
    }


# Characters that need quotes

HARD = [
    "你好",
    "a=b",
    "a,b",
    "a #b",
    "{x}",
    "What's up",
    'say "so"',
    "(a)",
    "f(x)",
    "[a]",
    "a:b;c|d&e",
    "1",
    "'",
]


@pytest.mark.parametrize("text", HARD)
def test_the_advice_for_hard_characters_works(text: str) -> None:
    """What the message says to type is typed into a shell, and is the text then."""
    message = refused("model=demo_desta", f"transcript={text}")
    assert message.startswith("transcript=")
    shell = typed("transcript", text)
    assert override("transcript", text) in message or repr(override("transcript", text)) in message
    told = subprocess.run(["sh", "-c", f"printf %s {shell}"], capture_output=True, text=True, check=True).stdout
    assert compose("model=demo_desta", told).transcript == text


def test_the_advice_for_lists() -> None:
    assert '\'attr.options=["男","女"]\'' in refused("attr.options=[男,女]")
    assert compose('attr.options=["男","女"]').attr.options == ["男", "女"]
    assert "'granularity.layers=[0,1]'" in refused("granularity.layers=0,1")
    assert "add -m" in refused("model=demo,voxtral")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=20))
def test_quoted_text_comes_back(text: str) -> None:
    """For any text, without what is looked up (`${`): quoting is read back by Hydra's grammar, and by a shell."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    text = text.replace("${", "{")
    assert OverridesParser.create().parse_override(override("transcript", text)).value() == text
    assert quoted(text)[0] == quoted(text)[-1]
    assert shlex.split(typed("transcript", text)) == [override("transcript", text)]


# All of it at once


def right_values(path: str) -> st.SearchStrategy[str]:
    """Overrides' values that a setting takes."""
    entry = ALLOWED[path]
    kind = entry.range
    if path in ("model.family", "granularity.name", "granularity.edges", "shard"):
        known = {
            "model.family": BUILT_IN,
            "granularity.name": ("layer", "token", "segment"),
            "granularity.edges": ("[audio-last]", "[audio-text,object-last]"),
            "shard": ("1/1", "2/3"),
        }
        return st.sampled_from(known[path])
    if isinstance(kind, Word):
        return st.sampled_from(kind.words)
    if isinstance(kind, Whole):
        return st.integers(kind.least, min(kind.most, kind.least + 1000)).map(str)
    if isinstance(kind, Number):
        low = max(kind.above, 0.0)
        return st.floats(low, min(kind.most, low + 100), exclude_min=True, allow_subnormal=False).map(repr)
    if isinstance(kind, Switch):
        return st.sampled_from(["true", "false"])
    if isinstance(kind, Listed):
        values = ["[a,b]", "[one,two,three]"] if entry.is_text else ["[0]", "[0,2,-1]"]
        return st.sampled_from(values)
    plain = {"model.device": "cpu", "model.device_map": "auto", "backend.host": "http://127.0.0.1:5001"}
    return st.sampled_from([plain.get(path, "word")])


WRONG = st.one_of(
    st.sampled_from(["null", "true", "-1", "0", "nan", "-inf", "1e400", "[]", "[null]", "{a: 1}", "''", "' '", "???"]),
    st.sampled_from(["${x}", "${seed", "a=b", "a,b", "你好", "#", "~", "(", "choice(1,2)", "\\", "'", '"', "x" * 300]),
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(repr),
)
KEYS = st.sampled_from([*ALLOWED, *dict.fromkeys(path.partition(".")[0] for path in ALLOWED), "experiment"])
RIGHT = KEYS.filter(lambda key: key in ALLOWED and key != "run_name").flatmap(
    lambda key: right_values(key).map(lambda value: f"{key}={value}")
)
MISSPELT = KEYS.flatmap(
    lambda key: st.tuples(st.just(key), st.integers(0, len(key) - 1)).map(
        lambda at: at[0][: at[1]] + at[0][at[1] + 1 :]
    )
)
BROKEN = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "", "+", "++"]), KEYS, WRONG),
    st.builds("{}{}={}".format, st.sampled_from(["", "+", "++"]), MISSPELT, st.just("1")),
    st.builds("{}{}".format, st.sampled_from(["", "~"]), KEYS),
)


@pytest.mark.parametrize("override", ["model.name=\n", "\n", "attr\t", "data.limit=\r\n", "prompt.order=\x00"])
def test_invisible_characters_are_told_on_one_line(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("model=demo", override)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "part", range(4)
)  # 50 each, so that a busy machine does not run into the time limit of one test
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    overrides=st.lists(
        st.one_of(RIGHT, RIGHT, BROKEN), min_size=1, max_size=3, unique_by=lambda given: given.split("=")[0]
    )
)
def test_random_configurations_are_settings_or_a_sentence(part: int, overrides: list[str]) -> None:
    """Half of 200 lists of overrides are wrong somewhere; the sentence names a key, or the override that is none."""
    try:
        found = compose(*overrides)
    except ConfigError as error:
        message = sentence(error)
        keys = {given.partition("=")[0].lstrip("+~") for given in overrides}
        groups = {key.partition(".")[0] for key in keys}
        assert any(key in message for key in keys | groups if key) or "SETTING=VALUE" in message
    else:
        assert isinstance(found, RunSettings)
        again = OmegaConf.create(asdict(found))
        assert to_settings(again) == found


# What the settings say of themselves


def test_every_setting_says_what_it_takes() -> None:
    """The defaults are within it, and there are words for it."""
    composed = asdict(compose())
    for path, entry in ALLOWED.items():
        assert str(entry)
        default: Any = composed
        for part in path.split("."):
            default = default[part]
        assert entry.read(default) == default
        if isinstance(entry.range, Text) and not isinstance(entry.range, Word):
            with pytest.raises(Refused):
                entry.read(5)
    assert set(NOT_PART_OF_A_RUN) <= set(ALLOWED)
    assert CHOICES["prompt.layout"] == (None, "chat", "user", "flat", "fixed")


def test_the_families_are_those_of_the_registry() -> None:
    assert set(BUILT_IN) <= set(FAMILIES)


def test_a_misspelt_setting_imports_no_torch() -> None:
    script = (
        "import sys, lalm_patch\n"
        "for given in ('data.limits=1', 'model.family=qwen', 'shard=0/2', 'seed=-1', 'attr.options=[男,女]'):\n"
        "    try:\n"
        "        lalm_patch.compose(given)\n"
        "    except lalm_patch.ConfigError:\n"
        "        continue\n"
        "    raise SystemExit(given)\n"
        "assert not {'torch', 'transformers', 'nnsight'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

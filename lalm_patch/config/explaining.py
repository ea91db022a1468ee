"""What Hydra, OmegaConf and YAML say about a configuration, in one sentence that names the key and what to do.

Hydra's own advice is left out: to add a key with `+` is the way to a setting that does nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from lalm_patch.config.words import GROUPS, nearest, no_such_setting, readable
from lalm_patch.errors import ConfigError, LalmPatchError
from lalm_patch.settings import ALLOWED


class Unnamed(ConfigError):
    """An explanation that does not say which override is meant: the library did not either."""


def told_by_libraries(error: BaseException) -> bool:
    """Whether an error is about a configuration: raised by what composes it, or because of such an error."""
    kinds = (LalmPatchError, HydraException, OmegaConfBaseException, yaml.YAMLError)
    return any(isinstance(link, kinds) for link in chain(error))


def explained(error: BaseException, *, in_shell: bool = False, outside: BaseException | None = None) -> LalmPatchError:
    """One sentence for whatever was raised while a configuration was composed.

    Args:
        error: what was raised; an error of the package anywhere in its chain is the explanation.
        in_shell: whether overrides came from a shell, and advice is to be typed into one.
        outside: an error that was being handled before, which explains nothing here.
    """
    links = list(chain(error, outside))
    for link in links:
        if isinstance(link, LalmPatchError):
            return link
    for link in links:
        for kind, explain in _EXPLANATIONS.items():
            if isinstance(link, kind) and (text := explain(link, in_shell)):
                in_a_file = isinstance(link, OmegaConfBaseException) and str(link.full_key) not in ALLOWED
                return Unnamed(text) if in_a_file else ConfigError(text)
    because = f": {_line(error.__cause__)}" if error.__cause__ is not None else ""
    return Unnamed(f"the settings cannot be composed: {_line(error)}{because}")


def chain(error: BaseException | None, outside: BaseException | None = None) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on; without what was being handled `outside`."""
    seen: list[BaseException] = []
    while error is not None and error is not outside and error not in seen:
        seen.append(error)
        yield error
        # OmegaConf hides what a resolver raised (it sets no cause and suppresses the context), so both are followed.
        error = error.__cause__ or error.__context__


def _line(error: BaseException | None) -> str:
    """An error's text on one line, without Hydra's advice to append keys and without addresses of its manual."""
    text = re.sub(r"(To append to your|Either remove \+|Set the env|See https://)[^\n]*", "", str(error))
    return " ".join(text.split()) or type(error).__name__


def _show(override: str, in_shell: bool) -> str:
    return shlex.quote(override) if in_shell else repr(override)


def _unreadable(error: BaseException, in_shell: bool) -> str:
    assert isinstance(error, OverrideParseException)
    given = str(error.override)
    if "=" not in given:
        return _not_an_override(given)
    written = readable(given)
    if written is None:
        reason = _on_one_line(_line(error).partition(" ^")[0])
        return f"{_on_one_line(given)} cannot be read ({reason}); expected SETTING=VALUE, text in quotes"
    return f"{_on_one_line(given)} cannot be read: such characters need quotes; write {_show(written, in_shell)}"


def _not_an_override(given: str) -> str:
    return f"{_on_one_line(given)}: expected SETTING=VALUE, for example model=demo"


def _on_one_line(given: str) -> str:
    """An override as it was written, its line breaks and other invisible characters as escapes."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in given)


def _missing(error: BaseException, in_shell: bool) -> str:
    assert isinstance(error, MissingConfigException)
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if not error.options:
        return f"{error.missing_cfg_file}: there is no such YAML file; {_line(error)}"
    options = sorted(error.options)
    return f"{group}={name}: expected one of {', '.join(options)}; the nearest is {nearest(name, options)}"


def _composition(error: BaseException, in_shell: bool) -> str:
    text = str(error)
    if found := re.match(r"Could not override '(.+?)'", text):
        path = found[1].partition("@")[0].lstrip("+~")
        return _unknown_or_group(path)
    if found := re.match(r"Could not delete\D*?'~?(.+?)'", text):
        path = found[1].partition("=")[0]
        known = path in ALLOWED or path in (*GROUPS, "experiment")
        return f"~{path}: settings are not removed; leave it out, or give a value" if known else no_such_setting(path)
    if found := re.match(r"Could not append to config. An item is already at '(.+?)'", text):
        return f"+{found[1]}: {found[1]} is a setting already; write it without the +"
    if found := re.match(r"(\S+) appears more than once|Multiple values for (\S+?)\.", text):
        group = found[1] or found[2]
        return f"{group}: chosen more than once; write {group}=NAME once, without a +"
    if found := re.match(r"force-add of config groups is not supported: '\+\+(.*)'", text):
        return f"++{found[1]}: a group is chosen without the ++, {found[1]}"
    if found := re.match(r"Ambiguous value for argument '(.*?)'\n", text, re.DOTALL):
        written = readable(found[1])
        one = f"for one value write {_show(written, in_shell)}" if written else "give one"
        return f"{found[1]}: expected one value, got several; {one}, or for a run of each add -m"
    if found := re.match(r"Sweep parameters '(.*)' requires", text, re.DOTALL):
        return f"{found[1]}: expected one value, got several; for a run of each add -m"
    if found := re.match(r"In '(.+?)': (.*)", text, re.DOTALL):
        return f"{found[1]}.yaml does not fit the other settings: {_line(Exception(found[2]))}"
    return ""


def _unknown_or_group(path: str) -> str:
    if path == "":
        return "an override without a name: expected SETTING=VALUE, for example model=demo"
    if path.startswith("hydra"):
        return f"{path}: Hydra has no such setting; its settings are shown by --cfg hydra"
    groups = [*GROUPS, "experiment"]
    if path in groups:
        return f"{path}: this group's file is chosen in another place already; write {path}=NAME once"
    return no_such_setting(path.replace("/", "."))


def _interpolation(error: BaseException, in_shell: bool) -> str:
    assert isinstance(error, OmegaConfBaseException)
    key = str(error.full_key or "").strip()
    if isinstance(error, GrammarParseError):
        return f"{key}: {looked_up(error)}"
    return f"{key}: {_line(error).partition(' full_key:')[0]}" if key else ""


def looked_up(error: BaseException) -> str:
    """What to say of a text whose `${}` cannot be looked up."""
    because = _line(error).partition(" full_key:")[0]
    return (
        f"what stands in ${{}} is looked up, and could not be ({because}); for the characters themselves put a "
        r"backslash before the dollar, \${"
    )


def _yaml(error: BaseException, in_shell: bool) -> str:
    assert isinstance(error, yaml.YAMLError)
    mark = getattr(error, "problem_mark", None)
    place = "a YAML file" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}"
    return f"{place} is not valid YAML: {getattr(error, 'problem', None) or _line(error)}; put text into quotes"


def _encoding(error: BaseException, in_shell: bool) -> str:
    return f"a YAML file is not in UTF-8 ({_line(error)}); save it in UTF-8"


_EXPLANATIONS: dict[type[BaseException], Callable[[BaseException, bool], str]] = {
    OverrideParseException: _unreadable,
    MissingConfigException: _missing,
    HydraException: _composition,
    yaml.YAMLError: _yaml,
    UnicodeDecodeError: _encoding,
    OmegaConfBaseException: _interpolation,
}
"""In this order, for every link of an error's chain."""

"""What is promised of damaged checkpoints, on random damages.

Of every damage one of three things is true:

1. It is refused, in one sentence that names the file or the folder it is in.
2. It makes no difference: the run's numbers are the undamaged one's.
3. It makes another model that opens, such as one with another number in a safetensors file, which has no checksum. Its
   numbers carry another identity, so they are never shown as the undamaged run's, continued as it, or merged with it.
   Where the undamaged identity is asked for (`model.revision=local:...`), it is refused.

So with a pinned identity no damage gives other numbers, and without one none gives them under the undamaged name. For
copies from the hub the checksums it keeps take the pin's place.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import POINTER, Tiny, save_tinies
from huggingface_hub import constants
from test_fingerprint import _cached

from lalm_patch.errors import ModelError

DAMAGES = 120
SEED = 16


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return save_tinies(tmp_path_factory.mktemp("tinies"))


def _files(tiny: Tiny) -> list[Path]:
    return sorted(path for folder in tiny.folders for path in folder.iterdir() if path.is_file())


def _weights(tiny: Tiny) -> list[Path]:
    return [path for path in _files(tiny) if path.suffix in (".safetensors", ".bin", ".pth")]


def _cut(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_files(tiny))
    os.truncate(path, chance.randrange(path.stat().st_size))
    return path


def _flip(path: Path, first: int, end: int, chance: random.Random) -> Path:
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3))):
        data[chance.randrange(first, end)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path


def _flip_header(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_weights(tiny))
    size = int.from_bytes(path.read_bytes()[:8], "little") + 8 if path.suffix == ".safetensors" else 512
    return _flip(path, 0, size, chance)


def _flip_data(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_weights(tiny))
    size = int.from_bytes(path.read_bytes()[:8], "little") + 8 if path.suffix == ".safetensors" else 512
    return _flip(path, size, path.stat().st_size, chance)


def _flip_small(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice([path for path in _files(tiny) if path not in _weights(tiny)])
    return _flip(path, 0, path.stat().st_size, chance)


def _missing(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_files(tiny))
    path.unlink()
    return path


def _renamed(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_files(tiny))
    path.rename(path.with_name(f"{chance.choice(('old-', 'x'))}{path.name}"))
    return path


def _swapped(tiny: Tiny, chance: random.Random) -> Path:
    """Two shards where there are two, else two files of a kind."""
    weights = _weights(tiny)
    files = weights if len(weights) > 1 else [path for path in _files(tiny) if path not in weights]
    first, second = chance.sample(files, 2)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    return first


def _emptied(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_files(tiny))
    path.write_bytes(b"")
    return path


def _pointer(tiny: Tiny, chance: random.Random) -> Path:
    path = chance.choice(_files(tiny))
    path.write_bytes(POINTER)
    return path


def _zeroed(tiny: Tiny, chance: random.Random) -> Path:
    """A block the disk lost."""
    path = chance.choice(_weights(tiny))
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        file.write(bytes(min(4096, path.stat().st_size - file.tell())))
    return path


KINDS: tuple[Callable[[Tiny, random.Random], Path], ...] = (
    _cut,
    _flip_header,
    _flip_data,
    _flip_small,
    _missing,
    _renamed,
    _swapped,
    _emptied,
    _pointer,
    _zeroed,
)


def test_no_damage_gives_other_numbers_under_the_same_identity(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    chance = random.Random(SEED)
    undamaged = {kind: tiny.copy(tmp_path / f"whole-{kind}").answer() for kind, tiny in tinies.items()}
    outcomes: Counter[str] = Counter()
    silent: list[str] = []
    for number in range(DAMAGES):
        kind = list(tinies)[number % len(tinies)]
        damage = KINDS[(number // len(tinies)) % len(KINDS)]
        tiny = tinies[kind].copy(tmp_path / str(number))
        path = damage(tiny, chance)
        where = f"{number}: {damage.__name__} of {path.relative_to(tmp_path)}"
        identity, numbers = undamaged[kind]
        found = _outcome(tiny, where)
        if isinstance(found, str):
            assert path.name in found or str(path.parent) in found, (where, found)
            assert "\n" not in found, where
            outcomes["refused"] += 1
        elif torch.equal(found[1], numbers):
            outcomes["same numbers"] += 1
        else:
            assert found[0] != identity, where
            outcomes["other numbers, other identity"] += 1
            silent.append(where)
        # The same folder, asked for by the undamaged identity.
        pinned = _outcome(tiny, where, revision=identity)
        assert isinstance(pinned, str) or (pinned[0] == identity and torch.equal(pinned[1], numbers)), where
    assert outcomes.total() == DAMAGES
    assert outcomes["refused"] > DAMAGES // 2, (outcomes, silent)
    assert outcomes["same numbers"], outcomes


def _outcome(tiny: Tiny, where: str, **pinned: str) -> str | tuple[str, torch.Tensor]:
    """The refusal, or identity and numbers; whatever else is raised is a fault."""
    try:
        return tiny.answer(**pinned)
    except ModelError as error:
        return str(error)
    except BaseException as error:
        error.add_note(where)
        raise


def test_no_damage_to_a_copy_from_the_hub_gives_other_numbers(
    tinies: dict[str, Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit in the middle of a tensor, a number in a configuration: the hub's checksums find them."""
    chance = random.Random(SEED)
    for number in range(20):
        kind = ("shards", "voxtral", "generic", "qwen_audio")[number % 4]
        cache = tmp_path / str(number)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        copy = Tiny(tinies[kind].family, (_cached(tinies[kind].folders[0], cache),))
        damage = (_flip_data, _flip_small, _flip_header, _zeroed, _cut)[number // 4]
        path = damage(copy, chance)
        repository = Tiny(copy.family, (Path("owner/name"),))
        refused = _outcome(repository, f"{number}: {damage.__name__} of {path}")
        assert isinstance(refused, str), path
        assert path.name in refused, refused

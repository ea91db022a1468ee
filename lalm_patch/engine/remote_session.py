"""One clip as one request: clean run, corrupted run and every cell of the grid, in one nnsight session.

The session's body is what travels: its source, and the plain data it reads. It runs on a server that has the model and
not this package, so it uses nothing but torch and nnsight and there is nothing to register for shipping. It traces the
whole model only, never a submodule, and never stops a run half-way, because NDIF does neither for keys that are not
trusted. What comes back is a few numbers per cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import nnsight
import torch
from torch import Tensor

from lalm_patch.engine.readout import Readout
from lalm_patch.errors import HostError, ModelError
from lalm_patch.interventions.patches import Intervention

Write = tuple[int, list[int], list[int]]
"""Layer, rows, positions: the states to take from the clean run, in one write."""
Pass = tuple[int, list[Write]]
"""Number of rows, and the writes in the order of the layers: one forward pass."""


@dataclass(frozen=True)
class ClipRequest:
    """What the server is asked to compute for one clip.

    Attributes:
        clean: inputs of the whole model, audio included, of the clip.
        corrupted: likewise, of what replaces it.
        positions: length of the sequence.
        cells: the interventions, one row each.
        repeated: indices of cells to compute once more, alone and from the audio on.
        option_ids: target tokens.
        answer: index of the right option.
        correct: `options` or `vocabulary`: what the answer is compared with to tell whether the clip counts.
        pack_tokens: most positions in one forward pass.
    """

    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]
    positions: int
    cells: tuple[Intervention, ...]
    repeated: tuple[int, ...]
    option_ids: tuple[int, ...]
    answer: int
    correct: str
    pack_tokens: int

    @property
    def inputs_differ(self) -> bool:
        """Whether the clip is anything else than what replaces it."""
        return any(not torch.equal(self.clean[name], self.corrupted[name]) for name in self.clean)

    @property
    def passes(self) -> list[Pass]:
        """The cells as rows of forward passes, in order."""
        rows = max(1, self.pack_tokens // self.positions)
        return [_one_pass(self.cells[start : start + rows]) for start in range(0, len(self.cells), rows)]


@dataclass(frozen=True)
class ClipAnswer:
    """What came back.

    Attributes:
        base: the clean and the corrupted run.
        cells: one row per cell; None of a clip that does not count.
        repeated: one row per repeated cell; None likewise.
        moved: largest difference of the two runs' logits, relative to the clean run's largest logit.
        dtype: floating-point type of the decoder on the server.
        versions: of the libraries on the server.
    """

    base: Readout
    cells: Readout | None
    repeated: Readout | None
    moved: float
    dtype: str
    versions: dict[str, str]


def _one_pass(cells: Sequence[Intervention]) -> Pass:
    by_layer: dict[int, tuple[list[int], list[int]]] = {}
    if any(not patch.plain for cell in cells for patch in cell.patches):
        raise ModelError(
            "a request to a server puts in the same place's states of the clean run: expected patches without a source "
            "of their own, use backend=local"
        )
    if any(cell.path is not None for cell in cells):
        raise ModelError("a request to a server patches states: expected no paths, use backend=local")
    for row, cell in enumerate(cells):
        for patch in cell.patches:
            rows, positions = by_layer.setdefault(patch.layer, ([], []))
            rows.extend([row] * len(patch.positions))
            positions.extend(patch.positions)
    return len(cells), [(layer, rows, positions) for layer, (rows, positions) in sorted(by_layer.items())]


def send_session(model: Any, decoder: Any, request: ClipRequest, backend: Any) -> None:
    """Hand the session to `backend`, which does not wait for it; the result is one saved value, named `result`.

    Args:
        model: nnsight's wrapper of the whole model.
        decoder: nnsight's wrapper of its decoder, inside `model`.
        request: what to compute.
        backend: carries the session to the server.
    """
    # Every name the body reads is bound here, so that nothing of the package is shipped with it.
    clean, corrupted, passes = request.clean, request.corrupted, request.passes
    repeated = [_one_pass([request.cells[index]])[1] for index in request.repeated]
    patched = [patch for cell in request.cells for patch in cell.patches]
    layers = sorted({patch.layer for patch in patched})
    first = min((patch.positions[0] for patch in patched), default=0)
    ids, answer, whole = list(request.option_ids), request.answer, request.correct == "vocabulary"
    # No name serves two loops: on Python 3.12.1 the second one then sees stale values in a session's inner traces.
    with model.session(backend=backend):
        states = {}
        with torch.no_grad(), model.trace(**clean, use_cache=False):
            for source in layers:
                states[source] = decoder.layers[source].output[0, first:].clone()
            clean_logits = model.output.logits[0, -1].float().clone()
        with torch.no_grad(), model.trace(**corrupted, use_cache=False):
            given = decoder.inputs[1]
            embeds = given["inputs_embeds"].clone()
            places = given.get("position_ids")
            corrupted_logits = model.output.logits[0, -1].float().clone()
        base = torch.stack([clean_logits, corrupted_logits])
        target = base[:, ids[answer]]
        pool = base if whole else base[:, ids]
        # Only what certainly does not count is left out: ties are decided where the result is read.
        gained = target - base.logsumexp(-1)
        clean_wrong = bool((pool[0] > target[0]).any())
        corrupted_right = int((pool[1] >= target[1]).sum()) == 1
        answers = [(base[:, ids].cpu(), base.logsumexp(-1).cpu(), base.argmax(-1).cpu())]
        ran = []
        if not clean_wrong and not corrupted_right and bool(gained[0] > gained[1]):
            for number in range(len(passes)):
                height, writes = passes[number]
                inputs = {"inputs_embeds": embeds.expand(height, -1, -1).contiguous()}
                inputs["attention_mask"] = torch.ones(height, embeds.shape[1], dtype=torch.long, device=embeds.device)
                if places is not None:
                    inputs["position_ids"] = places.expand(*places.shape[:-2], height, -1)
                with torch.no_grad(), model.trace(**inputs, use_cache=False):
                    seen = number
                    for layer, where, what in writes:
                        shifted = torch.tensor(what, device=embeds.device) - first
                        decoder.layers[layer].output[where, what] = states[layer][shifted]
                    logits = model.output.logits[:, -1].float().clone()
                answers.append((logits[:, ids].cpu(), logits.logsumexp(-1).cpu(), logits.argmax(-1).cpu()))
                ran.append(seen)
            for cell in repeated:
                with torch.no_grad(), model.trace(**corrupted, use_cache=False):
                    for depth, _, spots in cell:
                        offsets = torch.tensor(spots, device=embeds.device) - first
                        decoder.layers[depth].output[0, spots] = states[depth][offsets]
                    alone = model.output.logits[:, -1].float().clone()
                answers.append((alone[:, ids].cpu(), alone.logsumexp(-1).cpu(), alone.argmax(-1).cpu()))
        result = nnsight.save(  # noqa: F841 (a server returns what is saved by the names it has here)
            {
                "answers": answers,
                "passes": ran,
                "positions": embeds.shape[1],
                "moved": float((clean_logits - corrupted_logits).abs().max() / clean_logits.abs().max()),
                "dtype": str(embeds.dtype),
                "versions": {name: version(name) for name in ("torch", "transformers", "nnsight")},
            }
        )


def read_answer(request: ClipRequest, result: dict[str, Any]) -> ClipAnswer:
    """The saved values of the session, compared with what was asked.

    Raises:
        HostError: the server did something else than it was sent.
    """
    if result["positions"] != request.positions:
        raise HostError(
            f"the server's decoder received {result['positions']} positions for a prompt of {request.positions}: its "
            f"transformers ({result['versions']['transformers']}) expands the audio otherwise than the one here; use "
            "the same version on both sides"
        )
    parts = [
        Readout(*(part.numpy() for part in (options.float(), total.float(), top.long())))
        for options, total, top in result["answers"]
    ]
    base, rest = parts[0], parts[1:]
    cells = repeated = None
    if rest:
        passes = len(request.passes)
        if result["passes"] != list(range(passes)) or len(rest) != passes + len(request.repeated):
            raise HostError(
                f"the server ran forward passes {result['passes']} where 0 to {passes - 1} were asked for, each once; "
                "its Python runs nnsight's sessions wrongly (3.12.1 is known to); use another host, or backend=local"
            )
        cells, repeated = _joined(rest[:passes]), _joined(rest[passes:])
    return ClipAnswer(
        base, cells, repeated, result["moved"], result["dtype"].removeprefix("torch."), dict(result["versions"])
    )


def _joined(parts: Sequence[Readout]) -> Readout | None:
    if not parts:
        return None
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return Readout.scatter([(range(offsets[i], offsets[i + 1]), part) for i, part in enumerate(parts)])

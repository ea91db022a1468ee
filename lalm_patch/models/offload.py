"""Weights that are not all where the model computes: layers are brought in one by one, the next while one computes.

A model is a row of layers (of its audio encoder, then of its decoder). Each gets its weights when it is about to be
called, and gives them up when another one is called. So a pass up the layers reads every weight once, whatever is done
with a layer while it is there. It works by hooks on the layers: whoever calls them, calls them as always.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalm_patch.errors import ModelError
from lalm_patch.models.weights import refuse_not_finite

_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ [1-9]\d*\s+(/.*)$")


@dataclass(frozen=True)
class _InFile:
    """A tensor's place in a file of weights."""

    path: Path
    offset: int

    def read(self, like: Tensor) -> Tensor:
        """The tensor, read into memory of its own."""
        made = torch.empty(like.shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())
        if made.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                bytes_of: Any = made.view(-1).view(torch.uint8).numpy()
                view = memoryview(bytes_of)
                while len(view):
                    count = file.readinto(view)
                    if not count:
                        raise ModelError(f"{self.path}: ends where weights are expected; it was changed, load it again")
                    view = view[count:]
        return made


@dataclass
class _Stored:
    """One parameter of a layer: where its weights stay.

    Attributes:
        parameter: the parameter.
        name: its name in the layer.
        kept: its weights while the layer is away; memory-mapped ones take no memory until they are looked at.
        place: where they are in a file; None for weights that are in memory.
        dtype: what they are computed with.
    """

    parameter: nn.Parameter
    name: str
    kept: Tensor
    place: _InFile | None
    dtype: torch.dtype


@dataclass
class _Brought:
    """A layer's weights where the model computes.

    Attributes:
        tensors: one for each parameter.
        event: after which they are there, on a GPU.
    """

    tensors: list[Tensor]
    event: torch.cuda.Event | None


class Offloaded:
    """Brings the weights of a model's layers in.

    Args:
        module: the model; every list of modules in it, that is in no other, is a row of layers. A row that takes no
            more than two of the largest layers (the audio encoder of a large model) stays where the model computes.
        device: where it computes.
        dtypes: what each parameter, by its name, is computed with.
        on_disk: whether weights stay in the files they are mapped from; else in the CPU's memory.
        where: the checkpoint, for messages.

    Raises (while a layer is brought in):
        ModelError: its weights are not finite, or the file was cut meanwhile.

    Attributes:
        reads: how often each layer's weights were brought in.
        layer_bytes: what each layer takes where it computes.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype], on_disk: bool, where: str = ""
    ) -> None:
        self.where = where
        self.device = device
        rows = dict(_offloaded_layers(module))
        self.names = list(rows)
        of_layers = {parameter: name for name, layer in rows.items() for parameter in layer.parameters()}
        self._layers: list[list[_Stored]] = [[] for _ in rows]
        number = {name: index for index, name in enumerate(self.names)}
        mapped = _mapped_files() if on_disk else []
        for name, parameter in module.named_parameters():
            dtype = dtypes.get(name, parameter.dtype)
            if parameter not in of_layers:
                parameter.data = parameter.data.to(device, dtype)
                continue
            layer = of_layers[parameter]
            kept, place = parameter.data, _place(parameter.data, mapped)
            if not on_disk:
                kept = kept.to(dtype)
                kept = kept.pin_memory() if device.type == "cuda" else kept
                parameter.data = kept
            self._layers[number[layer]].append(_Stored(parameter, name, kept, place, dtype))
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        self.layer_bytes = [sum(one.kept.numel() * one.dtype.itemsize for one in layer) for layer in self._layers]
        self.reads = [0] * len(self._layers)
        self._here: int | None = None
        self._next: tuple[int, Future[_Brought]] | None = None
        self._checked: set[int] = set()
        self._worker = ThreadPoolExecutor(1, "weights")
        cuda: Any = torch.cuda  # without types
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._resting = False
        self._numbers = {layer_module: index for index, layer_module in enumerate(rows.values())}
        for layer_module, index in self._numbers.items():
            layer_module.register_forward_pre_hook(lambda *_, index=index: self._enter(index))

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The parameters of layers that come and go."""
        return {one.parameter for layer in self._layers for one in layer}

    @contextmanager
    def bringing(self, widened: Container[str]) -> Iterator[None]:
        """While the context is open, some parameters, by name, come in float32."""
        chosen = [one for layer in self._layers for one in layer if one.name in widened and one.dtype.itemsize == 2]
        before = [one.dtype for one in chosen]
        self._forget()
        for one in chosen:
            one.dtype = torch.float32
        try:
            yield
        finally:
            self._forget()
            for one, dtype in zip(chosen, before, strict=True):
                one.dtype = dtype

    def bring_in(self, layer: nn.Module) -> None:
        """Have a layer's weights where it computes: for who looks at its device before calling it."""
        if (index := self._numbers.get(layer)) is not None:
            self._enter(index)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is brought in while the context is open: for calls that end at a layer's door."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def _enter(self, index: int) -> None:
        """A layer is about to be called."""
        if index == self._here or self._resting:
            return
        self._leave()
        brought = self._take(index)
        if brought.event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(brought.event)
            for tensor in brought.tensors:
                tensor.record_stream(current)
        for one, tensor in zip(self._layers[index], brought.tensors, strict=True):
            one.parameter.data = tensor
        self._here = index
        self.reads[index] += 1
        self._check(index, brought)
        if index + 1 < len(self._layers):
            self._next = index + 1, self._worker.submit(self._bring, index + 1)

    def _leave(self) -> None:
        """The layer that is here gives its weights up."""
        if self._here is not None:
            for one in self._layers[self._here]:
                one.parameter.data = one.kept
            self._here = None

    def _forget(self) -> None:
        """No layer is here, and none is on its way."""
        self._leave()
        if self._next is not None:
            self._next[1].result()
            self._next = None

    def _take(self, index: int) -> _Brought:
        """A layer's weights: those that are on their way, if they are the ones."""
        coming, self._next = self._next, None
        if coming is not None:
            number, future = coming
            brought = future.result()  # one at a time: two layers at most take memory
            if number == index:
                return brought
        return self._bring(index)

    def _bring(self, index: int) -> _Brought:
        """Runs in a thread of its own while the layer before computes."""
        tensors, event = [], None
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for one in self._layers[index]:
                found = one.kept if one.place is None else one.place.read(one.kept)
                tensors.append(found.to(self.device, one.dtype, non_blocking=True))
            if self._stream is not None:
                cuda: Any = torch.cuda
                event = cuda.Event()
                event.record(self._stream)
        return _Brought(tensors, event)

    def _check(self, index: int, brought: _Brought) -> None:
        """A layer's weights are numbers: looked at when they are here for the first time."""
        if index in self._checked:
            return
        self._checked.add(index)
        pairs = zip((one.name for one in self._layers[index]), brought.tensors, strict=True)
        refuse_not_finite(pairs, self.where)


def rows_of_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model in the order of its modules: children of every outermost list of modules, by name."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            for number, layer in child.named_children():
                yield f"{path}.{number}", layer
        else:
            yield from rows_of_layers(child, f"{path}.")


def _offloaded_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of rows that are too large to stay."""
    sizes: dict[str, list[int]] = {}
    for name, layer in rows_of_layers(module):
        size = sum(parameter.numel() for parameter in layer.parameters())
        sizes.setdefault(name.rpartition(".")[0], []).append(size)
    largest = max((max(row) for row in sizes.values()), default=0)
    for name, layer in rows_of_layers(module):
        if sum(sizes[name.rpartition(".")[0]]) > 2 * largest:
            yield name, layer


def _mapped_files() -> list[tuple[int, int, int, Path]]:
    """Files this process has mapped and not written to: begin and end in memory, offset, path. Elsewhere than on Linux
    none: weights are then read through the mapping."""
    found = []
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return []
    current: tuple[int, int, int, Path] | None = None
    for line in lines:
        if match := _MAPPED.match(line):
            begin, end, offset = (int(number, 16) for number in match.groups()[:3])
            current = begin, end, offset, Path(match[4])
        elif re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            current = None
        elif current is not None and line.startswith("Anonymous:"):
            # Pages of one's own are pages that were changed after they had been read.
            if int(line.split()[1]) == 0:
                found.append(current)
            current = None
    return found


def _place(tensor: Tensor, mapped: Iterable[tuple[int, int, int, Path]]) -> _InFile | None:
    """Where in a file a tensor is."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        return None
    begin, size = tensor.data_ptr(), tensor.numel() * tensor.itemsize
    for low, high, offset, path in mapped:
        if low <= begin and begin + size <= high:
            return _InFile(path, offset + begin - low)
    return None


def computed_dtypes(module: nn.Module, dtype: torch.dtype, beginning: str = "") -> dict[str, torch.dtype]:
    """What each parameter is computed with that is not computed as it is stored.

    Args:
        module: the model.
        dtype: what most are computed with; transformers keeps those in float32 that a model's class says.
        beginning: of the names of the parameters in question.
    """
    kept = {*(getattr(module, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())}
    return {
        name: torch.float32 if kept & set(name.split(".")) else dtype
        for name, parameter in module.named_parameters()
        if name.startswith(beginning) and parameter.is_floating_point()
    }

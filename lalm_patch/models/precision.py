"""What a model whose weights are stored in half precision computes with.

Residual streams of trained models carry outliers of tens of thousands beside values of one, so that a stream in
bfloat16 loses what tracing measures. Weights in half precision are exact in float32; only what is multiplied with them
was rounded:

- `as_loaded`: everything in the weights' type, as transformers does it and as others publish it.
- `stream`: residual stream, norms, rotary positions, softmax and head in float32; the inputs of the decoder's linear
  layers are rounded to the weights' type, products are summed in float32 (on a CPU that is no faster than `float32`).
  Encoder and connector, which run twice per clip, are as in `float32`: the decoder carries on all that they lose.
- `float32`: linear layers of float32 inputs with the stored weights. On a GPU with bfloat16 weights the input is split
  into two bfloat16 parts, x = hi + lo, and x W = hi W + lo W, both summed in float32; elsewhere one weight at a time is
  widened while it is used.

Weights stay stored as they are. What is no linear layer and no embedding (norms, convolutions) is small and is widened
for good. How far a model is from float32 can be measured on itself, see `exactly`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lalm_patch.models.offload import Offloaded

WIDENED_AT_ONCE = 2**22
"""Numbers of a weight that are in memory in float32 at once: 16 MiB."""
HALF = (torch.bfloat16, torch.float16)


def compute_with(module: nn.Module, mode: str) -> bool:
    """Let a model compute in another precision than its weights have.

    Args:
        module: the model.
        mode: `as_loaded`, `stream` or `float32`.

    Returns:
        Whether anything is different from then on: not with weights that are float32 already.
    """
    if mode == "as_loaded" or not any(parameter.dtype in HALF for parameter in module.parameters()):
        return False
    _multiply_with(module, _exact)
    if mode == "stream":
        find: Callable[[], nn.Module] | None = getattr(module, "get_decoder", None)
        _multiply_with(module if find is None else find(), _stream)
    for tensor in _widened(module):
        tensor.data = tensor.data.float()
    return True


@contextmanager
def exactly(module: nn.Module, offloaded: Offloaded | None = None) -> Iterator[None]:
    """Let a model compute in plain float32, whatever it computes with else, while the context is open.

    Every linear layer widens its weight while it is used, on any device; what is computed outside must not be mixed
    with what is computed inside.

    Args:
        module: the model.
        offloaded: what brings its layers' weights in, if they are not all where it computes.
    """
    undo = _multiply_with(module, _plainly)
    away = set() if offloaded is None else offloaded.parameters
    widened = [tensor for tensor in _widened(module) if tensor not in away]
    before = [tensor.data for tensor in widened]
    try:
        with ExitStack() as stack:
            if offloaded is not None:
                stored = stored_parameters(module)
                others = {name for name, _ in module.named_parameters()} - stored
                stack.enter_context(offloaded.bringing(others))
            for tensor in widened:
                tensor.data = tensor.data.float()
            yield
    finally:
        for tensor, data in zip(widened, before, strict=True):
            tensor.data = data
        for restore in reversed(undo):
            restore()


def _multiply_with(module: nn.Module, product: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[[], None]]:
    """Give linear layers a product, and embeddings float32 out; returns what takes it back."""
    undo = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            undo.append(_replace(part, partial(_linear, part, product)))
        elif isinstance(part, nn.Embedding):
            undo.append(_replace(part, partial(_embedding, part)))
    return undo


def _widened(module: nn.Module) -> Sequence[Tensor]:
    """Parameters and buffers in half precision that are computed with in float32."""
    kept = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear | nn.Embedding)}
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if tensor.dtype in HALF and id(tensor) not in kept]


def stored_parameters(module: nn.Module) -> set[str]:
    """Names of the weights that stay in half precision whatever is computed with: of linear layers and embeddings."""
    return {
        f"{path}.weight" if path else "weight"
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Embedding)
    }


def _replace(part: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Give a module another forward pass; returns what takes it back."""
    # accelerate has put a forward pass of its own before the module's, and keeps that under another name.
    name = "_old_forward" if hasattr(part, "_old_forward") else "forward"
    own = vars(part).get(name)
    setattr(part, name, forward)
    return partial(delattr, part, name) if own is None else partial(setattr, part, name, own)


def _linear(part: nn.Linear, product: Callable[[Tensor, Tensor], Tensor], states: Tensor) -> Tensor:
    """A linear layer: float32 out, whatever comes in."""
    made = product(states, part.weight)
    return made if part.bias is None else made + part.bias.float()


def _embedding(part: nn.Embedding, ids: Tensor) -> Tensor:
    forward: Any = type(part).forward
    made: Tensor = forward(part, ids)
    return made.float()


def _stream(states: Tensor, weight: Tensor) -> Tensor:
    """Inputs rounded to the weights' type: [..., out] float32."""
    rounded = states.to(weight.dtype)
    if sums_in_float32(weight.device.type, weight.dtype):
        return _product(rounded, weight)
    return _plainly(rounded, weight)


def _exact(states: Tensor, weight: Tensor) -> Tensor:
    """Inputs in float32: [..., out] float32."""
    states = states.float()
    # Halves of float16 would overflow where a stream's outliers are; gradients are not known of split products.
    if (
        weight.dtype is torch.bfloat16
        and not states.requires_grad
        and sums_in_float32(weight.device.type, weight.dtype)
    ):
        high = states.to(weight.dtype)
        low = (states - high.float()).to(weight.dtype)
        return _product(high, weight).add_(_product(low, weight))
    return _plainly(states, weight)


def _plainly(states: Tensor, weight: Tensor) -> Tensor:
    """By definition: [..., out] float32. Large weights (a head's) are widened in pieces."""
    states, rows = states.float(), max(1, WIDENED_AT_ONCE // weight.shape[1])
    if len(weight) <= rows:
        return nn.functional.linear(states, weight.float())
    return torch.cat([nn.functional.linear(states, part.float()) for part in torch.split(weight, rows)], dim=-1)


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """Half precision in, float32 out: [..., out]."""
    rows = states.reshape(-1, states.shape[-1])
    multiply: Any = torch.mm
    made: Tensor = multiply(rows, weight.t(), out_dtype=torch.float32)
    return made.view(*states.shape[:-1], -1)


@cache
def sums_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch gives float32 for products of matrices in half precision on a device."""
    if device != "cuda":
        return False
    small = torch.ones(16, 16, device=device, dtype=dtype)
    multiply: Any = torch.mm
    try:
        return bool(multiply(small, small, out_dtype=torch.float32).dtype == torch.float32)
    except (TypeError, RuntimeError, NotImplementedError):
        return False

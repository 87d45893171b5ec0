"""The first layers of a base as CUDA graphs.

A window of some hundred tokens has a GPU wait: its kernels in those layers take a fraction of the time that Python
needs to launch them one by one. A graph launches all of them at once.
"""

from __future__ import annotations

import threading
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import UnsupportedModelError, UnsupportedOperationError
from ..peft_method.layer import MESwitchLayer
from ..peft_method.live_choice import as_chosen
from .hidden_states import check_layers, find_layers, pool, stopped_before

__all__ = ["capture", "replayed"]

#: Where there are graphs.
_DEVICE = "cuda"
#: A window is padded to a multiple of so many tokens, each of which has a graph of its own.
_STEP = 64
#: Subclasses of tensors (quantised, distributed) keep their data elsewhere.
_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True, eq=False)
class _Graph:
    """One length.

    Attributes:
        row: int64 ``[1, length + 1]``: tokens, and how many of them are no padding.
        pooled: what a replay makes of it, float32 ``[1, 1, width]``.
        replay: runs the layers.
    """

    row: Tensor
    pooled: Tensor
    replay: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class _Captured:
    """Graphs of one model up to one layer.

    Attributes:
        modules: those that the graphs stand for, referred to weakly, as they may refer back to their model.
        state: theirs when the graphs were captured, see :func:`_state`.
        graphs: by length, from the shortest.
        lock: taken for a replay, as all threads' rows go through the same memory.
    """

    modules: list[weakref.ref[nn.Module]]
    state: tuple[Any, ...]
    graphs: dict[int, _Graph]
    lock: threading.Lock = field(default_factory=threading.Lock)


#: By model and layer. Outside of routers, which are copied and pickled.
_CAPTURED: WeakKeyDictionary[nn.Module, dict[int, _Captured]] = WeakKeyDictionary()


def capture(model: Any, layer: int, window: int) -> None:
    """Capture the layers of the base below one, for single rows of each length up to a window.

    Args:
        model: a model with experts; its base is captured.
        layer: whose input is asked for, as in :func:`~.hidden_states.early_layers`.
        window: tokens.

    Raises:
        UnsupportedOperationError: in inference mode; the model is not on one GPU, or something runs in its layers that
            a graph would pass over.
        UnsupportedModelError: there is no such layer; or the layers do what cannot be captured.
    """
    if torch.is_inference_mode_enabled():
        raise UnsupportedOperationError("The router's layers are captured outside of torch.inference_mode() only.")
    check_layers(model, [layer])
    device = model.device
    if device.type != _DEVICE:
        raise UnsupportedOperationError(f"The model is on {device}; the router's layers are captured on a GPU only.")
    decoder = getattr(model, model.base_model_prefix, model)
    modules = list(_modules_below(decoder, set(find_layers(model)[layer:])))
    refs = [weakref.ref(module) for module in modules]
    state = _state(refs)
    if state is None or not _is_plain(modules, device):
        raise UnsupportedOperationError(
            "The router's layers cannot be captured: the model is in training mode or under autocast, not all of it "
            "is plain tensors on one GPU (quantised, offloaded, made in inference mode), or there are hooks or other "
            "adapters than experts. "
            "Routing works without."
        )
    most = min(window, getattr(model.config.get_text_config(), "max_position_embeddings", window))
    lengths = [*range(_STEP, most, _STEP), most]
    memory = _Memory(device)
    try:
        with torch.inference_mode(False), torch.no_grad(), model._meswitch_switch.rows([None]), as_chosen():
            # The longest first: the others then fit into its memory.
            graphs = {length: _graph(model, layer, length, memory) for length in reversed(lengths)}
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"The first {layer} layers of {type(model).__name__} cannot be captured ({error}). Routing works without; "
            "but go on in a new process, as PyTorch may take the capture for unfinished."
        ) from error
    _CAPTURED.setdefault(model, {})[layer] = _Captured(refs, state, dict(reversed(graphs.items())))


def replayed(model: Any, row: Sequence[int], layer: int) -> Tensor | None:
    """As :func:`~.hidden_states.pooled_hidden_states` of the base, for one row and one layer.

    Args:
        model: see there.
        row: token ids, at least one.
        layer: see there.

    Returns:
        float32 ``[1, 1, width]`` on the CPU; `None` where nothing was captured for the row, or the model has changed
        since.
    """
    captured = _CAPTURED.get(model, {}).get(layer)
    if captured is None:
        return None
    length = next((length for length in captured.graphs if length >= len(row)), None)
    # Before anything is replayed, as what a graph reads may be gone.
    if length is None or _state(captured.modules) != captured.state:
        return None
    graph = captured.graphs[length]
    padded = _row(row, length)
    with captured.lock:
        graph.row.copy_(padded)
        graph.replay()
        return graph.pooled.cpu()


def _modules_below(module: nn.Module, above: set[nn.Module]) -> Iterator[nn.Module]:
    """A module and what is in it, without the layers above and without the experts."""
    yield module
    children = [module.base_layer] if isinstance(module, MESwitchLayer) else module.children()
    for child in children:
        if child not in above:
            yield from _modules_below(child, above)


def _is_plain(modules: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether modules are stock ones or those with experts, and keep what they have in plain tensors on a device."""
    for module in modules:
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MESwitchLayer):
            return False
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.is_inference() or tensor.device != device:
                return False
    return True


def _state(modules: Sequence[weakref.ref[nn.Module]]) -> tuple[Any, ...] | None:
    """What graphs have taken up of modules; `None` where there is something that they would pass over.

    It changes whenever a module or tensor is replaced, moved or cast; what is written into a tensor, graphs see. Every
    replay waits for it, so it reads the modules' dictionaries, and asks what is in them before going through them.
    """
    if torch.is_autocast_enabled(_DEVICE):
        return None
    kept: list[nn.Module | None] = []
    tensors: list[Tensor | None] = []
    for ref in modules:
        module = ref()
        if module is None:
            return None
        own = module.__dict__
        if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None
        if children := own["_modules"]:
            if MESwitchLayer in type(module).__mro__:  # whose other modules and tensors are the experts'
                kept.append(children["base_layer"])
                continue
            kept += children.values()
        if parameters := own["_parameters"]:
            tensors += parameters.values()
        if buffers := own["_buffers"]:
            tensors += buffers.values()
    data = [None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in tensors]
    return (*map(id, kept), *data)


def _row(tokens: Sequence[int], length: int) -> Tensor:
    """Tokens as a graph takes them, see :class:`_Graph`, without its first dimension.

    By way of an array, of which a tensor is made several times faster than of a list.
    """
    return torch.frombuffer(array("q", [*tokens, *[0] * (length - len(tokens)), len(tokens)]), dtype=torch.int64)


class _Memory:
    """What the graphs of one model share: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)


def _graph(model: Any, layer: int, length: int, memory: _Memory) -> _Graph:
    row = torch.zeros(1, length + 1, dtype=torch.int64, device=memory.device)
    row[:, -1] = length

    def run() -> Tensor:
        mask = torch.arange(length, device=memory.device) < row[:, -1:]
        with stopped_before(model, [layer]) as decoder:
            return pool(decoder, row[:, :-1], mask, [layer], padded=True)

    return _Graph(row, *_recorded(run, memory))


def _recorded(run: Callable[[], Tensor], memory: _Memory) -> tuple[Tensor, Callable[[], Any]]:
    """A computation as a graph: where its result will be, and what runs it."""
    with torch.cuda.device(memory.device):
        memory.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(memory.stream):
            run()  # libraries set themselves up, which cannot be captured
        torch.cuda.current_stream().wait_stream(memory.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory.pool, stream=memory.stream, capture_error_mode="thread_local"):
            pooled = run()
        torch.cuda.synchronize()

    def replay() -> None:
        with torch.cuda.device(memory.device):
            graph.replay()

    return pooled, replay

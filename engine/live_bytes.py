"""Bytes that are alive while operations run, on real tensors or on fake ones: the counters of `engine.memory`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class SavedBytes:
    """A context in which what autograd saves is counted: unique storages, but for those of `parameters`."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._sizes.values())

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor


class LiveBytes(TorchDispatchMode):
    """A mode that counts the storages that operations make, from then until nothing refers to them.

    Args:
        known: tensors not to be counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.gradients_now = self.gradients = 0
        """Bytes of parameters' gradients: now, and at the peak."""
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # questions about a tensor
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.meet(tensor.untyped_storage())
        return out

    def gradient(self, parameter: Tensor) -> None:
        """Hook for `register_post_accumulate_grad_hook`."""
        self.gradients_now += parameter.numel() * parameter.element_size()

    def meet(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is known."""
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients = self.now, self.gradients_now
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

"""Forward, loss and backward of a batch as one CUDA graph.

With a batch of one to four crops the networks here launch about a thousand kernels of a few microseconds each, and the
host is the bottleneck. Replaying a graph launches all of them at once. Reducing the gradients and the optimizer's step
stay outside: a handful of launches, and NCCL where there are several ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.dice_ce import DiceCE

WARM_UP_PASSES = 3  # compilation, cuDNN's search, lazy initialisations: none of them may be recorded


class GraphedPass:
    """Replays `run` on batches of one shape; the first call records it.

    Args:
        run: (image, labels) -> loss; leaves gradients in the parameters, and waits for nothing.
        model: whose parameters those are.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], DiceCE], model: torch.nn.Module) -> None:
        self.run, self.parameters = run, list(model.parameters())
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, image: Tensor, labels: Tensor) -> DiceCE:
        """Gradients of this batch in the parameters, in place of what was there; the loss, until the next call.

        Raises:
            ValueError: a batch of another shape than the first.
        """
        if self.graph is None:
            self._record(image, labels)
            assert self.graph is not None
        if image.shape != self.image.shape:
            raise ValueError(f"a batch of {tuple(image.shape)} in a graph recorded for {tuple(self.image.shape)}")
        self.image.copy_(image)
        self.labels.copy_(labels)
        self.graph.replay()
        # The optimizer's side drops gradients after a step; those of the graph stay where they are.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss

    def _record(self, image: Tensor, labels: Tensor) -> None:
        self.image, self.labels = image.clone(), labels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._drop()
                self.run(self.image, self.labels)
            self._drop()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # DALI's threads are at work meanwhile, and must not be forbidden what a capture forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.loss = self.run(self.image, self.labels)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph

    def _drop(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

"""Gradient checkpointing of a model that stays in eval mode.

That of transformers works in training mode only, which would bring dropout with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def computed_again(
    model: nn.Module, within: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Let each layer keep its inputs only, and compute the rest again in the backward pass.

    Chen et al. 2016, "Training deep nets with sublinear memory cost".

    Args:
        model: Whose layers.
        within: Makes what a layer is computed in, both times: by the second, what surrounded the
            first is long left.

    Raises:
        ValueError: The model has no layers that transformers marks as fit for it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: transformers marks no layer of {type(model).__name__} as fit "
            "for it; leave it out"
        )
    for layer in layers:
        layer.forward = partial(
            checkpoint,
            _inside(within, layer.forward),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # that of its class is back


def _inside(
    within: Callable[[], AbstractContextManager[None]], forward: Callable[..., Any]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with within():
            return forward(*args, **kwargs)

    return run

"""Which models the slot cache may be used with: asked of the model itself, not of a list of names.

A list of model types would refuse every model newer than it and trust every variant of an old name
(a Mistral with a sliding window is not one without). What the slot cache needs is that attention
goes through `Cache.update`, that positions come from `position_ids`, and that a boolean or additive
4-D mask is obeyed. So the configuration is asked for what a short run cannot show (windows,
recurrent layers, frequencies that change with the length), and then a short run is compared with
the full forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from textgym.policies.joined_step import JoinedStep
from textgym.policies.results import NOT_FINITE
from textgym.policies.slot_cache import SlotDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative error of hidden states that rounding explains; 1e-4 in float32.
_TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 2e-2}
# Rotary frequencies that do not change with the length of the sequence; keys that are held stay
# valid.
_STEADY_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}


def make_slot_decoder(base: PreTrainedModel, vocab_size: int) -> SlotDecoder | str:
    """Give the slot cache for a model without its head, or the reason why there is none.

    Args:
        base: The model without its head.
        vocab_size: Number of ids that the check may feed.

    Raises:
        FloatingPointError: When the model's own hidden states are not finite.
    """
    config = base.config.get_text_config(decoder=True)
    reason = refuses(config)
    if reason is not None:
        return reason
    decoder = SlotDecoder(
        base,
        config.num_hidden_layers,
        float_mask=config._attn_implementation == "eager",
    )
    try:
        error = _error(decoder, base, vocab_size)
    except FloatingPointError:
        raise
    except Exception as problem:  # whatever a foreign model does with a cache it does not know
        return f"a trial run failed: {type(problem).__name__}: {problem}"
    if not error <= tolerance(base.dtype):
        return f"in a trial run it differs from the full forward by {error:.1e} (relative)"
    decoder.clear()
    if JoinedStep.fits(base):
        decoder.step = JoinedStep(base, decoder.store)
        try:
            agrees = _error(decoder, base, vocab_size) <= tolerance(base.dtype)
        except Exception:
            agrees = False
        if not agrees:
            decoder.step = None  # the model does something that its parts do not tell
        decoder.clear()
    return decoder


def tolerance(dtype: torch.dtype) -> float:
    """How much hidden states of one dtype may differ from one way of computing to another."""
    return _TOLERANCE.get(dtype, 1e-4)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference of hidden states over the norm of the expected ones.

    Raises:
        FloatingPointError: The expected ones are not finite, which says nothing about the others.
    """
    expected = expected.float()
    if not bool(expected.isfinite().all()):
        raise FloatingPointError(NOT_FINITE)
    difference = (found.float() - expected).norm() / expected.norm()
    # A NaN must not pass for agreement.
    return float(difference.nan_to_num(nan=float("inf")))


def refuses(config: Any) -> str | None:
    """Say what in the configuration a cache without windows cannot serve; None for nothing."""
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f'its attention is "{attention}", not "sdpa" or "eager" (see attn_implementation=)'
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types <= {"full_attention"}:
        return f"its layers are {sorted(layer_types)}, not all full attention"
    window = getattr(config, "sliding_window", None)
    windowed = window is not None and getattr(config, "use_sliding_window", True)
    if windowed and not layer_types and window < config.max_position_embeddings:
        return f"its attention has a sliding window of {window}"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _STEADY_ROPE:
        return f'its rotary frequencies ("{kind}") change with the length of the sequence'
    return None


def _error(decoder: SlotDecoder, base: PreTrainedModel, vocab_size: int) -> float:
    """Largest relative difference (of norms) from the full forward.

    Ragged prefill, decode in and out of step, two tokens at once, a rewritten prefix, and a subset
    of rows.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (3, 9))
    changed = ids.copy()
    changed[0, 2] = (changed[0, 2] + 1) % vocab_size
    calls = [
        (ids, [5, 5, 3], None),
        (ids, [6, 6, 4], None),
        (ids[:2], [7, 7], [0, 1]),
        (changed[[2, 0]], [6, 8], [2, 0]),
    ]
    worst = 0.0
    with torch.inference_mode():
        for tokens, lengths, rows in calls:
            length = np.array(lengths)
            cached = decoder.hidden(tokens, length, None if rows is None else np.array(rows))
            full = base(
                input_ids=torch.from_numpy(tokens).to(cached.device), use_cache=False
            ).last_hidden_state
            full = full[torch.arange(len(length)), torch.from_numpy(length - 1)]
            worst = max(worst, relative_error(cached, full))
    return worst

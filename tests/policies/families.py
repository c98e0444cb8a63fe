"""Small models of several families, in which every parameter matters."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 61


def family_model(family: str, *, scale: float = 4.0, **settings: Any) -> Any:
    """A model whose gains, biases and frequencies all matter, with weights `scale` times larger."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    config: Any = AutoConfig.for_model(family, vocab_size=VOCAB, **{**shape, **settings})
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(scale).add_(0.3 * noise if parameter.ndim == 1 else 0.05 * noise)
    return model

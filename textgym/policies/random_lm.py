"""Small causal language models with random weights, for diagnostics, tests and benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_causal_lm(
    vocab_size: int,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 128,
    initializer_range: float = 0.02,
    family: Literal["llama", "gpt2"] = "llama",
    seed: int = 0,
) -> PreTrainedModel:
    """Build a Hugging Face causal LM with tied embeddings and random weights.

    Args:
        vocab_size: V, the number of logits.
        hidden_size: Width of the residual stream; a multiple of `num_heads`.
        num_layers: Number of blocks.
        num_heads: Attention heads.
        num_kv_heads: Key-value heads (grouped-query attention); default `num_heads`. Llama only.
        intermediate_size: Width of the feed-forward layer; default 8/3 (Llama) or 4 (GPT-2) times
            `hidden_size`.
        max_positions: Longest sequence.
        initializer_range: Standard deviation of the weights; larger in a narrow model, or attention
            hardly depends on the tokens at first and what it should look at is learned slowly.
        family: `"llama"` or `"gpt2"`.
        seed: Seed of the weights. torch's global generators are left as they were.

    Returns:
        The model, float32 on the CPU, in eval mode, with no special token ids set.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if family not in ("llama", "gpt2"):
        raise ValueError(f'family: expected "llama" or "gpt2", got {family!r}')
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}"
        )
    no_special_ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset every GPU as well
        if family == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=int(vocab_size),  # a space's n is a NumPy integer
                    hidden_size=hidden_size,
                    intermediate_size=intermediate_size or -(-hidden_size * 8 // 3),
                    num_hidden_layers=num_layers,
                    num_attention_heads=num_heads,
                    num_key_value_heads=num_kv_heads or num_heads,
                    max_position_embeddings=max_positions,
                    initializer_range=initializer_range,
                    tie_word_embeddings=True,
                    **no_special_ids,
                )
            )
        else:
            if num_kv_heads not in (None, num_heads):
                raise ValueError(
                    f"num_kv_heads: GPT-2 has as many as heads ({num_heads}), got {num_kv_heads}"
                )
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=int(vocab_size),  # a space's n is a NumPy integer
                    n_embd=hidden_size,
                    n_inner=intermediate_size,
                    n_layer=num_layers,
                    n_head=num_heads,
                    n_positions=max_positions,
                    initializer_range=initializer_range,
                    tie_word_embeddings=True,
                    **no_special_ids,
                )
            )
    model.eval()
    return model  # type: ignore[no-any-return]

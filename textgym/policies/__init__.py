"""Policies: causal language models that act in token environments and score what they did."""

from textgym.policies.causal_lm import ActResult, CausalLMPolicy, Evaluation, Generation
from textgym.policies.random_lm import random_causal_lm

__all__ = ["ActResult", "CausalLMPolicy", "Evaluation", "Generation", "random_causal_lm"]

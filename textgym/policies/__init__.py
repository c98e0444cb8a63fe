"""Policies: causal language models that act in token environments and score what they did."""

from textgym.policies.causal_lm import CausalLMPolicy
from textgym.policies.random_lm import random_causal_lm
from textgym.policies.results import ActResult, Evaluation, Generation

__all__ = ["ActResult", "CausalLMPolicy", "Evaluation", "Generation", "random_causal_lm"]

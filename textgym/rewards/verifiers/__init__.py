"""Verifiers: rewards that say whether a text is right."""

from textgym.rewards.verifiers.base import PooledVerifier, Verifier
from textgym.rewards.verifiers.code import UnitTests
from textgym.rewards.verifiers.countdown import Countdown
from textgym.rewards.verifiers.json_schema import Json, JsonSchema
from textgym.rewards.verifiers.math import Math
from textgym.rewards.verifiers.multiple_choice import MultipleChoice
from textgym.rewards.verifiers.numeric import Numeric
from textgym.rewards.verifiers.pattern import Pattern
from textgym.rewards.verifiers.tags import InTag, TagFormat, think_answer
from textgym.rewards.verifiers.words import WordConstraints

__all__ = [
    "Countdown",
    "InTag",
    "Json",
    "JsonSchema",
    "Math",
    "MultipleChoice",
    "Numeric",
    "Pattern",
    "PooledVerifier",
    "TagFormat",
    "UnitTests",
    "Verifier",
    "WordConstraints",
    "think_answer",
]

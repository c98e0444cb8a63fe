"""Rewards: values of texts, and schedules that say when they are paid."""

from textgym.rewards.base import Corpus, Cursor, Example, Reward
from textgym.rewards.batch import TextBatch
from textgym.rewards.bleu import Bleu
from textgym.rewards.chrf import Chrf
from textgym.rewards.cider import Cider
from textgym.rewards.diversity import Distinct, Repetition, SelfBleu
from textgym.rewards.errors import RewardColumnError, RewardError, TextFailure
from textgym.rewards.exact_match import ExactMatch
from textgym.rewards.frequencies import Frequencies
from textgym.rewards.functions import as_reward
from textgym.rewards.interop import from_rubric
from textgym.rewards.judge import HTTPJudge
from textgym.rewards.length import LengthPenalty, LengthWindow, SoftOverlong
from textgym.rewards.meteor import Meteor
from textgym.rewards.perplexity import InversePerplexity
from textgym.rewards.process import steps
from textgym.rewards.reasoning import ReasoningGym, reasoning_gym_task
from textgym.rewards.reference import ReferenceLogProb
from textgym.rewards.registry import REWARDS, make_reward, parse_reward
from textgym.rewards.rouge import Rouge
from textgym.rewards.schedules import Payment, Schedule, Track, as_schedule, dense, terminal
from textgym.rewards.scores import Scores
from textgym.rewards.service import Service
from textgym.rewards.ter import Ter
from textgym.rewards.token_f1 import TokenF1
from textgym.rewards.verifiers import (
    Countdown,
    InTag,
    Json,
    JsonSchema,
    Math,
    MultipleChoice,
    Numeric,
    Pattern,
    TagFormat,
    UnitTests,
    WordConstraints,
    think_answer,
)

__all__ = [
    "REWARDS",
    "Bleu",
    "Chrf",
    "Cider",
    "Corpus",
    "Countdown",
    "Cursor",
    "Distinct",
    "ExactMatch",
    "Example",
    "Frequencies",
    "HTTPJudge",
    "InTag",
    "InversePerplexity",
    "Json",
    "JsonSchema",
    "LengthPenalty",
    "LengthWindow",
    "Math",
    "Meteor",
    "MultipleChoice",
    "Numeric",
    "Pattern",
    "Payment",
    "ReasoningGym",
    "ReferenceLogProb",
    "Repetition",
    "Reward",
    "RewardColumnError",
    "RewardError",
    "Rouge",
    "Schedule",
    "Scores",
    "SelfBleu",
    "Service",
    "SoftOverlong",
    "TagFormat",
    "Ter",
    "TextBatch",
    "TextFailure",
    "TokenF1",
    "Track",
    "UnitTests",
    "WordConstraints",
    "as_reward",
    "as_schedule",
    "dense",
    "from_rubric",
    "make_reward",
    "parse_reward",
    "reasoning_gym_task",
    "steps",
    "terminal",
    "think_answer",
]

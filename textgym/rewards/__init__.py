"""Rewards: values of texts, and schedules that say when they are paid."""

from textgym.rewards.base import Corpus, Cursor, Example, Reward, Scores
from textgym.rewards.batch import TextBatch
from textgym.rewards.bleu import Bleu
from textgym.rewards.errors import RewardColumnError, RewardError, TextFailure
from textgym.rewards.exact_match import ExactMatch
from textgym.rewards.functions import as_reward
from textgym.rewards.length import LengthPenalty
from textgym.rewards.reference import ReferenceLogProb
from textgym.rewards.registry import REWARDS, make_reward, parse_reward
from textgym.rewards.rouge import Rouge
from textgym.rewards.schedules import Payment, Schedule, Track, as_schedule, dense, terminal

__all__ = [
    "REWARDS",
    "Bleu",
    "Corpus",
    "Cursor",
    "ExactMatch",
    "Example",
    "LengthPenalty",
    "Payment",
    "ReferenceLogProb",
    "Reward",
    "RewardColumnError",
    "RewardError",
    "Rouge",
    "Schedule",
    "Scores",
    "TextBatch",
    "TextFailure",
    "Track",
    "as_reward",
    "as_schedule",
    "dense",
    "make_reward",
    "parse_reward",
    "terminal",
]

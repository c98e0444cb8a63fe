"""Checks of what users plug in: does a reward keep its word, also when texts are hostile?"""

from textgym.checks.conformance import CHECKS, check_reward
from textgym.checks.faults import FaultyReward, InjectedFault
from textgym.checks.guard import Limits
from textgym.checks.hostile import HOSTILE
from textgym.checks.report import Check, Report

__all__ = [
    "CHECKS",
    "HOSTILE",
    "Check",
    "FaultyReward",
    "InjectedFault",
    "Limits",
    "Report",
    "check_reward",
]

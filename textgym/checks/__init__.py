"""Checks of what users plug in: does a reward keep its word, also when texts are hostile?"""

from textgym.checks.conformance import check_reward
from textgym.checks.guard import Limits
from textgym.checks.hostile import HOSTILE
from textgym.checks.report import Check, Report

__all__ = ["HOSTILE", "Check", "Limits", "Report", "check_reward"]

"""Every registered reward keeps its word, and the pages about that are complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from textgym.checks import CHECKS, HOSTILE, check_reward
from textgym.rewards import REWARDS


@pytest.mark.parametrize("name", REWARDS)
def test_every_registered_reward_keeps_its_word(name: str) -> None:
    report = check_reward(name)
    assert report.ok, str(report)
    assert report.check("examples").verdict == "pass"  # it has examples


def test_the_gallery_lists_every_registered_reward(root: Path) -> None:
    page = (root / "docs" / "rewards.md").read_text(encoding="utf-8")
    sections = [line[4:-1] for line in page.splitlines() if line.startswith("## `")]
    assert sections == list(REWARDS), "write it anew: python scripts/make_gallery.py"
    for name in REWARDS:
        assert f"| [`{name}`](#{name.lower()}) |" in page


def test_the_page_about_the_checks_names_all_of_them(root: Path) -> None:
    page = (root / "docs" / "conformance.md").read_text(encoding="utf-8")
    table = page.split("| check |")[1].split("\n\n")[0]
    named = [
        name.strip() for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")
    ]
    assert named == list(CHECKS)
    assert f"{len(HOSTILE)} hostile texts" in page

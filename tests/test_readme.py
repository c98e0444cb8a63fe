"""The README says what is true: its snippets run, its commands and its tree are the real ones."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from textgym import cli
from textgym.registry import ENVIRONMENTS
from textgym.tokens import assets_folder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language, in the order of the page."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_snippet_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(blocks("python")[number], encoding="utf-8")
    command = [sys.executable, "-W", "error", "-W", "ignore::ImportWarning", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_training_snippet_learns_something_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    (source,) = [block for block in blocks("python") if "result = " in block]
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    history = names["result"].history  # type: ignore[attr-defined]
    means = [line["rollout/reward_mean"] for line in history if "rollout/reward_mean" in line]
    assert means[-1] > means[0]
    assert AutoModelForCausalLM.from_pretrained("bandit-model").config.vocab_size == 64


def test_command_line_snippet_runs_with_fewer_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(assets_folder(), tmp_path / "path/to/model")
    rows = [f"sum {i} and {i},the sum is {2 * i}" for i in range(40)]
    (tmp_path / "data.csv").write_text("\n".join(["facts,text", *rows]), encoding="utf-8")
    (block,) = [block for block in blocks("sh") if "--agent" in block]
    train, score = (shlex.split(line) for line in block.strip().splitlines())
    assert train[:2] == ["textgym", "train"] and score[:2] == ["textgym", "eval"]
    train[train.index("--total-tokens") + 1] = "300"
    small = ["--episodes", "8", "--num-envs", "8", "--max-new-tokens", "8", "--quiet"]
    assert cli.main([*train[1:], *small, "--eval-episodes", "4", "--report-prompts", "4"]) == 0
    assert (tmp_path / "runs/mine/learning_curve.png").stat().st_size > 1000
    assert cli.main(score[1:]) == 0
    assert "bleu" in capsys.readouterr().out.lower()


def test_plain_lines_are_those_of_the_makefile() -> None:
    def recipe(target: str) -> str:
        found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
        assert found, target
        return found[1].replace("$(VENV)", ".venv")

    install = re.search(r"^PIP_INSTALL = (.*)$", MAKEFILE, re.MULTILINE)
    assert install
    quiet = install[1].replace("--quiet --disable-pip-version-check ", "")
    ran = "".join(recipe(f"$(VENV)/{stamp}") for stamp in (".stamp-run", ".stamp-test"))
    ran = (ran + recipe("train") + recipe("test")).replace("$(PIP_INSTALL)", quiet)
    ran = ran.replace(" $(ARGS)", "")
    plain = [line for block in blocks("sh")[:2] for line in block.strip().splitlines()]
    assert plain[0] == "python3 -m venv .venv"
    for line in plain[1:]:
        assert f"\t{line}\n" in ran, line


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert re.search(r"^    make test\b", README, re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^make test VENV=", script, re.MULTILINE)


def test_tables_name_what_there_is() -> None:
    from textgym import agents, rewards

    for entry in ENVIRONMENTS:
        assert f"| `{entry.id}` |" in README
    for name in agents.WHERE:
        assert name.endswith("Config") or f"| `{name}` |" in README
    for name in ("Bleu", "Rouge", "ExactMatch", "LengthPenalty", "ReferenceLogProb"):
        assert f"`{name}`" in README and hasattr(rewards, name)


def test_tree_is_the_real_tree() -> None:
    (tree,) = blocks("text")
    told: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        path = line.split("  ")[0] if not line.startswith(" ") else line.split()[0]
        if not line.startswith(" "):
            folder = path if path.endswith("/") else ""
            told.add(path)
        else:
            told.add(folder + path)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("the tree is compared in a git checkout only")
    files = [Path(name) for name in listed.stdout.splitlines()]
    real = set()
    for file in files:
        top = file.parts[0]
        if len(file.parts) == 1:
            real.add(top)
        else:
            real.add(f"{top}/")
            if top in ("textgym", "envs", "agents", "scripts", "docs"):
                real.add(f"{top}/{file.parts[1]}{'/' if len(file.parts) > 2 else ''}")
    quiet = {"envs/__init__.py", "agents/__init__.py", "textgym/__init__.py", "textgym/py.typed"}
    assert told == real - quiet

"""Check the import floors of pyproject.toml with import-linter: `python scripts/check_floors.py`.

import-linter reads folders, and a checkout keeps `textgym.envs` and `textgym.agents` beside
`textgym/`; so the three are copied into the layout of an install, and the linter runs there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check_floors() -> subprocess.CompletedProcess[str]:
    """Run import-linter on an installed layout of this checkout.

    Returns:
        The finished process; its return code is 0 where every contract is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "textgym"
        no_caches = shutil.ignore_patterns("__pycache__", "assets")
        for source, target in (("textgym", "."), ("envs", "envs"), ("agents", "agents")):
            shutil.copytree(ROOT / source, package / target, ignore=no_caches, dirs_exist_ok=True)
        code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
        options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
        return subprocess.run(
            [sys.executable, "-c", code, *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )


if __name__ == "__main__":
    result = check_floors()
    print(result.stdout, result.stderr, sep="")
    sys.exit(result.returncode)

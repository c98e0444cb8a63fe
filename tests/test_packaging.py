"""The package is what pyproject.toml says, imports only what it may, and names no machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

TORCH_FREE = "streams tokens prompts rewards mdp env vector wrappers checks registry version envs"
SECOND_COPIES = {"envs": "textgym.envs", "agents": "textgym.agents"}


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def python(code: str, *arguments: str, **environment: str) -> str:
    """Run code in a new interpreter, outside the checkout, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=os.path.expanduser("~"),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_listed_are_the_folders(root: Path, project: dict[str, Any]) -> None:
    found = set()
    for top in ("textgym", *SECOND_COPIES):
        for module in (root / top).rglob("*.py"):
            parts = module.parent.relative_to(root).parts
            found.add(".".join((SECOND_COPIES.get(parts[0], parts[0]), *parts[1:])))
    listed = project["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == found
    for name in listed:
        folder = re.sub(r"^textgym\.(envs|agents)", r"\1", name).replace(".", "/")
        assert (root / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_every_asset_is_shipped(root: Path, project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]["textgym"]
    shipped = {path for pattern in patterns for path in (root / "textgym").glob(pattern)}
    package = root / "textgym"
    data = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data == shipped
    assert package / "py.typed" in shipped


def test_versions_agree(root: Path, project: dict[str, Any]) -> None:
    """Each direct dependency has a floor, and a tested version at or above it."""
    from packaging.requirements import Requirement

    text = (root / "constraints.txt").read_text()
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    tested = dict(line.lower().replace("_", "-").split("==") for line in lines if line)
    extras = project["project"]["optional-dependencies"]
    requirements = project["project"]["dependencies"] + [r for e in extras.values() for r in e]
    assert tested["torch"] == "2.13.0"
    for requirement in map(Requirement, requirements):
        if requirement.name != "textgym":
            assert requirement.specifier, f"{requirement.name} has no floor"
            name = requirement.name.lower().replace("_", "-")
            assert requirement.specifier.contains(tested[name]), requirement


def test_floors_hold(root: Path) -> None:
    script = root / "scripts" / "check_floors.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_import_is_light() -> None:
    code = "import sys, textgym; print(*sys.modules)"
    loaded = set(python(code).split())
    assert "textgym" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "pandas", "matplotlib"}


def test_the_left_of_the_house_is_free_of_torch(root: Path) -> None:
    """Import every module of the torch-free floors in turn, and name the first that is not."""
    names = []
    for name in TORCH_FREE.split():
        folder = root / name if name in SECOND_COPIES else root / "textgym" / name
        if folder.is_dir() or folder.with_suffix(".py").exists():
            names.append(f"textgym.{name}")
        names += [f"textgym.{name}.{p.stem}" for p in folder.glob("*.py") if p.stem != "__init__"]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"torch", "transformers"} & set(sys.modules)
    if heavy:
        sys.exit(f"importing {name} imports {heavy}")
"""
    python(code, *names)


def test_a_checkout_finds_its_own_rooms(root: Path, tmp_path: Path) -> None:
    """`python -m ...` at the root of a checkout uses the checkout's envs and agents."""
    for folder in ("textgym", "envs", "agents"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("assets"))
    code = "from textgym import agents, envs; print(agents.__file__, envs.__file__)"
    found = python(code, PYTHONPATH=str(tmp_path)).split()
    assert found == [str(tmp_path / folder / "__init__.py") for folder in ("agents", "envs")]


def test_lazy_names_exist() -> None:
    """Everything in `__all__` can be had, and a name that is not there is an AttributeError."""
    import textgym
    import textgym.agents

    for module in (textgym, textgym.agents):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            module.no_such_name  # noqa: B018
    assert set(textgym.__all__) <= set(dir(textgym))


def test_tracked_files_name_no_machine(root: Path) -> None:
    """No tracked file holds a package index's host or an absolute path of somebody's machine."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    host = "|".join(
        ("py" + r"pi\.org", "python" + r"hosted\.org", "find-" + "links", "index-" + "url")
    )
    home = "|".join(("home", "Users", "root", "work", "opt", "mnt"))
    forbidden = re.compile(rf"{host}|(?<![\w./:~$}}-])/(?:{home})/\w")
    found = []
    for name in filter(None, listing.stdout.decode().split("\0")):
        path = root / name
        if path.is_file() and path.suffix not in (".safetensors", ".png"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if forbidden.search(line):
                    found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)

"""What every test runs under: one thread, no network, and the shared data where it is at hand."""

from __future__ import annotations

import os

# Before torch and transformers are imported. Threads: several workers share few cores, and results
# must not depend on how many there are.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
)

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Examples are found, not timed, and are the same in every run.
settings.register_profile("textgym", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("textgym")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a connection to another machine an error."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            raise OSError(f"Tests use no network, but one connects to {address!r}.")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data beside the checkout; a test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` (models and data) beside the checkout")
    return folder

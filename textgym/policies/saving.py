"""Policies on disk: plain Hugging Face weights, the value head, and a few settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS_FILE = "textgym_policy.json"
VALUE_HEAD_FILE = "value_head.safetensors"


def write_policy(
    folder: Path, model: PreTrainedModel, value_head: nn.Linear | None, settings: dict[str, Any]
) -> None:
    """Write a model that transformers can load, and beside it the value head and the settings."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
    if value_head is None:
        (folder / VALUE_HEAD_FILE).unlink(missing_ok=True)
    else:
        weights = {k: v.detach().cpu().contiguous() for k, v in value_head.state_dict().items()}
        save_file(weights, folder / VALUE_HEAD_FILE)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Read the settings beside a model; none for a plain model's folder or a hub name."""
    file = Path(folder) / SETTINGS_FILE
    if not file.is_file():
        return {}
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def read_value_head(folder: str | Path, value_head: nn.Linear) -> bool:
    """Restore the value head where the folder holds one, and say whether it does."""
    from safetensors.torch import load_file

    file = Path(folder) / VALUE_HEAD_FILE
    if not file.is_file():
        return False
    value_head.load_state_dict(load_file(file))
    return True

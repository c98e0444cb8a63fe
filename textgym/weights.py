"""The weights of a checkpoint: a policy and its tokenizer, written, read back, and told apart."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from textgym.checkpoint import CheckpointError

if TYPE_CHECKING:
    from textgym.policies import CausalLMPolicy
    from textgym.tokens import Tokenizer

ADAPTERS = "adapters.safetensors"


def write_policy(policy: CausalLMPolicy, tokenizer: Tokenizer | None, checkpoint: Path) -> None:
    """Write `policy/`, a folder like any model's, and beside it the adapters of a LoRA."""
    with _no_bars():
        policy.save_pretrained(checkpoint / "policy")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, checkpoint / "policy")
    if _has_adapters(policy):
        from safetensors.torch import save_file

        trained = {n: p.detach().cpu() for n, p in policy.named_parameters() if p.requires_grad}
        save_file({n: p.contiguous() for n, p in trained.items()}, checkpoint / ADAPTERS)


def read_policy(policy: CausalLMPolicy, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a policy of the same shape, bit for bit.

    Raises:
        CheckpointError: If the policy has other parameters than the one that was saved.
    """
    import torch

    try:
        if _has_adapters(policy):
            from safetensors.torch import load_file

            trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
            saved = load_file(checkpoint / ADAPTERS)
            if set(saved) != set(trained):
                raise KeyError(f"parameters differ: {sorted(set(saved) ^ set(trained))[:3]}")
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(saved[name])
        else:
            with _no_bars():
                loaded = type(policy).from_pretrained(
                    checkpoint / "policy",
                    device="cpu",
                    dtype=next(policy.model.parameters()).dtype,
                    value_head=policy.value_head is not None,
                )
            policy.load_state_dict(loaded.state_dict())
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the weights in {checkpoint} do not fit this policy ({error}): make the policy from "
            "the model and with the settings that the run started with"
        ) from error


def fingerprint(policy: CausalLMPolicy | None) -> int:
    """A number that tells policies apart by the first weights of each parameter; 0 for None.

    Of a policy with adapters it is that of the weights under them: those that do not change.
    """
    total = 0
    named = [] if policy is None else list(policy.model.named_parameters())
    for parameter in [p for name, p in named if "lora_" not in name]:
        head = parameter.detach().reshape(-1)[:256].float().cpu().numpy()
        total = zlib.crc32(head.tobytes(), total)
    return total


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write files that `load_tokenizer` and transformers read."""
    if tokenizer.hf is not None:
        tokenizer.hf.save_pretrained(folder)
        return
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.stop_ids), None)}
    config = {n: tokenizer.backend.id_to_token(i) for n, i in named.items() if i is not None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which would tear the run's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _has_adapters(policy: CausalLMPolicy) -> bool:
    return hasattr(policy.model, "peft_config")

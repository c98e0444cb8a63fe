"""Loading of Hugging Face causal LMs: device, dtype, LoRA, and the context length."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_device(device: str | torch.device) -> torch.device:
    """`"auto"` is CUDA where there is a GPU, else the CPU (MPS only by name).

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r}: torch {torch.__version__} sees no CUDA GPU here; use "
            "'auto' or 'cpu', or install a CUDA build of torch"
        )
    return found


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Turn `"bfloat16"` and the like into a torch dtype; None stays None."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f'dtype: expected "float32", "bfloat16" or "float16", got {dtype!r}')
        dtype = found
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
    return dtype


def load_model(
    source: PreTrainedModel | str | Path, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Give the model on its device, in eval mode.

    Args:
        source: A model object (moved in place), a folder or a hub name.
        device: Where it is to live.
        dtype: Of the weights. None keeps an object's own and loads a folder as float32, because a
            training step of usual size is lost in the rounding of bfloat16 weights.
    """
    if isinstance(source, str | Path):
        from transformers import AutoModelForCausalLM

        source = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype or torch.float32)
    model: Any = source
    model.to(device=device, dtype=dtype)
    model.eval()
    return model  # type: ignore[no-any-return]


def add_lora(model: PreTrainedModel, lora: int | Mapping[str, Any] | Any, seed: int) -> Any:
    """Wrap a model with low-rank adapters (Hu et al. 2022); only they are trained.

    Args:
        model: The base model.
        lora: The rank (scale 2, all linear layers), a mapping of `peft.LoraConfig` arguments, or a
            `LoraConfig`.
        seed: Seed of the adapters' weights; torch's global generators are left as they were.

    Raises:
        ImportError: When peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "textgym[lora]"') from error
    if isinstance(lora, bool) or not isinstance(lora, int | Mapping | LoraConfig):
        raise TypeError(f"lora: expected a rank, a mapping or a peft.LoraConfig, got {lora!r}")
    if isinstance(lora, int):
        lora = {"r": lora, "lora_alpha": 2 * lora}
    if isinstance(lora, Mapping):
        defaults = {
            "task_type": "CAUSAL_LM",
            "target_modules": "all-linear",
            "fan_in_fan_out": model.config.model_type
            == "gpt2",  # its layers hold weights transposed
        }
        lora = LoraConfig(**{**defaults, **lora})
    device: torch.device = model.device
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        # Between peft and transformers; nothing that a user could change.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        return get_peft_model(model, lora).eval()


def without_adapters(model: Any, *, merge: bool) -> PreTrainedModel:
    """Give a plain model, with the adapters merged into its weights or left out of them.

    The argument stays as it is.
    """
    if not is_lora(model):
        return model  # type: ignore[no-any-return]
    twin = copy.deepcopy(model)
    plain: PreTrainedModel = twin.merge_and_unload() if merge else twin.unload()
    return plain


def is_lora(model: Any) -> bool:
    """Whether peft has wrapped this model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def context_length(config: Any) -> int | None:
    """The longest sequence a model takes; None when it sets no limit."""
    config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None

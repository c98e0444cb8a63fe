"""Loading of Hugging Face causal LMs: device, dtype, LoRA, and the context length."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from textgym.checkpoint import best_checkpoint, latest_checkpoint
from textgym.tokens import EMBEDDED, assets_folder

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


def resolve_compute_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """As `resolve_dtype`; float32, which weights have anyway, is None.

    Raises:
        ValueError: Of float16: its gradients underflow unless the loss is scaled.
    """
    found = resolve_dtype(dtype)
    if found not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f'compute_dtype: expected "bfloat16", "float32" or None, got {dtype!r}')
    return None if found == torch.float32 else found


def find_model(name: str) -> str:
    """Folder or hub name that transformers can load.

    Args:
        name: A folder or hub name, `"embedded"`, the folder of a run (its best checkpoint, else its
            newest), or a checkpoint.

    Raises:
        ValueError: The folder is none of these, or the name can only be that of a folder and there
            is none.
    """
    if name == EMBEDDED:
        return str(assets_folder())
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        checkpoints = folder / "checkpoints"
        found = best_checkpoint(checkpoints) or latest_checkpoint(checkpoints)
        if found is None:
            raise ValueError(f"the run in {folder} holds no checkpoint")
        folder = found
    if (folder / "policy").is_dir():
        folder = folder / "policy"
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"the folder {name} holds neither a model (config.json) nor a run")
        return str(folder)
    _check_hub_name(name)
    return name


def _check_hub_name(name: str) -> None:
    """Say that a folder is missing before the hub is asked for it, which takes long offline."""
    folder = Path(name)
    parent = folder.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    beside_runs = any((parent / sibling / "checkpoints").is_dir() for sibling in siblings)
    if name[:1] not in (".", "/", "~") and (
        len(folder.parts) == 1 or (len(folder.parts) == 2 and not beside_runs)
    ):
        return
    near = difflib.get_close_matches(folder.name, siblings, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    raise ValueError(f"there is no model folder {name}{hint}")


def load_model(
    source: PreTrainedModel | str | Path, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Give the model on its device, in eval mode.

    Args:
        source: A model object (moved in place), or a name as in `find_model`.
        device: Where it is to live.
        dtype: Of the weights. None keeps an object's own and loads a folder as float32, because a
            training step of usual size is lost in the rounding of bfloat16 weights.

    Raises:
        ValueError: There is no such folder.
        OSError: There is no such model.
    """
    if isinstance(source, str | Path):
        from transformers import AutoModelForCausalLM

        name = find_model(str(source))
        source = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32)
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

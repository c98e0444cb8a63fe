"""Options of `train` and `sft`: those of the run, and the fields of the agent's own config.

The config is the dataclass that Python users pass; tyro shows both on one command line. A run keeps
its options in `run.json`, so that `--resume --folder <run>` needs no others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import textgym.agents
from textgym.commands.errors import UsageError
from textgym.commands.listing import module_of
from textgym.commands.setup import TaskArgs, default_model
from textgym.tokens import EMBEDDED

OPTIONS = "run.json"
SB3_ROWS = 8  # of long rollouts, so that few responses are cut
_SB3_PPO = {
    "lr": 3e-4,
    "epochs": 2,
    "minibatches": 2,
    "gae_lambda": 1.0,
    "vf_coef": 0.5,
    "kl_coef": 0.02,
}
FOR_EMBEDDED: dict[str, dict[str, Any]] = {
    "expert-iteration": {"lr": 5e-4, "best": 2, "path": "sequence"},
    "grpo": {
        "lr": 3e-4,
        "epochs": 2,
        "minibatches": 2,
        "kl_in": "reward",
        "kl_coef": 0.02,
        "path": "sequence",
    },
    "ppo": {
        "lr": 3e-4,
        "epochs": 2,
        "minibatches": 2,
        "gae_lambda": 1.0,
        "vf_coef": 1.0,
        "kl_coef": 0.02,
        "path": "sequence",
    },
    "reinforce": {"lr": 5e-4, "whiten": True, "kl_coef": 0.02, "path": "sequence"},
    "sb3-a2c": {"lr": 1e-3, "gae_lambda": 1.0, "vf_coef": 0.5, "kl_coef": 0.02},
    "sb3-ppo": _SB3_PPO,
    "sb3-maskable-ppo": _SB3_PPO,
    "sb3-trpo": {"gae_lambda": 1.0, "kl_coef": 0.02},
    "sft": {"lr": 1e-3},
}
"""What differs from a config's defaults for the embedded model, which is tiny. Found on validation
prompts (expert iteration's on other draws of training prompts); SFT's rate is the best of 5e-4,
1e-3, 2e-3 and 4e-3, so that the comparison is fair."""


@dataclass(frozen=True)
class TrainArgs(TaskArgs):
    """Train a language model, and compare it on held-out prompts before and after."""

    agent: str = "ppo"
    """Which algorithm; its own options follow from it."""
    total_tokens: int | None = None
    """Action tokens to train on; default is 100000, and its `epochs` for sft."""
    folder: Path | None = None
    """Where everything goes; default is a new one under runs/."""
    resume: bool = False
    """Go on with the run in --folder, with its options but for those that are given again."""
    num_envs: int = 64
    """Rows of the vector environment; changes speed, not results. With SB3's algorithms it is their
    `n_envs`, which does, and which a run keeps; the default there is 8."""
    device: str = "auto"
    """Where the model lives: "auto" is CUDA if there is any, else the CPU."""
    dtype: str | None = None
    """Of the weights; default is float32."""
    compute_dtype: str | None = None
    """What forwards compute in; "bfloat16" is faster where the processor has it, and the weights
    stay as exact as they are. Default is the weights' own."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, about a third more time."""
    logit_chunk: int | None = None
    """Action tokens of a forward whose probabilities are kept for the backward pass; those of
    others are computed again. Default is as many as 1 GiB holds."""
    lora: int | None = None
    """Train low-rank adapters of this rank instead of all weights."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in learning alike."""
    report_prompts: int = 256
    """Test prompts of the table that is printed; fewer are sampled several times."""
    completions: int = 4
    """Prompts whose responses are printed side by side."""
    sft_baseline: bool | None = None
    """Whether to train SFT for the same time and compare; default is with the embedded model."""
    quiet: bool = False
    """No progress."""
    dry_run: bool = False
    """Train nothing: say how much memory the run would need, and whether it is there."""


def policy_settings(args: TrainArgs) -> dict[str, Any]:
    """How the policy is made from the model."""
    names = ("device", "dtype", "compute_dtype", "gradient_checkpointing", "lora", "temperature")
    settings = {name: getattr(args, name) for name in names}
    if args.logit_chunk is not None:  # else what is saved beside the model counts
        settings["logit_chunk"] = args.logit_chunk
    return settings


def parse(agent: str, arguments: Sequence[str]) -> tuple[TrainArgs, Any]:
    """Read the options of the run, and of its agent into the agent's own config.

    Args:
        agent: Name of the agent.
        arguments: The options. With `--resume`, those of the run in `--folder` are the defaults.
    """
    config_type = agent_class(agent, "Config")
    saved = saved_options(arguments)
    rows = SB3_ROWS if agent.startswith("sb3-") else TrainArgs.num_envs
    args, config = TrainArgs(agent=agent, num_envs=rows), default_config(agent, arguments)
    if saved:
        given = {**saved["args"], "stop": tuple(saved["args"]["stop"])}
        args, config = TrainArgs(**given), config_type(**saved["config"])
    both = dataclasses.make_dataclass(
        "Options", [("run", TrainArgs), (module_of(agent), config_type)], frozen=True
    )
    parsed: Any = tyro.cli(
        both,
        args=arguments,
        default=both(args, config),
        prog="textgym sft" if agent == "sft" else "textgym train",
        description="Options of the run, then those of the agent.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return parsed.run, getattr(parsed, module_of(agent))


def agent_class(agent: str, suffix: str = "") -> Any:
    """Class or config of an agent, by its name on the command line."""
    name = next(n for n, module in textgym.agents.WHERE.items() if module == module_of(agent))
    return getattr(textgym.agents, name.removesuffix("Config") + suffix)


def default_config(agent: str, arguments: Sequence[str]) -> Any:
    """Where the options start: the config's defaults, or what suits the embedded model."""
    model = value_of("--model", arguments) or default_model(value_of("--env", arguments))
    config = config_for(agent, model)
    if value_of("--allowed-tokens", arguments) and hasattr(config, "path"):
        return dataclasses.replace(config, path="step")  # masks are given token by token
    return config


def config_for(agent: str, model: str) -> Any:
    """The agent's config with what suits a model."""
    changed = FOR_EMBEDDED.get(agent, {}) if model == EMBEDDED else {}
    return agent_class(agent, "Config")(**changed)


def saved_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of the run that is to be resumed; empty where none is."""
    folder = value_of("--folder", arguments)
    if folder is None or "--resume" not in arguments or "--help" in arguments:
        return {}
    path = Path(folder) / OPTIONS
    if not path.is_file():
        raise UsageError(f"--resume: {folder} holds no run ({OPTIONS} is missing)")
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return saved


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Value of one option, read before the others are known."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def plain(options: Any) -> dict[str, Any]:
    """A dataclass as JSON values that do not depend on the working directory."""
    values = dataclasses.asdict(options)
    for name in ("prompts", "validation_prompts", "test_prompts", "model"):
        value = values.get(name)
        if isinstance(value, str) and Path(value).exists():
            values[name] = str(Path(value).resolve())
    for name, value in values.items():
        values[name] = str(value) if isinstance(value, Path) else value
    return {
        name: value for name, value in values.items() if name not in ("resume", "folder", "dry_run")
    }

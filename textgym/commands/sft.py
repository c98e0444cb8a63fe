"""`textgym sft`: fine-tune on reference responses; the same run as `textgym train`."""

from textgym.commands.train import run_sft as run

__all__ = ["run"]

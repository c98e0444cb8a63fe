"""What both TRL children need."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from workload import Meter


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Symbols `s0`, `s1`, ... as in ours, and two ids beyond what the model can write.

    TRL wants an end and a padding token. As the model has no logits for these two, no response
    ends early and nothing in it is taken for padding: all have the same length, as in ours.
    """
    words = {f"s{i}": i for i in range(vocab_size)}
    words |= {"<eos>": vocab_size, "<pad>": vocab_size + 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


class Marks(TrainerCallback):
    """Tells the meter when an update is done."""

    def __init__(self, meter: Meter) -> None:
        """Keep the meter."""
        self.meter = meter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """End an update."""
        self.meter.update_done()

"""Pretrain the embedded model, a tokenizer and a small Llama, on text that our tasks generate.

    OMP_NUM_THREADS=1 python scripts/pretrain_tiny.py

The text is in `tiny_corpus`, the model's card in `tiny_card`. Training goes on until the held-out
loss has settled; every example is drawn afresh.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tiny_card import measure, write_card
from tiny_corpus import corpus

from textgym.streams import generator

SPECIALS = ("<pad>", "<bos>", "<eos>")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Train a byte-level BPE whose tokens are parts of words, single digits, or runs of marks."""
    import tokenizers as tk

    tokenizer = tk.Tokenizer(tk.models.BPE())
    words = tk.Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [
            tk.pre_tokenizers.Split(words, behavior="isolated"),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIALS.index("<bos>"))]
    )
    return tokenizer


@dataclass(frozen=True)
class Config:
    """What the embedded model is made of."""

    out: Path = Path(__file__).resolve().parent.parent / "textgym" / "assets" / "tiny"
    """Folder that is written."""
    seed: int = 0
    """Seed of the corpus and of the initial weights."""
    vocab_size: int = 1024
    """Tokens of the tokenizer."""
    hidden_size: int = 128
    """Width of the model."""
    intermediate_size: int = 344
    """Width of its MLPs."""
    num_layers: int = 3
    """Its layers."""
    num_heads: int = 4
    """Its attention heads."""
    max_positions: int = 512
    """Its context in tokens."""
    steps: int = 2400
    """Updates."""
    batch_size: int = 64
    """Examples of an update, each drawn afresh."""
    learning_rate: float = 4e-3
    """Peak of a cosine that rises over the first 3 % of the updates and ends at 0."""
    tokenizer_only: bool = False
    """Train and save the tokenizer, then stop."""
    tokenizer_examples: int = 20_000
    """Examples that the tokenizer is trained on."""
    heldout_examples: int = 2_000
    """Examples of the held-out loss, on inputs that training never shows."""


Example = tuple[list[int], list[int]]


def save_tokenizer(backend: Any, config: Config) -> Any:
    """Write the tokenizer as plain transformers reads it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_positions,
    )
    tokenizer.save_pretrained(config.out)
    return tokenizer


def encode(backend: Any, examples: Sequence[tuple[str, str]]) -> list[Example]:
    """Prompt and response ids, encoded apart as an environment holds them, `<eos>` at the end."""
    prompts = backend.encode_batch([prompt for prompt, _ in examples])
    responses = backend.encode_batch([text for _, text in examples], add_special_tokens=False)
    eos = SPECIALS.index("<eos>")
    return [(p.ids, [*r.ids, eos]) for p, r in zip(prompts, responses, strict=True)]


def batch_loss(model: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the response tokens, and their number; rows are right-padded."""
    width = max(len(p) + len(r) for p, r in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (p, r) in enumerate(examples):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    chosen = labels[:, 1:] != -100
    logits = model.lm_head(hidden[chosen])
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][chosen], reduction="sum")
    return loss, int(chosen.sum())


def heldout_loss(model: Any, examples: Sequence[Example], batch_size: int = 100) -> float:
    """Mean cross-entropy of response tokens, in nats."""
    ordered = sorted(examples, key=lambda e: len(e[0]) + len(e[1]))
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(ordered), batch_size):
            loss, tokens = batch_loss(model, ordered[i : i + batch_size])
            total, count = total + loss.item(), count + tokens
    return total / count


def build_model(config: Config) -> Any:
    """Make a Llama of random weights, drawn from the seed without touching the global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=True,
                pad_token_id=SPECIALS.index("<pad>"),
                bos_token_id=SPECIALS.index("<bos>"),
                eos_token_id=SPECIALS.index("<eos>"),
            )
        )


def build_optimizers(model: Any, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, AdamW for the embedding and the norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    rate = config.learning_rate
    return [
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.05),
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]


def batched(backend: Any, config: Config, pool: int = 16) -> Iterator[list[Example]]:
    """Batches of fresh examples of like length: a pool is sorted by length, cut and shuffled."""
    stream = corpus(config.seed, config.steps * config.batch_size)
    size = config.batch_size
    for number in range(-(-config.steps // pool)):
        examples = encode(backend, list(itertools.islice(stream, pool * size)))
        examples.sort(key=lambda e: len(e[0]) + len(e[1]))
        for i in generator(config.seed, 1, number).permutation(len(examples) // size):
            yield examples[i * size : (i + 1) * size]


def train(model: Any, backend: Any, config: Config) -> list[tuple[int, float]]:
    """Train on fresh examples only; return `(step, held-out loss)` at every tenth of the way."""
    heldout = encode(backend, list(corpus(config.seed, config.heldout_examples, "validation")))
    optimizers = build_optimizers(model, config)
    warmup = max(1, config.steps * 3 // 100)
    batches = batched(backend, config)
    losses: list[tuple[int, float]] = []
    start = time.perf_counter()
    for step in range(config.steps):
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        loss, tokens = batch_loss(model, next(batches))
        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, config.steps // 10) == 0:
            losses.append((step + 1, heldout_loss(model, heldout)))
            print(
                f"step {step + 1}: train {loss.item() / tokens:.4f}, held out {losses[-1][1]:.4f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return losses


def main(config: Config) -> None:
    """Train tokenizer and model, measure, and write both with a card."""
    torch.set_num_threads(1)
    texts = (text for example in corpus(config.seed, config.tokenizer_examples) for text in example)
    backend = train_tokenizer(texts, config.vocab_size)
    config.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(backend, config)
    if config.tokenizer_only:
        return
    model = build_model(config)
    start = time.process_time()
    losses = train(model, backend, config)
    seconds = time.process_time() - start
    model.eval().save_pretrained(config.out)
    scores = measure(model, config.out, config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    write_card(config.out, asdict(config), losses, scores, seconds, parameters)
    for name, score in scores.items():
        print(f"{name}: {score:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Config))

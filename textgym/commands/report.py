"""Tables, completions and JSON of what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from textgym.commands.measure import Measured
from textgym.evaluation import Interval, Metric, as_dict, interval

MEANING = {
    "reward": "mean reward of a response",
    "bleu": "corpus BLEU, 0 to 1",
    "rouge1": "mean ROUGE-1 F against the best reference",
    "rouge2": "mean ROUGE-2 F against the best reference",
    "rougeL": "mean ROUGE-L F against the best reference",
    "kl": "KL to the reference policy, nats per response",
    "perplexity": "of the responses under the reference policy",
    "distinct-1": "different words over all words",
    "distinct-2": "different word pairs over all word pairs",
    "length": "tokens a response",
    "cut": "share of responses cut by the token budget",
    "unscored": "share of responses without a score",
}

Summary = dict[str, Interval | float]


def summary(measured: Measured) -> Summary:
    """Scores with 95 % bootstrap intervals over the prompts; of one prompt there is none: NaN."""
    return {
        name: _interval(metric) if isinstance(metric, Metric) else metric
        for name, metric in measured.metrics.items()
    }


def _interval(metric: Metric) -> Interval:
    if len(metric.statistics) > 1:
        return interval(metric)
    return Interval(metric.value, math.nan, math.nan)


def counted(number: int, what: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{number} {what}" + "s" * (number != 1)


def notes(columns: Mapping[str, Summary], reference: str) -> str:
    """What a reader of the table must know; `reference` says which model that is."""
    parts = ["±: half of the 95 % interval"]
    names = {name for column in columns.values() for name in column}
    if "bleu" in names:
        parts.append("bleu: of all responses as one corpus")
    if "kl" in names:
        parts.append(f"kl, perplexity: against {reference}")
    if "ceiling" in columns:
        parts.append("ceiling: one reference scored against the others")
    return "; ".join(parts)


def metrics_table(title: str, columns: Mapping[str, Summary]) -> Table:
    """One row a metric, one column a policy; what follows `±` is half of the 95 % interval."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    known = list(MEANING)
    names = {name for column in columns.values() for name in column}
    for name in sorted(names, key=lambda n: (known.index(n.split(":")[0]), n)):
        table.add_row(name, *(_cell(column.get(name)) for column in columns.values()))
    return table


def print_completions(console: Console, columns: Mapping[str, Measured], count: int) -> None:
    """Print the first few prompts, and under each what every policy wrote and was paid."""
    first = next(iter(columns.values()))
    for i in range(min(count, len(first.prompts))):
        console.print(f"\n[bold]prompt[/]  {escape(first.prompts[i])}", soft_wrap=True)
        for name, measured in columns.items():
            if i < len(measured.texts):
                score = f"{measured.scores[i]:.3f}"
                text = escape(" ".join(measured.texts[i].split()))
                line = f"[bold]{escape(name)}[/] [dim]{score}[/]  {text}"
                console.print(line, soft_wrap=True)


def as_json(columns: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """The table as JSON values; NaN becomes null."""
    return {
        column: {
            name: _plain(as_dict(value) if isinstance(value, Interval) else value)
            for name, value in summary.items()
        }
        for column, summary in columns.items()
    }


def completions_json(columns: Mapping[str, Measured], count: int) -> list[dict[str, Any]]:
    """The first few prompts with every policy's response and score."""
    first = next(iter(columns.values()))
    return [
        {
            "prompt": first.prompts[i],
            **{
                name: {"text": measured.texts[i], "score": _plain(measured.scores[i])}
                for name, measured in columns.items()
                if i < len(measured.texts)
            },
        }
        for i in range(min(count, len(first.prompts)))
    ]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, readable and ending in a newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cell(value: Interval | float | None) -> str:
    if value is None:
        return "[dim]–[/]"
    if not isinstance(value, Interval):
        return f"{value:.3f}"
    digits = 3 if abs(value.value) < 10 else 1
    if math.isnan(value.low):
        return f"{value.value:.{digits}f}"
    return f"{value.value:.{digits}f} [dim]±{(value.high - value.low) / 2:.{digits}f}[/]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""E2E restaurant descriptions: SFT, then PPO and REINFORCE, against SFT for the same time.

    python scripts/e2e_nlg.py --data <folder of e2e_nlg> --model <folder of stories15M>

Every step is a `textgym` command, printed before it runs. A step that is done is not done again, so
the script goes on where it was stopped. Runs have one thread each and go side by side.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import tyro

from textgym.evaluation import Metric, bleu_metric, compare, mean_metric, rouge_metric
from textgym.logging import read_metrics
from textgym.prompts import Prompts
from textgym.rewards import TextBatch, as_reward, parse_reward

VALIDATION = 0.18  # of the dev inputs
REWARDS = {"bleu": "bleu", "mixed": "0.5*bleu + 0.5*rougeL"}
PUBLISHED = "| TGen (published; full training set, the challenge's scripts) | 65.9 | 68.5 |"
COLUMNS = ("bleu", "rougeL", "reward", "perplexity", "kl", "distinct-1", "distinct-2", "length")


@dataclass(frozen=True)
class Args:
    """What is run."""

    data: Path
    """Folder with devset.csv and testset_w_refs.csv."""
    model: Path
    """Folder of the model that SFT starts from."""
    out: Path = Path("runs/e2e")
    """Where everything goes."""
    seeds: int = 5
    """Seeds of every RL run: 0, 1, ..."""
    total_tokens: int = 110_000
    """Action tokens of an RL run."""
    jobs: int = 2
    """Commands at a time."""
    table: bool = False
    """Only print the table of what is done."""


def prepare(args: Args) -> None:
    """Write `train.csv`, `validation.csv` and `test.csv`, with inputs in plain words.

    Training and validation share no restaurant. Many restaurants of the test inputs are not among
    the dev inputs, so what a checkpoint is chosen by must not be either: the rarest names are set
    aside until they make up enough of the inputs.
    """
    dev, test = (read(args.data / name) for name in ("devset.csv", "testset_w_refs.csv"))
    names = {mr: facts["name"] for mr, facts, _ in dev}
    counts = Counter(names.values())
    aside: set[str] = set()
    for name in sorted(counts, key=lambda name: (counts[name], name)):
        if sum(counts[k] for k in aside) < VALIDATION * len(names):
            aside.add(name)
    tables = {
        "train": [row for row in dev if row[1]["name"] not in aside],
        "validation": [row for row in dev if row[1]["name"] in aside],
        "test": test,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        with (args.out / f"{table}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["facts", "text"])
            for _, facts, text in rows:
                writer.writerow(["; ".join(f"{k}: {v}" for k, v in facts.items()), text])


def read(path: Path) -> list[tuple[str, dict[str, str], str]]:
    """Each line of a file of the challenge: the input, its facts, and what a person wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pattern = re.compile(r"([\w ]+)\[([^\]]*)\]")
    return [
        (row["mr"], {k.strip(): v for k, v in pattern.findall(row["mr"])}, row["ref"])
        for row in rows
    ]


def task(args: Args, reward: str) -> list[str]:
    """Options that all commands share."""
    options = {
        "--prompts": args.out / "train.csv",
        "--validation-prompts": args.out / "validation.csv",
        "--test-prompts": args.out / "test.csv",
        "--prompt-column": "facts",
        "--reference-column": "text",
        "--template": "{facts} =>",
        "--max-new-tokens": 64,
        "--reward": REWARDS[reward],
    }
    return [str(word) for pair in options.items() for word in pair]


def sft(args: Args) -> list[str]:
    """The start of every RL run."""
    numbers = "--epochs 2 --lr 2e-4 --warmup-updates 20 --batch-size 32 --microbatch 16"
    chosen = "--eval-every 60 --eval-episodes 110 --report-prompts 64"
    where = ["--model", str(args.model), "--folder", str(args.out / "sft")]
    return ["sft", *where, *task(args, "bleu"), *f"{numbers} {chosen}".split()]


def sft_longer(args: Args) -> list[str]:
    """SFT that goes on for as long as the slowest RL run took, its checkpoint chosen likewise."""
    seconds = max((trained_seconds(args.out / folder) for folder in names(args)), default=0.0)
    first = args.out / "sft"
    tokens = round(seconds * report(first)["total_tokens"] / trained_seconds(first))
    numbers = f"--total-tokens {tokens} --lr 2e-4 --batch-size 32 --microbatch 16"
    chosen = "--select reward --eval-every 20 --eval-episodes 330 --report-prompts 64"
    where = ["--model", str(args.out / "sft"), "--folder", str(args.out / "sft-longer")]
    return ["sft", *where, *task(args, "bleu"), *f"{numbers} {chosen}".split()]


def rl(args: Args, agent: str, reward: str, seed: int) -> list[str]:
    """One RL run."""
    numbers = {
        "ppo": "--lr 1.5e-5 --episodes 64 --epochs 1 --minibatches 4 --gae-lambda 1 --vf-coef 0.5",
        "reinforce": "--lr 5e-5 --episodes 64 --group-size 8 --baseline group --whiten",
    }[agent]
    common = (
        f"--seed {seed} --total-tokens {args.total_tokens} --microbatch 16 "
        "--warmup-updates 3 --kl-coef 0.005 --exact-kl-episodes 8 "
        "--eval-episodes 110 --report-prompts 64 --sft-baseline False"
    )
    folder = args.out / name(agent, reward, seed)
    where = ["--model", str(args.out / "sft"), "--folder", str(folder)]
    return ["train", "--agent", agent, *where, *task(args, reward), *f"{numbers} {common}".split()]


def evaluation(args: Args, folder: str) -> list[str]:
    """Test of one run on all test inputs; perplexity and KL are against the SFT model."""
    where = ["--model", str(args.out / folder), "--reference", str(args.out / "sft")]
    output = ["--lowercase", "--seed", "0", "--output", str(args.out / folder / "test.json")]
    return ["eval", *where, *output]


def name(agent: str, reward: str, seed: int) -> str:
    """Folder of an RL run."""
    return f"{agent}-{reward}-{seed}"


def names(args: Args) -> list[str]:
    """Folders of all RL runs, seed by seed, those on BLEU alone first."""
    agents = ("reinforce", "ppo")
    return [name(a, r, seed) for r in REWARDS for seed in range(args.seeds) for a in agents]


def report(folder: Path) -> dict[str, Any]:
    """What `textgym train` wrote at the end of a run."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def trained_seconds(folder: Path) -> float:
    """CPU seconds that a finished run sampled and trained; 0 for one that has not finished."""
    if not (folder / "report.json").exists():
        return 0.0
    took: dict[str, float] = report(folder)["train_seconds"]
    return next(iter(took.values()))


def run(args: Args, command: Sequence[str], done: Path) -> None:
    """Run one command unless its result is there; its output goes beside the run."""
    if done.exists():
        return
    if (done.parent / "run.json").exists() and command[0] != "eval":
        command = [command[0], "--resume", "--folder", str(done.parent)]
    print("textgym " + " ".join(f"'{w}'" if " " in w else w for w in command), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{done.parent.name}-{command[0]}.log").open("a", encoding="utf-8") as log:
        finished = subprocess.run(
            [sys.executable, "-m", "textgym.cli", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if finished.returncode:
        raise SystemExit(f"that command failed ({finished.returncode}); see {log.name}")


def run_and_test(args: Args, command: Sequence[str], folder: str) -> None:
    """Train and test one run."""
    run(args, command, args.out / folder / "report.json")
    run(args, evaluation(args, folder), args.out / folder / "test.json")


def responses(args: Args, folder: str, column: str) -> list[str]:
    """What a run wrote to the test inputs."""
    saved = json.loads((args.out / folder / "test.json").read_text(encoding="utf-8"))
    return [record[column]["text"] for record in saved["completions"]]


def metrics_of(args: Args, folder: str, column: str, prompts: Prompts) -> dict[str, Metric]:
    """Corpus BLEU, ROUGE-L and both rewards of a run's responses, ready for a paired bootstrap."""
    texts = responses(args, folder, column)
    references = [list(row["references"]) for row in prompts]
    batch = TextBatch.from_texts(texts, list(prompts))
    found = {
        "bleu": bleu_metric(texts, references, lowercase=True),
        "rougeL": rouge_metric("rougeL", texts, references),
    }
    for key, expression in REWARDS.items():
        reward: Any = as_reward(parse_reward(expression))
        parts = [weight * part.evaluate(batch).values for weight, part in reward.parts()]
        found[f"reward_{key}"] = mean_metric(key, sum(parts))
    return found


def table(args: Args) -> None:
    """Print the results of everything that is done as Markdown."""
    prompts = Prompts.load(args.out / "test.csv", prompt="facts", references="text")
    done = [n for n in names(args) if (args.out / n / "test.json").exists()]
    groups: dict[str, list[str]] = {"sft": ["sft"], "sft-longer": ["sft-longer"]}
    for folder in done:
        groups.setdefault(folder.rpartition("-")[0], []).append(folder)
    groups = {k: v for k, v in groups.items() if (args.out / v[0] / "test.json").exists()}
    for column in ("greedy", "sampled"):
        print(f"\n{column}, {len(prompts)} test inputs\n")
        print("| run | seeds | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
        for group, folders in groups.items():
            cells = [_cell(args, folders, column, metric) for metric in COLUMNS]
            print(f"| {group} | {len(folders)} | " + " | ".join(cells) + " |")
    print(f"\n| | BLEU | ROUGE-L |\n|---|---|---|\n{PUBLISHED}")
    base = max(
        (g for g in groups if g.startswith("sft")),
        key=lambda g: metrics_of(args, g, "greedy", prompts)["reward_bleu"].value,
    )
    for column in ("greedy", "sampled"):
        theirs = metrics_of(args, base, column, prompts)
        print(f"\n{column}: difference to {base}, paired bootstrap over inputs and seeds\n")
        print("| run | " + " | ".join(theirs) + " |\n" + "|---" * (len(theirs) + 1) + "|")
        for group, folders in groups.items():
            if group.startswith("sft"):
                continue
            ours = [metrics_of(args, folder, column, prompts) for folder in folders]
            cells = []
            for metric, value in theirs.items():
                found = compare([m[metric] for m in ours], [value] * len(ours))
                cells.append(f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
            print(f"| {group} | " + " | ".join(cells) + " |")
    plot(args, groups)


def _cell(args: Args, folders: Sequence[str], column: str, metric: str) -> str:
    found = []
    for folder in folders:
        saved = json.loads((args.out / folder / "test.json").read_text(encoding="utf-8"))
        value = saved["metrics"][column].get(metric)
        if value is not None:
            found.append(value["value"] if isinstance(value, dict) else value)
    if not found:
        return ""
    spread = f" ± {stdev(found):.3f}" if len(found) > 1 else ""
    return f"{mean(found):.3f}{spread}"


def plot(args: Args, groups: dict[str, list[str]]) -> None:
    """Validation reward over tokens, one line a run, one colour a kind."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True, constrained_layout=True)
    kinds = [group for group in groups if not group.startswith("sft")]
    for axis, y in zip(axes, ("eval/reward_mean", "kl/ref"), strict=True):
        for k, group in enumerate(kinds):
            for i, folder in enumerate(groups[group]):
                lines = [m for m in read_metrics(args.out / folder) if m.get(y) is not None]
                x = [m["time/total_tokens"] for m in lines]
                label = group if i == 0 else None
                axis.plot(x, [m[y] for m in lines], f"C{k}", alpha=0.7, label=label)
        axis.set_xlabel("action tokens")
        axis.set_title({"kl/ref": "KL to SFT, nats per response"}.get(y, "validation reward"))
    axes[0].legend()
    figure.savefig(args.out / "curves.png", dpi=120)
    print(f"\ncurves: {args.out / 'curves.png'}")


def main(args: Args) -> None:
    """Run what is not done, then print the table."""
    if not args.table:
        prepare(args)
        run_and_test(args, sft(args), "sft")
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = []
            for folder in names(args):
                agent, reward, seed = folder.split("-")
                command = rl(args, agent, reward, int(seed))
                jobs.append(pool.submit(run_and_test, args, command, folder))
            for job in jobs:
                job.result()
        run_and_test(args, sft_longer(args), "sft-longer")
    table(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

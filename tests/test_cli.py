"""The command, end to end on tiny models: what it prints, writes, refuses and resumes."""

from __future__ import annotations

import csv
import io
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from rich.console import Console

from textgym.cli import COMMANDS, main
from textgym.commands import dry_run
from textgym.commands.errors import UsageError
from textgym.commands.listing import agent_names
from textgym.commands.measure import Measured
from textgym.commands.options import OPTIONS, parse
from textgym.commands.play import Game, PlayArgs
from textgym.commands.report import as_json, counted, metrics_table, summary
from textgym.commands.setup import TaskArgs, TaskMaker
from textgym.commands.train import REPORT
from textgym.evaluation import mean_metric
from textgym.registry import ENVIRONMENTS

BANDIT = ["--env", "textgym/Bandit-v0", "--quiet", "--episodes", "16", "--report-prompts", "16"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A CSV of 20 prompts with two references each."""
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        for i in range(20):
            writer.writerow([f"boat {i}", f"Boat {i} sails at noon."])
            writer.writerow([f"boat {i}", f"At noon boat {i} sails."])
    return path


def test_every_command_has_a_module_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (module, purpose) in COMMANDS.items():
        assert f"{name} " in shown and purpose in shown
        assert callable(import_module(f"textgym.commands.{module}").run)
    assert main(["--version"]) == 0
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_list_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert agent_names() == [
        "expert-iteration",
        "grpo",
        "ppo",
        "reinforce",
        "sb3-a2c",
        "sb3-maskable-ppo",
        "sb3-ppo",
        "sb3-trpo",
        "sft",
    ]
    for name in [*(entry.id for entry in ENVIRONMENTS), "bleu", "rougeL", *agent_names()]:
        assert name in shown


@pytest.mark.parametrize("entry", [e for e in ENVIRONMENTS if e.optimum != "unknown"])
def test_numbers_of_the_registry_are_those_of_the_environments(entry: object) -> None:
    module = import_module(f"textgym.envs.{entry.module}")  # type: ignore[attr-defined]
    assert float(entry.optimum) == module.OPTIMUM  # type: ignore[attr-defined]
    digits = len(entry.random.partition(".")[2])  # type: ignore[attr-defined]
    assert float(entry.random) == round(module.random_return(), digits)  # type: ignore[attr-defined]
    assert module.random_return() <= module.OPTIMUM / 2


def test_options_of_the_run_and_of_the_agent_share_one_command_line() -> None:
    args, config = parse("ppo", ["--agent", "ppo", "--lr", "3e-5", "--seed", "7", "--stop", "\n"])
    assert (args.agent, args.stop, config.lr, config.seed) == ("ppo", ("\n",), 3e-5, 7)
    assert type(config).__name__ == "PPOConfig"
    args, config = parse("sft", ["--epochs", "2"])
    assert type(config).__name__ == "SFTConfig" and config.epochs == 2


def test_train_writes_a_run_that_eval_scores(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--env", "textgym/StopEarly-v0", "--quiet", "--episodes", "16", "--lr", "3e-3"]
    assert main(["train", *options, "--total-tokens", "500", "--folder", "run"]) == 0
    shown = capsys.readouterr().out
    assert "ppo on textgym/StopEarly-v0" in shown and "before" in shown
    for name in (OPTIONS, REPORT, "metrics.jsonl", "samples.jsonl", "learning_curve.png"):
        assert Path("run", name).stat().st_size > 0, name
    assert list(Path("run").rglob("*tfevents*"))
    report = json.loads(Path("run", REPORT).read_text())
    assert report["total_tokens"] >= 500
    before, after = (report["metrics"][name]["reward"]["value"] for name in ("before", "ppo"))
    assert after > before
    assert report["metrics"]["before"]["kl"]["value"] == 0.0
    assert report["metrics"]["ppo"]["kl"]["value"] > 0.0
    assert main(["eval", "--model", "run", "--samples", "8", "--output", "scores.json"]) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(scored["metrics"]) == {"greedy", "sampled"}
    # The run brought its reference: KL is to the model that it started from.
    assert scored["metrics"]["sampled"]["kl"]["value"] > 0.0
    assert json.loads(Path("scores.json").read_text())["metrics"] == scored["metrics"]


@pytest.mark.parametrize("agent", ["sb3-ppo", "sb3-a2c", "sb3-trpo", "sb3-maskable-ppo"])
def test_train_runs_recipes_for_sb3(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sb3_contrib")
    options = ["--agent", agent, "--env", "textgym/StopEarly-v0", "--num-envs", "8", "--quiet"]
    options += ["--n-steps", "8", "--report-prompts", "8", "--folder", "run"]
    assert main(["train", *options, "--total-tokens", "200"]) == 0
    assert f"{agent} on textgym/StopEarly-v0" in capsys.readouterr().out
    for name in (OPTIONS, REPORT, "metrics.jsonl", "samples.jsonl", "learning_curve.png"):
        assert Path("run", name).stat().st_size > 0, name
    assert main(["train", "--resume", "--folder", "run", "--total-tokens", "300", "--quiet"]) == 0
    assert json.loads(Path("run", REPORT).read_text())["total_tokens"] == 320
    assert main(["eval", "--model", "run", "--count", "4"]) == 0


@pytest.mark.parametrize("agent", ["ppo", "reinforce", "grpo", "expert-iteration"])
def test_a_dry_run_says_what_a_run_needs_and_writes_nothing(
    agent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--agent", agent, "--env", "textgym/StopEarly-v0", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for row in ("parameters", "gradients", "optimizer", "reference", "cache", "activations"):
        assert re.search(rf"^{row} +[\d.,]+ ", shown, re.MULTILINE), row
    for phase in ("sampling", "measuring", "learning"):
        assert f"peak while {phase}" in shown
    assert "it fits" in shown
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_to_lower_until_it_fits(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    available = 200 << 20
    monkeypatch.setattr(dry_run, "used_memory", lambda: 100 << 20)
    monkeypatch.setattr(dry_run, "available_memory", lambda device: available)
    options = ["--model", "random", "--prompts", str(table), "--prompt-column", "mr", "--dry-run"]
    options += ["--reference-column", "ref", "--reward", "bleu", "--max-new-tokens", "48"]
    options += ["--minibatches", "1", "--report-prompts", "8", "--episodes", "128"]
    assert main(["train", *options]) == 1
    shown = capsys.readouterr().out
    assert "it does not fit" in shown and "--gradient-checkpointing" in shown
    found = re.search(r"--microbatch (\d+): a forward holds (\d+) sequences now", shown)
    assert found is not None, shown
    assert int(found[1]) < int(found[2])
    assert main(["train", *options, "--microbatch", found[1]]) == 0
    assert main(["train", *options, "--microbatch", str(2 * int(found[1]))]) == 1
    available = 110 << 20
    capsys.readouterr()
    assert main(["train", *options, "--microbatch", found[1], "--num-envs", "128"]) == 1
    assert re.search(r"--num-envs \d+: 128 rows", capsys.readouterr().out)


def test_a_dry_run_of_sft_and_not_of_sb3(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model", "random", "--prompts", str(table), "--prompt-column", "mr"]
    options += ["--reference-column", "ref", "--reward", "bleu", "--dry-run"]
    assert main(["sft", *options]) == 0
    assert "32 sequences of" in capsys.readouterr().out
    assert main(["train", "--agent", "sb3-ppo", *options]) == 2
    assert "not what SB3 does" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", *options]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_tokens_that_no_reference_has_are_forbidden(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["it sails at six", "it sails", "six sails"] * 4
    rows = [{"prompt": f"n {i}", "text": text} for i, text in enumerate(texts)]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ["--prompts", "data.jsonl", "--reference-column", "text", "--holdout", "0.4"]
    options += ["--max-new-tokens", "8", "--sft-baseline", "False", "--quiet"]
    options += ["--reward", "exact_match", "--episodes", "4", "--total-tokens", "60"]
    options += ["--allowed-tokens", "references", "--folder", "run"]
    assert main(["train", *options]) == 0
    # The run keeps the option, and so does what scores it.
    scoring = ["--model", "run", "--temperature", "3", "--output", "scores.json"]
    assert main(["eval", *scoring]) == 0
    completions = json.loads(Path("scores.json").read_text())["completions"]
    written = [one[kind]["text"] for one in completions for kind in ("greedy", "sampled")]
    assert any(written)
    assert all(re.fullmatch("(it|six| sails| at| six)*", text) for text in written)
    assert main(["train", "--env", "textgym/Bandit-v0", "--allowed-tokens", "references"]) == 2
    assert "no column 'references'" in capsys.readouterr().err


def test_one_prompt_has_no_interval() -> None:
    one = Measured({"length": mean_metric("length", [3.0])}, ["p"], ["t"], [1.0])
    two = Measured({"length": mean_metric("length", [3.0, 4.0])}, ["p", "q"], ["t"] * 2, [1.0] * 2)
    console = Console(file=io.StringIO(), width=80)
    console.print(metrics_table("", {"one": summary(one), "two": summary(two)}))
    assert console.file.getvalue().count("±") == 1  # type: ignore[attr-defined]
    assert as_json({"one": summary(one)})["one"]["length"] == {
        "value": 3.0,
        "low": None,
        "high": None,
    }
    assert (counted(1, "prompt"), counted(2, "prompt")) == ("1 prompt", "2 prompts")


def test_a_folder_is_not_trained_into_twice(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*BANDIT, "--total-tokens", "16", "--folder", "run"]
    assert main(["train", "--agent", "reinforce", *options]) == 0
    assert main(["train", "--agent", "reinforce", *options]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("paying.py").write_text(
        "import signal\n"
        "calls = 0\n"
        "def score(text):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 100:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return float('1' in text)\n"
    )
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(12)))
    options = ["--model", "random", "--prompts", "rows.jsonl", "--reward", "paying:score"]
    options += ["--max-new-tokens", "2", "--episodes", "8", "--report-prompts", "2", "--quiet"]
    options += ["--eval-every", "0", "--eval-episodes", "1", "--seed", "3"]
    assert main(["train", *options, "--total-tokens", "320", "--folder", "run"]) == 130
    shown = capsys.readouterr().out
    command = re.search(r"go on with: textgym (.*)", shown)
    assert command is not None, shown
    before = len(Path("run/metrics.jsonl").read_text().splitlines())
    assert 1 < before < 21
    assert main(command[1].split()) == 0
    report = json.loads(Path("run", REPORT).read_text())
    assert report["total_tokens"] >= 320, "the run goes on to its own end, with its own options"
    assert json.loads(Path("run", OPTIONS).read_text())["config"]["seed"] == 3


def test_sft_on_a_table_of_ones_own(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "random", "--prompts", str(table), "--prompt-column", "mr"]
    options += ["--reference-column", "ref", "--template", "{mr}\\n", "--holdout", "0.2"]
    options += ["--reward", "0.5*bleu+0.5*rougeL", "--max-new-tokens", "12", "--quiet"]
    assert main(["sft", *options, "--epochs", "2", "--folder", "run"]) == 0
    shown = capsys.readouterr().out
    assert "prompts: 13 training, 3 validation, 4 test" in shown
    metrics = json.loads(Path("run", REPORT).read_text())["metrics"]
    assert set(metrics) == {"before", "sft", "ceiling"}
    for name in ("bleu", "rouge1", "rouge2", "rougeL", "perplexity", "distinct-1", "length"):
        assert name in metrics["sft"], name
    assert metrics["ceiling"]["bleu"]["value"] > metrics["before"]["bleu"]["value"]
    assert metrics["sft"]["reward: bleu"]["value"] >= 0.0


def test_rl_is_compared_with_sft_for_equal_time(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "random", "--prompts", str(table), "--prompt-column", "mr"]
    options += ["--reference-column", "ref", "--max-new-tokens", "8", "--sft-baseline", "True"]
    options += ["--episodes", "8", "--report-prompts", "2", "--total-tokens", "128", "--quiet"]
    assert main(["train", *options, "--folder", "run"]) == 0
    report = json.loads(Path("run", REPORT).read_text())
    assert list(report["metrics"]) == ["before", "ppo", "sft", "ceiling"]
    assert report["train_seconds"]["sft"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "textgym/Nope-v0"], "no environment 'textgym/Nope-v0'"),
        (["--env-args", "[1]"], "must be a JSON object"),
        (["--env-args", "{"], "is not JSON"),
        (["--env", "textgym/Echo-v0", "--env-args", '{"symbolz": 3}'], "symbolz"),
        (["--prompts", "nothing.csv"], "nothing.csv"),
        (["--prompts", "pairs.csv"], "no column 'prompt'"),
        (["--prompts", "pairs.csv", "--prompt-column", "mrr"], "did you mean 'mr'"),
        (["--prompts", "pairs.csv", "--prompt-column", "mr"], "need a reward"),
        (["--env", "TextGen-v0"], "go together"),
        (["--test-prompts", "pairs.csv"], "--test-prompts needs --prompts"),
        (["--validation-prompts", "pairs.csv"], "--validation-prompts needs --prompts"),
        (["--reward", "0.5*blue"], "bleu"),
        (["--reward", "no_such_module:score"], "no_such_module"),
        (["--agent", "sft"], "use `textgym sft`"),
        (["--agent", "dqn"], "there are expert-iteration, grpo, ppo, reinforce"),
        (["--resume", "--folder", "nowhere"], "holds no run"),
        (["--resume"], "needs --folder"),
        (["--model", "no/such/folder"], "no model folder no/such/folder"),
        (["--model", "./nothing"], "no model folder ./nothing"),
        (["--model", "."], "neither a model"),
        (["--env", "textgym/Bandit-v0", "--folder", "pairs.csv/run"], "output folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_of_reason(
    options: list[str], message: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in options else ["--model", "random"]
    assert main(["train", *options, *model]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_splits_of_ones_own_prompts_share_nothing(table: Path) -> None:
    args = TaskArgs(prompts=str(table), prompt_column="mr", reference_column="ref", holdout=0.25)
    maker = TaskMaker(args)
    assert maker.tables is not None
    prompts = [{row["prompt"] for row in part} for part in maker.tables]
    assert [len(part) for part in prompts] == [11, 4, 5]
    assert len(set.union(*prompts)) == 20
    spaces = {str(maker.single(s).observation_space) for s in ("train", "validation", "test")}
    assert len(spaces) == 1


def test_validation_and_test_can_be_files_of_their_own(table: Path, tmp_path: Path) -> None:
    others = {}
    for split, count in (("validation", 3), ("test", 2)):
        others[split] = str(tmp_path / f"{split}.csv")
        lines = [f"{split} {i},text" for i in range(count)]
        Path(others[split]).write_text("\n".join(["mr,ref", *lines]), encoding="utf-8")
    args = TaskArgs(
        prompts=str(table),
        prompt_column="mr",
        reference_column="ref",
        validation_prompts=others["validation"],
        test_prompts=others["test"],
    )
    tables = TaskMaker(args).tables
    assert tables is not None
    assert [len(part) for part in tables] == [20, 3, 2]  # all of --prompts is trained on
    assert tables[1][0]["prompt"] == "validation 0"


# ------------------------------------------------------------------------------------ play


def game(**options: object) -> tuple[Game, io.StringIO]:
    out = io.StringIO()
    args = PlayArgs(env="textgym/Echo-v0", **options)  # type: ignore[arg-type]
    return Game(args, Console(file=out, width=100)), out


def test_play_pays_what_the_environment_pays() -> None:
    played, out = game()
    played.start(prompt_row=5)
    prompt = played.env.task.prompt_text(5)
    first, rest = prompt.split()[0], prompt.split()[1:]
    assert not played.turn(first)
    assert played.turn(" ".join(rest))
    shown = out.getvalue()
    assert prompt in shown and "total reward 1.0000" in shown
    assert played.rewards == [0.0, 0.0, 0.0, 1.0]


def test_play_takes_back_a_line() -> None:
    played, _ = game()
    played.start()
    played.turn("#3 4")
    played.turn("#5")
    played.turn(":undo")
    assert played.env.mdp.response_ids(0) == [3, 4] and played.pieces == ["d", "e"]
    played.turn(":undo")
    assert played.env.mdp.response_ids(0) == [] and played.rewards == []
    with pytest.raises(UsageError, match="nothing to undo"):
        played.turn(":undo")


def test_play_refuses_what_is_no_token() -> None:
    played, _ = game(by="token")
    played.start()
    with pytest.raises(UsageError, match=r"2 tokens \(#0 'a', #1 'b'\)"):
        played.turn("a b")
    with pytest.raises(UsageError, match="id 99 is outside the vocabulary of 16"):
        played.turn("#99")
    with pytest.raises(UsageError, match="expected token ids after #"):
        played.turn("#x")
    with pytest.raises(UsageError, match="no stop id"):
        played.turn("")
    with pytest.raises(UsageError, match="unknown command ':fly'"):
        played.turn(":fly")
    assert not played.turn("a")


def test_play_lets_the_model_write() -> None:
    played, out = game()
    played.start()
    assert not played.turn(":model 3")
    assert played.turn(":model")
    assert len(played.rewards) == 4 and "response (length)" in out.getvalue()


def test_play_reads_lines_until_it_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["#0 0 0 0", ":skip", "zebra", "#1 1 1 1"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    assert main(["play", "--env", "textgym/Echo-v0", "--episodes", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("total reward") == 2 and "no tokens for 'zebra'" in shown

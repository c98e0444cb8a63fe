import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from textgym.logging import (
    FAMILIES,
    GLOSSARY,
    RunLogger,
    describe,
    plot_learning_curve,
    read_metrics,
)


def logger(folder: Path | None, **kwargs: object) -> RunLogger:
    options = {"quiet": True, "tensorboard": False} | kwargs
    return RunLogger(folder, **options)  # type: ignore[arg-type]


def test_one_json_line_an_update(tmp_path: Path) -> None:
    with logger(tmp_path / "run") as log:
        log.log(1, {"rollout/reward_mean": 0.5, "reward/bleu": np.float32(0.25)})
        log.log(2, {"rollout/reward_mean": math.nan, "kl/ref": math.inf})
        assert log.history[0]["rollout/reward_mean"] == 0.5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "rollout/reward_mean": 0.5, "reward/bleu": 0.25},
        {"step": 2, "rollout/reward_mean": None, "kl/ref": None},
    ]


def test_a_metric_needs_a_meaning(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        for name in ("rollout/reward_men", "reward/", "eval/reward/"):
            with pytest.raises(KeyError, match="GLOSSARY"):
                log.log(1, {name: 1.0})
    assert read_metrics(tmp_path) == []
    assert describe("reward/bleu") == FAMILIES["reward/"]
    assert describe("eval/reward/bleu") == FAMILIES["eval/reward/"]
    assert all(meaning and "\n" not in meaning for meaning in GLOSSARY.values())


def test_resuming_drops_what_lies_after_the_checkpoint(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"rollout/reward_mean": step})
            log.log_samples(step, [{"text": "é", "token_rewards": np.array([0.0, math.nan])}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')  # killed while writing
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    with logger(tmp_path) as log:
        log.truncate_after(2)
        log.log(3, {"rollout/reward_mean": 30})
    assert [r["rollout/reward_mean"] for r in read_metrics(tmp_path)] == [1, 2, 30]
    samples = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": s, "text": "é", "token_rewards": [0.0, None]} for s in (1, 2)]


@pytest.mark.parametrize("torn", ['{"step": 2', '{"step": 2}', "\x00\x00\n", "[1]\n"])
def test_a_torn_last_line_goes(tmp_path: Path, torn: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    logger(tmp_path).truncate_after(9)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_truncating_nothing_makes_nothing(tmp_path: Path) -> None:
    logger(tmp_path).truncate_after(0)
    logger(None).truncate_after(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_events_hide_lost_updates(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logger(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.log(step, {"rollout/reward_mean": step, "kl/ref": math.nan})
    with logger(tmp_path, tensorboard=True) as log:
        log.truncate_after(2)
        log.log(3, {"rollout/reward_mean": 30})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("rollout/reward_mean")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert events.Tags()["scalars"] == ["rollout/reward_mean"]


def test_plain_progress_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "time/total_tokens": 500,
        "time/tokens_per_s": 1234.5,
        "rollout/reward_mean": 0.25,
        "kl/ref": 1.5,
        "policy/entropy": 2.0,
    }
    with logger(None, quiet=False, total_tokens=1000, plain_every=3600.0) as log:
        log.log(1, metrics)
        log.log(2, metrics | {"time/total_tokens": 600})
        log.log(3, metrics | {"time/total_tokens": 1000})
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == (
        "train  update 1  500/1,000 tokens  1,234 tok/s  reward 0.250  KL 1.500  entropy 2.000"
    )
    assert len(lines) == 2, "the lines between are skipped, the last one is not"
    assert "update 3  1,000/1,000 tokens" in lines[1]
    assert lines[1].endswith("ETA 0:00")


def test_live_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with logger(None, quiet=False, total_tokens=1000, title="ppo") as log:
        log.log(1, {"time/total_tokens": 250, "eval/reward_mean": 0.75})
        log.log(2, {"time/total_tokens": 500})
        log.message("[saved] a line above")
    err = capsys.readouterr().err
    assert "50%" in err
    assert "eval 0.750" in err
    assert "[saved] a line above" in err


@pytest.mark.parametrize(("columns", "shown"), [(60, True), (80, True), (200, False)])
def test_a_narrow_terminal_still_shows_reward_and_time_left(
    columns: int,
    shown: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    metrics = {
        "time/tokens_per_s": 2345.0,
        "rollout/reward_mean": 0.5,
        "eval/reward_mean": 0.75,
        "kl/ref": 1.5,
        "policy/entropy": 2.0,
    }
    with logger(None, quiet=False, total_tokens=300_000, title="REINFORCE") as log:
        for step in (1, 2):
            log.log(step, metrics | {"time/total_tokens": 100_000 * step})
    err = capsys.readouterr().err
    assert "…" not in err and "reward 0.500" in err and "ETA" in err
    assert ("300,000 tokens" not in err) == shown


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with logger(None, quiet=True) as log:
        log.log(1, {"rollout/reward_mean": 1.0})
        log.message("hello")
    assert capsys.readouterr() == ("", "")


def test_learning_curve(tmp_path: Path) -> None:
    with logger(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"rollout/reward_mean": step, "time/total_tokens": 100 * step})
        log.log(6, {"rollout/reward_mean": math.nan, "eval/reward_mean": 3.0, "kl/ref": 1.0})
    path = plot_learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert imread(path).std() > 0.01
    with pytest.raises(ValueError, match="no metric"):
        plot_learning_curve(tmp_path / "nothing")

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from textgym.checkpoint import (
    CheckpointError,
    best_checkpoint,
    generator_state,
    latest_checkpoint,
    load_state,
    prepare_folder,
    read_meta,
    save_checkpoint,
    set_generator_state,
)


def write_weights(value: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "policy").mkdir()
        save_file({"w": torch.full((8,), value)}, folder / "policy" / "model.safetensors")

    return write


def save(folder: Path, step: int, **kwargs: object) -> Path:
    state = {"step": step}
    return save_checkpoint(folder, step=step, write=write_weights(step), state=state, **kwargs)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, eps=1e-5)
    parameter.square().sum().backward()
    optimizer.step()
    rng = np.random.default_rng(5)
    rng.random(3)
    state = {
        "optimizer": optimizer.state_dict(),
        "rng": generator_state(rng),
        "torch_rng": torch.get_rng_state(),
        "beta": 0.1,
        "big": 2**127 + 1,
        "none": None,
        "pair": (1, [True, "x"]),
    }
    path = save_checkpoint(tmp_path / "c", step=7, write=write_weights(7), state=state)
    assert latest_checkpoint(tmp_path / "c") == path
    assert names(path) == ["checkpoint.json", "policy", "state.pt"]
    assert load_file(path / "policy" / "model.safetensors")["w"].tolist() == [7.0] * 8
    loaded = load_state(path)
    assert (loaded["beta"], loaded["big"], loaded["none"]) == (0.1, 2**127 + 1, None)
    assert loaded["pair"] == (1, [True, "x"])
    moments = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])
    again = np.random.default_rng(0)
    set_generator_state(again, loaded["rng"])
    assert again.random() == rng.random()
    assert read_meta(path) == {"format": 1, "step": 7, "best": False}


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=2, best=step in (1, 3))
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000006"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000003"
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000006"


def test_one_step_saved_twice_keeps_the_newer(tmp_path: Path) -> None:
    first, second = save(tmp_path, 5), save(tmp_path, 5)
    assert (first.name, second.name) == ("step-00000005", "step-00000005.1")
    assert latest_checkpoint(tmp_path) == second
    assert latest_checkpoint(save(tmp_path, 10, keep=1).parent) == tmp_path / "step-00000010"
    assert names(tmp_path) == ["step-00000010"]


def test_unfinished_ones_are_ignored_and_removed(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    save(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / "step-00000003").mkdir()  # no checkpoint.json in it: made by something else
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 4)
    assert ".writing-step-00000002" not in names(tmp_path)
    assert {"notes", "step-00000003"} <= set(names(tmp_path))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old = save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "half").write_bytes(b"x" * 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = f"step 2 in {tmp_path}: the disk is full .* last whole checkpoint is {old}"
    with pytest.raises(CheckpointError, match=expected):
        save_checkpoint(tmp_path, step=2, write=full, state={})
    assert names(tmp_path) == ["step-00000001"]
    assert load_state(old) == {"step": 1}
    assert save(tmp_path, 2).name == "step-00000002"


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from textgym.checkpoint import CheckpointError, save_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
save_checkpoint(folder, step=1, write=lambda path: None, state={})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = {"w": torch.zeros(100_000)}
for write, state in ((lambda p: save_file(big, p / "m.safetensors"), {}), (lambda p: None, big)):
    try:
        save_checkpoint(folder, step=2, write=write, state=state)
    except CheckpointError as error:
        print("refused", error)
"""


def test_a_write_that_the_system_cuts_short_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The real writers of weights and state, stopped by a limit on the size of files."""
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert out.stdout.count("refused Could not save the checkpoint of step 2") == 2, out.stdout
    assert names(tmp_path) == ["step-00000001"]


def test_interrupting_a_save_leaves_nothing_half(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, step=1, write=interrupted, state={})
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="Cannot write in the output folder"):
            prepare_folder(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tmp_path / f".writing-probe-{os.getpid()}"
    probe.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left"):
        prepare_folder(tmp_path)
    assert names(tmp_path) == []


def test_state_that_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    state = {"a": [1, {"b": np.float64(1.0)}]}
    with pytest.raises(TypeError, match=re.escape("state['a'][1]['b'] is float64")):
        save_checkpoint(tmp_path, step=1, write=lambda path: None, state=state)
    with pytest.raises(ValueError, match="keep >= 1"):
        save_checkpoint(tmp_path, step=1, write=lambda path: None, state={}, keep=0)


def test_damaged_checkpoints_say_so(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Cannot read .*state\.pt"):
        load_state(path)
    (path / "checkpoint.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99, this textgym reads up to 1"):
        read_meta(path)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from textgym.checkpoint import latest_checkpoint, load_state, read_meta, save_checkpoint

torch.set_num_threads(1)
folder, random = Path(sys.argv[1]), random.Random(0)

def child():
    last = latest_checkpoint(folder)
    step = read_meta(last)["step"] if last else 0
    while True:
        step += 1
        def write(path):
            (path / "policy").mkdir()
            save_file({"w": torch.full((20_000,), float(step))}, path / "policy" / "m.safetensors")
        state = {"step": step, "moments": torch.full((20_000,), float(step))}
        save_checkpoint(folder, step=step, write=write, state=state, keep=1, best=step % 3 == 0)

seen, halves, kills, longest = 0, 0, 0, 0.06
while kills < 40 or ((seen <= 5 or halves <= 5) and kills < 400):
    kills += 1
    pid = os.fork()
    if not pid:
        child()
    time.sleep(random.uniform(0.0, longest))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    halves += any(name.startswith(".") for name in os.listdir(folder)) if folder.exists() else 0
    last = latest_checkpoint(folder)
    if last is None or read_meta(last)["step"] == seen:  # a busy machine: give the next one longer
        longest = min(2.0, 1.1 * longest)
    if last is None:
        assert seen == 0
        continue
    step, state = read_meta(last)["step"], load_state(last)
    weights = load_file(last / "policy" / "m.safetensors")["w"]
    assert last.name == f"step-{step:08d}" and state["step"] == step >= seen
    assert (weights == step).all() and (state["moments"] == step).all()
    seen = step
print(seen, halves)
"""


def test_killed_at_any_moment_the_latest_checkpoint_is_whole(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "c")],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    seen, halves = map(int, out.stdout.split())
    assert seen > 5, "the runs made no progress, so the test tested nothing"
    assert halves > 5, "no kill came while a checkpoint was being written"

"""CUDA against the CPU, and graphs against the steps that they hold."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from textgym import streams
from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, Generation
from textgym.policies.graph_decode import GraphDecode
from textgym.policies.slot_window import SlotWindow
from textgym.rollout import collect
from textgym.sampling import Method, gumbel_noise, mix64, uniform53
from textgym.tokens import symbol_tokenizer
from textgym.vector import TextGenVectorEnv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, VOCAB = 8, 61
STOP = (5, 17)


def prompts(n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [n, 32], lengths [n] and streams [n]."""
    rng = np.random.default_rng(0)
    ids = np.zeros((n, 32), np.int64)
    ids[:, :9] = rng.integers(0, VOCAB, (n, 9))
    return ids, rng.integers(2, 10, n), streams.mix64(1, np.arange(n))


def write(policy: CausalLMPolicy, tokens: int = 20) -> Generation:
    ids, length, stream = prompts()
    obs = {"input_ids": ids, "length": length}
    return policy.generate(obs, stream, max_new_tokens=tokens, stop_ids=STOP)


def act_on(policy: CausalLMPolicy, steps: int = 20) -> Generation:
    """The same by `act`, one token at a time; rows that have ended are left out."""
    ids, length, stream = prompts()
    tokens = np.zeros((N, steps), np.int64)
    logprob, value = np.zeros((2, N, steps), np.float32)
    count, live = np.zeros(N, np.int64), np.arange(N)
    for step in range(steps):
        obs = {"input_ids": ids[live], "length": length[live]}
        act = policy.act(obs, stream[live], rows=live)
        tokens[live, step], logprob[live, step], value[live, step] = act
        ids[live, length[live]] = act.action
        length[live] += 1
        count[live] += 1
        live = live[~np.isin(act.action, STOP)]
        if not len(live):
            break
    return Generation(tokens, logprob, value, count)


def graphs_of(policy: CausalLMPolicy) -> GraphDecode:
    assert policy._decoder is not None and policy._decoder.graphs is not None
    return policy._decoder.graphs


def waits(run: Callable[[], Any]) -> tuple[int, Any]:
    """How often the host waits for the device, and what it gets."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA op" in str(warning.message) for warning in seen), result


def test_hash_and_uniforms_are_bit_equal() -> None:
    key = torch.from_numpy(streams.mix64(3, np.arange(1000)).view(np.int64))
    assert torch.equal(mix64(7, key.cuda()).cpu(), mix64(7, key))
    assert torch.equal(uniform53(key.cuda()).cpu(), uniform53(key))
    noise = gumbel_noise(key[:10].cuda(), 50).cpu()
    assert torch.allclose(noise, gumbel_noise(key[:10], 50), atol=1e-12)


def test_scores(make_model: Callable[..., Any], batch: SequenceBatch, family: str) -> None:
    slow = CausalLMPolicy(make_model(family), device="cpu")
    fast = CausalLMPolicy(make_model(family), device="auto")
    assert fast.device.type == "cuda"
    for a, b in zip(slow.evaluate(batch), fast.evaluate(batch), strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b.cpu(), atol=1e-3)
    assert fast.kl(fast.frozen_copy(), batch).abs().max() == 0


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("sampler", ["gumbel", "inverse_cdf"])
def test_tokens_are_those_of_the_cpu(
    make_model: Callable[..., Any],
    family: str,
    sampler: Method,
    cuda_graphs: bool,
    assert_same_responses: Callable[..., None],
) -> None:
    slow = CausalLMPolicy(make_model(family), device="cpu", sampler=sampler)
    fast = CausalLMPolicy(
        make_model(family), device="cuda", sampler=sampler, cuda_graphs=cuda_graphs
    )
    expected, here = write(slow), prompts()
    assert_same_responses(slow, *here, expected, write(fast), atol=1e-3)
    fast.invalidate_cache()
    assert_same_responses(slow, *here, expected, act_on(fast), atol=1e-3)


def test_graphs_draw_what_the_steps_in_them_draw(
    make_model: Callable[..., Any], family: str, assert_same_responses: Callable[..., None]
) -> None:
    eager = CausalLMPolicy(make_model(family), device="cuda", cuda_graphs=False)
    fast = CausalLMPolicy(make_model(family), device="cuda", cuda_graphs=True)
    expected = write(eager)
    assert_same_responses(eager, *prompts(), expected, write(fast))
    captured = graphs_of(fast).steps.captures
    for _ in range(2):
        fast.invalidate_cache()
        assert_same_responses(eager, *prompts(), expected, write(fast))
    assert graphs_of(fast).steps.captures == captured  # the cache stayed where it was
    assert_same_responses(eager, *prompts(), expected, act_on(fast))


def test_graphs_in_bfloat16(make_model: Callable[..., Any]) -> None:
    eager = CausalLMPolicy(
        make_model(), device="cuda", compute_dtype="bfloat16", sampler="greedy", cuda_graphs=False
    )
    fast = CausalLMPolicy(
        make_model(), device="cuda", compute_dtype="bfloat16", sampler="greedy", cuda_graphs=True
    )
    one, other = write(eager, 1), write(fast, 1)
    np.testing.assert_allclose(one.logprob, other.logprob, atol=0.1)
    assert (one.tokens == other.tokens).mean() >= 0.75


def test_the_host_waits_once_a_token_and_once_for_eight(make_model: Callable[..., Any]) -> None:
    assert waits(torch.ones(1, device="cuda").item)[0] == 1  # it does count
    policy = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=True)
    ids, length, stream = prompts()
    rows = np.arange(N)
    mask = np.ones((N, VOCAB), bool)
    # Ahead: the token; the forward, drawn from with a mask or with another key.
    cases: list[dict[str, Any]] = [{}, {}, {}, {}, {"action_mask": mask}, {"sample_index": 1}]
    for step, case in enumerate(cases):
        obs = {"input_ids": ids, "length": length}
        waited, act = waits(partial(policy.act, obs, stream, **case))
        assert waited == 1 or step < 2  # the first calls capture
        ids[rows, length] = act.action
        length += 1
    graphs = graphs_of(policy)
    key = streams.mix64(0, stream[:, None], 0, length[:, None] + np.arange(8))
    arguments = rows, ids[rows, length - 1], length - 1, key, policy.sampler
    graphs.write(*arguments)
    assert waits(partial(graphs.write, *arguments))[0] == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            graphs.steps.run(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", [{}, {"lora": 4}, {"compute_dtype": "bfloat16"}])
def test_graphs_see_new_weights(make_model: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Updated in place between replays, by a fused optimizer too."""
    tokens = {}
    for cuda_graphs in (True, False):
        policy = CausalLMPolicy(
            make_model(), device="cuda", sampler="greedy", cuda_graphs=cuda_graphs, **settings
        )
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, fused=True)
        first = write(policy, 3)
        for _ in range(2):
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.ones_like(parameter).cumsum(0).sin()
            optimizer.step()
        tokens[cuda_graphs] = write(policy, 3)
        moved = np.abs(tokens[cuda_graphs].logprob[:, 0] - first.logprob[:, 0])
        assert moved.max() > 0.1
    atol = 0.1 if "compute_dtype" in settings else 1e-3
    np.testing.assert_allclose(tokens[True].logprob[:, 0], tokens[False].logprob[:, 0], atol=atol)


def test_graphs_are_made_again_when_the_cache_grows(
    make_model: Callable[..., Any], assert_same_responses: Callable[..., None]
) -> None:
    eager = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=False)
    fast = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=True)
    for n, columns in ((4, 12), (8, 32), (3, 12)):
        ids, length, stream = prompts()
        obs = {"input_ids": ids[:n, :columns], "length": length[:n]}
        one, other = (
            policy.generate(obs, stream[:n], max_new_tokens=6, stop_ids=())
            for policy in (eager, fast)
        )
        assert_same_responses(eager, ids[:n], length[:n], stream[:n], one, other)


def test_both_paths_of_collect_are_the_same(make_model: Callable[..., Any]) -> None:
    policy = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=True)
    envs = TextGenVectorEnv(
        num_envs=6,
        autoreset_mode="Disabled",
        prompts=[{"prompt": [1, 2, 3, i]} for i in range(10)],
        tokenizer=symbol_tokenizer([f"s{i}" for i in range(VOCAB - 1)], eos=None),
        reward=lambda text: float(len(text)),
        max_new_tokens=24,
        stop=STOP,
    )
    by_step = collect(policy, envs, 20, seed=3)
    policy.invalidate_cache()
    by_sequence = collect(policy, envs, 20, seed=3, path="sequence")
    assert np.array_equal(by_step.ids, by_sequence.ids)
    np.testing.assert_allclose(by_step.logprob, by_sequence.logprob, atol=1e-4)
    assert np.array_equal(by_step.reward, by_sequence.reward)


def test_compiled_graphs(
    make_model: Callable[..., Any], assert_same_responses: Callable[..., None]
) -> None:
    eager = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=False)
    fast = CausalLMPolicy(make_model(), device="cuda", cuda_graphs="compile")
    assert_same_responses(eager, *prompts(), write(eager), write(fast))


def test_a_model_that_cannot_be_captured_goes_on_without(
    make_model: Callable[..., Any], assert_same_responses: Callable[..., None]
) -> None:
    model = make_model()
    policy = CausalLMPolicy(model, device="cuda")
    forward = model.base_model.forward

    def looking(**kwargs: Any) -> Any:
        if isinstance(kwargs.get("past_key_values"), SlotWindow):
            int(kwargs["input_ids"].sum())
        return forward(**kwargs)

    model.base_model.forward = looking
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match=r"without CUDA graphs: .*synchronizing CUDA op"):
        found = write(policy)
    assert torch.cuda.current_stream() == stream
    eager = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=False)
    assert_same_responses(eager, *prompts(), found, write(eager))


def test_memory_is_known_and_given_back(make_model: Callable[..., Any]) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    policy = CausalLMPolicy(make_model(), device="cuda", cuda_graphs=True)
    write(policy)
    assert graphs_of(policy).steps.graph_bytes > 0
    del policy
    gc.collect()  # models may refer to themselves
    # What cuBLAS keeps for a stream is not ours.
    assert torch.cuda.memory_allocated() - before < 64 * 2**20


def test_optimizers_of_the_gpu_invalidate_the_cache(
    make_model: Callable[..., Any], batch: SequenceBatch
) -> None:
    policy = CausalLMPolicy(make_model(), device="cuda")
    obs = {"input_ids": batch.ids.numpy(), "length": batch.lengths.numpy()}
    rows = np.arange(3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        policy.act(obs, rows)
        optimizer.zero_grad()
        policy.evaluate(batch).logprob.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.inference_mode():
            cached = policy._hidden_last(obs["input_ids"], obs["length"], rows)
            full = policy._hidden_all(batch.ids.cuda())[rows, batch.lengths.cuda() - 1]
        assert torch.allclose(cached, full, atol=1e-3)

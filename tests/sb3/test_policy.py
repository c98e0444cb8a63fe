"""The policy: what it refuses, what it saves, that its cache is used, that masks hold."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.sb3 import (
    CausalLMActorCriticPolicy,
    SB3VecEnv,
    SequenceRolloutBuffer,
    make_sb3_vec_env,
)
from textgym.vector_wrappers import AllowedTokens, ForcedPrefix


def masked(env_id: str, wrapper: Any, *args: Any, num_envs: int = 4) -> SB3VecEnv:
    envs = gym.make_vec(
        env_id, num_envs, vectorization_mode="vector_entry_point", autoreset_mode="SameStep"
    )
    made = SB3VecEnv(wrapper(envs, *args))
    made.seed(0)
    return made


@pytest.mark.parametrize(("algorithm", "options"), [(DQN, {"buffer_size": 10}), (RecurrentPPO, {})])
def test_algorithms_that_cannot_work_say_why(
    make_vec_env: Any, algorithm: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match="use PPO"):
        algorithm(CausalLMActorCriticPolicy, make_vec_env(), device="cpu", **options)


def test_spaces_that_are_not_token_ids_are_refused(make_vec_env: Any) -> None:
    with pytest.raises(ValueError, match=r"VecNormalize\(norm_obs=False\)"):
        PPO(CausalLMActorCriticPolicy, VecNormalize(make_vec_env()), device="cpu")
    with pytest.raises(ValueError, match="VecFrameStack"):
        PPO(CausalLMActorCriticPolicy, VecFrameStack(make_vec_env(), 2), device="cpu")
    with pytest.raises(ValueError, match="token environment"):
        PPO(CausalLMActorCriticPolicy, "CartPole-v1", device="cpu")
    PPO(CausalLMActorCriticPolicy, VecNormalize(make_vec_env(), norm_obs=False), device="cpu")


def test_arguments_about_perceptrons_are_refused(make_vec_env: Any) -> None:
    with pytest.raises(TypeError, match="net_arch"):
        PPO(CausalLMActorCriticPolicy, make_vec_env(), policy_kwargs={"net_arch": [64]})


def test_a_model_that_does_not_fit_is_refused(make_vec_env: Any) -> None:
    for model, reason in (
        (random_causal_lm(7), "vocab_size"),
        (random_causal_lm(32, max_positions=4), "context holds 4 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            PPO(
                CausalLMActorCriticPolicy,
                make_vec_env(),
                policy_kwargs={"model": model},
                device="cpu",
            )


def test_a_sampler_that_cannot_be_trained_with_is_refused(make_algorithm: Any) -> None:
    with pytest.raises(ValueError, match="deterministic=True"):
        make_algorithm(policy_kwargs={"sampler": "greedy"})


def test_the_model_follows_from_the_spaces(make_algorithm: Any) -> None:
    def weights(seed: int) -> torch.Tensor:
        policy = make_algorithm(seed=seed).policy
        return torch.cat([p.flatten() for p in policy.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_the_embedded_model_is_used_where_it_fits() -> None:
    env = make_sb3_vec_env("textgym:TextGen-v0", 2, seed=0)
    with pytest.warns(UserWarning, match="training the embedded one"):
        algorithm = PPO(CausalLMActorCriticPolicy, env, device="cpu", n_steps=32)
    assert sum(p.numel() for p in algorithm.policy.parameters()) > 700_000


def test_a_stock_buffer_works_and_is_advised_against(make_algorithm: Any) -> None:
    algorithm = make_algorithm(stock=True)
    with pytest.warns(UserWarning, match="SequenceRolloutBuffer for one forward a sequence"):
        algorithm.learn(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm.learn(40)  # said once


@pytest.mark.parametrize("name", ["PPO", "A2C", "TRPO", "MaskablePPO"])
def test_saving_and_loading(make_algorithm: Any, tmp_path: Path, name: str) -> None:
    model = random_causal_lm(18, hidden_size=64, num_layers=2)
    model.config.dtype = torch.bfloat16  # as of weights that were stored so
    algorithm = make_algorithm(name, policy_kwargs={"model": model}).learn(40)
    assert algorithm.policy.lm.model is model  # trained in place
    algorithm.save(tmp_path / "saved.zip")
    weights = sum(p.numel() for p in algorithm.policy.parameters()) * 4
    assert (tmp_path / "saved.zip").stat().st_size < 3 * weights + 100_000  # Adam keeps two more
    loaded = type(algorithm).load(tmp_path / "saved.zip", env=algorithm.env, device="cpu")
    state = loaded.policy.state_dict()
    for key, value in algorithm.policy.state_dict().items():
        assert torch.equal(state[key], value)
    obs = algorithm.env.reset()
    actions = [a.predict(obs, deterministic=True)[0] for a in (algorithm, loaded)]
    np.testing.assert_array_equal(*actions)
    loaded.learn(40)
    algorithm.policy.save(str(tmp_path / "policy.pt"))
    policy = type(algorithm.policy).load(str(tmp_path / "policy.pt"), device="cpu")
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], actions[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_loading_on_another_device(
    make_algorithm: Any, tmp_path: Path, saved: str, loaded: str
) -> None:
    algorithm = make_algorithm(device=saved).learn(40)
    algorithm.save(tmp_path / "saved.zip")
    other = type(algorithm).load(tmp_path / "saved.zip", env=algorithm.env, device=loaded)
    assert {p.device.type for p in other.policy.parameters()} == {loaded}
    obs = algorithm.env.reset()
    actions = [a.predict(obs, deterministic=True)[0] for a in (algorithm, other)]
    np.testing.assert_array_equal(*actions)
    other.learn(40)


def test_a_loaded_policy_has_what_its_folder_said(make_algorithm: Any, tmp_path: Path) -> None:
    model = random_causal_lm(16)
    CausalLMPolicy(model, temperature=0.5, sampler="gumbel").save_pretrained(tmp_path / "model")
    algorithm = make_algorithm(policy_kwargs={"model": tmp_path / "model"})
    algorithm.save(tmp_path / "saved.zip")
    shutil.rmtree(tmp_path / "model")
    loaded = PPO.load(tmp_path / "saved.zip", device="cpu").policy.lm
    assert loaded.temperature == 0.5 and loaded.sampler.method == "gumbel"


def test_transformers_writes_the_same_text_from_saved_weights(
    make_algorithm: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    algorithm = make_algorithm().learn(80)
    algorithm.policy.save_pretrained(tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    obs = algorithm.env.reset()
    prompts = [ids[:n] for ids, n in zip(obs["input_ids"], obs["length"][:, 0], strict=True)]
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(4):
        actions, _ = algorithm.predict(obs, deterministic=True)
        for i, action in enumerate(actions):
            written[i].append(int(action))
        obs, *_ = algorithm.env.step(actions)
    for prompt, response in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt.tolist()])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        assert expected[0, len(prompt) :].tolist() == response


def test_decoding_goes_through_the_cache(make_algorithm: Any, make_vec_env: Any) -> None:
    algorithm = make_algorithm(n_steps=8)
    _, callback = algorithm._setup_learn(10**6, None)
    env = algorithm.env

    def collect() -> None:
        algorithm.collect_rollouts(env, callback, algorithm.rollout_buffer, 8)

    collect()
    decoder = algorithm.policy.lm._decoder
    before = decoder.prefilled_tokens
    for batch in (1, 3):  # others look on: their rows are their own
        algorithm.predict({k: v[:batch] for k, v in make_vec_env(4).reset().items()})
    extra = decoder.prefilled_tokens - before
    collect()
    # Two episodes of 4 steps in each of 4 rows: their prompts, and nothing else.
    prompts = 2 * 4 * (5 + 1)
    assert decoder.prefilled_tokens - before - extra <= prompts


def test_the_global_generators_are_left_alone(make_algorithm: Any, collect_once: Any) -> None:
    algorithm = make_algorithm()
    _, callback = algorithm._setup_learn(10**6, None)
    before = torch.get_rng_state()
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_masked_token_is_never_written() -> None:
    env = masked("textgym/Echo-v0", AllowedTokens, [3, 5, 6])
    from textgym.sb3 import MaskableCausalLMActorCriticPolicy, MaskableSequenceRolloutBuffer

    algorithm = MaskablePPO(
        MaskableCausalLMActorCriticPolicy,
        env,
        n_steps=16,
        batch_size=32,
        gamma=1.0,
        rollout_buffer_class=MaskableSequenceRolloutBuffer,
        seed=0,
        device="cpu",
    )
    before = copy.deepcopy(algorithm.policy.state_dict())
    algorithm.learn(128)
    assert set(algorithm.rollout_buffer.actions.flatten()) <= {3, 5, 6}
    (batch,) = algorithm.rollout_buffer.get(None)
    assert batch.action_masks.sum(1).eq(3).all()
    with torch.no_grad():
        found = algorithm.policy.get_distribution(batch.observations, batch.action_masks)
        _, logprob, entropy = algorithm.policy.evaluate_actions(
            batch.observations, batch.actions.long().flatten(), batch.action_masks
        )
    assert (found.distribution.probs[~batch.action_masks] == 0).all()
    torch.testing.assert_close(
        found.log_prob(batch.actions.long().flatten()), logprob, rtol=0, atol=1e-5
    )
    assert entropy.max() <= np.log(3) + 1e-5
    assert any(not torch.equal(v, before[k]) for k, v in algorithm.policy.state_dict().items())


def test_a_forced_prefix_begins_every_response() -> None:
    env = masked("textgym/Echo-v0", ForcedPrefix, [4, 2])
    algorithm = MaskablePPO("MultiInputPolicy", env, n_steps=8, batch_size=32, seed=0, device="cpu")
    obs = env.reset()
    for step in range(8):
        action, _ = algorithm.predict(obs, action_masks=np.stack(env.env_method("action_masks")))
        if step % 4 < 2:
            assert (action == (4, 2)[step % 4]).all()
        obs, *_ = env.step(action)


def test_one_environment_of_ones_own(make_algorithm: Any) -> None:
    algorithm = make_algorithm(env=gym.make("textgym/Echo-v0"), batch_size=10)
    algorithm.learn(20)
    assert algorithm.ep_info_buffer[0]["l"] == 4


def test_a_string_id() -> None:
    # SB3 asks for pictures; Gymnasium says that there are none.
    with pytest.warns(UserWarning, match="render_mode|embedded"):
        algorithm = PPO(
            CausalLMActorCriticPolicy,
            "textgym:TextGen-v0",
            n_steps=64,
            batch_size=64,
            n_epochs=1,
            gamma=1.0,
            rollout_buffer_class=SequenceRolloutBuffer,
            device="cpu",
        )
    algorithm.learn(64)

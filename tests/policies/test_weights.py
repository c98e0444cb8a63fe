"""Changes of weights are noticed; policies are copied, saved, adapted and loaded."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textgym.agents import REINFORCE, REINFORCEConfig
from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.policies.loading import find_model, resolve_device

VOCAB = 61
OBS = {
    "input_ids": np.random.default_rng(0).integers(0, VOCAB, (5, 20)),
    "length": np.array([4, 7, 5, 9, 9]),
}
STREAM = np.arange(5, dtype=np.uint64)


def stale(policy: CausalLMPolicy) -> float:
    """How far what `act` uses is from the full forward with the weights of now."""
    with torch.inference_mode(), policy._forward_mode():
        rows = np.arange(5)
        cached = policy._hidden_last(OBS["input_ids"], OBS["length"], rows)
        full = policy._hidden_all(torch.from_numpy(OBS["input_ids"]))
        full = full[torch.arange(5), torch.from_numpy(OBS["length"] - 1)]
    return float((cached - full).abs().max())


def descend(policy: CausalLMPolicy, optimizer: torch.optim.Optimizer, batch: SequenceBatch) -> None:
    optimizer.zero_grad()
    policy.evaluate(batch).logprob.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


class DataWriter(torch.optim.Optimizer):
    """An optimizer of the old school, whose writes no tensor version shows."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad.data, alpha=0.1)


class TestInvalidation:
    @pytest.mark.parametrize("kind", ["adam", "fused", "data"])
    def test_optimizer_steps(self, policy: CausalLMPolicy, batch: SequenceBatch, kind: str) -> None:
        optimizer: torch.optim.Optimizer
        if kind == "data":
            optimizer = DataWriter(policy.parameters())
        else:
            optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, fused=kind == "fused")
        for _ in range(2):
            policy.act(OBS, STREAM)
            descend(policy, optimizer, batch)
            assert stale(policy) < 1e-4

    def test_the_test_can_fail(self, policy: CausalLMPolicy) -> None:
        """A write that nothing shows leaves the cache stale, until it is told."""
        policy.act(OBS, STREAM)
        for parameter in policy.model.parameters():
            parameter.data.mul_(1.5)
        assert stale(policy) > 1e-2
        policy.invalidate_cache()
        assert stale(policy) < 1e-4

    def test_loading_replacing_and_copying_in(self, policy: CausalLMPolicy) -> None:
        other = {k: v * 1.5 for k, v in policy.model.state_dict().items()}
        policy.act(OBS, STREAM)
        policy.model.load_state_dict(other)
        assert stale(policy) < 1e-4
        policy.model.load_state_dict({k: v / 1.5 for k, v in other.items()}, assign=True)
        assert stale(policy) < 1e-4
        policy.load_state_dict({k: v * 1.2 for k, v in policy.state_dict().items()})
        assert stale(policy) < 1e-4
        for parameter in policy.model.parameters():
            parameter.data = parameter.data * 1.3
        assert stale(policy) < 1e-4

    def test_unchanged_weights_keep_the_cache(
        self, policy: CausalLMPolicy, batch: SequenceBatch
    ) -> None:
        policy.act(OBS, STREAM)
        decoder = policy._slot_decoder()
        assert decoder is not None
        before = decoder.prefilled_tokens
        other = CausalLMPolicy(random_causal_lm(VOCAB), device="cpu")
        descend(other, torch.optim.Adam(other.parameters()), batch)  # somebody else's step
        policy.evaluate(batch)
        policy.act(OBS, STREAM)
        assert decoder.prefilled_tokens == before

    def test_another_dtype(self, policy: CausalLMPolicy) -> None:
        policy.act(OBS, STREAM)
        assert policy.double().act(OBS, STREAM).value.dtype == np.float32
        assert stale(policy) < 1e-10


class TestEvalMode:
    def test_dropout_never_runs(self, make_model: Callable[..., Any], batch: SequenceBatch) -> None:
        model = make_model("gpt2")
        assert model.config.resid_pdrop > 0
        policy = CausalLMPolicy(model, device="cpu")
        expected = policy.evaluate(batch).logprob
        policy.train()
        assert not any(module.training for module in policy.modules())
        assert torch.equal(policy.evaluate(batch).logprob, expected)
        policy.model.train()
        assert torch.equal(policy.evaluate(batch).logprob, expected)
        policy.model.train()
        assert stale(policy) < 1e-4


class TestConstruction:
    def test_fewer_logits_than_tokens(self) -> None:
        with pytest.raises(ValueError, match="at most the 61 logits of the model, got 62"):
            CausalLMPolicy(random_causal_lm(VOCAB), vocab_size=62)

    def test_bad_settings(self) -> None:
        model = random_causal_lm(VOCAB)
        with pytest.raises(ValueError, match="dtype: expected"):
            CausalLMPolicy(model, dtype="float33")
        with pytest.raises(ValueError, match="floating-point"):
            CausalLMPolicy(model, dtype=torch.int8)
        with pytest.raises(ValueError, match="temperature"):
            CausalLMPolicy(model, temperature=-1.0)
        with pytest.raises(ValueError, match="logit_chunk"):
            CausalLMPolicy(model, logit_chunk=0)

    def test_value_head_starts_at_zero_in_float32(self, batch: SequenceBatch) -> None:
        policy = CausalLMPolicy(random_causal_lm(VOCAB), device="cpu", dtype="bfloat16")
        assert policy.value_head is not None and policy.value_head.weight.dtype == torch.float32
        value = policy.evaluate(batch).value
        assert value is not None and not value.any() and value.dtype == torch.float32
        none = CausalLMPolicy(random_causal_lm(VOCAB), device="cpu", value_head=False)
        assert none.evaluate(batch).value is None
        assert not none.act(OBS, STREAM).value.any()

    def test_bfloat16_scores_in_float32(self, batch: SequenceBatch) -> None:
        full = CausalLMPolicy(random_causal_lm(VOCAB), device="cpu").evaluate(batch)
        half = CausalLMPolicy(random_causal_lm(VOCAB), device="cpu", dtype="bfloat16")
        found = half.evaluate(batch)
        assert found.logprob.dtype == torch.float32
        assert torch.allclose(found.logprob, full.logprob, atol=0.02)
        act = half.act(OBS, STREAM)
        assert act.logprob.dtype == np.float32 and half._slot_decoder() is not None

    def test_other_models_run_without_the_cache_and_say_so_once(self, batch: SequenceBatch) -> None:
        import transformers as hf

        config = hf.MistralConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=4,
            pad_token_id=None,
        )
        policy = CausalLMPolicy(hf.MistralForCausalLM(config), device="cpu")
        with pytest.warns(
            UserWarning, match="MistralForCausalLM runs without the slot cache.*window"
        ):
            first = policy.act(OBS, STREAM)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = policy.act({k: v[2:] for k, v in OBS.items()}, STREAM[2:], rows=[2, 3, 4])
            made = policy.generate(OBS, STREAM, max_new_tokens=3, stop_ids=())
        assert (second.action == first.action[2:]).all() and stale(policy) < 1e-5
        assert (made.tokens[:, 0] == first.action).all()
        np.testing.assert_allclose(made.logprob[:, 0], first.logprob, atol=1e-5)


class TestFrozenCopy:
    def test_is_the_policy_of_now_without_gradient(
        self, make_model: Callable[..., Any], batch: SequenceBatch
    ) -> None:
        policy = CausalLMPolicy(
            make_model(vocab=VOCAB + 2), vocab_size=VOCAB, device="cpu", temperature=0.8, top_k=4
        )
        policy.act(OBS, STREAM)
        frozen = policy.frozen_copy()
        policy.sampler = replace(policy.sampler, top_k=None)
        assert frozen.temperature == 0.8 and frozen.vocab_size == VOCAB
        expected = policy.evaluate(batch).logprob.detach()
        found = frozen.evaluate(batch)
        assert torch.equal(found.logprob, expected)
        assert not found.logprob.requires_grad and found.value is None
        descend(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch)
        assert torch.equal(frozen.evaluate(batch).logprob, expected)
        assert not torch.equal(policy.evaluate(batch).logprob, expected)
        assert frozen.act(OBS, STREAM).action.shape == (5,)
        assert policy.kl(frozen, batch).min() > 0

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
    def test_deep_copies_and_pickles(
        self, policy: CausalLMPolicy, batch: SequenceBatch, way: Callable[[Any], Any]
    ) -> None:
        policy.act(OBS, STREAM)
        twin = way(policy)
        assert twin._decoder is None
        assert torch.equal(twin.evaluate(batch).logprob, policy.evaluate(batch).logprob)
        expected = policy.act(OBS, STREAM).action
        descend(policy, torch.optim.SGD(policy.parameters(), lr=0.1), batch)
        assert (twin.act(OBS, STREAM).action == expected).all()
        assert stale(twin) < 1e-4


class TestFiles:
    def test_round_trip(self, policy: CausalLMPolicy, batch: SequenceBatch, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        built = CausalLMPolicy(
            policy.model, vocab_size=60, device="cpu", temperature=0.7, sampler="gumbel", seed=9
        )
        with torch.no_grad():
            assert built.value_head is not None
            built.value_head.weight.fill_(0.3)
            built.value_head.bias.fill_(-1.0)
        built.save_pretrained(tmp_path)
        loaded = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
        assert loaded.sampler == built.sampler and loaded.seed == 9 and loaded.vocab_size == 60
        batch.ids.clamp_(max=59)
        for found, expected in zip(loaded.evaluate(batch), built.evaluate(batch), strict=True):
            assert found is not None and expected is not None and torch.equal(found, expected)
        obs = {**OBS, "input_ids": OBS["input_ids"].clip(max=59)}
        assert (loaded.act(obs, STREAM).action == built.act(obs, STREAM).action).all()
        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(plain(batch.ids).logits, built.model(batch.ids).logits)

    def test_settings_can_be_replaced(self, policy: CausalLMPolicy, tmp_path: Path) -> None:
        policy.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "textgym_policy.json").read_text())
        assert settings["temperature"] == 1.0 and settings["sampler"] == "inverse_cdf"
        loaded = CausalLMPolicy.from_pretrained(
            tmp_path, device="cpu", sampler="greedy", temperature=2.0, value_head=False
        )
        assert loaded.sampler.method == "greedy" and loaded.temperature == 2.0
        assert loaded.value_head is None
        with pytest.raises(TypeError, match="temprature"):
            CausalLMPolicy.from_pretrained(tmp_path, temprature=2.0)

    def test_the_value_head_is_optional(self, tmp_path: Path, batch: SequenceBatch) -> None:
        model = random_causal_lm(VOCAB)
        CausalLMPolicy(model, device="cpu").save_pretrained(tmp_path)
        CausalLMPolicy(model, device="cpu", value_head=False).save_pretrained(tmp_path)
        assert not (tmp_path / "value_head.safetensors").exists()
        value = CausalLMPolicy.from_pretrained(tmp_path, device="cpu").evaluate(batch).value
        assert value is not None and not value.any()

    def test_a_plain_model_loads_as_float32(self, tmp_path: Path) -> None:
        random_causal_lm(VOCAB).bfloat16().save_pretrained(tmp_path)
        assert CausalLMPolicy(tmp_path, device="cpu").model.dtype == torch.float32
        half = CausalLMPolicy.from_pretrained(str(tmp_path), device="cpu", dtype="bfloat16")
        assert half.model.dtype == torch.bfloat16

    def test_the_folder_of_a_run_is_its_newest_policy(self, tmp_path: Path) -> None:
        envs = gym.make_vec("textgym/Bandit-v0", 4, autoreset_mode="Disabled")
        policy = CausalLMPolicy(random_causal_lm(envs.single_action_space.n), temperature=2.0)
        config = REINFORCEConfig(episodes=4, baseline="learned", checkpoint_every=1)
        REINFORCE(policy, envs, config, folder=tmp_path / "run").learn(4, quiet=True)
        loaded = CausalLMPolicy.from_pretrained(tmp_path / "run", device="cpu")
        for name, weight in policy.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        assert loaded.temperature == 2.0

    def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(self, tmp_path: Path) -> None:
        (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
        (tmp_path / "nothing").mkdir()
        hint = "no model folder .*mien; did you mean .*runs/mine"
        for load in (CausalLMPolicy, CausalLMPolicy.from_pretrained):
            with pytest.raises(ValueError, match=hint):
                load(tmp_path / "runs" / "mien")
            with pytest.raises(ValueError, match="neither a model"):
                load(tmp_path / "nothing")
            with pytest.raises(ValueError, match="holds no checkpoint"):
                load(tmp_path / "runs" / "mine")
        assert [find_model(name) for name in ("owner/name", "gpt2")] == ["owner/name", "gpt2"]


class TestLora:
    def adapted(self, make_model: Callable[..., Any], family: str, **knobs: Any) -> CausalLMPolicy:
        pytest.importorskip("peft")
        return CausalLMPolicy(make_model(family), device="cpu", lora=4, **knobs)

    def test_trains_adapters_only_and_the_reference_shares_the_weights(
        self, make_model: Callable[..., Any], batch: SequenceBatch, family: str
    ) -> None:
        plain = CausalLMPolicy(make_model(family), device="cpu").evaluate(batch).logprob.detach()
        policy = self.adapted(make_model, family)
        trained = [name for name, p in policy.named_parameters() if p.requires_grad]
        assert all("lora_" in name or "value_head" in name for name in trained) and trained
        assert torch.allclose(policy.evaluate(batch).logprob, plain, atol=1e-6)  # B starts at 0
        frozen = policy.frozen_copy()
        assert not list(frozen.parameters()) and frozen.model is policy.model
        optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            policy.act(OBS, STREAM)
            descend(policy, optimizer, batch)
            assert stale(policy) < 1e-4 and stale(frozen) < 1e-4
        assert not torch.allclose(policy.evaluate(batch).logprob, plain, atol=1e-3)
        reference = frozen.evaluate(batch).logprob
        assert torch.allclose(reference, plain, atol=1e-6) and not reference.requires_grad
        assert policy.kl(frozen, batch).max() > 0
        assert all(p.requires_grad for name, p in policy.named_parameters() if name in trained)

    def test_saves_merged_weights(
        self, make_model: Callable[..., Any], batch: SequenceBatch, family: str, tmp_path: Path
    ) -> None:
        policy = self.adapted(make_model, family)
        descend(policy, torch.optim.Adam(policy.parameters(), lr=0.05), batch)
        expected = policy.evaluate(batch).logprob
        policy.save_pretrained(tmp_path)
        assert torch.equal(policy.evaluate(batch).logprob, expected)  # saving changed nothing
        loaded = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
        assert torch.allclose(loaded.evaluate(batch).logprob, expected, atol=1e-4)
        plain = CausalLMPolicy(make_model(family), device="cpu").evaluate(batch).logprob
        policy.frozen_copy().save_pretrained(tmp_path)
        loaded = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
        assert torch.allclose(loaded.evaluate(batch).logprob, plain, atol=1e-5)

    def test_the_global_generators_are_left_alone(self, make_model: Callable[..., Any]) -> None:
        model = make_model()
        torch.manual_seed(3)
        before = torch.get_rng_state()
        one = self.adapted(lambda family: model, "llama", seed=1)
        one.frozen_copy()
        assert (torch.get_rng_state() == before).all()
        two = self.adapted(make_model, "llama", seed=1)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_settings(self, make_model: Callable[..., Any]) -> None:
        pytest.importorskip("peft")
        policy = CausalLMPolicy(
            make_model(), device="cpu", lora={"r": 2, "target_modules": ["q_proj"]}
        )
        adapted = {
            n.split(".lora_A")[0].split(".")[-1]
            for n, p in policy.named_parameters()
            if "lora_A" in n
        }
        assert adapted == {"q_proj"}
        with pytest.raises(TypeError, match="lora: expected a rank"):
            CausalLMPolicy(make_model(), device="cpu", lora=True)

    def test_a_missing_peft_is_named(
        self, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r'pip install "textgym\[lora\]"'):
            CausalLMPolicy(make_model(), device="cpu", lora=4)


class TestRandomLm:
    def test_same_seed_same_weights_and_no_global_draw(self, family: str) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        build: Any = lambda seed: random_causal_lm(VOCAB, family=family, seed=seed)  # type: ignore[arg-type] # noqa: E731
        one, two, other = build(1), build(1), build(2)
        assert (torch.get_rng_state() == before).all()
        same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
        assert all(same) and not one.training
        assert not torch.equal(next(one.parameters()), next(other.parameters()))
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight

    def test_shape(self) -> None:
        model: Any = random_causal_lm(
            99, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=50
        )
        assert model.config.num_key_value_heads == 2 and model.config.num_hidden_layers == 3
        assert model.config.intermediate_size == 50
        assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 99)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match='"llama" or "gpt2"'):
            random_causal_lm(9, family="bert")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="multiple of num_heads"):
            random_causal_lm(9, hidden_size=30)
        with pytest.raises(ValueError, match="num_kv_heads"):
            random_causal_lm(9, family="gpt2", num_kv_heads=2)


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device 'cuda:1'.*sees no CUDA GPU"):
        resolve_device("cuda:1")

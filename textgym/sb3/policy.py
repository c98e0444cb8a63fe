"""A Hugging Face causal language model as an actor-critic policy of stable-baselines3.

It is a `CausalLMPolicy` behind SB3's surface: tokens are drawn through the slot cache, one forward
a token, and with a `SequenceRolloutBuffer` an update scores whole sequences, one forward a
sequence.

Shapes: n rows of a call, L columns, M tokens of a minibatch, V vocabulary.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from textgym.episodes import SequenceBatch
from textgym.policies import CausalLMPolicy, random_causal_lm
from textgym.policies.loading import resolve_dtype
from textgym.policies.observation import check_context, read_observation
from textgym.sampling import Method
from textgym.sb3.buffer import SequenceObservations
from textgym.tokens import EMBEDDED, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class CausalLMActorCritic(BasePolicy):
    """What the policies share; mixed into those of SB3 and sb3-contrib.

    Args:
        observation_space: `input_ids` and `length`, as textgym's environments have it.
        action_space: `Discrete(V)`.
        lr_schedule: As in SB3.
        model: A Hugging Face causal LM (object, folder, hub name, folder of a run), or the
            configuration of one, which gets random weights; or a `CausalLMPolicy` that is all set.
            Default: the embedded model where V is its vocabulary, else a small Llama of random
            weights.
        seed: Of random weights, adapters and draws; default `torch.initial_seed()`, which
            `PPO(seed=)` sets.
        temperature: As in `CausalLMPolicy`, like the next four; default: what a saved policy has.
        sampler: `"inverse_cdf"` or `"gumbel"`.
        lora: Rank of adapters, or what `CausalLMPolicy` takes.
        dtype: Of the weights.
        logit_chunk: Tokens whose logits exist at once.
        **others: What SB3's policies take besides; what is about perceptrons must be left out.

    Raises:
        TypeError: The algorithm cannot train on prefixes, or an argument means nothing here.
        ValueError: The spaces are not those of token ids, or the model does not fit them.
    """

    lm: CausalLMPolicy
    action_dist: Any
    _takes_use_sde = True
    _buffer_name = "SequenceRolloutBuffer"

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        model: PreTrainedModel | PretrainedConfig | str | Path | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        sampler: Method | None = None,
        lora: int | Mapping[str, Any] | Any | None = None,
        dtype: str | torch.dtype | None = None,
        logit_chunk: int | None = None,
        **others: Any,
    ) -> None:
        algorithm = _calling_algorithm()
        _check_algorithm(algorithm)
        _check_spaces(observation_space, action_space)
        for name, usual in _USUAL.items():
            if others.setdefault(name, usual) != usual:
                raise TypeError(
                    f"{name}={others[name]!r} means nothing to a language model: leave it out"
                )
        if not self._takes_use_sde:
            del others["use_sde"]
        self._given: dict[str, Any] = {
            "model": model,
            "seed": torch.initial_seed() if seed is None else seed,
            "temperature": temperature,
            "sampler": sampler,
            "lora": lora,
            "dtype": dtype,
            "logit_chunk": logit_chunk,
        }
        super().__init__(observation_space, action_space, lr_schedule, **others)
        self._algorithm = None if algorithm is None else weakref.ref(algorithm)
        if algorithm is not None:
            # `save` writes the arguments beside the weights, which need not be there twice.
            again = {name: value for name, value in self._given.items() if name != "seed"}
            algorithm.policy_kwargs = {**algorithm.policy_kwargs, **again}

    def _build(self, lr_schedule: Schedule) -> None:
        """Load the model and make the optimizer."""
        columns = int(self.observation_space["input_ids"].shape[0])  # type: ignore[index]
        vocab_size = int(self.action_space.n)  # type: ignore[attr-defined]
        given = {name: value for name, value in self._given.items() if value is not None}
        model = given.pop("model", None)
        if model is None:
            model = _default_model(vocab_size, columns, given["seed"])
        elif hasattr(model, "model_type"):
            model = _random_weights(model, given["seed"], given.get("dtype"))
        if isinstance(model, CausalLMPolicy):
            self.lm = _all_set(model, vocab_size, given)
        elif isinstance(model, str | Path):
            self.lm = CausalLMPolicy.from_pretrained(
                model, vocab_size=vocab_size, device="cpu", **given
            )
        else:
            self.lm = CausalLMPolicy(model, vocab_size=vocab_size, device=model.device, **given)
        check_context(columns, self.lm.context_length)
        if not self.lm.is_exact:
            raise ValueError(
                "training needs draws from the whole distribution, got "
                f"{self.lm.sampler}; for greedy text use predict(..., deterministic=True)"
            )
        self._given |= {  # what a folder said too: a loaded policy has no folder to read
            "model": self.lm.config,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "temperature": self.lm.temperature,
            "sampler": self.lm.sampler.method,
            "logit_chunk": self.lm.logit_chunk,
            "lora": given.get("lora") or _adapters(self.lm),
        }
        self.draws = torch.Generator().manual_seed(given["seed"])
        self._rows_of_first_call = 0
        self._warned = False
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = self.optimizer_class(
            trained,
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._given

    def set_training_mode(self, mode: bool) -> None:
        """Note what SB3 is about to do; the model stays in eval mode (see `CausalLMPolicy`)."""
        self.training = mode
        if mode:  # weights are going to change, perhaps in ways that nothing shows (TRPO)
            self.lm.invalidate_cache()

    # ------------------------------------------------------------------------------- acting

    def forward(
        self, obs: Any, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token for each row.

        Returns:
            Actions int64 [n], values float32 [n, 1] and log-probabilities float32 [n].
        """
        n = len(obs["length"])
        streams = torch.randint(2**63 - 1, (n,), generator=self.draws)
        drawn = self.lm.act(
            obs,
            streams.numpy(),
            rows=self._rows(n),
            action_mask=_as_mask(action_masks, n),
            deterministic=deterministic,
        )
        action, value, logprob = (
            torch.from_numpy(x).to(self.device) for x in (drawn.action, drawn.value, drawn.logprob)
        )
        return action, value[:, None], logprob

    def _predict(
        self, observation: Any, deterministic: bool = False, action_masks: Any = None
    ) -> Tensor:
        return self.forward(observation, deterministic, action_masks)[0]

    def _rows(self, n: int) -> NDArray[np.int64]:
        """Slots of the cache: calls of another size, as for evaluation, leave the first's alone."""
        if not self._rows_of_first_call:
            self._rows_of_first_call = n
        begin = 0 if n == self._rows_of_first_call else self._rows_of_first_call
        return np.arange(begin, begin + n)

    # ------------------------------------------------------------------------------- scoring

    def evaluate_actions(
        self, obs: Any, actions: Tensor, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score actions.

        Args:
            obs: A minibatch of `SequenceRolloutBuffer`, one forward a sequence; or M prefixes of a
                stock buffer, one forward a token.
            actions: [M].
            action_masks: Bool [M, V].

        Returns:
            Values float32 [M, 1], log-probabilities [M] and entropies [M].
        """
        if not isinstance(obs, SequenceObservations) and not self._warned:
            self._warned = True
            warnings.warn(
                f"one forward for each of {len(obs['length'])} prefixes: pass rollout_buffer_class="
                f"textgym.sb3.{self._buffer_name} for one forward a sequence (and for episodes "
                "whose reward failed to be left out)",
                UserWarning,
                stacklevel=2,
            )
        batch = self._batch(obs, actions, action_masks)
        scored = self.lm.evaluate(batch, entropy_gradient=self._entropy_is_learned())
        assert scored.value is not None
        return scored.value[:, None], scored.logprob, scored.entropy

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Any:
        """Distributions over the vocabulary, [M, V]; with gradient, one that can be derived twice.

        For TRPO: the whole [M, V] is in memory, several times.
        """
        if isinstance(obs, SequenceObservations) or torch.is_grad_enabled():
            # The fast attention kernels have no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                logits = self.lm.logits(self._batch(obs))
        else:
            logits = self.lm.logits(obs, rows=self._rows(len(obs["length"])))
        found = self.action_dist.proba_distribution(action_logits=logits)
        if action_masks is not None:
            found.apply_masking(action_masks)
        return found

    def predict_values(self, obs: Any) -> Tensor:
        """Values float32 [M, 1]."""
        if isinstance(obs, SequenceObservations) or torch.is_grad_enabled():
            return self.lm.values(self._batch(obs))[:, None]
        return self.lm.values(obs, rows=self._rows(len(obs["length"])))[:, None]

    def _batch(
        self, obs: Any, actions: Tensor | None = None, action_masks: Any = None
    ) -> SequenceBatch:
        """Whole sequences; prefixes become sequences that end with their action."""
        if isinstance(obs, SequenceObservations):
            batch = obs.batch
        else:
            prefixes, length = read_observation(obs, self.lm.vocab_size)
            ids = torch.from_numpy(np.pad(prefixes, ((0, 0), (0, 1))))
            row, col = torch.arange(len(ids)), torch.from_numpy(length)
            ids[row, col] = 0 if actions is None else actions.long().flatten().cpu()
            batch = SequenceBatch(ids, col + 1, row, col)
        if action_masks is None:
            return batch
        return replace(batch, action_mask=_as_mask(action_masks, len(batch.row)))

    def _entropy_is_learned(self) -> bool:
        """Whether the algorithm may want the entropy's gradient, which costs another [M, V]."""
        algorithm = None if self._algorithm is None else self._algorithm()
        return getattr(algorithm, "ent_coef", 1.0) != 0

    # ------------------------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights that transformers can load, the value head and the settings."""
        self.lm.save_pretrained(folder)


class CausalLMActorCriticPolicy(CausalLMActorCritic, ActorCriticPolicy):
    """A causal language model for `PPO`, `A2C` and sb3-contrib's `TRPO`, unchanged.

    Give the algorithm a `SequenceRolloutBuffer` too:
    `PPO(CausalLMActorCriticPolicy, envs, rollout_buffer_class=SequenceRolloutBuffer,
    policy_kwargs={"model": ...}, gamma=1.0)`.
    """


_USUAL: dict[str, Any] = {
    "use_sde": False,
    "net_arch": [],
    "features_extractor_class": CombinedExtractor,
}


def _calling_algorithm() -> BaseAlgorithm | None:
    """The algorithm that is making a policy: SB3 hands it over nowhere."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, BaseAlgorithm):
            return found
        frame = frame.f_back
    return None


def _all_set(lm: CausalLMPolicy, vocab_size: int, given: Mapping[str, Any]) -> CausalLMPolicy:
    """Check a policy that is used as it is."""
    twice = sorted(set(given) - {"seed"})
    if twice:
        raise TypeError(
            f"{', '.join(twice)}: the model is a CausalLMPolicy, which has that already"
        )
    if lm.vocab_size != vocab_size or lm.value_head is None:
        raise ValueError(
            f"the CausalLMPolicy must have {vocab_size} actions and a value head, it has "
            f"{lm.vocab_size} and {'one' if lm.value_head is not None else 'none'}"
        )
    return lm


def _adapters(lm: CausalLMPolicy) -> Any:
    """Configuration of the adapters that a policy came with; None where it has none."""
    configs: Mapping[str, Any] = getattr(lm.model, "peft_config", {})
    return next(iter(configs.values()), None)


def _check_algorithm(algorithm: BaseAlgorithm | None) -> None:
    name = type(algorithm).__name__
    if isinstance(algorithm, OffPolicyAlgorithm):
        raise TypeError(
            f"{name} replays single transitions: each would need a forward over its whole prefix, "
            "and a Q-value for every token; use PPO, A2C, TRPO or MaskablePPO"
        )
    if name == "RecurrentPPO":
        raise TypeError(
            "RecurrentPPO carries hidden states of an LSTM; here the state is the whole prefix and "
            "the slot cache carries it: use PPO"
        )
    normalize = None if algorithm is None else algorithm.get_vec_normalize_env()
    if normalize is not None and normalize.norm_obs:
        raise ValueError("token ids cannot be normalised: use VecNormalize(norm_obs=False)")


def _check_spaces(observation_space: Any, action_space: Any) -> None:
    parts = getattr(observation_space, "spaces", {})
    ids = parts.get("input_ids")
    if not isinstance(action_space, spaces.Discrete) or ids is None or "length" not in parts:
        raise ValueError(
            "expected the spaces of a token environment, Dict(input_ids, length) and Discrete(V), "
            f"got {observation_space} and {action_space}"
        )
    if ids.dtype.kind not in "iu" or len(ids.shape) != 1 or parts["length"].shape != (1,):
        raise ValueError(
            "expected integers input_ids (L,) and length (1,), got "
            f"{ids.dtype} {ids.shape} and {parts['length'].shape}; the state is the whole prefix: "
            "use no VecFrameStack"
        )


def _default_model(vocab_size: int, columns: int, seed: int) -> Any:
    if vocab_size == load_tokenizer().vocab_size:
        warnings.warn("no model given: training the embedded one", UserWarning, stacklevel=2)
        return EMBEDDED
    return random_causal_lm(vocab_size, max_positions=columns, seed=seed)


def _random_weights(config: PretrainedConfig, seed: int, dtype: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made: Any = AutoModelForCausalLM
        model = made.from_config(config, dtype=resolve_dtype(dtype) or torch.float32)
    return model.eval()  # type: ignore[no-any-return]


def _as_mask(action_masks: Any, n: int) -> Tensor | None:
    if action_masks is None:
        return None
    return torch.as_tensor(np.asarray(action_masks)).bool().reshape(n, -1)

"""CausalLMPolicy: a Hugging Face causal language model as a policy with a value head.

The sampler is part of the policy: `act` draws from softmax(logits / temperature) over the tokens that the action mask
allows, and `evaluate` scores exactly that distribution, so the old log-probabilities of a rollout equal recomputed ones.

Shapes: n rows of a call, N slots, L columns, B sequences, T tokens, M action tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from textgym import streams
from textgym.policies.cache_support import make_slot_decoder
from textgym.policies.loading import (
    add_lora,
    context_length,
    is_lora,
    load_model,
    merged,
    resolve_device,
    resolve_dtype,
)
from textgym.policies.logits import LogitHead
from textgym.policies.scoring import divergence, score_tokens
from textgym.policies.slot_cache import SlotDecoder
from textgym.policies.weight_watch import WeightWatch
from textgym.sampling import Method, Sampler, check_action_mask, draw, mask_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from textgym.episodes import SequenceBatch

SETTINGS_FILE = "textgym_policy.json"
VALUE_HEAD_FILE = "value_head.safetensors"


class ActResult(NamedTuple):
    """What `act` chose for n rows."""

    action: NDArray[np.int64]
    """[n] token ids."""
    logprob: NDArray[np.float32]
    """[n] their log-probabilities under the distribution that was sampled, nats."""
    value: NDArray[np.float32]
    """[n] state values; 0 without a value head."""


class Generation(NamedTuple):
    """Responses of n rows; entries at and beyond `count` are 0."""

    tokens: NDArray[np.int64]
    """[n, T] token ids."""
    logprob: NDArray[np.float32]
    """[n, T] log-probabilities, nats."""
    value: NDArray[np.float32]
    """[n, T] values of the states in which the tokens were drawn."""
    count: NDArray[np.int64]
    """[n] number of tokens, the stop id included."""


class Evaluation(NamedTuple):
    """Scores of M action tokens, float32, differentiable."""

    logprob: Tensor
    """[M], nats."""
    value: Tensor | None
    """[M], or None without a value head."""
    entropy: Tensor | None
    """[M], nats, or None when it was not asked for."""


class CausalLMPolicy(nn.Module):
    """A causal language model that acts in token environments.

    Args:
        model: A Hugging Face causal LM, or the folder or hub name of one. An object is moved and used in place.
        vocab_size: V, the number of actions; default all logits. Surplus logits of the model are dropped everywhere.
        device: `"auto"` (CUDA if there is any, else CPU) or a torch device.
        dtype: Of the weights; None keeps an object's own and loads a folder as float32.
        lora: Rank, mapping of `peft.LoraConfig` arguments or `LoraConfig`: train low-rank adapters only.
        temperature: Divides the logits, in sampler and scores alike.
        sampler: `"inverse_cdf"`, `"gumbel"` or `"greedy"`; see `textgym.sampling`.
        top_k: Sample among the k most likely tokens. For play and evaluation only.
        top_p: Sample from the nucleus of probability top_p. For play and evaluation only.
        seed: Part of the key of every draw.
        value_head: Whether to add a linear value head, which starts at zero.
        logit_chunk: How many tokens' logits exist at once in `evaluate` and `kl`.

    Raises:
        ValueError: When the model has fewer logits than `vocab_size`, or a setting makes no sense.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        vocab_size: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        lora: int | Mapping[str, Any] | Any | None = None,
        temperature: float = 1.0,
        sampler: Method = "inverse_cdf",
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        value_head: bool = True,
        logit_chunk: int = 2048,
    ) -> None:
        super().__init__()
        self.sampler = Sampler(sampler, temperature, top_k, top_p)
        self.seed = seed
        self.logit_chunk = logit_chunk
        loaded = load_model(model, resolve_device(device), resolve_dtype(dtype))
        self.model: Any = loaded if lora is None else add_lora(loaded, lora, seed)
        self._adapters_off = False
        core = self._core
        self._head = LogitHead(core)
        self.vocab_size = self._head.size if vocab_size is None else vocab_size
        if not 0 < self.vocab_size <= self._head.size:
            raise ValueError(
                f"vocab_size: expected at most the model's {self._head.size} logits, got {self.vocab_size}; "
                "use the tokenizer that belongs to the model, or resize the model's embeddings"
            )
        self.context_length = context_length(core.config)
        self.value_head: nn.Linear | None = None
        if value_head:
            hidden_size = core.get_output_embeddings().weight.shape[1]
            self.value_head = nn.Linear(hidden_size, 1, device=self.device, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._reset_cache()
        self.eval()

    # ---------------------------------------------------------------- the model and its parts

    @property
    def _core(self) -> Any:
        """The Hugging Face model under any adapters."""
        return self.model.get_base_model() if is_lora(self.model) else self.model

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._core.device  # type: ignore[no-any-return]

    @property
    def temperature(self) -> float:
        """What divides the logits."""
        return self.sampler.temperature

    @property
    def is_exact(self) -> bool:
        """Whether `act` draws from the distribution that `evaluate` scores, as training needs.

        False with greedy, top-k and top-p sampling: after an update the cut may exclude a stored token.
        """
        return self.sampler.is_exact

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: dropout would make the first ratio of PPO differ from 1."""
        return super().train(False)

    @contextmanager
    def _forward_mode(self) -> Iterator[None]:
        """Eval mode, and adapters off in the frozen copy of a LoRA policy."""
        if self._core.training:  # somebody called model.train()
            self.model.eval()
        with self.model.disable_adapter() if self._adapters_off else nullcontext():
            yield

    def _logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits [n, V] of hidden states [n, D]."""
        logits = self._head(hidden)[:, : self.vocab_size].float()
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _values(self, hidden: Tensor) -> Tensor | None:
        if self.value_head is None:
            return None
        value: Tensor = self.value_head(hidden.float())[:, 0]
        return value

    # ---------------------------------------------------------------- acting

    def act(
        self,
        obs: Mapping[str, Any],
        stream: ArrayLike,
        sample_index: ArrayLike = 0,
        *,
        rows: ArrayLike | None = None,
        action_mask: NDArray[np.bool_] | Tensor | None = None,
    ) -> ActResult:
        """Draw one token for each row of an observation.

        Args:
            obs: `input_ids` [n, L] (right-padded) and `length` [n, 1] or [n].
            stream: uint64 [n], the identity of each row's episode (`info["stream"]`).
            sample_index: Number of the sample within its group, [n] or one for all.
            rows: int [n], the slots of the cache that these rows use; default 0 to n - 1. Rows that have finished are
                left out and cost nothing.
            action_mask: Bool [n, V], True where the token is allowed.

        Returns:
            Tokens, log-probabilities and values. The same key (policy seed, stream, sample index, length) gives the
            same token in any batch.

        Raises:
            ValueError: For an observation that does not fit, longer than the context, or a row without allowed token.
            FloatingPointError: When the logits are not finite.
        """
        ids, length = self._unpack(obs)
        slots = self._rows(rows, len(ids))
        key = streams.mix64(self.seed, stream, sample_index, length)
        with torch.inference_mode(), self._forward_mode():
            hidden = self._hidden_last(ids, length, slots)
            action, logprob, value = self._draw(hidden, key, self._mask(action_mask))
            return _to_host(action, logprob, value)

    def generate(
        self,
        obs: Mapping[str, Any],
        stream: ArrayLike,
        sample_index: ArrayLike = 0,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        action_mask: NDArray[np.bool_] | Tensor | None = None,
    ) -> Generation:
        """Write whole responses without an environment: the tokens of a loop of `act` and `step`.

        Args:
            obs: As in `act`.
            stream: As in `act`.
            sample_index: As in `act`.
            max_new_tokens: The longest response.
            stop_ids: Ids that end a response.
            action_mask: Bool [n, V], the same at every step.
        """
        ids, length = self._unpack(obs)
        n = len(ids)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        self._check_context(int(length.max()) + max_new_tokens)
        buffer = np.zeros((n, int(length.max()) + max_new_tokens), np.int64)
        buffer[:, : ids.shape[1]] = ids[:, : buffer.shape[1]]
        mask = self._mask(action_mask)
        stop = np.array(sorted(stop_ids), np.int64)
        stream = np.broadcast_to(np.asarray(stream), (n,))
        sample_index = np.broadcast_to(np.asarray(sample_index), (n,))
        tokens = np.zeros((n, max_new_tokens), np.int64)
        logprob, value = np.zeros((2, n, max_new_tokens), np.float32)
        count = np.zeros(n, np.int64)
        live = np.arange(n)
        with torch.inference_mode(), self._forward_mode():
            for step in range(max_new_tokens):
                now = length[live] + step
                key = streams.mix64(self.seed, stream[live], sample_index[live], now)
                hidden = self._hidden_last(buffer[live], now, live)
                drawn = _to_host(*self._draw(hidden, key, None if mask is None else mask[live]))
                tokens[live, step], logprob[live, step], value[live, step] = drawn
                buffer[live, now] = drawn.action
                count[live] += 1
                live = live[~np.isin(drawn.action, stop)]
                if not len(live):
                    break
        longest = int(count.max())
        return Generation(tokens[:, :longest], logprob[:, :longest], value[:, :longest], count)

    def _draw(
        self, hidden: Tensor, key: NDArray[np.uint64], mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        logits = mask_logits(self._logits(hidden), mask)
        on_device = torch.from_numpy(key.view(np.int64)).to(logits.device)
        action, logprob = draw(logits, on_device, self.sampler)
        value = self._values(hidden)
        return action, logprob, torch.zeros_like(logprob) if value is None else value

    def _unpack(self, obs: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids [n, L] and lengths [n] of an observation, on the host and checked."""
        ids, length = (_host_ints(obs[name]) for name in ("input_ids", "length"))
        length = length.reshape(-1)
        if ids.ndim != 2 or len(ids) != len(length) or not len(ids):
            raise ValueError(
                "obs: expected input_ids [n, L] and length [n, 1] with n >= 1, "
                f"got {list(ids.shape)} and {len(length)} lengths"
            )
        if length.min() < 1 or length.max() > ids.shape[1]:
            raise ValueError(
                f"obs: lengths must lie in 1..{ids.shape[1]} (L), got {length.min()} to {length.max()}"
            )
        self._check_context(ids.shape[1])
        # One pass over all ids, padding included: a padding of -1 is fine in most callers, so it is looked at only then.
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            real = np.arange(ids.shape[1]) < length[:, None]
            if (bad := ids[real & ((ids < 0) | (ids >= self.vocab_size))]).size:
                raise ValueError(
                    f"obs: ids must lie in 0..{self.vocab_size - 1} (V - 1), got {bad[0]}"
                )
        return ids, length

    def _check_context(self, columns: int) -> None:
        if self.context_length is not None and columns > self.context_length:
            raise ValueError(
                f"the model's context holds {self.context_length} tokens, but prompt and response may take {columns}: "
                "lower max_prompt_tokens or max_new_tokens, or use a model with a longer context"
            )

    @staticmethod
    def _rows(rows: ArrayLike | None, n: int) -> NDArray[np.int64]:
        if rows is None:
            return np.arange(n)
        given = np.asarray(rows, np.int64).reshape(-1)
        if len(given) != n or len(np.unique(given)) != n or given.min() < 0:
            raise ValueError(
                f"rows: expected {n} different slots (one a row of obs), got {given.tolist()}"
            )
        return given

    def _mask(self, action_mask: NDArray[np.bool_] | Tensor | None) -> Tensor | None:
        if action_mask is None:
            return None
        return torch.as_tensor(action_mask, device=self.device).bool()

    # ---------------------------------------------------------------- the cache

    def _reset_cache(self) -> None:
        self._watch: WeightWatch | None = None
        self._decoder: SlotDecoder | None = None
        self._no_cache = False

    def _hidden_last(
        self, ids: NDArray[np.int64], length: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Tensor:
        """Hidden state of each row's last token, [n, D]."""
        decoder = self._slot_decoder()
        if decoder is not None:
            return decoder.hidden(ids, length, rows)
        longest = int(length.max())
        inside = np.arange(longest) < length[:, None]
        tokens = torch.from_numpy(np.where(inside, ids[:, :longest], 0)).to(self.device)
        hidden = self._hidden_full(tokens)
        return hidden[torch.arange(len(ids)), torch.from_numpy(length - 1)]

    def _slot_decoder(self) -> SlotDecoder | None:
        if self._no_cache:
            return None
        if self._decoder is None or self._watch is None:
            made = make_slot_decoder(self._core.base_model, self.vocab_size)
            if isinstance(made, str):
                self._no_cache = True
                warnings.warn(
                    f"{type(self._core).__name__} runs without the slot cache, a full forward for every token: {made}",
                    UserWarning,
                    stacklevel=4,
                )
                return None
            self._decoder, self._watch = made, WeightWatch(self.model)
        if self._watch.changed():
            self._decoder.clear()
        return self._decoder

    def _hidden_full(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, D] of right-padded ids [B, T]: causal attention needs no mask to ignore the right."""
        # A mask of ones changes nothing; without one some models look for padding ids and warn.
        mask = torch.ones_like(ids)
        hidden: Tensor = self._core.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden

    def invalidate_cache(self) -> None:
        """Forget all cached keys and values.

        Needed only when weights change in a way that nothing shows: a write through `.data` outside an optimizer, or
        adapters switched by hand.
        """
        if self._decoder is not None:
            self._decoder.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._reset_cache()  # to another device or dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        state = self.__dict__.copy()
        state.update(_watch=None, _decoder=None, _no_cache=False)
        return state

    # ---------------------------------------------------------------- scoring

    def evaluate(self, batch: SequenceBatch, *, entropy: bool = True) -> Evaluation:
        """Score the action tokens of whole sequences in one forward.

        Args:
            batch: Sequences [B, T] with their action tokens (`row` [M], `col` [M]).
            entropy: Whether to compute the entropy.

        Returns:
            Log-probability, value and entropy of each action token.

        Raises:
            ValueError: When the sampler is cut by top-k or top-p (stored tokens may lie outside the cut), or an action
                is forbidden by its mask.
        """
        if self.sampler.truncates:
            raise ValueError(
                "evaluate scores the full distribution, but this policy samples a part of it "
                f"(top_k={self.sampler.top_k}, top_p={self.sampler.top_p}); "
                "leave top_k and top_p to play and evaluation"
            )
        with self._forward_mode():
            hidden, action, mask = self._decisions(batch)
            logprob, h = score_tokens(
                hidden, self._logits, action, mask, entropy=entropy, chunk=self.logit_chunk
            )
            return Evaluation(logprob, self._values(hidden), h)

    @torch.no_grad()
    def kl(self, reference: CausalLMPolicy, batch: SequenceBatch) -> Tensor:
        """Exact divergence KL(pi || reference) of each action token's full distribution.

        The reference gets this policy's temperature and the batch's action mask, so it is 0 for equal weights.

        Returns:
            float32 [M], nats a token, without gradient.
        """
        if reference.vocab_size != self.vocab_size:
            raise ValueError(
                f"reference: expected a vocabulary of {self.vocab_size}, got {reference.vocab_size}"
            )
        with self._forward_mode():
            hidden, _, mask = self._decisions(batch)
        with reference._forward_mode():
            theirs, _, _ = reference._decisions(batch)
        temperature = self.temperature

        def reference_logits(some: Tensor) -> Tensor:
            return reference._head(some)[:, : self.vocab_size].float() / temperature

        return divergence(
            hidden,
            self._logits,
            theirs.to(hidden.device),
            reference_logits,
            mask,
            chunk=self.logit_chunk,
        )

    def _decisions(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states [M, D] from which the action tokens were drawn, their ids [M], and their masks."""
        lengths, row, col = batch.lengths, batch.row, batch.col
        if len(row) and (int(col.min()) < 1 or bool((col >= lengths[row]).any())):
            raise ValueError(
                "batch: action tokens must lie at columns 1..length - 1 of their sequences, "
                f"got columns {int(col.min())} to {int(col.max())}"
            )
        width = int(lengths.max()) if len(lengths) else 0
        self._check_context(width)
        inside = torch.arange(width, device=batch.ids.device) < lengths[:, None].to(
            batch.ids.device
        )
        ids = batch.ids[:, :width].masked_fill(~inside, 0).to(self.device)
        row, col = row.to(self.device), col.to(self.device)
        action = ids[row, col]
        mask = self._mask(batch.action_mask)
        if mask is not None:
            check_action_mask(mask, (len(action), self.vocab_size))
            allowed = mask.gather(1, action[:, None])[:, 0]
            if not bool(allowed.all()):
                j = int((~allowed).nonzero()[0, 0])
                raise ValueError(
                    f"batch: action token {j} (id {int(action[j])}) is forbidden by its action mask"
                )
        return self._hidden_full(ids)[row, col - 1], action, mask

    # ---------------------------------------------------------------- copies and files

    def frozen_copy(self) -> CausalLMPolicy:
        """Give the policy as it is now, without gradients and without value head: the reference of a KL penalty.

        Temperature and vocabulary are kept; top-k, top-p and greedy are not, because a reference scores. With LoRA the
        copy shares the base weights and leaves the adapters off: it is the model before adaptation, at no memory.
        """
        twin = CausalLMPolicy.__new__(CausalLMPolicy)
        nn.Module.__init__(twin)
        exact = self.sampler.method if self.sampler.method != "greedy" else "inverse_cdf"
        twin.sampler = Sampler(exact, self.temperature)
        twin.seed, twin.logit_chunk = self.seed, self.logit_chunk
        twin.vocab_size, twin.context_length = self.vocab_size, self.context_length
        twin.value_head = None
        twin._adapters_off = self._adapters_off or is_lora(self.model)
        if twin._adapters_off:
            # Not registered as a submodule: the copy has no parameters of its own to train, freeze or save.
            object.__setattr__(twin, "model", self.model)
            twin._head = self._head
        else:
            twin.model = copy.deepcopy(self.model).requires_grad_(False)
            twin._head = self._head.of(twin.model)
        twin._reset_cache()
        return twin.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights that `AutoModelForCausalLM.from_pretrained` loads, the value head and the settings.

        Adapters are merged into the weights.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        with self._forward_mode():
            plain = merged(self.model) if not self._adapters_off else self._core
        plain.save_pretrained(folder)
        settings = {
            "vocab_size": self.vocab_size,
            "temperature": self.temperature,
            "sampler": self.sampler.method,
            "top_k": self.sampler.top_k,
            "top_p": self.sampler.top_p,
            "seed": self.seed,
            "logit_chunk": self.logit_chunk,
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if self.value_head is not None:
            weights = {
                k: v.detach().cpu().contiguous() for k, v in self.value_head.state_dict().items()
            }
            save_file(weights, folder / VALUE_HEAD_FILE)
        else:
            (folder / VALUE_HEAD_FILE).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        lora: int | Mapping[str, Any] | Any | None = None,
        value_head: bool = True,
        **settings: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, or any causal LM.

        Args:
            folder: A folder of `save_pretrained`, or a plain model's folder or hub name.
            device: As in the constructor.
            dtype: As in the constructor; None loads float32.
            lora: Adapters to add, as in the constructor.
            value_head: Whether to have a value head; it is restored where the folder holds one, else starts at zero.
            **settings: Constructor arguments that replace the saved ones (`temperature`, `sampler`, `top_k`, `top_p`,
                `seed`, `vocab_size`, `logit_chunk`).
        """
        saved_file = Path(folder) / SETTINGS_FILE
        saved = json.loads(saved_file.read_text(encoding="utf-8")) if saved_file.is_file() else {}
        policy = cls(
            folder,
            device=device,
            dtype=dtype,
            lora=lora,
            value_head=value_head,
            **{**saved, **settings},
        )
        head_file = Path(folder) / VALUE_HEAD_FILE
        if policy.value_head is not None and head_file.is_file():
            from safetensors.torch import load_file

            policy.value_head.load_state_dict(load_file(head_file))
        return policy


def _host_ints(values: Any) -> NDArray[np.int64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"obs: expected integers, got an array of {array.dtype}")
    return array.astype(np.int64, copy=False)


def _to_host(action: Tensor, logprob: Tensor, value: Tensor) -> ActResult:
    """Fetch all three in one transfer (float64 holds ids exactly)."""
    both = torch.stack([action.double(), logprob.double(), value.double()]).cpu().numpy()
    if not np.isfinite(both[1:]).all():
        raise FloatingPointError(
            "the policy's logits or values are not finite: its weights hold NaN or infinity, or overflow in this dtype"
        )
    return ActResult(
        both[0].astype(np.int64), both[1].astype(np.float32), both[2].astype(np.float32)
    )

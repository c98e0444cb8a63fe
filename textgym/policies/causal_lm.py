"""CausalLMPolicy: a Hugging Face causal language model as a policy with a value head.

The sampler is part of the policy: `act` draws from softmax(logits / temperature) over the tokens
that the action mask allows, and `evaluate` scores exactly that distribution, so the old
log-probabilities of a rollout equal recomputed ones.

Shapes: n rows of a call, N slots, L columns, B sequences, T tokens, M action tokens, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from textgym import streams
from textgym.policies.backbone import Backbone
from textgym.policies.generation import write_responses
from textgym.policies.graph_decode import check_cuda_graphs, graphs_for
from textgym.policies.loading import find_model, is_lora, without_adapters
from textgym.policies.observation import (
    check_context,
    read_observation,
    read_rows,
    read_stream,
)
from textgym.policies.results import (
    ActResult,
    Drawn,
    Evaluation,
    Generation,
    to_device,
    to_host,
)
from textgym.policies.saving import read_settings, read_value_head, write_policy
from textgym.policies.scoring import divergence, score_tokens
from textgym.policies.shared_prompts import SharedPrompts
from textgym.sampling import NEG_INF, Method, Sampler, check_action_mask, draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from textgym.episodes import SequenceBatch


class CausalLMPolicy(Backbone):
    """A causal language model that acts in token environments.

    Args:
        model: A Hugging Face causal LM, or the folder or hub name of one. An object is moved and
            used in place; on a CPU its linear layers multiply by oneDNN from then on, and its RMS
            norms have a faster backward pass.
        vocab_size: V, the number of actions; default all logits. Surplus logits of the model are
            dropped everywhere.
        device: `"auto"` (CUDA if there is any, else CPU) or a torch device.
        dtype: Of the weights; None keeps an object's own and loads a folder as float32.
        lora: Rank, mapping of `peft.LoraConfig` arguments or `LoraConfig`: train low-rank adapters
            only.
        temperature: Divides the logits, in sampler and scores alike.
        sampler: `"inverse_cdf"`, `"gumbel"` or `"greedy"`; see `textgym.sampling`.
        top_k: Sample among the k most likely tokens. For play and evaluation only.
        top_p: Sample from the nucleus of probability top_p. For play and evaluation only.
        seed: Part of the key of every draw.
        value_head: Whether to add a linear value head, which starts at zero.
        logit_chunk: How many tokens' probabilities [V] one `evaluate` keeps for the backward pass;
            those of further tokens are computed again. None: as many as 1 GiB holds.
        compute_dtype: `"bfloat16"` lets forwards compute in it: `evaluate` under autocast, `act`
            with a copy of the weights in it. Weights and optimizer keep their dtype. What `act`
            says of a token's log-probability then differs a little from what `evaluate` says.
        gradient_checkpointing: Keep the inputs of layers only and compute the rest again in the
            backward pass (Chen et al. 2016): less memory, about a third more time.
        cuda_graphs: Whether a GPU starts all kernels of a decoding step at once. "auto": where the
            model allows it; "compile": fused by torch.compile first, which takes minutes once. The
            slot cache then keeps its memory while the policy learns.

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
        logit_chunk: int | None = None,
        compute_dtype: str | torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        cuda_graphs: bool | Literal["auto", "compile"] = "auto",
    ) -> None:
        checked = Sampler(sampler, temperature, top_k, top_p)
        if logit_chunk is not None and logit_chunk < 1:
            raise ValueError(f"logit_chunk: expected at least 1 token, got {logit_chunk}")
        super().__init__(
            model,
            vocab_size=vocab_size,
            device=device,
            dtype=dtype,
            lora=lora,
            seed=seed,
            value_head=value_head,
            compute_dtype=compute_dtype,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.sampler = checked
        self.seed = seed
        self.logit_chunk = logit_chunk
        self.cuda_graphs = check_cuda_graphs(cuda_graphs, self.device)

    @property
    def temperature(self) -> float:
        """What divides the logits."""
        return self.sampler.temperature

    @property
    def is_exact(self) -> bool:
        """Whether `act` draws from the distribution that `evaluate` scores, as training needs.

        False with greedy, top-k and top-p sampling: after an update the cut may exclude a stored
        token.
        """
        return self.sampler.is_exact

    @property
    def is_mixed(self) -> bool:
        """Whether `act` and `evaluate` compute in other ways, and so disagree a little."""
        return self.compute_dtype is not None

    def _logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits [n, V] of hidden states [n, D]."""
        return self._tempered(self._raw_logits(hidden))

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits / self.temperature

    # ---------------------------------------------------------------- acting

    def act(
        self,
        obs: Mapping[str, Any],
        stream: ArrayLike,
        sample_index: ArrayLike = 0,
        *,
        rows: ArrayLike | None = None,
        action_mask: NDArray[np.bool_] | Tensor | None = None,
        deterministic: bool = False,
    ) -> ActResult:
        """Draw one token for each row of an observation.

        Args:
            obs: `input_ids` [n, L] (right-padded) and `length` [n, 1] or [n].
            stream: uint64 [n], the identity of each row's episode (`info["stream"]`).
            sample_index: Number of the sample within its group, [n] or one for all.
            rows: int [n], the slots of the cache that these rows use; default 0 to n - 1. Rows that
                have finished are left out and cost nothing.
            action_mask: Bool [n, V], True where the token is allowed.
            deterministic: Take the most likely token, whatever the sampler.

        Returns:
            Tokens, log-probabilities and values. The same key (policy seed, stream, sample index,
            length) gives the same token in any batch.

        Raises:
            ValueError: For an observation that does not fit, longer than the context, or a row
                without allowed token.
            FloatingPointError: When the logits are not finite.
        """
        ids, length = self._read(obs)
        slots = read_rows(rows, len(ids))
        stream = read_stream(stream, len(ids))
        sample_index = read_stream(sample_index, len(ids), "sample_index")
        sampler = Sampler("greedy", self.temperature) if deterministic else self.sampler
        with torch.inference_mode(), self._forward_mode():
            mask = self._mask(action_mask, len(ids))
            graphs = graphs_for(self, sampler, slots, ids.shape[1])
            if graphs is not None:
                return graphs.act(ids, length, slots, stream, sample_index, mask, sampler)
            hidden = self._hidden_last(ids, length, slots)
            key = streams.mix64(self.seed, stream, sample_index, length)
            keys = to_device(key.view(np.int64), hidden.device)
            drawn = to_host([self._draw(hidden, keys, mask, sampler)])
        return ActResult(drawn.action[0], drawn.logprob[0], drawn.value[0])

    def generate(
        self,
        obs: Mapping[str, Any],
        stream: ArrayLike,
        sample_index: ArrayLike = 0,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        action_mask: NDArray[np.bool_] | Tensor | None = None,
        num_rows: int | None = None,
    ) -> Generation:
        """Write whole responses without an environment: the tokens of a loop of `act` and `step`.

        Args:
            obs: As in `act`.
            stream: As in `act`.
            sample_index: As in `act`.
            max_new_tokens: The longest response.
            stop_ids: Ids that end a response.
            action_mask: Bool [n, V], the same at every step.
            num_rows: How many responses are written at once; where one ends, the next begins. None:
                all.
        """
        ids, length = self._read(obs)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        if num_rows is not None and num_rows < 1:
            raise ValueError(f"num_rows: expected at least 1, got {num_rows}")
        check_context(int(length.max()) + max_new_tokens, self.context_length)
        with torch.inference_mode(), self._forward_mode():
            return write_responses(
                self,
                ids,
                length,
                read_stream(stream, len(ids)),
                read_stream(sample_index, len(ids), "sample_index"),
                max_new_tokens,
                stop_ids,
                self._mask(action_mask, len(ids)),
                num_rows,
            )

    def _draw(
        self, hidden: Tensor, key: Tensor, mask: Tensor | None, sampler: Sampler | None = None
    ) -> Drawn:
        """Draw from the distribution after each hidden state [n, D], with keys int64 [n]."""
        logits = self._tempered(self._acting_logits(hidden))
        if mask is not None:
            logits = logits.masked_fill(~mask, NEG_INF)
        action, logprob = draw(logits, key, sampler or self.sampler)
        value = self._values(hidden)
        return Drawn(action, logprob, torch.zeros_like(logprob) if value is None else value)

    def _read(self, obs: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, length = read_observation(obs, self.vocab_size)
        check_context(ids.shape[1], self.context_length)
        return ids, length

    def _mask(self, action_mask: NDArray[np.bool_] | Tensor | None, n: int) -> Tensor | None:
        """Give the mask of n rows on the device; it is looked at where it lies, usually the host.

        Raises:
            ValueError: Its shape is another, or a row allows no token.
        """
        if action_mask is None:
            return None
        mask = torch.as_tensor(action_mask).bool()
        check_action_mask(mask, (n, self.vocab_size))
        return mask.to(self.device, non_blocking=True)

    # ---------------------------------------------------------------- scoring

    def logits(
        self, where: Mapping[str, Any] | SequenceBatch, *, rows: ArrayLike | None = None
    ) -> Tensor:
        """Tempered logits of states, float32 [n, V].

        Args:
            where: An observation as in `act` (through the cache, without gradient), or sequences
                as in `evaluate`: the states in which their action tokens were drawn
                (differentiable; all [M, V] logits exist at once).
            rows: As in `act`, for an observation.
        """
        with self._forward_mode():
            return self._logits(self._states(where, rows))

    def values(
        self, where: Mapping[str, Any] | SequenceBatch, *, rows: ArrayLike | None = None
    ) -> Tensor:
        """Values of states, float32 [n].

        Args:
            where: As in `logits`.
            rows: As in `act`, for an observation.

        Raises:
            ValueError: The policy has no value head.
        """
        with self._forward_mode():
            found = self._values(self._states(where, rows))
        if found is None:
            raise ValueError("this policy has no value head: make it with value_head=True")
        return found

    def _states(self, where: Mapping[str, Any] | SequenceBatch, rows: ArrayLike | None) -> Tensor:
        """Hidden states [n, D] of an observation, or [M, D] of the decisions in sequences."""
        if not isinstance(where, Mapping):
            return self._decisions(where)[0]
        ids, length = self._read(where)
        with torch.no_grad():
            hidden = self._hidden_last(ids, length, read_rows(rows, len(ids)))
        return hidden.clone()  # those of the cache may not take part in a computation of gradients

    def evaluate(
        self, batch: SequenceBatch, *, entropy: bool = True, entropy_gradient: bool = True
    ) -> Evaluation:
        """Score the action tokens of whole sequences in one forward.

        Args:
            batch: Sequences [B, T] with their action tokens (`row` [M], `col` [M]).
            entropy: Whether to compute the entropy.
            entropy_gradient: Whether the entropy is differentiable; one that is only logged need
                not be, and keeps nothing for the backward pass then.

        Returns:
            Log-probability, value and entropy of each action token.

        Raises:
            ValueError: When the sampler is cut by top-k or top-p (stored tokens may lie outside the
                cut), or an action is forbidden by its mask.
        """
        if self.sampler.truncates:
            raise ValueError(
                "evaluate scores the full distribution, but this policy samples a part of it "
                f"(top_k={self.sampler.top_k}, top_p={self.sampler.top_p}); "
                "leave top_k and top_p to play and evaluation"
            )
        with self._forward_mode():
            hidden, action, mask = self._decisions(batch, share=True)
            logprob, h = score_tokens(
                hidden,
                self._all_logits,
                action,
                mask,
                vocab_size=self.vocab_size,
                temperature=self.temperature,
                entropy=entropy,
                entropy_gradient=entropy_gradient,
                kept=self.logit_chunk,
            )
            return Evaluation(logprob, self._values(hidden), h)

    @torch.no_grad()
    def logprob(self, ids: ArrayLike, lengths: ArrayLike) -> NDArray[np.float32]:
        """Log-probability of every token of whole sequences, as `ReferenceLogProb` asks for it.

        Args:
            ids: int64 [B, T], right-padded.
            lengths: int64 [B].

        Returns:
            float32 [B, T], log pi(ids[b, t] | ids[b, :t]) in nats; 0 in column 0 and in padding.
        """
        from textgym.episodes import SequenceBatch

        tokens = torch.as_tensor(np.asarray(ids, np.int64))
        ends = torch.as_tensor(np.asarray(lengths, np.int64))
        columns = torch.arange(tokens.shape[1])
        row, col = torch.nonzero((columns >= 1) & (columns < ends[:, None]), as_tuple=True)
        scored = self.evaluate(SequenceBatch(tokens, ends, row, col), entropy=False)
        found = np.zeros(tokens.shape, np.float32)
        found[row.numpy(), col.numpy()] = scored.logprob.float().cpu().numpy()
        return found

    @torch.no_grad()
    def kl(self, reference: CausalLMPolicy, batch: SequenceBatch) -> Tensor:
        """Exact divergence KL(pi || reference) of each action token's full distribution.

        The reference gets this policy's temperature and the batch's action mask, so it is 0 for
        equal weights.

        Returns:
            float32 [M], nats a token, without gradient.
        """
        if reference.vocab_size != self.vocab_size:
            raise ValueError(
                f"reference: expected a vocabulary of {self.vocab_size}, got {reference.vocab_size}"
            )
        with self._forward_mode():
            hidden, _, mask = self._decisions(batch, share=True)
        with reference._forward_mode():
            theirs, _, _ = reference._decisions(batch, share=True)
        temperature = self.temperature

        def reference_logits(some: Tensor) -> Tensor:
            return reference._raw_logits(some) / temperature

        return divergence(
            hidden,
            self._logits,
            theirs.to(hidden.device),
            reference_logits,
            mask,
            vocab_size=self.vocab_size,
        )

    def _decisions(
        self, batch: SequenceBatch, *, share: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the action tokens were drawn (hidden states [M, D]), their ids [M], their masks.

        With `share`, prompts that several sequences begin with are computed once where that pays.
        """
        lengths, row, col = batch.lengths, batch.row, batch.col
        if len(row) and (int(col.min()) < 1 or bool((col >= lengths[row]).any())):
            raise ValueError(
                "batch: action tokens must lie at columns 1..length - 1 of their sequences, "
                f"got columns {int(col.min())} to {int(col.max())}"
            )
        width = int(lengths.max()) if len(lengths) else 0
        check_context(width, self.context_length)
        inside = torch.arange(width, device=batch.ids.device) < lengths[:, None]
        ids = batch.ids[:, :width].masked_fill(~inside, 0)
        action, mask = ids[row, col], batch.action_mask
        if mask is not None:
            check_action_mask(mask, (len(action), self.vocab_size))
            allowed = mask.gather(1, action[:, None])[:, 0]
            if not bool(allowed.all()):
                j = int((~allowed).nonzero()[0, 0])
                raise ValueError(
                    f"batch: action token {j} (id {int(action[j])}) is forbidden by its action mask"
                )
            mask = mask.to(self.device, non_blocking=True)
        split = SharedPrompts.of(batch) if share else None
        if split is not None and not self._shares_prompts():
            split = None
        # All of it was looked at where it lay, on the host: nothing waits for an accelerator.
        row, before, action = (x.to(self.device, non_blocking=True) for x in (row, col - 1, action))
        if split is not None:
            return self._hidden_after(split, row, before), action, mask
        ids = ids[:, : max(1, width - 1)]  # nothing was drawn after the last token
        hidden = self._hidden_all(ids.to(self.device, non_blocking=True))
        return hidden[row, before], action, mask

    # ---------------------------------------------------------------- copies and files

    def frozen_copy(self) -> CausalLMPolicy:
        """Give the policy as it is now without gradients and value head: a KL penalty's reference.

        Temperature and vocabulary are kept; top-k, top-p and greedy are not, because a reference
        scores. With LoRA the copy shares the base weights and leaves the adapters off: it is the
        model before adaptation, at no memory.
        """
        twin = CausalLMPolicy.__new__(CausalLMPolicy)
        nn.Module.__init__(twin)
        exact = self.sampler.method if self.sampler.method != "greedy" else "inverse_cdf"
        twin.sampler = Sampler(exact, self.temperature)
        twin.seed, twin.logit_chunk = self.seed, self.logit_chunk
        twin.vocab_size, twin.context_length = self.vocab_size, self.context_length
        twin.compute_dtype, twin.gradient_checkpointing = self.compute_dtype, False
        twin.cuda_graphs = self.cuda_graphs
        twin.value_head = None
        twin._adapters_off = self._adapters_off or is_lora(self.model)
        if twin._adapters_off:
            # Not registered as a submodule: the copy has no parameters of its own to train, freeze
            # or save.
            object.__setattr__(twin, "model", self.model)
            twin._head = self._head
        else:
            twin.model = copy.deepcopy(self.model).requires_grad_(False)
            twin._head = self._head.of(twin.model)
        twin._reset_cache()
        return twin.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights that transformers can load, the value head and the settings.

        Adapters are merged into the weights.
        """
        settings = {
            "vocab_size": self.vocab_size,
            "temperature": self.temperature,
            "sampler": self.sampler.method,
            "top_k": self.sampler.top_k,
            "top_p": self.sampler.top_p,
            "seed": self.seed,
            "logit_chunk": self.logit_chunk,
        }
        plain = without_adapters(self.model, merge=not self._adapters_off)
        write_policy(Path(folder), plain, self.value_head, settings)

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
            folder: A folder of `save_pretrained` or of a run (its best checkpoint), a plain model's
                folder or hub name, or "embedded".
            device: As in the constructor.
            dtype: As in the constructor; None loads float32.
            lora: Adapters to add, as in the constructor.
            value_head: Whether to have a value head; it is restored where the folder holds one,
                else starts at zero.
            **settings: Constructor arguments that replace the saved ones (`temperature`, `sampler`,
                `top_k`, `top_p`, `seed`, `vocab_size`, `logit_chunk`).

        Raises:
            ValueError: There is no such folder, or it holds neither a model nor a run.
            OSError: There is no such model.
        """
        folder = find_model(str(folder))
        settings = {**read_settings(folder), **settings}
        policy = cls(
            folder, device=device, dtype=dtype, lora=lora, value_head=value_head, **settings
        )
        if policy.value_head is not None:
            read_value_head(folder, policy.value_head)
        return policy

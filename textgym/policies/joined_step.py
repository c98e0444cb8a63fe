"""A decoding step of a Llama-like model on a CPU, in fewer and larger operations.

Most of a small model's step goes into starting its operations and into the Python between them.
Here queries, keys and values are one product, and so are both halves of the gated MLP; the gains of
the norms and the scale of the queries are in the joined weights, and rotations come from a table.
Keys and values are those that the model would have written, up to rounding.

Shapes: n rows, H query heads, G key-value heads of size d, D hidden size, C columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import SiLUActivation

from textgym.policies.cpu_attention import attend
from textgym.policies.cpu_linear import SMALLEST_AGAIN, OneDNNLinear, has_onednn, product
from textgym.policies.slot_store import Plan, SlotStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = {"LlamaModel", "MistralModel", "Qwen2Model"}
"""Models whose step this is, where a trial run agrees (see `cache_support`)."""
LARGEST = 1 << 27
"""Bytes of joined weights; beyond it products take so long that nothing else matters."""
_SILU = (nn.SiLU, SiLUActivation)
_LINEARS = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
_ALONE = {"self_attn.o_proj", "mlp.down_proj"}
_NORMS = {"input_layernorm", "post_attention_layernorm"}


class _Layer(NamedTuple):
    """Weights [out, in] of one layer, each with its bias [out] or None."""

    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    floors: tuple[Tensor, Tensor]
    """Of the norms before attention and MLP, see `_normed`."""


class JoinedStep:
    """The step of one model over the tensors of its slot cache.

    Args:
        base: The model without its head, one that `fits`.
        store: Where its keys and values are.
    """

    def __init__(self, base: PreTrainedModel, store: SlotStore) -> None:
        config: Any = base.config
        self.base: Any = base
        self.store = store
        self.heads: int = config.num_attention_heads
        self.groups: int = config.num_key_value_heads
        self.size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self._layers: list[_Layer] = []  # none: not joined yet
        self._fields: list[dict[str, Any]] = []  # of all modules; none: not looked at yet
        self.forget()

    @staticmethod
    def fits(base: PreTrainedModel) -> bool:
        """Whether this is the step of such a model, as far as its parts tell.

        Every part that is passed by must be the plain one: an adapter that starts at zero shows in
        no trial run.
        """
        if type(base).__name__ not in FAMILIES or base.device.type not in ("cpu", "meta"):
            return False
        if base.dtype not in (torch.float32, torch.bfloat16):
            return False  # in float64 the model's own norms compute in float32
        config: Any = base.config
        if config.hidden_act not in ("silu", "swish"):
            return False
        layers: Any = base.layers
        if type(base.embed_tokens) is not nn.Embedding or len(layers) != config.num_hidden_layers:
            return False
        joined = 0
        norm = type(base.norm)
        for layer in layers:
            if any(type(getattr(layer, name, None)) is not norm for name in _NORMS):
                return False
            if type(getattr(layer.mlp, "act_fn", None)) not in _SILU:
                return False
            linears = {n: m for n, m in layer.named_modules() if n in _LINEARS}
            if any(type(m) not in (nn.Linear, OneDNNLinear) for m in linears.values()):
                return False  # adapters, quantised weights
            owners = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
            if linears.keys() != _LINEARS or owners != _LINEARS | _NORMS:
                return False
            joined += sum(m.weight.nbytes for n, m in linears.items() if n not in _ALONE)
        return joined <= LARGEST

    @property
    def applies(self) -> bool:
        """Whether the model still is one that fits, and nobody looks into the modules passed by."""
        if not self._fields:
            base = self.base
            self._fits = self.fits(base)
            self._fields = [vars(module) for module in base.modules()]
            kinds = "_forward_hooks", "_forward_pre_hooks"
            self._hooks = [fields[kind] for fields in self._fields for kind in kinds]
            on_cpu = base.dtype == torch.float32 and base.device.type == "cpu"
            self._onednn = on_cpu and has_onednn()
        watched = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        return (
            self._fits
            and not watched
            and not any(self._hooks)
            and not any("forward" in fields for fields in self._fields)
        )

    def forget(self) -> None:
        """Free the joined weights; look at the model again before the next step."""
        self._layers, self._fields = [], []
        self._table = torch.empty(0)  # [2, C, d], cosines and signed sines

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        """Forward one token a row.

        Args:
            tokens: int64 [n].
            plan: Where its keys and values go, and what is attended to.

        Returns:
            Hidden states [n, D].
        """
        if not self._layers:
            self._layers = [_joined(layer) for layer in self.base.layers]
            self._gain, self._floor = _gain_floor(self.base.norm)
        base, n = self.base, len(tokens)
        cos, sin, unseen = self._places(plan)
        turned = self.heads + self.groups
        x = nn.functional.embedding(tokens, base.embed_tokens.weight)
        for layer, held in zip(self._layers, self.store.slot_layers, strict=True):
            qkv = self._product(_normed(x, layer.floors[0]), *layer.qkv)
            qkv = qkv.view(n, turned + self.groups, self.size)
            qk = qkv[:, :turned]
            qk = torch.addcmul(qk * cos, qk.roll(self.size // 2, -1), sin)
            keys, values = held.update(qk[:, self.heads :, None], qkv[:, turned:, None])
            query = qk[:, : self.heads].reshape(n, self.groups, -1, self.size)
            seen = attend(query, keys, values, unseen).view(n, -1)
            x = self._product(seen, *layer.out, residual=x)
            gated = self._product(_normed(x, layer.floors[1]), *layer.gate_up)
            gate, up = gated.chunk(2, -1)
            x = self._product(nn.functional.silu(gate).mul_(up), *layer.down, residual=x)
        out: Tensor = _normed(x, self._floor).mul_(self._gain)
        return out

    def _product(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        if self._onednn and rows.numel() * len(weight) >= SMALLEST_AGAIN:
            out = product(rows, weight, bias)
        else:
            out = nn.functional.linear(rows, weight, bias)
        return out if residual is None else out.add_(residual)

    def _places(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines of the rows' positions, and which columns they do not see."""
        if self._table.shape[1:2] != (self.store.num_columns,):
            self._turn()
        if plan.column is not None:
            cos, sin = self._table[:, plan.column]
            return cos, sin, None
        # As in the full forward, padding beyond the last column turns as if it were there.
        cos, sin = self._table[:, plan.pos.clamp(max=self.store.num_columns - 2)]
        columns = torch.arange(plan.kv, device=plan.pos.device)
        return cos, sin, columns > plan.pos[:, :, None, None]

    def _turn(self) -> None:
        """Make the table of rotations for all columns of the store.

        Su et al. 2021, "RoFormer", equation 34, with the halves of a head in the places of even and
        odd components: x cos + roll(x) sin, where the sines of the first half are negative.
        """
        weight = self.base.embed_tokens.weight
        columns = torch.arange(self.store.num_columns, device=weight.device)
        cos, sin = self.base.rotary_emb(weight, position_ids=columns[None])
        sign = torch.ones_like(sin[0])
        sign[:, : self.size // 2] = -1
        self._table = torch.stack([cos[0], sin[0] * sign])


def _joined(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    before, floor_before = _gain_floor(layer.input_layernorm)
    between, floor_between = _gain_floor(layer.post_attention_layernorm)
    return _Layer(
        qkv=_stacked(
            (attention.q_proj, attention.scaling),
            (attention.k_proj, 1.0),
            (attention.v_proj, 1.0),
            gain=before,
        ),
        out=(attention.o_proj.weight, attention.o_proj.bias),
        gate_up=_stacked((mlp.gate_proj, 1.0), (mlp.up_proj, 1.0), gain=between),
        down=(mlp.down_proj.weight, mlp.down_proj.bias),
        floors=(floor_before, floor_between),
    )


def _stacked(*linears: tuple[Any, float], gain: Tensor) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for several layers of one input, each scaled; `gain` [in] scales it."""
    weight = torch.cat([linear.weight * (gain * scale) for linear, scale in linears])
    if all(linear.bias is None for linear, _ in linears):
        return weight, None
    parts = [
        linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias * scale
        for linear, scale in linears
    ]
    return weight, torch.cat(parts)


def _gain_floor(norm: Any) -> tuple[Tensor, Tensor]:
    """What `_normed` leaves out of a norm, and what it needs of it: [D] and float32 [1, 1].

    The root of the width is among the former in float32, which saves an operation a norm; bfloat16
    would round it, and with it the size of every row.
    """
    weight: Tensor = norm.weight
    root = math.sqrt(len(weight)) if weight.dtype == torch.float32 else 1.0
    floor = root * math.sqrt(norm.variance_epsilon)
    return weight * root, weight.new_full((1, 1), floor, dtype=torch.float32)


def _normed(x: Tensor, floor: Tensor) -> Tensor:
    """Rows [n, D] over sqrt(mean(x^2) + eps), the norm of Zhang and Sennrich 2019 without its gain.

    Args:
        x: The rows. In float32 they are divided by the root of D as well.
        floor: sqrt(eps), in float32 times the root of D; [1, 1].
    """
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    if x.dtype != torch.float32:
        size.mul_(x.shape[-1] ** -0.5)
    return (x / size.hypot_(floor)).to(x.dtype)

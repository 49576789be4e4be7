"""A linear layer on AWQ GEMM tensors, which stay exactly as the checkpoint has them.

The backend of the input's device multiplies, from a copy packed at the first forward. Independent of transformers.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squawq.backends import backend_for
from squawq.backends.layer_ops import Packed
from squawq.errors import KernelError
from squawq.format.groupwise import PER_WORD, dequantize_gemm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_numbers = count()
_owners: WeakValueDictionary[int, AwqLinear] = WeakValueDictionary()


def plain(x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., in] times the dequantized weight plus bias, in x's dtype: torch alone, seen by autograd and compile."""
    weight = dequantize_gemm(qweight, scales, qzeros, x.dtype)
    return F.linear(x, weight.T, None if bias is None else bias.to(x.dtype))


class AwqLinear(nn.Module):
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] or None for zeros of 8, scales [groups, out].

    If a tensor changes (loading, `to`, a shard of tensor parallelism), the next forward packs again.

    order: int64 [in], the activations' order (GPTQ's activation order), or None.

    Args:
        zeros: Whether there are qzeros.
        bias, scales: dtypes; None for no bias.
        exact: Multiply float32 activations.
        backend: A name in `squawq.backends.BACKENDS`; None chooses by the input's device.
    """

    order: Tensor | None
    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism hands `forward` local shards

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: int,
        *,
        zeros: bool = True,
        bias: torch.dtype | None = None,
        scales: torch.dtype = torch.float16,
        exact: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group, self.exact = in_features, out_features, group, exact
        words, groups = out_features // PER_WORD, in_features // group
        self.qweight = _frozen(in_features, words, dtype=torch.int32)
        self.scales = _frozen(groups, out_features, dtype=scales)
        self.qzeros = _frozen(groups, words, dtype=torch.int32) if zeros else None
        self.bias = None if bias is None else _frozen(out_features, dtype=bias)
        self.register_buffer("order", None, persistent=False)
        self.backend = backend
        self._plain = [kind for kind in ("cpu", "cuda", "mps", "xpu") if backend_for(kind, backend).traceable]
        self._adopt()

    def _adopt(self) -> None:
        """A number by which the operator finds this layer, and no packed weight yet."""
        self._number = next(_numbers)
        self._packed: tuple[Any, Packed] | None = None
        _owners[self._number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_packed", "_number")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._adopt()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[..., self.order]
        tensors = self.qweight, self.scales, self.qzeros, self.bias
        if x.device.type in self._plain or x.dtype not in FLOATS or _offloaded(self):
            return plain(x, *tensors)
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            product: Tensor = _operator(x, *tensors, self._number)
            return product
        return self.multiply(x, *tensors)

    def multiply(
        self, x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The backend's product; packs the weight first if the tensors have changed."""
        backend = backend_for(x.device, self.backend, exact=self.exact)
        state = tuple(map(_identity, (qweight, scales, qzeros, bias)))
        kept = self._packed  # read once: another thread may be packing
        if kept is None or kept[0] != state:
            kept = self._packed = None  # let the old one go first
            out, in_features = scales.shape[1], qweight.shape[0]
            packed = backend.pack_int4(out, in_features, self.group, [(qweight, scales, qzeros)], bias)
            self._packed = kept = state, packed
        return backend.matmul(x, kept[1])


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter rather than a buffer: tensor parallelism and offloading know only those."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the tensors for each forward: a packed copy would then keep what it takes away."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def _identity(tensor: Tensor | None) -> tuple[int, int] | None:
    """Changes when the tensor is replaced or written to; tensors of inference mode count no writes."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


@torch.library.custom_op("squawq::awq_linear", mutates_args=())
def _operator(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, bias: Tensor | None, number: int
) -> Tensor:
    """AwqLinear as one operator, for torch.compile and autograd. number: the layer's, which keeps the packed weight."""
    return _owners[number].multiply(x, qweight, scales, qzeros, bias)


@_operator.register_fake
def _(x: Tensor, qweight: Tensor, scales: Tensor, *_rest: Any) -> Tensor:
    if x.shape[-1] != qweight.shape[0]:
        raise KernelError(f"activations have shape {tuple(x.shape)}; [..., {qweight.shape[0]}] is needed")
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch names them)
    ctx.save_for_backward(*inputs[1:4])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The weight is frozen: only the input has a gradient."""
    qweight, scales, qzeros = ctx.saved_tensors
    return F.linear(gradient, dequantize_gemm(qweight, scales, qzeros, gradient.dtype)), None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)

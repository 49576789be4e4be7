"""INT4 linears of vLLM's models on our CPU kernels. Imported in vLLM's processes alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import CPUWNA16LinearKernel, MPLinearKernel
from vllm.scalar_type import scalar_types

from squawq.backends import backend_class, backend_for
from squawq.backends.base import Gemm
from squawq.backends.layer_ops import Packed
from squawq.format.groupwise import PER_WORD, pack

EXACT = "SQUAWQ_VLLM_EXACT"  # 1: float32 activations instead of int8 ones
GROUP = 16  # groups of a multiple of so many inputs have native kernels
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STEP_COLUMNS = 1024  # output channels that are repacked at a time
STANDARD = tuple(range(PER_WORD))  # nibble i of a word is value i

_numbers = count()
_kernels: WeakValueDictionary[int, SquawqInt4LinearKernel] = WeakValueDictionary()


def unpack_inputs(words: Tensor) -> Tensor:
    """Words along the inputs, as GPTQ has them: int32 [in / 8, out] -> uint8 [in, out]."""
    nibbles = torch.stack([(words >> (4 * nibble) & 15).to(torch.uint8) for nibble in STANDARD], dim=1)
    return nibbles.view(-1, words.shape[1])


def unpack_outputs(words: Tensor) -> Tensor:
    """Words along the outputs in standard order: int32 [groups, out / 8] -> uint8 [groups, out]."""
    nibbles = torch.stack([(words >> (4 * nibble) & 15).to(torch.uint8) for nibble in STANDARD], dim=2)
    return nibbles.view(words.shape[0], -1)


class SquawqInt4LinearKernel(MPLinearKernel):  # type: ignore[misc]
    """Linears with 4-bit integers in groups: AWQ, symmetric GPTQ, and compressed-tensors of 4 bits.

    Weights are packed once for our kernels, and vLLM's tensors freed. Activations are rounded to int8 unless
    SQUAWQ_VLLM_EXACT is 1. Sums are float32; inputs, outputs and scales have vLLM's dtype.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    others: ClassVar[Sequence[type[Any]]] = ()  # vLLM's kernels, where it is to choose between these and ours

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        in_features, out_features = c.partition_weight_shape
        group = in_features if c.group_size == -1 else c.group_size
        reason = backend_class("cpu").declines(torch.device("cpu"))
        if reason is None and c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8):
            reason = f"weights are {c.weight_type}, not 4-bit integers"
        if reason is None and c.act_type not in FLOATS:
            reason = f"activations are {c.act_type}"
        if reason is None and (group % GROUP or in_features % group or out_features % PER_WORD):
            reason = f"[{out_features}, {in_features}] in groups of {group} does not fit squawq's kernels"
        if reason is None and (better := cls._better(c)):
            reason = f"{better} runs it, and SQUAWQ_VLLM_KERNEL is not always"
        return reason is None, reason

    @classmethod
    def _better(cls, c: Any) -> str | None:
        """The first of `others` that runs the layer here, unless ours is known to be faster: than
        CPUWNA16LinearKernel on an x86 without AMX. Others were not measured."""
        for other in cls.others:
            if other is CPUWNA16LinearKernel and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
                continue  # vLLM's library for x86 without AVX-512, and for Arm
            if other.can_implement(c)[0]:
                measured = other is CPUWNA16LinearKernel and not torch.cpu._is_amx_tile_supported()
                instructions = backend_for("cpu", "cpu").describe()["instructions"]
                return None if measured and instructions == "avx512" else other.__name__
        return None

    def __init__(self, *args: Any, **names: Any) -> None:
        super().__init__(*args, **names)
        self.backend = backend_for("cpu", "cpu", exact=os.environ.get(EXACT) == "1")
        self.number = next(_numbers)  # by which the operator finds it; the same in each run of a model
        self.packed: Packed | None = None
        _kernels[self.number] = self

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the layer's tensors and free them. They are as vLLM's own CPU kernel takes them."""
        threads = torch.get_num_threads()
        if not self.backend.use_openmp(threads):  # which vLLM binds to the worker's cores
            self.backend.set_threads(threads)
        qweight, scales, zeros = self._get_weight_params(layer)
        words = qweight.data.t() if qweight.input_dim == 1 else qweight.data  # [in / 8, out]
        scale = scales.data.t() if scales.output_dim == 0 else scales.data  # [groups, out]
        zero = None
        if self.config.zero_points and zeros is not None:
            zero = zeros.data.t() if zeros.output_dim == 0 else zeros.data  # [groups, out / 8]
        out, in_features = words.shape[1], words.shape[0] * PER_WORD

        def parts() -> Any:
            for start in range(0, out, STEP_COLUMNS):
                columns = slice(start, min(start + STEP_COLUMNS, out))
                yield self._gemm(words, scale, zero, columns)

        self.packed = self.backend.pack_int4(out, in_features, in_features // scale.shape[0], parts())
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            tensor = getattr(layer, name or "", None)
            if tensor is not None:
                setattr(layer, name, nn.Parameter(tensor.data.new_empty(0), requires_grad=False))

    @staticmethod
    def _gemm(words: Tensor, scales: Tensor, zeros: Tensor | None, columns: slice) -> Gemm:
        """Some output channels as AWQ GEMM tensors."""
        packed_columns = slice(columns.start // PER_WORD, columns.stop // PER_WORD)
        return (
            pack(unpack_inputs(words[:, columns])),
            scales[:, columns],
            None if zeros is None else pack(unpack_outputs(zeros[:, packed_columns])),
        )

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in] -> x @ weight.T [..., out], in x's dtype."""
        assert self.packed is not None, "weights are packed after loading"
        return self.backend.matmul(x, self.packed)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG002
        out = self.config.partition_weight_shape[1]
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.squawq.vllm_linear(x, self.number, out)
        else:
            y = self.multiply(x)
        return y if bias is None else y + bias


def _linear(x: Tensor, number: int, out: int) -> Tensor:  # noqa: ARG001
    return _kernels[number].multiply(x)


def _shape(x: Tensor, number: int, out: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], out)


# One operator for torch.compile; torch.library.custom_op would add autograd's dispatch to every call.
_library: Any = torch.library.Library("squawq", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("vllm_linear(Tensor x, int number, int out) -> Tensor")
_library.impl("vllm_linear", _linear, "CPU")
torch.library.register_fake("squawq::vllm_linear", _shape, lib=_library)

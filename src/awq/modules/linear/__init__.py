"""Quantized linears, under AutoAWQ's module names: GEMM, the layout that squawq writes."""

from __future__ import annotations

from awq.modules.linear.gemm import WQLinear_GEMM

__all__ = ["WQLinear_GEMM"]

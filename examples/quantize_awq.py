"""Quantize a 16-bit model with AutoAWQ's API: a script written for AutoAWQ runs unchanged.

python examples/quantize_awq.py MODEL OUT
"""

import sys

from transformers import AutoTokenizer

from awq import AutoAWQForCausalLM

model_path, quant_path = sys.argv[1:]
quant_config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}

model = AutoAWQForCausalLM.from_pretrained(model_path, low_cpu_mem_usage=True, use_cache=False)
tokenizer = AutoTokenizer.from_pretrained(model_path)
model.quantize(tokenizer, quant_config=quant_config)
model.save_quantized(quant_path)
tokenizer.save_pretrained(quant_path)
print(f"{quant_path} is ready")

"""Run a quantized model with AutoAWQ's API.

python examples/generate_awq.py FOLDER
"""

import sys

import torch
from transformers import AutoTokenizer

from awq import AutoAWQForCausalLM

model_id = sys.argv[1]
messages = [{"role": "user", "content": "Tell me a story about a brave little dog."}]

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoAWQForCausalLM.from_pretrained(model_id, torch_dtype="auto", low_cpu_mem_usage=True, device_map="auto")
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to("cuda" if torch.cuda.is_available() else "cpu")
outputs = model.generate(**inputs, do_sample=True, max_new_tokens=128)
print(tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])

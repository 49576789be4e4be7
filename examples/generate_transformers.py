"""Run a quantized model in transformers: `import squawq.transformers` loads AWQ on squawq's kernels.

python examples/generate_transformers.py FOLDER
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig

import squawq.transformers  # noqa: F401 (the one line)

model_id = sys.argv[1]
messages = [{"role": "user", "content": "Tell me a story about a brave little dog."}]
quantization_config = AwqConfig(
    bits=4,
    fuse_max_seq_len=512,  # the most tokens of a sequence, prompt and answer
    do_fuse=True,
)

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(
    model_id,
    dtype="auto",
    low_cpu_mem_usage=True,
    device_map="auto",
    quantization_config=quantization_config,
)
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
outputs = model.generate(**inputs, do_sample=True, max_new_tokens=128)
print(tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])

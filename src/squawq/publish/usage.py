"""Code blocks for a model card: how each engine runs the model. tests/publish/test_usage.py runs them."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

from squawq.compatibility import ENGINES, tgi_command

_CHAT = {
    "command": "chat $repo",
    "llm": '.chat([{"role": "user", "content": "Tell me a story."}])',
    "inputs": """\
messages = [{"role": "user", "content": "Tell me a story."}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
).to("cuda" if torch.cuda.is_available() else "cpu")""",
    "openai": """\
answer = client.chat.completions.create(
    model="$repo", messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=256
)
print(answer.choices[0].message.content)""",
    "inference": """\
answer = client.chat_completion([{"role": "user", "content": "Tell me a story."}], max_tokens=256)
print(answer.choices[0].message.content)""",
}
_TEXT = {  # of a model without a chat template
    "command": 'generate $repo -p "Once upon a time"',
    "llm": '.generate("Once upon a time")',
    "inputs": """\
inputs = tokenizer("Once upon a time", return_tensors="pt").to("cuda" if torch.cuda.is_available() else "cpu")""",
    "openai": """\
answer = client.completions.create(model="$repo", prompt="Once upon a time", max_tokens=256)
print(answer.choices[0].text)""",
    "inference": 'print(client.text_generation("Once upon a time", max_new_tokens=256))',
}
_SQUAWQ = """\
### squawq

```sh
squawq $command
squawq serve $repo --port 8000
```

```python
from squawq import LLM

with LLM("$repo") as llm:
    print(llm$llm)
```"""
_FUSED = """\
### transformers

`device_map` needs the package accelerate.

```python
import torch
import squawq.transformers  # AWQ kernels for the CPU too, and fused layers
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig

tokenizer = AutoTokenizer.from_pretrained("$repo")
model = AutoModelForCausalLM.from_pretrained(
    "$repo",
    dtype="auto",
    device_map="auto",
    quantization_config=AwqConfig(bits=4, fuse_max_seq_len=512, do_fuse=True),
)
$inputs
outputs = model.generate(**inputs, do_sample=True, max_new_tokens=256)
print(tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```"""
_PLAIN = """\
### transformers

`device_map` needs the package accelerate.

```python
import torch
import squawq.transformers  # AWQ kernels for the CPU too
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$repo")
model = AutoModelForCausalLM.from_pretrained("$repo", dtype="auto", device_map="auto")
$inputs
outputs = model.generate(**inputs, do_sample=True, max_new_tokens=256)
print(tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```"""
_AUTOAWQ = """\
### AutoAWQ's names (the `awq` package that comes with squawq)

```python
import torch
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$repo")
model = AutoAWQForCausalLM.from_pretrained(
    "$repo", torch_dtype="auto", low_cpu_mem_usage=True, device_map="auto"
)
$inputs
outputs = model.generate(**inputs, do_sample=True, max_new_tokens=256)
print(tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```"""
_VLLM = """\
### vLLM

```sh
vllm serve $repo --port 8000
```"""
_TGI = f"""\
### Text Generation Inference

```sh
{tgi_command("$repo")}
```"""
_CLIENTS = """\
### Clients of any of these servers

```python
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="-")
$openai
```

```python
from huggingface_hub import InferenceClient

client = InferenceClient("http://localhost:8000")
$inference
```"""


def usage(repo: str, chat: bool, engines: Sequence[str] = tuple(ENGINES)) -> str:
    """A block of code for each of the engines (keys of ENGINES), and for clients where one of them is a server.

    Servers listen on port 8000.
    """
    ours = "squawq" in engines
    sections = [
        (_SQUAWQ, ours),
        (_FUSED if ours else _PLAIN, "transformers" in engines),
        (_AUTOAWQ, "transformers" in engines),
        (_VLLM, "vllm" in engines),
        (_TGI, "tgi" in engines),
        (_CLIENTS, bool({"squawq", "vllm", "tgi"} & set(engines))),
    ]
    text = "\n\n".join(["## Use it", *(section for section, wanted in sections if wanted)])
    text = Template(text).substitute(_CHAT if chat else _TEXT, repo="$repo")  # twice: the parts hold $repo too
    return Template(text).substitute(repo=repo)

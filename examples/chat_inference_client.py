"""Ask a running server with huggingface_hub's client, as one asks Text Generation Inference.

MODEL_ID=FOLDER QUANTIZE=awq text-generation-launcher --port 8080 &
python examples/chat_inference_client.py [http://localhost:8080]
"""

import sys

from huggingface_hub import InferenceClient

client = InferenceClient(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8080")
answer = client.chat.completions.create(
    messages=[{"role": "user", "content": "Tell me a story about a brave little dog."}], max_tokens=128
)
print(answer.choices[0].message.content)

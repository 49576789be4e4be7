"""One of two processes of test_tensor_parallel.py: loads folders cut in two and says what it computes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(folder: str, out: str) -> None:
    from transformers import AutoModelForCausalLM, AwqConfig, ContinuousBatchingConfig, GenerationConfig
    from transformers.distributed import DistributedConfig

    import squawq.transformers  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2), quantization_config=AwqConfig(exact=True)
    )
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        logits = model(ids).logits
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = {"logits": logits, "tokens": model.generate(ids, eos_token_id=None, **settings)}
    qweight = model.model.layers[0].self_attn.q_proj.qweight
    found["rank_words"] = torch.tensor(qweight.to_local().shape)
    batch = model.generate_batch(
        ids.tolist(),
        generation_config=GenerationConfig(eos_token_id=-1, **settings),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, block_size=32),
    )
    found["batch"] = torch.tensor([result.generated_tokens for result in batch.values()])
    model.save_pretrained(Path(out) / "saved")
    rank = torch.distributed.get_rank()
    torch.save(found, Path(out) / f"{rank}.pt")


if __name__ == "__main__":
    for place in sys.argv[1:]:
        main(f"{place}/awq", place)
    torch.distributed.destroy_process_group()

"""What the process has imported from which `programs` forks; nothing here may start a thread or read the network."""

import gc

import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import awq  # noqa: F401
import squawq.bench
import squawq.cli
import squawq.evaluation.run
import squawq.export.run
import squawq.inspection
import squawq.llm
import squawq.publish.push
import squawq.quantization.pipeline
import squawq.serve.launcher
import squawq.serve.server
import squawq.transformers  # noqa: F401

gc.collect()
gc.freeze()  # a collection would write to every page that the programs share

"""LLM over the engine: greedy text against transformers, streams, lists, limits, and what a folder says of itself."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MakeModel

from squawq.demo import demo_model
from squawq.engine.request import FinishReason, Grammar, SamplingParams
from squawq.errors import ConfigError, EngineClosed, GenerationError
from squawq.llm import LLM
from squawq.progress import console
from squawq.quant_config import QuantConfig
from squawq.showing import Record

CHAT = [{"role": "user", "content": "Tell me a story about a cat named Tom."}]
GREEDY = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def llm(device: str) -> Iterator[LLM]:
    with LLM(demo_model(), device=device, exact=device == "cpu", kv_tokens=8192) as loaded:
        yield loaded


def test_greedy_equals_transformers(llm: LLM) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    ids = llm.tokenizer.encode_chat(CHAT)
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, temperature=None, top_p=None)
    assert list(llm.generate_ids(ids, GREEDY)) == expected[0, len(ids) :].tolist()


def test_golden_text(llm: LLM) -> None:
    assert llm.chat(CHAT, GREEDY).startswith("Once upon a time, there was a cat named Tom. Tom loved to eat tuna.")


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream("Once upon a time", GREEDY))
    assert len(pieces) > 10
    assert "".join(pieces) == llm.generate("Once upon a time", GREEDY)


def test_a_list_gives_what_each_gives_alone(llm: LLM) -> None:
    prompts = ["Once upon a time", "The dog", "One day, a girl named Sue"]
    assert llm.generate(prompts, GREEDY) == [llm.generate(prompt, GREEDY) for prompt in prompts]
    chats = [CHAT, [{"role": "user", "content": "Tell me a story."}]]
    assert llm.chat(chats, GREEDY) == [llm.chat(chat, GREEDY) for chat in chats]
    assert llm.generate([], GREEDY) == []


def test_ends_at_a_stop_token(llm: LLM) -> None:
    text = llm.chat(CHAT, SamplingParams(max_tokens=1000))
    assert text.endswith(("again.", "after.", ".", "!"))
    assert len(llm.tokenizer.encode(text)) < 500
    assert "<|" not in text


def test_complete_tells_all(llm: LLM) -> None:
    params = SamplingParams(max_tokens=500, n=2, temperature=0.8, seed=3, logprobs=2, prompt_logprobs=0, stop="Tom")
    ids = llm.tokenizer.encode_chat(CHAT)
    (sequences,) = llm.complete([ids], params)
    assert [output.index for output in sequences] == [0, 1]
    for output in sequences:
        assert output.finish == FinishReason.STOP
        assert "Tom" not in output.text
        assert [item.token for item in output.logprobs or ()] == list(output.ids)
        assert all(len(item.top) == 2 for item in output.logprobs or ())
    assert len(sequences[0].prompt_logprobs or ()) == len(ids)
    assert sequences[1].prompt_logprobs is None
    single = llm.complete([ids], SamplingParams(max_tokens=500, temperature=0.8, seed=3, stop="Tom"))
    assert single[0][0].ids == sequences[0].ids


def test_structured_output(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "maximum": 9, "minimum": 1}},
        "required": ["animal", "legs"],
        "additionalProperties": False,
    }
    text = llm.chat(CHAT, SamplingParams(max_tokens=200, grammar=Grammar("json_schema", json.dumps(schema))))
    assert json.loads(text)["animal"] in ("cat", "dog")


def test_seed(llm: LLM) -> None:
    warm = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    assert llm.chat(CHAT, warm) == llm.chat(CHAT, warm)
    assert len({llm.chat(CHAT, SamplingParams(max_tokens=20, temperature=1.5, seed=s)) for s in range(4)}) > 1


def test_defaults_come_from_the_model(llm: LLM) -> None:
    defaults = llm.sampling_defaults()
    assert (defaults.temperature, defaults.top_p) == (0.6, 0.9)


def test_prompt_limits(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="5000 tokens; the model has 4096 positions"):
        llm.generate_ids([5] * 5000)
    with pytest.raises(ConfigError, match="empty"):
        llm.generate_ids([])
    with pytest.raises(ConfigError, match="message"):
        llm.chat([])


def test_leaving_a_stream_stops_the_work(llm: LLM) -> None:
    pieces = llm.stream_chat(CHAT, SamplingParams(max_tokens=None, ignore_eos=True))
    next(pieces)
    pieces.close()
    for _ in range(5000):
        if not llm.engine.stats().running:
            break
        threading.Event().wait(0.005)
    assert llm.engine.stats().pages_used == 0


def test_a_bar_on_a_terminal_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = SamplingParams(max_tokens=2)
    llm.generate(["a", "b"], few)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "_force_terminal", True)
    llm.generate(["a", "b"], few, progress=False)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], few)
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def test_closing() -> None:
    loaded = LLM(demo_model(), kv_tokens=1024)
    stream = loaded.stream_chat(CHAT, SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    loaded.close()
    loaded.close()
    with pytest.raises(GenerationError, match="the engine was closed"):
        list(stream)
    with pytest.raises(EngineClosed):
        loaded.generate("a")


def test_a_dropped_llm_ends_its_worker() -> None:
    before = threading.active_count()
    loaded = LLM(demo_model(), kv_tokens=1024)
    assert threading.active_count() == before + 1
    del loaded
    gc.collect()
    assert threading.active_count() == before


def test_the_interpreter_ends_in_the_middle_of_a_text() -> None:
    code = (
        "from squawq import LLM, SamplingParams; from squawq.demo import demo_model\n"
        "stream = LLM(demo_model()).stream('Once', SamplingParams(max_tokens=None, ignore_eos=True))\n"
        "print(next(stream)); kept = LLM(demo_model()); print(kept.generate('The', SamplingParams(max_tokens=1)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_prompts_that_are_none(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="prompts is one text"):
        llm.complete("Tom")
    with pytest.raises(ConfigError, match="a prompt must be a text or whole numbers"):
        llm.complete([[1.5]])  # type: ignore[list-item]
    array = np.array([5, 6])
    assert llm.complete([array], GREEDY)[0][0].ids == llm.complete([[5, 6]], GREEDY)[0][0].ids  # type: ignore[list-item]


def test_settings_that_cannot_be_are_passed_over(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    from shutil import copy

    folder = make_model(vocab_size=4096)
    copy(demo_model() / "tokenizer.json", folder)
    written = {"do_sample": True, "top_k": -1, "top_p": 0.5, "eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(written))
    with LLM(folder, exact=True, kv_tokens=256) as loaded:
        assert loaded.sampling_defaults() == SamplingParams(temperature=1.0, top_p=0.5)
        (output,) = loaded.complete([[5, 6]], SamplingParams(logit_bias={1: 100}))[0]
        assert output.finish == FinishReason.STOP  # config.json's end token
    assert "generation_config.json: passed over: top_k is -1" in caplog.text


def test_what_the_folder_says_of_sampling(make_model: MakeModel) -> None:
    from shutil import copy

    folder = make_model(vocab_size=4096)
    copy(demo_model() / "tokenizer.json", folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 9999], "temperature": 0.5, "repetition_penalty": 1.1, "top_k": None})
    )
    with LLM(folder, exact=True, kv_tokens=256) as loaded:
        assert loaded.sampling_defaults() == SamplingParams(repetition_penalty=1.1)
        (output,) = loaded.complete([[5, 6]], SamplingParams(logit_bias={7: 100}))[0]
        assert (output.ids, output.finish, output.stop_reason) == ((7,), FinishReason.STOP, 7)
        assert list(loaded.generate_ids([5, 6], SamplingParams(logit_bias={7: 100}))) == []


def test_settings_by_name(llm: LLM) -> None:
    five = SamplingParams(max_tokens=5)
    text = llm.generate("Once upon a time", max_tokens=5, temperature=0.0)
    assert text == llm.generate("Once upon a time", five)
    assert llm.generate(["Once upon a time"], max_tokens=5, temperature=0.0) == [text]
    assert "".join(llm.stream("Once upon a time", max_tokens=5, temperature=0.0)) == text
    assert llm.complete(["Once upon a time"], max_tokens=5, temperature=0.0)[0][0].text == text
    ids = llm.tokenizer.encode("Once upon a time")
    assert len(list(llm.generate_ids(ids, max_tokens=5, ignore_eos=True))) == 5
    # what is not given is the model's own
    warm = replace(llm.sampling_defaults(), max_tokens=9, seed=3)
    assert llm.chat(CHAT, max_tokens=9, seed=3) == llm.chat(CHAT, warm)


def test_a_text_is_a_users_message(llm: LLM) -> None:
    question = CHAT[0]["content"]
    assert llm.chat(question, GREEDY) == llm.chat(CHAT, GREEDY)
    assert "".join(llm.stream_chat(question, max_tokens=5, temperature=0.0)) == llm.chat(CHAT, SamplingParams(5))


def test_settings_that_cannot_be_meant(llm: LLM) -> None:
    for call in (llm.generate, llm.chat, llm.stream, llm.stream_chat):
        with pytest.raises(ConfigError, match="params and max_tokens are both given"):
            call("x", GREEDY, max_tokens=5)
        with pytest.raises(
            ConfigError, match="there is no setting 'max_new_tokens'; choose from max_tokens, min_tokens"
        ):
            call("x", max_new_tokens=5)
    with pytest.raises(ConfigError, match="params and seed are both given"):
        llm.complete(["x"], GREEDY, seed=1)
    with pytest.raises(ConfigError, match="params is 5; give SamplingParams, or settings by name"):
        llm.generate("x", 5)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="temperature is -1"):
        llm.generate("x", temperature=-1)


def test_log_probabilities_have_texts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1)
    ((output,),) = llm.complete(["Once upon a time"], params)
    assert output.logprobs is not None
    assert "".join(item.text for item in output.logprobs) == output.text
    for item in output.logprobs:
        assert item.top_texts == tuple(llm.tokenizer.token_text(token) for token, _ in item.top)
    first, *others = output.prompt_logprobs or ()
    assert first is None
    assert "".join(item.text for item in others if item) == "Once upon a time"  # after the begin token


def test_reprs_are_short(llm: LLM) -> None:
    about = "llama, 8 layers, 16-bit, context of 4,096 tokens"
    assert repr(llm) == f"<squawq.LLM 'demo_model': {about}, on {llm.device}>"
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(5, temperature=0.5)) == "SamplingParams(max_tokens=5, temperature=0.5)"
    assert eval(repr(SamplingParams(stop=["a"]))) == SamplingParams(stop=["a"])
    assert repr(QuantConfig(method="awq")) == "QuantConfig(method='awq')"
    ((output,),) = llm.complete([CHAT[0]["content"]], max_tokens=200, prompt_logprobs=2, logprobs=2)
    assert len(repr(output)) < 400
    assert "logprobs=[" in repr(output)
    assert repr((output.logprobs or ())[0]).startswith("TokenLogprob(token=")
    scores = Record(perplexity=2.5, kl_by_position=[0.125] * 1000)
    assert repr(scores) == "{'perplexity': 2.5, 'kl_by_position': [1000 entries]}"
    assert json.loads(json.dumps(scores)) == scores

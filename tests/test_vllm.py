"""vLLM's own ChatGLMModel on our checkpoint (`make test-vllm`): the same prompts, and the same greedy answers as ours."""

import pytest
from transformers import AutoModel, AutoTokenizer

from conftest import TINY


vllm = pytest.importorskip("vllm", reason="vLLM has a venv of its own: make test-vllm")

QUERIES = ["你好", "Who are you?", "Tell me a story about a dog.", "翻译成英文：我爱你。"]
ROUNDS = [("Hi!", "Hello!"), ("My name is Tom.", "Hello, Tom!")]


@pytest.fixture(scope="module")
def engine():
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, which ends it
    yield vllm.LLM(
        str(TINY), trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8
    )
    patch.undo()


@pytest.mark.timeout(600)
def test_greedy_answers_are_ours(engine):
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float().eval()
    dialogues = [[{"role": "user", "content": query}] for query in QUERIES]
    turns = [{"role": r, "content": text} for round in ROUNDS for r, text in zip(("user", "assistant"), round)]
    dialogues.append([*turns, {"role": "user", "content": "What is my name?"}])
    outputs = engine.chat(dialogues, vllm.SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)
    for messages, output in zip(dialogues, outputs):
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        assert list(output.prompt_token_ids) == inputs["input_ids"][0].tolist()
        ours = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
        assert list(output.outputs[0].token_ids) == ours.tolist()

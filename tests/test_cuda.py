"""On a GPU, the answers are the CPU's: the published small model in each way that it can be run, in float32. Skipped without one.

The kernels alone are tested in test_quantization_gpu.py.
"""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from common.package import product
from conftest import TINY, generate_batch


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

QUESTIONS = ["你好", "What is your name?", "Tell me a short story about a dog."]


def load(device: str, bits: int | None = None, **kwargs):
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float32, **kwargs)
    return (model if bits is None else model.quantize(bits)).to(device).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture(scope="module")
def answers(tokenizer):
    model = load("cpu")
    return [chat(model, tokenizer, question) for question in QUESTIONS]


def chat(model, tokenizer, question: str, **kwargs) -> str:
    return model.chat(tokenizer, question, do_sample=False, max_length=128, **kwargs)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention(tokenizer, answers, attention):
    model = load("cuda", attn_implementation=attention)
    assert [chat(model, tokenizer, question) for question in QUESTIONS] == answers


def test_static_cache_is_compiled(tokenizer, answers):
    model = load("cuda")
    static = [chat(model, tokenizer, question, cache_implementation="static") for question in QUESTIONS]
    assert static == answers


def test_stream(tokenizer, answers):
    model = load("cuda")
    *_, (answer, _) = model.stream_chat(tokenizer, QUESTIONS[0], do_sample=False, max_length=128)
    assert answer == answers[0]


def test_batches(tokenizer):
    """Padding on the left, and continuous batching in the library's paged cache."""
    prompts = [
        product("tokenization_chatglm.ChatGLMTokenizer").build_prompt(tokenizer, question) for question in QUESTIONS
    ]
    config = dict(do_sample=False, max_new_tokens=32)
    cpu, gpu = load("cpu"), load("cuda")
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    expected = cpu.generate(**inputs, **config)
    assert torch.equal(gpu.generate(**inputs.to("cuda"), **config).cpu(), expected)
    gpu.generation_config.update(**config)
    outputs = generate_batch(gpu, [tokenizer(prompt)["input_ids"] for prompt in prompts], gpu.generation_config)
    width, pad = inputs["input_ids"].shape[1], gpu.generation_config.pad_token_id
    expected = [[i for i in row[width:].tolist() if i != pad] for row in expected]
    assert [[i for i in output if i != pad] for output in outputs] == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(tokenizer, bits):
    """
    Quantizing on the GPU gives the CPU's scales but for their last bit, and weights but for a few at .5; logits and the gradients of
    training are those of the dequantized model.
    """
    model, on_gpu = load("cpu", bits), load("cuda").quantize(bits)
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int8:
            assert (on_gpu.state_dict()[name].cpu() == tensor).float().mean() > 0.999, name
        else:
            torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), tensor, atol=0, rtol=1e-6)
    on_gpu = model.to("cuda")
    exact = load("cuda", bits).dequantize()
    ids = tokenizer(QUESTIONS, padding=True, return_tensors="pt").to("cuda")
    torch.testing.assert_close(on_gpu(**ids).logits, exact(**ids).logits, atol=2e-4, rtol=1e-4)
    one = {name: tensor[:1, -1:] for name, tensor in ids.items()}  # decoding's kernel
    torch.testing.assert_close(on_gpu(**one).logits, exact(**one).logits, atol=2e-4, rtol=1e-4)
    gradients = []
    for each in (on_gpu, exact):
        embeddings = each.get_input_embeddings()(ids["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=embeddings, attention_mask=ids["attention_mask"]).logits.square().mean().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_half_precision(tokenizer):
    for dtype in (torch.float16, torch.bfloat16):
        model = load("cuda").to(dtype)
        assert len(chat(model, tokenizer, QUESTIONS[2])) > 10

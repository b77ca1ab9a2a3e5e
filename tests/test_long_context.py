"""Long contexts: positions far apart, prompts in chunks, the library's caches through chat, and fewer or compiled steps."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.generation import CompileConfig

from conftest import ROOT


GREEDY = dict(do_sample=False, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture(scope="module")
def model(small_model, tokenizer):
    return small_model(11, padded_vocab_size=8064, seq_length=512)


def random_ids(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.padded_vocab_size, shape, generator=generator)


def generate_logits(model, ids, **options):
    """Logits of each step, `[batch, steps, vocabulary]`."""
    output = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(output.logits, dim=1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture
def forwards(monkeypatch):
    """Notes how many tokens each forward of a model computes: `lengths = forwards(model)`."""

    def watch(model) -> list[int]:
        lengths = []
        original = model.transformer.forward

        def forward(*args, **kwargs):
            lengths.append(kwargs["input_ids"].shape[1])
            return original(*args, **kwargs)

        monkeypatch.setattr(model.transformer, "forward", forward)
        return lengths

    return watch


# Positions


@torch.no_grad()
def copier(chatglm, distance: int, **config):
    """
    A model of one layer that answers with the token `distance` places back.

    Query and key are constants, whose product is largest where RoPE turns one into the other: at that distance. In the
    frequencies of the published heads, one place beside it is 20 less, a factor of 1e-9 after the softmax.
    """
    sizes = dict(num_layers=1, hidden_size=128, num_attention_heads=1, kv_channels=128, ffn_hidden_size=8)
    config = chatglm.ChatGLMConfig(padded_vocab_size=1024, add_qkv_bias=True, **{**sizes, **config})
    model = chatglm.ChatGLMForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    transformer = model.transformer
    attention = transformer.encoder.layers[0].self_attention
    codes = torch.nn.functional.normalize(torch.randn(1024, 128, generator=torch.Generator().manual_seed(0)))
    transformer.embedding.word_embeddings.weight.copy_(codes)
    transformer.output_layer.weight.copy_(codes)
    attention.query_key_value.weight[256:] = torch.eye(128)
    attention.dense.weight.copy_(100 * torch.eye(128))  # much more than the token itself

    rotary = transformer.rotary_pos_emb
    rotary(torch.zeros(1), torch.tensor([[config.seq_length * 2 - 1]]))  # dynamic NTK: the frequencies for that length
    angles = distance * rotary.inv_freq.double()
    size = 15.0  # score one place beside: 15^2 * 1.06 / sqrt(128) less
    attention.query_key_value.bias.zero_()
    attention.query_key_value.bias[0:64:2] = size * angles.cos().float()
    attention.query_key_value.bias[1:64:2] = -size * angles.sin().float()
    attention.query_key_value.bias[128:192:2] = size
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_passkey_32k_tokens_back(chatglm, dtype):
    """The published code computed angles in the model's dtype, where in float16 positions above 2,048 collapse."""
    model = copier(chatglm, distance=32000, seq_length=32768).to(dtype)
    ids = random_ids(model, 1, 32700)
    output = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert output[0, 32700:].tolist() == ids[0, 699:719].tolist()


@pytest.mark.parametrize(
    "rope_parameters, seq_length",
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_far_positions_beyond_the_context(chatglm, rope_parameters, seq_length):
    model = copier(chatglm, distance=8000, seq_length=seq_length, rope_parameters=rope_parameters)
    ids = random_ids(model, 1, 8192)
    with torch.no_grad():
        logits = model(ids).logits[0, 8000:]
    assert (logits.argmax(-1) == ids[0, :192]).all()


def test_rope_ratio_divides_positions(chatglm):
    model = copier(chatglm, distance=3000, seq_length=4096, rope_ratio=4)
    ids = random_ids(model, 1, 4096)
    with torch.no_grad():
        logits = model(ids).logits[0, 3000:]
    assert (logits.argmax(-1) == ids[0, :1096]).all()


def test_logits_at_32k_positions(small_model, monkeypatch):
    """
    Against float64, its RoPE included. An angle is a position times a frequency, each with a relative error of 2^-24: at
    32,768 it is off by at most 32768 * 2^-23 = 4e-3, in the fastest pairs only. What that does to logits of size 1:
    """
    model = small_model(3, kv_channels=64, seq_length=32768)
    ids = random_ids(model, 1, 32768)
    with torch.no_grad():
        logits = model(ids, logits_to_keep=256).logits
    rotary = model.transformer.rotary_pos_emb
    inv_freq = 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)

    def exact(x, position_ids):
        angles = (position_ids[..., None].double() * inv_freq).repeat_interleave(2, -1)
        sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(16)
        rest = torch.zeros(*angles.shape[:-1], 32, dtype=torch.float64)
        return torch.cat((angles.cos(), rest + 1), -1), torch.cat((angles.sin() * sign, rest), -1)

    monkeypatch.setattr(rotary, "forward", exact)
    with torch.no_grad():
        reference = model.double()(ids, logits_to_keep=256).logits
    assert (logits - reference).abs().max() < 1e-3 * reference.abs().max()


# Prompts in chunks


@pytest.mark.parametrize("kind", ["dynamic", "static", "prompt lookup", "beams"])
def test_chunks_equal_the_whole(small_model, forwards, kind):
    model = small_model(5, seq_length=256)
    ids = random_ids(model, 2, 50)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    if kind == "prompt lookup":
        ids, mask = ids[1:], mask[1:]
    options = {
        "static": dict(cache_implementation="static"),
        "prompt lookup": dict(prompt_lookup_num_tokens=2),
        "beams": dict(num_beams=2),
    }.get(kind, {})
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=6, **options)
    expected = generate_logits(model, ids, **options)
    lengths = forwards(model)
    close(generate_logits(model, ids, prefill_chunk_size=20, **options), expected)
    if kind != "prompt lookup":  # for which the library makes no chunks
        assert lengths[:3] == [20, 20, 10]


def test_chat_encodes_long_prompts_in_chunks(chatglm, model, tokenizer, monkeypatch, forwards):
    query = "你好" * 40
    expected = model.chat(tokenizer, query, **GREEDY)
    monkeypatch.setattr(chatglm.generation, "PREFILL_CHUNK_SIZE", 32)
    lengths = forwards(model)
    assert model.chat(tokenizer, query, **GREEDY) == expected
    assert lengths[:2] == [32, 32] and max(lengths) == 32


def test_generation_config_asks_for_chunks():
    """As `chat` does; so `generate` on a folder from the Hub needs no more memory than `chat`."""
    assert GenerationConfig.from_pretrained(ROOT).prefill_chunk_size == 1024


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "prompt tuning",
        "prefix tuning",
        "pre_seq_len",
        "pre_seq_len, lookup",
        "positions",
        "no cache",
        "embeddings",
    ],
)
def test_chunked_prefill_preserves_outputs(small_model, kind):
    """With prefixes of every kind and other ways to call `generate`, where the generation config asks for chunks."""
    model = small_model(5, seq_length=256, pre_seq_len=5 if "pre_seq_len" in kind else None)
    ids = random_ids(model, 1, 50)
    options = dict(do_sample=False, max_new_tokens=4, attention_mask=torch.ones_like(ids))
    if kind == "positions":
        options["position_ids"] = torch.cat((torch.arange(10), torch.arange(30, 70)))[None]
    if "lookup" in kind:
        options["prompt_lookup_num_tokens"] = 3
    peft_config = {
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["query_key_value"], init_lora_weights=False
        ),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }.get(kind)
    if peft_config:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft_config()).eval()
    inputs = dict(input_ids=ids)
    if kind == "no cache":
        options["use_cache"] = False
    if kind == "embeddings":
        inputs = dict(inputs_embeds=model.get_input_embeddings()(ids))

    def logits():
        output = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
        return torch.stack(output.logits, dim=1)

    expected = logits()
    model.generation_config.prefill_chunk_size = 16
    close(logits(), expected)


def test_states_are_of_the_whole_prompt(small_model):
    model = small_model(5, seq_length=256)
    model.generation_config.prefill_chunk_size = 16
    options = dict(max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    assert model.generate(random_ids(model, 1, 50), **options).hidden_states[0][-1].shape[1] == 50


def test_chunks_of_new_ids_alone(small_model, chatglm, forwards):
    model = small_model(5, seq_length=256)
    ids = random_ids(model, 1, 50)
    options = dict(do_sample=False, max_new_tokens=3, attention_mask=torch.ones_like(ids))
    expected = generate_logits(model, ids, **options)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    lengths = forwards(model)
    close(generate_logits(model, ids[:, 5:], past_key_values=cache, prefill_chunk_size=16, **options), expected)
    assert lengths == ([16, 16, 13, 1, 1] if chatglm.compat.CHUNKS_CONTINUE_A_CACHE else [45, 1, 1])


def test_bidirectional(small_model):
    """is_causal=False is for conversions that see both ways."""
    model = small_model(5)
    ids = random_ids(model, 1, 8)
    with torch.no_grad():
        causal, both_ways = (model(ids, is_causal=flag, use_cache=False).logits for flag in (True, False))
        changed = ids.clone()
        changed[0, -1] = 3 + (ids[0, -1] - 2) % 100
        first = model(changed, is_causal=False, use_cache=False).logits[0, 0]
    assert (causal - both_ways).abs().max() > 1e-2
    assert (first - both_ways[0, 0]).abs().max() > 1e-4


def test_chunks_go_on_from_a_cache(small_model, chatglm, forwards):
    """Until 5.20 the library's chunks would start over: there the rest of the prompt is one chunk."""
    model = small_model(5, seq_length=256)
    ids = random_ids(model, 1, 50)
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :17], past_key_values=cache)
    lengths = forwards(model)
    output = model.generate(ids, past_key_values=cache, prefill_chunk_size=16, do_sample=False, max_new_tokens=4)
    assert torch.equal(output, expected)
    assert lengths == ([16, 16, 1, 1, 1, 1] if chatglm.compat.CHUNKS_CONTINUE_A_CACHE else [33, 1, 1, 1])


def test_chunks_after_a_prefix(small_model):
    model = small_model(5, seq_length=256, pre_seq_len=3)
    ids = random_ids(model, 1, 50)
    options = dict(do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(ids, prefill_chunk_size=20, **options), model.generate(ids, **options))


def test_frequencies_that_depend_on_the_length(small_model, forwards):
    model = small_model(5, seq_length=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    model.generation_config.prefill_chunk_size = 20
    lengths = forwards(model)
    model.generate(random_ids(model, 1, 100), max_new_tokens=2, min_new_tokens=2)
    assert lengths == [100, 1]


# Caches of the library


def caches(config):
    yield "static", StaticCache(config=config, max_cache_len=256)
    # The newest 16 tokens stay as they are
    yield "quanto", QuantizedCache("quanto", config, nbits=4, residual_length=16)
    yield "hqq", QuantizedCache("hqq", config, nbits=8, residual_length=16)


def test_quantized_caches(small_model, tokenizer):
    pytest.importorskip("optimum.quanto")
    pytest.importorskip("hqq")
    model = small_model(11, padded_vocab_size=8064, seq_length=512, kv_channels=64)
    for kind, cache in caches(model.config):
        history, lengths = [], []
        for query in ("你好", "Hello, how are you?", "再见"):
            response, history, cache = model.chat(
                tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **GREEDY
            )
            lengths.append(int(cache.get_seq_length()))
        assert len(history) == 3 and lengths == sorted(set(lengths)), kind
        with torch.no_grad():
            ids = cache.chat_record.ids
            logits = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1]
            expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert torch.cosine_similarity(logits, expected, dim=0) > 0.98, kind


def test_quantized_cache_by_name(small_model, tokenizer):
    pytest.importorskip("optimum.quanto")
    model = small_model(11, padded_vocab_size=8064, seq_length=512, kv_channels=64)
    response, _ = model.chat(tokenizer, "你好", cache_implementation="quantized", **GREEDY)
    assert isinstance(response, str)


# Steps


def test_compiled_steps(model, tokenizer):
    """One graph for all steps of all rounds: no break (fullgraph), and nothing compiled again."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True  # the library compiles on GPUs only
    torch._dynamo.reset()
    counters.clear()
    histories = []
    for options in ({}, dict(compile_config=config)):
        cache, history = StaticCache(config=model.config, max_cache_len=256), []
        for query in ("你好", "Hello", "再见"):
            _, history, cache = model.chat(
                tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **GREEDY, **options
            )
        histories.append(history)
    assert histories[0] == histories[1]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("method", ["prompt lookup", "assistant"])
def test_assisted_decoding(small_model, tokenizer, forwards, method):
    """The greedy answer, in fewer steps."""
    model = small_model(5, padded_vocab_size=8064, seq_length=512)
    options = dict(do_sample=False, max_new_tokens=40, eos_token_id=1)
    if method == "prompt lookup":
        assisted = dict(prompt_lookup_num_tokens=4)
    else:
        assisted = dict(assistant_model=small_model(5, padded_vocab_size=8064, seq_length=512))
    expected = model.chat(tokenizer, "你好", **options)
    lengths = forwards(model)
    assert model.chat(tokenizer, "你好", **options, **assisted) == expected
    assert len(lengths) < 35
    *_, streamed = model.stream_chat(tokenizer, "你好", **options, **assisted)
    assert streamed == expected

    # In later rounds too, from the cache of the earlier ones
    dialogues = []
    for extra in ({}, assisted):
        history, cache = [], None
        for query in ("你好", "Hello", "再见"):
            _, history, cache = model.chat(
                tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **options, **extra
            )
        dialogues.append(history)
        assert cache.get_seq_length() < len(cache.chat_record.ids)
    assert dialogues[0] == dialogues[1]


# Bad input


def test_prompt_longer_than_the_context(small_model):
    model = small_model(seq_length=64)
    ids = random_ids(model, 1, 65)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :60], past_key_values=cache)
    for call in (
        lambda: model.generate(ids, max_new_tokens=1),
        lambda: model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=1),
        lambda: model.generate(
            ids[:, 60:], past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=1
        ),
    ):
        with pytest.raises(ValueError, match=r"The prompt has 65 tokens, the model's context 64 \(seq_length\)"):
            call()
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    model.generate(ids, attention_mask=padded, max_new_tokens=1)
    # An assistant that cannot hold all of the dialogue
    model, assistant = small_model(seq_length=128), small_model(seq_length=60)
    model.generate(ids[:, :50], assistant_model=assistant, max_new_tokens=40, do_sample=False, eos_token_id=1)


def test_caches_that_do_not_belong(small_model):
    model = small_model(seq_length=64)
    ids = random_ids(model, 2, 6)

    def cache_of(model, ids=ids):
        with torch.no_grad():
            return model(ids, use_cache=True).past_key_values

    step = ids[:, :1]
    with pytest.raises(ValueError, match="a batch of 2, the input of 1"):
        model(step[:1], past_key_values=cache_of(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = cache_of(model)
        model(step, past_key_values=cache)
    with pytest.raises(ValueError, match="room for 5 tokens, and 6 would be in it"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=5))
    static = StaticCache(config=model.config, max_cache_len=5)
    with pytest.raises(ValueError, match="room for 5 tokens, and 6 would be in it"):
        model.generate(ids, past_key_values=static, prefill_chunk_size=2, max_new_tokens=1)
    assert static.get_seq_length() == 0
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1, got 0"):
        model.generate(ids, prefill_chunk_size=0, max_new_tokens=1)


def test_attention_that_is_not_installed(small_model, chatglm, tmp_path):
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2 .* package"):
        chatglm.ChatGLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="attn_implementation"):
        chatglm.ChatGLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flashy")

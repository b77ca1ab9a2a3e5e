"""
The network. The oracle is the library's own GlmForCausalLM, which computes the same function from the same weights in
another layout; beyond it, properties: cached = uncached, padded = unpadded, batched = single, compiled = eager.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GlmForCausalLM, LogitsProcessorList, StaticCache
from transformers.cache_utils import DynamicLayer

from common.glm import glm_config, glm_tensors
from conftest import SMALL, generate_batch


ATTENTION = ["eager", "sdpa", "flex_attention"]


def glm_oracle(model, dtype=torch.float32) -> GlmForCausalLM:
    """The same model as a GlmForCausalLM."""
    oracle = GlmForCausalLM(glm_config(model.config, attn_implementation="eager")).eval()
    oracle.load_state_dict(dict(glm_tensors(model.state_dict().items(), model.config)))
    return oracle.to(dtype)


def random_ids(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.padded_vocab_size, shape, generator=generator)


def left_padded(ids, lengths):
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids * mask, mask


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=1e-4)


# Oracle


configs = st.fixed_dictionaries(
    dict(
        num_layers=st.integers(1, 3),
        kv_channels=st.sampled_from([4, 8, 12, 16]),
        num_attention_heads=st.sampled_from([2, 4, 8]),
        multi_query_group_num=st.sampled_from([1, 2]),
        multi_query_attention=st.booleans(),
        hidden_size=st.sampled_from([16, 40]),
        ffn_hidden_size=st.sampled_from([20, 64]),
        add_qkv_bias=st.booleans(),
        rope_ratio=st.sampled_from([1, 2, 4]),
    )
)


@settings(max_examples=25, deadline=None)
@given(
    config=configs,
    attn_implementation=st.sampled_from(["eager", "sdpa"]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    cached=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_equals_glm(small_model, config, attn_implementation, dtype, lengths, cached, seed):
    model = small_model(seed, attn_implementation=attn_implementation, **config)
    oracle = glm_oracle(model)
    model.to(dtype)
    ids, mask = left_padded(random_ids(model, len(lengths), 12, seed=seed), lengths)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = oracle(ids, attention_mask=mask, position_ids=positions).logits
        past, logits = None, []
        for chunk in (slice(0, cached), slice(cached, None)):
            if chunk == slice(0, 0):
                continue
            output = model(
                ids[:, chunk],
                attention_mask=mask[:, : chunk.stop],
                position_ids=positions[:, chunk],
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
            logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    assert torch.isfinite(logits).all()
    scale = expected.abs().max().item()
    tolerance = 0.1 * scale if dtype == torch.bfloat16 else 1e-4 + 1e-5 * scale
    close(logits[mask.bool()], expected[mask.bool()], atol=tolerance)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_rope_scaling_equals_glm(small_model, rope_type):
    model = small_model(rope_parameters={"rope_type": rope_type, "factor": 2.0}, seq_length=16)
    ids = random_ids(model, 1, 30)
    with torch.no_grad():
        close(model(ids).logits, glm_oracle(model)(ids).logits)


def test_greedy_equals_glm(small_model):
    model = small_model(3)
    ids, mask = left_padded(random_ids(model, 3, 9), (9, 4, 1))
    expected = glm_oracle(model).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12), expected)


# Properties


@pytest.mark.parametrize("attn_implementation", ATTENTION)
def test_attention_implementations(small_model, attn_implementation):
    model = small_model(attn_implementation="eager")
    ids, mask = left_padded(random_ids(model, 2, 16), (16, 7))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(attn_implementation)
        close(model(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("attn_implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_dispatch(small_model, chatglm, monkeypatch, attn_implementation):
    """The kernels need a GPU; here their interface is replaced by one that computes the same in plain torch."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, calls = small_model(attn_implementation="eager"), []

    def flash(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None and module.is_causal  # no padding: the kernel's own causal mask
        assert key.shape[1] == module.config.multi_query_group_num
        calls.append(module.layer_idx)
        n = query.shape[2]
        causal = torch.ones(n, key.shape[2], dtype=torch.bool).tril(key.shape[2] - n)[None, None]
        return chatglm.modeling.eager_attention_forward(module, query, key, value, causal, scaling)[0], None

    ids = random_ids(model, 2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attn_implementation, flash)
        model.config._attn_implementation = attn_implementation
        close(model(ids).logits, expected)
    assert calls == [0, 1]


def test_grouped_attention(small_model, chatglm):
    """The eager path folds query heads; the same with keys and values copied for each head."""
    attention = small_model().transformer.encoder.layers[0].self_attention
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    expanded = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *expanded, is_causal=True)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    output, weights = chatglm.modeling.eager_attention_forward(attention, query, key, value, causal, attention.scaling)
    close(output.transpose(1, 2), expected, atol=1e-6)
    assert weights.shape == (2, 4, 5, 5)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=4), seed=st.integers(0, 99), right=st.booleans())
def test_padded_equals_unpadded(small_model, lengths, seed, right):
    model = small_model(seed)
    ids, mask = left_padded(random_ids(model, len(lengths), 10, seed=seed), lengths)
    with torch.no_grad():
        singles = [model(row[-length:][None]).logits[0] for row, length in zip(ids, lengths)]
        if right:
            ids = torch.stack([row.roll(length) for row, length in zip(ids, lengths)])
            mask = torch.stack([row.roll(length) for row, length in zip(mask, lengths)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(logits).all()
    close(logits[mask.bool()], torch.cat(singles))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fully_padded_rows_are_finite(small_model, attn_implementation, dtype):
    model = small_model(attn_implementation=attn_implementation).to(dtype)
    mask = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    logits = model(random_ids(model, 2, 4), attention_mask=mask).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_caches(small_model, cache):
    model, chunks = small_model(), (7, 1, 3, 1)
    ids = random_ids(model, 2, sum(chunks))
    past = StaticCache(config=model.config, max_cache_len=20) if cache == "static" else None
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        logits, end = [], 0
        for n in chunks:
            begin, end = end, end + n
            chunk = ids[:, :end] if cache == "none" else ids[:, begin:end]
            output = model(chunk, past_key_values=past, use_cache=cache != "none")
            past = output.past_key_values
            logits.append(output.logits[:, -n:])
    close(torch.cat(logits, dim=1), expected)
    if cache == "none":
        assert past is None


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_4d_masks(small_model, attn_implementation):
    model = small_model(attn_implementation=attn_implementation)
    ids = random_ids(model, 2, 6)
    visible = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    visible[1, :, 3:, :3] = False  # two documents in one row
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=additive).logits
        close(model(ids, attention_mask=visible).logits, expected)
        close(model(ids, full_attention_mask=~visible).logits, expected)
        close(expected[:1], model(ids[:1]).logits)
        first = model(ids[1:, :3]).logits
        close(expected[1:, :3], first)


def test_packed_documents_do_not_see_each_other(small_model):
    model = small_model()
    ids = random_ids(model, 1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    close(packed, apart)


def test_inputs_embeds(small_model):
    model = small_model()
    ids = random_ids(model, 2, 5)
    embeds = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=4),
        model.generate(ids, do_sample=False, max_new_tokens=4)[:, 5:],
    )


def test_outputs(small_model):
    model = small_model(attn_implementation="eager")
    output = model(random_ids(model, 2, 5), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 5, 5)] * 2
    close(output.attentions[0].sum(-1), torch.ones(2, 4, 5))
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 5, 32)] * 3
    as_tuple = model(random_ids(model, 2, 5), return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == (2, 5, 128)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4]), torch.tensor([[1, 2], [0, 4]])])
def test_logits_to_keep(small_model, keep):
    model = small_model()
    ids = random_ids(model, 2, 5)
    logits = model(ids).logits
    if isinstance(keep, int):
        expected = logits[:, -keep:] if keep else logits
    elif keep.dim() == 1:
        expected = logits[:, keep]
    else:
        expected = torch.stack([logits[0, keep[0]], logits[1, keep[1]]])
    close(model(ids, logits_to_keep=keep).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rope_angles_are_float32(small_model, dtype):
    """In every channel, after any cast. In the published code positions beyond 2,048 collapse in float16."""
    model = small_model(seq_length=32768, kv_channels=64)
    cast = {torch.float32: model.float, torch.float16: model.half, torch.bfloat16: model.bfloat16}[dtype]
    rotary = cast().to(dtype).transformer.rotary_pos_emb
    if dtype != torch.float32:
        cast().float()  # and back: what was rounded once would stay so
    positions = torch.arange(32000, 32768)
    exact = positions[:, None].double() * 10000.0 ** -(torch.arange(0, 32, 2).double() / 32)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
    for got, expected, unrotated in ((cos, exact.cos(), 1), (sin, -exact.sin(), 0)):
        assert got.shape == (1, 768, 64)
        torch.testing.assert_close(got[0, :, 0:32:2].double(), expected, atol=5e-3, rtol=0)
        assert torch.equal(got[..., 0:32:2], got[..., 1:32:2] if unrotated else -got[..., 1:32:2])
        assert (got[..., 32:] == unrotated).all()
    assert len(cos[0].unique(dim=0)) == len(positions)


def test_rms_norm_multiplies_before_the_downcast(chatglm):
    norm = chatglm.modeling.RMSNorm(64).half()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(8, 64).half()
    exact = (norm.weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).half()
    assert (norm(x) == exact).float().mean() > 0.99


@pytest.mark.parametrize(
    "variant",
    [
        dict(multi_query_attention=False),
        dict(post_layer_norm=False),
        dict(rmsnorm=False),
        dict(add_bias_linear=True),
        dict(add_qkv_bias=False),
        dict(apply_residual_connection_post_layernorm=True),
        dict(fp32_residual_connection=True),
        dict(hidden_dropout=0.1, attention_dropout=0.1),
        dict(tie_word_embeddings=True),
        dict(pre_seq_len=3, prefix_projection=True),
    ],
    ids=str,
)
def test_variants(small_model, variant):
    """Each option works, in half precision too, trains, and (unless it only acts in training) makes a difference."""
    model, plain = small_model(**variant), small_model()
    ids = random_ids(model, 2, 7)
    logits = model(ids).logits
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    if not {"hidden_dropout", "fp32_residual_connection"} & set(variant):
        assert not torch.allclose(logits, plain(ids).logits, atol=1e-2)
    close(model.bfloat16()(ids).logits, logits, atol=0.1 * logits.abs().max().item())
    model.float().train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_residual_after_the_norm(small_model):
    """apply_residual_connection_post_layernorm, against a block written out."""
    model = small_model(apply_residual_connection_post_layernorm=True, num_layers=1)
    block = model.transformer.encoder.layers[0]
    ids = random_ids(model, 1, 4)
    output = model(ids, output_hidden_states=True)
    x = output.hidden_states[0]
    normed = block.input_layernorm(x)
    rope = model.transformer.rotary_pos_emb(x, torch.arange(4)[None])
    x = normed + block.self_attention(normed, rope)[0]
    normed = block.post_attention_layernorm(x)
    close(output.hidden_states[1], normed + block.mlp(normed))


def test_fp32_residual(small_model):
    model = small_model(fp32_residual_connection=True).half()
    seen = []
    model.transformer.encoder.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert model(random_ids(model, 1, 4)).logits.dtype == torch.float16
    assert seen == [torch.float32]


# Training


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("pre_seq_len", [None, 3])
def test_gradient_checkpointing(small_model, use_reentrant, pre_seq_len):
    model = small_model(pre_seq_len=pre_seq_len)
    ids = random_ids(model, 2, 6)

    def gradients():
        model.train()
        if pre_seq_len:
            model.transformer.prefix_dropout.p = 0.0
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients()
    assert expected and expected.keys() == actual.keys()
    for name in expected:
        close(actual[name], expected[name])


def test_prefix_tuning_trains_the_prefix_only(small_model):
    model = small_model(pre_seq_len=4)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["transformer.prefix_encoder.embedding.weight"]
    half = model.half()
    half.transformer.prefix_encoder.float()  # as the published scripts train it
    half.train()(random_ids(model, 2, 5), labels=random_ids(model, 2, 5)).loss.backward()
    assert half.transformer.prefix_encoder.embedding.weight.grad.abs().sum() > 0


def test_fresh_prefix_is_initialized_as_published(chatglm):
    """As torch does: the published scripts' learning rates are made for it."""
    config = chatglm.ChatGLMConfig(**SMALL, pre_seq_len=64, prefix_projection=True)
    encoder = chatglm.ChatGLMForConditionalGeneration(config).transformer.prefix_encoder
    assert abs(encoder.embedding.weight.std() - 1) < 0.1
    bound = encoder.trans[2].in_features ** -0.5
    assert 0.9 * bound < encoder.trans[2].weight.abs().max() <= bound


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_masks_do_not_cover_the_prefix(small_model, attn_implementation):
    model = small_model(pre_seq_len=3, attn_implementation=attn_implementation)
    ids = random_ids(model, 2, 4)
    visible = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(ids).logits
    for mask in (visible, additive, torch.ones(2, 4, dtype=torch.long)):
        close(model(ids, attention_mask=mask).logits, expected)
    close(model(ids, full_attention_mask=~visible).logits, expected)


def test_peft(small_model):
    """LoRA with PEFT's own default targets; prompt tuning and prefix tuning, which pass embeddings and caches."""
    peft = pytest.importorskip("peft")
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = peft.get_peft_model(small_model(), config)
        ids = random_ids(model, 2, 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert grads and all(g is not None for g in grads), config
        model.eval()
        assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape == (2, 8)


@pytest.mark.parametrize(
    "labels", [torch.tensor([1, 0]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])], ids=["single", "multi"]
)
def test_sequence_classification_loss(small_model, chatglm, labels):
    model = small_model(model_class=chatglm.ChatGLMForSequenceClassification, num_labels=3)
    output = model(random_ids(model, 2, 5), labels=labels)
    functions = torch.nn.functional
    expected = (
        functions.cross_entropy(output.logits, labels)
        if labels.dtype == torch.long
        else functions.binary_cross_entropy_with_logits(output.logits, labels)
    )
    close(output.loss, expected)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sequence_classification_takes_the_last_token(small_model, chatglm):
    """With a mask or without, wherever the padding is."""
    model = small_model(model_class=chatglm.ChatGLMForSequenceClassification, num_labels=3)
    ids = random_ids(model, 1, 5)
    expected = model(ids).logits
    right = torch.cat((ids, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    mask = (right != 0).long()
    close(model(right).logits, expected)
    close(model(right, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_classifiers_return_what_the_network_does(small_model, chatglm, head):
    """Hidden states, attentions and, on request, the cache."""
    model = small_model(model_class=getattr(chatglm, f"ChatGLMFor{head}"), attn_implementation="eager")
    ids, options = random_ids(model, 2, 5), dict(output_hidden_states=True, output_attentions=True)
    output, expected = model(ids, **options), model.transformer(ids, **options)
    for name in ("hidden_states", "attentions"):
        assert len(output[name]) == len(expected[name])
        assert all(torch.equal(a, b) for a, b in zip(output[name], expected[name]))
    if head == "SequenceClassification":
        assert model(ids, use_cache=True).past_key_values.get_seq_length() == 5
        assert model(ids, use_cache=False).past_key_values is None


def test_device_of_a_new_model(chatglm):
    for head in ("ConditionalGeneration", "SequenceClassification"):
        model_class, config = getattr(chatglm, f"ChatGLMFor{head}"), chatglm.ChatGLMConfig(**SMALL)
        assert model_class(config).device.type == "cpu"
        assert model_class(config, device="meta").device.type == "meta"


def test_token_classification(small_model, chatglm):
    model = small_model(model_class=chatglm.ChatGLMForTokenClassification, num_labels=3)
    labels = torch.randint(0, 3, (2, 5))
    output = model(random_ids(model, 2, 5), labels=labels)
    assert output.logits.shape == (2, 5, 3)
    close(output.loss, torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_short_inputs_with_a_prefix_equal_the_beginning_of_longer_ones(small_model, attn_implementation):
    model = small_model(pre_seq_len=3, attn_implementation=attn_implementation)
    ids = random_ids(model, 2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        for length in range(1, 6):
            close(model(ids[:, :length]).logits, expected[:, :length])


# Embeddings


def test_resize_and_tie(small_model, tmp_path, chatglm):
    model = small_model()
    logits = model(random_ids(model, 1, 4)).logits
    model.resize_token_embeddings(140)
    assert (model.config.padded_vocab_size, model.config.vocab_size) == (140, 140)
    close(model(random_ids(small_model(), 1, 4)).logits[..., :128], logits)

    tied = small_model(tie_word_embeddings=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    tied.save_pretrained(tmp_path)
    again = chatglm.ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    close(again(random_ids(tied, 1, 4)).logits, tied(random_ids(tied, 1, 4)).logits)


# Generation


@pytest.mark.parametrize(
    "options",
    [
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=3),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=str,
)
def test_generation_modes_agree(small_model, options):
    model = small_model(5)
    ids = random_ids(model, 1, 9)
    expected = model.generate(ids, do_sample=False, max_new_tokens=10)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=10, **options), expected)


def test_beam_search_reorders_the_cache(small_model):
    model = small_model(5)
    ids, mask = left_padded(random_ids(model, 2, 9), (9, 5))
    kwargs = dict(attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=8)
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs))


@pytest.mark.parametrize("lengths", [(5, 11, 8), (7,)], ids=str)
def test_continuous_batching(small_model, lengths):
    """Paged attention: several requests at once, of different lengths, or a single one, answered as one by one."""
    model = small_model(5, attn_implementation="sdpa", seq_length=256)
    prompts = [random_ids(model, n, seed=n).tolist() for n in lengths]
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
    outputs = generate_batch(model, prompts, config)
    model.set_attn_implementation("sdpa")
    for prompt, output in zip(prompts, outputs):
        single = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert output == single[0, len(prompt) :].tolist()


def test_compiled_equals_eager(small_model):
    model = small_model()
    ids = random_ids(model, 2, 6)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        close(compiled(ids, use_cache=False).logits, expected)
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=cache)
        step = dict(position_ids=torch.full((2, 1), 6), use_cache=True)
        dynamic = DynamicCache()
        model(ids, past_key_values=dynamic)
        expected = model(ids[:, :1], past_key_values=dynamic, **step).logits
        close(compiled(ids[:, :1], past_key_values=cache, **step).logits, expected)


# Bad input


@pytest.mark.parametrize("bad", [128, -1])
def test_ids_outside_the_vocabulary(small_model, bad):
    model = small_model()
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, 128\).* got {bad}"):
        model(torch.tensor([[3, bad]]))


def test_ids_and_embeddings_at_once(small_model):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        small_model()()


def test_positions_beyond_the_context(small_model, chatglm, logs):
    model = small_model()
    chatglm.checks.logger.warning_once.cache_clear()
    model(random_ids(model, 1, 3), position_ids=torch.tensor([[62, 63, 64]]))
    model(random_ids(model, 1, 3), position_ids=torch.tensor([[63, 64, 65]]))
    assert logs.text.count("beyond the 64 that this model was made for") == 1


@pytest.mark.parametrize("do_sample", [True, False])
def test_invalid_logits_end_their_row(small_model, chatglm, logs, do_sample):
    model = small_model(5)
    ids = random_ids(model, 2, 5)
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)
    embedding = model.get_input_embeddings().weight
    bad = 1
    assert bad not in ids
    with torch.no_grad():
        embedding[bad] = float("nan")
    ids[1, 2] = bad
    processors = LogitsProcessorList([chatglm.generation.InvalidScoreLogitsProcessor(2)])
    output = model.generate(ids, do_sample=do_sample, max_new_tokens=4, logits_processor=processors)
    assert output[1, 5:].tolist() == [2, 0, 0, 0]
    assert "row(s) [1]" in logs.text
    if not do_sample:
        assert torch.equal(output[0], expected[0])


def test_infinite_logits(chatglm):
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[0, 1, 2], [-inf, 1, -inf], [0, inf, 2], [-inf, nan, 2], [-inf, -inf, -inf]])
    ended = chatglm.generation.InvalidScoreLogitsProcessor(2)(None, scores)
    assert torch.equal(ended[:2], scores[:2]) and ended[2:].tolist() == [[-inf, -inf, 0]] * 3


# The cache


def test_growing_layer_equals_the_library_s(chatglm):
    """Whatever is done to it between steps; and most steps do not copy what is cached."""
    torch.manual_seed(0)
    growing, plain = chatglm.cache.GrowingLayer(), DynamicLayer()
    copies = []

    def update(length):
        before = growing.keys.data_ptr() if growing.is_initialized else None
        new = torch.randn(2, growing.keys.shape[0] if growing.is_initialized else 2, 3, length, 8)
        for got, expected in zip(growing.update(*new), plain.update(*new)):
            assert torch.equal(got, expected)
        copies.append(growing.keys.data_ptr() != before)

    def both(method, *args):
        for layer in (growing, plain):
            getattr(layer, method)(*args)
        assert torch.equal(growing.keys, plain.keys) and torch.equal(growing.values, plain.values)

    with torch.no_grad():
        update(100)
        for _ in range(50):
            update(1)
        assert sum(copies) == 2  # the first, which the library's layer makes, and when room was made
        both("crop", -30)
        update(7)
        assert not copies[-1]
        both("batch_repeat_interleave", 2)
        update(1)
        both("batch_select_indices", torch.tensor([3, 0]))
        update(200)
        both("reorder_cache", torch.tensor([1, 0]))
        update(1)
        held = copy.deepcopy(growing)
        update(1)
        assert torch.equal(held.keys, plain.keys[:, :, :-1])
        held.update(*torch.randn(2, 2, 3, 1, 8))
        assert torch.equal(growing.keys, plain.keys)


def test_gradients_through_a_cache_equal_those_without(small_model):
    model = small_model()
    ids, gradients = random_ids(model, 2, 8), []
    for chunks in ([ids], [ids[:, :5], ids[:, 5:7], ids[:, 7:]]):
        cache = DynamicCache(config=model.config)
        logits = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], dim=1)
        logits.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-2, rtol=1e-3, msg=name)


def test_steps_do_not_copy_the_cache(small_model):
    """`generate` and the forward make such caches by themselves, other kinds are left as they are."""
    model = small_model()
    ids = random_ids(model, 1, 5)
    output = model.generate(ids, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    assert {type(layer).__name__ for layer in output.past_key_values.layers} == {"GrowingLayer"}
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        address = cache.layers[0].keys.data_ptr()
        model(ids[:, :1], past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == address
    own = DynamicCache(config=model.config)
    model.generate(ids, past_key_values=own, max_new_tokens=3, min_new_tokens=3)
    assert own.get_seq_length() == 7


def test_cache_out_of_inference_mode(small_model):
    model = small_model()
    ids = random_ids(model, 1, 5)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
    with torch.no_grad():
        logits = model(ids[:, :1], past_key_values=cache).logits
        close(logits, model(torch.cat((ids, ids[:, :1], ids[:, :1]), 1)).logits[:, -1:])


def test_one_token_with_a_mask_for_each_head(small_model):
    model = small_model()
    ids = random_ids(model, 1, 3)
    mask = torch.zeros(1, 4, 1, 3)
    mask[0, 1, 0, 0] = -torch.inf
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(ids[:, :2], use_cache=True).past_key_values
            outputs[implementation] = model(ids[:, 2:], attention_mask=mask, past_key_values=cache).logits
    close(outputs["sdpa"], outputs["eager"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_of_groups_equals_eager(small_model, masked, new, dtype):
    """Without copies of keys and values: a single token, and on the CPU several."""
    model = small_model(multi_query_group_num=2).to(dtype)
    ids = random_ids(model, 2, 12)
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :3] = 0
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            cache = model(ids[:, :-new], attention_mask=mask[:, :-new], use_cache=True).past_key_values
            logits[implementation] = model(ids[:, -new:], attention_mask=mask, past_key_values=cache).logits
    error = (logits["sdpa"] - logits["eager"]).abs().max() / logits["eager"].abs().max()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_traced_equals_eager(small_model, attn_implementation):
    """TorchScript, by which torch's legacy ONNX export and OpenVINO's converter read a model."""
    model = small_model(attn_implementation=attn_implementation)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    ids, mask = left_padded(random_ids(model, 2, 7), (7, 4))
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), (ids, mask), check_trace=False)
        longer, longer_mask = left_padded(random_ids(model, 3, 11), (11, 2, 6))
        for inputs in ((ids, mask), (longer, longer_mask)):
            close(traced(*inputs)[inputs[1].bool()], Logits()(*inputs)[inputs[1].bool()])


def test_early_exit_decoding(small_model):
    model = small_model(5, num_layers=4)
    ids = random_ids(model, 1, 6)
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)
    assert torch.equal(model.generate(ids, assistant_early_exit=2, do_sample=False, max_new_tokens=8), expected)
    assert model.config.num_layers == 4


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, dict(prefill_chunk_size=4), dict(cache_implementation="static")], ids=str)
def test_prefix_is_seen_whatever_the_cache(small_model, attn_implementation, options):
    """P-Tuning: the logits of each step are those of a forward over the whole text, and the cache holds tokens only."""
    model = small_model(5, pre_seq_len=3, attn_implementation=attn_implementation)
    ids, mask = left_padded(random_ids(model, 2, 9), (9, 5))
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=4, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **options
    )  # fmt: skip
    for row, length in ((0, 9), (1, 5)):
        whole = output.sequences[row : row + 1, 9 - length : -1]
        with torch.no_grad():
            expected = model(whole, use_cache=False).logits[0, -4:]
        close(torch.stack(output.logits, dim=1)[row], expected)
    assert int(output.past_key_values.get_seq_length()) == 9 + 3


def test_projected_prefix_is_computed_once(small_model):
    model = small_model(5, pre_seq_len=3, prefix_projection=True)
    ids, calls = random_ids(model, 1, 6), []
    model.transformer.prefix_encoder.trans.register_forward_hook(lambda *args: calls.append(1))
    options = dict(
        do_sample=False, max_new_tokens=5, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    output = model.generate(ids, **options)
    assert len(calls) == 1
    whole = model(output.sequences[:, :-1], use_cache=False)  # with gradients, and so computed
    close(torch.stack(output.logits, dim=1), whole.logits[:, -5:])
    assert len(calls) == 2 and whole.logits.requires_grad
    with torch.no_grad():
        model.transformer.prefix_encoder.trans[0].bias.add_(1.0)
        changed = model(ids).logits
        fresh = small_model(5, pre_seq_len=3, prefix_projection=True)
        fresh.load_state_dict(model.state_dict())
        close(changed, fresh(ids).logits)
    assert len(calls) == 3


def test_prefix_with_continuous_batching(small_model, chatglm):
    from transformers import GenerationConfig

    model = small_model(5, pre_seq_len=3, seq_length=256)
    prompts = [random_ids(model, n, seed=n).tolist() for n in (5, 11)]
    config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
    if not chatglm.compat.CONTINUOUS_BATCHING_TAKES_A_PREFIX:
        with pytest.raises(ValueError, match="needs Transformers 5.24"):
            model(torch.tensor(prompts[:1]), cache=object(), position_ids=torch.arange(5)[None])
        return
    outputs = generate_batch(model, prompts, config)
    model.set_attn_implementation("sdpa")
    for prompt, output in zip(prompts, outputs, strict=True):
        single = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert output == single[0, len(prompt) :].tolist()


def test_prefix_with_flex_attention_is_refused(small_model):
    model = small_model(pre_seq_len=3, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' does not work with a P-Tuning prefix"):
        model(random_ids(model, 1, 5))

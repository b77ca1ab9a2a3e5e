"""Transformers releases: both names of the KV cache, no argument swallowed, and the check on releases not yet tested."""

import inspect
import logging
import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, Trainer, TrainingArguments, pipeline

from conftest import TINY, generate_batch


GREEDY = dict(do_sample=False, max_new_tokens=6)
HEADS = ["ForConditionalGeneration", "Model", "ForSequenceClassification", "ForTokenClassification"]


def random_ids(*shape, seed=0):
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# The two names of the cache


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("head", HEADS)
def test_forward_takes_either_name(small_model, chatglm, head, name):
    model, ids = small_model(model_class=getattr(chatglm, f"ChatGLM{head}")), random_ids(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], **{name: cache})
        assert cache.get_seq_length() == 5
        output = model(ids[:, 5:], **{name: cache})
        expected = model(ids)
    if head == "ForSequenceClassification":
        close(output[0], expected[0])
    else:
        close(output[0], expected[0][:, 5:])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_takes_either_name(small_model, tiny_tokenizer, name):
    model, ids = small_model(5), random_ids(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    assert torch.equal(model.generate(ids, **{name: cache}, **GREEDY), model.generate(ids, **GREEDY))
    assert cache.get_seq_length() == 8 + 6 - 1

    steps = list(model.stream_generate(ids, **{name: DynamicCache(config=model.config)}, **GREEDY))
    assert torch.equal(steps[-1], model.generate(ids, **GREEDY))

    model = small_model(5, padded_vocab_size=8064, seq_length=256)
    _, history, cache = model.chat(tiny_tokenizer, "你好", return_past_key_values=True, **GREEDY)
    expected = model.chat(tiny_tokenizer, "再见", history, **GREEDY)
    assert model.chat(tiny_tokenizer, "再见", history, **{name: cache}, **GREEDY) == expected
    *_, streamed = model.stream_chat(tiny_tokenizer, "再见", history, **{name: cache}, **GREEDY)
    assert streamed == expected


def test_outputs_have_the_cache(small_model, chatglm):
    output = small_model()(random_ids(1, 4), use_cache=True)
    assert output.past_key_values.get_seq_length() == 4
    assert output[chatglm.compat.CACHE_NAME] is output.past_key_values
    assert small_model()(random_ids(1, 4), use_cache=False).past_key_values is None


def test_both_names_at_once_are_refused(small_model):
    model, caches = small_model(), [DynamicCache() for _ in range(2)]
    for call in (model, model.generate):
        with pytest.raises(TypeError, match="two names of one argument"):
            call(random_ids(1, 4), cache=caches[0], past_key_values=caches[1])


def test_signatures_have_the_name_of_the_release(small_model, chatglm):
    name = chatglm.compat.CACHE_NAME
    for model_class in (getattr(chatglm, f"ChatGLM{head}") for head in HEADS):
        assert name in inspect.signature(model_class.forward).parameters
    assert name in inspect.signature(small_model().prepare_inputs_for_generation).parameters


def test_no_deprecation_messages(chatglm, tiny_tokenizer, logs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = chatglm.ChatGLMForConditionalGeneration.from_pretrained(TINY)
        _, history, cache = model.chat(tiny_tokenizer, "你好", return_past_key_values=True, **GREEDY)
        model.chat(tiny_tokenizer, "再见", history, past_key_values=cache, **GREEDY)
        list(model.stream_chat(tiny_tokenizer, "你好", past_key_values=cache, return_past_key_values=True, **GREEDY))
        list(model.stream_generate(torch.tensor([[5, 6, 7]]), **GREEDY))
        model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)
    assert "deprecated" not in logs.text and "will be removed" not in logs.text


def test_forward_warns_of_the_old_name(small_model, chatglm):
    """As the library's own models do, on the releases that have the new name."""
    is_old = chatglm.compat.CACHE_NAME == "cache"
    for name, is_warned in (("past_key_values", is_old), ("cache", False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            small_model()(random_ids(1, 4), **{name: DynamicCache()})
        assert any("`past_key_values` is deprecated" in str(warning.message) for warning in caught) == is_warned


# Arguments


@pytest.mark.parametrize("head", HEADS)
def test_unknown_argument_is_refused(small_model, chatglm, monkeypatch, head):
    monkeypatch.setattr(chatglm.checks, "NEWEST_TESTED", chatglm.compat.RELEASE)
    model = small_model(model_class=getattr(chatglm, f"ChatGLM{head}"))
    with pytest.raises(TypeError, match=rf"ChatGLM{head}.forward\(\) got an unexpected keyword argument 'kv_store'"):
        model(random_ids(1, 4), kv_store=object())


@pytest.fixture
def passed(chatglm, monkeypatch):
    """Collects the names that reach the forwards beyond their own parameters."""
    names = set()
    for head in HEADS:
        model_class = getattr(chatglm, f"ChatGLM{head}")
        original = model_class.forward
        own = {*inspect.signature(original).parameters, "cache", "past_key_values"}

        def forward(self, *args, original=original, own=own, **kwargs):
            names.update(kwargs.keys() - own)
            return original(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(original)
        monkeypatch.setattr(model_class, "forward", forward)
    return names


def test_library_passes_only_known_arguments(chatglm, small_model, tiny_tokenizer, passed, tmp_path):
    """On the release at hand, whichever it is: generation, Trainer, pipelines and continuous batching."""
    model, ids = small_model(5, seq_length=256), random_ids(1, 8)
    for options in (
        dict(num_beams=2),
        dict(prompt_lookup_num_tokens=2),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=3),
        dict(output_hidden_states=True, return_dict_in_generate=True),
        dict(stop_strings=["a"], tokenizer=tiny_tokenizer),
    ):
        model.generate(ids, **GREEDY, **options)
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(2, 1).tolist()]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    Trainer(small_model(), arguments, train_dataset=rows, eval_dataset=rows).train()
    config = GenerationConfig(do_sample=False, max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
    generate_batch(model.eval(), ids.tolist(), config)

    language_model = chatglm.ChatGLMForConditionalGeneration.from_pretrained(TINY)
    pipeline("text-generation", model=language_model, tokenizer=tiny_tokenizer)("你好", max_new_tokens=2)
    for task, head in (("text-classification", "Sequence"), ("token-classification", "Token")):
        classifier = getattr(chatglm, f"ChatGLMFor{head}Classification")(language_model.config).eval()
        pipeline(task, model=classifier, tokenizer=tiny_tokenizer)("你好")
    assert passed <= chatglm.checks.PASSED_THROUGH
    assert passed >= {
        "output_hidden_states",
        "return_dict",
        "num_items_in_batch",
        "read_index",
        "tokenizer",
        "write_index",
    }


# Releases newer than the tested ones


@pytest.fixture
def newer(chatglm, monkeypatch):
    """Lets the installed release seem newer than the tested ones, in a process that has not been checked."""
    monkeypatch.setattr(chatglm.checks, "NEWEST_TESTED", (5, 0))
    monkeypatch.setattr(chatglm.checks, "_check_result", None)
    return chatglm.checks


def test_newer_release_that_works(newer, small_model, logs, caplog):
    for name in (None, "transformers"):
        caplog.set_level(logging.INFO, logger=name)
    model, ids = small_model(), random_ids(1, 4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert torch.equal(torch.rand(1), expected)
    assert logs.text.count("its ways to generate agree") == 1

    newer.logger.warning_once.cache_clear()
    for _ in range(2):
        close(model(ids, kv_store=1).logits, model(ids).logits)
    assert logs.text.count("unexpected keyword argument 'kv_store'. It is ignored") == 1


def test_newer_release_compiles_without_the_check(newer, small_model):
    model, ids = small_model(), random_ids(1, 4)
    expected = model(ids).logits
    newer._check_result = None
    with torch.no_grad():
        close(torch.compile(model, backend="eager", fullgraph=True)(ids).logits, expected)
    assert newer._check_result is None


@pytest.mark.parametrize("use", ["forward", "generate", "classifier"])
def test_newer_release_that_breaks_the_cache(newer, chatglm, small_model, monkeypatch, use):
    """As 5.24 did: every step sees one token and no past."""
    monkeypatch.setattr(chatglm.modeling, "update_cache", lambda cache, key, value, layer_idx, kwargs: (key, value))
    kind = "ForSequenceClassification" if use == "classifier" else "ForConditionalGeneration"
    model = small_model(model_class=getattr(chatglm, f"ChatGLM{kind}"))
    call = model.generate if use == "generate" else model
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"gives wrong results on Transformers .* tested up to 5\.0\. Install that"
        ):
            call(random_ids(1, 4))


def test_newer_release_that_renames_an_argument(newer, chatglm, small_model, monkeypatch):
    monkeypatch.setattr(chatglm.generation, "rename_cache", lambda kwargs: {**kwargs, "kv_store": 1})
    with pytest.raises(RuntimeError, match="gives wrong results on Transformers .*kv_store"):
        small_model()(random_ids(1, 4))


# Sections of compat_chatglm.py


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_peft_prompts_with_a_cache_equal_those_without(small_model, kind):
    peft = pytest.importorskip("peft")
    configs = {"PROMPT_TUNING": peft.PromptTuningConfig, "PREFIX_TUNING": peft.PrefixTuningConfig}
    torch.manual_seed(0)
    base = small_model(5)
    model = peft.get_peft_model(base, configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids = random_ids(1, 8)
    options = dict(eos_token_id=None, output_logits=True, return_dict_in_generate=True, **GREEDY)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    with torch.no_grad():
        all_ids = output.sequences[:, :-1]
        expected = model(input_ids=all_ids, attention_mask=torch.ones_like(all_ids)).logits[:, -6:]
        close(torch.stack(output.logits, dim=1), expected)
        assert (base(all_ids).logits[:, -6:] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("static", [False, True])
def test_assisted_decoding_from_a_cache(small_model, chatglm, static):
    if static and chatglm.compat.RELEASE < (5, 24):
        pytest.skip("before 5.24 the library refuses static caches in assisted decoding")
    for seed in (0, 2, 3):  # random models, some of which repeat one token whatever they read
        model, ids = small_model(seed, seq_length=128), random_ids(1, 12, seed=seed)
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :7], past_key_values=cache)
        output = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
        assert torch.equal(output, model.generate(ids, **GREEDY))


def test_label_smoothing_shifts_labels(small_model, tmp_path):
    """Trainer does so only for classes of language models that it knows by name."""
    model, ids = small_model(), random_ids(2, 8)
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    close(loss, expected)

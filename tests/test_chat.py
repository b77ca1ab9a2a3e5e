"""Chat: the published results, caches that stay right whatever happens between rounds, limits, and bad input."""

import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
)

from conftest import SMALL


GREEDY = dict(do_sample=False, max_new_tokens=8)
QUERIES = ["你好", "Hello, how are you?", "再见"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture(scope="module")
def model(small_model, tokenizer):
    return small_model(11, padded_vocab_size=8064, seq_length=512)


def uncached_answer(model, ids, limit=8):
    """Greedy decoding by forwards over all ids, without a cache."""
    answer = []
    while len(answer) < limit:
        logits = model(torch.tensor([ids + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == 2:
            break
    return answer


def test_chat_is_generate_on_the_prompt(model, tokenizer):
    history = [("a", "b")]
    response, new_history = model.chat(tokenizer, "你好", history, **GREEDY)
    inputs = model.build_inputs(tokenizer, "你好", history)
    output = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert response == model.process_response(tokenizer.decode(output, skip_special_tokens=True))
    assert new_history == [("a", "b"), ("你好", response)]
    assert history == [("a", "b")]  # the caller's list is not touched


def test_published_position_of_arguments(model, tokenizer):
    """chat(tokenizer, query, history, max_length, num_beams, do_sample, top_p, temperature, logits_processor)"""
    response, _ = model.chat(tokenizer, "你好", [], 30, 1, False, 0.8, 0.8, None)
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", [], None, 30, False, 0.8, 0.8, None)
    assert response == streamed


def test_stream_chat(model, tokenizer):
    expected, history = model.chat(tokenizer, "你好", **GREEDY)
    steps = list(model.stream_chat(tokenizer, "你好", **GREEDY))
    assert len(steps) > 1
    assert steps[-1] == (expected, history)
    for response, history in steps:
        assert history == [("你好", response)]
        assert not response.endswith("\ufffd") or response == expected  # half a character is not shown


def test_stream_generate(model, tokenizer):
    inputs = tokenizer(["你好", "Hello there"], return_tensors="pt", padding=True)
    expected = model.generate(**inputs, **GREEDY)
    steps = list(model.stream_generate(**inputs, **GREEDY))
    n = inputs["input_ids"].shape[1]
    assert [step.shape[1] for step in steps] == list(range(n + 1, n + 9))
    assert torch.equal(steps[-1], expected)
    for step in steps:
        assert torch.equal(step, expected[:, : step.shape[1]])
    # FastChat passes a plain list of processors
    (*_, (last, cache)) = model.stream_generate(
        **inputs, **GREEDY, logits_processor=[KeepProcessor()], return_past_key_values=True
    )
    assert torch.equal(last, expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


class KeepProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def test_seeded_sampling(model, tokenizer):
    answers = []
    for _ in range(2):
        torch.manual_seed(7)
        answers.append(model.chat(tokenizer, "你好", max_new_tokens=8)[0])
        torch.manual_seed(7)
        answers.append(list(model.stream_chat(tokenizer, "你好", max_new_tokens=8))[-1][0])
    assert len(set(answers)) == 1
    torch.manual_seed(8)
    assert model.chat(tokenizer, "你好", max_new_tokens=8, temperature=2.0)[0] not in answers
    greedy = model.chat(tokenizer, "你好", **GREEDY)[0]
    assert model.chat(tokenizer, "你好", temperature=0, max_new_tokens=8)[0] == greedy


def test_options_pass_through(model, tokenizer):
    processors = LogitsProcessorList([KeepProcessor()])
    model.chat(tokenizer, "你好", logits_processor=processors, **GREEDY)
    assert len(processors) == 1  # published: grows at each call
    plain, _ = model.chat(tokenizer, "你好", **GREEDY)
    config = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    assert model.chat(tokenizer, "你好", generation_config=config)[0] == plain
    assert model.chat(tokenizer, "你好", cache_implementation="static", **GREEDY)[0] == plain
    assert model.chat(tokenizer, "你好", prompt_lookup_num_tokens=3, **GREEDY)[0] == plain
    assert isinstance(model.chat(tokenizer, "你好", num_beams=2, **GREEDY)[0], str)


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": list(range(3, 500))},
        {"begin_suppress_tokens": list(range(3, 500))},
        {"bad_words_ids": [[i] for i in range(3, 500)]},
        {"min_new_tokens": 4},
        {"no_repeat_ngram_size": 1},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(500, 600))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_tokens_that_are_not_allowed(model, tokenizer, logs, options):
    """Their logits are minus infinity, and the answer goes on."""
    inputs = model.build_inputs(tokenizer, "你好")
    output = model.generate(**inputs, **GREEDY, **options)[0, inputs["input_ids"].shape[1] :]
    response = model.chat(tokenizer, "你好", **GREEDY, **options)[0]
    assert response == model.process_response(tokenizer.decode(output)) != ""
    assert list(model.stream_chat(tokenizer, "你好", **GREEDY, **options))[-1][0] == response
    assert "infinite" not in logs.text


# Rounds that reuse the cache


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_rounds_equal_a_forward_over_the_same_ids(model, tokenizer, stream, attn_implementation):
    model.set_attn_implementation(attn_implementation)

    def chat(query, history, cache):
        kwargs = dict(past_key_values=cache, return_past_key_values=True, **GREEDY)
        if stream:
            return list(model.stream_chat(tokenizer, query, history, **kwargs))[-1]
        return model.chat(tokenizer, query, history, **kwargs)

    history, cache, ids = [], None, []
    for i, query in enumerate(QUERIES, start=1):
        response, history, cache = chat(query, history, cache)
        text = f"[Round {i}]\n\n问：{query}\n\n答："
        if i == 1:
            ids = tokenizer(text)["input_ids"]
        else:
            ids += tokenizer.encode("\n\n" + text, add_special_tokens=False)[1:]
        answer = uncached_answer(model, ids)
        ids += [token for token in answer if token != 2]
        assert cache.chat_record.ids[: len(ids)] == ids
        assert history[-1] == (query, response)
        keys = model(torch.tensor([ids])).past_key_values.layers[1].keys
        n = min(cache.get_seq_length(), len(ids))
        assert n >= len(ids) - 1
        torch.testing.assert_close(cache.layers[1].keys[:, :, :n], keys[:, :, :n], atol=1e-4, rtol=1e-4)


@pytest.fixture
def computed(model):
    """Counts the positions that the model computes."""
    counts = []
    hook = model.transformer.embedding.register_forward_hook(
        lambda module, args, output: counts.append(output.shape[1])
    )
    yield counts
    hook.remove()


def test_the_second_round_computes_only_what_is_new(model, tokenizer, computed):
    _, history, cache = model.chat(tokenizer, "long " * 50, return_past_key_values=True, **GREEDY)
    computed.clear()
    model.chat(tokenizer, "b", history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    assert computed[0] < 25


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_stream(model, tokenizer, stop_after):
    """What was shown of the answer is in the history, and exactly that is in the context of the next round."""
    threads = threading.active_count()
    for i, (response, history, cache) in enumerate(
        model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY), start=1
    ):
        if i == stop_after:
            break
    assert threading.active_count() == threads
    shown = cache.chat_record.ids[: cache.chat_record.ends[-1]]
    assert history == [("你好", response)]
    assert (
        model.process_response(tokenizer.decode(shown[len(tokenizer(tokenizer.build_prompt("你好"))["input_ids"]) :]))
        == response
    )
    _, _, cache = model.chat(tokenizer, "b", history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    ids = shown + tokenizer.encode("\n\n[Round 2]\n\n问：b\n\n答：", add_special_tokens=False)[1:]
    assert cache.chat_record.ids == ids + uncached_answer(model, ids)


def test_stream_stands_still_between_steps(model, tokenizer):
    stream = model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    _, _, cache = next(stream)
    length = cache.get_seq_length()
    threading.Event().wait(0.1)
    assert cache.get_seq_length() == length
    stream.close()
    assert cache.get_seq_length() == length


def test_after_max_length(model, tokenizer):
    """The published cache lacks the last token of an answer that max_length cut."""
    n = len(tokenizer(tokenizer.build_prompt("你好"))["input_ids"])
    _, history, cache = model.chat(tokenizer, "你好", max_length=n + 3, do_sample=False, return_past_key_values=True)
    cut = cache.chat_record.ids
    assert len(cut) == n + 3
    _, _, cache = model.chat(tokenizer, "b", history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    ids = cut + tokenizer.encode("\n\n[Round 2]\n\n问：b\n\n答：", add_special_tokens=False)[1:]
    assert cache.chat_record.ids == ids + uncached_answer(model, ids)


class EndProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([2]), 0.0)


def test_empty_answers(model, tokenizer):
    history, cache = [], None
    for _ in range(2):
        *_, (response, history, cache) = model.stream_chat(
            tokenizer,
            "a",
            history,
            past_key_values=cache,
            logits_processor=[EndProcessor()],
            return_past_key_values=True,
            **GREEDY,
        )
    assert history == cache.chat_record.rounds == [("a", ""), ("a", "")]


def test_edited_history(model, tokenizer, computed):
    """Rounds before the edit are reused; from there on the history's text counts."""
    history, cache = [], None
    for query in QUERIES:
        _, history, cache = model.chat(
            tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **GREEDY
        )
    kept = cache.chat_record.ids[: cache.chat_record.ends[0]]
    edited = [history[0], (QUERIES[1], "An answer that the user has written.")]
    computed.clear()
    _, new_history, cache = model.chat(
        tokenizer, "b", edited, past_key_values=cache, return_past_key_values=True, **GREEDY
    )
    tail = f"\n\n[Round 2]\n\n问：{QUERIES[1]}\n\n答：{edited[1][1]}\n\n[Round 3]\n\n问：b\n\n答："
    ids = kept + tokenizer.encode(tail, add_special_tokens=False)[1:]
    assert cache.chat_record.ids == ids + uncached_answer(model, ids)
    assert computed[0] <= len(ids) - len(kept)
    assert new_history[:2] == edited

    _, _, cache = model.chat(tokenizer, "c", [], past_key_values=cache, return_past_key_values=True, **GREEDY)
    ids = tokenizer(tokenizer.build_prompt("c"))["input_ids"]
    assert cache.chat_record.ids == ids + uncached_answer(model, ids)


def test_history_that_chat_did_not_make(model, tokenizer):
    """A dialogue that begins with a given history: its rounds are known apart, and can be dropped."""
    _, history, cache = model.chat(
        tokenizer, "second", [("first question", "first answer")], return_past_key_values=True, **GREEDY
    )
    assert cache.chat_record.rounds == history and len(cache.chat_record.ends) == 2
    _, _, cache = model.chat(
        tokenizer, "third", history[1:], past_key_values=cache, return_past_key_values=True, **GREEDY
    )
    text = tokenizer.decode(cache.chat_record.ids, skip_special_tokens=True)
    assert "first question" not in text and text.count("[Round ") == 2
    prompt = tokenizer(tokenizer.build_prompt("third", history[1:]))["input_ids"]
    assert cache.chat_record.ids == prompt + uncached_answer(model, prompt)


@pytest.mark.parametrize("steps", [1, 2])
def test_interrupted_prompt_lookup(model, tokenizer, steps):
    """Candidates that were rejected are in the cache when the stream stops."""
    query = "a b c a b c a b c a b c"
    stream = model.stream_chat(tokenizer, query, return_past_key_values=True, prompt_lookup_num_tokens=4, **GREEDY)
    for _ in range(steps):
        _, history, cache = next(stream)
    stream.close()
    shown = cache.chat_record.ids[: cache.chat_record.ends[-1]]
    _, _, cache = model.chat(tokenizer, "b", history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    prompt = shown + tokenizer.encode("\n\n[Round 2]\n\n问：b\n\n答：", add_special_tokens=False)[1:]
    assert cache.chat_record.ids == prompt + uncached_answer(model, prompt)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [1, 4])
def test_error_in_the_middle_of_a_forward(model, tokenizer, stream, after):
    """Out of memory, Ctrl-C: one layer has the new positions and the next has not. The round can be repeated."""
    _, history, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    kept = cache.chat_record.ids[: cache.chat_record.ends[-1]]
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == after:
            raise MemoryError("out of memory")

    hook = model.transformer.encoder.layers[1].register_forward_pre_hook(fail)
    options = dict(past_key_values=cache, return_past_key_values=True, **GREEDY)
    with pytest.raises(MemoryError):
        if stream:
            list(model.stream_chat(tokenizer, "b", history, **options))
        else:
            model.chat(tokenizer, "b", history, **options)
    hook.remove()
    _, _, cache = model.chat(tokenizer, "b", history, **options)
    prompt = kept + tokenizer.encode("\n\n[Round 2]\n\n问：b\n\n答：", add_special_tokens=False)[1:]
    assert cache.chat_record.ids == prompt + uncached_answer(model, prompt)


def test_stream_keeps_the_callers_context(model, tokenizer):
    dtypes = []
    hook = model.transformer.output_layer.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(model.stream_chat(tokenizer, "a", **GREEDY))
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}
    cache = StaticCache(config=model.config, max_cache_len=100)
    with torch.inference_mode():
        _, history, cache = model.chat(tokenizer, "a", past_key_values=cache, return_past_key_values=True, **GREEDY)
        list(model.stream_chat(tokenizer, "b", history, past_key_values=cache, **GREEDY))


def test_static_cache(model, tokenizer):
    histories = []
    for cache in (None, StaticCache(config=model.config, max_cache_len=200)):
        history = []
        for query in QUERIES:
            _, history, cache = model.chat(
                tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **GREEDY
            )
        histories.append(history)
    assert histories[0] == histories[1]


def test_prefix_tuned_rounds(small_model, tokenizer):
    model = small_model(11, padded_vocab_size=8064, seq_length=512, pre_seq_len=4)
    _, history, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    with_cache = model.chat(tokenizer, "b", history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    ids = with_cache[2].chat_record.ids
    n = len(ids) - 8
    assert ids[n:] == uncached_answer(model, ids[:n])
    assert with_cache[2].get_seq_length() == len(ids) - 1


# Batches


@pytest.mark.parametrize("with_history", [False, True])
def test_stream_inputs_continue_the_cache_of_the_history(model, tokenizer, with_history):
    """`build_stream_inputs`: the ids of the newest round, which follow those of the rounds before."""
    history = [("你好", "Hello"), ("b", "c")] if with_history else []
    inputs = model.build_stream_inputs(tokenizer, "再见", history)
    whole = model.build_inputs(tokenizer, "再见", history)["input_ids"][0].tolist()
    new = inputs["input_ids"][0].tolist()
    assert whole[-len(new) :] == new and inputs["attention_mask"].tolist() == [[1] * len(new)]
    if with_history:
        before = tokenizer.encode(tokenizer.build_prompt("b", history[:1]) + "c")
        assert whole == before + new
    else:
        assert whole == new


def test_batch_equals_single(model, tokenizer):
    histories = [[], [("a", "b"), ("c", "d")], None]
    responses, new_histories = model.chat(tokenizer, QUERIES, histories, **GREEDY)
    for query, history, response, new_history in zip(QUERIES, histories, responses, new_histories):
        assert (response, new_history) == model.chat(tokenizer, query, history, **GREEDY)
    limited, _ = model.chat(tokenizer, QUERIES, histories, do_sample=False, max_length=60)
    assert limited == [
        model.chat(tokenizer, q, h, do_sample=False, max_length=60)[0] for q, h in zip(QUERIES, histories)
    ]
    assert model.chat(tokenizer, [], []) == ([], [])


# Limits


def test_max_new_tokens(model, tokenizer, recwarn, logs):
    for n in (1, 5):
        _, _, cache = model.chat(
            tokenizer, "你好", do_sample=False, max_new_tokens=n, return_past_key_values=True, eos_token_id=None
        )
        assert len(cache.chat_record.ids) == len(tokenizer(tokenizer.build_prompt("你好"))["input_ids"]) + n
    assert "max_length" not in logs.text


def test_long_history_is_trimmed_by_rounds(model, tokenizer, logs):
    history = [(f"query {i} " + "word " * 30, "answer " * 10) for i in range(12)]
    _, new_history, cache = model.chat(tokenizer, "last", history, return_past_key_values=True, **GREEDY)
    assert "oldest of 12 rounds" in logs.text
    assert new_history[:12] == history and new_history[12][0] == "last"  # the caller keeps all of it
    text = tokenizer.decode(cache.chat_record.ids, skip_special_tokens=True)
    assert text.startswith("[Round 1]\n\n问：query ") and "last" in text
    assert len(cache.chat_record.ids) <= 512
    first = int(text.split("query ")[1].split()[0])
    with_one_more = tokenizer(tokenizer.build_prompt("last", history[first - 1 :]))["input_ids"]
    assert len(with_one_more) + 8 > 512  # no more was left out than had to be
    # The next round goes on from there, and reuses what it can.
    logs.clear()
    _, _, cache = model.chat(tokenizer, "b", new_history, past_key_values=cache, return_past_key_values=True, **GREEDY)
    assert len(cache.chat_record.ids) <= 512


def test_history_leaves_room_for_an_answer(model, tokenizer, logs):
    """Rounds are dropped before an answer would be cut to a few tokens."""
    n = 0
    while len(tokenizer(tokenizer.build_prompt("last", [("q", "word " * 20)] * n))["input_ids"]) < 500:
        n += 1
    history = [("q", "word " * 20)] * n
    model.chat(tokenizer, "last", history, do_sample=False, max_length=512, eos_token_id=None)
    assert "oldest of" in logs.text
    prompt = int(logs.text.split("its ")[1].split(" oldest")[0])
    kept = tokenizer(tokenizer.build_prompt("last", history[prompt:]))["input_ids"]
    assert 512 - len(kept) >= 128 and "The answer was cut" in logs.text


def test_query_longer_than_the_context(model, tokenizer):
    with pytest.raises(ValueError, match=r"The query is \d+ tokens long; at most 511 fit"):
        model.chat(tokenizer, "word " * 600)
    with pytest.raises(ValueError, match=r"The query is \d+ tokens long; at most 511 fit"):
        model.chat(tokenizer, "word " * 600, [("a", "b")] * 3)
    with pytest.raises(ValueError, match="max_length 20"):
        model.chat(tokenizer, "word " * 30, max_length=20)


def test_max_length_beyond_the_context(model, tokenizer, logs):
    model.chat(tokenizer, "你好", max_length=600, do_sample=False, stop_strings=None)
    assert "max_length=600 is beyond the context of 512" in logs.text
    logs.clear()
    next(model.stream_chat(tokenizer, "你好"))  # the default is the 6B's
    assert "beyond" not in logs.text


# Bad input


@pytest.mark.parametrize("query", [None, 5, b"bytes"])
def test_query_is_no_string(model, tokenizer, query):
    with pytest.raises(ValueError, match="query must be a string"):
        model.chat(tokenizer, query)
    with pytest.raises(ValueError, match="query must be a string"):
        next(model.stream_chat(tokenizer, query))


@pytest.mark.parametrize("history", ["text", 3, ["ab"], [("a",)], [("a", None)], [{"role": "user", "content": "a"}]])
def test_history_of_another_shape(model, tokenizer, history):
    with pytest.raises(ValueError, match="history"):
        model.chat(tokenizer, "a", history)


def test_lone_surrogate(model, tokenizer):
    with pytest.raises(ValueError, match="lone surrogate"):
        model.chat(tokenizer, "a\ud800")


def test_empty_query(model, tokenizer, logs):
    model.chat(tokenizer, "", **GREEDY)
    assert "query is empty" in logs.text


def test_foreign_caches(model, tokenizer):
    used = DynamicCache()
    model(torch.tensor([[5, 6, 7]]), past_key_values=used)
    with pytest.raises(ValueError, match="was not returned by chat"):
        model.chat(tokenizer, "a", past_key_values=used)
    with pytest.raises(ValueError, match="published\ntuples|what chat or stream_chat returned"):
        model.chat(tokenizer, "a", past_key_values=())
    with pytest.raises(ValueError, match="A batch of queries cannot use a cache"):
        model.chat(tokenizer, ["a"], return_past_key_values=True)
    with pytest.raises(ValueError, match="2 queries but 1 histories"):
        model.chat(tokenizer, ["a", "b"], [[]])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_return_sequences=2), "num_return_sequences"),
        (dict(num_beams=2, return_past_key_values=True), "no cache to keep"),
        (dict(use_cache=False, return_past_key_values=True), "no cache to keep"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_length=-5), "max_length must be at least 1"),
    ],
)
def test_options_that_cannot_work(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        model.chat(tokenizer, "a", **options)


def test_none_is_the_default(model, tokenizer):
    assert model.chat(tokenizer, "a", max_length=None, **GREEDY) == model.chat(tokenizer, "a", **GREEDY)


def test_second_streamer(model, tokenizer):
    with pytest.raises(ValueError, match="streamer of its own"):
        next(model.stream_chat(tokenizer, "a", streamer=object()))


def test_static_cache_that_is_full(model, tokenizer):
    cache = StaticCache(config=model.config, max_cache_len=40)
    _, history, cache = model.chat(tokenizer, "你好", past_key_values=cache, return_past_key_values=True, **GREEDY)
    with pytest.raises(ValueError, match="at most 39 fit"):
        model.chat(tokenizer, "word " * 60, history, past_key_values=cache)
    # An answer that would be longer than the cache ends with it.
    options = dict(do_sample=False, max_new_tokens=100, eos_token_id=None, return_past_key_values=True)
    _, _, cache = model.chat(tokenizer, "a", past_key_values=cache, **options)
    assert len(cache.chat_record.ids) == 40


def test_tokenizer_of_another_model(small_model, tokenizer):
    with pytest.raises(ValueError, match="do not belong together"):
        small_model().chat(tokenizer, "a")


def test_chatglm3_checkpoint(chatglm, tokenizer, logs):
    config = chatglm.ChatGLMConfig(**{**SMALL, "padded_vocab_size": 8064}, _name_or_path="THUDM/chatglm3-6b")
    chatglm.checks.logger.warning_once.cache_clear()
    chatglm.ChatGLMForConditionalGeneration(config).chat(tokenizer, "a", **GREEDY)
    assert "ChatGLM3 checkpoint" in logs.text


def test_errors_in_the_stream_reach_the_caller(model, tokenizer):
    with pytest.raises(ValueError, match="num_beams"):
        next(model.stream_chat(tokenizer, "a", num_beams=2))


# Caches of other weights, training mode, and streamers of the library


@pytest.mark.parametrize("change", ["trained", "another model", "quantized", "cast"])
def test_cache_computed_with_other_weights_is_refused(small_model, tokenizer, change):
    sizes = dict(padded_vocab_size=8064, seq_length=512)
    model = small_model(11, **sizes)
    _, history, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    if change == "trained":
        with torch.no_grad():
            model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight.mul_(1.01)
    elif change == "another model":
        model = small_model(12, **sizes)
    elif change == "quantized":
        model.quantize(8)
    else:
        model.bfloat16()
    with pytest.raises(ValueError, match="computed with other weights"):
        model.chat(tokenizer, "再见", history, past_key_values=cache, **GREEDY)
    model.chat(tokenizer, "再见", history, **GREEDY)


def test_cache_computed_with_other_adapters_is_refused(small_model, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    model = peft.get_peft_model(small_model(11, padded_vocab_size=8064, seq_length=512), config)
    model.add_adapter("other", config)
    _, history, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    model.chat(tokenizer, "再见", history, past_key_values=cache, **GREEDY)
    with model.disable_adapter(), pytest.raises(ValueError, match="computed with other weights"):
        model.chat(tokenizer, "再见", history, past_key_values=cache, **GREEDY)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="computed with other weights"):
        model.chat(tokenizer, "再见", history, past_key_values=cache, **GREEDY)


def test_chat_in_training_mode(small_model, tokenizer, chatglm, logs):
    """With dropout or gradient checkpointing, which needs the cache, the answer would be nonsense."""
    model = small_model(11, padded_vocab_size=8064, seq_length=512, hidden_dropout=0.5)
    expected = model.chat(tokenizer, "你好", **GREEDY)
    model.gradient_checkpointing_enable()
    model.train()
    chatglm.generation.logger.warning_once.cache_clear()
    assert model.chat(tokenizer, "你好", **GREEDY) == expected
    *_, streamed = model.stream_chat(tokenizer, "你好", **GREEDY)
    assert streamed == expected
    assert model.chat(tokenizer, ["你好"], **GREEDY)[0] == [expected[0]]
    assert model.training and logs.text.count("in training mode") == 1


def test_stop_strings(model, tokenizer):
    whole = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=30)[0]
    stop = whole[1]
    expected = whole[: whole.index(stop) + 1].strip()
    options = dict(do_sample=False, max_new_tokens=30)
    assert model.chat(tokenizer, "你好", stop_strings=[stop], **options)[0].startswith(expected)
    assert len(model.chat(tokenizer, "你好", stop_strings=[stop], **options)[0]) < len(whole)
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", stop_strings=[stop], **options)
    assert streamed == model.chat(tokenizer, "你好", stop_strings=[stop], **options)[0]
    config = GenerationConfig(stop_strings=[stop], eos_token_id=2, pad_token_id=0, **options)
    assert model.chat(tokenizer, "你好", generation_config=config)[0] == streamed


def test_explicit_defaults_count_beside_a_generation_config(model, tokenizer):
    config = GenerationConfig(do_sample=False, max_length=20, eos_token_id=2, pad_token_id=0)
    short = model.chat(tokenizer, "你好", generation_config=config)[0]
    long = model.chat(tokenizer, "你好", max_length=8192, generation_config=config, max_new_tokens=30)[0]
    assert len(long) > len(short) and long.startswith(short)
    torch.manual_seed(0)
    config = GenerationConfig(do_sample=True, temperature=1e-4, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    sampled = {model.chat(tokenizer, "你好", temperature=5.0, generation_config=config)[0] for _ in range(4)}
    assert len(sampled) > 1


@pytest.fixture
def asked(small_model, tokenizer, monkeypatch):
    """Returns what `chat` asks of `generate`."""
    model = small_model(11, padded_vocab_size=8064, seq_length=512)

    def ask(**options):
        calls = []
        monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(kwargs) or kwargs["input_ids"])
        model.chat(tokenizer, "你好", **options)
        return calls[0]

    return ask


def test_defaults_count_before_the_models_generation_config(asked):
    defaults = dict(max_length=512, num_beams=1, do_sample=True, top_p=0.8, temperature=0.8)  # 8192, in this context
    assert asked().items() >= defaults.items()


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=9e-4), dict(do_sample=False)])
def test_low_temperatures_are_greedy(asked, options):
    """Without settings of sampling, of which the library would warn."""
    assert asked(**options).items() >= dict(do_sample=False, top_p=1.0, temperature=1.0).items()


@pytest.mark.parametrize("eos_token_id, end", [(None, 2), (7, 7), ([9, 2], 9)])
def test_invalid_logits_end_with_the_token_that_ends_answers(asked, eos_token_id, end):
    assert asked(eos_token_id=eos_token_id)["logits_processor"][0].eos_token_id == end


def test_lines_decoded_one_by_one(chatglm, tokenizer):
    """As the streamers of older releases decode: what there is of a line after each token, then the next line."""
    lines = chatglm.streaming.LineTokenizer(tokenizer)
    newline, text, line = tokenizer.convert_tokens_to_ids("<0x0A>"), "", []
    for token in tokenizer.encode("if a:\n  b\n    c", add_special_tokens=False):
        line.append(token)
        decoded = lines.decode(line)
        if token == newline:
            text, line = text + decoded, []
    assert text + decoded == "if a:\n  b\n    c"


class PlayedBack(LogitsProcessor):
    """Makes `generate` write a given text."""

    def __init__(self, ids, start):
        self.ids, self.start = ids, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        step = input_ids.shape[1] - self.start
        forced[:, self.ids[step] if step < len(self.ids) else 2] = 0
        return forced


@pytest.mark.parametrize("text", ["def f():\n    return 1\n\n        x", "\n\n a\n  b", "你好\n  再见", "  a\n b"])
def test_streamed_lines_keep_their_spaces(model, tokenizer, text):
    """The library's streamers decode line by line, and SentencePiece drops the first space of what it decodes."""
    inputs = model.build_inputs(tokenizer, "你好")
    processors = LogitsProcessorList(
        [PlayedBack(tokenizer.encode(text, add_special_tokens=False), inputs["input_ids"].shape[1])]
    )
    for _ in range(2):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = model.generate(
            **inputs, streamer=streamer, logits_processor=processors, max_new_tokens=40, do_sample=False
        )
        assert "".join(streamer) == text
        assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == text

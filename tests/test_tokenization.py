"""Tokenizer: SentencePiece's ids and text exactly, special tokens that no user can type, files, threads."""

import copy
import gc
import json
import logging
import pickle
import random
import shutil
import threading
import weakref

import pytest
import sentencepiece
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer

from conftest import ROOT, TINY


PREFIX = "[gMASK]sop"
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "</s>", "<s>", "<unk>", "<0x0A>"]
PARTS = [*SPECIAL, "▁", " ", "  ", "\n", "\t", "\r\n", "你好", "[Round 1]\n\n问：", "\n\n答：", "👩‍👩‍👧", "１２", "ﬁ"]
# Any Unicode but lone surrogates, with what is special here made likely.
texts = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.sampled_from([*PARTS, PREFIX])),
    max_size=8,
).map("".join)
plain_texts = texts.filter(lambda text: not text.startswith(PREFIX))


@pytest.fixture(scope="module", params=["tiny", "real"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


def test_reference_ids(real_tokenizer, shared):
    reference = json.loads((shared / "golden/tokenizer_cases.json").read_text())
    for text, case in reference["cases"].items():
        assert real_tokenizer.encode(text, add_special_tokens=False) == case["ids"], text
        assert real_tokenizer.decode(case["ids"]) == case["dec"], text
        assert real_tokenizer.tokenize(text) == case["toks"], text
    assert dict(real_tokenizer("你好")) == reference["call"]
    assert real_tokenizer("你好", "世界")["input_ids"] == reference["pair"]
    assert (real_tokenizer.vocab_size, len(real_tokenizer)) == (reference["vocab_size"], reference["len"])
    assert (real_tokenizer.pad_token_id, real_tokenizer.eos_token_id) == (reference["pad"], reference["eos"])
    assert real_tokenizer.bos_token is None
    assert {name: real_tokenizer.get_command(name) for name in reference["cmds"]} == reference["cmds"]
    batch = real_tokenizer(["你好", "Hello world, how are you?"], padding=True)
    assert dict(batch) == reference["batch"]
    assert dict(real_tokenizer(["你好"], padding="max_length", max_length=10)) == reference["maxlen"]
    assert list(real_tokenizer("你好")) == reference["tokids"]
    assert real_tokenizer.build_prompt("你好") == reference["prompt1"]
    assert real_tokenizer.build_prompt("b", [("a", "x")]) == reference["prompt2"]
    assert real_tokenizer(reference["prompt1"])["input_ids"] == reference["prompt1ids"]


def test_reference_vectors(real_tokenizer, shared):
    vectors = json.loads((shared / "golden/tokenizer_vectors.json").read_text())["vectors"]
    vectors = [v for v in vectors if v["model"] == "chatglm2-6b"]
    assert vectors
    for v in vectors:
        assert real_tokenizer(v["text"], v["pair"], add_special_tokens=v["add_special_tokens"])["input_ids"] == v["ids"]


@settings(max_examples=300, deadline=None)
@given(text=plain_texts)
def test_equals_sentencepiece(tokenizer, text):
    sp, prefix = tokenizer.sp_model, tokenizer.get_prefix_tokens()
    ids = sp.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer(text)["input_ids"] == tokenizer.build_inputs_with_special_tokens(ids) == prefix + ids
    assert tokenizer.tokenize(text) == sp.id_to_piece(ids)
    assert tokenizer.decode(ids) == tokenizer.decode(prefix + ids + [2]) == sp.decode(ids)
    assert tokenizer.convert_tokens_to_string(sp.id_to_piece(ids)) == sp.decode(ids)
    pair = tokenizer.build_inputs_with_special_tokens(ids, ids)
    assert tokenizer([text], [text])["input_ids"] == [pair] == [prefix + ids + ids + [2]]


@settings(max_examples=200, deadline=None)
@given(body=texts, other=plain_texts, add_special_tokens=st.booleans())
def test_rendered_chat(tokenizer, body, other, add_special_tokens):
    """The prefix, and `</s>` at the very end, become tokens; what is between is text. Other texts beside it are plain."""
    assume(not body.endswith("</s>"))
    sp, prefix = tokenizer.sp_model, tokenizer.get_prefix_tokens()
    rows = [PREFIX + body, other, PREFIX + body + "</s>"]
    expected = [
        prefix + sp.encode(body),
        prefix * add_special_tokens + sp.encode(other),
        prefix + sp.encode(body) + [2],
    ]
    assert tokenizer(rows, add_special_tokens=add_special_tokens)["input_ids"] == expected
    for row, ids in zip(rows, expected):
        assert tokenizer.encode(row, add_special_tokens=add_special_tokens) == ids


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(3, 7999)), max_size=12))
def test_decodes_any_ids_as_sentencepiece(tokenizer, ids):
    """Also runs of bytes that are no valid UTF-8."""
    assert tokenizer.decode(ids) == tokenizer.sp_model.decode(ids)


def test_decodes_every_id(real_tokenizer):
    sp = real_tokenizer.sp_model
    special = {0, *range(64789, 65024), 1, 2}
    for i in range(65024):
        assert real_tokenizer.decode([i]) == ("" if i in special else sp.decode([i])), i
    assert real_tokenizer.convert_ids_to_tokens([64790, 64794, 65023, -1]) == ["[gMASK]", "", "", ""]
    assert real_tokenizer.convert_ids_to_tokens([64790, 13], skip_special_tokens=True) == ["<0x0A>"]
    assert real_tokenizer.decode(-1) == ""


def test_decode_hides_special_tokens(tokenizer):
    """Unless skip_special_tokens=False, as in the published code, whatever the ids come in."""
    ids = [*tokenizer("Hello")["input_ids"], 2]
    shown = "[gMASK]sopHello</s>"
    for skipped in ({}, {"skip_special_tokens": True}, {"skip_special_tokens": None}):
        assert tokenizer.decode(ids, **skipped) == "Hello"
        assert tokenizer.decode(torch.tensor(ids), **skipped) == "Hello"
        assert tokenizer.decode([ids, [2], []], **skipped) == ["Hello", "", ""]
        assert tokenizer.batch_decode([ids, [2]], **skipped) == ["Hello", ""]
        assert tokenizer.batch_decode(torch.tensor([ids, ids]), **skipped) == ["Hello", "Hello"]
        assert tokenizer.decode(torch.tensor(2), **skipped) == tokenizer.decode(0, **skipped) == ""
    assert tokenizer.decode(tokenizer("Hello")) == "Hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == shown
    assert tokenizer.batch_decode([ids], skip_special_tokens=False) == [shown]
    assert tokenizer.decode(0, skip_special_tokens=False) == "<unk>"
    assert tokenizer.batch_decode([]) == []


def test_name_of_the_end_token(tokenizer):
    """lm-eval leaves the prefix out of texts that begin with what this gives, as all do with an empty one."""
    assert tokenizer.decode(tokenizer.eos_token_id) == "</s>"
    assert tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=True) == ""
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""


def test_words_are_no_tokens(tokenizer):
    """As the pipeline for token classification joins them."""
    assert tokenizer.convert_tokens_to_string(["New", "Yorkzzz"]) == "NewYorkzzz"
    pieces = tokenizer.tokenize("New 👋 York")
    assert tokenizer.convert_tokens_to_string([*pieces, "Cityzzz", *pieces]) == "New 👋 YorkCityzzz New 👋 York"


def test_vocabulary_is_bijective(tokenizer):
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) == list(
        range(len(tokenizer))
    )


@pytest.mark.parametrize("text", [*SPECIAL, "".join(SPECIAL), "[gMASK] sop 攻击</s>", " [gMASK]sop", "[gMASK]"])
def test_special_tokens_are_not_read_from_text(tokenizer, text):
    special = {0, 1, 2, *tokenizer.special_tokens.values()}
    outputs = [
        tokenizer(text)["input_ids"][2:],
        tokenizer([text], padding=True)["input_ids"][0][2:],
        tokenizer(text, truncation=True, max_length=100)["input_ids"][2:],
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer.encode(text, add_special_tokens=False),
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
        tokenizer(tokenizer.build_prompt(text, [(text, text)]))["input_ids"][2:],
        tokenizer(PREFIX, text)["input_ids"][2:-1],
        tokenizer(text, PREFIX + text)["input_ids"][2:-1],
        tokenizer([PREFIX, text], is_split_into_words=True)["input_ids"][2:],
        tokenizer(PREFIX + text + ".")["input_ids"][2:],
        copy.deepcopy(tokenizer)(text)["input_ids"][2:],
        pickle.loads(pickle.dumps(tokenizer))(text)["input_ids"][2:],
    ]
    for ids in outputs:
        assert not special & set(ids), (text, ids)
    assert tokenizer(text)["input_ids"][:2] == tokenizer.get_prefix_tokens()


def test_special_tokens_cannot_be_read_on_demand(tokenizer, chatglm):
    with pytest.raises(ValueError, match="split_special_tokens=False"):
        tokenizer("[gMASK]", split_special_tokens=False)
    other = chatglm.ChatGLMTokenizer.from_pretrained(TINY, split_special_tokens=False)  # as LLaMA-Factory loads
    assert other.get_command("[gMASK]") not in other("a [gMASK]")["input_ids"][2:]


@pytest.mark.parametrize("inputs", [("a</s>",), (["b", "a</s>"],), ("a", "b</s>"), (PREFIX + "a</s></s>",)])
def test_typed_end_of_sequence_warns_once(tokenizer, logs, inputs):
    logging.Logger.warning_once.cache_clear()
    chat = [{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}]
    tokenizer.apply_chat_template(chat)
    tokenizer(["</s> a", tokenizer.build_prompt("a</s>")])
    tokenizer("a</s>", "b")
    assert "ends in the characters" not in logs.text
    for _ in range(2):
        tokenizer(*inputs)
    assert logs.text.count("ends in the characters '</s>'") == 1


def test_offsets(tokenizer):
    text = "Hello 你好\n world"
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = [text[a:b] for a, b in encoded["offset_mapping"][2:]]
    assert "".join(spans) == text
    assert encoded.char_to_token(text.index("你")) is not None


@pytest.fixture(scope="module")
def library_tokenizer(tiny_tokenizer):
    """The library's class on a copy of the backend."""
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    names["model_input_names"] = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **names)


returns = ["attention_mask", "token_type_ids", "special_tokens_mask", "offsets_mapping", "length", "overflowing_tokens"]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_options_equal_the_library(tiny_tokenizer, library_tokenizer, data):
    """Padding, truncation and what is returned, for texts, pairs, words and batches of them."""
    options = {f"return_{name}": True for name in data.draw(st.sets(st.sampled_from(returns)))}
    options["add_special_tokens"] = data.draw(st.booleans())
    options["padding"] = data.draw(st.sampled_from([False, "longest", "max_length"]))
    options["pad_to_multiple_of"] = data.draw(st.sampled_from([None, 4]))
    options["padding_side"] = data.draw(st.sampled_from([None, "left", "right"]))
    options["truncation"] = data.draw(st.sampled_from([False, "longest_first"]))
    options["max_length"] = data.draw(st.sampled_from([4, 8, 20]))
    options["is_split_into_words"] = data.draw(st.booleans())
    row = st.lists(plain_texts, min_size=1, max_size=4) if options["is_split_into_words"] else plain_texts
    kind = data.draw(st.sampled_from(["single", "batch", "pairs"]))
    inputs = (data.draw(row),) if kind == "single" else (data.draw(st.lists(row, min_size=1, max_size=3)),)
    if kind == "pairs":
        inputs += ([data.draw(row) for _ in inputs[0]],)
    else:  # pairs that the backend cuts to less than the stride make it panic
        options["stride"] = data.draw(st.sampled_from([0, 1]))
    side = data.draw(st.sampled_from(["left", "right"]))
    tiny_tokenizer.truncation_side = library_tokenizer.truncation_side = side
    library_tokenizer.padding_side = "left"
    output, expected = tiny_tokenizer(*inputs, **options), library_tokenizer(*inputs, **options)
    tiny_tokenizer.truncation_side = "right"
    positions = output.pop("position_ids")
    assert dict(output) == dict(expected)
    for name in ("offsets", "sequence_ids", "word_ids", "tokens"):
        assert [getattr(e, name) for e in output.encodings] == [getattr(e, name) for e in expected.encodings]
    if kind == "single" and not options.get("return_overflowing_tokens"):
        positions = [positions]
    for encoding, row in zip(output.encodings, positions, strict=True):
        attended = [position for position, is_attended in zip(row, encoding.attention_mask) if is_attended]
        assert attended == list(range(len(attended))) and sum(row) == sum(attended)
    backend = tiny_tokenizer.backend_tokenizer
    assert backend.padding is None and backend.truncation is None


def test_padding(tokenizer):
    short, long = tokenizer("hi")["input_ids"], tokenizer("hello there, world")["input_ids"]
    n = len(long) - len(short)
    left = tokenizer(["hi", "hello there, world"], padding=True)
    assert left["input_ids"][0] == [0] * n + short
    right = tokenizer(["hi", "hello there, world"], padding=True, padding_side="right")
    assert right["input_ids"][0] == short + [0] * n
    assert right["attention_mask"][0] == [1] * len(short) + [0] * n
    assert right["position_ids"][0] == [*range(len(short)), *[0] * n]
    for side, expected in ((None, left), ("right", right)):
        padded = tokenizer.pad({"input_ids": [short, long]}, return_tensors="pt", padding_side=side)
        assert padded["position_ids"].tolist() == expected["position_ids"]
        again = tokenizer.pad(tokenizer(["hi", "hello there, world"]), padding_side=side)
        assert dict(again) == dict(expected)
    own = tokenizer.pad({"input_ids": [[5, 6], [7]], "position_ids": [[3, 4], [9]]})
    assert own["position_ids"] == [[3, 4], [0, 9]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_prefix(tokenizer, side):
    prefix = tokenizer.get_prefix_tokens()
    text = "[Round 1]\n\n问：" + "x " * 50
    tokenizer.truncation_side = side
    try:
        for row in (text, PREFIX + text, PREFIX + text + "</s>"):
            ids = tokenizer(row)["input_ids"]
            cut = tokenizer([row], truncation=True, max_length=9)["input_ids"][0]
            assert cut == prefix + (ids[2:9] if side == "right" else ids[-7:])
        for n in (0, 1, 2):
            for row in (text, PREFIX + text):
                assert tokenizer(row, truncation=True, max_length=n)["input_ids"] == prefix[:n]
                assert tokenizer.encode(row, truncation=True, max_length=n) == prefix[:n]
            assert tokenizer(text, "b", truncation=True, max_length=n)["input_ids"] == prefix[:n]
        assert tokenizer(text, "b", truncation=True, max_length=3)["input_ids"] == [*prefix, 2]
    finally:
        tokenizer.truncation_side = "right"


def test_empty_second_text(tokenizer):
    pair = tokenizer(["a"], [""])["input_ids"][0]
    assert pair[-1] == 2
    assert tokenizer("a", "")["input_ids"] == tokenizer.encode("a", "") == pair
    assert tokenizer(["a"], [], is_split_into_words=True)["input_ids"] == pair
    assert tokenizer([("a", "")])["input_ids"] == [pair]


def test_rendered_chat_in_other_places_is_text(tokenizer):
    sp, prefix = tokenizer.sp_model, tokenizer.get_prefix_tokens()
    text = PREFIX + "x</s>"
    assert tokenizer(text, "b")["input_ids"] == prefix + sp.encode(text) + sp.encode("b") + [2]
    assert tokenizer([text], is_split_into_words=True)["input_ids"] == prefix + sp.encode(text)


def test_rendered_chat_options(tokenizer):
    """Offsets into the whole text, padding and overflow, also beside other texts."""
    text = PREFIX + "[Round 1]\n\n问：Hello 你好\n\n答： Fine, thanks 谢谢</s>"
    encoded = tokenizer(text, return_offsets_mapping=True, return_length=True)
    ids = encoded["input_ids"]
    assert encoded["length"] in (len(ids), [len(ids)])
    assert {i for a, b in encoded["offset_mapping"] for i in range(a, b)} == set(range(len(text)))
    spans = [text[a:b] for a, b in encoded["offset_mapping"]]
    assert spans[:2] == ["[gMASK]", "sop"] and spans[-1] == "</s>"
    for i, (start, end) in enumerate(encoded["offset_mapping"][3:], start=3):
        assert encoded.char_to_token(start) <= i and (end > start) == bool(spans[i])
    assert encoded.char_to_token(len(text) - 1) == len(ids) - 1
    batch = tokenizer([text, "Hello"], padding=True, padding_side="right", pad_to_multiple_of=8)
    plain = tokenizer("Hello")["input_ids"]
    n = len(batch["input_ids"][0])
    assert n % 8 == 0 and batch["input_ids"] == [ids + [0] * (n - len(ids)), plain + [0] * (n - len(plain))]
    assert batch["attention_mask"][1] == [1] * len(plain) + [0] * (n - len(plain))
    parts = tokenizer(text, truncation=True, max_length=12, stride=3, return_overflowing_tokens=True)["input_ids"]
    assert parts[0] == ids[:12] and all(part[:2] == ids[:2] for part in parts)
    assert parts[1][2:5] == ids[9:12] and parts[-1][-1] == 2
    assert tokenizer([text, text], return_tensors="pt")["input_ids"].tolist() == [ids, ids]


def test_threads_do_not_share_settings(tiny_tokenizer):
    rows = ["hello there, my friend", "a", PREFIX + "[Round 1]\n\n问：hi\n\n答： x</s>", "long text " * 30]
    options = [
        {},
        {"truncation": True, "max_length": 7},
        {"padding": "max_length", "max_length": 50},
        {"truncation": True, "max_length": 12, "stride": 2, "return_overflowing_tokens": True},
        {"padding": True, "add_special_tokens": False},
    ]
    calls = [([row, rows[0]], kwargs) for row in rows for kwargs in options]
    expected = [dict(tiny_tokenizer(row, **kwargs)) for row, kwargs in calls]
    wrong = []

    def run(seed):
        chosen = random.Random(seed)
        for i in (chosen.randrange(len(calls)) for _ in range(1000)):
            try:
                output = dict(tiny_tokenizer(calls[i][0], **calls[i][1]))
            except BaseException as error:
                output = error
            if output != expected[i]:
                wrong.append((calls[i], output))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_settings_of_the_backend_do_not_count(tiny_tokenizer, tmp_path):
    """Whoever set them. A saved tokenizer.json does not have them either."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.backend_tokenizer.enable_truncation(3)
    for text in ("hello there, world", PREFIX + "hello there, world"):
        assert tokenizer(text) == tiny_tokenizer(text)
    tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["padding"] is None and state["truncation"] is None


def test_subclass_that_pickles_in_its_own_way(chatglm):
    """As vLLM's, which would compute its caches anew for every call."""

    class Cached(chatglm.ChatGLMTokenizer):
        def __reduce__(self):
            raise AssertionError

    tokenizer = Cached.from_pretrained(TINY)
    assert tokenizer("a", truncation=True, max_length=2)["input_ids"] == tokenizer.get_prefix_tokens()


def test_empty_batch(tokenizer):
    for options in ({}, {"padding": True}, {"truncation": True, "max_length": 3}):
        assert dict(tokenizer([], **options)) == {"input_ids": [], "attention_mask": [], "position_ids": []}


def test_tokens_of_programs(tokenizer, chatglm, tmp_path):
    """Tokens that a program adds are read from text and decoded; GLM's own stay what they are."""
    tokenizer.save_pretrained(tmp_path)
    other = chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)
    token = AddedToken("<|tool|>", special=True, normalized=False)
    other.add_special_tokens({"additional_special_tokens": [token]})
    assert token.special  # the caller's object is left alone
    ids = other("call <|tool|> [gMASK]")["input_ids"]
    assert len(tokenizer) in ids and tokenizer.get_command("[gMASK]") not in ids[1:]
    assert other.decode(ids, skip_special_tokens=False) == "[gMASK]sop" + "call <|tool|> [gMASK]"
    assert other.decode(ids) == "call  [gMASK]"
    assert other("call <|tool|>", truncation=True, max_length=20)["input_ids"] == other("call <|tool|>")["input_ids"]
    assert pickle.loads(pickle.dumps(other))("a <|tool|>") == other("a <|tool|>")
    assert other.add_tokens(["<a>", "<b>"]) == 2 and other.add_tokens("<a>") == other.add_tokens([]) == 0
    assert other.tokenize("x<a>y <b>") == [*other.tokenize("x"), "<a>", *other.tokenize("y "), "<b>"]
    assert other.decode(other("x<a>")["input_ids"]) == "x<a>"


def test_special_tokens_of_programs(tokenizer, chatglm, tmp_path):
    """However they are added, `decode` leaves them out, also after saving. Those that are there already stay as they are."""
    tokenizer.save_pretrained(tmp_path)
    other = chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)
    special_tokens_map = dict(other.special_tokens_map)
    assert other.add_tokens(["</s>", "sop"], special_tokens=True) == 0
    assert other.special_tokens_map == special_tokens_map
    assert other.add_tokens(["<a>"], special_tokens=True) == 1
    assert other.add_tokens([AddedToken("<b>", special=True), "<c>"]) == 2
    other.save_pretrained(tmp_path)
    for tokenizer in (other, chatglm.ChatGLMTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(other))):
        ids = tokenizer("x<a>y<b>z<c>")["input_ids"]
        assert tokenizer.decode(ids) == "xyz<c>"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "[gMASK]sop" + "x<a>y<b>z<c>"


def test_streaming_decode(tokenizer):
    text = "你好👋！Hello, world\n𠮷"
    streamer = TextIteratorStreamer(tokenizer)
    for i in tokenizer.encode(text, add_special_tokens=False):
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(streamer) == text


def test_streamer_leaves_special_tokens_out(tokenizer):
    streamer = TextIteratorStreamer(tokenizer)
    for i in [*tokenizer("Hello\n  world")["input_ids"], 2]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "</s>" not in (text := "".join(streamer)) and text.startswith("Hello")


# Files


@pytest.fixture(scope="module")
def saved(tiny_tokenizer, tmp_path_factory):
    """A saved tokenizer with tokens of a program, after calls with options, and its tokenizer.json as others read it."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.add_tokens(["<name>"])
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|tool|>"]})
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(folder)
    return tokenizer, folder, Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.one_of(texts, st.sampled_from(["people philosophy", "<name>", "<|tool|>", "<|end|>", "<|pad|>"])), max_size=4
    ).map("".join)
)
def test_saved_backend_gives_the_same_ids(saved, text):
    """Any text but a rendered chat, which is not the backend's to know."""
    assume(not text.startswith(PREFIX))
    tokenizer, _, backend = saved
    assert backend.encode(text).ids == tokenizer(text)["input_ids"]
    assert backend.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False)
    assert backend.encode(text, text).ids == tokenizer(text, text)["input_ids"]


def test_saved_backend(saved):
    tokenizer, folder, backend = saved
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["padding"] is None and state["truncation"] is None
    assert backend.get_vocab() == tokenizer.get_vocab()
    text = "people 👋 philosophy <name>"
    special = [0, 1, 2, *tokenizer.special_tokens.values(), tokenizer.eos_token_id, tokenizer.pad_token_id]
    for skip_special_tokens in (True, False):
        ids = [*special, *tokenizer(text)["input_ids"], *special]
        assert backend.decode(ids, skip_special_tokens=skip_special_tokens) == text
        ids = tokenizer("  x  y")["input_ids"]
        assert backend.decode(ids, skip_special_tokens=skip_special_tokens) == "  x  y"


def test_reload(saved, chatglm):
    tokenizer, folder, _ = saved
    assert sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size() > 0
    again = chatglm.ChatGLMTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    assert (again.eos_token, again.pad_token) == ("<|end|>", "<|pad|>")
    for text in (
        "你好 [gMASK] world",
        "a <name> b <|tool|>",
        "a <|end|><|pad|>",
        PREFIX + "x<|end|>",
        PREFIX + "x</s>",
    ):
        assert again(text) == tokenizer(text)
    assert again.convert_tokens_to_ids("<name>") in again.encode("call <name> now")
    assert "<|end|>" not in again.tokenize("a <|end|>")
    assert again(PREFIX + "x<|end|>")["input_ids"][-1] == again.eos_token_id >= again.vocab_size
    padded = again(["a", "b c d"], padding=True)["input_ids"][0]
    assert padded[0] == again.pad_token_id >= again.vocab_size


def test_save_and_reload_of_the_plain_tokenizer(tokenizer, tmp_path, chatglm):
    files = tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} <= {str(f).split("/")[-1] for f in files}
    again = chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    again.save_pretrained(tmp_path)  # over its own files
    assert chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)("你好") == tokenizer("你好")
    prefixed = tokenizer.save_pretrained(tmp_path, filename_prefix="x")
    assert {"x-tokenizer.model", "x-tokenizer.json"} <= {str(f).split("/")[-1] for f in prefixed}


def test_tokenizer_json_of_another_tokenizer(tiny_tokenizer, chatglm, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["vocab"]["<other>"] = len(tiny_tokenizer) + 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match="is not of this tokenizer"):
        chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)


def test_no_training(tokenizer):
    with pytest.raises(NotImplementedError, match="SentencePiece"):
        tokenizer.train_new_from_iterator(["a"], 100)


# As others reach it


def test_tokenizer_of_a_processor(chatglm):
    tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(TINY)
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    assert inner.pad_token == "<unk>" and inner("a") == tokenizer("a") and len(inner) == len(tokenizer)
    inner.model_max_length = 77
    assert tokenizer.model_max_length == 77
    gc.disable()
    try:
        reference = weakref.ref(tokenizer)
        del tokenizer, inner
        assert reference() is None  # no cycle to be collected
    finally:
        gc.enable()


def test_sentencepiece_is_reachable(tokenizer):
    """As converters reach it, for every row of the padded vocabulary. They know ChatGLM3 by `build_chat_input`."""
    assert tokenizer.name == "GLMTokenizer"
    assert not hasattr(tokenizer, "build_chat_input")
    sp = tokenizer.tokenizer.sp_model
    assert sp.serialized_model_proto()
    tokens = [tokenizer._convert_id_to_token(i) for i in range(len(tokenizer) + 20)]
    assert tokens[-20:] == [""] * 20 and tokens[sp.vocab_size() + 1] == "[gMASK]"


def test_auto_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    assert tokenizer.is_fast and type(tokenizer).__name__ == "ChatGLMTokenizer"
    assert tokenizer.chat_template == (ROOT / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)  # by the code that was saved with it
    assert again("你好") == tokenizer("你好")


# Bad input


def test_missing_model(chatglm, tmp_path):
    with pytest.raises(ValueError, match="tokenizer.model not found"):
        chatglm.ChatGLMTokenizer(tmp_path / "tokenizer.model")
    shutil.copy(ROOT / "tokenizer_config.json", tmp_path)
    with pytest.raises((ValueError, OSError), match="tokenizer.model not found|Can't load tokenizer"):
        chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 100, 60_000])
def test_truncated_model(chatglm, tmp_path, size):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated"):
        chatglm.ChatGLMTokenizer(tmp_path / "tokenizer.model")


def test_pointer_file(chatglm, tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:e7dc\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        chatglm.ChatGLMTokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    "kind, ids, error",
    [("unigram", {}, "is no BPE model"), ("bpe", {"unk_id": 2, "eos_id": 0}, "is not the tokenizer of ChatGLM2")],
)
def test_model_of_another_kind(chatglm, tmp_path, kind, ids, error):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, how are you"] * 20 + ["fine thanks"]),
        model_prefix=str(tmp_path / kind),
        vocab_size=290,
        byte_fallback=True,
        model_type=kind,
        **ids,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=error):
        chatglm.ChatGLMTokenizer(tmp_path / f"{kind}.model")


def test_pieces_of_several_words(chatglm, tmp_path):
    """Those of another model of ChatGLM2's kind may have spaces inside, across which words cannot be encoded apart."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["how are you", "how are they", "you are how"] * 20),
        model_prefix=str(tmp_path / "words"),
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        split_by_whitespace=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = chatglm.ChatGLMTokenizer(tmp_path / "words.model")
    sp = tokenizer.sp_model
    assert any("▁" in piece[1:] for piece in sp.encode("how are you", out_type=str))
    for text in ("how are you", "you  are they, how are", " are you"):
        assert tokenizer.encode(text, add_special_tokens=False) == sp.encode(text)


@pytest.mark.parametrize("text", ["a\ud800b", ["ok", "\udfff"], [PREFIX + "a\ud800"], [("a", "b\ud800")]])
def test_lone_surrogates(tokenizer, text):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer(text)


@pytest.mark.parametrize("inputs", [(5,), ([5],), (["a"], ["a", "b"]), ([["a", "b", "c"]],)])
def test_inputs_that_are_no_texts(tokenizer, inputs):
    with pytest.raises((ValueError, TypeError)):
        tokenizer(*inputs)


def test_unknown_command(tokenizer):
    with pytest.raises(ValueError, match="<sep>"):
        tokenizer.get_command("<sep>")

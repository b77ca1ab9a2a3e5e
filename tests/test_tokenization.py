"""Tokenizer: SentencePiece's ids and text exactly, the prompt format, and special tokens that no user can type."""

import json
import pickle
import shutil

import pytest
import sentencepiece
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer, TextIteratorStreamer

from conftest import ROOT, TINY


RENDERED = "[gMASK]sop[Round 1]\n\n问："
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "</s>", "<s>", "<unk>", "<0x0A>"]
# Any Unicode but lone surrogates, with what is special here made likely.
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from(
            SPECIAL
            + ["▁", " ", "  ", "\n", "\t", "\r\n", "你好", "[Round 1]\n\n问：", "\n\n答：", "👩‍👩‍👧", "１２", "ﬁ"]
        ),
    ),
    max_size=8,
).map("".join)


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
@given(text=texts)
def test_equals_sentencepiece(tokenizer, text):
    assume(not text.startswith("[gMASK]sop[Round 1]\n\n问："))  # a whole rendered chat, the documented exception
    sp = tokenizer.tokenizer.sp_model
    ids = sp.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer(text)["input_ids"] == tokenizer.get_prefix_tokens() + ids
    assert tokenizer.tokenize(text) == sp.id_to_piece(ids)
    assert tokenizer.decode(ids) == sp.decode(ids)
    assert tokenizer([text], [text])["input_ids"] == [tokenizer.get_prefix_tokens() + ids + ids + [2]]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(3, 7999)), max_size=12))
def test_decodes_any_ids_as_sentencepiece(tokenizer, ids):
    """Also runs of bytes that are no valid UTF-8."""
    assert tokenizer.decode(ids) == tokenizer.tokenizer.sp_model.decode(ids)


def test_decodes_every_id(real_tokenizer):
    sp = real_tokenizer.tokenizer.sp_model
    special = {0, *range(64789, 65024), 1, 2}
    for i in range(65024):
        assert real_tokenizer.decode([i], skip_special_tokens=True) == ("" if i in special else sp.decode([i])), i
    assert real_tokenizer.decode([2]) == "</s>"
    assert real_tokenizer.convert_ids_to_tokens([64790, 64794, 65023, -1]) == ["[gMASK]", "", "", ""]
    assert real_tokenizer.decode(-1) == ""


def test_vocabulary_is_bijective(tokenizer):
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) == list(
        range(len(tokenizer))
    )


@pytest.mark.parametrize("text", SPECIAL + ["".join(SPECIAL), "[gMASK]sop", "[gMASK] sop 攻击</s>"])
def test_special_tokens_are_not_read_from_text(tokenizer, text):
    special = {0, 1, 2, *tokenizer.tokenizer.special_tokens.values()}
    prefix = tokenizer.get_prefix_tokens()
    outputs = [
        tokenizer(text)["input_ids"][2:],
        tokenizer([text], padding=True)["input_ids"][0][2:],
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer.encode(text, add_special_tokens=False),
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"][2:],
        tokenizer.apply_chat_template([{"role": "user", "content": text}])["input_ids"][2:],
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}, {"role": "assistant", "content": text}], continue_final_message=True
        )["input_ids"][2:],
        tokenizer(tokenizer.build_prompt(text, [(text, text)]))["input_ids"][2:],
        tokenizer(RENDERED, text)["input_ids"][2:-1],
        tokenizer([RENDERED, text], is_split_into_words=True)["input_ids"][2:],
        tokenizer(RENDERED + text)["input_ids"][2:],
    ]
    for ids in outputs:
        assert not special & set(ids), (text, ids)
    assert tokenizer(text)["input_ids"][:2] == prefix


def test_offsets(tokenizer):
    text = "Hello 你好\n world"
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = [text[a:b] for a, b in encoded["offset_mapping"][2:]]
    assert "".join(spans) == text
    assert encoded.char_to_token(text.index("你")) is not None


def test_padding_and_truncation(tokenizer):
    short, long = tokenizer("hi")["input_ids"], tokenizer("hello there, world")["input_ids"]
    n = len(long) - len(short)
    left = tokenizer(["hi", "hello there, world"], padding=True)
    assert left["input_ids"][0] == [0] * n + short
    right = tokenizer(["hi", "hello there, world"], padding=True, padding_side="right")
    assert right["input_ids"][0] == short + [0] * n
    assert right["attention_mask"][0] == [1] * len(short) + [0] * n
    assert right["position_ids"][0] == [*range(len(short)), *[0] * n]
    padded = tokenizer.pad({"input_ids": [short, long]}, return_tensors="pt")
    assert padded["position_ids"].tolist() == left["position_ids"]
    assert tokenizer("hello there, world", truncation=True, max_length=4)["input_ids"] == long[:4]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x " * 50}], tokenize=False)
    truncated = tokenizer(rendered, truncation=True, max_length=9)["input_ids"]
    assert len(truncated) == 9 and truncated[:2] == tokenizer.get_prefix_tokens()
    assert len(tokenizer(["hi"], padding=True, pad_to_multiple_of=16)["input_ids"][0]) == 16


contents = st.one_of(texts, st.just("[gMASK]sop[Round 1]\n\n问：x</s>"))


@settings(max_examples=100, deadline=None)
@given(rounds=st.lists(st.tuples(contents, contents), max_size=3), query=contents, answer=contents)
def test_chat_template(tokenizer, rounds, query, answer):
    """The template's ids are build_prompt's, and the answer's those of the published fine-tuning script."""
    messages = [
        {"role": role, "content": text} for pair in rounds for role, text in zip(("user", "assistant"), pair)
    ] + [{"role": "user", "content": query}]
    sp = tokenizer.tokenizer.sp_model
    prompt_ids = tokenizer.get_prefix_tokens() + sp.encode(tokenizer.build_prompt(query, rounds))
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt_ids
    for add_special_tokens in (True, False):
        assert tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"] == prompt_ids

    messages.append({"role": "assistant", "content": answer})
    answer_ids = sp.encode(answer) + [tokenizer.eos_token_id]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == prompt_ids + answer_ids
    assert encoded["assistant_masks"] == [0] * len(prompt_ids) + [1] * len(answer_ids)


def test_rendered_chat_in_other_places_is_text(tokenizer):
    sp, prefix = tokenizer.tokenizer.sp_model, tokenizer.get_prefix_tokens()
    text = RENDERED + "x</s>"
    assert tokenizer(text, "b")["input_ids"] == prefix + sp.encode(text) + sp.encode("b") + [2]
    assert tokenizer([text], is_split_into_words=True)["input_ids"] == prefix + sp.encode(text)


def test_rendered_chat_options(tokenizer):
    """Offsets into the whole text, padding, truncation and overflow, also beside other texts."""
    chat = [{"role": "user", "content": "Hello 你好"}, {"role": "assistant", "content": "Fine, thanks 谢谢"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    assert {i for a, b in encoded["offset_mapping"] for i in range(a, b)} == set(range(len(text)))
    assert [text[a:b] for a, b in encoded["offset_mapping"]][:2] == ["[gMASK]", "sop"]
    assert encoded.char_to_token(text.index("Fine")) is not None
    assert encoded.char_to_token(len(text) - 1) == len(ids) - 1
    batch = tokenizer([text, "Hello"], padding=True, padding_side="right", pad_to_multiple_of=8)
    plain = tokenizer("Hello")["input_ids"]
    n = len(batch["input_ids"][0])
    assert n % 8 == 0 and batch["input_ids"] == [ids + [0] * (n - len(ids)), plain + [0] * (n - len(plain))]
    assert batch["attention_mask"][1] == [1] * len(plain) + [0] * (n - len(plain))
    mixed = tokenizer([text, "Hello"], add_special_tokens=False)["input_ids"]
    assert mixed == [ids, plain[2:]]
    for side, rest in (("right", ids[2:12]), ("left", ids[-10:])):
        tokenizer.truncation_side = side
        assert tokenizer(text, truncation=True, max_length=12)["input_ids"] == ids[:2] + rest
    tokenizer.truncation_side = "right"
    parts = tokenizer(text, truncation=True, max_length=12, return_overflowing_tokens=True)
    assert parts["input_ids"][0] == ids[:12] and sum(map(len, parts["input_ids"])) >= len(ids)
    assert tokenizer([text, text], return_tensors="pt")["input_ids"].shape == (2, len(ids))


def test_empty_batch(tokenizer):
    assert dict(tokenizer([])) == {"input_ids": [], "attention_mask": [], "position_ids": []}


def test_tokens_of_programs(tokenizer, chatglm, tmp_path):
    """Tokens that a program adds are read from text and decoded; GLM's own stay what they are."""
    tokenizer.save_pretrained(tmp_path)
    other = chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)
    token = AddedToken("<|tool|>", special=True, normalized=False)
    other.add_special_tokens({"additional_special_tokens": [token]})
    assert token.special  # the caller's object is left alone
    ids = other("call <|tool|> [gMASK]")["input_ids"]
    assert len(tokenizer) in ids and tokenizer.get_command("[gMASK]") not in ids[1:]
    assert other.decode(ids) == "[gMASK]sop" + "call <|tool|> [gMASK]"
    assert other.decode(ids, skip_special_tokens=True) == "call  [gMASK]"
    assert pickle.loads(pickle.dumps(other))("a <|tool|>") == other("a <|tool|>")


def test_chat_template_batch_masks(tokenizer):
    """Padding on the right is not part of an answer."""
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": c}] for c in ("b", "c c c c c")]
    kwargs = dict(return_dict=True, return_assistant_tokens_mask=True, padding=True)
    for options in ({}, {"return_tensors": "pt"}):
        encoded = tokenizer.apply_chat_template(chats, tokenizer_kwargs={"padding_side": "right"}, **kwargs, **options)
        masks, attention = encoded["assistant_masks"], encoded["attention_mask"]
        for mask, attended, ids in zip(masks, attention, encoded["input_ids"]):
            assert all(m <= a for m, a in zip(mask, attended))
            assert [int(i) for i, m in zip(ids, mask) if m][-1] == 2


def test_system_message_and_parts(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "[gMASK]sop[Round 1]\n\n问：Be brief. ab\n\n答："


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "system", "content": "a"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "a"}, {"role": "assistant"}],
    ],
)
def test_bad_messages(tokenizer, messages):
    with pytest.raises(Exception, match="roles must alternate|reads text only|system message only|must be a string"):
        tokenizer.apply_chat_template(messages)


def test_streaming_decode(tokenizer):
    text = "你好👋！Hello, world\n𠮷"
    streamer = TextIteratorStreamer(tokenizer)
    for i in tokenizer.encode(text, add_special_tokens=False):
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(streamer) == text


def test_save_and_reload(tokenizer, tmp_path, chatglm):
    tokenizer.save_pretrained(tmp_path)
    assert sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model")).vocab_size() > 0
    again = chatglm.ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "你好 [gMASK] world"
    assert again(text) == tokenizer(text)
    assert again.chat_template == tokenizer.chat_template
    assert len(again) == len(tokenizer)
    again.add_tokens(["<name>"])
    again.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    again.save_pretrained(tmp_path / "more")
    third = chatglm.ChatGLMTokenizer.from_pretrained(tmp_path / "more")
    n = len(tokenizer)
    assert third.convert_tokens_to_ids(["<name>", "<|end|>", "<|pad|>"]) == again.convert_tokens_to_ids(
        ["<name>", "<|end|>", "<|pad|>"]
    )
    assert min(third.convert_tokens_to_ids(["<name>", "<|pad|>"])) >= n
    assert (third.eos_token, third.pad_token) == ("<|end|>", "<|pad|>")
    assert third.convert_tokens_to_ids("<name>") in third.encode("call <name> now")
    assert "<|end|>" not in third.tokenize("a <|end|>")


def test_custom_end_of_sequence(chatglm):
    tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat)["input_ids"][-1] == tokenizer.eos_token_id == len(tokenizer) - 1


def test_sentencepiece_is_reachable(tokenizer):
    """As converters reach it, for every row of the padded vocabulary."""
    assert tokenizer.name == "GLMTokenizer"
    assert not hasattr(tokenizer, "build_chat_input")  # by which others know ChatGLM3
    sp = tokenizer.tokenizer.sp_model
    assert sp.serialized_model_proto()
    tokens = [tokenizer._convert_id_to_token(i) for i in range(len(tokenizer) + 20)]
    assert tokens[-20:] == [""] * 20 and tokens[sp.vocab_size() + 1] == "[gMASK]"


def test_auto_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)
    assert tokenizer.is_fast and type(tokenizer).__name__ == "ChatGLMTokenizer"
    assert tokenizer.chat_template == (ROOT / "chat_template.jinja").read_text()


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


def test_model_of_another_kind(chatglm, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, how are you"] * 20 + ["fine thanks"]),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=290,
        byte_fallback=True,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="belongs\nto another model|belongs to another model|no BPE model"):
        chatglm.ChatGLMTokenizer(tmp_path / "unigram.model")


@pytest.mark.parametrize("text", ["a\ud800b", ["ok", "\udfff"]])
def test_lone_surrogates(tokenizer, text):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer(text)


@pytest.mark.parametrize(
    "query, history", [(None, []), (["a"], []), ("a", "b"), ("a", ["bc"]), ("a", [("b",)]), ("a", [("b", None)])]
)
def test_bad_prompt(tokenizer, query, history):
    with pytest.raises(ValueError, match="query must be|history"):
        tokenizer.build_prompt(query, history)


def test_unknown_command(tokenizer):
    with pytest.raises(ValueError, match="<sep>"):
        tokenizer.get_command("<sep>")

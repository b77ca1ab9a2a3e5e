"""The ids and labels of fine-tuning: the published script's, and those that chat makes."""

import gzip
import json

import pytest
import torch

from conftest import SMALL
from training.data import (
    IGNORED,
    DataArguments,
    PackedExamples,
    encode,
    encode_dialogue,
    encode_response,
    encode_texts,
    read,
)


def arguments(**options) -> DataArguments:
    return DataArguments(**{"max_source_length": 64, "max_target_length": 16, **options})


@pytest.fixture
def read_rows(tmp_path):
    def build(rows, name="rows.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        args = arguments(train_file=str(path), **options)
        return read(args, "train"), args

    return build


def test_published_encoding(tiny_tokenizer):
    """The prompt with its history, the answer on its own, </s>; only the answer and </s> are learned."""
    history = [["你好", "你好！"], ["Who are you?", "A model."]]
    example = encode_response(tiny_tokenizer, "再见", "Bye bye.", history, arguments(max_source_length=100))
    prompt = tiny_tokenizer.encode(tiny_tokenizer.build_prompt("再见", history), add_special_tokens=True)
    answer = tiny_tokenizer.encode("Bye bye.", add_special_tokens=False) + [2]
    assert example == (prompt + answer, [-100] * len(prompt) + answer, "whole")
    assert prompt[:2] == tiny_tokenizer.get_prefix_tokens()


def test_long_prompts_lose_their_oldest_rounds_and_long_answers_their_end(tiny_tokenizer):
    args = arguments(max_source_length=40, max_target_length=8)
    history = [[f"{i} " * 20, "yes"] for i in range(5)] + [["short", "yes"]]
    example = encode_response(tiny_tokenizer, "and now?", "no " * 30, history, args)
    source = example.input_ids[: example.labels.count(IGNORED)]
    assert source == tiny_tokenizer.encode(tiny_tokenizer.build_prompt("and now?", [["short", "yes"]]))
    assert len(example.labels) - len(source) == 8 and example.labels[-1] != tiny_tokenizer.eos_token_id
    assert example.outcome == "cut"

    example = encode_response(tiny_tokenizer, "one " * 60 + "question?", "yes", [], args)
    source = example.input_ids[: example.labels.count(IGNORED)]
    assert len(source) == 40 and source[:2] == tiny_tokenizer.get_prefix_tokens()
    assert tiny_tokenizer.decode(source).endswith("question?\n\n答：")


def test_dialogues_are_those_of_a_chat(chatglm, tiny_tokenizer):
    """The ids that chat leaves in its cache; </s> is to be predicted after each answer, the question is not."""
    rounds = [("你好", "Hello there!"), ("Who are you?", "A model."), ("再见", "Bye.")]
    messages = [{"role": r, "content": c} for pair in rounds for r, c in zip(("user", "assistant"), pair)]
    ids, labels, outcome = encode_dialogue(tiny_tokenizer, messages, arguments())
    assert len(ids) == len(labels) and outcome == "whole"
    record = chatglm.cache.ChatRecord()
    learned = []
    for query, answer in rounds:
        record = chatglm.generation.continue_record(tiny_tokenizer, record, query, record.rounds)
        assert ids[: len(record.ids)] == record.ids
        answer_ids = tiny_tokenizer.encode(answer, add_special_tokens=False)
        n = len(record.ids) + len(answer_ids)
        assert labels[len(record.ids) : n + 1] == answer_ids + [tiny_tokenizer.eos_token_id]
        learned += range(len(record.ids), n + 1)
        record.ids = record.ids + answer_ids
        record.rounds, record.ends = [*record.rounds, (query, answer)], [*record.ends, n]
    assert ids == record.ids + [tiny_tokenizer.eos_token_id]
    assert [i for i, label in enumerate(labels) if label != IGNORED] == learned


def test_rounds_that_do_not_fit_are_left_out(tiny_tokenizer):
    messages = [{"role": r, "content": "word " * 12} for r in ("user", "assistant") * 4]
    whole = encode_dialogue(tiny_tokenizer, messages, arguments(max_source_length=500))
    some = encode_dialogue(tiny_tokenizer, messages, arguments())
    assert some.outcome == "cut" and len(some.input_ids) <= 64 + 16 + 1 < len(whole.input_ids)
    assert some.input_ids[:-1] == whole.input_ids[: len(some.input_ids) - 1] and some.labels[-1] == 2
    long = [{"role": r, "content": "word " * n} for r, n in (("user", 3), ("assistant", 200))]
    first = encode_dialogue(tiny_tokenizer, long, arguments())
    assert first.outcome == "cut" and len(first.input_ids) <= 81 and first.labels[-1] != 2
    assert encode_dialogue(tiny_tokenizer, messages[:1], arguments()).outcome == "empty"
    messages[3] = {"role": "assistant", "content": " "}
    two = encode_dialogue(tiny_tokenizer, messages, arguments(max_source_length=500))
    assert two.outcome == "cut" and two.input_ids == whole.input_ids[: len(two.input_ids) - 1] + [2]


def test_system_message_begins_the_first_query(tiny_tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("system", "Be brief. "), ("user", "Hi"), ("assistant", "Yo"))]
    ids = encode_dialogue(tiny_tokenizer, messages, arguments()).input_ids
    expected = tiny_tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == expected
    messages[0]["content"] = ""
    ids = encode_dialogue(tiny_tokenizer, messages, arguments()).input_ids
    assert ids == encode_dialogue(tiny_tokenizer, messages[1:], arguments()).input_ids


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.jsonl.gz"])
def test_formats(tiny_tokenizer, tmp_path, name):
    rows = [{"content": "你好", "summary": "Hello!"}, {"content": "再见", "summary": "Bye!"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name == "rows.json":
        text = json.dumps(rows, ensure_ascii=False)
    elif name == "rows.csv":
        text = "content,summary\n你好,Hello!\n再见,Bye!\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    args = arguments(train_file=str(tmp_path / name), prompt_column="content", response_column="summary")
    encoded = encode(read(args, "train"), tiny_tokenizer, args)
    assert [row["input_ids"] for row in encoded] == [
        encode_response(tiny_tokenizer, row["content"], row["summary"], [], args).input_ids for row in rows
    ]


def test_history_column(tiny_tokenizer, read_rows):
    row = {"prompt": "再见", "response": "Bye", "history": [["你好", "Hello!"]]}
    rows, args = read_rows([row], history_column="history")
    assert encode(rows, tiny_tokenizer, args)[0]["input_ids"] == (
        encode_response(tiny_tokenizer, "再见", "Bye", row["history"], args).input_ids
    )


def test_rows_that_nothing_can_be_learned_from_are_counted(tiny_tokenizer, read_rows, logs):
    rows = [{"prompt": "", "response": "x"}, {"prompt": "x", "response": None}, {"prompt": "a", "response": "b " * 50}]
    data, args = read_rows(rows)
    assert len(encode(data, tiny_tokenizer, args)) == 1
    assert "1 of 3 rows are longer than 81 tokens, or have an empty round, and were cut" in logs.text
    assert "2 of 3 rows are left out" in logs.text
    data, args = read_rows(rows[:2])
    with pytest.raises(ValueError, match="No row of the data can be learned from"):
        encode(data, tiny_tokenizer, args)


def test_packed_examples_do_not_see_each_other(small_model, tiny_tokenizer):
    model = small_model(padded_vocab_size=8064, **{k: v for k, v in SMALL.items() if k == "num_layers"})
    args = arguments()
    pairs = [("one", "two"), ("three", "four"), ("five", "six")]
    examples = [encode_response(tiny_tokenizer, *pair, [], args)._asdict() for pair in pairs]
    batch = PackedExamples(tiny_tokenizer, 64)(examples)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1 and not (batch["labels"][batch["position_ids"] == 0] != IGNORED).any()
    assert (batch["labels"] != IGNORED).sum() == sum(label != IGNORED for e in examples for label in e["labels"])
    packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    for begin, end in zip(starts, [*starts[1:], packed.shape[0]]):
        alone = model(batch["input_ids"][:1, begin:end]).logits[0]
        torch.testing.assert_close(packed[begin:end], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "content, options, message",
    [
        (
            b'{"question": "a", "answer": "b"}\n',
            {},
            "no column prompt, response in the data; there are question, answer",
        ),
        (b'{"prompt": "a", "response": "b"}\n', {"history_column": "h"}, "no column h in the data"),
        ("\n".join(['{"prompt": "你", "response": "b"}'] * 3).encode("gb18030"), {}, "not UTF-8 in line 1 "),
        (b'{"prompt": "a", "response": "b"}\n' * 99 + b'{"prompt": "\xff"}', {}, "not UTF-8 in line 100 "),
        (b"\n\n", {}, "has no rows"),
        (
            b'{"prompt": "c", "response": 5}',
            {},
            "Row 1 of the data cannot be read: a text",
        ),
        (b'{"messages": null}\n', {}, "Row 1 of the data cannot be read"),
        (b'{"messages": [{"from": "user", "value": "a"}]}\n', {}, "Row 1 of the data cannot be read: 'role'"),
        (b'{"prompt": "a", \n', {}, "cannot be read as JSON"),
        (b"", {}, "rows.json"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', {}, "user and assistant must alternate"),
    ],
)
def test_bad_data(tiny_tokenizer, tmp_path, content, options, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    args = arguments(train_file=str(path), **options)
    with pytest.raises(ValueError, match=message):
        encode(read(args, "train"), tiny_tokenizer, args)


def test_bad_options(tiny_tokenizer, read_rows):
    with pytest.raises(ValueError, match="There is no data for this: give a --validation_file"):
        read(arguments(), "validation")
    with pytest.raises(ValueError, match="Data files are .json, .jsonl, .csv, also with .gz, got 'x.txt'"):
        read(arguments(train_file="x.txt"), "train")
    with pytest.raises(ValueError, match="max_source_length must be at least 8 tokens, got 2"):
        arguments(max_source_length=2)
    rows, args = read_rows([{"content": "x"}])
    with pytest.raises(ValueError, match="no column text in the data; there are content"):
        encode_texts(rows, tiny_tokenizer, args, 100)


def test_long_documents_are_cut_and_end_once(tiny_tokenizer, read_rows, logs):
    rows, args = read_rows([{"text": "word " * 100}, {"text": "a word"}])
    pieces = encode_texts(rows, tiny_tokenizer, args, 40)
    assert "2 into" in logs.text and all(len(ids) <= 40 for ids in pieces["input_ids"])
    assert pieces["ends"] == [False] * (len(pieces) - 2) + [True, True]
    whole = tiny_tokenizer.encode("word " * 100, add_special_tokens=False)
    assert [token for ids in pieces["input_ids"][:-1] for token in ids] == whole

"""The ids and labels of fine-tuning: the published script's, and those that chat makes."""

import csv
import gzip
import io
import json

import pytest
import torch
from datasets import Dataset

from conftest import SMALL
from training.arguments import DataArguments
from training.data import (
    IGNORED,
    PackedExamples,
    encode,
    encode_dialogue,
    encode_response,
    encode_texts,
    read,
    to_answer,
)


def arguments(**options) -> DataArguments:
    return DataArguments(**{"max_source_length": 64, "max_target_length": 16, **options})


@pytest.fixture
def read_rows(tmp_path):
    def build(rows, name="rows.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        args = arguments(train_file=str(path), **options)
        return read(args, "train", documents="text" in rows[0]), args

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


def test_dialogue_of_just_the_limit_is_whole(tiny_tokenizer):
    messages = [{"role": r, "content": "word " * 30} for r in ("user", "assistant") * 2]
    whole = encode_dialogue(tiny_tokenizer, messages, arguments(max_source_length=500))
    limit = len(whole.input_ids)
    assert encode_dialogue(tiny_tokenizer, messages, arguments(max_source_length=limit - 17)) == whole
    cut = encode_dialogue(tiny_tokenizer, messages, arguments(max_source_length=limit - 18))
    assert cut.outcome == "cut" and len(cut.input_ids) < limit


def test_system_message_begins_the_first_query(tiny_tokenizer):
    messages = [{"role": r, "content": c} for r, c in (("system", "Be brief. "), ("user", "Hi"), ("assistant", "Yo"))]
    ids = encode_dialogue(tiny_tokenizer, messages, arguments()).input_ids
    expected = tiny_tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == expected
    messages[0]["content"] = ""
    ids = encode_dialogue(tiny_tokenizer, messages, arguments()).input_ids
    assert ids == encode_dialogue(tiny_tokenizer, messages[1:], arguments()).input_ids


ROWS = [{"content": "你好", "summary": "Hello!"}, {"content": "再见", "summary": "Bye\tand\nthen"}]


def write_rows(path, rows):
    """Writes a data file of any format that is read."""
    name = path.name.removesuffix(".gz")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name.endswith(".json"):
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    elif name.endswith((".csv", ".tsv")):
        lines = io.StringIO()
        writer = csv.DictWriter(lines, rows[0], delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = lines.getvalue()
    data = text.encode()
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl.gz", "rows.csv.gz", "ROWS.JSON"],
)
def test_formats(tiny_tokenizer, tmp_path, name):
    path = write_rows(tmp_path / name.lower(), ROWS)
    (tmp_path / name.lower()).rename(tmp_path / name)
    args = arguments(
        train_file=str(tmp_path / name), prompt_column="content", response_column="summary", max_target_length=40
    )
    assert path.lower() == args.train_file.lower()
    encoded = encode(read(args, "train"), tiny_tokenizer, args)
    assert [row["input_ids"] for row in encoded] == [
        encode_response(tiny_tokenizer, row["content"], row["summary"], [], args).input_ids for row in ROWS
    ]


def test_byte_order_mark_is_not_a_part_of_the_first_column(tmp_path):
    for name, text in (("a.csv", "prompt,response\na,b\n"), ("a.json", '[{"prompt": "a", "response": "b"}]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        rows = read(arguments(train_file=str(tmp_path / name)), "train")
        assert rows[0] == {"query": "a", "response": "b", "history": []}


CELLS = ["010", "1.50", "NA", "null", "None", "nan", "1e5", "2020-01-02", "true", "", " x ", "1,5", 'say "hi"']


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl"])
def test_cells_are_texts(tmp_path, name):
    """Letter for letter: no numbers, dates or missing values are made of them, also where all look like such."""
    for cells in (CELLS, ["010", "1.50"], ["2020-01-02"]):
        path = write_rows(tmp_path / name, [{"prompt": cell, "response": cell} for cell in cells])
        rows = read(arguments(train_file=path), "train")
        assert [row["response"] for row in rows] == [row["query"] for row in rows] == cells


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_texts_may_follow_many_numbers(tmp_path, name):
    cells = [str(i) for i in range(10_001)] + ["a text"]
    path = write_rows(tmp_path / name, [{"prompt": cell, "response": cell} for cell in cells])
    assert [row["response"] for row in read(arguments(train_file=path), "train")] == cells


def test_long_cells_are_read(tmp_path):
    """Of more than the 131,072 characters that Python's csv reads by default, whose limit stays as it was."""
    before = csv.field_size_limit(131_072)
    path = write_rows(tmp_path / "rows.csv", [{"prompt": "a", "response": "b" * 200_000}])
    assert len(read(arguments(train_file=path), "train")[0]["response"]) == 200_000
    assert csv.field_size_limit(before) == 131_072


def test_path_is_not_a_pattern(tmp_path):
    """Files whose names have the characters of patterns and URLs, beside files that those would find."""
    for i, name in enumerate(["a?b.json", "axb.json", "[1].jsonl", "1.jsonl", "*.json", "a#b::c.json"]):
        write_rows(tmp_path / name, [{"prompt": str(i), "response": "x"}])
    for i, name in enumerate(["a?b.json", "axb.json", "[1].jsonl", "1.jsonl", "*.json", "a#b::c.json"]):
        assert read(arguments(train_file=str(tmp_path / name)), "train")["query"] == [str(i)]


def test_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "rows.json"
    for text in ("abc", "xyz", "def"):
        write_rows(path, [{"prompt": text, "response": text}])
        assert read(arguments(train_file=str(path)), "train")["query"] == [text]
    assert read(arguments(train_file=str(path), overwrite_cache=True), "train")["query"] == ["def"]


def test_first_rows(tmp_path):
    """A limit, by which the rest is not even read."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' * 3 + "damaged")
    assert len(read(arguments(train_file=str(path)), "train", limit=2)) == 2
    with pytest.raises(ValueError, match="line 4 is not JSON"):
        read(arguments(train_file=str(path)), "train")
    with pytest.raises(ValueError, match="max_train_samples must be at least 1, got 0"):
        arguments(max_train_samples=0)


ALPACA = {"instruction": "Translate", "input": "你好", "output": "Hello", "history": [["a", "b"]], "system": "Brief. "}


@pytest.mark.parametrize(
    "row, options, query, history",
    [
        (ALPACA, {}, "Translate\n你好", [["Brief. a", "b"]]),
        ({"instruction": "Sing", "input": "", "output": "La"}, {}, "Sing", []),
        (
            ALPACA,
            {"prompt_column": "instruction", "response_column": "output"},
            "Brief. Translate\n你好",
            [],
        ),
        (
            {"q": "Translate", "text": "你好", "a": "Hello"},
            {"prompt_column": "q", "input_column": "text", "response_column": "a"},
            "Translate\n你好",
            [],
        ),
    ],
)
def test_alpaca(tmp_path, logs, row, options, query, history):
    """Its input is a part of the prompt, also where columns are named by hand; and the system message begins it."""
    for name in ("rows.json", "rows.parquet"):
        rows = read(arguments(train_file=write_rows(tmp_path / name, [row]), **options), "train")
        response = row.get("output", row.get("a"))
        assert rows[0] == {"query": query, "response": response, "history": history}
    assert ("Columns that are not read: history" in logs.text) == (row is ALPACA and bool(options))


MESSAGES = [{"role": r, "content": c} for r, c in (("system", "S. "), ("user", "a"), ("assistant", "b"), ("user", "c"))]
SHAREGPT = [{"from": r, "value": c} for r, c in (("system", "S. "), ("human", "a"), ("gpt", "b"), ("human", "c"))]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "S. "},
        {"messages": PARTS},
        {"messages": json.dumps(MESSAGES)},
    ],
    ids=["messages", "ShareGPT", "ShareGPT with a system column", "content parts", "JSON in a text"],
)
def test_messages_of_any_form(tmp_path, row):
    rows = read(arguments(train_file=write_rows(tmp_path / "rows.json", [row])), "train")
    assert rows[0] == {"rounds": [["S. a", "b"], ["c", None]]}


def test_rows_to_answer_need_no_response(tmp_path):
    pairs = arguments(test_file=write_rows(tmp_path / "pairs.json", [{"prompt": "a"}]))
    assert [to_answer(row) for row in read(pairs, "test")] == [("a", None, [])]
    rows = [{"messages": MESSAGES[1:]}, {"messages": MESSAGES[1:3]}]
    chats = arguments(test_file=write_rows(tmp_path / "chats.json", rows))
    assert [to_answer(row) for row in read(chats, "test")] == [("c", None, [["a", "b"]]), ("a", "b", [])]
    with pytest.raises(ValueError, match="no column response in the data; there are prompt"):
        read(arguments(train_file=pairs.test_file), "train")


def test_folder_of_the_library(tmp_path):
    """`--dataset_name`, which may be a folder: its rows are read by `datasets`, and brought into the same forms."""
    write_rows(tmp_path / "train.jsonl", [{"conversations": SHAREGPT}] * 3)
    args = arguments(dataset_name=str(tmp_path))
    assert read(args, "train", limit=2)["rounds"] == [[["S. a", "b"], ["c", None]]] * 2
    write_rows(tmp_path / "train.jsonl", [{"prompt": 1, "response": 2}])
    with pytest.raises(ValueError, match="Row 1 of the data cannot be read: prompt must be a text, got 1"):
        read(args, "train")


@pytest.mark.parametrize("history", [[["你好", "Hello!"]], []])
def test_history_as_json_text(tiny_tokenizer, tmp_path, history):
    """As in a CSV file, whose cells are texts."""
    row = {"prompt": "再见", "response": "Bye", "history": json.dumps(history) if history else ""}
    args = arguments(train_file=write_rows(tmp_path / "rows.csv", [row]), history_column="history")
    expected = encode_response(tiny_tokenizer, "再见", "Bye", history, args).input_ids
    assert encode(read(args, "train"), tiny_tokenizer, args)[0]["input_ids"] == expected


def test_unread_columns_are_said(tmp_path, logs):
    row = {"id": 5, "prompt": "a", "response": "b", "history": [], "source": "x"}
    read(arguments(train_file=write_rows(tmp_path / "rows.json", [row])), "train")
    assert "Columns that are not read: history, source." in logs.text
    logs.clear()
    read(arguments(train_file=write_rows(tmp_path / "rows.json", [{"prompt": "a", "response": "b"}])), "train")
    assert "columns" not in logs.text


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
    with pytest.raises(ValueError, match="No row of the data can be used"):
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
        (b"\n\n", {}, "rows.json has no rows"),
        (b"", {}, "rows.json has no rows"),
        (b"[]", {}, "rows.json has no rows"),
        (b"[1]", {}, "rows.json, row 1 must be an object with columns, got 1"),
        (b'"text"', {}, "rows.json, line 1 must be an object with columns, got 'text'"),
        (b'{"prompt": "c", "response": 5}', {}, "Row 1 of the data cannot be read: response must be a text, got 5"),
        (b'{"prompt": "c", "response": "d"}\n{"prompt": "c"}', {}, "Row 2 .*: it has no response, but prompt"),
        (b'{"prompt": "\\ud800", "response": "b"}', {}, "prompt has half of a surrogate pair"),
        (b'{"prompt": "a", \n', {}, "rows.json, line 1 is not JSON"),
        (b'[{"prompt": "a"},\n', {}, "rows.json is not JSON"),
        (b"[" * 100_000, {}, "rows.json is not JSON"),
        (b'{"messages": [{"speaker": "user", "value": "a"}]}\n', {}, "Row 1 .*must have role and content, or from and value, got speaker, value"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}\n', {}, "Row 1 .*the role 'tool' is unknown: there are system, user, human"),
        (b'{"messages": ["a"]}\n', {}, "Row 1 .*a message must have role and content, got 'a'"),
        (b'{"messages": {"role": "user"}}\n', {}, "Row 1 .*messages must be a list, got {'role'"),
        (b'{"messages": "hello"}\n', {}, "Row 1 .*messages must be a list, as JSON where cells are texts, got 'hello'"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', {}, "content has a part that is not a text, {'type': 'image'}"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', {}, "user and assistant must alternate"),
        (b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}\n', {}, "calls tools"),
        (b'{"prompt": "a", "response": "b", "h": [["a"]]}\n', {"history_column": "h"}, "h must be a list of .query, answer., two texts each, got .'a'. in it"),
        (b'{"prompt": "a", "response": "b", "h": 5}\n', {"history_column": "h"}, "h must be a list, got 5"),
    ],
)  # fmt: skip
def test_bad_data(tiny_tokenizer, tmp_path, content, options, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    args = arguments(train_file=str(path), **options)
    with pytest.raises(ValueError, match=message):
        encode(read(args, "train"), tiny_tokenizer, args)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.csv", b"prompt,response\na,b,c\n", "line 2 ends a row of 3 cells, and there are 2 columns"),
        ("rows.csv", b"prompt,prompt\na,b\n", "names a column twice: prompt, prompt"),
        ("rows.csv", b'prompt,response\na,"b\n', "cannot be read as CSV"),
        ("rows.csv", b"prompt;response\na;b\n", "no column prompt, response in the data; there are prompt;response"),
        ("rows.csv", b"prompt,response\n", "has no rows"),
        ("rows.csv", b"", "has no rows"),
        ("rows.tsv", b"prompt\tresponse\na\n", "line 2 ends a row of 1 cells"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
        ("rows.json.gz", b"no gzip", "rows.json.gz is damaged"),
        (
            "rows.json.gz",
            gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 9, mtime=0)[:-9],
            "rows.json.gz is damaged",
        ),
        ("rows.xlsx", b"PK", "rows.xlsx: data files are .json, .jsonl, .csv, .tsv, .parquet"),
        ("rows.csv", None, "There is no file .*rows.csv"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(arguments(train_file=str(tmp_path / name)), "train")


def test_bad_options(tiny_tokenizer, read_rows):
    with pytest.raises(ValueError, match="There is no validation data: pass --validation-file"):
        read(arguments(), "validation")
    with pytest.raises(ValueError, match="max_source_length must be at least 8 tokens, got 2"):
        arguments(max_source_length=2)
    _, args = read_rows([{"prompt": "x", "response": "y"}])
    with pytest.raises(ValueError, match="no column text in the data; there are prompt, response"):
        read(args, "train", documents=True)


def test_document_of_just_the_limit_ends(tiny_tokenizer, read_rows):
    rows, args = read_rows([{"text": "word " * 20}])
    length = len(tiny_tokenizer.encode("word " * 20, add_special_tokens=False))
    assert encode_texts(rows, tiny_tokenizer, args, length)["ends"] == [True]
    assert encode_texts(rows, tiny_tokenizer, args, length - 1)["ends"] == [False, True]


def test_long_documents_are_cut_and_end_once(tiny_tokenizer, read_rows, logs):
    rows, args = read_rows([{"text": "word " * 100}, {"text": "a word"}])
    pieces = encode_texts(rows, tiny_tokenizer, args, 40)
    assert "2 into" in logs.text and all(len(ids) <= 40 for ids in pieces["input_ids"])
    assert pieces["ends"] == [False] * (len(pieces) - 2) + [True, True]
    whole = tiny_tokenizer.encode("word " * 100, add_special_tokens=False)
    assert [token for ids in pieces["input_ids"][:-1] for token in ids] == whole

"""The training data of the small model: the ids that chat makes, and what is to be predicted after each."""

import pytest
import torch

from conftest import ROOT, SMALL


@pytest.fixture(scope="module")
def train_tiny():
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "training/train_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ids_are_those_of_a_chat(train_tiny, chatglm, tiny_tokenizer):
    """A dialogue as chat leaves it in its cache; </s> is to be predicted after each answer, the question from round 2 on."""
    rounds = [("你好", "Hello there!"), ("Who are you?", "A model."), ("再见", "Bye.")]
    ids, labels = train_tiny.PackedDialogues.encode(rounds, tiny_tokenizer)
    assert len(ids) == len(labels)
    record = chatglm.modeling.ChatRecord()
    for query, answer in rounds:
        record = chatglm.modeling.continue_record(tiny_tokenizer, record, query, record.rounds)
        assert ids[: len(record.ids)] == record.ids
        answer_ids = tiny_tokenizer.encode(answer, add_special_tokens=False)
        n = len(record.ids) + len(answer_ids)
        assert labels[len(record.ids) : n + 1] == answer_ids + [tiny_tokenizer.eos_token_id]
        record.ids = record.ids + answer_ids
        record.rounds, record.ends = [*record.rounds, (query, answer)], [*record.ends, n]
    assert ids == record.ids + [tiny_tokenizer.eos_token_id]


def test_packed_dialogues_do_not_see_each_other(train_tiny, small_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(train_tiny, "BLOCK", 40)
    rows = {
        "chatterbot_en": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in (("one", "two"), ("three", "four"), ("five", "six"))
        ]
    }
    item = train_tiny.PackedDialogues(rows, tiny_tokenizer)[0]
    starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    model = small_model(padded_vocab_size=8064, **{k: v for k, v in SMALL.items() if k == "num_layers"})
    packed = model(**{k: v[None] for k, v in item.items()}, use_cache=False).logits[0]
    for begin, end in zip(starts, [*starts[1:], 40]):
        alone = model(item["input_ids"][None, begin:end]).logits[0]
        torch.testing.assert_close(packed[begin:end], alone, atol=1e-4, rtol=1e-4)


def test_held_out_rows_are_not_trained_on(train_tiny, shared):
    train, held_out = train_tiny.read_corpora(shared / "corpora")
    for name, rows in held_out.items():
        assert not {str(row) for row in rows} & {str(row) for row in train[name]}
    assert 0.01 < sum(map(len, held_out.values())) / sum(map(len, train.values())) < 0.03

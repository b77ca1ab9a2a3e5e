"""GLM's mixed objective: what is cut out is predicted, once, and nothing of it can be seen before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import objective


@pytest.fixture(scope="module")
def commands(tiny_tokenizer):
    return {name: tiny_tokenizer.get_command(name) for name in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")}


def restore(sample, commands, eos) -> list[int]:
    """Puts what is predicted back where it was cut out; for blanks in every order, as which came from where is unknown."""
    ids = sample.ids
    if ids[0] == commands["[gMASK]"]:
        assert ids[1] == commands["sop"] and ids[-1] == eos
        return [ids[2:-1]]
    context, spans, span = ids[: sample.context], [], None
    for token in ids[sample.context :]:
        if token == commands["sop"]:
            span = []
        elif token == commands["eop"]:
            spans.append(span)
        else:
            span.append(token)
    masks = [i for i, token in enumerate(context) if token in (commands["[MASK]"], commands["[sMASK]"])]
    assert len(masks) == len(spans)
    return context, masks, spans


@settings(max_examples=80, deadline=None)
@given(length=st.integers(1, 400), seed=st.integers(0, 1000), task=st.sampled_from(["blanks", "document"]))
def test_round_trip(tiny_tokenizer, commands, length, seed, task):
    """Every token of a text is there once, as context or to be predicted; labels are the ids they stand beside."""
    shares = dict.fromkeys(("blanks", "sentences", "document"), 0.0) | {task: 1.0}
    collator = objective.MixedObjective(tiny_tokenizer, block_size=128, **shares)
    # Each once, so that it is known where a span came from
    ids = (torch.randperm(7600, generator=torch.Generator().manual_seed(seed))[:length] + 300).tolist()
    restored = []
    samples = list(collator.samples(ids, seed))
    for number, sample in enumerate(samples, start=1):
        assert len(sample.ids) == len(sample.labels) <= 128
        predicted = [i for i, label in enumerate(sample.labels) if label != -100]
        assert all(sample.labels[i] == sample.ids[i] for i in predicted)
        assert predicted and min(predicted) >= sample.context
        if sample.ids[0] == commands["[gMASK]"]:
            # The end of a document is learned where it ends, and not where it is cut.
            ends = sample.ids[-1] == tiny_tokenizer.eos_token_id
            assert sample.ids[1] == commands["sop"] and ends == (number == len(samples))
            restored += sample.ids[2:-1] if ends else sample.ids[2:]
            continue
        context, masks, spans = restore(sample, commands, tiny_tokenizer.eos_token_id)
        where = {token: i for i, token in enumerate(ids)}
        spans = sorted(spans, key=lambda span: where[span[0]])  # the order in which they were cut out
        assert not {token for span in spans for token in span} & set(context)  # nothing leaks
        for token in context:
            restored += spans.pop(0) if token == commands["[MASK]"] else [token]
        # Predicted are the spans and the end of each, and not where they begin
        sops = [i for i, token in enumerate(sample.ids) if token == commands["sop"]]
        assert set(predicted) | set(sops) == set(range(sample.context, len(sample.ids)))
    assert restored == ids


def test_long_documents_end_once(tiny_tokenizer):
    """In several rows: `</s>` is learned after the last part alone, and nowhere if the document goes on in another piece."""
    collator = objective.MixedObjective(tiny_tokenizer, block_size=64, blanks=0, document=1)
    for ends in (True, False):
        samples = list(collator.samples(list(range(300, 500)), seed=0, ends=ends))
        eos = tiny_tokenizer.eos_token_id
        assert len(samples) > 2 and [s.ids[-1] == eos for s in samples] == [False] * (len(samples) - 1) + [ends]
        assert all(len(sample.ids) <= 64 for sample in samples)
    document = {"input_ids": list(range(300, 500)), "seed": 0}
    assert torch.equal(collator([document])["input_ids"], collator([document | {"ends": True}])["input_ids"])


def test_spans_follow_in_shuffled_order(tiny_tokenizer, commands):
    """Every order of three spans is drawn about as often."""
    collator = objective.MixedObjective(tiny_tokenizer)
    spans = [(2, 4), (6, 7), (9, 12)]
    orders = {}
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        sample = collator.infilling_sample(list(range(300, 320)), spans, commands["[MASK]"], generator)
        _, _, found = restore(sample, commands, 2)
        assert sorted(found) == [[302, 303], [306], [309, 310, 311]]
        order = tuple(span[0] for span in found)
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 6 and min(orders.values()) > 60


def test_rows_are_filled_longest_first():
    samples = [objective.Sample([i] * n, [i] * n, 0) for i, n in enumerate((4, 4, 6, 6))]
    rows = objective.pack(samples, 10)
    assert [[len(sample.ids) for sample in row] for row in rows] == [[6, 4], [6, 4]]
    batch = objective.to_batch([*rows, samples[:1]], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[2] * 6 + [0] * 4, [3] * 6 + [1] * 4, [0] * 4 + [9] * 6]
    assert batch["labels"].tolist() == [[2] * 6 + [0] * 4, [3] * 6 + [1] * 4, [0] * 4 + [-100] * 6]
    positions = [*range(6), *range(4)]
    assert batch["position_ids"].tolist() == [positions, positions, [*range(4), *[0] * 6]]


def test_shares_hold_over_many_draws(tiny_tokenizer, commands):
    collator = objective.MixedObjective(tiny_tokenizer, block_size=512)
    ids = list(range(300, 700))
    drawn = {"blanks": 0, "document": 0}
    lengths, masked, generated = [], [], []
    for seed in range(2000):
        (sample, *_) = collator.samples(ids[:300], seed)
        if sample.ids[0] == commands["[gMASK]"]:
            drawn["document"] += 1
            generated.append((len(sample.ids) - sample.context - 1) / 300)
        else:
            drawn["blanks"] += 1
            _, _, spans = restore(sample, commands, 2)
            lengths += map(len, spans)
            masked.append(sum(map(len, spans)) / 300)
    assert abs(drawn["blanks"] / 2000 - 0.3) < 0.04
    assert all(share == 0.15 for share in masked)
    assert abs(sum(lengths) / len(lengths) - 3.0) < 0.2  # Poisson, but never 0, and the last is cut short
    assert min(generated) >= 0.5 and abs(sum(generated) / len(generated) - 0.75) < 0.02
    assert set(lengths) >= {1, 2, 3, 4, 5, 6}


def test_sentences(tiny_tokenizer, commands):
    collator = objective.MixedObjective(tiny_tokenizer, block_size=256, blanks=0, sentences=1, document=0)
    text = "今天天气很好。我们去公园吧！The dog ran away. It was late.\nWhy did it go? Nobody knows."
    ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    (sample,) = collator.samples(ids, seed=0)
    context, masks, spans = restore(sample, commands, 2)
    assert masks and all(context[i] == commands["[sMASK]"] for i in masks)
    for span in spans:
        assert tiny_tokenizer.decode(span).strip() in text
        assert tiny_tokenizer.decode(span).rstrip()[-1] in "。！.?"
    cut = []
    for seed in range(200):
        (sample,) = collator.samples(ids * 4, seed)
        cut.append(1 - (sample.context - sample.ids[: sample.context].count(commands["[sMASK]"])) / len(ids * 4))
    assert 0.12 < sum(cut) / len(cut) < 0.17 and max(cut) < 0.3
    # Of a text without sentences enough, a document
    (sample,) = collator.samples(ids[:5], seed=0)
    assert sample.ids[0] == commands["[gMASK]"]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_nothing_is_seen_that_should_not_be(small_model, tiny_tokenizer, bidirectional):
    """The loss at each place, in rows of several documents, depends on what comes before in its own document alone."""
    torch.manual_seed(0)
    collator = objective.MixedObjective(tiny_tokenizer, block_size=96, bidirectional=bidirectional)
    documents = [{"input_ids": torch.randint(300, 7900, (n,)).tolist(), "seed": n} for n in (30, 20, 25, 60)]
    batch = collator(documents)
    assert batch["input_ids"].shape[0] < 4  # packed
    model = small_model(padded_vocab_size=8064, seq_length=128)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        for row in range(len(logits)):
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], logits.shape[1]]
            for begin, end in zip(starts, ends):
                if end - begin < 2:
                    continue  # padding
                changed = {name: value[row : row + 1].clone() for name, value in batch.items()}
                changed["input_ids"][0, :begin] = 5
                changed["input_ids"][0, end - 1 :] = 5
                others = model(**changed, use_cache=False).logits[0]
                torch.testing.assert_close(others[begin : end - 1], logits[row, begin : end - 1])
    first = batch["labels"] != -100
    assert not first[batch["position_ids"] == 0].any()


def test_draws_depend_on_the_seed_alone(tiny_tokenizer):
    """Not on torch's generator, which is elsewhere when a run is resumed, and not on the rows beside it."""
    collator = objective.MixedObjective(tiny_tokenizer, block_size=64)
    documents = [{"input_ids": list(range(300 + 50 * i, 340 + 50 * i)), "seed": i} for i in range(4)]
    expected = collator(documents)
    torch.manual_seed(1)
    again = collator(documents)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    alone = collator(documents[:1])["input_ids"][0].tolist()
    assert any(row[: len(alone)] == alone for row in expected["input_ids"].tolist())
    others = collator([document | {"seed": document["seed"] + 10} for document in documents])
    assert others["input_ids"].tolist() != expected["input_ids"].tolist()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(blanks=0, document=0), "not all 0"),
        (dict(document=-1), "must not be negative"),
        (dict(masked_share=1.0), "masked_share must be between 0 and 1, got 1.0"),
        (dict(mean_span=0), "mean_span must be positive, got 0"),
        (dict(min_document=2), "min_document must be in"),
        (dict(block_size=4), "block_size must be at least 16, got 4"),
    ],
)
def test_options_that_cannot_work(tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        objective.MixedObjective(tiny_tokenizer, **options)

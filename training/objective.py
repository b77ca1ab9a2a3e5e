"""
GLM's mixed objective as a data collator (Du et al. 2022, arXiv 2103.10360; Zeng et al. 2022, arXiv 2210.02414).

Each document is turned, at random, into one of three tasks:

- blanks: short spans are cut out, each replaced by `[MASK]`, and follow the text, in shuffled order, as `sop span eop`;
- sentences: the same with whole sentences and `[sMASK]`;
- document: `[gMASK] sop` and the text, whose last part is to be generated, and then `</s>`. That is the form of a chat.

The loss is only on what was cut out. As in ChatGLM2, the mask is causal everywhere and positions are counted once through the row.
With `bidirectional=True` the context can attend to all of itself, as in the first generation. Its two-dimensional positions are
not offered: ChatGLM2's rotary embedding has one position per token, so no checkpoint could use them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


TASKS = ("blanks", "sentences", "document")
IGNORED = -100  # as a label: not predicted
END_OF_SENTENCE = re.compile(r"[。！？!?；;…\n.]\s*$")


class Sample(NamedTuple):
    """A training sample: ids, the label at each position (the next token), and the number of ids that are context."""

    ids: list[int]
    labels: list[int]
    context: int


@dataclass
class MixedObjective:
    """
    The collator: turns documents into packed rows.

    Args:
        tokenizer: ChatGLM2's.
        block_size: Largest number of tokens of a row. Longer documents are cut into several.
        blanks, sentences, document: Share of each task. The defaults are those of GLM-130B: 30 % blanks, 70 % document.
        masked_share: Share of the tokens that are cut out as blanks or sentences (15 %, both papers).
        mean_span: Mean of the Poisson-distributed lengths of blanks (3, both papers).
        min_document: Smallest share of a document that is predicted. The share is uniform from this to 1 (a half, GLM).
        bidirectional: Whether the context can attend to all of itself. Needs a mask of `[rows, 1, n, n]`.

    The random choices for a row depend only on its `seed`, so a run that is resumed or distributed makes the same ones.
    """

    tokenizer: object
    block_size: int = 512
    blanks: float = 0.3
    sentences: float = 0.0
    document: float = 0.7
    masked_share: float = 0.15
    mean_span: float = 3.0
    min_document: float = 0.5
    bidirectional: bool = False

    def __post_init__(self):
        shares = {name: getattr(self, name) for name in TASKS}
        if min(shares.values()) < 0 or not sum(shares.values()) > 0:
            raise ValueError(f"The shares of the tasks must not be negative, and not all 0, got {shares}.")
        if not 0 < self.masked_share < 1:
            raise ValueError(f"masked_share must be between 0 and 1, got {self.masked_share}.")
        if not self.mean_span > 0:
            raise ValueError(f"mean_span must be positive, got {self.mean_span}.")
        if not 0 <= self.min_document <= 1:
            raise ValueError(f"min_document must be in [0, 1], got {self.min_document}.")
        if self.block_size < 16:
            raise ValueError(f"block_size must be at least 16, got {self.block_size}.")
        commands = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
        self.commands = {name: self.tokenizer.get_command(name) for name in commands}

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: With `input_ids`, a document without special tokens, or a piece of one; a `seed`; and `ends`, whether it
                ends with that (true by default).

        Returns:
            The result of `to_batch`; with `bidirectional` also the `attention_mask`, true where attended.
        """
        samples = [
            sample
            for example in examples
            for sample in self.samples(list(example["input_ids"]), example["seed"], example.get("ends", True))
        ]
        rows = pack(samples, self.block_size)
        batch = to_batch(rows, self.tokenizer.pad_token_id)
        if self.bidirectional:
            batch["attention_mask"] = context_mask(rows, batch["input_ids"].shape[1])
        return batch

    def samples(self, ids: list[int], seed: int, ends: bool = True) -> Iterator[Sample]:
        """Draws a task for a document and makes a sample from it, or several if it does not fit into one row."""
        shares = torch.tensor([self.blanks, self.sentences, self.document], dtype=torch.float)
        generator = torch.Generator().manual_seed(seed)
        begin = 0
        while begin < len(ids):
            task = TASKS[int(torch.multinomial(shares, 1, generator=generator))]
            # Each span adds three tokens, and has one at least; the prefix and the end of a document are three.
            added = 1 + 3 * self.masked_share if task != "document" else 1
            piece = ids[begin : begin + int((self.block_size - 3) / added)]
            begin += len(piece)
            draw = {"blanks": self.draw_blanks, "sentences": self.draw_sentences}.get(task)
            spans = draw(piece, generator) if draw else []
            if spans:
                mask = self.commands["[MASK]" if task == "blanks" else "[sMASK]"]
                yield self.infilling_sample(piece, spans, mask, generator)
            else:  # or too short for the task
                yield self.document_sample(piece, generator, ends and begin >= len(ids))

    def document_sample(self, ids: list[int], generator: torch.Generator, ends: bool = True) -> Sample:
        share = self.min_document + (1 - self.min_document) * float(torch.rand((), generator=generator))
        context = round(len(ids) * (1 - share))
        prefix = [self.commands["[gMASK]"], self.commands["sop"]]
        end = [self.tokenizer.eos_token_id] if ends else []
        labels = [IGNORED] * (len(prefix) + context) + ids[context:] + end
        return Sample(prefix + ids + end, labels, len(prefix) + context)

    def infilling_sample(
        self, ids: list[int], spans: list[tuple[int, int]], mask: int, generator: torch.Generator
    ) -> Sample:
        """
        Args:
            spans: What to cut out: (begin, end) in order, not adjacent.
            mask: The token that replaces each span.
        """
        context, begin = [], 0
        for span_begin, span_end in spans:
            context += ids[begin:span_begin] + [mask]
            begin = span_end
        context += ids[begin:]
        tokens, labels = list(context), [IGNORED] * len(context)
        for i in torch.randperm(len(spans), generator=generator).tolist():
            span = ids[slice(*spans[i])]
            tokens += [self.commands["sop"], *span, self.commands["eop"]]
            labels += [IGNORED, *span, self.commands["eop"]]
        return Sample(tokens, labels, len(context))

    def draw_blanks(self, ids: list[int], generator: torch.Generator) -> list[tuple[int, int]]:
        """Draws spans with Poisson lengths, `masked_share` of the tokens together, with at least one token between them."""
        budget = round(len(ids) * self.masked_share)
        lengths = []
        while budget > 0:
            length = min(max(int(torch.poisson(torch.tensor(float(self.mean_span)), generator)), 1), budget)
            lengths.append(length)
            budget -= length
        free = len(ids) - sum(lengths) - (len(lengths) - 1)
        if not lengths or free < 1:
            return []
        # Where among what is left each begins: sorted draws, and one token between.
        offsets = sorted(torch.randint(free + 1, (len(lengths),), generator=generator).tolist())
        spans, cut = [], 0
        for i, (offset, length) in enumerate(zip(offsets, lengths)):
            begin = offset + cut + i
            spans.append((begin, begin + length))
            cut += length
        return spans

    def draw_sentences(self, ids: list[int], generator: torch.Generator) -> list[tuple[int, int]]:
        """Draws whole sentences with about `masked_share` of the tokens, at least one; none if there are fewer than three."""
        sentences = split_sentences(self.tokenizer, ids)
        if len(sentences) < 3:
            return []
        chosen, budget = [], len(ids) * self.masked_share
        for i in torch.randperm(len(sentences), generator=generator).tolist():
            length = sentences[i][1] - sentences[i][0]
            # Two masks side by side would be one gap; and the share is missed by less without what is twice the rest of it.
            if length <= 2 * budget and not any(abs(i - other) == 1 for other in chosen):
                chosen.append(i)
                budget -= length
        chosen = chosen or [min(range(len(sentences)), key=lambda i: sentences[i][1] - sentences[i][0])]
        return [sentences[i] for i in sorted(chosen)]


def split_sentences(tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Returns the beginnings and ends of sentences in `ids`. A token that belongs to two sentences goes to the first."""
    ends_sentence = [bool(END_OF_SENTENCE.search(tokenizer.decode([token], skip_special_tokens=True))) for token in ids]
    spans, begin = [], 0
    for i, ends in enumerate(ends_sentence):
        if ends or i == len(ids) - 1:
            spans.append((begin, i + 1))
            begin = i + 1
    return spans


def pack(samples: list[Sample], block_size: int) -> list[list[Sample]]:
    """Packs samples into rows of at most `block_size` tokens: the longest first, each into the first row with room."""
    rows, room = [], []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        fitting = next((i for i, left in enumerate(room) if len(sample.ids) <= left), None)
        if fitting is None:
            rows.append([])
            room.append(block_size)
            fitting = -1
        rows[fitting].append(sample)
        room[fitting] -= len(sample.ids)
    return rows


def to_batch(rows: list[list[Sample]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Returns `input_ids`, `labels` and `position_ids`, each `[rows, n]`. Positions start at 0 in each sample, so the mask can
    separate the samples.
    """
    length = max(sum(len(sample.ids) for sample in row) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "labels": torch.full((len(rows), length), IGNORED),
        "position_ids": torch.zeros(len(rows), length, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        begin = 0
        for sample in row:
            end = begin + len(sample.ids)
            batch["input_ids"][i, begin:end] = torch.tensor(sample.ids)
            batch["labels"][i, begin:end] = torch.tensor(sample.labels)
            batch["position_ids"][i, begin:end] = torch.arange(end - begin)
            begin = end
    return batch


def context_mask(rows: list[list[Sample]], length: int) -> torch.BoolTensor:
    """Returns `[rows, 1, length, length]`, true where attended: causal within each sample, full within its context."""
    mask = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    for i, row in enumerate(rows):
        begin = 0
        for sample in row:
            end = begin + len(sample.ids)
            mask[i, 0, begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
            mask[i, 0, begin : begin + sample.context, begin : begin + sample.context] = True
            begin = end
        mask[i, 0, begin:, begin:] = torch.eye(
            length - begin, dtype=torch.bool
        )  # padding sees itself, or rows were NaN
    return mask

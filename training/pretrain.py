"""
Pretrains with GLM's mixed objective, from new random weights or from a model:

    python -m training.pretrain --model PATH --train-file texts.jsonl --output output

Each row is a document (`--text-column`). See docs/training.md.
"""

from dataclasses import dataclass, field

from .arguments import DataArguments, ModelOptions, RecipeOptions, answer_help


@dataclass
class ObjectiveArguments(DataArguments):
    """The data, and the share of each task of the mixed objective. The defaults are those of GLM-130B."""

    block_size: int = field(
        default=2048, metadata={"help": "Number of tokens of a row. Documents are packed into rows."}
    )
    blanks: float = 0.3
    sentences: float = 0.0
    document: float = 0.7
    masked_share: float = 0.15
    mean_span: float = 3.0
    min_document: float = 0.5
    bidirectional: bool = False


if __name__ == "__main__":
    answer_help(__doc__, ModelOptions, ObjectiveArguments, RecipeOptions)  # before the slow imports below


import torch
from transformers import set_seed

from common.errors import plain_errors

from .data import encode_texts, read
from .objective import MixedObjective
from .options import ModelArguments, RecipeArguments, load, parse
from .trainer import RecipeTrainer, SetEpoch, evaluate, output_folder, train


class Documents(torch.utils.data.Dataset):
    """Documents with the seed for their random choices, which depends on the run, the epoch and the row."""

    def __init__(self, rows, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        seed = hash((self.seed, self.epoch, i)) % 2**63  # of integers: the same in every process
        return {**self.rows[i], "seed": seed}


def main(argv=None):
    model_args, data_args, args = parse(__doc__, ModelArguments, ObjectiveArguments, RecipeArguments, args=argv)
    model_args.check_trainable("all weights")
    splits = {}
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if split == "train" or data_args.validation_file or args.do_eval:
            with args.main_process_first():
                splits[split] = read(data_args, split, limit, documents=True)
    with output_folder(args):
        set_seed(args.seed)
        model, tokenizer = load(model_args)
        pretrain(model, tokenizer, splits, model_args, data_args, args)


def pretrain(model, tokenizer, splits, model_args, data_args: ObjectiveArguments, args: RecipeArguments):
    """Trains on the documents of `splits`, and evaluates on the held-out ones if there are any."""
    collator = MixedObjective(
        tokenizer,
        data_args.block_size,
        data_args.blanks,
        data_args.sentences,
        data_args.document,
        data_args.masked_share,
        data_args.mean_span,
        data_args.min_document,
        data_args.bidirectional,
    )
    data = {}
    for split, documents in splits.items():
        with args.main_process_first():
            # A row has three tokens more, of which two begin it.
            rows = encode_texts(documents, tokenizer, data_args, data_args.block_size - 3)
            data[split] = Documents(rows, args.seed)
    args.remove_unused_columns = False  # the seed is for the collator
    trainer = RecipeTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        callbacks=[SetEpoch(data["train"])],
    )
    train(trainer, model_args, data_args)
    if "validation" in data:
        evaluate(trainer)


if __name__ == "__main__":
    with plain_errors("training"):
        main()

"""
Fine-tunes all weights on the answers of dialogues:

    python -m training.sft --model PATH --train-file train.json --output output

Rows have `prompt`, `response` and, with `--history-column`, earlier rounds; or `messages`. See docs/training.md.
"""

from .arguments import DataArguments, ModelOptions, RecipeOptions, answer_help


if __name__ == "__main__":
    answer_help(__doc__, ModelOptions, DataArguments, RecipeOptions)  # before the slow imports below


from transformers import set_seed

from common.errors import plain_errors

from .data import collator, encode, read, to_answer
from .options import ModelArguments, RecipeArguments, load, parse
from .predict import predict
from .trainer import RecipeTrainer, evaluate, output_folder, train


def read_splits(model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments) -> dict:
    """
    Returns the rows of the splits that are needed: "train", "validation", "test".

    Raises:
        ValueError: if data are missing or have another form, or do not suit the options.
    """
    if args.do_predict and (args.fsdp or args.deepspeed or model_args.fsdp_size):
        raise ValueError(
            "--do-predict does not work on a model that is split over processes. Run it separately, on the saved model."
        )
    wanted = {
        "train": args.do_train
        or data_args.train_file
        or (not args.do_predict and (data_args.dataset_name or not args.do_eval)),
        "validation": data_args.validation_file or args.do_eval,
        "test": args.do_predict,
    }
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    with args.main_process_first():
        return {split: read(data_args, split, limit) for split, limit in limits.items() if wanted[split]}


def fine_tune(
    model, tokenizer, splits, model_args, data_args: DataArguments, args: RecipeArguments, trainer_class=RecipeTrainer
):
    """
    Trains, evaluates and predicts, if there is data for it. Used by sft, lora and ptuning.

    Args:
        splits: The result of `read_splits`.

    Raises:
        ValueError: before any work, if the data have nothing to train on.
    """
    data = {}
    for split in ("train", "validation"):
        if split in splits:
            with args.main_process_first():
                data[split] = encode(splits[split], tokenizer, data_args)
    trainer = trainer_class(
        model=model,
        args=args,
        data_collator=collator(tokenizer, data_args),
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
    )
    if "train" in data:
        train(trainer, model_args, data_args)
    if "validation" in data:
        evaluate(trainer)
    if "test" in splits and args.should_save:
        predict(trainer.model, tokenizer, [to_answer(row) for row in splits["test"]], data_args, args)


def main(argv=None):
    model_args, data_args, args = parse(__doc__, ModelArguments, DataArguments, RecipeArguments, args=argv)
    splits = read_splits(model_args, data_args, args)
    if "train" in splits:
        model_args.check_trainable("all weights")
    with output_folder(args):
        set_seed(args.seed)
        model, tokenizer = load(model_args)
        fine_tune(model, tokenizer, splits, model_args, data_args, args)


if __name__ == "__main__":
    with plain_errors("training"):
        main()

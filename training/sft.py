"""
Fine-tunes all weights on answers:

    python -m training.sft --model_name_or_path PATH --train_file train.json --output_dir output

Rows hold `prompt`, `response` and, with `--history_column`, earlier rounds; or `messages`. See docs/training.md.
"""

from transformers import set_seed

from .data import DataArguments, collator, encode, read, round_reader
from .options import ModelArguments, RecipeArguments, load, parse
from .predict import predict
from .trainer import RecipeTrainer, evaluate, train


def fine_tune(
    model, tokenizer, model_args, data_args: DataArguments, args: RecipeArguments, trainer_class=RecipeTrainer
):
    """
    Trains, evaluates and predicts, as far as there is data for it: what sft, lora and ptuning have in common.

    Raises:
        ValueError: before any work, if data are missing or of another form.
    """
    if args.do_predict and (args.fsdp or args.deepspeed or model_args.fsdp_size):
        raise ValueError(
            "--do_predict does not work on a model that is divided: give it to a run of its own, on what is saved."
        )
    splits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    wanted = {
        "train": args.do_train
        or data_args.train_file
        or (not args.do_predict and (data_args.dataset_name or not args.do_eval)),
        "validation": data_args.validation_file or args.do_eval,
    }
    data = {}
    for split, limit in splits.items():
        if wanted[split]:
            with args.main_process_first():
                data[split] = encode(read(data_args, split, limit), tokenizer, data_args)
    if args.do_predict:
        rows = read(data_args, "test", data_args.max_predict_samples)
        read_round = round_reader(rows, data_args)
        test = [read_round(row) for row in rows]
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
    if args.do_predict and args.should_save:
        predict(trainer.model, tokenizer, test, data_args, args)


def main(argv=None):
    model_args, data_args, args = parse(__doc__, ModelArguments, DataArguments, RecipeArguments, args=argv)
    set_seed(args.seed)
    model, tokenizer = load(model_args)
    fine_tune(model, tokenizer, model_args, data_args, args)


if __name__ == "__main__":
    main()

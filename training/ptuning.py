"""
Trains a prefix of keys and values (P-Tuning v2, Liu et al. 2022, arXiv 2110.07602) and saves only the prefix:

    python -m training.ptuning --model PATH --train-file train.json --pre-seq-len 128 --output output
    python -m training.ptuning --model PATH --ptuning-checkpoint output --test-file test.json --do-predict

The prefix is saved to `pytorch_model.bin`, with the names that the published scripts use. See docs/training.md.
"""

from dataclasses import dataclass, field

from .arguments import DataArguments, ModelOptions, RecipeOptions, answer_help


@dataclass
class PrefixOptions(ModelOptions):
    """The published options."""

    dtype: str | None = "auto"
    pre_seq_len: int = field(default=128, metadata={"help": "Number of positions of the prefix."})
    prefix_projection: bool = field(default=False, metadata={"help": "Compute the prefix by an MLP."})
    ptuning_checkpoint: str | None = field(default=None, metadata={"help": "Folder with a prefix to start from."})


if __name__ == "__main__":
    answer_help(__doc__, PrefixOptions, DataArguments, RecipeOptions)  # before the slow imports below


from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import WEIGHTS_NAME

from common.errors import plain_errors
from common.prefix import PREFIX, load_prefix

from .options import ModelArguments, RecipeArguments, load, parse
from .sft import fine_tune, read_splits
from .trainer import RecipeTrainer, output_folder


@dataclass
class PrefixArguments(PrefixOptions, ModelArguments):
    pass


class PrefixTrainer(RecipeTrainer):
    """Saves and loads the prefix only."""

    def _save(self, output_dir: str | None = None, state_dict=None):
        output_dir = Path(output_dir or self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        torch.save({name: value for name, value in state_dict.items() if PREFIX in name}, output_dir / WEIGHTS_NAME)
        self.model.config.save_pretrained(output_dir)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, output_dir / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        load_prefix(model or self.model, resume_from_checkpoint)


def main(argv=None):
    model_args, data_args, args = parse(__doc__, PrefixArguments, DataArguments, RecipeArguments, args=argv)
    if args.do_predict and not (args.do_train or data_args.train_file or model_args.ptuning_checkpoint):
        raise ValueError("There is no prefix to answer with: pass --train-file or --ptuning-checkpoint.")
    splits = read_splits(model_args, data_args, args)
    with output_folder(args):
        set_seed(args.seed)
        config = dict(pre_seq_len=model_args.pre_seq_len, prefix_projection=model_args.prefix_projection)
        model, tokenizer = load(model_args, may_lack=("prefix_encoder",), **config)
        model.transformer.prefix_encoder.float()  # the rest stays as it is loaded, as in the published script
        if model_args.ptuning_checkpoint:
            load_prefix(model, model_args.ptuning_checkpoint)
        fine_tune(model, tokenizer, splits, model_args, data_args, args, PrefixTrainer)


if __name__ == "__main__":
    with plain_errors("training"):
        main()

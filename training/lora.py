"""
Fine-tunes low-rank adapters (LoRA, arXiv 2106.09685) with PEFT, also on quantized weights (QLoRA, arXiv 2305.14314):

    python -m training.lora --model_name_or_path PATH --train_file train.json --output_dir output
    python -m training.lora ... --quantization_bit 4        # the published INT4
    python -m training.lora ... --load_in_4bit              # bitsandbytes' NF4

See docs/training.md.
"""

from dataclasses import dataclass

from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import set_seed
from trl import get_peft_config

from common.errors import plain_errors

from .data import DataArguments
from .options import ModelArguments, RecipeArguments, load, parse
from .sft import fine_tune, read_splits
from .trainer import output_folder


@dataclass
class LoraArguments(ModelArguments):
    """By default adapters on `query_key_value` (PEFT's choice for this architecture), and the checkpoint's own dtype."""

    dtype: str | None = "auto"
    use_peft: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.use_peft:
            raise ValueError("LoRA takes PEFT. To fine-tune all weights, run training.sft.")


def main(argv=None):
    model_args, data_args, args = parse(__doc__, LoraArguments, DataArguments, RecipeArguments, args=argv)
    if args.do_predict and not (args.do_train or data_args.train_file):
        raise ValueError(
            "Nothing is trained that could answer: merge the adapter (conversion.merge_lora), and run training.sft."
        )
    splits = read_splits(model_args, data_args, args)
    with output_folder(args):
        set_seed(args.seed)
        model, tokenizer = load(model_args)
        if model_args.load_in_4bit or model_args.load_in_8bit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        model = get_peft_model(model, get_peft_config(model_args))
        fine_tune(model, tokenizer, splits, model_args, data_args, args)


if __name__ == "__main__":
    with plain_errors("training"):
        main()

"""
Trains low-rank adapters (LoRA, arXiv 2106.09685) with PEFT, also on quantized weights (QLoRA, arXiv 2305.14314):

    python -m training.lora --model PATH --train-file train.json --output output
    python -m training.lora ... --quantization int4         # on INT4 in the published format
    python -m training.lora ... --load-in-4bit              # on bitsandbytes' NF4

See docs/training.md.
"""

from dataclasses import dataclass

from .arguments import DataArguments, ModelOptions, RecipeOptions, answer_help


@dataclass
class LoraOptions(ModelOptions):
    """Defaults: adapters on `query_key_value`, as PEFT does for this architecture, and the checkpoint's own dtype."""

    dtype: str | None = "auto"
    use_peft: bool = True


if __name__ == "__main__":
    answer_help(__doc__, LoraOptions, DataArguments, RecipeOptions)  # before the slow imports below


import warnings
from pathlib import Path

from huggingface_hub import ModelCard
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import set_seed
from trl import get_peft_config

from common.errors import plain_errors

from .options import ModelArguments, RecipeArguments, load, parse
from .sft import fine_tune, read_splits
from .trainer import output_folder


@dataclass
class LoraArguments(LoraOptions, ModelArguments):
    def __post_init__(self):
        super().__post_init__()
        if not self.use_peft:
            raise ValueError("training.lora always uses PEFT. To fine-tune all weights, run training.sft.")


def main(argv=None):
    model_args, data_args, args = parse(__doc__, LoraArguments, DataArguments, RecipeArguments, args=argv)
    if args.do_predict and not (args.do_train or data_args.train_file):
        raise ValueError(
            "There is no training file, and training.lora cannot load an adapter to answer with. Merge the adapter "
            "(conversion.merge_lora), and run training.sft --do-predict."
        )
    splits = read_splits(model_args, data_args, args)
    with output_folder(args):
        set_seed(args.seed)
        model, tokenizer = load(model_args)
        if model_args.load_in_4bit or model_args.load_in_8bit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        with warnings.catch_warnings():  # PEFT asks for a name that the library deprecated in 5.24
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = get_peft_model(model, get_peft_config(model_args))
        fine_tune(model, tokenizer, splits, model_args, data_args, args)
        if "train" in splits and args.should_save:
            write_card(model_args, data_args, args)


def write_card(model_args: LoraArguments, data_args: DataArguments, args: RecipeArguments):
    """Replaces the text of the model card that PEFT writes, which is an empty form. PEFT's metadata is kept."""
    path = Path(args.output_dir, "README.md")
    card = ModelCard.load(path)
    data = Path(data_args.train_file).name if data_args.train_file else data_args.dataset_name
    settings = {
        "base model": model_args.model_name_or_path,
        "rank, alpha": f"{model_args.lora_r}, {model_args.lora_alpha}",
        "layers": ", ".join(model_args.lora_target_modules or ["query_key_value"]),
        "base weights": f"INT{model_args.quantization_bit}" if model_args.quantization_bit else model_args.dtype,
        "data": data,
        "epochs": args.num_train_epochs if args.max_steps < 1 else f"{args.max_steps} steps",
        "learning rate": f"{args.learning_rate:g}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    card.text = f"""
# LoRA adapter for {model_args.model_name_or_path}

| | |
|---|---|
{rows}

`curve.png` shows the loss. To use the adapter:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

To merge it into the weights, run `chatglm2 convert merge_lora --adapter path/to/this/folder --output merged`.
"""
    card.save(path)


if __name__ == "__main__":
    with plain_errors("training"):
        main()

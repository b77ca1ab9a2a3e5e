"""The options that the recipes share, and what loads a model by them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments
from trl import ModelConfig, TrlParser, get_quantization_config


@dataclass
class ModelArguments(ModelConfig):
    """TRL's, with the published names of what it does not have."""

    config_name: str | None = field(
        default=None, metadata={"help": "A folder with a config.json: new random weights, instead of a model's."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "The model's own by default."})
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "4 or 8: the frozen weights in the published INT4 or INT8. For lora and ptuning."},
    )
    fsdp_size: int | None = field(
        default=None,
        metadata={"help": "Processes to split the model among as it is loaded (FSDP2 of Transformers >= 5.23)."},
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("Give either --model_name_or_path or, for new random weights, --config_name.")
        if self.quantization_bit not in (None, 4, 8):
            raise ValueError(f"quantization_bit must be 4 or 8, got {self.quantization_bit}.")
        if self.quantization_bit and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("quantization_bit and bitsandbytes' load_in_4bit or load_in_8bit exclude each other.")


@dataclass
class RecipeArguments(TrainingArguments):
    """Transformers' `TrainingArguments`, with other defaults."""

    output_dir: str = field(default="output", metadata={"help": "Goes on from the last checkpoint there, if any."})
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str | None = "none"
    include_num_input_tokens_seen: str = "all"  # for tokens per second in the log
    max_new_tokens: int = field(default=128, metadata={"help": "Of an answer, in --do_predict."})


def parse(doc: str, *dataclasses, args: Sequence[str] | None = None) -> tuple:
    """Reads the command line and the YAML file of `--config`, whose values the command line overrides."""
    args = sys.argv[1:] if args is None else list(args)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in args:
        path = "".join(args[args.index("--config") + 1 :][:1])
        if not Path(path).is_file():
            raise SystemExit(f"There is no file {path!r} (--config).")
    try:
        return TrlParser(dataclasses, description=doc).parse_args_and_config(args)
    except (ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from error


def load(args: ModelArguments, dtype: str | None = None, **config) -> tuple[PreTrainedModel, object]:
    """
    Returns the model and its tokenizer, whose padding is on the right, as the published script trains.

    Args:
        dtype: Instead of the one in `args`.
        config: Fields of the configuration to change.
    """
    name = args.model_name_or_path or args.config_name
    options = dict(revision=args.model_revision, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or name, **options, padding_side="right")
    config = AutoConfig.from_pretrained(name, **options, **config)
    options.update(dtype=dtype or args.dtype, attn_implementation=args.attn_implementation)
    if args.model_name_or_path is None:
        del options["revision"]
        return AutoModelForCausalLM.from_config(config, **options), tokenizer
    if args.load_in_4bit and args.dtype in (None, "auto"):  # which TRL hands to bitsandbytes as it is
        args = replace(args, dtype=str(config.dtype or torch.float32).removeprefix("torch."))
    quantization = get_quantization_config(args)
    if args.quantization_bit:
        quantization = {"quant_method": "chatglm", "bits": args.quantization_bit}
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.fsdp_size:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=args.fsdp_size)
    return AutoModelForCausalLM.from_pretrained(name, config=config, **options), tokenizer

"""The options that the recipes share, and what loads a model by them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_quantization_config

from common import checkpoint
from common.errors import one_line


logger = logging.get_logger(__name__)

# Options of the published scripts, and of TrainingArguments when they were published, that there are no more
GONE = {
    "cache_dir": "Set the variable HF_HUB_CACHE.",
    "evaluation_strategy": "It is called --eval_strategy.",
    "forced_bos_token": "Nothing read it.",
    "generation_max_length": "The length of answers is --max_new_tokens.",
    "generation_num_beams": "Answers are greedy.",
    "ignore_pad_token_for_loss": "Padding is never learned.",
    "lang": "Nothing read it.",
    "no_cuda": "It is called --use_cpu.",
    "num_beams": "Answers are greedy.",
    "pad_to_max_length": "Rows are padded to the longest of their batch.",
    "resize_position_embeddings": "Nothing read it.",
    "sortish_sampler": "Prompts of like length are answered together.",
    "source_prefix": "Write it into the prompts.",
    "use_auth_token": "Log in by `hf auth login`.",
    "use_fast_tokenizer": "There is one tokenizer.",
    "val_max_target_length": "The length of answers is --max_new_tokens.",
}


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
        if self.fsdp_size:
            self.distributed_config()

    def distributed_config(self):
        """Returns what divides the model among `fsdp_size` processes; raises ValueError where the library cannot."""
        try:
            from transformers.distributed import DistributedConfig

            return DistributedConfig(fsdp_size=self.fsdp_size)
        except (ImportError, TypeError) as error:
            raise ValueError(
                f"--fsdp_size needs Transformers 5.23 or newer, this is {transformers.__version__}."
            ) from error

    def check_trainable(self, what: str):
        """Raises ValueError if the weights are quantized, and so frozen."""
        if self.quantization_bit or self.load_in_4bit or self.load_in_8bit:
            raise ValueError(
                f"Quantized weights are frozen, and {what} cannot be trained: run training.lora or training.ptuning on "
                "them, or leave out --quantization_bit, --load_in_4bit and --load_in_8bit."
            )


@dataclass
class RecipeArguments(TrainingArguments):
    """Transformers' `TrainingArguments`, with other defaults."""

    output_dir: str = field(default="output", metadata={"help": "Goes on from the last checkpoint there, if any."})
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: str | None = "none"
    include_num_input_tokens_seen: str = "all"  # for tokens per second in the log
    max_new_tokens: int = field(default=128, metadata={"help": "Of an answer, in --do_predict."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew, and remove the checkpoints in the output folder."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Autocast to bfloat16. On a CPU by default where that is measured to be faster, once.",
            "nargs": "?",
            "const": True,
        },
    )
    muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices of the layers, AdamW for the rest. torch 2.9 or newer."}
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "As in the published scripts: always so."})

    def __post_init__(self):
        super().__post_init__()
        if not self.predict_with_generate:
            raise ValueError("Predictions are always generated: leave --predict_with_generate out.")


def parse(doc: str, *dataclasses, args: Sequence[str] | None = None) -> tuple:
    """Reads the command line and the YAML file of `--config`, whose values the command line overrides."""
    args = sys.argv[1:] if args is None else list(args)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in args:
        path = "".join(args[args.index("--config") + 1 :][:1])
        if not Path(path).is_file():
            raise SystemExit(f"There is no file {path!r} (--config).")
    try:
        parser = TrlParser(dataclasses, description=doc)
        *parsed, unknown = parser.parse_args_and_config(args, return_remaining_strings=True)
        names = [word.lstrip("-").split("=")[0] for word in unknown if word.startswith("--")]
        if unknown:
            raise ValueError(" ".join(map(explain, names or unknown)) + " --help lists all options.")
    except (ValueError, yaml.YAMLError) as error:
        raise SystemExit(one_line(error)) from error
    return tuple(parsed)


def explain(name: str) -> str:
    """Says of an unknown option what became of it."""
    return f"--{name} is no option any more: {GONE[name]}" if name in GONE else f"There is no option --{name}."


def load(
    args: ModelArguments, dtype: str | None = None, may_lack: tuple[str, ...] = (), **config
) -> tuple[PreTrainedModel, object]:
    """
    Returns the model and its tokenizer, whose padding is on the right, as the published script trains.

    Args:
        dtype: Instead of the one in `args`.
        may_lack: Parts of the names of weights that the checkpoint need not have.
        config: Fields of the configuration to change.

    Raises:
        ValueError: if the checkpoint is incomplete or damaged.
    """
    name = args.model_name_or_path or args.config_name
    if Path(name).is_dir():
        checkpoint.read_config(Path(name))
    options = dict(revision=args.model_revision, trust_remote_code=True)
    tokenizer_name = args.tokenizer_name or name
    tokenizer = checkpoint.load_tokenizer(tokenizer_name, revision=args.model_revision, padding_side="right")
    config = AutoConfig.from_pretrained(name, **options, **config)
    dtype = dtype or args.dtype
    is_quantized = args.quantization_bit or args.load_in_4bit or getattr(config, "quantization_config", None)
    is_half = dtype in (None, "auto") and config.dtype == torch.float16
    if is_half and not is_quantized and not torch.accelerator.is_available():
        logger.warning("The weights are loaded in float32: CPUs compute many times slower in float16 (--dtype).")
        dtype = "float32"
    options.update(dtype=dtype, attn_implementation=args.attn_implementation)
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
        options["distributed_config"] = args.distributed_config()
    return checkpoint.load(AutoModelForCausalLM, name, may_lack, config=config, **options), tokenizer

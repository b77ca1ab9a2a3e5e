"""The options that the recipes share, and loading a model by them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_quantization_config

from common import checkpoint
from common.errors import one_line
from common.load_model import default_device
from common.options import QUANTIZATIONS
from common.package import ROOT

from .arguments import ModelOptions, RecipeOptions, answer_help


logger = logging.get_logger(__name__)

# Options of the published scripts, and of TrainingArguments when they were published, that there are no more
GONE = {
    "cache_dir": "Set the variable HF_HUB_CACHE.",
    "evaluation_strategy": "It is called --eval-strategy.",
    "forced_bos_token": "Nothing read it.",
    "generation_max_length": "The length of answers is --max-new-tokens.",
    "generation_num_beams": "Answers are greedy.",
    "ignore_pad_token_for_loss": "Padding is never learned.",
    "lang": "Nothing read it.",
    "no_cuda": "It is called --use-cpu.",
    "num_beams": "Answers are greedy.",
    "pad_to_max_length": "Rows are padded to the longest of their batch.",
    "resize_position_embeddings": "Nothing read it.",
    "sortish_sampler": "Prompts of like length are answered together.",
    "source_prefix": "Write it into the prompts.",
    "use_auth_token": "Log in by `hf auth login`.",
    "use_fast_tokenizer": "There is one tokenizer.",
    "val_max_target_length": "The length of answers is --max-new-tokens.",
}


@dataclass
class ModelArguments(ModelOptions, ModelConfig):
    """TRL's `ModelConfig`, and published options that it lacks."""

    def __post_init__(self):
        super().__post_init__()
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("Give either --model or, for new random weights, --config-name.")
        if self.quantization_bit not in (None, 4, 8):
            raise ValueError(
                f"--quantization must be int4 or int8 (quantization_bit 4 or 8), got {self.quantization_bit}."
            )
        if self.quantization_bit and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("--quantization and bitsandbytes' --load-in-4bit or --load-in-8bit exclude each other.")
        if self.fsdp_size:
            self.distributed_config()

    def distributed_config(self):
        """Returns the configuration that splits the model over `fsdp_size` processes. Raises ValueError if the library cannot."""
        try:
            from transformers.distributed import DistributedConfig

            return DistributedConfig(fsdp_size=self.fsdp_size)
        except (ImportError, TypeError) as error:
            raise ValueError(
                f"--fsdp-size needs Transformers 5.23 or newer, this is {transformers.__version__}."
            ) from error

    def check_trainable(self, what: str):
        """Raises ValueError if the weights are quantized, and so frozen."""
        if self.quantization_bit or self.load_in_4bit or self.load_in_8bit:
            raise ValueError(
                f"Quantized weights are frozen, and {what} cannot be trained: run training.lora or training.ptuning on "
                "them, or leave out --quantization, --load-in-4bit and --load-in-8bit."
            )


@dataclass
class RecipeArguments(RecipeOptions, TrainingArguments):
    """Transformers' `TrainingArguments`, with other defaults."""

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        for name in ("", "_kwargs"):  # the name since 5.24; the library warns of the old one
            old, new = f"gradient_checkpointing{name}", f"activation_checkpointing{name}"
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        if not self.predict_with_generate:
            raise ValueError("Predictions are always generated. Leave --predict-with-generate out.")


# Names that all commands of this package have, and the Trainer's
ALIASES = {"model": "model_name_or_path", "output": "output_dir"}
CONFIGS = Path(__file__).with_name("configs")


def parse(doc: str, *dataclasses, args: Sequence[str] | None = None) -> tuple:
    """
    Reads the command line and the YAML file of `--config`; the command line wins. A file that does not exist in the working
    directory is looked for in `training/configs`, and the data files that it names in this repository.
    """
    answer_help(doc, *dataclasses, args=args)
    args = translate(sys.argv[1:] if args is None else list(args))
    try:
        parser = TrlParser(dataclasses, description=doc)
        if "--help_all" in args:
            parser.print_help()
            raise SystemExit
        if "--config" in args:
            at = args.index("--config")
            values = read_config(*args[at + 1 : at + 2])
            on_cpu = "--use_cpu" in args or not torch.accelerator.is_available()
            if on_cpu and not values.get("use_cpu"):
                values.pop("bf16", None)  # meant for GPUs: on a CPU, what is faster is measured
            unknown = parser.set_defaults_with_config(**values)
            del args[at : at + 2]
            unknown = list(unknown)
        else:
            unknown = []
        *parsed, others = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
        unknown += others
        names = [word.lstrip("-").split("=")[0] for word in unknown if word.startswith("--")]
        if unknown:
            raise ValueError(" ".join(map(explain, names or unknown)) + " --help and --help-all list the options.")
    except (ValueError, yaml.YAMLError) as error:
        raise SystemExit(one_line(error)) from error
    return tuple(parsed)


def translate(args: Sequence[str]) -> list[str]:
    """Returns the command line with the Trainer's option names, underscores instead of hyphens, and separate values."""
    words = []
    for arg in args:
        if not arg.startswith("--"):
            words.append(arg)
            continue
        name, *value = arg.split("=", 1)
        words += ["--" + name[2:].replace("-", "_"), *value]
    translated = []
    while words:
        word = words.pop(0)
        name = word.removeprefix("--")
        if name in ("quantization", "device") and word != name and words:
            try:
                word, *value = trainers_name(name, words.pop(0))
            except ValueError as error:
                print(one_line(error), file=sys.stderr)
                raise SystemExit(2) from None
            translated += ["--" + word, str(*value)] if word else []
        else:
            translated.append("--" + ALIASES[name] if word != name and name in ALIASES else word)
    return translated


def trainers_name(name: str, value) -> tuple:
    """
    Returns the name and value of an option for the Trainer or the published scripts; (None, None) for a default.

    Raises:
        ValueError: if the option does not allow the value.
    """
    name = name.replace("-", "_")
    if name == "quantization":
        if value not in QUANTIZATIONS:
            raise ValueError(f"--quantization must be {' or '.join(QUANTIZATIONS)}, got {value!r}.")
        return "quantization_bit", QUANTIZATIONS[value]
    if name == "device":
        if value == "cpu":
            return "use_cpu", True
        if value != default_device():
            raise ValueError(
                f"--device must be cpu or {default_device()}, got {value!r}. One of several GPUs: set CUDA_VISIBLE_DEVICES."
            )
        return None, None
    return ALIASES.get(name, name), value


def read_config(path: str = "") -> dict:
    """Returns the options in a YAML file, by the Trainer's names."""
    path = next((file for file in (Path(path), CONFIGS / path) if file.is_file()), None) or missing_config(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must have one option per line, `name: value` (--config).")
    values = dict(trainers_name(str(name), value) for name, value in values.items())
    values.pop(None, None)
    for name in ("train_file", "validation_file", "test_file"):
        if name in values and not Path(values[name]).exists() and (ROOT / values[name]).exists():
            values[name] = str(ROOT / values[name])
    return values


def missing_config(path: str):
    raise ValueError(f"There is no file {path!r} (--config).")


def explain(name: str) -> str:
    """Explains an unknown option."""
    return f"--{name} is no option any more: {GONE[name]}" if name in GONE else f"There is no option --{name}."


def load(
    args: ModelArguments, dtype: str | None = None, may_lack: tuple[str, ...] = (), **config
) -> tuple[PreTrainedModel, object]:
    """
    Returns the model and its tokenizer, which pads on the right as in the published script.

    Args:
        dtype: Overrides the one in `args`.
        may_lack: Weights that may be missing, by parts of their names.
        config: Fields of the configuration to change.

    Raises:
        ValueError: if the checkpoint is incomplete or damaged.
    """
    name = args.model_name_or_path or args.config_name
    tokenizer_name = args.tokenizer_name or name
    source = dict(checkpoint_code=args.checkpoint_code, revision=args.model_revision)
    tokenizer = checkpoint.load_tokenizer(tokenizer_name, padding_side="right", **source)
    config = checkpoint.load_config(name, **source, **config)
    dtype = dtype or args.dtype
    is_quantized = args.quantization_bit or args.load_in_4bit or getattr(config, "quantization_config", None)
    is_half = dtype in (None, "auto") and config.dtype == torch.float16
    if is_half and not is_quantized and not torch.accelerator.is_available():
        logger.warning(
            "The weights are loaded in float32, because float16 is many times slower on CPUs (--dtype overrides this)."
        )
        dtype = "float32"
    options = dict(dtype=dtype, attn_implementation=args.attn_implementation)
    if args.model_name_or_path is None:
        if not args.checkpoint_code:
            config.name_or_path = str(ROOT)  # whose code the library takes
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, **options), tokenizer
    if args.load_in_4bit and args.dtype in (None, "auto"):  # which TRL hands to bitsandbytes as it is
        args = replace(args, dtype=str(config.dtype or torch.float32).removeprefix("torch."))
    quantization = get_quantization_config(args)
    if args.quantization_bit:
        quantization = {"quant_method": "chatglm", "bits": args.quantization_bit}
    if quantization is not None:
        options["quantization_config"] = quantization
    if args.fsdp_size:
        options["distributed_config"] = args.distributed_config()
    return checkpoint.load(AutoModelForCausalLM, name, may_lack, config=config, **source, **options), tokenizer

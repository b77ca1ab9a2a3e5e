"""
The options that this package adds to the library's, and the help that lists them. Needs only the standard library, so that
`--help` answers at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields


@dataclass
class DataArguments:
    """Where the rows are, and how long they may be."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, CSV or TSV, also compressed (.gz), or Parquet."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "For the loss and perplexity held out."})
    test_file: str | None = field(
        default=None, metadata={"help": "To answer (--do-predict), and for ROUGE and BLEU where it has responses."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "On the Hub, or a folder, instead of files."})
    dataset_config_name: str | None = None
    prompt_column: str = "prompt"
    input_column: str | None = field(
        default=None, metadata={"help": "Added to the prompt on a line of its own, as Alpaca's `input` is by default."}
    )
    response_column: str = "response"
    history_column: str | None = field(
        default=None, metadata={"help": "With the rounds before, a list of [query, answer]."}
    )
    messages_column: str = field(default="messages", metadata={"help": "Read instead of prompts where there is one."})
    text_column: str = field(default="text", metadata={"help": "Of pretraining."})
    max_source_length: int = field(default=1024, metadata={"help": "Tokens of a prompt with its history."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a response."})
    packing: bool = field(
        default=False, metadata={"help": "Several examples a row, kept apart, instead of padding: for short ones."}
    )
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    preprocessing_num_workers: int | None = None
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and encode the data anew."})

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name} must be at least 8 tokens, got {getattr(self, name)}.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dataset_name and self.train_file:
            raise ValueError("Both a dataset_name and a train_file are given; leave one of them out.")

    @property
    def max_length(self) -> int:
        """Tokens of an example in all: the prompt, the response and `</s>`."""
        return self.max_source_length + self.max_target_length + 1


@dataclass
class ModelOptions:
    """Beside TRL's `ModelConfig`."""

    config_name: str | None = field(
        default=None, metadata={"help": "A folder with a config.json: new random weights, instead of a model's."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "The model's own by default."})
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "4 or 8: the frozen weights in the published INT4 or INT8. For lora and ptuning."},
    )
    checkpoint_code: bool = field(
        default=False, metadata={"help": "Run the code in the model's folder or repository instead of this package's."}
    )
    fsdp_size: int | None = field(
        default=None,
        metadata={"help": "Processes to split the model among as it is loaded (FSDP2 of Transformers >= 5.23)."},
    )


@dataclass
class RecipeOptions:
    """Beside the library's `TrainingArguments`, and other defaults than it has."""

    output_dir: str = field(default="output", metadata={"help": "Goes on from the last checkpoint there, if any."})
    logging_steps: float = 10
    logging_first_step: bool = True
    save_total_limit: int | None = 2
    report_to: str | None = "none"
    include_num_input_tokens_seen: str = "all"  # for tokens per second in the log
    max_new_tokens: int = field(default=128, metadata={"help": "Of an answer, in --do-predict."})
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


def answer_help(doc: str, *dataclasses: type, args: Sequence[str] | None = None):
    """Ends the program with the options of this package where `--help` is asked for."""
    if {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        print(short_help(doc, dataclasses))
        raise SystemExit


def short_help(doc: str, dataclasses: Sequence[type]) -> str:
    """Returns the options that this package adds to the library's, and how to see all."""
    lines = [
        doc.strip(),
        "",
        "Options of this package (--help-all: all, with those of TrainingArguments and TRL's ModelConfig):",
    ]
    lines += [
        "  --config FILE            YAML with any of the options; the command line wins",
        "  --model NAME             a checkpoint folder, or OWNER/NAME on the Hub (--model_name_or_path)",
        "  --output FOLDER          for the results; goes on with what is there (--output_dir)",
        "  --quantization KIND      int4 or int8: quantize the frozen weights (--quantization_bit)",
        "  --device DEVICE          cpu, or what the machine has (--use_cpu)",
        "  --dtype TYPE             of the weights: auto, float32, bfloat16, float16",
    ]
    hidden = {"model_name_or_path", "output_dir", "quantization_bit", "dtype"}
    for kind in dataclasses:
        own = {
            name
            for base in kind.__mro__
            if base.__module__.startswith("training.") or base.__module__ == "__main__"
            for name in vars(base).get("__annotations__", ())
        }
        for entry in fields(kind):
            if entry.name not in own - hidden:
                continue
            text = entry.metadata.get("help", "")
            default = "" if entry.default in (None, False) else f"(default: {entry.default})"
            option = f"--{entry.name.replace('_', '-')}"
            lines.append(f"  {option:24} {' '.join(part for part in (text, default) if part)}".rstrip())
    return "\n".join(lines)

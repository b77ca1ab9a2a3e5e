"""
The options that this package adds to the library's, and the help that lists them. Needs only the standard library, so that
`--help` answers at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields


@dataclass
class DataArguments:
    """The data files, their columns, and the largest lengths."""

    train_file: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, CSV or TSV, also compressed (.gz), or Parquet."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Held-out data, for loss and perplexity."})
    test_file: str | None = field(
        default=None, metadata={"help": "Prompts to answer with --do-predict. Responses are used for ROUGE and BLEU."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a folder, instead of files."}
    )
    dataset_config_name: str | None = None
    prompt_column: str = "prompt"
    input_column: str | None = field(
        default=None, metadata={"help": "Added to the prompt on its own line. By default Alpaca's `input`."}
    )
    response_column: str = "response"
    history_column: str | None = field(
        default=None, metadata={"help": "Column of earlier rounds, a list of [query, answer]."}
    )
    messages_column: str = field(default="messages", metadata={"help": "Column of messages. It is used if it exists."})
    text_column: str = field(default="text", metadata={"help": "Column of documents, for pretraining."})
    max_source_length: int = field(
        default=1024, metadata={"help": "Largest number of tokens of a prompt with its history."}
    )
    max_target_length: int = field(default=128, metadata={"help": "Largest number of tokens of a response."})
    packing: bool = field(
        default=False, metadata={"help": "Pack several examples into a row instead of padding. For short examples."}
    )
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    preprocessing_num_workers: int | None = None
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and encode the data again."})

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 8:
                raise ValueError(f"{name} must be at least 8 tokens, got {getattr(self, name)}.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.dataset_name and self.train_file:
            raise ValueError("Both a dataset_name and a train_file are given. Leave one of them out.")

    @property
    def max_length(self) -> int:
        """Largest number of tokens of an example: the prompt, the response and `</s>`."""
        return self.max_source_length + self.max_target_length + 1


@dataclass
class ModelOptions:
    """Options beside TRL's `ModelConfig`."""

    config_name: str | None = field(
        default=None,
        metadata={"help": "A folder with a config.json. Starts from new random weights, not from a model."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's own tokenizer."})
    quantization_bit: int | None = field(
        default=None,
        metadata={"help": "4 or 8: quantize the frozen weights to INT4 or INT8. For lora and ptuning."},
    )
    checkpoint_code: bool = field(
        default=False, metadata={"help": "Run the code in the model's folder or repository instead of this package's."}
    )
    fsdp_size: int | None = field(
        default=None,
        metadata={"help": "Split the model over this many processes while loading (FSDP2, Transformers >= 5.23)."},
    )


@dataclass
class RecipeOptions:
    """Options beside Transformers' `TrainingArguments`, and other defaults."""

    output_dir: str = field(
        default="output", metadata={"help": "A run continues from the last checkpoint in this folder."}
    )
    logging_steps: float = 10
    logging_first_step: bool = True
    save_total_limit: int | None = 2
    report_to: str | None = "none"
    include_num_input_tokens_seen: str = "all"  # for tokens per second in the log
    max_new_tokens: int = field(
        default=128, metadata={"help": "Largest number of tokens of an answer with --do-predict."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start again, and remove the checkpoints in the output folder."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Autocast to bfloat16. Default on a CPU: if a measurement shows that it is faster.",
            "nargs": "?",
            "const": True,
        },
    )
    muon: bool = field(
        default=False,
        metadata={"help": "Use Muon for the matrices of the layers, AdamW for the rest. Needs torch 2.9."},
    )
    predict_with_generate: bool = field(default=True, metadata={"help": "Always true, as in the published scripts."})


def answer_help(doc: str, *dataclasses: type, args: Sequence[str] | None = None):
    """Ends the program with the options of this package if `--help` is asked for."""
    if {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        print(short_help(doc, dataclasses))
        raise SystemExit


def short_help(doc: str, dataclasses: Sequence[type]) -> str:
    """Returns the help of the options that this package adds, and how to list all."""
    lines = [
        doc.strip(),
        "",
        "Options of this package (--help-all: all, with those of TrainingArguments and TRL's ModelConfig):",
    ]
    lines += [
        "  --config FILE            YAML with any of the options; the command line wins",
        "  --model NAME             a checkpoint folder, or OWNER/NAME on the Hub (--model_name_or_path)",
        "  --output FOLDER          folder for results; a run in it is continued (--output_dir)",
        "  --quantization KIND      int4 or int8: quantize the frozen weights (--quantization_bit)",
        "  --device DEVICE          cpu, or what the machine has (--use_cpu)",
        "  --dtype TYPE             type of the weights: auto, float32, bfloat16, float16",
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

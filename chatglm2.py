"""
The program `chatglm2`, which `pip install -e .` installs: each command of this repository, from any folder.

    chatglm2 chat          in the terminal
    chatglm2 web           a page for the browser
    chatglm2 serve         OpenAI's API
    chatglm2 train         fine-tunes: lora, sft, ptuning, pretrain
    chatglm2 evaluate      the published benchmarks
    chatglm2 convert       other formats: quantize, merge_lora, to_gguf, ...
    chatglm2 download      the published weights
    chatglm2 upgrade       this package's code into an existing folder

`chatglm2 COMMAND --help` lists the options of a command.
"""

import importlib.util
import runpy
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent
COMMANDS = {
    "chat": ("examples.cli_chat", "chat"),
    "web": ("examples.web_chat", "web"),
    "serve": ("serving", "serve"),
    "evaluate": ("evaluation.run", "evaluation"),
    "download": ("conversion.download", "conversion"),
    "upgrade": ("conversion.upgrade", "conversion"),
}
# What these commands take first, and the extra that it needs
GROUPS = {
    "train": ("training", ("lora", "sft", "ptuning", "pretrain"), "training"),
    "convert": (
        "conversion",
        ("quantize", "merge_lora", "to_safetensors", "to_gguf", "to_onnx", "to_glm", "from_glm", "hub"),
        "conversion",
    ),
}


def main():
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    name, *options = words
    if name in GROUPS:
        folder, kinds, extra = GROUPS[name]
        if not options or options[0] in ("-h", "--help"):
            print(
                f"chatglm2 {name} {{{','.join(kinds)}}} ...\n\n`chatglm2 {name} {kinds[0]} --help` lists the options of one."
            )
            return
        kind = options.pop(0).replace("-", "_")
        if kind not in kinds:
            fail(f"there is no {name} {kind!r}. Give one of {', '.join(kinds)}.")
        module, name = f"{folder}.{kind}", f"{name} {kind}"
    elif name in COMMANDS:
        module, extra = COMMANDS[name]
    else:
        fail(f"there is no command {name!r}. Give one of {', '.join([*COMMANDS, *GROUPS])}.")
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("common") is None or not (ROOT / "common").is_dir():
        fail(f"{ROOT} has no clone of the repository. Install it from one by `pip install -e .`.")
    from common import errors

    errors.command = f"chatglm2 {name}"
    sys.argv[1:] = options
    with errors.needs_extra(extra):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def fail(message: str):
    print(f"chatglm2: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

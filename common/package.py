"""Finds this package's files, and those of them that belong into a checkpoint folder."""

import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints/tiny"
CODE = ("*_chatglm.py", "quantization*.py")
# For checkpoints that lack them, as the published one does
DEFAULTS = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def product(name: str):
    """Returns a class of this package, `module.Class`, whatever code is in the checkpoint folder."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module  # imported late, as it takes seconds

    return get_class_from_dynamic_module(name, str(ROOT))


def module_of(model, name: str):
    """Returns the copy of a module of this package, for example `quantization`, that a loaded `model` uses."""
    package = next(c.__module__ for c in type(model).__mro__ if c.__module__.endswith("modeling_chatglm"))
    return sys.modules[f"{package.rpartition('.')[0]}.{name}"]


def code_files() -> list[Path]:
    """Returns this package's code, and the small files of `DEFAULTS`."""
    return [path for pattern in (*CODE, *DEFAULTS) for path in ROOT.glob(pattern)]


def copy_code(folder: Path):
    """Copies the code, and the small files of `DEFAULTS`, into a checkpoint's folder."""
    for path in code_files():
        shutil.copy(path, folder)

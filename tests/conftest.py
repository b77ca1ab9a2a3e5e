"""Fixtures. The package is loaded as its users load it: as remote code, by its folder."""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace


# Each worker has its own copy of the remote code, or they would write it under each other's eyes.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="chatglm2-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton's kernels are defined

from safetensors.torch import load_file, save_file
from transformers import ContinuousBatchingConfig

from common.package import ROOT, copy_code, product
from common.package import TINY as STORED
from conversion.checkpoint import Checkpoint, write_weights


# Tests send these signals to programs that they start. A shell's `&`, and nohup, have them ignored, and programs inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# What was given to `make test` is for it, and not for those that tests run, which would inherit it.
for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS", "MODEL", "PROMPT", "FOLDER", "OUTPUT"):
    os.environ.pop(name, None)

# Property tests look for new counterexamples at every run, except in continuous integration.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

SHARED = Path(os.environ.get("CHATGLM2_DATA", ROOT.parent / "shared/data"))

SMALL = dict(
    num_layers=2,
    padded_vocab_size=128,
    hidden_size=32,
    ffn_hidden_size=48,
    kv_channels=8,
    num_attention_heads=4,
    multi_query_attention=True,
    multi_query_group_num=2,
    add_qkv_bias=True,
    seq_length=64,
)


def in_float16(folder: Path, output: Path) -> Path:
    """Writes a checkpoint with its weights dequantized. The other files are links."""
    output.mkdir()
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (output / path.name).symlink_to(path.resolve())
    checkpoint = Checkpoint(folder)
    config = {**checkpoint.config_dict, "quantization_bit": 0}
    config.pop("quantization_config", None)
    (output / "config.json").write_text(json.dumps(config))
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        write_weights(output, checkpoint.plain_tensors("Dequantizing"))
    return output


# The small model, which is STORED in INT8: most tests compare with its weights.
TINY = in_float16(STORED, Path(os.environ["HF_MODULES_CACHE"], "tiny"))


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def load_class(name: str):
    module = {"ChatGLMConfig": "configuration_chatglm", "ChatGLMTokenizer": "tokenization_chatglm"}
    return product(f"{module.get(name, 'modeling_chatglm')}.{name}")


@pytest.fixture(scope="session")
def chatglm():
    """The package: its classes by name, and its modules."""
    model_class = load_class("ChatGLMForConditionalGeneration")
    modeling = sys.modules[model_class.__module__]
    tokenizer_class = load_class("ChatGLMTokenizer")
    return SimpleNamespace(
        **{name: getattr(modeling, name) for name in modeling.__all__},
        ChatGLMConfig=modeling.ChatGLMConfig,
        ChatGLMTokenizer=tokenizer_class,
        modeling=modeling,
        **{
            name: sys.modules[f"{modeling.__package__}.{name}_chatglm"]
            for name in (
                "attention",
                "cache",
                "checks",
                "compat",
                "fused",
                "generation",
                "layers",
                "linear",
                "loading",
                "streaming",
            )
        },
        quantization=sys.modules[f"{modeling.__package__}.quantization"],
        calibration=sys.modules[f"{modeling.__package__}.quantization_calibration"],
        kernels=sys.modules[f"{modeling.__package__}.quantization_kernels"],
        tokenization=sys.modules[tokenizer_class.__module__],
    )


@pytest.fixture
def choosing(chatglm, tmp_path, monkeypatch):
    """
    Has every weight measured, by a clock on which the named path is fastest: `choosing("compiled")` returns the list of what
    was measured since.
    """
    kernels, measured = chatglm.kernels, []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CHATGLM_CPU_PATH", raising=False)
    for module in (kernels, chatglm.layers, chatglm.linear):
        monkeypatch.setattr(module, "MEASURED_SIZE", 0)
    (tmp_path / "chatglm2").mkdir(mode=0o700)
    monkeypatch.setattr(kernels, "waits", dict)  # as if nothing else ran on the machine
    kernels.chosen_paths.clear()
    kernels.provisional_paths.clear()

    def fastest(path):
        def measure(paths, samples):
            measured.extend(paths)
            return {name: 1.0 if name == path else 2.0 for name in paths}

        monkeypatch.setattr(kernels, "measure", measure)
        return measured

    yield fastest
    kernels.chosen_paths.clear()
    kernels.provisional_paths.clear()


@pytest.fixture(scope="session")
def small_model(chatglm):
    """Builds a small random model: `small_model(seed=0, model_class=..., **config)`."""

    def build(seed=0, model_class=chatglm.ChatGLMForConditionalGeneration, attn_implementation=None, **config):
        torch.manual_seed(seed)
        config = chatglm.ChatGLMConfig(**{**SMALL, **config})
        config._attn_implementation = attn_implementation
        model = model_class(config).eval()
        with torch.no_grad():  # away from the initial zeros and ones, so that each parameter is seen to count
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
        return model

    return build


def generate_batch(model, prompts: list[list[int]], generation_config) -> list[list[int]]:
    """Continuous batching, in a cache of a few blocks: on a CPU the library would take most of the memory."""
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=128)
    outputs = model.generate_batch(prompts, generation_config, small, progress_bar=False)
    outputs = sorted(outputs.values(), key=lambda output: int(output.request_id.split("_")[-1]))
    return [output.generated_tokens for output in outputs]


@pytest.fixture
def logs(caplog):
    """What the package and the library log; the library's logger does not propagate to pytest's."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def tiny_tokenizer(chatglm):
    return chatglm.ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"reference data not at {SHARED} (set CHATGLM2_DATA)")
    return SHARED


@pytest.fixture(scope="session")
def golden():
    """Reads outputs of the published code for tiny random models: `golden("forward")` gives {name: tensor or value}."""

    def read(name: str) -> dict:
        path = Path(__file__).parent / "golden" / name
        values = load_file(path.with_suffix(".safetensors"))
        if path.with_suffix(".json").exists():
            values.update(json.loads(path.with_suffix(".json").read_text()))
        return values

    return read


@pytest.fixture(scope="session")
def real_tokenizer(chatglm, shared):
    template = (ROOT / "chat_template.jinja").read_text()
    return chatglm.ChatGLMTokenizer(shared / "tokenizer/tokenizer.model", chat_template=template)


@pytest.fixture(scope="session")
def write_checkpoint(tiny_tokenizer):
    """Writes a checkpoint folder as users have it: code, config.json, tokenizer and the given weights."""

    def write(folder: Path, config: dict, state_dict: dict | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        copy_code(folder)
        shutil.copy(TINY / "tokenizer.model", folder)
        published = json.loads((ROOT / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**published, "torch_dtype": "float32", **config}))
        if state_dict is not None:
            save_file(
                {k: v.contiguous() for k, v in state_dict.items()}, folder / "model.safetensors", {"format": "pt"}
            )
        return folder

    return write

"""benchmarks/gpu.py makes every call, on the CPU and with a small model; what docs/gpu.md computes agrees with the model."""

import json
import os
import subprocess
import sys

import pytest
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from benchmarks import gpu_limits
from conftest import ROOT


CONFIG = json.loads((ROOT / "config.json").read_text())


@pytest.mark.timeout(600)
def test_dry_run(tmp_path):
    """The other libraries' quantization is replaced by none: they need a GPU."""
    code = "from benchmarks import gpu; gpu.peers = lambda: {'peer': lambda: None}; gpu.main()"
    arguments = ["--device", "cpu", "--quick", "--work", str(tmp_path), "--output", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    for name in ("int4", "bfloat16", "int8", "peer"):
        rows = figures[name]["steps"]
        ways = [("eager", "sdpa"), ("compiled", "sdpa")]
        if name == "int4":
            ways += [("static", "sdpa"), ("eager", "flex_attention")]
            assert figures[name]["paged"]["tokens_s"] > 0
        assert [(row["steps"], row["attention"]) for row in rows] == ways
        assert all(row["tokens_s"] > 0 and row["share_of_limit"] > 0 for row in rows)
        assert figures[name]["prompts"][0]["tokens_s"] > 0
    assert figures["matmuls_alone_tokens_s"]["32"] > 0
    assert max(figures["logit_errors"].values()) < 0.05


def test_page_has_the_computed_tables():
    page = gpu_limits.PAGE.read_text(encoding="utf-8")
    assert gpu_limits.with_tables(page) == page, "run python -m benchmarks.gpu_limits"


@pytest.mark.parametrize("precision", gpu_limits.PRECISIONS, ids=lambda precision: precision.name)
def test_bytes_of_weights_are_the_models(small_model, precision):
    model = small_model(hidden_size=64, ffn_hidden_size=96).half()
    if precision.bits < 16:
        model.quantize(precision.bits, quantize_embeddings=precision.embedding_bits == 8)
    config = model.config.to_dict()
    parameters = [*model.parameters()]
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    assert gpu_limits.weight_bytes(config, precision) == sum(p.nbytes for p in parameters)
    assert gpu_limits.token_bytes(config, precision) == sum(p.nbytes for p in parameters if id(p) not in embedding)


def test_constants_are_those_of_the_kernels():
    gpu = sys.modules[get_class_from_dynamic_module("quantization_gpu.Plan", ROOT).__module__]
    assert gpu_limits.DEQUANTIZED_BYTES == gpu.DEQUANTIZED_BYTES
    assert gpu_limits.layer_shapes(CONFIG) == [(4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696)]
    assert gpu_limits.cache_bytes(CONFIG, 1) == 28 * 1024


def test_int4_dialogue_of_32k_fits_6_gb():
    for precision in gpu_limits.PRECISIONS:
        needed = gpu_limits.memory_gb(CONFIG, precision, 32768) * 1e9
        assert (needed < 6 * 1024**3) == (precision.bits == 4)


def test_dry_run_of_products(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_products", "--device", "cpu", "--quick"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "products.json")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "products.json").read_text())["products"]
    assert [(row["bits"], row["group_size"]) for row in rows] == [(4, None), (4, 128), (8, None)]
    assert all(min(*row["microseconds"].values(), *row["float16_microseconds"].values()) > 0 for row in rows)

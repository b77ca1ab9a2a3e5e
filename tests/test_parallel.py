"""Tensor parallelism and FSDP over two processes, by the plans in the configuration."""

import os
import re
import socket
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version

from conftest import ROOT, SMALL


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("mode", ["tp", "fsdp"])
def test_two_processes(mode, small_model, chatglm, write_checkpoint, tmp_path):
    """The same logits and greedy tokens as one process."""
    if mode == "tp" and chatglm.compat.RELEASE < (5, 17):
        pytest.skip("Transformers 5.9 cannot split a packed matrix (packed_colwise)")
    if mode == "fsdp" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the library applies FSDP plans at load time since 5.23")
    model = small_model(1)
    folder = write_checkpoint(tmp_path / "small", SMALL, model.state_dict())
    worker = [str(ROOT / "tests/parallel_worker.py"), mode, str(folder)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launcher + worker, capture_output=True, text=True, env=env, timeout=180)
    assert run.stdout.count("equal") == 2, run.stderr[-3000:]


@pytest.mark.parametrize("plan", ["tp_plan", "pp_plan", "fsdp_plan"])
def test_plans_name_modules_that_exist(small_model, plan):
    model = small_model()
    names = [re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()]
    in_config = [f"transformer.{name}" for name in getattr(model.config, f"base_model_{plan}")]
    for name in in_config + list(getattr(model, f"_{plan}")):
        assert name in names, name


def test_tensor_parallel_plan_covers_all_matrices(small_model, chatglm):
    model = small_model()
    matrices = {re.sub(r"\.\d+", ".*", n.removesuffix(".weight")) for n, p in model.named_parameters() if p.dim() == 2}
    assert matrices == set(model._tp_plan)
    # A network by itself has the output layer too, a classifier has none.
    assert "output_layer" in model.transformer._tp_plan
    classifier = small_model(model_class=chatglm.ChatGLMForSequenceClassification)
    assert not [name for name in classifier._tp_plan if "output_layer" in name]

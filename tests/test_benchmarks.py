"""The benchmarks run, and what is made of their figures is there. What they measure is not for tests."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT, SHARED


@pytest.mark.timeout(600)
def test_quick_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks", "--quick", "--work", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = {"decode", "attention", "prompts", "rounds", "batching", "soak", "training"}
    if SHARED.is_dir():
        names |= {"tokenizer", "quantization_quality", "evaluation", "serving"}
    else:
        assert "tokenizer is left out" in result.stderr
    figures = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "quick").glob("*/*.json")}
    assert figures.keys() == names and all("cpu" in figure["machine"] for figure in figures.values())
    assert all(way["outcomes"].keys() <= {"answered", "hung up", "refused"} for way in figures["soak"]["ways"].values())
    if "llama_cpp is not installed" in result.stderr:
        assert figures["decode"]["int4"]["ratio"] == {}
    page = (tmp_path / "quick/benchmarks.md").read_text()
    images = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(images) == len(names)
    assert all((tmp_path / "quick" / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_unknown_name():
    command = [sys.executable, "-m", "benchmarks", "speed"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "there is no benchmark speed: choose from" in result.stderr


def test_page_is_made_from_the_figures(tmp_path):
    """docs/benchmarks.md and the tables in both READMEs have the figures in benchmarks/results."""
    command = [sys.executable, "-m", "benchmarks.present", "--docs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()
    sys.path.insert(0, str(ROOT))
    from benchmarks.present import read_figures, summary

    machines = [read_figures(folder) for folder in sorted((ROOT / "benchmarks/results").iterdir())]
    assert len(machines) > 1 and summary(machines) in (ROOT / "docs/benchmarks.md").read_text()
    for name in ("README.md", "README_zh.md"):
        assert summary(machines, worst_only=True) in (ROOT / name).read_text()

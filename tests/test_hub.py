"""The folder of a Hub repository: what is in it, that it is checked in a clean process, and what is uploaded."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from common.package import CODE
from conftest import ROOT, SMALL, STORED
from conversion import hub


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    output = tmp_path_factory.mktemp("hub") / "tiny"
    hub.assemble(STORED, output)
    return output


@pytest.fixture
def copy(assembled, tmp_path):
    """A copy of the folder, to spoil."""
    return Path(shutil.copytree(assembled, tmp_path / "copy"))


class Hub(ThreadingHTTPServer):
    """Stands in for the Hub: what its API gets of `upload_folder`, and the files that result."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created, self.objects, self.files = [], {}, {}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value=None, status: int = 200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        hub, body = self.server, self.body()
        if self.headers.get("Authorization") != "Bearer hf_of_the_test":
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.reply({"url": f"{hub.url}/me/tiny"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": name, "uploadMode": modes[name.endswith((".safetensors", ".model"))], "shouldIgnore": False}
                for name in names
            ]
            self.reply({"files": files})
        elif self.path == "/me/tiny.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif self.path == "/api/models/me/tiny/commit/main":
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    hub.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    hub.files[item["value"]["path"]] = hub.objects[item["value"]["oid"]]
            self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/me/tiny/commit/{'0' * 40}"})
        else:
            self.reply({"error": f"unexpected POST {self.path}"}, 404)

    def do_PUT(self):
        data = self.body()
        oid = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self.reply()

    def do_GET(self):
        self.reply({"error": "not found"}, 404)


@pytest.fixture
def stand_in():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run_hub(server, *args, token="hf_of_the_test"):
    """Runs the command as a user does, against the stand-in."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        **{"HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
    }
    command = [sys.executable, "-m", "conversion.hub", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_is_in_it(assembled):
    names = {path.name for path in assembled.iterdir()}
    assert names >= {
        "config.json",
        *(path.name for pattern in CODE for path in ROOT.glob(pattern)),
        "tokenizer.model",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "README.md",
        "LICENSE",
    }
    assert (assembled / "model.safetensors").samefile(STORED / "model.safetensors")  # a link
    assert not any(path.is_symlink() for path in assembled.glob("*.py"))
    assert json.loads((assembled / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]


def test_the_checkpoints_own_card_stays(assembled):
    card = ModelCard.load(assembled / "README.md")
    assert card.data.license == ModelCard.load(STORED / "README.md").data.license == "cc-by-sa-4.0"


@pytest.mark.parametrize("bits", [0, 4])
def test_new_card(small_model, write_checkpoint, tmp_path, bits):
    """Of a checkpoint without one, or whose card names no licence, as the published."""
    model = small_model().half()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = {**SMALL, "quantization_bit": bits}
    weights = write_checkpoint(tmp_path / "weights", config, model.quantize(bits).state_dict())
    (weights / "README.md").write_text("---\nlanguage: zh\n---\n\npip install transformers==4.30.2\n")
    hub.assemble(weights, tmp_path / "out", "me/chatglm2-small")
    card = ModelCard.load(tmp_path / "out/README.md")
    data = card.data.to_dict()
    assert data["license_name"] == "chatglm2-model-license" and data["base_model"] == "THUDM/chatglm2-6b"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert 'from_pretrained("me/chatglm2-small", trust_remote_code=True' in card.text
    assert f"| {parameters:,} |" in card.text and "4.30.2" not in card.text
    assert ("| INT4 and float16" if bits else "| float16") in card.text
    assert "{{" not in card.text and '"transformers>=5.9,<6"' in card.text


def test_symbolic_links(tmp_path, monkeypatch):
    """Weights on another disk, and their shards' index."""
    weights = tmp_path / "weights"
    shutil.copytree(STORED, weights, ignore=shutil.ignore_patterns("model.safetensors"))
    tensors = load_file(STORED / "model.safetensors")
    names = sorted(tensors)
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, weights / f"model-{i}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))

    def other_disk(*args):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    hub.assemble(weights, tmp_path / "out")
    assert (tmp_path / "out/model-0.safetensors").is_symlink()
    assert hub.validate(tmp_path / "out")


def test_published_files(small_model, shared, tmp_path):
    """The published folder, with its config.json and tokenizer_config.json, `.bin` weights, and old code beside them."""
    published, weights = shared / "golden/hub_metadata/chatglm2-6b", tmp_path / "weights"
    weights.mkdir()
    config = {**json.loads((published / "config.json").read_text()), **SMALL, "padded_vocab_size": 65024}
    (weights / "config.json").write_text(json.dumps(config))
    shutil.copy(published / "tokenizer_config.json", weights)
    shutil.copy(shared / "tokenizer/tokenizer.model", weights)
    (weights / "modeling_chatglm.py").write_text("raise ImportError('the published code')")
    torch.save(small_model(padded_vocab_size=65024).half().state_dict(), weights / "pytorch_model.bin")
    hub.assemble(weights, tmp_path / "out")
    assert hub.validate(tmp_path / "out")


# Validation


def test_only_declared_packages_are_seen(assembled):
    names = {distribution.name.lower() for distribution in hub.needed_distributions(hub.declared_requirements())}
    assert names >= {"torch", "transformers", "sentencepiece", "jinja2", "numpy", "safetensors"}
    assert not names & {"pytest", "peft", "datasets", "trl", "chatglm2"}


def test_undeclared_import_is_found(copy):
    """pytest is installed here, but users have what setup.cfg says."""
    code = copy / "tokenization_chatglm.py"
    code.write_text(code.read_text().replace("\nimport ", "\nimport pytest\nimport ", 1))
    with pytest.raises(ValueError, match="pytest"):
        hub.validate(copy)


def test_damaged_weights_are_found(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("transformer.encoder.final_layernorm.weight")
    (copy / "model.safetensors").unlink()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys.*final_layernorm"):
        hub.validate(copy)


# Upload


def test_push(stand_in, tmp_path):
    """What arrives is the folder, byte for byte, with the weights that the links lead to."""
    output = tmp_path / "out"
    run = run_hub(stand_in, "--model", STORED, "--output", output, "--push", "me/tiny")
    assert run.returncode == 0, run.stderr
    assert "works: 你好 → " in run.stdout and f"{stand_in.url}/me/tiny/commit/" in run.stdout
    assert [(r["name"], r["organization"], r.get("private") or r["visibility"]) for r in stand_in.created] == [
        ("tiny", "me", "private")
    ]
    assert {name: len(data) for name, data in stand_in.files.items()} == {
        path.relative_to(output).as_posix(): path.stat().st_size for path in output.rglob("*") if path.is_file()
    }
    assert all(data == (output / name).read_bytes() for name, data in stand_in.files.items())


def test_what_does_not_work_is_not_pushed(stand_in, copy):
    (copy / "tokenizer.model").write_bytes(b"")
    run = run_hub(stand_in, "--output", copy, "--push", "me/tiny")
    assert run.returncode == 1 and "does not work, and was not uploaded" in run.stderr
    assert "tokenizer.model" in run.stderr and "Traceback" not in run.stderr
    assert not stand_in.created and not stand_in.files


def test_hub_that_cannot_be_reached(assembled, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi("http://127.0.0.1:9", token="hf_x"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        hub.push(assembled, "me/tiny")


def test_files_that_the_card_links_to(tmp_path, capsys):
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    (source / "images/curve.png").write_bytes(b"x")
    (tmp_path / "secret.txt").write_text("x")
    (source / "images/page.md").write_text("![a](more.png)")
    (source / "images/more.png").write_bytes(b"x")
    text = "![a](images/curve.png) [p](images/page.md) [b](https://x.org) [c](#d) [e](gone.md) [f](../secret.txt)"
    hub.copy_linked(text, source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["curve.png", "more.png", "page.md"]
    said = capsys.readouterr().err
    assert "links to gone.md" in said and "links to ../secret.txt" in said
    (source / "README.md").write_text("---\nlicense: [mit\n: bad\n---\n")
    with pytest.raises(ValueError, match="is not YAML"):
        hub.load_card(source / "README.md")


def test_not_logged_in(stand_in, assembled, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: huggingface_hub.HfApi(stand_in.url, token="hf_wrong"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="hf auth login"):
        hub.push(assembled, "me/tiny")
    assert not stand_in.files


# Bad input


@pytest.mark.parametrize(
    "args, message",
    [
        (["--output", "nowhere"], "There is no folder nowhere"),
        (["--model", "nowhere", "--output", "out"], "There is no folder nowhere"),
        (["--model", str(STORED), "--output", str(ROOT / "tests")], "exists already"),
        (["--model", str(ROOT / "docs"), "--output", "out"], "config.json is missing"),
    ],
)
def test_bad_input(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        hub.main(args)
    assert not any(tmp_path.iterdir())

"""Downloads from local servers that answer as the Hub and ModelScope do: interrupted, resumed, damaged, on a full disk."""

import hashlib
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from transformers import AutoModel, AutoTokenizer

from common.hub import local_folder, wanted_files
from conftest import ROOT, TINY
from conversion import download


COMMIT = "0123456789" * 4
NAME = "THUDM/chatglm2-6b"
LARGE = ("model.safetensors", "tokenizer.model")  # those in Git LFS, of which the Hub gives SHA-256
WEIGHTS = "model.safetensors"

needs_modelscope = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="could not import 'modelscope_hub'"
)
sources = pytest.mark.parametrize("source", ["huggingface", pytest.param("modelscope", marks=needs_modelscope)])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, urlsplit(self.path)
        if path.path.startswith(f"/api/models/{NAME}/tree"):
            self.reply_json([server.entry(name) for name in server.files])
        elif path.path.startswith(f"/api/models/{NAME}"):
            self.reply_json({"id": NAME, "sha": COMMIT, "siblings": [server.describe(name) for name in server.files]})
        elif path.path == "/api/v1/models/ZhipuAI/chatglm2-6b/repo/files":
            files = [
                {"Path": name, "Size": len(data), "Type": "blob", "Sha256": server.sha256(name)}
                for name, data in server.files.items()
            ]
            self.reply_json({"Code": 200, "Success": True, "Data": {"Files": files}})
        elif path.path == "/api/v1/models/ZhipuAI/chatglm2-6b/repo":
            self.reply_file(parse_qs(path.query)["FilePath"][0])
        elif path.path.startswith(f"/{NAME}/resolve/"):
            self.reply_file(path.path.split("/", 5)[-1])
        else:
            self.reply_json({"error": "Repository not found", "Message": "not found", "Code": 404}, 404)

    def reply_json(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def reply_file(self, name):
        server = self.server
        data = server.sent.get(name, server.files[name])
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{server.sha256(name) if name in LARGE else server.blob_id(name)}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        server.requests.append((name, begin))
        end = len(data)
        if name == server.stops_in and not begin:
            end = end * 3 // 4
        self.wfile.write(data[begin:end])
        if end < len(data):
            self.wfile.flush()
            server.stopped.set()
            server.go_on.wait(60)
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """
    Attributes:
        files: What it lists.
        sent: What it sends instead, of some of them.
        stops_in: The file in whose middle it falls silent, until `go_on`.
        requests: (file, first byte) of each download.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        names = ("config.json", "tokenizer.model", "tokenizer_config.json", WEIGHTS)
        self.files = {name: (TINY / name).read_bytes() for name in names}
        self.files |= {"pytorch_model.bin": b"the same weights", "modeling_chatglm.py": b"raise RuntimeError"}
        self.sent, self.requests, self.stops_in = {}, [], None
        self.stopped, self.go_on = threading.Event(), threading.Event()

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def blob_id(self, name: str) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.files[name]) + self.files[name]).hexdigest()

    def entry(self, name: str) -> dict:
        size = len(self.files[name])
        lfs = {"lfs": {"oid": self.sha256(name), "size": size, "pointerSize": 134}} if name in LARGE else {}
        return {"type": "file", "path": name, "size": size, "oid": self.blob_id(name), **lfs}

    def describe(self, name: str) -> dict:
        size = len(self.files[name])
        lfs = {"lfs": {"sha256": self.sha256(name), "size": size, "pointerSize": 134}} if name in LARGE else {}
        return {"rfilename": name, "size": size, "blobId": self.blob_id(name), **lfs}


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def environment(server, tmp_path) -> dict:
    url = f"http://127.0.0.1:{server.server_port}"
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))},
        **{"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        **{"MODELSCOPE_ENDPOINT": url, "MODELSCOPE_CACHE": str(tmp_path / "cache"), "MODELSCOPE_HOME": str(tmp_path)},
        **{"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0", "HOME": str(tmp_path)},
    }


def start(server, tmp_path, *options, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "conversion.download", "--output", str(tmp_path / "out put"), *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment(server, tmp_path), **pipes, **kwargs)


def run(server, tmp_path, *options, **kwargs) -> tuple[int, str, str]:
    process = start(server, tmp_path, *options, **kwargs)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def downloaded(server) -> set[str]:
    return {name for name, _ in server.requests}


@sources
def test_download_is_complete_and_loads(server, tmp_path, source):
    code, output, errors = run(server, tmp_path, "--source", source)
    assert code == 0, errors
    assert "GB free" in output and "4 files, 0.04 GB, of which 0.04 GB are to be downloaded" in output
    folder = tmp_path / "out put"
    assert (folder / WEIGHTS).read_bytes() == server.files[WEIGHTS]
    assert downloaded(server) == {
        "config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        WEIGHTS,
    }  # one form, no code
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.chat(AutoTokenizer.from_pretrained(folder, trust_remote_code=True), "你好")[0]

    server.requests.clear()
    code, output, errors = run(server, tmp_path, "--source", source)
    assert code == 0 and "0.00 GB are to be downloaded" in output and not server.requests, errors


@sources
def test_interrupted_download_goes_on_where_it_was(server, tmp_path, source):
    server.stops_in = WEIGHTS
    process = start(server, tmp_path, "--source", source)
    assert server.stopped.wait(60)
    received = 10_000_000  # the Hub's client writes 10 MiB at a time
    wait_until_received(tmp_path / "out put", received)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert not (tmp_path / "out put/config.json").exists()
    server.go_on.set()
    server.requests.clear()
    code, _, errors = run(server, tmp_path, "--source", source)
    assert code == 0, errors
    assert [begin for name, begin in server.requests if name == WEIGHTS][0] >= received
    assert (tmp_path / "out put" / WEIGHTS).read_bytes() == server.files[WEIGHTS]


def wait_until_received(folder, size: int):
    for _ in range(600):
        if sum(path.stat().st_size for path in folder.rglob("*.incomplete")) >= size:
            return
        threading.Event().wait(0.1)
    raise AssertionError("nothing was received")


@pytest.mark.parametrize("damaged", [WEIGHTS, "tokenizer_config.json"])
@sources
def test_wrong_checksum_is_an_error_and_the_file_is_removed(server, tmp_path, source, damaged):
    data = server.files[damaged]
    server.sent[damaged] = bytes([data[0] ^ 1]) + data[1:]
    code, _, errors = run(server, tmp_path, "--source", source)
    assert code == 1 and len(errors.strip().splitlines()[-1]) > 0
    assert "conversion.download: " in errors and damaged in errors and "Traceback" not in errors
    assert not (tmp_path / "out put" / damaged).exists() and not (tmp_path / "out put/config.json").exists()
    server.sent.clear()
    assert run(server, tmp_path, "--source", source)[0] == 0


@sources
def test_damaged_file_on_disk_is_downloaded_again(server, tmp_path, source):
    assert run(server, tmp_path, "--source", source)[0] == 0
    path = tmp_path / "out put" / WEIGHTS
    data = server.files[WEIGHTS]
    path.write_bytes(data[:1000] + b"\0" + data[1001:])
    server.requests.clear()
    code, output, errors = run(server, tmp_path, "--source", source)
    assert code == 0 and downloaded(server) == {WEIGHTS}, errors
    assert path.read_bytes() == data


@sources
def test_full_disk_is_one_line(server, tmp_path, source):
    limit = len(server.files[WEIGHTS]) // 2
    code, _, errors = run(
        server,
        tmp_path,
        "--source",
        source,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert code == 1 and "Traceback" not in errors
    assert "could not be written: File too large. Make room" in errors
    assert run(server, tmp_path, "--source", source)[0] == 0


def test_too_small_a_disk_is_refused_before_the_download(server, tmp_path, monkeypatch):
    files = {"model.safetensors": download.RemoteFile(10**9, None), "config.json": download.RemoteFile(10, None)}
    source = download.Source("here", files, lambda *args: pytest.fail("downloaded"))
    monkeypatch.setitem(download.SOURCES, "huggingface", lambda name, revision: source)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2e9, 1e9, 0.5e9))
    with pytest.raises(ValueError, match="has 0.50 GB free, and 1.00 GB must be downloaded"):
        download.download(NAME, tmp_path / "output")


@sources
def test_unknown_name_is_one_line(server, tmp_path, source):
    code, _, errors = run(server, tmp_path, "--source", source, "--model", "NOBODY/nothing")
    assert code == 1 and "NOBODY/nothing" in errors and len(errors.strip().splitlines()) == 1, errors


def test_no_network_names_the_mirror_and_modelscope(server, tmp_path):
    server.server_port = 9  # where nothing listens
    code, _, errors = run(server, tmp_path)
    assert code == 1 and "HF_ENDPOINT" in errors and "--source modelscope" in errors
    assert len(errors.strip().splitlines()) == 1, errors


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["config.json", "pytorch_model.bin", "model.py"], ["pytorch_model.bin", "config.json"]),
        (
            ["config.json", "a.safetensors", "pytorch_model-1.bin", "model.safetensors.index.json", "x/b.safetensors"],
            ["a.safetensors", "model.safetensors.index.json", "config.json"],
        ),
    ],
)
def test_one_form_of_the_weights_is_downloaded(names, wanted):
    assert wanted_files(names) == wanted


@pytest.mark.parametrize("names, lacks", [(["config.json"], "weights"), (["model.safetensors"], "config.json")])
def test_repositories_without_a_checkpoint_are_refused(names, lacks):
    with pytest.raises(ValueError, match=lacks):
        wanted_files(names)


def test_hub_name_is_downloaded_into_the_cache_and_found_offline(server, tmp_path):
    program = f"from common.hub import local_folder; print(local_folder('{NAME}'))"
    folders = []
    for offline in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**environment(server, tmp_path), "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        folders.append(result.stdout)
    assert folders[0] == folders[1]
    assert downloaded(server) == {"config.json", "tokenizer.model", "tokenizer_config.json", WEIGHTS}


@pytest.mark.parametrize("page", ["docs/install.md", "docs/zh/install.md"])
def test_documented_hf_download_fetches_the_weights_without_the_code(server, tmp_path, page):
    (line,) = re.findall(r"^\S*hf (download .*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
    program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    result = subprocess.run(
        [*program, *shlex.split(line)], cwd=tmp_path, env=environment(server, tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    wanted = {"pytorch_model.bin", "config.json", "tokenizer.model"}
    assert wanted <= downloaded(server) and "modeling_chatglm.py" not in downloaded(server)
    assert (tmp_path / "chatglm2-6b/pytorch_model.bin").read_bytes() == server.files["pytorch_model.bin"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        local_folder(tmp_path / "nothing")

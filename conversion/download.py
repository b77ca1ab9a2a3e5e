"""
Downloads a checkpoint, checks it, and puts this package's code beside it:

    python -m conversion.download                           # the published weights, to checkpoints/chatglm2-6b
    python -m conversion.download --source modelscope       # the same from modelscope.cn
    HF_ENDPOINT=https://MIRROR python -m conversion.download
    python -m conversion.download --model OWNER/NAME --output folder

After an interruption, the same command continues. Every file is compared with the checksum that the source lists.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import how_to_install, plain_errors
from common.files import only_run
from common.hub import wanted_files
from common.options import Parser
from common.package import ROOT

from . import upgrade


PUBLISHED = "THUDM/chatglm2-6b"
# Names on ModelScope of repositories on the Hub
ON_MODELSCOPE = {PUBLISHED: "ZhipuAI/chatglm2-6b"}


AGAIN = "run the same command again to continue."


class RemoteFile(NamedTuple):
    size: int  # bytes
    sha256: str | None  # of large files
    git_sha1: str | None = None  # of others: that of git's blob


class Source(NamedTuple):
    """A repository: its address, its files by name, and a function that downloads one of them into a folder."""

    address: str
    files: dict[str, RemoteFile]
    download: Callable


def huggingface(name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    api = HfApi()
    info = api.model_info(name, revision=revision, files_metadata=True)
    files = {
        file.rfilename: RemoteFile(file.size, file.lfs and file.lfs.sha256, None if file.lfs else file.blob_id)
        for file in info.siblings
    }

    def download(file: str, folder: Path):
        # Since huggingface_hub 2, hf_hub_download starts large files again after an interruption.
        part = folder / f"{file}.incomplete"
        if part.exists() and part.stat().st_size > files[file].size:
            part.unlink()
        with part.open("r+b" if part.exists() else "w+b") as content:
            http_get(
                hf_hub_url(name, file, revision=info.sha), content, resume_size=content.seek(0, os.SEEK_END),
                headers=build_hf_headers(), expected_size=files[file].size, displayed_filename=file,
            )  # fmt: skip
        os.replace(part, folder / file)

    return Source(f"{api.endpoint}/{name}", files, download)


def modelscope(name: str, revision: str | None) -> Source:
    try:
        from modelscope_hub import HubApi, get_default_config
    except ImportError as error:
        raise ValueError(f"{error}. {how_to_install('modelscope')}") from None

    name = ON_MODELSCOPE.get(name, name)
    api = HubApi()
    listed = api.list_repo_files(name, "model", revision=revision)
    files = {file.path: RemoteFile(file.size, file.sha256) for file in listed if not file.is_dir}

    def download(file: str, folder: Path):
        api.download_file(
            name, "model", file, revision=revision, local_dir=folder, expected_sha256=files[file].sha256,
            file_size=files[file].size,
        )  # fmt: skip

    return Source(f"{get_default_config().endpoint}/models/{name}", files, download)


SOURCES = {"huggingface": huggingface, "modelscope": modelscope}


def is_right(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the size and the checksum that its source lists."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
    if file.git_sha1:
        return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes()).hexdigest() == file.git_sha1
    return True


def download(model: str, output: Path, source: str = "huggingface", revision: str | None = None):
    """
    Raises:
        ValueError: if there is no such checkpoint, the disk is too small, the source cannot be reached, or a file is
            not what it lists. What was received stays in `output`, and is used by the next call.
    """
    repository = open_source(model, source, revision)
    files = {name: repository.files[name] for name in wanted(repository)}
    with only_run(output, "--output"):
        if (output / upgrade.RECORD).exists():
            upgrade.undo(output)  # the files as they were published, which are compared
        missing = [name for name, file in files.items() if not is_right(output / name, file)]
        total, left = (sum(files[name].size for name in names) for names in (files, missing))
        free = shutil.disk_usage(output).free
        print(
            f"{repository.address}: {len(files)} files, {gigabytes(total)}, of which {gigabytes(left)} are to be downloaded "
            f"to {output} ({gigabytes(free)} free).",
            flush=True,
        )
        if left - part_bytes(output) > free:
            raise ValueError(
                f"{output} has {gigabytes(free)} free, and {gigabytes(left)} must be downloaded. Make room, or choose "
                "another --output."
            )
        for name in missing:
            if (output / name).exists():
                (output / name).unlink()  # damaged, or another version
            try:
                repository.download(name, output)
            except Exception as error:  # of the HTTP libraries, which change from one release to the next
                if full := disk_error(error):
                    message = f"{output / name} could not be written: {full.strerror}. Make room; {AGAIN}"
                    raise OSError(message) from error
                raise unreachable(repository.address, source, error) from error
            if not is_right(output / name, files[name]):
                (output / name).unlink(missing_ok=True)
                raise ValueError(
                    f"{name} differs from what {repository.address} lists, in size or checksum. It was removed; {AGAIN}"
                )
        upgrade.upgrade(output)
    print(f"{output} is complete: all checksums match, and this package's code is beside the weights.")


def open_source(model: str, source: str, revision: str | None) -> Source:
    try:
        return SOURCES[source](model, revision)
    except ValueError:
        raise
    except Exception as error:
        raise unreachable(model, source, error) from error


def wanted(repository: Source) -> list[str]:
    try:
        return wanted_files(repository.files)
    except ValueError as error:
        raise ValueError(f"{repository.address}: {error}") from None


def unreachable(what: str, source: str, error: Exception) -> ValueError:
    other = "Try a mirror (HF_ENDPOINT), or --source modelscope" if source == "huggingface" else "Try again"
    message = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{what} cannot be downloaded ({message}). {other}; {AGAIN}")


def disk_error(error: BaseException | None) -> OSError | None:
    """Returns the disk error that caused this error, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def part_bytes(folder: Path) -> int:
    """Returns the number of bytes of unfinished files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.incomplete"))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", default=PUBLISHED, help="a name on the Hub, OWNER/NAME (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder to write to (default: checkpoints/NAME)")
    parser.add_argument("--source", choices=list(SOURCES), default="huggingface", help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit (default: the newest)")
    args = parser.parse_args(argv)
    if args.model.count("/") != 1:
        parser.error(f"--model {args.model}: a name on the Hub is OWNER/NAME")
    output = args.output or Path(os.path.relpath(ROOT / "checkpoints" / args.model.split("/")[1]))
    with plain_errors("conversion"):
        download(args.model, output, args.source, args.revision)


if __name__ == "__main__":
    main()

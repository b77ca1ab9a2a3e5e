"""
Copies this package's code into an existing checkpoint folder, so that `from_pretrained` runs it, or undoes that:

    python -m conversion.upgrade "path/to/chatglm2-6b"
    python -m conversion.upgrade "path/to/chatglm2-6b" --undo

Replaced files are kept as NAME.old. Weights, tokenizer.model and all other files are not changed. The folder may be in the Hub's
cache, where files are links: the links are replaced, and the files behind them are not changed.
"""

import hashlib
import json
import os
from pathlib import Path

from common.errors import plain_errors
from common.files import read_json, write_json
from common.options import Parser
from common.package import CODE, DEFAULTS, ROOT


# What an upgrade did: {"written": {name: SHA-256 of the new file}, "kept": [name, ...]}
RECORD = "upgrade.json"
OLD = ".old"


def new_files(folder: Path) -> dict[str, bytes]:
    """
    Returns `{name: content}` of the files to write: the code, the chat template, small files that are missing, and
    configurations that name other classes (`OWNER/NAME--modeling_chatglm...` takes the code from the Hub).
    """
    names = [path.name for pattern in (*CODE, "chat_template.jinja") for path in sorted(ROOT.glob(pattern))]
    files = {name: (ROOT / name).read_bytes() for name in names}
    for name in DEFAULTS:
        if not (folder / name).exists() or is_link_text(folder / name):
            files[name] = (ROOT / name).read_bytes()
    for name in {"config.json", "tokenizer_config.json"} - files.keys():
        fields, classes = read_json(folder / name), read_json(ROOT / name)["auto_map"]
        if fields.get("auto_map") != classes:
            files[name] = (json.dumps({**fields, "auto_map": classes}, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def is_link_text(path: Path) -> bool:
    """Whether a file is a symbolic link that Git wrote as text, as it does where links are switched off (Windows)."""
    return path.is_file() and path.stat().st_size < 100 and path.read_bytes().startswith(b"../")


def upgrade(folder: Path) -> tuple[list[str], list[str]]:
    """
    Returns the names of the files that were written, and of those that were kept as NAME.old.

    Raises:
        ValueError: if the folder has no ChatGLM2, or a file was changed since the last upgrade. Nothing is written then.
        OSError: if the folder cannot be written. What was done is undone.
    """
    check_is_chatglm2(folder)
    record = read_record(folder)
    check_unchanged(folder, record)
    wanted = new_files(folder)
    files = {name: data for name, data in wanted.items() if digest(folder / name) != sha256(data)}
    old_code = {path.name for pattern in CODE for path in folder.glob(pattern)} - wanted.keys()
    if not files and not old_code:
        return [], []
    kept = [name for name in sorted({*files, *old_code} - record["written"].keys()) if os.path.lexists(folder / name)]
    for name in kept:
        if os.path.lexists(folder / (name + OLD)):
            raise ValueError(f"{folder / (name + OLD)} exists already, and not from an upgrade. Move it away first.")
    written = {name: value for name, value in record["written"].items() if name not in old_code}
    written.update((name, sha256(data)) for name, data in files.items())
    try:
        # Written first, so that an interrupted upgrade can be undone
        write_json(folder / RECORD, {"written": written, "kept": sorted({*record["kept"], *kept})})
        for name in kept:
            (folder / name).rename(folder / (name + OLD))
        for name in old_code - set(kept):
            (folder / name).unlink()
        for name, data in files.items():
            (folder / (name + ".part")).write_bytes(data)
            os.replace(folder / (name + ".part"), folder / name)
    except OSError:
        undo(folder)
        raise
    return sorted(files), kept


def undo(folder: Path) -> list[str]:
    """
    Removes the files that `upgrade` wrote and restores the old ones. Returns their names.

    Raises:
        ValueError: if there was no upgrade, or a file was changed since. Nothing is changed then.
    """
    record = read_record(folder)
    if not record["written"] and not record["kept"]:
        raise ValueError(f"There is no {RECORD} in {folder}: it was not upgraded.")
    check_unchanged(folder, record)
    for name, value in record["written"].items():
        (folder / (name + ".part")).unlink(missing_ok=True)
        if digest(folder / name) == value:
            (folder / name).unlink()
    back = [name for name in record["kept"] if os.path.lexists(folder / (name + OLD))]
    for name in back:
        os.replace(folder / (name + OLD), folder / name)
    (folder / RECORD).unlink()
    return back


def check_is_chatglm2(folder: Path):
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    fields = read_json(folder / "config.json", "Give a complete checkpoint folder.")
    if fields.get("model_type", "chatglm") != "chatglm" or "multi_query_attention" not in fields:
        raise ValueError(
            f"{folder / 'config.json'} is not ChatGLM2's: its model_type is {fields.get('model_type')!r}, and ChatGLM2's is "
            "'chatglm', with multi_query_attention."
        )


def check_unchanged(folder: Path, record: dict):
    """Raises ValueError if a file that an upgrade wrote was changed since, because the change would be lost."""
    for name, value in record["written"].items():
        replaced = name not in record["kept"] or os.path.lexists(folder / (name + OLD))
        if replaced and digest(folder / name) not in (value, None):
            raise ValueError(
                f"{folder / name} was changed after the upgrade. Move it to another folder if you need it, or remove it."
            )


def read_record(folder: Path) -> dict:
    return read_json(folder / RECORD) if (folder / RECORD).exists() else {"written": {}, "kept": []}


def digest(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.is_file() else None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("--undo", action="store_true", help="remove this package's code and restore the old files")
    args = parser.parse_args(argv)
    with plain_errors("conversion"):
        if args.undo:
            back = undo(args.folder)
            print(f"{args.folder} is as it was before the upgrade: {len(back)} old files were restored.")
            return
        written, kept = upgrade(args.folder)
        if not written and not kept:
            print(f"{args.folder} has this package's code already. Nothing was changed.")
            return
        print(f"{args.folder} now runs this package's code: {len(written)} files were written.")
        if kept:
            print(f"The old files are kept as NAME{OLD}: {', '.join(kept)}.")
        print("To undo this, run the same command with --undo.")


if __name__ == "__main__":
    main()

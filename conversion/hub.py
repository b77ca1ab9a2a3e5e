"""
Assembles the folder of a Hub repository from a checkpoint, checks it, and uploads it:

    make hub-repo MODEL=path/to/chatglm2-6b OUTPUT=build/hub/chatglm2-6b
    make hub-repo OUTPUT=build/hub/chatglm2-6b ARGS="--push NAME/chatglm2-6b"      # uploads the existing folder

The folder gets this package's code, the checkpoint's configuration and tokenizer, links to its weights, and a model card: the
checkpoint's README.md if it names a licence, otherwise a new one. Then it is tested: a separate process, offline and with only the
packages that setup.cfg declares, must load it and answer a prompt. A folder that fails is not uploaded. A new repository on the
Hub is private at first. Log in with `hf auth login`.
"""

from pathlib import Path

from common.options import Parser


def options() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model", help="checkpoint folder, or OWNER/NAME on the Hub (default: --output exists already)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the repository")
    parser.add_argument("--push", metavar="REPOSITORY", help="upload to this repository, OWNER/NAME on the Hub")
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from packaging.requirements import Requirement

from common.checkpoint import check_folder, weight_files
from common.errors import plain_errors
from common.files import new_folder, read_json
from common.hub import local_folder
from common.package import ROOT

from .checkpoint import Checkpoint, write_package


CARD = Path(__file__).with_name("model_card.md")
PUBLISHED = "THUDM/chatglm2-6b"
LICENCE = f"https://huggingface.co/{PUBLISHED}/blob/main/MODEL_LICENSE"
GREETING = "你好"

# Runs in the clean process, whose sys.path has the standard library only, until the packages are added.
VALIDATION = f"""
import sys
folder, packages = sys.argv[1:]
sys.path.append(packages)
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
wrong = {{what: sorted(names) for what, names in info.items() if names}}
assert not wrong, f"loading found {{wrong}}"
rows = model.get_input_embeddings().num_embeddings
assert len(tokenizer) <= rows, f"the tokenizer has {{len(tokenizer)}} tokens, the embedding {{rows}} rows"
answer, _ = model.eval().chat(tokenizer, {GREETING!r}, do_sample=False, max_new_tokens=16)
assert answer.strip(), "the answer to a greeting is empty"
sys.stdout.buffer.write(answer.encode())
"""


def assemble(weights: Path, output: Path, repository: str | None = None):
    """
    Writes the folder, with hard links to the weights, or symbolic links if they are on another disk.

    Raises:
        ValueError: if the checkpoint is incomplete or damaged, or `output` exists already.
    """
    checkpoint = Checkpoint(weights)
    with new_folder(output) as folder:
        write_package(folder, weights, checkpoint.config_dict)
        index = [path for path in weights.glob("*.index.json") if path.name.split(".")[0] in ("model", "pytorch_model")]
        for path in [*weight_files(weights), *index]:
            link(path.resolve(), folder / path.name)
        (folder / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
        (folder / ".gitattributes").write_text(
            "".join(
                f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.bin", "*.model")
            )
        )
        card = load_card(weights / "README.md")
        if card is None or not card.data.license:  # like the published card, which is about older code
            card = new_card(checkpoint, repository or output.name)
        card.save(folder / "README.md")
        copy_linked(card.text, weights, folder)


def load_card(path: Path) -> ModelCard | None:
    try:
        return ModelCard.load(path) if path.exists() else None
    except yaml.YAMLError as error:
        raise ValueError(
            f"The header of {path} is not YAML: {error}. Correct it, or remove the file to get a new one."
        ) from error


def copy_linked(text: str, source: Path, folder: Path):
    """Copies the files that a card or a page shows or links to, and reports missing ones."""
    for name in re.findall(r"\]\(([^)\s#:]+)\)", text):
        path = source / name
        if not path.resolve().is_relative_to(source.resolve()) or not path.is_file():
            print(f"README.md links to {name}, which is not in {source}.", file=sys.stderr)
        elif not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
            if path.suffix == ".md":
                copy_linked(path.read_text(encoding="utf-8"), path.parent, (folder / name).parent)


def link(source: Path, target: Path):
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)


def new_card(checkpoint: Checkpoint, repository: str) -> ModelCard:
    """Returns a card with the checkpoint's sizes and the licence of the published weights."""
    config = checkpoint.config
    plain = checkpoint.plain_names()
    quantization = f"INT{config.quantization_bit} and " if config.quantization_bit else ""
    dtype = next(tensor.dtype for tensor in checkpoint.names.values() if tensor.is_floating_point())
    data = ModelCardData(
        language=["zh", "en"],
        license="other",
        license_name="chatglm2-model-license",
        license_link=LICENCE,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=PUBLISHED,
        tags=["glm", "chatglm", "thudm", "custom_code"],
    )
    return ModelCard.from_template(
        data,
        template_path=CARD,
        name=repository.split("/")[-1],
        repository=repository,
        licence=LICENCE,
        published=PUBLISHED,
        parameters=f"{sum(tensor.numel() for tensor in plain.values()):,}",
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        context=f"{config.seq_length:,}",
        dtype=quantization + str(dtype).removeprefix("torch."),
        gigabytes=f"{checkpoint.nbytes / 1e9:.2f}",
        requirements=" ".join(f'"{requirement}"' for requirement in declared_requirements()),
    )


def declared_requirements() -> list[str]:
    """Returns the requirements that setup.cfg declares."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"].split("\n")[1:]


def needed_distributions(requirements: list[str]) -> Iterator[importlib.metadata.Distribution]:
    """Yields the installed distributions of the requirements, and of their requirements."""
    seen, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            key = (requirement.name.lower(), extra)
            if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            seen.add(key)
            try:
                distribution = importlib.metadata.distribution(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                raise ValueError(
                    f"{requirement} is not installed, but setup.cfg requires it. Run pip install -e ."
                ) from None
            yield distribution
            for text in distribution.requires or ():
                child = Requirement(text)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    child.marker = None
                    waiting.append(child)


def validate(folder: Path) -> str:
    """
    Loads the folder in a separate, clean process, and returns its answer to a greeting.

    Raises:
        ValueError: if that fails, with the reason.
    """
    check_folder(folder)
    with tempfile.TemporaryDirectory() as work:
        packages = Path(work, "packages")
        packages.mkdir()
        for distribution in needed_distributions(declared_requirements()):
            for name in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
                target = packages / name
                if not target.exists():
                    target.symlink_to(distribution.locate_file(name))
        # Without site-packages (-S), variables and folders of the user (-I)
        command = [sys.executable, "-I", "-S", "-c", VALIDATION, str(folder.resolve()), str(packages)]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
            **{"HF_HOME": work, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        }
        run = subprocess.run(command, cwd=work, env=environment, capture_output=True)
    if run.returncode != 0:
        error = run.stderr.decode(errors="replace").strip().split("\n")[-1] or f"it ended with {run.returncode}"
        raise ValueError(f"{folder} does not work, and was not uploaded: {error}")
    return run.stdout.decode()


def push(folder: Path, repository: str) -> str:
    """Uploads the folder, with the files behind its links. Returns the address of the commit."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message=f"Upload {folder.resolve().name}"
        ).commit_url
    except HfHubHTTPError as error:
        raise ValueError(f"{repository}: {error}. Is it yours, and are you logged in (hf auth login)?") from error
    except Exception as error:  # of the HTTP library, which depends on the release of huggingface_hub
        raise ValueError(
            f"{repository}: the Hub cannot be reached ({error}). The folder is complete: run the same command again without --model."
        ) from error


def main(argv=None):
    args = options().parse_args(argv)
    with plain_errors("conversion"):
        if args.model is not None:
            assemble(local_folder(args.model), args.output, args.push)
        read_json(check_folder(args.output) / "config.json")
        print(f"{args.output} works: {GREETING} → {validate(args.output)}")
        if args.push:
            print(push(args.output, args.push))


if __name__ == "__main__":
    main()

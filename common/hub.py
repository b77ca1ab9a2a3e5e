"""Finds the checkpoint files of a Hub repository, and the folder that they are downloaded to."""

from collections.abc import Iterable
from pathlib import Path


# Beside the weights. The code is this package's, whatever the repository has.
SMALL_FILES = (
    "generation_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "tokenizer.model", "MODEL_LICENSE", "config.json",
)  # fmt: skip


def is_hub_name(name: str | Path) -> bool:
    """Whether this is OWNER/NAME on the Hub, and cannot be the path of a folder."""
    name = str(name)
    return (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not name.endswith("/")
        and not Path(name).exists()
    )


def wanted_files(names: Iterable[str]) -> list[str]:
    """
    Returns the files of a repository that belong to a checkpoint: the weights, as safetensors if there are any, and small
    files. config.json comes last, so that an incomplete folder cannot be loaded.

    Raises:
        ValueError: if there are no weights, or no config.json.
    """
    names = {name for name in names if "/" not in name}
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    kind = "model" if weights else "pytorch_model"
    weights = weights or sorted(name for name in names if name.startswith(kind) and name.endswith(".bin"))
    index = sorted(name for name in names if name.startswith(kind) and name.endswith(".index.json"))
    if not weights or "config.json" not in names:
        raise ValueError(
            f"It has no {'weights (*.safetensors, pytorch_model*.bin)' if not weights else 'config.json'}: it holds no "
            "checkpoint."
        )
    return [*weights, *index, *(name for name in SMALL_FILES if name in names)]


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """
    Returns the folder of a model. Files of OWNER/NAME on the Hub are downloaded to the Hub's cache if they are not there yet.
    HF_ENDPOINT, HF_HUB_OFFLINE and the other variables of the Hub's client apply.

    Raises:
        ValueError: if the folder or the repository does not exist, or the Hub cannot be reached.
    """
    if not is_hub_name(name):
        if not Path(name).is_dir():
            raise ValueError(f"There is no folder {name}. Give a folder, or a name on the Hub (OWNER/NAME).")
        return Path(name)
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    files = None
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(str(name), revision=revision)
            files = wanted_files(sibling.rfilename for sibling in info.siblings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
        except Exception:  # of the HTTP library, which depends on the release of huggingface_hub
            pass  # no network: use what was downloaded before
    if files is not None:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    config = try_to_load_from_cache(str(name), "config.json", revision=revision)
    if isinstance(config, str):
        return Path(config).parent
    raise ValueError(
        f"{name} is not in the Hub's cache, and {constants.ENDPOINT} cannot be reached. Set HF_ENDPOINT to a mirror, or "
        "download the model from ModelScope: python -m conversion.download --source modelscope"
    )

"""A model of the Hugging Face hub, brought into its cache: `org/name` to a directory.

Configuration first, then the weights that it leads to, so that a model that cannot be served is refused before gigabytes have come. Pickled
weights are never fetched. Cache, offline mode (HF_HUB_OFFLINE), credentials and progress bars are those of the huggingface_hub package,
which is imported here and only when needed.
"""

import re
from collections.abc import Callable
from pathlib import Path

from headrace.engine.checkpoint.hf import INDEX, SINGLE, read_json
from headrace.engine.checkpoint.wording import in_line
from headrace.engine.errors import UserError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
]


def download(name: str, revision: str | None, check: Callable[[Path], object]) -> Path:
    """The directory in the cache that holds the model, complete. `check` may refuse it (UserError) once its configuration is there.

    Raises UserError without a network, for a repository or revision that does not exist or asks for permission, and for one without
    safetensors.
    """
    directory = _fetch(name, revision, SMALL_FILES)
    check(directory)
    if (directory / INDEX).is_file():
        files = read_json(directory / INDEX).get("weight_map")
        wanted = sorted({file for file in files.values() if isinstance(file, str)}) if isinstance(files, dict) else []
    else:
        wanted = [SINGLE]
    directory = _fetch(name, revision, [*SMALL_FILES, *wanted])
    missing = [file for file in wanted if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"{name} on the hub has no {missing[0]} within reach: only safetensors weights are fetched (offline, only the cache is read)"
        )
    return directory


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f"{name} looks like a hub model, which needs the huggingface_hub package: pip install huggingface_hub") from None
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise UserError(
            f"{name} on the hub is gated: accept its terms at its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} on the hub has no revision {revision!r}: check --revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no local path and no hub repository is named {name!r}: check the spelling (a private one needs HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is neither a local path nor a valid hub name: {in_line(error)}") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name}{at} is neither a local path nor complete in the hub's cache, and the hub cannot be reached: "
            "check the network and HF_HUB_OFFLINE, or give a local path"
        ) from None
    except Exception as error:  # The package lets errors of its HTTP library through; their classes change with its versions.
        raise UserError(f"cannot fetch {name}{at} from the hub: {type(error).__name__}: {in_line(error)}") from None

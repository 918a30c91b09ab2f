"""Data sets of the Hub, through ``datasets``, with its errors told in one line."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from nemo_automodel.shared.errors import UserError, did_you_mean
from nemo_automodel.shared.hub_errors import explain_refusal, offline_switch, transport_errors

if TYPE_CHECKING:
    import datasets

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_hub_splits(
    repo: str, split_names: list[str], config: str | None, revision: str | None = None
) -> list[datasets.Dataset]:
    """Load whole splits of a Hub data set from the cache or the network; an empty name takes the only split.

    Raises:
        UserError: bad name, missing, gated, unreachable or offline, unknown configuration or split.
    """
    return _load(repo, split_names, config, {"revision": revision})


def stream_hub_splits(
    repo: str, split_names: list[str], config: str | None, revision: str | None = None
) -> list[datasets.IterableDataset]:
    """Open splits of a Hub data set to be read over the network row by row; nothing is kept on the disk.

    Raises:
        UserError: as ``load_hub_splits``.
    """
    return _load(repo, split_names, config, {"revision": revision, "streaming": True})


def _load(repo: str, split_names: list[str], config: str | None, options: dict[str, Any]) -> list[Any]:
    if not _NAME.fullmatch(repo):
        raise UserError(f"`{repo}` is neither a path that exists nor a Hub data set (owner/name).")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    loaded: list[Any] = []
    for split in split_names:
        try:
            found = datasets.load_dataset(repo, config, split=split or None, **options)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise UserError(_refusal(repo, error) or _not_found(repo, str(error))) from error
        except (ConnectionError, HfHubHTTPError) as error:
            raise UserError(explain_refusal(repo, error, "data set") or _unreachable(repo)) from error
        except (ValueError, RuntimeError) as error:
            raise UserError(_bad_request(repo, split, config, str(error))) from error
        except OSError as error:
            failed = f"Loading the Hub data set `{repo}` failed: {_first_line(error)}."
            raise UserError(explain_refusal(repo, error, "data set") or failed) from error
        if isinstance(found, dict):
            if len(found) > 1:
                raise UserError(f"`{repo}` has several splits; name one. Splits there: {', '.join(found)}.")
            found = next(iter(found.values()))
        loaded.append(found)
    return loaded


def _refusal(repo: str, error: Exception) -> str | None:
    """Ask the Hub why it is closed; `datasets` hides the answer that it got."""
    found = explain_refusal(repo, error, "data set")
    if found is not None or offline_switch() is not None:
        return found
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repo, repo_type="dataset")
    except transport_errors() as reason:
        return explain_refusal(repo, reason, "data set")
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _not_found(repo: str, message: str) -> str:
    if "gated" in message or "authenticated" in message or "ask for access" in message:
        return (
            f"The Hub data set `{repo}` is gated. Ask for access on its page on the Hub, then set the environment "
            "variable HF_TOKEN to a token of that account, or run `hf auth login`."
        )
    return (
        f"`{repo}` is neither a local path nor a Hub data set that this account can see. Check the spelling; a private "
        "one needs the environment variable HF_TOKEN."
    )


def _unreachable(repo: str) -> str:
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")]
    if offline:
        return (
            f"`{repo}` is not a local path, it is not in the cache, and {offline[0]} forbids asking the Hub. Unset it, "
            "load the data set once with a network, or name a local file or directory."
        )
    return (
        f"`{repo}` is not a local path, it is not in the cache, and the Hub cannot be reached. Check the network (and "
        "HF_ENDPOINT, if you use a mirror), or name a local file or directory."
    )


def _bad_request(repo: str, split: str, config: str | None, message: str) -> str:
    names = re.findall(r"'([^']+)'", message.split("[", 1)[1].split("]", 1)[0]) if "[" in message else []
    if message.startswith("Unknown split"):
        return f"`{repo}` has no split `{split}`.{did_you_mean(split, names)} Splits there: {', '.join(names)}."
    if message.startswith("Config name is missing"):
        return f"`{repo}` has several configurations. Set `name:` to one of: {', '.join(names)}."
    if message.startswith("BuilderConfig"):
        return f"`{repo}` has no configuration `{config}`.{did_you_mean(str(config), names)} Known: {', '.join(names)}."
    if "scripts are no longer supported" in message:
        return f"`{repo}` needs a loading script, and code that data brings is not run. Convert it to Parquet or JSONL."
    lines = message.strip().splitlines() or ["unknown reason"]
    return f"Loading the Hub data set `{repo}` failed: {lines[0]}"

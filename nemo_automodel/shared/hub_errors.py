"""What the Hugging Face Hub and its client raise, told in one line with the remedy.

Errors are told by their types and by the status and error code of the answer; the Hub's own words decide only between
reasons that share a code (asked for access, not asked, a token without the scope). The client and the loaders above it
wrap errors, so the whole chain of causes is looked through. Tokens never appear: they travel in headers, and headers
are not read.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

ENDPOINT = "https://huggingface.co"
_USER_INFO = re.compile(r"//[^/@]*@")
_ON = ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """Return the address of the Hub in effect, without a password in it."""
    return _USER_INFO.sub("//", (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/"))


def tokens_page() -> str:
    """Return the page where tokens are made."""
    return f"{endpoint()}/settings/tokens"


def offline_switch() -> str | None:
    """Return the variable that forbids to ask the Hub, None where nothing does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in _ON), None)


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it came from, outermost first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def transport_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what the client raises when a request fails, and ``more``.

    Answers of the Hub are of both types, a dead network of the second alone.
    """
    from huggingface_hub import errors

    # httpx's, under whatever name the client's version imports it
    return (OSError, errors.HTTPError, *more)  # type: ignore[attr-defined]


def explain(name: str, error: BaseException, kind: str = "model") -> str | None:
    """Return the line for an error of the Hub about the ``kind`` (model or data set) ``name``; None: not the Hub's."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = causes(error)

    def is_about(*types: type[BaseException]) -> bool:
        return any(isinstance(item, types) for item in chain)

    refusal = explain_refusal(name, error, kind)
    if refusal is not None:
        return refusal
    if is_about(RevisionNotFoundError):
        return f"`{name}` has no such revision. Check `model.revision`."
    if is_about(RepositoryNotFoundError):
        return (
            f"`{name}` is neither a directory here nor a {kind} on the Hugging Face Hub (404). Check the spelling; if "
            "it is private, set the environment variable HF_TOKEN to a token that may read it, or run `hf auth login`."
        )
    switch = offline_switch()
    if is_about(OfflineModeIsEnabled) or (switch is not None and is_about(LocalEntryNotFoundError)):
        return _offline(name, switch or "HF_HUB_OFFLINE")
    if is_about(LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) or _is_network(chain):
        return (
            f"`{name}` is not in the Hugging Face cache and the Hub cannot be reached. Check the network (and "
            "HF_ENDPOINT, if you use a mirror), or give a local directory."
        )
    if is_about(HFValidationError):
        return f"`{name}` is neither a directory here nor a possible Hub name (owner/{kind}). Check the spelling."
    return None


def explain_missing(name: str) -> str | None:
    """Return the line where a loader found no file of ``name`` and did not say that it could not look for it.

    Transformers takes a file that is not in the cache for one that does not exist when nobody can be asked.
    """
    if Path(name).exists():
        return None
    switch = offline_switch()
    if switch is not None:
        return _offline(name, switch)
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(name)
    except transport_errors(ValueError) as reason:
        return explain(name, reason)
    return None


def _offline(name: str, switch: str) -> str:
    return (
        f"`{name}` is neither a directory here nor complete in the Hugging Face cache, and {switch} forbids to look "
        f"further. Give a directory, or unset {switch}."
    )


def explain_refusal(name: str, error: BaseException, kind: str = "model") -> str | None:
    """Return the line where something stands in the way that has one remedy whatever was fetched; otherwise None.

    Gated (no token, not asked, pending, a token without the scope), a bad token, a token that may not, too many
    requests, a server in trouble, a connection that broke off, a full disk.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    chain = causes(error)
    full = next((item for item in chain if _is_full(item)), None)
    if full is not None:
        return _full_disk(name, full)
    gated = next((item for item in chain if isinstance(item, GatedRepoError)), None)
    if gated is not None:
        return _gated(name, gated, kind)
    answer: Any = next((item for item in chain if isinstance(item, HfHubHTTPError)), None)
    status = None if answer is None or answer.response is None else answer.response.status_code
    if answer is not None and _is_bad_token(answer):
        return _bad_token(answer)
    if status == 403 and not _has_code(answer):
        return (
            f"The Hub refuses `{name}` (403 Forbidden): the token may not read it. Make one that may at "
            f"{tokens_page()}, then set the environment variable HF_TOKEN to it."
        )
    if status is not None and status >= 500:
        return (
            f"The Hub answers {status} for `{name}`: it has trouble itself. Run the same command again later; what was "
            "fetched is kept."
        )
    if status == 429:
        return (
            f"The Hub answers 429 for `{name}`: too many requests from here. Wait some minutes, then run the same "
            "command again; with a token (the environment variable HF_TOKEN, or `hf auth login`) more are allowed."
        )
    if status is not None and status not in (401, 403, 404):
        return f"The Hub refuses `{name}` ({status}){_words_of(answer)}."
    if _is_broken_off(chain):
        return (
            f"The connection broke off while `{name}` was fetched. Run the same command again: it goes on where it "
            "ended."
        )
    return None


def _words_of(answer: Any) -> str:
    """Return what the Hub says itself, to stand after a status: a limit, a bill that is open."""
    words = " ".join((answer.server_message or "").split()).rstrip(".")
    return f": {words}" if words else ""


def _has_code(error: Any) -> bool:
    """Tell whether the client gave the answer a type of its own, which says more than its status."""
    from huggingface_hub.errors import HfHubHTTPError

    return type(error) is not HfHubHTTPError


def _gated(name: str, error: Any, kind: str) -> str:
    """Tell the reasons apart for which a gated repository is closed."""
    words = f"{getattr(error, 'server_message', None) or ''} {error}"
    page = f"{endpoint()}/{'datasets/' if kind == 'data set' else ''}{name}"
    if "awaiting a review" in words:
        return (
            f"`{name}` is gated, and your request for access is waiting for its owner. When it is granted ({page}), "
            "start again."
        )
    if "fine-grained" in words:
        return (
            f"`{name}` is gated, and the token may not read gated repositories. Edit it at {tokens_page()}: tick read "
            "access to public gated repositories."
        )
    status = error.response.status_code if error.response is not None else 403
    if status == 401:
        return (
            f"`{name}` is gated, and no token was sent. Request access at {page}, make a token at {tokens_page()}, "
            "then set the environment variable HF_TOKEN to it, or run `hf auth login`."
        )
    return (
        f"`{name}` is gated, and the account of this token has no access. Request it at {page} (accept the terms), "
        "then start again with a token of that account."
    )


def _is_bad_token(error: Any) -> bool:
    response = error.response
    if response is None or response.status_code != 401:
        return False
    return "Invalid credentials" in (response.headers.get("X-Error-Message") or "")


def _bad_token(error: Any) -> str:
    source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
    return (
        f"The Hub refuses the token from {source} (401): it was revoked, has expired or is not complete. Make another "
        f"at {tokens_page()}, then set the environment variable HF_TOKEN to it, or run `hf auth login`."
    )


def explain_push(name: str, error: BaseException) -> str | None:
    """Return the line for an error while ``name`` was uploaded; None: not the Hub's."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    chain = causes(error)
    needs = f"make one with *write* access at {tokens_page()}, then set the environment variable HF_TOKEN to it"
    if any(isinstance(item, LocalTokenNotFoundError) for item in chain):
        return f"Nothing was sent to `{name}`: there is no token. To upload, {needs}, or run `hf auth login`."
    answer: Any = next((item for item in chain if isinstance(item, HfHubHTTPError)), None)
    status = None if answer is None or answer.response is None else answer.response.status_code
    if status == 401 and not _is_bad_token(answer):
        return f"Nothing was sent to `{name}`: the Hub wants a token (401). To upload, {needs}, or run `hf auth login`."
    if status == 403:
        return (
            f"The token may not write to `{name}` (403 Forbidden): it is for reading, or for other repositories. To "
            f"upload, {needs}."
        )
    again = "Run the same command again: files that arrived are not sent twice."
    if _is_broken_off(chain) or (status is not None and status >= 500):
        return f"The upload to `{name}` broke off. {again}"
    if status == 404:
        return f"The Hub has no account or organisation to hold `{name}` (404). Check the part before the slash."
    if status is not None and status != 429 and not _is_bad_token(answer):
        return f"The Hub refuses the upload to `{name}` ({status}){_words_of(answer)}."
    if status is None and _is_network(chain):
        return (
            f"The Hub cannot be reached, so nothing more was sent to `{name}`. Check the network (and HF_ENDPOINT, if "
            f"you use a mirror). {again}"
        )
    return explain(name, error)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _full_disk(name: str, error: BaseException) -> str:
    from huggingface_hub import constants

    assert isinstance(error, OSError)
    place = error.filename or constants.HF_HUB_CACHE
    return (
        f"`{name}` does not fit on the disk: {os.strerror(error.errno or errno.ENOSPC)} in {place}. Make room, or set "
        "HF_HOME to a directory on another disk; what was fetched is kept."
    )


def _is_broken_off(chain: list[BaseException]) -> bool:
    """Tell whether a transfer ended too early: the client's own check, or the connection's end."""
    return any(
        type(item).__name__ in ("RemoteProtocolError", "ReadError", "ReadTimeout", "WriteError", "IncompleteRead")
        or (isinstance(item, OSError) and "Consistency check failed" in str(item))
        for item in chain
    )


def _is_network(chain: list[BaseException]) -> bool:
    return any(type(item).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError", "gaierror") for item in chain)

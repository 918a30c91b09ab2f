"""The Hugging Face Hub: offline switches, cache, token, and what the token may do.

The Hub is asked one question, ``/api/whoami-v2``, and only when there is a token, no switch forbids it and the caller
allows it. The token goes to no other host: redirections are not followed, and plain HTTP is refused except to this
machine. It is never part of a finding.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_automodel.components.doctor.findings import (
    NOTE,
    OK,
    PROBLEM,
    WARNING,
    Check,
    Finding,
    gib,
    switch_is_on,
)
from nemo_automodel.components.doctor.host import hub_cache, hub_home

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 6.0
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
LOGIN = "hf auth login"
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LARGEST_ANSWER = 2**20
_USER_INFO = re.compile(r"//[^/@]*@")
_SECRET_NAMES = ("TOKEN", "SECRET", "PASSWORD", "_KEY", "APIKEY")
_GATED = "Gated models (Llama, Mixtral) answer `Cannot access gated repo for url` without it."


def endpoint(env: Mapping[str, str]) -> str:
    """Return the address of the Hub in effect; it may hold a password."""
    return (env.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def shown_endpoint(env: Mapping[str, str]) -> str:
    """Return the address of the Hub without a user's name and password."""
    return _USER_INFO.sub("//", endpoint(env))


def tokens_page(env: Mapping[str, str]) -> str:
    """Return the page where tokens are made."""
    return f"{shown_endpoint(env)}/settings/tokens"


def switched_off_by(env: Mapping[str, str]) -> list[str]:
    """Return the variables that forbid to ask the Hub; the one for data sets alone does not."""
    return [name for name in OFFLINE_SWITCHES[:2] if switch_is_on(env.get(name))]


def judge_offline(env: Mapping[str, str], num_models: int, num_datasets: int) -> Finding:
    """Look at the switches that keep the libraries off the network."""
    on = [name for name in OFFLINE_SWITCHES if switch_is_on(env.get(name))]
    unread = [
        name for name in OFFLINE_SWITCHES if not switch_is_on(env.get(name)) and env.get(name, "0") not in ("", "0")
    ]
    unread = [name for name in unread if env[name].upper() not in ("FALSE", "NO", "OFF")]
    facts = {"on": on, "unread": unread}
    if unread:
        return Finding(
            "hub.offline",
            WARNING,
            f"{unread[0]}={env[unread[0]]} has no effect",
            "Only 1, ON, YES and TRUE switch the network off, so the Hub will be asked.",
            (f"export {unread[0]}=1",),
            facts,
        )
    if not on:
        return Finding("hub.offline", OK, "no offline switch is set", facts=facts)
    return Finding(
        "hub.offline",
        NOTE,
        f"{', '.join(on)} is set: nothing is downloaded",
        f"Only local directories and the cache serve ({num_models} models and {num_datasets} data sets are there); "
        "anything else is an error at once.",
        (f"unset {' '.join(on)}",),
        facts,
    )


def count_cached(cache: Path, kind: str) -> int:
    """Return how many repositories of ``models`` or ``datasets`` have a snapshot in the cache."""
    return sum((entry / "snapshots").is_dir() for entry in cache.glob(f"{kind}--*"))


def judge_cache(cache: Path) -> Finding:
    """Look for downloads that broke off."""
    broken = [path for path in cache.glob("*--*/blobs/*.incomplete") if path.is_file()]
    num_models, num_datasets = count_cached(cache, "models"), count_cached(cache, "datasets")
    size = sum(path.stat().st_size for path in broken)
    facts = {"directory": str(cache), "models": num_models, "datasets": num_datasets, "incomplete": len(broken)}
    if broken:
        names = sorted({path.parent.parent.name.split("--", 1)[1].replace("--", "/") for path in broken})
        return Finding(
            "hub.cache",
            NOTE,
            f"{len(broken)} downloads broke off ({gib(size)}): {', '.join(names[:3])}",
            "The next download goes on where it ended; without a network these files are missing.",
            (f"hf download {names[0]}",),
            facts,
        )
    return Finding("hub.cache", OK, f"{num_models} models and {num_datasets} data sets in the cache", facts=facts)


# ------------------------------------------------------------------------------------------------------------- token


@dataclass(frozen=True)
class Token:
    """A token and where it was found; ``repr`` does not show it."""

    secret: str
    source: str
    """The name of a variable or the path of a file."""
    path: Path | None = None
    other_path: Path | None = None
    """A file with another token, which the variable hides."""

    def __repr__(self) -> str:
        return f"Token(from {self.source})"


def token_path(env: Mapping[str, str]) -> Path:
    """Return where `hf auth login` leaves the token."""
    name = env.get("HF_TOKEN_PATH")
    return Path(os.path.expandvars(name)).expanduser() if name else hub_home(env) / "token"


def read_token_file(env: Mapping[str, str]) -> str:
    """Return the token that `hf auth login` left, or nothing."""
    path = token_path(env)
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def find_token(env: Mapping[str, str]) -> Token | None:
    """Return the token the Hugging Face libraries would use: a variable first, then the file."""
    path = token_path(env)
    for name in _TOKEN_VARIABLES:
        secret = env.get(name, "").strip()
        if secret:
            hides = path.is_file() and os.access(path, os.R_OK) and read_token_file(env) not in ("", secret)
            return Token(secret, name, other_path=path if hides else None)
    secret = read_token_file(env)
    return Token(secret, str(path), path=path) if secret else None


def can_be_token(secret: str) -> bool:
    """Tell whether a text can be a token: no spaces, quotes or placeholders, nothing a header cannot carry."""
    return secret.isascii() and secret.isprintable() and not any(sign in " \"'<>" for sign in secret)


def all_secrets(env: Mapping[str, str]) -> list[str]:
    """Return every value that must not be printed: tokens, what is called a secret, passwords in addresses."""
    found = [value for name, value in env.items() if name.upper().endswith(_SECRET_NAMES)]
    found += [user_info[2:-1] for value in env.values() for user_info in _USER_INFO.findall(value)]
    found += [word for user_info in found if ":" in user_info for word in user_info.split(":", 1)]
    path = token_path(env)
    if path.is_file() and os.access(path, os.R_OK):
        found.append(read_token_file(env))
    return sorted({word for value in found for word in (value, value.strip())}, key=len, reverse=True)


def check_token(env: Mapping[str, str]) -> Finding:
    """Look for the token of this environment."""
    try:
        return judge_token(find_token(env), env)
    except PermissionError:
        path = token_path(env)
        return Finding(
            "hub.token",
            PROBLEM,
            f"the token in {path} cannot be read: no permission",
            "Every download fails, also of public models. It was probably left by root.",
            (f'sudo chown "$(id -un)" {shlex.quote(str(path))}', LOGIN),
            {"source": str(path)},
        )


def judge_token(token: Token | None, env: Mapping[str, str]) -> Finding:
    """Look at whether there is a token and whether it can be one."""
    check, make = "hub.token", f"Make one at {tokens_page(env)}."
    if token is None:
        return Finding(
            check,
            NOTE,
            "no Hugging Face token",
            f"Public models need none. {_GATED} Besides it, ask for access on the model's page. {make}",
            (LOGIN,),
            {"source": None},
        )
    facts = {"source": token.source}
    mend = f"unset {token.source}" if token.path is None else f"rm {shlex.quote(str(token.path))}"
    if not can_be_token(token.secret):
        return Finding(
            check,
            PROBLEM,
            f"the token from {token.source} holds quotes, spaces, angle brackets or other signs no token has",
            f"The Hub refuses it, also for public models. {make}",
            (mend, LOGIN),
            facts,
        )
    if switch_is_on(env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return Finding(
            check,
            WARNING,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN is set, so the token is not sent",
            _GATED,
            ("unset HF_HUB_DISABLE_IMPLICIT_TOKEN",),
            facts,
        )
    if token.path is not None and token.path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return Finding(
            check,
            WARNING,
            f"other users can read the token in {token.path}",
            "Who has the token can do at the Hub what you can.",
            (f"chmod 600 {shlex.quote(str(token.path))}",),
            facts,
        )
    if token.other_path is not None:
        return Finding(
            check,
            NOTE,
            f"{token.source} hides another token in {token.other_path}",
            "The variable wins. If access was granted to the other account, gated models stay closed.",
            (f"unset {token.source}",),
            facts,
        )
    return Finding(check, OK, f"a token from {token.source}", facts=facts)


# ------------------------------------------------------------------------------------------------------------ scopes


@dataclass(frozen=True)
class Answer:
    """What the Hub said: a status and its object, or why there is none."""

    status: int | None
    body: Mapping[str, Any]
    error: str = ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing: the header with the token would be sent along."""


def ask_who_am_i(address: str, secret: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask the Hub whose token this is. The whole question takes at most ``timeout_s``, name look-up included."""
    answers: list[Answer] = []
    # a thread, because looking up a name knows no deadline
    thread = threading.Thread(target=lambda: answers.append(_ask(address, secret, timeout_s)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else Answer(None, {}, f"no answer within {timeout_s:g} s")


def _ask(address: str, secret: str, timeout_s: float) -> Answer:
    request = urllib.request.Request(
        f"{address}/api/whoami-v2", headers={"Authorization": f"Bearer {secret}", "User-Agent": "automodel-doctor"}
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as response:
            body = json.loads(response.read(_LARGEST_ANSWER))
            return Answer(response.status, body if isinstance(body, dict) else {})
    except urllib.error.HTTPError as error:
        return Answer(error.code, {})
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return Answer(None, {}, str(reason) or type(error).__name__)
    except ValueError:  # not JSON: a proxy's page, for example
        return Answer(None, {}, "the answer is not the Hub's")


def sends_in_clear(address: str) -> bool:
    """Tell whether a token would travel unencrypted to another machine."""
    parts = urlsplit(address)
    return parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def check_scopes(token: Token | None, env: Mapping[str, str], allowed: bool) -> Finding:
    """Ask the Hub what the token may do, where that is allowed."""
    check, page = "hub.scopes", tokens_page(env)
    if token is None or not can_be_token(token.secret):
        return Finding(check, OK, "no token, so the Hub was not asked", facts={"asked": False, "role": None})
    off = switched_off_by(env)
    if not allowed or off:
        why = "--offline" if not allowed else " and ".join(off)
        return Finding(
            check,
            NOTE,
            f"what the token may do is unknown: {why} forbids to ask the Hub",
            f"It is listed at {page}. A gated model needs read access to gated repositories, `hf upload` write access.",
            ("automodel doctor",) if not off else (f"env {' '.join(f'-u {name}' for name in off)} automodel doctor",),
            {"asked": False, "role": None},
        )
    address = endpoint(env)
    if sends_in_clear(address):
        return Finding(
            check,
            WARNING,
            "HF_ENDPOINT is not https, so the token was not sent",
            "Everyone on the way could read it. The libraries would send it all the same.",
            ("unset HF_ENDPOINT",),
            {"asked": False, "role": None},
        )
    return judge_scopes(ask_who_am_i(address, token.secret), token, env)


def judge_scopes(answer: Answer, token: Token, env: Mapping[str, str]) -> Finding:
    """Look at the Hub's answer."""
    check, page, address = "hub.scopes", tokens_page(env), shown_endpoint(env)
    facts: dict[str, Any] = {"asked": True, "status": answer.status, "role": None}
    if answer.status == 401:
        remove = f"unset {token.source}" if token.path is None else "hf auth logout"
        return Finding(
            check,
            PROBLEM,
            f"the Hub refuses the token from {token.source} (401)",
            f"It was revoked, has expired or is not complete; every download fails with it. Make another at {page}.",
            (remove, LOGIN),
            facts,
        )
    if answer.status != 200:
        what = f"answers {answer.status}" if answer.status else f"cannot be reached: {answer.error}"
        return Finding(
            check,
            WARNING,
            f"the Hub at {address} {what}",
            "What the token may do is unknown, and downloads will fail. Check the network, HF_ENDPOINT and the proxy; "
            "without a network, use local directories and the switch below.",
            (f"curl -sSI {address}", "export HF_HUB_OFFLINE=1"),
            facts,
        )
    auth = answer.body.get("auth") or {}
    access = auth.get("accessToken") or {}
    role = str(access.get("role") or auth.get("type") or "unknown")
    facts["role"] = role
    if role == "fineGrained":
        return _judge_fine_grained(access.get("fineGrained") or {}, page, facts)
    if role in ("write", "admin"):
        facts.update(can_read_gated=True, can_write=True)
        return Finding(check, OK, "the token may read and write", facts=facts)
    if role == "read":
        facts.update(can_read_gated=True, can_write=False)
        return Finding(
            check,
            NOTE,
            "the token may read, not write",
            "Training needs no more. `hf upload` is refused with 403 Forbidden: it needs a token with *write* access, "
            f"made at {page}.",
            (LOGIN,),
            facts,
        )
    return Finding(check, NOTE, f"the token has the role `{role}`, which the doctor does not know", facts=facts)


def _judge_fine_grained(scopes: Mapping[str, Any], page: str, facts: dict[str, Any]) -> Finding:
    check = "hub.scopes"
    scoped = [permission for scope in scopes.get("scoped") or [] for permission in scope.get("permissions") or []]
    can_write = "repo.write" in [*scoped, *(scopes.get("global") or [])]
    can_read_gated = bool(scopes.get("canReadGatedRepos"))
    facts.update(can_read_gated=can_read_gated, can_write=can_write)
    if not can_read_gated:
        return Finding(
            check,
            WARNING,
            "the token is fine-grained and may not read gated repositories",
            "Models such as Llama and Mixtral answer 403 although access was granted. At "
            f"{page} edit the token: tick read access to public gated repositories.",
            (LOGIN,),
            facts,
        )
    if not can_write:
        return Finding(
            check,
            NOTE,
            "the token is fine-grained, may read gated repositories and not write",
            f"Training needs no more. `hf upload` is refused with 403 Forbidden: it needs write access: {page}",
            (LOGIN,),
            facts,
        )
    return Finding(check, OK, "the token is fine-grained, may read gated repositories and write", facts=facts)


def hub_checks(env: Mapping[str, str], allowed: bool) -> dict[str, Check]:
    """Return the checks of the Hub by name; ``allowed``: the Hub may be asked."""
    cache = hub_cache(env)

    return {
        "hub.offline": lambda: judge_offline(env, count_cached(cache, "models"), count_cached(cache, "datasets")),
        "hub.cache": lambda: judge_cache(cache),
        "hub.token": lambda: check_token(env),
        "hub.scopes": lambda: check_scopes(find_token(env), env, allowed),
    }

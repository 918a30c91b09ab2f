"""An upload to the Hugging Face Hub: a directory with its certificate, and a card that says what it is.

The directory itself is not changed: the card goes up beside its files. Whatever is there already is not sent again, so
the same command goes on where an upload broke off.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError

from nemo_automodel._transformers.model_files import ADAPTER_CONFIG
from nemo_automodel._transformers.model_source import hide_bars_without_terminal, read_json, resolve_source
from nemo_automodel.components.checkpoint.layout import LOSSES_FILE, staging_path
from nemo_automodel.components.export.certificate import CERTIFICATE_FILE, check_certificate
from nemo_automodel.components.export.model_card import model_card, public_name
from nemo_automodel.recipes.export_formats import export
from nemo_automodel.recipes.llm.text_data import model_path_of
from nemo_automodel.recipes.settings import effective_yaml
from nemo_automodel.recipes.trained_model import Source, Wishes, find_source
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.hub_errors import endpoint, explain_push, offline_switch, transport_errors

logger = logging.getLogger(__name__)

README = "README.md"


def push(path: str, repo: str, *, is_public: bool, needs_certificate: bool, run: str | None = None) -> str:
    """Upload the model at ``path`` to ``repo`` and return its address.

    A checkpoint has no certificate of its own: one is made of a copy, which is what goes up. ``run`` is the checkpoint
    that the model came from, for the card of an exported directory.

    Raises:
        UserError: no certificate, a failed one, files that changed since, or whatever the Hub says.
    """
    switch = offline_switch()
    if switch is not None:
        raise UserError(f"{switch} forbids to ask the Hub, so nothing can be uploaded. Unset it.")
    source = _find(path)
    about = source if run is None else find_source(run)
    if not needs_certificate:
        return _push(source.directory, repo, about, _any_certificate(source.directory), is_public)
    if source.checkpoint is None:
        return _push(source.directory, repo, about, check_certificate(source.directory), is_public)
    with _certified_copy(path, source, source.checkpoint) as copy:
        return _push(copy, repo, about, check_certificate(copy), is_public)


def _find(path: str) -> Source:
    """Return what ``path`` means; a GGUF file's directory is no source of an export, but it can go up."""
    directory = Path(path).expanduser()
    is_other_format = (directory / CERTIFICATE_FILE).is_file() and any(directory.glob("*.gguf"))
    return Source(directory, None, None) if is_other_format else find_source(path)


@contextmanager
def _certified_copy(path: str, source: Source, checkpoint: Path) -> Iterator[Path]:
    """Export a checkpoint as it is, with its certificate, to a place beside it that goes away afterwards."""
    work = staging_path(checkpoint.resolve())  # a name that the run's next start cleans away
    copy = work / "model"
    try:
        certificate = export(path, copy, "peft" if source.is_adapter else "hf", Wishes())
        failed = [check for check in certificate.checks if not check.passed] if certificate is not None else []
        if failed:
            raise UserError(
                f"Nothing was sent: an export of `{path}` is not the model that was trained: {failed[0].detail}. Look "
                "at it with `automodel export`, or insist with --no-certificate."
            )
        yield copy
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _push(directory: Path, repo: str, about: Source, certificate: dict[str, Any] | None, is_public: bool) -> str:
    card = write_card(about, directory, repo, certificate)
    hide_bars_without_terminal()
    try:
        return _upload(directory, repo, card, is_public)
    except HFValidationError as error:
        raise UserError(f"`{repo}` is no possible name at the Hub. Write owner/name, or a name alone.") from error
    except transport_errors() as error:
        line = explain_push(repo, error)
        if line is None:
            raise
        raise UserError(line) from error


def _any_certificate(directory: Path) -> dict[str, Any] | None:
    return read_json(directory / CERTIFICATE_FILE) if (directory / CERTIFICATE_FILE).is_file() else None


def _upload(directory: Path, repo: str, card: str, is_public: bool) -> str:
    api = HfApi()  # finds the token itself: HF_TOKEN, or what `hf auth login` left
    name = api.create_repo(repo, private=not is_public, exist_ok=True).repo_id
    has_card = (directory / README).is_file()
    # hidden files are of this machine: caches of tools, marks of file managers
    api.upload_folder(
        repo_id=name, folder_path=directory, commit_message="Upload by automodel push", ignore_patterns=[".*", "*/.*"]
    )
    if not has_card:
        api.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo=README, commit_message="Model card")
    return f"{endpoint()}/{name}"


def write_card(source: Source, directory: Path, repo: str, certificate: dict[str, Any] | None) -> str:
    """Return the model card of ``directory``, with what is known of the run that ``source`` comes from."""
    settings, checkpoint = source.settings, source.checkpoint
    losses = checkpoint / LOSSES_FILE if checkpoint is not None else None
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    base = model_path_of(settings.model) if settings is not None else None
    if base is None and is_adapter:
        base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    return model_card(
        title=repo.rpartition("/")[2],
        config=effective_yaml(settings) if settings is not None else None,
        base=base,
        licence=licence_of(base),
        losses=json.loads(losses.read_text(encoding="utf-8")) if losses is not None and losses.is_file() else None,
        certificate=certificate,
        is_adapter=is_adapter,
    )


def licence_of(base: str | None) -> str | None:
    """Return the licence in the base's own model card, where it can be had."""
    if base is None:
        return None
    local = Path(resolve_source(base)) / README
    try:
        card = ModelCard.load(local if local.is_file() else base) if local.is_file() or public_name(base) else None
    except transport_errors(ValueError) as error:
        logger.info("The licence of %s is not known: its model card cannot be read (%s).", base, type(error).__name__)
        return None
    found = card.data.license if card is not None else None
    return str(found) if found else None

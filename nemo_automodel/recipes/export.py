"""From a checkpoint to what other programs load, with a certificate that it is the model that was trained.

The trained model answers held-out rows (`trained_model`); then the export is written, read back from the disk, and
answers the same rows.

An adapter that was trained on a 4-bit base (QLoRA) can be merged into two bases: the original, or the rounded one that
it saw. The first is the better model where the adapter learned the task alone, the second where it also learned to
undo the rounding; which one it is, the held-out loss says.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
from nemo_automodel._transformers.inference import load_for_inference
from nemo_automodel._transformers.merge import Adapter, MergeReport, fetch_model, merge_adapter, rewrite_model
from nemo_automodel._transformers.model_files import ModelFiles
from nemo_automodel._transformers.model_source import hide_bars_without_terminal, read_json
from nemo_automodel._transformers.packed_base import base_as_packed
from nemo_automodel.components.checkpoint.model_dcp import has_model
from nemo_automodel.components.export.certificate import Certificate, Check, compare, compare_losses
from nemo_automodel.components.export.templates import compare_tokenizers
from nemo_automodel.components.export.weight_files import list_tensors, main_dtype
from nemo_automodel.components.loggers.console import Bar
from nemo_automodel.recipes.trained_model import Source, Trained, Wishes, ask, ask_trained, find_source, open_adapter
from nemo_automodel.shared.dtypes import dtype_name
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.system_errors import system_error


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Give a directory beside ``out`` that becomes ``out`` when everything in it is written.

    Raises:
        UserError: ``out`` is taken, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`{out}` exists and is not empty. Name a new directory with --out, or move it away.")
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        reason = system_error(error)
        if reason is None:
            raise
        raise UserError(
            f"`{out}` cannot be written: {reason.strerror}. Make room there or name another place with --out; nothing "
            "was left of it."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def with_weights(source: Source, out: Path) -> Iterator[Source]:
    """Give a source whose weights are safetensors; those in torch's distributed format are converted for a while."""
    if source.checkpoint is None or not has_model(source.checkpoint):
        yield source
        return
    stored = read_json(source.directory / "config.json").get("dtype")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=out.absolute().parent) as work:
        model, tokenizer = load_for_inference(source.checkpoint, device="cpu", dtype=stored)
        ModelFiles(model, tokenizer).write(Path(work))
        del model
        yield replace(source, directory=Path(work))


def write_whole(
    source: Source, out: Path, wishes: Wishes, adapter: Adapter | None, is_rounded: bool
) -> MergeReport | None:
    """Write the model as a Hugging Face directory: merged, converted, or copied as it is."""
    if adapter is not None:
        base = fetch_model(adapter.base)
        quantization = source.settings.quantization if source.settings is not None else None
        stored_as = None
        if is_rounded and quantization is not None and source.settings is not None:
            stored_as = base_as_packed(
                base, quantization, source.settings.model.get("torch_dtype"), wishes.trust_remote_code
            )
        bar = Bar("Merging", None, is_bytes=True)
        try:
            return merge_adapter(
                adapter,
                base,
                out,
                dtype=wishes.dtype or torch.bfloat16,
                stored_as=stored_as,
                trust_remote_code=wishes.trust_remote_code,
                advance=bar.advance,
            )
        finally:
            bar.close()
    rewrite_model(source.directory, out, wishes.dtype)
    return None


def certify_whole(trained: Trained, certificate: Certificate, read_back: Callable[[], Any], tokenizer: Any) -> None:
    """Let the written model answer, and add what comes out to the certificate."""
    kind = certificate.kind
    exported = ask(read_back, trained.probes)
    certificate.losses[kind] = exported.loss
    certificate.checks += compare(
        trained.answers, exported, trained.base, certificate.dtype, trained.loading.is_bf16, kind
    )
    certificate.checks.append(compare_losses(exported, trained.answers, kind))
    certificate.checks += compare_tokenizers(trained.tokenizer, tokenizer, kind)
    if trained.base is None:
        certificate.notes.append("the base was not compared")


def new_certificate(source: Source, trained: Trained, kind: str, dtype: str) -> Certificate:
    """Return a certificate without checks."""
    return Certificate(
        source=source.name,
        kind=kind,
        dtype=dtype,
        prompts=trained.prompts,
        compute_dtype=dtype_name(trained.loading.dtype),
        losses=dict(trained.losses),
    )


def finish(certificate: Certificate | None, directory: Path) -> None:
    """Write the certificate and print its line."""
    if certificate is not None:
        certificate.write(directory)
        print(certificate.line(), flush=True)


def merge(path: str, out: Path, wishes: Wishes) -> Certificate | None:
    """Merge the adapter at ``path`` into its base and write a Hugging Face directory; None: not certified.

    Raises:
        UserError: anything the user has to mend. A failed certificate is no error here: the caller decides.
    """
    source = find_source(path)
    if not source.is_adapter:
        raise UserError(
            f"`{source.directory}` is no adapter: all its weights are there already. Use it as it is, or "
            "`automodel export`."
        )
    return export_whole(source, out, wishes, "merged")


def export_whole(
    source: Source, out: Path, wishes: Wishes, kind: str = "hf", add: Callable[[Path], None] | None = None
) -> Certificate | None:
    """Write a Hugging Face directory with its certificate; ``add`` writes more into it."""
    hide_bars_without_terminal()
    adapter = open_adapter(source, wishes)
    with new_directory(out) as part, with_weights(source, out) as source:
        trained = ask_trained(source, wishes, adapter) if wishes.is_certified else None
        is_rounded = trained.is_rounded if trained is not None else wishes.merge_into == "rounded"
        if trained is not None:
            print_choice(trained, wishes)
        report = write_whole(source, part, wishes, adapter, is_rounded)
        if add is not None:
            add(part)
        certificate = None
        if trained is not None:
            certificate = new_certificate(source, trained, kind, stored_dtype(part))
            certificate.notes += _notes(report, is_rounded)
            tokenizer = NeMoAutoTokenizer.from_pretrained(str(part), trust_remote_code=wishes.trust_remote_code)
            certify_whole(trained, certificate, lambda: trained.loading.whole(part), tokenizer)
        finish(certificate, part)
    return certificate


def print_choice(trained: Trained, wishes: Wishes) -> None:
    """Print the held-out losses that decide between the two bases of a QLoRA adapter."""
    if len(trained.losses) <= 2:
        return
    for name, loss in trained.losses.items():
        print(f"  held-out loss {loss:.4f}  {name}")
    base = "the rounded base" if trained.is_rounded else "the full base"
    why = "asked for" if wishes.merge_into != "auto" else "the lower held-out loss"
    print(f"merging into {base} ({why})", flush=True)


def _notes(report: MergeReport | None, is_rounded: bool) -> list[str]:
    if report is None:
        return []
    notes = [f"{report.num_updated} weights updated, stored as {report.dtype}"]
    notes += ["merged into the base as it was rounded for training"] * is_rounded
    notes += [f"no longer shared with the embedding: {', '.join(report.untied)}"] * bool(report.untied)
    notes += [f"{report.vocab_size} rows in the embedding, for added tokens"] * (report.vocab_size is not None)
    return notes


def stored_dtype(directory: Path) -> str:
    """Return the dtype of a Hugging Face directory's weights."""
    return dtype_name(main_dtype(list_tensors(directory)))


def refuse_failed(certificate: Certificate | None, out: Path) -> None:
    """Make a failed certificate an error; what was written stays, for looking at.

    Raises:
        UserError: a check failed.
    """
    if certificate is not None and not certificate.passed:
        failed: Check = next(check for check in certificate.checks if not check.passed)
        raise UserError(
            f"`{out}` is not the model that was trained: {failed.detail}. It was kept for looking at, with its "
            "certificate.json; `automodel push` refuses it."
        )

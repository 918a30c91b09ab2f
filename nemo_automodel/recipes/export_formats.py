"""The formats of other programs: GGUF and Ollama, an adapter as it is, vLLM and SGLang."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
from nemo_automodel._transformers.merge import Adapter
from nemo_automodel._transformers.model_files import ADAPTER_WEIGHTS
from nemo_automodel._transformers.model_source import hide_bars_without_terminal, load_config
from nemo_automodel.components.export.certificate import Certificate, Check, compare
from nemo_automodel.components.export.gguf_file import DTYPES, write_gguf
from nemo_automodel.components.export.gguf_tokenizer import read_tokenizer
from nemo_automodel.components.export.ollama import differences, go_template, modelfile, take_apart
from nemo_automodel.components.export.serving import SERVERS, adapter_problems, serve_note
from nemo_automodel.components.export.templates import compare_tokenizers
from nemo_automodel.recipes.export import (
    certify_whole,
    export_whole,
    finish,
    new_certificate,
    new_directory,
    print_choice,
    stored_dtype,
    with_weights,
    write_whole,
)
from nemo_automodel.recipes.trained_model import Source, Wishes, ask, ask_trained, find_source, open_adapter
from nemo_automodel.shared.errors import UserError
from nemo_automodel.shared.imports import require

KINDS = ("hf", "peft", "gguf", "ollama", *SERVERS)
GGUF_FILE = "model-{}.gguf"


def export(path: str, out: Path, kind: str, wishes: Wishes, gguf_type: str = "q8_0") -> Certificate | None:
    """Write the model at ``path`` as ``kind``; None: not certified.

    Raises:
        UserError: anything the user has to mend. A failed certificate is no error here: the caller decides.
    """
    hide_bars_without_terminal()
    source = find_source(path)
    if kind == "peft" and not source.is_adapter:
        raise UserError(f"`{source.directory}` is no adapter, so it cannot be exported as one. Use --to hf.")
    if kind in ("gguf", "ollama"):
        return _gguf(source, out, kind, wishes, gguf_type)
    if source.is_adapter and kind != "hf":
        return _adapter(source, out, kind, wishes)
    note = _whole_note(kind, out) if kind in SERVERS else None
    return export_whole(source, out, wishes, kind, note)


def _whole_note(kind: str, out: Path) -> Callable[[Path], None]:
    return lambda part: _write(part / "SERVE.md", serve_note(kind, out.name, None, None))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- an adapter


def _adapter(source: Source, out: Path, kind: str, wishes: Wishes) -> Certificate | None:
    """Copy an adapter as it is, after checking that the server takes it and that PEFT computes what was trained."""
    adapter = open_adapter(source, wishes)
    assert adapter is not None
    if kind in SERVERS:
        problems = adapter_problems(kind, adapter.config, list_names(source.directory))
        if problems:
            raise UserError(
                f"{kind} does not take the adapter in `{source.directory}`: it {problems[0]}. Merge it with --to hf, "
                "which every server takes."
            )
    with new_directory(out) as part:
        for file in sorted(source.directory.iterdir()):
            if file.is_file():
                shutil.copyfile(file, part / file.name)
        if kind in SERVERS:
            _write(part / "SERVE.md", serve_note(kind, out.name, adapter.base, adapter.config["r"]))
        certificate = None
        if wishes.is_certified:
            certificate = _certify_adapter(source, adapter, part, kind, wishes)
        finish(certificate, part)
    return certificate


def list_names(directory: Path) -> list[str]:
    """Return the names of an adapter's tensors."""
    from safetensors import safe_open

    with safe_open(directory / ADAPTER_WEIGHTS, framework="pt") as tensors:
        return list(tensors.keys())


def _certify_adapter(source: Source, adapter: Adapter, part: Path, kind: str, wishes: Wishes) -> Certificate:
    """Compare with PEFT's own reading of the copied directory, on the base that the adapter was compared on."""
    require("peft", "Comparing the adapter with PEFT's own reading of it")
    trained = ask_trained(source, wishes, adapter, keeps_choice=False)
    copied = Adapter(part, adapter.config, adapter.updates, adapter.base)
    certificate = new_certificate(source, trained, kind, "float32")
    exported = ask(lambda: trained.loading.with_peft(copied), trained.probes)
    certificate.losses[kind] = exported.loss
    certificate.checks += compare(
        trained.answers, exported, trained.base, "float32", trained.loading.is_bf16, f"PEFT's reading of {kind}"
    )
    if (part / "tokenizer_config.json").is_file():
        tokenizer = NeMoAutoTokenizer.from_pretrained(str(part), trust_remote_code=wishes.trust_remote_code)
        certificate.checks += compare_tokenizers(trained.tokenizer, tokenizer, kind)
    return certificate


# ---------------------------------------------------------------------------------------------------------------- GGUF


def _gguf(source: Source, out: Path, kind: str, wishes: Wishes, gguf_type: str) -> Certificate | None:
    """Write one GGUF file, of the merged weights where the source is an adapter."""
    require("gguf", "Writing a GGUF file")
    if wishes.is_certified:
        require("accelerate", "Reading a GGUF file back")
    adapter = open_adapter(source, wishes)
    if adapter is not None and wishes.dtype is None and gguf_type in ("f16", "f32"):
        wishes = replace(wishes, dtype=torch.float32)  # finer than bf16, so the merge must not round to that first
    with new_directory(out) as part, with_weights(source, out) as source:
        trained = ask_trained(source, wishes, adapter) if wishes.is_certified else None
        is_rounded = trained.is_rounded if trained is not None else wishes.merge_into == "rounded"
        if trained is not None:
            print_choice(trained, wishes)
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=out.absolute().parent) as work:
            whole = Path(work)
            write_whole(source, whole, wishes, adapter, is_rounded)
            file = part / GGUF_FILE.format(gguf_type)
            tokenizer = NeMoAutoTokenizer.from_pretrained(str(whole), trust_remote_code=wishes.trust_remote_code)
            config = load_config(str(whole), wishes.trust_remote_code, {}, {})
            ends = _end_tokens(whole)
            write_gguf(whole, config, tokenizer, file, gguf_type, source.name, ends)
            notes = _ollama(part, file, tokenizer, ends) if kind == "ollama" else []
            certificate = None
            if trained is not None:
                dtype = DTYPES[gguf_type] if gguf_type != "f32" else stored_dtype(whole)
                certificate = new_certificate(source, trained, kind, dtype)
                certificate.notes += notes
                # what the file holds is read back; only the shapes of the model come from the directory
                read_back = trained.loading.gguf
                certify_whole(trained, certificate, lambda: read_back(file, whole), read_tokenizer(file))
                if kind == "ollama":
                    certificate.checks.append(_template_check(part, notes))
        finish(certificate, part)
    return certificate


def _end_tokens(directory: Path) -> list[int]:
    if not (directory / "generation_config.json").is_file():
        return []
    ends: Any = GenerationConfig.from_pretrained(directory).eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _ollama(part: Path, file: Path, tokenizer: Any, ends: list[int]) -> list[str]:
    """Write the Modelfile and return what its template cannot do."""
    pieces = take_apart(tokenizer) if tokenizer.chat_template is not None else None
    found = ["the chat template does more than put text around messages"] if pieces is None else []
    if tokenizer.chat_template is None:
        found = ["the model has no chat template, so Ollama gives it the prompt as it is"]
    if pieces is not None:
        found = differences(tokenizer, pieces)
        if any("written differently" in line for line in found):
            pieces = None
    bos = tokenizer.bos_token if read_tokenizer(file)("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    template = "{{ .Prompt }}" if tokenizer.chat_template is None else None
    if pieces is not None:
        template = go_template(pieces, bos)
    stops = tokenizer.convert_ids_to_tokens(list(dict.fromkeys([tokenizer.eos_token_id, *ends])))
    _write(part / "Modelfile", modelfile(file.name, template, stops))
    return [f"Ollama's template: {line}" for line in found]


def _template_check(part: Path, notes: list[str]) -> Check:
    has_template = "\nTEMPLATE " in (part / "Modelfile").read_text(encoding="utf-8")
    detail = "Ollama's template writes conversations the same way" + (f" ({'; '.join(notes)})" if notes else "")
    if not has_template:
        detail = (
            "the chat template does more than a Modelfile can say, so none is written and Ollama picks a template by "
            "its own guess: use --to gguf with a server that reads the file's own template"
        )
    return Check("Modelfile template", has_template, detail)

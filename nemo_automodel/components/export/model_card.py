"""The model card of an upload: what it was made from, how, and how good it is, from the run's own files.

Nothing of this machine gets out: a base or a data set that is a local path is called "a local directory".
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

_DATA_KEYS = ("path_or_dataset_id", "path_or_dataset", "dataset_name", "path")
_SCHEDULE = ("global_batch_size", "max_steps", "num_epochs")


def public_name(name: Any) -> str | None:
    """Return a name that means something elsewhere, None for a path of this machine or nothing."""
    text = str(name) if name else ""
    is_path = text.startswith(("/", ".", "~", "$")) or text.count("/") > 1 or Path(text).expanduser().exists()
    return None if is_path or not text else text


def model_card(
    title: str,
    config: Mapping[str, Any] | None,
    base: str | None,
    licence: str | None,
    losses: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None,
    is_adapter: bool,
) -> str:
    """Return ``README.md``: front matter for the Hub, then data, recipe, metrics, certificate and versions.

    ``config`` is the run's effective configuration, secrets masked; ``losses`` its losses.json.
    """
    config = config or {}
    known_base, data = public_name(base), _data_names(config)
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "tags": ["automodel"]}
    if known_base is not None:
        front["base_model"] = known_base
    if licence is not None:
        front["license"] = licence
    if names := [name for name in data if public_name(name)]:
        front["datasets"] = names
    lines = ["---", *_yaml(front), "---", "", f"# {title}", ""]
    what = "A LoRA adapter for" if is_adapter else "A fine-tuned version of"
    lines += [f"{what} {f'`{known_base}`' if known_base else 'a model in a local directory'}.", ""]
    lines += ["## Data", "", *(f"- {f'`{name}`' if public_name(name) else 'a local data set'}" for name in data)]
    lines += ["- not known"] * (not data) + ["", "## Recipe", "", *_recipe(config), "", "## Metrics", ""]
    lines += [*_metrics(losses, certificate), "", "## Certificate", "", _certificate_line(certificate), ""]
    return "\n".join([*lines, "## Versions", "", _versions(), ""])


def _yaml(values: Mapping[str, Any]) -> list[str]:
    """Write the front matter; JSON's strings are YAML's."""
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return lines


def _data_names(config: Mapping[str, Any]) -> list[str]:
    section = config.get("dataset") or {}
    parts = section.get("mix") or [section]
    found = []
    for part in parts:
        inner = part.get("dataset", part) if isinstance(part, Mapping) else {}
        found += [str(inner[key]) for key in _DATA_KEYS if isinstance(inner, Mapping) and inner.get(key)][:1]
    return found


def _recipe(config: Mapping[str, Any]) -> list[str]:
    if not config:
        return ["Not known."]
    peft, optimizer = config.get("peft") or {}, config.get("optimizer") or {}
    schedule, quantization = config.get("step_scheduler") or {}, config.get("quantization") or {}
    method = "all weights"
    if peft:
        kind = "DoRA" if peft.get("use_dora") else "LoRA"
        base = " on a 4-bit base" if quantization.get("load_in_4bit") else ""
        method = f"{kind}{base}, rank {peft.get('dim', 8)}, alpha {peft.get('alpha', 32)}"
    name = str(optimizer.get("_target_", "")).rpartition(".")[2]
    lines = [f"- method: {method}", f"- optimizer: {name}, learning rate {optimizer.get('lr')}"]
    lines += [f"- {key}: {schedule[key]}" for key in _SCHEDULE if schedule.get(key) is not None]
    packed = (config.get("packed_sequence") or {}).get("packed_sequence_size")
    return lines + [f"- packed to {packed} tokens"] * bool(packed)


def _metrics(losses: Mapping[str, Any] | None, certificate: Mapping[str, Any] | None) -> list[str]:
    lines = [f"- {name} at the last step: {value:.4f}" for name, value in (losses or {}).items() if _is_number(value)]
    held_out = (certificate or {}).get("losses") or {}
    lines += [f"- held-out loss, {name}: {value:.4f}" for name, value in held_out.items() if _is_number(value)]
    return lines or ["Not known."]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value


def _certificate_line(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return "None: nothing shows that these files are what was trained."
    return f"{certificate['line']}. Details and checksums are in `certificate.json`."


def _versions() -> str:
    names = ("nemo-automodel", "torch", "transformers")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])

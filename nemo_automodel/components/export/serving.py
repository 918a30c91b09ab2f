"""What vLLM and SGLang accept as an adapter, by their documentation, and how they are started with it.

The servers check an adapter when it is loaded, hours after the training that made it. Here is the same check at export.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank``; an adapter's rank may be anything up to it."""
SERVERS = ("vllm", "sglang")


def adapter_problems(server: str, config: Mapping[str, Any], tensor_names: Iterable[str]) -> list[str]:
    """Return what ``server`` refuses in an adapter: ``config`` is adapter_config.json, names those of its tensors."""
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"is of type {config.get('peft_type')}, and only LORA is served")
    if config.get("use_dora"):
        found.append("is DoRA, which is not served beside its base")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("has biases, which are not served")
    if config.get("modules_to_save"):
        found.append(f"holds whole modules ({', '.join(config['modules_to_save'])}), which are not served")
    for key in ("rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters"):
        if config.get(key):
            found.append(f"sets `{key}`, which is not read, so it would be served wrongly")
    if config.get("r", 0) > MAX_RANKS[-1]:
        found.append(f"has rank {config['r']}, and {MAX_RANKS[-1]} is the highest")
    names = list(tensor_names)
    strange = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange and not found:
        found.append(f"holds `{strange[0]}`, which is no low-rank factor of a linear layer")
    heads = [name for name in names if ".lm_head." in name or ".embed_tokens." in name]
    if heads:
        found.append("adapts the head or the embedding, which not every version serves")
    return found


def max_lora_rank(rank: int) -> int:
    """Return the smallest ``--max-lora-rank`` that takes ``rank``."""
    return next(value for value in MAX_RANKS if value >= rank)


def serve_lines(server: str, directory: str, base: str | None, rank: int | None) -> str:
    """Return the command that serves a directory: an adapter (with ``base`` and ``rank``) or a whole model."""
    target, name = shlex.quote(base or directory), shlex.quote(f"tuned={directory}")
    if server == "vllm":
        options = "" if rank is None else f" --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-modules {name}"
        return f"vllm serve {target}{options}"
    options = "" if rank is None else f" --enable-lora --max-lora-rank {max_lora_rank(rank)} --lora-paths {name}"
    return f"python -m sglang.launch_server --model-path {target}{options}"


def serve_note(server: str, directory: str, base: str | None, rank: int | None) -> str:
    """Return the text of ``SERVE.md``."""
    what = "This adapter is served beside its base" if rank is not None else "This is an ordinary model directory"
    ask = "tuned" if rank is not None else directory
    return (
        f"# {server}\n\n{what}:\n\n```bash\n{serve_lines(server, directory, base, rank)}\n```\n\n"
        f"Requests name the model `{ask}`. The chat template is the one in this directory"
        f"{' (give it to the server with `--chat-template`)' if rank is not None else ''}.\n"
    )

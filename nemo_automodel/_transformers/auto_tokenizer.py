"""Tokenizers: what Transformers loads, with a pad token always set and BOS and EOS added only when asked.

Padding never reaches the loss, because labels are masked by position and not by token id; so the end-of-text token can
pad without being forgotten.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from nemo_automodel._transformers.model_source import announce_remote_code, code_owner, readable_errors, resolve_source
from nemo_automodel.shared.errors import UserError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json", "*.tiktoken",
)  # fmt: skip


class NeMoAutoTokenizer:
    """Loads the tokenizer of a model."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str,
        force_default: bool = False,
        force_hf: bool = False,
        trust_remote_code: bool = False,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a directory or Hub name, with a pad token.

        ``add_bos_token`` and ``add_eos_token`` make sure that every encoded text starts or ends with the token;
        without them the tokenizer does what its own files say. ``force_default`` and ``force_hf`` are accepted: there
        is one tokenizer class. Further keywords go to Transformers.

        Raises:
            UserError: no such directory or model, no tokenizer in it, a package missing, code not trusted, or neither
                a pad nor an end token.
        """
        name = resolve_source(str(pretrained_model_name_or_path))
        _check_local_tokenizer(Path(name))
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        with readable_errors(name):
            auto_map = _auto_map(get_tokenizer_config(name, **hub))
            if auto_map and trust_remote_code:
                announce_remote_code(name, auto_map)
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
            except ImportError as error:
                raise UserError(
                    f"The tokenizer of `{name}` needs a package that is not installed. Run: pip install sentencepiece "
                    f"tiktoken protobuf ({' '.join(str(error).split())[:120]})"
                ) from error
            except ValueError as error:
                if auto_map and not trust_remote_code:
                    raise UserError(
                        f"The tokenizer of `{name}` needs code of {code_owner(name, auto_map)} to run. If you trust "
                        "that code, set `trust_remote_code: true`."
                    ) from error
                raise UserError(
                    f"`{name}` holds no tokenizer that can be read: {' '.join(str(error).split())[:200]}"
                ) from error
        _ensure_pad_token(tokenizer, name)
        if add_bos_token or add_eos_token:
            _add_border_tokens(tokenizer, add_bos_token, add_eos_token, name)
        return tokenizer


def _check_local_tokenizer(directory: Path) -> None:
    if directory.is_dir() and not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise UserError(
            f"`{directory}` holds no tokenizer (tokenizer.json). Copy it there, or name another one with "
            "`tokenizer.pretrained_model_name_or_path`."
        )


def _auto_map(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    auto_map = tokenizer_config.get("auto_map") or {}
    if not isinstance(auto_map, dict):  # old files list the slow and the fast class
        auto_map = {"AutoTokenizer": auto_map}
    found = auto_map.get("AutoTokenizer")
    references = found if isinstance(found, list | tuple) else [found]
    return {f"AutoTokenizer{i}": ref for i, ref in enumerate(references) if ref}


def _ensure_pad_token(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of `{name}` has neither a pad nor an end token, so rows cannot be padded. "
            "Set one: `--tokenizer.pad_token '<a token of the vocabulary>'`."
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.info(
        "The tokenizer has no pad token; rows are padded with its end token %s. Padding is never learned, "
        "real end tokens are.",
        tokenizer.eos_token,
    )


def _add_border_tokens(tokenizer: PreTrainedTokenizerBase, wants_bos: bool, wants_eos: bool, name: str) -> None:
    """Extend the tokenizer's own post-processing, so that a saved tokenizer still does it."""
    for key, is_wanted, token in (
        ("add_bos_token", wants_bos, tokenizer.bos_token),
        ("add_eos_token", wants_eos, tokenizer.eos_token),
    ):
        if is_wanted and token is None:
            raise UserError(f"`tokenizer.{key}: true`, but the tokenizer of `{name}` has no such token. Leave it out.")
    if not tokenizer.is_fast:
        raise UserError(
            f"`tokenizer.add_bos_token` and `add_eos_token` need a fast tokenizer, and `{name}` has none. "
            "Leave them out."
        )
    probe = tokenizer("a")["input_ids"]
    single, special = "$A", []
    if wants_bos and probe[0] != tokenizer.bos_token_id:
        single, special = f"{tokenizer.bos_token} {single}", [(tokenizer.bos_token, tokenizer.bos_token_id)]
    if wants_eos and probe[-1] != tokenizer.eos_token_id:
        single = f"{single} {tokenizer.eos_token}"
        special.append((tokenizer.eos_token, tokenizer.eos_token_id))
    if not special:
        return
    border = processors.TemplateProcessing(single=single, pair=None, special_tokens=special)
    backend = tokenizer.backend_tokenizer
    own = backend.post_processor
    backend.post_processor = border if own is None else processors.Sequence([own, border])

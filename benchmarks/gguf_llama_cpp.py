"""Do GGUF files answer in llama.cpp as the model does in Transformers? Tokens, log probabilities, chat template.

    python benchmarks/gguf_llama_cpp.py [--model DIRECTORY ...] [--out gguf_llama_cpp.json]

Needs the package ``xllamacpp`` (llama.cpp with Python around it; on the CPU). Tiny random models of every family,
rotary scaling and kind of tokenizer are written as fp32; ``--model`` adds real ones. One line a model: whether all
texts are cut alike, the largest difference among the five likeliest next tokens, and whether the template renders
alike.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.tiny import CHAT_TEMPLATE, CORPUS, make_tokenizer, tiny_config  # noqa: E402
from support.tokenizers_ import sentencepiece_tokenizer, split_tokenizer  # noqa: E402

from nemo_automodel.components.export import gguf_tokenizer  # noqa: E402
from nemo_automodel.components.export.gguf_file import write_gguf  # noqa: E402
from nemo_automodel.components.export.templates import PLAIN  # noqa: E402

TEXTS = [*PLAIN, *CORPUS, "<|im_start|>user\nHi<|im_end|>\n", "it's WE'LL", "def f(x):\n    return x[0]+1\n\n\n  "]
PROMPTS = ("The tower was built in", "Question: Where was the", "user assistant system", "a film of 1889 and")
LIMIT = 0.02
"""Nats. llama.cpp computes attention in fp16 on the CPU."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
TINY = {
    "llama": ("llama", {}, make_tokenizer),
    "llama, biases": ("llama", {"attention_bias": True}, make_tokenizer),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
                      make_tokenizer),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
                  lambda: split_tokenizer(gguf_tokenizer._LLAMA3, ignore_merges=True)),
    "mistral": ("mistral", {}, sentencepiece_tokenizer),
    "mistral, tekken": ("mistral", {}, lambda: split_tokenizer(gguf_tokenizer._TEKKEN)),
    "qwen2": ("qwen2", {}, lambda: split_tokenizer(gguf_tokenizer._QWEN2)),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}, lambda: split_tokenizer(gguf_tokenizer._QWEN2)),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, lambda: split_tokenizer(gguf_tokenizer._QWEN2)),
}  # fmt: skip


def make_tiny(directory: Path, family: str, overrides: dict[str, Any], tokenizer: Any) -> None:
    """Write a tiny random model whose answers are not all alike."""
    torch.manual_seed(0)
    config = tiny_config(family, vocab_size=max(448, len(tokenizer) + 5), **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = (
            parameter.data * 4 if parameter.ndim > 1 else parameter.data + 0.2 * torch.randn_like(parameter)
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def ask(server: Any, path: str, body: dict[str, Any]) -> Any:
    """Ask llama.cpp's server."""
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def compare(directory: Path, file: Path) -> dict[str, Any]:
    """Write the model as GGUF and let both programs answer."""
    import xllamacpp

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    write_gguf(directory, model.config, tokenizer, file, "f32", file.stem)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_gpu_layers, parameters.warmup, parameters.use_jinja = 512, 0, False, True
    server = xllamacpp.Server(parameters)
    cut = [ask(server, "/tokenize", {"content": t, "add_special": True, "parse_special": True}) for t in TEXTS]
    differences = [difference(server, model, tokenizer, prompt) for prompt in PROMPTS]
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {
        "tokens_equal": [c["tokens"] for c in cut] == [tokenizer(text)["input_ids"] for text in TEXTS],
        "largest_difference": max(found for found in differences if found is not None),
        "template_equal": ask(server, "/apply-template", {"messages": messages})["prompt"] == rendered,
    }


def difference(server: Any, model: Any, tokenizer: Any, prompt: str) -> float | None:
    """Return by how much the five likeliest next tokens differ at most; None where the text ends, which is not told."""
    answer = ask(server, "/completion", {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 5})
    if "completion_probabilities" not in answer:
        return None
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    expected = logits.log_softmax(-1)
    top = answer["completion_probabilities"][0]["top_logprobs"]
    return max(abs(float(expected[item["id"]]) - item["logprob"]) for item in top)


def main() -> int:
    """Compare every model and print a table; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as work:
        for number, (name, (family, overrides, make)) in enumerate(TINY.items()):
            directory = Path(work) / str(number)
            make_tiny(directory, family, overrides, make())
            results[name] = compare(directory, Path(work) / f"{number}.gguf")
        for directory in args.model:
            results[directory.name] = compare(directory, Path(work) / "model.gguf")
    for name, found in results.items():
        print(f"{name:<40} tokens {found['tokens_equal']!s:<6} {found['largest_difference']:.5f} nats  "
              f"template {found['template_equal']}")  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    passed = all(
        r["tokens_equal"] and r["template_equal"] and r["largest_difference"] < LIMIT for r in results.values()
    )
    print("all equal" if passed else "DIFFERENT")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Load a model, in 4 bits or as it is, and print by how much the peak of the process's memory grew, in bytes.

Linux keeps the peak of the resident memory and forgets it when asked. Run as a program: ``peak_memory.py DIRECTORY
SMALL_DIRECTORY [plain]``. The small model is loaded first, so that libraries are; they need more memory than it does.
``plain`` leaves the weights as they are and sets a floor under the memory, which has them read in a stream.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components._peft.lora import PeftConfig
from nemo_automodel.components.quantization.config import QuantizationConfig


def load(path: str, is_plain: bool):
    if is_plain:
        peft = PeftConfig(target_modules=["q_proj"], dim=1)
        return NeMoAutoModelForCausalLM.from_pretrained(
            path, device="cpu", torch_dtype="bfloat16", peft_config=peft, memory_floor_gib=0.001
        )
    return NeMoAutoModelForCausalLM.from_pretrained(
        path,
        device="cpu",
        quantization_config=QuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32"),
        peft_config=PeftConfig(target_modules=["q_proj"], dim=1),
    )


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    is_plain = sys.argv[3:] == ["plain"]
    load(sys.argv[2], is_plain)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    model = load(sys.argv[1], is_plain)
    print(status_bytes("VmHWM") - before)

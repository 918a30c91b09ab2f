"""`automodel plan`: what it says, what it returns, and that its advice holds."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from support.recipes import recipe_config

from nemo_automodel.cli.app import main

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a function that writes a recipe beside a model directory that holds a config.json and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(LLAMA_8B))

    def write(**more: object) -> str:
        config = recipe_config("big", "nowhere", tmp_path / "run", model__torch_dtype="auto", **more)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return "run.yaml"

    return write


PEFT = {"target_modules": "*_proj", "dim": 16, "alpha": 32}


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = main(["plan", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_nothing_but_config_json_is_needed(recipe, capsys):
    status, found = plan(capsys, recipe(peft=PEFT), "--seq-len", "4096")
    assert status == 0
    assert found["fits"]
    assert found["weights"] == 8_030_261_248
    assert found["needed_gib"] == pytest.approx(sum(found["memory_gib"].values()), abs=0.05)
    assert found["hours"] == pytest.approx(50 * found["step_s"] / 3600, abs=0.01)


def test_random_weights_need_what_loaded_ones_need(recipe, capsys):
    path = recipe(peft=PEFT)
    loaded = plan(capsys, path, "--seq-len", "4096")
    target = "nemo_automodel.NeMoAutoModelForCausalLM.from_config"
    assert plan(capsys, path, "--model._target_", target, "--seq-len", "4096") == loaded


def test_the_overrides_that_it_names_make_the_run_fit(recipe, capsys):
    path = recipe(peft=PEFT, step_scheduler__local_batch_size=4)
    status, found = plan(capsys, path, "--seq-len", "8192", "--gpu", "rtx4090")
    assert status == 1
    assert not found["fits"]
    overrides = found["overrides_that_fit"]
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value).lower())]
    status, found = plan(capsys, path, *words, "--seq-len", "8192", "--gpu", "rtx4090")
    assert status == 0
    assert found["fits"]


def test_copies_in_8_bits_are_the_first_to_go(recipe, capsys):
    more = {"optimizer": {"_target_": "adam", "lr": 1e-3}, "model__fast_layers": "auto", "fp8": {"enabled": True}}
    path = recipe(step_scheduler__local_batch_size=1, **more)
    status, found = plan(capsys, path, "--seq-len", "4096", "--gpu", "h100")
    assert status == 1
    assert found["overrides_that_fit"] == {"fp8.weight_copies": 0}
    status, fitting = plan(capsys, path, "--fp8.weight_copies", "0", "--seq-len", "4096", "--gpu", "h100")
    assert status == 0
    assert found["memory_gib"]["weights"] - fitting["memory_gib"]["weights"] == pytest.approx(6.5, abs=0.05)


def test_a_run_that_nothing_saves_says_so(recipe, capsys):
    assert main(["plan", recipe(), "--gpu", "rtx3090"]) == 1
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert "Nothing nearby fits. Take a smaller model, shorter rows, or a larger GPU." in out


def test_unified_memory_counts_the_process(recipe, capsys):
    _, found = plan(capsys, recipe(peft=PEFT), "--gpu", "gb10")
    assert found["needed_gib"] == pytest.approx(sum(found["memory_gib"].values()) + 4, abs=0.05)
    assert any("scaled from a measured one" in note for note in found["notes"])


def test_on_unified_memory_nothing_is_gained_by_moving_the_embedding_to_the_host(recipe, capsys):
    path = recipe(peft=PEFT)
    _, on_gpu = plan(capsys, path, "--gpu", "gb10")
    _, on_host = plan(capsys, path, "--gpu", "gb10", "--model.embeddings_on_host", "true")
    embedding_gib = 128256 * 4096 * 2 / 2**30
    assert on_host["memory_gib"]["embeddings"] == pytest.approx(
        on_gpu["memory_gib"]["embeddings"] - embedding_gib, abs=0.02
    )
    assert on_host["needed_gib"] == pytest.approx(on_gpu["needed_gib"], abs=0.02)
    # the plan of a GPU with memory of its own does not count it
    _, discrete = plan(capsys, path, "--model.embeddings_on_host", "true")
    assert discrete["needed_gib"] == pytest.approx(on_host["needed_gib"] - embedding_gib - 4, abs=0.02)


def test_on_unified_memory_nothing_is_gained_by_moving_activations_to_the_host(recipe, capsys):
    path = recipe(peft=PEFT, step_scheduler__local_batch_size=1)
    words = ("--seq-len", "65536", "--gpu", "gb10", "--distributed.activation_checkpointing")
    _, recomputed = plan(capsys, path, *words, "full")
    _, offloaded = plan(capsys, path, *words, "full_offload")
    assert offloaded["needed_gib"] >= recomputed["needed_gib"]
    assert offloaded["needed_gib"] == pytest.approx(sum(offloaded["memory_gib"].values()) + 16 + 4, abs=0.05)


def test_on_unified_memory_loading_counts_on_both_sides(recipe, capsys):
    quantization = {"load_in_4bit": True}
    path = recipe(peft=PEFT, quantization=quantization, step_scheduler__local_batch_size=1)
    _, found = plan(capsys, path, "--gpu", "gb10", "--seq-len", "16")
    at_load = found["load_host_gib"] + found["load_device_gib"]
    assert found["needed_gib"] == pytest.approx(max(at_load, sum(found["memory_gib"].values()) + 4), abs=0.05)
    assert found["load_host_gib"] == pytest.approx(4 + 1 / 32, abs=0.01)


def test_an_unknown_gpu_is_one_line(recipe, capsys):
    assert main(["plan", recipe(peft=PEFT), "--gpu", "h10"]) == 2
    assert "`--gpu h10` is not in the table. Did you mean `h100`?" in capsys.readouterr().err


ADAM = {"_target_": "torch.optim.Adam", "lr": 1e-3, "fused": True}


@pytest.mark.parametrize(
    ("batch", "optimizer", "gpu", "expected"),
    [
        (1, ADAM, "a100-40", {"optimizer.in_backward": True, "clip_grad_norm.max_norm": None}),
        (2048, ADAM, "h100", {"optimizer": {"_target_": "adamw8bit", "lr": 1e-3}}),
    ],
)
def test_full_training_that_does_not_fit_is_offered_a_smaller_optimizer(
    recipe, capsys, tmp_path, batch, optimizer, gpu, expected
):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "big" / "config.json").write_text(
        json.dumps({**LLAMA_8B, "num_hidden_layers": 20 if batch == 1 else 47})
    )
    path = recipe(step_scheduler__global_batch_size=batch, step_scheduler__local_batch_size=1, optimizer=optimizer)
    status, found = plan(capsys, path, "--seq-len", "1024", "--gpu", gpu)
    assert status == 1
    overrides = found["overrides_that_fit"]
    policy = overrides.pop("distributed.activation_checkpointing", None)
    assert overrides == expected
    assert main(["plan", path, "--seq-len", "1024", "--gpu", gpu]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("This fits: ")]
    words = shlex.split(line.removeprefix("This fits: "))
    assert (policy is None) == ("--distributed.activation_checkpointing" not in words)
    status, found = plan(capsys, path, *words, "--seq-len", "1024", "--gpu", gpu)
    assert status == 0, "the words can be given back"
    assert found["fits"]


def test_layers_are_planned_as_recorded_in_rows_of_one_length(recipe, capsys):
    """3.6 ms a layer and 12 ms a micro-batch is what the host takes to start them unrecorded."""
    path = recipe(peft=PEFT, step_scheduler__local_batch_size=1)
    words = ("--seq-len", "256", "--packed_sequence.packed_sequence_size")
    _, packed = plan(capsys, path, *words, "256")
    unrecorded = [
        plan(capsys, path, "--seq-len", "256")[1],
        plan(capsys, path, *words, "256", "--model.cuda_graphs", "off")[1],
        plan(capsys, path, *words, "256", "--distributed.activation_checkpointing", "sac1")[1],
    ]
    for found in unrecorded:
        assert found["tokens_per_s"] == pytest.approx(256 / (32 * 3.6e-3 + 12e-3), rel=0.01)
    assert packed["tokens_per_s"] > 2 * unrecorded[0]["tokens_per_s"]


def test_a_long_row_whose_inputs_wait_on_the_host(recipe, capsys):
    """2 bytes · 4096 · 32 layers · 131,072 tokens, beside a peak that tiles keep in bounds."""
    path = recipe(
        peft=PEFT, step_scheduler__local_batch_size=1, distributed={"activation_checkpointing": "full_offload"}
    )
    status, found = plan(capsys, path, "--seq-len", "131072")
    assert status == 0
    assert "The host holds 32.0 GiB of activations, page-locked." in found["notes"]
    assert found["step_host_gib"] == 32 + 4  # and the process
    _, whole = plan(capsys, path, "--distributed.mlp_tile_tokens", "131072", "--seq-len", "131072")
    assert whole["needed_gib"] - found["needed_gib"] > 2 * 14336 * 131072 / 2**30  # gate or up, and more


def test_what_only_fast_layers_keep_is_refused_as_the_run_refuses_it(recipe, capsys):
    path = recipe(peft=PEFT, model__force_hf=True, distributed={"activation_checkpointing": "sac1"})
    assert main(["plan", path]) != 0
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "`distributed.activation_checkpointing: sac1` needs the fast decoder layers, and `force_hf: true`. "
            "Use false, selective or full."
        )
    )

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
    assert found["load_host_gib"] == pytest.approx(4 + 1 / 16, abs=0.01)


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


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that a mistake gives."""
    assert main(["plan", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize(("key", "length"), [("--seq-len", 0), ("--seq-len", -5), ("--dataset.seq_length", -5)])
def test_rows_have_a_token(recipe, capsys, key, length):
    found = error_of(capsys, recipe(peft=PEFT), key, str(length))
    name = key if key == "--seq-len" else key.removeprefix("--")
    assert found == f"`{name}` is {length}, but a row has at least one token. Use a length such as 1024."


IN_FP8 = {"load_in_4bit": True, "compute_in_fp8": True}


@pytest.mark.parametrize(
    ("more", "gpu", "expected"),
    [
        (
            {"fp8": {"enabled": True}},
            "a100-80",
            "`fp8.enabled: true` needs compute capability 8.9, and NVIDIA A100 80 GB has less. Set it to false, or "
            "plan for another GPU.",
        ),
        (
            {"quantization": IN_FP8},
            "rtx3090",
            "`quantization.compute_in_fp8: true` needs compute capability 8.9, and NVIDIA RTX 3090 has less. Set it to "
            "false, or plan for another GPU.",
        ),
        (
            {"quantization": IN_FP8, "model__force_hf": True},
            "h100",
            "`quantization.compute_in_fp8: true` needs the fast decoder layers, and `force_hf: true`. Leave "
            "`compute_in_fp8` out: weights stay in 4 bits and are multiplied in the compute dtype.",
        ),
        (
            {"fp8": {"enabled": True}, "model__dtype": "float32"},
            "h100",
            "`fp8.enabled: true` needs the fast layers, but the weights are float32, not bfloat16. Set it to false.",
        ),
        (
            {"model__fast_layers": "on", "peft": {**PEFT, "use_dora": True, "dropout": 0.1}},
            "h100",
            "`model.fast_layers: on` cannot be: DoRA with dropout is not on the fast path yet. Set it to auto, which "
            "then takes Transformers' layers.",
        ),
        (
            {"model__cuda_graphs": "on", "model__force_hf": True},
            "h100",
            "`model.cuda_graphs: on` records the fast decoder layers, and `force_hf: true`. Set it to auto.",
        ),
    ],
)
def test_what_the_run_would_refuse_is_not_planned(recipe, capsys, more, gpu, expected):
    assert error_of(capsys, recipe(**{"peft": PEFT, **more}), "--gpu", gpu) == expected


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"load_in_8bit": True}, "weights in 8 bits are in layers of bitsandbytes"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"},
            "`quantization.bnb_4bit_compute_dtype` is float16 and the model's dtype bfloat16",
        ),
    ],
)
def test_packed_weights_that_the_fast_layers_cannot_read_are_planned_as_transformers_layers(
    recipe, capsys, quantization, reason
):
    pytest.importorskip("bitsandbytes")
    path = recipe(peft=PEFT)
    _, plain = plan(capsys, path, "--model.force_hf", "true", "--seq-len", "2048")
    _, fast = plan(capsys, path, "--seq-len", "2048")
    words = [word for key, value in quantization.items() for word in (f"--quantization.{key}", str(value).lower())]
    _, found = plan(capsys, path, *words, "--seq-len", "2048")
    assert f"Decoder layers: plain Transformers: {reason}." in found["notes"]
    assert found["memory_gib"]["activations"] == plain["memory_gib"]["activations"]
    assert found["memory_gib"]["activations"] > 1.5 * fast["memory_gib"]["activations"]


def test_files_that_are_packed_already_are_planned_as_they_are(recipe, capsys, tmp_path):
    path = recipe(peft=PEFT)
    packed_here = plan(capsys, path, "--quantization.load_in_4bit", "true")
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    (tmp_path / "big" / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": stored}))
    assert plan(capsys, path) == packed_here
    assert "is stored in 4 bits, where weights cannot be trained" in error_of(capsys, recipe())


def test_rounding_while_weights_learn_is_counted(recipe, capsys):
    """The rounded weights are kept for the way back, and more."""
    pytest.importorskip("torchao")
    path = recipe(step_scheduler__local_batch_size=1, model__num_hidden_layers=2)
    _, plain = plan(capsys, path, "--model.force_hf", "true", "--seq-len", "64")
    _, rounded = plan(capsys, path, "--qat.enabled", "true", "--seq-len", "64")
    num_linear = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert rounded["weights"] == plain["weights"]
    assert rounded["memory_gib"]["activations"] - plain["memory_gib"]["activations"] > 2 * num_linear / 2**30


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 0}, "The model's `hidden_size` is 0, but it must be at least 1."),
        (
            {"num_key_value_heads": 5},
            "The model's `num_attention_heads` is 32, but it must be a multiple of `num_key_value_heads` = 5.",
        ),
        ({"model_type": "t5"}, "`t5` models cannot be loaded with NeMoAutoModelForCausalLM"),
        (
            {"model_type": "bert", "max_position_embeddings": 512, "num_hidden_layers": 1},
            "A micro-batch of 2 × 1,024 tokens of this `bert` model cannot be planned",
        ),
    ],
)
def test_models_that_cannot_be_planned(recipe, capsys, tmp_path, config, expected):
    (tmp_path / "big" / "config.json").write_text(json.dumps({**LLAMA_8B, **config}))
    assert error_of(capsys, recipe()).startswith(expected)


def test_a_size_of_the_wrong_kind(recipe, capsys):
    found = error_of(capsys, recipe(), "--model.hidden_size", "many")
    assert found.startswith("The configuration of `big` is refused: Validation error for field 'hidden_size'")
    assert found.endswith("Correct its config.json, or the key under `model`.")


def test_the_linear_layers_of_gpt2_are_counted(recipe, capsys, tmp_path):
    sizes = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 512}
    (tmp_path / "big" / "config.json").write_text(json.dumps(sizes))
    _, found = plan(capsys, recipe(), "--seq-len", "128")
    layer = 64 * 192 + 192 + 64 * 64 + 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64
    assert found["weights"] == 512 * 64 + 128 * 64 + 2 * layer + 2 * 64


def test_a_model_without_attention(recipe, capsys, tmp_path):
    sizes = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
    (tmp_path / "big" / "config.json").write_text(json.dumps(sizes))
    assert error_of(capsys, recipe()).startswith("`mamba` models cannot be planned: no attention is what they are made")

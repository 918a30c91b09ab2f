"""`memory: auto`: the fastest policy whose plan fits what is free, said in one line and kept for a resume."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.recipes import recipe_config, set_up_recipe

from nemo_automodel._transformers.recompute import known_policies
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.plan.machines import GIB, MACHINES
from nemo_automodel.recipes import memory_choice
from nemo_automodel.recipes.llm.benchmark import as_benchmark
from nemo_automodel.recipes.memory_advice import MemoryAdvice, Misfit
from nemo_automodel.recipes.memory_choice import choose_policy, pick, reason_of
from nemo_automodel.recipes.memory_record import MemoryRecord
from nemo_automodel.recipes.plan import plan_policies, plan_run
from nemo_automodel.recipes.settings import load_settings
from nemo_automodel.shared.errors import ConfigError, UserError
from nemo_automodel.shared.memory import Memory

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
DOCS = Path(__file__).resolve().parents[2] / "docs"
CUDA = torch.device("cuda")


@pytest.fixture
def config_of(tmp_path, monkeypatch):
    """Return a function that makes a LoRA configuration of an 8B model, micro-batches of 2 × 4096."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(LLAMA_8B))

    def make(**more: object) -> ConfigNode:
        peft = {"target_modules": "*_proj", "dim": 16, "alpha": 32}
        values = {"peft": peft, "model__torch_dtype": "auto", "memory": "auto", **more}
        packed = {"packed_sequence": {"packed_sequence_size": 4096}}
        return ConfigNode(recipe_config("big", "nowhere", tmp_path / "run", **packed, **values))

    return make


def card(gib: float):
    return replace(MACHINES["h100"], name="card", memory_gib=gib, reserve_gib=0)


def with_policy(config: ConfigNode, policy: str):
    """Return what `automodel plan` says under a policy."""
    config = config.copy()
    config.set_by_dotted("distributed.activation_checkpointing", False if policy == "none" else policy)
    return plan_run(config, MACHINES["h100"])


def needed_gib(config: ConfigNode, policy: str) -> float:
    return with_policy(config, policy).needed_bytes / GIB


def least_gib(config: ConfigNode) -> float:
    return min(needed_gib(config, policy) for policy in known_policies(is_fast=True))


def test_the_fastest_that_fits_is_picked_and_the_plan_is_that_of_automodel_plan(config_of):
    config = config_of()
    plans = {policy: with_policy(config, policy) for policy in known_policies(is_fast=True)}
    needed = {policy: plan.needed_bytes / GIB for policy, plan in plans.items()}
    assert needed["none"] > needed["selective"] > needed["full"]
    settings, found = load_settings(config), set()
    for free in (*(gib + 0.01 for gib in needed.values()), 1000):
        fitting = [plan for policy, plan in plans.items() if needed[policy] <= free]
        fastest = max(fitting, key=lambda plan: plan.speed.tokens_per_s)
        chosen = pick(plan_policies(settings, card(free)))
        assert chosen.load.recompute == fastest.load.recompute
        assert chosen.needed_bytes == fastest.needed_bytes
        found.add(chosen.load.recompute)
    assert found >= {"none", "selective", "full"}


def test_the_line_says_what_was_chosen_and_why(config_of):
    config = config_of()
    none, selective = (needed_gib(config, policy) for policy in ("none", "selective"))
    free = none - 0.1
    plans = plan_policies(load_settings(config), card(free))
    assert reason_of(pick(plans), plans) == (
        f"recomputed: selective, which needs {selective:.2f} of {free:.2f} GiB free for micro-batches of 2 × 4,096 "
        f"tokens by the plan; faster ones need more: none {none:.2f}."
    )
    plans = plan_policies(load_settings(config), card(none + 1))
    assert reason_of(pick(plans), plans).endswith(" by the plan, and it is the fastest.")


def test_where_nothing_fits_the_largest_terms_and_what_fits_are_named(config_of):
    config = config_of()
    settings, least = load_settings(config), least_gib(config)
    with pytest.raises(UserError) as error:
        pick(plan_policies(settings, card(least - 0.5)))
    said = str(error.value)
    assert said.startswith(
        "`memory: auto` finds no policy under which micro-batches of 2 × 4,096 tokens fit: the least is "
        f"{least:.2f} GiB (recomputed: full"
    )
    assert f"), and card has {least - 0.5:.2f} free. Most is taken by frozen weights (13." in said
    overrides = said.partition("This fits: ")[2].split()
    changed = config.copy()
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        changed.set_by_dotted(key.removeprefix("--"), json.loads(value))
    assert pick(plan_policies(load_settings(changed), card(least - 0.5))).fits
    with pytest.raises(
        UserError, match=r"Nothing nearby fits\. Take a smaller model, shorter rows, or a larger GPU\.$"
    ):
        pick(plan_policies(settings, card(2)))


def test_the_choice_is_set_recorded_and_kept_by_a_resume(config_of, tmp_path, monkeypatch, caplog):
    config = config_of()
    settings, free = load_settings(config), needed_gib(config, "none") - 0.1
    monkeypatch.setattr(memory_choice, "this_machine", lambda device: card(free))
    record = MemoryRecord(tmp_path / "memory.json", "card")
    with caplog.at_level(logging.INFO):
        chosen = choose_policy(settings, CUDA, record, None)
    assert caplog.text.count("Memory: recomputed: selective, which needs ") == 1
    assert chosen.distributed.recompute_policy() == "selective"
    assert chosen.config is settings.config, "the configuration is what the user wrote"
    saved = json.loads((tmp_path / "memory.json").read_text())
    assert saved["policy"] == "selective"
    assert saved["needed_gib"] == {p: round(needed_gib(config, p), 2) for p in known_policies(is_fast=True)}
    # with more room now, a resumed run still computes as it began
    monkeypatch.setattr(memory_choice, "this_machine", lambda device: card(1000))
    again = choose_policy(settings, CUDA, MemoryRecord._read(tmp_path / "memory.json"), None)
    assert again.distributed.recompute_policy() == "selective"


def room_on_host(monkeypatch, module, gib: float) -> None:
    """Have the host say that ``gib`` may be page-locked: a twentieth stays free."""
    found = Memory(total=20 * GIB, available=int((gib + 1) * GIB), free=0, cached=0)
    monkeypatch.setattr(module, "read_memory", lambda: found)


def test_a_policy_that_the_host_has_no_memory_for_is_left_out(config_of):
    settings = load_settings(config_of())
    needed = {plan.load.recompute: plan.needed_bytes / GIB for plan in plan_policies(settings, card(1000))}
    assert needed["full_offload"] < min(gib for policy, gib in needed.items() if policy != "full_offload")
    inputs = 2 * 4096 * 4096 * 2 * 32 / GIB  # tokens, hidden size, bytes, layers
    assert inputs == 2
    free = needed["full"] + 0.1
    for host_gib, expected in ((None, "full_offload"), (2.0, "full_offload"), (1.9, "full")):
        plans = plan_policies(settings, replace(card(free), host_gib=host_gib))
        offloading = next(plan for plan in plans if plan.load.recompute == "full_offload")
        assert offloading.fits == (expected == "full_offload")
        assert offloading.step_host_gib == 4 + 2
        lean = [plan for plan in plans if plan.load.recompute in ("full", "full_offload")]
        chosen = pick(sorted(lean, key=lambda plan: plan is not offloading))
        assert chosen.load.recompute == expected
    assert reason_of(chosen, [offloading, chosen]).endswith("; faster ones need more: full_offload 2.00 on the host.")


def test_the_host_is_named_where_only_its_memory_is_missing(config_of):
    settings, least = load_settings(config_of()), least_gib(config_of())
    with pytest.raises(UserError) as error:
        pick(plan_policies(settings, replace(card(least + 0.05), host_gib=1.5)))
    said = str(error.value)
    assert "(recomputed: full), and card has " in said
    assert " full_offload would keep 2.00 GiB in the host's memory, where 1.50 can be page-locked. This fits: " in said


@pytest.mark.parametrize(("rescue", "rows", "gib"), [(True, 1, 1.0), (False, 2, 2.0)])
def test_what_was_asked_for_and_the_host_cannot_hold_is_one_line(config_of, monkeypatch, rescue, rows, gib):
    settings = load_settings(
        config_of(memory={"rescue": rescue}, distributed={"activation_checkpointing": "full_offload"})
    )
    room_on_host(monkeypatch, memory_choice, gib)
    assert choose_policy(settings, CUDA, MemoryRecord(), None) is settings
    room_on_host(monkeypatch, memory_choice, 0.5)
    assert choose_policy(settings, torch.device("cpu"), MemoryRecord(), None) is settings
    with pytest.raises(UserError) as error:
        choose_policy(settings, CUDA, MemoryRecord(), None)
    assert str(error.value) == (
        f"`distributed.activation_checkpointing: full_offload` keeps {gib} GiB of layer inputs in the host's memory "
        f"for {rows} × 4,096 tokens, and 0.5 GiB can be page-locked. Use full, sac1 or selective, shorter rows, or a "
        "machine with more memory."
    )
    assert shape_of(f"error: {error.value}") in shape_of((DOCS / "errors.md").read_text(encoding="utf-8"))


def test_without_auto_nothing_is_chosen(config_of):
    settings = load_settings(config_of(memory="fixed"))
    assert choose_policy(settings, CUDA, MemoryRecord(), None) is settings


def test_the_cpu_has_nothing_to_choose(tmp_path, model_dirs, squad_dir, caplog):
    config = recipe_config(model_dirs("llama"), squad_dir, tmp_path / "run", memory="auto", step_scheduler__max_steps=1)
    with caplog.at_level(logging.INFO):
        recipe = set_up_recipe(config, tmp_path / "config.yaml")
    assert "Memory: `memory: auto` has nothing to choose on the cpu; recomputed: none." in caplog.text
    recipe.run_train_validation_loop()
    assert not (tmp_path / "run" / "memory.json").exists()
    # the key is no part of a run's identity: the same run goes on without it
    config["step_scheduler"]["max_steps"] = 2
    del config["memory"]
    assert set_up_recipe(config, tmp_path / "config.yaml").schedule.step == 1


def test_a_record_of_another_machine_does_not_count(tmp_path, caplog):
    MemoryRecord(tmp_path / "memory.json", "NVIDIA H100, 79.2 GiB", "full", {}, {"full": 4096}).write()
    with caplog.at_level(logging.INFO):
        found = MemoryRecord.open(tmp_path, torch.device("cpu"), is_resumed=True)
    assert (found.policy, found.most_positions, found.machine) == (None, {}, "CPU")
    assert "is of another machine (NVIDIA H100, 79.2 GiB), so it does not count." in caplog.text


def test_a_fresh_run_removes_what_another_left(tmp_path):
    MemoryRecord(tmp_path / "memory.json", "CPU", None, {}, {"none": 64}).write()
    assert MemoryRecord.open(tmp_path, torch.device("cpu"), is_resumed=True).most_positions == {"none": 64}
    assert MemoryRecord.open(tmp_path, torch.device("cpu"), is_resumed=False).most_positions == {}
    assert not (tmp_path / "memory.json").exists()


def shape_of(text: str) -> str:
    """Return the text without line breaks, numbers, policies and terms of the plan: those change with the planner."""
    text = re.sub(r"[\d.,]*\d", "N", " ".join(text.split()))
    text = re.sub(r"(recomputed:|more:) \w+", r"\1 P", text)
    return re.sub(r"taken by [a-z, ]+\(N GiB\)(, [a-z, ]+\(N GiB\))*", "taken by T", text)


def test_the_pages_show_what_is_printed(config_of):
    steps = {"step_scheduler__local_batch_size": 8, "step_scheduler__global_batch_size": 32}
    settings = load_settings(config_of(memory="fixed", **steps))
    advice, gpu = MemoryAdvice(settings), "NVIDIA GeForce RTX 4090, 23.5 GiB"
    many = Misfit(8, 4096, "none", "2.00 GiB", "78.2 GiB allocated at the peak, 78.5 reserved, of 79.2")
    one = replace(many, num_rows=1, row_len=262144, policy="full")
    plans = plan_policies(settings, replace(card(least_gib(config_of(**steps)) - 0.5), name=gpu))
    with pytest.raises(UserError) as nothing_fits:
        pick(plans)
    said = [
        advice.on_rescue(many, "none", 4, is_first=True),
        f"error: {advice.last_words(one, rescues=True)}",
        f"error: {advice.updated_already(many)}",
        f"error: {str(nothing_fits.value).partition(' This fits:')[0]}",
    ]
    plans = plan_policies(settings, card(78.0))
    for page, messages in (("errors", said), ("plan", [f"Memory: {reason_of(pick(plans), plans)}"])):
        text = shape_of((DOCS / f"{page}.md").read_text(encoding="utf-8"))
        for message in messages:
            assert shape_of(message) in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ("fixed", True)),
        ("fixed", ("fixed", True)),
        ("auto", ("auto", True)),
        ({"policy": "auto", "rescue": False}, ("auto", False)),
    ],
)
def test_forms_of_the_key(config_of, value, expected):
    found = load_settings(config_of(memory=value)).memory
    assert (found.policy, found.rescue) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("atuo", r"^`memory.policy: atuo` is not known. Did you mean `auto`\? Use fixed or auto.$"),
        (
            True,
            r"^`memory` is `?true`?, but it must be fixed, auto or a mapping such as `\{rescue: false\}`. Change it",
        ),
        ({"rescu": True}, r"`memory.rescu`: .*Did you mean `rescue`\?"),
    ],
)
def test_mistakes(config_of, value, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(config_of(memory=value))


def test_a_policy_beside_auto_is_noticed(config_of):
    notices = load_settings(config_of(distributed={"activation_checkpointing": "full"})).notices
    assert "`distributed.activation_checkpointing` has no effect on a GPU: `memory: auto` chooses there." in notices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"rescue": False}),
        ("auto", {"policy": "auto", "rescue": False}),
        ({"rescue": True}, {"rescue": True}),
    ],
)
def test_a_benchmark_does_not_change_its_batch_unless_asked(config_of, given, expected):
    assert as_benchmark(config_of(memory=given))["memory"].to_dict() == expected

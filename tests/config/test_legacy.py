"""Older forms load as the new ones, and dead keys say that they are."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_automodel.components.config.legacy import translate_legacy
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.shared.errors import ConfigError

NAC = "nemo_automodel.components"
AUTO = "nemo_automodel.NeMoAutoModelForCausalLM"
MOE = f"{NAC}.moe.parallelizer.parallelize_model"

# old form, new form, words of the deprecation line
FORMS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"rng": {"_target_": f"{NAC}.training.rng.StatefulRNG", "seed": 7, "ranked": True}}, {"seed": 7}, "`rng.seed`"),
    (
        {"distributed": {"_target_": f"{NAC}.distributed.fsdp2.FSDP2Manager", "dp_size": "none", "tp_size": 1}},
        {"distributed": {"strategy": "fsdp2", "dp_size": None, "tp_size": 1}},
        "FSDP2Manager",
    ),
    (
        {"distributed": {"_target_": f"{NAC}.distributed.megatron_fsdp.MegatronFSDPManager"}},
        {"distributed": {"strategy": "megatron_fsdp"}},
        "MegatronFSDPManager",
    ),
    (
        {"distributed": {"_target_": f"{NAC}.distributed.ddp.DDPManager", "backend": "gloo", "world_size": 1}},
        {"distributed": {"strategy": "ddp"}, "dist_env": {"backend": "gloo"}},
        "`distributed.backend` → `dist_env.backend`",
    ),
    (
        {"distributed": {"custom_tp_plan": "plan"}},
        {"distributed": {"tp_plan": "plan"}},
        "`distributed.custom_tp_plan` → `distributed.tp_plan`",
    ),
    *(
        (
            {"autopipeline": {"_target_": f"{NAC}.distributed.pipelining.{name}", "pp_schedule": "1f1b"}},
            {"distributed": {"pipeline": {"pp_schedule": "1f1b"}}},
            "`autopipeline` → `distributed.pipeline`",
        )
        for name in ("AutoPipeline", "autopipeline.AutoPipeline", "config.PipelineConfig")
    ),
    *(
        (
            {name: {"_target_": MOE, "activation_checkpointing": True, "wrap_outer_model": False}},
            {"distributed": {"activation_checkpointing": True, "moe": {"wrap_outer_model": False}}},
            f"`{name}` → `distributed.moe`",
        )
        for name in ("parallelizer", "parallelize_fn")
    ),
    (
        {"dataloader": {"dataset": {"_target_": "a.b"}, "shuffle": False}, "validation_dataloader": {"dataset": None}},
        {"dataloader": {"shuffle": False}, "dataset": {"_target_": "a.b"}, "validation_dataloader": {}},
        "`dataloader.dataset` → `dataset`",
    ),
    (
        {"model": {"_target_": f"{NAC}.models.qwen3_moe.model.Qwen3MoeForCausalLM.from_config", "config": "x"}},
        {"model": {"_target_": f"{AUTO}.from_config", "config": "x"}},
        "Qwen3MoeForCausalLM",
    ),
    (
        {"model": {"_target_": f"{NAC}.models.llama.model.build_llama_model", "pretrained_model_name_or_path": "x"}},
        {"model": {"_target_": f"{AUTO}.from_pretrained", "pretrained_model_name_or_path": "x"}},
        "build_llama_model",
    ),
    (
        {"model": {"_target_": f"{NAC}.models.qwen2.build_qwen2_model", "pretrained_model_name_or_path": "x"}},
        {"model": {"_target_": f"{AUTO}.from_pretrained", "pretrained_model_name_or_path": "x"}},
        "build_qwen2_model",
    ),
    (
        {"model": {"_target_": f"{NAC}.models.gpt2.build_gpt2_model", "n_embd": 64, "attn_implementation": "sdpa"}},
        {
            "model": {
                "_target_": f"{AUTO}.from_config",
                "attn_implementation": "sdpa",
                "config": {"_target_": "transformers.GPT2Config", "n_embd": 64},
            }
        },
        "build_gpt2_model",
    ),
    (
        {"model": {"backend": {"_target_": f"{NAC}.moe.utils.BackendConfig", "enable_deepep": True}}},
        {
            "model": {
                "backend": {"_target_": f"{NAC}.models.common.BackendConfig", "dispatcher": "deepep", "experts": "gmm"}
            }
        },
        "`model.backend.enable_deepep`",
    ),
    (
        {"model": {"_target_": f"{AUTO}.from_config"}, "checkpoint": {"load_base_model": True}},
        {"model": {"_target_": f"{AUTO}.from_config", "load_base_model": True}, "checkpoint": {}},
        "`checkpoint.load_base_model` → `model.load_base_model`",
    ),
]


@pytest.mark.parametrize(("old", "new", "words"), FORMS)
def test_old_forms_become_new_ones(old: dict, new: dict, words: str):
    config = ConfigNode(old)
    (line,) = translate_legacy(config)
    assert config.to_dict() == new
    assert words in line
    assert translate_legacy(config) == []


def test_one_line_names_all_forms():
    lines = translate_legacy(
        ConfigNode(
            {
                "rng": {"seed": 1},
                "distributed": {"_target_": f"{NAC}.distributed.fsdp2.FSDP2Manager"},
                "parallelizer": {"_target_": MOE},
            }
        )
    )
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("rng.seed", "FSDP2Manager", "parallelizer"))


def test_the_new_form_wins():
    config = ConfigNode(
        {
            "seed": 5,
            "rng": {"seed": 7},
            "distributed": {
                "_target_": f"{NAC}.distributed.ddp.DDPManager",
                "strategy": "fsdp2",
                "custom_tp_plan": "old",
                "tp_plan": "new",
                "backend": "gloo",
                "activation_checkpointing": False,
                "pipeline": {"pp_schedule": "gpipe"},
            },
            "dist_env": {"backend": "nccl"},
            "autopipeline": {"pp_schedule": "1f1b"},
            "parallelizer": {"_target_": MOE, "activation_checkpointing": True},
            "dataset": {"a": 1},
            "dataloader": {"dataset": {"a": 2}},
        }
    )
    lines = translate_legacy(config)
    assert config.to_dict() == {
        "seed": 5,
        "distributed": {
            "strategy": "fsdp2",
            "tp_plan": "new",
            "activation_checkpointing": False,
            "pipeline": {"pp_schedule": "gpipe"},
        },
        "dist_env": {"backend": "nccl"},
        "dataset": {"a": 1},
        "dataloader": {},
    }
    assert "`rng.seed` has no effect. The top-level `seed` wins." in lines


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"distributed_config": {"_target_": f"{NAC}.distributed.config.FSDP2Config"}}, "distributed_config"),
        ({"autocast": {"enabled": True, "dtype": "bfloat16"}}, "autocast"),
        ({"dist_env": {"init_method": "env://"}}, "dist_env.init_method"),
        ({"rng": {"deterministic": True}}, "rng.deterministic"),
        ({"benchmark": {"num_nodes": 1}}, "benchmark.num_nodes"),
        ({"distributed": {"use_hf_tp_plan": False}}, "distributed.use_hf_tp_plan"),
        ({"distributed": {"check_for_nan_in_grad": True}}, "distributed.check_for_nan_in_grad"),
        ({"packed_sequence": {"split_across_pack": False}}, "packed_sequence.split_across_pack"),
        ({"wandb": {"save_dir": "x"}}, "wandb.save_dir"),
        ({"checkpoint": {"load_base_model": False}, "model": {}}, "checkpoint.load_base_model"),
        ({"parallelizer": {"_target_": "nemo_automodel.other.parallelize"}}, "parallelizer"),
        ({"autopipeline": {"_target_": "nemo_automodel.other.Pipeline"}}, "autopipeline"),
    ],
)
def test_dead_keys_warn_once_and_go(config: dict, key: str):
    node = ConfigNode(config)
    (line,) = translate_legacy(node)
    assert line.startswith(f"`{key}` has no effect.")
    assert not any(section for section in node.to_dict().values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rng": {"sede": 1}}, "`rng.sede`: unknown key `sede`. Did you mean `seed`?"),
        ({"distributed": {"_target_": f"{NAC}.distributed.fsdp2.FSDP3Manager"}}, "Did you mean `FSDP2Manager`"),
        ({"distributed": {"_target_": "torch.nn.Linear"}}, "is not known"),
    ],
)
def test_old_forms_that_cannot_be_read(config: dict, words: str):
    with pytest.raises(ConfigError) as caught:
        translate_legacy(ConfigNode(config))
    assert words in str(caught.value)

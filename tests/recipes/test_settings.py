"""From a configuration to frozen settings."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import recipe_config

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.section_rules import DTYPE_NAMES
from nemo_automodel.recipes.settings import RunSettings, effective_yaml, load_settings
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError

NAC = "nemo_automodel.components"
BASE: dict[str, Any] = {
    "model": {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "some/model",
    },
    "dataset": {"_target_": f"{NAC}.datasets.llm.squad.make_squad_dataset", "split": "train"},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": "1e-4"},
}


def config_of(**sections: Any) -> ConfigNode:
    """Return the base configuration with ``a__b=value`` set at ``a.b``."""
    config = ConfigNode(copy.deepcopy(BASE))
    for key, value in sections.items():
        config.set_by_dotted(key.replace("__", "."), value)
    return config


def settings_of(**sections: Any) -> RunSettings:
    return load_settings(config_of(**sections))


def test_defaults():
    settings = settings_of()
    assert (settings.seed, settings.max_grad_norm, settings.recipe) == (42, 1.0, None)
    assert (settings.step_scheduler.global_batch_size, settings.step_scheduler.num_epochs) == (32, 10)
    assert settings.loss_fn.to_dict() == {"_target_": f"{NAC}.loss.masked_ce.MaskedCrossEntropy"}
    assert settings.optimizer.to_dict() == {"_target_": "torch.optim.AdamW", "lr": 1e-4}
    assert settings.checkpoint_dir_is_default
    assert settings.checkpoint.checkpoint_dir == "checkpoints/"
    assert settings.validation_datasets == {}
    assert settings.notices == []
    off = ("tokenizer", "peft", "quantization", "lr_scheduler", "wandb", "mlflow", "tensorboard")
    assert all(getattr(settings, name) is None for name in off)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


def test_the_callers_configuration_is_left_alone():
    config = config_of(rng__seed=5, wandb__enable=False)
    before = config.to_dict()
    first, second = load_settings(config), load_settings(config)
    assert config.to_dict() == before
    assert first.notices == second.notices != []
    assert first.config == second.config


@pytest.mark.parametrize(
    ("sections", "seed"),
    [
        ({}, 42),
        ({"seed": 7}, 7),
        ({"rng__seed": 8}, 8),
        ({"seed": 7, "rng__seed": 8}, 7),
        ({"rng": {"ranked": True}}, 42),
    ],
)
def test_seed(sections: dict, seed: int):
    assert settings_of(**sections).seed == seed


@pytest.mark.parametrize(
    ("sections", "norm"),
    [
        ({}, 1.0),
        ({"clip_grad_norm": {}}, 1.0),
        ({"clip_grad_norm__max_norm": 0.5}, 0.5),
        ({"clip_grad_norm__max_norm": 0}, None),
        ({"clip_grad_norm__max_norm": "none"}, None),
        ({"clip_grad_norm__max_norm": None}, None),
    ],
)
def test_clipping(sections: dict, norm: float | None):
    assert settings_of(**sections).max_grad_norm == norm


def test_validation_sets_by_name():
    node = {"_target_": f"{NAC}.datasets.llm.squad.make_squad_dataset", "split": "validation"}
    config = config_of(
        validation_dataset=node,
        validation_dataset_math=node,
        **{"validation_dataset-code_x": node},
        validation_datasetx=1,
    )
    config.remove("validation_datasetx")
    config["validation_dataset.chat"] = node
    config["validation_dataset_off"] = "none"
    assert list(load_settings(config).validation_datasets) == ["default", "math", "code_x", "chat"]
    config["validation_dataset_chat"] = node
    with pytest.raises(ConfigError, match="two validation sets named `chat`"):
        load_settings(config)


def test_the_best_metric_names_a_validation_set():
    node = {"_target_": f"{NAC}.datasets.llm.squad.make_squad_dataset"}
    settings = settings_of(validation_dataset_math=node, checkpoint__best_metric_key="math")
    assert settings.checkpoint.best_metric_key == "math"
    with pytest.raises(ConfigError, match=r"`checkpoint\.best_metric_key: mth` names no validation set. Known: math"):
        settings_of(validation_dataset_math=node, checkpoint__best_metric_key="mth")


@pytest.mark.parametrize("key", ["validation_dataset_", "validation_dataset_a/b", "validation_dataset_../x"])
def test_names_no_file_can_carry(key: str):
    config = config_of()
    config[key] = BASE["dataset"]
    with pytest.raises(ConfigError, match="cannot name a validation set"):
        load_settings(config)


def test_optimizers_by_short_name():
    assert settings_of(optimizer___target_="adam").optimizer.get("_target_") == "torch.optim.Adam"
    assert settings_of(optimizer___target_="adamw").optimizer.get("_target_") == "torch.optim.AdamW"
    overrides = [{"pattern": "lm_head", "lr_mult": 0.1}]
    assert settings_of(optimizer__param_group_overrides=overrides).optimizer.to_dict() == {
        "_target_": "torch.optim.AdamW",
        "lr": 1e-4,
        "param_group_overrides": overrides,
    }


def test_open_places_stay_open():
    settings = settings_of(
        model__rope_scaling={"rope_type": "linear", "factor": 2},
        model__text_config__use_cache=False,
        wandb={"project": "p", "mode": "offline", "dir": "x"},
        ci={"anything": {"at": ["all"]}},
        _parked={"_target_": "torch.optim.SGD", "bogus": 1},
    )
    assert settings.model.rope_scaling.factor == 2
    assert settings.wandb.init_kwargs == {"mode": "offline", "dir": "x"}


def test_enable_switches_sections():
    assert settings_of(wandb={"enable": False, "project": "p"}).wandb is None
    assert settings_of(wandb={"enable": True, "project": "p"}).wandb.project == "p"
    assert "wandb" not in effective_yaml(settings_of(wandb={"enable": False}))
    assert effective_yaml(settings_of(wandb={"enable": True, "project": "p"}))["wandb"] == {"project": "p"}
    assert settings_of(tensorboard__enable=True).tensorboard.log_dir is None


def test_short_forms_are_written_out():
    settings = settings_of(
        loss_fn=f"{NAC}.loss.chunked_ce.ChunkedCrossEntropy",
        tokenizer={"pretrained_model_name_or_path": "x"},
        dataset__tokenizer={"pretrained_model_name_or_path": "y"},
        peft={"dim": 4},
        checkpoint__save_consolidated=True,
        sdpa_method=["math"],
        optimizer___target_="adamw",
    )
    saved = effective_yaml(settings)
    tokenizer = "nemo_automodel.NeMoAutoTokenizer.from_pretrained"
    assert saved["loss_fn"] == {"_target_": f"{NAC}.loss.chunked_ce.ChunkedCrossEntropy"}
    assert saved["tokenizer"]["_target_"] == saved["dataset"]["tokenizer"]["_target_"] == tokenizer
    assert saved["peft"] == {"dim": 4, "_target_": f"{NAC}._peft.lora.PeftConfig"}
    assert saved["checkpoint"]["save_consolidated"] == settings.checkpoint.save_consolidated == "every"
    assert saved["model"]["sdpa_method"] == ["math"]
    again = load_settings(ConfigNode(yaml.safe_load(yaml.safe_dump(saved))))
    assert effective_yaml(again) == saved


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"distributed__mp_policy": {"param_dtype": "bf16"}}, "`distributed.mp_policy` has no effect on one process"),
        ({"distributed__pipeline": {"pp_schedule": "1f1b"}}, "`distributed.pipeline` has no effect at pp_size 1"),
        ({"distributed__sequence_parallel": True}, "`distributed.sequence_parallel: true` has no effect"),
        ({"model__backend__rope_fusion": True}, "`model.backend.rope_fusion: true` has no effect"),
        ({"nvtx": True}, "`nvtx: true` has no effect yet"),
        ({"peft": {"dim": 4}, "checkpoint__model_save_format": "torch_save"}, "adapters are safetensors"),
        ({"packed_sequence__split_across_pack": False}, "`packed_sequence.split_across_pack` has no effect"),
    ],
)
def test_notices(sections: dict, words: str):
    (notice,) = settings_of(**sections).notices
    assert words in notice


@pytest.mark.parametrize(
    "sections",
    [
        {"nvtx": False, "longalign": False, "neftune": None, "prewarm": None, "offload_teacher_model": False},
        {"moe_metrics": {"enabled": False}, "fp8": {"enabled": False}, "qat": {"enabled": False}},
        {"distributed": None, "packed_sequence": None, "checkpoint": None, "validation_dataloader": "none"},
        {"distributed": {"strategy": "ddp", "dp_size": "none", "ep_size": None, "moe": {"wrap_outer_model": True}}},
        {"distributed": {"strategy": "megatron_fsdp", "zero_dp_strategy": 3}},
        {"checkpoint": {"enabled": False, "save_consolidated": False}},
        {"dataset__tokenizer": {"add_bos_token": True}, "tokenizer": {"trust_remote_code": False}},
        {"dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": None, "collate_fn": "default"}},
        {"freeze_config": {"freeze_vision_tower": True, "freeze_language_model": False}},
        {"quantization": {"load_in_4bit": False, "load_in_8bit": False}},
    ],
)
def test_harmless_values_pass(sections: dict):
    assert settings_of(**sections).notices == []


PEFT = {"_target_": "nemo_automodel.components._peft.lora.PeftConfig", "target_modules": "*_proj"}


def test_a_base_in_8_bits():
    fp8 = settings_of(peft=PEFT, fp8={"enabled": True, "emulate": True, "weight_copies": 1}).fp8
    assert fp8 is not None
    assert (fp8.emulate, fp8.num_copies(False), fp8.recipe_name) == (True, 1, None)
    assert settings_of(peft=PEFT, fp8={"enabled": False}).fp8 is None
    again = settings_of(peft=PEFT, fp8={"enabled": True, "force_recompute_fp8_weight_in_bwd": True}).fp8
    assert again is not None
    assert again.num_copies(False) == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"fp8__recipe_name": "rowise"}, "`fp8.recipe_name: rowise` is not known. Did you mean `rowwise`?"),
        ({"fp8__weight_copies": 3}, "`fp8.weight_copies` is 3, but it must be 0, 1 or 2. Use one of them."),
        ({"model__force_hf": True}, "`fp8.enabled: true` and `model.force_hf: true` exclude each other."),
        ({"model__fast_layers": False}, "`fp8.enabled: true` and `model.fast_layers: off` exclude each other."),
        ({"quantization__load_in_4bit": True}, "`fp8.enabled: true` and `quantization.load_in_4bit: true` exclude"),
        ({"compile__enabled": True}, "`fp8.enabled: true` and `compile.enabled: true` exclude each other."),
        ({"fp8__copies": 1}, "`fp8.copies`: unknown key `copies`."),
        (
            {"fp8__weight_copies": 0},
            "`fp8.weight_copies: 0` keeps no weights in 8 bits, but a base under `peft` has no others. Use 1 or 2.",
        ),
    ],
)
def test_what_a_base_in_8_bits_excludes(sections: dict, message: str):
    with pytest.raises(ConfigError) as refused:
        settings_of(**{"peft": dict(PEFT), "fp8__enabled": True, **sections})
    assert str(refused.value).startswith(message)


def test_all_weights_in_8_bits():
    cases: list[tuple[dict, tuple[int, bool]]] = [
        ({}, (1, False)),
        ({"weight_copies": 0}, (0, False)),
        ({"recipe_name": "rowwise_with_gw_hp", "weight_copies": 2}, (2, False)),
        ({"recipe_name": "rowwise", "force_recompute_fp8_weight_in_bwd": True, "weight_copies": 2}, (1, True)),
        ({"recipe_name": "tensorwise", "force_recompute_fp8_weight_in_bwd": True, "weight_copies": 0}, (0, True)),
    ]
    for keys, wanted in cases:
        settings = settings_of(fp8={"enabled": True, **keys}, model__force_hf=True)
        assert settings.fp8 is not None
        assert (settings.fp8.num_copies(True), settings.fp8.has_weight_grads) == wanted
        assert settings.notices == []


@pytest.mark.parametrize(
    ("qat", "more", "message"),
    [
        (
            {},
            {"peft": PEFT},
            "`qat.enabled: true` and `peft` exclude each other: under adapters the weights that would ",
        ),
        ({"fake_quant_after_n_steps": -1}, {}, "`qat.fake_quant_after_n_steps` is -1, but it cannot be negative. "),
        ({"qat_config": {}, "quantizer": {}}, {}, "`qat.qat_config` and `qat.quantizer` are both set. Leave one of "),
        ({}, {"fp8__enabled": True}, "`fp8.enabled: true` and `qat.enabled: true` exclude each other."),
        ({"groupsize": 32}, {}, "`qat.groupsize`: unknown key `groupsize`."),
    ],
)
def test_what_quantisation_aware_training_excludes(qat: dict, more: dict, message: str):
    with pytest.raises(ConfigError) as refused:
        settings_of(qat={"enabled": True, **qat}, **more)
    assert str(refused.value).startswith(message)


def test_schemes_of_quantisation_aware_training():
    pytest.importorskip("torchao")
    target = "nemo_automodel.components.quantization.qat.QATConfig"
    for keys in ({}, {"qat_config": {"groupsize": 64}}, {"qat_config": {"_target_": target, "precision": "bfloat16"}}):
        found = settings_of(qat={"enabled": True, **keys}).qat
        assert found is not None
        assert found.qat_config["_target_"] == target
    assert settings_of(qat={"enabled": False, "qat_config": {"groupsize": 64}}).qat is None
    for keys, message in (
        ({"group_size": 64}, "`qat.qat_config.group_size`"),
        ({"groupsize": 1}, "`qat.qat_config.groupsize` is 1, but for int8_dynact_int4weight it must be at least 2."),
        ({"precision": "bf61"}, "`qat.qat_config.precision: bf61` is not a dtype."),
    ):
        with pytest.raises(ConfigError) as refused:
            settings_of(qat={"enabled": True, "qat_config": keys})
        assert str(refused.value).startswith(message)


def test_keys_of_fp8_without_effect():
    fp8 = {"enabled": True, "recipe_name": "rowwise_with_gw_hp", "enable_fsdp_float8_all_gather": True}
    assert settings_of(peft=PEFT, fp8=fp8).notices == [
        "`fp8.enable_fsdp_float8_all_gather: true` has no effect on one device.",
        "`fp8.recipe_name: rowwise_with_gw_hp` is rowwise here: a frozen base has no weight gradient.",
    ]


def test_freeze_embeddings_is_honoured():
    assert settings_of(freeze_config={"freeze_embeddings": True}).freeze_embeddings
    assert not settings_of(freeze_config={"freeze_vision_tower": True}).freeze_embeddings


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        *(({f"distributed__{size}_size": 2}, f"distributed.{size}_size") for size in ("tp", "pp", "cp", "ep")),
        ({"distributed__offload_policy": {"_target_": "torch.distributed.fsdp.CPUOffloadPolicy"}}, "offload_policy"),
        ({"checkpoint__model_repo_id": "me/model"}, "checkpoint.model_repo_id"),
        ({"checkpoint__checkpoint_dir": "msc://bucket/x"}, "checkpoint.checkpoint_dir"),
        ({"packed_sequence__pack_size": 1024}, "packed_sequence.pack_size"),
        ({"dataloader__dataloader_type": "single"}, "dataloader.dataloader_type"),
        (
            {
                "dataset": {
                    "_target_": "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset",
                    "path_or_dataset_id": "x",
                    "unshifted": True,
                }
            },
            "dataset.unshifted",
        ),
        ({"freeze_config__freeze_language_model": True}, "freeze_config.freeze_language_model"),
        ({"recipe": "FinetuneRecipeForVLM"}, "FinetuneRecipeForVLM"),
        *(
            ({section: value}, section)
            for section, value in {
                "kd_ratio": 0.5,
                "teacher_model": {"_target_": "torch.nn.Linear"},
                "recipe_args": {"a": 1},
                "comet": {"project_name": "x"},
                "processor": {"a": 1},
                "dllm": {"mode": "mdlm"},
                "flow_matching": {"a": 1},
                "moe_metrics": {"enabled": True},
                "prewarm": {"comm_groups": True},
                "mfu": {"device": "h100"},
                "skypilot": {"cloud": "aws"},
                "slurm": {"nodes": 1},
                "k8s": {"a": 1},
                "nemo_run": {"executor": "local"},
                "mtp": {"a": 1},
                "tool_call_eval": {"a": 1},
                "embedding_row_repair": {"enabled": True},
            }.items()
        ),
    ],
)
def test_features_of_later_versions_are_named(sections: dict, key: str):
    with pytest.raises(NotSupportedYetError) as caught:
        settings_of(**sections)
    assert key in str(caught.value)
    assert "not supported yet" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["dataset.ColumnMappedTextInstructionDataset", "iterable"])
def test_delta_tables_are_refused_with_a_way_out(form: str):
    folder = "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_"
    target = folder + (form if form != "iterable" else "iterable_dataset.ColumnMappedTextInstructionIterableDataset")
    mapping = {"question": "q", "answer": "a"}
    section = {"_target_": target, "path_or_dataset_id": "catalog.schema.table", "column_mapping": mapping}
    with pytest.raises(NotSupportedYetError) as caught:
        settings_of(dataset={**section, "delta_version": 3})
    assert str(caught.value) == (
        "`dataset.delta_version`: Delta tables (Databricks) are not supported yet. Write the table as Parquet "
        "(`spark.table(name).write.parquet(directory)`), name the directory in `dataset.path_or_dataset_id`, and "
        "remove the `delta_` keys."
    )


CENSUS_SECTIONS = """
    dist_env optimizer recipe distributed checkpoint model step_scheduler dataloader dataset loss_fn ci rng
    validation_dataloader validation_dataset packed_sequence seed lr_scheduler peft freeze_config wandb processor
    benchmark compile recipe_args clip_grad_norm data flow_matching fsdp fp8 dllm tokenizer parallelizer
    teacher_model kd_loss_fn kd_ratio inference output vae performance separate_meshes teacher_distributed
    moe_metrics autopipeline nvtx quantization offload_teacher_model temperature autocast dflash skypilot
    _validation_dataloader _validation_dataset ddp distributed_config ema prewarm qat datasets distill_loss
    distill_loss_weight embedding_row_repair infonce_distill_loss longalign mining mse_loss mse_loss_weight
    nce_distill_loss_weight neftune tool_call_eval parallelize_fn mlflow comet tensorboard sdpa_method mfu mtp
    nemo_run slurm k8s teacher_freeze_config
"""


@pytest.mark.parametrize("section", [*CENSUS_SECTIONS.split(), "modle"])
def test_every_section_of_the_interface_is_known(section: str):
    message = ""
    try:
        settings_of(**{section: {"surely_unknown": 1}})
    except (ConfigError, NotSupportedYetError) as error:
        message = str(error)
    assert ("unknown section" in message) == (section == "modle")


def test_dtype_names_agree_with_torch():
    from nemo_automodel.shared.dtypes import parse_dtype

    assert all(parse_dtype(name).is_floating_point for name in DTYPE_NAMES)


def test_secrets_and_placeholders_in_what_is_saved(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NM_KEY", "supersecretvalue")
    settings = settings_of(
        wandb={"project": "p", "api_key": "supersecretvalue", "name": "${NM_KEY}"},
        model__token="${NM_KEY}",
        model__hf_token="supersecretvalue",
    )
    assert settings.model.token == settings.wandb.init_kwargs["api_key"] == "supersecretvalue"
    text = yaml.safe_dump(effective_yaml(settings))
    assert "supersecretvalue" not in text
    assert text.count("${NM_KEY}") == 2


def old_and_new(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the v0.2 and 0.5-dev form of a playbook file, values as in the contract's table."""
    sft = name == "sft"
    lora = name == "lora"
    common: dict[str, Any] = {
        "step_scheduler": {
            "lora": {"global_batch_size": 64, "local_batch_size": 8, "ckpt_every_steps": 1000, "num_epochs": 1},
            "qlora": {"global_batch_size": 32, "local_batch_size": 4, "ckpt_every_steps": 100, "max_steps": 500},
            "sft": {"global_batch_size": 64, "local_batch_size": 2, "ckpt_every_steps": 1000, "num_epochs": 1},
        }[name],
        "rng": {"_target_": f"{NAC}.training.rng.StatefulRNG", "seed": 42 if name == "qlora" else 1111, "ranked": True},
        "model": {**BASE["model"], "torch_dtype": "bfloat16"},
        "loss_fn": {"_target_": f"{NAC}.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {**BASE["dataset"], "dataset_name": "rajpurkar/squad"},
        "packed_sequence": {"packed_sequence_size": 1024 if sft else 0},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": f"{NAC}.datasets.utils.default_collater",
            "shuffle": False,
        },
        "validation_dataset": {**BASE["dataset"], "split": "validation", "limit_dataset_samples": 64},
        "optimizer": {"_target_": "torch.optim.Adam", "betas": [0.9, 0.999], "eps": "1e-8", "lr": 1e-5},
    }
    if not sft:
        common["dist_env"] = {"backend": "nccl", "timeout_minutes": 1}
        common["peft"] = {
            "_target_": f"{NAC}._peft.lora.PeftConfig",
            "target_modules": "*_proj",
            "dim": 8 if lora else 16,
        }
    if name == "qlora":
        common["quantization"] = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    sizes = {"dp_size": "none", "tp_size": 1, "cp_size": 1, "sequence_parallel": False}
    manager = f"{NAC}.distributed.fsdp2.FSDP2Manager"
    old = {**common, "distributed": {"_target_": manager, "dp_replicate_size": 1, **sizes}}
    new = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        **common,
        "distributed": {"strategy": "fsdp2", **sizes},
        "ci": {"recipe_owner": "x"},
    }
    return old, new


@pytest.mark.parametrize("name", ["lora", "qlora", "sft"])
def test_both_generations_of_the_playbook_files_mean_the_same(name: str):
    old, new = (load_settings(ConfigNode(copy.deepcopy(form))) for form in old_and_new(name))
    for field in dataclasses.fields(RunSettings):
        first, second = getattr(old, field.name), getattr(new, field.name)
        if field.name == "distributed":
            assert dataclasses.replace(first, dp_replicate_size=None) == second
        elif field.name not in ("config", "notices", "recipe"):
            assert first == second, field.name
    assert old.seed == (42 if name == "qlora" else 1111)
    assert len(old.notices) == 1
    assert "FSDP2Manager" in old.notices[0]


def test_overrides_beat_the_file_and_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    words = ["-c", str(tmp_path / "run.yaml"), "--optimizer.lr", "3e-4", "--validation_dataset", "none"]
    settings = load_settings(parse_args_and_load_config(argv=[*words, "--clip_grad_norm.max_norm", "none"]))
    assert (settings.optimizer.lr, settings.max_grad_norm, settings.validation_datasets) == (3e-4, None, {})
    saved = effective_yaml(settings)
    assert saved["optimizer"]["lr"] == 3e-4
    again = load_settings(ConfigNode(yaml.safe_load(yaml.safe_dump(saved))))
    assert effective_yaml(again) == saved
    assert again.max_grad_norm is None


@pytest.mark.parametrize("value", ["[mlp]", "{down_proj: 8}"])
def test_words_without_quotes_in_a_list_of_the_command_line(value):
    config = recipe_config("nowhere", "nowhere", "run", fp8={"enabled": True, "filter_fqns": value})
    with pytest.raises(ConfigError) as error:
        load_settings(ConfigNode(config))
    assert str(error.value) == (
        f"`fp8.filter_fqns` is `{value}`, but it must be a list of texts. On the command line put texts inside in "
        """quotes: "['a', 'b']" or "{'a': 1}"."""
    )

"""Rules of the sections that have weights computed in fewer bits while they learn: `fp8` and `qat`."""

from __future__ import annotations

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.components.config.schema import build, check_target, require_mapping
from nemo_automodel.components.quantization.config import FP8Config, QATConfig, QATSettings
from nemo_automodel.recipes.section_rules import check_dtype
from nemo_automodel.shared.errors import ConfigError
from nemo_automodel.shared.imports import is_available, require

QAT_CONFIG = "nemo_automodel.components.quantization.qat.QATConfig"


def check_fp8(fp8: FP8Config, config: ConfigNode, notices: list[str]) -> FP8Config | None:
    """Return the settings of products in 8 bits, None where they are off; note the keys without effect.

    Raises:
        ConfigError: what excludes it.
    """
    if not fp8.enabled:
        return None
    model, is_frozen = config["model"], config.get("peft") is not None
    fp8.num_copies(not is_frozen)  # refuses what a frozen base cannot have
    excluded = {
        "quantization.load_in_4bit: true": config.get("quantization.load_in_4bit") is True,
        "quantization.load_in_8bit: true": config.get("quantization.load_in_8bit") is True,
        "model.force_hf: true": is_frozen and model.get("force_hf") is True,
        "model.fast_layers: off": is_frozen and model.get("fast_layers") in (False, "off"),
        "compile.enabled: true": config.get("compile.enabled") is True,
        "distributed.enable_compile: true": config.get("distributed.enable_compile") is True,
        "qat.enabled: true": config.get("qat.enabled") is True,
    }
    for other, is_there in excluded.items():
        if is_there:
            raise ConfigError(f"`fp8.enabled: true` and `{other}` exclude each other. Leave one of them out.")
    notices += [f"`fp8.{key}: true` has no effect on one device." for key in fp8.inert_keys()]
    if is_frozen and fp8.recipe_name == "rowwise_with_gw_hp":
        notices.append("`fp8.recipe_name: rowwise_with_gw_hp` is rowwise here: a frozen base has no weight gradient.")
    return fp8


def check_qat(config: ConfigNode) -> QATSettings | None:
    """Return the settings of quantisation-aware training, None where it is off; write out what short forms stand for.

    Raises:
        ConfigError: unknown keys, bad values, or adapters.
        UserError: torchao is not installed.
    """
    node = config.get("qat")
    if node is not None:
        require_mapping(node, "qat")
    qat = build(QATSettings, node, "qat")
    if node is None or not qat.enabled:
        return None
    if config.get("peft") is not None:
        raise ConfigError(
            "`qat.enabled: true` and `peft` exclude each other: under adapters the weights that would be rounded do "
            "not learn. Leave one of them out."
        )
    if not is_available("torchao"):
        require("torchao", "`qat.enabled: true`")
    if qat.quantizer is not None:
        require_mapping(qat.quantizer, "qat.quantizer")
        check_target(qat.quantizer)
        return qat
    if qat.qat_config is None:
        node["qat_config"] = {}
    scheme = node["qat_config"]
    require_mapping(scheme, "qat.qat_config")
    if "_target_" not in scheme:
        scheme["_target_"] = QAT_CONFIG
    check_target(scheme)
    if scheme["_target_"] == QAT_CONFIG:
        values = scheme.copy()
        values.remove("_target_")
        for key in ("precision", "scales_precision"):
            check_dtype(values.get(key), f"qat.qat_config.{key}")
        build(QATConfig, values, "qat.qat_config")
    return build(QATSettings, node, "qat")

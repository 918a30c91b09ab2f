"""Known, but not in this version.

A key of the interface that comes later is answered by name, never ignored: a run that drops `kd_ratio` without a word
would train something else than the file says.
"""

from __future__ import annotations

from typing import Any

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.shared.errors import NotSupportedYetError

_LAUNCHERS = ("skypilot", "nemo_run", "slurm", "k8s")

# section → what it belongs to
LATER_SECTIONS: dict[str, str] = {
    **dict.fromkeys(
        ("teacher_model", "kd_ratio", "kd_loss_fn", "temperature", "offload_teacher_model", "separate_meshes"),
        "knowledge distillation",
    ),
    **dict.fromkeys(("teacher_distributed", "teacher_freeze_config"), "knowledge distillation"),
    **dict.fromkeys(("distill_loss", "distill_loss_weight", "mse_loss", "mse_loss_weight"), "distilled embeddings"),
    **dict.fromkeys(("infonce_distill_loss", "nce_distill_loss_weight"), "distilled embeddings"),
    **dict.fromkeys(("recipe_args", "dflash"), "training of draft models"),
    **dict.fromkeys(
        ("data", "flow_matching", "fsdp", "ddp", "performance", "vae", "ema"), "training of diffusion models"
    ),
    **dict.fromkeys(("inference", "output", "datasets"), "generation scripts"),
    "comet": "the Comet tracker",
    "dllm": "diffusion language models",
    "embedding_row_repair": "repair of embedding rows",
    "longalign": "long-sequence batching",
    "mfu": "model FLOPs utilisation",
    "mining": "mining of hard negatives",
    "moe_metrics": "mixture-of-experts metrics",
    "mtp": "multi-token prediction",
    "prewarm": "warming up kernels",
    "processor": "vision-language models",
    "tool_call_eval": "evaluation of tool calls",
    **dict.fromkeys(_LAUNCHERS, "launching on a cluster"),
}

# dotted prefixes of targets that come later
_LATER_TARGETS: dict[str, str] = {
    "nemo_automodel.NeMoAutoDiffusionPipeline": "diffusion models",
    "nemo_automodel.NeMoAutoModelBiEncoder": "retrieval models",
    "nemo_automodel.NeMoAutoModelCrossEncoder": "retrieval models",
    "nemo_automodel.NeMoAutoModelForMultimodalLM": "multimodal models",
    "nemo_automodel.NeMoAutoModelForTextToWaveform": "speech models",
    "nemo_automodel._transformers.retrieval": "retrieval models",
    "nemo_automodel.components.attention": "attention back ends",
    "nemo_automodel.components.datasets.audio": "audio data",
    "nemo_automodel.components.datasets.diffusion": "diffusion data",
    "nemo_automodel.components.datasets.llm": "this data set",
    "nemo_automodel.components.datasets.utils.packed_sequence_thd_collater_vlm": "vision-language data",
    "nemo_automodel.components.datasets.vlm": "vision-language data",
    "nemo_automodel.components.distributed": "splitting a model over devices",
    "nemo_automodel.components.eval": "evaluation",
    "nemo_automodel.components.loss.embedding_distill": "distilled embeddings",
    "nemo_automodel.components.loss.infonce": "retrieval models",
    "nemo_automodel.components.loss.kd_loss": "knowledge distillation",
    "nemo_automodel.components.models": "models of our own",
}
# the targets of a room that is partly here
_LATER_DATASETS = frozenset(
    (
        "BiEncoderCollator",
        "BiEncoderDistillCollator",
        "CrossEncoderCollator",
        "ProcessorMethodCollator",
        "GLUE_MRPC",
        "MegatronPretraining",
        "MockSequenceClassificationDataset",
        "NanogptDataset",
        "RetrievalBiencoderCollator",
        "RetrievalDatasetConfig",
        "build_mock_rollout_dataset",
        "make_retrieval_dataset",
        "make_seq2seq_dataset",
        "prefix_tree_collate_fn",
    )
)

LATER_RECIPES: dict[str, str] = {
    "DiffusionGemmaSFTRecipe": "diffusion language models",
    "DiffusionLMSFTRecipe": "diffusion language models",
    "EmbeddingDistillRecipe": "retrieval models",
    "FinetuneRecipeForMultimodal": "multimodal models",
    "FinetuneRecipeForVLM": "vision-language models",
    "KnowledgeDistillationRecipeForNextTokenPrediction": "knowledge distillation",
    "KnowledgeDistillationRecipeForVLM": "knowledge distillation",
    "PretrainRecipeForMultimodal": "multimodal models",
    "TrainBiEncoderRecipe": "retrieval models",
    "TrainCrossEncoderRecipe": "retrieval models",
    "TrainDFlash2Recipe": "draft models",
    "TrainDFlashRecipe": "draft models",
    "TrainDSparkRecipe": "draft models",
    "TrainDiffusionRecipe": "diffusion models",
    "TrainDominoRecipe": "draft models",
    "TrainEagle1Recipe": "draft models",
    "TrainEagle2Recipe": "draft models",
    "TrainEagle3Recipe": "draft models",
    "TrainFinetuneRecipeForSequenceClassification": "sequence classification",
    "TrainJetSpecRecipe": "draft models",
    "TrainVispecRecipe": "draft models",
    "TrainVispecStage1Recipe": "draft models",
}


def refuse_later_sections(config: ConfigNode) -> None:
    """Refuse sections of later versions; empty, false and disabled ones pass.

    Raises:
        NotSupportedYetError: the first such section.
    """
    for section, topic in LATER_SECTIONS.items():
        if section not in config or _is_off(config[section]):
            continue
        if section in _LAUNCHERS:
            raise NotSupportedYetError(
                f"`{section}`: {topic} is not supported yet. Remove the section and start the run on that machine."
            )
        raise NotSupportedYetError(f"`{section}`: {topic} is not supported yet. Remove the section.")


def _is_off(value: Any) -> bool:
    if isinstance(value, ConfigNode):
        return len(value) == 0 or value.get("enabled") is False
    return value is None or value is False


def refuse_later_target(path: Any, place: str) -> None:
    """Refuse a target that the interface has, but this version has not. Call it when the target is not here.

    Raises:
        NotSupportedYetError: the path is such a target.
    """
    if not isinstance(path, str):
        return
    for prefix, topic in _LATER_TARGETS.items():
        if path != prefix and not path.startswith(f"{prefix}."):
            continue
        if prefix.endswith("datasets.llm") and not _LATER_DATASETS.intersection(path.split(".")):
            continue
        raise NotSupportedYetError(f"`{place}: {path}`: {topic} is not supported yet. Name another target.")


def refuse_later_recipe(name: str) -> None:
    """Refuse a recipe of a later version, given by class name or dotted path.

    Raises:
        NotSupportedYetError: it is one.
    """
    topic = LATER_RECIPES.get(name.rpartition(".")[2])
    if topic is not None:
        raise NotSupportedYetError(
            f"`recipe: {name}`: the recipe for {topic} is not supported yet. "
            "Use TrainFinetuneRecipeForNextTokenPrediction."
        )

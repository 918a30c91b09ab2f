"""Fine-tune a language model: load a recipe, set it up, run it.

    python examples/llm_finetune/finetune.py -c <recipe.yaml> [--section.key value ...]

Recipes lie beside this file. Every `--section.key value` replaces one value of the recipe.
"""

from nemo_automodel.components.config._arg_parser import parse_args_and_load_config, run_safely
from nemo_automodel.recipes.settings import load_settings


def main() -> None:
    """Train as the command line says."""
    cfg = parse_args_and_load_config("examples/llm_finetune/llama3_2/llama3_2_1b_hellaswag.yaml")
    load_settings(cfg)  # a mistake in the recipe is refused here, before PyTorch is imported

    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    recipe = TrainFinetuneRecipeForNextTokenPrediction(cfg)
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    raise SystemExit(run_safely(main))

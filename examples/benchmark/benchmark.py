"""Time a training: load a recipe, set it up, run it with a clock around its later steps.

    python examples/benchmark/benchmark.py -c <recipe.yaml> [--section.key value ...]

Recipes lie beside this file; those of examples/llm_finetune/ can be timed as well. Every `--section.key value` replaces
one value of the recipe.
"""

from nemo_automodel.components.config._arg_parser import parse_args_and_load_config, run_safely
from nemo_automodel.recipes.settings import load_settings


def main() -> None:
    """Time as the command line says."""
    cfg = parse_args_and_load_config("examples/benchmark/smollm2_135m_lora.yaml")
    load_settings(cfg)  # a mistake in the recipe is refused here, before PyTorch is imported

    from nemo_automodel.recipes.llm.benchmark import BenchmarkingRecipeForNextTokenPrediction

    recipe = BenchmarkingRecipeForNextTokenPrediction(cfg)
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    raise SystemExit(run_safely(main))

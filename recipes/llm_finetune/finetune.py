"""A training script to copy and make your own.

    cp recipes/llm_finetune/finetune.py my_custom_training.py
    uv run my_custom_training.py

Run it from the root of the repository. It takes the same command line as examples/llm_finetune/finetune.py:
``-c <recipe.yaml>`` for another recipe, ``--section.key value`` for another value.
"""

from nemo_automodel.components.config._arg_parser import parse_args_and_load_config, run_safely

RECIPE = "examples/llm_finetune/own_data/smollm2_135m_chat_peft.yaml"


def main() -> None:
    """Train as ``RECIPE`` and the command line say."""
    cfg = parse_args_and_load_config(RECIPE)

    # The configuration is a tree that you may edit until the recipe takes it: cfg.set_by_dotted("optimizer.lr", 1e-4).

    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    # To change a step of the set-up, the data or the model say, subclass it and override `build_data` or `build_model`.
    recipe = TrainFinetuneRecipeForNextTokenPrediction(cfg)
    recipe.setup()

    # Everything is built here and nothing is trained yet: recipe.model, recipe.tokenizer, recipe.train_loader,
    # recipe.optimizer.

    recipe.run_train_validation_loop()


if __name__ == "__main__":
    raise SystemExit(run_safely(main))

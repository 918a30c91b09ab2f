"""Recipes by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.recipes.registry import DEFAULT_RECIPE, known_recipes, recipe_path, resolve_recipe
from nemo_automodel.shared.errors import ConfigError, NotSupportedYetError

PATH = f"nemo_automodel.recipes.llm.train_ft.{DEFAULT_RECIPE}"


def test_names_are_found_without_importing_them():
    code = (
        "import sys; from nemo_automodel.recipes.registry import known_recipes; print(known_recipes()); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == repr(known_recipes())
    assert known_recipes()[DEFAULT_RECIPE] == PATH
    assert "BaseRecipe" not in known_recipes()


@pytest.mark.parametrize("name", [DEFAULT_RECIPE, PATH, ConfigNode({"_target_": PATH})])
def test_the_three_spellings(name: str | ConfigNode):
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    assert resolve_recipe(name) is TrainFinetuneRecipeForNextTokenPrediction


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, f"`recipe` is missing.*Known recipes: .*{DEFAULT_RECIPE}"),
        ("TrainFinetuneRecipeForNextTokenPredictoin", f"Did you mean `{DEFAULT_RECIPE}`"),
        (f"{PATH}s", f"Did you mean `{DEFAULT_RECIPE}`"),
        ("Nothing", "Known recipes"),
        ("os.system", "standard library"),
        ("my_package.MyRecipe", "--allow-target my_package"),
        ("mine.py:MyRecipe", "NEMO_ENABLE_USER_MODULES"),
        ("torch.nn.functional.linear", "is no class"),
    ],
)
def test_names_nobody_knows(name: str | None, words: str):
    with pytest.raises(ConfigError, match=words):
        resolve_recipe(name)


@pytest.mark.parametrize(
    "name", ["FinetuneRecipeForVLM", "nemo_automodel.recipes.vlm.finetune.FinetuneRecipeForVLM", "TrainEagle3Recipe"]
)
def test_recipes_of_later_versions(name: str):
    with pytest.raises(NotSupportedYetError, match="not supported yet"):
        recipe_path(name)

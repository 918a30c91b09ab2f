"""Recipes by name.

The classes are found in the source files, so that naming a wrong one costs nothing: only the chosen module is imported.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

from nemo_automodel.components.config import targets
from nemo_automodel.components.config.later import refuse_later_recipe
from nemo_automodel.components.config.loader import ConfigNode
from nemo_automodel.shared.errors import ConfigError, did_you_mean

DEFAULT_RECIPE = "TrainFinetuneRecipeForNextTokenPrediction"
_FOLDER = Path(__file__).parent
_PACKAGE = __name__.rpartition(".")[0]


@functools.cache
def known_recipes() -> dict[str, str]:
    """Return class name → dotted path of every recipe, without importing any."""
    found: dict[str, str] = {}
    for path in sorted(_FOLDER.rglob("*.py")):
        if path.name.startswith("_"):
            continue
        module = ".".join([_PACKAGE, *path.relative_to(_FOLDER).with_suffix("").parts])
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ClassDef) and "Recipe" in statement.name and statement.name != "BaseRecipe":
                found[statement.name] = f"{module}.{statement.name}"
    return found


def recipe_path(name: str | None) -> str:
    """Return the dotted path of a recipe given by class name or dotted path.

    Raises:
        ConfigError: no name, or one nobody knows; the message lists those there are.
        NotSupportedYetError: a recipe of a later version.
    """
    known = known_recipes()
    listed = f"Known recipes: {', '.join(known)}."
    if name is None:
        raise ConfigError(f"`recipe` is missing: the command line needs to know what to run. Add one. {listed}")
    if name in known:
        return known[name]
    if name in known.values():
        return name
    refuse_later_recipe(name)
    if "." not in name or name.startswith(f"{_PACKAGE}."):
        raise ConfigError(f"`recipe: {name}` is not known.{did_you_mean(name.rpartition('.')[2], known)} {listed}")
    targets.check_path(name, "recipe")
    return name


def resolve_recipe(name: str | ConfigNode | None) -> type[Any]:
    """Import a recipe's class: a class name, a dotted path, or a mapping with ``_target_``.

    Raises:
        ConfigError: it is missing, unknown, not allowed, or no class.
        NotSupportedYetError: a recipe of a later version.
    """
    path = recipe_path(name.get("_target_") if isinstance(name, ConfigNode) else name)
    recipe = targets.resolve(path, "recipe")
    if not isinstance(recipe, type):
        raise ConfigError(f"`recipe: {path}` is no class. Name a class with setup() and run_train_validation_loop().")
    return recipe

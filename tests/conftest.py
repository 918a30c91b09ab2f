"""Fixtures shared by all tests. Nothing here reaches a network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # oracles run on the CPU; what a GPU gives is measured in benchmarks/
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep what tests cache away from the user's own cache."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["NEMO_AUTOMODEL_CACHE"] = str(directory)
    return directory


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory):
    """Return a function ``family → directory`` of tiny random models, each written once a session."""
    from support.tiny import make_model_dir

    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str = "llama", chat_template: str | None = None) -> Path:
        key = (family, chat_template)
        if key not in made:
            made[key] = make_model_dir(root / f"{family}_{len(made)}", family, chat_template)
        return made[key]

    return get


@pytest.fixture(scope="session")
def squad_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of SQuAD-shaped rows."""
    from support.tiny import write_squad

    return write_squad(tmp_path_factory.mktemp("squad"))

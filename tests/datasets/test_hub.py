"""The Hub's errors in one line. Only the offline case can be had for real; the others are raised as `datasets` does."""

from __future__ import annotations

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from nemo_automodel.components.datasets import hub
from nemo_automodel.components.datasets.sources import load_rows
from nemo_automodel.shared.errors import UserError


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        load_rows("nobody/no-such-data", "train[:10]")
    assert str(caught.value) == (
        "`nobody/no-such-data` is not a local path, it is not in the cache, and HF_HUB_OFFLINE forbids asking the Hub. "
        "Unset it, load the data set once with a network, or name a local file or directory."
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError(
                "Dataset 'o/d' is a gated dataset on the Hub. You must be authenticated to access it."
            ),
            "gated",
        ),
        (
            DatasetNotFoundError("Dataset 'o/d' is a gated dataset. Visit the dataset page to ask for access."),
            "HF_TOKEN",
        ),
        (DatasetNotFoundError("Dataset 'o/d' doesn't exist on the Hub or cannot be accessed."), "Check the spelling"),
        (
            ValueError("Unknown split \"trian\". Should be one of ['train', 'test']."),
            "Did you mean `train`? Splits there: train, test.",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'ko']\nExample"),
            "Set `name:` to one of: en, ko.",
        ),
        (
            ValueError("BuilderConfig 'koo' not found. Available: ['en', 'ko']"),
            "no configuration `koo`. Did you mean `ko`? Known: en, ko.",
        ),
        (RuntimeError("Dataset scripts are no longer supported, but found d.py"), "code that data brings is not run"),
        (
            ConnectionError("Couldn't reach 'o/d' on the Hub (ConnectError)"),
            "the Hub cannot be reached. Check the network",
        ),
        (OSError("Invalid file"), "`o/d` failed: Invalid file."),
        (OSError(28, "No space left on device"), "`o/d` does not fit on the disk: No space left on device in "),
    ],
)
def test_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str):
    def fail(*args, **kwargs):
        assert "trust_remote_code" not in kwargs
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_refusal", lambda repo, error: None)  # would ask the Hub
    with pytest.raises(UserError) as caught:
        load_rows("o/d", "trian", "koo")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_are_sliced_here(monkeypatch: pytest.MonkeyPatch):
    table = datasets.Dataset.from_list([{"n": i} for i in range(10)])
    asked = []

    def load(repo, config, split, revision):
        asked.append((repo, config, split))
        return table if split else datasets.DatasetDict({"train": table, "test": table})

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows("o/d", "train[8:]+test[:1]", "en")
    assert [row["n"] for row in rows] == [8, 9, 0]
    assert asked == [("o/d", "en", "train"), ("o/d", "en", "test")]
    assert rows.where(0) == "o/d row 9"
    with pytest.raises(UserError, match=r"several splits; name one. Splits there: train, test"):
        load_rows("o/d", None)

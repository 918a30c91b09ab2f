"""A step's update does not depend on how its rows are split: by hand, by rows, by tokens, by length."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recipes import recipe_config, set_up_recipe
from support.tiny import tiny_config

from nemo_automodel.components.datasets.config import DataloaderConfig
from nemo_automodel.components.datasets.loader import build_dataloader
from nemo_automodel.components.datasets.token_budget import TokenBudgetCollater
from nemo_automodel.components.datasets.utils import default_collater
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.engine import EagerEngine, count_label_tokens
from nemo_automodel.shared.errors import ConfigError

ROWS = [
    {
        "input_ids": [5 + (7 * i + 3 * j) % 90 for j in range(length)],
        "labels": [-100 if j < i % 4 else 5 + (11 * i + j) % 90 for j in range(length)],
    }
    for i, length in enumerate([3, 17, 5, 29, 8, 8, 2, 11, 23, 4, 6, 14])
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(vocab_size=96), dtype=torch.float32)


@pytest.fixture(scope="module")
def initial(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def weights_after_a_step(model, initial, batches) -> torch.Tensor:
    model.load_state_dict(initial)
    engine = EagerEngine(model, MaskedCrossEntropy(), torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine.forward_backward(batches, count_label_tokens(batches))
    optimizer.step()
    optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def expected(model, initial):
    return weights_after_a_step(model, initial, [default_collater([row]) for row in ROWS])


@given(order=st.permutations(range(len(ROWS))), cuts=st.sets(st.integers(1, len(ROWS) - 1)))
@settings(deadline=None, max_examples=25)
def test_any_split_of_a_global_batch_gives_the_same_weights(model, initial, expected, order, cuts):
    edges = [0, *sorted(cuts), len(ROWS)]
    batches = [default_collater([ROWS[i] for i in order[a:b]]) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(weights_after_a_step(model, initial, batches), expected, atol=1e-6, rtol=0)


@given(budget=st.integers(1, 400), grouped=st.booleans(), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_any_budget_of_tokens_gives_the_same_weights(model, initial, expected, budget, grouped, seed):
    loader = build_dataloader(
        ROWS,
        DataloaderConfig(group_by_length=grouped),
        local_batch_size=len(ROWS),
        collate_fn=TokenBudgetCollater(default_collater, budget),
        seed=seed,
        is_training=True,
    )
    (batches,) = loader
    torch.testing.assert_close(weights_after_a_step(model, initial, batches), expected, atol=1e-6, rtol=0)


@given(size=st.integers(1, len(ROWS)), grouped=st.booleans())
@settings(deadline=None, max_examples=15)
def test_any_number_of_rows_gives_the_same_weights(model, initial, expected, size, grouped):
    loader = build_dataloader(
        ROWS,
        DataloaderConfig(group_by_length=grouped),
        local_batch_size=size,
        collate_fn=default_collater,
        seed=0,
        is_training=True,
    )
    torch.testing.assert_close(weights_after_a_step(model, initial, list(loader)), expected, atol=1e-6, rtol=0)


# --- from a file -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, model_dirs, squad_dir):
    """Return a function that trains as a file says, and what came of it: losses, validation losses, batch shapes."""

    def run(name: str, **overrides):
        config = recipe_config(
            model_dirs("llama"),
            squad_dir,
            tmp_path / name,
            **{"dataloader": {}, "dataset__split": "train[:18]", "step_scheduler__max_steps": 8, **overrides},
        )
        config["validation_dataset"] = {**config["dataset"], "split": "validation"}
        recipe = set_up_recipe(config, tmp_path / "config.yaml")
        shapes, losses, train_step = [], [], recipe.train_step

        def watch(batches):
            metrics = train_step(batches)
            shapes.append([tuple(batch["input_ids"].shape) for batch in batches])
            losses.append(metrics.loss)
            return metrics

        recipe.train_step = watch
        recipe.run_train_validation_loop()
        return losses, [recipe.validate("default").loss], shapes

    return run


@pytest.mark.parametrize("options", [{}, {"group_by_length": True}, {"num_workers": 1}])
def test_training_by_tokens_equals_training_by_rows(run, options):
    by_rows = run("rows", step_scheduler__local_batch_size=4, dataloader=options)
    by_tokens = run("tokens", step_scheduler__local_batch_tokens=100, dataloader=options)
    assert by_tokens[0] == pytest.approx(by_rows[0], abs=1e-5)
    assert by_tokens[1] == pytest.approx(by_rows[1], abs=1e-5)
    assert [sum(rows for rows, _ in step) for step in by_tokens[2]] == [4, 4, 4, 4, 2, 4, 4, 4]
    assert all(rows * length <= 100 for step in by_tokens[2] for rows, length in step)
    assert {len(step) for step in by_tokens[2]} == {1, 2}, "the short last step of an epoch fits at once"


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_by_tokens_goes_on_where_it_stopped(run, stop):
    options = {"step_scheduler__local_batch_tokens": 70, "step_scheduler__ckpt_every_steps": 1}
    whole = run("whole", lr_scheduler=None, **options)
    first = run("cut", lr_scheduler=None, step_scheduler__max_steps=stop, **options)
    options["step_scheduler__max_steps"] = 8
    second = run("cut", lr_scheduler=None, **{**options})
    assert first[0] + second[0] == whole[0]
    assert first[2] + second[2] == whole[2]
    assert second[1] == whole[1]


def test_packed_rows_fill_a_budget(run):
    packed = {"packed_sequence": {"packed_sequence_size": 128}, "step_scheduler__max_steps": 2}
    by_rows = run("rows", step_scheduler__local_batch_size=2, **packed)
    by_tokens = run("tokens", step_scheduler__local_batch_tokens=300, **packed)
    assert by_tokens[2] == by_rows[2]
    assert by_tokens[2][0] == [(2, 128), (2, 128)]
    assert by_tokens[0] == pytest.approx(by_rows[0], abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"step_scheduler__local_batch_tokens": 0},
            "`step_scheduler.local_batch_tokens` is 0, but it must be at least 1.",
        ),
        (
            {"dataloader__batch_size": 2},
            "`dataloader.batch_size` is 2, but `step_scheduler.local_batch_tokens: 100` decides how many rows a "
            "micro-batch has. Remove one of them.",
        ),
        (
            {"packed_sequence__packed_sequence_size": 128},
            "`step_scheduler.local_batch_tokens` is 100, but a packed row has `packed_sequence.packed_sequence_size` "
            "= 128 tokens. Raise the first to 128 or more.",
        ),
    ],
)
def test_what_does_not_go_with_a_budget(run, overrides, message):
    with pytest.raises(ConfigError) as caught:
        run("run", **{"step_scheduler__local_batch_tokens": 100, **overrides})
    assert str(caught.value) == message

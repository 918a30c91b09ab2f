"""Logic of the kernel table: who decides, what is accepted, what is kept. Times are made up, speed is not tested."""

from __future__ import annotations

import json
import logging
import math

import pytest

from nemo_automodel.components.fast.choices import DEFAULT, Choices
from nemo_automodel.components.fast.config import KERNELS, KernelWishes, parse_kernels
from nemo_automodel.components.fast.dispatch import (
    Candidate,
    Dispatcher,
    Entry,
    KernelCache,
    Question,
    Table,
    UnavailableError,
    default_table,
)
from nemo_automodel.shared.errors import ConfigError, UserError

MACHINE = {"gpu": "Test 9000", "torch": "2.11"}


class Bench:
    """Candidates with known times and errors, and a count of what was timed."""

    def __init__(self, **known: tuple[float, float] | str) -> None:
        self.known = known
        self.timed: list[str] = []

    def question(self, operation: str = "attention", default: str = "cudnn", subject: str = "one") -> Question:
        candidates = {
            name: Candidate(lambda name=name: name, lambda name=name: self.error(name)) for name in self.known
        }
        return Question(operation, subject, default, candidates, tolerance=1e-3)

    def error(self, name: str) -> float:
        if isinstance(self.known[name], str):
            raise UnavailableError(self.known[name])
        return self.known[name][1]

    def measure(self, run) -> float:
        name = run()
        self.timed.append(name)
        return self.known[name][0]


def answer(bench: Bench, wishes: KernelWishes | None = None, cache=None, saved=None, **question) -> Entry:
    return Dispatcher(wishes or KernelWishes(), bench.measure, cache, saved).answer(bench.question(**question))


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"cudnn": (2.0, 0.0), "flash": (1.0, 0.0)}, "flash"),
        ({"cudnn": (1.0, 0.0), "flash": (2.0, 0.0)}, "cudnn"),
        ({"cudnn": (1.0, 0.0), "flash": (0.985, 0.0)}, "cudnn"),  # within the noise the default stays
        ({"cudnn": (1.0, 0.0), "flash": (0.97, 0.0)}, "flash"),
        ({"cudnn": (1.0, 0.0), "flash": (0.1, 1e-2)}, "cudnn"),  # fast and wrong
        ({"cudnn": (1.0, 0.0), "flash": (0.1, math.nan)}, "cudnn"),
        ({"cudnn": (0.1, 1e-2), "flash": (1.0, 0.0)}, "flash"),  # the default is wrong
        ({"cudnn": "no such kernel", "flash": (3.0, 0.0), "efficient": (2.0, 0.0)}, "efficient"),
    ],
)
def test_the_fastest_that_computes_right_is_taken(known, expected):
    entry = answer(Bench(**known))
    assert (entry.implementation, entry.reason) == (expected, "measured now")
    assert entry.trials.keys() == known.keys()


def test_what_is_wrong_or_missing_is_not_timed_and_says_why():
    bench = Bench(cudnn=(1.0, 0.0), flash=(0.1, 0.5), efficient="no such kernel")
    trials = answer(bench).trials
    assert bench.timed == ["cudnn"]
    assert trials["flash"].failure == "error 5.0e-01, accepted 1.0e-03"
    assert trials["efficient"].failure == "no such kernel"


def test_nothing_right_is_an_error():
    with pytest.raises(UserError) as refused:
        answer(Bench(cudnn=(1.0, 0.5), flash="no such kernel"))
    assert str(refused.value) == (
        "No way to compute `attention` gives the right numbers here (cudnn: error 5.0e-01, accepted 1.0e-03; flash: no "
        "such kernel). Set `model.force_hf: true` and tell us what machine this is."
    )


def test_what_is_asked_for_is_taken_though_it_is_slow():
    entry = answer(Bench(cudnn=(1.0, 0.0), flash=(9.0, 0.0)), parse_kernels({"attention": "flash"}))
    assert (entry.implementation, entry.reason) == ("flash", "asked for")
    assert list(entry.trials) == ["flash"]


@pytest.mark.parametrize(
    ("known", "failure"),
    [
        ({"cudnn": (1.0, 0.0), "flash": "no such kernel"}, "no such kernel"),
        ({"cudnn": (1.0, 0.0), "flash": (1.0, 0.5)}, "error 5.0e-01, accepted 1.0e-03"),
        ({"cudnn": (1.0, 0.0)}, "this model does not offer the choice"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_an_error(known, failure):
    with pytest.raises(UserError) as refused:
        answer(Bench(**known), parse_kernels({"attention": "flash"}))
    assert str(refused.value) == (
        f"`model.kernels.attention: flash` cannot be: {failure}. Leave it out, and the fastest that can run is taken."
    )


def test_defaults_measure_nothing():
    bench = Bench(cudnn=(9.0, 0.0), flash=(1.0, 0.0))
    assert answer(bench, parse_kernels("defaults")).implementation == "cudnn"
    assert bench.timed == []


def test_a_second_run_on_the_same_machine_measures_nothing(tmp_path):
    bench, path = Bench(cudnn=(9.0, 0.0), flash=(1.0, 1e-5)), tmp_path / "deep" / "table.json"
    first = Dispatcher(KernelWishes(), bench.measure, KernelCache(path, MACHINE))
    entry = first.answer(bench.question())
    first.cache.add(first.measured)
    again = answer(bench, cache=KernelCache(path, MACHINE))
    assert bench.timed == ["cudnn", "flash"]
    assert (again.implementation, again.reason, again.trials) == ("flash", "measured earlier", entry.trials)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"], "something temporary was left"
    answer(bench, cache=KernelCache(path, MACHINE), subject="another shape")
    assert len(bench.timed) == 4


def test_tables_of_several_models_share_the_file(tmp_path):
    bench, path = Bench(cudnn=(1.0, 0.0)), tmp_path / "table.json"
    for subject in ("one", "two"):
        cache = KernelCache(path, MACHINE)
        dispatcher = Dispatcher(KernelWishes(), bench.measure, cache)
        dispatcher.answer(bench.question(subject=subject))
        cache.add(dispatcher.measured)
    assert {entry["subject"] for entry in json.loads(path.read_text())["entries"]} == {"one", "two"}


WHOLE = default_table(MACHINE, "one", {"attention": "flash"}, "measured now").to_json()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a table of kernels"),
        (json.dumps({**WHOLE, "format": 0}), "format 0, not 1"),
        (json.dumps({**WHOLE, "machine": {"gpu": "Other"}}), "it is of another machine"),
        (json.dumps({**WHOLE, "entries": [{**WHOLE["entries"][0], "implementation": "magic"}]}), "`attention: magic`"),
        (json.dumps({**WHOLE, "entries": [{"operation": "attention"}]}), "not a table of kernels"),
    ],
)
def test_a_file_that_cannot_be_used_is_measured_anew_and_said(tmp_path, caplog, content, reason):
    path, bench = tmp_path / "table.json", Bench(cudnn=(1.0, 0.0), flash=(2.0, 0.0))
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        cache = KernelCache(path, MACHINE)
    (line,) = caplog.messages
    assert line.startswith(f"The kernels measured earlier cannot be used ({path}: ")
    assert reason in line
    dispatcher = Dispatcher(KernelWishes(), bench.measure, cache)
    assert dispatcher.answer(bench.question()).implementation == "cudnn"
    cache.add(dispatcher.measured)
    assert Table.from_json(json.loads(path.read_text())).names() == {"attention": "cudnn"}


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "table.json", MACHINE)
    with caplog.at_level(logging.WARNING):
        cache.add([Entry("attention", "one", "flash", "measured now")])
    assert caplog.messages[0].startswith("The measured kernels cannot be kept for the next run: ")


def test_a_resumed_run_goes_on_as_it_began_whatever_is_faster_now(tmp_path):
    bench, saved = Bench(cudnn=(1.0, 0.0), flash=(9.0, 0.0)), Table.from_json(WHOLE)
    entry = answer(bench, saved=saved)
    assert (entry.implementation, entry.reason) == ("flash", "as the run began")
    assert bench.timed == []
    assert answer(bench, parse_kernels({"attention": "cudnn"}), saved=saved).implementation == "cudnn"
    assert answer(bench, saved=saved, subject="other rows").implementation == "cudnn"


def test_a_table_survives_a_file():
    trials = answer(Bench(cudnn=(1.5, 1e-5), flash="no such kernel")).trials
    table = Table(MACHINE, (Entry("attention", "one", "cudnn", "measured now", trials),))
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert table.lines() == ["  attention  cudnn 1.500 ms  (measured now; flash cannot: no such kernel)"]


def test_names_and_choices_are_the_same_thing():
    assert Choices.from_names({}) == DEFAULT == Choices.from_names(DEFAULT.names())
    odd = Choices(swiglu_products=False, down_in_depth=True, attention="flash")
    assert odd.names() == {"swiglu_products": "off", "down_in_depth": "on", "attention": "flash"}
    assert Choices.from_names(odd.names()) == odd
    assert DEFAULT.names().keys() == KERNELS.keys()
    assert all(name in KERNELS[operation] for operation, name in DEFAULT.names().items())


def test_values_of_the_key():
    assert parse_kernels(None) == parse_kernels("measure") == KernelWishes()
    assert parse_kernels({"down_in_depth": True, "swiglu_products": "off"}).asked == {
        "down_in_depth": "on",
        "swiglu_products": "off",
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "mesure",
            "`model.kernels: mesure` is not known. Did you mean `measure`? Use measure, defaults, or a mapping such as "
            "`{attention: flash}`.",
        ),
        (
            {"atention": "flash"},
            "`model.kernels.atention` is not known. Did you mean `attention`? Known: swiglu_products, down_in_depth, "
            "attention.",
        ),
        (
            {"attention": "flesh"},
            "`model.kernels.attention: flesh` is not known. Did you mean `flash`? Use cudnn, flash, efficient.",
        ),
    ],
)
def test_mistakes_in_the_key(value, message):
    with pytest.raises(ConfigError) as refused:
        parse_kernels(value)
    assert str(refused.value) == message

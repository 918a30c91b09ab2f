"""Kill a run at many random moments, resume it each time, and compare everything with an undisturbed run, bit for bit.

    python benchmarks/kill_50.py --kills 50 --seed 0 --out benchmarks/results/kill_50.json
    python benchmarks/kill_50.py --data all --kills 50 --steps 300 --out benchmarks/results/kill_50_data.json

A tiny Llama trains on a CPU with dropout, shuffled rows, validation and a checkpoint every few steps. `--data` says how
its rows come (see `kill_data.py`); `all` shares the kills out over every kind. For each kind the undisturbed run goes
first and is timed. Then the same command is started again and again on a directory of its own and SIGKILLed at a moment
drawn from the seed; every kill falls into one of these phases, so that none is left out by luck:

    start-up     from the start of the process to the end of tokenising, loading and set-up
    tokenising   while background processes fill the token cache, which is emptied before (kinds that have one)
    training     between two steps
    saving       while a checkpoint is being written (its staging directory is there)
    publishing   between the directory's rename and the last pointer (the note `.publishing` is there)
    validation   after a step that validates, before its record

When all kills have happened the run is started once more and left alone. Then `training.jsonl` and `validation.jsonl`
(without wall-clock fields), every file of the last checkpoint's model, the optimizer's tensors, the random states and
the data position must equal the undisturbed run's. The run is made long enough for all kills: a resumed run repeats the
steps since its last checkpoint, which is the point.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from kill_data import KINDS, TOKENISING, sections, write_data

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
TRAIN_FT = ROOT / "nemo_automodel" / "recipes" / "llm" / "train_ft.py"
PHASES = ("start-up", "training", "saving", "publishing", "validation")
CLOCK = ("timestamp", "tps", "tps_per_gpu", "mem")
"""Fields of a record that depend on the clock or the machine."""

POLL_S = 0.0002


def phases_of(kind: str) -> tuple[str, ...]:
    """Return where a run on this data can be killed."""
    return ("tokenising", *PHASES) if kind in TOKENISING else PHASES


def write_config(work: Path, run_dir: Path, kind: str, args: argparse.Namespace) -> Path:
    """Write the recipe of one run and return its path; the data and the model are shared."""
    from support.recipes import lora_section, recipe_config

    config = recipe_config(
        work / "model",
        work / "squad",
        run_dir,
        step_scheduler={
            "global_batch_size": 4,
            "local_batch_size": 2,
            "num_epochs": 1000,
            "max_steps": args.steps,
            "ckpt_every_steps": args.ckpt_every,
            "val_every_steps": args.val_every,
            "save_checkpoint_every_epoch": False,
        },
        checkpoint={"checkpoint_dir": str(run_dir), "max_recent_checkpoints": 2, "is_async": args.is_async},
    )
    config["validation_dataset"] = {**config["dataset"], "split": "validation"}
    config |= sections(kind, work, args.workers)
    if args.adapter:
        config["peft"] = {**lora_section(), "dropout": 0.3}
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


class Session:
    """One start of the run, watched through its files."""

    def __init__(self, config: Path, run_dir: Path, log: Path) -> None:
        self.run_dir = run_dir
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.cache = run_dir.with_name(f"{run_dir.name}-cache")
        env |= {"CUDA_VISIBLE_DEVICES": "", "NEMO_AUTOMODEL_CACHE": str(self.cache)}
        self._output = log.open("a")
        self.start_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(TRAIN_FT), "-c", str(config)], stdout=self._output, stderr=self._output, env=env
        )
        self.first_size = self._log_size()

    def _log_size(self) -> int:
        path = self.run_dir / "training.jsonl"
        return path.stat().st_size if path.exists() else 0

    def num_steps(self) -> int:
        """Return how many records `training.jsonl` holds."""
        path = self.run_dir / "training.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def num_validations(self) -> int:
        """Return how many records `validation.jsonl` holds."""
        path = self.run_dir / "validation.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_saving(self) -> bool:
        """Tell whether a checkpoint is being written."""
        return self.run_dir.is_dir() and any(".reserving-" in name for name in os.listdir(self.run_dir))

    def is_publishing(self) -> bool:
        """Tell whether a checkpoint is getting its name and pointers."""
        return (self.run_dir / ".publishing").exists()

    def num_token_files(self) -> int:
        """Return how many files the token cache has, whole (`.chunk`) or not (`.tmp`)."""
        return sum(1 for _ in (self.cache / "tokens").glob("*/*[kp]"))

    def has_ended(self) -> bool:
        """Tell whether the process is gone."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """Kill the process as a power button would."""
        self.process.send_signal(signal.SIGKILL)
        self.close()

    def close(self) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait()
        self._output.close()
        return status


def wait_and_kill(session: Session, phase: str, generator: random.Random, startup_s: float, args: Any) -> str:
    """Kill the session in ``phase``, at a random moment of it; return where it fell, or ``ended``."""
    if phase == "start-up":
        deadline = session.start_s + generator.uniform(0.02, 1.0) * startup_s
        while time.monotonic() < deadline and not session.has_ended():
            time.sleep(POLL_S)
        where = f"{time.monotonic() - session.start_s:.2f} s after the start"
    elif phase == "tokenising":
        wanted = generator.randint(1, 5)
        _wait(session, lambda: session.num_token_files() >= wanted)
        where = f"{session.num_token_files()} files in the token cache"
    else:
        begun = _wait_until_steps_flow(session)
        nth = generator.randint(1, 3)
        if begun and phase == "training":
            seen = session.num_steps()
            _wait(session, lambda: session.num_steps() >= seen + nth + generator.randint(0, args.ckpt_every))
            time.sleep(generator.uniform(0, 0.01))
        elif begun and phase == "validation":
            _wait_for_validation(session, nth, args.val_every)
            time.sleep(generator.uniform(0, 0.02))
        elif begun:
            is_there = session.is_saving if phase == "saving" else session.is_publishing
            for _ in range(nth):
                _wait(session, lambda: not is_there())
                _wait(session, is_there)
            if phase == "saving":
                time.sleep(generator.uniform(0, args.save_s))
        where = f"after {session.num_steps()} records"
    if session.has_ended():
        return "ended"
    session.kill()
    return where


def _wait(session: Session, condition: Any) -> None:
    while not session.has_ended() and not condition():
        time.sleep(POLL_S)


def _wait_until_steps_flow(session: Session) -> bool:
    """Wait for the first record of this session; the resume drops those of steps to be repeated first."""
    before = session.num_steps()
    modified = (session.run_dir / "training.jsonl").stat().st_mtime_ns if before else 0
    _wait(session, lambda: session.num_steps() and _is_later(session, modified))
    return not session.has_ended()


def _is_later(session: Session, modified: int) -> bool:
    return (session.run_dir / "training.jsonl").stat().st_mtime_ns > modified


def _wait_for_validation(session: Session, nth: int, val_every: int) -> None:
    """Wait until a step that validates is logged and its validation is not."""
    for _ in range(nth):
        done = session.num_steps()
        target = (done // val_every + 1) * val_every
        _wait(session, lambda target=target: session.num_steps() >= target)


def undisturbed(config: Path, run_dir: Path, log: Path) -> tuple[float, float]:
    """Run to the end; return the seconds of start-up and of one save."""
    session = Session(config, run_dir, log)
    _wait(session, lambda: session.num_steps() > 0)
    startup_s = time.monotonic() - session.start_s
    saves = []
    while not session.has_ended():
        _wait(session, session.is_saving)
        begun = time.monotonic()
        _wait(session, lambda: not session.is_saving())
        saves.append(time.monotonic() - begun)
    if session.close() != 0:
        raise SystemExit(f"the undisturbed run failed; see {log}")
    return startup_s, sorted(saves)[len(saves) // 2]


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log without what the clock decides."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def differences(whole: Path, killed: Path) -> list[str]:
    """Return what of two finished runs is not equal, bit for bit."""
    from nemo_automodel.components.checkpoint import dcp

    found = []
    for name in ("training.jsonl", "validation.jsonl"):
        if records(whole / name) != records(killed / name):
            found.append(name)
    a, b = (run / os.readlink(run / "LATEST") for run in (whole, killed))
    if a.name != b.name:
        return [*found, f"LATEST: {a.name} and {b.name}"]
    if os.readlink(whole / "LOWEST_VAL") != os.readlink(killed / "LOWEST_VAL"):
        found.append("LOWEST_VAL")
    for path in sorted([*(a / "model").rglob("*"), *(a / "resume").rglob("*")]):
        if path.is_file() and path.read_bytes() != (b / path.relative_to(a)).read_bytes():
            found.append(str(path.relative_to(a)))
    for name in ("losses.json", "progress.json", "loss_guard.json"):
        if (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    for name in ("step_scheduler.pt", "dataloader/dataloader_dp_rank_0.pt", "rng/rng_global_rank_0.pt"):
        if not _is_equal(*(torch.load(path / name, weights_only=True) for path in (a, b))):
            found.append(name)
    if not _is_equal(*(dcp.Archive(path / "optim").read({}) for path in (a, b))):
        found.append("optim")
    leftovers = [path.name for path in killed.iterdir() if ".reserving-" in path.name or path.name.endswith(".tmp")]
    return found + [f"left behind: {name}" for name in leftovers]


def _is_equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_is_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_is_equal, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


def run_kind(kind: str, num_kills: int, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Do both runs on one kind of data and return what was found."""
    whole, killed = work / f"{kind}-whole", work / f"{kind}-killed"
    startup_s, args.save_s = undisturbed(write_config(work, whole, kind, args), whole, whole.with_suffix(".log"))
    print(f"{kind}: {args.steps} steps, start-up {startup_s:.1f} s, a save {args.save_s * 1e3:.0f} ms", flush=True)
    config, log = write_config(work, killed, kind, args), killed.with_suffix(".log")
    generator, kills, phases = random.Random(f"{args.seed} {kind}"), [], phases_of(kind)
    while len(kills) < num_kills:
        phase = phases[len(kills) % len(phases)]
        if phase == "tokenising":
            shutil.rmtree(killed.with_name(f"{killed.name}-cache"), ignore_errors=True)
        session = Session(config, killed, log)
        where = wait_and_kill(session, phase, generator, startup_s, args)
        if where == "ended":
            raise SystemExit(f"the run ended (status {session.close()}) before all kills; raise --steps. See {log}")
        kills.append({"data": kind, "phase": phase, "where": where, "records": session.num_steps()})
        print(f"kill {len(kills):>3}: {phase:<11} {where}", flush=True)
    status = Session(config, killed, log).close()
    resumes = log.read_text().count("Going on from")  # the last start is one, too
    found = differences(whole, killed) if status == 0 else [f"the last start ended with status {status}"]
    print(f"{kind}: {'equal' if not found else 'DIFFERENT: ' + ', '.join(found)}", flush=True)
    return {"resumes": resumes, "different": found, "log": kills}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Do all runs and return the report."""
    from support.tiny import make_model_dir

    make_model_dir(work / "model", attention_dropout=0.1)  # so that random numbers matter
    write_data(work, args.rows)
    kinds = KINDS if args.data == "all" else (args.data,)
    done = {}
    for number, kind in enumerate(kinds):
        share = args.kills // len(kinds) + (number < args.kills % len(kinds))
        done[kind] = run_kind(kind, share, args, work)
    kills = [kill for found in done.values() for kill in found["log"]]
    different = [f"{kind}: {name}" for kind, found in done.items() for name in found["different"]]
    return {
        "what": "SIGKILL at random moments, resume, compare with an undisturbed run bit for bit",
        "seed": args.seed,
        "steps": args.steps,
        "kills": len(kills),
        "by_phase": dict(Counter(kill["phase"] for kill in kills)),
        "by_data": dict(Counter(kill["data"] for kill in kills)),
        "resumes_from_a_checkpoint": sum(found["resumes"] for found in done.values()),
        "options": {key: getattr(args, key) for key in ("data", "adapter", "is_async", "workers", "ckpt_every")},
        "different": different,
        "verdict": f"{len(kills)} of {len(kills)}" if not different else "NOT EQUAL",
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()},
        "log": kills,
    }


def main() -> int:
    """Parse the command line, run, write the report; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="long enough for all kills")
    parser.add_argument(
        "--rows", type=int, default=118, help="rows of training data; the last step of an epoch is short"
    )
    parser.add_argument("--ckpt-every", type=int, default=7)
    parser.add_argument("--val-every", type=int, default=5)
    parser.add_argument("--data", choices=(*KINDS, "all"), default="unpacked", help="how rows come")
    parser.add_argument("--workers", type=int, help="loader workers; without it as many as the kind of data has")
    parser.add_argument("--adapter", action="store_true", help="LoRA with dropout instead of all weights")
    parser.add_argument("--async", dest="is_async", action="store_true", help="save beside training")
    parser.add_argument("--keep", type=Path, help="leave the runs in this directory")
    parser.add_argument("--out", type=Path, help="write the report here")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp(prefix="kill-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        report = run(args, work)
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{report['verdict']}{': ' + ', '.join(report['different']) if report['different'] else ''}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return bool(report["different"])


if __name__ == "__main__":
    raise SystemExit(main())

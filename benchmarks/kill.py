"""What a run survives: SIGKILL at random moments, interrupts, and a disk that fills up.

    python benchmarks/kill.py                                 # thirty runs, about a quarter of an hour
    python benchmarks/kill.py --kills 1 --interrupts 1 --disks 0 --out kill.json

One uninterrupted run of train.py is the reference. Every other run is stopped, resumed until it ends by
itself, and compared with the reference bit by bit: the tensors and values of its checkpoint (weights,
momentum, masks, memory bank, events), log.csv, events.csv and summary.json, all but times and settings.
Pictures are counted.

A run is killed two or three times, each moment uniform in what the reference would still have needed,
start-up included; a run that ends before its last kill does not count and is made again. SIGINT, SIGTERM
and SIGHUP, in turn, must end a run with status 130 and the command that goes on. On a full disk (a small
tmpfs, which takes root) it must end with status 2 and one line, and once there is space it must end as the
reference did.
"""

import argparse
import collections
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
EPOCHS = 8
SETTINGS = "--dataset digits --per-class 20 --batch-size 32 --label-budget 0.2 --embedding pca".split()
SETTINGS += ["--epochs", str(EPOCHS)]
TIMES = ("seconds", "images_per_second")
PHASES = (
    *("before the run began", "before the first checkpoint", "between checkpoints"),
    *("before the summary", "after the summary"),
)
DISK = 16 << 20  # bytes


def launch(out: Path) -> subprocess.Popen:
    """Begin the run in `out`, or go on with it, on one thread."""
    flags = ["--resume", str(out)] if begun(out) else [*SETTINGS, "--out", str(out)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, TRAIN, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes
    )


def begun(out: Path) -> bool:
    """Whether a folder holds the settings of a run."""
    return (out / "args.json").exists() and (out / "args.json").stat().st_size > 0


def epochs_done(out: Path) -> int:
    """The epochs in the checkpoint."""
    path = out / "checkpoint.pt"
    return len(torch.load(path, weights_only=True)["rows"]) if path.exists() else 0


def phase(out: Path) -> str:
    """How far a run came that was stopped."""
    done = epochs_done(out)
    if not done:
        return PHASES[1 if begun(out) else 0]
    return PHASES[4 if (out / "summary.json").exists() else 3 if done == EPOCHS else 2]


def same(a, b) -> bool:
    """Whether two values are equal, tensors in them bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(out: Path) -> dict:
    """All that a finished run leaves, but for its settings and pictures."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    return {
        **{f"checkpoint: {key}": value for key, value in checkpoint.items() if key != "args"},
        "log.csv": list(csv.DictReader((out / "log.csv").read_text("utf-8").splitlines())),
        "events.csv": (out / "events.csv").read_bytes(),
        "summary.json": json.loads((out / "summary.json").read_text("utf-8")),
    }


def finish(out: Path, reference: Path) -> dict:
    """Let a stopped run end; which of its parts differ from the reference's, and the pictures it lacks."""
    process = launch(out)
    errors = process.communicate()[1].strip().replace(str(out), "RUN")
    if process.returncode:
        return {"result": f"status {process.returncode}: {errors}"}
    parts, expected = outcome(out), outcome(reference)
    different = [name for name in expected if name not in parts or not same(parts[name], expected[name])]
    lacks = {path.name for path in reference.glob("*.png")} - {path.name for path in out.glob("*.png")}
    return {"result": ", ".join(different) or "identical", "lacks": sorted(lacks)}


def kill(out: Path, duration: float, training: float, draw: random.Random) -> dict | None:
    """Kill a run two or three times; when, or None if it ended before."""
    kills = []
    for _ in range(draw.choice((2, 2, 3))):
        after = draw.uniform(0, duration - training * epochs_done(out) / EPOCHS)
        process = launch(out)
        try:
            process.communicate(timeout=after)
            return None
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        kills.append({"after_seconds": round(after, 2), "phase": phase(out), "epochs": epochs_done(out)})
    return {"kills": kills, "told": "; ".join(f"{k['phase']} ({k['epochs']})" for k in kills)}


def interrupt(out: Path, sent: signal.Signals, after: float) -> dict | None:
    """Send a run a signal some seconds after it has begun; how it ended, or None if it did before."""
    process = launch(out)
    while process.poll() is None and not begun(out):
        time.sleep(0.01)
    time.sleep(after)
    process.send_signal(sent)
    line = process.communicate()[1].strip().replace(str(out), "RUN")
    good = process.returncode == 130 and line == "train.py: stopped; go on with: python train.py --resume RUN"
    told = f"{sent.name} {phase(out)} ({epochs_done(out)}): status {process.returncode}, {line}"
    return None if process.returncode == 0 else {"good": good, "told": told}


def fill(out: Path, free: int, finished: Path | None) -> dict:
    """Run with `free` bytes on the disk, then free the rest. finished: a run to copy up to its last epoch."""
    if finished:
        out.mkdir()
        for name in ("args.json", "checkpoint.pt", "log.csv", "events.csv"):
            shutil.copy(finished / name, out)
    ballast = out.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() // 4096 * 4096 - free))
    process = launch(out)
    line = process.communicate()[1].strip().replace(str(out), "RUN")
    ballast.unlink()
    good = process.returncode == 2 and "No space left" in line and "\n" not in line
    told = f"{free:,} bytes free, {phase(out)}: status {process.returncode}, {line}"
    return {"good": good, "told": told}


def full_disks(root: Path, count: int) -> list[dict]:
    """Runs on a full disk; none if it cannot be mounted."""
    reference, disk, runs = root / "reference", root / "disk", []
    disk.mkdir()
    size = (reference / "checkpoint.pt").stat().st_size
    for free, finished in ((0, None), (size // 2, None), (size * 3 // 2, None), (64 << 10, reference))[
        :count
    ]:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
        if error := subprocess.run(mount, capture_output=True, text=True).stderr.strip():
            print(f"full disk: skipped, {error}")
            break
        try:
            runs.append(fill(disk / "run", free, finished) | finish(disk / "run", reference))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(f"full disk {len(runs)}/{count}  {runs[-1]['result']:10s}  {runs[-1]['told']}", flush=True)
    return runs


def main() -> int:
    """Stop runs, compare them, write the counts; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(description="Kill, interrupt and starve runs and compare how they end.")
    parser.add_argument("--kills", type=int, default=20, help="killed runs (20)")
    parser.add_argument("--interrupts", type=int, default=6, help="interrupted runs (6)")
    parser.add_argument("--disks", type=int, default=4, help="runs on a full disk, up to 4 (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument(
        "--out", type=Path, default="results/kill.json", help="the counts (results/kill.json)"
    )
    args = parser.parse_args()
    draw, signals = random.Random(args.seed), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for sent in signals:  # a child that inherits an ignored signal would not stop
        signal.signal(sent, signal.default_int_handler)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reference, began = root / "reference", time.perf_counter()
        process = launch(reference)
        errors = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"kill.py: error: the reference ended with: {errors}")
        duration, runs = time.perf_counter() - began, {}
        training = sum(float(row["seconds"]) for row in outcome(reference)["log.csv"])
        print(f"reference: {duration:.1f} s, of which {training:.1f} s in {EPOCHS} epochs\n", flush=True)

        def repeat(name: str, times: int, attempt) -> None:
            """`attempt` that many times in new folders; a run that ended too early does not count."""
            runs[name], number = [], 0
            while len(runs[name]) < times:
                out, number = root / f"{name}-{number}", number + 1
                if stopped := attempt(out, len(runs[name])):
                    runs[name].append(stopped | finish(out, reference))
                    told = f"{runs[name][-1]['result']:10s}  {stopped['told']}"
                    print(f"{name} {len(runs[name])}/{times}  {told}", flush=True)

        repeat("killed", args.kills, lambda out, i: kill(out, duration, training, draw))
        repeat(
            "interrupted",
            args.interrupts,
            lambda out, i: interrupt(out, signals[i % 3], draw.uniform(0, training)),
        )
        runs["full disk"] = full_disks(root, args.disks)

    phases = collections.Counter(kill["phase"] for run in runs["killed"] for kill in run["kills"])
    counts = {name: {"runs": len(each)} for name, each in runs.items()}
    counts["killed"] |= {"kills": phases.total()} | {name: phases[name] for name in PHASES}
    for name, each in runs.items():
        counts[name]["ended with the right status and line"] = sum(run.get("good", True) for run in each)
        counts[name]["identical"] = sum(run["result"] == "identical" for run in each)
        counts[name]["with all pictures"] = sum(run.get("lacks") == [] for run in each)
    report = {"command": ["train.py", *SETTINGS], "reference_seconds": round(duration, 1), "counts": counts}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report | runs, indent=2) + "\n")
    print()
    for name, count in counts.items():
        print(f"{name:12s}", ", ".join(f"{value} {key}" for key, value in count.items()))
    every = [run for each in runs.values() for run in each]
    return int(not all(run["result"] == "identical" and run.get("good", True) for run in every))


if __name__ == "__main__":
    sys.exit(main())

"""What a run survives: SIGKILL at random moments, Ctrl-C, and a disk that fills up.

    python benchmarks/kill.py                                    # twenty runs, about a quarter of an hour on two cores
    python benchmarks/kill.py --runs 3 --out kill.json

One uninterrupted run of train.py is the reference. Every other run is stopped and resumed until it ends by itself, and then
compared with the reference bit by bit: the checkpoint's tensors (weights, momentum, masks, memory bank), log.csv and
summary.json, all but the times, and the names of the files. A run is killed two or three times, each moment uniform in what the
reference would still have needed, start-up included; a run that ends before its second kill does not count and begins anew.
Ctrl-C must end with status 130 and the command that goes on, a full disk (a small tmpfs, for which one must be root) with status
2 and one line, and once there is space again the run must end as the reference did.
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
SETTINGS = f"--dataset digits --per-class 20 --batch-size 32 --label-budget 0.2 --embedding pca --epochs {EPOCHS}".split()
TIMES = ("seconds", "images_per_second")
PHASES = ("before the run began", "before the first checkpoint", "between checkpoints", "in the final figures", "after the end")
DISK = 16 << 20  # bytes


def command(out: Path) -> list[str]:
    """What somebody would type: --resume if the folder holds a run, else the run from its beginning."""
    settings = ["--resume"] if (out / "args.json").exists() else SETTINGS
    return [sys.executable, str(TRAIN), *settings, "--out", str(out)]


def launch(out: Path) -> subprocess.Popen:
    """Begin or go on with the run in `out`, on one thread."""
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(out), env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def to_the_end(out: Path) -> None:
    """Begin or go on with the run in `out`, which must end well."""
    process = launch(out)
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"kill.py: error: {out} ended with status {process.returncode}: {errors}")


def epochs_done(out: Path) -> int:
    """The epochs in the checkpoint."""
    path = out / "checkpoint.pt"
    return len(torch.load(path, weights_only=True)["rows"]) if path.exists() else 0


def phase(out: Path) -> str:
    """How far a run came that was stopped."""
    if not (out / "args.json").exists():
        return PHASES[0]
    if (out / "summary.json").exists():
        return PHASES[4]
    done = epochs_done(out)
    return PHASES[1] if not done else PHASES[2] if done < EPOCHS else PHASES[3]


def same(a, b) -> bool:
    """Whether two values are equal, tensors in them bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def outcome(out: Path) -> dict:
    """All that a finished run leaves, but for its times and its own name."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    with open(out / "log.csv", newline="") as file:
        log = [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]
    summary = {key: value for key, value in json.loads((out / "summary.json").read_text()).items() if key not in TIMES}
    parts = {key: value for key, value in checkpoint.items() if key not in ("args", "rows")}
    return {"checkpoint": parts, "log": log, "summary": summary, "files": sorted(path.name for path in out.iterdir())}


def difference(out: Path, reference: dict) -> str:
    """Which parts of a finished run are not those of the reference, or "identical"."""
    parts = outcome(out)
    return ", ".join(name for name in reference if not same(parts[name], reference[name])) or "identical"


def killed_run(out: Path, wanted: int, duration: float, training: float, draw: random.Random) -> list[dict] | None:
    """Kill a run `wanted` times and let it end; the kills, or None if it ended before."""
    kills = []
    while len(kills) < wanted:
        done = epochs_done(out)
        after = draw.uniform(0, duration - training * done / EPOCHS)
        process = launch(out)
        try:
            process.communicate(timeout=after)
            if process.returncode:
                raise SystemExit(f"kill.py: error: {out} ended with status {process.returncode}")
            return None
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        kills.append({"after_seconds": round(after, 2), "phase": phase(out), "epochs_done": epochs_done(out)})
    to_the_end(out)
    return kills


def interrupted_run(out: Path, training: float, draw: random.Random) -> dict | None:
    """Ctrl-C once the run has begun, and let it end; None if it ended before."""
    process = launch(out)
    while process.poll() is None and not (out / "args.json").exists():
        time.sleep(0.01)
    time.sleep(draw.uniform(0, training))
    process.send_signal(signal.SIGINT)
    lines = process.communicate()[1].split("\n")
    if process.returncode == 0:
        return None
    result = {"phase": phase(out), "status": process.returncode, "line": " ".join(filter(None, lines)).replace(str(out), "DIR")}
    to_the_end(out)
    return result


def full_disk(disk: Path, free: int, finished: Path | None = None) -> dict:
    """Run on a disk with `free` bytes, then free the rest and let it end. finished: a run to copy there up to its last epoch."""
    out, ballast = disk / "run", disk / "ballast"
    if finished:
        out.mkdir()
        for name in ("args.json", "checkpoint.pt", "log.csv"):
            shutil.copy(finished / name, out)
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() // 4096 * 4096 - free))
    process = launch(out)
    line = process.communicate()[1].strip().replace(str(out), "DIR")
    result = {"free": free, "phase": phase(out), "status": process.returncode, "line": line}
    ballast.unlink()
    to_the_end(out)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, interrupt and starve runs; count those that end as if nothing had been.")
    parser.add_argument("--runs", type=int, default=20, help="killed runs")
    parser.add_argument("--interrupts", type=int, default=5, help="runs stopped by Ctrl-C")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default="results/kill.json", help="where the counts go")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child that inherits an ignored SIGINT would not stop

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        to_the_end(root / "reference")
        duration = time.perf_counter() - began
        reference = outcome(root / "reference")
        with open(root / "reference/log.csv", newline="") as file:
            training = sum(float(row["seconds"]) for row in csv.DictReader(file))
        print(f"reference: {duration:.1f} s, of which {training:.1f} s in {EPOCHS} epochs\n", flush=True)

        def repeat(name: str, times: int, attempt) -> list[dict]:
            """`attempt` that many times in new folders; those that ended too early do not count."""
            done, number = [], 0
            while len(done) < times:
                out, number = root / f"{name}-{number}", number + 1
                result = attempt(out)
                if result is None:
                    continue
                done.append(result | {"result": difference(out, reference)})
                told = "; ".join(f"{k['phase']} ({k['epochs_done']})" for k in result["kills"]) if "kills" in result else result["phase"]
                print(f"{name} {len(done):3d}/{times}   {done[-1]['result']:10s}  {told}", flush=True)
            return done

        def kill(out: Path) -> dict | None:
            kills = killed_run(out, draw.choice((2, 2, 3)), duration, training, draw)
            return kills and {"kills": kills}

        killed = repeat("SIGKILL", args.runs, kill)
        interrupted = repeat("SIGINT ", args.interrupts, lambda out: interrupted_run(out, training, draw))

        disk, full = root / "disk", []
        disk.mkdir()
        size = (root / "reference/checkpoint.pt").stat().st_size
        cases = ((0, None), (size // 2, None), (size * 3 // 2, None), (64 << 10, root / "reference"))
        for free, finished in cases:
            mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], capture_output=True, text=True)
            if mount.returncode:
                print(f"full disk: skipped, {mount.stderr.strip()}")
                break
            try:
                full.append(full_disk(disk, free, finished) | {"result": difference(disk / "run", reference)})
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            print(f"full disk, {free:9,d} bytes free   {full[-1]['result']:10s}  {full[-1]['line']}", flush=True)

    phases = collections.Counter(kill["phase"] for run in killed for kill in run["kills"])
    clean = [r["status"] == 130 and r["line"].startswith("stopped; go on with: ") for r in interrupted]
    told = [r["status"] == 2 and "No space left" in r["line"] and "\n" not in r["line"] for r in full]
    identical = [sum(r["result"] == "identical" for r in results) for results in (killed, interrupted, full)]
    counts = {
        "sigkill": {"runs": len(killed), "kills": phases.total(), **{p: phases[p] for p in PHASES}, "identical": identical[0]},
        "sigint": {"runs": len(interrupted), "status 130 and the way on": sum(clean), "identical": identical[1]},
        "full disk": {"runs": len(full), "status 2 and one line": sum(told), "identical": identical[2]} if full else "skipped",
    }
    report = {"command": ["train.py", *SETTINGS], "reference_seconds": round(duration, 1), "counts": counts}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report | {"killed": killed, "interrupted": interrupted, "full_disk": full}, indent=2) + "\n")
    print()
    for name, count in counts.items():
        print(f"{name:10s}", count if isinstance(count, str) else ", ".join(f"{value} {key}" for key, value in count.items()))
    return int(not (all(clean) and all(told) and sum(identical) == len(killed) + len(interrupted) + len(full)))


if __name__ == "__main__":
    sys.exit(main())

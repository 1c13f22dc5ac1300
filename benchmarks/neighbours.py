"""Time and memory of what looks at the neighbours, against the number of images, beside scikit-learn.

    python benchmarks/neighbours.py             # writes results/neighbours.json and results/neighbours.png

The settings are those of train.py with vgg-small: N unit rows of width 128, three clusterings into N / 42
clusters, 0.64 % of at most 12,000 rows as background neighbours, a batch of 128 images in two views,
labels for 10 %. The votes use the rows and the embeddings (256) side by side. All are random directions,
the worst case of a search.

    bank update          a step     scatter the batch into the memory bank
    local aggregation    a step     forward and backward
    clustering           an epoch   three k-means of ten rounds      KMeans(n_init=3, max_iter=10, tol=0)
    propagation          an epoch   a vote of 50 labelled rows       KNeighborsClassifier(50), LabelSpreading

An epoch has N / 128 steps; what is done once an epoch is also given per step. KNeighborsClassifier is the
vote alone, without the densities; LabelSpreading is the global method.

Every figure comes from a fresh process. The time is the median of some calls after a small one that loads
what is loaded lazily. The memory is the most that the process held minus what it held just before, without
the bank and the inputs. scikit-learn is left out where it would take more than --limit seconds: its time
grows with N squared here.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from speed import machine, resident

import data
import losses
import train

ROOT = Path(__file__).resolve().parents[1]
DIM, SEEN, BATCH, CLASSES, PER_CLUSTER, VOTERS = 128, 256, 128, 10, 42, 50
OURS = {"bank update": "step", "local aggregation": "step", "clustering": "epoch", "propagation": "epoch"}
THEIRS = {"KMeans": "clustering", "KNeighborsClassifier": "propagation", "LabelSpreading": "propagation"}
COLOURS = dict(zip(OURS, ("#0072B2", "#E69F00", "#009E73", "#D55E00"), strict=True))  # Okabe & Ito
MARKERS = dict(zip((*OURS, *THEIRS), "os^DvPX", strict=True))


# ---- one measurement, in a process of its own ----


def unit_rows(n: int, dim: int = DIM) -> Tensor:
    """Random directions [n,dim], normalised in place so that nothing larger was ever held."""
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(dim))
    for part in rows.split(1000):
        part /= part.norm(dim=1, keepdim=True)
    return rows


def operation(name: str, n: int) -> Callable[[], object]:
    """What is measured, with its inputs ready."""
    generator, active = torch.Generator().manual_seed(1), torch.ones(n, dtype=torch.bool)
    k, y = max(2, round(n / PER_CLUSTER)), torch.randint(CLASSES, (n,), generator=generator)
    labelled = torch.rand(n, generator=generator) < 0.1
    index = torch.randperm(n, generator=generator)[:BATCH]
    bank = losses.MemoryBank(1, DIM)
    bank.rows = rows = unit_rows(n)
    if name == "bank update":
        z = torch.randn(len(index), DIM)
        return lambda: bank.update(index, z)
    if name == "local aggregation":
        index2, clusters = index.repeat(2), torch.randint(k, (3, n), generator=generator)
        z = unit_rows(len(index2)).requires_grad_()

        def aggregate() -> None:
            near = losses.neighbours(z, index2, bank, active, *losses.searched(n))
            losses.local_aggregation(z, index2, bank, clusters, near).backward()

        return aggregate
    if name == "clustering":
        return lambda: losses.clusterings(rows, active, k, generator=generator)
    if name == "KMeans":
        from sklearn.cluster import KMeans

        return lambda: KMeans(k, n_init=3, max_iter=10, tol=0, random_state=0).fit(rows.numpy())
    h = unit_rows(n, SEEN)
    if name == "propagation":

        def vote() -> None:
            both = torch.cat([rows, h], dim=1)
            F.normalize(both, dim=1, out=both)
            losses.propagate_labels(both, y, labelled, k=VOTERS, temperature=0.1, balance=True)

        return vote
    both, known = torch.cat([rows, h], dim=1).numpy(), labelled.numpy()
    if name == "KNeighborsClassifier":
        from sklearn.neighbors import KNeighborsClassifier

        voters = KNeighborsClassifier(VOTERS, weights="distance")
        return lambda: voters.fit(both[known], y[labelled].numpy()).predict_proba(both)
    from sklearn.semi_supervised import LabelSpreading

    return lambda: LabelSpreading("knn", n_neighbors=VOTERS).fit(both, torch.where(labelled, y, -1).numpy())


def measure(name: str, n: int, seconds: float = 2.0) -> dict:
    """Seconds a call (median, min, max) and MB. A call is repeated for `seconds`, 1 to 200 times."""
    warnings.simplefilter("ignore")  # that so few iterations do not converge
    train.use_device("cpu")
    operation(name, 1000)()
    call, times = operation(name, n), []
    before, _, _ = resident()
    while not times or (sum(times) < seconds and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    _, peak, _ = resident()
    result = {"seconds": statistics.median(times), "min": min(times), "max": max(times), "calls": len(times)}
    return result | {"peak_mb": max(0.0, peak - before)}


# ---- all of them ----


def measure_apart(name: str, n: int) -> dict:
    """`measure` in a fresh process; why not, if it fails."""
    command = [sys.executable, __file__, "--measure", name, "--sizes", str(n)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def expected(figures: dict, n: int) -> float:
    """Seconds a call would take if time grew with N squared from the largest N measured; 0 if none was."""
    measured = [(int(m), f["seconds"]) for m, f in figures.items() if "seconds" in f]
    return max(measured)[1] * (n / max(measured)[0]) ** 2 if measured else 0.0


def draw(results: dict, path: Path) -> None:
    """Time a call against N, both on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for name, figures in results.items():
        points = sorted((int(n), f["seconds"]) for n, f in figures.items() if "seconds" in f)
        label = f"{name}, every {OURS[name]}" if name in OURS else f"scikit-learn {name}"
        look = dict(linestyle="--", markerfacecolor="white") if name in THEIRS else dict(linewidth=2)
        look |= dict(color=COLOURS[THEIRS.get(name, name)], marker=MARKERS[name], label=label)
        if points:
            ax.plot(*zip(*points, strict=True), **look)
    ax.set(xscale="log", yscale="log", xlabel="training images N", ylabel="time a call")
    sizes = sorted({int(n) for figures in results.values() for n in figures})
    ax.set_xticks(sizes, [f"{n / 1000:g}k" for n in sizes])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t * 1e3:g} ms" if t < 1 else f"{t:g} s"))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def line(name: str, n: int, figures: dict) -> str:
    """One line of the table."""
    if "skipped" in figures:
        return f"{name:22s} {n:>8,d}  left out: {figures['skipped']}"
    seconds = figures["seconds"]
    each = seconds / (1 if OURS.get(name) == "step" else math.ceil(n / BATCH))
    return f"{name:22s} {n:>8,d} {seconds * 1e3:12.2f} {each * 1e3:12.3f} {figures['peak_mb']:10.0f}"


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, sizes = parser.add_argument, [1_000, 5_000, 10_000, 50_000, 200_000]
    add("--sizes", type=int, nargs="+", default=sizes, metavar="N", help=f"training images ({sizes})")
    add("--limit", type=float, default=300.0, metavar="S", help="most seconds of a scikit-learn call (300)")
    add("--out", type=Path, default=ROOT / "results/neighbours.json", help="the figures; a picture beside it")
    add("--measure", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.sizes[0])))

    about = machine("cpu")
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"\n{'':22s} {'N':>8s} {'ms a call':>12s} {'ms a step':>12s} {'peak MB':>10s}", flush=True)
    results: dict[str, dict] = {name: {} for name in (*OURS, *THEIRS)}
    for name, figures in results.items():
        for n in sorted(args.sizes):
            wait = expected(figures, n) if name in THEIRS else 0.0
            late = {"skipped": f"about {wait:.0f} s expected"} if wait > args.limit else None
            figures[str(n)] = late or measure_apart(name, n)
            print(line(name, n, figures[str(n)]), flush=True)
    settings = {"dim": DIM, "seen": SEEN, "voters": VOTERS, "batch_size": BATCH, "per_cluster": PER_CLUSTER}
    settings |= {"labels": 0.1, "limit": args.limit}
    command = shlex.join(["python", "benchmarks/neighbours.py", *sys.argv[1:]])
    content = {"command": command, "machine": about, "settings": settings, "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data.write_json(args.out, content)
    draw(results, args.out.with_suffix(".png"))
    print(f"\n{args.out}\n{args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()

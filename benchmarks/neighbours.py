"""Time and memory of what looks at the neighbours, against the number of images, beside scikit-learn.

    python benchmarks/neighbours.py                     # writes results/neighbours.json and results/neighbours.png

The settings are those of train.py with vgg-small: N unit rows of width 128, N / 42 clusters three times over, 0.64 % of at most
12,000 rows as background neighbours, a batch of 128 images in two views, labels for 10 %; the votes go by the rows and the embeddings (256)
together, put side by side in the call. All are random directions, the worst case for a search.

    bank update          a step     scatter the batch into the memory bank
    local aggregation    a step     forward and backward
    clustering           an epoch   three k-means of ten rounds              KMeans(n_init=3, max_iter=10, tol=0)
    propagation          an epoch   a vote of the 50 nearest labelled rows   KNeighborsClassifier(50), LabelSpreading("knn")

An epoch has N / 128 steps; what is done once an epoch is also given a step. (KNeighborsClassifier is the vote alone, without
the densities; LabelSpreading is the global method.)

Every figure comes from a fresh process: the time is the median of some calls after a small one that loads what is loaded
lazily; the memory is the largest the process held minus what it held just before, so it excludes the bank and the inputs.
scikit-learn is left out where its time, which grows with N squared here, would be over --limit seconds.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import losses  # noqa: E402
import train  # noqa: E402

DIM, SEEN, BATCH, CLASSES, PER_CLUSTER, VOTERS = 128, 256, 128, 10, 42, 50
OURS = {"bank update": "step", "local aggregation": "step", "clustering": "epoch", "propagation": "epoch"}
THEIRS = {"KMeans": "clustering", "KNeighborsClassifier": "propagation", "LabelSpreading": "propagation"}
COLOURS = {"bank update": "#0072B2", "local aggregation": "#E69F00", "clustering": "#009E73", "propagation": "#D55E00"}  # Okabe & Ito
MARKERS = {"bank update": "o", "local aggregation": "s", "clustering": "^", "propagation": "D"}
MARKERS |= {"KMeans": "v", "KNeighborsClassifier": "P", "LabelSpreading": "X"}


# ---- one measurement, in a process of its own -----------------------------------------------------------------------


def unit_rows(n: int, dim: int = DIM) -> Tensor:
    """Random directions [n,dim], normalised in place so that nothing larger was ever held."""
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(dim))
    for part in rows.split(1000):
        part /= part.norm(dim=1, keepdim=True)
    return rows


def operation(name: str, n: int) -> Callable[[], object]:
    """What is measured, with its inputs ready."""
    generator = torch.Generator().manual_seed(1)
    rows = unit_rows(n)
    k = max(2, round(n / PER_CLUSTER))
    y = torch.randint(CLASSES, (n,), generator=generator)
    labelled = torch.rand(n, generator=generator) < 0.1
    index = torch.randperm(n, generator=generator)[:BATCH]
    bank = losses.MemoryBank(1, DIM)
    bank.rows = rows
    if name == "bank update":
        z = torch.randn(len(index), DIM)
        return lambda: bank.update(index, z)
    if name == "local aggregation":
        index2, clusters = index.repeat(2), torch.randint(k, (3, n), generator=generator)
        z, (background, every), active = unit_rows(len(index2)).requires_grad_(), losses.searched(n), torch.ones(n, dtype=torch.bool)

        def aggregate():
            found = losses.neighbours(z, index2, bank, active, background, every)
            losses.local_aggregation(z, index2, bank, clusters, found=found).backward()

        return aggregate
    if name == "clustering":
        return lambda: losses.clusterings(rows, torch.ones(n, dtype=torch.bool), k, generator=generator)
    h = unit_rows(n, SEEN)
    if name == "propagation":

        def vote():
            both = torch.cat([rows, h], dim=1)
            F.normalize(both, dim=1, out=both)
            losses.propagate_labels(both, y, labelled, k=VOTERS, temperature=0.1, balance=True)

        return vote

    x, targets, known = rows.numpy(), y.numpy(), labelled.numpy()
    both = torch.cat([rows, h], dim=1).numpy() if name != "KMeans" else None
    if name == "KMeans":
        from sklearn.cluster import KMeans

        return lambda: KMeans(k, n_init=3, max_iter=10, tol=0, random_state=0).fit(x)
    if name == "KNeighborsClassifier":
        from sklearn.neighbors import KNeighborsClassifier

        return lambda: KNeighborsClassifier(VOTERS, weights="distance").fit(both[known], targets[known]).predict_proba(both)
    from sklearn.semi_supervised import LabelSpreading

    targets[~known] = -1
    return lambda: LabelSpreading("knn", n_neighbors=VOTERS).fit(both, targets)


def resident() -> tuple[float, float]:
    """MB of memory this process holds, and the most it ever held. (On Linux, ru_maxrss may be that of the parent process.)"""
    status = Path("/proc/self/status")
    if status.exists():
        sizes = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.startswith("Vm")}
        return int(sizes["VmRSS"]) / 2**10, int(sizes["VmHWM"]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return peak, peak


def measure(name: str, n: int, seconds: float = 2.0) -> dict:
    """Seconds a call (median, min, max) and MB; a call is repeated for `seconds`, once at least and 200 times at most."""
    warnings.simplefilter("ignore")  # that so few iterations do not converge
    train.tune_machine()
    operation(name, 1000)()
    call = operation(name, n)
    before, _ = resident()
    times = []
    while not times or (sum(times) < seconds and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    _, peak = resident()
    spread = {"seconds": statistics.median(times), "min": min(times), "max": max(times), "calls": len(times)}
    return spread | {"peak_mb": max(0.0, peak - before)}


# ---- all of them ----------------------------------------------------------------------------------------------------


def measure_apart(name: str, n: int) -> dict:
    """`measure` in a fresh process; why not, if it fails."""
    command = [sys.executable, __file__, "--measure", name, "--sizes", str(n)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"killed by signal {-done.returncode}"
        return {"skipped": reason}
    return json.loads(done.stdout.splitlines()[-1])


def expected(figures: dict, n: int) -> float:
    """Seconds a call at N = n would take if the time grew with N squared from the largest N measured; 0 if none was."""
    measured = [(int(m), f["seconds"]) for m, f in figures.items() if "seconds" in f]
    return max(measured)[1] * (n / max(measured)[0]) ** 2 if measured else 0.0


def a_step(name: str, n: int, seconds: float) -> float:
    """Seconds a training step, of seconds a call."""
    return seconds / (1 if OURS.get(name) == "step" else math.ceil(n / BATCH))


def growth(name: str, figures: dict) -> list[float]:
    """The exponent of N in the time a training step, between neighbouring sizes: 1 is linear."""
    measured = sorted((int(n), a_step(name, int(n), f["seconds"])) for n, f in figures.items() if "seconds" in f)
    return [math.log(t / s) / math.log(n / m) for (m, s), (n, t) in zip(measured, measured[1:], strict=False)]


def draw(results: dict, path: Path) -> None:
    """Time a call against N, both on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    fig, ax = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    ends = []
    for name, figures in results.items():
        points = sorted((int(n), f["seconds"]) for n, f in figures.items() if "seconds" in f)
        if not points:
            continue
        colour = COLOURS[THEIRS.get(name, name)]
        style = dict(linestyle="--", linewidth=1.3, markerfacecolor="white") if name in THEIRS else dict(linewidth=2)
        ax.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[name], markersize=6, **style)
        ends.append((points[-1], f"{name}, every {OURS[name]}" if name in OURS else f"scikit-learn {name}", colour))
    ax.set(xscale="log", yscale="log", xlabel="training images N", ylabel="time a call")
    label_ends(ax, ends)
    sizes = sorted({int(n) for figures in results.values() for n in figures})
    ax.set_xticks(sizes, [f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n) for n in sizes])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t * 1e3:g} ms" if t < 1 else f"{t:g} s"))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def label_ends(ax, ends: list[tuple], gap: float = 0.055) -> None:
    """Write each curve's name beside its end, right of the plot, no two closer than `gap` of its height."""
    ends = sorted(ends, key=lambda end: end[0][1])
    low, high = (math.log(limit) for limit in ax.get_ylim())
    heights = [(math.log(end[0][1]) - low) / (high - low) for end in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in range(len(heights) - 1, -1, -1):  # and none above the plot
        heights[i] = min(heights[i], 1 - (len(heights) - 1 - i) * gap)
    for ((n, t), text, colour), height in zip(ends, heights, strict=True):
        ax.annotate(
            text,
            (n, t),
            xytext=(1.02, height),
            textcoords="axes fraction",
            va="center",
            color="#333333",
            fontsize=9,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.5, shrinkB=4),
        )


def row(name: str, n: int, f: dict) -> str:
    """One line of the table."""
    if "skipped" in f:
        return f"{name:22s} {n:>8,d}  left out: {f['skipped']}"
    each = a_step(name, n, f["seconds"])
    return f"{name:22s} {n:>8,d} {f['seconds'] * 1e3:12.2f} {each * 1e3:12.3f} {f['peak_mb']:10.0f}"


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[1_000, 5_000, 10_000, 50_000, 200_000], metavar="N", help="training images")
    add("--limit", type=float, default=300.0, metavar="S", help="leave a scikit-learn call out that would take longer, in seconds")
    add("--out-prefix", default=str(ROOT / "results" / "neighbours"), metavar="PATH", help="PATH.json and PATH.png are written")
    add("--measure", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.sizes[0])))
        return

    cpu = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None
    machine = {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "scikit-learn", "numpy")},
    }
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    print(f"\n{'':22s} {'N':>8s} {'ms a call':>12s} {'ms a step':>12s} {'peak MB':>10s}", flush=True)
    names = list(OURS) + (list(THEIRS) if importlib.util.find_spec("sklearn") else [])
    results: dict[str, dict] = {name: {} for name in names}
    for name in names:
        for n in sorted(args.sizes):
            wait = expected(results[name], n) if name in THEIRS else 0.0
            figures = {"skipped": f"about {wait:.0f} s expected"} if wait > args.limit else measure_apart(name, n)
            results[name][str(n)] = figures
            print(row(name, n, figures), flush=True)
    exponents = {name: growth(name, figures) for name, figures in results.items()}
    print("\nexponent of N in the time a step, from size to size (1 is linear)")
    for name, values in exponents.items():
        print(f"  {name:22s} {'  '.join(f'{value:5.2f}' for value in values)}")

    prefix = Path(args.out_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    settings = {"dim": DIM, "seen": SEEN, "voters": VOTERS, "batch_size": BATCH, "per_cluster": PER_CLUSTER}
    settings |= {"labels": 0.1, "limit": args.limit}
    command = shlex.join(["python", "benchmarks/neighbours.py", *sys.argv[1:]])
    content = {"command": command, "machine": machine, "settings": settings, "results": results, "exponents": exponents}
    train.write_json(Path(f"{prefix}.json"), content)
    draw(results, Path(f"{prefix}.png"))
    print(f"\n{prefix}.json\n{prefix}.png")


if __name__ == "__main__":
    main()

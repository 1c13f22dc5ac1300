"""What an encoder has learned, in numbers and pictures.

    answers(network, images)  # {"unit", "answer", "confidence", "claim"}

`python evaluate.py` compares runs, answers for images, names what was found.
"""

import argparse
import csv
import inspect
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANY_SIZE = ("gcd_accuracy", "open_world", "concept_scores")
PARTS = ("h", "z", "logits")  # a network returns
MASKS = ("among", "labelled", "new", "is_new")  # to bool

# ---- the encoder ----


def measured(function: Callable) -> Callable:
    """Compute in float32 without autocast, gradients and inference mode.

    ValueError: no rows, unequal numbers of rows (train_*, test_* may differ), NaN, or *_y < 0.
    """

    @wraps(function)
    def wrapped(*args, **options):
        given, rows = inspect.signature(function).bind(*args, **options).arguments, {}
        cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
        with torch.inference_mode(False), torch.no_grad(), cpu, cuda:
            for name, x in given.items():
                if torch.is_tensor(x):
                    wanted = rows.setdefault(name[:5] if name[:5] in ("train", "test_") else "", len(x))
                    if len(x) != wanted or not wanted and function.__name__ not in ANY_SIZE:
                        raise ValueError(f"{name} has {len(x)} rows instead of {wanted or 'at least one'}")
                    if x.is_floating_point() and x.isnan().any() or name[-2:] == "_y" and x.min() < 0:
                        raise ValueError(f"{name} has NaN or images without a label; leave them out")
                    x = x.clone() if x.is_inference() else x
                    given[name] = x.bool() if name in MASKS else x.float() if x.is_floating_point() else x
            return function(**given)

    return wrapped


@measured
def embed(network: nn.Module, x: Tensor, part="h", batch_size=512, bf16=False) -> Tensor:
    """What a network in eval mode makes of images uint8 or float 0..1 [N,3,H,W]: float32, on their device.

    part: "h" (embeddings [N,D]), "z" (unit rows) or "logits" [N,C].
    ValueError for another part, dtype, shape or size.
    """
    size = getattr(network, "image_size", None)
    fits = x.ndim == 4 and x.shape[1] == 3 and (size is None or x.shape[2:] == (size, size))
    fits &= x.dtype == torch.uint8 or x.dtype == torch.float32 and (x.abs() < 9).all()  # not 0..255
    if not fits:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, not uint8, float in 0..1 [N, 3, {size or 'H, W'}]")
    modes, out = [(module, module.training) for module in network.modules()], []
    try:
        network.eval()
        for images in x.split(max(1, min(batch_size, 2**24 // x[0].numel()))):
            images = images.float().div_(255) if images.dtype == torch.uint8 else images
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                output = network(images.contiguous(memory_format=torch.channels_last))
            output = output if isinstance(output, tuple) else (output,)  # h alone
            if part not in PARTS[: len(output)]:
                raise ValueError(f"part is one of {PARTS[: len(output)]}, not {part!r}")
            out.append(output[PARTS.index(part)].float())
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(out)


@measured
def linear_probe(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, l2=None) -> float:
    """Test accuracy (0..1) of logistic regression on frozen embeddings [N,D], standardised.

    l2: weight of |W|^2 beside the mean cross-entropy; None: the best of four on a fifth of the images.
    """
    if l2 is None:
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(0))
        held, rest = order[: max(1, len(order) // 5)], order[len(order) // 5 :]
        parts = train_h[rest], train_y[rest], train_h[held], train_y[held]
        l2 = max((1e-1, 1e-2, 1e-3, 1e-4), key=partial(linear_probe, *parts))
    mean = train_h.mean(0)
    std = train_h.std(0, correction=0).maximum(1e-6 * mean.abs()).clamp(1e-30)
    train_h, test_h = (train_h - mean) / std, (test_h - mean) / std
    weight = train_h.new_zeros(int(train_y.max()) + 1, train_h.shape[1], requires_grad=True)
    bias = train_h.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train_h, weight, bias), train_y.long()) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (F.linear(test_h, weight, bias).argmax(1) == test_y).float().mean().item()


@measured
def knn_accuracy(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, k=20) -> float:
    """Test accuracy (0..1) of k nearest neighbours by cosine, votes exp(cosine / 0.1)."""
    from sklearn.neighbors import KNeighborsClassifier

    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    train_h, test_h = (F.normalize(h, dim=1).cpu() for h in (train_h, test_h))
    votes = KNeighborsClassifier(min(k, len(train_h)), weights=lambda d: np.exp((1 - d**2 / 2) / 0.1))
    return float(votes.fit(train_h, train_y.cpu()).score(test_h, test_y.cpu()))


def forgetting(accuracy: Sequence[Sequence[float]]) -> np.ndarray:
    """Best accuracy so far minus accuracy now: accuracy [epochs, classes] in 0..1 -> [classes]."""
    accuracy = np.asarray(accuracy, dtype=float)
    if not len(accuracy):
        raise ValueError("accuracy has no epochs")
    return np.fmax.reduce(accuracy, 0) - accuracy[-1]


@measured
def novelty_auroc(score: Tensor, is_new: Tensor) -> float:
    """Area under the ROC (0..1) of a score [N], higher for novel images, against is_new (bool [N])."""
    from sklearn.metrics import roc_auc_score

    if len(is_new.unique()) < 2:
        raise ValueError("is_new must hold both new and known images")
    return float(roc_auc_score(is_new.cpu(), score.cpu()))


def matched(unit: Tensor, y: Tensor) -> Tensor:
    """Which images (bool [N]) the best match of units to classes (int64 [N]) has right; unit -1: none."""
    from scipy.optimize import linear_sum_assignment

    (units, row), (classes, column) = (values.unique(return_inverse=True) for values in (unit, y))
    table = torch.zeros(len(units), len(classes), device=y.device)
    table.index_put_((row, column), (unit >= 0).float(), accumulate=True)
    pairs = torch.zeros_like(table, dtype=torch.bool)
    pairs[linear_sum_assignment(table.cpu(), maximize=True)] = True
    return pairs[row, column] & (unit >= 0)


@measured
def cluster_scores(h: Tensor, y: Tensor, seed=0, sample=2000) -> dict[str, float]:
    """k-means on unit embeddings h [N,D], a cluster for each class in y [N]; accuracy: of the best match."""
    from sklearn import cluster, metrics

    rows, y = F.normalize(h[y >= 0], dim=1).cpu().numpy(), y[y >= 0].cpu()
    found = cluster.KMeans(len(y.unique()), n_init=10, random_state=seed).fit_predict(rows)
    chosen = np.random.default_rng(seed).permutation(len(y))[:sample]
    several = 1 < len(np.unique(found[chosen])) < len(chosen)
    return {
        "ari": metrics.adjusted_rand_score(y, found),
        "nmi": float(metrics.normalized_mutual_info_score(y, found)),
        "silhouette": float(metrics.silhouette_score(rows[chosen], found[chosen])) if several else 0.0,
        "accuracy": matched(torch.from_numpy(found), y).double().mean().item(),
    }


# ---- a run ----


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of values, None left out; None of none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def fraction(right: Tensor, among: Tensor) -> float | None:
    """The fraction of True in right [N] where among [N] is true; None where it never is."""
    return right[among].float().mean().item() if among.any() else None


def epoch_accuracy(predicted: Tensor, y: Tensor, known: int) -> dict:
    """Accuracy on all test images, the first `known` classes, the others."""
    right, old = predicted == y, y < known
    parts = {"accuracy": old | ~old, "old_accuracy": old, "new_accuracy": ~old}
    return {name: fraction(right, part) for name, part in parts.items()}


def accuracy_by_class(predicted: Tensor, y: Tensor, classes: list[str]) -> dict[str, float | None]:
    """Columns accuracy_<name> of log.csv; None without images."""
    return {f"accuracy_{name}": fraction(predicted == y, y == c) for c, name in enumerate(classes)}


@measured
def open_set(claims: Tensor, limit: float, unnamed: Tensor, right: Tensor, named: Tensor, present) -> dict:
    """How well images of nameless classes are recognised, by claims [T] below the limit.

    bool [T]: unnamed: the best unit is; right: the best class is; named: the true class is; present: the true
    class is named or in the pool.
    """
    unknown, known = (claims < limit) | unnamed, named[present]
    return {
        "open_accuracy": torch.where(named, right & ~unknown, unknown).float().mean().item(),
        "unknown_found": fraction(unknown, ~named),
        "novelty_auroc": novelty_auroc(-claims[present], ~known) if len(known.unique()) > 1 else None,
    }


@measured
def pseudo_label_quality(pseudo: Tensor, confidence: Tensor, y: Tensor, among: Tensor) -> dict:
    """Of the images `among` (bool [N]): pseudo-labels [N] that are right, sure."""
    return {
        "pseudo_accuracy": fraction(pseudo == y, among),
        "pseudo_coverage": fraction(confidence > 0.8, among),
    }


def final_metrics(train: tuple, test: tuple, budget: Tensor, rows: list[dict], known: list[str]) -> dict:
    """Metrics for summary.json from (h [N,D], y [N], -1: none) of training and test images.

    budget: bool [N], training labels that may leak; rows: of log.csv; known: the old classes.
    """
    old = [[row[f"accuracy_{name}"] for name in known] for row in rows if row["accuracy"] is not None]
    clusters, last, lost = cluster_scores(*test), rows[-1], forgetting(old) if old else np.nan
    given, leaked = ([part[among] for part in train] for among in (train[1] >= 0, budget))
    return {key: last[key] for key in "accuracy old_accuracy new_accuracy open_accuracy sparsity".split()} | {
        "probe": linear_probe(*given, *test),
        "probe_leaked": linear_probe(*leaked, *test) if budget.any() else None,
        "knn": knn_accuracy(*given, *test),
        "cluster_accuracy": clusters.pop("accuracy"),
        **clusters,
        "forgetting": float(np.nanmean(lost)) if np.isfinite(lost).any() else None,
        "novelty_auroc": mean(row["novelty_auroc"] for row in rows),
        "label_epochs": sum(row["labels"] for row in rows),
        "images_per_second": sorted(row["images_per_second"] for row in rows)[len(rows) // 2],
        "seconds": sum(row["seconds"] for row in rows),
    }


# ---- the open world ----


@measured
def gcd_accuracy(unit: Tensor, y: Tensor, new: Tensor) -> dict:
    """Accuracy of all, old, new images under ONE match of units to classes (arXiv 2201.02609).

    unit int64 [N], -1: none; y int64 [N], -1: left out; new bool [N]: its class never has a label.
    """
    right, new = matched(unit[y >= 0], y[y >= 0]), new[y >= 0]
    parts = {"gcd_all": new | ~new, "gcd_old": ~new, "gcd_new": new}
    return {name: fraction(right, part) for name, part in parts.items()}


@measured
def semi_kmeans(h: Tensor, y: Tensor, labelled: Tensor, k: int, seed=0) -> Tensor:
    """Semi-supervised k-means (arXiv 2201.02609) on h [N,D], normalised: clusters, int64 [N].

    Images that are `labelled` (bool [N]) stay in the cluster of their class y: 0, 1, ... in order. Other
    centres start by k-means++. The tightest of five counts.
    """
    rows, (given, own), attempts = F.normalize(h, dim=1), y[labelled].unique(return_inverse=True), {}
    free, generator, known = rows[~labelled], torch.Generator().manual_seed(seed), len(given)
    if not max(1, known) <= k <= known + len(free):
        raise ValueError(f"k is {k}: {known} classes have labels, and {len(free)} images have none")

    def means(rows, clusters, centres):  # an empty cluster keeps its centre
        index = clusters[:, None].expand_as(rows)
        return centres.scatter_reduce(0, index, rows, "mean", include_self=False)

    for _ in range(5):
        centres, clusters = means(rows[labelled], own, rows.new_zeros(k, rows.shape[1])), own
        for new in range(known, k):
            far = torch.cdist(free, centres[:new]).amin(1).square().cpu() if new else torch.ones(len(free))
            centres[new] = free[torch.multinomial(far + 1e-12, 1, generator=generator).item()]
        for _ in range(100):
            before, clusters = clusters, torch.cdist(rows, centres).argmin(1)
            clusters[labelled] = own
            if torch.equal(before, clusters):
                break
            centres = means(rows, clusters, centres)
        attempts[(rows - centres[clusters]).square().sum().item()] = clusters
    return attempts[min(attempts)]


@measured
def concept_scores(unit: Tensor, y: Tensor, unnamed: Sequence[int], nameless: Sequence[int]) -> dict:
    """How unnamed units fit the nameless classes; unit, y int64 [N]: of each image, -1 for none.

    Returns concepts, how many units are unnamed; concepts_true, in how many the largest class is
    nameless and nowhere larger; purity, {unit: share of its largest class, or None}.
    """
    told = (unit >= 0) & (y >= 0)
    table = torch.zeros(1 + max([0, *unnamed, *unit.tolist()]), 1 + max([0, *y.tolist()]))
    table.index_put_((unit[told].cpu(), y[told].cpu()), torch.ones(1), accumulate=True)
    home, largest = table.argmax(0).tolist(), table.argmax(1).tolist()  # of a class, of a unit
    purity = {u: (table[u].max() / table[u].sum()).item() if table[u].any() else None for u in unnamed}
    true = [u for u in purity if purity[u] and largest[u] in nameless and home[largest[u]] == u]
    return {"concepts": len(purity), "concepts_true": len(true), "purity": purity}


@measured
def open_world(h: Tensor, y: Tensor, labelled: Tensor, new: Tensor, seed=0) -> dict:
    """What k-means and `semi_kmeans` of h [N,D] reach in `gcd_accuracy`, told the number of classes.

    Images `labelled` (bool [N]) do not count. Returns gcd_kmeans_*, gcd_semi_kmeans_* (all, old, new).
    """
    from sklearn.cluster import KMeans

    hidden, k, rows, figures = ~labelled, len(y[y >= 0].unique()), F.normalize(h, dim=1), {}
    if not hidden.any():
        return figures
    plain = torch.from_numpy(KMeans(k, n_init=10, random_state=seed).fit_predict(rows.cpu())).to(y)
    for way, unit in {"kmeans": plain, "semi_kmeans": semi_kmeans(rows, y, labelled, k, seed)}.items():
        scores = gcd_accuracy(unit[hidden], y[hidden], new[hidden])
        figures |= {key.replace("gcd", f"gcd_{way}"): value for key, value in scores.items()}
    return figures


# ---- answers ----


@measured
def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The T (0.05..20) by which softmax(logits [N,C] / T) fits y [N] (arXiv 1706.04599)."""
    from scipy.optimize import minimize_scalar

    logits = logits.log_softmax(1).clamp(-1e3)

    def loss(t):  # log T, drawn to 0
        return F.cross_entropy(logits / math.exp(t), y).item() + t * t / len(y)

    return math.exp(minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded").x)


@measured
def calibration_error(confidence: Tensor, right: Tensor, bins=15) -> float:
    """Expected calibration error (0..1) of confidence [N]: |accuracy - confidence| over equal bins."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    gap, bin_of = right.float() - confidence, (confidence * bins).ceil().long().clamp(1, bins) - 1
    return gap.new_zeros(bins).index_add_(0, bin_of, gap).abs().sum().item() / len(right)


def answers(network: nn.Module, x: Tensor, batch_size=128) -> dict:
    """What a network (`model.load`) says to images [N,3,H,W]: unit, answer, confidence (0..1), claim.

    answer: the unit's name or "unit 8"; "unknown" if the claim is below network.answering["limit"], unless
    the unit was found without labels (answering["unnamed"]).
    """
    from train import grow_prune, model

    memory, names = network.answering or {}, network.names or ()
    found = set(memory.get("unnamed", ()))
    in_use = [u for u, name in enumerate(names) if name or u in found]
    if not in_use:
        raise ValueError("network has no unit with a name: it was trained without labels")
    h = embed(network, x, batch_size=batch_size, bf16=model.supports_bf16(x.device))
    logits = measured(network.head.forward)(h)[:, in_use]
    called = [names[u] or f"unit {u}" for u in in_use]
    column = torch.tensor([called.index(name) for name in called], device=x.device)  # of its name
    log_p = torch.zeros_like(logits).index_add_(1, column, logits.softmax(1)).log()
    confidence, best = (log_p / memory.get("temperature", 1)).softmax(1).max(1)
    place = logits.masked_fill(column != best[:, None], -math.inf).argmax(1)
    unit, claims = torch.tensor(in_use, device=x.device)[place], torch.full_like(confidence, math.nan)
    if memory:
        claims = grow_prune.claim(h, memory["h"].to(h), memory["labelled"].to(h.device))
    unknown = (claims < memory.get("limit", -math.inf)) & ~torch.isin(unit, unit.new_tensor([*found]))
    answer = ["unknown" if no else called[i] for no, i in zip(unknown.tolist(), place.tolist(), strict=True)]
    return {"unit": unit, "answer": answer, "confidence": confidence, "claim": claims}


# ---- lines for the screen ----

TERMS = ("ntxent", "aggregation", "propagation", "supervised")
BLOCKS = (  # of summary.json, compared
    "accuracy old_accuracy new_accuracy first_sight probe probe_leaked knn forgetting".split(),
    "ari nmi silhouette novelty_auroc sparsity labels_used label_epochs images_per_second seconds".split(),
    "concepts concepts_true gcd_all gcd_old gcd_new "
    "gcd_semi_kmeans_all gcd_semi_kmeans_old gcd_semi_kmeans_new".split(),
)
METRICS = sum(BLOCKS, [])


def metric(key, value):
    """As text."""
    if value is None or value != value:
        return "-"
    if key in ("ari", "nmi", "silhouette", "novelty_auroc"):
        return f"{value:.3f}"
    count = key.startswith(("label", "images", "seconds", "concepts"))
    return f"{value:.0f}" if count else f"{100 * value:.1f}"


def log_header() -> str:
    """`log_line`'s heading."""
    line = "   epoch stage        classes  labels  ntxent  aggreg  propag  superv"
    return f"{line}  accuracy    old    new   open  pruned  img/s    left"


def log_line(rows: list[dict], epochs: int, events: list[dict]) -> str:
    """The last row of log.csv and events."""
    row, pace = rows[-1], mean(row["seconds"] for row in rows[-5:])
    line = f"{row['epoch']:4d}/{epochs:<4d}{row['stage']:12s} {row['classes']:7d}  {row['labels']:6d}"
    for loss in (row[f"loss_{term}"] for term in TERMS):
        line += f"{'-' if loss is None else f' {loss:.3f}':>8s}"
    for key, width in dict(accuracy=10, old_accuracy=7, new_accuracy=7, open_accuracy=7, sparsity=8).items():
        line += f"{'-' if row[key] is None else f'{row[key]:.1%}':>{width}s}"
    minutes, seconds = divmod(round((epochs - row["epoch"]) * pace), 60)
    line += f"  {row['images_per_second']:5.0f}  {minutes:3d}:{seconds:02d}"
    for event in events:
        facts = [] if event["count"] is None else [f"{event['count']} images"]
        facts += [] if event["purity"] is None else [f"{100 * event['purity']:.0f} % pure"]
        title = "".join(filter(str.isprintable, event["class"] or ""))
        name = f" for class {title}" * bool(title) + f" ({', '.join(facts)})" * bool(facts)
        line += f"\n         {event['event']}: unit {event['unit']}{name}" * (event["event"] != "arrived")
    return line


def describe(summary: dict, images: int, known: int) -> str:
    """A run's metrics as text."""
    keys = [key for key in METRICS if key in summary and (summary[key] is not None or "gcd" not in key)]
    lines = [f"{key:20s}{metric(key, summary[key]):>10s}" for key in keys]
    return "\n".join([f"{images:,} training images; old: the first {known} classes", *lines])


# ---- drawn: a run ----

# Okabe & Ito's, Tol's: for the colour-blind.
COLOURS = "#0072B2 #E69F00 #009E73 #D55E00 #56B4E9 #CC79A7 #999933 #332288 #882255 #44AA99".split()
MARKERS, SHADES = "os^vDPX*<>", ("white", "#E8EEF5", "#F7EBD8", "#E4F1EA", "#F5E3EC")
METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "SimHei", "PingFang SC"]
LOOK = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.usetex": False}
BESIDE, CENTRE = dict(loc="center left", bbox_to_anchor=(1.01, 0.5)), dict(ha="center", va="center")
BOX = dict(facecolor="white", alpha=0.8, edgecolor="none", pad=0.8)
WHOLE = dict(axis="x", integer=True, min_n_ticks=1)


def attempt(draw, *args):
    """Draw; False, after a warning, if it fails."""
    try:
        draw(*args)
    except Exception as error:
        picture = next(arg for arg in args if isinstance(arg, Path))
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        say_once(f"warning: {picture} could not be drawn ({cause})")
        return False
    return True


@cache
def say_once(text):
    """Print a line, unless None, to stderr, once."""
    if text:
        print(text, file=sys.stderr)


@contextmanager
def figure(path, width, height, rows=1, **options):
    """A figure of so many inches, written to path."""
    from matplotlib import figure, font_manager, rc_context

    fonts = [name for name in FONTS if name in font_manager.fontManager.get_font_names()]
    with rc_context(LOOK | {"font.family": fonts}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", "Glyph")
        fig = figure.Figure((width, height), layout="constrained")
        yield fig.subplots(rows, **options)
        fig.savefig(path, dpi=150, bbox_inches="tight")
    if caught:
        say_once("note: no installed font has all characters of names; try Noto Sans CJK")


def shown(name, length=24):
    """A name for pictures: one short line, "$" and "_" harmless."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    name = name if len(name) <= length else f"{name[: length // 2]}…{name[1 - length // 2 :]}"
    return ("\u200b" * name.startswith("_") + name).replace("$", r"\$")


def style(i):
    """Look of line i."""
    return dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])


def plot(ax, rows, key, label, **look):
    """A column of log.csv, unless empty."""
    x, y = np.array([(row["epoch"], row.get(key)) for row in rows], dtype=float).reshape(-1, 2).T
    if np.isfinite(y).any():
        ax.plot(x, y, label=label, markersize=3, **look)


def draw_curves(rows, classes, path):
    """Accuracy, losses, labels, the unknown; rows: of log.csv."""
    known, names = rows[0]["classes"], [row["stage"] for row in rows]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    shares = dict(
        labelled="images with a label",
        pseudo_accuracy="pseudo-labels right",
        pseudo_coverage="pseudo-labels sure (> 0.8)",
        novelty_auroc="AUROC of the claim",
        open_accuracy="right, unknown\nbeing an answer",
    )
    some = dict(old_accuracy="the old classes", new_accuracy="the late classes")
    each = {f"accuracy_{name}": shown(name) + " (late)" * (c >= known) for c, name in enumerate(classes)}
    panels = some if len(classes) > len(COLOURS) else each, {f"loss_{term}": term for term in TERMS}, shares
    with figure(path, 9, 10, 3, sharex=True, height_ratios=(5, 3, 3)) as axes:
        plot(axes[0], rows, "accuracy", "all, also\nthose to come", color="black", linewidth=2.5, marker="o")
        for ax, columns in zip(axes, panels, strict=True):
            for i, (key, label) in enumerate(columns.items()):
                there = [row for row in rows if columns is not each or i < row["classes"]]
                plot(ax, there, key, label, markevery=(i % 4, 4) if len(rows) > 9 else 1, **style(i))
            for n, (left, right) in enumerate(pairwise([*starts, len(rows)])):
                ax.axvspan(left + 0.5, right + 0.5, color=SHADES[n % len(SHADES)], zorder=0, linewidth=0)
                text = names[left] * (ax is axes[0])
                ax.text((left + right + 1) / 2, 1.045 + 0.045 * (n % 2), text, fontsize=9, **CENTRE)
            ax.legend(**BESIDE) if ax.lines else None
        axes[0].set(ylabel="test accuracy of the head", ylim=(-0.02, 1.02), xlim=(0.5, len(rows) + 0.5))
        axes[1].set_yscale("log", nonpositive="mask")
        axes[1].set(ylabel="loss, unweighted")
        axes[2].set(ylabel="share", xlabel="epoch", ylim=(-0.02, 1.02))
        axes[2].locator_params(**WHOLE)


def draw_life(rows, events, classes, path, owner):
    """Which unit stands for what in each epoch; of many, those that change."""
    units, end = rows[0]["units"], rows[-1]["epoch"] + 1
    first = next((row["epoch"] for row in rows if row["labels"]), end)
    changed = {event["unit"] for event in events} - {None}
    told = sorted(changed | {*range(units)} if units <= 25 else changed)
    with figure(path, 9, 1.6 + 0.27 * len(told)) as ax:
        for line, unit in enumerate(told):
            life = [event for event in events if event["unit"] == unit]
            if not life and owner[unit] >= 0:
                life = [{"epoch": first, "event": "", "class": classes[owner[unit]]}]
            for event, after in pairwise([*life, {"epoch": end}]):
                length, name = after["epoch"] - event["epoch"], event["class"]
                if not length or event["event"] in ("released", "merged"):
                    continue
                text = shown(name or "?", 12)
                if event["event"] in ("opened", "split"):
                    look = dict(fc="white", hatch="////", ec="#777777")
                    text += "" if event["purity"] is None else f" {100 * event['purity']:.0f} %"
                else:
                    look = dict(color=style(classes.index(name))["color"])
                ax.barh(line, length, left=event["epoch"] - 0.5, height=0.7, **look)
                if len(text) < 95 * length / end:
                    ax.text(event["epoch"] - 0.3, line, text, va="center", fontsize=7, bbox=BOX)
        arrived = [(e["epoch"], e["class"]) for e in events if e["event"] == "arrived"]
        for epoch in dict(arrived):
            ax.axvline(epoch - 0.5, color="black", lw=0.8, ls=":")
            text = "+ " + ", ".join(shown(name, 12) for at, name in arrived if at == epoch)
            ax.text(epoch - 0.5, len(told), text * (len(arrived) <= 5), fontsize=8, **CENTRE)
        ax.set(xlabel="epoch (+: images arrive; hatched: no name, and the true class)", ylabel="unit")
        ax.set(xlim=(0.5, end - 0.5), ylim=(-0.6, len(told) - 0.4), yticks=range(len(told)), yticklabels=told)
        ax.locator_params(**WHOLE)


@measured
def project(h: Tensor, method="tsne") -> np.ndarray:
    """Embeddings [N,D] -> points [N,2] by "pca", "tsne" or "umap"; else ValueError."""
    from sklearn import decomposition, manifold

    unit = F.normalize(h, dim=1).cpu().numpy()
    if method not in METHODS:
        raise ValueError(f"method is one of {[*METHODS]}, not {method!r}")
    way = decomposition.PCA(2, random_state=0)
    if method == "tsne":
        way = manifold.TSNE(perplexity=min(30, (len(unit) - 1) / 3), init="pca", random_state=0)
    elif method == "umap":
        try:
            from umap import UMAP
        except ImportError:
            raise ValueError("--embedding umap: pip install umap-learn, or use tsne") from None
        way = UMAP(random_state=0)
    return np.zeros((len(unit), 2)) if (unit == unit[0]).all() else way.fit_transform(unit)


def draw_embedding(h, y, classes, path, method="tsne", known=None, seen=None):
    """2,000 embeddings h [N,D] of classes y [N] in two dimensions.

    known, seen: classes at the start, the end (None: all). Late ones are outlined, unseen grey.
    """
    chosen, n = np.random.default_rng(0).permutation(len(y))[:2000], len(classes)
    points, y, known, seen = project(h[chosen], method), y[chosen].cpu().numpy(), known or n, seen or n
    with figure(path, 8 + 3 * (n > 20), 7 + 4 * (n > 20)) as ax:
        for c, name in enumerate(classes):
            mark = style(c) | dict(linewidth=0.5 * (c >= known), edgecolor="black")
            mark |= dict(color="#D5D5D5", edgecolor="#AAAAAA") if c >= seen else {}
            label = shown(name) + (" (late)" if c < seen else " (not seen)") * (c >= known)
            ax.scatter(*points[y == c].T, s=14, alpha=0.8, label=label, **mark)
            if (y == c).any():
                font = dict(fontsize=10 if n <= 20 else 6, bbox=BOX | {"alpha": 0.4}, ha="center")
                ax.text(*np.median(points[y == c], 0), shown(name, 16), va="bottom", **font)
        if n <= 20:
            ax.figure.legend(ncol=5, loc="outside lower center")
        title = f"{len(y):,} test images, embeddings h in two dimensions ({METHODS[method]})"
        ax.set(xticks=[], yticks=[], title=title)


@measured
def draw_confusion(predicted, y, classes, path):
    """Which class is taken for which, in %."""
    n, names = len(classes), [shown(name, 20) for name in classes]
    table = (y * n + predicted).bincount(minlength=n * n).view(n, n).cpu().numpy()
    share, size = 100 * table / table.sum(1, keepdims=True).clip(1), max(4.5, min(0.55 * n, 11))
    with figure(path, size + 1, size) as ax:
        image = ax.imshow(share, "cividis", vmin=0, vmax=100)
        ax.figure.colorbar(image, shrink=0.8, label="% of the true class")
        for i, j in zip(*np.nonzero(share >= 0.5), strict=True) if n <= 20 else ():
            ax.text(j, i, f"{share[i, j]:.0f}", color="black" if share[i, j] > 55 else "white", **CENTRE)
        font = dict(labels=names, fontsize=max(3, min(9, 500 / n)))
        ax.set_xticks(range(n), rotation=90, **font)
        ax.set_yticks(range(n), **font)
        right = f"{len(y):,} test images: {100 * table.trace() / len(y):.1f} % right"
        ax.set(xlabel="predicted", ylabel="true", title=right)


def contact_sheet(path, rows, title):
    """Rows of images: (label, uint8 [n,3,H,W]), or also n captions below."""
    labels, pictures, captions = zip(*((*row, ())[:3] for row in rows or [("none", ())]), strict=True)
    cell, tall = (0.85, 1.42) if any(captions) else (0.45, 1.06)  # inches; in cells
    across, tops = max(6, *map(len, pictures)), np.arange(len(labels)) * tall
    margin = 0.4 + 0.085 * max(len(line) for label in labels for line in label.split("\n"))
    with figure(path, margin + cell * across, 0.7 + cell * tall * len(labels)) as ax:
        for top, images, below in zip(tops, pictures, captions, strict=True):
            for j, image in enumerate(images):
                image = F.adaptive_avg_pool2d(image.float(), min(image.shape[-1], 64)).round().byte()
                ax.imshow(image.permute(1, 2, 0).cpu().numpy(), extent=(j, j + 0.95, top + 0.95, top))
            for j, caption in enumerate(below):
                ax.text(j + 0.475, top + 0.98, caption, ha="center", va="top", fontsize=7, linespacing=1)
        ax.set(xlim=(0, across), ylim=(tall * len(labels), -0.05), xticks=[], aspect="equal", title=title)
        ax.set_yticks(tops + 0.475, labels, fontsize=9)
        ax.tick_params(length=0)
        ax.set_frame_on(False)


def in_lines(label, images, captions):
    """Captioned images [n,3,H,W] as rows."""
    return [(label * (i == 0), images[i : i + 12], captions[i : i + 12]) for i in range(0, len(images), 12)]


@measured
def mistake_rows(x, predicted, confidence, y, classes):
    """The 48 surest mistakes among images x [N,3,H,W], for a contact sheet."""
    order = confidence.argsort(descending=True)
    wrong = order[(predicted != y)[order]][:48]
    names = [shown(name, 12) for name in classes]
    captions = [f"{names[predicted[i]]}\n{100 * confidence[i]:.0f} %, is\n{names[y[i]]}" for i in wrong]
    return in_lines("surest\nfirst", x[wrong], captions)


@measured
def concept_rows(x, h, unit, unknown, names):
    """Rows for a contact sheet: unnamed units, the unknown, named units; from the centre outwards.

    x uint8 [N,3,H,W], h [N,D]; unit int64 [N], -1: none; unknown bool [N]; names: of units, or None.
    """
    rows, labels = [], {u: f"unit {u}" for u, n in enumerate(names) if not n and (unit == u).any()}
    labels |= {-1: "unknown"} | {u: f"{shown(n)} (unit {u})" for u, n in enumerate(names) if n}
    for u, label in labels.items():
        inside = (unknown if u < 0 else unit == u).nonzero()[:, 0]
        near = F.normalize(h[inside], dim=1)
        near = inside[(near @ near.sum(0)).argsort(descending=True)[:20]]
        rows.append((f"{label}\n{len(inside):,} images", x[near]))
    return rows


# ---- runs side by side ----

NEEDED = {"curriculum", "seed", "class_order"}
APART = "seed class_order out resume data_dir device embedding torch commit machine command".split()


def read_runs(path):
    """Settings, summary of each run; else ValueError."""
    try:
        if (path := Path(path)).suffix == ".csv":
            rows = csv.DictReader(path.open(encoding="utf-8-sig"))
            rows = [{str(k): v or None for k, v in row.items()} for row in rows]
            runs = [({k[5:]: v for k, v in row.items() if k[:5] == "args."}, row) for row in rows]
        else:
            runs = [tuple(json.loads((path / n).read_text("utf-8")) for n in ("args.json", "summary.json"))]
        if not runs or not all({*args} >= NEEDED and "labels_used" in summary for args, summary in runs):
            raise ValueError("settings or figures missing")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: no finished run or table ({' '.join(str(error).split())})") from None
    return runs


def runs_among(paths):
    """Runs and tables among paths; a folder stands for its finished runs."""
    folders = {}
    for path in (Path(path).expanduser() for path in paths):
        inside = [] if (path / "args.json").exists() else sorted(path.rglob("args.json"))
        for run in [args.parent for args in inside] or [path]:
            if inside and not (run / "summary.json").exists() or run.is_file() and run.suffix != ".csv":
                say_once(f"{run}: not a finished run, left out")
            else:
                folders[run.resolve()] = run
    return [*folders.values()]


def compare(paths):
    """Group runs (folders, tables) by settings, seeds apart: {name: {"runs": n, figure: values [n], ...}}.

    The name is the curriculum and what differs; rate and budget only within one.
    """
    groups, result = {}, {}
    for args, summary in (run for path in paths for run in read_runs(path)):
        args = {k: v if isinstance(v, str) else json.dumps(v) for k, v in sorted(args.items())}
        key = tuple((k, v) for k, v in args.items() if k not in APART + METRICS)
        groups.setdefault(key, []).append((args, summary))
    settings = [*map(dict, groups)]
    for setting, runs in zip(settings, groups.values(), strict=True):
        name = curriculum = setting["curriculum"]
        for k in dict.fromkeys(k for s in settings for k in s if k != "curriculum"):
            v = setting.get(k, "null")
            others = [s for s in settings if s.get(k, v) != v]
            within = any(s["curriculum"] == curriculum for s in others)
            between = any(s[k] != "null" for s in others) and k not in ("lr", "label_budget")
            if (within or between) and v not in ("null", "false", "[]"):
                name += f" {k.replace('_', '-')}=" + re.sub(r'[]["]|(?<=",) ', "", v)
        name += f" ({len(result) + 1})" * (name in result)
        if len(runs) > len({(args["seed"], args["class_order"]) for args, _ in runs}):
            say_once(f"{name}: {len(runs)} runs repeat a seed: of other code?")
        figures = {key: np.array([summary.get(key) for _, summary in runs], dtype=float) for key in METRICS}
        result[name] = {"runs": len(runs)} | figures
    return result


def spread(values):
    """Mean, sample deviation, or NaN."""
    there = values[~np.isnan(values)]
    return (there.mean() if len(there) else np.nan), (there.std(ddof=1) if len(there) > 1 else np.nan)


def comparison_table(result):
    """A comparison as text."""
    width, lines = max(map(len, result)) + 2, []
    for block in BLOCKS:
        if not all(np.isnan(row[key]).all() for row in result.values() for key in block):
            heads = (key.replace("semi_kmeans", "semi").replace("_per_", "/")[:13] for key in block)
            lines += ["", f"{'':{width}}runs" + "".join(f" {head:>14}" for head in heads)]
            for name, row in result.items():
                cells = [[metric(key, value) for value in spread(row[key])] for key in block]
                cells = [mean + f" ± {std}" * (std != "-") for mean, std in cells]
                lines.append(f"{name:{width}}{row['runs']:4d}" + "".join(f" {cell:>14}" for cell in cells))
    return "\n".join(lines[1:])


def draw_comparison(result, path):
    """Accuracies, mean, std."""
    with figure(path, 9, 1.6 + 0.62 * len(result)) as ax:
        for i, key in enumerate(("accuracy", "probe_leaked", "probe", "knn")):
            mean, std = np.nan_to_num([spread(100 * row[key]) for row in result.values()]).T
            at = np.arange(len(result)) + 0.2 * i - 0.3
            drawn = ax.barh(at, mean, 0.18, xerr=std, color=COLOURS[i], label=key.replace("accuracy", "head"))
            ax.bar_label(drawn, [f"{m:.1f}" if m else "" for m in mean], padding=2, fontsize=8)
        names = [f"{shown(name, 999)}, runs: {row['runs']}" for name, row in result.items()]
        names = [re.sub(r"(.{45}\S*) ", r"\1\n", name) for name in names]
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set(xlabel="test accuracy, %", xlim=(0, 118))
        ax.invert_yaxis()
        ax.legend(**BESIDE)


# ---- the command line ----


def write_compact(source, path):
    """Write a network without dead filters."""
    from train import data, model

    whole = model.load(source)
    small, x = model.compact(whole), torch.rand(32, 3, whole.image_size, whole.image_size)
    data.write_atomically(path, partial(torch.save, model.pack(small)))
    apart = max((embed(whole, x, part) - embed(small, x, part)).abs().max() for part in PARTS)
    size, left = (sum(p.numel() for p in n.encoder.parameters()) for n in (whole, small))
    return f"{path}: {left:,} of {size:,} weights in the encoder; outputs differ by {apart:.1e}"


def predict(source, paths, table):
    """Answers in `table`, a picture; counts."""
    from tqdm import trange

    from train import data, model

    network, files, sheet = model.load(source), data.find_images(paths), table.with_suffix(".png")
    ours = table.exists() and table.read_bytes()[:12] == b"file,answer,"
    if (table.exists() or sheet.exists()) and not ours or sheet.resolve() in map(Path.resolve, files):
        raise ValueError(f"{table} or {sheet} would be replaced; use another --out")
    rows, notes, keys = [], {}, ("answer", "unit", "confidence", "claim")
    for i in trange(0, len(files), 2048, unit="x2048 images", leave=False, disable=None):
        images, errors, told = data.read_images(files[i : i + 2048], network.image_size)
        said = answers(network, images)
        notes |= {note.rpartition(" (")[0]: 0 for note in told}
        columns = said["answer"], *(said[key].tolist() for key in keys[1:])
        for file, error, *values in zip(files[i : i + 2048], errors, *columns, strict=True):
            values = dict(zip(keys, [None] * 4 if error else values, strict=True))
            rows.append({"file": str(file), **values, "error": error})
    if all(row["error"] for row in rows):
        raise ValueError(f"{paths[0]}: none could be read ({rows[0]['error']})")
    data.write_csv(table, rows)
    drawn = attempt(draw_predictions, sheet, files, rows, network.image_size)
    counts = Counter("could not be read" if row["error"] else row["answer"] for row in rows).most_common()
    lines = [f"{count:8,d}  {data.printable(answer)}" for answer, count in counts]
    lines = [data.some([*notes], 4)] * bool(notes) + lines
    return "\n".join([*lines, f"{len(rows):,} images: {table}" + f", {sheet}" * drawn])


def draw_predictions(path, files, rows, size):
    """A sheet of surest, least sure, unknown answers."""
    from train import data

    good = sorted((i for i, row in enumerate(rows) if not row["error"]), key=lambda i: -rows[i]["confidence"])
    told = [i for i in good if rows[i]["answer"] != "unknown"]
    odd, sheet = sorted({*good} - {*told}, key=lambda i: rows[i]["claim"]), []
    for name, chosen in (("surest", told[:24]), ("least\nsure", told[24:][:-25:-1]), ("unknown", odd[:24])):
        captions = [f"{shown(rows[i]['answer'], 14)}\n{100 * rows[i]['confidence']:.0f} %" for i in chosen]
        sheet += in_lines(name, data.read_images([files[i] for i in chosen], size)[0], captions)
    contact_sheet(path, sheet, f"{len(rows):,} images, {len(odd):,} unknown")


def name_units(path, pairs):
    """Name units; a class's name joins the unit to it."""
    from train import VERSION, data

    checkpoint, lines = data.read_checkpoint(path, VERSION), []
    names, owners = checkpoint["names"], dict(enumerate(checkpoint["units"]["owner"]))
    found = [unit for unit, owner in owners.items() if owner == -1]  # UNNAMED
    for pair in pairs:
        parts = re.fullmatch(r"\s*(\d{1,9})\s*=\s*([^\s=].*?)\s*", pair)
        if not parts or not parts[2].isprintable() or re.fullmatch(r"unknown|unit +\d+", parts[2]):
            raise ValueError(f"--name {pair}: write UNIT=NAME (not 'unknown', 'unit N'), as 8=wolf")
        unit, name = int(parts[1]), parts[2]
        if unit not in found:
            state = {-2: "free", None: "not there"}.get(owners.get(unit), "a class's")
            raise ValueError(f"--name {pair}: unit {unit} is {state}; without a class are: {found or 'none'}")
        others = [f", as unit {u} does" for u, known in enumerate(names) if known == name and u != unit]
        names[unit] = checkpoint.setdefault("given", {})[unit] = name
        lines.append(f"unit {unit} answers {name}" + "".join(others))
    if checkpoint["answering"]:
        checkpoint["answering"]["unnamed"] = found
    data.write_atomically(path, partial(torch.save, checkpoint))
    lines += ["if it still trains, it forgets this"] * (not path.with_name("summary.json").exists())
    return "\n".join(lines)


def act(args):
    """Do what was asked; text to print."""
    asked = [f"--{flag}" for flag in ("compact", "predict", "name") if getattr(args, flag)]
    asked += ["--out"] * bool(asked and args.out and not args.predict)
    if asked and len(asked) + len(args.runs) > 2:
        raise ValueError(f"{' and '.join(asked)}: one at a time, of one run")
    out = args.compact or args.out or ("predictions.csv" if args.predict else "comparison.png")
    out, run = Path(out).expanduser(), Path(args.runs[0]).expanduser()
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out} is a folder, or its folder is not there")
    out = out if asked else out.with_suffix(out.suffix or ".png")
    kept = out.exists() and (args.compact or not asked and b"Matplotlib" not in out.read_bytes())
    if kept or out.stem in "concepts confusion curves embedding life mistakes".split():
        raise ValueError(f"{out} is there, or a run's; use another name")
    source = run / "checkpoint.pt" if run.is_dir() else run
    if args.compact:
        return write_compact(source, out)
    if args.name:
        return name_units(source, args.name)
    if args.predict:
        return predict(source, args.predict, Path(f"{out}".removesuffix(".csv") + ".csv"))
    folders = runs_among(args.runs)
    if not folders:
        raise ValueError(f"{run}: not a run folder")
    result = compare(folders)
    return comparison_table(result) + f"\n\nDrawn to {out}." * attempt(draw_comparison, result, out)


def main(argv=None):
    """The command line. Status 0; 2: error."""

    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser()
    parser.error, add = fail, parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="runs, folders, tables (FILE.csv)")
    add("--predict", nargs="+", metavar="PATH", help="answer for images, folders")
    add("--name", action="append", metavar="UNIT=NAME", help="as 8=wolf")
    add("--compact", metavar="FILE", help="network without dead filters")
    add("--out", metavar="FILE", help="default: comparison.png or predictions.csv")
    for stream in sys.stdout, sys.stderr:
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        print(act(parser.parse_args(argv)))
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, csv.Error, KeyboardInterrupt) as error:
        print(f"evaluate.py: error: {' '.join(f'{error}'.split()) or 'stopped'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

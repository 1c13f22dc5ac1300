"""Raise an image encoder by gradual supervision: `python train.py --curriculum gradual`.

One loop: stage -> newcomers and names -> neighbours -> batch -> two views -> encode -> losses -> step -> masks and memory ->
prune -> evaluate -> log -> checkpoint. What it calls is in the other modules, each of which can be used without this one.
`python train.py --help` lists the flags; a run leaves args.json, log.csv, summary.json, checkpoint.pt and figures in its folder.
"""

import argparse
import csv
import ctypes
import importlib.util
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm import tqdm

import augment
import curriculum
import data
import evaluate
import grow_prune
import losses
import model

# What a data set is trained with unless a flag says otherwise. lr is the peak, for SGD with momentum at that batch size.
DEFAULTS = {
    "digits": dict(model="cnn", epochs=60, batch_size=128, lr=0.06),
    "mnist": dict(model="cnn", epochs=15, batch_size=128, lr=0.06),
    "cifar10": dict(model="vgg16", epochs=100, batch_size=128, lr=0.06),
    "cifar100": dict(model="vgg16", epochs=100, batch_size=128, lr=0.06),
    "folder": dict(model="vgg-small", epochs=50, batch_size=128, lr=0.06),
}
TERMS = ("ntxent", "aggregation", "propagation", "supervised")
NEED_BUDGET = ("gradual", "semi", "labels-only")  # the curricula that learn from the label budget
VERSION = 1  # of the checkpoint; raise it when its contents change


# ---- the method -----------------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that a run changes, and so all that a checkpoint holds."""

    network: model.Network
    optimizer: torch.optim.Optimizer
    bank: losses.MemoryBank
    masks: dict[str, Tensor] = field(default_factory=dict)  # of the pruned weights
    rows: list[dict] = field(default_factory=list)  # of log.csv
    first_sight: list[dict] = field(default_factory=list)  # accuracy on each late class when its first labels came
    novelty: list[float] = field(default_factory=list)  # AUROC of each late class when its images came

    def pack(self, args: argparse.Namespace) -> dict:
        """Plain values and tensors."""
        plain = {name: getattr(self, name) for name in ("masks", "rows", "first_sight", "novelty")}
        tensors = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "bank": self.bank.rows}
        return {"version": VERSION, "args": vars(args), **plain, **tensors}

    def unpack(self, checkpoint: dict) -> None:
        """The reverse, on to this state's device."""
        device = self.bank.rows.device
        self.network.load_state_dict(checkpoint["network"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.bank.rows = checkpoint["bank"].to(device)
        self.masks = {name: mask.to(device) for name, mask in checkpoint["masks"].items()}
        self.rows, self.first_sight, self.novelty = (checkpoint[name] for name in ("rows", "first_sight", "novelty"))


def learning_rate(progress: float, peak: float) -> float:
    """Warm-up over 5 % of the run, constant to 60 % so that late classes meet a plastic network, then a cosine to zero."""
    return peak * min(1.0, progress / 0.05, 0.5 * (1 + math.cos(math.pi * curriculum.ramp(progress, 0.6, 1.0))))


def parameter_groups(network: model.Network, weight_decay: float = 5e-4) -> list[dict]:
    """Weights of encoder and projector decay; biases, norms and the cosine head do not."""
    decaying = {name for name in grow_prune.prunable(network) if not name.startswith("head.")}
    groups = [[p for name, p in network.named_parameters() if (name in decaying) == d] for d in (True, False)]
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def one_hot(y: Tensor, known: Tensor, units: int) -> Tensor:
    """Targets [B,units] for classes y [B]; a row of zeros where not known (bool [B])."""
    return F.one_hot(torch.where(known, y, 0), units) * known[:, None]


def scores(network: model.Network, x: Tensor, taught: Tensor, bf16: bool) -> Tensor:
    """Probability [N,C] of each unit among those whose class has had a label (taught: bool, one a class)."""
    logits = evaluate.embed(network, x, "logits", bf16=bf16)
    return logits.masked_fill(~taught[: logits.shape[1]], float("-inf")).softmax(1)


def share(right: Tensor, among: Tensor) -> float | None:
    """The fraction of True in right [N] where among [N] is true; None where it never is."""
    return right[among].float().mean().item() if among.any() else None


def train(args: argparse.Namespace, dataset: data.Dataset, device: torch.device, out: Path, checkpoint: dict | None) -> int:
    """The loop: `dataset` on `device`, into the folder `out`, from `checkpoint` if there is one. Returns the exit status 0."""
    bf16 = has_bf16(device)
    dataset = dataset.to(device)
    images, y, test_x, test_y = dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y
    n, classes, known = len(y), len(dataset.classes), args.known_classes
    leak = data.leak_order(y, args.seed)
    stages = [curriculum.stage(args.curriculum, e, args.epochs, classes, known, args.label_budget, args.prune) for e in range(args.epochs)]

    torch.manual_seed(args.seed)
    units = len(checkpoint["network"]["head.weight"]) if checkpoint else stages[0].classes
    network = model.build(args.model, units, mean=dataset.mean, std=dataset.std).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(network), lr=args.lr, momentum=0.9, nesterov=True)
    bank = losses.MemoryBank(n, network.projector[-1].out_features, device=device)
    state = State(network, optimizer, bank)
    if checkpoint:
        state.unpack(checkpoint)
    if (out / "summary.json").exists():
        print(f"{out} is finished: {args.epochs} of {args.epochs} epochs; nothing to do")
        return 0
    if args.compile:
        network.encoder.compile()
    announce(args, dataset, network, device, bf16, out)

    steps = math.ceil(n / args.batch_size)
    background = max(16, round(0.0064 * n))  # rows looked at: twice the share that the paper takes of ImageNet
    per_cluster = 42  # images in a cluster, as in the paper
    for epoch in range(len(state.rows), args.epochs):
        began = time.perf_counter()
        stage, before = stages[epoch], stages[epoch - 1] if epoch else None
        mix = {term: 0.0 if term in args.without else weight for term, weight in stage.mix.items()}
        # Each epoch has its own seed, so that a resumed run draws what an uninterrupted one would.
        seed = (args.seed << 20) + epoch
        torch.manual_seed(seed)
        draws, generator = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)

        active = y < stage.classes
        labelled = data.label_mask(leak, y, stage.label_fraction, range(stage.named))
        taught = y[labelled].bincount(minlength=classes) > 0  # the classes that have a label
        has_labels = bool(taught.any())
        met, was_taught = 0, torch.zeros_like(taught)
        if before:
            met = before.classes
            was_taught = y[data.label_mask(leak, y, before.label_fraction, range(before.named))].bincount(minlength=classes) > 0

        # Newcomers: their images join the pool, and the memory bank, before anything is learned from them.
        if stage.classes > met:
            new = ((y >= met) & active).nonzero()[:, 0]
            bank.update(new, evaluate.embed(network, images[new], "z", bf16=bf16), momentum=0)
            if was_taught.any():
                surprise = -scores(network, test_x, was_taught, bf16).amax(1)
                is_new = (test_y >= met) & (test_y < stage.classes)
                compared = is_new | was_taught[test_y]
                state.novelty.append(evaluate.novelty_auroc(surprise[compared], is_new[compared]))

        # Names: the first labels of a class give it a unit that points at them, before any gradient step.
        if stage.named > network.head.out_features:
            grow_prune.grow_head(network.head, optimizer, stage.named - network.head.out_features)
        fresh = (taught & ~was_taught).nonzero()[:, 0].tolist() if epoch else []
        for c in fresh:
            grow_prune.imprint(network.head, c, evaluate.embed(network, images[labelled & (y == c)], bf16=bf16))
        for c in (c for c in fresh if c >= known):
            right = scores(network, test_x[test_y == c], taught, bf16).argmax(1) == c
            seen = {"class": dataset.classes[c], "labels": int((labelled & (y == c)).sum()), "accuracy": right.float().mean().item()}
            state.first_sight.append(seen)

        # Neighbours: this epoch's clusters, and what the labelled neighbours say about the rest.
        pool = active.nonzero()[:, 0]
        clusters, pseudo, confidence = None, torch.full_like(y, -1), torch.zeros(n, device=device)
        if mix["aggregation"]:
            clusters = losses.clusterings(bank.rows, active, max(2, round(len(pool) / per_cluster)), generator=generator)
        if mix["propagation"] and has_labels:
            pseudo[pool], confidence[pool] = losses.propagate_labels(
                bank.rows[pool], y[pool], labelled[pool], k=50, temperature=0.1, balance=True
            )

        network.train()
        in_use = taught[: network.head.out_features]
        record = torch.zeros(steps, len(TERMS), device=device)  # read once an epoch: no waiting for a GPU in the loop
        order = data.batches(active, labelled, args.batch_size, steps, stage.labelled_share, draws)
        for step, index in enumerate(tqdm(order, f"epoch {epoch + 1}", steps, unit="step", leave=False, delay=2, disable=None)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch + step / steps) / args.epochs, args.lr)
            view1, view2 = augment.two_views(images[index], dataset.scale, dataset.flip, dataset.color, generator)
            x = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                _, z, logits = network(x)
            z1, z2 = z.chunk(2)
            index2 = index.repeat(2)  # (2B)

            terms, found = {}, None
            if mix["aggregation"] or mix["propagation"]:
                found = losses.neighbours(z, index2, bank, active, background)
            if mix["ntxent"]:
                kind = torch.where(pseudo[index] >= 0, n + pseudo[index], index)  # of the same label, or the same image
                terms["ntxent"] = losses.nt_xent(z1, z2, kind=kind)
            if mix["aggregation"]:
                terms["aggregation"] = losses.local_aggregation(z, index2, bank, clusters, found=found)
            if mix["propagation"] and has_labels:
                onehot = one_hot(pseudo[index2], pseudo[index2] >= 0, len(in_use))
                terms["propagation"] = losses.propagation(z, logits, index2, bank, pseudo, confidence, onehot, in_use, found=found)
            if mix["supervised"] and has_labels:
                terms["supervised"] = losses.supervised(logits, one_hot(y[index2], labelled[index2], len(in_use)), in_use)

            if terms:
                optimizer.zero_grad()
                sum(mix[term] * loss for term, loss in terms.items()).backward()
                optimizer.step()
                grow_prune.apply_masks(network.encoder, state.masks)
            bank.update(index, z1.detach() + z2.detach())
            for term, loss in terms.items():
                record[step, TERMS.index(term)] = loss.detach()
        stop_if_not_finite(record, network, epoch, stage.name)

        if stage.sparsity > 0:
            state.masks = grow_prune.prune_smallest(network.encoder, stage.sparsity)
        trained = time.perf_counter()

        row = measure(args, dataset, state, stage, active, labelled, pseudo, confidence, bf16)
        row |= {f"loss_{t}": loss if t in terms else None for t, loss in zip(TERMS, record.mean(0).tolist(), strict=True)}
        row |= {"images_per_second": steps * args.batch_size / (trained - began), "seconds": time.perf_counter() - began}
        state.rows.append(row)
        write_checkpoint(out / "checkpoint.pt", state.pack(args))
        write_log(out / "log.csv", state.rows)
        print(progress_line(row, args.epochs, state.rows), flush=True)

    write_log(out / "log.csv", state.rows)  # a run stopped between its last checkpoint and here has none of that epoch yet
    finish(args, dataset, state, leak, stages, bf16, out)
    return 0


def measure(
    args: argparse.Namespace,
    dataset: data.Dataset,
    state: State,
    stage: curriculum.Stage,
    active: Tensor,
    labelled: Tensor,
    pseudo: Tensor,
    confidence: Tensor,
    bf16: bool,
) -> dict:
    """Where the network stands after an epoch: a row of log.csv. active, labelled: bool [N]; pseudo, confidence: [N].

    A fixed part of the test images has to do; only the last epoch's accuracies over several classes see all of them.
    """
    y, n, known, classes = dataset.train_y, len(dataset.train_y), args.known_classes, len(dataset.classes)
    test_x, test_y = dataset.test_x, dataset.test_y
    part = torch.randperm(len(test_y), generator=torch.Generator().manual_seed(0))[: max(1000, n // 5)].to(y.device)
    if len(state.rows) < args.epochs - 1:
        test_x, test_y = test_x[part], test_y[part]
        part = slice(None)
    accuracy = old = new = None
    by_class = [None] * classes
    taught = y[labelled].bincount(minlength=classes) > 0
    if taught.any():
        guess = scores(state.network, test_x, taught, bf16).argmax(1)
        right = guess == test_y
        accuracy, old, new = right.float().mean().item(), share(right, test_y < known), share(right, test_y >= known)
        by_class = evaluate.class_accuracy(guess[part], test_y[part], classes)
    hidden = active & ~labelled & (pseudo >= 0)  # where propagation had to guess
    return {
        "epoch": len(state.rows) + 1,
        "stage": stage.name,
        "classes": stage.classes,
        "units": state.network.head.out_features,
        "labels": int(labelled.sum()),
        "labelled": int(labelled.sum()) / n,
        "accuracy": accuracy,
        "old_accuracy": old,
        "new_accuracy": new,
        "pseudo_accuracy": share(pseudo == y, hidden),
        "pseudo_coverage": share(confidence > 0.8, hidden),
        "pseudo_confident_accuracy": share(pseudo == y, hidden & (confidence > 0.8)),
        "sparsity": grow_prune.sparsity_of(state.network.encoder),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        **{f"accuracy_{name}": value for name, value in zip(dataset.classes, by_class, strict=True)},
    }


def stop_if_not_finite(record: Tensor, network: model.Network, epoch: int, stage: str) -> None:
    """Raises FloatingPointError with the first step and loss term, or the weight, that is not finite. record: [steps, terms]."""
    bad = (~record.isfinite()).nonzero()
    if len(bad):
        step, term = bad[0].tolist()
        what = f"the loss '{TERMS[term]}' was {record[step, term].item()} in step {step + 1}"
    else:
        name = next((name for name, p in network.named_parameters() if not p.isfinite().all()), None)
        if name is None:
            return
        what = f"the weight '{name}' is not finite"
    kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "there is no checkpoint yet"
    raise FloatingPointError(f"epoch {epoch + 1} ({stage}): {what}; {kept}. Try a lower --lr")


# ---- what people see ------------------------------------------------------------------------------------------------


def announce(args: argparse.Namespace, dataset: data.Dataset, network: model.Network, device: torch.device, bf16: bool, out: Path):
    """What is about to happen, and the heading of the lines that follow."""
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    late = dataset.classes[args.known_classes :]
    print(f"{args.curriculum}: {len(dataset.train_y):,} images of {args.dataset}, {len(dataset.classes)} classes, {args.epochs} epochs")
    print(f"old classes: {', '.join(dataset.classes[: args.known_classes][:12])}; new ones: {', '.join(late[:12]) or 'none'}")
    if args.curriculum == "gradual" and args.epochs < 15:
        print(f"{args.epochs} epochs are few for a curriculum: stages will run together; 15 or more let new classes arrive one by one")
    print(f"{args.model}, {weights:.2f} M weights, on {where}, {'bfloat16' if bf16 else 'float32'}; writing to {out}\n")
    print("   epoch stage        classes  labels  ntxent  aggreg  propag  superv  accuracy    old    new  pruned  img/s    left")


def percent(value: float | None) -> str:
    """0.1234 -> "12.3%", None -> "-"."""
    return "-" if value is None else f"{100 * value:.1f}%"


def progress_line(row: dict, epochs: int, rows: list[dict]) -> str:
    """One epoch as one line."""
    terms = "  ".join("     -" if row[f"loss_{t}"] is None else f"{row[f'loss_{t}']:6.3f}" for t in TERMS)
    recent = [r["seconds"] for r in rows[-5:]]
    left = round((epochs - row["epoch"]) * sum(recent) / len(recent))
    accuracy, old, new, pruned = (percent(row[k]) for k in ("accuracy", "old_accuracy", "new_accuracy", "sparsity"))
    return (
        f"{row['epoch']:4d}/{epochs:<4d}{row['stage']:12s} {row['classes']:7d}  {row['labels']:6d}  {terms}  "
        f"{accuracy:>8s}  {old:>5s}  {new:>5s}  {pruned:>6s}  {row['images_per_second']:5.0f}  {left // 60:3d}:{left % 60:02d}"
    )


def finish(args: argparse.Namespace, dataset: data.Dataset, state: State, leak: Tensor, stages: list, bf16: bool, out: Path) -> None:
    """The final figures, measured on the last epoch: printed, drawn, and written to summary.json, which ends the run."""
    network, rows, last = state.network, state.rows, state.rows[-1]
    y, test_y, names, known = dataset.train_y, dataset.test_y, dataset.classes, args.known_classes
    budget = data.label_mask(leak, y, args.label_budget, range(len(names)))
    train_h, test_h = (evaluate.embed(network, x, bf16=bf16) for x in (dataset.train_x, dataset.test_x))
    taught = [[row[f"accuracy_{name}"] for name in names[:known]] for row in rows if row["accuracy"] is not None]
    lost = float(np.nanmean(evaluate.forgetting(taught))) if taught else math.nan
    at_sight = [s["accuracy"] for s in state.first_sight]
    clusters = evaluate.cluster_scores(test_h, test_y)
    summary = {
        **{key: last[key] for key in ("accuracy", "old_accuracy", "new_accuracy")},
        "first_sight": sum(at_sight) / len(at_sight) if at_sight else None,
        "probe": evaluate.linear_probe(train_h, y, test_h, test_y),
        "probe_leaked": evaluate.linear_probe(train_h[budget], y[budget], test_h, test_y) if budget.any() else None,
        "knn": evaluate.knn_accuracy(train_h, y, test_h, test_y),
        "cluster_accuracy": clusters.pop("accuracy"),
        **clusters,
        "forgetting": lost if math.isfinite(lost) else None,
        "novelty_auroc": sum(state.novelty) / len(state.novelty) if state.novelty else None,
        "sparsity": last["sparsity"],
        "labels_used": last["labels"],
        "images_per_second": sorted(row["images_per_second"] for row in rows)[len(rows) // 2],
        "seconds": sum(row["seconds"] for row in rows),
        "first_sight_classes": state.first_sight,
        "classes": names,
    }
    pictures = {
        "curves": lambda path: evaluate.draw_curves(rows, names, known, path),
        "curriculum": lambda path: evaluate.draw_curricula({args.curriculum: stages}, path),
        "embedding": lambda path: evaluate.draw_embedding(test_h, test_y, names, path, args.embedding, known),
    }
    if last["accuracy"] is not None:
        guess = scores(network, dataset.test_x, y[budget].bincount(minlength=len(names)) > 0, bf16).argmax(1)
        pictures["confusion"] = lambda path: evaluate.draw_confusion(guess, test_y, names, path)
    for name, draw in pictures.items():
        draw(out / f"{name}.png")
    write_json(out / "summary.json", summary)
    print(f"\n{evaluate.describe(summary, len(y), known)}\n")
    print(f"{out}/: summary.json log.csv checkpoint.pt {' '.join(f'{name}.png' for name in pictures)}")


# ---- files ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it to disk, and only then give it its name: a kill or a full disk leaves the old one whole."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    """A dictionary as JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_log(path: Path, rows: list[dict]) -> None:
    """log.csv from its rows; a figure that does not exist yet is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(path, text.getvalue().encode())


def write_checkpoint(path: Path, state: dict) -> None:
    """Tensors and plain values only, so that torch.load(weights_only=True) reads it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


# ---- machine --------------------------------------------------------------------------------------------------------


def tune_machine(deterministic: bool = False) -> None:
    """TF32 where there is a GPU, no denormals, and a malloc that keeps freed pages instead of giving them back every step."""
    torch.set_float32_matmul_precision("high")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)
    with suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and (features.get("avx512_bf16", False) or features.get("amx_bf16", False))


def provenance() -> dict:
    """What else it takes to run this again: versions, commit, machine."""
    here = Path(__file__).parent
    commit = None
    with suppress(OSError):
        if (here / ".git").exists():
            git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
            commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"versions": versions, "commit": commit, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}


# ---- command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise ValueError(message)


def parser() -> Parser:
    """Every flag, with its unit and its default."""
    parser = Parser(description="Gradual supervision of an image encoder.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what is taught").add_argument
    add("--curriculum", default="gradual", metavar="NAME", help=", ".join(curriculum.CURRICULA))
    add("--label-budget", type=float, default=0.1, metavar="F", help="largest fraction of each class's images whose labels ever leak, 0..1")
    add("--known-classes", type=int, metavar="N", help="classes there from the start; 7 of 10, in proportion, if not given")
    add("--class-order", type=int, default=0, metavar="SEED", help="seed of the order in which classes appear")
    add("--without", nargs="+", default=[], choices=TERMS, metavar="LOSS", help=f"leave out: {', '.join(TERMS)}")
    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="auto",
        metavar="NAME",
        help="digits, mnist, cifar10, cifar100, folder:PATH; auto: cifar10 on a GPU, else digits",
    )
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--per-class", type=int, metavar="N", help="use only N training images of each class; all if not given")
    add("--inject", metavar="DATASET:CLASS,...", help="classes of another data set that arrive last, e.g. cifar100:wolf,tank")
    add = parser.add_argument_group("network and optimiser (defaults by data set)").add_argument
    add("--model", metavar="NAME", help=f"{', '.join(model.CONFIGS)}, or a torchvision classification model")
    add("--epochs", type=int, metavar="N", help="one epoch draws as many images as the training set has")
    add("--batch-size", type=int, metavar="N", help="images a step; each is seen in two views")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--prune", type=float, default=0.8, metavar="SPARSITY", help="fraction of the encoder's weights that end at zero, 0..1")
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=int, default=0, metavar="N", help="of initialisation, subset, label leak, batches and augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--compile", action="store_true", help="compile the encoder: a slow first step, faster ones after it")
    add("--deterministic", action="store_true", help="the same numbers every time on a GPU too, where that costs speed")
    add("--embedding", default="tsne", metavar="METHOD", help="picture of the test embeddings: pca, tsne or umap")
    add("--out", metavar="DIR", help="run folder; the next free runs/DATASET-CURRICULUM-sSEED if not given")
    add("--resume", action="store_true", help="go on with the run in --out, with its settings")
    return parser


def one_of(flag: str, value: str, known: tuple[str, ...] | list[str]) -> None:
    """ValueError, with the nearest name, unless value is known."""
    if value not in known:
        raise ValueError(f"unknown --{flag} '{value}'{data.suggest(value, known)}; use {', '.join(known)}")


def check(args: argparse.Namespace) -> None:
    """Every flag that can be judged without the data. Raises ValueError, in one line."""
    one_of("curriculum", args.curriculum, list(curriculum.CURRICULA))
    one_of("embedding", args.embedding, ["pca", "tsne", "umap"])
    if args.embedding == "umap" and importlib.util.find_spec("umap") is None:
        raise ValueError("--embedding umap needs umap-learn: pip install umap-learn, or use --embedding tsne")
    if not args.dataset.startswith("folder:"):
        one_of("dataset", args.dataset, ["auto", *data.DATASETS, "folder:PATH"])
    fractions = (("label_budget", 0, 1), ("prune", 0, 1), ("lr", 1e-6, 1000))
    counts = (("known_classes", 1), ("per_class", 1), ("epochs", 1), ("batch_size", 2), ("seed", 0), ("class_order", 0))
    for name, low, high in (*fractions, *((name, low, 2**31 - 1) for name, low in counts)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} must be in {low}..{high}, not {value}")
    used = {term for term, weight in curriculum.stage(args.curriculum, 1, 2, 10).mix.items() if weight}
    if used <= set(args.without):
        raise ValueError(f"--without leaves '{args.curriculum}' no loss; keep at least one of {', '.join(sorted(used))}")
    if args.label_budget == 0 and args.curriculum in NEED_BUDGET:
        raise ValueError(f"--label-budget 0 leaves '{args.curriculum}' without labels; use more than 0, or --curriculum self")
    if args.out is not None and not args.resume:
        check_out(Path(args.out))


def check_out(out: Path) -> None:
    """A new run needs a folder that can be written and is empty, but for what a kill left there before it began."""
    try:
        there = next(path for path in (out, *out.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"--out {out} cannot be written ({there} is {'read-only' if there.is_dir() else 'a file'})")
        if there == out and any(path.name != "args.json.part" for path in out.iterdir()):
            raise ValueError(f"--out {out} is not empty; choose another folder, or --resume the run in it")
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror})") from None


def check_data(args: argparse.Namespace, dataset: data.Dataset) -> None:
    """The flags that depend on the data. Raises ValueError, in one line."""
    num_classes, count = len(dataset.classes), dataset.train_y.bincount(minlength=len(dataset.classes))
    if not 1 <= args.known_classes <= num_classes:
        raise ValueError(f"--known-classes must be in 1..{num_classes}, the number of classes, not {args.known_classes}")
    if args.batch_size > len(dataset.train_y):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(dataset.train_y)} training images")
    few = int(count.argmin())
    if args.curriculum in NEED_BUDGET and args.label_budget * int(count[few]) < 0.5:
        raise ValueError(
            f"--label-budget {args.label_budget} gives class '{dataset.classes[few]}' with its {int(count[few])} images no label; "
            f"use at least {1 / int(count[few]):.2g}"
        )


def pick_device(name: str) -> torch.device:
    """The device called `name`, shown to work. Raises ValueError, in one line."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name, dtype=torch.float64)
        probe.item()  # some devices only pretend
        return probe.device
    except Exception as error:
        raise ValueError(f"--device '{name}' cannot be used ({data.reason(error)}); try --device cpu") from None


def run_folder(args: argparse.Namespace) -> Path:
    """A new run folder, with args.json in it. Raises ValueError if it cannot be written."""
    if args.out is None:
        stem = f"runs/{args.dataset.split(':')[0]}-{args.curriculum}-s{args.seed}"
        names = (Path(stem + (f"-{n}" if n > 1 else "")) for n in range(1, 10**6))
        out = next(name for name in names if not name.exists())
    else:
        out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        args.out = str(out)
        write_json(out / "args.json", vars(args) | provenance())
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror})") from None
    return out


# ---- beginning and going on -----------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> data.Dataset:
    """The data of a run, its classes in their order of arrival. Fills in the number of known classes."""
    dataset = data.load_dataset(args.dataset, args.data_dir)
    own = len(dataset.classes)
    if args.inject:
        dataset = data.inject(dataset, args.inject, args.data_dir)
    if args.per_class:
        dataset = data.class_subset(dataset, args.per_class, args.seed)
    if args.known_classes is None:
        args.known_classes = curriculum.default_known(own)
    check_data(args, dataset)
    return data.reorder(dataset, data.class_order(len(dataset.classes), args.class_order, late=len(dataset.classes) - own))


def start(args: argparse.Namespace) -> tuple:
    """A new run: everything checked, the data loaded, the folder made. Raises ValueError, in one line."""
    check(args)
    device = pick_device(args.device)
    if args.dataset == "auto":
        args.dataset = "cifar10" if device.type == "cuda" else "digits"
        if device.type == "cuda":
            print("--dataset auto: cifar10, since there is a GPU; for a minute's run: python train.py --dataset digits")
        else:
            small = "--dataset cifar10 --model vgg-small --per-class 1000 --epochs 30"
            print(f"--dataset auto: digits, since there is no GPU; for CIFAR-10: python train.py {small}")
    for name, value in DEFAULTS.get(args.dataset.partition(":")[0], {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    model.build(args.model, 1)  # refuses a model that cannot be had
    return args, load(args), device, run_folder(args), None


def resume(args: argparse.Namespace, argv: list[str] | None) -> tuple:
    """A run to go on with, its settings from args.json. Raises ValueError if it cannot be, or is asked to change."""
    out = Path(args.out)
    try:
        saved = json.loads((out / "args.json").read_text())
        if not saved.keys() >= vars(args).keys():
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"--resume: {out} holds no run (args.json is missing or damaged)") from None
    free = {"out", "resume", "device", "data_dir", "embedding"}  # what may be different
    again = parser()
    again.set_defaults(**{k: v for k, v in saved.items() if k in vars(args) and k not in free})
    args = again.parse_args(argv)
    checkpoint = None
    if (out / "checkpoint.pt").exists():  # a run that was stopped in its first epoch begins again
        try:
            with zipfile.ZipFile(out / "checkpoint.pt") as file:
                if torn := file.testzip():
                    raise ValueError(f"the checksum of {torn} is wrong")
            checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            saved, version = checkpoint["args"], checkpoint["version"]
        except Exception as error:
            raise ValueError(f"--resume: {out / 'checkpoint.pt'} is damaged ({data.reason(error)})") from None
        if version != VERSION:
            raise ValueError(f"--resume: the checkpoint has version {version}, this program writes {VERSION}")
    for name in sorted(vars(args).keys() - free):
        if saved.get(name) != getattr(args, name):
            raise ValueError(f"--resume: the run was made with --{name.replace('_', '-')} {saved.get(name)}, not {getattr(args, name)}")
    check(args)
    device, dataset = pick_device(args.device), load(args)
    if checkpoint and len(checkpoint["bank"]) != len(dataset.train_y):
        raise ValueError(f"--resume: the run was made with {len(checkpoint['bank'])} training images, now there are {len(dataset.train_y)}")
    return args, dataset, device, out, checkpoint


def way_on(args: argparse.Namespace | None) -> str:
    """What a run that was stopped tells its reader."""
    begun = args is not None and args.out is not None and (Path(args.out) / "args.json").exists()
    return f"go on with: python train.py --resume --out {args.out}" if begun else "the run had not begun"


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the exit status."""
    args = None
    try:
        args = parser().parse_args(argv)
        if args.resume and args.out is None:
            raise ValueError("--resume needs --out, the folder of the run to go on with")
        tune_machine(args.deterministic)
        ready = resume(args, argv) if args.resume else start(args)
    except ValueError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {way_on(args)}", file=sys.stderr)
        return 130
    try:
        return train(*ready)
    except FloatingPointError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train.py: error: {error.filename or args.out}: {error.strerror or error}; {way_on(args)}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"train.py: error: the device is out of memory; use a smaller --batch-size or --model; {way_on(args)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {way_on(args)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

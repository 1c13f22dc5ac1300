"""Train an image encoder by gradual supervision: `python train.py --curriculum gradual`.

One epoch of the loop in `train`:
    1. classes arrive; images that no label explains may open a unit; a class's first labels name a unit
    2. targets: k-means clusters of the memory bank, and pseudo-labels by vote of the labelled images
    3. steps: two views -> encoder -> weighted losses -> SGD -> pruning masks, EMA, memory bank
    4. prune, recompute the EMA's batch norm, evaluate, log, checkpoint

A run leaves args.json, log.csv, events.csv, summary.json, checkpoint.pt and figures in its folder.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads leave the cores to others

import argparse
import copy
import ctypes
import itertools
import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import augment
import curriculum
import data
import evaluate
import grow_prune
import losses
import model

CIFAR = dict(model="vgg16", epochs=100, batch_size=128, lr=0.06, min_steps=1, image_size=32)
DEFAULTS = {  # by data set; lr is the peak of the schedule, min_steps the least number of steps in an epoch
    "digits": CIFAR | dict(model="cnn", epochs=60),
    "mnist": CIFAR | dict(model="cnn", epochs=15),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "folder": CIFAR | dict(model="vgg-small", epochs=50, min_steps=50),
}
TERMS = ("ntxent", "aggregation", "propagation", "supervised")  # of the loss
FIGURES = (
    "accuracy old_accuracy new_accuracy open_accuracy unknown_found novelty_auroc gcd_all gcd_old gcd_new"
)
VERSION = 7  # of the checkpoint format


# ---- what a run is made of ----


@dataclass
class State:
    """Everything that training changes, and that a checkpoint holds."""

    network: model.Network
    ema: model.Network  # mean teacher: it votes, answers, is evaluated and is kept
    optimizer: torch.optim.Optimizer
    bank: losses.MemoryBank
    head: grow_prune.HeadManager  # owner of each unit, the monitor of unknown images, the events
    bf16: bool  # whether the device computes in bfloat16
    masks: dict[str, Tensor] = field(default_factory=dict)  # of the pruned weights, True = kept
    rows: list[dict] = field(default_factory=list)  # of log.csv
    first_sight: list[dict] = field(default_factory=list)  # late classes at the moment of their first labels
    snapshots: list[dict] = field(default_factory=list)  # test embeddings over time, for story.png
    answering: dict | None = None  # what tells unknown images apart, for `evaluate.answers`
    before: float | None = None  # accuracy on the old classes before training, after --from

    MODULES, VALUES = (
        ("network", "ema", "optimizer"),
        "masks rows first_sight snapshots answering before".split(),
    )

    def embed(self, x: Tensor, part: str = "h") -> Tensor:
        """What the EMA makes of images x [N,3,H,W]; see `evaluate.embed`."""
        return evaluate.embed(self.ema, x, part, bf16=self.bf16)

    def state_dict(self) -> dict:
        """Plain values and tensors only, so that torch.load(weights_only=True) reads it."""
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        values = {name: getattr(self, name) for name in self.VALUES}
        return modules | values | self.head.state_dict() | {"bank": self.bank.rows}

    def load_state_dict(self, saved: dict) -> None:
        """Continue from a checkpoint, on this run's device and with its settings of the optimizer."""
        groups, device = self.optimizer.state_dict()["param_groups"], self.bank.rows.device
        for name in self.MODULES:
            own = {"param_groups": groups} if name == "optimizer" else {}
            getattr(self, name).load_state_dict(saved[name] | own)
        self.head.load_state_dict(saved)
        for name in self.VALUES:
            setattr(self, name, saved[name])
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}
        self.bank.rows = saved["bank"].to(device)


def initial_state(args: argparse.Namespace, dataset: data.Dataset, units: int, earlier=None) -> State:
    """A network with `units` output units, or that of an `earlier` run (`--from`), and all that trains it."""
    torch.manual_seed(args.seed)
    y, device, classes = dataset.train_y, dataset.train_x.device, dataset.classes
    bf16, owner = model.supports_bf16(device), range(units)
    network = model.build(args.model, units, mean=dataset.mean, std=dataset.std, image_size=args.image_size)
    if earlier:
        network.load_state_dict(earlier.state_dict())
        owner = [grow_prune.FREE if name is None else classes.index(name) for name in earlier.names]
    network = network.to(device, memory_format=torch.channels_last)
    ema, optimizer = copy.deepcopy(network), model.configure_optimizer(network, args.lr)
    # A random part of the images, in which kinds without a name are looked for.
    watched = data.sample(torch.ones_like(y, dtype=torch.bool), max(3000, 60 * len(classes)), args.seed)

    def embed(network: model.Network, index: Tensor) -> Tensor:
        return evaluate.embed(network, dataset.train_x[index], bf16=bf16)

    networks = (network, ema, optimizer)
    head = grow_prune.HeadManager(networks, embed, y, watched, classes, owner, args.seed)
    bank = losses.MemoryBank(len(y), network.projector[-1].out_features, device=device)
    return State(network, ema, optimizer, bank, head, bf16)


@dataclass
class Targets:
    """What the N images teach in one epoch; the head has U units."""

    mix: dict[str, float]  # weight of each loss term
    active: Tensor  # bool [N], images in the pool
    in_use: Tensor  # bool [U], units in the softmax
    label: Tensor  # int64 [N], unit of the label, or -1
    pseudo: Tensor  # int64 [N], unit of the pseudo-label, or -1
    confidence: Tensor  # float32 [N], of the pseudo-labels
    clusters: Tensor | None  # int64 [3,N], k-means clusters of the memory bank


def make_targets(
    state: State, pool: data.Pool, mix: dict, votes: Tensor, h, align: bool, generator
) -> Targets:
    """Cluster the memory bank, and let the images that vote for a unit decide about all others.

    votes: int64 [N], the unit that an image votes for, UNKNOWN if no label explains it, -1 for no vote; h: unit
    embeddings [N,D] by the EMA, or None; align: scale the votes to the classes' shares of the labels.
    """
    clusters, pseudo = None, torch.full_like(votes, -1)
    confidence, members = (
        torch.zeros(len(votes), device=votes.device),
        pool.active.nonzero()[:, 0],
    )  # (N), (M)
    if mix["aggregation"]:  # 42 images per cluster, as in the paper
        k = max(2, round(len(members) / 42))
        clusters = losses.clusterings(state.bank.rows, pool.active, k, generator=generator)
    if mix["propagation"]:
        unknown = len(state.head.units.owner)  # one more "unit", for the images that no name or unit explains
        labels = votes[pool.labelled].bincount(minlength=unknown + 1)
        expected = (
            labels + (labels > 0).float()
        )  # a class in proportion to its labels; few of them say little
        features = F.normalize(
            torch.cat([state.bank.rows[members], h[members]], dim=1), dim=1
        )  # (M, 128 + D)
        voted = torch.where(votes[members] == grow_prune.UNKNOWN, unknown, votes[members])
        balance = expected if align else True
        label, sure = losses.propagate_labels(
            features, voted, voted >= 0, 50, temperature=0.1, balance=balance
        )
        pseudo[members] = label.masked_fill(label == unknown, -1)
        confidence[members] = sure.masked_fill(label == unknown, 0.0)
    in_use, label = state.head.units.in_use(pool.taught), torch.where(pool.labelled, votes, -1)
    return Targets(mix, pool.active, in_use, label, pseudo, confidence, clusters)


# ---- the step ----


def train_step(
    state: State, dataset, targets: Targets, decay: float, turn: int, generator, index: Tensor
) -> Tensor:
    """One optimizer step on the images `index` [B]; returns the loss of each of TERMS [4].

    Nothing here waits for the device or depends on values, so that a GPU is never idle and the step can be captured
    as a CUDA graph: what persists is changed in place. decay: of the EMA; turn: part of a large bank to search.
    """
    mix, in_use, network = targets.mix, targets.in_use, state.network
    options = (dataset.scale, dataset.flip, dataset.color, generator)
    view1, view2 = augment.two_views(dataset.train_x[index], *options)
    x = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)  # (2B, 3, H, W)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=state.bf16):
        _, z, logits = network(x)  # (2B, 128), (2B, U)
    z1, z2 = z.chunk(2)  # (B, 128) each
    index2 = index.repeat(2)  # (2B)

    terms, bank, near = {}, state.bank, None
    if mix["aggregation"] or mix["propagation"]:
        near = losses.neighbours(z, index2, bank, targets.active, *losses.searched(len(targets.active)), turn)
    if mix["ntxent"]:
        pseudo = targets.pseudo[index]
        kind = torch.where(pseudo >= 0, len(targets.pseudo) + pseudo, index)  # same kind: not a negative
        terms["ntxent"] = losses.nt_xent(z1, z2, kind=kind)
    if mix["aggregation"]:
        terms["aggregation"] = losses.local_aggregation(z, index2, bank, targets.clusters, near)
    if mix["propagation"]:
        together = losses.local_aggregation(
            z, index2, bank, targets.pseudo[None], near, reduction="none"
        )  # (2B)
        onehot = losses.one_hot(targets.pseudo[index2], len(in_use))  # (2B, U)
        named = losses.supervised(logits, onehot, in_use, reduction="none")  # (2B)
        terms["propagation"] = losses.propagation(together, named, targets.confidence[index2])
    if mix["supervised"]:
        onehot = losses.one_hot(targets.label[index2], len(in_use))
        terms["supervised"] = losses.supervised(logits, onehot, in_use)

    state.optimizer.zero_grad()
    sum(mix[term] * loss for term, loss in terms.items()).backward()
    state.optimizer.step()
    grow_prune.apply_masks(network.encoder, state.masks)  # momentum would revive pruned weights
    model.update_ema(state.ema, network, decay)
    bank.update(index, z1.detach() + z2.detach())
    if mix["propagation"] or mix["supervised"]:
        state.head.units.observe(logits.detach().masked_fill(~in_use, float("-inf")).softmax(1))
    return torch.stack([terms[term].detach() if term in terms else z.new_zeros(()) for term in TERMS])


def step_functions(state: State, dataset: data.Dataset, targets: Targets, decay: float, generator) -> list:
    """`train_step` as functions of `index` [B], one for each part of a large memory bank, to be called in turn.

    On a GPU they are CUDA graphs, captured anew every epoch: head, masks and targets are others by then.
    """
    turns = range(losses.searched(len(targets.active))[1])
    functions = [partial(train_step, state, dataset, targets, decay, turn, generator) for turn in turns]
    return (
        functions if generator.device.type != "cuda" else model.capture(functions, state.optimizer, generator)
    )


# ---- the loop ----


def train(args: argparse.Namespace, dataset: data.Dataset, saved: dict | None, earlier) -> None:
    """Train on the device of `dataset`; saved: the checkpoint to go on from; earlier: the network of --from."""
    y, classes, device, out = dataset.train_y, dataset.classes, dataset.train_x.device, Path(args.out)
    steps = max(math.ceil(len(y) / args.batch_size), args.min_steps)
    options = (args.epochs, len(classes), args.known_classes, args.label_budget, args.prune)
    stages = [curriculum.stage(args.curriculum, epoch, *options) for epoch in range(args.epochs)]
    stages = [replace(stage, named=min(stage.named, len(classes) - args.never_named)) for stage in stages]
    taught = torch.tensor([bool(earlier) and name in earlier.names for name in classes])
    leak = data.leak_order(y, args.seed)
    pools = data.pools(stages, y, leak, len(classes), args.known_classes, args.replay, taught)
    units = len(earlier.names) if earlier else stages[0].classes
    state = initial_state(args, dataset, len(saved["names"]) if saved else units, None if saved else earlier)
    if saved:
        state.load_state_dict(saved)
    elif earlier:
        state.before = evaluate_epoch(args, state, dataset, stages[0], pools[0], None, None)["old_accuracy"]
    head, about = (
        state.head,
        {"version": VERSION, "args": vars(args), "fingerprint": data.fingerprint(dataset)},
    )

    def save() -> None:
        checkpoint = state.state_dict() | about | {"names": head.names(pool.taught)}
        data.write_atomically(out / "checkpoint.pt", data.torch_bytes(checkpoint))

    announce(args, dataset, state, steps)
    pool, h = pools[-1], None  # h: unit embeddings [N,D] of all training images by the EMA
    for epoch in range(len(state.rows), args.epochs):
        start = time.perf_counter()
        stage, pool, head.epoch = stages[epoch], pools[epoch], epoch + 1
        mix = stage.mix if pool.taught.any() else stage.mix | {"propagation": 0.0, "supervised": 0.0}
        seed = (
            args.seed << 20
        ) + epoch  # of its own, so that a resumed run draws what an uninterrupted one would
        torch.manual_seed(seed)
        cpu_generator, generator = (
            torch.Generator().manual_seed(seed),
            torch.Generator(device).manual_seed(seed),
        )

        # 1. Classes arrive, unknown images open units, and first labels name them.
        count = y[pool.arrived & (y >= 0)].bincount() if epoch else y[:0]
        for c in count.nonzero()[:, 0].tolist():
            head.log("arrived", c=c, count=int(count[c]))
        unseen = pool.active & ~state.bank.rows.any(dim=1)
        if (mix["aggregation"] or mix["propagation"]) and unseen.any():
            state.bank.update(unseen.nonzero()[:, 0], state.embed(dataset.train_x[unseen], "z"))
        votes = torch.full_like(y, -1)
        if mix["propagation"]:
            h = F.normalize(state.embed(dataset.train_x), dim=1) if h is None else h
            votes = head.discover(pool, h) if stage.discovery else votes
        if epoch or earlier:
            name_new_classes(args, state, dataset, pool, votes)
        votes[pool.labelled] = head.units.of_classes(len(classes))[y[pool.labelled]]

        # 2. Clusters and pseudo-labels.
        targets = make_targets(state, pool, mix, votes, h, args.replay is None, generator)
        if not epoch:
            snapshot(state, dataset, "before", stage.classes)

        # 3. Training steps.
        state.network.train()
        record = torch.zeros(
            steps, len(TERMS), device=device
        )  # read once an epoch: no step waits for the device
        order = (pool.active, pool.labelled, args.batch_size, steps, stage.labelled_share, cpu_generator)
        batches = tqdm(data.batches(*order), f"epoch {epoch + 1}", steps, leave=False, delay=2, disable=None)
        functions = step_functions(state, dataset, targets, 1 - 1 / steps, generator)
        for step, index in enumerate(batches):
            lr = curriculum.learning_rate((epoch + step / steps) / args.epochs, args.lr)
            model.set_learning_rate(state.optimizer, lr)
            record[step] = functions[step % len(functions)](index)
        functions = None  # frees the memory of the CUDA graphs
        stop_if_not_finite(record, state.network, epoch)

        # 4. Prune, evaluate, log, checkpoint.
        if stage.sparsity or args.prune_units:
            filters = curriculum.cubic_sparsity(epoch / max(args.epochs - 1, 1), args.prune_units)
            state.masks = grow_prune.prune(state.network.encoder, stage.sparsity, filters, state.masks)
        grow_prune.apply_masks(state.ema.encoder, state.masks)
        seen = dataset.train_x[data.sample(pool.active, 2048, seed)]
        model.recompute_batchnorm(state.ema, seen, state.bf16)
        h = F.normalize(state.embed(dataset.train_x), dim=1) if mix["propagation"] else None
        trained = time.perf_counter() - start

        row = evaluate_epoch(args, state, dataset, stage, pool, targets, h)
        means = zip(TERMS, record.mean(0).tolist(), strict=True)
        row |= {f"loss_{term}": loss if mix[term] else None for term, loss in means}
        row |= {
            "images_per_second": steps * args.batch_size / trained,
            "seconds": time.perf_counter() - start,
        }
        state.rows.append(row)
        if epoch + 1 == args.epochs or stages[epoch + 1].name != stage.name:
            snapshot(state, dataset, stage.name, stage.classes)
        for name, table, columns in (("log", state.rows, None), ("events", head.events, grow_prune.EVENT)):
            if warning := data.write_table(out / f"{name}.csv", table, columns):
                print(warning, file=sys.stderr)
        save()
        happened = [event for event in head.events if event["epoch"] == epoch + 1]
        print(evaluate.log_line(state.rows, args.epochs, happened), flush=True)
    finish(args, state, dataset, (stages, pools, leak, save))


def name_new_classes(args: argparse.Namespace, state: State, dataset, pool: data.Pool, votes: Tensor) -> None:
    """The first labels of a class give it a unit; how well a late class is recognised then is recorded."""
    head, y, before, test_h = state.head, dataset.test_y, pool.taught_before, None
    for c in (pool.taught & ~before).nonzero()[:, 0].tolist():
        if c < args.known_classes or not before.any():
            head.name_class(pool, c, votes)
            continue
        test_h = state.embed(dataset.test_x) if test_h is None else test_h  # (T, D)
        was = evaluate.fraction(head.predict(test_h, before)[1] == y, before[y])
        head.name_class(pool, c, votes)
        right = head.predict(test_h, before | (torch.arange(len(before), device=y.device) == c))[1] == y
        sight = {"accuracy": evaluate.fraction(right, y == c), "old": evaluate.fraction(right, before[y])}
        labels = int((pool.labelled & (dataset.train_y == c)).sum())
        state.first_sight.append(
            {"class": dataset.classes[c], "labels": labels} | sight | {"old_before": was}
        )


def evaluate_epoch(args: argparse.Namespace, state: State, dataset, stage, pool, targets, h) -> dict:
    """A row of log.csv: accuracies on a fixed part of the test images (in the last epoch on all), the open world.

    Test images of classes that never get a name do not count. targets: of the epoch, or None; h [N,D]: unit
    embeddings of the training images by the EMA, or None.
    """
    head, y, classes, everything = (
        state.head,
        dataset.train_y,
        dataset.classes,
        torch.ones_like(dataset.test_y),
    )
    fixed = data.sample(everything.bool(), max(1000, len(y) // 5), seed=0)
    last, labels = len(state.rows) == args.epochs - 1, int(pool.labelled.sum())
    asked = everything.nonzero()[:, 0] if last else fixed  # (T)
    row = {"epoch": len(state.rows) + 1, "stage": stage.name, "classes": stage.classes, "labels": labels}
    row |= {"labelled": labels / len(y), "units": len(head.units.owner), "unnamed": len(head.units.unnamed())}
    row |= dict.fromkeys((*FIGURES.split(), *(f"accuracy_{name}" for name in classes)))
    if pool.taught.any():
        test_h, test_y = state.embed(dataset.test_x[asked]), dataset.test_y[asked]  # (T, D), (T)
        unit, guess = head.predict(test_h, pool.taught)
        part, nameable = torch.isin(asked, fixed), test_y < len(classes) - args.never_named
        row |= evaluate.epoch_accuracy(guess[nameable], test_y[nameable], args.known_classes)
        row |= evaluate.accuracy_by_class(guess[part], test_y[part], classes)
        if args.curriculum == "gradual" or last:
            near = head.neighborhood(pool, pool.labelled)  # (M)
            near_h = state.embed(dataset.train_x[near]) if h is None else h[near]  # (M, D)
            labelled, limit = pool.labelled[near], grow_prune.threshold(near_h, pool.labelled[near])
            told = {"h": near_h.half(), "labelled": labelled, "limit": limit, "unnamed": head.units.unnamed()}
            state.answering = told | {"temperature": 1.0}
        if args.curriculum == "gradual":
            claims, unnamed = grow_prune.claim(test_h, near_h, labelled), head.units.owners()[unit] < 0
            named = pool.taught[test_y]
            here = named | (test_y < stage.classes)
            row |= evaluate.open_set(claims, limit, unnamed, guess == test_y, named, here)
        if h is not None:
            hidden = (pool.active & ~pool.labelled & (y >= 0)).nonzero()[:, 0]
            unit = head.predict(h[hidden], pool.taught)[0]
            row |= evaluate.gcd_accuracy(unit, y[hidden], ~pool.taught[y[hidden]])
    if targets is not None:
        guessed = pool.active & ~pool.labelled & (targets.pseudo >= 0) & (y >= 0)
        owners = head.units.owners()[targets.pseudo]
        row |= evaluate.pseudo_label_quality(owners, targets.confidence, y, guessed)
    row |= {"sparsity": grow_prune.sparsity_of(state.ema.encoder)}
    return row | {"learning_rate": float(state.optimizer.param_groups[0]["lr"])}


def snapshot(state: State, dataset: data.Dataset, name: str, classes: int) -> None:
    """Keep the embeddings of 300 test images, always the same, for story.png."""
    part = data.sample(torch.ones_like(dataset.test_y, dtype=torch.bool), 300, seed=1)
    h, y = F.normalize(state.embed(dataset.test_x[part]), dim=1).half().cpu(), dataset.test_y[part].cpu()
    state.snapshots.append({"name": name, "epoch": len(state.rows), "classes": classes, "h": h, "y": y})


def stop_if_not_finite(record: Tensor, network: model.Network, epoch: int) -> None:
    """Raises FloatingPointError that names the first loss (record: [steps,4]), or weight, that is not finite."""
    bad = [f"the loss '{TERMS[term]}' of step {s + 1}" for s, term in (~record.isfinite()).nonzero().tolist()]
    bad += [f"the weight '{name}'" for name, p in network.named_parameters() if not p.isfinite().all()]
    if bad:
        raise FloatingPointError(f"epoch {epoch + 1}: {bad[0]} is not finite; try a lower --lr")


def announce(args: argparse.Namespace, dataset: data.Dataset, state: State, steps: int) -> None:
    """What is about to happen, and the heading of the lines that follow."""
    late, size = dataset.classes[args.known_classes :], dataset.train_x.nbytes + dataset.test_x.nbytes
    weights = sum(p.numel() for p in state.network.parameters())
    notes = [
        *dataset.notes,
        f"{args.curriculum}: {len(dataset.train_y):,} images of {args.dataset}, {size / 1e6:,.0f} MB in memory",
        f"classes: {', '.join(dataset.classes[: args.known_classes][:12])}; late: {', '.join(late[:12]) or 'none'}",
        f"{args.epochs} epochs of {steps} steps, {args.epochs * steps:,} in all, {args.batch_size} images in each",
        f"{args.model}, {weights / 1e6:.2f} M weights, on {machine(dataset.train_x.device)}; writing to {args.out}\n",
    ]
    print("\n".join([*notes, evaluate.log_header()]))


def finish(args: argparse.Namespace, state: State, dataset: data.Dataset, plan: tuple) -> None:
    """The final figures of the last epoch: written to summary.json, which ends the run, then printed and drawn.

    plan: Stage and Pool of every epoch, the order in which labels leak, and a function that saves a checkpoint.
    """
    stages, pools, leak, save = plan
    head, rows, classes, y, test_y = state.head, state.rows, dataset.classes, dataset.train_y, dataset.test_y
    pool, out, known, unnamed = pools[-1], Path(args.out), args.known_classes, head.units.unnamed()
    train_h, test_h = state.embed(dataset.train_x), state.embed(dataset.test_x)  # (N, D), (T, D)
    budget = data.label_mask(leak, y, args.label_budget, range(len(classes) - args.never_named))
    summary = evaluate.final_metrics((train_h, y), (test_h, test_y), budget, rows, classes[:known])
    summary |= {"first_sight": evaluate.mean(seen["accuracy"] for seen in state.first_sight)}
    summary |= {
        "first_sight_classes": state.first_sight,
        "classes": classes,
        "old_accuracy_before": state.before,
    }
    summary |= {"opened": sum(event["event"] == "opened" for event in head.events)}
    summary |= {"labels_used": int(torch.stack([pool.labelled for pool in pools]).any(0).sum())}
    pictures = [
        (evaluate.draw_curves, rows, classes, out / "curves.png"),
        (
            evaluate.draw_embedding,
            test_h,
            test_y,
            classes,
            out / "embedding.png",
            args.embedding,
            stages[0].classes,
        ),
        (evaluate.draw_story, state.snapshots, classes, out / "story.png", args.embedding),
    ]
    if pool.taught.any():
        unit, guess = head.predict(train_h, pool.taught)[0], head.predict(test_h, pool.taught)[1]
        here, nameless = pool.active & (y >= 0), (~pool.taught).nonzero()[:, 0].tolist()
        hidden, new = here & ~pool.labelled, ~pool.taught[y]
        summary |= evaluate.gcd_accuracy(unit[hidden], y[hidden], new[hidden])
        summary |= evaluate.open_world(train_h[here], y[here], pool.labelled[here], new[here])
        summary |= evaluate.concept_scores(unit[hidden], y[hidden], unnamed, nameless)
        logits, target = head.logits(test_h, pool.taught), head.units.of_classes(len(classes))[test_y]
        told, temperature = (
            pool.taught[test_y].nonzero()[:, 0],
            1.0,
        )  # half of them fit it, half say its worth
        for key in ("calibration_error_before", "calibration_error"):
            sure, best = (logits / temperature).softmax(1).max(1)  # (T)
            summary[key] = evaluate.calibration_error(sure[told[1::2]], (best == target)[told[1::2]])
            temperature = evaluate.fit_temperature(logits[told[::2]], target[told[::2]])
        state.answering["temperature"] = temperature
        claims = grow_prune.claim(train_h, state.answering["h"], state.answering["labelled"])
        unknown = pool.active & ~pool.labelled & (claims < state.answering["limit"])
        unit = unit.masked_fill(~pool.active | unknown & (head.units.owners()[unit] >= 0), -1)
        names = head.names(pool.taught)
        sheet = evaluate.concept_rows(dataset.train_x, train_h, unit, unknown & (unit < 0), names)
        pictures += [(evaluate.contact_sheet, out / "concepts.png", sheet, "What each unit stands for")]
        sheet = evaluate.mistake_rows(dataset.test_x, guess, sure, test_y, classes)
        pictures += [
            (evaluate.contact_sheet, out / "mistakes.png", sheet, "Surest mistakes on the test images")
        ]
        pictures += [(evaluate.draw_confusion, guess, test_y, classes, out / "confusion.png")]
        pictures += (
            [(evaluate.draw_life, rows, head.events, classes, out / "life.png")] if head.events else []
        )
    save()
    data.write_json(out / "summary.json", summary)
    print(f"\n{evaluate.describe(summary, len(y), known)}\n")
    drawn = [picture[0].__name__ for picture in pictures if evaluate.attempt(*picture)]
    print(f"{out}/: summary.json log.csv events.csv checkpoint.pt and {len(drawn)} pictures")
    if unnamed:
        count = int(torch.isin(unit, torch.tensor(unnamed, device=unit.device)).sum())
        print(
            f"{len(unnamed)} units without a name, for {count:,} images: see {out / 'concepts.png'}, then type"
        )
        print(f"python evaluate.py {shlex.quote(str(out))} {' '.join(f'--name {u}=...' for u in unnamed)}")


# ---- command line ----


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise ValueError(
            message.replace(": must", " must").removeprefix("argument ")
        )  # "--lr must be in ..."


def within(low: float, high: float = 2**31 - 1, kind: type = int):
    """The type of a flag: a number in low..high."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        whole = ", a whole number" * (kind is int)
        raise argparse.ArgumentTypeError(f"must be in {low}..{high}{whole}, not {text!r}")

    return number


def make_parser() -> Parser:
    """Every flag, with its unit and its default."""
    sets = "; ".join(
        f"{k}: {d['model']}, {d['epochs']}, {d['batch_size']}, {d['lr']}" for k, d in DEFAULTS.items()
    )
    parser = Parser(
        epilog=f"Defaults of --model, --epochs, --batch-size and --lr: {sets}.", allow_abbrev=False
    )

    def add(flag: str, help: str, kind=None, default=None, **options) -> None:
        told = "" if default in (None, False) else f" (default: {default})"
        parser.add_argument(flag, type=kind, default=default, help=help + told, **options)

    count, share, path = within(1), within(0, 1, float), os.path.expanduser
    names = [*curriculum.CURRICULA, "all"]
    # what is taught
    add("--curriculum", "what is taught when; all: one after the other", None, "gradual", choices=names)
    add(
        "--label-budget",
        "share of a class's labels that ever leaks: 0.1, but 1 with unlabelled images",
        share,
    )
    add("--known-classes", "classes there from the start: 7 of 10, in proportion; of a folder, all", count)
    add("--late", "NAME,NAME: these classes come late, in this order")
    add("--never-named", "the last N classes never get a label", within(0), 0)
    add("--class-order", "seed of the order in which classes appear", within(0), 0)
    add("--replay", "of earlier classes keep so many images each once a new class comes; else all", count)
    # data
    add("--dataset", "digits, mnist, cifar10, cifar100, folder:PATH; auto: by the device", None, "auto")
    add("--data-dir", "where data sets are, or are downloaded to", path, "data")
    add("--image-size", "pixels, a multiple of 8; else 32", within(8, 224))
    add("--per-class", "use only so many training images of each class", count)
    add(
        "--validate",
        "evaluate on a held-out tenth of the training images",
        bool,
        False,
        nargs="?",
        const=True,
    )
    add("--inject", "classes of another data set that arrive last, e.g. cifar100:wolf,tank")
    # network and optimiser
    add("--from", "run folder: start from its network, head and names", path, dest="origin")
    add("--model", f"{', '.join(model.CONFIGS)}, or a torchvision classification model")
    add("--epochs", "an epoch draws as many images as the training set has", count)
    add("--min-steps", "least number of steps in an epoch: 50 for a folder, else 1", count)
    add("--batch-size", "images per step, each in two views", within(2))
    add("--lr", "peak learning rate", within(1e-6, 1000, float))
    add("--prune", "share of the encoder's weights that end at zero, 0..1", share, 0.8)
    add("--prune-units", "share of the filters before the last layer that end at zero (VGGs)", share, 0.0)
    # the run
    add("--seed", "of everything random but the class order", within(0), 0)
    add("--seeds", "so many runs, counting up from --seed and --class-order, and their comparison", count, 1)
    add("--device", "auto, cpu, cuda, cuda:1, ...", None, "auto")
    add("--embedding", "picture of the test embeddings", None, "tsne", choices=[*evaluate.METHODS])
    add("--out", "run folder; else the next free runs/DATASET-CURRICULUM-sSEED", path)
    add(
        "--resume",
        "go on with the run in this folder (or in --out), with its settings",
        path,
        nargs="?",
        const="",
    )
    return parser


def pick_device(name: str) -> torch.device:
    """The device called `name`, shown to work. Raises ValueError, in one line."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.zeros(1, device=name).item()  # some devices only pretend
        return torch.zeros(1, device=name).device
    except Exception as error:
        raise ValueError(
            f"--device '{name}' cannot be used ({data.reason(error)}); try --device cpu"
        ) from None


def machine(device: torch.device) -> str:
    """What computes, and how precisely, in a few words."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    )
    precision = "bfloat16" if model.supports_bf16(device) else "float32"
    return f"{name}, {torch.get_num_threads()} threads, {precision}"


def tune_machine() -> None:
    """TF32 on a GPU, no denormals, and a malloc that keeps freed pages instead of giving them back every step."""
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    with suppress(OSError, AttributeError):  # glibc only: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        for option in (-3, -1):
            ctypes.CDLL("libc.so.6").mallopt(option, 1 << 30)


def load(args: argparse.Namespace, names: list[str]) -> data.Dataset:
    """The data of a run, its classes in the order of their arrival; fills in the flags that the data decide.

    names: the classes of an earlier run (`--from`), which come first, whether there are images of them or not.
    """
    dataset = data.load_dataset(args.dataset, args.data_dir, image_size=args.image_size)
    own, late = len(dataset.classes), args.late.split(",") if args.late else []
    dataset = data.inject(dataset, args.inject, args.data_dir) if args.inject else dataset
    dataset = data.hold_out(dataset) if args.validate else dataset
    dataset = data.class_subset(dataset, args.per_class, args.seed) if args.per_class else dataset
    if late and (args.known_classes or not {*late} <= {*dataset.classes} - {*names}):
        raise ValueError(f"--late {args.late}: name new classes of the data set, without --known-classes")
    order = data.class_order(len(dataset.classes), args.class_order, late=len(dataset.classes) - own)
    middle = [dataset.classes[c] for c in order if dataset.classes[c] not in {*names, *late}]
    classes = [*dataset.classes, *(name for name in names if name not in dataset.classes)]
    dataset = replace(dataset, classes=classes)
    dataset = data.reorder(dataset, [classes.index(name) for name in (*names, *middle, *late)])
    y, classes = dataset.train_y, dataset.classes

    if args.label_budget is None:
        args.label_budget = 1.0 if (y < 0).any() else 0.1
    if args.known_classes is None:
        known = curriculum.default_known(own) if not args.dataset.startswith("folder:") else len(classes)
        args.known_classes = len(names) or (len(classes) - len(late) if late else known)
    if not args.known_classes <= len(classes) > args.never_named:
        raise ValueError(f"--known-classes and --never-named must fit {len(classes)} classes")
    if args.batch_size > max(2, len(y)):
        args.batch_size = max(2, len(y))
        dataset.notes.append(f"--batch-size lowered to {args.batch_size}, the number of training images")
    for c, name in enumerate(classes[: len(classes) - args.never_named]):
        n = int((y == c).sum())
        if name not in names and not (dataset.test_y == c).any():
            raise ValueError(f"class '{name}' has no test image{' left by --validate' * args.validate}")
        if n and args.label_budget * n < 0.5 and args.curriculum in ("gradual", "semi", "labels-only"):
            raise ValueError(
                f"--label-budget {args.label_budget} leaves '{name}' no label; one is {1 / n:.2g}"
            )
    return dataset


def earlier_run(args: argparse.Namespace) -> tuple:
    """The network of the run that --from names, or None, and its classes in the order of its units."""
    earlier = model.load(Path(args.origin, "checkpoint.pt")) if args.origin else None
    return earlier, list(dict.fromkeys(name for name in earlier.names if name)) if earlier else []


def start(args: argparse.Namespace) -> tuple:
    """A new run: everything checked, the data loaded, the folder made. Raises ValueError, in one line."""
    if args.out and Path(args.out).exists():
        claim_folder(args.out, check_only=True)
    device, (earlier, names) = pick_device(args.device), earlier_run(args)
    if args.dataset == "auto":
        args.dataset = "cifar10" if device.type == "cuda" else "digits"
        print(f"--dataset auto: {args.dataset}, by the device ({device.type})")
    defaults = DEFAULTS.get(args.dataset.partition(":")[0], DEFAULTS["folder"])
    for name, value in (
        defaults | ({"model": earlier.spec, "image_size": earlier.image_size} if earlier else {})
    ).items():
        if earlier and name in ("model", "image_size") and getattr(args, name) not in (None, value):
            raise ValueError(f"--from: the earlier run has --{name.replace('_', '-')} {value}; drop the flag")
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    network = model.build(args.model, 1, image_size=args.image_size)  # refuses a model that cannot be had
    if args.prune_units:
        grow_prune.prune_filters(network.encoder, 0.0)  # and one whose filters cannot be pruned
    dataset = load(args, names).to(device)
    about = {"commit": None, "machine": machine(device), "torch": torch.__version__}
    with suppress(OSError):
        git = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--abbrev=40",
            "--exclude=*",
            "--dirty",
        ]
        about["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    args.out = claim_folder(args.out, f"runs/{args.dataset.split(':')[0]}-{args.curriculum}-s{args.seed}")
    data.write_json(Path(args.out, "args.json"), vars(args) | about)
    return args, dataset, None, earlier


def claim_folder(out: str | None, stem: str = "", check_only: bool = False) -> str:
    """Make the folder `out`, or the next free one of stem, stem-2, ...; of two runs that start at once one gets it."""
    for n in itertools.count(1):
        folder = Path(out or (f"{stem}-{n}" if n > 1 else stem))
        try:
            if not folder.exists() or out and not any(folder.iterdir()):
                if not check_only:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "args.json").touch(exist_ok=False)  # atomic
                return str(folder)
        except FileExistsError:
            pass
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written ({error.strerror})") from None
        if out:
            raise ValueError(f"--out {out} is not empty; choose another folder, or --resume the run in it")


def resume(args: argparse.Namespace, argv: list[str]) -> tuple:
    """A run to go on with, its settings from args.json. Raises ValueError if it cannot be, or is asked to change."""
    out, given = (
        Path(args.resume or args.out or "."),
        {flag.partition("=")[0] for flag in argv if flag[:2] == "--"},
    )
    for flag in sorted(given - {"--resume", "--out", "--device", "--data-dir", "--dataset"}):
        raise ValueError(f"--resume takes {flag} from the run; drop the flag")
    try:
        made = json.loads((out / "args.json").read_text("utf-8"))
        settings = {name: made[name] for name in vars(args)} | {"out": str(out), "resume": None}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--resume: {out} holds no run (args.json is missing, damaged, or of another version)"
        ) from None
    kept = [name for name in ("device", "data_dir", "dataset") if f"--{name.replace('_', '-')}" in given]
    args = argparse.Namespace(**settings | {name: getattr(args, name) for name in kept})
    begun = (out / "checkpoint.pt").exists()  # a run that was stopped in its first epoch begins again
    saved, (earlier, names) = (
        data.read_checkpoint(out / "checkpoint.pt", VERSION) if begun else None,
        earlier_run(args),
    )
    dataset = load(args, names).to(pick_device(args.device))
    if saved and (there := data.fingerprint(dataset)) != (was := saved["fingerprint"]):
        pairs = zip(was["classes"], there["classes"], strict=False)
        other = [f"class '{old}' is now '{new}'" for old, new in pairs if old != new] or [
            "its images are others"
        ]
        raise ValueError(f"--resume: {args.dataset} is not what the run was made with: {other[0]}")
    return args, dataset, saved, earlier


def several(args: argparse.Namespace, argv: list[str]) -> int:
    """All curricula, or all seeds, each run in its own folder, and their comparison. The exit status."""
    names = list(curriculum.CURRICULA) if args.curriculum == "all" else [args.curriculum]
    out, folders = args.resume or args.out or f"runs/{args.curriculum}", []
    kept = [flag for flag in argv if flag not in ("--resume", args.resume)]
    for i, name in itertools.product(range(args.seeds), names):
        folders.append(f"{out}/{name}-s{args.seed + i}")
        print(f"\n{len(folders)} of {args.seeds * len(names)}: {folders[-1]}", flush=True)
        own = [
            "--curriculum",
            name,
            "--seeds",
            1,
            "--seed",
            args.seed + i,
            "--class-order",
            args.class_order + i,
        ]
        begun = ["--resume", folders[-1], "--device", args.device, "--data-dir", args.data_dir]
        todo = begun if Path(folders[-1], "args.json").exists() else [*kept, *own, "--out", folders[-1]]
        if status := main([str(flag) for flag in todo]):
            print(f"for the rest: the same command with --resume {shlex.quote(out)}", file=sys.stderr)
            return status
    return evaluate.main([*folders, "--out", f"{out}/comparison.png"])


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the exit status: 0, 2 after an error, told in one line, 130 when stopped."""
    args, argv, begun = None, sys.argv[1:] if argv is None else argv, False
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a class's name shows "?"
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        args = make_parser().parse_args(argv)
        if args.curriculum == "all" or args.seeds > 1:
            return several(args, argv)
        args, dataset, saved, earlier = start(args) if args.resume is None else resume(args, argv)
        begun = True
        if Path(args.out, "summary.json").exists():
            print(f"{args.out} is finished: {args.epochs} of {args.epochs} epochs; nothing to do")
            return 0
        tune_machine()
        train(args, dataset, saved, earlier)
        return 0
    except KeyboardInterrupt:
        problem, status = "stopped", 130
    except torch.OutOfMemoryError:
        problem, status = (
            "the device is out of memory; use a smaller --batch-size, --image-size or --model",
            2,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        problem, status = data.reason(error), 2
    way_on = f"; go on with: python train.py --resume {shlex.quote(args.out)}" if begun else ""
    print(f"train.py: {'error: ' * (status == 2)}{problem}{way_on}", file=sys.stderr)
    return status


def interrupt(*_) -> None:
    """SIGTERM and SIGHUP end a run as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    sys.exit(main())

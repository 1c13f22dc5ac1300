"""Raise an image encoder by gradual supervision: `python train.py --curriculum gradual`.

One loop: stage -> newcomers and names -> neighbours -> batch -> two views -> encode -> losses -> step -> masks and memory ->
prune -> evaluate -> log -> checkpoint. What it calls is in the other modules, each of which can be used without this one.
`python train.py --help` lists the flags; a run leaves args.json, log.csv, events.csv, summary.json, checkpoint.pt and figures.
"""

import argparse
import copy
import csv
import ctypes
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
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
UNKNOWN = -3  # where an image speaks for a unit: it looks like nothing that has a name
WATCHED = 3000  # of all images, those that are asked every epoch whether names around claim them; 60 a class if that is more
OPEN = ("open_accuracy", "unknown_found", "novelty_auroc")  # figures of a world in which not all has a name
EVENT = ("epoch", "event", "unit", "class", "count", "similarity", "purity")  # the columns of events.csv
TERMS = ("ntxent", "aggregation", "propagation", "supervised")
NEED_BUDGET = ("gradual", "semi", "labels-only")  # the curricula that learn from the label budget
VERSION = 6  # of the checkpoint; raise it when its contents change


# ---- the method -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run is given (to begin with), and all that it changes: see `pack` for what a checkpoint holds of it."""

    args: argparse.Namespace
    dataset: data.Dataset
    leak: Tensor  # int64 [N], from `data.leak_order`
    bf16: bool  # whether the device computes in bfloat16
    network: model.Network
    average: model.Network  # running mean of the network over about an epoch: it answers, is measured and is kept
    optimizer: torch.optim.Optimizer
    bank: losses.MemoryBank
    units: grow_prune.Units
    monitor: grow_prune.ConfusionMonitor
    masks: dict[str, Tensor] = field(default_factory=dict)  # of the pruned weights
    rows: list[dict] = field(default_factory=list)  # of log.csv
    events: list[dict] = field(default_factory=list)  # of events.csv
    first_sight: list[dict] = field(default_factory=list)  # how each late class was recognised when its first labels came
    looks: list[dict] = field(default_factory=list)  # how some test images lay before the first epoch and after each stage

    PARTS = ("masks", "rows", "events", "first_sight", "looks")

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.leak) / self.args.batch_size)

    def pack(self, taught: Tensor) -> dict:
        """Plain values and tensors. taught: bool [C], the classes that have had a label; the units of others have no name yet."""
        state = {name: getattr(self, name) for name in self.PARTS}
        state |= {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer")}
        return state | {
            "version": VERSION,
            "args": vars(self.args),
            "names": [self.dataset.classes[c] if c >= 0 and taught[c] else None for c in self.units.owner],
            "bank": self.bank.rows,
            "units": vars(self.units),
            "monitor": vars(self.monitor),
        }

    def unpack(self, checkpoint: dict) -> None:
        """The reverse, on to this run's device."""
        device = self.bank.rows.device
        own = self.optimizer.state_dict()["param_groups"]  # as this device wants them, not as the one that was left
        self.network.load_state_dict(checkpoint["network"])
        self.average.load_state_dict(checkpoint["average"])
        self.optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": own})
        self.bank.rows = checkpoint["bank"].to(device)
        for name in ("units", "monitor"):
            parts = checkpoint[name].items()
            vars(getattr(self, name)).update({k: v.to(device) if torch.is_tensor(v) else v for k, v in parts})
        for name in self.PARTS:
            setattr(self, name, checkpoint[name])
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}

    def embed(self, x: Tensor, part: str = "h") -> Tensor:
        """What the running mean makes of images x [N,3,H,W]: see `evaluate.embed`."""
        return evaluate.embed(self.average, x, part, bf16=self.bf16)

    def embed_all(self) -> Tensor:
        """The unit embeddings [N,D] that the running mean has of the training images."""
        h = self.embed(self.dataset.train_x)
        return F.normalize(h, dim=1, out=h)

    def predict(self, h: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        """The unit [N] and the class [N] that the head prefers for embeddings h [N,D]: among all in use, and among those with a name."""
        owner = self.units.owners()
        logits = self.average.head(h).detach().masked_fill(~self.units.in_use(taught), float("-inf"))
        return logits.argmax(1), owner[logits.masked_fill(owner < 0, float("-inf")).argmax(1)]

    def note(self, event: str, name: str | None = None, **evidence) -> None:
        """An event of the head's life in this epoch, for the class `name`."""
        self.events.append(dict.fromkeys(EVENT) | {"epoch": len(self.rows) + 1, "event": event, "class": name} | evidence)


@dataclass
class Lesson:
    """What the images teach in an epoch. Of N images, U units:"""

    mix: dict[str, float]  # weight of each term of the loss
    active: Tensor  # bool [N], the images that are there
    in_use: Tensor  # bool [U], the units that take part
    label: Tensor  # int64 [N], the unit that an image is labelled with, or -1
    pseudo: Tensor  # int64 [N], the unit that the others vote for, or -1
    confidence: Tensor  # [N], of these votes
    clusters: Tensor | None  # int64 [H,N]


def parameter_groups(network: model.Network, weight_decay: float = 5e-4) -> list[dict]:
    """Weights of encoder and projector decay; biases, norms and the cosine head do not."""
    decaying = {name for name in grow_prune.prunable(network) if not name.startswith("head.")}
    groups = [[p for name, p in network.named_parameters() if (name in decaying) == d] for d in (True, False)]
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def optimizer_for(network: model.Network, lr: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum. On a GPU the learning rate is a tensor, so that a recorded step (`Recorded`) can follow it: fused, for
    otherwise SGD would read its value, which is to wait for the device."""
    device = next(network.parameters()).device
    rate = {"lr": torch.tensor(lr, device=device), "fused": True} if device.type == "cuda" else {"lr": lr}
    return torch.optim.SGD(parameter_groups(network), momentum=0.9, nesterov=True, **rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all groups; a tensor stays where it is in memory, for a recorded step to find."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def average_of(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def share(right: Tensor, among: Tensor) -> float | None:
    """The fraction of True in right [N] where among [N] is true; None where it never is."""
    return right[among].float().mean().item() if among.any() else None


def vote(remembered: Tensor, seen: Tensor, seeds: Tensor, nobody: int, due: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the images that speak for a unit say about the others: a unit int64 [N], -1 where nobody knows, and the confidence [N].

    By what the bank remembers of them (unit rows [N,D]) and what the running mean sees ([N,D']), equally. Those that look like
    nothing that has a name (UNKNOWN among the seeds int64 [N]) vote for `nobody`, the number of units, and whom they convince is
    taught no name. due: [U+1], how many images a unit is due, in proportion, and nobody; 0 where that is not known; None: the
    votes are not aligned.
    """
    rows = torch.cat([remembered, seen], dim=1)
    F.normalize(rows, dim=1, out=rows)
    spoken = torch.where(seeds == UNKNOWN, nobody, seeds)
    pseudo, confidence = losses.propagate_labels(rows, spoken, spoken >= 0, k=50, temperature=0.1, balance=True, expected=due)
    unknown = pseudo == nobody
    return pseudo.masked_fill(unknown, -1), confidence.masked_fill(unknown, 0.0)


def surroundings(run: Run, now: data.Pool, labelled: Tensor) -> Tensor:
    """The images that are asked whether anybody claims them, and that they are compared with: indices int64 [M].

    The same random images every epoch, as far as they are there, and, to compare with, all that are `labelled` (bool [N]).
    """
    watched = data.sample(torch.ones_like(labelled), max(WATCHED, 60 * len(now.taught)), run.args.seed)
    chosen = labelled.clone()
    chosen[watched] = True
    return (chosen & now.active).nonzero()[:, 0]


def begin(args: argparse.Namespace, dataset: data.Dataset, units: int) -> Run:
    """Everything at its start, on the device of the data set, with so many units."""
    torch.manual_seed(args.seed)
    n, device = len(dataset.train_y), dataset.train_x.device
    network = model.build(args.model, units, mean=dataset.mean, std=dataset.std).to(device, memory_format=torch.channels_last)
    return Run(
        args,
        dataset,
        leak=data.leak_order(dataset.train_y, args.seed),
        bf16=has_bf16(device),
        network=network,
        average=copy.deepcopy(network),
        optimizer=optimizer_for(network, args.lr),
        bank=losses.MemoryBank(n, network.projector[-1].out_features, device=device),
        units=grow_prune.Units(range(units), device=device),
        monitor=grow_prune.ConfusionMonitor(n, device=device),
    )


def train(args: argparse.Namespace, dataset: data.Dataset, device: torch.device, out: Path, checkpoint: dict | None) -> int:
    """The loop: `dataset` on `device`, into the folder `out`, from `checkpoint` if there is one. Returns the exit status 0."""
    if (out / "summary.json").exists():
        print(f"{out} is finished: {args.epochs} of {args.epochs} epochs; nothing to do")
        return 0
    tune_machine(args.deterministic)
    dataset = dataset.to(device)
    images, y = dataset.train_x, dataset.train_y
    classes, known = len(dataset.classes), args.known_classes
    stages = [curriculum.stage(args.curriculum, e, args.epochs, classes, known, args.label_budget, args.prune) for e in range(args.epochs)]
    units = len(checkpoint["network"]["head.weight"]) if checkpoint else stages[0].classes
    run = begin(args, dataset, units)
    if checkpoint:
        run.unpack(checkpoint)
    if args.compile:
        run.network.encoder.compile()
    steps = run.steps
    classroom = data.pools(stages, y, run.leak, classes, known, args.replay)
    announce(run, out)

    h = None  # what the running mean sees of the images at the end of an epoch: unit embeddings [N,D]
    for epoch in range(len(run.rows), args.epochs):
        began = time.perf_counter()
        stage, now = stages[epoch], classroom[epoch]
        mix = {term: 0.0 if term in args.without else weight for term, weight in stage.mix.items()}
        if not now.taught.any():
            mix |= {"propagation": 0.0, "supervised": 0.0}
        # Each epoch has its own seed, so that a resumed run draws what an uninterrupted one would.
        seed = (args.seed << 20) + epoch
        torch.manual_seed(seed)
        draws, generator = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)

        # Newcomers and names. seeds: the unit that an image speaks for, UNKNOWN if for none that there is, -1 if it is silent.
        welcome(run, now, remembered=bool(mix["aggregation"] or mix["propagation"]))
        seeds = torch.full_like(y, -1)
        if mix["propagation"]:
            h = run.embed_all() if h is None else h
            if stage.discovery and "discovery" not in args.without:
                seeds = discover(run, now, h)  # what nobody claims may open a unit
        if epoch:  # in the first, every class that is there has its unit
            name_classes(run, now, seeds)  # the first labels of a class give it one
        if not stage.discovery:
            forget_unnamed(run)  # after the last names were given
        unit_of = run.units.of_classes(classes)
        seeds[now.labelled] = unit_of[y[now.labelled]]

        lesson = prepare(run, mix, now, seeds, h, generator)
        h = None
        if not epoch:
            snapshot(run, "before", stage.classes)
        run.network.train()
        record = torch.zeros(steps, len(TERMS), device=device)  # read once an epoch: no waiting for a GPU in the loop
        order = data.batches(now.active, now.labelled, args.batch_size, steps, stage.labelled_share, draws)
        functions = step_functions(run, lesson, generator)
        for step, index in enumerate(tqdm(order, f"epoch {epoch + 1}", steps, unit="step", leave=False, delay=2, disable=None)):
            set_learning_rate(run.optimizer, curriculum.learning_rate((epoch + step / steps) / args.epochs, args.lr))
            for term, loss in functions[step % len(functions)](index).items():
                record[step, TERMS.index(term)] = loss
        stop_if_not_finite(record, run.network, epoch, stage.name)
        functions = None  # gives the memory of the recordings back, none of which runs any more

        if stage.sparsity or args.prune_units:
            filters = curriculum.cubic_sparsity(epoch / max(args.epochs - 1, 1), args.prune_units)
            run.masks = grow_prune.prune(run.network.encoder, stage.sparsity, filters, run.masks)
        grow_prune.apply_masks(run.average.encoder, run.masks)
        settle(run, images[data.sample(now.active, 2048, seed)])
        h = run.embed_all() if mix["propagation"] else None
        trained = time.perf_counter()

        row = measure(run, stage, now, lesson, h)
        row |= {f"loss_{t}": loss if mix[t] else None for t, loss in zip(TERMS, record.mean(0).tolist(), strict=True)}
        row |= {"images_per_second": steps * args.batch_size / (trained - began), "seconds": time.perf_counter() - began}
        run.rows.append(row)
        if epoch + 1 == args.epochs or stages[epoch + 1].name != stage.name:
            snapshot(run, stage.name, stage.classes)
        write_tables(out, run.rows, run.events)  # before the checkpoint: after a kill between the two, the epoch is run again
        write_checkpoint(out / "checkpoint.pt", run.pack(now.taught))
        happened = [event_line(event) for event in run.events if event["epoch"] == epoch + 1 and event["event"] != "arrived"]
        print("\n".join([progress_line(run.rows, args.epochs), *happened]), flush=True)

    give_memory_back()
    finish(run, stages, classroom, out)
    return 0


def prepare(run: Run, mix: dict[str, float], now: data.Pool, seeds: Tensor, h: Tensor | None, generator: torch.Generator) -> Lesson:
    """The Lesson of an epoch: clusters of what the bank remembers, and pseudo-labels, by vote of the images that speak for a unit.

    seeds: int64 [N], the unit that an image speaks for; h [N,D]: from `embed_all`, needed for propagation.
    """
    clusters, pseudo, confidence = None, torch.full_like(seeds, -1), torch.zeros(len(seeds), device=seeds.device)
    members = now.active.nonzero()[:, 0]
    if mix["aggregation"]:  # 42 images in a cluster, as in the paper
        clusters = losses.clusterings(run.bank.rows, now.active, max(2, round(len(members) / 42)), generator=generator)
    if mix["propagation"]:
        # A class is due images in proportion to its labels (few are a rough measure: one more), if all its images are kept.
        nobody = len(run.units.owner)
        labels = seeds[now.labelled].bincount(minlength=nobody + 1)
        due = labels + (labels > 0).float() if run.args.replay is None else None
        pseudo[members], confidence[members] = vote(run.bank.rows[members], h[members], seeds[members], nobody, due)
    return Lesson(mix, now.active, run.units.in_use(now.taught), torch.where(now.labelled, seeds, -1), pseudo, confidence, clusters)


def step_functions(run: Run, lesson: Lesson, generator: torch.Generator) -> list[Callable[[Tensor], dict[str, Tensor]]]:
    """`learn` as a function of `index` [B], for an epoch: one for each part of a large bank (`losses.searched`), to be called in turn.

    On a GPU they are `Recorded`, and anew every epoch: a recording knows addresses and numbers, and between epochs the head may grow, and
    masks, lesson and the weights of the losses are others.
    """
    every = losses.searched(len(lesson.active))[1]
    functions = [partial(learn, run, lesson, turn, generator=generator) for turn in range(every)]
    if lesson.active.device.type != "cuda":
        return functions
    for p in run.network.parameters():  # the fused SGD fails where only some weights have a momentum; it begins with zeros anyway
        run.optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
    pool = torch.cuda.graph_pool_handle()  # one memory for all: they never run at the same time, and none reads what another left
    return [Recorded(function, generator, pool) for function in functions]


def learn(run: Run, lesson: Lesson, turn: int, index: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
    """A step of training on the images `index` [B]: two views, all losses, the optimizer, masks and memory. The loss of each term.

    Nothing in it waits for the device or depends on values, so that a GPU is never idle and the step can be recorded: what lasts (weights,
    momentum, running statistics, bank, utility) is changed in place, and of all numbers only `index`, the learning rate and what is drawn
    at random differ from step to step. turn: which part of a large bank to look at; generator: None for the global one.
    """
    mix, in_use, network, dataset = lesson.mix, lesson.in_use, run.network, run.dataset
    view1, view2 = augment.two_views(dataset.train_x[index], dataset.scale, dataset.flip, dataset.color, generator)
    x = torch.cat([view1, view2]).contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=run.bf16):
        _, z, logits = network(x)
    z1, z2 = z.chunk(2)
    index2 = index.repeat(2)  # (2B)

    terms, found = {}, None
    if mix["aggregation"] or mix["propagation"]:
        found = losses.neighbours(z, index2, run.bank, lesson.active, *losses.searched(len(lesson.active)), turn)
    if mix["ntxent"]:
        pseudo = lesson.pseudo[index]
        kind = torch.where(pseudo >= 0, len(lesson.pseudo) + pseudo, index)  # of the same label, or the same image
        terms["ntxent"] = losses.nt_xent(z1, z2, kind=kind)
    if mix["aggregation"]:
        terms["aggregation"] = losses.local_aggregation(z, index2, run.bank, lesson.clusters, found=found)
    if mix["propagation"]:
        onehot = losses.one_hot(lesson.pseudo[index2], len(in_use))
        terms["propagation"] = losses.propagation(
            z, logits, index2, run.bank, lesson.pseudo, lesson.confidence, onehot, in_use, found=found
        )
    if mix["supervised"]:
        onehot = losses.one_hot(lesson.label[index2], len(in_use))
        terms["supervised"] = losses.supervised(logits, onehot, in_use)

    if terms:
        run.optimizer.zero_grad()
        sum(mix[term] * loss for term, loss in terms.items()).backward()
        run.optimizer.step()
        grow_prune.apply_masks(network.encoder, run.masks)
        model.follow(run.average, network, decay=1 - 1 / run.steps)
    run.bank.update(index, z1.detach() + z2.detach())
    if mix["propagation"] or mix["supervised"]:
        run.units.observe(logits.detach().masked_fill(~in_use, float("-inf")).softmax(1))
    return {term: loss.detach() for term, loss in terms.items()}


def settle(run: Run, x: Tensor) -> None:
    """Take batch norm's statistics of the running mean anew, from images uint8 [N,3,H,W] as they are; a single one has none.

    While a network changes quickly, the mean of its statistics is not what the mean of its weights makes (as in SWA, arXiv 1803.05407).
    """
    batches = (part.float().div_(255).contiguous(memory_format=torch.channels_last) for part in x.chunk(math.ceil(len(x) / 512)))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=run.bf16):
        if len(x) > 1:
            torch.optim.swa_utils.update_bn(batches, run.average)


# ---- the life of the head -------------------------------------------------------------------------------------------


def welcome(run: Run, now: data.Pool, remembered: bool) -> None:
    """Note which classes arrive; where the memory bank is used, the images that were never seen join it before it is."""
    count = run.dataset.train_y[now.arrived].bincount()
    for c in count.nonzero()[:, 0].tolist() if run.rows else []:
        run.note("arrived", name=run.dataset.classes[c], count=int(count[c]))
    if remembered and (unseen := now.active & ~run.bank.rows.any(dim=1)).any():
        run.bank.update(unseen.nonzero()[:, 0], run.embed(run.dataset.train_x[unseen], "z"))


def discover(run: Run, now: data.Pool, h: Tensor) -> Tensor:
    """Concept before name: images that no names around them claim, epoch after epoch, and that resemble each other, get an unnamed unit.

    h: unit embeddings [N,D] by the running mean, of the images that are there.
    Returns the unnamed unit that an image speaks for, UNKNOWN where it says that nobody knows it, -1 where it says nothing: int64 [N].
    """
    units, monitor, y = run.units, run.monitor, run.dataset.train_y
    seeds = torch.full_like(y, -1)
    if not now.labelled_before.any():
        return seeds
    index = surroundings(run, now, now.labelled_before)
    around, named, watched = h[index], now.labelled_before[index], index[~now.labelled[index]]
    claims, limit = grow_prune.claim(h[watched], around, named), grow_prune.threshold(around, named)
    unit = run.predict(h[watched], now.taught_before)[0]
    unclaimed = claims < limit

    units.age = [age + 1 for age in units.age]
    speaks = torch.full_like(watched, -1)  # the unnamed unit of an image: what it looks like, or what it helped to open
    for u in units.unnamed():
        mine = unclaimed & ((unit == u) | (monitor.concept[watched] == u))
        if mine.sum() < 10:  # fewer than can open one: names around them have come to claim them
            units.owner[u] = grow_prune.FREE
            run.note("released", unit=u, count=int(mine.sum()))
        else:
            speaks[mine] = u
    claims[speaks >= 0] = math.inf  # by the unnamed unit
    group = monitor.look(watched, claims, limit, h[watched], around[named], y[index[named]])
    if group is not None:
        new, _ = open_unit(run, now, grow_prune.UNNAMED, watched[group])
        speaks[speaks == new] = -1  # if the unit was another concept's
        speaks[group] = monitor.concept[watched[group]] = new
        kinds = y[watched[group]].bincount(minlength=len(now.taught))  # true classes, for the record only
        alike = h[watched[group]]
        run.note(
            "opened",
            unit=new,
            name=run.dataset.classes[int(kinds.argmax())],
            count=len(group),
            similarity=float((alike @ F.normalize(alike.mean(0), dim=0)).mean()),
            purity=float(kinds.max() / len(group)),
        )
    seeds[watched] = torch.where(unclaimed & (speaks < 0), UNKNOWN, speaks)
    return seeds


def forget_unnamed(run: Run) -> None:
    """Where nothing is discovered any more, units that never got a name are nobody's."""
    for unit in run.units.unnamed():
        run.units.owner[unit] = grow_prune.FREE
        run.note("released", unit=unit)


def open_unit(run: Run, now: data.Pool, owner: int, index: Tensor) -> tuple[int, str]:
    """A unit for `owner` in the head and in its running mean, pointed at the images `index` (`imprint`); "grown" or "recycled"."""
    unit, how = run.units.take(run.network.head, run.optimizer, owner)
    run.monitor.concept[run.monitor.concept == unit] = -1  # what it stood for before
    if how == "grown":
        grow_prune.grow_head(run.average.head, None)
    for name, parameter in run.network.head.named_parameters():
        run.average.head.get_parameter(name).data[unit] = parameter.data[unit]
    imprint(run, now, unit, index)
    return unit, how


def imprint(run: Run, now: data.Pool, unit: int, index: Tensor, learner: bool = True) -> None:
    """Point a unit at the images `index`, in the running mean and, if `learner`, in the network that it is the mean of.

    Does nothing with `--new-unit random`. The mean answers, and it alone heeds the labelled images of other classes: the bias that
    this takes would hold the learner back; in the mean it fades within an epoch or two, as the learner finds out what belongs to
    the unit.
    """
    if run.args.new_unit == "random":
        return
    x, y, before = run.dataset.train_x, run.dataset.train_y, now.labelled_before
    if learner:
        grow_prune.imprint(run.network.head, unit, evaluate.embed(run.network, x[index], bf16=run.bf16))
    others = data.sample(before & (y != run.units.owner[unit]), 1000, run.args.seed)
    rivals = run.units.in_use(now.taught_before)
    grow_prune.imprint(run.average.head, unit, run.embed(x[index]), run.embed(x[others]), rivals=rivals)


def name_classes(run: Run, now: data.Pool, seeds: Tensor) -> None:
    """The first labels of each class give it a unit, and how well late classes are recognised at that moment is noted."""
    test_y, before = run.dataset.test_y, now.taught_before
    new = (now.taught & ~before).nonzero()[:, 0].tolist()
    late = [c for c in new if c >= run.args.known_classes and before.any()]
    test_h = run.embed(run.dataset.test_x) if late else None
    for c in new:
        index = (now.labelled & (run.dataset.train_y == c)).nonzero()[:, 0]
        if c not in late:
            give_unit(run, now, c, index, seeds)
            continue
        old, taught = before[test_y], before.clone()
        taught[c] = True
        was = run.predict(test_h, before)[1] == test_y
        few = few_labels(run, now, c, test_h, was)
        give_unit(run, now, c, index, seeds)
        right = run.predict(test_h, taught)[1] == test_y
        sight = {"accuracy": share(right, test_y == c), "lost": share(was, old) - share(right, old)}
        run.first_sight.append({"class": run.dataset.classes[c], "labels": len(index), **sight, **few})


def give_unit(run: Run, now: data.Pool, c: int, index: Tensor, seeds: Tensor) -> None:
    """A unit for class c, whose first labelled images are `index`.

    It is the one that more of them fall into than into any other, if that has no name; else the class's own, if it was there from
    the start; else a redundant or a new one.
    """
    units = run.units
    logits = run.embed(run.dataset.train_x[index], "logits") - run.average.head.bias.detach()
    nearest = logits.masked_fill(~units.in_use(now.taught_before), float("-inf")).argmax(1)  # a modest unit counts in full
    count = nearest.bincount(minlength=len(units.owner))
    unit, own = int(count.argmax()), units.owner.index(c) if c in units.owner else None  # own: of a class known from the start
    event = {"name": run.dataset.classes[c], "count": len(index)}
    if units.owner[unit] == grow_prune.UNNAMED:
        if own is not None:
            units.owner[own] = grow_prune.FREE
            run.note("released", unit=own)
        units.owner[unit], units.age[unit] = c, 0
        run.note("named", unit=unit, purity=float(count[unit] / len(index)), **event)
        founders = (seeds == unit).nonzero()[:, 0]  # what it was opened with and what has a name now, together
        imprint(run, now, unit, torch.cat([index, founders]), learner=False)
    elif own is not None:
        imprint(run, now, own, index)
    else:
        unit, how = open_unit(run, now, c, index)
        seeds[seeds == unit] = UNKNOWN  # what spoke for it when it was another's
        run.note(how, unit=unit, **event)


def few_labels(run: Run, now: data.Pool, c: int, test_h: Tensor, right: Tensor) -> dict[str, float]:
    """What a unit made of the first few labels of class c would do at this moment (grow_prune.first_sight).

    test_h [T,D]: embeddings of the test images; right: bool [T], which of them are told by now.
    """
    x, y, test_y = run.dataset.train_x, run.dataset.train_y, run.dataset.test_y
    first = (y == c).nonzero()[:, 0]
    first = first[run.leak[first].argsort()[: max(grow_prune.FEW)]]
    others = data.sample(now.labelled_before, 1000, run.args.seed)
    named = run.units.in_use(now.taught_before) & (run.units.owners() >= 0)
    compared = now.taught_before[test_y] | (test_y == c)
    seen = run.embed(x[first]), run.embed(x[others]), test_h[compared], (test_y == c)[compared], right[compared]
    return grow_prune.first_sight(run.average.head, named, *seen)


def measure(run: Run, stage: curriculum.Stage, now: data.Pool, lesson: Lesson, h: Tensor | None) -> dict:
    """Where the network stands after an epoch: a row of log.csv. h [N,D]: unit embeddings of the training images, if at hand.

    A fixed part of the test images has to do. The last epoch asks all of them, but goes by this part in the accuracy of each class,
    which is compared with that of earlier epochs.
    """
    args, dataset, n, classes = run.args, run.dataset, len(lesson.label), run.dataset.classes
    everything = torch.ones_like(dataset.test_y, dtype=torch.bool)
    fixed = data.sample(everything, max(1000, n // 5), seed=0)
    asked = everything.nonzero()[:, 0] if len(run.rows) == args.epochs - 1 else fixed
    test_y, part = dataset.test_y[asked], torch.isin(asked, fixed)
    figures, by_class = dict.fromkeys(("accuracy", "old_accuracy", "new_accuracy", *OPEN)), [None] * len(classes)
    if now.taught.any():
        test_h = run.embed(dataset.test_x[asked])
        unit, guess = run.predict(test_h, now.taught)
        right, late = guess == test_y, test_y >= args.known_classes
        figures |= {"accuracy": right.float().mean().item(), "old_accuracy": share(right, ~late), "new_accuracy": share(right, late)}
        by_class = evaluate.class_accuracy(guess[part], test_y[part], len(classes))
        if args.curriculum == "gradual":
            figures |= open_set(run, stage, now, h, test_h, test_y, unit, right)
    hidden = now.active & ~now.labelled & (lesson.pseudo >= 0)  # where propagation had to guess
    right, sure = run.units.owners()[lesson.pseudo] == dataset.train_y, lesson.confidence > 0.8  # of interest where `hidden`
    return {
        "epoch": len(run.rows) + 1,
        "stage": stage.name,
        "classes": stage.classes,
        "units": len(run.units.owner),
        "unnamed": len(run.units.unnamed()),
        "labels": int(now.labelled.sum()),
        "labelled": int(now.labelled.sum()) / n,
        **figures,
        "pseudo_accuracy": share(right, hidden),
        "pseudo_coverage": share(sure, hidden),
        "pseudo_confident_accuracy": share(right, hidden & sure),
        "sparsity": grow_prune.sparsity_of(run.average.encoder),
        "learning_rate": float(run.optimizer.param_groups[0]["lr"]),
        **{f"accuracy_{name}": value for name, value in zip(classes, by_class, strict=True)},
    }


def open_set(
    run: Run, stage: curriculum.Stage, now: data.Pool, h: Tensor | None, test_h: Tensor, test_y: Tensor, unit: Tensor, right: Tensor
) -> dict:
    """How well it is told which test images have no name yet.

    h [N,D]: as in `measure`; test_h [T,D], test_y [T]: the test images; unit [T]: what the head prefers for them; right: bool [T],
    whether that is their class, "unknown" not being an answer.
    """
    index = surroundings(run, now, now.labelled)
    around, named = run.embed(run.dataset.train_x[index]) if h is None else h[index], now.labelled[index]
    claims = grow_prune.claim(test_h, around, named)
    nobody = (claims < grow_prune.threshold(around, named)) | (run.units.owners()[unit] < 0)
    met = now.taught[test_y]
    here = met | (test_y < stage.classes)
    accuracy = torch.where(met, right & ~nobody, nobody).float().mean().item()
    novelty = evaluate.novelty_auroc(-claims[here], ~met[here]) if (here & ~met).any() else None
    return dict(zip(OPEN, (accuracy, share(nobody, ~met), novelty), strict=True))


def snapshot(run: Run, name: str, classes: int) -> None:
    """Keep the embeddings of 300 test images, always the same, for a picture of how they came to lie where they do."""
    part = data.sample(torch.ones_like(run.dataset.test_y, dtype=torch.bool), 300, seed=1)
    h, y = F.normalize(run.embed(run.dataset.test_x[part]), dim=1).half().cpu(), run.dataset.test_y[part].cpu()
    run.looks.append({"name": name, "epoch": len(run.rows), "classes": classes, "h": h, "y": y})


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


def announce(run: Run, out: Path) -> None:
    """What is about to happen, and the heading of the lines that follow."""
    args, dataset = run.args, run.dataset
    weights, where = sum(p.numel() for p in run.network.parameters()) / 1e6, machine(dataset.train_x.device)
    late = dataset.classes[args.known_classes :]
    print(f"{args.curriculum}: {len(dataset.train_y):,} images of {args.dataset}, {len(dataset.classes)} classes, {args.epochs} epochs")
    print(f"old classes: {', '.join(dataset.classes[: args.known_classes][:12])}; new ones: {', '.join(late[:12]) or 'none'}")
    if args.curriculum == "gradual" and args.epochs < 15:
        print(f"{args.epochs} epochs are few for a curriculum: its stages will run together; 15 or more keep them apart")
    print(f"{args.model}, {weights:.2f} M weights, on {where}; writing to {out}\n")
    print("   epoch stage        classes  labels  ntxent  aggreg  propag  superv  accuracy    old    new   open  pruned  img/s    left")


def percent(value: float | None) -> str:
    """0.1234 -> "12.3%", None -> "-"."""
    return "-" if value is None else f"{100 * value:.1f}%"


def progress_line(rows: list[dict], epochs: int) -> str:
    """The latest epoch as one line; open: accuracy where "unknown" is the right answer for classes without a label."""
    row = rows[-1]
    terms = "  ".join("     -" if row[f"loss_{t}"] is None else f"{row[f'loss_{t}']:6.3f}" for t in TERMS)
    recent = [r["seconds"] for r in rows[-5:]]
    left = round((epochs - row["epoch"]) * sum(recent) / len(recent))
    columns = ("accuracy", "old_accuracy", "new_accuracy", "open_accuracy", "sparsity")
    accuracy, old, new, unknown, pruned = (percent(row[k]) for k in columns)
    return (
        f"{row['epoch']:4d}/{epochs:<4d}{row['stage']:12s} {row['classes']:7d}  {row['labels']:6d}  {terms}  "
        f"{accuracy:>8s}  {old:>5s}  {new:>5s}  {unknown:>5s}  {pruned:>6s}"
        f"  {row['images_per_second']:5.0f}  {left // 60:3d}:{left % 60:02d}"
    )


def event_line(event: dict) -> str:
    """An event of the head's life as one line under its epoch."""
    told = f"unit {event['unit']}" + (f" for class {event['class']}" if event["class"] else "")
    evidence = [f"{event['count']} images"] if event["count"] is not None else []
    evidence += [f"{100 * event['purity']:.0f} % pure"] if event["purity"] is not None else []
    return f"         {event['event']}: {told}" + (f" ({', '.join(evidence)})" if evidence else "")


def finish(run: Run, stages: list[curriculum.Stage], classroom: list[data.Pool], out: Path) -> None:
    """The final figures, measured on the last epoch: printed, drawn, and written to summary.json, which ends the run."""
    args, dataset, rows, last = run.args, run.dataset, run.rows, run.rows[-1]
    y, test_y, names, known = dataset.train_y, dataset.test_y, dataset.classes, args.known_classes
    budget = data.label_mask(run.leak, y, args.label_budget, range(len(names)))
    train_h, test_h = (run.embed(x) for x in (dataset.train_x, dataset.test_x))
    old = [[row[f"accuracy_{name}"] for name in names[:known]] for row in rows if row["accuracy"] is not None]
    lost = float(np.nanmean(evaluate.forgetting(old))) if old else math.nan
    clusters = evaluate.cluster_scores(test_h, test_y)
    summary = {
        **{key: last[key] for key in ("accuracy", "old_accuracy", "new_accuracy")},
        "first_sight": average_of(seen["accuracy"] for seen in run.first_sight),
        "first_sight_5": average_of(seen["imprint_5"] for seen in run.first_sight),
        "probe": evaluate.linear_probe(train_h, y, test_h, test_y),
        "probe_leaked": evaluate.linear_probe(train_h[budget], y[budget], test_h, test_y) if budget.any() else None,
        "knn": evaluate.knn_accuracy(train_h, y, test_h, test_y),
        "cluster_accuracy": clusters.pop("accuracy"),
        **clusters,
        "forgetting": lost if math.isfinite(lost) else None,
        "novelty_auroc": average_of(row["novelty_auroc"] for row in rows if row["novelty_auroc"] is not None),
        "opened": sum(event["event"] == "opened" for event in run.events),
        "open_accuracy": last["open_accuracy"],
        "sparsity": last["sparsity"],
        "labels_used": int(torch.stack([pool.labelled for pool in classroom]).any(0).sum()),
        "label_epochs": sum(row["labels"] for row in rows),
        "images_per_second": sorted(row["images_per_second"] for row in rows)[len(rows) // 2],
        "seconds": sum(row["seconds"] for row in rows),
        "first_sight_classes": run.first_sight,
        "classes": names,
    }
    evaluate.draw_curves(rows, names, known, out / "curves.png")
    evaluate.draw_curricula({args.curriculum: stages}, out / "curriculum.png")
    evaluate.draw_embedding(test_h, test_y, names, out / "embedding.png", args.embedding, known)
    evaluate.draw_story(run.looks, names, known, out / "story.png", args.embedding)
    if run.events:
        evaluate.draw_life(rows, run.events, names, known, out / "life.png")
    if last["accuracy"] is not None:
        evaluate.draw_confusion(run.predict(test_h, classroom[-1].taught)[1], test_y, names, out / "confusion.png")
    write_json(out / "summary.json", summary)
    print(f"\n{evaluate.describe(summary, len(y), known)}\n")
    print(f"{out}/: summary.json log.csv events.csv checkpoint.pt {' '.join(sorted(p.name for p in out.glob('*.png')))}")


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


def write_tables(out: Path, log: list[dict], events: list[dict]) -> None:
    """log.csv and events.csv; a figure that does not exist is left empty."""
    for name, rows, columns in (("log.csv", log, log[0].keys()), ("events.csv", events, EVENT)):
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write_atomically(out / name, text.getvalue().encode())


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
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.set_flush_denormal(True)
    with suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def give_memory_back() -> None:
    """Return the pages that malloc keeps, before work of another kind that could not use them."""
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Recorded:
    """A function of a tensor on a GPU, repeated from a recording (a CUDA graph).

    A small network's step is a thousand short kernels, which Python starts more slowly than the GPU is done with them. The first call runs
    as usual, for libraries to set up what they need. The second is recorded: its kernels are noted down with the addresses that
    they use. From then on all of them are started at once. So everything that the function touches must stay at its address, x must keep
    its shape, and what is returned is overwritten by the next call. generator: what it draws random numbers from; pool: memory
    shared with other recordings.
    """

    def __init__(self, function: Callable[[Tensor], dict[str, Tensor]], generator: torch.Generator, pool: tuple[int, int]):
        self.function, self.generator, self.pool = function, generator, pool
        self.x = self.graph = None

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        if self.x is None:
            self.x = x.clone()
            return self.function(x)
        self.x.copy_(x)
        if self.graph is None:
            self.graph, self.result = self.record()
        self.graph.replay()
        return self.result

    def record(self) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        """The graph, and where its result will be; nothing is computed yet."""
        with torch.cuda.device(self.x.device):
            graph = torch.cuda.CUDAGraph()
            if torch.__version__ < "2.14":  # later versions see by themselves which generators are used
                graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.pool):
                return graph, self.function(self.x)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and (features.get("avx512_bf16", False) or features.get("amx_bf16", False))


def machine(device: torch.device) -> str:
    """What computes, and how precisely, in a few words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return f"{name}, {torch.get_num_threads()} threads, {'bfloat16' if has_bf16(device) else 'float32'}"


def provenance(device: torch.device) -> dict:
    """What else it takes to run this again: versions, commit, machine."""
    here = Path(__file__).parent
    commit = None
    with suppress(OSError):
        if (here / ".git").exists():
            git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
            commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions |= {name: metadata.version(name) for name in ("numpy", "scikit-learn")}
    return {"versions": versions, "commit": commit, "machine": machine(device)}


# ---- command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise ValueError(message.replace(": must", " must").removeprefix("argument "))  # "--lr must be in ..."


def within(low: float, high: float = 2**31 - 1, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """The type of a flag: a whole number, or one of another kind, in low..high."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        shown = text if text and text.isprintable() else repr(text)
        raise argparse.ArgumentTypeError(f"must be in {low}..{high}{', a whole number' * (kind is int)}, not {shown}")

    return number


def parser() -> Parser:
    """Every flag, with its unit and its default."""
    sets = "; ".join(f"{name}: {d['model']}, {d['epochs']} epochs, {d['batch_size']}, {d['lr']}" for name, d in DEFAULTS.items())
    parser = Parser(
        description="Gradual supervision of an image encoder.",
        epilog=f"--model, --epochs, --batch-size and --lr by data set, where they are not given: {sets}.",
        allow_abbrev=False,
    )

    def group(title: str) -> Callable:
        flags = parser.add_argument_group(title)

        def add(flag: str, help: str, **options):
            told = " (default: %(default)s)" if options.get("default") not in (None, []) else ""
            flags.add_argument(flag, help=help + told, **options)

        return add

    part = within(0, 1, float)
    add = group("what is taught")
    add("--curriculum", default="gradual", metavar="NAME", help=f"{', '.join(curriculum.CURRICULA)}; all: one after the other")
    add("--label-budget", type=part, default=0.1, metavar="F", help="largest fraction of each class's images whose labels ever leak, 0..1")
    add("--known-classes", type=within(1), metavar="N", help="classes there from the start; 7 of 10, in proportion, if not given")
    add("--class-order", type=within(0), default=0, metavar="SEED", help="seed of the order in which classes appear")
    add(
        "--without",
        nargs="+",
        default=[],
        choices=(*TERMS, "discovery"),
        metavar="PART",
        help=f"leave out: {', '.join(TERMS)}, discovery (which needs propagation)",
    )
    add("--new-unit", default="imprint", metavar="HOW", help="how a unit begins: imprint (where its first images lie) or random")
    add("--replay", type=within(1), metavar="N", help="of classes seen earlier keep N images each once a new class comes; all if not given")
    add = group("data")
    add(
        "--dataset",
        default="auto",
        metavar="NAME",
        help="digits, mnist, cifar10, cifar100, folder:PATH; auto: cifar10 on a GPU, else digits",
    )
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are, or are downloaded to")
    add("--per-class", type=within(1), metavar="N", help="use only N training images of each class; all if not given")
    add("--validate", action="store_true", help="measure on a tenth of the training images, held out, instead of the test images")
    add("--inject", metavar="DATASET:CLASS,...", help="classes of another data set that arrive last, e.g. cifar100:wolf,tank")
    add = group("network and optimiser (defaults by data set: below)")
    add("--model", metavar="NAME", help=f"{', '.join(model.CONFIGS)}, or a torchvision classification model")
    add("--epochs", type=within(1), metavar="N", help="one epoch draws as many images as the training set has")
    add("--batch-size", type=within(2), metavar="N", help="images a step; each is seen in two views")
    add("--lr", type=within(1e-6, 1000, float), metavar="X", help="peak learning rate")
    add("--prune", type=part, default=0.8, metavar="SPARSITY", help="fraction of the encoder's weights that end at zero, 0..1")
    add("--prune-units", type=part, default=0.0, metavar="SHARE", help="fraction of filters before the last layer to end at zero (VGGs)")
    add = group("the run")
    add("--seed", type=within(0), default=0, metavar="N", help="of initialisation, subset, label leak, batches and augmentation")
    add("--seeds", type=within(1), default=1, metavar="N", help="N runs, counting up from --seed and --class-order, and their comparison")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--compile", action="store_true", help="compile the encoder: a slow first step; meant for a GPU")
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
    one_of("curriculum", args.curriculum, [*curriculum.CURRICULA, "all"])
    one_of("embedding", args.embedding, [*evaluate.METHODS])
    one_of("new-unit", args.new_unit, ["imprint", "random"])
    if args.embedding == "umap" and importlib.util.find_spec("umap") is None:
        raise ValueError("--embedding umap needs umap-learn: pip install umap-learn, or use --embedding tsne")
    if not args.dataset.startswith("folder:"):
        one_of("dataset", args.dataset, ["auto", *data.DATASETS, "folder:PATH"])
    used = {term for term, weight in curriculum.stage(args.curriculum, 1, 2, 10).mix.items() if weight}
    if used <= set(args.without):
        raise ValueError(f"--without leaves '{args.curriculum}' no loss; keep at least one of {', '.join(sorted(used))}")
    if args.label_budget == 0 and args.curriculum in NEED_BUDGET:
        raise ValueError(f"--label-budget 0 leaves '{args.curriculum}' without labels; use more than 0, or --curriculum self")
    if args.prune_units and args.model is not None and args.model not in model.CONFIGS:
        raise ValueError(f"--prune-units needs a plain chain of layers: --model {', '.join(model.CONFIGS)}, not {args.model}")
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
    tested = dataset.test_y.bincount(minlength=num_classes)
    if not tested.all():
        raise ValueError(f"class '{dataset.classes[int(tested.argmin())]}' has no test image" + " left by --validate" * args.validate)
    few = int(count.argmin())
    if args.curriculum in NEED_BUDGET and args.label_budget * int(count[few]) < 0.5:
        raise ValueError(
            f"--label-budget {args.label_budget} gives class '{dataset.classes[few]}' with its {int(count[few])} images no label; "
            f"one of each class is {1 / int(count[few]):.2g}"
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


def new_folder(stem: str) -> Path:
    """`stem`, or the first of `stem`-2, `stem`-3, ... that is not there yet."""
    names = (Path(stem + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def run_folder(args: argparse.Namespace, device: torch.device) -> Path:
    """A new run folder, with args.json in it. Raises ValueError if it cannot be written."""
    new = f"runs/{args.dataset.split(':')[0]}-{args.curriculum}-s{args.seed}"
    out = new_folder(new) if args.out is None else Path(args.out)
    check_out(out)  # again: another run may have begun there while the data were read
    try:
        out.mkdir(parents=True, exist_ok=True)
        args.out = str(out)
        write_json(out / "args.json", vars(args) | provenance(device))
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
    if args.validate:
        dataset = data.hold_out(dataset)
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
            small = "--dataset cifar10 --model vgg-small --per-class 2000 --epochs 15"
            print(f"--dataset auto: digits, since there is no GPU; for CIFAR-10: python train.py {small}")
    for name, value in DEFAULTS.get(args.dataset.partition(":")[0], {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    model.build(args.model, 1)  # refuses a model that cannot be had
    return args, load(args), device, run_folder(args, device), None


def resume(args: argparse.Namespace, argv: list[str] | None) -> tuple:
    """A run to go on with, its settings from args.json. Raises ValueError if it cannot be, or is asked to change."""
    out = Path(args.out)
    try:
        saved = json.loads((out / "args.json").read_text())
        if not saved.keys() >= vars(args).keys():
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"--resume: {out} holds no run (args.json is missing, damaged, or of another version)") from None
    again = parser()
    given = {k: v for k, v in saved.items() if k in vars(args) and k not in ("out", "resume")}
    again.set_defaults(**{k: str(v) if type(v) in (int, float) else v for k, v in given.items()})  # text is checked like a flag's
    args = again.parse_args(argv)
    args.dataset = saved["dataset"] if args.dataset == "auto" else args.dataset
    free = {"out", "resume", "device", "data_dir", "embedding"}  # what may be different
    checkpoint, made_with = None, saved
    if (out / "checkpoint.pt").exists():  # a run that was stopped in its first epoch begins again
        try:
            with zipfile.ZipFile(out / "checkpoint.pt") as file:
                if torn := file.testzip():
                    raise ValueError(f"the checksum of {torn} is wrong")
            checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            made_with, version = checkpoint["args"], checkpoint["version"]
        except Exception as error:
            raise ValueError(f"--resume: {out / 'checkpoint.pt'} is damaged ({data.reason(error)})") from None
        if version != VERSION:
            raise ValueError(f"--resume: the checkpoint has version {version}, this program writes {VERSION}")
    for name in sorted(vars(args).keys() - free):
        made = made_with.get(name)
        if made != getattr(args, name):
            raise ValueError(f"--resume: the run was made with --{name.replace('_', '-')} {made}, not {getattr(args, name)}")
    check(args)
    device, dataset = pick_device(args.device), load(args)
    if checkpoint and len(checkpoint["bank"]) != len(dataset.train_y):
        raise ValueError(f"--resume: the run was made with {len(checkpoint['bank'])} training images, now there are {len(dataset.train_y)}")
    return args, dataset, device, out, checkpoint


def several(args: argparse.Namespace, argv: list[str]) -> int:
    """All curricula, or all seeds, one run after the other, each in a folder of its own, and their comparison. The exit status."""
    names = list(curriculum.CURRICULA) if args.curriculum == "all" else [args.curriculum]
    for name in names:
        check(argparse.Namespace(**vars(args) | {"curriculum": name}))
    out = Path(args.out) if args.out else new_folder(f"runs/{args.curriculum}")
    if args.resume and (not out.is_dir() or (out / "args.json").exists()):
        raise ValueError(f"--resume: {out} is not a folder that --seeds or --curriculum all has made")
    folders = []
    for i, name in itertools.product(range(args.seeds), names):
        folders.append(out / f"{name}-s{args.seed + i}")
        flags = ["--curriculum", name, "--seeds", "1", "--seed", args.seed + i, "--class-order", args.class_order + i, "--out", folders[-1]]
        begun = (folders[-1] / "args.json").exists()
        print(f"\n{len(folders)} of {args.seeds * len(names)}: {folders[-1]}", flush=True)
        status = main([flag for flag in argv if flag != "--resume" or begun] + [str(flag) for flag in flags])
        if status:
            if out.is_dir():
                print(f"for the rest: the same command with --resume --out {out}", file=sys.stderr)
            return status
    try:
        return evaluate.main([*map(str, folders), "--out", str(out / "comparison.png")])
    except KeyboardInterrupt:
        print(f"\nstopped; all runs are finished: python evaluate.py {shlex.quote(str(out))}", file=sys.stderr)
        return 130


def fail(problem: object) -> int:
    """Say what went wrong, in one line; the exit status."""
    print(f"train.py: error: {problem}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the exit status."""
    args = None
    try:
        try:
            args = parser().parse_args(argv)
            if args.resume and args.out is None:
                raise ValueError("--resume needs --out, the folder of the run to go on with")
            if args.curriculum == "all" or args.seeds > 1:
                return several(args, sys.argv[1:] if argv is None else argv)
            ready = resume(args, argv) if args.resume else start(args)
        except (ValueError, OSError) as error:  # nothing has begun
            return fail(error)
        return train(*ready)
    except FloatingPointError as error:
        return fail(error)
    except OSError as error:
        return fail(f"{error.filename or args.out}: {error.strerror or error}; {way_on(args)}")
    except torch.OutOfMemoryError:
        return fail(f"the device is out of memory; use a smaller --batch-size or --model; {way_on(args)}")
    except KeyboardInterrupt:
        print(f"\nstopped; {way_on(args)}", file=sys.stderr)
        return 130


def way_on(args: argparse.Namespace | None) -> str:
    """What a run that was stopped tells its reader."""
    begun = args is not None and args.out is not None and (Path(args.out) / "args.json").exists()
    return f"go on with: python train.py --resume --out {shlex.quote(args.out)}" if begun else "the run had not begun"


if __name__ == "__main__":
    sys.exit(main())

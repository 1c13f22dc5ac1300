"""Train an image encoder by gradual supervision: `python train.py --curriculum gradual`.

Read `train`: in each epoch classes arrive and get names, images get targets, steps are taken, and the
result is pruned, evaluated and saved.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import copy
import ctypes
import itertools
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import suppress
from dataclasses import dataclass, replace
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

TERMS = evaluate.TERMS
VERSION = 7


# ---- the parts ----


class State:
    """All that training changes, and a checkpoint holds."""

    def __init__(self, args, dataset, units: int, earlier=None):
        """A new network of `units` units, or `earlier`."""
        torch.manual_seed(args.seed)
        x, y, classes, owner = dataset.train_x, dataset.train_y, dataset.classes, range(units)
        self.network = model.build(args.model, units, 128, dataset.mean, dataset.std, args.image_size)
        self.network.to(y.device, memory_format=torch.channels_last)
        self.masks, encoder = {}, self.network.encoder  # True = kept
        if earlier:
            self.network.load_state_dict(earlier.state_dict())
            self.masks = grow_prune.prune_smallest(encoder, min(args.prune, grow_prune.sparsity_of(encoder)))
            owner = [classes.index(name) if name else grow_prune.FREE for name in earlier.names]
        self.ema = copy.deepcopy(self.network)
        self.optimizer = model.configure_optimizer(self.network, args.lr)
        self.bank = losses.MemoryBank(len(y), 128, device=y.device)
        self.bf16 = bf16 = model.supports_bf16(y.device)
        self.rows, self.first_sight = [], {}  # of log.csv; accuracies of late classes when named
        self.before = self.answering = None  # of `earlier`; see evaluate_epoch
        watched = data.sample(y >= -1, max(3000, 60 * len(classes)), args.seed)
        networks = self.network, self.ema, self.optimizer
        self.head = grow_prune.HeadManager(
            networks, lambda n, i: evaluate.embed(n, x[i], bf16=bf16), y, watched, classes, owner, args.seed
        )

    def embed(self, x: Tensor, part="h") -> Tensor:
        """What the EMA makes of x [N,3,H,W]."""
        return evaluate.embed(self.ema, x, part, bf16=self.bf16)

    def state_dict(self) -> dict:
        """Plain values and tensors."""
        saved = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in vars(self).items()}
        return saved | saved.pop("head") | {"bank": self.bank.rows}

    def load_state_dict(self, saved: dict) -> None:
        """The reverse."""
        saved["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
        for name in "network", "ema", "optimizer":
            getattr(self, name).load_state_dict(saved[name])
        vars(self).update({name: saved[name] for name in ("rows", "first_sight", "answering", "before")})
        self.head.load_state_dict(saved)
        rows = self.bank.rows = saved["bank"].to(self.bank.rows)
        self.masks = {name: mask.to(rows.device) for name, mask in saved["masks"].items()}


@dataclass
class Targets:
    """What N images teach in one epoch, with U units."""

    mix: dict[str, float]  # weights of TERMS
    active: Tensor  # bool [N], in the pool
    prior: Tensor  # float32 [U], added to logits (arXiv 2007.07314)
    label: Tensor  # int64 [N], unit of the label, or -1
    pseudo: Tensor  # int64 [N], unit of the pseudo-label, or -1
    confidence: Tensor  # float32 [N], of pseudo
    clusters: Tensor | None  # int64 [3,N], of the bank


def make_targets(state, pool, mix: dict, votes: Tensor, h, align: bool, generator) -> Targets:
    """Cluster the memory bank; propagate the votes to all active images.

    votes: int64 [N], a unit, UNKNOWN or -1; h: the EMA's embeddings, unit rows [N,D], or None; align:
    scale the votes to the classes' shares of the labels.
    """
    units, rows, members = state.head.units, state.bank.rows, pool.active.nonzero()[:, 0]  # (M)
    clusters, pseudo, confidence = None, torch.full_like(votes, -1), torch.zeros_like(rows[:, 0])
    if mix["aggregation"]:
        k = max(2, round(len(members) / 42))  # as in the paper
        clusters = losses.clusterings(rows, pool.active, k, generator=generator)
    if mix["propagation"]:
        unknown = len(units.owner)  # as if there were one more unit
        count = votes[pool.labelled].bincount(minlength=unknown + 1)
        balance = count + (count > 0).float() if align else True
        both = F.normalize(torch.cat([rows[members], h[members]], 1))  # (M, 128 + D)
        voted = torch.where(votes == grow_prune.UNKNOWN, unknown, votes)[members]  # (M)
        unit, sure = losses.propagate_labels(both, voted, voted >= 0, k=50, temperature=0.1, balance=balance)
        pseudo[members] = unit.masked_fill(unit == unknown, -1)
        confidence[members] = sure.masked_fill(unit == unknown, 0.0)
    label, prior = torch.where(pool.labelled, votes, -1), units.in_use(pool.taught).float().log()
    prior[units.unnamed()] = 2 * math.log(max(state.head.reach, 0.2))  # few targets
    return Targets(mix, pool.active, prior, label, pseudo, confidence, clusters)


def train_step(state, dataset, targets: Targets, decay: float, generator, turn: int, index) -> Tensor:
    """One optimizer step on the images `index` [B]; returns the loss of each of TERMS [4].

    Nothing here waits for the device: it can be a CUDA graph. turn: the part of a large bank to search.
    """
    mix, units, active, bank = targets.mix, len(targets.prior), targets.active, state.bank
    views = augment.two_views(dataset.train_x[index], dataset.scale, dataset.flip, dataset.color, generator)
    x = torch.cat(views).contiguous(memory_format=torch.channels_last)  # (2B,3,H,W)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=state.bf16):
        _, z, logits = state.network(x)  # (2B, 128), (2B, U)
    (z1, z2), logits = z.chunk(2), logits + targets.prior
    index2, terms = index.repeat(2), dict.fromkeys(TERMS, z.new_zeros(()))

    if mix["aggregation"] or mix["propagation"]:
        near = losses.neighbours(z, index2, bank, active, *losses.searched(len(active)), turn)
    if mix["ntxent"]:
        pseudo = targets.pseudo[index]  # (B)
        kind = torch.where(pseudo >= 0, len(active) + pseudo, index)  # not negatives
        terms["ntxent"] = losses.nt_xent(z1, z2, kind=kind)
    if mix["aggregation"]:
        terms["aggregation"] = losses.local_aggregation(z, index2, bank, targets.clusters, near)
    if mix["propagation"]:
        onehot = losses.one_hot(targets.pseudo[index2], units)  # (2B, U)
        together = losses.local_aggregation(z, index2, bank, targets.pseudo[None], near, reduction="none")
        named = losses.supervised(logits, onehot, reduction="none")  # both (2B)
        terms["propagation"] = losses.propagation(together, named, targets.confidence[index2])
    if mix["supervised"]:
        terms["supervised"] = losses.supervised(logits, losses.one_hot(targets.label[index2], units))

    state.optimizer.zero_grad()
    sum(mix[term] * loss for term, loss in terms.items()).backward()
    state.optimizer.step()
    grow_prune.apply_masks(state.network.encoder, state.masks)
    model.update_ema(state.ema, state.network, decay)
    bank.update(index, z1 + z2)
    if mix["propagation"] or mix["supervised"]:
        state.head.units.observe(logits.softmax(1))
    return torch.stack([*terms.values()]).detach()


# ---- the loop ----


def train(args, dataset, saved: dict | None, earlier) -> None:
    """Train from the start, an earlier run or a checkpoint."""
    x, y, classes, device = dataset.train_x, dataset.train_y, dataset.classes, dataset.train_x.device
    size = min(args.batch_size, max(2, len(y)))
    steps = max(math.ceil(len(y) / size), args.min_steps)
    known, most = args.known_classes, len(classes) - args.never_named
    stages = curriculum.schedule(
        args.curriculum, args.epochs, len(classes), known, args.label_budget, args.prune
    )
    if args.taught:
        stages = curriculum.going_on(stages)
    least = int(y.min()) + 1  # the pool needs an image
    stages = [replace(s, classes=max(s.classes, least), named=min(s.named, most)) for s in stages]
    taught = torch.tensor([name in args.taught for name in classes], device=device)
    leak = data.leak_order(y, args.seed)
    pools = data.pools(stages, y, leak, len(classes), known, args.replay, taught)
    units = min(stages[0].classes, most)
    if saved or earlier:
        units = len(saved["names"] if saved else earlier.names)
    state, fingerprint = State(args, dataset, units, earlier), data.fingerprint(dataset)
    head, pool, h = state.head, pools[-1], None  # h: [N,D]
    head.final, pace = pool.labelled, round(args.epochs / 30)
    head.monitor.cooldown, head.units.mature = pace, pace + 1

    def right(choice):
        return head.predict(state.embed(dataset.test_x), choice)[1] == dataset.test_y

    if saved:
        state.load_state_dict(saved)
    elif earlier:
        state.before = evaluate.fraction(right(taught), taught[dataset.test_y])

    def save():
        about = dict(version=VERSION, args=vars(args), fingerprint=fingerprint, names=head.names(pool.taught))
        data.write_atomically(f"{args.out}/checkpoint.pt", partial(torch.save, about | state.state_dict()))

    notes = [
        f"{args.dataset}: {len(x):,} images, {x.nbytes / 1e6:,.0f} MB, on {device}; into {args.out}",
        f"classes: {data.some(classes[:known])}; late: {data.some(classes[known:]) or 'none'}",
        f"labels at last: {head.final.sum():,}" + "; nothing is unknown" * head.final.equal(pool.active),
        f"{args.epochs} epochs of {steps} steps, {args.epochs * steps:,} in all, of {size} images"
        + ", all there are" * (size >= len(y)),
    ]
    notes += ["one named class teaches nothing"] * (most < 2)
    notes += ["a class lacks labels: no propagation, no unknown"] * head.lacks_labels(pool)
    print(*map(data.printable, dataset.notes + notes), f"\n{evaluate.log_header()}", sep="\n")
    for epoch in range(len(state.rows), args.epochs):
        start, stage, pool, head.epoch = time.perf_counter(), stages[epoch], pools[epoch], epoch + 1
        off = [] if pool.taught.any() else ["propagation", "supervised"]
        off += ["propagation"] * head.lacks_labels(pool)
        mix = stage.mix | dict.fromkeys(off, 0.0)
        seed = (args.seed << 20) + epoch
        torch.manual_seed(seed)
        on_cpu, generator = (torch.Generator(d).manual_seed(seed) for d in ("cpu", device))

        # 1. Classes arrive, unknown images open units, first labels name them.
        for c in y[pool.arrived & (y >= 0)].unique().tolist() if epoch else ():
            head.log("arrived", c=c, count=int((y[pool.arrived] == c).sum()))
        unseen = pool.active & ~state.bank.rows.any(1)
        if (mix["aggregation"] or mix["propagation"]) and unseen.any():
            state.bank.update(unseen.nonzero()[:, 0], state.embed(x[unseen], "z"))
        votes = torch.full_like(y, -1)  # (N)
        if mix["propagation"]:
            h = F.normalize(state.embed(x)) if h is None else h
            votes = head.discover(pool, h) if stage.discovery else votes
        before = pool.taught_before
        for c in (pool.taught & ~before).nonzero()[:, 0].tolist() if epoch or earlier else ():
            head.name_class(pool, c, votes, h)
            if c >= known and before.any():
                choice = before.clone()
                choice[c] = True
                state.first_sight[classes[c]] = evaluate.fraction(right(choice), dataset.test_y == c)
        votes[pool.labelled] = head.units.of_classes(len(classes))[y[pool.labelled]]

        # 2. Clusters and pseudo-labels.
        targets = make_targets(state, pool, mix, votes, h, args.replay is None, generator)

        # 3. Steps; on a GPU as CUDA graphs.
        state.network.train()
        record = torch.zeros(steps, len(TERMS), device=device)
        batches = data.batches(pool.active, pool.labelled, size, steps, stage.labelled_share, on_cpu)
        bar = tqdm(batches, f"epoch {epoch + 1}", steps, leave=False, delay=2, disable=None)
        seen = replace(dataset, scale=(max(dataset.scale[0], stage.crop), 1.0))
        one = partial(train_step, state, seen, targets, 1 - 1 / steps, generator)
        turns = [partial(one, turn) for turn in range(losses.searched(len(y))[1])]
        if device.type == "cuda":
            turns = model.capture(turns, state.optimizer, generator)
        for step, index in enumerate(bar):
            rate = curriculum.learning_rate((epoch + step / steps) / args.epochs, args.lr)
            model.set_learning_rate(state.optimizer, rate)
            record[step] = turns[step % len(turns)](index)
        turns = None  # frees the CUDA graphs
        check_finite(record, state.network, epoch)

        # 4. Prune, evaluate, log, checkpoint.
        if stage.sparsity or args.prune_units:
            share = curriculum.cubic_sparsity(epoch / max(args.epochs - 1, 1), args.prune_units)
            state.masks = grow_prune.prune(state.network.encoder, stage.sparsity, share, state.masks)
        grow_prune.apply_masks(state.ema.encoder, state.masks)
        model.recompute_batchnorm(state.ema, x[data.sample(pool.active, 2048, seed)], state.bf16)
        h = F.normalize(state.embed(x)) if mix["propagation"] else None
        speed = steps * size / (time.perf_counter() - start)

        row = evaluate_epoch(args, state, dataset, stage, pool, targets, h)
        for term, loss in zip(TERMS, record.mean(0).tolist(), strict=True):
            row[f"loss_{term}"] = loss if mix[term] else None
        state.rows += [row | {"images_per_second": speed, "seconds": time.perf_counter() - start}]
        evaluate.say_once(data.write_table(f"{args.out}/log.csv", state.rows))
        evaluate.say_once(data.write_table(f"{args.out}/events.csv", head.events, grow_prune.EVENT))
        save()
        news = [e for e in head.events if e["epoch"] == head.epoch]
        print(evaluate.log_line(state.rows, args.epochs, news), flush=True)
    model.set_learning_rate(state.optimizer, 0.0)  # if resumed, too
    finish(args, state, dataset, stages, pools, leak, save)


def evaluate_epoch(args, state, dataset, stage, pool, targets: Targets, h) -> dict:
    """A row of log.csv, from some test images, in the last epoch from all; sets state.answering."""
    head, y, taught, labels = state.head, dataset.train_y, pool.taught, int(pool.labelled.sum())
    unnamed, hidden = head.units.unnamed(), pool.active & ~pool.labelled & (y >= 0)
    row = dict(epoch=head.epoch, stage=stage.name, classes=stage.classes, labels=labels)
    row |= dict(labelled=labels / len(y), units=len(head.units.owner), unnamed=len(unnamed))
    row |= dict.fromkeys("accuracy old_accuracy new_accuracy open_accuracy novelty_auroc".split())
    if taught.any():
        last, few = head.epoch == args.epochs, max(1000, len(y) // 5)
        asked = data.sample(dataset.test_y >= 0, len(dataset.test_y) if last else few, 0)
        test_h, test_y = state.embed(dataset.test_x[asked]), dataset.test_y[asked]
        unit, guess = head.predict(test_h, taught)
        most = len(taught) - args.never_named
        told = test_y < most
        row |= evaluate.epoch_accuracy(guess[told], test_y[told], args.known_classes)
        # Always of the same images.
        row |= evaluate.accuracy_by_class(guess[:few], test_y[:few], dataset.classes[:most])
        if labels and (args.curriculum == "gradual" or last):
            near = head.neighborhood(pool, pool.labelled)
            near_h = state.embed(dataset.train_x[near]) if h is None else h[near]  # (M, D)
            labelled = pool.labelled[near]
            limit = -math.inf if head.lacks_labels(pool) else grow_prune.threshold(near_h, labelled)
            claims, named = grow_prune.claim(test_h, near_h, labelled), taught[test_y]
            if last and named.any():  # claims of training images are higher
                limit = min(limit, claims[named].quantile(0.05).item())
            state.answering = dict(h=near_h.half(), labelled=labelled, limit=limit, unnamed=unnamed)
            if args.curriculum == "gradual":
                found, present = torch.isin(unit, unit.new_tensor(unnamed)), named | (test_y < stage.classes)
                row |= evaluate.open_set(claims, limit, found, guess == test_y, named, present)
        if h is not None and hidden.any():
            row |= evaluate.gcd_accuracy(head.predict(h[hidden], taught)[0], y[hidden], ~taught[y[hidden]])
    pseudo, among = head.answered(taught)[targets.pseudo], hidden & taught[y] & (targets.pseudo >= 0)
    row |= evaluate.pseudo_label_quality(pseudo, targets.confidence, y, among)
    return row | {"sparsity": grow_prune.sparsity_of(state.ema.encoder)}


def check_finite(record: Tensor, network, epoch: int) -> None:
    """FloatingPointError for the first loss (record: [steps,4]) or weight not finite."""
    bad = [f"loss '{TERMS[term]}' of step {s + 1}" for s, term in (~record.isfinite()).nonzero().tolist()]
    bad += [f"weight '{name}'" for name, p in network.named_parameters() if not p.isfinite().all()]
    kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "there is no checkpoint"
    if bad:
        raise FloatingPointError(f"{bad[0]} in epoch {epoch + 1} is not finite; {kept}; try a lower --lr")


def finish(args, state, dataset, stages, pools, leak: Tensor, save) -> None:
    """Figures and pictures."""
    head, rows, pool, classes = state.head, state.rows, pools[-1], dataset.classes
    y, test_y, taught, memory = dataset.train_y, dataset.test_y, pool.taught, state.answering
    train_h, test_h = state.embed(dataset.train_x), state.embed(dataset.test_x)  # (N, D), (T, D)
    most = len(classes) - args.never_named
    old = min(args.known_classes, most)
    budget = data.label_mask(leak, y, args.label_budget, range(most))
    summary = evaluate.final_metrics((train_h, y), (test_h, test_y), budget, rows, classes[:old]) | {
        "first_sight": evaluate.mean(state.first_sight.values()),
        "old_accuracy_before": state.before,
        **{kind: sum(e["event"] == kind for e in head.events) for kind in ("opened", "named")},
        "labels_used": int(sum(p.labelled for p in pools).bool().sum()),
    }
    here, named, unnamed = pool.active & (y >= 0), taught[test_y].nonzero()[:, 0], head.units.unnamed()
    hidden, log_p = here & ~pool.labelled, head.probabilities(test_h, taught).log()  # (N), (T, C + U)
    unit, guess = head.predict(train_h, taught)[0], head.predict(test_h, taught)[1]
    if taught.any() and hidden.any():
        new, nameless = ~taught[y], (~taught).nonzero()[:, 0].tolist()
        summary |= evaluate.gcd_accuracy(unit[hidden], y[hidden], new[hidden])
        summary |= evaluate.open_world(train_h[here], y[here], pool.labelled[here], new[here])
        summary |= evaluate.concept_scores(unit[hidden], y[hidden], unnamed, nameless)
    if memory and len(named) > 1:
        fit, held = named[::2], named[1::2]
        memory["temperature"] = evaluate.fit_temperature(log_p[fit], test_y[fit])
        for key, temperature in ("_before", 1.0), ("", memory["temperature"]):
            sure, best = (log_p[held] / temperature).softmax(1).max(1)
            summary[f"calibration_error{key}"] = evaluate.calibration_error(sure, best == test_y[held])
    save()
    data.write_json(f"{args.out}/summary.json", summary)
    print(f"\n{evaluate.describe(summary, len(y), old)}\n")

    draw, out, late = evaluate.attempt, Path(args.out), (stages[0].classes, stages[-1].classes)
    draw(evaluate.draw_curves, rows, classes, out / "curves.png")
    draw(evaluate.draw_embedding, test_h, test_y, classes, out / "embedding.png", args.embedding, *late)
    if head.events:
        draw(evaluate.draw_life, rows, head.events, classes, out / "life.png", head.units.owner)
    if memory and len(named) > 1:
        told, true = guess[named], test_y[named]
        draw(evaluate.draw_confusion, told, true, classes[:most], out / "confusion.png")
        sure = (log_p / memory["temperature"]).softmax(1)[named, : len(classes)].amax(1)
        sheet = evaluate.mistake_rows(dataset.test_x[named], told, sure, true, classes)
        draw(evaluate.contact_sheet, out / "mistakes.png", sheet, "Surest mistakes on test images")
        claims = grow_prune.claim(train_h, memory["h"].to(test_h), memory["labelled"].to(y.device))
        unknown = pool.active & ~pool.labelled & (claims < memory["limit"])
        unknown &= ~torch.isin(unit, unit.new_tensor(unnamed))
        unit = unit.masked_fill(~pool.active | unknown, -1)
        sheet = evaluate.concept_rows(dataset.train_x, train_h, unit, unknown, head.names(taught))
        draw(evaluate.contact_sheet, out / "concepts.png", sheet, "Units of the head")
    if unnamed := [u for u in unnamed if u not in head.given and (unit == u).any()]:
        count = sum((unit == u).sum() for u in unnamed)
        print(f"Units {unnamed} ({count:,} images) have no name. Look at {out}/concepts.png, then:")
        print(f"python evaluate.py {shlex.quote(args.out)} --name {unnamed[0]}=NAME")


# ---- command line ----

# name, range or type=default: help
FLAGS = """
--curriculum =gradual: what is taught when, or all
--label-budget 0.0..1.0: share of labels that leak in; 0.1, or 1 with unlabelled/
--known-classes 1..: classes at the start; 7 of 10, all of a folder
--late NAMES: classes that come late
--never-named 0..=0: last classes without labels
--class-order 0..=0: seed of order
--replay 1..: images kept of old classes; all
--dataset NAME=auto: digits, mnist, cifar10, cifar100, folder:PATH
--data-dir PATH=data: data folder
--image-size 8..224: a multiple of 8
--per-class 1..: images of a class; all
--inject NAMES: late classes, as cifar100:wolf,tank
--from RUN: to start from
--model NAME: cnn, vgg-small, vgg11, vgg16, torchvision's
--epochs 1..: of as many images as there are
--min-steps 1..: fewest per epoch
--batch-size 2..: images a step
--lr 1e-6..1e3: peak learning rate
--prune 0.0..1.0=0.8: share of weights to end at zero
--prune-units 0.0..1.0=0: share of a VGG's filters
--seed 0..=0: seed of all else
--seeds 1..=1: runs; seeds count up
--device NAME=auto: cpu, cuda:1
--embedding =tsne: of embedding.png
--out PATH: run folder; in runs/
--resume RUN: runs to continue
"""


def within(bounds: str):
    """A flag's type: a number in "low..high", whole if these are."""
    kind = int if bounds.strip("0123456789") == ".." else float
    low, high = (kind(end or 2**31 - 1) for end in bounds.split(".."))

    def number(text):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise ArgumentTypeError(f"must be {kind.__name__} in {bounds}, not '{text}'")

    return number


def make_parser() -> ArgumentParser:
    """The command line."""

    def error(message):
        raise ValueError(message.removeprefix("argument "))

    parser = ArgumentParser(epilog=f"Defaults: after ';' or {curriculum.DEFAULTS}", allow_abbrev=False)
    parser.error = error
    more = {"--curriculum": {"choices": [*curriculum.CURRICULA, "all"]}, "--from": {"dest": "origin"}}
    more |= {"--embedding": {"choices": evaluate.METHODS}, "--resume": {"nargs": "?", "const": ""}}
    parser.add_argument("--validate", action="store_true", help="test on a tenth of training images")
    for line in FLAGS.strip().splitlines():
        flag, kind, text = line.split(" ", 2)
        kind, _, default = kind.strip(":").partition("=")
        options = {"type": within(kind) if ".." in kind else os.path.expanduser, "metavar": kind or None}
        options |= {"default": default or None} | more.get(flag, {})
        parser.add_argument(flag, help=text, **options)
    return parser


def use_device(name: str) -> torch.device:
    """The device `name`, if it works; TF32, no denormals, freed pages kept."""
    name = name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except Exception as error:
        raise ValueError(f"--device '{name}' cannot be used ({data.reason(error)})") from None
    torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)
    with suppress(OSError, AttributeError):  # M_MMAP_, M_TRIM_THRESHOLD
        for option in (-3, -1):
            ctypes.CDLL("libc.so.6").mallopt(option, 1 << 30)
    return torch.device(name)


def load(args) -> data.Dataset:
    """The data, classes in order of arrival; sets what was not given."""
    taught, least = args.taught, 2 - bool(args.inject or args.taught)
    dataset = data.load_dataset(args.dataset, args.data_dir, True, args.image_size, least)
    own = dataset.classes
    if args.inject:
        dataset = data.inject(dataset, args.inject, args.data_dir)
    if args.validate:
        dataset = data.hold_out(dataset)
    if args.per_class:
        dataset = data.class_subset(dataset, args.per_class, args.seed)
    late = [args.late] if args.late in own else [*map(str.strip, args.late.split(","))] if args.late else []
    if wrong := {*late} - {*dataset.classes} | {*late} & {*taught}:
        raise ValueError(f"--late: {sorted(wrong)} must be new classes")
    late += [name for name in dataset.classes[len(own) :] if name not in taught]
    first = [own[c] for c in data.class_order(len(own), args.class_order) if own[c] not in late]
    order, classes = [*dict.fromkeys(taught + first + late)], [*dict.fromkeys(dataset.classes + taught)]
    dataset = data.reorder(replace(dataset, classes=classes), [classes.index(name) for name in order])

    y, n, whole = dataset.train_y, len(order), args.late or args.dataset.startswith("folder:")
    known = len(first) if whole else curriculum.default_known(len(own))
    args.known_classes = args.known_classes or len(taught) or known
    if not 0 < args.known_classes <= n or args.never_named > n - max(1, len(taught)):
        raise ValueError(f"--known-classes, --late and --never-named must fit the {n} classes")
    if args.label_budget is None:
        args.label_budget = 1.0 if (y < 0).any() else 0.1
    for c, name in enumerate(order):
        count = int((y == c).sum())
        if c >= len(taught) and not (count and (dataset.test_y == c).any()):
            raise ValueError(f"class '{name}' has no {'test' if count else 'training'} image; add one")
        few = c < n - args.never_named and count and count * args.label_budget < 0.5
        if few and args.curriculum in ("gradual", "semi", "labels-only"):
            raise ValueError(f"--label-budget {args.label_budget} leaves '{name}' no label of {count}")
    return dataset


def setup(args, argv) -> tuple:
    """Settings, data, checkpoint, earlier network; a folder."""
    out, earlier, saved = args.resume or args.out or ".", None, None
    if args.resume is None:
        shape = args.model or args.image_size or args.known_classes
        if args.late and args.known_classes or args.origin and shape:
            raise ValueError("--late decides --known-classes; --from decides --model, --image-size and it")
    else:
        given = {flag.partition("=")[0] for flag in argv}
        moved = given & {"--device", "--data-dir", "--dataset"}
        flags = {k: f"--{k.replace('_', '-')}".replace("origin", "from") for k in vars(args)}
        made = made_with(out) | {"out": out, "resume": args.resume}
        if not made.keys() >= flags.keys():
            raise ValueError(f"--resume: {out} holds no run of this version")
        if other := [f for k, f in flags.items() if f in given - moved and made[k] != getattr(args, k)]:
            raise ValueError(f"--resume takes {', '.join(other)} from the run; drop the flag")
        vars(args).update({k: made[k] for k in flags if flags[k] not in moved})
        if {"checkpoint.pt", "summary.json"} & {*os.listdir(out)}:
            saved = data.read_checkpoint(f"{out}/checkpoint.pt", VERSION)
    if args.origin and not saved:
        earlier = model.load(args.origin)
        args.taught = [*dict.fromkeys(filter(None, earlier.names))]
        args.model, args.image_size = earlier.spec, earlier.image_size
    device = use_device(args.device)
    evaluate.project(torch.zeros(1, 2), args.embedding)  # umap there?
    if args.dataset == "auto":
        args.dataset = "cifar10" if device.type == "cuda" else "digits"
    vars(args).update({k: v for k, v in curriculum.defaults(args.dataset).items() if vars(args)[k] is None})
    network = model.build(args.model, 1, image_size=args.image_size)
    if args.prune_units:
        grow_prune.prune_filters(network.encoder, 0.0)
    dataset = load(args)
    room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else math.inf
    data.check_room(len(dataset.train_x) + len(dataset.test_x), args.image_size, room)
    dataset = dataset.to(device)
    if saved and (before := saved["fingerprint"]) != (now := data.fingerprint(dataset)):
        names = sorted({*before["classes"]} ^ {*now["classes"]})
        other = f"classes ({data.some(names, 4)})" if names else "images or labels"
        raise data.wrong(f"--resume: {args.dataset} has other {other} than the run")
    if args.resume is None:
        about = {"machine": f"{device}, {torch.get_num_threads()} threads", "torch": torch.__version__}
        with suppress(OSError):
            git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--abbrev=40", "--dirty"]
            about["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        args.out = claim_folder(args, about | {"command": argv})
    return dataset, saved, earlier


def made_with(folder) -> dict:
    """A run's args.json, or {}."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(Path(folder, "args.json").read_text("utf-8")))
    return {}


def claim_folder(args, about: dict) -> str:
    """Make --out or a free folder in runs/, with args.json."""
    stem = args.out or f"runs/{args.dataset.split(':')[0]}-{args.curriculum}-s{args.seed}"
    for n in [1] if args.out else itertools.count(1):
        folder = Path(stem + f"-{n}" * (n > 1))
        settings = data.as_json(vars(args) | about | {"out": str(folder)})
        with suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                with open(folder / "args.json", "xb") as file:
                    try:
                        file.write(settings)
                        file.flush()
                    except OSError:
                        os.unlink(file.name)
                        raise
                return str(folder)
    raise ValueError(f"--out {folder} is not an empty folder; choose another, or --resume its run")


def several(args, argv) -> int:
    """All curricula or seeds."""
    names = curriculum.CURRICULA if args.curriculum == "all" else [args.curriculum]
    out, folders = args.resume or args.out or f"runs/{args.curriculum}", []
    if made_with(out) or args.resume not in (None, args.out):
        raise ValueError(f"{out} is a run, holds none or isn't --out; choose another")
    for i, name in itertools.product(range(args.seeds), names):
        folders.append(folder := f"{out}/{name}-s{args.seed + i}")
        begun = args.resume is not None and made_with(folder)
        own = dict(seed=args.seed + i, class_order=args.class_order + i, curriculum=name, out=folder)
        if status := main(argv, **own, seeds=1, resume=folder if begun else None):
            return status
    return evaluate.main([*folders, "--out", f"{out}/comparison.png"])


def main(argv=None, **changes) -> int:
    """Train. Status 0; 2: error; 130: stop."""
    argv, way_on = sys.argv[1:] if argv is None else argv, ""
    for stream in sys.stdout, sys.stderr:
        getattr(stream, "reconfigure", dict)(errors="replace")
    try:
        args = make_parser().parse_args(argv)
        if args.resume is not None and not (changes or made_with(out := args.resume or args.out or ".")):
            if begun := sorted(Path(out).glob("*/args.json"), key=os.path.getmtime):
                argv = [*made_with(begun[-1].parent).get("command", []), "--out", out, *argv, "--resume", out]
        args = Namespace(taught=[], **vars(make_parser().parse_args(argv)) | changes)
        if "" in {**vars(args), "resume": 0}.values():
            raise ValueError("empty argument")
        if args.curriculum == "all" or args.seeds > 1:
            return several(args, argv)
        dataset, saved, earlier = setup(args, argv)
        whole = os.path.dirname(args.out) if changes else args.out
        way_on = f"; go on with: python train.py --resume {shlex.quote(whole)}"
        train(args, dataset, saved, earlier)
        return 0
    except KeyboardInterrupt:
        problem, status = "stopped", 130
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        problem, status = f"error: {data.reason(error)}", 2
        way_on *= not isinstance(error, FloatingPointError)
    print(f"train.py: {problem}{way_on}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:  # as Ctrl-C, not under nohup
        if signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    sys.exit(main())

"""The facts that the code must satisfy: `python -m pytest test_all.py`.

Formulas are checked against naive loops in float64, torchvision, scikit-learn; the command line, by running.
"""

import copy
import csv
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import urllib.request
import warnings
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pytest import approx
from torch import arange, cat, equal, eye, linspace, nn, ones, rand, randint, randn, stack, tensor, zeros
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import prune as torch_prune  # noqa: F401
from torch.nn.utils.parametrizations import weight_norm  # noqa: F401
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer

import augment
import curriculum
import data
import evaluate as ev
import grow_prune as gp
import losses
import model
import train
from grow_prune import FREE, UNKNOWN, UNNAMED

# ---- augment, model, losses, curriculum ----
HERE = Path(__file__).parent
any_example = settings(max_examples=40, deadline=None, derandomize=True)
seeds, fractions = st.integers(0, 2**31 - 1), st.floats(0, 1)
cases, exact = pytest.mark.parametrize, partial(assert_close, rtol=0, atol=0)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
in_bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def unit_rows(n, d, seed=0, dtype=torch.float32):
    return F.normalize(randn(n, d, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


def filled_bank(n, d):
    bank = losses.MemoryBank(n, d)
    bank.update(arange(n), unit_rows(n, d))
    return bank


def fails(error):
    def function(*_):
        raise error

    return function


def rejects(words, function, *args):
    with pytest.raises(ValueError, match=words):
        function(*args)


def add(path, height=32, width=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(randint(256, (int(height), int(width), 3)).byte().numpy()).save(path)


def make_folder(root, classes=("ant", "bee"), per_class=3):
    for split, c, i in itertools.product(("train", "test"), classes, range(per_class)):
        add(root / split / c / f"{i}.png", 20 + 7 * i, 50 - 5 * i)
    return root


def refused(capsys, main, args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"\S+ error: .+\n", message)
    return message


WRONG = """\
[2, 8: random_resized_crop(x[:, 0, 0])
[2, 1,: cnn(x[:, :1])
int64: two_views(x.long()) | cnn(x.long())
scale: random_resized_crop(x, (0.5, 0.2))
p: horizontal_flip(x, 1.5)
padding: pad_crop(x, -1)
adjust_contrast: color_jitter(x, contrast=(2, 1))
shift: adjust_hue(x, half)
factor: adjust_brightness(x, half[:2, None])
box: resized_crop(x, half, half, half, half)
image_size: build("cnn", 2, image_size=36)
64x64: build("maxvit_t", 2, image_size=64)
num_classes: build("cnn", 0) | build("cnn", 2, 0) | build("cnn", 2, 8, (0.5,))
name: build(["M"], 2) | build([8, -1, "8"], 2)
did you mean 'resnet18': build("resnet-18", 3)
made compact: compact(build("resnet18", 2))
decay: update_ema(cnn, cnn, 1.5)
float32: recompute_batchnorm(cnn, x)
z1: nt_xent(z[:0], z[:0])
kind: nt_xent(z, z, kind=y)
temperature: nt_xent(z, z, 0) | nt_xent(z, z, math.nan) | local(*task, ys, 3, -0.1)
reduction: nt_xent(z, z, 1, "avg") | local(*task, ys, 3, 1, "SUM")
momentum: MemoryBank(4, 4, 1.1)
z: bank.update(index, z[:, :4]) | near(z[:, :5], index, bank, some, 3)
index: bank.update(index - 1, z) | near(z, index + 16, bank, some, 3) | local(z, -index, bank, ys, found)
active: near(*task, some[:3], 3) | supervised(z, z, some)
k: near(*task, some, 0) | kmeans(z, 0)
background: local(*task, ys, found[::-1])
labels: votes(bank.rows, y - 2, some) | votes(bank.rows, y, some, balance=torch.ones(3))
units: one_hot(y, 3)
confidence: propagation(half, half, index)
gradual: stage("grad", 0, 1, 10)
budget: stage("semi", 0, 1, 10, 7, math.nan)
"""


@cases("line", WRONG.splitlines())
def test_wrong_arguments_are_named(line):
    word, calls = line.split(": ", 1)
    x, half, z, index = rand(2, 3, 8, 8), rand(5), unit_rows(5, 8), arange(5)
    y, bank, cnn = arange(20) % 4, filled_bank(20, 8), model.build("cnn", 2)
    some, ys, task = y > 0, y[None], (z, index, bank)
    local, near, votes = losses.local_aggregation, losses.neighbours, losses.propagate_labels
    found = near(*task, some, 3)
    names = vars(augment) | vars(model) | vars(losses) | vars(curriculum) | locals()
    for call in calls.split(" | "):
        rejects(rf"(?<!\w){re.escape(word)}[^\n]*$", eval, call, names)


@pytest.fixture
def images():
    noise = rand(8, 3, 32, 32)
    smooth = F.interpolate(noise[..., :4, :4], 32, mode="bicubic").clamp(0, 1)
    grey = noise[:, :1].repeat(1, 3, 1, 1)
    grey[6], grey[7] = 0, 1
    return cat([noise, smooth, grey])


def test_images_change_as_in_torchvision(images):
    near = partial(assert_close, atol=1e-5, rtol=0)
    steps, expected = dict(brightness=1.3, contrast=0.7, saturation=1.2, hue=0.08), images
    for name, step in steps.items():
        ours, theirs = (getattr(module, f"adjust_{name}") for module in (augment, TF))
        factor = linspace(-0.5, 0.5, 24) if name == "hue" else linspace(0, 2, 24)
        near(ours(images, factor), stack(list(map(theirs, images, factor))))
        expected = theirs(expected, step)
    near(augment.color_jitter(images, *((s, s) for s in steps.values()), p=1), expected)
    sides = randint(1, 33, (2, 24))
    boxes = cat([(32 - sides) // 3, sides])
    crops = [TF.resized_crop(x, *box, [32, 32]) for x, *box in zip(images, *boxes.tolist(), strict=True)]
    near(augment.resized_crop(images, *boxes), stack(crops))
    near(augment.random_grayscale(images, 1), TF.rgb_to_grayscale(images, 3))
    assert equal(augment.random_grayscale(images, 0), images)
    assert equal(augment.horizontal_flip(images, 1), TF.hflip(images))


def test_the_generator_decides(images):
    same = (255 * images[:1]).byte().repeat(64, 1, 1, 1)
    for view in (augment.random_resized_crop, augment.color_jitter, augment.pad_crop, augment.strong):
        out = view(same, generator=seeded(1))
        assert len(out.unique(dim=0)) > 40 and out.min() >= 0 and out.max() <= 1 + 1e-6
        assert not equal(out, view(same, generator=seeded(2)))
        with in_bf16():
            assert equal(out, view(same / 255, generator=seeded(1)))
    a, b = augment.two_views(same, generator=seeded(1))
    assert equal(a, out) and not equal(a, b)
    assert equal(augment.weak(same, flip=False, padding=0), same / 255)
    x = images[:8].repeat(16, 1, 1, 1)
    windows = F.pad(x, (2,) * 4).unfold(2, 32, 1).unfold(3, 32, 1)
    found = (windows == augment.pad_crop(x, 2)[:, :, None, None]).all((1, 4, 5))
    assert found.any((1, 2)).all() and found.any(0).sum() > 15


def test_crops_are_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    ramp = arange(32.0).expand(32, 32)  # a crop of width w has slope w / 32
    x = stack([ramp.T, ramp, ramp]).expand(4000, -1, -1, -1)
    out = 4 * augment.random_resized_crop(x)
    sides = (out[:, :2, 20, 20] - out[:, :2, 12, 12]).round()
    theirs = [RandomResizedCrop.get_params(ramp, [0.2, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(4000)]
    assert_close(torch.std_mean(sides, 0), torch.std_mean(torch.Tensor(theirs), 0), atol=0.4, rtol=0)


@cases("shape", [(4, 3, 32, 32), (2, 3, 1, 1), (2, 1, 1, 9), (3, 3, 20, 48), (0, 3, 8, 8)])
def test_any_shape_and_dtype_is_augmented(shape):
    views = "random_grayscale strong weak adjust_brightness adjust_contrast adjust_saturation adjust_hue"
    for dtype, view in itertools.product(DTYPES, views.split()):
        x = rand(shape).to(dtype)
        factor = [linspace(0, 0.5, len(x))] * view.startswith("adjust")
        for leaf in (x, x[:1].expand(shape), x.contiguous(memory_format=torch.channels_last)):
            out = getattr(augment, view)(leaf.requires_grad_(), *factor)
            assert out.shape == shape and out.dtype == torch.float32
            assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


ENCODERS = {"cnn": 128, "vgg16": 512, (8, "M", 8): 8, "mobilenet_v3_small": 1024, "squeezenet1_1": 512}


@cases("name", ENCODERS)
def test_any_encoder_is_packed(name, tmp_path):
    network, path = model.build(name, 3, 16, mean=(0.1, 0.2, 0.3), image_size=40).eval(), tmp_path / "net.pt"
    network.names, network.answering = ["a", None, "猫"], {"limit": 0.5, "h": ones(2, 4).half()}
    x, before = rand(2, 3, 40, 40), torch.get_rng_state()
    h, z, logits = network(x)
    assert h.shape == (2, ENCODERS[name]) and z.shape == (2, 16)
    assert_close(z.norm(dim=1), ones(2))
    assert_close(logits, 16 * F.cosine_similarity(h[:, None], network.head.weight, dim=2))
    assert name != "vgg16" or sum(p.numel() for p in network.encoder.parameters()) == 14_718_912
    for extra in ({}, {"names": ["a"], "answering": None, "version": 9}):
        packed = model.pack(network) | extra
        torch.save(packed, path)
        other = model.load(path)
        assert equal(before, torch.get_rng_state()) and not other.training
        assert (other.names, other.spec, other.image_size) == (packed["names"], network.spec, 40)
        assert_close(other.answering, packed["answering"])
        assert all(map(equal, (h, z, logits), other(x)))
    flipped, half = bytearray(path.read_bytes()), path.stat().st_size // 2
    flipped[half] ^= 1
    spoilt = {"head.weight": zeros(3, 4)}, packed | {"args": {"model": name}}
    for content in (b"not a network", flipped[:half], flipped, *(partial(torch.save, x) for x in spoilt)):
        data.write_atomically(path, content)
        rejects(r"net.pt: not a network[^\n]*$", model.load, path)


@cases("size, patch", [(8, 1), (56, 7), (128, 16), (136, 17), (224, 16)])
def test_encoders_have_a_size(size, patch):
    x = rand(1, 3, size, size)
    assert model.build("vgg11", 2, image_size=size).eval()(x)[0].isfinite().all()
    encoder = model.build("resnet18", 2, image_size=size).encoder
    stem, no_pool = encoder.conv1, isinstance(encoder.maxpool, nn.Identity)
    assert (stem.stride[0], stem.kernel_size[0], no_pool) == ((1, 3, True) if size < 128 else (2, 7, False))
    encoder = VisionTransformer(max(16, size // 16 * 16), 16, 1, 2, 8, 8)
    model.adapt_stem(encoder, size)
    assert encoder.conv_proj.kernel_size == (patch, patch) and encoder(x).isfinite().all()


@cases("dtype", DTYPES)
def test_other_dtypes(dtype):
    network, x = model.build("cnn", 3).eval(), randint(256, (4, 3, 32, 32)).byte()
    other, share = copy.deepcopy(network).to(dtype), x / 255
    for ours in (network(x), network(share.to(dtype)), other(share), other(x)):
        assert ours[1].dtype == ours[2].dtype == torch.float32
        assert_close([a.float() for a in ours], [*network(share)], atol=0.1, rtol=0.1)
    assert model.compact(other).encoder[0].weight.dtype == dtype


def same_gradients(ours, expected, *leaves):
    assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), leaves) for loss in (ours, expected)]
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@cases("kind", [[0], [*range(7)], [0, 1, 0, 2], [0, -1, 0, -1, 1, -1]])
def test_nt_xent_is_its_definition(kind):
    n, both, kinds = len(kind), 2 * kind, None if len(kind) == 7 else tensor(kind)
    z1, z2 = randn(2, n, 5, dtype=torch.float64).requires_grad_()
    z = F.normalize(cat([z1, z2]), dim=1)
    expected, e = [], torch.exp(z @ z.T / 0.2)
    for i in range(2 * n):
        pair = (i + n) % (2 * n)
        others = [j for j in range(2 * n) if j not in (i, pair) and (both[i] < 0 or both[j] != both[i])]
        expected.append(torch.log(1 + e[i, others].sum() / e[i, pair]))
    same_gradients(losses.nt_xent(z1, z2, 0.2, "none", kinds), stack(expected), z1, z2)
    assert losses.nt_xent(z1, z1, 0.001).isfinite()


def test_supervised_is_cross_entropy():
    logits = randn(6, 5, dtype=torch.float64, requires_grad=True)
    units, active = tensor([0, 3, -1, 1, 3, 4]), tensor([1, 1, 0, 1, 0]).bool()
    onehot = losses.one_hot(units, 5)
    masked, known = logits.masked_fill(~active, -math.inf), units.masked_fill(units == 4, -1)
    expected = F.cross_entropy(masked, known, ignore_index=-1)
    same_gradients(losses.supervised(logits, onehot, active), expected, logits)
    same_gradients(losses.supervised(logits, 0 * onehot, active), 0 * logits.sum(), logits)


def test_bank_moves_by_its_momentum():
    bank, before, z = losses.MemoryBank(5, 3, momentum=0.75), unit_rows(5, 3), unit_rows(3, 3, 1)
    bank.update(arange(5), 7 * before)
    assert_close(bank.rows, before)
    bank.update(tensor([1, 4, 1]), z)
    for i, mean in ((4, z[1]), (1, (z[0] + z[2]) / 2)):
        before[i] = F.normalize(0.75 * before[i] + 0.25 * mean, dim=0)
    assert_close(bank.rows, before)


@cases("n, k, true", [(300, 5, 5), (2000, 100, 40), (10_000, 100, 100)])
def test_kmeans_is_as_good(n, k, true):
    from sklearn.cluster import KMeans

    place = randint(true, (n,))
    x = F.normalize(unit_rows(true, 16, 3)[place] + 0.15 * randn(n, 16), dim=1)
    reference = KMeans(k, n_init=1, random_state=0).fit(x.numpy()).inertia_
    for _ in range(3):
        index, centres = losses.kmeans(x, k)
        assert (x - centres[index]).square().sum() <= (1.03 if n >= 10_000 else 1.12) * reference
        assert (torch.cdist(x, centres).argmin(1) == index).float().mean() > 0.999


def test_kmeans_of_few_rows():
    index, centres = losses.kmeans(unit_rows(3, 4), 10)
    assert sorted(index.tolist()) == [0, 1, 2] and len(centres) == 3
    twins = unit_rows(2, 4).repeat(45, 1)
    for rows, iterations in itertools.product((twins, 0 * twins), (0, 1, 10)):
        index, centres = losses.kmeans(rows, 4, iterations)
        assert centres.isfinite().all() and centres.shape == (4, 4)
        assert len(index.unique()) <= len(rows.unique(dim=0))


@cases("n, b, k, repeats", [(1, 1, 4, 1), (6, 3, 20, 2), (40, 8, 10, 3), (90, 33, 25, 3)])
def test_local_aggregation_is_its_definition(n, b, k, repeats):
    rows, bank = unit_rows(n, 8, 1, torch.float64), losses.MemoryBank(n, 8)
    rows[n // 2] = rows[n // 4]
    bank.rows, clusters = rows.float(), randint(9, (repeats, n))
    clusters[:, n // 2 + 1 :: 5] = -1
    there = clusters[0] >= 0
    index = there.nonzero()[: b // 2 + 1, 0].repeat(2)[:b]
    z = unit_rows(b, 8, 4, torch.float64).requires_grad_()

    def naive(v, i):
        e = torch.exp(rows @ v / 0.2)
        near = [j for j in e.argsort(descending=True).tolist() if there[j] and j != i][:k]
        close = [j for j in near if (clusters[:, j] == clusters[:, i]).any()] or near[:1]
        return torch.log(e[near].sum() / e[close].sum()) if near else 0 * v.sum()

    for background in (k, losses.neighbours(z, index, bank, there, k)):
        ours = losses.local_aggregation(z, index, bank, clusters, background, 0.2, "none")
        same_gradients(ours, stack(list(map(naive, z, index))), z)


def test_rows_take_turns():
    bank, z, index, image = filled_bank(70, 8), unit_rows(12, 8, 2), arange(12), arange(70)
    active = image % 5 != 0
    for turn in range(5):
        there = active & (image % 4 == turn % 4) & (image != index[:, None])
        expected, near = (z @ bank.rows.T).masked_fill(~there, -2).topk(5)
        assert_close(losses.neighbours(z, index, bank, active, 5, 4, turn), (near, expected))
    assert (losses.neighbours(z, index, bank, active, 18, 4)[0] == -1).any()


@cases("n, count, k", [(5, 0, 10), (5, 1, 10), (60, 20, 9), (80, 80, 3), (1, 1, 2)])
def test_propagation_is_its_equations(n, count, k):
    rows = unit_rows(n, 6, 5, torch.float64)
    y = randint(3, (n,)) * 2
    labelled = torch.randperm(n) < count
    e, targets = torch.exp(rows @ rows.T / 0.1), F.one_hot(y[labelled], 5).double()
    density = (e - e.diag().diag()).sort(descending=True).values[:, :20].sum(1).clamp(min=1e-9)[labelled]
    near = e[:, labelled]
    near = near * ((near[:, None] > near[:, :, None]).sum(2) < k) / density
    for balance in (False, True, tensor([2, 1, 1, 0, 3])):
        share = 1 if balance is False else targets.sum(0)[y[labelled]]
        votes = F.normalize(near / share @ targets, p=1, dim=1).float()
        share, expected = (losses.align(votes, balance) if torch.is_tensor(balance) else votes).max(1)
        share, expected = share.masked_fill(labelled, 1), torch.where(labelled, y, expected if count else -1)
        pseudo, confidence = losses.propagate_labels(rows.float(), y, labelled, k, 20, 0.1, balance)
        assert_close((pseudo, confidence), (expected, share), atol=1e-4, rtol=1e-4)


def test_aligned_votes_are_as_expected():
    votes = F.normalize(rand(500, 4) * tensor([1, 5, 1, 2]), p=1, dim=1)
    due = tensor([2, 1, 1, 0])
    even, kept = losses.align(votes, due, rounds=100), votes[:, 3].mean()
    assert_close(even.mean(0), (1 - kept) * due / 4 + kept * (due == 0), atol=1e-4, rtol=0)
    odds = (even / votes) / (even / votes)[:, :1]
    assert (odds - odds[0]).abs().max() < 1e-4
    assert not losses.align(votes * (due > 0), ones(4)).isnan().any()


def everything(x):
    index, y, found, gradients = arange(200), arange(200) % 5, [], []
    bank, first = losses.MemoryBank(200, 16), index[:9]
    bank.update(index, x)
    z, other, logits = leaves = [part.clone().requires_grad_() for part in x[:27].split(9)]
    for loss in (
        partial(losses.nt_xent, z, other, 0.2, kind=y[:9]),
        partial(losses.local_aggregation, z, first, bank, y[None], 10, 0.1),
        partial(losses.supervised, logits, losses.one_hot(y[:9], 16).to(x.dtype), index[:16] < 5),
        partial(losses.propagation, *(leaf[:, 0] for leaf in leaves)),
    ):
        mean, total, each = (loss(reduction=r) for r in ("mean", "sum", "none"))
        assert_close((mean, total), (each.mean(), each.sum()))
        gradients += torch.autograd.grad(mean, leaves, materialize_grads=True)
        found += [mean, total, each]
    a, b, c = (leaf[:, 0].float() for leaf in leaves)
    assert_close(each, c * (a + b))
    found += losses.neighbours(x[:9], first, bank, y < 3, 7)
    found += losses.propagate_labels(x, y, y > 2, balance=tensor([1, 2, 3, 0, 1]))
    return [bank.rows, *found, *losses.kmeans(x, 4, generator=seeded())], gradients


def test_autocast_dtype_and_chunks(monkeypatch):
    for dtype in DTYPES:
        x = unit_rows(200, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            ours = everything(x)
        found, gradients = everything(x.float())
        exact(ours, (found, [g.to(dtype) for g in gradients]))
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2400)
    assert_close(everything(x), (found, gradients))


@cases("name", curriculum.CURRICULA)
@any_example
@given(st.integers(1, 120), st.integers(2, 60), fractions, fractions, fractions)
def test_schedules_are_bounded(name, epochs, count, share, budget, sparsity):
    known = 1 + round(share * (count - 1))
    stages = [curriculum.stage(name, e, epochs, count, known, budget, sparsity) for e in range(epochs)]
    for field in ("classes", "named", "label_fraction", "sparsity", "crop"):
        values = [getattr(s, field) for s in stages]
        assert values == sorted(values)
    first, last, most = stages[0], stages[-1], known if name == "self-known" else count
    labels = {"self": 0, "self-known": 0, "supervised": 1}.get(name, budget)
    assert first.classes == (known if name == "gradual" else most)
    assert min(first.named, first.label_fraction) >= 0 == first.sparsity
    assert last.label_fraction <= labels and last.sparsity <= sparsity
    for s in stages:
        assert s.named <= s.classes and all(0 <= w <= 1 for w in (*s.mix.values(), s.labelled_share))
        assert set(s.mix) == {"ntxent", "aggregation", "propagation", "supervised"}
    if epochs > 1:
        assert (last.classes, last.named) == (most, 0 if "self" in name else count)
        assert (last.label_fraction, last.sparsity) == approx((labels, sparsity))


def test_gradual_tells_its_story(capsys):
    stages = [curriculum.stage("gradual", e, 30, 10) for e in range(30)]
    first, leaked = stages[0], stages[-1].label_fraction
    assert (first.classes, first.label_fraction, first.mix["ntxent"], leaked) == approx((7, 0, 1, 0.1))
    for c in (8, 9, 10):  # one by one, images before labels
        images, names = ([getattr(s, f) >= c for s in stages].index(True) for f in ("classes", "named"))
        assert stages[images].classes == c and names >= images + 2
    with pytest.raises(SystemExit):
        curriculum.main(["--help"])
    assert "ntxent" not in capsys.readouterr().out


@cases("share", [0.0, 0.3, 0.9, 1.0])
def test_dead_filters_can_be_removed(share):
    network, x = model.build("vgg-small", 4), rand(16, 3, 32, 32)
    network(x)
    network.encoder.apply(lambda m: isinstance(m, nn.BatchNorm2d) and nn.init.normal_(m.bias))
    masks = gp.prune_filters(network.encoder, share)
    small = model.compact(network.eval())
    widths = [c for c in small.spec if c != "M"]
    alive = [int(mask.sum()) for name, mask in masks.items() if name.endswith("bias")]
    assert widths == [*alive, 256] and min(widths) >= 1 and sum(alive) == max(7, 704 - round(share * 704))
    assert_close(network(x), small(x), rtol=0, atol=1e-5)


def test_batch_norm_and_averages():
    network, x = model.build("cnn", 2), randint(256, (600, 3, 32, 32)).byte()
    first, before = network.encoder[1], copy.deepcopy(network.state_dict())
    recompute = partial(model.recompute_batchnorm, network)
    network.encoder[4].eval()
    rejects(None, recompute, x[:, :1])
    recompute(x[:1])
    exact(network.state_dict(), before)
    recompute(x)
    assert network.training and not network.encoder[4].training and first.momentum == 0.1
    seen = network.encoder[0]((x / 255 - network.mean) / network.std).detach()
    var, mean = (t.mean(0) for t in torch.var_mean(seen.view(2, 300, 32, -1), (1, 3)))
    assert_close((first.running_mean, first.running_var), (mean, var), atol=1e-4, rtol=1e-3)
    assert all(equal(p, before[name]) for name, p in network.named_parameters())
    ema = model.build("cnn", 2)
    slow, fast = copy.deepcopy(ema.state_dict()), network.state_dict()
    model.update_ema(ema, network, 0.75)
    for key, value in ema.state_dict().items():
        assert_close(value, (0.75 * slow[key] + 0.25 * fast[key]).to(value))


@cases("name", ["cnn", "mobilenet_v3_small", "vit_b_32"])
def test_prunable_weights_decay(name):
    network = model.build(name, 3)
    optimizer = model.configure_optimizer(network, 0.1)
    model.set_learning_rate(optimizer, 0.03)
    decays, rests = (g["params"] for g in optimizer.param_groups)
    prunable = {w for key, w in gp.prunable(network).items() if not key.startswith("head.")}
    assert set(decays) == prunable and {*decays, *rests} == set(network.parameters())
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(5e-4, 0.03), (0, 0.03)]


# ---- data ----
def load(folder, size=32):
    return data.load_dataset(f"folder:{folder}", image_size=size)


counts = st.lists(st.integers(0, 60), min_size=2, max_size=9)


@any_example
@given(counts, st.lists(fractions, max_size=5), st.sets(st.integers(0, 7)), seeds)
def test_labels_leak(counts, shares, classes, seed):
    y = arange(-1, len(counts) - 1).repeat_interleave(tensor(counts))
    y = y[torch.randperm(len(y), generator=seeded())]
    order = data.leak_order(y, seed)
    for c, n in enumerate(counts, -1):
        assert sorted(order[y == c].tolist()) == ([len(y)] * n if c < 0 else list(range(n)))
    before = y < -1
    for fraction in sorted([0.0, *shares, 1.0]):
        mask = data.label_mask(order, y, fraction, tensor([*classes, -2]))
        exact = [int(n * fraction + 0.5) * (c in classes) for c, n in enumerate(counts, -1)]
        assert mask[before].all() and (y[mask] + 1).bincount(minlength=len(counts)).tolist() == exact
        before = mask
    assert equal(order, data.leak_order(y, seed))
    assert sum(counts[1:]) < 50 or not equal(order, data.leak_order(y, seed + 1))
    for fraction in (-0.1, 1.5, math.nan):
        rejects("0..1", data.label_mask, order, y, fraction, [0])


def test_batches_cover_pool_and_labels():
    n, rest = arange(100), (16, 5, 0.25, seeded())
    drawn = stack([*data.batches(n < 80, n % 10 == 0, *rest)])
    assert drawn.shape == (5, 16) and (drawn < 80).all() and (drawn[:, :4] % 10 == 0).all()
    drawn = cat([*data.batches(n < 80, n < 0, *rest)])
    assert sorted(drawn.tolist()) == list(range(80))


def test_unlabelled_and_taught_stay():
    y = arange(-1, 4).repeat_interleave(20)
    stages = [curriculum.Stage("", n, 2, 0.5, {}, 0.5, 0.0) for n in (2, 3, 4)]
    order = data.leak_order(y, 0)
    [now] = data.pools(stages[2:], y, order, 4, 3, replay=3, taught=arange(4) < 3)
    assert (y[now.active] + 1).bincount().tolist() == [20, 3, 3, 3, 20]
    for pool in data.pools(stages, y, order, 4, 2, replay=3, taught=arange(4) == 3):
        assert pool.active[y < 0].all() and not pool.labelled[y < 0].any()
        assert pool.taught.tolist() == [True, True, False, True] and pool.taught_before[3]


def test_digits_held_out_and_reordered():
    d = data.load_dataset("digits")
    assert d.train_x.shape == (1347, 3, 32, 32) and d.train_x.dtype == torch.uint8
    assert d.train_y.dtype == torch.int64 and len(d.test_y) == 450 and d.classes == list("0123456789")
    assert not d.flip and not d.color
    n = arange(1347)
    d = replace(d, train_x=n, train_y=d.train_y.masked_fill(n % 9 == 0, -1))
    h = data.hold_out(d)
    assert sorted([*h.train_x, *h.test_x]) == n.tolist()
    assert equal(h.test_x, data.hold_out(d, 0.1).test_x) and "--validate" in h.notes[-1]
    share = (h.test_y + 1).bincount() / (d.train_y + 1).bincount()
    assert share[0] == 0 and ((share[1:] - 0.1).abs() < 0.01).all()
    s = data.class_subset(d, 30, seed=0)
    assert (s.train_y + 1).bincount().tolist() == [150] + [30] * 10
    for x, y in ((h.train_x, h.train_y), (h.test_x, h.test_y), (s.train_x, s.train_y)):
        assert equal(d.train_y[x], y)
    order = data.class_order(10, seed=1)
    r = data.reorder(d, order)
    assert r.classes == [str(c) for c in order]
    assert [r.classes[i] for i in r.test_y] == [d.classes[i] for i in d.test_y]
    assert equal(r.train_y < 0, d.train_y < 0)
    rejects("list", data.reorder, d, [1])


def test_a_folder_and_its_cache(tmp_path, monkeypatch):
    root, read = make_folder(tmp_path / "set", per_class=4), data.read_image
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_image", lambda name: os.stat("") if name[-5] == "3" else read(name))
        assert len(load(root).train_x) == 6
    d = load(root)
    assert d.train_x.shape == (8, 3, 32, 32) and d.train_y.tolist() == [0] * 4 + [1] * 4
    moments = stack(torch.std_mean(d.train_x.double() / 255, (0, 2, 3), correction=0))
    assert np.allclose([d.std, d.mean], moments, 0, 1e-9)
    assert load(root, 16).test_x.shape == (8, 3, 16, 16)
    moved = shutil.copytree(root, tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_image", lambda name: pytest.fail("the cache was not used"))
        again = load(f"{moved}/")
    assert data.fingerprint(again) == data.fingerprint(d) and again.notes == d.notes
    for other in (replace(d, train_x=d.train_x ^ 1), replace(d, test_y=1 - d.test_y)):
        assert data.fingerprint(other)["images"] != data.fingerprint(d)["images"]
    Image.new("RGB", (40, 40), (255, 0, 0)).save(root / "train/ant/0.png")
    x = load(root).train_x
    assert x[0, 0].min() == 255
    (root / ".cache-32.pt").write_bytes(b"torn")
    monkeypatch.setattr(os, "fsync", fails(OSError(28, "No space")))
    assert equal(load(root).train_x, x)
    assert sorted(os.listdir(root)) == [".cache-16.pt", ".cache-32.pt", "test", "train"]
    monkeypatch.setattr(os, "sysconf", lambda name: 200)
    rejects("16 images of 24x24.* 16$", load, root, 24)


def alter(root, commands):
    do = {"touch": Path.touch, "rm": shutil.rmtree, "mv": os.renames, "cp": shutil.copy, "ln": os.symlink}
    for verb, name, *rest in map(str.split, commands.split(";")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if verb == "add":
            add(root / name, *rest)
        else:
            do[verb](root / name, *(root / other for other in rest))


# Done to a folder; images of ant, bee, no label, test; notes or refusal.
FOLDERS = """\
mv test val
3 3 0 6; train: 6 images (ant 3, bee 3); test: 6 images (ant 3, bee 3)

mv ANT train/unknown
!: no class may be called 'unknown'

rm test
2 2 0 2 ... test, a tenth of each class held out of train: 2 images

mv ANT/0.png ANT/a/b/0.png;mv ANT/1.png ANT/1;mv ANT/2.png ANT/2.JPG
3 3 0 6

add unlabelled/a/x.png;add unlabelled/b/y.png;ln unlabelled/b unlabelled/a/c;add unlabeled/a/b/x.png
3 3 3 6 ... unlabelled: 3 images ... back up: 1: unlabelled/a/c

add val/ant/x.png;add train/x.png;add test/cat/x.png;add train/dog/a/0.png;rm train/dog/a
3 3 0 7 ... beside train: 1: val ... in no class folder: 1: train/x.png ... empty: 1: train/dog ... \
never trained: 1: cat

touch ANT/a.txt;touch ANT/a.png;ln nowhere ANT/b.png;ln /dev/null ANT/c.png
3 3 0 6 ... not an image that Pillow opens: 1: ANT/a.txt ... unreadable: 3: ANT/a.png (not a readable \
image), ANT/b.png ([Errno 2] No such file ... ANT/c.png (no file,

add ANT/.x.png;add ANT/.y/0.png;ln train ANT/up;ln . train/up
3 3 0 6 ... hidden or a link back up: 4: train/up, ANT/.x.png, ANT/.y, ANT/up

ln test/bee/1.png ANT/x.png;add unlabelled/x.png;cp test/bee/1.png unlabelled/y.png
4 3 2 6 ... in train and in test, used in both: 2: ANT/x.png, unlabelled/y.png ... several classes: 2

add ANT/a.png 64 600;add ANT/b.png 300 200;add ANT/c.png 300 400
4 3 0 6 ... unreadable: 2: ANT/b.png (Image size (60000 ... ANT/c.png (Image size (120000 ... 600x64

rm train
!/train is not there, but test; a folder data set is PATH/train/<class>/*

rm train;touch train;touch u;touch v;touch w
!/train is not there, but test, train, u, v and 1 more; a folder

rm train;rm test
!/train is not there; a folder

rm train/bee;rm test/bee
!/train: ['ant'] is too few classes

rm test/ant;touch test/ant/.x
!: class 'ant' must be in train and test, is not in test; a folder

rm ANT;touch ANT/0.png
!: class 'ant' has no readable image in train: ANT/0

rm test;rm ANT;add ANT/x.png
!: class 'ant' has one image and needs two""".replace("ANT", "train/ant").split("\n\n")


@cases("row", FOLDERS)
def test_folders(tmp_path, monkeypatch, row):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    make_folder(tmp_path)
    commands, told = row.split("\n")
    alter(tmp_path, commands)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            d = load(tmp_path)
        y = d.train_y.tolist()
        assert len(d.train_x) == len(y)
        text = f"{y.count(0)} {y.count(1)} {y.count(-1)} {len(d.test_y)}; {'; '.join(d.notes)}"
    except ValueError as error:
        text = str(error).replace(str(tmp_path), "!")
    first, *others = told.split(" ... ")
    assert text.startswith(first) and all(words in text for words in others) and text.isprintable()


def test_a_class_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["$a$", "_a", "猫", "a, b", "c" * 120, "d\ne", "bee", os.fsdecode(b"\xff")]
    alter(make_folder(tmp_path / "set", names, per_class=1), "add unlabelled/x.png")
    d = load("~/set")
    assert sorted(d.classes) == sorted([*names[:-1], "\\udcff"]) and "d\\ne 1" in d.notes[0]
    base, inject = data.load_dataset("digits", image_size=24), data.inject
    assert inject(base, "folder:~/set:a, b").classes[10:] == ["a, b"]
    d = inject(base, "folder:~/set:bee,_a")
    assert d.classes[10:] == ["bee", "_a"] and d.train_x.shape == (1349, 3, 24, 24)
    other = load("~/set", 24)
    for c in (10, 11):
        same = other.train_y == other.classes.index(d.classes[c])
        assert equal(d.train_x[d.train_y == c], other.train_x[same])
    rejects("did you mean 'bee'", inject, base, "folder:~/set:bees")
    rejects("a class 'bee' is there already", inject, base, "folder:~/set:bee,bee")
    rejects(f"did you mean 'folder:{tmp_path}'", data.load_dataset, str(tmp_path))
    rejects("did you mean 'mnist'", data.load_dataset, "minst")


def test_the_held_out_tenth_stays(tmp_path):
    alter(tmp_path, ";".join(f"add train/{c}/{i:02}.png" for c in ("ant", "bee") for i in range(24)))
    held = load(tmp_path).test_x
    alter(tmp_path, "add train/ant/x.png;add unlabelled/x.png")
    assert (load(tmp_path).test_x[:, None] == held).flatten(2).all(2).sum() >= 3
    assert load(tmp_path, 8).test_y.tolist() == [0, 0, 1, 1]


ramp = np.tile(np.arange(32), (32, 1))
grey, scaled = (ramp * 8 + ramp // 4).astype(np.uint8), ramp * 255 / 31
alpha = np.dstack([grey] * 3 + [(ramp > 15) * 255]).astype(np.uint8)
white, hole = np.where(ramp < 16, 255, grey), np.where(grey == 74, 255, grey)
turned = Image.Exif()
turned[0x112] = 3
# A file, the image in it, the grey that is read, tolerance, options.
PIXELS = {
    **{f"a.{kind}": (grey, grey, 0) for kind in "png bmp ppm gif tga jp2 webp".split()},
    "a.avif": (grey, grey, 6),
    "a.jfif": (grey, grey, 6),
    "turned.png": (np.uint16(grey) * 257, grey[:, ::-1], 0, {"exif": turned}),
    "frames.gif": (grey, grey, 0, {"save_all": True, "append_images": [Image.new("L", (32, 32))]}),
    "RGBA.png": (alpha, white, 0),
    "LA.png": (alpha[..., 2:], white, 0),
    "hole.png": (grey, hole, 0, {"transparency": 74}),
    "hole.gif": (grey, hole, 0, {"transparency": 74}),
    "CMYK.tiff": (grey, grey, 0),
    "1 bit.png": (ramp > 15, (ramp > 15) * 255, 0),
    "12 bits.tiff": (np.uint16(grey) * 16, grey, 0),
    "32 bits.tiff": (np.int32(ramp * 60_000_000), scaled, 1),
    "negative.tiff": (np.int32(ramp - 9), scaled, 1),
    "0..1.tiff": (np.float32(grey / 255), grey, 0),
    "0..255.tiff": (np.float32(grey), grey, 0),
    "any float.tiff": (np.float32(ramp * 1000 - 9), scaled, 1),
    "over 1.tiff": (np.float32(ramp / 30), scaled, 1),
    "nan.tiff": (np.float32(np.where(ramp, grey, np.nan)), grey, 0),
}


def test_pixels_are_right_in_every_format(tmp_path):
    for name, (image, expected, tolerance, *options) in PIXELS.items():
        image = Image.fromarray(image).convert("CMYK" if "CMYK" in name else None)
        image.save(tmp_path / name, quality=100, lossless=True, **dict(*options))
        x, errors, notes = data.read_images([tmp_path / name], 32)
        assert errors == [None] and not notes, name
        assert np.abs(x[0].numpy() - expected.astype(float)).max() <= tolerance, name


def test_images_are_read_in_order(tmp_path):
    alter(tmp_path, "add b/2.png 40 30;add b/3.png 8 8;add b/.h/0.png;touch b/torn.png;add a/1.png")
    files = data.find_images([tmp_path / "b", str(tmp_path / "a/1.png"), tmp_path / "no.png"])
    assert [file.name for file in files] == ["2.png", "3.png", "torn.png", "1.png", "no.png"]
    x, errors, notes = data.read_images(files, 24)
    assert [str(error)[:10] for error in errors] == ["None", "None", "not a read", "None", "[Errno 2] "]
    expected = ImageOps.fit(Image.open(files[0]), (24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(x[0].permute(1, 2, 0), expected) and not x[[2, 4]].any()
    told = "30x40 -> 24x24: the middle (1), 8x8 -> 24x24: enlarged (1), 32x32 -> 24x24: shrunk (1)"
    assert notes == told.split(", ")


@cases("name, first", [*zip(data.ARCHIVES, ("0", "airplane", "apple"), strict=True)])
def test_real_data_where_they_are(name, first):
    if not any((HERE / "data" / place).exists() for place in (name, data.ARCHIVES[name])):
        pytest.skip(f"{name} is not in data/")
    d, mnist = data.load_dataset(name, HERE / "data", download=False), name == "mnist"
    assert d.train_x.shape == (50_000 + 10_000 * mnist, 3, 32, 32) and len(d.test_y) == 10_000
    assert d.classes[0] == first and d.flip != mnist
    if name == "cifar10":
        assert np.allclose(d.mean, (0.4914, 0.4822, 0.4465), 0, 1e-4)


def test_a_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", fails(urllib.error.URLError("no network")))
    for name in data.ARCHIVES:
        rejects("is not there and could not be downloaded", data.load_dataset, name, tmp_path / "a/data")
        assert not any(tmp_path.iterdir())


def test_files_are_written_whole(tmp_path, monkeypatch):
    name, table = os.fsdecode(b"\xff.png"), tmp_path / "a.csv"
    rows = [{"a": 1 / 3, "b": None}, {"a": "猫", "c": 2}]
    assert data.write_table(table, [{"a": name}, *rows]) is None
    assert table.read_text("utf-8") == "a,b,c\n\\udcff.png,,\n0.333333,,\n猫,,2\n"
    data.write_json(tmp_path / "a.json", {"猫": name})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"猫": name}
    data.write_csv(table, [], ["a", "b"])
    monkeypatch.setattr(os, "replace", fails(PermissionError(13, "denied")))
    assert "a.csv was not written (denied)" in data.write_table(table, rows)
    monkeypatch.setattr(os, "fsync", fails(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        data.write_table(table, rows)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json"] and table.read_text() == "a,b\n"


def test_checkpoints_are_read_or_refused(tmp_path):
    file, read = tmp_path / "a.pt", data.read_checkpoint
    rejects("a.pt is not there", read, file, 3)
    data.write_atomically(file, partial(torch.save, {"version": 3}))
    assert read(file, 3) == {"version": 3}
    rejects("has version 3, this program writes 4", read, file, 4)
    data.write_atomically(file, b"torn")
    rejects("a.pt is damaged", read, file, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, limits[1]))
    with pytest.raises(OSError, match="too large"):
        data.write_atomically(file, partial(torch.save, zeros(99_999)))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- the growing head ----
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@cases("make", [SGD, torch.optim.AdamW, torch.optim.RMSprop])
@cases("kind", [partial(nn.Linear, bias=False), model.CosineHead])
def test_other_rows_are_left_alone(make, kind):
    plain, seen = kind(6, 5), []
    head = copy.deepcopy(plain)
    head.weight.register_hook(seen.append)
    head.weight.register_post_accumulate_grad_hook(seen.append)
    nets = [(net, make([{"params": net.parameters(), "lr": 0.02}])) for net in (plain, head)]
    alive = head(unit_rows(9, 6)).sum()
    for seed, used in enumerate((5, 4, 4, 4)):  # later, new units take no part
        for net, opt in nets:
            step(opt, net(unit_rows(9, 6, seed))[:, :used].exp().sum())
        if seed == 0:
            gp.recycle_unit(head, opt, 4)
            gp.grow_head(head, opt, 2)
        for p, old in zip(head.parameters(), plain.parameters(), strict=True):
            assert_close(p[:4], old[:4], rtol=1e-6, atol=1e-7)
            if seed == 0:
                state = [v for v in opt.state[p].values() if torch.is_tensor(v) and v.ndim]
                assert state and not any(v[4:].any() or not v[:4].any() for v in (*state, p.grad))
                assert equal(p[:4], old[:4]) and equal(p.grad[:4], old.grad[:4])
                assert not equal(p[4], old[4])
    assert alive.requires_grad and len(seen) == 8


def test_a_wrapped_head_is_changed_inside():
    inner, h = nn.Linear(4, 3), unit_rows(5, 4)
    inner.sigma = nn.Parameter(ones(1))
    head = torch.compile(nn.DataParallel(inner), backend="eager")
    before = head(h).detach()
    gp.grow_head(head, None, 2)
    gp.recycle_unit(head, None, 0)
    gp.imprint(head, 4, h[:1], h[1:])
    after = head(h)
    assert_close(after[:, 1:3], before[:, 1:])
    assert after.shape == (5, inner.out_features) == (5, 5) and not equal(after[:, 0], before[:, 0])


def trained(name):
    head = nn.Linear(4, 3)
    head.weight.sum().backward()
    head.sgd = getattr(torch.optim, name)(head.parameters())
    head.sgd.step(lambda: 0.0)
    return head


TWO, ROW, SOME = eye(2), ones(1, 2), tensor([True, False])
WRONG = """\
nn.Linear(2, 3): grow_head(m, None, 0) | imprint(m, 3, ROW) | imprint(m, 0, ROW[:0]) \
| imprint(m, 0, ROW, ones(4, 3)) | imprint(m, 0, ROW, TWO, 1.5) | imprint(m, 0, ROW, TWO, 0.1, SOME) \
| prune_smallest(m, 1.1) | prune_smallest(m, math.nan) | prune(m, 0.5, 0.5, {}) \
| apply_masks(m, {"weight": ones(4, 2)}) | apply_masks(m, {"weight": zeros(3, 2), "x": ROW}) \
| claim(TWO, TWO, tensor([0, 1])) | claim(TWO, ROW, SOME)
nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)): prune_filters(m, 0.5)
weight_norm(nn.Linear(2, 3)) | nn.LazyLinear(3): prune_smallest(m, 0.5)
weight_norm(nn.Linear(2, 3)) | nn.LazyLinear(3) | nn.DataParallel(nn.Bilinear(2, 2, 3)) \
| torch_prune.l1_unstructured(nn.Linear(2, 3), "bias", 1): grow_head(m, None) | recycle_unit(m, None, 0) \
| imprint(m, 0, ROW)
trained("Adafactor") | trained("LBFGS") | trained("Rprop"): grow_head(m, m.sgd) | recycle_unit(m, m.sgd, 0)"""


@pytest.mark.filterwarnings("ignore")
@cases("line", WRONG.splitlines())
def test_a_misfit_changes_nothing(line):
    makes, calls = line.split(": ", 1)
    for make, call in itertools.product(makes.split(" | "), calls.split(" | ")):
        m = eval(make)
        before = str(vars(m))
        with pytest.raises(ValueError) as error:
            eval("gp." + call)
        assert "\n" not in str(error.value) and str(vars(m)) == before, call


@cases("dtype", [torch.float16, torch.float64])
def test_arithmetic_stays_in_float32(dtype):
    h, y, named = crowd(3, 40, 0, 2)

    def values(x):
        near = gp.claim(x, x, named), gp.threshold(x, named), gp.resemblance(x, y)
        return *near, gp.two_means(x)[0], gp.discriminant(x[0], x[40:], y[40:])

    h = h.to(dtype).requires_grad_()
    with in_bf16():
        found = values(h)
    assert_close(found, values(h.float()))
    head = nn.Linear(16, 3).to(dtype)
    gp.grow_head(head, None)
    gp.recycle_unit(head, None, 0)
    gp.imprint(head, 3, h[y == 2], h[y < 2])
    assert head.weight.dtype == dtype and (head(h[y < 2]).argmax(1) == 3).float().mean() < 0.05
    gp.Units([1]).observe(h[:, :1])
    gp.prune_smallest(head, 0.5)
    assert (head.weight != 0).sum() == 32


def test_an_imprinted_unit_takes_little():
    h, others = (randn(205, 8) + 1).split([5, 200])
    for head, *rest in ((nn.Linear(8, 4, bias=False), others), (model.CosineHead(8, 4),)):
        gp.imprint(head, 3, h, *rest)
        mean = F.normalize(F.normalize(h, dim=1).mean(0), dim=0) * head.weight[:3].norm(dim=1).mean()
        assert_close(head.weight[3], mean)
    for tolerance in (0.0, 0.02, 0.5, 1.0):
        gp.imprint(head, 3, h, others, tolerance)
        assert (head(others).argmax(1) == 3).float().mean() <= tolerance and not head.bias[:3].any()
    gp.imprint(head, 3, h, others, 0.02, 0 ** arange(4))
    assert 0 < (head(others)[:, 3] > head(others[None])[0, :, 0]).float().mean() <= 0.02


def test_the_discriminant_is_fishers():
    own, kind = linspace(-1, 1, 12), arange(90) % 4
    others = 4 * unit_rows(90, 12) * linspace(0.2, 3, 12) + kind[:, None]
    x = others.double()
    around = x - stack([x[kind == c].mean(0) for c in range(4)])[kind]
    spread = 0.2 * around.T @ around / 90 + 0.8 * around.square().mean() * eye(12)
    expected = torch.linalg.solve(spread, own - x.mean(0)).float()
    assert_close(gp.discriminant(own, others, kind), expected, rtol=1e-4, atol=1e-5)
    assert gp.discriminant(own, others[:1], kind[:1]).isfinite().all()


def test_named_units_are_not_recycled():
    head, units, p = model.CosineHead(5, 2), gp.Units([3, 1]), tensor([0.5, 0.5, 0.0])
    assert units.allocate(head, None, UNNAMED) == (2, "grown") and head.out_features == 3
    assert units.of_classes(5).tolist() == [-1, 1, -1, 0, -1]
    assert units.in_use(arange(5) == 1).tolist() == [False, True, True]
    for _ in range(600):
        units.observe(p[None])
    assert_close(units.utility, p, atol=0.01, rtol=0)
    assert units.redundant() is None
    units.age, units.given[2] = [9] * 3, "wolf"
    assert units.redundant() is None
    units.given.clear()
    assert units.allocate(head, None, 2) == (2, "recycled") and (units.owner, units.age[2]) == ([3, 1, 2], 0)
    units.age, units.utility = [9] * 3, zeros(3)
    assert units.redundant() is None


def chain(width):
    return nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, width, 1), nn.BatchNorm2d(width)


actions = st.sampled_from("step recycle grow prune filters".split())


@any_example
@given(st.lists(st.tuples(actions, fractions), max_size=12), seeds)
def test_growing_and_pruning(todo, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(*chain(5), nn.Flatten(), model.CosineHead(5, 2))
    head, units, masks, share = net[5], gp.Units([0, 1]), {}, {"prune": 0.0, "filters": 0.0}
    opt = SGD(net.parameters())
    for action, value in todo:
        if action == "step":  # its momentum moves what was pruned
            step(opt, F.cross_entropy(net(randn(4, 3, 3, 3)), arange(4) % len(head.weight)))
        elif action in share:
            share[action] = max(share[action], value)
            before, masks = masks, gp.prune(net, share["prune"], share["filters"], masks)
            assert not any((masks[name][: len(m)] & ~m).any() for name, m in before.items())
            assert gp.sparsity_of(net) > share["prune"] - 0.51 / (256 + head.weight.numel())
        else:
            if action == "recycle":
                units.owner[-1] = FREE
            assert units.allocate(head, opt, 7)[1][:4] == action[:4]
        gp.apply_masks(net, masks)
        assert {len(x) for x in (*head.parameters(), units.owner, units.utility)} == {head.out_features}
        assert not any(net.get_parameter(name)[: len(m)][~m].any() for name, m in masks.items())


def test_weights_and_filters_go():
    net = nn.Sequential(*chain(8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    net.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
    net.heads, net.wide = nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 1, kdim=2)
    net[5].weight = net[4].weight
    sizes = cat([p.detach().abs().flatten() for p in gp.prunable(net).values()])
    first = gp.prune_smallest(net, 0.37)
    kept = cat([mask.flatten() for mask in first.values()])
    assert int((~kept).sum()) == round(0.37 * len(kept)) and sizes[~kept].max() <= sizes[kept].min()
    assert math.isclose(gp.sparsity_of(net), (~kept).float().mean(), rel_tol=1e-6) and net.scale.all()
    names = "0.weight 2.weight 4.weight heads.in_proj_weight heads.out_proj.weight wide.out_proj.weight"
    assert sorted(first) == names.split()
    nn.init.ones_(net[0].weight)
    gp.prune(net, 0.1, 0.0, first | {"5.weight": first["4.weight"]})
    assert equal(net[0].weight != 0, first["0.weight"])
    nn.init.ones_(net[1].bias)
    kept = gp.prune_filters(net, 1.0)["1.bias"]
    assert kept.sum() == 1 and not net[1](net[0](rand(2, 3, 8, 8)))[:, ~kept].any()
    assert gp.prune_smallest(net[1], 0.5) == {} and gp.sparsity_of(nn.ReLU()) == 0


def test_claims_and_resemblance_by_definition():
    h, pool_h, place = 2 * unit_rows(1500, 5), 3 * unit_rows(40, 5, 1), arange(40)
    named = place % 3 == 0

    def claimed(x, without=-1):
        kernel = ((F.cosine_similarity(x[None], pool_h) - 1) / 0.2).exp()
        return kernel[named & (place != without)].sum() / named.sum() / kernel.mean()

    found = gp.claim(h, pool_h, named)[::214]
    assert_close(found, stack([claimed(x) for x in h[::214]]), rtol=1e-4, atol=1e-5)
    left = stack([claimed(pool_h[j], j) for j in place[named]])
    assert math.isclose(gp.threshold(pool_h, named, 0.3), left.quantile(0.3), rel_tol=1e-3, abs_tol=1e-4)
    assert gp.threshold(TWO, SOME) == -math.inf
    y = (place % 4).where(place < 39, 4)
    others = stack([pool_h[(y == y[i]) & (place != i)].mean(0) for i in range(39)])
    cosine = F.cosine_similarity(pool_h[:39], others)
    assert math.isclose(gp.resemblance(pool_h, y), cosine.quantile(0.25), rel_tol=1e-4)
    assert gp.resemblance(pool_h[:4], y[:4]) == 1


def crowd(classes, size, seed, named):
    """Embeddings [classes * size, 16], a direction a class; classes; a tenth of labels."""
    y = arange(classes).repeat_interleave(size)
    h = 3 * eye(16)[y] + 0.5 * randn(len(y), 16, generator=seeded(seed))
    return h, y, (rand(len(y), generator=seeded(seed + 100)) < 0.1) & (y < named)


def test_a_kind_is_found_after_looks():
    for named, size, options, when in (
        (4, 150, (0.2, 3, 4), [2, 7]),  # and after four looks without a find
        (5, 150, (), []),  # all are named
        (0, 150, (), []),  # before the first label
        (4, 150, (2,), []),
        (4, 15, (), []),
    ):
        found, labelled = [], crowd(5, size, 0, named)[2]
        monitor, index = gp.ConfusionMonitor(len(labelled), *options), (~labelled).nonzero()[:, 0]
        for look in range(12):
            h, y, _ = crowd(5, size, look, named)
            claims, limit = gp.claim(h[index], h, labelled), gp.threshold(h, labelled)
            group = monitor.find_concept(index, claims, limit, h[index], h[labelled], y[labelled])
            if group is not None:
                found.append(look)
                assert (y[index[group]] == 4).float().mean() > 0.95 and len(group) > 40
        assert found == when


def test_a_kind_is_found_beside_a_class():
    h, y, labelled = crowd(5, 150, 0, 4)
    index = ((y < 4) & ~labelled | (y == 4) & (arange(750) % 2 == 0)).nonzero()[:, 0]
    monitor, groups = gp.ConfusionMonitor(750, patience=1, cooldown=-1), []
    claims = (y[index] % 4).float()
    for x in (h, 0 * h, 0 * h + 1, h * math.nan):
        groups.append(monitor.find_concept(index, claims, 0.5, x[index], x[labelled], y[labelled]))
    assert len(groups[0]) > 40 and (y[index[groups[0]]] == 4).all() and groups[1:] == [None] * 3


def nameless(kinds=5, units=4, wrap=None, truth=True):
    h, y, labelled = crowd(kinds, 150, 0, 4)
    torch.manual_seed(0)
    h, network, head = F.normalize(h, dim=1), nn.Module(), model.CosineHead(16, units)
    for c in range(4):
        gp.imprint(head, c, h[y == c])
    network.head = wrap(head) if wrap else head
    networks = network, copy.deepcopy(network), SGD(network.parameters())
    told, place, taught = torch.where((y < 4) | truth, y, -1), arange(len(y)), arange(kinds) < 4
    manager = gp.HeadManager(networks, lambda n, i: h[i], told, place, "abcdefg", range(units))
    manager.monitor.patience, manager.monitor.cooldown, manager.final = 1, 0, labelled
    pool = {"active": y >= 0, "labelled": labelled, "labelled_before": labelled, "taught": taught}
    return manager, Namespace(taught_before=taught, place=place, **pool), h, y


def open_by_hand(manager, pool, *groups):
    for group in groups:
        unit, _ = manager.open_unit(pool, UNNAMED, group.nonzero()[:, 0])
        manager.monitor.concept[group] = unit


def happened(manager):
    return " ".join(event["event"] for event in manager.events)


def review(manager, pool, h, y):
    manager.review_units(pool, (y < 4).nonzero()[:, 0], h)
    return [manager.monitor.concept[y == kind].unique().tolist() for kind in range(4, int(y.max()) + 1)]


@cases("wrap, truth", [(None, True), (nn.DataParallel, False), (nn.Module.half, True)])
def test_every_nameless_kind_gets_a_unit(wrap, truth):
    manager, pool, h, y = nameless(6, wrap=wrap, truth=truth)
    pool.labelled_before = y < 0
    assert (manager.discover(pool, h) == -1).all() and not manager.events  # without labels
    pool.labelled_before = pool.labelled
    with in_bf16():
        votes = [manager.discover(pool, h) for _ in range(4)][-1]
        best = manager.predict(h, pool.taught)[0]
    assert manager.units.owner == [0, 1, 2, 3, UNNAMED, UNNAMED] and happened(manager) == "opened opened"
    for kind in (4, 5):
        unit = int(votes[y == kind].mode().values)
        assert (y[votes == unit] == kind).float().mean() > 0.95
        assert (votes[y == kind] == unit).float().mean() > 0.5 < (best[y == kind] == unit).float().mean()
    assert (votes[pool.labelled] == -1).all() and (best == y)[y < 4].float().mean() > 0.9
    told = {(event["class"], event["purity"]) for event in manager.events}
    assert told == ({("e", 1.0), ("f", 1.0)} if truth else {(None, None)})
    state, mix = Namespace(head=manager, bank=losses.MemoryBank(9, 9)), dict.fromkeys(train.TERMS, 0)
    prior = train.make_targets(state, pool, mix, votes, h, False, None).prior.tolist()
    assert prior == [0] * 4 + [approx(2 * math.log(gp.resemblance(h[y < 4], y[y < 4])), abs=0.1)] * 2
    manager.units.age = [3] * 6
    assert (votes == UNKNOWN).any() and not (manager.discover(pool, h) == UNKNOWN).any()


def test_a_unit_is_provisional_and_released():
    manager, pool, h, y = nameless(6)
    full, concept = pool.labelled, manager.monitor.concept
    manager.final = full | (pool.place == 899)  # no change
    pool.labelled = pool.labelled_before = full & (pool.place % 4 > 0)  # a pause
    for units in ([4], [4, 5]):
        votes = manager.discover(pool, h)
        assert manager.units.unnamed() == units and (votes[concept >= 0] == UNKNOWN).all()
    pool.labelled = manager.final
    manager.monitor.patience, manager.monitor.cooldown_left = 2, 9
    for pool.labelled_before in (full, full, manager.final):
        votes = manager.discover(pool, h)
    assert happened(manager) == "opened opened released released opened opened"
    unit = int(votes[y == 4].mode().values)
    assert (y[votes == unit] == 4).sum() > 40
    pool.labelled = pool.labelled_before = pool.labelled | (y == 4) & (pool.place % 8 == 0)
    votes = manager.discover(pool, h)
    assert manager.units.owner[unit] == FREE and happened(manager).endswith("opened opened released")
    assert not (concept == unit).any() and not (votes == unit).any()
    assert manager.open_unit(pool, UNNAMED, tensor([700])) == (unit, "recycled")


def test_units_merge_and_split():
    for told, kinds, events in (
        ({4: "dog", 5: "wolf"}, [[4, 5], [6], [7]], "split"),
        (None, [[4, 5], [6], [7]], "split"),  # too young
        ({}, [[5], [6], [4]], "merged split"),
        ({4: "wolf", 6: "pack"}, [[4], [6], [6]], "merged"),
    ):
        manager, pool, h, y = nameless(7)
        part = pool.place % 5 == 0
        open_by_hand(manager, pool, part & (y == 4), ~part & (y == 4), y > 4)
        manager.units.age, manager.units.utility = [3 * (told is not None)] * 7, zeros(7)
        manager.given |= (told := told or {})
        found = review(manager, pool, h, y)
        assert found[0] == kinds[0] and sorted(found) == sorted(kinds) and happened(manager) == events
        best = manager.predict(h, pool.taught)[0].view(7, -1)[5:]
        assert ((best == tensor(found[1:])).float().mean(1) > 0.9).all()
        manager.release(5)
        assert (manager.monitor.concept == 5).any() == (5 in told)
    pool.labelled = pool.labelled_before = pool.labelled | (y == 4) & (pool.place % 8 == 0)
    manager.discover(pool, h)
    again = nameless(7, units=7)[0]
    again.load_state_dict(manager.state_dict())
    manager.log("arrived")
    manager.monitor.concept.fill_(-1)
    assert again.names(pool.taught) == [*"abcd", "wolf", None, "pack"]
    assert again.units.owner[4::2] == [UNNAMED] * 2 and again.units.redundant() is None
    assert again.events == manager.events[:-1] and (again.monitor.concept == 6).any()
    again.given[4] = "b"
    assert again.answered(pool.taught)[:5].tolist() == [0, 1, 2, 3, 1]


def test_a_wide_class_merges_no_units():
    manager, pool, h, y = nameless(7)
    h[:75] += 2 * h[y == 6].mean(0)
    h[y == 5] += h[y == 4]
    open_by_hand(manager, pool, y == 4, y == 5)
    assert review(manager, pool, h, y)[:2] == [[4], [5]]


@cases("units", [4, 5])  # one for the class?
@cases("found", [True, False])  # one without a name?
def test_first_labels_name_their_unit(found, units):
    manager, pool, h, y = nameless(units=units)
    unit = units if found else 4
    open_by_hand(manager, pool, *[y == 4] * found)
    known, learner = pool.labelled, manager.network.head.weight.clone()
    fifth, own = ((y == 4) & (pool.place % 20 == n) for n in (0, 1))
    pool.labelled, pool.taught = known | fifth, ones(5) > 0
    manager.name_class(pool, 4, torch.where(own & found, unit, -1), h if found else None)
    assert manager.units.owner == [0, 1, 2, 3, *[FREE] * (units - 4) * found, 4]
    assert happened(manager) == ("released " * (units - 4) + "named" if found else "grown" * (5 - units))
    assert (manager.predict(h, pool.taught)[1] == y).float().mean() > 0.9
    # It points at its images; the learner is left alone.
    towards = gp.discriminant(h[fifth | own & found].mean(0), h[known], y[known])
    assert F.cosine_similarity(manager.ema.head.weight[unit], towards, dim=0) > 0.9999
    assert not found or equal(manager.network.head.weight, learner)


# ---- evaluate ----
LABELS = arange(400) % 4
BLOBS = 2 * unit_rows(4, 10)[LABELS] + 3 * unit_rows(400, 10, 1)
HALVES = BLOBS[:200], LABELS[:200], BLOBS[200:], LABELS[200:]
IMAGES = randint(256, (300, 3, 32, 32), generator=seeded()).byte()


def test_probe_and_knn_are_scikit_learns():
    from sklearn import linear_model, neighbors

    logistic = linear_model.LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=1000)
    voters = neighbors.KNeighborsClassifier(15, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    scaled = (BLOBS - BLOBS[:200].mean(0)) / BLOBS[:200].std(0)
    for reference, rows, found, apart in (
        (logistic, scaled, ev.linear_probe(*HALVES, l2=1e-3), 0.005),
        (voters, BLOBS, ev.knn_accuracy(*HALVES, k=15), 1e-6),
    ):
        expected = reference.fit(rows[:200], LABELS[:200]).score(rows[200:], LABELS[200:])
        assert 0.5 < expected < 1 and abs(found - expected) <= apart


COUNTED = """dict(enumerate(forgetting([[0.5, 0], [0.9, math.nan], [0.7, 0.6]]))) | 0.2, 0
accuracy_by_class(said, y, "abcd") | 1 / 2, 1, 2 / 3, None
epoch_accuracy(said, y, 2) | 4 / 6, 2 / 3, 2 / 3
epoch_accuracy(said, y, 3) | 4 / 6, 4 / 6, None
open_set(claims, 0.15, no, right, first, ~no) | 0.4, 0.5, 5 / 6
open_set(claims, 0.15, no, right, ~no, ~no) | 0.2, None, None
pseudo_label_quality(said, sure / 10, y, y < 2) | 2 / 3, 2 / 3
gcd_accuracy(2 - said, y, (y < 1).int()) | 4 / 6, 3 / 4, 1 / 2
gcd_accuracy(said, 0 * y - 1, y < 1) | None, None, None
cluster_scores(torch.eye(3)[said.repeat(2)], torch.cat([y, ~y])) | 2 / 27, 0.52066525, 1, 4 / 6"""


@cases("row", COUNTED.splitlines())
def test_figures_are_counted(row):
    said, y, sure = tensor([[0, 1, 1, 2, 2, 0], [0, 1, 0, 2, 2, 2], [9, 7, 9, 10, 0, 0]])
    claims, first = tensor([0.9, 0.8, 0.1, 0.05, 0.2]), arange(5) < 3
    no, right = claims < 0, tensor([1, 0, 1, 0, 0]).bool()
    call, expected = row.split(" | ")
    assert [*eval(call, vars(ev) | locals()).values()] == approx(eval(expected))


def test_embedding_changes_nothing():
    network, x = model.build("cnn", 3), IMAGES[:9]
    network.encoder[1].eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    h = ev.embed(network, x, batch_size=4)
    assert h.shape == (9, 128) and h.dtype == torch.float32
    assert_close(ev.embed(network, x / 255), h)
    assert ev.embed(nn.Flatten(), x).shape == (len(x), x[0].numel())
    with in_bf16():
        assert_close(ev.embed(network, x), h)
    network.head.forward = fails(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        ev.embed(network, x)
    assert [m.training for m in network.modules()] == modes
    exact(network.state_dict(), before)


def test_gcd_accuracy_is_one_match():
    for seed in range(6):
        unit, y = randint(-1, 4, (2, 40), generator=seeded(seed))
        right = (tensor([*match, 9])[unit] == y for match in itertools.permutations(range(4)))
        best = max(r[y >= 0].float().mean().item() for r in right)
        assert ev.gcd_accuracy(unit, y, y == 2)["gcd_all"] == approx(best)


def test_semi_kmeans_holds_the_labelled():
    y, at = arange(300) % 5, arange(300)
    h, old = unit_rows(5, 16)[y] + 0.4 * unit_rows(300, 16, 1), y < 3
    told = torch.where(at < 3, (y + 1) % 3, y)
    clusters = ev.semi_kmeans(h, told, old & (at < 60), 5)
    assert equal(clusters[old], told[old])
    assert min(ev.gcd_accuracy(clusters, told, ~old).values()) == 1
    figures = ev.open_world(h, y, old & (at < 60), ~old)
    assert [*figures] == [f"gcd_{w}kmeans_{p}" for w in ("", "semi_") for p in ("all", "old", "new")]
    assert min(figures.values()) > 0.95 and ev.open_world(h, y, y >= 0, ~old) == {}


def test_concepts_are_the_best_units():
    unit, y = tensor([[7, 7, 7, 8, 8, 9, 3, -1, 7], [5, 5, 4, 6, 6, 5, 4, 6, -1]])
    purity = {7: approx(2 / 3), 8: 1.0, 9: 1.0, 12: None}
    found = ev.concept_scores(unit, y, [7, 8, 9, 12], [4, 5, 6])
    assert found == {"concepts": 4, "concepts_true": 2, "purity": purity}
    assert ev.concept_scores(unit[:0], y[:0], [], [5])["concepts_true"] == 0


def test_calibration_error():
    logits = 9 * unit_rows(4000, 5)
    y = torch.multinomial((logits / 2.5).softmax(1), 1, generator=seeded(1))[:, 0]
    closed = F.pad(logits, (0, 1), value=-math.inf)
    assert ev.fit_temperature(closed - 1500, y) == approx(2.5, rel=0.1)
    confidence, right = logits.softmax(1).amax(1), y > 1
    gaps, _ = np.histogram(confidence, 15, (0, 1), weights=right.float() - confidence)
    expected = np.abs(gaps).sum() / 4000
    assert ev.calibration_error(confidence, right) == approx(expected, abs=1e-4)
    with torch.inference_mode():
        assert ev.linear_probe(*(part.clone() for part in HALVES), 1e-3) > 0.5


WRONG_FIGURES = """test_y has 3: knn_accuracy(h, y, h, y[:3])
test_y has NaN: knn_accuracy(h, y, h, y - 1)
train_y has: linear_probe(h, y - 1, h, y)
h has NaN: cluster_scores(h * math.nan, y)
k must be: knn_accuracy(h, y, h, y, k=0)
h has 0 rows: cluster_scores(h[:0], y[:0])
accuracy has no: forgetting([])
is_new must: novelty_auroc(h[:, 0], y < 9)
k is 2: semi_kmeans(h, y, y < 3, 2)
k is 400: semi_kmeans(h, y, y < 3, 400)
bins must be: calibration_error(h[:, 0], y > 0, 0)
method is one of: project(h, "lda")
part is one of: embed(network, x, "logit")
h',., not 'z': embed(network.encoder, x, "z")
300, 3, 16, 16: embed(network, x[..., :16, :16])
int64: embed(network, x.long())
no unit with a name: answers(network, x)"""


@cases("row", WRONG_FIGURES.splitlines())
def test_wrong_figures_are_named(row):
    words, call = row.split(": ")
    network = model.build("cnn", 3)
    network.names = [None] * 3
    rejects(words, eval, call, vars(ev) | dict(h=BLOBS, y=LABELS, network=network, x=IMAGES))


IN_FLOAT32 = """linear_probe(h, y.int(), h, y.int(), 1e-3)
cluster_scores(h, y)
fit_temperature(h[:, :4], y)
calibration_error(h[:, 0].abs() / 32, y > 1)
project(h, "pca").tolist()
semi_kmeans(h, y, torch.arange(400) < 100, 4).tolist()"""


@cases("call", IN_FLOAT32.splitlines())
def test_figures_are_those_of_float32(call):
    h = (4 * BLOBS).round() / 4
    expected = eval(call, vars(ev) | {"h": h, "y": LABELS})
    with in_bf16():
        for same in (h.half(), h.bfloat16(), h.double(), h.requires_grad_()):
            assert eval(call, vars(ev) | {"h": same, "y": LABELS}) == expected


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    torch.manual_seed(0)
    kinds, network = arange(36) // 12, model.build("cnn", 4)
    x = (220 * eye(3)[kinds, :, None, None] + IMAGES[:36] / 13).byte()
    network(x / 255)
    h = F.normalize(ev.embed(network, x), dim=1)
    network.head.weight.data[:3] = h.view(3, 12, -1).mean(1)
    told = dict(h=h.half(), labelled=kinds < 2, limit=0.5, temperature=2.0, unnamed=[2])
    more = dict(answering=told, given={}, version=train.VERSION, units={"owner": [0, 1, -1, -2]})
    path = tmp_path_factory.mktemp("answering") / "checkpoint.pt"
    torch.save(model.pack(network) | more | {"names": ["red", "green", None, None]}, path)
    return path, x


def test_answers(answering):
    path, x = answering
    network = model.load(path)
    said = ev.answers(network, x, batch_size=7)
    assert said["answer"] == ["red"] * 12 + ["green"] * 12 + ["unit 2"] * 12
    assert said["claim"][:24].min() > 0.5 > said["claim"][24:].max()
    logits = ev.embed(network, x, "logits")[:, :3]
    assert_close(said["confidence"], (logits / 2.0).softmax(1).amax(1), atol=0.02, rtol=0)
    network.answering["limit"] = 1.1 * float(said["claim"].max())
    assert ev.answers(network, x)["answer"] == ["unknown"] * 24 + ["unit 2"] * 12


def test_files_are_answered(answering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures/a, b").mkdir(parents=True)
    for i, image in enumerate(answering[1][::6]):
        TF.to_pil_image(image).resize((40, 32)).save(f"pictures/a, b/猫_{i}.png")
    Path("pictures/torn.png").write_bytes(b"torn")
    paths = ["pictures", "pictures/a, b/猫_0.png", "none.png", "--out", "猫.1"]
    command = [sys.executable, HERE / "evaluate.py", answering[0].parent, "--predict", *paths]
    poor = os.environ | {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://missing"}
    done = subprocess.run(command, capture_output=True, env=poor)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    words = rb"(?s)40x32 -> 32x32.*2  could not be read.*9 images: \?.1.csv, \?.1.png"
    assert re.search(words, done.stdout)
    rows = list(csv.DictReader(Path("猫.1.csv").read_text("utf-8").splitlines()))
    assert list(rows[0]) == "file answer unit confidence claim error".split()
    told = "/".join(f"{Path(row['file']).stem} {row['answer']} {row['unit']}" for row in rows)
    seen = "猫_0 red 0/猫_1 red 0/猫_2 green 1/猫_3 green 1/猫_4 unit 2 2/猫_5 unit 2 2"
    assert told == f"torn  /{seen}/猫_0 red 0/none  "
    assert all((row["error"] > "") == ([*row.values()][1:5] == [""] * 4) for row in rows)
    assert rows[1] == rows[7] and 0 < float(rows[1]["confidence"]) <= 1
    assert Path("猫.1.png").stat().st_size > 10_000
    Path("a.csv").touch()
    for bad, out in ("猫.1.png", "猫.1"), ("none.png", "猫.1"), ("pictures", "a"):
        assert ev.main([str(answering[0]), "--predict", bad, "--out", out]) == 2


def test_a_person_names_units(answering, tmp_path, capsys):
    assert "folder with images" in refused(capsys, ev.main, [answering[0], "--predict", tmp_path])
    path = shutil.copy(answering[0], tmp_path)
    wrong = "9=blue: unit 9 is not there|3=blue: unit 3 is free|0=blue: unit 0 is a class's|2: write|"
    wrong += "x=blue: write|2=: write|2= : write|=blue: write|2=unknown: write|2=unit 7: write"
    for line in wrong.split("|"):
        pair = line.split(":")[0]
        assert line in refused(capsys, ev.main, [path, "--name", "2=sky", "--name", pair])
        assert Path(path).read_bytes() == answering[0].read_bytes()
    for name, more in (("blue, 猫", ""), ("red", ", as unit 0 does")):
        assert ev.main([str(tmp_path), "--name", f"2 = {name} "]) == 0
        assert f"unit 2 answers {name}{more}\n" in capsys.readouterr().out
        network = model.load(path)
        assert network.names == ["red", "green", name, None]
        said = ev.answers(network, answering[1])
        assert said["answer"][24:] == [name] * 12
    p = ev.embed(network, answering[1], "logits")[24:, :3].softmax(1)[:, 1]
    roots = (1 - p).sqrt(), p.sqrt()
    assert_close(said["confidence"][24:], roots[0] / sum(roots), atol=1e-3, rtol=0)
    network.answering["temperature"] = 9.0
    assert ev.answers(network, answering[1])["answer"] == said["answer"]
    saved = torch.load(path, weights_only=True)
    assert saved["given"] == {2: "red"} and saved["units"]["owner"] == [0, 1, -1, -2]


def test_mistakes_and_concepts_are_sorted():
    x = arange(8)
    said, y = tensor([[0, 1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 1]])
    sure = tensor([0.9, 0.5, 1.0, 0.7, 0.8, 0.9, 0.6, 1.0])
    ((_, images, captions),) = ev.mistake_rows(x, said, sure, y, ["cat", "dog"])
    assert images.tolist() == [4, 3, 6, 1] and captions[0] == "dog\n80 %, is\ncat"
    assert ev.mistake_rows(x, y, sure, y, ["cat", "dog"]) == []
    h = eye(4)[[0, 0, 1, 2, 2, 2, 3, 3]]
    h[3] += 0.5
    h[5] -= 0.5
    unit = tensor([0, 0, 0, 2, 2, 2, -1, -1])
    rows = ev.concept_rows(x, h, unit, unit < 0, ["cat", None, None])
    labels = ["unit 2\n3 images", "unknown\n2 images", "cat (unit 0)\n3 images"]
    assert [label for label, _ in rows] == labels and rows[0][1][0] == 4


@cases("n", [2, 10, 100])
def test_pictures_of_any_names(tmp_path, monkeypatch, capsys, n):
    import matplotlib

    monkeypatch.chdir(tmp_path)
    before, known, y = dict(matplotlib.rcParams), n - n // 3, arange(3 * n) % n
    names = [*"a $5 or $6|_hidden|猫|new\nline|\udcff|{x}|%s|\\alpha$".split("|"), "n" * 120]
    classes = [name * i for i in range(1, 13) for name in names][:n]
    full = ["accuracy", "old_accuracy", "labelled", *(f"loss_{term}" for term in ev.TERMS)]
    row = dict.fromkeys([*full, *(f"accuracy_{name}" for name in classes)], 0.5)
    row |= dict(labels=9, units=known, new_accuracy=None)
    rows = [row | dict(epoch=e, stage=f"stage {e // 3}", classes=known if e < 3 else n) for e in range(1, 7)]
    life = [(4, "arrived", None, name) for name in classes[known:]] + [(4, "opened", known, None)]
    life += [(5, "merged", known, None), (5, "grown", known + 1, classes[-1])]
    events = [dict(zip(gp.EVENT, (*row, None, None), strict=True)) for row in life]
    with warnings.catch_warnings(action="error"):
        ev.draw_curves(rows, classes, "curves.png")
        ev.draw_life(rows, events, classes, "life.png", range(n))
        ev.draw_embedding(unit_rows(3 * n, 8), y, classes, "embedding.png", "pca", known, n - 1)
        ev.draw_confusion(y.roll(1), y, classes, "confusion.png")
        ev.contact_sheet("none.png", [], "nothing")
        sheet = ev.mistake_rows(IMAGES[: 3 * n], (y + 1) % n, y / n, y, classes)
        ev.contact_sheet("sheet.png", sheet, "a title")
    assert dict(matplotlib.rcParams) == before
    assert re.fullmatch(r"(note: no installed font.*\n)?", capsys.readouterr().err)
    assert sum(np.asarray(Image.open(p).convert("L")).std() > 1 for p in tmp_path.glob("*.png")) == 6


def test_what_cannot_be_drawn(capsys):
    none, path = zeros(0), Path("none/c.png")
    assert not ev.attempt(ev.draw_confusion, none, none, ["a"], path)
    assert not ev.attempt(ev.contact_sheet, path, [], "")
    assert re.fullmatch(r"(warning: none.c\.png could not be drawn \(.*\)\n){2}", capsys.readouterr().err)
    assert (ev.project(zeros(40, 8)) == 0).all()
    assert ev.project(unit_rows(40, 8)).std() > 0


WRONG_RUNS = """nothing | nothing: no fin
some/three | summary.json
other torn | other: no fin
torn | torn: no fin
list | list: no fin
log.csv | log.csv: no fin
bad.csv | bad.csv: no f
list --out nowhere/figure.png | its folder is not there
list torn --compact small.pt | --compact: one at a time, of one run
list --predict list --name 2=blue | one at a time
list --out a --name 2=blue | --name and --out: one
~noone/run | home
big.csv | field larger
some/three --compact small.pt | checkpoint.pt
list --out bad.csv | a run's
list --compact runs.csv | is there
list --nme | unrecognized"""


def test_runs_are_compared(tmp_path, monkeypatch, capsys):
    def write(path, accuracy=0.5, kind="gradual", **changes):
        args = dict(curriculum=kind, seed=0, class_order=0, label_budget=0.1, lr=0.06, without=[])
        summary = dict(accuracy=accuracy, knn=0.75, labels_used=40)
        Path(path).mkdir(parents=True)
        Path(path, "args.json").write_text(json.dumps(args | changes))
        Path(path, "summary.json").write_text(json.dumps(summary))

    def told(*args):
        assert ev.main([*map(str, args), "--out", "~/out.png"]) == 0
        return capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write("runs/a", commit="abc")
    write("runs/b", 0.6, seed=1)
    write("runs/c", 0.7, lr=0.03, without=["discovery", "pruning"])
    write("runs/d", None, "semi", lr=0.03)
    table = told("runs", tmp_path / "runs/a")
    rows = r"\ngradual lr=0.06 +2 +55.0 ± 7.1 .*\ngradual lr=0.03 without=discovery,pruning +1 .* 75.0 "
    assert re.search(rows + r".*\nsemi +1 +- ", table.out)
    assert "gcd" not in table.out and Path("out.png").stat().st_size > 10_000
    record = [sys.executable, HERE / "benchmarks/record.py", *sorted(Path("runs").iterdir()), "runs.csv"]
    subprocess.run(record, check=True)
    assert told("runs.csv") == table and ",abc," in Path("runs.csv").read_text()
    assert [*ev.compare(["runs/a", "runs/d"])] == ["gradual", "semi"]
    for name in ("some/one", "some/two", "some/three", "torn", "other", "list"):
        write(name)
    Path("some/three/summary.json").unlink()
    out, err = told("some", "some/one")
    assert "gradual     2 " in out and "three: not a finished run, left out" in err
    assert "gradual: 2 runs repeat a seed" in err
    files = {"torn/args.json": "{", "other/args.json": '{"curriculum": "self"}', "list/args.json": "[]"}
    files |= {"log.csv": "epoch\n1\n", "bad.csv": "\xff\0", "big.csv": "a" * 2**18}
    for name, text in files.items():
        Path(name).write_text(text, "latin1")
    for row in WRONG_RUNS.splitlines():
        args, words = row.split(" | ")
        assert words in refused(capsys, ev.main, args.split())


def test_readme_snippets_run(answering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(answering[0].parent, "RUN")
    text, (h, y, labelled) = (HERE / "README.md").read_text("utf-8"), crowd(3, 60, 0, 2)
    here = dict(h=h, y=y, labelled=labelled, images=answering[1], x=answering[1] / 255, head=nn.Linear(16, 2))
    here |= dict.fromkeys(("z1", "z2", "train_h", "test_h"), h)
    here |= dict.fromkeys(("labels", "train_y", "test_y"), y) | {"optimizer": SGD(here["head"].parameters())}
    for snippet in re.findall("```python\n(.+?)```", text, re.S):
        exec(snippet, here)
    won = here["head"](h).argmax(1) == 2
    assert won[y == 0].float().mean() > 0.9 and won[y > 0].float().mean() < 0.05
    assert here["answers"]["answer"][::12] == ["red", "green", "unit 2"]
    for flags in re.findall(r"python train.py ([^`#\n]+)", text):
        assert train.make_parser().parse_args(flags.split())


# ---- train ----


FAST = "--dataset digits --image-size 8 --per-class 10 --batch-size 32 --embedding pca --epochs 4"
TINY = f"{FAST} --label-budget 0.2"
SCRIPT = [sys.executable, HERE / "train.py"]


def start(out, flags, draw=False):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(ev, "attempt", lambda *_: False)
        return train.main([*flags.split(), "--out", str(out)])


def json_of(run, name="summary"):
    return json.loads((run / f"{name}.json").read_text("utf-8"))


def saved_in(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def table(run):
    rows = csv.DictReader((run / "log.csv").read_text().splitlines())
    return [row | {"seconds": 0, "images_per_second": 0} for row in rows]


def end_of(run):
    apart = dict.fromkeys(("seconds", "images_per_second", "args", "rows"))
    ends = saved_in(run) | apart, json_of(run) | apart, table(run), (run / "events.csv").read_text()
    return [t.numpy().tobytes() if torch.is_tensor(t) else t for t in tree_leaves(ends)]


DRAWN = ("gradual", "self-known")
RUNS = {name: f"{TINY} --curriculum {name}" for name in curriculum.CURRICULA} | {
    "other seed": f"{TINY} --seed 1",
    "strict": f"{TINY} --epochs 6 --replay 2 --prune-units 0.4 --prune 0.5 --lr 0.1",
    "one image": f"{FAST} --per-class 1 --known-classes 1 --batch-size 2 --label-budget 1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, flags in RUNS.items():
        assert start(root / name, flags, name in DRAWN) == 0, name
    return root


@cases("name", curriculum.CURRICULA)
def test_every_curriculum_leaves_figures(runs, name):
    run, taught = runs / name, name not in ("self", "self-known")
    summary, flags = json_of(run), json_of(run, "args")
    assert {*"probe probe_leaked knn ari old_accuracy new_accuracy forgetting seconds".split()} <= {*summary}
    assert flags["model"] == "cnn" and {"commit", "machine"} <= {*flags} and len(table(run)) == 4
    assert (summary["accuracy"] is not None) == taught
    assert summary["labels_used"] == {"supervised": 100, "self": 0, "self-known": 0}.get(name, 20)
    spent = summary["label_epochs"]
    assert 0 < spent < 80 if name == "gradual" else spent == 4 * summary["labels_used"]
    assert abs(summary["sparsity"] - 0.8) < 0.01
    assert (summary["first_sight"] is not None) == (name == "gradual")
    assert ("gcd_all" in summary) == (taught and name != "supervised")
    assert ("calibration_error" in summary) == taught and summary.get("calibration_error", 0) < 0.5
    for picture in ["curves", "embedding"] + ["confusion", "concepts", "mistakes"] * taught:
        assert name not in DRAWN or (run / f"{picture}.png").stat().st_size > 5_000
    names = model.load(run).names
    assert sorted(filter(None, names)) == [*"0123456789"] * taught


def test_one_image_replay_and_another_seed(runs):
    one, strict = (json_of(runs / name) for name in ("one image", "strict"))
    assert one["labels_used"] == 10 and strict["labels_used"] == 20 and strict["sparsity"] >= 0.5
    widths = [w for w in model.compact(model.load(runs / "strict/checkpoint.pt")).encoder.config if w != "M"]
    assert sum(widths[:-1]) == 96 - round(0.4 * 96) and widths[-1] == 128
    rows = zip(table(runs / "gradual"), table(runs / "other seed"), strict=True)
    assert all(a != b for a, b in rows)


# Stopped in which epoch, by what (None: a loss), exit status, words.
STOPS = (
    (2, None, 2, "loss 'ntxent' of step 2 in epoch 2 is not finite; the checkpoint of epoch 1 is kept"),
    (3, KeyboardInterrupt(), 130, "stopped; go on with: python train.py --resume"),
    (4, RuntimeError("no memory"), 2, "no memory; go on with"),
    (4, OSError(28, "No space left on device"), 2, "No space left on device; go on with: python train.py"),
)


def test_a_stopped_run_ends_the_same(runs, tmp_path, capsys, monkeypatch):
    loss, write, calls, out = losses.nt_xent, data.write_atomically, [], tmp_path / "cut it"

    def not_a_number(*views, **options):
        calls.append(views)
        return loss(*views, **options) * (math.nan if len(calls) == 4 + 2 else 1)

    def stop(path, content, mark=""):
        if str(path).endswith(".pt") and len(content.args[0]["rows"]) == epoch:
            raise trouble
        write(path, content, mark)

    monkeypatch.setattr(losses, "nt_xent", not_a_number)
    monkeypatch.setattr(data, "write_atomically", stop)
    for epoch, trouble, status, words in STOPS:
        assert start(out, TINY if epoch == 2 else "--resume") == status
        message = capsys.readouterr().err.strip()
        assert words in message and "\n" not in message
        assert ("go on" in message) == (trouble is not None)
        assert len(saved_in(out)["rows"]) == epoch - 1 and not (out / "summary.json").exists()
    monkeypatch.undo()
    for _ in range(2):
        assert start(out, "--resume") == 0 and end_of(out) == end_of(runs / "gradual")
    assert contents(out).keys() == contents(runs / "other seed").keys()


def test_signals_end_as_ctrl_c(tmp_path):
    pipes, runs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        command = [*SCRIPT, *TINY.split(), "--epochs=999", f"--out={tmp_path / str(number)}"]
        heed = partial(signal.signal, number, signal.SIG_DFL)
        runs[number] = subprocess.Popen(command, preexec_fn=heed, **pipes)
    for number, run in runs.items():
        next(line for line in run.stdout if line.startswith("   1/999"))
        run.send_signal(number)
        message = run.communicate()[1].strip().splitlines()[-1]
        assert run.returncode == 130 and message.startswith("train.py: stopped; go on with: python train.py")
        assert saved_in(tmp_path / str(number))["rows"]


def test_an_infinite_weight_is_named():
    network = model.build("cnn", 3)
    network.head.weight.data[1, 2] = math.inf
    with pytest.raises(FloatingPointError, match="'head.weight' in epoch 1 is not finite; there is no"):
        train.check_finite(zeros(5, 4), network, 0)


BAD_VALUES = f"""
--curriculum gradul | error: --curriculum: invalid choice: 'gradul'
--dataset folder:nowhere | nowhere/train is not there
--model vgg-smal | did you mean 'vgg-small'
--label-budget 1.5 | --label-budget: must be float in 0.0..1.0, not '1.5'
--per-class 4 | no label of 4
--prune-units 0.5 --model resnet18 | whole filters can be pruned in a plain chain
--lr 0 | --lr: must be float in 1e-6..1e3
--epochs 2.5 | --epochs: must be int in 1.., not '2.5'
--image-size 20 | multiple of 8
--never-named 10 | must fit the 10 classes
--late 3,x, | --late: ['', 'x'] must be new classes
--late 3 --known-classes 9 | --late decides --known-classes
--device warp | --device 'warp' cannot be used
--inject digits:3 | a class '3' is there already
--from nowhere | nowhere
--seed 1 --see 2 | unrecognized arguments: --see 2
--out {"x" * 300} | File name too long
--out /proc/run | /proc/run
--out . | is not an empty folder
--out mine.txt | is not an empty folder
--from x --known-classes 9 | --late decides
"""


def test_bad_values(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("kept")
    for flags, words in (line.split(" | ") for line in BAD_VALUES.strip().splitlines()):
        assert words in refused(capsys, train.main, ["--dataset", "digits", "--out", "run", *flags.split()])
        assert [p.read_text() for p in tmp_path.iterdir()] == ["kept"]


def test_one_of_two_runs_gets_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))
    args = Namespace(out=None, dataset="digits", curriculum="self", seed=0)
    made = [train.claim_folder(args, {"torch": "2"}) for _ in range(2)]
    args.out, second = made
    assert made == ["runs/digits-self-s0", "runs/digits-self-s0-2"]
    assert json.loads(Path(second, "args.json").read_text()) == vars(args) | {"torch": "2", "out": second}
    rejects("is not an empty folder", train.claim_folder, args, {})


def test_what_cannot_be_resumed(runs, capsys, tmp_path):
    run, resume = runs / "gradual", ["--resume", tmp_path / "run"]
    saved, flipped = saved_in(run), bytearray((run / "checkpoint.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    old, other = {"version": 1}, {"fingerprint": saved["fingerprint"] | {"images": "0"}}
    for name, content, flags, words in (
        ("checkpoint.pt", bytes(flipped), [], "checkpoint.pt is damaged (the checksum of"),
        ("checkpoint.pt", partial(torch.save, saved | old), [], "has version 1"),
        ("checkpoint.pt", partial(torch.save, saved | other), [], "digits has other images or labels"),
        *(("args.json", content, [], "holds no run") for content in (b'{"lr": 0.', b"[]", b"{}")),
        ("note", b"", ["--resume=nowhere"], "nowhere holds no run"),
        ("note", b"", ["--lr=0.5"], "--resume takes --lr from the run; drop the flag"),
        ("note", b"", ["--out=x"], "--resume takes --out from the run"),
    ):
        out = shutil.copytree(run, resume[1], dirs_exist_ok=True)
        data.write_atomically(out / name, content)
        before = contents(out)
        assert words in refused(capsys, train.main, [*resume, *flags])
        assert contents(out) == before


def test_several_runs_go_on(capsys, tmp_path):
    flags = f"{TINY} --curriculum labels-only --seeds 2 --seed 3 --epochs 2 --batch-size 999 --lr 0.02"
    assert start(tmp_path, flags) == 0 and "labels-only     2" in capsys.readouterr().out
    before, second = contents(tmp_path), tmp_path / "labels-only-s4"
    assert json_of(second, "args")["class_order"] == 1
    (second / "checkpoint.pt").unlink()
    bad = ("", "s3 is not an empty"), (" --resume --lr 1", "takes --lr from"), (" --resume no", "holds none")
    for more, words in (*bad, (" --resume", "is not there")):
        assert start(tmp_path, flags + more) == 2 and words in capsys.readouterr().err
    shutil.rmtree(second)
    assert train.main(["--resume", str(tmp_path), "--out=x"]) == 2
    assert train.main(["--resume", str(tmp_path)]) == 0 and before.keys() <= contents(tmp_path).keys()
    assert json_of(second, "args")["lr"] == 0.02


def bars(root, classes, unlabelled=0):
    """Noisy bars, by class: a folder, as a flag."""
    files, generator = {f"unlabelled/{i}.png": i % 4 for i in range(unlabelled)}, seeded()
    for c, name in enumerate(classes.split()):
        files |= {f"{'train' if i < 8 else 'test'}/{name}/{i}.png": c for i in range(12)}
    for path, c in files.items():
        image = randint(0, 90, (32, 32, 3), dtype=torch.uint8, generator=generator)
        image[:, 3 * c : 3 * c + 3] += 150
        (root / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(root / "set" / path)
    return f"--dataset=folder:{root}/set"


OWN = "--embedding pca --epochs 3 --min-steps 2"
SMALL = f"{OWN} --model cnn --image-size 16"


@cases("name", curriculum.CURRICULA)
def test_curricula_use_unlabelled_images(tmp_path, name, capsys, monkeypatch):
    views, seen = augment.two_views, []
    monkeypatch.setattr(augment, "two_views", lambda *a: seen.append(a[1][0]) or views(*a))
    folder, out = bars(tmp_path, "ant bee cat", unlabelled=20), tmp_path / "run"
    assert start(out, f"{folder} {SMALL} --curriculum {name}") == 0
    told, labels = capsys.readouterr().out, json_of(out)["labels_used"]
    assert "3 epochs of 2 steps, 6 in all, of 44 images, all there are" in told
    assert "unlabelled: 20 images" in told and labels == (0 if "self" in name else 24)
    assert seen[0] == [0.2, 0.5][name == "supervised"]
    assert seen[-1] == [0.2, 0.5][name in "gradual semi supervised"]


def test_class_flags_and_moved_data(tmp_path, capsys, monkeypatch):
    flags, out = f"{bars(tmp_path, 'ant bee cat dog')} {SMALL} --epochs 5", tmp_path / "run"
    flags += " --per-class 6 --inject digits:3 --late bee --never-named 1 --label-budget 0.5"
    assert start(out, flags) == 0 and "late: bee, 3" in capsys.readouterr().out
    assert json_of(out)["labels_used"] == 4 * 3
    assert {*filter(None, saved_in(out)["names"])} == {"ant", "bee", "cat", "dog"}
    moved = (tmp_path / "set").rename(tmp_path / "moved")
    flags = f"--resume --dataset folder:{moved}"
    assert start(out, flags) == 0
    for split in ("train", "test"):
        (moved / split / "cat").rename(moved / split / "cow")
    again = [*flags.split(), "--out", out]
    assert "other classes (cat, cow)" in refused(capsys, train.main, again)
    shutil.rmtree(moved / "train/cow")
    assert "class 'cow' has no training image" in refused(capsys, train.main, again)
    flags, held = "--dataset digits --validate --known-classes 2 --never-named 1 --per-class 20", out / "b"
    monkeypatch.setattr(gp, "threshold", lambda *_: 9.0)
    assert start(held, f"{flags} {SMALL}") == 0
    saved = saved_in(held)
    assert {"accuracy_2", "accuracy_6"} & {*saved["rows"][-1]} == {"accuracy_6"}
    assert saved["answering"]["limit"] < 2 and saved["rows"][-1]["open_accuracy"] > 0.3


# Curriculum, classes.
NEXT = "supervised ant bee,self bee elk,gradual ant bee cat dog,semi bee elk"
NEXT += ",gradual ant cat,gradual elk,gradual dog elk"


def test_an_earlier_run_goes_on(tmp_path, capsys):
    earlier, folder = tmp_path / "earlier", bars(tmp_path, "ant bee cat")
    assert start(tmp_path / "infant", f"{folder} {SMALL} --curriculum self") == 0
    assert start(earlier, f"{folder} {SMALL} --label-budget 0.5") == 0
    before = contents(earlier)
    for case in NEXT.split(","):
        (name, classes), root = case.split(maxsplit=1), tmp_path / case.replace(" ", "-")
        known = {"ant", "bee", "cat"} if name != "supervised" else set()
        out, source = root / "run", earlier if known else tmp_path / "infant"
        flags = f"{bars(root, classes)} {OWN} --from {source} --curriculum {name}"
        assert start(out, f"{flags} --epochs 5 --label-budget 0.5") == 0
        taught, old = classes.split() if name != "self" else [], classes[0] in "abc"
        assert {*filter(None, saved_in(out)["names"])} == {*known, *taught}
        assert (json_of(out)["old_accuracy_before"] is not None) == bool(old and known)
        first, *_, last = saved_in(out)["rows"]
        assert (first["labels"] > 0) == (old and name != "self") and first["sparsity"] > 0.7
        assert (last["loss_propagation"] is not None) == ("ant bee cat" in classes)
        assert "--from decides --model" in refused(capsys, train.main, [*flags.split(), "--model=cnn"])
    assert contents(earlier) == before
    earlier.rename(out / "in")
    assert start(out, "--resume") == 0


def test_a_failing_log_or_figure_warns(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def draw_curves(*_):
        raise RuntimeError(f"summary: {(out / 'summary.json').exists()}")

    monkeypatch.setattr(data, "write_table", lambda *_: "log.csv was not written")
    monkeypatch.setattr(ev, "draw_curves", draw_curves)
    assert start(out, f"{TINY} --curriculum self --epochs 2", draw=True) == 0
    assert len(saved_in(out)["rows"]) == 2
    log, figure = capsys.readouterr().err.splitlines()
    assert log == "log.csv was not written" and "drawn (RuntimeError: summary: True)" in figure


def test_any_name_terminal_backend_and_home(tmp_path):
    folder = bars(tmp_path, f"猫$a$_ -x,y\u0301 _{'z' * 100}")
    command = [*SCRIPT, folder, *f"{SMALL} --curriculum semi --out ~/r".split()]
    around = dict(PYTHONIOENCODING="cp1252", MPLBACKEND="module://none", HOME=tmp_path, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=os.environ | around, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert {"curves.png", "mistakes.png"} <= {*os.listdir(tmp_path / "r")}
    assert "猫$a$_" in (tmp_path / "r/log.csv").read_text("utf-8")


def taught_by(x):
    y = arange(len(x), device=x.device) % 10
    every, kind = y >= 0, dict(flip=True, color=True, scale=(0.2, 1.0))
    dataset = data.Dataset(x, y, x, y, [*"0123456789"], (0.5,) * 3, (0.25,) * 3, **kind)
    mix = dict.fromkeys(train.TERMS, 1.0)
    return dataset, train.Targets(mix, every, x.new_zeros(10), y, y, every.float(), y.repeat(3, 1))


@cases("device", ["cpu", "cuda"])
def test_a_step_never_waits_for_the_device(device, monkeypatch):
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    with FakeTensorMode(), torch.device(device):
        dataset, targets = taught_by(zeros(300, 3, 32, 32, dtype=torch.uint8))
        network, ema = (model.build("vgg-small", 10) for _ in range(2))
        optimizer = SGD(network.parameters())
        masks = {name: w > -9 for name, w in network.encoder.named_parameters() if w.ndim > 1}
        state = Namespace(network=network, ema=ema, optimizer=optimizer, bf16=device == "cpu", masks=masks)
        state.bank = losses.MemoryBank(300, 128, device=device)
        state.head = Namespace(units=gp.Units(range(10), device=device))
        terms = train.train_step(state, dataset, targets, 0.9, None, 0, arange(32))
        assert terms.shape == (len(train.TERMS),)
        with pytest.raises(DataDependentOutputException):
            terms[0].item()


@needs_a_gpu
def test_a_run_changes_the_device(tmp_path, monkeypatch):
    write, out = data.write_atomically, tmp_path / "run"

    def stop(path, content, mark=""):
        write(path, content, mark)
        if str(path).endswith(".pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_atomically", stop)
    flags = TINY
    for device in ("cpu", "cuda", "cpu"):
        assert start(out, f"{flags} --device {device}") == 130
        flags = "--resume"
    monkeypatch.undo()
    assert start(out, "--resume --device cuda") == 0 and len(table(out)) == 4


@needs_a_gpu
def test_a_captured_step_is_the_step():
    n, device, ends = 12_100, torch.device("cuda"), []
    x = randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    dataset, targets = taught_by(x.to(device))
    for captured in (False, True):
        state = train.State(Namespace(seed=0, model="cnn", lr=0.01, image_size=32), dataset, 10)
        state.bf16, coins, heard = False, torch.Generator(device).manual_seed(3), []
        state.bank.update(arange(n, device=device), randn(n, 128, device=device, generator=coins))
        state.masks = gp.prune_smallest(state.network.encoder, 0.5)
        functions = [partial(train.train_step, state, dataset, targets, 0.9, coins, turn) for turn in (0, 1)]
        if captured:
            functions = model.capture(functions, state.optimizer, coins)
        order = (targets.active, targets.active, 64, 12, 0.5, seeded(2))
        for step, index in enumerate(data.batches(*order)):
            model.set_learning_rate(state.optimizer, 0.01 if step < 10 else 0.0)
            heard.append(functions[step % 2](index).clone())
            if step == 9:
                held = state.network.encoder[0].weight.detach().clone()
        assert equal(held, state.network.encoder[0].weight)
        utility = state.head.units.utility
        ends.append((stack(heard), held, state.bank.rows, state.ema.head.weight.detach(), utility))
    for plain, other in zip(*ends, strict=True):
        assert_close(plain, other, rtol=1e-2, atol=1e-3)

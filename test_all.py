"""The facts that the code must satisfy: `python -m pytest test_all.py`.

Formulas are checked against naive loops in float64, torchvision and scikit-learn; the command line by running
it.
"""

import copy
import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import parametrizations  # noqa: F401, used in tables
from torch.nn.utils import prune as torch_prune  # noqa: F401
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torchvision.models import VisionTransformer

import augment
import curriculum
import data
import evaluate
import grow_prune
import grow_prune as gp
import losses
import model
import train
from grow_prune import FREE, UNKNOWN, UNNAMED

# ---- augment, model, losses, curriculum ----
HERE = Path(__file__).parent
any_example = settings(max_examples=40, deadline=None, derandomize=True)
seeds, fractions = st.integers(0, 2**31 - 1), st.floats(0, 1)
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rows(n, d, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


def filled_bank(n, d):
    bank = losses.MemoryBank(n, d)
    bank.update(torch.arange(n), unit_rows(n, d))
    return bank


def fails(error):
    def function(*_):
        raise error

    return function


def make_folder(root, classes=("ant", "bee"), per_class=3, splits=("train", "test")):
    modes = "RGB L RGBA P CMYK 1 LA I;16".split()
    for n, (split, c, i) in enumerate(itertools.product(splits, classes, range(per_class))):
        pixels = np.random.default_rng(n).integers(0, 256, (20 + 7 * i, 50 - 5 * i, 3), dtype=np.uint8)
        mode = modes[n % len(modes)]
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 if mode == "I;16" else pixels)
        (root / split / c).mkdir(parents=True, exist_ok=True)
        ending = "tiff" if mode == "CMYK" else "png"
        (image if mode == "I;16" else image.convert(mode)).save(root / split / c / f"{i}.{ending}")
    return root


def refused(capsys, main, args):
    """The one line with which `main` refuses these arguments."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    message = capsys.readouterr().err
    assert message.split()[1] == "error:" and len(message.splitlines()) == 1
    return message


WRONG = """
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
kind: nt_xent(z, z, kind=y) | nt_xent(z, z, kind=half)
temperature: nt_xent(z, z, 0) | nt_xent(z, z, math.nan) | local(z, index, bank, ys, 3, -0.1)
reduction: nt_xent(z, z, 1, "avg") | local(z, index, bank, ys, 3, 1, "SUM") | supervised(z, z, None, None)
momentum: MemoryBank(4, 4, 1.1)
z: bank.update(index, z[:, :4]) | near(z[:, :5], index, bank, some, 3) | local(z[:0], index[:0], bank, ys)
index: bank.update(index - 1, z) | bank.update(index[:4], z)
index: near(z, index + 16, bank, some, 3) | local(z, -index, bank, ys, found)
active: near(z, index, bank, some[:3], 3) | supervised(z, z, some)
k: near(z, index, bank, some, 0) | local(z, index, bank, ys, 0) | kmeans(rows, 0)
background: local(z, index, bank, ys, (found[0][:3], found[1]))
x: kmeans(rows[:0], 2) | clusterings(rows, some & False, 2)
labels: votes(rows, y - 2, some) | votes(rows, y, some, balance=torch.ones(3))
units: one_hot(y, 3)
logits: supervised(z[:0], z[:0])
confidence: propagation(half, half, index)
gradual: stage("grad", 0, 1, 10)
budget: stage("semi", 0, 1, 10, 7, math.nan)
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_wrong_arguments_are_named_in_one_line(line):
    word, calls = line.split(": ", 1)
    x, half, z, rows = torch.rand(2, 3, 8, 8), torch.rand(5), unit_rows(5, 8), unit_rows(20, 8)
    index, y, bank, cnn = torch.arange(5), torch.arange(20) % 4, filled_bank(20, 8), model.build("cnn", 2)
    some, ys, local = y > 0, y[None], losses.local_aggregation
    near, votes = losses.neighbours, losses.propagate_labels
    found = near(z, index, bank, some, 3)
    names = {**vars(augment), **vars(model), **vars(losses), **vars(curriculum), **locals()}
    for call in calls.split(" | "):
        with pytest.raises(ValueError, match=r"(?<!\w)" + re.escape(word) + r"[^\n]*$"):
            eval(call, names)


@pytest.fixture(scope="module")
def pictures():
    """Noise, smooth images, greys, black and white: [24,3,32,32]."""
    noise, small, grey = (torch.rand(8, c, s, s, generator=seeded()) for c, s in ((3, 32), (3, 4), (1, 32)))
    smooth = F.interpolate(small, (32, 32), mode="bicubic").clamp(0, 1)
    grey[6:] = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    return torch.cat([noise, smooth, grey.expand(-1, 3, -1, -1)])


def test_images_change_as_in_torchvision(pictures):
    near, n, grey = partial(assert_close, atol=1e-4, rtol=0), len(pictures), augment.random_grayscale
    for name in ("brightness", "contrast", "saturation", "hue"):
        ours, theirs = (getattr(module, f"adjust_{name}") for module in (augment, TF))
        factor = torch.linspace(-0.5, 0.5, n) if name == "hue" else torch.linspace(0, 2, n)
        expected = [theirs(*pair) for pair in zip(pictures, factor, strict=True)]
        near(ours(pictures, factor), torch.stack(expected))
    sides = torch.randint(1, 33, (2, n), generator=seeded(3))
    boxes = torch.cat([(torch.rand(2, n, generator=seeded(5)) * (33 - sides)).long(), sides])
    crops = zip(pictures, boxes.T.tolist(), strict=True)
    expected = torch.stack([TF.resized_crop(x, *box, [32, 32], antialias=True) for x, box in crops])
    near(augment.resized_crop(pictures, *boxes), expected)
    assert_close(grey(pictures, 1.0), TF.rgb_to_grayscale(pictures, 3), atol=1e-5, rtol=0)
    assert torch.equal(grey(pictures, 0.0), pictures)
    assert torch.equal(augment.horizontal_flip(pictures, 1.0), TF.hflip(pictures))
    ours = augment.color_jitter(pictures, (1.3, 1.3), (0.7, 0.7), (1.2, 1.2), (0.08, 0.08), p=1.0)
    theirs = TF.adjust_contrast(TF.adjust_brightness(pictures, 1.3), 0.7)
    near(ours, TF.adjust_hue(TF.adjust_saturation(theirs, 1.2), 0.08))


def test_pad_crop_shifts_by_whole_pixels(pictures):
    x, shifts = pictures[:8].repeat(16, 1, 1, 1), set()
    for before, after in zip(x, augment.pad_crop(x, 2, seeded()), strict=True):
        padded, corners = F.pad(before, (2,) * 4), itertools.product(range(5), repeat=2)
        places = [(i, j) for i, j in corners if torch.equal(after, padded[:, i : i + 32, j : j + 32])]
        shifts.add(places[0])
    assert len(shifts) > 15  # of 25, in 128 draws


def test_each_image_is_transformed_as_the_generator_says(pictures):
    same = (255 * pictures[:1]).byte().repeat(64, 1, 1, 1)
    for transform in (augment.random_resized_crop, augment.color_jitter, augment.pad_crop, augment.strong):
        inputs = ((same, 1), (same / 255, 1), (same, 2))
        out, again, other = (transform(x, generator=seeded(seed)) for x, seed in inputs)
        assert len(out.unique(dim=0)) > 40 and out.min() >= 0 and out.max() <= 1 + 1e-6
        assert torch.equal(out, again) and not torch.equal(out, other)
    a, b = augment.two_views(same, generator=seeded(1))
    assert torch.equal(a, out) and b.shape == a.shape and not torch.equal(a, b)
    assert torch.equal(augment.weak(same, flip=False, padding=0), same / 255)


def test_crop_area_and_aspect_are_those_of_torchvision():
    from torchvision.transforms import RandomResizedCrop

    ramp = torch.arange(32.0).expand(4000, 1, 32, 32)  # a crop of width w has slope w / 32
    x = torch.cat([ramp, ramp.mT, ramp], 1)
    out = augment.random_resized_crop(x, generator=seeded())
    sides = 4 * torch.stack([out[:, 1, 20, 9] - out[:, 1, 12, 9], out[:, 0, 9, 20] - out[:, 0, 9, 12]], 1)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(x[0], [0.2, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(4000)]
    facts = [torch.cat([t.mean(0), t.std(0)]) for t in (sides.round(), torch.tensor(theirs).float())]
    assert_close(*facts, atol=0.4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", ["4 3 32 32", "2 3 1 1", "2 1 1 9", "3 3 20 48", "0 3 8 8"])
def test_images_of_any_shape_layout_and_dtype_are_augmented(shape, dtype):
    plain = torch.rand(*map(int, shape.split()), generator=seeded()).to(dtype)
    layouts = [plain, plain[:1].expand(plain.shape) if len(plain) else plain]
    layouts += [plain.contiguous(memory_format=torch.channels_last), plain.mT.contiguous().mT]
    views = "random_grayscale strong weak adjust_brightness adjust_contrast adjust_saturation adjust_hue"
    for x, view in itertools.product(layouts, views.split()):
        x = x.detach().requires_grad_()
        args = [torch.linspace(0, 0.5, len(x))] if view.startswith("adjust") else []
        run = partial(getattr(augment, view), x, *args)
        torch.manual_seed(0)
        out = run()
        assert out.shape == x.shape and out.dtype == torch.float32
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(out, run())


@pytest.mark.parametrize("name, dim", [("cnn", 128), ("vgg16", 512), ("mobilenet_v2", 1280)])
def test_what_models_give(name, dim):
    network = model.build(name, 7)
    h, z, logits = network(torch.rand(4, 3, 32, 32))
    assert h.shape == (4, dim) and z.shape == (4, 128) and logits.shape == (4, 7)
    assert_close(z.norm(dim=1), torch.ones(4))
    cosine = F.cosine_similarity(h[:, None], network.head.weight[None], dim=2)
    assert_close(logits, network.head.scale * cosine)
    if name == "vgg16":  # configuration D
        assert round((sum(p.numel() for p in network.encoder.parameters()) + 512 * 10) / 1e6, 1) == 14.7


@pytest.mark.parametrize("name", ["cnn", "vgg11", [8, "M", 8], "mobilenet_v3_small", "squeezenet1_1"])
def test_any_encoder_is_packed_and_loaded(name, tmp_path):
    network, path = model.build(name, 3, 16, mean=(0.1, 0.2, 0.3), image_size=40).eval(), tmp_path / "net.pt"
    network.names, network.answering = ["a", None, "猫"], {"limit": 0.5, "h": torch.ones(2, 4).half()}
    before, x = torch.get_rng_state(), torch.rand(2, 3, 40, 40, generator=seeded())
    for extra in ({}, {"names": ["a"], "answering": None, "version": 9, "bank": 0}):  # as in a checkpoint
        packed = model.pack(network) | extra
        torch.save(packed, path)
        other = model.load(path)
        assert torch.equal(before, torch.get_rng_state()) and not other.training
        assert (other.names, other.spec, other.image_size) == (packed["names"], name, 40)
        assert (other.answering or {}).get("limit") == (None if extra else 0.5)
        assert all(torch.equal(a, b) for a, b in zip(network(x), other(x), strict=True))


def test_what_is_no_network_is_refused(tmp_path):
    path, packed = tmp_path / "net.pt", model.pack(model.build("cnn", 2))
    torch.save(packed, path)
    good = path.read_bytes()
    spoilt = [{"head.weight": torch.zeros(3, 4)}, packed | {"ema": {}}, packed | {"args": {"model": "cnn"}}]
    one_bit = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
    for content in (b"not a network", good[: len(good) // 2], one_bit, *spoilt):
        torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.pt: not a network[^\n]*$"):
            model.load(path)


@pytest.mark.parametrize("size, patch", [(8, 1), (56, 7), (128, 16), (136, 17), (224, 16)])
def test_encoders_take_images_of_their_size(size, patch):
    for name in ("cnn", "vgg11", "resnet18"):
        network = model.build(name, 2, image_size=size).eval()
        assert network.image_size == size and network(torch.rand(2, 3, size, size))[0].isfinite().all()
    stem, small = network.encoder.conv1, size < 128
    assert (stem.stride, stem.kernel_size) == (((1, 1), (3, 3)) if small else ((2, 2), (7, 7)))
    assert isinstance(network.encoder.maxpool, nn.Identity) == small
    encoder = VisionTransformer(max(16, size // 16 * 16), 16, 1, 2, 8, 8)
    model.adapt_stem(encoder, size)
    assert encoder.conv_proj.kernel_size == (patch, patch)
    assert encoder(torch.rand(1, 3, size, size)).shape == (1, 1000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_images_of_other_dtypes(dtype):
    network, x = model.build("cnn", 3).eval(), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    expected, other, half = network(x / 255), copy.deepcopy(network).to(dtype), (x / 255).to(dtype)
    for ours in (network(x), network(half), other(x / 255), other(x)):
        assert ours[1].dtype == ours[2].dtype == torch.float32
        for a, b in zip(ours, expected, strict=True):
            assert_close(a.float(), b, atol=0.1, rtol=0.1)
    assert model.compact(other).encoder[0].weight.dtype == dtype


def same_gradients(ours, expected, *leaves):
    assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), leaves) for loss in (ours, expected)]
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["a", "abcdefg", "abac", "a-a-b-"])
def test_nt_xent_is_its_definition(kind):
    n, names, tau = len(kind), 2 * kind, 0.2
    z1, z2 = torch.randn(2, n, 5, generator=seeded(), dtype=torch.float64).requires_grad_()
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    expected = []
    for i in range(2 * n):
        e, pair = torch.exp(z @ z[i] / tau), (i + n) % (2 * n)
        others = [j for j in range(2 * n) if j not in (i, pair) and (names[i] == "-" or names[j] != names[i])]
        expected.append(torch.log((e[pair] + e[others].sum()) / e[pair]))
    number = torch.tensor([-1 - i if k == "-" else ord(k) for i, k in enumerate(kind)])
    same_gradients(losses.nt_xent(z1, z2, tau, "none", number), torch.stack(expected), z1, z2)
    assert len(set(kind)) < n or losses.nt_xent(z1, z2, tau) == losses.nt_xent(z1, z2, tau, kind=number)
    assert losses.nt_xent(z1, z1, 0.001).isfinite()


def test_supervised_is_cross_entropy_over_the_active_units():
    logits = torch.randn(6, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    onehot = losses.one_hot(torch.tensor([0, 3, -1, 1, 3, 4]), 5)  # one without a class, one not active
    active = torch.tensor([True, True, False, True, False])
    expected = F.cross_entropy(logits[[0, 1, 3, 4]][:, active], torch.tensor([0, 2, 1, 2]))
    same_gradients(losses.supervised(logits, onehot, active), expected, logits)
    same_gradients(losses.supervised(logits, 0 * onehot, active), 0 * logits.sum(), logits)


def test_memory_bank_moves_by_its_momentum():
    bank, before, z = losses.MemoryBank(5, 3, momentum=0.75), unit_rows(5, 3), unit_rows(3, 3, 1)
    bank.update(torch.arange(5), 7 * before)
    assert_close(bank.rows, before)  # nothing is left of the zeros
    kept = bank.rows[[0, 2, 3]]
    bank.update(torch.tensor([1, 4, 1]), z)
    assert torch.equal(bank.rows[[0, 2, 3]], kept)
    for i, mean in ((4, z[1]), (1, (z[0] + z[2]) / 2)):  # an image that occurs twice
        before[i] = F.normalize(0.75 * before[i] + 0.25 * mean, dim=0)
    assert_close(bank.rows, before)


@pytest.mark.parametrize("n, k, true", [(300, 5, 5), (2000, 100, 40), (10_000, 100, 100)])
def test_kmeans_is_as_good_as_scikit_learns(n, k, true):
    from sklearn.cluster import KMeans

    place = torch.randint(true, (n,), generator=seeded())
    x = F.normalize(unit_rows(true, 16, 3)[place] + 0.15 * torch.randn(n, 16, generator=seeded(1)), dim=1)
    reference = KMeans(k, n_init=1, random_state=0).fit(x.numpy()).inertia_
    for seed in range(3):
        index, centres = losses.kmeans(x, k, generator=seeded(seed))
        assert (x - centres[index]).square().sum() <= (1.03 if n >= 10_000 else 1.12) * reference
        assert (torch.cdist(x, centres).argmin(1) == index).float().mean() > 0.999
    assert torch.equal(index, losses.kmeans(x, k, generator=seeded(seed))[0])


def test_kmeans_of_fewer_rows_than_clusters():
    index, centres = losses.kmeans(unit_rows(3, 4), 10)
    assert sorted(index.tolist()) == [0, 1, 2] and len(centres) == 3
    for rows in (torch.zeros(90, 4), unit_rows(2, 4).repeat(45, 1)):
        for iterations in (0, 1, 10):
            same, centres = losses.kmeans(rows, 4, iterations)
            assert centres.isfinite().all() and len(same) == 90 and centres.shape == (4, 4)
            assert len(same.unique()) <= len(rows.unique(dim=0))


def naive_aggregation(z, index, rows, clusters, k, tau):
    values = []
    for v, i in zip(z, index.tolist(), strict=True):
        e = torch.exp(rows @ v / tau)
        others = [j for j in range(len(rows)) if j != i and (clusters[:, j] >= 0).any()]
        near = sorted(others, key=lambda j: -e[j].item())[:k]
        close = [j for j in near if (clusters[:, j] == clusters[:, i]).any()] or near[:1]
        values.append(torch.log(e[near].sum() / e[close].sum()) if near else 0 * v.sum())
    return torch.stack(values)


@pytest.mark.parametrize("n, b, k, repeats", [(1, 1, 4, 1), (6, 3, 20, 2), (40, 8, 10, 3), (90, 33, 25, 3)])
def test_local_aggregation_is_its_definition(n, b, k, repeats):
    rows = unit_rows(n, 8, 1, torch.float64)
    if n > 10:
        rows[3] = rows[5]  # a duplicate image
    clusters = torch.randint(4, (repeats, n), generator=seeded(2))
    clusters[:, n // 2 :: 5] = -1 if n > 6 else 0  # images that are not there yet
    there = (clusters >= 0).any(0)
    index = there.nonzero()[torch.randint(int(there.sum()), (b,), generator=seeded(3)), 0]  # images repeat
    z, bank = unit_rows(b, 8, 4, torch.float64).requires_grad_(), losses.MemoryBank(n, 8)
    bank.rows = rows.float()
    for background in (k, losses.neighbours(z, index, bank, there, k)):
        ours = losses.local_aggregation(z, index, bank, clusters, background, 0.2, "none")
        same_gradients(ours, naive_aggregation(z, index, rows, clusters, k, 0.2), z)


def test_of_a_large_bank_rows_take_turns():
    bank, z, index, number = filled_bank(70, 8), unit_rows(12, 8, 2), torch.arange(12), torch.arange(70)
    active = number % 5 != 0
    for turn in range(5):
        there = active & (number % 4 == turn % 4) & (number != index[:, None])
        expected, near = (z @ bank.rows.T).masked_fill(~there, -2).topk(5)
        ours = losses.neighbours(z, index, bank, active, 5, 4, turn)
        assert_close(ours, (near, expected))
    assert (losses.neighbours(z, index, bank, active, 18, 4)[0] == -1).any()  # there are fewer active ones


def naive_votes(rows, y, labelled, k, density_k, tau, balance):
    e, known, votes = torch.exp(rows @ rows.T / tau), labelled.nonzero()[:, 0], torch.zeros(len(rows), 5)
    density = (e - e.diag().diag()).sort(descending=True).values[:, :density_k].sum(1)
    for i, j in itertools.product(range(len(rows)), known):
        if (e[i, known] > e[i, j]).sum() < k:
            share = (y[known] == y[j]).sum() if balance else 1
            votes[i, y[j]] += e[i, j] / (density[j] or 1) / share
    return F.normalize(votes, p=1, dim=1)


@pytest.mark.parametrize("n, count, k", [(5, 0, 10), (5, 1, 10), (30, 4, 10), (80, 80, 3), (1, 1, 2)])
def test_propagated_labels_are_those_of_the_equations(n, count, k):
    rows = unit_rows(n, 6, 5, torch.float64)
    y = torch.randint(3, (n,), generator=seeded(6)) * 2  # no image of class 1 or 3
    labelled = torch.randperm(n, generator=seeded(7)) < count
    for balance in (False, True, torch.tensor([2, 1, 1, 0, 3])):
        votes = naive_votes(rows, y, labelled, k, 20, 0.1, balance is not False)
        if torch.is_tensor(balance) and count:
            votes = losses.align(votes, balance)
        share, expected = votes.max(1)
        share, expected = share.masked_fill(labelled, 1), torch.where(labelled, y, expected if count else -1)
        pseudo, confidence = losses.propagate_labels(rows.float(), y, labelled, k, 20, 0.1, balance)
        assert torch.equal(pseudo, expected)
        assert_close(confidence, share, atol=1e-4, rtol=1e-4)


def test_aligned_votes_come_as_often_as_expected():
    votes = torch.rand(500, 4, generator=seeded()) * torch.tensor([1, 5, 1, 2])
    votes, due = F.normalize(votes, p=1, dim=1), torch.tensor([2.0, 1.0, 1.0, 0.0])
    even, kept = losses.align(votes, due, rounds=100), votes[:, 3].mean()
    assert_close(even.mean(0), (1 - kept) * due / 4 + kept * (due == 0), atol=1e-4, rtol=0)
    odds = (even / votes) / (even / votes)[:, :1]  # one factor a class
    assert_close(odds, odds[:1].expand_as(odds), rtol=1e-4, atol=1e-4)
    assert not losses.align(votes * (due > 0), torch.ones(4)).isnan().any()  # nobody votes for the last


def everything(x):
    """What losses, bank, k-means and votes make of x [200,16], and the gradients of the losses."""
    index, y, found, gradients = torch.arange(200), torch.arange(200) % 5, [], []
    bank, first = losses.MemoryBank(200, 16), index[:9]
    bank.update(index, x)
    z, other, logits = leaves = [part.clone().requires_grad_() for part in (x[:9], x[9:18], x[18:27, :5])]
    for loss in (
        partial(losses.nt_xent, z, other, 0.2, kind=y[:9]),
        partial(losses.local_aggregation, z, first, bank, y[None], 10, 0.1),
        partial(losses.supervised, logits, losses.one_hot(y[:9], 5).to(x.dtype), y[:5] < 5),
        partial(losses.propagation, *(leaf[:, 0] for leaf in leaves)),
    ):
        mean, total, each = (loss(reduction=r) for r in ("mean", "sum", "none"))
        assert_close((mean, total), (each.mean(), each.sum()))
        gradients += torch.autograd.grad(mean, leaves, materialize_grads=True)
        found += [mean, total, each]
    a, b, c = (leaf[:, 0].float() for leaf in leaves)
    assert_close(each, c * (a + b))
    found += losses.neighbours(x[:9], first, bank, y < 3, 7)
    found += losses.propagate_labels(x, y, y > 2, balance=torch.tensor([1, 2, 3, 0, 1]))
    return [bank.rows, *found, *losses.kmeans(x, 4, generator=seeded())], gradients


def test_neither_autocast_nor_dtype_nor_chunks_change_results(monkeypatch):
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        x = unit_rows(200, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            ours, gradients = everything(x)
        expected = everything(x.float())
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, expected[0], strict=True))
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(gradients, expected[1], strict=True))
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 200 * 3)
    assert_close(everything(x), expected)


@pytest.mark.parametrize("name", curriculum.CURRICULA)
@any_example
@given(st.data(), st.integers(1, 120), st.integers(2, 60), fractions, fractions)
def test_schedules_are_monotone_and_bounded(name, draw, epochs, num_classes, budget, sparsity):
    known = draw.draw(st.integers(1, num_classes))
    stages = [curriculum.stage(name, e, epochs, num_classes, known, budget, sparsity) for e in range(epochs)]
    for before, after in zip(stages, stages[1:], strict=False):
        for field in ("classes", "named", "label_fraction", "sparsity"):
            assert getattr(before, field) <= getattr(after, field)
    most = known if name == "self-known" else num_classes
    labels = {"self": 0, "self-known": 0, "supervised": 1}.get(name, budget)
    for s in stages:
        assert (1 if name != "gradual" else known) <= s.classes <= most and 0 <= s.named <= s.classes
        assert 0 <= s.sparsity <= sparsity and 0 <= s.label_fraction <= labels
        assert all(0 <= w <= 1 for w in (*s.mix.values(), s.labelled_share))
        assert set(s.mix) == {"ntxent", "aggregation", "propagation", "supervised"}
    if epochs > 1:
        last = stages[-1]
        assert (last.classes, last.named) == (most, 0 if name in ("self", "self-known") else num_classes)
        assert (last.label_fraction, last.sparsity) == pytest.approx((labels, sparsity))


def test_gradual_tells_its_story():
    stages = [curriculum.stage("gradual", e, 30, 10) for e in range(30)]
    assert stages[0].classes == 7 and stages[0].label_fraction == 0 and stages[0].mix["ntxent"] == 1
    assert math.isclose(stages[-1].label_fraction, 0.1)
    for c in (8, 9, 10):  # one by one, images before labels
        images, names = ([getattr(s, f) >= c for s in stages].index(True) for f in ("classes", "named"))
        assert stages[images].classes == c and names >= images + 2


def test_the_help_of_the_curricula_draws_nothing(capsys):
    with pytest.raises(SystemExit):
        curriculum.main(["--help"])
    told = capsys.readouterr().out
    assert "usage" in told and "ntxent" not in told


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_dead_filters_can_be_removed(share, tmp_path):
    torch.manual_seed(0)
    network, x = model.build("vgg-small", 4), torch.rand(16, 3, 32, 32)
    network(x)  # statistics that are not the initial ones
    for module in network.encoder:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    masks = grow_prune.prune_filters(network.encoder, share)
    small = model.compact(network.eval())
    widths = [m.out_channels for m in small.encoder if isinstance(m, nn.Conv2d)]
    alive = [int(mask.sum()) for name, mask in masks.items() if name.endswith("bias")]
    assert widths == [*alive, 256] and min(widths) >= 1 and sum(alive) == max(7, 704 - round(share * 704))
    torch.save(model.pack(small), tmp_path / "small.pt")
    for other in (small, model.load(tmp_path / "small.pt")):
        assert_close(network(x), other(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="plain chain"):
        grow_prune.prune_filters(network, share)


def test_batch_norm_is_recomputed_and_running_means_follow():
    network, x = model.build("cnn", 2), torch.randint(256, (600, 3, 32, 32), generator=seeded()).byte()
    first, before = network.encoder[1], copy.deepcopy(network.state_dict())
    network.encoder[4].eval()
    with pytest.raises(ValueError):
        model.recompute_batchnorm(network, x[:, :1])
    model.recompute_batchnorm(network, x[:1])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    model.recompute_batchnorm(network, x)
    assert network.training and not network.encoder[4].training and first.momentum == 0.1
    seen = [network.encoder[0]((part / 255 - network.mean) / network.std) for part in x.chunk(2)]
    for ours, statistic in ((first.running_mean, torch.mean), (first.running_var, torch.var)):
        expected = sum(statistic(part.detach(), (0, 2, 3)) for part in seen) / 2
        assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    ema, fast = model.build("cnn", 2), network.state_dict()
    slow = copy.deepcopy(ema.state_dict())
    model.update_ema(ema, network, 0.75)
    for key in [key for key, value in slow.items() if value.is_floating_point()]:
        assert_close(ema.state_dict()[key], 0.75 * slow[key] + 0.25 * fast[key])


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v3_small", "vit_b_32"])
def test_the_weights_that_decay_are_those_that_may_be_pruned(name):
    network = model.build(name, 3)
    optimizer = model.configure_optimizer(network, 0.1)
    model.set_learning_rate(optimizer, 0.03)
    decays, rests = optimizer.param_groups
    prunable = [w for name, w in grow_prune.prunable(network).items() if not name.startswith("head.")]
    assert set(decays["params"]) == set(prunable)
    assert {*decays["params"], *rests["params"]} == set(network.parameters())
    assert [(g["weight_decay"], g["lr"]) for g in optimizer.param_groups] == [(5e-4, 0.03), (0.0, 0.03)]


@needs_a_gpu
def test_captured_steps_do_what_the_steps_do():
    n, device = 2000, torch.device("cuda")
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=seeded()).to(device)
    y, order = torch.arange(n, device=device) % 10, torch.randperm(n, generator=seeded(2)).to(device)

    def learn(captured):
        torch.manual_seed(0)
        network, bank = model.build("cnn", 10).to(device), losses.MemoryBank(n, 128, device=device)
        bank.rows, ema, heard = unit_rows(n, 128).to(device), copy.deepcopy(network), []
        optimizer, coins = model.configure_optimizer(network, 0.01), torch.Generator(device).manual_seed(3)

        def step(turn, index):
            _, z, logits = network(augment.strong(x[index], generator=coins))
            found = losses.neighbours(z, index, bank, y >= 0, 16, 2, turn)
            loss = losses.local_aggregation(z, index, bank, y[None], found)
            loss = loss + losses.supervised(logits, losses.one_hot(y[index], 10))
            loss = loss + losses.nt_xent(z, z.flip(0), kind=index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_ema(ema, network, 0.9)
            bank.update(index, z.detach())
            return loss.detach()

        steps = [partial(step, turn) for turn in (0, 1)]
        steps = model.capture(steps, optimizer, coins) if captured else steps
        for i in range(12):
            if i == 10:
                model.set_learning_rate(optimizer, 0.0)
                held = network.encoder[0].weight.detach().clone()
            heard.append(steps[i % 2](order[64 * i : 64 * i + 64]).clone())
        assert torch.equal(held, network.encoder[0].weight)  # nothing is learned at a rate of 0
        return torch.stack(heard), held, bank.rows, ema.head.weight.detach()

    assert_close(learn(True), learn(False), rtol=1e-2, atol=1e-3)


# ---- data ----
REAL = Path(__file__).parent / "data"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", fails(urllib.error.URLError("no network")))


sizes = st.lists(st.integers(0, 60), min_size=1, max_size=8)


@any_example
@given(sizes, st.integers(0, 9), st.lists(fractions, max_size=5), st.sets(st.integers(0, 7)), seeds)
def test_labels_leak_nested_stratified_and_exactly(sizes, free, some_fractions, classes, seed):
    assume(sum(sizes))
    y = torch.arange(-1, len(sizes)).repeat_interleave(torch.tensor([free, *sizes]))
    y = y[torch.randperm(len(y), generator=seeded())]
    order = data.leak_order(y, seed)
    assert (order[y < 0] == len(y)).all()
    for c, size in enumerate(sizes):
        assert sorted(order[y == c].tolist()) == list(range(size))
    before = torch.zeros(len(y), dtype=torch.bool)
    for fraction in sorted([0.0, *some_fractions, 1.0]):
        mask = data.label_mask(order, y, fraction, sorted(classes))
        assert mask[before].all() and not mask[y < 0].any()
        exact = [int(size * fraction + 0.5) * (c in classes) for c, size in enumerate(sizes)]
        assert [int((mask & (y == c)).sum()) for c in range(len(sizes))] == exact
        before = mask
    assert torch.equal(order, data.leak_order(y, seed))
    assert sum(sizes) < 50 or not torch.equal(order, data.leak_order(y, seed + 1))


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan])
def test_fractions_are_refused_outside_their_range(fraction):
    with pytest.raises(ValueError, match="0..1"):
        data.label_mask(torch.arange(3), torch.zeros(3, dtype=torch.long), fraction, [0])


def test_batches_cover_the_pool_and_draw_their_share_of_labels():
    active, labelled = torch.arange(100) < 80, torch.arange(100) % 10 == 0
    drawn = torch.stack(list(data.batches(active, labelled, 16, 5, 0.25, seeded())))
    assert drawn.shape == (5, 16) and (drawn < 80).all() and labelled[drawn[:, :4]].all()
    everything = torch.stack(list(data.batches(active, labelled & False, 16, 5, 0.25, seeded())))
    assert sorted(everything.flatten().tolist()) == list(range(80))


def test_images_without_a_label_are_always_there_and_taught_classes_stay_taught():
    y = torch.cat([torch.arange(4).repeat_interleave(20), torch.full((5,), -1)])
    stages = [curriculum.Stage("", n, 2, 0.5, {}, 0.5, 0.0) for n in (2, 3, 4)]
    earlier = torch.arange(4) == 3
    for pool in data.pools(stages, y, data.leak_order(y, 0), 4, 2, replay=3, taught=earlier):
        assert pool.active[y < 0].all() and not pool.labelled[y < 0].any()
        assert pool.taught.tolist() == [True, True, False, True] and pool.taught_before[3]


def test_digits_are_there_and_may_not_be_flipped():
    d = data.load_dataset("digits")
    assert d.train_x.shape == (1347, 3, 32, 32) and d.train_x.dtype == torch.uint8
    assert (
        d.train_y.dtype == torch.int64 and len(d.test_y) == 450 and d.classes == [str(i) for i in range(10)]
    )
    assert not d.flip and not d.color and data.load_dataset("digits", image_size=8).test_x.shape[2:] == (8, 8)
    x = d.train_x.double() / 255
    np.testing.assert_allclose(d.mean, x.mean((0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(d.std, x.std((0, 2, 3), correction=0), atol=1e-9)


def test_folder_of_any_size_and_mode_and_its_cache(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set", per_class=4)
    first = data.load_dataset(f"folder:{root}")
    assert first.train_x.shape == (8, 3, 32, 32) and first.train_y.tolist() == [0] * 4 + [1] * 4
    assert first.train_x.flatten(1).float().std(1).min() > 5  # no mode came out flat
    assert data.load_dataset(f"folder:{root}", image_size=16).test_x.shape == (8, 3, 16, 16)
    moved = shutil.copytree(root, tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_image", lambda name: pytest.fail("the cache was not used"))
        again = data.load_dataset(f"folder:{moved}/")
    assert data.fingerprint(again) == data.fingerprint(first) and again.notes == first.notes
    for other in (replace(first, train_x=first.train_x ^ 1), replace(first, test_y=1 - first.test_y)):
        assert data.fingerprint(other)["images"] != data.fingerprint(first)["images"]
    Image.new("RGB", (40, 40), (255, 0, 0)).save(root / "train/ant/0.png")
    changed = data.load_dataset(f"folder:{root}").train_x
    assert not torch.equal(changed, first.train_x) and changed[0, 0].min() == 255
    (root / ".cache-32.pt").write_bytes(b"torn")
    assert torch.equal(data.load_dataset(f"folder:{root}").train_x, changed)
    (root / ".cache-32.pt").unlink()
    monkeypatch.setattr(os, "fsync", fails(OSError(28, "No space left on device")))
    assert torch.equal(data.load_dataset(f"folder:{root}").train_x, changed)
    assert sorted(os.listdir(root)) == [".cache-16.pt", "test", "train"]  # no half of a cache is left behind


def alter(root, commands):
    for n, (verb, *names) in enumerate(command.split() for command in commands.split(";") if command):
        first, last = (root / name for name in (names[0], names[1 if verb in ("mv", "cp", "ln") else 0]))
        for path in (first, last):
            path.parent.mkdir(parents=True, exist_ok=True)
        if verb == "add":  # a picture of random pixels: add NAME [HEIGHT WIDTH]
            shape = [int(name) for name in names[1:] or (32, 32)]
            pixels = np.random.default_rng(len(commands) + n).integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(first)
        elif verb == "text":
            first.write_text("none")
        elif verb == "rm":
            shutil.rmtree(first) if first.is_dir() else first.unlink()
        else:
            {"mv": os.rename, "cp": shutil.copy, "ln": lambda a, b: a.symlink_to(b)}[verb](first, last)


USUAL = ";".join(
    f"add {split}/{c}/{i}.png" for c in ("ant", "bee") for split in ("train", "test") for i in "012"
)
# What is done to this folder (ANT: train/ant); if not 3 3 0 6, how many images of ant, bee, no label and test
# are used; and words of the notes, or after ! of the line with which it is refused.
FOLDERS = {
    "": "train: 6 images (ant 3, bee 3)",
    "add unlabelled/x.png": "3 3 1 6 unlabelled: 1 images",
    "add unlabeled/a/b/x.png": "3 3 1 6 unlabelled: 1 images",
    "mv test val": "test: 6 images (ant 3, bee 3)",
    "mv test validation": "test: 6 images",
    "add val/ant/x.png": "beside train: 1: val",
    "rm test": "2 2 0 2 test, a tenth of each class held out of train: 2 images",
    "add test/cat/x.png": "3 3 0 7 only in test, never trained: 1: cat",
    "mv ANT/0.png ANT/a/b/0.png": "ant 3",
    "add train/x.png": "in no class folder: 1: train/x.png",
    "text ANT/a.txt": "not an image that Pillow opens: 1: ANT/a.txt",
    "text ANT/a.png": "unreadable: 1: ANT/a.png (not a readable image)",
    ";".join(f"text ANT/{i}.gif" for i in range(14)): "unreadable: 14: ANT/0.gif",
    "mv ANT/0.png ANT/0": "ant 3",
    "mv ANT/0.png ANT/0.JPG": "ant 3",
    "add ANT/.x.png": "hidden or a link back up: 1: ANT/.x.png",
    "add ANT/.ipynb_checkpoints/0.png": "back up: 1: ANT/.ipynb_checkpoints",
    "add train/cat/0.png;rm train/cat/0.png": "empty: 1: train/cat",
    "ln ANT/up train": "back up: 1: ANT/up",
    "ln train/up .": "back up: 1: train/up",
    "add unlabelled/a/x.png;add unlabelled/b/y.png;ln unlabelled/a/c unlabelled/b": "3 3 2 6 unlabelled/a/c",
    "ln ANT/x.png test/bee/1.png": "4 3 0 6 in train and in test, used in both: 1: ANT/x.png",
    "ln ANT/x.png nowhere": "unreadable: 1: ANT/x.png ([Errno 2] No such file",
    "ln ANT/x.png /dev/null": "unreadable: 1: ANT/x.png (not a file)",
    "cp test/bee/1.png ANT/x.png": "4 3 0 6 used in both: 1: ANT/x.png",
    "add unlabelled/x.png;cp test/bee/1.png unlabelled/y.png": "3 3 2 6 used in both: 1: unlabelled/y.png",
    "add ANT/x.png 64 600": "4 3 0 6 600x64 -> 32x32: the middle (1)",
    "add ANT/x.png 64 64": "4 3 0 6 64x64 -> 32x32: shrunk (1)",
    "add ANT/x.png 1 1": "4 3 0 6 1x1 -> 32x32: enlarged (1)",
    "add ANT/x.png 300 200": "ANT/x.png (Image size (60000 pixels) exceeds limit",
    "add ANT/x.png 300 400": "ANT/x.png (Image size (120000 pixels) exceeds limit",
    "rm train": "!train is not there, but test; a folder data set is PATH/train/<class>/*",
    "rm train;text train": "!train is not there, but test, train; a folder",
    "mv ANT ant;rm train": "!train is not there, but ant, test; a folder",
    "rm train;rm test;add a.png": "!train is not there, but a.png; a folder",
    "rm train/bee;rm test/bee": "!at least two classes with images are needed, not ['ant']",
    "rm test/ant": "!class 'ant' must be in both train and test, but is not in test",
    "rm test/ant;text test/ant/.x": "!class 'ant' must be in both",
    "text ANT/0.png;text ANT/1.png;text ANT/2.png": "!class 'ant' has no readable image in train: ANT/0",
    "rm test;rm ANT/0.png;rm ANT/1.png": "!class 'ant' has one image and needs two",
}


@pytest.mark.parametrize("commands, told", FOLDERS.items())
def test_folders_are_used_and_told_or_refused_in_one_line(tmp_path, monkeypatch, commands, told):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    commands, told = (text.replace("ANT", "train/ant") for text in (commands, told))
    alter(tmp_path, USUAL)
    alter(tmp_path, commands)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if told[0] == "!":
            with pytest.raises(ValueError) as error:
                data.load_dataset(f"folder:{tmp_path}")
            assert told[1:] in str(error.value) and str(error.value).isprintable()
            return
        d = data.load_dataset(f"folder:{tmp_path}")
    counts, words = (told[:7], told[8:]) if told[0].isdigit() else ("3 3 0 6", told)
    y = d.train_y.tolist()
    assert counts == f"{y.count(0)} {y.count(1)} {y.count(-1)} {len(d.test_y)}" and len(d.train_x) == len(y)
    assert words in "; ".join(d.notes) and "; ".join(d.notes).isprintable()


def test_a_class_may_have_any_name_and_a_path_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["$a$", "_a", "猫", "a, b", "c" * 120, "d\ne", "z", os.fsdecode(b"\xff")]
    make_folder(tmp_path / "set", names, per_class=1)
    d = data.load_dataset("folder:~/set")
    assert sorted(d.classes) == sorted([*names[:-1], "\\udcff"]) and "d\\ne 1" in d.notes[0]
    base = data.load_dataset("digits", image_size=24)
    assert data.inject(base, "folder:~/set:a, b").train_x.shape == (1348, 3, 24, 24)
    for name, near in {str(tmp_path): f"folder:{tmp_path}", "minst": "mnist"}.items():
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            data.load_dataset(name)


def test_the_held_out_tenth_depends_on_neither_the_size_nor_other_images(tmp_path):
    alter(tmp_path, ";".join(f"add train/{c}/{i:02}.png" for c in ("ant", "bee") for i in range(24)))
    held = {x.numpy().tobytes() for x in data.load_dataset(f"folder:{tmp_path}").test_x}
    alter(tmp_path, "add train/ant/x.png;add unlabelled/x.png")
    assert len(held & {x.numpy().tobytes() for x in data.load_dataset(f"folder:{tmp_path}").test_x}) >= 3
    assert data.load_dataset(f"folder:{tmp_path}", image_size=8).test_y.tolist() == [0, 0, 1, 1]


ramp = np.tile(np.arange(32), (32, 1))
grey = (ramp * 8 + ramp // 4).astype(np.uint8)
alpha, white = np.dstack([grey] * 3 + [(ramp > 15) * 255]).astype(np.uint8), np.where(ramp < 16, 255, grey)
turned = Image.Exif()
turned[0x112] = 3
# An image, the ending and options it is saved with, the grey that is read, and by how much that may differ.
PIXELS = {
    **{kind: (grey, kind, {}, grey, 0) for kind in ("png", "bmp", "ppm", "gif", "tga", "jp2")},
    "webp": (grey, "webp", {"lossless": True}, grey, 0),
    **{kind: (grey, kind, {"quality": 100}, grey, 6) for kind in ("avif", "jfif")},
    "turned": (grey * np.uint16(257), "png", {"exif": turned}, grey[:, ::-1], 0),
    "frames": (grey, "gif", {"save_all": True, "append_images": [Image.new("L", (32, 32))]}, grey, 0),
    "RGBA": (alpha, "png", {}, white, 0),
    "LA": (Image.fromarray(alpha).convert("LA"), "png", {}, white, 0),
    **{
        kind: (grey, kind, {"transparency": 72}, np.where(grey == 72, 255, grey), 0)
        for kind in ("png ", "gif ")
    },
    "cmyk": (Image.fromarray(grey).convert("CMYK"), "tiff", {}, grey, 0),
    "1 bit": (ramp > 15, "png", {}, (ramp > 15) * 255, 0),
    "12 in 16 bits": (grey * np.uint16(16), "tiff", {}, grey, 0),
    "32 bits": (ramp.astype(np.int32) * 60_000_000, "tiff", {}, ramp * 255 / 31, 1),
    "negative": (ramp.astype(np.int32) - 9, "tiff", {}, ramp * 255 / 31, 1),
    "0..1": (grey.astype(np.float32) / 255, "tiff", {}, grey, 0),
    "0..255": (grey.astype(np.float32), "tiff", {}, grey, 0),
    "any float": (ramp.astype(np.float32) * 1000 - 9, "tiff", {}, ramp * 255 / 31, 1),
    "not a number": (np.where(ramp, grey, np.nan).astype(np.float32), "tiff", {}, grey, 9),
}


@pytest.mark.parametrize("image, ending, options, expected, tolerance", PIXELS.values(), ids=PIXELS)
def test_pixels_are_right_in_every_format(tmp_path, image, ending, options, expected, tolerance):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = tmp_path / f"a.{ending.strip()}"
    image.save(file, **options)
    x, errors, notes = data.read_images([file], 32)
    assert errors == [None] and not notes and np.abs(x[0].numpy() - expected.astype(float)).max() <= tolerance


def test_images_to_answer_are_found_and_read_in_order(tmp_path):
    alter(tmp_path, "add b/2.png 40 30;add b/.h/0.png;text b/torn.png;add a/1.png")
    files = data.find_images([tmp_path / "b", str(tmp_path / "a/1.png"), tmp_path / "no.png"])
    assert [file.name for file in files] == ["2.png", "torn.png", "1.png", "no.png"]
    x, errors, notes = data.read_images(files, 24, "reading")
    assert [str(error)[:10] for error in errors] == ["None", "not a read", "None", "[Errno 2] "]
    with Image.open(files[0]) as image:
        expected = ImageOps.fit(image, (24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(x[0].permute(1, 2, 0), expected) and not x[[1, 3]].any()
    assert notes == ["30x40 -> 24x24: the middle (1), 32x32 -> 24x24: shrunk (1)"]


def test_inject_appends_late_classes(tmp_path):
    root = make_folder(tmp_path / "set", ("ant", "bee", "cat"))
    alter(root, "add unlabelled/x.png")
    base = data.load_dataset("digits")
    d = data.inject(base, f"folder:{root}:cat,ant")
    assert d.classes[10:] == ["cat", "ant"] and len(d.train_y) == 1347 + 6 and (d.train_y == 11).sum() == 3
    assert (d.train_y >= 0).all() and data.class_order(12, 5, late=2)[10:] == [10, 11]
    for names, words in {"bees": "did you mean 'bee'", "ant,ant": "a class 'ant' is there already"}.items():
        with pytest.raises(ValueError, match=words):
            data.inject(base, f"folder:{root}:{names}")


def test_held_out_images_are_training_images_and_no_longer_among_them():
    d = data.load_dataset("digits")
    h = data.hold_out(d, 0.1)
    assert torch.equal(h.test_x, data.hold_out(d, 0.1).test_x) and len(h.train_y) + len(h.test_y) == 1347
    assert ((h.test_y.bincount() / d.train_y.bincount() - 0.1).abs() < 0.01).all()
    pairs = ((d.train_x, d.train_y), (h.train_x, h.train_y), (h.test_x, h.test_y))
    a, b, c = ({(x.numpy().tobytes(), int(y)) for x, y in zip(*pair, strict=True)} for pair in pairs)
    assert b | c == a and not b & c


def test_subset_and_reorder_keep_images_without_a_label():
    d = data.load_dataset("digits")
    d = replace(d, train_y=d.train_y.masked_fill(torch.arange(1347) % 9 == 0, -1))
    assert (data.hold_out(d).train_y < 0).sum() == 150 and (data.hold_out(d).test_y >= 0).all()
    d = data.class_subset(d, 30, seed=0)
    assert (d.train_y + 1).bincount().tolist() == [150] + [30] * 10
    order = data.class_order(10, seed=1)
    r = data.reorder(d, order)
    assert r.classes == [str(c) for c in order] and sorted(order) == list(range(10))
    assert [r.classes[i] for i in r.test_y.tolist()] == [d.classes[i] for i in d.test_y.tolist()]
    assert torch.equal(r.train_y < 0, d.train_y < 0)


REAL_DATA = [("cifar10", 50, "airplane"), ("cifar100", 50, "apple"), ("mnist", 60, "0")]


@pytest.mark.parametrize("name, count, first", REAL_DATA)
def test_real_data_where_they_are(name, count, first):
    if not (REAL / data.ARCHIVES[name]).exists() and not (REAL / name / "train").exists():
        pytest.skip(f"{name} is not in {REAL.name}/")
    d = data.load_dataset(name, REAL, download=False)
    assert d.train_x.shape == (count * 1000, 3, 32, 32) and len(d.test_y) == 10_000
    assert d.classes[0] == first and d.flip == (name != "mnist")
    if name == "cifar10":
        np.testing.assert_allclose(d.mean, (0.4914, 0.4822, 0.4465), atol=1e-4)
        np.testing.assert_allclose(d.std, (0.2470, 0.2435, 0.2616), atol=1e-4)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_a_failed_download_leaves_no_empty_folders(tmp_path, offline, name):
    with pytest.raises(ValueError, match="is not there and could not be downloaded"):
        data.load_dataset(name, tmp_path / "a/data")
    assert not any(tmp_path.iterdir())


def test_files_are_written_whole_in_utf8_or_not_at_all(tmp_path, monkeypatch):
    name, rows = os.fsdecode(b"\xff.png"), [{"a": 1 / 3, "b": None}, {"a": "猫", "c": 2}]
    assert data.write_table(tmp_path / "a.csv", [{"a": name}, *rows]) is None
    assert (tmp_path / "a.csv").read_text("utf-8") == "a,b,c\n\\udcff.png,,\n0.333333,,\n猫,,2\n"
    data.write_json(tmp_path / "a.json", {"猫": name})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"猫": name}
    data.write_csv(tmp_path / "a.csv", [], ["a", "b"])
    monkeypatch.setattr(os, "replace", fails(PermissionError(13, "Permission denied")))
    assert "a.csv was not written (Permission denied)" in data.write_table(tmp_path / "a.csv", rows)
    monkeypatch.setattr(os, "fsync", fails(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        data.write_table(tmp_path / "a.csv", rows)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json"] and (tmp_path / "a.csv").read_text() == "a,b\n"


def test_checkpoints_are_read_or_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="a.pt is not there"):
        data.read_checkpoint(tmp_path / "a.pt", 3)
    data.write_atomically(tmp_path / "a.pt", partial(torch.save, {"version": 3}))
    assert data.read_checkpoint(tmp_path / "a.pt", 3) == {"version": 3}
    with pytest.raises(ValueError, match="has version 3, this program writes 4"):
        data.read_checkpoint(tmp_path / "a.pt", 4)
    data.write_atomically(tmp_path / "a.pt", b"torn")
    with pytest.raises(ValueError, match="a.pt is damaged"):
        data.read_checkpoint(tmp_path / "a.pt", 3)


# ---- the head: growing, naming, discovery; pruning ----
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("kind", [partial(nn.Linear, bias=False), model.CosineHead])
def test_other_rows_and_their_next_updates_are_left_alone(make, kind):
    heads, y = [], torch.arange(15) % 5
    for changes in (False, True):
        torch.manual_seed(0)
        head = kind(6, 5)
        optimizer = make(head.parameters())
        for seed in range(5):
            if seed == 1 and changes:
                before = copy.deepcopy(head.state_dict())
                gp.recycle_unit(head, optimizer, 4)
                gp.grow_head(head, optimizer, 2)
                for name, p in head.named_parameters():  # unit 4 has forgotten everything
                    state = [v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.ndim]
                    assert state and not any(v[4:].any() or not v[:4].any() for v in (*state, p.grad))
                    assert torch.equal(p[:4], before[name][:4]) and not torch.equal(p[4], before[name][4])
            optimizer.zero_grad()
            use = 4 if seed else 5  # later, unit 4 and what comes after it take no part
            h = torch.randn(15, 6, generator=seeded(seed))[y < use]
            F.cross_entropy(head(h)[:, :use], y[y < use]).backward()
            optimizer.step()
        heads.append(head)
    for plain, changed in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert_close(changed[:4], plain[:4], rtol=1e-6, atol=1e-7)


def test_what_hangs_on_a_parameter_survives_growth():
    head, tied, seen, h = nn.Linear(4, 3), nn.Linear(4, 3), [], torch.ones(2, 4)
    weight = tied.weight = head.weight
    weight.mark = "kept"
    weight.register_hook(lambda grad: seen.append(grad.shape))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    head.bias.requires_grad_(False)
    optimizer = SGD([{"params": [weight], "lr": 0.5}, {"params": [head.bias]}])
    alive = head(h).sum()  # a graph that outlives the growth
    head(h).sum().backward()
    grad = weight.grad.clone()
    gp.grow_head(head, optimizer, 2)
    assert head.weight is weight is tied.weight is optimizer.param_groups[0]["params"][0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1] and weight.mark == "kept"
    assert alive.requires_grad and weight.requires_grad and not head.bias.requires_grad
    head(h).sum().backward()
    assert seen[2:] == [(5, 4), (5, 4)] and torch.equal(weight.grad, torch.cat([2 * grad, grad[:2]]))
    optimizer.step()


def test_a_wrapped_head_is_changed_inside():
    inner = nn.Linear(4, 3)
    inner.sigma = nn.Parameter(torch.ones(1))  # has no row for each unit
    head, h = torch.compile(nn.DataParallel(inner), backend="eager"), torch.randn(5, 4, generator=seeded())
    before = head(h).detach()
    gp.grow_head(head, None, 2)
    gp.recycle_unit(head, None, 0)
    gp.imprint(head, 4, h[:1], h[1:])
    assert_close(head(h)[:, 1:3], before[:, 1:])
    assert head(h).shape == (5, 5) == (5, inner.out_features) and not torch.equal(head(h)[:, 0], before[:, 0])


def trained(make):
    head = nn.Linear(4, 3)
    head(torch.ones(1, 4)).sum().backward()
    head.optimizer = make(head.parameters())
    head.optimizer.step(lambda: 0.0)
    return head


TWO, ROW, SOME, WRONG = torch.eye(2), torch.ones(1, 2), torch.tensor([True, False]), []
TABLE = """\
nn.Linear(2, 3)
 grow_head(head, None, 0)
 imprint(head, 3, ROW)
 imprint(head, 0, ROW[:0])
 imprint(head, 0, ROW, torch.ones(4, 3))
 imprint(head, 0, ROW, TWO, 1.5)
 imprint(head, 0, ROW, TWO, 0.1, SOME)
 prune_smallest(head, 1.1)
 prune_smallest(head, math.nan)
 prune(head, 0.5, 0.5, {})
 prune(head, 0.5, 0.0, {"weight": torch.ones(4, 2)})
 apply_masks(head, {"weight": torch.zeros(3, 2), "x": ROW})
 claim(TWO, TWO, torch.tensor([0, 1]))
 claim(TWO, ROW, SOME)
 threshold(TWO, torch.tensor([1, 1]))
nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
 prune_filters(head, 0.5)
parametrizations.weight_norm(nn.Linear(2, 3)) | nn.LazyLinear(3)
 prune_smallest(head, 0.5)
parametrizations.weight_norm(nn.Linear(2, 3)) | nn.LazyLinear(3) | nn.DataParallel(nn.Bilinear(2, 2, 3)) \
| torch_prune.l1_unstructured(nn.Linear(2, 3), "bias", 1)
 grow_head(head, None)
 recycle_unit(head, None, 0)
 imprint(head, 0, ROW)
trained(torch.optim.Adafactor) | trained(torch.optim.LBFGS) | trained(torch.optim.Rprop)
 grow_head(head, head.optimizer)
 recycle_unit(head, head.optimizer, 0)"""
for line in TABLE.splitlines():
    if line[0] != " ":
        makes = line.split(" | ")
    else:
        WRONG += [(make, line.strip()) for make in makes]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, call", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(make, call):
    head = eval(make)
    before = str(vars(head))
    with pytest.raises(ValueError) as error:
        eval("gp." + call)
    assert "\n" not in str(error.value) and str(vars(head)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_arithmetic_stays_in_float32(dtype):
    h, y, named = crowd(3, 40, 0, 2)

    def values(x):
        near = gp.claim(x, x, named), gp.threshold(x, named), gp.resemblance(x, y)
        return *near, gp.two_means(x)[0], gp.discriminant(x[0], x[40:], y[40:])

    expected = values(h.to(dtype).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(values(h.to(dtype)), expected)
    head, units = nn.Linear(16, 3).to(dtype), gp.Units(range(4))
    gp.grow_head(head, None)
    gp.recycle_unit(head, None, 0)
    gp.imprint(head, 3, h[y == 2], h[y < 2])
    assert head.weight.dtype == dtype and (head(h[y < 2].to(dtype)).argmax(1) == 3).float().mean() < 0.05
    units.observe(torch.full((2, 4), 0.25, dtype=dtype))
    assert int(gp.prune_smallest(head, 0.5)["weight"].sum()) == 32 == int((head.weight != 0).sum())


def test_an_imprinted_unit_leaves_the_others_what_is_theirs():
    torch.manual_seed(0)
    h, others = torch.randn(5, 8) + 1, torch.randn(200, 8) + 1
    for head, *rest in ((nn.Linear(8, 4, bias=False), others), (model.CosineHead(8, 4),)):
        gp.imprint(head, 3, h, *rest)  # at first, the mean direction
        mean = F.normalize(F.normalize(h, dim=1).mean(0), dim=0) * head.weight[:3].norm(dim=1).mean()
        assert_close(head.weight[3], mean)
    for tolerance in (0.0, 0.02, 0.5, 1.0):
        gp.imprint(head, 3, h, others, tolerance)
        assert (head(others).argmax(1) == 3).float().mean() <= tolerance + 1 / 200 and not head.bias[:3].any()
    gp.imprint(head, 3, h, others, 0.02, torch.arange(4) == 0)  # the others do not answer
    assert 0 < (head(others)[:, 3] > head(others)[:, 0]).float().mean() <= 0.02


def test_the_discriminant_is_that_of_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    own, kind, spread = torch.linspace(-1, 1, 12), torch.arange(90) % 4, torch.linspace(0.2, 3, 12)
    others = torch.randn(90, 12, generator=seeded()) * spread + kind[:, None]
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.8).fit(others.double().numpy(), kind)
    direction = np.linalg.solve(reference.covariance_, (own - others.mean(0)).double().numpy())
    np.testing.assert_allclose(gp.discriminant(own, others, kind), direction, rtol=1e-4, atol=1e-5)
    assert gp.discriminant(own, others[:1], kind[:1]).isfinite().all()  # one image has no covariance


def test_units_are_recycled_first_and_never_taken_from_a_name():
    head, units = model.CosineHead(5, 2), gp.Units([7, 4])
    assert units.redundant() is None and units.allocate(head, None, UNNAMED) == (2, "grown")
    assert units.of_classes(9).tolist() == [-1, -1, -1, -1, 1, -1, -1, 0, -1] and head.out_features == 3
    assert units.in_use(torch.arange(9) == 4).tolist() == [False, True, True]
    for _ in range(600):
        units.observe(torch.tensor([[0.5, 0.5, 0.0]]))
    assert_close(units.utility, torch.tensor([0.5, 0.5, 0.0]), atol=0.01, rtol=0)
    assert units.redundant() is None  # too young
    units.age[2], units.given[2] = units.mature, "wolf"
    assert units.redundant() is None  # a person has named it
    units.given.clear()
    assert units.allocate(head, None, 3) == (2, "recycled") and (units.owner, units.age[2]) == ([7, 4, 3], 0)
    units.age, units.utility = [9] * 3, torch.zeros(3)
    assert units.redundant() is None  # all have a class


actions = st.sampled_from("step recycle grow prune filters".split())


@any_example
@given(st.lists(st.tuples(actions, fractions), max_size=12), seeds)
def test_growth_recycling_and_pruning_in_any_order(todo, seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.Flatten()
    net = nn.Sequential(*layers, model.CosineHead(5, 2))
    head, units, masks, share = net[5], gp.Units([0, 1]), {}, {"prune": 0.0, "filters": 0.0}
    optimizer = SGD(net.parameters())
    for action, value in todo:
        rows = head.weight.detach().clone()
        if action == "step":  # its momentum moves what was pruned
            optimizer.zero_grad()
            F.cross_entropy(net(torch.randn(4, 3, 3, 3)), torch.arange(4) % len(rows)).backward()
            optimizer.step()
        elif action in share:
            share[action] = max(share[action], value)
            before, masks = masks, gp.prune(net, share["prune"], share["filters"], masks)
            assert not any((masks[name][: len(m)] & ~m).any() for name, m in before.items())
            weights = 256 + 5 * len(rows)
            assert round(gp.sparsity_of(net) * weights) >= round(share["prune"] * weights)
            assert net[0].weight.any() or share["prune"] > 0.1  # filters alone never empty a layer
        else:
            if action == "recycle":
                units.owner[-1] = FREE
            unit, how = units.allocate(head, optimizer, 7)
            rest = torch.arange(len(rows)) != unit
            assert how[:4] == action[:4] and torch.equal(head.weight[: len(rows)][rest], rows[rest])
        gp.apply_masks(net, masks)
        assert {len(x) for x in (head.weight, head.bias, units.owner, units.utility)} == {head.out_features}
        assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())
        assert not any(net.get_parameter(name)[: len(m)][~m].any() for name, m in masks.items())


def test_the_smallest_weights_go_exactly_and_filters_whole():
    encoder = model.build("cnn", 2).encoder.eval()
    sizes = torch.cat([p.detach().abs().flatten() for p in gp.prunable(encoder).values()])
    first = gp.prune_smallest(encoder, 0.37)
    kept = torch.cat([mask.flatten() for mask in first.values()])
    assert int((~kept).sum()) == round(0.37 * len(kept)) and sizes[~kept].max() <= sizes[kept].min()
    assert math.isclose(gp.sparsity_of(encoder), 0.37, abs_tol=1e-4)
    nn.init.ones_(encoder[0].weight)  # revived
    gp.prune(encoder, 0.1, 0.0, first)
    assert torch.equal(encoder[0].weight != 0, first["0.weight"])
    masks, x = gp.prune_filters(encoder, 1.0), torch.rand(2, 3, 32, 32)
    norms = [masks[f"{norm}.bias"] for _, norm in gp.filter_layers(encoder)]
    assert all(norm.sum() == 1 for norm in norms)  # each layer keeps its largest
    assert not encoder[1](encoder[0](x))[:, ~norms[0]].any()


def test_only_weights_of_layers_are_pruned():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    net.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
    net.heads, net.wide = nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 1, kdim=2)
    net[3].weight = net[2].weight  # a tied weight counts once and is masked under either name
    names = "0.weight 2.weight heads.in_proj_weight heads.out_proj.weight wide.out_proj.weight".split()
    masks = gp.prune_smallest(net, 0.9)
    gp.apply_masks(net, masks | {"3.weight": masks["2.weight"]})
    assert sorted(masks) == names and (net.layer_scale == 1e-6).all()
    assert gp.prune_smallest(net[1], 0.5) == {} and gp.sparsity_of(nn.ReLU()) == 0


def test_claims_are_their_definition_and_the_threshold_leaves_the_own_label_out():
    h, pool_h = torch.randn(1500, 5, generator=seeded()), torch.randn(40, 5, generator=seeded(1))
    named, names, ask = torch.arange(40) % 3 == 0, range(0, 40, 3), range(0, 1500, 214)

    def claimed(x, without=None):
        kernel = [math.exp((F.cosine_similarity(x, row, dim=0).item() - 1) / 0.2) for row in pool_h]
        return sum(kernel[j] for j in names if j != without) / len(names) / (sum(kernel) / 40)

    expected = torch.tensor([claimed(h[i]) for i in ask])
    assert_close(gp.claim(h, pool_h, named)[::214], expected, rtol=1e-4, atol=1e-5)
    left = torch.tensor([claimed(pool_h[j], j) for j in names]).quantile(0.3)
    assert math.isclose(gp.threshold(pool_h, named, 0.3), left, rel_tol=1e-3, abs_tol=1e-4)
    assert gp.threshold(TWO, SOME) == -math.inf


def test_resemblance_is_to_the_others_of_a_class():
    h, y = unit_rows(41, 5), torch.tensor([*range(4)] * 10 + [4])
    others = [h[(y == y[i]) & (torch.arange(41) != i)].mean(0) for i in range(40)]  # the last one is alone
    expected = F.cosine_similarity(h[:40], torch.stack(others)).quantile(0.25)
    assert math.isclose(gp.resemblance(h, y), expected, rel_tol=1e-4)
    assert gp.resemblance(h[:4], y[:4]) == 1  # one of each


def crowd(classes, size, seed, named):
    """Embeddings [classes * size, 16] around a direction a class, classes, labels of a tenth of `named`."""
    y = torch.arange(classes).repeat_interleave(size)
    h = 3 * torch.eye(16)[y] + 0.5 * torch.randn(len(y), 16, generator=seeded(seed))
    return h, y, (torch.rand(len(y), generator=seeded(seed + 100)) < 0.1) & (y < named)


def looks(named, times, size=150, **options):
    """What a monitor finds in `times` looks at the same images, which move a little from look to look."""
    found, labelled = [], crowd(5, size, 0, named)[2]
    monitor, index = gp.ConfusionMonitor(len(labelled), **options), (~labelled).nonzero()[:, 0]
    for look in range(times):
        h, y, _ = crowd(5, size, look, named)
        claims, limit = gp.claim(h[index], h, labelled), gp.threshold(h, labelled)
        group = monitor.find_concept(index, claims, limit, h[index], h[labelled], y[labelled])
        found += [] if group is None else [(look, y[index[group]])]
    return found


def test_a_kind_that_nobody_names_is_found_after_some_looks():
    found = looks(4, 9, patience=3, cooldown=4)
    assert [look for look, _ in found] == [2, 7]  # in the third look, and again after four without another
    assert all((y == 4).float().mean() > 0.95 and len(y) > 40 for _, y in found)
    assert not looks(5, 12) and not looks(0, 5)  # all named; before the first label
    assert not looks(4, 5, at_least=2) and not looks(4, 5, size=15)  # too few


def test_a_kind_is_found_beside_a_denser_group_that_is_a_classes():
    h, y, labelled = crowd(5, 150, 0, 4)
    index = ((y < 4) & ~labelled | (y == 4) & (torch.arange(len(y)) % 2 == 0)).nonzero()[:, 0]
    monitor, claims = gp.ConfusionMonitor(len(y), patience=1), 0.0 + ((y[index] != 0) & (y[index] != 4))
    assert (y[index] == 0).sum() > 1.5 * (y[index] == 4).sum()
    group = monitor.find_concept(index, claims, 0.5, h[index], h[labelled], y[labelled])
    assert len(group) > 40 and (y[index[group]] == 4).all()
    for spoilt in (0 * h, 0 * h + 1, h * math.nan):  # a collapsed network: the search ends
        monitor.cooldown_left = 0
        given = index, claims, 0.5, spoilt[index], spoilt[labelled], y[labelled]
        assert monitor.find_concept(*given) is None


def nameless(kinds=5, units=4, wrap=None, truth=True):
    """A manager, its pool, and embeddings: classes 0 to 3 have some labels, kinds from 4 on have none."""
    h, y, labelled = crowd(kinds, 150, 0, 4)
    torch.manual_seed(0)
    h, network, head = F.normalize(h, dim=1), nn.Module(), model.CosineHead(16, units)
    for c in range(4):  # a head that knows its classes
        gp.imprint(head, c, h[y == c])
    network.head = wrap(head) if wrap else head
    networks = network, copy.deepcopy(network), SGD(network.parameters())
    told, place, taught = torch.where((y < 4) | truth, y, -1), torch.arange(len(y)), torch.arange(kinds) < 4
    manager = gp.HeadManager(networks, lambda n, i: h[i], told, place, "abcdefg", range(units))
    manager.monitor.patience, manager.monitor.cooldown = 1, 0
    pool = {"active": y >= 0, "labelled": labelled, "labelled_before": labelled, "taught": taught}
    return manager, SimpleNamespace(taught_before=taught, place=place, **pool), h, y


def open_by_hand(manager, pool, *groups):
    """Units without a name for groups of images (bool [N])."""
    for group in groups:
        unit, _ = manager.open_unit(pool, UNNAMED, group.nonzero()[:, 0])
        manager.monitor.concept[group] = unit


def happened(manager):
    return " ".join(event["event"] for event in manager.events)


def review(manager, pool, h, y):
    """Merge and split; the units of the images of each nameless kind."""
    manager.review_units(pool, (y < 4).nonzero()[:, 0], h)
    return [manager.monitor.concept[y == kind].unique().tolist() for kind in range(4, int(y.max()) + 1)]


@pytest.mark.parametrize("wrap, truth", [(None, True), (nn.DataParallel, False), (nn.Module.half, True)])
def test_every_nameless_kind_gets_a_unit_and_no_named_one_does(wrap, truth):
    manager, pool, h, y = nameless(6, wrap=wrap, truth=truth)
    with torch.autocast("cpu", torch.bfloat16):
        votes = [manager.discover(pool, h) for _ in range(4)][-1]
        best = manager.predict(h, pool.taught)[0]
    assert manager.units.owner == [0, 1, 2, 3, UNNAMED, UNNAMED] and happened(manager) == "opened opened"
    for kind in (4, 5):
        unit = int(votes[y == kind].mode().values)
        assert unit >= 4 and (y[votes == unit] == kind).float().mean() > 0.95
        assert (votes[y == kind] == unit).float().mean() > 0.5 < (best[y == kind] == unit).float().mean()
    assert (votes[pool.labelled] == -1).all() and (best == y)[y < 4].float().mean() > 0.9
    told = {(event["class"], event["purity"]) for event in manager.events}
    assert told == ({("e", 1.0), ("f", 1.0)} if truth else {(None, None)})


@pytest.mark.parametrize("kinds, labels", [(4, True), (5, False)])
def test_nothing_is_found_without_labels_or_where_all_is_named(kinds, labels):
    manager, pool, h, _ = nameless(kinds)
    pool.labelled_before = pool.labelled & labels
    assert [manager.discover(pool, h) for _ in range(4)] and not happened(manager)


def test_a_unit_is_provisional_while_labels_leak_and_released_when_they_claim_it():
    manager, pool, h, y = nameless(6)
    pool.labelled_before, concept = pool.labelled & (pool.place % 4 > 0), manager.monitor.concept
    for units in ([4], [4, 5]):
        votes = manager.discover(pool, h)
        assert manager.units.unnamed() == units and (votes[concept >= 0] == UNKNOWN).all()
    pool.labelled_before = pool.labelled
    for before in (pool.labelled, pool.labelled, pool.labelled, pool.labelled | (pool.place == 899)):
        pool.labelled = before | (pool.place == 899)  # the first label of another class changes nothing
        votes, pool.labelled_before = manager.discover(pool, h), before
    assert happened(manager) == "opened opened released released opened opened"
    unit = int(votes[y == 4].mode().values)
    assert (y[votes == unit] == 4).sum() > 40
    pool.labelled = pool.labelled_before = pool.labelled | (y == 4) & (pool.place % 8 == 0)
    votes = manager.discover(pool, h)
    assert manager.units.owner[unit] == FREE and happened(manager).endswith("opened opened released")
    assert not (concept == unit).any() and not (votes == unit).any()
    assert manager.open_unit(pool, UNNAMED, torch.tensor([700])) == (unit, "recycled")


def test_units_of_one_kind_are_merged_and_one_of_two_kinds_is_split():
    manager, pool, h, y = nameless(6)
    part = pool.place % 3 == 0
    open_by_hand(manager, pool, part & (y == 4), ~part & (y == 4))
    manager.given |= {4: "dog", 5: "wolf"}  # a person tells them apart
    assert review(manager, pool, h, y)[0] == [4, 5] and not happened(manager)
    manager.given.clear()
    assert review(manager, pool, h, y)[0] == [5] and happened(manager) == "merged"
    assert manager.units.owner[4:] == [FREE, UNNAMED]
    manager.release(5)
    assert not (manager.monitor.concept >= 0).any()
    manager, pool, h, y = nameless(6)
    open_by_hand(manager, pool, y > 3)
    manager.units.age[4], manager.units.utility[4] = 9, 0.0  # to be used again, but not for its own half
    kinds = review(manager, pool, h, y)
    assert sorted(kinds) == [[4], [5]] and happened(manager) == "split"
    best = manager.predict(h, pool.taught)[0]
    assert all((best[y == kind] == kinds[kind - 4][0]).float().mean() > 0.9 for kind in (4, 5))


def test_a_persons_name_survives():
    manager, pool, h, y = nameless(7)
    part = pool.place % 5 == 0
    open_by_hand(manager, pool, part & (y == 4), ~part & (y == 4), y > 4)
    manager.given |= {4: "wolf", 6: "pack"}
    manager.units.age, manager.units.utility = [9] * 7, torch.zeros(7)
    assert manager.units.redundant() == 5
    # It is neither merged away, though the smaller, nor split, nor released when labels claim its images.
    assert review(manager, pool, h, y) == [[4], [6], [6]] and happened(manager) == "merged"
    pool.labelled = pool.labelled_before = pool.labelled | (y == 4) & (pool.place % 8 == 0)
    manager.discover(pool, h)
    again = nameless(7, units=7)[0]
    again.load_state_dict(manager.state_dict())
    manager.log("arrived")
    manager.monitor.concept.fill_(-1)
    assert [again.names(pool.taught)[unit] for unit in (0, 4, 6)] == ["a", "wolf", "pack"]
    assert again.units.owner[4] == again.units.owner[6] == UNNAMED and again.units.redundant() is None
    assert again.events == manager.events[:-1] and (again.monitor.concept == 6).any()  # its own copies


@pytest.mark.parametrize("units", [4, 5])  # is there one for the class from the start?
@pytest.mark.parametrize("found", [True, False])  # is there one without a name for its images?
def test_first_labels_name_the_unit_that_was_opened_for_what_they_label(found, units):
    manager, pool, h, y = nameless(units=units)
    unit = units if found else 4
    open_by_hand(manager, pool, *[y == 4] * found)
    known, learner = pool.labelled, manager.network.head.weight.clone()
    fifth, own = ((y == 4) & (pool.place % 20 == n) for n in (0, 1))
    pool.labelled, pool.taught = known | fifth, torch.ones(5) > 0
    manager.name_class(pool, 4, torch.where(own & found, unit, -1), h if found else None)
    assert manager.units.owner == [0, 1, 2, 3, *[FREE] * (units - 4) * found, 4]
    assert happened(manager) == ("released " * (units - 4) + "named" if found else "grown" * (5 - units))
    assert (manager.predict(h, pool.taught)[1] == y).float().mean() > 0.9
    # It points at what it stood for and what has its name, away from the others; the learner is left alone.
    towards = gp.discriminant(h[fifth | own & found].mean(0), h[known], y[known])
    assert F.cosine_similarity(manager.ema.head.weight[unit], towards, dim=0) > 0.9999
    assert not found or torch.equal(manager.network.head.weight, learner)


# ---- evaluate ----
LABELS = torch.arange(400) % 4
BLOBS = 1.2 * torch.randn(4, 10, generator=seeded())[LABELS] + torch.randn(400, 10, generator=seeded(1))
HALVES = BLOBS[:200], LABELS[:200], BLOBS[200:], LABELS[200:]


def test_probe_and_knn_are_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    scaled = (BLOBS - HALVES[0].mean(0)) / HALVES[0].std(0, correction=0)
    logistic = LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=1000)
    voters = KNeighborsClassifier(15, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    for reference, rows, found, apart in (
        (logistic, scaled, evaluate.linear_probe(*HALVES, l2=1e-3), 0.005),
        (voters, F.normalize(BLOBS, dim=1), evaluate.knn_accuracy(*HALVES, k=15), 1e-6),
    ):
        rows, y = rows.numpy(), LABELS.numpy()
        expected = reference.fit(rows[:200], y[:200]).score(rows[200:], y[200:])
        assert 0.5 < expected < 1 and abs(found - expected) <= apart


def test_cluster_scores():
    y = torch.arange(90) % 3
    permuted = torch.eye(3)[(y + 1) % 3] + 0.01 * torch.rand(90, 3, generator=seeded())
    ari, nmi, silhouette, accuracy = evaluate.cluster_scores(permuted, y).values()
    assert ari == accuracy == 1 and nmi > 0.999 and silhouette > 0.9
    y = torch.randint(3, (300,), generator=seeded(1))
    scores = evaluate.cluster_scores(torch.randn(300, 8, generator=seeded()), y)
    assert abs(scores["ari"]) < 0.05 and scores["accuracy"] < 0.5


COUNTED = """forgetting([[0.5, 0], [0.9, 0.4], [0.7, 0.6]]) | 0.2, 0
forgetting([[0.5, math.nan], [0.4, math.nan]])[:1] | 0.1,
accuracy_by_class(said, y, "abcd") | 1 / 2, 1, 2 / 3, None
epoch_accuracy(said, y, 2) | 4 / 6, 2 / 3, 2 / 3
epoch_accuracy(said, y, 3) | 4 / 6, 4 / 6, None
open_set(claims, 0.15, no, right, first, ~no) | 0.4, 0.5, 5 / 6
open_set(claims, 0.15, no, right, ~no, ~no) | 0.2, None, None
pseudo_label_quality(said, sure, y, y < 2) | 2 / 3, 2 / 3, 1 / 2
gcd_accuracy(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1]), torch.arange(4) > 2) | 3 / 4, 2 / 3, 1"""


@pytest.mark.parametrize("row", COUNTED.splitlines())
def test_figures_are_counted(row):
    said, y, sure = torch.tensor([[0, 1, 1, 2, 2, 0], [0, 1, 0, 2, 2, 2], [9, 7, 9, 10, 0, 0]])
    claims, first = torch.tensor([0.9, 0.8, 0.1, 0.05, 0.2]), torch.arange(5) < 3
    names = dict(said=said, y=y, sure=sure / 10, claims=claims, first=first, no=first & ~first)
    call, expected = row.split(" | ")
    found = eval(call, vars(evaluate) | names | {"right": torch.tensor([1, 0, 1, 0, 0]).bool()})
    assert (list(found.values()) if isinstance(found, dict) else found) == pytest.approx(eval(expected))


def test_embedding_leaves_the_network_as_it_was():
    network = model.build("cnn", 3).train()
    network.encoder[1].eval()  # a frozen layer among others
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    h = evaluate.embed(network, x, batch_size=4)
    assert h.shape == (9, 128) and h.dtype == torch.float32
    assert_close(evaluate.embed(network, x / 255), h)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(evaluate.embed(network, x), h)
    network.head.forward = fails(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        evaluate.embed(network, x)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_gcd_accuracy_is_one_match_over_all():
    for seed in range(6):
        unit, at = torch.randint(-1, 4, (40,), generator=seeded(seed)), torch.arange(40)
        y = torch.where(torch.rand(40, generator=seeded(seed)) < 0.6, (unit * 2 + 1) % 3, at % 3)
        matches = permutations([0, 1, 2, -2], 4)
        best = max((torch.tensor([*match, 9])[unit] == y).float().mean().item() for match in matches)
        found = evaluate.gcd_accuracy(unit.repeat(2), torch.cat([y, 0 * y - 1]), (y == 2).repeat(2))
        assert found["gcd_all"] == pytest.approx(best)
        assert set(evaluate.gcd_accuracy(unit, 0 * y - 1, y == 2).values()) == {None}


def test_semi_kmeans_holds_the_labelled_and_finds_the_rest():
    y, at = torch.arange(300) % 5, torch.arange(300)
    h = unit_rows(5, 16)[y] + 0.1 * torch.randn(300, 16, generator=seeded(1))
    labelled, told = (y < 3) & (at < 60), torch.where(at < 3, (y + 1) % 3, y)  # three contradict h
    clusters = evaluate.semi_kmeans(h, told, labelled, 5)
    assert torch.equal(clusters[labelled], told[labelled])
    assert torch.equal(clusters[~labelled & (y < 3)], y[~labelled & (y < 3)])
    assert min(evaluate.gcd_accuracy(clusters[~labelled], y[~labelled], y[~labelled] > 2).values()) == 1.0
    figures = evaluate.open_world(h, y, labelled, y > 2)
    ways = itertools.product(("kmeans", "semi_kmeans"), ("all", "old", "new"))
    assert set(figures) == {f"gcd_{way}_{part}" for way, part in ways}
    assert min(figures.values()) > 0.95 and evaluate.open_world(h, y, y >= 0, y > 2) == {}


def test_concepts_are_best_units_of_nameless_classes():
    unit, y = torch.tensor([[7, 7, 7, 8, 8, 9, 3, -1, 7], [5, 5, 4, 6, 6, 5, 4, 6, -1]])
    scores = evaluate.concept_scores(unit, y, [7, 8, 9, 12], [4, 5, 6])
    # Class 4 is nobody's largest part, unit 9 not the best of class 5.
    purity = {7: pytest.approx(2 / 3), 8: 1.0, 9: 1.0, 12: None}
    assert scores == {"concepts": 4, "concepts_true": 2, "purity": purity}
    assert evaluate.concept_scores(unit[:0], y[:0], [], [5])["concepts_true"] == 0


def test_temperature_and_calibration_error():
    logits, expected = 4 * torch.randn(4000, 5, generator=seeded()), 0.0
    y = torch.multinomial((logits / 2.5).softmax(1), 1, generator=seeded(1))[:, 0]
    closed = torch.cat([logits, torch.full((4000, 1), -math.inf)], 1)  # a unit that is not in use
    assert evaluate.fit_temperature(closed, y) == pytest.approx(2.5, rel=0.1)
    confidence, best = logits.softmax(1).max(1)
    for low in torch.arange(15) / 15:
        among = (confidence > low) & (confidence <= low + 1 / 15)
        expected += float(((best == y).float() - confidence)[among].sum().abs()) / 4000
    assert evaluate.calibration_error(confidence, best == y) == pytest.approx(expected, abs=1e-4)


WRONG_FIGURES = """test_y has 3: knn_accuracy(h, y, h, y[:3])
train_y is negative: linear_probe(h, y - 1, h, y)
k must be at least 1: knn_accuracy(h, y, h, y, k=0)
h has 0 rows: cluster_scores(h[:0], y[:0])
accuracy has no: forgetting([])
is_new must: novelty_auroc(h[:, 0], y < 9)
new has 3 rows: gcd_accuracy(y, y, y[:3] > 0)
k is 2: semi_kmeans(h, y, y < 3, 2)
k is 400: semi_kmeans(h, y, y < 3, 400)
bins must be: calibration_error(h[:, 0], y > 0, 0)
method is one of pca: project(h, "lda")
part is one of: embed(network, x, "logit")
9, 3, 16, 16: embed(network, x[..., :16, :16])
int64: embed(network, x.long())"""


@pytest.mark.parametrize("row", WRONG_FIGURES.splitlines())
def test_wrong_arguments_are_named(row):
    words, call = row.split(": ")
    names = dict(h=BLOBS, y=LABELS, network=model.build("cnn", 3), x=torch.zeros(9, 3, 32, 32).byte())
    with pytest.raises(ValueError, match=words):
        eval(call, vars(evaluate) | names)


IN_FLOAT32 = """linear_probe(h[:200], y[:200], h[200:], y[200:], l2=1e-3)
cluster_scores(h, y)
fit_temperature(h[:, :4], y)
calibration_error(h[:, 0].abs() / 32, y > 1)
project(h, "pca").tolist()
semi_kmeans(h, y, torch.arange(400) < 100, 4).tolist()"""


@pytest.mark.parametrize("call", IN_FLOAT32.splitlines())
def test_figures_are_those_of_float32(call):
    h = (4 * BLOBS).round() / 4  # the same in all types
    expected = eval(call, vars(evaluate) | {"h": h, "y": LABELS})
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert eval(call, vars(evaluate) | {"h": h.to(dtype), "y": LABELS}) == expected
    assert eval(call, vars(evaluate) | {"h": h.requires_grad_(), "y": LABELS}) == expected


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """A run folder with a network that knows two kinds of image by their colour and has found a third."""
    folder = tmp_path_factory.mktemp("answering")
    torch.manual_seed(0)
    colours = (200 * torch.eye(3) + 30).repeat_interleave(12, 0)
    x = (colours[:, :, None, None] + 20 * torch.rand(36, 3, 32, 32)).byte()
    network = model.build("cnn", 4)
    network(x.float() / 255)  # batch norm statistics
    h = F.normalize(evaluate.embed(network.eval(), x), dim=1)
    with torch.no_grad():
        network.head.weight[:3] = torch.stack([part.mean(0) for part in h.split(12)])
    told = dict(h=h.half(), labelled=torch.arange(36) < 24, limit=0.5, temperature=2.0, unnamed=[2])
    checkpoint = model.pack(network) | dict(names=["red", "green", None, None], answering=told, given={})
    checkpoint |= dict(version=train.VERSION, units={"owner": [0, 1, -1, -2]})
    torch.save(checkpoint, folder / "checkpoint.pt")
    return folder, x


def test_answers_are_names_units_and_unknown(answering):
    folder, x = answering
    network = model.load(folder / "checkpoint.pt")
    said = evaluate.answers(network, x, batch_size=7)
    assert said["answer"] == ["red"] * 12 + ["green"] * 12 + ["unit 2"] * 12
    assert said["unit"].tolist() == [i // 12 for i in range(36)]
    assert said["claim"][:24].min() > 0.5 > said["claim"][24:].max()
    logits = evaluate.embed(network, x, "logits")[:, :3]  # the free unit is out
    assert_close(said["confidence"], (logits / 2.0).softmax(1).max(1).values, atol=0.02, rtol=0)
    network.answering["limit"] = 1.1 * float(said["claim"].max())
    assert evaluate.answers(network, x)["answer"] == ["unknown"] * 24 + ["unit 2"] * 12
    network.names, network.answering = [None] * 4, None
    with pytest.raises(ValueError, match="no unit with a name"):
        evaluate.answers(network, x)


def test_files_are_answered_in_order_on_a_poor_terminal(answering, tmp_path, monkeypatch):
    """With a codec that has no Chinese, and a backend that is not there."""
    monkeypatch.chdir(tmp_path)
    Path("pictures/a, b").mkdir(parents=True)
    for i, image in enumerate(answering[1][::6]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 32)).save(f"pictures/a, b/猫_{i}.png")
    Path("pictures/torn.png").write_bytes(b"torn")
    paths = ["pictures", "pictures/a, b/猫_0.png", "none.png", "--out", "猫.csv"]
    poor = os.environ | {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://missing.backend"}
    command = [sys.executable, HERE / "evaluate.py", answering[0], "--predict", *paths]
    done = subprocess.run(command, capture_output=True, env=poor)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    for words in (b"40x32 -> 32x32", b"2  could not be read", b"9 images: ?.csv"):
        assert words in done.stdout
    rows = list(csv.DictReader(Path("猫.csv").read_text("utf-8").splitlines()))
    assert list(rows[0]) == "file answer unit confidence claim error".split()
    good, bad = ([row for row in rows if bool(row["error"]) == wrong] for wrong in (False, True))
    assert [Path(row["file"]).name for row in good] == [f"猫_{i}.png" for i in (*range(6), 0)]
    said = ["red", "red", "green", "green", "unit 2", "unit 2", "red"]
    assert [row["answer"] for row in good] == said
    assert good[0] == good[-1] and 0 < float(good[0]["confidence"]) <= 1
    assert {Path(row["file"]).name for row in bad} == {"torn.png", "none.png"}
    assert [list(row.values())[1:5] for row in bad] == [[""] * 4] * 2
    assert Path("猫.png").stat().st_size > 10_000


def test_a_person_names_what_was_found(answering, tmp_path, capsys):
    shutil.copy(answering[0] / "checkpoint.pt", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    wrong = {"9=blue": "unit 9 is not there", "3=blue": "unit 3 is free", "0=blue": "unit 0 is a class's"}
    wrong |= dict.fromkeys("2 x=blue 2= 2=_ =blue 2=unknown 2=unit_7".split(), "write UNIT=NAME")
    for pair, words in wrong.items():
        args = [tmp_path, "--name", "2=sky", "--name", pair.replace("_", " ")]
        assert words in refused(capsys, evaluate.main, args)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    for name, told in (("blue, 猫", "blue, 猫"), ("red", "red, as unit 0 does")):  # it may be named anew
        assert evaluate.main([str(tmp_path), "--name", f"2 = {name} "]) == 0
        assert f"unit 2 answers {told}\n" in capsys.readouterr().out
        network = model.load(tmp_path / "checkpoint.pt")
        assert network.names == ["red", "green", name, None]
        assert (
            evaluate.answers(network, answering[1])["answer"][24:] == [name] * 12
        )  # though none claims them
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["given"] == {2: "red"} and saved["units"]["owner"] == [0, 1, -1, -2]


def test_mistakes_and_concepts_are_picked_and_sorted():
    x = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 4, 4)
    said, y = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 1]])
    sure = torch.tensor([0.9, 0.5, 1.0, 0.7, 0.8, 0.9, 0.6, 1.0])
    ((_, images, captions),) = evaluate.mistake_rows(x, said, sure, y, ["cat", "dog"])
    assert images[:, 0, 0, 0].tolist() == [4, 3, 6, 1] and captions[0] == "dog 80 %\nis cat"
    assert evaluate.mistake_rows(x, y, sure, y, ["cat", "dog"]) == []
    h = torch.eye(4)[[0, 0, 1, 2, 2, 2, 3, 3]] + torch.tensor([0, 0, 0, 0.5, 0, -0.5, 0, 0])[:, None]
    unit = torch.tensor([0, 0, 0, 2, 2, 2, -1, -1])
    rows = evaluate.concept_rows(x, h, unit, unit < 0, ["cat", None, None])
    labels = ["unit 2\n3 images", "unknown\n2 images", "cat (unit 0)\n3 images"]
    assert [label for label, _ in rows] == labels and rows[0][1][0, 0, 0, 0] == 4  # the one in the middle


NAMES = [*"a $5 or $6|_hidden|猫|comma, name|new\nline|\udcff|{x}|%s|\\alpha$".split("|"), "n" * 120]


@pytest.mark.parametrize("n", [2, 10, 100])
def test_pictures_of_any_names_are_drawn_without_a_word(tmp_path, monkeypatch, capsys, n):
    import matplotlib

    monkeypatch.chdir(tmp_path)
    before, known, y = dict(matplotlib.rcParams), n - n // 3, torch.arange(3 * n) % n
    classes = NAMES[:n] if n <= 10 else [f"{name} {i}" for i in range(10) for name in NAMES]
    h = torch.randn(n, 8, generator=seeded())[y] + 0.3 * torch.randn(3 * n, 8, generator=seeded(1))
    row = dict(labels=9, labelled=0.1, units=known, accuracy=0.5, old_accuracy=0.6, new_accuracy=None)
    row |= {f"loss_{term}": 1.0 for term in evaluate.TERMS} | {f"accuracy_{name}": 0.1 for name in classes}
    rows = [row | dict(epoch=e, stage=f"stage {e // 3}", classes=known if e < 3 else n) for e in range(1, 7)]
    event = {"epoch": 4, "unit": known, "class": None, "count": 9, "purity": None}
    events = [event | {"event": "arrived", "class": name, "unit": None} for name in classes[known:]]
    events += [event | {"event": "opened"}, event | {"epoch": 5, "event": "merged"}]
    events += [event | {"epoch": 5, "event": "grown", "unit": known + 1, "class": classes[-1]}]
    images = torch.randint(0, 256, (3 * n, 3, 32, 32), generator=seeded()).byte()
    with warnings.catch_warnings(action="error"):
        sheet = evaluate.mistake_rows(images, (y + 1) % n, torch.rand(3 * n), y, classes)
        for drawing in (
            (evaluate.draw_curves, rows, classes, "curves.png"),
            (evaluate.draw_life, rows, events, classes, "life.png"),
            (evaluate.draw_embedding, h, y, classes, "embedding.png", "pca", known, n - 1),
            (evaluate.draw_confusion, y.roll(1), y, classes, "confusion.png"),
            (evaluate.contact_sheet, "sheet.png", sheet, "a title"),
            (evaluate.contact_sheet, "none.png", [], "nothing"),
        ):
            assert evaluate.attempt(*drawing)
    lines = capsys.readouterr().err.splitlines()
    assert dict(matplotlib.rcParams) == before and len(lines) <= 1
    assert all(line.startswith("note: no installed font") for line in lines)
    assert [np.asarray(Image.open(p).convert("L")).std() > 1 for p in tmp_path.glob("*.png")] == [True] * 6


def test_a_picture_that_fails_is_one_warning(tmp_path, capsys):
    none = torch.zeros(0)
    assert not evaluate.attempt(evaluate.draw_confusion, none, none, ["a"], tmp_path / "c.png")
    assert not evaluate.attempt(evaluate.contact_sheet, tmp_path / "none/c.png", [], "")
    assert re.fullmatch(r"(warning: \S+c\.png could not be drawn \(.*\)\n){2}", capsys.readouterr().err)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_picture_of_a_collapsed_network_is_a_point(method):
    assert (evaluate.project(torch.zeros(40, 8), method) == 0).all()
    assert evaluate.project(torch.rand(40, 8, generator=seeded()), method).std() > 0


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Folders of finished runs, as far as comparisons read them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, accuracy, changes in (
        ("gradual", 0.5, {}),
        ("gradual-s1", 0.6, {"seed": 1}),
        ("gradual-slow", 0.7, {"lr": 0.03, "without": ["discovery", "pruning"]}),
        ("semi", None, {"lr": 0.03}),
    ):
        folder = tmp_path / "finished" / name
        folder.mkdir(parents=True)
        args = dict(seed=0, class_order=0, label_budget=0.1, lr=0.06, without=[], commit="abc") | changes
        args["curriculum"] = name.split("-")[0]
        summary = dict(accuracy=accuracy, knn=0.75, ari=0.5, labels_used=40, classes=["a"])
        (folder / "args.json").write_text(json.dumps(args))
        (folder / "summary.json").write_text(json.dumps(summary))
    return tmp_path / "finished"


def test_runs_are_compared(finished, capsys):
    def told(*args):
        assert evaluate.main([*map(str, args), "--out", "~/out.png"]) == 0
        return capsys.readouterr()

    table = told(finished, finished / "gradual").out
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()[:4]}
    assert {"55.0", "±", "7.1"} <= set(rows["gradual lr=0.06"]) and rows["semi"][1:3] == ["1", "-"]
    assert "75.0" in rows["gradual lr=0.03 without=discovery,pruning"] and "gcd" not in table
    assert Path("out.png").stat().st_size > 10_000
    record = [sys.executable, HERE / "benchmarks/record.py", *sorted(finished.iterdir()), "runs.csv"]
    subprocess.run(record, check=True)
    rows = list(csv.DictReader(Path("runs.csv").read_text().splitlines()))
    assert told("runs.csv").out == table and rows[1]["args.seed"] == "1" and rows[0]["args.commit"] == "abc"
    both = evaluate.compare([finished / "gradual", finished / "semi"])
    assert list(both) == ["gradual", "semi"]  # each has its rate
    for name in ("one", "two", "three"):
        shutil.copytree(finished / "gradual", f"some/{name}")
    Path("some/three/summary.json").unlink()
    out, err = told("some", "some/one")
    assert "gradual     2 " in out and "three: not finished, left out" in err
    assert "gradual: some of 2 runs repeat a seed" in err


WRONG_RUNS = """nothing | nothing: not a finished run
begun | summary.json
other torn | other: not a run
torn | torn: not a finished run
list | list: not a run
log.csv | log.csv: not a run or table
bad.csv | bad.csv: not a
list --out nowhere/figure.png | its folder is not there
list torn --compact small.pt | --compact: one at a time, of one run
list --predict list --name 2=blue | one at a time
answering --predict empty | empty: no images there
begun --compact small.pt | checkpoint.pt"""


def test_wrong_runs_get_one_line(finished, answering, capsys):
    for name, text in (("torn", "{"), ("other", '{"curriculum": "self"}'), ("list", "[]"), ("begun", "{}")):
        shutil.copytree(finished / "semi", name)
        Path(name, "args.json").write_text(text)
    Path("begun/summary.json").unlink()
    shutil.copytree(answering[0], "answering")
    Path("empty").mkdir()
    Path("log.csv").write_text("epoch,stage\n1,infancy\n")
    Path("bad.csv").write_bytes(b"\xff\xfe\x00")
    for row in WRONG_RUNS.splitlines():
        args, words = row.split(" | ")
        assert words in refused(capsys, evaluate.main, args.split())


# ---- train: the command line, runs, resuming ----


FAST = "--dataset digits --image-size 8 --per-class 10 --batch-size 32 --embedding pca --epochs 4".split()
TINY = [*FAST, "--label-budget", "0.2"]


def script(name, *args, cwd, **environment):
    command = [sys.executable, HERE / name, *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def start(*args, draw=False):
    """Run `train.main` in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(evaluate, "attempt", lambda *_: False)
        try:
            return train.main([str(a) for a in args])
        finally:
            torch.set_num_threads(threads)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


def saved_in(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


DRAWN = ("gradual", "self-known")  # with figures, which take longest
RUNS = {name: ["--curriculum", name, *TINY] for name in curriculum.CURRICULA} | {
    "other seed": [*TINY, "--seed", 1],
    "strict": [*TINY, "--epochs", 6, "--replay", 2, "--prune-units", 0.4, "--prune", 0.5, "--lr", 0.1],
    "one image": [*FAST, "--per-class", 1, "--known-classes", 1, "--batch-size", 2, "--label-budget", 1],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs: one for each curriculum, and some with other flags."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in RUNS.items():
        assert start(*flags, "--out", root / name, draw=name in DRAWN) == 0, name
    return root


FIGURES = """accuracy probe probe_leaked knn ari nmi silhouette old_accuracy new_accuracy first_sight
forgetting sparsity labels_used seconds"""


@pytest.mark.parametrize("name", curriculum.CURRICULA)
def test_every_curriculum_runs_and_leaves_its_figures(runs, name):
    summary, rows = summary_of(runs / name), (runs / name / "log.csv").read_text().splitlines()
    settings = json.loads((runs / name / "args.json").read_text())
    assert set(FIGURES.split()) <= set(summary) and len(rows) == 5
    assert settings["model"] == "cnn" and {"commit", "machine"} <= set(settings)
    taught = name not in ("self", "self-known")
    assert (summary["accuracy"] is not None) == taught
    assert summary["labels_used"] == {"supervised": 100, "self": 0, "self-known": 0}.get(name, 20)
    spent = summary["label_epochs"]
    assert 0 < spent < 80 if name == "gradual" else spent == 4 * summary["labels_used"]
    assert math.isclose(summary["sparsity"], 0.8, abs_tol=0.01)
    assert (summary["first_sight"] is not None) == (name == "gradual")
    assert ("gcd_all" in summary) == (taught and name != "supervised")  # where images have no label
    assert (summary.get("calibration_error", 0) < 0.5) and ("calibration_error" in summary) == taught
    pictures = ["curves", "embedding"] + ["confusion", "concepts", "mistakes"] * taught
    if name in DRAWN:
        assert all((runs / name / f"{p}.png").stat().st_size > 5_000 for p in pictures)
    names = model.load(runs / name / "checkpoint.pt").names
    assert sorted(filter(None, names)) == [str(digit) for digit in range(10)] * taught


def test_one_image_of_one_class_is_enough_and_strict_replay_prunes_whole_filters(runs):
    assert summary_of(runs / "one image")["labels_used"] == 10
    widths = [w for w in model.compact(model.load(runs / "strict/checkpoint.pt")).encoder.config if w != "M"]
    assert sum(widths[:-1]) == 96 - round(0.4 * 96) and widths[-1] == 128
    assert summary_of(runs / "strict")["labels_used"] == 20 and summary_of(runs / "strict")["sparsity"] >= 0.5


def rows_of(folder):
    """log.csv without times: rows of cells."""
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    keep = [i for i, name in enumerate(rows[0]) if name not in ("seconds", "images_per_second")]
    return [[row[i] for i in keep] for row in rows]


def identical(a, b):
    """Whether two values are the same, with the tensors in them bit for bit."""
    (some, shape), (others, other_shape) = tree_flatten(a), tree_flatten(b)
    pairs = zip(some, others, strict=True) if shape == other_shape else [(0, 1)]
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)


def same_run(a, b):
    """Whether two runs ended alike, bit for bit, times apart."""
    apart = {"seconds": 0, "images_per_second": 0, "args": 0, "rows": 0}
    ends = [(saved_in(run) | apart, summary_of(run) | apart, rows_of(run)) for run in (a, b)]
    events = [(run / "events.csv").read_text() for run in (a, b)]
    return identical(*ends) and events[0] == events[1]


def test_the_seed_decides(runs):
    one, other = (rows_of(runs / name) for name in ("gradual", "other seed"))
    assert one[0] == other[0] and all(a != b for a, b in zip(one[1:], other[1:], strict=True))


# Stopped in which epoch, by what, with which exit status and words.
STOPS = (
    (2, "nt_xent", 2, "loss 'ntxent' of step 2 in epoch 2 is not finite; the checkpoint of epoch 1 is kept"),
    (3, KeyboardInterrupt(), 130, "stopped; go on with: python train.py --resume"),
    (4, OSError(28, "No space left on device"), 2, "No space left on device; go on with: python train.py"),
)


def test_a_run_that_is_stopped_ends_as_if_nothing_had_been(runs, tmp_path, capsys):
    out, flags = tmp_path / "cut it", [*TINY, "--out", tmp_path / "cut it"]
    for epoch, trouble, status, words in STOPS:
        calls, loss, write = [], losses.nt_xent, data.write_atomically

        def not_a_number(*views, loss=loss, calls=calls, **options):  # an epoch has four steps
            calls.append(views)
            return loss(*views, **options) * (math.nan if len(calls) == 4 + 2 else 1)

        def fails(path, content, mark="", write=write, epoch=epoch, trouble=trouble):
            if str(path).endswith(".pt") and len(content.args[0]["rows"]) == epoch:
                raise trouble
            write(path, content, mark)

        with pytest.MonkeyPatch.context() as patch:
            if trouble == "nt_xent":
                patch.setattr(losses, "nt_xent", not_a_number)
            else:
                patch.setattr(data, "write_atomically", fails)
            assert start(*flags) == status
        message = capsys.readouterr().err.strip()
        assert words in message and "\n" not in message
        assert ("go on" in message) == (trouble != "nt_xent")  # it would diverge again
        assert len(saved_in(out)["rows"]) == epoch - 1 and not (out / "summary.json").exists()
        flags = ["--resume", out] if epoch == 2 else ["--resume", "--out", out]
    assert start(*flags) == 0
    assert same_run(out, runs / "gradual")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (runs / "other seed").iterdir())
    assert start(*flags) == 0 and same_run(out, runs / "gradual")  # measured and drawn again


def test_signals_end_a_run_as_ctrl_c_does(tmp_path):
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    pipes, runs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), {}
    for number in signals:
        command = [
            sys.executable,
            HERE / "train.py",
            *TINY,
            "--epochs",
            "999",
            "--out",
            tmp_path / str(number),
        ]
        heed = partial(signal.signal, number, signal.SIG_DFL)  # the tests may run under nohup
        runs[number] = subprocess.Popen(command, preexec_fn=heed, **pipes)
    for number, run in runs.items():
        next(line for line in run.stdout if line.startswith("   1/999"))
        run.send_signal(number)
        message = run.communicate()[1].strip().splitlines()[-1]
        assert run.returncode == 130 and message.startswith("train.py: stopped; go on with: python train.py")
        assert len(saved_in(tmp_path / str(number))["rows"]) >= 1


def test_weights_that_are_not_finite_are_named():
    network = model.build("cnn", 3)
    train.stop_if_not_finite(torch.zeros(5, 4), network, 0)
    network.head.weight.data[1, 2] = math.inf
    with pytest.raises(
        FloatingPointError, match="weight 'head.weight' in epoch 1 is not finite; there is no"
    ):
        train.stop_if_not_finite(torch.zeros(5, 4), network, 0)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


BAD_VALUES = {
    "--curriculum gradul": "--curriculum: invalid choice: 'gradul'",
    "--dataset folder:nowhere": "nowhere/train is not there",
    "--model vgg-smal": "did you mean 'vgg-small'",
    "--label-budget 1.5": "--label-budget: must be float in 0.0..1.0, not '1.5'",
    "--per-class 4": "no label of 4",
    "--prune-units 0.5 --model resnet18": "whole filters can be pruned in a plain chain",
    "--lr 0": "--lr: must be float in 1e-6..1e3",
    "--epochs 2.5": "--epochs: must be int in 1.., not '2.5'",
    "--image-size 20": "multiple of 8",
    "--never-named 10": "must fit the 10 classes",
    "--late 3,x": "--late: x must be new classes",
    "--late 3 --known-classes 9": "--late decides --known-classes",
    "--device warp": "--device 'warp' cannot be used",
    "--inject digits:3": "a class '3' is there already",
    "--from nowhere": "nowhere/checkpoint.pt",
    "--resume nowhere": "nowhere holds no run",
    "--nonsense": "--nonsense",
    "digits": "unrecognized arguments: digits",
    "--out": "--out: expected one argument",
    f"--out {'x' * 300}": "File name too long",
    "--out /proc/run": "/proc/run",
}


@pytest.mark.parametrize("flags, words", BAD_VALUES.items())
def test_bad_values_get_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    args = [*("--dataset digits".split() if "--resume" not in flags else []), *flags.split()]
    out = [] if "--resume" in flags or "--out" in flags else ["--out", tmp_path / "run"]
    assert words in refused(capsys, train.main, [*out, *args])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["held", "held/mine.txt", "held/mine.txt/run", "run"])
def test_nothing_is_overwritten(capsys, tmp_path, runs, out):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/mine.txt").write_text("kept")
    shutil.copytree(runs / "self", tmp_path / "run")
    before = contents(tmp_path)
    refused(capsys, train.main, ["--dataset", "digits", "--out", tmp_path / out])
    assert contents(tmp_path) == before


def test_of_two_runs_that_begin_in_one_folder_one_gets_it(tmp_path, monkeypatch):
    args = Namespace(out=str(tmp_path / "run"), dataset="digits", curriculum="self", seed=0)
    train.run_folder(args)
    with pytest.raises(ValueError, match="is not an empty folder"):
        train.run_folder(args)
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))  # even if both look at the same moment
    with pytest.raises(ValueError, match="is not an empty folder"):
        train.run_folder(args)
    monkeypatch.chdir(tmp_path)
    taken = [train.run_folder(Namespace(**vars(args) | {"out": None})) for _ in range(2)]
    assert taken == ["runs/digits-self-s0", "runs/digits-self-s0-2"]


def edit_checkpoint(key, change):
    def edit(folder):
        state = saved_in(folder)
        torch.save(state | {key: change(state[key])}, folder / "checkpoint.pt")

    return edit


def flip_one_bit(folder):
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "checkpoint.pt").write_bytes(content)


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


# What is spoiled in a run, what else is asked for, and the words.
OTHERS = "digits has other images, labels or class names"
BAD_RESUMES = {
    "torn": (put("checkpoint.pt", "torn"), "", "checkpoint.pt is damaged"),
    "one bit": (flip_one_bit, "", "checkpoint.pt is damaged (the checksum of"),
    "version": (edit_checkpoint("version", lambda v: v + 1), "", f"has version {train.VERSION + 1}"),
    "images": (edit_checkpoint("fingerprint", lambda f: f | {"images": "0"}), "", OTHERS),
    "renamed": (edit_checkpoint("fingerprint", lambda f: f | {"classes": f["classes"][::-1]}), "", OTHERS),
    "no args.json": (lambda folder: (folder / "args.json").unlink(), "", "holds no run"),
    "torn args.json": (put("args.json", '{"lr": 0.'), "", "holds no run"),
    "list": (put("args.json", "[]"), "", "holds no run"),
    "nothing": (put("args.json", "{}"), "", "holds no run"),
    "lr": (None, "--lr=0.5", "--resume takes --lr from the run; drop the flag"),
    "another out": (None, "--out x", "--resume takes --out from the run"),
    "data": (None, "--dataset folder:nowhere", "nowhere/train is not there"),
}


@pytest.mark.parametrize("spoil, flags, words", BAD_RESUMES.values(), ids=BAD_RESUMES)
def test_what_cannot_be_resumed_is_refused_in_one_line(runs, capsys, tmp_path, spoil, flags, words):
    out = shutil.copytree(runs / "gradual", tmp_path / "run")
    if spoil:
        spoil(out)
    before = contents(out)
    assert words in refused(capsys, train.main, ["--resume", out, *flags.split()])
    assert contents(out) == before


def test_several_runs_go_on_where_they_were_stopped_and_are_compared(capsys, tmp_path):
    command = [*TINY, "--curriculum", "labels-only", "--seeds", "2", "--seed", "3", "--epochs", "2"]
    command += ["--out", tmp_path / "both"]
    assert start(*command) == 0
    assert "labels-only     2" in capsys.readouterr().out
    first, second = (contents(tmp_path / f"both/labels-only-s{seed}") for seed in (3, 4))
    assert json.loads(second[Path("args.json")])["class_order"] == 1
    shutil.rmtree(tmp_path / "both/labels-only-s4")
    assert start(*command) == 2 and "for the rest: the same command with --resume" in capsys.readouterr().err
    assert start(*command, "--resume") == 0
    for seed, before in ((3, first), (4, second)):
        assert contents(tmp_path / f"both/labels-only-s{seed}").keys() == before.keys()


def bars_folder(root, classes, unlabelled=0):
    """Noisy bars, at another place for every class: a folder data set of PNG files."""
    generator, files = torch.Generator().manual_seed(0), {}
    for c, name in enumerate(classes.split()):
        files |= {f"train/{name}/{i}.png": c for i in range(8)} | {
            f"test/{name}/{i}.png": c for i in range(4)
        }
    for path, c in (files | {f"unlabelled/{i}.png": i % 4 for i in range(unlabelled)}).items():
        image = torch.randint(0, 90, (32, 32, 3), dtype=torch.uint8, generator=generator)
        image[:, 3 * c : 3 * c + 3] += 150
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(root / path)
    return f"folder:{root}"


OWN = "--embedding pca --epochs 3 --min-steps 2".split()
SMALL = [*OWN, "--model", "cnn", "--image-size", "16"]


@pytest.mark.parametrize("name", curriculum.CURRICULA)
def test_images_without_a_label_are_used_by_every_curriculum(tmp_path, name, capsys):
    folder = bars_folder(tmp_path / "set", "ant bee cat", unlabelled=20)
    assert start("--dataset", folder, *SMALL, "--curriculum", name, "--out", tmp_path / "run") == 0
    told, summary = capsys.readouterr().out, summary_of(tmp_path / "run")
    assert "3 epochs of 2 steps, 6 in all, of 44 images" in told  # a batch of 128 is lowered to what is there
    assert "unlabelled: 20 images" in told
    assert summary["labels_used"] == (0 if "self" in name else 24)  # all labels leak beside unlabelled images


def test_flags_about_classes_combine(tmp_path, capsys):
    folder, out = bars_folder(tmp_path / "set", "ant bee cat dog"), tmp_path / "run"
    flags = "--per-class 6 --inject digits:3 --late bee --never-named 1 --label-budget 0.5 --epochs 5".split()
    assert start("--dataset", folder, *SMALL, *flags, "--out", out) == 0
    assert "late: bee, 3" in capsys.readouterr().out and summary_of(out)["labels_used"] == 4 * 3
    assert set(filter(None, saved_in(out)["names"])) == {"ant", "bee", "cat", "dog"}
    assert start("--resume", out) == 0  # what --late decided is no obstacle
    flags = "--dataset digits --validate --known-classes 2 --never-named 1 --per-class 20".split()
    assert start(*flags, *SMALL, "--out", tmp_path / "held") == 0
    shutil.rmtree(tmp_path / "set/train/cat")
    message = refused(capsys, train.main, ["--dataset", folder, *SMALL, "--out", tmp_path / "none"])
    assert "class 'cat' has no training image" in message


def test_a_run_goes_on_with_data_that_moved_but_not_with_others(tmp_path, capsys):
    assert (
        start("--dataset", bars_folder(tmp_path / "set", "ant bee"), *SMALL, "--out", tmp_path / "run") == 0
    )
    (tmp_path / "set").rename(tmp_path / "moved")
    moved = ["--resume", tmp_path / "run", "--dataset", f"folder:{tmp_path / 'moved'}"]
    assert start(*moved) == 0
    for split in ("train", "test"):
        (tmp_path / "moved" / split / "bee").rename(tmp_path / "moved" / split / "wasp")
    assert "other images, labels or class names" in refused(capsys, train.main, moved)


# Classes of the new folder; ant, bee and cat are known before.
NEXT = {"new": "ant bee cat dog", "few": "bee elk", "absent": "dog elk", "old": "ant cat"}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    root = tmp_path_factory.mktemp("earlier")
    folder = bars_folder(root / "set", "ant bee cat")
    assert start("--dataset", folder, *SMALL, "--out", root / "run", "--label-budget", 0.5) == 0
    return root / "run"


@pytest.mark.parametrize(
    "name, case", [*(("gradual", case) for case in NEXT), ("semi", "few"), ("self", "new")]
)
def test_an_earlier_run_is_continued_on_other_data_and_left_alone(tmp_path, earlier, capsys, name, case):
    before, out = contents(earlier), tmp_path / "run"
    folder = bars_folder(tmp_path / "set", NEXT[case])
    flags = ["--dataset", folder, *OWN, "--from", earlier, "--label-budget", 0.5, "--curriculum", name]
    assert start(*flags, "--epochs", 5, "--out", out) == 0
    taught = {*NEXT[case].split()} if name != "self" else set()
    assert set(filter(None, saved_in(out)["names"])) == {"ant", "bee", "cat"} | taught
    assert (summary_of(out)["old_accuracy_before"] is None) == (case == "absent")
    assert "--from decides --model" in refused(capsys, train.main, [*flags, "--model", "cnn"])
    if case == "absent":
        made = json.loads((out / "args.json").read_text()) | {"origin": str(tmp_path / "nowhere")}
        (out / "args.json").write_text(json.dumps(made))  # the earlier run is no longer needed
        assert start("--resume", out) == 0
    assert contents(earlier) == before


def test_a_log_that_is_open_elsewhere_and_figures_that_fail_are_one_warning(tmp_path, monkeypatch, capsys):
    replace_file, out = os.replace, tmp_path / "run"

    def denied(source, target):
        if str(target).endswith("log.csv"):
            raise PermissionError(13, "Permission denied")
        replace_file(source, target)

    def draw_curves(*_):
        assert (out / "summary.json").exists()
        raise RuntimeError("no ink")

    monkeypatch.setattr(os, "replace", denied)
    monkeypatch.setattr(evaluate, "draw_curves", draw_curves)
    assert start(*TINY, "--curriculum", "self", "--epochs", 2, "--out", out, draw=True) == 0
    log, figure = capsys.readouterr().err.splitlines()
    assert "log.csv was not written" in log and "could not be drawn (RuntimeError: no ink)" in figure
    assert len(saved_in(out)["rows"]) == 2


def test_any_class_name_terminal_backend_and_home(tmp_path):
    bars_folder(tmp_path / "set", f"猫$a$_ -x,y\u0301 _{'z' * 100}")
    flags = ["--dataset", f"folder:{tmp_path}/set", *SMALL, "--curriculum", "semi", "--out", "~/r"]
    around = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://missing.backend", "HOME": str(tmp_path)}
    done = script("train.py", *flags, cwd=tmp_path, **around)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r/curves.png").exists() and (tmp_path / "r/mistakes.png").exists()
    assert "猫$a$_" in (tmp_path / "r/log.csv").read_text("utf-8")


class StaysOn(TorchDispatchMode):
    """Refuses every operation that puts its result on another device than `device`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves(out) if torch.is_tensor(t) and t.ndim]
        assert all(t.device.type == self.device for t in leaves), operation
        return out


def make_targets(n, device, clusters):
    y, every = torch.arange(n, device=device) % 10, torch.ones(n, dtype=torch.bool, device=device)
    mix, sure = dict.fromkeys(train.TERMS, 1.0), torch.ones(n, device=device)
    return train.Targets(mix, every, every[:10], y, y, sure, clusters)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_training_step_never_waits_for_the_device(device, monkeypatch):
    """Fake tensors have a device and no values: a step that asks for a value, or leaves the device, fails.

    Without a GPU the backward pass of the fake one is left out, for it needs a real stream.
    """
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    n, mode = 300, StaysOn()
    mode.device = device
    with FakeTensorMode(), torch.device(device):
        y, x = torch.arange(n) % 10, torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
        dataset = data.Dataset(x, y, x, y, [], (), (), flip=True, color=True, scale=(0.2, 1.0))
        network, ema = (model.build("vgg-small", 10) for _ in range(2))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        masks = {name: w > -9 for name, w in network.encoder.named_parameters() if w.ndim > 1}
        state = Namespace(network=network, ema=ema, optimizer=optimizer, bf16=device == "cpu", masks=masks)
        state.bank = losses.MemoryBank(n, 128, device=device)
        state.head = Namespace(units=grow_prune.Units(range(10), device=device))
        targets = make_targets(n, device, torch.zeros(3, n, dtype=torch.long))
        with mode:
            terms = train.train_step(state, dataset, targets, 0.9, None, 0, torch.arange(32))
        assert terms.shape == (len(train.TERMS),)
        with pytest.raises(DataDependentOutputException):  # what a step may not do
            terms[0].item()


@needs_a_gpu
def test_a_run_goes_on_from_device_to_device(tmp_path, monkeypatch):
    write, flags = data.write_atomically, [*TINY, "--out", str(tmp_path / "run")]
    for epochs, device in ((1, "cpu"), (2, "cuda"), (3, "cpu")):

        def stop(path, content, mark="", epochs=epochs):
            write(path, content, mark)
            if str(path).endswith(".pt") and len(saved_in(tmp_path / "run")["rows"]) == epochs:
                raise KeyboardInterrupt

        monkeypatch.setattr(data, "write_atomically", stop)
        assert train.main([*flags, "--device", device]) == 130
        flags = ["--resume", str(tmp_path / "run")]
    monkeypatch.undo()
    assert train.main([*flags, "--device", "cuda"]) == 0
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 5


@needs_a_gpu
def test_a_captured_step_does_what_the_step_does():
    """Of two networks that begin alike, one learns from captured steps: weights and memory stay together."""
    n, device, ends = 12_100, torch.device("cuda"), []  # a bank of which each step searches one half
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, y, kind = (
        x.to(device),
        (torch.arange(n) % 10).to(device),
        dict(flip=True, color=True, scale=(0.2, 1.0)),
    )
    dataset = data.Dataset(x, y, x, y, [str(c) for c in range(10)], (0.5,) * 3, (0.25,) * 3, **kind)
    targets = make_targets(n, device, y.repeat(3, 1))
    for captured in (False, True):
        state = train.State(Namespace(seed=0, model="cnn", lr=0.01, image_size=32), dataset, 10)
        state.bf16, coins, heard = False, torch.Generator(device).manual_seed(3), []
        state.bank.update(torch.arange(n, device=device), torch.randn(n, 128, device=device, generator=coins))
        state.masks = grow_prune.prune_smallest(state.network.encoder, 0.5)
        functions = [partial(train.train_step, state, dataset, targets, 0.9, coins, turn) for turn in (0, 1)]
        if captured:
            functions = model.capture(functions, state.optimizer, coins)
        order = (targets.active, targets.active, 64, 12, 0.5, torch.Generator().manual_seed(2))
        for step, index in enumerate(data.batches(*order)):
            model.set_learning_rate(state.optimizer, 0.01 if step < 10 else 0.0)
            heard.append(functions[step % 2](index).clone())
            if step == 9:
                held = state.network.encoder[0].weight.detach().clone()
        assert torch.equal(held, state.network.encoder[0].weight)  # nothing is learned at a rate of 0
        utility = state.head.units.utility
        ends.append((torch.stack(heard), held, state.bank.rows, state.ema.head.weight.detach(), utility))
    for plain, other in zip(*ends, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-2, atol=1e-3)

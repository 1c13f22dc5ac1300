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
import types
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
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import prune as torch_prune
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer

import augment
import curriculum
import data
import evaluate
import grow_prune
import losses
import model
import train
from grow_prune import FREE, UNKNOWN, UNNAMED

# ---- augment, model, losses, curriculum ----
HERE = Path(__file__).parent
any_example = settings(max_examples=40, deadline=None, derandomize=True)
seeds, fractions = st.integers(0, 2**31 - 1), st.floats(0, 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rows(n, d, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


def filled_bank(n, d):
    bank = losses.MemoryBank(n, d)
    bank.update(torch.arange(n), unit_rows(n, d))
    return bank


WRONG = """
[2, 8: random_resized_crop(x[:, 0, 0])
[3,: strong(torch.rand(3, 8, 8))
[2, 2,: adjust_hue(x[:, :2], half[:2])
[2, 4,: color_jitter(torch.rand(2, 4, 8, 8))
[2, 3, 0,: weak(x[:, :, :0])
int64: two_views(x.long())
bool: random_grayscale(x > 0)
scale: random_resized_crop(x, scale=(0.5, 0.2))
ratio: random_resized_crop(x, ratio=(0, 1))
p: horizontal_flip(x, p=1.5)
padding: pad_crop(x, -1)
adjust_hue: color_jitter(x, hue=-0.1)
adjust_contrast: color_jitter(x, contrast=(2, 1))
shift: adjust_hue(x, half)
factor: adjust_brightness(x, half[:2, None])
box: resized_crop(x, half, half, half, half)
image_size: build("cnn", 2, image_size=36)
image_size: build("cnn", 2, image_size=232)
8x8: build("alexnet", 2, image_size=8)
64x64: build("maxvit_t", 2, image_size=64)
num_classes: build("cnn", 0)
projection: build("cnn", 2, 0)
std: build("cnn", 2, 8, (0.5,))
name: build(["M"], 2)
name: build([8, -1, "8"], 2)
int64: build("cnn", 2)(x.long())
[2, 1,: build("cnn", 2)(x[:, :1])
decay: update_ema(build("cnn", 2), build("cnn", 2), 1.5)
float32: recompute_batchnorm(build("cnn", 2), x)
z2: nt_xent(z, z[:3])
z2: nt_xent(z, z[:, :3])
z1: nt_xent(z[0], z[0])
z1: nt_xent(z[:0], z[:0])
kind: nt_xent(z, z, kind=y)
kind: nt_xent(z, z, kind=half)
temperature: nt_xent(z, z, 0)
temperature: nt_xent(z, z, math.nan)
temperature: local(z, index, bank, y[None], temperature=-0.1)
reduction: nt_xent(z, z, reduction="avg")
reduction: local(z, index, bank, y[None], reduction="SUM")
reduction: supervised(logits, onehot, reduction=None)
n: MemoryBank(0, 4)
dim: MemoryBank(4, -1)
momentum: MemoryBank(4, 4, 1.1)
z: bank.update(index, z[:, :4])
index: bank.update(index - 1, z)
index: bank.update(index + 16, z)
index: bank.update(index[:4], z)
index: neighbours(z, index - 1, bank, some, 3)
index: neighbours(z, index + 16, bank, some, 3)
index: local(z, index[:4], bank, y[None])
index: local(z, index - 1, bank, y[None], found)
z: neighbours(z[:, :5], index, bank, some, 3)
z: local(z[:0], index[:0], bank, y[None])
active: neighbours(z, index, bank, some[:3], 3)
k: neighbours(z, index, bank, some, 0)
every: neighbours(z, index, bank, some, 3, 0)
clusters: local(z, index, bank, y)
k: local(z, index, bank, y[None], 0)
background: local(z, index, bank, y[None], (found[0][:3], found[1]))
similarity: local(z, index, bank, y[None], (found[0], found[1][:3]))
k: kmeans(rows, 0)
x: kmeans(rows[:0], 2)
x: clusterings(rows, some & False, 2)
rows: clusterings(rows[0], some, 2)
repeats: clusterings(rows, some, 2, 0)
bank_rows: propagate_labels(rows[0], y, some)
labels: propagate_labels(rows, y - 2, some)
labels: propagate_labels(rows, y, some, balance=torch.ones(3))
labelled: propagate_labels(rows, y, y)
k: propagate_labels(rows, y, some, k=0)
density_k: propagate_labels(rows, y, some, density_k=-1)
units: one_hot(y, 3)
count: one_hot(y, 0)
onehot: supervised(logits, onehot[:4])
logits: supervised(logits[:0], onehot[:0])
active: supervised(logits, onehot, some)
named: propagation(half, half[:3], half)
confidence: propagation(half, half, index)
together: propagation(half.mean(), half.mean(), half.mean())
gradual: stage("grad", 0, 1, 10)
num_classes: stage("semi", 0, 1, 0)
known: stage("semi", 0, 1, 10, 11)
epoch: stage("self", 3, 3, 10)
budget: stage("semi", 0, 1, 10, 7, math.nan)
sparsity: stage("semi", 0, 1, 10, 7, 0.1, -0.1)
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_wrong_arguments_get_one_line_that_names_them(line):
    word, call = line.split(": ", 1)
    x, half, z, rows = torch.rand(2, 3, 8, 8), torch.rand(5), unit_rows(5, 8), unit_rows(20, 8)
    index, y, bank = torch.arange(5), torch.arange(20) % 4, filled_bank(20, 8)
    logits, onehot = z[:, :4], z[:, 4:]
    some, local = y > 0, losses.local_aggregation
    found = losses.neighbours(z, index, bank, some, 3)
    names = {**vars(augment), **vars(model), **vars(losses), **vars(curriculum), **locals()}
    with pytest.raises(ValueError, match=r"(?<!\w)" + re.escape(word) + r"[^\n]*$"):
        eval(call, names)


@pytest.fixture(scope="module")
def pictures():
    """Smooth images, noise, greys, black and white: float [24,3,32,32]."""
    noise = torch.rand(8, 3, 32, 32, generator=seeded())
    smooth = F.interpolate(torch.rand(8, 3, 4, 4, generator=seeded(1)), (32, 32), mode="bicubic").clamp(0, 1)
    grey = torch.rand(6, 1, 32, 32, generator=seeded(2)).expand(-1, 3, -1, -1)
    return torch.cat([noise, smooth, grey, torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_agrees_with_torchvision_image_by_image(pictures, name):
    low, high = (-0.5, 0.5) if name == "hue" else (0.0, 2.0)
    ours, theirs = (getattr(module, f"adjust_{name}") for module in (augment, TF))
    factor = torch.linspace(low, high, len(pictures))
    expected = torch.stack([theirs(x, f.item()) for x, f in zip(pictures, factor, strict=True)])
    assert_close(ours(pictures, factor), expected, atol=1e-4, rtol=0)


def test_crop_agrees_with_torchvision_image_by_image(pictures):
    n = len(pictures)
    height, width = (torch.randint(1, 33, (n,), generator=seeded(s)) for s in (3, 4))
    top = (torch.rand(n, generator=seeded(5)) * (33 - height)).long()
    left = (torch.rand(n, generator=seeded(6)) * (33 - width)).long()
    boxes = list(zip(pictures, *(t.tolist() for t in (top, left, height, width)), strict=True))
    expected = torch.stack([TF.resized_crop(x, *box, [32, 32], antialias=True) for x, *box in boxes])
    assert_close(augment.resized_crop(pictures, top, left, height, width), expected, atol=1e-4, rtol=0)


def test_grey_and_flip_agree_with_torchvision(pictures):
    assert_close(
        augment.random_grayscale(pictures, p=1.0), TF.rgb_to_grayscale(pictures, 3), atol=1e-5, rtol=0
    )
    assert torch.equal(augment.horizontal_flip(pictures, p=1.0), TF.hflip(pictures))
    assert torch.equal(augment.random_grayscale(pictures, p=0.0), pictures)


def test_color_jitter_with_fixed_ranges_is_torchvisions_in_sequence(pictures):
    ours = augment.color_jitter(pictures, (1.3, 1.3), (0.7, 0.7), (1.2, 1.2), (0.08, 0.08), p=1.0)
    theirs = TF.adjust_contrast(TF.adjust_brightness(pictures, 1.3), 0.7)
    theirs = TF.adjust_hue(TF.adjust_saturation(theirs, 1.2), 0.08)
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_pad_crop_shifts_by_whole_pixels_within_the_padding(pictures):
    x = pictures[:8].repeat(16, 1, 1, 1)
    shifts = set()
    for before, after in zip(x, augment.pad_crop(x, 2, seeded()), strict=True):
        padded = F.pad(before, (2,) * 4)
        corners = [(i, j) for i in range(5) for j in range(5)]
        places = [(i, j) for i, j in corners if torch.equal(after, padded[:, i : i + 32, j : j + 32])]
        assert places
        shifts.add(places[0])
    assert len(shifts) > 15  # of 25, in 128 draws


def test_random_transforms_are_independent_per_image_and_follow_the_generator(pictures):
    same = pictures[:1].repeat(64, 1, 1, 1)
    for transform in (augment.random_resized_crop, augment.color_jitter, augment.pad_crop, augment.strong):
        out = transform(same, generator=seeded(1))
        assert len(torch.unique(out.flatten(1), dim=0)) > 40, transform.__name__
        assert torch.equal(out, transform(same, generator=seeded(1)))
        assert not torch.equal(out, transform(same, generator=seeded(2)))
        assert out.min() >= 0 and out.max() <= 1 + 1e-6


def test_crop_area_and_aspect_are_those_of_torchvision():
    ramp = torch.arange(32.0).expand(4000, 1, 32, 32)  # a crop of width w has slope w / 32
    x = torch.cat([ramp, ramp.transpose(2, 3), ramp], 1)
    out = augment.random_resized_crop(x, scale=(0.2, 1.0), generator=seeded())
    width, height = 4 * (out[:, 0, 16, 20] - out[:, 0, 16, 12]), 4 * (out[:, 1, 20, 16] - out[:, 1, 12, 16])
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(x[0], [0.2, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(4000)]
    ours, theirs = torch.stack([height, width], 1).round().numpy(), np.array(theirs)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.4
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.4


def test_views_take_uint8_and_differ():
    x = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    a, b = augment.two_views(x, generator=seeded())
    assert a.shape == x.shape and a.dtype == torch.float32 and not torch.equal(a, b)
    assert torch.equal(augment.weak(x, flip=False, padding=0), x / 255)
    one, _ = augment.two_views(x, scale=(1.0, 1.0), flip=False, color=False)
    assert one.unique().numel() > 2


VIEWS = [augment.random_resized_crop, augment.horizontal_flip, augment.pad_crop, augment.color_jitter]
VIEWS += [augment.random_grayscale, augment.strong, augment.weak]
for name in ("brightness", "contrast", "saturation", "hue"):
    adjust = getattr(augment, f"adjust_{name}")
    VIEWS.append(lambda x, adjust=adjust: adjust(x, torch.linspace(0, 0.5, len(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(4, 3, 32, 32), (3, 1, 32, 32), (2, 3, 1, 1), (2, 1, 1, 9), (3, 3, 20, 48), (0, 3, 8, 8)]
)
def test_images_of_any_shape_layout_and_dtype_are_augmented_and_pass_gradients(shape, dtype):
    plain = torch.rand(shape, generator=seeded()).to(dtype)
    layouts = [plain, plain[:1].expand(shape) if len(plain) else plain]
    layouts += [plain.contiguous(memory_format=torch.channels_last)]
    for x in [*layouts, plain.transpose(2, 3).contiguous().transpose(2, 3)]:
        x = x.detach().requires_grad_()
        for view in VIEWS:
            torch.manual_seed(0)
            out = view(x)
            assert out.shape == x.shape and out.dtype == torch.float32
            assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(out, view(x))


DIMS = {"cnn": 128, "vgg-small": 256, "vgg11": 512, "vgg16": 512, "resnet18": 512, "mobilenet_v2": 1280}


@pytest.mark.parametrize("name, dim", DIMS.items())
def test_models_give_embedding_unit_projection_and_logits(name, dim):
    network = model.build(name, 7)
    h, z, logits = network(torch.rand(4, 3, 32, 32))
    assert h.shape == (4, dim) and z.shape == (4, 128) and logits.shape == (4, 7)
    assert_close(z.norm(dim=1), torch.ones(4))


def test_vgg16_is_configuration_d():
    network = model.build("vgg16", 10)
    convolutions = [m for m in network.encoder if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size, c.stride) for c in convolutions] == [((3, 3), (1, 1))] * 13
    assert round((sum(p.numel() for p in network.encoder.parameters()) + 512 * 10) / 1e6, 1) == 14.7


def test_torchvision_stem_keeps_the_resolution():
    encoder = model.build("resnet18", 3).encoder
    assert encoder.conv1.stride == (1, 1) and encoder.conv1.kernel_size == (3, 3)
    assert isinstance(encoder.maxpool, nn.Identity)
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        model.build("resnet-18", 3)
    with pytest.raises(ValueError, match="cannot take 32x32"):
        model.build("maxvit_t", 3)


@pytest.mark.parametrize("name", ["cnn", "vgg11", [8, "M", 8], "mobilenet_v3_small", "squeezenet1_1"])
def test_any_encoder_is_packed_and_loaded_without_drawing(name, tmp_path):
    network = model.build(name, 3, 16, mean=(0.1, 0.2, 0.3), image_size=40).eval()
    network.names, network.answering = ["a", None, "猫"], {"limit": 0.5, "h": torch.ones(2, 4).half()}
    torch.save(model.pack(network), tmp_path / "packed.pt")
    run = model.pack(network) | {"names": ["a"], "answering": None, "version": 9, "bank": 0}
    torch.save(run, tmp_path / "checkpoint.pt")
    before, x = torch.get_rng_state(), torch.rand(2, 3, 40, 40, generator=seeded())
    for file, names in (("packed.pt", network.names), ("checkpoint.pt", ["a"])):
        other = model.load(tmp_path / file)
        assert torch.equal(before, torch.get_rng_state()) and not other.training
        assert (other.names, other.spec, other.image_size) == (names, name, 40)
        assert (other.answering or {}).get("limit") == (0.5 if file == "packed.pt" else None)
        assert all(torch.equal(a, b) for a, b in zip(network(x), other(x), strict=True))


BAD_FILES = {
    "text": lambda good: b"not a network",
    "nothing": lambda good: b"",
    "torn": lambda good: good[: len(good) // 2],
    "one bit": lambda good: good[:5000] + bytes([good[5000] ^ 1]) + good[5001:],
    "weights alone": lambda good: {"head.weight": torch.zeros(3, 4)},
    "other weights": lambda good: model.pack(model.build("cnn", 2)) | {"ema": {}},
    "no size": lambda good: model.pack(model.build("cnn", 2)) | {"args": {"model": "cnn"}},
    "a list": lambda good: [1, 2],
}


@pytest.mark.parametrize("spoil", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_no_network_is_refused_in_one_line(spoil, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(model.pack(model.build("cnn", 2)), path)
    content = spoil(path.read_bytes())
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"net.pt: not a network[^\n]*$"):
        model.load(path)


@pytest.mark.parametrize("size", [8, 24, 40, 128, 224])
def test_encoders_take_images_of_the_size_they_are_built_for(size):
    for name in ("cnn", "vgg11", "resnet18"):
        network = model.build(name, 2, image_size=size).eval()
        assert network.image_size == size and network(torch.rand(2, 3, size, size))[0].isfinite().all()
    assert network.encoder.conv1.stride == ((2, 2) if size >= 128 else (1, 1))


@pytest.mark.parametrize("size, patch", [(32, 4), (56, 7), (128, 16), (136, 17), (224, 16)])
def test_a_vision_transformer_cuts_an_image_in_proportion(size, patch):
    encoder = VisionTransformer(size // 16 * 16, 16, 1, 2, 8, 8)
    model.adapt_stem(encoder, size)
    assert encoder.conv_proj.kernel_size == (patch, patch)
    assert encoder(torch.rand(1, 3, size, size)).shape == (1, 1000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_images_of_other_dtypes(dtype):
    network, x = model.build("cnn", 3).eval(), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    expected, other = network(x / 255), copy.deepcopy(network).to(dtype)
    half = (x / 255).to(dtype)
    for ours in (network(x), network(half), other(x / 255), other(half), other(x)):
        assert ours[1].dtype == ours[2].dtype == torch.float32
        for a, b in zip(ours, expected, strict=True):
            assert_close(a.float(), b, atol=0.1, rtol=0.1)
    assert model.compact(other).encoder[0].weight.dtype == dtype


def test_head_is_a_scaled_cosine():
    head = model.CosineHead(8, 3, scale=5.0)
    h = torch.randn(4, 8, generator=seeded())
    expected = 5 * F.cosine_similarity(h[:, None], head.weight[None], dim=2)
    assert_close(head(h), expected)
    assert_close(head(3 * h), expected)


def same_gradients(ours, expected, *leaves):
    assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (ours, expected)]
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "d, tau, kind", [(4, 0.5, "a"), (3, 0.1, "ab"), (16, 0.5, "abcdefg"), (5, 0.3, "abac")]
)
def test_nt_xent_is_its_definition_and_an_image_that_occurs_twice_is_no_negative_of_itself(d, tau, kind):
    n = len(kind)
    z1, z2 = (torch.randn(n, d, generator=seeded(s), dtype=torch.float64, requires_grad=True) for s in (0, 1))
    z, total = [v / v.norm() for v in [*z1, *z2]], 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k == j or kind[k % n] != kind[i % n]]
        total -= torch.log(torch.exp(z[i] @ z[j] / tau) / sum(torch.exp(z[i] @ z[k] / tau) for k in others))
    loss = losses.nt_xent(z1, z2, tau, kind=torch.tensor([ord(k) for k in kind]))
    same_gradients(loss, total / (2 * n), z1, z2)
    assert len(set(kind)) < n or torch.equal(loss, losses.nt_xent(z1, z2, tau))


@any_example
@given(st.integers(1, 24), st.integers(1, 16), st.floats(0.05, 2.0), st.floats(0.1, 10.0), seeds)
def test_nt_xent_is_symmetric_under_swapping_permuting_and_scaling(n, d, tau, scale, seed):
    z1, z2 = (torch.randn(n, d, generator=seeded(seed + i), dtype=torch.float64) for i in (0, 1))
    order = torch.randperm(n, generator=seeded(seed))
    loss = losses.nt_xent(z1, z2, tau)
    assert torch.isfinite(loss) and loss > -1e-5
    for other in ((z2, z1), (z1[order], z2[order]), (scale * z1, z2)):
        assert_close(losses.nt_xent(*other, tau), loss, atol=1e-4, rtol=1e-4)
    each = losses.nt_xent(z1, z2, tau, "none").view(2, n)
    assert_close(
        losses.nt_xent(z1[order], z2[order], tau, "none"), each[:, order].flatten(), atol=1e-4, rtol=1e-4
    )


def test_nt_xent_of_chance_and_of_equal_views():
    z1, z2 = unit_rows(256, 512, 0), unit_rows(256, 512, 1)
    assert abs(losses.nt_xent(z1, z2).item() - math.log(511)) < 0.05
    assert torch.isfinite(losses.nt_xent(z1, z1, 0.01))


def test_supervised_is_cross_entropy_over_the_active_units_and_ignores_the_rest():
    logits = torch.randn(6, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, 1, 1, 3, 4])
    active = torch.tensor([True, True, False, True, False])
    known = torch.tensor([True, True, False, True, True, False])
    onehot = F.one_hot(y, 5) * known[:, None]
    columns = active.nonzero()[:, 0].tolist()
    place = {c: i for i, c in enumerate(columns)}
    rows = [i for i in range(6) if known[i]]
    expected = F.cross_entropy(logits[rows][:, columns], torch.tensor([place[int(y[i])] for i in rows]))
    same_gradients(losses.supervised(logits, onehot, active), expected, logits)
    nothing = losses.supervised(logits, 0 * onehot, active)
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


def test_memory_bank_moves_by_its_momentum_and_averages_repeats():
    bank = losses.MemoryBank(5, 3, momentum=0.5)
    bank.update(torch.arange(5), 7 * unit_rows(5, 3, 0))
    assert_close(bank.rows, unit_rows(5, 3, 0))  # nothing is left of the zeros
    before = bank.rows.clone()
    z = unit_rows(3, 3, 1)
    bank.update(torch.tensor([1, 4, 1]), z)
    assert_close(bank.rows[4], F.normalize(0.5 * before[4] + 0.5 * z[1], dim=0))
    assert_close(bank.rows[1], F.normalize(0.5 * before[1] + 0.5 * (z[0] + z[2]) / 2, dim=0))
    assert torch.equal(bank.rows[[0, 2, 3]], before[[0, 2, 3]])
    assert_close(bank.rows.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("n, k, true", [(300, 5, 5), (1000, 25, 25), (2000, 100, 40), (10_000, 100, 100)])
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


def test_kmeans_with_fewer_rows_or_fewer_distinct_rows_than_clusters():
    index, centres = losses.kmeans(unit_rows(3, 4), 10, generator=seeded())
    assert sorted(index.tolist()) == [0, 1, 2] and len(centres) == 3
    for rows in (unit_rows(1, 4).repeat(90, 1), torch.zeros(90, 4), unit_rows(2, 4).repeat(45, 1)):
        same, centres = losses.kmeans(rows, 4, generator=seeded())
        assert torch.isfinite(centres).all() and len(same) == 90 and centres.shape == (4, 4)
        assert len(same.unique()) <= len(rows.unique(dim=0))
    for iterations in (0, 1):
        assert len(losses.kmeans(unit_rows(90, 4), 4, iterations)[1]) == 4


def naive_aggregation(z, index, rows, clusters, k, tau):
    values = []
    for v, i in zip(z, index.tolist(), strict=True):
        others = [j for j in range(len(rows)) if j != i and (clusters[:, j] >= 0).any()]
        if not others:
            values.append(0 * v.sum())
            continue
        near = sorted(others, key=lambda j: -float(rows[j] @ v.detach()))[:k]
        close = [j for j in near if any(c[j] == c[i] for c in clusters)] or near[:1]
        parts = [sum(torch.exp(rows[j] @ v / tau) for j in part) for part in (near, close)]
        values.append(torch.log(parts[0] / parts[1]))
    return torch.stack(values)


@pytest.mark.parametrize("n, b, k, repeats", [(1, 1, 4, 1), (6, 3, 20, 2), (40, 8, 10, 3), (90, 33, 25, 3)])
def test_local_aggregation_is_its_definition(n, b, k, repeats):
    rows = unit_rows(n, 8, 1, torch.float64)
    if n > 10:
        rows[3] = rows[5]  # a duplicate image
    clusters = torch.randint(4, (repeats, n), generator=seeded(2))
    clusters[:, n // 2 :: 5] = -1 if n > 6 else 0  # images that are not there yet
    present = (clusters[0] >= 0).nonzero()[:, 0]
    index = present[torch.randint(len(present), (b,), generator=seeded(3))]  # images repeat
    z = unit_rows(b, 8, 4, torch.float64).requires_grad_()
    bank = losses.MemoryBank(n, 8)
    bank.rows = rows.float()
    expected = naive_aggregation(z, index, rows, clusters, k, 0.2)
    ours = losses.local_aggregation(z, index, bank, clusters, k, 0.2, "none")
    assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, expected)]
    assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_of_a_large_bank_every_row_is_looked_at_in_its_turn():
    n, k, bank, z, index = 70, 5, filled_bank(70, 8), unit_rows(12, 8, 2), torch.arange(12)
    active = torch.arange(n) % 5 != 0
    for turn in range(5):
        near, similarity = losses.neighbours(z, index, bank, active, k, 4, turn)
        for i in range(len(z)):
            there = [j for j in range(turn % 4, n, 4) if active[j] and j != i]
            assert near[i].tolist() == sorted(there, key=lambda j: -float(z[i] @ bank.rows[j]))[:k]
        assert_close(similarity, (bank.rows[near] * z[:, None]).sum(2))
    assert (losses.neighbours(z, index, bank, active, 18, 4)[0] == -1).any()  # there are fewer active ones
    assert [losses.searched(n) for n in (100, 10_000, 50_000)] == [(16, 1), (64, 1), (64, 5)]


def naive_propagation(rows, y, labelled, k, density_k, tau, balance):
    n, known = len(rows), [i for i in range(len(rows)) if labelled[i]]
    pseudo, confidence = [], []
    density = {}
    for i in known:
        near = sorted((float(rows[i] @ rows[j]) for j in range(n) if j != i), reverse=True)[:density_k]
        density[i] = sum(math.exp(s / tau) for s in near) or 1.0
    for i in range(n):
        votes = {}
        for j in sorted(known, key=lambda j: -float(rows[i] @ rows[j]))[:k]:
            weight = math.exp(float(rows[i] @ rows[j]) / tau) / density[j]
            weight /= sum(int(y[other]) == int(y[j]) for other in known) if balance else 1
            votes[int(y[j])] = votes.get(int(y[j]), 0.0) + weight
        best = max(votes, key=votes.get) if votes else -1
        pseudo.append(int(y[i]) if labelled[i] else best)
        confidence.append(1.0 if labelled[i] else votes[best] / sum(votes.values()) if votes else 0.0)
    return torch.tensor(pseudo), torch.tensor(confidence)


@pytest.mark.parametrize(
    "n, count, k", [(5, 0, 10), (5, 1, 10), (30, 4, 10), (80, 25, 10), (80, 80, 3), (1, 1, 2)]
)
@pytest.mark.parametrize("balance", [False, True])
def test_propagated_labels_are_those_of_the_equations(n, count, k, balance):
    rows = unit_rows(n, 6, 5, torch.float64)
    y = torch.randint(3, (n,), generator=seeded(6)) * 2  # no image of class 1 or 3
    labelled = torch.zeros(n, dtype=torch.bool)
    labelled[torch.randperm(n, generator=seeded(7))[:count]] = True
    expected, share = naive_propagation(rows, y, labelled, k, 20, 0.1, balance)
    pseudo, confidence = losses.propagate_labels(rows.float(), y, labelled, k, 20, 0.1, balance)
    assert torch.equal(pseudo, expected)
    assert_close(confidence, share, atol=1e-4, rtol=1e-4)


def test_aligned_votes_come_as_often_as_expected():
    votes = torch.rand(500, 4, generator=seeded()) * torch.tensor([1, 5, 1, 2])
    votes, due = F.normalize(votes, p=1, dim=1), torch.tensor([2.0, 1.0, 1.0, 0.0])
    even, kept = losses.align(votes, due, rounds=100), votes[:, 3].mean()
    assert_close(
        even.mean(0), torch.stack([(1 - kept) / 2, (1 - kept) / 4, (1 - kept) / 4, kept]), atol=1e-4, rtol=0
    )
    odds = (even / votes) / (even / votes)[:, :1]  # one factor a class
    assert_close(odds, odds[:1].expand_as(odds), rtol=1e-4, atol=1e-4)
    assert not losses.align(votes * (due > 0), torch.ones(4)).isnan().any()  # nobody votes for the last


def test_expected_shares_bring_a_class_nearer_to_its_share():
    y = torch.arange(3).repeat_interleave(100)
    rows = F.normalize(torch.eye(3)[y] + 0.3 * torch.randn(300, 3, generator=seeded()), dim=1)
    labelled = torch.arange(300) % 20 == 0
    rows[labelled & (y == 2)] = F.normalize(torch.tensor([0.6, 0.6, 0.7]), dim=0)  # apart from their class
    taken, right = [], []
    for balance in (False, torch.ones(3)):
        pseudo, confidence = losses.propagate_labels(rows, y, labelled, temperature=0.1, balance=balance)
        assert torch.equal(pseudo[labelled], y[labelled]) and (confidence[labelled] == 1).all()
        taken.append(int((pseudo == 2).sum()))
        right.append((pseudo == y)[~labelled].float().mean().item())
    assert abs(taken[1] - 100) < 0.5 * abs(taken[0] - 100) and right[1] > right[0], (taken, right)


def test_chunks_change_nothing(monkeypatch):
    rows, y = unit_rows(200, 8, 8), torch.randint(4, (200,), generator=seeded())
    labelled, bank, results = torch.arange(200) % 7 == 0, filled_bank(200, 8), []
    for size in (losses.CHUNK_BYTES, 4 * 200 * 3):
        monkeypatch.setattr(losses, "CHUNK_BYTES", size)
        close = losses.local_aggregation(rows[:50], torch.arange(50), bank, y[None], reduction="none")
        results.append([*losses.propagate_labels(rows, y, labelled), close])
    for whole, parts in zip(*results, strict=True):
        assert_close(whole, parts)


def test_propagation_weighs_both_terms_by_confidence():
    n, b = 30, 6
    bank, z, index = filled_bank(n, 8), unit_rows(b, 8, 2), torch.arange(b)
    logits, pseudo = torch.randn(b, 3, generator=seeded(3)), torch.randint(3, (n,), generator=seeded(4))
    confidence = torch.rand(n, generator=seeded(5))
    named = losses.supervised(logits, F.one_hot(pseudo[:b], 3), reduction="none")
    expected = naive_aggregation(z.double(), index, bank.rows.double(), pseudo[None], 10, 0.07)
    expected = confidence[:b] * (expected + F.cross_entropy(logits, pseudo[:b], reduction="none"))
    for background in (10, losses.neighbours(z, index, bank, torch.ones(n, dtype=torch.bool), 10)):
        together = losses.local_aggregation(z, index, bank, pseudo[None], background, reduction="none")
        ours = losses.propagation(together, named, confidence[index], "none")
        assert_close(ours, expected.float())


def every_loss(dtype=torch.float32):
    """{name: function of reduction -> loss}, and the leaves that they depend on."""
    bank, index, y = filled_bank(40, 8), torch.arange(8), torch.arange(40) % 3
    leaves = [torch.randn(8, d, generator=seeded(d)).to(dtype).requires_grad_() for d in (8, 9, 3)]
    z1, z2, logits = leaves[0], leaves[1][:, 1:], leaves[2]

    def aggregation(reduction):
        return losses.local_aggregation(F.normalize(z1, dim=1), index, bank, y[None], 10, 0.1, reduction)

    def supervised(reduction):
        return losses.supervised(logits, losses.one_hot(y[:8], 3).to(dtype), y[:3] < 3, reduction)

    def propagation(reduction):
        return losses.propagation(aggregation("none").to(dtype), supervised("none"), z2[:, 0] ** 2, reduction)

    return [lambda r: losses.nt_xent(z1, z2, 0.2, r, y[:8]), aggregation, supervised, propagation], leaves


@pytest.mark.parametrize("number", range(4))
def test_losses_are_float32_inside_autocast_and_for_other_dtypes_and_reductions_agree(number):
    def run(dtype=torch.float32):
        functions, leaves = every_loss(dtype)
        loss = functions[number]("mean")
        return loss, *torch.autograd.grad(loss, leaves, materialize_grads=True)

    expected, function = run(), every_loss()[0][number]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for a, b in zip(run(dtype), expected, strict=True):
            assert a.dtype == (dtype if a.ndim else torch.float32)
            assert_close(a.float(), b, atol=0.05, rtol=0.1)
    assert_close(function("mean"), function("none").mean())
    assert_close(function("sum"), function("none").sum())


def test_bank_clusters_and_votes_are_float32_inside_autocast_and_for_other_dtypes():
    y, every, due = torch.arange(200) % 5, torch.ones(200, dtype=torch.bool), torch.tensor([1, 2, 3, 0, 1])

    def results(x):
        bank = losses.MemoryBank(200, 16)
        bank.update(torch.arange(200), x)
        near = losses.neighbours(x[:9], torch.arange(9), bank, every, 7)
        votes = losses.propagate_labels(x, y, y > 2, balance=due)
        return bank.rows, *near, *losses.kmeans(x, 4, generator=seeded()), *votes

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = unit_rows(200, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            ours = results(x)
        assert all(torch.equal(a, b) for a, b in zip(ours, results(x.float()), strict=True))


def test_an_image_without_a_kind_is_a_negative_of_everything():
    z1, z2 = unit_rows(6, 8, 1), unit_rows(6, 8, 2)
    kinds = [[4, -1, 4, -1, 7, -1], [4, 1, 4, 2, 7, 3], [-1] * 6, [-3] * 6]
    some, same, none, other = (losses.nt_xent(z1, z2, kind=torch.tensor(kind)) for kind in kinds)
    assert some == same and none == other == losses.nt_xent(z1, z2)


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
    assert stages[-1].classes == stages[-1].named == 10 and math.isclose(stages[-1].label_fraction, 0.1)
    for c in (8, 9, 10):  # one by one, images before labels
        images = next(e for e, s in enumerate(stages) if s.classes >= c)
        names = next(e for e, s in enumerate(stages) if s.named >= c)
        assert stages[images].classes == c and names >= images + 2


def test_the_help_of_the_curricula_draws_nothing(tmp_path):
    command = [sys.executable, HERE / "curriculum.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout and "ntxent" not in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_dead_filters_can_be_removed_without_a_trace(share, tmp_path):
    torch.manual_seed(0)
    network = model.build("vgg-small", 4)
    network.train()(torch.rand(16, 3, 32, 32))  # statistics that are not the initial ones
    for module in network.encoder:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    masks = grow_prune.prune_filters(network.encoder, share)
    small = model.compact(network.eval())
    widths = [m.out_channels for m in small.encoder if isinstance(m, nn.Conv2d)]
    alive = [int(mask.sum()) for name, mask in masks.items() if name.endswith("bias")]
    assert widths == [*alive, 256] and min(widths) >= 1 and sum(alive) == max(7, 704 - round(share * 704))
    x = torch.rand(8, 3, 32, 32)
    torch.save(model.pack(small), tmp_path / "small.pt")
    for other in (small, model.load(tmp_path / "small.pt")):
        for a, b in zip(network(x), other(x), strict=True):
            assert_close(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="plain chain"):
        grow_prune.prune_filters(nn.Sequential(nn.Linear(3, 3)) and network, share)
    with pytest.raises(ValueError, match="can be made compact"):
        model.compact(model.build("resnet18", 2))


def test_the_running_mean_follows_weights_and_statistics():
    a, b = (model.build("cnn", 2) for _ in range(2))
    b(torch.rand(4, 3, 32, 32))
    before = copy.deepcopy(a.state_dict())
    model.update_ema(a, b, 0.75)
    for key, value in before.items():
        if value.is_floating_point():
            assert_close(a.state_dict()[key], 0.75 * value + 0.25 * b.state_dict()[key])


def test_batch_norm_is_recomputed_and_nothing_changes_where_that_fails():
    network = model.build("cnn", 2)
    x = torch.randint(256, (600, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    first, before = network.encoder[1], copy.deepcopy(network.state_dict())
    network.encoder[4].eval()
    with pytest.raises(ValueError):
        model.recompute_batchnorm(network, x[:, :1])
    for few in (x[:0], x[:1]):
        model.recompute_batchnorm(network, few)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    model.recompute_batchnorm(network, x)
    assert network.training and not network.encoder[4].training and first.momentum == 0.1
    seen = [network.encoder[0]((part / 255 - network.mean) / network.std).detach() for part in x.chunk(2)]
    for ours, statistic in ((first.running_mean, torch.mean), (first.running_var, torch.var)):
        expected = sum(statistic(part, (0, 2, 3)) for part in seen) / 2
        assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v3_small", "vit_b_32"])
def test_the_weights_that_decay_are_those_that_may_be_pruned(name):
    network = model.build(name, 3)
    optimizer = model.configure_optimizer(network, 0.1)
    decays, rests = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    prunable = {id(w) for name, w in grow_prune.prunable(network).items() if not name.startswith("head.")}
    assert decays == prunable and decays | rests == {id(p) for p in network.parameters()}
    model.set_learning_rate(optimizer, 0.03)
    rates = [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [(5e-4, 0.03), (0.0, 0.03)]


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_a_gpu
def test_captured_steps_do_what_the_steps_do():
    """Of two equal networks one learns from captured steps: they stay together, and follow the rate."""
    n, device, ends = 2000, torch.device("cuda"), []
    x = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=seeded()).to(device)
    y, order = torch.arange(n, device=device) % 10, torch.randperm(n, generator=seeded(2)).to(device)
    for captured in (False, True):
        torch.manual_seed(0)
        network, bank = model.build("cnn", 10).to(device), losses.MemoryBank(n, 128, device=device)
        bank.rows, ema = unit_rows(n, 128).to(device), copy.deepcopy(network)
        optimizer, coins = model.configure_optimizer(network, 0.01), torch.Generator(device).manual_seed(3)

        def step(turn, index, network=network, ema=ema, bank=bank, optimizer=optimizer, coins=coins):
            _, z, logits = network(augment.strong(x[index], generator=coins))
            found = losses.neighbours(z, index, bank, y >= 0, 16, 2, turn)
            loss = losses.local_aggregation(z, index, bank, y[None], found)
            named = losses.supervised(logits, losses.one_hot(y[index], 10))
            loss = loss + named + losses.nt_xent(z, z.flip(0), kind=index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_ema(ema, network, 0.9)
            bank.update(index, z.detach())
            return loss.detach()

        steps, heard = [partial(step, 0), partial(step, 1)], []
        if captured:
            steps = model.capture(steps, optimizer, coins)
        for i in range(12):
            model.set_learning_rate(optimizer, 0.01 if i < 10 else 0.0)
            heard.append(steps[i % 2](order[64 * i : 64 * i + 64]).clone())
            if i == 9:
                held = network.encoder[0].weight.detach().clone()
        assert torch.equal(held, network.encoder[0].weight)  # nothing is learned at a rate of 0
        ends.append((torch.stack(heard), held, bank.rows, ema.head.weight.detach()))
    for plain, recorded in zip(*ends, strict=True):
        assert_close(plain, recorded, rtol=1e-2, atol=1e-3)


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
    data.write_atomically(tmp_path / "a.pt", data.torch_bytes({"version": 3}))
    assert data.read_checkpoint(tmp_path / "a.pt", 3) == {"version": 3}
    with pytest.raises(ValueError, match="has version 3, this program writes 4"):
        data.read_checkpoint(tmp_path / "a.pt", 4)
    data.write_atomically(tmp_path / "a.pt", b"torn")
    with pytest.raises(ValueError, match="a.pt is damaged"):
        data.read_checkpoint(tmp_path / "a.pt", 3)


# ---- the head: growing, naming, discovery; pruning ----
OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    torch.optim.AdamW,
    torch.optim.RMSprop,
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("kind", [nn.Linear, model.CosineHead])
def test_growth_and_recycling_leave_the_other_rows_and_their_next_updates_alone(make, kind):
    heads, y = [], torch.arange(15) % 5
    for changes in (False, True):
        torch.manual_seed(0)
        head = kind(6, 5)
        optimizer = make(head.parameters())
        for seed in range(5):
            if seed == 1 and changes:
                before = copy.deepcopy(head.state_dict())
                grow_prune.recycle_unit(head, optimizer, 4)
                grow_prune.grow_head(head, optimizer, 2)
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
        torch.testing.assert_close(changed[:4], plain[:4], rtol=1e-6, atol=1e-7)


def test_what_hangs_on_a_parameter_survives_growth():
    head, tied, seen, h = nn.Linear(4, 3), nn.Linear(4, 3), [], torch.ones(2, 4)
    weight = tied.weight = head.weight
    weight.mark = "kept"
    weight.register_hook(lambda grad: seen.append(grad.shape))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    head.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.5}, {"params": [head.bias]}], 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    alive = head(h).sum()  # a graph that outlives the growth
    head(h).sum().backward()
    grad = weight.grad.clone()
    grow_prune.grow_head(head, optimizer, 2)
    assert (
        head.weight is weight is tied.weight is optimizer.param_groups[0]["params"][0] and alive.requires_grad
    )
    assert weight.mark == "kept" and weight.requires_grad and not head.bias.requires_grad
    head(h).sum().backward()
    assert seen[2:] == [(5, 4), (5, 4)] and torch.equal(weight.grad, torch.cat([2 * grad, grad[:2]]))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]


class Scaled(nn.Linear):
    def __init__(self, *size):
        super().__init__(*size)
        self.sigma = nn.Parameter(torch.ones(1))  # has no row for each unit


@pytest.mark.parametrize("kind, bias", [(nn.Linear, True), (nn.Linear, False), (Scaled, True)])
@pytest.mark.parametrize("wrap", ["plain", "compiled", "parallel", "both"])
def test_heads_that_are_not_a_bare_linear_layer_grow_and_are_recycled(kind, bias, wrap):
    head = inner = kind(4, 3, bias)
    head = nn.DataParallel(head) if wrap in ("parallel", "both") else head
    head = torch.compile(head, backend="eager") if wrap in ("compiled", "both") else head
    h = torch.randn(5, 4, generator=seeded())
    before = head(h).detach()
    grow_prune.grow_head(head, None, 2)
    grow_prune.recycle_unit(head, None, 0)
    grow_prune.imprint(head, 4, h[:1], h[1:])
    torch.testing.assert_close(head(h)[:, 1:3], before[:, 1:])
    assert head(h).shape == (5, 5) == (5, inner.out_features) and not torch.equal(head(h)[:, 0], before[:, 0])


def spoiled(spoil, *args):
    layer = nn.Linear(2, 3)
    spoil(layer, *args)
    return layer


TWO, ROW, SOME, CONV = torch.eye(2), torch.ones(1, 2), torch.tensor([True, False]), nn.Conv2d(2, 2, 1)
REPARAMETRIZED = {
    "weight norm": lambda: spoiled(parametrizations.weight_norm),
    "old weight norm": lambda: spoiled(weight_norm),
    "pruned weight": lambda: spoiled(torch_prune.l1_unstructured, "weight", 2),
    "lazy": lambda: nn.LazyLinear(3),
}
ODD_HEADS = REPARAMETRIZED | {
    "pruned bias": lambda: spoiled(torch_prune.l1_unstructured, "bias", 1),
    "bilinear": lambda: nn.Bilinear(2, 2, 3),
    "sequence": lambda: nn.Sequential(nn.Linear(2, 3)),
    "wrapped": lambda: nn.DataParallel(nn.Conv2d(2, 3, 1)),
}
WRONG_HEADS = [
    (lambda: nn.Linear(2, 3), name, *args)
    for name, *args in [
        ("grow_head", None, 0),
        ("imprint", 3, ROW),
        ("imprint", -1, ROW),
        ("imprint", 0, ROW[:0]),
        ("imprint", 0, ROW[0]),
        ("imprint", 0, torch.ones(1, 3)),
        ("imprint", 0, ROW, torch.ones(4, 3)),
        ("imprint", 0, ROW, TWO, 1.5),
        ("imprint", 0, ROW, TWO, 0.1, SOME),
        ("prune_smallest", 1.1),
        ("prune_smallest", math.nan),
        ("prune", 0.5, 0.5, {}),
        ("prune", 0.5, 0.0, {"weight": torch.ones(4, 2)}),
        ("apply_masks", {"weight": torch.zeros(3, 2), "x": torch.ones(1)}),
    ]
]
WRONG_HEADS += [(lambda: TWO, "claim", TWO, torch.tensor([0, 1])), (lambda: TWO, "claim", TWO[:1], SOME)]
WRONG_HEADS += [(lambda: TWO, "claim", TWO, SOME, 0.0), (lambda: TWO, "threshold", torch.tensor([1, 1]))]
WRONG_HEADS += [(lambda: nn.Sequential(CONV, nn.Conv2d(2, 2, 1)), "prune_filters", 0.5)]
WRONG_HEADS += [(head, "prune_smallest", 0.5) for head in REPARAMETRIZED.values()]
for act in (("grow_head", None), ("recycle_unit", None, 0), ("imprint", 0, ROW)):
    WRONG_HEADS += [(head, *act) for head in ODD_HEADS.values()]
for make in (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Rprop):
    trained = nn.Linear(4, 3)
    trained(torch.ones(1, 4)).sum().backward()
    optimizer = make(trained.parameters())
    optimizer.step(lambda: 0.0)
    WRONG_HEADS += [(lambda head=trained: head, "grow_head", optimizer)]
    WRONG_HEADS += [(lambda head=trained: head, "recycle_unit", optimizer, 0)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, function, args", [(make, name, args) for make, name, *args in WRONG_HEADS])
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(make, function, args):
    head = make()
    before = str(vars(head))
    with pytest.raises(ValueError) as error:
        getattr(grow_prune, function)(head, *args)
    assert "\n" not in str(error.value) and str(vars(head)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_autocast_leave_the_arithmetic_in_float32(dtype):
    h, y, named = crowd(3, 40, 0, 2)
    for function in (
        lambda x: grow_prune.claim(x, x, named),
        lambda x: grow_prune.threshold(x, named),
        lambda x: grow_prune.resemblance(x, y),
        lambda x: grow_prune.two_means(x)[0],
        lambda x: grow_prune.discriminant(x[0], x[40:], y[40:]),
    ):
        expected = torch.as_tensor(function(h.to(dtype).float()))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(torch.as_tensor(function(h.to(dtype))), expected)
    head, units = nn.Linear(16, 3).to(dtype), grow_prune.Units(range(4))
    grow_prune.grow_head(head, None)
    grow_prune.recycle_unit(head, None, 0)
    grow_prune.imprint(head, 3, h[y == 2], h[y < 2])
    assert head.weight.dtype == dtype and (head(h[y < 2].to(dtype)).argmax(1) == 3).float().mean() < 0.05
    units.observe(torch.full((2, 4), 0.25, dtype=dtype))
    assert int(grow_prune.prune_smallest(head, 0.5)["weight"].sum()) == 32 == int((head.weight != 0).sum())


def test_an_imprinted_unit_is_the_mean_direction_and_leaves_the_others_what_is_theirs():
    torch.manual_seed(0)
    head, h, others = model.CosineHead(8, 4), torch.randn(5, 8) + 1, torch.randn(200, 8) + 1
    grow_prune.imprint(head, 3, h)
    mean = F.normalize(F.normalize(h, dim=1).mean(0), dim=0) * head.weight[:3].norm(dim=1).mean()
    torch.testing.assert_close(head.weight[3], mean)
    for tolerance in (0.0, 0.02, 0.5, 1.0):
        grow_prune.imprint(head, 3, h, others, tolerance)
        assert (head(others).argmax(1) == 3).float().mean() <= tolerance + 1 / 200 and not head.bias[:3].any()
    grow_prune.imprint(head, 3, h, others, 0.02, torch.arange(4) == 0)  # the others do not answer
    assert 0 < (head(others)[:, 3] > head(others)[:, 0]).float().mean() <= 0.02


def test_the_discriminant_is_that_of_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    others, own, kind = (
        torch.randn(90, 12, generator=seeded()),
        torch.linspace(-1, 1, 12),
        torch.arange(90) % 4,
    )
    others = others * torch.linspace(0.2, 3, 12) + kind[:, None]  # uneven spread around different means
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.8).fit(others.double().numpy(), kind)
    direction = np.linalg.solve(reference.covariance_, (own - others.mean(0)).double().numpy())
    np.testing.assert_allclose(grow_prune.discriminant(own, others, kind), direction, rtol=1e-4, atol=1e-5)
    assert grow_prune.discriminant(own, others[:1], kind[:1]).isfinite().all()  # one image has no covariance


def test_a_class_among_others_is_told_better_by_what_sets_it_apart():
    """All kinds vary along the same ten of forty directions, where the mean of five images points."""
    y, spread = torch.arange(5).repeat_interleave(200), torch.tensor([2.0] * 10 + [0.2] * 30)
    own = F.pad(torch.randn(5, 30, generator=seeded()) * 0.4, (10, 0))
    h, head = own[y] + torch.randn(1000, 40, generator=seeded(1)) * spread, model.CosineHead(40, 5)
    for c in range(4):
        grow_prune.imprint(head, c, h[y == c])
    right, others, new, mean = head(h)[:, :4].argmax(1) == y, h[y < 4][::4], y == 4, copy.deepcopy(head)
    grow_prune.imprint(head, 4, h[new][:5], others)
    grow_prune.imprint(mean, 4, h[new][:5])
    ahead = [mean(x)[:, 4] - mean(x)[:, :4].amax(1) for x in (others, h)]
    won, as_often = head(h).argmax(1) == 4, ahead[1] > ahead[0].quantile(0.97).clamp(min=0)
    assert won[new].float().mean() > as_often[new].float().mean() + 0.1 and won[right].float().mean() < 0.05


def test_units_are_recycled_before_the_head_grows_and_never_taken_from_a_name():
    head, units = model.CosineHead(5, 2), grow_prune.Units([7, 4])
    assert units.redundant() is None and units.allocate(head, None, UNNAMED) == (2, "grown")
    assert units.of_classes(9).tolist() == [-1, -1, -1, -1, 1, -1, -1, 0, -1] and head.out_features == 3
    assert units.in_use(torch.arange(9) == 4).tolist() == [False, True, True]
    for _ in range(600):
        units.observe(torch.tensor([[0.5, 0.5, 0.0]]))
    torch.testing.assert_close(units.utility, torch.tensor([0.5, 0.5, 0.0]), atol=0.01, rtol=0)
    assert units.redundant() is None  # too young
    units.age[2], units.given[2] = units.mature, "wolf"
    assert units.redundant() is None  # a person has named it
    units.given.clear()
    assert units.allocate(head, None, 3) == (2, "recycled") and (units.owner, units.age[2]) == ([7, 4, 3], 0)
    units.age, units.utility = [9] * 3, torch.zeros(3)
    assert units.redundant() is None  # all have a class


change = st.one_of(
    st.sampled_from([("step",), ("recycle",)]),
    st.tuples(st.just("grow"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["prune", "filters"]), fractions),
)


@any_example
@given(st.lists(change, max_size=12), seeds)
def test_growth_recycling_and_pruning_in_any_order_keep_their_invariants(todo, seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.Flatten()
    net = nn.Sequential(*layers, model.CosineHead(5, 2))
    head, units, masks, share = net[5], grow_prune.Units([0, 1]), {}, {"prune": 0.0, "filters": 0.0}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for action, *value in todo:
        rows = head.weight.detach().clone()
        rest = torch.arange(len(rows))
        if action == "step":  # its momentum moves what was pruned
            optimizer.zero_grad()
            F.cross_entropy(net(torch.randn(4, 3, 3, 3)), torch.arange(4) % len(rows)).backward()
            optimizer.step()
        elif action == "recycle":
            units.owner[-1] = FREE
            unit, how = units.allocate(head, optimizer, 7)
            rest = rest[rest != unit]
            assert how == "recycled"
        elif action == "grow":
            assert all(units.allocate(head, optimizer, UNNAMED)[1] == "grown" for _ in range(*value))
        else:
            share[action] = max(share[action], *value)
            before, masks = masks, grow_prune.prune(net, share["prune"], share["filters"], masks)
            gone = (masks[name][: len(mask)] & ~mask for name, mask in before.items())
            assert not any(mask.any() for mask in gone)  # what is pruned stays so
            weights = 256 + 5 * len(rows)
            assert round(grow_prune.sparsity_of(net) * weights) >= round(share["prune"] * weights)
            assert net[0].weight.any() or share["prune"] > 0.1  # filters alone never empty a layer
        if action in ("recycle", "grow"):
            assert torch.equal(head.weight[rest], rows[rest])
        grow_prune.apply_masks(net, masks)
        assert (
            len(head.weight) == len(head.bias) == head.out_features == len(units.owner) == len(units.utility)
        )
        assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())
        assert all(not net.get_parameter(name)[: len(m)][~m].any() for name, m in masks.items())


def test_the_smallest_weights_go_exactly_and_filters_whole():
    encoder = model.build("cnn", 2).encoder.eval()
    sizes = torch.cat([p.detach().abs().flatten() for p in grow_prune.prunable(encoder).values()])
    first = grow_prune.prune_smallest(encoder, 0.37)
    kept = torch.cat([mask.flatten() for mask in first.values()])
    assert int((~kept).sum()) == round(0.37 * len(kept)) and sizes[~kept].max() <= sizes[kept].min()
    assert math.isclose(grow_prune.sparsity_of(encoder), 0.37, abs_tol=1e-4)
    nn.init.ones_(encoder[0].weight)  # revived
    grow_prune.prune(encoder, 0.1, 0.0, first)
    assert torch.equal(encoder[0].weight != 0, first["0.weight"])
    masks, x = grow_prune.prune_filters(encoder, 1.0), torch.rand(2, 3, 32, 32)
    norms = [masks[f"{norm}.bias"] for _, norm in grow_prune.filter_layers(encoder)]
    assert all(norm.sum() == 1 for norm in norms)  # each layer keeps its largest
    assert not encoder[1](encoder[0](x))[:, ~norms[0]].any()


def test_what_may_be_pruned_is_weights_of_layers_only():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    net.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
    net.heads, net.wide = nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 1, kdim=2)
    net[4].weight = net[3].weight  # a tied weight counts once and is masked under either name
    names = {"0.weight", "3.weight", "heads.in_proj_weight", "heads.out_proj.weight", "wide.out_proj.weight"}
    masks = grow_prune.prune_smallest(net, 0.9)
    grow_prune.apply_masks(net, masks | {"4.weight": masks["3.weight"]})
    assert set(masks) == names and (net.layer_scale == 1e-6).all()
    assert grow_prune.prune_smallest(net[1], 0.5) == {} and grow_prune.sparsity_of(nn.ReLU()) == 0


@pytest.mark.parametrize("n, m", [(1, 2), (7, 30), (1500, 40)])
def test_claims_are_their_definition_and_the_threshold_leaves_the_own_label_out(n, m):
    h, pool_h = torch.randn(n, 5, generator=seeded()), torch.randn(m, 5, generator=seeded(1))
    named, names = torch.arange(m) % 3 == 0, range(0, m, 3)

    def claimed(x, without=None):
        kernel = [math.exp((F.cosine_similarity(x, row, dim=0).item() - 1) / 0.2) for row in pool_h]
        return sum(kernel[j] for j in names if j != without) / len(names) / (sum(kernel) / m)

    ask = range(0, n, max(1, n // 7))
    claims, expected = (
        grow_prune.claim(h, pool_h, named)[list(ask)],
        torch.tensor([claimed(h[i]) for i in ask]),
    )
    torch.testing.assert_close(claims, expected, rtol=1e-4, atol=1e-5)
    left = torch.tensor([claimed(pool_h[j], j) for j in names]).quantile(0.3) if len(names) > 1 else -math.inf
    assert math.isclose(grow_prune.threshold(pool_h, named, 0.3), left, rel_tol=1e-3, abs_tol=1e-4)


def test_resemblance_is_to_the_others_of_a_class():
    h, y = F.normalize(torch.randn(41, 5, generator=seeded()), dim=1), torch.tensor([*range(4)] * 10 + [4])
    others = [h[(y == y[i]) & (torch.arange(41) != i)].mean(0) for i in range(40)]  # the last one is alone
    expected = F.cosine_similarity(h[:40], torch.stack(others)).quantile(0.25)
    assert math.isclose(grow_prune.resemblance(h, y), expected, rel_tol=1e-4)
    assert grow_prune.resemblance(h[:4], y[:4]) == 1  # one of each


def crowd(classes, size, seed, named):
    """Embeddings [classes * size, 16] around a direction a class, classes, labels of a tenth of `named`."""
    y = torch.arange(classes).repeat_interleave(size)
    h = 3 * torch.eye(16)[y] + 0.5 * torch.randn(len(y), 16, generator=seeded(seed))
    return h, y, (torch.rand(len(y), generator=seeded(seed + 100)) < 0.1) & (y < named)


def looks(named, times, classes=5, size=150, **options):
    """What a monitor finds in `times` looks at the same images, which move a little from look to look."""
    found, labelled = [], crowd(classes, size, 0, named)[2]
    monitor, index = grow_prune.ConfusionMonitor(len(labelled), **options), (~labelled).nonzero()[:, 0]
    for look in range(times):
        h, y, _ = crowd(classes, size, look, named)
        claims, limit = grow_prune.claim(h[index], h, labelled), grow_prune.threshold(h, labelled)
        group = monitor.find_concept(index, claims, limit, h[index], h[labelled], y[labelled])
        found += [] if group is None else [(look, y[index[group]])]
    return found


def test_a_kind_that_nobody_names_is_found_after_some_looks_and_none_else():
    found = looks(named=4, times=9, patience=3, cooldown=4)
    assert [look for look, _ in found] == [2, 7]  # in the third look, and again after four without another
    assert all((y == 4).float().mean() > 0.95 and len(y) > 40 for _, y in found)
    assert not looks(named=5, times=12) and not looks(named=0, times=5)  # all named; before the first label
    assert not looks(named=4, times=5, at_least=2) and not looks(named=4, times=5, size=15)  # too few


def nameless(kinds=5, units=4, wrap=None, truth=True):
    """A manager, its pool, and embeddings: classes 0 to 3 have some labels, kinds from 4 on have none."""
    h, y, labelled = crowd(kinds, 150, 0, 4)
    torch.manual_seed(0)
    h, network, head = F.normalize(h, dim=1), nn.Module(), model.CosineHead(16, units)
    for c in range(4):  # a head that knows its classes
        grow_prune.imprint(head, c, h[y == c])
    network.head = wrap(head) if wrap else head
    networks = network, copy.deepcopy(network), torch.optim.SGD(network.parameters(), 0.1)
    told, watched, taught = torch.where((y < 4) | truth, y, -1), torch.arange(len(y)), torch.arange(kinds) < 4
    manager = grow_prune.HeadManager(networks, lambda n, i: h[i], told, watched, "abcdefg", range(units))
    manager.monitor.patience, manager.monitor.cooldown = 1, 0
    pool = {"active": y >= 0, "labelled": labelled, "labelled_before": labelled, "taught": taught}
    return manager, SimpleNamespace(taught_before=taught, **pool), h, y


def open_by_hand(manager, pool, *groups):
    """Units without a name for groups of images (bool [N])."""
    units = []
    for group in groups:
        units.append(manager.open_unit(pool, UNNAMED, group.nonzero()[:, 0])[0])
        manager.monitor.concept[group] = units[-1]
    return units


def happened(manager):
    return [event["event"] for event in manager.events]


def review(manager, pool, h, y):
    """Merge and split; the units of the images of each nameless kind."""
    manager.review_units(pool, (y < 4).nonzero()[:, 0], h)
    return [manager.monitor.concept[y == kind].unique().tolist() for kind in range(4, int(y.max()) + 1)]


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("wrap", [None, nn.DataParallel, nn.Module.half, nn.Module.double])
def test_every_nameless_kind_gets_a_unit_and_no_named_one_does(wrap, truth):
    manager, pool, h, y = nameless(6, wrap=wrap, truth=truth)
    with torch.autocast("cpu", torch.bfloat16):
        votes = [manager.discover(pool, h) for _ in range(4)][-1]
        best = manager.predict(h, pool.taught)[0]
    assert manager.units.owner == [0, 1, 2, 3, UNNAMED, UNNAMED] and happened(manager) == ["opened"] * 2
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


def test_a_unit_is_provisional_while_labels_leak_and_released_when_labels_claim_it():
    manager, pool, h, y = nameless()
    pool.labelled_before = pool.labelled & (torch.arange(750) % 4 > 0)
    for _ in range(2):
        votes = manager.discover(pool, h)
        assert manager.units.unnamed() == [4] and (votes[manager.monitor.concept == 4] == UNKNOWN).all()
    pool.labelled_before = pool.labelled
    votes = manager.discover(pool, h)
    assert happened(manager) == ["opened", "released", "opened"] and (y[votes == 4] == 4).sum() > 40
    pool.labelled = pool.labelled_before = pool.labelled | ((y == 4) & (torch.arange(750) % 8 == 0))
    votes = manager.discover(pool, h)
    assert manager.units.owner[4] == FREE and happened(manager)[3:] == ["released"]
    assert not (manager.monitor.concept == 4).any() and not (votes == 4).any()
    assert manager.open_unit(pool, UNNAMED, torch.tensor([700])) == (4, "recycled")


@pytest.mark.parametrize("idle", [False, True])
def test_units_of_one_kind_are_merged_and_one_of_two_kinds_is_split(idle):
    manager, pool, h, y = nameless(6)
    part = torch.arange(len(y)) % 3 == 0
    small, large = open_by_hand(manager, pool, part & (y == 4), ~part & (y == 4))
    manager.given |= {small: "dog", large: "wolf"}  # a person tells them apart
    assert review(manager, pool, h, y)[0] == [small, large] and not happened(manager)
    manager.given.clear()
    assert review(manager, pool, h, y)[0] == [large] and happened(manager) == ["merged"]
    assert manager.units.owner[small:] == [FREE, UNNAMED]
    manager.release(large)
    assert not (manager.monitor.concept >= 0).any()
    manager, pool, h, y = nameless(6)
    (unit,) = open_by_hand(manager, pool, y > 3)
    if idle:  # it may be used again, but not for a half of itself
        manager.units.age[unit], manager.units.utility[unit] = 9, 0.0
    kinds = review(manager, pool, h, y)
    assert sorted(kinds) == [[4], [5]] and happened(manager) == ["split"]
    best = manager.predict(h, pool.taught)[0]
    assert all((best[y == kind] == kinds[kind - 4][0]).float().mean() > 0.9 for kind in (4, 5))


def test_a_persons_name_survives():
    manager, pool, h, y = nameless(7)
    part = torch.arange(len(y)) % 5 == 0
    wolf, rest, two = open_by_hand(manager, pool, part & (y == 4), ~part & (y == 4), y > 4)
    manager.given |= {wolf: "wolf", two: "pack"}
    manager.units.age, manager.units.utility = [9] * 7, torch.zeros(7)
    assert manager.units.redundant() == rest
    # It is neither merged away, though the smaller, nor split, nor released when labels claim its images.
    assert review(manager, pool, h, y) == [[wolf], [two], [two]] and happened(manager) == ["merged"]
    pool.labelled = pool.labelled_before = pool.labelled | ((y == 4) & (torch.arange(len(y)) % 8 == 0))
    manager.discover(pool, h)
    again = nameless(7, units=7)[0]
    again.load_state_dict(manager.state_dict())
    manager.log("arrived")
    manager.monitor.concept.fill_(-1)
    assert [again.names(pool.taught)[unit] for unit in (0, wolf, two)] == ["a", "wolf", "pack"]
    assert again.units.owner[wolf] == again.units.owner[two] == UNNAMED and again.units.redundant() is None
    assert again.events == manager.events[:-1] and (again.monitor.concept == two).any()  # its own copies


@pytest.mark.parametrize("units", [4, 5])  # is there one for the class from the start?
@pytest.mark.parametrize("found", [True, False])  # is there one without a name for its images?
def test_the_first_labels_name_the_unit_that_was_opened_for_what_they_label(found, units):
    manager, pool, h, y = nameless(units=units)
    (unit,) = open_by_hand(manager, pool, y == 4) if found else [4]
    place, known, learner = torch.arange(750), pool.labelled, manager.network.head.weight.clone()
    fifth, own = (y == 4) & (place % 20 == 0), (y == 4) & (place % 20 == 1)
    pool.labelled, pool.taught = known | fifth, torch.ones(5) > 0
    manager.name_class(pool, 4, torch.where(own & found, unit, -1))
    assert manager.units.owner == [0, 1, 2, 3, *[FREE] * (units - 4) * found, 4]
    assert happened(manager) == (["released"] * (units - 4) + ["named"] if found else ["grown"] * (5 - units))
    assert (manager.predict(h, pool.taught)[1] == y).float().mean() > 0.9
    # It points at what it stood for and what has its name, away from the others; the learner is left alone.
    towards = grow_prune.discriminant(h[fifth | own & found].mean(0), h[known], y[known])
    assert F.cosine_similarity(manager.ema.head.weight[unit], towards, dim=0) > 0.9999
    assert not found or torch.equal(manager.network.head.weight, learner)


# ---- evaluate ----
try:
    import train
except Exception:  # not written yet
    train = types.ModuleType("train")
    vars(train).update(VERSION=7, data=data, model=model, grow_prune=grow_prune)
    sys.modules["train"] = train


def refused(capsys, main, args):
    """The one line with which `main` refuses these arguments."""
    assert main([str(a) for a in args]) == 2
    message = capsys.readouterr().err
    assert message.split()[1] == "error:" and len(message.splitlines()) == 1
    return message


@pytest.fixture(scope="module")
def blobs():
    centres = torch.randn(4, 10, generator=seeded()) * 1.2
    y = torch.arange(400) % 4
    return centres[y] + torch.randn(400, 10, generator=seeded(1)), y


def test_probe_is_scikit_learns_logistic_regression(blobs):
    from sklearn.linear_model import LogisticRegression

    h, y = blobs
    a, b = h[:200], h[200:]
    scaled, test = (a - a.mean(0)) / a.std(0, correction=0), (b - a.mean(0)) / a.std(0, correction=0)
    reference = LogisticRegression(C=1 / (2 * 1e-3 * 200), max_iter=1000).fit(scaled.numpy(), y[:200].numpy())
    expected = reference.score(test.numpy(), y[200:].numpy())
    assert (
        0.5 < expected < 1 and abs(evaluate.linear_probe(a, y[:200], b, y[200:], l2=1e-3) - expected) <= 0.005
    )


def test_knn_is_scikit_learns(blobs):
    from sklearn.neighbors import KNeighborsClassifier

    h, y = blobs
    unit = F.normalize(h, dim=1).numpy()
    reference = KNeighborsClassifier(15, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1))
    expected = reference.fit(unit[:200], y[:200].numpy()).score(unit[200:], y[200:].numpy())
    assert math.isclose(
        evaluate.knn_accuracy(h[:200], y[:200], h[200:], y[200:], k=15), expected, abs_tol=1e-6
    )


def test_cluster_scores_of_perfect_permuted_and_random_clusters():
    y = torch.arange(90) % 3
    perfect = evaluate.cluster_scores(
        torch.eye(3)[(y + 1) % 3] + 0.01 * torch.rand(90, 3, generator=seeded()), y
    )
    assert (
        perfect["ari"] == perfect["accuracy"] == 1.0
        and perfect["nmi"] > 0.999
        and perfect["silhouette"] > 0.9
    )
    h, y = torch.randn(300, 8, generator=seeded()), torch.randint(3, (300,), generator=seeded(1))
    assert (
        abs(evaluate.cluster_scores(h, y)["ari"]) < 0.05 and evaluate.cluster_scores(h, y)["accuracy"] < 0.5
    )


def test_forgetting_and_novelty():
    assert evaluate.forgetting([[0.5, 0.0], [0.9, 0.4], [0.7, 0.6]]).tolist() == pytest.approx([0.2, 0.0])
    assert evaluate.forgetting([[0.5, math.nan], [0.4, math.nan]])[0] == pytest.approx(0.1)
    assert (
        evaluate.novelty_auroc(torch.tensor([0.1, 0.2, 0.9, 0.8]), torch.tensor([0, 0, 1, 1]).bool()) == 1.0
    )
    assert evaluate.class_accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2) == [0.5, 1.0]


def test_what_is_told_of_an_epoch_is_counted():
    predicted, y = torch.tensor([0, 1, 1, 2, 2, 0]), torch.tensor([0, 1, 0, 2, 2, 2])
    assert list(evaluate.epoch_accuracy(predicted, y, 2).values()) == pytest.approx([4 / 6, 2 / 3, 2 / 3])
    assert evaluate.epoch_accuracy(predicted, y, 3)["new_accuracy"] is None
    assert evaluate.accuracy_by_class(predicted, y, ["a", "b", "c"])["accuracy_a"] == 0.5
    claims, flags = torch.tensor([0.9, 0.8, 0.1, 0.05, 0.2]), torch.tensor([1, 1, 1, 0, 0]).bool()
    no, right = torch.zeros(5, dtype=torch.bool), torch.tensor([1, 0, 1, 0, 0]).bool()
    figures = evaluate.open_set(claims, 0.15, no, right, flags, ~no)  # right, unknown found, AUROC
    assert list(figures.values()) == pytest.approx([0.4, 0.5, 5 / 6])
    assert evaluate.open_set(claims, 0.15, no, right, ~no, ~no)["novelty_auroc"] is None
    quality = evaluate.pseudo_label_quality(predicted, torch.tensor([0.9, 0.7, 0.9, 1, 0, 0]), y, y < 2)
    assert list(quality.values()) == pytest.approx([2 / 3, 2 / 3, 1 / 2])


def test_embedding_leaves_the_network_as_it_was_and_checks_what_it_gets():
    network = model.build("cnn", 3).train()
    network.encoder[1].eval()  # a frozen layer among others
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    h = evaluate.embed(network, x, batch_size=4)
    assert h.shape == (9, 128) and h.dtype == torch.float32
    torch.testing.assert_close(evaluate.embed(network, x / 255), h)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(evaluate.embed(network, x), h)
    for images, part, words in (
        (x, "logit", "part is one of"),
        (x[..., :16, :16], "h", "9, 3, 16, 16"),
        (x[:, :1], "h", "9, 1, 32, 32"),
        (x.long(), "h", "int64"),
        (x[:0], "h", "x has 0 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate.embed(network, images, part)
    network.head.forward = lambda h: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate.embed(network, x)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize("seed", range(6))
def test_gcd_accuracy_is_one_match_over_all(seed):
    unit = torch.randint(-1, 4, (40,), generator=seeded(seed))
    y = torch.where(torch.rand(40, generator=seeded(seed)) < 0.6, (unit * 2 + 1) % 3, torch.arange(40) % 3)
    pairs = [torch.tensor([*match, 9])[unit] == y for match in permutations([0, 1, 2, -2], 4)]
    best = max(pairs, key=lambda right: int(right.sum()))
    no_truth = torch.full_like(y, -1)
    found = evaluate.gcd_accuracy(unit.repeat(2), torch.cat([y, no_truth]), (y == 2).repeat(2))
    assert found["gcd_all"] == pytest.approx(best.float().mean().item())
    assert set(evaluate.gcd_accuracy(unit, no_truth, y == 2).values()) == {None}
    spare = evaluate.gcd_accuracy(
        torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1]), torch.arange(4) == 3
    )
    assert list(spare.values()) == pytest.approx([0.75, 2 / 3, 1.0])


def test_semi_supervised_kmeans_holds_the_labelled_and_finds_the_rest():
    y, at = torch.arange(300) % 5, torch.arange(300)
    h = F.normalize(torch.randn(5, 16, generator=seeded()), dim=1)[y] + 0.1 * torch.randn(
        300, 16, generator=seeded(1)
    )
    labelled, told = (
        (y < 3) & (at < 60),
        torch.where(at < 3, (y + 1) % 3, y),
    )  # three labels that contradict h
    clusters = evaluate.semi_kmeans(h, told, labelled, 5)
    assert torch.equal(clusters[labelled], told[labelled])
    assert torch.equal(clusters[~labelled & (y < 3)], y[~labelled & (y < 3)])
    assert min(evaluate.gcd_accuracy(clusters[~labelled], y[~labelled], y[~labelled] > 2).values()) == 1.0
    for k in (0, 2, 400):
        with pytest.raises(ValueError, match=f"k is {k}"):
            evaluate.semi_kmeans(h, y, labelled, k)
    figures = evaluate.open_world(h, y, labelled, y > 2)
    assert set(figures) == {
        f"gcd_{k}_{part}" for k in ("kmeans", "semi_kmeans") for part in ("all", "old", "new")
    }
    assert min(figures.values()) > 0.95 and evaluate.open_world(h, y, y >= 0, y > 2) == {}


def test_concepts_are_true_where_they_are_the_best_unit_of_a_nameless_class():
    unit, y = torch.tensor([7, 7, 7, 8, 8, 9, 3, -1, 7]), torch.tensor([5, 5, 4, 6, 6, 5, 4, 6, -1])
    scores = evaluate.concept_scores(unit, y, [7, 8, 9, 12], [4, 5, 6])
    assert (
        scores["concepts"] == 4 and scores["concepts_true"] == 2
    )  # 4 is nobody's largest part, 9 not the best of 5
    assert scores["purity"] == {7: pytest.approx(2 / 3), 8: 1.0, 9: 1.0, 12: None}
    assert evaluate.concept_scores(unit[:0], y[:0], [], [5])["concepts_true"] == 0


def test_temperature_and_calibration_error_are_their_definitions():
    logits, expected = 4 * torch.randn(4000, 5, generator=seeded()), 0.0
    y = torch.multinomial((logits / 2.5).softmax(1), 1, generator=seeded(1))[:, 0]
    closed = torch.cat([logits, torch.full((4000, 1), -math.inf)], 1)  # a unit that is not in use
    assert evaluate.fit_temperature(closed, y) == pytest.approx(2.5, rel=0.1)
    confidence, best = logits.softmax(1).max(1)
    for low in torch.arange(15) / 15:
        among = (confidence > low) & (confidence <= low + 1 / 15)
        if among.any():
            gap = (best == y)[among].float().mean() - confidence[among].mean()
            expected += float(among.float().mean() * gap.abs())
    assert evaluate.calibration_error(confidence, best == y) == pytest.approx(expected, abs=1e-4)
    assert evaluate.calibration_error((logits / 2.5).softmax(1).max(1).values, best == y) < expected / 4


WRONG_FIGURES = {
    "train_h has 0": lambda h, y: evaluate.linear_probe(h[:0], y[:0], h, y),
    "test_y has 3": lambda h, y: evaluate.knn_accuracy(h, y, h, y[:3]),
    "train_y is negative": lambda h, y: evaluate.linear_probe(h, y - 1, h, y),
    "k must be at least 1": lambda h, y: evaluate.knn_accuracy(h, y, h, y, k=0),
    "h has 0 rows": lambda h, y: evaluate.cluster_scores(h[:0], y[:0]),
    "y has 3 rows": lambda h, y: evaluate.class_accuracy(y, y[:3], 4),
    "accuracy has no": lambda h, y: evaluate.forgetting([]),
    "is_new must": lambda h, y: evaluate.novelty_auroc(h[:, 0], y < 9),
    "new has 3 rows": lambda h, y: evaluate.gcd_accuracy(y, y, y[:3] > 0),
    "labelled has 3": lambda h, y: evaluate.semi_kmeans(h, y, y[:3] > 0, 4),
    "bins must be": lambda h, y: evaluate.calibration_error(h[:, 0], y > 0, 0),
    "logits has 0": lambda h, y: evaluate.fit_temperature(h[:0], y[:0]),
    "method is one of pca": lambda h, y: evaluate.project(h, "lda"),
    "confidence has 3": lambda h, y: evaluate.mistake_rows(h, y, h[:3, 0], y, "abcd"),
}


@pytest.mark.parametrize("words, call", WRONG_FIGURES.items(), ids=WRONG_FIGURES)
def test_wrong_arguments_are_named(blobs, words, call):
    with pytest.raises(ValueError, match=words):
        call(*blobs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_figures_are_those_of_float32_whatever_comes_in_or_surrounds(blobs, dtype):
    (h, y), few = blobs, torch.arange(400) < 100
    h = (4 * h).round() / 4  # the same in all types

    def figures(h):
        half = h[:200], y[:200], h[200:], y[200:]
        found = [
            evaluate.linear_probe(*half, l2=1e-3),
            evaluate.knn_accuracy(*half),
            evaluate.cluster_scores(h, y),
        ]
        found += [evaluate.novelty_auroc(h[:, 0], y > 1), evaluate.fit_temperature(h[:, :4], y)]
        found += [evaluate.calibration_error(h[:, 0].abs() / 32, y > 1), evaluate.project(h, "pca").tolist()]
        return found + evaluate.semi_kmeans(h, y, few, 4).tolist()

    with torch.autocast("cpu", torch.bfloat16):
        assert figures(h.to(dtype)) == figures(h)
    assert figures(h.requires_grad_()) == figures(h.detach())


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """A run folder with a network that knows two kinds of image by their colour and has found a third."""
    folder = tmp_path_factory.mktemp("answering")
    torch.manual_seed(0)
    colours = torch.tensor([[230.0, 30, 30], [30, 230, 30], [30, 30, 230]]).repeat_interleave(12, 0)
    x = (colours[:, :, None, None] + 20 * torch.rand(36, 3, 32, 32)).byte()
    network = model.build("cnn", 4)
    network(x.float() / 255)  # batch norm statistics
    h = F.normalize(evaluate.embed(network.eval(), x), dim=1)
    with torch.no_grad():
        network.head.weight[:3] = torch.stack([part.mean(0) for part in h.split(12)])
    told = {
        "h": h.half(),
        "labelled": torch.arange(36) < 24,
        "limit": 0.5,
        "temperature": 2.0,
        "unnamed": [2],
    }
    checkpoint = model.pack(network) | {"names": ["red", "green", None, None], "answering": told, "given": {}}
    torch.save(
        checkpoint | {"version": train.VERSION, "units": {"owner": [0, 1, -1, -2]}}, folder / "checkpoint.pt"
    )
    return folder, x


def test_answers_are_names_units_and_unknown(answering):
    folder, x = answering
    network = model.load(folder / "checkpoint.pt")
    said = evaluate.answers(network, x, batch_size=7)
    assert said["answer"] == ["red"] * 12 + ["green"] * 12 + ["unit 2"] * 12
    assert said["unit"].tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert all(c > 0.5 for c in said["claim"][:24]) and all(c < 0.5 for c in said["claim"][24:])
    confidence = (
        (evaluate.embed(network, x, "logits")[:, :3] / 2.0).softmax(1).max(1).values
    )  # the free unit is out
    torch.testing.assert_close(said["confidence"], confidence, atol=0.02, rtol=0)
    network.answering["limit"] = 1.1 * float(said["claim"].max())
    assert evaluate.answers(network, x)["answer"] == ["unknown"] * 24 + ["unit 2"] * 12
    network.names, network.answering = [None] * 4, None
    with pytest.raises(ValueError, match="no unit with a name"):
        evaluate.answers(network, x)


def test_files_are_answered_in_order_and_none_is_lost(answering, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures/a, b").mkdir(parents=True)
    for i, image in enumerate(answering[1][::6]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 32)).save(f"pictures/a, b/猫_{i}.png")
    Path("pictures/torn.png").write_bytes(b"torn")
    command = [
        str(answering[0]),
        "--predict",
        "pictures",
        "pictures/a, b/猫_0.png",
        "none.png",
        "--out",
        "~/out.csv",
    ]
    assert evaluate.main(command) == 0
    told = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text("utf-8").splitlines()))
    assert list(rows[0]) == ["file", "answer", "unit", "confidence", "claim", "error"]
    good, bad = ([row for row in rows if bool(row["error"]) == wrong] for wrong in (False, True))
    assert [Path(row["file"]).name for row in good] == [*(f"猫_{i}.png" for i in range(6)), "猫_0.png"]
    assert [row["answer"] for row in good] == ["red", "red", "green", "green", "unit 2", "unit 2", "red"]
    assert good[0] == good[-1] and 0 < float(good[0]["confidence"]) <= 1
    assert {Path(row["file"]).name for row in bad} == {"torn.png", "none.png"}
    assert not any(row[key] for row in bad for key in ("answer", "unit", "confidence", "claim"))
    assert "40x32 -> 32x32" in told and "2  could not be read" in told and "9 images" in told
    assert Path("out.png").stat().st_size > 10_000 and not Path("~").exists()
    Path("empty").mkdir()
    for args, words in (
        (["pictures", "--out", "none/out.csv"], "its folder is not there"),
        (["pictures", "--name", "2=blue"], "one at a time"),
        (["empty"], "no images there"),
    ):
        assert words in refused(capsys, evaluate.main, [answering[0], "--predict", *args])


def test_a_person_names_what_was_found(answering, tmp_path, capsys):
    shutil.copy(answering[0] / "checkpoint.pt", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for pair, words in {
        **dict.fromkeys(("2", "x=blue", "2=", "2= ", "=blue", "2=unknown", "2=unit 7"), "write UNIT=NAME"),
        **{"9=blue": "unit 9 is not there", "3=blue": "unit 3 is free", "0=blue": "unit 0 is a class's"},
    }.items():
        assert words in refused(capsys, evaluate.main, [tmp_path, "--name", "2=sky", "--name", pair])
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    for name, told in (
        ("blue, 猫", "unit 2 answers blue, 猫"),
        ("red", "unit 2 answers red, as unit 0 does"),
    ):
        assert evaluate.main([str(tmp_path), "--name", f"2 = {name} "]) == 0  # it may be named anew
        assert told in capsys.readouterr().out
        network = model.load(tmp_path / "checkpoint.pt")
        assert network.names == ["red", "green", name, None]
        assert (
            evaluate.answers(network, answering[1])["answer"][24:] == [name] * 12
        )  # though nobody claims them
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["given"] == {2: "red"} and saved["units"]["owner"] == [0, 1, -1, -2]


def test_mistakes_and_concepts_are_picked_and_sorted():
    x = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 4, 4)
    predicted, y = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 0, 0, 0, 1])
    sure = torch.tensor([0.9, 0.5, 1.0, 0.7, 0.8, 0.9, 0.6, 1.0])
    ((_, images, captions),) = evaluate.mistake_rows(x, predicted, sure, y, ["cat", "dog"])
    assert images[:, 0, 0, 0].tolist() == [4, 3, 6, 1] and captions[0].split() == [
        "dog",
        "80",
        "%",
        "is",
        "cat",
    ]
    assert evaluate.mistake_rows(x, y, sure, y, ["cat", "dog"]) == []
    h = torch.eye(4)[[0, 0, 1, 2, 2, 2, 3, 3]] + torch.tensor([0, 0, 0, 0.5, 0, -0.5, 0, 0])[:, None]
    unit = torch.tensor([0, 0, 0, 2, 2, 2, -1, -1])
    rows = evaluate.concept_rows(x, h, unit, unit < 0, ["cat", None, None])
    labels = ["unit 2\n3 images", "unknown\n2 images", "cat (unit 0)\n3 images"]
    assert [label for label, _ in rows] == labels and rows[0][1][0, 0, 0, 0] == 4  # the one in the middle


NAMES = [
    "a $5 or $6",
    "_hidden",
    "猫",
    "n" * 120,
    "comma, name",
    "new\nline",
    "\udcff",
    "{x}",
    "%s",
    r"\alpha$",
]


def draw_all(folder, classes, known):
    """Every picture of a run with these classes, of which `known` were there at the start."""
    n, y = len(classes), torch.arange(3 * len(classes)) % len(classes)
    h = torch.randn(n, 8, generator=seeded())[y] + 0.3 * torch.randn(3 * n, 8, generator=seeded(1))
    row = dict(labels=9, labelled=0.1, units=known, accuracy=0.5, old_accuracy=0.6, new_accuracy=None)
    row |= {f"loss_{term}": 1.0 for term in evaluate.TERMS} | {f"accuracy_{name}": 0.1 for name in classes}
    rows = [row | dict(epoch=e, stage=f"stage {e // 3}", classes=known if e < 3 else n) for e in range(1, 7)]
    event = {"epoch": 4, "unit": None, "class": None, "count": 9, "purity": None}
    events = [event | {"event": "arrived", "class": name} for name in classes[known:]]
    events += [
        event | {"event": "opened", "unit": known},
        event | {"epoch": 5, "event": "merged", "unit": known},
    ]
    events += [event | {"epoch": 5, "event": "grown", "unit": known + 1, "class": classes[-1]}]
    looks = [dict(name="look", epoch=e, classes=seen, h=h.half(), y=y) for e, seen in ((0, known), (6, n))]
    images = torch.randint(0, 256, (3 * n, 3, 32, 32), generator=seeded()).byte()
    sheet = evaluate.mistake_rows(images, (y + 1) % n, torch.rand(3 * n), y, classes)
    return [
        evaluate.attempt(evaluate.draw_curves, rows, classes, folder / "curves.png"),
        evaluate.attempt(evaluate.draw_life, rows, events, classes, folder / "life.png"),
        evaluate.attempt(evaluate.draw_story, looks, classes, folder / "story.png", "pca"),
        evaluate.attempt(evaluate.draw_embedding, h, y, classes, folder / "embedding.png", "pca", known),
        evaluate.attempt(evaluate.draw_confusion, y.roll(1), y, classes, folder / "confusion.png"),
        evaluate.attempt(evaluate.contact_sheet, folder / "sheet.png", sheet, "a title"),
        evaluate.attempt(evaluate.contact_sheet, folder / "none.png", [], "nothing"),
    ]


@pytest.mark.parametrize(
    "classes", [NAMES[:2], NAMES, [f"{name} {i}" for i in range(10) for name in NAMES]], ids=len
)
def test_pictures_of_any_names_and_numbers_are_drawn_without_a_word(tmp_path, capsys, classes):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(draw_all(tmp_path, classes, len(classes) - len(classes) // 3))
    lines = capsys.readouterr().err.splitlines()
    assert dict(matplotlib.rcParams) == before and len(lines) <= 1
    assert all(line.startswith("note: no installed font") for line in lines)
    assert [np.asarray(Image.open(p).convert("L")).std() > 1 for p in tmp_path.glob("*.png")] == [True] * 7


def test_a_picture_that_fails_is_one_warning(tmp_path, capsys):
    assert not evaluate.attempt(
        evaluate.draw_confusion, torch.zeros(0), torch.zeros(0), ["a"], tmp_path / "c.png"
    )
    assert not evaluate.attempt(evaluate.contact_sheet, tmp_path / "none/c.png", [], "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        "warning: " in line and "c.png could not be drawn (" in line for line in lines
    )


def test_the_picture_of_a_collapsed_network_is_a_point():
    for method in ("pca", "tsne"):
        assert (evaluate.project(torch.zeros(40, 8), method) == 0).all()
        assert evaluate.project(torch.rand(40, 8, generator=seeded()), method).std() > 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of finished runs, as far as comparisons read them."""
    root = tmp_path_factory.mktemp("finished")
    shared = dict(
        seed=0, class_order=0, label_budget=0.1, lr=0.06, without=[], inject=None, commit="abc", out="x"
    )
    for name, accuracy, changes in (
        ("gradual", 0.5, {}),
        ("gradual-s1", 0.6, {"seed": 1}),
        ("gradual-slow", 0.7, {"lr": 0.03, "without": ["discovery", "pruning"]}),
        ("semi", None, {"lr": 0.03}),
    ):
        (root / name).mkdir()
        args = shared | {"curriculum": name.split("-")[0]} | changes
        summary = dict(accuracy=accuracy, knn=0.75, ari=0.5, labels_used=40, classes=["a"])
        (root / name / "args.json").write_text(json.dumps(args))
        (root / name / "summary.json").write_text(json.dumps(summary))
    return root


def test_runs_are_compared_with_mean_and_spread(finished, tmp_path, capsys):
    assert (
        evaluate.main([str(finished), str(finished / "gradual"), "--out", str(tmp_path / "figure.png")]) == 0
    )
    told = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split() for line in told[:4]}
    assert {"55.0", "±", "7.1"} <= set(rows["gradual lr=0.06"]) and rows["semi"][1:3] == ["1", "-"]
    assert "75.0" in rows["gradual lr=0.03 without=discovery,pruning"] and "gcd" not in "".join(told)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_table_of_runs_says_what_their_folders_say(finished, tmp_path, capsys):
    assert evaluate.main([str(finished), "--csv", str(tmp_path / "runs.csv")]) == 0
    tables = []
    for path in (finished, tmp_path / "runs.csv"):
        capsys.readouterr()
        assert evaluate.main([str(path), "--out", str(tmp_path / "figure.png")]) == 0
        tables.append(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert tables[0] == tables[1] and rows[1]["args.seed"] == "1" and rows[0]["args.commit"] == "abc"


def test_groups_are_named_after_what_tells_them_apart(finished):
    assert list(evaluate.compare([finished / "gradual", finished / "semi"])) == [
        "gradual",
        "semi",
    ]  # each has its rate
    names = list(evaluate.compare([finished / "gradual", finished / "gradual-slow", finished / "semi"]))
    assert names == ["gradual lr=0.06", "gradual lr=0.03 without=discovery,pruning", "semi"]


def test_unfinished_runs_and_runs_of_the_same_seed_are_spoken_of(finished, tmp_path, capsys):
    for name in ("one", "two", "three"):
        shutil.copytree(finished / "gradual", tmp_path / name)
    (tmp_path / "three/summary.json").unlink()
    assert evaluate.main([str(tmp_path), str(tmp_path / "one"), "--out", str(tmp_path / "out.png")]) == 0
    out, err = capsys.readouterr()
    assert "gradual     2 " in out and "three: not finished, left out" in err
    assert "gradual: 1 of 2 runs repeat a seed" in err


def test_bad_comparisons_get_one_line(finished, capsys, tmp_path):
    for name, text in (("torn", "{"), ("other", '{"curriculum": "self"}'), ("list", "[]")):
        shutil.copytree(finished / "semi", tmp_path / name)
        (tmp_path / name / "args.json").write_text(text)
    (tmp_path / "begun").mkdir()
    shutil.copy(finished / "semi/args.json", tmp_path / "begun")
    (tmp_path / "log.csv").write_text("epoch,stage\n1,infancy\n")
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00")
    for names, words in (
        (["nothing"], "nothing: not a finished run"),
        (["begun"], "summary.json"),
        (["other", "torn"], "other: not a run"),
        (["torn"], "torn: not a finished run"),
        (["list"], "list: not a run"),
        (["log.csv"], "log.csv: not a run or table"),
        (["bad.csv"], "bad.csv: not a"),
        (["none.csv"], "none.csv: not a"),
        (["list", "--out", "nowhere/figure.png"], "its folder is not there"),
        (["list", "torn", "--compact", "small.pt"], "--compact: one at a time, of one run"),
        (["begun", "--compact", "small.pt"], "checkpoint.pt"),
    ):
        args = [name if name.startswith("-") else tmp_path / name for name in names]
        assert words in refused(capsys, evaluate.main, args)


def test_the_program_is_sturdy_on_a_poor_terminal(answering, tmp_path):
    """With a codec that has no Chinese, and a backend that is not there."""
    Image.fromarray(answering[1][0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    shutil.copy(answering[0] / "checkpoint.pt", tmp_path)
    poor = os.environ | {
        "PYTHONIOENCODING": "cp1252",
        "MPLBACKEND": "module://missing.backend",
        "OMP_NUM_THREADS": "1",
    }
    for args in (["--name", "2=猫"], ["--predict", "a.png"]):
        command = [sys.executable, HERE / "evaluate.py", tmp_path, *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=poor)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "predictions.png").exists()


# ---- train: the command line, runs, resuming ----


def told_off(capsys, main, args):
    """The one line with which `main` refuses these arguments."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    message = capsys.readouterr().err
    assert message.split()[1] == "error:" and len(message.splitlines()) == 1
    return message


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
    pictures = ["curves", "embedding", "story"] + ["confusion", "concepts", "mistakes"] * taught
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
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


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
            if str(path).endswith(".pt") and len(torch.load(data.io.BytesIO(content))["rows"]) == epoch:
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
    assert words in told_off(capsys, train.main, [*out, *args])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["held", "held/mine.txt", "held/mine.txt/run", "run"])
def test_nothing_is_overwritten(capsys, tmp_path, runs, out):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/mine.txt").write_text("kept")
    shutil.copytree(runs / "self", tmp_path / "run")
    before = contents(tmp_path)
    told_off(capsys, train.main, ["--dataset", "digits", "--out", tmp_path / out])
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
    assert words in told_off(capsys, train.main, ["--resume", out, *flags.split()])
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
    message = told_off(capsys, train.main, ["--dataset", folder, *SMALL, "--out", tmp_path / "none"])
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
    assert "other images, labels or class names" in told_off(capsys, train.main, moved)


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
    assert "--from decides --model" in told_off(capsys, train.main, [*flags, "--model", "cnn"])
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

"""The facts that the code must satisfy: `python -m pytest test_all.py`. Formulas are checked against naive loops in float64
or against torchvision and scikit-learn; the command line is checked by running it."""

import argparse
import copy
import json
import math
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import curriculum
import data
import evaluate
import grow_prune
import losses
import model
import train

HERE = Path(__file__).parent
REAL = HERE / "data"
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


# ---- augment --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Smooth images, noise, greys, black and white: float [24,3,32,32]."""
    noise = torch.rand(8, 3, 32, 32, generator=seeded())
    smooth = F.interpolate(torch.rand(8, 3, 4, 4, generator=seeded(1)), (32, 32), mode="bicubic").clamp(0, 1)
    grey = torch.rand(6, 1, 32, 32, generator=seeded(2)).expand(-1, 3, -1, -1)
    return torch.cat([noise, smooth, grey, torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])


@pytest.mark.parametrize(
    "ours, theirs, low, high",
    [
        (augment.adjust_brightness, TF.adjust_brightness, 0.0, 2.0),
        (augment.adjust_contrast, TF.adjust_contrast, 0.0, 2.0),
        (augment.adjust_saturation, TF.adjust_saturation, 0.0, 2.0),
        (augment.adjust_hue, TF.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_agrees_with_torchvision_image_by_image(pictures, ours, theirs, low, high):
    factor = torch.linspace(low, high, len(pictures))
    expected = torch.stack([theirs(x, f.item()) for x, f in zip(pictures, factor, strict=True)])
    torch.testing.assert_close(ours(pictures, factor), expected, atol=1e-4, rtol=0)


def test_crop_agrees_with_torchvision_image_by_image(pictures):
    n = len(pictures)
    height, width = (torch.randint(1, 33, (n,), generator=seeded(s)) for s in (3, 4))
    top, left = ((torch.rand(n, generator=seeded(s)) * (33 - size)).long() for s, size in ((5, height), (6, width)))
    boxes = list(zip(pictures, *(t.tolist() for t in (top, left, height, width)), strict=True))
    expected = torch.stack([TF.resized_crop(x, *box, [32, 32], antialias=True) for x, *box in boxes])
    torch.testing.assert_close(augment.resized_crop(pictures, top, left, height, width), expected, atol=1e-4, rtol=0)


def test_grey_and_flip_agree_with_torchvision(pictures):
    torch.testing.assert_close(augment.random_grayscale(pictures, p=1.0), TF.rgb_to_grayscale(pictures, 3), atol=1e-5, rtol=0)
    assert torch.equal(augment.horizontal_flip(pictures, p=1.0), TF.hflip(pictures))
    assert torch.equal(augment.random_grayscale(pictures, p=0.0), pictures)


def test_color_jitter_with_fixed_ranges_is_torchvisions_in_sequence(pictures):
    ours = augment.color_jitter(pictures, (1.3, 1.3), (0.7, 0.7), (1.2, 1.2), (0.08, 0.08), p=1.0)
    theirs = TF.adjust_hue(TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(pictures, 1.3), 0.7), 1.2), 0.08)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_pad_crop_shifts_by_whole_pixels_within_the_padding(pictures):
    x = pictures[:8].repeat(16, 1, 1, 1)
    shifts = set()
    for before, after in zip(x, augment.pad_crop(x, 2, seeded()), strict=True):
        padded = F.pad(before, (2,) * 4)
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(after, padded[:, i : i + 32, j : j + 32])]
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
    width, height = (32 * (out[:, 0, 16, 20] - out[:, 0, 16, 12]) / 8), (32 * (out[:, 1, 20, 16] - out[:, 1, 12, 16]) / 8)
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(x[0], [0.2, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(4000)])
    ours = torch.stack([height, width], 1).round().numpy()
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.4
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.4


def test_views_take_uint8_and_differ():
    x = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    a, b = augment.two_views(x, generator=seeded())
    assert a.shape == x.shape and a.dtype == torch.float32 and not torch.equal(a, b)
    assert torch.equal(augment.weak(x, flip=False, padding=0), x / 255)
    one, _ = augment.two_views(x, scale=(1.0, 1.0), flip=False, color=False)
    assert one.unique().numel() > 2


# ---- data -----------------------------------------------------------------------------------------------------------


@any_example
@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.lists(fractions, max_size=5), st.sets(st.integers(0, 7)), seeds)
def test_labels_leak_nested_stratified_and_exactly(sizes, some_fractions, classes, seed):
    assume(sum(sizes))
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes), generator=seeded())]
    order = data.leak_order(y, seed)
    for c, size in enumerate(sizes):
        assert sorted(order[y == c].tolist()) == list(range(size))
    before = torch.zeros(len(y), dtype=torch.bool)
    for fraction in sorted([0.0, *some_fractions, 1.0]):
        mask = data.label_mask(order, y, fraction, sorted(classes))
        assert mask[before].all()
        exact = [int(size * fraction + 0.5) * (c in classes) for c, size in enumerate(sizes)]
        assert [int((mask & (y == c)).sum()) for c in range(len(sizes))] == exact
        before = mask
    assert torch.equal(order, data.leak_order(y, seed)) and (len(y) < 50 or not torch.equal(order, data.leak_order(y, seed + 1)))


@pytest.mark.parametrize("fraction", [-0.1, 1.5, math.nan])
def test_fractions_are_refused_outside_their_range(fraction):
    with pytest.raises(ValueError, match="0..1"):
        data.label_mask(torch.arange(3), torch.zeros(3, dtype=torch.long), fraction, [0])
    with pytest.raises(ValueError, match="0..1"):
        grow_prune.prune_smallest(nn.Linear(2, 2), fraction)


def test_batches_cover_the_pool_and_draw_their_share_of_labels():
    active = torch.arange(100) < 80
    labelled = torch.arange(100) % 10 == 0
    drawn = torch.stack(list(data.batches(active, labelled, 16, 5, 0.25, seeded())))
    assert drawn.shape == (5, 16) and (drawn < 80).all()
    assert labelled[drawn[:, :4]].all()
    everything = torch.stack(list(data.batches(active, labelled & False, 16, 5, 0.25, seeded())))
    assert sorted(everything.flatten().tolist()) == list(range(80))


def test_digits_are_there_and_may_not_be_flipped():
    d = data.load_dataset("digits")
    assert d.train_x.shape == (1347, 3, 32, 32) and d.train_x.dtype == torch.uint8 and d.train_y.dtype == torch.int64
    assert len(d.test_y) == 450 and d.classes == [str(i) for i in range(10)] and not d.flip and not d.color
    x = d.train_x.double() / 255
    np.testing.assert_allclose(d.mean, x.mean((0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(d.std, x.std((0, 2, 3), correction=0), atol=1e-9)


def make_folder(root, classes=("ant", "bee"), per_class=3, splits=("train", "test")):
    modes = ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16"]
    n = 0
    for split in splits:
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(per_class):
                mode = modes[n % len(modes)]
                pixels = np.random.default_rng(n).integers(0, 256, (20 + 7 * i, 50 - 5 * i, 3), dtype=np.uint8)
                if mode == "I;16":
                    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
                else:
                    image = Image.fromarray(pixels).convert(mode)
                image.save(root / split / c / f"{i}.{'tiff' if mode == 'CMYK' else 'png'}")
                n += 1
    return root


def test_folder_of_any_size_and_mode_and_its_cache(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set", per_class=4)
    first = data.load_dataset(f"folder:{root}")
    assert first.train_x.shape == (8, 3, 32, 32) and first.classes == ["ant", "bee"] and first.train_y.tolist() == [0] * 4 + [1] * 4
    assert first.train_x.flatten(1).float().std(1).min() > 5  # no mode came out flat
    monkeypatch.setattr(data, "read_image", lambda name: pytest.fail("the cache was not used"))
    assert torch.equal(data.load_dataset(f"folder:{root}").train_x, first.train_x)
    monkeypatch.undo()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(root / "train/ant/0.png")
    changed = data.load_dataset(f"folder:{root}")
    assert not torch.equal(changed.train_x, first.train_x) and changed.train_x[0, 0].min() == 255
    (root / ".cache-32.pt").write_bytes(b"torn")
    assert torch.equal(data.load_dataset(f"folder:{root}").train_x, changed.train_x)
    (root / ".cache-32.pt").unlink()

    def full(value, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert torch.equal(data.load_dataset(f"folder:{root}").train_x, changed.train_x)
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]  # no half of a cache is left behind


def test_inject_appends_late_classes(tmp_path):
    root = make_folder(tmp_path / "set", ("ant", "bee", "cat"))
    base = data.load_dataset("digits")
    d = data.inject(base, f"folder:{root}:cat,ant")
    assert d.classes[10:] == ["cat", "ant"] and len(d.train_y) == 1347 + 6 and (d.train_y == 11).sum() == 3
    assert data.class_order(12, seed=5, late=2)[10:] == [10, 11]
    with pytest.raises(ValueError, match="did you mean 'bee'"):
        data.inject(base, f"folder:{root}:bees")


def test_held_out_images_are_training_images_and_no_longer_among_them():
    d = data.load_dataset("digits")
    h = data.hold_out(d, 0.1)
    assert torch.equal(h.test_x, data.hold_out(d, 0.1).test_x)
    assert len(h.train_y) + len(h.test_y) == len(d.train_y)
    share = h.test_y.bincount() / d.train_y.bincount()
    assert ((share - 0.1).abs() < 0.01).all()
    images = [
        {(bytes(x.numpy().tobytes()), int(c)) for x, c in zip(*part, strict=True)}
        for part in ((d.train_x, d.train_y), (h.train_x, h.train_y), (h.test_x, h.test_y))
    ]
    assert images[1] | images[2] == images[0] and not images[1] & images[2]


def test_subset_and_reorder():
    d = data.class_subset(data.load_dataset("digits"), 30, seed=0)
    assert d.train_y.bincount().tolist() == [30] * 10
    order = data.class_order(10, seed=1)
    r = data.reorder(d, order)
    assert r.classes == [str(c) for c in order] and sorted(order) == list(range(10))
    assert [r.classes[i] for i in r.test_y.tolist()] == [d.classes[i] for i in d.test_y.tolist()]


@pytest.mark.parametrize(
    "name, count, first, flip",
    [("cifar10", 50_000, "airplane", True), ("cifar100", 50_000, "apple", True), ("mnist", 60_000, "0", False)],
)
def test_real_data_where_they_are(name, count, first, flip):
    folder = REAL / data.ARCHIVES[name]
    if not folder.exists() and not (REAL / name / "train").exists():
        pytest.skip(f"{name} is not in {REAL.name}/")
    d = data.load_dataset(name, REAL, download=False)
    assert d.train_x.shape == (count, 3, 32, 32) and len(d.test_y) == 10_000 and d.classes[0] == first and d.flip == flip
    if name == "cifar10":
        np.testing.assert_allclose(d.mean, (0.4914, 0.4822, 0.4465), atol=1e-4)
        np.testing.assert_allclose(d.std, (0.2470, 0.2435, 0.2616), atol=1e-4)


# ---- model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dim", [("cnn", 128), ("vgg-small", 256), ("vgg11", 512), ("vgg16", 512), ("resnet18", 512), ("mobilenet_v2", 1280)]
)
def test_models_give_embedding_unit_projection_and_logits(name, dim):
    network = model.build(name, 7)
    h, z, logits = network(torch.rand(4, 3, 32, 32))
    assert h.shape == (4, dim) and z.shape == (4, 128) and logits.shape == (4, 7)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


def test_vgg16_is_configuration_d():
    network = model.build("vgg16", 10)
    convolutions = [m for m in network.encoder if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13 and all(c.kernel_size == (3, 3) and c.stride == (1, 1) for c in convolutions)
    assert round((sum(p.numel() for p in network.encoder.parameters()) + 512 * 10) / 1e6, 1) == 14.7


def test_torchvision_stem_keeps_the_resolution():
    encoder = model.build("resnet18", 3).encoder
    assert encoder.conv1.stride == (1, 1) and encoder.conv1.kernel_size == (3, 3) and isinstance(encoder.maxpool, nn.Identity)
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        model.build("resnet-18", 3)
    with pytest.raises(ValueError, match="cannot take 32x32"):
        model.build("maxvit_t", 3)


def test_head_is_a_scaled_cosine():
    head = model.CosineHead(8, 3, scale=5.0)
    h = torch.randn(4, 8, generator=seeded())
    expected = 5 * F.cosine_similarity(h[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(h), expected)
    torch.testing.assert_close(head(3 * h), expected)


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d, tau", [(1, 4, 0.5), (2, 3, 0.1), (7, 16, 0.5), (13, 5, 0.2)])
def test_nt_xent_is_its_definition(n, d, tau):
    z1, z2 = (torch.randn(n, d, generator=seeded(s), dtype=torch.float64, requires_grad=True) for s in (0, 1))
    z = [v / v.norm() for v in [*z1, *z2]]
    total = 0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        total -= torch.log(torch.exp(z[i] @ z[j] / tau) / sum(torch.exp(z[i] @ z[k] / tau) for k in range(2 * n) if k != i))
    expected = total / (2 * n)
    loss = losses.nt_xent(z1, z2, tau)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert losses.nt_xent(z1, z2, tau, "none").shape == (2 * n,)


@any_example
@given(st.integers(1, 24), st.integers(1, 16), st.floats(0.05, 2.0), st.floats(0.1, 10.0), seeds)
def test_nt_xent_is_symmetric_under_swapping_permuting_and_scaling(n, d, tau, scale, seed):
    z1, z2 = (torch.randn(n, d, generator=seeded(seed + i), dtype=torch.float64) for i in (0, 1))
    order = torch.randperm(n, generator=seeded(seed))
    loss = losses.nt_xent(z1, z2, tau)
    assert torch.isfinite(loss) and loss > -1e-5
    for other in ((z2, z1), (z1[order], z2[order]), (scale * z1, z2)):
        torch.testing.assert_close(losses.nt_xent(*other, tau), loss, atol=1e-4, rtol=1e-4)
    each = losses.nt_xent(z1, z2, tau, "none").view(2, n)
    torch.testing.assert_close(losses.nt_xent(z1[order], z2[order], tau, "none"), each[:, order].flatten(), atol=1e-4, rtol=1e-4)


def test_nt_xent_of_chance_and_of_equal_views():
    z1, z2 = unit_rows(256, 512, 0), unit_rows(256, 512, 1)
    assert abs(losses.nt_xent(z1, z2).item() - math.log(511)) < 0.05
    assert torch.isfinite(losses.nt_xent(z1, z1, 0.01))


def test_an_image_that_occurs_twice_is_no_negative_of_itself():
    index, tau = torch.tensor([4, 9, 4, 7]), 0.3
    z1, z2 = (unit_rows(4, 6, s, torch.float64).requires_grad_() for s in (0, 1))
    z, image = F.normalize(torch.cat([z1, z2]), dim=1), index.repeat(2).tolist()
    total = 0
    for i in range(8):
        j = (i + 4) % 8
        others = [k for k in range(8) if k == j or image[k] != image[i]]
        total -= torch.log(torch.exp(z[i] @ z[j] / tau) / sum(torch.exp(z[i] @ z[k] / tau) for k in others))
    ours = losses.nt_xent(z1, z2, tau, kind=index)
    torch.testing.assert_close(ours.double(), total / 8, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, (z1, z2)), torch.autograd.grad(total / 8, (z1, z2)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses.nt_xent(z1, z2, tau, kind=torch.arange(4)), losses.nt_xent(z1, z2, tau))


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
    loss = losses.supervised(logits, onehot, active)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    ours, theirs = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    nothing = losses.supervised(logits, 0 * onehot, active)
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


def test_memory_bank_moves_by_its_momentum_and_averages_repeats():
    bank = losses.MemoryBank(5, 3, momentum=0.5)
    bank.update(torch.arange(5), 7 * unit_rows(5, 3, 0))
    torch.testing.assert_close(bank.rows, unit_rows(5, 3, 0))  # the first sight of an image is all there is of it
    before = bank.rows.clone()
    z = unit_rows(3, 3, 1)
    bank.update(torch.tensor([1, 4, 1]), z)
    torch.testing.assert_close(bank.rows[4], F.normalize(0.5 * before[4] + 0.5 * z[1], dim=0))
    torch.testing.assert_close(bank.rows[1], F.normalize(0.5 * before[1] + 0.5 * (z[0] + z[2]) / 2, dim=0))
    assert torch.equal(bank.rows[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("n, k", [(300, 5), (1000, 25), (2000, 100)])
def test_kmeans_is_as_good_as_scikit_learns(n, k):
    from sklearn.cluster import KMeans

    x = F.normalize(unit_rows(k, 16, 3)[torch.randint(k, (n,), generator=seeded())] + 0.15 * torch.randn(n, 16, generator=seeded(1)), dim=1)
    index, centres = losses.kmeans(x, k, iterations=20, generator=seeded())
    inertia = (x - centres[index]).square().sum().item()
    assert inertia <= 1.05 * KMeans(k, n_init=1, random_state=0).fit(x.numpy()).inertia_
    assert torch.equal(index, torch.cdist(x, centres).argmin(1))
    assert torch.equal(index, losses.kmeans(x, k, iterations=20, generator=seeded())[0])


def test_kmeans_with_fewer_rows_or_fewer_distinct_rows_than_clusters():
    index, centres = losses.kmeans(unit_rows(3, 4), 10, generator=seeded())
    assert sorted(index.tolist()) == [0, 1, 2] and len(centres) == 3
    same, centres = losses.kmeans(unit_rows(1, 4).repeat(9, 1), 4, generator=seeded())
    assert torch.isfinite(centres).all() and len(same) == 9


def naive_aggregation(z, index, rows, clusters, k, tau):
    values = []
    for v, i in zip(z, index.tolist(), strict=True):
        others = [j for j in range(len(rows)) if j != i and (clusters[:, j] >= 0).any()]
        if not others:
            values.append(0 * v.sum())
            continue
        near = sorted(others, key=lambda j: -float(rows[j] @ v.detach()))[:k]
        close = [j for j in near if any(c[j] == c[i] for c in clusters)] or near[:1]
        values.append(-torch.log(sum(torch.exp(rows[j] @ v / tau) for j in close) / sum(torch.exp(rows[j] @ v / tau) for j in near)))
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
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_of_a_large_bank_every_row_is_looked_at_in_its_turn():
    n, k, bank, z, index = 70, 5, filled_bank(70, 8), unit_rows(12, 8, 2), torch.arange(12)
    active = torch.arange(n) % 5 != 0
    for turn in range(5):
        near, similarity = losses.neighbours(z, index, bank, active, k, 4, turn)
        for i in range(len(z)):
            there = [j for j in range(turn % 4, n, 4) if active[j] and j != i]
            assert near[i].tolist() == sorted(there, key=lambda j: -float(z[i] @ bank.rows[j]))[:k]
        torch.testing.assert_close(similarity, (bank.rows[near] * z[:, None]).sum(2))
    assert (losses.neighbours(z, index, bank, active, 18, 4)[0] == -1).any()  # fewer active ones than asked for
    assert losses.searched(10_000) == (64, 1) and losses.searched(50_000) == (64, 5) and losses.searched(100) == (16, 1)


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
            votes[int(y[j])] = votes.get(int(y[j]), 0.0) + weight / (sum(int(y[other]) == int(y[j]) for other in known) if balance else 1)
        best = max(votes, key=votes.get) if votes else -1
        pseudo.append(int(y[i]) if labelled[i] else best)
        confidence.append(1.0 if labelled[i] else votes[best] / sum(votes.values()) if votes else 0.0)
    return torch.tensor(pseudo), torch.tensor(confidence)


@pytest.mark.parametrize("n, count, k", [(5, 0, 10), (5, 1, 10), (30, 4, 10), (80, 25, 10), (80, 80, 3), (1, 1, 2)])
@pytest.mark.parametrize("balance", [False, True])
def test_propagated_labels_are_those_of_the_equations(n, count, k, balance):
    rows = unit_rows(n, 6, 5, torch.float64)
    y = torch.randint(3, (n,), generator=seeded(6)) * 2  # no image of class 1 or 3
    labelled = torch.zeros(n, dtype=torch.bool)
    labelled[torch.randperm(n, generator=seeded(7))[:count]] = True
    expected, share = naive_propagation(rows, y, labelled, k, 20, 0.1, balance)
    pseudo, confidence = losses.propagate_labels(rows.float(), y, labelled, k, 20, 0.1, balance)
    assert torch.equal(pseudo, expected)
    torch.testing.assert_close(confidence, share, atol=1e-4, rtol=1e-4)


def test_aligned_votes_come_as_often_as_expected():
    votes = torch.rand(500, 4, generator=seeded()) * torch.tensor([1, 5, 1, 2])
    votes, due = F.normalize(votes, p=1, dim=1), torch.tensor([2.0, 1.0, 1.0, 0.0])
    even, kept = losses.align(votes, due, rounds=100), votes[:, 3].mean()
    torch.testing.assert_close(even.mean(0), torch.stack([(1 - kept) / 2, (1 - kept) / 4, (1 - kept) / 4, kept]), atol=1e-4, rtol=0)
    odds = (even / votes) / (even / votes)[:, :1]  # one factor a class
    torch.testing.assert_close(odds, odds[:1].expand_as(odds), rtol=1e-4, atol=1e-4)
    assert not losses.align(votes * (due > 0), torch.ones(4)).isnan().any()  # nobody votes for the last


def test_expected_shares_bring_a_class_nearer_to_its_share():
    y = torch.arange(3).repeat_interleave(100)
    rows = F.normalize(torch.eye(3)[y] + 0.3 * torch.randn(300, 3, generator=seeded()), dim=1)
    labelled = torch.arange(300) % 20 == 0
    rows[labelled & (y == 2)] = F.normalize(torch.tensor([0.6, 0.6, 0.7]), dim=0)  # labels that lie apart from their class
    taken, right = [], []
    for expected in (None, torch.ones(3)):
        pseudo, confidence = losses.propagate_labels(rows, y, labelled, temperature=0.1, expected=expected)
        assert torch.equal(pseudo[labelled], y[labelled]) and (confidence[labelled] == 1).all()
        taken.append(int((pseudo == 2).sum()))
        right.append((pseudo == y)[~labelled].float().mean().item())
    assert abs(taken[1] - 100) < 0.5 * abs(taken[0] - 100) and right[1] > right[0], (taken, right)


def test_chunks_change_nothing(monkeypatch):
    rows, y = unit_rows(200, 8, 8), torch.randint(4, (200,), generator=seeded())
    labelled, bank = torch.arange(200) % 7 == 0, filled_bank(200, 8)
    whole = (
        losses.propagate_labels(rows, y, labelled),
        losses.local_aggregation(rows[:50], torch.arange(50), bank, y[None], reduction="none"),
    )
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 200 * 3)
    parts = (
        losses.propagate_labels(rows, y, labelled),
        losses.local_aggregation(rows[:50], torch.arange(50), bank, y[None], reduction="none"),
    )
    assert torch.equal(whole[0][0], parts[0][0])
    torch.testing.assert_close(whole[0][1], parts[0][1])
    torch.testing.assert_close(whole[1], parts[1])


def test_propagation_weighs_both_terms_by_confidence():
    n, b = 30, 6
    bank, z, index = filled_bank(n, 8), unit_rows(b, 8, 2), torch.arange(b)
    logits, pseudo = torch.randn(b, 3, generator=seeded(3)), torch.randint(3, (n,), generator=seeded(4))
    confidence = torch.rand(n, generator=seeded(5))
    ours = losses.propagation(z, logits, index, bank, pseudo, confidence, F.one_hot(pseudo[:b], 3), background=10, reduction="none")
    together = naive_aggregation(z.double(), index, bank.rows.double(), pseudo[None], 10, 0.07)
    torch.testing.assert_close(ours, (confidence[:b] * (together + F.cross_entropy(logits, pseudo[:b], reduction="none"))).float())


# ---- curriculum -----------------------------------------------------------------------------------------------------


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
        assert (1 if name != "gradual" else known) <= s.classes <= most and 0 <= s.named <= s.classes and 0 <= s.sparsity <= sparsity
        assert (
            0 <= s.label_fraction <= labels
            and all(0 <= w <= 1 for w in (*s.mix.values(), s.labelled_share))
            and set(s.mix) == {*train.TERMS}
        )
    if epochs > 1:
        last = stages[-1]
        assert (last.classes, last.named) == (most, 0 if name in ("self", "self-known") else num_classes)
        assert (last.label_fraction, last.sparsity) == pytest.approx((labels, sparsity))


def test_gradual_tells_its_story():
    stages = [curriculum.stage("gradual", e, 30, 10) for e in range(30)]
    assert stages[0].classes == 7 and stages[0].label_fraction == 0 and stages[0].mix["ntxent"] == 1
    assert stages[-1].classes == stages[-1].named == 10 and math.isclose(stages[-1].label_fraction, 0.1)
    for c in (8, 9, 10):  # one by one, images before labels
        images, names = (next(e for e, s in enumerate(stages) if getattr(s, f) >= c) for f in ("classes", "named"))
        assert stages[images].classes == c and names >= images + 2
    with pytest.raises(ValueError, match="gradual"):
        curriculum.stage("grad", 0, 1, 10)


# ---- grow and prune -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01), lambda p: torch.optim.AdamW(p, 0.01)]
)
@pytest.mark.parametrize("kind", [nn.Linear, model.CosineHead])
def test_growth_leaves_the_old_rows_and_their_next_updates_alone(make, kind):
    def step(head, optimizer, seed):
        h = torch.randn(16, 6, generator=seeded(seed))
        loss = F.cross_entropy(head(h)[:, :4], torch.arange(16) % 4)  # the new units take no part
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    heads = []
    for grows in (False, True):
        torch.manual_seed(0)
        head = kind(6, 4)
        optimizer = make(head.parameters())
        step(head, optimizer, 1)
        if grows:
            before = head(torch.ones(1, 6))
            grow_prune.grow_head(head, optimizer, 2)
            assert head.out_features == 6 and torch.equal(head(torch.ones(1, 6))[:, :4], before)
            assert len(optimizer.param_groups) == 1 and all(p in optimizer.state for p in head.parameters())
        for seed in range(2, 6):
            step(head, optimizer, seed)
        heads.append(head)
    for plain, grown in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(grown[:4], plain, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError):
        grow_prune.grow_head(heads[0], None, 0)


def test_imprinted_unit_is_the_mean_direction():
    head, h = model.CosineHead(5, 3), torch.randn(7, 5, generator=seeded()) + 2
    others = head.weight[:2].clone()
    grow_prune.imprint(head, 2, h)
    mean = (h / h.norm(dim=1, keepdim=True)).mean(0)
    torch.testing.assert_close(F.normalize(head.weight[2], dim=0), mean / mean.norm())
    torch.testing.assert_close(head.weight[2].norm(), others.norm(dim=1).mean())
    assert torch.equal(head.weight[:2], others)
    silent = nn.Linear(5, 3, bias=False)
    grow_prune.imprint(silent, 2, h, -h)  # which could not be made to speak more softly
    torch.testing.assert_close(F.normalize(silent.weight[2], dim=0), mean / mean.norm())


def test_an_imprinted_unit_leaves_the_others_what_is_theirs():
    torch.manual_seed(0)
    head, others = model.CosineHead(8, 4), torch.randn(200, 8) + 1
    for tolerance in (0.0, 0.02, 0.5, 1.0):
        grow_prune.imprint(head, 3, torch.randn(5, 8) + 1, others, tolerance)
        won = (head(others).argmax(1) == 3).float().mean()
        assert won <= tolerance + 1 / 200 and not head.bias[:3].any()
    rivals = torch.tensor([True, False, False, False])  # the others do not answer
    grow_prune.imprint(head, 3, torch.randn(5, 8) + 1, others, 0.02, rivals)
    assert 0 < (head(others)[:, 3] > head(others)[:, 0]).float().mean() <= 0.02
    grow_prune.imprint(head, 3, others)
    assert head.bias[3] == 0


def test_the_discriminant_is_that_of_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    others, own, kind = torch.randn(90, 12, generator=seeded()), torch.randn(12, generator=seeded(1)), torch.arange(90) % 4
    others = (others * torch.linspace(0.2, 3, 12) + kind[:, None]).double()  # spread unevenly around means that differ
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.8).fit(others.numpy(), kind.numpy())
    direction = np.linalg.solve(reference.covariance_, own.double().numpy() - others.numpy().mean(0))
    torch.testing.assert_close(grow_prune.discriminant(own.double(), others, kind).numpy(), direction)
    assert grow_prune.discriminant(own, others[:1].float(), kind[:1]).isfinite().all()  # of a single image there is no covariance


def test_a_class_among_others_is_told_better_by_what_sets_it_apart():
    """Kinds that vary along the same ten of forty directions: five images of a new one point there, not at what is its own."""
    generator, head = seeded(), model.CosineHead(40, 5)
    y, spread = torch.arange(5).repeat_interleave(200), torch.cat([torch.full((10,), 2.0), torch.full((30,), 0.2)])
    h = F.pad(torch.randn(5, 30, generator=generator) * 0.4, (10, 0))[y] + torch.randn(1000, 40, generator=generator) * spread
    for c in range(4):
        grow_prune.imprint(head, c, h[y == c])
    named, new, first = torch.arange(5) < 4, y == 4, h[y == 4][:20]
    right = head(h).masked_fill(~named, -math.inf).argmax(1) == y
    seen = grow_prune.first_sight(head, named, first, h[~new][::4], h, new, right)
    mean, others = copy.deepcopy(head), h[~new][::4]
    grow_prune.imprint(mean, 4, first[:5])
    margin = mean(others)[:, 4] - mean(others)[:, :4].amax(1)  # the mean, with its bias lowered as much
    taken = mean(h)[:, 4] - margin.quantile(0.97).clamp(min=0) > mean(h)[:, :4].amax(1)
    assert seen["imprint_5"] > taken[new].float().mean() + 0.1 and seen["imprint_5_lost"] < 0.05


def test_a_recycled_unit_forgets_everything_and_the_others_nothing():
    torch.manual_seed(0)
    head = nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(head.parameters(), 0.01)
    F.cross_entropy(head(torch.randn(16, 6)), torch.arange(16) % 4).backward()
    optimizer.step()
    masks = {"weight": torch.rand(4, 6) > 0.5}
    before = [copy.deepcopy(x) for x in (head.state_dict(), [dict(optimizer.state[p]) for p in head.parameters()], masks)]
    grow_prune.recycle_unit(head, optimizer, 2, masks)
    rest = [0, 1, 3]
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter[rest], before[0][name][rest]) and not torch.equal(parameter[2], before[0][name][2])
    for parameter, was in zip(head.parameters(), before[1], strict=True):
        for key, value in optimizer.state[parameter].items():
            if value.ndim:
                assert torch.equal(value[rest], was[key][rest]) and not value[2].any() and was[key][2].any()
    assert masks["weight"][2].all() and torch.equal(masks["weight"][rest], before[2]["weight"][rest]) and head.bias[2] == 0
    for unit in (-1, 4):
        with pytest.raises(IndexError, match="of 4"):
            grow_prune.recycle_unit(head, optimizer, unit)


def test_units_are_recycled_before_the_head_grows_and_never_taken_from_a_class():
    head = model.CosineHead(5, 2)
    units = grow_prune.Units([7, 4])
    assert units.redundant() is None and units.take(head, None, grow_prune.UNNAMED) == (2, "grown") and head.out_features == 3
    assert units.of_classes(9).tolist() == [-1, -1, -1, -1, 1, -1, -1, 0, -1]
    assert units.in_use(torch.arange(9) == 4).tolist() == [False, True, True]
    for _ in range(600):
        units.observe(torch.tensor([[0.5, 0.5, 0.0]]))
    torch.testing.assert_close(units.utility, torch.tensor([0.5, 0.5, 0.0]), atol=0.01, rtol=0)
    assert units.redundant() is None  # too young
    units.age[2] = units.mature
    assert units.redundant() == 2 and units.take(head, None, 3) == (2, "recycled") and units.owner == [7, 4, 3] and units.age[2] == 0
    units.age, units.utility = [9] * 3, torch.zeros(3)
    assert units.redundant() is None  # all have a class
    units.owner[0] = grow_prune.FREE
    assert units.take(head, None, 8) == (0, "recycled") and head.out_features == 3


step_or_change = st.one_of(
    st.sampled_from(["step", "recycle"]),
    st.tuples(st.just("grow"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["prune", "filters"]), fractions),
)


@any_example
@given(st.lists(step_or_change, max_size=12), seeds)
def test_growth_recycling_and_pruning_in_any_order_keep_their_invariants(todo, seed):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.Flatten())
    head = model.CosineHead(5, 2)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], 0.1, momentum=0.9)
    units, masks, sparsity, filters = grow_prune.Units([0, 1]), {}, 0.0, 0.0
    for action in todo:
        rows, momentum = head.weight.detach().clone(), optimizer.state[head.weight].get("momentum_buffer")
        momentum = None if momentum is None else momentum.clone()
        if action == "step":
            loss = F.cross_entropy(head(encoder(torch.randn(4, 3, 3, 3))), torch.arange(4) % head.out_features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # its momentum moves what was pruned
            grow_prune.apply_masks(encoder, masks)
        elif action == "recycle":
            units.owner[-1] = grow_prune.FREE
            unit, how = units.take(head, optimizer, 7)
            assert how == "recycled" and len(units.owner) == head.out_features
            rest = torch.arange(len(rows)) != unit
            assert torch.equal(head.weight[rest], rows[rest]) and not head.bias[unit]
            if momentum is not None:
                now = optimizer.state[head.weight]["momentum_buffer"]
                assert torch.equal(now[rest], momentum[rest]) and not now[unit].any()
        elif action[0] == "grow":
            for _ in range(action[1]):
                assert units.take(head, optimizer, grow_prune.UNNAMED)[1] == "grown"
            assert len(head.weight) == len(head.bias) == head.out_features == len(rows) + action[1] == len(units.utility)
            assert torch.equal(head.weight[: len(rows)], rows)
            if momentum is not None:
                now = optimizer.state[head.weight]["momentum_buffer"]
                assert torch.equal(now[: len(rows)], momentum) and not now[len(rows) :].any()
        else:
            sparsity, filters = (max(sparsity, action[1]), filters) if action[0] == "prune" else (sparsity, max(filters, action[1]))
            before, masks = masks, grow_prune.prune(encoder, sparsity, filters, masks)
            assert set(masks) <= {"0.weight", "1.weight", "1.bias", "2.weight"}
            for name, mask in before.items():
                assert not (masks[name] & ~mask).any()  # what is pruned stays so
            zeros = sum(int((w == 0).sum()) for w in grow_prune.prunable(encoder).values())
            assert zeros >= round(sparsity * 256)  # of 216 + 40 weights
            assert encoder[0].weight.flatten(1).any(1).any() or sparsity > 0.1  # filters alone never empty a layer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert {*map(id, parameters)} == {id(p) for p in (*encoder.parameters(), *head.parameters())} >= {*map(id, optimizer.state)}
        assert all(not encoder.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_the_smallest_weights_go_exactly():
    encoder = model.build("cnn", 2).encoder
    sizes = torch.cat([p.detach().abs().flatten() for p in grow_prune.prunable(encoder).values()])
    masks = grow_prune.prune_smallest(encoder, 0.37)
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert int((~kept).sum()) == round(0.37 * len(kept)) and sizes[~kept].max() <= sizes[kept].min()
    assert math.isclose(grow_prune.sparsity_of(encoder), 0.37, abs_tol=1e-4)


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
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="plain chain"):
        grow_prune.prune_filters(nn.Sequential(nn.Linear(3, 3)) and network, share)
    with pytest.raises(ValueError, match="can be made compact"):
        model.compact(model.build("resnet18", 2))


def test_the_running_mean_follows_weights_and_statistics():
    a, b = (model.build("cnn", 2) for _ in range(2))
    b(torch.rand(4, 3, 32, 32))
    expected = {k: 0.75 * v + 0.25 * b.state_dict()[k] for k, v in a.state_dict().items() if v.is_floating_point()}
    model.follow(a, b, 0.75)
    for key, value in expected.items():
        torch.testing.assert_close(a.state_dict()[key], value)


# ---- confusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(1, 2), (7, 30), (1500, 40)])
def test_claims_are_their_definition_and_the_threshold_leaves_the_own_label_out(n, m):
    h, pool_h, named = torch.randn(n, 5, generator=seeded()), torch.randn(m, 5, generator=seeded(1)), torch.arange(m) % 3 == 0

    def density(x, at, without=None):
        kernel = [math.exp((F.cosine_similarity(x, pool_h[j], dim=0).item() - 1) / 0.2) for j in at if j != without]
        return sum(kernel)

    everything, names = range(m), named.nonzero()[:, 0].tolist()
    ask = range(0, n, max(1, n // 7))
    expected = [density(h[i], names) / density(h[i], everything) / (len(names) / m) for i in ask]
    torch.testing.assert_close(grow_prune.claim(h, pool_h, named)[list(ask)], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    if len(names) > 1:
        left = [density(pool_h[j], names, without=j) / density(pool_h[j], everything) / (len(names) / m) for j in names]
        assert math.isclose(grow_prune.threshold(pool_h, named, 0.3), torch.tensor(left).quantile(0.3).item(), rel_tol=1e-3, abs_tol=1e-4)
    else:
        assert grow_prune.threshold(pool_h, named) == -math.inf


def test_resemblance_is_to_the_others_of_a_class():
    h, y = torch.randn(41, 5, generator=seeded()), torch.tensor([*range(4)] * 10 + [4])
    cosines = []
    for i in range(40):  # the last one is alone in its class
        others = torch.stack([F.normalize(h[j], dim=0) for j in range(40) if y[j] == y[i] and j != i]).mean(0)
        cosines.append(F.cosine_similarity(h[i], others, dim=0))
    assert math.isclose(grow_prune.resemblance(h, y), torch.stack(cosines).quantile(0.25), rel_tol=1e-4)
    assert grow_prune.resemblance(h[:4], y[:4]) == 1  # one of each


def crowd(classes, size, seed, named):
    """Embeddings [classes * size, 16] around one direction a class, their classes, and a random tenth of those `named` as labelled."""
    y = torch.arange(classes).repeat_interleave(size)
    h = 3 * torch.eye(16)[y] + 0.5 * torch.randn(len(y), 16, generator=seeded(seed))
    return h, y, (torch.rand(len(y), generator=seeded(seed + 100)) < 0.1) & (y < named)


def looks(monitor, classes, named, times, size=150):
    """What a monitor opens when it looks at the same images `times` times, moved a little from look to look."""
    opened = []
    for look in range(times):
        h, y, labelled = crowd(classes, size, look, named)
        labelled = crowd(classes, size, 0, named)[2]
        index = (~labelled).nonzero()[:, 0]
        claims, limit = grow_prune.claim(h[index], h, labelled), grow_prune.threshold(h, labelled)
        group = monitor.look(index, claims, limit, h[index], h[labelled], y[labelled])
        if group is not None:
            opened.append((look, y[index[group]]))
    return opened


def test_a_kind_that_nobody_names_opens_a_unit_after_some_looks_and_none_else_does():
    opened = looks(grow_prune.ConfusionMonitor(750, patience=3, cooldown=4), classes=5, named=4, times=9)
    assert [look for look, _ in opened] == [2, 7]  # in the third look, and again after four of rest
    assert all((y == 4).float().mean() > 0.95 and len(y) > 40 for _, y in opened)
    assert not looks(grow_prune.ConfusionMonitor(750), classes=5, named=5, times=12)
    assert not looks(grow_prune.ConfusionMonitor(750), classes=5, named=0, times=5)  # before the first label
    assert not looks(grow_prune.ConfusionMonitor(750, at_least=2), classes=5, named=4, times=5)
    assert not looks(grow_prune.ConfusionMonitor(75), classes=5, named=4, times=5, size=15)  # too few to be sure


def test_first_sight_of_a_class_of_its_own():
    h, y, _ = crowd(3, 40, 0, 3)
    head = model.CosineHead(16, 3)
    for c in (0, 1):
        grow_prune.imprint(head, c, h[y == c][:10])
    named = torch.tensor([True, True, False])
    is_new, right = y == 2, head(h).masked_fill(~named, -math.inf).argmax(1) == y
    torch.manual_seed(0)
    tries = [grow_prune.first_sight(head, named, h[is_new][:20], h[~is_new][:20], h, is_new, right) for _ in range(10)]
    assert all(
        min(seen["imprint_1"], seen["imprint_20"]) > 0.95 and seen["plain_20"] == 1 and seen["imprint_20_lost"] == 0 for seen in tries
    )
    assert np.mean([seen["random_5"] for seen in tries]) < 0.5 and head.out_features == 3  # a lucky one may do well


def nameless_run():
    """A run and its pool: classes 0 to 3 have labels for a tenth, class 4 has none, and h is what the network sees."""
    h, y, labelled = crowd(5, 150, 0, 4)
    dataset = data.Dataset(
        torch.zeros(750, 3, 32, 32, dtype=torch.uint8), y, h, y, list("abcde"), (0.5,) * 3, (0.2,) * 3, True, True, (0.2, 1)
    )
    h = F.normalize(F.pad(h, (0, 112)), dim=1)
    torch.manual_seed(0)
    network = model.build("cnn", 4)
    for c in range(4):  # a head that knows its classes
        grow_prune.imprint(network.head, c, h[y == c])
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    monitor, units = grow_prune.ConfusionMonitor(750, patience=1, cooldown=0), grow_prune.Units(range(4))
    args, bank = train.parser().parse_args([]), losses.MemoryBank(750, 128)
    run = train.Run(args, dataset, torch.arange(750), False, network, copy.deepcopy(network), optimizer, bank, units, monitor)
    everything, taught = torch.ones(750, dtype=torch.bool), torch.arange(5) < 4
    return run, data.Pool(everything, labelled, taught, ~everything, labelled, taught), h


def test_settle_gives_the_running_mean_the_statistics_of_the_images():
    run = nameless_run()[0]
    x = torch.randint(256, (64, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    first, before = run.average.encoder[1], copy.deepcopy(dict(run.average.named_parameters()))
    train.settle(run, x)
    seen = run.average.encoder[0]((x / 255 - run.average.mean) / run.average.std)
    torch.testing.assert_close(first.running_mean, seen.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(first.running_var, seen.var((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(run.embed(x).mean(0), torch.zeros(128), atol=1e-2, rtol=0)
    assert all(torch.equal(p, before[name]) for name, p in run.average.named_parameters()) and first.momentum == 0.1


def test_a_unit_is_opened_for_the_nameless_released_when_others_claim_them_and_used_again():
    run, now, h = nameless_run()
    run.args.new_unit, y = "random", run.dataset.train_y
    seeds = train.discover(run, now, h)
    founders = seeds == 4
    assert run.units.owner == [0, 1, 2, 3, grow_prune.UNNAMED] and founders.sum() > 40 and (y[founders] == 4).all()
    unknown = seeds == train.UNKNOWN
    assert unknown.any() and not (unknown & now.labelled).any() and (y[unknown] == 4).float().mean() > 0.5
    again = train.discover(run, now, h)
    assert (again[founders] == 4).all() and run.events[0]["purity"] == 1  # a random unit keeps its founders
    labelled = now.labelled | (founders & (torch.arange(750) % 2 == 0))
    train.discover(run, replace(now, labelled=labelled, labelled_before=labelled), h)
    assert run.units.owner[4] == grow_prune.FREE and run.events[-1]["event"] == "released"
    unit, how = train.open_unit(run, now, grow_prune.UNNAMED, founders.nonzero()[:1, 0])
    assert (unit, how) == (4, "recycled") and not (run.monitor.concept == 4).any()
    train.forget_unnamed(run)
    assert run.units.owner[4] == grow_prune.FREE


def test_votes_are_aligned_among_the_named_and_leave_the_nameless_theirs():
    run, now, h = nameless_run()
    y = run.dataset.train_y
    seeds = torch.where(now.labelled, y, -1)
    seeds[(y == 4) & (torch.arange(750) % 5 == 0)] = train.UNKNOWN
    broad = h.clone()
    broad[now.labelled & (y == 0)] = F.normalize(broad[now.labelled & (y == 0)] + 0.7 * F.normalize(h[y == 1].mean(0), dim=0), dim=1)
    plain, aligned = (train.vote(torch.zeros(750, 1), broad, seeds, 4, due)[0] for due in (None, torch.tensor([1.0, 1, 1, 1, 0])))
    for pseudo in (plain, aligned):
        assert (pseudo[y == 4] == -1).float().mean() > 0.9 and (pseudo[y < 4] >= 0).float().mean() > 0.9
    uneven = [(pseudo[pseudo >= 0].bincount() - 150).abs().max() for pseudo in (plain, aligned)]
    assert uneven[1] < uneven[0], uneven


@pytest.mark.parametrize("waiting", [False, True])  # is there a unit for it already, as for a class that is known from the start?
def test_the_first_labels_name_the_unit_that_was_opened_for_what_they_label(waiting):
    run, now, h = nameless_run()
    run.args.known_classes = 5
    if waiting:
        grow_prune.grow_head(run.network.head, run.optimizer)
        run.average, run.units = copy.deepcopy(run.network), grow_prune.Units(range(5))
    parts = {"h": torch.nn.Identity(), "logits": run.average.head}
    run.embed = lambda x, part="h": parts[part](F.normalize(F.pad(x.flatten(1), (0, 112))))
    run.dataset = replace(run.dataset, train_x=run.dataset.test_x, test_x=run.dataset.test_x[:1])
    unit, _ = run.units.take(run.network.head, None, grow_prune.UNNAMED)
    grow_prune.grow_head(run.average.head, None)
    grow_prune.imprint(run.average.head, unit, h[run.dataset.train_y == 4])
    fifth, place, learner = run.dataset.train_y == 4, torch.arange(750), copy.deepcopy(run.network.head)
    labelled, own = fifth & (place % 20 == 0), fifth & (place % 20 == 1)
    seeds = torch.where(own, unit, -1)
    train.name_classes(run, replace(now, labelled=now.labelled | labelled, taught=torch.ones(5) > 0), seeds)
    assert run.units.owner == [0, 1, 2, 3, *([grow_prune.FREE] if waiting else []), 4]
    assert run.events[-1]["event"] == "named" and run.events[-1]["purity"] > 0.9
    assert [event["unit"] for event in run.events if event["event"] == "released"] == [4] * waiting
    # It points at what it stood for and what has its name together, away from the others; the learner is left alone.
    towards = grow_prune.discriminant(h[labelled | own].mean(0), h[now.labelled], run.dataset.train_y[now.labelled])
    assert F.cosine_similarity(run.average.head.weight[unit], towards, dim=0) > 0.9999
    assert all(torch.equal(new, old) for new, old in zip(run.network.head.parameters(), learner.parameters(), strict=True))


def test_replay_keeps_exemplars_of_the_classes_seen_earlier():
    y = torch.arange(6).repeat_interleave(20)
    leak = data.leak_order(y, 0)
    stages = [curriculum.Stage("", classes, named, 0.5, {}, 0.5, 0.0) for classes, named in ((3, 3), (4, 3), (4, 4), (6, 4))]
    counts = ([20] * 3, [4] * 3 + [20], [4] * 3 + [20], [4] * 4 + [20, 20])  # two classes that come together are whole
    all_of_it, strict = data.pools(stages, y, leak, 6, 3, None), data.pools(stages, y, leak, 6, 3, 4)
    for stage, whole, pool, count in zip(stages, all_of_it, strict, counts, strict=True):
        assert y[whole.active].bincount(minlength=6).tolist() == [20] * stage.classes + [0] * (6 - stage.classes)
        assert y[pool.active].bincount(minlength=6).tolist() == count + [0] * (6 - stage.classes)
        assert not (pool.labelled & ~whole.labelled).any() and pool.taught.tolist() == [c < stage.named for c in range(6)]


# ---- what may be pruned ---------------------------------------------------------------------------------------------


def test_what_may_be_pruned_is_weights_of_layers_only():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    network.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
    assert set(grow_prune.prunable(network)) == {"0.weight", "3.weight"}
    grow_prune.prune_smallest(network, 0.9)
    assert (network.layer_scale == 1e-6).all()


def test_an_optimizer_that_cannot_grow_is_refused():
    head = nn.Linear(4, 3)
    head(torch.ones(1, 4)).sum().backward()
    for make in (torch.optim.Adafactor, torch.optim.LBFGS):
        optimizer = make(head.parameters())
        optimizer.step(lambda: 0.0)
        with pytest.raises(ValueError, match=make.__name__):
            grow_prune.grow_head(head, optimizer)
        assert head.out_features == len(head.weight) == len(head.bias) == 3  # nothing was changed


# ---- evaluate -------------------------------------------------------------------------------------------------------


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
    assert 0.5 < expected < 1 and abs(evaluate.linear_probe(a, y[:200], b, y[200:], l2=1e-3) - expected) <= 0.005


def test_knn_is_scikit_learns(blobs):
    from sklearn.neighbors import KNeighborsClassifier

    h, y = blobs
    unit = F.normalize(h, dim=1).numpy()
    reference = KNeighborsClassifier(15, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.1)).fit(unit[:200], y[:200].numpy())
    assert math.isclose(
        evaluate.knn_accuracy(h[:200], y[:200], h[200:], y[200:], k=15), reference.score(unit[200:], y[200:].numpy()), abs_tol=1e-6
    )


def test_cluster_scores_of_perfect_permuted_and_random_clusters():
    y = torch.arange(90) % 3
    perfect = evaluate.cluster_scores(torch.eye(3)[(y + 1) % 3] + 0.01 * torch.rand(90, 3, generator=seeded()), y)
    assert perfect["ari"] == perfect["accuracy"] == 1.0 and perfect["nmi"] > 0.999 and perfect["silhouette"] > 0.9
    noise = evaluate.cluster_scores(torch.randn(300, 8, generator=seeded()), torch.randint(3, (300,), generator=seeded(1)))
    assert abs(noise["ari"]) < 0.05 and noise["accuracy"] < 0.5


def test_forgetting_and_novelty():
    assert evaluate.forgetting([[0.5, 0.0], [0.9, 0.4], [0.7, 0.6]]).tolist() == pytest.approx([0.2, 0.0])
    assert evaluate.forgetting([[0.5, math.nan], [0.4, math.nan]])[0] == pytest.approx(0.1)
    assert evaluate.novelty_auroc(torch.tensor([0.1, 0.2, 0.9, 0.8]), torch.tensor([False, False, True, True])) == 1.0
    assert evaluate.class_accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2) == [0.5, 1.0]


def test_embedding_leaves_the_network_bit_identical():
    network = model.build("cnn", 3).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    h = evaluate.embed(network, x, batch_size=4)
    assert h.shape == (9, 128) and network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    torch.testing.assert_close(evaluate.embed(network, x / 255), h)


# ---- the script -----------------------------------------------------------------------------------------------------

TINY = ["--dataset", "digits", "--per-class", "20", "--batch-size", "32", "--label-budget", "0.2", "--embedding", "pca"]


def script(name, *args, cwd):
    command = [sys.executable, HERE / name, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


RUNS = {name: ["--curriculum", name, *TINY, "--epochs", 8] for name in curriculum.CURRICULA} | {
    "gradual-again": [*TINY, "--epochs", 8],
    "gradual-s1": [*TINY, "--epochs", 8, "--seed", 1],
    "strict": [
        *TINY,
        "--epochs",
        12,
        "--replay",
        4,
        "--new-unit",
        "random",
        "--prune-units",
        0.4,
        "--prune",
        0.5,
        "--without",
        "discovery",
    ],
    "one-image": "--dataset digits --per-class 1 --known-classes 1 --batch-size 2 --label-budget 1 --epochs 3 --embedding pca".split(),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs of the real script, side by side: one for each curriculum, and some with other flags."""
    root = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(script, "train.py", *flags, "--out", root / name, cwd=root) for name, flags in RUNS.items()]
    for done in (job.result() for job in started):
        assert done.returncode == 0, done.stderr
    return root


FIGURES = "accuracy probe probe_leaked knn ari nmi silhouette old_accuracy new_accuracy first_sight forgetting sparsity labels_used seconds"


@pytest.mark.parametrize("name", curriculum.CURRICULA)
def test_every_curriculum_runs_and_leaves_its_figures(runs, name):
    summary = json.loads((runs / name / "summary.json").read_text())
    settings = json.loads((runs / name / "args.json").read_text())
    rows = (runs / name / "log.csv").read_text().splitlines()
    assert set(FIGURES.split()) <= set(summary) and len(rows) == 9 and settings["model"] == "cnn" and "torch" in settings["versions"]
    taught = name not in ("self", "self-known")
    assert (summary["accuracy"] is not None) == taught
    assert summary["labels_used"] == {"supervised": 200, "self": 0, "self-known": 0}.get(name, 40)
    assert (0 < summary["label_epochs"] < 320) if name == "gradual" else summary["label_epochs"] == 8 * summary["labels_used"]
    assert math.isclose(summary["sparsity"], 0.8, abs_tol=0.01) and (summary["first_sight"] is not None) == (name == "gradual")
    pictures = ["curves", "curriculum", "embedding"] + ["confusion"] * taught
    assert all((runs / name / f"{p}.png").stat().st_size > 10_000 for p in pictures)


def test_one_image_of_one_class_is_enough_to_begin(runs):
    assert json.loads((runs / "one-image/summary.json").read_text())["labels_used"] == 10


def test_strict_replay_random_units_and_whole_filters(runs, tmp_path):
    summary = json.loads((runs / "strict/summary.json").read_text())
    assert summary["labels_used"] == 40 and summary["opened"] == 0 and summary["sparsity"] >= 0.5
    done = script("evaluate.py", runs / "strict", "--compact", tmp_path / "small.pt", cwd=tmp_path)
    assert done.returncode == 0 and "times as fast" in done.stdout, done.stderr
    widths = [w for w in model.load(tmp_path / "small.pt").encoder.config if w != "M"]
    assert sum(widths[:-1]) == 96 - round(0.4 * 96) and widths[-1] == 128


def test_runs_are_compared(runs):
    done = script("evaluate.py", *(runs / name for name in curriculum.CURRICULA), cwd=runs)
    assert done.returncode == 0, done.stderr
    assert all(any(line.startswith(f"{name} ") for line in done.stdout.splitlines()) for name in curriculum.CURRICULA)
    assert (runs / "comparison.png").exists()


def without_times(folder):
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    keep = [i for i, name in enumerate(rows[0]) if name not in ("seconds", "images_per_second")]
    summary = json.loads((folder / "summary.json").read_text())
    return [[row[i] for i in keep] for row in rows], {k: v for k, v in summary.items() if k not in ("seconds", "images_per_second")}


def identical(a, b):
    """Whether two values are the same, with the tensors in them bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture
def one_thread():
    """As in the runs of the real script."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_that_diverges_is_interrupted_and_fills_the_disk_ends_as_if_nothing_had_been(runs, one_thread, tmp_path, capsys):
    out, steps = tmp_path / "cut", []
    new, on = ["--curriculum", "gradual", *TINY, "--epochs", "8", "--out", str(out)], ["--resume", "--out", str(out)]
    loss, write = losses.nt_xent, train.write_checkpoint

    def not_a_number(*views, **options):  # in the second step of epoch 4; an epoch has seven
        steps.append(views)
        return loss(*views, **options) * (math.nan if len(steps) == 3 * 7 + 2 else 1)

    def ctrl_c(path, state):
        write(path, state)
        if len(state["rows"]) == 5:
            raise KeyboardInterrupt

    def full(path, state):
        if len(state["rows"]) == 7:
            raise OSError(28, "No space left on device")
        write(path, state)

    for arguments, module, name, trouble, status, epochs, words in (
        (
            new,
            losses,
            "nt_xent",
            not_a_number,
            2,
            3,
            "epoch 4 (maturity): the loss 'ntxent' was nan in step 2; the checkpoint of epoch 3 is kept",
        ),
        (on, train, "write_checkpoint", ctrl_c, 130, 5, f"go on with: python train.py --resume --out {out}"),
        (on, train, "write_checkpoint", full, 2, 6, f"No space left on device; go on with: python train.py --resume --out {out}"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, trouble)
            assert train.main(arguments) == status
        message = capsys.readouterr().err.strip()
        assert words in message and "\n" not in message
        assert len(torch.load(out / "checkpoint.pt", weights_only=True)["rows"]) == epochs and not (out / "summary.json").exists()

    done = script("train.py", *on, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert without_times(out) == without_times(runs / "gradual")
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (out, runs / "gradual"))
    for part in a.keys() - {"args", "rows"}:
        assert identical(a[part], b[part]), part
    assert (out / "events.csv").read_text() == (runs / "gradual/events.csv").read_text()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (runs / "gradual").iterdir())
    assert train.main(on) == 0 and "finished" in capsys.readouterr().out


def test_resume_keeps_what_may_be_changed_unless_it_is(runs, tmp_path):
    out = shutil.copytree(runs / "gradual", tmp_path / "run")
    settings = json.loads((out / "args.json").read_text())
    assert settings["embedding"] == "pca" and "float" in settings["machine"] and "scikit-learn" in settings["versions"]
    (out / "args.json").write_text(json.dumps(settings | {"device": "cpu", "data_dir": "elsewhere"}))
    argv = ["--resume", "--out", str(out)]
    args = train.resume(train.parser().parse_args(argv), argv)[0]
    assert (args.embedding, args.device, args.data_dir, args.epochs) == ("pca", "cpu", "elsewhere", settings["epochs"])
    argv += ["--embedding", "tsne", "--data-dir", "here", "--dataset", "auto"]
    args = train.resume(train.parser().parse_args(argv), argv)[0]
    assert (args.embedding, args.device, args.data_dir, args.dataset) == ("tsne", "cpu", "here", "digits")


def test_ctrl_c_in_the_last_comparison_says_that_the_runs_are_there(tmp_path, monkeypatch, capsys):
    def ctrl_c(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "main", ctrl_c)
    out, main = tmp_path / "two runs", train.main
    monkeypatch.setattr(train, "main", lambda argv: 0)
    assert main(["--dataset", "digits", "--seeds", "2", "--out", str(out)]) == 130
    assert capsys.readouterr().err == f"\nstopped; all runs are finished: python evaluate.py '{out}'\n"


def test_a_unit_is_named_when_its_class_has_had_a_label(runs):
    classes = [str(digit) for digit in range(10)]
    assert sorted(filter(None, model.load(runs / "gradual/checkpoint.pt").names)) == classes
    assert sorted(model.load(runs / "semi/checkpoint.pt").names) == classes
    assert model.load(runs / "self/checkpoint.pt").names == [None] * 10


def test_weights_that_are_not_finite_are_named():
    network = model.build("cnn", 3)
    train.stop_if_not_finite(torch.zeros(5, 4), network, 0, "infancy")
    network.head.weight.data[1, 2] = math.inf
    with pytest.raises(
        FloatingPointError, match=r"epoch 1 \(infancy\): the weight 'head.weight' is not finite; there is no checkpoint yet"
    ):
        train.stop_if_not_finite(torch.zeros(5, 4), network, 0, "infancy")


def test_the_seed_decides(runs):
    assert without_times(runs / "gradual-again") == without_times(runs / "gradual")
    one, other = (without_times(runs / name)[0] for name in ("gradual", "gradual-s1"))
    assert one[0] == other[0] and all(a != b for a, b in zip(one[1:], other[1:], strict=True))


# ---- bad input ------------------------------------------------------------------------------------------------------


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys, main, args):
    """The one line with which `main` refuses these arguments."""
    assert main([str(a) for a in args]) == 2
    message = capsys.readouterr().err
    assert message.split()[1] == "error:" and len(message.splitlines()) == 1
    return message


@pytest.fixture
def offline(monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)


BAD_VALUES = {
    "--curriculum gradul": "did you mean 'gradual'",
    "--curriculum x": "use gradual, self",
    "--dataset cifar": "did you mean 'cifar10'",
    "--dataset minst": "did you mean 'mnist'",
    "--dataset folder": "did you mean 'folder:PATH'",
    "--dataset folder:nowhere": "nowhere/train is not there",
    "--model vgg-smal": "did you mean 'vgg-small'",
    "--model resnet-18": "did you mean 'resnet18'",
    "--model x": "use cnn, vgg-small",
    "--embedding mds": "use pca, tsne, umap",
    "--embedding umap": "pip install umap-learn",
    "--label-budget 1.5": "--label-budget must be in 0..1, not 1.5",
    "--label-budget -0.1": "--label-budget must be in 0..1",
    "--label-budget nan": "--label-budget must be in 0..1",
    "--label-budget inf": "--label-budget must be in 0..1",
    "--label-budget ten": "--label-budget must be in 0..1, not ten",
    "--label-budget 0": "without labels",
    "--label-budget 0.0001": "no label; one of each class is 0.0",
    "--per-class 4 --batch-size 8": "gives class '0' with its 4 images no label; one of each class is 0.25",
    "--prune -0.1": "--prune must be in 0..1",
    "--prune 1.01": "--prune must be in 0..1",
    "--prune nan": "--prune must be in 0..1",
    "--prune much": "--prune",
    "--prune-units 1.5": "--prune-units must be in 0..1",
    "--prune-units 0.5 --model resnet18": "--prune-units needs a plain chain of layers",
    "--new-unit x": "use imprint, random",
    "--new-unit imprin": "did you mean 'imprint'",
    "--replay 0": "--replay must be in 1..",
    "--replay few": "--replay",
    "--lr 0": "--lr must be in 1e-06..1000",
    "--lr -1": "--lr must be in 1e-06..1000",
    "--lr nan": "--lr must be in 1e-06..1000",
    "--lr inf": "--lr must be in 1e-06..1000",
    "--lr fast": "--lr",
    "--epochs 0": "--epochs must be in 1..",
    "--epochs -3": "--epochs must be in 1..",
    "--epochs 2.5": "--epochs",
    "--epochs two": "--epochs must be in 1..2147483647, a whole number, not two",
    "--epochs 99999999999": "--epochs must be in 1..",
    "--epochs": "--epochs: expected one argument",
    "--batch-size 1": "--batch-size must be in 2..",
    "--batch-size -4": "--batch-size must be in 2..",
    "--batch-size 100000": "--batch-size 100000 is more than the 1347 training images",
    "--per-class 5": "--batch-size 128 is more than the 50 training images",
    "--per-class 0": "--per-class must be in 1..",
    "--per-class -5": "--per-class must be in 1..",
    "--per-class 1.5": "--per-class",
    "--known-classes 0": "--known-classes must be in 1..",
    "--known-classes -1": "--known-classes must be in 1..",
    "--known-classes 11": "--known-classes must be in 1..10",
    "--known-classes seven": "--known-classes",
    "--seed -1": "--seed must be in 0..",
    "--seed 4294967296": "--seed must be in 0..",
    "--class-order -1": "--class-order must be in 0..",
    "--device warp": "--device 'warp' cannot be used",
    "--device cuda:99": "--device 'cuda:99' cannot be used",
    "--device meta": "--device 'meta' cannot be used",
    "--seeds 0": "--seeds must be in 1..",
    "--inject digits": "must be DATASET:class",
    "--inject digits:": "must be DATASET:class",
    "--inject :wolf": "must be DATASET:class",
    "--inject digits:ten": "no class 'ten' in digits",
    "--inject digits:3": "a class '3' is there already",
    "--inject cifr100:wolf": "did you mean 'cifar100'",
    "--inject folder:nowhere:wolf": "nowhere/train is not there",
    "--without nothing": "--without",
    "--without ntxent aggregation propagation supervised": "no loss; keep at least one of aggregation, ntxent",
    "--curriculum labels-only --without supervised": "no loss; keep at least one of supervised",
    "--resume": "--resume needs --out",
    "--resume --out nowhere": "nowhere holds no run",
    "--nonsense": "--nonsense",
    "digits": "unrecognized arguments: digits",
    "--out": "--out: expected one argument",
    f"--out {'x' * 300}": "cannot be written (File name too long)",
}


def test_the_help_tells_defaults_where_there_are_any():
    text = " ".join(train.parser().format_help().split())
    assert "leak, 0..1 (default: 0.1)" in text and "None" not in text and "False" not in text and "[]" not in text
    assert all(f"{name}: {d['model']}, {d['epochs']} epochs" in text for name, d in train.DEFAULTS.items())


@pytest.mark.parametrize("flags, words", BAD_VALUES.items())
def test_bad_values_get_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    args = [*("--dataset digits".split() if "--dataset" not in flags else []), *flags.split()]
    out = [] if "--resume" in flags or "--out" in flags else ["--out", tmp_path / "run"]
    assert words in refused(capsys, train.main, [*out, *args])
    assert not any(tmp_path.iterdir())


# What is spoiled in a good folder of images {train,test}/{ant,bee}/{0,1,2}.png: a function of the folder, and the words.
BAD_FOLDERS = {
    "missing": (lambda d: shutil.rmtree(d), "train is not there"),
    "empty": (lambda d: (shutil.rmtree(d), d.mkdir()), "train is not there"),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("")), "train is not there"),
    "no test": (lambda d: shutil.rmtree(d / "test"), "test is not there"),
    "train empty": (lambda d: [shutil.rmtree(c) for c in (d / "train").iterdir()], "train: Couldn't find any class folder"),
    "one class": (lambda d: [shutil.rmtree(d / s / "bee") for s in ("train", "test")], "only the class 'ant'; at least two"),
    "class not in test": (lambda d: shutil.rmtree(d / "test/bee"), "class 'bee' must be in both train and test"),
    "class not in train": (lambda d: shutil.rmtree(d / "train/bee"), "class 'bee' must be in both train and test"),
    "class without images": (lambda d: [p.unlink() for p in (d / "train/bee").iterdir()], "train: Found no valid file for the classes bee"),
    "torn head": (lambda d: (d / "train/bee/1.png").write_bytes(b"\x89PNG\r\n\x1a\n torn"), "train/bee/1.png: not a readable image"),
    "torn middle": (
        lambda d: (d / "test/ant/2.png").write_bytes((d / "test/ant/2.png").read_bytes()[:200]),
        "test/ant/2.png: not a readable",
    ),
    "no bytes": (lambda d: (d / "train/ant/0.png").write_bytes(b""), "train/ant/0.png: not a readable image"),
    "text": (lambda d: (d / "train/ant/0.png").write_text("not an image"), "train/ant/0.png: not a readable image"),
}


@pytest.mark.parametrize("spoil, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_image_folders_get_one_line(capsys, tmp_path, spoil, words):
    root = make_folder(tmp_path / "set")
    spoil(root)
    assert words in refused(capsys, train.main, ["--dataset", f"folder:{root}", "--batch-size", 2, "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


# What lies in the data folder of a machine without a network: {path: bytes}, the data set, and the words.
CIFAR, MNIST = "cifar-10-batches-py", "MNIST/raw"
TORN = {f"{MNIST}/{s}-{kind}-ubyte": b"\0\0\x08\x03" for s in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")}
BAD_DATA = {
    "nothing": ({}, "cifar10", f"{CIFAR} is not there and could not be downloaded (<urlopen error no network>)"),
    "no mnist": ({}, "mnist", f"{MNIST} is not there and could not be downloaded (Error downloading train-images"),
    "no cifar100": ({}, "cifar100", "cifar-100-python is not there"),
    "incomplete": ({f"{CIFAR}/data_batch_1": b"half"}, "cifar10", f"{CIFAR} is incomplete or altered"),
    "altered": (
        {f"{CIFAR}/{n}": b"altered" for n in ("data_batch_1", "test_batch", "batches.meta")},
        "cifar10",
        "is incomplete or altered",
    ),
    "truncated archive": ({"cifar-10-python.tar.gz": b"\x1f\x8b half"}, "cifar10", "could not be downloaded"),
    "torn mnist": (TORN, "mnist", f"{MNIST} is incomplete or altered"),
    "empty mnist": (dict.fromkeys(TORN, b""), "mnist", f"{MNIST} is incomplete or altered"),
    "a folder of images, torn": ({"cifar100/train/ant/0.png": b"", "cifar100/test/ant/0.png": b""}, "cifar100", "at least two"),
    "injected": ({}, "digits --inject cifar100:wolf", "cifar-100-python is not there"),
}


@pytest.mark.parametrize("there, dataset, words", BAD_DATA.values(), ids=BAD_DATA)
def test_missing_and_altered_data_get_one_line_without_a_network(capsys, tmp_path, offline, there, dataset, words):
    for name, content in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    message = refused(capsys, train.main, ["--data-dir", tmp_path, "--out", tmp_path / "run", "--dataset", *dataset.split()])
    assert words in message and not (tmp_path / "run").exists()
    assert contents(tmp_path).items() >= {Path(name): content for name, content in there.items()}.items()


def test_a_folder_that_may_not_be_read_gets_one_line(capsys, tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "images")

    monkeypatch.setattr(data, "load_dataset", denied)
    flags = ["--dataset", f"folder:{tmp_path}", "--out", tmp_path / "run"]
    assert "Permission denied" in refused(capsys, train.main, flags) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "out, words", [("held", "held is not empty"), ("held/mine.txt", "is a file"), ("held/mine.txt/run", "is a file"), ("run", "not empty")]
)
def test_nothing_is_overwritten(capsys, tmp_path, runs, out, words):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/mine.txt").write_text("kept")
    shutil.copytree(runs / "self", tmp_path / "run")
    before = contents(tmp_path)
    assert words in refused(capsys, train.main, ["--dataset", "digits", "--out", tmp_path / out])
    assert contents(tmp_path) == before


def test_a_run_stopped_before_it_began_may_begin_again(capsys, tmp_path, monkeypatch):
    (tmp_path / "args.json.part").write_text("{")  # all that a kill can leave there
    train.check_out(tmp_path)
    monkeypatch.setattr(data, "load_dataset", lambda *_: exec("raise KeyboardInterrupt"))
    assert train.main(["--dataset", "digits", "--out", str(tmp_path / "run")]) == 130
    assert "stopped; the run had not begun" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(tmp_path):
    args, device = train.parser().parse_args(["--out", str(tmp_path / "run")]), torch.device("cpu")
    train.run_folder(args, device)  # both have found it empty before they read their data
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        train.run_folder(args, device)
    assert contents(tmp_path) == before


def edit_args(**changes):
    """A function that changes the args.json of a run."""
    return lambda d: (d / "args.json").write_text(json.dumps(json.loads((d / "args.json").read_text()) | changes))


def edit_checkpoint(**changes):
    def edit(folder):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(state | {key: change(state[key]) for key, change in changes.items()}, folder / "checkpoint.pt")

    return edit


def edit_bytes(change):
    return lambda folder: (folder / "checkpoint.pt").write_bytes(bytes(change(bytearray((folder / "checkpoint.pt").read_bytes()))))


def flip_one_bit(content):
    content[len(content) // 2] ^= 1
    return content


# What is spoiled in a run, what else is asked for, and the words.
BAD_RESUMES = {
    "truncated": (edit_bytes(lambda b: b[: len(b) // 2]), "", "checkpoint.pt is damaged"),
    "empty": (edit_bytes(lambda b: b""), "", "checkpoint.pt is damaged"),
    "one bit": (edit_bytes(flip_one_bit), "", "checkpoint.pt is damaged (the checksum of"),
    "something else": (lambda d: torch.save([1], d / "checkpoint.pt"), "", "checkpoint.pt is damaged"),
    "version": (edit_checkpoint(version=lambda v: v + 1), "", f"has version {train.VERSION + 1}, this program writes {train.VERSION}"),
    "other data": (edit_checkpoint(bank=lambda bank: bank[1:]), "", "was made with 199 training images, now there are 200"),
    "no args.json": (lambda d: (d / "args.json").unlink(), "", "holds no run (args.json is missing, damaged, or of another version)"),
    "torn args.json": (lambda d: (d / "args.json").write_text('{"lr": 0.'), "", "holds no run"),
    "list in args.json": (lambda d: (d / "args.json").write_text("[]"), "", "holds no run"),
    "nothing in args.json": (lambda d: (d / "args.json").write_text("{}"), "", "holds no run"),
    "a bad value in args.json": (edit_args(lr=-1.0), "", "--lr must be in 1e-06..1000, not -1.0"),
    "lr": (lambda d: None, "--lr 0.5", "was made with --lr 0.06, not 0.5"),
    "epochs": (lambda d: None, "--epochs 16", "was made with --epochs 8, not 16"),
    "dataset": (lambda d: None, "--dataset mnist", "was made with --dataset digits, not mnist"),
    "seed": (lambda d: None, "--seed nan", "--seed"),
}


@pytest.mark.parametrize("spoil, flags, words", BAD_RESUMES.values(), ids=BAD_RESUMES)
def test_what_cannot_be_resumed_is_refused_in_one_line(runs, capsys, tmp_path, spoil, flags, words):
    out = tmp_path / "run"
    shutil.copytree(runs / "gradual", out)
    spoil(out)
    before = contents(out)
    assert words in refused(capsys, train.main, ["--resume", "--out", out, *flags.split()])
    assert contents(out) == before


def test_a_class_without_test_images_is_refused():
    dataset, args = data.load_dataset("digits"), train.parser().parse_args(["--validate", "--batch-size", "32"])
    args.known_classes = 7
    train.check_data(args, dataset)
    keep = dataset.test_y != 4
    with pytest.raises(ValueError, match="class '4' has no test image left by --validate"):
        train.check_data(args, replace(dataset, test_x=dataset.test_x[keep], test_y=dataset.test_y[keep]))


def test_several_runs_go_on_where_they_were_stopped_and_are_compared(capsys, tmp_path):
    command = [*TINY, "--curriculum", "labels-only", "--seeds", "2", "--seed", "3", "--epochs", "2", "--out", str(tmp_path / "both")]
    assert train.main(command) == 0
    assert "labels-only     2" in capsys.readouterr().out
    first, second = (contents(tmp_path / f"both/labels-only-s{seed}") for seed in (3, 4))
    assert json.loads((tmp_path / "both/labels-only-s4/args.json").read_text())["class_order"] == 1
    shutil.rmtree(tmp_path / "both/labels-only-s4")
    assert "is not empty" in refused(capsys, train.main, command)
    assert train.main([*command, "--resume"]) == 0
    assert "labels-only-s3 is finished" in capsys.readouterr().out
    assert contents(tmp_path / "both/labels-only-s3") == first
    assert contents(tmp_path / "both/labels-only-s4").keys() == second.keys()
    assert "unknown --curriculum 'none'" in refused(capsys, train.main, ["--curriculum", "none", "--seeds", "2"])
    all_of_them = ["--curriculum", "all", "--dataset", "digits", "--without", "supervised"]
    assert "leaves 'supervised' no loss" in refused(capsys, train.main, all_of_them)
    nothing_begins = ["--dataset", "digits", "--known-classes", "11", "--seeds", "2", "--out", tmp_path / "never"]
    assert "--known-classes must be in 1..10" in refused(capsys, train.main, nothing_begins)
    for folder in (tmp_path / "typo", tmp_path / "both/labels-only-s3"):
        assert "is not a folder that --seeds" in refused(capsys, train.main, ["--seeds", "2", "--resume", "--out", folder])


def test_unfinished_runs_and_runs_of_the_same_seed_are_spoken_of(runs, tmp_path, capsys):
    for name in ("one", "two", "three"):
        shutil.copytree(runs / "gradual", tmp_path / name)
    (tmp_path / "three/summary.json").unlink()
    assert evaluate.main([str(tmp_path), str(tmp_path / "one"), "--out", str(tmp_path / "out.png")]) == 0
    out, err = capsys.readouterr()
    assert "gradual     2 " in out and "three: not finished, left out" in err and "gradual: 1 of 2 runs repeat a seed" in err


def test_the_picture_of_a_collapsed_network_is_a_point():
    for method in ("pca", "tsne"):
        assert (evaluate.project(torch.zeros(40, 8), method) == 0).all()
        assert evaluate.project(torch.rand(40, 8, generator=seeded()), method).std() > 0


def test_the_life_of_a_large_head_shows_the_units_that_something_happened_to(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, path, dpi: drawn.append(fig.axes[0]))
    classes = [f"kind{c}" for c in range(31)]
    row = {"epoch": 1, "units": 30, "labels": 9, "new_accuracy": None, "open_accuracy": 0.5, "novelty_auroc": None}
    rows = [row | {"epoch": e, "accuracy_kind30": 0.1 * e} for e in (1, 2, 3)]
    events = [dict.fromkeys(train.EVENT) | {"epoch": 2, "event": "recycled", "unit": 7, "class": "kind30"}]
    evaluate.draw_life(rows, events, classes, 30, tmp_path / "life.png")
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["7"]
    assert [text.get_text() for text in drawn[0].texts] == ["kind7", "kind30"]


def test_groups_are_named_after_what_tells_them_apart(runs, tmp_path):
    for name in ("gradual", "semi"):
        shutil.copytree(runs / name, tmp_path / name)
        args = json.loads((runs / name / "args.json").read_text())
        (tmp_path / name / "args.json").write_text(json.dumps(args | {"lr": 0.03}))
    assert list(evaluate.compare([runs / "gradual", tmp_path / "semi"])) == ["gradual", "semi"]  # each with its own rate
    names = list(evaluate.compare([runs / "gradual", tmp_path / "gradual", runs / "semi"]))
    assert names == ["gradual lr=0.06", "gradual lr=0.03", "semi"]
    assert list(evaluate.compare([runs / "gradual", runs / "strict"]))[0] == "gradual epochs=8 new-unit=imprint prune=0.8 prune-units=0.0"


def test_accuracy_against_labels_is_drawn_where_budgets_differ(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, path, dpi: drawn.append(fig.axes[0]))
    shutil.copytree(runs / "gradual", tmp_path / "less")
    args = json.loads((tmp_path / "less/args.json").read_text())
    (tmp_path / "less/args.json").write_text(json.dumps(args | {"label_budget": args["label_budget"] / 2}))
    folders = [runs / "gradual", tmp_path / "less", runs / "self", runs / "supervised"]
    summary = {folder.name: json.loads((folder / "summary.json").read_text()) for folder in folders}
    assert evaluate.draw_budgets(evaluate.compare(folders), tmp_path / "budgets.png")
    lines = {line.get_label(): line.lines[0].get_xydata() for line in drawn[0].containers}
    head, probed = summary["gradual"]["accuracy"], [summary["self"][probe] for probe in ("probe_leaked", "probe")]
    assert np.allclose(lines.pop("gradual"), [(10, 100 * head), (20, 100 * head)])
    assert np.allclose(lines.pop("self, then a probe"), [(20, 100 * probed[0]), (100, 100 * probed[1])])
    assert np.allclose(lines.pop("supervised"), [(100, 100 * summary["supervised"]["accuracy"])]) and not lines
    hollow = [line for line in drawn[0].lines if line.get_markerfacecolor() == "white"]
    assert sum(len(line.get_xdata()) for line in hollow) == 5  # all of them are of a single run
    assert not evaluate.draw_budgets(evaluate.compare([runs / "gradual", runs / "semi"]), tmp_path / "none.png")


def test_comparisons_are_drawn_in_per_cent_and_tell_mean_and_spread(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, path, dpi: drawn.append(fig.axes))
    shutil.copytree(runs / "gradual", tmp_path / "again")
    summary = json.loads((runs / "gradual/summary.json").read_text())
    (tmp_path / "again/summary.json").write_text(json.dumps(summary | {"accuracy": summary["accuracy"] + 0.1}))
    evaluate.draw_comparison(evaluate.compare([runs / "gradual", tmp_path / "again", runs / "self"]), tmp_path / "none.png")
    accuracy, clusters = drawn[0]
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in (c for c in accuracy.containers if hasattr(c, "patches"))}
    assert np.allclose(bars["head"], [100 * summary["accuracy"] + 5, 0])  # self trains none
    texts = {text.get_text() for text in accuracy.texts}
    assert {f"{100 * summary['accuracy'] + 5:.1f}", f"{100 * summary['knn']:.1f}"} <= texts
    assert f"{summary['ari']:.2f}" in {text.get_text() for text in clusters.texts}
    spread = next(c for c in accuracy.containers if not hasattr(c, "patches"))  # error bars of the head
    assert np.allclose(np.ptp(spread.lines[2][0].get_segments()[0][:, 0]), 2 * np.std([0, 10], ddof=1))


def test_progress_is_drawn_of_every_run_that_trains_a_head(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, path, dpi: drawn.append(fig.axes[0]))
    shutil.copytree(runs / "gradual", tmp_path / "again")
    result = evaluate.compare([runs / "gradual", tmp_path / "again", runs / "self"])
    assert evaluate.draw_progress(result, tmp_path / "none.png") and len(drawn[0].lines) == 2
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == [next(iter(result))]
    last = json.loads((runs / "gradual/summary.json").read_text())["accuracy"]
    assert math.isclose(drawn[0].lines[1].get_ydata()[-1], 100 * last, rel_tol=1e-4)
    assert not evaluate.draw_progress(evaluate.compare([runs / "self"]), tmp_path / "none.png")


def test_bad_comparisons_get_one_line(runs, capsys, tmp_path):
    shutil.copytree(runs / "self", tmp_path / "torn")
    (tmp_path / "torn/summary.json").write_text("{")
    (tmp_path / "torn/checkpoint.pt").write_bytes(b"torn")
    for other, text in (("other", '{"curriculum": "self"}'), ("list", "[]")):
        shutil.copytree(runs / "self", tmp_path / other)
        (tmp_path / other / "args.json").write_text(text)
    (tmp_path / "begun").mkdir()
    shutil.copy(runs / "self/args.json", tmp_path / "begun")
    for args, words in (
        ([tmp_path / "nothing"], "nothing: not a finished run (args.json is not there)"),
        ([tmp_path / "begun"], "begun: not a finished run (summary.json is not there)"),
        ([runs / "self", tmp_path / "torn"], "torn: damaged"),
        ([tmp_path / "other"], "other: not a run"),
        ([tmp_path / "list"], "list: not a run"),
        ([runs / "self", "--out", tmp_path / "progress.png"], "progress.png: this name is for another figure"),
        ([runs / "self", "--out", tmp_path / "nowhere/figure.png"], "nowhere/figure.png"),
        ([runs / "self", runs / "semi", "--compact", tmp_path / "small.pt"], "--compact takes one run, not 2"),
        ([tmp_path / "begun", "--compact", tmp_path / "small.pt"], "begun: no checkpoint.pt that can be read"),
        ([tmp_path / "torn", "--compact", tmp_path / "small.pt"], "torn: no checkpoint.pt that can be read"),
        ([runs / "self", "--compact", tmp_path / "nowhere/small.pt"], "nowhere/small.pt: its folder is not there"),
        ([runs / "self", "--compact", tmp_path / "begun"], "Is a directory"),
    ):
        assert words in refused(capsys, evaluate.main, args)


class StaysOn(TorchDispatchMode):
    """Refuses every operation that puts its result on another device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        assert all(t.device.type == self.device for t in tree_leaves(out) if torch.is_tensor(t) and t.ndim), operation
        return out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_training_step_never_waits_for_the_device(device, monkeypatch):
    """Fake tensors have a device and no values: a step that asks for a value, or leaves the device, fails on them.

    Without a GPU the backward pass of the fake one is left out, for it needs a real stream; on the CPU it is there.
    """
    if device == "cuda":
        monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    n, classes = 300, 10
    with FakeTensorMode(), torch.device(device):
        y, x = torch.arange(n) % classes, torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
        dataset = data.Dataset(x, y, x, y, [], (), (), flip=True, color=True, scale=(0.2, 1.0))
        network, average = (model.build("vgg-small", classes) for _ in range(2))
        optimizer = torch.optim.SGD(train.parameter_groups(network), lr=0.01, momentum=0.9, nesterov=True)
        bank, units = losses.MemoryBank(n, 128, device=device), grow_prune.Units(range(classes), device=device)
        args, monitor = argparse.Namespace(batch_size=32), grow_prune.ConfusionMonitor(n, device=device)
        run = train.Run(args, dataset, y, device == "cpu", network, average, optimizer, bank, units, monitor)
        run.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in network.encoder.named_parameters() if w.ndim > 1}
        every, named = torch.ones(n, dtype=torch.bool), torch.ones(classes, dtype=torch.bool)
        clusters = torch.zeros(3, n, dtype=torch.long)
        lesson = train.Lesson(dict.fromkeys(train.TERMS, 1.0), every, named, y, y, torch.ones(n), clusters)
        with StaysOn(device):
            terms = train.learn(run, lesson, 0, torch.arange(32), None)
        assert terms.keys() == set(train.TERMS)
        with pytest.raises(DataDependentOutputException):  # what a step may not do
            terms["ntxent"].item()


def test_growth_does_not_compile_the_encoder_again():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = model.build("cnn", 7)
    network.encoder.compile(backend=backend)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.rand(4, 3, 32, 32))[2].mean().backward()
        optimizer.step()
        grow_prune.grow_head(network.head, optimizer)
    assert len(graphs) == 1 and network.head.out_features == 10


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_a_gpu
def test_a_run_goes_on_from_device_to_device(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    write, flags = train.write_checkpoint, [*TINY, "--epochs", "8"]
    for epochs, device in ((3, "cpu"), (5, "cuda"), (7, "cpu")):  # the second trains the head for the first time on a GPU

        def stop(path, state, epochs=epochs):
            write(path, state)
            if len(state["rows"]) == epochs:
                raise Stop

        monkeypatch.setattr(train, "write_checkpoint", stop)
        with pytest.raises(Stop):
            train.main([*flags, "--out", str(tmp_path / "run"), "--device", device])
        flags = ["--resume"]
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--device", "cuda"]) == 0
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 9 and (tmp_path / "run" / "summary.json").exists()


@needs_a_gpu
def test_a_recorded_step_does_what_the_step_does():
    """Of two networks that begin alike, one learns from steps that are recorded: weights and memory stay together, and rates are heeded."""
    n, device = 12_100, torch.device("cuda")  # a bank of which each step looks at one half
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device), (torch.arange(n) % 10).to(device)
    dataset = data.Dataset(x, y, x, y, [str(c) for c in range(10)], (0.5,) * 3, (0.25,) * 3, flip=True, color=True, scale=(0.2, 1.0))
    args = argparse.Namespace(seed=0, model="cnn", lr=0.01, batch_size=64)
    everything, named = (torch.ones(size, dtype=torch.bool, device=device) for size in (n, 10))
    ends = []
    for record in (False, True):
        run = train.begin(args, dataset, 10)
        run.bf16 = False
        run.bank.rows = F.normalize(torch.randn(n, 128, device=device, generator=torch.Generator(device).manual_seed(1)), dim=1)
        run.masks = grow_prune.prune_smallest(run.network.encoder, 0.5)
        draws, coins = torch.Generator().manual_seed(2), torch.Generator(device).manual_seed(3)
        lesson = train.Lesson(dict.fromkeys(train.TERMS, 1.0), everything, named, y, y, torch.ones(n, device=device), y.repeat(3, 1))
        functions = train.step_functions(run, lesson, coins)
        assert [type(function) for function in functions] == [train.Recorded] * 2
        if not record:
            functions = [function.function for function in functions]
        heard = []
        for step, index in enumerate(data.batches(everything, everything, 64, 12, 0.5, draws)):
            train.set_learning_rate(run.optimizer, 0.01 if step < 10 else 0.0)
            heard.append(torch.stack(list(functions[step % 2](index).values())))
            if step == 9:
                held = run.network.encoder[0].weight.detach().clone()
        assert torch.equal(held, run.network.encoder[0].weight)  # nothing is learned at a rate of 0
        ends.append((torch.stack(heard), held, run.bank.rows, run.average.head.weight.detach(), run.units.utility))
    for plain, recorded in zip(*ends, strict=True):
        torch.testing.assert_close(plain, recorded, rtol=1e-2, atol=1e-3)

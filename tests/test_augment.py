"""Batch augmentation: each transform against a loop over samples in NumPy given the same random numbers, its
distribution, its gradients; mixing in training; test-time augmentation"""
import copy, math, pickle, random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torcheval.metrics import MulticlassAccuracy

from fastswa.callbacks.augment import TTA, AugmentCB, CutMixCB, MixUpCB, log_mean_probs, tta, tta_views
from fastswa.data.transforms import (RandCopy, RandCrop, RandErase, RandFlip, cutmix, mixup, rand_copy, rand_crop,
                                     rand_erase, rand_flip)
from fastswa.callbacks.basics import BatchTransformCB
from fastswa.callbacks.metrics import MetricsCB
from fastswa.random_state import set_seed
from fastswa.data.loaders import DataLoaders
from fastswa.data.sources import toy_images
from fastswa.training.events import Callback
from fastswa.nets.init import init_weights
from fastswa.nets.layers import act_gr, get_model
from fastswa.training.learner import Learner, TrainCB, TrainLearner
from fastswa.callbacks.batchnorm import BNUpdateCB
from fastswa.callbacks.swa import EMACB

SHAPES = [(5, 1, 28, 28), (3, 3, 7, 11), (4, 2, 16, 9), (1, 1, 5, 5), (2, 5, 1, 6), (1, 1, 1, 1)]
PLAIN = dict(erase=rand_erase, copy=rand_copy, crop=rand_crop, zeros=partial(rand_crop, mode='zeros'), flip=rand_flip)
MIXED = dict(mixup=partial(mixup, classes=4, alpha=1.), cutmix=partial(cutmix, classes=4))


def gen(seed=0): return torch.Generator().manual_seed(seed)
def images(*shape, dtype=torch.float32, seed=0):
    return (100 + 40*torch.randn(shape, generator=gen(seed), dtype=torch.float64)).to(dtype)
def labels(n, classes=4, seed=0): return torch.randint(classes, (n,), generator=gen(seed))
def same(a, b): return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
def near(count, n, p, sigmas=5): assert abs(count - n*p) <= sigmas*math.sqrt(n*p*(1 - p)) + 1e-9, (count, n*p)
def apply(name, x, g=None):
    if name in PLAIN: return PLAIN[name](x, generator=g)
    return MIXED[name](x, labels(len(x)), generator=g)[0]


# ---- exactly what a loop over samples makes of the same random numbers

def side(n, pct): return max(1, math.floor(round(pct*n, 6))) if pct else 0

def drawn(g, n, *highs): return [torch.randint(h, (n, 1, 1), generator=g).flatten().numpy() for h in highs]

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('pct,max_num', [(0.2, 4), (0.5, 2), (1., 1), (0., 3), (0.3, 0)])
def test_erase_is_the_loop(shape, pct, max_num):
    x, (n, c, h, w) = images(*shape), shape
    got, g, a = rand_erase(x, pct, max_num, gen(3)), gen(3), x.double().numpy()
    sh, sw = side(h, pct), side(w, pct)
    num, want = drawn(g, n, max_num + 1)[0], a.copy()
    for k in range(max_num):
        t, l = drawn(g, n, h - sh + 1, w - sw + 1)
        noise = torch.randn(n, c, sh, sw, generator=g).double().numpy()*a.std() + a.mean()
        for i in range(n):
            if max_num - k <= num[i]: want[i, :, t[i]:t[i] + sh, l[i]:l[i] + sw] = noise[i].clip(a.min(), a.max())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-4)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('pct,max_num', [(0.2, 4), (0.5, 3), (1., 1)])
def test_copy_is_the_loop(shape, dtype, pct, max_num):
    x, (n, _, h, w) = images(*shape, dtype=dtype), shape
    got, g, a = rand_copy(x, pct, max_num, gen(3)), gen(3), x.double().numpy()
    sh, sw = side(h, pct), side(w, pct)
    num, want = drawn(g, n, max_num + 1)[0], a.copy()
    for k in range(max_num):
        t, l, ft, fl = drawn(g, n, *[h - sh + 1, w - sw + 1]*2)
        for i in range(n):
            if max_num - k <= num[i]:
                want[i, :, t[i]:t[i] + sh, l[i]:l[i] + sw] = a[i, :, ft[i]:ft[i] + sh, fl[i]:fl[i] + sw]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double().numpy(), want)

@pytest.mark.parametrize('mode,np_mode', [('reflect', 'reflect'), ('zeros', 'constant')])
@pytest.mark.parametrize('pad', [0, 1, 4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8, torch.bfloat16])
def test_crop_is_the_loop(mode, np_mode, pad, dtype):
    for shape in SHAPES:
        n, _, h, w = shape
        if mode == 'reflect' and pad >= min(h, w): continue
        x, g = images(*shape, dtype=dtype), gen(3)
        got, a = rand_crop(x, pad, mode, gen(3)), x.double().numpy()
        down, right = torch.randint(2*pad + 1, (2, n, 1), generator=g).view(2, n).numpy() - pad
        for i in range(n):
            big = np.pad(a[i], ((0, 0), (pad, pad), (pad, pad)), mode=np_mode)
            want = big[:, pad - down[i]:pad - down[i] + h, pad - right[i]:pad - right[i] + w]
            np.testing.assert_array_equal(got[i].double().numpy(), want)

@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8, torch.bfloat16])
def test_flip_is_the_loop(dtype):
    for shape in SHAPES:
        x = images(*shape, dtype=dtype)
        flipped = torch.rand(shape[0], 1, 1, 1, generator=gen(3)).flatten().numpy() < 0.3
        want = np.stack([a[..., ::-1] if f else a for a, f in zip(x.double().numpy(), flipped)])
        np.testing.assert_array_equal(rand_flip(x, 0.3, gen(3)).double().numpy(), want)

def pairs(g, n, alpha, p):
    "λ and partners by the formula through Student's t, as the paper has it, in float64"
    u, v, chance = torch.rand(3, n, generator=g).double().numpy()
    t = np.sqrt(2*alpha*(u**(-1/alpha) - 1))*np.cos(2*np.pi*v)
    lam = 0.5 + 0.5*t/np.sqrt(2*alpha + t**2)
    return np.where(chance < p, lam, 1.), torch.randperm(n, generator=g).numpy()

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('alpha,p', [(0.4, 1.), (1., 1.), (3., 0.5)])
def test_mixup_is_the_loop(shape, alpha, p):
    x, y = images(*shape), labels(shape[0])
    gx, gy = mixup(x, y, 4, alpha, p, gen(3))
    lam, other = pairs(gen(3), len(x), alpha, p)
    a = x.double().numpy()
    for i, (s, j) in enumerate(zip(lam, other)):
        np.testing.assert_allclose(gx[i].numpy(), s*a[i] + (1 - s)*a[j], rtol=1e-5, atol=1e-4)
        want = np.zeros(4)
        want[y[i]] += s
        want[y[j]] += 1 - s
        np.testing.assert_allclose(gy[i].numpy(), want, atol=1e-6)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8])
@pytest.mark.parametrize('alpha,p', [(1., 1.), (3., 0.5)])
def test_cutmix_is_the_loop(shape, dtype, alpha, p):
    x, y, (n, _, h, w) = images(*shape, dtype=dtype), labels(shape[0]), shape
    gx, gy = cutmix(x, y, 4, alpha, p, gen(3))
    lam, other = pairs(g := gen(3), n, alpha, p)
    cy, cx = (torch.randint(m, (n,), generator=g).numpy() for m in (h, w))
    a = x.double().numpy()
    for i, (s, j) in enumerate(zip(lam, other)):
        sh, sw = int(h*math.sqrt(1 - s)), int(w*math.sqrt(1 - s))
        rows, cols = slice(max(cy[i] - sh//2, 0), cy[i] - sh//2 + sh), slice(max(cx[i] - sw//2, 0), cx[i] - sw//2 + sw)
        pasted = np.zeros((h, w), bool)
        pasted[rows, cols] = True
        np.testing.assert_array_equal(gx[i].double().numpy(), np.where(pasted, a[j], a[i]))
        want = np.zeros(4)
        want[y[i]] += 1 - pasted.mean()
        want[y[j]] += pasted.mean()
        np.testing.assert_allclose(gy[i].numpy(), want, atol=1e-6)


# ---- distributions; the bounds are those of the binomial and normal laws at five standard deviations

def marks(n, h, w): return torch.arange(n*h*w, dtype=torch.float64).view(n, 1, h, w)     # each pixel another number

def test_every_number_and_place_of_rectangles_is_equally_likely():
    n, h, w = 20_000, 5, 8                                          # 2 by 3 pixels: 4 times 6 places
    changed = (rand_erase(marks(n, h, w), 0.4, 1, gen()) != marks(n, h, w))[:, 0]
    hit = changed.any(-1).any(-1)
    near(hit.sum().item(), n, 1/2)
    rows, cols = changed.any(2)[hit].int(), changed.any(1)[hit].int()
    assert set(rows.sum(1).tolist()) == {2} and set(cols.sum(1).tolist()) == {3}
    place = rows.argmax(1)*6 + cols.argmax(1)
    for count in torch.bincount(place, minlength=24).tolist(): near(count, hit.sum().item(), 1/24)
    thin = rand_erase(marks(n, 100, 1), 0.01, 3, gen()) != marks(n, 100, 1)
    # of three, some may coincide
    for k, count in enumerate(torch.bincount(thin.sum((1, 2, 3)), minlength=4).tolist()):
        p = [1/4, 1/4*(1 + 1/100 + 1/100**2), 1/4*(99/100 + 3*99/100**2), 1/4*99*98/100**2][k]
        near(count, n, p)

def test_share_of_erased_pixels_is_as_large_as_stated():
    "29 % of 100 pixels are 29, though 0.29*100 is less in floating point; and a pixel is left of a tiny image's 20 %"
    x = marks(500, 100, 100)
    assert (rand_erase(x, 0.29, 1, gen()) != x).sum((1, 2, 3)).unique().tolist() == [0, 29*29]
    assert (rand_erase(marks(500, 4, 4), 0.2, 1, gen()) != marks(500, 4, 4)).sum((1, 2, 3)).unique().tolist() == [0, 1]

def test_noise_has_the_mean_and_deviation_of_the_batch_within_its_bounds():
    x = torch.rand(4000, 1, 8, 8, generator=gen())*3 - 1            # uniform, which cuts the normal noise off
    new = rand_erase(x, 1., 1, gen())
    noise = new[(new != x).all(dim=(1, 2, 3))].double()
    assert len(noise) > 1500 and (noise.min(), noise.max()) == (x.min(), x.max())
    m, s, lo, hi = x.double().mean().item(), x.double().std().item(), x.min().item(), x.max().item()
    grid = np.linspace(-8, 8, 400_001)                              # moments of the clipped normal, by quadrature
    pdf, val = np.exp(-grid**2/2)/np.sqrt(2*np.pi)*(grid[1] - grid[0]), (m + s*grid).clip(lo, hi)
    mean = (val*pdf).sum()
    var, fourth = ((val - mean)**2*pdf).sum(), ((val - mean)**4*pdf).sum()
    assert abs(noise.mean().item() - mean) < 5*math.sqrt(var/noise.numel())
    assert abs(noise.var().item() - var) < 5*math.sqrt((fourth - var**2)/noise.numel())
    per_pixel = noise.flatten(1).T                                  # independent from pixel to pixel and image to image
    assert abs(np.corrcoef(per_pixel[0], per_pixel[1])[0, 1]) < 5/math.sqrt(len(noise))

def test_a_normalised_batch_stays_normalised():
    "Black rectangles would move the mean by half a standard deviation or so"
    x = images(2000, 1, 28, 28)
    new = rand_erase((x - x.mean())/x.std(), 0.5, 4, gen())
    assert abs(new.mean()) < 0.005 and abs(new.std() - 1) < 0.005

def test_crop_and_flip_are_uniform():
    n, pad = 20_000, 2
    # of what comes to the centre
    at = (rand_crop(marks(n, 9, 9), pad, generator=gen()) - marks(n, 9, 9)).long()[:, 0, 4, 4]
    counts = {9*d + r: 0 for d in range(-pad, pad + 1) for r in range(-pad, pad + 1)}
    for v in at.tolist(): counts[v] += 1
    for count in counts.values(): near(count, n, 1/25)
    for p in (0., 0.3, 1.):
        near((rand_flip(marks(n, 1, 2), p, gen()) != marks(n, 1, 2)).any(-1).sum().item(), n, p)

def test_copies_come_from_everywhere():
    n = 20_000
    new = rand_copy(marks(n, 1, 6), 0.17, 1, gen()) - torch.arange(n).view(-1, 1, 1, 1)*6
    changed = new != torch.arange(6)
    near(changed.any(-1).sum().item(), n, 1/2*5/6)                  # one place of six is the same
    for count in torch.bincount(new[changed].long(), minlength=6).tolist(): near(count, int(changed.sum()), 1/6)

@pytest.mark.parametrize('alpha,cdf', [(0.5, lambda x: 2/np.pi*np.arcsin(np.sqrt(x))), (1., lambda x: x),
                                       (2., lambda x: x*x*(3 - 2*x)), (3., lambda x: x**3*(10 - 15*x + 6*x*x))])
def test_shares_follow_the_beta_distribution(alpha, cdf):
    "Kolmogorov and Smirnov's distance, which is below 2.2/√n with a probability of 0.9999"
    n = 20_000
    y = F.one_hot(torch.arange(n) % 2, 2).float()
    x = torch.zeros(n, 1, 1, 1)
    x[:, 0, 0, 0] = torch.arange(n)
    mixed = mixup(torch.cat([x, x*0 + 1], 1), y, alpha=alpha, generator=gen())[1]
    lam, other = pairs(gen(), n, alpha, 1.)
    apart = np.arange(n) % 2 != other % 2
    share = np.sort(mixed[torch.arange(n), torch.arange(n) % 2].double().numpy()[apart])
    ecdf = np.arange(1, len(share) + 1)/len(share)
    assert np.abs(ecdf - cdf(share)).max() < 2.2/math.sqrt(len(share))
    near((share < 0.5).sum(), len(share), 0.5)

@pytest.mark.parametrize('alpha', [1e-4, 0.01, 50., 1e6, math.inf])
def test_extreme_alphas_give_shares(alpha):
    "A ratio of two Gamma variates would be 0/0 for small ones"
    n = 1000
    y = mixup(torch.rand(n, 1, 2, 2), torch.arange(n), n, alpha, generator=gen())[1]
    assert y.isfinite().all() and (y >= 0).all() and torch.allclose(y.sum(1), torch.ones(n))
    top = y.max(1).values
    if alpha < 1:                                                   # in logits z the density goes as (σ(z)σ(-z))^α
        z = np.linspace(-50, 50, 200_001)
        weight = np.exp(-alpha*2*np.logaddexp(z/2, -z/2))*(z[1] - z[0])
        near((top < 0.999).sum().item(), n,
             weight[np.abs(z) < math.log(999)].sum()/(weight.sum() + 2*math.exp(-50*alpha)/alpha))
    else: assert ((top - 0.5).abs() < 5*math.sqrt(1/(8*alpha + 4)) + 1e-6)[top < 1].all() and (top < 1).sum() >= n - 5

def test_p_is_the_share_of_mixed_samples():
    n = 20_000
    for mix in mixup, cutmix:
        x = torch.arange(n, dtype=torch.float64).view(n, 1, 1, 1).expand(n, 1, 6, 6)
        y = F.one_hot(torch.arange(n) % 2, 2).double()
        changed = (mix(x, y, alpha=50., p=0.3, generator=gen())[0] != x).any(-1).any(-1).any(-1)
        near(changed.sum().item(), n, 0.3*(1 - 1/n))

def test_cutmix_centre_may_be_anywhere():
    "As in the paper, so the border is covered less often than the middle, and the share kept is above λ on average"
    n, h, w = 20_000, 7, 10
    x = torch.arange(2.).view(2, 1, 1, 1).expand(2, 1, h, w).repeat(n//2, 1, 1, 1)
    kept, rng = [], np.random.default_rng(0)
    for _ in range(n):
        s = math.sqrt(1 - rng.beta(1, 1))
        sh, sw, t, l = int(h*s), int(w*s), rng.integers(h), rng.integers(w)
        t, l = t - sh//2, l - sw//2
        kept.append(1 - (min(t + sh, h) - max(t, 0))*(min(l + sw, w) - max(l, 0))/(h*w))
    new, y = cutmix(x, torch.arange(n) % 2, 2, generator=gen())
    _, other = pairs(gen(), n, 1., 1.)
    share = y[torch.arange(n), torch.arange(n) % 2].double().numpy()[np.arange(n) % 2 != other % 2]
    assert abs(share.mean() - np.mean(kept)) < 5*math.sqrt(np.var(kept)*(1/n + 1/len(share)))
    torch.testing.assert_close(y[:, 1], new.mean((1, 2, 3)))


# ---- what every transform promises

@pytest.mark.parametrize('name', [*PLAIN, *MIXED])
class TestAll:
    def test_samples_change_independently(self, name):
        "The same image many times: not one region for the whole batch"
        x = images(1, 1, 16, 16).repeat(64, 1, 1, 1)
        x = x + torch.arange(64).view(-1, 1, 1, 1)*1e3 if name in MIXED else x
        new = apply(name, x, gen())
        deltas = {tuple((a - b).flatten().tolist()) for a, b in zip(new, x)}
        assert len(deltas) == 2 if name == 'flip' else len(deltas) > 10

    def test_input_is_left_alone(self, name):
        x = images(6, 2, 12, 10)
        kept, version = x.clone(), x._version
        new = apply(name, x, gen())
        assert same(x, kept) and x._version == version
        new.fill_(7.)                                               # what comes out is no view of it
        assert same(x, kept)

    def test_own_generator(self, name):
        "The same numbers again, and nobody else's generator moves"
        x, before = images(6, 2, 12, 10), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        a, b, c = apply(name, x, gen(5)), apply(name, x, gen(5)), apply(name, x, gen(6))
        assert same(a, b) and not same(a, c)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]

    def test_global_generator(self, name):
        "torch's only: the seeds of Python and NumPy make no difference"
        x, res = images(6, 2, 12, 10), []
        for seed in 0, 1:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(7)
            res.append(apply(name, x))
        assert same(*res) and not same(res[0], apply(name, x))

    def test_dtypes_layouts_and_empty_batches(self, name):
        for dtype in torch.float32, torch.float64, torch.bfloat16, torch.float16:
            assert apply(name, images(6, 3, 12, 10, dtype=dtype), gen()).dtype == dtype
            assert apply(name, images(0, 3, 12, 10, dtype=dtype), gen()).shape == (0, 3, 12, 10)
        x = images(6, 3, 12, 10)
        for layout in x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), \
                torch.cat([x, x])[::2].copy_(x):
            # noise: sums in another order
            torch.testing.assert_close(apply(name, layout, gen()), apply(name, x, gen()))
        x = x[:1].expand(6, 3, 12, 10)                              # all in one place in memory
        torch.testing.assert_close(apply(name, x, gen()), apply(name, x.contiguous(), gen()))

    def test_gradients_reach_the_input(self, name):
        x = torch.rand(4, 2, 5, 6, generator=gen(), dtype=torch.float64).requires_grad_()
        # the noise is data: no gradient goes through its statistics
        if name == 'erase':
            new = rand_erase(x, 0.4, generator=gen())
            new.sum().backward()
            np.testing.assert_array_equal(x.grad.numpy(), (new == x).double().numpy())
        else: assert torch.autograd.gradcheck(lambda x: apply(name, x, gen()), x)

    def test_no_loop_over_samples(self, name):
        class Count(TorchDispatchMode):
            n = 0
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.n += 1
                return func(*args, **kwargs or {})
        counts = []
        for n in 2, 64:
            x = images(n, 1, 12, 10)
            with Count() as c: apply(name, x, gen())
            counts.append(c.n)
        assert counts[0] == counts[1]

    def test_no_number_is_read_on_the_way(self, name):
        "On the meta device, where there are none: so nothing waits for a GPU either"
        x, y = torch.empty(8, 3, 16, 12, device='meta'), torch.empty(8, dtype=torch.int64, device='meta')
        # one of another device will do: the numbers are drawn there
        for g in None, gen():
            if name in PLAIN: assert PLAIN[name](x, generator=g).shape == x.shape
            else:
                new, shares = MIXED[name](x, F.one_hot(y, 4).float(), generator=g)
                assert new.shape == x.shape and shares.shape == (8, 4)
        assert not torch.equal(g.get_state(), gen().get_state())

    def test_no_images(self, name):
        for x in torch.zeros(3, 12, 10), torch.zeros(2, 0, 4, 4), torch.zeros(2, 1, 0, 4), torch.zeros(12), [1, 2]:
            with pytest.raises(ValueError, match=r'images must be a tensor \(N, C, H, W\); got'): apply(name, x)

def test_a_constant_batch_and_a_single_pixel():
    for x in torch.full((5, 1, 8, 8), 3.), torch.full((1, 1, 1, 1), 3.):
        for name in [*PLAIN, *MIXED]:
            if name == 'crop' and x.numel() == 1 or name == 'zeros': continue
            torch.testing.assert_close(apply(name, x, gen()), x)

BAD = [(rand_erase, dict(pct=1.2), 'pct must be a number from 0 to 1; got 1.2'),
       (rand_copy, dict(pct=math.nan), 'got nan'),
       (rand_erase, dict(pct='0.2'), "got '0.2'"),
       (rand_copy, dict(max_num=-1), 'max_num must be a whole number, 0 or more; got -1'),
       (rand_copy, dict(max_num=2.), 'got 2.0'), (rand_crop, dict(pad=-1), 'got -1'),
       (rand_crop, dict(pad=1.5), 'whole number'),
       (rand_crop, dict(pad=8), 'smaller than the images'),
       (rand_crop, dict(mode='edge'), "'reflect' or 'zeros'; got 'edge'"),
       (rand_flip, dict(p=-0.1), 'p must be a number from 0 to 1; got -0.1')]

@pytest.mark.parametrize('f,options,message', BAD)
def test_bad_options_are_refused_where_they_are_given(f, options, message):
    with pytest.raises(ValueError, match=message): f(images(2, 1, 9, 8), **options)
    if 'pad' in options and options['pad'] == 8: return             # too much for these images only
    cls = {rand_erase: RandErase, rand_copy: RandCopy, rand_crop: RandCrop, rand_flip: RandFlip}[f]
    with pytest.raises(ValueError, match=message): cls(**options)

def test_bytes_are_moved_but_not_mixed_with_noise():
    x = images(4, 3, 9, 9).clamp(0, 255).byte()
    for f in rand_erase, partial(mixup, y=labels(4), classes=4):
        with pytest.raises(TypeError, match=r'such as x.float\(\)/255; got torch.uint8'): f(x)
    for f in rand_copy, rand_crop, rand_flip: assert f(x).dtype == torch.uint8
    x, y = cutmix(x, labels(4), 4)
    assert (x.dtype, y.dtype) == (torch.uint8, torch.float32)

def test_modules():
    x = images(8, 1, 12, 12)
    for m, f in ((RandErase(0.3, 2), partial(rand_erase, pct=0.3, max_num=2)),
                 (RandCopy(0.3, 2), partial(rand_copy, pct=0.3, max_num=2)),
                 (RandCrop(3, 'zeros'), partial(rand_crop, pad=3, mode='zeros')),
                 (RandFlip(0.7), partial(rand_flip, p=0.7))):
        torch.manual_seed(3)
        got = m(x)
        assert same(got, f(x, generator=gen(3)))
        for o in copy.deepcopy(m), pickle.loads(pickle.dumps(m)):
            torch.manual_seed(3)
            assert same(o(x), got) and not o.state_dict()
        assert m.eval()(x) is x
    assert repr(RandErase(0.3, 2)) == 'RandErase(pct=0.3, max_num=2)'
    assert same(RandErase(generator=gen(3))(x), RandErase(generator=gen(3))(x))


# ---- mixing: targets

@pytest.mark.parametrize('mix', [mixup, cutmix])
def test_targets_of_mixing(mix):
    x, y = images(6, 1, 8, 8), labels(6)
    soft = F.one_hot(y, 4).float()*0.9 + 0.025                      # shares of classes are taken as they are
    (a, ya), (b, yb) = mix(x, y, 4, generator=gen()), mix(x, soft, generator=gen())
    assert same(a, b)
    torch.testing.assert_close(yb, ya*0.9 + 0.025)
    assert mix(x, y.int(), 4)[1].shape == (6, 4) and mix(x, y.bool(), 2)[1].shape == (6, 2)
    assert mix(x.double(), y, 4)[1].dtype == torch.float64 and mix(x.bfloat16(), y, 4)[1].dtype == torch.float32
    assert same(mix(x[:1], y[:1], 4)[0], x[:1]) and mix(x[:1], y[:1], 4)[1].tolist() == F.one_hot(y[:1], 4).tolist()
    assert mix(x[:0], y[:0], 4)[1].shape == (0, 4)
    for bad, message in ((y[:3], '6 images have 3 targets'), (y.float(), r'got \(6,\) of torch.float32'),
                         (F.one_hot(y, 4), r'got \(6, 4\) of torch.int64'), (y, 'how many classes there are')):
        with pytest.raises(ValueError, match=message): mix(x, bad)
    bad = ((dict(alpha=0), 'alpha must be a number above 0; got 0'), (dict(p=2), 'p must be'),
           (dict(classes=0), 'classes must be'))
    for options, message in bad:
        with pytest.raises(ValueError, match=message): mix(x, y, **dict(dict(classes=4), **options))
        with pytest.raises(ValueError, match=message): {mixup: MixUpCB, cutmix: CutMixCB}[mix](**options)
    with pytest.raises(RuntimeError, match='Class values'): mix(x, y + 3, 4)


# ---- in training

def loaders(n=64, bs=16, classes=4):
    x, y = images(n, 1, 8, 8)/100 - 1, labels(n, classes)
    x = x + F.one_hot(y, 8).float()[:, None, :, None]*2
    batches = list(zip(x.split(bs), y.split(bs)))
    return DataLoaders(batches, batches[:2])

def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

class Watch(Callback):
    order = 20
    def before_fit(self, learn): self.rows = []
    def after_batch(self, learn):
        x, y, *rest = learn.batch
        self.rows.append(dict(training=learn.training, x=x, y=y, rest=rest, preds=learn.preds.detach(),
                              loss=learn.loss.item()))

@pytest.mark.parametrize('cb', [MixUpCB, CutMixCB])
def test_mixing_in_training(cb, capsys):
    "Loss on shares, metrics on the class with the largest share; validation and the loader's own tensors as ever"
    dls, see = loaders(), Watch()
    kept = copy.deepcopy(dls.train)
    cbs = [see, MetricsCB(accuracy=MulticlassAccuracy()), cb(4, generator=gen(3))]
    learn = TrainLearner(linear(), dls, F.cross_entropy, lr=0.1, cbs=cbs)
    learn.fit(1)
    g, mix, right = gen(3), {MixUpCB: mixup, CutMixCB: cutmix}[cb], 0
    for row, (x, y) in zip(see.rows, kept):
        mx, my = mix(x, y, 4, generator=g)
        assert same(row['x'], mx)
        assert same(row['y'], my.argmax(1))
        assert row['loss'] == F.cross_entropy(row['preds'], my).item()
        right += (row['preds'].argmax(1) == my.argmax(1)).sum().item()
    assert learn.history[0]['accuracy'] == pytest.approx(right/64)
    for row, (x, y) in zip(see.rows[4:], dls.valid):
        assert not row['training'] and same(row['x'], x) and same(row['y'], y)
    for a, b in zip(dls.train, kept): assert same(a[0], b[0]) and same(a[1], b[1])

def test_targets_that_are_shares_stay_so():
    see, dls = Watch(), loaders()
    dls.train = [[x, F.one_hot(y, 4).float(), 'kept'] for x, y in dls.train]
    dls.valid = [(x, y, '') for x, y in dls.valid]
    TrainLearner(linear(), dls, F.cross_entropy, cbs=[see, MixUpCB(p=0.5), CutMixCB(p=0.5)]).fit(1)
    assert see.rows[0]['y'].shape == (16, 4) and see.rows[0]['rest'] == ['kept'] and see.rows[-1]['y'].shape == (16,)

def test_batches_that_cannot_be_mixed():
    dicts = DataLoaders([dict(x=x, y=y) for x, y in loaders().train])
    for cb in MixUpCB(4), AugmentCB(RandFlip()):
        learn = Learner(linear(), dicts, F.cross_entropy, cbs=[TrainCB(), cb])
        with pytest.raises(TypeError, match='tuple or list.*got dict'): learn.fit(1, valid=False)
    with pytest.raises(ValueError, match='how many classes'):
        TrainLearner(linear(), loaders(), F.cross_entropy, cbs=MixUpCB()).fit(1)
    for bad in RandFlip, 3:
        with pytest.raises(TypeError, match='modules or functions'): AugmentCB(bad)

def test_augment_in_training_only():
    dls, see = loaders(), Watch()
    TrainLearner(linear(), dls, F.cross_entropy, cbs=[see, AugmentCB(RandFlip(1.), lambda x: x + 1)]).fit(1)
    for row, (x, y) in zip(see.rows, [*dls.train, *dls.valid]):
        assert same(row['x'], x.flip(-1) + 1 if row['training'] else x) and same(row['y'], y)

def test_as_in_the_course():
    def tfm_batch(b, tfm_x, tfm_y=lambda y: y): return tfm_x(b[0]), tfm_y(b[1])
    tfm = nn.Sequential(RandCrop(1), RandFlip(), RandErase(), RandCopy(pct=0.2, max_num=4))
    learn = TrainLearner(linear(), loaders(), F.cross_entropy,
                         cbs=BatchTransformCB(partial(tfm_batch, tfm_x=tfm), on_val=False))
    learn.fit(1)
    xb = learn.batch[0]
    assert rand_erase(xb, 0.2, 4).shape == rand_copy(xb, 0.2, 4).shape == xb.shape


# ---- averages, their rows and views change nothing in the run

def conv_run(looks, cbs=()):
    set_seed(0)
    dls = DataLoaders.in_memory(toy_images(128, 32, seed=0), 32, device='cpu', tfm=lambda x: (x - 0.4)/0.2)
    model = get_model(act_gr, norm=nn.BatchNorm2d).apply(partial(init_weights, leaky=0.1)).cpu()
    augment = [AugmentCB(RandCrop(), RandFlip(), RandErase(), RandCopy()), MixUpCB(10, p=0.5), CutMixCB(10, p=0.5)]
    learn = TrainLearner(model, dls, F.cross_entropy, lr=0.1, cbs=[*augment, *cbs])
    for _ in range(2):
        learn.fit(1)
        if looks:
            learn.validate()
            learn.get_preds()
            learn.show_image_batch()
            tta(learn, [RandCrop()]*2)
            if cbs: tta(learn, weights='ema')
    learn.restore()
    return learn

def test_run_is_bit_identical_whoever_looks():
    import matplotlib
    matplotlib.use('agg')
    want = conv_run(False).model.state_dict()
    cbs = [EMACB(half_life='4ba'), BNUpdateCB(), MetricsCB(accuracy=MulticlassAccuracy())]
    for learn in conv_run(True), conv_run(True, cbs):
        got = learn.model.state_dict()
        assert want.keys() == got.keys() and all(same(want[k], got[k]) for k in want)


# ---- test-time augmentation

def mean_probs(learn, views):
    "By hand, in float64"
    learn.model.eval()
    with torch.no_grad():
        parts = [torch.cat([learn.model(f(x)) for x, _ in learn.dls.valid]).double().softmax(1) for f in views]
    return torch.stack(parts).mean(0)

def test_tta_averages_probabilities():
    learn = conv_run(False)
    for views in None, tta_views(2), [lambda x: x], [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: -x]:
        preds, targs = tta(learn, views)
        want = mean_probs(learn, views or [lambda x: x, lambda x: x.flip(-1)])
        torch.testing.assert_close(preds.double().exp(), want, rtol=1e-4, atol=1e-6)
        assert same(targs, learn.get_preds()[1])
        assert F.cross_entropy(preds, targs).item() == pytest.approx(F.nll_loss(want.log(), targs).item(), rel=1e-4)

def test_tta_of_other_batches():
    "Of a test set, which may have no targets. Wrong: those of the validation set; a learner that keeps the loader"
    learn = conv_run(False)
    x, y = images(10, 1, 28, 28)/100, torch.arange(10)
    dl, kept = [(x[:6], y[:6]), (x[6:], y[6:])], learn.dls
    preds, targs = tta(learn, dl=dl)
    assert same(targs, y) and learn.dls is kept
    learn.model.eval()
    with torch.no_grad(): parts = [learn.model(o).double().softmax(1) for o in (x, x.flip(-1))]
    torch.testing.assert_close(preds.double().exp(), sum(parts)/2, rtol=1e-4, atol=1e-6)
    assert same(tta(learn, dl=iter([(x[:6],), (x[6:],)]))[0], preds)

def test_mean_of_probabilities_not_of_scores():
    "One loud view against two others: averaged scores would follow the loud one"
    outs = torch.tensor([[[30., 0.]], [[0., 2.]], [[0., 2.]]])
    assert outs.mean(0).argmax() == 0 and log_mean_probs(outs).argmax() == 1
    big = log_mean_probs(torch.tensor([[[1e4, 0.]], [[0., 1e4]]]))
    torch.testing.assert_close(big, torch.full((1, 2), math.log(0.5)))
    assert log_mean_probs(outs.bfloat16()).dtype == torch.float32
    assert log_mean_probs(outs.double()).dtype == torch.float64

def test_views():
    x = images(3, 2, 9, 8)
    two, ten = [f(x) for f in tta_views()], [f(x) for f in tta_views(2)]
    assert same(two[0], x) and same(two[1], x.flip(-1))
    a = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode='reflect')
    want = [a[:, :, 2 - d:11 - d, 2 - r:10 - r] for d, r in ((0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2))]
    for got, w in zip(ten, [v for w in want for v in (w, w[..., ::-1])], strict=True):
        np.testing.assert_array_equal(got.numpy(), w)
    with pytest.raises(ValueError, match='got 8 for'): tta_views(8)[2](x)
    with pytest.raises(ValueError, match='pad must be'): tta_views(-1)
    with pytest.raises(ValueError, match=r'\(N, C, H, W\)'): TTA(linear())(torch.rand(3, 64))

def test_tta_of_an_average_leaves_the_learner_alone():
    learn = conv_run(False, [EMACB(half_life='4ba'), BNUpdateCB()])
    kept, model = {k: v.clone() for k, v in learn.model.state_dict().items()}, learn.model
    history, weights = copy.deepcopy(learn.history), learn.weights
    raw, ema = tta(learn)[0], tta(learn, weights='ema')[0]
    assert not torch.allclose(raw, ema)
    with learn.using('ema'):
        torch.testing.assert_close(ema.double().exp(), mean_probs(learn, tta_views()), rtol=1e-4, atol=1e-6)
    def fails(x): raise RuntimeError('no such view')
    with pytest.raises(RuntimeError, match='no such view'): tta(learn, [fails], weights='ema')
    assert learn.model is model and (learn.history, learn.weights) == (history, weights)
    assert all(same(kept[k], v) for k, v in learn.model.state_dict().items())
    learn.apply('ema')
    torch.testing.assert_close(tta(learn)[0], ema)                  # the weights that the model holds

def test_tta_as_a_module():
    x = images(5, 1, 8, 8)
    model = TTA(linear(), average=partial(torch.mean, dim=0))
    torch.testing.assert_close(model(x), (model.model(x) + model.model(x.flip(-1)))/2)
    assert [*model.state_dict()] == ['model.1.weight', 'model.1.bias'] and not model.eval().model.training
    with pytest.raises(ValueError, match='tfms is empty'): TTA(linear(), [])
    views = TTA(linear(), [RandCrop(3)]).eval()
    # views are random as long as they are in train mode themselves
    assert not same(views(x), views(x))
    model(x).sum().backward()
    assert model.model[1].weight.grad is not None

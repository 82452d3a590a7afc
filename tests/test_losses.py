"""Every loss in LOSSES: its value against arithmetic and published examples, its gradient against finite differences, its sign, that it
stays finite, that it is pure, and that it told the truth about looking across pairs.

    python -m pytest tests/test_losses.py          # seconds

A new loss needs no edit here: the parametrised tests pick it up from LOSSES.
"""

import importlib.util
import inspect
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from align import LOSSES, Logps, apply_loss, configure, draw_pairs, loss

G = 12


def batch(seed=0, size=G, scale=20.0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: -scale * torch.rand(size, generator=g, dtype=torch.float64) - 0.1
    lengths = lambda: torch.randint(3, 30, (size,), generator=g).double()
    w, l, nw, nl = draw(), draw(), lengths(), lengths()
    supply = dict(pi=Logps(w, l, nw, nl), ref=Logps(draw(), draw(), nw, nl), state={})
    supply["gap"] = torch.rand(size, generator=g, dtype=torch.float64) + 0.1
    supply["kl"] = torch.rand(size, generator=g, dtype=torch.float64)
    head = torch.rand(4, size, generator=g, dtype=torch.float64)  # the share of a sum that the first min(nw, nl) tokens have
    m, (ref_w, ref_l, *_) = torch.minimum(nw, nl), supply["ref"]
    supply |= dict(pi_head=Logps(head[0] * w, head[1] * l, m, m), ref_head=Logps(head[2] * ref_w, head[3] * ref_l, m, m))
    supply["pi_square"] = Logps(draw(), draw(), nw, nl)
    return supply


def call(name, supply, **hp):
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    supply = supply | dict(state={**supply.get("state", {})})  # which may be updated in place
    out = LOSSES[name](*(supply[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY), **hp)
    return out[0] if isinstance(out, tuple) else out


def pick(supply, index):
    cut = lambda x: Logps(*(v[index] for v in x)) if isinstance(x, Logps) else x if isinstance(x, dict) else x[index]
    return {k: cut(v) for k, v in supply.items()}


def margins(r, n=10.0):
    """Logps whose length-normalised margins are r: chosen at -1 a token, rejected at -1 - r."""
    r = torch.tensor(r, dtype=torch.float64)
    lengths = torch.full_like(r, n)
    return Logps(-lengths, -lengths * (1 + r), lengths, lengths)


ODD = {"discopop": "rises with the margin near 0, by design (arXiv 2406.08414 figure 1)"}
every_loss = pytest.mark.parametrize("name", sorted(LOSSES))


# ------------------------------------------------------------------------------------------------------- what each must keep
@every_loss
def test_gradient_is_that_of_the_value(name, monkeypatch):
    """Central differences in float64. What a loss detaches is held at its first value, as the definition of such a loss says."""
    supply = batch(1)
    held, replay, found, detach = [], [], [], torch.Tensor.detach
    f = lambda w, l: call(name, supply | dict(pi=supply["pi"]._replace(w=w, l=l))).mean()
    w, l = supply["pi"].w.clone().requires_grad_(), supply["pi"].l.clone().requires_grad_()
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: held.append(detach(x).clone()) or held[-1])
    value = f(w, l)
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: replay.pop(0))
    gw, gl = torch.autograd.grad(value, (w, l))
    for x, g, side in ((w, gw, 0), (l, gl, 1)):
        for k in range(G):
            h, ends = torch.zeros(G, dtype=torch.float64), []
            h[k] = 1e-5
            for sign in (1, -1):
                replay[:] = held
                with torch.no_grad():
                    ends.append((f(w + sign * h, l) if side == 0 else f(w, l + sign * h)).item())
            found.append(((ends[0] - ends[1]) / 2e-5, g[k].item()))
    monkeypatch.undo()
    assert all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in found), f"{found}; what is constant wants .detach(), not no_grad"


@every_loss
def test_shape_sign_and_purity(name):
    supply = batch(2)
    before = [v.clone() for v in supply["pi"]]
    w, l = supply["pi"].w.clone().requires_grad_(), supply["pi"].l.clone().requires_grad_()
    live = supply | dict(pi=supply["pi"]._replace(w=w, l=l), ref=supply["pi"])  # at the start of training
    first, again = call(name, live), call(name, live)
    assert first.shape == (G,) and first.dtype == torch.float64 and torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(before, supply["pi"]))
    gw, gl = torch.autograd.grad(first.sum(), (w, l))
    wider = gl - gw  # minus the slope of the loss along a wider margin
    assert name in ODD or ((wider >= 0).all() and (wider > 0).any()), "a wider margin must lower the loss"


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extremes(name, dtype):
    r = torch.tensor([-1e4, -1e4, -1e2, -1.0, -1e-9, 0.0, 0.0, 1e-9, 1.0, 1e2, 1e4, 1e4], dtype=dtype)
    n = torch.ones_like(r)
    w, l = (r.clamp(max=0.0)).requires_grad_(), (-r.clamp(min=0.0)).requires_grad_()
    supply = batch(3) | dict(pi=Logps(w, l, n, n), ref=Logps(-n, -n, n, n), gap=n, kl=r)
    supply |= dict(pi_head=supply["pi"], ref_head=supply["ref"], pi_square=supply["ref"])
    for index in (slice(None), slice(0, 1), slice(10, 12), slice(5, 7)):  # whole; one pair; equal r; all zero
        out = call(name, pick(supply, index))
        grads = torch.autograd.grad(out.sum(), (w, l))
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


@every_loss
def test_declares_truly_whether_it_looks_across_pairs(name):
    supply = batch(4)
    whole = call(name, supply)
    parts = torch.cat([call(name, pick(supply, slice(k, k + 3))) for k in range(0, G, 3)])
    alone, loss = torch.allclose(whole, parts, rtol=1e-12, atol=0), LOSSES[name]
    assert loss.batch or alone, "it looks across pairs, and wants @loss(batch=True)"
    assert not (loss.batch and alone) or "state" in loss.wants, "no loss of a pair depends on another pair: @loss is enough"


@every_loss
def test_keyword_defaults_are_what_the_command_line_gets(name):
    function, hp = configure(name, [])
    assert all(p.default is not p.empty for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
    assert torch.equal(call(name, batch(5)), call(name, batch(5), **hp))
    assert function.__doc__, "a loss wants a docstring: its formula, and where that is from"


# ------------------------------------------------------------------------------------------- values, by hand
# One pair: w = -10, l = -12, lengths 5 and 4, reference -11 and -11.5, gap 2. So u = 1, v = -0.5, D = u - v = 1.5; the average
# log-probs are -2 and -3, r = 1; those of the reference -2.2 and -2.875.
ls, sig = lambda x: -math.log1p(math.exp(-x)), lambda x: 1 / (1 + math.exp(-x))
odds = lambda p: p - math.log(1 - math.exp(p))
BY_HAND = {  # (loss, hyper-parameters): value
    ("dpo", "beta=0.1"): -ls(0.15),  # 0.6209570
    ("cdpo", "beta=0.1 eps=0.2"): -0.8 * ls(0.15) - 0.2 * ls(-0.15),
    ("robust", "beta=0.1 eps=0.2"): (-0.8 * ls(0.15) + 0.2 * ls(-0.15)) / 0.6,
    ("hinge", "beta=0.1"): 0.85, ("hinge", "beta=1"): 0.0,
    ("ipo", "beta=0.5 average=false"): 0.5**2,  # (1.5 - 1)^2
    ("ipo", "beta=0.5 average=true"): (1 / 5 + 0.5 / 4 - 1) ** 2,
    ("sigmoid_norm", "beta=2"): -ls(2 * (1 / 5 + 0.5 / 4)),
    ("rdpo", "beta=0.1 alpha=0.3"): -ls(0.15 + 0.3),  # the chosen one is longer by one token
    ("odpo", "beta=0.1 alpha=0.5"): -ls(0.15 - 0.5 * math.log(2)),
    ("dpop", "beta=0.3 lam=50"): -ls(0.45),  # u > 0: no penalty
    ("discopop", "beta=0.05 tau=0.05"): -ls(0.075) * (1 - sig(1.5)) + math.exp(-0.075) * sig(1.5),
    ("madpo", "tau=3 lam=1 c_max=2 c_min=0.5"):  # c(2) = 0.5 + 1.5 / (1 + 2 exp(-1)); weight = s(2c) / s(2)
        -sig(2 * (0.5 + 1.5 / (1 + 2 * math.exp(-1)))) / sig(2) * ls(0.15),
    ("apo_zero", "beta=0.1"): 1 - sig(0.1) + sig(-0.05), ("apo_down", "beta=0.1"): sig(0.1) + 1 - sig(0.15),
    ("nca", "beta=0.1"): -ls(0.1) - 0.5 * ls(-0.1) - 0.5 * ls(0.05),
    ("exo", "beta=0.1 eps=0.1"): sig(0.15) * math.log(sig(0.15) / 0.9) + sig(-0.15) * math.log(sig(-0.15) / 0.1),
    ("sppo", "beta=0.5"): 0.5 * ((1 - 1) ** 2 + (-0.5 + 1) ** 2),
    ("caldpo", "beta=0.5 weight=0.5"): -ls(1.5) + 0.5 * (0 + 0.25),
    ("simpo", "beta=2 gamma=1"): -ls(1.0),  # 0.3132617
    ("alphapo", "beta=2 gamma=0.5 alpha=0.25"): -ls(8 * ((1 - math.exp(0.5)) - (1 - math.exp(0.75))) - 0.5),
    ("simper", ""): math.exp(-3) - math.exp(-2),
    ("rpo", "beta=0.1 eta=0.5"): -ls(0.15) + 0.5 * 2, ("cpo", "beta=0.1 alpha=0.5"): -ls(0.2) + 0.5 * 2,
    ("slic", "delta=1 lam=0.1"): 1.0, ("slic", "delta=3 lam=0.1"): 1 + 1.0,  # max(0, delta + 10 - 12) + 0.1 * 10
    ("rrhf", "weight=2"): 10.0, ("orpo", "lam=0.5"): 2 - 0.5 * ls(odds(-2) - odds(-3)),
    ("asft", "lam=0.5"): 2 - 0.5 * (ls(odds(-2)) + ls(-odds(-3))),
    ("alphadpo", "beta=2 gamma=0.5"): -ls(1.5), ("amapo", "beta=2"): -ls(2.0),  # one pair: no deviation
    ("bco", "beta=0.1"): -ls(0.1 - 0.025) - ls(0.05 + 0.025),  # delta = 0.1 * (1 - 0.5) / 2
    ("aot", "beta=0.1"): -ls(0.15), ("aot", "beta=0.1 paired=false"): -ls(0.15),
    ("betadpo", "beta=0.1 keep=1"): -ls(0.15), ("reward", ""): -ls(2.0),
    ("ld_dpo", "beta=0.1 alpha=0.25"): -ls(0.1 * ((0.75 * 2 + 0.25 * 1) + 0.5)),  # chosen: 2 in the head, 1 in all
    ("wpo", "beta=0.1"): -math.exp((-10 + 5) / 5 + (-12 + 14) / 4) * ls(0.15),  # s = -1 and 0.5: weight e^-0.5
    ("kto", "beta=0.1 lam_w=2"): 0.5 * (2 * (1 - sig(0.1 * (1 - 0.3))) + 1 - sig(0.1 * (0.3 + 0.5))),
}


@pytest.mark.parametrize("name, hp", BY_HAND)
def test_value_of_one_pair(name, hp):
    one = lambda *x: [torch.tensor([v], dtype=torch.float64) for v in x]
    supply = dict(pi=Logps(*one(-10.0, -12.0, 5.0, 4.0)), ref=Logps(*one(-11.0, -11.5, 5.0, 4.0)), state={})
    supply |= dict(gap=one(2.0)[0], kl=one(0.3)[0], pi_square=Logps(*one(-5.0, -14.0, 5.0, 4.0)))  # the first min(5, 4) tokens have -7 of -10, and all of -12; -9 of -11, all of -11.5
    supply |= dict(pi_head=Logps(*one(-7.0, -12.0, 4.0, 4.0)), ref_head=Logps(*one(-9.0, -11.5, 4.0, 4.0)))
    out = call(name, supply, **configure(name, hp.split())[1])
    assert out.item() == pytest.approx(BY_HAND[name, hp], rel=1e-9, abs=1e-12)


def test_wpo_weighs_a_pair_by_one_at_most():
    """s = 1 and -0.25: e^0.75 is cut to 1, so DPO's value."""
    one = lambda *x: Logps(*(torch.tensor([v], dtype=torch.float64) for v in x))
    out = LOSSES["wpo"](one(-10.0, -12.0, 5.0, 4.0), one(-11.0, -11.5, 5.0, 4.0), one(-15.0, -11.0, 5.0, 4.0), beta=0.1)
    assert out.item() == pytest.approx(-ls(0.15))


@pytest.mark.parametrize("r, form, expected", [  # worked by hand from the two formulas, beta = 2
    ([-0.3, 0.1, 0.4, 0.8], "code", 1.494403), ([-0.3, 0.1, 0.4, 0.8], "paper", 1.760114),
    ([0.3, -0.1, -0.4, -0.8], "code", 1.770610), ([0.3, -0.1, -0.4, -0.8], "paper", 2.159699)])
def test_amapo_worked_examples(r, form, expected):
    assert call("amapo", dict(pi=margins(r)), beta=2.0, form=form).mean().item() == pytest.approx(expected, abs=1e-6)


def test_amapo_by_hand():
    # r = (0, 1): mu = 0.5, unbiased deviation 1/sqrt(2), z of the lower = 0.5 * sqrt(2); margin = 2 exp(0.25 sqrt 2) = 2.848287
    lower = math.log(1 + math.exp(2 * math.exp(0.25 * math.sqrt(2))))
    out = call("amapo", dict(pi=margins([0.0, 1.0])), beta=2.0)
    assert out[0].item() == pytest.approx(lower, rel=1e-9) and out[1].item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-9)


def official_amapo(r, beta):
    """An independent, pair-by-pair transcription of the formula of the official code (see README): plain Python floats."""
    mu = sum(r) / len(r)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in r) / (len(r) - 1))
    margins = [beta * math.exp((mu - x) / sigma * mu) if x < mu else 0.0 for x in r]
    loss = [max(m - beta * x, 0) + math.log1p(math.exp(-abs(m - beta * x))) for x, m in zip(r, margins)]  # log(1 + exp(m - beta x)), large too
    slope = [-beta / (1 + math.exp(beta * x - m)) for x, m in zip(r, margins)]  # dloss/dr at a fixed margin
    return loss, slope


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=40).filter(lambda r: max(r) - min(r) > 1e-3), st.floats(0.5, 5))
@example([1.0] + [3.0] * 5, 4.0)  # a margin of 925
def test_amapo_value_and_gradient_against_the_official_formula(r, beta):
    pi = margins(r)
    w = pi.w.clone().requires_grad_()
    out = call("amapo", dict(pi=pi._replace(w=w)), beta=beta)
    loss, slope = official_amapo([(a - b).item() for a, b in zip(pi.w / pi.nw, pi.l / pi.nl)], beta)
    assert torch.allclose(out, torch.tensor(loss, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    grad = torch.autograd.grad(out.sum(), w)[0]
    assert torch.allclose(grad, torch.tensor(slope, dtype=torch.float64) / pi.nw, rtol=1e-6, atol=1e-12)


def test_amapo_groups_are_consecutive_pairs():
    pi = margins([0.3, -0.1, 0.5, 0.9, -0.7, 0.2, 0.4, 0.1, 0.05])
    parts = [call("amapo", dict(pi=Logps(*(v[k : k + 4] for v in pi)))) for k in (0, 4, 8)]  # the last group is one pair
    assert torch.equal(call("amapo", dict(pi=pi), group=4), torch.cat(parts))


@pytest.mark.parametrize("r", [[0.7], [0.3] * 7, [0.1 + 0.2, 0.3, 0.3], [-0.4] * 3])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_amapo_without_deviation_is_simpo_without_gamma(r, form):
    pi = margins(r)
    assert torch.equal(call("amapo", dict(pi=pi), beta=2.0, form=form), call("simpo", dict(pi=pi), beta=2.0, gamma=0.0))


@pytest.mark.parametrize("off, margins_by_hand", [  # of r = (0, 1), beta = 2: mu = 0.5, z = sqrt(0.5) below the mean and minus that above
    ("", (2 * math.exp(0.5 * math.sqrt(0.5)), 0)), ("znorm", (2 * math.exp(0.5 * 0.5), 0)), ("exp", (math.sqrt(0.5), 0)),
    ("clip", (2 * math.exp(0.5 * math.sqrt(0.5)), 2 * math.exp(-0.5 * math.sqrt(0.5)))),
    ("exp clip", (math.sqrt(0.5), -math.sqrt(0.5))), ("znorm exp clip", (2 * 0.25, -2 * 0.25))])
def test_amapo_ablations_by_hand(off, margins_by_hand):
    hp = configure("amapo", ["beta=2", *(f"{part}=false" for part in off.split())])[1]
    out = call("amapo", dict(pi=margins([0.0, 1.0])), **hp)
    assert out.tolist() == pytest.approx([math.log(1 + math.exp(m - 2 * r)) for r, m in zip((0, 1), margins_by_hand)], rel=1e-9)


# --------------------------------------------------------------------------------- losses with a state: two batches, one after the other
def two_batches(name, **hp):
    """Losses of two batches of two pairs, and the last state. Reference 0, lengths 1; r = u - v: 1 and 3, then 5 and 5 (v = 0)."""
    state, out, one = {}, [], torch.ones(2, dtype=torch.float64)
    for u in ([1.0, 3.0], [5.0, 5.0]):
        values, state = LOSSES[name](Logps(torch.tensor(u, dtype=torch.float64), 0 * one, one, one), Logps(0 * one, 0 * one, one, one), state, **hp)
        out.append(values.tolist())
    return out, {k: v.item() for k, v in state.items()}


def test_alphadpo_with_running_averages_by_hand():
    """Means 2 and 5, deviations sqrt(2) and 0; by ema = 0.5 from 0 on: 1 and 3, sqrt(2) / 2 and sqrt(2) / 4."""
    out, state = two_batches("alphadpo", beta=2.0, gamma=0.5, alpha=0.1, ema=0.5)
    logit = lambda r, mean, std: 2 * r - 0.5 - 2 * 0.1 * (r - mean) / std
    half = math.sqrt(2) / 2
    assert out[0] == pytest.approx([-ls(logit(1, 1, half)), -ls(logit(3, 1, half))], rel=1e-9)
    assert out[1] == pytest.approx([-ls(logit(5, 3, half / 2))] * 2, rel=1e-9)
    assert state == pytest.approx(dict(mean=3, std=half / 2, step=2))


def test_betadpo_with_running_averages_by_hand():
    """All pairs are kept, so beta is 0.1 * (1 + 0.5 * (mean of the batch - running mean)): of 2 - 1, then of 5 - 3."""
    out, state = two_batches("betadpo", beta=0.1, alpha=0.5, keep=1.0, ema=0.5)
    assert out[0] == pytest.approx([-ls(0.15 * 1), -ls(0.15 * 3)], rel=1e-9) and out[1] == pytest.approx([-ls(0.2 * 5)] * 2, rel=1e-9)
    assert state == pytest.approx(dict(mean=3, std=math.sqrt(2) / 4, step=2))


def test_bco_shift_is_that_of_all_batches_so_far():
    """Rewards 0.1, 0.3 and two zeros: delta = 0.1. Then 0.5 twice and two zeros more: 1.4 / 8."""
    out, state = two_batches("bco", beta=0.1)
    assert out[0] == pytest.approx([-ls(u - 0.1) - ls(0.1) for u in (0.1, 0.3)], rel=1e-9)
    assert out[1] == pytest.approx([-ls(0.5 - 0.175) - ls(0.175)] * 2, rel=1e-9) and state == pytest.approx(dict(total=1.4, count=8))


# ------------------------------------------------------------------------------------------------------- command line, pairs
def test_configure_reads_and_refuses():
    assert configure("amapo", ["beta=3", "group=8", "form=paper"])[1] | {} == dict(configure("amapo", [])[1], beta=3.0, group=8, form="paper")
    assert configure("amapo", ["group=1e1", "beta=1e-1"])[1]["group"] == 10 and configure("betadpo", ["keep=2"])
    for name, hp, word in (("dpoo", [], "amapo"), ("dpo", ["gamma=1"], "beta=0.1"), ("dpo", ["beta=x"], "float"), ("dpo", ["beta"], "float"),
                           ("amapo", ["group=8.5"], "group=8.5"), ("amapo", ["group=-1"], "group=-1"), ("amapo", ["group=x"], "float")):
        with pytest.raises(ValueError, match=word):
            configure(name, hp)


def test_pairs_of_a_scored_list():
    scores = [[1.0, 3.0, 2.0, 3.0], [5.0, 5.0], [0.0, 0.4]]
    assert sorted(draw_pairs(scores, "all", 0.0)) == [
        (0, 1, 0, 2.0), (0, 1, 2, 1.0), (0, 2, 0, 1.0), (0, 3, 0, 2.0), (0, 3, 2, 1.0), (2, 1, 0, 0.4)]
    assert draw_pairs(scores, "best-worst", 0.0) == [(0, 1, 0, 2.0), (2, 1, 0, 0.4)]
    assert draw_pairs(scores, "best-worst", 0.5) == [(0, 1, 0, 2.0)]


MEMORY = dict(mean=0.0)


def detached(pi, *, beta=1.0):
    return (beta * (pi.l - pi.w)).detach()


def r_of(pi):
    return pi.w / pi.nw - pi.l / pi.nl


def clipped(pi):
    r = r_of(pi)
    return -r.minimum(r.mean() + 3 * r.std(correction=0))


def largest_left_out(pi):
    r = r_of(pi)
    return -torch.where(r > r.quantile(0.9), r.detach(), r)


def outlier_flattened(pi):
    r = r_of(pi)
    return -torch.nn.functional.logsigmoid(2.0 * r.clamp(max=r.detach().quantile(0.99)))


def whitened_if_many(pi):
    r = r_of(pi)
    return -r if len(r) < 32 else r.mean() - r


def no_slope_at_the_reference(pi, ref):
    d = (pi.w - ref.w) - (pi.l - ref.l)
    return -d.sign() * d.abs().sqrt()


def remembered(pi):
    MEMORY["mean"] = 0.9 * MEMORY["mean"] + 0.1 * r_of(pi).detach().mean()
    return -torch.nn.functional.logsigmoid(r_of(pi) - MEMORY["mean"])


def two_names(pi):
    w, l = pi
    return l - w


MISTAKES = {  # what somebody might write under @loss: (the function, batch, what the message must say)
    "no star": (lambda pi, beta=0.1: pi.l - pi.w, False, "come after `*`"),
    "no default": (lambda pi, *, beta: beta * (pi.l - pi.w), False, "with defaults"),
    "unknown supply": (lambda pi, logits: pi.l - pi.w, False, "the loop has pi ref"),
    "state of single pairs": (lambda pi, state: (pi.l - pi.w, state), False, "`state` is for"),
    "state forgotten": (lambda pi, state: pi.l - pi.w, True, "(losses, new state)"),
    "state is none": (lambda pi, state: (pi.l - pi.w, None), True, "(losses, new state)"),
    "state of numbers": (lambda pi, state: (pi.l - pi.w, dict(mean=0.5)), True, "a dict of 0-d tensors"),
    "state of pairs": (lambda pi, state: (pi.l - pi.w, dict(last=pi.w)), True, "a dict of 0-d tensors"),
    "half of it": (lambda pi, state: (pi.l - pi.w,), True, "(losses, new state)"),
    "state unasked": (lambda pi: (pi.l - pi.w, {}), True, "must return (G,) losses"),
    "reduced": (lambda pi: (pi.l - pi.w).mean(), False, "must return (G,) losses"),
    "nothing returned": (lambda pi: None, False, "must return (G,) losses"),
    "across pairs": (lambda pi: (pi.l - pi.w) - (pi.l - pi.w).mean(), False, "batch=True"),
    "an outlier clipped": (clipped, False, "batch=True"), "largest left out": (largest_left_out, False, "batch=True"),
    "largest flattened": (outlier_flattened, False, "batch=True"), "for many pairs": (whitened_if_many, False, "batch=True"),
    "no slope at the start": (no_slope_at_the_reference, False, "its gradient is not finite"),
    "a memory of its own": (remembered, True, "use `state`"),
    "across references": (lambda pi, ref: (pi.l - pi.w) - (ref.l - ref.w).mean(), False, "batch=True"),
    "across gaps": (lambda pi, gap: (pi.l - pi.w) * gap / gap.mean(), False, "batch=True"),
    "detached": (detached, False, "no gradient"), "lengths alone": (lambda pi: pi.nw - pi.nl, False, "no gradient"),
    "not a number": (lambda pi, *, beta=0.0: (pi.l - pi.w) / beta, False, "not finite"),
    "nothing for one pair": (lambda pi: pi.l - pi.w - ((pi.w - pi.w.mean()) / pi.w.std()).detach(), True, "or for one (a last batch may be)"),
    "a gradient that is none": (lambda pi: torch.where(pi.l > -1e9, -r_of(pi), (pi.w - pi.w).sqrt()), False, "its gradient is not finite"),
    "no number": (lambda pi, *, beta=None: pi.l - pi.w, False, "numbers or strings"),
    "too few names": (two_names, False, "of_this_test, line"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_new_loss_is_refused_before_anything_runs(monkeypatch, mistake):
    function, batch, says = MISTAKES[mistake]
    function.__name__ = "of_this_test"
    monkeypatch.delitem(LOSSES, "of_this_test", raising=False)
    loss(function, batch=batch)
    with pytest.raises(ValueError, match=re.escape(says)):
        configure("of_this_test", [])
    for taken in ("of_this_test", "score"):  # a loss; a function of another stage, which it would replace
        function.__name__ = taken
        with pytest.raises(SystemExit, match=f"another {taken}"):
            loss(function)
    del LOSSES["of_this_test"]


def test_a_loss_is_tried_with_the_state_that_it_returned(monkeypatch):
    """A wrong name in the second step is found before the first."""
    monkeypatch.delitem(LOSSES, "of_this_test", raising=False)

    @loss(batch=True)
    def of_this_test(pi, state):
        return pi.l - pi.w + (state["mean"] if state else 0.0), dict(average=pi.w.mean())

    with pytest.raises(KeyError, match="mean"):
        configure("of_this_test", [])
    del LOSSES["of_this_test"]


def test_a_state_keeps_no_graph(monkeypatch):
    """Else every step would go back through all before it. It may be updated in place, and the step before still has its own."""
    monkeypatch.delitem(LOSSES, "of_this_test", raising=False)

    @loss(batch=True)
    def of_this_test(pi, state):
        state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * (pi.w - pi.l).mean()
        return state["mean"] - (pi.w - pi.l), state

    configure("of_this_test", [])
    leaf, n = torch.randn(2, 5, dtype=torch.float64).requires_grad_(), torch.ones(2, 5, dtype=torch.float64)
    before = {}
    losses, state = apply_loss(of_this_test, {}, 0.0, n, n, torch.ones(5), before, leaf, [*range(5)])
    assert losses.requires_grad and not state["mean"].requires_grad and not before
    del LOSSES["of_this_test"]


def test_no_tensor_is_printed_in_a_step(monkeypatch):
    """Not for the message of a check that passes either: on a GPU it would wait for all that was given to it."""
    leaf, n = torch.randn(2, 5, dtype=torch.float64).requires_grad_(), torch.ones(2, 5, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda self, **_: pytest.fail("a tensor was printed"))
    for name in ("amapo", "dpo", "bco"):
        apply_loss(*configure(name, []), 0.0, n, n, torch.ones(5), {}, leaf, [*range(5)])


@pytest.mark.parametrize("edit, name, noticed", [
    ("z = -standardise", "amapo", True), ("    some = std >", "amapo", True), ("deviation = lambda", "alphadpo", True),
    ("return p - torch.log", "orpo", True), ("return p - torch.log", "dpo", False), ("class Logps", "amapo", False),
    ('"""log(e^p / (1', "orpo", False)])
def test_an_edit_of_a_loss_or_of_what_it_calls_is_noticed(tmp_path, edit, name, noticed):
    text = (ROOT / "align.py").read_text()
    assert text.count(edit) == 1
    hashes = []
    for k, version in enumerate((text, text.replace(edit, "  ".join(edit.rsplit(" ", 1))))):  # one blank more
        version = version.replace('"""log(e^p', '"""as asft() and orpo() take it: log(e^p')  # names that go in a circle
        (tmp_path / f"align{k}.py").write_text(version)
        spec = importlib.util.spec_from_file_location(f"align{k}", tmp_path / f"align{k}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        hashes.append(module.code_of(module.LOSSES[name]))
    assert (hashes[0] != hashes[1]) == noticed


def test_the_hash_of_a_loss_is_the_same_in_every_process(tmp_path):
    """A local variable may have the name of anything in align.py, such as loss, and a table may hold functions: no address in memory may get
    into the hash."""
    spliced = ("KINDS = dict(plain=lambda x: x, relu=F.relu)\n\n@loss\ndef spliced_in_by_the_test(pi):\n"
               "    loss, dpo, LOSSES, F = KINDS['plain'](pi.l - pi.w), 1, 2, 3\n    return loss\n\ndef configure(")
    (tmp_path / "fork.py").write_text((ROOT / "align.py").read_text().replace("def configure(", spliced))
    code = f"import sys; sys.path[:0] = ['{tmp_path}', '{ROOT}']; import fork; print(fork.code_of(fork.LOSSES['spliced_in_by_the_test']))"
    one, other = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert one == other and len(one) == 17


def test_constants_and_functions_that_are_passed_on_count_as_well(tmp_path):
    """A loss, the helper that it hands to map, and a constant: an edit of each changes the hash of this loss and of no other."""
    spliced = ("SCALE, MORE = torch.tensor(2.0), {'shift': 1}\nTABLE = torch.arange(2000) % 700\n\n@functools.cache\ndef squash(x):\n    return x.tanh()\n\n"
               "@loss\ndef spliced_in_by_the_test(pi):\n    return -SCALE * sum(map(squash, [pi.w, -pi.l])) + MORE['shift'] + TABLE[5]\n\ndef configure(")
    text, hashes = (ROOT / "align.py").read_text().replace("def configure(", spliced), []
    for k, (old, new) in enumerate([("", ""), ("tensor(2.0)", "tensor(3.0)"), ("x.tanh()", "x.sin()"), ("'shift': 1", "'shift': 2"), ("% 700", "% 800")]):
        (tmp_path / f"fork{k}.py").write_text(text.replace(old, new) if old else text)
        spec = importlib.util.spec_from_file_location(f"fork{k}", tmp_path / f"fork{k}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        hashes.append([module.code_of(module.LOSSES[name]) for name in ("spliced_in_by_the_test", "dpo", "amapo")])
    assert len({mine for mine, *_ in hashes}) == 5 and all(others == hashes[0][1:] for _, *others in hashes)

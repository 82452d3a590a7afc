"""SFT model -> aligned model, by any offline preference loss. Owns the losses, all of them inline,
and the loop that makes them exact.

A loss is a pure function of the GLOBAL batch: G pairs in data order, whatever the number of
processes and the micro-batches.

    logps = [score(micro) for micro in my share of the step]   # autograd graphs kept
    pi    = gather(logps)                                      # (G,) vectors, equal on every rank
    loss  = LOSSES[name](pi, ...).mean()                       # plain torch on a few hundred floats
    g     = torch.autograd.grad(loss, (pi.w, pi.l))            # dL/dlogp: one number per response
    for x, d in zip(logps, my slice of g): x.backward(d * world)  # FSDP averages over ranks

    python align.py --loss amapo --hp beta=10 --model runs/toy/sft --data runs/toy/data/train \\
        --out runs/amapo --lr 3e-4 --batch-size 64             # toy world, 2 cores: half a minute

A new loss is one function below with @loss. Writes OUT as sft.py does; README.md has its metrics.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import time
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm

from prepare_data import check, fingerprint, run
from sft import (batch_indices, end_step, learning_rate, load_checkpoint, load_rows, on_device,
                 on_rank0, plan, print0, save_model, score, start, trainer_arguments, update)

# ---------------------------------------------------------------------------------------- losses
# r = w / nw - l / nl, the length-normalised margin of a pair, is what models are ranked by.
class Logps(NamedTuple):
    """Summed log-probs in nats of chosen (w) and rejected (l); lengths in tokens; all (G,)."""
    w: torch.Tensor
    l: torch.Tensor
    nw: torch.Tensor
    nl: torch.Tensor

LOSSES = {}
def loss(function=None, *, batch=False):
    """Register a loss; batch=True: it looks across pairs. It returns (G,) in nats, not reduced.
    Positional parameters name what the loop supplies: `pi`, the policy's Logps; `ref`, the
    reference's (computed once, cached); `pi_head`, `ref_head`, those of the first min(nw, nl)
    tokens; `pi_square`, log sum_v pi(v)^2 summed over places, detached; `kl` (G,), policy
    minus reference log-prob of the next row's best response; `gap` (G,), the score difference
    of each pair, or its --margins; `state`, for batch=True, a dict of 0-d tensors, {} at
    first: such a loss returns (losses, new state). Keyword-only parameters are hyper-parameters."""
    if function is None:
        return functools.partial(loss, batch=batch)
    parameters = inspect.signature(function).parameters.items()
    function.wants = [k for k, p in parameters if p.kind is not p.KEYWORD_ONLY]
    function.hp = {k: p.default for k, p in parameters if p.kind is p.KEYWORD_ONLY}
    function.batch, name = batch, function.__name__
    check(name not in {*LOSSES, *globals()}, f"@loss: align.py has another {name}", SystemExit)
    return LOSSES.setdefault(name, function)

# ----- AMaPO: a margin for the pairs below the batch mean, none for the others
@loss(batch=True)
def amapo(pi, *, beta=2.5, group=0, form="code", znorm=True, exp=True, clip=True):
    """-log s(beta * r - margin); margin = beta * exp(z * mu) if r < mu else 0, z = (mu - r) / std.
    AMaPO, arXiv 2511.09385, as the official code has it. Reference-free.

    mu, std: mean and unbiased deviation of r over the batch. Pairs above the mean have no margin;
    those below are pushed, the harder the further below. The margin has no gradient.
    group: statistics over this many consecutive pairs, 0: the whole global batch. Official: one
      gathered micro-batch (8 or 4 of 128 pairs), so that the loss changes with the number of GPUs.
    form: "paper" is the paper's own formula, gamma = z * mean(beta * r), margin = beta * exp(gamma)
      where gamma > 0. The exponent is beta times that of the code; and where the batch mean is
      negative (most pairs misranked) it is the pairs ABOVE the mean that get the margin, while in
      the code it is still those below, with an exponent below 0.
    znorm, exp, clip: False for the paper's ablations. It does not print their formulas; these are
      a reading: z = mu - r; margin = beta * gamma, gamma = z * mu; a margin for every pair."""
    check(form in ("code", "paper") and int(group) == group >= 0, f"no form={form}, group={group}")
    r = pi.w / pi.nw - pi.l / pi.nl  # (G,)
    groups = r.detach().split(int(group) or len(r))
    margin = torch.cat([amapo_margin(x, beta, form, znorm, exp, clip) for x in groups])
    return -F.logsigmoid(beta * r - margin)

def amapo_margin(r, beta, form, znorm, exp, clip):
    """The margin (n,) of one statistics group r (n,). 0 where the official code is undefined: one
    pair, or equal r. The exponent is capped at 80, where one r of 128 far below a mean of 8 is."""
    z = -standardise(r, r.mean(), deviation(r))
    gamma = (z if znorm else r.mean() - r) * r.mean() * (1.0 if form == "code" else beta)
    pushed = z > 0 if form == "code" else gamma > 0
    pushed = pushed if clip else z != 0
    return torch.where(pushed, beta * (gamma.clamp(max=80.0).exp() if exp else gamma), 0.0)

deviation = lambda x: x.std(correction=min(1, len(x) - 1))  # (), unbiased; 0 for one value

def standardise(x, mean, std):
    """(x - mean) / std; 0 where std is no more than rounding."""
    some = std > 8 * torch.finfo(x.dtype).eps * x.abs().max()
    return torch.where(some, (x - mean) / torch.where(some, std, 1.0), 0.0)

# ----- a sigmoid of the length-normalised margin, without a reference
@loss
def simpo(pi, *, beta=2.0, gamma=1.0):
    """-log s(beta * r - gamma).  SimPO, arXiv 2405.14734 eq. 6.
    gamma in logits (the official hyper-parameter is the ratio gamma / beta)."""
    return -F.logsigmoid(beta * (pi.w / pi.nw - pi.l / pi.nl) - gamma)

@loss
def alphapo(pi, *, beta=2.5, gamma=0.1, alpha=0.25):
    """-log s(R(w / nw) - R(l / nl) - gamma), R(p) = beta * (1 - exp(-alpha * p)) / alpha.
    AlphaPO, arXiv 2501.03884; alpha -> 0 is SimPO. The exponent is capped at 80."""
    w, l = ((-alpha * p).clamp(max=80.0) for p in (pi.w / pi.nw, pi.l / pi.nl))
    return -F.logsigmoid(beta * (torch.expm1(l) - torch.expm1(w)) / alpha - gamma)

@loss
def simper(pi):
    """exp(l / nl) - exp(w / nw): inverse perplexities.  SimPER, arXiv 2502.00883."""
    return torch.exp(pi.l / pi.nl) - torch.exp(pi.w / pi.nw)

# ----- DPO, and what has been put on its logit; u = w - ref_w, v = l - ref_l
@loss
def dpo(pi, ref, *, beta=0.1):
    """-log s(beta * (u - v)).  DPO, arXiv 2305.18290 eq. 7."""
    return -F.logsigmoid(beta * ((pi.w - ref.w) - (pi.l - ref.l)))

@loss
def cdpo(pi, ref, *, beta=0.1, eps=0.1):
    """-(1 - eps) log s(x) - eps log s(-x), x DPO's logit.  Conservative DPO, Mitchell 2023."""
    x = beta * ((pi.w - ref.w) - (pi.l - ref.l))
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)

@loss
def robust(pi, ref, *, beta=0.1, eps=0.1):
    """[-(1 - eps) log s(x) + eps log s(-x)] / (1 - 2 eps), x DPO's logit; not bounded below.
    Unbiased under flips of probability eps < 1/2.  Robust DPO, arXiv 2403.00409, as in TRL."""
    x = beta * ((pi.w - ref.w) - (pi.l - ref.l))
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)

@loss
def hinge(pi, ref, *, beta=0.1):
    """max(0, 1 - beta * (u - v)).  RSO's loss, arXiv 2309.06657, as TRL has it."""
    return F.relu(1 - beta * ((pi.w - ref.w) - (pi.l - ref.l)))

@loss
def ipo(pi, ref, *, beta=0.1, average=True):
    """(u / nw - v / nl - 1 / (2 beta))^2; average=False: (u - v - 1 / (2 beta))^2.
    IPO, arXiv 2310.12036. Most code sums; by TRL's account the authors' results are averages."""
    nw, nl = (pi.nw, pi.nl) if average else (1.0, 1.0)
    return ((pi.w - ref.w) / nw - (pi.l - ref.l) / nl - 1 / (2 * beta)) ** 2

@loss
def sigmoid_norm(pi, ref, *, beta=2.0):
    """-log s(beta * (u / nw - v / nl)): length-normalised DPO, as TRL has it."""
    return -F.logsigmoid(beta * ((pi.w - ref.w) / pi.nw - (pi.l - ref.l) / pi.nl))

@loss
def rdpo(pi, ref, *, beta=0.1, alpha=0.05):
    """-log s(beta * (u - v) + alpha * (nw - nl)): a longer chosen one is pushed less.
    R-DPO, arXiv 2403.19159; the sign by its derivation (some copies flip it); alpha unpublished."""
    logit = beta * ((pi.w - ref.w) - (pi.l - ref.l))
    return -F.logsigmoid(logit + alpha * (pi.nw - pi.nl))

@loss
def ld_dpo(pi, ref, pi_head, ref_head, *, beta=0.1, alpha=0.5):
    """DPO on head + alpha * (sum - head), head: of the first min(nw, nl) tokens; reference too.
    LD-DPO, arXiv 2409.06411, as TRL has it."""
    w, l = ((1 - alpha) * h + alpha * s for h, s in zip(pi_head[:2], pi[:2]))
    ref_w, ref_l = ((1 - alpha) * h + alpha * s for h, s in zip(ref_head[:2], ref[:2]))
    return -F.logsigmoid(beta * ((w - ref_w) - (l - ref_l)))

@loss
def wpo(pi, ref, pi_square, *, beta=0.01):
    """weight * DPO, weight = min(1, e^(s_w + s_l)), detached.  WPO, arXiv 2406.11827, official
    code (TRL: no min). s: mean over the tokens y of log pi(y) - log sum_v pi(v)^2."""
    w, l = ((p - q) / n for p, q, n in zip(pi[:2], pi_square[:2], pi[2:]))
    weight = (w + l).detach().clamp(max=0.0).exp()
    return -weight * F.logsigmoid(beta * ((pi.w - ref.w) - (pi.l - ref.l)))

@loss
def odpo(pi, ref, gap, *, beta=0.1, alpha=1.0):
    """-log s(beta * (u - v) - alpha * log(gap)), gap = score difference > 0.  ODPO, 2402.10571.
    Plain pairs have a gap of 1, with which it is DPO; margins of a reward model may be below 0."""
    logit = beta * ((pi.w - ref.w) - (pi.l - ref.l))
    return -F.logsigmoid(logit - alpha * torch.log(gap))

@loss
def dpop(pi, ref, *, beta=0.3, lam=50.0):
    """-log s(beta * (u - v - lam * max(0, -u))).  DPO-Positive, arXiv 2402.13228."""
    u, v = pi.w - ref.w, pi.l - ref.l
    return -F.logsigmoid(beta * (u - v - lam * F.relu(-u)))

@loss
def discopop(pi, ref, *, beta=0.05, tau=0.05):
    """-log s(x) * (1 - m) + exp(-x) * m, x = beta * (u - v), m = s(x / tau).
    DiscoPOP's LRML, arXiv 2406.08414; exp(-x) * m as one exponential, which cannot overflow."""
    x = beta * ((pi.w - ref.w) - (pi.l - ref.l))
    return -F.logsigmoid(x) * torch.sigmoid(-x / tau) + torch.exp(F.logsigmoid(x / tau) - x)

@loss
def madpo(pi, ref, gap, *, beta=0.1, c_max=2.0, c_min=0.5, lam=1.0, tau=6.9068):
    """weight(h) * DPO; weight = s(c * h) / s(h) if h > -tau else 1, with
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * exp(lam * (|h| - tau))).
    MADPO, arXiv 2510.05342 v1; h = gap, a reward model's margin (--margins)."""
    steep = (c_max - 1) / (1 - c_min) * torch.exp((lam * (gap.abs() - tau)).clamp(max=80.0))
    c = c_min + (c_max - c_min) / (1 + steep)
    weight = torch.where(gap > -tau, torch.exp(F.logsigmoid(c * gap) - F.logsigmoid(gap)), 1.0)
    return -weight * F.logsigmoid(beta * ((pi.w - ref.w) - (pi.l - ref.l)))

# ----- each response against the reference on its own
@loss
def apo_zero(pi, ref, *, beta=0.1):
    """1 - s(beta * u) + s(beta * v): chosen up, rejected down.  APO, arXiv 2408.06266 eq. 7."""
    return torch.sigmoid(-beta * (pi.w - ref.w)) + torch.sigmoid(beta * (pi.l - ref.l))

@loss
def apo_down(pi, ref, *, beta=0.1):
    """s(beta * u) + 1 - s(beta * (u - v)): both down, rejected further.  APO, 2408.06266 eq. 8."""
    u, v = pi.w - ref.w, pi.l - ref.l
    return torch.sigmoid(beta * u) + torch.sigmoid(-beta * (u - v))

@loss
def nca(pi, ref, *, beta=0.01):
    """-log s(beta u) - log s(-beta u) / 2 - log s(-beta v) / 2.  NCA, arXiv 2402.05369."""
    u, v = beta * (pi.w - ref.w), beta * (pi.l - ref.l)
    return -F.logsigmoid(u) - 0.5 * F.logsigmoid(-u) - 0.5 * F.logsigmoid(-v)

@loss
def exo(pi, ref, *, beta=0.1, eps=1e-3):
    """KL(q || [1 - eps, eps]), q = softmax(beta * [u, v]).  EXO, arXiv 2402.00856 eq. 16.
    (The official code's label log-probs [0, -10] are eps = exp(-10).)"""
    w, l = F.log_softmax(beta * torch.stack([pi.w - ref.w, pi.l - ref.l]), dim=0)  # log q
    return w.exp() * (w - math.log(1 - eps)) + l.exp() * (l - math.log(eps))

@loss
def sppo(pi, ref, *, beta=0.001):
    """[(u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2] / 2.  SPPO, arXiv 2405.00675, for win rates 1
    and 0. The factor 1/2 is the official code's; TRL leaves it out."""
    u, v = pi.w - ref.w, pi.l - ref.l
    return 0.5 * ((u - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2)

@loss
def caldpo(pi, ref, *, beta=0.001, weight=0.5):
    """-log s(u - v) + weight * [(u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2].  Cal-DPO, 2412.14516,
    the official code; a restatement has weight 1."""
    u, v = pi.w - ref.w, pi.l - ref.l
    return -F.logsigmoid(u - v) + weight * ((u - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2)

# ----- with a likelihood of the chosen response beside the preference
@loss
def rpo(pi, ref, *, beta=0.01, eta=0.005):
    """DPO - eta * w / nw.  RPO, arXiv 2405.16436 (Iterative RPO, 2404.19733, has eta = 1)."""
    return -F.logsigmoid(beta * ((pi.w - ref.w) - (pi.l - ref.l))) - eta * pi.w / pi.nw

@loss
def cpo(pi, *, beta=0.1, alpha=1.0):
    """-log s(beta * (w - l)) - alpha * w / nw.  CPO, arXiv 2401.08417 (there a token-mean NLL)."""
    return -F.logsigmoid(beta * (pi.w - pi.l)) - alpha * pi.w / pi.nw

@loss
def slic(pi, *, delta=1.0, lam=0.1):
    """max(0, delta - w + l) - lam * w.  SLiC-HF, arXiv 2305.10425, as HALOs first had it."""
    return F.relu(delta - pi.w + pi.l) - lam * pi.w

@loss
def rrhf(pi, *, weight=1.0):
    """weight * max(0, l / nl - w / nw) - w.  RRHF, arXiv 2304.05302 eq. 2-5, for one pair."""
    return weight * F.relu(pi.l / pi.nl - pi.w / pi.nw) - pi.w

@loss
def orpo(pi, *, lam=0.1):
    """-w / nw - lam * log s(logodds(w / nw) - logodds(l / nl)).  ORPO, arXiv 2403.07691 eq. 6-7."""
    return -pi.w / pi.nw - lam * F.logsigmoid(log_odds(pi.w / pi.nw) - log_odds(pi.l / pi.nl))

@loss
def asft(pi, *, lam=0.1):
    """-w / nw - lam * [log s(logodds(w / nw)) + log s(-logodds(l / nl))].  ASFT, arXiv 2409.10571,
    as restated in 2502.01237, whose best lam for Llama-3.1 is the default."""
    good, bad = log_odds(pi.w / pi.nw), log_odds(pi.l / pi.nl)
    return -pi.w / pi.nw - lam * (F.logsigmoid(good) + F.logsigmoid(-bad))

def log_odds(p):
    """log(e^p / (1 - e^p)) of a mean log-prob p < 0, which is kept below -1e-6."""
    p = p.clamp(max=-1e-6)
    return p - torch.log(-torch.expm1(p))

# ----- statistics of the batch; ema=0: of this batch, ema=0.9: the official running averages
@loss(batch=True)
def alphadpo(pi, ref, state, *, beta=2.5, gamma=0.375, alpha=0.05, ema=0.0):
    """-log s(beta * r - gamma - beta * alpha * z), z = (M - mean) / std of M = r - r_ref, detached.
    AlphaDPO, arXiv 2410.10148, as the official code has it; gamma in logits.
    With ema, mean and std start at 0, without bias correction: z is large in the first steps."""
    r = pi.w / pi.nw - pi.l / pi.nl
    m = r.detach() - (ref.w / ref.nw - ref.l / ref.nl)
    state = running(state, m, ema)
    z = standardise(m, state["mean"], state["std"])
    return -F.logsigmoid(beta * r - gamma - beta * alpha * z), state

@loss(batch=True)
def betadpo(pi, ref, state, *, beta=0.1, alpha=0.6, keep=0.8, ema=0.0):
    """DPO with a beta of the batch, on a sample S of it: beta * (1 + alpha * (mean_S D - mean D)),
    at least 1e-3; D = u - v, detached.  beta-DPO, arXiv 2407.08639, as the official code has it.
    S: keep * G pairs, drawn without replacement by exp(-z^2 / 2); seeded by the step."""
    d = (pi.w - ref.w) - (pi.l - ref.l)
    m, g, k = d.detach(), len(d), max(1, int(len(d) * min(1.0, keep)))
    state = running(state, m, ema)
    z = standardise(m, state["mean"], state["std"])
    draw = torch.Generator().manual_seed(int(state["step"]))
    noise = torch.rand(g, generator=draw, dtype=torch.float64).log().to(m.device)
    kept = (noise / torch.exp(-0.5 * z.clamp(-30, 30) ** 2)).topk(k).indices  # Efraimidis-Spirakis
    b = (beta * (1 + alpha * (m[kept].mean() - state["mean"]))).clamp(min=1e-3)
    weight = torch.zeros_like(m).index_fill(0, kept, g / k)  # the mean over G is that over S
    return -weight * F.logsigmoid(b * d), state

def running(state, x, ema):
    """The new state: mean and std of x (G,), or their running averages, and the number of steps."""
    old = {k: state.get(k, torch.zeros((), dtype=torch.float64)) for k in ("mean", "std", "step")}
    mean, std = x.mean().double(), deviation(x).double()
    return dict(mean=ema * old["mean"] + (1 - ema) * mean, std=ema * old["std"] + (1 - ema) * std,
                step=old["step"] + 1)

@loss(batch=True)
def kto(pi, ref, kl, *, beta=0.1, lam_w=1.0, lam_l=1.0):
    """[lam_w * s(beta * (z - u)) + lam_l * s(beta * (v - z))] / 2, z = max(0, mean kl), detached.
    KTO, arXiv 2402.01306; the half makes the mean over pairs that over their 2 G responses."""
    u, v, z = pi.w - ref.w, pi.l - ref.l, kl.detach().mean().clamp(min=0)
    return 0.5 * (lam_w * torch.sigmoid(beta * (z - u)) + lam_l * torch.sigmoid(beta * (v - z)))

@loss(batch=True)
def bco(pi, ref, state, *, beta=0.1):
    """-log s(beta u - delta) - log s(-(beta v - delta)), delta: mean of all rewards beta u, beta v
    so far, this batch included, detached.  BCO, arXiv 2404.04656, as TRL has it."""
    u, v = beta * (pi.w - ref.w), beta * (pi.l - ref.l)
    total = state.get("total", 0.0) + (u + v).detach().double().sum()
    count = state.get("count", 0.0) + torch.tensor(2.0 * len(u), dtype=torch.float64)
    delta = total / count
    return -F.logsigmoid(u - delta) - F.logsigmoid(delta - v), dict(total=total, count=count)

@loss(batch=True)
def aot(pi, ref, *, beta=0.1, paired=True):
    """-log s(beta * (k-th smallest w - l, minus k-th smallest ref_w - ref_l)); paired=False: of u
    and v. The k-th loss, not that of pair k.  AOT, arXiv 2406.05882, as in TRL."""
    x, y = (pi.w - pi.l, ref.w - ref.l) if paired else (pi.w - ref.w, pi.l - ref.l)
    return -F.logsigmoid(beta * (x.sort().values - y.sort().values))

# ----- a reward model: the scorer returns rewards, w and l, in place of log-probs
@loss
def reward(pi):
    """-log s(w - l).  Bradley and Terry 1952; its margins w - l are what madpo takes."""
    return -F.logsigmoid(pi.w - pi.l)

def configure(name, settings):
    """(loss function, its hyper-parameters) from ["beta=2.5", ...]. ValueError if unknown, or for
    what 65 made-up pairs, together and one by one, tell against them."""
    check(name in LOSSES, f"--loss {name}: unknown; choose from {', '.join(LOSSES)}")
    function, hp = LOSSES[name], dict(LOSSES[name].hp)
    signature, kinds = f"{name}{inspect.signature(function)}", {type(x) for x in hp.values()}
    known = "pi ref pi_head ref_head pi_square kl gap" + " state" * function.batch
    check({*function.wants} <= {*known.split()} and kinds <= {bool, int, float, str},
          f"--loss {signature}: the loop has {known}; hyper-parameters come after `*`, with "
          "defaults, numbers or strings; `state` is for @loss(batch=True)")
    for setting in settings:
        key, _, value = setting.partition("=")
        check(key in hp, f"--hp {setting}: {name} has no {key}: {signature}")
        kind = float if type(hp[key]) is int and not value.lstrip("+-").isdigit() else type(hp[key])
        try:
            hp[key] = dict(true=True, false=False)[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(f"--hp {setting}: wanted {key}=VALUE, a {kind.__name__}") from None
    count = torch.arange(5.0 * 65, dtype=torch.float64).view(5, 65)  # rows: w, l, heads, kl
    lengths, average = 2 + count % 3, -1 - count * 7 % 17 / 40
    average[0, 9] = average[1, 5] = -3.5  # two pairs far from the others; and of pair 32 pi = ref
    leaf, ref, gap = (average * lengths).requires_grad_(), average.flip(1) * lengths, lengths[0]
    trial = lambda at, old: apply_loss(function, hp, 0.0, lengths, ref, gap, old, leaf[:, at], at)
    whole, state = trial(slice(None), {})
    each = torch.cat([trial([k], state)[0] for k in range(65)])  # as in a second step
    whole, each = (torch.stack([x, *torch.autograd.grad(x.sum(), leaf)[0]]) for x in (whole, each))
    check(whole.isfinite().all() and each.isfinite().all(), f"{name} --hp {hp}: a loss or its "
          "gradient is not finite for 65 made-up pairs, or for one (a last batch may be)")
    check(trial(slice(None), {})[0].equal(whole[0]), f"{name}: other losses when called again; use `state`")
    check(function.batch or whole.allclose(each, atol=1e-12), f"{name} looks across pairs: @loss(batch=True)")
    check(whole[1:].any(), f"{name} --hp {hp}: no gradient for 65 made-up pairs; detached?")
    return function, hp

def apply_loss(function, hp, sft_weight, lengths, ref, gap, state, leaf, here):
    """(losses (g,), new state) of the pairs at the positions `here` of the global batch.
    leaf (K, g): log-probs of chosen, rejected, and what `fetch` appends; (2 K, g) with squares.
    lengths, ref (K, G); gap (G,)."""
    n, ref = lengths[:, here], ref[:, here]
    two, head, last = slice(2), slice(2, 4) if len(n) > 3 else slice(2), len(n) - 1
    of = lambda x, rows: Logps(*x[rows], *n[rows])
    supply = dict(pi=of(leaf, two), pi_head=of(leaf, head), kl=(leaf[last] - ref[last]).detach(),
                  ref=of(ref, two), ref_head=of(ref, head), gap=gap[here], state={**state},
                  pi_square=of(leaf[-len(n) :].detach(), two))  # the last K of 2 K rows
    try:
        out = function(*(supply[k] for k in function.wants), **hp)
    except ValueError as error:
        raise ValueError(f"{function.__name__}, line {error.__traceback__.tb_next.tb_lineno}: {error}") from None
    with_state = isinstance(out, tuple) and len(out) == 2
    losses, state = out if with_state else (out, {})
    check(with_state == ("state" in function.wants) and isinstance(state, dict)
          and torch.is_tensor(losses) and losses.shape == leaf[0].shape
          and all(torch.is_tensor(x) and x.ndim == 0 for x in state.values()),
          f"{function.__name__} must return (G,) losses, one a pair and not their mean; one that takes `state` "
          f"(losses, new state), a dict of 0-d tensors, no {type(out)} {getattr(out, 'shape', '')}")
    return losses - sft_weight * leaf[0] / n[0], {k: x.detach() for k, x in state.items()}

def code_of(function, *above):
    """Hash of a loss, but for its docstring, and of the functions and constants that it names."""
    text = re.sub(r'(?s)@loss|""".*?"""', "", inspect.getsource(function))
    for name in sorted({*re.findall(r"\w+", text)}):
        thing = inspect.unwrap(globals().get(name))  # functools.cache and the like
        if inspect.isfunction(thing) and thing.__module__ == __name__:
            text += "" if thing in (function, *above) else code_of(thing, function, *above)
        elif isinstance(thing, (int, float, str, tuple, list, dict, torch.Tensor)) and thing is not LOSSES:
            text += re.sub(" at 0x[0-9a-f]+", "", repr(getattr(thing, "tolist", lambda: thing)()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

# ----------------------------------------------------------------------------- pairs of the data
def draw_pairs(scores, how, min_gap):
    """[(row, chosen, rejected, gap)]: `all` pairs of a row, or `best-worst`; never from a tie."""
    pairs = []
    for k, s in enumerate(scores):
        order = sorted(range(len(s)), key=lambda i: -s[i])
        two = [(order[0], order[-1])] if how == "best-worst" else combinations(order, 2)
        pairs += [(k, i, j, s[i] - s[j]) for i, j in two if s[i] > s[j] and s[i] - s[j] >= min_gap]
    return pairs

def fetch(data, pairs, index, supply):
    """The pairs at `index` as rows of the scorer, [(prompt, K responses)], and the rows' ids.
    K = 2, chosen and rejected. Where a loss wants more, it is more responses to the same prompt:
    for heads both, cut to the shorter one's length; for kl, last, the best one of the next row."""
    after = [(pairs[i][0] + 1) % len(data) for i in index] if "kl" in supply else []
    batch, rows = data[[pairs[i][0] for i in index] + after], []
    for k, i in enumerate(index):
        responses = [batch["responses"][k][j] for j in pairs[i][1:3]]
        if {"pi_head", "ref_head"} & {*supply}:
            responses += [r[: min(map(len, responses))] for r in responses]
        if after:
            scores = batch["scores"][len(index) + k]
            responses.append(batch["responses"][len(index) + k][scores.index(max(scores))])
        rows.append((batch["prompt"][k], responses))
    return rows, batch["id"][: len(index)]

def gather(outs, mine, shape, device):
    """Log-probs (K, G) in data order, the same on every rank. outs: this rank's, of the pairs at
    the positions `mine`, written into zeros in float64: the sum over ranks is exact."""
    full = torch.zeros(shape, dtype=torch.float64, device=device)
    full[:, on_device(mine, device)] = torch.cat(outs).detach().double().view(-1, shape[0]).T
    dist.all_reduce(full)
    return full

def score_pairs(scorer, data, pairs, supply, args, device, desc, steps):
    """(K, P) log-probs of the pairs of the first `steps` batches, just as in training; else nan."""
    scores = None
    for step in tqdm.trange(steps, desc=desc, unit="step", disable=dist.get_rank() > 0):
        index = batch_indices(len(pairs), args.batch_size, args.seed, step)
        rows, _ = fetch(data, pairs, index, supply)
        micros = plan(rows, dist.get_world_size(), args.tokens_per_forward)[dist.get_rank()]
        with torch.no_grad():
            outs = [score(scorer, rows, micro, device) for micro in micros]
        part = gather(outs, sum(micros, []), (len(rows[0][1]), len(rows)), device)
        scores = part.new_full((len(part), len(pairs)), math.nan) if scores is None else scores
        scores[:, index] = part
    return scores

def reference_scores(scorer, data, pairs, supply, args, device, steps):
    """score_pairs before step 0, cached beside the data; None if the loss does not want it."""
    if not {"ref", "ref_head", "kl"} & {*supply}:
        return None
    more = sorted({"kl", "pi_head", "ref_head"} & {*supply})  # beside chosen and rejected
    key = [fingerprint(args.model), fingerprint(args.data), more, steps, args.pairs, args.min_gap,
           args.batch_size, args.seed, args.tokens_per_forward, args.compile, dist.get_world_size(),
           device.type, torch.__version__]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cache = Path(args.data).parent / "reference" / f"{name}.pt"
    if on_rank0(cache.exists):
        return on_rank0(torch.load, cache, what=f"{cache}: remove it: ").to(device)
    scores = score_pairs(scorer, data, pairs, supply, args, device, "reference", steps)
    draft = f"{cache}.{os.getpid()}"
    on_rank0(lambda: cache.parent.mkdir(exist_ok=True))
    on_rank0(torch.save, scores.cpu(), draft)
    on_rank0(os.replace, draft, cache)
    return scores

# ------------------------------------------------------------------------------ one global batch
def backward(scorer, rows, losses_of, batch, replay, budget, device):
    """Forward and backward of one global batch; the gradients add up in the parameters.
    rows: [(prompt, [K responses])] * G.  losses_of(leaf (K, g), here) -> losses (g,), state.
    Returns losses (G,), logps (K, G; 2 K with squares) and dL/dlogp, L the mean over G pairs: all
    float64, in data order, equal on every rank; and the loss's new state.
    The step is done in windows. The graphs of a window are kept until its losses are known:
      a loss of single pairs   a window is one micro-batch of every rank
      a loss of the batch      it is the whole step
      replay                   all losses by a pass without graphs; then as for single pairs"""
    world, size = dist.get_world_size(), len(rows)
    shares = plan(rows, world, budget)
    micros = shares[dist.get_rank()]
    kinds = len(rows[0][1]) * (1 + scorer.squares)  # K: log-probs of each response, then squares
    logps, grads = torch.zeros(2, kinds, size, dtype=torch.float64, device=device)
    losses, state = torch.zeros_like(logps[0]), {}

    def settle(window, outs):  # its log-probs, from all ranks -> its losses and dL/dlogp
        nonlocal state
        here = on_device(sorted(i for share in shares for k in window for i in share[k]), device)
        logps.add_(gather(outs, [i for k in window for i in micros[k]], logps.shape, device))
        leaf = logps[:, here].requires_grad_()
        values, state = losses_of(leaf, here)
        losses[here] = values.detach()
        grads[:, here] = torch.autograd.grad(values.sum() / size, leaf)[0]

    every = range(len(micros))
    if replay:
        with torch.no_grad():
            outs = [score(scorer, rows, micro, device) for micro in micros]
        settle(every, outs)
    for window in [every] if batch and not replay else [[k] for k in every]:
        outs = [score(scorer, rows, micros[k], device) for k in window]
        if not replay:
            settle(window, outs)
        for k, out in reversed([*zip(window, outs)]):  # one pass over all would add up in bf16
            scorer.set_is_last_backward(k == window[0])  # FSDP then forgets the forwards' order
            # only in the last pass of the step do copies of the model (--replicas) add up gradients
            scorer.set_requires_all_reduce(k == window[0] and every[-1] in window)
            out.backward((world * grads[:, on_device(micros[k], device)].T.flatten()).to(out.dtype))
    return losses, logps, grads, state

def describe(losses, logps, grads, lengths):
    """What metrics.jsonl says of one global batch; keys as in README.md. lengths (K, G)."""
    average = logps[:2] / lengths[:2]
    r, total = average[0] - average[1], logps[0] - logps[1]
    force = grads.abs().sum(0)  # (G,) |dL/dw| + |dL/dl|, and of heads where there are some
    barely = (r > 0) & (r <= r.mean())
    out = dict(loss=losses.mean(), logp_chosen=average[0].mean(), logp_rejected=average[1].mean(),
               accuracy=(r > 0).double().mean(), accuracy_sum=(total > 0).double().mean(),
               margin=r.mean(), margin_sum=total.mean(), margin_std=r.std(correction=0))
    for name, pairs in dict(misranked=r <= 0, barely=barely, well=(r > 0) & ~barely).items():
        out[f"pairs_{name}"] = pairs.double().mean()
        out[f"grad_{name}"] = (force * pairs).sum() / force.sum().clamp(min=1e-300)
    return dict(zip(out, torch.stack(list(out.values())).tolist()))

# ------------------------------------------------------------------------------------------ main
def main(args):
    function, hp = configure(args.loss, args.hp)
    supply, reward = function.wants, args.loss == "reward"
    pairs = draw_pairs(load_rows(args.data)["scores"], args.pairs, args.min_gap)
    check(pairs, f"{args.data}: no row's scores differ (by --min-gap); wanted data/train")
    if args.margins:  # w - l of all pairs, by a reward model
        margins = json.loads(Path(args.margins).read_text())
        same = "data" in margins and margins["data"] == [fingerprint(args.data), len(pairs)]
        check(same, f"{args.margins}: not of the {len(pairs)} pairs of {args.data}")
        pairs = [(*pair[:3], margin) for pair, margin in zip(pairs, margins["margins"])]
    device, data, tok, scorer, optimizer, partial = start(args, reward, hp=hp, code_of_the_loss=code_of(function))
    epoch = math.ceil(len(pairs) / args.batch_size)
    steps = args.max_steps or math.ceil(args.epochs * epoch)
    print0(f"{args.loss} {hp}: {len(pairs)} pairs x {args.epochs:g} epochs / {args.batch_size} "
           f"a step = {steps} steps, on {dist.get_world_size()} {device.type} process(es)")
    reference = reference_scores(scorer, data, pairs, supply, args, device, min(steps, epoch))
    scorer.squares = "pi_square" in supply
    first, saved = load_checkpoint(partial, scorer, optimizer)
    state, origin = saved or ({}, None)  # of the loss; the first step's metrics
    weight, replay = 0.0 if reward else args.sft_weight, args.replay and function.batch
    bar = tqdm.trange(first, steps, total=steps, initial=first, desc=args.loss, disable=dist.get_rank() > 0)
    for step in bar:
        began = time.monotonic()
        index = batch_indices(len(pairs), args.batch_size, args.seed, step)
        rows, ids = fetch(data, pairs, index, supply)
        lengths = torch.tensor([[1 if reward else len(r) for r in rs] for _, rs in rows], device=device).double().T
        ref = torch.zeros_like(lengths) if reference is None else reference[:, index]
        gap = lengths.new_tensor([pairs[i][3] for i in index])  # (G,)
        losses_of = functools.partial(apply_loss, function, hp, weight, lengths, ref, gap, state)
        losses, logps, grads, state = backward(scorer, rows, losses_of, function.batch, replay,
                                               args.tokens_per_forward, device)
        metrics = describe(losses, logps, grads, lengths)
        lr, loss = learning_rate(step, steps, args.lr), metrics["loss"]
        norm, stop = update(scorer, optimizer, lr, args.clip, loss, step + 1, ids, logps, losses[None], grads)
        if step == 0 and reference is not None:  # policy and reference were one model
            off = dpo(*(Logps(*x[:2], *lengths[:2]) for x in (logps, ref))).mean() - math.log(2)
            check(abs(off) < (1e-5 if device.type == "cpu" else 1e-2),
                  f"first loss: ln 2 + {off}; remove {args.data}/../reference")
        origin = origin or metrics
        metrics |= {f"d{k}": metrics[k] - origin[k] for k in ("logp_chosen", "logp_rejected")}
        seconds = time.monotonic() - began
        tokens = sum(len(p) + sum(map(len, rs)) for p, rs in rows)
        end_step(args, partial, bar, stop, scorer, optimizer, (state, origin), dict(
            step=step + 1, lr=lr, grad_norm=norm, **metrics,
            pairs_per_s=len(rows) / seconds, tokens_per_s=tokens / seconds))
    if reward:
        w, l = score_pairs(scorer, data, pairs, supply, args, device, "margins", epoch).tolist()
        margins = dict(data=[fingerprint(args.data), len(w)], margins=[a - b for a, b in zip(w, l)])
        on_rank0((partial / "margins.json").write_text, json.dumps(margins))
    save_model(scorer, tok, partial, args)

def arguments(add):
    add("--loss", required=True, help="one of the above")
    add("--hp", action="append", default=[], metavar="K=V", help="a hyper-parameter; repeatable")
    trainer_arguments(add, lr=5e-7, batch_size=128, epochs=1, what="pairs")
    add("--pairs", choices=("all", "best-worst"), default="all", help="of a scored list")
    add("--min-gap", type=float, default=0.0, help="smallest score difference of a pair")
    add("--margins", help="margins.json that --loss reward wrote, to take `gap` from")
    add("--sft-weight", type=float, default=0.0, help="of -w / nw, the chosen response's NLL (0)")
    add("--replay", action="store_true", help="batch losses: forward twice, but keep no graphs")

if __name__ == "__main__":
    losses = ["Losses, where s is the sigmoid, r = w / nw - l / nl, u = w - ref_w, v = l - ref_l:"]
    losses += [f"{k}{inspect.signature(f)}\n    {(f.__doc__ or '-').splitlines()[0]}" for k, f in LOSSES.items()]
    run(main, "\n".join([__doc__, *losses]), arguments)

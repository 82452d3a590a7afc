"""SFT model -> aligned model, by any offline preference loss. Owns the losses, all inline, and the loop that makes them exact.

A loss is a pure function of the GLOBAL batch: G pairs in data order, whatever the number of processes and the micro-batches.

    logps = [score(micro) for micro in my share of the step]      # autograd graphs kept
    pi    = gather(logps)                                         # (G,) vectors, the same on every rank, in data order
    loss  = LOSSES[name](pi, ...).mean()                          # plain torch on a few hundred floats
    g     = torch.autograd.grad(loss, (pi.w, pi.l))               # dL/dlogp: one number per response
    torch.autograd.backward(logps, my slice of g * world)         # FSDP averages over ranks, hence * world

    python align.py --loss amapo --model runs/sft --data runs/data/train --out runs/amapo            # toy world, 2 cores: 1 min
    torchrun --nproc-per-node 8 align.py --loss simpo --hp beta=2.5 --hp gamma=1.4 --model M --data D/train --out O --lr 1e-6

A new loss is one function below with @loss; `--loss its_name --hp k=v` then works, and the tests of tests/test_losses.py cover it.
Writes OUT as sft.py does. Every key of metrics.jsonl is defined in README.md.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm

from prepare_data import batch_indices, fingerprint, run
from sft import (cut_metrics, learning_rate, load_checkpoint, memory_gib, metrics_log, on_rank0, plan, print0, save_checkpoint,
                 save_model, score, start, trainer_arguments, update)

# -------------------------------------------------------------------------------------------------------------------- the losses
# r = w / nw - l / nl is the length-normalised margin of a pair: the quantity by which models are ranked and evaluated.


class Logps(NamedTuple):
    """Summed log-probs in nats of the chosen (w) and rejected (l) responses, and their lengths in tokens; all (G,)."""

    w: torch.Tensor
    l: torch.Tensor
    nw: torch.Tensor
    nl: torch.Tensor


LOSSES = {}


def loss(function=None, *, batch=False):
    """Register a loss. Positional parameters name what the loop supplies: `pi`, the policy; `ref`, the reference (computed once and
    cached); `gap`, the score difference of the pair; `state`, a dict of 0-d float64 tensors, {} at first: such a loss returns
    (losses, new state). Keyword-only parameters are the hyper-parameters. batch=True: it looks across pairs. Returns (G,) in nats."""
    if function is None:
        return lambda function: loss(function, batch=batch)
    function.batch = batch
    LOSSES[function.__name__] = function
    return function


@loss(batch=True)
def amapo(pi, *, beta=2.5, group=0, form="code"):
    """-log s(beta * r - margin_i), margin_i = beta * exp(z_i * mu) where r_i < mu, else 0; z = (mu - r) / sigma.
    AMaPO, arXiv 2511.09385 (eq. of the official code). mu, sigma (unbiased) over the batch; the margin carries no gradient.

    Pairs above the mean are left alone, those below are pushed the harder the further below they are.
    group: statistics over this many consecutive pairs; 0 is the whole global batch. (The official trainer takes one gathered
    micro-batch: 8 pairs, or 4, of a batch of 128. So there, unlike here, the loss changes with the number of GPUs.)
    form: "code" is the official code; "paper" is the paper's formula: gamma = z * mean(beta * r), margin = beta * exp(gamma) where
    gamma > 0. The exponent is then beta times larger, and for a batch whose mean is negative (most pairs misranked) the paper's
    margin falls on the pairs ABOVE the mean, the code's still on those below, with an exponent below 0.
    """
    if form not in ("code", "paper"):
        raise ValueError(f"amapo: form={form}; wanted code or paper")
    r = pi.w / pi.nw - pi.l / pi.nl  # (G,)
    margin = torch.cat([_amapo_margin(x, beta, form) for x in r.detach().split(group or len(r))])
    return -F.logsigmoid(beta * r - margin)


def _amapo_margin(r, beta, form):
    """The margin (n,) of one statistics group r (n,). Where the official code is undefined it is 0: one pair, or equal r (a deviation
    of rounding size). Its exponent is capped at 80, which only r of hundreds of nats a token reaches, so every loss is finite."""
    mu, sigma = r.mean(), r.std() if len(r) > 1 else torch.zeros_like(r[0])
    z = torch.where(sigma > 8 * torch.finfo(r.dtype).eps * r.abs().max(), (mu - r) / sigma, 0.0)
    exponent = z * mu if form == "code" else z * beta * mu
    pushed = z > 0 if form == "code" else exponent > 0
    return torch.where(pushed, beta * exponent.clamp(max=80.0).exp(), 0.0)


@loss
def simpo(pi, *, beta=2.0, gamma=1.0):
    """-log s(beta * r - gamma).  SimPO, arXiv 2405.14734 eq. 6. Reference-free; gamma in logits (the official ratio is gamma / beta)."""
    return -F.logsigmoid(beta * (pi.w / pi.nw - pi.l / pi.nl) - gamma)


@loss
def dpo(pi, ref, *, beta=0.1):
    """-log s(beta * [(w - ref_w) - (l - ref_l)]).  DPO, arXiv 2305.18290 eq. 7. Summed log-probs."""
    return -F.logsigmoid(beta * ((pi.w - ref.w) - (pi.l - ref.l)))


def configure(name, settings):
    """(loss function, its hyper-parameters), checked against its signature. settings: ["beta=2.5", ...]."""
    if name not in LOSSES:
        raise ValueError(f"--loss {name}: unknown; choose from {', '.join(LOSSES)}")
    known = {k: p.default for k, p in inspect.signature(LOSSES[name]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    hp = dict(known)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(f"--hp {setting}: {name} has no {key}; it has " + (", ".join(f"{k}={v}" for k, v in known.items()) or "none"))
        try:
            hp[key] = {"true": True, "false": False}[value.lower()] if isinstance(known[key], bool) else type(known[key])(value)
        except (ValueError, KeyError):
            raise ValueError(f"--hp {setting}: wanted a {type(known[key]).__name__}") from None
    return LOSSES[name], hp


# ---------------------------------------------------------------------------------------------------------------- pairs of the data


def draw_pairs(scores, how, min_gap):
    """[(row, chosen, rejected)] from the lists of scores: all pairs of a row or its best against its worst; never from a tie."""
    pairs = []
    for row, s in enumerate(scores):
        order = sorted(range(len(s)), key=lambda i: -s[i])
        chosen = [(order[0], order[-1])] if how == "best-worst" else itertools.combinations(order, 2)
        pairs += [(row, i, j) for i, j in chosen if s[i] > s[j] and s[i] - s[j] >= min_gap]
    return pairs


def fetch(data, pairs):
    """The pairs as rows for the scorer: [(prompt, [chosen, rejected])]; their ids; their score gaps (G,)."""
    batch = data[[row for row, _, _ in pairs]]
    rows = [(p, [rs[i], rs[j]]) for p, rs, (_, i, j) in zip(batch["prompt"], batch["responses"], pairs)]
    gap = torch.tensor([s[i] - s[j] for s, (_, i, j) in zip(batch["scores"], pairs)], dtype=torch.float64)
    return rows, batch["id"], gap


def gather(outs, mine, size, device):
    """(2, size) chosen and rejected log-probs in data order, the same on every rank; `mine` are the positions of `outs` in it.
    Each rank writes its own into zeros, and the sum over ranks is exact. float64: G numbers are free, and so is their accuracy."""
    full = torch.zeros(2, size, dtype=torch.float64, device=device)
    full[:, mine] = torch.cat(outs).detach().double().view(-1, 2).T
    dist.all_reduce(full)
    return full


def reference_scores(scorer, data, pairs, args, device):
    """(2, P) summed log-probs of every pair under the policy before step 0, in the very micro-batches of training; cached on disk."""
    what = [fingerprint(args.model), fingerprint(args.data), args.pairs, args.min_gap, args.batch_size, args.seed, args.tokens_per_forward,
            dist.get_world_size(), device.type, torch.__version__]
    cache = Path(args.data).parent / "reference" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.pt"
    if on_rank0(cache.exists):
        return on_rank0(torch.load, cache).to(device)
    scores = torch.zeros(2, len(pairs), dtype=torch.float64, device=device)
    steps = math.ceil(len(pairs) / args.batch_size)
    for step in tqdm.trange(steps, desc="reference", unit="step", disable=dist.get_rank() > 0):
        index = batch_indices(len(pairs), args.batch_size, args.seed, step)
        rows, _, _ = fetch(data, [pairs[i] for i in index])
        micros = plan(rows, dist.get_world_size(), args.tokens_per_forward)[dist.get_rank()]
        with torch.no_grad():
            outs = [score(scorer, rows, micro, device) for micro in micros]
        scores[:, index] = gather(outs, sum(micros, []), len(rows), device)

    def write():
        cache.parent.mkdir(exist_ok=True)
        torch.save(scores.cpu(), f"{cache}.{os.getpid()}")
        os.replace(f"{cache}.{os.getpid()}", cache)

    on_rank0(write)
    return scores


# ------------------------------------------------------------------------------------------------------------------ one global batch


def backward(scorer, rows, losses_of, batch, replay, budget, device):
    """Forward and backward of one global batch; gradients add up in the parameters.

    rows: G pairs, [(prompt, [chosen, rejected])].  losses_of(logps (2, g), positions [g]): losses (g,) of those pairs.
    Returns losses (G,), logps (2, G) and dL/dlogp (2, G), L the mean over pairs: float64, the same on every rank, in data order.

    The step is done in windows. A window's losses need all of its pairs, and its graphs are kept until they are known:
      a loss of single pairs   one micro-batch of every rank is a window
      a loss of the batch      the whole step is one
      replay                   a pass without graphs gives all losses, then each micro-batch is run again with its own dL/dlogp
    """
    world, size = dist.get_world_size(), len(rows)
    shares = plan(rows, world, budget)
    micros = shares[dist.get_rank()]
    logps, grads = torch.zeros(2, 2, size, dtype=torch.float64, device=device)
    losses = torch.zeros(size, dtype=torch.float64, device=device)

    def settle(window, outs):
        here = sorted(i for share in shares for k in window for i in share[k])
        logps.add_(gather(outs, [i for k in window for i in micros[k]], size, device))
        leaf = logps[:, here].requires_grad_()
        values = losses_of(leaf, here)
        losses[here], grads[:, here] = values.detach(), torch.autograd.grad(values.sum() / size, leaf)[0]

    everything = range(len(micros))
    if replay:
        with torch.no_grad():
            settle(everything, [score(scorer, rows, micro, device) for micro in micros])
    for window in [everything] if batch and not replay else [[k] for k in everything]:
        outs = [score(scorer, rows, micros[k], device) for k in window]
        if not replay:
            settle(window, outs)
        torch.autograd.backward(outs, [grads[:, micros[k]].T.flatten().to(out.dtype) * world for k, out in zip(window, outs)])
    return losses, logps, grads


def describe(losses, logps, grads, lengths):
    """What metrics.jsonl says of one global batch; keys as in README.md. lengths (2, G)."""
    average = logps / lengths
    r, total = average[0] - average[1], logps[0] - logps[1]
    force = grads.abs().sum(0)  # (G,) |dL/dw| + |dL/dl|
    barely = (r > 0) & (r <= r.mean())
    out = dict(loss=losses.mean(), accuracy=(r > 0).double().mean(), accuracy_sum=(total > 0).double().mean(),
               margin=r.mean(), margin_std=r.std(correction=0), margin_sum=total.mean(),
               logp_chosen=average[0].mean(), logp_rejected=average[1].mean())
    for name, pairs in (("misranked", r <= 0), ("barely", barely), ("well", (r > 0) & ~barely)):
        out[f"pairs_{name}"] = pairs.double().mean()
        out[f"grad_{name}"] = (force * pairs).sum() / force.sum().clamp(min=1e-300)
    return dict(zip(out, torch.stack(list(out.values())).tolist()))


# --------------------------------------------------------------------------------------------------------------------------- main


def main(args):
    function, hp = configure(args.loss, args.hp)
    supplied = [k for k, p in inspect.signature(function).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    ready = start(args, [])
    if ready is None:
        return
    device, data, tok, scorer, optimizer, partial = ready
    pairs = draw_pairs(data["scores"], args.pairs, args.min_gap)
    if not pairs:
        raise ValueError(f"{args.data}: no pair of responses whose scores differ by {args.min_gap or 'anything'}")
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(len(pairs) / args.batch_size))
    print0(f"{args.loss}({', '.join(f'{k}={v}' for k, v in hp.items())}): {len(pairs)} pairs x {args.epochs} epochs / {args.batch_size}"
           f" = {steps} steps on {dist.get_world_size()} process(es), {device.type}")
    reference = reference_scores(scorer, data, pairs, args, device) if "ref" in supplied else None
    first, state = load_checkpoint(partial, scorer, optimizer)
    origin = on_rank0(cut_metrics, partial, first)
    with metrics_log(partial, steps, first, args.loss) as log:
        for step in range(first, steps):
            began = time.perf_counter()
            index = batch_indices(len(pairs), args.batch_size, args.seed, step)
            rows, ids, gap = fetch(data, [pairs[i] for i in index])
            lengths = torch.tensor([[len(r) for r in rs] for _, rs in rows], dtype=torch.float64, device=device).T  # (2, G)
            ref = reference[:, index] if reference is not None else None
            new_state = {}

            def losses_of(leaf, here):
                supply = dict(pi=Logps(*leaf, *lengths[:, here]), gap=gap.to(device)[here], state=state)
                if ref is not None:
                    supply["ref"] = Logps(*ref[:, here], *lengths[:, here])
                values = function(*(supply[k] for k in supplied), **hp)
                if "state" in supplied:
                    values, new = values
                    new_state.update(new)
                return values

            losses, logps, grads = backward(scorer, rows, losses_of, function.batch, args.replay, args.tokens_per_forward, device)
            state = new_state
            if step == 0 and ref is not None:
                off = abs(dpo(Logps(*logps, *lengths), Logps(*ref, *lengths)).mean().item() - math.log(2))
                assert off < (1e-5 if device.type == "cpu" else 1e-2), f"before step 0 policy and reference differ: DPO's loss is ln 2 + {off}"
            metrics = describe(losses, logps, grads, lengths)
            lr = learning_rate(step, steps, args.lr)
            norm = update(scorer, optimizer, lr, args.clip).item()
            if not math.isfinite(metrics["loss"] + norm):
                raise ValueError(f"step {step + 1}: loss {metrics['loss']}, gradient norm {norm}; rows {ids}")
            origin = origin or metrics
            metrics |= {f"d{k}": metrics[k] - origin[k] for k in ("logp_chosen", "logp_rejected")}
            tokens, seconds = sum(len(p) + len(r) for p, rs in rows for r in rs), time.perf_counter() - began
            log(dict(step=step + 1, lr=lr, grad_norm=norm, **metrics, pairs_per_s=len(rows) / seconds,
                     tokens_per_s=tokens / seconds, memory_gib=memory_gib(device)))
            if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
                save_checkpoint(partial, step + 1, scorer, optimizer, state)
    save_model(scorer, tok, partial, args.out, getattr(torch, args.save_dtype), args.model)
    print0(f"wrote {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--loss", required=True, help=f"one of: {', '.join(LOSSES)}")
    parser.add_argument("--hp", action="append", default=[], metavar="K=V", help="a hyper-parameter of the loss; may be repeated")
    trainer_arguments(parser, lr=5e-7, batch_size=128, epochs=1, what="pairs")
    parser.add_argument("--pairs", choices=("all", "best-worst"), default="all", help="which pairs of a scored list (default all)")
    parser.add_argument("--min-gap", type=float, default=0.0, help="smallest score difference of a pair; ties never make one")
    parser.add_argument("--replay", action="store_true", help="least memory for a loss of the batch: forward twice, keep no graphs")
    run(main, parser)

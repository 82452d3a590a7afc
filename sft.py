"""Base model -> SFT model: the mean negative log-likelihood of the response tokens. Owns the model side of every stage.

    loss = - sum_{responses y of the global batch} log pi(y | x)  /  number of response tokens of the global batch

whatever the micro-batches and the number of processes. Here live: load, shard (FSDP2), score, plan micro-batches, optimise,
checkpoint, save. align.py and evaluate.py import them.

    python sft.py --model runs/data/model --data runs/data/sft --out runs/sft                 # toy world, 2 cores: about 1.5 min
    torchrun --nproc-per-node 8 sft.py --model meta-llama/Meta-Llama-3-8B --data D/sft --out O --batch-size 128 --lr 2e-5

Reads a folder of prepare_data.py and its `tokenizer` folder. Writes OUT, an ordinary Hugging Face folder, with args.json and
metrics.jsonl beside the weights. It is OUT.partial until complete; the same command resumes from its newest checkpoint.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import tqdm
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from prepare_data import batch_indices, begin, end_of_turn, load_tokenizer, run

# ------------------------------------------------------------------------------------------------------------------- processes


def setup():
    """Join torchrun's process group, or make one of one process (without a port). Returns this process's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    transformers.utils.logging.disable_progress_bar()
    return device


def print0(*words):
    if dist.get_rank() == 0:
        print(*words, flush=True)


def on_rank0(function, *args):
    """The result of function(*args), called on rank 0 only; an error there is raised on every rank."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*args)
        except (ValueError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


# ------------------------------------------------------------------------------------------------------- the model and its scores
UNSUPPORTED = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # config keys that change the logits in ways not done here
HEAD_CHUNK = 1024  # response tokens whose logits exist at the same time


class Scorer(nn.Module):
    """A causal LM whose forward returns summed log-probs of responses. The FSDP root: logits never leave it."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.softcap = getattr(lm.config, "final_logit_softcapping", None)

    def forward(self, ids, source, target, owner):
        """ids (B, T), right-padded; for each of N response tokens: source (N,), the flat position that predicts it, target (N,),
        its id, and owner (N,), its row. Returns the summed log-probs (B,) in nats, fp32.

        No attention mask is needed: under a causal mask no real token sees the padding to its right.
        """
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        hidden = hidden.flatten(0, 1)[source]  # (N, D)
        chunks = zip(hidden.split(HEAD_CHUNK), target.split(HEAD_CHUNK))
        logp = [checkpoint(self.token_logps, h, y, use_reentrant=False) for h, y in chunks]  # no (N, V) stays alive
        return torch.zeros(len(ids), device=ids.device).index_add(0, owner, torch.cat(logp))  # (B,)

    def token_logps(self, hidden, target):
        logits = self.lm.get_output_embeddings()(hidden).float()  # (chunk, V)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return -F.cross_entropy(logits, target, reduction="none")  # (chunk,)


def load_model(path, device, recompute=False):
    """A Hugging Face folder or hub id -> a Scorer, sharded: fp32 master weights; on GPU bf16 inside forward and backward.

    recompute: activation checkpointing of every decoder layer. Only rank 0 reads the weights. Dropout is always off.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    if scale := [k for k in UNSUPPORTED if getattr(config, k, None) not in (None, 1.0)]:
        raise ValueError(f"{path}: its config sets {scale[0]}, which the scorer does not apply")
    # SDPA has no soft-capping of attention scores (Gemma-2)
    how = dict(dtype=torch.float32, attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa")
    full = on_rank0_model(path, how)
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(config, **how)
    if not hasattr(lm.base_model, "layers"):
        raise ValueError(f"{path}: a {config.model_type} model has no `layers` to shard; supported are Llama, Mistral, Qwen, Gemma and their like")
    scorer, mesh = Scorer(lm).eval(), init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(scorer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    scorer.to_empty(device=device)
    lm.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(lm, full.state_dict() if full else {}, options=options)
    known = dict(full.named_buffers()) if full else {}
    for name, buffer in lm.named_buffers():  # rotary frequencies: not in any state dict
        buffer.copy_(known.get(name, buffer))
        dist.broadcast(buffer, 0)
    lm.generation_config = full.generation_config if full else lm.generation_config
    if recompute:
        lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        for layer in lm.base_model.layers:
            layer.training = True  # its own flag only: it checkpoints, while dropout inside it stays off
    return scorer


def on_rank0_model(path, how):
    """The whole model on the CPU of rank 0, None elsewhere."""
    box = []
    on_rank0(lambda: box.append(transformers.AutoModelForCausalLM.from_pretrained(path, **how)))
    return box[0] if box else None


# --------------------------------------------------------------------------------------------------------- rows and micro-batches


def load_rows(path):
    """The rows of a prepared folder. ValueError if it is none."""
    import datasets

    if not (Path(path) / "dataset_info.json").exists():
        raise ValueError(f"{path}: not a folder that prepare_data.py wrote")
    return datasets.load_from_disk(str(path))


def plan(rows, world, budget):
    """Micro-batches of a step: result[rank][k] lists positions in `rows`. A pure function, so every rank knows all of it.

    rows: [(prompt ids, [response ids, ...])].  budget: tokens of a padded forward; a row of more is a micro-batch of its own.
    Sorted by length, longest first (memory runs out at once or not at all), dealt out evenly. Every rank gets the same NUMBER of
    micro-batches, as FSDP demands: an empty one is a dummy.
    """
    width = [len(p) + max(map(len, rs)) for p, rs in rows]
    order, shares = sorted(range(len(rows)), key=lambda i: (-width[i], i)), []
    for rank in range(world):
        micros, count = [], 0
        for i in order[rank::world]:
            count += len(rows[i][1])
            if not micros or width[micros[-1][0]] * count > budget:
                micros.append([])
                count = len(rows[i][1])
            micros[-1].append(i)
        shares.append(micros)
    return [micros + [[]] * (max(map(len, shares)) - len(micros)) for micros in shares]


def score(scorer, rows, micro, device):
    """Summed log-probs (R,) of all responses of the rows in `micro`, row by row; R = 0 for a dummy, which is computed all the same."""
    pairs = [(p, r) for i in micro or [0] for p, r in ((rows[i][0], r) for r in rows[i][1])]
    width = max(len(p) + len(r) for p, r in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)  # (B, T); padding is never looked at, 0 will do
    source, owner = [], []
    for b, (p, r) in enumerate(pairs):
        ids[b, : len(p) + len(r)] = torch.tensor(p + r)
        source.append(torch.arange(len(p) - 1, len(p) + len(r) - 1) + b * width)
        owner.append(torch.full((len(r),), b))
    source, owner = torch.cat(source), torch.cat(owner)  # (N,)
    inputs = (ids, source, ids.flatten()[source + 1], owner)
    out = scorer(*(x.to(device, non_blocking=True) for x in inputs))
    return out if micro else out[:0]


# ------------------------------------------------------------------------------------------------------------------- optimiser


def make_optimizer(name, scorer, weight_decay=0.0):
    """adamw (fused) or adamw8bit, which does not take DTensors and so gets local shards that share their storage."""
    named = dict(scorer.named_parameters())
    if name == "adamw":
        optimizer = torch.optim.AdamW(named.values(), weight_decay=weight_decay, fused=True)
    else:
        import bitsandbytes

        named = {n: p for n, p in named.items() if p.to_local().numel()}
        optimizer = bitsandbytes.optim.AdamW8bit([nn.Parameter(p.to_local()) for p in named.values()], weight_decay=weight_decay)
    optimizer.named = named
    return optimizer


def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then cosine to zero."""
    warm = max(1, round(warmup * steps))
    return peak * (step + 1) / warm if step < warm else peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def update(scorer, optimizer, lr, clip):
    """Clip by global norm, one optimizer step, clear the gradients. Returns the gradient norm before clipping, a tensor ()."""
    norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), clip)
    group = optimizer.param_groups[0]
    group["lr"] = lr
    for p, local in zip(optimizer.named.values(), group["params"]):
        if p is not local:
            local.grad = p.grad.to_local()
    optimizer.step()
    optimizer.zero_grad()
    scorer.zero_grad()
    return norm.full_tensor()


# ----------------------------------------------------------------------------------------------------- checkpoints, metrics, save


def tensors(scorer, optimizer):
    """All that a checkpoint holds, under flat keys. A DTensor is one global entry; plain tensors of 8-bit moments are per rank."""
    out = {f"model.{name}": p.detach() for name, p in scorer.named_parameters()}
    for name, param in zip(optimizer.named, optimizer.param_groups[0]["params"]):
        for key, value in optimizer.state[param].items():
            if torch.is_tensor(value) and key != "step" and not key.startswith("qmap"):
                rank = "" if isinstance(value, DTensor) else f"{dist.get_rank()}."
                out[f"opt.{rank}{name}.{key}"] = value
    return out


def save_checkpoint(partial, step, scorer, optimizer, state=None):
    """Writes PARTIAL/step-N, complete or not at all, then removes the older ones. state: a dict of tensors (of the loss)."""
    folder, draft = partial / f"step-{step}", partial / f"draft-{step}"
    on_rank0(lambda: shutil.rmtree(draft, ignore_errors=True))
    dcp.save(tensors(scorer, optimizer), checkpoint_id=draft)

    def complete():
        eight_bit = not isinstance(optimizer, torch.optim.AdamW)
        torch.save(dict(step=step, state=state or {}, world=dist.get_world_size() if eight_bit else 0), draft / "state.pt")
        os.replace(draft, folder)
        for old in partial.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)

    on_rank0(complete)


def load_checkpoint(partial, scorer, optimizer):
    """(step, state) of the newest complete checkpoint of PARTIAL, loaded in place; (0, {}) if there is none."""
    found = on_rank0(lambda: sorted(partial.glob("step-*"), key=lambda f: int(f.name[5:])))
    if not found:
        return 0, {}
    saved = torch.load(found[-1] / "state.pt")
    if saved["world"] not in (0, dist.get_world_size()):
        raise ValueError(f"{found[-1]}: 8-bit moments of {saved['world']} processes; resume with as many, not {dist.get_world_size()}")
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    update(scorer, optimizer, lr=0.0, clip=1.0)  # makes the moments exist
    dcp.load(tensors(scorer, optimizer), checkpoint_id=found[-1])
    for state in optimizer.state.values():
        state["step"] = torch.full_like(state["step"], saved["step"]) if torch.is_tensor(state["step"]) else saved["step"]
    print0(f"resumed from {found[-1]}")
    return saved["step"], saved["state"]


def cut_metrics(partial, step):
    """Drop the lines of metrics.jsonl after `step`, so that a resumed run writes each step once. Returns the first line or None."""
    path = partial / "metrics.jsonl"
    lines = [s for s in path.read_text().splitlines() if s.endswith("}")] if path.exists() else []
    lines = [s for s in lines if json.loads(s)["step"] <= step]
    path.write_text("".join(s + "\n" for s in lines))
    return json.loads(lines[0]) if lines else None


@contextlib.contextmanager
def metrics_log(partial, steps, start, desc):
    """A function log(dict) that writes one JSON line a step and moves the progress bar; both on rank 0 only."""
    if dist.get_rank():
        yield lambda record: None
        return
    with open(partial / "metrics.jsonl", "a") as file, tqdm.tqdm(total=steps, initial=start, desc=desc, unit="step") as bar:
        def log(record):
            file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in record.items()}) + "\n")
            file.flush()
            bar.set_postfix({k: f"{record[k]:.3g}" for k in ("loss", "lr", "accuracy") if k in record}, refresh=False)
            bar.update()

        yield log


def memory_gib(device):
    """Peak memory in GiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save_model(scorer, tok, partial, out, dtype, model):
    """PARTIAL -> OUT, an ordinary Hugging Face folder: weights, tokenizer with chat template, generation config with every stop id.

    dtype: float32 by default. At these learning rates most weight changes do not survive rounding to bfloat16; the share that
    does, against the weights that training began with, is printed.
    """
    state = get_model_state_dict(scorer.lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write():
        lm, half = scorer.lm, dtype == torch.bfloat16
        if half:
            old = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
            moved = sum((state[k] != old[k]).sum().item() for k in state)
            kept = sum((state[k].bfloat16() != old[k].bfloat16()).sum().item() for k in state)
            print(f"bfloat16 keeps {kept / max(moved, 1):.1%} of the weight changes (float32 keeps all)")
        eos = lm.generation_config.eos_token_id
        stops = {end_of_turn(tok)[0], tok.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        lm.generation_config.eos_token_id = sorted(stops)
        lm.config.dtype = dtype
        lm.save_pretrained(partial, state_dict={k: v.to(dtype) for k, v in state.items()})
        tok.save_pretrained(partial)
        os.replace(partial, out)
        for folder in [*Path(out).glob("step-*"), *Path(out).glob("draft-*")]:
            shutil.rmtree(folder)

    on_rank0(write)


# ------------------------------------------------------------------------------------------------------------------------ main


def start(args, inputs):
    """What both trainers begin with: device, rows, tokenizer, model, optimizer, OUT.partial (None: OUT is complete)."""
    device, rows = setup(), load_rows(args.data)
    if args.batch_size < 1 or args.tokens_per_forward < 1 or args.epochs <= 0:
        raise ValueError("--batch-size, --tokens-per-forward and --epochs must be positive")
    tok = load_tokenizer(Path(args.data).parent / "tokenizer")
    config = transformers.AutoConfig.from_pretrained(args.model)  # a bad path fails here, before anything is written
    if len(tok) > config.vocab_size:
        raise ValueError(f"{args.data} was prepared with another tokenizer: {len(tok)} tokens, but {args.model} has {config.vocab_size}")
    make = begin(args.out, args, [args.data, args.model, *inputs])
    if make is None:
        return print0(f"{args.out} is complete")
    scorer = load_model(args.model, device, args.recompute)
    return device, rows, tok, scorer, make_optimizer(args.optimizer, scorer, args.weight_decay), on_rank0(make)


def main(args):
    ready = start(args, [])
    if ready is None:
        return
    device, data, tok, scorer, optimizer, partial = ready
    rank, world = dist.get_rank(), dist.get_world_size()
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(len(data) / args.batch_size))
    print0(f"{len(data)} demonstrations x {args.epochs} epochs / {args.batch_size} = {steps} steps on {world} process(es), {device.type}")
    first, _ = load_checkpoint(partial, scorer, optimizer)
    on_rank0(cut_metrics, partial, first)
    with metrics_log(partial, steps, first, "sft") as log:
        for step in range(first, steps):
            began = time.perf_counter()
            batch = data[batch_indices(len(data), args.batch_size, args.seed, step)]
            rows = list(zip(batch["prompt"], batch["responses"]))
            total = sum(len(r) for _, rs in rows for r in rs)
            loss = torch.zeros((), device=device)
            for micro in plan(rows, world, args.tokens_per_forward)[rank]:
                part = -score(scorer, rows, micro, device).sum() / total
                (part * world).backward()  # FSDP averages over ranks
                loss += part.detach()
            dist.all_reduce(loss)
            lr = learning_rate(step, steps, args.lr)
            norm = update(scorer, optimizer, lr, args.clip)
            if not math.isfinite(loss.item() + norm.item()):
                raise ValueError(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}; rows {batch['id']}")
            seconds = time.perf_counter() - began
            log(dict(step=step + 1, loss=loss.item(), lr=lr, grad_norm=norm.item(), response_tokens=total,
                     tokens_per_s=sum(len(p) + len(r) for p, rs in rows for r in rs) / seconds, memory_gib=memory_gib(device)))
            if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
                save_checkpoint(partial, step + 1, scorer, optimizer)
    save_model(scorer, tok, partial, args.out, getattr(torch, args.save_dtype), args.model)
    print0(f"wrote {args.out}")


def trainer_arguments(parser, lr, batch_size, epochs, what):
    """The arguments that sft.py and align.py share."""
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face folder or hub id to start from")
    add("--data", required=True, help="a folder that prepare_data.py wrote")
    add("--out", required=True, help="the folder to write; OUT.partial until complete")
    add("--epochs", type=float, default=epochs, help=f"passes over the data (default {epochs})")
    add("--lr", type=float, default=lr, help=f"peak learning rate (default {lr})")
    add("--batch-size", type=int, default=batch_size, help=f"{what} in the global batch (default {batch_size})")
    add("--tokens-per-forward", type=int, default=8192, help="padded tokens of one forward per process: memory, not results")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="adamw8bit: bitsandbytes, a quarter of the moments' memory")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    add("--clip", type=float, default=1.0, help="largest global gradient norm (default 1)")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, a third more compute")
    add("--save-every", type=int, default=0, metavar="N", help="a checkpoint every N steps (default 0: none)")
    add("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the final weights")
    add("--max-steps", type=int, default=0, help="optimizer steps instead of --epochs (0: by epochs); the schedule ends there")
    add("--seed", type=int, default=0, help="of the data order")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    trainer_arguments(parser, lr=2e-5, batch_size=128, epochs=1, what="demonstrations")
    run(main, parser)

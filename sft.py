"""Base model -> SFT model, by the mean of -log pi over all response tokens of the global batch.
Owns the model side of all stages: load, shard (FSDP2), pack, score, optimiser, checkpoints, save.

    python sft.py --model runs/toy/data/model --data runs/toy/data/sft --out runs/sft \\
        --lr 3e-3 --batch-size 64                              # toy world, 2 cores: 1 minute

Reads a folder of prepare_data.py, and `tokenizer` beside it. Writes OUT, a Hugging Face folder with
metrics.jsonl; OUT.partial until complete, and the same command resumes from its last checkpoint.
"""

import functools
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import tqdm
import transformers
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from prepare_data import begin, check, end_of_turn, fingerprint, load_tokenizer, run

# ------------------------------------------------------------------------------------- processes
def setup():
    """Join torchrun's process group, or make one of one process (no port). Returns the device."""
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    wait = 4 * dist.distributed_c10d.default_pg_timeout  # 2 hours: rank 0 may download
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=wait, **alone)
    torch.manual_seed(0)  # of the one thing that is drawn, a new reward head
    return device

SIGNALS = []  # the first stops a run after its step, a second at once; torchrun sends each twice
def heed(number, frame):
    if SIGNALS and "RANK" not in os.environ:
        os._exit(128 + number)
    SIGNALS.append(number)

def on_rank0(function, *args, what=""):
    """function(*args) of rank 0, on every rank; so is its error, after `what`, a file's name."""
    box = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*args)
        except Exception as error:  # of any kind: the others must not wait
            box[1] = f"{what}{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    dist.broadcast_object_list(box)
    check(not box[1], box[1])
    return box[0]

print0 = lambda *text: on_rank0(lambda: print(*text, flush=True))

# ---------------------------------------------------------------------- the model and its scores
# response tokens whose logits exist at the same time; on a CPU 8 MiB of them, 256 at least
head_chunk = lambda size: 1024 if torch.cuda.is_available() else max(256, min(1024, 2**21 // size))
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions"}  # to attention
def attend(module, query, key, value, attention_mask, scaling, layout=None, dropout=0.0,
           sliding_window=None, softcap=None, **others):
    """Attention by the layout of `pack`, as transformers calls it: query (1, H, T, D), key, value
    (1, K, T, D) -> (1, T, H, D). What would change the maths is refused."""
    check(layout is not None, "this model does not pass `layout` on to its attention: take another")
    others |= dict(mask=attention_mask, dropout=dropout or None)  # for "packed" no mask is made
    others = {name for name in others if others[name] is not None} - HARMLESS
    check(not others, f"attention has no {others} here: take another model")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, ., D)
    k, v = (x.index_select(0, layout.flat) for x in (k, v))  # (M, K, D)
    if q.is_cuda and q.dtype != torch.float32 and softcap is None:  # torch's varlen_attn, with GQA
        out = torch.ops.aten._flash_attention_forward(  # the last query sees the last key
            q, k, v, *layout.ends, *layout.longest, 0.0, True, False, scale=scaling,
            window_size_left=(sliding_window or 0) - 1, window_size_right=0)[0]  # -1: no window
    else:
        out = attend_blocks(q, k, v, layout, scaling, sliding_window or len(k), softcap)
    return out[None], None

@torch.compiler.disable  # or each layout would be compiled anew
def attend_blocks(q, k, v, layout, scaling, window, softcap):
    """The same by blocks of sequences, padded on the right: q (T, H, D), k and v (M, K, D)."""
    outs, sizes = [], [n * length for n, length in layout.blocks]
    copies = [x.split(sizes) for x in (q.index_select(0, layout.flat), k, v)]
    for (n, length), *parts in zip(layout.blocks, *copies):
        q, k, v = (x.unflatten(0, (n, length)).transpose(1, 2) for x in parts)  # (n, ., L, D)
        seen = lambda: q.new_ones(length, length).bool().tril().triu(1 - window)  # (L, L)
        if softcap is None:
            how = dict(is_causal=True) if window >= length else dict(attn_mask=seen())
            out = F.scaled_dot_product_attention(q, k, v, **how, scale=scaling, enable_gqa=True)
        else:  # Gemma-2
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            weights = softcap * torch.tanh(q @ k.mT * (scaling / softcap))
            weights = weights.masked_fill(~seen(), -math.inf).softmax(-1, dtype=torch.float32)
            out = weights.to(v.dtype) @ v
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, layout.back)

transformers.AttentionInterface.register("packed", attend)

class Scorer(torch.nn.Module):
    """A causal LM whose forward returns log-probs of responses. The FSDP root: logits stay here."""
    def __init__(self, lm):
        super().__init__()
        self.lm, self.squares, self.chunk = lm, False, head_chunk(lm.config.vocab_size)

    def forward(self, ids, positions, source, target, owner, last, layout):
        """Summed log-probs (R, 1) in nats, fp32, of responses that `pack` packed; or their rewards.
        With self.squares (R, 2): beside them log sum_v pi(v)^2, summed over places alike."""
        hidden = self.lm.base_model(ids[None], position_ids=positions[None], use_cache=False,
                                    layout=SimpleNamespace(**layout)).last_hidden_state[0]  # (T, D)
        if hasattr(self.lm, "score"):
            return self.lm.score(hidden[last]).float()
        def token_logps(hidden, target):
            logits = self.lm.get_output_embeddings()(hidden).float()  # (chunk, V)
            if softcap := getattr(self.lm.config, "final_logit_softcapping", None):
                logits = softcap * torch.tanh(logits / softcap)
            logps = [-F.cross_entropy(logits, target, reduction="none")]
            if self.squares:
                logps.append(logits.detach().mul(2).logsumexp(1) - 2 * logits.detach().logsumexp(1))
            return torch.stack(logps, 1)  # (chunk, 1 or 2)
        chunks = zip(hidden.index_select(0, source).split(self.chunk), target.split(self.chunk))
        logps = torch.cat([checkpoint(token_logps, h, y, use_reentrant=False) for h, y in chunks])
        return logps.new_zeros(len(last), logps.shape[1]).index_add(0, owner, logps)

def load_config(path):
    """The config of a Hugging Face folder or hub id; ValueError if there is none."""
    return on_rank0(lambda: transformers.AutoConfig.from_pretrained(path, trust_remote_code=False),
                    what=f"{path}: neither a model folder nor a hub id within reach: ")

def check_like_llama(lm, config, path):
    """ValueError if a model does what `attend` and Scorer do not compute."""
    odd = {*(getattr(config, "layer_types", None) or [])} - {"full_attention", "sliding_attention"}
    odd |= {"Conv1d" for module in lm.modules() if isinstance(module, torch.nn.Conv1d)}  # of Mamba
    scales = "logit_scale", "logits_scaling", "lm_head_multiplier"
    odd |= {key for key in scales if getattr(config, key, None) not in (None, 1.0)}
    fine = hasattr(lm.base_model, "layers") and len([*lm.children()]) == 2
    check(fine and not odd and lm.is_backend_compatible(), f"{path}: {config.model_type} is not "
          f"like Llama, `layers` whose tokens meet in attention alone and a head {odd or ''}")

def load_model(path, device, checkpointed=0, reward=False, replicas=1, compiled=False):
    """A Hugging Face folder or hub id -> a sharded Scorer in eval mode (no dropout), in fp32; on a
    GPU forward and backward are in bf16. checkpointed: how many layers recompute. reward: a scalar
    for the LM head. replicas: copies, each sharded over its ranks (HSDP). compiled: the layers."""
    config, auto, full = load_config(path), transformers.AutoModelForCausalLM, None
    if reward:
        auto, config.num_labels = transformers.AutoModelForSequenceClassification, 1
    with torch.device("meta"):
        lm = auto.from_config(config, dtype=torch.float32)
    check_like_llama(lm, config, path)
    lm.config._attn_implementation = "packed"
    def read():  # never a pickle, which can run what was sent in it
        nonlocal full  # the whole model, on the CPU of rank 0
        full, found = auto.from_pretrained(path, config=config, dtype=torch.float32,
                                           use_safetensors=True, output_loading_info=True)
        check({*found["missing_keys"]} <= {"score.weight"}, f"they lack {found['missing_keys']}")
    on_rank0(read, what=f"{path}: no whole safetensors weights; get them again or convert them: ")
    scorer, shape = Scorer(lm).eval(), (replicas, dist.get_world_size() // replicas)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))
    mesh = mesh if replicas > 1 else mesh["shards"]
    policy = MixedPrecisionPolicy(torch.bfloat16 if device.type == "cuda" else None, torch.float32)
    for module in (*lm.base_model.layers, scorer):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    scorer.to_empty(device=device)
    lm.tie_weights()
    options = whole.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    whole.set_model_state_dict(lm, full.state_dict() if full else {}, options=options)
    for name, buffer in lm.named_buffers():  # rotary frequencies: not in any state dict
        buffer.copy_(on_rank0(lambda: full.get_buffer(name)))
    lm.generation_config = getattr(full, "generation_config", None)  # none: a reward model
    getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()  # till 5.19
    for k, layer in enumerate(lm.base_model.layers):
        layer.training = k < checkpointed  # recompute; dropout inside stays off
        if compiled:
            layer.compile(dynamic=True)
    return scorer

# ---------------------------------------------------------- data order, micro-batches, packed rows
shuffled = functools.lru_cache(2)(lambda n, seed: random.Random(seed).sample(range(n), n))
def batch_indices(n, batch_size, seed, step):
    """Data order, a pure function: where global batch `step` finds its items, permuted by epoch."""
    epoch, k = divmod(step, math.ceil(n / batch_size))
    return shuffled(n, f"order {seed} {epoch}")[k * batch_size : (k + 1) * batch_size]

def plan(rows, world, budget):
    """The micro-batches of a step: result[rank][k] lists positions in `rows`. A pure function.
    rows: [(prompt ids, [response ids, ...])].  budget: tokens of a forward; a row of more is a
    micro-batch of its own. Longest first (memory runs out at once or not at all), dealt out like
    a snake. FSDP wants the same NUMBER of micro-batches on every rank: an empty one is a dummy."""
    tokens = [len(p) + sum(map(len, rs)) for p, rs in rows]
    order = sorted(range(len(rows)), key=lambda i: (-tokens[i], i))
    shares = [[] for _ in range(world)]
    for i, micros in zip(order, (shares + shares[::-1]) * len(rows)):
        if not micros or sum(tokens[j] for j in micros[-1]) + tokens[i] > budget:
            micros.append([])
        micros[-1].append(i)
    return [micros + [[]] * (max(map(len, shares)) - len(micros)) for micros in shares]

def pack(rows, flash):
    """Rows [(prompt, [responses])] end to end, each prompt once. ([1, 2], [[3, 4, 5], [6, 7]]):
    ids, positions (T,)    1 2 3 4 5 6 7, 0 1 2 3 4 2 3
    target, source (N,)    3 4 5 6 7, 1 2 3 1 5    response tokens, the places that predict them
    owner (N,), last (R,)  0 0 0 1 1, 4 6          whose they are, where each response ends
    flat (M,)              0 1 2 3 4 0 1 5 6       for each response its prompt's places, its own
    ends (2, R + 1)        0 5 7, 0 5 9            flash: of queries (T) and keys (M); longest 5 5
    blocks, back (T,)      [2, 5], 5 6 2 3 4 7 8   else: [how many, length], flat padded; T in M"""
    ids, source, target, owner, places = [], [], [], [], []
    for prompt, responses in rows:
        prefix = range(len(ids), len(ids) + len(prompt))
        ids += prompt
        for response in responses:
            places.append([*prefix, *range(len(ids), len(ids) + len(response))])
            source += places[-1][len(prompt) - 1 : -1]
            target += response
            owner += [len(places) - 1] * len(response)
            ids += response
    ids, source, target, owner = map(torch.tensor, (ids, source, target, owner))
    last, lengths = torch.tensor([(seq[-1], len(seq)) for seq in places]).T
    ends = F.pad(torch.stack([last + 1, lengths.cumsum(0)]), (1, 0)).int()  # queries: a prompt once
    flat, blocks, positions, back = [], [], torch.empty_like(ids), torch.empty_like(ids)
    for seq in places if flash else sorted(places, key=len, reverse=True):
        if flash or not blocks or len(seq) < 0.8 * blocks[-1][1]:
            blocks.append([0, len(seq)])
        blocks[-1][0] += 1
        positions[seq] = torch.arange(len(seq))
        back[seq] = torch.arange(len(flat), len(flat) + len(seq))
        flat += seq + [0] * (blocks[-1][1] - len(seq))
    return ids, positions, source, target, owner, last, dict(blocks=blocks, back=back, ends=ends,
        flat=torch.tensor(flat), longest=ends.diff().amax(1).tolist())

# with a plain list for an index the host would wait until the GPU has done all it was given
on_device = lambda index, device: torch.tensor(index).long().to(device, non_blocking=True)
def score(scorer, rows, micro, device):
    """Summed log-probs (R,) of all responses of the rows `micro`; a dummy is run, and has R = 0.
    With scorer.squares (2 R,): of each row its n log-probs, then its n sums of squares."""
    flash = device.type == "cuda" and not getattr(scorer.lm.config, "attn_logit_softcapping", None)
    batch = pack([rows[i] for i in micro or [0]], flash)
    most = getattr(scorer.lm.config, "max_position_embeddings", math.inf)  # kl's may be longer
    check(batch[1].max() < most, f"{batch[1].max() + 1} tokens: prepare with --max-length {most}")
    check(batch[0].max() < scorer.lm.config.vocab_size, f"token id {batch[0].max()}: not in the vocabulary")
    out = scorer(*tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=True), batch))
    out = out.unflatten(0, (-1, len(rows[0][1]) if scorer.squares else 1)).mT.flatten()
    return out if micro else out[:0]

# --------------------------------------------------------- optimiser, checkpoints, metrics, saving
def make_optimizer(name, scorer, weight_decay=0.0):
    """adamw (fused), or bitsandbytes' adamw8bit; `.named` holds its parameters by name.
    The latter does not take DTensors: it gets local shards, which share their storage."""
    named = dict(scorer.named_parameters())
    if name == "adamw":
        optimizer = torch.optim.AdamW(named.values(), weight_decay=weight_decay, fused=True)
    else:
        from bitsandbytes.optim import AdamW8bit
        named = {n: p for n, p in named.items() if p.to_local().numel()}
        optimizer = AdamW8bit([torch.nn.Parameter(p.to_local()) for p in named.values()], weight_decay=weight_decay)
    optimizer.named = named
    return optimizer

def learning_rate(step, steps, peak, warmup=0.1):
    """Linear warm-up over the first tenth of the steps, then a cosine to zero."""
    warm = max(1, round(warmup * steps))
    angle = math.pi * max(0, step - warm) / max(1, steps - warm)
    return peak * min((step + 1) / warm, 0.5 + 0.5 * math.cos(angle))

def update(scorer, optimizer, lr, clip, loss=0.0, step=0, ids=(), *values):
    """Clip by global norm, step, clear. Returns the norm, and the signal that any rank got, or 0.
    No step but ValueError if not finite; of rows, `ids`, those whose values (., G) are not."""
    norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), clip).full_tensor()
    both = torch.stack([norm, norm.new_full((), max(SIGNALS, default=0))])  # one host sync for both
    dist.all_reduce(both, dist.ReduceOp.MAX)
    norm, stop = both.tolist()
    if not math.isfinite(loss + norm):
        odd = {k: x for k, x in zip(ids, torch.cat(values).T.tolist()) if not math.isfinite(sum(x))}
        raise ValueError(f"loss {loss}, gradient norm {norm} in step {step}: rows {odd or [*ids]}")
    optimizer.param_groups[0]["lr"] = lr
    for p, local in zip(optimizer.named.values(), optimizer.param_groups[0]["params"]):
        if p is not local:
            local.grad = p.grad.to_local()
    optimizer.step()
    optimizer.zero_grad()
    scorer.zero_grad()  # of 8-bit AdamW the former has only local shards
    return norm, int(stop)

def tensors(scorer, optimizer):
    """All that a checkpoint holds, by flat keys; 8-bit moments, not DTensors, one for each rank."""
    out = {f"model.{name}": p.detach() for name, p in scorer.named_parameters()}
    for name, param in zip(optimizer.named, optimizer.param_groups[0]["params"]):
        for key, value in optimizer.state[param].items():
            if torch.is_tensor(value) and key != "step" and not key.startswith("qmap"):
                rank = "" if isinstance(value, dist.tensor.DTensor) else f"{dist.get_rank()}."
                out[f"opt.{rank}{name}.{key}"] = value
    return out

def end_step(args, partial, bar, stop, scorer, optimizer, state, record):
    """Write a line of metrics.jsonl. Every --save-every steps, or for `stop`, a signal, which ends
    the run: write a checkpoint, whole or not at all, and keep two. state: what the loop carries."""
    step, folder = record["step"], partial / "checkpoints"
    bar.set_postfix({k: record[k] for k in ("loss", "accuracy") if k in record}, refresh=False)
    if dist.get_rank() == 0:
        peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024
        with open(partial / "metrics.jsonl", "a" if step > 1 else "w") as file:
            print(json.dumps(record | dict(memory_gib=peak / 2**30)), file=file)
    if not stop and (step == bar.total or not args.save_every or step % args.save_every):
        return
    try:
        dcp.save(tensors(scorer, optimizer), checkpoint_id=folder / f"draft-{step}")
    except dcp.CheckpointException as error:
        raise OSError(f"{folder}: is there room? {[*error.failures.values()][0][0]}") from None
    def complete():
        draft = folder / f"draft-{step}"
        torch.save(state, draft / "state.pt")
        shutil.copy(partial / "metrics.jsonl", draft)
        os.replace(draft, folder / f"step-{step:07}-{fingerprint(draft, whole=True)}")
        for old in [*folder.glob("draft-*"), *sorted(folder.glob("step-*"))[:-2]]:
            shutil.rmtree(old)
    on_rank0(complete, what=f"{folder}: is there room? ")
    if stop:
        why = dict(signal=signal.Signals(stop).name, step=step)
        on_rank0((partial / "stopped.json").write_text, json.dumps(why))
        print0(f"\nstopped by {why['signal']} after step {step}: the same command resumes")
        raise SystemExit(128 + stop)

def load_checkpoint(partial, scorer, optimizer):
    """Load the newest whole checkpoint, if any: (step, state). From here on signals are heeded."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heed)
    def newest():
        (partial / "stopped.json").unlink(missing_ok=True)
        for folder in sorted(partial.glob("checkpoints/step-*"), reverse=True):
            if folder.name.endswith(fingerprint(folder, whole=True)):
                shutil.copy(folder / "metrics.jsonl", partial)
                return folder
            print(f"{folder} is damaged: the one before it is used, if any", flush=True)
            os.replace(folder, folder.with_name(f"draft-{folder.name}"))
    if not (folder := on_rank0(newest)):
        return 0, None
    for p in scorer.parameters():
        p.grad = torch.zeros_like(p)
    update(scorer, optimizer, lr=0.0, clip=1.0)  # makes the moments exist
    dcp.load(tensors(scorer, optimizer), checkpoint_id=folder)
    step = int(folder.name.split("-")[1])
    for moments in optimizer.state.values():
        moments["step"] = moments["step"] * 0 + step
    print0(f"resumed from {folder}")
    return step, torch.load(folder / "state.pt", map_location="cpu")

def save_model(scorer, tok, partial, args):
    """PARTIAL -> OUT, an ordinary Hugging Face folder whose generation config has every stop id."""
    lm, dtype = scorer.lm, getattr(torch, args.save_dtype)
    state = whole.get_model_state_dict(lm, options=whole.StateDictOptions(full_state_dict=True, cpu_offload=True))
    def write():
        if dtype == torch.bfloat16:
            old = type(lm).from_pretrained(args.model, dtype="auto").state_dict()
            changed = lambda t: sum((state[k].to(t) != old[k].to(t)).sum().item() for k in state)
            print(f"bf16 keeps {changed(dtype) / max(changed(torch.float32), 1):.1%} of changes")
        if generation := lm.generation_config:
            eos = generation.eos_token_id
            stops = {*(eos if isinstance(eos, list) else [eos]), tok.eos_token_id, end_of_turn(tok)[0]}
            generation.eos_token_id = sorted(stops - {None})
            if {"temperature", "top_p", "top_k"} & set(generation.to_diff_dict()):
                generation.do_sample = True  # without it transformers refuses to save them
        else:  # a reward model: transformers scores the last token that is not padding
            lm.config.pad_token_id = tok.pad_token_id
        weights = {k: v.to(dtype) for k, v in state.items() if k not in lm.all_tied_weights_keys}
        lm.save_pretrained(partial, state_dict=weights)  # of tied weights one
        lm.config.dtype = dtype
        lm.config.save_pretrained(partial)
        tok.save_pretrained(partial)
        os.replace(partial, args.out)
        shutil.rmtree(Path(args.out) / "checkpoints", ignore_errors=True)
    on_rank0(write, what=f"{partial}: is there room? (the last checkpoint, if any, is kept): ")
    print0(f"wrote {args.out}")

# ------------------------------------------------------------------------------------------ main
def load_rows(path):
    """The rows of a prepared folder. ValueError if it is none, or damaged."""
    from datasets import load_from_disk
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no set of prepare_data.py, or damaged ({error})") from None

def check_fit(data, model, *sets):
    """ValueError if it is no language model, or does not take the tokens or the length of data."""
    config, both = load_config(model), [p / "tokenizer/tokenizer.json" for p in Path(data).parents[:2]]
    longest = max(len(p) + max(map(len, rs)) for x in sets for p, rs in zip(x["prompt"], x["responses"]))
    most = getattr(config, "max_position_embeddings", math.inf)
    check("Classification" not in str(config.architectures), f"{model} is a reward model")
    check(longest <= most, f"{data}: a row of {longest} tokens: prepare with --max-length {most}")
    vocab = [json.loads(f.read_text())["model"]["vocab"] for f in (*both, Path(model) / "tokenizer.json") if f.exists()]
    check(not vocab or vocab[0] == vocab[-1] and len(vocab[0]) <= config.vocab_size,
          f"{data} was prepared with another tokenizer than that of {model}")

def start(args, reward=False, **also):
    """Device, rows, tokenizer, scorer, optimizer and OUT.partial of a trainer, which ends here if
    OUT is complete or arguments are bad. also: what makes the result beside them."""
    device, rows = setup(), load_rows(args.data)
    positive = ("batch_size", "clip", "epochs", "lr", "replicas", "tokens_per_forward")
    for name, value in vars(args).items():
        sound = not isinstance(value, (int, float)) or 0 <= value < math.inf
        check(sound and (value or name not in positive), f"--{name.replace('_', '-')} {value}: out of range")
    check(dist.get_world_size() % args.replicas == 0, "--replicas must divide the processes")
    check_fit(args.data, args.model, rows)
    tok = load_tokenizer(Path(args.data).absolute().parent / "tokenizer")  # absolute: no hub id
    if reward:  # padding must not be taken for the end of an answer
        ids = tok.pad_token_id, tok.unk_token_id, tok.bos_token_id
        tok.pad_token_id = next((i for i in ids if i not in (None, end_of_turn(tok)[0])), None)
        check(tok.pad_token_id is not None, f"{args.data}: its tokenizer has no token to pad with")
    if args.optimizer == "adamw8bit":
        also["processes"] = [dist.get_world_size(), args.replicas]
    make = begin(args.out, vars(args) | also, {k: [vars(args).get(k)] for k in ("data", "model", "margins")})
    if make is None:
        on_rank0(shutil.rmtree, Path(args.out) / "checkpoints", True)  # if killed before it was
        print0(f"{args.out} is complete")
        os._exit(0)  # as `run` does
    scorer = load_model(args.model, device, args.checkpoint_layers, reward, args.replicas, args.compile)
    optimizer = make_optimizer(args.optimizer, scorer, args.weight_decay)
    return device, rows, tok, scorer, optimizer, on_rank0(make)

def main(args):
    check(max(map(len, load_rows(args.data)["scores"])) == 1, f"{args.data}: not demonstrations")
    device, data, tok, scorer, optimizer, partial = start(args)
    rank, world = dist.get_rank(), dist.get_world_size()
    steps = args.max_steps or math.ceil(args.epochs * math.ceil(len(data) / args.batch_size))
    print0(f"sft: {len(data)} demonstrations x {args.epochs:g} epochs / {args.batch_size} a step = "
           f"{steps} steps, on {world} {device.type} process(es)")
    first, _ = load_checkpoint(partial, scorer, optimizer)
    bar = tqdm.trange(first, steps, total=steps, initial=first, desc="sft", disable=rank > 0)
    for step in bar:
        began = time.monotonic()
        batch = data[batch_indices(len(data), args.batch_size, args.seed, step)]
        rows = list(zip(batch["prompt"], batch["responses"]))
        tokens = sum(len(r) for _, rs in rows for r in rs)
        logps = torch.zeros(1, len(rows), dtype=torch.float64, device=device)
        for k, micro in enumerate(micros := plan(rows, world, args.tokens_per_forward)[rank], 1):
            scorer.set_requires_all_reduce(k == len(micros))  # as in align.backward
            out = score(scorer, rows, micro, device)
            (-out.sum() * world / tokens).backward()  # FSDP averages over ranks
            logps[:, on_device(micro, device)] = out.detach().double()
        dist.all_reduce(logps)
        lr, loss = learning_rate(step, steps, args.lr), -logps.sum().item() / tokens
        norm, stop = update(scorer, optimizer, lr, args.clip, loss, step + 1, batch["id"], logps)
        record = dict(step=step + 1, loss=loss, lr=lr, grad_norm=norm, response_tokens=tokens)
        record["tokens_per_s"] = sum(map(len, batch["prompt"]), tokens) / (time.monotonic() - began)
        end_step(args, partial, bar, stop, scorer, optimizer, None, record)
    save_model(scorer, tok, partial, args)

def trainer_arguments(add, lr=2e-5, batch_size=128, epochs=1, what="demonstrations"):
    """The arguments that sft.py and align.py share."""
    add("--model", required=True, help="a Hugging Face folder or hub id to start from")
    add("--data", required=True, help="a folder that prepare_data.py wrote")
    add("--out", required=True, type=os.path.normpath, help="to write; OUT.partial until complete")
    add("--epochs", type=float, default=epochs, help=f"passes over the data (default {epochs})")
    add("--lr", type=float, default=lr, help=f"peak learning rate (default {lr})")
    add("--batch-size", type=int, default=batch_size, help=f"{what} of one step ({batch_size})")
    add("--tokens-per-forward", type=int, default=8192, help="memory, not results (default 8192)")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="8-bit: bitsandbytes")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    add("--clip", type=float, default=1.0, help="largest global gradient norm (default 1)")
    add("--checkpoint-layers", type=int, default=0, metavar="K", help="layers that recompute (0)")
    add("--compile", action="store_true", help="each layer by torch.compile; for a GPU")
    add("--replicas", type=int, default=1, help="of the model, each sharded; e.g. one a node (1)")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 2 are kept (0: none)")
    add("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the result")
    add("--max-steps", type=int, default=0, help="optimizer steps, instead of --epochs (0)")
    add("--seed", type=int, default=0, help="of the data order")

if __name__ == "__main__":
    run(main, __doc__, trainer_arguments)

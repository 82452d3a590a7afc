"""What bench.py measures, each job in a process of its own: python tests/bench_jobs.py '["job", {plan}, {arguments}]' prints its result.

A plan is an entry of bench.py's PLANS. A shape is a Llama's (hidden size, intermediate size, layers, heads, key-value heads, vocabulary,
tied embeddings); its weights are random, of a fixed seed. Sizes are [(tokens of the prompt, [tokens of each response])].
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))
import align  # noqa: E402
import evaluate  # noqa: E402
import sft  # noqa: E402
from sft import batch_indices  # noqa: E402

CUDA, END = torch.cuda.is_available(), 1  # END: the id that ends a response
DEVICE = "cuda" if CUDA else "cpu"

# ------------------------------------------------------------------------------------------------------------- data, models, meters
class Rows(dict):
    """Prepared rows in memory, {column: list}, read as a datasets.Dataset is: by column, or by positions."""

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else {k: [v[i] for i in key] for k, v in self.items()}

def draw(shape, sizes):
    """Rows of random tokens; the first response is the best."""
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(3, shape[5]) for _ in range(n)]
    return Rows(prompt=[ids(p) for p, _ in sizes], responses=[[ids(n - 1) + [END] for n in ns] for _, ns in sizes],
                scores=[[-float(k) for k in range(len(ns))] for _, ns in sizes], id=[str(k) for k in range(len(sizes))])

def make(plan, shape):
    """The folder of a model of this shape; written at the first call."""
    folder = Path(plan["folder"]) / "-".join(map(str, shape))
    if not folder.exists():
        d, ffn, layers, heads, kv, vocabulary, tied = shape
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, plan["weights"]))
        with torch.device(DEVICE):
            lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=vocabulary, hidden_size=d, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv, tie_word_embeddings=tied, max_position_embeddings=8192, pad_token_id=0, bos_token_id=None,
                eos_token_id=END))
        torch.set_default_dtype(torch.float32)
        lm.save_pretrained(f"{folder}.draft")
        os.replace(f"{folder}.draft", folder)
    return str(folder)

def load(plan, shape, checkpointed=0, replicas=1):
    """(device, scorer), as the stages load them."""
    device = torch.device("cuda:0" if CUDA else "cpu") if dist.is_initialized() else sft.setup()
    return device, sft.load_model(make(plan, shape), device, checkpointed, replicas=replicas)

def load_plain(plan, shape, dtype):
    """The same weights as transformers has them."""
    return transformers.AutoModelForCausalLM.from_pretrained(make(plan, shape), dtype=dtype).to(DEVICE).eval()

def clock():
    """CPU-seconds of this process and wall-clock seconds, when all that a GPU was given is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()

def since(begin):
    return [now - then for now, then in zip(clock(), begin)]

def peak(reset=False):
    """Peak memory in GiB, [allocated, reserved] on the GPU since the last reset; without one [resident], of the process so far."""
    if reset and CUDA:
        torch.cuda.reset_peak_memory_stats()
    gpu = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if CUDA else []
    return [x / 2**30 for x in gpu or [getrusage(RUSAGE_SELF).ru_maxrss * 1024]]

def loading(plan, shape):
    """Seconds until every process has its shard of a model, peak memory of each, and the model's number of parameters."""
    make(plan, shape)
    begin = clock()
    _, scorer = load(plan, shape)
    dist.barrier()
    seconds, memory = since(begin)[1], [None] * dist.get_world_size()
    dist.all_gather_object(memory, peak())
    return seconds, memory, sum(p.numel() for p in scorer.parameters())

def matmul(plan):
    """FLOP/s of this device's product of random square matrices, bf16 on a GPU, fp32 on a CPU: the best of 10."""
    a, spans = torch.randn(plan["matmul"], plan["matmul"], dtype=torch.bfloat16 if CUDA else torch.float32, device=DEVICE), []
    for _ in range(12):
        begin = clock()
        a @ a
        spans.append(since(begin)[1])
    return 2 * plan["matmul"] ** 3 / min(spans[2:])

# ----------------------------------------------------------------------------------------------------------------------- training
def apart(scorer, rows, micro, device, score=sft.score):
    """sft.score, every response with a prompt of its own."""
    rows = [(rows[i][0], [response]) for i in micro for response in rows[i][1]]
    return score(scorer, rows, range(len(rows)), device)

def twice(scorer, rows, micro, device, score=sft.score):
    """sft.score, after the pass of a reference."""
    with torch.no_grad():
        score(scorer, rows, micro, device)
    return score(scorer, rows, micro, device)

def pack_all(rows, flash, pack=sft.pack):
    """sft.pack, with logits of all places: those that predict no response belong to one more response, the last."""
    ids, positions, source, target, owner, last, layout = pack(rows, flash)
    more = torch.tensor(sorted({*range(len(ids))} - {*source.tolist()}))
    owner = torch.cat([owner, torch.full_like(more, len(last))])
    return ids, positions, torch.cat([source, more]), torch.cat([target, ids[more]]), owner, torch.cat([last, last[-1:]]), layout

def but_last(scorer, rows, micro, device, score=sft.score):
    return score(scorer, rows, micro, device)[:-1]

VARIANTS = {  # name: what is replaced, and the changes of `train`
    "as it is": ({}, {}),
    "every response with a prompt of its own": ({"align.score": apart}, {}),
    "a live reference": ({"align.score": twice}, {}),
    "logits of all places, not of responses alone": ({"align.score": but_last, "sft.pack": pack_all}, {}),
    "logits of a micro-batch at once, not in chunks": ({}, dict(chunk=1 << 30)),
    "all layers recomputed": ({}, dict(checkpointed=1 << 30)),
    "micro-batches of one pair": ({}, dict(tokens=1)),
    "amapo, all layers recomputed": ({}, dict(checkpointed=1 << 30, loss="amapo")),
    "amapo --replay": ({}, dict(loss="amapo", replay=True)),
    "--compile": ({}, dict(compiled=True))}

def train(device, scorer, optimizer, data, batch, steps, tokens, loss="simpo", lr=0.0, replay=False, checkpointed=0, compiled=False, chunk=0):
    """The loop of align.py without its log: dict(steps=[(loss, gradient norm, CPU-seconds, seconds)], memory, reference, its pass)."""
    args, ref, state, out = argparse.Namespace(batch_size=batch, seed=0, tokens_per_forward=tokens), None, {}, []
    pairs, (function, hp) = align.draw_pairs(data["scores"], "all", 0.0), align.configure(loss, [])
    scorer.chunk = chunk or sft.head_chunk(scorer.lm.config.vocab_size)
    for k, layer in enumerate(scorer.lm.base_model.layers):
        layer.training = k < checkpointed
        layer.compile(dynamic=True) if compiled else setattr(layer, "_compiled_call_impl", None)
    begin = clock()
    if loss == "dpo":
        ref = align.score_pairs(scorer, data, pairs, [], args, device, "reference", steps)
    reference, _ = since(begin), peak(reset=True)
    for step in range(steps):
        begin = clock()
        index = batch_indices(len(pairs), batch, 0, step)
        rows, ids = align.fetch(data, pairs, index, [])
        lengths = torch.tensor([[len(r) for r in rs] for _, rs in rows], dtype=torch.float64, device=device).T
        base, gap = torch.zeros_like(lengths) if ref is None else ref[:, index], torch.ones(len(rows), device=device)
        of = functools.partial(align.apply_loss, function, hp, 0.0, lengths, base, gap, state)
        losses, logps, grads, state = align.backward(scorer, rows, of, function.batch, replay, tokens, device)
        mean = align.describe(losses, logps, grads, lengths)["loss"]
        norm, _ = sft.update(scorer, optimizer, lr, 1.0, mean, step + 1, ids, logps.T)
        out.append((mean, norm, *since(begin)))
    return dict(steps=out, memory=peak(), reference=reference)

def ours(plan, shape, optimizer, runs, replicas=1):
    """A `train` for each of `runs`, (variant, sizes, arguments), all on one model; a text where it ran out of memory."""
    make(plan, shape)
    begin = clock()
    device, scorer = load(plan, shape, shape[2], replicas)
    loading, optimizer, out = since(begin)[1], sft.make_optimizer(optimizer, scorer), []
    for variant, sizes, arguments in runs:
        patches, changes = VARIANTS[variant]
        with contextlib.ExitStack() as stack:
            for target, replacement in patches.items():
                stack.enter_context(mock.patch(target, replacement))
            try:
                out.append(train(device, scorer, optimizer, draw(shape, sizes), **arguments | changes) | dict(loading=loading))
            except torch.OutOfMemoryError:  # after which FSDP's state is not to be trusted
                return [*out, "out of memory"] + ["unmeasured, after a run out of memory"] * (len(runs) - len(out) - 1)
        if CUDA:
            torch.cuda.empty_cache()
    return out

def trl(plan, side, sizes):
    """`train` by TRL 1.16: the same weights, token ids, pairs of each batch, optimizer. Its data loading lies outside of its steps."""
    import datasets
    import tokenizers
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    batch, rows, order = plan["batch"], draw(plan["shape"], sizes), []
    for step in range(plan["warm"] + plan["timed"]):
        index = batch_indices(len(sizes), batch, 0, step)
        order += sorted(index, key=lambda i: -sizes[i][0] - max(sizes[i][1])) if "best" in side else index
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {"<pad>": 0, "</s>": END, "<unk>": 2} | {f"w{k}": k for k in range(3, plan["shape"][5])}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = lambda ids: " ".join("</s>" if i == END else f"w{i}" for i in ids)
    data = datasets.Dataset.from_dict(dict(
        prompt=[text(rows["prompt"][i]) for i in order], chosen=[" " + text(rows["responses"][i][0]) for i in order],
        rejected=[" " + text(rows["responses"][i][1]) for i in order]))
    changes = dict(per_device_train_batch_size=8) | plan["sides"][side][1]
    config = dict(
        output_dir=f"{plan['folder']}/trl", gradient_accumulation_steps=batch // changes["per_device_train_batch_size"],
        learning_rate=plan["lr"], lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0, num_train_epochs=1,
        logging_steps=1, use_cpu=not CUDA, bf16=CUDA, report_to="none", save_strategy="no", train_sampling_strategy="sequential",
        max_length=4096, disable_dropout=True, dataloader_pin_memory=CUDA,
        optim=dict(adamw="adamw_torch_fused", adamw8bit="adamw_8bit")[plan["optimizer"]]) | changes
    if side.startswith("simpo"):  # SimPO is CPO's without its likelihood term
        trainer, config = CPOTrainer, CPOConfig(**config, loss_type="simpo", simpo_gamma=1.0, beta=2.0, cpo_alpha=0.0)
    else:
        trainer, config = DPOTrainer, DPOConfig(**config, beta=0.1)
    lm, begin, spans = load_plain(plan, plan["shape"], torch.float32), clock(), []
    trainer = trainer(model=lm, args=config, train_dataset=data, processing_class=tok)

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            spans.append(clock())

        def on_step_end(self, *args, **kwargs):
            spans[-1] = since(spans[-1])

    trainer.add_callback(Timer())
    reference, _ = since(begin), peak(reset=True)
    trainer.train()
    logs = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    return [dict(steps=[(*log, *span) for log, span in zip(logs, spans, strict=True)], memory=peak(), reference=reference)]

# ------------------------------------------------------------------------------------------- beside padded forwards of transformers
def padded(lm, sequences, everywhere=False):
    """Summed log-probs (S,) of responses, [(prompt, response)], by a right-padded forward that makes all logits; log-softmax in fp32, of
    responses alone or everywhere."""
    ids = pad_sequence([torch.tensor(p + r) for p, r in sequences], batch_first=True).to(DEVICE)  # (S, L)
    mask = pad_sequence([torch.ones(len(p + r), dtype=torch.long) for p, r in sequences], batch_first=True).to(DEVICE)
    logits, out = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits, []  # (S, L, V)
    logps = logits.log_softmax(-1, dtype=torch.float32) if everywhere else logits
    for line, target, (p, r) in zip(logps, ids, sequences):
        logp = line[len(p) - 1 : len(p) + len(r) - 1]
        logp = logp if everywhere else logp.log_softmax(-1, dtype=torch.float32)
        out.append(logp.gather(1, target[len(p) : len(p) + len(r), None]).sum())
    return torch.stack(out)

def head(plan, shape, mine):
    """Memory of forward and backward of four pairs, prompt 128, responses 384 tokens: (GiB above the loaded model, sum of log-probs)."""
    data = draw(shape, [(128, [384, 384])] * 4)
    rows = [*zip(data["prompt"], data["responses"])]
    device, lm = load(plan, shape) if mine else (DEVICE, load_plain(plan, shape, torch.float32))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before = torch.cuda.memory_allocated() if CUDA else resident
    with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA and not mine):
        out = sft.score(lm, rows, range(4), device) if mine else padded(lm, [(p, r) for p, rs in rows for r in rs])
    out.sum().backward()
    return peak()[0] - before / 2**30, out.sum().item()

def batches_of(sizes, budget):
    """Positions (row, response), longest first, in batches of at most `budget` tokens with their padding."""
    length = lambda at: sizes[at[0]][0] + sizes[at[0]][1][at[1]]
    left, out = sorted(((i, k) for i, (_, ns) in enumerate(sizes) for k in range(len(ns))), key=length, reverse=True), []
    while left:
        n = max(1, budget // length(left[0]))
        out, left = [*out, left[:n]], left[n:]
    return out

def by_style(sizes, budget):
    """Batches of RM-Bench's own script: style by style, 8 prompts, a chosen and a rejected response of each."""
    return [[(i, k) for i in range(b, min(len(sizes), b + 8)) for k in (style, style + 3)] for style in range(3) for b in range(0, len(sizes), 8)]

BATCHES = {  # side of `evaluation`: its batches
    "this repository, evaluate.py": None,
    "padded, sorted by length, as many tokens a forward": batches_of,
    "padded, the six responses to a prompt a forward": lambda sizes, budget: [[(i, k) for k in range(6)] for i in range(len(sizes))],
    "padded, style by style, 8 prompts a forward, as RM-Bench's own script": by_style}

@torch.no_grad()
def evaluation(plan, sizes, side):
    """Average log-probs of all responses by evaluate.score_set or by padded batches: (CPU-seconds and seconds, scores)."""
    data, batches = draw(plan["shape"], sizes), BATCHES[side]
    if batches is None:
        device, scorer = load(plan, plan["shape"])
        run = lambda data: evaluate.score_set(scorer, data, plan["eval_tokens"], device, "scores")
    else:
        lm = load_plain(plan, plan["shape"], torch.bfloat16 if CUDA else torch.float32)
        def run(data):
            scores = [[0.0] * len(responses) for responses in data["responses"]]
            for batch in batches(sizes[: len(scores)], plan["eval_tokens"]):
                sequences = [(data["prompt"][i], data["responses"][i][k]) for i, k in batch]
                for (i, k), score in zip(batch, padded(lm, sequences, everywhere=batches is by_style).tolist()):
                    scores[i][k] = score
            return scores
    run(Rows({key: values[:1] for key, values in data.items()}))  # a warm-up
    begin = clock()
    scores = run(data)
    return since(begin), [score / n for line, (_, ns) in zip(scores, sizes) for score, n in zip(line, ns)]

@torch.no_grad()
def spread(plan, sizes, bf16):
    """Average log-probs of all responses, scored row by row and in full batches: two lists. bf16: computed in it, on a CPU too."""
    policy, out, data = sft.MixedPrecisionPolicy, [], draw(plan["shape"], sizes)
    with mock.patch("sft.MixedPrecisionPolicy", lambda _, reduce: policy(torch.bfloat16 if bf16 else None, reduce)):
        device, scorer = load(plan, plan["shape"])
    for tokens in (1, plan["eval_tokens"]):
        scores = evaluate.score_set(scorer, data, tokens, device, "scores")
        out.append([score / n for line, (_, ns) in zip(scores, sizes) for score, n in zip(line, ns)])
    return out

# ------------------------------------------------------------------------------------------------------------------------- profile
GROUPS = {  # a group has the operations whose name, with the names of what called them, innermost first, begins so; the first that fits
    "optimizer": r".*bench update", "attention": r".*(scaled_dot_product|flash_attention)", "matmul": r"aten::(mm|bmm|addmm)\b",
    "log-softmax, NLL": r".*(log_?softmax|nll_loss|cross_entropy)", "FSDP": r".*(FSDP|fsdp|c10d)",
    "packing: gather, copy": r".*(index_select|IndexSelect|bench pack)", "norms": r".*bench norm", "rotary": r".*bench rotary",
    "SiLU and gate": r".*bench mlp", "residuals, the rest of the model": r".*bench model", "Python, autograd, metrics": r""}

def profile(plan, sizes):
    """Shares of one training step, of CPU time or on a GPU of its time: {group: {operation: share}}. An operation of the backward pass
    counts as called by what called its forward operation; they have one sequence number."""
    from transformers.models.llama import modeling_llama as llama

    device, scorer = load(plan, plan["shape"])
    optimizer, groups = sft.make_optimizer(plan["optimizer"], scorer), {name: {} for name in GROUPS}
    step = functools.partial(train, device, scorer, optimizer, draw(plan["shape"], sizes), plan["batch"], 1, plan["tokens"])
    step()
    parts = [(sft, "update", "update"), (sft, "pack", "pack"), (sft, "attend_blocks", "pack"), (llama, "apply_rotary_pos_emb", "rotary"),
             (llama.LlamaMLP, "forward", "mlp"), (llama.LlamaRMSNorm, "forward", "norm"), (llama.LlamaModel, "forward", "model")]
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in parts:
            part = torch.profiler.record_function(f"bench {name}")(getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, part))
        with torch.profiler.profile() as profiler:
            step()
    events, names, forward = sorted(profiler.events(), key=lambda event: event.time_range.start), {}, {}
    for event in events:  # callers first
        backward = event.scope == 1 or event.name.startswith("autograd::engine")
        names[event] = " ".join([event.name, names.get(event.cpu_parent, ""), forward.get(event.sequence_nr, "") * backward])
        if event.sequence_nr >= 0 and not backward:
            forward[event.sequence_nr] = names[event]
        span = event.self_device_time_total if CUDA else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU and span > 0:
            group = groups[next(name for name, pattern in GROUPS.items() if re.match(pattern, names[event]))]
            group[event.name] = group.get(event.name, 0) + span
    total = sum(sum(group.values()) for group in groups.values())
    return {name: {operation: span / total for operation, span in group.items()} for name, group in groups.items()}

if __name__ == "__main__":
    name, plan, arguments = json.loads(sys.argv[1])
    result = globals()[name](plan, **arguments)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)
    sys.stdout.flush()
    os._exit(0)  # as the stages do

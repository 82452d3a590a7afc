"""What the stages cost: beside TRL, without each of their techniques, as sizes grow, in evaluation, and where a step's time goes.

    bash run_all.sh bench                                    # everything; 2 cores: 30 minutes; a GPU: the plan `cuda`, Llama-3-8B's shape
    python tests/bench.py --only trl --side dpo-trl-best     # one part, and of it one side beside ours
    python tests/bench.py --only ablation --set batch=8 --folder F      # another number in the plan; F keeps models and results
    python tests/bench.py --plan tiny                        # everything in seconds, on any device: does it run? its numbers mean nothing

Prints Markdown. Models have random weights, data random tokens with the lengths of UltraFeedback and RM-Bench. Each job (bench_jobs.py) is
a process of its own; what is compared runs in turns. CPU-seconds are of the steps alone and of all threads, which sleep while they wait
(spinning would count). A gate says that two sides did the same work. Gates and jobs that failed, other than for want of memory, are named
at the end, and the exit status is then 1.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

import bench_jobs
from bench_jobs import BATCHES, CUDA, VARIANTS, batch_indices

def installed(name):
    return importlib.util.find_spec(name) is not None

def release(name):
    try:
        return version(name)
    except PackageNotFoundError:  # a folder on the path
        return "of some version"

SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary, tied embeddings
    "8B": (4096, 14336, 32, 32, 8, 128256, False), "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama-3-8B, Llama-3.2-1B
    "19M": (384, 1024, 8, 6, 2, 8192, False), "1M": (128, 384, 4, 2, 1, 2048, False), "tiny": (32, 48, 2, 2, 1, 160, False)}
CACHED, KEEP, PAIRS = dict(precompute_ref_log_probs=True), dict(gradient_checkpointing=False), "per_device_train_batch_size"
COMPILED = dict(compiled=True, tokens=8192)  # layers that keep less leave room for more tokens
CPU_SIDES = {  # name: what it is, and its changes of TRL's defaults, or of our loop; `best` has the pairs of a global batch sorted by length
    "dpo-ours": ("this repository, dpo", {}),
    "dpo-trl": ("TRL DPOTrainer, its defaults (live reference, checkpointing, 8 pairs)", {}),
    "dpo-trl-best": ("TRL DPOTrainer, reference precomputed, no checkpointing, sorted by length", CACHED | KEEP),
    "simpo-ours": ("this repository, simpo", {}),
    "simpo-trl": ("TRL CPOTrainer, loss_type=simpo, its defaults (checkpointing, 8 pairs)", {}),
    "simpo-trl-best": ("TRL CPOTrainer, loss_type=simpo, no checkpointing, sorted by length", KEEP)}
CUDA_SIDES = CPU_SIDES | {  # beside 8B no live reference fits; what else does not is told by trying
    "dpo-ours-compile": ("this repository, dpo, --compile, 8,192 tokens a forward", COMPILED),
    "simpo-ours-compile": ("this repository, simpo, --compile, 8,192 tokens a forward", COMPILED),
    "dpo-trl": ("TRL DPOTrainer, its defaults but a precomputed reference (checkpointing, 8 pairs)", CACHED),
    "dpo-trl-best": ("TRL DPOTrainer, reference precomputed, checkpointing, 16 pairs sorted by length", CACHED | {PAIRS: 16}),
    "dpo-trl-best-keep": ("TRL DPOTrainer, reference precomputed, no checkpointing, 2 pairs sorted by length", CACHED | KEEP | {PAIRS: 2}),
    "dpo-trl-best-compile": ("TRL DPOTrainer, reference precomputed, compiled, 8 sorted pairs", CACHED | dict(torch_compile=True)),
    "simpo-trl-best": ("TRL CPOTrainer, loss_type=simpo, no checkpointing, 2 pairs sorted by length", KEEP | {PAIRS: 2})}
PLANS = dict(cpu=dict(
    shape=SHAPES["19M"], weights="float32", optimizer="adamw", lr=1e-4,  # weights: on disk; in memory fp32
    scale=0.5, batch=16, tokens=2048, warm=0, timed=3, repeats=2,  # of real lengths; pairs a step; tokens a forward; steps; runs
    sides=CPU_SIDES, matmul=2048, ablation_warm=1, ablation_timed=1,  # rows of the matrices of the peak; steps
    compiled=bool(shutil.which("g++")),  # rows with compiled layers too
    loaded=SHAPES["1B"], small=SHAPES["1M"], lengths=(256, 512, 1024, 2048, 4096, 8192), vocabularies=(8192, 32768, 131072), long=2048,
    processes=((1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 1, 2)),  # (processes, threads of each, copies of the model over them)
    prompts=24, rm_bench="", eval_tokens=4096, inline=False))  # RM-Bench's, its folder; tokens a forward; jobs inside this process
PLANS["cuda"] = PLANS["cpu"] | dict(
    shape=SHAPES["8B"], weights="bfloat16", optimizer="adamw8bit", lr=1e-6, scale=1.0, batch=32, tokens=4096, warm=3, timed=10,
    sides=CUDA_SIDES, matmul=8192, ablation_warm=1, ablation_timed=3, loaded=SHAPES["8B"], small=SHAPES["1B"],
    processes=((1, 4, 1), (2, 4, 1), (4, 4, 1), (8, 4, 1), (8, 4, 2)), prompts=64, eval_tokens=16384)
PLANS["cuda-1b"] = PLANS["cuda"] | dict(shape=SHAPES["1B"], loaded=SHAPES["1B"], optimizer="adamw", tokens=16384)
PLANS["tiny"] = PLANS["cuda"] | dict(
    shape=SHAPES["tiny"], optimizer="adamw8bit" if installed("bitsandbytes") else "adamw", lr=1e-4, scale=0.05, batch=16, tokens=128,
    warm=1, timed=2, repeats=1, matmul=64, ablation_timed=1, loaded=SHAPES["tiny"], small=SHAPES["tiny"], lengths=(16, 32),
    vocabularies=(160, 320), long=32, processes=((1, 1, 1), (2, 1, 1), (2, 1, 2)), prompts=3, eval_tokens=256, inline=True, compiled=False)
LIMITS = dict(loss=0.01, norm=0.02, score=0.01) if CUDA else dict(loss=1e-4, norm=1e-3, score=1e-4)  # bf16, fp32; score: nats a token
KIND, SECONDS = (3, "seconds") if CUDA else (2, "CPU-seconds")  # what ratios are of: its place in a step's record, its name
MEMORY = "peak GiB, allocated, reserved" if CUDA else "peak GiB, resident"
FAILED = []

# --------------------------------------------------------------------------------------------------------------- sizes and operations
def ultrafeedback(n, scale):
    """Sizes of n pairs like UltraFeedback's: prompt, chosen, rejected lognormal, medians 120, 288, 288 tokens, each cut at 1,024."""
    rng = random.Random(0)
    length = lambda middle, sigma: max(4, min(int(1024 * scale), round(middle * scale * math.exp(rng.gauss(0, sigma)))))
    return [(length(120, 0.9), [length(288, 0.7), length(288, 0.7)]) for _ in range(n)]

def rm_bench(n, scale, folder):
    """Sizes of n prompts like RM-Bench's: prompts of 100 to 300 tokens (assumed), styles of about 50, 450, 480, chosen and rejected. With
    a folder of RM-Bench's own files: those of n of their rows, evenly spaced, at four characters a token."""
    if rows := [row for file in sorted(Path(folder).glob("*.json")) for row in json.loads(file.read_text())] if folder else []:
        tokens = lambda text: max(1, round(scale * len(text) / 4))
        return [(tokens(row["prompt"]), [*map(tokens, row["chosen"] + row["rejected"])]) for row in rows[:: len(rows) // n][:n]]
    rng, styles = random.Random(0), (50, 450, 480) * 2
    return [(round(scale * rng.uniform(100, 300)), [round(scale * style * rng.uniform(0.6, 1.4)) for style in styles]) for _ in range(n)]

def flop(shape, sizes, executed):
    """Floating-point operations of a training step. By definition every response has its prompt, every token its logits, and nothing is
    recomputed. Executed here: prompts once (on a CPU but in attention), logits of responses alone, and those recomputed."""
    d, ffn, layers, heads, kv, vocabulary, _ = shape
    block, lengths = 2 * d * d + 2 * d * kv * d // heads + 3 * d * ffn, [p + n for p, ns in sizes for n in ns]
    again = sum((len(ns) - 1) * p * (p + 1) / 2 for p, ns in sizes) if executed and CUDA else 0  # prompts of other responses
    attention, responses = 4 * d * layers * (sum(n * (n + 1) / 2 for n in lengths) - again), sum(sum(ns) for _, ns in sizes)
    shared = responses + sum(p for p, _ in sizes)
    tokens, logits = (shared, 4 * responses) if executed else (sum(lengths), 3 * sum(lengths))
    return 3 * (2 * layers * block * tokens + attention) + 2 * vocabulary * d * logits

# ------------------------------------------------------------------------------------------------------------------- jobs and tables
class Failed(Exception):
    """A job failed; says why, in a line."""

def job(plan, name, n=1, threads=None, **arguments):
    """The result of a job of bench_jobs.py in a process of its own, or in n processes by torchrun."""
    if plan["inline"] and n == 1 and name != "trl":
        return getattr(bench_jobs, name)(plan, **arguments)
    launcher, begin = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] * (n > 1), time.perf_counter()
    environment = dict(TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="passive", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    environment |= dict(OMP_NUM_THREADS=str(threads)) if threads else {}
    done = subprocess.run([sys.executable, *launcher, bench_jobs.__file__, json.dumps([name, plan, arguments])],
                          capture_output=True, text=True, env=os.environ | environment)
    what = f"{name} {arguments.get('side', '')}".strip()
    print(f"{what}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if done.returncode == 0:
        result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
        with open(Path(plan["folder"]) / "results.jsonl", "a") as file:
            print(json.dumps([what, [(variant, how) for variant, _, how in arguments.get("runs", ())], result]), file=file)
        return result
    if done.returncode == -9 or "OutOfMemoryError" in done.stderr:
        raise Failed("out of memory")
    FAILED.append(f"{what}:\n{done.stderr[-3000:]}")
    raise Failed(f"failed: {done.stderr.strip().splitlines()[-1]}")

def ours(plan, *runs, n=1, threads=None, **how):
    """The job `ours`: results of runs (sizes, pairs of a step, steps, what else is not as usual)."""
    runs = [(more.pop("variant", "as it is"), sizes, dict(batch=batch, steps=steps, tokens=plan["tokens"]) | more)
            for sizes, batch, steps, more in runs]
    return job(plan, "ours", n, threads, runs=runs, **dict(shape=plan["shape"], optimizer=plan["optimizer"]) | how)

def table(title, columns, rows):
    rows = [[*row, *[""] * (len(columns) - len(row))] for row in (columns, ["---"] * len(columns), *rows)]
    print(f"\n{title}\n", *("| " + " | ".join(map(str, row)) + " |" for row in rows), sep="\n", flush=True)

def gate(what, **off):
    """Says how far two sides are apart; if by more than LIMITS, the end says it too."""
    print(line := f"gate: {what}: " + ", ".join(f"{k} within {x:.1e} (limit {LIMITS[k]:.0e})" for k, x in off.items()))
    FAILED.extend([line] if any(not x <= LIMITS[k] for k, x in off.items()) else [])

def same_work(what, a, b):
    """The gate on every step of two runs: losses, and gradient norms relative to each other."""
    steps = [*zip(a["steps"], b["steps"], strict=True)]
    gate(what, loss=max(abs(x[0] - y[0]) for x, y in steps), norm=max(abs(x[1] / y[1] - 1) for x, y in steps))

def cost(runs, skip, kind=KIND):
    """Median over runs of the CPU-seconds (kind 2) or seconds (3) of their steps but the first `skip`."""
    return median(sum(step[kind] for step in run["steps"][skip:]) for run in runs)

def several(values):
    return ", ".join(f"{x:.1f}" for x in values)

# ------------------------------------------------------------------------------------------------------------------------------ parts
def trl(plan):
    """The optimizer steps, beside TRL."""
    skip, batch, steps = plan["warm"], plan["batch"], plan["warm"] + plan["timed"]
    sizes, top, done, rows = ultrafeedback(steps * batch, plan["scale"]), job(plan, "matmul"), {}, []
    timed = [sizes[i] for step in range(skip, steps) for i in batch_indices(len(sizes), batch, 0, step)]
    for name in [*plan["sides"]] * plan["repeats"]:
        try:
            result = job(plan, "trl", side=name, sizes=sizes) if "trl" in name else ours(
                plan, (sizes, batch, steps, dict(loss=name.split("-")[0], lr=plan["lr"]) | plan["sides"][name][1]))
            done.setdefault(name, []).append(result[0])
        except Failed as why:
            done.setdefault(name, []).append(str(why))
    for name, (what, _) in plan["sides"].items():
        runs, mine = done[name], done[name.split("-")[0] + "-ours"]
        if failed := [run for run in runs + mine if isinstance(run, str)]:
            rows.append([what, failed[0]])
            continue
        same_work(what, mine[0], runs[0])
        speed, wall = [batch / step[3] for run in runs for step in run["steps"][skip:]], cost(runs, skip, 3)
        use = [f"{flop(plan['shape'], timed, executed) / wall / top:.0%}" for executed in (False, True)]
        rows.append([what, several(cost([run], skip, 2) for run in runs), f"{wall:.1f}", f"{cost(runs, skip) / cost(mine, skip):.2f}",
                     f"{median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f})", use[0], use[1] * ("ours" in name),
                     several(runs[0]["memory"]), f"{runs[0]['steps'][0][3]:.1f}"])
    table(f"{plan['timed']} optimizer steps of {batch} pairs", [
        "side", "CPU-seconds, each run", "seconds", f"{SECONDS} / ours", "pairs/s, median step (range)", "effective MFU", "executed / peak",
        MEMORY, "first step, s"], rows)
    loading = several(run["loading"] for runs in done.values() for run in runs if "loading" in run)
    passes = several(run["reference"][KIND - 2] for run in done.get("dpo-ours", []) if not isinstance(run, str))
    print(f"\nPeak: {top / 1e12:.2f} TFLOP/s. Effective MFU has the operations of the work without padding or sharing in every row. "
          f"Not in the table: the reference pass of ours, {passes or 'unmeasured'} {SECONDS}; its loading and sharding, {loading} s.")

def ablation(plan):
    """The step with one technique less, and the modes of the loop; at learning rate 0, so that the loss is always the same."""
    n, skip, timed, rows, base = plan["batch"], plan["ablation_warm"], plan["ablation_timed"], [], None
    variants = {name: changes for name, (_, changes) in VARIANTS.items() if plan["compiled"] or not changes.get("compiled")}
    order, sizes = ["as it is", *[*variants] * plan["repeats"]], ultrafeedback(n, plan["scale"])
    first, *results = ours(plan, *[(sizes, n, skip + timed, dict(variant=name)) for name in order])  # the first, a warm-up, is not timed
    bases = dict(simpo=first)
    for k, (name, changes) in enumerate(variants.items()):
        runs = [run for run in results[k :: len(variants)] if not isinstance(run, str)]
        if not runs:
            rows.append([name, results[k]])
            continue
        base = base or runs
        same_work(name, bases.setdefault(changes.get("loss", "simpo"), runs[0]), runs[0])
        rows.append([name, f"{n * timed / cost(runs, skip, 3):.2f}", f"{cost(runs, skip) / cost(base, skip):.2f}",
                     several(runs[0]["memory"]) if CUDA else "unmeasured"])
    table(f"Steps of {n} pairs with one technique less", ["variant", "pairs/s", f"{SECONDS} / as it is", MEMORY], rows)

def memory(plan):
    """Peak memory of a step of two pairs of long sequences, one pair a micro-batch."""
    n, layers = plan["long"], plan["shape"][2]
    kinds = {f"--checkpoint-layers {layers}": dict(checkpointed=layers), f"--checkpoint-layers {layers // 2}": dict(checkpointed=layers // 2)}
    kinds |= {"--compile": dict(compiled=True)} if plan["compiled"] else {}
    kinds["as it is"] = {}  # last, as nothing can be measured after a run out of memory
    runs = [([(n // 4, [n - n // 4] * 2)] * 4, 2, 2, dict(tokens=1) | changes) for changes in kinds.values()]
    results = ours(plan, *runs) if CUDA else [ours(plan, run)[0] for run in runs]  # what was resident cannot be reset
    table(f"Steps of 2 pairs, one a forward, of two sequences of {n} tokens, a quarter of each their prompt", ["variant", MEMORY], [
        [kind, run if isinstance(run, str) else several(run["memory"])] for kind, run in zip(kinds, results)])

def loading(plan):
    """Start-up: a model read from a cached file, and its shards distributed."""
    rows = []
    for k, (n, threads, _) in enumerate([(1, None, 1), *(x for x in plan["processes"] if x[2] == 1)]):  # the first writes the model, and is no row
        if CUDA and n > torch.cuda.device_count():
            rows.append([n, threads, "unmeasured: too few GPUs"])
            continue
        seconds, (first, *others), size = job(plan, "loading", n, threads, shape=plan["loaded"])
        rows += [[n, threads, f"{seconds:.1f}", several(first), several(max(others, default=[]))]] * (k > 0)
    table(f"Loading and sharding {size / 1e9:.2f} billion parameters", [
        "processes", "threads of each", "seconds", f"{MEMORY}, first process", "the largest of the others"], rows)

def growth(plan):
    """Cost over sequence lengths, processes and vocabularies."""
    longest, rows, base = max(plan["lengths"]), [], None
    runs = [([(n // 4, [n - n // 4] * 2)] * (longest // n), longest // n, 3, dict(tokens=2 * longest)) for n in plan["lengths"]]
    for n, run in zip(plan["lengths"], ours(plan, *runs, shape=plan["small"], optimizer="adamw")):
        if isinstance(run, str):
            rows.append([n, longest // n, run])
            continue
        base, speed = base or cost([run], 1), 2 / cost([run], 1, 3)  # of 2 steps after a first one; steps/s
        rows.append([n, longest // n, f"{speed * (longest // n):.2f}", f"{speed * 2 * longest:.0f}", f"{cost([run], 1) / base:.2f}"])
    table(f"Sequences of {2 * longest} tokens together in every step, a quarter of each its prompt", [
        "tokens of a sequence", "pairs", "pairs/s", "tokens/s", f"{SECONDS} / first"], rows)

    n, rows = plan["batch"], []
    for processes, threads, copies in plan["processes"]:
        if CUDA and processes > torch.cuda.device_count():
            rows.append([processes, threads, copies, "unmeasured: too few GPUs"])
            continue
        run = ours(plan, (ultrafeedback(n, plan["scale"]), n, 3, {}), n=processes, threads=threads, replicas=copies)
        rows.append([processes, threads, copies, f"{2 * n / cost(run, 1, 3):.2f}"])
    table(f"Processes, {n} pairs a step", ["processes", "threads of each", "copies of the model", "pairs/s"], rows)

    rows = []
    for vocabulary in plan["vocabularies"]:
        shape = (*plan["small"][:5], vocabulary, False)
        (mine, logp), (plain, other) = (job(plan, "head", shape=shape, mine=mine) for mine in (True, False))
        gate(f"vocabulary {vocabulary}, relative", score=abs(logp / other - 1))
        rows.append([vocabulary, f"{mine:.2f}", f"{plain:.2f}"])
    table("Memory of forward and backward of 4 pairs of 512 tokens, GiB above the loaded model", [
        "vocabulary", "this repository", "a plain forward, all logits"], rows)

def evaluation(plan):
    """RM-Bench-like scoring, beside padded forwards."""
    sizes, rows, done = rm_bench(plan["prompts"], plan["scale"], plan["rm_bench"]), [], {}
    for side in [*BATCHES] * plan["repeats"]:
        done.setdefault(side, []).append(job(plan, "evaluation", sizes=sizes, side=side))
    base = next(iter(done.values()))
    for side, runs in done.items():
        gate(side, score=max(abs(a - b) for a, b in zip(runs[0][1], base[0][1], strict=True)))
        middle, ours = (median(span[KIND - 2] for span, _ in x) for x in (runs, base))
        rows.append([side, several(span[0] for span, _ in runs), f"{median(span[1] for span, _ in runs):.1f}", f"{middle / ours:.2f}"])
    table(f"Scores of {plan['prompts']} prompts with six responses each, as in RM-Bench", [
        "side", "CPU-seconds, each run", "seconds", f"{SECONDS} / ours"], rows)

def profile(plan):
    """Where the time of a step goes."""
    groups = job(plan, "profile", sizes=ultrafeedback(plan["batch"], plan["scale"]))
    largest = lambda group: ", ".join(f"{name} {x:.1%}" for name, x in sorted(group.items(), key=lambda item: -item[1])[:4])
    table(f"Time of a training step of {plan['batch']} pairs, {'GPU' if CUDA else 'CPU'}", ["group", "share", "largest of it"],
          [[name, f"{sum(group.values()):.1%}", largest(group)] for name, group in groups.items()])

def spread(plan):
    """How far scores depend on batches, and on bf16."""
    rows, sizes = [], rm_bench(plan["prompts"], plan["scale"], plan["rm_bench"])
    (alone, batched), (low_alone, low_batched) = (job(plan, "spread", sizes=sizes, bf16=bf16) for bf16 in (False, True))
    for what, a, b in (("fp32: row by row, and batched", alone, batched), ("bf16: row by row, and batched", low_alone, low_batched),
                       ("batched: bf16, and fp32", low_batched, batched)):
        off = [abs(x - y) for x, y in zip(a, b, strict=True)]
        rows.append([what, f"{max(off):.1e}", f"{sum(off) / len(off):.1e}"])
    table("Average log-probs of the same responses apart, nats a token", ["scored", "most", "mean"], rows)

# ------------------------------------------------------------------------------------------------------------------------------- main
def hardware():
    """What this ran on, in a line."""
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] or [platform.machine()]
    packages = [f"{name} {release(name)}" for name in ("torch", "transformers", "trl", "bitsandbytes") if installed(name)]
    gpu = [torch.cuda.get_device_name()] if CUDA else []
    python = f"Python {platform.python_version()}"
    return ", ".join([*gpu, f"{len(os.sched_getaffinity(0))} cores of {models[0]}", python, *packages])

def main():
    parts = (trl, ablation, memory, loading, growth, evaluation, profile, spread)
    parts = {part.__name__: part for part in parts}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="cuda" if CUDA else "cpu", help="all sizes (that of the device)")
    parser.add_argument("--only", choices=parts, action="append", help="a part; repeatable (all)")
    parser.add_argument("--side", choices=CUDA_SIDES, action="append", help="of trl, with ours of its loss; repeatable (all)")
    parser.add_argument("--set", action="append", default=[], metavar="K=N", help="another number in the plan; repeatable")
    parser.add_argument("--folder", type=os.path.abspath, help="where models are kept, and the result of each job (temporary)")
    args = parser.parse_args()
    if args.plan == "cuda" and not installed("bitsandbytes"):
        print("bitsandbytes is not installed: 8-bit AdamW, and 8B with it, is unmeasured; this is the plan cuda-1b")
        args.plan = "cuda-1b"
    if not installed("trl"):
        print("TRL is not installed (tests/requirements-bench.txt): its rows are unmeasured")
    with tempfile.TemporaryDirectory() as temporary:
        plan = PLANS[args.plan] | dict(folder=args.folder or temporary)
        os.makedirs(plan["folder"], exist_ok=True)
        plan |= {key: type(plan[key])(value) for key, value in (setting.split("=") for setting in args.set)}
        wanted = args.side or plan["sides"]
        runs = lambda name: installed("trl") if "trl" in name else plan["compiled"] or "compile" not in name
        wanted = {*filter(runs, wanted)} | {name.split("-")[0] + "-ours" for name in wanted}
        plan["sides"] = {name: side for name, side in plan["sides"].items() if name in wanted}
        for part in args.only or parts:
            try:
                parts[part](plan)
            except Failed as why:
                print(f"\n{part}: unmeasured, {why}")
    print(f"\nPlan {args.plan}, {hardware()}")
    if FAILED:
        raise SystemExit("\n".join(["", "FAILED", *FAILED]))

if __name__ == "__main__":
    main()

"""Models -> numbers: ranking accuracy of every model on every evaluation set, with intervals.

Every response is scored once, with a log-softmax in fp32: the sum S of its token log-probs and
their number n. The response with the higher score is ranked first, where the score is

    average    S / n        length-normalised: the protocol of AMaPO and SimPO, the default
    sum        S
    implicit   S - S_ref    DPO's implicit reward against --ref, summed

Accuracy is the share of comparisons in which the better response scores strictly higher: a tie is
wrong, and ties are counted. Suites (RM-Bench, RewardBench, LLMBar) average as their authors do.

    python evaluate.py runs/toy/sft runs/toy/dpo --ref runs/toy/sft --data runs/toy/data/eval --out O
    python evaluate.py --summary runs/seed-*/evaluation --out O     # several results as one table

Writes OUT/results.json, results.md, figures.png and scores/MODEL/SET.json: the scores of responses,
as RM-Bench's compute_accuracy reads them. --generate N samples responses to N prompts of each set.
"""

import json
import math
import os
import shutil
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import tqdm
import transformers

from prepare_data import TASKS, begin, check, encode_prompt, fingerprint, load_tokenizer, run, true_reward
from sft import check_vocabulary, load_model, load_rows, on_rank0, plan, print0, score, setup

# ---------------------------------------------------------------------------------------- scores
@torch.no_grad()
def score_set(scorer, data, budget, device, desc):
    """Summed log-probs in nats of all responses, a list for each row; the same on every rank."""
    world, rank, scores = dist.get_world_size(), dist.get_rank(), []
    every = [*zip(data["prompt"], data["responses"])]
    for k in tqdm.trange(0, len(every), 256, desc=desc, unit=" x 256 rows", disable=rank > 0):
        rows = every[k : k + 256]
        full = torch.zeros(len(rows), max(len(rs) for _, rs in rows), device=device).double()
        for micro in plan(rows, world, budget)[rank]:
            out = score(scorer, rows, micro, device).split([len(rows[i][1]) for i in micro])
            for i, part in zip(micro, out):
                full[i, : len(part)] = part
        dist.all_reduce(full)
        check(full.isfinite().all(), f"{desc}: a log-prob is not finite; the weights are broken")
        scores += [line[: len(rs)] for line, (_, rs) in zip(full.tolist(), rows)]
    return scores

# ------------------------------------------------------------------------------------ generation
def generate(path, prompts, args, device, desc):
    """A response to each prompt (token ids), [(ids, whether it ended)], the same on every rank and
    for any number of them: they take batches of 64 prompts in turn, each with a seed of its own."""
    tok, order = load_tokenizer(path), sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tok.pad_token = tok.pad_token or tok.eos_token
    how = dict(dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, use_safetensors=True, trust_remote_code=False)
    lm = transformers.AutoModelForCausalLM.from_pretrained(path, **how).to(device).eval()
    stops = torch.tensor(lm.generation_config.eos_token_id).flatten().tolist()
    how = dict(temperature=args.temperature, top_p=1.0, top_k=0) if args.temperature else {}
    batches, done = [order[k : k + 64] for k in range(0, len(order), 64)], {}
    rank, world = dist.get_rank(), dist.get_world_size()
    for k in tqdm.trange(rank, len(batches), world, desc=desc, unit="batch", disable=rank > 0):
        torch.manual_seed(1_000_003 * args.seed + k)
        inputs = tok.pad(dict(input_ids=[prompts[i] for i in batches[k]]), padding_side="left",
                         return_tensors="pt").to(device)
        out = lm.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tok.pad_token_id,
                          do_sample=args.temperature > 0, **how)
        for i, ids in zip(batches[k], out[:, inputs["input_ids"].shape[1] :].tolist()):
            ends = [j for j, token in enumerate(ids) if token in stops]
            done[i] = (ids[: ends[0] + 1], True) if ends else (ids, False)
    parts = [None] * world
    dist.all_gather_object(parts, done)
    done = {i: response for part in parts for i, response in part.items()}
    return [done[i] for i in range(len(prompts))]

def answer(path, name, args, device):
    """--prompts: a model's answers to a JSON list of {instruction}, as AlpacaEval reads them."""
    tok, text = load_tokenizer(path), Path(args.prompts).read_text()
    items = on_rank0(lambda: [x | dict(instruction=x["instruction"]) for x in json.loads(text)],
                     what=f"{args.prompts}: not a JSON list of {{instruction}}: ")
    prompts = [encode_prompt(tok, [dict(role="user", content=x["instruction"])]) for x in items]
    answers = generate(path, prompts, args, device, f"{name}: answers")
    return [dict(x, output=tok.decode(ids, skip_special_tokens=True), generator=name) for x, (ids, _) in zip(items, answers)]

repetition = lambda x: 1 - len({*zip(x, x[1:], x[2:], x[3:])}) / (len(x) - 3) if len(x) > 3 else 0.0  # share of repeated 4-grams

def judge_samples(tok, rows, samples, logps, ref_logps, ref_rewards):
    """(means over samples, rewards, lines for the disk). kl: log-ratio to the reference in nats. In
    the toy world reward, its true reward, and win, over the reference's sample (tie: a half)."""
    (ids, ended), rewards = zip(*samples), []
    texts = tok.batch_decode(ids, skip_special_tokens=True)
    lines = [dict(id=row["id"], text=t, ended=e) for row, t, e in zip(rows, texts, ended)]
    out = dict(tokens=fmean(map(len, ids)), ended=fmean(ended), repetition=fmean(map(repetition, ids)))
    out |= dict(kl=fmean(a - b for (a,), (b,) in zip(logps, ref_logps))) if ref_logps else {}
    if json.loads(rows[0]["meta"]).get("task") in TASKS:
        rewards = [true_reward(row["meta"], line["text"]) for row, line in zip(rows, lines)]
        wins = [(a > b) + (a == b) / 2 for a, b in zip(rewards, ref_rewards or rewards)]
        out |= dict(reward=fmean(rewards), win=fmean(wins))
    return out, rewards, lines

# --------------------------------------------------------------------------------------- metrics
OFFICIAL_DOMAINS = ("chat", "math", "code", "safety")  # of RM-Bench; a domain begins with its name
CELLS = dict(  # RM-Bench, arXiv 2410.16184: (style of the chosen one, style of the rejected one)
    Easy=((1, 0), (2, 0), (2, 1)), Normal=((0, 0), (1, 1), (2, 2)), Hard=((0, 1), (0, 2), (1, 2)))
CELLS |= {f"{i}>{j}": ((i, j),) for i in range(3) for j in range(3)}  # its matrix
ADVERSARIAL = {"llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
               "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46}
SUITES = {  # suite: {section: {domain: weight}}, as its authors average
    "LLMBar": {"Natural": {"llmbar-natural": 1}, "Adversarial": dict.fromkeys(ADVERSARIAL, 1)},
    "RewardBench": {
        "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
                 "mt-bench-easy": 28, "mt-bench-med": 40},
        "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, **ADVERSARIAL},
        "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "donotanswer": 136,
                   "xstest-should-refuse": 154, "xstest-should-respond": 250},
        "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164,
                      "hep-js": 164, "hep-python": 164, "hep-rust": 164}}}

def sections(data):
    """(stratum of each row, {column: {stratum: weight}}, absent strata) of a set: those of RM-Bench
    if its rows have styles, of the first suite that has all its domains, or one column, ""."""
    strata, suites = data["domain"], SUITES.values()
    if any(data["style"]):
        strata = [next((d for d in OFFICIAL_DOMAINS if s.startswith(d)), s) for s in strata]
        official = OFFICIAL_DOMAINS if {*strata} & {*OFFICIAL_DOMAINS} else ()
        suites = [dict.fromkeys(CELLS, dict.fromkeys([*official, *strata], 1))]
    for suite in suites:
        every = dict.fromkeys(d for section in suite.values() for d in section)
        if {*strata} <= {*every}:
            columns = {c: {d: w for d, w in x.items() if d in strata} for c, x in suite.items()}
            return strata, {c: x for c, x in columns.items() if x}, [d for d in every if d not in strata]
    lists = max(map(len, data["scores"])) > 2
    return [""] * len(strata), dict.fromkeys(["", "best>worst"] if lists else [""], {"": 1}), []

def comparisons(labels, styles, column=""):
    """One row's comparisons, [(place of the better response, of the worse)]: all pairs of unequal
    label, only the best against the worst, or those of a column of RM-Bench."""
    n, extremes = range(len(labels)), (max(labels), min(labels))
    fits = lambda i, j: ((styles[i], styles[j]) in CELLS[column] if styles else
                         not column or (labels[i], labels[j]) == extremes)
    return [(i, j) for i in n for j in n if labels[i] > labels[j] and fits(i, j)]

def estimate(strata, weights):
    """Accuracy and its 95 % interval: (value, low, high). strata: see bootstrap. In each stratum the
    ratio of sums; over strata the mean by `weights`, which add up to 1. Prompts, not comparisons,
    are the units: Wilson's interval at the effective size p (1 - p) / variance."""
    p, variance, z = 0.0, 0.0, 1.959964
    for name, x in strata.items():
        value = (x[:, 0].sum() / x[:, 1].sum()).item()
        squares = (x[:, 0] - value * x[:, 1]).square().sum().item() / x[:, 1].sum().item() ** 2
        p += weights[name] * value
        variance += weights[name] ** 2 * squares * len(x) / max(1, len(x) - 1)
    n = p * (1 - p) / variance if variance > 1e-20 else sum(map(len, strata.values()))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, middle - half), min(1.0, middle + half)

def bootstrap(strata, weights):
    """95 % interval of the gain in accuracy over --ref on the same prompts, by 1000 draws of a
    Poisson bootstrap: how often a prompt is drawn. strata: {name: (prompts, 5) tensor: of each
    prompt, comparisons right, all, tied, won, lost}."""
    gain, draw = 0.0, torch.Generator().manual_seed(0)
    for name, x in strata.items():
        times = torch.poisson(torch.ones(1000, len(x), dtype=x.dtype), generator=draw)
        _, total, _, won, lost = (times @ x).T  # (1000,) each
        gain += weights[name] * (won - lost) / total.clamp(min=1)
    return gain.quantile(torch.tensor([0.025, 0.975], dtype=x.dtype)).tolist()

def kendall_tau(labels, scores):
    """Kendall's tau-b of one row; None where all labels or all scores are equal."""
    n = range(len(labels))
    x, y = ([(v[a] > v[b]) - (v[a] < v[b]) for a in n for b in n if a < b] for v in (labels, scores))
    norm = math.sqrt(sum(map(abs, x)) * sum(map(abs, y)))
    return sum(a * b for a, b in zip(x, y)) / norm if norm else None

def measure(data, scores, base=None):
    """All numbers of one model, one kind of score, one set. data: the columns scores, style, domain
    of a set, and prompt, anything that tells prompts apart: rows of one prompt are one unit.
    base: the scores of --ref. Returns {column: dict(accuracy, low, high, ties, comparisons, prompts,
    domains[, tau, won, lost, gain, gain_low, gain_high])}, columns as of `sections`, and Avg, the
    mean of three or more."""
    names, columns, _ = sections(data)
    out, rows = {}, [*zip(names, data["prompt"], data["scores"], data["style"], scores, base or scores)]
    for column, weights in columns.items():
        units = {name: {} for name in weights}  # of each prompt: right, all, tied, won, lost
        for name, prompt, labels, styles, now, then in rows:
            for i, j in comparisons(labels, styles, column) if name in units else ():
                right, before = now[i] > now[j], then[i] > then[j]
                units[name].setdefault(prompt, []).append(
                    (right, 1, now[i] == now[j], right > before, right < before))
        strata = {name: torch.tensor([[*map(sum, zip(*x))] for x in unit.values()], dtype=torch.float64)
                  for name, unit in units.items() if unit}
        if not strata:  # a column of equal labels
            continue
        weights = {name: weights[name] / sum(weights[s] for s in strata) for name in strata}
        rates = {name: (x.sum(0) / x[:, 1].sum()).tolist() for name, x in strata.items()}
        p, low, high = estimate(strata, weights)
        ties, won, lost = (sum(weights[s] * rates[s][k] for s in strata) for k in (2, 3, 4))
        out[column] = dict(accuracy=p, low=low, high=high, ties=ties, prompts=sum(map(len, strata.values())),
                           comparisons=int(sum(x[:, 1].sum() for x in strata.values())),
                           domains={name: rate[0] for name, rate in rates.items()})
        if base:
            gain = dict(zip(("gain_low", "gain_high"), bootstrap(strata, weights)))
            out[column] |= dict(won=won, lost=lost, gain=won - lost) | gain
    main = [out[c] for c in out if ">" not in c]
    if len(main) > 2:  # of a domain where it is in all of them
        out["Avg"] = dict(accuracy=fmean(x["accuracy"] for x in main), domains={
            d: fmean(x["domains"][d] for x in main) for d in main[0]["domains"]
            if all(d in x["domains"] for x in main)})
    if not any(data["style"]) and max(map(len, data["scores"])) > 2:
        taus = [tau for row in zip(data["scores"], scores) if (tau := kendall_tau(*row)) is not None]
        next(iter(out.values()))["tau"] = sum(taus) / max(1, len(taus))
    return out

def training_log(path):
    """The lines of metrics.jsonl of a model that align.py trained; [] for others."""
    lines = [json.loads(line) for line in open(log)] if (log := Path(path) / "metrics.jsonl").exists() else []
    return lines if lines and "grad_well" in lines[0] else []

def audit(lines):
    """Who gets the gradient: mean shares over the first and the last third of training."""
    third = -(-len(lines) // 3)
    return [{f"{a}_{b}": sum(line[f"{a}_{b}"] for line in part) / third
             for a in ("pairs", "grad") for b in ("misranked", "barely", "well")}
            for part in (lines[:third], lines[-third:]) if part]

# ---------------------------------------------------------------------------------------- tables
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, by n - 1

def tables_of(results):
    """{title: {row: {column: cell}}} of a results.json; a cell is [value] or [value, low, high]."""
    ref, longer, absent, tables = results["ref"], results["longer_wins"], results["absent"], {}
    several = [s for s, columns in longer.items() if "" not in columns]  # those of a suite
    columns = [(s, c, c if c and several == [s] else f"{s} {c}".strip())
               for s, names in longer.items() for c in names if ">" not in c]
    rows = {kind: {m: kinds[kind] for m, kinds in results["models"].items() if kinds[kind]}
            for kind in results["kinds"]}
    average, baseline = rows["average"], {"the longer one wins": longer}
    def grid(title, rows, *keys):
        tables[title] = {m: {t: [100 * row[s][c][k] for k in keys if k in row[s][c]]
                             for s, c, t in columns if keys[0] in row[s][c]} for m, row in rows.items()}
    for kind in rows:
        grid(f"Ranking accuracy by {kind}, %", rows[kind] | baseline, "accuracy", "low", "high")
    grid(f"Minus {ref}, by average, %", average, "gain", "gain_low", "gain_high")
    grid(f"Wrong by {ref}, right now, by average, %", average, "won")
    grid(f"Right by {ref}, wrong now, by average, %", average, "lost")
    grid("100 times Kendall's tau-b, by average", average, "tau")
    tables["Best against worst of a list; chosen of style i against rejected of style j, by average, %"] = {
        m: {f"{s} {c}": [100 * cell["accuracy"]] for s in row for c, cell in row[s].items() if ">" in c}
        for m, row in average.items()}
    for s in several:
        missing = f" ({', '.join(absent[s])} absent: not comparable to published numbers)"
        tables[f"{s} by domain, by average, %{missing * bool(absent[s])}"] = {
            m: {f"{d} {c}": [100 * x] for c, cell in row[s].items() if ">" not in c
                for d, x in cell["domains"].items()} for m, row in average.items()}
    for k, third in enumerate(("first", "last")):
        tables[f"Who gets the gradient: pairs and |dL/dlogp| in the {third} third of training, %"] = {
            m: {key.replace("_", " "): [100 * x] for key, x in parts[k].items()}
            for m, parts in results["audit"].items() if parts}
    return tables | {"Samples (see README)": {
        m: {key: [x] for key, x in row.items()} for m, row in results["generation"].items()}}

def merge(runs, bases):
    """The tables of several runs as one: a cell that several have becomes [mean, deviation]; and
    the differences from the rows `bases`, paired by run, with Student's 95 % interval."""
    cells, out = {}, {}  # (title, row, column): {run: cell}
    for k, tables in enumerate(runs):
        for title, rows in tables.items():
            for row, line in rows.items():
                for column, cell in line.items():
                    cells.setdefault((title, row, column), {})[k] = cell
    for (title, row, column), found in cells.items():
        x = torch.tensor([cell[0] for cell in found.values()])
        cell = [x.mean().item(), x.std().item()] if len(x) > 1 else [*found.values()][0]
        out.setdefault(title, {}).setdefault(row, {})[column] = cell
        for base in bases if title.startswith("Ranking") else ():
            other = cells.get((title, base, column), {})
            x = torch.tensor([found[k][0] - other[k][0] for k in found if k in other])
            if len(x) > 1 and row != base:
                mean, error = x.mean().item(), x.std().item() / math.sqrt(len(x))
                half = error * T975[min(len(x), 11) - 2]
                line = out.setdefault(f"{title}, minus {base}", {}).setdefault(row, {})
                line[column] = [mean, mean - half, mean + half]
    return out

def markdown(tables):
    """Tables as text. Their cells: value, mean (standard deviation), or value [95 % interval]."""
    text = ""
    for title, rows in tables.items():
        digits = 3 if title.startswith("Samples") else 1
        columns = dict.fromkeys(column for line in rows.values() for column in line)
        lines = [["model", *columns], ["---"] * (1 + len(columns))]
        for row, line in rows.items():
            texts = [[f"{x:.{digits}f}" for x in line.get(column, ())] for column in columns]
            cells = [("", "{}", "{} ({})", "{} [{}, {}]")[len(x)].format(*x) for x in texts]
            lines += [[row, *cells]] if line else []
        padded = [[cell.ljust(max(map(len, cells))) for cell in cells] for cells in zip(*lines)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in zip(*padded))
        text += f"\n{title}\n\n{table}\n" * bool(columns)
    return text

def write_tables(folder, tables, logs):
    """FOLDER/results.md and, where matplotlib is installed, figures.png: training curves, who gets
    the gradient, true reward of samples against KL. logs: {model: lines of its metrics.jsonl}."""
    legend = "value [95 % interval], or mean (standard deviation) over seeds. Avg: mean of the columns of a suite"
    (folder / "results.md").write_text(f"{legend}\n{markdown(tables)}")
    main = {t: rows for t, rows in tables.items() if t.startswith(("Ranking", "Who", "Samples"))}
    print(f"\n{legend}\n{markdown(main)}\nmore in {folder}/results.md")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no figures.png: matplotlib is not installed")
    axes = (figure := Figure((15, 9), layout="constrained")).subplots(2, 3).flat
    for ax, key in zip(axes, ("accuracy", "margin", "logp_chosen", "logp_rejected", "grad_misranked")):
        ax.set(xlabel="step", ylabel=key, visible=bool(logs))
        for name, lines in logs.items():
            ax.plot([x["step"] for x in lines], [x[key] for x in lines], label=name)
    axes[0].legend(fontsize="small").set_in_layout(False) if logs else None
    samples = tables.get("Samples (see README)", {})
    axes[5].set(xlabel="KL to the reference, nats a response", ylabel="true reward", visible=any(samples.values()))
    for name, line in samples.items():
        if "kl" in line and "reward" in line:
            axes[5].plot(line["kl"][0], line["reward"][0], "o")
            axes[5].annotate(name, (line["kl"][0], line["reward"][0]), fontsize="small")
    figure.savefig(folder / "figures.png")

# ------------------------------------------------------------------------------------------ main
def find_sets(root):
    """{name: rows} of a folder of prepared sets, in the order of writing, or of one set."""
    files = sorted([*root.glob("dataset_info.json"), *root.glob("*/dataset_info.json")], key=lambda f: f.stat().st_mtime_ns)
    check(files, f"{root}: no evaluation set; see prepare_data.py --eval NAME=SOURCE")
    sets = {f.parent.name: load_rows(f.parent) for f in files}
    for name, data in sets.items():
        check(any(len({*x}) > 1 for x in data["scores"]), f"{root}: no row of {name} has unequal scores")
    return sets

def score_kinds(sums, ref, lengths):
    """{kind: scores} of the responses of a set, all lists of lists; ref: the reference's sums."""
    each = lambda f, a, b: [[f(x, y) for x, y in zip(*row)] for row in zip(a, b)]
    out = dict(average=each(lambda s, n: s / n, sums, lengths), sum=sums)
    return out | dict(implicit=each(lambda s, r: s - r, sums, ref)) if ref else out

def write_scores(file, data, kinds, lengths):
    """The scores of one model on one set; also by the names that RM-Bench's own code reads."""
    rows = [dict(zip(("id", "domain", "tokens", *kinds), row))
            for row in zip(data["id"], data["domain"], lengths, *kinds.values())]
    for row, labels in zip(rows, data["scores"]):
        side = lambda label: [s for s, x in zip(row["average"], labels) if x == label]
        row |= dict(score_chosen=side(max(labels)), score_rejected=side(min(labels)))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))

def load_results(folder):
    """(its --ref, its tables) of a folder that main wrote."""
    try:
        results = json.loads((Path(folder) / "results.json").read_text())
        return results["ref"], tables_of(results)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/results.json: not of this evaluate.py ({error!r})") from None

def main(args):
    if args.summary:
        refs, tables = zip(*map(load_results, args.summary))
        bases = dict.fromkeys([*refs, "dpo", "simpo", "simpo@gamma=0"])
        Path(args.out).mkdir(parents=True, exist_ok=True)
        return write_tables(Path(args.out), merge(tables, bases), {})
    check(args.models and args.data, "wanted MODEL ... and --data, or --summary")
    check(args.max_new_tokens > 0 <= min(args.generate, args.temperature), "wanted numbers from 0, --max-new-tokens from 1")
    device, sets = setup(), find_sets(Path(args.data))
    paths = list(dict.fromkeys([*([args.ref] if args.ref else []), *args.models]))
    for path in paths:
        check_vocabulary(args.data, path)  # a bad one fails here, before anything is scored
    short = [Path(p).name for p in paths]
    names = {p: n if short.count(n) == 1 else p.replace("/", "_") for p, n in zip(paths, short)}
    make = begin(args.out, vars(args), [args.data, *paths, *filter(None, [args.prompts])], rewritable="models")
    logs = {names[path]: log for path in paths if (log := training_log(path))}
    if make is None:
        print0(f"{args.out} is complete")
        return dist.get_rank() or write_tables(Path(args.out), load_results(args.out)[1], logs)
    rows = [row for d in sets.values() for row in d.select(range(min(args.generate, len(d))))]
    prompts, sums = [row["prompt"] for row in rows], {}
    samples = {p: generate(p, prompts, args, device, f"{names[p]}: samples") for p in paths if rows}
    answers = {p: answer(p, names[p], args, device) for p in paths if args.prompts}
    for path in paths:
        scorer, budget = load_model(path, device), args.tokens_per_forward
        sums[path] = {name: score_set(scorer, data, budget, device, f"{names[path]}: {name}")
                      for name, data in sets.items()}
        for p in (p for p in samples if path in (p, args.ref)):
            own = dict(prompt=prompts, responses=[[ids] for ids, _ in samples[p]])
            sums[path][p] = score_set(scorer, own, budget, device, f"{names[path]}: samples")
        del scorer
    if dist.get_rank():
        return
    out, ref_rewards = make(), None
    lengths = {s: [[len(r) for r in rs] for rs in data["responses"]] for s, data in sets.items()}
    labels = {s: {k: data[k][:] for k in ("scores", "style", "domain")} | dict(
        prompt=[hash(tuple(p)) for p in data["prompt"]]) for s, data in sets.items()}
    results = dict(
        args=json.loads((out / "args.json").read_text()), ref=names.get(args.ref), models={}, generation={},
        kinds=["average", "sum", "implicit"][: 3 if args.ref else 2], absent={s: sections(labels[s])[2] for s in sets},
        audit={name: audit(lines) for name, lines in logs.items()}, longer_wins={s: measure(labels[s], lengths[s]) for s in sets},
        templates={names[p]: fingerprint(Path(p) / "chat_template.jinja") for p in paths},
        versions=dict(torch=torch.__version__, transformers=transformers.__version__))
    for path in paths:
        every = results["models"][names[path]] = {kind: {} for kind in results["kinds"]}
        for s in sets:
            ref = sums[args.ref][s] if args.ref not in (None, path) else None
            kinds = score_kinds(sums[path][s], ref, lengths[s])
            write_scores(out / "scores" / names[path] / f"{s}.json", sets[s], kinds, lengths[s])
            base = dict(average=ref and score_kinds(ref, None, lengths[s])["average"])
            for kind, scores in kinds.items():
                every[kind][s] = measure(labels[s], scores, base.get(kind))
        if answers:
            (out / f"answers-{names[path]}.json").write_text(json.dumps(answers[path], indent=1))
        if samples:
            results["generation"][names[path]], rewards, lines = judge_samples(
                load_tokenizer(path), rows, samples[path], sums[path][path],
                sums[args.ref][path] if args.ref else None, ref_rewards)
            ref_rewards = rewards if path == args.ref else ref_rewards  # the reference is first
            (out / f"samples-{names[path]}.json").write_text(json.dumps(lines, indent=1))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(out, args.out)
    write_tables(Path(args.out), tables_of(results), logs)

def arguments(add):
    add("models", nargs="*", type=os.path.normpath, metavar="MODEL", help="Hugging Face folders or hub ids")
    add("--data", help="a folder of sets (DIR/eval of prepare_data.py), or one set")
    add("--ref", type=os.path.normpath, help="the SFT model: gives implicit rewards and flips; is scored as well")
    add("--out", required=True, type=os.path.normpath, help="folder to write; whole or not at all")
    add("--tokens-per-forward", type=int, default=16384, help="memory, not results (16384)")
    add("--generate", type=int, default=0, metavar="N", help="prompts of each set to respond to (0)")
    add("--prompts", help="JSON list of {instruction} to answer, as AlpacaEval has it")
    add("--temperature", type=float, default=1.0, help="of sampling; 0: greedy (default 1)")
    add("--max-new-tokens", type=int, default=512, help="of a sampled response (default 512)")
    add("--seed", type=int, default=0, help="of sampling")
    add("--summary", nargs="+", help="folders of results to summarise instead, one for each seed")

if __name__ == "__main__":
    run(main, __doc__, arguments)

"""Models -> numbers: ranking accuracy of every model on every evaluation set, with intervals.

Accuracy is the share of comparisons in which the better response scores strictly higher; a tie is
wrong, and counted. With n tokens, whose log-probs (log-softmax in fp32) add up to S, it scores

    average    S / n        length-normalised: the protocol of AMaPO and SimPO, the default
    sum        S
    implicit   S - S_ref    DPO's implicit reward against --ref, summed

    python evaluate.py runs/toy/dpo --ref runs/toy/sft --data runs/toy/data/eval --out O
    python evaluate.py --summary runs/seed-*/evaluation --out O     # several results as one table

Writes OUT/results.json, results.md, figures.png and scores/MODEL/SET.json: the scores of responses,
as RM-Bench's compute_accuracy reads them. --generate N samples responses to N prompts of each set.
"""

import gc
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

from prepare_data import SPLITS, begin, check, encode_prompt, fingerprint, load_tokenizer, run, true_reward
from sft import check_fit, load_model, load_rows, on_rank0, plan, print0, score, setup

# ---------------------------------------------------------------------------- scores and samples
@torch.no_grad()
def score_set(scorer, data, budget, device, desc):
    """Summed log-probs in nats of all responses, a list for each row; the same on every rank."""
    every, scores = [*zip(data["prompt"], data["responses"])], []
    bar = tqdm.tqdm(total=len(every), desc=desc, unit="row", disable=dist.get_rank() > 0)
    while rows := every[len(scores) : len(scores) + 256]:
        full = torch.zeros(len(rows), max(len(rs) for _, rs in rows), device=device).double()
        for micro in plan(rows, dist.get_world_size(), budget)[dist.get_rank()]:
            out = score(scorer, rows, micro, device).split([len(rows[i][1]) for i in micro])
            for i, part in zip(micro, out):
                full[i, : len(part)] = part
        dist.all_reduce(full)
        check(full.isfinite().all(), f"{desc}: a log-prob is not finite; the weights are broken")
        scores += [line[: len(rs)] for line, (_, rs) in zip(full.tolist(), rows)]
        bar.update(len(rows))
    return scores

def generate(path, prompts, args, device, desc):
    """A response to each prompt (token ids), [(ids, whether it ended)], the same on every rank and
    for any number of them: they take batches of 64 prompts in turn, each with a seed of its own."""
    tok, rank, world = load_tokenizer(path), dist.get_rank(), dist.get_world_size()
    tok.pad_token, tok.padding_side = tok.pad_token or tok.eos_token, "left"
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        use_safetensors=True, trust_remote_code=False).to(device)
    stops = torch.tensor(lm.generation_config.eos_token_id).flatten().tolist()
    how = dict(temperature=args.temperature, top_p=1.0, top_k=0) if args.temperature else {}
    order, done = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), []
    most = getattr(lm.config, "max_position_embeddings", math.inf)
    check(all(len(p) < most for p in prompts), f"{desc}: a prompt of {most} tokens or more")
    batches, parts = [order[k : k + 64] for k in range(0, len(order), 64)], [None] * world
    for k in tqdm.trange(rank, len(batches), world, desc=desc, unit="batch", disable=rank > 0):
        torch.manual_seed(1_000_003 * args.seed + k)
        inputs = tok.pad(dict(input_ids=[prompts[i] for i in batches[k]]), return_tensors="pt")
        room = [min(args.max_new_tokens, most - len(prompts[i])) for i in batches[k]]
        out = lm.generate(**inputs.to(device), max_new_tokens=max(room),
                          pad_token_id=tok.pad_token_id, do_sample=bool(how), **how)
        for i, n, ids in zip(batches[k], room, out[:, inputs.input_ids.shape[1] :].tolist()):
            end = next((j + 1 for j, token in enumerate(ids[:n]) if token in stops), None)
            done.append((i, (ids[: end or n], end is not None)))
    dist.all_gather_object(parts, done)
    return [response for _, response in sorted(pair for part in parts for pair in part)]

def answer(path, name, args, device):
    """--prompts: a model's answers to a JSON list of {instruction}, as AlpacaEval reads them."""
    tok = load_tokenizer(path)
    read = lambda: [(x, encode_prompt(tok, [dict(role="user", content=x["instruction"] + "")]))
                    for x in json.loads(Path(args.prompts).read_text())]
    items = on_rank0(read, what=f"{args.prompts}: wanted a JSON list of {{instruction}}: ")
    answers = generate(path, [prompt for _, prompt in items], args, device, f"{name}: answers")
    texts = tok.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
    return [dict(x, output=text, generator=name) for (x, _), text in zip(items, texts)]

def repetition(ids):
    """The share of the 4-grams of a response that repeat an earlier one."""
    grams = [*zip(ids, ids[1:], ids[2:], ids[3:])]
    return 1 - len({*grams}) / len(grams) if grams else 0.0

def judge_samples(tok, rows, samples, logps, ref_logps, ref_rewards):
    """(means over samples, rewards, lines for the disk). kl: log-ratio to the reference in nats. In
    the toy world reward, its true reward, and win, over the reference's sample (tie: a half)."""
    (ids, ended), rewards = zip(*samples), []
    texts = tok.batch_decode(ids, skip_special_tokens=True)
    lines = [dict(id=row["id"], text=t, ended=e) for row, t, e in zip(rows, texts, ended)]
    means = dict(tokens=fmean(map(len, ids)), ended=fmean(ended), repetition=fmean(map(repetition, ids)))
    if ref_logps:
        means["kl"] = fmean(a - b for (a,), (b,) in zip(logps, ref_logps))
    if {row["id"].rpartition("-")[0] for row in rows} <= {f"toy-{split}" for split in SPLITS}:
        rewards = [true_reward(row["meta"], text) for row, text in zip(rows, texts)]
        wins = [(a > b) + (a == b) / 2 for a, b in zip(rewards, ref_rewards or rewards)]
        means |= dict(reward=fmean(rewards), win=fmean(wins))
    return means, rewards, lines

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
        domains = dict.fromkeys(d for section in suite.values() for d in section)
        if {*strata} <= {*domains}:
            return strata, suite, [d for d in domains if d not in strata]
    lists = max(map(len, data["scores"])) > 2
    return [""] * len(strata), dict.fromkeys(["", "best>worst"] if lists else [""], {"": 1}), []

def comparisons(labels, styles, column=""):
    """One row's comparisons in a column, [(place of the better response, of the worse)]."""
    n, extremes = range(len(labels)), (max(labels), min(labels))
    fits = lambda i, j: ((styles[i], styles[j]) in CELLS[column] if styles else
                         not column or (labels[i], labels[j]) == extremes)  # best>worst
    return [(i, j) for i in n for j in n if labels[i] > labels[j] and fits(i, j)]

def estimate(strata, weights):
    """(accuracy, low, high), a 95 % interval: in a stratum the ratio of sums, over strata the mean
    by `weights`, which add up to 1. strata: see bootstrap. Prompts, not comparisons, are the units:
    Wilson's interval at the effective size p (1 - p) / variance."""
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
    """95 % interval of the gain in accuracy over --ref: a Poisson bootstrap, 1000 draws of how
    often a prompt counts. strata: {name: (prompts, 5): comparisons right, all, tied, won, lost}."""
    gain, draw = 0.0, torch.Generator().manual_seed(0)
    for name, x in strata.items():
        times = torch.poisson(torch.ones(1000, len(x), dtype=x.dtype), generator=draw)
        _, total, _, won, lost = (times @ x).T  # (1000,) each
        gain += weights[name] * (won - lost) / total.clamp(min=1)
    return gain.quantile(torch.tensor([0.025, 0.975], dtype=x.dtype)).tolist()

def kendall_tau(labels, scores):
    """Kendall's tau-b of one row; None where all labels or all scores are equal."""
    x, y = ((v[:, None] - v).sign() for v in torch.tensor([labels, scores], dtype=torch.float64))
    norm = math.sqrt(x.abs().sum() * y.abs().sum())  # x, y: (n, n), each pair twice
    return (x * y).sum().item() / norm if norm else None

def measure(data, scores, base=None):
    """All numbers of one model, one kind of score, one set. data: its columns scores, style, domain
    and prompt; rows of one prompt are one unit. base: the scores of --ref. Returns {column as of
    `sections`, and Avg, the mean of three or more: dict(accuracy, low, high, ties, comparisons,
    prompts, domains[, tau, won, lost, gain, gain_low, gain_high])}."""
    names, columns, _ = sections(data)
    out, rows = {}, [*zip(names, data["prompt"], data["scores"], data["style"], scores, base or scores)]
    for column, weights in columns.items():
        units = {}  # {stratum: {prompt: [comparisons that are right, all, tied, won, lost]}}
        for name, prompt, labels, styles, now, then in rows:
            for i, j in comparisons(labels, styles, column):
                right, before = now[i] > now[j], then[i] > then[j]
                outcome = right, 1, now[i] == now[j], right > before, right < before
                unit = units.setdefault(name, {}).setdefault(prompt, [0] * 5)
                unit[:] = [a + b for a, b in zip(unit, outcome)]
        strata = {s: torch.tensor([*units[s].values()]).double() for s in weights if s in units}
        if not strata:  # a column of equal labels
            continue
        weights = {s: weights[s] / sum(weights[x] for x in strata) for s in strata}
        rates = {s: (x.sum(0) / x[:, 1].sum()).tolist() for s, x in strata.items()}
        ties, won, lost = (sum(weights[s] * rates[s][k] for s in strata) for k in (2, 3, 4))
        total = torch.cat([*strata.values()])[:, 1]  # of each prompt
        out[column] = dict(zip(("accuracy", "low", "high"), estimate(strata, weights)))
        out[column] |= dict(ties=ties, prompts=len(total), comparisons=int(total.sum()),
                            domains={s: rate[0] for s, rate in rates.items()})
        if base:
            low, high = bootstrap(strata, weights)
            out[column] |= dict(won=won, lost=lost, gain=won - lost, gain_low=low, gain_high=high)
    main = [out[c] for c in out if ">" not in c]
    if len(main) > 2:
        shared = [d for d in main[0]["domains"] if all(d in x["domains"] for x in main)]
        out["Avg"] = dict(accuracy=fmean(x["accuracy"] for x in main),
                          domains={d: fmean(x["domains"][d] for x in main) for d in shared})
    if not any(data["style"]) and max(map(len, data["scores"])) > 2:
        taus = [tau for x in zip(data["scores"], scores) if (tau := kendall_tau(*x)) is not None]
        next(iter(out.values()))["tau"] = sum(taus) / max(1, len(taus))
    return out

def training_log(path):
    """The lines of metrics.jsonl of a model that align.py trained; [] for others."""
    lines = [json.loads(text) for log in Path(path).glob("metrics.jsonl") for text in open(log)]
    return [line for line in lines if "grad_well" in line]

def audit(lines):
    """Who gets the gradient: mean shares over the first and the last third of training."""
    third = -(-len(lines) // 3)
    return [{f"{a}_{b}": sum(line[f"{a}_{b}"] for line in part) / third
             for a in ("pairs", "grad") for b in ("misranked", "barely", "well")}
            for part in (lines[:third], lines[-third:]) if part]

# ---------------------------------------------------------------------------------------- tables
def tables_of(results):
    """{(title, row, column): cell} of a results.json; a cell is [value] or [value, low, high]."""
    ref, longer, tables = results["ref"], results["longer_wins"], {}
    suites = [s for s, cells in longer.items() if "" not in cells]
    average = {m: kinds["average"] for m, kinds in results["models"].items()}
    every = [(s, c) for s, cells in longer.items() for c in cells]  # sets and their columns
    def grid(title, rows, *keys, fine=False):
        for m, s, c in ((m, s, c) for m in rows for s, c in every if (">" in c) == fine):
            cell, name = rows[m][s][c], c if suites == [s] and not fine else f"{s} {c}".strip()
            if keys[0] in cell:
                tables[title, m, name] = [100 * cell[key] for key in keys if key in cell]
    for kind in results["kinds"]:
        rows = {m: kinds[kind] for m, kinds in results["models"].items() if kinds[kind]}
        rows["the longer one wins"] = longer
        grid(f"Ranking accuracy by {kind}, %", rows, "accuracy", "low", "high")
    grid(f"Minus {ref}, by average, %", average, "gain", "gain_low", "gain_high")
    grid(f"Wrong by {ref}, right now, by average, %", average, "won")
    grid(f"Right by {ref}, wrong now, by average, %", average, "lost")
    grid("100 times Kendall's tau-b, by average", average, "tau")
    grid("Best against worst of a list; chosen of style i against rejected of style j, "
         "by average, %", average, "accuracy", fine=True)
    for s in suites:
        absent = f" ({', '.join(results['absent'][s])} absent: not comparable to published numbers)"
        title = f"{s} by domain, by average, %" + (absent if results["absent"][s] else "")
        tables |= {(title, m, f"{d} {c}"): [100 * x] for m, row in average.items()
                   for c in row[s] if ">" not in c for d, x in row[s][c]["domains"].items()}
    for m, thirds in results["audit"].items():
        for nth, shares in zip(("first", "last"), thirds):
            title = f"Who gets the gradient: pairs and |dL/dlogp| in the {nth} third of training, %"
            tables |= {(title, m, k.replace("_", " ")): [100 * x] for k, x in shares.items()}
    return tables | {("Samples (see README)", m, key): [x]
                     for m, numbers in results["generation"].items() for key, x in numbers.items()}

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t
def merge(runs, bases):
    """The tables of several runs as one: a cell that several have becomes [mean, deviation]; and
    the differences from the rows `bases`, paired by run, with Student's 95 % interval."""
    out = {}
    for title, row, column in dict.fromkeys(key for tables in runs for key in tables):
        cells = {m: [t.get((title, m, column)) for t in runs] for m in (row, *bases)}
        found = [cell for cell in cells[row] if cell]
        x = torch.tensor([cell[0] for cell in found])
        out[title, row, column] = [x.mean().item(), x.std().item()] if len(x) > 1 else found[0]
        for base in bases if title.startswith("Ranking") else ():
            x = torch.tensor([a[0] - b[0] for a, b in zip(cells[row], cells[base]) if a and b])
            if len(x) > 1 and row != base:
                mean, error = x.mean().item(), x.std().item() / math.sqrt(len(x))
                half = error * T975[min(len(x), 11) - 2]
                out[f"{title}, minus {base}", row, column] = [mean, mean - half, mean + half]
    return out

def markdown(tables):
    """Tables as text. Their cells: value, mean (standard deviation), or value [95 % interval]."""
    text, forms = "", ("", "{}", "{} ({})", "{} [{}, {}]")
    for title in dict.fromkeys(title for title, _, _ in tables):
        cells = {(row, column): x for (t, row, column), x in tables.items() if t == title}
        rows, columns = map(dict.fromkeys, zip(*cells))
        digits = 3 if title.startswith("Samples") else 1
        show = lambda cell: forms[len(cell)].format(*[f"{x:.{digits}f}" for x in cell])
        lines = [["model", *columns], ["---"] * (1 + len(columns))]
        lines += [[row, *[show(cells.get((row, c), ())) for c in columns]] for row in rows]
        widths = [max(map(len, cells)) for cells in zip(*lines)]
        lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines]
        text += f"\n{title}\n\n" + "".join(lines)
    return text

def write_tables(folder, tables, logs):
    """FOLDER/results.md and, where matplotlib is installed, figures.png: training curves, who gets
    the gradient, true reward of samples against KL. logs: {model: lines of its metrics.jsonl}."""
    legend = "value [95 % interval], or mean (standard deviation) over seeds. Avg: mean of the columns of a suite"
    main = {k: x for k, x in tables.items() if k[0].startswith(("Ranking", "Who", "Samples"))}
    print(f"\n{legend}\n{markdown(main)}\nmore in {folder}/results.md")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(f"{legend}\n{markdown(tables)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no figures.png: matplotlib is not installed")
    figure = Figure((15, 9), layout="constrained")
    keys = ("accuracy", "margin", "logp_chosen", "logp_rejected", "grad_misranked", "true reward")
    panels = dict(zip(keys, figure.subplots(2, 3).flat))
    for name, lines in logs.items():
        for key in keys[:5]:
            panels[key].plot([x["step"] for x in lines], [x[key] for x in lines], label=name)
    for (title, name, key), cell in tables.items():
        if title.startswith("Samples") and key == "kl" and (title, name, "reward") in tables:
            point = cell[0], tables[title, name, "reward"][0]
            panels["true reward"].plot(*point, "o")
            panels["true reward"].annotate(name, point, fontsize="small")
    for key, ax in panels.items():
        x = "KL to the reference, nats a response" if key == "true reward" else "step"
        ax.set(xlabel=x, ylabel=key, visible=bool(ax.lines))
    panels["accuracy"].legend(handles=figure.axes[0].lines, fontsize="small").set_in_layout(False)
    figure.savefig(folder / "figures.png")

# ------------------------------------------------------------------------------------------ main
def find_sets(root):
    """{name: its columns} of a folder of prepared sets, in its report's order, or of one set."""
    files = [*root.glob("dataset_info.json"), *root.glob("*/dataset_info.json")]
    check(files, f"{root}: no evaluation set; see prepare_data.py --eval NAME=SOURCE")
    report = "".join(f.read_text() for f in root.parent.glob("report.json"))
    place = lambda f: f'{report}"eval/{f.parent.name}"'.index(f'"eval/{f.parent.name}"')
    sets = {f.parent.name: load_rows(f.parent)[:] for f in sorted(sorted(files), key=place)}
    for name, data in sets.items():
        check(any(len({*x}) > 1 for x in data["scores"]), f"{root}: set {name} has nothing to rank")
        data["prompt"] = [*map(tuple, data["prompt"])]  # can be keys
        data["tokens"] = [[len(r) for r in rs] for rs in data["responses"]]
    return sets

def export(data, kinds):
    """The scores of one model on one set; also by the names that RM-Bench's own code reads."""
    columns = dict(id=data["id"], domain=data["domain"], tokens=data["tokens"], **kinds)
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    for row, labels in zip(rows, data["scores"]):
        for key, label in (("score_chosen", max(labels)), ("score_rejected", min(labels))):
            row[key] = [s for s, x in zip(row["average"], labels) if x == label]
    return rows

def tabulate(folders, out, logs):
    """The tables of folders that main wrote, as one, in OUT. logs: see write_tables."""
    read = lambda f: ((x := json.loads((Path(f) / "results.json").read_text()))["ref"], tables_of(x))
    refs, runs = zip(*[on_rank0(read, f, what=f"{f}/results.json: not of this evaluate.py: ") for f in folders])
    bases = [*refs, "dpo", "simpo", "simpo@gamma=0", "simpo@gamma=0,beta=10"]
    on_rank0(write_tables, Path(out), merge(runs, bases), logs)

def main(args):
    device = setup()
    if args.summary:
        return tabulate(args.summary, args.out, {})
    check(args.models and args.data, "wanted MODEL ... and --data, or --summary")
    sound = args.generate >= 0 <= args.temperature and args.max_new_tokens > 0
    check(sound, "--generate, --temperature, --max-new-tokens: out of range")
    sets = find_sets(Path(args.data))
    paths = [*dict.fromkeys(filter(None, [args.ref, *args.models]))]
    for path in paths:
        check_fit(args.data, path, *sets.values())  # a bad one fails before anything is scored
    short = [Path(p).name for p in paths]
    models = {n if short.count(n) == 1 else p.replace("/", "_"): p for n, p in zip(short, paths)}
    logs = {m: log for m, path in models.items() if (log := training_log(path))}
    inputs = dict(data=[args.data], prompts=[args.prompts], ref=[args.ref], models=args.models)
    make = begin(args.out, vars(args), inputs, rewritable="models")
    if make is None:
        return print0(f"{args.out} is complete") or tabulate([args.out], args.out, logs)
    ref = [*models][0] if args.ref else None
    kinds = ["average", "sum", "implicit"][: 3 if ref else 2]
    rows = [dict(zip(d, x)) for d in sets.values() for x in [*zip(*d.values())][: args.generate]]
    prompts, files, logps, rewards = [[*row["prompt"]] for row in rows], {}, {}, {}
    for m in models if args.prompts else ():
        files[f"answers-{m}.json"] = answer(models[m], m, args, device)
    samples = {m: generate(p, prompts, args, device, f"{m}: samples") for m, p in models.items() if rows}
    results = dict(
        ref=ref, models={m: {kind: {} for kind in kinds} for m in models}, generation={},
        kinds=kinds, absent={s: sections(data)[2] for s, data in sets.items()},
        audit={m: audit(lines) for m, lines in logs.items()},
        longer_wins={s: measure(data, data["tokens"]) for s, data in sets.items()},
        templates={m: fingerprint(Path(p) / "chat_template.jinja") for m, p in models.items()},
        versions=dict(torch=torch.__version__, transformers=transformers.__version__))
    for m, path in models.items():
        scorer, budget = load_model(path, device), args.tokens_per_forward
        for s, data in sets.items():
            sums = score_set(scorer, data, budget, device, f"{m}: {s}")
            scores = dict(average=[[x / n for x, n in zip(*row)] for row in zip(sums, data["tokens"])], sum=sums)
            old = files.get(f"scores/{ref}/{s}.json") if ref else None  # --ref is scored first
            if old:
                scores["implicit"] = [[x - y for x, y in zip(a, b["sum"])] for a, b in zip(sums, old)]
            files[f"scores/{m}/{s}.json"] = export(data, scores)
            for kind, x in scores.items():
                base = [row[kind] for row in old] if old and kind == "average" else None
                results["models"][m][kind][s] = measure(data, x, base)
        for x in (x for x in samples if m in (x, ref)):
            drawn = dict(prompt=prompts, responses=[[ids] for ids, _ in samples[x]])
            logps[m, x] = score_set(scorer, drawn, budget, device, f"{m}: samples of {x}")
        del scorer
        gc.collect()  # FSDP's modules refer to each other
        if samples:
            results["generation"][m], rewards[m], files[f"samples-{m}.json"] = judge_samples(
                load_tokenizer(path), rows, samples[m], logps[m, m], logps.get((ref, m)), rewards.get(ref))
    if dist.get_rank() == 0:
        out = make()
        for file, content in (files | {"results.json": results}).items():
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_text(json.dumps(content, indent=None if "/" in file else 1))
        shutil.rmtree(args.out, ignore_errors=True)
        os.replace(out, args.out)
    tabulate([args.out], args.out, logs)

def arguments(add):
    add("models", nargs="*", type=os.path.normpath, metavar="MODEL", help="folders or hub ids")
    add("--data", help="a folder of sets (DIR/eval of prepare_data.py), or one set")
    add("--ref", type=os.path.normpath, help="the SFT model; for implicit rewards and gains")
    add("--out", required=True, type=os.path.normpath, help="folder to write; whole or not at all")
    add("--tokens-per-forward", type=int, default=16384, help="memory, not results (16384)")
    add("--generate", type=int, default=0, metavar="N", help="prompts of each set to answer (0)")
    add("--prompts", help="JSON list of {instruction} to answer, as AlpacaEval has it")
    add("--temperature", type=float, default=1.0, help="of sampling; 0: greedy (default 1)")
    add("--max-new-tokens", type=int, default=512, help="of a sampled response (default 512)")
    add("--seed", type=int, default=0, help="of sampling")
    add("--summary", nargs="+", help="folders of results to summarise instead, one for each seed")

if __name__ == "__main__":
    run(main, __doc__, arguments)

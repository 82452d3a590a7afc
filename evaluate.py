"""Models -> numbers: ranking accuracy of every model on every evaluation set, with intervals.

Every response is scored once, with a log-softmax in fp32: the sum S of its token log-probs and
their number n. The response with the higher score is ranked first, where the score is

    average    S / n        length-normalised: the protocol of AMaPO and SimPO, the default
    sum        S
    implicit   S - S_ref    DPO's implicit reward against --ref, summed

Accuracy is the share of comparisons in which the better response scores strictly higher: a tie is
wrong, and ties are counted. A row of RM-Bench (arXiv 2410.16184) gives a matrix, A[i][j] = chosen
in style i beats rejected in style j: Easy is the mean of its lower triangle (the chosen one has the
richer style), Normal of the diagonal, Hard of the upper triangle; domains count equally.

    python evaluate.py runs/toy/sft runs/toy/dpo --ref runs/toy/sft --data runs/toy/data/eval \\
        --out runs/evaluation                                  # toy world, 2 cores: 20 seconds
    python evaluate.py --summary runs/seed-*/evaluation --out runs/summary      # over seeds

Writes OUT/results.json, results.md and scores/MODEL/SET.json: rows with `average`, `sum`, `implicit`
of each response, and for RM-Bench what its own compute_accuracy reads. --generate N samples
responses to N prompts of each set (samples-MODEL.json); --prompts FILE: see answer.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import tqdm
import transformers

from prepare_data import (TASKS, begin, decode, encode_prompt, load_rows, load_tokenizer, run,
                          true_reward)
from sft import check_vocabulary, load_model, plan, print0, score, setup

# ---------------------------------------------------------------------------------------- scores

def score_set(scorer, data, budget, device, desc):
    """Summed log-probs in nats of all responses, a list for each row; the same on every rank."""
    world, rank, scores = dist.get_world_size(), dist.get_rank(), []
    every = [*zip(data["prompt"], data["responses"])]
    bar = tqdm.tqdm(total=len(every), desc=desc, unit="row", disable=rank > 0)
    with bar, torch.no_grad():
        for first in range(0, len(every), 256):
            rows = every[first : first + 256]
            ends = torch.tensor([len(rs) for _, rs in rows]).cumsum(0).tolist()
            place = [range(end - len(rs), end) for end, (_, rs) in zip(ends, rows)]
            full = torch.zeros(ends[-1], dtype=torch.float64, device=device)  # responses, in order
            for micro in plan(rows, world, budget)[rank]:
                mine = [k for i in micro for k in place[i]]
                full[mine] = score(scorer, rows, micro, device).double()
            dist.all_reduce(full)
            full = full.tolist()
            scores += [[full[k] for k in ks] for ks in place]
            bar.update(len(rows))
    return scores

# ------------------------------------------------------------------------------------ generation

def generate(path, prompts, args, device, desc):
    """A response to each prompt (token ids), [(ids, whether it ended)], the same on every rank.

    Every rank loads the whole model and takes batches of 64 prompts in turn. A batch has a seed of
    its own, so that the number of processes makes no difference.
    """
    tok, order = load_tokenizer(path), sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tok.pad_token = tok.pad_token or tok.eos_token
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    stops = lm.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    how = dict(do_sample=True, temperature=args.temperature, top_p=1.0, top_k=0)
    how = how if args.temperature else dict(do_sample=False)
    batches, done = [order[k : k + 64] for k in range(0, len(order), 64)], {}
    turns = range(dist.get_rank(), len(batches), dist.get_world_size())
    for k in tqdm.tqdm(turns, desc=desc, unit="batch", disable=dist.get_rank() > 0):
        torch.manual_seed(1_000_003 * args.seed + k)
        inputs = tok.pad(dict(input_ids=[prompts[i] for i in batches[k]]), padding_side="left",
                         return_tensors="pt").to(device)
        out = lm.generate(**inputs, max_new_tokens=args.max_new_tokens,
                          pad_token_id=tok.pad_token_id, **how)
        for i, ids in zip(batches[k], out[:, inputs["input_ids"].shape[1] :].tolist()):
            ends = [j for j, token in enumerate(ids) if token in stops]
            done[i] = (ids[: ends[0] + 1], True) if ends else (ids, False)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, done)
    done = {i: response for part in parts for i, response in part.items()}
    return [done[i] for i in range(len(prompts))]

def repetition(ids, n=4):
    """Share of the n-grams of a response that have been there before."""
    grams = list(zip(*(ids[k:] for k in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

def answer(path, name, args, device):
    """--prompts: a model's answers to a JSON list of {instruction}, as AlpacaEval reads them."""
    items, tok = json.loads(Path(args.prompts).read_text()), load_tokenizer(path)
    prompts = [encode_prompt(tok, [dict(role="user", content=x["instruction"])]) for x in items]
    answers = generate(path, prompts, args, device, f"{name}: answers")
    return [dict(x, output=decode(tok, ids), generator=name) for x, (ids, _) in zip(items, answers)]

def judge_samples(tok, rows, samples, logps, ref_logps, ref_rewards):
    """(means over samples, rewards, lines for the disk). kl: log-ratio to the reference in nats. In
    the toy world reward, its true reward, and win, over the reference's sample (tie: a half)."""
    mean, (ids, ended) = lambda values: sum(values) / len(values), zip(*samples)
    lines = [dict(id=row["id"], text=decode(tok, x), ended=e) for row, x, e in zip(rows, ids, ended)]
    tokens, repeated, rewards = [*map(len, ids)], [*map(repetition, ids)], []
    out = dict(tokens=mean(tokens), ended=mean(ended), repetition=mean(repeated))
    if ref_logps:
        out["kl"] = mean([a - b for (a,), (b,) in zip(logps, ref_logps)])
    if json.loads(rows[0]["meta"]).get("task") in TASKS:
        rewards = [true_reward(row["meta"], line["text"]) for row, line in zip(rows, lines)]
        wins = [(a > b) + (a == b) / 2 for a, b in zip(rewards, ref_rewards or rewards)]
        out |= dict(reward=mean(rewards), win=mean(wins))
    return out, rewards, lines

# --------------------------------------------------------------------------------------- metrics
OFFICIAL_DOMAINS = ("chat", "math", "code", "safety")  # of RM-Bench; a domain begins with its name
CELLS = dict(Easy=((1, 0), (2, 0), (2, 1)),  # (style of the chosen one, style of the rejected one)
             Normal=((0, 0), (1, 1), (2, 2)),
             Hard=((0, 1), (0, 2), (1, 2)))

def comparisons(labels, styles, scores, column=""):
    """One row's comparisons, [(score of the better response, score of the worse)]: all pairs of
    unequal label, or those of a column of RM-Bench."""
    if not styles:
        n = range(len(labels))
        return [(scores[a], scores[b]) for a in n for b in n if labels[a] > labels[b]]
    table = {(label == max(labels), style): s for label, style, s in zip(labels, styles, scores)}
    return [(table[True, i], table[False, j]) for i, j in CELLS[column]]

def estimate(right, total, stratum):
    """Accuracy and its 95 % interval: (value, low, high).

    right, total: correct and all comparisons of each row.  stratum: the row's domain.
    In each stratum the ratio of sums; over strata a plain mean. Rows, not comparisons, are the
    independent units: Wilson's interval at the effective sample size p (1 - p) / variance.
    """
    values, variance = [], 0.0
    names = list(dict.fromkeys(stratum))
    for name in names:
        rows = [(r, t) for r, t, s in zip(right, total, stratum) if s == name]
        r, t = torch.tensor(rows, dtype=torch.float64).T
        values.append((r.sum() / t.sum()).item())
        squares = (r - values[-1] * t).square().sum().item() / t.sum().item() ** 2
        variance += squares * len(rows) / max(1, len(rows) - 1) / len(names) ** 2
    p, z = sum(values) / len(values), 1.959964
    n = p * (1 - p) / variance if variance > 0 else len(right)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, middle - half), min(1.0, middle + half)

def kendall_tau(labels, scores):
    """Kendall's tau-b of one row; None where all labels or all scores are equal."""
    n = range(len(labels))
    signs = lambda v: [(v[a] > v[b]) - (v[a] < v[b]) for a in n for b in n if a < b]
    x, y = signs(labels), signs(scores)
    norm = math.sqrt(sum(map(abs, x)) * sum(map(abs, y)))
    return sum(a * b for a, b in zip(x, y)) / norm if norm else None

def measure(data, scores, base=None):
    """All numbers of one model, one kind of score, one set.

    base: the scores of --ref, for the flips. Returns {column: dict(accuracy, low, high, ties,
    comparisons, rows[, tau, won, lost])}; the one column of pairs and lists is "", those of
    RM-Bench are Easy, Normal, Hard, and it has `domains` (see rm_bench) and `Avg` as well.
    """
    labels, styles = data["scores"], data["style"]
    styled, out = any(styles), {}
    official = lambda name: next((d for d in OFFICIAL_DOMAINS if name.startswith(d)), name)
    domains = [official(d) if styled else "" for d in data["domain"]]
    for column in CELLS if styled else [""]:
        rows = [comparisons(*row, column) for row in zip(labels, styles, scores)]
        kept = [k for k, pairs in enumerate(rows) if pairs]  # equal labels: nothing to compare
        right = [sum(a > b for a, b in rows[k]) for k in kept]
        total = [len(rows[k]) for k in kept]
        p, low, high = estimate(right, total, [domains[k] for k in kept])
        ties = sum(a == b for k in kept for a, b in rows[k]) / sum(total)
        out[column] = dict(accuracy=p, low=low, high=high, ties=ties, comparisons=sum(total),
                           rows=len(kept))
        if base:
            old = [comparisons(*row, column) for row in zip(labels, styles, base)]
            flips = [(a > b, c > d) for k in kept for (a, b), (c, d) in zip(rows[k], old[k])]
            out[column]["won"] = flips.count((True, False)) / len(flips)
            out[column]["lost"] = flips.count((False, True)) / len(flips)
    if styled:
        out["domains"] = {}
        for name in dict.fromkeys(domains):
            rows = [r for r, d in zip(zip(labels, styles, scores), domains) if d == name]
            out["domains"][name] = rm_bench(rows)
        out["Avg"] = sum(d["Avg"] for d in out["domains"].values()) / len(out["domains"])
    elif max(map(len, labels)) > 2:
        taus = [kendall_tau(*row) for row in zip(labels, scores)]
        taus = [tau for tau in taus if tau is not None]
        out[""]["tau"] = sum(taus) / max(1, len(taus))
    return out

def rm_bench(rows):
    """One domain: rows [(labels, styles, scores)] -> its 3x3 matrix, Easy, Normal, Hard, Avg."""
    out = dict(matrix=[[0.0] * 3 for _ in range(3)], rows=len(rows))
    for column, cells in CELLS.items():
        results = [comparisons(*row, column) for row in rows]
        for c, (i, j) in enumerate(cells):
            out["matrix"][i][j] = sum(r[c][0] > r[c][1] for r in results) / len(rows)
        out[column] = sum(out["matrix"][i][j] for i, j in cells) / 3
    return out | dict(Avg=(out["Easy"] + out["Normal"] + out["Hard"]) / 3)

def audit(path):
    """Who gets the gradient: mean shares over the first and the last third of training, from the
    metrics.jsonl of a model of align.py; None for others."""
    log = Path(path) / "metrics.jsonl"
    lines = [json.loads(line) for line in open(log)] if log.exists() else [{}]
    keys = [f"{a}_{b}" for a in ("pairs", "grad") for b in ("misranked", "barely", "well")]
    if keys[0] not in lines[0]:
        return None
    third = -(-len(lines) // 3)
    return [{k: sum(line[k] for line in part) / len(part) for k in keys}
            for part in (lines[:third], lines[-third:])]

# ---------------------------------------------------------------------------------------- tables
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, by n - 1

def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

def main_tables(results):
    """The main table, a row for each model and kind of score, a column for each set; and others."""
    columns = columns_of(results)
    show = lambda v: f"{100 * v['accuracy']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
    cells = lambda values: [show(values[name][c]) for name, c, _ in columns]
    lines = [[model, kind, *cells(kinds[kind])] for kind in results["kinds"]
             for model, kinds in results["models"].items() if kind in kinds]
    lines.append(["the longer one wins", "", *cells(results["longer_wins"])])
    text = table(["model", "score by", *(title for _, _, title in columns)], lines)
    return text + audit_table(results) + generation_table(results)

def audit_table(results):
    """Shares of pairs and of gradient on misranked / barely / well ranked pairs; "" without any."""
    show = lambda part, what: " / ".join(f"{100 * part[k]:.0f}" for k in part if what in k)
    lines = [[m, *(show(part, what) for part in parts for what in ("pairs", "grad"))]
             for m, parts in results["audit"].items() if parts]
    head = ["model", "pairs, first third", "gradient", "pairs, last third", "gradient"]
    text = ("\nWho gets the gradient: % of pairs and of |dL/dlogp| that are misranked (r <= 0) / "
            "barely right (r up to the batch mean) / well ranked.\n\n")
    return text + table(head, lines) if lines else ""

def generation_table(results):
    keys = list(dict.fromkeys(k for row in results["generation"].values() for k in row))
    lines = [[m, *(f"{row[k]:.3f}" if k in row else "" for k in keys)]
             for m, row in results["generation"].items()]
    return "\nSamples, see README.\n\n" + table(["model", *keys], lines) if lines else ""

def summary(files):
    """Markdown of several results.json, one for each seed: mean and deviation over seeds, then the
    paired differences from the reference, dpo and simpo with Student's 95 % interval."""
    runs = [json.loads(Path(f).read_text()) for f in files]
    columns, first = columns_of(runs[0]), runs[0]["models"]
    value = lambda run, m, kind, s, c: 100 * run["models"][m][kind][s][c]["accuracy"]
    text = f"{len(runs)} seeds: mean (standard deviation) of accuracy in %.\n\n"
    for base in [None, *(m for m in (runs[0]["ref"], "dpo", "simpo", "simpo@gamma=0") if m in first)]:
        lines = []
        for kind in runs[0]["kinds"]:
            for m in (m for m in first if kind in first[m] and m != base):
                cells = []
                for s, c, _ in columns:
                    if base and kind not in first[base]:
                        continue
                    x = torch.tensor([value(run, m, kind, s, c) for run in runs])
                    if base:
                        x -= torch.tensor([value(run, base, kind, s, c) for run in runs])
                    half = x.std().item() * (T975[min(len(x), 11) - 2] / math.sqrt(len(x)) if base else 1)
                    cells.append(f"{x.mean():+.1f} ± {half:.1f}" if base else
                                 f"{x.mean():.1f} ({half:.1f})")
                lines += [[m, kind, *cells]] if cells else []
        text += f"\nMinus {base}, paired by seed.\n\n" * bool(base)
        text += table(["model", "score by", *(title for _, _, title in columns)], lines)
    return text

def columns_of(results):
    """[(set, column of `measure`, title)]."""
    one = sum(results["sets"].values()) == 1
    return [(name, c, c or name if one else f"{name} {c}".strip())
            for name, styled in results["sets"].items() for c in (CELLS if styled else [""])]

def markdown(results):
    """results.md: accuracies by every kind of score, flips, Kendall's tau, RM-Bench by domain."""
    columns, models, longer = columns_of(results), results["models"], results["longer_wins"]
    text = "Ranking accuracy in % with its 95 % interval, by three scores of a response.\n\n"
    text += main_tables(results)
    flipped = [m for m, kinds in models.items() if "implicit" in kinds]  # all but the reference
    if flipped:
        text += (f"\nFlips since {results['ref']}, by average: + wrong to right, - right to wrong, "
                 "% of comparisons.\n\n")
        show = lambda v: f"+{100 * v['won']:.1f} -{100 * v['lost']:.1f}"
        text += table(["model", *(title for _, _, title in columns)], [
            [m, *(show(models[m]["average"][s][c]) for s, c, _ in columns)] for m in flipped])
    if lists := [s for s in results["sets"] if "tau" in longer[s].get("", {})]:
        text += "\nKendall's tau-b, by average (mean over prompts).\n\n"
        text += table(["model", *lists], [
            [m, *(f"{r['average'][s]['']['tau']:.3f}" for s in lists)] for m, r in models.items()])
    for name in (name for name, styled in results["sets"].items() if styled):
        domains = list(longer[name]["domains"])
        text += f"\n{name} by domain, by average: Easy / Normal / Hard / Avg, %.\n\n"
        show = lambda d: " / ".join(f"{100 * d[k]:.1f}" for k in (*CELLS, "Avg"))
        rows = [(m, r["average"][name]) for m, r in models.items()]
        text += table(["model", *domains, "mean of domains"], [
            [m, *(show(v["domains"][d]) for d in domains), f"{100 * v['Avg']:.1f}"]
            for m, v in [*rows, ("the longer one wins", longer[name])]])
        missing = [d for d in OFFICIAL_DOMAINS if d not in domains]
        if missing and len(missing) < len(OFFICIAL_DOMAINS):
            text += (f"\n{', '.join(missing)} absent: a mean over {len(domains)} domains, not "
                     "comparable to published RM-Bench numbers.\n")
    return text

# ------------------------------------------------------------------------------------------ main

def find_sets(root):
    """{name: rows} of a folder of prepared sets, or of one set; in the order of report.json."""
    folders = [root] if (root / "dataset_info.json").exists() else sorted(
        f.parent for f in root.glob("*/dataset_info.json"))
    if not folders:
        raise ValueError(f"{root}: no evaluation set; see prepare_data.py --eval NAME=SOURCE")
    report = root.parent / "report.json"
    order = list(json.loads(report.read_text())["sets"]) if report.exists() else []
    folders.sort(key=lambda f: f"eval/{f.name}" in order and order.index(f"eval/{f.name}"))
    sets = {f.name: load_rows(f) for f in folders}
    for name, data in sets.items():
        if all(len(set(labels)) < 2 for labels in data["scores"]):
            raise ValueError(f"{root}: in {name} no two responses of a row differ in score")
    return sets

def write_scores(folder, data, kinds, lengths):
    """The scores of one model: FOLDER/SET.json. kinds: {kind: {set: [[score, ...], ...]}}."""
    folder.mkdir(parents=True)
    for name, rows in data.items():
        out = []
        for k, (i, domain, styles) in enumerate(zip(rows["id"], rows["domain"], rows["style"])):
            scores = {kind: table[name][k] for kind, table in kinds.items()}
            out.append(dict(id=i, domain=domain, tokens=lengths[name][k], **scores))
            if styles:
                average = scores["average"]
                out[-1] |= dict(score_chosen=average[:3], score_rejected=average[3:])
        (folder / f"{name}.json").write_text(json.dumps(out))

def main(args):
    if args.summary:
        if len(args.summary) < 2:
            raise ValueError("--summary wants the results of at least two seeds")
        text = summary([Path(f) / "results.json" for f in args.summary])
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "summary.md").write_text(text)
        return print(f"{text}\n{args.out}/summary.md")
    if not (args.models and args.data):
        raise ValueError("wanted MODEL ... and --data, or --summary")
    device, sets = setup(), find_sets(Path(args.data))
    paths = list(dict.fromkeys([*([args.ref] if args.ref else []), *args.models]))
    for path in paths:
        check_vocabulary(args.data, path)  # a bad one fails here, before anything is scored
    short = [Path(p).name for p in paths]
    names = {p: n if short.count(n) == 1 else p.strip("/").replace("/", "_")
             for p, n in zip(paths, short)}
    make = begin(args.out, args, [args.data, *paths, *filter(None, [args.prompts])], redo=True)
    if make is None:
        results = json.loads((Path(args.out) / "results.json").read_text())
        return print0(f"{main_tables(results)}\n{args.out} is complete; more in {args.out}/results.md")
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
    lengths = {s: [[len(r) for r in rs] for rs in data["responses"]] for s, data in sets.items()}

    def each(f, a, b):
        return {s: [[f(*xy) for xy in zip(*rows)] for rows in zip(a[s], b[s])] for s in sets}

    average = {path: each(lambda s, n: s / n, sums[path], lengths) for path in paths}
    results = dict(
        args=vars(args), ref=names.get(args.ref), models={}, generation={},
        kinds=["average", "sum"] + ["implicit"] * bool(args.ref),
        sets={s: any(data["style"]) for s, data in sets.items()},
        longer_wins={s: measure(data, lengths[s]) for s, data in sets.items()},
        audit={names[path]: audit(path) for path in paths},
        versions=dict(torch=torch.__version__, transformers=transformers.__version__))
    out, ref_rewards = make(), None
    shutil.rmtree(out / "scores", ignore_errors=True)
    for path in paths:
        kinds, base = dict(average=average[path], sum=sums[path]), {}
        if args.ref and path != args.ref:
            kinds["implicit"] = each(lambda s, r: s - r, sums[path], sums[args.ref])
            base = dict(average=average[args.ref])
        results["models"][names[path]] = {
            kind: {s: measure(data, scores[s], base[kind][s] if kind in base else None)
                   for s, data in sets.items()} for kind, scores in kinds.items()}
        write_scores(out / "scores" / names[path], sets, kinds, lengths)
        if answers:
            (out / f"answers-{names[path]}.json").write_text(json.dumps(answers[path], indent=1))
        if samples:
            results["generation"][names[path]], rewards, lines = judge_samples(
                load_tokenizer(path), rows, samples[path], sums[path][path],
                sums[args.ref][path] if args.ref else None, ref_rewards)
            ref_rewards = rewards if path == args.ref else ref_rewards  # the reference is first
            (out / f"samples-{names[path]}.json").write_text(json.dumps(lines, indent=1))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(markdown(results))
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(out, args.out)
    print(f"\n{main_tables(results)}\nmore: {args.out}/results.md")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="Hugging Face folders or hub ids")
    add("--data", help="a folder of sets (DIR/eval of prepare_data.py), or one set")
    add("--ref", help="the SFT model: gives implicit rewards and flips; is scored as well")
    add("--out", required=True, help="folder to write; it appears when complete")
    add("--tokens-per-forward", type=int, default=16384, help="memory, not results (16384)")
    add("--generate", type=int, default=0, metavar="N", help="prompts of each set to respond to (0)")
    add("--prompts", help="JSON list of {instruction} to answer, as AlpacaEval has it")
    add("--temperature", type=float, default=1.0, help="of sampling; 0: greedy (default 1)")
    add("--max-new-tokens", type=int, default=512, help="of a sampled response (default 512)")
    add("--seed", type=int, default=0, help="of sampling")
    add("--summary", nargs="+", help="folders of results to summarise instead, one for each seed")
    run(main, parser)

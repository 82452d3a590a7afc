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
        --out runs/evaluation                                  # toy world, 2 cores: 1 minute

Writes OUT/results.json, OUT/results.md and OUT/scores/MODEL/SET.json: rows with `average`, `sum`,
`implicit` of each response, and for RM-Bench `score_chosen`, `score_rejected`, as its own
compute_accuracy reads them.
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

from prepare_data import begin, load_rows, run
from sft import load_config, load_model, plan, print0, score, setup

# ---------------------------------------------------------------------------------------- scores

def score_set(scorer, data, budget, device, desc):
    """Summed log-probs in nats of all responses, a list for each row; the same on every rank."""
    world, rank, scores = dist.get_world_size(), dist.get_rank(), []
    bar = tqdm.tqdm(total=len(data), desc=desc, unit="row", disable=rank > 0)
    with bar, torch.no_grad():
        for first in range(0, len(data), 256):
            batch = data[first : first + 256]
            rows = list(zip(batch["prompt"], batch["responses"]))
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

def domain_of(name):
    return next((d for d in OFFICIAL_DOMAINS if name.startswith(d)), name)

def measure(data, scores, base=None):
    """All numbers of one model, one kind of score, one set.

    base: the scores of --ref, for the flips. Returns {column: dict(accuracy, low, high, ties,
    comparisons, rows[, tau, won, lost])}; the one column of pairs and lists is "", those of
    RM-Bench are Easy, Normal, Hard, and it has `domains` (see rm_bench) and `Avg` as well.
    """
    labels, styles = data["scores"], data["style"]
    styled, out = any(styles), {}
    domains = [domain_of(d) if styled else "" for d in data["domain"]]
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

# ---------------------------------------------------------------------------------------- tables

def table(head, lines):
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

def accuracy_table(results):
    """The main table: a row for each model and kind of score, a column for each set."""
    columns = columns_of(results)
    show = lambda v: f"{100 * v['accuracy']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
    cells = lambda values: [show(values[name][c]) for name, c, _ in columns]
    lines = [[model, kind, *cells(kinds[kind])] for kind in results["kinds"]
             for model, kinds in results["models"].items() if kind in kinds]
    lines.append(["the longer one wins", "", *cells(results["longer_wins"])])
    return table(["model", "score by", *(title for _, _, title in columns)], lines)

def columns_of(results):
    """[(set, column of `measure`, title)]."""
    several = sum(results["sets"].values()) > 1
    return [(name, c, f"{name} {c}" if several and c else c or name)
            for name, styled in results["sets"].items() for c in (CELLS if styled else [""])]

def markdown(results):
    """results.md: accuracies by every kind of score, flips, Kendall's tau, RM-Bench by domain."""
    columns, models, longer = columns_of(results), results["models"], results["longer_wins"]
    text = "Ranking accuracy in % with its 95 % interval, by three scores of a response.\n\n"
    text += accuracy_table(results)
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
    order = {name.removeprefix("eval/"): k for k, name in enumerate(order)}
    folders.sort(key=lambda f: order.get(f.name, len(order)))
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
    device, sets = setup(), find_sets(Path(args.data))
    paths = list(dict.fromkeys([*([args.ref] if args.ref else []), *args.models]))
    for path in paths:
        load_config(path)  # a bad one fails here, before anything is scored
    short = [Path(p).name for p in paths]
    names = {p: n if short.count(n) == 1 else p.strip("/").replace("/", "_")
             for p, n in zip(paths, short)}
    make = begin(args.out, args, [args.data, *paths], redo=True)
    if make is None:
        print0(accuracy_table(json.loads((Path(args.out) / "results.json").read_text())))
        return print0(f"{args.out} is complete; more in {args.out}/results.md")
    sums = {}
    for path in paths:
        scorer = load_model(path, device)
        sums[path] = {name: score_set(scorer, data, args.tokens_per_forward, device,
                                      f"{names[path]}: {name}") for name, data in sets.items()}
        del scorer
    if dist.get_rank():
        return
    lengths = {s: [[len(r) for r in rs] for rs in data["responses"]] for s, data in sets.items()}

    def each(f, a, b):
        return {s: [[f(*xy) for xy in zip(*rows)] for rows in zip(a[s], b[s])] for s in sets}

    average = {path: each(lambda s, n: s / n, sums[path], lengths) for path in paths}
    results = dict(
        args=vars(args), ref=names.get(args.ref), models={},
        kinds=["average", "sum"] + ["implicit"] * bool(args.ref),
        sets={s: any(data["style"]) for s, data in sets.items()},
        longer_wins={s: measure(data, lengths[s]) for s, data in sets.items()},
        versions=dict(torch=torch.__version__, transformers=transformers.__version__))
    out = make()
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
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(markdown(results))
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(out, args.out)
    print(f"\n{accuracy_table(results)}\nmore: {args.out}/results.md")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Hugging Face folders or hub ids")
    add("--data", required=True, help="a folder of sets (DIR/eval of prepare_data.py), or one set")
    add("--ref", help="the reference policy, usually the SFT model: gives implicit rewards and "
        "flips, and is scored as well")
    add("--out", required=True, help="folder to write; it appears when complete")
    add("--tokens-per-forward", type=int, default=16384, help="padded tokens of one forward of a "
        "process (default 16384)")
    run(main, parser)

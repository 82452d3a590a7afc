"""Models -> numbers: ranking accuracy of every model on every evaluation set, with intervals.

Each response of each row is scored once, with a log-softmax in fp32: the sum of its token log-probs, S, and their number, n. Of two
responses the one with the higher score is ranked first, where the score is

    average    S / n                 length-normalised: the protocol of AMaPO and SimPO, and the default
    sum        S
    implicit   S - S_ref             DPO's implicit reward against --ref (summed, as in reward-bench)

Accuracy is the share of comparisons in which the better response scores strictly higher; a tie is wrong, and ties are counted.
A row of RM-Bench gives a 3x3 matrix: A[i][j] = chosen in style i beats rejected in style j; Easy is the mean of the lower triangle
(the chosen one has the richer style), Normal of the diagonal, Hard of the upper triangle; domains count equally.

    python evaluate.py runs/sft runs/dpo runs/amapo --ref runs/sft --data runs/data/eval --out runs/evaluation     # toy world: 1 min

Writes OUT/results.json, OUT/results.md, and every score: OUT/scores/MODEL/SET.json, a list of rows with `average` and `sum` for each
response (for RM-Bench also `score_chosen` and `score_rejected`, as its own compute_accuracy reads them).
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

from prepare_data import begin, run
from sft import load_model, load_rows, plan, print0, score, setup

# ------------------------------------------------------------------------------------------------------------------------ scores


def score_set(scorer, data, budget, device, desc):
    """Summed log-probs in nats of all responses of all rows: a list of lists, the same on every rank."""
    world, rank, scores = dist.get_world_size(), dist.get_rank(), []
    with tqdm.tqdm(total=len(data), desc=desc, unit="row", disable=rank > 0) as bar, torch.no_grad():
        for first in range(0, len(data), 256):
            batch = data[first : first + 256]
            rows = list(zip(batch["prompt"], batch["responses"]))
            place, full = [], []  # place[i]: positions of row i's responses in one long list
            for _, responses in rows:
                place.append(range(len(full), len(full) + len(responses)))
                full += [0.0] * len(responses)
            full = torch.tensor(full, dtype=torch.float64, device=device)
            for micro in plan(rows, world, budget)[rank]:
                full[[k for i in micro for k in place[i]]] = score(scorer, rows, micro, device).double()
            dist.all_reduce(full)
            full = full.tolist()
            scores += [[full[k] for k in ks] for ks in place]
            bar.update(len(rows))
    return scores


# ----------------------------------------------------------------------------------------------------------------------- metrics
OFFICIAL_DOMAINS = ("chat", "math", "code", "safety")  # RM-Bench; a row belongs to the one that its domain begins with
CELLS = dict(Easy=((1, 0), (2, 0), (2, 1)), Normal=((0, 0), (1, 1), (2, 2)), Hard=((0, 1), (0, 2), (1, 2)))  # (chosen, rejected) styles


def comparisons(labels, styles, scores, column=None):
    """One row's comparisons as [(score of the better, score of the worse)]: all pairs of unequal label, or one column of RM-Bench."""
    if styles:
        side = [{st: s for st, lab, s in zip(styles, labels, scores) if lab == want} for want in (max(labels), min(labels))]
        return [(side[0][i], side[1][j]) for i, j in CELLS[column]]
    n = range(len(labels))
    return [(scores[a], scores[b]) for a in n for b in n if labels[a] > labels[b]]


def estimate(right, total, stratum):
    """Accuracy and its 95 % interval. right, total: correct and all comparisons of each row; stratum: the row's domain.

    Ratio estimate in each stratum, plain mean over strata. Rows, not comparisons, are the independent units: the interval is
    Wilson's at the effective sample size p (1 - p) / var with the between-row variance. Returns (value, low, high).
    """
    parts = {}
    for r, t, s in zip(right, total, stratum):
        parts.setdefault(s, []).append((r, t))
    values, variance = [], 0.0
    for rows in parts.values():
        r, t = torch.tensor(rows, dtype=torch.float64).T
        values.append((r.sum() / t.sum()).item())
        residual = (r - values[-1] * t).square().sum() / t.sum() ** 2
        variance += residual.item() * len(rows) / max(1, len(rows) - 1) / len(parts) ** 2
    p, z = sum(values) / len(values), 1.959964
    n = p * (1 - p) / variance if variance > 0 else len(right)
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, max(0.0, middle - half), min(1.0, middle + half)


def kendall_tau(labels, scores):
    """Kendall's tau-b of one row; None where labels or scores are all equal."""
    n = range(len(labels))
    x, y = ([(v[a] > v[b]) - (v[a] < v[b]) for a in n for b in n if a < b] for v in (labels, scores))
    norm = math.sqrt(sum(map(abs, x)) * sum(map(abs, y)))
    return sum(a * b for a, b in zip(x, y)) / norm if norm else None


def domain_of(name):
    return next((d for d in OFFICIAL_DOMAINS if name.startswith(d)), name)


def measure(data, scores, base=None):
    """All numbers of one model, one kind of score, one set. base: the scores of --ref, for the flips.

    {column: dict(accuracy, low, high, ties, comparisons, rows[, tau, won, lost])}, and for RM-Bench `domains`: {domain:
    dict(matrix, Easy, Normal, Hard, Avg, rows)} and `Avg`. Columns are "" for pairs and lists, Easy / Normal / Hard for RM-Bench.
    """
    labels, styles = data["scores"], data["style"]
    styled = any(styles)
    domains = [domain_of(d) if styled else "" for d in data["domain"]]
    out = {}
    for column in CELLS if styled else [""]:
        rows = [comparisons(lab, st, s, column) for lab, st, s in zip(labels, styles, scores)]
        kept = [k for k, pairs in enumerate(rows) if pairs]  # a row of equal labels compares nothing
        right = [sum(a > b for a, b in rows[k]) for k in kept]
        total = [len(rows[k]) for k in kept]
        p, low, high = estimate(right, total, [domains[k] for k in kept])
        ties = sum(a == b for k in kept for a, b in rows[k]) / sum(total)
        out[column] = dict(accuracy=p, low=low, high=high, ties=ties, comparisons=sum(total), rows=len(kept))
        if base:
            old = [comparisons(lab, st, s, column) for lab, st, s in zip(labels, styles, base)]
            flips = [((a > b), (c > d)) for k in kept for (a, b), (c, d) in zip(rows[k], old[k])]
            out[column] |= dict(won=flips.count((True, False)) / len(flips), lost=flips.count((False, True)) / len(flips))
    if styled:
        out["domains"] = {d: rm_bench([k for k, x in enumerate(domains) if x == d], labels, styles, scores) for d in dict.fromkeys(domains)}
        out["Avg"] = sum(d["Avg"] for d in out["domains"].values()) / len(out["domains"])
    elif max(map(len, labels)) > 2:
        taus = [t for lab, s in zip(labels, scores) if (t := kendall_tau(lab, s)) is not None]
        out[""]["tau"] = sum(taus) / len(taus)
    return out


def rm_bench(rows, labels, styles, scores):
    """The 3x3 matrix of one domain and its means."""
    cells = {c: [comparisons(labels[k], styles[k], scores[k], c) for k in rows] for c in CELLS}
    matrix = [[0.0] * 3 for _ in range(3)]
    for column, places in CELLS.items():
        for c, (i, j) in enumerate(places):
            matrix[i][j] = sum(row[c][0] > row[c][1] for row in cells[column]) / len(rows)
    means = {c: sum(matrix[i][j] for i, j in places) / 3 for c, places in CELLS.items()}
    return dict(matrix=matrix, **means, Avg=sum(means.values()) / 3, rows=len(rows))


# ------------------------------------------------------------------------------------------------------------------------ tables


def markdown(results):
    """results.md: the table of accuracies by every kind of score, then flips, Kendall's tau, RM-Bench by domain."""
    sets = results["sets"]
    columns = [(name, c, c if c else name) for name, styled in sets.items() for c in (CELLS if styled else [""])]
    if sum(sets.values()) > 1:
        columns = [(name, c, f"{name} {c}".strip()) for name, c, _ in columns]
    models = {m: r for m, r in results["models"].items()}

    def table(head, lines):
        lines = [head, ["---"] * len(head), *lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def row(values, show):
        return [show(values[name][c]) if name in values else "" for name, c, _ in columns]

    percent = lambda v: f"{100 * v['accuracy']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
    lines = []
    for kind in results["kinds"]:
        lines += [[m, kind, *row(r[kind], percent)] for m, r in models.items() if kind in r]
    lines.append(["the longer one wins", "", *row(results["longer_wins"], percent)])
    text = "Ranking accuracy in % with its 95 % interval, by three scores of a response.\n\n"
    text += table(["model", "score by", *(title for _, _, title in columns)], lines)
    if flips := [[m, *row(r["average"], lambda v: f"+{100 * v['won']:.1f} -{100 * v['lost']:.1f}")]
                 for m, r in models.items() if any("won" in v[c] for v in r["average"].values() for c in v if c in ("", "Easy"))]:
        text += f"\nFlips since {results['ref']}, by average: + wrong to right, - right to wrong, % of comparisons.\n\n"
        text += table(["model", *(title for _, _, title in columns)], flips)
    if taus := [name for name, styled in sets.items() if not styled and "tau" in results["longer_wins"][name][""]]:
        text += "\nKendall's tau-b, by average (the mean over prompts).\n\n"
        text += table(["model", *taus], [[m, *(f"{r['average'][name]['']['tau']:.3f}" for name in taus)] for m, r in models.items()])
    for name in (name for name, styled in sets.items() if styled):
        text += f"\n{name} by domain, by average: Easy / Normal / Hard / Avg, %.\n\n"
        domains = list(results["longer_wins"][name]["domains"])
        show = lambda d: " / ".join(f"{100 * d[k]:.1f}" for k in (*CELLS, "Avg"))
        rows = [(m, r["average"][name]) for m, r in models.items()] + [("the longer one wins", results["longer_wins"][name])]
        text += table(["model", *domains, "mean of domains"],
                      [[m, *(show(v["domains"][d]) for d in domains), f"{100 * v['Avg']:.1f}"] for m, v in rows])
        if missing := [d for d in OFFICIAL_DOMAINS if d not in domains and set(domains) & set(OFFICIAL_DOMAINS)]:
            text += f"\n{', '.join(missing)} absent: the mean is over {len(domains)} domains, not comparable to published RM-Bench numbers.\n"
    return text


# -------------------------------------------------------------------------------------------------------------------------- main


def main(args):
    device, root = setup(), Path(args.data)
    folders = [root] if (root / "dataset_info.json").exists() else sorted(f.parent for f in root.glob("*/dataset_info.json"))
    if not folders:
        raise ValueError(f"{args.data}: no evaluation set; prepare_data.py --eval NAME=SOURCE writes them")
    order = json.loads((root.parent / "report.json").read_text())["sets"] if (root.parent / "report.json").exists() else {}
    folders.sort(key=lambda f: list(order).index(f"eval/{f.name}") if f"eval/{f.name}" in order else len(order))
    sets = {f.name: load_rows(f) for f in folders}
    paths = list(dict.fromkeys([*([args.ref] if args.ref else []), *args.models]))
    for path in paths:
        transformers.AutoConfig.from_pretrained(path)  # a bad path fails here
    names = {p: Path(p).name if [Path(q).name for q in paths].count(Path(p).name) == 1 else p.replace("/", "_") for p in paths}
    make = begin(args.out, args, [*map(str, folders), *paths], redo=True)
    if make is None:
        print0((Path(args.out) / "results.md").read_text())
        return print0(f"{args.out} is complete")
    sums = {}
    for path in paths:
        scorer = load_model(path, device)
        sums[path] = {name: score_set(scorer, data, args.tokens_per_forward, device, f"{names[path]}: {name}") for name, data in sets.items()}
        del scorer
    if dist.get_rank():
        return
    lengths = {name: [[len(r) for r in rs] for rs in data["responses"]] for name, data in sets.items()}
    combine = lambda f, *tables: {name: [[f(*x) for x in zip(*rows)] for rows in zip(*(t[name] for t in tables))] for name in sets}
    results = dict(args=vars(args), ref=names.get(args.ref), kinds=["average", "sum"] + ["implicit"] * bool(args.ref), models={},
                   sets={name: any(data["style"]) for name, data in sets.items()},
                   longer_wins={name: measure(data, lengths[name]) for name, data in sets.items()},
                   versions=dict(torch=torch.__version__, transformers=transformers.__version__, device=device.type))
    average = {p: combine(lambda s, n: s / n, sums[p], lengths) for p in paths}
    out = make()
    for path in paths:
        kinds = dict(average=average[path], sum=sums[path])
        if args.ref and path != args.ref:
            kinds["implicit"] = combine(lambda s, r: s - r, sums[path], sums[args.ref])
        flips = average[args.ref] if args.ref and path != args.ref else {}
        results["models"][names[path]] = {
            kind: {name: measure(data, t[name], flips.get(name) if kind == "average" else None) for name, data in sets.items()}
            for kind, t in kinds.items()}
        folder = out / "scores" / names[path]
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in sets.items():
            rows = [dict(id=i, domain=d, tokens=n, **{kind: t[name][k] for kind, t in kinds.items()})
                    for k, (i, d, n) in enumerate(zip(data["id"], data["domain"], lengths[name]))]
            for row, styles in zip(rows, data["style"]):
                if styles:
                    row |= dict(score_chosen=row["average"][:3], score_rejected=row["average"][3:])
            (folder / f"{name}.json").write_text(json.dumps(rows))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(markdown(results))
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(out, args.out)
    print(f"\n{(Path(args.out) / 'results.md').read_text()}\nwritten to {args.out}: results.md, results.json, scores/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face folders or hub ids")
    parser.add_argument("--data", required=True, help="a folder of evaluation sets (DIR/eval of prepare_data.py), or one set")
    parser.add_argument("--ref", help="the reference policy, usually the SFT model: gives implicit rewards and flips; scored as well")
    parser.add_argument("--out", required=True, help="folder to write; it appears when complete")
    parser.add_argument("--tokens-per-forward", type=int, default=16384, help="padded tokens of one forward per process")
    run(main, parser)

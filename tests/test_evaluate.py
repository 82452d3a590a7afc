"""evaluate.py: RM-Bench's averages as its own compute_accuracy takes them, Kendall's tau-b, intervals that cover, flips, ties;
and from a saved model to results.md, every score equal to a plain transformers forward of one response.

    python -m pytest tests/test_evaluate.py          # 20 s
"""

import itertools
import gc
import json
import math
import os
import random
import re
import shutil
from argparse import Namespace
from collections import Counter

import datasets
import pytest
import torch
import transformers
from conftest import plain_model, process_group, reference_logp, run_here
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate as E
from prepare_data import fingerprint

Z = 1.959963985  # the normal distribution's 97.5 % point


def wilson(p, n):
    """Wilson (1927), as on any statistics page."""
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


def table(scores, styles=None, domains=None):
    """The columns of a prepared set that metrics read."""
    n = len(scores)
    return dict(scores=scores, style=styles or [[]] * n, domain=domains or [""] * n, prompt=list(range(n)))


def estimate(right, total, stratum, weights):
    """E.estimate of prompts in any order; weights of any sum."""
    strata = {s: torch.tensor([(r, t) for r, t, x in zip(right, total, stratum) if x == s]).double() for s in weights}
    return E.estimate(strata, {s: w / sum(weights.values()) for s, w in weights.items()})


# --------------------------------------------------------------------------------------------------------------------- RM-Bench


def official(rows):
    """RM-Bench's compute_accuracy, from its description (arXiv 2410.16184 and README), of rows (domain, chosen[3], rejected[3]):
    {domain: (matrix, (easy, normal, hard))} and the means over domains."""
    def one(rows):
        a = [[sum(c[i] > r[j] for _, c, r in rows) / len(rows) for j in range(3)] for i in range(3)]
        easy, normal = (a[1][0] + a[2][0] + a[2][1]) / 3, (a[0][0] + a[1][1] + a[2][2]) / 3
        return a, (easy, normal, (a[0][1] + a[0][2] + a[1][2]) / 3)

    domains = {d: one(part) for d in ("chat", "math", "code", "safety") if (part := [r for r in rows if r[0].startswith(d)])}
    return domains, [sum(three[k] for _, three in domains.values()) / len(domains) for k in range(3)]


@pytest.mark.parametrize("names", ["chat math code safety-refuse safety-response", "chat_filtered safety-refuse_filtered"])
def test_rm_bench_is_the_official_average(names):
    rng, names = random.Random(len(names)), names.split()
    three = lambda: [rng.randrange(6) for _ in range(3)]  # of 0 to 5, so there are ties
    rows = [(rng.choice([*names, names[-1]]), three(), three()) for _ in range(300)]  # domains of unequal size
    columns = table([[1, 1, 1, 0, 0, 0]] * 300, [[0, 1, 2, 0, 1, 2]] * 300, [d for d, _, _ in rows])
    out = E.measure(columns, [c + r for _, c, r in rows])
    domains, overall = official(rows)
    assert [out[k]["accuracy"] for k in ("Easy", "Normal", "Hard")] == pytest.approx(overall)
    assert out["Avg"]["accuracy"] == pytest.approx(sum(overall) / 3)
    assert set(out["Avg"]["domains"]) == set(domains)  # safety-refuse and safety-response are pooled, row by row
    for name, (cells, three) in domains.items():
        assert [[out[f"{i}>{j}"]["domains"][name] for j in range(3)] for i in range(3)] == [pytest.approx(line) for line in cells]
        assert [out[k]["domains"][name] for k in ("Easy", "Normal", "Hard")] == pytest.approx(three)
        assert out["Avg"]["domains"][name] == pytest.approx(sum(three) / 3) == pytest.approx(sum(sum(cells, [])) / 9)
    assert E.sections(columns)[2] == [d for d in ("chat", "math", "code", "safety") if d not in domains]
    places = dict(Easy=[(1, 0), (2, 0), (2, 1)], Normal=[(0, 0), (1, 1), (2, 2)], Hard=[(0, 1), (0, 2), (1, 2)])
    for k, cells in places.items():
        shares = [[c[i] == r[j] for d, c, r in rows if d.startswith(name) for i, j in cells] for name in domains]
        assert out[k]["ties"] == pytest.approx(sum(sum(x) / len(x) for x in shares) / len(domains))
        assert (out[k]["comparisons"], out[k]["prompts"]) == (900, 300) and out[k]["low"] < out[k]["accuracy"] < out[k]["high"]
    shuffled = [3, 1, 5, 0, 2, 4]  # responses are told apart by label and style, not by place
    mixed = columns | {k: [[v[i] for i in shuffled] for v in columns[k]] for k in ("scores", "style")}
    assert E.measure(mixed, [[(c + r)[i] for i in shuffled] for _, c, r in rows]) == out


# ------------------------------------------------------------------------------------------------------- pairs, lists, flips, tau


def test_pairs_strictly_and_ties_are_wrong():
    out = E.measure(table([[1, 0], [0, 1], [2, 7], [1, 0], [1, 1]]), [[-1, -2], [-1, -2], [-3, -3], [-2, -1], [-1, -2]])[""]
    assert (out["accuracy"], out["ties"], out["comparisons"], out["prompts"]) == (1 / 4, 1 / 4, 4, 4) and "tau" not in out


def test_lists_compare_all_pairs_of_unequal_label():
    # labels 2 1 1 0, scores 4 3 9 3: of five pairs (not 1-1) 4>3, 4<9, 4>3, 3=3, 9>3: three right, one tie
    # labels 1 0 0, scores 7 6 8: 7>6, 7<8. Equal labels compare nothing
    out = E.measure(table([[2, 1, 1, 0], [1, 0, 0], [5, 5, 5]]), [[4, 3, 9, 3], [7, 6, 8], [1, 2, 3]])[""]
    assert (out["accuracy"], out["ties"], out["comparisons"], out["prompts"]) == (pytest.approx(4 / 7), pytest.approx(1 / 7), 7, 2)
    # the other reading: 4>3; 7>6, 7<8
    assert E.measure(table([[2, 1, 1, 0], [1, 0, 0], [5, 5, 5]]), [[4, 3, 9, 3], [7, 6, 8], [1, 2, 3]])["best>worst"]["accuracy"] == pytest.approx(2 / 3)
    # tau-b: concordant 3, discordant 1; pairs untied in labels 5, in scores 5: 2/5. Then 1 - 1 over sqrt(2 * 3). Last: none
    assert out["tau"] == pytest.approx((2 / 5 + 0) / 2)


def test_flips_by_arithmetic():
    base, new = [[1, 0], [1, 0], [0, 1], [0, 1], [1, 1]], [[1, 0], [0, 1], [1, 0], [1, 0], [2, 1]]
    out = E.measure(table([[1, 0]] * 5), new, base)[""]
    assert (out["won"], out["lost"], out["accuracy"]) == (3 / 5, 1 / 5, 4 / 5)  # a tie before, right now: won
    assert out["accuracy"] - E.measure(table([[1, 0]] * 5), base)[""]["accuracy"] == pytest.approx(out["won"] - out["lost"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=7))
def test_tau_b_is_kendalls(pairs):
    x, y = zip(*pairs)  # Kendall (1945): (P - Q) / sqrt((n0 - n1) (n0 - n2)), n1 and n2 from the sizes of the groups of ties
    both = list(itertools.combinations(pairs, 2))
    sign = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in both]
    ties = [sum(t * (t - 1) // 2 for t in Counter(v).values()) for v in (x, y)]
    norm = (len(both) - ties[0]) * (len(both) - ties[1])
    got = E.kendall_tau(x, y)
    concordant, discordant = sum(s > 0 for s in sign), sum(s < 0 for s in sign)
    assert got is None if norm == 0 else got == pytest.approx((concordant - discordant) / math.sqrt(norm))


def test_tau_b_published_examples():
    assert E.kendall_tau([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.4714045)  # the example of scipy's documentation
    assert E.kendall_tau([1, 2, 3], [-3, -2, -1]) == 1 and E.kendall_tau([1, 2, 3], [3, 2, 1]) == -1


def test_all_ties_are_a_number_not_a_crash():
    out = E.measure(table([[2, 1, 0], [1, 0, 1]]), [[0.0] * 3, [0.0] * 3])[""]  # implicit rewards of the reference's own copy
    assert (out["accuracy"], out["ties"], out["comparisons"]) == (0, 1, 5)


# -------------------------------------------------------------------------------------------------------------------- intervals


def test_one_comparison_a_row_gives_wilson():
    # variance of a mean of n zeros and ones with n - 1 below: p (1 - p) / (n - 1), so Wilson's interval at n - 1
    for right, n in ((30, 40), (1, 12), (129, 300)):
        p, low, high = estimate([1] * right + [0] * (n - right), [1] * n, [""] * n, {"": 1})
        assert p == right / n and (low, high) == pytest.approx(wilson(right / n, n - 1), abs=1e-6)
    for right in (0, 25):  # no variance to be seen: Wilson at n
        assert estimate([right // 25] * 25, [1] * 25, [""] * 25, {"": 1})[1:] == pytest.approx(wilson(right // 25, 25), abs=1e-6)


def test_strata_are_averaged_by_weight_and_their_variances_add():
    right, stratum = [1] * 90 + [0] * 10 + [1] * 4 + [0] * 16, ["chat"] * 100 + ["math"] * 20
    for weights, a, b in (({"chat": 1, "math": 1}, 0.5, 0.5), ({"chat": 50, "math": 150}, 0.25, 0.75)):
        p, low, high = estimate(right, [1] * 120, stratum, weights)
        variance = a**2 * 0.9 * 0.1 / 99 + b**2 * 0.2 * 0.8 / 19  # of a * p1 + b * p2
        mean = a * 0.9 + b * 0.2
        assert p == pytest.approx(mean) and (low, high) == pytest.approx(wilson(mean, mean * (1 - mean) / variance), abs=1e-6)


def test_rows_not_comparisons_are_the_units():
    rng = random.Random(0)
    rows = [6 * (rng.random() < 0.7) for _ in range(60)]  # all six comparisons of a row stand or fall together
    p, low, high = estimate(rows, [6] * 60, [""] * 60, {"": 1})
    alone = estimate([r // 6 for r in rows], [1] * 60, [""] * 60, {"": 1})
    assert (p, low, high) == pytest.approx(alone)
    spread = estimate([1] * sum(rows) + [0] * (360 - sum(rows)), [1] * 360, [""] * 360, {"": 1})
    assert spread[0] == pytest.approx(p) and high - low > 2 * (spread[2] - spread[1])  # sqrt(6) = 2.4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.sampled_from("abc")), min_size=1, max_size=20))
def test_intervals_lie_in_zero_one_around_the_value(rows):
    right, total, stratum = zip(*((min(r, t), t, s) for r, t, s in rows))
    p, low, high = estimate(right, total, stratum, dict.fromkeys(stratum, 1))
    assert 0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1 and low < high


def test_the_interval_covers_the_truth():
    rng, hits, runs = random.Random(1), 0, 400
    for _ in range(runs):  # 60 rows of 1 to 6 comparisons; a row's rate is uniform on [0.4, 1] or, in y, [0, 0.8]: mean 0.55
        stratum = [rng.choice("xy") for _ in range(60)]
        rate = [rng.uniform(0.4, 1) if s == "x" else rng.uniform(0, 0.8) for s in stratum]
        total = [rng.randrange(1, 7) for _ in rate]
        _, low, high = estimate([sum(rng.random() < q for _ in range(t)) for q, t in zip(rate, total)], total, stratum, dict(x=1, y=1))
        hits += low <= 0.55 <= high
    assert 0.92 < hits / runs < 0.98  # 0.95 +- 2.75 standard errors of 0.011


def test_the_paired_bootstrap_has_the_spread_of_the_differences():
    """300 prompts of +1, 0, -1: the standard error of their mean by arithmetic, within the noise of 1000 draws; 0 without changes."""
    prompts = lambda *counts: torch.tensor([[0, 1, 0, won, lost] for n, won, lost in counts for _ in range(n)]).double()
    low, high = E.bootstrap({"": prompts((90, 1, 0), (30, 0, 1), (180, 0, 0))}, {"": 1})
    error = math.sqrt((120 - 300 * 0.2**2) / 299 / 300)
    assert (low, high) == pytest.approx((0.2 - Z * error, 0.2 + Z * error), abs=0.2 * error)
    assert E.bootstrap({"": prompts((9, 0, 0))}, {"": 1}) == [0, 0]
    # two strata of 200; the draws of one do not go with those of the other: variances add
    low, high = E.bootstrap(dict(x=prompts((100, 1, 0), (100, 0, 0)), y=prompts((100, 1, 0), (100, 0, 1))), dict(x=0.25, y=0.75))
    error = math.sqrt((0.25**2 * 0.25 + 0.75**2 * 1) / 200)
    assert high - low == pytest.approx(2 * Z * error, rel=0.1) and low < 0.125 < high


def test_rows_of_one_prompt_are_one_unit():
    """40 prompts, each three times over, all three rows right or wrong together: the interval of 40, not of 120; so for the gain."""
    right = [k % 4 > 0 for k in range(40) for _ in range(3)]
    data = table([[1, 0]] * 120) | dict(prompt=[k // 3 for k in range(120)])
    scores, base = [[r, 0.5] for r in right], [[0, 1]] * 120
    out = E.measure(data, scores, base)[""]
    once = E.measure(table([[1, 0]] * 40), scores[::3], base[::3])[""]
    assert (out["prompts"], out["comparisons"]) == (40, 120)
    assert all(out[k] == pytest.approx(once[k]) for k in ("accuracy", "low", "high", "gain", "gain_low", "gain_high"))


# ---------------------------------------------------------------------------------------------------------------- suites of domains


def reward_bench(rows):
    """RewardBench's calculate_scores_per_section, from its description: {subset: accuracy} -> {section: mean weighted by the
    published numbers of examples, of the subsets that are there}. The published totals: 358, 456, 740 prompts; math-prm counts 984."""
    sections = dict(
        Chat=dict(alpacaeval_easy=100, alpacaeval_length=95, alpacaeval_hard=95, mt_bench_easy=28, mt_bench_med=40),
        Chat_Hard=dict(mt_bench_hard=37, llmbar_natural=100, llmbar_adver_neighbor=134, llmbar_adver_GPTInst=92, llmbar_adver_GPTOut=47,
                       llmbar_adver_manual=46),
        Safety=dict(refusals_dangerous=100, refusals_offensive=100, xstest_should_refuse=154, xstest_should_respond=250, donotanswer=136),
        Reasoning=dict(math_prm=984, **{f"hep_{x}": 164 for x in ("cpp", "go", "java", "js", "python", "rust")}))
    assert [sum(x.values()) for x in sections.values()] == [358, 456, 740, 984 * 2]
    return {k: sum(n * rows[d] for d, n in x.items() if d in rows) / sum(n for d, n in x.items() if d in rows)
            for k, x in sections.items() if rows.keys() & x.keys()}


@pytest.mark.parametrize("absent", ["", "math_prm mt_bench_med", "alpacaeval_easy alpacaeval_length alpacaeval_hard mt_bench_easy mt_bench_med"])
def test_reward_bench_sections(absent):
    rng, names = random.Random(7), [d.replace("-", "_") for section in E.SUITES["RewardBench"].values() for d in section]
    domains = [rng.choice([d for d in names if d not in absent.split()]) for _ in range(600)]
    right = [rng.random() < 0.4 + 0.5 * (hash(d) % 2) for d in domains]
    out = E.measure(table([[1, 0]] * 600, None, [d.replace("_", "-") for d in domains]), [[r, 0.5] for r in right])
    rates = {d: sum(r for r, x in zip(right, domains) if x == d) / domains.count(d) for d in domains}
    expected = reward_bench(rates)
    assert {k.replace(" ", "_"): v["accuracy"] for k, v in out.items() if k != "Avg"} == pytest.approx(expected)
    assert out["Avg"]["accuracy"] == pytest.approx(sum(expected.values()) / len(expected))  # the leaderboard's score
    assert sorted(E.sections(table([[1, 0]] * 600, None, [d.replace("_", "-") for d in domains]))[2]) == sorted(
        x.replace("_", "-") for x in absent.split())


def test_llmbar_has_natural_and_adversarial_apart():
    """Natural 1 of 2 right; adversarial subsets 1 of 1, 0 of 3, 1 of 2, 1 of 1, each counting the same: 2.5 / 4."""
    domains = ["natural"] * 2 + ["adver-neighbor"] + ["adver-GPTInst"] * 3 + ["adver-GPTOut"] * 2 + ["adver-manual"]
    right = [1, 0, 1, 0, 0, 0, 1, 0, 1]
    out = E.measure(table([[1, 0]] * 9, None, [f"llmbar-{d}" for d in domains]), [[r, 0.5] for r in right])
    assert {k: v["accuracy"] for k, v in out.items()} == dict(Natural=0.5, Adversarial=0.625)
    assert set(E.measure(table([[1, 0]] * 2, None, ["llmbar-natural", "mine"]), [[1, 0], [1, 0]])) == {""}  # no suite has `mine`


# -------------------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two random Llamas `a` and `b`, a copy of `a`, and a folder of a pair set, a list set and an RM-Bench set."""
    top, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    config = transformers.LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(top / name)
    (top / "a/chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(top / "a", top / "copy")
    ids = lambda low, high: [rng.randrange(60) for _ in range(rng.randint(low, high))]
    sets = dict(pairs=([1.0, 0.0], [], 9), lists=([2.0, 1.0, 1.0, 0.0], [], 6), bench=([1.0] * 3 + [0.0] * 3, [0, 1, 2] * 2, 7))
    for name, (scores, style, n) in sets.items():
        rows = [dict(id=f"{name}{k}", prompt=ids(1, 12), responses=[ids(1, 20) for _ in scores], scores=scores,
                     domain=["chat", "math"][k % 2], style=style, meta="{}") for k in range(n)]
        datasets.Dataset.from_list(rows).save_to_disk(str(top / "eval" / name))
    return top


@pytest.fixture(scope="module")
def results(world):
    run_here("evaluate.py", world / "b", "--ref", world / "a", "--data", world / "eval", "--out", world / "out")
    return json.loads((world / "out/results.json").read_text())


def rows_of(world, name, model, out="out"):
    scores = json.loads((world / out / "scores" / model / f"{name}.json").read_text())
    return datasets.load_from_disk(str(world / "eval" / name)), scores


def test_scores_are_those_of_transformers_alone(world, results):
    lms = {m: plain_model(world / m) for m in "ab"}
    for name in ("pairs", "lists", "bench"):
        for model in "ab":
            data, scores = rows_of(world, name, model)
            assert [r["id"] for r in scores] == data["id"]
            for row, got in zip(data, scores):
                with torch.no_grad():
                    own, ref = ([reference_logp(lms[m], row["prompt"], r).item() for r in row["responses"]] for m in (model, "a"))
                assert got["sum"] == pytest.approx(own, abs=1e-4) and got["tokens"] == list(map(len, row["responses"]))
                assert got["average"] == pytest.approx([s / len(r) for s, r in zip(own, row["responses"])], abs=1e-4)
                assert model == "a" or got["implicit"] == pytest.approx([s - r for s, r in zip(own, ref)], abs=2e-4)
                assert name != "bench" or got["score_chosen"] + got["score_rejected"] == got["average"]


def test_numbers_are_those_of_the_scores(world, results):
    for model in "ab":
        data, scores = rows_of(world, "bench", model)
        exported = [(r["domain"], r["score_chosen"], r["score_rejected"]) for r in scores]  # what the official code reads
        assert [results["models"][model]["average"]["bench"][k]["accuracy"] for k in ("Easy", "Normal", "Hard")] == \
            pytest.approx(official(exported)[1])
        for kind in ("average", "sum") + ("implicit",) * (model == "b"):
            _, scores = rows_of(world, "pairs", model)
            got = results["models"][model][kind]["pairs"][""]
            assert got["accuracy"] == pytest.approx(sum(r[kind][0] > r[kind][1] for r in scores) / 9) and got["comparisons"] == 9
            _, scores = rows_of(world, "lists", model)  # labels 2 1 1 0
            right = [r[kind][i] > r[kind][j] for r in scores for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))]
            assert results["models"][model][kind]["lists"][""]["accuracy"] == pytest.approx(sum(right) / 30)
    before, after = ([r["average"][0] > r["average"][1] for r in rows_of(world, "pairs", m)[1]] for m in "ab")
    got = results["models"]["b"]["average"]["pairs"][""]
    assert got["won"] == pytest.approx(sum(y > x for x, y in zip(before, after)) / 9)
    assert got["lost"] == pytest.approx(sum(y < x for x, y in zip(before, after)) / 9)
    longer = [len(r["responses"][0]) > len(r["responses"][1]) for r in rows_of(world, "pairs", "a")[0]]
    assert results["longer_wins"]["pairs"][""]["accuracy"] == pytest.approx(sum(longer) / 9)


def test_a_copy_of_the_reference_ties_everywhere(world):
    run_here("evaluate.py", world / "copy", "--ref", world / "a", "--data", world / "eval", "--out", world / "same")
    results = json.loads((world / "same/results.json").read_text())["models"]["copy"]
    for name, columns in dict(pairs=[""], lists=[""], bench=["Easy", "Normal", "Hard"]).items():
        for column in columns:
            implicit, average = results["implicit"][name][column], results["average"][name][column]
            assert (implicit["accuracy"], implicit["ties"], average["won"], average["lost"]) == (0, 1, 0, 0)


def test_one_model_at_a_time_is_in_memory(world, tmp_path, monkeypatch):
    """A sharded module is part of reference cycles: without a collection it would stay until the next one by chance."""
    import sft

    alive, load = [], sft.load_model

    def count(*args, **kwargs):
        alive.append(sum(isinstance(x, sft.Scorer) for x in gc.get_objects()))
        return load(*args, **kwargs)

    monkeypatch.setattr(sft, "load_model", count)
    gc.collect()
    gc.disable()
    try:
        run_here("evaluate.py", world / "b", world / "copy", "--ref", world / "a", "--data", world / "eval", "--out", tmp_path / "o")
    finally:
        gc.enable()
    assert alive == [alive[0]] * 3


def test_the_table_has_a_row_for_every_model_and_kind(world, results):
    legend, text = (world / "out/results.md").read_text().split("\n", 1)
    assert legend.startswith("value [95 % interval]")
    tables = {part.split("\n\n")[0]: [[c.strip() for c in line.strip("|").split("|")] for line in part.split("\n\n")[1].splitlines()]
              for part in text.strip().replace("|\n\n", "|\n\0").split("\n\0")}
    for kind, models in dict(average="ab", sum="ab", implicit="b").items():
        head, _, *lines = tables[f"Ranking accuracy by {kind}, %"]
        assert sorted(head[1:]) == ["Avg", "Easy", "Hard", "Normal", "lists", "pairs"] and all(all(line) for line in lines)
        assert [line[0] for line in lines] == [*models, "the longer one wins"]
    cell = dict(zip(*(tables["Ranking accuracy by sum, %"][k] for k in (0, 3))))
    got = results["models"]["b"]["sum"]["pairs"][""]
    assert cell["model"] == "b" and cell["pairs"] == f"{100 * got['accuracy']:.1f} [{100 * got['low']:.1f}, {100 * got['high']:.1f}]"
    head, _, line = tables["Minus a, by average, %"]
    got = results["models"]["b"]["average"]["bench"]["Hard"]
    assert dict(zip(head, line))["Hard"] == f"{100 * got['gain']:.1f} [{100 * got['gain_low']:.1f}, {100 * got['gain_high']:.1f}]"
    assert got["gain"] == pytest.approx(got["won"] - got["lost"])
    title = "bench by domain, by average, % (code, safety absent: not comparable to published numbers)"
    head, _, *lines = tables[title]
    assert dict(zip(head, lines[1]))["math Avg"] == f"{100 * results['models']['b']['average']['bench']['Avg']['domains']['math']:.1f}"
    finer = tables["Best against worst of a list; chosen of style i against rejected of style j, by average, %"]
    assert finer[0] == ["model", *[f"bench {i}>{j}" for i in range(3) for j in range(3)], "lists best>worst"]
    assert E.markdown(E.tables_of(results)) == text


def test_batching_changes_nothing(world, results):
    for budget in (1, 64):  # every row alone; a few rows together. The default takes all at once
        out = f"out{budget}"
        run_here("evaluate.py", world / "b", "--data", world / "eval", "--out", world / out, "--tokens-per-forward", budget)
        for name in ("pairs", "lists", "bench"):
            for one, two in zip(rows_of(world, name, "b", out)[1], rows_of(world, name, "b")[1], strict=True):
                assert one["sum"] == pytest.approx(two["sum"], rel=1e-5)


def test_sets_stand_in_the_order_of_the_report_whatever_was_copied_when(world, tmp_path):
    """Samples depend on it. What the report does not have comes last, by name."""
    shutil.copytree(world / "eval", tmp_path / "eval")
    for k, name in enumerate(("pairs", "bench", "lists")):
        os.utime(tmp_path / "eval" / name / "dataset_info.json", (k, k))
    assert list(E.find_sets(tmp_path / "eval")) == ["bench", "lists", "pairs"]
    (tmp_path / "report.json").write_text(json.dumps(dict(sets={"train": {}, "eval/pairs": {}, "eval/lists": {}})))
    assert list(E.find_sets(tmp_path / "eval")) == ["pairs", "lists", "bench"]


def test_one_set_and_a_second_call(world, capsys):
    outputs, stamps = [], []
    for _ in range(2):
        run_here("evaluate.py", world / "a", "--data", world / "eval/pairs", "--out", world / "single")
        outputs.append(capsys.readouterr().out)
        stamps.append((world / "single/results.json").stat().st_mtime_ns)
    table = (world / "single/results.md").read_text().split("\n\n")[2]
    assert "\n| a   " in table and all(table in text for text in outputs)
    assert "complete" in outputs[1] and stamps[0] == stamps[1]  # nothing was written again
    results = json.loads((world / "single/results.json").read_text())
    assert results["templates"] == {"a": fingerprint(world / "a/chat_template.jinja")} and results["versions"]["torch"] == torch.__version__
    assert list(results["longer_wins"]) == ["pairs"] and results["ref"] is None
    assert json.loads((world / "single/args.json").read_text())["content"]["models"] == [f"a {fingerprint(world / 'a')}"]


def test_two_models_of_one_name_are_told_by_their_paths(world, tmp_path, monkeypatch):
    shutil.copytree(world / "a", tmp_path / "x/m")
    shutil.copytree(world / "b", tmp_path / "y/m")
    monkeypatch.chdir(tmp_path)
    run_here("evaluate.py", "x/m", "y/m", world / "a", "--ref", world / "a", "--data", world / "eval/pairs", "--out", "o")
    scores = {name: [row["sum"] for row in json.loads((tmp_path / f"o/scores/{name}/pairs.json").read_text())] for name in ("x_m", "y_m", "a")}
    assert list(json.loads((tmp_path / "o/results.json").read_text())["models"]) == ["a", "x_m", "y_m"]
    assert scores["a"] == scores["x_m"] != scores["y_m"]


@pytest.mark.parametrize("model, data", [("none", "eval"), ("a", "none"), ("a", "a"), ("empty", "eval"), ("a", "tied")])
def test_bad_paths_are_one_line_and_leave_nothing(world, model, data):
    (world / "empty").mkdir(exist_ok=True)
    shutil.copy(world / "a/config.json", world / "empty")  # a model without weights
    if data == "tied":  # a set in which nothing is better than anything else, such as DIR/sft
        row = dict(id="0", prompt=[1], responses=[[2]], scores=[1.0], domain="", style=[], meta="{}")
        datasets.Dataset.from_list([row]).save_to_disk(str(world / "tied"))
    with pytest.raises(SystemExit) as error:
        run_here("evaluate.py", world / model, "--data", world / data, "--out", world / "bad")
    assert isinstance(error.value.code, str) and "\n" not in error.value.code and not list(world.glob("bad*"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"ref": null, "longer_wins": 3}'])
def test_results_that_are_none_are_named(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="results.json: not of this evaluate.py"):
        run_here("evaluate.py", "--summary", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("flag, value", [("--generate", -3), ("--max-new-tokens", 0), ("--temperature", -0.1), ("--temperature", "nan")])
def test_numbers_out_of_range_are_refused_before_a_model_is_loaded(flag, value, tmp_path):
    with pytest.raises(SystemExit, match=f"{flag}.*: out of range"):
        run_here("evaluate.py", "model", "--data", "data", "--out", tmp_path / "out", flag, value)


# ------------------------------------------------------------------------------------------------- samples, answers, seeds


def options(**kwargs):
    return Namespace(**dict(dict(temperature=0.0, seed=0, max_new_tokens=12), **kwargs))


def test_a_response_ends_where_the_model_does(models, tmp_path):
    """With room for 9 tokens, of which a prompt takes 4 or 3, a response has 5 or 6 at most; what it has is as without the limit."""
    prompts = [[1, 9, 8, 7], [1, 9, 8]] * 20
    shutil.copytree(models["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | dict(max_position_embeddings=9)))
    with process_group():
        long, short = (E.generate(str(path), prompts, options(), torch.device("cpu"), "") for path in (models["llama"], tmp_path / "m"))
    assert max(len(ids) for ids, _ in long) > 6
    assert [(ids[: 9 - len(p)], end and len(ids) <= 9 - len(p)) for p, (ids, end) in zip(prompts, long)] == short
    with process_group(), pytest.raises(ValueError, match="answers: a prompt of 9 tokens or more"):
        E.generate(str(tmp_path / "m"), [[1, 9], [1] * 9], options(), torch.device("cpu"), "answers")


def test_greedy_responses_are_those_of_one_prompt_at_a_time(models):
    """Left padding changes nothing, a stop token ends a response and is kept; the argmax by a plain forward of each prefix."""
    rng = random.Random(5)
    prompts = [[1, *(rng.randrange(6, 300) for _ in range(rng.randint(1, 9)))] for _ in range(70)]  # two batches
    with process_group():
        found = E.generate(str(models["llama"]), prompts, options(), torch.device("cpu"), "")
    lm, ended = plain_model(models["llama"]), 0
    for prompt, (ids, end) in list(zip(prompts, found))[::6]:
        expected = []
        while len(expected) < 12 and 5 not in expected:  # 5: eos_token_id of the model
            with torch.no_grad():
                expected.append(lm(input_ids=torch.tensor([prompt + expected])).logits[0, -1].argmax().item())
        assert ids == expected and end == (expected[-1] == 5)
    assert all(5 not in ids[:-1] and len(ids) <= 12 and end == (ids[-1] == 5) for ids, end in found)


def test_samples_have_the_seed_and_the_distribution_of_the_model(models):
    """Of 512 first tokens after one prompt, the share of the likeliest one is its probability; another seed, other samples."""
    draw = lambda seed: E.generate(str(models["llama"]), [[1, 9, 8]] * 512, options(temperature=1.0, seed=seed, max_new_tokens=1),
                                          torch.device("cpu"), "")
    with process_group():
        first, again, other = draw(0), draw(0), draw(1)
    assert first == again != other
    with torch.no_grad():
        p = plain_model(models["llama"])(input_ids=torch.tensor([[1, 9, 8]])).logits[0, -1].softmax(-1)
    top = p.argmax().item()
    share = sum(ids == [top] for ids, _ in first + other) / 1024
    assert abs(share - p[top].item()) < 4 * math.sqrt(p[top] * (1 - p[top]) / 1024)


def test_numbers_of_samples_by_hand(tokenizer):
    tok = transformers.AutoTokenizer.from_pretrained(tokenizer)
    encode = lambda text: tok(text, add_special_tokens=False).input_ids
    meta = json.dumps(dict(task="reverse", answer=[2, 1]))
    rows = [dict(id="toy-ID-0", meta=meta), dict(id="toy-Prompt-OOD-7", meta=meta)]
    samples = [(encode("It is: 2 1"), True), (encode("It is: 2 3"), False)]  # true rewards 2 and 1/2
    out, rewards, lines = E.judge_samples(tok, rows, samples, [[-3.0], [-4.0]], [[-5.0], [-4.5]], [2.0, 1.0])
    assert rewards == [2.0, 0.5] and [line["text"] for line in lines] == ["It is: 2 1", "It is: 2 3"]
    assert out["kl"] == pytest.approx((2 + 0.5) / 2) and out["reward"] == 1.25 and out["win"] == 0.25 and out["ended"] == 0.5
    assert out["tokens"] == (len(samples[0][0]) + len(samples[1][0])) / 2
    own = dict(id="toy-1", meta=json.dumps(dict(task="reverse")))  # of somebody else: beside it there are no rewards
    out, rewards, _ = E.judge_samples(tok, [rows[0], own], samples, [[-3.0], [-4.0]], [[-5.0], [-4.5]], [])
    assert rewards == [] and "reward" not in out and "kl" in out
    assert E.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5) and E.repetition([1, 1, 1]) == 0


def test_instructions_are_answered_as_alpaca_eval_reads_them(models, data, tmp_path):
    (tmp_path / "set.json").write_text(json.dumps([dict(instruction="the cat", dataset="x"), dict(instruction="sat on")]))
    run_here("evaluate.py", models["llama"], "--ref", models["qwen2"], "--data", data / "eval", "--out", tmp_path / "o", "--prompts",
             tmp_path / "set.json", "--generate", 2, "--max-new-tokens", 5)
    name = models["llama"].name
    answers = json.loads((tmp_path / "o" / f"answers-{name}.json").read_text())
    assert [(a["instruction"], a["generator"], a.get("dataset")) for a in answers] == [("the cat", name, "x"), ("sat on", name, None)]
    assert all(isinstance(a["output"], str) for a in answers)
    numbers = json.loads((tmp_path / "o/results.json").read_text())["generation"]
    assert numbers[models["qwen2"].name]["kl"] == 0 and "reward" not in numbers[name]
    samples = json.loads((tmp_path / "o" / f"samples-{name}.json").read_text())
    assert len(samples) == 2 and numbers[name]["tokens"] <= 5


@pytest.mark.parametrize("content", ["{", "[3]", "[{}]", '[{"instruction": "the <bos> cat"}]', '[{"instruction": null}]', '[{"instruction": [{"role": "user", "content": "the cat"}]}]'])
def test_instructions_that_are_no_texts_are_refused_before_anything_is_scored(content, models, data, tmp_path, capsys):
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(SystemExit, match=r"set.json: wanted a JSON list of \{instruction\}"):
        run_here("evaluate.py", models["llama"], "--data", data / "eval", "--out", tmp_path / "o", "--prompts", tmp_path / "set.json")
    assert "row" not in capsys.readouterr().err


def result(folder, models, generation=()):
    """A results.json with one set, ID: {model: accuracy}."""
    cell = lambda p: {"": dict(accuracy=p, low=p - 0.1, high=p + 0.1)}
    results = dict(ref="sft", kinds=["average"], models={m: dict(average=dict(ID=cell(p))) for m, p in models.items()}, audit={},
                   longer_wins=dict(ID=cell(0.4)), absent=dict(ID=[]), generation=dict(generation))
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_summary_over_seeds_by_hand(tmp_path):
    """Two seeds, dpo 60 and 64, amapo 70 and 80: means 62 and 75, deviations 2.83 and 7.07; amapo - dpo = 10, 16: 13 +- 12.706 * 3."""
    for k, (a, b) in enumerate(((0.6, 0.7), (0.64, 0.8))):
        result(tmp_path / str(k), dict(sft=0.5, dpo=a, amapo=b), dict(amapo=dict(kl=k + 1.0)))
    run_here("evaluate.py", "--summary", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "o")
    lines = re.sub(" +", " ", (tmp_path / "o/results.md").read_text()).splitlines()
    assert "| dpo | 62.0 (2.8) |" in lines and "| amapo | 75.0 (7.1) |" in lines and "| amapo | 1.500 (0.707) |" in lines
    assert "| amapo | 13.0 [-25.1, 51.1] |" in lines and "| amapo | 25.0 [-38.5, 88.5] |" in lines
    assert "| sft | -12.0 [-37.4, 13.4] |" in lines


def test_a_summary_joins_models_and_tabulates_again(world, results, tmp_path):
    """Models of two results stand in one table; one result alone gives its own results.md back."""
    result(tmp_path / "0", dict(sft=0.5, dpo=0.6))
    result(tmp_path / "1", dict(simpo=0.7))
    run_here("evaluate.py", "--summary", tmp_path / "0", tmp_path / "1", "--out", tmp_path / "o")
    lines = re.sub(" +", " ", (tmp_path / "o/results.md").read_text()).splitlines()
    assert "| dpo | 60.0 [50.0, 70.0] |" in lines and "| simpo | 70.0 [60.0, 80.0] |" in lines
    run_here("evaluate.py", "--summary", world / "out", "--out", tmp_path / "again")
    assert (tmp_path / "again/results.md").read_text() == (world / "out/results.md").read_text()


def test_figures_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not a requirement")
    line = {f"{a}_{b}": 0.3 for a in ("pairs", "grad") for b in ("misranked", "barely", "well")}
    logs = dict(dpo=[line | dict(step=k, accuracy=0.5, margin=k, logp_chosen=-k, logp_rejected=-k) for k in range(9)])
    tables = {("last third", "dpo", k.replace("_", " ")): [30.0] for k in line}
    tables |= {("Samples", "dpo", "kl"): [1.0], ("Samples", "dpo", "reward"): [0.5]}
    E.write_tables(tmp_path, tables, logs)
    assert (tmp_path / "figures.png").read_bytes()[:4] == b"\x89PNG"


def test_audit_reads_the_first_and_the_last_third(tmp_path):
    line = lambda x: {f"{a}_{b}": x for a in ("pairs", "grad") for b in ("misranked", "barely", "well")}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(x)) + "\n" for x in (1, 2, 3, 4, 5, 6, 7)))
    first, last = E.audit(E.training_log(tmp_path))  # thirds of 7 steps have 3
    assert first["grad_well"] == 2 and last["pairs_misranked"] == 6 and E.audit(E.training_log(tmp_path / "none")) == []

"""The two trainers as programs, on a tiny Llama in fp32: what they compute does not depend on how it is computed.

Proves: weights and metrics are the same (1e-5) for 1 and 2 processes, micro-batches, replay and recomputation; gradients and first
losses are those of an independent plain transformers computation; kill -9 and resume is bit-equal to never having stopped; a
complete run is kept; bad input is one line; other architectures pass through all stages.

    python -m pytest tests/test_train.py -q -m "not soak"       # about 2 minutes on 2 cores; without -m also the random kills
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, command, kill_tree, needs_gpu, plain_model, reference_logp, run_here, run_jobs, run_stage
from safetensors.torch import load_file

TIMING = {"tokens_per_s", "pairs_per_s", "memory_gib"}
AUDIT = {f"{kind}_{group}" for kind in ("pairs", "grad") for group in ("misranked", "barely", "well")}
SIX = ["--batch-size", 9, "--max-steps", 6, "--lr", 1e-3]  # 19 pairs: batches of 9, 9 and 1, fewer than two processes, twice
SMALL = ["--tokens-per-forward", 150]  # of about 1500 tokens a batch


def metrics(out):
    """The lines of metrics.jsonl without what depends on the machine."""
    return [{k: v for k, v in json.loads(s).items() if k not in TIMING} for s in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same_run(a, b, start, tolerance=1e-5):
    """Equal to the tolerance: weights relative to their norm, metrics to themselves, differences of log-probs (in fp32) to those log-probs."""
    assert (rows := metrics(a)) and len(rows) == len(metrics(b))
    for x, y in zip(rows, metrics(b)):
        assert x.keys() == y.keys()
        floor = {k: tolerance * abs(x["logp_chosen"]) for k in x if re.match("dlogp|margin", k)}
        wrong = {k: (x[k], y[k]) for k in x if not math.isclose(x[k], y[k], rel_tol=tolerance, abs_tol=floor.get(k, 0))}
        assert not wrong
    x, y, z = weights(a), weights(b), weights(start)
    moved = math.sqrt(sum((x[k] - z[k]).double().square().sum() for k in x))
    apart = math.sqrt(sum((x[k] - y[k]).double().square().sum() for k in x))
    scale = math.sqrt(sum(x[k].double().square().sum() for k in x))
    assert moved > 0.01 * scale and apart <= tolerance * scale


def pairs_of(data, name="train"):
    """Every (prompt, better, worse, score gap) of a prepared set, drawn independently."""
    import datasets

    return [(row["prompt"], row["responses"][i], row["responses"][j], a - b) for row in datasets.load_from_disk(str(data / name))
            for i, a in enumerate(row["scores"]) for j, b in enumerate(row["scores"]) if a > b]


@pytest.fixture(scope="module")
def align(models, data):
    return lambda loss, out, *more: ["align.py", "--loss", loss, "--model", models["llama"], "--data", data / "train", "--out", out, *more]


@pytest.fixture(scope="module")
def sft(models, data):
    return lambda out, *more: ["sft.py", "--model", models["llama"], "--data", data / "sft", "--out", out, *more]


# --------------------------------------------------------------------------------------- the same result, however it is computed
VARIANTS = {  # name: (stage and loss, arguments, processes); all but the first of each stage must equal the first
    "amapo": ("amapo", [], 1), "amapo-small": ("amapo", SMALL, 1), "amapo-replay": ("amapo", ["--replay", *SMALL], 1),
    "amapo-recompute": ("amapo", ["--checkpoint-layers", 1, *SMALL], 1), "amapo-2": ("amapo", [], 2), "amapo-2-small": ("amapo", SMALL, 2),
    "amapo-2-replay": ("amapo", ["--replay", *SMALL], 2), "amapo-2-recompute": ("amapo", ["--checkpoint-layers", 9], 2),
    "sft": ("sft", [], 1), "sft-small": ("sft", SMALL, 1), "sft-recompute": ("sft", ["--checkpoint-layers", 9], 1), "sft-2": ("sft", [], 2),
    "sft-2-small": ("sft", SMALL, 2), "dpo": ("dpo", [], 1), "dpo-2-small": ("dpo", SMALL, 2), "simpo": ("simpo", [], 1),
    "simpo-replay": ("simpo", ["--replay"], 1), "simpo-2-small": ("simpo", SMALL, 2), "amapo-4": ("amapo", SMALL, 4),
    "amapo-4-hsdp": ("amapo", ["--replicas", 2, "--save-every", 2, *SMALL], 4), "sft-4-hsdp": ("sft", ["--replicas", 2, "--tokens-per-forward", 1], 4),
    "simpo-4-copies": ("simpo", ["--replicas", 4, *SMALL], 4), "simpo-single": ("simpo", ["--tokens-per-forward", 1], 1), "simpo-recompute": ("simpo", ["--checkpoint-layers", 9], 1),
    "simpo-2-replay": ("simpo", ["--replay", *SMALL], 2), "simpo-4": ("simpo", SMALL, 4), "dpo-single": ("dpo", ["--tokens-per-forward", 1], 1),
    "dpo-replay": ("dpo", ["--replay"], 1), "dpo-recompute": ("dpo", ["--checkpoint-layers", 1, *SMALL], 1),
    "dpo-2-replay": ("dpo", ["--replay", *SMALL], 2), "dpo-4": ("dpo", [], 4)}
COMPILED = {"amapo-2-compiled": ("amapo", ["--compile", "--checkpoint-layers", 1, *SMALL], 2), "dpo-2-compiled": ("dpo", ["--compile"], 2)}
VARIANTS |= COMPILED if shutil.which("g++") else {}
LONG = ["--batch-size", 9, "--max-steps", 24, "--lr", 1e-3, "--save-every", 2]


def start_and_kill(job, out, lines, n=1):
    """Start a stage as n processes and kill -9 all of them once metrics.jsonl has so many lines."""
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(command(*job, n=n), stdout=log, stderr=log)
    path, deadline = out.parent / f"{out.name}.partial" / "metrics.jsonl", time.time() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.time() < deadline, open(f"{out}.log").read()
        time.sleep(0.002)
    kill_tree(process.pid)
    assert process.wait() != 0 and not out.exists()


@pytest.fixture(scope="module")
def runs(align, sft, tmp_path_factory):
    """{variant: its output folder}, and the two-process runs `whole` and `killed`; as few launches as possible."""
    folder = tmp_path_factory.mktemp("runs")
    job = lambda what, out, more: sft(out, *SIX, *more) if what == "sft" else align(what, out, *SIX, *more)
    for name, (what, more, n) in VARIANTS.items():
        if n == 1:
            run_here(*job(what, folder / name, more))
    killed = align("amapo", folder / "killed", *LONG)
    start_and_kill(killed, folder / "killed", 5, n=2)
    jobs = [job(what, folder / name, more) for name, (what, more, n) in VARIANTS.items() if n == 2]
    code, out, err = run_jobs(folder, [*jobs, align("amapo", folder / "whole", *LONG), killed], n=2)
    assert code == 0, err
    (folder / "stdout").write_text(out)
    jobs = [job(what, folder / name, more) for name, (what, more, n) in VARIANTS.items() if n == 4]
    code, out, err = run_jobs(folder, jobs, n=4)
    assert code == 0, err
    return {f.name: f for f in folder.iterdir()}


@pytest.mark.parametrize("name", [name for name in VARIANTS | COMPILED if "-" in name])
def test_result_does_not_depend_on_how_it_is_computed(name, runs, models):
    if name not in VARIANTS:
        pytest.skip("torch.compile needs g++")
    first = runs[name.partition("-")[0]]
    assert len(metrics(first)) == 6 and (VARIANTS[name][0] == "sft" or AUDIT <= metrics(first)[0].keys())
    assert_same_run(first, runs[name], models["llama"], 1e-4 if name in COMPILED else 1e-5)  # a compiler sums in another order


@pytest.mark.parametrize("name, shards", [("amapo-4-hsdp", 2), ("sft-4-hsdp", 2), ("simpo-4-copies", 1), ("amapo-4", 4)])
def test_replicas_sum_gradients_once_a_step(name, shards, runs, models):
    """Of each FSDP module, a layer or all the rest, its shard, in the last of the micro-batches: a rank has three or more."""
    lm, sums = plain_model(models["llama"]), json.loads(Path(f"{runs[name]}.sums").read_text())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in lm.base_model.layers]
    rest = sum(p.numel() for p in lm.parameters()) - sum(layers)
    assert sorted(sums) == sorted(6 * [n / shards for n in [*layers, rest]] if shards < 4 else [])


# ------------------------------------------------------------------------------------------- against plain transformers


def capture_gradients(monkeypatch, lm):
    """The gradients that reach the optimizer's first step, by the names of the plain model's parameters."""
    found, step = {}, torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        params = self.param_groups[0]["params"]
        assert [p.shape for p in params] == [p.shape for p in lm.parameters()]
        found.update({n: found.get(n, p.grad.full_tensor().clone()) for (n, _), p in zip(lm.named_parameters(), params)})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return found


@pytest.mark.parametrize("loss", ["amapo", "simpo", "dpo", "sft"])
def test_first_gradient_is_that_of_the_formula_on_plain_transformers(loss, align, sft, data, models, tmp_path, monkeypatch):
    import datasets

    lm = plain_model(models["llama"])
    found = capture_gradients(monkeypatch, lm)
    more = [*SMALL, "--batch-size", 26, "--max-steps", 1, "--clip", 1e9]  # more than all pairs, and all demonstrations
    run_here(*(sft(tmp_path / "o", *more) if loss == "sft" else align(loss, tmp_path / "o", *more)))
    score = lambda prompt, response: reference_logp(lm, prompt, response)
    if loss == "sft":
        rows = datasets.load_from_disk(str(data / "sft"))
        value = -sum(score(r["prompt"], r["responses"][0]) for r in rows) / sum(len(r["responses"][0]) for r in rows)
    else:
        pairs = pairs_of(data)
        assert len(pairs) == 19
        w, l = (torch.stack([score(p[0], p[k]) for p in pairs]) for k in (1, 2))
        nw, nl = (torch.tensor([len(p[k]) for p in pairs]) for k in (1, 2))
        r = w / nw - l / nl
        x = r.detach()
        margin = torch.where(x < x.mean(), 2.5 * torch.exp((x.mean() - x) / x.std() * x.mean()), 0.0)
        logit = dict(amapo=2.5 * r - margin, simpo=2.0 * r - 1.0, dpo=0.1 * ((w - w.detach()) - (l - l.detach())))[loss]
        value = torch.log1p(torch.exp(-logit)).mean()
    value.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in lm.parameters()))
    apart = math.sqrt(sum((found[n] - p.grad).double().square().sum() for n, p in lm.named_parameters()))
    assert norm > 0 and apart <= 1e-5 * norm
    line = metrics(tmp_path / "o")[0]
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5) and line["loss"] == pytest.approx(value.item(), rel=1e-5)
    if loss == "sft":
        return
    force = 1 - torch.sigmoid(logit.detach())  # |dL/dlogit|, so |dL/dw| + |dL/dl| is in proportion to it, and for r to 1/nw + 1/nl
    force = force * (2 if loss == "dpo" else 1 / nw + 1 / nl)
    for name, here in dict(misranked=x <= 0, barely=(x > 0) & (x <= x.mean()), well=(x > 0) & (x > x.mean())).items():
        assert line[f"pairs_{name}"] == pytest.approx(here.double().mean().item(), rel=1e-6)
        assert line[f"grad_{name}"] == pytest.approx((force[here].sum() / force.sum()).item(), rel=1e-5)
    expected = dict(accuracy=(x > 0).double().mean(), accuracy_sum=(w > l).double().mean(), margin=x.mean(), margin_sum=(w - l).mean(),
                    margin_std=x.std(correction=0), logp_chosen=(w / nw).mean(), logp_rejected=(l / nl).mean())
    assert {k: line[k] for k in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)


def test_first_dpo_loss_is_ln_2(runs):
    for name in ("dpo", "dpo-2-small"):
        losses = [line["loss"] for line in metrics(runs[name])]
        assert abs(losses[0] - math.log(2)) < 1e-6 < 1e-3 < abs(losses[1] - math.log(2))


def test_metrics_keep_the_digits_of_a_small_learning_rate(align, tmp_path):
    """One of 10 steps is warm-up, so the rate is 6e-7 in steps 1 and 2, then 3e-7 * (1 + cos(pi k / 9)), k = 1, 2, ..."""
    run_here(*align("simpo", tmp_path / "o", "--batch-size", 9, "--max-steps", 10, "--lr", 6e-7))
    expected = [6e-7] + [3e-7 * (1 + math.cos(math.pi * k / 9)) for k in range(9)]
    assert [line["lr"] for line in metrics(tmp_path / "o")] == pytest.approx(expected, rel=1e-5)
    for key in ("logp_chosen", "logp_rejected"):  # since the first step
        values = [line[key] for line in metrics(tmp_path / "o")]
        assert [line[f"d{key}"] for line in metrics(tmp_path / "o")] == pytest.approx([x - values[0] for x in values], abs=1e-12)
        assert len({*values}) > 5


def test_equal_pairs_are_barely_right_and_shares_of_no_gradient_are_zero():
    """r = -1 / 2 + 2 / 2 of both pairs is their mean, so 0 < r <= mean r."""
    import align as loop

    logps = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]]).double()
    out = loop.describe(torch.zeros(2).double(), logps, torch.zeros_like(logps), torch.full_like(logps, 2))
    assert (out["pairs_misranked"], out["pairs_barely"], out["pairs_well"]) == (0, 1, 0) and out["margin_std"] == 0
    assert [out[f"grad_{name}"] for name in ("misranked", "barely", "well")] == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ kill -9 and resume


def assert_resumed(killed, whole, steps):
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics(killed) == metrics(whole) and [line["step"] for line in metrics(killed)] == list(range(1, steps + 1))
    assert {f.name for f in killed.iterdir()} == {f.name for f in whole.iterdir()} and not (killed / "checkpoints").exists()


def test_killed_run_of_two_processes_resumes_bit_equal(runs):
    assert re.search(r"resumed from \S+step-\d*[02468]-\w+\n", runs["stdout"].read_text())
    assert_resumed(runs["killed"], runs["whole"], 24)


def test_killed_run_with_8_bit_moments_resumes_bit_equal(sft, tmp_path, capfd):
    job = lambda name: sft(tmp_path / name, *LONG, "--optimizer", "adamw8bit")
    start_and_kill(job("killed"), tmp_path / "killed", 5)
    run_here(*job("killed"))
    assert "resumed from" in capfd.readouterr().out
    run_here(*job("whole"))
    assert_resumed(tmp_path / "killed", tmp_path / "whole", 24)


@pytest.mark.soak
@pytest.mark.parametrize("optimizer, n", [("adamw", 1), ("adamw", 2), ("adamw8bit", 2)])
def test_killed_at_random_moments(optimizer, n, align, tmp_path):
    """A run of 40 steps with a checkpoint after each is killed seven times at any moment, also while it writes one or the final
    model; of two processes every other time one alone, and then the launch ends by itself."""
    rng = random.Random(optimizer + str(n))
    job = lambda name: align("dpo", tmp_path / name, "--batch-size", 9, "--max-steps", 40, "--lr", 1e-3, "--save-every", 1,
                             "--optimizer", optimizer)
    killed, path, done = tmp_path / "killed", tmp_path / "killed.partial/metrics.jsonl", 0
    children = lambda pid: [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] if process.poll() is None else []
    for turn in range(7):
        process, before = subprocess.Popen(command(*job("killed"), n=n), stdout=-3, stderr=-3), time.time()
        wanted = done + rng.randint(1, 8)
        while process.poll() is None and time.time() < before + 120:
            if path.exists() and path.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        if n == 1 or turn % 2:
            kill_tree(process.pid)
        elif workers := children(process.pid):
            os.kill(rng.choice(workers), signal.SIGKILL)
        process.wait(timeout=60)
        done = path.read_bytes().count(b"\n") if path.exists() else 40
    for name in ("killed", "whole"):
        code, _, err = run_stage(*job(name), n=n)
        assert code == 0, err
    assert_resumed(killed, tmp_path / "whole", 40)


def test_8_bit_moments_of_another_number_of_processes_are_refused(sft, tmp_path, capfd):
    job = sft(tmp_path / "o", *LONG, "--optimizer", "adamw8bit")
    start_and_kill(job, tmp_path / "o", 5, n=2)
    with pytest.raises(SystemExit, match="processes"):
        run_here(*job)


# ---------------------------------------------------------------------------------------------------- complete runs, bad input


def test_a_complete_run_is_kept(sft, tmp_path, capfd):
    run_here(*sft(tmp_path / "o", *SIX))
    files = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in tmp_path.rglob("*") if f.is_file()}
    capfd.readouterr()
    run_here(*sft(tmp_path / "o", *SIX))
    assert "complete" in capfd.readouterr().out
    with pytest.raises(SystemExit) as error:
        run_here(*sft(tmp_path / "o", *SIX, "--seed", 1))
    assert "seed" in error.value.code and "\n" not in error.value.code
    assert files == {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in tmp_path.rglob("*") if f.is_file()}


BAD = [("align", ["--model", "no/such/model"], "no/such/model"), ("align", ["--loss", "nonsense"], "nonsense"),
       ("align", ["--hp", "nonsense=1"], "nonsense"), ("align", ["--hp", "beta=x"], "beta=x"),
       ("align", ["--data", "no/such/data"], "no/such/data"), ("align", ["--min-gap", "100"], "scores"),
       ("align", ["--batch-size", "0"], "batch-size"), ("sft", ["--model", "no/such/model"], "no/such/model"),
       ("sft", ["--data", "no/such/data"], "no/such/data"), ("sft", ["--epochs", "-1"], "epochs")]


@pytest.mark.parametrize("stage, change, word", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(stage, change, word, align, sft, tmp_path):
    job = sft(tmp_path / "o") if stage == "sft" else align("amapo", tmp_path / "o")
    with pytest.raises(SystemExit) as error:
        run_here(*job, *change)
    message = error.value.code  # a string: Python prints it on stderr and exits with 1
    assert message.startswith(f"{stage}.py: ") and word in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_bad_input_of_a_real_process(align, tmp_path):
    code, out, err = run_stage(*align("amapo", tmp_path / "o"), "--data", tmp_path / "absent")
    assert code == 1 and err.count("\n") == 1 and err.startswith("align.py: ") and str(tmp_path / "absent") in err
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- what the arguments mean


@pytest.mark.parametrize("more, gaps", [  # 14 pairs of scores 1 and 0, and a list of scores 0.5, 2, 0.5, 1
    ([], 15 * [1.0] + 2 * [1.5] + 2 * [0.5]), (["--min-gap", 1], 15 * [1.0] + 2 * [1.5]),
    (["--pairs", "best-worst"], 14 * [1.0] + [1.5]), (["--pairs", "best-worst", "--min-gap", 1.2], [1.5])])
def test_pairs_gaps_and_hyper_parameters_reach_the_loss(more, gaps, align, tmp_path):
    """At step 0 policy and reference are one, so ODPO with alpha = 2 is -log s(-2 log(gap)) = log(1 + gap^2)."""
    run_here(*align("odpo", tmp_path / "o", "--hp", "alpha=2", "--batch-size", 26, "--max-steps", 1, *SMALL, *more))
    assert metrics(tmp_path / "o")[0]["loss"] == pytest.approx(sum(math.log(1 + g * g) for g in gaps) / len(gaps), rel=1e-9)


def test_an_epoch_is_every_row_once_in_the_order_of_the_seed(align, sft, data, tmp_path):
    import datasets

    more = lambda seed: ["--batch-size", 9, "--epochs", 1.5, "--lr", 1e-12, "--seed", seed]
    for seed in (0, 1):
        run_here(*sft(tmp_path / f"sft{seed}", *more(seed)))
        run_here(*align("simpo", tmp_path / f"simpo{seed}", *more(seed)))
    a, b, c, d = (metrics(tmp_path / f"{name}{seed}") for name in ("sft", "simpo") for seed in (0, 1))
    assert [len(x) for x in (a, b, c, d)] == [5] * 4  # 3 steps an epoch
    tokens = sum(len(row["responses"][0]) for row in datasets.load_from_disk(str(data / "sft")))
    assert [sum(line["response_tokens"] for line in x[:3]) for x in (a, b)] == [tokens] * 2
    for (x, y), weights in (((a, b), [[line["response_tokens"] for line in x] for x in (a, b)]), ((c, d), [[9, 9, 1]] * 2)):
        total = [sum(n * line["loss"] for n, line in zip(w, z[:3])) for z, w in zip((x, y), weights)]
        assert total[0] == pytest.approx(total[1], rel=1e-5) and abs(x[0]["loss"] - y[0]["loss"]) > 1e-4 * abs(x[0]["loss"])


def test_weight_decay_is_that_of_adamw(sft, models, tmp_path):
    """Decoupled: one step at a rate of 0.01 with a decay of 0.5 takes 0.005 of each weight, whatever the gradient."""
    for decay in (0, 0.5):
        run_here(*sft(tmp_path / f"o{decay}", "--batch-size", 9, "--max-steps", 1, "--lr", 0.01, "--weight-decay", decay))
    a, b, before = weights(tmp_path / "o0"), weights(tmp_path / "o0.5"), weights(models["llama"])
    for k, w in before.items():
        torch.testing.assert_close(a[k] - b[k], 0.005 * w, rtol=0, atol=1e-6)


def test_a_reference_is_of_the_very_micro_batches_and_data_of_the_run(align, models, data, tmp_path):
    """So that DPO's first loss is ln 2 to the last digit, and the losses of one start share their reference; a wrong one is noticed."""
    import datasets

    shutil.copytree(data, tmp_path / "d")
    rows = datasets.load_from_disk(str(data / "train"))
    rows.select(range(len(rows))[::-1]).save_to_disk(tmp_path / "d/reversed")
    job = lambda loss, name, *more: align(loss, tmp_path / name, "--data", tmp_path / "d/train", "--max-steps", 1, "--batch-size", 9, *more)
    shutil.rmtree(tmp_path / "d/reference", ignore_errors=True)
    changes = [[], ["--seed", 1], ["--batch-size", 7], ["--tokens-per-forward", 100], ["--pairs", "best-worst"],
               ["--data", tmp_path / "d/reversed"], ["--min-gap", 1]]
    for k, change in enumerate(changes):
        run_here(*job("dpo", str(k), *change))
        assert metrics(tmp_path / str(k))[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
        assert len(list((tmp_path / "d/reference").iterdir())) == k + 1
        if k == 0:
            run_here(*job("ipo", "ipo"))
            (file,) = (tmp_path / "d/reference").iterdir()  # shared
    torch.save(torch.load(file) + torch.tensor([[1.0], [0.0]]), file)
    with pytest.raises(SystemExit, match="first loss"):
        run_here(*job("dpo", "wrong"))


@pytest.mark.parametrize("more", [[], ["--replay"]])
def test_the_state_of_a_loss_is_carried_saved_and_resumed(more, align, tmp_path, monkeypatch):
    """A loss that counts its pairs: 9, 9 and 1 in an epoch. It fails once in step 4, and is resumed from the checkpoint of step 2."""
    import prepare_data

    failures, run = [1], prepare_data.run

    def count(pi, state):
        total = state.get("total", 0.0) + torch.tensor(float(len(pi.w)), dtype=torch.float64)
        if total == 28 and failures:
            raise ValueError(f"failure {failures.pop()}")
        return total + (pi.w.detach() - pi.w), dict(total=total)

    monkeypatch.setattr(prepare_data, "run", lambda main, *rest: main.__globals__["loss"](count, batch=True) and run(main, *rest))
    job = align("count", tmp_path / "o", "--batch-size", 9, "--epochs", 2, "--lr", 1e-3, "--save-every", 2, *SMALL, *more)
    with pytest.raises(SystemExit, match="failure 1"):
        run_here(*job)
    assert [line["loss"] for line in metrics(tmp_path / "o.partial")] == [9, 18, 19]
    (tmp_path / "o.partial/checkpoints/draft-3").mkdir()  # of a kill, with another --save-every
    run_here(*job)
    assert not (tmp_path / "o/checkpoints").exists()
    assert [line["loss"] for line in metrics(tmp_path / "o")] == [9, 18, 19, 28, 37, 38]


@pytest.mark.parametrize("loss, more, order", [("simpo", [], "(fb)+"), ("amapo", [], "f+b+"), ("amapo", ["--replay"], "f+(fb)+"),
                                               ("dpo", [], "f+(fb)+")])  # the reference has the same micro-batches
def test_graphs_are_kept_no_longer_than_the_loss_needs(loss, more, order, align, tmp_path, monkeypatch):
    """Forwards and backwards of a step: one micro-batch after the other for a loss of single pairs, all forwards first for one of the batch."""
    import sft as model_side

    calls, forward, backward = [], model_side.Scorer.forward, torch.autograd.backward
    monkeypatch.setattr(model_side.Scorer, "forward", lambda *args, **kwargs: calls.append("f") or forward(*args, **kwargs))
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **kwargs: calls.append("b") or backward(*args, **kwargs))
    run_here(*align(loss, tmp_path / "o", "--batch-size", 25, "--max-steps", 1, *SMALL, *more))
    assert calls.count("f") >= 4 and re.fullmatch(order, "".join(calls))
    assert calls.count("f") == calls.count("b") * (2 if order == "f+(fb)+" else 1)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("stage", ["sft", "simpo"])
def test_memory_arguments_are_obeyed(stage, layers, align, sft, tmp_path, monkeypatch):
    """Each of the micro-batches runs both layers once, and again those that --checkpoint-layers names."""
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

    calls = []
    for kind in (LlamaModel, LlamaMLP):
        monkeypatch.setattr(kind, "forward", lambda *args, kind=kind, whole=kind.forward, **kw: calls.append(kind) or whole(*args, **kw))
    more = ["--batch-size", 9, "--max-steps", 1, *SMALL, "--checkpoint-layers", layers]
    run_here(*(sft(tmp_path / "o", *more) if stage == "sft" else align(stage, tmp_path / "o", *more)))
    micros = calls.count(LlamaModel)
    assert micros >= 3 and calls.count(LlamaMLP) == micros * (2 + layers)


@pytest.mark.parametrize("stage", ["sft", "simpo"])
def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(stage, align, sft, tmp_path):
    more = ["--batch-size", 9, "--max-steps", 3, "--lr", 1e38]
    with pytest.raises(SystemExit, match=r"gradient norm nan in step 2: rows {'\d+': \[(nan|-)") as error:
        run_here(*(sft(tmp_path / "o", *more) if stage == "sft" else align(stage, tmp_path / "o", *more)))
    assert "\n" not in error.value.code and not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------------- bfloat16, other architectures


def test_bfloat16_folder_prints_the_share_of_changes_that_survive(align, models, tmp_path, capfd):
    """At a rate of 1e-5 some changes of weights of size 0.2 survive the 8 bits of bfloat16, most do not."""
    run_here(*align("amapo", tmp_path / "o", "--batch-size", 9, "--max-steps", 2, "--lr", 1e-5, "--save-dtype", "bfloat16"))
    run_here(*align("amapo", tmp_path / "full", "--batch-size", 9, "--max-steps", 2, "--lr", 1e-5))
    share = float(re.search(r"([\d.]+) ?%", capfd.readouterr().out).group(1))
    half, full, before = weights(tmp_path / "o"), weights(tmp_path / "full"), weights(models["llama"])
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, full[k].bfloat16()) for k, v in half.items())
    moved = sum((full[k] != before[k]).sum().item() for k in full)
    kept = sum((half[k] != before[k].bfloat16()).sum().item() for k in full)
    assert 0 < kept < moved and share == pytest.approx(100 * kept / moved, abs=0.051)


HALF = [("dpo", []), ("dpo", ["--replay", *SMALL]), ("amapo", []), ("amapo", SMALL), ("amapo", ["--replay", *SMALL]),
        ("amapo", ["--checkpoint-layers", 9]), ("sft", SMALL), ("simpo", ["--optimizer", "adamw8bit"])]


def assert_like_fp32(name, out, runs, models, tolerance):
    """The first step is near that of fp32 (dpo's loss is ln 2 all the same), weights move the same way, and few have as few digits as bf16."""
    one, other = metrics(out)[0], metrics(runs[name])[0]
    assert abs(one["loss"] - other["loss"]) < (tolerance if name == "dpo" else 0.03) and abs(one["grad_norm"] / other["grad_norm"] - 1) < 0.01
    start, full, half = (torch.cat([v.flatten() for v in weights(folder).values()]) for folder in (models["llama"], runs[name], out))
    assert torch.cosine_similarity(half - start, full - start, 0) > 0.98 and (half.bfloat16() == half).double().mean() < 0.01


@needs_gpu
@pytest.mark.parametrize("name, more", [*HALF, ("simpo", ["--compile"]), ("amapo", ["--compile", "--checkpoint-layers", 1, *SMALL])])
def test_on_a_gpu(name, more, align, sft, data, runs, models, tmp_path):
    """A trainer in a process that sees the GPU, beside the fp32 run of the CPU."""
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("reference"))  # which is one of a CPU
    job = sft(tmp_path / "o", *SIX, *more) if name == "sft" else align(name, tmp_path / "o", *SIX, *more)
    job = command(*job, "--data", tmp_path / "data" / ("sft" if name == "sft" else "train"))
    done = subprocess.run(job, env=os.environ | dict(CUDA_VISIBLE_DEVICES="0"), capture_output=True, text=True)
    assert done.returncode == 0 and "1 cuda process" in done.stdout, done.stderr[-3000:]
    assert_like_fp32(name, tmp_path / "o", runs, models, 1e-4)


@pytest.mark.parametrize("name, more", HALF)
def test_in_bfloat16_as_on_a_gpu(name, more, align, sft, data, runs, models, tmp_path, monkeypatch):
    """The mixed precision of a GPU, here on the CPU: layers compute in bf16, whose rounding is 2^-9; weights and what steps them are fp32."""
    import sft as stage
    policy, attention, seen = torch.distributed.fsdp.MixedPrecisionPolicy, torch.nn.functional.scaled_dot_product_attention, []
    for module in (torch.distributed.fsdp, stage):
        monkeypatch.setattr(module, "MixedPrecisionPolicy", lambda param, reduce: policy(torch.bfloat16, reduce))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(q.dtype) or attention(q, *a, **k))
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("reference"))  # which is one of fp32
    job = sft(tmp_path / "o", *SIX, *more) if name == "sft" else align(name, tmp_path / "o", *SIX, *more)
    run_here(*job, "--data", tmp_path / "data" / ("sft" if name == "sft" else "train"))
    assert {*seen} == {torch.bfloat16}
    assert_like_fp32(name, tmp_path / "o", runs, models, 1e-6)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mistral"])
def test_other_architectures_pass_through_all_stages(name, data, models, tmp_path):
    more = ["--batch-size", 9, "--max-steps", 2, "--lr", 1e-3]
    run_here("sft.py", "--model", models[name], "--data", data / "sft", "--out", tmp_path / "sft", *more)
    run_here("align.py", "--loss", "dpo", "--model", tmp_path / "sft", "--data", data / "train", "--out", tmp_path / "dpo", *more)
    run_here("evaluate.py", tmp_path / "dpo", "--ref", tmp_path / "sft", "--data", data / "eval", "--out", tmp_path / "result")
    lm = plain_model(tmp_path / "dpo")
    with torch.no_grad():
        right = [reference_logp(lm, p, w) / len(w) > reference_logp(lm, p, l) / len(l) for p, w, l, _ in pairs_of(data, "eval/ID")]
    result = json.loads((tmp_path / "result/results.json").read_text())["models"]["dpo"]["average"]["ID"][""]
    assert result["comparisons"] == len(right) == 11 and result["accuracy"] == pytest.approx(sum(right).item() / 11)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "dpo").chat_template


# --------------------------------------------------------------------- more responses to a prompt, SFT term, reward model and margins


def first_gradient(job, lm, monkeypatch):
    """Run one step of a job; the gradients by name."""
    found = capture_gradients(monkeypatch, lm)
    run_here(*job)
    return found


@pytest.mark.parametrize("loss, more", [("kto", []), ("ld_dpo", []), ("wpo", ["--hp", "beta=0.5"]), ("wpo", ["--replay"]),
                                        ("simpo", ["--sft-weight", 0.3])])
def test_first_gradient_of_a_loss_that_needs_more_than_two_log_probs(loss, more, align, data, models, tmp_path, monkeypatch):
    """kto's mismatched pairs, ld_dpo's heads and the SFT term, on plain transformers with the reference equal to the policy."""
    lm = plain_model(models["llama"])
    job = align(loss, tmp_path / "o", *SMALL, "--batch-size", 19, "--max-steps", 1, "--clip", 1e9, *more)
    found = first_gradient(job, lm, monkeypatch)
    score, still = lambda p, r: reference_logp(lm, p, r), lambda x: x - x.detach()
    values = []
    for p, w, l, _ in pairs_of(data):
        logp_w, logp_l = score(p, w), score(p, l)
        if loss == "kto":  # the policy is the reference: u = v = kl = 0
            values.append(0.5 * (torch.sigmoid(-0.1 * still(logp_w)) + torch.sigmoid(0.1 * still(logp_l))))
        elif loss == "ld_dpo":
            m = min(len(w), len(l))
            w, l = (still(0.5 * score(p, r[:m]) + 0.5 * s) for r, s in ((w, logp_w), (l, logp_l)))
            values.append(torch.log1p(torch.exp(-0.1 * (w - l))))
        elif loss == "wpo":
            weight = min(1.0, math.exp(relative_confidence(lm, p, w) + relative_confidence(lm, p, l)))
            beta = 0.01 if "--replay" in more else 0.5
            values.append(weight * torch.log1p(torch.exp(-beta * (still(logp_w) - still(logp_l)))))
        else:
            p_w, p_l = logp_w / len(w), logp_l / len(l)
            values.append(torch.log1p(torch.exp(1 - 2 * (p_w - p_l))) - 0.3 * p_w)
    value = torch.stack(values).mean()
    value.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in lm.parameters()))
    apart = math.sqrt(sum((found[n] - p.grad).double().square().sum() for n, p in lm.named_parameters()))
    assert norm > 0 and apart <= 1e-5 * norm
    assert metrics(tmp_path / "o")[0]["loss"] == pytest.approx(value.item(), rel=1e-5)


def relative_confidence(lm, prompt, response):
    """WPO: mean over tokens of log pi(y_t) - log sum_v pi(v)^2, by transformers on the one sequence."""
    with torch.no_grad():
        p = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
    return (p[range(len(response)), response].log() - p.square().sum(-1).log()).mean().item()


def test_kto_takes_the_log_ratio_of_the_next_rows_chosen_response(align, data, models, tmp_path):
    """The second step's loss from the saved first-step model: its z is the mean log-ratio of a prompt and the first chosen response that
    follows and is of another prompt. Five of the pairs are of one prompt, the last."""
    more = ["--batch-size", 19, "--lr", 3e-3, "--epochs", 2, "--hp", "beta=1.0"]
    run_here(*align("kto", tmp_path / "one", *more, "--max-steps", 1))
    run_here(*align("kto", tmp_path / "two", *more))  # 2 epochs of one step; one step of warm-up in both
    new, old = plain_model(tmp_path / "one"), plain_model(models["llama"])
    with torch.no_grad():
        ratio = lambda p, r: (reference_logp(new, p, r) - reference_logp(old, p, r)).item()
        pairs = stored_pairs(data)
        mates = [next(w for p, w, _ in pairs[i + 1 :] + pairs[:i] if p != prompt) for i, (prompt, _, _) in enumerate(pairs)]
        z = max(0.0, sum(ratio(p, mate) for (p, _, _), mate in zip(pairs, mates)) / len(pairs))
        s = lambda x: 1 / (1 + math.exp(-x))
        values = [0.5 * (s(z - ratio(p, w)) + s(ratio(p, l) - z)) for p, w, l in pairs]
    assert metrics(tmp_path / "two")[1]["loss"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def stored_pairs(data):
    """(prompt, better, worse) in the order that align.py counts pairs in: rows as stored, in a row the highest scores first."""
    import datasets

    out = []
    for row in datasets.load_from_disk(str(data / "train")):
        order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
        out += [(row["prompt"], row["responses"][i], row["responses"][j]) for a, i in enumerate(order) for j in order[a + 1 :]
                if row["scores"][i] > row["scores"][j]]
    return out


def test_reward_model_its_folder_its_margins_and_madpo(align, data, models, tmp_path):
    """transformers alone scores the saved folder as margins.json says; madpo's first loss is the mean of its weights times ln 2."""
    more = ["--batch-size", 9, "--lr", 3e-3]
    run_here(*align("reward", tmp_path / "rm", *more, "--epochs", 3))
    assert all(line["margin"] == line["margin_sum"] and line["accuracy"] == line["accuracy_sum"] for line in metrics(tmp_path / "rm"))
    lines = metrics(tmp_path / "rm")
    assert lines[-1]["accuracy_sum"] > 0.6 > 1e-3 and lines[-1]["loss"] < math.log(2)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert judge.config.num_labels == 1 and judge.config.pad_token_id == tok.pad_token_id not in (None, 4, 5)
    pairs, rewards = stored_pairs(data), []
    with torch.no_grad():
        for p, w, l in pairs:  # padded on the right to the same length, as users do
            size = len(p) + max(len(w), len(l))
            ids = torch.tensor([[*p, *r] + [tok.pad_token_id] * (size - len(p) - len(r)) for r in (w, l)])
            rewards.append(judge(input_ids=ids, attention_mask=(ids != tok.pad_token_id).long()).logits[:, 0].tolist())
    saved = json.loads((tmp_path / "rm/margins.json").read_text())
    assert saved["margins"] == pytest.approx([a - b for a, b in rewards], rel=1e-4, abs=1e-4)
    for job in (["sft.py", "--data", data / "sft"], ["align.py", "--loss", "dpo", "--data", data / "train"],
                ["evaluate.py", tmp_path / "rm", "--data", data / "eval"]):  # with tied embeddings it would pass for a language model
        model = [] if job[0] == "evaluate.py" else ["--model", tmp_path / "rm"]
        with pytest.raises(SystemExit, match="rm is a reward model"):
            run_here(*job, *model, "--out", tmp_path / "none")
    margins = tmp_path / "margins.json"  # of a size that matters: h from -3 to 3
    margins.write_text(json.dumps(saved | dict(margins=[-3 + k / 3 for k in range(19)])))
    run_here(*align("madpo", tmp_path / "madpo", "--batch-size", 19, "--max-steps", 1, "--margins", margins, "--hp", "tau=2"))
    s = lambda x: 1 / (1 + math.exp(-x))
    c = lambda a: 0.5 + 1.5 / (1 + 2 * math.exp(a - 2))
    weights = [s(c(abs(h)) * h) / s(h) if h > -2 else 1 for h in (-3 + k / 3 for k in range(19))]
    assert metrics(tmp_path / "madpo")[0]["loss"] == pytest.approx(sum(weights) / 19 * math.log(2), rel=1e-5)
    with pytest.raises(SystemExit, match="not of the 17 pairs"):
        run_here(*align("madpo", tmp_path / "other", "--margins", margins, "--min-gap", 0.7))


def test_a_reward_model_without_a_token_to_pad_with_is_refused_before_it_is_trained(align, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data/tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(bos_token=None, unk_token=None, pad_token="<end>")))
    with pytest.raises(SystemExit, match="no token to pad with"):
        run_here(*align("reward", tmp_path / "rm", "--data", tmp_path / "data/train"))


# ------------------------------------------------------------------------------------------ what a fork of the losses may run into


def test_an_edited_loss_is_not_taken_for_the_finished_run(align, tmp_path):
    """The same command after a change in the function's body names `code_of_the_loss`; the stage runs from a copy of the repository."""
    import shutil

    for name in ("prepare_data.py", "sft.py", "align.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    job = align("simpo", tmp_path / "o", "--batch-size", 9, "--max-steps", 1)
    run_here(tmp_path / "align.py", *job[1:])
    text = (tmp_path / "align.py").read_text()
    (tmp_path / "align.py").write_text(text.replace("(pi.w / pi.nw - pi.l / pi.nl) - gamma)", "(pi.w / pi.nw - pi.l / pi.nl) + gamma)"))
    with pytest.raises(SystemExit, match="code_of_the_loss: "):
        run_here(tmp_path / "align.py", *job[1:])


def test_what_costs_memory_alone_may_change_and_what_margins_say_may_not(tmp_path):
    """A run that stopped after step 2 goes on with --replay and --checkpoint-layers; another margins file of the same name is refused."""
    import prepare_data

    begin = prepare_data.begin
    args = dict(out=str(tmp_path / "o"), replay=False, checkpoint_layers=0, tokens_per_forward=8192, save_every=2, lr=1.0, margins="m.json")
    margins = tmp_path / "m.json"
    margins.write_text("[1]")
    (begin(args["out"], args, dict(margins=[str(margins)]))() / "checkpoints").mkdir()
    assert callable(begin(args["out"], args | dict(replay=True, checkpoint_layers=2, compile=True, tokens_per_forward=1, save_every=0), dict(margins=[str(margins)])))
    with pytest.raises(ValueError, match="lr: 1.0 -> 2.0"):
        begin(args["out"], args | dict(lr=2.0), dict(margins=[str(margins)]))
    margins.write_text("[2]")
    with pytest.raises(ValueError, match="margins: .'m.json "):
        begin(args["out"], args, dict(margins=[str(margins)]))


def test_the_margins_are_an_input_of_a_run(align, data, tmp_path):
    pairs = len(pairs_of(data))
    import prepare_data

    write = lambda x: (tmp_path / "m.json").write_text(json.dumps(dict(data=[prepare_data.fingerprint(data / "train"), pairs], margins=[x] * pairs)))
    job = align("madpo", tmp_path / "o", "--batch-size", 9, "--max-steps", 1, "--margins", tmp_path / "m.json")
    write(1.0)
    run_here(*job)
    run_here(*job)  # complete
    write(2.0)
    with pytest.raises(SystemExit, match="m.json"):
        run_here(*job)


def test_a_loss_may_want_heads_and_mismatched_pairs_at_once(data):
    """fetch: chosen, rejected, both cut to the shorter length, then the next pair's chosen; apply_loss hands each to its name."""
    import align as A
    from sft import load_rows

    rows = load_rows(data / "train")
    pairs = A.draw_pairs(rows["scores"], "all", 0.0)
    batch, _ = A.fetch(rows, pairs, [3, 18], ["pi", "ref", "pi_head", "ref_head", "kl"])
    stored = stored_pairs(data)
    for (prompt, responses), here, after in zip(batch, (3, 18), (4, 0)):
        p, w, l = stored[here]
        m = min(len(w), len(l))
        assert (prompt, responses) == (p, [w, l, w[:m], l[:m], stored[after][1]])
    leaf, ref = torch.arange(10.0, 15.0)[:, None], torch.arange(5.0)[:, None] / 10
    seen = {}
    function = lambda pi, ref, pi_head, ref_head, kl: seen.update(locals()) or pi.w
    function.wants = ["pi", "ref", "pi_head", "ref_head", "kl"]
    A.apply_loss(function, {}, 0.0, torch.ones(5, 1), ref, torch.ones(1), {}, leaf, [0])
    assert (seen["pi"].w, seen["pi"].l, seen["pi_head"].w, seen["pi_head"].l, seen["kl"]) == (10, 11, 12, 13, pytest.approx(14 - 0.4))
    assert (seen["ref"].l, seen["ref_head"].w) == (pytest.approx(0.1), pytest.approx(0.2))


def test_data_of_another_tokenizer_is_refused(sft, data, models, tmp_path):
    """Of the same size, with two words exchanged."""
    import shutil

    shutil.copytree(models["llama"], tmp_path / "m")
    text = json.loads((tmp_path / "m/tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = list(vocab)[20:22]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(text))
    for job in (sft(tmp_path / "o", "--model", tmp_path / "m"), ["evaluate.py", tmp_path / "m", "--data", data / "eval", "--out", tmp_path / "e"]):
        with pytest.raises(SystemExit, match="another tokenizer"):
            run_here(*job)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_a_summary_of_no_results_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="results.json"):
        run_here("evaluate.py", "--summary", tmp_path, "--out", tmp_path / "o")


def test_the_benchmark_still_runs():
    code, out, err = run_stage(ROOT / "tests/bench.py", "--plan", "tiny", "--side", "dpo-ours", "--side", "simpo-ours")
    assert code == 0 and out.count("gate: ") == 17, out + err
    for row in ("this repository, simpo", "amapo --replay", "32", "2", "320", "this repository, evaluate.py", "matmul", "bf16: row by row, and batched"):
        assert re.search(rf"^\| {row} \| [\d.]", out, re.M), f"{row} in {out}"

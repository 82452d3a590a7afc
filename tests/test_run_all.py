"""run_all.sh without its stages: PYTHON is a program that writes down its arguments, so the chain is checked in a second.

    python -m pytest tests/test_run_all.py
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = """#!/usr/bin/env bash
case "$*" in *EVERY) echo dpo simpo madpo mine; exit ;; *align.LOSSES*) echo "${@:3}"; exit ;; esac
echo "$*" >> "$LOG"
"""


@pytest.fixture
def run_all(tmp_path):
    """run_all(word, VARIABLE=value, ...): (exit code, commands of the stages, stderr)."""
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    shutil.copy(ROOT / "run_all.sh", tmp_path)  # works where it stands

    def run(*words, **variables):
        log = tmp_path / "log"
        log.write_text("")
        clean = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}
        done = subprocess.run(["bash", tmp_path / "run_all.sh", *words], capture_output=True, text=True,
                              env=clean | dict(PYTHON=str(tmp_path / "python"), LOG=str(log), OUT="o") | variables)
        lines = [line for line in log.read_text().splitlines() if not line.startswith("-c import torch")]
        return done.returncode, lines, done.stderr

    return run


def test_the_default_chain(run_all):
    code, lines, _ = run_all()
    assert code == 0 and [line.split()[0] for line in lines] == ["prepare_data.py", "sft.py", "align.py", "align.py", "align.py", "evaluate.py"]
    assert "--model toy --sft toy:sft --prefs toy:prefs" in lines[0] and "--out o/data" in lines[0]
    assert "--loss simpo --model o/sft --data o/data/train --out o/simpo --lr 3e-4 --batch-size 64 --hp beta=5.0 --hp gamma=1.0" in lines[3]
    assert lines[-1].startswith("evaluate.py o/sft o/dpo o/simpo o/amapo --ref o/sft --data o/data/eval --out o/evaluation")


def test_changed_hyper_parameters_seeds_and_the_summary(run_all):
    code, lines, _ = run_all(LOSSES="amapo@group=8,lr=1e-5 simpo@gamma=0", SEEDS="3 5")
    assert code == 0 and len(lines) == 2 * 5 + 1
    assert "--loss amapo --model o/seed-3/sft" in lines[2] and "--out o/seed-3/amapo@group=8,lr=1e-5" in lines[2]
    assert lines[2].endswith("--hp beta=10 --seed 3 --hp group=8 --lr 1e-5") and lines[3].endswith("--seed 3 --hp gamma=0")
    assert lines[5].endswith("--seed 5 --out o/seed-5/data")
    assert lines[-1] == "evaluate.py --summary o/seed-3/evaluation o/seed-5/evaluation --out o/summary-evaluation"


def test_an_experiment_has_its_losses_its_tables_and_three_seeds(run_all):
    code, lines, _ = run_all("frontier")
    assert code == 0 and len([line for line in lines if "--out o/seed-1/" in line and "align.py" in line]) == 8
    assert lines[-2].endswith("--data o/seed-2/data/eval --out o/seed-2/frontier --generate 100 --max-new-tokens 64")
    assert lines[-1] == "evaluate.py --summary o/seed-0/frontier o/seed-1/frontier o/seed-2/frontier --out o/summary-frontier"


def test_every_loss_madpo_with_its_reward_model(run_all):
    code, lines, _ = run_all("losses", SEEDS="0")
    losses = [line.split()[2] for line in lines if line.startswith("align.py")]
    assert code == 0 and losses == ["dpo", "simpo", "reward", "madpo", "mine"]
    assert lines[5].endswith("--margins o/seed-0/reward/margins.json")


def test_label_noise_and_mixes_make_worlds_of_their_own(run_all):
    code, lines, _ = run_all("noise", SEEDS="0")
    sources = [line.split("--prefs ")[1].split()[0] for line in lines if line.startswith("prepare_data.py")]
    assert code == 0 and sources == ["toy:prefs", *(f"toy:prefs+noise={x}" for x in (0.1, 0.2, 0.3)),
                                     *(f"toy:prefs+hard={x}" for x in (0.2, 0.5, 0.8))]


def test_real_settings_and_wrong_words(run_all):
    code, lines, _ = run_all(SETTING="llama3-instruct", LOSSES="amapo")
    assert code == 0 and not [line for line in lines if line.startswith("sft.py")]
    assert "--loss amapo --model meta-llama/Meta-Llama-3-8B-Instruct" in lines[1] and "--lr 1e-6 --hp beta=3.0" in lines[1]
    assert run_all("nonsense")[0] == 2 and run_all(SETTING="nonsense")[0] == 2 and run_all(SETTING="custom")[0] == 2
    code, lines, _ = run_all(MODEL="m", PREF_DATA="p.jsonl", EVAL_DATA="ID=e.jsonl", NPROC="2", TORCHRUN="--nnodes 2 --node-rank 0")
    assert code == 0 and lines[1].startswith("-m torch.distributed.run --nproc-per-node 2 --nnodes 2 --node-rank 0 align.py --loss dpo --model m")


def test_one_process_for_each_visible_gpu(run_all, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("for k in 0 1 2 3; do echo GPU $k: H; done; echo '  MIG 1g GPU-x'")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, n in (({}, 4), (dict(CUDA_VISIBLE_DEVICES="0,2"), 2), (dict(CUDA_VISIBLE_DEVICES="3"), 1)):
        assert run_all(**visible)[1][1].startswith(f"-m torch.distributed.run --nproc-per-node {n} --standalone sft.py")
    assert run_all(CUDA_VISIBLE_DEVICES="")[1][1].startswith("sft.py")


def test_what_would_fail_late_is_refused_early(run_all):
    for variables, word in ((dict(OUT="a b"), "spaces"), (dict(OUT="a%d"), "spaces"), (dict(TORCHRUN="--nnodes 2"), "--node-rank")):
        code, lines, err = run_all(**variables)
        assert code == 2 and word in err and not lines


def test_a_dry_run_ends_after_the_first_stage(run_all):
    code, lines, _ = run_all(PREPARE_ARGS="--max-length 9 --dry-run")
    assert code == 0 and len(lines) == 1 and lines[0].endswith("--out o/data --max-length 9 --dry-run")


def test_a_stage_stops_when_the_chain_is_killed_and_two_chains_do_not_share_an_out(tmp_path):
    """The stage writes down the SIGTERM that it gets when its shell dies, even by SIGKILL."""
    (tmp_path / "python").write_text(f"""#!/usr/bin/env bash
case "$*" in *import*) exit ;; esac
trap 'echo TERM > {tmp_path}/log; exit' TERM
echo started > {tmp_path}/log; for k in $(seq 200); do sleep 0.1; done""")
    (tmp_path / "python").chmod(0o755)
    how = dict(env=os.environ | dict(PYTHON=str(tmp_path / "python"), OUT=str(tmp_path / "o")), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for(word):
        until = time.time() + 15
        while not (tmp_path / "log").exists() or (tmp_path / "log").read_text() != word:
            assert time.time() < until
            time.sleep(0.05)

    chain = subprocess.Popen(["bash", ROOT / "run_all.sh"], **how)
    wait_for("started\n")
    again = subprocess.run(["bash", ROOT / "run_all.sh"], timeout=15, **how)
    assert again.returncode == 2 and b"in use by another run" in again.stderr
    chain.kill()
    wait_for("TERM\n")
    chain.communicate()


def test_a_misspelt_loss_is_refused_before_the_first_stage(tmp_path):
    done = subprocess.run(["bash", ROOT / "run_all.sh"], capture_output=True, text=True, env=os.environ | dict(
        PYTHON=sys.executable, OUT=str(tmp_path / "o"), LOSSES="dpo simppo"))
    assert done.returncode == 1 and "simppo: unknown" in done.stderr.splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("losses, word", [
    ("dpo@betta=1", "dpo has no betta"), ("ipo@beta=0", "division by zero"), ("dpo reward", "no policy"), ("madpo@min-gap=2", "ALIGN_ARGS"),
    ("dpo@lr=0", "out of range"), ("dpo@lr=abc", "dpo: error: argument --lr: invalid float"), ("dpo@pairs=best", "invalid choice"),
    ("dpo@batch-size=16.5", "invalid int"), ("dpo@batch_size=3", "batch-size"), ("amapo@beta=3,lr=1e-4 dpo", None)])
def test_wrong_losses_are_refused_with_the_reason(losses, word, monkeypatch, capsys):
    """The check that run_all.sh makes before its first stage, run here."""
    text = (ROOT / "run_all.sh").read_text()
    code = re.search(r"-c '(import argparse.*?)' \$LOSSES", text, re.S)[1]
    monkeypatch.setenv("FLAGS", re.search(r'^FLAGS="(.*?)"', text, re.M)[1])
    monkeypatch.setattr(sys, "argv", ["-c", *losses.split()])
    if word:
        with pytest.raises(SystemExit) as stop:
            exec(code, {})
        assert word in f"{stop.value} {capsys.readouterr().err}"  # argparse prints its own
    else:
        exec(code, {})
        assert capsys.readouterr().out == f"{losses}\n"


@pytest.mark.parametrize("variable, text, word", [
    ("ALIGN_ARGS", "--lr 1e-4 --batchsize 3", "unrecognized arguments: --batchsize 3"), ("SFT_ARGS", "--epochs two", "argument --epochs: invalid"),
    ("EVAL_ARGS", "--generate", "expected one argument"), ("SFT_ARGS", "--hp beta=1", "unrecognized arguments: --hp")])
def test_wrong_arguments_of_a_stage_are_refused_before_the_first(variable, text, word, tmp_path):
    done = subprocess.run(["bash", ROOT / "run_all.sh"], capture_output=True, text=True, env=os.environ | {
        "PYTHON": sys.executable, "OUT": str(tmp_path / "o"), variable: text})
    assert done.returncode == 2 and done.stderr.startswith(f"run_all.sh: {variable}: error: ") and word in done.stderr
    assert not list(tmp_path.iterdir())

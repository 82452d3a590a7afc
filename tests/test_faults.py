"""Faults from outside: signals, damaged checkpoints, models and data, a full disk, one failing rank, bad arguments.

Proves: SIGTERM and Ctrl-C leave a checkpoint and stopped.json, and the same command ends as if never stopped; a damaged newest checkpoint is
known and the one before it used; what is wrong is one line that names the file, nothing is left in the place of a finished output.

    python -m pytest tests/test_faults.py -q -m "not soak"       # about a minute on 2 cores
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, command, run_here, run_stage
from safetensors.torch import load_file, save_file
from test_train import metrics

from sft import load_rows

LONG = ["--batch-size", 9, "--max-steps", 100, "--lr", 1e-4]
SHORT = ["--batch-size", 9, "--max-steps", 6, "--lr", 1e-3, "--save-every", 2]


@pytest.fixture(scope="module")
def align(models, data):
    return lambda out, *more: ["align.py", "--loss", "amapo", "--model", models["llama"], "--data", data / "train", "--out", out, *more]


@pytest.fixture(scope="module")
def sft(models, data):
    return lambda out, *more: ["sft.py", "--model", models["llama"], "--data", data / "sft", "--out", out, *more]


@pytest.fixture(scope="module")
def whole(align, tmp_path_factory):
    """A run that nothing happened to, and one of LONG steps."""
    folder = tmp_path_factory.mktemp("whole")
    for name, more in (("short", SHORT), ("long", LONG)):
        run_here(*align(folder / name, *more))
    return folder


def refused(*job):
    """The one line of a run that fails."""
    with pytest.raises(SystemExit) as error:
        run_here(*job)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def equal(a, b):
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes() and metrics(a) == metrics(b)


# ----------------------------------------------------------------------------------------------------------------------- signals


def start_and_signal(job, out, number, n=1):
    """Start a stage, send a signal once it has made three steps; its exit code."""
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(command(*job, n=n), stdout=log, stderr=log, restore_signals=True)
    path, deadline = out.parent / f"{out.name}.partial/metrics.jsonl", time.time() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.time() < deadline, open(f"{out}.log").read()
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.mark.parametrize("name, n, code", [pytest.param("SIGTERM", 1, 143, marks=pytest.mark.soak), ("SIGINT", 1, 130), ("SIGTERM", 2, None)])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(name, n, code, align, models, whole, tmp_path, capfd):
    """With no --save-every. One process is resumed bit-equal; two by one process, which is exact to rounding: over 100
    steps it grows to 1e-5, while moments that are lost make 1e-3."""
    job = align(tmp_path / "o", *LONG)
    rc = start_and_signal(job, tmp_path / "o", getattr(signal, name), n)
    partial = tmp_path / "o.partial"
    why, lines = json.loads((partial / "stopped.json").read_text()), metrics(partial)
    assert rc == code or code is None and rc != 0
    assert why == dict(signal=name, step=len(lines)) and 3 <= len(lines) < 100 and not (tmp_path / "o").exists()
    assert [int(f.name.split("-")[1]) for f in (partial / "checkpoints").iterdir()] == [len(lines)]
    run_here(*job)
    assert f"step-{len(lines):07}-" in capfd.readouterr().out
    if n == 1:
        assert equal(tmp_path / "o", whole / "long")
    else:
        a, b = load_file(whole / "long/model.safetensors"), load_file(tmp_path / "o/model.safetensors")
        apart, scale = (sum(x.square().sum() for x in xs) ** 0.5 for xs in ((a[k] - b[k] for k in a), a.values()))
        assert len(metrics(tmp_path / "o")) == 100 and apart < 1e-4 * scale
    assert {f.name for f in (tmp_path / "o").iterdir()} == {f.name for f in (whole / "long").iterdir()}


def test_a_signal_in_the_last_step_stops_too(align, whole, tmp_path, monkeypatch):
    """Else a chain of stages would go on after Ctrl-C. The same command only has to save the model."""
    import sft as model_side

    update = model_side.update
    monkeypatch.setattr(model_side, "update", lambda *args, **kwargs: (update(*args, **kwargs)[0], signal.SIGINT * (args[5:6] == (6,))))
    with pytest.raises(SystemExit) as error:
        run_here(*align(tmp_path / "o", *SHORT))
    assert error.value.code == 130 and not (tmp_path / "o").exists()
    monkeypatch.undo()
    run_here(*align(tmp_path / "o", *SHORT))
    assert equal(tmp_path / "o", whole / "short")


def test_a_second_signal_exits_at_once(monkeypatch):
    import sft as model_side

    exits = []
    monkeypatch.setattr(model_side.os, "_exit", exits.append)
    monkeypatch.setattr(model_side, "SIGNALS", [])
    monkeypatch.delenv("RANK", raising=False)
    for number in (15, 2):
        model_side.heed(number, None)
    assert exits == [130]
    monkeypatch.setenv("RANK", "0")  # torchrun and the cluster may both send one
    model_side.heed(15, None)
    assert exits == [130]


# ------------------------------------------------------------------------------------------------------------ damaged checkpoints


def interrupted(job, monkeypatch):
    """Run a job of six steps up to its final save: checkpoints of steps 2 and 4 are left."""
    import sft as model_side

    with monkeypatch.context() as patch:
        patch.setattr(model_side.transformers.PreTrainedModel, "save_pretrained", stop)
        assert "stopped here" in refused(*job)


def stop(*args, **kwargs):
    raise OSError("stopped here")


def truncate(folder):
    file = max(folder.glob("*.distcp"), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])


def flip(folder):
    file = max(folder.glob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = dict(truncated=truncate, flipped=flip, state=lambda folder: (folder / "state.pt").write_bytes(b""),
               absent=lambda folder: (folder / ".metadata").unlink())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_known_and_the_one_before_it_used(damage, align, whole, tmp_path, monkeypatch, capfd):
    job = align(tmp_path / "o", *SHORT)
    interrupted(job, monkeypatch)
    two, four = sorted((tmp_path / "o.partial/checkpoints").iterdir())
    DAMAGES[damage](four)
    capfd.readouterr()
    run_here(*job)
    out = capfd.readouterr().out
    assert f"{four} is damaged" in out and f"resumed from {two}" in out
    assert equal(tmp_path / "o", whole / "short") and not (tmp_path / "o/checkpoints").exists()


def test_the_fingerprint_of_a_checkpoint_sees_every_byte(tmp_path):
    """Of files from 256 MiB, as those of models are, only the first and last MiB are read; of others, and of a checkpoint, all."""
    from prepare_data import fingerprint

    for size, middle in ((5 << 20, True), (256 << 20, False)):
        hashes = []
        for place in (None, 0, size // 2, size - 1):
            with open(tmp_path / "x", "wb") as file:
                file.truncate(size)
                file.seek(place or 0)
                file.write(b"" if place is None else b"1")
            hashes.append((fingerprint(tmp_path), fingerprint(tmp_path, whole=True)))
        assert [[a != b for a, b in zip(hashes[0], other)] for other in hashes[1:]] == [[True, True], [middle, True], [True, True]]


def test_when_all_checkpoints_are_damaged_it_says_so_and_begins_anew(align, whole, tmp_path, monkeypatch, capfd):
    job = align(tmp_path / "o", *SHORT)
    interrupted(job, monkeypatch)
    for folder in (tmp_path / "o.partial/checkpoints").iterdir():
        truncate(folder)
    run_here(*job)
    out = capfd.readouterr().out
    assert out.count("is damaged") == 2 and "resumed" not in out and equal(tmp_path / "o", whole / "short")


def test_what_a_kill_can_leave_behind_is_put_right(align, whole, tmp_path, monkeypatch, capfd):
    """A folder without its args.json yet; and a renamed OUT whose checkpoints were not removed yet."""
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial/args.draft").write_text('{"half')
    job = align(tmp_path / "o", *SHORT)
    run_here(*job)
    assert equal(tmp_path / "o", whole / "short")
    (tmp_path / "o/checkpoints/step-0000004-0").mkdir(parents=True)
    capfd.readouterr()
    run_here(*job)
    assert "complete" in capfd.readouterr().out and not (tmp_path / "o/checkpoints").exists()


@pytest.mark.parametrize("size", [100_000, 300_000])  # of a file: a checkpoint does not fit; nor, without one, the weights of 400 kB
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(size, align, whole, tmp_path):
    more = SHORT if size < 200_000 else SHORT[:-2]
    job = align(tmp_path / "o", *more)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    done = subprocess.run(command(*job), capture_output=True, text=True, preexec_fn=limit)
    said = done.stderr.split("Exception ignored in")[0].strip()  # by Python 3.13 after it, of torch's writer
    last = said.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("align.py: ") and str(tmp_path / "o.partial") in last and "room" in last and "Traceback" not in said
    assert not (tmp_path / "o").exists()
    run_here(*job)
    assert equal(tmp_path / "o", whole / "short")


# ----------------------------------------------------------------------------------------------------- damaged models and data


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


KEY = "model.layers.1.mlp.up_proj.weight"
MODELS = dict(
    pickle=(pickled, "safetensors"), truncated=(lambda m: (m / "model.safetensors").write_bytes(b"x" * 999), "safetensors"),
    absent=(lambda m: (m / "model.safetensors").unlink(), "safetensors"), lacking=(lambda m: edit(m, lambda t: t.pop(KEY)), KEY),
    shape=(lambda m: edit(m, lambda t: t.update({KEY: torch.zeros(3, 4)})), "safetensors"),
    config=(lambda m: (m / "config.json").write_text("{"), "config.json"))


@pytest.mark.parametrize("fault", MODELS)
def test_a_damaged_model_is_one_line_that_names_it(fault, align, models, tmp_path):
    change, word = MODELS[fault]
    shutil.copytree(models["llama"], tmp_path / "m")
    change(tmp_path / "m")
    line = refused(*align(tmp_path / "o", *SHORT), "--model", tmp_path / "m")
    assert str(tmp_path / "m") in line and word in line and [f.name for f in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name, content", [("dataset_info.json", b"{"), ("state.json", None), ("data-00000-of-00001.arrow", b""),
                                           ("data-00000-of-00001.arrow", b"junk" * 999), ("data-00000-of-00001.arrow", None)])
def test_damaged_data_is_one_line_that_names_it(name, content, align, data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "d")
    (tmp_path / "d" / name).unlink() if content is None else (tmp_path / "d" / name).write_bytes(content)
    line = refused(*align(tmp_path / "o", *SHORT), "--data", tmp_path / "d")
    assert str(tmp_path / "d") in line and [f.name for f in tmp_path.iterdir()] == ["d"]


def test_data_without_a_tokenizer_names_where_it_should_be(align, data, tmp_path, monkeypatch):
    """By an absolute path: transformers would ask the hub for `moved/tokenizer`, for most of a minute if there is no network."""
    shutil.copytree(data / "train", tmp_path / "moved/train")
    monkeypatch.chdir(tmp_path)
    line = refused(*align(tmp_path / "o", *SHORT), "--data", "moved/train")
    assert f"{tmp_path}/moved/tokenizer: no tokenizer there" in line


def test_a_token_id_outside_the_vocabulary_is_named(align, data, models, tmp_path):
    """Rows that prepare_data.py did not write: no tokenizer beside them that could be compared."""
    rows = load_rows(data / "train").to_list()
    rows[3]["responses"][0][0] = 10**6
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    line = refused(*align(tmp_path / "o", *SHORT), "--data", tmp_path / "d")
    assert "token id 1000000: not in the vocabulary" in line


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_log_probs_that_are_not_finite_name_step_and_rows(loss, align, models, tmp_path):
    shutil.copytree(models["llama"], tmp_path / "m")
    edit(tmp_path / "m", lambda t: t[KEY].fill_(float("nan")))
    line = refused(*align(tmp_path / "o", *SHORT), "--loss", loss, "--model", tmp_path / "m")
    assert "step 1" in line and "'12': [nan, nan" in line
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial/checkpoints").exists()


def test_a_loss_that_is_not_finite_names_the_pairs_at_fault_alone(align, data, tmp_path):
    """odpo takes the logarithm of a gap, which these margins make negative for one pair of the batch of 19."""
    from prepare_data import fingerprint

    margins = tmp_path / "m.json"
    margins.write_text(json.dumps(dict(data=[fingerprint(data / "train"), 19], margins=[1.0 - 3 * (k == 7) for k in range(19)])))
    line = refused(*align(tmp_path / "o", "--batch-size", 19), "--loss", "odpo", "--margins", margins)
    numbers = re.findall(r"'(\w+)': \[([^\]]*)\]", line)
    assert [k for k, _ in numbers] == [load_rows(data / "train")["id"][7]] and "nan" in numbers[0][1]


# ------------------------------------------------------------------------------------------------------- arguments, one failing rank
WRONG = ["--lr 0", "--lr -1", "--lr nan", "--lr inf", "--clip -1", "--clip nan", "--save-every -1", "--max-steps -3", "--epochs inf",
         "--checkpoint-layers -1", "--weight-decay nan", "--tokens-per-forward 0", "--min-gap -1", "--sft-weight nan", "--hp beta=nan",
         "--hp beta=inf", "--hp form=none", "--replicas 2"]


@pytest.mark.parametrize("arguments", WRONG)
def test_a_bad_argument_is_named_before_a_model_is_loaded(arguments, align, tmp_path, monkeypatch):
    import sft as model_side

    monkeypatch.setattr(model_side, "load_model", lambda *args: pytest.fail("a model was loaded"))
    line = refused(*align(tmp_path / "o", *SHORT), *arguments.split())
    assert arguments.split()[0] in line or "form=none" in line
    assert not list(tmp_path.iterdir())


FAIL = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import sft
whole, calls = sft.score, []
def score(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 8:
        raise {error}
    return whole(*args)
sft.score = score
sys.argv[0] = {root!r} + "/align.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("error", ["ValueError('one rank fails')", pytest.param("RuntimeError('one rank fails')", marks=pytest.mark.soak),
                                   pytest.param("os.kill(os.getpid(), 9)", marks=pytest.mark.soak)])
def test_one_failing_rank_stops_all_soon_without_a_checkpoint_of_the_others(error, align, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL.format(root=str(ROOT), error=error))
    began = time.time()
    code, _, err = run_stage(tmp_path / "fail.py", *align(tmp_path / "o", *LONG)[1:], n=2)
    assert code != 0 and time.time() - began < 60 and ("one rank fails" in err or "os.kill" in error)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial/checkpoints").exists()


# -------------------------------------------------------------------------------------------------------------------------- long ones


@pytest.mark.soak
@pytest.mark.parametrize("loss", ["amapo", "dpo"])
def test_memory_does_not_grow_over_1000_steps(loss, align, tmp_path):
    code, _, err = run_stage(*align(tmp_path / "o", "--loss", loss, "--batch-size", 9, "--max-steps", 1000, "--lr", 1e-4, "--save-every", 100))
    assert code == 0, err
    peak = [json.loads(line)["memory_gib"] for line in (tmp_path / "o/metrics.jsonl").read_text().splitlines()]
    assert peak[999] - peak[300] < 0.01


@pytest.mark.parametrize("how", ["kill", "Ctrl-C"])
def test_workers_do_not_outlive_a_killed_stage(how, tokenizer, tmp_path):
    """prepare_data.py tokenises in several processes; SIGKILL of the stage, or SIGINT of its group, leaves none of them."""
    rows = [json.dumps(dict(prompt=f"{k} the cat", completion="sat on a mat " * 50)) for k in range(3000)]
    (tmp_path / "sft.jsonl").write_text("\n".join(rows))
    code = f"import os, runpy, sys; os.cpu_count = lambda: 3; sys.argv, sys.path[0] = sys.argv[1:], {str(ROOT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    stage = subprocess.Popen([sys.executable, "-c", code, *command("prepare_data.py", "--model", tokenizer, "--sft", tmp_path / "sft.jsonl", "--out",
                                                                   tmp_path / "out")[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
    children = lambda: Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()
    alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    until = time.time() + 60
    while len(workers := children()) < 3:
        assert time.time() < until and stage.poll() is None
        time.sleep(0.02)
    stage.kill() if how == "kill" else os.killpg(stage.pid, signal.SIGINT)
    assert stage.wait(timeout=10) == (-signal.SIGKILL if how == "kill" else -signal.SIGINT)
    until = time.time() + 10
    while any(map(alive, workers)):
        assert time.time() < until
        time.sleep(0.05)

"""What the tests share: tiny models of five architectures, a small prepared data folder, ways to run a stage. No network, CPU only, but for
the tests marked `needs_gpu`: those run what they test in a process of its own, which sees the GPU."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=os.environ.get("TEST_GPU", ""), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

has_gpu = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True).stdout.startswith("GPU")
needs_gpu = pytest.mark.skipif(not has_gpu, reason="no CUDA device")
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: minutes long or randomised; not in the default selection, -m 'not soak'")


# ---------------------------------------------------------------------------------------------------------------- running a stage


@contextmanager
def process_group():
    """A group of one process around what is run here. A stage that sets up its own group meanwhile gets this one."""
    mine, init = not dist.is_initialized(), dist.init_process_group
    if mine:
        init("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group = lambda *args, **kwargs: None
    try:
        yield
    finally:
        dist.init_process_group = init
        if mine:
            dist.destroy_process_group()


class Left(BaseException):
    """What os._exit, with which a stage ends, is here."""


def raise_left():
    raise Left


def run_here(script, *args):
    """Run a stage as a script inside this process (an import of torch costs seconds). Its SystemExit, if any, is raised."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    argv, sys.argv = sys.argv, [str(ROOT / script), *map(str, args)]
    here, leave = os.getpid(), os._exit
    os._exit = lambda code: raise_left() if os.getpid() == here else leave(code)  # this process goes on, not those that it forks
    try:
        with process_group():
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Left:
        pass
    finally:
        sys.argv, os._exit = argv, leave
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(script, *args, n=1):
    launcher = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return [sys.executable, *launcher, str(script if Path(script).is_absolute() else ROOT / script), *map(str, args)]


def run_stage(script, *args, n=1):
    """Run a stage script as n real processes: (returncode, stdout, stderr)."""
    done = subprocess.run(command(script, *args, n=n), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


DRIVER = """
import json, os, runpy, sys
import torch.distributed as dist
all_reduce, sums = dist.all_reduce, []
def counted(tensor, *args, group=None, **kwargs):
    if group is not None:  # FSDP's, over replicas
        sums.append(tensor.numel())
    return all_reduce(tensor, *args, group=group, **kwargs)
dist.all_reduce = counted
dist.init_process_group("gloo")
dist.init_process_group = lambda *args, **kwargs: None
class Left(BaseException):
    pass
here, leave = os.getpid(), os._exit
def exit_here(code):  # a stage ends so; this process goes on
    if os.getpid() != here:
        leave(code)
    raise Left
os._exit = exit_here
for argv in json.load(open(sys.argv[1])):
    sys.argv, sys.path[0] = argv, argv[0].rpartition("/")[0]
    sums.clear()
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except Left:
        pass
    if dist.get_rank() == 0:
        json.dump(sums, open(argv[argv.index("--out") + 1] + ".sums", "w"))
sys.stdout.flush()
leave(0)  # as a stage does: at a plain exit of many processes a thread of a library aborts now and then
"""


def run_jobs(folder, jobs, n):
    """Run several stages, [[script, argument, ...]], one after the other in one launch of n processes: (returncode, stdout, stderr)."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "jobs.json").write_text(json.dumps([[str(ROOT / script), *map(str, args)] for script, *args in jobs]))
    return run_stage(folder / "driver.py", folder / "jobs.json", n=n)


def kill_tree(pid):
    """SIGKILL a process and all its descendants (torchrun's workers lead sessions of their own)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    doomed = [pid]
    for parent in doomed:
        doomed += [child for child, p in parents.items() if p == parent]
    for p in doomed:
        try:
            os.kill(p, signal.SIGKILL)
        except ProcessLookupError:
            continue


# ------------------------------------------------------------------------------------------------------------- tokenizer and models
SPECIAL = ["<pad>", "<bos>", "<user>", "<assistant>", "<end>", "<eos>"]  # ids 0 to 5; <end> ends a turn, <eos> a text
WORDS = "the cat sat on a mat while seven small red foxes ran over wet grass and sang loudly to their old friend".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")


def sentence(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A folder: byte-level BPE with BOS, EOS, another token that ends a turn, and a chat template."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator([" ".join(WORDS)], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                               additional_special_tokens=["<user>", "<assistant>", "<end>"])
    tok.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tokenizer, tmp_path_factory):
    """{architecture: folder} of random models. Large weights, so that windows and soft-caps (Gemma-2: 2 and 3) change the scores."""
    size = dict(vocab_size=310, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=5)
    configs = dict(
        llama=transformers.LlamaConfig(**size, tie_word_embeddings=False),
        mistral=transformers.MistralConfig(**size, sliding_window=8, tie_word_embeddings=False),
        qwen2=transformers.Qwen2Config(**size, tie_word_embeddings=True),
        qwen3=transformers.Qwen3Config(**size, tie_word_embeddings=False),
        gemma2=transformers.Gemma2Config(**size, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
                                         query_pre_attn_scalar=16, tie_word_embeddings=True))
    folders = {}
    for seed, name in enumerate(ARCHITECTURES):
        torch.manual_seed(seed)
        folders[name] = tmp_path_factory.mktemp(name)
        lm = transformers.AutoModelForCausalLM.from_config(configs[name])
        with torch.no_grad():
            for p in lm.parameters():
                if p.ndim == 1:  # norms and biases are all ones or zeros otherwise, and a mix-up of them would not show
                    p.add_(0.1 * torch.randn_like(p))
        lm.save_pretrained(folders[name])
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folders[name])
    return folders


def reference_logp(lm, prompt, response):
    """Summed log-prob of a response, by transformers' own forward on the one unpadded sequence. A tensor with its graph."""
    logits = lm(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].double()  # (T, V)
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(response)[:, None]).sum()


def plain_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


# ---------------------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="session")
def data(tokenizer, tmp_path_factory):
    """A prepared folder: 26 demonstrations; 14 pairs and a list of 4 with a tie, so 14 + 5 = 19 pairs; an evaluation set of both."""
    import prepare_data

    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")
    ask = lambda k: f"{k}. {sentence(rng, 1, 12)}"
    pairs = lambda n: [dict(prompt=ask(k), chosen=f"{sentence(rng, 1, 14)}.", rejected=f"{sentence(rng, 1, 14)}!") for k in range(n)]
    several = lambda: dict(prompt=ask("many"), responses=[f"{k} {sentence(rng, 1, 9)}" for k in range(4)], scores=[0.5, 2, 0.5, 1])
    rows = dict(sft=[dict(prompt=ask(k), completion=sentence(rng, 1, 16)) for k in range(26)],
                prefs=[*pairs(14), several()], test=[*pairs(6), several()])
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    prepare_data.main(Namespace(
        model=str(tokenizer), sft=str(folder / "sft.jsonl"), prefs=str(folder / "prefs.jsonl"), eval=[f"ID={folder / 'test.jsonl'}"],
        out=str(folder / "out"), max_length=256, seed=0, exclude_prompts_from=None, dry_run=False, official_quirks=False))
    return folder / "out"

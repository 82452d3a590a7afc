"""Text -> token ids on disk. The one place that knows about text: sources, chat templates, the toy world, data order.

Every data set becomes a `datasets` folder with one row schema, a prompt with n scored responses:

    id: str   prompt: list[int]   responses: list[list[int]]   scores: list[float]   domain: str   style: list[int]   meta: str

n = 1 is a demonstration (SFT), n = 2 a preference pair with scores [1, 0] or the data's own, n = 6 an RM-Bench row with styles
0, 1, 2, 0, 1, 2; a scored list keeps its n scores. `prompt` holds the one BOS (if the model has one) and the generation prompt, each
response exactly one end token, its last; `meta` is the source row as JSON.

    python prepare_data.py --model toy --out runs/data                                         # 15 s: the toy world, all its sets
    python prepare_data.py --model DIR --sft s.jsonl --prefs p.jsonl --eval ID=e.jsonl --out runs/data

A source is `toy:SPLIT`, a hub id (`id` or `id:split`), a local .json / .jsonl / .jsonl.gz / .parquet file, a folder of those, or a
`datasets` folder; commas join several. Shapes, told apart by their keys:

    {prompt, completion}   {messages}                        demonstrations (one row for each assistant turn)
    {prompt, chosen, rejected}                               a pair: strings, or message lists; a message list may repeat the prompt
    {prompt, responses, scores}                              a scored list
    {instruction, response_1_text, ..., all_scores}          a scored list as RM-Robustness (arXiv 2505.07271) publishes it
    {prompt, chosen[3], rejected[3]}                         RM-Bench (arXiv 2410.16184): concise, detailed, markdown

Writes OUT/sft, OUT/train, OUT/eval/NAME, OUT/tokenizer (with the chat template in use), OUT/report.json, and for the toy OUT/model.
"""

import argparse
import functools
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path

import jinja2
import tqdm
import transformers

# --------------------------------------------------------------------------------------------------------------- the toy world
# Lists of digits, tasks with one right answer, writers of different skill, three styles. Labels for training are drawn from
# Bradley-Terry on the true reward plus a taste for rich style; evaluation labels are the true reward. "OOD" means: not in the
# preference data. (As with a real base model, SFT has met every task.)

TASKS = {  # name: (domain, what the user asks, the answer); the last four are held out of the preference data
    "reverse": ("order", "Reverse the list", lambda x: x[::-1]),
    "ascend": ("order", "Sort the list upwards", lambda x: sorted(x)),
    "left": ("order", "Rotate the list left by one", lambda x: x[1:] + x[:1]),
    "ends": ("order", "Swap the first and the last item", lambda x: [x[-1], *x[1:-1], x[0]]),
    "plus": ("digits", "Add one to every item", lambda x: [(d + 1) % 10 for d in x]),
    "tail": ("select", "Drop the first item", lambda x: x[1:]),
    "init": ("select", "Drop the last item", lambda x: x[:-1]),
    "odd": ("select", "Keep the items at odd positions", lambda x: x[::2]),
    "descend": ("order", "Sort the list downwards", lambda x: sorted(x, reverse=True)),
    "right": ("order", "Rotate the list right by one", lambda x: x[-1:] + x[:-1]),
    "minus": ("digits", "Subtract one from every item", lambda x: [(d - 1) % 10 for d in x]),
    "even": ("select", "Keep the items at even positions", lambda x: x[1::2]),
}
SEEN, UNSEEN = list(TASKS)[:8], list(TASKS)[8:]


def substitute(rng, y):
    i = rng.randrange(len(y))
    return [*y[:i], (y[i] + rng.randrange(1, 10)) % 10, *y[i + 1 :]]


def swap(rng, y):
    i = rng.randrange(max(1, len(y) - 1))
    return [*y[:i], *y[i : i + 2][::-1], *y[i + 2 :]]


def stutter(rng, y):
    i = rng.randrange(len(y))
    return [*y[: i + 1], *y[i:]]


WRITERS = {  # name: (how often the answer is right, what goes wrong otherwise: (rng, right answer, given list) -> answer)
    "expert": (0.95, lambda rng, y, x: substitute(rng, y)),
    "good": (0.75, lambda rng, y, x: substitute(rng, y)),
    "sloppy": (0.40, lambda rng, y, x: substitute(rng, substitute(rng, y))),
    "lazy": (0.40, lambda rng, y, x: y[: max(1, len(y) - rng.choice([1, 2]))]),
    "mixer": (0.40, lambda rng, y, x: swap(rng, y)),
    "parrot": (0.40, lambda rng, y, x: x),  # the last three are held out of the preference data
    "stutterer": (0.40, lambda rng, y, x: stutter(rng, y)),
    "off_by_one": (0.40, lambda rng, y, x: [(d + 1) % 10 for d in y]),
}
KNOWN, NEW = list(WRITERS)[:5], list(WRITERS)[5:]

STYLES = (  # concise, detailed, markdown; the answer is what follows the last colon
    lambda ask, x, y: f"It is {y}",
    lambda ask, x, y: f"You gave me the list {x} and asked me to do this with it. {ask}. Here is the result: {y}",
    lambda ask, x, y: "**Result:**\n" + "\n".join(f"- {d}" for d in y.split()),
)
STYLE_BIAS = (0.0, 0.6, 1.0)  # nats by which the labeller of the training pairs favours a style


def true_reward(meta, text):
    """The true reward of any text, in [0, 2]: share of items in the right place, plus 1 if all of it is right.

    meta: a row's `meta` (JSON with the toy's `answer`), or that dict.  text: a response, decoded without special tokens.
    """
    truth = (json.loads(meta) if isinstance(meta, str) else meta)["answer"]
    found = [int(d) for d in re.findall(r"\d", text.rsplit(":", 1)[-1])]
    right = sum(a == b for a, b in zip(found, truth))
    return right / max(len(found), len(truth)) + (found == truth)


@functools.lru_cache
def toy_rows(split, seed):
    """Rows of a toy split, in the shapes that real data have: sft, prefs, id, prompt_ood, response_ood, mutual_ood, rm_bench."""
    sizes = dict(sft=12_000, prefs=4_096, id=1_000, prompt_ood=500, response_ood=500, mutual_ood=500, rm_bench=400)
    if split not in sizes:
        raise ValueError(f"toy:{split} is not a split of the toy world; it has {', '.join(sizes)}")
    rng = random.Random(f"toy {split} {seed}")
    tasks = UNSEEN if split in ("prompt_ood", "mutual_ood") else list(TASKS) if split in ("sft", "rm_bench") else SEEN
    writers = NEW if split in ("response_ood", "mutual_ood") else list(WRITERS) if split in ("sft", "rm_bench") else KNOWN
    part = ["sft", "prefs"].index(split) if split in ("sft", "prefs") else 2  # prompts of the three parts never coincide
    rows = []
    while len(rows) < sizes[split]:
        task, x = rng.choice(tasks), [rng.randrange(10) for _ in range(rng.randrange(3, 7))]
        if "0000011122"[zlib.crc32(f"{task} {x}".encode()) % 10] != str(part):
            continue
        domain, ask, solve = TASKS[task]
        truth, given = solve(x), " ".join(map(str, x))

        def answer(writer, wrong=None):
            skill, slip = WRITERS[writer]
            right = rng.random() < skill if wrong is None else not wrong
            return truth if right else slip(rng, truth, x)

        def text(y, style):
            return STYLES[style](ask, given, " ".join(map(str, y)))

        row = dict(id=f"toy-{split}-{len(rows)}", prompt=f"{ask}: {given}", task=task, answer=truth)
        if split == "rm_bench":
            wrong = answer(rng.choice(writers), wrong=True)
            if wrong == truth:
                continue
            row |= dict(domain=domain, chosen=[text(truth, s) for s in range(3)], rejected=[text(wrong, s) for s in range(3)])
            rows.append(row)
            continue
        n = 1 if split == "sft" else 2 if split in ("prefs", "id") else 4
        styles = [rng.randrange(3) for _ in range(n)]
        weights = [3, 3] + [1] * (len(writers) - 2) if split == "sft" else None  # demonstrations are mostly good
        texts = [text(answer(w), s) for w, s in zip(rng.choices(writers, weights, k=n), styles)]
        rewards = [true_reward(row, t) for t in texts]
        if n == 1:
            row |= dict(completion=texts[0])
        elif len(set(texts)) < n or (split != "prefs" and len(set(rewards)) < 2):
            continue
        elif n == 2:
            gap = rewards[0] - rewards[1]
            noisy = 2 * gap + STYLE_BIAS[styles[0]] - STYLE_BIAS[styles[1]]
            first = rng.random() < 1 / (1 + 2.718281828459045**-noisy) if split == "prefs" else gap > 0
            row |= dict(zip(("chosen", "rejected") if first else ("rejected", "chosen"), texts))
        else:
            row |= dict(responses=texts, scores=rewards)
        rows.append(row)
    return rows


def toy_model(out, texts, seed):
    """A 0.9M-parameter Llama with random weights and a byte-level BPE tokenizer, as an ordinary Hugging Face folder."""
    import tokenizers
    import torch

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<user>", "<assistant>", "<end>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False)
    tok.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    config = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=4, pad_token_id=0, tie_word_embeddings=False)
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(out)
    tok.save_pretrained(out)

# --------------------------------------------------------------------------------------------------------- sources and shapes


def read_source(source, seed=0):
    """Raw rows (dicts) of a source; the ones of a file carry its stem as `domain` if they have none. See the module docstring."""
    if "," in source:
        return [row for part in source.split(",") for row in read_source(part, seed)]
    if source.startswith("toy:"):
        return toy_rows(source[4:], seed)
    path = Path(source)
    if path.is_dir() and not any((path / f).exists() for f in ("dataset_info.json", "dataset_dict.json")):
        files = sorted(f for f in path.iterdir() if re.search(r"\.(jsonl?(\.gz)?|parquet)$", f.name))
        if not files:
            raise ValueError(f"{source}: no .json, .jsonl, .jsonl.gz or .parquet file in this folder")
        return [row for f in files for row in read_source(str(f), seed)]
    if path.is_file() and path.suffix != ".parquet":
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            text = f.read()
        try:
            rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(s) for s in text.split("\n") if s.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not JSON, nor JSON lines ({error})") from None
    else:
        import datasets

        if path.suffix == ".parquet" and path.is_file():
            rows = datasets.load_dataset("parquet", data_files=source, split="train").to_list()
        elif path.is_dir():
            rows = datasets.load_from_disk(source)
            rows = (datasets.concatenate_datasets(rows.values()) if isinstance(rows, dict) else rows).to_list()
        elif path.suffix or source.startswith((".", "/")) or source.count("/") != 1:
            raise ValueError(f"{source}: no such file or folder (and not a hub id, which reads owner/name or owner/name:split)")
        else:
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train").to_list()
    if not rows:
        raise ValueError(f"{source}: no rows")
    return [row | {"domain": row.get("domain") or path.name.split(".")[0]} if isinstance(row, dict) else row for row in rows]


def parse(row):
    """A raw row -> list of dict(prompt: [message], responses: [str], scores: [float], style: [int]); ValueError if unknown."""
    if not isinstance(row, dict):
        raise ValueError(f"is {type(row).__name__}, not an object")
    keys = {k for k, v in row.items() if v is not None}
    if {"chosen", "rejected"} <= keys:
        if not isinstance(row["chosen"], list) or isinstance(row["chosen"][0], dict):
            return [pair(row)]
        good, bad = row["chosen"], row["rejected"]  # RM-Bench
        if len(good) != 3 or len(bad) != 3:
            raise ValueError(f"has {len(good)} chosen and {len(bad)} rejected answers; RM-Bench has three of each")
        return [dict(prompt=messages_of(row["prompt"]), responses=good + bad, scores=[1.0] * 3 + [0.0] * 3, style=[0, 1, 2] * 2)]
    if "all_scores" in keys:
        texts = [row[f"response_{k + 1}_text"] for k in range(len(row["all_scores"]))]
        return [dict(prompt=messages_of(row["instruction"]), responses=texts, scores=row["all_scores"], style=[])]
    if {"prompt", "responses", "scores"} <= keys:
        if len(row["responses"]) != len(row["scores"]):
            raise ValueError(f"has {len(row['responses'])} responses but {len(row['scores'])} scores")
        return [dict(prompt=messages_of(row["prompt"]), responses=row["responses"], scores=row["scores"], style=[])]
    turns = row["messages"] if "messages" in keys else None
    if {"prompt", "completion"} <= keys:
        turns = messages_of(row["prompt"]) + messages_of(row["completion"], "assistant")
    if turns:
        return [dict(prompt=turns[:k], responses=[t["content"]], scores=[1.0], style=[])
                for k, t in enumerate(turns) if t["role"] == "assistant" and k]
    raise ValueError(
        f"has the keys {sorted(keys)}; wanted {{prompt, completion}} or {{messages}} for demonstrations, "
        "{prompt, chosen, rejected} or {prompt, responses, scores} for preferences")


def messages_of(text, role="user"):
    return [dict(role=role, content=text)] if isinstance(text, str) else list(text)


def pair(row):
    """{prompt?, chosen, rejected} -> the parsed pair. Message lists may hold the whole conversation; then both must agree on it."""
    chosen, rejected = (messages_of(row[k], "assistant") for k in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("has chosen and rejected answers to different conversations")
    if len(chosen) == 1 and row.get("prompt") is None:
        raise ValueError("has no prompt: give `prompt`, or message lists that begin with it")
    prompt = chosen[:-1] or messages_of(row["prompt"])
    scores = [float(row.get(k, default)) for k, default in (("score_chosen", 1), ("score_rejected", 0))]
    return dict(prompt=prompt, responses=[chosen[-1]["content"], rejected[-1]["content"]], scores=scores, style=[])


# ------------------------------------------------------------------------------------------------------ chat template, tokens
PLAIN_TEMPLATE = (  # for tokenizers that have none; it is saved with the model, so that generation uses it too
    "{{ bos_token or '' }}{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}")


def load_tokenizer(path):
    """The tokenizer of a folder or hub id, with its own chat template or PLAIN_TEMPLATE."""
    tok = transformers.AutoTokenizer.from_pretrained(path)
    tok.chat_template = tok.chat_template or PLAIN_TEMPLATE
    if tok.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end token (eos_token)")
    return tok


def render(tok, messages, **kwargs):
    """Template to text. A system message that the template refuses is folded into the first user message."""
    try:
        return tok.apply_chat_template(messages, tokenize=False, **kwargs)
    except jinja2.TemplateError:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        first = dict(messages[1], content=messages[0]["content"] + "\n\n" + messages[1]["content"])
        return tok.apply_chat_template([first, *messages[2:]], tokenize=False, **kwargs)


@functools.lru_cache(8)
def end_of_turn(tok):
    """(id of the token that ends an answer, the text that the template puts after one). The first special token there, else EOS."""
    probe = "PROBE"
    tail = render(tok, [dict(role="user", content="x"), dict(role="assistant", content=probe)]).rpartition(probe)[2]
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    return next((i for i in tok(tail, add_special_tokens=False).input_ids if i in special), tok.eos_token_id), tail


class Dropped(Exception):
    """Why a response is left out; counted in the report."""


def encode_prompt(tok, messages):
    """Token ids of template(messages, generation prompt), with the one BOS if the model has one."""
    ids = tok(render(tok, messages, add_generation_prompt=True), add_special_tokens=False).input_ids
    bos = tok.bos_token_id
    if bos in (None, tok.eos_token_id):
        return ids
    if ids.count(bos) > 1:
        raise Dropped("more than one BOS")
    return ids if bos in ids or tok("").input_ids[:1] != [bos] else [bos, *ids]


def encode_response(tok, messages, answer, prompt):
    """Token ids of an answer, whose prompt has the ids `prompt`; the last is its one end token. Never templates an answer alone:
    head = template(messages, generation prompt), full = template(messages + answer), response = full[len(head):]."""
    end, tail = end_of_turn(tok)
    full = render(tok, [*messages, dict(role="assistant", content=answer)])
    ids = tok(full[: len(full) - len(tail)] + tok.convert_ids_to_tokens(end), add_special_tokens=False).input_ids
    start = len(prompt) if ids[: len(prompt)] == prompt else len(prompt) - 1  # a BOS that the template does not print
    if ids[:start] != prompt[len(prompt) - start :]:
        if not full.startswith(head := render(tok, messages, add_generation_prompt=True)):
            raise ValueError(f"the chat template is not prefix-stable: {full[: len(head)]!r} is not {head!r}")
        raise Dropped("tokens merge across the prompt's end")
    if ids[start:].index(end) != len(ids) - start - 1:
        raise Dropped("end token inside an answer")
    return ids[start:]


def decode(tok, ids):
    """The text of a response: without special tokens, otherwise as it was written."""
    return tok.decode(ids, skip_special_tokens=True)


def encode_row(row, tok, max_length):
    """Tokenise one parsed row; `dropped` is '' or the reason. A row of RM-Bench stands whole, a list may lose single responses."""
    out = dict(id=row["id"], prompt=[], responses=[], scores=[], domain=row["domain"], style=row["style"], meta=row["meta"], dropped="")
    reasons = []
    for text, score in zip(row["responses"], row["scores"]):
        try:
            if not text.strip():
                raise Dropped("empty response")
            out["prompt"] = out["prompt"] or encode_prompt(tok, row["prompt"])
            ids = encode_response(tok, row["prompt"], text, out["prompt"])
            if len(out["prompt"]) + len(ids) > max_length:
                raise Dropped("over-long")
            if ids in out["responses"]:
                raise Dropped("equal responses")
            out["responses"].append(ids), out["scores"].append(float(score))
        except Dropped as reason:
            reasons.append(str(reason))
    whole = len(row["responses"]) if row["style"] else min(2, len(row["responses"]))
    return out | dict(dropped=reasons[0] if len(out["responses"]) < whole else "")


# ------------------------------------------------------------------------------------------------------- rows, report, disk
SCHEMA = dict(id="string", prompt="int32", responses="int32", scores="float64", domain="string", style="int32", meta="string")


def build(source, tok, args, kind):
    """Source -> (`datasets.Dataset` in the schema above, its part of the report). ValueError with the row's number on bad input."""
    import datasets

    raw, parsed, seen = read_source(source, args.seed), [], set()
    dropped = Counter()
    for k, row in enumerate(tqdm.tqdm(raw, desc=f"read {source}", unit="row", mininterval=1)):
        try:
            items = parse(row)
            if any((len(item["responses"]) == 1) != (kind == "sft") for item in items):
                raise ValueError(f"is not {'a demonstration' if kind == 'sft' else 'a preference'}: keys {sorted(row)}")
            if any(not isinstance(t, str) for item in items for t in item["responses"]):
                raise ValueError("has an answer that is not a string")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{source}, row {k + 1}: {error if isinstance(error, ValueError) else repr(error)}") from None
        for item in items:
            key = hashlib.sha256(json.dumps([item["prompt"], item["responses"]]).encode()).digest()
            dropped["duplicate"] += key in seen
            if key not in seen:
                meta = json.dumps(row, ensure_ascii=False, default=str)
                parsed.append(item | dict(id=str(row.get("id") or row.get("prompt_id") or k), domain=row.get("domain") or "", meta=meta))
            seen.add(key)
    feature = {k: datasets.Value(v) for k, v in SCHEMA.items()}
    feature |= {k: datasets.List(feature[k]) for k in ("prompt", "scores", "style")}
    feature["responses"] = datasets.List(datasets.List(datasets.Value("int32")))
    rows = datasets.Dataset.from_list(parsed).map(
        encode_row, fn_kwargs=dict(tok=tok, max_length=args.max_length), desc=f"tokenise {source}", num_proc=args.num_proc if len(parsed) > 300 else None,
        remove_columns=list(parsed[0]), features=datasets.Features(feature | {"dropped": datasets.Value("string")}))
    dropped.update(filter(None, rows["dropped"]))
    rows = rows.filter(lambda d: not d, input_columns="dropped").remove_columns("dropped")
    if not len(rows):
        raise ValueError(f"{source}: nothing is left of {len(raw)} rows; dropped: {dict(dropped)}")
    return rows, describe(rows, len(raw), dropped, source)


def describe(rows, n_raw, dropped, source):
    """The report of one data set: counts, length percentiles in tokens, how often the longer response is the better one."""
    prompt, longest = [len(p) for p in rows["prompt"]], [max(map(len, r)) for r in rows["responses"]]
    wins = [len(a) > len(b) for r, s in zip(rows["responses"], rows["scores"]) for a, x in zip(r, s) for b, y in zip(r, s) if x > y]
    percentiles = lambda x: {p: sorted(x)[min(len(x) - 1, len(x) * p // 100)] for p in (5, 50, 95, 100)}
    return dict(source=source, rows_in=n_raw, kept=len(rows), dropped={k: v for k, v in dropped.items() if v},
                prompt_tokens=percentiles(prompt), response_tokens=percentiles(longest),
                longer_wins=round(sum(wins) / len(wins), 4) if wins else None)


def load_rows(path):
    """The rows of a prepared folder. ValueError if it is none."""
    import datasets

    if not (Path(path) / "dataset_info.json").exists():
        raise ValueError(f"{path}: not a folder that prepare_data.py wrote")
    return datasets.load_from_disk(str(path))


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    return random.Random(f"order {seed} {epoch}").sample(range(n), n)


def batch_indices(n, batch_size, seed, step):
    """Data order, a pure function: the indices of global batch `step` out of n items. The last batch of an epoch may be smaller."""
    epoch, k = divmod(step, -(-n // batch_size))
    return permutation(n, seed, epoch)[k * batch_size : (k + 1) * batch_size]


def fingerprint(path):
    """Hash of a local file or folder: names, sizes, and the first and last MiB of each file. A hub id stands for itself."""
    if not Path(path).exists():
        return str(path)
    digest, top = hashlib.sha256(), Path(path)
    for f in sorted(p for p in [top, *top.rglob("*")] if p.is_file()):
        with open(f, "rb") as data:
            head, size = data.read(1 << 20), f.stat().st_size
            data.seek(max(0, size - (1 << 20)))
            digest.update(f"{f.relative_to(top)} {size}".encode() + head + data.read())
    return digest.hexdigest()[:16]


def begin(out, args, inputs=()):
    """None if OUT is complete; else a function that makes OUT.partial, where a stage writes, and returns it.

    `args.json` there says what makes the result. A result of other arguments, or of inputs that have changed since, is never
    overwritten: ValueError says what differs.
    """
    neutral = {"out", "save_every", "num_proc", "tokens_per_forward"}
    now = {k: v for k, v in vars(args).items() if k not in neutral} | {"inputs": {str(p): fingerprint(p) for p in inputs if p}}
    now = json.loads(json.dumps(now, default=str))
    for folder in (Path(out), Path(f"{out}.partial")):
        if (folder / "args.json").exists():
            old = json.loads((folder / "args.json").read_text())
            if diff := [f"{k}: {old.get(k)} -> {now.get(k)}" for k in sorted(old | now) if old.get(k) != now.get(k)]:
                raise ValueError(f"{folder} holds a run with other arguments ({'; '.join(diff)}); remove it or choose another --out")
            if folder == Path(out):
                return None
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is not a result of this script; choose another --out")
    return functools.partial(create, Path(f"{out}.partial"), now)


def create(partial, record):
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "args.json").write_text(json.dumps(record, indent=1))
    return partial


def run(main, parser):
    """Parse and run; a bad argument or input is one line on stderr and exit code 1."""
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).strip().splitlines()[0]}")


def main(args):
    toy = args.model == "toy"
    sft, prefs = args.sft or ("toy:sft" if toy else None), args.prefs or ("toy:prefs" if toy else None)
    evals = args.eval or (TOY_EVAL if toy else [])
    if bad := [e for e in evals if not re.match(r"[\w.-]+=.", e)]:
        raise ValueError(f"--eval {bad[0]}: wanted NAME=SOURCE")
    jobs = [("sft", sft), ("train", prefs), *((f"eval/{e.split('=', 1)[0]}", e.split("=", 1)[1]) for e in evals)]
    jobs = [(name, source) for name, source in jobs if source]
    if not jobs:
        raise ValueError("nothing to do: give --sft, --prefs or --eval")
    tok = None if toy else load_tokenizer(args.model)
    sources = [part for _, source in jobs for part in source.split(",")]
    make = begin(args.out, args, [*sources, *([] if toy else [args.model])])
    if make is None:
        return print(f"{args.out} is complete")
    out = make()
    try:
        if toy:
            texts = [f"<user>{r['prompt']}<end><assistant>{r['completion']}<end>" for r in toy_rows("sft", args.seed)]
            toy_model(out / "model", texts, args.seed)
            tok = load_tokenizer(out / "model")
        report, prompts = dict(tokenizer=fingerprint(out / "model" if toy else args.model),
                               template=hashlib.sha256(tok.chat_template.encode()).hexdigest()[:16], sets={}), {}
        for name, source in jobs:
            rows, report["sets"][name] = build(source, tok, args, name.split("/")[0])
            report["sets"][name]["fingerprint"] = {part: fingerprint(part) for part in source.split(",")}
            prompts[name] = set(map(tuple, rows["prompt"]))
            rows.save_to_disk(out / name)
            show = rows[0]
            print(f"{name}: {report['sets'][name]}\n  {tok.decode(show['prompt'])!r} [[ {tok.decode(show['responses'][0])!r} ]]")
        for name in prompts:
            if name.startswith("eval/") and "train" in prompts:
                report["sets"][name]["prompts_in_train"] = len(prompts[name] & prompts["train"])
        tok.save_pretrained(out / "tokenizer")
        (out / "report.json").write_text(json.dumps(report, indent=1))
        os.replace(out, args.out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    print(f"{args.out}: " + ", ".join(f"{name} {len(p)} prompts" for name, p in prompts.items()))


TOY_EVAL = ["ID=toy:id", "Prompt-OOD=toy:prompt_ood", "Response-OOD=toy:response_ood", "Mutual-OOD=toy:mutual_ood", "RM-Bench=toy:rm_bench"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="where the tokenizer comes from: toy, a hub id or a folder")
    parser.add_argument("--sft", help="source of demonstrations")
    parser.add_argument("--prefs", help="source of preferences for training")
    parser.add_argument("--eval", nargs="*", default=[], metavar="NAME=SOURCE", help="sources of preferences for evaluation")
    parser.add_argument("--out", required=True, help="folder to write; it appears when complete")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt + response; longer ones are dropped")
    parser.add_argument("--num-proc", type=int, default=os.cpu_count(), help="processes for tokenising")
    parser.add_argument("--seed", type=int, default=0, help="of the toy world")
    run(main, parser)

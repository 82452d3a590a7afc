"""Text -> token ids on disk. The one place that knows about text: sources, chat templates, the toy world, data order.

Every data set becomes a `datasets` folder with one row schema, a prompt with n scored responses:

    id: str   prompt: list[int]   responses: list[list[int]]   scores: list[float]   domain: str   style: list[int]   meta: str

n = 1 is a demonstration, n = 2 a pair with scores [1, 0] or the data's own, n = 6 an RM-Bench row with styles 0, 1, 2, 0, 1, 2. `prompt`
holds the one BOS (if the model has one) and the generation prompt, a response one end token, its last; `meta` is the source row as JSON.

    python prepare_data.py --model toy --out runs/data                                         # 15 s: the toy world, all its sets
    python prepare_data.py --model DIR --sft s.jsonl --prefs p.jsonl --eval ID=e.jsonl --out runs/data

A source is `toy:SPLIT`, a hub id (or `id:split`), a .json / .jsonl / .jsonl.gz / .parquet file, a folder of those, or a `datasets`
folder; commas join several. Shapes, told apart by their keys:

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
import math
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


def substitute(rng, y, x):
    i = rng.randrange(len(y))
    return [*y[:i], (y[i] + rng.randrange(1, 10)) % 10, *y[i + 1 :]]


def swap(rng, y, x):
    i = rng.randrange(max(1, len(y) - 1))
    return [*y[:i], *y[i : i + 2][::-1], *y[i + 2 :]]


WRITERS = {  # name: (how often the answer is right, what goes wrong otherwise: (rng, right answer, given list) -> answer)
    "expert": (0.95, substitute),
    "good": (0.75, substitute),
    "sloppy": (0.40, lambda rng, y, x: substitute(rng, substitute(rng, y, x), x)),
    "lazy": (0.40, lambda rng, y, x: y[: max(1, len(y) - rng.choice([1, 2]))]),
    "mixer": (0.40, swap),
    "parrot": (0.40, lambda rng, y, x: x),  # the last three are held out of the preference data
    "stutterer": (0.40, lambda rng, y, x: [*y[: (i := rng.randrange(len(y))) + 1], *y[i:]]),
    "off_by_one": (0.40, lambda rng, y, x: [(d + 1) % 10 for d in y]),
}
STYLES = (  # concise, detailed, markdown: nats by which the labeller of the training pairs favours it, and its text
    (0.0, lambda ask, x, y: f"It is {y}"),
    (0.6, lambda ask, x, y: f"You gave me the list {x} and asked me to do this with it. {ask}. Here is the result: {y}"),
    (1.0, lambda ask, x, y: "**Result:**\n" + "\n".join(f"- {d}" for d in y.split())),
)


def true_reward(meta, text):
    """The true reward of any text, in [0, 2]: share of items in the right place, plus 1 if all of it is right.
    meta: a row's `meta` (JSON with the toy's `answer`), or that dict."""
    truth = (json.loads(meta) if isinstance(meta, str) else meta)["answer"]
    found = [int(d) for d in re.findall(r"\d", text.rsplit(":", 1)[-1])]
    right = sum(a == b for a, b in zip(found, truth))
    return right / max(len(found), len(truth)) + (found == truth)


SEEN, UNSEEN, KNOWN, NEW = list(TASKS)[:8], list(TASKS)[8:], list(WRITERS)[:5], list(WRITERS)[5:]
SPLITS = {  # name: rows, tasks, writers, responses a row, part of the prompts: demonstrations, preferences, evaluation never share one
    "sft": (12_000, list(TASKS), list(WRITERS), 1, 0),
    "prefs": (4_096, SEEN, KNOWN, 2, 1),
    "ID": (1_000, SEEN, KNOWN, 2, 2),
    "Prompt-OOD": (500, UNSEEN, KNOWN, 4, 2),
    "Response-OOD": (500, SEEN, NEW, 4, 2),
    "Mutual-OOD": (500, UNSEEN, NEW, 4, 2),
    "RM-Bench": (400, list(TASKS), list(WRITERS), 6, 2),
}


@functools.lru_cache
def toy_rows(split, seed):
    """The rows of a split of the toy world, in the shapes that real data have. Deterministic."""
    if split not in SPLITS:
        raise ValueError(f"toy:{split} is not a split of the toy world; it has {', '.join(SPLITS)}")
    size, tasks, writers, n, part = SPLITS[split]
    rng, rows = random.Random(f"toy {split} {seed}"), []
    while len(rows) < size:
        task, x = rng.choice(tasks), [rng.randrange(10) for _ in range(rng.randrange(3, 7))]
        row = toy_row(rng, task, x, writers, n, part) if "0000011122"[zlib.crc32(f"{task} {x}".encode()) % 10] == str(part) else None
        rows += [row | dict(id=f"toy-{split}-{len(rows)}")] if row else []
    return rows


def toy_row(rng, task, x, writers, n, part):
    """One row, or None for a draw that compares nothing."""
    show = lambda y: " ".join(map(str, y))
    domain, ask, solve = TASKS[task]
    row = dict(prompt=f"{ask}: {show(x)}", task=task, answer=solve(x))
    if n == 6:  # the right and a wrong answer, each in three styles
        wrong = WRITERS[rng.choice(writers)][1](rng, row["answer"], x)
        good, bad = ([style(ask, show(x), show(y)) for _, style in STYLES] for y in (row["answer"], wrong))
        return row | dict(domain=domain, chosen=good, rejected=bad) if wrong != row["answer"] else None
    styles, texts = rng.choices(range(3), k=n), []
    weights = [3, 3] + [1] * (len(writers) - 2) if part == 0 else None  # demonstrations are mostly good
    for style, (skill, slip) in zip(styles, (WRITERS[w] for w in rng.choices(writers, weights, k=n))):
        y = row["answer"] if rng.random() < skill else slip(rng, row["answer"], x)
        texts.append(STYLES[style][1](ask, show(x), show(y)))
    rewards = [true_reward(row, t) for t in texts]
    if n == 1:
        return row | dict(completion=texts[0])
    if len(set(texts)) < n or (part == 2 and len(set(rewards)) < 2):
        return None
    if n == 4:
        return row | dict(responses=texts, scores=rewards)
    gap = rewards[0] - rewards[1]
    taste = 2 * gap + STYLES[styles[0]][0] - STYLES[styles[1]][0]
    first = gap > 0 if part == 2 else rng.random() < 1 / (1 + math.exp(-taste))
    return row | dict(zip(("chosen", "rejected") if first else ("rejected", "chosen"), texts))


def toy_model(out, texts, seed):
    """A 0.77M-parameter Llama with random weights and a byte-level BPE tokenizer, as an ordinary Hugging Face folder."""
    import tokenizers
    import torch

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=["<pad>", "<bos>", "<user>", "<assistant>", "<end>"], show_progress=False)
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False)
    tok.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    config = transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=4, pad_token_id=0)
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
        rows = [row for f in files for row in read_source(str(f), seed)]
    elif path.is_file() and path.suffix != ".parquet":
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            text = f.read()
        try:
            rows = json.loads(text) if text.lstrip()[:1] == "[" else [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not JSON, nor JSON lines ({error})") from None
    else:
        import datasets

        if path.is_file():
            rows = datasets.Dataset.from_parquet(source).to_list()
        elif path.is_dir():
            rows = datasets.load_from_disk(source)
            rows = (datasets.concatenate_datasets(rows.values()) if isinstance(rows, dict) else rows).to_list()
        elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:\S+)?", source) and path.suffix not in (".json", ".jsonl", ".gz", ".parquet"):
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train").to_list()
        else:
            raise ValueError(f"{source}: no such file or folder, nor a hub id (owner/name or owner/name:split)")
    if not rows:
        raise ValueError(f"{source}: no rows")
    return [row | {"domain": row.get("domain") or path.name.split(".")[0]} if isinstance(row, dict) else row for row in rows]


def parse(row, kind):
    """A raw row -> [dict(prompt: [message], responses: [str], scores: [float], style: [int])]; ValueError if it has no known shape.
    kind: "sft" for demonstrations, else preferences."""
    as_messages = lambda x, role="user": [dict(role=role, content=x)] if isinstance(x, str) else list(x)
    row = {k: v for k, v in row.items() if v is not None}
    out = lambda prompt, responses, scores, style=(): dict(prompt=prompt, responses=responses, scores=scores, style=list(style))
    if kind == "sft":
        paired = {"prompt", "completion"} <= set(row)
        turns = as_messages(row["prompt"]) + as_messages(row["completion"], "assistant") if paired else row.get("messages", [])
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and k]
        if not answers:
            raise ValueError(f"has the keys {sorted(row)}; a demonstration has prompt and completion, or messages with an answer")
        return [out(turns[:k], [turns[k]["content"]], [1.0]) for k in answers]
    if "all_scores" in row:  # RM-Robustness
        texts = [row[f"response_{k + 1}_text"] for k in range(len(row["all_scores"]))]
        return [out(as_messages(row["instruction"]), texts, row["all_scores"])]
    if {"prompt", "responses", "scores"} <= set(row):
        if len(row["responses"]) != len(row["scores"]):
            raise ValueError(f"has {len(row['responses'])} responses but {len(row['scores'])} scores")
        return [out(as_messages(row["prompt"]), row["responses"], row["scores"])]
    if not {"chosen", "rejected"} <= set(row):
        raise ValueError(f"has the keys {sorted(row)}; a preference has prompt, chosen and rejected, or prompt, responses and scores")
    chosen, rejected = as_messages(row["chosen"], "assistant"), as_messages(row["rejected"], "assistant")
    if isinstance(chosen[0], str):  # RM-Bench
        if (len(chosen), len(rejected)) != (3, 3):
            raise ValueError(f"has {len(chosen)} chosen and {len(rejected)} rejected answers; RM-Bench has three of each")
        return [out(as_messages(row["prompt"]), chosen + rejected, [1.0] * 3 + [0.0] * 3, [0, 1, 2] * 2)]
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("has chosen and rejected answers to different conversations")
    if len(chosen) == 1 and "prompt" not in row:
        raise ValueError("has no prompt: give `prompt`, or message lists that begin with it")
    scores = [float(row.get("score_chosen", 1)), float(row.get("score_rejected", 0))]
    scores = scores if scores[0] > scores[1] else [1.0, 0.0]  # the label decides, also where the data's own scores tie
    return [out(chosen[:-1] or as_messages(row["prompt"]), [chosen[-1]["content"], rejected[-1]["content"]], scores)]


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
    """Messages -> text by the chat template. A system message that it refuses is folded into the first user message; a BOS that
    it does not print is added where the tokenizer itself would."""
    try:
        text = tok.apply_chat_template(messages, tokenize=False, **kwargs)
    except jinja2.TemplateError:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise
        first = dict(messages[1], content=messages[0]["content"] + "\n\n" + messages[1]["content"])
        return render(tok, [first, *messages[2:]], **kwargs)
    bare = tok.bos_token and not text.startswith(tok.bos_token) and tok("").input_ids[:1] == [tok.bos_token_id]
    return tok.bos_token + text if bare else text


@functools.lru_cache(8)
def end_of_turn(tok):
    """(id of the token that ends an answer, the text that the template puts after one). The first special token there, else EOS."""
    tail = render(tok, [dict(role="user", content="x"), dict(role="assistant", content="PROBE")]).rpartition("PROBE")[2]
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    return next((i for i in tok(tail, add_special_tokens=False).input_ids if i in special), tok.eos_token_id), tail


class Dropped(Exception):
    """Why a response is left out; counted in the report."""


def encode_prompt(tok, messages):
    """Token ids of head = template(messages, generation prompt); one BOS if the model has one."""
    ids = tok(render(tok, messages, add_generation_prompt=True), add_special_tokens=False).input_ids
    if tok.bos_token_id not in (None, tok.eos_token_id) and ids.count(tok.bos_token_id) > 1:
        raise Dropped("more than one BOS")
    return ids


def encode_response(tok, messages, answer, prompt):
    """Token ids of an answer to the prompt with the ids `prompt`: full = template(messages + answer), response = full[len(head):],
    which ends in its one end token. An answer is never templated alone."""
    end, tail = end_of_turn(tok)
    full = render(tok, [*messages, dict(role="assistant", content=answer)])
    ids = tok(full[: len(full) - len(tail)] + tok.convert_ids_to_tokens(end), add_special_tokens=False).input_ids
    if ids[: len(prompt)] != prompt:
        if not full.startswith(head := render(tok, messages, add_generation_prompt=True)):
            raise ValueError(f"the chat template is not prefix-stable: {full[: len(head)]!r} is not {head!r}")
        raise Dropped("tokens merge across the prompt's end")
    if ids.index(end, len(prompt)) != len(ids) - 1:
        raise Dropped("end token inside an answer")
    return ids[len(prompt) :]


def decode(tok, ids):
    """The text of a response: without special tokens, otherwise as it was written."""
    return tok.decode(ids, skip_special_tokens=True)


def encode_row(row, tok, max_length):
    """Tokenise one parsed row; `dropped` names why responses were left out. RM-Bench rows stand whole, a list may lose some;
    a row with too few left loses all."""
    prompt, responses, scores, dropped = [], [], [], []
    for text, score in zip(row["responses"], row["scores"]):
        try:
            if not text.strip():
                raise Dropped("empty")
            prompt = prompt or encode_prompt(tok, row["prompt"])
            ids = encode_response(tok, row["prompt"], text, prompt)
            if len(prompt) + len(ids) > max_length:
                raise Dropped("over-long")
            if ids in responses:
                raise Dropped("equal responses")
            responses.append(ids), scores.append(float(score))
        except Dropped as reason:
            dropped.append(str(reason))
    if len(responses) < (len(row["responses"]) if row["style"] else min(2, len(row["responses"]))):
        responses = []
    return dict(row, prompt=prompt, responses=responses, scores=scores, dropped=dropped)


# ------------------------------------------------------------------------------------------------------- rows, report, disk
def build(source, tok, args, kind):
    """Source -> (`datasets.Dataset` in the schema above, its part of the report). ValueError with the row's number on bad input."""
    from datasets import Dataset, Features, List, Value

    raw, parsed, seen, dropped = read_source(source, args.seed), [], set(), Counter()
    for k, row in enumerate(tqdm.tqdm(raw, desc=f"read {source}", unit="row", mininterval=1)):
        try:
            items = parse(row, kind)
            if any(not isinstance(t, str) for item in items for t in item["responses"]):
                raise ValueError("has an answer that is not a string")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{source}, row {k + 1}: {error if isinstance(error, ValueError) else repr(error)}") from None
        source_row = dict(id=str(row.get("id") or row.get("prompt_id") or k), domain=row.get("domain") or "",
                          meta=json.dumps(row, ensure_ascii=False, default=str))
        for item in items:
            key = hashlib.sha256(json.dumps([item["prompt"], item["responses"]]).encode()).digest()
            dropped["duplicate"] += key in seen
            parsed += [item | source_row] if key not in seen else []
            seen.add(key)
    features = Features(
        id=Value("string"), prompt=List(Value("int32")), responses=List(List(Value("int32"))), scores=List(Value("float64")),
        domain=Value("string"), style=List(Value("int32")), meta=Value("string"), dropped=List(Value("string")))
    rows = Dataset.from_list(parsed).map(
        encode_row, fn_kwargs=dict(tok=tok, max_length=args.max_length), features=features,
        desc=f"tokenise {source}", num_proc=min(32, os.cpu_count()) if len(parsed) > 300 else None)
    for reasons, responses in zip(rows["dropped"], rows["responses"]):  # whole rows by their first reason, else single responses
        dropped.update([f"{reason} (response of a list)" for reason in reasons] if responses else reasons[:1])
    rows = rows.filter(lambda r: len(r) > 0, input_columns="responses").remove_columns("dropped")
    if not len(rows):
        raise ValueError(f"{source}: nothing is left of {len(raw)} rows; dropped: {dict(dropped)}")
    return rows, describe(rows, len(raw), dropped, source)


def describe(rows, rows_in, dropped, source):
    """The report of one data set: counts, length percentiles in tokens, how often the longer response is the better one."""
    lengths = [[len(r) for r in rs] for rs in rows["responses"]]
    wins = [a > b for n, s in zip(lengths, rows["scores"]) for a, x in zip(n, s) for b, y in zip(n, s) if x > y]
    percentiles = lambda x: {p: sorted(x)[min(len(x) - 1, len(x) * p // 100)] for p in (5, 50, 95, 100)}
    return dict(source={part: fingerprint(part) for part in source.split(",")}, rows_in=rows_in, kept=len(rows),
                dropped={k: v for k, v in dropped.items() if v}, prompt_tokens=percentiles(list(map(len, rows["prompt"]))),
                response_tokens=percentiles(sum(lengths, [])), longer_wins=round(sum(wins) / len(wins), 4) if wins else None)


def batch_indices(n, batch_size, seed, step):
    """Data order, a pure function: the indices of global batch `step` out of n items. The last batch of an epoch may be smaller."""
    epoch, k = divmod(step, -(-n // batch_size))
    return random.Random(f"order {seed} {epoch}").sample(range(n), n)[k * batch_size : (k + 1) * batch_size]


def fingerprint(path):
    """Hash of a local file or folder: names, sizes, and the first and last MiB of each file. A hub id stands for itself."""
    digest, top = hashlib.sha256(), Path(path)
    for f in sorted(p for p in [top, *top.rglob("*")] if p.is_file()):
        with open(f, "rb") as data:
            head, size = data.read(1 << 20), f.stat().st_size
            data.seek(max(0, size - (1 << 20)))
            digest.update(f"{f.relative_to(top)} {size}".encode() + head + data.read())
    return digest.hexdigest()[:16] if top.exists() else str(path)


def begin(out, args, inputs=(), redo=False):
    """None if OUT is complete; else a function that makes OUT.partial, where a stage writes, and returns it.

    `args.json` there says what makes the result. A result of other arguments, or of inputs that have changed since, is never
    overwritten, ValueError says what differs; unless redo, for what is cheap to make again.
    """
    neutral = {"out", "save_every", "tokens_per_forward"}
    now = {k: v for k, v in vars(args).items() if k not in neutral} | {"inputs": {str(p): fingerprint(p) for p in inputs if p}}
    now = json.loads(json.dumps(now, default=str))
    for folder in (Path(out), Path(f"{out}.partial")):
        if (folder / "args.json").exists():
            old = json.loads((folder / "args.json").read_text())
            diff = [f"{k}: {old.get(k)} -> {now.get(k)}" for k in sorted(old | now) if old.get(k) != now.get(k)]
            if diff and not redo:
                raise ValueError(f"{folder} holds a run with other arguments ({'; '.join(diff)}); remove it or choose another --out")
            if folder == Path(out) and not diff:
                return None
        elif folder.exists():
            raise ValueError(f"{folder} exists and is not a result of this script; choose another --out")

    def make():
        folder.mkdir(parents=True, exist_ok=True)  # OUT.partial
        (folder / "args.json").write_text(json.dumps(now, indent=1))
        return folder

    return make


def run(main, parser):
    """Parse and run; a bad argument or input is one line on stderr and exit code 1."""
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).strip().splitlines()[0]}")


def main(args):
    toy = args.model == "toy"
    jobs = dict(sft=args.sft or toy and "toy:sft", train=args.prefs or toy and "toy:prefs")
    for item in args.eval or [f"{split}=toy:{split}" for split in list(SPLITS)[2:]] * toy:
        name, _, source = item.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not source:
            raise ValueError(f"--eval {item}: wanted NAME=SOURCE")
        jobs[f"eval/{name}"] = source
    jobs = {name: source for name, source in jobs.items() if source}
    tok = None if toy else load_tokenizer(args.model)
    make = begin(args.out, args, [part for source in jobs.values() for part in source.split(",")] + [args.model])
    if make is None:
        return print(f"{args.out} is complete")
    out = make()
    try:
        if toy:
            texts = [f"<user>{r['prompt']}<end><assistant>{r['completion']}<end>" for r in toy_rows("sft", args.seed)]
            toy_model(out / "model", texts, args.seed)
            tok = load_tokenizer(out / "model")
        tok.save_pretrained(out / "tokenizer")
        report, prompts = dict(tokenizer=fingerprint(out / "tokenizer"), template=tok.chat_template, sets={}), {}
        for name, source in jobs.items():
            rows, report["sets"][name] = build(source, tok, args, name.split("/")[0])
            prompts[name] = set(map(tuple, rows["prompt"]))
            if "train" in prompts and name != "train":
                report["sets"][name]["prompts_in_train"] = len(prompts[name] & prompts["train"])
            rows.save_to_disk(out / name)
            print(f"{name}: {report['sets'][name]}")
            print(f"  {tok.decode(rows[0]['prompt'])!r} [[ {tok.decode(rows[0]['responses'][0])!r} ]]   <- the scored span")
        (out / "report.json").write_text(json.dumps(report, indent=1))
        os.replace(out, args.out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    print(f"wrote {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="where the tokenizer comes from: toy, a hub id or a folder")
    parser.add_argument("--sft", help="source of demonstrations")
    parser.add_argument("--prefs", help="source of preferences for training")
    parser.add_argument("--eval", nargs="*", default=[], metavar="NAME=SOURCE", help="sources of preferences for evaluation")
    parser.add_argument("--out", required=True, help="folder to write; it appears when complete")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt + response; longer ones are dropped")
    parser.add_argument("--seed", type=int, default=0, help="of the toy world")
    run(main, parser)

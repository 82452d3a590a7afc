"""Text -> token ids on disk. Owns text: sources, chat templates, tokens, the toy world; row order.

Every data set becomes a `datasets` folder of rows, a prompt with n scored responses each:

    id: str   prompt: list[int]   responses: list[list[int]]   scores: list[float]
    domain: str   style: list[int]   meta: str (the source row as JSON)

n is 1 for demonstrations, 2 for pairs (scores [1, 0] or the data's own), 6 for RM-Bench. A prompt
holds the one BOS (if the model has one) and the generation prompt, a response one end token, last.

    python prepare_data.py --model toy --out runs/data       # the toy world with all its sets: 40 s
    python prepare_data.py --model DIR --sft a.jsonl --prefs b.jsonl --eval ID=c.jsonl --out D

A source is toy:SPLIT[+noise=0.2], a hub id (or id:split), a .json / .jsonl / .jsonl.gz / .parquet
file, a folder of those, or a `datasets` folder; commas join several. Rows are told apart by keys:

    {prompt, completion}  {messages}        demonstrations, one for each assistant turn
    {prompt, chosen, rejected}              a pair: strings, or message lists
    {prompt, responses, scores}             a scored list
    {instruction, response_1_text, ..., all_scores}   the same in RM-Robustness (arXiv 2505.07271)
    {prompt, chosen[3], rejected[3]}        RM-Bench (arXiv 2410.16184): concise, detailed, markdown

Writes OUT/sft, train, eval/NAME, tokenizer (with the chat template), report.json; for toy also model.
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
import zlib
from collections import Counter
from pathlib import Path

import jinja2
import transformers

# --------------------------------------------------------------------------------- the toy world
# Lists of digits, tasks with one right answer, writers of different skill, three styles. Labels: for training
# Bradley-Terry on true reward plus a taste for rich style, for evaluation true reward. OOD: absent from preferences only.
TASKS = {  # name: (domain, request, right answer); the last four are held out of the preferences
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
substitute = lambda rng, y, x: [
    *y[: (i := rng.randrange(len(y)))], (y[i] + rng.randrange(1, 10)) % 10, *y[i + 1 :]]
WRITERS = {  # name: (how often right, else (rng, right answer, given list) -> wrong answer)
    "expert": (0.95, substitute),
    "good": (0.75, substitute),
    "sloppy": (0.40, lambda rng, y, x: substitute(rng, substitute(rng, y, x), x)),
    "lazy": (0.40, lambda rng, y, x: y[: max(1, len(y) - rng.choice([1, 2]))]),
    "mixer": (0.40, lambda rng, y, x: y[:-2] + y[-2:][::-1]),
    "parrot": (0.40, lambda rng, y, x: x),  # the last three are held out of the preferences
    "stutterer": (0.40, lambda rng, y, x: [*y[: (i := rng.randrange(len(y))) + 1], *y[i:]]),
    "off_by_one": (0.40, lambda rng, y, x: [(d + 1) % 10 for d in y]),
}
STYLES = (  # concise, detailed, markdown: (nats by which the labeller favours it, text)
    (0.0, "It is {answer}"),
    (0.4, "You gave me the list {given}. {request}, you said. Here is the result: {answer}"),
    (0.8, "**Result:**\n- {items}"),
)
SEEN, UNSEEN, KNOWN, NEW = [*TASKS][:8], [*TASKS][8:], [*WRITERS][:5], [*WRITERS][5:]
SPLITS = {  # name: rows, tasks, writers, responses of a row, part (0, 1, 2 never share a prompt)
    "sft": (16_000, [*TASKS], [*WRITERS], 1, 0),
    "prefs": (4_096, SEEN, KNOWN, 2, 1),
    "ID": (1_000, SEEN, KNOWN, 2, 2),
    "Prompt-OOD": (500, UNSEEN, KNOWN, 4, 2),
    "Response-OOD": (500, SEEN, NEW, 4, 2),
    "Mutual-OOD": (500, UNSEEN, NEW, 4, 2),
    "RM-Bench": (400, [*TASKS], [*WRITERS], 6, 2),
}

def true_reward(meta, text):
    """In [0, 2]: the share of items in the right place, plus 1 if all is right. meta: a row's, JSON or its dict."""
    truth = (json.loads(meta) if isinstance(meta, str) else meta)["answer"]
    found = [int(d) for d in re.findall(r"\d", text.rsplit(":", 1)[-1])]  # after the last colon
    right = sum(a == b for a, b in zip(found, truth))
    return right / max(len(found), len(truth)) + (found == truth)

@functools.lru_cache
def toy_rows(split, seed):
    """The rows of a split of the toy world, in the shapes that real data have. Deterministic."""
    split, _, noise = split.partition("+noise=")
    if split not in SPLITS:
        raise ValueError(f"toy:{split}: the toy world has no such split, but {', '.join(SPLITS)}")
    size, tasks, writers, n, part = SPLITS[split]
    rng, rows, flips = random.Random(f"toy {split} {seed}"), [], random.Random(f"noise {seed}")
    while len(rows) < size:
        task, x = rng.choice(tasks), [rng.randrange(10) for _ in range(rng.randrange(3, 7))]
        if "0000011122"[zlib.crc32(f"{task} {x}".encode()) % 10] == str(part):
            row = toy_row(rng, task, x, writers, n, part)
            rows += [row | dict(id=f"toy-{split}-{len(rows)}")] if row else []
            if row and noise and flips.random() < float(noise):
                rows[-1] |= dict(chosen=row["rejected"], rejected=row["chosen"])
    return rows

def toy_row(rng, task, x, writers, n, part):
    """One row, or None for a draw that compares nothing."""
    domain, request, solve = TASKS[task]
    truth, join = solve(x), lambda y, by=" ": by.join(map(str, y))
    row = dict(prompt=f"{request}: {join(x)}", task=task, answer=truth)
    write = lambda y, style: STYLES[style][1].format(
        request=request, given=join(x), answer=join(y), items=join(y, "\n- "))
    if n == 6:  # the right and a wrong answer, each in three styles
        wrong = WRITERS[rng.choice(writers)][1](rng, truth, x)
        good, bad = ([write(y, style) for style in range(3)] for y in (truth, wrong))
        return row | dict(domain=domain, chosen=good, rejected=bad) if wrong != truth else None
    weights = [4, 4] + [1] * (len(writers) - 2) if part == 0 else None  # SFT data is mostly good
    styles, texts = rng.choices(range(3), k=n), []
    for style, (skill, slip) in zip(styles, map(WRITERS.get, rng.choices(writers, weights, k=n))):
        texts.append(write(truth if rng.random() < skill else slip(rng, truth, x), style))
    rewards = [true_reward(row, text) for text in texts]
    if n == 1:
        return row | dict(completion=texts[0])
    if len(set(texts)) < n or len(set(rewards)) == 1:
        return None
    if n == 4:
        return row | dict(responses=texts, scores=rewards)
    gap = rewards[0] - rewards[1]
    taste = 2 * gap + STYLES[styles[0]][0] - STYLES[styles[1]][0]
    first = gap > 0 if part == 2 else rng.random() < 1 / (1 + math.exp(-taste))
    return row | dict(zip(("chosen", "rejected") if first else ("rejected", "chosen"), texts))

def toy_model(out, seed):
    """A random 0.77M-parameter Llama and a byte-level BPE tokenizer, an ordinary model folder."""
    import tokenizers
    import torch

    bpe, special = tokenizers.ByteLevelBPETokenizer(), ["<pad>", "<bos>", "<user>", "<assistant>", "<end>"]
    texts = [row["prompt"] + " " + row["completion"] for row in toy_rows("sft", seed)]
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=special, show_progress=False)
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False)
    tok.chat_template = ("{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)).save_pretrained(out)
    tok.save_pretrained(out)

# --------------------------------------------------------------------------- sources and shapes
def read_source(source, seed=0):
    """The raw rows of a source, dicts. Without a `domain` they get the file's stem as theirs."""
    if "," in source:
        return [row for part in source.split(",") if part for row in read_source(part, seed)]
    if source.startswith("toy:"):
        return toy_rows(source[4:], seed)
    path, files = Path(source), r".*\.(jsonl?(\.gz)?|parquet)"
    if path.is_file() and path.suffix != ".parquet":
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
                text = f.read()
            lines = [text] if text.lstrip()[:1] == "[" else filter(str.strip, text.split("\n"))
            rows = [row for x in map(json.loads, lines) for row in (x if isinstance(x, list) else [x])]
        except ValueError as error:
            raise ValueError(f"{source}: not JSON, nor JSON lines ({error})") from None
    elif path.is_dir() and not list(path.glob("dataset_*.json")):
        names = sorted(str(f) for f in path.iterdir() if re.fullmatch(files, f.name))
        rows = [row for name in names for row in read_source(name, seed)]
    else:
        import datasets

        if path.is_file():
            rows = datasets.Dataset.from_parquet(source).to_list()
        elif path.is_dir():
            rows = datasets.load_from_disk(source)
            rows = [row for part in (rows.values() if isinstance(rows, dict) else [rows]) for row in part]
        elif re.fullmatch(files, source) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:\S+)?", source):
            raise ValueError(f"{source}: no such file or folder, nor a hub id (owner/name[:split])")
        else:
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train").to_list()
    if not rows:
        raise ValueError(f"{source}: no rows")
    return [row | dict(domain=row.get("domain") or path.name.split(".")[0]) if isinstance(row, dict) else row for row in rows]

messages = lambda x, role="user": [dict(role=role, content=x)] if isinstance(x, str) else list(x)

def parse_demonstrations(row):
    """A raw row -> [(prompt messages, [response], [score], style)], one for each assistant turn."""
    turns = row.get("messages", [])
    if {"prompt", "completion"} <= set(row):
        turns = messages(row["prompt"]) + messages(row["completion"], "assistant")
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and k]
    if not answers:
        raise ValueError(f"has the keys {[*row]}, not prompt and completion, or messages with an answer")
    return [(turns[:k], [turns[k]["content"]], [1.0], []) for k in answers]

def parse_preference(row):
    """A raw row -> (prompt messages, responses, scores, styles); ValueError if it is none."""
    if scores := row.get("all_scores"):  # RM-Robustness
        texts = [row[f"response_{k + 1}_text"] for k in range(len(scores))]
        row = dict(prompt=row["instruction"], responses=texts, scores=scores)
    if {"prompt", "responses", "scores"} <= set(row):
        texts, scores = row["responses"], [float(score) for score in row["scores"]]
        if not isinstance(texts, list) or len(texts) != len(scores) or not all(map(math.isfinite, scores)):
            raise ValueError("has not a list of responses and a finite score for each")
        return messages(row["prompt"]), texts, scores, []
    if not {"chosen", "rejected"} <= set(row):
        raise ValueError(f"has the keys {[*row]}, not prompt, chosen, rejected, or prompt, responses, scores")
    chosen, rejected = (messages(row[key], "assistant") for key in ("chosen", "rejected"))
    if isinstance(chosen[0], str):  # RM-Bench
        if (len(chosen), len(rejected)) != (3, 3):
            raise ValueError(f"has {len(chosen)} and {len(rejected)} answers; RM-Bench has 3 and 3")
        return messages(row["prompt"]), chosen + rejected, [1.0] * 3 + [0.0] * 3, [0, 1, 2] * 2
    if chosen[:-1] != rejected[:-1] or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("has chosen and rejected that are not two answers to one conversation")
    scores = [float(row.get("score_chosen", 1)), float(row.get("score_rejected", 0))]
    scores = scores if scores[0] > scores[1] else [1.0, 0.0]  # the label decides, also in a tie
    texts = [chosen[-1]["content"], rejected[-1]["content"]]
    prompt = max(chosen[:-1], messages(row.get("prompt", [])), key=len)  # either may hold it
    return prompt, texts, scores, []

# ------------------------------------------------------------------------ chat template, tokens
PLAIN_TEMPLATE = (  # for tokenizers that have none; saved with the model
    "{{ bos_token or '' }}{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}")

def load_tokenizer(path):
    """The tokenizer of a folder or hub id, with its own chat template or PLAIN_TEMPLATE."""
    try:
        tok = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        raise ValueError(f"{path}: neither a model folder nor a hub id within reach") from None
    tok.chat_template = tok.chat_template or PLAIN_TEMPLATE
    if tok.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end token (eos_token)")
    return tok

def render(tok, turns, **kwargs):
    """Messages -> text by the chat template. A system message that it refuses is folded into the
    first user message; a BOS that it does not print is added where the tokenizer would."""
    try:
        text = tok.apply_chat_template(turns, tokenize=False, **kwargs)
    except jinja2.TemplateError:
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise Dropped("refused by the chat template") from None
        first = dict(turns[1], content=turns[0]["content"] + "\n\n" + turns[1]["content"])
        return render(tok, [first, *turns[2:]], **kwargs)
    bos = tok.bos_token
    bare = bos and not text.startswith(bos) and tok("").input_ids[:1] == [tok.bos_token_id]
    return bos + text if bare else text

@functools.lru_cache(8)
def end_of_turn(tok):
    """(id of the token that ends an answer, the text that the template puts after it): its first special, or EOS."""
    turns = [dict(role="user", content="x"), dict(role="assistant", content="PROBE")]
    tail = render(tok, turns).rpartition("PROBE")[2]
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    ids = tok(tail, add_special_tokens=False).input_ids
    return next((i for i in ids if i in special), tok.eos_token_id), tail

class Dropped(Exception):
    """Why a response is left out; counted in the report."""

def encode_prompt(tok, turns):
    """Token ids of head = template(turns, generation prompt), with one BOS if the model has one."""
    ids = tok(render(tok, turns, add_generation_prompt=True), add_special_tokens=False).input_ids
    if tok.bos_token_id not in (None, tok.eos_token_id) and ids.count(tok.bos_token_id) > 1:
        raise Dropped("more than one BOS")
    return ids

def encode_response(tok, turns, answer, prompt):
    """Token ids of an answer to the prompt with the ids `prompt`, one end token last:
    full = template(turns + answer), response = full[len(head):]. No answer is templated alone."""
    end, tail = end_of_turn(tok)
    full = render(tok, [*turns, dict(role="assistant", content=answer)])
    text = full[: len(full) - len(tail)] + tok.convert_ids_to_tokens(end)
    ids = tok(text, add_special_tokens=False).input_ids
    if ids[: len(prompt)] != prompt:
        head = render(tok, turns, add_generation_prompt=True)
        if not full.startswith(head):
            raise ValueError(f"the chat template is not prefix-stable: {full!r} after {head!r}")
        raise Dropped("tokens merge across the prompt's end")
    if {end, tok.bos_token_id, tok.eos_token_id} & {*ids[len(prompt) : -1]}:
        raise Dropped("special token inside an answer")
    return ids[len(prompt) :]

def decode(tok, ids):
    """The text of a response, without special tokens."""
    return tok.decode(ids, skip_special_tokens=True)

def encode_row(row, tok, max_length):
    """Tokenise a parsed row. `dropped`: why responses were left out; a list may lose some, an RM-Bench row all."""
    prompt, responses, scores, dropped = [], [], [], []
    for text, score in zip(row["responses"], row["scores"]):
        try:
            if not text.strip():
                raise Dropped("empty")
            prompt = prompt or encode_prompt(tok, row["prompt"])
            ids = encode_response(tok, row["prompt"], text, prompt)
            if len(prompt) + len(ids) > max_length:
                raise Dropped("over-long")
            if ids in responses and (not row["style"] or score != scores[responses.index(ids)]):
                raise Dropped("equal responses")
            responses, scores = [*responses, ids], [*scores, float(score)]
        except Dropped as reason:
            dropped.append(str(reason))
    n = len(row["responses"])
    enough = len(responses) >= (n if row["style"] else min(2, n))
    return dict(row, prompt=prompt, responses=responses * enough, scores=scores, dropped=dropped)

# ----------------------------------------------------------------------------------- rows, disk
def parse_rows(source, raw, kind, dropped):
    """Raw rows -> parsed ones without duplicates; ValueError with the number of a bad row."""
    parsed = {}
    for k, row in enumerate(raw):
        try:
            clean = {key: value for key, value in row.items() if value is not None}
            items = parse_demonstrations(clean) if kind == "sft" else [parse_preference(clean)]
            for prompt, responses, _, _ in items:
                texts = [*responses, *(turn["content"] for turn in prompt)]
                if not prompt or not all(isinstance(text, str) for text in texts):
                    raise ValueError("has no prompt, or a text that is not a string")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            what = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{source}, row {k + 1}: {what}") from None
        meta = json.dumps(row, ensure_ascii=False, default=str)
        name = str(clean.get("id", clean.get("prompt_id", k)))
        for item in items:
            key = hashlib.sha256(json.dumps(item[:2]).encode()).digest()
            dropped["duplicate"] += key in parsed
            item = dict(zip(("prompt", "responses", "scores", "style"), item))
            parsed.setdefault(key, dict(item, id=name, domain=row.get("domain", ""), meta=meta))
    return list(parsed.values())

def build(source, tok, args, kind):
    """A source -> (its `datasets.Dataset`, its part of the report)."""
    from datasets import Dataset, Features, List, Value

    raw, dropped, tokens = read_source(source, args.seed), Counter(), List(Value("int32"))
    parsed = parse_rows(source, raw, kind, dropped)
    features = Features(id=Value("string"), prompt=tokens, responses=List(tokens), scores=List(Value("float64")),
        domain=Value("string"), style=tokens, meta=Value("string"), dropped=List(Value("string")))
    rows = Dataset.from_list(parsed).map(
        encode_row, fn_kwargs=dict(tok=tok, max_length=args.max_length), features=features,
        desc=f"tokenise {source}", num_proc=min(32, os.cpu_count()) if len(parsed) > 300 else None)
    for reasons, responses in zip(rows["dropped"], rows["responses"]):
        dropped.update([f"{x} (one of a list)" for x in reasons] if responses else reasons[:1])
    rows = rows.filter(lambda r: len(r) > 0, input_columns="responses").remove_columns("dropped")
    if not len(rows):
        raise ValueError(f"{source}: nothing is left of {len(raw)} rows; dropped {dict(dropped)}")
    lengths = [[len(r) for r in rs] for rs in rows["responses"]]
    both = [list(zip(*row)) for row in zip(lengths, rows["scores"])]
    wins = [n > m for row in both for n, x in row for m, y in row if x > y]
    percentiles = lambda x: {p: sorted(x)[(len(x) - 1) * p // 100] for p in (5, 50, 95, 100)}
    return rows, dict(
        source={part: fingerprint(part) for part in source.split(",") if part}, rows_in=len(raw),
        kept=len(rows), dropped={reason: n for reason, n in dropped.items() if n},
        prompt_tokens=percentiles([len(p) for p in rows["prompt"]]), response_tokens=percentiles(sum(lengths, [])),
        longer_wins=round(sum(wins) / len(wins), 4) if wins else None)

def load_rows(path):
    """The rows of a prepared folder. ValueError if it is none, or damaged."""
    import datasets
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a folder that prepare_data.py wrote, or damaged ({error})") from None

def batch_indices(n, batch_size, seed, step):
    """Data order, a pure function: the positions of global batch `step` among n items. An epoch is
    a permutation, and its last batch may be smaller."""
    epoch, k = divmod(step, -(-n // batch_size))
    order = random.Random(f"order {seed} {epoch}").sample(range(n), n)
    return order[k * batch_size : (k + 1) * batch_size]

def fingerprint(path):
    """Hash of a file or folder: names, sizes, first and last MiB of the files. A hub id is its own."""
    digest, top = hashlib.sha256(), Path(path)
    for f in sorted(p for p in [top, *top.rglob("*")] if p.is_file()):
        with open(f, "rb") as data:
            head, size = data.read(1 << 20), f.stat().st_size
            data.seek(max(0, size - (1 << 20)))
            digest.update(f"{f.relative_to(top)} {size}".encode() + head + data.read())
    return digest.hexdigest()[:16] if top.exists() else str(path)

def begin(out, args, inputs, redo=False):
    """None if OUT is complete; else a function that makes OUT.partial, to write in, and returns it. Its args.json
    says what makes the result. One of other arguments or inputs is not overwritten (ValueError) unless redo."""
    now = vars(args) | dict(out="", save_every=0, tokens_per_forward=0)  # these make no difference
    now = json.loads(json.dumps(now | dict(inputs={p: fingerprint(p) for p in inputs})))
    for folder in (Path(out), Path(f"{out}.partial")):
        if (folder / "args.json").exists():
            old = json.loads((folder / "args.json").read_text())
            diff = "; ".join(f"{k}: {old.get(k)} -> {now.get(k)}" for k in sorted(old | now) if old.get(k) != now.get(k))
            if diff and not redo:
                raise ValueError(f"{folder} is of other arguments ({diff}); remove it or change --out")
            if folder == Path(out) and not diff:
                return None
        elif folder.exists() and {f.name for f in folder.iterdir()} - {"args.draft"}:  # else killed before it had one
            raise ValueError(f"{folder} exists and is not of this script; choose another --out")

    def make():
        folder.mkdir(parents=True, exist_ok=True)  # OUT.partial
        (folder / "args.draft").write_text(json.dumps(now, indent=1))
        return (folder / "args.draft").replace(folder / "args.json").parent

    return make

def run(main, parser):
    """Parse and run; a bad argument or input is one line on stderr and exit code 1."""
    try:
        return main(parser.parse_args())
    except (ValueError, OSError) as error:
        message = str(error).strip().splitlines()[0]
    raise SystemExit(f"{parser.prog}: {message}")  # out here, so that what main held is closed, progress bars too

def main(args):
    toy = args.model == "toy"
    jobs = dict(sft=args.sft or toy and "toy:sft", train=args.prefs or toy and "toy:prefs")
    for item in args.eval or [f"{split}=toy:{split}" for split in [*SPLITS][2:]] * toy:
        name, _, source = item.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not source or f"eval/{name}" in jobs:
            raise ValueError(f"--eval {item}: wanted NAME=SOURCE, each name once")
        jobs[f"eval/{name}"] = source
    jobs = {name: source for name, source in jobs.items() if source}
    tok = None if toy else load_tokenizer(args.model)
    make = begin(args.out, args, [args.model, *filter(None, ",".join(jobs.values()).split(","))])
    if make is None:
        return print(f"{args.out} is complete")
    out = make()
    try:
        if toy:
            toy_model(out / "model", args.seed)
            tok = load_tokenizer(out / "model")
        tok.save_pretrained(out / "tokenizer")
        report, prompts = dict(tokenizer=fingerprint(out / "tokenizer"), template=tok.chat_template, sets={}), {}
        for name, source in jobs.items():
            rows, report["sets"][name] = build(source, tok, args, name.split("/")[0])
            prompts[name] = set(map(tuple, rows["prompt"]))
            if "train" in prompts and name != "train":
                report["sets"][name]["prompts_in_train"] = len(prompts[name] & prompts["train"])
            rows.save_to_disk(out / name)
            head, span = tok.decode(rows[0]["prompt"]), tok.decode(rows[0]["responses"][0])
            print(f"{name}: {report['sets'][name]}\n  {head!r} [[ {span!r} ]]   <- the scored span")
        (out / "report.json").write_text(json.dumps(report, indent=1))
        os.replace(out, args.out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    print(f"wrote {args.out}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="where the tokenizer comes from: toy, a hub id or a folder")
    add("--sft", help="source of demonstrations")
    add("--prefs", help="source of preferences to train on")
    add("--eval", nargs="*", default=[], metavar="NAME=SOURCE", help="preferences to evaluate on")
    add("--out", required=True, help="folder to write; it appears when complete")
    add("--max-length", type=int, default=2048, help="tokens; longer pairs are dropped (2048)")
    add("--seed", type=int, default=0, help="of the toy world")
    run(main, parser)

"""Text -> token ids on disk. Owns text: sources, chat templates, tokens, and the toy world.

Every data set becomes a `datasets` folder of rows, a prompt with n scored responses each:

    id: str   prompt: list[int]   responses: list[list[int]]   scores: list[float]
    domain: str   style: list[int]   meta: str (the source row as JSON)

n: demonstrations 1, pairs 2, RM-Bench 6. A prompt ends with the generation prompt, a response with its one end token.

    python prepare_data.py --model toy --out runs/data       # the toy world with all its sets: 20 s
    python prepare_data.py --model DIR --sft a.jsonl --prefs b.jsonl --eval ID=c.jsonl --out D

A source is toy:SPLIT[+noise=P or +hard=P], a hub id (id[@revision][:split]), a .json / .jsonl / .gz
/ .parquet file, a `datasets` folder, a set written here, a folder of those; commas join several.
"""

import ctypes
import functools
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import tokenizers
import transformers

def check(condition, message, error=ValueError):
    if not condition:
        raise error(message)

# --------------------------------------------------------------------------------- the toy world
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
    "even": ("select", "Keep the items at even positions", lambda x: x[1::2])}
def substitute(rng, y, x):
    i = rng.randrange(len(y))
    return [*y[:i], (y[i] + rng.randrange(1, 10)) % 10, *y[i + 1 :]]

WRITERS = {  # name: (how often right, else (rng, right answer, given list) -> wrong answer)
    "expert": (0.95, substitute), "good": (0.75, substitute),
    "sloppy": (0.40, lambda rng, y, x: substitute(rng, substitute(rng, y, x), x)),
    "lazy": (0.40, lambda rng, y, x: y[: max(1, len(y) - rng.choice([1, 2]))]),
    "mixer": (0.40, lambda rng, y, x: y[:-2] + y[-2:][::-1]),
    "parrot": (0.40, lambda rng, y, x: x),  # the last three are held out of the preferences
    "stutterer": (0.40, lambda rng, y, x: rng.choice([y[: i + 1] + y[i:] for i in range(len(y))])),
    "off_by_one": (0.40, lambda rng, y, x: [(d + 1) % 10 for d in y])}
STYLES = (  # concise, detailed, markdown: (nats by which the labeller favours it, text)
    (0.0, "It is {answer}"), (0.4, "You gave me the list {given}. {request}, you said. Here is the result: {answer}"),
    (0.8, "**Result:**\n- {items}"))
SEEN, UNSEEN, KNOWN, NEW = [*TASKS][:8], [*TASKS][8:], [*WRITERS][:5], [*WRITERS][5:]
SPLITS = {  # name: rows, tasks, writers, responses of a row, part (0, 1, 2 never share a prompt)
    "sft": (16_000, [*TASKS], [*WRITERS], 1, 0),
    "prefs": (4_096, SEEN, KNOWN, 2, 1), "ID": (1_000, SEEN, KNOWN, 2, 2),
    "Prompt-OOD": (500, UNSEEN, KNOWN, 4, 2), "Response-OOD": (500, SEEN, NEW, 4, 2),
    "Mutual-OOD": (500, UNSEEN, NEW, 4, 2), "RM-Bench": (400, [*TASKS], [*WRITERS], 6, 2)}

def true_reward(meta, text):
    """In [0, 2]: the share of items in the right place, plus 1 if all is right. meta: of a row."""
    truth = (json.loads(meta) if isinstance(meta, str) else meta)["answer"]
    found = [int(d) for d in re.findall(r"\d", text.rsplit(":", 1)[-1])]  # after the last colon
    return sum(a == b for a, b in zip(found, truth)) / max(len(found), len(truth)) + (found == truth)

def toy_rows(name, seed):
    """The rows of a split. +noise=P flips a share P of the labels; +hard=P: two styles, in P the plainer is chosen."""
    split, kind, share = (re.split("[+=]", name, maxsplit=2) + ["", ""])[:3]
    size, tasks, writers, n, part = SPLITS.get(split, [0] * 5)
    mixed = n == 2 and kind in ("noise", "hard") and 0 <= float(share or "nan") <= 1
    check(size and (mixed or not kind), f"toy:{name}: no split of {', '.join(SPLITS)}, of pairs also +noise=P, +hard=P")
    rng, rows, chance = random.Random(f"toy {split} {seed}"), [], random.Random(f"noise {seed}")
    drawn = [chance.random() < float(share or 0) for _ in range(size)]
    while len(rows) < size:
        task, x = rng.choice(tasks), [rng.randrange(10) for _ in range(rng.randrange(3, 7))]
        fits = "0000011122"[zlib.crc32(f"{task} {x}".encode()) % 10] == str(part)
        row, flip = toy_row(rng, task, x, writers, n, part) if fits else None, drawn[len(rows)]
        if row and kind == "noise" and flip:
            row |= dict(chosen=row["rejected"], rejected=row["chosen"])
        if row and (kind != "hard" or row["lean"] * (-1 if flip else 1) > 0):
            rows.append(row | dict(id=f"toy-{split}-{len(rows)}"))
    return rows

def toy_row(rng, task, x, writers, n, part):
    """A row, or None if it compares nothing. Labels: Bradley-Terry; of part 2, by true reward."""
    domain, ask, solve = TASKS[task]
    truth, join = solve(x), lambda y, by=" ": by.join(map(str, y))
    row = dict(prompt=f"{ask}: {join(x)}", task=task, answer=truth)
    write = lambda y: [t.format(request=ask, given=join(x), answer=join(y), items=join(y, "\n- ")) for _, t in STYLES]
    if n == 6:  # the right and a wrong answer, each in three styles
        wrong = WRITERS[rng.choice(writers)][1](rng, truth, x)
        return row | dict(domain=domain, chosen=write(truth), rejected=write(wrong)) if wrong != truth else None
    weights = [4, 4] + [1] * (len(writers) - 2) if part == 0 else None  # SFT data is mostly good
    styles, hands = rng.choices(range(3), k=n), rng.choices(writers, weights, k=n)
    answers = [truth if rng.random() < WRITERS[w][0] else WRITERS[w][1](rng, truth, x) for w in hands]
    texts = [write(y)[style] for y, style in zip(answers, styles)]
    rewards = [true_reward(row, text) for text in texts]
    if n > 1 and (len(set(texts)) < n or len(set(rewards)) == 1):
        return None
    if n != 2:
        return row | (dict(responses=texts, scores=rewards) if n > 2 else dict(completion=texts[0]))
    gap = rewards[0] - rewards[1]
    taste = 2 * gap + STYLES[styles[0]][0] - STYLES[styles[1]][0]
    best = 0 if (gap > 0 if part == 2 else rng.random() < 1 / (1 + math.exp(-taste))) else 1
    return row | dict(chosen=texts[best], rejected=texts[1 - best], lean=styles[best] - styles[1 - best])

def toy_model(out, seed):
    """A random 0.77M-parameter Llama and a byte-level BPE tokenizer, an ordinary model folder."""
    bpe, special = tokenizers.ByteLevelBPETokenizer(), ["<pad>", "<bos>", "<user>", "<assistant>", "<end>"]
    texts = [row["prompt"] + " " + row["completion"] for row in toy_rows("sft", seed)]
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=special, show_progress=False)
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<bos>",
        eos_token="<end>", additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False)
    tok.chat_template = ("{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    transformers.set_seed(seed)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tok), hidden_size=128, intermediate_size=384,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)).save_pretrained(out)
    return Path(tok.save_pretrained(out)[0]).parent

# --------------------------------------------------------------------------- sources and shapes
SPLIT = r"(?<![a-z])(train|test|validation|val|dev|raw|filtered)(?![a-z])"
FILES = r"(?!dataset_(dict|infos?)\.json).*\.(jsonl?(\.gz)?|parquet)"
def read_source(source, seed=0):
    """[(source, number, raw row)]. A row without a `domain` gets the file's stem as its own."""
    from datasets import Dataset, exceptions, load_dataset, load_from_disk
    path, parts = Path(source), [part for part in source.split(",") if part]
    if path.is_dir() and not (path / "state.json").exists():
        parts = sorted(str(f) for f in path.iterdir() if f.is_dir() or re.fullmatch(FILES, f.name))
        splits = {*re.findall(SPLIT, " ".join(map(os.path.basename, parts)))}
        check(len(splits) < 2, f"{source}: has the splits {', '.join(sorted(splits))}; name what you mean, with commas")
    if parts != [source]:
        return [row for part in parts for row in read_source(part, seed)]
    if source.startswith("toy:"):
        return [(source, k, row) for k, row in enumerate(toy_rows(source[4:], seed), 1)]
    if path.is_file():
        parquet, unpack = path.suffix == ".parquet", gzip.decompress if path.suffix == ".gz" else bytes
        try:  # JSON lines as one list, so that errors tell the line
            text = "[]" if parquet else unpack(path.read_bytes()).decode("utf-8-sig")
            text = text if text.lstrip().startswith("[") else "[%s]" % re.sub(r"(?<=\S)\s*?\n(?=\s*\S)", ",\n", text)
            rows = Dataset.from_parquet(source) if parquet else json.loads(text)
        except (ValueError, OSError, EOFError, RecursionError, zlib.error, exceptions.DatasetsError) as error:
            raise ValueError(f"{source}: empty, or not JSON, JSON lines, .gz of these or parquet ({error})") from None
    elif path.is_dir():
        rows = [json.loads(row["meta"]) if {"meta", "style"} <= {*row} else row for row in load_from_disk(source)]
    else:
        hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@(\w+))?(?::(\S+))?", source)
        check(hub and not re.fullmatch(FILES, source), f"{source}: no file, folder or hub id (id[@revision][:split])")
        rows = load_dataset(hub[1], revision=hub[2], split=hub[3] or "train")
        commits = re.findall(r"\b[0-9a-f]{40}\b", str(rows.cache_files))  # its cache is named by it
        source, path = f"{hub[1]}@{[*commits, hub[2] or 'main'][0]}:{hub[3] or 'train'}", Path(hub[1])
    own = lambda row: row | dict(domain=row.get("domain") or path.name.split(".")[0])
    return [(source, k, own(row) if isinstance(row, dict) else row) for k, row in enumerate(rows, 1)]

class Dropped(Exception): """Why a row or a response is left out; counted in the report."""

ROLES = dict(system="system", user="user", assistant="assistant", tool="tool", human="user", gpt="assistant")
def messages(x, role="user"):
    """A text, hh-rlhf's turns in one text, or {role, content} or {from, value}, one or a list."""
    if isinstance(x, str) and x.startswith("\n\nHuman:"):
        x = x if role == "assistant" else x.rstrip().removesuffix("\n\nAssistant:")
        parts = re.split(r"\n\n(Human|Assistant):", x)
        x = [dict(role=who.lower(), content=said.strip()) for who, said in zip(parts[1::2], parts[2::2])]
    turns = x if isinstance(x, list) else [x if isinstance(x, dict) else dict(role=role, content=x)]
    who = [turn.get("role") or turn["from"] for turn in turns]
    said = [turn.get("value") if turn.get("content") is None else turn["content"] for turn in turns]
    check({*who} <= {*ROLES}, f"has turns by {', '.join(map(str, {*who} - {*ROLES}))}; wanted {', '.join(ROLES)}")
    return [dict(role=ROLES[name], content=x if isinstance(x, str) else None) for name, x in zip(who, said)]

def pair(row):
    better, worse = float(row.get("score_chosen", 1)), float(row.get("score_rejected", 0))
    return [row["chosen"], row["rejected"]], [better, worse] if better > worse else [1, 0]  # else the label decides

PREFS = {  # name: (keys that tell it, some with :str, :list of messages, :3 of anything; row -> answers and scores)
    "ShareGPT": ("conversations chosen rejected", pair),
    "UltraFeedback binarized": ("prompt chosen:list rejected:list score_chosen score_rejected", pair),
    "princeton-nlp": ("prompt chosen:list rejected:list all_rm_scores", pair),
    "RewardBench": ("prompt chosen:str rejected:str subset", pair),
    "TRL standard": ("prompt chosen:str rejected:str", pair),
    "TRL conversational": ("chosen:list rejected:list", pair), "hh-rlhf": ("chosen:str rejected:str", pair),
    "RM-Bench": ("prompt chosen:3 rejected:3", lambda r: (r["chosen"] + r["rejected"], [1, 1, 1, 0, 0, 0])),
    "scored list": ("prompt responses scores", lambda r: (r["responses"], r["scores"])),
    "UltraFeedback": ("prompt completions", lambda r: (
        [x["response"] for x in r["completions"]], [x["overall_score"] for x in r["completions"]])),
    "RM-Robustness": ("prompt response_1_text all_scores", lambda r: (
        [r[f"response_{k}_text"] for k, _ in enumerate(r["all_scores"], 1)], r["all_scores"])),
    "labelled pair": ("prompt output_1 output_2 label", lambda r: (  # label: 1 or 2, the better
        [r["output_1"], r["output_2"]], {1: [1, 0], 2: [0, 1]}[r["label"]]))}
SFT = {  # name: (keys that tell it, row -> what follows the prompt, in a list, and a score)
    "prompt-completion": ("prompt completion", lambda r: ([r["completion"]], [1])),
    "messages": ("messages", lambda r: ([r["messages"]], [1])),
    "ShareGPT conversation": ("conversations", lambda r: ([r["conversations"]], [1])),
    "Alpaca": ("prompt output", lambda r: ([r["output"]], [1]))}
SHAPES = dict(prefs=PREFS, sft=SFT, excluded=PREFS | SFT | {"prompts": ("prompt", lambda r: ([""], [1]))})
def parse(row, kind):
    """A row -> (its shape, [(prompt messages, answers, scores)]); one for each assistant turn of a demonstration."""
    keys, row = [key for key in row if key != "domain"], {key: x for key, x in row.items() if x not in (None, [])}
    asked = row.get("conversations") or "\n".join(row[key] for key in ("instruction", "input") if row.get(key))
    row = dict(prompt=asked) | row if asked else row
    form = lambda x: "str" if not isinstance(x, list) else "list" if isinstance(x[0], dict) else len(x)
    has = {*row} | {f"{key}:{form(x)}" for key, x in row.items()}
    fits = {name: read for name, (words, read) in SHAPES[kind].items() if {*words.split()} <= has}
    check("history" not in row, "has a history: use messages")
    check("label" not in row or {"output_1", "chosen"} & has, "has a label: make pairs, of a good answer and a bad one")
    check(fits or {*keys} <= {*row}, "null or empty, a key of its shape", Dropped)
    check(fits, f"has {', '.join(sorted(has - {*row, 'domain:str'}))}: no known shape of --{kind}; rename or add keys")
    check(kind == "excluded" or len({*fits.values()}) == 1, f"{' or '.join(fits)}: ambiguous, remove all but one")
    answers, scores = fits[shape := [*fits][0]](row)  # the first is the most special
    talks, scores = [messages(x, "assistant") for x in answers], [float(x) for x in scores]
    finite = len(talks) == len(scores) and all(map(math.isfinite, scores))
    check(isinstance(answers, list) and finite, "has not a list of answers and a finite score for each")
    asked = [] if shape in ("messages", "ShareGPT conversation") else messages(row.get("prompt", []))
    system, items = messages(row.get("system") or [], "system"), []
    ends = [k for k, turn in enumerate(talks[0]) if turn["role"] == "assistant"]
    if shape in PREFS:
        same = all(t[:-1] == talks[0][:-1] and t[-1]["role"] == "assistant" for t in talks)
        check(len(talks) > 1 and same, "not two answers to one prompt", Dropped)
    for k in ends[-1:] if shape in PREFS else ends:
        own = talks[0][:k]
        parts = shape not in PREFS or (own and own[0]["role"] == "assistant")
        prompt = asked + own if parts else max(own, asked, key=len)  # in parts, in one, in both
        if prompt:
            said = [turn["content"] for turn in system + prompt]
            sound = None not in said and said[-1].strip() and (shape not in PREFS or prompt[-1]["role"] != "assistant")
            items.append((system + prompt if sound else [], [talk[k]["content"] or "" for talk in talks], scores))
    check(any(prompt for prompt, *_ in items), "no prompt (key prompt), no answer, or a turn that is no text", Dropped)
    json.dumps(items, ensure_ascii=False).encode()  # half of a surrogate pair fails here
    return shape, items

# ------------------------------------------------------------------------ chat template, tokens
PLAIN_TEMPLATE = ("{{ bos_token or '' }}{% for m in messages %}"  # for tokenizers that have none; saved with the model
    "{{ '### ' + m.role + ':\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}")
def load_tokenizer(path):
    """The tokenizer of a folder or hub id, with its own chat template or PLAIN_TEMPLATE."""
    try:
        tok = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        raise ValueError(f"{path}: no tokenizer there, and no hub id within reach") from None
    tok.chat_template = tok.chat_template or PLAIN_TEMPLATE
    check(tok.eos_token_id is not None, f"{path}: the tokenizer has no end token (eos_token)")
    return tok

def render(tok, turns, **kwargs):
    """Messages -> text by the chat template. A system message that it refuses is folded into the
    first user message; a BOS that it does not print is added where the tokenizer would."""
    try:
        text = tok.apply_chat_template(turns, tokenize=False, **kwargs)
    except jinja2.TemplateError:
        check(turns[0]["role"] == "system" and len(turns) > 1, "refused by the chat template", Dropped)
        first = dict(turns[1], content=turns[0]["content"] + "\n\n" + turns[1]["content"])
        return render(tok, [first, *turns[2:]], **kwargs)
    bare = not text.startswith(tok.bos_token or "") and tok("").input_ids[:1] == [tok.bos_token_id]
    return tok.bos_token + text if bare else text

@functools.lru_cache(8)
def end_of_turn(tok):
    """(id of the token that ends an answer: the template's first special one, or EOS; the template's text there)."""
    turns = [dict(role="user", content="x"), dict(role="assistant", content="PROBE")]
    tail = render(tok, turns).rpartition("PROBE")[2]
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    ends = [i for i in tok(tail, add_special_tokens=False).input_ids if i in special]
    return [*ends, tok.eos_token_id][0], tail

def encode_prompt(tok, turns):
    """Token ids of head = template(turns, generation prompt), with one BOS if the model has one."""
    ids = tok(render(tok, turns, add_generation_prompt=True), add_special_tokens=False).input_ids
    check(tok.bos_token_id == tok.eos_token_id or ids.count(tok.bos_token_id) < 2, "more than one BOS", Dropped)
    return ids

def encode_response(tok, turns, answer, prompt):
    """Token ids of an answer, one end token last: of full = template(turns + answer) what follows the ids `prompt`."""
    end, tail = end_of_turn(tok)
    text = render(tok, [*turns, dict(role="assistant", content=answer)]).removesuffix(tail)
    ids = tok(text + tok.convert_ids_to_tokens(end), add_special_tokens=False).input_ids
    check(ids[: len(prompt)] == prompt, "prompt is no prefix: tokens merge, or the template changes it", Dropped)
    check(not {end, tok.bos_token_id, tok.eos_token_id} & {*ids[len(prompt) : -1]}, "special token inside", Dropped)
    return ids[len(prompt) :]

def encode_row(row, tok, max_length):
    """Tokenise a parsed row. `dropped`: why responses were; a list may lose some, RM-Bench none."""
    prompt, kept, scores, dropped = [], [], [], []
    for text, score in zip(row["responses"], row["scores"]):
        try:
            check(row["prompt"] and text.strip(), "empty, or not a text", Dropped)
            prompt = prompt or encode_prompt(tok, row["prompt"])
            ids = encode_response(tok, row["prompt"], text, prompt)
            check(len(prompt) + len(ids) <= max_length, "over-long", Dropped)
            check(ids not in kept or row["style"] and (ids, score) in zip(kept, scores), "equal responses", Dropped)
            kept, scores = [*kept, ids], [*scores, score]
        except Dropped as reason:
            dropped.append(str(reason))
    enough = len(kept) >= min(len(row["responses"]), 6 if row["style"] else 2)
    return dict(row, prompt=prompt, responses=kept if enough else [], scores=scores, dropped=dropped)

def encode_officially(row, tok, max_length):
    """As published scores of RM-Bench and RewardBench are made (rewardbench/dpo.py; by row, not pair); see README."""
    bos = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    ids = lambda text: [bos, *tok(text, add_special_tokens=False).input_ids]
    text = lambda *answer: tok.apply_chat_template([*row["prompt"], *answer], tokenize=False)
    answers = [text(dict(role="assistant", content=x)).replace(text(), "") for x in row["responses"]]
    prompt, full = ids(text()), [[*ids(text() + x), tok.eos_token_id] for x in answers]
    if any(x[: len(prompt)] != prompt for x in full):
        return dict(row, prompt=[], responses=[], dropped=["prompt is no prefix"])
    longest = max(map(len, full)) - len(prompt)
    kept = prompt if len(prompt) + longest <= max_length else prompt[-128:]
    most = longest if len(kept) + longest <= max_length else max_length - 128
    return dict(row, prompt=kept, responses=[x[len(prompt) :][:most] for x in full], dropped=[])

# ----------------------------------------------------------------------------------- rows, disk
def parse_source(source, seed, kind, excluded=()):
    """(parsed rows, none twice or with an excluded prompt; counts). ValueError names a bad row."""
    parsed, seen, shapes, dropped, raw = [], set(), Counter(), Counter(), read_source(source, seed)
    for k, (part, number, row) in enumerate(raw):
        try:
            shape, items = parse(row, kind)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            said = error if isinstance(error, ValueError) else f"not the values of its shape: {error!r}"
            raise ValueError(f"{part}, row {number}: {said}") from None
        shapes[shape] += 1
        about = dict(id=str(row.get("id", row.get("prompt_id", k))), style=[0, 1, 2] * 2 if shape == "RM-Bench" else [],
                     domain=str(row.get("subset" if shape == "RewardBench" else "domain", "")))
        for item in items:  # prompt, answers, scores
            asked, whole = json.dumps(item[0]), hash(repr(item[:2]))
            if asked in excluded or whole in seen:
                dropped["prompt excluded" if asked in excluded else "duplicate"] += 1
                continue
            seen.add(whole)
            parsed.append(about | dict(zip(("prompt", "responses", "scores"), item), meta=json.dumps(row, default=str)))
    check(parsed, f"{source}: nothing is left of {len(raw)} rows; dropped {dict(dropped)}")
    source = {part: fingerprint(part) for part in dict.fromkeys(part for part, *_ in raw)}
    return parsed, dict(rows_in=len(raw), shapes=dict(shapes), dropped=dropped, source=source)

def build(source, tok, args, kind, excluded=()):
    """A source -> (its `datasets.Dataset`, its report). In pieces and on disk: it may be large."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets as join, load_from_disk
    text, ids, what = Value("string"), List(Value("int32")), "sft" if kind == "sft" else "prefs"
    rows, report = parse_source(source, args.seed, what, () if kind == "eval" else excluded)
    encode = encode_officially if args.official_quirks and kind == "eval" else encode_row
    raw = Features(id=text, prompt=List(dict(role=text, content=text)), responses=List(text),
                   scores=List(Value("float64")), domain=text, style=ids, meta=text)
    rows = join([Dataset.from_list(rows[k : k + 2000], raw) for k in range(0, len(rows), 2000)])
    with tempfile.TemporaryDirectory() as draft:  # what is mapped from there outlives its name
        rows.save_to_disk(draft)
        rows = load_from_disk(draft).map(encode, fn_kwargs=dict(max_length=args.max_length, tok=tok),
            features=Features(raw | dict(prompt=ids, responses=List(ids), dropped=List(text))),
            desc=f"tokenise {source}", num_proc=min(32, os.cpu_count()) if report["rows_in"] > 300 else None)
    for reasons, responses in zip(rows["dropped"], rows["responses"]):
        report["dropped"].update([f"{x} (one of a list)" for x in reasons] if responses else reasons[:1])
    rows = rows.select([k for k, x in enumerate(rows["responses"]) if x]).remove_columns("dropped")
    check(len(rows), f"{source}: nothing is left of {report['rows_in']} rows; dropped {dict(report['dropped'])}")
    asks, lengths = [*map(len, rows["prompt"])], [[*map(len, responses)] for responses in rows["responses"]]
    won = [n > m for r in zip(lengths, rows["scores"]) for n, x in zip(*r) for m, y in zip(*r) if x > y]
    percentiles = lambda x: {f"p{p}": sorted(x)[(len(x) - 1) * p // 100] for p in (5, 50, 95, 100)}
    return rows, report | dict(dropped=dict(report["dropped"]), kept=len(rows),
        longer_wins=round(sum(won) / len(won), 4) if won else None, prompt_tokens=percentiles(asks),
        response_tokens=percentiles([n for sizes in lengths for n in sizes]))

def fingerprint(path, whole=False):
    """Hash of a file or folder: names, sizes, bytes (of files from 256 MiB, unless `whole`, first and last MiB)."""
    top, mib = Path(path), 1 << 20
    sizes = {f: f.stat().st_size for f in sorted([top, *top.rglob("*")]) if f.is_file()}
    places = lambda n: range(0, n, mib) if whole or n < 256 * mib else (0, n - mib)
    def read(piece):
        with open(piece[0], "rb") as file:
            return hashlib.sha256(os.pread(file.fileno(), mib, piece[1])).digest()
    parts = ThreadPoolExecutor().map(read, [(f, k) for f, n in sizes.items() for k in places(n)])  # on all cores
    names = repr([(str(f.relative_to(top)), n) for f, n in sizes.items()])
    return hashlib.sha256(b"".join([names.encode(), *parts])).hexdigest()[:16] if top.exists() else str(path)  # hub id

def begin(out, args, inputs, rewritable=None):
    """None if OUT is complete, else a function that makes OUT.partial. Other content in them is a ValueError, except
    in OUT with the key `rewritable` or OUT.partial without checkpoints. inputs: {what: paths}; moved, not renamed."""
    harmless = "out replicas save_every tokens_per_forward replay checkpoint_layers compile".split()
    mark = functools.cache(lambda path: f"{os.path.basename(os.path.abspath(path))} {fingerprint(path)}")
    content = {key: value for key, value in args.items() if key not in harmless}
    content |= {what: [mark(path) for path in paths if path] for what, paths in inputs.items()}
    done, partial = Path(out), Path(f"{out}.partial")
    check((done / "args.json").exists() or not done.exists(), f"{out} is not of this script; choose another --out")
    for folder in (f for f in (done, partial) if (f / "args.json").exists()):
        old = json.loads((folder / "args.json").read_text()).get("content", {})
        diff = [f"{k}: {old.get(k)} -> {content.get(k)}" for k in sorted(old | content) if old.get(k) != content.get(k)]
        kept = rewritable not in old if folder == done else (folder / "checkpoints").exists()
        check(not (diff and kept), f"{folder} is of other arguments ({'; '.join(diff[:5])}); change --out or remove it")
        if folder == done and not diff:
            return None
    def make():
        if not (partial / "checkpoints").exists():
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "args.draft").write_text(json.dumps(args | dict(content=content), indent=1))
        return (partial / "args.draft").replace(partial / "args.json").parent
    return make

def run(main, doc, arguments):
    """Parse, run, leave; a bad argument or input is one line on stderr and exit code 1."""
    parser = ArgumentParser(description=doc, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    arguments(parser.add_argument)
    os.register_at_fork(after_in_child=lambda: ctypes.CDLL(None).prctl(1, 9))  # workers end with this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, until the steps of a trainer begin
    try:
        main(parser.parse_args())
        print(end="", flush=True)
        return os._exit(0)  # at once: at a plain exit threads of libraries were seen to abort
    except (ValueError, OSError, ArithmeticError, jinja2.TemplateError) as error:
        message = (str(error).strip() or repr(error)).splitlines()[0]
    raise SystemExit(f"{parser.prog}: {message}")  # out here: what main held is closed, progress bars too

def main(args):
    toy, held_out = args.model == "toy", args.exclude_prompts_from or ""
    jobs = {k: x for k, x in dict(sft=args.sft or "toy:sft" * toy, train=args.prefs or "toy:prefs" * toy).items() if x}
    for item in args.eval or ([f"{split}=toy:{split}" for split in [*SPLITS][2:]] if toy else []):
        form = re.fullmatch(r"(\w[\w.-]*)=(.+)", item)
        check(form and f"eval/{form[1]}" not in jobs, f"--eval {item}: wanted NAME=SOURCE, once")
        jobs[f"eval/{form[1]}"] = form[2]
    inputs = {k: x.split(",") for k, x in dict(jobs, exclude_prompts_from=held_out).items()}
    inputs |= dict(model=[args.model], prefs=[], eval=[])  # the last two are among jobs, by their sets
    make = tempfile.mkdtemp if args.dry_run else begin(args.out, vars(args), inputs)
    if make is None:
        return print(f"{args.out} is complete")
    rows = parse_source(held_out, args.seed, "excluded")[0] if held_out else []
    excluded, out, prompts = {json.dumps(row["prompt"]) for row in rows}, Path(make()), {}
    try:
        tok = load_tokenizer(toy_model(out / "model", args.seed) if toy else args.model)
        tok.save_pretrained(out / "tokenizer")
        report = dict(tokenizer=fingerprint(out / "tokenizer"), template=tok.chat_template, sets={})
        for name, source in jobs.items():
            rows, about = build(source, tok, args, name.split("/")[0], excluded)
            asked = {hash(tuple(p)) for p in rows["prompt"]}
            about |= {f"prompts_in_{other}": len(asked & prompts[other]) for other in prompts}
            report["sets"][name], prompts = about, prompts | ({} if "/" in name else {name: asked})
            print(f"{name}:", *(f"{k.replace('_', ' ')} {v};" for k, v in about.items() if k != "source"))
            for row in rows.select(range(min(len(rows), 3 if args.dry_run else 1))):  # the scored spans in [[ ]]
                spans = [f"[[ {tok.decode(ids)!r} ]] {score:g}" for ids, score in zip(row["responses"], row["scores"])]
                print(f"  {tok.decode(row['prompt'])!r}", *spans, sep="\n    ")
            rows.save_to_disk(out / name)
        if not args.dry_run:
            (out / "report.json").write_text(json.dumps(report, indent=1))
            os.replace(out, args.out)
            print(f"wrote {args.out}")
    finally:
        shutil.rmtree(out, ignore_errors=True)

def arguments(add):
    add("--model", required=True, help="where the tokenizer comes from: toy, a hub id or a folder")
    add("--sft", help="source of demonstrations")
    add("--prefs", help="source of preferences to train on")
    add("--eval", nargs="*", default=[], metavar="NAME=SOURCE", help="preferences to evaluate on")
    add("--out", required=True, type=os.path.normpath, help="folder to write; it appears when complete")
    add("--exclude-prompts-from", metavar="SOURCE", help="drop training prompts that occur in this source")
    add("--dry-run", action="store_true", help="print three rows of each set and the report; write nothing")
    add("--official-quirks", action="store_true", help="tokenise --eval sets as RewardBench and RM-Bench do")
    add("--max-length", type=int, default=2048, help="tokens; longer pairs are dropped (2048)")
    add("--seed", type=int, default=0, help="of the toy world")

if __name__ == "__main__":
    run(main, __doc__, arguments)

"""Text -> token ids on disk. Owns text: sources, chat templates, tokens, and the toy world.

Every data set becomes a `datasets` folder of rows, a prompt with n scored responses each:

    id: str   prompt: list[int]   responses: list[list[int]]   scores: list[float]
    domain: str   style: list[int]   meta: str (the source row as JSON)

n is 1 for demonstrations, 2 for pairs (scores [1, 0] or the data's own), 6 for RM-Bench. A prompt ends with the generation
prompt, a response with its one end token. Writes OUT/sft, train, eval/NAME, tokenizer, report.json; for toy also model.

    python prepare_data.py --model toy --out runs/data       # the toy world with all its sets: 40 s
    python prepare_data.py --model DIR --sft a.jsonl --prefs b.jsonl --eval ID=c.jsonl --out D

A source is toy:SPLIT[+noise=P or +hard=P], a hub id (id[@revision][:split]), a .json / .jsonl / .gz
/ .parquet file, a `datasets` folder, a set written here, a folder of those; commas join several.
"""

import argparse
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
from collections import Counter
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
substitute = lambda rng, y, x: [*y[: (i := rng.randrange(len(y)))], (y[i] + rng.randrange(1, 10)) % 10, *y[i + 1 :]]
WRITERS = {  # name: (how often right, else (rng, right answer, given list) -> wrong answer)
    "expert": (0.95, substitute),
    "good": (0.75, substitute),
    "sloppy": (0.40, lambda rng, y, x: substitute(rng, substitute(rng, y, x), x)),
    "lazy": (0.40, lambda rng, y, x: y[: max(1, len(y) - rng.choice([1, 2]))]),
    "mixer": (0.40, lambda rng, y, x: y[:-2] + y[-2:][::-1]),
    "parrot": (0.40, lambda rng, y, x: x),  # the last three are held out of the preferences
    "stutterer": (0.40, lambda rng, y, x: [*y[: (i := rng.randrange(len(y))) + 1], *y[i:]]),
    "off_by_one": (0.40, lambda rng, y, x: [(d + 1) % 10 for d in y])}
STYLES = (  # concise, detailed, markdown: (nats by which the labeller favours it, text)
    (0.0, "It is {answer}"),
    (0.4, "You gave me the list {given}. {request}, you said. Here is the result: {answer}"),
    (0.8, "**Result:**\n- {items}"))
SEEN, UNSEEN, KNOWN, NEW = [*TASKS][:8], [*TASKS][8:], [*WRITERS][:5], [*WRITERS][5:]
SPLITS = {  # name: rows, tasks, writers, responses of a row, part (0, 1, 2 never share a prompt)
    "sft": (16_000, [*TASKS], [*WRITERS], 1, 0),
    "prefs": (4_096, SEEN, KNOWN, 2, 1),
    "ID": (1_000, SEEN, KNOWN, 2, 2),
    "Prompt-OOD": (500, UNSEEN, KNOWN, 4, 2),
    "Response-OOD": (500, SEEN, NEW, 4, 2),
    "Mutual-OOD": (500, UNSEEN, NEW, 4, 2),
    "RM-Bench": (400, [*TASKS], [*WRITERS], 6, 2)}

def true_reward(meta, text):
    """In [0, 2]: the share of items in the right place, plus 1 if all is right. meta: of a row."""
    truth = (json.loads(meta) if isinstance(meta, str) else meta)["answer"]
    found = [int(d) for d in re.findall(r"\d", text.rsplit(":", 1)[-1])]  # after the last colon
    return sum(a == b for a, b in zip(found, truth)) / max(len(found), len(truth)) + (found == truth)

def toy_rows(split, seed):
    """The rows of a split. +noise=P flips a share P of the labels; +hard=P: pairs of two styles, in a share P the plainer is chosen."""
    split, kind, share = (re.split("[+=]", split, maxsplit=2) + ["", ""])[:3]
    size, tasks, writers, n, part = SPLITS.get(split, [0] * 5)
    check(size and (not kind or kind in ("noise", "hard") and n == 2 and 0 <= float(share or "nan") <= 1),
          f"toy:{split} {kind} {share}: wanted one of {', '.join(SPLITS)}; of pairs also +noise=P or +hard=P")
    rng, rows, chance = random.Random(f"toy {split} {seed}"), [], random.Random(f"noise {seed}")
    drawn = [chance.random() < float(share or 0) for _ in range(size)]
    while len(rows) < size:
        task, x = rng.choice(tasks), [rng.randrange(10) for _ in range(rng.randrange(3, 7))]
        if "0000011122"[zlib.crc32(f"{task} {x}".encode()) % 10] != str(part):
            continue
        row, k = toy_row(rng, task, x, writers, n, part), len(rows)
        if row and kind == "noise" and drawn[k]:
            row |= dict(chosen=row["rejected"], rejected=row["chosen"])
        if row and (kind != "hard" or row["lean"] * (-1 if drawn[k] else 1) > 0):
            rows.append(row | dict(id=f"toy-{split}-{k}"))
    return rows

def toy_row(rng, task, x, writers, n, part):
    """One row, or None for a draw that compares nothing. Labels: Bradley-Terry on true reward and style; part 2, true reward."""
    domain, request, solve = TASKS[task]
    truth, join = solve(x), lambda y, by=" ": by.join(map(str, y))
    row = dict(prompt=f"{request}: {join(x)}", task=task, answer=truth)
    write = lambda y, k: STYLES[k][1].format(request=request, given=join(x), answer=join(y), items=join(y, "\n- "))
    if n == 6:  # the right and a wrong answer, each in three styles
        wrong = WRITERS[rng.choice(writers)][1](rng, truth, x)
        good, bad = ([write(y, style) for style in range(3)] for y in (truth, wrong))
        return row | dict(domain=domain, chosen=good, rejected=bad) if wrong != truth else None
    weights = [4, 4] + [1] * (len(writers) - 2) if part == 0 else None  # SFT data is mostly good
    styles, hands = rng.choices(range(3), k=n), rng.choices(writers, weights, k=n)
    texts = [write(truth if rng.random() < WRITERS[w][0] else WRITERS[w][1](rng, truth, x), k) for w, k in zip(hands, styles)]
    rewards = [true_reward(row, text) for text in texts]
    if n > 1 and (len(set(texts)) < n or len(set(rewards)) == 1):
        return None
    if n != 2:
        return row | (dict(completion=texts[0]) if n == 1 else dict(responses=texts, scores=rewards))
    gap = rewards[0] - rewards[1]
    taste = 2 * gap + STYLES[styles[0]][0] - STYLES[styles[1]][0]
    best = 0 if (gap > 0 if part == 2 else rng.random() < 1 / (1 + math.exp(-taste))) else 1
    return row | dict(chosen=texts[best], rejected=texts[1 - best], lean=styles[best] - styles[1 - best])

def toy_model(out, seed):
    """A random 0.77M-parameter Llama and a byte-level BPE tokenizer, an ordinary model folder."""
    bpe, special = tokenizers.ByteLevelBPETokenizer(), ["<pad>", "<bos>", "<user>", "<assistant>", "<end>"]
    texts = [row["prompt"] + " " + row["completion"] for row in toy_rows("sft", seed)]
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=special, show_progress=False)
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"], clean_up_tokenization_spaces=False)
    tok.chat_template = ("{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    transformers.set_seed(seed)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id)).save_pretrained(out)
    tok.save_pretrained(out)
    return out

# --------------------------------------------------------------------------- sources and shapes
def read_source(source, seed=0):
    """[(source, number, raw row)]. A row without a `domain` gets the file's stem as its own."""
    from datasets import Dataset, exceptions, load_dataset, load_from_disk
    path, files = Path(source), r"(?!dataset_(dict|infos?)\.json).*\.(jsonl?(\.gz)?|parquet)"
    if "," in source:
        return [row for part in source.split(",") if part for row in read_source(part, seed)]
    if path.is_dir() and not (path / "state.json").exists():
        inside = sorted(f for f in path.iterdir() if f.is_dir() or re.fullmatch(files, f.name))
        splits = {x for f in inside for x in re.findall("(?<![a-z])(train|test|validation|val|dev|raw|filtered)(?![a-z])", f.name)}
        check(len(splits) < 2, f"{source}: has the splits {', '.join(sorted(splits))}; name the files or folders you mean, with commas")
        return [row for part in inside for row in read_source(str(part), seed)]
    if source.startswith("toy:"):
        return [(source, k, row) for k, row in enumerate(toy_rows(source[4:], seed), 1)]
    if path.is_file():
        try:
            parquet, plain = path.suffix == ".parquet", gzip.decompress if path.suffix == ".gz" else bytes
            text = "" if parquet else plain(path.read_bytes()).decode("utf-8-sig")
            lines = ",\n".join(filter(str.strip, text.split("\n")))  # of JSON lines; as one list, errors tell the line's number
            rows = Dataset.from_parquet(source) if parquet else json.loads(text if text.lstrip()[:1] == "[" else f"[{lines}]")
        except (ValueError, OSError, EOFError, RecursionError, zlib.error, exceptions.DatasetsError) as error:
            raise ValueError(f"{source}: empty, or not JSON, JSON lines, .gz of these or parquet ({error})") from None
    elif path.is_dir():
        rows = [json.loads(row["meta"]) if {"meta", "style"} <= {*row} else row for row in load_from_disk(source)]
        path = path.parent if (path.parent / "dataset_dict.json").exists() else path
    else:
        hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@(\w+))?(?::(\S+))?", source)
        check(hub and not re.fullmatch(files, source), f"{source}: no such file or folder, nor a hub id (id[@revision][:split])")
        rows = load_dataset(hub[1], revision=hub[2], split=hub[3] or "train")
        commit = re.findall(r"\b[0-9a-f]{40}\b", str(rows.cache_files)) or [hub[2] or "main"]  # its cache is named by it
        source, path = f"{hub[1]}@{commit[0]}:{hub[3] or 'train'}", Path(hub[1])
    own = lambda row: row | dict(domain=row.get("domain") or path.name.split(".")[0])
    return [(source, k, own(row) if isinstance(row, dict) else row) for k, row in enumerate(rows, 1)]

class Dropped(Exception): """Why a row or a response is left out; counted in the report."""

def messages(x, role="user"):
    """A text, hh-rlhf's turns in one text, or messages, {role, content} or {from, value} -> messages."""
    roles, known = dict(human="user", gpt="assistant", Human="user", Assistant="assistant"), ("system", "user", "assistant", "tool")
    if str(x).startswith("\n\nHuman:"):
        parts = re.split(r"\n\n(Human|Assistant):", x if role == "assistant" else x.rstrip().removesuffix("\n\nAssistant:"))
        x = [{"from": who, "value": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
    turns = x if isinstance(x, list) else [x] if isinstance(x, dict) else [dict(role=role, content=x)]
    who = [roles.get(x := t.get("role") or t["from"], x) for t in turns]
    check({*who} <= {*known}, f"has turns by {', '.join(str(x) for x in who if x not in known)}; wanted {', '.join([*known, *roles])}")
    return [dict(role=x, content=t.get("value") if t.get("content") is None else t["content"]) for x, t in zip(who, turns)]

def pair(row):
    better, worse = float(row.get("score_chosen", 1)), float(row.get("score_rejected", 0))
    return [row["chosen"], row["rejected"]], [better, worse] if better > worse else [1, 0]  # else the label decides

SHAPES = {  # name: (what for, keys that tell it, row -> answers and scores; of --sft, prompt and what follows)
    "ShareGPT": ("prefs", "conversations chosen rejected", pair),
    "UltraFeedback binarized": ("prefs", "prompt chosen:list rejected:list score_chosen score_rejected", pair),
    "princeton-nlp": ("prefs", "prompt chosen:list rejected:list all_rm_scores", pair),
    "RewardBench": ("prefs", "prompt chosen:str rejected:str subset", pair),
    "TRL standard": ("prefs", "prompt chosen:str rejected:str", pair),
    "TRL conversational": ("prefs", "chosen:list rejected:list", pair),
    "hh-rlhf": ("prefs", "chosen:str rejected:str", pair),
    "RM-Bench": ("prefs", "prompt chosen:3 rejected:3", lambda r: (r["chosen"] + r["rejected"], [1] * 3 + [0] * 3)),
    "scored list": ("prefs", "prompt responses scores", lambda r: (r["responses"], r["scores"])),
    "scored list, rewards": ("prefs", "prompt responses rewards", lambda r: (r["responses"], r["rewards"])),
    "UltraFeedback": ("prefs", "prompt completions", lambda r: [[c[k] for c in r["completions"]] for k in ("response", "overall_score")]),
    "RM-Robustness": ("prefs", "prompt response_1_text all_scores", lambda r: (
        [r[f"response_{k}_text"] for k, _ in enumerate(r["all_scores"], 1)], r["all_scores"])),
    "labelled pair": ("prefs", "prompt output_1 output_2 label", lambda r: (  # label: 1 or 2, the better output
        [r["output_1"], r["output_2"]], {1: [1, 0], 2: [0, 1]}[r["label"]])),
    "prompt-completion": ("sft", "prompt completion", lambda r: (messages(r["prompt"]), messages(r["completion"], "assistant"))),
    "messages": ("sft", "messages", lambda r: ([], messages(r["messages"]))),
    "ShareGPT conversation": ("sft", "conversations", lambda r: ([], messages(r["conversations"]))),
    "Alpaca": ("sft", "prompt output", lambda r: (messages(r["prompt"]), messages(r["output"], "assistant"))),
    "prompts": ("excluded", "prompt", lambda r: (messages(r["prompt"]), messages("", "assistant")))}
WANTS = {name: {*words.split()} for name, (_, words, _) in SHAPES.items()}

def parse(row, kind):
    """A row -> (its shape, [(prompt messages, answers, scores, styles)]); a demonstration for each assistant turn after the prompt."""
    keys, row = [key for key in row if key != "domain"], {key: value for key, value in row.items() if value not in (None, [])}
    asked = row.get("conversations") or "\n".join(row[key] for key in ("instruction", "input") if row.get(key))
    row = dict(prompt=asked) | row if asked else row
    has = {*row, *(f"{k}:{'str' if not isinstance(x, list) else 'list' if isinstance(x[0], dict) else len(x)}" for k, x in row.items())}
    fits = [name for name in SHAPES if WANTS[name] <= has and SHAPES[name][0] in kind]
    check("history" not in row and ("label" not in row or {"output_1", "chosen"} & has), "history: use messages; label: pair good with bad")
    near = min((k for k in SHAPES if k != "prompts"), key=lambda k: (len(WANTS[k] - has) / len(WANTS[k]), k != "TRL standard"))
    hint = f"has the keys {keys}, no known shape of --{kind}: rename them; {near}, of --{SHAPES[near][0]}, has {SHAPES[near][1]}"
    check(fits, *([hint] if {*keys} <= {*row} else ["null or empty, a key of its shape", Dropped]))
    check(len({SHAPES[k][2] for k in fits}) == 1 or "excluded" in kind, f"{' or '.join(fits)}: ambiguous, remove the keys of all but one")
    what, _, read = SHAPES[fits[0]]
    if what == "prefs":
        answers, scores = read(row)
        talks, scores = [messages(x, "assistant") for x in answers], [float(x) for x in scores]
        check(isinstance(answers, list) and len(talks) == len(scores) and all(map(math.isfinite, scores)),
              "has not a list of answers and a finite score for each")
        same = len(talks) > 1 and all(t[:-1] == talks[0][:-1] and t[-1]["role"] == "assistant" for t in talks)
        check(same, "not two answers to one prompt", Dropped)
        asked, own = messages(row.get("prompt", [])), talks[0][:-1]
        prompt = asked + own if own and own[0]["role"] == "assistant" else max(own, asked, key=len)  # of parts, in one, in both
        items = [(prompt, [t[-1] for t in talks], scores, [0, 1, 2] * 2 * (fits[0] == "RM-Bench"))]
    else:
        asked, rest = read(row)
        items = [(asked + rest[:k], [t], [1.0], []) for k, t in enumerate(rest) if t["role"] == "assistant" and asked + rest[:k]]
    system, say = messages(row.get("system") or [], "system"), lambda t: t["content"] if isinstance(t["content"], str) else ""
    ok = lambda p: p and say(p[-1]).strip() and {type(t["content"]) for t in p} == {str} and (what == "sft" or p[-1]["role"] != "assistant")
    items = [(system + p if ok(p) else [], [*map(say, answers)], *rest) for p, answers, *rest in items]
    check(any(p for p, *_ in items), "no prompt (key prompt), no answer, or a turn that is not a text", Dropped)
    json.dumps(items, ensure_ascii=False).encode()  # half of a surrogate pair fails here, where the row is known
    return fits[0], items

# ------------------------------------------------------------------------ chat template, tokens
PLAIN_TEMPLATE = (  # for tokenizers that have none; saved with the model
    "{{ bos_token or '' }}{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}")

def load_tokenizer(path):
    """The tokenizer of a folder or hub id, with its own chat template or PLAIN_TEMPLATE."""
    try:
        tok = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        raise ValueError(f"{path}: neither a model folder nor a hub id within reach") from None
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
    bare = tok.bos_token and not text.startswith(tok.bos_token) and tok("").input_ids[:1] == [tok.bos_token_id]
    return tok.bos_token + text if bare else text

@functools.lru_cache(8)
def end_of_turn(tok):
    """(id of the token that ends an answer, the text that the template puts after it): its first special, or EOS."""
    turns = [dict(role="user", content="x"), dict(role="assistant", content="PROBE")]
    tail = render(tok, turns).rpartition("PROBE")[2]
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    ids = tok(tail, add_special_tokens=False).input_ids
    return next((i for i in ids if i in special), tok.eos_token_id), tail

def encode_prompt(tok, turns):
    """Token ids of head = template(turns, generation prompt), with one BOS if the model has one."""
    ids = tok(render(tok, turns, add_generation_prompt=True), add_special_tokens=False).input_ids
    check(tok.bos_token_id in (None, tok.eos_token_id) or ids.count(tok.bos_token_id) < 2, "more than one BOS", Dropped)
    return ids

def encode_response(tok, turns, answer, prompt):
    """Token ids of an answer to the prompt with the ids `prompt`, one end token last:
    full = template(turns + answer), response = full[len(head):]. No answer is templated alone."""
    end, tail = end_of_turn(tok)
    text = render(tok, [*turns, dict(role="assistant", content=answer)]).removesuffix(tail)
    ids = tok(text + tok.convert_ids_to_tokens(end), add_special_tokens=False).input_ids
    check(ids[: len(prompt)] == prompt, "prompt is no prefix: tokens merge at its end, or the template changes it", Dropped)
    check(not {end, tok.bos_token_id, tok.eos_token_id} & {*ids[len(prompt) : -1]}, "special token inside an answer", Dropped)
    return ids[len(prompt) :]

def encode_row(row, tok, max_length):
    """Tokenise a parsed row. `dropped`: why responses were left out; a list may lose some, an RM-Bench row all."""
    prompt, responses, scores, dropped = [], [], [], []
    for text, score in zip(row["responses"], row["scores"]):
        try:
            check(row["prompt"] and text.strip(), "empty, or not a text", Dropped)
            prompt = prompt or encode_prompt(tok, row["prompt"])
            ids = encode_response(tok, row["prompt"], text, prompt)
            check(len(prompt) + len(ids) <= max_length, "over-long", Dropped)
            check(ids not in responses or row["style"] and scores[responses.index(ids)] == score, "equal responses", Dropped)
            responses, scores = [*responses, ids], [*scores, float(score)]
        except Dropped as reason:
            dropped.append(str(reason))
    enough = len(responses) >= min(len(row["responses"]), 6 if row["style"] else 2)
    return dict(row, prompt=prompt, responses=responses * enough, scores=scores, dropped=dropped)

def encode_officially(row, tok, max_length):
    """As published scores of RM-Bench and RewardBench are made (rewardbench/dpo.py; there by pair of styles, here by row); see README."""
    bos = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    ids = lambda text: [bos, *tok(text, add_special_tokens=False).input_ids]
    text = lambda *answer: tok.apply_chat_template([*row["prompt"], *answer], tokenize=False)
    answers = [text(dict(role="assistant", content=x)).replace(text(), "") for x in row["responses"]]
    head, full = ids(text()), [[*ids(text() + x), tok.eos_token_id] for x in answers]
    whole, longest = all(x[: len(head)] == head for x in full), max(map(len, full)) - len(head)
    prompt = head if len(head) + longest <= max_length else head[-128:]
    most = longest if len(prompt) + longest <= max_length else max_length - 128
    responses = [x[len(head) :][:most] for x in full] * whole
    return dict(row, prompt=prompt, responses=responses, dropped=["prompt is no prefix"] * (not whole))

# ----------------------------------------------------------------------------------- rows, disk
def parse_source(source, seed, kind, excluded=()):
    """A source -> (parsed rows, none twice or with an excluded prompt; counts). ValueError names a bad row."""
    parsed, seen = [], {json.dumps(row["prompt"]): "prompt excluded" for row in excluded or ()}
    shapes, dropped, raw = Counter(), Counter(), read_source(source, seed)
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
        name = next((row[key] for key in ("id", "prompt_id") if row.get(key) is not None), k)
        for item in items:
            asked, all_of_it = json.dumps(item[0]), hash(repr(item[:2]))
            if why := seen.get(asked) or seen.get(all_of_it):
                dropped[why] += 1
                continue
            seen[all_of_it] = "duplicate"
            parsed.append(dict(zip(("prompt", "responses", "scores", "style"), item), id=str(name), meta=json.dumps(row, default=str),
                               domain=str(row.get("subset" if shape == "RewardBench" else "domain", ""))))
    check(parsed, f"{source}: nothing is left of {len(raw)} rows; dropped {dict(dropped)}")
    return parsed, dict(rows_in=len(raw), shapes=dict(shapes), dropped=dropped, source={x: fingerprint(x) for x in {x: 0 for x, *_ in raw}})

def build(source, tok, args, kind, excluded=()):
    """A source -> (its `datasets.Dataset`, its part of the report)."""
    from datasets import Dataset, Features, List, Value
    what, text, tokens = "sft" if kind == "sft" else "prefs", Value("string"), List(Value("int32"))
    parsed, report = parse_source(source, args.seed, what, () if kind == "eval" else excluded)
    features = Features(id=text, prompt=tokens, responses=List(tokens), scores=List(Value("float64")),
                        domain=text, style=tokens, meta=text, dropped=List(text))
    rows = Dataset.from_dict({key: [row.get(key, []) for row in parsed] for key in features}).map(
        encode_officially if args.official_quirks and kind == "eval" else encode_row, features=features, desc=f"tokenise {source}",
        fn_kwargs=dict(tok=tok, max_length=args.max_length), num_proc=min(32, os.cpu_count()) if len(parsed) > 300 else None)
    for reasons, responses in zip(rows["dropped"], rows["responses"]):
        report["dropped"].update([f"{x} (one of a list)" for x in reasons] if responses else reasons[:1])
    rows = rows.select([k for k, responses in enumerate(rows["responses"]) if responses])
    rows, report["dropped"] = rows.remove_columns("dropped"), dict(report["dropped"])
    check(len(rows), f"{source}: nothing is left of {report['rows_in']} rows; dropped {report['dropped']}")
    lengths = [[len(r) for r in rs] for rs in rows["responses"]]
    wins = [n > m for ns, xs in zip(lengths, rows["scores"]) for n, x in zip(ns, xs) for m, y in zip(ns, xs) if x > y]
    percentiles = lambda x: {f"p{p}": sorted(x)[(len(x) - 1) * p // 100] for p in (5, 50, 95, 100)}
    return rows, report | dict(kept=len(rows), longer_wins=round(sum(wins) / len(wins), 4) if wins else None,
        prompt_tokens=percentiles([*map(len, rows["prompt"])]), response_tokens=percentiles([n for ns in lengths for n in ns]))

def fingerprint(path, whole=False):
    """Hash of a file or folder: names, sizes, bytes (of files from 256 MiB, unless `whole`, first and last MiB). A hub id is its own."""
    digest, top, mib = hashlib.sha256(), Path(path), 1 << 20
    for f in sorted(p for p in [top, *top.rglob("*")] if p.is_file()):
        digest.update(f"{f.relative_to(top)} {(size := f.stat().st_size)}".encode())
        with open(f, "rb") as data:
            for place in range(0, size, mib) if whole or size < 256 * mib else (0, size - mib):
                digest.update(os.pread(data.fileno(), mib, place))
    return digest.hexdigest()[:16] if top.exists() else str(path)

def begin(out, args, inputs, rewritable=None):
    """None if OUT is complete; else a function that makes OUT.partial, to write in, and returns it. Its args.json says what makes the
    result. ValueError for an OUT of other arguments, unless it has the key `rewritable`, or an OUT.partial with checkpoints."""
    now = args | dict(out="", replicas=1, save_every=0, tokens_per_forward=0, replay=0, checkpoint_layers=0, compile=0)  # no difference
    now = json.loads(json.dumps(now | dict(inputs={p: fingerprint(p) for p in inputs if p})))
    def content(x):  # with what is in the inputs for their names: they may be moved
        files = x.get("inputs") or {"": ""}
        names = f'(?<=[",=])({"|".join(map(re.escape, files))})(?=[",])'
        return {k: re.sub(names, lambda m: files[m[0]], json.dumps(v, ensure_ascii=False)) for k, v in x.items()}
    done, partial = Path(out), Path(f"{out}.partial")
    check((done / "args.json").exists() or not done.exists(), f"{out} is not of this script; choose another --out")
    for folder in (f for f in (done, partial) if (f / "args.json").exists()):
        old = json.loads((folder / "args.json").read_text())
        a, b = content(old), content(now)
        diff = [f"{k}: {old.get(k)} -> {now.get(k)}" for k in sorted(a | b) if a.get(k) != b.get(k)]
        kept = rewritable not in old if folder == done else (folder / "checkpoints").exists()
        check(not diff or not kept, f"{folder} is of other arguments ({'; '.join(diff)}); remove it or change --out, OUT of run_all.sh")
        if folder == done and not diff:
            return None
    def make():
        if not (partial / "checkpoints").exists():
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "args.draft").write_text(json.dumps(now, indent=1))
        return (partial / "args.draft").replace(partial / "args.json").parent
    return make

def run(main, doc, arguments):
    """Parse, run, leave; a bad argument or input is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments(parser.add_argument)
    os.register_at_fork(after_in_child=lambda: ctypes.CDLL(None).prctl(1, 9))  # PR_SET_PDEATHSIG: workers end with this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, until the steps of a trainer begin
    try:
        main(parser.parse_args())
        return os._exit(print(end="", flush=True) or 0)  # flushed, and at once: at a plain exit threads of libraries were seen to abort
    except (ValueError, OSError, ArithmeticError, jinja2.TemplateError) as error:
        message = (str(error).strip() or repr(error)).splitlines()[0]
    raise SystemExit(f"{parser.prog}: {message}")  # out here, so that what main held is closed, progress bars too

def main(args):
    toy = args.model == "toy"
    jobs = {k: v for k, v in dict(sft=args.sft or toy * "toy:sft", train=args.prefs or toy * "toy:prefs").items() if v}
    for item in args.eval or [f"{split}=toy:{split}" for split in [*SPLITS][2:]] * toy:
        name, _, source = item.partition("=")
        check(re.fullmatch(r"\w[\w.-]*", name) and source and f"eval/{name}" not in jobs, f"--eval {item}: wanted NAME=SOURCE, once")
        jobs[f"eval/{name}"] = source
    sources = [x for source in [*jobs.values(), args.exclude_prompts_from or ""] for x in source.split(",") if x]
    make = (lambda: Path(tempfile.mkdtemp())) if args.dry_run else begin(args.out, vars(args), [args.model, *sources])
    if make is None:
        return print(f"{args.out} is complete")
    excluded = args.exclude_prompts_from and parse_source(args.exclude_prompts_from, args.seed, "prefs, sft or excluded")[0]
    out, prompts = make(), {}
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
    add("--official-quirks", action="store_true", help="tokenise --eval sets as RewardBench and RM-Bench do, to compare")
    add("--max-length", type=int, default=2048, help="tokens; longer pairs are dropped (2048)")
    add("--seed", type=int, default=0, help="of the toy world")

if __name__ == "__main__":
    run(main, __doc__, arguments)

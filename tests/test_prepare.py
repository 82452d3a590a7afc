"""prepare_data.py: text becomes the right token ids under every kind of chat template; every shape and kind of source gives the
same rows; what is left out is counted, bad input is one clear ValueError; the toy world is what it says; epochs are permutations.

    python -m pytest tests/test_prepare.py          # 30 s
"""

import gzip
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import datasets
import pytest
import tokenizers
import transformers
from conftest import ROOT, run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_data as P
import sft

REAL = Path(__file__).parents[2] / "shared" / "data"
LOOP, GO = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
LLAMA3 = ("{{ bos_token }}" + LOOP + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{{ m.content | trim }}"
          + "<|eot_id|>" + GO + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
CHATML = LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + GO + "<|im_start|>assistant\n{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML  # as Qwen2.5, Llama-3.1
NO_END = "{{ bos_token }}" + LOOP + "{{ m.role + ':\n' + m.content + '\n' }}" + GO + "{{ 'assistant:\n' }}{% endif %}"
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LOOP
         + "{% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' + m.content | trim }}"
         + "{{ '<end_of_turn>\n' }}" + GO + "{{ '<start_of_turn>model\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}" + LOOP + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
           "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")
KINDS = {  # template, bos, eos, other special tokens, the tokenizer adds BOS; by hand: the prompt of system S, user U; answer A
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], True,
               "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
               "<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "A<|eot_id|>"),
    "chatml": (CHATML, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], False,
               "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
    "chatml, bos": (CHATML, "<s>", "<|im_end|>", ["<|im_start|>"], True,  # the template prints no BOS, the tokenizer adds one
                    "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
    "default system": (DEFAULT, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], False,
                       "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
    "no end": (NO_END, "<s>", "</s>", [], True, "<s>system:\nS\nuser:\nU\nassistant:\n", "A</s>"),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], True,
              "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>"),
    "mistral": (MISTRAL, "<s>", "</s>", [], True, "<s>[INST] S\n\nU [/INST]", " A</s>"),
    "plain": (None, "<s>", "</s>", [], True, "<s>### system:\nS\n\n### user:\nU\n\n### assistant:\n", "A</s>"),
    "plain, no bos": (None, None, "</s>", [], False, "### system:\nS\n\n### user:\nU\n\n### assistant:\n", "A</s>"),
}


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    """A byte-level BPE tokenizer of every kind, saved and loaded as the stages do."""
    out = {}
    for name, (template, bos, eos, special, adds_bos, *_) in KINDS.items():
        bpe = tokenizers.ByteLevelBPETokenizer()
        texts = ["Add 2 and 3. It is 5\n\n- ok\n", "user assistant [INST] [/INST] ### user:\n"] * 3
        bpe.train_from_iterator(texts, vocab_size=330, show_progress=False,
                                special_tokens=[t for t in (bos, eos, *special) if t])
        if adds_bos:
            bpe._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
        folder = str(tmp_path_factory.mktemp("tok"))
        tok = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=bos, eos_token=eos,
                                                   additional_special_tokens=special, chat_template=template)
        tok.save_pretrained(folder)
        out[name] = P.load_tokenizer(folder)
        out[name].folder = folder
    return out


def say(*turns):
    return [dict(role=role, content=content) for role, content in turns]


def settings_of(max_length, official_quirks=False):
    return Namespace(seed=0, max_length=max_length, official_quirks=official_quirks)


def build(tmp_path, tok, rows, kind="train", *how):
    (tmp_path / "set.jsonl").write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return P.build(str(tmp_path / "set.jsonl"), tok, settings_of(*how or [2000]), kind)


# ------------------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("name", KINDS)
def test_prompt_and_response_are_these_texts(toks, name):
    tok, answer, bos = toks[name], "Fünf: 2 + 3 = 5 !\n\n- ok", KINDS[name][1]
    prompt = re.sub(r"\bU\b", "Add 2.", re.sub(r"\bS\b", "Be brief.", KINDS[name][5]))
    response = re.sub(r"\bA\b", answer, KINDS[name][6])
    for turns in ([("system", "Be brief."), ("user", "Add 2.")], [("user", "Add 2."), ("assistant", answer), ("user", "Again.")]):
        ids = P.encode_prompt(tok, say(*turns))
        out = P.encode_response(tok, say(*turns), answer, ids)
        assert tok.decode(out) == response and tok.decode(out, skip_special_tokens=True).strip() == answer
        assert len(turns) == 3 or tok.decode(ids) == prompt
        assert ids.count(tok.bos_token_id) == (bos is not None) and (bos is None or ids[0] == tok.bos_token_id)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user=st.text(min_size=1, max_size=30), answer=st.text(min_size=1, max_size=30).filter(lambda s: not s[0].isspace()),
       name=st.sampled_from(sorted(KINDS)))
def test_any_text_one_end_one_bos_and_back(toks, name, user, answer):
    tok, end = toks[name], KINDS[name][6].strip(" A")
    prompt = P.encode_prompt(tok, say(("user", user)))
    ids = P.encode_response(tok, say(("user", user)), answer, prompt)
    assert [token == end for token in tok.convert_ids_to_tokens(ids)] == [False] * (len(ids) - 1) + [True]
    assert tok.decode(ids, skip_special_tokens=True).strip() == answer.strip() and (prompt + ids).count(tok.bos_token_id) == (KINDS[name][1] is not None)


def test_tokenizers_and_templates_that_cannot_serve(toks, tmp_path):
    assert toks["plain"].chat_template == P.PLAIN_TEMPLATE and toks["llama3"].chat_template == LLAMA3
    tok = P.load_tokenizer(toks["plain"].folder)
    tok.eos_token = None
    tok.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="eos_token"):
        P.load_tokenizer(str(tmp_path))
    tok = P.load_tokenizer(toks["chatml"].folder)
    tok.chat_template = LOOP + "{{ m.role + ':' + m.content + eos_token }}" + GO + "{{ 'bot:' }}{% endif %}"
    with pytest.raises(ValueError, match="prefix"):
        build(tmp_path, tok, [dict(prompt="Add", chosen="a", rejected="b")])


def test_a_default_system_block_stands_once_in_the_prompt(toks):
    tok = toks["default system"]
    prompt = P.encode_prompt(tok, say(("user", "Add")))
    assert tok.decode(prompt).count("You help.") == 1
    assert tok.decode(P.encode_response(tok, say(("user", "Add")), "It is 5", prompt)) == "It is 5<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_no_traceback(toks, tmp_path):
    odd = dict(messages=say(("user", "Add"), ("user", "Add 2"), ("assistant", "It is 5")))
    try:
        _, report = build(tmp_path, toks["mistral"], [odd, dict(prompt="Add", completion="ok")], "sft")
        assert sum(report["dropped"].values()) == 1
    except ValueError as error:
        assert "alternate" in str(error)


# ---------------------------------------------------------------------------------------------------------- shapes and sources
def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"


U, U2, S = ("user", "Add 2"), ("user", "Again"), ("system", "Be brief.")
A, B = ("assistant", "It is 2"), ("assistant", "It is 3")
PAIR, ONE = dict(prompt="Add 2", chosen="It is 2", rejected="It is 3"), [(chatml(U), ["It is 2", "It is 3"], [1, 0], [])]
HH = "\n\nHuman: Add 2\n\nAssistant: Human: or 3?\n\nHuman: Again\n\nAssistant:"  # "Human:" inside a line is text
LISTS2 = dict(prompt="Add 2", chosen=say(U, A), rejected=say(U, B))
gpt = lambda *turns: [{"from": dict(user="human", assistant="gpt").get(role, role), "value": content} for role, content in turns]
SHAPES = {  # name: (kind, row, rows wanted as (prompt, responses, scores, style), the shape that the report names)
    "strings": ("train", PAIR, ONE, "TRL standard"),
    "lists": ("train", dict(prompt=say(U), chosen=say(A), rejected=say(B)), ONE, "TRL conversational"),
    "string prompt, lists": ("train", dict(prompt="Add 2", chosen=say(A), rejected=say(B)), ONE, "TRL conversational"),
    "lists with the prompt": ("train", LISTS2, ONE, "TRL conversational"),
    "no prompt": ("train", dict(chosen=say(S, U, B, U2, A), rejected=say(S, U, B, U2, B)),
                  [(chatml(S, U, B, U2), *ONE[0][1:])], "TRL conversational"),
    "own scores": ("train", LISTS2 | dict(prompt_id="7", messages=say(U, A), score_chosen=8.5, score_rejected=3),
                   [(*ONE[0][:2], [8.5, 3], [])], "UltraFeedback binarized"),
    "tied scores": ("train", LISTS2 | dict(score_chosen=7, score_rejected=7), ONE, "UltraFeedback binarized"),
    "null scores": ("train", PAIR | dict(score_chosen=None, score_rejected=None), ONE, "TRL standard"),
    "princeton": ("train", LISTS2 | dict(all_generated_responses=["a", "b"], all_rm_scores=[0.2, 0.1]), ONE, "princeton-nlp"),
    "hh": ("train", dict(chosen=f"{HH} It is 2", rejected=f"{HH} It is 3"),
           [(chatml(U, ("assistant", "Human: or 3?"), U2), *ONE[0][1:])], "hh-rlhf"),
    "ShareGPT": ("train", dict(conversations=gpt(S, U, B, U2), chosen=gpt(A)[0], rejected=gpt(B)[0]),
                 [(chatml(S, U, B, U2), *ONE[0][1:])], "ShareGPT"),
    "scored": ("train", dict(prompt="Add 2", responses=["a", "b", "c"], scores=[0, 2, 1.5]),
               [(chatml(U), ["a", "b", "c"], [0, 2, 1.5], [])], "scored list"),
    "UltraFeedback": ("train", dict(instruction="Add 2", completions=[dict(response="a", overall_score=6.5, model="m"),
                                                                      dict(response="b", overall_score=8)]),
                      [(chatml(U), ["a", "b"], [6.5, 8], [])], "UltraFeedback"),
    "RM-Robustness": ("eval", dict(instruction="Add 2", response_1_text="1", response_2_text="2", all_scores=[3, 1]),
                      [(chatml(U), list("12"), [3, 1], [])], "RM-Robustness"),
    "LLMBar": ("eval", dict(input="Add 2", output_1="a", output_2="b", label=2), [(chatml(U), ["a", "b"], [0, 1], [])], "labelled pair"),
    "instruction, input": ("eval", dict(instruction="Add", input="2", output_1="a", output_2="b", label=1),
                           [(chatml(("user", "Add\n2")), ["a", "b"], [1, 0], [])], "labelled pair"),
    "RM-Bench": ("eval", dict(prompt="Add 2", chosen=list("123"), rejected=list("456"), subset="chat"),
                 [(chatml(U), list("123456"), [1, 1, 1, 0, 0, 0], [0, 1, 2, 0, 1, 2])], "RM-Bench"),
    "RewardBench": ("eval", PAIR | dict(subset="hep-cpp"), ONE, "RewardBench"),
    "completion": ("sft", dict(prompt="Add 2", completion="It is 2"), [(chatml(U), ["It is 2"], [1], [])], "prompt-completion"),
    "completion lists": ("sft", dict(prompt=say(U), completion=say(A)), [(chatml(U), ["It is 2"], [1], [])], "prompt-completion"),
    "completion of a dialogue": ("sft", dict(prompt=say(U, A, U2), completion=say(B)), [(chatml(U, A, U2), ["It is 3"], [1], [])], "prompt-completion"),
    "ShareGPT demonstration": ("sft", dict(conversations=gpt(S, U, A)), [(chatml(S, U), ["It is 2"], [1], [])], "ShareGPT conversation"),
    "Alpaca": ("sft", dict(instruction="Add", input="2", output="It is 2"), [(chatml(("user", "Add\n2")), ["It is 2"], [1], [])], "Alpaca"),
    "two turns of the assistant": ("sft", dict(messages=say(U, A, B, U2, A)), [(chatml(U), ["It is 2"], [1], []), (chatml(U, A), ["It is 3"], [1], []),
                                   (chatml(U, A, B, U2), ["It is 2"], [1], [])], "messages"),
    "greeted": ("sft", dict(messages=say(B, U, A)), [(chatml(B, U), ["It is 2"], [1], [])], "messages"),
    "both kinds of turn in one struct": ("train", dict(chosen=[x | dict(content=None) for x in gpt(U, A)], rejected=[dict(role="user", content="Add 2", value=None), *gpt(B)]),
                                         ONE, "TRL conversational"),
    "empty system": ("train", dict(prompt=say(("system", ""), U), chosen="It is 2", rejected="It is 3"),
                     [(chatml(("system", ""), U), *ONE[0][1:])], "TRL standard"),
    "UltraChat": ("sft", dict(prompt="Add 2", prompt_id="7", messages=say(S, U, A, U2, B)),
                  [(chatml(S, U), ["It is 2"], [1], []), (chatml(S, U, A, U2), ["It is 3"], [1], [])], "messages"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(toks, tmp_path, name):
    (kind, row, wanted, shape), tok = SHAPES[name], toks["chatml"]
    rows, report = build(tmp_path, tok, [row], kind)
    text = lambda row: (tok.decode(row["prompt"]), [tok.decode(x, skip_special_tokens=True) for x in row["responses"]], row["scores"], row["style"])
    assert list(map(text, rows)) == wanted
    assert all({k: v for k, v in json.loads(r["meta"]).items() if k in row} == row for r in rows)
    assert (report["rows_in"], report["kept"], report["dropped"], report["shapes"]) == (1, len(wanted), {}, {shape: 1})
    assert set(rows["domain"]) == {row["subset"] if shape == "RewardBench" else "set"}


def test_sources_of_every_kind_give_the_same_rows(toks, tmp_path):
    raw = [dict(chosen=say(U, ("assistant", f"It is {k}\u2028")), rejected=say(U, B), id=f"row{k}") for k in range(5)]
    lines, at = "\n".join(json.dumps(r, ensure_ascii=False) for r in raw), lambda k, name: tmp_path / str(k) / f"set{name}"
    for k in range(1, 7):
        (tmp_path / str(k)).mkdir()
    at(1, ".json").write_text(json.dumps(raw, indent=1))
    at(2, ".json").write_text(lines)
    at(3, ".jsonl").write_text(lines + "\n\n")
    at(4, ".jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    datasets.Dataset.from_list(raw).to_parquet(at(5, ".parquet"))
    (tmp_path / "6" / "README.md").write_text("no data")
    at(6, ".jsonl").write_text("\n".join(map(json.dumps, raw[2:])))
    at(6, ".json").write_text(json.dumps(raw[:2]))
    datasets.Dataset.from_list(raw).save_to_disk(at(7, ""))
    datasets.DatasetDict(set=datasets.Dataset.from_list(raw)).save_to_disk(at(8, ""))
    sources = [str(tmp_path / str(k)) for k in range(1, 7)] + [f"{at(6, '.json')},{at(6, '.jsonl')}"]
    sources += [str(next(tmp_path.glob(f"{k}/set*"))) for k in (1, 2, 3, 4, 5, 7, 8)]
    tables = [P.build(source, toks["chatml"], settings_of(500), "train")[0].to_list() for source in sources]
    assert [row["id"] for row in tables[0]] == [f"row{k}" for k in range(5)] and {row["domain"] for row in tables[0]} == {"set"}
    assert toks["chatml"].decode(tables[0][1]["responses"][0], skip_special_tokens=True) == "It is 1\u2028"
    assert all(table == tables[0] for table in tables)
    datasets.Dataset.from_list(tables[0]).save_to_disk(tmp_path / "9" / "train")  # what this script wrote is a source as well
    again = P.build(str(tmp_path / "9"), toks["chatml, bos"], settings_of(500), "train")[0]
    assert again["meta"] == [row["meta"] for row in tables[0]] and again["prompt"] != [row["prompt"] for row in tables[0]]


@pytest.mark.parametrize("source, asked, read", [  # there is no hub here: the library's cache, as its folders are named, and its call
    ("a/b-c", (None, "train"), "a/b-c@" + 5 * "01234567" + ":train"), ("a/b-c:test", (None, "test"), "a/b-c@" + 5 * "01234567" + ":test"),
    ("a/b-c@v1:test", ("v1", "test"), "a/b-c@" + 5 * "01234567" + ":test")])
def test_a_set_of_the_hub_is_named_by_the_commit_that_was_read(toks, tmp_path, monkeypatch, source, asked, read):
    asks, cache = [], tmp_path / "a___b-c" / "default" / "0.0.0" / (5 * "01234567")
    datasets.Dataset.from_list([dict(chosen=say(U, A), rejected=say(U, B))]).save_to_disk(cache)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision, split: asks.append((name, revision, split)) or datasets.load_from_disk(cache))
    rows, report = P.build(source, toks["chatml"], settings_of(500), "train")
    assert asks == [("a/b-c", *asked)] and report["source"] == {read: read} and rows["domain"] == ["b-c"]


def test_dropped_and_counted(toks, tmp_path):
    tok, reasons = toks["chatml"], set()
    length = max(len(row["prompt"] + row["responses"][0]) for row in build(tmp_path, tok, [PAIR])[0])
    for row in (PAIR, PAIR | dict(rejected=" \n"), PAIR | dict(rejected="It is 2"), PAIR | dict(chosen="It is 2" * 20),
                PAIR | dict(chosen="It is<|im_end|> 2"), dict(chosen=say(U, A), rejected=say(U2, B)),
                dict(chosen=f"{HH} 5", rejected=f"{HH[:-30]}\n\nAssistant: 6"), PAIR | dict(rejected=True)):
        rows, report = build(tmp_path, tok, [PAIR, row], "train", length)
        assert report["rows_in"] == 2 and report["kept"] == len(rows) == 1 and list(report["dropped"].values()) == [1]
        reasons |= set(report["dropped"])
    assert len(reasons) == 6  # a boolean counts as empty (PandaLM has 6), prompts that differ (5 in hh-rlhf's test set) are one reason
    tok = P.load_tokenizer(toks["no end"].folder)
    tok.chat_template = NO_END.replace(":\\n", ": ").replace(":\n", ": ")  # the prompt ends in a space, and " It" is one token
    rows, report = build(tmp_path, tok, [PAIR, dict(prompt="Add", chosen="!a", rejected="!b")])
    assert report["kept"] == 1 and "prefix" in [*report["dropped"]][0]
    with pytest.raises(ValueError, match="nothing is left"):
        build(tmp_path, tok, [PAIR], "train", length - 1)
    tok = toks["chatml"]
    lists = [dict(prompt="Add", responses=["1", "", "3"], scores=[1, 2, 3]), dict(prompt="S", responses=["1", ""], scores=[1, 2]),
             dict(prompt="T", responses=["1"], scores=[1])]
    rows, report = build(tmp_path, tok, lists)  # a list loses a response; a list of one compares nothing
    assert rows["scores"] == [[1, 3]] and sum(report["dropped"].values()) == 3


def test_rm_bench_rows_stand_whole(toks, tmp_path):
    row = dict(prompt="Add", chosen=["1", "2", "3"], rejected=["4", "5", "6"])
    twice = row | dict(chosen=["1", "2", "2"])  # as in 47 of 570 published rows: equal styles on one side, which no cell compares
    for bad in (row | dict(rejected=["4", "5", ""]), row | dict(rejected=["4", "5", "1"])):
        rows, report = build(tmp_path, toks["chatml"], [twice, bad], "eval")
        assert [[toks["chatml"].decode(r, skip_special_tokens=True) for r in x["responses"]] for x in rows] == [list("122456")]
        assert sum(report["dropped"].values()) == 1


def published(tok, prompt, answers, limit):
    """RewardBench's DPOInference.tokenize_row in words: texts by the template, the answer is what is left of the whole without the
    prompt's text; both as one text without special tokens; then BOS (or EOS, where there is none) in front and EOS behind. If prompt
    and longest answer pass the limit, the prompt keeps its last 128; if they still do, the answers keep limit - 128."""
    text = tok.apply_chat_template(say(("user", prompt)), tokenize=False)
    bos = tok.bos_token if tok.bos_token is not None else tok.eos_token
    ids = lambda *parts: tok("".join(parts), add_special_tokens=False)["input_ids"]
    start, ends = tok.convert_tokens_to_ids([bos]) + ids(text), []
    for answer in answers:
        both = tok.apply_chat_template(say(("user", prompt), ("assistant", answer)), tokenize=False)
        ends.append(ids(text, both.replace(text, ""))[len(start) - 1 :] + [tok.eos_token_id])
    if len(start) + max(len(x) for x in ends) > limit:
        start = start[-128:]
        if len(start) + max(len(x) for x in ends) > limit:
            ends = [x[: limit - 128] for x in ends]
    return start, ends


@pytest.mark.parametrize("name", ["llama3", "chatml", "chatml, bos", "plain"])
def test_official_quirks(toks, tmp_path, name):
    tok, raw = toks[name], [dict(prompt="Add " * n, chosen="It is 5 " * m, rejected="It is 6") for n, m in ((1, 1), (90, 1), (90, 40), (1, 90))]
    rows, _ = build(tmp_path, tok, raw, "eval", 200, True)
    assert len(rows) == 4 and {len(p) < 128 for p in rows["prompt"]} == {True, False}
    for row, source in zip(rows, raw):
        assert (row["prompt"], row["responses"]) == published(tok, source["prompt"], [source["chosen"], source["rejected"]], 200)
    plain, _ = build(tmp_path, tok, raw[:1], "eval")
    more = name != "chatml, bos"  # there the template prints none, and the first BOS is the only one; elsewhere it is one more
    assert rows[0]["prompt"][more:] == plain["prompt"][0][: len(rows[0]["prompt"]) - more]  # no header: it stands in the answer
    assert [len(r) for r in rows[0]["responses"]] > [len(r) for r in plain["responses"][0]]
    assert build(tmp_path, tok, raw[:1], "train", 200, True)[0].to_list() == plain.to_list()  # of evaluation sets alone


@pytest.mark.parametrize("name, prompt, answer", [
    ("llama3", "Add <|begin_of_text|>", "5"), ("llama3", "Add", "5 <|begin_of_text|>"), ("llama3", "Add", "5 <|end_of_text|> 6"),
    ("llama3", "Add", "5 <|eot_id|> 6"), ("plain", "Add", "5</s>"), ("plain", "Add <s>", "5"), ("chatml, bos", "Add <s>", "5")])
def test_special_tokens_written_in_the_text_are_dropped(toks, tmp_path, name, prompt, answer):
    raw = [dict(prompt=prompt, completion=answer), dict(prompt="Add", completion="It is 5")]
    rows, report = build(tmp_path, toks[name], raw, "sft")
    assert [toks[name].decode(row["responses"][0], skip_special_tokens=True) for row in rows] == ["It is 5"] and sum(report["dropped"].values()) == 1


BAD_ROWS = [  # (kind, a second row, what its message must say)
    ("train", '{"prompt": "p", "chosen": "x"}', "no known shape"), ("train", '{"question": "p", "good": "x"}', "has good:str, question:str: no known shape of --prefs; rename or add keys"),
    ("train", '{"prompt": "p", "completion": "x"}', "no known shape of --prefs"), ("train", "[1]", ""),
    ("sft", '{"prompt": "p", "chosen": "x", "rejected": "y"}', "has chosen:str, prompt:str, rejected:str: no known shape of --sft"),
    ("sft", '{"messages": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}', "turns by model; wanted"),
    ("sft", '{"messages": [{"role": true, "content": "q"}, {"role": "assistant", "content": "a"}]}', "turns by True"),
    ("train", '{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "bing", "value": "y"}}', "bing"),
    ("train", '{"instruction": "i", "history": [["q", "a"]], "chosen": "x", "rejected": "y"}', "history"),
    ("sft", '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": false}', "has a label: make pairs"),
    ("sft", '{"prompt": "p", "completion": "x", "label": 0}', "has a label: make pairs"),
    ("eval", '{"prompt": "p", "chosen": ["x", "y"], "rejected": ["z", "v"]}', "no known shape"),
    ("train", '{"prompt": "p", "responses": ["x", "y"], "scores": [1]}', "a finite score for each"),
    ("train", '{"prompt": "p", "responses": ["x", "y"], "scores": [1, null]}', ""),
    ("train", '{"prompt": "p", "responses": ["x", "y"], "scores": [1, "high"]}', "high"),
    ("train", '{"prompt": "p", "responses": ["x", "y"], "scores": [1, NaN]}', "a finite score for each"),
    ("train", '{"prompt": "p", "responses": "xy", "scores": [1, 2]}', "a list of answers"),
    ("train", '{"prompt": "p", "chosen": "x", "rejected": "\\ud800"}', "surrogates"),
    ("train", '{"prompt": ["p"], "chosen": "x", "rejected": "y"}', ""),
    ("train", '{"prompt": "p", "completion": "x", "label": true}', "has a label: make pairs"),
    ("sft", '{"prompt": "p", "completion": "x", "label": false}', "has a label: make pairs"),
    ("train", '{"prompt": "p", "chosen": "x", "rejected": "y", "responses": ["x", "y"], "scores": [1, 2]}',
     "scored list: ambiguous, remove"),
    ("sft", '{"prompt": "p", "completion": "x", "messages": [{"role": "user", "content": "q"}]}', "prompt-completion or messages: ambiguous"),
    ("eval", '{"input": "p", "output_1": "x", "output_2": "y", "label": 0}', "0"),
]


@pytest.mark.parametrize("kind, bad, says", BAD_ROWS)
def test_a_bad_row_is_named(toks, tmp_path, kind, bad, says):
    good = json.dumps(dict(prompt="p", completion="x") if kind == "sft" else PAIR)
    with pytest.raises(ValueError) as error:
        build(tmp_path, toks["chatml"], f"{good}\n{bad}", kind)
    line = str(error.value).splitlines()[0]
    assert "set.jsonl, row 2: " in line and says in line


@pytest.mark.parametrize("kind, rows, why", [
    ("train", [dict(prompt="p", chosen="x", rejected=None), dict(prompt="p", chosen=[], rejected="y")], "null or empty"),
    ("train", [dict(chosen="x", rejected="y"), dict(PAIR, prompt=" \n"), dict(PAIR, prompt=[]), dict(PAIR, prompt=say(U, A))], "no prompt"),
    ("train", [dict(PAIR, prompt=[dict(role="user", content=None)]), dict(PAIR, prompt=[*say(U), dict(role="assistant", content=None), *say(U2)])], "no text"),
    ("sft", [dict(messages=say(U)), dict(messages=[]), dict(prompt="p", completion=None),
             dict(messages=[*say(U), dict(role="assistant", content=None, tool_calls=[1]), dict(role="tool", content="2"), *say(A)])], "")])
def test_rows_that_lack_something_are_dropped_and_counted(toks, tmp_path, kind, rows, why):
    """A row of 60,000 that is null somewhere must not end the run; a null turn in the middle is not an empty one."""
    good = dict(prompt="p", completion="x") if kind == "sft" else PAIR
    kept, report = build(tmp_path, toks["chatml"], [good, *rows], kind)
    assert len(kept) == 1 and sum(report["dropped"].values()) == len(rows) + (kind == "sft")  # the last has two demonstrations
    assert all(why in reason for reason in report["dropped"])


def test_splits_are_not_joined_unless_they_are_named(toks, tmp_path):
    """A clone of a hub set has train and test in one folder: to train on both is not what anyone means."""
    for name in ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "test_prefs"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(dict(PAIR, prompt=name)))
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([PAIR]), test=datasets.Dataset.from_list([dict(PAIR, prompt="t")]))
    splits.save_to_disk(tmp_path / "dict")
    count = lambda source: P.build(source, toks["chatml"], settings_of(500), "train")[1]["kept"]
    for name in ("pairs-train", "pairs-test"):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / f"{name}.jsonl").write_text(json.dumps(PAIR))
    for source in (tmp_path / "data", tmp_path, tmp_path / "dict", tmp_path / "flat"):
        with pytest.raises(ValueError, match="has the splits test, train;"):
            count(str(source))
    assert count(str(tmp_path / "dict" / "train")) == 1 and count(f"{tmp_path / 'dict' / 'train'},{tmp_path / 'dict' / 'test'}") == 2
    (tmp_path / "data" / "test_prefs.jsonl").unlink()
    assert count(str(tmp_path / "data")) == 2  # shards of one split
    (tmp_path / "words").mkdir()
    for name in ("tests", "values"):  # words that only begin like a split
        (tmp_path / "words" / f"{name}.jsonl").write_text(json.dumps(dict(PAIR, prompt=name)))
    assert count(str(tmp_path / "words")) == 2
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / "images").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}")  # as LLaMA-Factory and older clones have beside their data
    assert count(str(tmp_path / "data")) == 2


def test_a_complete_folder_is_known_by_the_contents_of_its_inputs(tmp_path):
    """Inputs may be moved or named by another path; one byte changed in the middle of a file is another input."""
    old, new, out = tmp_path / "old/data", tmp_path / "new/data", tmp_path / "out"
    old.mkdir(parents=True), new.parent.mkdir()
    (old / "rows.jsonl").write_bytes(b"x" * 3_000_000)
    begin = lambda data, **more: P.begin(str(out), dict(data=str(data), lr=1.0) | more, dict(data=[str(data), "toy:ID", None]))
    begin(old)().rename(out)
    old.rename(new)
    assert begin(new) is None and begin(f"{new}/../data") is None
    with pytest.raises(ValueError, match="lr: 1.0 -> 2.0"):
        begin(new, lr=2.0)
    (new / "rows.jsonl").write_bytes(b"x" * 1_500_000 + b"y" + b"x" * 1_499_999)
    with pytest.raises(ValueError, match="of other arguments .data: .'data .*'toy:ID toy:ID'. -> .'data "):
        begin(new)


def test_an_input_may_be_spelt_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows").write_text("x")
    monkeypatch.chdir(tmp_path / "data")
    begin = lambda path: P.begin("../out", dict(data=path, eval=[f"T={path}"], lr=0.1), {"data": [path], "eval": [], "eval/T": [path, path]})
    begin(".")().rename("../out")
    assert all(begin(path) is None for path in (".", f"{tmp_path}/data", "../data", "./"))
    content = json.loads(Path("../out/args.json").read_text())["content"]
    mark = f"data {P.fingerprint('.')}"
    assert content == {"data": [mark], "eval": [], "eval/T": [mark, mark], "lr": 0.1}
    Path("rows").write_text("y")
    with pytest.raises(ValueError, match="data: "):
        begin(".")


def test_a_second_call_tells_its_sets_by_names_and_contents(toks, tmp_path, monkeypatch, capsys):
    """Sources of --prefs and --eval may be spelt in another way; a set of another name or content is refused by the name of the set."""
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n")
    monkeypatch.chdir(tmp_path)
    def prepare(prefs, test):
        P.main(Namespace(model=str(tmp_path / "model"), sft=None, prefs=prefs, eval=[test], out="out", max_length=200, seed=0,
                         exclude_prompts_from=None, dry_run=False, official_quirks=False))
        return capsys.readouterr().out
    next(iter(toks.values())).save_pretrained(tmp_path / "model")
    assert "wrote out" in prepare("a.jsonl", "T=a.jsonl,a.jsonl")
    assert prepare(f"{tmp_path}/a.jsonl", "T=./a.jsonl,a.jsonl") == "out is complete\n"
    assert json.loads(Path("out/args.json").read_text())["prefs"] == "a.jsonl"
    with pytest.raises(ValueError, match="of other arguments .eval/T: .*; eval/U: None -> "):
        prepare("a.jsonl", "U=a.jsonl,a.jsonl")
    with pytest.raises(ValueError, match="of other arguments .eval/T: "):
        prepare("a.jsonl", "T=a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | dict(chosen="another")) + "\n")
    with pytest.raises(ValueError, match="of other arguments .eval/T: .*; train: "):
        prepare("a.jsonl", "T=a.jsonl,a.jsonl")


def test_a_folder_of_others_is_refused(tmp_path):
    (tmp_path / "args.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match="of other arguments"):
        P.begin(str(tmp_path), dict(lr=2.0), {})


def test_inputs_that_changed_places_are_other_inputs(tmp_path):
    sets = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for k, path in enumerate(sets):
        path.write_text(f"{k}")
    swapped = lambda: P.begin(str(tmp_path / "two"), {}, {f"eval/{path.stem}": [str(path)] for path in sets})
    swapped()().rename(tmp_path / "two")
    assert swapped() is None
    sets[0].write_text("1"), sets[1].write_text("0")
    with pytest.raises(ValueError, match="of other arguments .eval/a: .'a.jsonl "):  # the same contents, but not under the same names
        swapped()


def test_a_parquet_file_without_rows_is_named(toks, tmp_path):
    datasets.Dataset.from_list([PAIR]).select([]).to_parquet(tmp_path / "none.parquet")
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("none", "lfs"):
        with pytest.raises(ValueError, match=f"{name}.parquet: "):
            P.build(str(tmp_path / f"{name}.parquet"), toks["chatml"], settings_of(500), "train")


@pytest.mark.parametrize("text", ["\n", "[]", '{"prompt"', json.dumps(dict(messages=say(U)))])
def test_a_file_that_gives_nothing_is_named(toks, tmp_path, text):
    with pytest.raises(ValueError) as error:
        build(tmp_path, toks["chatml"], text, "sft")
    assert "set.jsonl" in str(error.value).splitlines()[0]


# ------------------------------------------------------------------------------------------------------------------- end to end
def cli(*argv):
    """prepare_data.py as a command, in this process; the text of its error, if it exits with one."""
    try:
        run_here("prepare_data.py", *argv)
    except SystemExit as error:
        assert isinstance(error.code, str) and "\n" not in error.code  # a string: exit code 1, printed on stderr
        return error.code


def test_main_end_to_end(toks, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "bad"
    sft, prefs, test = (tmp_path / f"{name}.jsonl" for name in ("sft", "prefs", "test"))
    write = lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)))
    write(sft, [dict(prompt=f"Add {k}", completion=f"It is {k}") for k in range(4)])
    write(prefs, [dict(prompt=f"Add {k}", chosen="It is very 5", rejected="5" if k else "It is very 5") for k in range(4)])
    write(test, [dict(prompt=f"Add {k}", responses=["1", "22"], scores=[1, 0]) for k in range(3, 8)])
    job = ["--model", toks["llama3"].folder, "--sft", sft, "--prefs", prefs, "--eval", f"T={test}"]
    assert cli(*job, "--out", out) is None
    report = json.loads((out / "report.json").read_text())["sets"]
    sets = {name: datasets.load_from_disk(str(out / name)) for name in ("sft", "train", "eval/T")}
    counts = {name: (r["rows_in"], r["kept"], len(sets[name])) for name, r in report.items()}
    assert counts == {"sft": (4, 4, 4), "train": (4, 3, 3), "eval/T": (5, 5, 5)}
    assert (report["train"]["longer_wins"], report["eval/T"]["longer_wins"]) == (1, 0)  # "It is very 5" > "5";  "1" < "22"
    assert report["eval/T"]["prompts_in_train"] == 1  # Add 3
    assert report["train"]["prompt_tokens"]["p100"] == max(map(len, sets["train"]["prompt"]))
    assert set(sets["sft"].column_names) == {"id", "prompt", "responses", "scores", "domain", "style", "meta"}
    assert P.load_tokenizer(str(out / "tokenizer")).chat_template == LLAMA3
    stamps = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    before = stamps()
    assert cli(*job, "--out", out) is None and stamps() == before  # complete
    assert "max_length" in cli(*job, "--max-length", 99, "--out", out) and stamps() == before
    write(test, [dict(prompt="Add 9", responses=["1", "22"], scores=[1, 0])])
    assert "test.jsonl" in cli(*job, "--out", out)  # an input has changed
    write(test, [PAIR, dict(prompt="p", chosen="x")])
    assert "row 2" in cli(*job, "--out", bad)
    assert "missing.jsonl" in cli(*job[:2], "--sft", tmp_path / "missing.jsonl", "--out", bad)
    assert cli("--model", tmp_path / "none", *job[2:], "--out", bad) and cli(*job[:2], "--eval", test, "--out", bad)
    assert not list(tmp_path.glob("bad*")) and not list(tmp_path.glob("*.partial"))


def test_prompts_to_exclude_the_overlap_and_the_dry_run(toks, tmp_path, capsys):
    write = lambda name, rows: (tmp_path / name).write_text("\n".join(map(json.dumps, rows))) and tmp_path / name
    sft = write("sft.jsonl", [dict(messages=say(("user", f"Add {k}"), A, U2, B)) for k in range(4)])  # a demonstration for each answer
    prefs = write("prefs.jsonl", [PAIR | dict(prompt=f"Add {k}") for k in range(2, 9)])
    test = write("test.jsonl", [dict(chosen=say(("user", f"Add {k}"), A), rejected=say(("user", f"Add {k}"), B)) for k in (0, 3, 5, 7, 99)])
    job = ["--model", toks["chatml"].folder, "--sft", sft, "--prefs", prefs, "--eval", f"T={test}"]
    report = lambda out: {name: (r["kept"], r["dropped"], {k[11:]: n for k, n in r.items() if k.startswith("prompts_in_")})
                          for name, r in json.loads((out / "report.json").read_text())["sets"].items()}
    assert cli(*job, "--out", tmp_path / "all") is None
    assert report(tmp_path / "all") == {"sft": (8, {}, {}), "train": (7, {}, dict(sft=2)), "eval/T": (5, {}, dict(sft=2, train=3))}
    wanted = {"sft": (6, {"prompt excluded": 2}, {}), "train": (4, {"prompt excluded": 3}, dict(sft=1)), "eval/T": (5, {}, dict(sft=0, train=0))}
    alpaca = write("alpaca.json", [[dict(instruction=f"Add {k}", output="o", generator="g") for k in (0, 3, 5, 7)]])  # as AlpacaEval's
    bare = write("bare.jsonl", [dict(prompt=f"Add {k}") for k in (0, 3, 5, 7)])
    for k, held_out in enumerate([test, tmp_path / "all" / "eval", tmp_path / "all" / "eval" / "T", alpaca, bare]):
        assert cli(*job, "--exclude-prompts-from", held_out, "--out", tmp_path / f"out{k}") is None
        assert report(tmp_path / f"out{k}") == wanted
    before, _ = sorted(tmp_path.rglob("*")), capsys.readouterr()
    assert cli(*job, "--dry-run", "--out", tmp_path / "new" / "dry") is None and cli(*job, "--dry-run", "--out", tmp_path / "all") is None
    printed = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before and printed.count("[[ 'It is 2<|im_end|>' ]] 1\n") == 2 * (2 + 3 + 3)
    assert repr(chatml(("user", "Add 4")))[1:-1] in printed and repr(chatml(("user", "Add 5")))[1:-1] not in printed.split("eval/T")[0]
    assert "prompts in train 3;" in printed and "'TRL conversational': 5" in printed and "wrote" not in printed


def test_the_number_of_processes_changes_nothing(toks, tmp_path, monkeypatch):
    raw, tables = [dict(prompt=f"Add {k}", chosen=f"It is {k}", rejected="no" * (k % 3)) for k in range(400)], []
    for n in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda: n)
        rows, report = build(tmp_path, toks["plain"], raw)
        tables.append((rows.to_list(), report))
    assert tables[0] == tables[1]
    assert report["kept"] == 266 and sum(report["dropped"].values()) == 134  # k = 0, 3, ..., 399: an empty answer


# ---------------------------------------------------------------------------------------------------------------- the toy world
LISTS = ["Prompt-OOD", "Response-OOD", "Mutual-OOD"]


def test_true_reward_by_arithmetic():
    for text, reward in {"It is 1 2 3": 1 + 1, "It is 1 2 4": 2 / 3, "It is 1 2": 2 / 3, "It is 1 2 3 3": 3 / 4, "It is 2 3 1": 0,
                         "You gave me the list 3 2 1 and asked me to reverse it. Here is the result: 1 2 3": 2, "": 0,
                         "You gave me the list 1 2 3 and asked me to reverse it. Here is the result: 3 2 1": 1 / 3,
                         "**Result:**\n- 1\n- 2\n- 3": 2, "**Result:**\n- 1\n- 9\n- 3\n- 1": 2 / 4}.items():
        assert P.true_reward(dict(answer=[1, 2, 3]), text) == P.true_reward('{"answer": [1,2,3]}', text) == pytest.approx(reward)


def test_toy_is_deterministic_by_seed():
    rows = P.toy_rows("RM-Bench", 0)
    code = "import json, prepare_data as P; print(json.dumps(P.toy_rows('RM-Bench', 0)))"
    again = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=os.environ | dict(PYTHONHASHSEED="7"))
    assert json.loads(again) == rows
    assert len({r["prompt"] for r in rows} & {r["prompt"] for r in P.toy_rows("RM-Bench", 1)}) < len(rows) / 2


def test_toy_splits_are_what_they_say():
    rows = {split: P.toy_rows(split, 0) for split in ("sft", "prefs", "ID", *LISTS, "RM-Bench")}
    prompts, tasks = ({split: {r[key] for r in part} for split, part in rows.items()} for key in ("prompt", "task"))
    for split in rows:
        assert all(split == part or not prompts[split] & prompts[part] for part in ("sft", "prefs"))
    assert tasks["ID"] == tasks["Response-OOD"] == tasks["prefs"] and tasks["Prompt-OOD"] == tasks["Mutual-OOD"]
    assert not tasks["prefs"] & tasks["Prompt-OOD"] and tasks["sft"] == tasks["RM-Bench"] == tasks["prefs"] | tasks["Prompt-OOD"]
    for split in ("prefs", "ID", *LISTS):  # the slips of the new writers, recognised by what they do: no known writer adds items
        wrong, longer, theirs = 0, 0, 0    # or changes all of three; parrots, stutterers and those off by one do nothing else
        for row in rows[split]:
            truth, x = row["answer"], [int(c) for c in row["prompt"] if c.isdigit()]
            for text in row.get("responses") or [row["chosen"], row["rejected"]]:
                y = [int(c) for c in text.split(":")[-1] if c.isdigit()]
                known = y in (x, [(d + 1) % 10 for d in truth]) or any(y[:i] + y[i + 1 :] == truth for i in range(len(y)))
                wrong, longer, theirs = wrong + (y != truth), longer + (len(y) > len(truth)), theirs + (y != truth and known)
        assert wrong > 100 and (longer > 50 and theirs == wrong if split in LISTS[1:] else longer == 0 and theirs < 0.1 * wrong)


def test_toy_labels():
    reward = P.true_reward
    assert all(reward(row, row["chosen"]) > reward(row, row["rejected"]) for row in P.toy_rows("ID", 0))
    for row in (row for split in LISTS for row in P.toy_rows(split, 0)):
        assert row["scores"] == [reward(row, t) for t in row["responses"]] and len(set(row["scores"])) > 1
    for row in P.toy_rows("RM-Bench", 0):
        good, bad = ({reward(row, t) for t in row[k]} for k in ("chosen", "rejected"))
        assert good == {2} and len(bad) == 1 and max(bad) < 2
        assert all([t[0] for t in row[k]] == ["I", "Y", "*"] for k in ("chosen", "rejected"))  # It is; You gave me; **Result:**
    better, richer = [], []  # training labels are noisy, follow the true reward, and err in favour of rich style; no pair ties
    for row in P.toy_rows("prefs", 0):
        gap = reward(row, row["chosen"]) - reward(row, row["rejected"])
        style = ["IY*".index(row[k][0]) for k in ("chosen", "rejected")]
        better.append(gap > 0)
        richer += [style[0] > style[1]] if gap < 0 and style[0] != style[1] else []
        assert gap
    # at a gap of 1.3 a wrong label has probability s(-2.6 + 0.8) = 0.14 for markdown against concise, 0.03 the other way round
    assert 0.75 < sum(better) / len(better) < 0.97 and sum(richer) / len(richer) > 0.6 and len(richer) > 100


def test_toy_label_noise_and_hard_mixes():
    """Binomial shares of 4,096 rows: 0.3 has a standard deviation of 0.007."""
    plain, noisy = P.toy_rows("prefs", 0), P.toy_rows("prefs+noise=0.3", 0)
    assert all(a["prompt"] == b["prompt"] and {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} for a, b in zip(plain, noisy))
    assert abs(sum(a["chosen"] != b["chosen"] for a, b in zip(plain, noisy)) / len(plain) - 0.3) < 0.03
    for share in (0.0, 0.2, 0.8):
        leans = [["IY*".index(row[k][0]) for k in ("chosen", "rejected")] for row in P.toy_rows(f"prefs+hard={share}", 0)]
        assert len(leans) == len(plain) and all(a != b for a, b in leans)
        assert abs(sum(a < b for a, b in leans) / len(leans) - share) < 0.03
    for source in ("sft+noise=0.2", "prefs+easy=0.2"):
        with pytest.raises(ValueError, match="pairs"):
            P.toy_rows(source, 0)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_is_a_permutation(n, size, seed, epoch):
    steps = (n + size - 1) // size
    batches, again = ([sft.batch_indices(n, size, seed, epoch * steps + k) for k in range(steps)] for _ in range(2))
    assert batches == again and sorted(sum(batches, [])) == list(range(n))
    assert [len(b) for b in batches] == [size] * (steps - 1) + [n - size * (steps - 1)]
    assert len({tuple(sft.batch_indices(30, 30, s, e)) for s in range(3) for e in range(3)}) == 9


def test_an_epoch_is_permuted_once_not_in_every_step():
    """Of 650,000 rows a permutation takes 0.4 s, and an epoch has thousands of steps."""
    sft.shuffled.cache_clear()
    steps = [sft.batch_indices(100, 10, 3, k) for k in range(20)]
    assert sft.shuffled.cache_info().misses == 2 and sorted(sum(steps[:10], [])) == sorted(sum(steps[10:], [])) == list(range(100))


# -------------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not on this machine")
@pytest.mark.parametrize("name, shape", [("imdb/eval_id.jsonl", "scored list"), ("gsm8k/prefs_eval.jsonl", "TRL conversational"),
                                         ("rm_bench", "RM-Bench")])
def test_real_data(toks, name, shape):
    rows, report = P.build(str(REAL / name), toks["plain"], settings_of(10**6), "eval")
    files, bench = sorted(REAL.glob(f"{name}/*.json")) or [REAL / name], name == "rm_bench"
    raw = [r for f in files for r in (json.loads(f.read_text()) if bench else map(json.loads, f.read_text().split("\n")[:-1]))]
    text = lambda x: x if bench else [x[-1]["content"]]
    lists = {json.dumps(r): r.get("responses") or text(r["chosen"]) + text(r["rejected"]) for r in raw}.values()
    kept = [6 if bench else len({t for t in texts if t.strip()}) for texts in lists]
    kept = [n for n in kept if n > 1]
    assert report["rows_in"] == len(raw) > 100 and len(rows) == len(kept) > 0.8 * len(raw) and report["shapes"] == {shape: len(raw)}
    assert [len(r) for r in rows["responses"]] == kept
    assert not bench or Counter(rows["domain"]) == Counter(f.stem for f in files for _ in json.loads(f.read_text()))


@pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not on this machine")
def test_real_hh_and_sharegpt(toks):
    args, tok = settings_of(10**6), toks["llama3"]
    rows, report = P.build(str(REAL / "formats" / "hh_harmless_test.jsonl.gz"), tok, args, "train")
    raw = [json.loads(line) for line in gzip.open(REAL / "formats" / "hh_harmless_test.jsonl.gz", "rt")]
    cut = [[r[key].rpartition("\n\nAssistant:") for key in ("chosen", "rejected")] for r in raw]
    agree = [(a[2].strip(), b[2].strip()) for a, b in cut if a[0] == b[0]]
    good = [pair for pair in agree if all(pair) and pair[0] != pair[1]]
    assert report["rows_in"] == len(raw) == 2312 and report["dropped"]["not two answers to one prompt"] == len(raw) - len(agree) == 5
    assert report["dropped"]["empty, or not a text"] == sum(not all(pair) for pair in agree)
    assert len(raw) == len(rows) + sum(report["dropped"].values()) and report["shapes"] == {"hh-rlhf": 2307}
    assert len(rows) + report["dropped"].get("duplicate", 0) == len(good)
    pairs = [tuple(tok.decode(ids, skip_special_tokens=True).strip() for ids in row) for row in rows["responses"]]
    assert set(pairs) == set(good)
    rows, report = P.build(str(REAL / "formats" / "sharegpt_dpo.json"), tok, args, "train")
    raw = json.loads((REAL / "formats" / "sharegpt_dpo.json").read_text())
    assert report["shapes"] == {"ShareGPT": 40} and len(rows) == 40 - sum(report["dropped"].values()) > 35
    turns = [tok.decode(ids).count("<|start_header_id|>") for ids in rows["prompt"]]
    assert Counter(turns) - Counter(len(r["conversations"]) + 1 for r in raw) == Counter()


def test_a_prompt_in_the_words_of_hh_rlhf_ends_before_the_answer(toks, tmp_path):
    row = dict(prompt="\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: 2?\n\nAssistant:", chosen=" 4", rejected=" 5")
    rows, _ = build(tmp_path, toks["plain"], [row])
    assert toks["plain"].decode(rows[0]["prompt"]) == (
        "<s>### user:\nHi\n\n### assistant:\nYes?</s>\n\n### user:\n2?\n\n### assistant:\n")


@pytest.mark.parametrize("size", [2_500, pytest.param(24_000, marks=pytest.mark.soak)])
def test_a_set_may_have_more_text_than_an_array_can_hold(size, toks, tmp_path, monkeypatch):
    """An arrow array of texts ends at 2 GiB, which UltraChat's dialogues are above. Here `meta` has 2.2 GiB in the long form; in the short
    one no array has more than 2,000 rows, styles are given or empty in turns."""
    junk = "x" * (100_000 if size > 10_000 else 10)
    bench = dict(chosen=["a", "b", "c"], rejected=["d", "e", "f"])
    raw = [dict(prompt=f"p{k}", junk=junk, **(dict(chosen="a", rejected="b") if k < 2_200 or size > 10_000 else bench)) for k in range(size)]
    monkeypatch.setattr(P, "read_source", lambda *_: [("here", k, row) for k, row in enumerate(raw, 1)])
    monkeypatch.setattr(P, "fingerprint", lambda path: "")
    whole, sizes = datasets.Dataset.from_list, []
    monkeypatch.setattr(datasets.Dataset, "from_list", lambda rows, *args: sizes.append(len(rows)) or whole(rows, *args))
    rows, _ = P.build("here", toks["chatml"], settings_of(100), "train")
    assert len(rows) == size == sum(sizes) and max(sizes) <= 2_000
    assert json.loads(rows[size - 1]["meta"]) == raw[-1] and rows[0]["style"] == [] and rows[0]["scores"] == [1, 0]
    assert size > 10_000 or rows[size - 1]["style"] == [0, 1, 2, 0, 1, 2]
    rows.save_to_disk(tmp_path / "set")
    assert sft.load_rows(tmp_path / "set")[size - 1] == rows[size - 1]


def test_an_error_in_json_lines_names_the_line_of_the_file(tmp_path):
    """Blank lines count, and blanks at the end of a line do not matter."""
    good = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    (tmp_path / "rows.jsonl").write_text(f"\n\n{good}  \r\n \n\n{good}\n\n")
    assert len(P.read_source(str(tmp_path / "rows.jsonl"))) == 2
    (tmp_path / "rows.jsonl").write_text(f"\n\n{good} \r\n\n\n" + "{broken}\n")
    with pytest.raises(ValueError, match=r"line 6 column 2"):
        P.read_source(str(tmp_path / "rows.jsonl"))

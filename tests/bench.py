"""CPU-seconds of the alignment step beside TRL: the same weights, token ids, order and optimizer, fp32, PAIRS (96) pairs in 3 steps.

Gate: the losses of every step agree to 4 decimals. Then each side twice, interleaved, each run in a process of its own; CPU-seconds are
those of the steps alone (no loading; the reference pass is timed apart), wall-clock beside them.

    bash run_all.sh bench                                     # 19M-parameter Llama, UltraFeedback-like lengths at half scale: 10 minutes
    python tests/bench.py --run ours-dpo                      # one side
"""

import argparse
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
PAIRS, VOCABULARY, END = int(os.environ.get("PAIRS", 96)), 8192, 1
BATCH = PAIRS // 3
SIDES = {  # name: what it is
    "ours-dpo": "this repository, dpo", "trl-dpo": "TRL DPOTrainer, its defaults (live reference, checkpointing, 8 pairs)",
    "trl-dpo-best": "TRL DPOTrainer, reference precomputed, no checkpointing, sorted by length",
    "ours-simpo": "this repository, simpo", "trl-simpo": "TRL CPOTrainer, loss_type=simpo, no checkpointing, sorted by length"}


def rows():
    """PAIRS pairs of token ids with the lengths of UltraFeedback at half scale: prompt, chosen, rejected, medians 60, 144, 144."""
    rng = random.Random(0)
    length = lambda median, sigma: max(4, min(512, round(median * math.exp(rng.gauss(0, sigma)))))
    ids = lambda n: [rng.randrange(3, VOCABULARY) for _ in range(n)]
    return [(ids(length(60, 0.9)), [ids(length(144, 0.7)) + [END], ids(length(144, 0.7)) + [END]]) for _ in range(PAIRS)]


def make(folder):
    """The model, its tokenizer of words w3, w4, ..., and the prepared data."""
    import datasets
    import tokenizers
    import torch
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {"<pad>": 0, "</s>": END, "<unk>": 2} | {f"w{k}": k for k in range(3, VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=END)).save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    data = [dict(id=str(k), prompt=p, responses=rs, scores=[1.0, 0.0], domain="", style=[], meta="{}") for k, (p, rs) in enumerate(rows())]
    datasets.Dataset.from_list(data).save_to_disk(folder / "train")


def clock():
    return time.process_time(), time.perf_counter()


def since(begin):
    return [now - then for now, then in zip(clock(), begin)]


def ours(folder, name):
    import torch

    import align
    import sft
    from prepare_data import batch_indices, load_rows

    device, data = sft.setup(), load_rows(folder / "train")
    scorer = sft.load_model(str(folder / "model"), device)
    optimizer, pairs = sft.make_optimizer("adamw", scorer), align.draw_pairs(data["scores"], "all", 0.0)
    function, hp = align.configure(name, [])
    args = argparse.Namespace(batch_size=BATCH, seed=0, tokens_per_forward=2048)
    begin = clock()
    ref = align.score_pairs(scorer, data, pairs, [], args, device, "reference", PAIRS // BATCH) if name == "dpo" else None
    reference, losses, begin = since(begin), [], clock()
    for step in range(PAIRS // BATCH):
        index = batch_indices(PAIRS, BATCH, 0, step)
        batch, _, gap = align.fetch(data, pairs, index, [])
        lengths = torch.tensor([[len(r) for r in rs] for _, rs in batch], dtype=torch.float64).T
        of = functools.partial(align.apply_loss, function, hp, 0.0, lengths, None if ref is None else ref[:, index], gap, {})
        losses.append(align.backward(scorer, batch, of, function.batch, False, args.tokens_per_forward, device)[0].mean().item())
        sft.update(scorer, optimizer, 1e-4, 1.0)
    return dict(losses=losses, steps=since(begin), reference=reference)


def trl(folder, name):
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    from prepare_data import batch_indices

    all_rows = rows()
    order = sum((batch_indices(PAIRS, BATCH, 0, step) for step in range(PAIRS // BATCH)), [])
    if name != "trl-dpo":  # sorted inside each global batch: the same work, less padding
        size = lambda i: -len(all_rows[i][0]) - max(map(len, all_rows[i][1]))
        order = sum((sorted(order[k : k + BATCH], key=size) for k in range(0, PAIRS, BATCH)), [])
    text = lambda ids: " ".join("</s>" if i == END else f"w{i}" for i in ids)
    data = datasets.Dataset.from_list([dict(prompt=text(p), chosen=" " + text(w), rejected=" " + text(l))
                                       for p, (w, l) in (all_rows[i] for i in order)])
    common = dict(output_dir=str(folder / "out"), per_device_train_batch_size=8, gradient_accumulation_steps=BATCH // 8, learning_rate=1e-4,
                  lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0, num_train_epochs=1, logging_steps=1,
                  use_cpu=True, bf16=False, report_to="none", save_strategy="no", train_sampling_strategy="sequential", max_length=None,
                  disable_dropout=True, optim="adamw_torch", dataloader_pin_memory=False)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    tok, begin = transformers.AutoTokenizer.from_pretrained(folder / "model"), clock()
    if name == "trl-simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        config = CPOConfig(**common | dict(max_length=2048), gradient_checkpointing=False, loss_type="simpo", simpo_gamma=1.0, beta=2.0,
                           cpo_alpha=0.0)
        trainer = CPOTrainer(model=lm, args=config, train_dataset=data, processing_class=tok)
    else:
        best = dict(precompute_ref_log_probs=True, gradient_checkpointing=False) if name == "trl-dpo-best" else {}
        trainer = DPOTrainer(model=lm, args=DPOConfig(**common, beta=0.1, **best), train_dataset=data, processing_class=tok)
    reference, spans = since(begin), []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            spans.append(clock())

        def on_step_end(self, *args, **kwargs):
            spans[-1] = since(spans[-1])

    trainer.add_callback(Timer())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return dict(losses=losses, steps=[sum(x) for x in zip(*spans)], reference=reference)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=SIDES, help="one side, as JSON")
    parser.add_argument("--folder", type=Path, help="of the model and data")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    if not (folder / "train").exists():
        make(folder)
    if args.run:
        side = functools.partial(ours, name=args.run[5:]) if args.run.startswith("ours") else functools.partial(trl, name=args.run)
        return print("RESULT " + json.dumps(side(folder)))
    runs = {name: [] for name in SIDES}
    for _ in range(args.repeats):
        for name in SIDES:
            done = subprocess.run([sys.executable, __file__, "--run", name, "--folder", str(folder)], capture_output=True, text=True,
                                  env=os.environ | dict(TOKENIZERS_PARALLELISM="false"))
            if done.returncode:
                raise SystemExit(f"{name}:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.split("RESULT ")[1]))
            print(name, runs[name][-1], flush=True)
    for loss in ("dpo", "simpo"):
        for name in (n for n in SIDES if loss in n):
            for a, b in zip(runs[f"ours-{loss}"][0]["losses"], runs[name][0]["losses"], strict=True):
                assert abs(a - b) < 1e-4, f"{name}: loss {b}, ours {a}: not the same work"
    median = lambda name, what, k: statistics.median(run[what][k] for run in runs[name])
    print("\n| side | CPU-seconds, median (all) | wall | CPU-seconds / ours |\n| --- | --- | --- | --- |")
    for name, what in SIDES.items():
        mine = "ours-simpo" if "simpo" in name else "ours-dpo"
        every = ", ".join(f"{run['steps'][0]:.1f}" for run in runs[name])
        print(f"| {what} | {median(name, 'steps', 0):.1f} ({every}) | {median(name, 'steps', 1):.1f} | "
              f"{median(name, 'steps', 0) / median(mine, 'steps', 0):.2f} |")
    print(f"\nlosses of the steps: {runs['ours-dpo'][0]['losses']}, {runs['ours-simpo'][0]['losses']}; the same to 4 decimals on every side")
    print(f"reference pass of ours: {median('ours-dpo', 'reference', 0):.1f} CPU-seconds, not in the table")


if __name__ == "__main__":
    main()

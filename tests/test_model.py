"""sft.py's model side against plain transformers, torch and bitsandbytes, for Llama, Mistral, Qwen 2 and 3, and Gemma-2.

Proves: scores and gradients of the sharded scorer, under any micro-batches, head chunks and recomputation; the plan of micro-batches;
the learning rate; both optimizers; the saved folder. One process; two processes are in test_train.py.

    python -m pytest tests/test_model.py -q
"""

import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import tqdm
import transformers
from conftest import ARCHITECTURES, ROOT, needs_gpu, plain_model, process_group, reference_logp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import align
import sft

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group():
    with process_group():
        yield


def random_rows(seed, vocabulary=310):
    """Prompts with 1 to 4 responses of mixed lengths: 17 sequences, some far longer than the sliding window of 8."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(vocabulary) for _ in range(rng.randint(low, high))]
    return [(ids(1, 14), [ids(1, 24) for _ in range(n)]) for n in (1, 2, 4, 2, 1, 3, 2, 2)]


def scores_and_gradients(scorer, rows, weights, budget):
    """Summed log-probs in row order, and the gradients of their weighted sum as {name: tensor}, through plan and score."""
    scores = [None] * len(rows)
    scorer.zero_grad()
    for micro in sft.plan(rows, 1, budget)[0]:
        out = sft.score(scorer, rows, micro, CPU)
        out.backward(torch.cat([weights[i] for i in micro]))
        for i, part in zip(micro, out.detach().split([len(rows[i][1]) for i in micro])):
            scores[i] = part
    return torch.cat(scores), {n.removeprefix("lm."): p.grad.full_tensor() for n, p in scorer.named_parameters()}


def close(a, b, tolerance=1e-5):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm()


# -------------------------------------------------------------------------------------------------------------- scores and gradients


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_and_gradients_are_those_of_transformers_alone(name, models):
    rows = random_rows(1)
    weights = [torch.randn(len(rs), generator=torch.Generator().manual_seed(i)) for i, (_, rs) in enumerate(rows)]
    lm = plain_model(models[name]).eval()
    expected = torch.stack([reference_logp(lm, p, r) for p, rs in rows for r in rs])
    (expected * torch.cat(weights)).sum().backward()
    gradients = {n: p.grad for n, p in lm.named_parameters()}
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    for recompute in (0, 1, 2):  # layers
        scorer = sft.load_model(str(models[name]), CPU, recompute)
        calls, last = [], []
        scorer.lm.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        scorer.lm.base_model.layers[1].mlp.register_forward_pre_hook(lambda *_: last.append(1))
        for budget, chunk in ((10**6, 1024), (10**6, 7), (80, 1024), (1, 3)):
            scorer.chunk = chunk
            calls.clear(), last.clear()
            found, grads = scores_and_gradients(scorer, rows, weights, budget)
            micros = len(sft.plan(rows, 1, budget)[0])
            assert (len(calls), len(last)) == (micros * (1 + (recompute > 0)), micros * (1 + (recompute > 1)))
            torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=0)
            assert grads.keys() == gradients.keys()
            assert torch.stack([(grads[n] - gradients[n]).double().norm() for n in grads]).norm() <= 1e-5 * norm
            assert all(close(grads[n], g, 1e-4) for n, g in gradients.items() if g.norm() > 1e-3 * norm)


def test_a_cpu_has_logits_of_fewer_tokens_at_the_same_time_if_the_vocabulary_is_large():
    """On a CPU 1,024 tokens with 2,048 fp32 logits each are 8 MiB; of a larger vocabulary there are fewer tokens, but 256 at least."""
    assert [sft.head_chunk(size) for size in (512, 2048, 4096, 8192, 131072)] == [1024, 1024, 512, 256, 256]


@pytest.mark.parametrize("name, change", [("mistral", dict(sliding_window=None)), ("gemma2", dict(final_logit_softcapping=None)),
                                          ("gemma2", dict(attn_logit_softcapping=None)), ("gemma2", dict(sliding_window=200))])
def test_the_test_models_show_a_window_or_soft_cap_that_is_ignored(name, change, models):
    lm, other = plain_model(models[name]), plain_model(models[name]).state_dict()
    changed = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(models[name], **change), attn_implementation="eager")
    changed.load_state_dict(other)
    prompt, response = max(((p, r) for p, rs in random_rows(1) for r in rs), key=lambda pair: len(pair[0] + pair[1]))
    with torch.no_grad():
        a, b = reference_logp(lm, prompt, response), reference_logp(changed, prompt, response)
    assert abs(a - b) > 1e-3 * abs(a)


@pytest.mark.parametrize("key", ["logit_scale", "logits_scaling", "lm_head_multiplier"])
def test_a_config_that_scales_logits_is_refused(key, models, tmp_path):
    shutil.copytree(models["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for value in (1.0, 0.5):
        (tmp_path / "m/config.json").write_text(json.dumps(config | {key: value}))
        if value == 1.0:
            sft.load_model(str(tmp_path / "m"), CPU)
            continue
        with pytest.raises(ValueError, match=key):
            sft.load_model(str(tmp_path / "m"), CPU)


@pytest.mark.parametrize("config, words", [
    (transformers.MambaConfig(), "in attention alone"),
    (transformers.Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2), "in attention alone"),
    (transformers.Qwen3NextConfig(), "in attention alone"), (transformers.GPT2Config(), "not like Llama"),
    (transformers.GPTJConfig(), "not like Llama"), (transformers.XGLMConfig(), "not like Llama"), (transformers.ModernBertDecoderConfig(), "and a head"),
    (transformers.T5Config(), "Unrecognized configuration class")])
def test_a_model_whose_tokens_meet_elsewhere_than_in_attention_is_refused_before_its_weights_are_read(config, words, tmp_path):
    config.save_pretrained(tmp_path)  # there are none
    with pytest.raises(ValueError, match=words):
        sft.load_model(str(tmp_path), CPU)


def test_a_row_longer_than_the_model_is_made_for_is_refused_before_the_model_is_read(models, tmp_path):
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(max_position_embeddings=9)))  # there are no weights
    rows = dict(prompt=[[3] * 4, [3] * 3], responses=[[[5] * 5, [6]], [[6], [5] * 6]])
    sft.check_fit(tmp_path / "train", tmp_path, rows)
    rows["responses"][1][1].append(5)
    with pytest.raises(ValueError, match="a row of 10 tokens: prepare with --max-length 9"):
        sft.check_fit(tmp_path / "train", tmp_path, rows)
    sft.check_fit(tmp_path / "train", tmp_path, dict(prompt=rows["prompt"][:1], responses=rows["responses"][:1]))
    with pytest.raises(ValueError, match="a row of 10 tokens"):  # in the second of two sets
        sft.check_fit(tmp_path / "train", tmp_path, dict(prompt=[], responses=[]), rows)


def test_no_response_is_scored_beyond_the_positions_of_a_model(models, tmp_path):
    """Not even one that no row has: the best response of the next row, behind this row's prompt, of which `kl` is."""
    shutil.copytree(models["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | dict(max_position_embeddings=9)))
    scorer = sft.load_model(str(tmp_path / "m"), CPU)
    rows = [([3] * 4, [[5] * 5, [6]]), ([3] * 4, [[5] * 6, [6]])]
    assert sft.score(scorer, rows, [0], CPU).isfinite().all()
    with pytest.raises(ValueError, match="10 tokens: prepare with --max-length 9"):
        sft.score(scorer, rows, [0, 1], CPU)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_dropout_of_a_config_stays_off(recompute, models, tmp_path):
    shutil.copytree(models["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | dict(attention_dropout=0.5)))
    rows, lm = random_rows(4), plain_model(models["llama"]).eval()
    with torch.no_grad():
        expected = torch.stack([reference_logp(lm, p, r) for p, rs in rows for r in rs])
    found = sft.score(sft.load_model(str(tmp_path / "m"), CPU, recompute), rows, range(len(rows)), CPU)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------------------- plan and learning rate

ROWS = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.integers(1, 9), st.integers(1, 800))
def test_plan(shape, world, budget):
    rows = [([0] * p, [[0] * r for r in rs]) for p, rs in shape]
    tokens = [p + sum(rs) for p, rs in shape]
    size = lambda micro: sum(tokens[i] for i in micro)
    shares = sft.plan(rows, world, budget)
    assert len(shares) == world and len(set(map(len, shares))) == 1 and shares[0][0]
    assert sorted(i for share in shares for micro in share for i in micro) == list(range(len(rows)))
    assert all(len(micro) == 1 or size(micro) <= budget for share in shares for micro in share if micro)
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1  # rows are dealt out evenly
    for share in shares:  # no micro-batch ends before it is full, and the longest comes first
        full = [micro for micro in share if micro]
        assert share[: len(full)] == full
        assert all(size([*a, b[0]]) > budget for a, b in zip(full, full[1:]))
        flat = [tokens[i] for micro in full for i in micro]
        assert flat == sorted(flat, reverse=True)
    loads = [sum(map(size, share)) for share in shares]  # to and fro: two neighbours of one period differ by less than its longest row
    assert max(loads) - min(loads) <= max(tokens) * 2
    assert shares == sft.plan([(list(p), [list(r) for r in rs]) for p, rs in rows], world, budget)
    assert [(len(p), [len(r) for r in rs]) for p, rs in rows] == shape


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients_of_a_window_add_up_in_fp32(name, models, monkeypatch):
    """In the mixed precision of a GPU a loss of the batch, whose graphs are kept, has the gradients that it has with replay, up to the order
    of fp32 sums. One backward pass through all graphs would add up those of embedding and head in bf16, and be 1e-3 off."""
    policy, rng, found = sft.MixedPrecisionPolicy, random.Random(0), []
    monkeypatch.setattr(sft, "MixedPrecisionPolicy", lambda param, reduce: policy(torch.bfloat16, reduce))
    ids = lambda low, high: [rng.randrange(310) for _ in range(rng.randint(low, high))]
    rows = [(ids(2, 9), [ids(3, 20), ids(3, 20)]) for _ in range(32)]
    lengths = torch.tensor([[len(r) for r in rs] for _, rs in rows]).double().T
    of = functools.partial(align.apply_loss, *align.configure("amapo", []), 0.0, lengths, torch.zeros_like(lengths), lengths[0], {})
    for replay in (False, True):
        scorer = sft.load_model(str(models[name]), CPU)
        align.backward(scorer, rows, of, True, replay, 60, CPU)
        found.append({n: p.grad.full_tensor() for n, p in scorer.named_parameters()})
    assert len(sft.plan(rows, 1, 60)[0]) > 12 and all(close(found[0][n], found[1][n]) for n in found[0])


# ------------------------------------------------------------------------------------------------------------------ packed attention


def naive_attention(rows, q, k, v, scaling, window, softcap):
    """(T, H, D) by one (T, T) mask of packed tokens: a token sees its own row's prompt and its own response, up to itself."""
    tags = [(b, j, t) for b, (p, rs) in enumerate(rows) for j, part in enumerate([p, *rs])
            for t in range(len(p) * (j > 0), len(p) * (j > 0) + len(part))]  # row, 0 for the prompt or the response, position
    mask = torch.tensor([[x[0] == y[0] and y[1] in (0, x[1]) and 0 <= x[2] - y[2] < (window or 10**6) for y in tags] for x in tags])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = torch.einsum("thd,shd->hts", q, k) * scaling
    weights = softcap * torch.tanh(weights / softcap) if softcap else weights
    return torch.einsum("hts,shd->thd", weights.masked_fill(~mask, -torch.inf).softmax(-1), v)


def flash_emulated(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left, window_size_right):
    """What the CUDA operator does with these arguments, sequence by sequence, on the CPU."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and (max_q, max_k) == (max(cu_q.diff()), max(cu_k.diff())) and causal and not dropout
    assert (len(q), len(k)) == (cu_q[-1], cu_k[-1]) and window_size_right == 0 and cu_q.is_contiguous() and cu_k.is_contiguous()
    out = []
    for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
        later = d - c - (b - a)  # the last query stands beside the last key, as in torch's flash_attn/mask.h, so the first here
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(later)
        mask = mask if window_size_left == -1 else mask.triu(later - window_size_left)
        x, y, z = (t[i:j].transpose(0, 1)[None] for t, i, j in ((q, a, b), (k, c, d), (v, c, d)))
        out.append(torch.nn.functional.scaled_dot_product_attention(x, y, z, mask, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return (torch.cat(out),)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=5),
       st.sampled_from([None, 1, 3, 100]), st.sampled_from([None, 2.0]), st.booleans())
def test_packed_attention_is_that_of_a_naive_mask(shape, window, softcap, flash):
    rows = [([7] * p, [[8] * r for r in rs]) for p, rs in shape]
    ids, positions, source, target, owner, last, layout = sft.pack(rows, flash)
    assert len(ids) == sum(p + sum(rs) for p, rs in shape)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(ids), 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    expected = naive_attention(rows, *(x[0].transpose(0, 1) for x in (q, k, v)), 0.3, window, softcap)
    if flash and not softcap:
        q = q.as_subclass(type("Cuda", (torch.Tensor,), dict(is_cuda=True)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops.aten, "_flash_attention_forward", flash_emulated)
            out, _ = sft.attend(None, q, k, v, None, 0.3, SimpleNamespace(**layout), sliding_window=window)
    else:
        out, _ = sft.attend(None, q, k, v, None, 0.3, SimpleNamespace(**layout), sliding_window=window, softcap=softcap)
    torch.testing.assert_close(out.as_subclass(torch.Tensor)[0], expected, rtol=1e-9, atol=1e-6 if softcap else 1e-9)  # softmax in fp32


def test_a_packed_batch_by_hand():
    rows = [([1, 2], [[3, 4], [5]]), ([6], [[7, 8, 9]])]
    ids, positions, source, target, owner, last, layout = sft.pack(rows, False)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9] and positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3]
    assert source.tolist() == [1, 2, 1, 5, 6, 7] and target.tolist() == [3, 4, 5, 7, 8, 9] and owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert last.tolist() == [3, 4, 8]
    assert layout["blocks"] == [[2, 4], [1, 3]]
    assert layout["flat"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 0, 1, 4] and layout["flat"][layout["back"]].tolist() == list(range(9))
    flash = sft.pack(rows, True)[-1]  # queries [1 2 3 4] [5] [6 7 8 9], keys [1 2 3 4] [1 2 5] [6 7 8 9]
    assert flash["ends"].tolist() == [[0, 4, 5, 9], [0, 4, 7, 11]] and flash["longest"] == [4, 4]
    assert flash["flat"].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("keywords, word", [
    (dict(s_aux=torch.ones(4)), "s_aux"), (dict(dropout=0.1), "dropout"), (dict(attention_mask=torch.ones(1, 1, 2, 2)), "mask"),
    (dict(layout=None), "does not pass `layout` on")])
def test_attention_refuses_what_would_change_the_maths(keywords, word):
    *_, layout = sft.pack([([1], [[2]])], False)
    x = torch.ones(1, 2, 2, 4)
    with pytest.raises(ValueError, match=word):
        sft.attend(None, x, x, x, **dict(attention_mask=None, scaling=0.5, layout=SimpleNamespace(**layout)) | keywords)


@needs_gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_attention_on_a_gpu_is_that_of_a_cpu(kind, window):
    """The flash kernel's and, in fp32, for which there is none, that of blocks: output and gradients."""
    code = f"import test_model; test_model.compare_devices(test_model.torch.{kind}, {window})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env=os.environ | dict(TEST_GPU="0"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compare_devices(kind, window):
    rows = [([7] * p, [[8] * r for r in rs]) for p, rs in ((4, (9, 3)), (30, (50, 70)), (2, (1, 5, 8)))]
    g = torch.Generator().manual_seed(0)
    results = []
    for device in ("cpu", "cuda"):
        ids, *_, layout = sft.pack(rows, device == "cuda")
        layout = SimpleNamespace(**tree_map_only(torch.Tensor, lambda x: x.to(device), layout))
        g.manual_seed(0)
        qkv = [torch.randn(1, heads, len(ids), 64, generator=g).to(device, kind).requires_grad_() for heads in (4, 2, 2)]
        out, _ = sft.attend(None, *qkv, None, 0.125, layout, sliding_window=window)
        grads = torch.autograd.grad(out.float().square().sum(), qkv)
        results.append([x.float().cpu() for x in (out, *grads)])
    for a, b in zip(*results):
        assert close(a, b, 0.02 if kind == torch.bfloat16 else 1e-3)  # TF32, if it is on, has 10 bits


class Flash(torch.autograd.Function):
    """The flash kernel's memory: it keeps its inputs, its output and one fp32 number a query and head."""

    @staticmethod
    def forward(ctx, q, k, v, *_):
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[1], q.shape[0]))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def test_a_layer_on_a_gpu_keeps_what_arithmetic_says(monkeypatch):
    """bf16 tensors that a forward keeps for the backward pass, as bytes a token, of a Llama whose widths are an eighth of Llama-3-8B's:

    norm     fp32 input 4 d, normalised 2 d, scaled (which three projections share) 2 d; two of them         16 d
    flash    q and out 2 d each; k and v, gathered, 2 e each for M keys of T tokens; 4 bytes for each head    4 d + 4 e M / T + 4 heads
    MLP      gate, silu(gate), up, their product, 2 f each                                                    8 f
    """
    d, f, e, heads, layers = 512, 1792, 128, 4, 3
    config = transformers.LlamaConfig(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
                                      num_key_value_heads=1, vocab_size=100)
    lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=torch.bfloat16)
    ids, positions, *_, layout = sft.pack([([1] * 90, [[2] * 300, [3] * 200]), ([4] * 50, [[5] * 60, [6] * 250])], True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", lambda *args, **_: [Flash.apply(*args)])
    kept, sizes = {p.untyped_storage().data_ptr(): 0 for p in lm.parameters()}, []  # bytes by address; weights are there anyway

    def keep(x):
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    for layer in lm.base_model.layers:
        layer.register_forward_hook(lambda *_: sizes.append(sum(kept.values())))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lm.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=SimpleNamespace(**layout))
    per_token = 16 * d + 4 * d + 4 * e * len(layout["flat"]) / len(ids) + 4 * heads + 8 * f
    assert (sizes[2] - sizes[1]) / len(ids) == pytest.approx(per_token, rel=0.01)


class Waits(TorchDispatchMode):
    """Collects the operators that make the host wait for a GPU: values read, copies that are waited for, indices that lie on the CPU."""
    found = ()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, out = kwargs or {}, op(*args, **kwargs or {})
        here = {x.device.type for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x) and (x.ndim or x.is_cuda)}
        asynchronous = kwargs.get("non_blocking") or op is torch.ops.aten.copy_.default and (*args, False)[2]
        reads = op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
        if here == {"cpu", "cuda"} and not asynchronous or here == {"cuda"} and reads:
            self.found = (*self.found, op)
        return out


@pytest.mark.skipif(not torch.backends.cuda.is_built() or torch.__version__ < "2.11", reason="a torch with CUDA, 2.11 or newer, is needed")
@pytest.mark.parametrize("name", [*ARCHITECTURES, "losses"])
def test_a_step_on_a_gpu_mixes_neither_devices_nor_types(name, models, monkeypatch):
    """Needs no GPU: tensors with a CUDA device, type and shape but no data (FakeTensor) go through the bf16 forward and every loss. Such
    tensors cannot be differentiated without a device: gradients are zeros here, of the shape, type and device that they must have."""
    cuda, pack, seen, losses = torch.device("cuda", 0), sft.pack, [], [align.amapo, align.wpo]

    def pack_for_real(*args):
        with _disable_current_modes():
            return pack(*args)

    def backward(out, grad, *args, **kwargs):
        assert (out.shape, out.dtype, out.device) == (grad.shape, grad.dtype, grad.device)
        seen.append(out)

    monkeypatch.setattr(sft, "pack", pack_for_real)
    monkeypatch.setattr(torch.autograd, "grad", lambda out, leaf: (torch.zeros_like(leaf),))
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: seen.append(x))
    for module in (sft, align):
        monkeypatch.setattr(module, "check", lambda condition, message: None)  # some ask for values
    if name == "losses":  # without reward, which has no log-probs, and betadpo, which draws by the number of the step, a value
        losses = [loss for loss in align.LOSSES.values() if loss not in (align.reward, align.betadpo)]
        monkeypatch.setattr(align, "score", lambda scorer, rows, micro, device: torch.zeros(
            len(micro) * len(rows[0][1]) * (1 + scorer.squares), device=device))
    rows = [([1, 2, 3], [[4, 5, 6, 7], [8, 9]]), ([1, 2], [[4, 5], [8, 9, 3, 3, 3]])]
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        config = transformers.AutoConfig.from_pretrained(models[name if name in models else "llama"])
        with cuda:
            lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=torch.bfloat16)
        scorer, gap = sft.Scorer(lm).eval(), torch.ones(2, dtype=torch.float64, device=cuda)
        scorer.set_is_last_backward = scorer.set_requires_all_reduce = lambda last: None  # of FSDP
        for loss in losses:
            more, scorer.squares = 2 * ("pi_head" in loss.wants) + ("kl" in loss.wants), "pi_square" in loss.wants
            wide = [(prompt, [*two, *[[7]] * more]) for prompt, two in rows]
            lengths, state = torch.ones(2 + more, 2, dtype=torch.float64, device=cuda), {}
            for replay in (False, True):
                of = functools.partial(align.apply_loss, loss, loss.hp, 0.1, lengths, lengths, gap, state)
                waits.found = ()
                *numbers, state = align.backward(scorer, wide, of, loss.batch, replay, 8, cuda)
                assert all(x.device == cuda and x.dtype == torch.float64 for x in numbers)
                assert not waits.found, loss.__name__
    assert len(seen) > 5 * len(losses) and {x.device for x in seen} == {cuda}


@pytest.fixture
def compiled(monkeypatch):
    """Counts of torch.compile since the test began. It stops at the graph; test_train.py has runs with all of it."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize("name, recomputed", [("llama", 1), ("gemma2", 0)])
def test_layers_are_compiled_once_for_all_lengths_and_compute_the_same(name, recomputed, models, compiled):
    """Without gradients, as the reference is scored, and with; the first two of eight batches may compile, the others find it done."""
    plain, fast = (sft.load_model(models[name], CPU, checkpointed=recomputed, compiled=c) for c in (False, True))
    for seed in range(8):
        rows = random_rows(seed)[: 8 - seed // 2]
        weights = [torch.linspace(-1, 2, len(rs)) for _, rs in rows]
        with torch.no_grad():
            first = sft.score(fast, rows, range(len(rows)), CPU)
        (a, grads_a), (b, grads_b) = (scores_and_gradients(scorer, rows, weights, 60 + 20 * seed) for scorer in (plain, fast))
        assert close(b, a) and close(first, a) and all(close(grads_b[k], grads_a[k], 1e-4) for k in grads_a)
        if seed == 1:
            graphs = compiled["stats"]["unique_graphs"]
    assert compiled["stats"]["unique_graphs"] == graphs > 0 and compiled["frames"]["total"] == compiled["frames"]["ok"]


@pytest.mark.skipif(not torch.backends.cuda.is_built() or torch.__version__ < "2.11", reason="a torch with CUDA, 2.11 or newer, is needed")
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma2"])
def test_a_compiled_layer_on_a_gpu_is_one_graph(name, models, compiled):
    """Needs no GPU, see above. Gemma-2 is not here: its attention stays outside, as on the CPU."""
    cuda = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with cuda:
            config = transformers.AutoConfig.from_pretrained(models[name])
            lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=torch.bfloat16)
        for layer in lm.base_model.layers:
            layer.compile(dynamic=True)
        for seed in range(8):
            with _disable_current_modes():
                ids, positions, *_, layout = sft.pack(random_rows(seed), True)
            ids, positions, layout = tree_map_only(torch.Tensor, lambda x: x.to(cuda), (ids + 0, positions + 0, layout))
            with torch.no_grad():
                lm.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=SimpleNamespace(**layout))
    assert compiled["stats"]["unique_graphs"] == 1 and not compiled["graph_break"]


def test_learning_rate():
    """40 steps: warm-up over 4, then 36 of half a cosine, which is at 1 after 0 of them, at 1/2 after 18, at 3/4 after 12, at 1/4 after 24."""
    expected = {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 4 + 18: 1.0, 4 + 12: 1.5, 4 + 24: 0.5, 40: 0.0}
    for step, rate in expected.items():
        assert sft.learning_rate(step, 40, 2.0) == pytest.approx(rate, abs=1e-12)
    assert sft.learning_rate(0, 1, 2.0) == sft.learning_rate(0, 3, 2.0) == 2.0  # a warm-up of at least one step
    assert min(sft.learning_rate(k, n, 1.0) for n in range(1, 60) for k in range(n)) > 0
    assert [sft.learning_rate(0, n, 1.0) for n in (14, 16)] == [1.0, 0.5]  # a tenth, rounded: 1 and 2 steps of warm-up


# --------------------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_the_optimizer_equals_its_original_on_whole_parameters(name, clip, models):
    import bitsandbytes

    scorer = sft.load_model(str(models["qwen2"]), CPU)
    optimizer = sft.make_optimizer(name, scorer, 0.1)
    whole = {n: torch.nn.Parameter(p.full_tensor().detach().clone()) for n, p in scorer.named_parameters()}
    begin = {n: p.detach().clone() for n, p in whole.items()}
    original = (torch.optim.AdamW if name == "adamw" else bitsandbytes.optim.AdamW8bit)(whole.values(), weight_decay=0.1)
    rows = random_rows(2)
    for step, lr in enumerate((1e-3, 3e-3, 2e-3)):
        weights = [torch.full((len(rs),), 1.0 + step) for _, rs in rows]
        _, grads = scores_and_gradients(scorer, rows, weights, 10**6)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        for p, g in zip(whole.values(), grads.values()):
            p.grad = g * min(1.0, clip / norm)
        original.param_groups[0]["lr"] = lr
        original.step()
        assert sft.update(scorer, optimizer, lr, clip)[0] == pytest.approx(norm, rel=1e-5)
        assert all(p.grad is None or not p.grad.full_tensor().any() for p in scorer.parameters())
    moved = torch.stack([(whole[n] - begin[n]).norm() for n in whole]).norm()
    error = torch.stack([(p.full_tensor() - whole[n]).detach().norm() for n, p in scorer.named_parameters()]).norm()
    assert moved > 0.1 and error <= (1e-5 if name == "adamw" else 1e-3) * moved
    if name == "adamw8bit":  # a matrix of 4096 weights or more has moments of one byte each
        kinds = {p.numel() >= 4096: original.state[p]["state1"].dtype for p in whole.values()}
        assert kinds == {True: torch.uint8, False: torch.float32}
        mine = [s["state1"] for s in optimizer.state.values()]
        assert [s.dtype for s in mine] == [original.state[p]["state1"].dtype for p in whole.values()]


# --------------------------------------------------------------------------------------------------------------------------- save


def save(scorer, tok, folder, dtype):
    (folder / "out.partial").mkdir()
    args = Namespace(model=str(folder / "m"), out=str(folder / "out"), save_dtype=str(dtype).removeprefix("torch."))
    sft.save_model(scorer, tok, folder / "out.partial", args)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_folder_is_an_ordinary_one(name, dtype, models, tokenizer, tmp_path):
    shutil.copytree(models[name], tmp_path / "m")
    stops = json.loads((tmp_path / "m/generation_config.json").read_text())
    (tmp_path / "m/generation_config.json").write_text(json.dumps(stops | dict(eos_token_id=[5, 7], temperature=0.6, do_sample=True)))
    tok = transformers.AutoTokenizer.from_pretrained(tokenizer)
    scorer = sft.load_model(str(tmp_path / "m"), CPU)
    rows = random_rows(3)
    with torch.no_grad():
        scores = sft.score(scorer, rows, range(len(rows)), CPU)
    save(scorer, tok, tmp_path, dtype)
    assert not (tmp_path / "out.partial").exists()
    lm, before = plain_model(tmp_path / "out"), plain_model(models[name]).state_dict()
    assert before.keys() == lm.state_dict().keys()
    assert all(torch.equal(v, before[k].to(dtype).float()) for k, v in lm.state_dict().items())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    embeddings = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert embeddings == (name in ("qwen2", "gemma2"))
    size = sum(p.numel() * dtype.itemsize for p in lm.parameters())  # tied weights are written once
    assert size <= (tmp_path / "out/model.safetensors").stat().st_size <= size + 8192
    if dtype == torch.float32:
        with torch.no_grad():
            again = torch.stack([reference_logp(lm, p, r) for p, rs in rows for r in rs])
        torch.testing.assert_close(scores.double(), again, rtol=1e-5, atol=0)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert set(generation.eos_token_id) == {4, 5, 7}  # <end>, <eos>, and what the model had
    assert (generation.temperature, generation.do_sample) == (0.6, True)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tok.chat_template


@pytest.mark.parametrize("sampling", [dict(temperature=0.6, top_p=0.9), dict(top_k=20)])
def test_a_generation_config_that_transformers_refuses_to_write_costs_no_training(sampling, models, tokenizer, tmp_path):
    """Some published folders (Llama-2) set a temperature without do_sample; transformers reads that, but raises where it is saved."""
    shutil.copytree(models["llama"], tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps(dict(eos_token_id=5, **sampling)))
    scorer = sft.load_model(str(tmp_path / "m"), CPU)
    tok = transformers.AutoTokenizer.from_pretrained(tokenizer)
    save(scorer, tok, tmp_path, torch.float32)
    assert set(transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == {4, 5}


@pytest.mark.parametrize("stops, kept", [(None, {4, 5}), (7, {4, 5, 7}), ([7, 9], {4, 5, 7, 9})])
def test_the_stop_ids_of_the_tokenizer_join_those_of_the_model(stops, kept, models, tokenizer, tmp_path):
    shutil.copytree(models["llama"], tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps(dict(eos_token_id=stops)))
    scorer = sft.load_model(str(tmp_path / "m"), CPU)
    save(scorer, transformers.AutoTokenizer.from_pretrained(tokenizer), tmp_path, torch.float32)
    assert set(transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id) == kept


# ------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_checkpoint_is_whole_or_absent_and_the_newest_counts(name, models, tmp_path, monkeypatch):
    """Steps 9 and 10 are kept, 11 fails while it is written. Then 10 is resumed, as if never stopped."""
    rows = random_rows(5)
    weights, state = [torch.ones(len(rs)) for _, rs in rows], dict(total=torch.tensor(0.1, dtype=torch.float64))
    steps = lambda: {int(f.name.split("-")[1]) for f in (tmp_path / "p/checkpoints").iterdir()}
    save = lambda step, run, state=None: sft.end_step(Namespace(save_every=1), tmp_path / "p", tqdm.tqdm(total=20, disable=True), 0, *run, state, dict(step=step))

    def new():
        scorer = sft.load_model(str(models["llama"]), CPU)
        return scorer, sft.make_optimizer(name, scorer)

    def step(scorer, optimizer):
        scores_and_gradients(scorer, rows, weights, 10**6)
        sft.update(scorer, optimizer, 1e-3, 1.0)
        return [p.full_tensor().detach().clone() for p in scorer.parameters()]

    run, write = new(), sft.dcp.save
    (tmp_path / "p").mkdir()
    assert sft.load_checkpoint(tmp_path / "p", *run) == (0, None)
    for k in range(10):
        step(*run)
        save(k + 1, run, state)
    assert steps() == {9, 10}
    expected = step(*run)

    def fail(*args, checkpoint_id):
        write(*args, checkpoint_id=checkpoint_id)
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(sft.dcp, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save(11, run)
    run = new()
    assert sft.load_checkpoint(tmp_path / "p", *run) == (10, state)
    assert all(torch.equal(a, b) for a, b in zip(step(*run), expected))
    save(11, run)
    assert steps() == {10, 11} and (tmp_path / "p/metrics.jsonl").read_text().count("\n") == 11


# --------------------------------------------------------------------------------------------------------------- every architecture
SMALL = dict(
    vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, num_experts=4,
    num_local_experts=4, n_routed_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, shared_expert_intermediate_size=16,
    n_group=1, topk_group=1, first_k_dense_replace=1)


@pytest.mark.soak
def test_every_architecture_of_transformers_is_refused_or_scored_as_transformers_does(tmp_path):
    """Random models of 4 layers, with no weight so small that a layer would not matter."""
    rows = [([3] * 7, [[5, 6, 9, 7], [8, 4]]), ([9, 4], [[11, 30, 5, 7, 8], [6], [40, 41]])]
    kinds, generator = dict(right=[], wrong=[], refused=[], unmade=[]), torch.Generator().manual_seed(0)
    for name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name](**SMALL)
            with torch.device("meta"):
                assert sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters()) < 6e7
            plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for p in plain.parameters():
                    p.normal_(0, 0.15, generator=generator) if p.ndim > 1 else None
                expected = torch.stack([reference_logp(plain, p, r) for p, rs in rows for r in rs])
            plain.save_pretrained(tmp_path / name)
        except Exception:  # of any kind: these settings do not suit it
            kinds["unmade"].append(name)
            continue
        try:
            with torch.no_grad():
                found = sft.score(sft.load_model(str(tmp_path / name), CPU), rows, [0, 1], CPU)
        except (ValueError, RuntimeError, LookupError):
            kinds["refused"].append(name)
            continue
        kinds["right" if torch.allclose(found.double(), expected, rtol=1e-5, atol=0) else "wrong"].append(name)
    print({kind: len(names) for kind, names in kinds.items()}, kinds)
    assert not kinds["wrong"]
    assert {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3"} <= {*kinds["right"]}
    assert {"mamba", "lfm2_moe", "qwen3_next", "jamba", "gpt2", "cohere"} <= {*kinds["refused"], *kinds["unmade"]}

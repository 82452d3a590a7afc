#!/usr/bin/env bash
# Prepare -> SFT -> align -> evaluate, on one code path from a laptop to a multi-GPU node.
#   bash run_all.sh        the toy world with dpo, simpo, amapo; tables at the end. 2 cores, installed: 2 to 4 minutes
#   bash run_all.sh test   the tests;   bash run_all.sh soak   the long ones too;   bench   beside TRL
#   bash run_all.sh NAME   an experiment of the table below, over SEEDS
# What is complete is skipped, what was interrupted resumes. Environment variables; paths from this folder:
#   SETTING    a row of the table below (toy), or custom (the default if MODEL is given)
#   MODEL      hub id or folder to start from
#   SFT_DATA   source of demonstrations; none: MODEL is the SFT model already
#   PREF_DATA  source of preferences to train on (what a source is: python prepare_data.py -h)
#   EVAL_DATA  NAME=SOURCE ..., preferences to evaluate on
#   LOSSES     which losses: "dpo simpo amapo". LOSS@K=V,K=V changes hyper-parameters, or lr,
#              batch-size, epochs, pairs, min-gap, sft-weight; it becomes the folder's name
#   SEED       of the data order and the toy world: 0.  SEEDS: several, and a table over them
#   OUT        where everything goes: runs/$SETTING
#   MAX_LENGTH tokens of prompt and response; longer pairs are dropped
#   PREPARE_ARGS, SFT_ARGS, ALIGN_ARGS, EVAL_ARGS   more arguments of the stages, e.g. "--save-every 50"
#   NPROC      processes on this node: one for each GPU, or 1
#   PYTHON     an interpreter that has the packages; without it a .venv is made here
#   TORCHRUN   more arguments for torchrun, with OUT on a shared disk and the same command on each
#              node: "--nnodes 2 --node-rank K --rdzv-backend c10d --rdzv-endpoint HOST:29500"
set -euo pipefail
cd "$(dirname "$0")"
# -------------------------------------------------------------------------------- the settings
ULTRACHAT=HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a:train_sft
ROBUST=rm-robustness/ultrafeedback-valid  # arXiv 2505.07271
EVALS="ID=$ROBUST-1-in-domain Prompt-OOD=$ROBUST-2-prompt-ood Response-OOD=$ROBUST-3-response-ood Mutual-OOD=$ROBUST-4-mutual-ood"
EVALS+=" RM-Bench=THU-KEG/RM-Bench@a0f737936b99411e96d891699349a9570b39c82e"
ULTRAFEEDBACK=HuggingFaceH4/ultrafeedback_binarized@3949bf5f8c17c394422ccfab0c31ea9c20bdeb85:train_prefs
# setting        | model                               | SFT data   | preferences     | max length
SETTINGS="
toy              | toy                                 | toy:sft    | toy:prefs       | 128
mistral-base     | mistralai/Mistral-7B-v0.1           | $ULTRACHAT | $ULTRAFEEDBACK  | 1024
mistral-instruct | mistralai/Mistral-7B-Instruct-v0.2  | none | princeton-nlp/mistral-instruct-ultrafeedback | 2048
llama3-base      | meta-llama/Meta-Llama-3-8B          | $ULTRACHAT | $ULTRAFEEDBACK  | 2048
llama3-instruct  | meta-llama/Meta-Llama-3-8B-Instruct | none | princeton-nlp/llama3-ultrafeedback@0e4d731abdb5f215085bbd92d0c2fcad7e080a4f | 2048
custom           | MODEL                               | none       | PREF_DATA       | 2048
"
# setting, stage: its arguments. dpo and simpo as SimPO's repository tuned them (gamma is beta times
# its gamma_beta_ratio), amapo as its own did (--replay for memory); toy: see README. No row: `other`.
RECIPES="
toy              sft    --lr 3e-3 --batch-size 64
toy              dpo    --lr 1e-4 --batch-size 64 --hp beta=0.3
toy              simpo  --lr 3e-4 --batch-size 64 --hp beta=5.0 --hp gamma=1.0
toy              amapo  --lr 3e-4 --batch-size 64 --hp beta=10
toy              alphadpo --lr 1e-4 --batch-size 64 --hp beta=2
toy              madpo  --lr 1e-4 --batch-size 64 --hp beta=0.3
toy              other  --lr 3e-4 --batch-size 64
mistral-base     sft    --lr 2e-5
mistral-base     dpo    --lr 5e-7 --hp beta=0.01
mistral-base     simpo  --lr 3e-7 --hp beta=2.0 --hp gamma=1.6
mistral-base     amapo  --lr 4e-7 --hp beta=2.0 --replay
mistral-instruct dpo    --lr 5e-7 --hp beta=0.01
mistral-instruct simpo  --lr 5e-7 --hp beta=2.5 --hp gamma=0.25
mistral-instruct amapo  --lr 6e-7 --hp beta=2.0 --replay
llama3-base      sft    --lr 2e-5
llama3-base      dpo    --lr 5e-7 --hp beta=0.01
llama3-base      simpo  --lr 6e-7 --hp beta=2.0 --hp gamma=1.0
llama3-base      amapo  --lr 6e-7 --hp beta=2.5 --replay
llama3-instruct  dpo    --lr 7e-7 --hp beta=0.01
llama3-instruct  simpo  --lr 1e-6 --hp beta=2.5 --hp gamma=1.375
llama3-instruct  amapo  --lr 1e-6 --hp beta=3.0 --replay
"
# experiment: losses (EVERY: all of them) | arguments of evaluate.py
EXPERIMENTS="
compare    dpo simpo amapo                                                             |
losses     EVERY                                                                       |
ablation   dpo simpo@gamma=0 simpo@gamma=0,beta=10 amapo amapo@form=paper amapo@znorm=false amapo@exp=false amapo@clip=false amapo@znorm=false,exp=false |
beta       dpo simpo@gamma=0 amapo@beta=1 amapo@beta=2 amapo@beta=2.5 amapo@beta=3 amapo@beta=5 amapo |
batch      dpo simpo@gamma=0 amapo@batch-size=16 amapo@batch-size=32 amapo amapo@batch-size=128 amapo@group=4 amapo@group=8 |
alpha      dpo simpo@gamma=0 simpo alphadpo@alpha=0 alphadpo alphadpo@alpha=0.1 alphadpo@alpha=0.2 alphadpo@alpha=0.3 amapo | --generate 100 --max-new-tokens 64
audit      dpo ipo simpo@gamma=0 simpo alphadpo betadpo amapo                           |
noise      dpo robust simpo@gamma=0 simpo amapo                                        |
perplexity dpo simpo@gamma=0 simper amapo amapo@exp=false                              | --generate 100 --max-new-tokens 64
frontier   dpo dpo@beta=0.1 dpo@beta=0.03 simpo@gamma=0 simpo simpo@beta=2 amapo amapo@beta=2.5 | --generate 100 --max-new-tokens 64
"
# --------------------------------------------------------------------------------- environment
install() { # requirements files into .venv, again when they change; a given PYTHON is only asked for what it lacks
  if [ -z "${PYTHON:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    PYTHON=$PWD/.venv/bin/python
    if ! cat "$@" | cmp -s - ".venv/${*//\//_}.installed"; then
      echo "installing $* into .venv (a few minutes, once)"
      "$PYTHON" -m pip install -q --disable-pip-version-check $(printf -- ' -r %s' "$@")
      cat "$@" > ".venv/${*//\//_}.installed"
    fi
  elif ! "$PYTHON" -c "import torch, transformers, datasets, bitsandbytes, tqdm" 2> /dev/null; then
    "$PYTHON" -m pip install -q $(printf -- ' -r %s' "$@")
  fi
}
die() { echo "run_all.sh: $*" >&2; exit 2; }
WHAT=${1:-compare}
case $WHAT in
  test) install requirements.txt tests/requirements.txt; exec "$PYTHON" -m pytest tests -q -rs --durations 5 -m "not soak" ;;
  soak) install requirements.txt tests/requirements.txt; exec "$PYTHON" -m pytest tests -q -rs --durations 5 ;;
  bench) install requirements.txt tests/requirements-bench.txt; exec "$PYTHON" tests/bench.py "${@:2}" ;;
  *) line=$(awk -v w="$WHAT" '$1 == w { sub(/^ *[^ ]+/, ""); print }' <<< "$EXPERIMENTS")
    [ -n "$line" ] || die "$WHAT: wanted test, soak, bench$(awk '/[|]/ { printf ", %s", $1 }' <<< "$EXPERIMENTS")"
    install requirements.txt ;;
esac
TABLE=evaluation && [ "$WHAT" = compare ] || TABLE=$WHAT SEEDS=${SEEDS:-0 1 2}
# ---------------------------------------------------------------------------------- the stages
SETTING=${SETTING:-${MODEL:+custom}} SETTING=${SETTING:-toy}
row=$(awk -F' *[|] *' -v s="$SETTING" '{ sub(/ +$/, "", $1) } $1 == s' <<< "$SETTINGS")
[ -n "$row" ] || die "SETTING=$SETTING: wanted one of$(awk '/[|]/ { printf " %s", $1 }' <<< "$SETTINGS")"
[ "$SETTING" != custom ] || [ -n "${MODEL:-}" -a -n "${PREF_DATA:-}" -a -n "${EVAL_DATA:-}" ] ||
  die "your own run needs MODEL, PREF_DATA and EVAL_DATA"
IFS='|' read -r _ model sft_data pref_data length <<< "$(tr -d ' ' <<< "$row")"
MODEL=${MODEL:-$model} SFT_DATA=${SFT_DATA:-$sft_data} PREF_DATA=${PREF_DATA:-$pref_data}
OUT=${OUT:-runs/$SETTING} MAX_LENGTH=${MAX_LENGTH:-$length} LOSSES=${LOSSES:-${line%|*}} SEED=${SEED:-0}
[ "$MODEL" = toy ] || EVAL_DATA=${EVAL_DATA:-$EVALS}
[[ $OUT != *[[:space:]%]* ]] || die "OUT=$OUT: without spaces and %, please"
[[ ${TORCHRUN:-} != *nnodes* || $TORCHRUN == *node[-_]rank* ]] || die "TORCHRUN: wanted --node-rank too, as node 0 prepares the data"
FLAGS="lr batch-size epochs pairs min-gap sft-weight" # of align.py, that LOSS@K=V may change; other K are hyper-parameters
LOSSES=$(FLAGS=$FLAGS "$PYTHON" -c 'import argparse, os, sys, align, evaluate
def parse(name, add, words):
    parser = argparse.ArgumentParser(prog=f"run_all.sh: {name}", usage=argparse.SUPPRESS, allow_abbrev=False)
    add(lambda flag, **how: flag[0] != "-" or parser.add_argument(flag, **how | dict(required=False)))
    return vars(parser.parse_args(words))
names = sys.argv[1:] if sys.argv[1:] != ["EVERY"] else [k for k in align.LOSSES if k != "reward"]
try:
    for name, _, changes in (name.partition("@") for name in names):
        changes = {k: v for k, _, v in (c.partition("=") for c in changes.split(",") if c)}
        flags = {*changes} & {*os.environ["FLAGS"].split()}
        new = parse(f"LOSSES: {name}", align.arguments, [f"--{k}={changes[k]}" for k in flags])
        align.check(all(new[k.replace("-", "_")] > 0 for k in flags & {"lr", "batch-size", "epochs"}), f"{name}, {changes}: out of range")
        align.check(name not in ("reward", "data", "sft", "evaluation"), f"{name} is no policy: OUT/{name} is another folder")
        align.check(name != "madpo" or not flags & {"pairs", "min-gap"}, "its reward model wants them too: ALIGN_ARGS")
        align.configure(name, [f"{k}={changes[k]}" for k in changes if k not in flags])
except (ValueError, ArithmeticError) as error: sys.exit(f"run_all.sh: LOSSES: {error}" + ("; K may also be " + os.environ["FLAGS"]) * (" has no " in str(error)))
for name, add in dict(SFT_ARGS=lambda x: align.trainer_arguments(x, 0, 0, 0, ""), ALIGN_ARGS=align.arguments, EVAL_ARGS=evaluate.arguments).items():
    parse(name, add, os.environ.get(name, "").split())
print(*names)' $LOSSES)
recipe() { # the arguments of a stage in this setting, or those called `other`
  awk -v s="$SETTING" -v l="${1%%@*}" '$1 == s && ($2 == l || $2 == "other") { $1 = ""; if ($2 == l || found == "") found = $0 }
    END { sub(/^ *[^ ]+/, "", found); print found }' <<< "$RECIPES"
}
changes() { # those of LOSS@K=V,...
  local pair pairs=; [[ $1 != *@* ]] || pairs=${1#*@}
  for pair in ${pairs//,/ }; do
    [[ " $FLAGS " == *" ${pair%%=*} "* ]] && echo "--${pair%%=*} ${pair#*=}" || echo "--hp $pair"
  done
}
gpus=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU || true)
[ "$gpus" = 0 ] || [ -z "${CUDA_VISIBLE_DEVICES+x}" ] || gpus=$(grep -o '[^, ]\+' <<< "$CUDA_VISIBLE_DEVICES" | wc -l || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
watched=(setpriv --pdeathsig TERM) && "${watched[@]}" true 2> /dev/null || watched=() # a stage gets SIGTERM if this shell dies
launch=("${watched[@]}" "$PYTHON")
if [ "$gpus" -gt 0 ] || [ "$NPROC" -gt 1 ] || [ -n "${TORCHRUN:-}" ]; then
  launch+=(-m torch.distributed.run --nproc-per-node "$NPROC" ${TORCHRUN:---standalone})
fi
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-3000} TOKENIZERS_PARALLELISM=false # spin shortly: else threads that wait take the cores of others
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores = $(getconf _NPROCESSORS_ONLN) / NPROC) > 0 ? cores : 1))}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
[ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-10} HF_DATASETS_DISABLE_PROGRESS_BARS=${HF_DATASETS_DISABLE_PROGRESS_BARS:-1} # in a log
say() { printf '\n[%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
align() { # NAME [ARGUMENT ...]: OUT/NAME from OUT/sft
  say "align: $OUT/$1"
  "${launch[@]}" align.py --loss "${1%%@*}" --model "$SFT" --data "$OUT/data/train" \
    --out "$OUT/$1" $(recipe "$1") --seed "$SEED" ${ALIGN_ARGS:-} $(changes "$1") "${@:2}"
}
chain() { # OUT SEED: all stages; the table in OUT/evaluation, or OUT/EXPERIMENT
  local OUT=$1 SEED=$2 MODEL=$MODEL SFT table=$1/$TABLE loss
  say "prepare: $OUT/data"
  if [[ "${TORCHRUN:-}" =~ --node[-_]rank[\ =]+[1-9] ]]; then # one node prepares, the others wait for it
    until [ -e "$OUT/data/report.json" ]; do sleep 5; done
  else
    sft_source=() && [ "$SFT_DATA" = none ] || sft_source=(--sft "$SFT_DATA")
    "${watched[@]}" "$PYTHON" prepare_data.py --model "$MODEL" "${sft_source[@]}" --prefs "$PREF_DATA" \
      --eval ${EVAL_DATA:-} --max-length "$MAX_LENGTH" --seed "$SEED" --out "$OUT/data" ${PREPARE_ARGS:-}
    [[ " ${PREPARE_ARGS:-}" != *" --dry-run"* ]] || { say "a dry run: nothing was written"; exit 0; }
  fi
  [ "$MODEL" != toy ] || MODEL=$OUT/data/model
  if [ "$SFT_DATA" = none ]; then SFT=$MODEL; else
    SFT=$OUT/sft
    say "SFT: $SFT"
    "${launch[@]}" sft.py --model "$MODEL" --data "$OUT/data/sft" --out "$SFT" $(recipe sft) --seed "$SEED" ${SFT_ARGS:-}
  fi
  for loss in $LOSSES; do
    [ "${loss%%@*}" != madpo ] || align reward
    align "$loss" $([ "${loss%%@*}" != madpo ] || echo --margins "$OUT/reward/margins.json")
  done
  say "evaluate: $table"
  "${launch[@]}" evaluate.py "$SFT" $(printf "$OUT/%s " $LOSSES) --ref "$SFT" \
    --data "$OUT/data/eval" --out "$table" ${line##*|} ${EVAL_ARGS:-}
  say "done; everything is in $OUT, the table in $table/results.md"
}
if [ -z "${TORCHRUN:-}" ] && command -v flock > /dev/null; then mkdir -p "$OUT" && exec 9> "$OUT/.lock"; flock -n 9 || [ $? != 1 ] || die "$OUT: in use by another run"; fi
if [ -z "${SEEDS:-}" ]; then
  chain "$OUT" "$SEED"
else
  for seed in $SEEDS; do chain "$OUT/seed-$seed" "$seed"; done
  [ "$(wc -w <<< "$SEEDS")" -lt 2 ] || "$PYTHON" evaluate.py --summary $(printf "$OUT/seed-%s/$TABLE " $SEEDS) --out "$OUT/summary-$TABLE"
fi
if [ "$WHAT" = noise ] && [ "$PREF_DATA" = toy:prefs ]; then # other label noise, other shares of hard pairs
  for world in noise=0.1 noise=0.2 noise=0.3 hard=0.2 hard=0.5 hard=0.8; do
    OUT=$OUT-$world PREF_DATA=toy:prefs+$world LOSSES=$LOSSES PYTHON=$PYTHON "${watched[@]}" bash run_all.sh noise
  done
fi

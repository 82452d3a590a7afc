#!/usr/bin/env bash
# Prepare -> SFT -> align -> evaluate, on one code path from a laptop to a multi-GPU node.
#
#   bash run_all.sh        the toy world with dpo, simpo, amapo; a table at the end. 2 cores, no GPU,
#                          no hub: under 10 minutes after installation
#   bash run_all.sh test   the tests;   bash run_all.sh soak   the long ones too
#
# What is complete is skipped, what was interrupted resumes. Everything is set by environment variables:
#
#   SETTING    a row of the table below: toy (the default), mistral-base, mistral-instruct,
#              llama3-base, llama3-instruct; or custom (the default if MODEL is given)
#   MODEL      hub id or folder to start from
#   SFT_DATA   source of demonstrations; none: MODEL is the SFT model already
#   PREF_DATA  source of preferences to train on (what a source is: python prepare_data.py -h)
#   EVAL_DATA  NAME=SOURCE ..., preferences to evaluate on
#   LOSSES     which losses: "dpo simpo amapo"
#   OUT        where everything goes: runs/$SETTING
#   MAX_LENGTH tokens of prompt and response; longer pairs are dropped
#   SEED       of the data order and the toy world: 0
#   SFT_ARGS, ALIGN_ARGS   more arguments for sft.py and align.py, e.g. "--save-every 50"
#   NPROC      processes on this node: one for each GPU, or 1
#   PYTHON     an interpreter that has the packages; without it a .venv is made here
#   TORCHRUN   more arguments for torchrun, with OUT on a shared disk and the same command on each
#              node: "--nnodes 2 --node-rank K --rdzv-backend c10d --rdzv-endpoint HOST:29500"
set -euo pipefail
cd "$(dirname "$0")"

# -------------------------------------------------------------------------------- the settings
ULTRACHAT=HuggingFaceH4/ultrachat_200k:train_sft
ROBUST=rm-robustness/ultrafeedback-valid  # arXiv 2505.07271
EVALS="ID=$ROBUST-1-in-domain Prompt-OOD=$ROBUST-2-prompt-ood Response-OOD=$ROBUST-3-response-ood Mutual-OOD=$ROBUST-4-mutual-ood"
EVALS+=" RM-Bench=THU-KEG/RM-Bench"
# setting        | model                               | SFT data   | preferences     | max length
ULTRAFEEDBACK=HuggingFaceH4/ultrafeedback_binarized:train_prefs
SETTINGS="
toy              | toy                                 | toy:sft    | toy:prefs       | 128
mistral-base     | mistralai/Mistral-7B-v0.1           | $ULTRACHAT | $ULTRAFEEDBACK  | 1024
mistral-instruct | mistralai/Mistral-7B-Instruct-v0.2  | none | princeton-nlp/mistral-instruct-ultrafeedback | 2048
llama3-base      | meta-llama/Meta-Llama-3-8B          | $ULTRACHAT | $ULTRAFEEDBACK  | 2048
llama3-instruct  | meta-llama/Meta-Llama-3-8B-Instruct | none | princeton-nlp/llama3-ultrafeedback | 2048
custom           | MODEL                               | none       | PREF_DATA       | 2048
"
# setting, stage: its arguments. dpo and simpo as SimPO's repository tuned them (gamma is beta times
# its gamma_beta_ratio), amapo as its own did. A loss without a row gets `other`, or the defaults.
RECIPES="
toy              sft    --lr 3e-3 --batch-size 64
toy              dpo    --lr 3e-4 --batch-size 64 --hp beta=0.1
toy              simpo  --lr 3e-4 --batch-size 64 --hp beta=2.0 --hp gamma=1.0
toy              amapo  --lr 3e-4 --batch-size 64 --hp beta=2.5
toy              other  --lr 3e-4 --batch-size 64
mistral-base     sft    --lr 2e-5
mistral-base     dpo    --lr 5e-7 --hp beta=0.01
mistral-base     simpo  --lr 3e-7 --hp beta=2.0 --hp gamma=1.6
mistral-base     amapo  --lr 4e-7 --hp beta=2.0
mistral-instruct dpo    --lr 5e-7 --hp beta=0.01
mistral-instruct simpo  --lr 5e-7 --hp beta=2.5 --hp gamma=0.25
mistral-instruct amapo  --lr 6e-7 --hp beta=2.0
llama3-base      sft    --lr 2e-5
llama3-base      dpo    --lr 5e-7 --hp beta=0.01
llama3-base      simpo  --lr 6e-7 --hp beta=2.0 --hp gamma=1.0
llama3-base      amapo  --lr 6e-7 --hp beta=2.5
llama3-instruct  dpo    --lr 7e-7 --hp beta=0.01
llama3-instruct  simpo  --lr 1e-6 --hp beta=2.5 --hp gamma=1.375
llama3-instruct  amapo  --lr 1e-6 --hp beta=3.0
"

# --------------------------------------------------------------------------------- environment
install() { # requirements files into .venv, again when they change; a given PYTHON is only asked for what it lacks
  if [ -z "${PYTHON:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    PYTHON=$PWD/.venv/bin/python
    if ! cat "$@" | cmp -s - ".venv/$#.installed"; then
      echo "installing $* into .venv (a few minutes, once)"
      "$PYTHON" -m pip install -q --disable-pip-version-check $(printf -- ' -r %s' "$@")
      cat "$@" > ".venv/$#.installed"
    fi
  elif ! "$PYTHON" -c "import torch, transformers, datasets, bitsandbytes, tqdm"; then
    "$PYTHON" -m pip install -q $(printf -- ' -r %s' "$@")
  fi
}

WHAT=${1:-compare}
case $WHAT in
  test|soak)
    install requirements.txt tests/requirements.txt
    select="not soak"; [ "$WHAT" = test ] || select=""
    exec "$PYTHON" -m pytest tests -q --durations 5 -m "$select" ;;
  compare) install requirements.txt ;;
  *) echo "run_all.sh: $WHAT: wanted compare (the default), test or soak" >&2; exit 2 ;;
esac

# ---------------------------------------------------------------------------------- the stages
[ -z "${MODEL:-}" ] || SETTING=${SETTING:-custom}
SETTING=${SETTING:-toy}
row=$(awk -F' *[|] *' -v s="$SETTING" '{ sub(/ +$/, "", $1) } $1 == s' <<< "$SETTINGS")
if [ -z "$row" ]; then
  echo "run_all.sh: SETTING=$SETTING: wanted$(awk '/[|]/ { printf " %s", $1 }' <<< "$SETTINGS")" >&2
  exit 2
fi
if [ "$SETTING" = custom ] && [ -z "${MODEL:-}" -o -z "${PREF_DATA:-}" -o -z "${EVAL_DATA:-}" ]; then
  echo "run_all.sh: your own run needs MODEL, PREF_DATA and EVAL_DATA" >&2
  exit 2
fi
IFS='|' read -r _ model sft_data pref_data length <<< "$(tr -d ' ' <<< "$row")"
MODEL=${MODEL:-$model} SFT_DATA=${SFT_DATA:-$sft_data} PREF_DATA=${PREF_DATA:-$pref_data}
OUT=${OUT:-runs/$SETTING} MAX_LENGTH=${MAX_LENGTH:-$length}
[ "$MODEL" = toy ] || EVAL_DATA=${EVAL_DATA:-$EVALS}
LOSSES=${LOSSES:-dpo simpo amapo} SEED=${SEED:-0}
recipe() { # the arguments of a stage in this setting; a loss without a row gets the one called `other`
  awk -v s="$SETTING" -v l="$1" '$1 == s && ($2 == l || $2 == "other") { $1 = ""; if ($2 == l || found == "") found = $0 }
    END { sub(/^ *[^ ]+/, "", found); print found }' <<< "$RECIPES"
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
launch=("$PYTHON")
if [ "$gpus" -gt 0 ] || [ "$NPROC" -gt 1 ] || [ -n "${TORCHRUN:-}" ]; then
  launch=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" ${TORCHRUN:---standalone})
fi
export TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
say() { printf '\n[%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

say "prepare: $OUT/data"
if [[ "${TORCHRUN:-}" =~ --node[-_]rank[\ =]+[1-9] ]]; then # one node prepares, the others wait for it
  until [ -e "$OUT/data/report.json" ]; do sleep 5; done
else
  sft_source=() && [ "$SFT_DATA" = none ] || sft_source=(--sft "$SFT_DATA")
  "$PYTHON" prepare_data.py --model "$MODEL" "${sft_source[@]}" --prefs "$PREF_DATA" \
    --eval ${EVAL_DATA:-} --max-length "$MAX_LENGTH" --seed "$SEED" --out "$OUT/data"
fi
[ "$MODEL" != toy ] || MODEL=$OUT/data/model
SFT=$MODEL
if [ "$SFT_DATA" != none ]; then
  say "SFT: $OUT/sft"
  "${launch[@]}" sft.py --model "$MODEL" --data "$OUT/data/sft" --out "$OUT/sft" \
    $(recipe sft) --seed "$SEED" ${SFT_ARGS:-}
  SFT=$OUT/sft
fi
for loss in $LOSSES; do
  say "align: $OUT/$loss"
  "${launch[@]}" align.py --loss "$loss" --model "$SFT" --data "$OUT/data/train" \
    --out "$OUT/$loss" $(recipe "$loss") --seed "$SEED" ${ALIGN_ARGS:-}
done
say "evaluate: $OUT/evaluation"
"${launch[@]}" evaluate.py "$SFT" $(printf "$OUT/%s " $LOSSES) --ref "$SFT" \
  --data "$OUT/data/eval" --out "$OUT/evaluation"
say "done; everything is in $OUT, the table in $OUT/evaluation/results.md"

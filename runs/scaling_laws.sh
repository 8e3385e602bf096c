#!/usr/bin/env bash
# A miniseries of --arch=modern by the depth dial, and the power law through it. Unattended; run it again to go on.
#
#   bash runs/scaling_laws.sh                                            # depths 2 4 6 8 on climbmix
#   DEPTHS="2 4 6" VOCAB=4096 bash runs/scaling_laws.sh --dataset=FOLDER --max_seq_len=512 \
#       --target_param_data_ratio=0.1 --eval_tokens=524288 --compile                    # two CPU cores, 20 minutes
#   DEPTHS="4 6" BATCHES="8192 16384 32768" bash runs/scaling_laws.sh ...   # which batch is best at each depth?
#
# The flags are those of scripts.base_train (--dataset, --num_iterations, --max_seq_len ...); RANKS > 1 uses torchrun.
# Everything goes to $NANOCHAT_BASE_DIR/scaling_laws, so that no other run's report or checkpoints are touched:
# runs.jsonl (a line a model: flags, tokens, FLOPs, bpb) and bpb.png. The tokenizer is trained there, on the same text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. runs/setup.sh
. runs/signals.sh
[ -n "${VIRTUAL_ENV:-}" ] || setup # an environment that is active is taken as it is

DATASET=climbmix
for word in "$@"; do
    case $word in
        --dataset=*) DATASET=${word#*=} ;;
        --dataset) refuse "write --dataset=NAME, with =" ;;
        --depth | --depth=*) refuse "the depths come from the environment; try DEPTHS=\"${word#*=}\"" ;;
    esac
done
BASE=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
export NANOCHAT_BASE_DIR=$BASE/scaling_laws
mkdir -p "$NANOCHAT_BASE_DIR"
NANOCHAT_BASE_DIR=$(cd "$NANOCHAT_BASE_DIR" && pwd)
for shards in "$BASE"/base_data*; do # what was fetched before need not be fetched again
    [ ! -d "$shards" ] || ln -sfn "$(cd "$shards" && pwd)" "$NANOCHAT_BASE_DIR/$(basename "$shards")"
done
OUT=$NANOCHAT_BASE_DIR/runs.jsonl

python=(python)
if [ "${RANKS:-1}" -gt 1 ]; then python=(python runs/launch.py --standalone --nproc_per_node="$RANKS"); fi
pass_signals_on
[ -e "$NANOCHAT_BASE_DIR/tokenizer" ] ||
    attend python -m scripts.tok_train --dataset="$DATASET" --vocab_size="${VOCAB:-32768}" --max_chars="${CHARS:-500_000_000}"
for depth in ${DEPTHS:-2 4 6 8}; do
    for batch in ${BATCHES:-auto}; do
        size=()
        [ "$batch" = auto ] || size=("--total_batch_size=$batch")
        echo "== depth $depth, batch $batch"
        attend "${python[@]}" bench/scaling_laws.py run "$OUT" --arch=modern --depth="$depth" "${size[@]}" \
            --eval_every=1000 --save_every=500 --core_metric_every=-1 --sample_every=-1 "$@"
    done
done
attend python bench/scaling_laws.py fit "$OUT" "$NANOCHAT_BASE_DIR/bpb.png"

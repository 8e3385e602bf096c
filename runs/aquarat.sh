#!/usr/bin/env bash
# The recipe of the reference report: a depth-8 model, 200 steps of pretraining and of midtraining, then fine-tuning
# and reinforcement learning with AQuA-RAT (algebra with five options) in it.
#
#   bash runs/aquarat.sh gpu8        # the reference's sizes
#   NANOCHAT_HUB_DIR=DIR bash runs/aquarat.sh cpu   # turned down to about ten minutes on two cores, on real text and
#                                    # tasks from a hub folder (datasets/local/edu-text-small is the prose)
#   ... --plan | --commands | --new: as in speedrun.sh
#
# A model of the cpu tier is far too small for these tasks: scores near chance (0.20 for AQUA, 0 for GSM8K) are what
# to expect of it. The reference's own AQUA scores, 0.27, are those of always answering A.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
parse_arguments "cpu gpu8" "$@"
[ -z "$QUICK" ] || refuse "--quick goes with speedrun.sh cpu only"

if [ "$TIER" = cpu ]; then
    if [ "$MODE" = run ] && [ ! -d "${NANOCHAT_HUB_DIR:-}/datasets/local/edu-text-small" ]; then
        refuse "the cpu tier reads real text: set NANOCHAT_HUB_DIR to a hub folder with datasets/local/edu-text-small"
    fi
    TEXT=${NANOCHAT_HUB_DIR:-NANOCHAT_HUB_DIR}/datasets/local/edu-text-small
    BATCH="--max_seq_len=512 --device_batch_size=8 --total_batch_size=8192"

    begin d4
    stage reset python -m nanochat.report reset
    stage tok_train python -m scripts.tok_train --dataset="$TEXT" --max_chars=20_000_000 --vocab_size=4096
    stage tok_eval python -m scripts.tok_eval
    stage base_train python -m scripts.base_train --run="$WANDB_RUN" --dataset="$TEXT" --depth=4 --aspect_ratio=32 --head_dim=32 $BATCH --num_iterations=100 --eval_every=50 --eval_tokens=65536 --core_metric_every=100 --core_metric_max_per_task=4 --sample_every=-1 --resume=auto
    stage base_loss python -m scripts.base_loss --model_tag="$TAG" --device_batch_size=8 --split_tokens=65536
    stage base_eval python -m scripts.base_eval --model_tag="$TAG" --max_per_task=4
    stage mid_train python -m scripts.mid_train --run="$WANDB_RUN" --model_tag="$TAG" $BATCH --num_iterations=50 --eval_every=25 --eval_tokens=65536 --resume=auto
    stage eval_mid python -m scripts.chat_eval -i mid --model_tag="$TAG" -a GSM8K --max_new_tokens=128 --batch_size=32 --max_problems=64
    stage chat_sft python -m scripts.chat_sft --run="$WANDB_RUN" --model_tag="$TAG" --num_iterations=50 --aqua_train_examples=20000 --aqua_val_examples=254 --eval_every=50 --eval_steps=16 --eval_metrics_every=-1 --resume=auto
    stage eval_sft python -m scripts.chat_eval -i sft --model_tag="$TAG" -a AQUA
    # AQUA rather than GSM8K: a guessed letter is right one time in five, while no guessed number ever is
    stage chat_rl python -m scripts.chat_rl --run="$WANDB_RUN" --model_tag="$TAG" --task=AQUA --device_batch_size=4 --num_samples=4 --max_new_tokens=64 --temperature=0.7 --num_iterations=10 --eval_every=10 --eval_examples=32 --resume=auto
    stage eval_rl python -m scripts.chat_eval -i rl --model_tag="$TAG" -a AQUA -m 64
    stage report python -m nanochat.report generate
    finish
    exit
fi

begin d8
stage reset python -m nanochat.report reset
stage dataset python -m nanochat.dataset -n 24 --dataset=fineweb-edu
stage tok_train python -m scripts.tok_train --dataset=fineweb-edu
stage tok_eval python -m scripts.tok_eval
ranks base_train scripts.base_train --run="$WANDB_RUN" --dataset=fineweb-edu --depth=8 --num_iterations=200 --device_batch_size=32 --resume=auto
ranks base_loss scripts.base_loss --model_tag="$TAG"
ranks base_eval scripts.base_eval --model_tag="$TAG"
ranks mid_train scripts.mid_train --run="$WANDB_RUN" --model_tag="$TAG" --num_iterations=200 --resume=auto
ranks eval_mid scripts.chat_eval -i mid --model_tag="$TAG" -a GSM8K
ranks chat_sft scripts.chat_sft --run="$WANDB_RUN" --model_tag="$TAG" --aqua_train_examples=20000 --aqua_val_examples=254 --resume=auto
ranks eval_sft scripts.chat_eval -i sft --model_tag="$TAG" -a AQUA
# on one GPU and on GSM8K, as the reference's step times say that it was
stage chat_rl python -m scripts.chat_rl --run="$WANDB_RUN" --model_tag="$TAG" --task=GSM8K --device_batch_size=1 --num_samples=4 --max_new_tokens=64 --temperature=0.7 --resume=auto
stage eval_rl python -m scripts.chat_eval -i rl --model_tag="$TAG" -a AQUA -m 64
stage report python -m nanochat.report generate
finish

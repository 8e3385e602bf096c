#!/usr/bin/env bash
# From raw text to a model you can talk to, and report.md. One line a stage.
#
#   bash speedrun.sh              # the largest tier that this machine can run
#   bash speedrun.sh cpu          # no GPU, no network: a small model of the embedded corpus, tinyworld
#   bash speedrun.sh cpu --quick  # the same stages, turned down to about two minutes: a check, no model to talk to
#   bash speedrun.sh gpu8         # the real recipe: depth 20 on eight GPUs (gpu1, gpu2 and gpu4: the same on fewer)
#   bash speedrun.sh gpu8 --plan      # each stage's command, expected time, memory and cost; starts nothing
#   bash speedrun.sh gpu8 --commands  # the bare commands
#   bash speedrun.sh gpu8 --new       # a new run, though the last one was cut short and could go on
#
# Run it again after any interruption: it goes on where it stopped, stage and step. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1
# make the running stage save and end; the exit code is then 75. A second Ctrl-C ends it at once.
#
# Everything is written under NANOCHAT_BASE_DIR (default ~/.cache/nanochat). WANDB_RUN=name logs the run to wandb.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/runs/recipe.sh"
parse_arguments "cpu gpu1 gpu2 gpu4 gpu8" "$@"

if [ "$TIER" = cpu ]; then
    MODEL="--depth=4 --arch=modern --aspect_ratio=48 --head_dim=96 --max_seq_len=256"
    CHARS=8_000_000 VOCAB=2048 BASE_STEPS=380 EVAL_TOKENS=32768 CORE=40 COMPILE=--compile
    MID_STEPS=140 SFT_STEPS=190 RL_STEPS=160 RL_EXAMPLES=32 PROBLEMS=200
    if [ -n "$QUICK" ]; then
        MODEL="--depth=2 --arch=modern --aspect_ratio=32 --head_dim=32 --max_seq_len=256"
        CHARS=500_000 VOCAB=1024 BASE_STEPS=40 EVAL_TOKENS=8192 CORE=5 COMPILE=--no-compile
        MID_STEPS=20 SFT_STEPS=20 RL_STEPS=3 RL_EXAMPLES=8 PROBLEMS=10
    fi
    DEPTH=${MODEL#--depth=} DEPTH=${DEPTH%% *}
    # rates for small steps, see docs/EXPERIMENTS.md: at the default one, meant for half a million tokens, embeddings only jitter
    BATCH="--device_batch_size=16 --total_batch_size=4096" RATES="--embedding_lr=0.05 --unembedding_lr=0.012 --matrix_lr=0.02"

    begin "d$DEPTH"
    stage reset python -m nanochat.report reset
    stage tok_train python -m scripts.tok_train --dataset=tinyworld --max_chars=$CHARS --vocab_size=$VOCAB
    stage tok_eval python -m scripts.tok_eval
    stage base_train python -m scripts.base_train --run="$WANDB_RUN" --dataset=tinyworld $MODEL $BATCH $RATES --warmdown_ratio=0.5 --num_iterations=$BASE_STEPS --eval_every=200 --eval_tokens=$EVAL_TOKENS --core_metric_every=-1 --sample_every=-1 --save_every=200 $COMPILE --resume=auto
    stage base_loss python -m scripts.base_loss --model_tag="$TAG" --device_batch_size=16 --split_tokens=$EVAL_TOKENS
    stage base_eval python -m scripts.base_eval --model_tag="$TAG" --max_per_task=$CORE
    stage mid_train python -m scripts.mid_train --run="$WANDB_RUN" --model_tag="$TAG" --max_seq_len=256 $BATCH $RATES --num_iterations=$MID_STEPS --eval_every=100 --eval_tokens=$EVAL_TOKENS --save_every=100 $COMPILE --resume=auto
    stage eval_mid python -m scripts.chat_eval -i mid --model_tag="$TAG" --max_new_tokens=128 --batch_size=32 --max_problems=$PROBLEMS
    stage chat_sft python -m scripts.chat_sft --run="$WANDB_RUN" --model_tag="$TAG" --device_batch_size=16 --target_examples_per_step=64 $RATES --init_lr_frac=0.4 --num_iterations=$SFT_STEPS --eval_steps=8 --eval_metrics_every=-1 --save_every=100 --resume=auto
    stage eval_sft python -m scripts.chat_eval -i sft --model_tag="$TAG" --max_new_tokens=128 --batch_size=32 --max_problems=$PROBLEMS
    stage chat_rl python -m scripts.chat_rl --run="$WANDB_RUN" --model_tag="$TAG" --task=TinyWordProblems $RATES --init_lr_frac=0.1 --kl=0.1 --num_iterations=$RL_STEPS --examples_per_step=8 --device_batch_size=16 --num_samples=16 --max_new_tokens=96 --eval_every=40 --eval_examples=$RL_EXAMPLES --save_every=20 --resume=auto
    stage eval_rl python -m scripts.chat_eval -i rl --model_tag="$TAG" --max_new_tokens=128 --batch_size=32 --max_problems=$PROBLEMS
    stage report python -m nanochat.report generate
    finish
    exit
fi

# The GPU tiers. Depth 20 has 561M parameters and trains on 20 tokens each, 11.2B: 54B characters, 216 shards of 250M.
# Public runs of this recipe on eight H100 (with FineWeb-Edu) took 3.5 to 4.3 hours and ended at 0.81 bits per byte
# and a CORE metric of 0.19 to 0.22. ROWS a forward pass: 16 need about 43 GB a GPU, 32 about 80 GB.
ROWS=$((GPUS == 8 ? 32 : 16))
begin d20
stage reset python -m nanochat.report reset
stage dataset python -m nanochat.dataset -n 8
background shards python -m nanochat.dataset -n 240
stage tok_train python -m scripts.tok_train --max_chars=2_000_000_000
stage tok_eval python -m scripts.tok_eval
await shards
ranks base_train scripts.base_train --run="$WANDB_RUN" --depth=20 --device_batch_size=$ROWS --resume=auto
ranks base_loss scripts.base_loss --model_tag="$TAG" --device_batch_size=$ROWS
ranks base_eval scripts.base_eval --model_tag="$TAG"
ranks mid_train scripts.mid_train --run="$WANDB_RUN" --model_tag="$TAG" --device_batch_size=$ROWS --resume=auto
ranks eval_mid scripts.chat_eval -i mid --model_tag="$TAG"
ranks chat_sft scripts.chat_sft --run="$WANDB_RUN" --model_tag="$TAG" --resume=auto
ranks eval_sft scripts.chat_eval -i sft --model_tag="$TAG"
ranks chat_rl scripts.chat_rl --run="$WANDB_RUN" --model_tag="$TAG" --task=GSM8K --resume=auto
ranks eval_rl scripts.chat_eval -i rl --model_tag="$TAG" -a GSM8K
stage report python -m nanochat.report generate
finish

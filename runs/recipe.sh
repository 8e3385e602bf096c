# Sourced by the recipes (speedrun.sh, runs/aquarat.sh), which are lists of these:
#
#   stage NAME COMMAND...        run a stage; with --plan or --commands only note it
#   ranks NAME MODULE FLAGS...   the same on all GPUs of the tier, by torchrun; plain python on one GPU or a CPU
#   background NAME COMMAND...   begin a stage; `await NAME` waits until it is through
#
# So each command stands in one place, whether it is run, planned or printed.

# Paths in the environment may be relative to where the user stands; the stages run from the repository's root.
for name in NANOCHAT_BASE_DIR NANOCHAT_HUB_DIR NANOCHAT_AQUA_DIR AQUA_DATA_DIR TIKTOKEN_CACHE_DIR; do
    value=${!name:-}
    case $value in "" | /*) ;; *) export "$name=$PWD/$value" ;; esac
done
unset name value
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. runs/setup.sh

count_gpus() {
    command -v nvidia-smi >/dev/null || { echo 0; return; }
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
}

# parse_arguments "TIERS" "$@" sets TIER, GPUS, MODE (run, plan, commands), QUICK (yes or empty), RESUME
# (--resume=auto or empty) and WANDB_RUN.
parse_arguments() {
    local tiers=$1 found word
    shift
    TIER="" MODE=run QUICK="" RESUME="" PLANNED=() BACKGROUND=() BEGAN=$SECONDS
    WANDB_RUN=${WANDB_RUN:-dummy}
    for word in "$@"; do
        case $word in
            --plan | --commands) MODE=${word#--} ;;
            --quick) QUICK=yes ;;
            --resume) RESUME=--resume=auto ;;
            -*) refuse "unknown flag $word; there are --plan, --commands, --quick and --resume" ;;
            *)
                [ -z "$TIER" ] || refuse "two tiers: $TIER and $word; give one of: $tiers"
                TIER=$word
                ;;
        esac
    done
    found=$(count_gpus)
    if [ -z "$TIER" ]; then # the largest tier that this machine can run
        TIER=cpu
        for word in $tiers; do
            if [ "$word" != cpu ] && [ "${word#gpu}" -le "$found" ]; then TIER=$word; fi
        done
        echo "tier: $TIER ($found GPUs found)" >&2
    fi
    case " $tiers " in *" $TIER "*) ;; *) refuse "unknown tier $TIER; give one of: $tiers" ;; esac
    GPUS=0
    [ "$TIER" = cpu ] || GPUS=${TIER#gpu}
    if [ "$MODE" = run ] && [ "$found" -lt "$GPUS" ]; then
        refuse "$TIER needs $GPUS GPUs and nvidia-smi finds $found; try the tier cpu, or add --plan to see the plan"
    fi
    if [ -n "$QUICK" ] && [ "$TIER" != cpu ]; then refuse "--quick goes with the tier cpu only, not $TIER"; fi
}

# begin TAG: set the machine up and clear the way for a new model, or, with --resume, for the rest of the last one.
begin() {
    TAG=$1
    BASE=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
    DONE="$BASE/run/$TAG.done" # the commands of this run that are through
    [ "$MODE" = commands ] || setup
    [ "$MODE" = run ] || return 0
    echo "base directory: $BASE"
    trap 'kill ${BACKGROUND[@]+"${BACKGROUND[@]##*=}"} 2>/dev/null || true' EXIT
    if [ "$GPUS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi # the ranks share the cores
    mkdir -p "$BASE/run"
    if [ -n "$RESUME" ]; then
        [ -e "$DONE" ] || refuse "--resume: no run of $TAG was begun in $BASE; leave it out"
        return 0
    fi
    # a new run must not find the last one's checkpoints, nor destroy them
    local part
    for part in tokenizer {base,mid,chatsft,chatrl}_checkpoints/"$TAG"; do
        [ -e "$BASE/$part" ] || continue
        rm -rf "$BASE/previous/$part"
        mkdir -p "$(dirname "$BASE/previous/$part")"
        mv "$BASE/$part" "$BASE/previous/$part"
    done
    : >"$DONE"
}

stage() {
    local name=$1 line code=0 began=$SECONDS
    shift
    printf -v line '%q ' "$@"
    line=${line% }
    if [ "$MODE" != run ]; then
        PLANNED+=("$name"$'\t'"$line")
        return
    fi
    local key=${line/ --resume=auto/} # the same command, resumed or not
    if [ -n "$RESUME" ] && grep -qxF -- "$key" "$DONE"; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $line"
    "$@" || code=$?
    if [ "$code" != 0 ]; then
        echo "error: stage $name ended with exit code $code; mend it, then go on with: bash $0 $TIER ${QUICK:+--quick }--resume" >&2
        exit "$code"
    fi
    echo "$key" >>"$DONE"
    echo "== $name: $((SECONDS - began)) s"
}

ranks() {
    local name=$1 module=$2
    shift 2
    if [ "$GPUS" -gt 1 ]; then
        stage "$name" torchrun --standalone --nproc_per_node="$GPUS" -m "$module" -- "$@"
    else
        stage "$name" python -m "$module" "$@"
    fi
}

background() {
    local name=$1
    shift
    if [ "$MODE" != run ]; then
        stage "$name (background)" "$@"
        return
    fi
    "$@" >"$BASE/run/$name.log" 2>&1 &
    BACKGROUND+=("$name=$!")
    echo "== $name: in the background, see $BASE/run/$name.log"
}

await() {
    local entry
    [ "$MODE" = run ] || return 0
    for entry in "${BACKGROUND[@]}"; do
        [ "${entry%%=*}" = "$1" ] || continue
        wait "${entry##*=}" || {
            tail -n 1 "$BASE/run/$1.log" >&2
            refuse "stage $1 failed; go on with: bash $0 $TIER --resume"
        }
    done
}

# finish: print what was noted, or say how to talk to the model.
finish() {
    local source=${1:-rl}
    case $MODE in
        commands) printf '%s\n' "${PLANNED[@]#*$'\t'}" ;;
        plan) printf '%s\n' "${PLANNED[@]}" | python -m scripts.plan --num_gpus="$GPUS" ;;
        run)
            echo
            echo "All stages took $(((SECONDS - BEGAN) / 60)) min $(((SECONDS - BEGAN) % 60)) s. The report is report.md. Talk to the model:"
            echo "    .venv/bin/python -m scripts.chat_cli -i $source -g $TAG    # in the terminal"
            echo "    .venv/bin/python -m scripts.chat_web -i $source -g $TAG    # in the browser"
            ;;
    esac
}

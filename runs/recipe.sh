# Sourced by the recipes (speedrun.sh, runs/aquarat.sh), which are lists of these:
#
#   stage NAME COMMAND...        run a stage; with --plan or --commands only note it
#   ranks NAME MODULE FLAGS...   the same on all GPUs of the tier, by torchrun; plain python on one GPU or a CPU
#   background NAME COMMAND...   begin a stage; `await NAME` waits until it is through
#
# So each command stands in one place, whether it is run, planned or printed.
#
# What a run has done stands in BASE/run/state: the recipe and its model, how to go on, `done NAME KEY` for each stage
# that is through, `through` at the end. A run that has no `through` is gone on with by the next one.

# Paths in the environment may be relative to where the user stands; the stages run from the repository's root.
for name in NANOCHAT_BASE_DIR NANOCHAT_HUB_DIR NANOCHAT_AQUA_DIR AQUA_DATA_DIR TIKTOKEN_CACHE_DIR; do
    value=${!name:-}
    case $value in "" | /*) ;; *) export "$name=$PWD/$value" ;; esac
done
unset name value
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. runs/setup.sh
. runs/signals.sh

count_gpus() {
    command -v nvidia-smi >/dev/null || { echo 0; return; }
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
}

# parse_arguments "TIERS" "$@" sets TIER, GPUS, MODE (run, plan, commands), QUICK and NEW (yes or empty) and WANDB_RUN.
parse_arguments() {
    local tiers=$1 found word
    shift
    TIER="" MODE=run QUICK="" NEW="" PLANNED=() BACKGROUND=() BEGAN=$SECONDS
    WANDB_RUN=${WANDB_RUN:-dummy}
    for word in "$@"; do
        case $word in
            --plan | --commands) MODE=${word#--} ;;
            --quick) QUICK=yes ;;
            --new) NEW=yes ;;
            --resume) refuse "a run that was cut goes on without --resume; leave it out" ;;
            -*) refuse "unknown flag $word; there are --plan, --commands, --quick and --new" ;;
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
    AGAIN="bash $0 $TIER${QUICK:+ --quick}"
}

# begin TAG: set the machine up; then go on with the last run if it was cut, else clear the way for a new model.
begin() {
    TAG=$1
    BASE=${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}
    STATE=$BASE/run/state
    [ "$MODE" = commands ] || setup
    [ "$MODE" = run ] || return 0
    if [ "$GPUS" -gt 1 ]; then export OMP_NUM_THREADS=1; fi # the ranks share the cores
    mkdir -p "$BASE/run" 2>/dev/null || refuse "cannot write to $BASE; set NANOCHAT_BASE_DIR to a directory of your own"
    pass_signals_on
    trap 'for entry in ${BACKGROUND[@]+"${BACKGROUND[@]}"}; do kill "${entry##*=}" 2>/dev/null || true; done' EXIT
    claim "$BASE/run/lock"

    local this="run ${0##*/} $TAG" last="" again=""
    if [ -e "$STATE" ]; then { read -r last && read -r again; } <"$STATE" || true; fi
    if [ -n "$NEW" ] || [ -z "$last" ] || grep -qx through "$STATE"; then
        set_aside "$TAG" "${last##* }"
        printf '%s\n' "$this" "$AGAIN" >"$STATE.new"
        sync "$STATE.new" # a power cut must not leave an empty one: what it tells of would be set aside
        mv "$STATE.new" "$STATE"
        echo "== a new run of $TAG in $BASE; if it is cut, the same command goes on with it"
    elif [ "$this" = "$last" ]; then
        echo "== going on with the run of $TAG in $BASE that was cut; for a new one: $AGAIN --new"
    else
        refuse "a run of ${last#run } in $BASE was cut; go on with it: $again; set it aside: $AGAIN --new;" \
            "or give this one a NANOCHAT_BASE_DIR of its own"
    fi
}

# set_aside TAG...: a new run must not find the last one's work, nor destroy it. That one is over from here on, so what
# is interrupted begins again here, and finds in the state whose work it is.
set_aside() {
    local tag part parts=(tokenizer report)
    for tag in "$@"; do parts+=({base,mid,chatsft,chatrl}_checkpoints/"$tag"); done
    [ ! -e "$STATE" ] || echo through >>"$STATE"
    for part in "${parts[@]}"; do
        [ "${part%/}" = "$part" ] && [ -e "$BASE/$part" ] || continue # no tag, or nothing there
        rm -rf "$BASE/previous/$part"
        mkdir -p "$(dirname "$BASE/previous/$part")"
        mv "$BASE/$part" "$BASE/previous/$part"
    done
}

# claim FILE: one run at a time in a base directory, as all of them share its tokenizer and report. The stages inherit
# descriptor 9 and with it the lock, which the kernel takes back when the last of them has ended, however it ends.
# So a stage that outlived its recipe (kill -9) holds it too: that one is told to save and end.
claim() {
    local owner="" host="" left="" pid
    exec 9>>"$1"
    if ! locked 0; then
        read -r owner host <"$1" || true
        if [ "$host" = "$HOSTNAME" ] && ! kill -0 "$owner" 2>/dev/null; then left=$(holders "$1"); fi
        for pid in $left; do
            echo "== process $pid is left of a run that was killed; it is told to save and end"
            kill -s TERM "$pid" 2>/dev/null || true
        done
        [ -n "$left" ] && locked 600 || refuse "process ${left:-$owner} on $host is at a run in $BASE; wait for it," \
            "end it by kill ${left:-$owner}, or give this one a NANOCHAT_BASE_DIR of its own"
    fi
    echo "$$ $HOSTNAME" >"$1"
}

locked() { # locked SECONDS: take the lock on descriptor 9, waiting so long for it
    attend python -c '
import fcntl, sys, time

until = time.monotonic() + float(sys.argv[1])
while True:
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        if time.monotonic() >= until:
            sys.exit(1)
        time.sleep(0.2)
    except OSError as error:  # a file system without locks
        print(f"warning: cannot lock: {error}; see that no other run is at work in the base directory", file=sys.stderr)
        break
' "$1"
}

holders() { # the leaders of process groups that hold the lock FILE; nothing where there is no /proc
    local link pid
    for link in /proc/[0-9]*/fd/9; do
        pid=${link#/proc/} pid=${pid%%/*}
        if [ "$pid" != "$$" ] && [ "$link" -ef "$1" ] && kill -0 -- "-$pid" 2>/dev/null; then echo "$pid"; fi
    done
}

# The words of a command that decide what a stage makes: not how many ranks share the work, nor how many rows they take
# at a time, nor wandb's name for it.
key() {
    local word
    for word in "$@"; do
        case $word in
            python | runs/launch.py | -m | -- | --standalone | --nproc_per_node=*) ;;
            --run=* | --device_batch_size=* | --resume=*) ;;
            *) printf ' %q' "$word" ;;
        esac
    done
}

# is_done NAME COMMAND...: whether the stage is through. Whatever later stages build on must not change under them.
is_done() {
    local name=$1 was
    shift
    was=$(grep -m 1 "^done $name " "$STATE") || return 1
    [ "$was" != "done $name$(key "$@")" ] || return 0
    case " $* " in
        *" --resume=auto "* | *" scripts.tok_train "*)
            refuse "stage $name is through, but was${was#"done $name"}; put its flags back, or begin a new run:" \
                "$AGAIN --new"
            ;;
    esac
    sed "/^done $name /d" "$STATE" >"$STATE.new" # an evaluation, a download: it is done again
    mv "$STATE.new" "$STATE"
    return 1
}

# ended NAME CODE KEY: note that a stage is through, or end the run. 75 is the code of a stage that was stopped and saved.
ended() {
    local name=$1 code=$2 reason=""
    if [ "$code" = 0 ]; then
        echo "done $name$3" >>"$STATE"
        [ -n "$CAUGHT" ] || return 0
        code=75 # it came too late for this stage, and the next one is not started
    fi
    if [ "$code" = 75 ]; then
        echo "stopped${CAUGHT:+ by $CAUGHT} at stage $name, all is saved; go on with: $AGAIN" >&2
    elif [ -n "$CAUGHT" ]; then
        echo "stopped by $CAUGHT at stage $name (exit code $code); go on with: $AGAIN" >&2
    else
        [ "$code" != 137 ] || reason=" (killed, perhaps for want of memory)"
        echo "error: stage $name ended with exit code $code$reason; mend it, then go on with: $AGAIN" >&2
    fi
    exit "$code"
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
    if is_done "$name" "$@"; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $line"
    attend "$@" || code=$?
    ended "$name" "$code" "$(key "$@")"
    echo "== $name: $((SECONDS - began)) s"
}

ranks() {
    local name=$1 module=$2
    shift 2
    if [ "$GPUS" -gt 1 ]; then
        stage "$name" python runs/launch.py --standalone --nproc_per_node="$GPUS" -m "$module" -- "$@"
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
    if is_done "$name" "$@"; then
        echo "== $name: done before"
        return
    fi
    launch "$@" >"$BASE/run/$name.log" 2>&1 9>&- # without the lock: one that outlives us does no harm
    BACKGROUND+=("$name=$(key "$@")=$!")
    echo "== $name: in the background, see $BASE/run/$name.log"
}

await() {
    local entry words code=0
    [ "$MODE" = run ] || return 0
    for entry in ${BACKGROUND[@]+"${BACKGROUND[@]}"}; do
        [ "${entry%%=*}" = "$1" ] || continue
        follow "${entry##*=}" || code=$?
        [ "$code" = 0 ] || [ -n "$CAUGHT" ] || tail -n 1 "$BASE/run/$1.log" >&2
        words=${entry#*=}
        ended "$1" "$code" "${words%=*}"
    done
}

# finish: print what was noted, or say how to talk to the model.
finish() {
    local source=${1:-rl}
    case $MODE in
        commands) printf '%s\n' "${PLANNED[@]#*$'\t'}" ;;
        plan) printf '%s\n' "${PLANNED[@]}" | python -m scripts.plan --num_gpus="$GPUS" ;;
        run)
            echo through >>"$STATE"
            echo
            echo "All stages took $(((SECONDS - BEGAN) / 60)) min $(((SECONDS - BEGAN) % 60)) s. The report is report.md. Talk to the model:"
            echo "    .venv/bin/python -m scripts.chat_cli -i $source -g $TAG    # in the terminal"
            echo "    .venv/bin/python -m scripts.chat_web -i $source -g $TAG    # in the browser"
            ;;
    esac
}

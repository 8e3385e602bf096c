# Sourced by every recipe that starts its stages as children:
#
#   pass_signals_on      from now on signals are for the running child
#   attend COMMAND...    run it, pass signals on to it, return its exit code
#   launch COMMAND...    only start it; `follow PID` does the rest
#
# A child is the leader of a process group of its own, so that a terminal's Ctrl-C reaches it once, through us, and is
# not ignored, as bash would have it for a child in the background. SIGINT stays what it is, so that a second Ctrl-C
# ends the child at once; SIGTERM, SIGHUP and SIGUSR1 become SIGTERM, which all stages know: a training run saves and
# ends with exit code 75. Only the leader is told: what it has started is its own business while it saves.

CHILD=""   # the process that signals go to
CAUGHT=""  # the last signal that came: after it nothing is started any more
PENDING="" # one for a child that is just being started
NUM_CAUGHT=0

pass_signals_on() {
    local name
    trap 'pass_on SIGINT INT' INT
    trap 'pass_on SIGQUIT QUIT' QUIT
    for name in TERM HUP USR1; do trap "pass_on SIG$name TERM" "$name"; done
}

pass_on() {
    CAUGHT=$1 NUM_CAUGHT=$((NUM_CAUGHT + 1))
    if [ -z "$CHILD" ]; then PENDING=$2; else kill -s "$2" "$CHILD" 2>/dev/null || true; fi
}

launch() {
    set -m            # gives it the group
    "$@" </dev/null & # a group in the background that reads the terminal would be stopped
    set +m
}

follow() {
    local code before
    CHILD=$1
    [ -z "$PENDING" ] || kill -s "$PENDING" "$CHILD" 2>/dev/null || true
    PENDING=""
    while true; do # a signal ends `wait`, not the child
        before=$NUM_CAUGHT code=0
        wait "$CHILD" 2>/dev/null || code=$?
        [ "$before" != "$NUM_CAUGHT" ] || break
    done
    CHILD=""
    return "$code"
}

attend() {
    case $CAUGHT in
        "") ;;
        SIGINT) return 130 ;;
        *) return 143 ;;
    esac
    launch "$@"
    follow $!
}

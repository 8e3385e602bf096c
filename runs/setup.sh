# Sourced from the repository's root by every script that needs the environment. `setup` provides uv, cargo and the
# locked packages in .venv, and puts them on the PATH; it uses the network only for what is not here yet.

refuse() { # one line, exit code 2
    echo "error: $*" >&2
    exit 2
}

find_uv() {
    export PATH="$PWD/.uv/bin:$PATH"
    uv --version >/dev/null 2>&1 && return
    command -v python3 >/dev/null || refuse "no python3 found; install Python 3.10 or newer"
    echo "installing uv" >&2
    # an environment of its own leaves the system's Python alone; where venv is missing, the user's folder will do
    if python3 -m venv .uv >/dev/null 2>&1 && .uv/bin/python -m pip install -q uv 2>/dev/null; then return; fi
    rm -rf .uv
    python3 -m pip install -q --user uv 2>/dev/null ||
        python3 -m pip install -q --user --break-system-packages uv 2>/dev/null ||
        refuse "uv is not installed and pip cannot install it; see https://docs.astral.sh/uv, then run this again"
    export PATH="$(dirname "$(python3 -c 'import uv; print(uv.find_uv_bin())')"):$PATH"
    uv --version >/dev/null 2>&1 || refuse "pip installed uv, but it does not start; see https://docs.astral.sh/uv"
}

find_cargo() {
    [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] && export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    cargo --version >/dev/null 2>&1 && return
    echo "installing Rust" >&2
    if curl --proto '=https' --tlsv1.2 -sSf --connect-timeout 20 https://sh.rustup.rs 2>/dev/null |
        sh -s -- -y -q --profile minimal --no-modify-path >/dev/null 2>&1; then
        export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    cargo --version >/dev/null 2>&1 ||
        refuse "no cargo (Rust) found and rustup cannot be reached; install Rust from https://rustup.rs, then run this again"
}

sync_packages() {
    local log
    [ -d .venv ] || echo "setting up .venv; the first time this fetches torch and builds two crates, which takes minutes" >&2
    log=$(mktemp)
    if ! uv sync --locked >"$log" 2>&1 && ! uv sync --locked --offline >>"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        refuse "uv sync failed, with the network and without; the reason stands above"
    fi
    rm -f "$log"
    export PATH="$PWD/.venv/bin:$PATH"
}

setup() {
    # where it is set, each of a dozen stages would compile torch's sources anew: seven seconds a stage
    unset PYTHONDONTWRITEBYTECODE
    find_uv
    find_cargo
    sync_packages
}

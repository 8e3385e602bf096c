#!/usr/bin/env bash
# Sets everything up and passes the tests. Arguments go to pytest: bash tests/run.sh tests/test_chat.py -k mask
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. runs/setup.sh
setup

python -m ruff check
python -m ruff format --check
# a file stays in one process, which keeps what its tests share; four of torch fit into a small memory
python -m pytest -m "not slow" -n auto --maxprocesses=4 --dist=loadfile "$@"
# the crates are in cargo's cache since the build; without a network cargo must be told so
for crate in rustbpe rustdecode; do
    cargo test --quiet --locked --manifest-path $crate/Cargo.toml ||
        cargo test --quiet --locked --offline --manifest-path $crate/Cargo.toml
done

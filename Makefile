# `make check` is all that must pass before a commit; bash tests/run.sh sets the environment up.
.PHONY: check format lint types test rust

BIN := .venv/bin

check: format lint types test rust

format:
	$(BIN)/ruff format --check
	cd rustbpe && cargo fmt --check
	cd rustdecode && cargo fmt --check

lint:
	$(BIN)/ruff check
	if cargo clippy --version >/dev/null 2>&1; then \
		for crate in rustbpe rustdecode; do (cd $$crate && cargo clippy --quiet --all-targets -- -D warnings) || exit 1; done; fi

types:
	$(BIN)/mypy

test:
	$(BIN)/pytest -m "not slow"

rust:
	cd rustbpe && cargo test --quiet --locked
	cd rustdecode && cargo test --quiet --locked

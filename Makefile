# `make chat` and `make test` set up all they need, in .venv.

PYTHON ?= python3
MODEL ?= checkpoints/tiny
# The release that everything is developed on, and those that the essentials are tested on
TRANSFORMERS ?= 5.23.0
MATRIX ?= 5.9.0 5.17.0 5.19.0 5.23.0
ESSENTIALS = $(patsubst %,tests/test_%.py,configuration golden tokenization chat loading quantization)

.PHONY: chat test test-matrix lint bench clean

chat: .venv/installed
	@.venv/bin/python examples/cli_chat.py --model $(MODEL) $(if $(PROMPT),--prompt "$(PROMPT)")

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-matrix: $(MATRIX:%=test-transformers-%)

test-transformers-%: .venv-%/installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 $(ESSENTIALS) $(ARGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/installed
	.venv/bin/python -m benchmarks.tokenizer

define install
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt transformers==$(1) -e ".[test]"
	touch $@
endef

.venv/installed: setup.cfg constraints.txt
	$(call install,$(TRANSFORMERS))

.venv-%/installed: setup.cfg constraints.txt
	$(call install,$*)

.PRECIOUS: .venv-%/installed

clean:
	rm -rf .venv .venv-* build *.egg-info

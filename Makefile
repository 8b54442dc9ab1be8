# Danlu (丹炉). Every target does its own set-up; the environment lives in a cache folder and `.venv` points to it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv/bin
ADDRESS ?= 127.0.0.1
PORT ?= 6006
BASE := --requirements requirements.txt --no-deps requirements-nodeps.txt
# What tests and lint run in: every package pinned and hashed. `LOCK=` goes by the requirement files and keeps the machine's own torch.
LOCK ?= requirements.lock
ENSURE := $(PYTHON) -m core.environment.venv ensure --link .venv
UPGRADE ?=

.PHONY: run test lint demo bench clean-env setup setup-dev setup-bench format lock coverage mutants

setup:
	@$(ENSURE) $(BASE) --or-with requirements.lock

setup-dev:
	@$(ENSURE) $(if $(LOCK),--lock $(LOCK),$(BASE) --extra requirements-dev.txt)

# A measurement wants the torch that the machine trains with.
setup-bench:
	@$(ENSURE) $(BASE) --extra requirements-dev.txt --or-with requirements.lock

run: setup
	@$(VENV)/python -m core.environment.address --address $(ADDRESS) --port $(PORT)
	@$(VENV)/streamlit run app.py --server.address $(ADDRESS) --server.port $(PORT)

lint: setup-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/python -m core.environment.vulnerabilities requirements.lock

# Two at a time, a file's tests together; the browser has the machine for itself.
test: lint
	$(VENV)/python -m pytest --ignore tests/e2e -n 2 --dist loadfile
	$(VENV)/python -m pytest tests/e2e

# Lines that the tests run, processes they start included; about twice as long as the tests alone.
coverage: setup-dev
	$(VENV)/coverage erase
	$(VENV)/python -m pytest --ignore tests/e2e -n 2 --dist loadfile --cov --cov-report=
	$(VENV)/coverage report --include 'core/*' --fail-under 90
	$(VENV)/coverage report --include 'pages/*' --fail-under 80

# Changes the code at random where an error would go unseen (pyproject.toml says where) and lists the changes that no test minds.
# Its tool lives in a folder of its own and sees the environment from there. `MUTANTS='core.project*'` takes a part; it goes on
# where it stopped.
MUTANTS ?=
mutants: setup-dev
	@tool=$$(mktemp -d) && trap 'rm -rf "$$tool"' EXIT \
	&& $(PYTHON) -m venv "$$tool" && "$$tool/bin/pip" install --quiet 'mutmut>=3.8,<4' \
	&& $(VENV)/python -c 'import site; print(site.getsitepackages()[0])' > "$$(echo "$$tool"/lib/python3*/site-packages)/danlu.pth" \
	&& "$$tool/bin/mutmut" run --max-children 2 $(MUTANTS) && "$$tool/bin/mutmut" results

demo: setup
	$(VENV)/python -m core.demo

bench: setup-bench
	$(VENV)/python -m benchmarks --cpu

format: setup-dev
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

# Renews requirements.lock after a requirements file changed; UPGRADE=--upgrade takes the newest versions in range.
lock:
	@$(PYTHON) -m core.environment.lock_renewal $(UPGRADE)

clean-env:
	@$(PYTHON) -m core.environment.venv clean

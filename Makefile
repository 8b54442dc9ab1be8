# Danlu (丹炉). Every target does its own set-up; the environment lives in a cache folder and `.venv` points to it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv/bin
ADDRESS ?= 127.0.0.1
PORT ?= 6006
BASE := --requirements requirements.txt --no-deps requirements-nodeps.txt

.PHONY: run test lint demo bench clean-env setup setup-dev format

setup:
	@$(PYTHON) -m core.environment.venv ensure $(BASE) --or-with requirements-dev.txt --link .venv

setup-dev:
	@$(PYTHON) -m core.environment.venv ensure $(BASE) --extra requirements-dev.txt --link .venv

run: setup
	@$(VENV)/python -m core.environment.address --address $(ADDRESS) --port $(PORT)
	@$(VENV)/streamlit run app.py --server.address $(ADDRESS) --server.port $(PORT)

lint: setup-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

# Two at a time, a file's tests together; the browser has the machine for itself.
test: lint
	$(VENV)/python -m pytest --ignore tests/e2e -n 2 --dist loadfile
	$(VENV)/python -m pytest tests/e2e

demo: setup
	$(VENV)/python -m core.demo

bench: setup-dev
	$(VENV)/python -m benchmarks --cpu

format: setup-dev
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

clean-env:
	@$(PYTHON) -m core.environment.venv clean

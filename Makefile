# make demo: the whole pipeline on one small embedded model.   make families: all eighteen scripts on all six.
# make test: lint, and all tests but the longest.   make test-all: the longest too.
# All install into .venv first; PYTHON names the interpreter to make it with (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
EMBEDDED := --model_id embedded
FAMILIES := pixart_alpha pixart_sigma hunyuan sdxl sdv15 dit

.PHONY: demo families test test-all

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/python scripts/dit_multiquantizer.py $(EMBEDDED)
	$(BIN)/python scripts/dit_eval_random.py $(EMBEDDED) --outdir demo/labels --num_archs 10 --n_imgs 500 --batch_size 100
	$(BIN)/python scripts/dit_infer.py $(EMBEDDED) --outdir demo/images --n_imgs 20 --pack \
		--q_config demo/labels/quant_cache.pkl:best
	@echo; cat demo/labels/results.txt
	@echo; echo "results table: demo/labels/results.txt, labels: demo/labels/quant_cache.pkl"
	@echo "images: $$(ls -d demo/images/*/ | tail -n 1)contact_sheet.png"

families: .venv/installed $(FAMILIES:%=family-%)
	@ls -t -d demo/*/images/*/contact_sheet.png | head -n $(words $(FAMILIES))

family-%: .venv/installed
	$(BIN)/python scripts/$*_multiquantizer.py $(EMBEDDED)
	$(BIN)/python scripts/$*_eval_random.py $(EMBEDDED) --outdir demo/$*/labels --num_archs 2 --n_imgs 50
	$(BIN)/python scripts/$*_infer.py $(EMBEDDED) --outdir demo/$*/images --n_imgs 10 --quant_act \
		--q_config demo/$*/labels/quant_cache.pkl:best

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: test
	$(BIN)/python -m pytest -n auto -m slow

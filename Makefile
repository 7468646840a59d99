PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Where Fashion-MNIST is not at hand and cannot be fetched, the script says so and $FASTSWA_DATA stays unset.
with_data = FASTSWA_DATA=$$(sh tools/get-data.sh) && export FASTSWA_DATA || unset FASTSWA_DATA

.PHONY: help demo test setup data export types readme docs serve-docs docs-test bench clean

help:    ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' Makefile

demo: $(STAMP)    ## train on Fashion-MNIST with SWA and EMA; results in runs/demo
	@$(with_data); data=fashion_mnist; \
	if [ -z "$$FASTSWA_DATA" ] && ! $(BIN)/python -c 'from fastswa.data import fashion_mnist; fashion_mnist()' 2>/dev/null; then \
		data=toy; \
		echo '*** No Fashion-MNIST: neither its Debian package nor the Hugging Face hub can be reached.' >&2; \
		echo '*** This run trains on TOY DATA. Set FASTSWA_DATA to the folder of the IDX files for the real one.' >&2; \
	fi; \
	$(BIN)/fastswa train --data $$data --epochs 5 --out runs/demo --overwrite && \
	echo '(. $(BIN)/activate puts fastswa on the path)'

test: $(STAMP)    ## run every test: the notebooks, then pytest
	@$(with_data); status=0; $(BIN)/nbdev-test || status=1; $(BIN)/pytest -n 4 --dist loadfile || status=1; exit $$status

setup: $(STAMP)    ## install everything into .venv

data:    ## fetch Fashion-MNIST where Debian's packages can be had; print its folder
	@sh tools/get-data.sh

export: $(STAMP)    ## write fastswa/ from the notebooks, and clean the notebooks
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean

types: $(STAMP)    ## check the types of the public names, in tests/typed_client.py
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[types]'
	$(BIN)/pyright --pythonpath $(BIN)/python

readme: $(STAMP)    ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(VENV)/.docs    ## check the pages, run their code and build the site into _docs/html
	$(BIN)/python -m pytest -q tests/test_docs.py
	$(BIN)/python tools/docs.py

serve-docs:    ## show the site on http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs/html $(or $(PORT),8000)

docs-test: docs    ## build the site and look at every page in Chromium
	@command -v chromium chromium-browser google-chrome >/dev/null || apt-get install -y -q chromium >/dev/null \
		|| { echo 'Chromium is needed, such as that of Debian: apt-get install chromium' >&2; exit 1; }
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -q -m browser tests/test_site.py

# Of other libraries those that are installed: `pip install -c constraints.txt -e '.[bench]'`, see CONTRIBUTING.
bench: $(STAMP)    ## measure averaging, step, epoch, data, checkpoint, processes (10 minutes at most); tables in benchmarks/results
	@$(with_data); \
	for part in 'averaging --rounds 5' 'step --rounds 7 --steps 20' 'epoch --rounds 3' 'data --rounds 3' 'checkpoint --rounds 5' \
		'distributed --rounds 9 --steps 60'; do \
		set -- $$part; script=$$1; shift; $(BIN)/python benchmarks/$$script.py "$$@" --write $(BENCH) || exit 1; echo; \
	done; $(BIN)/python tools/bench_page.py

bench-gpu: $(STAMP)    ## the same on a GPU, 6 minutes at most
	@$(with_data); $(BIN)/python benchmarks/gpu.py --write; $(BIN)/python tools/bench_page.py

clean:    ## remove what was built; runs/ and the data stay
	rm -rf $(VENV) _docs build dist *.egg-info .pytest_cache .hypothesis

# Debian's Python may lack ensurepip: then the pip at hand installs one into the new environment.
$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, pip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo 'fastswa needs Python 3.10 or newer with pip; name it with: make PYTHON=...' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip install -q pip \
			--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; }
	@echo 'installing into $(VENV), which takes some minutes where PyTorch has to be downloaded'
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(STAMP)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	@touch $@

"""Read labelled configurations: the best, FID against average bits as a picture, what tells FID cheaply.

python scripts/quant_cache_report.py alpha_random_seed42
python scripts/quant_cache_report.py alpha_random_seed42 alpha_random_seed43 --outdir alpha_labels
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("labelling.report")

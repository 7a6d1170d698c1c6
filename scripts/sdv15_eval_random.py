"""Draw random quantization configurations of Stable Diffusion 1.5 and label each with size, error, BOPs and FID.

python scripts/sdv15_eval_random.py --outdir sdv15_random_seed42
python scripts/sdv15_eval_random.py --outdir sdv15_embedded_random --model_id embedded --num_archs 10 --n_imgs 250
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("labelling.eval_random", "sdv15")

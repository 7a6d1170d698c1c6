"""Draw random quantization configurations of Stable Diffusion XL and label each with size, error, BOPs and FID.

python scripts/sdxl_eval_random.py --outdir sdxl_random_seed42
python scripts/sdxl_eval_random.py --outdir sdxl_embedded_random --model_id embedded --num_archs 10 --n_imgs 250
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("labelling.eval_random", "sdxl")

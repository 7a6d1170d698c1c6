"""Draw random quantization configurations of PixArt-alpha and label each with size, error, BOPs and FID.

python scripts/pixart_alpha_eval_random.py --outdir alpha_random_seed42
python scripts/pixart_alpha_eval_random.py --outdir alpha_embedded_random --model_id embedded --num_archs 10 --n_imgs 250
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("labelling.eval_random", "pixart_alpha")

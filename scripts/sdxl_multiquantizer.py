"""Fit all six quantizers to every weight of Stable Diffusion XL and store them in multiquantizers/sdxl_mq.pt.

python scripts/sdxl_multiquantizer.py
python scripts/sdxl_multiquantizer.py --model_id embedded
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("multiquantizer", "sdxl")

"""Fit all six quantizers to every weight of Stable Diffusion 1.5 and store them in multiquantizers/sdv15_mq.pt.

python scripts/sdv15_multiquantizer.py
python scripts/sdv15_multiquantizer.py --model_id embedded
"""

from stages.run import run_script

if __name__ == "__main__":
    run_script("multiquantizer", "sdv15")
